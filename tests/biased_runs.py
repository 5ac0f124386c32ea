"""Runs the kernel with biases and masks under the interpreter and holds it against float64; shared by its tests."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from forward_runs import GUARD, LIMITS, nan_buffer
from numpy.random import default_rng

from pyfmha.attention.biased import ABSENT, ARGUMENTS, KERNEL, KERNEL_FILE, POINTERS, Biased, BiasedCall
from pyfmha.attention.forward import kernel_path, strides
from pyfmha.attention.reference import attend, relative_error
from pyfmha.attention.run import to_float, to_storage
from pyfmha.bfloat16 import STORAGE
from pyfmha.interpreter.kernel import Null, Tensor, run_interpreted

Edit = Callable[[dict[str, np.ndarray]], None]


@dataclass(frozen=True)
class Problem:
    """One attention to compute.

    bias, mask: [batch, heads, queries, keys], of which any may be 1; None for none. The mask shows a share of the keys.
    gap: elements between the rows of a bias or mask. bias_dtype, sinks: "own" for Q's dtype, or fp32; no sinks are "".
    known: the constants SOFTCAP, BIAS and MASK, as variants promise them.
    """

    dtype: str = "fp16"
    batch: int = 1
    heads: int = 1
    kv_heads: int = 1
    q_len: int = 33
    kv_len: int = 33
    head_size: int = 32
    v_head_size: int = 32
    scale: float | None = None
    softcap: float = 0.0
    layout: str = "bhsd"
    q_lengths: Sequence[int] | None = None
    kv_lengths: Sequence[int] | None = None
    cu_q: Sequence[int] | None = None
    cu_kv: Sequence[int] | None = None
    left: int = -1
    right: int = -1
    bottom_right: bool = False
    bias: tuple[int, int, int, int] | None = None
    bias_dtype: str = "own"
    mask: tuple[int, int, int, int] | None = None
    share: float = 0.6
    gap: int = 0
    sinks: str = ""
    with_lse: bool = True
    seed: int = 0
    blocks: tuple[int, int] = (16, 16)
    known: tuple[str, str, str] = ("any", "any", "any")
    segments: int = 4

    @property
    def ragged(self) -> bool:
        return self.cu_q is not None

    @property
    def sm_scale(self) -> float:
        return float(np.float32(self.head_size**-0.5 if self.scale is None else self.scale))

    def dtype_of(self, kind: str) -> str:
        return self.dtype if kind == "own" else kind

    def shape(self, name: str) -> tuple[int, int, int, int]:
        heads, seq = (self.heads, self.q_len) if name in ("Q", "Out") else (self.kv_heads, self.kv_len)
        size = self.head_size if name in ("Q", "K") else self.v_head_size
        return (1 if self.ragged else self.batch), heads, seq, size


@dataclass
class Placed:
    """Guarded memory, the views of it, and how the kernel is told of it."""

    values: dict[str, np.ndarray] = field(default_factory=dict)
    pointers: dict[str, Tensor] = field(default_factory=dict)
    steps: dict[str, tuple[int, ...]] = field(default_factory=dict)


def place(problem: Problem, edit: Edit | None = None) -> Placed:
    """Standard normal numbers where a sequence is, NaN elsewhere; `edit` changes the views."""
    p, made = problem, Placed()
    for name in ("Out", "Q", "K", "V"):
        shape = p.shape(name)
        view = _add(made, name, p.dtype, shape, strides(p.layout, *shape))
        if name == "Out":
            continue
        lengths, cu = (p.q_lengths, p.cu_q) if name == "Q" else (p.kv_lengths, p.cu_kv)
        values = to_storage(default_rng([p.seed, ord(name)]).standard_normal(shape, np.float32), p.dtype)
        for b in range(shape[0]):
            begin, end = 0, shape[2] if lengths is None else min(max(int(lengths[b]), 0), shape[2])
            if cu is not None:
                ends = np.maximum.accumulate(np.clip(np.array(cu, np.int64), 0, shape[2]))
                begin, end = ends[0], ends[-1]
            view[b, :, begin:end] = values[b, :, begin:end]
    rng = default_rng([p.seed, 7])
    if p.bias is not None:
        view = _add_rows(made, "bias", p.dtype_of(p.bias_dtype), p.bias, p.gap)
        view[...] = to_storage(2 * rng.standard_normal(p.bias, np.float32), p.dtype_of(p.bias_dtype))
    if p.mask is not None:
        view = _add_rows(made, "mask", "u8", p.mask, p.gap)
        view[...] = rng.random(p.mask) < p.share
    if p.sinks:
        view = _add(made, "sinks", p.dtype_of(p.sinks), (p.heads,), ())
        view[...] = to_storage(rng.standard_normal(p.heads, np.float32), p.dtype_of(p.sinks))
    if edit is not None:
        edit(made.values)
    return made


def _add_rows(made: Placed, name: str, dtype: str, shape: tuple[int, int, int, int], gap: int) -> np.ndarray:
    _, h, q, k = shape
    row = k + gap
    return _add(made, name, dtype, shape, (h * q * row, q * row, row, 1))


def _add(made: Placed, name: str, dtype: str, shape: tuple[int, ...], steps: tuple[int, ...]) -> np.ndarray:
    """A view inside guards; the steps that the kernel is told are 0 along axes of 1."""
    steps = (*steps, 1) if len(steps) < len(shape) else steps
    size = 1 + sum((n - 1) * step for n, step in zip(shape, steps, strict=True)) if all(shape) else 0
    storage = np.uint8 if dtype == "u8" else STORAGE[dtype]
    store = np.empty(size + 2 * GUARD, storage)
    store.view(np.uint8)[...] = 0xFF
    bytes_ = [step * store.itemsize for step in steps]
    made.values[name] = np.lib.stride_tricks.as_strided(store[GUARD:], shape, bytes_)
    made.pointers[name] = Tensor(store, dtype, GUARD)
    made.steps[name] = steps
    return made.values[name]


def broadcast(problem: Problem, made: Placed, name: str) -> tuple[int, int, int, int]:
    """The strides of a bias or mask as the kernel is told them."""
    if name not in made.values:
        return ABSENT
    b, h, q, k = (0 if n == 1 else step for n, step in zip(made.values[name].shape, made.steps[name], strict=True))
    return b, h, q, k


@dataclass
class Lists:
    """Lists of blocks of keys that a first launch writes; `spoil` changes them before attention reads them.

    batches, heads: how many there are; tile: queries and keys of their blocks.
    """

    batches: int
    heads: int
    tile: tuple[int, int] = (16, 16)
    spoil: Callable[[np.ndarray], None] | None = None
    entries: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))


def write_lists(lists: Lists, p: Problem, args: dict[str, Any], constants: dict[str, Any], batch_size: int) -> None:
    """The launches before attention; all lists as [batches, heads, tiles, 2 + blocks], -1 where nothing was written."""
    m, n = lists.tile
    tiles = -(-p.q_len // m) + int(p.ragged) * (batch_size + 1)
    shape = (lists.batches, lists.heads, tiles, 2 - (-p.kv_len // n))
    count = int(np.prod(shape))
    store = np.full(count + count // shape[3] * (shape[3] - 2) + 2 * GUARD, -1, np.int32)
    args |= {"Blocks": Tensor(store, "i32", GUARD), "list_batches": lists.batches, "list_heads": lists.heads}
    first = constants | {"BLOCK_M": m, "BLOCK_N": n, "LIST_M": m, "LIST_N": n, "MASK": "any"}
    for way, programs in (("flag", tiles * min(shape[3] - 2, 64)), ("write", tiles)):
        grid = (programs, lists.batches * lists.heads, 1)
        run_interpreted(kernel_path().with_name(KERNEL_FILE), KERNEL, grid, args, first | {"LIST": way})
    assert (np.concatenate([store[:GUARD], store[-GUARD:]]) == -1).all(), "wrote outside"
    lists.entries = store[GUARD : GUARD + count].reshape(shape)
    if lists.spoil is not None:
        lists.spoil(lists.entries)


def launch(
    problem: Problem, made: Placed, functions: dict[str, Any] | None = None, lists: Lists | None = None
) -> tuple[Any, Any]:
    """Run; Out as float64 and Lse, all guards checked.

    functions: the constants SCORE, SEEN and BOUNDS, and `inputs`, a tuple of arguments. lists: of blocks to visit.
    """
    p = problem
    call = BiasedCall(
        p.batch if p.cu_q is None else len(p.cu_q) - 1, p.heads, p.kv_heads, p.q_len, p.kv_len, p.head_size,
        p.sm_scale, p.softcap, *(made.steps[name][:3] for name in ("Q", "K", "V", "Out")), p.left, p.right,
        p.bottom_right, p.ragged, p.v_head_size, broadcast(p, made, "bias"), broadcast(p, made, "mask"),
        *(getattr(p, name)[2:] if getattr(p, name) else None for name in ("bias", "mask")),
    )  # fmt: skip
    batch = 1 if p.ragged else p.batch
    lse = nan_buffer("fp32", batch * p.heads * p.q_len)
    types = dict(ARGUMENTS)
    args: dict[str, Any] = {name: Null(types[name][1:].replace("T", p.dtype)) for name in POINTERS}
    for name, values in (("q_lengths", p.q_lengths), ("kv_lengths", p.kv_lengths), ("cu_seqlens_q", p.cu_q),
                         ("cu_seqlens_kv", p.cu_kv)):  # fmt: skip
        if values is not None:
            args[name] = np.array(values, np.int32)
    args |= {name: made.pointers[name] for name in ("Out", "Q", "K", "V")}
    if p.with_lse:
        args["Lse"] = Tensor(lse, "fp32", GUARD)
    for name in {"bias", "mask", "sinks"} & set(made.pointers):
        wide = name != "mask" and made.pointers[name].dtype != p.dtype
        args[name.capitalize() + "Fp32" * wide] = made.pointers[name]
    args |= dict(zip([name for name, _ in ARGUMENTS][len(POINTERS) :], call.scalars(), strict=True))
    spec = Biased(p.dtype, max(p.head_size, p.v_head_size)).generic()
    softcap, bias, mask = p.known
    constants = dict(spec.constants) | {
        "BLOCK_M": p.blocks[0], "BLOCK_N": p.blocks[1], "SOFTCAP": softcap, "BIAS": bias, "MASK": mask,
        "SEGMENTS": p.segments, **(functions or {}),
    }  # fmt: skip
    if constants["inputs"] is not None:
        args["inputs"] = constants.pop("inputs")
    x = -(-p.q_len // p.blocks[0]) + int(p.ragged) * (call.batch_size + 1)
    integers = {name: value for name, value in args.items() if isinstance(value, int)}
    y, z = (e.evaluate(integers) for e in spec.grid_expressions[1:])
    if lists is not None and x * y * z:
        write_lists(lists, p, args, constants, call.batch_size)
        constants |= {"LIST": "read", "LIST_M": lists.tile[0], "LIST_N": lists.tile[1]}
    if x * y * z:
        run_interpreted(kernel_path().with_name(KERNEL_FILE), KERNEL, (x, y, z), args, constants)
    check_guards(p, made, lse)
    out = to_float(made.values["Out"], p.dtype)
    return out, lse[GUARD:-GUARD].reshape(batch, p.heads, p.q_len).astype(np.float64) if p.with_lse else None


def check_guards(problem: Problem, made: Placed, lse: np.ndarray) -> None:
    """Nothing was written around Out and Lse; what was, was written whole."""
    out = made.pointers["Out"].array
    assert not (out[GUARD:-GUARD].view(np.uint8).reshape(-1, out.itemsize) == 0xFF).all(axis=1).any(), "part unwritten"
    for store in (out, lse):
        raw = store.view(np.uint8).reshape(store.size, -1)
        assert (np.concatenate([raw[:GUARD], raw[-GUARD:]]) == 0xFF).all(), "wrote outside"


def whole(values: np.ndarray, q_len: int, kv_len: int) -> np.ndarray:
    """A bias or mask of fewer queries or keys as it counts: 0 past its end, and not seen."""
    missing = [
        0 if have == 1 else max(want - have, 0) for have, want in zip(values.shape[2:], (q_len, kv_len), strict=True)
    ]
    return np.pad(values, [(0, 0), (0, 0), *((0, count) for count in missing)])


def expected(problem: Problem, made: Placed, **functions: Any) -> tuple[np.ndarray, np.ndarray]:
    p = problem
    q, k, v = (to_float(made.values[name], p.dtype) for name in "QKV")
    options: dict[str, Any] = {
        "sm_scale": p.sm_scale, "softcap": float(np.float32(p.softcap)), "window_left": p.left, "window_right": p.right,
        "bottom_right": p.bottom_right, **functions,
    }  # fmt: skip
    for name in ("bias", "mask", "sinks"):
        if name in made.values:
            dtype = made.pointers[name].dtype
            values = made.values[name] != 0 if name == "mask" else to_float(made.values[name], dtype)
            options[name] = values if name == "sinks" else whole(values, p.q_len, p.kv_len)
    if not p.ragged:
        return attend(q, k, v, q_lengths=p.q_lengths, kv_lengths=p.kv_lengths, **options)
    tokens = (x[0].transpose(1, 0, 2) for x in (q, k, v))
    out, lse = attend(*tokens, cu_seqlens_q=p.cu_q, cu_seqlens_kv=p.cu_kv, **options)
    return out.transpose(1, 0, 2)[None], lse[None]


def check(problem: Problem, edit: Edit | None = None) -> np.ndarray:
    """Kernel against float64: out, lse, rows that see nothing, guards. Returns out."""
    made = place(problem, edit)
    out, lse = launch(problem, made)
    return judge(problem, out, lse, *expected(problem, made))


def judge(problem: Problem, out: Any, lse: Any, exact_out: Any, exact_lse: Any) -> np.ndarray:
    """The comparison of :func:`check`."""
    assert np.isfinite(out).all()
    assert relative_error(out, exact_out) <= LIMITS[problem.dtype]
    assert (out[(exact_out == 0).all(axis=-1)] == 0).all()
    if lse is not None:
        empty = np.isneginf(exact_lse)
        assert (np.isneginf(lse) == empty).all()
        assert (np.abs(lse[~empty] - exact_lse[~empty]) <= 4e-6 * (1 + np.abs(exact_lse[~empty]))).all()
    return out
