"""The examples that begin with a PyTorch model, as a user without TensorRT runs them."""

import subprocess
import sys
from pathlib import Path

import onnx
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
HIDE = "import sys; sys.modules['tensorrt'] = None; import runpy; runpy.run_path(sys.argv.pop(1), run_name='__main__')"


@pytest.mark.parametrize(
    ("name", "option", "attributes"),
    [
        ("vision_transformer", "--output-dir", {"layout": b"packed", "causal": 0}),
        ("language_model", "--output_dir", {"num_kv_heads": 2, "causal": 1, "bottom_right": 1}),
    ],
)
def test_a_model_from_pytorch_to_one_with_the_plugins_nodes(
    name: str, option: str, attributes: dict[str, object], tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    command = [sys.executable, "-c", HIDE, str(EXAMPLES / f"{name}.py"), option, str(tmp_path)]

    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": same, ") == 3
    assert "No engine: TensorRT is not installed." in done.stdout
    nodes = [node for node in onnx.load(tmp_path / "model.pyfmha.onnx").graph.node if node.domain == "pyfmha"]
    assert len(nodes) == 2
    for node in nodes:
        values = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        assert attributes.items() <= values.items()


def test_an_onnx_model_and_what_it_cannot_read(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HIDE, str(EXAMPLES / "onnx_model.py"), "--output-dir", str(tmp_path / "out")]

    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wrong = subprocess.run([*command, str(tmp_path / "none.onnx")], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert "fp32, 4 heads of size 32, causal, scale 0.176777, layout bshd, window (15, -1)" in done.stdout
    assert done.stdout.count(": same, ") == 3
    assert "No engine: the full TensorRT is not installed." in done.stdout
    made = onnx.load(tmp_path / "out" / "model.pyfmha.onnx").graph.node
    assert [node.op_type for node in made if node.domain == "pyfmha"] == ["TritonFlashAttention"]
    assert "Softmax" not in {node.op_type for node in made}
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == f"error: no model at {tmp_path / 'none.onnx'}\n"
