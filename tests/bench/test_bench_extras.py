"""Cells with lengths, ragged batches, eight bits, biases, masks, sinks and functions: what they are, who times them."""

import importlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch_double
from bench_on_double import rows_of
from helpers import few_of
from trt_double.full.gpu import Gpu

from pyfmha.attention.biased import ARGUMENTS
from pyfmha.attention.key_blocks import KeyBlocks
from pyfmha.bench.cells import BESIDE, Cell
from pyfmha.bench.clock import Clock
from pyfmha.bench.extras import FUNCTIONS, LISTED, arrays_of, score_of, seen_of
from pyfmha.bench.flex import torch_contenders
from pyfmha.bench.launches import launch_of
from pyfmha.bench.ours import our_contenders
from pyfmha.bench.presets import preset
from pyfmha.bench.results import Measured, Results, Roof, Row, parse_results
from pyfmha.errors import SpecError
from pyfmha.runtime.library import Library

pytest_plugins = ["trt_double.full.fixtures", "trt_double.fixtures", "bench_device"]

RAGGED = Cell("fp16", 3, 4, 2, 9, 9, 32, True, tokens=(5, 9, 1))
KEYS = Cell("fp16", 2, 4, 2, 7, 20, 32, False, kv_lengths=(3, 20))
EIGHT = Cell("fp8", 2, 4, 2, 9, 9, 64, True, "bshd")
SMALL = Cell("fp16", 2, 4, 4, 6, 6, 32, False)
NARROW = Cell("fp16", 2, 4, 2, 9, 9, 24, True, v_head_size=16)


def beside(name: str) -> Cell:
    return replace(SMALL, beside=name, causal=name in ("sinks", "alibi", "documents"))


# ------------------------------------------------------------------ cells


def test_presets_hold_what_was_asked_for() -> None:
    assert Cell("bf16", 1, 16, 16, 16384, 16384, 256, True) in preset("flash3")
    lengths = preset("lengths")
    assert {(c.head_size, bool(c.tokens), bool(c.kv_lengths)) for c in lengths} == {
        (size, ragged, not ragged) for size in (64, 128, 256) for ragged in (False, True)
    }
    assert {(len(c.tokens), c.causal) for c in lengths if c.tokens} == {(8, False), (16, True)}
    eight = preset("fp8")
    assert {c.dtype for c in eight} == {"fp8", "bf16"}
    assert len(eight) == 2 * 2 * 3 * 6
    assert {c.batch * c.seq for c in eight} == {16384}
    masks = preset("masks")
    assert {c.beside for c in masks} == {"", *BESIDE}
    assert {(c.head_size, c.v_head_size) for c in masks} == {(64, 0), (128, 0), (192, 128)}


LONGER = ("documents", "prefix", "groups")


@pytest.mark.parametrize(
    "cell", [RAGGED, KEYS, NARROW, replace(KEYS, causal=True), *map(beside, BESIDE)], ids=lambda c: c.name
)
def test_pairs_are_counted_one_by_one(cell: Cell) -> None:
    cell = replace(cell, seq=1500, kv_seq=1500) if cell.kind in LONGER else cell
    held, counted = arrays_of(cell), 0
    seen = seen_of(cell, held) if cell.kind in LONGER else None  # of a random mask, all count
    for b in range(cell.batch):
        q, k = np.arange(cell.queries_of(b))[:, None], np.arange(cell.keys_of(b))[None]
        shown = (k <= q) if cell.causal else np.ones((len(q), k.shape[1]), bool)
        counted += int((shown if seen is None else shown & seen(b, 0, q, k)).sum())
    assert cell.pairs == counted
    assert cell.flop == 2 * cell.heads * counted * (24 + 16 if cell is NARROW else 2 * cell.head_size)


def test_bytes_of_eight_bits_and_of_a_ragged_batch() -> None:
    assert EIGHT.nbytes == 2 * 64 * 9 * ((1 + 2) * 4 + 2 * 1 * 2)
    assert NARROW.nbytes == 2 * 2 * (24 + 16) * (4 * 9 + 2 * 9)
    assert RAGGED.nbytes == 32 * 2 * (5 + 9 + 1) * (2 * 4 + 2 * 2)
    assert (RAGGED.shape("Q"), RAGGED.layout, RAGGED.place(1, [0, 3])) == ((1, 4, 15, 32), "bshd", (0, [5, 8]))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"kv_lengths": (3,)}, r"kv_lengths are \(3,\): give 2, each from 1 to 6"),
        ({"kv_lengths": (3, 7)}, "each from 1 to 6"),
        ({"tokens": (3, 5)}, r"tokens are \(3, 5\): give 2, of which the largest is seq and kv_seq"),
        ({"tokens": (0, 6)}, r"tokens are \(0, 6\)"),
        ({"beside": "bias-hq"}, "beside is 'bias-hq': use one of bias-1hqk"),
        (
            {"beside": "t5", "kv_lengths": (3, 4)},
            "has several of fp8, lengths, a ragged batch, a t5 and another head size of V",
        ),
        ({"dtype": "fp8", "tokens": (6, 2)}, "has several of fp8"),
        ({"v_head_size": 8, "kv_lengths": (3, 4)}, "has several of fp8"),
    ],
)
def test_cells_that_cannot_be(change: dict[str, Any], text: str) -> None:
    with pytest.raises(SpecError, match=text):
        replace(SMALL, **change)


def test_json_brings_them_back() -> None:
    measured = tuple(
        Measured(cell, (Row("ours", "ours", 3.0, 0.1),)) for cell in (RAGGED, KEYS, EIGHT, NARROW, beside("t5"))
    )
    made = Results({"device": "Some GPU"}, Roof(), measured)
    assert parse_results(made.to_json(), "here") == made


# ------------------------------------------------------------------ functions


def test_t5s_buckets_are_those_of_the_paper() -> None:
    cell = replace(beside("t5"), seq=300, kv_seq=300)
    held = arrays_of(cell)
    score = score_of(cell, held, np)
    assert score is not None
    for q, k in ((0, 0), (5, 0), (0, 7), (8, 0), (0, 9), (100, 3), (3, 100), (299, 0), (0, 299), (40, 8), (136, 8)):
        far = abs(k - q)
        large = 8 + int(math.log(max(far, 1) / 8) / math.log(128 / 8) * 8 + 1e-6)
        bucket = (16 if k > q else 0) + (far if far < 8 else min(large, 15))
        assert score(np.float64(0.0), 0, 2, np.int64(q), np.int64(k)) == held["table"][bucket, 2]


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_a_function_is_given_what_it_takes(name: str) -> None:
    cell = beside("prefix-1000" if name == "prefix" else name)
    launch = launch_of(cell)
    declared = getattr(importlib.import_module(f"pyfmha.functions.{name}"), name).__pyfmha__()
    held, kinds = arrays_of(cell), {"float32": "*fp32", "int32": "*i32"}
    own, lists = launch.further[: len(declared["inputs"])], launch.further[len(declared["inputs"]) :]
    given = [kinds[str(held[one].dtype)] if isinstance(one, str) else "i32" for one in own]
    assert given == [kind for _, kind in declared["inputs"]]
    assert launch.name == f"fmha_with_{name}_d32_fp16"
    told_apart = declared["blocks"] and KeyBlocks(**declared["blocks"])
    assert told_apart == LISTED.get(name)
    if told_apart:
        before = (f"fmha_flags_{name}_d32_fp16", f"fmha_blocks_{name}_d32_fp16")
        assert (lists, launch.before) == (("Blocks", cell.batch, 1), before)
        assert launch.memory == 4 * cell.batch * (2 + 2)
    assert launch.build == ("--functions", name, "--dtype", "fp16", "--head-size", "32")
    assert len(launch.pointers) + len(launch.numbers) == len(ARGUMENTS)


# ------------------------------------------------------------------ rows


def fine(row: Row, limit: float = 4e-3) -> bool:
    return row.us is not None and row.graph_us is not None and row.error is not None and row.error < limit


@pytest.mark.parametrize(
    "cell",
    [
        RAGGED,
        KEYS,
        EIGHT,
        NARROW,
        *(beside(name) for name in ("bias-1hqk", "bias-b11k", "mask-b1qk", "mask-b11k", "sinks")),
    ],
    ids=lambda cell: cell.name,
)
def test_our_rows(timer: Clock, forward_library_path: Path, cell: Cell) -> None:
    rows = rows_of(timer, cell, our_contenders(Library(forward_library_path), timer.stream, generic=True))
    assert fine(rows["ours"], 0.04), rows["ours"].missing
    kind = "fp8" if cell is EIGHT else "biased" if cell.beside or cell is NARROW else "fwd"
    assert rows["ours"].variant.startswith(f"fmha_{kind}_d")
    said = next(iter(cell.asks.values()))
    assert rows["ours-first"].missing == f"the first kernel does not serve {said}"
    assert rows["ours-decode"].missing == f"ours, split + combine does not serve {said}"
    if kind != "fwd":
        assert rows["ours-generic"].missing == f"the variant for misaligned tensors does not serve {said}"


def test_functions_that_the_library_lacks_are_named(timer: Clock, forward_library_path: Path) -> None:
    rows = rows_of(timer, beside("alibi"), our_contenders(Library(forward_library_path), timer.stream, generic=False))
    said = "the library has no fmha_with_alibi_d32_fp16; add it: pyfmha build --functions alibi --dtype fp16"
    assert rows["ours"].missing.startswith(said)


def of_torch(timer: Clock) -> list[Any]:
    """One of each kind."""
    return [one for one in torch_contenders(timer.stream, "sm_90") if one.key in ("cudnn", "flex", "flash3", "jit")]


QUICK = ("", "bias-b11k", "mask-b1qk", "sinks", "documents", "t5")


@pytest.mark.parametrize(
    "cell", few_of([RAGGED, KEYS, EIGHT, NARROW, *map(beside, BESIDE)], lambda cell: cell.beside in QUICK), ids=str
)
def test_the_rows_of_torch(timer: Clock, bench_gpu: Gpu, monkeypatch: pytest.MonkeyPatch, cell: Cell) -> None:
    log = torch_double.install(monkeypatch, bench_gpu)
    cell = replace(cell, dtype="bf16") if cell in (RAGGED, KEYS, NARROW) else cell
    rows = rows_of(timer, cell, of_torch(timer))
    assert fine(rows["flash3"], 0.04) == (not cell.beside), rows["flash3"].missing
    assert fine(rows["cudnn"]) == (cell.kind in ("bias", "mask") or bool(cell.kv_lengths or cell.v_head_size)), rows[
        "cudnn"
    ].missing
    assert fine(rows["flex"]) == (bool(cell.v_head_size) or cell.kind not in ("", "sinks")), rows["flex"].missing
    assert "does not serve" in rows["jit"].missing
    if cell.tokens:
        assert log.ragged[0] == ((15, 4, 32), [0, 5, 14, 15], [0, 5, 14, 15], 9, 9)
    if cell.kind not in ("", "sinks"):
        torch = importlib.import_module("torch")
        assert torch._dynamo.config.recompile_limit == 256
        assert log.compiled[-1] == ("flex_attention", {"dynamic": False})


def test_causal_with_key_lengths_is_another_mask_of_theirs(
    timer: Clock, bench_gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch_double.install(monkeypatch, bench_gpu)
    cell = replace(KEYS, dtype="bf16", seq=20, causal=True)
    rows = rows_of(timer, cell, of_torch(timer))
    assert rows["flash3"].missing == "its causal mask is another where there are more or fewer keys than queries"
    assert fine(rows["cudnn"])
