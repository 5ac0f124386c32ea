"""The one table of argument types, from which both the C prototypes and the ctypes argtypes are made.

A type is named as in a Triton signature: ``i32``, ``fp32``, ``*fp16`` (a pointer to fp16), ``*kfp16`` (to constant
fp16). Pointers are ``CUdeviceptr``; fp16 and bf16 scalars are passed as C ``float`` and rounded to nearest even just
before the launch, because C11 has no portable type for them.
"""

import ctypes
import functools
from dataclasses import dataclass
from typing import Any

from pyfmha.errors import SpecError


@dataclass(frozen=True)
class CType:
    """How one argument type crosses from Python to C to the kernel.

    Attributes:
        c: its type in the C prototype.
        ctypes: the same type for ctypes.
        format: the same type for :mod:`struct`.
        kind: ``"integer"``, ``"float"`` or ``"pointer"``.
        size: bytes the kernel reads for a scalar; bytes of one element for a pointer.
        narrow: for a scalar the kernel reads in 16 bits, the C function that converts it, else None.
        bounds: smallest and largest value of an integer, else None.
    """

    c: str
    ctypes: Any
    format: str
    kind: str
    size: int
    narrow: str | None = None
    bounds: tuple[int, int] | None = None


def _integer(bits: int, signed: bool) -> CType:
    width = max(bits, 8)
    name = f"{'' if signed else 'u'}int{width}"
    low, high = (-(1 << (width - 1)), (1 << (width - 1)) - 1) if signed else (0, (1 << width) - 1)
    if bits == 1:
        low, high = 0, 1
    code = {8: "b", 16: "h", 32: "i", 64: "q"}[width]
    return CType(
        f"{name}_t",
        getattr(ctypes, f"c_{name}"),
        code if signed else code.upper(),
        "integer",
        width // 8,
        None,
        (low, high),
    )


SCALARS: dict[str, CType] = {
    **{f"i{bits}": _integer(bits, True) for bits in (1, 8, 16, 32, 64)},
    **{f"u{bits}": _integer(bits, False) for bits in (1, 8, 16, 32, 64)},
    "fp16": CType("float", ctypes.c_float, "f", "float", 2, "pyfmha_to_fp16"),
    "bf16": CType("float", ctypes.c_float, "f", "float", 2, "pyfmha_to_bf16"),
    "fp32": CType("float", ctypes.c_float, "f", "float", 4),
    "fp64": CType("double", ctypes.c_double, "d", "float", 8),
}

ELEMENT_SIZES: dict[str, int] = {
    **{name: scalar.size for name, scalar in SCALARS.items()},
    **dict.fromkeys(("fp8e5", "fp8e5b16", "fp8e4nv", "fp8e4b8", "fp8e4b15"), 1),
}

_ALIASES = {
    **{"f32": "fp32", "f64": "fp64", "f16": "fp16"},
    **{"float32": "fp32", "float64": "fp64", "float16": "fp16", "bfloat16": "bf16"},
    **{f"int{bits}": f"i{bits}" for bits in (1, 8, 16, 32, 64)},
    **{f"uint{bits}": f"u{bits}" for bits in (8, 16, 32, 64)},
}


def canonical(name: str) -> str:
    """The table's name of a type: aliases replaced (``f32`` is ``fp32``), white space dropped."""
    name = name.strip()
    stars = "*k" if name.startswith("*k") else "*" if name.startswith("*") else ""
    base = name[len(stars) :]
    return stars + _ALIASES.get(base, base)


@functools.lru_cache(maxsize=256)
def ctype(name: str) -> CType:
    """The entry of a type such as ``"*fp16"`` or ``"i32"``.

    Raises:
        SpecError: the type is unknown; the message lists those known.
    """
    known = canonical(name)
    if known.startswith("*"):
        element = known[2:] if known.startswith("*k") else known[1:]
        if element in ELEMENT_SIZES:
            return CType("CUdeviceptr", ctypes.c_uint64, "Q", "pointer", ELEMENT_SIZES[element])
        raise SpecError(f"unknown pointer type {name!r}: * may point to {', '.join(ELEMENT_SIZES)}")
    if known in SCALARS:
        return SCALARS[known]
    if known.startswith(("tensordesc", "nvTmaDesc")):
        raise SpecError(
            f"type {name!r}: kernels that take tensor descriptors cannot be compiled ahead of time yet; pass pointers"
        )
    raise SpecError(f"unknown type {name!r}: use a pointer (*fp16, *bf16, *fp32, ...) or one of {', '.join(SCALARS)}")
