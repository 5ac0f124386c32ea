"""The tensors beside Q, K and V: a bias, a mask, sinks. What they may be is refused here, by name, as far as a network
tells; the plugin checks the sizes that only a shape tells."""

from collections.abc import Mapping, Sequence
from typing import Any

from pyfmha.attention.biased_operator import BROADCAST
from pyfmha.errors import PluginError
from pyfmha.operators.description import DATA_TYPES, TYPE_NAMES
from pyfmha.operators.forms import Shape
from pyfmha.trt.network import Tensors

WANTED = "[batch or 1, query heads or 1, queries or 1, keys or 1]"
BESIDE = (*BROADCAST, "sinks")
"""The inputs beside Q, K, V and lengths, in the plugin's order."""


def beside_of(bias: Any, mask: Any, sinks: Any) -> Tensors:
    """Those that are given."""
    named = {"bias": bias, "mask": mask, "sinks": sinks}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def beside_features(
    dtype: str, tensors: Mapping[str, Any], sizes: Sequence[int], ragged: bool = False
) -> Mapping[str, Any]:
    """The fields of :class:`pyfmha.trt.Features` that some tensors are.

    Args:
        dtype: of Q.
        tensors: those of :data:`BESIDE` that are given, by name.
        sizes: batch, query heads, queries and keys; -1 where they are not known.
        ragged: whether queries and keys of a bias or mask are those of the longest sequence.

    Raises:
        PluginError: one is of a type or shape that is not served.
    """
    names = {number: name for name, number in DATA_TYPES.items()}
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        kind = names.get(int(tensor.dtype), str(tensor.dtype))
        allowed = ("bool",) if name == "mask" else tuple(dict.fromkeys((dtype, "fp32")))
        if kind not in allowed:
            wanted = " or ".join(TYPE_NAMES[one] for one in allowed)
            raise PluginError(f"{name} is of type {TYPE_NAMES.get(kind, kind)}; it must be {wanted}")
        shape = tuple(tensor.shape)
        if name == "sinks":
            _check_sinks(shape, sizes[1])
        else:
            check_broadcast(name, shape, (*sizes[:2], -1, -1) if ragged else sizes)
        found[name] = True if name == "mask" else kind
    return found


def check_broadcast(name: str, shape: Shape, sizes: Sequence[int]) -> None:
    """Refuse a shape that cannot be broadcast to (batch, query heads, queries, keys); -1 is a size not known.

    Raises:
        PluginError: saying what it is and what is allowed.
    """
    counterparts = sizes[len(sizes) - len(shape) :]
    fits = all(have in (1, -1, want) or (want < 0 and have) for have, want in zip(shape, counterparts, strict=False))
    if not 1 <= len(shape) <= len(sizes) or not fits:
        here = [size if size >= 0 else "?" for size in sizes]
        raise PluginError(
            f"{name} is {list(shape)}; allowed is {WANTED}, here [{', '.join(map(str, here))}], without leading axes of"
            " 1 if you like"
        )


def _check_sinks(shape: Shape, heads: int) -> None:
    if len(shape) != 1 or shape[0] not in (-1, heads):
        raise PluginError(f"sinks are {list(shape)}; they must be [{heads}], one for each query head")
