"""What the library runs at a cell: which function, and its arguments but for addresses."""

from dataclasses import dataclass
from typing import Any

from pyfmha.attention import biased, forward, fp8, key_blocks
from pyfmha.attention.biased import Biased, BiasedCall, broadcast_strides
from pyfmha.attention.forward import Call, Forward
from pyfmha.attention.fp8 import Fp8, Fp8Call
from pyfmha.bench.cells import FP8, Cell
from pyfmha.bench.extras import FUNCTIONS, LISTED

_POINTERS = tuple(name for name, kind in forward.ARGUMENTS if kind.startswith("*"))
_TENSORS = {
    **{name: name for name in ("Out", "Q", "K", "V", "kv_lengths")},
    **{"cu_seqlens_q": "cu_seqlens", "cu_seqlens_kv": "cu_seqlens", "Bias": "bias", "Mask": "mask"},
    "SinksFp32": "sinks",
}
"""Which tensor of a cell each pointer is."""


@dataclass(frozen=True)
class Launch:
    """What the library runs at a cell.

    Attributes:
        name: of the function.
        build: what ``pyfmha build`` is told to add it.
        pointers: what each pointer is: ``"Out"``, one of the inputs' tensors by name, or empty for none.
        numbers: what follows the pointers.
        further: what follows these: tensors of the inputs by name, and numbers; ``"Blocks"`` is memory.
        before: functions that are launched first, in this order, with the same arguments.
        memory: bytes of ``"Blocks"``.
    """

    name: str
    build: tuple[str, ...]
    pointers: tuple[str, ...]
    numbers: tuple[int | float, ...]
    further: tuple[str | int, ...] = ()
    before: tuple[str, ...] = ()
    memory: int = 0


def call_of(cell: Cell) -> Call:
    """The launch of the production kernel."""
    return Call(**_common(cell))


def launch_of(cell: Cell) -> Launch:
    """The function that serves a cell, and its arguments."""
    build: tuple[str, ...] = ("--dtype", cell.dtype_of("Out"), "--head-size", str(cell.head_size))
    if cell.dtype == FP8:
        build = ("--kernels", "fp8", "--arch", "sm_90", *build)
        name = Fp8(cell.dtype_of("Out"), cell.head_size).name
        return Launch(name, build, _given(fp8.POINTERS), Fp8Call(**_common(cell)).scalars())
    if not (cell.beside or cell.v_head_size):
        return Launch(Forward(cell.dtype, cell.head_size).name, build, _given(_POINTERS), call_of(cell).scalars())
    name = Biased(cell.dtype, max(cell.head_size, cell.v_head_size)).name
    numbers = BiasedCall(**_common(cell), **_strides(cell), v_head_size=cell.v_head_size).scalars()
    if cell.kind not in FUNCTIONS:
        return Launch(name, ("--kernels", "biased", *build), _given(biased.POINTERS), numbers)
    name = name.replace("biased", f"with_{cell.kind}")
    further, memory = FUNCTIONS[cell.kind](cell), 0
    before: tuple[str, ...] = ()
    if cell.kind in LISTED:
        lists = LISTED[cell.kind].numbers(cell.batch, cell.heads, lengths=False, mask=(), ragged=False)
        further = (*further, "Blocks", *lists)
        before = tuple(name.replace("with", what) for what in key_blocks.LISTING)
        memory = key_blocks.bytes_of(*lists, cell.seq, cell.kv_seq)
    return Launch(name, ("--functions", cell.kind, *build), _given(biased.POINTERS), numbers, further, before, memory)


def _given(pointers: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(_TENSORS.get(name, "") for name in pointers)


def _common(cell: Cell) -> dict[str, Any]:
    (_, heads, queries, _), (_, kv_heads, keys, _) = (cell.shape(name) for name in "QK")
    names = ("q_strides", "k_strides", "v_strides", "out_strides")
    return {
        **{"batch_size": cell.batch, "num_heads": heads, "num_kv_heads": kv_heads, "q_len": queries, "kv_len": keys},
        **{"head_size": cell.head_size, "sm_scale": cell.sm_scale, "softcap": cell.softcap},
        **dict(zip(names, map(cell.strides, ("Q", "K", "V", "Out")), strict=True)),
        **{"window_right": 0 if cell.causal else -1, "ragged": bool(cell.tokens)},
    }


def _strides(cell: Cell) -> dict[str, Any]:
    """Of a bias or mask."""
    if cell.kind not in ("bias", "mask"):
        return {}
    whole = (cell.batch, cell.heads, cell.seq, cell.kv_seq)
    axes = cell.beside.partition("-")[2]
    shape = [1 if axis == "1" else size for axis, size in zip(axes, whole, strict=True)]
    return {f"{cell.kind}_strides": broadcast_strides(shape, whole, cell.kind)}
