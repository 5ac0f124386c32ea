"""What a description says against itself: each is refused while the description is read, by the part's name.

What can be told only for some attributes is left to the plugin, which refuses it when it is created or given shapes.
"""

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any

from pyfmha.errors import PluginError, SpecError
from pyfmha.operators.arithmetic import LIMIT, EvaluationError
from pyfmha.operators.description import MOST_ELEMENTS, Attribute
from pyfmha.operators.expressions import Expression, Node, Scope
from pyfmha.operators.names import RESERVED, twice
from pyfmha.operators.ranges import as_float32, check_range
from pyfmha.operators.reading import LATE, TYPES_OF_ATTRIBUTES
from pyfmha.operators.text import Hole, Text

if TYPE_CHECKING:
    from pyfmha.operators.program import Program

_INT32 = 1 << 31


def check_program(program: "Program") -> None:
    """Refuse what the parts of a description say against each other.

    Raises:
        SpecError: the first.
    """
    _check_attributes(program)
    _check_early(program)
    _check_axes(program)
    _check_types(program)
    _check_outputs(program)
    _check_shape_values(program)
    _check_launches(program)
    _check_serves(program)
    _check_numbers(program)


# ---------------------------------------------------------------------- attributes


def _check_attributes(program: "Program") -> None:
    """Defaults: constants that are allowed, or of attributes that are settled before."""
    kinds = dict(program.operator.attributes)
    waiting = {
        name
        for name, default in program.attributes.items()
        if isinstance(default, Expression) and not default.is_constant()
    }
    for name, default in program.attributes.items():
        what = f"{program.operator.name}: attribute {name}"
        kind = kinds[name]
        if TYPES_OF_ATTRIBUTES[kind.type.removesuffix("[]")] == "str" and (kind.minimum, kind.maximum) != (None, None):
            raise SpecError(f"{what}: a string has no minimum and no maximum; give choices")
        _check_allowed(what, kind)
        if isinstance(default, Expression) and not default.is_constant():
            later = sorted(default.names() & waiting)
            if later:
                raise SpecError(f"{what}: its default reads {', '.join(later)}, settled after it: a cycle, or an order")
            if default.names() - set(kinds) or {question for question, _ in default.questions()} - {"given", "len"}:
                raise SpecError(f"{what}: a default may read attributes alone")
            waiting.discard(name)
        elif default is not None:
            value = _constant(f"{what}: its default", default) if isinstance(default, Expression) else default
            _check_constant(f"{what}: its default", kind.type, value)
            try:
                check_range(name, kind, as_float32(value) if kind.type.startswith("fp32") else value)
            except (PluginError, TypeError) as error:
                raise SpecError(f"{what}: its own default is not allowed: {error}") from None


def _check_allowed(what: str, kind: Attribute) -> None:
    for choice in kind.choices:
        _check_constant(f"{what}: its choice", kind.type.removesuffix("[]"), choice)
    bounds = {"minimum": kind.minimum, "maximum": kind.maximum}
    for word, bound in bounds.items():
        if bound is not None and (bound != bound or (kind.type[:3] == "int" and not -LIMIT <= bound < LIMIT)):
            raise SpecError(f"{what}: its {word} {bound!r} is no {kind.type.removesuffix('[]')}")
    if kind.minimum is not None and kind.maximum is not None and kind.minimum > kind.maximum:
        raise SpecError(f"{what}: its minimum {kind.minimum} is above its maximum {kind.maximum}")


def _constant(what: str, expression: Expression) -> Any:
    try:
        return expression.evaluate(Scope({}))
    except EvaluationError as error:
        raise SpecError(f"{what} {expression.text} has no value: {error}") from None


def _check_constant(what: str, kind: str, value: Any) -> None:
    for element in value if isinstance(value, tuple) else (value,):
        base = kind.removesuffix("[]")
        number = isinstance(element, int | float) and not isinstance(element, bool)
        fits = isinstance(element, str) if base == "string" else number
        if base in ("int32", "int64"):
            limit = _INT32 if base == "int32" else _INT32 << 32
            fits = isinstance(element, int) and number and -limit <= element < limit
        if not fits:
            raise SpecError(f"{what} {element!r} is no {base}")


# ---------------------------------------------------------------------- what attributes alone must tell


def _late_of(expression: Expression, early: Mapping[str, str]) -> str:
    """What an expression reads that attributes do not tell; empty where there is nothing."""
    asked = sorted({question for question, _ in expression.questions()} & set(LATE))
    return ", ".join([*sorted(expression.names() - set(early)), *(f"{question}()" for question in asked)])


def _check_early(program: "Program") -> None:
    for what, expression in _early_expressions(program):
        late = _late_of(expression, program.early_types)
        if late:
            raise SpecError(
                f"{program.operator.name}: {what}: {expression.text!r} reads {late}; attributes alone must tell it"
            )


def _early_expressions(program: "Program") -> Iterator[tuple[str, Expression]]:
    for name in program.attributes:
        yield from (
            (f"attribute {name}", one) for one in (program.stored[name], program.stores[name]) if one is not None
        )
    for tensor in (*program.inputs, *program.outputs):
        for when in (tensor.when, *(form.condition for form in tensor.forms)):
            if when is not None:
                yield f"condition of {tensor.name}", when
    for option, when in program.options:
        if when is not None:
            yield f"option {option.name}", when
        for launch in program.launches:
            if launch.launch.option == option.name:
                yield from ((f"function of option {option.name}", hole) for hole in _holes(launch.function))
    for when, text in program.summary:
        yield from (("summary", found) for found in (*([] if when is None else [when]), *_holes(text)))
    # Types may be open where a name is made, then it is made for each.
    known = {*program.early_types, *program.types}
    named = [(f"launch {launch.said}", launch.function) for launch in program.launches]
    for what, text in [*named, *([] if program.build is None else [("build", program.build)])]:
        for hole in _holes(text):
            asked = {question for question, _ in hole.questions()}
            if hole.names() - known or asked & (set(LATE) - {"itemsize"}):
                yield f"a name in {what}", hole


def _holes(text: Text) -> list[Expression]:
    return [part.expression for part in text.parts if isinstance(part, Hole)]


# ---------------------------------------------------------------------- axes


def _check_axes(program: "Program") -> None:
    """Every axis of an input is given by itself, or is the only one unknown in a sum or product.

    In the order in which a plugin solves them: what stands alone first, then one pass over the rest.
    """
    operator = program.operator
    taken = {*program.types, *program.tensor_names, *(part.name for part in operator.workspace)}
    for name in program.axes:
        if name in taken or name in RESERVED:
            raise SpecError(f"{operator.name}: axis {name} has the name of a tensor, a type or a part of the workspace")
    axes = [(tensor.name, axis) for tensor in program.inputs for form in tensor.forms for axis in form.axes]
    given = {axis.name for _, axis in axes if axis.name is not None}
    early = set(program.early_types)
    for where, axis in axes:
        if axis.expression.questions() and not axis.fixed:
            raise SpecError(f"{operator.name}: input {where}: axis {axis.expression.text} asks; it may compute alone")
        unknown = axis.expression.names() - early - given
        if len(unknown) == 1 and is_linear(axis.expression.node, *unknown):
            given |= unknown
    for where, axis in axes:
        missing = sorted(axis.expression.names() - early - given)
        if missing:
            raise SpecError(
                f"{operator.name}: input {where}: axis {axis.expression.text}: nothing gives {', '.join(missing)}; an"
                " axis must stand alone in some input, or be the only unknown one of a sum or product"
            )


def is_linear(node: Any, name: str) -> bool:
    """Whether an expression is a * name + b, with a and b that do not read the name."""
    if not _reads(node, name):
        return True
    if node.kind == "name":
        return True
    if node.kind != "binary" or node.value not in ("add", "sub", "mul"):
        return False
    if node.value == "mul" and all(_reads(part, name) for part in node.parts):
        return False
    return all(is_linear(part, name) for part in node.parts)


def _reads(node: Any, name: str) -> bool:
    if not isinstance(node, Node):
        return False
    return (node.kind in ("name", "item") and node.value == name) or any(_reads(part, name) for part in node.parts)


def _check_types(program: "Program") -> None:
    """A type is held by an attribute, or an input has it."""
    has = {form.type for tensor in program.inputs for form in tensor.forms}
    for name, types in program.types.items():
        if not types.attribute and name not in has:
            raise SpecError(
                f"{program.operator.name}: nothing gives the type {name}: give it to an input, or an attribute that"
                " holds it"
            )


# ---------------------------------------------------------------------- outputs


def _check_outputs(program: "Program") -> None:
    for tensor in (*program.inputs, *program.outputs):
        what = f"{program.operator.name}: {tensor.name}"
        kinds = {form.type == "shape" for form in tensor.forms}
        if len(kinds) > 1:
            raise SpecError(f"{what}: one form holds values to read and another memory; give two inputs")
        always = [len(form.axes) for form in tensor.forms if form.condition is None]
        if len(set(always)) < len(always) or (tensor in program.outputs and len(always) > 1):
            raise SpecError(f"{what}: nothing tells two of its forms apart; give them conditions")
    definitions = {name: expression.node for name, expression in program.late}
    for tensor in program.outputs:
        for form in tensor.forms:
            for axis in form.axes:
                if not _computable(axis.expression.node, definitions, program):
                    raise SpecError(
                        f"{program.operator.name}: output {tensor.name}: axis {axis.expression.text}: TensorRT cannot"
                        " compute it; use axes, shape values, attributes, + - * / // %, cdiv, min, max and conditions"
                        " on attributes"
                    )


def _computable(node: Any, definitions: Mapping[str, Node], program: "Program") -> bool:
    """Whether TensorRT's ``IExprBuilder`` has it, see :class:`pyfmha.trt.shapes.Symbols`."""
    if not _late_of(Expression("", node), program.early_types):
        return True
    if node.kind == "name":
        if node.value in definitions:
            return _computable(definitions[node.value], definitions, program)
        return node.value in program.axes
    if node.kind == "item":
        return node.value in program.shape_values and node.parts[0].kind == "constant"
    if node.kind == "if":
        early = not _late_of(Expression("", node.parts[0]), program.early_types)
        return early and all(_computable(part, definitions, program) for part in node.parts[1:])
    return node.kind == "binary" and all(_computable(part, definitions, program) for part in node.parts)


def _check_shape_values(program: "Program") -> None:
    """Values that are read while a network is built are known later only where an output's axis is one."""
    shown = {
        (axis.expression.node.value, axis.expression.node.parts[0].value)
        for tensor in program.outputs
        if tensor.when is None
        for axis in chain.from_iterable(form.axes for form in tensor.forms)
        if _is_value(axis.expression.node) and all(_shows(form, axis.expression.node) for form in tensor.forms)
    }
    counts = {tensor.name: tensor.forms[0].axes[0] for tensor in program.inputs if tensor.name in program.shape_values}
    for name, count in counts.items():
        if count.expression.is_constant():
            size = _constant(f"{program.operator.name}: {name}: its number of values", count.expression)
            if not 1 <= size <= MOST_ELEMENTS:
                raise SpecError(f"{program.operator.name}: {name} has {size} values; 1 to {MOST_ELEMENTS} can be read")
    for what, expression in _late_expressions(program):
        for node in _items(expression.node):
            if node.value not in program.shape_values:
                continue
            said = f"{program.operator.name}: {what}: {expression.text!r} reads {node.value}"
            if not _is_value(node):
                raise SpecError(f"{said} at an index that is no number")
            index = node.parts[0].value
            count = counts[node.value]
            if count.expression.is_constant() and not 0 <= index < count.expression.evaluate(Scope({})):
                raise SpecError(f"{said}[{index}], which has {count.expression.text} values")
            if (node.value, index) not in shown:
                raise SpecError(
                    f"{said}[{index}]; it is known only where an axis of an output that is always there is"
                    f" {node.value}[{index}]"
                )


def _is_value(node: Node) -> bool:
    return node.kind == "item" and node.parts[0].kind == "constant"


def _shows(form: Any, node: Node) -> bool:
    return any(axis.expression.node == node for axis in form.axes)


def _items(node: Any) -> list[Node]:
    if not isinstance(node, Node):
        return []
    own = [node] if node.kind == "item" else []
    return own + [found for part in node.parts for found in _items(part)]


def _late_expressions(program: "Program") -> Iterator[tuple[str, Expression]]:
    yield from ((f"definition {name}", expression) for name, expression in program.late)
    for tensor in program.outputs:
        yield from ((f"output {tensor.name}", axis.expression) for form in tensor.forms for axis in form.axes)
    for condition, message in program.late_checks:
        yield from ((f"check {condition.text!r}", found) for found in (condition, *_holes(message)))
    for name, size, when in program.workspace:
        yield from ((f"workspace {name}", found) for found in (size, when) if found is not None)
    if program.workspace_of_profile is not None:
        yield "workspace_of_profile", program.workspace_of_profile
    for when, text in program.shape_summary:
        yield from (("shape_summary", found) for found in (when, *_holes(text)) if found is not None)
    for launch in program.launches:
        what = f"launch {launch.said}"
        yield from ((what, found) for found in (launch.when, *launch.asked()) if found is not None)


# ---------------------------------------------------------------------- launches


def _check_launches(program: "Program") -> None:
    for launch in program.launches:
        what = f"{program.operator.name}: launch {launch.said}"
        names = [name for name, _ in launch.arguments]
        repeated = sorted(twice(names))
        if repeated:
            raise SpecError(f"{what}: argument {', '.join(repeated)} is given more than once")
        for kind, given in (("hints", launch.launch.hints), ("scalars", [name for name, _ in launch.launch.scalars])):
            unknown = [name for name in given if name not in names]
            if unknown:
                raise SpecError(f"{what}: {kind} name {', '.join(unknown)}, no argument; there are {', '.join(names)}")
        for name, source in launch.arguments:
            if isinstance(source, Expression) and source.type not in ("int", "float", "bool"):
                raise SpecError(
                    f"{what}, argument {name}: {source.text!r} is of type {source.type}; a kernel takes numbers"
                )
    used = {launch.launch.option for launch in program.launches}
    for option, _ in program.options:
        if option.name not in used:
            raise SpecError(f"{program.operator.name}: option {option.name} has no launch")


def _check_serves(program: "Program") -> None:
    """Whether a launch serves is asked with its arguments, which must be known by then."""
    known: set[str] = {*program.early_types, *program.types, *program.axes, *program.shape_values}
    for name, expression in program.late:
        for question, words in expression.questions():
            if question != "serves":
                continue
            launch = next(launch for launch in program.launches if launch.launch.name == words[0])
            read = {found for one in launch.asked() for found in one.names()}
            if read - known:
                raise SpecError(
                    f"{program.operator.name}: definition {name} asks what serves {words[0]}, whose arguments read"
                    f" {', '.join(sorted(read - known))}, defined here or after it: a cycle, or an order to change"
                )
        known.add(name)


# ---------------------------------------------------------------------- what has no sense for any attributes


def _check_numbers(program: "Program") -> None:
    """Constants that have no value or are less than nothing, and axes that a tensor never has."""
    name = program.operator.name
    for said, expression in (*program.early, *program.late):
        if expression.is_constant():
            _constant(f"{name}: definition {said}:", expression)
    sizes = [(f"workspace {part}", size) for part, size, _ in program.workspace]
    for tensor in (*program.inputs, *program.outputs):
        sizes += [(tensor.name, axis.expression) for form in tensor.forms for axis in form.axes]
    for said, size in sizes:
        if size.is_constant() and _constant(f"{name}: {said}:", size) < 0:
            raise SpecError(f"{name}: {said}: {size.text} is less than 0; a size that varies has a name")
    ranks: dict[str, int] = {}
    for tensor in (*program.inputs, *program.outputs):
        ranks[tensor.name] = max(ranks.get(tensor.name, 0), *(len(form.axes) for form in tensor.forms))
    for said, expression in _late_expressions(program):
        for question, words in expression.questions():
            if question in ("size", "stride") and words[1] >= ranks[words[0]]:
                raise SpecError(f"{name}: {said}: {question}({words[0]}, {words[1]}): it has {ranks[words[0]]} axes")
