"""The Hopper kernel's numbers and barriers, in the emulator: every tile, mask, stride and phase, but not its speed."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gluon_emulator import DTYPES, FP32, INT32, Deadlock, Descriptor, Machine, Pointer, launch, load_kernel, tensor
from hypothesis import given, settings
from hypothesis import strategies as st

from pyfmha.reference import attend, relative_error

KERNEL = Path(__file__).parents[1] / "kernels" / "fmha_sm90.py"
TOLERANCE = {"fp16": 5e-4, "bf16": 4e-3}


def make(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, layout: str, scale: float = 1.0) -> Any:
    """A [batch, heads, seq, head size] array of values of the dtype, laid out as asked for, within guards of NaN."""
    values = DTYPES[dtype].rounded(rng.standard_normal(shape) * scale)
    batch, heads, seq, size = shape
    stored = (batch, heads, seq, size) if layout == "bhsd" else (batch, seq, heads, size)
    memory = np.full(int(np.prod(stored)) + 32, np.nan, np.float32)
    view = memory[16:-16].reshape(stored)
    view = view if layout == "bhsd" else view.transpose(0, 2, 1, 3)
    view[...] = values
    return memory, view


def run(
    *,
    seed: int = 0,
    batch: int = 1,
    heads: int = 2,
    kv_heads: int | None = None,
    q_len: int = 64,
    kv_len: int | None = None,
    head_size: int = 64,
    causal: bool | str = False,
    dtype: str = "fp16",
    layout: str = "bhsd",
    consumers: int = 2,
    block_n: int = 64,
    stages: int = 2,
    ping_pong: bool | None = None,
    own_out: bool = True,
    programs: int = 1,
    block_d: int = 64,
    scale: float = 1.0,
    lse: bool = True,
) -> tuple[Any, Any, Any, Any]:
    """Run the kernel; returns Out, Lse and what they should be."""
    rng = np.random.default_rng(seed)
    kv_heads, kv_len = kv_heads or heads, kv_len or q_len
    sm_scale = 0.125
    (q_memory, q), (k_memory, k), (v_memory, v) = (
        make(rng, (batch, h, s, head_size), dtype, layout, scale)
        for h, s in ((heads, q_len), (kv_heads, kv_len), (kv_heads, kv_len))
    )
    out_memory, out = make(rng, (batch, heads, q_len, head_size), dtype, layout)
    lse_memory = np.full(batch * heads * q_len, 7.0, np.float32)
    machine = Machine(seed)
    kernel = load_kernel(KERNEL, machine)["fmha_fwd_sm90"]
    element = DTYPES[dtype]

    def strides(array: Any) -> list[Any]:
        return [np.int64(stride // 4) for stride in array.strides[:3]]

    launch(
        machine,
        kernel,
        programs,
        Descriptor(out, element, 64, block_d),
        Descriptor(q, element, 64, block_d),
        Descriptor(k, element, block_n, block_d),
        Descriptor(v, element, block_n, block_d),
        Pointer(out_memory, element, 16),
        Pointer(lse_memory if lse else None, FP32),
        *(Pointer(memory, element, 16) for memory in (q_memory, k_memory, v_memory)),
        *(Pointer(None, INT32) for _ in range(4)),
        sm_scale,
        0.0,
        batch,
        heads,
        kv_heads,
        q_len,
        kv_len,
        head_size,
        *strides(q),
        *strides(k),
        *strides(v),
        *strides(out),
        -1,
        0 if causal else -1,
        int(causal == "bottom-right"),
        0,
        BLOCK_D=block_d,
        BLOCK_N=block_n,
        CONSUMERS=consumers,
        STAGES=stages,
        CAUSAL=bool(causal),
        PING_PONG=consumers > 1 if ping_pong is None else ping_pong,
        OWN_OUT=own_out,
        CONSUMER_REGISTERS=240,
        PRODUCER_REGISTERS=24,
    )
    assert np.isnan(out_memory[:16]).all()
    assert np.isnan(out_memory[-16:]).all()
    wanted, wanted_lse = attend(
        q, k, v, sm_scale=sm_scale, window_right=0 if causal else -1, bottom_right=causal == "bottom-right"
    )
    return out, lse_memory.reshape(batch, heads, q_len), wanted, wanted_lse


def check(dtype: str = "fp16", **settings: Any) -> None:
    out, lse, wanted, wanted_lse = run(dtype=dtype, **settings)
    assert np.isfinite(out).all()
    assert relative_error(out, wanted) < TOLERANCE[dtype]
    np.testing.assert_allclose(lse, wanted_lse, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("causal", [False, True, "bottom-right"])
@pytest.mark.parametrize("consumers", [1, 2, 3])
def test_every_number_of_consumers(seed: int, causal: bool | str, consumers: int) -> None:
    check(seed=seed, causal=causal, consumers=consumers, q_len=300, kv_len=200, programs=2)


@pytest.mark.parametrize(
    "problem",
    [
        {"q_len": 1, "kv_len": 1},
        {"q_len": 1, "kv_len": 200, "causal": "bottom-right"},
        {"q_len": 130, "kv_len": 1},
        {"q_len": 129, "kv_len": 127, "block_n": 128},
        {"q_len": 70, "kv_len": 300, "causal": True},
        {"q_len": 300, "kv_len": 70, "causal": True},
        {"q_len": 70, "kv_len": 300, "causal": "bottom-right"},
        {"q_len": 64, "kv_len": 256, "causal": "bottom-right", "block_n": 64, "programs": 7},
        {"heads": 6, "kv_heads": 2, "batch": 2, "q_len": 70, "causal": True, "programs": 3},
        {"heads": 3, "kv_heads": 1, "q_len": 200, "programs": 2},
        {"layout": "bshd", "batch": 2, "q_len": 100, "causal": True},
        {"head_size": 40, "q_len": 100},
        {"head_size": 72, "block_d": 128, "q_len": 100, "causal": True, "layout": "bshd"},
        {"head_size": 256, "block_d": 256, "q_len": 80, "own_out": False},
        {"stages": 3, "q_len": 260, "causal": True},
        {"ping_pong": False, "q_len": 260, "causal": True, "consumers": 3},
        {"own_out": False, "q_len": 200, "causal": True},
        {"dtype": "bf16", "q_len": 200, "causal": True},
    ],
    ids=str,
)
def test_shapes_layouts_and_settings(problem: dict[str, Any]) -> None:
    check(**problem)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_problem(data: st.DataObject) -> None:
    consumers = data.draw(st.integers(1, 3))
    kv_heads = data.draw(st.integers(1, 2))
    check(
        seed=data.draw(st.integers(0, 1000)),
        batch=data.draw(st.integers(1, 2)),
        kv_heads=kv_heads,
        heads=kv_heads * data.draw(st.integers(1, 3)),
        q_len=data.draw(st.integers(1, 270)),
        kv_len=data.draw(st.integers(1, 270)),
        causal=data.draw(st.sampled_from([False, True, "bottom-right"])),
        consumers=consumers,
        stages=data.draw(st.integers(2, 3)),
        ping_pong=consumers > 1 and data.draw(st.booleans()),
        own_out=data.draw(st.booleans()),
        programs=data.draw(st.integers(1, 5)),
        layout=data.draw(st.sampled_from(["bhsd", "bshd"])),
        head_size=8 * data.draw(st.integers(1, 8)),
    )


@pytest.mark.parametrize(("heads", "group"), [(32, 32), (64, 8)])
def test_few_keys_and_many_rows_stay_within_32_bits(heads: int, group: int) -> None:
    """Few keys leave room in the cache for more heads than there are; those times the rows' tiles pass 2**31."""
    section = load_kernel(KERNEL, Machine(0))["_section"]
    held = section(*(tensor(value, np.int32) for value in (1, group, heads)), 64)

    assert held == heads
    assert held.dtype == np.int32


def test_lse_may_be_left_out() -> None:
    out, lse, wanted, _ = run(lse=False)

    assert relative_error(out, wanted) < TOLERANCE["fp16"]
    assert (lse == 7).all()


@pytest.mark.parametrize(("dtype", "scale"), [("fp16", 2.0**13), ("bf16", 2.0**125)])
@pytest.mark.parametrize("causal", [False, True])
def test_the_largest_inputs_stay_finite(dtype: str, scale: float, causal: bool) -> None:
    """Scores beyond what the fast arithmetic holds: each row then weighs only its best key."""
    out, lse, wanted, _ = run(dtype=dtype, scale=scale, causal=causal, q_len=150, kv_len=90, programs=2)

    assert np.isfinite(out).all()
    assert not np.isnan(lse).any()
    assert relative_error(out / scale, wanted / scale) < TOLERANCE[dtype]


MUTANTS = {
    "K is not waited for": (
        "    mbarrier.wait(k_ready.index(stage), (step // STAGES) & 1)\n    if PING",
        "    if PING",
    ),
    "V is freed before its product is complete": (
        "    acc, p, next_p = warpgroup_mma_wait(0, deps=(acc, p, next_p))\n"
        "    mbarrier.arrive(v_free.index(before), count=1)\n",
        "    mbarrier.arrive(v_free.index(before), count=1)\n"
        "    acc, p, next_p = warpgroup_mma_wait(0, deps=(acc, p, next_p))\n",
    ),
    "V is not waited for": ("    mbarrier.wait(v_ready.index(before), ((step - 1) // STAGES) & 1)\n", ""),
    "Q is overwritten while in use": ("            mbarrier.wait(q_free.index(c), (turn & 1) ^ 1)\n", ""),
    "the phase of K is wrong": ("mbarrier.wait(k_free.index(stage), phase)", "mbarrier.wait(k_free.index(stage), 0)"),
    "Out is overwritten while it is stored": ("            tma.store_wait(0)  # of the tile before", "            # "),
    "the last row of tiles is lost": ("row_tiles - 1 - inside // held", "row_tiles - 2 - inside // held"),
    "a masked block is taken for unmasked": (
        "masked = gl.minimum(masked, blocks - 1) if CAUSAL else 0",
        "masked = 0",
    ),
    "a key too many": ("gl.minimum(rows + (offset + 1), kv_len)", "gl.minimum(rows + (offset + 2), kv_len)"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_faulty_kernel_is_noticed(mutant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulator would find what it is there to find."""
    right, wrong = MUTANTS[mutant]
    source = KERNEL.read_text()
    assert source.count(right) == 1, "the kernel has changed: adapt the mutant"
    path = tmp_path / "mutant.py"
    path.write_text(source.replace(right, wrong))
    monkeypatch.setattr(sys.modules[__name__], "KERNEL", path)

    for seed in range(40):
        try:
            check(seed=seed, q_len=300, kv_len=340, causal="bottom-right", heads=1)
        except (AssertionError, Deadlock):
            return
    pytest.fail("no interleaving showed the fault")
