"""What compute-sanitizer says is told, with the variant that it says it of."""

import os
import sys
from pathlib import Path

import pytest
from sanitize_gpu import reports, sanitizers

TEXT = """========= COMPUTE-SANITIZER
right: fmha_a, bias; 0.5 s
========= Error: Race reported between Write access at 0x150 in kernel and Read access at 0x260 in kernel [8 hazards]
=========     Saved host backtrace up to driver entry point at kernel launch time
right: fmha_b, mask; 0.9 s
========= Barrier error detected. Missing wait.
========= Invalid __global__ read of size 4 bytes
WRONG: fmha_c, sinks; 1.2 s it wrote outside its outputs
right: fmha_d, alibi, causal; 1.3 s
========= Program hit CUDA_ERROR_INVALID_VALUE (error 1)
========= ERROR SUMMARY: 3 errors
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""


def test_each_report_is_of_the_variant_whose_line_follows() -> None:
    told = list(reports(TEXT))
    assert [one.split(": ")[0] for one in told[:-1]] == ["fmha_b", "fmha_c", "fmha_c"]
    assert "Race reported" in told[0]
    assert "Missing wait" in told[1]
    assert "Invalid __global__ read" in told[2]
    assert told[3].startswith("========= Program hit")
    assert len(told) == 4
    assert list(reports("========= ERROR SUMMARY: 0 errors\nright: fmha_a, bias; 1 s\n")) == []


def test_the_newest_program_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the package before the toolkit's, which is on the PATH; 2026.10 before 2026.4."""
    places = {
        "bin": "2025.3.1.0",
        "a/nvidia/cu13/compute-sanitizer": "2026.4.0.0",
        "b/nvidia/cu13/compute-sanitizer": "2026.10",
    }
    for folder, version in places.items():
        program = tmp_path / folder / "compute-sanitizer"
        program.parent.mkdir(parents=True)
        program.write_text(f"#!/bin/sh\necho 'NVIDIA (R) Compute Sanitizer'\necho 'Version {version} (build 1)'\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "a"), str(tmp_path / "b")])

    mine = [one for one in sanitizers() if one[0].startswith(str(tmp_path))]
    assert [version for _, version in mine] == ["2026.10", "2026.4.0.0", "2025.3.1.0"]
