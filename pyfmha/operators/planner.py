"""The launches of one plugin for many shapes: its description as a function in Python, its attributes' values in place.

Walking the description takes a hundred microseconds for each new shape, and some callers have a new one with every
token. What is written here computes the same in a tenth of that. It knows no messages: where it finds no plan it says
nothing, and the walk (:class:`pyfmha.operators.instance.Instance`) says what is wrong.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pyfmha.operators.arithmetic import CALLED, EvaluationError
from pyfmha.operators.expressions import Expression, Node, python_of
from pyfmha.operators.folding import folded
from pyfmha.operators.forms import AxisForm, Forms, Shape, solved
from pyfmha.operators.plan import LARGEST, TYPICAL_ADDRESS, Plan, Pointer, Step, one_nan
from pyfmha.operators.program import NULL, LaunchProgram, Program, Source
from pyfmha.operators.scopes import AttributeScope, product
from pyfmha.operators.text import Hole, Text, shown

Serves = Callable[[str, str, Sequence[float]], bool]
"""Whether a function, launched with these arguments on the device at hand, runs a certain kernel."""
Given = Mapping[str, int]
Device = Callable[[str], int]
"""A figure of the device at hand, one of :data:`pyfmha.operators.expressions.FIGURES`; 0 where it is not known."""
Planner = Callable[[tuple[Shape, ...], Serves, Given, Device], Plan | None]
"""Of the shapes of all tensors, inputs first, what answers ``serves``, definitions whose values are given, and what
answers ``device``: the launches, or None for the walk."""


def unknown(figure: str) -> int:
    """Of no device."""
    return 0


def walk(shapes: tuple[Shape, ...], serves: Serves, given: Given, device: Device = unknown) -> None:
    """Finds no plan."""


class UnwrittenError(Exception):
    """The description has something that is only walked."""


def planner(
    program: Program, scope: AttributeScope, forms: Forms, active: Sequence[LaunchProgram], known: bool
) -> Planner:
    """A planner; one that leaves all to the walk where the description has something that is only walked.

    Args:
        program: of the operator.
        scope: of the attributes, with what is defined by them.
        forms: of the tensors.
        active: the launches that there may be.
        known: whether values of definitions may be given.
    """
    try:
        writer = _Writer(program, scope, forms, known)
        text = writer.written(active)
    except (UnwrittenError, EvaluationError, KeyError):
        return walk
    exec(compile(text, f"<launches of {program.operator.name}>", "exec"), writer.names)
    found: Callable[..., Plan | None] = writer.names["plan"]

    def plan(shapes: tuple[Shape, ...], serves: Serves, given: Given, device: Device = unknown) -> Plan | None:
        try:
            return found(shapes, serves, given, device)
        except (EvaluationError, ValueError, NameError, TypeError):
            return None

    return plan


class _Writer:
    """Writes the function.

    Attributes:
        names: what its text may name besides its own.
    """

    def __init__(self, program: Program, scope: AttributeScope, forms: Forms, known: bool) -> None:
        if forms.shapes:
            raise UnwrittenError
        self._known = known
        self.program, self.forms = program, forms
        self.scope = AttributeScope(scope.values, scope.given, scope.options, scope.types)
        given = {"Plan": Plan, "Pointer": Pointer, "Step": Step, "nan": math.nan}
        called = {
            "_product": product,
            "_solved": solved,
            "_shown": shown,
            "_listed": _listed,
            "_moved": _moved,
            "_one_nan": one_nan,
        }
        self.names: dict[str, Any] = {**CALLED, **given, **called}
        self._lines: list[str] = []
        self._axes = {
            form.name: [f"t{number}_{axis}" for axis in range(len(form.axes))] for number, form in enumerate(forms.all)
        }
        self._sized = [pair for form in forms.all for pair in zip(form.axes, self._axes[form.name], strict=True)]

    def written(self, active: Sequence[LaunchProgram]) -> str:
        """The function's text."""
        rows = [f"({''.join(f'{axis}, ' for axis in axes)})" for axes in self._axes.values()]
        self._lines = [f"{''.join(f'{row}, ' for row in rows)}= shapes"]
        later = self._measured()
        arguments = {name for launch in active for name, _ in launch.arguments}
        defined = {name for name, _ in self.program.late}
        for name, _ in self.program.early:
            if self._known and name in arguments:
                kept = self._kept(self.scope.values.pop(name))
                self._lines.append(f"n_{name} = given.get({name!r}, {kept})")
        for condition, _ in self.program.late_checks:
            if not condition.names() & defined:
                self._refuse_unless(self._folded(condition.node))
        for name, expression in self.program.late:
            node = self._folded(expression.node)
            if self._known and name in arguments:
                self._lines.append(f"n_{name} = given[{name!r}] if {name!r} in given else {self._python(node)}")
            elif node.kind == "constant":
                self.scope.values[name] = node.value
            else:
                self._lines.append(f"n_{name} = {self._python(node)}")
        for condition, _ in self.program.late_checks:
            if condition.names() & defined:
                self._refuse_unless(self._folded(condition.node))
        for axis, local in later:
            self._lines.append(f"if {self._of(axis.expression)} != {local}: return None")
        parts = self._workspace()
        self._lines.append("steps = []")
        for launch in active:
            self._launch(launch, tuned=launch is active[0], parts=parts)
        counts = f"{len(self.forms.inputs)}, {len(self.forms.outputs)}"
        self._lines.append(f"return Plan(tuple(steps), {counts}, end, {self._sizes()}, False)")
        return "\n    ".join(["def plan(shapes, serves, given, device):", *self._lines])

    # ------------------------------------------------------------------ sizes

    def _measured(self) -> list[tuple[AxisForm, str]]:
        """What :func:`pyfmha.operators.forms.measure` does; the axes of outputs, which definitions tell."""
        found: set[str] = set()
        for axis, local in self._sized:
            self._lines.append(f"if {local} < 0: return None")
            if axis.size is None and axis.name is not None and axis.name not in found:
                found.add(axis.name)
                self._lines.append(f"n_{axis.name} = {local}")
        of_inputs = sum(len(form.axes) for form in self.forms.inputs)
        for axis, local in self._sized[:of_inputs]:
            unknown = axis.unknown - found - set(self.scope.values)
            if axis.size is None and len(unknown) == 1:
                (name,) = unknown
                self._lines.append(f"n_{name} = _solved(lambda n_{name}: {self._of(axis.expression)}, {local})")
                self._lines.append(f"if n_{name} is None: return None")
                found.add(name)
        later = []
        for index, (axis, local) in enumerate(self._sized):
            if axis.size is not None:
                self._lines.append(f"if {local} != {axis.size}: return None")
            elif axis.unknown <= found | set(self.scope.values):
                self._lines.append(f"if {local} != {self._of(axis.expression)}: return None")
            elif index < of_inputs:
                raise UnwrittenError
            else:
                later.append((axis, local))
        # A name that no tensor of these attributes has is 0.
        self.scope.values.update(dict.fromkeys(set(self.program.axes) - found, 0))
        return later

    def _refuse_unless(self, node: Node) -> None:
        if node.kind != "constant" or not node.value:
            self._lines.append(f"if not {self._python(node)}: return None")

    def _workspace(self) -> dict[str, str]:
        """Where each part begins, None where it is not there."""
        self._lines.append("end = 0")
        alignment, found = self.program.operator.alignment, {}
        for name, size, when in self.program.workspace:
            condition = self._condition(when)
            if condition == "False":
                continue
            found[name] = begin = f"o_{name}"
            self._lines += [
                f"{begin} = None",
                f"if {condition}:",
                f"    {begin} = -(-end // {alignment}) * {alignment}",
                f"    size = {self._of(size)}",
                f"    end = {begin} + size",
                f"    if size < 0 or end >= {LARGEST}: return None",
            ]
        return found

    def _sizes(self) -> str:
        if not self.program.shape_summary:
            return f"_listed({[form.name for form in self.forms.all]!r}, shapes)"
        return " + ".join(
            f"({self._text(text)} if {condition} else '')"
            for when, text in self.program.shape_summary
            if (condition := self._condition(when)) != "False"
        )

    # ------------------------------------------------------------------ launches

    def _launch(self, launch: LaunchProgram, tuned: bool, parts: Mapping[str, str]) -> None:
        condition = self._condition(launch.when)
        if condition != "False":
            arguments = "".join(f"{one}, " for one in self._arguments(launch, parts, self._pointer))
            step = f"Step({self._text(launch.function)}, ({arguments}), {tuned})"
            self._lines.append(f"if {condition}: steps.append({step})")

    def _arguments(
        self, launch: LaunchProgram, parts: Mapping[str, str], pointer: Callable[[str, int, str], str]
    ) -> Iterator[str]:
        for _, source in launch.arguments:
            if isinstance(source, Source):
                yield self._address(source, parts, pointer)
            else:
                text = self._of(source)
                wrap = {"bool": "int", "float": "_one_nan"}.get(source.type, "")
                yield f"{wrap}({text})" if wrap else text

    def _address(self, source: Source, parts: Mapping[str, str], pointer: Callable[[str, int, str], str]) -> str:
        """What :func:`pyfmha.operators.plan.pointer_of` finds."""
        null = text = pointer(NULL, 0, "0")
        for condition, name, offset in reversed(source.cases):
            moved = "0" if offset is None else self._of(offset)
            if not moved.isdecimal() or int(moved) >= LARGEST:
                moved = f"_moved({moved})"
            one = null
            for kind, tensors in (("input", self.forms.inputs), ("output", self.forms.outputs)):
                at = [index for index, form in enumerate(tensors) if form.name == name]
                one = pointer(kind, at[0], moved) if at and one == null else one
            if one == null and name in parts:
                begin = parts[name]
                one = f"({null} if {begin} is None else {pointer('workspace', 0, f'({begin} + {moved})')})"
            text = f"({one} if {self._condition(condition)} else {text})"
        return text

    def _pointer(self, kind: str, index: int, moved: str) -> str:
        if not moved.lstrip("-").isdecimal():
            return f"Pointer({kind!r}, {index}, {moved})"
        return self._kept(Pointer(kind, index, int(moved)))

    def _typical(self, kind: str, index: int, moved: str) -> str:
        return "0" if kind == NULL else f"({TYPICAL_ADDRESS} + {moved})"

    def _kept(self, value: Any) -> str:
        """The name of a value that is made once."""
        for name, known in self.names.items():
            if type(known) is type(value) and known == value:
                return name
        name = f"c{len(self.names)}"
        self.names[name] = value
        return name

    # ------------------------------------------------------------------ expressions

    def _folded(self, node: Node) -> Node:
        return folded(node, self.scope)

    def _of(self, expression: Expression) -> str:
        return self._python(self._folded(expression.node))

    def _condition(self, expression: Expression | None) -> str:
        if expression is None:
            return "True"
        node = self._folded(expression.node)
        return str(bool(node.value)) if node.kind == "constant" else self._python(node)

    def _python(self, node: Node) -> str:
        return python_of(node, lambda name: f"n_{name}", self._asked)

    def _asked(self, question: str, words: tuple[Any, ...]) -> str:
        if question == "serves":
            launch = next(one for one in self.program.launches if one.launch.name == words[0])
            arguments = ", ".join(self._arguments(launch, {}, self._typical))
            return f"serves({self._text(launch.function)}, {words[1]!r}, [{arguments}])"
        if question == "device":
            return f"device({words[0]!r})"
        if question not in ("size", "stride", "numel"):
            raise UnwrittenError
        axes = self._axes.get(words[0])
        if question == "numel":
            return "0" if axes is None else _product_of(axes)
        if axes is None or words[1] >= len(axes):
            raise UnwrittenError
        return axes[words[1]] if question == "size" else _product_of(axes[words[1] + 1 :])

    def _text(self, text: Text) -> str:
        parts = []
        for part in text.parts:
            if isinstance(part, Hole):
                node = self._folded(part.expression.node)
                kind = part.expression.type
                one = f"str({self._python(node)})" if kind == "int" else ""
                one = one or f"_shown({self._python(node)}, {kind!r}, {part.format!r})"
                if node.kind == "constant":
                    one = repr(shown(node.value, kind, part.format))
                parts.append(one)
            else:
                parts.append(repr(part))
        return f"({' + '.join(parts) or repr('')})"


def _moved(offset: int) -> int:
    """An offset that :func:`pyfmha.operators.plan.pointer_of` takes."""
    if not 0 <= offset < LARGEST:
        raise EvaluationError
    return offset


def _product_of(axes: Sequence[str]) -> str:
    return f"_product(({''.join(f'{axis}, ' for axis in axes)}))"


def _listed(names: Sequence[str], shapes: Sequence[Shape]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in zip(names, shapes, strict=True))
