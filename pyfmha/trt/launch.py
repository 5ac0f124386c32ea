"""A launch with everything but its addresses prepared, and the hold on a function's machine code that it needs."""

import weakref
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from pyfmha.errors import LaunchError, PluginError, PyfmhaError
from pyfmha.runtime.library import Function
from pyfmha.trt.current import Context, current_context, made_current
from pyfmha.trt.failures import LOGGER
from pyfmha.trt.plan import Plan

Enqueue = Callable[[Any, Any, Sequence[int], Sequence[int], int, int], None]
"""``enqueue(input_desc, output_desc, inputs, outputs, workspace, stream)``, as TensorRT calls it."""

FailedCall = Callable[[], Callable[[Exception], Exception] | None]

_TEMPLATE = """
def make(pack, launch, check, failed, no_workspace, offsets):
    {offset_names} = offsets

    def enqueue(input_desc, output_desc, inputs, outputs, workspace, stream):
        try:
            {inputs} = inputs
            {outputs} = outputs
            {workspace}
            pack(stream, {pointers})
            status = launch()
            if status:
                check(status)
        except Exception as error:
            raise failed(error) from error

    return enqueue
"""


@cache
def _maker(sources: tuple[tuple[str, int, bool], ...], num_inputs: int, num_outputs: int, needs_workspace: bool) -> Any:
    """Makes the ``enqueue`` for one pattern of pointers: source, index and whether there is an offset.

    Written as text, as ``dataclasses`` does, because each pattern is a few names in a call then: one function for all
    of them would build and pick apart tuples, 0.5 us of the 6 that the host has for an enqueue.
    """
    names = {"input": "i{}", "output": "o{}", "workspace": "workspace", "null": "0"}
    terms: list[str] = []
    offset_names: list[str] = []
    for source, index, moved in sources:
        term = names[source].format(index)
        if moved:
            offset_names.append(f"d{len(offset_names)}")
            term += f" + {offset_names[-1]}"
        terms.append(term)
    text = _TEMPLATE.format(
        offset_names=_unpacked(offset_names),
        inputs=_unpacked([f"i{index}" for index in range(num_inputs)]),
        outputs=_unpacked([f"o{index}" for index in range(num_outputs)]),
        workspace="if not workspace: raise no_workspace" if needs_workspace else "",
        pointers=", ".join(terms),
    )
    made: dict[str, Any] = {}
    exec(compile(text, "<enqueue>", "exec"), made)
    return made["make"]


def _unpacked(names: Sequence[str]) -> str:
    return f"[{', '.join(names)}]"


def bind(function: Function, plan: Plan, algo_id: int, failed: FailedCall) -> Enqueue:
    """Prepare a launch: what it returns is the plugin's ``enqueue`` for one shape, and all that runs in it.

    It fills in the addresses and calls C, without another call in Python between. What it fills in is its own: like the
    execution context that it belongs to, it is for one thread at a time.

    Args:
        function: what to launch, loaded.
        plan: its arguments.
        algo_id: which of its algorithms.
        failed: a weak reference to what makes of an exception the one to raise.
    """

    def report(error: Exception) -> Exception:
        made = failed()
        assert made is not None, "called on a plugin that is gone"
        return made(error)

    prepared = function.prepare(*[0] * len(plan.pointers), *plan.scalars, algo_id=algo_id)
    make = _maker(
        tuple((pointer.source, pointer.index, pointer.offset != 0) for pointer in plan.pointers),
        plan.num_inputs,
        plan.num_outputs,
        plan.workspace_bytes > 0,
    )
    enqueue: Enqueue = make(
        prepared.pack,
        prepared.launch,
        lambda status: function.check(status, LaunchError),
        report,
        PluginError(
            f"TensorRT gave no workspace, {plan.workspace_bytes} bytes are needed: get_workspace_size failed or was not"
            " asked"
        ),
        [pointer.offset for pointer in plan.pointers if pointer.offset],
    )
    return enqueue


class Hold:
    """One counted load of a function in the CUDA context current at its creation.

    Raises:
        DriverError: on creation: there is no current context, no code for its device, or the driver refused it.
    """

    def __init__(self, function: Function) -> None:
        function.load()  # first, because its message says best what is missing
        context = current_context()
        assert context is not None, "the library loaded into a context that is not current"
        self.context: Context = context
        self._function = function
        self._released = False

    def release(self) -> None:
        """Undo the load, on any thread; harmless when repeated. Failures are logged: the context may be gone."""
        if self._released:
            return
        self._released = True
        try:
            with made_current(self.context):
                self._function.unload()
        except PyfmhaError as error:
            LOGGER.warning("%s was not unloaded: %s", self._function.name, error)

    def release_where_current(self) -> None:
        """As :meth:`release`, if the context is this thread's current one: another may be gone, and is not touched."""
        if not self._released and current_context() == self.context:
            self.release()


def release_when_collected(owner: Any, hold: Hold) -> None:
    """Release a hold with its owner where nobody calls ``destroy()``: the binding does not for what Python owns."""
    weakref.finalize(owner, hold.release_where_current).atexit = False
