"""Stand-ins for the modules that a Gluon kernel imports, with a machine behind them: see gluon_emulator.py."""

import functools
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gluon_emulator import Machine, scalar
from gluon_values import (
    BARRIERS,
    BF16,
    E4M3,
    FP16,
    FP32,
    INT16,
    INT32,
    INT64,
    UINT8,
    USES,
    Barrier,
    CachePolicy,
    DType,
    FractionalEvictionPolicy,
    Shared,
    Tensor,
    plain_dtype,
    tensor,
)


def _allocate(dtype: DType, shape: Sequence[int], layout: Any) -> Shared:
    if layout == "barrier":
        barriers = np.empty(shape, object)
        barriers.reshape(-1)[:] = [Barrier() for _ in range(barriers.size)]
        BARRIERS.append(barriers)
        return Shared(barriers, dtype)
    # Shared memory holds anything at first.
    anything = {INT32: 0x5A5A5A5A, UINT8: 0x5A, E4M3: 0x7F}.get(dtype, np.nan)
    return Shared(np.full(shape, anything, dtype.numpy), dtype)


def _init(barrier: Any, count: int) -> None:
    barrier.array[0].count = barrier.array[0].pending = count


class _Int(int):
    """A constant of the kernel's file, of which a function that the compiler calls takes the value."""

    value = property(int)


class _Tuple(tuple):
    """The same of several."""

    value = property(tuple)


_CONSTANTS = {int: _Int, tuple: _Tuple}


def _constexpr_function(function: Any) -> Callable[..., Any]:
    made: dict[int, Callable[..., Any]] = {}  # by how many names the file has by then: it may not be read to its end

    def call(*arguments: Any) -> Any:
        count = len(function.__globals__)
        if count not in made:
            names = {
                name: _CONSTANTS.get(type(value), lambda same: same)(value)
                for name, value in function.__globals__.items()
            }
            names["__builtins__"] = __builtins__  # the compiler's own Python, where range is range
            made[count] = types.FunctionType(function.__code__, names)
        return made[count](*arguments)

    return call


def _where(condition: Any, a: Any, b: Any) -> Tensor:
    chosen = tensor(np.where(*(np.asarray(x) for x in (condition, a, b))), _result_type(a, b))
    elements = [value.element for value in (a, b) if isinstance(value, Tensor)]
    if elements and elements[0] is elements[-1]:
        chosen.element = elements[0]
    return chosen


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    assert x.ndim > 1, "a tensor is split along an axis besides others"
    assert x.shape[-1] == 2, "a tensor is split along its last axis, of two values"
    return x[..., 0], x[..., 1]


def _join(a: Tensor, b: Tensor) -> Tensor:
    assert a.shape == b.shape, "tensors of different shapes are joined"
    assert a.dtype is b.dtype, "tensors of different types are joined"
    joined = tensor(np.stack([a, b], -1))
    joined.element = a.element
    return joined


def _reduce(x: Tensor, axis: int, combine: Callable[[Any, Any], Any]) -> Tensor:
    return functools.reduce(combine, np.moveaxis(x, axis, 0))


def _scan(x: Tensor, axis: int, combine: Callable[[Any, Any], Any]) -> Tensor:
    assert x.ndim == 1
    assert axis == 0
    step = 1
    while step < len(x):  # in any order, as the GPU takes one of its own
        x = tensor(np.concatenate([x[:step], combine(x[:-step], x[step:])]), plain_dtype(x))
        step *= 2
    return x


def _of_numpy(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **_: Any) -> Tensor:
        result = function(*arguments)
        return result if type(result) is Tensor else tensor(result)

    return call


def _extreme(whole: Any, floating: Any) -> Callable[..., Any]:
    return _of_numpy(lambda a, b: (whole if _result_type(a, b).kind == "i" else floating)(a, b))


class _SharedLayout:
    """Of shared memory, which has no layout here."""

    def __init__(self, *_: Any) -> None:
        pass

    @staticmethod
    def get_default_for(*_: Any) -> str:
        return "layout"


def _language(machine: Machine) -> types.ModuleType:
    gl = types.ModuleType("triton.experimental.gluon.language")
    layouts = ("SliceLayout", "NVMMADistributedLayout", "DotOperandLayout", "BlockedLayout", "SwizzledSharedLayout")
    layouts += ("DistributedLinearLayout",)
    values: dict[str, Any] = {
        "constexpr": lambda value: value,
        "float16": FP16,
        "bfloat16": BF16,
        "float32": FP32,
        "float8e4nv": E4M3,
        "int16": INT16,
        "int32": INT32,
        "int64": INT64,
        "program_id": lambda axis: tensor(machine.place(axis), np.int32),
        "num_programs": lambda axis: tensor(machine.extent(axis), np.int32),
        "num_warps": lambda: 4,
        "static_range": range,
        "static_assert": _static_assert,
        "arange": lambda start, end, layout=None: tensor(np.arange(start, end), np.int32),
        "full": lambda shape, value, dtype, layout=None: tensor(np.full(shape, value), dtype.numpy),
        "zeros": lambda shape, dtype, layout=None: tensor(np.zeros(shape), dtype.numpy),
        "convert_layout": lambda value, layout, assert_trivial=False: value,
        "minimum": _extreme(np.minimum, np.fmin),
        "maximum": _extreme(np.maximum, np.fmax),
        "max": lambda x, axis: tensor(np.fmax.reduce(np.asarray(x), axis)),
        "reduce_or": lambda x, axis: tensor(np.bitwise_or.reduce(np.asarray(x), axis)),
        "associative_scan": _scan,
        "reduce": _reduce,
        "sum": lambda x, axis: tensor(np.asarray(x).sum(axis, dtype=np.asarray(x).dtype)),
        "where": _where,
        "to_tensor": lambda x: x if isinstance(x, Tensor) else scalar(x),
        "split": _split,
        "join": _join,
        "exp2": _of_numpy(np.exp2),
        "log2": _of_numpy(np.log2),
        "abs": _of_numpy(np.abs),
        "div_rn": _of_numpy(np.divide),
        "fma": _of_numpy(lambda a, b, c: np.float32(np.float64(a) * b + c)),
        "load": machine.load,
        "store": machine.store,
        "barrier": machine.barrier,
        "inline_asm_elementwise": machine.inline_asm,
        "inline_asm": machine.inline_asm_of_threads,
        "distributed_type": lambda dtype, shape, layout: tuple(shape),
        "allocate_shared_memory": _allocate,
        "warp_specialize": lambda parts, warps, registers: machine.run(
            [lambda part=part: part[0](*part[1]) for part in parts]
        ),
        "NVMMASharedLayout": _SharedLayout,
        **{name: lambda *_, **__: "layout" for name in layouts},
    }
    vars(gl).update(values)
    return gl


def _static_assert(holds: bool, message: str = "") -> None:
    assert holds, message


def _result_type(a: Any, b: Any) -> Any:
    return _common(_kind(a), _kind(b))


def _kind(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return plain_dtype(value)
    return type(value) if isinstance(value, int | float) else np.asarray(value).dtype


@functools.cache
def _common(*kinds: Any) -> Any:
    return np.result_type(*(kind() if isinstance(kind, type) else kind for kind in kinds))


def _modules(machine: Machine) -> dict[str, types.ModuleType]:
    names = "triton", "triton.experimental", "triton.experimental.gluon"
    modules = {name: types.ModuleType(name) for name in names}
    gl = _language(machine)
    gluon: Any = modules["triton.experimental.gluon"]
    gluon.jit, gluon.constexpr_function = lambda function: function, _constexpr_function
    gluon.language = gl
    vars(modules["triton.experimental"])["gluon"] = gluon
    ampere: Any = types.ModuleType("ampere")
    ampere.CachePolicy, ampere.FractionalEvictionPolicy = CachePolicy, FractionalEvictionPolicy
    ampere.async_copy = types.SimpleNamespace(
        async_load=machine.copy, commit_group=machine.copy_commit, wait_group=machine.copy_wait
    )
    hopper: Any = types.ModuleType("hopper")
    hopper.fence_async_shared = USES.fence
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
        "triton.experimental.gluon.language.nvidia.ampere": ampere,
        "triton.experimental.gluon.language.nvidia.hopper": hopper,
    }


def load_kernel(path: Path, machine: Machine) -> dict[str, Any]:
    """The names that a kernel's file defines, executed with the machine in the place of Triton; the kernels' files that
    it imports lie beside it."""
    return _load(path, _modules(machine))


def _load(path: Path, modules: dict[str, types.ModuleType]) -> dict[str, Any]:
    """The same, with modules to which those are added that it imports, each once however many import it."""

    def find(name: str, _globals: Any = None, _locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        if name == "typing":
            return __import__(name, fromlist=fromlist)
        if name not in modules:  # another kernel's
            modules[name] = types.ModuleType(name)
            vars(modules[name]).update(_load(path.with_name(f"{name}.py"), modules))
        return modules[name]

    builtins = {**vars(__import__("builtins")), "__import__": find, "range": _range}
    namespace: dict[str, Any] = {"__builtins__": builtins, "__name__": path.stem}
    exec(_compiled(_File(path.read_text(), path)), namespace)
    return namespace


@dataclass(frozen=True)
class _File:
    text: str
    path: Path = field(compare=False)


@functools.cache
def _compiled(file: _File) -> types.CodeType:
    """Once for all the times that tests load a file, copies of it, too: that takes longer than most of their
    launches."""
    return compile(file.text, str(file.path), "exec")


def _range(*bounds: Any) -> Iterator[Tensor]:
    """A loop of the kernel counts in int32."""
    return (tensor(i, np.int32) for i in range(*map(int, bounds)))
