"""The row of FlashAttention-3: dense, values of another head size, ragged, decoding, key lengths and fp8."""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

from pyfmha.bench.cells import Cell
from pyfmha.bench.inputs import DeviceInputs
from pyfmha.bench.protocol import MissingError, refuse
from pyfmha.bench.torch_rows import PreparedTorch, extras_of, find_torch, nothing, tensors_of
from pyfmha.runtime.device import Stream


class Flash3:
    """FlashAttention-3: the package ``fa3-fwd`` (bf16, fp8), or the project's own ``flash_attn_interface``."""

    key, title, strictness = "flash3", "FlashAttention-3", 10.0

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def prepare(self, cell: Cell, inputs: DeviceInputs) -> PreparedTorch:
        """See the protocol."""
        torch = find_torch()
        refuse(cell, self.title, "ragged", "kv_lengths", "fp8", "values")
        if cell.dtype == "fp32":
            raise MissingError("FlashAttention-3 has no fp32")
        # Its mask is aligned with the last query and key, ours with the first.
        if cell.causal and (cell.seq != cell.kv_seq or cell.kv_lengths):
            raise MissingError("its causal mask is another where there are more or fewer keys than queries")
        attention = _attention(cell, extras_of(torch, inputs))
        # It takes [batch, sequence, heads, head size], by any strides; a ragged batch without the first axis.
        tensors = [[tensor.transpose(1, 2) for tensor in one] for one in tensors_of(torch, inputs)]
        if cell.tokens:
            tensors = [[tensor[0] for tensor in one] for one in tensors]

        def call(index: int) -> Any:
            found = attention(
                *tensors[index], softmax_scale=cell.sm_scale, causal=cell.causal, softcap=float(cell.softcap)
            )
            out = found[0] if isinstance(found, tuple) else found
            return (out[None] if cell.tokens else out).transpose(1, 2)

        prepared = PreparedTorch(torch, self._stream, call, inputs, nothing)
        try:
            with prepared.active():
                prepared.launch(0)
        except RuntimeError as error:
            raise MissingError(str(error).splitlines()[0]) from error
        return prepared


def _attention(cell: Cell, extras: dict[str, Any]) -> Callable[..., Any]:
    """What computes a cell from Q, K and V. For one query and for key lengths that is the function which itself chooses
    over how many programs keys are spread, or is told how many count."""
    if cell.tokens:
        ends, longest, ragged = extras["cu_seqlens"], max(cell.tokens), _function("flash_attn_varlen_func")
        return lambda q, k, v, **options: ragged(q, k, v, ends, ends, longest, longest, **options)
    if cell.kv_lengths:
        lengths, cached = extras["kv_lengths"], _function("flash_attn_with_kvcache")
        return lambda q, k, v, **options: cached(q, k, v, cache_seqlens=lengths, **options)
    return _function("flash_attn_with_kvcache" if cell.seq == 1 else "flash_attn_func")


def _function(function: str) -> Callable[..., Any]:
    """A function by name. Raises MissingError where no package has it."""
    for name in ("fa3_fwd_interface", "flash_attn_interface"):
        if importlib.util.find_spec(name) is None:
            continue
        try:
            found: Callable[..., Any] = getattr(importlib.import_module(name), function)
            return found
        except (ImportError, OSError, AttributeError, RuntimeError) as error:
            raise MissingError(f"{name} cannot be used: {(str(error).splitlines() or [''])[0]}") from error
    raise MissingError("FlashAttention-3 is not installed: pip install fa3-fwd einops")
