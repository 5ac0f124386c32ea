"""The plugin's tensors: names, types and axes, and what TensorRT's descriptors of them must say."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pyfmha.errors import PluginError
from pyfmha.trt.problem import TYPE_NAMES, Problem

INPUTS = ("Q", "K", "V")
"""The inputs of the first kernel, and of every other layout but packed."""

FLOAT, INT32 = 0, 3  # int(trt.DataType)
_NAMES = {**{0: "FLOAT", 3: "INT32"}, 1: "HALF", 7: "BF16"}

Shape = tuple[int, ...]
Axis = tuple[str, int | None]
"""What an axis is, and its size where the plugin was created for one. Axes of one name have one size."""


@dataclass(frozen=True)
class TensorForm:
    """One tensor of the plugin.

    Attributes:
        name: for messages, and in :class:`pyfmha.trt.direct.DirectSession`.
        type_id: ``int(trt.DataType)``.
        axes: in the order of its dimensions.
    """

    name: str
    type_id: int
    axes: tuple[Axis, ...]

    def __str__(self) -> str:
        return f"{self.name} [{', '.join(name if size is None else str(size) for name, size in self.axes)}]"

    def fits(self, shape: Shape, found: dict[str, int]) -> bool:
        """Whether a shape is of this form, and of the sizes of axes found before; adds its own to them."""
        if len(shape) != len(self.axes):
            return False
        for (name, wanted), size in zip(self.axes, shape, strict=True):
            if size < (name == "batch + 1") or wanted not in (None, size) or found.setdefault(name, size) != size:
                return False
        return True

    def named(self) -> str:
        """Its axes by name, as ``[batch, heads, seq, head size]``."""
        return f"[{', '.join(name for name, _ in self.axes)}]"


@dataclass(frozen=True)
class Forms:
    """All tensors of a plugin, in TensorRT's order."""

    inputs: tuple[TensorForm, ...]
    outputs: tuple[TensorForm, ...]

    @property
    def all(self) -> tuple[TensorForm, ...]:
        """Inputs, then outputs."""
        return self.inputs + self.outputs

    def check_count(self, inputs: Sequence[Any], outputs: Sequence[Any] | None = None) -> None:
        """Refuse any other number of tensors.

        Raises:
            PluginError: saying which they are.
        """
        given = len(self.outputs) if outputs is None else len(outputs)
        if len(inputs) != len(self.inputs) or given != len(self.outputs):
            names, results = (" and ".join(form.name for form in forms) for forms in (self.inputs, self.outputs))
            raise PluginError(
                f"{len(inputs)} inputs, {given} outputs; it has the inputs {names}, the outputs {results}"
            )


@lru_cache(maxsize=256)
def forms_of(problem: Problem, rank: int = 0) -> Forms:
    """The tensors of a problem.

    Args:
        problem: what the plugin serves.
        rank: number of dimensions of the first input. It tells the two packed forms apart: with an axis of 3, or with
            the heads of Q, K and V in one axis, which is the one for 0.
    """
    features, kind = problem.features, problem.type_id
    heads, kv_heads, size = (
        ("heads", problem.num_heads),
        ("kv heads", problem.kv_heads),
        ("head size", problem.head_size),
    )
    if features is None:
        axes: tuple[Axis, ...] = (("batch", None), heads, ("seq", None), size)
        first = tuple(TensorForm(name, kind, axes) for name in (*INPUTS, "Out"))
        return Forms(first[:3], first[3:])
    batch: tuple[Axis, ...] = () if features.cu_seqlens else (("batch", None),)
    rows = _row_axes(problem)
    if features.layout == "packed":
        many: tuple[Axis, ...] = (("heads + 2 * kv heads", problem.num_heads + 2 * problem.kv_heads),)
        if rank == len(batch) + 4 and problem.num_heads == problem.kv_heads:
            many = (("Q, K, V", 3), heads)
        inputs = [TensorForm("QKV", kind, (*batch, rows[0], *many, size))]
    else:
        order = (1, 0) if features.layout == "bhsd" else (0, 1)
        pairs = ((rows[0], heads), (rows[1], kv_heads), (rows[1], kv_heads))
        inputs = [
            TensorForm(name, kind, (*batch, *(pair[i] for i in order), size))
            for name, pair in zip(INPUTS, pairs, strict=True)
        ]
    out = (*batch, heads, rows[0], size) if features.layout == "bhsd" else (*batch, rows[0], heads, size)
    outputs = [TensorForm("Out", kind, out)]
    if features.return_lse:
        outputs.append(TensorForm("Lse", FLOAT, (*batch, heads, rows[0])))
    return Forms((*inputs, *_length_forms(problem)), tuple(outputs))


def _row_axes(problem: Problem) -> tuple[Axis, Axis]:
    """The axes of queries and of keys: those of a packed tensor are one."""
    assert problem.features is not None
    names = ("Q tokens", "KV tokens") if problem.features.cu_seqlens else ("Sq", "Skv")
    if problem.features.layout == "packed":
        names = ("tokens",) * 2 if problem.features.cu_seqlens else ("seq",) * 2
    return (names[0], None), (names[1], None)


def _length_forms(problem: Problem) -> list[TensorForm]:
    features = problem.features
    assert features is not None
    present = {
        "q_lengths": features.q_lengths,
        "kv_lengths": features.kv_lengths,
        "cu_seqlens_q": features.cu_seqlens,
        "cu_seqlens_kv": features.cu_seqlens,
    }
    axis = ("batch + 1" if features.cu_seqlens else "batch", None)
    return [TensorForm(name, INT32, (axis,)) for name, given in present.items() if given]


def check_type(problem: Problem, form: TensorForm, kind: Any) -> None:
    """Compare a tensor's ``DataType`` with its form's.

    Raises:
        PluginError: it is another.
    """
    if int(kind) == form.type_id:
        return
    if form.type_id == problem.type_id and form.name != "Lse":
        wanted = f"the plugin was created for {TYPE_NAMES[problem.dtype]} (type_id {problem.type_id})"
    else:
        wanted = f"it must be {_NAMES[form.type_id]}"
    raise PluginError(f"{form.name} is of type {kind}; {wanted}")


def check_types(problem: Problem, forms: Iterable[TensorForm], descs: Iterable[Any]) -> None:
    """Compare the types of tensors' ``PluginTensorDesc`` with their forms'.

    Raises:
        PluginError: one is of another type.
    """
    for form, desc in zip(forms, descs, strict=True):
        kind = desc.type  # read once: every look into the binding costs about 0.5 us
        if int(kind) != form.type_id:
            check_type(problem, form, kind)


def check_expressions(forms: Forms, inputs: Sequence[Any]) -> None:
    """Compare what is known of the inputs' ``DimsExprs`` while a network is built.

    Raises:
        PluginError: one has not as many dimensions as its form, or a known size that is not the plugin's, or not that
            of the same axis of another.
    """
    found: dict[str, tuple[str, int]] = {}
    for form, dims in zip(forms.inputs, inputs, strict=True):
        if len(dims) != len(form.axes):
            raise PluginError(f"{form.name} has {len(dims)} dimensions; it must be {form.named()}")
        for expression, (name, wanted) in zip(dims, form.axes, strict=True):
            if expression is None or not expression.is_constant():
                continue
            got = expression.get_constant_value()
            if wanted not in (None, got):
                raise PluginError(f"{form.name} has {name} {got}, the plugin was created for {wanted}")
            other, size = found.setdefault(name, (form.name, got))
            if size != got:
                raise PluginError(f"{form.name} has {name} {got}, {other} has {size}; they must be the same")


def output_expressions(forms: Forms, inputs: Sequence[Any], constant: Any) -> list[list[Any]]:
    """The ``DimsExprs`` of the outputs as lists: each size that of an input's axis of the same name.

    Args:
        forms: of the tensors.
        inputs: their ``DimsExprs``, checked.
        constant: makes the expression of a number, for a size that no input has by itself.
    """
    known: dict[str, Any] = {}
    for form, dims in zip(forms.inputs, inputs, strict=True):
        for axis, (name, _) in enumerate(form.axes):
            known.setdefault(name, dims[axis])
    return [[known[name] if name in known else constant(size) for name, size in form.axes] for form in forms.outputs]


def sizes(dims: Any) -> Shape:
    """The sizes in a ``Dims``. A slice, because the binding makes a tuple of it in one step: 0.6 us instead of 6."""
    return tuple(dims[:])


def largest(desc: Any) -> Shape:
    """The upper bounds of a ``DynamicPluginTensorDesc``; its own sizes where those are known and bounds are not."""
    own, bounds = sizes(desc.desc.dims), sizes(desc.max)
    return tuple(map(max, own, bounds)) if len(own) == len(bounds) else bounds or own


def smallest(desc: Any) -> Shape:
    """The lower bounds of a ``DynamicPluginTensorDesc``, -1 where one is not known."""
    own, bounds = sizes(desc.desc.dims), sizes(desc.min)
    if len(own) != len(bounds):
        return own or bounds
    return tuple(bound if size < 0 else min(size, bound) for size, bound in zip(own, bounds, strict=True))


def measure(forms: Forms, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> Mapping[str, int]:
    """The sizes of all axes by name.

    Raises:
        PluginError: there are too many or too few tensors, or their shapes are not those of the forms.
    """
    forms.check_count(inputs, outputs)
    shapes = [*inputs, *outputs]
    found: dict[str, int] = {}
    for form, shape in zip(forms.all, shapes, strict=True):
        if not form.fits(shape, found):
            raise _mismatch(forms, shapes)
    return found


def _mismatch(forms: Forms, shapes: Sequence[Shape]) -> PluginError:
    got = ", ".join(f"{form.name} {list(shape)}" for form, shape in zip(forms.all, shapes, strict=True))
    wanted = ", ".join(map(str, forms.all))
    alike = "; a name stands for the same size wherever it is"
    return PluginError(f"shapes are {got}; they must be {wanted}: numbers as the plugin was created{alike}")
