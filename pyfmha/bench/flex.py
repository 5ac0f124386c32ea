"""The row of PyTorch's FlexAttention, compiled, at biases, masks and functions; and every row that needs torch."""

from typing import Any

from pyfmha.bench.cells import Cell
from pyfmha.bench.extras import score_of, seen_of
from pyfmha.bench.flash3 import Flash3
from pyfmha.bench.inputs import DeviceInputs
from pyfmha.bench.protocol import Contender, MissingError, refuse
from pyfmha.bench.torch_rows import BACKENDS, Jit, PreparedTorch, Sdpa, extras_of, find_torch, nothing, tensors_of
from pyfmha.runtime.device import Stream

MOST_PROGRAMS = 256
"""How often torch may compile: after 8 times, by default, it runs every further cell uncompiled, many times slower."""

SERVED = ("bias", "mask", "alibi", "documents", "prefix", "t5", "groups", "values")


class Flex:
    """``torch.nn.attention.flex_attention`` by ``torch.compile``."""

    key, title, strictness = "flex", "torch, FlexAttention", 10.0

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def prepare(self, cell: Cell, inputs: DeviceInputs) -> PreparedTorch:
        """See the protocol."""
        torch = find_torch()
        refuse(cell, "FlexAttention", *SERVED)
        if not (cell.beside or cell.v_head_size):
            raise MissingError("not asked: it is timed at biases, masks, functions, and values of another head size")
        try:
            from torch.nn.attention.flex_attention import create_block_mask, flex_attention
        except ImportError:
            raise MissingError("this torch has no FlexAttention: pip install 'torch>=2.6'") from None
        _compile_often(torch)
        extras = extras_of(torch, inputs)
        score, seen = score_of(cell, extras, torch), seen_of(cell, extras)
        blocks = None
        if seen is not None or cell.causal:
            sizes = (cell.batch, None, cell.seq, cell.kv_seq)
            blocks = torch.compile(create_block_mask)(_shown(seen, causal=cell.causal), *sizes, device="cuda")
        attention = torch.compile(flex_attention, dynamic=False)
        tensors = tensors_of(torch, inputs)

        def call(index: int) -> Any:
            return attention(*tensors[index], score_mod=score, block_mask=blocks, scale=cell.sm_scale)

        return PreparedTorch(torch, self._stream, call, inputs, nothing)


def _shown(seen: Any, *, causal: bool) -> Any:
    if seen is None:
        return lambda b, h, q, k: k <= q
    return (lambda b, h, q, k: seen(b, h, q, k) & (k <= q)) if causal else seen


def _compile_often(torch: Any) -> None:
    """Raise torch's limit of programs of one function, under both of its names."""
    config = torch._dynamo.config
    for name in ("recompile_limit", "cache_size_limit"):
        if hasattr(config, name):
            setattr(config, name, max(getattr(config, name), MOST_PROGRAMS))


def torch_contenders(stream: Stream, arch: str) -> list[Contender]:
    """Every row that needs torch."""
    return [*(Sdpa(key, stream) for key in BACKENDS), Flex(stream), Flash3(stream), Jit(stream, arch)]
