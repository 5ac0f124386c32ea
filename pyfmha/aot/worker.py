"""The compiler process, started and driven by :mod:`pyfmha.aot.cubin`.

Kernel files are the user's code: they may print, raise or end the process. So they are imported here, in a process of
its own with a clean Triton environment, and the parent gets one JSON line for each line it sends.
"""

import base64
import hashlib
import importlib.util
import json
import linecache
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

from pyfmha.aot.descriptors import UnsupportedDescriptor, described_tensors, descriptor_type, parameter_count
from pyfmha.aot.reasons import full_disk, reasons
from pyfmha.errors import SpecError


class Refused(Exception):
    """A request that fails for a reason to report; ``kind`` names the exception the parent raises."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


_INSTALLED = {str(Path(path).resolve()) for path in sysconfig.get_paths().values() if path} | set(
    sysconfig.get_paths().values()
)
_modules: dict[str, tuple[ModuleType, dict[str, str]]] = {}  # by path: the module, and digests of what it was made of
_imported: set[str] = set()  # names of the modules that the latest kernel file imported, those installed left out


def load_source(path: Path) -> tuple[ModuleType, dict[str, str]]:
    """Import a kernel file; also returns the SHA-256 of it and of the files it imports, those installed left out."""
    if str(path) in _modules and _digests(_modules[str(path)][1]) == _modules[str(path)][1]:
        return _modules[str(path)]
    # Before the kernel file does: where Triton lies outside the usual folders, its modules would count as the user's.
    import triton.experimental.gluon
    import triton.language  # noqa: F401

    linecache.checkcache()  # Triton reads a kernel's source through it, and the file may have changed since
    folder = path.parent
    for name in _imported:  # imported anew: each file depends on it, and the name may mean another file here
        sys.modules.pop(name, None)
    _imported.clear()
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if spec is None or spec.loader is None:
            raise Refused("KernelSourceError", f"{path} is not a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
    except Refused:
        raise
    except SpecError as error:  # a function declared wrongly: it says itself what is wrong
        raise Refused("SpecError", f"{path}: {error}") from error
    except BaseException as error:  # a kernel file may raise anything, SystemExit included
        raise Refused("KernelSourceError", f"{path} cannot be imported: {_where(error, path)}") from error
    finally:
        sys.path.remove(str(folder))
        _imported.update(name for name in set(sys.modules) - before if _is_users(sys.modules[name]))
    _modules[str(path)] = (module, _digests({str(path), *(str(sys.modules[name].__file__) for name in _imported)}))
    return _modules[str(path)]


def _is_users(module: ModuleType) -> bool:
    """Whether a module is the user's own: a file, and not of Python's, Triton's or another installed package."""
    file = getattr(module, "__file__", None)
    if module.__name__.partition(".")[0] == "pyfmha":  # what user's functions are declared with: no part of them
        return False
    return bool(file) and not any(Path(str(file)).is_relative_to(folder) for folder in _INSTALLED)


def _digests(files: Iterable[str]) -> dict[str, str]:
    return {f: hashlib.sha256(Path(f).read_bytes()).hexdigest() if Path(f).is_file() else "" for f in sorted(files)}


def _where(error: BaseException, path: Path) -> str:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    line = getattr(error, "lineno", None) if isinstance(error, SyntaxError) else lines[-1] if lines else None
    return f"{type(error).__name__}: {error}" + (f" (line {line})" if line else "")


def find_kernel(module: ModuleType, name: str, path: Path) -> Any:
    from triton.runtime.jit import JITFunction

    kernel = getattr(module, name, None)
    if isinstance(kernel, JITFunction):
        return kernel
    held = [
        key
        for key, value in vars(module).items()
        if isinstance(value, JITFunction) and value.__module__ == module.__name__
    ]
    what = "is not a @triton.jit function" if kernel is not None else "is not there"
    raise Refused(
        "KernelSourceError", f"kernel {name!r} {what} in {path}; it holds: {', '.join(sorted(held)) or 'no kernel'}"
    )


def describe(request: dict[str, Any]) -> dict[str, Any]:
    """Names, defaults and constants of a kernel's parameters."""
    path = Path(request["source"])
    kernel = find_kernel(load_source(path)[0], request["kernel"], path)
    defaults = {
        p.name: p.default
        for p in kernel.params
        if p.has_default and isinstance(p.default, int | float | bool | str | None)
    }
    constexprs = [p.name for p in kernel.params if p.is_constexpr]
    names = [p.name for p in kernel.params]
    return {"parameters": names, "defaults": defaults, "constexprs": constexprs, "debug": bool(kernel.debug)}


def collect(request: dict[str, Any]) -> dict[str, Any]:
    """What the objects of a file say of themselves."""
    module = load_source(Path(request["source"]))[0]
    found = {name: value for name, value in sorted(vars(module).items()) if hasattr(type(value), "__pyfmha__")}
    return {"objects": [{**value.__pyfmha__(), "attribute": name} for name, value in found.items()]}


def _load_functions(functions: list[list[str]]) -> tuple[dict[str, Any], dict[str, str]]:
    """The constants that are functions, by parameter, and the digests of the files they are made of."""
    from triton.runtime.jit import JITFunction

    constants: dict[str, Any] = {}
    made_of: dict[str, str] = {}
    for parameter, source, attribute in functions:
        value, digests = load_source(Path(source))
        found: Any = value
        for name in attribute.split("."):
            found = getattr(found, name, None)
        if not isinstance(found, JITFunction):
            raise Refused("KernelSourceError", f"{source} holds no @triton.jit function {attribute}")
        constants[parameter] = found
        made_of |= digests
    return constants, made_of


def compile_cubin(request: dict[str, Any]) -> dict[str, Any]:
    """Compile one spec for one architecture."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    path = Path(request["source"])
    functions, made_of = _load_functions(request["functions"])
    module, own = load_source(path)
    made_of |= own
    kernel = find_kernel(module, request["kernel"], path)
    names = [parameter.name for parameter in kernel.params]
    arguments, constants, descriptors = request["arguments"], dict(request["constants"]), request["descriptors"]
    types: dict[str, Any] = {
        d["name"]: descriptor_type(d["element"], d["block"], kernel.is_gluon()) for d in descriptors
    }
    types |= {a["name"]: a["type"] for a in arguments}
    constants |= functions
    if request["packed"]:
        parameter, held = request["packed"]
        types[parameter] = tuple(types.pop(name) for name in held)
        arguments = [a for a in arguments if a["name"] not in held]
    _check_names(request["kernel"], names, [*types], [*constants])
    hints = {a["name"]: a["hint"] for a in arguments}
    constants |= {name: 1 for name, hint in hints.items() if hint == 1}
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(
        fn=kernel,
        signature={name: "constexpr" if name in constants else types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (names.index(name),): [["tt.divisibility", hint]] for name, hint in hints.items() if hint not in (None, 1)
        },
    )
    capability = request["capability"]
    options = {name: request[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}
    options["debug"] = bool(kernel.debug) if request["debug"] is None else request["debug"]
    if request["maxnreg"] is not None:
        options["maxnreg"] = request["maxnreg"]
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    except Exception as error:
        full = full_disk(error)
        raise Refused("OutputError" if full else "CompileError", full or reasons(error)) from error
    _check_wait(request, compiled.asm["ptx"])
    code = bytes(compiled.asm["cubin"])
    try:
        tensors = described_tensors(compiled.metadata, descriptors)
        scratch = _scratch_pointers(
            compiled, descriptors, sum(name not in constants for name in hints) + _held(request)
        )
    except UnsupportedDescriptor as error:
        raise Refused("CompileError", str(error)) from error
    return {
        "code": base64.b64encode(code).decode(),
        "symbol": compiled.metadata.name,
        "threads": 32 * compiled.metadata.num_warps,  # read after compiling: specialised kernels are padded
        "shared": compiled.metadata.shared,
        "scratch": scratch,
        "tensors": tensors,
        "ptxas": str(get_ptxas(capability).version),
        **_resources(code),
        "debug": options["debug"],
        "source": made_of[str(path)],
        "dependencies": {os.path.relpath(f, path.parent): d for f, d in made_of.items() if f != str(path)},
    }


def _held(request: dict[str, Any]) -> int:
    """How many arguments the kernel takes packed."""
    return len(request["packed"][1]) if request["packed"] else 0


def _check_names(kernel: str, names: list[str], given: list[str], constants: list[str]) -> None:
    """Refuse a spec whose parameters are not the kernel's: descriptors, then arguments, in the kernel's order."""
    if sorted([*given, *constants]) != sorted(names):
        raise Refused(
            "SpecError", f"kernel {kernel} takes {', '.join(names)}; the spec gives {', '.join([*given, *constants])}"
        )
    ordered = [name for name in names if name in given]
    if ordered != given:
        raise Refused(
            "SpecError", f"kernel {kernel} takes {', '.join(ordered)} in this order; the spec gives {', '.join(given)}"
        )


def _check_wait(request: dict[str, Any], ptx: str) -> None:
    """Refuse a kernel that starts before the one before it has ended, and never waits for that."""
    if request["dependent"] and "griddepcontrol.wait" not in ptx:
        raise Refused(
            "CompileError",
            "it is for programmatic dependent launch, so it may start before the kernel before it has ended, but never"
            " waits for that: call tl.extra.cuda.gdc_wait() before anything that depends on other kernels",
        )


def _scratch_pointers(compiled: Any, descriptors: list[dict[str, Any]], arguments: int) -> int:
    """How many scratch pointers follow the kernel's own parameters; it must be able to run with null ones."""
    metadata = compiled.metadata
    for kind in ("global_scratch_size", "profile_scratch_size"):
        if getattr(metadata, kind, 0):
            raise Refused(
                "CompileError",
                f"the kernel needs {getattr(metadata, kind)} bytes of {kind[:-5].replace('_', ' ')} a block (tensor"
                " descriptors made on the device do): that cannot be compiled ahead of time yet; use pointers, or"
                " descriptors of the spec",
            )
    if getattr(metadata, "num_ctas", 1) != 1:
        raise Refused(
            "CompileError",
            "num_ctas above 1 cannot be compiled ahead of time yet; clusters of programs can: cluster of the spec",
        )
    own: int = arguments + sum(1 + 2 * d["rank"] for d in descriptors)
    extra: int = parameter_count(compiled.asm["ptx"], descriptors) - own
    if not 0 <= extra <= 2:
        raise Refused(
            "CompileError",
            f"the compiled kernel takes {extra} parameters beyond its {own}; this Triton is not known",
        )
    return extra


def _resources(code: bytes) -> dict[str, int]:
    """Registers a thread and bytes spilled, as the assembler recorded them in the code."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        listing = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", listing))
    return {"registers": int(found["REG"]), "spilled": int(found["STACK"]) + int(found["LOCAL"])}


def answer(line: str) -> dict[str, Any]:
    """Carry out one request; failures become an answer too."""
    try:
        request = json.loads(line)
        task = {"describe": describe, "collect": collect, "compile": compile_cubin}[request["task"]]
        return {"result": task(request)}
    except Refused as error:
        return {"error": error.kind, "message": str(error)}
    except Exception as error:
        if full := full_disk(error):
            return {"error": "OutputError", "message": full}
        return {"error": "CompileError", "message": "the compiler process failed:\n" + traceback.format_exc()}


def serve(requests: TextIO, answers: TextIO) -> None:
    """Answer each line of ``requests`` with one line, until it ends."""
    for line in requests:
        answers.write(json.dumps(answer(line)) + "\n")
        answers.flush()


def main() -> None:
    """Serve on the real standard streams; kernel files print to standard error instead, and read nothing."""
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    serve(requests, answers)


if __name__ == "__main__":
    main()
