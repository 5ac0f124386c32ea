"""CUDA graphs: work recorded once from a stream, then launched as a whole."""

from collections.abc import Callable
from contextlib import suppress

from pyfmha.errors import DriverError
from pyfmha.runtime.device import Stream, _call, _driver


class Graph:
    """A captured, instantiated graph. Addresses are part of it: the memory that it uses must stay where it is.

    Args:
        stream: the stream to capture; it is left as it was.
        work: queues work on the stream; it may neither allocate nor wait, and is called once.

    Raises:
        DriverError: on creation, where the capture failed: ``work`` did what a capture forbids.
    """

    def __init__(self, stream: Stream, work: Callable[[], object]) -> None:
        # Thread-local: what other threads do meanwhile is their own business.
        mode = _driver().CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        _call("cuStreamBeginCapture", stream._stream, mode)
        try:
            work()
        except BaseException:
            # The capture may be broken already, which is no news then; a graph that comes out of it is dropped.
            with suppress(DriverError):
                _call("cuGraphDestroy", _call("cuStreamEndCapture", stream._stream))
            raise
        graph = _call("cuStreamEndCapture", stream._stream)
        try:
            self._executable = _call("cuGraphInstantiate", graph, 0)
        finally:
            _call("cuGraphDestroy", graph)
        self._open = True

    def launch(self, stream: Stream) -> None:
        """Queue all of it; raises DriverError where it cannot be queued."""
        _call("cuGraphLaunch", self._executable, stream._stream)

    def close(self) -> None:
        """Destroy it; harmless when repeated."""
        if self._open:
            self._open = False
            _call("cuGraphExecDestroy", self._executable)
