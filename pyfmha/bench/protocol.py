"""The border between what decides and reports, which needs no GPU, and what launches and times."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pyfmha.bench.cells import Cell

Floats = NDArray[np.float64]


class MissingError(Exception):
    """Why a contender cannot be timed at a cell: software that is missing, or a problem that it does not serve."""


def refuse(cell: Cell, who: str, *served: str) -> None:
    """For a contender that serves plain attention, and some words of :attr:`~pyfmha.bench.cells.Cell.asks`.

    Raises:
        MissingError: the cell asks for something else.
    """
    asked = [said for word, said in cell.asks.items() if word not in served]
    if asked:
        raise MissingError(f"{who} does not serve {', '.join(asked)}")


class Inputs(Protocol):
    """Several sets of Q, K and V of one cell, on the device."""

    cell: Cell
    count: int

    def rows(self, index: int, tensor: str, batch: int, head: int, rows: Any, shift: int) -> Floats:
        """Rows [n, head size] of a head of ``"Q"``, ``"K"`` or ``"V"`` of a set; rows is a slice or a list.

        ``shift`` is by how many elements the tensor begins later: see :attr:`Prepared.shift`.
        """
        ...

    def close(self) -> None:
        """Free them."""
        ...


class Prepared(Protocol):
    """A contender ready to launch at one cell.

    Attributes:
        stream: where it launches, a :class:`pyfmha.runtime.device.Stream`.
        variant: which variant of ours runs; empty for others.
        sets: how many of the sets of inputs it reads: launch number i reads set i modulo that.
        shift: how many elements later than the inputs' begin its tensors do.
    """

    stream: Any
    variant: str
    sets: int
    shift: int

    def active(self) -> AbstractContextManager[object]:
        """What must hold while it launches, is captured, or is replayed."""
        ...

    def launch(self, index: int) -> object:
        """Queue one attention of one set of inputs; may return while the GPU computes."""
        ...

    def rows(self, batch: int, head: int, rows: list[int]) -> Floats:
        """Rows of the output of the last launch, whose stream was synchronised since."""
        ...

    def capture(self) -> Callable[[], object]:
        """A CUDA graph of ``launch(0)``; what is returned queues it."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


class Contender(Protocol):
    """Something that computes attention.

    Attributes:
        key: short name, the same in every run: ``"ours"``, ``"cudnn"``.
        title: the same for people.
        strictness: factor of the error that the output may have; 1 for ours.
    """

    key: str
    title: str
    strictness: float

    def prepare(self, cell: Cell, inputs: Any) -> Prepared:
        """Make it ready.

        Raises:
            MissingError: it cannot run here, or does not serve the cell.
            PyfmhaError, RuntimeError: it failed.
        """
        ...


class Gpu(Protocol):
    """A device with a clock."""

    def inputs(self, cell: Cell) -> Inputs:
        """Fresh random inputs."""
        ...

    def cold_us(self, launch: Callable[[], object], stream: Any, count: int) -> list[float]:
        """Microseconds on the GPU of each of some launches, before each of which the L2 cache was overwritten."""
        ...

    def copy_us(self, nbytes: int) -> float:
        """Microseconds, as :meth:`cold_us`, of a copy of device memory that reads and writes so many bytes in all.

        Raises:
            DriverError: there is no memory for it.
        """
        ...

    def host_us(self, launch: Callable[[], object], count: int) -> float:
        """Microseconds on the host of a call, the mean of some that are made one after the other."""
        ...

    def synchronize(self) -> None:
        """Wait for all work; raises DriverError where some of it failed."""
        ...
