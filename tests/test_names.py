"""One name for one thing in the public API."""

import dataclasses
import inspect
import typing
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import pyfmha
import pyfmha.trt
from pyfmha.attention.reference import attend, attention_float64

SCALES = {"scale", "sm_scale", "softmax_scale", "softmax_factor", "q_scaling"}


def parameters() -> Iterator[tuple[str, set[str]]]:
    """Every public callable's parameters, and every public dataclass's fields."""
    for module in (pyfmha, pyfmha.trt):
        for name in module.__all__:
            found = getattr(module, name)
            if isinstance(found, type) and not dataclasses.is_dataclass(found):
                for method, function in inspect.getmembers(found, inspect.isfunction):
                    if not method.startswith("_") or method == "__init__":
                        yield f"{name}.{method}", set(inspect.signature(function).parameters)
            elif callable(found):
                yield name, set(inspect.signature(found).parameters)


def test_the_scale_has_one_name() -> None:
    named = {name: found & SCALES for name, found in parameters() if found & SCALES}

    assert set(named) >= {
        "DirectSession.__init__", "EngineConfig", "add_attention", "add_attention_packed", "interpret_attention",
    }  # fmt: skip
    assert {name: found for name, found in named.items() if found != {"scale"}} == {}


def test_types_of_keywords_are_those_of_the_signatures() -> None:
    """What the overloads let through is what the functions take."""
    from pyfmha.trt.attention.words import Options, PackedOptions

    for function, options in ((pyfmha.add_attention, Options), (pyfmha.add_attention_packed, PackedOptions)):
        keywords = {
            name
            for name, found in inspect.signature(function).parameters.items()
            if found.kind is inspect.Parameter.KEYWORD_ONLY
        }
        assert set(typing.get_type_hints(options)) | {"causal", "return_lse"} == keywords


@pytest.mark.parametrize("function", [attention_float64, attend])
def test_the_references_scale_may_have_its_earlier_name(function: Any) -> None:
    more = {"causal": True} if function is attention_float64 else {"window_right": 0}
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, 1, 4, 16))

    def out(**scales: float) -> Any:
        found = function(q, k, v, **more, **scales)
        return found.out if function is attention_float64 else found[0]

    assert (out(scale=0.25) == out(sm_scale=0.25)).all()
    assert (out(scale=0.25) == out()).all()  # 1 / sqrt(head size)
    assert (out(scale=0.5) != out()).any()
    with pytest.raises(ValueError, match=r"scale is 0\.5 and sm_scale, its earlier name, 0\.25; give one of them"):
        out(scale=0.5, sm_scale=0.25)
