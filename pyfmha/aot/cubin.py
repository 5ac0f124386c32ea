"""Machine code: compile specs with Triton, in processes of their own and on any machine, with or without a GPU."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyfmha import errors
from pyfmha.aot.kernel_files import check_source
from pyfmha.aot.reasons import CAUSED, no_temporary_file
from pyfmha.aot.toolchain import check_triton
from pyfmha.errors import CompileError, KernelSourceError, OutputError
from pyfmha.spec.arch import ARCHS, Arch
from pyfmha.spec.constants import Constant, from_data, to_data
from pyfmha.spec.kernel import KernelSpec


@dataclass(frozen=True)
class Cubin:
    """One spec compiled for one architecture; fields as in :class:`pyfmha.spec.manifest.Image`.

    Attributes:
        code: the ELF image.
        symbol: the kernel's name in it.
        scratch: scratch pointers that the kernel takes after its own arguments: the first is its workspace's.
        workspace: bytes of global scratch that a block needs; where that is 0, no scratch pointer is read.
        workspace_align: of which the workspace must be a multiple.
        tensors: of each tensor descriptor, what its map is made with: ``swizzle`` and ``data_type`` as cuda.h numbers
            them, and ``box``, outermost first.
        source: SHA-256 of the kernel's file.
        dependencies: the user's files that it imported, relative to its folder, with their SHA-256.
        debug: whether device asserts are in the code.
    """

    arch: str
    code: bytes
    symbol: str
    threads: int
    shared: int
    registers: int
    spilled: int
    scratch: int
    workspace: int
    workspace_align: int
    tensors: list[dict[str, Any]]
    ptxas: str
    source: str
    dependencies: dict[str, str]
    debug: bool

    def source_digest(self) -> str:
        """Digest of everything the kernel was made of."""
        return hashlib.sha256(json.dumps([self.source, self.dependencies], sort_keys=True).encode()).hexdigest()

    def to_record(self) -> dict[str, Any]:
        """As JSON-ready data."""
        return {**vars(self), "code": base64.b64encode(self.code).decode()}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Cubin":
        """Back from :meth:`to_record`.

        Raises:
            KeyError, TypeError, ValueError: the record is damaged.
        """
        return cls(**{**record, "code": base64.b64decode(record["code"], validate=True)})


@dataclass(frozen=True)
class Parameters:
    """A kernel's parameters.

    Attributes:
        names: in order.
        defaults: their default values, where they have one that can be a constant.
        constexprs: those that are ``tl.constexpr``.
        functions: the other functions of its file that can be constants.
        configs: of its autotuner: what each sets, as Python would print it.
        heuristics: names that heuristics give values to.
        debug: whether its decorator says debug.
        compared: those that it compares with None.
    """

    names: tuple[str, ...]
    defaults: dict[str, Constant]
    constexprs: frozenset[str]
    functions: tuple[str, ...] = ()
    configs: tuple[dict[str, str], ...] = ()
    heuristics: tuple[str, ...] = ()
    debug: bool = False
    compared: tuple[str, ...] = ()


@dataclass(frozen=True)
class Settled:
    """What the wrappers around a kernel set.

    Attributes:
        constants: constants, by name.
        options: ``num_warps``, ``num_stages``, ``num_ctas`` and ``maxnreg``, those that are set.
        unknown: heuristics without a value, and why they have none.
        notes: what a caller must know.
    """

    constants: dict[str, Constant]
    options: dict[str, int]
    unknown: dict[str, str]
    notes: tuple[str, ...]


# Not `-m`: that would look for every module in the current folder first, whatever lies there.
_START = "import sys; sys.path[:] = filter(None, sys.path); from pyfmha.aot.worker import main; main()"


class _Worker:
    """One compiler process; see :mod:`pyfmha.aot.worker`."""

    def __init__(self, cache: str) -> None:
        environment = {
            key: value for key, value in os.environ.items() if not key.startswith(("TRITON_", "MLIR_", "LLVM_"))
        }
        environment |= {
            "TRITON_CACHE_DIR": cache,
            "TRITON_DISABLE_LINE_INFO": "1",  # most of a cubin's bytes, and the build folder's path in them
            "PYTHONHASHSEED": "0",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        # The folder that holds pyfmha, so that the worker runs this very copy of it.
        root = str(Path(__file__).resolve().parents[2])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            encoding="utf-8",
            errors="replace",  # what kernel files print may be anything
            start_new_session=True,  # a Ctrl-C is the parent's to handle
        )
        self.said: list[str] = []
        self._reader = threading.Thread(target=self._read_stderr, daemon=True)
        self._reader.start()

    def _read_stderr(self) -> None:
        assert self.process.stderr is not None
        with suppress(ValueError):  # closed by stop(), where an assembler outlived the process and held it open
            for line in self.process.stderr:
                self.said = [*self.said[-40:], line]

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except (BrokenPipeError, ValueError):
            line = ""
        if not line:
            code = self.process.wait()
            self._reader.join(timeout=5)
            raise KernelSourceError(
                f"the process compiling {request['source']} ended with exit code {code}"
                f" (kernel {request['kernel']}); it said:\n{''.join(self.said).strip() or 'nothing'}"
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise getattr(errors, answer["error"])(answer["message"])
        result: dict[str, Any] = answer["result"]
        return result

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join(timeout=5)  # it ends with the process; closing what it still reads would raise there
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                with suppress(BrokenPipeError):  # what was still to be written has no reader any more
                    stream.close()


class Compiler:
    """Compiles specs on several processes. A context manager: leaving it ends them.

    Args:
        jobs: processes at most; by default one for each CPU this process may use.
    """

    def __init__(self, jobs: int | None = None) -> None:
        self.jobs = jobs or len(os.sched_getaffinity(0))
        self._idle: list[_Worker] = []
        self._all: list[_Worker] = []
        self._lock = threading.Lock()

    def __enter__(self) -> "Compiler":
        check_triton()
        try:
            self._cache = tempfile.TemporaryDirectory(prefix="pyfmha-triton-")
        except OSError as error:
            raise OutputError(no_temporary_file(error.strerror or str(error))) from error
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._all:
            worker.stop()
        self._all.clear()
        self._idle.clear()
        self._cache.cleanup()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            worker = self._idle.pop() if self._idle else None
            if worker is None:
                worker = _Worker(self._cache.name)
                self._all.append(worker)
        try:
            return worker.ask(request)
        finally:
            with self._lock:
                if worker.process.poll() is None:
                    self._idle.append(worker)

    def describe(self, source: Path, kernel: str, arch: Arch = ARCHS["sm_80"]) -> Parameters:
        """The parameters of a kernel, and what its wrappers set.

        Args:
            source: the kernel's file.
            kernel: its name there.
            arch: the architecture that the file is told where it asks for the GPU.

        Raises:
            KernelSourceError: the file is missing, raises, or does not hold the kernel.
        """
        found = self._ask(
            {"task": "describe", "source": str(check_source(source)), "kernel": kernel, "arch": arch.name}
        )
        return Parameters(
            tuple(found["parameters"]),
            {name: from_data(value) for name, value in found["defaults"].items()},
            frozenset(found["constexprs"]),
            tuple(found["functions"]),
            tuple(found["configs"]),
            tuple(found["heuristics"]),
            found["debug"],
            tuple(found["compared"]),
        )

    def settle(self, source: Path, kernel: str, arch: Arch, config: int | None, given: Mapping[str, Any]) -> Settled:
        """What a configuration of the kernel's autotuner and its heuristics give values to.

        Args:
            source, kernel, arch: as :meth:`describe`.
            config: which configuration, by its place; None: none.
            given: of each parameter with a value or type, ``{"value": ...}``, ``{"type": ..., "hint": ...}`` or
                ``{"elements": [...]}``.

        Raises:
            KernelSourceError: as :meth:`describe`.
            SpecError: a wrapper sets what the kernel has not, or what is given.
        """
        request = {"task": "settle", "source": str(check_source(source)), "kernel": kernel, "arch": arch.name}
        found = self._ask({**request, "config": config, "given": given})
        constants = {name: from_data(value) for name, value in found["constants"].items()}
        return Settled(constants, found["options"], found["unknown"], tuple(found["notes"]))

    def operators(self, source: Path) -> list[dict[str, Any]]:
        """The operators that a file describes, as JSON has them.

        Raises:
            KernelSourceError: the file is missing, raises, or describes none.
        """
        found = self._ask(
            {"task": "operators", "source": str(check_source(source)), "kernel": "of its operators", "arch": "sm_80"}
        )
        return list(found["operators"])

    def collect(self, source: Path) -> list[dict[str, Any]]:
        """What the objects of a file that have a method ``__pyfmha__`` say by it; raises as :meth:`operators`."""
        asked = {"task": "collect", "source": str(check_source(source)), "kernel": "of its functions", "arch": "sm_80"}
        return list(self._ask(asked)["objects"])

    def compile(self, spec: KernelSpec, arch: Arch) -> Cubin:
        """Compile one spec for one architecture.

        Raises:
            KernelSourceError: the kernel's file is missing, raises, or does not hold the kernel.
            CompileError: Triton or ptxas refused it.
        """
        spec = spec.resolve(arch.name)
        request = {
            "task": "compile",
            "source": str(check_source(spec.source)),
            "kernel": spec.kernel,
            "arch": arch.name,
            "arguments": [vars(argument) for argument in spec.kernel_arguments],
            "constants": {name: to_data(value) for name, value in spec.constants},
            "tuples": spec.tuples,
            "functions": [[f.parameter, str(check_source(f.source)), f.attribute] for f in spec.functions],
            "workspace": bool(spec.workspace),
            "descriptors": [
                {key: getattr(tensor, key) for key in ("name", "element", "item_size", "rank", "block", "parts")}
                for tensor in spec.tensors
            ],
            "num_warps": spec.num_warps,
            "num_stages": spec.num_stages,
            "num_ctas": spec.num_ctas,
            "maxnreg": spec.maxnreg,
            "debug": spec.debug,
            "enable_fp_fusion": spec.enable_fp_fusion,
            "dependent": spec.is_dependent_on(arch.name),
            "capability": arch.capability,
        }
        try:
            found = self._ask(request)
        except CompileError as error:
            raise CompileError(f"{spec.variant} for {arch.name}: {_innermost(spec, str(error))}") from None
        return Cubin.from_record({**found, "arch": arch.name})

    def compile_all(
        self,
        wanted: Sequence[tuple[KernelSpec, Arch]],
        done: Callable[[KernelSpec, Cubin], None],
        spared: Callable[[KernelSpec, CompileError], bool] = lambda spec, error: False,
    ) -> list[Cubin | None]:
        """Compile many, in parallel, and return them in the order asked.

        Args:
            wanted: what to compile.
            done: called with each one as it is ready, on a thread of the pool, one call at a time; what it raises ends
                the whole.
            spared: called with each that fails, likewise: whether it may be left out; then it is None.

        Raises:
            PyfmhaError: the first failure; the rest is abandoned.
        """

        def one(spec: KernelSpec, arch: Arch) -> Cubin | None:
            try:
                cubin = self.compile(spec, arch)
                with turn:
                    done(spec, cubin)
            except CompileError as error:
                with turn:
                    if spared(spec, error):
                        return None
                raise
            return cubin

        turn = threading.Lock()
        with ThreadPoolExecutor(max(1, min(self.jobs, len(wanted)))) as pool:
            futures = [pool.submit(one, spec, arch) for spec, arch in wanted]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
                _raise_first(futures)
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                with self._lock:  # whoever goes on after this failure gets others
                    self._idle.clear()
                    for worker in self._all:
                        worker.process.kill()
                raise


def _innermost(spec: KernelSpec, text: str) -> str:
    """What Triton says of a kernel; of one with a user's function what it says last, where the user's lines are."""
    if not spec.functions:
        return text
    function = spec.functions[0]
    return f"{function.attribute} of {function.source} does not compile: {text.split(CAUSED)[-1]}"


def _raise_first(futures: Iterable[Future[Cubin | None]]) -> None:
    for future in futures:
        if future.done() and not future.cancelled():
            error = future.exception()
            if error is not None:
                raise error
