"""The rows of ``run.py --benchmark``: the engine, as a CUDA graph, TensorRT's own layer, Triton's JIT, torch.

Times are medians of ROUNDS rounds of LAUNCHES launches back to back, between two events on the GPU; the data stays in
its cache where it fits. The time on the host is that of one call, which returns before the GPU is done.
"""

import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from pyfmha.attention.first import KERNEL, Attention, kernel_path
from pyfmha.attention.reference import relative_error
from pyfmha.attention.run import to_float
from pyfmha.attention.tiles import tile_for
from pyfmha.errors import PyfmhaError
from pyfmha.runtime.device import Device, Event, Stream
from pyfmha.trt.attention.engine import build_engine
from pyfmha.trt.attention.saved import Saved
from pyfmha.trt.saved import write_whole
from pyfmha.trt.session import Session

ROUNDS, LAUNCHES = 7, 20
BACKENDS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")


@dataclass(frozen=True, eq=False)
class Problem:
    """What every row computes.

    Attributes:
        saved: the engine.
        inputs: Q, K, V: [batch, heads, seq, head size], bfloat16 as uint16.
        exact: float64 result.
    """

    saved: Saved
    inputs: dict[str, Any]
    exact: Any

    def error(self, out: Any) -> float:
        """Relative Frobenius error of a stored result."""
        return relative_error(to_float(out, self.saved.config.dtype), self.exact)

    def flop(self) -> float:
        """Floating-point operations that the result takes: those above the diagonal are not counted."""
        batch, heads, seq, size = self.exact.shape
        return 4 * batch * heads * seq * seq * size * (0.5 if self.saved.config.causal else 1)


@dataclass(frozen=True)
class Row:
    """One contender.

    Attributes:
        name: of the row.
        us: on the GPU, microseconds a launch.
        host_us: on the host, microseconds a call.
        tflops: 10**12 operations a second, by :meth:`Problem.flop`.
        error: against float64.
        missing: why there are no numbers.
    """

    name: str
    us: float | None = None
    host_us: float | None = None
    tflops: float | None = None
    error: float | None = None
    missing: str = field(default="")


def measure(launch: Callable[[], object], stream: Stream) -> tuple[float, float]:
    """Microseconds of one launch on the GPU, and of one call on the host."""
    begin, end = Event(), Event()
    gpu, host = [], []
    for _ in range(ROUNDS + 1):  # the first warms up
        begin.record(stream)
        start = time.perf_counter()
        for _ in range(LAUNCHES):
            launch()
        host.append(1e6 * (time.perf_counter() - start) / LAUNCHES)
        end.record(stream)
        gpu.append(1e3 * end.milliseconds_since(begin) / LAUNCHES)
    begin.close()
    end.close()
    return statistics.median(gpu[1:]), statistics.median(host[1:])


def _engine_row(name: str, problem: Problem, engine: Path | bytes, cuda_graph: bool = False) -> Row:
    with Session(engine, cuda_graph=cuda_graph) as session:
        out = session.run(problem.inputs)["Out"]  # captures the graph, too
        session.bind(problem.inputs)
        us, host = measure(session.enqueue, session.stream)
        return Row(name, us, host, problem.flop() / us / 1e6, problem.error(out))


def _tensorrt_row(name: str, problem: Problem) -> Row:
    config = replace(problem.saved.config, layer="tensorrt")
    return _engine_row(name, problem, build_engine(config).plan)


class _Missing(Exception):
    """Why a row cannot be timed."""


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        raise _Missing("torch is not installed") from None
    if not torch.cuda.is_available():
        raise _Missing("torch sees no GPU")
    return torch


@contextmanager
def _torch_tensors(torch: Any, problem: Problem) -> Iterator[tuple[list[Any], Stream]]:
    """Q, K and V as torch's tensors, and one of our streams, which torch uses meanwhile."""
    stream = Stream()
    bf16 = problem.saved.config.dtype == "bf16"
    arrays = [x.view(np.int16) if bf16 else x for x in problem.inputs.values()]
    tensors = [torch.from_numpy(x).cuda() for x in arrays]
    tensors = [x.view(torch.bfloat16) for x in tensors] if bf16 else tensors
    torch.cuda.synchronize()
    try:
        with torch.cuda.stream(torch.cuda.ExternalStream(stream.handle)):
            yield tensors, stream
    finally:
        torch.cuda.synchronize()
        stream.close()


def _error_of(problem: Problem, out: Any) -> float:
    return relative_error(out.double().cpu().numpy(), problem.exact)


def _jit_row(name: str, problem: Problem, arch: str) -> Row:
    torch = _torch()
    if importlib.util.find_spec("triton") is None:
        raise _Missing("triton is not installed")
    config = problem.saved.config
    found = importlib.util.spec_from_file_location("fmha_triton", kernel_path())
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    kernel = getattr(module, KERNEL)
    member = Attention(config.dtype, config.head_size, config.causal)
    tile = tile_for(config.dtype, config.head_size, arch, config.causal, member.precision)
    with _torch_tensors(torch, problem) as (tensors, stream):
        q = tensors[0]
        batch, heads, seq, size = q.shape
        out = torch.full_like(q, float("nan"))
        row_sum, row_max = (torch.empty(batch * heads, seq, device="cuda") for _ in range(2))
        rows = batch * heads
        grid = (-(-seq // tile.block_m), min(rows, 65535), -(-rows // 65535))
        constants = {"BLOCK_M": tile.block_m, "BLOCK_DMODEL": size, "BLOCK_N": tile.block_n}
        constants |= {"CAUSAL": config.causal, "PRECISION": member.precision}
        constants |= {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        numbers = (config.factor, batch, heads, seq)

        def launch() -> None:
            kernel[grid](out, row_sum, row_max, *tensors, *numbers, **constants)

        us, host = measure(launch, stream)
        return Row(name, us, host, problem.flop() / us / 1e6, _error_of(problem, out))


def _torch_row(name: str, problem: Problem, backend: str) -> Row:
    torch = _torch()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    config = problem.saved.config
    with _torch_tensors(torch, problem) as (tensors, stream), sdpa_kernel(getattr(SDPBackend, backend)):
        attention = torch.nn.functional.scaled_dot_product_attention

        def launch() -> Any:
            return attention(*tensors, is_causal=config.causal, scale=config.factor)

        out = launch()
        us, host = measure(launch, stream)
        return Row(name, us, host, problem.flop() / us / 1e6, _error_of(problem, out))


def rows_of(problem: Problem, device: Device) -> Iterator[Row]:
    """Every row; one that cannot be timed says why.

    Args:
        problem: what to compute.
        device: on which GPU; open, so that its context lives from the first row to the last.
    """
    engine = problem.saved.path
    contenders: list[tuple[str, Callable[[str], Row]]] = [
        ("TensorRT, pyfmha's plugin", lambda name: _engine_row(name, problem, engine)),
        ("the same as a CUDA graph", lambda name: _engine_row(name, problem, engine, cuda_graph=True)),
        ("TensorRT's own attention layer", lambda name: _tensorrt_row(name, problem)),
        ("Triton, compiled at run time", lambda name: _jit_row(name, problem, device.arch)),
        *(
            (f"torch, {backend}", lambda name, backend=backend: _torch_row(name, problem, backend))  # type: ignore[misc]
            for backend in BACKENDS
        ),
    ]
    for name, contender in contenders:
        try:
            yield contender(name)
        except (_Missing, PyfmhaError, RuntimeError) as error:  # torch raises RuntimeError for what a backend lacks
            yield Row(name, missing=str(error).splitlines()[0] if str(error) else type(error).__name__)


def table_of(rows: list[Row]) -> str:
    """The rows for people."""
    lines = [f"{'':34}{'GPU, us':>10}{'host, us':>10}{'TFLOP/s':>10}{'error':>10}"]
    for row in rows:
        if row.us is None or row.host_us is None:
            lines.append(f"{row.name:34}not run: {row.missing}")
        else:
            lines.append(f"{row.name:34}{row.us:10.1f}{row.host_us:10.1f}{row.tflops:10.1f}{row.error:10.1e}")
    return "\n".join(lines)


def save_plot(rows: list[Row], title: str, path: Path) -> str:
    """A bar chart as PNG; returns where it is, or why it is not."""
    try:
        import matplotlib
    except ImportError:
        return "no plot: matplotlib is not installed (pip install matplotlib)"
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    timed = [row for row in rows if row.us is not None]
    figure, axes = plt.subplots(figsize=(8, 0.5 * len(timed) + 1.5), layout="constrained")
    bars = axes.barh([row.name for row in timed], [row.us or 0.0 for row in timed])
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("microseconds a launch on the GPU (shorter is better)")
    axes.set_title(title, fontsize=10)
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=120)
    plt.close(figure)
    temporary.replace(path)
    return str(path)


def run_benchmark(problem: Problem, folder: Path) -> None:
    """Print the table and save it as ``benchmark.json`` and ``benchmark.png``."""
    with Device() as device:
        gpu = {"name": device.name, "arch": device.arch, "driver_cuda": device.driver_version}
        rows = list(rows_of(problem, device))
    config = problem.saved.config
    title = f"{gpu['name']}, {config.dtype}, {'causal' if config.causal else 'full'}, {list(problem.exact.shape)}"
    print(f"\n{title}; TensorRT {problem.saved.tensorrt}\n{table_of(rows)}")
    results = {
        "gpu": gpu,
        "tensorrt": problem.saved.tensorrt,
        "dtype": config.dtype,
        "causal": config.causal,
        "shape": list(problem.exact.shape),
        "rounds": ROUNDS,
        "launches": LAUNCHES,
        "rows": [asdict(row) for row in rows],
    }
    write_whole(folder / "benchmark.json", (json.dumps(results, indent=1) + "\n").encode())
    print(f"{folder / 'benchmark.json'}\n{save_plot(rows, title, folder / 'benchmark.png')}")
