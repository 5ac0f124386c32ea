"""Score functions that say they are relative, tried: what they add depends on batch, head and key - query alone.

A build asks the same source under the interpreter, on inputs of the function's own example, for random scores; along
each diagonal of queries and keys the same must be added.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pyfmha.errors import SpecError

if TYPE_CHECKING:
    from pyfmha.functions.family import Declared

BATCH, HEADS, QUERIES, KEYS = 2, 3, 40, 72
FIRST = 20
"""The position of the first query that is tried."""
TOLERANCE = 1e-4
"""How much more or less may be added at another place of a diagonal, of 1 or of what is added: rounding to float32."""


def trial_of(name: str, example: Any) -> str:
    """A function's inputs by its example, as JSON: numbers, and types, shapes and elements of arrays.

    Raises:
        SpecError: the example fails, or gives something else.
    """
    try:
        given = dict(example(BATCH, HEADS, QUERIES + FIRST, KEYS))
        said = {
            key: {"dtype": str(x.dtype), "shape": x.shape, "data": x.reshape(-1).tolist()}
            if isinstance(x, np.ndarray)
            else getattr(x, "item", lambda x=x: x)()  # a number of numpy's
            for key, x in given.items()
        }
        return json.dumps(said)
    except Exception as error:  # whatever a user's function raises
        raise SpecError(
            f"{name}: its example for batch {BATCH}, {HEADS} heads, {QUERIES + FIRST} queries and {KEYS} keys fails:"
            f" {type(error).__name__}: {error}"
        ) from error


def inputs_of(trial: str) -> dict[str, Any]:
    """What :func:`trial_of` was given."""
    return {
        key: np.array(x["data"], x["dtype"]).reshape(x["shape"]) if isinstance(x, Mapping) else x
        for key, x in json.loads(trial).items()
    }


def check_relative(functions: Sequence["Declared"], **options: Callable[..., None]) -> None:
    """Try those that say so.

    Args:
        functions: any.
        options: `run` of :func:`pyfmha.functions.evaluate.evaluate`.

    Raises:
        SpecError: one is not relative.
        InterpreterError: one fails.
    """
    for function in functions:
        if function.relative:
            _check(function, options)


def _check(function: "Declared", options: Mapping[str, Callable[..., None]]) -> None:
    from pyfmha.functions.evaluate import evaluate

    scores = np.random.default_rng(0).standard_normal((BATCH, HEADS, QUERIES, KEYS))
    found, _ = evaluate(function, scores, inputs_of(function.trial), first_position=FIRST, **options)
    added = found - scores
    for at in np.ndindex(BATCH, HEADS):
        for offset in range(1 - QUERIES, KEYS):
            diagonal = added[at].diagonal(offset)
            same = np.isclose(diagonal, diagonal[0], rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)
            if not same.all():
                _refuse(function, at, max(0, -offset), offset, diagonal, int(np.argmin(same)))


def _refuse(function: "Declared", at: tuple[int, ...], row: int, offset: int, diagonal: Any, other: int) -> None:
    def said(place: int) -> str:
        query = row + place
        return f"query {query + FIRST} and key {query + offset}"

    raise SpecError(
        f"{function.name} of {function.source} says it is relative, but of batch {at[0]} and head {at[1]} it adds"
        f" {diagonal[0]:.6g} for {said(0)} and {diagonal[other]:.6g} for {said(other)}, which are as far apart; drop"
        " relative=True"
    )
