"""Compile-time constants of kernels: numbers, truth values, text and None, and what Triton has beyond those.

In JSON the plain ones stand for themselves, a dtype is ``{"dtype": "fp16"}``, a function ``{"function": "gelu"}`` and a
tuple a list, so that specs without them have the digests that they have always had.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

from pyfmha.spec.abi import ELEMENT_SIZES

DTYPE_WORDS: dict[str, str] = {
    **{name: name for name in ELEMENT_SIZES},
    **{f"int{bits}": f"i{bits}" for bits in (1, 8, 16, 32, 64)},
    **{f"uint{bits}": f"u{bits}" for bits in (8, 16, 32, 64)},
    **{f"float{bits}": f"fp{bits}" for bits in (16, 32, 64)},
    **{name.replace("fp8", "float8"): name for name in ELEMENT_SIZES if name.startswith("fp8")},
    "bfloat16": "bf16",
}
"""What users call a dtype, without the ``tl.`` before it, and its name in a Triton signature."""


@dataclass(frozen=True)
class Dtype:
    """A dtype as a constant.

    Attributes:
        name: as in a Triton signature: ``"fp16"``, ``"i32"``.
    """

    name: str

    def __repr__(self) -> str:
        return self.name


@dataclass(frozen=True)
class FunctionName:
    """Another ``@triton.jit`` function as a constant.

    Attributes:
        name: what the kernel's file calls it, ``"gelu"`` or ``"ops.gelu"``.
    """

    name: str

    def __repr__(self) -> str:
        return self.name


@dataclass(frozen=True)
class JitFunction:
    """A compile-time parameter of a kernel that is itself a ``@triton.jit`` function, of another file.

    Attributes:
        parameter: the kernel's ``tl.constexpr`` parameter.
        source: the Python file that holds the function.
        attribute: where it is there: ``"alibi"``, or ``"alibi.score"`` for an attribute of an object.
    """

    parameter: str
    source: Path
    attribute: str


Constant = Union[int, float, bool, str, None, Dtype, FunctionName, tuple["Constant", ...]]  # noqa: UP007  (of a name in quotes)


def to_data(value: Constant) -> Any:
    """A constant as JSON-ready data."""
    if isinstance(value, Dtype):
        return {"dtype": value.name}
    if isinstance(value, FunctionName):
        return {"function": value.name}
    return [to_data(element) for element in value] if isinstance(value, tuple) else value


def constants_to_data(constants: Iterable[tuple[str, Constant]]) -> list[list[Any]]:
    """Constants with their names as JSON-ready data."""
    return [[name, to_data(value)] for name, value in constants]


def from_data(data: Any) -> Constant:
    """Back from :func:`to_data`; raises TypeError where that did not write it."""
    if isinstance(data, list | tuple):
        return tuple(from_data(element) for element in data)
    if isinstance(data, dict) and len(data) == 1:
        ((kind, name),) = data.items()
        if isinstance(name, str) and kind == "dtype" and name in DTYPE_WORDS.values():
            return Dtype(name)
        if isinstance(name, str) and kind == "function":
            return FunctionName(name)
    if not isinstance(data, int | float | bool | str | None):
        raise TypeError(f"a constant expected, got {data!r}")
    return data


def parse_dtype(word: str) -> Dtype | None:
    """The dtype that a word of a signature names, ``fp16``, ``float16`` or ``tl.float16``; None where it names none."""
    known = DTYPE_WORDS.get(word.removeprefix("tl.").removeprefix("triton.language."))
    return Dtype(known) if known else None
