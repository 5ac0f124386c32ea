"""Calls of the operator itself past PyTorch's dispatcher, where that would only pass them on.

The dispatcher takes the host 1.6 us for an operator of five arguments that does nothing. So what
``torch.ops.pyfmha.attention`` and its overloads call first is a function in Python: a call like the last one with the
same keywords and tensors like its, on which nobody looks, is launched at once. Every other goes through the dispatcher,
and so does the first, whose checks hold for those like it. An implementation that somebody else registers for CUDA is
found by the dispatcher alone.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyfmha.torch.plain import GIVEN, Recent, unseen

MOST_SPELLINGS = 256
"""Ways of giving keywords that are known; a model has a handful."""

BY_NAME = object()
"""Between keywords that are given by position and by name."""

_VALUES = {bool, int, float, str, type(None), type(GIVEN)}


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
    spellings: dict[Any, tuple[tuple[Any, ...], list[int]]] = {}

    def attention(q: Any, k: Any, v: Any, *asked: Any, **named: Any) -> Any:
        others: Sequence[Any] = ()
        try:
            found = None if named else calls.get(asked)
            if found is None:
                form, others = _form(asked, named)
                known = spellings.get(form)
                if known is None:
                    return first(form, q, k, v, asked, named)
                found = calls.get(known[0])
                if len(others) > 1:
                    others = [others[place] for place in known[1]]
        except TypeError:  # what has no hash is none of our keywords
            found = None
        if found is not None and found[0](q, k, v, *others) and unseen():
            return found[1](q, k, v, *others)
        return dispatched(q, k, v, *asked, **named)

    def first(form: tuple[Any, ...], q: Any, k: Any, v: Any, asked: Sequence[Any], named: Mapping[str, Any]) -> Any:
        result = dispatched(q, k, v, *asked, **named)
        if _VALUES.issuperset(map(type, form)):
            if len(spellings) >= MOST_SPELLINGS:
                spellings.clear()
            spellings[form] = _passed_on(form, keywords)
        return result

    return attention


def _form(asked: Sequence[Any], named: Mapping[str, Any]) -> tuple[tuple[Any, ...], list[Any]]:
    """How keywords are given: those by position, :data:`BY_NAME`, then names and values in turn, with :data:`GIVEN` for
    tensors; and those, as they come."""
    form: list[Any] = []
    others = []
    for value in asked:
        if type(value) is Tensor:
            others.append(value)
            value = GIVEN
        form.append(value)
    form.append(BY_NAME)
    for name, value in named.items():
        form.append(name)
        if type(value) is Tensor:
            others.append(value)
            value = GIVEN
        form.append(value)
    return tuple(form), others


def _passed_on(form: Sequence[Any], keywords: Mapping[str, Any]) -> tuple[tuple[Any, ...], list[int]]:
    """The keywords that the dispatcher passes on: by position, without the defaults at their end; and which of the
    tensors among them, as they are given, comes first, second, ..."""
    by_name = form.index(BY_NAME)
    told = dict(zip(keywords, form[:by_name], strict=False))
    told |= zip(form[by_name + 1 :: 2], form[by_name + 2 :: 2], strict=True)
    given = {**keywords, **told}
    tensors = [name for name, value in told.items() if value is GIVEN]
    values = list(given.values())
    defaults = list(keywords.values())
    while values and values[-1] == defaults[len(values) - 1]:
        values.pop()
    return tuple(values), [tensors.index(name) for name, value in given.items() if value is GIVEN]
