"""The family: names, specs, and which architectures compile."""

import re
from pathlib import Path

import pytest
from helpers import LONG, few_of
from shared import Shared

from pyfmha.aot import Compiler, build
from pyfmha.attention.first import DTYPES, HEAD_SIZES, Attention, family, family_specs, kernel_path
from pyfmha.errors import SpecError
from pyfmha.spec.arch import ARCHS

# One representative of each dtype and precision, and of each head size, a different one for each architecture.
SAMPLE = [
    ("sm_80", Attention("fp16", 64)),
    ("sm_80", Attention("fp32", 128, False)),
    ("sm_86", Attention("bf16", 128)),
    ("sm_86", Attention("fp32", 32, True, "tf32")),
    ("sm_89", Attention("fp16", 256, False)),
    ("sm_89", Attention("fp32", 64)),
    ("sm_90", Attention("bf16", 32, False)),
    ("sm_90", Attention("fp32", 256, True, "tf32")),
    ("sm_100", Attention("fp16", 128)),
    ("sm_100", Attention("fp32", 64, False, "tf32")),
    ("sm_120", Attention("bf16", 256)),
    ("sm_120", Attention("fp32", 32, False)),
]
QUICK = [SAMPLE[index] for index in (0, 3, 6, 11)]


def test_family_has_every_combination_once() -> None:
    members = family()

    names = [member.name for member in members]
    assert len(names) == len(set(names)) == len(HEAD_SIZES) * (len(DTYPES) + 1) * 2
    assert {"fmha_d64_fp16", "fmha_d64_fp16_full", "fmha_d64_fp32", "fmha_d64_fp32_tf32"} <= set(names)


def test_repeated_choices_count_once() -> None:
    assert family(["fp16", "fp16"], [64, 64]) == family(["fp16"], [64])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fp8", 64), r"dtype 'fp8' is not served: use one of fp16, bf16, fp32"),
        (("fp16", 80), r"head size 80 is not served: use one of 32, 64, 128, 256"),
        (("fp32", 64, True, "ieee"), r"precision 'ieee' is not served: use one of tf32x3, tf32"),
        (("fp16", 64, True, "tf32"), r"for fp32 only"),
    ],
)
def test_members_that_do_not_exist_are_refused(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Attention(*arguments)  # type: ignore[arg-type]


def test_each_member_has_a_hinted_and_a_generic_variant_of_one_algorithm() -> None:
    for member in family():
        hinted, generic = member.specs()
        assert {argument.name: argument.hint for argument in hinted.arguments if argument.hint} == dict.fromkeys(
            ["Out", "L", "M", "Q", "K", "V"], 16
        )
        assert not [argument for argument in generic.arguments if argument.hint]
        assert hinted.algorithm == generic.algorithm
        assert hinted.prototype == generic.prototype


def test_variant_names_are_unique_and_do_not_depend_on_the_source_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [spec.variant for spec in family_specs(family())]
    copy = tmp_path / "fmha_triton.py"
    copy.write_bytes(kernel_path().read_bytes())
    monkeypatch.setattr("pyfmha.attention.first.kernel_path", lambda: copy)

    after = [spec.variant for spec in family_specs(family())]

    assert after == before
    assert len(set(before)) == len(before)
    assert all(re.fullmatch(r"fmha_d\d+_\w+_(hinted|generic)_[0-9a-f]{8}", name) for name in before)


@pytest.mark.parametrize("batch_heads", [(1, 1), (8, 32), (2, 32767), (2, 32768), (3, 65535)])
def test_the_grid_covers_every_head_within_the_hardware_limits(batch_heads: tuple[int, int]) -> None:
    batch, heads = batch_heads
    spec = Attention("fp16", 64).specs()[0]

    x, y, z = (e.evaluate({"seq_len": 129, "batch_size": batch, "num_heads": heads}) for e in spec.grid_expressions)

    assert x == -(-129 // dict(spec.constants)["BLOCK_M"])
    assert y * z >= batch * heads
    assert max(y, z) <= 65535


@pytest.mark.parametrize(
    ("arch", "member"), few_of(SAMPLE, QUICK.__contains__), ids=lambda value: getattr(value, "name", value)
)
def test_the_family_compiles_within_each_architectures_limits(
    arch: str, member: Attention, compiler: Compiler, shared: Shared
) -> None:
    """A sample; ``examples/maintainers/compile_all.py`` compiles every member for every architecture."""
    cubin = shared.compile(compiler, member.specs()[0], ARCHS[arch])

    assert 0 < cubin.shared <= ARCHS[arch].shared_limit
    assert 0 < cubin.registers <= 255
    assert cubin.symbol == "fused_attention_kernel"


@pytest.mark.parametrize(
    "members",
    [
        pytest.param(family(["fp16"], [32]), id="fp16 32"),
        pytest.param(family(), id="whole", marks=LONG),
    ],
)
def test_the_family_builds_and_a_second_time_not_at_all(members: list[Attention], tmp_path: Path) -> None:
    """Without what the run has compiled elsewhere."""
    specs, arch = family_specs(members), [ARCHS["sm_90"]]

    built = build(specs, arch, tmp_path)

    assert built.compiled == len(specs) == 2 * len(members)
    for _, _, variant in built.manifest.variants():
        assert all(image.shared <= image.shared_limit for image in variant.images), variant.name
    again = build(specs, arch, tmp_path)
    assert again.up_to_date
    assert again.compiled == 0
