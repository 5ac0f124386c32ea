"""Runs a kernel under Triton's interpreter in a Python process of its own: for those that compile, or do not care.

The arrays go there and back through files in a temporary folder.
"""

import json
import operator
import os
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from pyfmha.errors import InterpreterError, KernelSourceError, OutputError, PyfmhaError
from pyfmha.interpreter.kernel import Argument, Array, Constant, FunctionOf, Null, Tensor, as_tensor, run_interpreted

_NO_FOLDER = (
    "the interpreter's arrays cannot go through a temporary folder: {} (is the disk full? TMPDIR names another folder)"
)

_WITHIN = "PYFMHA_INTERPRETING"
"""Set in the process that interprets, and in those that it starts."""

# Not `-m`: that would look for every module in the current folder first, whatever lies there.
_START = "import sys; sys.path[:] = filter(None, sys.path); from pyfmha.interpreter.process import main; main()"


def run_in_subprocess(
    path: str | os.PathLike[str],
    kernel_name: str,
    grid: tuple[int, ...],
    args: Mapping[str, Argument],
    constexprs: Mapping[str, Constant] | None = None,
    *,
    optional: Collection[str] = (),
    python: str = sys.executable,
) -> None:
    """As :func:`pyfmha.interpreter.kernel.run_interpreted`, in a process of its own, whatever this one did to Triton.

    Raises:
        InterpreterError, KernelSourceError: as there; or an argument or constant cannot be handed to another process.
        OutputError: the temporary folder, which hands the arrays over, cannot be written.
    """
    with Interpreter(python) as interpreter:
        interpreter.run(path, kernel_name, grid, args, constexprs, optional=optional)


class Interpreter:
    """A process that interprets one kernel after the other, for which it starts and imports Triton once.

    Args:
        python: the program that runs Python.
    """

    def __init__(self, python: str = sys.executable) -> None:
        self._python = python
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "Interpreter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process, whatever it does; :meth:`run` would start another."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def run(
        self,
        path: str | os.PathLike[str],
        kernel_name: str,
        grid: tuple[int, ...],
        args: Mapping[str, Argument],
        constexprs: Mapping[str, Constant] | None = None,
        *,
        optional: Collection[str] = (),
    ) -> None:
        """As :func:`run_in_subprocess`, which says what is raised; after an error the process is another."""
        if os.environ.get(_WITHIN):
            raise InterpreterError(
                "a kernel is run while the file that it, or a function of it, is from is imported, which would go on"
                ' for ever; run it below `if __name__ == "__main__":`, or from another file'
            )
        arrays: dict[str, Array] = {}
        described: dict[str, Any] = {}
        for name, value in args.items():
            if isinstance(value, tuple):
                described[name] = {"tuple": [_described(f"{name}[{i}]", one, arrays) for i, one in enumerate(value)]}
            else:
                described[name] = _described(name, value, arrays)
        constants = {
            name: {"path": os.path.abspath(value.path), "attribute": value.attribute}
            if isinstance(value, FunctionOf)
            else _plain(value, int | float | str | None, f"constant {name}", "a number, a text or None")
            for name, value in (constexprs or {}).items()
        }
        try:
            sizes = [operator.index(size) for size in grid]
        except TypeError:
            raise InterpreterError(f"grid is {grid!r}: pass one to three integers") from None
        job = {"path": os.path.abspath(path), "kernel": kernel_name, "grid": sizes, "args": described,
               "constexprs": constants, "optional": sorted(optional)}  # fmt: skip
        try:
            with tempfile.TemporaryDirectory(prefix="pyfmha-") as folder:
                Path(folder, "job.json").write_text(json.dumps(job))
                np.savez(Path(folder, "in.npz"), **arrays)  # type: ignore[arg-type]  # numpy's stub misreads **
                self._have_done(Path(folder))
                with np.load(Path(folder, "out.npz")) as results:
                    for key, array in arrays.items():
                        if array.flags.writeable:
                            array[...] = results[key]
        except OutputError:
            raise
        except OSError as error:
            raise OutputError(_NO_FOLDER.format(error)) from error

    def _have_done(self, folder: Path) -> None:
        """Hand over the job in ``folder``; raises where that leaves no result there."""
        process = self._process = self._process or self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        said: list[str] = []
        try:
            with suppress(BrokenPipeError):  # it has ended, as is seen below
                process.stdin.write(f"{folder}\n")
                process.stdin.flush()
            for line in process.stdout:
                if line == f"{folder}\n":
                    return
                said.append(line)
            ended = process.wait()
        except BaseException:  # the user interrupts: nobody waits for what it does
            self.close()
            raise
        self.close()
        kind = message = ""
        with suppress(OSError, ValueError):  # not there, or the disk was too full for it
            kind, message = json.loads((folder / "error.json").read_text())
        if kind:
            known: dict[str, type[PyfmhaError]] = {e.__name__: e for e in (KernelSourceError, OutputError)}
            raise known.get(kind, InterpreterError)(message)
        raise InterpreterError(
            f"the interpreter's process ended with {ended}, without a result; it said:\n"
            f"{''.join(said)[-2000:].strip() or 'nothing'}"
        )

    def _started(self) -> "subprocess.Popen[str]":
        parent = str(Path(__file__).resolve().parents[2])
        search = os.pathsep.join(filter(None, [parent, os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": search, _WITHIN: "1"}
        try:
            return subprocess.Popen(
                [self._python, "-c", _START], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True, errors="replace",
            )  # fmt: skip
        except OSError as error:
            raise InterpreterError(f"{self._python} does not start: {error.strerror}") from None


def _described(name: str, value: Argument, arrays: dict[str, Array]) -> Any:
    """An argument as JSON holds it; its array is added to those that go along."""
    if isinstance(value, np.ndarray):
        value = as_tensor(value)
    if isinstance(value, Tensor):
        # The same array under two names must stay one array over there.
        key = next((k for k, array in arrays.items() if array is value.array), f"array{len(arrays)}")
        arrays[key] = value.array
        return {"array": key, "dtype": value.dtype, "offset": value.offset}
    if isinstance(value, Null):
        return {"array": None, "dtype": value.dtype}
    return _plain(value, int | float, f"argument {name}", "an array, a Tensor or a number")


def _plain(value: object, kinds: Any, what: str, wanted: str) -> Any:
    """A value that JSON holds; numpy's numbers become Python's."""
    value = value.item() if isinstance(value, np.generic) else value
    if not isinstance(value, kinds):
        raise InterpreterError(f"{what} is a {type(value).__name__}: pass {wanted}")
    return value


def main() -> None:
    """The other side of :class:`Interpreter`: does the jobs in the folders that it is told, and says which are done."""
    told, says = os.fdopen(os.dup(sys.stdin.fileno())), os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), sys.stdin.fileno())  # a kernel's file that reads has nothing to read
    for line in told:
        folder = Path(line.removesuffix("\n"))
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
        says.write(f"\n{folder}\n")  # a kernel may have begun a line
        says.flush()


def _work(folder: Path) -> None:
    job = json.loads((folder / "job.json").read_text())
    with np.load(folder / "in.npz") as stored:
        arrays = {key: stored[key] for key in stored.files}
    args = {name: _restored(value, arrays) for name, value in job["args"].items()}
    constants = {
        name: FunctionOf(**value) if isinstance(value, dict) else value for name, value in job["constexprs"].items()
    }
    run_interpreted(job["path"], job["kernel"], tuple(job["grid"]), args, constants, optional=job["optional"])
    np.savez(folder / "out.npz", **arrays)


def _restored(value: Any, arrays: Mapping[str, Array]) -> Argument:
    """An argument from how it was described: a number, or a pointer as a dict."""
    if not isinstance(value, dict):
        number: int | float = value
        return number
    if "tuple" in value:
        return tuple(_restored(one, arrays) for one in value["tuple"])  # type: ignore[misc]  # none in another
    if value["array"] is None:
        return Null(value["dtype"])
    return Tensor(arrays[value["array"]], value["dtype"], value["offset"])
