"""The parts of the benchmark that need no GPU: cells, figures, results, comparison, table, picture, the measuring."""

import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from bench_fakes import FakeContender, FakeGpu
from rich.console import Console

import pyfmha
from pyfmha.bench.cells import Cell, cells_from
from pyfmha.bench.command import chosen
from pyfmha.bench.compare import compare
from pyfmha.bench.figures import gigabytes, launches_of, middle, noise, tflops
from pyfmha.bench.measure import FEWEST, MOST, ROUNDS, TURNS, measure_cell, sample_of
from pyfmha.bench.plot import panels_of, save_plot
from pyfmha.bench.presets import PRESETS, preset
from pyfmha.bench.results import Measured, Results, Roof, Row, parse_results, read_results
from pyfmha.bench.table import number, print_changes, print_results
from pyfmha.errors import BenchError, SpecError

ROOT = Path(pyfmha.__file__).parents[1]
SQUARE = Cell("fp16", 4, 32, 32, 2048, 2048, 64, False)
TINY = Cell("fp16", 2, 4, 2, 5, 5, 8, True)
FACTS: dict[str, str | None] = {"device": "Some GPU", "arch": "sm_90", "torch": None}


# ------------------------------------------------------------------ cells


def test_operations_and_bytes_of_a_cell() -> None:
    assert SQUARE.flop == 4 * 4 * 32 * 2048 * 2048 * 64
    assert replace(SQUARE, causal=True).flop == 4 * 4 * 32 * (2048 * 2049 // 2) * 64
    assert SQUARE.nbytes == 4 * (4 * 32 * 2048 * 64) * 2
    decoding = Cell("bf16", 16, 32, 8, 1, 4096, 128, False)
    assert decoding.nbytes == 2 * 16 * 128 * (2 * 32 * 1 + 2 * 8 * 4096)
    assert decoding.bound_by_memory
    assert not SQUARE.bound_by_memory


@pytest.mark.parametrize(("seq", "kv_seq"), [(1, 1), (3, 7), (7, 3), (5, 5), (1, 9), (9, 1)])
def test_pairs_of_a_causal_mask_are_counted_one_by_one(seq: int, kv_seq: int) -> None:
    counted = sum(key <= query for query in range(seq) for key in range(kv_seq))

    assert Cell("fp16", 1, 1, 1, seq, kv_seq, 8, True).pairs == counted
    assert Cell("fp16", 1, 1, 1, seq, kv_seq, 8, False).pairs == seq * kv_seq


def test_names_tell_cells_apart() -> None:
    assert SQUARE.name == "fp16_b4_h32_s2048_d64_full"
    assert Cell("fp16", 1, 1, 1, 5, 5, 8, False, "bshd", 30.0).name == "fp16_b1_h1_s5_d8_full_cap30_bshd"
    assert Cell("bf16", 1, 32, 8, 1, 4096, 128, True).name == "bf16_b1_h32kv8_q1kv4096_d128_causal"
    for name in PRESETS:
        cells = preset(name)
        assert len({cell.name for cell in cells}) == len(cells)


def test_presets_hold_the_cells_of_the_aim() -> None:
    prefill = preset("prefill")
    shapes = [(8, 512), (1, 2048), (4, 2048), (2, 8192), (1, 16384)]
    asked = {
        (dtype, b, 32, 32, s, d, causal)
        for dtype in ("fp16", "bf16") for b, s in shapes for d in (64, 128) for causal in (True, False)
    }  # fmt: skip
    asked |= {(dtype, 4, 32, 8, 2048, 128, causal) for dtype in ("fp16", "bf16") for causal in (True, False)}
    assert {(c.dtype, c.batch, c.heads, c.kv_heads, c.seq, c.head_size, c.causal) for c in prefill} == asked
    assert len(prefill) == 44
    decode = {(c.dtype, c.batch, c.kv_seq) for c in preset("decode")}
    assert decode == {(t, b, n) for t in ("fp16", "bf16") for b in (1, 16) for n in (4096, 32768)}
    assert all((c.seq, c.heads, c.kv_heads, c.bound_by_memory) == (1, 32, 8, True) for c in preset("decode"))
    flash3 = preset("flash3")
    assert len(flash3) == len(set(flash3)) == 2 * (11 + 6 + 4 + 5) + 6
    assert {(c.head_size, c.seq) for c in flash3 if c.v_head_size == 128} == {(192, s) for s in (512, 2048, 8192)}
    assert {(c.dtype, c.head_size) for c in flash3} == {("bf16", size) for size in (64, 96, 128, 192, 256)}
    assert {(c.head_size, c.causal) for c in flash3 if c.softcap == 50} == {
        (size, causal) for size in (64, 128, 256) for causal in (False, True)
    }
    assert {(c.batch, c.kv_seq) for c in flash3 if c.seq == 1} == {(b, n) for b in (1, 16, 64) for n in (4096, 32768)}
    assert Cell("bf16", 4, 32, 8, 2048, 2048, 128, True) in flash3
    assert len(preset("quick")) == 13


def test_cells_from_flags() -> None:
    cells = cells_from(["fp16"], [1, 2], [8], [], [16], [], [64], [True])
    assert [(c.batch, c.kv_heads, c.kv_seq) for c in cells] == [(1, 8, 16), (2, 8, 16)]
    (grouped,) = cells_from(["fp32"], [1], [8], [2], [1], [99], [80], [False])
    assert (grouped.kv_heads, grouped.kv_seq, grouped.head_size) == (2, 99, 80)
    (narrow,) = cells_from(["fp16"], [1], [8], [], [16], [], [96], [True], 64)
    assert (narrow.shape("V"), narrow.shape("K")) == ((1, 8, 16, 64), (1, 8, 16, 96))
    assert replace(narrow, v_head_size=96) == replace(narrow, v_head_size=0)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"dtype": "int8"}, "dtype 'int8' is not served: use one of fp16, bf16, fp32, fp8"),
        ({"v_head_size": 257}, "v_head_size is 257: use an integer from 1 to 256"),
        ({"head_size": 257}, "head_size is 257: use an integer from 1 to 256"),
        ({"seq": 0}, "seq is 0: use an integer from 1"),
        ({"kv_heads": 3}, "32 heads and 3 key heads: use a multiple"),
    ],
)
def test_cells_that_do_not_exist(change: dict[str, object], text: str) -> None:
    with pytest.raises(SpecError, match=text):
        replace(SQUARE, **change)  # type: ignore[arg-type]


# ------------------------------------------------------------------ figures


def test_the_median_of_medians_and_its_noise() -> None:
    rounds = [[10.0, 11.0, 99.0], [12.0], [20.0, 13.0, 13.0]]

    assert middle(rounds) == 12.0
    assert noise(rounds, resolution=0.0) == 1 / 12
    assert noise([[8.0], [8.0]]) == 0.5 / 8, "an event resolves half a microsecond"


def test_rates() -> None:
    assert tflops(2 * 10**12, 1000.0) == 2000.0
    assert gigabytes(3 * 10**9, 1e6) == 3.0
    assert [launches_of(us, 1000.0, 5, 100) for us in (0.0, 1.0, 50.0, 1e9)] == [100, 100, 20, 5]


# ------------------------------------------------------------------ results


def results(us: float = 100.0, noise: float = 0.01, cudnn: float | None = 80.0, **changes: object) -> Results:
    rows = (
        Row("ours", "ours", us, noise, 3.0, us + 1, 2e-4, "v1"),
        Row("cudnn", "cuDNN", cudnn, None if cudnn is None else 0.01, missing="" if cudnn else "no torch"),
        Row("efficient", "efficient", 150.0, 0.01),
    )
    base = Results(FACTS, Roof(3000.0, {"fp16": 700.0}), (Measured(SQUARE, rows),))
    return replace(base, **changes)  # type: ignore[arg-type]


def test_ratios_are_to_flash3_where_it_ran() -> None:
    (one,) = results().measured
    more = replace(one, rows=(*one.rows, Row("flash3", "FlashAttention-3", 60.0, 0.01)))
    assert more.baseline is more.rows[-1]
    assert more.ratio(more.rows[1]) == 60.0 / one.rows[1].us
    missing = replace(one, rows=(*one.rows, Row("flash3", "FlashAttention-3", missing="no fp16")))
    assert missing.baseline is one.rows[1]


@pytest.mark.parametrize(("layout", "strides"), [("bhsd", (576, 192, 64)), ("bshd", (576, 64, 192))])
def test_the_layout_of_a_cell(layout: str, strides: tuple[int, int, int]) -> None:
    cell = Cell("fp16", 2, 3, 3, 3, 3, 64, True, layout)
    assert cell.strides("K") == strides
    assert cell.name == "fp16_b2_h3_s3_d64_causal" + ("_bshd" if layout == "bshd" else "")
    with pytest.raises(SpecError, match="layout 'sbhd' is not timed: use one of bhsd, bshd"):
        replace(cell, layout="sbhd")


def test_ratios_are_to_cudnn_or_else_to_the_memory_efficient() -> None:
    (one,) = results().measured
    assert one.ratio(one.rows[0]) == 0.8
    assert one.ratio(one.rows[1]) == 1.0
    (other,) = results(cudnn=None).measured
    assert other.ratio(other.rows[0]) == 1.5
    assert other.ratio(other.rows[1]) is None


def test_json_comes_back_equal_and_holds_what_follows() -> None:
    made = results()
    text = made.to_json()
    assert parse_results(text, "it") == made
    cell = json.loads(text)["cells"][0]
    assert (cell["name"], cell["ratio_to"]) == ("fp16_b4_h32_s2048_d64_full", "cudnn")
    assert cell["rows"][0]["ratio"] == 0.8
    assert cell["rows"][0]["tflops"] == pytest.approx(SQUARE.flop / 100e-6 / 1e12)


def _damaged(change: str) -> str:
    data = json.loads(results().to_json())
    row = data["cells"][0]["rows"][0]
    if change == "schema":
        data["schema"] = 7
    elif change == "key":
        del row["us"]
    elif change == "text":
        row["us"] = "fast"
    elif change == "negative":
        row["us"] = -1
    elif change == "half":
        row["noise"] = None
    elif change == "cell":
        data["cells"][0]["cell"]["heads"] = 0
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "it is not JSON"),
        ("[]", "it holds no results of pyfmha bench"),
        (_damaged("schema"), "schema version 7, this pyfmha reads 1; measure again"),
        (_damaged("key"), "it is damaged .KeyError: 'us'"),
        (_damaged("text"), "damaged .ValueError: us is 'fast'"),
        (_damaged("negative"), "damaged .ValueError: us is -1"),
        (_damaged("half"), "damaged .ValueError: a time of 100.0 with a noise of None"),
        (_damaged("cell"), "damaged .SpecError: heads is 0"),
    ],
)
def test_foreign_and_damaged_results_are_refused(text: str, message: str) -> None:
    with pytest.raises(BenchError, match=message):
        parse_results(text, "it")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"cannot read .*none.json"):
        read_results(tmp_path / "none.json")


# ------------------------------------------------------------------ comparison


@pytest.mark.parametrize(
    ("old_us", "new_us", "verdict"),
    [(100.0, 103.0, "same"), (100.0, 103.1, "slower"), (103.0, 100.0, "same"), (103.1, 100.0, "faster")],
)
def test_changes_beyond_the_noise_of_both_runs(old_us: float, new_us: float, verdict: str) -> None:
    changes = compare(results(old_us, 0.01), results(new_us, 0.02), "old.json")

    ours, cudnn, _ = changes
    assert ours.ratio == old_us / new_us
    assert ours.noise == pytest.approx(0.03)
    assert ours.verdict == verdict
    assert ours.regression == (verdict == "slower")
    assert (cudnn.verdict, cudnn.ratio) == ("same", 1.0)


def test_what_no_longer_runs_is_a_regression_of_ours_only() -> None:
    fails = Row("ours", "ours", missing="it broke")
    old, new = results(), results(cudnn=None)
    new = replace(new, measured=(replace(new.measured[0], rows=(fails, *new.measured[0].rows[1:])),))

    ours, cudnn, _ = compare(old, new, "old.json")

    assert (ours.verdict, ours.regression, cudnn.verdict, cudnn.regression) == ("lost", True, "lost", False)
    assert [change.verdict for change in compare(new, old, "old.json")][:2] == ["new", "new"]


def test_a_slower_rival_is_no_regression() -> None:
    (_, cudnn, _) = compare(results(), results(cudnn=90.0), "old.json")

    assert (cudnn.verdict, cudnn.regression) == ("slower", False)


def test_runs_that_cannot_be_compared() -> None:
    with pytest.raises(BenchError, match="measured on device Other, this run on Some GPU"):
        compare(results(facts={**FACTS, "device": "Other"}), results(), "old.json")
    with pytest.raises(BenchError, match="measured on arch sm_80"):
        compare(results(facts={**FACTS, "arch": "sm_80"}), results(), "old.json")
    other = results(measured=(Measured(replace(SQUARE, batch=5), results().measured[0].rows),))
    with pytest.raises(BenchError, match="no cell in common"):
        compare(other, results(), "old.json")


# ------------------------------------------------------------------ table and picture


def printed(print_it: object, *arguments: object) -> str:
    console = Console(width=160, highlight=False, emoji=False, record=True, file=io.StringIO())
    print_it(console, *arguments)  # type: ignore[operator]
    return console.export_text()


def test_numbers_have_four_digits() -> None:
    assert [number(x) for x in (0.12345, 12.3456, 1234.56, 123456.7, None)] == ["0.123", "12.35", "1235", "123457", "-"]


def test_the_table_says_all_of_a_row() -> None:
    text = printed(print_results, results())

    rows = {
        cells[0]: cells for line in text.splitlines() if len(cells := [c.strip() for c in line[1:-1].split("│")]) > 1
    }
    assert rows["ours"][1:] == ["100.0", "1.0 %", "3.00", "101.0", "1374", "1342", "0.80", "2.0e-04", ""]
    assert "fp16_b4_h32_s2048_d64_full" in text
    assert "ratio to cuDNN" in text
    assert "device Some GPU; arch sm_90; torch not installed" in text
    assert "Roof measured here: fp16 product 700.0 TFLOP/s, copy of memory 3000 GB/s." in text
    assert "ran: v1: fp16_b4_h32_s2048_d64_full" in text


def test_missing_software_is_a_row_that_says_so() -> None:
    text = printed(print_results, results(cudnn=None, roof=Roof(note="No roof for fp16: no torch.")))

    (line,) = [line for line in text.splitlines() if "no torch " in line]
    assert line.startswith("│ cuDNN")
    assert "No roof was measured." in text
    assert "No roof for fp16: no torch." in text
    assert "ratio to efficient" in text


def test_decoding_is_told_in_parts_of_copying() -> None:
    cell = Cell("fp16", 16, 32, 8, 1, 4096, 128, False)
    us = cell.nbytes / 1500e9 * 1e6
    one = Measured(cell, (Row("ours", "ours", us, 0.01),))

    assert "50 % of copying" in printed(print_results, results(measured=(one,)))
    told = printed(print_results, results(measured=(replace(one, copy_us=0.8 * us),)))
    assert "80 % of a copy of as many bytes" in " ".join(told.replace("│", " ").split())


def test_a_copy_is_timed_where_memory_bounds() -> None:
    gpu = FakeGpu()
    decoding = replace(TINY, seq=1, causal=False)

    assert measure_cell(gpu, decoding, [], quiet).copy_us == decoding.nbytes / 1e6
    assert (
        measure_cell(gpu, replace(TINY, seq=4096, kv_seq=4096, batch=1, heads=1, kv_heads=1), [], quiet).copy_us is None
    )
    gpu.memory = False
    assert measure_cell(gpu, decoding, [], quiet).copy_us is None


@pytest.mark.parametrize("value", [0, -1.0, True, "fast"])
def test_the_time_of_a_copy_is_a_time(value: object) -> None:
    one = Measured(Cell("fp16", 1, 1, 1, 1, 64, 64, False), (), 1.0)
    data = json.loads(results(measured=(one,)).to_json())
    assert parse_results(json.dumps(data), "it").measured == (one,)
    data["cells"][0]["copy_us"] = value

    with pytest.raises(BenchError, match=r"it is damaged .*copy_us is"):
        parse_results(json.dumps(data), "it")


def test_the_comparison_is_printed() -> None:
    slower = compare(results(100.0), results(120.0), "old.json")
    text = printed(print_changes, slower, "old.json")
    assert "0.833" in text
    assert "REGRESSION" in text
    assert "1 of ours became slower" in text
    assert not print_changes(Console(quiet=True), slower, "old.json")
    assert print_changes(Console(quiet=True), compare(results(), results(), "old.json"), "old.json")


def test_panels_have_lengths_in_order_and_a_roof() -> None:
    longer = replace(SQUARE, batch=1, seq=8192, kv_seq=8192)
    shorter = replace(SQUARE, seq=512, kv_seq=512)
    decoding = Cell("fp16", 16, 32, 8, 1, 4096, 128, False)
    measured = tuple(
        Measured(cell, (Row("ours", "ours", 100.0, 0.01), Row("cudnn", "cuDNN", missing="none")))
        for cell in (longer, shorter, decoding)
    )

    panels = panels_of(results(measured=measured))

    assert [(panel.unit, panel.roof) for panel in panels] == [("TFLOP/s", 700.0), ("GB/s", 3000.0)]
    assert panels[0].title == "fp16, head size 64, full"
    assert panels[0].ticks == ("512\nbatch 4", "8192\nbatch 1")
    assert panels[0].lines == {"ours": (shorter.flop / 1e8, longer.flop / 1e8)}
    assert (panels[1].title, panels[1].ticks) == ("fp16, head size 128, full", ("4096\nbatch 16\n32/8 heads",))


def test_soft_caps_and_other_values_have_panels_of_their_own() -> None:
    cells = (SQUARE, replace(SQUARE, softcap=50.0), replace(SQUARE, head_size=192, v_head_size=128))
    measured = tuple(Measured(cell, (Row("ours", "ours", 100.0, 0.01),)) for cell in cells)

    panels = panels_of(results(measured=measured))

    assert [panel.title for panel in panels] == [
        "fp16, head size 64, full",
        "fp16, head size 64, full, soft cap 50",
        "fp16, head size 192, V of 128, full",
    ]
    assert {panel.ticks for panel in panels} == {("2048\nbatch 4",)}


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    path = tmp_path / "new" / "bench.png"

    assert save_plot(results(), path) == str(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert list(path.parent.iterdir()) == [path]


def test_no_picture_without_matplotlib_or_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert save_plot(results(measured=()), tmp_path / "x.png") == "no picture: nothing was timed"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "matplotlib is not installed" in save_plot(results(), tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []


def test_nothing_heavy_is_imported_before_a_row_asks() -> None:
    code = (
        "import sys, pyfmha.bench.command, pyfmha.verify.command\n"
        "heavy = ('torch', 'triton', 'tensorrt', 'matplotlib', 'cuda')\n"
        "assert not [name for name in heavy if name in sys.modules], sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


@pytest.mark.parametrize("name", ["cells", "figures", "results", "compare", "plot", "table", "protocol", "measure"])
def test_the_pure_parts_know_nothing_of_devices(name: str) -> None:
    source = (ROOT / "pyfmha" / "bench" / f"{name}.py").read_text()

    assert not re.search(r"^ *(from|import) (pyfmha\.runtime|pyfmha\.trt|cuda|torch)", source, re.MULTILINE)


# ------------------------------------------------------------------ measuring


def quiet(_: str) -> None:
    pass


def test_a_cell_is_measured_in_turns() -> None:
    gpu = FakeGpu()
    ours, cudnn = FakeContender("ours", gpu, (40.0, 41.0, 50.0)), FakeContender("cudnn", gpu, (8000.0,) * 3)
    titles: list[str] = []

    one = measure_cell(gpu, TINY, [ours, cudnn], titles.append)

    mine, theirs = one.rows
    assert titles == ["OURS", "CUDNN"]
    # Rounds 0 to 4 read sets 0, 1, 2, 0, 1: 40, 41, 50, 40, 41.
    assert (mine.us, mine.noise, mine.host_us, mine.graph_us) == (41.0, 9 / 41, 3.5, 40.0)
    assert (mine.variant, mine.missing, mine.wrong) == ("ours_variant", "", False)
    assert mine.error == pytest.approx(0, abs=1e-15)
    assert theirs.us == 8000.0
    assert one.ratio(mine) == 8000 / 41
    # Forth and back, so that none is always behind the one that warms the GPU most.
    forth = [("ours", MOST), ("cudnn", FEWEST)]
    turns = [turn for number in range(ROUNDS * TURNS) for turn in (forth if number % 2 == 0 else forth[::-1])]
    assert gpu.log[2:-2] == turns
    assert (ours.closed, cudnn.closed, gpu.made[0].closed) == (1, 1, True)


def test_who_cannot_gets_a_row_that_says_why() -> None:
    gpu = FakeGpu()
    contenders = [FakeContender("flash", gpu, missing="torch is not installed"), FakeContender("ours", gpu)]

    flash, ours = measure_cell(gpu, TINY, contenders, quiet).rows

    assert (flash.us, flash.missing, flash.wrong) == (None, "torch is not installed", False)
    assert ours.us == 10.0


def test_a_wrong_output_has_no_time() -> None:
    gpu = FakeGpu()
    contenders = [
        FakeContender("ours", gpu, factor=1.001),
        FakeContender("late", gpu, factor=1.001, wrong_after=20),
        FakeContender("cudnn", gpu, factor=1.001, strictness=10.0),
        FakeContender("nan", gpu, factor=float("nan")),
    ]

    ours, late, cudnn, nan = measure_cell(gpu, TINY, contenders, quiet).rows

    assert (ours.us, ours.wrong, late.us, late.wrong, nan.wrong) == (None, True, None, True, True)
    assert ours.missing == "wrong output: relative error 1.0e-03, limit 5e-04"
    assert (cudnn.us, cudnn.wrong) == (10.0, False)


def test_without_a_graph_the_other_times_stay() -> None:
    gpu = FakeGpu()

    (row,) = measure_cell(gpu, TINY, [FakeContender("ours", gpu, graph="not allowed\nsecond line")], quiet).rows

    assert (row.us, row.graph_us, row.missing) == (10.0, None, "no CUDA graph: not allowed")


def test_without_memory_every_row_says_so() -> None:
    gpu = FakeGpu(memory=False)

    (row,) = measure_cell(gpu, TINY, [FakeContender("ours", gpu)], quiet).rows

    assert "out of memory" in row.missing


def test_large_outputs_are_sampled() -> None:
    whole = sample_of(TINY)
    assert [(b, h, rows) for b, h, rows in whole] == [(b, h, [0, 1, 2, 3, 4]) for b in range(2) for h in range(4)]
    sample = sample_of(SQUARE)
    assert {(0, 0), (3, 31)} <= {(b, h) for b, h, _ in sample}
    for _, _, rows in sample:
        assert {0, 64, 127, 128, 2047} <= set(rows)
        assert len(rows) < 40
    assert sample == sample_of(SQUARE)


def test_rows_are_chosen_by_the_beginning_of_their_names() -> None:
    gpu = FakeGpu()
    contenders = [FakeContender(key, gpu) for key in ("ours", "ours-decode", "cudnn", "math")]

    assert [c.key for c in chosen(contenders, ["ours", "math"])] == ["ours", "ours-decode", "math"]
    assert chosen(contenders, []) == contenders
    with pytest.raises(SpecError, match="no row 'flash': use some of ours, ours-decode, cudnn, math"):
        chosen(contenders, ["cudnn", "flash"])
