"""The functions of a library as its plugins call them: name, arguments, and algorithms as tactics."""

from dataclasses import dataclass
from typing import Any

from pyfmha.operators.tactics import tactics_of
from pyfmha.spec.abi import ctype
from pyfmha.spec.c_names import c_argument_name
from pyfmha.spec.manifest import Function


@dataclass(frozen=True)
class FunctionView:
    """What the template reads of a C function."""

    name: str
    variants: list[str]
    members: list[str]
    taken: list[dict[str, str]]
    tactics: list[dict[str, Any]]
    prototype: str
    held: str


def function_view(function: Function) -> FunctionView:
    """A function of the library, by its entry in the manifest."""
    taken = []
    for name, kind in function.arguments:
        entry = ctype(kind)
        scalar = (
            "PYFMHA_POINTER"
            if entry.kind == "pointer"
            else f"PYFMHA_F{64 if entry.c == 'double' else 32}"
            if entry.kind == "float"
            else f"PYFMHA_{kind.upper()}"
            if kind != "u1"
            else "PYFMHA_I1"
        )
        taken.append({"name": name, "type": kind, "scalar": scalar, "member": c_argument_name(name)})
    return FunctionView(
        function.name,
        [variant.name for algorithm in function.algorithms for variant in algorithm],
        [f"{ctype(kind).c} {c_argument_name(name)}" for name, kind in function.arguments],
        taken,
        [{"id": tactic.id, "name": tactic.name} for tactic in tactics_of(function)],
        function.prototype,
        ", ".join(function.archs()),
    )
