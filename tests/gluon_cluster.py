"""Clusters for the emulator of Gluon: the programs along x of the grid run side by side, and put values into the shared
memory of each other.

The programs take the place of the partitions in gluon_emulator.py: one seed is one interleaving of them. Values that
are put come in any order and as late as the barrier that counts their bytes allows; until then shared memory holds NaN.
To put into a program that has not said that it runs, or has ended, is an error, as it is to put twice into one place.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from gluon_emulator import Machine, scalar
from gluon_values import FP32, Barrier, CachePolicy, Copy, Descriptor, DType, Shared, Tensor, tensor

ADDRESS = 0x8000  # of the room that a kernel's assembly sets aside, in every program

ROOM = re.compile(r"\{ \.shared \.align 1024 \.b8 (\w+)\[(\d+)\]; mov\.u32 \$0, \1; \} // \$1")
PREPARE = (
    "{ .reg .pred first; setp.eq.s32 first, $3, 0; @first mbarrier.init.shared::cta.b64 [$1], 1;"
    " @first mbarrier.arrive.expect_tx.shared::cta.b64 _, [$1], $2; @first fence.mbarrier_init.release.cluster;"
    " barrier.cluster.arrive.relaxed.aligned; mov.b32 $0, $3; }"
)
JOIN = "barrier.cluster.wait.acquire.aligned; mov.b32 $0, $1;"
PUT = (
    "{ .reg .pred p, own; .reg .u32 there, counter; setp.eq.s32 p, $10, 1; setp.eq.s32 own, $10, 2;"
    " mapa.shared::cluster.u32 there, $2, $6;"
    " mapa.shared::cluster.u32 counter, $4, $6;"
    " @p st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [there], {$8, $9}, [counter];"
    " @own st.shared.v2.b32 [$2], {$8, $9}; mov.b32 $0, 0; mov.b32 $1, 0; }"
)
RECEIVE = (
    "{ .reg .pred done; again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [$1], 0;"
    " @!done bra again; mov.b32 $0, $2; }"
)
GET = "ld.shared.f32 $0, [$1];"


class Room:
    """What a program of the cluster has in shared memory for the others: words, and one barrier among them."""

    def __init__(self, size: int) -> None:
        assert size % 1024 == 0, "what Triton allocates behind it would not begin at a multiple of 1024 bytes"
        self.words = np.full(size // 4, np.nan, np.float32).view(np.int32)
        self.filled = np.zeros(size // 4, bool)
        self.barrier: Barrier | None = None
        self.barrier_address = -1
        self.stored = False  # by the program itself, whose threads have not met since

    def place(self, addresses: Any) -> Any:
        """Indices of words."""
        offsets = np.asarray(addresses, np.int64) - ADDRESS
        assert (offsets % 4 == 0).all(), "an address is not aligned"
        assert ((offsets >= 0) & (offsets // 4 < self.words.size)).all(), "an address is outside of the room"
        assert not np.isin(offsets // 8, (self.barrier_address - ADDRESS) // 8).any(), "the barrier is overwritten"
        return offsets // 4

    def prepare(self, address: int, size: int) -> None:
        assert address % 8 == 0
        self.place([address, address + 4])
        self.barrier, self.barrier_address = Barrier(), address
        self.barrier.count, self.barrier.bytes = 1, size
        self.barrier.settle()  # at once, where no bytes are expected

    def come(self, places: Any, values: Any) -> None:
        """Values that were put arrive, and are counted."""
        assert self.barrier is not None
        self.words[places], self.filled[places] = values, True
        self.barrier.bytes -= 4 * len(places)
        assert self.barrier.bytes >= 0, "more bytes come than were expected"
        self.barrier.settle()


class ClusterMachine(Machine):
    """One cluster of programs at a time."""

    def launch(
        self, kernel: Callable[..., None], grid: tuple[int, int, int], *arguments: Any, **constants: Any
    ) -> None:
        """Run a grid of clusters along its x; arguments as those of :func:`gluon_emulator.launch`."""
        self.grid = grid
        given = [scalar(argument) for argument in arguments]
        for z in range(grid[2]):
            for y in range(grid[1]):
                self.cluster = y, z
                self.rooms: dict[int, Room] = {}
                self.ready: set[int] = set()
                self.gone: set[int] = set()
                self.loading: set[tuple[int, int]] = set()  # programs, and barriers that none has waited for yet
                self.run([partial(self._program, partial(kernel, *given, **constants))] * grid[0])
                self.end()

    def place(self, axis: int) -> int:
        return (self.local.me, *self.cluster)[axis]

    def extent(self, axis: int) -> int:
        return self.grid[axis]

    def _program(self, kernel: Callable[[], None]) -> None:
        kernel()
        me = self.local.me
        assert not any(copy.program == me for copy in self.copies), "a program ends before what it is sent has come"
        groups = [*self.local.groups, self.local.asked]
        assert not any(some for group in groups for _, _, some in group), "a program does not wait for what it copies"
        assert not any(program == me for program, _ in self.loading), "a program does not wait for what it loads"
        self.gone.add(me)

    def load_box(
        self,
        descriptor: Descriptor,
        coordinates: Any,
        barrier: Any,
        target: Shared,
        pred: Any = True,
        cache_policy: CachePolicy | None = None,
    ) -> None:
        if pred:
            self.loading.add((self.local.me, id(barrier.array[0])))
        super().load_box(descriptor, coordinates, barrier, target, pred, cache_policy)

    def wait(self, barrier: Any, parity: Any) -> None:
        super().wait(barrier, parity)
        self.loading.discard((self.local.me, id(barrier.array[0])))

    def inline_asm(self, asm: str, constraints: str, arguments: Sequence[Any], *, dtype: DType, **options: Any) -> Any:
        text = " ".join(asm.split()).replace("bar.warp.sync 0xFFFFFFFF; ", "")  # here, all threads are one
        if found := ROOM.fullmatch(text):
            self.rooms[self.local.me] = Room(int(found[2]))
            return tensor(ADDRESS, np.int32)
        known = {PREPARE: self._prepare, JOIN: self._join, PUT: self._put, RECEIVE: self._receive, GET: self._get}
        if text in known:
            return known[text](*np.broadcast_arrays(*(np.asarray(argument) for argument in arguments)))
        return super().inline_asm(asm, constraints, arguments, dtype=dtype, **options)

    def _prepare(self, address: Any, size: Any, thread: Any) -> Tensor:
        (first,) = np.flatnonzero(thread == 0)
        self.rooms[self.local.me].prepare(int(address[first]), int(size[first]))
        self.ready.add(self.local.me)
        self.switch()
        return tensor(thread)

    def _join(self, thread: Any) -> Tensor:
        self.switch(lambda: len(self.ready) == self.grid[0])
        return tensor(thread)

    def _put(self, address: Any, barrier: Any, rank: Any, value: Any, really: Any) -> Tensor:
        # One store for two columns, of which it reads the first's address, program and condition.
        assert (address[..., 1::2] == address[..., ::2] + 4).all(), "a pair does not lie side by side"
        assert (address[..., ::2] % 8 == 0).all(), "a pair is misaligned"
        assert all((x[..., 1::2] == x[..., ::2]).all() for x in (barrier, rank, really)), "a pair is torn"
        assert np.isin(really, (0, 1, 2)).all()
        if (really == 2).any():
            self._store(address[really == 2], value[really == 2])
        for target in map(int, np.unique(rank[really == 1])):
            assert self.grid[0] > 1, "a program without a cluster sends itself something"
            assert 0 <= target < self.grid[0], "there is no such program in the cluster"
            assert target in self.ready, "values are put into a program that may not run yet"
            assert target not in self.gone, "values are put into a program that has ended"
            room, chosen = self.rooms[target], (really == 1) & (rank == target)
            assert (barrier[chosen] == room.barrier_address).all(), "there is no barrier to count what is put"
            places, values = room.place(address[chosen]), value[chosen]
            assert np.unique(places).size == places.size, "two values are put into one place"
            assert not room.filled[places].any(), "two values are put into one place"
            mixed = list(range(len(places)))
            self.random.shuffle(mixed)
            cut = self.random.randint(0, len(places))
            for part in filter(None, (mixed[:cut], mixed[cut:])):
                self.copies.append(Copy(target, partial(room.come, places[part], values[part])))
        self.switch()
        return tensor(np.zeros(address.shape), np.int32)

    def _store(self, address: Any, value: Any) -> None:
        room = self.rooms[self.local.me]
        places = room.place(address)
        assert np.unique(places).size == places.size, "two values are stored in one place"
        assert not room.filled[places].any(), "two values are stored in one place"
        room.words[places], room.filled[places], room.stored = value, True, True

    def barrier(self) -> None:
        super().barrier()
        if self.local.me in self.rooms:
            self.rooms[self.local.me].stored = False

    def _receive(self, address: Any, thread: Any) -> Tensor:
        room = self.rooms[self.local.me]
        assert room.barrier is not None
        assert (address == room.barrier_address).all()
        self.switch(lambda: room.barrier.phase == 1)
        return tensor(thread)

    def _get(self, address: Any) -> Tensor:
        room = self.rooms[self.local.me]
        assert not room.stored, "threads read what others of the program may not have stored yet"
        return tensor(room.words[room.place(address)].view(FP32.numpy))
