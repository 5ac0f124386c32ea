"""Calls of the operator itself past PyTorch's dispatcher, where that would only pass them on.

The dispatcher takes the host 1.6 us for an operator of five arguments that does nothing. So what
``torch.ops.pyfmha.attention`` and its overloads call first is a function in Python: a call like the last one with the
same keywords and tensors like its, on which nobody looks, is launched at once. Every other goes through the dispatcher,
and so does the first, whose checks hold for those like it. An implementation that somebody else registers for CUDA is
found by the dispatcher alone.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfmha.torch.plain import GIVEN, Recent, dispatch_modes, function_modes, profiler

MOST_SPELLINGS = 256
"""Ways of giving keywords, and values of keywords in one way, that are known; a model has a handful."""

_VALUES = {bool, int, float, str, type(None), Tensor}


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
    ways: dict[tuple[str, ...], list[Callable[..., Any]]] = {}
    spelled: dict[_Form, dict[Any, Any]] = {}

    def attention(q: Any, k: Any, v: Any, *asked: Any, **named: Any) -> Any:
        if not named:
            try:
                known = calls.get(asked, ())
            except TypeError:  # what has no hash is none of our keywords
                known = ()
            for alike, call in known:
                if alike(q, k, v):
                    if dispatch_modes() or function_modes() or profiler._is_profiler_enabled:
                        break
                    return call(q, k, v)
        for way in ways.get(tuple(named), ()):
            result = way(q, k, v, asked, named)
            if result is not None:
                return result
        result = dispatched(q, k, v, *asked, **named)
        remember(asked, named)
        return result

    def remember(asked: tuple[Any, ...], named: dict[str, Any]) -> None:
        if not _VALUES.issuperset(map(type, (*asked, *named.values()))):
            return
        by_place = tuple(zip(keywords, asked, strict=False))
        told = dict(by_place) | named
        known = calls.get(_passed_on(told, keywords))
        if known is None:  # its tensors are converted each time, or may need a gradient
            return
        form = _Form(
            tuple(keywords), tuple(named), frozenset(name for name, value in told.items() if type(value) is Tensor),
            tuple(name for name, _ in by_place) if any(type(value) is Tensor for value in asked) else None,
        )  # fmt: skip
        if form not in spelled:
            if len(spelled) >= MOST_SPELLINGS:
                spelled.clear()
                ways.clear()
            spelled[form] = {}
            ways.setdefault(form.names, []).append(_maker(form)(spelled[form].get))
        if len(spelled[form]) >= MOST_SPELLINGS:
            spelled[form].clear()
        values = [value for name, value in told.items() if name not in form.tensors]
        key = (asked, *values[len(asked) :]) if form.places is None else tuple(values)
        spelled[form][key] = known

    return attention


class _Form(NamedTuple):
    """How keywords are given.

    Attributes:
        keywords: all there are.
        names: of those that are given by name.
        tensors: of those that are tensors.
        places: of those that are given by position, where a tensor is among them.
    """

    keywords: tuple[str, ...]
    names: tuple[str, ...]
    tensors: frozenset[str]
    places: tuple[str, ...] | None


_TEXT = """
def make(known_of):
    def way(q, k, v, asked, named):
        {lines}
        try:
            known = known_of({values}, ())
        except TypeError:
            return None
        for alike, call in known:
            if alike({tensors}):
                if dispatch_modes() or function_modes() or profiler._is_profiler_enabled:
                    return None
                return call({tensors})

    return way
"""


@functools.lru_cache(maxsize=MOST_SPELLINGS)
def _maker(form: _Form) -> Callable[..., Any]:
    """Makes what launches for keywords that are given in one way, where tensors are alike, and else returns None.

    Written as text, as for :mod:`pyfmha.trt.launch`: to take any keywords apart takes the host longer than a launch."""
    given = [*(form.places or ()), *form.names]
    values = [*["asked"] * (form.places is None), *(name for name in given if name not in form.tensors)]
    count = len(form.places or ())
    lines = [f"{name} = named[{name!r}]" for name in form.names]  # in half the time that **named takes
    if form.places:
        lines = [f"if len(asked) != {count}: return None", f"[{', '.join(form.places)}] = asked", *lines]
    text = _TEXT.format(
        lines="\n        ".join(lines),
        values=f"({', '.join(values)},)" if values else "()",
        tensors=", ".join(["q", "k", "v", *(name for name in form.keywords if name in form.tensors)]),
    )
    made: dict[str, Any] = {}
    exec(compile(text, "<attention>", "exec"), globals(), made)
    make: Callable[..., Any] = made["make"]
    return make


def _passed_on(told: Mapping[str, Any], keywords: Mapping[str, Any]) -> tuple[Any, ...]:
    """The keywords that the dispatcher passes on: by position, without the defaults at their end, and with
    :data:`GIVEN` for tensors."""
    values = [GIVEN if isinstance(value, Tensor) else value for value in {**keywords, **told}.values()]
    defaults = list(keywords.values())
    while values and values[-1] == defaults[len(values) - 1]:
        values.pop()
    return tuple(values)
