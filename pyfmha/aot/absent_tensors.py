"""Launches for tensors that are not there, of kernels that ask for them by ``is None``.

Triton settles that when it compiles: of a pointer it is never None, not even a null pointer. Its run-time compiler
compiles such a kernel anew for each argument that is None, and so does this, each as a launch of its own.
"""

import ast
import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

from pyfmha.aot.cubin import Parameters
from pyfmha.aot.operator_limits import MOST_LAUNCHES
from pyfmha.errors import SpecError
from pyfmha.operators.arithmetic import EvaluationError
from pyfmha.operators.description import Launch, Operator
from pyfmha.operators.expressions import Scope
from pyfmha.operators.program import NULL, program_of
from pyfmha.operators.reading import parsed

MOST_CHOICES = 4096
"""Of attributes together, which are tried."""


def launches_without(operator: Operator, launch: Launch, found: Parameters) -> list[Launch]:
    """A launch, or one for each choice of the tensors that its kernel compares with None and that may be missing.

    Raises:
        SpecError: it would be several, and `serves` asks of it.
    """
    sources = {name: parsed(text, f"{operator.name}: argument {name}") for name, text in launch.arguments}
    there = {name: _there(operator, sources[name]) for name in found.compared if name in sources}
    conditions = list(dict.fromkeys(text for text in there.values() if text not in ("", "True", "False")))
    if conditions and launch.name:
        names = ", ".join(name for name, text in there.items() if text in conditions)
        raise SpecError(
            f"{operator.name}: launch {launch.name}: its kernel compares {names} with None, which is settled when it is"
            " compiled; serves() asks of one launch, so write one for each case, with constants={NAME: None}"
        )
    cases = _cases(operator, conditions)
    if len(cases) > MOST_LAUNCHES:
        names = ", ".join(name for name, text in there.items() if text in conditions)
        raise SpecError(
            f"{operator.name}: launch of {launch.kernel}: it compares {names} with None, each settled when it is"
            f" compiled; that makes {len(cases)} launches, and there is room for {MOST_LAUNCHES}. Ask of some while it"
            " runs instead: `if x.to(tl.int1):`"
        )
    launches = []
    for chosen in cases:
        held = {"False": False, **dict(zip(conditions, chosen, strict=True))}
        absent = [name for name, text in there.items() if not held.get(text, True)]
        whens = [text if held[text] else f"not ({text})" for text in conditions]
        launches.append(
            replace(
                launch,
                when=_all_of([launch.when, *whens]),
                arguments=[pair for pair in launch.arguments if pair[0] not in absent],
                constants=[*launch.constants, *((name, None) for name in absent)],
                scalars=[pair for pair in launch.scalars if pair[0] not in absent],
            )
        )
    return launches


def _cases(operator: Operator, conditions: Sequence[str]) -> list[tuple[bool, ...]]:
    """Which conditions may hold together, as far as attributes of few choices tell."""
    cases = list(itertools.product((True, False), repeat=len(conditions)))
    asked = [program_of(operator).question(text) for text in conditions]
    kinds, names = dict(operator.attributes), sorted({name for one in asked for name in one.names()})
    choices = [kinds[name].choices if name in kinds else () for name in names]
    if any(one.questions() for one in asked) or not 0 < math.prod(map(len, choices)) <= MOST_CHOICES:
        return cases
    scopes = [Scope(dict(zip(names, values, strict=True))) for values in itertools.product(*choices)]
    try:
        found = {tuple(bool(one.evaluate(scope)) for one in asked) for scope in scopes}
    except EvaluationError:
        return cases
    return [case for case in cases if case in found]


def _there(operator: Operator, tree: ast.expr) -> str:
    """When an argument is no null pointer, as a condition; empty where it is no address."""
    match tree:
        case ast.Name(id=name):
            if name == NULL:
                return "False"
            tensors = [one.when for one in (*operator.inputs, *operator.outputs) if one.name == name]
            whens = tensors + [part.when for part in operator.workspace if part.name == name]
            return "True" if whens and "" in whens else " or ".join(f"({when})" for when in whens)
        case ast.BinOp(left=left, op=ast.Add()):
            return _there(operator, left)
        case ast.IfExp(test=test, body=body, orelse=orelse):
            yes, no = _there(operator, body), _there(operator, orelse)
            asked = f"({ast.unparse(test)})"
            if yes == no or not yes or not no:
                return yes and no
            known = {("True", "False"): asked, ("False", "True"): f"not {asked}"}
            return known.get((yes, no), f"({asked} and ({yes})) or (not {asked} and ({no}))")
    return ""


def _all_of(texts: list[str]) -> str:
    """Conditions that must hold together; each remains a part, so that what attributes tell of it is seen."""
    trees: list[ast.expr] = []
    for tree in (parsed(text, text) for text in texts if text):
        trees += tree.values if isinstance(tree, ast.BoolOp) and isinstance(tree.op, ast.And) else [tree]
    return " and ".join(f"({ast.unparse(tree)})" for tree in trees)
