"""What a call of ``pyfmha.torch`` costs the host beside the library's own launch, for ``torch_models.py --host``.

A host has slow phases of some 50 ms, in which the library's own launch takes 1.4 times as long, too. So all rows take
turns in rounds of short blocks that begin with an idle GPU, each beside its **own launch**: the prepared launch of the
same function, features and addresses, called with lists that lie ready.
"""

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import pyfmha.torch
from pyfmha.torch import functional, operator
from pyfmha.torch import launch as launching

Call = Callable[[], Any]
MOST = 6.0
"""Microseconds that a call may cost the host above the library's own launch."""
SAME = 4e-3
"""The largest error of fp16 from float32 on the CPU, of values around 1."""
SIZE, SCALE, DEVICE = 64, 0.125, "cuda"
_NOTHING = torch.library.Library("pyfmha_host_times", "DEF")


def tensors() -> dict[str, torch.Tensor]:
    """Of one small call, on the GPU."""
    made = {name: torch.randn(1, 8, 64, SIZE, device=DEVICE).half() for name in ("q", "k", "v")}
    flat = {f"flat_{name}": x.transpose(1, 2).reshape(64, 8, SIZE).contiguous() for name, x in made.items()}
    integers = {"whole": [64], "part": [50], "starts": [0, 64]}
    lengths = {name: torch.tensor(x, device=DEVICE, dtype=torch.int32) for name, x in integers.items()}
    beside = {"mask": torch.rand(64, 64, device=DEVICE) < 0.7, "bias": torch.randn(1, 8, 64, 64, device=DEVICE).half()}
    return {**made, **flat, **lengths, **beside}


def calls_of(given: dict[str, torch.Tensor]) -> dict[str, Call]:
    """The rows: tensors in, tensors out, on whichever device the tensors are."""
    q, k, v, mask, bias = (given[name] for name in ("q", "k", "v", "mask", "bias"))
    flat = [given[f"flat_{name}"] for name in "qkv"]
    whole, part, starts = given["whole"], given["part"], given["starts"]
    few, full, s = operator.plain_op, operator.attention_op, SCALE
    attention, ours = pyfmha.torch.attention, pyfmha.torch.scaled_dot_product_attention
    beside: dict[str, Call] = {
        "operator .full, mask": lambda: full(q, k, v, s, mask=mask),
        "operator .full, bias": lambda: full(q, k, v, s, bias=bias),
        "attention, mask": lambda: attention(q, k, v, mask=mask),
        "attention, bias": lambda: attention(q, k, v, bias=bias),
        "drop-in, attn_mask of bool": lambda: ours(q, k, v, attn_mask=mask),
        "drop-in, attn_mask of fp16": lambda: ours(q, k, v, attn_mask=bias),
    }
    return {
        "operator by name": lambda: torch.ops.pyfmha.attention(q, k, v, s),
        "operator by name, causal": lambda: torch.ops.pyfmha.attention(q, k, v, s, causal=True),
        "operator .default": lambda: few(q, k, v, s),
        "operator .default, causal": lambda: few(q, k, v, s, causal=True),
        "operator .full, window": lambda: full(q, k, v, s, window_left=32),
        "operator .full, lengths": lambda: full(q, k, v, s, kv_lengths=part),
        "operator .full, two lengths": lambda: full(q, k, v, s, q_lengths=whole, kv_lengths=part),
        "operator .full, cu_seqlens": lambda: full(*flat, s, layout="bshd", cu_seqlens_q=starts, cu_seqlens_kv=starts),
        "operator .full, log-sum-exp": lambda: full(q, k, v, s, return_lse=True),
        "attention": lambda: attention(q, k, v),
        "attention, causal": lambda: attention(q, k, v, causal=True),
        "attention, window": lambda: attention(q, k, v, window=(32, -1)),
        "attention, lengths": lambda: attention(q, k, v, kv_lengths=part),
        "attention, two lengths": lambda: attention(q, k, v, q_lengths=whole, kv_lengths=part),
        "attention, cu_seqlens": lambda: attention(*flat, cu_seqlens_q=starts, cu_seqlens_kv=starts),
        "attention, log-sum-exp": lambda: attention(q, k, v, return_lse=True),
        "drop-in": lambda: ours(q, k, v),
        "drop-in, causal": lambda: ours(q, k, v, is_causal=True),
    } | (beside if launching.lacking("fp16", 64) is None else {})


def _error(got: Any, wanted: Any) -> float:
    """The largest of a row's tensors."""
    pairs = zip(got, wanted, strict=True) if isinstance(got, tuple) else [(got, wanted)]
    return float(torch.cat([(x.cpu().float() - y).abs().flatten() for x, y in pairs]).max())


def own_launch(call: Call) -> Call:
    """The library's launch in a call, with what it was called with; the tensors live as long."""
    prepare, launched = operator.prepare, []

    def prepared(*arguments: Any, **keywords: Any) -> Any:
        ready = prepare(*arguments, **keywords)

        def enqueue(*given: Any) -> None:
            launched[:] = [(ready.enqueue, given)]
            ready.enqueue(*given)

        return ready._replace(enqueue=enqueue)

    _forget()
    operator.prepare = prepared
    try:
        results = call()
    finally:
        operator.prepare = prepare
        _forget()
    [(enqueue, (*_, inputs, outputs, workspace, stream))] = launched

    def launch() -> None:
        enqueue((), (), inputs, outputs, workspace, stream)

    launch.results = results  # type: ignore[attr-defined]  # they are written to
    return launch


def _forget() -> None:
    """Nothing is known or prepared."""
    operator._ready.clear()
    for recent in (operator._recent, functional._recent, functional._recent_drop_in):
        recent.clear()


def beside_nothing(given: dict[str, torch.Tensor]) -> dict[str, Call]:
    """What is told beside: PyTorch's function, and what its dispatcher takes for operators that do nothing."""
    q, k, v = given["q"], given["k"], given["v"]
    native = torch.nn.functional.scaled_dot_product_attention
    result = torch.empty(0, device=DEVICE), torch.empty(0, device=DEVICE)
    for name, schema in (("few", operator.SCHEMA), ("all", operator.FULL_SCHEMA)):
        _NOTHING.define(name + schema)
        _NOTHING.impl(name, lambda *arguments: result, DEVICE.upper())
    few, every = torch.ops.pyfmha_host_times.few.default, torch.ops.pyfmha_host_times.all.default
    return {
        "PyTorch's scaled_dot_product_attention": lambda: native(q, k, v),
        "an operator of few arguments that does nothing": lambda: few(q, k, v, SCALE),
        "an operator of all arguments that does nothing": lambda: every(q, k, v, SCALE),
    }


def in_rounds(pairs: dict[str, tuple[Call, Call]], rounds: int, count: int = 20) -> dict[str, dict[str, float]]:
    """Microseconds of a call, of each row: the best blocks, and the medians of blocks and of differences in a round."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in pairs}
    for both in pairs.values():
        for call in both:
            _block(call, 200)
    gc.collect()
    gc.disable()
    for number in range(rounds):
        for name, (row, own) in list(pairs.items())[:: 1 if number % 2 else -1]:
            if number % 4 < 2:
                taken[name].append((_block(row, count), _block(own, count)))
            else:
                taken[name].append((_block(own, count), _block(row, count))[::-1])
    gc.enable()
    found = {}
    for name, blocks in taken.items():
        rows, owns = zip(*blocks, strict=True)
        found[name] = {
            "us": min(rows), "median_us": statistics.median(rows),
            "own_us": min(owns), "own_median_us": statistics.median(owns),
            "above_us": min(rows) - min(owns),
            "median_above_us": statistics.median(row - own for row, own in blocks),
        }  # fmt: skip
    return found


def _block(call: Call, count: int) -> float:
    """Microseconds of one of some calls, behind an idle GPU and one call more."""
    torch.cuda.synchronize()
    call()
    started = time.perf_counter_ns()
    for _ in range(count):
        call()
    return (time.perf_counter_ns() - started) / count / 1e3


def measure(rounds: int = 200) -> dict[str, dict[str, float]]:
    """All rows, printed, each compared with the CPU's before it is timed.

    Returns:
        By row ``us``, ``median_us``, ``own_us``, ``own_median_us``, ``above_us``, ``median_above_us`` and ``error``;
        of rows that launch nothing of ours the first two.
    """
    given = tensors()
    calls = calls_of(given)
    on_cpu = calls_of({name: x.cpu().float() if x.is_floating_point() else x.cpu() for name, x in given.items()})
    errors = {name: _error(call(), on_cpu[name]()) for name, call in calls.items()}
    pairs = {name: (call, own_launch(call)) for name, call in calls.items()}
    beside = beside_nothing(given)
    nothing: Call = lambda: None  # noqa: E731
    found = in_rounds(pairs | {name: (call, nothing) for name, call in beside.items()}, rounds)
    print(f"{'us a call of the host: best / median':48} {'the row':>15} {'own launch':>15} {'above':>15}  error")
    for name, row in found.items():
        if name in beside:
            found[name] = {key: row[key] for key in ("us", "median_us")}
            print(f"{name:48} {row['us']:7.2f} {row['median_us']:7.2f}")
            continue
        row["error"] = errors[name]
        columns = "us", "median_us", "own_us", "own_median_us", "above_us", "median_above_us"
        shown = " ".join(f"{row[column]:7.2f}" for column in columns)
        print(f"{name:48} {shown}  {row['error']:.1e}{'' if row['error'] < SAME else ' WRONG'}")
    best, median = (sum(found[name][key] > MOST for name in calls) for key in ("above_us", "median_above_us"))
    print(f"{best} of {len(calls)} rows more than {MOST:g} us above their own launch at best, {median} by the median")
    return found
