"""README.md: its length, every block of code, its links, and its figures. Of the rooms' README.md: code and links."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_cuda import FakeCuda
from helpers import TESTS
from shared import Shared
from trt_double.full.fixtures import example_environment
from trt_double.scene import specs
from typer.main import get_command

from pyfmha.aot import build
from pyfmha.attention.families import DEFAULT, library_specs
from pyfmha.attention.first import DTYPES, HEAD_SIZES, Attention
from pyfmha.cli.main import app
from pyfmha.spec.arch import ARCHS, parse_archs

ROOT = TESTS.parent
README = ROOT / "README.md"
RESULTS = ROOT / "examples" / "results"
PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("pyfmha/*/README.md")),
    *ROOT.glob("examples/**/README.md"),
]


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every command of the indented blocks."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for block in re.findall(r"(?:^    .*\n)+", text, re.MULTILINE):
        for line in re.split(r"\n|&&", block.replace("\\\n", " ").strip()):
            yield shlex.split(line, comments=True)


def test_it_is_short() -> None:
    lines = README.read_text().splitlines()

    assert len(lines) <= 200
    assert [line for line in lines if len(line) > 120] == []


ORDER = ["Status", "When to use it, and when not", "Install", "Four ways in", "Not supported", "Where things are"]


def test_its_order_is_that_of_a_readers_questions() -> None:
    text = README.read_text()

    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == ORDER
    pictures = [Path(name).suffix for name in re.findall(r"^!\[.+\]\((.+)\)$", text.partition("## Status")[0], re.M)]
    assert pictures == [".svg", ".png"]


@pytest.fixture(scope="module")
def library(shared: Shared) -> Path:
    """What the README's ``pyfmha build`` makes, but for the kernels: the first one, in small blocks."""
    wanted = specs([Attention("fp16", 64)])
    return shared.once("readme", lambda folder: build(wanted, parse_archs(["sm_90"]), folder, jobs=1).library)


def block_of(way: str) -> str:
    """The code of one of the four ways in."""
    (found,) = [block for block in python_blocks(README) if way in block]
    return found


def run(*command: str, folder: Path, driver: FakeCuda | None, library: Path | None) -> subprocess.CompletedProcess[str]:
    environment = example_environment(None if driver is None else driver.path, library)
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


CHECKED = """
from pyfmha.attention.reference import attention_float64, relative_error
exact = attention_float64(*given, sm_scale=0.125, causal=True).out
assert out.dtype == exact.astype("float16").dtype and relative_error(out, exact) < 5e-4
"""
GIVEN = {"tensorrt": "given = [np.ones((2, 8, 128, 64), np.float16)] * 3", "DirectSession": "given = [q, k, v]"}


@pytest.mark.parametrize("way", GIVEN)
def test_a_network_and_the_library_compute_attention(
    way: str, tmp_path: Path, fake_driver: FakeCuda, library: Path
) -> None:
    code = block_of(way) + GIVEN[way] + CHECKED
    done = run(sys.executable, "-c", code, folder=tmp_path, driver=fake_driver, library=library)

    assert done.returncode == 0, done.stderr


@pytest.mark.long  # as tests/onnx_models, which make test has much of
def test_a_model_is_made_and_its_attention_replaced(tmp_path: Path, library: Path) -> None:
    made = run(sys.executable, "-c", block_of("onnx"), folder=tmp_path, driver=None, library=None)
    assert made.returncode == 0, made.stderr
    (command,) = [words for words in commands(README) if words[:2] == ["pyfmha", "onnx"]]

    done = run(sys.executable, "-m", *command, folder=tmp_path, driver=None, library=library)

    assert done.returncode == 0, done.stderr
    assert "1 of 1 replaced, the same in 3 runs" in done.stdout
    assert (tmp_path / "model.pyfmha.onnx").is_file()


def test_pytorch_on_a_cpu(tmp_path: Path) -> None:
    """torch 2.14 pins another Triton than a build's: it may be in an environment of its own."""
    python = sys.executable if importlib.util.find_spec("torch") else os.environ.get("PYFMHA_TORCH_PYTHON")
    if python is None:
        pytest.skip("needs torch: pip install torch; or set PYFMHA_TORCH_PYTHON to a Python with torch and cuda-python")
    code = block_of("pyfmha.torch") + "assert out.shape == q.shape and (out.float() - same.float()).abs().max() < 5e-3"
    done = run(python, "-c", code, folder=tmp_path, driver=None, library=None)

    assert done.returncode == 0, done.stderr


def test_every_block_is_one_of_these() -> None:
    blocks = {block_of(way) for way in ("tensorrt", "onnx", "pyfmha.torch", "DirectSession")}
    assert set(python_blocks(README)) == blocks


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_code_of_a_page_is_python(page: Path) -> None:
    for block in python_blocks(page):
        compile(block, named(page), "exec")


PROGRAMS = {"pip", "make", "python", "trtexec", "gcc", "g++", "jupyter", "bash"}
"""Others than pyfmha that a page may tell to run."""


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_of_a_page_exist(page: Path) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"`make\s+([\w-]+)", page.read_text())) <= set(targets)
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    for program, *arguments in commands(page):
        if program == "pyfmha":
            name, *rest = arguments
            get_command(app).commands[name].make_context(name, rest)  # type: ignore[attr-defined]
        elif program == "make":
            assert [target for target in arguments if "=" not in target and target not in targets] == []
        elif program == "python":
            assert (ROOT / arguments[0]).is_file(), arguments
        else:
            assert program in PROGRAMS, program
    assert set(re.findall(r"'\.\[(\w+)\]'", page.read_text())) <= set(extras)


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_files_that_a_page_names_exist(page: Path) -> None:
    named_files = re.findall(r"`((?:pyfmha|kernels|examples|tests)/[\w./]+\.\w+)`", page.read_text())
    assert [name for name in named_files if not (ROOT / name).is_file()] == []


def test_the_picture_is_the_programs() -> None:
    program = ROOT / "examples" / "maintainers" / "draw_flow.py"
    spec = importlib.util.spec_from_file_location("draw_flow", program)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "examples" / "flow.svg").read_text() == module.picture(), "run examples/maintainers/draw_flow.py"


def ratios(file: str, other: str, where: str = "") -> list[float]:
    """The other's time over ours, in every cell that has both."""
    found = []
    for cell in json.loads((RESULTS / file).read_text())["cells"]:
        times = {row["contender"]: row["us"] for row in cell["rows"]}
        if where in cell["name"] and times.get("ours") and times.get(other):
            found.append(times[other] / times["ours"])
    return found


def test_figures_are_those_of_the_results() -> None:
    low, high = re.search(r"(\d\.\d\d) to\s+(\d\.\d\d)\s+times its speed", README.read_text()).groups()
    measured = ratios("h100_prefill.json", "cudnn")

    assert len(measured) == 44
    assert (f"{min(measured):.2f}", f"{max(measured):.2f}") == (low, high)
    # Beside FlashAttention-3, prefill in both layouts: all cells but two kinds, which are told apart.
    low, high, narrow, capped = re.search(
        r"has (\d\.\d\d) to (\d\.\d\d) of FlashAttention-3's speed, but (\d\.\d\d) in .*? and\s+(\d\.\d\d) with soft",
        README.read_text(),
        re.DOTALL,
    ).groups()
    kinds: dict[str, list[float]] = {"_s8192_d96_causal": [], "_s2048_d128_causal_cap50": [], "": []}
    for file in ("h200_flash3.json", "h200_flash3_bhsd.json"):
        for cell in json.loads((RESULTS / file).read_text())["cells"]:
            us = {row["contender"]: row["us"] for row in cell["rows"]}
            if "_q1kv" not in cell["name"]:
                kinds[next(kind for kind in kinds if kind in cell["name"])].append(us["flash3"] / us["ours"])
    assert [len(found) for found in kinds.values()] == [2, 2, 100]
    assert [f"{min(found):.2f}" for found in kinds.values()] == [narrow, capped, low]
    assert f"{max(kinds['']):.2f}" == high


def test_what_ran_is_in_the_results() -> None:
    text = README.read_text()
    table = (RESULTS / "onnx_models.md").read_text()
    proven = re.findall(r"^\| (.+?) \|.*\| same, [^|]* \|$", table, re.MULTILINE)
    found = re.findall(r"\[(\w+) models\]\(examples/results/(\w+)", text)
    said = {what: {"three": 3}.get(word) or int(word) for word, what in found}

    assert said["onnx_models"] == len({name.partition(",")[0] for name in proven})
    assert "DIFFERENT" not in table
    assert said["README"] == len(json.loads((RESULTS / "h200_models.json").read_text())["models"])
    devices = {json.loads(file.read_text()).get("facts", {}).get("driver", "580") for file in RESULTS.glob("h*.json")}
    assert {driver.partition(".")[0] for driver in devices if driver != "13.0"} == {"580"}
    assert "sm_90 ran on 580 (CUDA 13.0)" in text
    first, last = re.search(r"(sm_\d+) to (sm_\d+) are compiled", text).groups()
    assert (first, last) == (min(ARCHS, key=ARCHS.__getitem__), max(ARCHS, key=ARCHS.__getitem__))


def test_what_an_install_takes_is_measured() -> None:
    sizes = json.loads((RESULTS / "wheel.json").read_text())["installed_mb"]
    run = int(re.search(r"To \*\*run\*\* only \((\d+) MB", README.read_text())[1])
    build = float(re.search(r"To \*\*build\*\* libraries \(.*?([\d.]+) GB\)", README.read_text())[1])

    assert run == pytest.approx(sizes["run"], rel=0.1)
    assert build == pytest.approx(sizes["aot"] / 1000, rel=0.1)
    assert f"# What running a built library needs, and the commands: {run} MB." in (ROOT / "pyproject.toml").read_text()


def test_the_wheels_size_and_time_are_measured() -> None:
    """But for the variants gained since: sm_90 by its library, elsewhere those of ``values`` by their machine code."""
    wheel, library, minutes = map(
        int,
        re.search(
            r"wheel has (\d+) MB; its library has (\d+) MB and takes a core (\d+) minutes", README.read_text()
        ).groups(),
    )
    measured = json.loads((RESULTS / "wheel.json").read_text())
    sizes = measured["sm_90_library_bytes"]
    values = measured["values"]
    assert list(values["code_bytes"]) == measured["archs"]
    now = str(variants_of_sm_90())
    gained = sizes[now] - sizes[str(measured["variants"])]
    gained += sum(size for arch, size in values["code_bytes"].items() if arch != "sm_90")
    seconds = {arch: measured["seconds"][arch] + values["cpu_seconds"][arch] for arch in measured["archs"]}
    seconds["sm_90"] = measured["sm_90_cpu_seconds"][now]
    packed = measured["library_bytes_in_the_wheel"] / measured["library_bytes"]

    assert library == round((measured["library_bytes"] + gained) / 1e6)
    assert wheel == round((measured["wheel_bytes"] + packed * gained) / 1e6)
    assert minutes == round(sum(seconds.values()) / 60)
    archs = re.search(r"^WHEEL_ARCHS \?= (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert list(measured["seconds"]) == measured["archs"] == archs
    said = re.search(r"library for (sm_\d+[\d, and\s]+)", README.read_text())[1]
    assert re.findall(r"\d+", said) == [arch.removeprefix("sm_") for arch in archs]


def variants_of_sm_90() -> int:
    """Of the default build."""
    variants = library_specs(DEFAULT, DTYPES, HEAD_SIZES)
    return sum(not spec.archs or "sm_90" in spec.archs for spec in variants)


def test_when_eight_bits_pay_is_what_was_measured() -> None:
    """From 2048 keys on: bf16 over eight bits, and eight bits over eight bits, FlashAttention-3's over ours."""
    us = {}
    for cell in json.loads((RESULTS / "h200_fp8.json").read_text())["cells"]:
        for row in cell["rows"]:
            key = (cell["cell"]["dtype"], cell["cell"]["head_size"], cell["cell"]["causal"], row["contender"])
            if cell["cell"]["seq"] >= 2048:
                us.setdefault(key, []).append(row["us"])
    text = (ROOT / "pyfmha" / "attention" / "README.md").read_text()
    for size in (64, 128, 256):
        for other in ("bf16", "fp8"):
            full, causal = (
                " / ".join(
                    f"{theirs / ours:.2f}"
                    for theirs, ours in zip(us[other, size, mask, "flash3"], us["fp8", size, mask, "ours"], strict=True)
                )
                for mask in (False, True)
            )
            assert f"| {size} | {full} | {causal} |" in text


def test_how_fast_smaller_values_are_is_what_was_measured() -> None:
    speeds = []
    for file in ("h200_flash3.json", "h200_flash3_bhsd.json"):
        for cell in json.loads((RESULTS / file).read_text())["cells"]:
            if cell["cell"]["v_head_size"] and cell["cell"]["seq"] >= 2048:
                times = {row["contender"]: row["us"] for row in cell["rows"]}
                speeds.append(times["flash3"] / times["ours"])
    text = re.sub(r"\s+", " ", (ROOT / "pyfmha" / "attention" / "README.md").read_text())
    assert f"run at {min(speeds):.2f} to {max(speeds):.2f} of FlashAttention-3's speed" in text


def test_the_number_of_variants_is_that_of_the_default_build() -> None:
    (said,) = set(re.findall(r"all (\d+) variants", README.read_text()))
    assert variants_of_sm_90() == int(said)
