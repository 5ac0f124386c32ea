"""``torch.ops.pyfmha.attention``: tensors in, tensors out, known to PyTorch's compiler and exporter."""

import torch

from pyfmha.errors import PluginError
from pyfmha.torch import cpu
from pyfmha.torch.launch import launch
from pyfmha.torch.settings import Settings, problem_of

NAME = "pyfmha::attention"
Lengths = dict[str, torch.Tensor]


@torch.library.custom_op(NAME, mutates_args=())  # type: ignore[untyped-decorator]
def attention_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    causal: bool = False,
    bottom_right: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    layout: str = "bhsd",
    q_lengths: torch.Tensor | None = None,
    kv_lengths: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_kv: torch.Tensor | None = None,
    return_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention; arguments as :func:`pyfmha.torch.attention`.

    Returns:
        Out, and the log-sum-exp, which is empty unless it was asked for.
    """
    settings = Settings(scale, causal, bottom_right, window_left, window_right, softcap, layout)
    lengths = _lengths(q_lengths, kv_lengths, cu_seqlens_q, cu_seqlens_kv)
    problem = problem_of(q, k, v, settings, frozenset(lengths), return_lse)
    if q.is_cuda:
        outputs = launch(problem, [q, k, v, *(length.to(torch.int32) for length in lengths.values())])
        return outputs[0], outputs[1] if return_lse else _nothing(q)
    if "cu_seqlens_q" in lengths:
        raise PluginError("ragged batches are served on a GPU only")
    if layout == "bshd":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = cpu.attend(q, k, v, settings, q_lengths, kv_lengths)
    if layout == "bshd":
        out = out.transpose(1, 2).contiguous()
    return out, lse if return_lse else _nothing(q)


@attention_op.register_fake  # type: ignore[untyped-decorator]
def _fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool = False, bottom_right: bool = False,
    window_left: int = -1, window_right: int = -1, softcap: float = 0.0, layout: str = "bhsd",
    q_lengths: torch.Tensor | None = None, kv_lengths: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None, cu_seqlens_kv: torch.Tensor | None = None, return_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    out = q.new_empty(q.shape)
    if not return_lse:
        return out, _nothing(q)
    if cu_seqlens_q is not None:
        return out, q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    rows, heads = (2, 1) if layout == "bhsd" else (1, 2)
    return out, q.new_empty((q.shape[0], q.shape[heads], q.shape[rows]), dtype=torch.float32)


def _nothing(q: torch.Tensor) -> torch.Tensor:
    return q.new_empty((0,), dtype=torch.float32)


def _lengths(
    q_lengths: torch.Tensor | None,
    kv_lengths: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_kv: torch.Tensor | None,
) -> Lengths:
    """Those that are given, in the plugin's order."""
    if (cu_seqlens_q is None) != (cu_seqlens_kv is None):
        raise PluginError("give cu_seqlens_q and cu_seqlens_kv, which may be one tensor, or none")
    named = {
        "q_lengths": q_lengths,
        "kv_lengths": kv_lengths,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_kv": cu_seqlens_kv,
    }
    return {name: tensor for name, tensor in named.items() if tensor is not None}
