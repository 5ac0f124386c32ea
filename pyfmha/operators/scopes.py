"""What a plugin's expressions may read: attributes when it is created, sizes once its tensors have shapes."""

import math
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

from pyfmha.errors import PluginError
from pyfmha.operators.arithmetic import EvaluationError
from pyfmha.operators.description import ITEM_SIZES
from pyfmha.operators.expressions import Expression, Scope
from pyfmha.operators.forms import Shape
from pyfmha.operators.text import Text


class AttributeScope(Scope):
    """What attributes tell: their values, which of them were given, types, and which options there are."""

    def __init__(
        self, values: Mapping[str, Any], given: frozenset[str], options: Mapping[str, bool], types: Mapping[str, str]
    ) -> None:
        super().__init__({**values, **types})
        self.given, self.options, self.types = given, options, types

    def ask(self, question: str, words: tuple[Any, ...]) -> int | bool:
        match question:
            case "given":
                return words[0] in self.given
            case "len":
                return len(self.values[words[0]])  # type: ignore[arg-type]
            case "has":
                return self.options.get(words[0], False)
            case "itemsize":
                return ITEM_SIZES[self.types.get(words[0], words[0])]
        return super().ask(question, words)


class ShapeScope(AttributeScope):
    """What is known besides once the tensors have shapes."""

    def __init__(
        self,
        scope: AttributeScope,
        sizes: Mapping[str, Any],
        shapes: Mapping[str, Shape],
        least: Mapping[str, int],
        serves: Callable[[str, str], bool],
        device: Callable[[str], int],
    ) -> None:
        super().__init__({**scope.values, **sizes}, scope.given, scope.options, scope.types)
        self.shapes, self.least, self.serves, self.device = shapes, least, serves, device

    def ask(self, question: str, words: tuple[Any, ...]) -> int | bool:
        match question:
            case "size" | "stride":
                shape = self.shapes.get(words[0], ())
                if words[1] >= len(shape):
                    raise EvaluationError
                return shape[words[1]] if question == "size" else product(shape[words[1] + 1 :])
            case "numel":
                return product(self.shapes[words[0]]) if words[0] in self.shapes else 0
            case "least":
                return self.least.get(words[0], 0)
            case "serves":
                return self.serves(words[0], words[1])
            case "device":
                return self.device(words[0])
        return super().ask(question, words)


def product(sizes: Sequence[int]) -> int:
    """Of sizes.

    Raises:
        EvaluationError: it does not fit in 64 bits.
    """
    result = math.prod(sizes)
    if result >= 1 << 63:
        raise EvaluationError
    return result


def define(
    definitions: Sequence[tuple[str, Expression]],
    checks: Sequence[tuple[Expression, Text]],
    scope: Scope,
    given: Container[str] = (),
) -> None:
    """Add definitions to what a scope knows, and check what must hold: each as soon as what it and its message read is
    known.

    Args:
        definitions, checks: in order.
        scope: it is changed.
        given: definitions that it knows already.
    """
    defined = {name for name, _ in definitions}
    later = []
    for check in checks:
        if (check[0].names() | check[1].names()) & defined:
            later.append(check)
        else:
            _check(check, scope)
    for name, expression in definitions:
        if name not in given:
            scope.values[name] = expression.evaluate(scope)
    for check in later:
        _check(check, scope)


def _check(check: tuple[Expression, Text], scope: Scope) -> None:
    condition, message = check
    if not condition.evaluate(scope):
        raise PluginError(message.render(scope))


def holds(condition: Expression | None, scope: Scope) -> bool:
    """Whether a condition is met; none is."""
    return condition is None or bool(condition.evaluate(scope))
