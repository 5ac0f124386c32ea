"""Check every variant of a built library against float64 on this GPU, and time it beside PyTorch's attention.

    python examples/maintainers/measure.py --library aot_out/libpyfmha.so --out examples/results/NAME.json
    compute-sanitizer --tool memcheck python examples/maintainers/measure.py --part sanitize

The checks need numpy and cuda-python; the timings need PyTorch as well, and Triton for its timer. Times are medians
with a cold L2 cache, ours and the baselines in one run on the same data, after a check of the very output timed.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pyfmha.attention.first import Attention, family
from pyfmha.attention.reference import attention_float64, relative_error
from pyfmha.attention.run import attention_on_gpu, random_inputs, to_float, to_storage
from pyfmha.cli.demo import error_limit
from pyfmha.runtime.device import Device, DeviceArray, Stream, device_arrays
from pyfmha.runtime.library import Function, Library

SEQS = (1, 17, 127, 128, 129, 512, 2048)
GUARD = 4096
"""Bytes before and after each output that must not change; a multiple of any alignment."""
PATTERN = 0xA5
WORKLOADS = [(8, 32, 512, 64), (4, 32, 2048, 64), (8, 32, 512, 128), (4, 32, 2048, 128)]


def members_of(library: Library) -> Iterator[tuple[Attention, Function]]:
    """The members of the family that a library holds."""
    for member in family():
        if member.name in library:
            yield member, library[member.name]


class Guarded:
    """An output between two guards, ``shift`` bytes past a 16-byte boundary."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, shift: int) -> None:
        self.shape, self.dtype = shape, np.dtype(dtype)
        self.nbytes = int(np.prod(shape)) * self.dtype.itemsize
        self.array = DeviceArray((2 * GUARD + self.nbytes + shift,), np.uint8)
        self.array.fill(PATTERN)
        self.begin = GUARD + shift

    @property
    def pointer(self) -> int:
        return self.array.pointer + self.begin

    def read(self) -> tuple[np.ndarray[Any, Any], bool]:
        """The output, and whether the guards are as they were."""
        raw = self.array.to_host()
        end = self.begin + self.nbytes
        intact = bool((raw[: self.begin] == PATTERN).all() and (raw[end:] == PATTERN).all())
        return raw[self.begin : end].copy().view(self.dtype).reshape(self.shape), intact


def check(function: Function, member: Attention, seq: int, aligned: bool, seed: int) -> dict[str, Any]:
    """Run one variant once on random data between guards, and compare Out, L and M with float64."""
    batch, heads = (2, 3) if seq < 2048 else (1, 2)
    q, k, v = random_inputs(member.dtype, (batch, heads, seq, member.head_size), seed)
    shift = 0 if aligned else q.itemsize
    rows = (batch * heads, seq)
    outputs = [
        Guarded(q.shape, q.dtype, shift),
        Guarded(rows, np.float32, 0 if aligned else 4),
        Guarded(rows, np.float32, 0 if aligned else 4),
    ]
    inputs = [DeviceArray((x.nbytes + shift,), np.uint8) for x in (q, k, v)]
    for array, x in zip(inputs, (q, k, v), strict=True):
        array.write(x, shift)
    sm_scale = member.head_size**-0.5
    pointers = [*(output.pointer for output in outputs), *(array.pointer + shift for array in inputs)]
    with device_arrays(*inputs, *(output.array for output in outputs)):
        stream = Stream()
        arguments = (*pointers, sm_scale, batch, heads, seq)
        variant = function.variant(*arguments)
        function(stream.handle, *arguments)
        stream.synchronize()
        stream.close()
        (out, safe_out), (row_sum, safe_l), (row_max, safe_m) = (output.read() for output in outputs)
    exact = attention_float64(*(to_float(x, member.dtype) for x in (q, k, v)), scale=sm_scale, causal=member.causal)
    error = relative_error(to_float(out, member.dtype), exact.out)
    statistics = max(
        relative_error(row_sum, exact.row_sum.reshape(rows)), relative_error(row_max, exact.row_max.reshape(rows))
    )
    wanted = "hinted" if aligned else "generic"
    passed = (
        error <= error_limit(member)
        and statistics <= max(error_limit(member), 1e-5)
        and safe_out
        and safe_l
        and safe_m
        and f"_{wanted}_" in variant
    )
    return {
        "variant": variant, "seq": seq, "error": error, "error_l_m": statistics, "limit": error_limit(member),
        "guards_intact": safe_out and safe_l and safe_m, "passed": bool(passed),
    }  # fmt: skip


def check_extremes(function: Function, member: Attention, device: Device) -> dict[str, Any]:
    """The largest finite values with random signs must not give NaN."""
    largest = {"fp16": 65504.0, "bf16": 3.3895313892515355e38, "fp32": 3.4028234663852886e38}[member.dtype]
    generator = np.random.default_rng(0)
    shape = (1, 2, 129, member.head_size)
    q, k, v = (
        to_storage(np.where(generator.random(shape) < 0.5, -largest, largest).astype(np.float32), member.dtype)
        for _ in range(3)
    )
    result = attention_on_gpu(function, member, device, q, k, v, member.head_size**-0.5)
    nan = int(np.isnan(to_float(result.out, member.dtype)).sum())
    return {"variant": result.variant, "extremes_nan": nan, "passed": nan == 0}


def check_huge(library: Library) -> dict[str, Any]:
    """More than 2**31 elements and more than 65535 heads: the last head must be right."""
    member = Attention("fp16", 64)
    batch, heads, seq = 2, 32800, 512
    count = batch * heads * seq * 64
    arrays = [DeviceArray((count,), np.uint16) for _ in range(4)] + [
        DeviceArray((batch * heads * seq,), np.float32) for _ in range(2)
    ]
    with device_arrays(*arrays) as (out, q, k, v, row_sum, row_max):
        for array in (q, k, v):
            array.fill(0)
        last = random_inputs("fp16", (1, 1, seq, 64), 7)
        offset = 2 * (count - seq * 64)
        for array, x in zip((q, k, v), last, strict=True):
            array.write(x, offset)
        out.fill(0xFF)
        stream = Stream()
        function = library[member.name]
        function(
            stream.handle,
            out.pointer,
            row_sum.pointer,
            row_max.pointer,
            q.pointer,
            k.pointer,
            v.pointer,
            0.125,
            batch,
            heads,
            seq,
        )
        stream.synchronize()
        got = out.read(offset, (1, 1, seq, 64), np.float16)
        first = out.read(0, (seq, 64), np.float16)
    error = relative_error(got, attention_float64(*last, scale=0.125, causal=True).out)
    return {
        "elements": count,
        "heads": batch * heads,
        "error_last_head": error,
        "passed": error <= 5e-4 and not first.any(),
    }


def host_time(library: Library) -> dict[str, float]:
    """Microseconds of host time of one call, for a problem so small that the GPU keeps up; median of ten rounds."""
    function = library["fmha_d64_fp16"]
    arrays = [DeviceArray((1, 1, 1, 64), np.float16) for _ in range(4)] + [
        DeviceArray((1, 1), np.float32) for _ in range(2)
    ]
    out, q, k, v, row_sum, row_max = arrays
    stream = Stream()
    arguments = (
        stream.handle,
        out.pointer,
        row_sum.pointer,
        row_max.pointer,
        q.pointer,
        k.pointer,
        v.pointer,
        0.125,
        1,
        1,
        1,
    )
    rounds = []
    for _ in range(11):
        begin = time.perf_counter_ns()
        for _ in range(500):
            function(*arguments)
        rounds.append((time.perf_counter_ns() - begin) / 500e3)
        stream.synchronize()
    for array in arrays:
        array.free()
    return {"us_per_call": float(np.median(rounds[1:]))}


def time_workloads(library: Library) -> list[dict[str, Any]]:
    """Ours beside torch's backends: microseconds, median, cold L2, three input sets."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from triton.testing import do_bench

    rows = []
    for dtype, torch_dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
        backends = ["EFFICIENT_ATTENTION"] if dtype == "fp32" else ["FLASH_ATTENTION", "CUDNN_ATTENTION"]
        for batch, heads, seq, size in WORKLOADS if dtype == "fp16" else WORKLOADS[:2]:
            for causal in (False, True):
                member = Attention(dtype, size, causal)
                if member.name not in library:
                    continue
                function = library[member.name]
                times: dict[str, list[float]] = {}
                for seed in range(3):
                    torch.manual_seed(seed)
                    q, k, v = (torch.randn(batch, heads, seq, size, device="cuda", dtype=torch_dtype) for _ in range(3))
                    out = torch.full_like(q, float("nan"))
                    row_sum, row_max = (torch.empty(batch * heads, seq, device="cuda") for _ in range(2))
                    stream = torch.cuda.current_stream().cuda_stream
                    arguments = (
                        stream,
                        *(x.data_ptr() for x in (out, row_sum, row_max, q, k, v)),
                        size**-0.5,
                        batch,
                        heads,
                        seq,
                    )

                    def ours(arguments: Any = arguments, function: Function = function) -> None:
                        function(*arguments)

                    ours()
                    exact = F.scaled_dot_product_attention(*(x[:1].double() for x in (q, k, v)), is_causal=causal)
                    error = ((out[:1].double() - exact).norm() / exact.norm()).item()
                    if not error <= error_limit(member):
                        raise SystemExit(
                            f"{member.name} {(batch, heads, seq, size)}: error {error} over {error_limit(member)}"
                        )
                    candidates = {"ours": ours}
                    for backend in backends:

                        def theirs(
                            backend: str = backend, q: Any = q, k: Any = k, v: Any = v, causal: bool = causal
                        ) -> Any:
                            with sdpa_kernel(getattr(SDPBackend, backend)):
                                return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

                        candidates[backend] = theirs
                    for name, candidate in candidates.items():
                        times.setdefault(name, []).append(
                            1e3 * do_bench(candidate, warmup=15, rep=60, return_mode="median")
                        )
                medians = {name: float(np.median(values)) for name, values in times.items()}
                row = {
                    "dtype": dtype,
                    "shape": [batch, heads, seq, size],
                    "causal": causal,
                    "error": error,
                    "us": medians,
                }
                row["ratio"] = {name: medians[name] / medians["ours"] for name in medians if name != "ours"}
                rows.append(row)
                print(
                    dtype,
                    (batch, heads, seq, size),
                    "causal" if causal else "full",
                    {n: round(t, 1) for n, t in medians.items()},
                    flush=True,
                )
    return rows


def versions(device: Device) -> dict[str, Any]:
    """What the figures were measured on."""
    found: dict[str, Any] = {
        "device": device.name,
        "arch": device.arch,
        "driver_cuda": device.driver_version,
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
    for name in ("torch", "triton"):
        try:
            found[name] = __import__(name).__version__
        except ImportError:
            found[name] = None
    if found["torch"]:
        import torch

        found["cudnn"] = torch.backends.cudnn.version()
    return found


def run_checks(library: Library, device: Device, seqs: tuple[int, ...]) -> list[dict[str, Any]]:
    """Every variant at every length."""
    rows = []
    for index, (member, function) in enumerate(members_of(library)):
        worst = 0.0
        for aligned in (True, False):
            for seq in seqs:
                rows.append(check(function, member, seq, aligned, seed=1000 * index + seq))
                worst = max(worst, rows[-1]["error"]) if rows[-1]["passed"] else float("nan")
        rows.append(check_extremes(function, member, device))
        print(
            member.name,
            "worst error",
            f"{worst:.1e}",
            "limit",
            error_limit(member),
            "extremes",
            rows[-1]["passed"],
            flush=True,
        )
    return rows


def main() -> int:
    """Run the parts asked for; exit code 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, default=Path("aot_out/libpyfmha.so"))
    parser.add_argument("--part", choices=["all", "check", "time", "sanitize"], default="all")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    device = Device()
    library = Library(options.library)
    for name in library:
        library[name].load()
    manifest = library.manifest
    results: dict[str, Any] = {
        **versions(device),
        "pyfmha": manifest.pyfmha,
        "built_by_triton": manifest.triton,
        "build_id": manifest.build_id,
    }
    if options.part in ("all", "time"):
        results["times"] = time_workloads(library)
    if options.part in ("all", "check", "sanitize"):
        results["checks"] = run_checks(library, device, (17, 129) if options.part == "sanitize" else SEQS)
    if options.part in ("all", "check"):
        results["huge"] = check_huge(library)
        results["host"] = host_time(library)
        print("huge", results["huge"], "host", results["host"])
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    failed = [row for row in [*results.get("checks", []), *filter(None, [results.get("huge")])] if not row["passed"]]
    for row in failed:
        print("FAILED", row)
    print(f"{len(results.get('checks', []))} checks, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
