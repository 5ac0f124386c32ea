"""A user's functions in float64: the same source under Triton's interpreter, where numpy computes."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from pyfmha.attention.forward import kernel_path
from pyfmha.errors import SpecError
from pyfmha.functions.family import ATTRIBUTES, Declared
from pyfmha.interpreter.kernel import FunctionOf, Tensor, as_tensor
from pyfmha.interpreter.process import run_in_subprocess

KERNEL_FILE = "evaluate_function.py"
KERNEL = "evaluate_function"
_ROWS = 16

Floats = npt.NDArray[np.float64]
Value = Tensor | npt.NDArray[Any] | int | float


def evaluate(
    function: Declared,
    scores: Floats,
    inputs: Mapping[str, Value],
    *,
    first_position: int = 0,
    run: Callable[..., None] = run_in_subprocess,
) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """What a function makes of scores, and which keys it shows.

    Args:
        function: the user's.
        scores: [batch, query heads, queries, keys], in natural units.
        inputs: its inputs by name; arrays of the types that it declares.
        first_position: of the first query; those below 0 count as 0.
        run: :func:`pyfmha.interpreter.kernel.run_interpreted`, in a process that interprets.

    Returns:
        Scores, and whether each key is seen, of the same shape.

    Raises:
        SpecError: inputs are missing, unknown, or of another type.
        InterpreterError: the function failed.
    """
    made = np.ascontiguousarray(scores, np.float64).copy()
    seen = np.ones(made.shape, np.uint8)
    batch, heads, queries, keys = made.shape
    constants: dict[str, Any] = {"BLOCK_M": _ROWS, "BLOCK_N": 1 << max(keys - 1, 1).bit_length()}
    for part in ("SCORE", "SEEN"):
        held = part in function.parts
        constants[part] = FunctionOf(str(function.source), f"{function.name}.{ATTRIBUTES[part]}") if held else None
    packed = packed_inputs(function, inputs)
    arguments: dict[str, Any] = {
        "Scores": Tensor(made, "fp64"), "Seen": Tensor(seen, "u8"), "num_heads": heads, "q_len": queries,
        "kv_len": keys, "first_position": first_position,
    }  # fmt: skip
    if packed:
        arguments["inputs"] = packed
    else:
        constants["inputs"] = None
    if made.size:
        grid = (-(-queries // _ROWS), heads, batch)
        run(kernel_path().with_name(KERNEL_FILE), KERNEL, grid, arguments, constants)
    return made, seen != 0


def packed_inputs(function: Declared, inputs: Mapping[str, Value]) -> tuple[Any, ...]:
    """The inputs of a function in its order, for the interpreter.

    Raises:
        SpecError: inputs are missing, unknown, or of another type.
    """
    wanted = dict(function.inputs)
    if set(inputs) != set(wanted):
        raise SpecError(
            f"{function.name} takes {', '.join(wanted) or 'no inputs'}; given: {', '.join(inputs) or 'none'}"
        )
    packed = []
    for name, kind in function.inputs:
        value = inputs[name]
        value = as_tensor(value) if isinstance(value, np.ndarray) else value
        got = f"*{value.dtype}" if isinstance(value, Tensor) else "a number"
        if (got != kind) if kind.startswith("*") else isinstance(value, Tensor):
            raise SpecError(f"{function.name}: input {name} is {kind}; given: {got}")
        packed.append(value)
    return tuple(packed)
