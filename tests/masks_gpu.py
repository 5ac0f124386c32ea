"""Checks and times biases, masks and functions on a GPU: our variants beside each other and beside PyTorch's, in turns.

    python tests/masks_gpu.py build FOLDER [--dtype fp16 bf16]       # anywhere, no GPU: two libraries
    python tests/masks_gpu.py run FOLDER [--dtype fp16 bf16] [--flex] [--rounds 9] [--limit SECONDS] [--only WORD ...]
        [--out FILE]

The libraries: "portable" without variants for Hopper, "hopper" with those that `--kernels biased` builds. Every output
is checked against float64 first. `run` needs PyTorch. Cold L2 cache, the host's launch behind a spin of the GPU, random
data; medians, in us. The file is written after each cell, and the marks that are wanted are printed last; that of
FlashAttention-4 was measured in another run.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

try:
    import torch
    from torch.nn.functional import scaled_dot_product_attention
except ImportError:  # `build` does without
    torch = None  # type: ignore[assignment]

from pyfmha.aot.build import build
from pyfmha.aot.cubin import Compiler
from pyfmha.attention import biased_decode
from pyfmha.attention.biased import POINTERS, Biased, BiasedCall
from pyfmha.attention.biased_decode import BiasedDecode, biased_decoding_for
from pyfmha.attention.forward import Call, Forward
from pyfmha.functions.family import declared_in, file_of, function_specs
from pyfmha.runtime.library import Library
from pyfmha.spec.arch import parse_archs
from pyfmha.spec.kernel import KernelSpec

ROWS = 192
TOLERANCE = {"fp16": 2e-3, "bf16": 1.5e-2}
DOCUMENT, PREFIX, WIDTH, CAP = 700, 1000, 256, 50.0
KINDS = ("portable", "hopper")
"""The libraries."""
TYPES = {"fp16": "float16", "bf16": "bfloat16"}
MARKS = {
    "bias [1,H,S,S]": ("without", 1.4),
    "bias [1,1,S,S]": ("without", 1.2),
    "bias [B,1,1,S]": ("without", 1.1),
    "mask [B,1,S,S]": ("without", 1.3),
    "ALiBi, causal": ("FlashAttention-4", 0.95),
    "soft cap by function, causal": ("built in", 1.1),
    "causal by function": ("without", 1.05),
    "T5": ("without", 1.5),
    "window of 256 by function": ("FlexAttention", 0.85),
    "documents, causal": ("FlexAttention", 0.85),
    "prefix of 1000, causal": ("FlexAttention", 0.85),
    "sinks, causal": ("without", 1.03),
    **{f"V 128, Q 192, {n}{causal}": ("FlashAttention-3", 1.05) for n in (2048, 8192) for causal in ("", ", causal")},
}
"""By cell what ours is held against, and how many times as long it may take."""
FLASH4 = {64: 230.0, 128: 296.0}
"""us of FlashAttention-4 4.0.0b36 on an H200, fp16, for ALiBi."""
OWN = Path(__file__).parent / "functions" / "functions_of_tests.py"
FUNCTIONS = ("alibi", "documents", "prefix", "t5", str(OWN))


@dataclass
class Cell:
    """One problem. shape: of the bias or mask; function: of ours, by its name; v_size: of V, if it is another."""

    name: str
    kind: str
    size: int
    dtype: str
    batch: int = 4
    tokens: int = 2048
    heads: int = 32
    shape: tuple[int, ...] = ()
    function: str = ""
    causal: bool = False
    v_size: int = 0
    queries: int = 0
    tensors: dict[str, Any] = field(default_factory=dict)


def libraries(dtypes: list[str]) -> Iterator[tuple[str, list[KernelSpec]]]:
    """What to compile for each."""
    with Compiler(1) as compiler:
        functions = [one for name in FUNCTIONS for one in declared_in(file_of(name), compiler.collect)]
    for kind in KINDS:
        specs: list[KernelSpec] = []
        for dtype in dtypes:
            for size in (64, 128, 256):
                specs += Biased(dtype, size).specs()
                if kind == "portable":
                    specs += BiasedDecode(dtype, size).specs()
            for size in (64, 128) if kind == "hopper" else ():
                specs += Forward(dtype, size).specs(hopper=True)
        specs += function_specs(functions, dtypes, (64, 128))
        yield kind, [spec for spec in specs if kind != "portable" or not spec.archs]


def cells(dtypes: list[str]) -> Iterator[Cell]:
    for dtype in dtypes:
        for size in (64, 128):
            s = 2048
            yield Cell("bias [1,H,S,S]", "bias", size, dtype, shape=(1, 32, s, s))
            yield Cell("bias [1,1,S,S]", "bias", size, dtype, shape=(1, 1, s, s))
            yield Cell("bias [B,1,1,S]", "bias", size, dtype, shape=(4, 1, 1, s))
            yield Cell("bias [1,H,S,S], causal", "bias", size, dtype, shape=(1, 32, s, s), causal=True)
            yield Cell("mask [B,1,S,S]", "mask", size, dtype, shape=(4, 1, s, s))
            yield Cell("mask [B,1,1,S]", "mask", size, dtype, shape=(4, 1, 1, s))
            yield Cell("sinks, causal", "sinks", size, dtype, causal=True)
            yield Cell("sinks, full", "sinks", size, dtype)
            yield Cell("sinks, causal, 8192", "sinks", size, dtype, 1, 8192, causal=True)
            yield Cell("ALiBi, causal", "alibi", size, dtype, function="alibi", causal=True)
            yield Cell("soft cap by function, causal", "soft", size, dtype, function="soft_cap", causal=True)
            yield Cell("causal by function", "causal", size, dtype, function="causal")
            yield Cell("T5", "t5", size, dtype, function="t5")
            yield Cell("window of 256 by function", "near", size, dtype, 1, 8192, function="near")
            yield Cell("documents, causal", "documents", size, dtype, 1, 8192, function="documents", causal=True)
            yield Cell("prefix of 1000, causal", "prefix", size, dtype, 1, 8192, function="prefix")
            for kind, shape in (("sinks", ()), ("bias", (16, 1, 1, 4096)), ("mask", (16, 1, 1, 4096))):
                yield Cell(f"decoding, {kind}", kind, size, dtype, 16, 4096, shape=shape, queries=1)
        for causal in (False, True):
            for batch, tokens in ((4, 2048), (1, 8192)):
                name = f"V 128, Q 192, {tokens}" + ", causal" * causal
                yield Cell(name, "values", 192, dtype, batch, tokens, causal=causal, v_size=128)


def prepare(cell: Cell) -> None:
    """Q, K, V and what belongs to the cell."""
    torch.manual_seed(1)
    b, h, s, d = cell.batch, cell.heads, cell.tokens, cell.size
    made, dtype = cell.tensors, getattr(torch, TYPES[cell.dtype])
    for name, rows, size in (("Q", cell.queries or s, d), ("K", s, d), ("V", s, cell.v_size or d)):
        made[name] = torch.randn(b, h, rows, size, device="cuda", dtype=dtype)
    if cell.kind == "bias":
        made["bias"] = torch.randn(cell.shape, device="cuda", dtype=dtype)
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
    elif cell.kind == "soft":
        made["caps"] = torch.full((h,), CAP, device="cuda")
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
    if cell.kind == "soft":
        return lambda score, b, h, q, k: CAP * torch.tanh(score / CAP)
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
    if cell.kind == "near":
        return lambda b, h, q, k: (q - k < WIDTH) & (k <= q)
    return (lambda b, h, q, k: k <= q) if cell.causal or cell.kind == "causal" else None


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
        rows = torch.randperm(cell.queries or cell.tokens, device="cuda")[:ROWS]
        wanted = exact(cell, b, h, rows)
        got = out[b, h, rows].double()
        worst = max(worst, float((got - wanted).norm() / wanted.norm()) if torch.isfinite(got).all() else 1e9)
    return worst


class Ours:
    """A function of the library on a cell, or the two of decoding."""

    def __init__(
        self, library: Library, cell: Cell, names: list[str], scalars: Any, further: tuple[Any, ...] = ()
    ) -> None:
        self.functions = [library[name] for name in names]
        for function in self.functions:
            function.load()
        made = cell.tensors
        self.out = torch.empty(*made["Q"].shape[:3], made["V"].shape[3], device="cuda", dtype=made["Q"].dtype)
        given = {"Out": self.out, **{name: made[name] for name in "QKV"}}
        pointers = POINTERS if "fwd" not in names[0] else POINTERS[:9]
        if cell.kind in ("bias", "mask", "sinks") and "fwd" not in names[0]:
            given[{"bias": "Bias", "mask": "Mask", "sinks": "SinksFp32"}[cell.kind]] = made[cell.kind]
        if len(names) == 2:
            pointers = biased_decode.POINTERS
            given |= {name: made[name] for name in ("Partial", "Statistics")}
        self.arguments = (*(given[name].data_ptr() if name in given else 0 for name in pointers), *scalars, *further)
        self.stream = torch.cuda.current_stream().cuda_stream
        self.variant = ", ".join(function.variant(*self.arguments) for function in self.functions)

    def __call__(self) -> Any:
        for function in self.functions:
            function(self.stream, *self.arguments)
        return self.out


def told(cell: Cell) -> dict[str, Any]:
    """Strides of a bias or mask, 0 for an axis that is broadcast, and how many queries and keys it has."""
    if cell.kind not in ("bias", "mask"):
        return {}
    of = cell.tensors[cell.kind]
    strides = tuple(0 if n == 1 else step for n, step in zip(of.shape, of.stride(), strict=True))
    return {f"{cell.kind}_strides": (*strides[:3], 1), f"{cell.kind}_counts": tuple(of.shape[2:])}


def ours(held: dict[str, Library], cell: Cell) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Each of the libraries, and what is without bias, mask and function."""
    made, size, v_size = cell.tensors, cell.size, cell.v_size or cell.size
    rows, keys = cell.queries or cell.tokens, cell.tokens
    common = (cell.batch, cell.heads, cell.heads, rows, keys, size, size**-0.5)
    laid = {
        f"{name}_strides": (cell.heads * seq * n, seq * n, n)
        for name, seq, n in (("q", rows, size), ("k", keys, size), ("v", keys, v_size), ("out", rows, v_size))
    }
    right = 0 if cell.causal else -1
    call = BiasedCall(*common, window_right=right, v_head_size=v_size, **laid, **told(cell))
    inputs: dict[str, tuple[Any, ...]] = {
        "alibi": ("slopes",), "documents": ("begins", "ends", cell.tokens), "prefix": ("lengths",), "near": (WIDTH,),
        "t5": ("table", cell.heads, 32, 128), "soft_cap": ("caps",),
    }  # fmt: skip
    further = tuple(made[i].data_ptr() if isinstance(i, str) else i for i in inputs.get(cell.function, ()))
    padded = Biased(cell.dtype, max(size, v_size)).padded
    name = f"fmha_with_{cell.function}_d{padded}_{cell.dtype}" if cell.function else Biased(cell.dtype, padded).name
    for kind, library in held.items():
        yield kind, Ours(library, cell, [name], call.scalars(), further)
    if decoding := biased_decoding_for(call):
        pair = BiasedDecode(cell.dtype, padded)
        for part in ("partial", "statistics"):
            size_of = getattr(decoding, f"{part}_bytes") // 4
            made[part.capitalize()] = torch.empty(size_of, device="cuda", dtype=torch.float32)
        names = [pair.split_name, pair.combine_name]
        yield "split", Ours(held["portable"], cell, names, decoding.scalars())
    if v_size == size:
        base = 0 if cell.causal or cell.kind in ("prefix", "near", "causal") else -1
        plain = Call(*common, window_right=base, **laid)
        yield "without", Ours(held["hopper"], cell, [Forward(cell.dtype, size).name], plain.scalars())
    if cell.kind == "soft":
        capped = Call(*common, window_right=right, softcap=CAP, **laid)
        yield "built in", Ours(held["hopper"], cell, [Forward(cell.dtype, size).name], capped.scalars())


def contenders(held: dict[str, Library], cell: Cell, *, flex: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    yield from ours(held, cell)
    made = cell.tensors
    q, k, v = (made[name] for name in "QKV")
    if cell.kind in ("bias", "mask", "values"):
        mask = made.get(cell.kind)
        if not (cell.causal and mask is not None):
            yield "torch SDPA", lambda: scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=cell.causal)
    if cell.kind == "values":
        yield from flash3(cell)
    if flex and cell.kind != "sinks":
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        seen = mask_of(cell)
        compiled = torch.compile(flex_attention, dynamic=False)
        full = cell.kind in ("documents", "prefix", "mask")
        blocks = None
        if seen is not None:
            sizes = (cell.batch if full else None, None, cell.queries or cell.tokens, cell.tokens)
            blocks = torch.compile(create_block_mask)(seen, *sizes, device="cuda")
        yield "FlexAttention", lambda: compiled(q, k, v, score_mod=score_of(cell), block_mask=blocks)


def flash3(cell: Cell) -> Iterator[tuple[str, Callable[[], Any]]]:
    """FlashAttention-3 in its own layout, [batch, seq, heads, head size], where it is installed."""
    try:
        from fa3_fwd_interface import flash_attn_func
    except ImportError:
        return
    q, k, v = (cell.tensors[name].transpose(1, 2).contiguous() for name in "QKV")

    def launch() -> Any:
        out = flash_attn_func(q, k, v, causal=cell.causal)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    yield "FlashAttention-3", launch


def run_cell(held: dict[str, Library], cell: Cell, rounds: int, flush: Any, *, flex: bool) -> dict[str, Any]:
    prepare(cell)
    report: dict[str, Any] = {
        "cell": cell.name, "dtype": cell.dtype, "head_size": cell.size, "batch": cell.batch, "tokens": cell.tokens,
    }  # fmt: skip
    running: dict[str, Callable[[], Any]] = {}
    for name, launch in contenders(held, cell, flex=flex):
        row = report[name] = {}
        try:
            if isinstance(launch, Ours):
                launch.out.fill_(float("nan"))
                row["variant"] = launch.variant
            out = launch()
            torch.cuda.synchronize()
            if name != "without":
                row["error"] = error_of(cell, out)
                assert row["error"] < TOLERANCE[cell.dtype], f"error {row['error']:.2e}"
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


def against_marks(reports: list[dict[str, Any]]) -> Iterator[str]:
    """A line for each cell that has a mark."""
    yield f"{'cell':32} {'dtype':5} size {'ours':>8}  {'mark':>8} {'ratio':>6} wanted"
    for report in reports:
        name, most = MARKS.get(report["cell"], ("", 0.0))
        if not name:
            continue
        ours, mark = report["hopper"].get("us"), report.get(name, {}).get("us")
        if name == "FlashAttention-4":
            mark = FLASH4[report["head_size"]] if report["dtype"] == "fp16" else None
        said = f"{'-':>8} {'-':>6} {most:.2f} of {name}: not run"
        if ours and mark:
            said = f"{mark:8.1f} {ours / mark:6.3f} {most:.2f} of {name}: {'met' if ours <= most * mark else 'MISSED'}"
        yield f"{report['cell']:32} {report['dtype']:5} {report['head_size']:4} {ours or float('nan'):8.1f}  {said}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("build", "run"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", nargs="*", choices=TYPES, default=list(TYPES))
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--flex", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--limit", type=float, default=1e9)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.what == "build":
        for kind, specs in libraries(options.dtype):
            print(build(specs, parse_archs(["sm_90"]), options.folder / kind, jobs=options.jobs).library, flush=True)
    else:
        measure(options)


def measure(options: argparse.Namespace) -> None:
    begun = time.time()
    torch._dynamo.config.recompile_limit = 256
    torch.zeros(1, device="cuda")
    held = {kind: Library(options.folder / kind / "libpyfmha.so") for kind in KINDS}
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    facts = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "unit": "us",
    }
    reports = []
    for cell in cells(options.dtype):
        if options.only and not any(word in cell.name for word in options.only):
            continue
        if time.time() - begun > options.limit:
            print("left out:", cell.dtype, cell.size, cell.name)
            continue
        report = run_cell(held, cell, options.rounds, flush, flex=options.flex)
        reports.append(report)
        figures = {n: row.get("us", row.get("failed")) for n, row in report.items() if isinstance(row, dict)}
        print(cell.dtype, cell.size, cell.name, figures, report["hopper"].get("variant", "")[-40:], flush=True)
        if options.out:
            options.out.write_text(json.dumps({**facts, "cells": reports}, indent=1))
    print("\n".join(against_marks(reports)))


if __name__ == "__main__":
    main()
