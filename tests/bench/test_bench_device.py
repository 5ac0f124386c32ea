"""The benchmark's rows on the stand-in for a GPU, which computes by the reference: from the command to the JSON."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch_double
from bench_on_double import COPY_US, prepare, rows_of
from helpers import LAUNCH_FAILED
from rich.console import Console
from trt_double.full.gpu import Gpu
from typer.testing import CliRunner, Result

from pyfmha.attention.first import Attention
from pyfmha.attention.reference import attend
from pyfmha.bench.cells import Cell, cells_from
from pyfmha.bench.clock import Clock
from pyfmha.bench.command import roof_of
from pyfmha.bench.flash3 import Flash3
from pyfmha.bench.flex import torch_contenders
from pyfmha.bench.ours import Decoded, our_contenders
from pyfmha.bench.presets import preset
from pyfmha.bench.results import read_results
from pyfmha.bench.tensorrt_row import TensorrtLayer
from pyfmha.bench.torch_rows import Jit, Sdpa
from pyfmha.cli.main import app
from pyfmha.runtime.device import Device
from pyfmha.runtime.library import Library

pytest_plugins = ["trt_double.full.fixtures", "trt_double.fixtures", "verify_standins", "bench_device"]

gpu_module = importlib.import_module("trt_double.full.gpu")  # the package has a function of that name
KERNEL_US = 50.0
CAUSAL = Cell("fp16", 2, 2, 2, 40, 40, 32, True)
GROUPED = Cell("bf16", 1, 4, 2, 7, 50, 24, False)
INTERLEAVED = Cell("fp16", 2, 3, 3, 21, 21, 32, True, "bshd")


@pytest.mark.parametrize("cell", [CAUSAL, GROUPED, INTERLEAVED], ids=lambda cell: cell.name)
def test_our_rows(timer: Clock, bench_gpu: Gpu, forward_library_path: Path, cell: Cell) -> None:
    before = bench_gpu.live()

    rows = rows_of(timer, cell, our_contenders(Library(forward_library_path), timer.stream, generic=True))

    assert set(rows) == {"ours", "ours-algorithm1", "ours-generic", "ours-decode", "ours-first"}
    name = f"fmha_fwd_d32_{cell.dtype}"
    for key in ("ours", "ours-generic"):
        row = rows[key]
        assert row.us == pytest.approx(KERNEL_US, rel=1e-3), row
        assert row.graph_us == pytest.approx(KERNEL_US, rel=1e-3)
        assert row.host_us is not None
        assert 0 < row.host_us < 5000
        assert row.error is not None
        assert 0 < row.error < 4e-3
        assert row.variant.startswith(name)
    assert "generic" in rows["ours-generic"].variant
    assert ("hinted" in rows["ours"].variant) == (cell.dtype == "fp16"), (
        "the bf16 stand-in has the generic variant only"
    )
    if cell.dtype == "fp16":
        assert rows["ours-algorithm1"].us is not None
    else:
        assert rows["ours-algorithm1"].missing == f"{name} has no algorithm 1"
    if cell is CAUSAL:
        assert rows["ours-first"].variant.startswith("fmha_d32_fp16")
    elif cell is GROUPED:
        assert rows["ours-first"].missing.startswith("the first kernel serves as many key heads as heads")
    else:
        assert (
            rows["ours-first"].missing
            == "the first kernel serves [batch, heads, sequence, head size] alone, without a soft cap"
        )
    assert rows["ours-decode"].missing == "splitting over keys is for few queries over many keys"
    held = bench_gpu.live()
    assert {name: held[name] for name in ("memory", "graphs", "modules")} == {
        name: before[name] for name in ("memory", "graphs", "modules")
    }


def test_a_kernel_that_computes_nothing_is_found_out(
    timer: Clock, forward_library_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_module, "emulated_forward", lambda *_: None)

    rows = rows_of(timer, CAUSAL, our_contenders(Library(forward_library_path), timer.stream, generic=False))

    assert (rows["ours"].us, rows["ours"].wrong) == (None, True)
    assert rows["ours"].missing == "wrong output: relative error nan, limit 5e-04"
    assert rows["ours-first"].us is not None


def test_a_function_that_the_library_lacks_is_named(timer: Clock, forward_library_path: Path) -> None:
    cell = Cell("bf16", 1, 2, 2, 16, 1000, 128, False)

    rows = rows_of(timer, cell, our_contenders(Library(forward_library_path), timer.stream, generic=False))

    for key, name in (("ours", "fmha_fwd_d128_bf16"), ("ours-decode", "fmha_split_d128_bf16")):
        assert rows[key].missing.startswith(
            f"the library has no {name}; add it: pyfmha build --dtype bf16 --head-size 128"
        )


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize(("kv_heads", "layout"), [(2, "bhsd"), (1, "bhsd"), (2, "bshd")])
def test_the_rows_of_torch(
    timer: Clock, bench_gpu: Gpu, monkeypatch: pytest.MonkeyPatch, dtype: str, kv_heads: int, layout: str
) -> None:
    log = torch_double.install(monkeypatch, bench_gpu)
    cell = Cell(dtype, 1, 2, kv_heads, 9, 9, 32, True, layout)

    rows = rows_of(timer, cell, torch_contenders(timer.stream, "sm_90")[:-1])

    assert set(rows) == {"cudnn", "flash", "efficient", "math", "flex", "flash3"}
    assert (
        rows.pop("flex").missing
        == "not asked: it is timed at biases, masks, functions, and values of another head size"
    )
    flash3 = rows.pop("flash3")
    if dtype == "bf16":
        assert flash3.us == pytest.approx(80, rel=1e-3), flash3
        assert flash3.error is not None
        assert flash3.error < 4e-3
        row_stride = 2 * 32 * 4 if layout == "bshd" else 32 * 4  # float32 stands for bf16
        assert {strides[1] for strides in log.flash3_strides} == {row_stride}
    else:
        assert flash3.us is None
        no_fp16 = "This flash attention build does not support FP16."
        assert flash3.missing == ("FlashAttention-3 has no fp32" if dtype == "fp32" else no_fp16)
    for key, row in rows.items():
        if (key, dtype) == ("flash", "fp32"):
            assert row.missing == "Expected query, key and value to be half (Triggered internally)"
            continue
        assert row.us == pytest.approx(70, rel=1e-3), row
        assert row.graph_us == pytest.approx(60, rel=1e-3), row
        assert row.error is not None
        assert row.error < 4e-3
    assert {call["backend"] for call in log.options} == {"CUDNN", "FLASH", "EFFICIENT", "MATH"}
    assert {call["stream"] for call in log.options} == {timer.stream.handle}
    assert (log.streams, log.backend) == ([], [])
    assert log.replays > 0


def test_flash3_is_not_asked_for_another_mask(timer: Clock, bench_gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    torch_double.install(monkeypatch, bench_gpu)

    row = rows_of(timer, Cell("bf16", 1, 2, 2, 9, 20, 32, True), [Flash3(timer.stream)])["flash3"]

    assert row.missing == "its causal mask is another where there are more or fewer keys than queries"


@pytest.mark.parametrize(
    "cell", [Cell("bf16", 1, 2, 2, 9, 9, 32, True, softcap=0.5), Cell("bf16", 2, 4, 2, 1, 70, 32, False)], ids=str
)
def test_flash3_caps_scores_and_decodes(
    timer: Clock, bench_gpu: Gpu, monkeypatch: pytest.MonkeyPatch, cell: Cell
) -> None:
    torch_double.install(monkeypatch, bench_gpu)

    rows = rows_of(timer, cell, [Flash3(timer.stream), Sdpa("cudnn", timer.stream)])

    assert rows["flash3"].error is not None, rows["flash3"].missing
    assert rows["flash3"].error < 4e-3
    no_cap = "torch's scaled_dot_product_attention has no soft cap"
    assert rows["cudnn"].missing == (no_cap if cell.softcap else "")


def test_flash3_that_is_not_there(timer: Clock, bench_gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    torch_double.install(monkeypatch, bench_gpu)
    for name in ("fa3_fwd_interface", "flash_attn_interface"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "path", [])

    row = rows_of(timer, Cell("bf16", 1, 2, 2, 9, 9, 32, True), [Flash3(timer.stream)])["flash3"]

    assert row.missing == "FlashAttention-3 is not installed: pip install fa3-fwd einops"


def test_the_gpu_is_behind_the_host_before_the_first_launch(timer: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    queued: list[str] = []
    monkeypatch.setattr(timer, "_overwrite", lambda stream: queued.append("write"))

    timer.cold_us(lambda: queued.append("launch"), timer.stream, 3)

    assert queued == ["write"] * 18 + ["write", "launch"] * 3


def test_decoding(verify_gpu: Gpu, verify_library_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(verify_gpu, monkeypatch)
    cell = Cell("fp16", 2, 8, 2, 1, 600, 64, False)
    with Device() as device:
        clock = Clock(device)
        rows = rows_of(clock, cell, [Decoded(Library(verify_library_path), clock.stream)])
        clock.close()

    row = rows["ours-decode"]
    assert row.us == pytest.approx(2 * KERNEL_US, rel=1e-3), row
    assert row.graph_us == pytest.approx(2 * KERNEL_US, rel=1e-3)
    split, combine = row.variant.split(" + ")
    assert split.startswith("fmha_split_d64_fp16")
    assert "hinted" in split
    assert combine.startswith("fmha_combine_d64_fp16")
    live = verify_gpu.live()
    assert (live["memory"], live["modules"], live["graphs"]) == (0, 0, 0)


@pytest.mark.parametrize("causal", [True, False])
def test_tensorrts_own_layer(timer: Clock, trt11: Any, monkeypatch: pytest.MonkeyPatch, causal: bool) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", trt11)
    cell = Cell("fp16", 2, 4, 4, 33, 33, 32, causal)

    row = rows_of(timer, cell, [TensorrtLayer()])["tensorrt"]
    grouped = rows_of(timer, GROUPED, [TensorrtLayer()])["tensorrt"]

    assert row.missing == ""
    assert row.us is not None
    assert row.graph_us is not None
    assert row.error is not None
    assert row.error < 5e-4
    assert grouped.missing.startswith("not asked: the engine here has as many key heads")


def test_the_first_kernel_by_tritons_jit(timer: Clock, bench_gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton itself cannot launch here: that it is asked for the right thing."""
    torch_double.install(monkeypatch, bench_gpu)
    asked: list[Any] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(
                out: Any, row_sum: Any, row_max: Any, q: Any, k: Any, v: Any, *rest: Any, **constants: Any
            ) -> None:
                asked.append((grid, rest, constants))
                bench_gpu.push(timer.stream.handle, lambda: 0.09)
                right = 0 if constants["CAUSAL"] else -1
                exact, _ = attend(q.values, k.values, v.values, sm_scale=rest[0], window_right=right)
                out.values[...] = exact

            return launch

    monkeypatch.setattr("pyfmha.bench.torch_rows._load_kernel", Kernel)

    rows = rows_of(timer, CAUSAL, [Jit(timer.stream, "sm_90")])

    assert rows["jit"].us == pytest.approx(90, rel=1e-3), rows
    grid, rest, constants = asked[0]
    member = Attention("fp16", 32, True)
    spec = member.specs()[0].resolve("sm_90")
    assert constants == {**dict(spec.constants), "num_warps": spec.num_warps, "num_stages": spec.num_stages}
    assert rest == (32**-0.5, 2, 2, 40)
    values = {"batch_size": 2, "num_heads": 2, "seq_len": 40}
    assert grid == tuple(e.evaluate({name: values[name] for name in e.names()}) for e in spec.grid_expressions)
    assert rows_of(timer, GROUPED, [Jit(timer.stream, "sm_90")])["jit"].missing.startswith("the first kernel serves")


def test_the_roof(timer: Clock, bench_gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [*preset("prefill"), *cells_from(["fp32"], [1], [1], [], [512], [], [64], [True])]

    without = roof_of(timer, cells)
    torch_double.install(monkeypatch, bench_gpu)
    roof = roof_of(timer, cells)

    assert roof.copy_gbps == pytest.approx(2 * (1 << 20) / (COPY_US * 1e3))
    assert without.matmul_tflops == {}
    for dtype in ("fp16", "bf16"):
        assert f"No roof for {dtype}: torch is not installed" in without.note
    assert roof.matmul_tflops == {t: pytest.approx(2 * 8192**3 / 2e-3 / 1e12) for t in ("fp16", "bf16")}


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments])


def test_another_device(bench_gpu: Gpu, tmp_path: Path) -> None:
    bench_gpu.cuda.set_device(0, 75)  # without code
    out = tmp_path / "second.json"

    done = bench(*SIZES, "--row", "ours", "--device", "1", "-o", str(out))

    assert done.exit_code == 0, done.output
    assert {launch.device for launch in bench_gpu.cuda.launches()} == {1}
    assert read_results(out).facts["device"] == "Fake GPU 1"


SIZES = ("--batch", "2", "--heads", "2", "--seq", "40", "72", "--head-size", "32", "--causal")


def test_the_command_prints_saves_draws_and_compares(
    bench_gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyfmha.cli.gpu.console", Console(width=160, highlight=False, emoji=False))
    for package in ("torch", "tensorrt"):  # as where they are not installed
        monkeypatch.setitem(sys.modules, package, None)
    out = tmp_path / "one.json"

    done = bench(*SIZES, "-o", str(out))

    assert done.exit_code == 0, done.output
    first = read_results(out)
    assert [one.cell.name for one in first.measured] == ["fp16_b2_h2_s40_d32_causal", "fp16_b2_h2_s72_d32_causal"]
    assert first.roof.copy_gbps == pytest.approx(2 * (1 << 20) / (COPY_US * 1e3))
    assert (first.roof.matmul_tflops, first.roof.note) == ({}, ""), "these cells are too small to need it"
    for key in ("device", "arch", "driver_cuda", "python", "numpy", "library", "built_by_triton", "cuda-python"):
        assert first.facts[key], key
    assert first.facts["cudnn"] is None
    for one in first.measured:
        keys = [
            "ours",
            "ours-algorithm1",
            "ours-decode",
            "ours-first",
            "cudnn",
            "flash",
            "efficient",
            "math",
            "flex",
            "flash3",
            "jit",
        ]
        assert [row.contender for row in one.rows] == [*keys, "tensorrt"]
        assert "torch is not installed" in one.rows[4].missing
        assert "TensorRT is not installed" in one.rows[-1].missing
        assert one.rows[0].us == pytest.approx(KERNEL_US, rel=1e-3)
    assert "torch is not installed: pip install" in done.output
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    live = bench_gpu.live()
    assert (live["memory"], live["contexts"], live["events"]) == (0, 0, 0)

    again = bench(*SIZES, "-o", str(tmp_path / "two.json"), "--compare", str(out), "--row", "ours")
    assert again.exit_code == 0, again.output
    assert "None of ours became slower" in again.output
    assert [row.contender for row in read_results(tmp_path / "two.json").measured[0].rows][-1] == "ours-first"

    monkeypatch.setattr(gpu_module, "KERNEL_MS", 0.06)
    slower = bench(*SIZES, "-o", str(tmp_path / "three.json"), "--compare", str(out), "--row", "ours")
    assert slower.exit_code == 1, slower.output
    assert "REGRESSION" in slower.output
    assert (tmp_path / "three.json").exists()


def test_wrong_numbers_of_ours_end_with_1(bench_gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_module, "emulated_forward", lambda *_: None)

    done = bench(*SIZES, "-o", str(tmp_path / "x.json"), "--row", "ours")

    assert done.exit_code == 1, done.output
    assert "Ours computed something wrong." in done.output


def test_another_library(bench_gpu: Gpu, tmp_path: Path, verify_library_path: Path) -> None:
    out = tmp_path / "x.json"
    bench_gpu.learn(verify_library_path.with_name("manifest.json"))

    done = bench(*SIZES, "-o", str(out), "--row", "ours", "--library", str(tmp_path / "none.so"))
    assert (done.exit_code, "no library at" in done.output) == (2, True)
    done = bench(*SIZES, "-o", str(out), "--row", "ours", "--library", str(verify_library_path))
    assert done.exit_code == 0, done.output
    assert [row.contender for row in read_results(out).measured[0].rows] == ["ours", "ours-decode", "ours-first"]


def test_values_have_a_head_size_of_their_own_by_flag(bench_gpu: Gpu, tmp_path: Path) -> None:
    out = tmp_path / "x.json"
    sizes = ("--batch", "1", "--heads", "2", "--seq", "9", "--head-size", "24", "--v-head-size", "16", "--causal")
    done = bench(*sizes, "-o", str(out), "--row", "ours")
    assert done.exit_code == 0, done.output
    (measured,) = read_results(out).measured
    assert (measured.cell.shape("V"), measured.cell.shape("K")) == ((1, 2, 9, 16), (1, 2, 9, 24))
    assert measured.rows[0].variant.startswith("fmha_biased_d32_fp16")
    assert measured.rows[0].us is not None


def test_a_launch_that_fails_is_a_row(bench_gpu: Gpu, tmp_path: Path) -> None:
    bench_gpu.cuda.fail("cuLaunchKernel", LAUNCH_FAILED)

    done = bench(*SIZES, "-o", str(tmp_path / "x.json"), "--row", "ours-first")

    assert done.exit_code == 0, done.output
    rows = [row for one in read_results(tmp_path / "x.json").measured for row in one.rows]
    assert all("cuLaunchKernel failed" in row.missing for row in rows)


def test_errors_end_with_2(bench_gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "old.json"
    old.write_text('{"schema": 99, "cells": []}')
    cases: list[tuple[tuple[str, ...], str]] = [
        (("--preset", "all"), "preset 'all' is unknown"),
        (("--preset", "quick", "--seq", "5"), "give it, or sizes by flags, not both"),
        (("--heads", "3", "--kv-heads", "2"), "3 heads and 2 key heads"),
        (("--row", "fast"), "no row 'fast'"),
        (("--v-head-size", "0"), "Invalid value for '--v-head-size'"),
        (("--preset", "quick", "--v-head-size", "8"), "give it, or sizes by flags, not both"),
        (("--compare", str(old)), "has schema version 99, this pyfmha reads 1"),
    ]
    for arguments, text in cases:
        done = bench(*arguments)
        assert done.exit_code == 2, done.output
        assert text in done.output

    bench_gpu.cuda.set_device(0, 80)
    done = bench(*SIZES)
    assert done.exit_code == 2
    assert "was built for sm_90, the GPU here, " in done.output
    assert "is sm_80; build it for this GPU: pyfmha build --arch sm_80" in done.output

    monkeypatch.setenv("PYFMHA_LIBRARY", str(tmp_path / "none.so"))
    assert "to build one: pyfmha build" in bench(*SIZES).output

    monkeypatch.delenv("PYFMHA_LIBCUDA")
    done = bench(*SIZES)
    assert done.exit_code == 2
    assert "error: no CUDA driver" in done.output
