"""Runs a warp-specialised Gluon kernel on the CPU: its numbers, and whether its barriers hold.

Triton's interpreter has no Gluon. Here the kernel's file is executed with stand-ins for Triton's modules, each
partition of `warp_specialize` on a thread of its own. Only one thread runs at a time, and at every barrier, copy or
product a seeded random choice says which goes on, so that one seed is one interleaving, and a deadlock is noticed.

What is asynchronous on the GPU happens as late as the kernel's waits allow, or at a random moment before: TMA copies at
any time until their barrier completes, wgmma's reads of shared memory when the kernel waits for the product. A TMA
store reads shared memory at the latest when the kernel waits for that; what it read reaches global memory at the latest
when the kernel waits for all of the store, which may be never: then it does so when the program ends. So a buffer that
is freed too early, or read too early, gives wrong numbers. Loads and stores through pointers are checked against the
bounds of their arrays, and assembly does what its text says.

A product that the kernel does not wait for, because it returns complete, has read shared memory in the warp that goes
on, in the others at the next barrier: until then nothing may overwrite what it reads.

Not modelled: layouts, registers, that 128 threads make a warpgroup otherwise, and of fences only that there is one
between what a partition stores in shared memory and the TMA store or the product of it; before a product also a
barrier; and that a barrier follows what it loads from there before it arrives at an mbarrier, and a fence before that,
or behind the wait of the partition that has TMA overwrite it.
"""

import functools
import itertools
import random
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from gluon_ptx import (
    by_thread,
    kept_references,
    of_threads,
    of_warps,
    products_where,
    run_by_thread,
    run_ptx,
)
from gluon_values import (
    BARRIERS,
    BF16,
    E4M3,
    FP16,
    FP32,
    INT32,
    ITEM_SIZE,
    LARGEST,
    USES,
    CachePolicy,
    Copy,
    Descriptor,
    DType,
    Pointer,
    Product,
    Shared,
    Store,
    Tensor,
    converted,
    of_element,
    tensor,
)
from gluon_wgmma import Part, Products
from helpers import HANGS

from pyfmha.e4m3 import e4m3_from_float

ROWS_OF_WGMMA = 64


class Deadlock(Exception):
    """Every partition waits for a barrier."""


class Machine:
    """One program (block) at a time, its partitions interleaved by a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.copies: list[Copy | Store] = []
        self.copy_rate = 1.0
        self.program, self.programs, self.row = 0, 1, 0
        self.local = threading.local()
        self.named: dict[int, list[int]] = {}

    # ------------------------------------------------------------ scheduling

    def run(self, bodies: Sequence[Callable[[], None]]) -> None:
        self.waiting: dict[int, Callable[[], bool]] = {i: lambda: True for i in range(len(bodies))}
        self.failure: BaseException | None = None
        # Some interleavings need one partition, or the copies, to lag far behind the rest.
        self.copy_rate = self.random.choice([0.01, 0.1, 0.5, 0.9])
        self.pace = [self.random.choice([0.02, 0.3, 1.0]) for _ in bodies]
        self.turns = [threading.Lock() for _ in bodies]  # released by whoever gives its partition the turn
        for turn in self.turns:
            turn.acquire()
        threads = [threading.Thread(target=self._body, args=(i, body), daemon=True) for i, body in enumerate(bodies)]
        for thread in threads:
            thread.start()
        self.turns[self._choose()].release()
        for thread in threads:
            thread.join(timeout=HANGS)
        if self.failure is not None:
            raise self.failure
        assert not any(thread.is_alive() for thread in threads)

    def _body(self, me: int, body: Callable[[], None]) -> None:
        self.local.me, self.local.products, self.local.stores = me, [], []
        self.local.asked, self.local.groups = [], []
        self.turns[me].acquire()
        try:
            if self.failure is None:
                with np.errstate(all="ignore"):  # a thread has its own
                    body()
            del self.waiting[me]
            following = self._choose() if self.waiting else None
        except BaseException as error:
            self.failure = self.failure or error
            self.waiting.pop(me, None)
            following = next(iter(self.waiting), None)
        if following is not None:
            self.turns[following].release()

    def _choose(self) -> int:
        """Which partition goes on; after a failure any, which then ends."""
        while self.failure is None:
            ready = [i for i, condition in self.waiting.items() if condition()]
            if self.copies and (not ready or self.random.random() < self.copy_rate):
                self._copy()
            elif ready:
                return self._drawn(ready)
            else:
                self.failure = Deadlock(f"partitions {sorted(self.waiting)} of program {self.program} all wait")
        return next(iter(self.waiting))

    def _drawn(self, ready: Sequence[int]) -> int:
        """One of them, by their paces."""
        place = self.random.random() * sum(self.pace[i] for i in ready)
        for i in ready:
            place -= self.pace[i]
            if place < 0:
                return i
        return ready[-1]

    def _copy(self) -> None:
        """Let one of the copies under way get on."""
        copy = self.copies.pop(self.random.randrange(len(self.copies)))
        if isinstance(copy, Copy):
            copy.come()
        elif copy.taken is None:
            copy.take()
            self.copies.append(copy)
        else:
            copy.write()

    def end(self) -> None:
        """The program ends, and with it its shared memory, which nothing may need any more."""
        for copy in self.copies:
            assert not isinstance(copy, Copy), "the program ends before what it loads has come"
            assert copy.taken is not None, "the program ends before Out has left shared memory"
            copy.write()
        self.copies = []

    def place(self, axis: int) -> int:
        return (self.program, self.row)[axis]

    def extent(self, axis: int) -> int:
        assert axis == 0
        return self.programs

    def switch(self, condition: Callable[[], bool] = lambda: True) -> None:
        """Let another partition run, and come back when a condition holds."""
        me = getattr(self.local, "me", None)
        if me is None:  # outside of warp_specialize
            assert condition()
            return
        self.waiting[me] = condition
        following = self._choose()
        if self.failure is None and following != me:
            self.turns[following].release()
            self.turns[me].acquire()
        if self.failure is not None:
            raise SystemExit

    # ------------------------------------------------------------ operations

    def wait(self, barrier: Any, parity: Any) -> None:
        self.switch(lambda: (barrier.array[0].phase & 1) != int(parity))
        USES.told |= barrier.array[0].looked

    def expect(self, barrier: Any, size: Any, pred: Any = True) -> None:
        if not pred:
            return
        barrier.array[0].bytes += int(size)
        barrier.array[0].pending -= 1
        barrier.array[0].settle()
        self.switch()

    def arrive(self, barrier: Any, count: int = 1) -> None:
        USES.arrive(barrier.array[0])
        USES.meet()  # Gluon has one thread arrive, after a barrier of all
        barrier.array[0].pending -= count
        assert barrier.array[0].pending >= 0, "more arrivals than a barrier counts"
        barrier.array[0].settle()
        self.switch()

    def arrive_by_warps(self, barrier: Any) -> None:
        """Each of a partition's warps for itself: what others have loaded is not said."""
        USES.arrive(barrier.array[0])
        barrier.array[0].pending -= 4
        assert barrier.array[0].pending >= 0, "more arrivals than a barrier counts"
        barrier.array[0].settle()
        self.switch()

    def load_box(
        self,
        descriptor: Descriptor,
        coordinates: Any,
        barrier: Any,
        target: Shared,
        pred: Any = True,
        cache_policy: CachePolicy | None = None,
    ) -> None:
        _check_policy(cache_policy)
        if not pred:
            return
        target = target.reaching(descriptor.box)
        USES.load(target.array)

        def copy() -> None:
            array, box = descriptor.region(coordinates)
            target.array[...] = 0
            target.array[box] = descriptor.array[array]
            barrier.array[0].bytes -= target.array.size * ITEM_SIZE[target.dtype]
            barrier.array[0].settle()

        self.copies.append(Copy(getattr(self.local, "me", None), copy))
        self.switch()

    def store_box(
        self, descriptor: Descriptor, coordinates: Any, source: Shared, cache_policy: CachePolicy | None = None
    ) -> None:
        _check_policy(cache_policy)
        assert descriptor.array.shape[-1] % 8 == 0, "TMA stores 16 bytes or nothing: it would write past the rows"
        store = Store(descriptor, coordinates, source)
        self.copies.append(store)
        self.local.stores.append(store)
        self.switch()

    def store_wait(self, pending: int) -> None:
        """Until shared memory has been read, and no longer."""
        assert pending == 0
        for store in self.local.stores:
            store.take()
        self.switch()

    def await_stores(self) -> None:
        """Until they have reached global memory."""
        for store in self.local.stores:
            if store in self.copies:
                self.copies.remove(store)
                store.write()
        self.local.stores = []
        self.switch()

    def copy(self, target: Shared, pointer: Pointer, mask: Any = True) -> None:
        """By all threads of a program (cp.async): what the mask leaves out becomes 0. It comes when they wait for it,
        and is stored as their own stores are, by each thread for itself."""
        USES.overwrite(target.array)
        mask, offset = pointer.at(mask)
        target.array[...] = np.nan
        self.local.asked.append((target.array, np.where(mask, pointer.array[offset], 0), mask.any()))

    def copy_commit(self) -> None:
        self.local.groups.append(self.local.asked)
        self.local.asked = []

    def copy_wait(self, pending: int) -> None:
        """Until no more than so many of the last groups are under way."""
        while len(self.local.groups) > pending:
            for array, values, _ in self.local.groups.pop(0):
                array[...] = values
                USES.unfenced.append(array)
        self.switch()

    def product(self, a: Any, b: Shared, acc: Any, *, use_acc: bool = True, is_async: bool = False) -> Any:
        issued = Product(a, b, acc, use_acc)
        if not is_async:
            USES.multiply(*(operand.array for operand in (a, b) if isinstance(operand, Shared)))
            issued.complete()
            self.switch()
            return issued.value
        USES.visible(b.array)  # the other, where it is in shared memory, TMA loads over what was stored
        self.local.products.append(issued)
        self.switch()
        return issued

    def product_wait(self, outstanding: int, deps: Sequence[Any]) -> Any:
        self.switch()
        products = self.local.products
        while len(products) > outstanding:
            products.pop(0).complete()
        values = [dep.value if isinstance(dep, Product | Part) else dep for dep in deps]
        assert all(value is not None for value in values), "a product is read before it is complete"
        return values[0] if len(values) == 1 else tuple(values)

    def barrier(self) -> None:
        """Of all warps of a partition, or of a program without."""
        USES.barrier()
        self.switch()

    def named_barrier(self, number: int, threads: int, sync: bool) -> None:
        """A warpgroup comes to a barrier of the block, and waits there for the others if it is to."""
        arrived = self.named.setdefault(number, [0, 0])  # warpgroups arrived, completions
        arrived[0] += 1
        if arrived[0] * 128 == threads:
            arrived[0], arrived[1] = 0, arrived[1] + 1
        elif sync:
            seen = arrived[1]
            self.switch(lambda: arrived[1] > seen)
            return
        self.switch()

    def inline_asm(self, asm: str, constraints: str, arguments: Sequence[Any], *, dtype: Any, **_: Any) -> Any:
        of_machine, function, found = _known(asm)
        if of_machine:
            function(self, found)
            return arguments[0]
        if function is _all_of_a_thread:
            return _all_of_a_thread(found[0], constraints.count("="), dtype, *arguments)
        return function(found, dtype, *arguments)

    def inline_asm_of_threads(
        self,
        asm: Callable[..., str] | str,
        _constraints: Any,
        args: Sequence[Any],
        result: tuple[Any, ...] | None = None,
        is_pure: bool = False,
    ) -> Any:
        """Assembly of each thread's registers, made by a function: it loads from shared memory or stores there. Or,
        made already, products, and what warps do at a barrier by themselves."""
        if isinstance(asm, str) and "shfl" in asm:
            return _ways(asm, args, result)
        if isinstance(asm, str) and "mbarrier.arrive" in asm:
            return self.arrive_by_warps(*args)
        if isinstance(asm, str) and "mbarrier.try_wait" in asm:
            return self.wait(*args)
        if isinstance(asm, str) and "wgmma" not in asm:
            values = [part for value in args for part in by_thread(value).T]
            return tensor(of_threads(np.stack(run_ptx(asm, 2, values), 1), result[1]), np.float32)
        if isinstance(asm, str):
            products = Products(asm, args, result)
            self.local.products.append(products)
            self.switch()
            return tuple(products.parts)
        (shared,) = (value for value in args if isinstance(value, Shared))
        names = (f"${i}" for i in itertools.count())
        outputs = [] if result is None else [next(names) for _ in range(np.prod(result) // 128)]
        registers: dict[str, Any] = {}
        inputs = []
        for value in args:
            columns = np.zeros((1, 1), np.int32) if isinstance(value, Shared) else by_thread(value)
            inputs.append(tuple(next(names) for _ in range(columns.shape[1])))
            registers |= zip(inputs[-1], columns.T, strict=True)
        text = asm(() if result is None else (tuple(outputs),), tuple(inputs))
        if not re.search(r"\b(atom|red)\.", text):
            USES.exchange(shared.array, stored=result is None)
        run_by_thread(text, registers, shared.words())
        self.switch()
        if result is None:
            return None
        if len(result) == 1:  # a number for each thread
            return tensor(registers[outputs[0]], np.int32)
        return tensor(of_threads(np.stack([registers[name] for name in outputs], 1), result[1]), np.float32)

    def load(self, pointer: Pointer, mask: Any = True, other: float = 0.0) -> Tensor:
        self._lag()
        mask, offset = pointer.at(mask)
        return of_element(np.where(mask, pointer.array[offset], other), pointer.dtype.element_ty)

    def store(self, pointer: Pointer, value: Any, mask: Any = True, eviction_policy: str = "") -> None:
        assert eviction_policy in ("", "evict_first", "evict_last")
        self._lag()
        mask, offset = pointer.at(mask)
        pointer.array[offset[mask]] = np.broadcast_to(np.asarray(value), mask.shape)[mask]

    def _lag(self) -> None:
        outside = getattr(self.local, "me", None) is None
        if outside and self.copies and self.random.random() < self.copy_rate:
            self._copy()


def _check_policy(policy: Any) -> None:
    assert policy is None or isinstance(policy, CachePolicy), "what is cached how is not said by a CachePolicy"


def _hold(_found: Any, _dtype: Any, x: Tensor) -> Tensor:
    """A store that is never carried out, to hold the compiler back."""
    assert not (np.asarray(x) < 0).any(), "the store that should never be carried out is"
    return x


def _after(_found: Any, _dtype: Any, product: Tensor, zeros: Tensor, x: Tensor) -> Tensor:
    """x, or what of a product's bits a mask leaves: nothing."""
    assert isinstance(product, Tensor), "a product is read before it is complete"
    assert not np.asarray(zeros).any(), "what comes after a product is changed by it"
    return x


def _unpack(_found: Any, dtypes: tuple[DType, DType], packed: Tensor) -> tuple[Tensor, Tensor]:
    """The lower and the upper 16 bits of integers."""
    bits = np.asarray(packed).view(np.uint32)
    low, high = (of_element(dtypes[0].from_bits(half), dtypes[0]) for half in (bits & 0xFFFF, bits >> 16))
    return low, high


def _of_other_threads(found: Any, _dtype: Any, x: Tensor) -> Tensor:
    """What the thread holds that has another bit of its number: the last axis are the four that share a row."""
    assert x.shape[-1] == 4, "threads are not the last axis"
    return tensor(np.asarray(x)[..., np.arange(4) ^ int(found[1])], np.int32)


def _four_at_a_time(found: Any, dtype: DType, x: Tensor) -> Tensor:
    """Straight-line PTX of four values, which a thread holds, for four: here any four beside each other will do."""
    assert dtype is FP32
    parts = run_ptx(found[0], 4, list(np.asarray(x).reshape(-1, 4).T))
    return tensor(np.stack(parts, 1).reshape(x.shape), np.float32)


def _all_of_a_thread(asm: str, count: int, dtype: Any, x: Tensor, *others: Tensor) -> Any:
    """PTX of all values that a thread holds of [64, columns], as wgmma deals them out, or of so many beside each other;
    x in place, if the text reads it so."""
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
    assert all(each is FP32 for each in dtypes)
    held = count // len(dtypes)
    values = [np.broadcast_to(np.asarray(value), x.shape) for value in (x, *others)]
    of_wgmma = x.shape == (ROWS_OF_WGMMA, 2 * held)
    values = [by_thread(value) if of_wgmma else value.reshape(-1, held) for value in values]
    parts = np.stack(run_ptx(asm, count, [part for value in values for part in value.T], in_place=True), 1)
    results = [parts[:, i * held : (i + 1) * held] for i in range(len(dtypes))]
    made = [of_threads(result, 2 * held) if of_wgmma else result.reshape(x.shape) for result in results]
    found = tuple(tensor(result, np.float32) for result in made)
    return found if isinstance(dtype, tuple) else found[0]


THREADS = 128
"""Of a warpgroup."""


def _ways(asm: str, args: Sequence[Any], result: Sequence[tuple[int, ...]]) -> tuple[Tensor, ...]:
    """PTX of whole warps, of parts of products in place, two rows of a thread and scalars: parts, two of rows, and
    one."""
    parts = len(result) - 5
    products, (rows, sums, level, *scalars) = args[:parts], args[parts:]
    values = [register for part in products for register in by_thread(part).T]
    count = len(values)
    values += [*_of_rows(rows), *by_thread(sums).T, np.asarray(level, np.int32).view(np.float32)]
    values += [np.full(THREADS, x, np.float32) for x in scalars]
    found = run_ptx(asm, count + 9, values, warps=count)
    m, sums, alpha, due = (found[count + i : count + i + 2] for i in range(0, 8, 2))
    bits = [np.asarray(x, np.float32).view(np.int32) for x in (*due, found[-1])]
    ends = np.cumsum([shape[1] // 2 for shape in result[:parts]])
    weights = [
        of_threads(np.stack(found[end - shape[1] // 2 : end], 1), shape[1])
        for end, shape in zip(ends, result[:parts], strict=True)
    ]
    return (
        *(tensor(part, np.float32) for part in weights),
        tensor(_by_rows(m), np.float32),
        tensor(of_threads(np.stack(sums, 1), 4), np.float32),
        tensor(_by_rows(alpha), np.float32),
        tensor(_by_rows(bits[:2]), np.int32),
        tensor(bits[2], np.int32),
    )


def _of_rows(rows: Any) -> Any:
    """The two registers of each thread that has a number of each of its rows."""
    return by_thread(np.repeat(np.asarray(rows)[:, None], 4, 1)).T


def _by_rows(registers: Sequence[Any]) -> Any:
    """The opposite; threads that share a row must have the same."""
    found = of_threads(np.stack(registers, 1), 4)
    assert (found == found[:, :1]).all() | np.isnan(found).any(), "threads that share a row have different numbers"
    return found[:, 0]


def _narrow(found: Any, dtype: DType, x: Tensor, other: Tensor | None = None) -> Tensor:
    """Two values to 16 bits; the first operand goes to the upper half, which is the second value. Of two tensors, to
    integers that hold both."""
    wanted = FP16 if found[2] == "f16x2" else BF16
    largest = LARGEST[wanted] if found[1] else np.inf
    if other is not None:
        assert dtype is INT32
        operands = {name: np.clip(np.asarray(half), -largest, largest) for name, half in (("1", x), ("2", other))}
        high, low = (wanted.bits(operands[found[i]]).astype(np.uint32) for i in (3, 4))
        return tensor((high << 16 | low).view(np.int32), np.int32)
    assert dtype is wanted
    pairs = np.asarray(x).reshape(-1, 2)[:, [int(found[4]) - 1, int(found[3]) - 1]].reshape(x.shape)
    return converted(np.clip(pairs, -largest, largest), wanted)  # NaN stays NaN


def _moved(_found: Any, dtype: DType, x: Tensor) -> Tensor:
    """x; as e4m3, of four equal integers side by side in a thread the byte that is each one's."""
    if dtype is not E4M3:
        return x
    bits = np.asarray(x).view(np.uint32).reshape(*x.shape[:-2], 4)
    return of_element((bits >> np.arange(0, 32, 8, dtype=np.uint32) & 0xFF).astype(np.uint8).reshape(x.shape), E4M3)


def _kept(found: Any, _dtypes: Any, m: Tensor, m_new: Tensor) -> tuple[Tensor, Tensor]:
    references, due = kept_references(float(found[1]), m, m_new)
    return tensor(references, np.float32), tensor(due, np.int32)


def _grown(_found: Any, dtype: DType, m: Tensor, m_new: Tensor) -> Tensor:
    assert dtype is INT32
    return tensor(of_warps(np.asarray(m_new) > np.asarray(m)), np.int32)


def _four(_found: Any, dtype: DType, *weights: Tensor) -> Tensor:
    """Four values as e4m3, the first in the lowest byte."""
    assert dtype is INT32
    bits = sum(e4m3_from_float(weight).astype(np.uint32) << 8 * i for i, weight in enumerate(weights))
    return tensor(np.asarray(bits, np.uint32).view(np.int32), np.int32)


def _two(_found: Any, dtype: DType, *weights: Tensor) -> Tensor:
    """Two values as e4m3, the first in the lowest byte."""
    return _four(_found, dtype, *weights)


def _two_and_two(found: Any, dtype: DType, *arguments: Tensor) -> Tensor:
    """Two values and two that `_two` gives, where a flag says so, which it always does."""
    first, second, half, old, now = arguments
    assert np.shape(old) == np.shape(half)
    assert (np.asarray(now) != 0).all(), "weights are left as they were"
    count = np.size(half) // 128
    for i in range(count):
        low, high = f"low, ${2 * count + i}, ${count + i};", f"mov.b32 {{high, none}}, ${3 * count + i};"
        assert f"{low} {high} mov.b32 ${i}, {{low, high}};" in found[0], "other weights are packed"
    return tensor(np.asarray(_four(found, dtype, first, second)) | np.asarray(half) << 16, np.int32)


def _bytes(_found: Any, _dtype: Any, near: Tensor, far: Tensor) -> tuple[Tensor, Tensor]:
    """Of two keys side by side (the axis before the last) in each of two tensors: the lower bytes, the upper ones."""
    keys = [np.asarray(x).view(np.uint16)[:, first::2] for x in (near, far) for first in (0, 1)]
    results = []
    for shift in (0, 8):
        a, b, c, d = ((key >> shift) & 0xFF for key in keys)
        both = np.stack([a | b << 8, c | d << 8], 2).reshape(near.shape)
        results.append(tensor(both.astype(np.uint16).view(np.int16), np.int16))
    return results[0], results[1]


OF_MACHINE: dict[str, Callable[[Machine, re.Match[str]], None]] = {
    r"(bar\.sync 1[345], (32|64); )+mov\.b32 \$0, \$1;": lambda _machine, _found: None,  # of one partition alone
    r"bar\.(sync|arrive) (\d+), (\d+);": lambda machine, found: machine.named_barrier(
        int(found[2]), int(found[3]), found[1] == "sync"
    ),
    r"cp\.async\.bulk\.wait_group 0; mov\.b32 \$0, \$1;": lambda machine, _found: machine.await_stores(),
}
ASSEMBLY: dict[str, Callable[..., Any]] = {
    r"\{ \.reg \.f32 [^{}]* DONE: \}": _all_of_a_thread,
    r"\{ .*setp\.eq\.u32 p, both, 0x80000001; @p st\.shared\.b32 .* mov\.b32 \$0, \$2; mov\.b32 \$1, \$3; \}": _hold,
    r"shfl\.sync\.idx\.b32 \$0, \$1, 0, 31, -1;": lambda _found, _dtype, x: x,  # which all threads have
    r"shfl\.sync\.bfly\.b32 \$0, \$1, ([12]), 31, -1;": _of_other_threads,
    r"rcp\.approx\.ftz\.f32 \$0, \$1;": lambda _found, _dtype, x: tensor(1 / np.asarray(x), np.float32),
    r"\{ \.reg \.f32 [^{}]*\}": _four_at_a_time,
    r"lop3\.b32 \$0, \$1, \$2, \$3, 0xEA;": _after,
    r"mov\.b32 \{\$0, \$1\}, \$2;": _unpack,
    r"mov\.b32 \$0, \$1;": _moved,
    r"\{ \.reg \.pred grown; .* first, first, second; setp\.gt\.f32 grown, first, ([\d.]+);"
    r" vote\.sync\.any\.pred grown, grown, -1; .* \}": _kept,
    r"\{ \.reg \.pred due; .* SAME: \}": lambda found, _dtype, *x: tensor(products_where(found[0], *x), np.float32),
    r"\{ .* cvt\.rn\.satfinite\.e4m3x2\.f32 low, \$2, \$1; .* high, \$4, \$3; mov\.b32 \$0, \{low, high\}; \}": _four,
    r"\{ .* cvt\.rn\.satfinite\.e4m3x2\.f32 high, \$2, \$1; mov\.b16 none, 0; mov\.b32 \$0, \{high, none\}; \}": _two,
    r"\{ \.reg \.pred now; .* @!now bra\.uni LATER; .* LATER: \}": _two_and_two,
    r"\{ \.reg \.pred first, second; setp\.gt\.f32 first, \$4, \$2; setp\.gt\.or\.f32 second, \$5, \$3, first; "
    r"vote\.sync\.any\.pred second, second, -1; .* \}": _grown,
    r"prmt\.b32 \$0, \$2, \$3, 0x6420; prmt\.b32 \$1, \$2, \$3, 0x7531;": _bytes,
    re.escape(
        "{ .reg .pred p; .reg .b32 both, one; cvt.u32.u16 both, $2;"
        " and.b32 one, both, 0x00FF; setp.ne.u32 p, one, 0; selp.f32 $0, $3, 0fFF800000, p;"
        " and.b32 one, both, 0xFF00; setp.ne.u32 p, one, 0; selp.f32 $1, $4, 0fFF800000, p; }"
    ): lambda _found, _dtype, mask, x: tensor(np.where(np.asarray(mask) != 0, x, -np.inf), np.float32),
    r"cvt\.rn(\.satfinite)?\.(f16x2|bf16x2)\.f32 \$0, \$([12]), \$([12]);": _narrow,
}


@functools.cache
def _known(asm: str) -> tuple[bool, Callable[..., Any], re.Match[str]]:
    """Whether it is the machine that carries assembly out, what does, and its match.

    Raises:
        NotImplementedError: nothing does.
    """
    asm = " ".join(asm.split())
    for table in (OF_MACHINE, ASSEMBLY):
        for pattern, function in table.items():
            if found := re.fullmatch(pattern, asm):
                return table is OF_MACHINE, function, found
    raise NotImplementedError(f"the emulator does not know this assembly: {asm}")


def launch(
    machine: Machine, kernel: Callable[..., None], programs: int, *arguments: Any, rows: int = 1, **constants: Any
) -> None:
    """Run all programs of a grid, which may have several rows, one after the other. Integers are passed as int32, those
    above it as int64."""
    machine.programs = programs
    for machine.row, machine.program in itertools.product(range(rows), range(programs)):
        machine.named.clear()
        BARRIERS.clear()
        with np.errstate(all="ignore"):
            kernel(*map(scalar, arguments), **constants)
        machine.end()


def scalar(value: Any) -> Any:
    if isinstance(value, int):
        return tensor(value, np.int32)
    return tensor(value, np.float32) if isinstance(value, float) else value
