"""One plugin twice, in Python and in C: every call of its life made on both, and the answers compared."""

import random
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from fake_cuda import FakeCuda, Launch

import pyfmha.trt
from pyfmha.aot import Compiler, build
from pyfmha.aot.operator_specs import load_operators, operator_specs
from pyfmha.operators.arithmetic import EvaluationError
from pyfmha.operators.description import DATA_TYPES, Operator
from pyfmha.operators.expressions import Expression
from pyfmha.operators.forms import AxisForm
from pyfmha.operators.instance import Instance
from pyfmha.operators.program import MOST_DIMENSIONS, program_of
from pyfmha.operators.scopes import AttributeScope
from pyfmha.runtime.library import Library
from pyfmha.spec.arch import parse_archs
from trt_double import BUILD, RUNTIME, Field, Tensor, Unknown
from trt_double.binding import make_binding
from trt_double.library_calls import LibraryCalls
from trt_double.scene import Scene

WORKSPACE, STREAM = 0x7C0000000100, 0xABCD
_FIELDS = {"int32": (5, np.int32), "int64": (10, np.int64), "fp32": (1, np.float32)}
Shapes = Callable[[random.Random, Instance], tuple[list[Tensor], int]]


def operators_library(compiler: Compiler, file: Path, folder: Path) -> Path:
    """A library for sm_90 of all operators of a file, with their plugins in C."""
    operators = load_operators(compiler, file)
    specs = [spec for operator in operators for spec in operator_specs(compiler, operator)]
    return build(specs, parse_archs(["sm_90"]), folder, jobs=1, operators=operators).library


def pair_of(library: Path, folder: Path, fake_cuda: FakeCuda, name: str) -> "Pair":
    """The plugins of an operator, of a copy of a library in a folder: nothing of it is loaded. A context is current."""
    fake_cuda.use_context()
    path = Path(shutil.copy(library, folder / "libpyfmha.so"))
    operators = {operator.name: operator for operator in Library(path).operators}
    return Pair(path, fake_cuda, operators[name])


class Pair:
    """The same plugin twice, in Python and in C, for the same calls."""

    def __init__(self, path: Path, fake_cuda: FakeCuda, operator: Operator, c: Any = None) -> None:
        self.library = Library(path)
        self.operator, self.program = operator, program_of(operator)
        self.scene = Scene(make_binding(), self.library, operator)
        self.python, self.c = self.scene.calls, LibraryCalls(path) if c is None else c
        self.recorders = fake_cuda, fake_cuda if c is None else c
        self.creator = self.c.named(operator.name)

    def both(self, call: str, plugins: Sequence[Any], *arguments: Any) -> Any:
        """Make a call on both: the answer, which is the same."""
        answers, texts = [], []
        for calls, plugin in zip((self.python, self.c), plugins, strict=True):
            before = len(self.c.logger.lines), pyfmha.trt.last_failure()
            answers.append(getattr(calls, call)(plugin, *arguments))
            failure = pyfmha.trt.last_failure()
            said = [line for severity, line in self.c.logger.lines[before[0] :] if severity == 1]
            texts.append(said[-1] if said else str(failure.error) if failure is not before[1] and failure else "")
        assert texts[0] == texts[1], (texts, call, arguments)
        if call == "workspace":
            answers = [min(answer, 1 << 62) for answer in answers]
        assert repr(answers[0]) == repr(answers[1]), (call, arguments)
        return answers[0]

    def create(self, fields: Sequence[Field], phase: int = BUILD, layer: str = "layer 7") -> tuple[Any, Any] | None:
        """Both plugins, or None where both refuse with one text."""
        before, lines = pyfmha.trt.last_failure(), len(self.c.logger.lines)
        python = self.python.create(self.scene.creator, layer, fields, phase)
        c = self.c.create(self.creator, layer, fields, phase)
        assert (python is None) == (c is None), (pyfmha.trt.last_failure(), self.c.error())
        if python is not None:
            return python, c
        failure = pyfmha.trt.last_failure()
        assert failure is not None
        assert failure is not before
        assert str(failure.error) == self.c.logger.lines[-1][1]
        assert len(self.c.logger.lines) > lines
        assert self.c.error() == str(failure.error).encode()[:4095].decode(errors="replace")  # it has no more room
        return None

    def stored(self, plugins: Sequence[Any]) -> list[Field]:
        one, other = (calls.stored_fields(p).read() for calls, p in zip((self.python, self.c), plugins, strict=True))
        assert one == other
        return one

    def launches(self, plugins: Sequence[Any], *arguments: Any) -> list[Launch]:
        """Enqueue on both: the launches, which are the same."""
        made = []
        status = []
        for calls, plugin, recorder in zip((self.python, self.c), plugins, self.recorders, strict=True):
            before = recorder.launch_count()
            status.append(calls.enqueue(plugin, *arguments))
            made.append(recorder.launches(before))
        assert status[0] == status[1], self.c.error()
        assert [_shown(launch) for launch in made[0]] == [_shown(launch) for launch in made[1]]
        return made[0]


def _shown(launch: Launch) -> tuple[Any, ...]:
    return launch.image_sha256, launch.grid, launch.block, launch.stream, launch.params


def hidden(size: int, chance: random.Random) -> int | None:
    """A size as a network has it: known, known later, or nobody's."""
    return chance.choice((size, Unknown(size), Unknown(size), None)) if chance.random() < 0.6 else size


def shape_values(instance: Instance, outputs: Sequence[Tensor]) -> list[list[int]]:
    """The values of the inputs that are read, as far as outputs have them as a size."""
    forms = instance.forms()
    found = []
    for name, count in forms.shapes:
        values = [3] * count
        for form, tensor in zip(forms.outputs, outputs, strict=False):
            for axis, size in zip(form.axes, tensor.shape, strict=False):
                node = axis.expression.node
                if node.kind == "item" and node.value == name:
                    values[node.parts[0].value] = size
        found.append(values)
    return found


def fields_of(operator: Operator, values: dict[str, Any]) -> list[Field]:
    """A creator's fields."""
    kinds, made = dict(operator.attributes), []
    for name, value in values.items():
        element = kinds[name].type.removesuffix("[]")
        if element == "string":
            made.append(Field(name, 6, len(value.encode()) + 1, value.encode() + b"\0"))
            continue
        number, numpy = _FIELDS[element]
        array = np.array(value if kinds[name].type.endswith("[]") else [value], numpy)
        made.append(Field(name, number, len(array), array.tobytes()))
    return made


def spoilt(fields: list[Field], chance: random.Random) -> list[Field]:
    """Fields, now and then with one too many, too few, of another type or length."""
    if chance.random() > 0.12 or not fields:
        return fields
    at = chance.randrange(len(fields))
    field = fields[at]
    kinds = {
        "twice": [*fields, field],
        "without": [*fields[:at], *fields[at + 1 :]],
        "unknown": [*fields, Field("sclae", 1, 1, bytes(4))],
        "type": [
            *fields[:at],
            Field(field.name, chance.choice((0, 1, 5, 6, 10)), field.length, field.data + bytes(8)),
            *fields[at + 1 :],
        ],
        "length": [*fields[:at], Field(field.name, field.type, 0, b""), *fields[at + 1 :]],
    }
    return kinds[chance.choice(list(kinds))]


def shapes_for(sizes: Sequence[int], large: Sequence[int], odd: float = 0.03) -> Shapes:
    """What makes tensors of the plugin's forms, or nearly; and says how many are inputs.

    Args:
        sizes: of axes, to choose from.
        large: now and then, of one axis.
        odd: how often something is wrong.
    """

    def made(chance: random.Random, instance: Instance) -> tuple[list[Tensor], int]:
        forms = instance.forms([chance.choice((1, 2, 3)) for _ in instance.forms().inputs])
        names = sorted({name for form in forms.inputs for axis in form.axes for name in axis.unknown})
        values = {**instance.scope.values, **{name: chance.choice(sizes) for name in names}}
        if chance.random() < 0.1:
            values |= {name: chance.choice(large) for name in chance.sample(names, k=min(2, len(names)))}
        values |= {name: tuple(chance.choice(sizes) for _ in range(count)) for name, count in forms.shapes}
        scope = AttributeScope(values, instance.given, instance.options, instance.types)
        for name, expression in instance.program.late:  # as far as sizes tell
            with suppress(EvaluationError, KeyError):
                scope.values[name] = expression.evaluate(scope)
        kinds = {name: chance.choice(types.names) for name, types in instance.program.types.items()}
        tensors = []
        for form in forms.all:
            shape = [_sized(axis, scope) for axis in form.axes]
            if shape and chance.random() < odd:
                shape[chance.randrange(len(shape))] += chance.choice((1, -1, 2))
            if chance.random() < odd / 2 and len(shape) < MOST_DIMENSIONS:
                shape.append(1)
            kind = DATA_TYPES[form.type or kinds[form.variable]]
            tensors.append(Tensor(tuple(shape), kind if chance.random() > odd / 2 else chance.choice((0, 1, 3, 7, 8))))
        return tensors, len(forms.inputs)

    return made


def _sized(axis: AxisForm, scope: AttributeScope) -> int:
    try:
        return axis.size if axis.size is not None else int(Expression("", axis.expression.node).evaluate(scope))
    except (EvaluationError, KeyError):
        return 1


def bounded(tensor: Tensor, chance: random.Random) -> Tensor:
    """A tensor whose sizes a profile bounds."""
    low = tuple(max(0, size - chance.choice((0, 0, 1, 5))) for size in tensor.shape)
    own = tuple(-1 if a != b else b for a, b in zip(low, tensor.shape, strict=True))
    return Tensor(own, tensor.type, tensor.format, largest=tensor.shape, smallest=low)


def drive(pair: Pair, plugins: Sequence[Any], chance: random.Random, shapes: Shapes) -> str:
    """All calls of a plugin's life on both."""
    tensors, count = shapes(chance, plugins[0].instance)
    inputs, outputs = tensors[:count], tensors[count:]
    assert plugins[0].num_outputs == plugins[1].num_outputs
    pair.both("timing_cache_id", plugins)
    assert pair.python.core(plugins[0])[:2] == pair.c.core(plugins[1])[:2]
    pair.both("output_types", plugins, [tensor.type for tensor in inputs])
    read = shape_values(plugins[0].instance, outputs)
    told = [[hidden(size, chance) for size in shape] for shape in (*(t.shape for t in inputs), *read)]
    pair.both("output_shapes", plugins, told[:count], told[count:])
    for position in range(len(tensors)):
        pair.both("supports", plugins, position, tensors)
    dynamic = [bounded(tensor, chance) for tensor in tensors]
    pair.both("configure", plugins, dynamic[:count], dynamic[count:])
    tactics = pair.both("tactics", plugins)
    if chance.random() < 0.3:  # other shapes and types: nothing of the first ones stays
        again, count = shapes(chance, plugins[0].instance)
        pair.both("output_types", plugins, [tensor.type for tensor in again[:count]])
        pair.both("configure", plugins, again[:count], again[count:])
        pair.both("configure", plugins, dynamic[: len(inputs)], dynamic[len(inputs) :])
    loaded = pair.create(pair.stored(plugins), RUNTIME)
    assert loaded is not None
    attached = [calls.attach(plugin) for calls, plugin in zip((pair.python, pair.c), loaded, strict=True)]
    assert None not in attached
    if tactics:
        pair.both("set_tactic", attached, chance.choice([0, *tactics, 12345]))
    count = len(inputs)
    room = pair.both("workspace", attached, dynamic[:count], dynamic[count:])
    for _ in range(chance.choice((1, 1, 2))):
        if pair.both("on_shape_change", attached, inputs, outputs) != 0:
            return "prepared"
        addresses = [0x7F0000000000 + 0x10000000 * index for index in range(len(tensors))]
        launched = pair.launches(attached, addresses[:count], addresses[count:], WORKSPACE if room else 0, STREAM)
        if tactics and chance.random() < 0.3:  # another algorithm for a shape that is prepared
            pair.both("set_tactic", attached, chance.choice(tactics))
            pair.launches(attached, addresses[:count], addresses[count:], WORKSPACE if room else 0, STREAM)
    if room:  # TensorRT gave none; the last shape may do without
        pair.both("enqueue", attached, addresses[:count], addresses[count:], 0, STREAM)
    copies = [calls.clone(plugin) for calls, plugin in zip((pair.python, pair.c), attached, strict=True)]
    longer = Tensor((*inputs[0].shape[:7], 2), inputs[0].type)
    if pair.both("on_shape_change", attached, [longer, *inputs[1:]], outputs) != 0:  # the last shape does not run on
        assert pair.both("enqueue", attached, addresses[:count], addresses[count:], WORKSPACE, STREAM) != 0
    for plugin in (*loaded[1:], *attached[1:]):  # a clone does not hang on what it was made of
        plugin.delete()
    pair.both("timing_cache_id", copies)
    pair.stored(copies)
    assert pair.both("enqueue", copies, addresses[:count], addresses[count:], WORKSPACE, STREAM) != 0
    assert pair.both("on_shape_change", copies, inputs, outputs) == 0
    assert len(pair.launches(copies, addresses[:count], addresses[count:], WORKSPACE, STREAM)) == len(launched)
    return "split" if len(launched) > 1 else "launched"
