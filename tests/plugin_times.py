"""What one enqueue of a plugin in C costs the host, through its table, and what the library's own launch does.

    python tests/plugin_times.py [LIBRARY]              # on the fake driver, whose own time is in both
    python tests/plugin_times.py --gpu LIBRARY          # on the GPU here

Needs gcc and numpy, no TensorRT; LIBRARY is a built one with plugins, by default one that is built first from the three
operators of ``tests/kernels/plugins.py`` (which needs Triton). Prints nanoseconds, the best of many rounds by turns.
They depend on the host and on what else it does, so they are no test.
"""

import argparse
import ctypes
import tempfile
from pathlib import Path

import fake_cuda
from plugin_host import HostCalls, build_host

from pyfmha.operators.description import DATA_TYPES
from pyfmha.operators.instance import Instance
from pyfmha.operators.plan import Pointer
from pyfmha.operators.program import program_of
from pyfmha.runtime.library import Library
from pyfmha.trt.tables import Tensor
from pyfmha.verify import plugins

_TYPES = {
    "i1": "bool",
    "i8": "int8",
    "i16": "int16",
    "i32": "int32",
    "i64": "int64",
    "u8": "uint8",
    "fp32": "float",
    "fp64": "double",
}


def packed(
    library: Library, instance: Instance, shapes: list[tuple[int, ...]], base: int, stream: int
) -> tuple[str, bytes]:
    """The first launch's function, and its arguments as ``NAME_packed`` takes them; every address is one."""
    count = len(instance.forms().inputs)
    plan = instance.plan(instance.measure(shapes[:count], shapes[count:], serves=lambda *question: False))
    step = plan.steps[0]
    kinds = library[step.function].manifest.arguments
    members = [
        (f"a{index}", ctypes.c_void_p if kind[0] == "*" else getattr(ctypes, f"c_{_TYPES[kind]}"))
        for index, (_, kind) in enumerate(kinds)
    ]
    layout = type(
        "Layout", (ctypes.Structure,), {"_fields_": [("stream", ctypes.c_void_p), *members, ("algo", ctypes.c_int)]}
    )
    given = layout(stream)
    for (member, _), value in zip(members, step.arguments, strict=True):
        if isinstance(value, Pointer):
            value = None if value.source == "null" else base
        setattr(given, member, value)
    return step.function, bytes(given)


def measure(host: HostCalls, library: Library) -> None:
    """Print the times of every plugin that the library holds."""
    stream, base = host.gpu if host.gpu[1] else (7, 0x7F0000000000)
    for operator in library.operators:
        program = program_of(operator)
        sample = plugins.sample(program, library)
        if sample is None:
            print(f"{operator.name}: no sample of attributes is served")
            continue
        given, instance = sample
        instance = instance.with_types(
            {n: kinds.names[0] for n, kinds in program.types.items() if n not in instance.types}
        )
        forms = instance.forms()
        shapes, _ = plugins.served_shapes(instance, forms)
        tensors = [Tensor(shape, DATA_TYPES[form.type or ""]) for shape, form in zip(shapes, forms.all, strict=True)]
        inputs, outputs = tensors[: len(forms.inputs)], tensors[len(forms.inputs) :]
        built = host.create(host.named(operator.name), "layer", plugins.sample_fields(program, given), 0)
        assert built is not None, host.error()
        attached = host.attach(built)
        assert attached is not None, host.error()
        assert host.on_shape_change(attached, inputs, outputs) == 0, host.error()
        function, arguments = packed(library, instance, shapes, base, stream)
        addresses = [[base] * len(inputs), [base] * len(outputs)]
        ours, own = host.times(attached, addresses, base, stream, (function, arguments))
        print(f"{operator.name}: {ours:.0f} ns an enqueue through the table, {own:.0f} ns a launch of {function}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", nargs="?", type=Path)
    parser.add_argument("--gpu", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pyfmha-plugin-times-") as folder:
        root = Path(folder)
        path = arguments.library or built(root / "library")
        driver = None if arguments.gpu else fake_cuda.build(root / "libcuda.so.1")
        host = HostCalls(build_host(root / "host"), path.resolve(), driver)
        measure(host, Library(path))
        host.close()


def built(folder: Path) -> Path:
    """The library of three operators."""
    from plugin_host.operators import specs_of

    from pyfmha.aot import Compiler, build
    from pyfmha.spec.arch import parse_archs

    with Compiler(jobs=1) as compiler:
        operators, specs = specs_of(compiler)
    return build(specs, parse_archs(["sm_90"]), folder, jobs=1, operators=operators).library


if __name__ == "__main__":
    main()
