"""Attention of e4m3: the kernel in the emulator, faults that it must notice, and what the family is and refuses."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fp8_runs import KERNEL, NAN, check, run
from helpers import few_of
from sm90_runs import altered, is_noticed

from pyfmha.attention.families import DEFAULT, library_specs
from pyfmha.attention.fp8 import ARGUMENTS, HEAD_SIZES, Fp8, Fp8Call, fp8_family, settings
from pyfmha.attention.run import to_storage
from pyfmha.e4m3 import float_from_e4m3
from pyfmha.errors import SpecError
from pyfmha.verify.fp8_cases import LIMIT, fp8_cases

LENGTHS = {"general": True, "batch": 2, "q_len": 150, "kv_len": 180}
WIDE = {"lazy": True, "threes": True, "by_warps": True, "block_d": 128, "head_size": 128}
ALIGNED = {**WIDE, "causal": True, "aligned": True, "even": 2, "ping_pong": False}
AHEAD = {"ahead": True, "ping_pong": False, "stages": 3, "v_stages": 3}


def below_zero(q: Any, k: Any, v: Any) -> None:
    """Scores below 0, of which those of the block that comes last are the largest."""
    q &= 0x7F
    k |= 0x80
    k[:, :, 64:] = 0xC0  # -2


PROBLEMS: dict[str, dict[str, Any]] = {
    "one tile": {},
    "ends of blocks": {"kv_len": 200, "q_len": 150, "heads": 4, "kv_heads": 1, "layout": "bshd"},
    "head size 112 of 128": {"block_d": 128, "head_size": 112, "block_n": 128, "kv_len": 300, "dtype": "fp16"},
    "head size 256, one block of V": {"block_d": 256, "head_size": 256, "kv_len": 130, "raw": 1, "q_slots": 1},
    "causal": {"causal": True, "q_len": 200, "kv_heads": 1, "v_stages": 3, "stages": 3},
    "longest first": {"causal": True, "longest_first": True, "q_len": 300, "programs": 3, "consumers": 3},
    "lengths": {**LENGTHS, "q_lengths": [150, 0], "kv_lengths": [77, 180], "raw": 1, "ping_pong": False},
    "lengths, causal": {**LENGTHS, "causal": True, "bottom_right": True, "kv_lengths": [177, 30], "programs": 2},
    "ragged": {"general": True, "cu_q": [3, 70, 70, 150], "cu_kv": [0, 30, 90, 140], "q_len": 155, "kv_len": 150},
    "ahead": {**AHEAD, "kv_len": 330, "q_len": 130, "heads": 3, "consumers": 3, "stages": 4, "v_stages": 4},
    "ahead, growing maxima": {**AHEAD, "kv_len": 400, "scale": 2.0, "block_d": 128, "head_size": 128},
    "ahead, two blocks": {**AHEAD, "kv_len": 128, "q_len": 200, "programs": 2},
    "ahead, one block": {**AHEAD, "kv_len": 50, "q_len": 200, "raw": 1, "q_slots": 1},
    "ahead, causal": {**AHEAD, "causal": True, "q_len": 200, "kv_len": 333, "bottom_right": True, "heads": 3},
    "ahead, causal, from the longest": {
        **{**AHEAD, "stages": 4, "v_stages": 4, "consumers": 3, "causal": True, "longest_first": True},
        **{"q_len": 450, "heads": 3, "kv_heads": 1, "producer_first": True},
    },
    "all scores are below 0": {"threes": True, "kv_len": 300, "change": below_zero},
    "sums of the warps whose maxima grow": {
        "lazy": True,
        "kv_len": 300,
        "scale": 2.0,
        "producer_first": True,
        "threes": True,
    },
    "wide blocks": {**WIDE, "block_n": 96, "kv_len": 300, "q_len": 130, "scale": 2.0},
    "wide blocks, growing maxima, no turns": {
        **{**WIDE, "block_n": 160, "kv_len": 777, "q_len": 200, "consumers": 3, "heads": 3, "scale": 2.0},
        **{"ping_pong": False, "dtype": "fp16", "kv_heads": 1, "layout": "bshd"},
    },
    "wide blocks, one": {**WIDE, "block_n": 224, "kv_len": 200, "q_len": 70, "raw": 1, "q_slots": 1},
    "wide blocks, causal": {
        **{**WIDE, "block_n": 224, "causal": True, "longest_first": True, "q_len": 500, "programs": 2},
        **{"heads": 3, "kv_heads": 1, "raw": 1, "q_slots": 1},
    },
    "wide blocks, head size 256": {
        **{**WIDE, "block_n": 96, "block_d": 256, "head_size": 240, "kv_len": 300, "q_len": 100},
        **{"producer_first": True, "raw": 1, "q_slots": 1},
    },
    "wide blocks, two maxima at a time": {**WIDE, "block_n": 192, "threes": False, "kv_len": 500, "causal": True},
    "wide blocks, all scores are below 0": {**WIDE, "block_n": 96, "kv_len": 300, "change": below_zero},
    "wide blocks, head size 64": {**WIDE, "block_n": 192, "block_d": 64, "head_size": 64, "kv_len": 400},
    "each warp by itself": {"by_warps": True, "kv_len": 300, "q_len": 130},
    "each warp by itself, ahead": {**AHEAD, "by_warps": True, "block_n": 96, "kv_len": 500, "q_len": 130},
    "even": {"causal": True, "even": 2, "q_len": 300, "heads": 5, "batch": 2, "programs": 3, "by_warps": True},
    "aligned": {**ALIGNED, "block_n": 192, "q_len": 700, "heads": 3, "programs": 2, "scale": 2.0},
    "aligned, whole blocks": {
        **{**ALIGNED, "block_n": 128, "block_d": 256, "head_size": 256, "q_len": 530, "raw": 1, "q_slots": 1},
        **{"producer_first": True, "ping_pong": True, "programs": 2},
    },
    "aligned, three consumers": {
        **{**ALIGNED, "block_n": 64, "block_d": 64, "head_size": 64, "q_len": 400, "consumers": 3, "by_warps": False},
        **{"lazy": False, "threes": False, "kv_len": 400},
    },
    "aligned, more keys": {**ALIGNED, "block_n": 192, "q_len": 200, "kv_len": 392, "bottom_right": True},
    "aligned, fewer keys": {**ALIGNED, "block_n": 192, "q_len": 392, "kv_len": 200, "bottom_right": True},
    "aligned, near keys": {
        **{**ALIGNED, "halved": True, "block_n": 192, "q_len": 700, "heads": 3, "programs": 2, "v_stages": 3},
    },
    "aligned, near keys of whole blocks": {
        **{**ALIGNED, "halved": True, "block_n": 128, "block_d": 256, "head_size": 256, "q_len": 390, "raw": 1},
        **{"producer_first": True, "programs": 2, "q_slots": 1, "stages": 3},
    },
    "aligned, near keys, fewer": {**ALIGNED, "halved": True, "block_n": 192, "q_len": 500, "kv_len": 230},
    "three blocks of V transposed, one as it comes": {
        **{**WIDE, "ping_pong": False, "block_n": 192, "kv_len": 900, "q_len": 300, "raw": 1, "v_stages": 3},
    },
    "aligned, keys end": {**ALIGNED, "block_n": 192, "q_len": 500, "kv_len": 230},
    "factors": {
        **{"batch": 2, "heads": 4, "kv_heads": 2, "kv_len": 100},
        "descales": (np.full((1, 1), 0.5), np.array([[1.0, 2.0]]), np.array([[3.0, 0.25], [1.0, 7.0]])),
    },
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_it_is_what_float64_says(name: str) -> None:
    check(**PROBLEMS[name])


def largest(q: Any, k: Any, v: Any) -> None:
    """Scores near 2**21, and values of 448."""
    q[...], k[...], v[...] = 0x7E, 0x7E, 0x7E
    k[:, :, 1:] = 0xFE


def test_the_largest_inputs_give_what_they_should() -> None:
    out, _, wanted, _ = run(change=largest, descales=(np.full((1, 1), 64.0), None, None))
    np.testing.assert_array_equal(out, wanted)


def test_nan_shows() -> None:
    def spoil(q: Any, _k: Any, _v: Any) -> None:
        q[0, 0, 3, 0] = NAN

    out, lse, _, _ = run(change=spoil)
    assert np.isnan(out[0, 0, 3]).all()
    assert np.isnan(lse[0, 0, 3])
    assert np.isfinite(np.delete(out[0, 0], 3, 0)).all()


_WAIT, _GIVE_BACK = (
    "        acc, p, next_p = _wait_for_sums(acc, p, next_p, SHAPE)\n"
    "        if SHAPE.BY_WARPS:  # then they can have the registers of the weights before\n"
    "            next_p = _packed(next_p, BLOCK_N)\n",
    "    _give_back(t_free.index(before), SHAPE)\n",
)
GIVEN_TOO_EARLY = (_WAIT + _GIVE_BACK, "    " + _GIVE_BACK + _WAIT)
FAULTS: dict[str, tuple[str, str, str]] = {
    "rows of V are left in pairs": ("(1, 3, 2, 0)", "(1, 2, 3, 0)", "one tile"),
    "keys are left in their order": ("permute((0, 1, 3, 2, 4))", "permute((0, 1, 2, 3, 4))", "one tile"),
    "weights are not scaled": ("LARGEST_WEIGHT: gl.constexpr = gl.constexpr(8.0)",
                               "LARGEST_WEIGHT: gl.constexpr = gl.constexpr(-12.0)", "ends of blocks"),
    "V is given away before it is read": (*GIVEN_TOO_EARLY, "ends of blocks"),
    "V is transposed before there is room": ("        mbarrier.wait(t_free.index(stage), "
                                             "((step // V_STAGES) & 1) ^ 1)\n", "        pass\n", "ends of blocks"),
    "no fence": ("    fence_async_shared()\n    gl.barrier()\n", "    gl.barrier()\n", "one tile"),
    "Q is given away before the last scores": ("        _give_back(q_free.index(slot), SHAPE)\n"
                                               "        last", "        last", "causal"),
    "padding of V counts": ("part & 0", "part", "lengths"),
    "the factor of V is another head's": ("kv_head.to(gl.int64) * stride_h", "kv_head.to(gl.int64) * 0", "factors"),
}  # fmt: skip
FAULTS |= {
    "ahead: blocks that are passed over are given back twice": (
        "                if not AHEAD:\n                    _give_back(t_free",
        "                if True:\n                    _give_back(t_free",
        "ahead, causal, from the longest",
    ),
    "ahead: the second block of the diagonal has no mask": ("gl.minimum(block - unmasked + 1, to_come)",
                                                            "gl.minimum(block - unmasked, to_come)",
                                                            "ahead, causal"),
    "scores below 0 are compared as integers": ("-7.999999046325684", "-1000000.0", "all scores are below 0"),
    "sums stay where maxima grow": (
        "        acc = part_times_where(acc, alpha, due)\n    else", "        acc = acc\n    else",
        "sums of the warps whose maxima grow",
    ),
    "ahead: V is transposed a step too early": ("wait(k_free.index((step + 2) % V_STAGES), (((step + 2) //",
                                                "wait(k_free.index((step + 1) % V_STAGES), (((step + 1) //", "ahead"),
    "ahead: sums stay where a maximum grows": ("return part_times_where(acc, alpha, due), next_p", "return acc, next_p",
                                               "ahead, growing maxima"),
}  # fmt: skip
FAULTS |= {
    "wide: the next columns of the queries come too late": ("i * 64 * panel + column)", "i * 64 * panel + 0)",
                                                            "wide blocks"),
    "wide: columns of another panel": ("i * block_n * panel + column", "i * block_n * 0 + column",
                                       "wide blocks, head size 256"),
    "wide: values of another unit": ("first // row * row * block_d + first % row", "first % row", "wide blocks"),
    "wide: a panel's values are transposed twice": ("(raw * PANELS + panel)", "(raw * PANELS + 0)",
                                                    "wide blocks, head size 256"),
    "wide: the mask of the first part is every part's": ("        key += scores[part].shape[1]\n", "",
                                                         "wide blocks, causal"),
    "wide: the sums of the last part are left out": ("sums += gl.convert_layout(of_part",
                                                     "sums += 0 * gl.convert_layout(of_part", "wide blocks"),
    "wide: the later two of four weights are those before": ("mov.b32 {{high, none}}, ${3 * count + i};",
                                                             "mov.b32 {{high, none}}, ${4 * count + i};",
                                                             "wide blocks, causal"),
    "a warp arrives for all": ("ARRIVALS: gl.constexpr = 4 if BY_WARPS", "ARRIVALS: gl.constexpr = 1 if BY_WARPS",
                               "each warp by itself"),
    "each warp: V is given away before it is read": (*GIVEN_TOO_EARLY, "wide blocks"),
}  # fmt: skip
FAULTS |= {
    "even: the place is handed on before the one before is read": (
        "        mbarrier.wait(q_free.index(slot), ((turn // Q_SLOTS) & 1) ^ 1)\n        if SHAPE.HANDED:\n"
        "            hand_on_tile(handed, slot, tile[0], tile[1])\n",
        "        if SHAPE.HANDED:\n            hand_on_tile(handed, slot, tile[0], tile[1])\n"
        "        mbarrier.wait(q_free.index(slot), ((turn // Q_SLOTS) & 1) ^ 1)\n", "aligned, whole blocks",
    ),
    "even: the place is read before the queries are there": (
        "            _await(q_ready.index(slot), (turn // Q_SLOTS) & 1, SHAPE)\n            row_tile",
        "            row_tile", "even",
    ),
    "aligned: the first block has no mask": ("block * BLOCK_N, block >= unmasked, S_LAYOUT, BLOCK_N, AHEAD,",
                                             "block * BLOCK_N, False, S_LAYOUT, BLOCK_N, AHEAD,", "aligned"),
    "aligned: weights are those before": ("packed_into((p,), (next_p,), halves, now)[0]", "p", "aligned, whole blocks"),
    "near: more keys are seen": ("- block * BLOCK_N <= NEAR_KEYS:", "- block * BLOCK_N <= 2 * NEAR_KEYS:",
                                 "aligned, near keys"),
    "near: the first keys are not masked where some row sees less": (
        "if seen >= key + NEAR:", "if seen >= key:", "aligned, near keys"
    ),
    "near: all keys are seen": ("if seen < key + SHAPE.BLOCK_N:", "if seen < key:",
                                "aligned, near keys of whole blocks"),
    "near: weights of other keys": ("gl.join(p, none).permute((0, 3, 1, 2))", "gl.join(p, none).permute((0, 1, 3, 2))",
                                    "aligned, near keys"),
}  # fmt: skip
QUICK = frozenset(FAULTS)
FAULTS |= {
    "the factor of V is another sequence's": ("batch.to(gl.int64) * stride_b", "batch.to(gl.int64) * 0", "factors"),
    "K has no factor": (" * _descale(k_descale, batch, kv_head))", ")", "factors"),
    "V has no factor": ("_descale(v_descale, batch, kv_head) / total", "1.0 / total", "factors"),
    "a query sees the key after its own": ("columns[None, :] < (ends", "columns[None, :] <= (ends", "causal"),
    "keys of padding are seen": ("ends = rows * 0 + kv_n", "ends = rows * 0 + end_block * BLOCK_N", "ends of blocks"),
    "K is given away before it is multiplied": (
        "    scores = _wait_for_scores(scores, 1, SHAPE)\n    _give_back(k_free.index(stage), SHAPE)\n",
        "    _give_back(k_free.index(stage), SHAPE)\n    scores = _wait_for_scores(scores, 1, SHAPE)\n",
        "ends of blocks",
    ),
    "V is transposed before it is there": (
        "    mbarrier.wait(v_ready.index(step % RAW), (step // RAW) & 1)\n", "", "ends of blocks"
    ),
    "V is multiplied before it is transposed": (
        "    _await(t_ready.index(before), ((step - 1) // V_STAGES) & 1, SHAPE)\n    acc = _multiply_values(",
        "    acc = _multiply_values(", "ends of blocks"
    ),
    "a block that others need is kept": (
        "                    _give_back(t_free.index(step % V_STAGES), SHAPE)\n",
        "                    pass\n", "longest first"
    ),
    "sums are not rescaled": ("row_sum * factor[:, None] + sums", "row_sum + sums", "ends of blocks"),
    "the next row's columns of Out": (".permute((0, 1, 3, 2))", ".permute((0, 1, 2, 3))", "one tile"),
    "rows behind the tensor are written": ("inside = (own_rows < out_rows)[:, None] & ", "inside = ", "ends of blocks"),
    "a ragged batch is stored from its first row": ("start + q_start * out_stride_s", "start", "ragged"),
    "ahead: the last weights' factor is left out": (
        "        acc = part_times_where(acc, alpha, due)\n        p", "        p", "ahead, growing maxima",
    ),
    "ahead: K is given away before it is multiplied": (
        "    acc, scores, p, next_p = _wait_for_all(acc, next_scores, p, next_p, SHAPE)\n"
        "    _give_back(k_free.index(stage), SHAPE)\n",
        "    _give_back(k_free.index(stage), SHAPE)\n"
        "    acc, scores, p, next_p = _wait_for_all(acc, next_scores, p, next_p, SHAPE)\n",
        "ahead",
    ),
    "ahead: the first of its scores are not awaited": (
        "        stage = step % STAGES\n        _await(k_ready.index(stage), (step // STAGES) & 1, SHAPE)\n"
        "        scores = _wait_for_scores(_multiply_keys(q, k_smem, stage, SHAPE, S_LAYOUT), 0, SHAPE)\n"
        "        _give_back(k_free.index(stage), SHAPE)\n        step",
        "        stage = step % STAGES\n"
        "        scores = _wait_for_scores(_multiply_keys(q, k_smem, stage, SHAPE, S_LAYOUT), 0, SHAPE)\n"
        "        _give_back(k_free.index(stage), SHAPE)\n        step", "ahead",
    ),
    "ahead: the weights before the last are lost": (
        "        acc = _multiply_values(p, t_smem, before, acc, SHAPE, P_LAYOUT)\n        next_p",
        "        acc = _multiply_values(p, t_smem, before, acc * 0, SHAPE, P_LAYOUT)\n        next_p", "ahead",
    ),
    "ahead: Q is given away at the start": ("    if to_left > 0:\n        stage",
                                            "    _give_back(q_free, SHAPE)\n    if to_left > 0:\n        stage",
                                            "ahead"),
    "blocks of the longest tile come in one order": ("key = (end_block - 1 - block) * BLOCK_N",
                                                     "key = block * BLOCK_N", "causal"),
}  # fmt: skip


@pytest.mark.parametrize("fault", few_of(FAULTS, QUICK.__contains__))
def test_a_fault_is_noticed(fault: str, tmp_path: Path) -> None:
    right, wrong, problem = FAULTS[fault]
    assert is_noticed(check, altered(KERNEL, right, wrong, tmp_path), PROBLEMS[problem])


def test_turns_do_not_go_with_scores_that_are_ahead() -> None:
    """In a causal tile a consumer of one block takes a turn more than the others; from the next tile on all wait."""
    for problem in ({"ping_pong": True}, {"v_stages": 2}):
        with pytest.raises(AssertionError, match="AHEAD"):
            run(**{**AHEAD, **problem})
    for size in HEAD_SIZES:
        for setting in settings(size):
            if setting.ahead:
                assert not setting.ping_pong
                assert setting.stages == setting.v_stages >= 3


def test_masks_of_one_block_go_by_what_blocks_go() -> None:
    """A kernel whose loop has no masks serves as many keys as queries alone."""
    found = [setting for size in HEAD_SIZES for setting in settings(size) if setting.aligned]
    assert len(found) == len(HEAD_SIZES)
    for setting in found:
        assert setting.masks == (True,)
        assert setting.block_n % 64 == 0
        assert "q_len == kv_len" in setting.requires
        assert not setting.longest_first
    for problem in ({"block_n": 160}, {"aligned": False, "halved": True}):
        with pytest.raises(AssertionError, match="wants"):
            run(**{**ALIGNED, **problem})


def test_the_family() -> None:
    assert "fp8" not in DEFAULT
    specs = library_specs(["fp8"])
    assert {spec.name for spec in specs} == {f"fmha_fp8_d{d}_{t}" for d in HEAD_SIZES for t in ("fp16", "bf16")}
    assert {spec.archs for spec in specs} == {("sm_90",)}
    assert [f.name for f in fp8_family(["bf16", "fp32"], [40])] == ["fmha_fp8_d64_bf16"]
    with pytest.raises(SpecError, match="use one of fp16, bf16"):
        Fp8("fp32", 64)
    with pytest.raises(SpecError, match=r"nothing to build.*fp16 or bf16"):
        library_specs(["fp8"], ["fp32"])


def test_what_is_not_served_is_refused_by_name() -> None:
    for spec in library_specs(["fp8"]):
        asked = set(spec.requires)
        assert {"softcap == 0", "window_left == -1", "sm_scale > 0"} <= asked
        assert asked & {"ragged == 0", "ragged == 1"}
        assert asked & {"window_right == 0", "window_right == -1", "window_right <= 0"}
        assert [a.hint for a in spec.arguments if a.name == "head_size"] == [16]


def test_a_call_has_as_many_scalars_as_the_kernel() -> None:
    call = Fp8Call(1, 2, 1, 5, 6, 64, 0.125, q_descale_strides=(7, 8))
    scalars = [name for name, kind in ARGUMENTS if not kind.startswith("*")]
    given = dict(zip(scalars, call.scalars(), strict=True))
    assert (given["q_descale_stride_b"], given["q_descale_stride_h"], given["window_right"]) == (7, 8, -1)
    with pytest.raises(SpecError, match="k_descale_strides"):
        Fp8Call(1, 2, 1, 5, 6, 64, 0.125, k_descale_strides=(1, -1))


def test_cases_of_verify_tell_factors_and_judge() -> None:
    case = next(case for case in fp8_cases("bf16", 64) if "factors of sequences" in case.name)
    plain = float_from_e4m3(case.view("K", case.inputs["K"]))
    assert case.call().v_descale_strides == (2, 1)
    np.testing.assert_allclose(case.numbers("K"), plain * case.descales[1][0, 0])
    exact, lse = case.exact
    store = case.blank("Out")
    view = case.view("Out", store)
    for factor, passes in ((1.0, True), (1.0 + 2 * LIMIT, False)):
        view[...] = to_storage((exact * factor).astype(np.float32), "bf16")
        assert (case.judge(store, lse.astype(np.float32))[1] == "") is passes
