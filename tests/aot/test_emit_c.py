"""The generated C: it compiles without a warning wherever users put it, and converts numbers exactly."""

import ctypes
import importlib.util
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import STRICT, gcc
from hypothesis import given
from hypothesis import strategies as st

from pyfmha.aot.emit_c import TEMPLATES, c_string, emit_library
from pyfmha.aot.link_so import link
from pyfmha.spec.c_names import c_argument_name
from pyfmha.spec.kernel import Argument, KernelSpec


@pytest.fixture(scope="module")
def sources(small_library_headers: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the small library's whole C source: variants, library and runtime."""
    folder = tmp_path_factory.mktemp("sources")
    for header in small_library_headers:
        shutil.copy(header, folder)
        shutil.copy(header.with_suffix(".c"), folder)
    link(small_library_headers, folder / "small", library=False)
    return folder


def test_no_argument_has_the_name_of_a_macro(tmp_path: Path) -> None:
    """Of the headers that come before arguments' names, as ``NAN`` is one of <math.h>."""
    templates = [file for file in TEMPLATES.iterdir() if file.suffix in (".h", ".j2")]
    headers = {header for file in templates for header in re.findall(r"^#include (<.*>)", file.read_text(), re.M)}
    file = tmp_path / "headers.c"
    file.write_text("".join(f"#include {header}\n" for header in sorted(headers)))

    done = gcc("-std=c11", "-dM", "-E", file)

    macros = re.findall(r"^#define ([A-Za-z]\w*) ", done.stdout, re.M)  # those of functions stand for calls alone
    assert {"NAN", "NULL", "INT32_MIN", "SIZE_MAX"} <= set(macros)
    assert [macro for macro in macros if c_argument_name(macro) != f"{macro}_"] == []


class TestItCompiles:
    def test_as_strict_c11_without_a_warning(self, sources: Path, tmp_path: Path) -> None:
        done = gcc(*STRICT, "-O1", "-shared", "-fPIC", *sources.glob("*.c"), "-o", tmp_path / "out.so", "-ldl")

        assert (done.returncode, done.stderr) == (0, "")

    def test_under_further_warnings(self, sources: Path, tmp_path: Path) -> None:
        more = ["-Wshadow", "-Wstrict-prototypes", "-Wmissing-prototypes", "-Wformat=2", "-Wundef", "-Wpointer-arith"]
        small = [
            sources / "small.c",
            sources / "pyfmha_runtime.c",
            *sources.glob("words.*.c"),
            *sources.glob("scalars.*.c"),
        ]

        done = gcc(*STRICT, *more, "-c", "-fsyntax-only", *small)

        assert (done.returncode, done.stderr) == (0, "")

    def test_with_clang_too(self, sources: Path) -> None:
        if shutil.which("clang") is None:
            pytest.skip("clang is not installed")

        done = gcc(*STRICT, "-fsyntax-only", sources / "small.c", sources / "pyfmha_runtime.c", compiler="clang")

        assert (done.returncode, done.stderr) == (0, "")

    def test_after_cuda_h(self, sources: Path, tmp_path: Path) -> None:
        (package,) = importlib.util.find_spec("triton").submodule_search_locations or ()
        cuda = Path(package) / "backends" / "nvidia" / "include"
        assert (cuda / "cuda.h").is_file()

        for source in (sources / "small.c", sources / "pyfmha_runtime.c", *sources.glob("scalars.*.c")):
            done = gcc(*STRICT, "-D_GNU_SOURCE", "-isystem", cuda, "-include", "cuda.h", "-fsyntax-only", source)

            assert (done.returncode, done.stderr) == (0, "")

    def test_whatever_its_arguments_and_functions_are_called(self, tmp_path: Path) -> None:
        """Names that end as those of the library's own tables, which they must not hide."""
        tables = ("function", "kernels", "ends")
        arguments = tuple(Argument(name, "i32") for name in ("n", *(f"f_{table}" for table in tables)))
        functions = {
            name: [[KernelSpec(Path("kernel.py"), "kernel", name, arguments, (), "n")]]
            for name in ("f", "g", *(f"g_{table}" for table in tables))
        }
        for name, text in emit_library(functions, "named").items():
            (tmp_path / name).write_text(text)

        done = gcc(*STRICT, "-fsyntax-only", tmp_path / "named.c")

        assert (done.returncode, done.stderr) == (0, "")

    @pytest.mark.parametrize("prefix", ["", "#include <cuda.h>\n"])
    def test_its_header_serves_cpp(self, sources: Path, tmp_path: Path, prefix: str) -> None:
        (package,) = importlib.util.find_spec("triton").submodule_search_locations or ()
        program = tmp_path / "user.cpp"
        program.write_text(
            f'{prefix}#include "small.h"\n'
            "int main() {\n"
            "  if (load_add() != 0) return pyfmha_last_error()[0] == 0;\n"
            "  return add(nullptr, 1, 2, 3, 4, add_get_num_algos() - 1);\n}\n"
        )
        cuda = Path(package) / "backends" / "nvidia" / "include"

        done = gcc(
            "-std=c++11",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-isystem",
            cuda,
            "-I",
            sources,
            "-fsyntax-only",
            program,
            compiler="g++",
        )

        assert (done.returncode, done.stderr) == (0, "")

    def test_every_header_stands_alone(self, sources: Path) -> None:
        for header in sources.glob("*.h"):
            done = gcc(*STRICT, "-fsyntax-only", "-x", "c", header)

            assert (done.returncode, done.stderr) == (0, ""), header.name


class TestItIsReadable:
    def test_the_header_shows_the_prototypes_with_the_kernels_own_names(self, sources: Path) -> None:
        header = (sources / "small.h").read_text()

        add = "CUdeviceptr X, CUdeviceptr Y, CUdeviceptr Z, int32_t n"
        assert f"CUresult add(CUstream stream, {add}, int algo_id);" in header
        assert f"CUresult add_default(CUstream stream, {add});" in header
        assert "CUresult load_add(void);" in header

    def test_a_variants_file_says_what_it_is(self, sources: Path) -> None:
        (file,) = (f for f in sources.glob("hints.*.c") if "hinted" in f.name)
        text = file.read_text()

        assert "Kernel hinted of elementwise.py; BLOCK=128; 4 warps, 3 stages; hints: X:16, stride:16, step:1." in text
        assert "/* cdiv(n, BLOCK), 1, 1 */" in text
        assert "registers" in text

    def test_no_line_but_machine_code_and_prototypes_is_very_long(self, sources: Path) -> None:
        lines = [line for file in sources.glob("*.[ch]") for line in file.read_text().splitlines()]

        assert not [line for line in lines if len(line) > 700]


@given(st.text())
def test_a_c_string_holds_just_the_text(text: str) -> None:
    # What is compiled in is JSON, which is ASCII: nothing but these is ever quoted.
    ascii_text = text.encode("ascii", "backslashreplace").decode()
    literal = c_string("".join(c for c in ascii_text if c.isprintable() or c == "\n"))

    assert literal.startswith('"')
    assert "\n" not in literal
    assert "??" not in literal  # a trigraph
    assert eval(literal.replace("\\?", "?")) == "".join(c for c in ascii_text if c.isprintable() or c == "\n")


Convert = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@pytest.fixture(scope="module")
def convert(tmp_path_factory: pytest.TempPathFactory) -> Convert:
    folder = tmp_path_factory.mktemp("convert")
    source = folder / "convert.c"
    source.write_text(
        '#include "pyfmha_runtime.h"\n'
        "void convert(const float *from, uint16_t *half, uint16_t *brain, size_t count);\n"
        "void convert(const float *from, uint16_t *half, uint16_t *brain, size_t count) {\n"
        "  for (size_t i = 0; i < count; i++) {\n"
        "    half[i] = pyfmha_to_fp16(from[i]);\n    brain[i] = pyfmha_to_bf16(from[i]);\n  }\n}\n"
    )
    flags = ["-O2", "-fsanitize=undefined", "-fno-sanitize-recover", "-shared", "-fPIC", f"-I{TEMPLATES}"]
    done = gcc(*STRICT, *flags, source, TEMPLATES / "pyfmha_runtime.c", "-o", folder / "convert.so", "-ldl")
    assert done.returncode == 0, done.stderr
    function = ctypes.CDLL(str(folder / "convert.so")).convert

    def call(bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        bits = np.ascontiguousarray(bits, np.uint32)
        half, brain = np.empty(len(bits), np.uint16), np.empty(len(bits), np.uint16)
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in (bits, half, brain)]
        function(*pointers, ctypes.c_size_t(len(bits)))
        return half, brain

    return call


class TestConversions:
    """float to fp16 and bf16, with every bit pattern that matters."""

    def test_every_fp16_value_survives(self, convert: Convert) -> None:
        every = np.arange(1 << 16, dtype=np.uint16)
        wide = every.view(np.float16).astype(np.float32).view(np.uint32)

        half, _ = convert(wide)

        nan = np.isnan(every.view(np.float16))
        assert np.array_equal(half[~nan], every[~nan])
        assert np.isnan(half[nan].view(np.float16)).all()

    def test_every_bf16_value_survives(self, convert: Convert) -> None:
        every = np.arange(1 << 16, dtype=np.uint32)
        wide = every << 16

        _, brain = convert(wide)

        nan = np.isnan(wide.view(np.float32))
        assert np.array_equal(brain[~nan], every[~nan])
        assert np.isnan((brain[nan].astype(np.uint32) << 16).view(np.float32)).all()

    def bit_patterns(self) -> np.ndarray:
        """Random floats of every magnitude, and the neighbourhood of each rounding boundary of both types."""
        random = np.random.default_rng(0).integers(0, 1 << 32, 1_000_000, dtype=np.uint64).astype(np.uint32)
        halves = np.arange(1 << 15, dtype=np.uint16).view(np.float16).astype(np.float64)[:-1]
        with np.errstate(invalid="ignore"):
            midpoints = ((halves[:-1] + halves[1:]) / 2).astype(np.float32).view(np.uint32)  # exact in float32
        ties = np.concatenate([midpoints, (np.arange(1 << 16, dtype=np.uint32) << 16) | 0x8000])
        near = np.concatenate([ties - 1, ties, ties + 1])
        return np.concatenate([random, near, near | np.uint32(1 << 31)])

    def test_fp16_rounds_as_numpy_does(self, convert: Convert) -> None:
        bits = self.bit_patterns()
        with np.errstate(over="ignore", invalid="ignore"):
            expected = bits.view(np.float32).astype(np.float16)

        half = convert(bits)[0].view(np.float16)

        nan = np.isnan(expected)
        assert np.array_equal(half[~nan].view(np.uint16), expected[~nan].view(np.uint16))
        assert np.isnan(half[nan]).all()

    def test_bf16_rounds_to_the_nearest_and_ties_to_even(self, convert: Convert) -> None:
        bits = self.bit_patterns()
        bits = bits[np.isfinite(bits.view(np.float32))]
        value = bits.view(np.float32).astype(np.float64)
        below = (bits >> 16).astype(np.uint32)  # toward zero, and its neighbour away from it
        candidates = np.stack([below << 16, (below + 1) << 16]).astype(np.uint32).view(np.float32).astype(np.float64)
        # IEEE 754 rounds to infinity as if the next power of two were representable.
        candidates = np.where(np.isinf(candidates), np.sign(value) * 2.0**128, candidates)
        low, high = np.abs(candidates - value)
        expected = np.where((high < low) | ((high == low) & (below % 2 == 1)), below + 1, below)

        _, brain = convert(bits)

        assert np.array_equal(brain, expected.astype(np.uint16))

    @pytest.mark.parametrize("bits", [0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0xFF800001, 0x7F80FFFF])
    def test_no_nan_becomes_infinite(self, convert: Convert, bits: int) -> None:
        half, brain = convert(np.array([bits], np.uint32))

        assert np.isnan(half.view(np.float16)).all()
        assert np.isnan((brain.astype(np.uint32) << 16).view(np.float32)).all()
