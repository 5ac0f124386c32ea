"""The compiler process, started and driven by :mod:`pyfmha.aot.cubin`.

Kernel files are the user's code: they may print, raise or end the process. So they are imported here, in a process of
its own with a clean Triton environment, and the parent gets one JSON line for each line it sends.
"""

import base64
import gc
import json
import os
import re
import subprocess
import tempfile
import traceback
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

from pyfmha.aot.descriptors import UnsupportedDescriptor, described_tensors, descriptor_type, parameter_count
from pyfmha.aot.passes import passes_left_out
from pyfmha.aot.reasons import full_disk, reasons
from pyfmha.aot.sources import Refused, load_source
from pyfmha.aot.wrappers import OPTIONS, RunTime, Wrapped, decode, describe_configs, encode, settle, unwrap
from pyfmha.operators.description import Operator
from pyfmha.spec.absent import compared_with_none


def find_kernel(module: ModuleType, name: str, path: Path) -> Wrapped:
    """A kernel by its name, with the wrappers around it."""
    found = getattr(module, name, None)
    wrapped = unwrap(found)
    if wrapped is not None:
        return wrapped
    what = "is not a @triton.jit function" if found is not None else "is not there"
    raise Refused(
        "KernelSourceError", f"kernel {name!r} {what} in {path}; it holds: {', '.join(_kernels(module)) or 'no kernel'}"
    )


def _kernels(module: ModuleType) -> list[str]:
    wrapped = {name: unwrap(value) for name, value in vars(module).items()}
    return sorted(name for name, one in wrapped.items() if one and one.kernel.__module__ == module.__name__)


def _functions(module: ModuleType) -> list[str]:
    return sorted(name for name, value in vars(module).items() if unwrap(value) is not None)


def describe(request: dict[str, Any]) -> dict[str, Any]:
    """Names, defaults and constants of a kernel's parameters, and what its wrappers set."""
    path = Path(request["source"])
    module = load_source(path, request["arch"]).module
    wrapped = find_kernel(module, request["kernel"], path)
    params = wrapped.kernel.params
    defaults = {}
    for parameter in params:
        with suppress(TypeError):  # of a default that cannot be compiled ahead of time: its value must be given
            if parameter.has_default:
                defaults[parameter.name] = encode(parameter.default, module)
    return {
        "parameters": [p.name for p in params],
        "defaults": defaults,
        "constexprs": [p.name for p in params if p.is_constexpr],
        "functions": _functions(module),
        "configs": [{name: repr(value) for name, value in config.items()} for config in describe_configs(wrapped)],
        "heuristics": wrapped.heuristics(),
        "debug": bool(wrapped.kernel.debug),
        "compared": compared_with_none(wrapped.kernel.fn),
    }


def settle_wrappers(request: dict[str, Any]) -> dict[str, Any]:
    """What a configuration and the heuristics give values to."""
    path = Path(request["source"])
    module = load_source(path, request["arch"]).module
    wrapped = find_kernel(module, request["kernel"], path)
    given = {name: _given(name, one, module) for name, one in request["given"].items()}
    settled = settle(wrapped, request["config"], given)
    try:
        constants = {name: encode(value, module) for name, value in settled.constants.items()}
    except TypeError as error:
        raise Refused("SpecError", f"kernel {request['kernel']}: {error}; give it in the signature") from None
    return {**vars(settled), "constants": constants}


def _given(name: str, data: dict[str, Any], module: ModuleType) -> Any:
    if "elements" in data:
        return tuple(_given(f"{name}[{i}]", element, module) for i, element in enumerate(data["elements"]))
    if "type" not in data:
        return decode(data["value"], module)
    return 1 if data["hint"] == 1 else RunTime(name, data["type"])


def operators(request: dict[str, Any]) -> dict[str, Any]:
    """The operators that a file describes."""
    path = Path(request["source"])
    module = load_source(path, request["arch"]).module
    found = [value for value in vars(module).values() if isinstance(value, Operator)]
    if not found:
        raise Refused("KernelSourceError", f"{path} describes no operator: it has no pyfmha.Operator in a variable")
    return {"operators": [operator.to_json() for operator in dict.fromkeys(found)]}


def collect(request: dict[str, Any]) -> dict[str, Any]:
    """What the objects of a file say of themselves."""
    module = load_source(Path(request["source"]), request["arch"]).module
    found = {name: value for name, value in sorted(vars(module).items()) if hasattr(type(value), "__pyfmha__")}
    return {"objects": [{**value.__pyfmha__(), "attribute": name} for name, value in found.items()]}


def _load_functions(functions: list[list[str]], arch: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The constants that are functions of other files, by parameter, and the digests of the files they are made of."""
    from triton.runtime.jit import JITFunction

    constants: dict[str, Any] = {}
    made_of: dict[str, str] = {}
    for parameter, source, attribute in functions:
        loaded = load_source(Path(source), arch)
        found: Any = loaded.module
        for name in attribute.split("."):
            found = getattr(found, name, None)
        if not isinstance(found, JITFunction):
            raise Refused("KernelSourceError", f"{source} holds no @triton.jit function {attribute}")
        constants[parameter] = found
        made_of |= loaded.made_of
    return constants, made_of


def compile_cubin(request: dict[str, Any]) -> dict[str, Any]:
    """Compile one spec for one architecture."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    path = Path(request["source"])
    functions, made_of = _load_functions(request["functions"], request["arch"])
    source_file = load_source(path, request["arch"])
    module, made_of = source_file.module, {**made_of, **source_file.made_of}
    kernel = find_kernel(module, request["kernel"], path).kernel
    descriptors = request["descriptors"]
    parameters = _Parameters(request, kernel, module, functions)
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(
        fn=kernel, signature=parameters.signature, constexprs=parameters.constexprs, attrs=parameters.attrs
    )
    capability = request["capability"]
    options = {name: request[name] for name in (*OPTIONS, "enable_fp_fusion") if request[name] is not None}
    options["debug"] = bool(kernel.debug) if request["debug"] is None else request["debug"]
    # Triton's cache does not see the source of a function in a tuple.
    triton.knobs.compilation.always_compile = '"function"' in json.dumps(request["constants"])
    try:
        with passes_left_out(module, capability):
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    except Exception as error:
        full = full_disk(error)
        raise Refused("OutputError" if full else "CompileError", full or reasons(error)) from error
    _check_wait(request, compiled.asm["ptx"])
    code = bytes(compiled.asm["cubin"])
    try:
        tensors = described_tensors(compiled.metadata, descriptors)
        scratch = _scratch_pointers(request, compiled, parameters.passed)
    except UnsupportedDescriptor as error:
        raise Refused("CompileError", str(error)) from error
    return {
        "code": base64.b64encode(code).decode(),
        "symbol": compiled.metadata.name,
        "threads": 32 * compiled.metadata.num_warps,  # read after compiling: specialised kernels are padded
        "shared": compiled.metadata.shared,
        "scratch": scratch,
        "workspace": compiled.metadata.global_scratch_size,
        "workspace_align": compiled.metadata.global_scratch_align,
        "tensors": tensors,
        "ptxas": str(get_ptxas(capability).version),
        **_resources(code),
        "debug": options["debug"],
        "source": made_of[str(path)],
        "dependencies": {os.path.relpath(f, path.parent): d for f, d in made_of.items() if f != str(path)},
    }


class _Parameters:
    """A kernel's parameters as Triton's compiler takes them.

    Attributes:
        signature: the type of each, by name; tuples are tuples of types.
        constexprs: values of constants, by the path to each: its place, and places inside tuples.
        attrs: what is known of arguments, by the same paths.
        passed: how many arguments the compiled kernel takes.
    """

    def __init__(self, request: dict[str, Any], kernel: Any, module: ModuleType, functions: dict[str, Any]) -> None:
        names = [parameter.name for parameter in kernel.params]
        self._arguments = {argument["name"]: argument for argument in request["arguments"]}
        self._constants = {name: decode(value, module) for name, value in request["constants"].items()}
        self._constants |= functions
        tuples = dict(request["tuples"])
        descriptors = request["descriptors"]
        types = {d["name"]: descriptor_type(d["element"], d["block"], kernel.is_gluon()) for d in descriptors}
        flat = [leaf for name in names for leaf in (_leaves(tuples[name]) if name in tuples else [name])]
        given = {*types, *self._arguments, *self._constants}
        # What the spec leaves out is what the kernel says of it, as in a call of Python's.
        left_out = [p for p in kernel.params if p.has_default and p.name not in {*given, *tuples}]
        self._constants |= {parameter.name: parameter.default for parameter in left_out}
        _check_names(request["kernel"], flat, [*types, *self._arguments], [*self._constants])
        self.constexprs: dict[tuple[int, ...], Any] = {}
        self.attrs: dict[tuple[int, ...], Any] = {}
        self.passed = 0
        self.signature = {
            name: types[name] if name in types else self._place(tuples.get(name, name), (index,))
            for index, name in enumerate(names)
        }

    def _place(self, shape: Any, path: tuple[int, ...]) -> Any:
        if not isinstance(shape, str):
            return tuple(self._place(element, (*path, index)) for index, element in enumerate(shape))
        if shape in self._constants:
            self.constexprs[path] = self._constants[shape]
            return "constexpr"
        hint = self._arguments[shape]["hint"]
        if hint == 1:
            self.constexprs[path] = 1
            return "constexpr"
        if hint is not None:
            self.attrs[path] = [["tt.divisibility", hint]]
        self.passed += 1
        return self._arguments[shape]["type"]


def _leaves(shape: Any) -> list[str]:
    return [shape] if isinstance(shape, str) else [leaf for element in shape for leaf in _leaves(element)]


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


def _scratch_pointers(request: dict[str, Any], compiled: Any, arguments: int) -> int:
    """How many scratch pointers follow the kernel's own parameters: first its workspace's, others unused."""
    metadata, descriptors = compiled.metadata, request["descriptors"]
    if metadata.global_scratch_size and not request["workspace"]:
        raise Refused(
            "CompileError",
            f"the kernel needs {metadata.global_scratch_size} bytes of global scratch a block (for descriptors made"
            " on the device, say): compile it with --workspace, and give that memory as the function's last argument;"
            " or use pointers, or descriptors of the spec",
        )
    if metadata.profile_scratch_size:
        raise Refused(
            "CompileError", "the kernel is instrumented for a profiler, which cannot be compiled ahead of time"
        )
    own: int = arguments + sum(1 + 2 * d["rank"] for d in descriptors)
    extra: int = parameter_count(compiled.asm["ptx"], descriptors) - own
    if not 0 <= extra <= 2 or (metadata.global_scratch_size and extra == 0):
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


_TASKS = {
    "collect": collect,
    "describe": describe,
    "settle": settle_wrappers,
    "operators": operators,
    "compile": compile_cubin,
}


def answer(line: str) -> dict[str, Any]:
    """Carry out one request; failures become an answer too."""
    try:
        request = json.loads(line)
        return {"result": _TASKS[request["task"]](request)}
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
    gc.set_threshold(200_000)  # compiling makes millions of objects, of which few are in circles
    serve(requests, answers)


if __name__ == "__main__":
    main()
