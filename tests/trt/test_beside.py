"""Biases, masks, sinks and values of another head size: what networks and engines may ask for, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trt_double.binding import DataType, make_binding
from trt_double.full.gpu import Gpu
from trt_double.scene import HEADS, SIZE, Scene

from pyfmha.attention.biased import BiasedCall, broadcast_strides
from pyfmha.attention.biased_decode import BiasedDecode, biased_decoding_for
from pyfmha.attention.reference import attend, relative_error
from pyfmha.bfloat16 import STORAGE
from pyfmha.errors import EngineError, PluginError, SpecError
from pyfmha.runtime.library import Library
from pyfmha.trt import DirectSession, Features, add_attention, add_attention_packed
from pyfmha.trt.attention.engine import EngineConfig, build_engine
from pyfmha.trt.attention.problem import Problem
from pyfmha.trt.attention.saved import read_engine, save_engine
from pyfmha.trt.session import Session

pytest_plugins = ["trt_double.fixtures", "trt_double.full.fixtures"]

B, SQ, SKV = 2, 5, 7
Q, K = (B, HEADS, SQ, SIZE), (B, HEADS, SKV, SIZE)
HALF, FLOAT, BOOL, BF16, INT32 = DataType.HALF, DataType.FLOAT, DataType.BOOL, DataType.BF16, DataType.INT32


def network_with(**beside: tuple[DataType, tuple[int, ...]]) -> tuple[Any, dict[str, Any]]:
    network = make_binding().INetworkDefinition()
    qkv = {name: network.add_input(name, HALF, shape) for name, shape in (("q", Q), ("k", K), ("v", K))}
    return network, qkv | {name: network.add_input(name, *tensor) for name, tensor in beside.items()}


@pytest.mark.parametrize("shape", [(B, HEADS, SQ, SKV), (1, HEADS, 1, SKV), (HEADS, SQ, 1), (SQ, SKV), (SKV,), (1,)])
def test_the_strides_of_a_launch_are_those_of_the_shape(shape: tuple[int, ...]) -> None:
    """0 for an axis that is broadcast, none expanded: as the kernel's own module says."""
    problem = Problem(HEADS, SIZE, "fp16", 0.5, False, Features(HEADS, bias="fp32", mask=True))
    scope = problem.instance.measure([Q, K, K, shape, shape], [Q])
    (step,) = problem.instance.plan(scope).steps
    strides = broadcast_strides(shape, (B, HEADS, SQ, SKV))
    rows = {name: size * SIZE for name, size in (("q", SQ), ("k", SKV))}
    q, k = ((HEADS * rows[name], rows[name], SIZE) for name in ("q", "k"))
    call = BiasedCall(
        *(B, HEADS, HEADS, SQ, SKV, SIZE, 0.5), q_strides=q, k_strides=k, v_strides=k, out_strides=q,
        bias_strides=strides, mask_strides=strides, **dict.fromkeys(("bias_counts", "mask_counts"), ((0, *shape)[-2:])),
    )  # fmt: skip
    assert step.function == "fmha_biased_d32_fp16"
    assert step.arguments[-len(call.scalars()) :] == call.scalars()


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("bias", (HALF, (3, SQ, SKV)), r"bias is \[3, 5, 7\]; allowed is .*, here \[2, 4, 5, 7\]"),
        ("bias", (HALF, (SKV, SQ)), r"bias is \[7, 5\]; allowed is"),
        ("bias", (HALF, (1, B, HEADS, SQ, SKV)), r"bias is \[1, 2, 4, 5, 7\]; allowed is"),
        ("mask", (BOOL, (B, SKV)), r"mask is \[2, 7\]; allowed is \[batch or 1, query heads or 1, queries or 1"),
        ("mask", (BOOL, ()), r"mask is \[\]; allowed is"),
        ("mask", (HALF, (SQ, SKV)), "mask is of type HALF; it must be BOOL"),
        ("bias", (BOOL, (SQ, SKV)), "bias is of type BOOL; it must be HALF or FLOAT"),
        ("bias", (BF16, (SQ, SKV)), "bias is of type BF16; it must be HALF or FLOAT"),
        ("sinks", (FLOAT, (3,)), r"sinks are \[3\]; they must be \[4\]"),
        ("sinks", (INT32, (HEADS,)), "sinks is of type INT32; it must be HALF or FLOAT"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(forward_library: Library, name: str, tensor: Any, message: str) -> None:
    network, tensors = network_with(**{name: tensor})
    with pytest.raises(PluginError, match=message):
        add_attention(network, **tensors, causal=True, library=forward_library)


def test_each_is_a_field_and_an_input_of_the_plugin(forward_library: Library) -> None:
    network, tensors = network_with(bias=(FLOAT, (1, -1, -1)), mask=(BOOL, (B, 1, 1, -1)), sinks=(HALF, (HEADS,)))
    out = add_attention(network, **tensors, causal=False, library=forward_library)
    assert tuple(out.shape) == Q
    (layer,) = network.layers
    values = layer.plugin.instance.attributes
    assert [values[name] for name in ("bias", "mask", "sinks", "v_head_size")] == [2, 1, 1, SIZE]
    assert layer.inputs == [tensors[name] for name in ("q", "k", "v", "bias", "mask", "sinks")]


def test_a_library_without_the_function_says_how_to_build_it(attention_library: Library) -> None:
    network, tensors = network_with(mask=(BOOL, (SQ, SKV)))
    with pytest.raises(PluginError, match=r"does not hold fmha_biased_d32_fp16.*--kernels biased --dtype fp16 --head"):
        add_attention(network, **tensors, causal=True, library=attention_library)


def test_values_of_another_size_make_another_out(forward_library: Library) -> None:
    network, tensors = network_with()
    tensors["v"] = network.add_input("wide", HALF, (B, HEADS, SKV, 48))
    assert tuple(add_attention(network, **tensors, causal=True, library=forward_library).shape) == (B, HEADS, SQ, 48)


def test_one_tensor_takes_them_too(forward_library: Library) -> None:
    network, tensors = network_with(mask=(BOOL, (B, 1, 1, SQ)), bias=(HALF, (B, 1, 1, SKV)))
    qkv = network.add_input("qkv", HALF, (B, SQ, 3, HEADS, SIZE))
    out = add_attention_packed(network, qkv, HEADS, causal=True, mask=tensors["mask"], library=forward_library)
    assert tuple(out.shape) == (B, SQ, HEADS, SIZE)
    with pytest.raises(PluginError, match=r"bias is \[2, 1, 1, 7\]; allowed is .* here \[2, 4, 5, 5\]"):
        add_attention_packed(network, qkv, HEADS, causal=True, bias=tensors["bias"], library=forward_library)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((B, 3, SQ, SKV), r"query heads of bias is 3; allowed are 1 and 4: .* here \[2, 4, 5, 7\]"),
        ((SQ, SKV + 1), "keys of bias is 8; allowed are 1 and 7"),
        ((SQ, 0), "bias has no elements"),
    ],
)
def test_a_shape_that_only_the_run_knows_is_checked_then(shape: tuple[int, ...], message: str) -> None:
    problem = Problem(HEADS, SIZE, "fp16", 0.5, False, Features(HEADS, bias="fp16"))
    with pytest.raises(PluginError, match=message):
        problem.instance.measure([Q, K, K, shape], [Q])


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"bias": "bf16"}, "bias is of bf16; allowed are fp16, as Q, and fp32"),
        ({"v_head_size": 257}, "head size of V is 257"),
        ({"v_head_size": 16, "layout": "packed"}, "layout 'packed' has one for all"),
    ],
)
def test_problems_that_cannot_be(features: dict[str, Any], message: str) -> None:
    with pytest.raises(PluginError, match=message):
        Problem(HEADS, SIZE, "fp16", 0.5, True, Features(HEADS, **features))


def test_an_engine_without_them_stores_what_it_always_did(trt: Any, forward_library: Library) -> None:
    """So that it loads where they are not known, and what was stored before loads here."""
    scene = Scene(trt, forward_library)
    stored = scene.calls.stored_fields(scene.built(num_kv_heads=2)).read()
    assert [field.name for field in stored][:15] == [
        *("num_heads", "head_size", "type_id", "softmax_scale", "causal", "num_kv_heads", "layout", "bottom_right"),
        *("window_left", "window_right", "softcap", "return_lse", "q_lengths", "kv_lengths", "cu_seqlens"),
    ]
    assert not {"bias", "mask", "sinks", "v_head_size"} & {field.name for field in stored}
    biased = scene.built(mask=1, num_kv_heads=2)
    names = [field.name for field in scene.calls.stored_fields(biased).read()]
    assert names[15:19] == ["bias", "mask", "sinks", "v_head_size"]
    loaded = scene.loaded(biased)
    assert loaded.instance.attributes == biased.instance.attributes


@pytest.mark.parametrize("keys", [511, 512, 4096])
@pytest.mark.parametrize("rows", [1, 3, 65])
@pytest.mark.parametrize("has", [True, False])
def test_few_queries_over_many_keys_are_split(rows: int, keys: int, has: bool) -> None:
    """As the kernels' own module says, where the library has the pair that does it with a mask."""
    problem = Problem(HEADS, SIZE, "fp16", 0.5, False, Features(HEADS, mask=True, v_head_size=96))
    instance = problem.instance.with_options({"decode": True, "biased_decode": has})
    shapes = (1, HEADS, rows, SIZE), (1, HEADS, keys, SIZE), (1, HEADS, keys, 96), (1, 1, 1, keys)
    scope = instance.measure([*shapes], [(1, HEADS, rows, 96)], least={"Sq": 1})
    plan = instance.plan(scope)
    call = BiasedCall(
        1, HEADS, HEADS, rows, keys, SIZE, 0.5, 0.0, *(
            (HEADS * seq * size, seq * size, size)
            for seq, size in ((rows, SIZE), (keys, SIZE), (keys, 96), (rows, 96))
        ),
        v_head_size=96, mask_strides=(0, 0, 0, 1), bias_counts=(0, 0), mask_counts=(1, keys),
    )  # fmt: skip
    decoding = biased_decoding_for(call) if has else None
    assert [option.name for option, _ in instance.options_wanted()] == ["biased_decode"]
    if decoding is None:
        assert [step.function for step in plan.steps] == ["fmha_biased_d128_fp16"]
        assert plan.workspace_bytes == 0
        return
    pair = BiasedDecode("fp16", 96)
    assert [step.function for step in plan.steps] == [pair.split_name, pair.combine_name]
    assert all(step.arguments[-len(decoding.scalars()) :] == decoding.scalars() for step in plan.steps)
    assert plan.workspace_bytes == decoding.partial_bytes + decoding.statistics_bytes
    assert plan.workspace_bytes <= instance.profile_bytes(scope)


@pytest.fixture
def library(forward_library_path: Path, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stand-ins' library, which the fake GPU knows."""
    gpu.learn(forward_library_path.with_name("manifest.json"))
    monkeypatch.setenv("PYFMHA_LIBRARY", str(forward_library_path))
    return forward_library_path


CONFIG: dict[str, Any] = {"num_heads": HEADS, "head_size": 20, "max_batch_size": 2, "max_seq_len": 8, "causal": False}


@pytest.mark.parametrize("batch", [1, 2])
def test_an_engine_of_a_configuration(trt11: Any, library: Path, tmp_path: Path, batch: int) -> None:
    config = EngineConfig(
        **CONFIG, max_kv_seq_len=9, bias="1hqk", bias_dtype="float32", mask="b11k", sinks=True, v_head_size=32,
        return_lse=True,
    )  # fmt: skip
    assert config.ranges()["bias"] == ((1, HEADS, 1, 1), (1, HEADS, 8, 9), (1, HEADS, 8, 9))
    save_engine(build_engine(config, trt_module=trt11), config, tmp_path)
    saved = read_engine(tmp_path)
    assert saved.config == config
    chance = np.random.default_rng(batch)
    shapes = {"Q": (batch, HEADS, 6, 20), "K": (batch, HEADS, 7, 20), "V": (batch, HEADS, 7, 32)}
    shapes |= {"bias": (1, HEADS, 6, 7), "mask": (batch, 1, 1, 7), "sinks": (HEADS,)}
    inputs = {name: chance.standard_normal(shape) for name, shape in shapes.items()}
    types = {"mask": np.bool_, "bias": np.float32, "sinks": np.float32}
    inputs = {name: (x > 0 if name == "mask" else x).astype(types.get(name, np.float16)) for name, x in inputs.items()}
    with Session(saved.path.read_bytes(), trt_module=trt11) as session:
        found = session.run(inputs)
    beside = {name: inputs[name] for name in types}
    out, lse = attend(*(inputs[name] for name in "QKV"), sm_scale=20**-0.5, **beside)
    assert relative_error(found["Out"].astype(np.float64), out) < 5e-4
    np.testing.assert_allclose(found["Lse"], lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("letters", ["hb", "bhqkk", "", "qh", "bhq", "1x"])
def test_axes_that_are_none(letters: str) -> None:
    with pytest.raises(EngineError, match=r"give its axes as letters: the last ones of 'bhqk'"):
        EngineConfig(**CONFIG, mask=letters)


def test_tensorrts_own_layer_has_none_of_them() -> None:
    with pytest.raises(EngineError, match="does not serve bias, sinks here"):
        EngineConfig(**CONFIG, layer="tensorrt", bias="qk", sinks=True)


def test_a_session_names_what_does_not_fit(library: Path) -> None:
    features = Features(HEADS, bias="fp16", mask=True)
    make: Callable[..., Any] = lambda shape, kind: np.zeros(shape, kind)  # noqa: E731
    inputs = {"Q": make(Q, np.float16), "K": make(K, np.float16), "V": make(K, np.float16)}
    inputs |= {"bias": make((SQ, SKV), STORAGE["fp16"]), "mask": make((SKV,), np.bool_)}
    with DirectSession(num_heads=HEADS, head_size=SIZE, causal=True, features=features) as session:
        assert session.run(inputs)["Out"].shape == Q
        session.prepare(B, SQ, SKV)
        with pytest.raises(SpecError, match=r"mask is uint8 \[7\]; inputs must be"):
            session.run(inputs | {"mask": make((SKV,), np.uint8)})
        with pytest.raises(PluginError, match="keys of mask is 6; allowed are 1 and 7"):
            session.run(inputs | {"mask": make((SKV - 1,), np.bool_)})
