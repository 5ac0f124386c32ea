"""The launches of a plugin for one shape: all but the addresses, which TensorRT gives with each call."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from pyfmha.errors import PluginError
from pyfmha.operators.arithmetic import EvaluationError
from pyfmha.operators.forms import Forms
from pyfmha.operators.program import NULL, LaunchProgram, Program, Source
from pyfmha.operators.scopes import ShapeScope, holds

LARGEST = 1 << 62
"""Bytes that no memory has."""

TYPICAL_ADDRESS = 1 << 40
"""An address such as TensorRT's are: a multiple of 256."""


@dataclass(frozen=True)
class Pointer:
    """Where an address comes from when the launch is queued.

    Attributes:
        source: ``"input"``, ``"output"``, ``"workspace"``, or ``"null"`` for none.
        index: which input or output.
        offset: bytes from there.
    """

    source: str
    index: int = 0
    offset: int = 0


class Step(NamedTuple):
    """One launch, but for the addresses.

    Attributes:
        function: the C function.
        arguments: in its order: pointers and numbers.
        tuned: whether TensorRT's tactic says which algorithm; else it is the first.
    """

    function: str
    arguments: tuple[Pointer | int | float, ...]
    tuned: bool


class Plan(NamedTuple):
    """The launches for one shape.

    Attributes:
        steps: one after the other.
        num_inputs, num_outputs: how many addresses TensorRT gives.
        workspace_bytes: how much workspace they need.
        sizes: what the shape is, for messages.
        reads_values: whether there are inputs whose values are read, whose addresses may come behind the others'.
    """

    steps: tuple[Step, ...]
    num_inputs: int
    num_outputs: int
    workspace_bytes: int
    sizes: str
    reads_values: bool = False


def typical(argument: Pointer | int | float) -> int | float:
    if isinstance(argument, Pointer):
        return 0 if argument.source == NULL else TYPICAL_ADDRESS + argument.offset
    return argument


def pointer_of(source: Source, scope: ShapeScope, forms: Forms, offsets: Mapping[str, int]) -> Pointer:
    for condition, name, offset in source.cases:
        if not holds(condition, scope):
            continue
        moved = 0 if offset is None else offset.evaluate(scope)
        if not 0 <= moved < LARGEST:  # nothing of the tensor's lies there
            raise EvaluationError
        for kind, tensors in (("input", forms.inputs), ("output", forms.outputs)):
            for index, form in enumerate(tensors):
                if form.name == name:
                    return Pointer(kind, index, moved)
        if name in offsets:
            return Pointer("workspace", 0, offsets[name] + moved)
        return Pointer(NULL)
    return Pointer(NULL)


def workspace_of(program: Program, scope: ShapeScope) -> tuple[dict[str, int], int]:
    """Where each part of the workspace begins, and bytes in all.

    Raises:
        EvaluationError: a part has no size.
        PluginError: one has fewer than 0 bytes, or all together have more than there can be.
    """
    offsets: dict[str, int] = {}
    end = 0
    for name, size, when in program.workspace:
        if not holds(when, scope):
            continue
        bytes_ = size.evaluate(scope)
        alignment = program.operator.alignment
        offsets[name] = -(-end // alignment) * alignment
        end = offsets[name] + bytes_
        if bytes_ < 0 or end >= LARGEST:
            raise PluginError(
                f"part {name} of the workspace has {bytes_} bytes, from {offsets[name]} on; it must have 0 or more, and"
                f" end before {LARGEST}"
            )
    return offsets, end


def arguments_of(
    launch: LaunchProgram, scope: ShapeScope, forms: Forms, offsets: Mapping[str, int]
) -> tuple[Pointer | int | float, ...]:
    """A launch's arguments in its function's order.

    Raises:
        EvaluationError: one has no value.
    """
    found: list[Pointer | int | float] = []
    for _, source in launch.arguments:
        if isinstance(source, Source):
            found.append(pointer_of(source, scope, forms, offsets))
        else:
            value = source.evaluate(scope)
            found.append(int(value) if isinstance(value, bool) else one_nan(value))
    return tuple(found)


def one_nan(value: float) -> float:
    """A NaN is one NaN: what 0 / 0 leaves for its sign hangs on the processor."""
    return value if value == value else math.nan
