"""The plugins in C: an operator's description as tables and small functions, see ``pyfmha_operator.h``."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pyfmha.aot.c_expressions import Numbers, Symbols, c_constant, c_expression, c_string, c_text
from pyfmha.aot.callables import function_view
from pyfmha.aot.emit_c import TEMPLATES, render
from pyfmha.aot.operator_limits import callables, check_count, check_limits
from pyfmha.aot.operator_types import check_held
from pyfmha.errors import SpecError
from pyfmha.operators.description import DATA_TYPES, MOST_ELEMENTS, Attribute, Operator
from pyfmha.operators.expressions import Expression, Node
from pyfmha.operators.names import SHAPE
from pyfmha.operators.program import Axis, Form, Source, TensorProgram, program_of
from pyfmha.operators.ranges import as_float32, range_text
from pyfmha.operators.text import Text
from pyfmha.operators.types import allowed_types
from pyfmha.spec.arch import ARCHS
from pyfmha.spec.manifest import INTERFACE, Function

_C_TYPES = {"int": "int64_t", "float": "double", "str": "const char *", "bool": "bool"}
_MEMBERS = {"int": "integer", "float": "floating", "str": "string", "bool": "condition"}
_KINDS = {"int32": "PYFMHA_INT32", "int64": "PYFMHA_INT64", "fp32": "PYFMHA_FP32", "string": "PYFMHA_STRING"}


class OperatorEmitter:
    """The C of one operator: ``code``, lines in order; ``enum``, the numbers of its names.

    Args:
        operator: its description.
        functions: those of the library, by name.
        number: of the operator in the library: what is made of one's names cannot be what is made of another's.
    """

    def __init__(self, operator: Operator, functions: Mapping[str, Function], number: int = 0) -> None:
        self.name = operator.name
        self.comment = f"{operator.name} {operator.version}" + (
            f" of {operator.namespace}" if operator.namespace else ""
        )
        self.prefix = re.sub(r"\W", "_", "_".join(filter(None, [f"o{number}", operator.namespace, operator.name])))
        self.code: list[str] = []
        self._program = program = program_of(operator)
        self._functions = functions
        self._made: dict[Any, str] = {}
        early = [name for name, _ in program.early]
        self._early = frozenset([*program.attributes, *program.fixed_types, *early])
        late = [name for name, _ in program.late]
        values = [*program.attributes, *program.types, *early, *program.axes, *late, *sorted(program.shape_values)]
        tensors = list(dict.fromkeys(t.name for t in (*program.inputs, *program.outputs)))
        self._numbers = Numbers(
            self.prefix,
            values,
            tensors,
            [launch.launch.name for launch in program.launches],
            [option.name for option, _ in program.options],
            list(program.attributes),
            list(program.types),
        )
        self.enum = [self._numbers.value(name) for name in values]
        definitions = {name: expression.node for name, expression in program.late}
        shapes = frozenset(program.shape_values)
        self._symbols = Symbols(self._numbers, self._early, definitions, shapes, self._node_function)
        check_limits(program, functions)
        check_held(program, functions)
        self._emit()

    # ------------------------------------------------------------------ functions

    def _function(self, kind: str, body: str, comment: str = "") -> str:
        """The name of a C function with a body: the same for the same."""
        key = kind, body
        if key not in self._made:
            name = self._made[key] = f"{self.prefix}_{len(self._made)}"
            note = f" /* {_comment(comment)} */" if comment else ""
            space = "" if kind.endswith("*") else " "
            unused = "" if _reads_scope(body) else "(void)s; "
            self.code.append(f"static {kind}{space}{name}(pyfmha_scope *s) {{ {unused}return {body}; }}{note}")
        return self._made[key]

    def _node_function(self, node: Node) -> str:
        return self._function(_C_TYPES[node.type], c_expression(node, self._numbers))

    def _of(self, expression: Expression) -> str:
        return self._function(_C_TYPES[expression.type], c_expression(expression.node, self._numbers), expression.text)

    def _or_null(self, expression: Expression | None) -> str:
        return "NULL" if expression is None else self._of(expression)

    def _any(self, expression: Expression | None) -> str:
        """A ``pyfmha_expression``."""
        if expression is None:
            return "{0}"
        return f"{{.{_MEMBERS[expression.type]} = {self._of(expression)}}}"

    def _text(self, text: Text) -> str:
        body = " ".join(c_text(text, self._numbers))
        key = "text", body
        if key not in self._made:
            name = self._made[key] = f"{self.prefix}_{len(self._made)}"
            unused = "" if _reads_scope(body) else "(void)s; "
            self.code.append(f"static void {name}(pyfmha_scope *s, pyfmha_buffer *b) {{ {unused}{body} }}")
        return self._made[key]

    def _symbol(self, axis: Axis, what: str) -> str:
        body = self._symbols.of(axis.expression.node, what)
        key = "symbol", body
        if key not in self._made:
            name = self._made[key] = f"{self.prefix}_{len(self._made)}"
            self.code.append(f"static const void *{name}(struct pyfmha_symbols *y) {{ return {body}; }}")
        return self._made[key]

    def _table(self, kind: str, rows: Iterable[str], name: str) -> tuple[int, str]:
        """A static array; its length and name, or NULL where it is empty."""
        listed = list(rows)
        if not listed:
            return 0, "NULL"
        name = f"{self.prefix}_{name}"
        self.code += [f"static const {kind} {name}[] = {{", *(f"    {row}," for row in listed), "};"]
        return len(listed), name

    # ------------------------------------------------------------------ tables

    def _emit(self) -> None:
        program, operator = self._program, self._program.operator
        tables = {
            "value_names": self._table("char *const", map(c_string, self._numbers.values), "names"),
            "axes": self._table("int", map(self._numbers.value, program.axes), "axes"),
            "tensor_names": self._table("char *const", map(c_string, self._numbers.tensors), "tensors"),
            "attributes": self._table("pyfmha_attribute", self._attributes(), "attributes"),
            "variables": self._table("pyfmha_variable", self._variables(), "variables"),
            "earlys": self._table("pyfmha_definition", self._definitions(program.early), "earlys"),
            "lates": self._table("pyfmha_definition", self._definitions(program.late), "lates"),
            "early_checks": self._table(
                "pyfmha_check", self._checks(program.early, program.early_checks), "early_checks"
            ),
            "late_checks": self._table("pyfmha_check", self._checks(program.late, program.late_checks), "late_checks"),
            "inputs": self._table("pyfmha_entry", self._tensors(program.inputs, "input"), "inputs"),
            "outputs": self._table("pyfmha_entry", self._tensors(program.outputs, "output"), "outputs"),
            "launchs": self._table("pyfmha_launch_entry", self._launches(), "launches"),
            "parts": self._table(
                "pyfmha_part",
                [f"{{{c_string(n)}, {self._of(size)}, {self._or_null(when)}}}" for n, size, when in program.workspace],
                "parts",
            ),
            "options": self._table(
                "pyfmha_option",
                [
                    f"{{{c_string(o.name)}, {c_string(f'pyfmha_{o.name}')}, {o.number}, {self._or_null(when)}}}"
                    for o, when in program.options
                ],
                "options",
            ),
            "summarys": self._table("pyfmha_piece", self._pieces(program.summary), "summaries"),
            "shape_summarys": self._table("pyfmha_piece", self._pieces(program.shape_summary), "shape_summaries"),
        }
        counted = {"value_names": "value_count", "axes": "axis_count", "tensor_names": "tensor_count"}
        lines = []
        for field, (count, name) in tables.items():
            lines += [f".{counted.get(field, field[:-1] + '_count')} = {count}", f".{field} = {name}"]
        words = {
            "name": operator.name,
            "version": operator.version,
            "space": operator.namespace,
        }
        lines = [f".{field} = {c_string(text)}" for field, text in words.items()] + lines
        lines += [
            f".alignment = {operator.alignment}",
            f".workspace_of_profile = {self._or_null(program.workspace_of_profile)}",
            f".build = {'NULL' if program.build is None else self._text(program.build)}",
            f".schema = {INTERFACE}",
        ]
        self.code += [
            f"static const pyfmha_operator {self.prefix}_operator = {{",
            *(f"    {line}," for line in lines),
            "};",
        ]

    def _pieces(self, pieces: Iterable[tuple[Expression | None, Text]]) -> list[str]:
        return [f"{{{self._or_null(when)}, {self._text(text)}}}" for when, text in pieces]

    def _definitions(self, definitions: Iterable[tuple[str, Expression]]) -> list[str]:
        return [f"{{{self._numbers.value(name)}, {self._any(expression)}}}" for name, expression in definitions]

    def _checks(
        self, definitions: Sequence[tuple[str, Expression]], checks: Iterable[tuple[Expression, Text]]
    ) -> list[str]:
        defined = {name for name, _ in definitions}
        return [
            f"{{{self._of(condition)}, {self._text(message)},"
            f" {_bool(not (condition.names() | message.names()) & defined)}}}"
            for condition, message in checks
        ]

    def _attributes(self) -> list[str]:
        rows = []
        for name, kind in self._program.operator.attributes:
            default = self._program.attributes[name]
            fields = {
                "name": c_string(name),
                "kind": _KINDS[kind.type.removesuffix("[]")],
                "is_list": _bool(kind.type.endswith("[]")),
                "value": self._numbers.value(name),
                "required": _bool(default is None),
                "late": _bool(isinstance(default, Expression) and not default.is_constant()),
                "stored": self._or_null(self._program.stored[name]),
                "stores": self._any(self._program.stores[name]),
                **self._range(name, kind),
            }
            if isinstance(default, Expression):
                fields["default_"] = self._any(default)
            elif isinstance(default, tuple):
                fields["default_list"] = self._list(name, kind, default)
            rows.append(f"{{{', '.join(f'.{field} = {value}' for field, value in fields.items())}}}")
        return rows

    def _list(self, name: str, kind: Attribute, elements: tuple[int | float, ...]) -> str:
        if len(elements) > MOST_ELEMENTS:
            raise SpecError(f"{self.name}: attribute {name} has {len(elements)} elements; at most {MOST_ELEMENTS}")
        is_float = kind.type == "fp32[]"
        inside = ", ".join(c_constant(as_float32(e) if is_float else int(e)) for e in elements) or "0"
        table = f"{self.prefix}_{name}_default"
        member = "f" if is_float else "i"
        self.code.append(
            f"static const pyfmha_list {table} = {{{len(elements)}, {_bool(is_float)}, {{.{member} = {{{inside}}}}}}};"
        )
        return f"&{table}"

    def _range(self, name: str, kind: Attribute) -> dict[str, str]:
        found: dict[str, str] = {}
        is_float = kind.type.removesuffix("[]") == "fp32"
        if kind.minimum is not None:
            found |= {"has_minimum": "true", "minimum": _bound(kind.minimum, is_float, math.ceil)}
        if kind.maximum is not None:
            found |= {"has_maximum": "true", "maximum": _bound(kind.maximum, is_float, math.floor)}
        found["range"] = c_string(range_text(kind)) if found else '""'
        if kind.choices:
            base = kind.type.removesuffix("[]")
            member = {"string": "s", "fp32": "f"}.get(base, "i")
            values = [
                c_string(str(c)) if member == "s" else c_constant(as_float32(c) if member == "f" else int(c))
                for c in kind.choices
            ]
            count, table = self._table(
                "pyfmha_value", [f"{{.{member} = {value}}}" for value in values], f"{name}_choices"
            )
            found |= {"choice_count": str(count), "choices": table}
            found["choices_text"] = c_string(", ".join(map(str, kind.choices)))
        return found

    def _variables(self) -> list[str]:
        rows = []
        for name, kinds in self._program.operator.types:
            _, table = self._table("int", (str(DATA_TYPES[kind]) for kind in kinds.names), f"{name}_types")
            attribute = self._numbers.attributes.index(kinds.attribute) if kinds.attribute else -1
            allowed = allowed_types(kinds)
            rows.append(
                f"{{{c_string(name)}, {self._numbers.value(name)}, {attribute}, {len(kinds.names)}, {table},"
                f" {c_string(allowed)}}}"
            )
        return rows

    def _tensors(self, tensors: Sequence[TensorProgram], kind: str) -> list[str]:
        rows = []
        for index, tensor in enumerate(tensors):
            forms = [self._form(tensor, form, f"{kind}_{index}_{number}") for number, form in enumerate(tensor.forms)]
            count, table = self._table("pyfmha_form", forms, f"{kind}_{index}_forms")
            number = self._numbers.tensors.index(tensor.name)
            rows.append(f"{{{c_string(tensor.name)}, {number}, {count}, {table}, {self._or_null(tensor.when)}}}")
        return rows

    def _form(self, tensor: TensorProgram, form: Form, name: str) -> str:
        what = f"{self.name}: {tensor.name}"
        count, table = self._table("pyfmha_axis", [self._axis(axis, form, what) for axis in form.axes], f"{name}_axes")
        variable = self._numbers.types.index(form.type) if form.type in self._numbers.types else -1
        number = "PYFMHA_SHAPE" if form.type == SHAPE else str(DATA_TYPES.get(form.type, -1))
        return f"{{{number}, {variable}, {count}, {table}, {self._or_null(form.condition)}}}"

    def _axis(self, axis: Axis, form: Form, what: str) -> str:
        program, node = self._program, axis.expression.node
        unknown = [] if axis.fixed else [name for name in program.axes if name in axis.expression.names()]
        late_names = {name for name, _ in program.late} | program.shape_values
        late = bool(axis.expression.names() & late_names) or bool(axis.expression.questions() and not axis.fixed)
        shape = node.kind == "item" and node.value in program.shape_values and node.parts[0].kind == "constant"
        symbolic = "NULL" if axis.fixed else self._symbol(axis, f"{what}: axis {axis.expression.text}")
        name = "-1" if axis.name is None else self._numbers.value(axis.name)
        listed = f"(const int[]){{{', '.join(map(self._numbers.value, unknown))}}}" if unknown else "NULL"
        at = f"{self._numbers.tensors.index(node.value)}, {node.parts[0].value}" if shape else "-1, 0"
        return (
            f"{{{c_string(axis.label)}, {name}, {_bool(axis.fixed)}, {self._of(axis.expression)}, {symbolic},"
            f" {len(unknown)}, {listed}, {_bool(late)}, {at}}}"
        )

    def _launches(self) -> list[str]:
        rows = []
        for index, launch in enumerate(self._program.launches):
            sources = [self._source(name, source) for name, source in launch.arguments]
            count, table = self._table("pyfmha_source", sources, f"launch_{index}_sources")
            taking = [f"&{name}_callable" for name in callables(launch, self._functions)]
            number, functions = self._table("pyfmha_callable *const", taking, f"launch_{index}_functions")
            option = self._numbers.options.index(launch.launch.option) if launch.launch.option else -1
            rows.append(
                f"{{{self._or_null(launch.when)}, {self._or_null(launch.early_when)}, {self._text(launch.function)},"
                f" {option}, {count}, {table}, {number}, {functions}}}"
            )
        return rows

    def _source(self, name: str, source: Source | Expression) -> str:
        if isinstance(source, Expression):
            return f"{{{c_string(name)}, 0, NULL, {self._any(source)}}}"
        rows = []
        parts = [part for part, _, _ in self._program.workspace]
        for condition, pointer, offset in source.cases:
            tensor = self._numbers.tensors.index(pointer) if pointer in self._numbers.tensors else -1
            part = parts.index(pointer) if pointer in parts else -1
            rows.append(f"{{{self._or_null(condition)}, {tensor}, {part}, {self._or_null(offset)}}}")
        count, table = self._table("pyfmha_case", rows, f"source_{len(self._made)}_{len(self.code)}")
        return f"{{{c_string(name)}, {count}, {table}, {{0}}}}"


PLUGIN_FILES = ("pyfmha_operator.h", "pyfmha_operator.c", "pyfmha_tensorrt.h", "pyfmha_plugin.c")


def emit_operators(operators: Sequence[Operator], held: Sequence[Function], library: str) -> dict[str, str]:
    """The C source of a library's plugins, and what is the same in every library.

    Args:
        operators: their descriptions.
        held: the functions that the library holds.
        library: its file name, for messages.

    Returns:
        File name to content.

    Raises:
        SpecError: an operator cannot be expressed.
    """
    check_count(operators)
    functions = {function.name: function for function in held}
    views = [function_view(function) for function in used_functions(operators, functions)]
    emitters = [OperatorEmitter(operator, functions, number) for number, operator in enumerate(operators)]
    source = render(
        "operators.c.j2",
        summary=f"{library}: {', '.join(operator.name for operator in operators)}.",
        operators=emitters,
        functions=views,
        archs=list(ARCHS.values()),
        arch_names=", ".join(ARCHS),
        held=", ".join(functions),
    )
    return {"pyfmha_operators.c": source} | {name: (TEMPLATES / name).read_text() for name in PLUGIN_FILES}


def used_functions(operators: Sequence[Operator], functions: Mapping[str, Function]) -> list[Function]:
    """The functions that some launch of the operators could call."""
    programs = [program_of(operator) for operator in operators]
    return [
        function
        for function in functions.values()
        if any(launch.fits(function.arguments) for program in programs for launch in program.launches)
    ]


def _bound(value: float, is_float: bool, rounded: Callable[[float], int]) -> str:
    """A limit as a ``pyfmha_value``: of an integer, the last integer that it allows."""
    if is_float:
        return f"{{.f = {c_constant(as_float32(value))}}}"
    if math.isinf(value):
        return f"{{.i = INT64_M{'AX' if value > 0 else 'IN'}}}"
    return f"{{.i = {c_constant(max(-(1 << 63), min(rounded(value), (1 << 63) - 1)))}}}"


def _reads_scope(body: str) -> bool:
    """Whether C reads ``s``, outside of its strings."""
    return re.search(r"\bs\b", re.sub(r'"(?:[^"\\]|\\.)*"', "", body)) is not None


def _bool(value: object) -> str:
    return "true" if value else "false"


def _comment(text: str) -> str:
    return text.replace("*/", "* /").replace("/*", "/ *").encode("ascii", "replace").decode()
