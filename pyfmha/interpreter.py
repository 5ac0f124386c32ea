"""Runs any Triton kernel on the CPU, under Triton's interpreter, on numpy arrays and without PyTorch.

Triton decides once, when it is imported, whether kernels are compiled or interpreted (``TRITON_INTERPRET=1``). So
there are two ways in: :func:`run_interpreted` for a process that interprets, and :func:`run_in_subprocess` for any
other, which hands the work to a Python process of its own.

Triton's interpreter gets bfloat16 wrong; while a kernel runs here, :func:`pyfmha.bfloat16.exact_bfloat16` mends that.
"""

import importlib
import importlib.util
import json
import operator
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pyfmha.bfloat16 import exact_bfloat16
from pyfmha.errors import InterpreterError, KernelSourceError, OutputError, PyfmhaError

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
        if self.dtype not in _DTYPES:
            raise InterpreterError(f"unknown dtype {self.dtype!r}: use one of {', '.join(_DTYPES)}")
        storage = _DTYPES[self.dtype][0]
        if self.array.dtype != storage:
            raise InterpreterError(f"{self.dtype} is stored as {storage}, got an array of {self.array.dtype}")
        if not self.array.flags.c_contiguous:
            raise InterpreterError("the array is not C-contiguous: pass numpy.ascontiguousarray(array)")
        if not 0 <= self.offset <= self.array.size:
            raise InterpreterError(f"offset {self.offset} is outside an array of {self.array.size} elements")


Argument = Tensor | Array | int | float
Constant = int | float | bool | str | None


def run_interpreted(
    path: str | os.PathLike[str],
    kernel_name: str,
    grid: tuple[int, ...],
    args: Mapping[str, Argument],
    constexprs: Mapping[str, Constant] | None = None,
) -> None:
    """Runs a kernel in this process, which must interpret Triton; arrays are changed in place.

    Args:
        path: the Python file with the kernel.
        kernel_name: the function in it, decorated with ``triton.jit``.
        grid: one to three numbers of programs.
        args: by parameter name. A numpy array stands for a :class:`Tensor` of its own dtype; ints are i32, or i64
            where they need it, and floats fp32, as in a compiled kernel.
        constexprs: the compile-time parameters by name.

    Raises:
        InterpreterError: Triton is missing or compiles in this process, an argument is unfit, or the kernel failed.
        KernelSourceError: the file cannot be imported or has no such kernel.
    """
    interpreter = _interpreter_module()
    kernel = _load_kernel(Path(path), kernel_name)
    if not isinstance(kernel, interpreter.InterpretedFunction):
        raise InterpreterError(_WRONG_MODE)
    given: dict[str, Any] = {name: _convert(name, value, interpreter) for name, value in args.items()}
    given.update(constexprs or {})
    expected = list(kernel.arg_names)
    if unknown := [name for name in given if name not in expected]:
        raise InterpreterError(f"{kernel_name} has no parameter {', '.join(unknown)}: it takes {', '.join(expected)}")
    # Overflow to infinity and NaN are a kernel's business, as on the GPU; numpy would warn of each.
    with exact_bfloat16(interpreter), np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        try:
            kernel[grid](**given)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # whatever a kernel raises, SystemExit included
            raise InterpreterError(f"{kernel_name} failed under the interpreter: {error}") from error


def run_in_subprocess(
    path: str | os.PathLike[str],
    kernel_name: str,
    grid: tuple[int, ...],
    args: Mapping[str, Argument],
    constexprs: Mapping[str, Constant] | None = None,
    *,
    python: str = sys.executable,
) -> None:
    """As :func:`run_interpreted`, in a fresh process of ``python``, whatever this process did with Triton.

    Raises:
        InterpreterError, KernelSourceError: as there; or an argument or constant cannot be handed to another process.
        OutputError: the temporary folder, which hands the arrays over, cannot be written.
    """
    arrays: dict[str, Array] = {}
    described: dict[str, Any] = {}
    for name, value in args.items():
        if isinstance(value, np.ndarray):
            value = _as_tensor(value)
        if isinstance(value, Tensor):
            # The same array under two names must stay one array over there.
            key = next((k for k, array in arrays.items() if array is value.array), f"array{len(arrays)}")
            arrays[key] = value.array
            described[name] = {"array": key, "dtype": value.dtype, "offset": value.offset}
        else:
            described[name] = _plain(value, int | float, f"argument {name}", "an array, a Tensor or a number")
    constants = {
        name: _plain(value, int | float | str | None, f"constant {name}", "a number, a text or None")
        for name, value in (constexprs or {}).items()
    }
    try:
        sizes = [operator.index(size) for size in grid]
    except TypeError:
        raise InterpreterError(f"grid is {grid!r}: pass one to three integers") from None
    job = {"path": os.path.abspath(path), "kernel": kernel_name, "grid": sizes, "args": described,
           "constexprs": constants}  # fmt: skip
    try:
        with tempfile.TemporaryDirectory(prefix="pyfmha-") as folder:
            Path(folder, "job.json").write_text(json.dumps(job))
            np.savez(Path(folder, "in.npz"), **arrays)  # type: ignore[arg-type]  # numpy's stub misreads **
            _run_worker(python, Path(folder))
            with np.load(Path(folder, "out.npz")) as results:
                for key, array in arrays.items():
                    if array.flags.writeable:
                        array[...] = results[key]
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(_NO_FOLDER.format(error)) from error


def _plain(value: object, kinds: Any, what: str, wanted: str) -> Any:
    """A value that JSON holds; numpy's numbers become Python's."""
    value = value.item() if isinstance(value, np.generic) else value
    if not isinstance(value, kinds):
        raise InterpreterError(f"{what} is a {type(value).__name__}: pass {wanted}")
    return value


_NO_FOLDER = (
    "the interpreter's arrays cannot go through a temporary folder: {} (is the disk full? TMPDIR names another folder)"
)

# Not `-m`: that would look for every module in the current folder first, whatever lies there.
_START = "import sys; sys.path[:] = filter(None, sys.path); from pyfmha.interpreter import main; main()"


def _run_worker(python: str, folder: Path) -> None:
    """Run the job in ``folder``; raises where it leaves no result there."""
    parent = str(Path(__file__).resolve().parents[1])
    search = os.pathsep.join(filter(None, [parent, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": search}
    command = [python, "-c", _START, str(folder)]
    try:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            check=False,
        )  # fmt: skip
    except OSError as error:
        raise InterpreterError(f"{python} does not start: {error.strerror}") from None
    kind = message = ""
    with suppress(OSError, ValueError):  # not there, or the disk was too full for it
        kind, message = json.loads((folder / "error.json").read_text())
    if kind:
        known: dict[str, type[PyfmhaError]] = {e.__name__: e for e in (KernelSourceError, OutputError)}
        raise known.get(kind, InterpreterError)(message)
    if done.returncode != 0 or not (folder / "out.npz").is_file():
        said = done.stderr[-2000:].strip() or "nothing"
        raise InterpreterError(
            f"the interpreter's process ended with {done.returncode}, without a result; it said:\n{said}"
        )


def main() -> None:
    """The other side of :func:`run_in_subprocess`: does the job in the folder that the command line names."""
    folder = Path(sys.argv[1])
    try:
        try:
            _work(folder)
        except OSError as error:
            raise OutputError(_NO_FOLDER.format(error)) from error
    except PyfmhaError as error:
        sys.stderr.write(f"{error}\n")
        with suppress(OSError):
            (folder / "out.npz").unlink(missing_ok=True)  # half of it fills the disk
            (folder / "error.json").write_text(json.dumps([type(error).__name__, str(error)]))
        raise SystemExit(1) from None


def _work(folder: Path) -> None:
    job = json.loads((folder / "job.json").read_text())
    with np.load(folder / "in.npz") as stored:
        arrays = {key: stored[key] for key in stored.files}
    args = {
        name: Tensor(arrays[value["array"]], value["dtype"], value["offset"]) if isinstance(value, dict) else value
        for name, value in job["args"].items()
    }
    run_interpreted(job["path"], job["kernel"], tuple(job["grid"]), args, job["constexprs"])
    np.savez(folder / "out.npz", **arrays)


_WRONG_MODE = (
    "Triton compiles kernels in this process, it does not interpret them: set TRITON_INTERPRET=1 before Triton is "
    "first imported, or use pyfmha.interpreter.run_in_subprocess"
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
        raise InterpreterError(f"Triton cannot be imported ({error}): pip install 'pyfmha[aot]'") from error
    # Triton's own library functions were decorated when it was imported, so their type tells the mode for certain.
    if not isinstance(tl.sum, interpreter.InterpretedFunction):
        raise InterpreterError(_WRONG_MODE)
    return interpreter


def _load_kernel(path: Path, kernel_name: str) -> Any:
    try:
        with path.open("rb"):
            module = _load_module(path.resolve())
    except OSError as error:
        raise KernelSourceError(f"cannot read {path}: {error.strerror}") from error
    if not hasattr(module, kernel_name):
        raise KernelSourceError(f"{path} has no kernel {kernel_name!r}")
    return getattr(module, kernel_name)


# By path: what the file and those beside it that it imports were like, and the module. One is made only where they
# changed, since Triton keeps every kernel it has ever rewritten.
_modules: dict[Path, tuple[dict[str, tuple[int, int]], Any]] = {}


def _load_module(path: Path) -> Any:
    if path in _modules and all(_state(file) == state for file, state in _modules[path][0].items()):
        return _modules[path][1]
    spec = importlib.util.spec_from_file_location(f"_interpreted_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise KernelSourceError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    files = {str(path): _state(str(path))}
    with _importing_beside(path.parent, files):
        sys.modules[spec.name] = module  # dataclasses look their module up
        try:
            spec.loader.exec_module(module)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # whatever a kernel file raises, SystemExit included
            del sys.modules[spec.name]
            raise KernelSourceError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    _modules[path] = files, module
    return module


@contextmanager
def _importing_beside(folder: Path, files: dict[str, tuple[int, int]]) -> Iterator[None]:
    """Let a kernel file import what lies beside it, as a script may, and note that in ``files``.

    What it finds there is its own: the same name may mean another file to the next kernel.
    """
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        with suppress(ValueError):  # the kernel file took it off
            sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            file, top = getattr(sys.modules[name], "__file__", None), name.partition(".")[0]
            own = top not in before and (folder / top, folder / f"{top}.py")
            if file and own and (Path(file) == own[1] or own[0] in Path(file).parents):
                files[file] = _state(file)
                del sys.modules[name]


def _state(file: str) -> tuple[int, int]:
    try:
        stat = os.stat(file)
    except OSError:
        return 0, 0
    return stat.st_mtime_ns, stat.st_size


def _as_tensor(array: Array) -> Tensor:
    if array.dtype.name not in _NAME_OF:
        raise InterpreterError(f"no Triton type for a numpy array of {array.dtype}: use {', '.join(_NAME_OF)}")
    return Tensor(array, _NAME_OF[array.dtype.name])


def _convert(name: str, value: Argument, interpreter: Any) -> Any:
    if isinstance(value, np.ndarray):
        value = _as_tensor(value)
    if isinstance(value, Tensor):
        return _Pointer(value)
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

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = _TORCH_DTYPES[tensor.dtype]
        self._tensor = tensor

    def data_ptr(self) -> int:
        array = self._tensor.array
        return int(array.ctypes.data) + self._tensor.offset * array.itemsize

    def element_size(self) -> int:
        return self._tensor.array.itemsize

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self._tensor.array.shape

    def stride(self) -> tuple[int, ...]:
        return tuple(step // self.element_size() for step in self._tensor.array.strides)

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
