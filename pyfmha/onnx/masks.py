"""Which keys a query sees, proven from a mask's elements: causal, windows, lengths, or data that only the run knows."""

import math
from dataclasses import dataclass
from typing import Any

from pyfmha.onnx import formulas as f
from pyfmha.onnx.calls import LeftAloneError, Visible
from pyfmha.onnx.elements import Elements
from pyfmha.onnx.sizes import Bounds, Size

QUERY, KEY, BATCH, HEAD = "i", "j", "b", "h"
"""The index symbols."""

LOWEST = {"fp32": -1e30, "bf16": -1e30, "fp16": -6e4}
"""A finite number from here down hides a key: exporters write the lowest of the type for minus infinity."""


class NoWordsError(LeftAloneError):
    """A rule for which the plugin has no words: its tensor is one all the same."""


@dataclass(frozen=True)
class Seen:
    """A mask that is understood.

    Attributes:
        condition: when a query sees a key.
        finite: whether keys are hidden by a finite number. Then a query without a key averages all values, where one
            hidden by minus infinity has no answer.
        infinite: whether keys are hidden by minus infinity.
    """

    condition: Any
    finite: bool = False
    infinite: bool = False


NOTHING_HIDDEN = Seen(True)


def of_condition(element: Any) -> Seen:
    """A boolean mask, True where a key is seen.

    Raises:
        LeftAloneError: it depends on data.
    """
    element = f.as_condition(element)
    _refuse_data(element)
    return Seen(element)


def of_number(element: Any, dtype: str) -> Seen:
    """A mask that is added to the scores.

    Raises:
        LeftAloneError: it depends on data, or adds something else than nothing and minus infinity.
    """
    if isinstance(element, f.Data):
        raise LeftAloneError(f"its mask is {_name(element)}, which only the run knows")
    if isinstance(element, f.Pick):
        _refuse_data(element.condition)
        yes, no = of_number(element.yes, dtype), of_number(element.no, dtype)
        condition = f.chosen(element.condition, yes.condition, no.condition)
        return Seen(condition, yes.finite or no.finite, yes.infinite or no.infinite)
    number = element.number if isinstance(element, Size) else element
    if number is None:
        raise LeftAloneError(f"its mask adds {element} to the scores")
    if number == 0:
        return Seen(True)
    if number > LOWEST[dtype] or math.isnan(number):
        raise LeftAloneError(f"its mask adds {number:g} to the scores, which is neither nothing nor minus infinity")
    return Seen(False, math.isfinite(number), not math.isfinite(number))


def below(a: Size, b: Size) -> Any:
    """The condition that a < b."""
    return f.above(b, a)


def not_above(a: Size, b: Size) -> Any:
    """The condition that a <= b."""
    return f.at_least(b, a)


def joined(left: Seen, right: Seen) -> Seen:
    """Both masks together."""
    condition = f.both(left.condition, right.condition)
    return Seen(condition, left.finite or right.finite, left.infinite or right.infinite)


def _name(data: f.Data) -> str:
    """The name of data, without the sign of an element of whole numbers."""
    return data.source.replace("@", "")


def _refuse_data(condition: Any) -> None:
    if isinstance(condition, f.Data):
        raise LeftAloneError(f"its mask depends on {_name(condition)}, which only the run knows")
    if isinstance(condition, (f.All, f.Some)):
        for part in sorted(condition.parts, key=str):
            _refuse_data(part)


def visible(
    seen: Seen, elements: Elements, rows: Size, columns: Size, *, guarded: bool = False, within: bool = False
) -> Visible:
    """The plugin's words for a mask.

    Args:
        seen: the mask.
        elements: where its symbols are known.
        rows, columns: how many queries and keys there are.
        guarded: whether the model gives zeros, as the plugin does, for a query without a key.
        within: whether lengths are by contract no larger than the tensor. The plugin takes larger ones for as large,
            which moves what is aligned to them.

    Raises:
        NoWordsError: the plugin has no words for it.
        LeftAloneError: it is not proven that every query has a key.
    """
    parts = seen.condition.parts if isinstance(seen.condition, f.All) else {seen.condition}
    left = right = lengths = None
    for part in parts:
        if part is True or (isinstance(part, f.AtLeast0) and part.size.at_least_0(elements.bounds)):
            continue
        if not isinstance(part, f.AtLeast0):
            raise NoWordsError("its mask hides keys by a rule that is no causal mask, window or length")
        kind, bound = _bound(part.size, elements, rows.number == 1)
        if kind == "right":
            right = _tighter(right, bound, elements)
        elif kind == "left":
            left = _tighter(left, bound, elements)
        elif lengths is None:
            lengths = bound
        else:
            raise LeftAloneError("its mask has two lengths for one sequence")
    value = None if lengths is None else elements.cells[str(lengths)][0]
    if value is not None and elements.facts.shape(value) != (elements.bounds[BATCH],):
        raise LeftAloneError(f"its lengths {value.name} are not proven to be of shape [batch]")
    end = columns if lengths is None else lengths
    aligned = _aligned(left, right, rows, end)
    if lengths is not None and aligned[0] and not within:
        raise LeftAloneError("its mask is aligned to lengths, which are not proven to lie within the tensor")
    found = Visible(aligned[2] == 0, aligned[0], (aligned[1], -1 if aligned[2] == 0 else aligned[2]), value)
    if not guarded and (seen.finite or lengths is None):
        _check_rows(found, rows, columns, lengths is not None)
    return found


def every_row_sees(seen: Seen, elements: Elements, rows: Size, columns: Size) -> bool:
    """Whether it is proven that a mask leaves every query a key: its own, or the first or last of all."""
    keys = [Size(), columns - 1]
    if (columns - rows).at_least_0({}):
        keys += [Size.of(QUERY), Size.of(QUERY) + columns - rows]
    return any(_sees(seen.condition, key, elements.bounds) for key in keys)


def _sees(condition: Any, key: Size, bounds: Bounds) -> bool:
    """Whether a condition is proven to hold at a key."""
    if isinstance(condition, f.AtLeast0):
        size = condition.size
        parts = any(name != KEY and name.startswith(KEY) for name in size.symbols)  # of an index that was split
        return not parts and size.replaced(KEY, key).at_least_0(bounds)
    if isinstance(condition, (f.All, f.Some)):
        found = [_sees(part, key, bounds) for part in condition.parts]
        return all(found) if isinstance(condition, f.All) else any(found)
    return condition is True


def _bound(size: Size, elements: Elements, one_row: bool) -> tuple[str, Size]:
    """What one condition says: ``j <= i + bound``, ``j >= i - bound``, or ``j < bound``."""
    query, key = size.terms.get((QUERY,), 0), size.terms.get((KEY,), 0)
    rest = size - Size({(QUERY,): query} if query else {}) - Size({(KEY,): key} if key else {})
    if not rest.symbols & {QUERY, KEY, BATCH, HEAD}:
        if (query, key) == (1, -1):
            return "right", rest
        if (query, key) == (-1, 1):
            return "left", rest
        cell = elements.cells.get((rest + 1).symbol or "")
        if (query, key) == (0, -1) and cell is not None and len(cell[1]) == 1 and _is_batch(cell[1][0], elements):
            return "length", rest + 1
        if one_row and query == 0 and abs(key) == 1 and cell is None:  # the one query has index 0
            return ("right" if key < 0 else "left"), rest
    raise NoWordsError(f"its mask shows a key where {_plain(size)} >= 0, which is no causal mask, window or length")


def _is_batch(at: Size, elements: Elements) -> bool:
    return at == Size.of(BATCH) or (at == Size() and elements.bounds[BATCH].number == 1)


def _plain(size: Size) -> str:
    return str(size).replace("@", "")


def _tighter(known: Size | None, bound: Size, elements: Elements) -> Size:
    if known is None or (known - bound).at_least_0(elements.bounds):
        return bound
    if (bound - known).at_least_0(elements.bounds):
        return known
    raise NoWordsError(f"its mask has two bounds on one side, {known} and {bound}")


def _aligned(left: Size | None, right: Size | None, rows: Size, end: Size) -> tuple[bool, int, int]:
    """Whether it is aligned bottom right, and how many keys are seen to the left and right."""
    for bottom_right, offset in ((False, Size()), (True, end - rows)):
        sides = (None if left is None else left + offset, None if right is None else right - offset)
        numbers = [-1 if side is None else side.number for side in sides]
        if any(number is None for number in numbers):
            continue
        if all(side is None or (side.number or 0) >= 0 for side in sides):
            return bottom_right, numbers[0] or 0, numbers[1] or 0
    bounds = " and ".join(str(side) for side in (left, right) if side is not None)
    raise NoWordsError(f"its mask is aligned to neither the first key nor the last: bounds {bounds}")


def _check_rows(found: Visible, rows: Size, columns: Size, lengths: bool) -> None:
    """Prove that every query sees a key."""
    more_keys = (columns - rows).at_least_0({})
    bounded = found.causal or found.window[1] >= 0
    proven = more_keys or not (bounded if found.bottom_right else found.window[0] >= 0)
    if lengths or not proven:
        which = "a sequence may have length 0" if lengths else f"{rows} queries, {columns} keys"
        raise LeftAloneError(
            f"it is not proven that its mask leaves every query a key ({which}): without one the model averages all"
            " values or gives NaN, the plugin gives zeros"
        )
