"""The rows of the library: the production kernel, by algorithm; its generic variant; decoding; the first kernel."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from pyfmha.attention.decode import Decode, decoding_for
from pyfmha.attention.first import HEAD_SIZES, Attention
from pyfmha.attention.run import to_float
from pyfmha.bench.cells import Cell
from pyfmha.bench.inputs import SLACK, DeviceInputs, head_of
from pyfmha.bench.launches import call_of, launch_of
from pyfmha.bench.protocol import Contender, Floats, MissingError, refuse
from pyfmha.bfloat16 import STORAGE
from pyfmha.errors import DriverError
from pyfmha.runtime.device import DeviceArray, Stream
from pyfmha.runtime.graph import Graph
from pyfmha.runtime.library import Function, Library
from pyfmha.spec.advice import build_command

Arguments = tuple[int | float, ...]
Step = tuple[Function, list[Arguments], int]
"""A function, its arguments by set of inputs, and which algorithm."""


def _find(library: Library, name: str, wanted: tuple[str, ...]) -> Function:
    if name not in library:
        raise MissingError(f"the library has no {name}; add it: {build_command(library.path, *wanted)}")
    return library[name]


def _sizes(cell: Cell) -> tuple[str, ...]:
    return "--dtype", cell.dtype, "--head-size", str(cell.head_size)


class PreparedOurs:
    """One or two launches of the library; see :class:`pyfmha.bench.protocol.Prepared`.

    Args:
        cell: what they compute.
        steps: the launches, in order.
        out: their output, of :data:`~pyfmha.bench.inputs.SLACK` elements more than the tensor.
        others: further memory.
        shift: see :class:`~pyfmha.bench.protocol.Prepared`.
        stream: where to launch.

    Raises:
        DriverError: on creation, where the library has no code for the device.
    """

    def __init__(
        self, cell: Cell, steps: list[Step], out: DeviceArray, others: list[DeviceArray], shift: int, stream: Stream
    ) -> None:
        self.stream, self.shift, self.sets = stream, shift, len(steps[0][1])
        self._cell, self._steps, self._out, self._arrays = cell, steps, out, [out, *others]
        self._handle = stream.handle
        self._graph: Graph | None = None
        self._loaded: list[Function] = []
        try:
            for function, _, _ in steps:
                function.load()
                self._loaded.append(function)
            variants = [function.variant(*arguments[0], algo_id=algo) for function, arguments, algo in steps]
        except BaseException:
            self.close()
            raise
        self.variant = " + ".join(variants)
        out.fill(0xFF)  # NaN: what is not written cannot pass

    def active(self) -> AbstractContextManager[None]:
        """Nothing is asked for."""
        return nullcontext()

    def launch(self, index: int) -> None:
        """Queue it."""
        for function, arguments, algorithm in self._steps:
            function(self._handle, *arguments[index], algo_id=algorithm)

    def rows(self, batch: int, head: int, rows: list[int]) -> Floats:
        """See the protocol."""
        stored = head_of(self._out, self._cell, "Out", batch, head, self.shift)
        return to_float(stored[rows], self._cell.dtype_of("Out"))

    def capture(self) -> Callable[[], object]:
        """See the protocol."""
        graph = self._graph = Graph(self.stream, lambda: self.launch(0))
        return lambda: graph.launch(self.stream)

    def close(self) -> None:
        """Free its memory and unload its functions."""
        if self._graph is not None:
            self._graph.close()
        for array in self._arrays:
            array.free()
        while self._loaded:
            self._loaded.pop().unload()


class Production:
    """``fmha_fwd_*``, or what serves a bias, a mask, sinks, a function or fp8: one algorithm, or its variant for
    tensors of any alignment.

    Args:
        library: holds it.
        stream: where to launch.
        algorithm: which.
        generic: whether all tensors begin one element past a multiple of 16 bytes.
    """

    strictness = 1.0

    def __init__(self, library: Library, stream: Stream, algorithm: int = 0, generic: bool = False) -> None:
        self._library, self._stream, self._algorithm, self._generic = library, stream, algorithm, generic
        self.key = "ours" + (f"-algorithm{algorithm}" if algorithm else "") + ("-generic" if generic else "")
        self.title = "ours" + (f", algorithm {algorithm}" if algorithm else "") + (", misaligned" if generic else "")

    def prepare(self, cell: Cell, inputs: DeviceInputs) -> PreparedOurs:
        """See the protocol."""
        if self._generic:
            refuse(cell, "the variant for misaligned tensors", "ragged", "kv_lengths")
        launch = launch_of(cell)
        function = _find(self._library, launch.name, launch.build)
        if self._algorithm >= len(function.manifest.algorithms):
            raise MissingError(f"{function.name} has no algorithm {self._algorithm}")
        shift = int(self._generic)
        first = [_find(self._library, name, launch.build) for name in launch.before]
        out, *memory = _allocate(cell, *([launch.memory] if first else []))
        fixed = {"Out": out.pointer + shift * cell.item_size("Out"), "": 0}
        fixed |= dict(zip(["Blocks"], (array.pointer for array in memory), strict=False))
        fixed |= {name: array.pointer for name, array in inputs.extra.items()}

        def of(index: int) -> Arguments:
            own = fixed | {name: inputs.pointer(index, name, shift) for name in "QKV"}
            pointers = (own.get(name, 0) for name in launch.pointers)
            further = (own[value] if isinstance(value, str) else value for value in launch.further)
            return (*pointers, *launch.numbers, *further)

        arguments = [of(index) for index in range(inputs.count)]
        steps = [*((one, arguments, 0) for one in first), (function, arguments, self._algorithm)]
        return PreparedOurs(cell, steps, out, memory, shift, self._stream)


class Decoded:
    """``fmha_split_*`` and ``fmha_combine_*``, where they pay."""

    key, title, strictness = "ours-decode", "ours, split + combine", 1.0

    def __init__(self, library: Library, stream: Stream) -> None:
        self._library, self._stream = library, stream

    def prepare(self, cell: Cell, inputs: DeviceInputs) -> PreparedOurs:
        """See the protocol."""
        refuse(cell, self.title)
        decoding = decoding_for(call_of(cell))
        if decoding is None:
            raise MissingError("splitting over keys is for few queries over many keys")
        pair = Decode(cell.dtype, cell.head_size)
        functions = [_find(self._library, name, _sizes(cell)) for name in pair.names(decoding.splits)]
        sizes = decoding.partial_bytes, decoding.statistics_bytes
        out, *workspace = _allocate(cell, *sizes)
        arguments: list[Arguments] = [
            (
                out.pointer, 0, *(inputs.pointer(index, name) for name in "QKV"), 0, 0,
                *(array.pointer for array in workspace), *decoding.scalars(),
            )
            for index in range(inputs.count)
        ]  # fmt: skip
        steps = [(function, arguments, 0) for function in functions]
        return PreparedOurs(cell, steps, out, workspace, 0, self._stream)


def first_kernel_serves(cell: Cell) -> Attention:
    """The member of the first kernel's family that computes a cell.

    Raises:
        MissingError: none does.
    """
    refuse(cell, "the first kernel")
    if cell.layout != "bhsd" or cell.softcap:
        raise MissingError("the first kernel serves [batch, heads, sequence, head size] alone, without a soft cap")
    if cell.heads != cell.kv_heads or cell.seq != cell.kv_seq or cell.head_size not in HEAD_SIZES:
        sizes = ", ".join(map(str, HEAD_SIZES))
        raise MissingError(f"the first kernel serves as many key heads as heads, keys as queries, head sizes {sizes}")
    return Attention(cell.dtype, cell.head_size, cell.causal)


class First:
    """``fmha_d*``, the first kernel."""

    key, title, strictness = "ours-first", "ours, first kernel", 1.0

    def __init__(self, library: Library, stream: Stream) -> None:
        self._library, self._stream = library, stream

    def prepare(self, cell: Cell, inputs: DeviceInputs) -> PreparedOurs:
        """See the protocol."""
        function = _find(self._library, first_kernel_serves(cell).name, _sizes(cell))
        rows = 4 * cell.batch * cell.heads * cell.seq
        out, *statistics = _allocate(cell, rows, rows)
        numbers = (cell.sm_scale, cell.batch, cell.heads, cell.seq)
        arguments: list[Arguments] = [
            (
                out.pointer, *(array.pointer for array in statistics),
                *(inputs.pointer(index, name) for name in "QKV"), *numbers,
            )
            for index in range(inputs.count)
        ]  # fmt: skip
        return PreparedOurs(cell, [(function, arguments, 0)], out, statistics, 0, self._stream)


def _allocate(cell: Cell, *further: int) -> list[DeviceArray]:
    """Memory for Out, with slack, and of some further bytes each; raises DriverError where there is none."""
    batch, heads, seq, size = cell.shape("Out")
    made = [DeviceArray((batch * heads * seq * size + SLACK,), STORAGE[cell.dtype_of("Out")])]
    try:
        for nbytes in further:
            made.append(DeviceArray((nbytes,), "uint8"))
    except DriverError:
        for array in made:
            array.free()
        raise
    return made


def our_contenders(library: Library, stream: Stream, *, generic: bool) -> list[Contender]:
    """The rows of a library: as many algorithms as the production function that has the most."""
    functions: list[Any] = [library[name] for name in library if name.startswith("fmha_fwd_")]
    algorithms = max((len(function.manifest.algorithms) for function in functions), default=1)
    rows: list[Contender] = [Production(library, stream, number) for number in range(algorithms)]
    if generic:
        rows.append(Production(library, stream, generic=True))
    return [*rows, Decoded(library, stream), First(library, stream)]
