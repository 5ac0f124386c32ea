"""Descriptions whose launches name functions that were compiled once: machine code is what takes time."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import KERNELS

from pyfmha.aot import build
from pyfmha.operators.description import Launch, Operator
from pyfmha.spec.arch import parse_archs
from pyfmha.spec.kernel import Argument, KernelSpec

STRICT = "gcc -Wall -Wextra -Wconversion -Wshadow -Wstrict-prototypes -Werror"
SCALARS = {"i": "i32", "j": "i64", "k": "u8", "f": "fp32", "g": "fp64"}
ARGUMENTS = ("a", "b", "c", *SCALARS)
TYPED = ("fp16", "fp32")
"""The types that ``probe_{T}`` is compiled for; ``probe`` takes bytes."""


def probe_specs() -> list[KernelSpec]:
    """``probe``, of two algorithms, and ``probe_{T}``."""

    def spec(name: str, element: str, block: int) -> KernelSpec:
        return KernelSpec(
            source=KERNELS / "probes.py",
            kernel="probe",
            name=name,
            arguments=tuple(Argument(p, f"*{element}") for p in "abc")
            + tuple(Argument(s, kind) for s, kind in SCALARS.items()),
            constants=(("BLOCK", block),),
            grid="max(1, min(i, 64)), 2",
            num_warps=1,
            num_stages=1,
            nullable=("a", "b", "c"),
        )

    return [spec("probe", "i8", 32), spec("probe", "i8", 64), *(spec(f"probe_{t}", t, 32) for t in TYPED)]


def probe(function: str = "probe", when: str = "", name: str = "", **arguments: Any) -> Launch:
    """A launch of a probe; arguments that are not named are null, or 1."""
    usual = {**dict.fromkeys("abc", "null"), "i": "1", "j": "1", "k": "1", "f": "1.0", "g": "1.0"}
    return Launch({**usual, **arguments}, when, function, name)


def operator(name: str, **changes: Any) -> Operator:
    """An operator from a vector to another, but for the changes."""
    usual: dict[str, Any] = {
        "inputs": {"X": "fp32[n]"},
        "outputs": {"Y": "fp32[n]"},
        "launches": [probe(a="X", c="Y", i="n")],
    }
    return Operator(name, **{**usual, **changes})


def build_described(operators: Sequence[Operator], folder: Path) -> Path:
    """A library with their plugins, whose C gives gcc nothing to say; but some descriptions ask whether n is n."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CC", f"{STRICT} -Wno-tautological-compare")
        return build(probe_specs(), parse_archs(["sm_90"]), folder, jobs=1, operators=operators).library


def renamed(operators: Sequence[Operator]) -> list[Operator]:
    """The same, each with a name of its own."""
    return [replace(one, name=f"{one.name}{number}") for number, one in enumerate(operators)]
