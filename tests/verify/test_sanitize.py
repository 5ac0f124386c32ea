"""What compute-sanitizer says is told, with the variant that it says it of."""

from sanitize_gpu import reports

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
