"""Engines with the features of ``fmha_fwd_*``: their configuration, their inputs, and what they give."""

import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import TESTS, some_of
from trt_double.full.gpu import Gpu

from pyfmha.errors import EngineError, PyfmhaError
from pyfmha.trt.attention.engine import EngineConfig, build_engine
from pyfmha.trt.attention.saved import read_engine, save_engine
from pyfmha.trt.session import Session

pytest_plugins = ["trt_double.fixtures", "trt_double.full.fixtures"]

SMALL = EngineConfig(num_heads=2, head_size=32, max_batch_size=2, max_seq_len=40, causal=True)
EXACT = runpy.run_path(str(TESTS.parent / "examples" / "exact.py"))
"""What ``examples/run.py`` makes inputs and judges outputs with; the double computes by address and stride instead."""

FEATURES: dict[str, dict[str, Any]] = {
    "grouped heads, other keys, bottom right": {"num_kv_heads": 2, "max_kv_seq_len": 50, "causal": "bottom-right"},
    "top left": {"num_kv_heads": 1, "max_kv_seq_len": 50, "align": "top-left"},
    "window, soft cap": {
        "causal": False, "window": (3, 1), "align": "bottom-right", "softcap": 1.5, "layout": "bshd",
        "return_lse": True, "max_kv_seq_len": 50, "dtype": "bf16",
    },
    "window and causal": {"window": (3, 5), "max_kv_seq_len": 50},
    "lengths": {"q_lengths": True, "kv_lengths": True, "return_lse": True, "max_kv_seq_len": 50, "dtype": "fp32"},
    "ragged": {"cu_seqlens": True, "num_kv_heads": 2, "max_kv_seq_len": 50, "return_lse": True},
    "packed": {"layout": "packed", "num_kv_heads": 2, "kv_lengths": True, "scale": 0.5},
    "packed and ragged": {"layout": "packed", "cu_seqlens": True, "causal": False, "return_lse": True},
}  # fmt: skip


def featured(**features: Any) -> EngineConfig:
    return EngineConfig(
        **{"num_heads": 4, "head_size": 20, "max_batch_size": 3, "max_seq_len": 40, "causal": True, **features}
    )


@pytest.fixture
def forward(forward_library_path: Path, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library with stand-ins for ``fmha_fwd_*``, which the fake GPU knows."""
    gpu.learn(forward_library_path.with_name("manifest.json"))
    monkeypatch.setenv("PYFMHA_LIBRARY", str(forward_library_path))


def verdicts(plan: bytes, trt: Any, config: EngineConfig, *sizes: int) -> list[tuple[str, bool]]:
    inputs = EXACT["make_inputs"](config, *sizes)
    with Session(plan, trt_module=trt) as session:
        assert [info.name for info in session.inputs] == list(inputs)
        found: list[tuple[str, bool]] = EXACT["judge"](
            config, session.run(inputs), EXACT["exact_outputs"](config, inputs)
        )
    return found


@pytest.mark.usefixtures("forward")
@pytest.mark.parametrize("name", some_of(FEATURES))
def test_an_engine_with_features_gives_what_they_mean(
    trt11: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = featured(**FEATURES[name])
    built = build_engine(config, trt_module=trt11)
    keys = 33 if config.max_kv_seq_len else 17

    save_engine(built, config, tmp_path)
    assert read_engine(tmp_path).config == config
    for sizes in ((3, 17, keys, 0), (1, 1, 1, 1)):
        found = verdicts(built.plan, trt11, config, *sizes)
        assert [passed for _, passed in found] == [True] * (1 + config.return_lse), found
    for wrong, of in (("wrong", 0), ("wrong_lse", 1)):
        if of < len(found):
            monkeypatch.setenv("FAKE_GPU_KERNEL", wrong)
            assert [passed for _, passed in verdicts(built.plan, trt11, config, 3, 17, keys, 0)][of] is False


@pytest.mark.usefixtures("forward")
def test_each_feature_is_one_that_the_check_sees(trt11: Any) -> None:
    """An engine without it does not pass for one with it."""
    plain = featured(max_kv_seq_len=50, layout="bshd", return_lse=True)
    plan = build_engine(plain, trt_module=trt11).plan
    others: list[dict[str, Any]] = [
        {"causal": False}, {"causal": "bottom-right"}, {"align": "bottom-right"}, {"window": (3, -1)}, {"softcap": 1.5},
        {"scale": 0.5},
    ]  # fmt: skip

    assert all(passed for _, passed in verdicts(plan, trt11, plain, 2, 17, 33, 0))
    for other in others:
        assert [p for _, p in verdicts(plan, trt11, replace(plain, **other), 2, 17, 33, 0)] == [False, False], other


def test_results_that_are_not_numbers_do_not_pass() -> None:
    config = featured(return_lse=True, kv_lengths=True)
    inputs = EXACT["make_inputs"](config, 3, 5, 7, 0)
    exact = EXACT["exact_outputs"](config, inputs)
    right = {"Out": exact["Out"].astype(np.float16), "Lse": exact["Lse"].astype(np.float32)}

    def passed(**changes: Any) -> list[bool]:
        return [good for _, good in EXACT["judge"](config, right | changes, exact)]

    assert passed() == [True, True]
    assert passed(Out=np.full_like(right["Out"], np.nan)) == [False, True]
    assert passed(Lse=np.full_like(right["Lse"], np.nan)) == [True, False]
    assert passed(Lse=np.full_like(right["Lse"], -np.inf)) == [True, False]


def test_the_shapes_that_an_engine_serves() -> None:
    ragged = featured(cu_seqlens=True, num_kv_heads=2, max_kv_seq_len=50)
    packed = featured(layout="packed", num_kv_heads=2, kv_lengths=True)

    assert ragged.ranges() == {
        "Q": ((1, 4, 20), *[(120, 4, 20)] * 2),
        **dict.fromkeys(("K", "V"), ((1, 2, 20), *[(150, 2, 20)] * 2)),
        **dict.fromkeys(("cu_seqlens_q", "cu_seqlens_kv"), ((2,), (4,), (4,))),
    }
    assert packed.ranges() == {"QKV": ((1, 1, 8, 20), *[(3, 40, 8, 20)] * 2), "kv_lengths": ((1,), (3,), (3,))}
    assert SMALL.ranges() == dict.fromkeys("QKV", ((1, 2, 1, 32), *[(2, 2, 40, 32)] * 2))
    assert SMALL.extras == ()
    assert ragged.extras == ("num_kv_heads", "max_kv_seq_len", "cu_seqlens")


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"num_kv_heads": 3}, "num_heads is 4, num_kv_heads 3; num_heads must be a multiple"),
        ({"num_kv_heads": 0}, "num_kv_heads 0"),
        ({"max_kv_seq_len": 0}, "max_kv_seq_len is 0; give 1 or more"),
        ({"causal": "top"}, "causal is 'top'; allowed are True, False and 'bottom-right'"),
        ({"align": "left"}, "align is 'left'; allowed are top-left, bottom-right"),
        ({"causal": "bottom-right", "align": "top-left"}, "leave one of them out"),
        ({"window": (1,)}, r"window is \(1,\); give \(left, right\)"),
        ({"window": (-2, 0)}, "window_left is -2; give 0 or more keys, or -1"),
        ({"softcap": float("nan")}, "softcap is nan; give a finite number above 0"),
        ({"layout": "sbhd"}, "layout is 'sbhd'; allowed are bhsd, bshd, packed"),
        ({"cu_seqlens": True, "kv_lengths": True}, "cu_seqlens excludes q_lengths and kv_lengths"),
        ({"cu_seqlens": True, "layout": "bhsd"}, "layout 'bhsd' has no ragged form"),
        ({"layout": "packed", "max_kv_seq_len": 50}, "max_kv_seq_len is 50, max_seq_len 40; layout 'packed'"),
        ({"head_size": 257}, "257"),
        ({"scale": 0.0}, "scale is 0.0; give a finite float32 other than 0"),
        ({"layer": "tensorrt", "softcap": 2.0, "layout": "bshd"}, "does not serve softcap, layout here"),
        ({"layer": "tensorrt", "causal": "bottom-right"}, "does not serve causal 'bottom-right' here"),
    ],
)
def test_features_that_cannot_be_are_refused_by_name(values: dict[str, Any], text: str) -> None:
    with pytest.raises(EngineError, match=text):
        featured(**values)


def test_a_library_with_the_first_kernel_alone_has_no_features(trt11: Any, gpu: Gpu) -> None:
    for features, text in (
        ({"max_kv_seq_len": 50}, r"does not hold fmha_fwd_d32_fp16, which serves max_kv_seq_len 50.*--head-size 32"),
        ({"softcap": 1.5}, r"does not hold fmha_fwd_d32_fp16.*pyfmha build --dtype fp16 --head-size 32"),
    ):
        with pytest.raises(PyfmhaError, match=text):
            build_engine(replace(SMALL, **features), trt_module=trt11)
    assert gpu.live()["modules"] == gpu.live()["memory"] == 0
