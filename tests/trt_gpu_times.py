"""Times of ``trt_gpu.py``: of the host and of the kernel, beside Triton's and torch's; and a capture by torch."""

import importlib.util
import math
import statistics
import tempfile
import timeit
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from trt_double import Calls
from trt_gpu_parts import Attached, Loops, Report, error_of, is_real, random_case

from pyfmha.attention.first import KERNEL, Attention, kernel_path
from pyfmha.attention.reference import LIMITS
from pyfmha.runtime.device import Device, DeviceArray, Event, Stream
from pyfmha.runtime.library import Library

BUDGET_US = 6.0
JIT_US = 22.0
"""What ``enqueue`` may cost, stated for a host on which a launch by Triton's JIT costs JIT_US. Hosts differ by more
than half, so a slower one is held to the same proportion."""

SLOWER = 1.1
"""The same kernel and tile, so the plugin may be slower by noise and by another version of Triton only."""

WORKLOADS = (("fp16", 8, 32, 512, 64), ("fp16", 4, 32, 2048, 64), ("bf16", 8, 32, 512, 64), ("fp32", 4, 32, 512, 64))
BASELINES = {"fp16": "FLASH_ATTENTION", "bf16": "FLASH_ATTENTION", "fp32": "EFFICIENT_ATTENTION"}


def _random(dtype: str, shape: tuple[int, ...]) -> list[Any]:
    import torch

    kinds = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    generator = torch.Generator("cuda").manual_seed(7)
    return [torch.randn(shape, generator=generator, device="cuda").to(kinds[dtype]) for _ in range(3)]


def _pointers(tensors: list[Any]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def check_torch_capture(report: Report, calls: Calls, creator: Any, library: Library, device: Device) -> None:
    """Captured by torch in its strictest mode, which forbids allocating and waiting to all threads."""
    import torch

    attached = Attached(calls, creator, "fp16", 8, 64, True)
    shape = attached.shape(2, 129)
    attached.prepare(2, 129)
    q, k, v = _random("fp16", shape)
    out = torch.zeros_like(q)
    workspace = torch.empty(attached.workspace_bytes(2, 129), dtype=torch.uint8, device="cuda")
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()

    def work(current: int) -> None:
        attached.enqueue(_pointers([q, k, v]), out.data_ptr(), workspace.data_ptr(), current)

    torch.cuda.synchronize()
    work(stream.cuda_stream)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="global"):
        work(torch.cuda.current_stream().cuda_stream)
    worst = 0.0
    for seed in (2, 3, 4):
        arrays, exact = random_case("fp16", shape, True, seed)
        for target, source in zip((q, k, v), arrays, strict=True):
            target.copy_(torch.from_numpy(source))
        out.zero_()
        graph.replay()
        torch.cuda.synchronize()
        worst = max(worst, error_of(out.cpu().numpy(), "fp16", exact))
    attached.close()
    report.check(
        "CUDA graph of torch: captured, replayed with changed contents", worst <= LIMITS["fp16"], f"{worst:.1e}"
    )


@cache
def _kernel() -> Any:
    """The kernel's source, for Triton to compile at run time."""
    found = importlib.util.spec_from_file_location("fmha_triton", kernel_path())
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return getattr(module, KERNEL)


def _jit(
    member: Attention, arch: str, scale: float, tensors: list[Any], batch: int, heads: int, seq: int
) -> tuple[Callable[[], object], Any]:
    """A launch of the library's kernel, with the library's tile, by Triton itself; and where it writes Out."""
    import torch

    spec = member.specs()[0].resolve(arch)
    constants = dict(spec.constants)
    grid = (-(-seq // int(constants["BLOCK_M"])), batch * heads, 1)
    out = torch.empty_like(tensors[0])
    row_sum, row_max = (torch.empty(batch * heads, seq, device="cuda") for _ in range(2))
    options = {**constants, "num_warps": spec.num_warps, "num_stages": spec.num_stages}
    kernel = _kernel()
    return lambda: kernel[grid](out, row_sum, row_max, *tensors, scale, batch, heads, seq, **options), out


def _host_us(call: Callable[[], object], device: Device, count: int = 200, rounds: int = 15) -> float:
    """Host time of one call: the best of some rounds that the launch queue can take."""
    best = math.inf
    for _ in range(rounds):
        device.synchronize()
        best = min(best, timeit.timeit(call, number=count) / count * 1e6)
    device.synchronize()
    return best


def measure_host(report: Report, calls: Calls, creator: Any, library: Library, device: Device) -> None:
    """What the host spends on a launch of the smallest kernel, through the binding's C++ code and otherwise."""
    name = "host cost of enqueue through the binding"
    if not is_real(calls):
        report.skip(name, "there is no real binding here")
        return
    host: dict[str, Any] = {}
    report.results["host"] = host
    attached = Attached(calls, creator, "fp16", 1, 64, True)
    plugin, stream = attached.plugin, Stream()
    attached.prepare(1, 64)
    arrays = [DeviceArray(attached.shape(1, 64), "float16") for _ in range(4)]
    workspace = DeviceArray((attached.workspace_bytes(1, 64),), "uint8")
    for array in [*arrays, workspace]:
        array.fill(0)
    device.synchronize()
    out, *inputs = (array.pointer for array in arrays)
    with tempfile.TemporaryDirectory() as folder:
        loops = Loops(Path(folder), device.synchronize)

        def through_binding() -> float:
            return loops.enqueue(plugin, inputs, out, workspace.pointer, stream.handle)

        host["enqueue_through_binding_us"] = through_binding()
        prepared = plugin.enqueue
        plugin.enqueue = lambda *arguments: None
        host["empty_override_through_binding_us"] = through_binding()
        plugin.enqueue = prepared
        # Again, so that a change in the machine's speed shows on both.
        host["enqueue_through_binding_us"] = min(host["enqueue_through_binding_us"], through_binding())
        function = library[Attention("fp16", 64).name]
        row_max = workspace.pointer + 64 * 4
        numbers = (attached.scale, 1, 1, 64)
        packed = function.pack(stream.handle, out, workspace.pointer, row_max, *inputs, *numbers, 0)
        host["c_library_from_c_us"] = loops.launch(function, packed)
        one, other = attached.tensors(1, 64), attached.tensors(2, 17)
        host["on_shape_change_through_binding_us"] = loops.shape_change(plugin, one, other)
        host["on_shape_change_same_shape_us"] = loops.shape_change(plugin, one, one)
    if report.results["torch"] and report.results["triton"]:
        host |= _host_of_others(attached, device, stream)
    cost, empty = host["enqueue_through_binding_us"], host["empty_override_through_binding_us"]
    for measured, value in list(host.items()):
        report.line(f"        {measured.removesuffix('_us'):36} {value:6.2f} us")
    jit = host.get("triton_jit_us", JIT_US)
    allowed = max(BUDGET_US, BUDGET_US * jit / JIT_US)
    host["above_empty_override_us"], host["allowed_us"] = cost - empty, allowed
    host["budget_us"], host["budget_met"] = BUDGET_US, cost <= BUDGET_US
    verdict = "met" if cost <= BUDGET_US else "NOT met"
    report.check(
        f"{name}: at most {BUDGET_US:g} us, or {BUDGET_US / JIT_US:.2f} of a launch by Triton's JIT",
        cost <= allowed,
        f"{cost:.2f} us, of which an empty override is {empty:.2f} us; allowed here {allowed:.2f} us;"
        f" the {BUDGET_US:g} us themselves were {verdict}",
    )
    device.synchronize()
    attached.close()
    for array in [*arrays, workspace]:
        array.free()
    stream.close()


def _host_of_others(attached: Attached, device: Device, stream: Stream) -> dict[str, float]:
    """The same launch by Triton itself, and torch's attention."""
    import torch

    tensors = _random("fp16", attached.shape(1, 64))
    with torch.cuda.stream(torch.cuda.ExternalStream(stream.handle)):
        launch, _ = _jit(Attention("fp16", 64), device.arch, attached.scale, tensors, 1, 1, 64)
        launch()
        attention = torch.nn.functional.scaled_dot_product_attention
        sdpa = _host_us(lambda: attention(*tensors, is_causal=True), device)
        return {"triton_jit_us": _host_us(launch, device), "torch_sdpa_us": sdpa}


def _gpu_us(call: Callable[[], object], stream: Stream) -> float:
    """Median time on the GPU of one call; the L2 cache is as warm for all alike."""
    for _ in range(5):
        call()
    times = []
    first, last = Event(), Event()
    for _ in range(30):
        first.record(stream)
        for _ in range(5):
            call()
        last.record(stream)
        times.append(last.milliseconds_since(first) * 1000 / 5)
    first.close()
    last.close()
    return statistics.median(times)


def compare_times(report: Report, calls: Calls, creator: Any, library: Library, device: Device) -> None:
    """Time on the GPU of the plugin's tactics, of the same kernel compiled by Triton at run time, and of torch."""
    rows = report.results.setdefault("times", [])
    stream = Stream()
    for dtype, batch, heads, seq, size in WORKLOADS:
        for causal in (False, True):
            if report.late():
                break
            member = Attention(dtype, size, causal)
            report.progress(f"times: {member.name}")
            if member.name not in library:
                report.skip(f"time of {member.name}", "it is not in the library")
                continue
            row = {"dtype": dtype, "batch": batch, "heads": heads, "seq": seq, "head_size": size, "causal": causal}
            row |= _compare(member, device, Attached(calls, creator, dtype, heads, size, causal), batch, seq, stream)
            rows.append(row)
            report.line(
                f"        {' '.join(f'{k}={v:.4g}' if isinstance(v, float) else f'{k}={v}' for k, v in row.items())}"
            )
    stream.close()
    slow = [row for row in rows if row["plugin_tactic0_us"] > SLOWER * row["triton_jit_us"]]
    report.check(
        "time of the kernel in the plugin: at most 10 % above Triton's of the same", bool(rows) and not slow, slow
    )


def _compare(
    member: Attention, device: Device, attached: Attached, batch: int, seq: int, stream: Stream
) -> dict[str, Any]:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    row: dict[str, Any] = {}
    tensors = _random(member.dtype, attached.shape(batch, seq))
    workspace = torch.empty(attached.workspace_bytes(batch, seq), dtype=torch.uint8, device="cuda")
    outs = []
    for index, tactic in enumerate(attached.tactics):
        assert attached.calls.set_tactic(attached.plugin, tactic) == 0
        attached.prepare(batch, seq)
        outs.append(torch.empty_like(tensors[0]))
        torch.cuda.synchronize()
        pointers = _pointers(tensors), outs[-1].data_ptr(), workspace.data_ptr(), stream.handle
        row[f"plugin_tactic{index}_us"] = _gpu_us(attached.prepared_enqueue(*pointers), stream)
    with torch.cuda.stream(torch.cuda.ExternalStream(stream.handle)):
        launch, out = _jit(member, device.arch, attached.scale, tensors, batch, attached.heads, seq)
        torch.cuda.synchronize()
        row["triton_jit_us"] = _gpu_us(launch, stream)
        attention = torch.nn.functional.scaled_dot_product_attention
        with sdpa_kernel(getattr(SDPBackend, BASELINES[member.dtype])):
            row["torch_us"] = _gpu_us(lambda: attention(*tensors, is_causal=member.causal), stream)
        row["torch_backend"] = BASELINES[member.dtype]
    torch.cuda.synchronize()
    row["difference_from_jit"] = (outs[0].float() - out.float()).abs().max().item()
    attached.close()
    return row
