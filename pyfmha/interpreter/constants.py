"""Numbers that a file holds as ``tl.constexpr``, on the left of tensors: interpreted, such a product was a
``tl.constexpr`` that holds a tensor, which nothing takes; where it is compiled it is a tensor."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

_OPERATORS = "add sub mul truediv floordiv mod and or xor lt le gt ge eq ne"


@contextmanager
def constants_beside_tensors() -> Iterator[None]:
    """Within it, while one kernel runs, tensors do the arithmetic that they have part in."""
    import triton.language as tl

    def of_tensors(method: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        def operation(constant: Any, other: Any) -> Any:
            return NotImplemented if isinstance(other, tl.tensor) else method(constant, other)

        return operation

    names = [f"__{name}__" for name in _OPERATORS.split()]
    mended: dict[str, Any] = {name: of_tensors(getattr(tl.constexpr, name)) for name in names}
    with mock.patch.multiple(tl.constexpr, **mended):
        yield
