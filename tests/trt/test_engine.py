"""Building and saving engines, on doubles of TensorRT 10.13, 10.14 and 11.4, and a real builder, TensorRT-RTX's."""

import hashlib
import json
import os
import stat
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import LAUNCH_FAILED, run_python, snapshot
from trt_double.full.gpu import Gpu, emulated_attention

from pyfmha.attention.reference import attention_float64, relative_error
from pyfmha.attention.run import random_inputs, to_float
from pyfmha.errors import DriverError, EngineError, LaunchError, LibraryError, OutputError, PyfmhaError
from pyfmha.trt import PluginError, add_attention
from pyfmha.trt.attention.engine import EngineConfig, build_engine
from pyfmha.trt.attention.saved import read_engine, save_engine
from pyfmha.trt.engine import Built, build_plan
from pyfmha.trt.saved import read_timing_cache, write_whole
from pyfmha.trt.session import Session

pytest_plugins = ["trt_double.fixtures", "trt_double.full.fixtures"]

SMALL = EngineConfig(num_heads=2, head_size=32, max_batch_size=2, max_seq_len=40, causal=True)
NOTHING = dict.fromkeys(("memory", "streams", "graphs", "events", "modules", "contexts"), 0)


def error_of(trt: Any, built: Built, config: EngineConfig, shape: tuple[int, int]) -> float:
    """What the engine gives, against float64."""
    q, k, v = random_inputs(config.dtype, (shape[0], config.num_heads, shape[1], config.head_size), 3)
    with Session(built.plan, trt_module=trt) as session:
        out = session.run({"Q": q, "K": k, "V": v})["Out"]
    exact = attention_float64(
        *(to_float(x, config.dtype) for x in (q, k, v)), sm_scale=config.factor, causal=config.causal
    )
    return relative_error(to_float(out, config.dtype), exact.out)


def test_an_engine_built_by_each_version_gives_attention(full_trt: Any, gpu: Gpu) -> None:
    built = build_engine(SMALL, trt_module=full_trt)

    assert built.tensorrt == full_trt.__version__
    assert error_of(full_trt, built, SMALL, (2, 17)) < 5e-4
    assert gpu.live() == NOTHING


@pytest.mark.parametrize(("dtype", "limit"), [("bf16", 4e-3), ("fp32", 1e-5)])
def test_other_types(trt11: Any, dtype: str, limit: float) -> None:
    config = EngineConfig(2, 32, 2, 40, dtype, causal=True)

    assert error_of(trt11, build_engine(config, trt_module=trt11), config, (1, 40)) < limit


def test_full_attention_and_a_scale_of_ones_own(trt11: Any) -> None:
    config = EngineConfig(2, 32, 1, 24, causal=False, scale=0.5)

    assert error_of(trt11, build_engine(config, trt_module=trt11), config, (1, 24)) < 5e-4


def test_every_tactic_is_timed_once_and_then_read_from_the_timing_cache(trt11: Any) -> None:
    first = build_engine(SMALL, trt_module=trt11)
    ((_, tactics),) = trt11.double.timed

    again = build_engine(SMALL, trt_module=trt11, timing_cache=first.timing_cache)

    assert len(tactics) == 2
    assert len(trt11.double.timed) == 1
    assert again.plan == first.plan


def test_the_timing_cache_does_not_serve_another_attention(trt11: Any) -> None:
    first = build_engine(SMALL, trt_module=trt11)

    build_engine(EngineConfig(2, 32, 2, 40, scale=0.5, causal=True), trt_module=trt11, timing_cache=first.timing_cache)

    assert len(trt11.double.timed) == 2


def test_an_unusable_timing_cache_is_refused(trt11: Any) -> None:
    with pytest.raises(EngineError, match=r"timing cache is damaged.*remove the file"):
        build_engine(SMALL, trt_module=trt11, timing_cache=b"no timing cache")


def test_the_verbosity_and_the_compatibility_reach_tensorrt(trt11: Any) -> None:
    plain = build_engine(SMALL, trt_module=trt11)
    other = build_engine(SMALL, trt_module=trt11, profiling_verbosity="detailed", version_compatible=True)

    assert b'"LAYER_NAMES_ONLY"' in plain.plan
    assert b'"DETAILED"' in other.plan
    assert b'"compatible": true' in other.plan


def test_an_unknown_verbosity_is_refused(trt11: Any) -> None:
    with pytest.raises(EngineError, match=r"'loud'; allowed are layer_names_only, detailed, none"):
        build_engine(SMALL, trt_module=trt11, profiling_verbosity="loud")


def test_tensorrts_own_layer(full_trt: Any) -> None:
    config = EngineConfig(2, 32, 2, 40, causal=True, layer="tensorrt")
    if not hasattr(full_trt.INetworkDefinition, "add_attention"):
        with pytest.raises(EngineError, match=r"10\.13\.3 has no attention layer of its own; 10\.14"):
            build_engine(config, trt_module=full_trt)
        return

    built = build_engine(config, trt_module=full_trt)

    assert b"TritonFlashAttention" not in built.plan
    assert error_of(full_trt, built, config, (2, 17)) < 2e-3  # Q is scaled in fp16 first


def test_tensorrts_own_layer_in_bf16_and_full(trt11: Any) -> None:
    config = EngineConfig(2, 32, 1, 16, "bf16", causal=False, layer="tensorrt")

    assert error_of(trt11, build_engine(config, trt_module=trt11), config, (1, 16)) < 1e-2


def test_the_weights_memory_lives_until_the_engine_is_built(trt11: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any engine: what ``define`` returns is kept; the double reads the pointer when it builds."""
    owners: list[Any] = []
    alive: list[bool] = []
    read = trt11.Weights.read
    monkeypatch.setattr(trt11.Weights, "read", lambda self: (alive.append(owners[0]() is not None), read(self))[1])

    def define(network: Any) -> Any:
        data = np.arange(6, dtype=np.float32)
        owners.append(weakref.ref(data))
        x = network.add_input("x", trt11.DataType.FLOAT, (2, 3))
        factor = network.add_constant((2, 3), trt11.Weights(trt11.DataType.FLOAT, data.ctypes.data, 6))
        y = network.add_elementwise(x, factor.get_output(0), trt11.ElementWiseOperation.PROD).get_output(0)
        y.name = "y"
        network.mark_output(y)
        return data

    built = build_plan(trt11, define, {})

    assert alive == [True]
    with Session(built.plan, trt_module=trt11) as session:
        result = session.run({"x": np.full((2, 3), 2, np.float32)})["y"]
    np.testing.assert_array_equal(result, [[0, 2, 4], [6, 8, 10]])


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"num_heads": 0}, "num_heads is 0"),
        ({"max_seq_len": -1}, "max_seq_len is -1"),
        ({"dtype": "float8"}, "dtype is 'float8'; allowed are fp16, bf16, fp32"),
        ({"layer": "own"}, "layer is 'own'; allowed are plugin, tensorrt"),
    ],
)
def test_a_configuration_out_of_range_is_refused(values: dict[str, Any], text: str) -> None:
    with pytest.raises(EngineError, match=text):
        EngineConfig(
            **{"num_heads": 2, "head_size": 32, "max_batch_size": 1, "max_seq_len": 8, "causal": True, **values}
        )


def test_a_head_size_without_kernels_is_refused_with_those_there_are(trt11: Any, gpu: Gpu) -> None:
    with pytest.raises(PyfmhaError, match=r"does not hold fmha_fwd_d64_fp16.*pyfmha build --dtype fp16 --head-size 64"):
        build_engine(EngineConfig(2, 48, 1, 8, causal=True), trt_module=trt11)
    assert gpu.live() == NOTHING


def test_a_member_that_the_library_lacks_is_refused_with_the_command_that_adds_it(trt11: Any) -> None:
    with pytest.raises(PluginError, match="pyfmha build --dtype fp16 --head-size 64"):
        build_engine(EngineConfig(2, 64, 1, 8, causal=True), trt_module=trt11)


def test_a_missing_library(trt11: Any, tmp_path: Path) -> None:
    with pytest.raises(LibraryError, match="pyfmha build"):
        build_engine(SMALL, trt_module=trt11, library=tmp_path / "none.so")


def test_a_device_without_code_is_named(trt11: Any, gpu: Gpu) -> None:
    gpu.cuda.set_device(0, 80)

    with pytest.raises(PyfmhaError, match=r"sm_80.*built for sm_90.*pyfmha build --arch sm_80"):
        build_engine(SMALL, trt_module=trt11)
    assert gpu.live() == NOTHING


def test_a_launch_that_fails_while_tactics_are_timed_says_which_layer(trt11: Any, gpu: Gpu) -> None:
    gpu.cuda.fail("cuLaunchKernel", LAUNCH_FAILED)

    with pytest.raises(LaunchError, match=r"TritonFlashAttention layer .*enqueue") as caught:
        build_engine(SMALL, trt_module=trt11)
    assert caught.value.code == LAUNCH_FAILED
    assert gpu.live() == NOTHING


def test_without_a_gpu(trt11: Any, gpu: Gpu) -> None:
    gpu.cuda.set_device_count(0)

    with pytest.raises(DriverError, match="error 100"):
        build_engine(SMALL, trt_module=trt11)


def test_what_tensorrt_refuses_comes_with_its_words(trt11: Any) -> None:
    def define(network: Any) -> None:
        network.add_input("x", trt11.DataType.FLOAT, (1,))

    with pytest.raises(EngineError, match=r"not built: TensorRT: .*Network must have at least one output"):
        build_plan(trt11, define, {})


def test_a_dynamic_input_without_a_range(trt11: Any) -> None:
    def define(network: Any) -> None:
        shape = (-1, 2, -1, 32)
        q = network.add_input("Q", trt11.DataType.HALF, shape)
        network.mark_output(add_attention(network, q, q, q, causal=True, trt_module=trt11))

    with pytest.raises(EngineError, match="dynamic input Q without a profile"):
        build_plan(trt11, define, {})


def test_a_module_that_only_runs_engines(gpu: Gpu) -> None:
    from trt_double.full import make_full

    lean = make_full("tensorrt_lean_full", "11.1.0")

    with pytest.raises(EngineError, match=r"only runs engines; to build one: pip install tensorrt"):
        build_engine(SMALL, trt_module=lean)


# ---------------------------------------------------------------- files


BUILT = Built(b"engine bytes", b"cache bytes", "11.1.0")


def test_saved_and_read_back(tmp_path: Path) -> None:
    saved = save_engine(BUILT, SMALL, tmp_path / "new" / "folder")

    assert read_engine(tmp_path / "new" / "folder") == saved
    assert saved.config == SMALL
    assert saved.path.read_bytes() == b"engine bytes"
    assert read_timing_cache(tmp_path / "new" / "folder" / "timing.cache") == b"cache bytes"
    assert sorted(snapshot(tmp_path)) == [
        f"new/folder/{name}" for name in ("config.json", "fmha.engine", "timing.cache")
    ]


def test_a_timing_cache_of_ones_own_place(tmp_path: Path) -> None:
    save_engine(BUILT, SMALL, tmp_path / "engine", tmp_path / "shared.cache")

    assert (tmp_path / "shared.cache").read_bytes() == b"cache bytes"
    assert not (tmp_path / "engine" / "timing.cache").exists()


def test_no_timing_cache_yet(tmp_path: Path) -> None:
    assert read_timing_cache(tmp_path / "none") == b""
    with pytest.raises(EngineError, match="cannot be read"):
        read_timing_cache(tmp_path)


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_write_that_fails_leaves_the_earlier_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    save_engine(BUILT, SMALL, tmp_path)
    before = snapshot(tmp_path)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OutputError, match=r"cannot write .*No space left on device"):
        save_engine(Built(b"other", b"other", "11.1.0"), SMALL, tmp_path)

    assert snapshot(tmp_path) == before


def test_a_pair_that_does_not_belong_together_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine is written, then the disk is full before the configuration."""
    save_engine(BUILT, SMALL, tmp_path)
    real = os.replace

    def fails_for_the_configuration(source: str, target: Path) -> None:
        if target.name == "config.json":
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", fails_for_the_configuration)
    with pytest.raises(OutputError):
        save_engine(Built(b"other", b"other", "11.1.0"), SMALL, tmp_path)

    with pytest.raises(EngineError, match=r"is not the engine that .*config.json describes"):
        read_engine(tmp_path)


def test_written_files_have_ordinary_permissions(tmp_path: Path) -> None:
    write_whole(tmp_path / "file", b"")
    (tmp_path / "other").write_bytes(b"")

    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")

    with pytest.raises(OutputError, match=r"cannot write .*taken"):
        save_engine(BUILT, SMALL, tmp_path / "taken")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda d: d.pop("sha256"), "damaged"),
        (lambda d: d.update(schema=99), "another version of pyfmha"),
        (lambda d: d.update(num_heads="two"), "damaged"),
        (lambda d: d.update(surprise=1), "damaged"),
        (lambda d: d.update(dtype="fp8"), "allowed are fp16, bf16, fp32"),
        (lambda d: d.update(engine="gone.engine"), "no engine at .*gone.engine"),
    ],
)
def test_a_configuration_that_cannot_be_used(tmp_path: Path, change: Any, text: str) -> None:
    save_engine(BUILT, SMALL, tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    change(data)
    (tmp_path / "config.json").write_text(json.dumps(data))

    with pytest.raises(EngineError, match=text):
        read_engine(tmp_path)


def test_a_configuration_from_before_the_features(tmp_path: Path) -> None:
    save_engine(BUILT, SMALL, tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    earlier = ("num_heads", "head_size", "max_batch_size", "max_seq_len", "dtype", "causal", "layer")
    kept = {name: data[name] for name in ("schema", "engine", "sha256", "tensorrt", *earlier)} | {"softmax_scale": 0.3}
    (tmp_path / "config.json").write_text(json.dumps(kept))

    assert read_engine(tmp_path).config == replace(SMALL, scale=0.3)


def test_files_that_are_missing_or_not_json(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"no engine configuration at .*examples/build.py"):
        read_engine(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(EngineError, match="damaged"):
        read_engine(tmp_path)


def test_the_configuration_holds_the_engines_digest(tmp_path: Path) -> None:
    save_engine(BUILT, SMALL, tmp_path)

    assert json.loads((tmp_path / "config.json").read_text())["sha256"] == hashlib.sha256(b"engine bytes").hexdigest()


# ---------------------------------------------------------------- a real builder


REAL = """
import sys, warnings
import tensorrt_rtx as trt
from pyfmha.trt.attention.engine import EngineConfig, build_engine
warnings.simplefilter("ignore", DeprecationWarning)  # it still takes a timing cache, but has no use for it
for dtype in ("fp16", "bf16", "fp32"):
    for causal in (True, False):
        config = EngineConfig(2, 64, 2, 32, dtype, causal=causal, layer="tensorrt")
        built = build_engine(config, trt_module=trt, device=None, profiling_verbosity="detailed")
        assert len(built.plan) > 10000 and built.tensorrt == trt.__version__
        print(dtype, causal)
try:
    build_engine(EngineConfig(2, 64, 2, 32, causal=True), trt_module=trt, device=None)
except Exception as error:
    print(type(error).__name__, error)
"""


def test_a_real_builder_takes_network_profile_configuration_and_timing_cache() -> None:
    """TensorRT-RTX builds on a machine without a GPU: every call but the plugin's is checked against a real binding."""
    pytest.importorskip("tensorrt_rtx")

    done = run_python(REAL)

    assert done.stdout.splitlines()[:6] == [f"{d} {c}" for d in ("fp16", "bf16", "fp32") for c in (True, False)], done
    assert "PluginError tensorrt_rtx" in done.stdout
    assert "no plugins in networks" in done.stdout


def test_the_doubles_attention_is_attention() -> None:
    """The double computes by itself: were it wrong as the reference is, the numerics here would mean little."""
    generator = np.random.default_rng(0)
    q, k, v = generator.standard_normal((3, 1, 2, 9, 4))
    out, row_sum, row_max = emulated_attention(q, k, v, 0.7, True)

    for head in range(2):
        for row in range(9):
            scores = [0.7 * float(q[0, head, row] @ k[0, head, key]) for key in range(row + 1)]
            weights = np.exp(np.array(scores) - max(scores))
            np.testing.assert_allclose(
                out[0, head, row], weights @ v[0, head, : row + 1] / weights.sum(), rtol=2e-5, atol=1e-6
            )
            np.testing.assert_allclose(
                [row_sum[0, head, row], row_max[0, head, row]], [weights.sum(), max(scores)], rtol=1e-5
            )
