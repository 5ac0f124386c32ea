"""Q, K and V in FP8: what networks, sessions and engines may ask for, what comes out, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trt_double.binding import DataType, make_binding
from trt_double.full.gpu import Gpu
from trt_double.scene import HEADS, Scene

from pyfmha.attention.fp8 import DESCALES, Fp8Call
from pyfmha.attention.reference import attend, relative_error
from pyfmha.e4m3 import e4m3_from_float, float_from_e4m3
from pyfmha.errors import EngineError, PluginError, SpecError
from pyfmha.runtime.library import Library
from pyfmha.runtime.tensors import TensorView
from pyfmha.trt import DirectSession, Features, add_attention, add_attention_packed
from pyfmha.trt.attention import direct
from pyfmha.trt.attention.engine import EngineConfig, build_engine
from pyfmha.trt.attention.problem import Problem
from pyfmha.trt.attention.saved import read_engine, save_engine
from pyfmha.trt.session import Session

pytest_plugins = ["trt_double.fixtures", "trt_double.full.fixtures"]

B, SQ, SKV, SIZE, KV = 2, 5, 7, 64, 2
Q, K = (B, HEADS, SQ, SIZE), (B, KV, SKV, SIZE)
HALF, FLOAT, BF16, FP8, INT32 = DataType.HALF, DataType.FLOAT, DataType.BF16, DataType.FP8, DataType.INT32


def network_with(q: Any = Q, k: Any = K, kind: Any = FP8, **others: tuple[Any, Any]) -> tuple[Any, dict[str, Any]]:
    network = make_binding().INetworkDefinition()
    tensors = {name: network.add_input(name, kind, shape) for name, shape in (("q", q), ("k", k), ("v", k))}
    return network, tensors | {name: network.add_input(name, *tensor) for name, tensor in others.items()}


@pytest.mark.parametrize(("out_dtype", "kind"), [("fp16", HALF), ("bfloat16", BF16)])
def test_a_field_says_what_out_is(forward_library: Library, out_dtype: Any, kind: DataType) -> None:
    network, tensors = network_with(q_descale=(FLOAT, (1,)), v_descale=(FLOAT, (-1, KV)), kv_lengths=(INT32, (B,)))
    out = add_attention(network, **tensors, causal=True, out_dtype=out_dtype, library=forward_library)
    assert (out.dtype, tuple(out.shape)) == (kind, Q)
    (layer,) = network.layers
    values = layer.plugin.instance.attributes
    assert [values[name] for name in ("type_id", "fp8", *DESCALES)] == [kind, 1, 1, 0, 1]
    assert layer.inputs == [tensors[name] for name in ("q", "k", "v", "kv_lengths", "q_descale", "v_descale")]


def test_one_tensor_holds_them_too(forward_library: Library) -> None:
    network, tensors = network_with(k_descale=(FLOAT, (KV,)))
    qkv = network.add_input("qkv", FP8, (B, SQ, HEADS + 2 * KV, SIZE))
    given = {"out_dtype": "fp16", "library": forward_library, "k_descale": tensors["k_descale"]}
    out, lse = add_attention_packed(network, qkv, HEADS, KV, causal=False, return_lse=True, **given)
    assert (tuple(out.shape), tuple(lse.shape), lse.dtype) == ((B, SQ, HEADS, SIZE), (B, HEADS, SQ), FLOAT)


HALVES = {"kind": HALF}
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "Out not said": ({}, {"out_dtype": None}, "out_dtype is not given; with Q, K and V in FP8, give 'fp16' or 'bf16'"),
    "Out in fp32": ({}, {"out_dtype": "fp32"}, "out_dtype is 'fp32'; with Q, K and V in FP8, give"),
    "another Out": (HALVES, {"out_dtype": "bf16"}, "out_dtype is 'bf16'; Out is of Q's type, fp16, unless that is FP8"),
    "factors of fp16": ({**HALVES, "k_descale": (FLOAT, (1,))}, {"out_dtype": None}, "k_descale is given, and .* HALF"),
    "a factor of HALF": ({"k_descale": (HALF, (1,))}, {}, "k_descale is of type HALF; it must be FLOAT"),
    "a factor a query head": ({"q_descale": (FLOAT, (HEADS,))}, {}, r"\[4\]; allowed are \[1\], \[2\] and \[2, 2\]"),
    "a factor a sequence": ({"v_descale": (FLOAT, (3, KV))}, {}, r"v_descale is \[3, 2\]; allowed are"),
    "a scalar": ({"v_descale": (FLOAT, ())}, {}, r"v_descale is \[\]; allowed are"),
    "three axes": ({"v_descale": (FLOAT, (1, 1, 1))}, {}, r"v_descale is \[1, 1, 1\]; allowed are"),
    "soft cap": ({}, {"softcap": 20.0}, "softcap is 20, which Q, K and V in FP8 do not serve: leave it at 0"),
    "window": ({}, {"window": (8, -1)}, r"the window is \(8, -1\), which Q, K and V in FP8 do not serve"),
    "window to the right": ({}, {"window": (-1, 3), "causal": False}, r"the window is \(-1, 3\), which"),
    "scale": ({}, {"scale": -0.5}, "softmax_scale is -0.5, which Q, K and V in FP8 do not serve: use one above 0"),
    "head size": ({"q": (B, HEADS, SQ, 40), "k": (B, KV, SKV, 40)}, {}, "head size is 40, .*use a multiple of 16"),
    "mask": ({"mask": (DataType.BOOL, (SQ, SKV))}, {}, "mask is 1, which Q, K and V in FP8 do not serve"),
    "bias": ({"bias": (FLOAT, (SQ, SKV))}, {}, "bias is 2, which Q, K and V in FP8 do not serve"),
    "sinks": ({"sinks": (FLOAT, (HEADS,))}, {}, "sinks is 2, which Q, K and V in FP8 do not serve"),
    "integers": ({"kind": DataType.INT8}, {}, "must be of type FLOAT, HALF, BF16, FP8"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_served_is_refused_by_name(forward_library: Library, name: str) -> None:
    tensors, changes, message = REFUSED[name]
    network, given = network_with(**tensors)
    with pytest.raises(PluginError, match=message):
        add_attention(network, **{**given, "causal": True, "out_dtype": "fp16", "library": forward_library, **changes})


def test_values_of_another_size_are_refused(forward_library: Library) -> None:
    network, given = network_with()
    given["v"] = network.add_input("wide", FP8, (B, KV, SKV, 32))
    with pytest.raises(PluginError, match="head size of V is 32, that of Q and K 64, which Q, K and V in FP8"):
        add_attention(network, **given, causal=True, out_dtype="fp16", library=forward_library)


def test_a_library_without_the_functions_says_how_to_build_them(attention_library: Library) -> None:
    network, tensors = network_with()
    command = "pyfmha build --kernels fp8 --arch sm_90 --dtype bf16 --head-size 64"
    with pytest.raises(PluginError, match=rf"does not hold fmha_fp8_d64_bf16.*{command}"):
        add_attention(network, **tensors, causal=True, out_dtype="bf16", library=attention_library)


@pytest.mark.parametrize(
    ("changes", "factor", "message"),
    [
        ({}, (3,), r"kv heads of q_descale is 3; .* here \[1\], \[2\] or \[2, 2\]"),
        ({}, (1, KV), None),
        ({}, (B, 1), None),
        ({}, (0, KV), "q_descale has no elements"),
        ({}, (3, KV), r"batch of q_descale is 3; "),
        ({"cu_seqlens": True, "layout": "bshd"}, (B, KV), r"batch of q_descale is 2; .*or without cu_seqlens"),
        ({"cu_seqlens": True, "layout": "bshd"}, (1, KV), None),
    ],
)
def test_a_shape_that_only_the_run_knows_is_checked_then(changes: Any, factor: Any, message: str | None) -> None:
    problem = Problem(HEADS, SIZE, "fp16", 0.5, True, Features(KV, fp8=True, q_descale=True, **changes))
    q, k, ends = (9, HEADS, SIZE), (9, KV, SIZE), [(B + 1,)] * 2
    inputs, out = ([q, k, k, *ends, factor], q) if changes else ([Q, K, K, factor], Q)
    if message is None:
        problem.instance.measure(inputs, [out])
        return
    with pytest.raises(PluginError, match=message):
        problem.instance.measure(inputs, [out])


def test_a_launch_has_the_numbers_that_the_kernels_module_gives() -> None:
    features = Features(KV, fp8=True, q_descale=True, k_descale=True, v_descale=True, layout="bshd")
    problem = Problem(HEADS, 48, "bf16", 0.5, True, features)
    q, k = (B, SQ, HEADS, 48), (B, SKV, KV, 48)
    (step,) = problem.instance.plan(problem.instance.measure([q, k, k, (1,), (KV,), (B, KV)], [q])).steps
    rows = {name: (heads * seq * 48, 48, heads * 48) for name, heads, seq in (("q", HEADS, SQ), ("k", KV, SKV))}
    call = Fp8Call(
        *(B, HEADS, KV, SQ, SKV, 48, 0.5), q_strides=rows["q"], k_strides=rows["k"], v_strides=rows["k"],
        out_strides=rows["q"], window_right=0, k_descale_strides=(0, 1), v_descale_strides=(KV, 1),
    )  # fmt: skip
    assert step.function == "fmha_fp8_d64_bf16"
    assert step.arguments[-len(call.scalars()) :] == call.scalars()


def test_few_queries_over_many_keys_are_not_split() -> None:
    problem = Problem(HEADS, SIZE, "fp16", 0.5, False, Features(KV, fp8=True))
    instance, one, many = problem.instance.with_options({"decode": True}), (1, HEADS, 1, SIZE), (1, KV, 4096, SIZE)
    scope = instance.measure([one, many, many], [one], least={"Sq": 1})
    assert [step.function for step in instance.plan(scope).steps] == ["fmha_fp8_d64_fp16"]
    assert instance.plan(scope).workspace_bytes == instance.profile_bytes(scope) == 0
    assert not list(instance.options_wanted())


def test_an_engine_stores_them_and_others_are_as_they_were(trt: Any, forward_library: Library) -> None:
    scene = Scene(trt, forward_library)
    plain = {field.name for field in scene.calls.stored_fields(scene.built(num_kv_heads=2)).read()}
    assert not {"fp8", *DESCALES} & plain
    eight = scene.built(head_size=SIZE, num_kv_heads=2, fp8=1, k_descale=1)
    names = [field.name for field in scene.calls.stored_fields(eight).read()]
    assert names[15:19] == ["fp8", *DESCALES]
    assert scene.loaded(eight).instance.attributes == eight.instance.attributes


@pytest.fixture
def library(forward_library_path: Path, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stand-ins' library, which the fake GPU knows."""
    gpu.learn(forward_library_path.with_name("manifest.json"))
    monkeypatch.setenv("PYFMHA_LIBRARY", str(forward_library_path))
    return forward_library_path


def inputs_of(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Bits of e4m3, and factors."""
    chance = np.random.default_rng(3)
    made = {name: e4m3_from_float(chance.standard_normal(shape)) for name, shape in shapes.items() if name in "QKV"}
    factors = {name: chance.uniform(0.5, 2, shape) for name, shape in shapes.items() if name not in "QKV"}
    return made | {name: factor.astype(np.float32) for name, factor in factors.items()}


def wanted_of(inputs: dict[str, Any], **how: Any) -> tuple[Any, Any]:
    numbers = []
    for name, factor in zip("QKV", DESCALES, strict=True):
        exact = float_from_e4m3(inputs[name]).astype(np.float64)
        wide = np.broadcast_to(inputs.get(factor, np.ones(1)), (exact.shape[0], KV))
        numbers.append(exact * np.repeat(wide, exact.shape[1] // KV, 1)[:, :, None, None])
    return attend(*numbers, sm_scale=SIZE**-0.5, **how)


@pytest.mark.parametrize("shapes", [((1,), (KV,), (B, KV)), ((B, 1), (1, KV), (1,))])
def test_a_session_multiplies_by_the_factors(library: Path, shapes: Any) -> None:
    features = Features(KV, fp8=True, return_lse=True, **dict.fromkeys(DESCALES, True))
    inputs = inputs_of({"Q": Q, "K": K, "V": K, **dict(zip(DESCALES, shapes, strict=True))})
    with DirectSession(num_heads=HEADS, head_size=SIZE, causal=True, features=features) as session:
        found = session.run(inputs)
        session.prepare(B, SQ, SKV)
        with pytest.raises(SpecError, match=r"K is float16 \[2, 2, 7, 64\]; inputs must be .*K \[.*\] uint8"):
            session.run(inputs | {"K": np.zeros(K, np.float16)})
    out, lse = wanted_of(inputs, window_right=0)
    assert found["Out"].dtype == np.float16
    assert relative_error(found["Out"].astype(np.float64), out) < 5e-4
    np.testing.assert_allclose(found["Lse"], lse, rtol=1e-5, atol=1e-5)


def test_a_tensor_of_other_eight_bits_is_no_e4m3(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs: dict[str, Any] = inputs_of({"Q": Q, "K": K, "V": K})
    other = TensorView(256, K, None, "fp8e5", 0, False, None)
    real = DirectSession._operand
    monkeypatch.setattr(
        direct.DirectSession, "_operand", lambda self, name, x: other if x is other else real(self, name, x)
    )
    features = Features(KV, fp8=True)
    with (
        DirectSession(num_heads=HEADS, head_size=SIZE, causal=True, features=features) as session,
        pytest.raises(SpecError, match=r"V is fp8e5 \[2, 2, 7, 64\]; inputs must be"),
    ):
        session.run(inputs | {"V": other})


def test_an_engine_of_a_configuration(trt11: Any, library: Path, tmp_path: Path) -> None:
    config = EngineConfig(
        HEADS, SIZE, B, 8, "fp16", causal=False, num_kv_heads=KV, max_kv_seq_len=9, fp8=True, q_descale="1",
        k_descale="h", v_descale="bh",
    )  # fmt: skip
    assert config.ranges()["v_descale"] == ((1, KV), (B, KV), (B, KV))
    save_engine(build_engine(config, trt_module=trt11), config, tmp_path)
    saved = read_engine(tmp_path)
    assert saved.config == config
    inputs = inputs_of({"Q": Q, "K": K, "V": K, "q_descale": (1,), "k_descale": (KV,), "v_descale": (B, KV)})
    with Session(saved.path.read_bytes(), trt_module=trt11) as session:
        found = session.run(inputs)
    assert relative_error(found["Out"].astype(np.float64), wanted_of(inputs)[0]) < 5e-4


@pytest.mark.parametrize("letters", ["", "hb", "q", "bhq", "x"])
def test_axes_of_factors_that_are_none(letters: str) -> None:
    with pytest.raises(EngineError, match=r"give its axes as letters: '1' \(one factor\), 'h'"):
        EngineConfig(HEADS, SIZE, B, 8, causal=False, fp8=True, k_descale=letters)


@pytest.mark.parametrize("name", ["k_descale", "bias"])
def test_axes_that_are_no_letters(name: str) -> None:
    with pytest.raises(EngineError, match=f"{name} is 1; give its axes as letters, such as 'bh', or None"):
        EngineConfig(HEADS, SIZE, B, 8, causal=False, **{name: 1})  # type: ignore[arg-type]


def test_sequences_of_a_ragged_batch_share_factors() -> None:
    with pytest.raises(EngineError, match="v_descale: sequences of a ragged batch share factors; give '1' or 'h'"):
        EngineConfig(HEADS, SIZE, B, 8, causal=False, fp8=True, cu_seqlens=True, q_descale="1h", v_descale="bh")
    EngineConfig(HEADS, SIZE, B, 8, causal=False, fp8=True, cu_seqlens=True, q_descale="1h", v_descale="h")


def test_a_configuration_refuses_what_the_plugin_does() -> None:
    with pytest.raises(EngineError, match="k_descale is 1 and fp8 0: factors are for Q, K and V in FP8"):
        EngineConfig(HEADS, SIZE, B, 8, causal=False, k_descale="1")
    with pytest.raises(EngineError, match="does not serve fp8 here"):
        EngineConfig(HEADS, SIZE, B, 8, causal=False, layer="tensorrt", fp8=True)
    with pytest.raises(EngineError, match="Out is FLOAT, which Q, K and V in FP8 do not serve: it must be HALF or"):
        EngineConfig(HEADS, SIZE, B, 8, "fp32", causal=False, fp8=True)
