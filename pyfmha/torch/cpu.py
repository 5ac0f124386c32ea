"""The operator on the CPU, in PyTorch's own arithmetic: float32, whatever the tensors' type."""

from collections.abc import Mapping

import torch

from pyfmha.torch.functions import Evaluated
from pyfmha.torch.settings import NONE, Settings


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    settings: Settings,
    q_lengths: torch.Tensor | None,
    kv_lengths: torch.Tensor | None,
    beside: Mapping[str, torch.Tensor] = NONE,
    function: Evaluated | None = None,
    first: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of padded batches.

    Args:
        q: [batch, heads, Sq, head size].
        k, v: [batch, kv heads, Skv, head size].
        settings: with layout ``bhsd``.
        q_lengths, kv_lengths: [batch], or None.
        beside: ``bias`` and ``mask``, broadcast to [batch, heads, Sq, Skv], and ``sinks`` [heads], where there are any.
        function: functions of a user's.
        first: number of the first sequence, which they are told.

    Returns:
        Out, of q's shape and type, and the log-sum-exp, float32 [batch, heads, Sq].
    """
    group = q.shape[1] // k.shape[1]
    keys, values = (x.float().repeat_interleave(group, dim=1) for x in (k, v))
    scores = settings.scale * (q.float() @ keys.transpose(-2, -1))
    if settings.softcap:
        scores = settings.softcap * torch.tanh(scores / settings.softcap)
    seen = _seen(q, k, settings, q_lengths, kv_lengths)
    if "mask" in beside:
        seen = seen & beside["mask"]
    if "bias" in beside:
        scores = scores + beside["bias"].float()
        seen = seen & ~beside["bias"].isneginf()
    if function is not None:
        scores, shown = _of_function(function, first, scores, settings, q_lengths, kv_lengths)
        seen = seen & shown
    scores = scores.masked_fill(~seen, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    if "sinks" in beside:
        counted = _ends(q_lengths, q.shape[0], q.shape[2], q.device)[..., 0]
        within = torch.arange(q.shape[2], device=q.device) < counted
        sinks = beside["sinks"].float()[None, :, None].expand(lse.shape)
        lse = torch.where(within, torch.logaddexp(lse, sinks), lse)
    # A row without a key has a log-sum-exp of minus infinity, and zeros.
    weights = torch.exp(scores - torch.where(lse.isneginf(), 0.0, lse)[..., None])
    return _weighted(weights, values, seen).to(q.dtype).contiguous(), lse


def _weighted(weights: torch.Tensor, values: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Sums of weighted values. Those that are NaN or infinite reach the rows that see them only: 0 * NaN is NaN."""
    odd = ~values.isfinite()
    out = weights @ values.masked_fill(odd, 0.0)
    if not odd.any():
        return out
    reached = (seen & odd.any(dim=-1)[..., None, :]).any(dim=-1, keepdim=True)
    shown = values.masked_fill(~seen.any(dim=-2, keepdim=True).transpose(-2, -1), 0.0)
    return torch.where(reached, weights @ shown, out)


def attend_ragged(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    settings: Settings,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_kv: torch.Tensor,
    beside: Mapping[str, torch.Tensor] = NONE,
    function: Evaluated | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of sequences that lie behind each other, one after the other.

    Args:
        q: [tokens, heads, head size].
        k, v: [tokens, kv heads, head size].
        settings: as :func:`attend`.
        cu_seqlens_q, cu_seqlens_kv: [sequences + 1], where each begins.
        beside: as :func:`attend`, of the longest sequence; the others see its beginning.
        function: as there.

    Returns:
        Out, of q's type, and the log-sum-exp, float32 [heads, tokens]; zeros and minus infinity where no sequence is.
    """
    out = q.new_zeros((*q.shape[:-1], v.shape[-1]))
    lse = q.new_full((q.shape[1], q.shape[0]), float("-inf"), dtype=torch.float32)
    # As on a GPU: what lies beyond the tensor, or before the sequence before, counts as the nearest that is possible.
    rows, keys = (
        ends.clamp(0, len(x)).cummax(0).values.tolist() for ends, x in ((cu_seqlens_q, q), (cu_seqlens_kv, k))
    )
    for number in range(len(rows) - 1):
        of_q, of_kv = slice(*rows[number : number + 2]), slice(*keys[number : number + 2])
        one_q, one_k, one_v = (x.transpose(0, 1)[None] for x in (q[of_q], k[of_kv], v[of_kv]))
        cut = {name: _cut(name, tensor, number, one_q, one_k) for name, tensor in beside.items()}
        found, sums = attend(one_q, one_k, one_v, settings, None, None, cut, function, number)
        out[of_q], lse[:, of_q] = found[0].transpose(0, 1), sums[0]
    return out, lse


def _cut(name: str, tensor: torch.Tensor, number: int, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """A bias or mask for one sequence of a ragged batch: past its end a bias is 0, and a mask hides. Sinks are the same
    for all."""
    if name == "sinks":
        return tensor
    whole = tensor[(None,) * (4 - tensor.ndim)]
    of_one = whole[number : number + 1] if whole.shape[0] > 1 else whole
    found = of_one[:, :, : q.shape[2], : k.shape[2]]
    here = zip(found.shape[2:], of_one.shape[2:], (q.shape[2], k.shape[2]), strict=True)
    rows, keys = (0 if all_alike == 1 else max(wanted - have, 0) for have, all_alike, wanted in here)
    return torch.nn.functional.pad(found, (0, keys, 0, rows))


def _of_function(
    function: Evaluated,
    first: int,
    scores: torch.Tensor,
    settings: Settings,
    q_lengths: torch.Tensor | None,
    kv_lengths: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a function makes of scores, and which keys it shows. It is asked for what there is of each sequence only, as
    its tensors may have no more."""
    batch, _, rows, columns = scores.shape
    made, shown = scores.clone(), torch.zeros_like(scores, dtype=torch.bool)
    q_ends, kv_ends = (
        _ends(lengths, batch, most, scores.device).flatten().tolist()
        for lengths, most in ((q_lengths, rows), (kv_lengths, columns))
    )
    for number, (queries, keys) in enumerate(zip(q_ends, kv_ends, strict=True)):
        if queries and keys:
            there = number, slice(None), slice(queries), slice(keys)
            position = keys - queries if settings.bottom_right else 0
            made[there], shown[there] = function(scores[there], first + number, position)
    return made, shown


def _seen(
    q: torch.Tensor,
    k: torch.Tensor,
    settings: Settings,
    q_lengths: torch.Tensor | None,
    kv_lengths: torch.Tensor | None,
) -> torch.Tensor:
    """Which keys count without a bias and a mask: bool [batch or 1, 1, Sq, Skv]."""
    rows, columns = q.shape[2], k.shape[2]
    q_ends = _ends(q_lengths, q.shape[0], rows, q.device)
    kv_ends = _ends(kv_lengths, q.shape[0], columns, q.device)
    at = torch.arange(rows, device=q.device)[:, None]
    key = torch.arange(columns, device=q.device)[None, :]
    seen = (at < q_ends) & (key < kv_ends)
    position = at + (kv_ends - q_ends if settings.bottom_right else 0)
    right = 0 if settings.causal else settings.window_right
    if right >= 0:
        seen = seen & (key <= position + right)
    if settings.window_left >= 0:
        seen = seen & (key >= position - settings.window_left)
    return seen


def _ends(lengths: torch.Tensor | None, batch: int, most: int, device: torch.device) -> torch.Tensor:
    if lengths is None:
        return torch.full((batch, 1, 1, 1), most, device=device)
    return lengths.clamp(0, most).reshape(batch, 1, 1, 1).long()
