"""A launch with everything but its addresses prepared, and the hold on a function's machine code that it needs."""

import math
import weakref
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

from pyfmha.errors import LaunchError, PluginError, PyfmhaError
from pyfmha.operators.plan import Plan, Pointer
from pyfmha.runtime.library import FLOAT_MAX, Function
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
    # At once, as one by one they take longer than all else that a new shape asks of the host.
    if function.holds(_placed(arguments)):
        return
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


def _placed(arguments: Sequence[Pointer | int | float]) -> list[int | float]:
    """Arguments with 0 for pointers."""
    return [0 if isinstance(argument, Pointer) else argument for argument in arguments]


class Binder:
    """Prepares launches of one plugin: what a call returns is its ``enqueue`` for one shape, and all that runs in it.

    That puts the addresses among the other arguments and calls C, without another call in Python between. Nothing is
    kept from one call to the next, so threads that meet in it do not disturb each other.

    Args:
        failed: a weak reference to what makes of an exception the one to raise.
    """

    def __init__(self, failed: FailedCall) -> None:
        self._failed = failed
        # That of the latest shape: the next one's is mostly the same, of the same objects, and then quickly compared.
        self._latest: tuple[list[Any], Any] = [], None
        self._checkers: dict[tuple[Function, bool], Callable[[int], None]] = {}

    def __call__(self, steps: Sequence[tuple[Function, int]], plan: Plan) -> Enqueue:
        """Prepare.

        Args:
            steps: what to launch, one after the other on the stream, each with its algorithm's number: functions that
                are loaded.
            plan: their arguments.

        Raises:
            PluginError: an argument does not fit its C type.
        """
        numbers: list[int] = []
        packed: list[tuple[Sequence[Pointer | int | float], Callable[..., bytes], bytes]] = []
        for (function, algo_id), step in zip(steps, plan.steps, strict=True):
            try:
                pack, tail = function.settle(*_placed(step.arguments), algo_id=algo_id)
            except (TypeError, OverflowError):
                check_arguments(function, step.arguments)
                raise
            alike = [n for n, (given, _, other) in enumerate(packed) if other == tail and given == step.arguments]
            if not alike:
                packed.append((step.arguments, pack, tail))
            numbers.append(alike[0] if alike else len(packed) - 1)
        pointers = [[argument for argument in given if argument.__class__ is Pointer] for given, _, _ in packed]
        needed = plan.workspace_bytes > 0
        structure: list[Any] = [pointers, numbers, plan.num_inputs, plan.num_outputs, needed, plan.reads_values]
        earlier, make = self._latest
        if structure != earlier:
            found = tuple(tuple((one.source, one.index, one.offset != 0) for one in of_one) for of_one in pointers)
            make = _maker(_Pattern(found, tuple(numbers), *structure[2:]))
        self._latest = structure, make
        enqueue: Enqueue = make(
            [pack for _, pack, _ in packed],
            [tail for _, _, tail in packed],
            [(function.start, self._checker(function, len(steps) > 1)) for function, _ in steps],
            self._report,
            partial(_no_workspace, plan.workspace_bytes),
            [pointer.offset for number in _in_order(numbers) for pointer in pointers[number] if pointer.offset],
        )
        return enqueue

    def _report(self, error: Exception) -> Exception:
        made = self._failed()
        assert made is not None, "called on a plugin that is gone"
        return made(error)

    def _checker(self, function: Function, named: bool) -> Callable[[int], None]:
        """Raises for a status that is not success; says which function it was where there are several."""
        if (function, named) not in self._checkers:
            self._checkers[function, named] = partial(_check, function, named)
        return self._checkers[function, named]


def _no_workspace(needed: int) -> PluginError:  # a new one for each call, as each has a traceback of its own
    return PluginError(
        f"TensorRT gave no workspace, {needed} bytes are needed: get_workspace_size failed or was not asked"
    )


def _check(function: Function, named: bool, status: int) -> None:
    try:
        function.check(status, LaunchError)
    except LaunchError as error:
        if not named:
            raise
        raise LaunchError(f"{function.name}: {error}", error.code) from None


def _in_order(numbers: Sequence[int]) -> list[int]:
    """The sets of arguments in the order in which they are packed: again where another came between."""
    return [number for index, number in enumerate(numbers) if index == 0 or numbers[index - 1] != number]


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
