"""Times biases, masks and functions on a GPU beside PyTorch's, in turns, each output checked against float64 first.

    python tests/masks_gpu.py LIBRARY [--flex] [--rounds 9] [--limit SECONDS] [--only WORD ...] [--out FILE]

The library: pyfmha build --arch native --dtype fp16 --head-size 64 128 --kernels biased hopper --functions alibi \
documents prefix tests/functions_of_masks.py. Needs PyTorch. Cold L2 cache, the host's launch behind a spin of the GPU,
random data; medians, in us.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from pyfmha.attention.biased import POINTERS, BiasedCall
from pyfmha.attention.forward import Call
from pyfmha.runtime.library import Library

ROWS = 192
TOLERANCE = 2e-3
DOCUMENT, PREFIX, WIDTH = 700, 1000, 256


@dataclass
class Cell:
    """One problem. shape: of the bias or mask; function: of ours, by its file."""

    name: str
    kind: str
    size: int
    batch: int = 4
    tokens: int = 2048
    heads: int = 32
    shape: tuple[int, ...] = ()
    function: str = ""
    causal: bool = False
    tensors: dict[str, Any] = field(default_factory=dict)


def cells() -> Iterator[Cell]:
    for size in (64, 128):
        s = 2048
        yield Cell("bias [1,H,S,S]", "bias", size, shape=(1, 32, s, s))
        yield Cell("bias [1,1,S,S]", "bias", size, shape=(1, 1, s, s))
        yield Cell("bias [B,1,1,S]", "bias", size, shape=(4, 1, 1, s))
        yield Cell("mask [B,1,S,S]", "mask", size, shape=(4, 1, s, s))
        yield Cell("mask [B,1,1,S]", "mask", size, shape=(4, 1, 1, s))
        yield Cell("sinks, causal", "sinks", size, causal=True)
        yield Cell("ALiBi, causal", "alibi", size, function="alibi", causal=True)
        yield Cell("causal by function", "prefix", size, function="prefix")
        yield Cell("documents, causal", "documents", size, 1, 8192, function="documents", causal=True)
        yield Cell("prefix of 1000, causal", "prefix", size, 1, 8192, function="prefix")
        yield Cell("T5", "t5", size, function="t5")


def prepare(cell: Cell) -> None:
    """Q, K, V and what belongs to the cell."""
    torch.manual_seed(1)
    b, h, s, d = cell.batch, cell.heads, cell.tokens, cell.size
    made = cell.tensors
    for name in "QKV":
        made[name] = torch.randn(b, h, s, d, device="cuda", dtype=torch.float16)
    if cell.kind == "bias":
        made["bias"] = torch.randn(cell.shape, device="cuda", dtype=torch.float16)
    elif cell.kind == "mask":
        made["mask"] = torch.rand(cell.shape, device="cuda") < 0.8
    elif cell.kind == "sinks":
        made["sinks"] = torch.randn(h, device="cuda")
    elif cell.kind == "alibi":
        made["slopes"] = torch.exp2(-8 * (torch.arange(h, device="cuda") + 1) / h)
    elif cell.kind == "documents":
        number = torch.arange(s, device="cuda") // DOCUMENT
        made["begins"] = (number * DOCUMENT).int()
        made["ends"] = ((number + 1) * DOCUMENT).clamp(max=s).int()
    elif cell.kind == "prefix":
        made["lengths"] = torch.full((b,), PREFIX if "1000" in cell.name else 0, device="cuda", dtype=torch.int32)
    elif cell.kind == "t5":
        made["table"] = torch.randn(32, h, device="cuda")


def bucket_of(distance: Any) -> Any:
    """T5's, of 16 for distances up to 128, as the shipped function has it."""
    ratio = torch.log2(distance.clamp(min=1).float() / 8) / 4.0
    large = 8 + (ratio * 8 + 1e-5).int()
    return torch.where(distance < 8, distance, large.clamp(max=15))


def score_of(cell: Cell) -> Callable[..., Any] | None:
    """FlexAttention's function of scores, and the reference's."""
    made = cell.tensors
    if cell.kind == "bias":
        bias = made["bias"]
        nb, nh, nq, _ = bias.shape
        return lambda score, b, h, q, k: score + bias[b if nb > 1 else 0, h if nh > 1 else 0, q if nq > 1 else 0, k]
    if cell.kind == "alibi":
        slopes = made["slopes"]
        return lambda score, b, h, q, k: score + slopes[h] * (k - q)
    if cell.kind == "t5":
        table = made["table"]

        def t5(score: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
            bucket = torch.where(k > q, 16, 0) + bucket_of((k - q).abs())
            return score + table[bucket, h]

        return t5
    return None


def mask_of(cell: Cell) -> Callable[..., Any] | None:
    """FlexAttention's function of what is seen, and the reference's."""
    made = cell.tensors
    if cell.kind == "mask":
        mask = made["mask"]
        nq = mask.shape[2]
        return lambda b, h, q, k: mask[b, 0, q if nq > 1 else 0, k]
    if cell.kind == "documents":
        begins = made["begins"]
        return lambda b, h, q, k: (k >= begins[q]) & (k <= q)
    if cell.kind == "prefix":
        lengths = made["lengths"]
        return lambda b, h, q, k: (k <= q) | (k < lengths[b])
    return (lambda b, h, q, k: k <= q) if cell.causal else None


def exact(cell: Cell, b: int, h: int, rows: Any) -> Any:
    """Rows of the output in float64."""
    q, k, v = (cell.tensors[name][b, h].double() for name in "QKV")
    keys = torch.arange(cell.tokens, device="cuda")
    score = (q[rows] @ k.T) * cell.size**-0.5
    place = (torch.tensor(b, device="cuda"), torch.tensor(h, device="cuda"), rows[:, None], keys[None])
    change, seen = score_of(cell), mask_of(cell)
    if change is not None:
        score = change(score, *place).double()
    if seen is not None:
        score = score.masked_fill(~seen(*place), float("-inf"))
    if cell.kind == "sinks":
        sink = cell.tensors["sinks"][h].double().expand(len(rows), 1)
        return torch.softmax(torch.cat([score, sink], 1), -1)[:, :-1] @ v
    return torch.softmax(score, -1) @ v


def error_of(cell: Cell, out: Any) -> float:
    worst = 0.0
    for b, h in ((0, 0), (cell.batch - 1, cell.heads - 1), (0, cell.heads // 2)):
        rows = torch.randperm(cell.tokens, device="cuda")[:ROWS]
        wanted = exact(cell, b, h, rows)
        got = out[b, h, rows].double()
        worst = max(worst, float((got - wanted).norm() / wanted.norm()) if torch.isfinite(got).all() else 1e9)
    return worst


class Ours:
    """A function of the library on a cell."""

    def __init__(self, library: Library, cell: Cell, name: str, call: Any, further: tuple[Any, ...] = ()) -> None:
        self.function = library[name]
        self.function.load()
        self.out = torch.empty_like(cell.tensors["Q"])
        given = {"Out": self.out, **{name: cell.tensors[name] for name in "QKV"}}
        if cell.kind in ("bias", "mask", "sinks") and "fwd" not in name:
            given[{"bias": "Bias", "mask": "Mask", "sinks": "SinksFp32"}[cell.kind]] = cell.tensors[cell.kind]
        pointers = POINTERS if "fwd" not in name else POINTERS[:9]
        self.arguments = (
            *(given[name].data_ptr() if name in given else 0 for name in pointers), *call.scalars(), *further,
        )  # fmt: skip
        self.stream = torch.cuda.current_stream().cuda_stream
        self.variant = self.function.variant(*self.arguments)

    def __call__(self) -> Any:
        self.function(self.stream, *self.arguments)
        return self.out


def contenders(library: Library, cell: Cell, *, flex: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    made, size = cell.tensors, cell.size
    common = (cell.batch, cell.heads, cell.heads, cell.tokens, cell.tokens, size, size**-0.5)
    right = 0 if cell.causal else -1
    step = (cell.heads * cell.tokens * size, cell.tokens * size, size)
    laid = {f"{name}_strides": step for name in ("q", "k", "v", "out")}
    strides: dict[str, Any] = {}
    if cell.kind in ("bias", "mask"):
        of = made[cell.kind]
        told = tuple(0 if n == 1 else step for n, step in zip(of.shape, of.stride(), strict=True))
        strides = {f"{cell.kind}_strides": (*told[:3], 1)}
    inputs = {
        "alibi": ("slopes",), "documents": ("begins", "ends", cell.tokens), "prefix": ("lengths",),
        "t5": ("table", cell.heads, 32, 128),
    }  # fmt: skip
    further = tuple(made[i].data_ptr() if isinstance(i, str) else i for i in inputs.get(cell.kind, ()))
    name = f"fmha_with_{cell.function}_d{size}_fp16" if cell.function else f"fmha_biased_d{size}_fp16"
    yield "ours", Ours(library, cell, name, BiasedCall(*common, window_right=right, **laid, **strides), further)
    q, k, v = (made[name] for name in "QKV")
    base = 0 if cell.causal or cell.kind == "prefix" else -1
    yield "ours without", Ours(library, cell, f"fmha_fwd_d{size}_fp16", Call(*common, window_right=base, **laid))
    if cell.kind in ("bias", "mask"):
        yield "torch SDPA", lambda: scaled_dot_product_attention(q, k, v, attn_mask=made[cell.kind])
    if flex and cell.kind != "sinks":
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        seen = mask_of(cell)
        compiled = torch.compile(flex_attention, dynamic=False)
        full = cell.kind in ("documents", "prefix", "mask")
        blocks = None
        if seen is not None:
            sizes = (cell.batch if full else None, None, cell.tokens, cell.tokens)
            blocks = torch.compile(create_block_mask)(seen, *sizes, device="cuda")
        yield "FlexAttention", lambda: compiled(q, k, v, score_mod=score_of(cell), block_mask=blocks)


def run_cell(library: Library, cell: Cell, rounds: int, flush: Any, *, flex: bool) -> dict[str, Any]:
    prepare(cell)
    report: dict[str, Any] = {"cell": cell.name, "head_size": cell.size, "batch": cell.batch, "tokens": cell.tokens}
    running: dict[str, Callable[[], Any]] = {}
    for name, launch in contenders(library, cell, flex=flex):
        row = report[name] = {}
        try:
            if isinstance(launch, Ours):
                launch.out.fill_(float("nan"))
                row["variant"] = launch.variant
            out = launch()
            torch.cuda.synchronize()
            if name != "ours without":
                row["error"] = error_of(cell, out)
                assert row["error"] < TOLERANCE, f"error {row['error']:.2e}"
            running[name] = launch
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {error}"[:300]
    times: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(rounds):
        for name, launch in running.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.fill_(1)
            torch.cuda._sleep(400_000)
            begin.record()
            launch()
            end.record()
            torch.cuda.synchronize()
            times[name].append(1e3 * begin.elapsed_time(end))
    for name, taken in times.items():
        report[name]["us"] = round(statistics.median(taken), 1)
    cell.tensors.clear()
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library")
    parser.add_argument("--flex", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--limit", type=float, default=1e9)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    begun = time.time()
    torch._dynamo.config.recompile_limit = 256
    torch.zeros(1, device="cuda")
    library = Library(options.library)
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    driver = torch.cuda.get_device_properties(0)
    reports = []
    for cell in cells():
        if options.only and not any(word in cell.name for word in options.only):
            continue
        if time.time() - begun > options.limit:
            print("left out:", cell.name, cell.size)
            continue
        report = run_cell(library, cell, options.rounds, flush, flex=options.flex)
        reports.append(report)
        figures = {n: row.get("us", row.get("failed")) for n, row in report.items() if isinstance(row, dict)}
        print(cell.size, cell.name, figures, report["ours"].get("variant", "")[-60:], flush=True)
        if options.out:
            facts = {"device": driver.name, "torch": torch.__version__, "cuda": torch.version.cuda}
            options.out.write_text(json.dumps({**facts, "dtype": "fp16", "unit": "us", "cells": reports}, indent=1))


if __name__ == "__main__":
    main()
