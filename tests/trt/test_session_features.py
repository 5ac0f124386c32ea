"""Everything that ``fmha_fwd_*`` serves, run by both sessions on doubles of TensorRT and of the GPU.

The fake GPU computes from the addresses and strides that reach the driver; what is expected is computed from the
arrays themselves.
"""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trt_gpu_features
from fake_cuda import FakeCuda
from helpers import LONG, TESTS, few_of, some_of
from trt_double.binding import DataType, make_binding
from trt_double.full import VERSIONS, make_full
from trt_double.full.fixtures import example_environment
from trt_double.full.gpu import Gpu
from trt_double.scene import Scene
from trt_gpu_features import check_features
from trt_gpu_parts import Report

from pyfmha.attention.operator import OPERATOR
from pyfmha.attention.reference import attend, relative_error
from pyfmha.attention.run import to_float, to_storage
from pyfmha.bfloat16 import STORAGE
from pyfmha.errors import EngineError, SpecError
from pyfmha.runtime.device import Device
from pyfmha.runtime.library import Library
from pyfmha.trt import DirectSession, Features, add_attention, add_attention_packed, standin
from pyfmha.trt.creator import make_creator
from pyfmha.trt.engine import build_plan
from pyfmha.trt.session import Session

pytest_plugins = ["trt_double.fixtures", "trt_double.full.fixtures"]

LIMITS = {"fp16": 5e-4, "bf16": 4e-3, "fp32": 1e-6}
TYPES = {np.dtype(np.int32): DataType.INT32}
KINDS = {"fp16": DataType.HALF, "bf16": DataType.BF16, "fp32": DataType.FLOAT}
B, HQ, HKV, SQ, SKV, D = 2, 4, 2, 5, 9, 20
Q_LENGTHS, KV_LENGTHS = [3, 5], [9, 0]
CU_Q, CU_KV = [0, 2, 2, 7], [1, 4, 6, 11]


@dataclass(frozen=True)
class Case:
    """One combination: features for a DirectSession, keywords for a network, and what the reference is told."""

    features: Features
    causal: bool = False
    keywords: dict[str, Any] = field(default_factory=dict)
    reference: dict[str, Any] = field(default_factory=dict)
    dtype: str = "fp16"
    beside: dict[str, tuple[int, ...]] = field(default_factory=dict)  # shapes of bias, mask and sinks


CASES = {
    "grouped heads": Case(Features(HKV)),
    "bottom right": Case(
        Features(HKV, bottom_right=True), True, {"causal": "bottom-right"}, {"window_right": 0, "bottom_right": True},
    ),
    "window and soft cap": Case(
        Features(HKV, "bshd", True, (2, 1), 1.5, True), False,
        {"window": (2, 1), "align": "bottom-right", "softcap": 1.5, "layout": "bshd", "return_lse": True},
        {"window_left": 2, "window_right": 1, "bottom_right": True, "softcap": 1.5}, "bf16",
    ),
    "lengths": Case(
        Features(HKV, return_lse=True, q_lengths=True, kv_lengths=True), True, {"causal": True, "return_lse": True},
        {"window_right": 0, "q_lengths": Q_LENGTHS, "kv_lengths": KV_LENGTHS}, "fp32",
    ),
    "ragged": Case(
        Features(HKV, "bshd", cu_seqlens=True, return_lse=True), True, {"causal": True, "return_lse": True},
        {"window_right": 0, "cu_seqlens_q": CU_Q, "cu_seqlens_kv": CU_KV},
    ),
    "packed": Case(Features(HKV, "packed", return_lse=True), True, {"return_lse": True}, {"window_right": 0}),
    "packed, an axis of 3": Case(Features(HQ, "packed"), True, {}, {"window_right": 0}),
    "packed and ragged": Case(
        Features(HKV, "packed", cu_seqlens=True), False, {}, {"cu_seqlens_q": CU_Q, "cu_seqlens_kv": CU_Q},
    ),
    "bias": Case(Features(HKV, bias="fp16"), False, {}, {}, beside={"bias": (B, HQ, SQ, SKV)}),
    "a bias that all sequences share, FLOAT": Case(
        Features(HKV, bias="fp32", softcap=1.5), True, {"softcap": 1.5}, {"softcap": 1.5, "window_right": 0},
        beside={"bias": (HQ, 1, SKV)},
    ),
    "a mask of padding, sinks, values of another size": Case(
        Features(HKV, "bshd", return_lse=True, mask=True, sinks="fp16", v_head_size=40), False,
        {"layout": "bshd", "return_lse": True}, {}, beside={"mask": (B, 1, 1, SKV), "sinks": (HQ,)},
    ),
    "a mask with lengths, sinks of FLOAT": Case(
        Features(HKV, kv_lengths=True, mask=True, sinks="fp32", bias="bf16"), True, {},
        {"kv_lengths": KV_LENGTHS, "window_right": 0}, "bf16",
        beside={"bias": (SKV,), "mask": (SQ, SKV), "sinks": (HQ,)},
    ),
    "ragged, with a bias and a mask": Case(
        Features(HKV, "bshd", cu_seqlens=True, bias="fp16", mask=True), True, {},
        {"window_right": 0, "cu_seqlens_q": CU_Q, "cu_seqlens_kv": CU_KV},
        beside={"bias": (1, HQ, 5, 5), "mask": (3, 1, 1, 5)},
    ),
    "packed, with a bias": Case(
        Features(HKV, "packed", bias="fp16"), True, {}, {"window_right": 0}, beside={"bias": (1, HQ, SQ, SQ)},
    ),
}  # fmt: skip


@pytest.fixture
def library(forward_library_path: Path, gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Library:
    """The stand-ins' library, which the fake GPU knows."""
    gpu.learn(forward_library_path.with_name("manifest.json"))
    path = Path(shutil.copy(forward_library_path, tmp_path / "libforward.so"))
    monkeypatch.setenv("PYFMHA_LIBRARY", str(path))
    return Library(path)


@pytest.fixture
def decodes(decode_library_path: Path, gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Library:
    """The library with stand-ins for decoding, in the place of the other."""
    gpu.learn(decode_library_path.with_name("manifest.json"))
    path = Path(shutil.copy(decode_library_path, tmp_path / "libdecode.so"))
    monkeypatch.setenv("PYFMHA_LIBRARY", str(path))
    return Library(path)


def numbers(dtype: str, *shape: int, seed: int = 0) -> Any:
    return to_storage(np.random.default_rng([seed, *shape]).standard_normal(shape), dtype)


def data_of(case: Case, seed: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    """The inputs, and the outputs that are expected of them."""
    features, kv_heads = case.features, case.features.num_kv_heads
    swapped = features.layout != "bhsd"

    def storage(values: Any) -> Any:
        return np.ascontiguousarray(values.swapaxes(1, 2)) if swapped and values.ndim == 4 else values

    if features.layout == "packed":
        rows = (7,) if features.cu_seqlens else (B, SQ)
        axes = (HQ + 2 * kv_heads,) if kv_heads != HQ else (3, HQ)
        qkv = numbers(case.dtype, *rows, *axes, D, seed=seed)
        flat = qkv.reshape(*rows, HQ + 2 * kv_heads, D)
        parts = np.split(flat, [HQ, HQ + kv_heads], axis=-2)
        natural = parts if features.cu_seqlens else [part.swapaxes(1, 2) for part in parts]
        inputs = {"QKV": qkv}
    else:
        if features.cu_seqlens:
            shapes = [(7, HQ), (11, kv_heads), (11, kv_heads)]
        else:
            shapes = [(B, HQ, SQ), (B, kv_heads, SKV), (B, kv_heads, SKV)]
        sizes = (D, D, features.v_head_size or D)
        natural = [
            numbers(case.dtype, *shape, size, seed=seed + i)
            for i, (shape, size) in enumerate(zip(shapes, sizes, strict=True))
        ]
        inputs = dict(zip("QKV", map(storage, natural), strict=True))
    arrays = {name: np.array(value, np.int32) for name, value in case.reference.items() if isinstance(value, list)}
    beside, values = beside_of(case, seed)
    out, lse = attend(*(to_float(x, case.dtype) for x in natural), sm_scale=D**-0.5, **case.reference, **values)
    expected = {"Out": storage(out)} | ({"Lse": lse} if features.return_lse else {})
    return {**inputs, **arrays, **beside}, expected


def beside_of(case: Case, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Bias, mask and sinks as they are stored, and as the reference takes them. Some queries see no key."""
    stored, values = {}, {}
    for name, shape in case.beside.items():
        if name == "mask":
            values[name] = stored[name] = np.random.default_rng([seed, 7]).random(shape) < 0.6
            continue
        kind = getattr(case.features, name)
        stored[name] = numbers(kind, *shape, seed=seed + 11)
        values[name] = to_float(stored[name], kind)
    return stored, values


def check(results: dict[str, Any], expected: dict[str, Any], dtype: str) -> None:
    assert set(results) == set(expected)
    assert results["Out"].dtype == STORAGE[dtype]
    assert results["Out"].shape == expected["Out"].shape
    assert relative_error(to_float(results["Out"], dtype), expected["Out"]) < LIMITS[dtype]
    if "Lse" in expected:
        assert results["Lse"].dtype == np.float32
        np.testing.assert_allclose(results["Lse"], expected["Lse"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_direct_session(library: Library, gpu: Gpu, name: str) -> None:
    case = CASES[name]
    settings = {"num_heads": HQ, "head_size": D, "dtype": case.dtype, "causal": case.causal, "features": case.features}
    with DirectSession(**settings, library=library, trt_module=standin) as session:
        for seed in (1, 2):
            inputs, expected = data_of(case, seed)
            check(session.run(inputs), expected, case.dtype)
        assert session.workspace_bytes == 0
        assert session.problem.function_name.startswith("fmha_biased" if case.beside else "fmha_fwd")
    assert gpu.live()["memory"] == 0


@pytest.mark.parametrize("name", some_of(CASES))
def test_session(trt11: Any, library: Library, name: str) -> None:
    case = CASES[name]
    inputs, expected = data_of(case)
    ranges = {}

    def define(network: Any) -> None:
        tensors = {}
        for key, array in inputs.items():
            fixed = {0: (), 1: (-1,)}[int(array.dtype == np.int32)]
            heads = {"bhsd": (1, 3), "bshd": (2, 3), "packed": tuple(range(2, array.ndim))}[case.features.layout]
            if case.features.cu_seqlens:
                heads = tuple(range(1, array.ndim))
            shape = fixed or tuple(size if axis in heads else -1 for axis, size in enumerate(array.shape))
            kind = TYPES.get(array.dtype) or KINDS[case.dtype]
            if key in case.beside:  # fixed where it is broadcast, else known at run time alone
                shape = tuple(size if size == 1 or key == "sinks" else -1 for size in array.shape)
                kind = DataType.BOOL if key == "mask" else KINDS[getattr(case.features, key)]
            tensors[key] = network.add_input(key, kind, shape)
            ranges[key] = (tuple(1 if size < 0 else size for size in shape), array.shape, array.shape)
        keywords = {"causal": case.causal, **case.keywords}
        lengths = {key: tensor for key, tensor in tensors.items() if key.islower()}
        if "QKV" in tensors:
            heads = (HQ, case.features.num_kv_heads)
            made = add_attention_packed(network, tensors["QKV"], *heads, **keywords, **lengths)
        else:
            made = add_attention(network, *(tensors[key] for key in "QKV"), **keywords, **lengths)
        for output, label in zip(made if isinstance(made, tuple) else (made,), ("Out", "Lse"), strict=False):
            output.name = label
            network.mark_output(output)

    plan = build_plan(trt11, define, ranges).plan
    with Session(plan, trt_module=trt11) as session:
        assert [info.name for info in session.outputs] == list(expected)
        for seed in (0, 3):
            inputs, expected = data_of(case, seed)
            check(session.run(inputs), expected, case.dtype)
        small = {name: array[: len(array) if name in case.beside else 1] for name, array in inputs.items()}
        if "cu_seqlens_q" not in inputs and not any(shape[0] == B for shape in case.beside.values()):
            assert session.run(small)["Out"].shape == (1, *expected["Out"].shape[1:])


def test_session_as_a_cuda_graph_with_lengths_that_change(trt11: Any, library: Library, gpu: Gpu) -> None:
    """Lengths are data: another batch of them needs neither another shape nor another graph."""
    case = CASES["lengths"]
    inputs, _ = data_of(case)

    def define(network: Any) -> None:
        q, k, v = (network.add_input(key, DataType.FLOAT, inputs[key].shape) for key in "QKV")
        lengths = {key: network.add_input(key, DataType.INT32, (B,)) for key in ("q_lengths", "kv_lengths")}
        out, lse = add_attention(network, q, k, v, causal=True, **lengths, return_lse=True)
        out.name, lse.name = "Out", "Lse"
        network.mark_output(out)
        network.mark_output(lse)

    with Session(build_plan(trt11, define, {}).plan, trt_module=trt11, cuda_graph=True) as session:
        for lengths in ([9, 0], [4, 9], [-3, 100], [1, 1]):
            again = Case(case.features, True, {}, {**case.reference, "kv_lengths": lengths}, "fp32")
            inputs, expected = data_of(again, seed=7)
            check(session.run(inputs), expected, "fp32")
    assert gpu.replays == 3


def decoded(rows: int, keys: int, batch: int = 1, seed: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    """Q, K and V, fp16, grouped; and Out and Lse."""
    shapes = [(batch, HQ, rows, D), *[(batch, HKV, keys, D)] * 2]
    inputs = {
        name: numbers("fp16", *shape, seed=seed + i) for i, (name, shape) in enumerate(zip("QKV", shapes, strict=True))
    }
    out, lse = attend(*(to_float(x, "fp16") for x in inputs.values()), sm_scale=D**-0.5)
    return inputs, {"Out": out, "Lse": lse}


SHAPES = ((1, 600), (5, 9), (2, 1000, 3), (33, 600), (32, 600), (1, 600))
"""Of whose some are decoded: not the second and the fourth."""


def test_a_direct_session_decodes(decodes: Library, gpu: Gpu) -> None:
    settings = {"num_heads": HQ, "head_size": D, "causal": False, "features": Features(HKV, return_lse=True)}
    with DirectSession(**settings, library=decodes, trt_module=standin) as session:
        launched = [0]
        for seed, shape in enumerate(SHAPES):
            inputs, expected = decoded(*shape, seed=seed)
            check(session.run(inputs), expected, "fp16")
            launched.append(gpu.cuda.launch_count())
            assert (session.workspace_bytes > 0) is (launched[-1] - launched[-2] == 2)
        assert np.diff(launched).tolist() == [2, 1, 2, 1, 2, 2]
    assert gpu.live()["memory"] == gpu.live()["modules"] == 0


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_session_decodes(trt11: Any, decodes: Library, gpu: Gpu, cuda_graph: bool) -> None:
    ranges = {
        name: ((1, heads, 1, D), (1, heads, 1, D), (3, heads, most, D))
        for name, heads, most in (("Q", HQ, 40), ("K", HKV, 1000), ("V", HKV, 1000))
    }

    def define(network: Any) -> None:
        q, k, v = (
            network.add_input(name, DataType.HALF, (-1, shape[1], -1, D)) for name, (*_, shape) in ranges.items()
        )
        out, lse = add_attention(network, q, k, v, causal=False, return_lse=True)
        out.name, lse.name = "Out", "Lse"
        network.mark_output(out)
        network.mark_output(lse)

    with Session(build_plan(trt11, define, ranges).plan, trt_module=trt11, cuda_graph=cuda_graph) as session:
        before = gpu.cuda.launch_count()
        for seed, shape in enumerate(SHAPES):
            for again in range(3):
                inputs, expected = decoded(*shape, seed=seed + 10 * again)
                check(session.run(inputs), expected, "fp16")
        if not cuda_graph:
            assert gpu.cuda.launch_count() - before == 3 * (2 + 1 + 2 + 1 + 2 + 2)
    assert gpu.replays == (12 if cuda_graph else 0)


def test_an_engine_without_room_runs_on_a_library_that_decodes(
    trt11: Any, library: Library, decode_library_path: Path, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its workspace is one byte here: two launches that wrote to it would be a fault."""
    inputs, expected = decoded(1, 600)

    def define(network: Any) -> None:
        q, k, v = (network.add_input(name, DataType.HALF, array.shape) for name, array in inputs.items())
        out, lse = add_attention(network, q, k, v, causal=False, return_lse=True)
        out.name, lse.name = "Out", "Lse"
        network.mark_output(out)
        network.mark_output(lse)

    plan = build_plan(trt11, define, {}).plan
    gpu.learn(decode_library_path.with_name("manifest.json"))
    monkeypatch.setenv("PYFMHA_LIBRARY", str(decode_library_path))
    later = make_full("trt_later", VERSIONS[-1])
    before = gpu.cuda.launch_count()
    with Session(plan, trt_module=later) as session:
        check(session.run(inputs), expected, "fp16")
    assert gpu.cuda.launch_count() - before == 1
    del sys.modules["trt_later"]


@pytest.mark.parametrize("decoding", few_of([False, True], bool))
def test_decoding_as_it_is_checked_on_a_gpu(
    request: pytest.FixtureRequest, gpu: Gpu, monkeypatch: pytest.MonkeyPatch, decoding: bool
) -> None:
    library = request.getfixturevalue("decodes" if decoding else "library")
    monkeypatch.setattr(trt_gpu_features, "HEAD_SIZES", (72,))
    monkeypatch.setattr(trt_gpu_features, "DTYPES", ("fp16",))
    cases = {name: case for name, case in trt_gpu_features.CASES.items() if case.decoded}
    monkeypatch.setattr(trt_gpu_features, "CASES", cases)
    scene, report, device = Scene(make_binding(), library), Report(), Device()
    check_features(report, scene.calls, scene.creator, library, device)
    device.close()
    assert report.passed, report.results["checks"]
    assert [row["split"] for row in report.results["features"]] == [decoding] * len(cases)


@pytest.mark.parametrize("step", [pytest.param(1, marks=LONG, id="all"), pytest.param(4, id="some")])
@pytest.mark.long
def test_the_checks_made_on_a_gpu(
    library: Library, gpu: Gpu, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], step: int
) -> None:
    """``trt_gpu.py`` itself is tried here: that its cases reach the plugin, and that it notices what is wrong."""
    monkeypatch.setattr(trt_gpu_features, "HEAD_SIZES", (72,))
    monkeypatch.setattr(trt_gpu_features, "DTYPES", ("fp16",))
    scene, report, device = Scene(make_binding(), library), Report(), Device()
    cases = {name: case for name, case in trt_gpu_features.CASES.items() if not case.decoded}
    chosen = dict([*cases.items()][::step])
    monkeypatch.setattr(trt_gpu_features, "CASES", chosen)
    check_features(report, scene.calls, scene.creator, library, device)
    assert report.passed, report.results["checks"]
    assert len(report.results["features"]) == len(chosen) == -(-len(cases) // step)
    monkeypatch.setattr(trt_gpu_features, "CASES", {name: cases[name] for name in ("causal", "bshd", "ragged")})
    wrong = Report()
    # With the strides of one layout whatever the layout is.
    strides = [(name, text.replace("layout == 'bhsd'", "True")) for name, text in OPERATOR.define]
    assert sum(pair not in OPERATOR.define for pair in strides) == 8
    creator = make_creator(scene.trt, library, "wrong", replace(OPERATOR, define=strides))
    check_features(wrong, scene.calls, creator, library, device)
    device.close()
    assert [check["passed"] for check in wrong.results["checks"]] == [True, False, False]


@LONG
def test_one_part_of_the_checks_made_on_a_gpu(
    fake_driver: FakeCuda, forward_library_path: Path, tmp_path: Path
) -> None:
    results = tmp_path / "results.json"
    command = [TESTS / "trt_gpu.py", forward_library_path, "--binding", "missing", "--only", "features"]
    done = subprocess.run(
        [sys.executable, *command, "--out", results],
        capture_output=True, text=True, check=False, env=example_environment(fake_driver.path, forward_library_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads(results.read_text())
    assert written["passed"]
    assert list(written["parts"]) == ["features"]
    assert len({(row["feature"], row["dtype"]) for row in written["features"]}) == 3 * len(trt_gpu_features.CASES)


def test_what_a_session_is_not_given(trt11: Any, library: Library) -> None:
    case = CASES["lengths"]
    inputs, _ = data_of(case)
    settings = {"num_heads": HQ, "head_size": D, "dtype": "fp32", "features": case.features, "library": library}
    with DirectSession(**settings, causal=True, trt_module=standin) as session:
        with pytest.raises(SpecError, match="give Q, K, V, q_lengths, kv_lengths"):
            session.run({name: inputs[name] for name in "QKV"})
        with pytest.raises(
            SpecError, match=r"kv_lengths is int64 \[2\]; inputs must be Q \[batch, 4, Sq, 20\] float32"
        ):
            session.run({**inputs, "kv_lengths": inputs["kv_lengths"].astype(np.int64)})
        with pytest.raises(SpecError, match=r"kv_lengths is int32 \[3\]"):
            session.run({**inputs, "kv_lengths": np.zeros(3, np.int32)})
        session.prepare(B, SQ, SKV)
        with pytest.raises(KeyError):
            session.enqueue({"Q": 1, "K": 2, "V": 3, "Out": 4}, 0)

    def define(network: Any) -> None:
        q, k, v = (network.add_input(key, DataType.FLOAT, inputs[key].shape) for key in "QKV")
        lengths = network.add_input("kv_lengths", DataType.INT32, (B,))
        add_attention(network, q, k, v, causal=True, kv_lengths=lengths).name = "Out"
        network.mark_output(network.layers[0].get_output(0))

    with (
        Session(build_plan(trt11, define, {}).plan, trt_module=trt11) as session,
        pytest.raises(EngineError, match="missing input kv_lengths"),
    ):
        session.run({name: inputs[name] for name in "QKV"})
