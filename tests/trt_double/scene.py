"""What the tests of the plugin share."""

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from pyfmha.aot import build
from pyfmha.attention import biased, biased_decode, decode, fp8
from pyfmha.attention.biased import Biased
from pyfmha.attention.biased_decode import BiasedDecode
from pyfmha.attention.decode import Decode
from pyfmha.attention.first import Attention
from pyfmha.attention.forward import ARGUMENTS, NULLABLE, Forward
from pyfmha.attention.fp8 import Fp8
from pyfmha.attention.operator import OPERATOR
from pyfmha.operators.description import Operator
from pyfmha.runtime.library import Library
from pyfmha.spec.arch import parse_archs
from pyfmha.spec.kernel import Argument, KernelSpec
from pyfmha.trt import register
from pyfmha.trt.attention.problem import Features, Problem
from trt_double import BUILD, CHAR, FLOAT32, HALF, INT32, RUNTIME, Calls, Field, Tensor
from trt_double.binding import DoubleCalls, make_binding
from trt_double.vtable import RealCalls

REAL_BINDINGS = ("tensorrt", "tensorrt_lean", "tensorrt_rtx")
BINDINGS = ("double", *(name for name in REAL_BINDINGS if importlib.util.find_spec(name)))
HEADS, SIZE, SCALE = 4, 32, 0.25
MEMBERS = (Attention("fp16", SIZE), Attention("fp16", SIZE, False), Attention("bf16", SIZE), Attention("fp32", SIZE))


def _small(spec: KernelSpec, warps: int, name: str) -> KernelSpec:
    """A spec with small blocks, which compile fast."""
    constants = tuple((key, 32 if key in ("BLOCK_M", "BLOCK_N") else value) for key, value in spec.constants)
    return replace(spec, constants=constants, num_warps=warps, num_stages=1, tunings=(), algorithm_name=name)


def specs(members: Sequence[Attention], warps: Sequence[int] = (4,)) -> list[KernelSpec]:
    """For each member an algorithm for each number of warps, of two variants."""
    return [_small(spec, n, f"warps{n}") for member in members for n in warps for spec in member.specs()]


def build_library(folder: Path, operators: Sequence[Operator] = ()) -> Path:
    """The members for sm_90; causal fp16 has two algorithms."""
    wanted = specs(MEMBERS[:1], (4, 2)) + specs(MEMBERS[1:])
    return build(wanted, parse_archs(["sm_90"]), folder, jobs=2, operators=operators).library


FORWARDS = (*(Forward(dtype, SIZE) for dtype in ("fp16", "bf16", "fp32")), Forward("fp16", 128))
BIASED = (Biased("fp16", SIZE), Biased("bf16", SIZE), Biased("fp16", 64))
EIGHTS = (Fp8("fp16", 64), Fp8("bf16", 64))
FORWARD_KERNEL = Path(__file__).with_name("forward_kernel.py")


DECODES = (Decode("fp16", SIZE), Decode("fp16", 128))


def pair_standins(pair: Decode) -> list[KernelSpec]:
    """The split with hints and without, and what combines."""
    arguments = tuple(Argument(name, kind.replace("T", pair.dtype)) for name, kind in decode.ARGUMENTS)
    hinted = tuple(Argument(a.name, a.type, 16 if a.name in ("Out", "Q", "K", "V") else None) for a in arguments)
    split = KernelSpec(
        source=FORWARD_KERNEL,
        kernel="decode",
        name=pair.split_name,
        arguments=hinted,
        constants=(("HEAD_SIZE", pair.padded), ("BLOCK", 128), ("LAST", 0)),
        grid="splits * cdiv(q_len * (num_heads / num_kv_heads), 16), batch_size * num_kv_heads, 1",
        num_warps=1,
        num_stages=1,
        algorithm_name="default",
        nullable=decode.SPLIT_NULLABLE,
    )
    constants = (("HEAD_SIZE", pair.padded), ("BLOCK", 128), ("LAST", 1))
    grid = "batch_size * num_heads * q_len"
    combine = replace(
        split,
        name=pair.combine_name,
        arguments=arguments,
        constants=constants,
        grid=grid,
        programmatic_dependent_launch=True,
        nullable=decode.COMBINE_NULLABLE,
    )
    return [split, split.generic(), combine]


def biased_pair_standins(pair: BiasedDecode) -> list[KernelSpec]:
    """The split, and what combines."""
    arguments = tuple(Argument(name, kind.replace("T", pair.dtype)) for name, kind in biased_decode.ARGUMENTS)
    split, *_, combine = pair_standins(Decode(pair.dtype, pair.padded))
    changes = {"kernel": "biased_decode", "arguments": arguments, "nullable": biased_decode.SPLIT_NULLABLE}
    combining = {"nullable": (*biased_decode.SPLIT_NULLABLE, "Q", "K", "V"), "programmatic_dependent_launch": False}
    return [
        replace(split, name=pair.split_name, **changes),
        replace(combine, name=pair.combine_name, **changes | combining),
    ]


def build_decode_library(folder: Path) -> Path:
    """Stand-ins for ``fmha_fwd_*`` of two head sizes, of whose first there are two algorithms, and for decoding."""
    first = [standin(FORWARDS[0], block) for block in (256, 512)]  # as in the library without decoding
    wanted = [variant for spec in first for variant in (spec, spec.generic())]
    wanted.append(standin(FORWARDS[-1], 256).generic())
    for pair in DECODES:
        wanted += pair_standins(pair)
    return build(wanted, parse_archs(["sm_90"]), folder, jobs=2).library


def standin(member: Forward, block: int) -> KernelSpec:
    arguments = tuple(
        Argument(name, kind.replace("T", member.dtype), 16 if name in ("Out", "Q", "K", "V") else None)
        for name, kind in ARGUMENTS
    )
    return KernelSpec(
        source=FORWARD_KERNEL,
        kernel="forward",
        name=member.name,
        arguments=arguments,
        constants=(("HEAD_SIZE", member.padded), ("BLOCK", block)),
        grid="cdiv(q_len, BLOCK), num_heads, batch_size",
        num_warps=1,
        num_stages=1,
        algorithm_name=f"block{block}",
        nullable=NULLABLE,
    )


def biased_standin(member: Biased) -> KernelSpec:
    arguments = tuple(Argument(name, kind.replace("T", member.dtype)) for name, kind in biased.ARGUMENTS)
    return replace(
        standin(Forward(member.dtype, member.padded), 256),
        kernel="biased",
        name=member.name,
        arguments=arguments,
        nullable=biased.NULLABLE,
    )


def fp8_standin(member: Fp8) -> KernelSpec:
    """With what the real ones ask of a call that the plugin refuses by itself."""
    arguments = tuple(Argument(name, kind.replace("T", member.dtype)) for name, kind in fp8.ARGUMENTS)
    return replace(
        standin(Forward(member.dtype, member.padded), 256),
        kernel="fp8",
        name=member.name,
        arguments=arguments,
        requires=("softcap == 0", "sm_scale > 0", "window_left == -1", "window_right <= 0"),
        nullable=fp8.NULLABLE,
    )


def build_forward_library(folder: Path) -> Path:
    """The first kernel's causal fp16, and stand-ins for :data:`FORWARDS`, of whose first there are two algorithms, for
    :data:`BIASED` and for :data:`EIGHTS`."""
    wanted = specs(MEMBERS[:1]) + [biased_standin(member) for member in BIASED]
    wanted += [fp8_standin(member) for member in EIGHTS]
    for number, member in enumerate(FORWARDS):
        for block in (256, 512) if number == 0 else (256,):
            spec = standin(member, block)
            wanted += [spec.generic()] if number else [spec, spec.generic()]
    return build(wanted, parse_archs(["sm_90"]), folder, jobs=2).library


def open_binding(name: str) -> tuple[ModuleType | None, str]:
    """A binding by name, or None and the reason."""
    if name == "double":
        return make_binding(), ""
    try:
        return importlib.import_module(name), ""
    except ImportError as error:
        return None, f"{name} is not installed: {error}"


def calls_of(trt: Any) -> Calls:
    """TensorRT's calls for a module."""
    return RealCalls(trt) if trt.__name__.startswith("tensorrt") else DoubleCalls(trt)


def number(name: str, kind: int, value: float) -> Field:
    """A field of one number."""
    return Field(name, kind, 1, np.array([value], {INT32: np.int32, FLOAT32: np.float32}[kind]).tobytes())


def text(name: str, value: str) -> Field:
    """A field of text, with a NUL as TensorRT writes it."""
    return Field(name, CHAR, len(value) + 1, value.encode() + b"\0")


def fields(**changes: float | str | None) -> list[Field]:
    """The fields of the tests' plugin, with some changed, or left out where None."""
    values: dict[str, float | str | None] = {
        "num_heads": HEADS,
        "head_size": SIZE,
        "type_id": HALF,
        "softmax_scale": SCALE,
        **changes,
    }
    kinds = {"softmax_scale": FLOAT32, "softcap": FLOAT32}
    return [
        text(name, value) if isinstance(value, str) else number(name, kinds.get(name, INT32), value)
        for name, value in values.items()
        if value is not None
    ]


def tensors(batch: int = 2, seq: int = 100, kind: int = HALF, heads: int = HEADS, size: int = SIZE) -> list[Tensor]:
    """Q, K, V and Out of one shape."""
    return [Tensor((batch, heads, seq, size), kind)] * 4


def dynamic(batch: int = 8, seq: int = 512) -> list[Tensor]:
    """Q, K, V and Out of any batch and seq, up to some."""
    return [Tensor((-1, HEADS, -1, SIZE), HALF, largest=(batch, HEADS, seq, SIZE))] * 4


class Scene:
    """One binding with the plugin registered, and TensorRT's calls on it.

    Attributes:
        trt: the module.
        calls: its C++ side.
        creator: as the registry has it.
    """

    _namespaces = 0

    def __init__(self, trt: Any, library: Library | Path, operator: Operator = OPERATOR) -> None:
        # The registry of a real binding lives as long as the process: each scene has a namespace of its own.
        Scene._namespaces += 1
        self.namespace = f"scene{Scene._namespaces}"
        self.trt = trt
        self.calls = calls_of(trt)
        self.creator = register(trt, namespace=self.namespace, library=library, operator=operator)

    def built(self, **changes: float | str | None) -> Any:
        """A plugin of the build phase."""
        plugin = self.calls.create(self.creator, "layer 7", fields(**changes), BUILD)
        assert plugin is not None
        return plugin

    def loaded(self, plugin: Any | None = None) -> Any:
        """A plugin as an engine is loaded: from the fields of another."""
        stored = self.calls.stored_fields(plugin or self.built())
        assert stored is not None
        loaded = self.calls.create(self.creator, "layer 7", stored.read(), RUNTIME)
        assert loaded is not None
        return loaded

    def running(self, batch: int = 2, seq: int = 100, tactic: int = 0, **changes: float) -> Any:
        """A plugin of an execution context, prepared for a shape; a CUDA context must be current."""
        plugin = self.calls.attach(self.loaded(self.built(**changes)))
        assert plugin is not None
        assert self.calls.set_tactic(plugin, tactic) == 0
        shape = tensors(batch, seq, int(changes.get("type_id", HALF)), int(changes.get("num_heads", HEADS)))
        assert self.calls.on_shape_change(plugin, shape[:3], shape[3:]) == 0
        return plugin


def problem_of(plugin: Any) -> Problem:
    """What a Python plugin of attention serves."""
    values = plugin.instance.attributes
    features = Features(
        num_kv_heads=values["num_kv_heads"],
        layout=values["layout"],
        bottom_right=bool(values["bottom_right"]),
        window=(values["window_left"], values["window_right"]),
        softcap=values["softcap"],
        **{name: bool(values[name]) for name in ("return_lse", "q_lengths", "kv_lengths", "cu_seqlens")},
    )
    dtype = plugin.instance.types["T"]
    has_features = plugin.instance.scope.values["features"]
    return Problem(
        values["num_heads"],
        values["head_size"],
        dtype,
        values["softmax_scale"],
        values["causal"] != 0,
        features if has_features else None,
    )
