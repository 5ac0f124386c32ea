"""On a GPU: three of transformers' models with attention patched, fp16, beside plain PyTorch and torch.compile.

    pyfmha build --arch sm_90 --dtype fp16 --head-size 64 128
    python examples/maintainers/torch_models.py -o examples/results/h200_models.json

Random weights, nothing is fetched. Every output is compared with the same model in float64 before anything is timed;
the contenders are then timed in turns. Also what the operator costs the host beside the library's own launch, and
PyTorch's tensors in the library's functions and in ``DirectSession``. Exit code 1 if something differs.
"""

import argparse
import copy
import importlib.metadata
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch_host

import pyfmha.torch
from pyfmha.attention.forward import strides
from pyfmha.torch import launch as launching
from pyfmha.trt import DirectSession
from pyfmha.trt.attention.problem import Features

Call = Callable[[], Any]
SAME = 1.5
"""How many times plain PyTorch's error ours may be."""


def vit() -> tuple[Any, dict[str, Any]]:
    import transformers

    config = transformers.ViTConfig(num_hidden_layers=4, image_size=448)
    return transformers.ViTModel(config), {"pixel_values": torch.randn(16, 3, 448, 448)}


def llama() -> tuple[Any, dict[str, Any]]:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=1000, hidden_size=2048, num_hidden_layers=4, num_attention_heads=16, num_key_value_heads=4,
        intermediate_size=5632, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaModel(config), {"input_ids": torch.randint(0, 1000, (2, 4096))}


def whisper_encoder() -> tuple[Any, dict[str, Any]]:
    import transformers
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = transformers.WhisperConfig(d_model=768, encoder_layers=4, encoder_attention_heads=12)
    return WhisperEncoder(config), {"input_features": torch.randn(8, config.num_mel_bins, 3000)}


MODELS = {
    "ViT, 785 tokens, batch 16": vit,
    "Llama (GQA), 4096 tokens, batch 2": llama,
    "Whisper's encoder": whisper_encoder,
}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description="transformers' models with attention patched, on a GPU")
    made.add_argument("-o", "--out", type=Path, help="JSON of the results")
    made.add_argument("--repeats", type=int, default=30, help="timed calls of each contender (default 30)")
    made.add_argument("--host", action="store_true", help="only what the host spends, and PyTorch's tensors in ours")
    made.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    return made


def times_in_turns(calls: dict[str, Call], repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds on the GPU, and of the host until the call returns: medians, the contenders in turns."""
    gpu: dict[str, list[float]] = {name: [] for name in calls}
    host: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            started = time.perf_counter()
            call()
            host[name].append(1e3 * (time.perf_counter() - started))
            end.record()
            torch.cuda.synchronize()
            gpu[name].append(begin.elapsed_time(end))
    return {name: {"ms": statistics.median(gpu[name]), "host_ms": statistics.median(host[name])} for name in calls}


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative, of the whole tensor."""
    return float((got.double() - exact).norm() / exact.norm())


def counted(run: Call) -> tuple[Any, int]:
    """A result, and how often the library was launched for it."""
    count, before = 0, launching._stream_of

    def counting(device: int) -> int:  # each launch asks once, those that are known again too
        nonlocal count
        count += 1
        return before(device)

    launching._stream_of = counting
    try:
        return run(), count
    finally:
        launching._stream_of = before


def measure_model(name: str, make: Callable[[], Any], options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    model, inputs = make()
    model = model.eval().half().cuda()
    half = {key: x.cuda().half() if x.is_floating_point() else x.cuda() for key, x in inputs.items()}
    exact_model = copy.deepcopy(model).double()
    double = {key: x.double() if x.is_floating_point() else x for key, x in half.items()}
    exact = exact_model(**double).last_hidden_state
    del exact_model

    def plain() -> torch.Tensor:
        return model(**half).last_hidden_state

    def ours() -> torch.Tensor:
        with pyfmha.torch.patched():
            return model(**half).last_hidden_state

    out, launches = counted(ours)
    errors = {"plain": error(plain(), exact), "ours": error(out, exact)}
    calls: dict[str, Call] = {"plain": plain, "ours": ours}
    if not options.no_compile:
        compiled = torch.compile(model)

        def by_compiler() -> torch.Tensor:
            return compiled(**half).last_hidden_state

        errors["torch.compile"] = error(by_compiler(), exact)
        calls["torch.compile"] = by_compiler
        torch._dynamo.reset()
        with pyfmha.torch.patched():
            both = torch.compile(copy.deepcopy(model))

            def by_both() -> torch.Tensor:
                with pyfmha.torch.patched():
                    return both(**half).last_hidden_state

            errors["ours, torch.compile"] = error(by_both(), exact)
        calls["ours, torch.compile"] = by_both
    for call in calls.values():
        for _ in range(3):
            call()
    times = times_in_turns(calls, options.repeats)
    same = launches > 0 and errors["ours"] <= SAME * errors["plain"]
    return {"model": name, "launches": launches, "errors": errors, "times": times, "same": same}


def check_tensors() -> dict[str, bool]:
    """PyTorch's tensors in the library's functions and in a session, and the operator in a CUDA graph."""
    q, k, v = (torch.randn(2, 8, 333, 64, device="cuda", dtype=torch.float16) for _ in range(3))
    wanted, _ = torch.ops.pyfmha.attention(q, k, v, 0.125)
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=0.125)
    found = {"operator": error(wanted, exact) < 1e-3}
    out = torch.empty_like(q)
    with DirectSession(num_heads=8, head_size=64, causal=False, features=Features(8)) as session:
        session.run({"Q": q, "K": k, "V": v}, {"Out": out})
        found["DirectSession"] = bool(torch.equal(out, wanted))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        late, result = q.clone(), torch.full_like(q, torch.nan)
        # On another stream than the current one: a launch that does not wait reads garbage, or is overwritten.
        function = launching.library()["fmha_fwd_d64_fp16"]
        function(torch.cuda.default_stream().cuda_stream, *_arguments(result, late, k, v))
    torch.cuda.synchronize()
    found["Function"] = error(result, exact) < 1e-3
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, _ = torch.ops.pyfmha.attention(q, k, v, 0.125)
    captured.zero_()
    graph.replay()
    found["CUDA graph"] = bool(torch.equal(captured, wanted))
    packed = torch.randn(2, 333, 3, 8, 64, device="cuda", dtype=torch.float16)
    views = [x.transpose(1, 2) for x in packed.unbind(2)]
    got, _ = torch.ops.pyfmha.attention(*views, 0.125)
    exact = torch.nn.functional.scaled_dot_product_attention(*(x.double() for x in views), scale=0.125)
    found["one projection's views"] = error(got, exact) < 1e-3
    return found


def _arguments(out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[Any]:
    laid = strides("bhsd", *q.shape)
    numbers = [q.shape[0], q.shape[1], q.shape[1], q.shape[2], q.shape[2], q.shape[3]]
    return [out, 0, q, k, v, 0, 0, 0, 0, 0.125, 0.0, *numbers, *laid * 4, -1, -1, 0, 0]


def main() -> int:
    options = parser().parse_args()
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers") if not options.host else "not used",
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "library": sorted(function.name for function in launching.library().manifest.functions),
    }
    with torch.inference_mode():
        report["tensors"] = check_tensors()
        print("tensors", report["tensors"], flush=True)
        report["host_us"] = torch_host.measure()
        report["models"] = []
        if options.out:
            options.out.write_text(json.dumps(report, indent=1) + "\n")
        for name, make in () if options.host else MODELS.items():
            row = measure_model(name, make, options)
            report["models"].append(row)
            print(f"{name}: {row['launches']} launches, {'same' if row['same'] else 'DIFFERS'}", flush=True)
            for contender, taken in row["times"].items():
                print(
                    f"  {contender:22} {taken['ms']:8.3f} ms, host {taken['host_ms']:7.3f} ms,"
                    f" error {row['errors'][contender]:.2e}",
                    flush=True,
                )
            if options.out:
                options.out.write_text(json.dumps(report, indent=1) + "\n")
    host = [row["error"] < torch_host.SAME for row in report["host_us"].values() if "error" in row]
    right = all((*report["tensors"].values(), *host, *(row["same"] for row in report["models"])))
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
