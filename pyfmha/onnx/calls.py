"""One attention of a model, whatever operators it is written in, and what stands in the way of the plugin's node."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from pyfmha.onnx.sizes import Size

DTYPES = {ir.DataType.FLOAT: "fp32", ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}
"""The types that the plugin serves, and their names here."""


class LeftAloneError(Exception):
    """Why an attention is not replaced: what could not be proven, or what the plugin does not serve."""


@dataclass(frozen=True)
class Laid:
    """A tensor of heads, and where its axes lie.

    Attributes:
        value: the tensor.
        order: ``b``, ``h``, ``s`` and ``d`` in the order of its axes; ``bsH`` is [batch, seq, heads * head size].
        sizes: of batch, heads, seq and head size.
        first: with ``bsH``, the first element of the hidden axis that counts.
        part: whether the tensor holds more than these heads.
    """

    value: ir.Value
    order: str
    sizes: tuple[Size, Size, Size, Size]
    first: int = 0
    part: bool = False


@dataclass(frozen=True)
class Visible:
    """Which keys a query sees, as the plugin says it.

    Attributes:
        causal: none later than its own.
        bottom_right: positions are aligned so that the last query is at the last key.
        window: how many to its left and right, -1 for all.
        kv_lengths: a tensor of whole numbers [batch], how many keys of each sequence count.
    """

    causal: bool = False
    bottom_right: bool = False
    window: tuple[int, int] = (-1, -1)
    kv_lengths: ir.Value | None = None


@dataclass(frozen=True)
class Extra:
    """An input of the plugin beside Q, K, V and lengths, broadcast to the scores.

    Attributes:
        feature: ``"bias"``, ``"mask"`` or ``"sinks"``.
        value: the tensor that it is read from.
        what: in words, for the report.
        factor: what a bias is multiplied with before it is added.
        shows: whether a mask is True where a key is seen.
        finite: whether a mask hides by a finite number, so that a query without a key averages all values.
        order: its axes, ``b h s k`` for batch, head, query and key; with fewer, those that it has.
    """

    feature: str
    value: ir.Value
    what: str
    factor: float = 1.0
    shows: bool = True
    finite: bool = False
    order: str = "bhsk"

    @property
    def is_bias(self) -> bool:
        """Whether the plugin adds it: so it does a mask that hides by a finite number, to be the same."""
        return self.feature == "bias" or (self.feature == "mask" and self.finite)


@dataclass(frozen=True)
class Call:
    """Attention, as it was understood.

    Attributes:
        name: of the node that it ends with.
        q, k, v: its tensors.
        scale, softcap: of the scores; a soft cap of 0 is none.
        visible: which keys count.
        out_order: how the result is laid, as :attr:`Laid.order`; ``Bsd`` is [batch * heads, seq, head size].
        extras: masks and the like that are tensors of the model.
        past: the keys and values of earlier steps, laid as ``bhsd``, which K and V follow; or none.
        present: whether the keys and values of all steps are results, too.
        stacked: whether they are one, with keys and values along a first axis of their own.
        lse: whether the log-sum-exp is.
        before: adds nodes that come first, and tells for each stand-in among the tensors the value that they give.
        packed: a tensor [batch, seq, (heads + 2 * kv heads) * head size] that Q, K and V are parts of, and the scale
            of the scores of its parts; or none.
    """

    name: str
    q: Laid
    k: Laid
    v: Laid
    scale: float
    softcap: float = 0.0
    visible: Visible = Visible()
    out_order: str = "bhsd"
    extras: Sequence[Extra] = ()
    past: tuple[ir.Value, ir.Value] | None = None
    present: bool = False
    stacked: bool = False
    lse: bool = False
    before: Callable[[Any], dict[ir.Value, ir.Value]] | None = None
    packed: tuple[ir.Value, float] | None = None

    @property
    def dtype(self) -> str:
        """Of Q, K and V, which are of one.

        Raises:
            LeftAloneError: they are not, or the plugin does not serve it.
        """
        kinds = [laid.value.dtype for laid in (self.q, self.k, self.v)]
        names = ", ".join("unknown" if kind is None else kind.name for kind in kinds)
        if len(set(kinds)) > 1:
            raise LeftAloneError(f"Q, K and V are of types {names}; the plugin takes one type")
        if kinds[0] is None or kinds[0] not in DTYPES:
            raise LeftAloneError(
                f"Q, K and V are of type {names.split(',')[0]}; the plugin serves FLOAT16, BFLOAT16 and FLOAT"
            )
        return DTYPES[kinds[0]]

    def check_sizes(self) -> None:
        """Hold the sizes of Q, K and V against each other.

        Raises:
            LeftAloneError: two that must be the same are not proven to be, or one must be a number and is not.
        """
        (qb, qh, _, qd), (kb, kh, ks, kd), (vb, vh, vs, vd) = (x.sizes for x in (self.q, self.k, self.v))
        pairs = [("batch", "Q", qb, "K", kb), ("batch", "K", kb, "V", vb), ("heads", "K", kh, "V", vh)]
        pairs += [("length", "K", ks, "V", vs), ("head size", "Q", qd, "K", kd)]
        for what, left, a, right, b in pairs:
            if a != b:
                nameless = any(name.startswith(("<", "unk__")) for name in a.symbols | b.symbols)
                hint = ": give free axes names" if nameless else ""
                raise LeftAloneError(
                    f"the {what} of {left}, {a}, and of {right}, {b}, are not proven to be the same{hint}"
                )
        for what, size in (("heads of Q", qh), ("heads of K", kh), ("head size", qd), ("head size of V", vd)):
            if not size.number:
                raise LeftAloneError(f"the {what}, {size}, must be a number")
