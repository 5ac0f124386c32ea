"""The plugin's tensors: names, and what TensorRT's descriptors of them must say."""

from collections.abc import Sequence
from typing import Any

from pyfmha.errors import PluginError
from pyfmha.trt.fields import TYPE_NAMES, Problem

INPUTS = ("Q", "K", "V")
OUTPUTS = ("Out",)
TENSORS = INPUTS + OUTPUTS


def check_count(inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
    """Refuse any other number of tensors.

    Raises:
        PluginError: saying which they are.
    """
    if len(inputs) != len(INPUTS) or len(outputs) != len(OUTPUTS):
        raise PluginError(f"{len(inputs)} inputs, {len(outputs)} outputs; it has {', '.join(INPUTS)} and {OUTPUTS[0]}")


def check_type(problem: Problem, name: str, kind: Any) -> None:
    """Compare a tensor's ``DataType`` with the problem's.

    Raises:
        PluginError: it is another.
    """
    if int(kind) != problem.type_id:
        wanted = f"{TYPE_NAMES[problem.dtype]} (type_id {problem.type_id})"
        raise PluginError(f"{name} is of type {kind}; the plugin was created for {wanted}")


def check_types(problem: Problem, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
    """Compare the types of all tensors' ``PluginTensorDesc`` with the problem's.

    Raises:
        PluginError: there are too many or too few, or one is of another type.
    """
    check_count(inputs, outputs)
    wanted = problem.type_id
    for name, desc in zip(TENSORS, [*inputs, *outputs], strict=True):
        kind = desc.type  # read once: every look into the binding costs about 0.5 us
        if int(kind) != wanted:
            check_type(problem, name, kind)


def check_expressions(problem: Problem, name: str, dims: Any) -> None:
    """Compare what is known of a tensor's ``DimsExprs`` while a network is built.

    Raises:
        PluginError: it has not four dimensions, or known heads or head size that are not the problem's.
    """
    if len(dims) != 4:
        raise PluginError(f"{name} has {len(dims)} dimensions; it must be [batch, heads, seq, head size]")
    for axis, what, wanted in ((1, "heads", problem.num_heads), (3, "head size", problem.head_size)):
        size = dims[axis]
        if size is not None and size.is_constant() and size.get_constant_value() != wanted:
            raise PluginError(f"{name} has {what} {size.get_constant_value()}, the plugin was created for {wanted}")


def sizes(dims: Any) -> tuple[int, ...]:
    """The sizes in a ``Dims``. A slice, because the binding makes a tuple of it in one step: 0.6 us instead of 6."""
    return tuple(dims[:])


def largest(desc: Any) -> tuple[int, ...]:
    """The upper bounds of a ``DynamicPluginTensorDesc``; its own sizes where those are known and bounds are not."""
    own, bounds = sizes(desc.desc.dims), sizes(desc.max)
    return tuple(map(max, own, bounds)) if len(own) == len(bounds) else bounds or own


def batch_and_seq(
    problem: Problem, inputs: Sequence[tuple[int, ...]], outputs: Sequence[tuple[int, ...]]
) -> tuple[int, int]:
    """Batch and seq of the tensors' shapes.

    Raises:
        PluginError: the shapes differ, or are not [batch, heads, seq, head size] with the problem's sizes.
    """
    check_count(inputs, outputs)
    shapes = [*inputs, *outputs]
    batch, _, seq, _ = shapes[0] if len(shapes[0]) == 4 else (-1, -1, -1, -1)
    wanted = (batch, problem.num_heads, seq, problem.head_size)
    if batch < 0 or seq < 0 or shapes != [wanted] * len(shapes):
        got = ", ".join(f"{name} {list(shape)}" for name, shape in zip(TENSORS, shapes, strict=True))
        raise PluginError(
            f"shapes are {got}; all must be the same [batch, {problem.num_heads}, seq, {problem.head_size}],"
            " heads and head size as the plugin was created"
        )
    return batch, seq
