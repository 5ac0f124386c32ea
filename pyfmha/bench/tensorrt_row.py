"""The row of TensorRT's own attention layer, in an engine built for the cell."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import cast

from pyfmha.attention.run import Array, to_float
from pyfmha.bench.cells import Cell
from pyfmha.bench.inputs import DeviceInputs
from pyfmha.bench.protocol import Floats, MissingError, refuse
from pyfmha.runtime.graph import Graph
from pyfmha.trt.attention.engine import EngineConfig, build_engine
from pyfmha.trt.attention.words import Dtype
from pyfmha.trt.session import Session


class PreparedEngine:
    """An engine bound to the first set of inputs, in memory and on a stream of its own."""

    variant, sets, shift = "", 1, 0

    def __init__(self, cell: Cell, session: Session, inputs: dict[str, Array]) -> None:
        self._cell, self._session, self.stream = cell, session, session.stream
        self._graph: Graph | None = None
        self._out: Array | None = None
        session.bind(inputs)

    def active(self) -> AbstractContextManager[None]:
        """Nothing is asked for."""
        return nullcontext()

    def launch(self, index: int) -> None:
        """Queue it."""
        del index
        self._out = None
        self._session.enqueue()

    def rows(self, batch: int, head: int, rows: list[int]) -> Floats:
        """See the protocol."""
        if self._out is None:
            self._out = self._session.fetch()["Out"]
        return to_float(self._out[batch, head][rows], self._cell.dtype)

    def capture(self) -> Callable[[], object]:
        """See the protocol."""
        graph = self._graph = Graph(self.stream, self._session.enqueue)

        def replay() -> None:
            self._out = None
            graph.launch(self.stream)

        return replay

    def close(self) -> None:
        """Free the engine."""
        if self._graph is not None:
            self._graph.close()
        self._session.close()


class TensorrtLayer:
    """TensorRT 10.14 and newer have a layer for attention.

    Args:
        device: number of the GPU.
    """

    key, title, strictness = "tensorrt", "TensorRT's own layer", 10.0

    def __init__(self, device: int = 0) -> None:
        self._device = device

    def prepare(self, cell: Cell, inputs: DeviceInputs) -> PreparedEngine:
        """See the protocol."""
        refuse(cell, self.title)
        if cell.heads != cell.kv_heads or cell.seq != cell.kv_seq:
            raise MissingError("not asked: the engine here has as many key heads as heads, and keys as queries")
        if cell.layout != "bhsd":
            raise MissingError("not asked: the engine here has [batch, heads, sequence, head size]")
        if cell.softcap:
            raise MissingError("TensorRT's attention layer has no soft cap")
        config = EngineConfig(
            cell.heads, cell.head_size, cell.batch, cell.seq, cast("Dtype", cell.dtype), causal=cell.causal,
            layer="tensorrt",
        )  # fmt: skip
        session = Session(build_engine(config, device=self._device).plan, device=self._device)
        try:
            return PreparedEngine(cell, session, {name: inputs.host(0, name) for name in "QKV"})
        except BaseException:
            session.close()
            raise
