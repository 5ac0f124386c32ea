"""What people read of a library."""

import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from pyfmha.report import audit, progress_bar
from pyfmha.spec.manifest import Manifest, parse_manifest, read_manifest


@pytest.fixture
def manifest(small_library_path: Path) -> Manifest:
    """That of the small library."""
    return read_manifest(small_library_path.with_suffix(".json"))


def printed(manifest: Manifest, width: int) -> list[str]:
    console = Console(width=width, highlight=False)
    with console.capture() as captured:
        console.print(audit(manifest))
    return captured.get().splitlines()


def test_the_audit_is_complete_and_whole_on_80_columns(manifest: Manifest) -> None:
    lines = printed(manifest, 80)

    assert max(map(len, lines)) <= 80
    assert lines[1].split() == ["arch", "regs", "spill", "B", "shared", "B", "limit", "B", "KB", "ptxas"]
    for _, algo_id, variant in manifest.variants():
        at = lines.index(f"{variant.name}, algo {algo_id}")
        for image, line in zip(variant.images, lines[at + 1 :], strict=False):
            counts = [image.registers, image.spilled, image.shared, image.shared_limit, round(image.size / 1024)]
            assert line.split() == [image.arch, *map(str, counts), image.ptxas]
    assert len(lines) == 2 + sum(1 + len(variant.images) for _, _, variant in manifest.variants())


def test_columns_stand_under_their_headings(manifest: Manifest) -> None:
    lines = printed(manifest, 80)

    numbers = [[found.end() for found in re.finditer(r"\b\d+\b", line)][:5] for line in lines if "  sm_" in line]
    headings = [found.end() for found in re.finditer(r"regs|spill B|shared B|limit B|KB", lines[1])]
    assert numbers == [headings] * len(numbers)


def test_the_audit_prints_markup_and_large_numbers_as_they_are(manifest: Manifest) -> None:
    content = json.loads(manifest.to_json())
    content["pyfmha"], content["triton"] = "1[/b]", "[red]3[/red] :smile:"
    content["functions"][0]["algorithms"][0][0]["name"] = "v" * 100
    content["functions"][0]["algorithms"][0][0]["images"][0] |= {"size": (1 << 63) - 1, "spilled": (1 << 63) - 1}

    text = "".join(printed(parse_manifest(json.dumps(content), "here"), 80))

    assert "1[/b] and Triton [red]3[/red] :smile:" in text
    assert "v" * 100 in text
    assert str((1 << 63) - 1) in text


def test_an_empty_library_has_an_audit_too() -> None:
    assert printed(Manifest("id", "0", "3", ()), 80)[0] == "Library id, built by pyfmha 0 and Triton 3"


def test_progress_takes_names_as_they_are() -> None:
    console = Console(width=80, force_terminal=True)
    with console.capture() as captured, progress_bar(console, "compiling") as progress:
        progress(1, 2, "[/x]")
    assert "[/x]" in captured.get()


def test_progress_of_nothing_is_no_error() -> None:
    """Where a library holds nothing of what was asked for, the error that says so comes after this."""
    console = Console(width=80, force_terminal=False)
    with console.capture() as captured, progress_bar(console, "checking") as progress:
        progress(0, 0, "")
    assert captured.get() == "checking: 0 to do\n"
