"""The one keyword that nobody may leave to a default: which keys a query sees.

PyTorch, ONNX and flash-attention take False where it is not said, TensorRT-LLM's example and the plugin's field take
True: a default of either kind gives half of the callers wrong numbers without an error.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from pyfmha.errors import PluginError, PyfmhaError

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")

CHOICES = (
    "causal=True (a query sees the keys at its own position and before), causal=False (it sees every key), or"
    " causal='bottom-right' (as True, with the last query at the position of the last key)"
)


def says_causal(
    name: str, error: type[PyfmhaError]
) -> Callable[[Callable[_Parameters, _Result]], Callable[_Parameters, _Result]]:
    """For a function with the required keyword ``causal``: a call without it is answered with what may be said.

    Args:
        name: of the function, for the message.
        error: raised in the place of Python's TypeError, which names no values.
    """

    def decorate(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
        @functools.wraps(function)
        def call(*arguments: _Parameters.args, **keywords: _Parameters.kwargs) -> _Result:
            if "causal" not in keywords:
                raise error(f"{name} is not told whether the attention is causal; give {CHOICES}")
            return function(*arguments, **keywords)

        return call

    return decorate


def check_causal(causal: object) -> None:
    """Refuse what is none of the choices, None above all; numpy's True and 1 count as True.

    Raises:
        PluginError: saying which they are.
    """
    if causal not in (True, False, "bottom-right"):
        raise PluginError(f"causal is {causal!r}; allowed are True, False and 'bottom-right'")
