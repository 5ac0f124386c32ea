"""The TensorRT-LLM layer, in processes that find a double of its graph API on a double of TensorRT 10."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_cuda import FakeCuda
from helpers import LONG, TESTS, run_python, some_of
from trt_double.full.fixtures import example_environment

pytest_plugins = ["trt_double.fixtures"]

EXAMPLES = TESTS.parent / "examples"
SIZES = ("--num_heads", "2", "--head_size", "32")


class Machine:
    """Starts Python with the doubles."""

    def __init__(self, libcuda: Path, library: Path) -> None:
        self.environment = example_environment(libcuda, library, "10.14.1")

    def run(self, *arguments: str | Path, **settings: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            env={**self.environment, **settings},
        )

    def example(self, name: str, *arguments: str | Path, **settings: str) -> subprocess.CompletedProcess[str]:
        return self.run(EXAMPLES / name, *SIZES, *arguments, **settings)


@pytest.fixture(scope="module")
def machine(fake_driver: FakeCuda, attention_library_path: Path) -> Machine:
    return Machine(fake_driver.path, attention_library_path)


def check_lines(done: subprocess.CompletedProcess[str], wanted: list[str]) -> None:
    """A program ended well, and each line it printed has its text."""
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(wanted), lines
    for line, text in zip(lines, wanted, strict=True):
        assert text in line


@pytest.mark.parametrize("arguments", some_of([((),), (("--dtype", "bfloat16"),), (("--no-causal",),)]))
def test_the_programs_build_and_run(machine: Machine, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    limits = ("--max_batch_size", "2", "--max_seq_len", "40")
    built = machine.example("trtllm_build.py", *limits, "--output_dir", tmp_path, *arguments)
    assert built.returncode == 0, built.stderr

    done = machine.example("trtllm_run.py", "--batch_size", "2", "--seq_len", "17", "--engine_dir", tmp_path)

    assert done.returncode == 0, done.stderr
    assert "passed" in done.stdout
    assert (tmp_path / "model.cache").is_file()
    assert json.loads((tmp_path / "config.json").read_text())["builder_config"]["head_size"] == 32

    wrong = machine.example(
        "trtllm_run.py", "--batch_size", "1", "--seq_len", "5", "--engine_dir", tmp_path, FAKE_GPU_KERNEL="wrong"
    )
    outside = machine.example("trtllm_run.py", "--batch_size", "3", "--seq_len", "5", "--engine_dir", tmp_path)

    assert wrong.returncode == 1, wrong.stderr
    assert outside.returncode == 2, outside.stdout
    assert "the engine's profile does not allow [3, 2, 5, 32]" in outside.stderr


def check_error(done: subprocess.CompletedProcess[str], *texts: str) -> None:
    """Exit code 2, and one line that says what was wrong."""
    assert done.returncode == 2, done
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    for text in texts:
        assert text in line
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def engine(machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a built engine, which no test changes."""
    folder = tmp_path_factory.mktemp("engine_trtllm")
    done = machine.example("trtllm_build.py", "--max_batch_size", "2", "--max_seq_len", "40", "--output_dir", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("kind", ["", "early"])
def test_shapes_outside_the_profile(machine: Machine, engine: Path, kind: str) -> None:
    """The session of the later releases raises, that of the early ones answers with no shape."""
    sizes = ("--batch_size", "3", "--seq_len", "5", "--engine_dir", engine)
    done = machine.example("trtllm_run.py", *sizes, TRTLLM_DOUBLE=kind)

    check_error(done, "the engine's profile does not allow [3, 2, 5, 32]")


def test_an_engine_that_is_damaged(machine: Machine, engine: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(engine, tmp_path / "damaged"))
    (folder / "fmha_d32_float16.engine").write_bytes(b"damaged")

    check_error(machine.example("trtllm_run.py", "--engine_dir", folder), "the engine cannot be loaded or run here")


@pytest.mark.parametrize("kind", ["", "early"])
def test_an_engine_without_code_for_the_gpu(machine: Machine, engine: Path, kind: str) -> None:
    """There is no execution context, and the plugin says why."""
    done = machine.example("trtllm_run.py", "--engine_dir", engine, FAKE_GPU_DEVICES="80", TRTLLM_DOUBLE=kind)

    check_error(done, "TritonFlashAttention layer", "sm_80", "pyfmha build --arch sm_80")


def test_a_build_that_fails_shows_the_plugins_text(machine: Machine, tmp_path: Path) -> None:
    done = machine.example("trtllm_build.py", "--output_dir", tmp_path / "new", FAKE_GPU_DEVICES="80")

    check_error(done, "TritonFlashAttention layer", "sm_80", "pyfmha build --arch sm_80")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["trtllm_build.py", "trtllm_run.py"])
def test_a_driver_that_is_too_old_for_it(machine: Machine, engine: Path, tmp_path: Path, name: str) -> None:
    folder = {"trtllm_build.py": ("--output_dir", tmp_path / "new"), "trtllm_run.py": ("--engine_dir", engine)}[name]
    done = machine.example(name, *folder, TRT_DOUBLE_DRIVER="old")

    check_error(done, "TensorRT-LLM: TypeError", "nullptr", "its log says why")


def test_where_the_timing_cache_goes_is_checked_before_the_build(machine: Machine, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("")
    done = machine.example("trtllm_build.py", "--output_dir", tmp_path / "new", "--timing_cache", taken / "a.cache")

    check_error(done, "cannot write", "taken is no folder")
    assert not (tmp_path / "new").exists()

    cache = tmp_path / "another" / "folder" / "a.cache"
    done = machine.example("trtllm_build.py", "--output_dir", tmp_path / "new", "--timing_cache", cache)

    assert done.returncode == 0, done.stderr
    assert cache.is_file()


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("mpi", "its import fails: RuntimeError: cannot load MPI library"),
        ("cuda", "its import fails: ImportError: libcuda.so.1: cannot open shared object file"),
    ],
)
@pytest.mark.parametrize("name", [pytest.param("trtllm_build.py", marks=LONG), "trtllm_run.py"])
def test_a_machine_where_it_cannot_be_imported(machine: Machine, name: str, kind: str, text: str) -> None:
    done = machine.example(name, TRTLLM_DOUBLE=kind)

    check_error(done, f"TensorRT-LLM is installed, but {text}. See where it does: python -c 'import tensorrt_llm")
    assert "has no graph API" not in done.stderr


@pytest.mark.parametrize("name", ["trtllm_build.py", "trtllm_run.py"])
def test_a_release_without_the_graph_api(machine: Machine, name: str) -> None:
    done = machine.example(name, TRTLLM_DOUBLE="removed")

    assert done.returncode == 2
    assert "error: TensorRT-LLM 1.3.0 has no graph API" in done.stderr
    assert "it was removed after 1.3.0rc20" in done.stderr
    assert "pip install 'tensorrt-llm>=0.10,<=1.3.0rc20'" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_tensorrt_llm() -> None:
    done = run_python(
        "import sys; sys.modules['tensorrt_llm'] = None\n"
        "import pyfmha.trtllm as layer\n"
        "try: layer.FmhaLayer\n"
        "except layer.GraphApiError as error: print(error)"
    )

    assert "TensorRT-LLM is not installed" in done.stdout
    assert "pip install 'tensorrt-llm>=0.10,<=1.3.0rc20'" in done.stdout


def test_importing_the_module_imports_nothing_of_theirs() -> None:
    done = run_python(
        "import sys, pyfmha.trtllm\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('tensorrt', 'tensorrt_llm', 'torch', 'triton')])"
    )

    assert done.stdout == "[]\n", done.stderr


LAYER = """
import tensorrt as trt
from tensorrt_llm.builder import Builder
from tensorrt_llm.network import net_guard
import pyfmha.trtllm
from pyfmha.errors import PyfmhaError
from pyfmha.trtllm import FmhaLayer, flash_attention_op

assert pyfmha.trtllm.FmhaLayer is FmhaLayer
network = Builder().create_network()
with net_guard(network):
    layer = FmhaLayer(2, 32, 0.5, "float16")
    q, k, v = layer.prepare_inputs(7, 100)
    assert network.inputs == {name: [[1, 2, 1, 32], [4, 2, 50, 32], [7, 2, 100, 32]] for name in "QKV"}
    out = layer(q, k, v)
    assert tuple(out.trt_tensor.shape) == (-1, 2, -1, 32), out.trt_tensor.shape
    assert [t.name for t in network.trt_network.outputs] == ["out"]
    # TensorRT's own tensors will do, as in TensorRT-LLM's example
    raw = flash_attention_op(num_heads=2, head_size=32, softmax_scale=0.5, inputs=[t.trt_tensor for t in (q, k, v)])
    assert tuple(raw.trt_tensor.shape) == (-1, 2, -1, 32)
    integers = network.trt_network.add_input("I", trt.DataType.INT32, (-1, 2, -1, 32))
    flat = network.trt_network.add_input("F", trt.DataType.HALF, (-1, 2, -1))
    for arguments in [
        (2, 32, 0.5, [q, k]),
        (2, 32, 0.5, [integers] * 3),
        (2, 48, 0.5, [q, k, v]),
        (2, 32, 0.0, [q, k, v]),
        (3, 32, 0.5, [q, k, v]),
        (2, 32, 0.5, [flat] * 3),
    ]:
        try:
            flash_attention_op(*arguments)
        except PyfmhaError as error:
            print(error)
try:
    pyfmha.trtllm.surprise
except AttributeError as error:
    print(error)
"""


def test_the_layer_in_a_network(machine: Machine) -> None:
    done = machine.run("-c", LAYER)

    wanted = [
        "2 inputs; it takes Q, K, V, or one that holds all of them",
        "must be of type FLOAT, HALF, BF16, FP8, got Q",
        "Q [-1, 2, -1, 32] has head size 32, 48 was asked for",
        "scale is 0",
        "Q [-1, 2, -1, 32] has heads 2, 3 was asked for",
        "Q, K and V must be [batch, heads, seq, head size]",
        "no attribute 'surprise'",
    ]
    check_lines(done, wanted)


FEATURES = """
import runpy, sys
import tensorrt as trt
from tensorrt_llm.builder import Builder
from tensorrt_llm.network import net_guard
from pyfmha import Session
from pyfmha.errors import PyfmhaError
from pyfmha.trtllm import FmhaLayer, flash_attention_op

exact = runpy.run_path(sys.argv[1])
for causal, settings, keys in [
    ("bottom-right", dict(num_kv_heads=2, return_lse=True), 33),
    (False, dict(window=(3, 1), align="bottom-right", softcap=1.5, layout="bshd"), 33),
    (True, dict(q_lengths=True, kv_lengths=True, num_kv_heads=1, return_lse=True), None),
    (True, dict(cu_seqlens=True, num_kv_heads=2), 33),
    (True, dict(layout="packed", num_kv_heads=2, kv_lengths=True), None),
]:
    builder = Builder()
    network = builder.create_network()
    with net_guard(network):
        layer = FmhaLayer(4, 20, 0.25, "float16", causal, **settings)
        layer(*layer.prepare_inputs(3, 40, keys and 50))
    plan = builder.build_engine(network, builder.create_builder_config(precision="float16"))
    config = layer.engine_config(3, 40, keys and 50)
    inputs = exact["make_inputs"](config, 2, 17, keys or 17, 0)
    with Session(bytes(plan)) as session:
        results = session.run(inputs)
    results = {name.capitalize(): array for name, array in results.items()}
    found = exact["judge"](config, results, exact["exact_outputs"](config, inputs))
    assert [passed for _, passed in found] == [True] * (1 + config.return_lse), found

network = Builder().create_network()
with net_guard(network):
    layer = FmhaLayer(4, 20, 0.25, "float16", num_kv_heads=2, kv_lengths=True)
    q, k, v, lengths = layer.prepare_inputs(3, 40, 50)
    assert network.inputs["K"] == [[1, 2, 1, 20], [2, 2, 25, 20], [3, 2, 50, 20]], network.inputs
    assert network.inputs["kv_lengths"] == [[1], [2], [3]], network.inputs
    out, lse = flash_attention_op(
        4, 20, 0.25, [q, k, v], num_kv_heads=2, kv_lengths=lengths, return_lse=True, name="mine"
    )
    assert tuple(lse.trt_tensor.shape) == (-1, 4, -1) and lse.producer is out.producer
    plain = flash_attention_op(4, 20, 0.25, [q, k, v], kv_lengths=lengths.trt_tensor)
    names = [layer.name for layer in network.trt_network.layers]
    assert names == ["mine", "flash_attention_op/PLUGIN_V3_0"], names
    assert lse.trt_tensor.name == "mine_output_1"
    qkv = network.trt_network.add_input("QKV", trt.DataType.HALF, (-1, -1, 8, 20))
    for call in [
        lambda: flash_attention_op(4, 20, 0.25, [q, k, v], num_kv_heads=4),
        lambda: flash_attention_op(4, 20, 0.25, [q, k, v], softcap=-1.0),
        lambda: flash_attention_op(4, 20, 0.25, [q, k, v], causal="top"),
        lambda: flash_attention_op(4, 20, 0.25, [q, k, v], cu_seqlens_q=lengths),
        lambda: flash_attention_op(4, 24, 0.25, [qkv], num_kv_heads=2),
        lambda: flash_attention_op(6, 20, 0.25, [qkv], num_kv_heads=2),
        lambda: layer(q, k, v),
        lambda: FmhaLayer(4, 20, 0.25, "float16", num_kv_heads=3),
        lambda: FmhaLayer(4, 20, 0.25, "int32"),
        lambda: FmhaLayer(4, 20, 0.25, "fp8"),
    ]:
        try:
            call()
        except PyfmhaError as error:
            print(error)
    assert len(network.trt_network.layers) == 2 + 1  # the one whose heads only TensorRT compares
"""


INPUT_TYPES = """
from tensorrt_llm.builder import Builder
from tensorrt_llm.network import net_guard
from pyfmha.trtllm import FmhaLayer

network = Builder().create_network()
with net_guard(network):
    layer = FmhaLayer(4, 20, 0.25, "float16", bias="1hqk", bias_dtype="fp32", mask="b11k", sinks=True, kv_lengths=True)
    other = FmhaLayer(4, 20, 0.25, "bfloat16", bias="1hqk")
    for tensors in (layer.prepare_inputs(3, 40, 50), other.prepare_inputs(3, 40)):
        print(*(tensor.trt_tensor.dtype.name for tensor in tensors))
"""


def test_inputs_have_the_types_that_the_plugin_takes(fake_driver: FakeCuda, forward_library_path: Path) -> None:
    done = Machine(fake_driver.path, forward_library_path).run("-c", INPUT_TYPES)

    check_lines(done, ["HALF HALF HALF INT32 FLOAT BOOL FLOAT", "BF16 BF16 BF16 BF16"])


def test_the_layer_with_features(fake_driver: FakeCuda, forward_library_path: Path) -> None:
    machine = Machine(fake_driver.path, forward_library_path)

    done = machine.run("-c", FEATURES, EXAMPLES / "exact.py")

    wanted = [
        "K [-1, 2, -1, 20] has heads 2, 4 was asked for",
        "softcap is -1; give a finite number above 0",
        "causal is 'top'; allowed are True, False and 'bottom-right'",
        "cu_seqlens_q is given and cu_seqlens_kv is not",
        "QKV [-1, -1, 8, 20] has head size 20, 24 was asked for",
        "QKV has heads + 2 * kv heads 8, the plugin was created for 10",
        "3 inputs; it takes Q, K, V, kv_lengths",
        "num_heads is 4, num_kv_heads 3; num_heads must be a multiple",
        "dtype is 'int32'; allowed are float16, bfloat16, float32",
        "dtype is 'fp8'; allowed are float16, bfloat16, float32",
    ]
    check_lines(done, wanted)


NAMES = """
from tensorrt_llm.builder import Builder
from tensorrt_llm.network import net_guard
from pyfmha.trtllm import FmhaLayer, flash_attention_op

network = Builder().create_network()
def attend(inputs):
    return [flash_attention_op(2, 32, 0.5, inputs) for _ in range(2)]

with net_guard(network):
    layer = FmhaLayer(2, 32, 0.5, "float16", return_lse=True)
    inputs = layer.prepare_inputs(7, 100)
    layer(*inputs)
    attend(inputs), attend(inputs)
layers = network.trt_network.layers
for made in layers:
    print(made.name)
assert [output.name for output in layers[0].outputs] == ["out", "lse"]
assert [output.name for output in layers[1].outputs] == ["attend/flash_attention_op/PLUGIN_V3_0_output_0"]
"""


def test_names_of_layers_hold_no_lines_of_source(fake_driver: FakeCuda, forward_library_path: Path) -> None:
    done = Machine(fake_driver.path, forward_library_path).run("-c", NAMES)

    plain = [f"attend/flash_attention_op/PLUGIN_V3_{number}" for number in range(4)]
    check_lines(done, ["FmhaLayer/flash_attention_op/PLUGIN_V3_1", *plain])
    assert done.stdout.splitlines()[1:] == plain
    assert len(set(done.stdout.splitlines())) == 5
