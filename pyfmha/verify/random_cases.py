"""Random problems for ``pyfmha verify --random``: what nobody thought of.

They found on an H100 that TMA stores past a head size that is no multiple of 8 where rows are wider, which all chosen
cases of :mod:`pyfmha.verify.cases` had passed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any, TypeVar

import numpy as np

from pyfmha.attention.forward import HEAD_SIZES
from pyfmha.verify.cases import Case

Random = np.random.Generator
T = TypeVar("T")

LONGEST = 700
"""Queries and keys of a problem at most: float64 on the host takes as long as everything else together."""


def random_cases(dtype: str, padded: int, count: int, seed: int = 0) -> Iterator[Case]:
    """Problems for one ``fmha_fwd_*``, the same in every run.

    Args:
        dtype: of the function.
        padded: head size that it is cut for; the problems' are those it serves.
        count: how many.
        seed: other ones.
    """
    for number in range(count):
        rng = np.random.default_rng([seed, padded, len(dtype), ord(dtype[0]), number])
        yield _named(number, _case(rng, dtype, padded))


def _case(rng: Random, dtype: str, padded: int) -> dict[str, Any]:
    kv_heads, group = _pick(rng, [1, 1, 2, 3]), _pick(rng, [1, 1, 2, 4, 7])
    q_len, kv_len = (1 + _below(rng, _pick(rng, [3, 80, LONGEST])) for _ in "qk")
    head_size = _head_size(rng, padded)
    case: dict[str, Any] = {
        **{"dtype": dtype, "head_size": head_size, "heads": kv_heads * group, "kv_heads": kv_heads},
        **{"q_len": q_len, "kv_len": _pick(rng, [q_len, kv_len, kv_len]), "batch": 1 + _below(rng, 3)},
        **{"bottom_right": _often(rng, 0.4), "layout": _pick(rng, ["bhsd", "bshd"]), "lse": _often(rng, 0.7)},
        # Rows that are wider than their elements: by one, by some, or up to the next multiple of 8.
        "gap": _pick(rng, [0, 0, 1, 8, -head_size % 8, 8 + -head_size % 8]),
        "shift": int(_often(rng, 0.1)),
        "largest": _often(rng, 0.05),
        "softcap": _pick(rng, [0.0, 0.0, 0.0, 0.5, 30.0, 500.0]),
        **_window(rng),
    }
    kind = _pick(rng, ["dense", "lengths", "ragged"])
    if kind == "lengths":
        for name, most in (("q_lengths", q_len), ("kv_lengths", case["kv_len"])):
            if _often(rng, 0.7):
                case[name] = tuple(_below(rng, most + 5) - 2 for _ in range(case["batch"]))
    elif kind == "ragged":
        sequences = 1 + _below(rng, _pick(rng, [3, 20, 70]))
        case |= {"batch": 1, "cu_q": _borders(rng, sequences, q_len)}
        case["cu_kv"] = _borders(rng, sequences, case["kv_len"])
    return case


def _head_size(rng: Random, padded: int) -> int:
    """The padded one, any that is a multiple of 8, or any."""
    smallest = max((size for size in HEAD_SIZES if size < padded), default=0) + 1
    size = smallest + _below(rng, padded - smallest + 1)
    return _pick(rng, [padded, -(-size // 8) * 8, size])


def _window(rng: Random) -> dict[str, int]:
    left, right = (_below(rng, _pick(rng, [10, 300])) for _ in "lr")
    return _pick(rng, [{}, {"right": 0}, {"right": 0}, {"left": left, "right": right}, {"left": left, "right": 0}])


def _borders(rng: Random, sequences: int, tokens: int) -> tuple[int, ...]:
    """Where sequences end; of some batches not in order, or beyond the tensor."""
    ends = np.sort(rng.integers(0, tokens + 1, sequences + 1))
    if _often(rng, 0.5):
        ends[0], ends[-1] = 0, tokens
    if _often(rng, 0.2):
        ends[_below(rng, sequences + 1)] = _pick(rng, [-(2**31), -3, tokens + 9, 2**31 - 1])
    return tuple(int(end) for end in ends)


def _named(number: int, case: dict[str, Any]) -> Case:
    """With a name that says what it is."""
    usual = {field.name: field.default for field in fields(Case)}
    told = [f"{name} {value}" for name, value in case.items() if name != "dtype" and value != usual[name]]
    return Case(f"random {number}: {', '.join(told)}", **case)


def _below(rng: Random, end: int) -> int:
    return int(rng.integers(0, end))


def _often(rng: Random, share: float) -> bool:
    return bool(rng.random() < share)


def _pick(rng: Random, values: Sequence[T]) -> T:
    return values[_below(rng, len(values))]
