"""Names and limits of architectures."""

import pytest

from pyfmha.errors import SpecError
from pyfmha.spec.arch import ARCHS, arch_for, parse_arch, parse_archs


@pytest.mark.parametrize("text", ["sm_90", "sm90", "90", "90a", "sm_90a", "cuda:90:32", "cuda:90", " sm_90 "])
def test_an_architecture_has_several_spellings(text: str) -> None:
    assert parse_arch(text) == ARCHS["sm_90"]


@pytest.mark.parametrize(
    "text", ["", "sm_", "sm_75", "hopper", "cuda:90:64", "hip:gfx942:64", "sm_90 sm_80", "-90", "9.0"]
)
def test_an_unknown_architecture_is_refused_with_those_known(text: str) -> None:
    with pytest.raises(
        SpecError, match="sm_80, sm_86, sm_87, sm_89, sm_90, sm_100, sm_103, sm_110, sm_120, sm_121"
    ) as caught:
        parse_arch(text)

    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "why"),
    [("sm_75", "sm_80 and later"), ("sm_70", "sm_80 and later"), ("cuda:88:32", "give one of"), ("sm_101a", "sm_110")],
)
def test_an_architecture_that_there_is_and_that_is_not_served_is_told_so(text: str, why: str) -> None:
    with pytest.raises(SpecError, match=f"architecture '{text}' is not served .*{why}"):
        parse_arch(text)


def test_several_are_sorted_by_number_and_each_taken_once() -> None:
    assert [arch.name for arch in parse_archs(["sm_120", "sm_90", "80", "cuda:90:32"])] == ["sm_80", "sm_90", "sm_120"]


def test_the_shared_memory_limits_are_those_of_the_programming_guide() -> None:
    # KiB a block may ask for: CUDA C++ Programming Guide, Technical Specifications per Compute Capability.
    kib = {
        **{"sm_80": 163, "sm_86": 99, "sm_87": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227},
        **{"sm_103": 227, "sm_110": 227, "sm_120": 99, "sm_121": 99},
    }

    assert {name: arch.shared_limit for name, arch in ARCHS.items()} == {name: 1024 * n for name, n in kib.items()}


def test_code_from_9_0_on_and_of_tegra_runs_on_its_own_capability_only() -> None:
    assert [name for name, arch in ARCHS.items() if arch.exact] == [
        "sm_87", "sm_90", "sm_100", "sm_103", "sm_110", "sm_120", "sm_121"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("gpu", "runs"),
    [
        ("sm_80", "sm_80"),
        ("sm_86", "sm_86"),
        ("sm_87", "sm_87"),
        ("sm_88", "sm_86"),
        ("sm_89", "sm_89"),
        ("sm_90", "sm_90"),
        ("sm_75", None),
        ("sm_101", None),
        ("sm_103", "sm_103"),
        ("sm_121", "sm_121"),
    ],
)
def test_the_code_that_a_gpu_runs(gpu: str, runs: str | None) -> None:
    assert arch_for(gpu, ARCHS) == runs
    assert arch_for(gpu, ["sm_86", "sm_100", "sm_120"]) == (
        "sm_86" if gpu in ("sm_86", "sm_87", "sm_88", "sm_89") else None
    )
    assert arch_for(gpu, ["sm_86", "sm_87"]) == (
        gpu if gpu == "sm_87" else "sm_86" if gpu in ("sm_86", "sm_88", "sm_89") else None
    )
    assert arch_for(gpu, ["sm_90", "sm_80"]) == (gpu if gpu == "sm_90" else "sm_80" if gpu.startswith("sm_8") else None)
