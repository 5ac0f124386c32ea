"""One plugin of an operator: its attributes with their values, and from the shapes of its tensors the launches.

The plugin in C does the same from the same description (``pyfmha_plugin.c``), and :mod:`pyfmha.operators.planner` does
the launches: what changes here, changes there.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pyfmha.errors import PluginError
from pyfmha.operators.absent import absent_types
from pyfmha.operators.arithmetic import EvaluationError
from pyfmha.operators.attributes import settle
from pyfmha.operators.description import DATA_TYPES, MOST_ELEMENTS, Option
from pyfmha.operators.expressions import Expression, Scope
from pyfmha.operators.forms import (
    AxisForm,
    Forms,
    Shape,
    TensorForm,
    listed,
    measure,
    mismatch,
    no_value,
    shape_values,
)
from pyfmha.operators.names import SHAPE
from pyfmha.operators.plan import Plan, Step, arguments_of, typical, workspace_of
from pyfmha.operators.planner import Device, Planner, Serves, planner, unknown
from pyfmha.operators.program import Form, Program, TensorProgram
from pyfmha.operators.scopes import AttributeScope, ShapeScope, define, holds
from pyfmha.operators.text import Text
from pyfmha.operators.types import fixed_types, type_error

NOTHING: Mapping[str, int] = {}


class Instance:
    """One plugin of an operator.

    Attributes:
        program: of the operator.
        values: its attributes and what is defined by them.
        given: the attributes that were given.
        options: which groups of functions there are.
        types: what the names of types stand for, as far as it is known.
        settled_types: those that attributes tell, and those that no tensor has.

    Args:
        program: of the operator.
        given: the attributes by name.
        options: as the attribute.
        types: those that do not follow from attributes, where they are known.

    Raises:
        PluginError: on creation: an attribute is missing or not allowed.
    """

    def __init__(
        self,
        program: Program,
        given: Mapping[str, Any],
        options: Mapping[str, bool] | None = None,
        types: Mapping[str, str] | None = None,
    ) -> None:
        self.program = program
        self.given = frozenset(given)
        self.options = dict(options or {})
        try:
            self.attributes = settle(program, given)
        except EvaluationError as error:
            raise PluginError(str(error)) from None
        self.types = dict(types or {}) | fixed_types(program, self.attributes)
        self.scope = AttributeScope(self.attributes, self.given, self.options, self.types)
        try:
            define(program.early, program.early_checks, self.scope)
            absent = absent_types(program, self.scope)
        except EvaluationError as error:
            raise PluginError(str(error)) from None
        self.types |= absent  # the scope's, too
        self.scope.values |= absent
        self.settled_types = {name: self.types[name] for name in (*program.fixed_types, *absent)}
        self._forms: dict[tuple[int, ...], Forms] = {}
        self._main_functions: tuple[str, ...] | None = None
        self._planners: dict[tuple[tuple[int, ...], bool], Planner | None] = {}
        try:
            self.active = tuple(launch for launch in program.launches if holds(launch.early_when, self.scope))
            _ = str(self), self._rendered()
        except EvaluationError as error:
            raise PluginError(str(error)) from None
        if not self.active:
            raise PluginError("no launch is for these attributes")

    def with_options(self, options: Mapping[str, bool]) -> "Instance":
        """The same where other groups of functions are there."""
        return Instance(self.program, {name: self.attributes[name] for name in self.given}, options, self.types)

    def with_types(self, types: Mapping[str, str]) -> "Instance":
        """The same with types that are known now."""
        if all(self.types.get(name) == kind for name, kind in types.items()):
            return self
        given = {name: self.attributes[name] for name in self.given}
        return Instance(self.program, given, self.options, {**self.types, **types})

    # ------------------------------------------------------------------ what it is

    def stored_attributes(self) -> dict[str, Any]:
        """The attributes that an engine stores."""
        found = {}
        for name, value in self.attributes.items():
            stores = self.program.stores[name]
            if holds(self.program.stored[name], self.scope):
                found[name] = value if stores is None else stores.evaluate(self.scope)
        return found

    def __str__(self) -> str:
        return _joined(self.program.summary, self.scope)

    def options_wanted(self) -> Iterator[tuple[Option, tuple[str, ...]]]:
        """The groups of functions that are of use for these attributes, with their functions."""
        for option, when in self.program.options:
            if holds(when, self.scope):
                launches = [launch for launch in self.program.launches if launch.launch.option == option.name]
                yield option, tuple(launch.function.render(self.scope) for launch in launches)

    def _rendered(self) -> list[str]:
        """Names of functions, for some types: so that none is asked for later that has no value."""
        scope = next(self._typed_scopes())
        return [launch.function.render(scope) for launch in self.active]

    def main_functions(self) -> tuple[str, ...]:
        """The functions whose algorithms are tactics, one for each choice of types that is not made yet."""
        if self._main_functions is None:
            names = (self.active[0].function.render(scope) for scope in self._typed_scopes())
            self._main_functions = tuple(dict.fromkeys(names))
        return self._main_functions

    def needed_functions(self) -> tuple[str, ...]:
        """Every function that it may launch, those of options left out."""
        found: dict[str, None] = {}
        for scope in self._typed_scopes():
            found |= {one.function.render(scope): None for one in self.active if not one.launch.option}
        return tuple(found)

    def launched_functions(self) -> tuple[str, ...]:
        """Every function that it may launch with the types that are known; of options, those that there are."""
        if set(self.types) != set(self.program.types):
            return ()
        launches = [one for one in self.active if not one.launch.option or self.options.get(one.launch.option)]
        return tuple(dict.fromkeys(launch.function.render(self.scope) for launch in launches))

    def _typed_scopes(self) -> Iterator[AttributeScope]:
        """A scope for each choice of the types that are not known."""
        choices: list[dict[str, str]] = [{}]
        for name, kinds in self.program.types.items():
            names = (self.types[name],) if name in self.types else kinds.names
            choices = [{**choice, name: kind} for choice in choices for kind in names]
        for types in choices:
            yield AttributeScope(self.scope.values, self.given, self.options, types)

    def build_options(self) -> str:
        """What ``pyfmha build`` is told to add the functions that it lacks."""
        scope = next(iter(self._typed_scopes()))
        return "" if self.program.build is None else self.program.build.render(scope)

    # ------------------------------------------------------------------ its tensors

    def forms(self, ranks: Sequence[int] = ()) -> Forms:
        """The tensors.

        Args:
            ranks: numbers of dimensions of the inputs, which tell alternative forms apart; by default the last that is
                allowed.

        Raises:
            PluginError: a size that attributes tell has no value for them.
        """
        key = tuple(ranks)
        if key not in self._forms:
            try:
                self._forms[key] = self._make_forms(key)
            except EvaluationError as error:
                raise PluginError(str(error)) from None
        return self._forms[key]

    def _make_forms(self, ranks: tuple[int, ...]) -> Forms:
        inputs: list[TensorForm] = []
        shapes: list[tuple[str, int]] = []
        for tensor in self._present(self.program.inputs):
            rank = ranks[len(inputs)] if len(inputs) < len(ranks) else -1
            form = self._form_of(tensor, rank)
            if form.type == SHAPE:
                count = int(form.axes[0].expression.evaluate(self.scope))
                if not 1 <= count <= MOST_ELEMENTS:
                    raise PluginError(f"{tensor.name} has {count} values; 1 to {MOST_ELEMENTS} can be read")
                shapes.append((tensor.name, count))
            else:
                inputs.append(self._tensor(tensor.name, form))
        outputs = [
            self._tensor(tensor.name, self._form_of(tensor, -1)) for tensor in self._present(self.program.outputs)
        ]
        return Forms(tuple(inputs), tuple(outputs), tuple(shapes))

    def _present(self, tensors: Sequence[TensorProgram]) -> list[TensorProgram]:
        return [tensor for tensor in tensors if holds(tensor.when, self.scope)]

    def _form_of(self, tensor: TensorProgram, rank: int) -> Form:
        allowed = [form for form in tensor.forms if holds(form.condition, self.scope)]
        if not allowed:
            raise PluginError(f"{tensor.name} has no form for these attributes")
        return next((form for form in allowed if len(form.axes) == rank), allowed[-1])

    def _tensor(self, name: str, form: Form) -> TensorForm:
        kind = form.type if form.type in DATA_TYPES else self.types.get(form.type)
        axes = tuple(AxisForm.of(axis, self.scope) for axis in form.axes)
        for axis in axes:
            if axis.size is not None and axis.size < 0:
                raise PluginError(f"{name}: its size {axis.label} is {axis.size}")
        return TensorForm(name, kind, form.type, axes)

    def types_for(self, kinds: Sequence[int], known: Mapping[str, str] | None = None) -> dict[str, str]:
        """What the names of types stand for.

        Args:
            kinds: ``int(trt.DataType)`` of the inputs, then of outputs as far as they are known.
            known: what is known of them before; by default :attr:`types`.

        Raises:
            PluginError: one is of a type that is not allowed, or not of that of another.
        """
        found = dict(self.types if known is None else known)
        names = {number: name for name, number in DATA_TYPES.items()}
        for form, kind in zip(self.forms().all, kinds, strict=False):
            if form.variable in DATA_TYPES:
                continue
            allowed = self.program.types[form.variable].names
            name = names.get(kind, "")
            if name not in allowed or found.setdefault(form.variable, name) != name:
                raise PluginError(self.type_error(form, kind, found))
        return found

    def type_error(self, form: TensorForm, kind: int, types: Mapping[str, str]) -> str:
        """What is said of a tensor of another type."""
        return type_error(self.program, form, kind, types)

    # ------------------------------------------------------------------ its launches

    def measure(
        self,
        inputs: Sequence[Shape],
        outputs: Sequence[Shape],
        *,
        least: Mapping[str, int] | None = None,
        serves: Serves = lambda function, kernel, arguments: False,
        device: Device = unknown,
        given: Mapping[str, int] = NOTHING,
    ) -> ShapeScope:
        """All sizes, checked, with what is defined by them.

        Args:
            inputs, outputs: shapes of the tensors.
            least: lower bounds of axes, where this is of a profile.
            serves, device: answer what the description asks of the device.
            given: values of definitions that the caller knows better, as strides of tensors that have gaps.

        Raises:
            PluginError: the shapes are not those of the forms, or a check does not hold.
        """
        forms = self.forms([len(shape) for shape in inputs])
        found: dict[str, Any] = measure(forms, inputs, outputs, self.scope.values)
        shapes = dict(zip([form.name for form in forms.all], [*inputs[: len(forms.inputs)], *outputs], strict=True))
        # A name that no tensor of these attributes has is 0, as in C.
        found = dict.fromkeys(self.program.axes, 0) | found | shape_values(forms, outputs)

        def asked(name: str, kernel: str) -> bool:
            return self._serves(name, kernel, scope, forms, serves)

        scope = ShapeScope(self.scope, {**found, **given}, shapes, least or {}, asked, device)
        try:
            define(self.program.late, self.program.late_checks, scope, given)
            self._check_outputs(forms, outputs, scope, [*inputs, *outputs])
        except EvaluationError:
            raise no_value(shapes) from None
        return scope

    def _check_outputs(
        self, forms: Forms, outputs: Sequence[Shape], scope: ShapeScope, shapes: Sequence[Shape]
    ) -> None:
        for form, shape in zip(forms.outputs, outputs, strict=True):
            for axis, size in zip(form.axes, shape, strict=True):
                if axis.size is None and axis.expression.evaluate(scope) != size:
                    raise mismatch(forms, list(shapes))

    def plan(self, scope: ShapeScope) -> Plan:
        """The launches for some sizes.

        Raises:
            PluginError: an argument has no value for them.
        """
        forms = self.forms([len(scope.shapes[form.name]) for form in self.forms().inputs])
        try:
            offsets, total = workspace_of(self.program, scope)
            running = [launch for launch in self.active if holds(launch.when, scope)]
            steps = tuple(
                Step(
                    launch.function.render(scope),
                    arguments_of(launch, scope, forms, offsets),
                    launch is self.active[0],
                )
                for launch in running
            )
            said = self._sizes(scope)
        except EvaluationError:
            raise no_value(scope.shapes) from None
        return Plan(steps, len(forms.inputs), len(forms.outputs), total, said, bool(forms.shapes))

    def planned(
        self,
        inputs: Sequence[Shape],
        outputs: Sequence[Shape],
        serves: Serves,
        given: Mapping[str, int] = NOTHING,
        device: Device = unknown,
    ) -> Plan:
        """The launches for some shapes, as :meth:`measure` and :meth:`plan` find them, at a tenth of the time.

        For the first shapes they do find them, since it takes as long as dozens of those to get ready for others.

        Args:
            inputs, outputs: shapes of the tensors, those of inputs whose values are read left out.
            serves, device: as :meth:`measure`.
            given: as :meth:`measure`; only of definitions that are arguments of launches by their own names.

        Raises:
            PluginError: as these.
        """
        ranks = tuple(map(len, inputs))
        key = ranks, bool(given)
        if key in self._planners:
            found = self._planners[key]
            if found is None:
                found = planner(self.program, self.scope, self.forms(ranks), self.active, bool(given))
                self._planners[key] = found
            plan = found((*inputs, *outputs), serves, given, device)
            if plan is not None:
                return plan
        else:
            self._planners[key] = None
        return self.plan(self.measure(inputs, outputs, serves=serves, device=device, given=given))

    def _sizes(self, scope: ShapeScope) -> str:
        if self.program.shape_summary:
            return _joined(self.program.shape_summary, scope)
        return listed(scope.shapes)

    def profile_bytes(self, scope: ShapeScope) -> int:
        """Bytes of workspace that every shape of a profile asks for at the most, where the description says so."""
        expression = self.program.workspace_of_profile
        try:
            return 0 if expression is None else int(expression.evaluate(scope))
        except EvaluationError:
            raise no_value(scope.shapes) from None

    def _serves(self, name: str, kernel: str, scope: ShapeScope, forms: Forms, serves: Serves) -> bool:
        launch = next(launch for launch in self.program.launches if launch.launch.name == name)
        arguments = arguments_of(launch, scope, forms, {})
        values = [typical(argument) for argument in arguments]
        return serves(launch.function.render(scope), kernel, values)


def _joined(parts: Sequence[tuple[Expression | None, Text]], scope: Scope) -> str:
    return "".join(text.render(scope) for when, text in parts if holds(when, scope))
