"""A user's functions in float64: the same source under Triton's interpreter, where numpy computes."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from pyfmha.attention.forward import kernel_path
from pyfmha.errors import SpecError
from pyfmha.functions.family import ATTRIBUTES, Declared
from pyfmha.interpreter.kernel import FunctionOf, Tensor, as_tensor
from pyfmha.interpreter.process import run_in_subprocess
from pyfmha.spec.abi import ctype

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
    return tuple(named_inputs(function, inputs).values())


def named_inputs(
    function: Declared, inputs: Mapping[str, Value], told: Collection[str] = ()
) -> dict[str, Tensor | int | float]:
    """The same by name; those that shapes tell may be missing.

    Raises:
        SpecError: as there.
    """
    wanted = dict(function.inputs)
    if set(inputs) - set(wanted) or set(wanted) - set(inputs) - set(told):
        raise SpecError(
            f"{function.name} takes {', '.join(wanted) or 'no inputs'}; given: {', '.join(inputs) or 'none'}"
        )
    return {name: _packed(function.name, name, kind, inputs[name]) for name, kind in function.inputs if name in inputs}


def _packed(function: str, name: str, kind: str, value: Any) -> Tensor | int | float:
    """One input, as a library's function would take it: numbers of its type."""
    what = f"{function}: input {name} is {kind}; given: "
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, np.ndarray | Tensor):
        element = kind.removeprefix("*k").removeprefix("*")
        if isinstance(value, Tensor):
            tensor = value
        else:  # uint16 is how numpy holds bf16
            tensor = Tensor(value, "bf16") if (value.dtype, element) == (np.uint16, "bf16") else as_tensor(value)
        if kind.startswith("*") and tensor.dtype == element:
            return tensor
        hint = "" if kind.startswith("*") else f"; its decorator may say inputs={{{name!r}: '*{tensor.dtype}'}}"
        raise SpecError(f"{what}*{tensor.dtype}{hint}")
    if kind.startswith("*") or not isinstance(value, int | float):
        raise SpecError(what + ("a number" if isinstance(value, int | float) else type(value).__name__))
    number = ctype(kind)
    if number.bounds is None:
        return float(value)
    low, high = number.bounds
    if not isinstance(value, int) or not low <= value <= high:
        raise SpecError(f"{what}{value!r}, which is no integer from {low} to {high}")
    return int(value)
