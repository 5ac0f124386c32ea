"""The family of functions with biases and masks: what is compiled, which variant serves a call, what a call holds."""

from dataclasses import replace
from typing import Any

import pytest

from pyfmha.attention.biased import ABSENT, ARGUMENTS, POINTERS, Biased, BiasedCall, biased_family, broadcast_strides
from pyfmha.attention.families import DEFAULT, library_specs
from pyfmha.attention.forward import Forward
from pyfmha.errors import SpecError
from pyfmha.spec.conditions import parse_condition
from pyfmha.spec.kernel import KernelSpec


def test_functions_are_those_of_the_next_padded_size() -> None:
    assert Biased("bf16", 72).name == "fmha_biased_d128_bf16"
    assert len(biased_family()) == 12
    assert BiasedCall(1, 1, 1, 1, 1, 64, 1.0, v_head_size=72).padded == 128
    with pytest.raises(SpecError, match="257"):
        Biased("fp16", 257)


def test_the_functions_without_are_what_they_were() -> None:
    """Engines name variants by these names."""
    assert [spec.variant for spec in Forward("fp16", 64).specs()] == [
        "fmha_fwd_d64_fp16_64x64x64x128_w4s3_hinted_ea0c7dec",
        "fmha_fwd_d64_fp16_64x64x64x128_w4s3_hinted_ac666051",
        "fmha_fwd_d64_fp16_32x64x32x128_w8s1_generic_6b4ed082",
    ]


def test_every_call_is_served_and_the_default_library_is_as_it_was() -> None:
    for function in biased_family():
        assert function.specs()[-1].unconditional
    assert "biased" not in DEFAULT
    names = {spec.name for spec in library_specs(DEFAULT) if "biased" in spec.name}
    assert names == {"fmha_biased_d256_fp16", "fmha_biased_d256_bf16"}
    names = {spec.name for spec in library_specs(["biased"], ["fp16"], [64, 100])}
    assert names == {f"fmha_biased_{step}d{size}_fp16" for step in ("", "split_", "combine_") for size in (64, 128)}


def serving(function: Biased, pointers: dict[str, int], call: BiasedCall) -> tuple[str, str, str, int]:
    """The constants SOFTCAP, BIAS, MASK and BLOCK_V of the portable variant that takes a call."""
    constants = dict(taking([spec for spec in function.specs() if not spec.archs], pointers, call).constants)
    return constants["SOFTCAP"], constants["BIAS"], constants["MASK"], constants["BLOCK_V"]


def taking(specs: list[KernelSpec], pointers: dict[str, int], call: BiasedCall) -> KernelSpec:
    """The variant that takes a call."""
    values = dict.fromkeys(POINTERS, 0) | dict.fromkeys(("Out", "Lse", "Q", "K", "V"), 256) | pointers
    values |= dict(zip([name for name, _ in ARGUMENTS][len(POINTERS) :], call.scalars(), strict=True))
    types = dict(specs[0].prototype)
    for spec in specs:
        hints = {a.name: a.hint for a in spec.arguments if a.hint}
        if any(values[n] != 1 if hint == 1 else values[n] % hint for n, hint in hints.items()):
            continue
        if all(parse_condition(text, types).holds(values) for text in spec.requires):
            return spec
    raise AssertionError("no variant serves it")


def call(**options) -> BiasedCall:
    rows = (2**16, 2**12, 64)
    usual = {"q_strides": rows, "k_strides": rows, "v_strides": rows, "out_strides": rows}
    return BiasedCall(1, 2, 2, 64, 64, options.pop("head_size", 64), 0.125, **(usual | options))


FULL = broadcast_strides((1, 2, 64, 64), (1, 2, 64, 64))
KEYS = (64, 0, 0, 1)


@pytest.mark.parametrize(
    ("pointers", "options", "expected"),
    [
        ({"Sinks": 2}, {"window_right": 0}, ("never", "never")),
        ({"Bias": 2}, {"bias_strides": KEYS}, ("keys", "never")),
        ({"Mask": 1}, {"mask_strides": KEYS}, ("never", "keys")),
        ({"Mask": 256}, {"mask_strides": FULL}, ("never", "tile")),
        ({"Bias": 256}, {"bias_strides": FULL}, ("tile", "never")),
        ({"BiasFp32": 256}, {"bias_strides": KEYS}, None),
        ({"Mask": 1, "Bias": 2}, {"mask_strides": KEYS, "bias_strides": KEYS}, None),
        ({}, {"softcap": 2.0}, None),
        ({}, {"v_head_size": 60}, None),
    ],
)
def test_which_variant_serves_on_hopper(pointers: Any, options: Any, expected: Any) -> None:
    spec = taking(list(Biased("fp16", 64).specs()), pointers, call(**options))
    constants = dict(spec.constants)
    assert ((constants.get("BIAS", "never"), constants.get("MASK", "never")) if spec.archs else None) == expected


@pytest.mark.parametrize(
    ("pointers", "options", "expected"),
    [
        ({"Sinks": 2}, {"window_right": 0}, ("fmha_sinks_sm90", False, True)),
        ({"SinksFp32": 4}, {}, ("fmha_sinks_sm90", False, False)),
        ({"Sinks": 2}, {"window_right": 0, "window_left": 9}, ("fmha_biased_sm90", True, True)),
        ({"Sinks": 2}, {"v_head_size": 32}, ("fmha_biased_sm90", False, False)),
        ({"Bias": 2}, {"bias_strides": KEYS}, ("fmha_biased_sm90", False, False)),
        ({"Mask": 256}, {"mask_strides": FULL, "window_right": 0}, ("fmha_biased_sm90", False, True)),
        ({"Bias": 256}, {"bias_strides": FULL}, ("fmha_biased_sm90", False, False)),
        ({"Bias": 256, "q_lengths": 4}, {"bias_strides": FULL}, ("fmha_biased_sm90", True, True)),
        ({"BiasFp32": 256}, {"bias_strides": FULL}, None),
    ],
)
def test_how_the_variant_that_serves_on_hopper_is_made(pointers: Any, options: Any, expected: Any) -> None:
    """The kernel, and its constants GENERAL and CAUSAL."""
    spec = taking(list(Biased("fp16", 64).specs()), pointers, call(**options))
    constants = dict(spec.constants)
    assert ((spec.kernel, constants["GENERAL"], constants["CAUSAL"]) if spec.archs else None) == expected


@pytest.mark.parametrize(
    ("pointers", "options", "expected"),
    [
        ({}, {}, ("fmha_values_sm90", False)),
        ({}, {"window_right": 0, "bottom_right": True, "num_kv_heads": 1}, ("fmha_values_sm90", True)),
        ({}, {"head_size": 136, "v_head_size": 8}, ("fmha_values_sm90", False)),
        ({"Lse": 0}, {"sm_scale": 3.0}, ("fmha_values_sm90", False)),
        ({}, {"v_head_size": 136}, None),
        ({}, {"v_head_size": 124}, None),
        ({}, {"head_size": 200}, None),
        ({}, {"head_size": 188}, None),
        ({}, {"window_left": 9, "window_right": 0}, None),
        ({}, {"softcap": 2.0}, None),
        ({}, {"sm_scale": -1.0}, None),
        ({"Sinks": 2}, {}, None),
        ({"SinksFp32": 4}, {}, None),
        ({"Mask": 256}, {}, None),
        ({"Bias": 256}, {}, None),
        ({"BiasFp32": 256}, {}, None),
        ({"kv_lengths": 4}, {}, None),
        ({"q_lengths": 4}, {}, None),
        ({"cu_seqlens_q": 4, "cu_seqlens_kv": 4}, {"ragged": True}, None),
    ],
)
def test_which_variant_serves_values_of_a_smaller_size_on_hopper(pointers: Any, options: Any, expected: Any) -> None:
    """The kernel, and its constant CAUSAL."""
    usual = {"head_size": 192, "v_head_size": 128}
    spec = taking(list(Biased("bf16", 192).specs()), pointers, replace(call(**usual), **usual | options))
    assert ((spec.kernel, dict(spec.constants)["CAUSAL"]) if spec.archs else None) == expected


@pytest.mark.parametrize(
    ("q_len", "causal", "expected"),
    [
        (1, True, (1, True)),
        (1024, True, (1, True)),
        (1025, True, (2, True)),
        (4097, True, (2, True)),
        (1024, False, (2, False)),
        (4097, False, (2, False)),
    ],
)
def test_how_smaller_values_are_cut(q_len: int, causal: bool, expected: tuple[int, bool]) -> None:
    """Consumers, and whether tiles are dealt out evenly."""
    one = replace(call(head_size=192, v_head_size=128), q_len=q_len, window_right=0 if causal else -1)
    constants = dict(taking(list(Biased("fp16", 192).specs()), {}, one).constants)
    assert (constants["CONSUMERS"], constants.get("EVEN") == 2) == expected
    assert ("HANDED_ON" in constants) == expected[1]
    assert constants["APART"] == (constants["CONSUMERS"] == 2)


def test_a_library_may_have_those_for_smaller_values_and_add_the_others_later() -> None:
    """In either order: all that is built for them the whole family has, too."""
    few, all_of_it = (library_specs([family], ["bf16", "fp32"], [192]) for family in ("values", "biased"))
    assert {spec.name for spec in few} == {"fmha_biased_d256_bf16"}
    assert {spec.variant for spec in few} < {spec.variant for spec in all_of_it}
    assert few[-1].unconditional
    assert [spec.variant for spec in library_specs(["values", "biased"], ["bf16", "fp32"], [192])] == [
        spec.variant for spec in all_of_it
    ]
    usual = {"head_size": 192, "v_head_size": 128}
    ragged = call(**usual, ragged=True)
    lengths = {"cu_seqlens_q": 4, "cu_seqlens_kv": 4}
    assert dict(taking(few, lengths, ragged).constants)["BLOCK_V"] == 128
    assert dict(taking(few, {"Mask": 256}, call(**usual)).constants)["MASK"] == "any"
    with pytest.raises(SpecError, match="nothing to build"):
        library_specs(["values"], ["bf16"], [128])


def test_hopper_variants_exist_of_head_sizes_that_have_run() -> None:
    for dtype, size, count in (("fp16", 64, 22), ("bf16", 128, 19), ("fp16", 256, 3), ("fp16", 32, 0), ("fp32", 64, 0)):
        assert sum(spec.archs == ("sm_90",) for spec in Biased(dtype, size).specs()) == count


@pytest.mark.parametrize(
    ("pointers", "options", "expected"),
    [
        ({}, {}, ("never", "never", "never")),
        ({"Sinks": 2}, {}, ("never", "never", "never")),
        ({"Bias": 256}, {"bias_strides": FULL}, ("never", "own", "never")),
        ({"Bias": 256}, {"bias_strides": (0, 0, 0, 1)}, ("never", "own", "never")),
        ({"Bias": 256}, {"bias_strides": FULL, "softcap": 2.0}, ("any", "any", "any")),
        ({"Bias": 258}, {"bias_strides": FULL}, ("any", "any", "any")),
        ({"Bias": 256}, {"bias_strides": (0, 0, 1, 0)}, ("any", "any", "any")),
        ({"BiasFp32": 256}, {"bias_strides": FULL}, ("any", "any", "any")),
        ({"Mask": 256}, {"mask_strides": FULL}, ("never", "never", "always")),
        ({"Mask": 256}, {"mask_strides": (0, 0, 65, 1)}, ("any", "any", "any")),
        ({"Mask": 256, "Bias": 256}, {"mask_strides": FULL, "bias_strides": FULL}, ("any", "any", "any")),
        ({"Q": 258}, {}, ("any", "any", "any")),
        ({}, {"v_head_size": 60}, ("any", "any", "any")),
    ],
)
def test_which_variant_serves(pointers, options, expected) -> None:
    assert serving(Biased("fp16", 64), pointers, call(**options))[:3] == expected


def test_narrow_values_have_a_variant_of_their_own() -> None:
    assert serving(Biased("bf16", 192), {}, call(head_size=192, v_head_size=128)) == ("never", "never", "never", 128)
    assert serving(Biased("bf16", 192), {}, call(head_size=192)) == ("never", "never", "never", 256)


def test_tensors_may_be_absent_and_the_rest_may_not() -> None:
    for spec in Biased("fp16", 64).specs():
        needed = {argument.name: condition and condition.text for argument, condition in spec.needed_pointers()}
        assert needed == {
            "Out": "q_len == 0", "Q": "q_len == 0", "K": "kv_len == 0", "V": "kv_len == 0",
            "cu_seqlens_q": "ragged == 0", "cu_seqlens_kv": "ragged == 0",
        }  # fmt: skip


def test_scalars_follow_the_arguments() -> None:
    scalars = call(v_head_size=32, bias_strides=(9, 8, 7, 6), mask_strides=(5, 4, 3, 2)).scalars()
    given = dict(zip([name for name, _ in ARGUMENTS][len(POINTERS) :], scalars, strict=True))

    assert (given["head_size"], given["v_head_size"], given["ragged"]) == (64, 32, 0)
    assert [given[f"bias_stride_{axis}"] for axis in "bhqk"] == [9, 8, 7, 6]
    assert [given[f"mask_stride_{axis}"] for axis in "bhqk"] == [5, 4, 3, 2]
    assert call().bias_strides == ABSENT


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((2, 4, 3, 5), (60, 15, 5, 1)),
        ((1, 4, 3, 5), (0, 15, 5, 1)),
        ((4, 1, 5), (0, 5, 0, 1)),
        ((3, 5), (0, 0, 5, 1)),
        ((5,), (0, 0, 0, 1)),
        ((2, 1, 1, 1), (1, 0, 0, 0)),
        ((3, 1), (0, 0, 1, 0)),
    ],
)
def test_broadcasting(shape, expected) -> None:
    assert broadcast_strides(shape, (2, 4, 3, 5)) == expected


@pytest.mark.parametrize("shape", [(3, 4, 3, 5), (2, 4, 5, 3), (1, 2, 4, 3, 5), ()])
def test_what_cannot_be_broadcast(shape) -> None:
    with pytest.raises(SpecError, match=r"mask is \[.*use \[batch or 1, query heads or 1, queries or 1, keys or 1\]"):
        broadcast_strides(shape, (2, 4, 3, 5), "mask")


def test_one_key_is_no_reason_for_the_slow_variant() -> None:
    assert broadcast_strides((1, 1, 3, 1), (1, 1, 3, 1)) == (0, 0, 1, 1)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"v_head_size": 257}, "v_head_size is 257"),
        ({"bias_strides": (1, 2)}, "give four"),
        ({"mask_strides": (0, 0, 0, 2**63)}, "mask_strides is"),
    ],
)
def test_what_a_call_refuses(options, text) -> None:
    with pytest.raises(SpecError, match=text):
        call(**options)
