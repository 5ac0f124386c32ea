"""The table of types."""

import ctypes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyfmha.errors import SpecError
from pyfmha.spec.abi import ELEMENT_SIZES, SCALARS, canonical, ctype

C_SIZES = {"float": 4, "double": 8, **{f"{u}int{bits}_t": bits // 8 for u in ("", "u") for bits in (8, 16, 32, 64)}}


@pytest.mark.parametrize("name", SCALARS)
def test_ctypes_and_c_agree_on_a_scalars_size(name: str) -> None:
    entry = ctype(name)

    assert ctypes.sizeof(entry.ctypes) == C_SIZES[entry.c]


@pytest.mark.parametrize(
    "name", [name for name, entry in SCALARS.items() if entry.kind == "integer" and name[1:] != "1"]
)
def test_the_bounds_of_an_integer_are_those_of_its_c_type(name: str) -> None:
    entry = ctype(name)
    low, high = entry.bounds or (0, 0)

    assert (entry.ctypes(low).value, entry.ctypes(high).value) == (low, high)
    assert entry.ctypes(low - 1).value == high
    assert entry.ctypes(high + 1).value == low


@pytest.mark.parametrize("name", ["i1", "u1"])
def test_a_truth_value_is_a_byte_that_holds_zero_or_one(name: str) -> None:
    assert (ctype(name).size, ctype(name).bounds) == (1, (0, 1))


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_short_floats_cross_as_float_and_are_narrowed_by_the_library(name: str) -> None:
    entry = ctype(name)

    assert (entry.c, entry.size, entry.narrow) == ("float", 2, f"pyfmha_to_{name}")


@given(st.sampled_from(sorted(ELEMENT_SIZES)), st.sampled_from(["*", "*k", " *"]))
def test_every_pointer_is_a_device_address_of_64_bits(element: str, stars: str) -> None:
    entry = ctype(stars + element)

    assert (entry.c, entry.kind, ctypes.sizeof(entry.ctypes)) == ("CUdeviceptr", "pointer", 8)
    assert entry.size == ELEMENT_SIZES[element]


@pytest.mark.parametrize(
    ("alias", "name"), [("f32", "fp32"), (" fp16 ", "fp16"), ("*f16", "*fp16"), ("*ki32", "*ki32")]
)
def test_aliases_have_one_canonical_name(alias: str, name: str) -> None:
    assert canonical(alias) == name
    assert canonical(name) == name


@pytest.mark.parametrize("name", ["", "fp8", "float", "i7", "*", "**fp16", "*fp17", "void", "i32:16"])
def test_an_unknown_type_is_refused_with_those_known(name: str) -> None:
    with pytest.raises(SpecError, match=r"unknown .*fp16.*bf16") as caught:
        ctype(name)

    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("name", ["tensordesc<fp16[64, 64]>", "nvTmaDesc"])
def test_a_tensor_descriptor_is_refused_with_what_to_do_instead(name: str) -> None:
    with pytest.raises(SpecError, match=r"tensor descriptors.*pass pointers"):
        ctype(name)
