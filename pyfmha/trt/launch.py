"""A launch with everything but its pointers prepared, and the hold on a function's machine code that it needs."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from pyfmha.errors import LaunchError, PluginError, PyfmhaError
from pyfmha.runtime.library import Function
from pyfmha.trt.current import Context, current_context, made_current
from pyfmha.trt.failures import LOGGER

Enqueue = Callable[[Any, Any, Sequence[int], Sequence[int], int, int], None]
"""``enqueue(input_desc, output_desc, inputs, outputs, workspace, stream)``, as TensorRT calls it."""

FailedCall = Callable[[], Callable[[Exception], Exception] | None]

_ALIGNMENT = 16  # of each part of the workspace: what the hinted variants ask of a pointer


def statistics_bytes(rows: int) -> int:
    """Bytes from L to M in the workspace, for batch * heads * seq rows: one float32 each, aligned."""
    return -(-rows * 4 // _ALIGNMENT) * _ALIGNMENT


def workspace_bytes(rows: int) -> int:
    """Bytes of workspace: L and M, the kernel's float32 sum and maximum of each row."""
    return statistics_bytes(rows) + 4 * rows


def bind(
    function: Function, batch: int, num_heads: int, seq: int, scale: float, algo_id: int, failed: FailedCall
) -> Enqueue:
    """Prepare a launch: what it returns is the plugin's ``enqueue`` for one shape, and all that runs in it.

    It packs the pointers with the rest and calls C once, without another call in Python between.

    Args:
        function: what to launch, loaded.
        batch, num_heads, seq, scale, algo_id: its arguments beside the pointers.
        failed: a weak reference to what makes of an exception the one to raise.
    """
    pack, launch_packed = function.pack, function.launch_packed
    rows = batch * num_heads * seq
    offset, needed = statistics_bytes(rows), workspace_bytes(rows)

    def enqueue(
        input_desc: Any, output_desc: Any, inputs: Sequence[int], outputs: Sequence[int], workspace: int, stream: int
    ) -> None:
        try:
            q, k, v = inputs
            if not workspace and needed:
                raise PluginError(
                    f"TensorRT gave no workspace, {needed} bytes are needed: get_workspace_size failed or was not asked"
                )
            m = workspace + offset
            status = launch_packed(
                pack(stream, outputs[0], workspace, m, q, k, v, scale, batch, num_heads, seq, algo_id)
            )
            if status:
                function.check(status, LaunchError)
        except Exception as error:
            report = failed()
            assert report is not None, "called on a plugin that is gone"
            raise report(error) from error

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
