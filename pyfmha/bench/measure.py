"""Measuring a cell: prepare every contender, check what it computes, time all of them in turns, check again."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from pyfmha.attention.reference import FP8_LIMIT, LIMITS, attend, relative_error
from pyfmha.bench.cells import FP8, Cell
from pyfmha.bench.extras import arrays_of, score_of, seen_of
from pyfmha.bench.figures import launches_of, middle, noise
from pyfmha.bench.protocol import Contender, Floats, Gpu, Inputs, MissingError, Prepared
from pyfmha.bench.results import Measured, Row
from pyfmha.errors import DriverError, PyfmhaError

ROUNDS = 5
TURNS = 5
"""Of a contender in a round."""

TURN_US = 3_000.0
"""Of launches in a turn. Turns are short, and their order goes forth and back, because a GPU at its power limit leaves
each contender a clock that depends on who ran in the 30 ms before: in blocks of so long, causal attention of 16384
tokens took 0.92 or 1.00 of FlashAttention-3's time on an H200, by the place in the order alone."""

FEWEST, MOST = 1, 20
"""Launches of a turn."""

HOST_ROUNDS = 3
HOST_US = 30_000.0
HOST_FEWEST, HOST_CALLS = 5, 30
"""Of a round: microseconds that its calls keep the GPU busy, and how many they are."""

WHOLE = 1 << 24
"""Products of the scores up to which every row of the output is checked; beyond, a sample."""
SAMPLED_HEADS, SAMPLED_ROWS = 6, 24

Sample = list[tuple[int, int, list[int]]]
FAILURES = (MissingError, PyfmhaError, RuntimeError, MemoryError)
"""What a contender may raise; torch raises RuntimeError for what a backend lacks and for memory."""


@dataclass
class _Contest:
    """One contender while it is measured."""

    contender: Contender
    prepared: Prepared | None
    row: Row
    count: int = 0
    rounds: list[list[float]] = field(default_factory=list)

    def fail(self, why: str, *, wrong: bool = False) -> None:
        self.row = replace(self.row, missing=why, wrong=wrong, us=None, noise=None, host_us=None, graph_us=None)
        self.prepared = None


def sample_of(cell: Cell) -> Sample:
    """Which rows of the output are checked: (batch, head, rows). All of them where that is quick, else a sample."""
    heads = [(b, h) for b in range(cell.batch) for h in range(cell.heads)]
    if cell.heads * cell.pairs * cell.head_size <= WHOLE:
        return [(b, h, list(range(cell.queries_of(b)))) for b, h in heads]
    generator = np.random.default_rng(cell.seq)
    chosen = {0, len(heads) - 1, *generator.integers(0, len(heads), SAMPLED_HEADS - 2).tolist()}
    edges = {0, cell.seq - 1, *(row for row in (1, 63, 64, 127, 128) if row < cell.seq)}
    rows = sorted(edges | set(generator.integers(0, cell.seq, SAMPLED_ROWS).tolist()))
    return [
        (b, h, sorted({row % cell.queries_of(b) for row in rows})) for b, h in map(heads.__getitem__, sorted(chosen))
    ]


def exact_rows(inputs: Inputs, index: int, sample: Sample, shift: int) -> Floats:
    """The sampled rows in float64, one below the other."""
    cell, parts = inputs.cell, []
    held = arrays_of(cell)
    score, seen_keys, sinks = score_of(cell, held, np), seen_of(cell, held), held.get("sinks")
    for batch, head, rows in sample:
        q = inputs.rows(index, "Q", batch, head, rows, shift)
        kv_head = head // (cell.heads // cell.kv_heads)
        keys = cell.keys_of(batch)
        k, v = (inputs.rows(index, name, batch, kv_head, slice(0, keys), shift) for name in "KV")
        for query, row in zip(q, rows, strict=True):
            seen = slice(0, row + 1 if cell.causal else keys)
            operands = query[None, None, None], k[None, None, seen], v[None, None, seen]
            out, _ = attend(
                *operands,
                sm_scale=cell.sm_scale,
                softcap=cell.softcap,
                sinks=None if sinks is None else sinks[head : head + 1],
                score=None if score is None else _at(score, batch, head, row),
                seen=None if seen_keys is None else _seen_at(seen_keys, batch, head, row),
            )
            parts.append(out[0, 0])
    return np.concatenate(parts)


def _at(score: Callable[..., Any], batch: int, head: int, row: int) -> Callable[..., Any]:
    """A function of scores for one query, which the reference takes for the first."""
    return lambda scores, b, h, q, k: score(scores, batch, head, row, k)


def _seen_at(seen: Callable[..., Any], batch: int, head: int, row: int) -> Callable[..., Any]:
    return lambda b, h, q, k: seen(batch, head, row, k)


def measure_cell(gpu: Gpu, cell: Cell, contenders: Sequence[Contender], progress: Callable[[str], None]) -> Measured:
    """Time every contender at one cell, in turns, so that a GPU that warms up is the same for all.

    Args:
        gpu: the device.
        cell: what to compute.
        contenders: who computes it; one that cannot gets a row that says why.
        progress: called with a contender's title before it is prepared.
    """
    with ExitStack() as stack:
        try:
            inputs = gpu.inputs(cell)
        except PyfmhaError as error:  # no memory
            return Measured(cell, tuple(Row(c.key, c.title, missing=_first_line(error)) for c in contenders))
        stack.callback(inputs.close)
        check = _Check(gpu, inputs)
        contests = [_prepare(gpu, cell, contender, inputs, check, stack, progress) for contender in contenders]
        for turn in range(ROUNDS * TURNS):
            for contest in _running(contests if turn % 2 == 0 else contests[::-1]):
                _guarded(contest, partial(_take_turn, gpu, contest, turn // TURNS))
        for contest in _running(contests):
            _guarded(contest, partial(_finish, gpu, contest, check))
        return Measured(cell, tuple(contest.row for contest in contests), _copy_us(gpu, cell))


def _copy_us(gpu: Gpu, cell: Cell) -> float | None:
    """The time of a copy of as many bytes, where memory bounds the cell and there is memory for it."""
    if not cell.bound_by_memory:
        return None
    try:
        return gpu.copy_us(cell.nbytes)
    except DriverError:
        return None


def _running(contests: Sequence[_Contest]) -> Iterator[_Contest]:
    return (contest for contest in contests if contest.prepared is not None)


def _guarded(contest: _Contest, step: Callable[[], object]) -> None:
    try:
        step()
    except FAILURES as error:
        contest.fail(_first_line(error))


class _Check:
    """Compares outputs with float64, which is computed once for a set of inputs."""

    def __init__(self, gpu: Gpu, inputs: Inputs) -> None:
        self._gpu, self._inputs = gpu, inputs
        self._sample = sample_of(inputs.cell)
        self._exact: dict[tuple[int, int], Floats] = {}

    def error(self, prepared: Prepared, index: int) -> float:
        """Relative error of the output of the last launch, which read a set of inputs."""
        key = index % prepared.sets, prepared.shift
        if key not in self._exact:
            self._exact[key] = exact_rows(self._inputs, key[0], self._sample, key[1])
        self._gpu.synchronize()
        got = np.concatenate([prepared.rows(batch, head, rows) for batch, head, rows in self._sample])
        return relative_error(got, self._exact[key])

    def passes(self, contest: _Contest, prepared: Prepared, index: int) -> bool:
        """Whether the output is right; notes the error, and fails the contest where not."""
        error = self.error(prepared, index)
        dtype = self._inputs.cell.dtype
        limit = (FP8_LIMIT if dtype == FP8 else LIMITS[dtype]) * contest.contender.strictness
        if not error <= limit:
            contest.fail(f"wrong output: relative error {error:.1e}, limit {limit:.0e}", wrong=True)
            return False
        contest.row = replace(contest.row, error=max(error, contest.row.error or 0.0))
        return True


def _prepare(
    gpu: Gpu, cell: Cell, contender: Contender, inputs: Inputs, check: _Check, stack: ExitStack,
    progress: Callable[[str], None],
) -> _Contest:  # fmt: skip
    progress(contender.title)
    contest = _Contest(contender, None, Row(contender.key, contender.title))

    def start() -> None:
        prepared = contender.prepare(cell, inputs)
        stack.callback(prepared.close)
        contest.prepared = prepared
        contest.row = replace(contest.row, variant=prepared.variant)
        with prepared.active():
            prepared.launch(0)
        if check.passes(contest, prepared, 0):
            with prepared.active():
                first = statistics.median(gpu.cold_us(lambda: prepared.launch(0), prepared.stream, 3))
            contest.count = launches_of(first, TURN_US, FEWEST, MOST)

    _guarded(contest, start)
    return contest


def _take_turn(gpu: Gpu, contest: _Contest, number: int) -> None:
    """A turn of a round, all of whose launches read one set of inputs."""
    prepared = contest.prepared
    assert prepared is not None
    index = number % prepared.sets
    if number == len(contest.rounds):
        contest.rounds.append([])
    with prepared.active():
        contest.rounds[number] += gpu.cold_us(lambda: prepared.launch(index), prepared.stream, contest.count)


def _finish(gpu: Gpu, contest: _Contest, check: _Check) -> None:
    """The times on the host and as a graph; and the check of what the timed launches left behind."""
    prepared = contest.prepared
    assert prepared is not None
    us = middle(contest.rounds)
    last = (ROUNDS - 1) % prepared.sets
    if not check.passes(contest, prepared, last):
        return
    host = []
    with prepared.active():
        for _ in range(HOST_ROUNDS):
            gpu.synchronize()
            host.append(gpu.host_us(lambda: prepared.launch(0), launches_of(us, HOST_US, HOST_FEWEST, HOST_CALLS)))
        gpu.synchronize()
    contest.row = replace(contest.row, us=us, noise=noise(contest.rounds), host_us=statistics.median(host))
    try:
        with prepared.active():
            replay = prepared.capture()
            graph = statistics.median(gpu.cold_us(replay, prepared.stream, TURNS * contest.count))
    except FAILURES as error:
        contest.row = replace(contest.row, missing=f"no CUDA graph: {_first_line(error)}")
        return
    if check.passes(contest, prepared, 0):
        contest.row = replace(contest.row, graph_us=graph)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
