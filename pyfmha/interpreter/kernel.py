"""Runs any Triton kernel on the CPU, under Triton's interpreter, on numpy arrays and without PyTorch.

Triton decides once, when it is imported, whether kernels are compiled or interpreted (``TRITON_INTERPRET=1``). So
there are two ways in: :func:`run_interpreted` for a process that interprets, and
:func:`pyfmha.interpreter.process.run_in_subprocess` for any other, which hands the work to a process of its own.

Triton's interpreter gets bfloat16 wrong; while a kernel runs here, :func:`pyfmha.bfloat16.exact_bfloat16` mends that.
"""

import os
import sys
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pyfmha.bfloat16 import exact_bfloat16
from pyfmha.errors import InterpreterError, KernelSourceError
from pyfmha.interpreter.constants import constants_beside_tensors
from pyfmha.interpreter.libdevice import libdevice_by_numpy
from pyfmha.interpreter.loading import load_module
from pyfmha.interpreter.speed import less_work
from pyfmha.spec.absent import compared_with_none
from pyfmha.spec.advice import install_command

Array = npt.NDArray[Any]

# dtype name: how numpy stores it, and what PyTorch calls it, which is how Triton recognises a tensor's type
_DTYPES: dict[str, tuple[str, str]] = {
    "fp16": ("float16", "float16"),
    "bf16": ("uint16", "bfloat16"),
    "fp32": ("float32", "float32"),
    "fp64": ("float64", "float64"),
    "i1": ("bool", "bool"),
    **{f"i{bits}": (f"int{bits}", f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"u{bits}": (f"uint{bits}", f"uint{bits}") for bits in (8, 16, 32, 64)},
}
_NAME_OF = {storage: name for name, (storage, _) in _DTYPES.items() if name != "bf16"}


@dataclass(frozen=True, eq=False)
class Tensor:
    """An array as a kernel sees it: a pointer to its element ``offset``, of type ``dtype``.

    Attributes:
        array: C-contiguous storage, read and written in place; uint16 for bf16.
        dtype: Triton's name: fp16, bf16, fp32, fp64, i1, i8 ... i64, u8 ... u64.
        offset: elements before the one pointed to. Lets a test surround a tensor with guard elements.
    """

    array: Array
    dtype: str
    offset: int = 0

    def __post_init__(self) -> None:
        _check_dtype(self.dtype)
        storage = _DTYPES[self.dtype][0]
        if self.array.dtype != storage:
            raise InterpreterError(f"{self.dtype} is stored as {storage}, got an array of {self.array.dtype}")
        if not self.array.flags.c_contiguous:
            raise InterpreterError("the array is not C-contiguous: pass numpy.ascontiguousarray(array)")
        if not 0 <= self.offset <= self.array.size:
            raise InterpreterError(f"offset {self.offset} is outside an array of {self.array.size} elements")


@dataclass(frozen=True)
class Null:
    """A null pointer to elements of type ``dtype``, one of :class:`Tensor`'s. A kernel may test it, not follow it.

    To a kernel that compares the parameter with None it is None.
    """

    dtype: str

    def __post_init__(self) -> None:
        _check_dtype(self.dtype)


def _check_dtype(dtype: str) -> None:
    if dtype not in _DTYPES:
        raise InterpreterError(f"unknown dtype {dtype!r}: use one of {', '.join(_DTYPES)}")


@dataclass(frozen=True)
class FunctionOf:
    """A compile-time parameter that is a ``@triton.jit`` function.

    Attributes:
        path: the Python file that holds it.
        attribute: where it is there: ``"alibi"``, or ``"alibi.score"`` for an attribute of an object.
    """

    path: str
    attribute: str


Argument = Tensor | Null | Array | int | float | tuple["Tensor | Null | Array | int | float", ...]
Constant = int | float | bool | str | None | FunctionOf


def run_interpreted(
    path: str | os.PathLike[str],
    kernel_name: str,
    grid: tuple[int, ...],
    args: Mapping[str, Argument],
    constexprs: Mapping[str, Constant] | None = None,
    *,
    optional: Collection[str] = (),
) -> None:
    """Runs a kernel in this process, which must interpret Triton; arrays are changed in place.

    Args:
        path: the Python file with the kernel.
        kernel_name: the function in it, decorated with ``triton.jit``.
        grid: one to three numbers of programs.
        args: by parameter name. A numpy array stands for a :class:`Tensor` of its own dtype; ints are i32, or i64
            where they need it, and floats fp32, as in a compiled kernel. A tuple is one of such.
        constexprs: the compile-time parameters by name.
        optional: arguments that are left out where the kernel has no such parameter: those that a grid reads.

    Raises:
        InterpreterError: Triton is missing or compiles in this process, an argument is unfit, or the kernel failed.
        KernelSourceError: the file cannot be imported or has no such kernel.
    """
    interpreter = _interpreter_module()
    kernel = _load_kernel(Path(path), kernel_name)
    if not isinstance(kernel, interpreter.InterpretedFunction):
        raise InterpreterError(_WRONG_MODE)
    compared = compared_with_none(kernel.fn)
    given: dict[str, Any] = {
        name: None if name in compared and isinstance(value, Null) else _convert(name, value, interpreter)
        for name, value in args.items()
    }
    for name, constant in (constexprs or {}).items():
        given[name] = _load_function(constant) if isinstance(constant, FunctionOf) else constant
    expected = list(kernel.arg_names)
    given = {name: value for name, value in given.items() if name in expected or name not in optional}
    if unknown := [name for name in given if name not in expected]:
        raise InterpreterError(f"{kernel_name} has no parameter {', '.join(unknown)}: it takes {', '.join(expected)}")
    # Overflow to infinity and NaN are a kernel's business, as on the GPU; numpy would warn of each.
    with (
        exact_bfloat16(interpreter), less_work(interpreter), libdevice_by_numpy(interpreter),
        constants_beside_tensors(), np.errstate(all="ignore"), warnings.catch_warnings(),
    ):  # fmt: skip
        warnings.simplefilter("ignore", RuntimeWarning)
        try:
            kernel[grid](**given)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # whatever a kernel raises, SystemExit included
            held = [one for one in (constexprs or {}).values() if isinstance(one, FunctionOf)]
            named = ", ".join(f"{one.attribute} of {Path(one.path).name}" for one in held)
            cause = error
            while isinstance(cause, interpreter.InterpreterError) and cause.__cause__ is not None:
                cause = cause.__cause__  # Triton's own hold one within another
            said = cause if cause is error else f"{type(cause).__name__}: {cause}"
            raise InterpreterError(
                f"{kernel_name}{' with ' * bool(named)}{named} failed under the interpreter: {said}"
            ) from error


_WRONG_MODE = (
    "Triton compiles kernels in this process, it does not interpret them: set TRITON_INTERPRET=1 before Triton is "
    "first imported, or use pyfmha.interpreter.process.run_in_subprocess"
)


def _interpreter_module() -> Any:
    """``triton.runtime.interpreter``, once it is sure that this process interprets."""
    # Not imported yet, and it would come up compiling: refuse before the import settles it for the whole process.
    if "triton" not in sys.modules and os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
        raise InterpreterError(_WRONG_MODE)
    try:
        import triton.language as tl
        import triton.runtime.interpreter as interpreter
    except ImportError as error:
        raise InterpreterError(f"Triton cannot be imported ({error}): {install_command('aot')}") from error
    # Triton's own library functions were decorated when it was imported, so their type tells the mode for certain.
    if not isinstance(tl.sum, interpreter.InterpretedFunction):
        raise InterpreterError(_WRONG_MODE)
    return interpreter


def _load_kernel(path: Path, kernel_name: str) -> Any:
    try:
        with path.open("rb"):
            module = load_module(path.resolve())
    except OSError as error:
        raise KernelSourceError(f"cannot read {path}: {error.strerror}") from error
    if not hasattr(module, kernel_name):
        raise KernelSourceError(f"{path} has no kernel {kernel_name!r}")
    found = getattr(module, kernel_name)
    while hasattr(getattr(found, "fn", None), "fn"):  # of an autotuner, or another wrapper
        found = found.fn
    return found


def _load_function(function: FunctionOf) -> Any:
    first, *rest = function.attribute.split(".")
    path = Path(function.path)
    if not path.is_file():
        raise KernelSourceError(f"{first} is of {path}, which is no file; write it to one, and import it from there")
    module = load_module(path.resolve())
    if not hasattr(module, first):
        raise KernelSourceError(f"{path} has no variable {first}; a function must be one of its file, by its own name")
    found = getattr(module, first)
    for name in rest:
        found = getattr(found, name)
    return found


def as_tensor(array: Array) -> Tensor:
    """An array as a :class:`Tensor` of its own dtype.

    Raises:
        InterpreterError: Triton has no type for it.
    """
    if array.dtype.name not in _NAME_OF:
        raise InterpreterError(f"no Triton type for a numpy array of {array.dtype}: use {', '.join(_NAME_OF)}")
    return Tensor(array, _NAME_OF[array.dtype.name])


def _convert(name: str, value: Argument, interpreter: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_convert(f"{name}[{i}]", one, interpreter) for i, one in enumerate(value))
    if isinstance(value, np.ndarray):
        value = as_tensor(value)
    if isinstance(value, Tensor):
        return _Pointer(value.dtype, value.array, value.offset)
    if isinstance(value, Null):
        return _Pointer(value.dtype, np.empty(0, _DTYPES[value.dtype][0]), None)
    if isinstance(value, bool | int | np.integer):
        return value if isinstance(value, bool) else int(value)
    if isinstance(value, float | np.floating):
        # The interpreter would leave a Python float as it is: double precision, and no tensor to take abs of.
        tl = interpreter.tl
        handle = interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)
    raise InterpreterError(f"argument {name} is a {type(value).__name__}: pass an array, a Tensor or a number")


class _TorchDtype:
    """What Triton reads of a PyTorch dtype: its name."""

    def __init__(self, name: str) -> None:
        self._name = f"torch.{name}"

    def __repr__(self) -> str:
        return self._name


_TORCH_DTYPES = {name: _TorchDtype(torch_name) for name, (_, torch_name) in _DTYPES.items()}


class _Pointer:
    """What the interpreter asks of a PyTorch tensor. It already is on the CPU, so every copy is the object itself."""

    def __init__(self, dtype: str, array: Array, offset: int | None) -> None:
        """A pointer to an element of an array, or to nothing where the offset is None."""
        self.dtype = _TORCH_DTYPES[dtype]
        self._array = array
        self._offset = offset

    def data_ptr(self) -> int:
        if self._offset is None:
            return 0
        return int(self._array.ctypes.data) + self._offset * self._array.itemsize

    def element_size(self) -> int:
        return self._array.itemsize

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self._array.shape

    def stride(self) -> tuple[int, ...]:
        return tuple(step // self.element_size() for step in self._array.strides)

    def untyped_storage(self) -> "_Pointer":
        return self

    def cpu(self) -> "_Pointer":
        return self

    def new_empty(self, *_: Any, **__: Any) -> "_Pointer":
        return self

    def set_(self, *_: Any) -> None:
        """Nothing to set: the copy is the original."""

    def copy_(self, _: Any) -> None:
        """Nothing to copy back: the kernel wrote to the array itself."""
