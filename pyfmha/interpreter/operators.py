"""An operator on the CPU: the launches that its description gives, each under Triton's interpreter.

It checks the description as well as the kernel: forms, arguments, grid and workspace are those that TensorRT's plugin
would have.
"""

import ast
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from pyfmha.errors import InterpreterError, PluginError
from pyfmha.interpreter.kernel import Argument, Array, FunctionOf, Null, Tensor
from pyfmha.interpreter.process import run_in_subprocess
from pyfmha.operators.arithmetic import EvaluationError
from pyfmha.operators.attributes import checked
from pyfmha.operators.description import DATA_TYPES, ELEMENTS, Config, Operator
from pyfmha.operators.elements import element_of
from pyfmha.operators.forms import Forms, Shape, measure
from pyfmha.operators.instance import Instance
from pyfmha.operators.plan import Pointer, workspace_of
from pyfmha.operators.planner import unknown
from pyfmha.operators.program import NULL, LaunchProgram, Program, Source, program_of
from pyfmha.operators.reading import OF_GRIDS
from pyfmha.operators.scopes import ShapeScope, holds
from pyfmha.spec.grid import NUM_SMS, GridExpression, parse_grid
from pyfmha.spec.kernel import KernelSpec

STORAGE = {
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "uint16",
    "int8": "int8",
    "uint8": "uint8",
    "int32": "int32",
    "int64": "int64",
    "bool": "bool",
}
"""How numpy stores the types of tensors, of :data:`pyfmha.operators.description.DATA_TYPES`; fp8 is not interpreted."""
_STORAGE_OF = {ELEMENTS[name]: storage for name, storage in STORAGE.items()}
TYPE_OF = {storage: name for name, storage in STORAGE.items()}


def interpret_operator(
    operator: Operator,
    inputs: Mapping[str, Any],
    /,
    *,
    source: str | os.PathLike[str] | None = None,
    kernels: Mapping[str, KernelSpec] | None = None,
    **attributes: Any,
) -> dict[str, Array]:
    """An operator's outputs, computed by its kernels under Triton's interpreter. Slow: for small tensors.

    Args:
        operator: its description.
        inputs: numpy arrays by name; bf16 as uint16. An input whose values are read as sizes is a sequence of integers.
        source: the Python file of the kernels; by default the operator's own ``source``.
        kernels: what to run for functions that launches name instead of kernels.
        attributes: of the operator, by name.

    Returns:
        The outputs by name. What the kernels leave unwritten is NaN, or -1 in integers.

    Raises:
        PluginError: an attribute is not served, or the inputs do not fit.
        SpecError: the description does not say enough of an argument.
        InterpreterError, KernelSourceError: Triton is missing, a type is not interpreted, or a kernel failed.
    """
    if not isinstance(operator, Operator):
        raise PluginError(f"operator is {operator!r}; give its description, a pyfmha.Operator")
    program = program_of(operator)
    instance = Instance(program, checked(program, attributes))
    return run_instance(instance, inputs, operator.source if source is None else source, kernels or {})


def run_instance(
    instance: Instance,
    inputs: Mapping[str, Any],
    source: str | os.PathLike[str] = "",
    kernels: Mapping[str, KernelSpec] | None = None,
    more: Mapping[str, Argument] | None = None,
) -> dict[str, Array]:
    """As :func:`interpret_operator`, for a plugin of an operator; raises the same.

    Args:
        more: what those kernels take besides.
    """
    names = [form.name for form in instance.forms().inputs]
    shapes = {name: tuple(map(int, inputs[name])) for name, _ in instance.forms().shapes if name in inputs}
    wanted = [*names, *(name for name, _ in instance.forms().shapes)]
    if set(inputs) != set(wanted):
        raise PluginError(f"inputs are {', '.join(inputs) or 'missing'}; give {', '.join(wanted) or 'none'}")
    arrays = {name: _held(name, inputs[name]) for name in names}
    kinds = [DATA_TYPES[TYPE_OF[str(array.dtype)]] for array in arrays.values()]
    instance = instance.with_types(instance.types_for(kinds))
    forms = instance.forms([array.ndim for array in arrays.values()])
    for form, kind in zip(forms.inputs, kinds, strict=True):
        if form.type_id != kind:
            raise PluginError(instance.type_error(form, kind, instance.types))
    given = [array.shape for array in arrays.values()]
    outputs = _output_shapes(instance, forms, given, shapes)
    scope = instance.measure(given, outputs)
    for form, shape in zip(forms.outputs, outputs, strict=True):
        arrays[form.name] = _unwritten(shape, form.type or "")
    runs = _Runs(instance, forms, scope, arrays, source, kernels or {}, more or {})
    for launch, step in zip(runs.launches(), instance.plan(scope).steps, strict=True):
        runs.run(launch, step.function, step.arguments)
    return {form.name: arrays[form.name] for form in forms.outputs}


def _held(name: str, value: Any) -> Array:
    """A copy of an input, which no kernel changes for the caller."""
    if not isinstance(value, np.ndarray) or str(value.dtype) not in TYPE_OF:
        got = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
        raise PluginError(f"{name} is {got}; give a numpy array of {', '.join(TYPE_OF)} (bf16 is uint16)")
    copy = np.array(value, order="C")
    copy.flags.writeable = False
    return copy


def _unwritten(shape: Shape, kind: str) -> Array:
    if kind not in STORAGE:
        raise InterpreterError(f"an output is {kind}, which is not interpreted; there are {', '.join(STORAGE)}")
    if kind == "bool":
        return np.zeros(shape, np.bool_)
    array = np.empty(shape, STORAGE[kind])
    array.reshape(-1).view(np.uint8)[...] = 0xFF
    return array


def _output_shapes(
    instance: Instance, forms: Forms, inputs: Sequence[Shape], values: Mapping[str, Shape]
) -> list[Shape]:
    """The shapes of the outputs, as TensorRT would be told them."""
    found = measure(Forms(forms.inputs, (), forms.shapes), inputs, (), instance.scope.values)
    program = instance.program
    known: dict[str, Any] = dict.fromkeys(program.axes, 0) | found | dict(values)
    given = dict(zip([form.name for form in forms.inputs], inputs, strict=True))
    scope = ShapeScope(instance.scope, known, given, {}, lambda function, kernel: False, unknown)
    for name, expression in program.late:
        with suppress(EvaluationError, KeyError):  # what reads outputs says nothing of their sizes
            scope.values[name] = expression.evaluate(scope)
    try:
        return [
            tuple(int(axis.expression.evaluate(scope)) if axis.size is None else axis.size for axis in form.axes)
            for form in forms.outputs
        ]
    except (EvaluationError, KeyError) as error:
        raise PluginError(f"the shape of an output cannot be computed: {error}") from None


@dataclass
class _Runs:
    """The launches for one shape: tensors and workspace in numpy's memory."""

    instance: Instance
    forms: Forms
    scope: ShapeScope
    arrays: Mapping[str, Array]
    source: str | os.PathLike[str]
    kernels: Mapping[str, KernelSpec]
    more: Mapping[str, Argument]
    parts: dict[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.offsets, total = workspace_of(self.instance.program, self.scope)
        for name, (start, end) in zip(self.offsets, pairwise([*self.offsets.values(), total]), strict=True):
            self.parts[name] = np.full(end - start, 0xFF, np.uint8)

    def launches(self) -> Iterator[LaunchProgram]:
        """Those that run, in the order of the plan's steps."""
        return (launch for launch in self.instance.active if holds(launch.when, self.scope))

    def run(self, launch: LaunchProgram, function: str, values: Sequence[Pointer | int | float]) -> None:
        """One launch."""
        kernel = self._kernel(launch, function)
        views: dict[tuple[str, str], Array] = {}
        arguments: dict[str, Argument] = {
            name: self._pointer(value, kernel.kinds[name].removeprefix("*").removeprefix("k"), views)
            if isinstance(value, Pointer)
            else value
            for (name, _), value in zip(launch.arguments, values, strict=True)
        }
        if len({where for where, _ in views}) < len(views):
            raise InterpreterError(f"{function} takes one tensor as two types, which is not interpreted")
        # As a device with one multiprocessor: kernels that read their number walk through all the work.
        numbers = {NUM_SMS: 1, **_integers(self.scope.values), **_integers(arguments)}
        grid = kernel.grid or parse_grid(self._answered(launch.launch.grid), frozenset(numbers), kernel.constants)
        try:
            x, y, z = (expression.evaluate(numbers) for expression in grid)
        except ZeroDivisionError:
            raise PluginError(f"the grid of {function} divides by zero") from None
        if x and y and z:
            read = {name for expression in grid for name in expression.names()}
            tuples = {name: tuple(arguments.pop(one) for one in elements) for name, elements in kernel.tuples}
            taken: dict[str, Any] = {**arguments, **tuples, **(self.more if function in self.kernels else {})}
            run_in_subprocess(kernel.path, kernel.name, (x, y, z), taken, kernel.constants, optional=read)

    def _answered(self, grid: str) -> str:
        """A grid in whose text answers stand for what it asks of tensors, types and lists."""
        try:
            tree = ast.parse(grid.strip(), mode="eval")
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            return grid  # refused where it is read
        text = ast.unparse(_Answers(self.instance.program, self.scope).visit(tree))
        return text[1:-1] if isinstance(tree.body, ast.Tuple) else text

    def _kernel(self, launch: LaunchProgram, function: str) -> "_Kernel":
        spec, said = self.kernels.get(function), launch.launch
        if spec is not None:
            functions = {one.parameter: FunctionOf(str(one.source), one.attribute) for one in spec.functions}
            constants = {**dict(spec.constants), **functions}
            tuples = () if self.more else _flat(spec)
            return _Kernel(spec.source, spec.kernel, constants, dict(spec.prototype), spec.grid_expressions, tuples)
        if not said.kernel:
            raise InterpreterError(f"{function} is a function of a library, and no kernel is given that computes it")
        if not os.fspath(self.source):
            name = self.instance.program.operator.name
            raise InterpreterError(f"nothing says in which file the kernels of {name} are; give source='its_file.py'")
        kinds = {
            name: dict(said.scalars).get(name)
            or f"*{element_of(self.instance.program, launch, name, source, self.scope.types)}"
            for name, source in launch.arguments
            if isinstance(source, Source)
        }
        config = next(iter(said.configs), Config())
        return _Kernel(Path(self.source), said.kernel, {**dict(said.constants), **dict(config.constants)}, kinds, ())

    def _pointer(self, pointer: Pointer, kind: str, views: dict[tuple[str, str], Array]) -> Argument:
        if pointer.source == NULL:
            return Null(kind)
        if kind not in _STORAGE_OF:
            raise InterpreterError(f"a pointer to {kind} is not interpreted; there are {', '.join(_STORAGE_OF)}")
        if pointer.source == "workspace":
            starts = list(self.offsets.values())
            name = list(self.offsets)[bisect_right(starts, pointer.offset) - 1]
            array, moved = self.parts[name], pointer.offset - self.offsets[name]
        else:
            forms = self.forms.inputs if pointer.source == "input" else self.forms.outputs
            name, moved = forms[pointer.index].name, pointer.offset
            array = self.arrays[name]
        storage = np.dtype(_STORAGE_OF[kind])
        view = views.setdefault((name, kind), array.reshape(-1).view(storage))
        return Tensor(view, kind, moved // storage.itemsize)


class _Answers(ast.NodeTransformer):
    """Puts numbers for what a grid's own language has not: ``sizes[0]``, ``numel(Y)``."""

    def __init__(self, program: Program, scope: ShapeScope) -> None:
        self.program, self.scope = program, scope

    def visit(self, node: ast.AST) -> Any:
        asked = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in OF_GRIDS
        if not asked and not isinstance(node, ast.Subscript):
            return super().visit(node)
        try:
            return ast.Constant(self.program.question(ast.unparse(node)).evaluate(self.scope))
        except EvaluationError:
            raise PluginError(f"the grid reads {ast.unparse(node)}, which has no value") from None


@dataclass(frozen=True)
class _Kernel:
    """A kernel, and how it is launched: the types of its pointers among others; the grid where it is parsed; parameters
    that are tuples of arguments."""

    path: Path
    name: str
    constants: Mapping[str, Any]
    kinds: Mapping[str, str]
    grid: tuple[GridExpression, ...]
    tuples: Sequence[tuple[str, Sequence[str]]] = ()


def _flat(spec: KernelSpec) -> list[tuple[str, list[str]]]:
    """The tuples of a spec, whose elements are arguments."""
    return [(name, [one for one in elements if isinstance(one, str)]) for name, elements in spec.tuples]


def _integers(values: Mapping[str, Any]) -> dict[str, int]:
    return {name: int(value) for name, value in values.items() if isinstance(value, int)}
