"""What ``pyfmha verify --functions`` computes with a user's functions, on the example that each gives of its inputs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pyfmha.attention.first import DTYPES
from pyfmha.attention.forward import HEAD_SIZES
from pyfmha.attention.run import to_float
from pyfmha.errors import KernelSourceError, SpecError
from pyfmha.functions.evaluate import evaluate
from pyfmha.functions.family import Declared, WithFunction, declared_in
from pyfmha.interpreter.loading import import_file
from pyfmha.interpreter.process import run_in_subprocess
from pyfmha.spec.advice import install_command
from pyfmha.verify.biased_cases import BiasedCase

Example = Callable[[int, int, int, int], Mapping[str, Any]]
Run = Callable[..., None]


@dataclass(frozen=True)
class FunctionCase(BiasedCase):
    """One problem, of a dense batch without lengths.

    Attributes:
        function: the user's.
        inputs_of: its inputs by name.
        run: the interpreter, as of :func:`pyfmha.functions.evaluate.evaluate`.
        factor: of the usual scale.
    """

    function: Declared = field(kw_only=True)
    inputs_of: Mapping[str, Any] = field(kw_only=True, compare=False)
    run: Run = field(kw_only=True, compare=False, repr=False)
    factor: float = field(kw_only=True, default=1.0)

    @property
    def scale(self) -> float:
        """As of :class:`Case`, times the factor."""
        return super().scale * self.factor

    @cached_property
    def evaluated(self) -> tuple[Any, Any]:
        """What the function makes of the scores, and which keys it shows, [batch, heads, queries, keys]."""
        q, k = (to_float(self.view(name, self.inputs[name]), self.dtype) for name in "QK")
        scores = self.scale * q @ np.repeat(k, self.heads // self.kv_heads, axis=1).transpose(0, 1, 3, 2)
        if self.softcap:
            scores = self.softcap * np.tanh(scores / self.softcap)
        bias = super().options().get("bias")
        scores = scores if bias is None else scores + bias
        return evaluate(self.function, scores, self.inputs_of, first_position=self._first, run=self.run)

    @property
    def _first(self) -> int:
        return self.kv_len - self.q_len if self.bottom_right else 0

    def options(self) -> dict[str, Any]:
        """As of :class:`BiasedCase`, with the function."""
        scores, seen = self.evaluated
        first = self._first

        def score(_: Any, batch: int, head: int, query: Any, key: Any) -> Any:
            return scores[batch, head][query - first, key]

        def shown(batch: int, head: int, query: Any, key: Any) -> Any:
            return seen[batch, head][query - first, key]

        return {**super().options(), "score": score, "seen": shown}


MANY = 1296
"""Tokens: a square and a multiple of 8."""


def function_cases(
    function: Declared, example: Example, dtype: str, padded: int, run: Run = run_in_subprocess
) -> list[FunctionCase]:
    """For one ``fmha_with_*``: alone, with everything else, and misaligned; tokens are squares and multiples of 8."""

    def case(name: str, tokens: int, batch: int = 2, heads: int = 2, **changes: Any) -> FunctionCase:
        return FunctionCase(
            f"{function.name}, {name}", dtype, padded, batch, heads, q_len=tokens, kv_len=tokens,
            function=function, inputs_of=example(batch, heads, tokens, tokens), run=run,
            **{"kv_heads": heads, **changes},
        )  # fmt: skip

    several = case("several tiles", 144, 1, 3)
    beside: dict[str, Any] = {"bias": (2, 2, 64, 64), "mask": (2, 1, 1, 64), "sinks": "own", "right": 0}
    return [
        case("alone", 64),
        several,
        case("with bias, mask, sinks, causal, one key head", 64, kv_heads=1, **beside),
        case("causal", 64, right=0),
        case("with a window", 64, left=30),
        case("with a soft cap", 64, softcap=4.0),
        case("values of half", 64, v_head_size=padded // 2),
        case("with a scale below 0", 64, factor=-1.0),  # which Hopper's kernel does not take
        case("with a mask", 64, mask=(2, 1, 64, 64)),
        case("with a mask, odd rows of it", 64, mask=(2, 1, 64, 64), tensor_gap=1, tensor_shift=1),
        replace(several, name=f"{several.name}, misaligned", shift=1),
        # Above 1024 queries Hopper's kernel is cut another way there.
        *(
            [case("many queries", MANY, 1, 1), case("many queries, causal", MANY, 1, 1, right=0)]
            if padded == 128
            else []
        ),
    ]


def examples_in(source: Path) -> Iterator[tuple[Declared, Example]]:
    """The functions of a file, which is imported here, with their examples.

    Raises:
        KernelSourceError: it cannot be imported, or declares none.
        SpecError: a function has no example.
    """
    try:
        module = import_file(source.resolve(), "_functions_of_")
    except (KernelSourceError, SpecError):
        raise
    except Exception as error:  # whatever a user's file raises
        if isinstance(error, ModuleNotFoundError) and error.name == "triton":
            raise KernelSourceError(f"{source} needs Triton, which is missing: {install_command('aot')}") from None
        raise KernelSourceError(f"{source} cannot be imported: {type(error).__name__}: {error}") from error
    held = {name: value for name, value in vars(module).items() if hasattr(type(value), "__pyfmha__")}
    for function in declared_in(source, lambda _: [{**v.__pyfmha__(), "attribute": n} for n, v in held.items()]):
        example = held[function.name].example
        if example is None:
            raise SpecError(
                f"{function.name} of {source} has no example of its inputs to be verified with: give its decorator"
                " example=, a function of (batch, heads, q_len, kv_len) that returns them by name"
            )
        yield function, example


def function_plans(
    examples: Sequence[tuple[Declared, Example]], dtypes: Sequence[str] = DTYPES, run: Run = run_in_subprocess
) -> Iterator[tuple[WithFunction, list[FunctionCase]]]:
    """Every function of a library that could be made of some, with its cases, made as they are asked for."""
    for function, example in examples:
        for dtype in dtypes:
            for size in HEAD_SIZES:
                yield WithFunction(dtype, size, function=function), function_cases(function, example, dtype, size, run)
