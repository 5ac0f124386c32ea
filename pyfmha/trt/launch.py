"""A launch with everything but its addresses prepared, and the hold on a function's machine code that it needs."""

import math
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

from pyfmha.errors import LaunchError, PluginError, PyfmhaError
from pyfmha.operators.plan import Plan, Pointer
from pyfmha.runtime.library import FLOAT_MAX, Function, Prepared
from pyfmha.spec.abi import ctype
from pyfmha.trt.current import Context, current_context, made_current
from pyfmha.trt.failures import LOGGER

Enqueue = Callable[[Any, Any, Sequence[int], Sequence[int], int, int], None]
"""``enqueue(input_desc, output_desc, inputs, outputs, workspace, stream)``, as TensorRT calls it."""

FailedCall = Callable[[], Callable[[Exception], Exception] | None]

_TEMPLATE = """
def make(packs, tails, steps, failed, no_workspace, offsets):
    {pack_names} = packs
    {tail_names} = tails
    {step_names} = steps
    {offset_names} = offsets

    def enqueue(input_desc, output_desc, inputs, outputs, workspace, stream):
        try:
            {inputs} = inputs
            {outputs} = outputs
            {workspace}{launches}
        except Exception as error:
            raise failed(error) from error

    return enqueue
"""

_PACK = """
            arguments = pack{number}(stream{pointers}) + tail{number}"""
_LAUNCH = """
            status = launch{0}(arguments)
            if status:
                check{0}(status)"""


class _Pattern(NamedTuple):
    """All that the text of an ``enqueue`` depends on.

    Attributes:
        packed: of each different set of arguments its pointers: the source, the index, and whether there is an offset.
        steps: of each launch, which of those sets it takes.
        num_inputs, num_outputs: how many addresses TensorRT gives.
        needs_workspace: whether to refuse to run without.
        more_inputs: whether addresses that nobody looks at may come behind those of the inputs.
    """

    packed: tuple[tuple[tuple[str, int, bool], ...], ...]
    steps: tuple[int, ...]
    num_inputs: int
    num_outputs: int
    needs_workspace: bool
    more_inputs: bool


@cache
def _maker(pattern: _Pattern) -> Any:
    """Makes the ``enqueue`` for one pattern.

    Written as text, as ``dataclasses`` does, because each pattern is a few names in a call then: one function for all
    of them would build and pick apart tuples, 0.5 us of the 6 that the host has for an enqueue. Launches of the same
    arguments share their bytes.
    """
    offset_names: list[str] = []
    launches, packed = "", -1
    for step, number in enumerate(pattern.steps):
        if number != packed:
            terms = [_term(*pointer, offset_names) for pointer in pattern.packed[number]]
            launches += _PACK.format(number=number, pointers="".join(f", {term}" for term in terms))
        launches += _LAUNCH.format(step)
        packed = number
    text = _TEMPLATE.format(
        pack_names=_unpacked([f"pack{number}" for number in range(len(pattern.packed))]),
        tail_names=_unpacked([f"tail{number}" for number in range(len(pattern.packed))]),
        step_names=_unpacked([f"[launch{step}, check{step}]" for step in range(len(pattern.steps))]),
        offset_names=_unpacked(offset_names),
        inputs=_unpacked([*(f"i{index}" for index in range(pattern.num_inputs)), *["*_"] * pattern.more_inputs]),
        outputs=_unpacked([f"o{index}" for index in range(pattern.num_outputs)]),
        workspace="if not workspace: raise no_workspace()" if pattern.needs_workspace else "",
        launches=launches,
    )
    made: dict[str, Any] = {}
    exec(compile(text, "<enqueue>", "exec"), made)
    return made["make"]


def _term(source: str, index: int, moved: bool, offset_names: list[str]) -> str:
    """The Python of an address; the name of its offset is added to those there are."""
    term = {"input": f"i{index}", "output": f"o{index}", "workspace": "workspace", "null": "0"}[source]
    if not moved:
        return term
    offset_names.append(f"d{len(offset_names)}")
    return f"{term} + {offset_names[-1]}"


def _unpacked(names: Sequence[str]) -> str:
    return f"[{', '.join(names)}]"


def check_arguments(function: Function, arguments: Sequence[Pointer | int | float]) -> None:
    """Refuse arguments that do not fit their C types.

    Raises:
        PluginError: the first that does not, with what its type holds.
    """
    for (name, kind), argument in zip(function.manifest.arguments, arguments, strict=True):
        entry = ctype(kind)
        if isinstance(argument, Pointer):
            continue
        if entry.kind == "float":
            fits = entry.c == "double" or not math.isfinite(argument) or abs(argument) <= FLOAT_MAX
            held = "up to 3.4e38 in size"
        else:
            low, high = entry.bounds or (0, (1 << 64) - 1)
            fits, held = isinstance(argument, int) and low <= argument <= high, f"{low} to {high}"
        if not fits:
            shown = f"{argument:g}" if isinstance(argument, float) else argument
            raise PluginError(f"{function.name}: {name} is {shown}, {kind} holds {held}")


def bind(steps: Sequence[tuple[Function, int]], plan: Plan, failed: FailedCall) -> Enqueue:
    """Prepare the launches: what it returns is the plugin's ``enqueue`` for one shape, and all that runs in it.

    It puts the addresses among the other arguments and calls C, without another call in Python between. Nothing is
    kept from one call to the next, so threads that meet in it do not disturb each other.

    Args:
        steps: what to launch, one after the other on the stream, each with its algorithm's number: functions that are
            loaded.
        plan: their arguments.
        failed: a weak reference to what makes of an exception the one to raise.
    """

    def report(error: Exception) -> Exception:
        made = failed()
        assert made is not None, "called on a plugin that is gone"
        return made(error)

    def no_workspace() -> PluginError:  # a new one for each call, as each has a traceback of its own
        return PluginError(
            f"TensorRT gave no workspace, {plan.workspace_bytes} bytes are needed: get_workspace_size failed or was not"
            " asked"
        )

    prepared: list[Prepared] = []
    numbers: list[int] = []
    packed: list[tuple[Sequence[Pointer | int | float], Prepared]] = []
    for (function, algo_id), step in zip(steps, plan.steps, strict=True):
        made = function.prepare(
            *(0 if isinstance(argument, Pointer) else argument for argument in step.arguments),
            algo_id=algo_id,
            all_pointers=True,
        )
        prepared.append(made)
        alike = [n for n, (given, other) in enumerate(packed) if given == step.arguments and other.tail == made.tail]
        if not alike:
            packed.append((step.arguments, made))
        numbers.append(alike[0] if alike else len(packed) - 1)
    pointers = [[argument for argument in given if isinstance(argument, Pointer)] for given, _ in packed]
    pattern = _Pattern(
        tuple(tuple((pointer.source, pointer.index, pointer.offset != 0) for pointer in found) for found in pointers),
        tuple(numbers),
        plan.num_inputs,
        plan.num_outputs,
        plan.workspace_bytes > 0,
        plan.reads_values,
    )
    enqueue: Enqueue = _maker(pattern)(
        [made.head for _, made in packed],
        [made.tail for _, made in packed],
        [(other.start, _checker(other.function, named=len(steps) > 1)) for other in prepared],
        report,
        no_workspace,
        [pointer.offset for number in _in_order(numbers) for pointer in pointers[number] if pointer.offset],
    )
    return enqueue


def _in_order(numbers: Sequence[int]) -> list[int]:
    """The sets of arguments in the order in which they are packed: again where another came between."""
    return [number for index, number in enumerate(numbers) if index == 0 or numbers[index - 1] != number]


def _checker(function: Function, *, named: bool) -> Callable[[int], None]:
    """Raises for a status that is not success; says which function it was where there are several."""

    def check(status: int) -> None:
        try:
            function.check(status, LaunchError)
        except LaunchError as error:
            if not named:
                raise
            raise LaunchError(f"{function.name}: {error}", error.code) from None

    return check


class Hold:
    """One counted load of each of some functions in the CUDA context current at its creation.

    Raises:
        DriverError: on creation: there is no current context, no code for its device, or the driver refused it. Then
            nothing stays loaded.
    """

    def __init__(self, functions: Sequence[Function]) -> None:
        self._loaded: list[Function] = []
        self._released = False
        self._collected: Any = None
        try:
            for function in functions:
                function.load()
                self._loaded.append(function)
            context = current_context()  # last, because the message of a load says best what is missing
            assert context is not None, "the library loaded into a context that is not current"
        except BaseException:
            for function in reversed(self._loaded):
                _unload(function)
            raise
        self.context: Context = context

    def release(self) -> None:
        """Undo the loads, on any thread; harmless when repeated. Failures are logged: the context may be gone."""
        if self._released:
            return
        self._released = True
        if self._collected is not None:
            self._collected.detach()
        loaded, self._loaded = self._loaded, []
        try:
            with made_current(self.context):
                for function in reversed(loaded):
                    _unload(function)
        except PyfmhaError as error:
            names = ", ".join(function.name for function in loaded)
            LOGGER.warning("%s: not unloaded: %s", names, error)

    def release_with(self, owner: Any) -> None:
        """Release it with its owner where nobody calls ``destroy()``: the binding does not for what Python owns."""
        self._collected = weakref.finalize(owner, self.release_where_current)
        self._collected.atexit = False

    def release_where_current(self) -> None:
        """As :meth:`release`, if the context is this thread's current one: another may be gone, and is not touched.

        Raises nothing: it is called by Python's garbage collector, where the driver may be shutting down.
        """
        try:
            if not self._released and current_context() == self.context:
                self.release()
        except PyfmhaError as error:
            LOGGER.debug("no function was unloaded: %s", error)


def _unload(function: Function) -> None:
    try:
        function.unload()
    except PyfmhaError as error:
        LOGGER.warning("%s was not unloaded: %s", function.name, error)
