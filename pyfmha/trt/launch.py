"""A launch with everything but its addresses prepared, and the hold on a function's machine code that it needs."""

import weakref
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

from pyfmha.errors import LaunchError, PluginError, PyfmhaError
from pyfmha.runtime.library import Function
from pyfmha.trt.current import Context, current_context, made_current
from pyfmha.trt.failures import LOGGER
from pyfmha.trt.plan import Plan

Enqueue = Callable[[Any, Any, Sequence[int], Sequence[int], int, int], None]
"""``enqueue(input_desc, output_desc, inputs, outputs, workspace, stream)``, as TensorRT calls it."""

FailedCall = Callable[[], Callable[[Exception], Exception] | None]

_TEMPLATE = """
def make(pack, tail, steps, failed, no_workspace, offsets):
    {step_names} = steps
    {offset_names} = offsets

    def enqueue(input_desc, output_desc, inputs, outputs, workspace, stream):
        try:
            {inputs} = inputs
            {outputs} = outputs
            {workspace}
            arguments = pack(stream, {pointers}) + tail{launches}
        except Exception as error:
            raise failed(error) from error

    return enqueue
"""

_LAUNCH = """
            status = launch{0}(arguments)
            if status:
                check{0}(status)"""


class _Pattern(NamedTuple):
    """All that the text of an ``enqueue`` depends on.

    Attributes:
        pointers: of each the source, the index, and whether there is an offset.
        num_inputs, num_outputs: how many addresses TensorRT gives.
        needs_workspace: whether to refuse to run without.
        steps: how many functions are launched.
    """

    pointers: tuple[tuple[str, int, bool], ...]
    num_inputs: int
    num_outputs: int
    needs_workspace: bool
    steps: int


@cache
def _maker(pattern: _Pattern) -> Any:
    """Makes the ``enqueue`` for one pattern.

    Written as text, as ``dataclasses`` does, because each pattern is a few names in a call then: one function for all
    of them would build and pick apart tuples, 0.5 us of the 6 that the host has for an enqueue.
    """
    names = {"input": "i{}", "output": "o{}", "workspace": "workspace", "null": "0"}
    terms: list[str] = []
    offset_names: list[str] = []
    for source, index, moved in pattern.pointers:
        term = names[source].format(index)
        if moved:
            offset_names.append(f"d{len(offset_names)}")
            term += f" + {offset_names[-1]}"
        terms.append(term)
    steps = range(pattern.steps)
    text = _TEMPLATE.format(
        step_names=_unpacked([f"[launch{step}, check{step}]" for step in steps]),
        offset_names=_unpacked(offset_names),
        inputs=_unpacked([f"i{index}" for index in range(pattern.num_inputs)]),
        outputs=_unpacked([f"o{index}" for index in range(pattern.num_outputs)]),
        workspace="if not workspace: raise no_workspace()" if pattern.needs_workspace else "",
        pointers=", ".join(terms),
        launches="".join(map(_LAUNCH.format, steps)),
    )
    made: dict[str, Any] = {}
    exec(compile(text, "<enqueue>", "exec"), made)
    return made["make"]


def _unpacked(names: Sequence[str]) -> str:
    return f"[{', '.join(names)}]"


def bind(steps: Sequence[tuple[Function, int]], plan: Plan, failed: FailedCall) -> Enqueue:
    """Prepare the launches: what it returns is the plugin's ``enqueue`` for one shape, and all that runs in it.

    It puts the addresses before the other arguments and calls C, without another call in Python between. Nothing is
    kept from one call to the next, so threads that meet in it do not disturb each other.

    Args:
        steps: what to launch, one after the other on the stream, each with its algorithm's number: functions that are
            loaded and take the same arguments.
        plan: those arguments.
        failed: a weak reference to what makes of an exception the one to raise.

    Raises:
        PluginError: the functions do not take the same arguments.
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

    prepared = [
        function.prepare(*[0] * len(plan.pointers), *plan.scalars, algo_id=algo_id) for function, algo_id in steps
    ]
    first = prepared[0]
    if any(other.tail != first.tail for other in prepared):
        raise PluginError(f"{' and '.join(f.name for f, _ in steps)} do not take the same arguments: pyfmha build")
    pattern = _Pattern(
        tuple((pointer.source, pointer.index, pointer.offset != 0) for pointer in plan.pointers),
        plan.num_inputs,
        plan.num_outputs,
        plan.workspace_bytes > 0,
        len(steps),
    )
    enqueue: Enqueue = _maker(pattern)(
        first.head,
        first.tail,
        [(other.start, _checker(other.function, named=len(steps) > 1)) for other in prepared],
        report,
        no_workspace,
        [pointer.offset for pointer in plan.pointers if pointer.offset],
    )
    return enqueue


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
