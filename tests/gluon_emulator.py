"""Runs a warp-specialised Gluon kernel on the CPU: its numbers, and whether its barriers hold.

Triton's interpreter has no Gluon. Here the kernel's file is executed with stand-ins for Triton's modules, each
partition of `warp_specialize` on a thread of its own. Only one thread runs at a time, and at every barrier, copy or
product a seeded random choice says which goes on, so that one seed is one interleaving, and a deadlock is noticed.

What is asynchronous on the GPU happens as late as the kernel's waits allow, or at a random moment before: TMA copies at
any time until their barrier completes, wgmma's reads of shared memory when the kernel waits for the product, TMA
stores' when it waits for the store. So a buffer that is freed too early, or read too early, gives wrong numbers.
Loads and stores through pointers are checked against the bounds of their arrays.

Not modelled: layouts, registers, proxies and fences, and that 128 threads make a warpgroup. Elements of bf16 and fp16
are held as float32 and rounded by `.to`.
"""

import random
import re
import threading
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pyfmha.bfloat16 import bf16_from_float, float_from_bf16


class Deadlock(Exception):
    """Every partition waits for a barrier."""


class DType:
    """A Gluon element type."""

    def __init__(self, name: str, numpy: Any) -> None:
        self.name = name
        self.numpy = np.dtype(numpy)

    def rounded(self, values: Any) -> Any:
        if self.name == "bf16":
            return float_from_bf16(bf16_from_float(np.asarray(values, np.float32)))
        if self.name == "fp16":
            with np.errstate(over="ignore"):
                return np.asarray(values).astype(np.float16).astype(np.float32)
        return np.asarray(values).astype(self.numpy)


FP16, BF16, FP32 = DType("fp16", np.float32), DType("bf16", np.float32), DType("fp32", np.float32)
INT32, INT64 = DType("i32", np.int32), DType("i64", np.int64)
DTYPES = {"fp16": FP16, "bf16": BF16}


class Tensor(np.ndarray):
    """A value of the kernel, scalars included; integer division rounds toward zero, as on the GPU."""

    def __array_wrap__(self, array: Any, context: Any = None, return_scalar: bool = False) -> "Tensor":
        return np.asarray(array).view(Tensor)

    def to(self, dtype: DType, bitcast: bool = False) -> "Tensor":
        plain = np.array(self)
        return tensor(plain.view(dtype.numpy) if bitcast else dtype.rounded(plain))

    def __floordiv__(self, other: Any) -> Any:
        quotient = np.abs(np.asarray(self)) // np.abs(np.asarray(other))
        return tensor(np.where((np.asarray(self) < 0) == (np.asarray(other) < 0), quotient, -quotient), self.dtype)

    def __rfloordiv__(self, other: Any) -> Any:
        return tensor(other, self.dtype) // self

    def __mod__(self, other: Any) -> Any:
        return self - (self // other) * other


def tensor(values: Any, dtype: Any = None) -> Tensor:
    return np.array(values, dtype).view(Tensor)


class Pointer:
    """Addresses within one array; null where there is none."""

    def __init__(self, array: Any, dtype: DType, offset: Any = 0) -> None:
        self.array = array
        self.dtype = types.SimpleNamespace(element_ty=dtype)
        self.offset = tensor(offset, np.int64)

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.array, self.dtype.element_ty, np.asarray(self.offset) + np.asarray(offset, np.int64))

    def __getitem__(self, key: Any) -> "Pointer":
        return Pointer(self.array, self.dtype.element_ty, self.offset[key])

    def to(self, dtype: DType) -> int:
        return 0 if self.array is None else 4096

    def at(self, mask: Any) -> tuple[Any, Any]:
        mask = np.broadcast_to(np.asarray(mask), self.offset.shape)
        used = np.asarray(self.offset)[mask]
        assert self.array is not None, "a null pointer is used"
        assert used.size == 0 or (used.min() >= 0 and used.max() < self.array.size), "an address is out of bounds"
        return mask, np.where(mask, np.asarray(self.offset), 0)


class Descriptor:
    """A TMA descriptor of an array of four dimensions with any strides."""

    def __init__(self, array: Any, dtype: DType, rows: int, columns: int) -> None:
        self.array = array
        self.dtype = dtype
        self.box = (1, 1, rows, columns)
        self.layout = "shared"

    def region(self, coordinates: Sequence[Any]) -> tuple[Any, Any]:
        """Slices of the array and of the box where they overlap."""
        starts = [int(c) for c in coordinates]
        array, box = [], []
        for start, length, size in zip(starts, self.box, self.array.shape, strict=True):
            low, high = max(start, 0), max(min(start + length, size), max(start, 0))
            array.append(slice(low, high))
            box.append(slice(low - start, high - start))
        return tuple(array), tuple(box)


class Shared:
    """A buffer in shared memory, or a part of one."""

    def __init__(self, array: Any, dtype: DType) -> None:
        self.array = array
        self.dtype = dtype

    def index(self, place: Any) -> "Shared":
        assert 0 <= int(place) < self.array.shape[0]
        return Shared(self.array[int(place)], self.dtype)

    def reshape(self, shape: Sequence[int]) -> "Shared":
        view = self.array.reshape(tuple(shape))
        assert np.shares_memory(view, self.array)
        return Shared(view, self.dtype)

    def permute(self, order: Sequence[int]) -> "Shared":
        return Shared(self.array.transpose(order), self.dtype)

    def store(self, value: Any) -> None:
        self.array[...] = value

    def load(self, layout: Any) -> Tensor:
        return tensor(self.array.copy())


class Barrier:
    """An mbarrier: a phase ends when all arrivals and all bytes expected have come."""

    def __init__(self) -> None:
        self.count = self.pending = self.bytes = self.phase = 0

    def settle(self) -> None:
        if self.count and self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.count


class Product:
    """A wgmma that has been issued."""

    def __init__(self, a: Any, b: Shared, acc: Any, use_acc: bool) -> None:
        self.operands = a, b, acc, use_acc
        self.value: Tensor | None = None

    def complete(self) -> None:
        a, b, acc, use_acc = self.operands
        left = np.asarray(a.array if isinstance(a, Shared) else a, np.float32)
        with np.errstate(invalid="ignore", over="ignore"):
            product = left @ np.asarray(b.array, np.float32)
            self.value = tensor(product + np.asarray(acc) if use_acc else product, np.float32)


class Machine:
    """One program (block) at a time, its partitions interleaved by a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.lock = threading.Condition()
        self.copies: list[Callable[[], None]] = []
        self.program, self.programs = 0, 1
        self.local = threading.local()
        self.named: dict[int, list[int]] = {}

    # ------------------------------------------------------------ scheduling

    def run(self, bodies: Sequence[Callable[[], None]]) -> None:
        self.waiting: dict[int, Callable[[], bool]] = {i: lambda: True for i in range(len(bodies))}
        self.current, self.failure = -1, None
        # Some interleavings need one partition, or the copies, to lag far behind the rest.
        self.copy_rate = self.random.choice([0.01, 0.1, 0.5, 0.9])
        self.pace = [self.random.choice([0.02, 0.3, 1.0]) for _ in bodies]
        threads = [threading.Thread(target=self._body, args=(i, body), daemon=True) for i, body in enumerate(bodies)]
        for thread in threads:
            thread.start()
        with self.lock:
            self._choose()
        for thread in threads:
            thread.join(timeout=60)
        if self.failure is not None:
            raise self.failure
        assert not any(thread.is_alive() for thread in threads)
        while self.copies:
            self.copies.pop()()

    def _body(self, me: int, body: Callable[[], None]) -> None:
        self.local.me, self.local.products, self.local.stores = me, [], []
        try:
            self._await_turn(me)
            with np.errstate(all="ignore"):  # a thread has its own
                body()
        except BaseException as error:
            with self.lock:
                self.failure = self.failure or error
        finally:
            with self.lock:
                self.waiting.pop(me, None)
                self._choose()

    def _await_turn(self, me: int) -> None:
        with self.lock:
            while self.current != me and self.failure is None:
                self.lock.wait()
            if self.failure is not None:
                raise SystemExit

    def _choose(self) -> None:
        while self.waiting and self.failure is None:
            ready = [i for i, condition in self.waiting.items() if condition()]
            if self.copies and (not ready or self.random.random() < self.copy_rate):
                self.copies.pop(self.random.randrange(len(self.copies)))()
                continue
            if not ready:
                self.failure = Deadlock(f"partitions {sorted(self.waiting)} of program {self.program} all wait")
                break
            self.current = self.random.choices(ready, [self.pace[i] for i in ready])[0]
            break
        self.lock.notify_all()

    def switch(self, condition: Callable[[], bool] = lambda: True) -> None:
        """Let another partition run, and come back when a condition holds."""
        me = getattr(self.local, "me", None)
        if me is None:  # outside of warp_specialize
            assert condition()
            return
        with self.lock:
            self.waiting[me] = condition
            self._choose()
        self._await_turn(me)

    # ------------------------------------------------------------ operations

    def wait(self, barrier: Any, parity: Any) -> None:
        self.switch(lambda: (barrier.array[0].phase & 1) != int(parity))

    def expect(self, barrier: Any, size: Any) -> None:
        barrier.array[0].bytes += int(size)
        barrier.array[0].pending -= 1
        barrier.array[0].settle()
        self.switch()

    def arrive(self, barrier: Any, count: int = 1) -> None:
        barrier.array[0].pending -= count
        assert barrier.array[0].pending >= 0, "more arrivals than a barrier counts"
        barrier.array[0].settle()
        self.switch()

    def load_box(self, descriptor: Descriptor, coordinates: Any, barrier: Any, target: Shared) -> None:
        assert target.array.shape == descriptor.box

        def copy() -> None:
            array, box = descriptor.region(coordinates)
            target.array[...] = 0
            target.array[box] = descriptor.array[array]
            barrier.array[0].bytes -= target.array.size * 2
            barrier.array[0].settle()

        self.copies.append(copy)
        self.switch()

    def store_box(self, descriptor: Descriptor, coordinates: Any, source: Shared) -> None:
        def copy() -> None:
            array, box = descriptor.region(coordinates)
            descriptor.array[array] = source.array[box]

        self.copies.append(copy)
        self.local.stores.append(copy)
        self.switch()

    def store_wait(self, pending: int) -> None:
        assert pending == 0
        for copy in self.local.stores:
            if copy in self.copies:
                self.copies.remove(copy)
                copy()
        self.local.stores = []
        self.switch()

    def product(self, a: Any, b: Shared, acc: Any, *, use_acc: bool = True, is_async: bool = False) -> Product:
        assert is_async
        issued = Product(a, b, acc, use_acc)
        self.local.products.append(issued)
        self.switch()
        return issued

    def product_wait(self, outstanding: int, deps: Sequence[Any]) -> Any:
        self.switch()
        products = self.local.products
        while len(products) > outstanding:
            products.pop(0).complete()
        values = [dep.value if isinstance(dep, Product) else dep for dep in deps]
        assert all(value is not None for value in values), "a product is read before it is complete"
        return values[0] if len(values) == 1 else tuple(values)

    def inline_asm(self, asm: str, _constraints: str, arguments: Sequence[Any], **_: Any) -> Any:
        if "st.shared" in asm:  # to hold the compiler back: it does nothing
            return arguments[0]
        found = re.fullmatch(r"bar\.(sync|arrive) (\d+), (\d+);", asm)
        assert found, asm
        arrived = self.named.setdefault(int(found[2]), [0, 0])  # warpgroups arrived, completions
        arrived[0] += 1
        if arrived[0] * 128 == int(found[3]):
            arrived[0], arrived[1] = 0, arrived[1] + 1
        elif found[1] == "sync":
            seen = arrived[1]
            self.switch(lambda: arrived[1] > seen)
            return arguments[0]
        self.switch()
        return arguments[0]


def _allocate(dtype: DType, shape: Sequence[int], layout: Any) -> Shared:
    if layout == "barrier":
        barriers = np.empty(shape, object)
        barriers.reshape(-1)[:] = [Barrier() for _ in range(barriers.size)]
        return Shared(barriers, dtype)
    # Shared memory holds anything at first.
    return Shared(np.full(shape, 0x5A5A5A5A if dtype is INT32 else np.nan, dtype.numpy), dtype)


def _init(barrier: Any, count: int) -> None:
    barrier.array[0].count = barrier.array[0].pending = count


def _load(pointer: Pointer, mask: Any = True, other: float = 0.0) -> Tensor:
    mask, offset = pointer.at(mask)
    return tensor(np.where(mask, pointer.array[offset], other), pointer.array.dtype)


def _store(pointer: Pointer, value: Any, mask: Any = True) -> None:
    mask, offset = pointer.at(mask)
    pointer.array[offset[mask]] = np.broadcast_to(np.asarray(value), mask.shape)[mask]


def _quiet(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **_: Any) -> Tensor:
        with np.errstate(all="ignore"):
            return tensor(function(*arguments))

    return call


def _extreme(whole: Any, floating: Any) -> Callable[..., Any]:
    return _quiet(lambda a, b: (whole if _result_type(a, b).kind == "i" else floating)(a, b))


def _language(machine: Machine) -> types.ModuleType:
    gl = types.ModuleType("triton.experimental.gluon.language")
    layouts = ("SliceLayout", "NVMMADistributedLayout", "DotOperandLayout", "BlockedLayout", "SwizzledSharedLayout")
    values: dict[str, Any] = {
        "constexpr": lambda value: value,
        "float16": FP16,
        "bfloat16": BF16,
        "float32": FP32,
        "int32": INT32,
        "int64": INT64,
        "program_id": lambda axis: tensor(machine.program, np.int32),
        "num_programs": lambda axis: tensor(machine.programs, np.int32),
        "static_range": range,
        "arange": lambda start, end, layout=None: tensor(np.arange(start, end), np.int32),
        "full": lambda shape, value, dtype, layout=None: tensor(np.full(shape, value), dtype.numpy),
        "zeros": lambda shape, dtype, layout=None: tensor(np.zeros(shape), dtype.numpy),
        "convert_layout": lambda value, layout, assert_trivial=False: value,
        "minimum": _extreme(np.minimum, np.fmin),
        "maximum": _extreme(np.maximum, np.fmax),
        "max": lambda x, axis: tensor(np.fmax.reduce(np.asarray(x), axis)),
        "sum": lambda x, axis: tensor(np.asarray(x).sum(axis, dtype=x.dtype)),
        "where": lambda c, a, b: tensor(np.where(*(np.asarray(x) for x in (c, a, b))), _result_type(a, b)),
        "exp2": _quiet(np.exp2),
        "log2": _quiet(np.log2),
        "abs": _quiet(np.abs),
        "load": _load,
        "store": _store,
        "inline_asm_elementwise": machine.inline_asm,
        "allocate_shared_memory": _allocate,
        "warp_specialize": lambda parts, warps, registers: machine.run(
            [lambda part=part: part[0](*part[1]) for part in parts]
        ),
        **{name: lambda *_, **__: "layout" for name in layouts},
    }
    vars(gl).update(values)
    return gl


def _result_type(*values: Any) -> Any:
    return np.result_type(*(value if isinstance(value, int | float) else np.asarray(value).dtype for value in values))


def _modules(machine: Machine) -> dict[str, types.ModuleType]:
    names = "triton", "triton.experimental", "triton.experimental.gluon"
    modules = {name: types.ModuleType(name) for name in names}
    gl = _language(machine)
    gluon: Any = modules["triton.experimental.gluon"]
    gluon.jit, gluon.language = lambda function: function, gl
    vars(modules["triton.experimental"])["gluon"] = gluon
    hopper: Any = types.ModuleType("hopper")
    hopper.fence_async_shared = lambda: None
    hopper.mbarrier = types.SimpleNamespace(
        MBarrierLayout=lambda: "barrier",
        init=_init,
        wait=machine.wait,
        expect=machine.expect,
        arrive=machine.arrive,
    )
    hopper.tma = types.SimpleNamespace(
        async_load=machine.load_box, async_store=machine.store_box, store_wait=machine.store_wait
    )
    hopper.warpgroup_mma, hopper.warpgroup_mma_wait = machine.product, machine.product_wait
    return {
        **modules,
        "triton.experimental.gluon.language": gl,
        "triton.experimental.gluon.language.nvidia": types.ModuleType("nvidia"),
        "triton.experimental.gluon.language.nvidia.hopper": hopper,
    }


def load_kernel(path: Path, machine: Machine) -> dict[str, Any]:
    """The names that a kernel's file defines, executed with the machine in the place of Triton."""
    modules = _modules(machine)

    def find(name: str, _globals: Any = None, _locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        return modules[name]

    namespace: dict[str, Any] = {"__builtins__": {**vars(__import__("builtins")), "__import__": find}}
    exec(compile(path.read_text(), str(path), "exec"), namespace)
    return namespace


def launch(machine: Machine, kernel: Callable[..., None], programs: int, *arguments: Any, **constants: Any) -> None:
    """Run all programs of a grid, one after the other. Integers are passed as int32, those above it as int64."""
    machine.programs = programs
    for machine.program in range(programs):
        machine.named.clear()
        with np.errstate(all="ignore"):
            kernel(*map(_scalar, arguments), **constants)


def _scalar(value: Any) -> Any:
    if isinstance(value, int):
        return tensor(value, np.int32)
    return tensor(value, np.float32) if isinstance(value, float) else value
