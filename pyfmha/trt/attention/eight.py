"""Q, K and V in FP8: the type of Out, which nothing else tells, and the factors. What they may be is refused here, by
name, as far as a network tells; the plugin checks what only a shape tells."""

from collections.abc import Mapping, Sequence
from typing import Any

from pyfmha.attention.fp8 import DESCALES, DTYPES
from pyfmha.errors import PluginError
from pyfmha.operators.description import DATA_TYPES, TYPE_NAMES
from pyfmha.operators.forms import Shape
from pyfmha.spec.words import dtype_name
from pyfmha.trt.network import Tensors


def factors_of(q_descale: Any, k_descale: Any, v_descale: Any) -> Tensors:
    """Those that are given."""
    named = zip(DESCALES, (q_descale, k_descale, v_descale), strict=True)
    return {name: tensor for name, tensor in named if tensor is not None}


def out_dtype_of(dtype: str, out_dtype: str | None) -> str:
    """The dtype of Out.

    Args:
        dtype: of Q, K and V.
        out_dtype: what the caller wants; None where it did not say.

    Raises:
        PluginError: Q, K and V are FP8 and it is not said, or it is not one that they have.
    """
    wanted = None if out_dtype is None else dtype_name(out_dtype)
    if dtype != "fp8":
        if wanted not in (None, dtype):
            raise PluginError(f"out_dtype is {out_dtype!r}; Out is of Q's type, {dtype}, unless that is FP8")
        return dtype
    if wanted not in DTYPES:
        said = "not given" if out_dtype is None else f"{out_dtype!r}"
        raise PluginError(f"out_dtype is {said}; with Q, K and V in FP8, give {' or '.join(map(repr, DTYPES))}")
    return wanted


def fp8_features(dtype: str, factors: Mapping[str, Any], sizes: Sequence[int]) -> Mapping[str, Any]:
    """The fields of :class:`pyfmha.trt.Features` that FP8 and some factors are.

    Args:
        dtype: of Q, K and V.
        factors: ``q_descale``, ``k_descale`` and ``v_descale``, those that are given.
        sizes: batch and key heads; -1 for a batch that is not known, 1 for that of a ragged batch.

    Raises:
        PluginError: a factor is there without FP8, or of a type or shape that is not served.
    """
    for name, tensor in factors.items():
        if dtype != "fp8":
            raise PluginError(f"{name} is given, and Q, K and V are {TYPE_NAMES[dtype]}: factors are for FP8")
        if int(tensor.dtype) != DATA_TYPES["fp32"]:
            names = {number: name for name, number in DATA_TYPES.items()}
            kind = names.get(int(tensor.dtype), "")
            raise PluginError(f"{name} is of type {TYPE_NAMES.get(kind, tensor.dtype)}; it must be FLOAT")
        check_factors(name, tuple(tensor.shape), sizes)
    return {"fp8": dtype == "fp8", **dict.fromkeys(factors, True)}


def check_factors(name: str, shape: Shape, sizes: Sequence[int]) -> None:
    """Refuse a shape that is no [1], [key heads] or [batch, key heads]; -1 is a size not known.

    Raises:
        PluginError: saying what it is and what is allowed.
    """
    counterparts = sizes[len(sizes) - len(shape) :]
    fits = all(have in (1, -1, want) or (want < 0 and have) for have, want in zip(shape, counterparts, strict=False))
    if not 1 <= len(shape) <= len(sizes) or not fits:
        batch, heads = ("batch" if size < 0 else size for size in sizes)
        raise PluginError(f"{name} is {list(shape)}; allowed are [1], [{heads}] and [{batch}, {heads}]: one, one a key"
                          " head, one a sequence and key head (of a ragged batch, sequences share them)")  # fmt: skip
