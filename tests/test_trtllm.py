"""The TensorRT-LLM layer, in processes that find a double of its graph API on a double of TensorRT 10."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from fake_cuda import FakeCuda
from helpers import TESTS, run_python
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


@pytest.mark.parametrize("arguments", [(), ("--dtype", "bfloat16"), ("--no-causal",)])
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


@pytest.mark.parametrize("name", ["trtllm_build.py", "trtllm_run.py"])
def test_a_release_without_the_graph_api(machine: Machine, name: str) -> None:
    done = machine.example(name, TRTLLM_DOUBLE="removed")

    assert done.returncode == 2
    assert "error: TensorRT-LLM 1.3.0 has no graph API" in done.stderr
    assert "it was removed after 1.3.0rc20" in done.stderr
    assert "pip install 'tensorrt-llm<=1.3.0rc20'" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_tensorrt_llm() -> None:
    done = run_python(
        "import sys; sys.modules['tensorrt_llm'] = None\n"
        "import pyfmha.trtllm as layer\n"
        "try: layer.FmhaLayer\n"
        "except layer.GraphApiError as error: print(error)"
    )

    assert "TensorRT-LLM cannot be imported" in done.stdout
    assert "pip install 'tensorrt-llm<=1.3.0rc20'" in done.stdout


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

    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    wanted = [
        "2 inputs; it takes Q, K, V",
        "it must be HALF, BF16 or FLOAT",
        "head size 48 is not served",
        "softmax_scale is 0.0",
        "heads 2, the plugin was created for 3",
        "Q has 3 dimensions",
        "no attribute 'surprise'",
    ]
    assert len(lines) == len(wanted), lines
    for line, text in zip(lines, wanted, strict=True):
        assert text in line
