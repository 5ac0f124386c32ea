"""What several test modules share: raw access to a library in C, and processes to run things in."""

import ctypes
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import settings

import pyfmha
from pyfmha.spec.abi import ctype
from pyfmha.spec.manifest import Manifest, parse_manifest

TESTS = Path(__file__).parent
PACKAGE = str(Path(pyfmha.__file__).parent)
KERNELS = TESTS / "kernels"
STRICT = ["-std=c11", "-Wall", "-Wextra", "-Wconversion", "-Werror"]

HANGS = 300.0
"""Seconds after which what has not ended never will: many times what it takes on a slow host with other work."""

# CUresult values, as cuda.h numbers them.
SUCCESS = 0
INVALID_VALUE = 1
NOT_INITIALIZED = 3
NO_DEVICE = 100
INVALID_IMAGE = 200
INVALID_CONTEXT = 201
INVALID_HANDLE = 400
NO_BINARY_FOR_GPU = 209
SYMBOL_NOT_FOUND = 302
LIBRARY_NOT_FOUND = 303
INVALID_HANDLE = 400
NOT_FOUND = 500
MISALIGNED_ADDRESS = 716
LAUNCH_FAILED = 719
NOT_SUPPORTED = 801
INVALID_CLUSTER_SIZE = 912


class CLibrary:
    """A library as a C program sees it: plain functions that return a status. Deliberately not pyfmha.runtime."""

    def __init__(self, path: Path) -> None:
        self.c = ctypes.CDLL(str(path))
        self.c.pyfmha_manifest.restype = ctypes.c_char_p
        self.c.pyfmha_last_error.restype = ctypes.c_char_p
        self.manifest: Manifest = parse_manifest(self.c.pyfmha_manifest().decode(), str(path))
        for function in self.manifest.functions:
            types = [ctype(kind).ctypes for _, kind in function.arguments]
            getattr(self.c, function.name).argtypes = [ctypes.c_void_p, *types, ctypes.c_int]
            getattr(self.c, f"{function.name}_default").argtypes = [ctypes.c_void_p, *types]
            variant = getattr(self.c, f"{function.name}_variant")
            variant.argtypes = [*types, ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)]

    def load(self, name: str) -> int:
        return int(getattr(self.c, f"load_{name}")())

    def unload(self, name: str) -> int:
        return int(getattr(self.c, f"unload_{name}")())

    def launch(self, name: str, *arguments: float, stream: int = 0, algo_id: int = 0) -> int:
        return int(getattr(self.c, name)(stream, *arguments, algo_id))

    def launch_default(self, name: str, *arguments: float, stream: int = 0) -> int:
        return int(getattr(self.c, f"{name}_default")(stream, *arguments))

    def algorithms(self, name: str) -> int:
        return int(getattr(self.c, f"{name}_get_num_algos")())

    def variant(self, name: str, *arguments: float, algo_id: int = 0) -> tuple[int, str | None]:
        text = ctypes.c_char_p(b"untouched")
        status = int(getattr(self.c, f"{name}_variant")(*arguments, algo_id, ctypes.byref(text)))
        return status, text.value.decode() if text.value is not None else None

    def error(self) -> str:
        return self.c.pyfmha_last_error().decode()

    def image(self, variant: str, arch: str) -> str:
        """SHA-256 of a variant's machine code for an architecture, as the manifest has it."""
        (found,) = (i for _, _, v in self.manifest.variants() if v.name == variant for i in v.images if i.arch == arch)
        return found.sha256

    def variants(self, name: str) -> dict[bool, str]:
        """Of a function's first algorithm, the variant's name by whether it carries hints."""
        (function,) = (f for f in self.manifest.functions if f.name == name)
        return {bool(variant.hints): variant.name for variant in function.algorithms[0]}


def run_python(code: str, *arguments: str, check: bool = False, **settings: object) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own, which can import what the tests can."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=check,
        env=python_environment(),
        **settings,
    )


def python_environment() -> dict[str, str]:
    """The environment for a Python process that can import what the tests can."""
    path = [str(TESTS.parent), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


def copy_kernel(name: str, folder: Path) -> Path:
    """A kernel file of the tests, to change at will."""
    folder.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(KERNELS / name, folder / name))


def gcc(*arguments: str | Path, compiler: str = "gcc") -> subprocess.CompletedProcess[str]:
    """Run the compiler; the caller looks at the exit code and the log."""
    return subprocess.run([compiler, *map(str, arguments)], capture_output=True, text=True, check=False)


def manifest_source(text: str) -> str:
    """C source of a ``pyfmha_manifest`` that returns a text."""
    characters = ",".join(str(byte) for byte in text.encode())
    return (
        f"static const char text[] = {{{characters}, 0}};\n"
        "const char *pyfmha_manifest(void);\nconst char *pyfmha_manifest(void) { return text; }\n"
    )


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def published(folder: Path) -> dict[str, bytes]:
    """As :func:`snapshot`, without what is still being prepared and without the cache."""
    return {
        name: content
        for name, content in snapshot(folder).items()
        if not re.search(r"(^|/)\.pyfmha-staging-", name) and not name.startswith("cache/")
    }


LONG = pytest.mark.long
SWEEPS = "PYFMHA_SWEEPS" in os.environ
"""Whether ``make test-all`` runs what ``make test`` has left."""


def examples(most: int) -> Callable[[Any], Any]:
    """Problems that hypothesis makes up: a third of so many in ``make test``, in ``make test-all`` all of them."""

    def decorate(test: Any) -> Any:
        return pytest.mark.swept(settings(max_examples=most if SWEEPS else -(-most // 3), deadline=None)(test))

    return decorate


def some_of(*axes: Iterable[Any]) -> list[Any]:
    """The product of axes for ``parametrize``. ``make test`` runs every second, so that each value of each axis still
    occurs, and of a lone axis every fourth; ``make test-all`` runs all. An element of an axis that is a tuple gives
    several arguments."""
    cases = []
    step = 2 if len(axes) > 1 else 4
    for chosen in itertools.product(*map(enumerate, axes)):
        values = [value for _, element in chosen for value in (element if isinstance(element, tuple) else (element,))]
        cases.append(pytest.param(*values, marks=LONG if sum(index for index, _ in chosen) % step else ()))
    return cases


def few_of(cases: Iterable[Any], kept: Callable[[Any], bool]) -> list[Any]:
    """Cases for ``parametrize``, tuples for several arguments. ``make test`` runs those kept, ``make test-all`` all."""
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=() if kept(case) else LONG)
        for case in cases
    ]


def entered(call: Callable[[], object]) -> list[str]:
    """The functions of pyfmha in Python that run in a call, in order, those included that it writes itself.

    Without those of ``trt/tables.py``, which stand for TensorRT, the caller.
    """
    found: list[str] = []

    def note(frame: FrameType, event: str, _argument: object) -> None:
        file = frame.f_code.co_filename
        ours = file.startswith(PACKAGE) and not file.endswith("tables.py")
        if event == "call" and (ours or file == "<enqueue>"):
            found.append(frame.f_code.co_name)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return found
