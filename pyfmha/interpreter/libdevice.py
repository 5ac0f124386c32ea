"""CUDA's libdevice by numpy, for functions that call ``libdevice.tanh`` and its kin.

Triton's interpreter has nothing for them: those of ``triton.language.extra.libdevice`` are empty, and give None.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from types import CodeType
from typing import Any

import numpy as np

from pyfmha.errors import InterpreterError


def _by_element(function: Callable[[float], float]) -> Callable[[Any], Any]:
    return lambda x: np.vectorize(function, otypes=[np.float64])(x)


def _to_nearest(x: Any) -> Any:
    """Halves away from 0."""
    return np.copysign(np.floor(np.abs(x) + 0.5), x)


_SAME = (
    "sin cos tan sinh cosh tanh exp exp2 expm1 log log2 log10 log1p sqrt cbrt floor ceil trunc rint hypot copysign fmod"
)
_INVERSE = "sin cos tan sinh cosh tanh"
FLOATS: dict[str, Callable[..., Any]] = {
    **{name: getattr(np, name) for name in _SAME.split()},
    **{f"a{name}": getattr(np, f"arc{name}") for name in _INVERSE.split()},
    "abs": np.abs,
    "atan2": np.arctan2,
    "pow": np.power,
    "exp10": lambda x: np.power(10.0, x),
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "rcbrt": lambda x: 1 / np.cbrt(x),
    "fma": lambda x, y, z: x * y + z,
    "fdim": lambda x, y: np.maximum(x - y, 0),
    "sinpi": lambda x: np.sin(np.pi * x),
    "cospi": lambda x: np.cos(np.pi * x),
    "saturatef": lambda x: np.clip(x, 0, 1),
    "nearbyint": np.rint,
    "round": _to_nearest,
    "erf": _by_element(math.erf),
    "erfc": _by_element(math.erfc),
    "add_rn": np.add,
    "sub_rn": np.subtract,
    "mul_rn": np.multiply,
    "div_rn": np.divide,
    "sqrt_rn": np.sqrt,
    "rcp_rn": np.reciprocal,
    "rsqrt_rn": lambda x: 1 / np.sqrt(x),
    "fma_rn": lambda x, y, z: x * y + z,
    **{f"fast_{name}f": getattr(np, name) for name in ("sin", "cos", "tan", "exp", "log", "log2", "log10")},
    "fast_exp10f": lambda x: np.power(10.0, x),
    "fast_powf": np.power,
    "fast_dividef": np.divide,
}
"""Of float32 or float64, with the same as their result."""
CONDITIONS: dict[str, Callable[..., Any]] = {
    "isnan": np.isnan,
    "isinf": np.isinf,
    "signbit": np.signbit,
    "finitef": np.isfinite,
    "isfinited": np.isfinite,
}
"""With an int32 as their result, 1 or 0."""


@contextmanager
def libdevice_by_numpy(interpreter: Any) -> Iterator[None]:
    """Within it, while one kernel runs, the functions of libdevice compute.

    Args:
        interpreter: the module ``triton.runtime.interpreter``, which this one does not import.
    """
    from triton.language.extra import libdevice
    from triton.language.extra.cuda import libdevice as of_cuda

    def called(name: str, arguments: Sequence[Any]) -> Any:
        return _result(interpreter, name, arguments)

    # The code of the empty ones, which a user's file may have imported by name; those for CUDA stand in their module.
    empty = {name: f for name, f in vars(libdevice).items() if inspect.isfunction(f)}
    codes = {name: function.__code__ for name, function in empty.items()}
    wrapped = {name: getattr(of_cuda, name) for name in (*FLOATS, *CONDITIONS) if hasattr(of_cuda, name)}
    vars(libdevice)[_CALLED] = called
    try:
        for name, function in empty.items():
            function.__code__ = _code(name)
        for name in wrapped:
            setattr(of_cuda, name, lambda *arguments, _name=name, **_: called(_name, arguments))
        yield
    finally:
        for name, function in empty.items():
            function.__code__ = codes[name]
        for name, function in wrapped.items():
            setattr(of_cuda, name, function)
        del vars(libdevice)[_CALLED]


_CALLED = "_called_of_pyfmha"


@cache
def _code(name: str) -> CodeType:
    """Of a function that calls what stands for one of libdevice."""
    names: dict[str, Any] = {}
    exec(f"def {name}(*arguments):\n    return {_CALLED}({name!r}, arguments)", names)
    code: CodeType = names[name].__code__
    return code


def _result(interpreter: Any, name: str, arguments: Sequence[Any]) -> Any:
    """What a function of libdevice gives for tensors and numbers.

    Raises:
        InterpreterError: it is not known here, or is given other tensors than of float32 or float64.
    """
    import triton.language as tl

    function = FLOATS.get(name) or CONDITIONS.get(name)
    if function is None:
        known = ", ".join(sorted((*FLOATS, *CONDITIONS)))
        raise InterpreterError(f"libdevice.{name} is not known to the interpreter; it knows {known}")
    tensors = [x for x in arguments if isinstance(x, tl.tensor)]
    kinds = [x.dtype.scalar for x in tensors]
    kind = tl.float64 if tl.float64 in kinds else tl.float32
    if other := [str(one) for one in kinds if one not in (tl.float32, tl.float64)]:
        raise InterpreterError(f"libdevice.{name} takes fp32 and fp64, given: {other[0]}; write x.to(tl.float32)")
    storage: Any = np.float64 if kind == tl.float64 else np.float32
    given = [np.asarray(x.handle.data if isinstance(x, tl.tensor) else getattr(x, "value", x)) for x in arguments]
    found = function(*(x.astype(storage) for x in given))
    if name in CONDITIONS:
        kind, storage = tl.int32, np.int32
    data = np.asarray(found).astype(storage)
    is_block = any(x.type.is_block() for x in tensors)
    handle = interpreter.TensorHandle(data, kind)
    return tl.tensor(handle, tl.block_type(kind, list(data.shape)) if is_block else kind)
