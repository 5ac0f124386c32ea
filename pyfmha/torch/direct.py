"""Calls of the operator itself past PyTorch's dispatcher, where that would only pass them on.

The dispatcher takes the host 1.6 us for an operator of five arguments that does nothing. So what
``torch.ops.pyfmha.attention`` and its overloads call first is a function in Python: a call like the last one with the
same keywords, on which nobody looks, is launched at once. Every other goes through the dispatcher, and so does the
first, whose checks hold for those like it. An implementation that somebody else registers for CUDA is found by the
dispatcher alone.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from pyfmha.torch.plain import Recent, unseen

MOST_SPELLINGS = 256
"""Ways of giving keywords that are known; a model has a handful."""

_VALUES = {bool, int, float, str, type(None)}


def launch_at_once(packet: Any, recent: Recent, keywords: Mapping[str, Any]) -> None:
    """Have an operator's calls launched at once where they can be.

    Args:
        packet: the operator, of the overloads ``default`` and ``full``.
        recent: what is known of its last calls, by the keywords as PyTorch's dispatcher passes them on.
        keywords: the arguments of ``full`` behind Q, K and V with their defaults, in order.
    """
    try:
        places = packet, packet.default, packet.full
        dispatched = [place._op for place in places]
        known_to_torchscript = torch.jit._builtins._register_builtin
    except AttributeError:  # a version of PyTorch that has them elsewhere: its dispatcher sees every call
        return
    for place, call in zip(places, dispatched, strict=True):
        place._op = _directly(call, recent, keywords)
    known_to_torchscript(packet._op, packet._qualified_op_name)


def _directly(dispatched: Callable[..., Any], recent: Recent, keywords: Mapping[str, Any]) -> Callable[..., Any]:
    calls = recent.calls
    spellings: dict[Any, tuple[Any, ...]] = {}

    def attention(q: Any, k: Any, v: Any, *asked: Any, **named: Any) -> Any:
        try:
            found = None if named else calls.get(asked)
            if found is None:
                given = asked, *named.items()
                if given not in spellings:
                    return first(q, k, v, asked, named)
                found = calls.get(spellings[given])
        except TypeError:  # what has no hash is none of our keywords
            found = None
        if found is not None and found[0](q, k, v) and unseen():
            return found[1](q, k, v)
        return dispatched(q, k, v, *asked, **named)

    def first(q: Any, k: Any, v: Any, asked: tuple[Any, ...], named: dict[str, Any]) -> Any:
        result = dispatched(q, k, v, *asked, **named)
        if _VALUES.issuperset(map(type, (*asked, *named.values()))):
            if len(spellings) >= MOST_SPELLINGS:
                spellings.clear()
            given = asked, *named.items()
            spellings[given] = _passed_on(asked, named, keywords)
        return result

    return attention


def _passed_on(asked: Sequence[Any], named: Mapping[str, Any], keywords: Mapping[str, Any]) -> tuple[Any, ...]:
    """The keywords that the dispatcher passes on: by position, without the defaults at their end."""
    given = {**keywords, **dict(zip(keywords, asked, strict=False)), **named}
    values = list(given.values())
    defaults = list(keywords.values())
    while values and values[-1] == defaults[len(values) - 1]:
        values.pop()
    return tuple(values)
