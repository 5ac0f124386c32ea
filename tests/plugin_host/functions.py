"""Attention with users' functions for the tests of plugins: stand-ins for the library's functions, with plugins."""

import importlib.util
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from helpers import TESTS
from trt_double.scene import SIZE, biased_standin

from plugin_host import attention
from pyfmha.aot import Compiler
from pyfmha.attention import key_blocks
from pyfmha.attention.biased import Biased
from pyfmha.functions.family import Declared, WithFunction, declared_in, file_of, function_operators
from pyfmha.operators.description import Operator
from pyfmha.spec.kernel import Argument, KernelSpec

OWN = TESTS / "functions" / "functions_of_tests.py"
NAMES = ("alibi", "documents", "groups", "relative_positions", "soft_near")
"""A score function, a mask function, one whose blocks are listed, one with shapes that are products, and a pair of
tensors of any shape."""

OWN_AXES: dict[str, dict[str, Sequence[int]]] = {
    "alibi": {},
    "documents": {"documents_tokens": (900, 5000, 200_000)},
    "relative_positions": {"relative_positions_height": (30, 3, 70), "relative_positions_width": (30, 100)},
    "groups": {"groups_tokens": (900, 5000, 200_000)},
    "soft_near": {f"soft_near_caps_{index}": (1, 4, 9) for index in range(4)},
}
"""Sizes of the axes of each."""


def standin(function: Declared, dtype: str = "fp16", size: int = SIZE) -> KernelSpec:
    """A function of the library that compiles in no time, with the arguments of the real one."""
    name = WithFunction(dtype, size, function=function).name
    spec = biased_standin(Biased(dtype, size))
    arguments = (*spec.arguments, *(Argument(name, kind) for name, kind in function.inputs))
    inputs = (("inputs", tuple(name for name, _ in function.inputs)),)
    made = replace(spec, name=name, kernel="with_function", arguments=arguments, tuples=inputs)
    if function.blocks is None:
        return made
    return replace(made, kernel="listed", arguments=(*arguments, *key_blocks.arguments()))


def listing_standins(function: Declared, dtype: str = "fp16", size: int = SIZE) -> list[KernelSpec]:
    """Those which list blocks, if it has them listed."""
    names = WithFunction(dtype, size, function=function).listing_names
    grids = (key_blocks.FLAGS_GRID, key_blocks.GRID)
    made = standin(function, dtype, size)
    return [
        replace(made, name=name, grid=grid.replace("BLOCK_M", "BLOCK").replace("BLOCK_N", "BLOCK"))
        for name, grid in zip(names, grids, strict=False)
    ]


def declared(compiler: Compiler, *files: Path) -> dict[str, Declared]:
    """The functions of some files by name."""
    return {function.name: function for file in files for function in declared_in(file, compiler.collect)}


def standins(compiler: Compiler) -> tuple[list[KernelSpec], list[Operator]]:
    """Stand-ins for :data:`NAMES`, and their operators."""
    files = (*(file_of(name) for name in NAMES[:4]), OWN)
    held = [function for name, function in declared(compiler, *files).items() if name in NAMES]
    operators, notes = function_operators(held)
    assert not notes
    listing = [one for function in held for one in listing_standins(function)]
    return [*listing, *(standin(function) for function in held)], operators


def random_function_values(name: str, chance: random.Random) -> dict[str, Any]:
    """Attributes of one of :data:`NAMES`, most of which go together."""
    values = attention.random_values(chance)
    if name == "soft_near":
        values["soft_near_width"] = chance.choice((1, 5, -3, (1 << 31) - 1))
    kinds = {"alibi": ("score",), "relative_positions": ("score",), "documents": ("mask",), "soft_near": ("score",)}
    kinds |= {"groups": ("mask",)}
    if chance.random() < 0.1:
        values[f"{kinds[name][0]}_function"] = chance.choice(("alibi:0123456789abcdef", "", "other"))
    return values


def own_functions() -> Any:
    """The functions of ``functions_of_tests.py``, as a user's program imports them."""
    spec = importlib.util.spec_from_file_location("functions_of_tests", OWN)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault("functions_of_tests", module)
    spec.loader.exec_module(module)
    return module


def alibi_of(memory: Any, given: dict[str, Any]) -> dict[str, Any]:
    """ALiBi from what reached the driver."""
    slopes = memory(given["slopes"], (given["num_heads"],), np.float32)
    return {"score": lambda s, b, h, i, j: s + slopes[h] * (j - i)}


def soft_near_of(memory: Any, given: dict[str, Any]) -> dict[str, Any]:
    caps, width = memory(given["caps"], (given["num_heads"],), np.float32), given["width"]
    caps = np.where(caps > 0, caps, 1)  # while an engine is built there are zeros
    return {
        "score": lambda s, b, h, i, j: caps[h] * np.tanh(s / caps[h]),
        "seen": lambda b, h, i, j: (i - j < width) & (j <= i),
    }
