"""Kernels under decorators beside ``jit``: autotuners' configurations, heuristics, and other wrappers with ``.fn``.

Imported by :mod:`pyfmha.aot.worker` only; it needs Triton.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NoReturn

from pyfmha.aot.sources import Refused
from pyfmha.spec.abi import ctype
from pyfmha.spec.constants import Constant, Dtype, FunctionName, from_data, to_data

OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")
"""What a configuration or a heuristic may set beside constants."""


@dataclass(frozen=True)
class Wrapped:
    """A kernel and what stands around it, outermost first."""

    kernel: Any
    around: tuple[Any, ...]

    @property
    def configs(self) -> list[Any]:
        """The configurations of its autotuner; none where it has none."""
        return next((list(wrapper.configs) for wrapper in self.around if _is_tuner(wrapper)), [])

    def heuristics(self) -> list[str]:
        """The names that its heuristics give values to."""
        return [name for wrapper in self.around for name in _heuristics(wrapper)]


def unwrap(found: Any) -> Wrapped | None:
    """The ``@triton.jit`` function inside an object, through any number of wrappers; None where there is none."""
    from triton.runtime.jit import JITFunction

    around: list[Any] = []
    while not isinstance(found, JITFunction):
        around.append(found)
        try:
            inner = getattr(found, "fn", None)
            found = inner if inner is not None else getattr(found, "__wrapped__", None)
        except Exception:  # anything may stand in a kernel file
            return None
        if found is None or len(around) > 32:
            return None
    return Wrapped(found, tuple(around))


def _is_tuner(wrapper: Any) -> bool:
    configs = getattr(wrapper, "configs", None)
    return isinstance(configs, list | tuple) and bool(configs) and all(hasattr(c, "kwargs") for c in configs)


def _heuristics(wrapper: Any) -> Mapping[str, Callable[[dict[str, Any]], Any]]:
    values = getattr(wrapper, "values", None)
    return values if isinstance(values, dict) and all(map(callable, values.values())) else {}


def describe_configs(wrapped: Wrapped) -> list[dict[str, Any]]:
    """Each configuration as data: what it sets, by name."""
    return [{**config.kwargs, **_options(config)} for config in wrapped.configs]


def _options(config: Any) -> dict[str, Any]:
    found = {name: getattr(config, name, None) for name in OPTIONS}
    return {name: value for name, value in found.items() if value is not None}


def encode(value: Any, module: ModuleType) -> Any:
    """A Python value as a constant in data; raises TypeError where it is none that a kernel can have."""
    return to_data(_constant(value, module))


def _constant(value: Any, module: ModuleType) -> Constant:
    import triton.language as tl
    from triton.runtime.jit import JITFunction

    if isinstance(value, tl.constexpr):
        return _constant(value.value, module)
    if isinstance(value, tl.dtype):
        return Dtype(_signature_name(value))
    if isinstance(value, tuple | list):
        return tuple(_constant(element, module) for element in value)
    if isinstance(value, JITFunction):
        name = next((name for name, held in vars(module).items() if held is value), None)
        if name is None:
            raise TypeError(f"{value!r} has no name in the kernel's file")
        return FunctionName(name)
    if value is None or isinstance(value, bool | int | float | str):
        plain: Constant = value
        return plain
    raise TypeError(f"{type(value).__name__} {value!r} is no constant that can be compiled ahead of time")


def _signature_name(dtype: Any) -> str:
    name = str(dtype.name)
    for word, letter in (("uint", "u"), ("int", "i")):
        if name.startswith(word):
            return letter + name.removeprefix(word)
    return name


def decode(data: Any, module: ModuleType) -> Any:
    """The Python value of a constant."""
    import triton.language as tl

    value = from_data(data)
    if isinstance(value, tuple):
        return tuple(decode(element, module) for element in data)
    if isinstance(value, Dtype):
        return tl.str_to_ty(value.name, None)
    if isinstance(value, FunctionName):
        found: Any = module
        for part in value.name.split("."):
            found = getattr(found, part, None)
        wrapped = unwrap(found)
        if wrapped is None:
            raise Refused("SpecError", f"{value.name} is no @triton.jit function of {module.__file__}")
        return wrapped.kernel
    return value


class _RunTimeError(Exception):
    """A value that is known at run time only was asked for."""


class RunTime:
    """An argument in the hands of a heuristic: it is there, and not None; what it is shows only at run time."""

    def __init__(self, name: str, kind: str) -> None:
        vars(self).update(_name=name, _kind=kind)

    def element_size(self) -> int:
        """Bytes of an element, as of a tensor."""
        kind = ctype(self._kind)
        return kind.size if kind.kind == "pointer" else self._refuse()

    def _refuse(self, *_: Any) -> NoReturn:
        raise _RunTimeError(f"it reads {self._name}, which is known at run time only")

    def __getattr__(self, name: str) -> NoReturn:
        raise _RunTimeError(f"it reads {self._name}.{name}, which is known at run time only")


_OPERATIONS = (
    "bool int float index len iter contains getitem call hash eq ne lt le gt ge add radd sub rsub mul rmul truediv"
    " rtruediv floordiv rfloordiv mod rmod pow rpow and rand or ror xor rxor lshift rlshift rshift rrshift neg abs"
)
for _name in _OPERATIONS.split():
    setattr(RunTime, f"__{_name}__", RunTime._refuse)


@dataclass
class Settled:
    """What configuration and heuristics say.

    Attributes:
        constants: constants, by name.
        options: of :data:`OPTIONS`, by name.
        unknown: why a heuristic's value cannot be computed, by name.
        notes: what a caller must know.
    """

    constants: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def take(self, what: str, values: Mapping[str, Any], parameters: list[str]) -> None:
        """Take values that one of the two sets."""
        for name, value in values.items():
            if name not in parameters and name not in OPTIONS:
                raise Refused(
                    "SpecError",
                    f"{what} sets {name}, which is no parameter of the kernel and no option that is served:"
                    f" {', '.join(OPTIONS)}",
                )
            (self.constants if name in parameters else self.options)[name] = value


def settle(wrapped: Wrapped, config: int | None, given: Mapping[str, Any]) -> Settled:
    """Walk through a kernel's wrappers as a launch does, and collect the values that they give.

    Args:
        wrapped: the kernel.
        config: which of its autotuner's configurations; None: none of them.
        given: the parameters that have values or types, by name: Python values, or :class:`RunTime` arguments.
    """
    parameters = [parameter.name for parameter in wrapped.kernel.params]
    defaults = {p.name: p.default for p in wrapped.kernel.params if p.has_default}
    settled = Settled()
    for wrapper in wrapped.around:
        if _is_tuner(wrapper):
            if config is not None:
                _configure(settled, wrapper, config, given, parameters)
            continue
        for name, heuristic in _heuristics(wrapper).items():
            if name in given:
                continue
            known = {**defaults, **given, **settled.constants, **settled.options}
            try:
                settled.take("a heuristic", {name: heuristic(known)}, parameters)
            except Refused:
                raise
            except KeyError as error:
                settled.unknown[name] = f"it reads {error.args[0] if error.args else '?'}, which has no value yet"
            except Exception as error:
                settled.unknown[name] = (
                    str(error) if isinstance(error, _RunTimeError) else f"{type(error).__name__}: {error}"
                )
    return settled


def _configure(settled: Settled, tuner: Any, index: int, given: Mapping[str, Any], parameters: list[str]) -> None:
    config = tuner.configs[index]
    if getattr(config, "ir_override", None):
        raise Refused("SpecError", f"configuration {index} replaces the kernel's IR (ir_override); that is not served")
    values = {**config.kwargs, **_options(config)}
    twice = sorted(set(values) & set(given))
    if twice:
        raise Refused(
            "SpecError",
            f"configuration {index} sets {', '.join(twice)}, and so does the signature; write _ there, or leave it out",
        )
    settled.take(f"configuration {index}", values, parameters)
    if getattr(config, "pre_hook", None) is not None:
        settled.notes.append(
            f"configuration {index} has a pre_hook, which Triton calls before each launch and the library does not: do"
            " what it does before each call"
        )
    if getattr(tuner, "early_config_prune", None) or getattr(tuner, "perf_model", None):
        settled.notes.append(
            "the autotuner drops configurations by the arguments of a call (prune_configs_by), which the library does"
            " not: use none for a call that it would be dropped for"
        )
