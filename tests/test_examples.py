"""The engine programs and the notebook as users start them, with doubles in the place of TensorRT and the GPU."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fake_cuda import FakeCuda
from helpers import LONG, TESTS, snapshot, some_of
from shared import Shared
from trt_double.full.fixtures import example_environment

import pyfmha
from pyfmha.aot import build
from pyfmha.attention.forward import Forward
from pyfmha.spec.arch import parse_archs

pytest_plugins = ["trt_double.fixtures"]

ROOT = TESTS.parent
EXAMPLES = ROOT / "examples"
SIZES = ("--num_heads", "2", "--head_size", "32")
PNG = b"\x89PNG\r\n"


class Examples:
    """Runs a program with the doubles."""

    def __init__(self, libcuda: Path, library: Path) -> None:
        self.libcuda, self.library = libcuda, library

    def run(
        self, name: str, *arguments: str | Path, before: str = "", **settings: str
    ) -> subprocess.CompletedProcess[str]:
        """Run ``examples/name``; ``before`` is Python code that sets the scene in the process."""
        file = EXAMPLES / name
        code = (
            f"import runpy, sys\n{before}\nsys.argv = [{str(file)!r}, *sys.argv[1:]]\n"
            f"sys.path.insert(0, {str(EXAMPLES)!r})\nrunpy.run_path({str(file)!r}, run_name='__main__')"
        )
        start = ["-c", code] if before else [str(file)]
        environment = {**example_environment(self.libcuda, self.library), **settings}
        return subprocess.run(
            [sys.executable, *start, *map(str, arguments)], capture_output=True, text=True, check=False, env=environment
        )

    def build(
        self, folder: Path, *arguments: str | Path, before: str = "", **settings: str
    ) -> subprocess.CompletedProcess[str]:
        sizes = (*SIZES, "--max_batch_size", "2", "--max_seq_len", "40")
        return self.run("build.py", *sizes, "--output_dir", folder, *arguments, before=before, **settings)


def run_sizes(batch: int, seq: int, folder: Path) -> tuple[str | Path, ...]:
    return (*SIZES, "--batch_size", str(batch), "--seq_len", str(seq), "--engine_dir", folder)


@pytest.fixture(scope="module")
def examples(fake_driver: FakeCuda, attention_library_path: Path) -> Examples:
    return Examples(fake_driver.path, attention_library_path)


@pytest.fixture(scope="module")
def engine(examples: Examples, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a built engine, which no test changes."""
    folder = tmp_path_factory.mktemp("engine")
    done = examples.build(folder)
    assert done.returncode == 0, done.stderr
    return folder


def assert_error(done: subprocess.CompletedProcess[str], *texts: str) -> None:
    """Exit code 2, one line that says what was wrong, no traceback."""
    assert done.returncode == 2, done
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    for text in texts:
        assert text in line
    assert "Traceback" not in done.stderr


def test_build_writes_engine_configuration_and_timing_cache(engine: Path) -> None:
    config = json.loads((engine / "config.json").read_text())

    assert sorted(snapshot(engine)) == ["config.json", "fmha.engine", "timing.cache"]
    assert config["dtype"] == "fp16"
    assert (config["num_heads"], config["head_size"], config["max_batch_size"], config["max_seq_len"]) == (2, 32, 2, 40)
    assert config["causal"] is True


def test_run_checks_the_output(examples: Examples, engine: Path) -> None:
    done = examples.run("run.py", *run_sizes(2, 17, engine), "--log_level", "verbose", "--seed", "3")

    assert done.returncode == 0, done.stderr
    assert "[2, 2, 17, 32] fp16: relative error" in done.stdout
    assert "passed" in done.stdout
    assert sorted(snapshot(engine)) == ["config.json", "fmha.engine", "timing.cache"]


@pytest.mark.parametrize(
    ("arguments", "version"),
    [
        (("--dtype", "bfloat16"), "10.14.1"),
        (("--dtype", "float32", "--profiling_verbosity", "detailed"), "10.13.3"),
        (("--no-causal",), "11.1.0"),
    ],
)
def test_other_types_masks_and_versions(
    examples: Examples, tmp_path: Path, arguments: tuple[str, ...], version: str
) -> None:
    built = examples.build(tmp_path, *arguments, TRT_DOUBLE_VERSION=version)
    assert built.returncode == 0, built.stderr
    assert f"TensorRT {version}" in built.stdout

    done = examples.run("run.py", *run_sizes(1, 40, tmp_path), TRT_DOUBLE_VERSION=version)

    assert done.returncode == 0, done.stderr


def test_the_kernels_own_source_gives_the_result(examples: Examples, engine: Path) -> None:
    """As the others, but the fake GPU runs the kernel under Triton's interpreter instead of numpy's attention."""
    done = examples.run("run.py", *run_sizes(1, 7, engine), FAKE_GPU_KERNEL="interpreter")

    assert done.returncode == 0, done.stderr


def test_a_wrong_result_is_exit_code_1(examples: Examples, engine: Path) -> None:
    done = examples.run("run.py", *run_sizes(1, 7, engine), FAKE_GPU_KERNEL="wrong")

    assert done.returncode == 1
    assert "relative error 1.0e-02 against float64, limit 5e-04: FAILED" in done.stdout


def test_the_benchmark_prints_and_saves_every_row(examples: Examples, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert examples.build(tmp_path).returncode == 0
    before = "sys.modules['torch'] = None"

    done = examples.run("run.py", *run_sizes(2, 16, tmp_path), "--benchmark", before=before)

    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "benchmark.json").read_text())
    rows = {row["name"]: row for row in results["rows"]}
    timed = [name for name, row in rows.items() if row["us"] is not None]
    assert timed == ["TensorRT, pyfmha's plugin", "the same as a CUDA graph", "TensorRT's own attention layer"]
    assert all(rows[name]["us"] > 0 and rows[name]["error"] < 2e-3 and rows[name]["tflops"] > 0 for name in timed)
    assert {row["missing"] for name, row in rows.items() if name not in timed} == {"torch is not installed"}
    assert len(rows) == 8
    assert all(name in done.stdout for name in rows)
    assert "torch, MATH" in done.stdout
    assert (results["shape"], results["gpu"]["arch"]) == ([2, 2, 16, 32], "sm_90")
    assert (tmp_path / "benchmark.png").read_bytes().startswith(PNG)


def test_the_benchmark_without_matplotlib_or_tensorrts_own_layer(examples: Examples, tmp_path: Path) -> None:
    assert examples.build(tmp_path, TRT_DOUBLE_VERSION="10.13.3").returncode == 0
    before = "sys.modules['torch'] = sys.modules['matplotlib'] = None"

    done = examples.run(
        "run.py", *run_sizes(1, 8, tmp_path), "--benchmark", before=before, TRT_DOUBLE_VERSION="10.13.3"
    )

    assert done.returncode == 0, done.stderr
    assert "no plot: matplotlib is not installed" in done.stdout
    assert "10.13.3 has no attention layer of its own" in done.stdout
    assert (tmp_path / "benchmark.json").exists()
    assert not (tmp_path / "benchmark.png").exists()


def test_the_timing_cache_is_read_and_written_where_it_is_named(examples: Examples, tmp_path: Path) -> None:
    cache = tmp_path / "shared" / "my.cache"
    for _ in range(2):
        assert examples.build(tmp_path / "engine", "--timing_cache", cache).returncode == 0
    assert cache.is_file()
    assert sorted(snapshot(tmp_path / "engine")) == ["config.json", "fmha.engine"]


def test_a_build_that_fails_leaves_the_earlier_engine(examples: Examples, tmp_path: Path) -> None:
    assert examples.build(tmp_path).returncode == 0
    before = snapshot(tmp_path)
    (tmp_path / "damaged.cache").write_bytes(b"no cache")

    done = examples.build(tmp_path, "--timing_cache", tmp_path / "damaged.cache")

    assert_error(done, "timing cache is damaged")
    (tmp_path / "damaged.cache").unlink()
    assert snapshot(tmp_path) == before


NO_TENSORRT = "for name in ('tensorrt', 'tensorrt_lean', 'tensorrt_dispatch'): sys.modules[name] = None"
NO_GPU = "import os; os.environ['FAKE_GPU_DEVICES'] = ''"
OLD_GPU = "import os; os.environ['FAKE_GPU_DEVICES'] = '80'"


@pytest.mark.parametrize(
    ("arguments", "before", "texts"),
    [
        ((), NO_TENSORRT, ("TensorRT is not installed",)),
        ((), NO_GPU, ("cuInit failed",)),
        ((), OLD_GPU, ("sm_80", "built for sm_90", "pyfmha build --arch sm_80")),
        (("--head_size", "64"), "", ("does not hold fmha_fwd_d64_fp16", "pyfmha build --dtype fp16 --head-size 64")),
    ],
    ids=["no TensorRT", "no GPU", "no code for the GPU", "no kernel in the library"],
)
def test_what_stops_a_build(
    examples: Examples, tmp_path: Path, arguments: tuple[str, ...], before: str, texts: tuple[str, ...]
) -> None:
    done = examples.build(tmp_path / "new", *arguments, before=before)

    assert_error(done, *texts)
    assert not (tmp_path / "new").exists()


def test_a_missing_library(examples: Examples, tmp_path: Path) -> None:
    done = examples.build(tmp_path, PYFMHA_LIBRARY=str(tmp_path / "none.so"))

    assert_error(done, "pyfmha build")


def test_a_driver_that_is_too_old(examples: Examples, engine: Path, tmp_path: Path) -> None:
    """TensorRT gives neither builder nor runtime, and its reason as a warning."""
    reason = "CUDA initialization failure with error: 35"

    built = examples.build(tmp_path / "new", TRT_DOUBLE_DRIVER="old")
    done = examples.run("run.py", *run_sizes(1, 8, engine), TRT_DOUBLE_DRIVER="old")

    assert_error(built, "gives no Builder here", reason, "driver")
    assert_error(done, "gives no Runtime here", reason, "driver")
    assert not (tmp_path / "new").exists()


def test_where_the_timing_cache_goes_is_checked_before_the_build(examples: Examples, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")

    assert_error(examples.build(tmp_path / "new", "--timing_cache", tmp_path / "taken" / "a.cache"), "is no folder")
    assert not (tmp_path / "new").exists()


def test_an_output_folder_that_is_a_file(examples: Examples, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")

    assert_error(examples.build(tmp_path / "taken"), "taken")


@pytest.mark.parametrize(
    ("sizes", "before", "texts"),
    [
        ((3, 8), "", ("outside the engine's optimisation profile", "[3, 2, 8, 32]", "to [2, 2, 40, 32]")),
        ((1, 41), "", ("outside the engine's optimisation profile", "[1, 2, 41, 32]")),
        ((1, 8), NO_TENSORRT, ("TensorRT is not installed",)),
        ((1, 8), OLD_GPU, ("code for sm_90", "which is sm_80", "pyfmha build --arch sm_80")),
    ],
    ids=["batch", "seq", "no TensorRT", "no code for the GPU"],
)
def test_what_stops_a_run(
    examples: Examples, engine: Path, sizes: tuple[int, int], before: str, texts: tuple[str, ...]
) -> None:
    assert_error(examples.run("run.py", *run_sizes(*sizes, engine), before=before), *texts)


def test_an_engine_for_other_heads(examples: Examples, engine: Path) -> None:
    done = examples.run("run.py", "--num_heads", "4", "--head_size", "32", "--engine_dir", engine)

    assert_error(done, "was built for 2 heads of size 32, not 4 of 32", "examples/build.py --num-heads 4")


def test_a_missing_engine_and_a_missing_configuration(examples: Examples, engine: Path, tmp_path: Path) -> None:
    assert_error(examples.run("run.py", *run_sizes(1, 8, tmp_path)), "no engine configuration")
    (tmp_path / "config.json").write_bytes((engine / "config.json").read_bytes())
    assert_error(examples.run("run.py", *run_sizes(1, 8, tmp_path)), "no engine at")


def test_arguments_out_of_range(examples: Examples, tmp_path: Path) -> None:
    done = examples.build(tmp_path, "--num_heads", "0")

    assert done.returncode == 2
    assert "0 is not 1 or more" in done.stderr


FEATURES = (
    *("--num_kv_heads", "1", "--max_kv_seq_len", "50", "--align", "bottom-right", "--window", "4", "-1"),
    *("--softcap", "2", "--layout", "bshd", "--return_lse", "--kv_lengths"),
)


@pytest.fixture(scope="module")
def with_features(fake_driver: FakeCuda, forward_library_path: Path) -> Examples:
    return Examples(fake_driver.path, forward_library_path)


def test_an_engine_with_features_is_built_and_checked(with_features: Examples, tmp_path: Path) -> None:
    built = with_features.build(tmp_path, *FEATURES)
    assert built.returncode == 0, built.stderr
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["num_kv_heads"], config["window"], config["softcap"], config["q_lengths"]) == (1, [4, -1], 2, False)
    sizes = (*run_sizes(2, 17, tmp_path), "--kv_seq_len", "33")

    done = with_features.run("run.py", *sizes)
    wrong = with_features.run("run.py", *sizes, FAKE_GPU_KERNEL="wrong_lse")

    assert done.returncode == 0, done.stderr
    assert "[2, 17, 2, 32] fp16: relative error" in done.stdout
    assert "log-sum-exp [2, 2, 17]: error" in done.stdout
    assert done.stdout.count("passed") == 2
    assert wrong.returncode == 1, wrong.stderr
    assert (wrong.stdout.count("passed"), wrong.stdout.count("FAILED")) == (1, 1)
    assert_error(
        with_features.run("run.py", *sizes, "--benchmark"), "serves no num_kv_heads, max_kv_seq_len, align, window"
    )


def test_the_benchmark_is_of_equal_lengths(examples: Examples, engine: Path) -> None:
    """Its other rows take keys to be as many as queries."""
    done = examples.run("run.py", *run_sizes(1, 8, engine), "--kv_seq_len", "9", "--benchmark")

    assert_error(done, "--benchmark compares with what serves no kv_seq_len")


@pytest.mark.long
def test_a_packed_engine_with_lengths(with_features: Examples, tmp_path: Path) -> None:
    features = ("--layout", "packed", "--q_lengths", "--kv_lengths", "--no-causal", "--dtype", "bfloat16")
    assert with_features.build(tmp_path, *features).returncode == 0

    done = with_features.run("run.py", *run_sizes(2, 17, tmp_path))

    assert done.returncode == 0, done.stderr
    assert "[2, 17, 2, 32] bf16: relative error" in done.stdout
    assert_error(
        with_features.run("run.py", *run_sizes(2, 17, tmp_path), "--kv_seq_len", "18"),
        "kv_seq_len is 18, seq_len 17", "leave --kv-seq-len out",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--num_kv_heads", "3"), "num_heads is 2, num_kv_heads 3"),
        (("--softcap", "-1"), "softcap is -1; give a finite number above 0"),
        (("--layout", "packed", "--max_kv_seq_len", "50"), "leave max_kv_seq_len out"),
    ],
)
def test_features_that_cannot_be(
    with_features: Examples, tmp_path: Path, arguments: tuple[str, ...], text: str
) -> None:
    assert_error(with_features.build(tmp_path / "new", *arguments), text)
    assert not (tmp_path / "new").exists()


RUN_NOTEBOOK = """
import sys
import nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], 4)
titles = [cell["source"].partition("\\n")[0] for cell in notebook.cells]
if sys.argv[4:]:
    notebook.cells = notebook.cells[: titles.index(sys.argv[4])]
(begins,) = [cell for cell in notebook.cells if "work = Path(folder.name)" in cell["source"]]
begins["source"] += sys.argv[3]  # its builds find what the run of the tests has compiled
NotebookClient(notebook, timeout=900, kernel_name="python3").execute()
nbformat.write(notebook, sys.argv[2])
"""


LENT = """
for lent in "aot_out", "own":
    (work / lent).mkdir()
    (work / lent / "cache").symlink_to({cache!r})
"""


def run_notebook(folder: Path, environment: dict[str, str], shared: Shared, *until: str) -> tuple[str, int]:
    """What the notebook prints, and how many pictures it draws."""
    for module in ("nbclient", "nbformat", "ipykernel", "matplotlib"):
        pytest.importorskip(module, exc_type=ImportError)
    environment.pop("MPLBACKEND")  # the notebook's own backend, as for a user
    result = folder / "result.ipynb"
    shared.lend(folder / "lent")
    lent = LENT.format(cache=str((folder / "lent" / "cache").resolve()))
    done = subprocess.run(
        [sys.executable, "-c", RUN_NOTEBOOK, str(EXAMPLES / "fmha.ipynb"), str(result), lent, *until],
        capture_output=True, text=True, check=False, env=environment, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    outputs = [out for cell in json.loads(result.read_text())["cells"] for out in cell.get("outputs", [])]
    text = "".join("".join(out.get("text", "")) for out in outputs)
    return text, sum("image/png" in out.get("data", {}) for out in outputs)


@LONG
def test_the_notebook_runs_without_gpu_and_tensorrt(tmp_path: Path, shared: Shared) -> None:
    hidden = tmp_path / "hidden"
    for name in ("tensorrt", "tensorrt_lean", "tensorrt_dispatch", "tensorrt_rtx"):
        (hidden / name).mkdir(parents=True)
        (hidden / name / "__init__.py").write_text("raise ModuleNotFoundError('hidden by the test', name=__name__)\n")
    environment = example_environment(None, None) | {"CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = f"{hidden}:{ROOT}"

    text, pictures = run_notebook(tmp_path, environment, shared)

    assert "GPU: none" in text
    assert "TensorRT: none" in text
    assert "the kernel under the interpreter: relative error" in text
    assert text.count("not run here: it needs the full TensorRT and a GPU") == 2
    assert "1 of 1 replaced, the same in 3 runs" in text
    assert "pyfmha::TritonFlashAttention" in text
    assert "getCreators: 1 creator" in text
    assert "no TensorRT is installed" in text
    assert "Gated: refuses a field that it does not know" in text
    assert "WRONG" not in text
    assert pictures == 3


@pytest.mark.parametrize("name", some_of(["vision_transformer.py", "language_model.py"]))
def test_a_model_without_pytorch_is_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ModuleNotFoundError('hidden by the test', name='torch')\n")
    done = subprocess.run(
        [sys.executable, EXAMPLES / name], capture_output=True, text=True, check=False, cwd=tmp_path,
        env=example_environment(None, None) | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (2, "error: PyTorch is not installed: pip install torch\n")
    assert [file.name for file in tmp_path.iterdir()] == ["torch"], "nothing is written"


@LONG
def test_the_notebook_builds_and_runs_an_engine(tmp_path: Path, shared: Shared, fake_driver: FakeCuda) -> None:
    """Up to the kernel of one's own, which the double of a GPU does not compute."""
    archs = parse_archs(["sm_90"])
    specs = [spec for spec in Forward("fp16", 64).specs() if not spec.archs]
    library = shared.once("notebook", lambda folder: build(specs, archs, folder, jobs=1).library)

    text, _ = run_notebook(
        tmp_path, example_environment(fake_driver.path, library), shared, "## 5. A kernel of your own as a plugin"
    )

    assert re.search(r"an engine of \d+ bytes, by TensorRT \S+\nrelative error", text)
    assert "not run here" not in text


def test_the_notebook_needs_no_internals() -> None:
    """What it imports is public: the package itself, and what its guides name."""
    cells = json.loads((EXAMPLES / "fmha.ipynb").read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")

    used = set(re.findall(r"(?:from|import) (pyfmha[\w.]*)", code))
    assert used == {"pyfmha", "pyfmha.attention.reference", "pyfmha.runtime.device"}
    assert set(re.findall(r"\bpyfmha\.([A-Za-z]\w*)\(", code)) <= set(pyfmha.__all__)
    assert not re.search(r"\._(?!_)\w", code)


def test_the_table_names_every_program() -> None:
    """Users' programs with what they show, need and take; maintainers' are apart."""
    text = (EXAMPLES / "README.md").read_text()
    rows = re.findall(r"^\| (\[.*?) \| (.+?) \| (.+?) \| (.+?) \|$", text, re.MULTILINE)
    named = {link for first, *_ in rows for link in re.findall(r"\]\(([\w./]+)\)", first)}
    parts = set(re.findall(r"`(\w+\.py)`", text.partition("are parts of these programs")[0].rpartition("\n\n")[2]))

    there = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}
    there |= {f"{path.name}/" for path in EXAMPLES.iterdir() if path.is_dir() and path.name != "__pycache__"}
    there = there - {"c/", "maintainers/", "results/"} | {f"c/{path.name}" for path in EXAMPLES.glob("c/*.c*")}
    assert named == there - parts
    assert parts <= there
    assert "[`maintainers/`](maintainers/)" in text


def test_the_notebook_is_stored_without_outputs() -> None:
    cells = json.loads((EXAMPLES / "fmha.ipynb").read_text())["cells"]

    assert [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")] == []


def test_options_have_hyphens_and_dtypes_either_name(examples: Examples, engine: Path, tmp_path: Path) -> None:
    sizes = ("--num-heads", "2", "--head-size=32", "--max-batch-size", "2", "--max-seq-len", "40")
    built = examples.run("build.py", *sizes, "--dtype", "fp16", "--output-dir", tmp_path)

    assert built.returncode == 0, built.stderr
    assert (tmp_path / "config.json").read_text() == (engine / "config.json").read_text()
    helped = examples.run("run.py", "--help").stdout
    assert "--engine-dir" in helped
    assert not re.search(r"--[a-z]+_", helped)
