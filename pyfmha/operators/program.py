"""An operator's description, read and checked: every text an expression, every name known.

There are three kinds of values, each known later than the one before: *attributes*, with what is defined by them
alone, when a plugin is created; *sizes*, with types, once its tensors are known; *bounds of a profile*, while an engine
is built.
"""

import ast
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from pyfmha.errors import SpecError
from pyfmha.operators.contradictions import check_program
from pyfmha.operators.description import DATA_TYPES, Attribute, Launch, Operator, Tensor
from pyfmha.operators.expressions import Expression, Node, Parser
from pyfmha.operators.names import SHAPE, check_names
from pyfmha.operators.pointers import Case, cases_of
from pyfmha.operators.reading import (
    LATE,
    TYPES_OF_ATTRIBUTES,
    asked_given,
    axes_of,
    condition,
    function_text,
    names_of,
    parsed,
    plain_summary,
    reads_ahead,
    type_of,
)
from pyfmha.operators.text import Hole, Text, parse_text

MOST_DIMENSIONS = 8
_FORM = re.compile(r"([A-Za-z_]\w*)\s*\[(.*)\]\s*(?: if (.*))?\Z", re.DOTALL)
NULL = "null"


@dataclass(frozen=True)
class Axis:
    """One axis of a form.

    Attributes:
        label: how messages call it.
        expression: its size.
        name: the axis that it gives by itself; None for an expression.
        fixed: whether its size follows from attributes alone.
    """

    label: str
    expression: Expression
    name: str | None
    fixed: bool


@dataclass(frozen=True)
class Form:
    """One form of a tensor.

    Attributes:
        type: a type of :data:`pyfmha.operators.description.DATA_TYPES`, a name of the operator's types, or ``"shape"``.
        axes: in order.
        condition: on attributes; None: none.
    """

    type: str
    axes: tuple[Axis, ...]
    condition: Expression | None


@dataclass(frozen=True)
class TensorProgram:
    """One entry of inputs or outputs: its forms, and when it is there."""

    name: str
    forms: tuple[Form, ...]
    when: Expression | None


@dataclass(frozen=True)
class Source:
    """Where a pointer comes from: the first of its cases that holds.

    Attributes:
        cases: conditions (None for the last), each with the name of a tensor or part, or ``"null"``, and bytes behind
            it.
    """

    cases: tuple[Case, ...]


@dataclass(frozen=True)
class LaunchProgram:
    """One launch.

    Attributes:
        launch: its description.
        arguments: by name, a source of a pointer or an expression.
        when: whether it is launched; None: always.
        early_when: what attributes tell of that.
        function: its C function's name.
    """

    launch: Launch
    arguments: tuple[tuple[str, Source | Expression], ...]
    when: Expression | None
    early_when: Expression | None
    function: Text

    @property
    def said(self) -> str:
        """How messages call it."""
        return self.launch.name or self.launch.kernel or self.launch.function

    def asked(self) -> Iterator[Expression]:
        """What its function's name and arguments read."""
        yield from (part.expression for part in self.function.parts if isinstance(part, Hole))
        for _, source in self.arguments:
            if isinstance(source, Source):
                yield from (found for case in source.cases for found in (case[0], case[2]) if found is not None)
            else:
                yield source

    def fits(self, arguments: Sequence[tuple[str, str]]) -> bool:
        """Whether a function takes these arguments: the same names in the same order, pointers where pointers are."""
        if [name for name, _ in self.arguments] != [name for name, _ in arguments]:
            return False
        pairs = zip(self.arguments, arguments, strict=True)
        return all(isinstance(source, Source) == kind.startswith("*") for (_, source), (_, kind) in pairs)


class Program:
    """An operator ready to be carried out.

    Attributes:
        operator: its description.
        attributes: default of each attribute as an expression, None where it must be given.
        early, late: definitions in order, by attributes alone, and by sizes too.
        axes: names of the axes that inputs give.
        early_checks, late_checks: with their messages.

    Raises:
        SpecError: on creation: the description contradicts itself; the message names the part.
    """

    def __init__(self, operator: Operator) -> None:
        self.operator = operator
        self.tensor_names = frozenset(tensor.name for tensor in (*operator.inputs, *operator.outputs))
        self._launch_names = frozenset(launch.name for launch in operator.launches if launch.name)
        self._option_names = frozenset(option.name for option in operator.options)
        self.types = dict(operator.types)
        self._labels = dict(operator.labels)
        check_names(operator)
        self.fixed_types = {name for name, kinds in self.types.items() if kinds.attribute}
        self.early_types = {name: type_of(kind) for name, kind in operator.attributes}
        self.early_types |= dict.fromkeys(self.fixed_types, "str")
        early = self._parser(self.early_types)
        self.attributes = {name: self._default(name, kind, early) for name, kind in operator.attributes}
        self.early, remaining = self._definitions()
        early = self._early = self._parser(self.early_types)
        told = asked_given(operator)
        self.stored = {
            name: self._when(kind.stored or told.get(name, ""), early, self._said(f"attribute {name}, stored"))
            for name, kind in operator.attributes
        }
        self.stores = {
            name: early.parse(kind.stores, self._said(f"attribute {name}, stores")) if kind.stores else None
            for name, kind in operator.attributes
        }
        self.inputs = tuple(self._tensor(tensor, "input") for tensor in operator.inputs)
        self.shape_values = {tensor.name for tensor in self.inputs if tensor.forms[0].type == SHAPE}
        self.axes = self._axes()
        self._late_types = {**self.early_types, **dict.fromkeys(self.axes, "int"), **dict.fromkeys(self.types, "str")}
        self._late_types |= dict.fromkeys(self.shape_values, "int[]")
        self.late = self._late_definitions(remaining)
        late = self._parser(self._late_types)
        self.outputs = tuple(self._tensor(tensor, "output") for tensor in operator.outputs)
        self.early_checks, self.late_checks = self._checks(early, late)
        self.workspace = tuple(
            (
                part.name,
                late.parse(part.bytes, self._said(f"workspace {part.name}"), wanted="int"),
                self._when(part.when, late, self._said(f"workspace {part.name}, when")),
            )
            for part in operator.workspace
        )
        profile = operator.workspace_of_profile
        self.workspace_of_profile = (
            self._parser(self._late_types, self.axes).parse(profile, self._said("workspace_of_profile"), wanted="int")
            if profile
            else None
        )
        self.options = tuple(
            (option, self._when(option.when, early, self._said(f"option {option.name}, when")))
            for option in operator.options
        )
        self.launches = tuple(self._launch(index, launch, late) for index, launch in enumerate(operator.launches))
        self.summary = self._texts(operator.summary or plain_summary(operator), early, "summary")
        self.shape_summary = self._texts(operator.shape_summary, late, "shape_summary")
        self.build = parse_text(operator.build, late, self._said("build")) if operator.build else None
        check_program(self)

    def _said(self, what: str) -> str:
        return f"{self.operator.name}: {what}"

    def _parser(self, types: Mapping[str, str], axes: Iterable[str] = ()) -> Parser:
        return Parser(
            types,
            tensors=self.tensor_names,
            dtypes=frozenset(self.types) | frozenset(DATA_TYPES),
            options=self._option_names,
            launches=self._launch_names,
            attributes=frozenset(name for name, _ in self.operator.attributes),
            axes=frozenset(axes),
        )

    def question(self, text: str) -> Expression:
        """An expression of all that is known once tensors have shapes."""
        return self._parser(self._late_types).parse(text, self._said(text))

    # ------------------------------------------------------------------ names

    def _default(self, name: str, kind: Attribute, parser: Parser) -> Expression | tuple[int | float, ...] | None:
        what = self._said(f"attribute {name}, default")
        if kind.default is None:
            return None
        if kind.type.endswith("[]"):
            try:
                given = ast.literal_eval(kind.default) if isinstance(kind.default, str) else kind.default
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                given = None
            if not isinstance(given, tuple | list):
                raise SpecError(f"{what}: {kind.default!r} is no list")
            floats = kind.type == "fp32[]" and all(isinstance(element, int | float) for element in given)
            return tuple(map(float, given)) if floats else tuple(given)
        if kind.type == "string" and isinstance(kind.default, str):
            text = kind.default[1:] if kind.default.startswith("=") else repr(kind.default)
            return parser.parse(text, what, wanted="str")
        return parser.parse(kind.default, what, wanted=TYPES_OF_ATTRIBUTES[kind.type])

    def _definitions(self) -> tuple[list[tuple[str, Expression]], list[tuple[str, str]]]:
        """Those by attributes alone, parsed; and the rest, whose names are not known yet."""
        early: list[tuple[str, Expression]] = []
        late: list[tuple[str, str]] = []
        defined = {name for name, _ in self.operator.define}
        for name, text in self.operator.define:
            tree = parsed(text, self._said(f"definition {name}"))
            if self._reads_late(tree, defined):
                late.append((name, text))
                continue
            ahead = names_of(tree) & (defined - {known for known, _ in early} - set(self.early_types))
            if ahead and not ahead <= {other for other, _ in late}:
                raise SpecError(self._said(reads_ahead(name, sorted(ahead))))
            if ahead:
                late.append((name, text))
                continue
            expression = self._parser(self.early_types).parse(text, self._said(f"definition {name}"))
            early.append((name, expression))
            self.early_types[name] = expression.type
        return early, late

    def _reads_late(self, tree: ast.expr, known: Iterable[str] = ()) -> bool:
        """Whether it reads more than attributes tell, and than some other names."""
        calls = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
        return bool(names_of(tree) - set(self.early_types) - set(known) or calls & set(LATE))

    def _late_definitions(self, remaining: Sequence[tuple[str, str]]) -> list[tuple[str, Expression]]:
        found: list[tuple[str, Expression]] = []
        waiting = [name for name, _ in remaining]
        for name, text in remaining:
            ahead = [other for other in waiting[len(found) :] if other in names_of(parsed(text, name))]
            if ahead:
                raise SpecError(self._said(reads_ahead(name, ahead)))
            expression = self._parser(self._late_types).parse(text, self._said(f"definition {name}"))
            found.append((name, expression))
            self._late_types[name] = expression.type
        return found

    # ------------------------------------------------------------------ tensors

    def _tensor(self, tensor: Tensor, kind: str) -> TensorProgram:
        what = self._said(f"{kind} {tensor.name}")
        if not tensor.name.isidentifier() or not tensor.forms:
            raise SpecError(f"{what}: a tensor has a name and at least one form")
        forms = tuple(self._form(text, what, kind) for text in tensor.forms)
        return TensorProgram(tensor.name, forms, self._when(tensor.when, self._early, f"{what}, when"))

    def _when(self, text: str, parser: Parser, what: str) -> Expression | None:
        return condition(text, parser, what) if text else None

    def _form(self, text: str, what: str, kind: str) -> Form:
        found = _FORM.match(text.strip())
        if found is None:
            raise SpecError(f'{what}: {text!r} is no form; write "T[rows, cols]"')
        dtype, inside, condition = found.groups()
        if dtype not in self.types and dtype not in DATA_TYPES and (dtype != SHAPE or kind != "input"):
            there = ", ".join((*self.types, *DATA_TYPES))
            raise SpecError(f"{what}: {dtype!r} is no type; there are {there}")
        trees = axes_of(inside, what)
        if len(trees) > MOST_DIMENSIONS:
            raise SpecError(f"{what}: {len(trees)} axes; TensorRT has at most {MOST_DIMENSIONS}")
        axes = tuple(self._axis(tree, what, kind) for tree in trees)
        if dtype == SHAPE and not (len(axes) == 1 and axes[0].fixed and axes[0].expression.type == "int"):
            raise SpecError(f"{what}: shape[...] holds one number, how many values there are")
        return Form(dtype, axes, self._when(condition or "", self._early, what))

    def _axis(self, tree: ast.expr, what: str, kind: str) -> Axis:
        text = ast.unparse(tree)
        late = {} if kind == "input" else self._late_types
        known = {**self.early_types, **late}
        free = {name: "int" for name in names_of(tree) - set(known)}
        defined = sorted(set(free) & {name for name, _ in self.operator.define})
        if defined:
            raise SpecError(f"{what}: axis {text} reads the definition {', '.join(defined)}, which reads sizes itself")
        parser = self._parser({**known, **free} if kind == "input" else known)
        expression = parser.parse_tree(tree, f"{what}: axis {text}")
        if expression.type != "int":
            raise SpecError(f"{what}: axis {text} is of type {expression.type}; sizes are integers")
        own = expression.node.value if expression.node.kind == "name" and expression.node.value in free else None
        if kind == "output" and expression.node.kind == "name" and expression.node.value in self.axes:
            own = expression.node.value
        told = {(question, (name,)) for question in ("len", "given") for name in self.early_types}
        fixed = expression.names() <= set(self.early_types) and expression.questions() <= told
        return Axis(self._labels.get(text, text), expression, own, fixed)

    def _axes(self) -> tuple[str, ...]:
        """The names that inputs give, in order; each must be found from them."""
        found: dict[str, None] = {}
        for axis in (axis for tensor in self.inputs for form in tensor.forms for axis in form.axes):
            found |= dict.fromkeys(sorted(axis.expression.names() - set(self.early_types)))
        return tuple(found)

    # ------------------------------------------------------------------ the rest

    def _checks(
        self, early: Parser, late: Parser
    ) -> tuple[list[tuple[Expression, Text]], list[tuple[Expression, Text]]]:
        found: tuple[list[tuple[Expression, Text]], list[tuple[Expression, Text]]] = ([], [])
        for check in self.operator.checks:
            what = self._said(f"check {check.condition!r}")
            is_late = self._reads_late(parsed(check.condition, what))
            parser = late if is_late else early
            found[is_late].append((condition(check.condition, parser, what), parse_text(check.message, parser, what)))
        return found

    def _launch(self, index: int, launch: Launch, late: Parser) -> LaunchProgram:
        what = self._said(f"launch {launch.name or launch.kernel or launch.function or index}")
        if launch.option and launch.option not in self._option_names:
            raise SpecError(f"{what}: {launch.option!r} is no option")
        if bool(launch.function) == bool(launch.kernel):
            raise SpecError(f"{what}: give the kernel to compile, or the name of a function that is built elsewhere")
        arguments = tuple((name, self._source(name, text, what, late)) for name, text in launch.arguments)
        function = launch.function or function_text(self.operator, index)
        when = self._when(launch.when, late, f"{what}, when")
        return LaunchProgram(launch, arguments, when, self._early_part(when), parse_text(function, late, what))

    def _early_part(self, when: Expression | None) -> Expression | None:
        """Of conditions that must hold together, those that read attributes alone."""
        if when is None:
            return None
        parts = when.node.parts if when.node.kind == "and" else (when.node,)
        early = tuple(part for part in parts if self._is_early(Expression("", part)))
        return Expression(when.text, Node("and", "bool", None, early)) if early else None

    def _is_early(self, expression: Expression) -> bool:
        asked = {question for question, _ in expression.questions()}
        return expression.names() <= set(self.early_types) and not asked & set(LATE)

    def _source(self, name: str, text: str, what: str, parser: Parser) -> Source | Expression:
        what = f"{what}, argument {name}"
        tree = parsed(text, what)
        cases = cases_of(tree, parser, what, self._pointers)
        return parser.parse_tree(tree, what) if cases is None else Source(cases)

    @property
    def _pointers(self) -> frozenset[str]:
        # A tensor and the attribute that says whether it is there may have one name: an argument means the tensor.
        parts = {part.name for part in self.operator.workspace}
        return frozenset((self.tensor_names | parts | {NULL}) - self.shape_values)

    def _texts(
        self, given: Iterable[tuple[str, str]], parser: Parser, what: str
    ) -> tuple[tuple[Expression | None, Text], ...]:
        said = self._said(what)
        return tuple((self._when(when, parser, said), parse_text(text, parser, said)) for when, text in given)


@lru_cache(maxsize=256)
def program_of(operator: Operator) -> Program:
    """An operator's program, made once.

    Raises:
        SpecError: the description contradicts itself.
    """
    return Program(operator)
