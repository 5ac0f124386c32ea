"""The double's builder: asks a plugin what TensorRT asks, times its tactics on the fake GPU, and writes an engine."""

import base64
import gc
import json
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import numpy as np

from trt_double import Tensor
from trt_double.full.gpu import gpu
from trt_double.full.network import STORAGE, Network, axes_shape

MAGIC = b"double of a TensorRT engine\n"
CACHE_MAGIC = b"double of a timing cache\n"


class ProfilingVerbosity(IntEnum):
    LAYER_NAMES_ONLY, NONE, DETAILED = range(3)


class HostMemory(np.ndarray):
    """As ``IHostMemory``: a buffer, and neither bytes nor a bytearray."""

    @classmethod
    def of(cls, content: bytes) -> "HostMemory":
        return np.frombuffer(content, np.uint8).view(cls)

    def __enter__(self) -> "HostMemory":
        return self

    def __exit__(self, *_: object) -> None:
        pass


class TimingCache:
    def __init__(self, version: str, content: bytes) -> None:
        self.version = version
        self.entries: dict[str, int] = json.loads(content[len(CACHE_MAGIC) :])["entries"] if content else {}

    def serialize(self) -> HostMemory:
        return HostMemory.of(CACHE_MAGIC + json.dumps({"version": self.version, "entries": self.entries}).encode())


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, list[list[int]]] = {}
        self.values: dict[str, list[list[int]]] = {}

    def set_shape(self, input: str, min: Sequence[int], opt: Sequence[int], max: Sequence[int]) -> None:
        if any(len(shape) > 8 for shape in (min, opt, max)):
            raise TypeError("set_shape(): incompatible function arguments. The following argument types are supported")
        if len({len(min), len(opt), len(max)}) > 1:
            raise RuntimeError("Shape provided for min, opt and max must have the same rank")
        if not all(0 <= a <= b <= c for a, b, c in zip(min, opt, max, strict=True)):
            raise ValueError("min <= opt <= max does not hold")  # the real one raises so
        self.shapes[input] = [list(min), list(opt), list(max)]

    def set_shape_input(self, input: str, min: Sequence[int], opt: Sequence[int], max: Sequence[int]) -> None:
        self.values[input] = [list(min), list(opt), list(max)]


class Config:
    def __init__(self, version: str) -> None:
        self.version = version
        self.profiling_verbosity = ProfilingVerbosity.LAYER_NAMES_ONLY
        self.flags: set[Any] = set()
        self.profiles: list[Profile] = []
        self.cache: TimingCache | None = None

    def set_flag(self, flag: Any) -> None:
        self.flags.add(flag)

    def add_optimization_profile(self, profile: Profile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> TimingCache | None:
        content = bytes(serialized_timing_cache)
        if content and not content.startswith(CACHE_MAGIC):
            return None
        if content and json.loads(content[len(CACHE_MAGIC) :])["version"] != self.version:
            return None
        return TimingCache(self.version, content)

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        self.cache = cache
        return True

    def get_timing_cache(self) -> TimingCache | None:
        return self.cache


class Builder:
    def __init__(self, trt: Any, logger: Any) -> None:
        assert isinstance(logger, trt.ILogger)
        trt.double.check_driver(logger)
        self.trt, self.logger = trt, logger

    def create_network(self, flags: int = 0) -> Any:
        members = getattr(getattr(self.trt, "NetworkDefinitionCreationFlag", None), "__members__", {})
        known = sum(1 << int(flag) for flag in members.values())
        if flags & ~known:
            raise ValueError(f"unknown network flags {flags:#x}")  # removed in 11
        strong = members.get("STRONGLY_TYPED")
        return self.trt.INetworkDefinition(self.trt, strong is None or bool(flags & 1 << int(strong)))

    def create_builder_config(self) -> Config:
        return Config(self.trt.__version__)

    def create_optimization_profile(self) -> Profile:
        return Profile()

    def build_serialized_network(self, network: Network, config: Config) -> HostMemory | None:
        try:
            return self._build(network, config)
        except Refused as error:
            self.logger.log(self.trt.ILogger.ERROR, f"IBuilder::buildSerializedNetwork: Error Code 4: {error}")
            return None

    def _build(self, network: Network, config: Config) -> HostMemory:
        if not network.strongly_typed:
            raise Refused("API Usage Error (a half precision input needs a builder flag or a strongly typed network)")
        if not network.outputs:
            raise Refused("API Usage Error (Network must have at least one output)")
        self.trt.double.use_runtime_context()
        profiles = config.profiles or [Profile()]
        on_host = {t.name for layer in network.layers if layer.op.kind == "reshape" for t in layer.sources[1:]}
        for tensor in network.inputs:
            for profile in profiles:
                if tensor.name in profile.shapes:
                    self._check_profile(tensor, profile.shapes[tensor.name])
                elif -1 in tensor.shape:
                    raise Refused(f"Error Code 4: Network has dynamic input {tensor.name} without a profile for it")
                else:
                    profile.shapes[tensor.name] = [list(tensor.shape)] * 3
        layers = []
        for layer in network.layers:
            # Names may have been changed since the layer was added.
            layer.op.inputs, layer.op.output = [t.name for t in layer.sources], layer.get_output(0).name
            layer.op.more = [t.name for t in layer.outputs[1:]]
            layer.op.name = layer.name
            if layer.weights is not None:
                values = layer.weights.read()
                layer.op.params["values"] = values.tolist()
            entry = dict(vars(layer.op))
            if layer.op.kind == "plugin":
                entry["params"] = {**layer.op.params, **self._plugin(layer, profiles, config)}
            layers.append(entry)
        tensors = {t.name: [int(t.dtype), list(t.shape)] for t in network.inputs}
        tensors |= {
            tensor.name: [int(tensor.dtype), list(tensor.shape)] for layer in network.layers for tensor in layer.outputs
        }
        plan = {
            "version": self.trt.__version__,
            "layers": layers,
            "tensors": tensors,
            "compatible": "VERSION_COMPATIBLE" in {flag.name for flag in config.flags},
            "verbosity": config.profiling_verbosity.name,
            "inputs": [t.name for t in network.inputs],
            "outputs": [t.name for t in network.outputs],
            "on_host": sorted(on_host),
            "profiles": [{"shapes": p.shapes, "values": p.values} for p in profiles],
        }
        return HostMemory.of(MAGIC + json.dumps(plan).encode())

    def _check_profile(self, tensor: Any, ranges: list[list[int]]) -> None:
        for size, *bounds in zip(tensor.shape, *ranges, strict=True):
            if size != -1 and set(bounds) != {size}:
                raise Refused(f"the profile of {tensor.name} contradicts its shape {tensor.shape}")

    def _plugin(self, layer: Any, profiles: list[Profile], config: Config) -> dict[str, Any]:
        """What TensorRT asks of a plugin in a build; see TENSORRT.md, "Calls, in order"."""
        calls, plugin, lost = (
            self.trt.double.calls,
            layer.plugin,
            Refused("Error Code 10: Could not find any implementation for node"),
        )
        kinds = [int(t.dtype) for t in [*layer.sources, *layer.outputs]]
        count = len(layer.sources)
        workspace, tactic, key = 0, 0, ""
        for profile in profiles:
            shapes = {
                which: [profile.shapes[t.name][at] for t in layer.sources]
                for at, which in enumerate(("min", "opt", "max"))
            }
            own = [list(t.shape) for t in layer.sources]
            every = {
                which: [*found, *(list(axes_shape(axes, found)) for axes in layer.op.params["axes"])]
                for which, found in {**shapes, "own": own}.items()
            }
            wide = [
                Tensor(tuple(own), kind, 0, tuple(most), tuple(least))
                for own, kind, most, least in zip(every["own"], kinds, every["max"], every["min"], strict=True)
            ]
            opt = [Tensor(tuple(s), k) for s, k in zip(every["opt"], kinds, strict=True)]
            if not all(calls.supports(plugin, position, wide) for position in range(len(wide))):
                raise lost
            if calls.configure(plugin, wide[:count], wide[count:]) != 0:
                raise lost
            tactics = calls.tactics(plugin)
            if not tactics:
                raise lost
            assert len(set(tactics)) == len(tactics), "tactics are not unique"
            assert all(t > 0 for t in tactics), "tactics must be positive"
            wanted = calls.workspace(plugin, wide[:count], wide[count:])
            if wanted > 1 << 40:
                raise lost
            workspace = max(workspace, wanted)
            key = f"{calls.core(plugin)} {calls.timing_cache_id(plugin)} {every['opt']}"
            if config.cache is not None and config.cache.entries.get(key) in tactics:
                tactic = config.cache.entries[key]
            else:
                timed = {
                    number: self._time(calls, plugin, number, (opt[:count], opt[count:]), workspace)
                    for number in tactics
                }
                if None in timed.values():
                    raise lost
                tactic = min(timed, key=lambda number: (timed[number], number))
                self.trt.double.timed.append((key, sorted(timed)))
            if config.cache is not None:
                config.cache.entries[key] = tactic
        stored = calls.stored_fields(plugin)
        gc.collect()
        if stored is None:
            raise Refused("Error Code 2: getFieldsToSerialize failed")
        fields = [[f.name, f.type, f.length, base64.b64encode(f.data).decode()] for f in stored.read()]
        return {"core": calls.core(plugin), "fields": fields, "tactic": tactic, "workspace": workspace}

    def _time(
        self, calls: Any, plugin: Any, tactic: int, opt: tuple[list[Tensor], list[Tensor]], workspace: int
    ) -> float | None:
        device = gpu()
        attached = calls.attach(plugin)
        if attached is None or calls.set_tactic(attached, tactic) != 0:
            return None
        count = len(opt[0])
        sizes = [int(np.prod(t.shape)) * np.dtype(STORAGE[t.type]).itemsize for t in (*opt[0], *opt[1])]
        pointers = [device.allocate(size) for size in [*sizes, max(workspace, 1)]]
        stream = device.handle()
        device.streams[stream] = []
        for pointer, size in zip(pointers[:count], sizes, strict=False):
            device.array(pointer, (size,), "u1")[:] = 0
        try:
            if calls.on_shape_change(attached, *opt) != 0:
                return None
            before = device.clock
            device.cuda.begin_capture()  # the timing of a plugin that loads or waits here goes wrong
            status = calls.enqueue(attached, pointers[:count], pointers[count:-1], pointers[-1], stream)
            device.cuda.end_capture()
            return device.clock - before if status == 0 and device.finish(stream) == 0 else None
        finally:
            calls.destroy(attached)
            for pointer in pointers:
                device.memory.pop(pointer)
            del device.streams[stream]


class Refused(Exception):
    """The text of an error that TensorRT logs."""
