"""Score and mask functions of a user's in a layer: which plugin of the library that is, and what it is given."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyfmha.attention.function_operator import KINDS, own_arguments
from pyfmha.attention.operator import NAME, OPERATOR
from pyfmha.errors import LibraryError, PluginError, SpecError
from pyfmha.operators.attributes import checked
from pyfmha.operators.description import DATA_TYPES, TYPE_NAMES, Operator
from pyfmha.operators.program import program_of
from pyfmha.runtime.library import Library
from pyfmha.spec.advice import build_command
from pyfmha.trt.attention.problem import Extension, Problem
from pyfmha.trt.attention.words import Values
from pyfmha.trt.network import Tensors

_files: dict[str, str] = {}
"""The files of functions that this process was given, by name and digest, for the commands that messages print."""


@dataclass(frozen=True)
class Asked:
    """The functions that a layer asks for.

    Attributes:
        score, mask: a function, or its name in the library; None: none.
        score_inputs, mask_inputs: what each is given.
    """

    score: Any = None
    mask: Any = None
    score_inputs: Values = ()
    mask_inputs: Values = ()

    def __post_init__(self) -> None:
        for kind in KINDS:
            function, inputs = getattr(self, kind), getattr(self, f"{kind}_inputs")
            if function is None and len(inputs):
                raise PluginError(f"{kind}_inputs are given, and no {kind} function; give {kind}=, or leave them out")
            if function is not None and not isinstance(function, str) and not is_function(function):
                raise PluginError(
                    f"{kind} is of type {type(function).__name__}; give a function that is decorated with"
                    f" @pyfmha.{KINDS[kind]}, or its name in the library"
                )
            if isinstance(inputs, str) or not isinstance(inputs, Sequence | Mapping):
                raise PluginError(
                    f"{kind}_inputs is of type {type(inputs).__name__}; give a list, or a mapping by name"
                )

    def __bool__(self) -> bool:
        return self.score is not None or self.mask is not None

    def identities(self) -> dict[str, str]:
        """What is asked for by the attributes that hold it: name and digest, or where it is given by name, that.

        Raises:
            PluginError: a function is of the other kind.
        """
        found: dict[str, str] = {}
        for kind in KINDS:
            function = getattr(self, kind)
            if function is None or isinstance(function, str):
                found |= {} if function is None else {KINDS[kind]: function}
                continue
            described = function.__pyfmha__()
            other = next(one for one in KINDS if one != kind)
            if described[kind] is None:
                raise PluginError(f"{described['name']} is a {other} function; give it as {other}={described['name']}")
            if described[other] is not None and (kind == "mask" or self.mask is not None):
                beside = "" if kind == "mask" else ", and no other mask function with it"
                raise PluginError(
                    f"{described['name']} is a score and a mask function together; give it as score{beside}"
                )
            found |= {KINDS[one]: described[one] for one in KINDS if described[one] is not None}
            _files.update({text: described["file"] for text in found.values()})
        return found


def is_function(value: Any) -> bool:
    """Whether it is a :class:`pyfmha.functions.AttentionFunction`, which is not imported: it needs Triton."""
    return hasattr(type(value), "__pyfmha__")


def split_mask(mask: Any) -> tuple[Any, Any]:
    """The tensor and the function that the keyword ``mask`` means; None for what it does not.

    Raises:
        PluginError: there are two of a kind.
    """
    given = list(mask) if isinstance(mask, tuple | list) else [mask]
    functions = [one for one in given if isinstance(one, str) or is_function(one)]
    tensors = [one for one in given if one is not None and not (isinstance(one, str) or is_function(one))]
    if len(functions) > 1 or len(tensors) > 1:
        raise PluginError("mask is more than a tensor and a function; give one of each at the most")
    return next(iter(tensors), None), next(iter(functions), None)


def extended(asked: Asked, library: Library, dtype: str, head_size: int) -> tuple[Extension, Tensors]:
    """The plugin for some functions, with its attributes; and its tensors.

    Args:
        asked: what a layer asks for.
        library: where the functions are.
        dtype, head_size: of Q, for the command that a message prints.

    Raises:
        PluginError: an input is missing, unknown, or of another kind or type.
        LibraryError: the library has not the function, or one of another source.
    """
    operator = operator_for(asked, library, dtype, head_size)
    inputs = FunctionInputs(operator)
    values = inputs.named(asked)
    tensors = {source: inputs.tensor(name, source, values[name]) for name, source in inputs.tensors.items()}
    return extension_of(operator, inputs, values), tensors


def check_held(asked: Asked, problem: Problem, library: Library) -> None:
    """Refuse a type or head size that a function was not built for. The plugin does so, too, but knows no paths.

    Raises:
        LibraryError: with the command that builds it.
    """
    given = [one for one in (asked.score, asked.mask) if one is not None]
    if problem.function_name not in library and len(given) == 1 and is_function(given[0]):
        command, _ = _command(asked, library, problem.dtype, problem.padded_size)
        raise LibraryError(f"{library.path} does not hold {problem.function_name}; add it: {command}")


def extended_by(
    score: Any, mask: Any, numbers: Mapping[str, Any], library: Library, dtype: str, head_size: int
) -> Extension | None:
    """The plugin for functions whose tensors come later; None for no function.

    Args:
        score, mask: as of :class:`Asked`.
        numbers: the functions' numbers that no shape tells, by name.
        library, dtype, head_size: as of :func:`extended`.

    Raises:
        PluginError, LibraryError: as there.
    """
    asked = Asked(score, mask)
    if not asked:
        if numbers:
            raise PluginError(f"numbers are given ({', '.join(numbers)}), and no function; give score= or mask=")
        return None
    operator = operator_for(asked, library, dtype, head_size)
    inputs = FunctionInputs(operator)
    if set(numbers) != set(inputs.numbers):
        wanted = ", ".join(inputs.numbers) or "none"
        raise PluginError(f"numbers are {', '.join(numbers) or 'missing'}; {inputs.name} takes {wanted}")
    return extension_of(operator, inputs, numbers)


def extension_of(operator: Operator, inputs: "FunctionInputs", values: Mapping[str, Any]) -> Extension:
    """The plugin with the numbers of the values that its functions are given.

    Raises:
        PluginError: one is no number.
    """
    program = program_of(operator)
    for name, source in inputs.numbers.items():
        if not isinstance(values[name], int | float | np.generic):
            got, kind = type(values[name]).__name__, dict(operator.attributes)[source].type
            raise PluginError(f"{inputs.name}: input {name} is of type {got}; it must be a number ({kind})")
    named = {source: _plain(values[name]) for name, source in inputs.numbers.items()}
    return Extension(operator, tuple(checked(program, named).items()))


def _plain(value: Any) -> Any:
    """A number of numpy's as Python's own."""
    return value.item() if isinstance(value, np.generic) else value


class FunctionInputs:
    """What the function of an operator takes, as its launch says.

    Attributes:
        operator: that.
        name: of the function.
        order: the function's inputs in its order, those that shapes tell among them.
        tensors, numbers: names of the function's inputs, with the names of the operator's inputs and attributes.
    """

    def __init__(self, operator: Operator) -> None:
        own = own_arguments(operator)
        held = {tensor.name for tensor in operator.inputs}
        attributes = dict(operator.attributes)
        self.operator = operator
        self.name = operator.name.removeprefix(f"{NAME}_")
        self.order = [name for name, _ in own]
        self._forms = {tensor.name: tensor.forms for tensor in operator.inputs}
        self.tensors = {name: source for name, source in own if source in held}
        self.numbers = {name: source for name, source in own if source in attributes and source not in _ATTENTIONS}
        self._order = [name for name, _ in own if name in self.tensors or name in self.numbers]
        self._told = [name for name, _ in own if name not in self._order]

    def named(self, asked: Asked) -> dict[str, Any]:
        """The values by name, all there are."""
        found: dict[str, Any] = {}
        for kind in KINDS:
            function, given = getattr(asked, kind), getattr(asked, f"{kind}_inputs")
            if function is None:
                continue
            wanted = self._of(kind, function, asked, given)
            for name, value in self._paired(f"{kind}_inputs", wanted, given).items():
                if name in found and found[name] is not value:
                    raise PluginError(f"{self.name}: input {name} is in score_inputs and in mask_inputs; give one")
                found[name] = value
        missing = [name for name in self._order if name not in found]
        if missing:
            raise PluginError(f"{self.name} takes {self._said(self._order)}; missing: {', '.join(missing)}")
        return found

    def _of(self, kind: str, function: Any, asked: Asked, given: Values) -> list[str]:
        """The inputs of one of the functions that are asked for."""
        alone = asked.score is None or asked.mask is None
        if alone or (isinstance(function, str) and isinstance(given, Mapping)):
            return self._order
        if isinstance(function, str):
            if not len(given):
                return []
            raise PluginError(
                f"{kind}_inputs of {function!r}, which is given by name beside another function: give a mapping by name"
            )
        return [name for name, _ in function.__pyfmha__()["inputs"] if name in self._order]

    def _paired(self, what: str, wanted: Sequence[str], given: Values) -> dict[str, Any]:
        takes = f"{self.name} takes {self._said(wanted)}"
        if isinstance(given, Mapping):
            unknown = [name for name in given if name not in wanted]
            if unknown:
                raise PluginError(f"{what} has {', '.join(unknown)}; {takes}")
            return dict(given)
        if len(given) != len(wanted):
            raise PluginError(f"{what} has {len(given)}; {takes}")
        return dict(zip(wanted, given, strict=True))

    def _said(self, names: Sequence[str]) -> str:
        told = f" ({', '.join(self._told)} follow{'s' if len(self._told) == 1 else ''} from shapes)"
        return (", ".join(names) or "no inputs") + (told if self._told else "")

    def kind(self, source: str) -> str:
        """The type of a tensor."""
        (kind,) = {form.partition("[")[0] for form in self._forms[source]}
        return kind

    def tensor(self, name: str, source: str, value: Any) -> Any:
        """A tensor, which must be one of the network's and of the function's type."""
        kind = self.kind(source)
        try:
            found = int(value.dtype)
            _ = value.shape
        except (AttributeError, TypeError, ValueError):
            raise PluginError(
                f"{self.name}: input {name} is of type {type(value).__name__}; it must be an ITensor of"
                f" {TYPE_NAMES[kind]}: an input of the network, or network.add_constant(shape, weights).get_output(0)"
            ) from None
        if found != DATA_TYPES[kind]:
            names = {number: TYPE_NAMES[one] for one, number in DATA_TYPES.items()}
            raise PluginError(
                f"{self.name}: input {name} is of type {names.get(found, found)}; it must be {TYPE_NAMES[kind]}"
            )
        return value


_ATTENTIONS = {name for name, _ in OPERATOR.attributes}


def functions_of(operator: Operator) -> dict[str, str]:
    """The functions of an operator, by the attributes that hold them: name and digest."""
    attributes = dict(operator.attributes)
    return {name: str(attributes[name].default) for name in KINDS.values() if name in attributes}


def operator_for(asked: Asked, library: Library, dtype: str, head_size: int) -> Operator:
    """The operator of a library with some functions.

    Raises:
        PluginError: a function is of the other kind.
        LibraryError: the library has not the function, or one of another source; with the command that builds it.
    """
    wanted = asked.identities()
    held = {operator: functions_of(operator) for operator in _operators(library)}
    held = {operator: functions for operator, functions in held.items() if functions}
    for operator, functions in held.items():
        if _alike(functions, wanted, asked, operator):
            return operator
    said = " and ".join(wanted.values())
    names = [text.partition(":")[0] for text in wanted.values()]
    command, how = _command(asked, library, dtype, head_size)
    for operator, functions in held.items():
        if list(functions) == list(wanted) and [text.partition(":")[0] for text in functions.values()] == names:
            if len(names) == 2:  # of whatever file, which the library knows by name
                command = build_command(
                    library.path, operator.build.partition(" --dtype")[0], *_sizes(dtype, head_size)
                )
            raise LibraryError(
                f"{library.path} holds {' and '.join(functions.values())}, this is {said}, of another source or with"
                f" other inputs; build the library again: {command}"
            )
    there = ", ".join(operator.name.removeprefix(f"{NAME}_") for operator in held) or "none"
    raise LibraryError(
        f"{library.path} has no plugin with the function {said}; it has: {there}. Build it{how}: {command}"
    )


def _operators(library: Library) -> tuple[Operator, ...]:
    try:
        return tuple(library.operators)
    except SpecError as error:
        raise LibraryError(f"{library.path}: {error}") from None


def _alike(functions: Mapping[str, str], wanted: Mapping[str, str], asked: Asked, operator: Operator) -> bool:
    """Whether an operator's functions are those asked for, by digest or by name; a pair by its own name, too."""
    if asked.mask is None and operator.name == f"{NAME}_{asked.score}" and KINDS["score"] in functions:
        return True
    return set(functions) == set(wanted) and all(
        text in (functions[name], functions[name].partition(":")[0]) for name, text in wanted.items()
    )


def _command(asked: Asked, library: Library, dtype: str, head_size: int) -> tuple[str, str]:
    """The command that builds what is missing, and what must be done before it."""
    given = [one for one in (asked.score, asked.mask) if one is not None]
    names = [one.partition(":")[0] if isinstance(one, str) else one.__pyfmha__()["name"] for one in given]
    files = [
        one.__pyfmha__()["file"] if is_function(one) else _files.get(one, f"{name}.py")
        for one, name in zip(given, names, strict=True)
    ]
    how = ""
    if len(given) == 2:
        how = (
            f", from a file {'_'.join(names)}.py that imports both and has {'_'.join(names)} ="
            f" pyfmha.score_and_mask({'_'.join(names)!r}, {', '.join(names)})"
        )
        files = [f"{'_'.join(names)}.py"]
    quoted = shlex.quote(files[0])
    return build_command(library.path, f"--functions {quoted}", *_sizes(dtype, head_size)), how


def _sizes(dtype: str, head_size: int) -> tuple[str, str]:
    return f"--dtype {dtype}", f"--head-size {head_size}"
