"""Part of ``trt_gpu.py``: everything that ``fmha_fwd_*`` serves, through the plugin, against float64."""

import gc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from typing import Any

import numpy as np
from trt_double import BUILD, FLOAT, RUNTIME, Calls, Tensor
from trt_double.scene import fields
from trt_gpu_parts import TYPE_IDS, Guarded, Report, error_of, last_error

from pyfmha.attention.decode import Decode
from pyfmha.attention.first import DTYPES
from pyfmha.attention.forward import Forward
from pyfmha.attention.hopper import DECODE_KERNEL
from pyfmha.attention.reference import LIMITS, attend
from pyfmha.attention.run import to_float, to_storage
from pyfmha.bfloat16 import STORAGE
from pyfmha.errors import PyfmhaError
from pyfmha.runtime.device import Device, Stream
from pyfmha.runtime.library import Library

INT32 = 3  # trt.DataType
HEAD_SIZES = (1, 72, 128, 32, 80, 160, 40, 96, 256, 64, 100)
"""Neighbours differ much, because a case takes some neighbours."""

SIZES_OF_A_CASE = 3
"""With each dtype, at the least."""

LSE_LIMIT = 1e-3  # absolute: of a natural logarithm around 5


@dataclass(frozen=True)
class Case:
    """One combination of features.

    Attributes:
        fields: of the plugin.
        reference: what :func:`pyfmha.attention.reference.attend` is told.
        heads, kv_heads, batch, rows, columns: sizes; of a ragged batch all tokens.
        misaligned: whether Q begins one element past a multiple of 256 bytes.
        decoded: whether the keys are to be split, where the library has the functions for it, and does not decode in
            one launch instead.
    """

    fields: dict[str, float | str] = field(default_factory=dict)
    reference: dict[str, Any] = field(default_factory=dict)
    heads: int = 4
    kv_heads: int = 2
    batch: int = 2
    rows: int = 65
    columns: int = 130
    misaligned: bool = False
    decoded: bool = False


FULL, CAUSAL = {"causal": 0}, {"window_right": 0}
RAGGED = {"cu_seqlens_q": [0, 33, 33, 70, 99], "cu_seqlens_kv": [2, 7, 70, 71, 190]}
SAME = {"cu_seqlens_q": RAGGED["cu_seqlens_q"], "cu_seqlens_kv": RAGGED["cu_seqlens_q"]}
CASES = {
    "full, one head": Case(FULL, {}, 1, 1),
    "causal": Case({}, CAUSAL, kv_heads=4),
    "grouped heads": Case(FULL),
    "multi-query": Case({}, CAUSAL, 8, 1),
    "bottom right": Case({"causal": 2}, {**CAUSAL, "bottom_right": True}),
    "more queries than keys": Case({"causal": 2}, {**CAUSAL, "bottom_right": True}, rows=130, columns=65),
    "decoding": Case(
        {"causal": 2, "kv_lengths": 1}, {**CAUSAL, "bottom_right": True, "kv_lengths": [300, 7]}, 8, 2, 2, 1, 333
    ),
    "window": Case({**FULL, "window_left": 9, "window_right": 3}, {"window_left": 9, "window_right": 3}),
    "causal window": Case(
        {"causal": 2, "window_left": 20}, {**CAUSAL, "window_left": 20, "bottom_right": True}, rows=129, columns=257
    ),
    "window of one key": Case({**FULL, "window_left": 0, "window_right": 0}, {"window_left": 0, "window_right": 0}),
    "soft cap": Case({"softcap": 1.5}, {**CAUSAL, "softcap": 1.5}),
    "bshd": Case({"layout": "bshd"}, CAUSAL),
    "packed, an axis of 3": Case({"layout": "packed"}, CAUSAL, kv_heads=4, columns=65),
    "packed, grouped heads": Case({"layout": "packed"}, CAUSAL, columns=65),
    "lengths": Case(
        {**FULL, "q_lengths": 1, "kv_lengths": 1}, {"q_lengths": [65, 12, 0], "kv_lengths": [77, 0, 130]}, batch=3
    ),
    "lengths out of range": Case(
        {"q_lengths": 1, "kv_lengths": 1}, {**CAUSAL, "q_lengths": [-3, 99], "kv_lengths": [999, 40]}
    ),
    "ragged": Case({"cu_seqlens": 1, "causal": 2}, {**CAUSAL, "bottom_right": True, **RAGGED}, rows=100, columns=200),
    "ragged, packed": Case({"cu_seqlens": 1, "layout": "packed"}, {**CAUSAL, **SAME}, 4, 2, 2, 100, 100),
    "everything": Case(
        {"causal": 2, "layout": "bshd", "window_left": 33, "softcap": 2.0, "q_lengths": 1, "kv_lengths": 1},
        {**CAUSAL, "bottom_right": True, "window_left": 33, "softcap": 2.0, "q_lengths": [50, 65],
         "kv_lengths": [130, 61]},
    ),
    "misaligned": Case({}, CAUSAL, misaligned=True),
    "misaligned ragged": Case({"cu_seqlens": 1}, {**CAUSAL, **RAGGED}, rows=100, columns=200, misaligned=True),
    "no keys": Case(FULL, {}, columns=0),
    "decoding 600 keys": Case(FULL, {}, 8, 2, 1, 1, 600, decoded=True),
    "decoding 4096 keys": Case(
        {"causal": 2}, {**CAUSAL, "bottom_right": True}, 8, 2, 1, 3, 4096, decoded=True,
    ),
    "decoding with lengths": Case(
        {"causal": 2, "kv_lengths": 1}, {**CAUSAL, "bottom_right": True, "kv_lengths": [4096, 0, 517]}, 8, 2, 3, 1,
        4096, decoded=True,
    ),
    "decoding in a window": Case(
        {"causal": 2, "layout": "bshd", "window_left": 70, "softcap": 2.0, "q_lengths": 1, "kv_lengths": 1},
        {**CAUSAL, "bottom_right": True, "window_left": 70, "softcap": 2.0, "q_lengths": [16, 0, 9],
         "kv_lengths": [600, 600, 37]}, 8, 2, 3, 16, 600, decoded=True,
    ),
    "decoding, misaligned": Case(FULL, {}, 8, 2, 1, 1, 600, misaligned=True, decoded=True),
}  # fmt: skip
"""Each with a log-sum-exp."""


def _storage(values: Any, layout: object) -> Any:
    return np.ascontiguousarray(values.swapaxes(1, 2)) if layout != "bhsd" and values.ndim == 4 else values


def _poisoned(case: Case, k: Any, v: Any, dtype: str) -> None:
    """NaN in keys and values that do not count."""
    nan = to_storage(np.array(np.nan), dtype)
    ends = case.reference.get("cu_seqlens_kv")
    for tensor in (k, v):
        if ends is not None:
            tensor[: ends[0]] = tensor[ends[-1] :] = nan
        for number, length in enumerate(case.reference.get("kv_lengths", [])):
            tensor[number, :, max(length, 0) :] = nan


@lru_cache(maxsize=1)  # the tactics of a function come one after the other
def data_of(name: str, dtype: str, size: int) -> tuple[tuple[Any, ...], Any, Any]:
    """The inputs in the plugin's order, and Out, as it is stored, and Lse in float64."""
    case, random = CASES[name], np.random.default_rng([size, len(name)])
    ragged, layout = "cu_seqlens" in case.fields, case.fields.get("layout", "bhsd")
    if ragged:
        shapes = [(case.rows, case.heads), (case.columns, case.kv_heads), (case.columns, case.kv_heads)]
    else:
        shapes = [
            (case.batch, heads, n) for heads, n in ((case.heads, case.rows), *[(case.kv_heads, case.columns)] * 2)
        ]
    natural = [to_storage(random.standard_normal((*shape, size), np.float32), dtype) for shape in shapes]
    if layout != "packed":  # where a packed tensor's padding is that of Q as well
        _poisoned(case, *natural[1:], dtype)
    out, lse = attend(*(to_float(x, dtype) for x in natural), sm_scale=size**-0.5, **case.reference)
    inputs = [_storage(x, layout) for x in natural]
    if layout == "packed":
        packed = np.concatenate(inputs, axis=-2)
        if case.kv_heads == case.heads:
            packed = packed.reshape(*packed.shape[:-2], 3, case.heads, size)
        inputs = [packed]
    lengths = [np.array(value, np.int32) for value in case.reference.values() if isinstance(value, list)]
    return (*inputs, *lengths), _storage(out, "bshd" if layout == "packed" else layout), lse


class Featured:
    """A plugin of an execution context for one case; see :class:`trt_gpu_parts.Attached`."""

    def __init__(self, calls: Calls, creator: Any, name: str, dtype: str, size: int) -> None:
        case = CASES[name]
        self.calls, self.name, self.dtype, self.size, self.case = calls, name, dtype, size, case
        values = {"num_kv_heads": case.kv_heads, "return_lse": 1, "type_id": TYPE_IDS[dtype], "head_size": size}
        made = fields(num_heads=case.heads, softmax_scale=size**-0.5, **values, **case.fields)
        built = calls.create(creator, name, made, BUILD)
        if built is None:
            raise last_error()
        gc.collect()
        stored = calls.stored_fields(built)
        assert stored is not None
        loaded = calls.create(creator, name, stored.read(), RUNTIME)
        self.tactics = calls.tactics(loaded) or []
        self.plugin: Any = calls.attach(loaded)
        if self.plugin is None or not self.tactics:
            raise last_error()
        self._kept = built, loaded

    def run(self, tactic: int, device: Device, stream: Stream) -> tuple[float, float, bool]:
        """One launch: errors of Out and of Lse, and whether no byte outside was written."""
        inputs, exact, exact_lse = data_of(self.name, self.dtype, self.size)
        kind, calls = TYPE_IDS[self.dtype], self.calls
        given = [Tensor(x.shape, INT32 if x.dtype == np.int32 else kind) for x in inputs]
        wanted = [Tensor(exact.shape, kind), Tensor(exact_lse.shape, FLOAT)]
        if calls.set_tactic(self.plugin, tactic) or calls.on_shape_change(self.plugin, given, wanted):
            raise last_error()
        shift = inputs[0].itemsize if self.case.misaligned else 0
        arrays = [Guarded.of(x, 0 if index else shift) for index, x in enumerate(inputs)]
        out = Guarded(exact.size * np.dtype(STORAGE[self.dtype]).itemsize)
        lse = Guarded(4 * exact_lse.size)
        workspace = Guarded(calls.workspace(self.plugin, given, wanted))
        everything = [*arrays, out, lse, workspace]
        try:
            device.synchronize()  # the stream does not wait for the copies
            pointers = [memory.pointer for memory in arrays], [out.pointer, lse.pointer]
            if calls.enqueue(self.plugin, *pointers, workspace.pointer, stream.handle):
                raise last_error()
            stream.synchronize()
            error = error_of(out.read(exact.shape, STORAGE[self.dtype]), self.dtype, exact)
            return (
                error,
                lse_error(lse.read(exact_lse.shape, np.float32), exact_lse),
                all(m.intact() for m in everything),
            )
        finally:
            for memory in everything:
                memory.free()

    def close(self) -> None:
        """Give the loaded code back."""
        self.plugin.destroy()


def lse_error(actual: Any, exact: Any) -> float:
    """The largest difference; infinite where not the same queries see no key, or one is NaN."""
    empty = np.isneginf(exact)
    if not np.array_equal(np.isneginf(actual), empty) or np.isnan(actual).any():
        return float("inf")
    return float(np.abs(actual[~empty] - exact[~empty]).max(initial=0.0))


def sizes_of(dtype: str, served: tuple[int, ...]) -> dict[str, list[int]]:
    """The head sizes that each case runs with: some, but the cases of one kind have all of them together.

    The kinds are dense and decoded, aligned and not. Each dtype begins elsewhere.

    Args:
        dtype: which.
        served: the head sizes to share out.
    """
    kinds: dict[tuple[bool, bool], list[str]] = {}
    for name, case in CASES.items():
        kinds.setdefault((case.decoded, case.misaligned), []).append(name)
    shared = {}
    for names in kinds.values():
        count = min(max(SIZES_OF_A_CASE, -(-len(served) // len(names))), len(served))
        for turn, name in enumerate(names, start=DTYPES.index(dtype)):
            shared[name] = [served[(turn * count + index) % len(served)] for index in range(count)]
    return shared


def _runs(library: Library) -> list[tuple[str, str, int]]:
    """Case, dtype and head size of all that the library serves."""
    served = {dtype: tuple(size for size in HEAD_SIZES if Forward(dtype, size).name in library) for dtype in DTYPES}
    shared = {dtype: sizes_of(dtype, served[dtype]) for dtype in DTYPES}
    return [(name, dtype, size) for name in CASES for dtype in DTYPES for size in shared[dtype][name]]


@contextmanager
def _loaded(library: Library, runs: list[tuple[str, str, int]]) -> Iterator[None]:
    """Keep the machine code of some runs loaded, which else each plugin would load anew."""
    names = set()
    for _, dtype, size in runs:
        pair = Decode(dtype, size)
        names |= {Forward(dtype, size).name, pair.split_name, pair.combine_name}
    with ExitStack() as held:
        for name in sorted(names & set(library)):
            library[name].load()
            held.callback(library[name].unload)
        yield


def _splits(case: Case, library: Library, device: Device, dtype: str, size: int) -> bool:
    """Whether a case is to be two launches: where it has one query, Hopper's 16-bit variants decode in one."""
    if not case.decoded or Decode(dtype, size).combine_name not in library:
        return False
    variants = [v for algorithm in library[Forward(dtype, size).name].manifest.algorithms for v in algorithm]
    able = device.arch == "sm_90" and any(variant.kernel == DECODE_KERNEL for variant in variants)
    return not (able and case.rows == 1 and size % 8 == 0 and "softcap" not in case.fields)


def _rows(
    calls: Calls, creator: Any, library: Library, device: Device, stream: Stream, run: tuple[str, str, int]
) -> Iterator[dict[str, Any]]:
    """What comes of each tactic for one case, dtype and head size."""
    name, dtype, size = run
    wanted = _splits(CASES[name], library, device, dtype, size)
    featured = Featured(calls, creator, name, dtype, size)
    try:
        for tactic in featured.tactics:
            error, lse, clean = featured.run(tactic, device, stream)
            split = " parts" in featured.plugin.describe()
            row = {"feature": name, "dtype": dtype, "head_size": size, "tactic": tactic}
            row |= {"algorithm": featured.plugin.tactic.name, "error": error, "lse_error": lse, "clean": clean}
            passed = error <= LIMITS[dtype] and lse <= LSE_LIMIT and clean and split == wanted
            yield {**row, "split": split, "passed": passed}
    finally:
        featured.close()


def _failed(run: tuple[str, str, int], error: PyfmhaError) -> dict[str, Any]:
    name, dtype, size = run
    row = {"feature": name, "dtype": dtype, "head_size": size, "error": float("inf"), "lse_error": float("inf")}
    return {**row, "failure": str(error), "passed": False}


def check_features(report: Report, calls: Calls, creator: Any, library: Library, device: Device) -> None:
    """Every feature with every dtype and some head sizes, each with every tactic: a check for each feature."""
    runs = _runs(library)
    if not runs:
        report.skip("features", "the library holds no fmha_fwd function: pyfmha build")
        return
    stream, rows = Stream(), report.results.setdefault("features", [])
    with _loaded(library, runs):
        for name, group in groupby(runs, key=lambda run: run[0]):
            if report.late():
                break
            begin = len(rows)
            for run in group:
                report.progress(f"features: {len(rows)} rows of {len(runs)} runs, {name}, {run[1]} d{run[2]}")
                try:
                    rows.extend(_rows(calls, creator, library, device, stream, run))
                except PyfmhaError as error:
                    rows.append(_failed(run, error))
                    device.synchronize()  # raises if the context is lost, in which nothing else can run
            _judge(report, name, rows[begin:])
    stream.close()


def _judge(report: Report, name: str, rows: list[dict[str, Any]]) -> None:
    """The check for one feature."""
    bad = [row for row in rows if not row["passed"]]
    worst = {d: max((row["error"] for row in rows if row["dtype"] == d), default=0.0) for d in DTYPES}
    listed = ", ".join(f"{dtype} {error:.1e}" for dtype, error in worst.items())
    lse = max((row["lse_error"] for row in rows), default=0.0)
    detail = f"{len(bad)} of {len(rows)}: {bad[:2]}" if bad else f"{listed}, lse {lse:.1e}"
    report.check(f"feature: {name}, {len(rows)} runs", bool(rows) and not bad, detail)
