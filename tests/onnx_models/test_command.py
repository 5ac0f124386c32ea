"""``pyfmha onnx`` and ``pyfmha onnx-engine`` as a user runs them: files, reports, exit codes."""

import json
import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from models import BOOL, Graph, attention, heads
from typer.testing import CliRunner, Result

from pyfmha.cli.main import app
from pyfmha.errors import OnnxError
from pyfmha.onnx import command, replace_attention
from pyfmha.onnx.engine import check_ranges, parsed_range
from pyfmha.onnx.files import read_model
from pyfmha.onnx.prove import prove
from pyfmha.onnx.replace import replaced


def model_of(mask: Any = None, name: str = "batch") -> onnx.ModelProto:
    graph = Graph()
    q, k, v = heads(graph, (name, 4, "rows", 16), (name, 4, "keys", 16))
    out = attention(graph, q, k, v, mask=mask and (lambda scores: mask(graph, scores)))
    graph.output(graph.op("Add", out, graph.constant(np.ones((4, 1, 16)))))
    return graph.model()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    onnx.save(model_of(), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments: str | Path) -> str:
    """The one line of an error with exit code 2."""
    done = run(*arguments)
    assert done.exit_code == 2, done.output
    (line,) = [line for line in done.stderr.splitlines() if line.strip()]
    return line


def test_it_replaces_proves_reports_and_writes(model: Path) -> None:
    before = model.read_bytes()

    done = run("onnx", model, "--report", model.with_name("report.json"), "--prove", "--size", "batch=2", "rows=3")

    assert done.exit_code == 0, done.output
    assert "1 of 1 replaced, the same in 3 runs" in done.stdout
    assert "pyfmha build --dtype fp32 --head-size 32" in done.stdout
    assert model.read_bytes() == before
    new = onnx.load(model.with_name("model.pyfmha.onnx"))
    assert [node.op_type for node in new.graph.node] == ["TritonFlashAttention", "Add"]
    report = json.loads(model.with_name("report.json").read_text())
    assert (report["found"], report["replaced"], report["functions"]) == (1, 1, ["fmha_fwd_d32_fp32"])
    assert report["attention"][0]["attributes"]["softmax_scale"] == 0.25
    assert [trial["sizes"]["rows"] for trial in report["proof"]] == [3, 3, 3]
    assert sorted(path.name for path in model.parent.iterdir()) == ["model.onnx", "model.pyfmha.onnx", "report.json"]


@pytest.mark.parametrize(
    ("name", "value"), [("causal", 1), ("softmax_scale", 0.26), ("window_left", 2), ("softcap", 2.0)]
)
def test_the_proof_finds_a_node_that_computes_something_else(
    model: Path, name: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(original: Any) -> Any:
        new, report = replaced(original)
        (node,) = (node for node in new.graph if node.domain == "pyfmha")
        kind = type(node.attributes[name].value)
        node.attributes.add(type(node.attributes[name])(name, node.attributes[name].type, kind(value)))
        return new, report

    monkeypatch.setattr(command, "replaced", wrong)

    done = run("onnx", model, "--prove", "--report", model.with_name("report.json"))

    assert done.exit_code == 1
    assert "DIFFERENT" in done.stdout
    assert "no model was written" in done.stdout
    assert sorted(path.name for path in model.parent.iterdir()) == ["model.onnx", "report.json"]


def test_the_proof_takes_rounding_for_what_it_is(model: Path) -> None:
    original = read_model(model)
    new, _ = replaced(original.clone())

    trials = prove(original, new)

    for trial in trials:
        for entry in trial.compared:
            assert entry.error < 1e-6
            assert 1e-6 < entry.explained < 1e-3


def test_models_that_cannot_be_read(model: Path) -> None:
    folder = model.parent
    (folder / "cut.onnx").write_bytes(model.read_bytes()[:-40])
    (folder / "empty.onnx").write_bytes(b"")
    (folder / "other.onnx").write_bytes(b"no model at all, but a text")
    broken = model_of()
    broken.graph.node[0].input[0] = "nowhere"
    onnx.save(broken, folder / "broken.onnx")

    assert "no model at" in refused("onnx", folder / "none.onnx")
    assert "is truncated, or no ONNX model" in refused("onnx", folder / "cut.onnx")
    assert "is empty" in refused("onnx", folder / "empty.onnx")
    assert "other.onnx" in refused("onnx", folder / "other.onnx")
    assert "nowhere" in refused("onnx", folder / "broken.onnx")
    assert [path.name for path in folder.glob("*.pyfmha.onnx")] == []


def test_an_operator_that_onnx_does_not_know(tmp_path: Path) -> None:
    """As ONNX Runtime's optimizer writes them, in ONNX's own domain."""
    made = model_of()
    made.graph.node[-1].op_type = "SkipSomething"
    onnx.save(made, tmp_path / "model.onnx")

    assert run("onnx", tmp_path / "model.onnx").exit_code == 0


def test_models_with_nothing_to_replace(tmp_path: Path) -> None:
    plain = Graph()
    plain.output(plain.op("Relu", plain.input("x", (1, 2, 3, 4))))
    onnx.save(plain.model(), tmp_path / "plain.onnx")
    unknown = model_of(lambda g, s: g.op("Where", g.input("mask", (1, 1, 1, "others"), BOOL), s, g.constant(-np.inf)))
    onnx.save(unknown, tmp_path / "unknown.onnx")

    assert "plain.onnx has no attention" in refused("onnx", tmp_path / "plain.onnx")
    text = refused("onnx", tmp_path / "unknown.onnx")
    assert "none of the 1 attentions" in text
    assert "leave the shape of the scores" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain.onnx", "unknown.onnx"]


def test_the_original_is_never_written_over(model: Path) -> None:
    assert "is the original; name another file" in refused("onnx", model, "-o", model)
    (model.parent / "link.onnx").symlink_to(model)
    assert "is the original; name another file" in refused("onnx", model, "-o", model.parent / "link.onnx")


def test_a_library_that_lacks_the_functions(model: Path, small_library_path: Path) -> None:
    text = refused("onnx", model, "--library", small_library_path)

    assert "lacks fmha_fwd_d32_fp32; build a library with them: pyfmha build --dtype fp32 --head-size 32" in text
    assert not model.with_name("model.pyfmha.onnx").exists()


def test_sizes_that_do_not_go_together(model: Path) -> None:
    assert "--size rows is not NAME=NUMBER" in refused("onnx", model, "--prove", "--size", "rows")
    assert "the model has no free axis columns" in refused("onnx", model, "--prove", "--size", "columns=3")


@pytest.fixture
def heavy(tmp_path: Path) -> Path:
    """A model with weights in a file of their own."""
    folder = tmp_path / "original"
    folder.mkdir()
    graph = Graph()
    q, k, v = heads(graph)
    weights = graph.constant(np.random.default_rng(0).normal(size=(16, 16)))
    graph.output(graph.op("MatMul", attention(graph, q, k, v), weights))
    path = folder / "model.onnx"
    onnx.save(graph.model(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


def test_external_weights_stay_where_they_are(heavy: Path) -> None:
    weights = heavy.with_name("weights.bin")
    before = weights.read_bytes()

    done = run("onnx", heavy, "--prove")

    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in heavy.parent.iterdir()) == ["model.onnx", "model.pyfmha.onnx", "weights.bin"]
    assert weights.read_bytes() == before
    new = onnx.load(heavy.with_name("model.pyfmha.onnx"))
    assert [node.op_type for node in new.graph.node] == ["TritonFlashAttention", "MatMul"]


def test_in_another_folder_external_weights_are_copied(heavy: Path, tmp_path: Path) -> None:
    target = tmp_path / "new" / "model.onnx"

    assert run("onnx", heavy, "-o", target).exit_code == 0

    assert sorted(path.name for path in target.parent.iterdir()) == ["model.onnx", "model.onnx.data"]
    wanted = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(heavy).graph.initializer}
    got = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(target).graph.initializer}
    for name, array in got.items():
        np.testing.assert_array_equal(array, wanted[name])


def test_truncated_external_weights(heavy: Path, tmp_path: Path) -> None:
    weights = heavy.with_name("weights.bin")
    weights.write_bytes(weights.read_bytes()[:-1])
    before = sorted(heavy.parent.iterdir())

    for arguments in ((), ("-o", tmp_path / "elsewhere" / "new.onnx"), ("--prove",)):
        text = refused("onnx", heavy, *arguments)
        assert f"{weights}, the weights of {heavy}, is truncated: " in text
        assert "ends at byte 1028, the file at 1027; copy it again" in text

    assert sorted(heavy.parent.iterdir()) == before
    assert not (tmp_path / "elsewhere").exists()


def test_missing_external_weights(heavy: Path) -> None:
    heavy.with_name("weights.bin").unlink()

    assert "weights.bin" in refused("onnx", heavy, "--prove")


def test_weights_are_not_loaded(heavy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file without bytes in it stands for one larger than memory."""
    model = onnx.load(heavy, load_external_data=False)
    (big,) = (tensor for tensor in model.graph.initializer if list(tensor.dims) == [16, 16])
    big.dims[:] = [1 << 15, 1 << 15]
    for entry in big.external_data:
        if entry.key == "length":
            entry.value = str(4 << 30)
        if entry.key == "offset":
            entry.value = "0"
    with heavy.with_name("weights.bin").open("r+b") as file:
        file.truncate(4 << 30)
    model.graph.node[-1].op_type, model.graph.node[-1].input[:] = "Identity", model.graph.node[-1].input[:1]
    model.graph.output.append(onnx.helper.make_tensor_value_info(big.name, 1, [1 << 15, 1 << 15]))
    onnx.save(model, heavy)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    done = run("onnx", heavy)

    assert done.exit_code == 0, done.output
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB: less than 1 GiB


NO_TENSORRT = ("tensorrt", "tensorrt_lean", "tensorrt_dispatch")


@pytest.fixture
def without_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NO_TENSORRT:
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.usefixtures("without_tensorrt")
def test_an_engine_without_tensorrt(model: Path) -> None:
    run("onnx", model)

    text = refused("onnx-engine", model.with_name("model.pyfmha.onnx"), "-o", model.with_name("engine"))

    assert "TensorRT is not installed" in text
    assert not model.with_name("engine").exists()


def test_ranges(model: Path) -> None:
    shape = parsed_range(("1x4x1x16", "2x4x8x16", "4x4x64x16"))
    assert shape == ((1, 4, 1, 16), (2, 4, 8, 16), (4, 4, 64, 16))
    assert check_ranges(model, dict.fromkeys("qkv", shape)) == dict.fromkeys("qkv", shape)
    for ranges, text in (
        ({"q": shape, "k": shape}, "the input v has free axes batch, keys; give --range v MIN BEST MAX"),
        (dict.fromkeys("qkvx", shape), "has no input x; it has q, k, v"),
        (dict.fromkeys("qkv", parsed_range(("1x4x1x8",) * 3)), "the model has batchx4xrowsx16"),
    ):
        with pytest.raises(OnnxError, match=text.replace("(", "\\(")):
            check_ranges(model, ranges)
    for words, text in ((("1x2", "1xa", "1x2"), "is no shape"), (("1x2", "2", "3x2"), "as many axes"),
                        (("2x2", "1x2", "3x2"), "must grow")):  # fmt: skip
        with pytest.raises(OnnxError, match=text):
            parsed_range(words)


def test_what_is_missing_is_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("pyfmha.onnx")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnx_ir", None)

    assert "this needs onnx_ir: pip install -e '.[onnx]'" in refused("onnx", model)


def test_a_model_in_memory() -> None:
    new, report = replace_attention(model_of())

    assert isinstance(new, onnx.ModelProto)
    assert len(report.replaced) == 1
