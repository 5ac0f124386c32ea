"""What a user's functions give for scores, for the interpreter: the same source, in float64, by numpy."""

import triton
import triton.language as tl


@triton.jit
def evaluate_function(
    Scores, Seen, num_heads, q_len, kv_len, first_position, inputs, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SCORE: tl.constexpr = None, SEEN: tl.constexpr = None,
):  # fmt: skip
    """Grid: (cdiv(q_len, BLOCK_M), num_heads, batch). Scores are float64 [batch, heads, q_len, kv_len], changed in
    place; Seen are bytes of that shape. Query i stands at position first_position + i; BLOCK_N is at least kv_len."""
    if inputs is None:
        inputs = ()
    head = tl.program_id(1)
    batch = tl.program_id(2)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    given = (row < q_len)[:, None] & (column < kv_len)[None, :]
    offsets = ((batch * num_heads + head) * q_len + row)[:, None].to(tl.int64) * kv_len + column[None, :]
    query = (tl.minimum(row, q_len - 1) + first_position)[:, None]
    query = tl.maximum(query, 0)
    key = tl.minimum(column, kv_len - 1)[None, :]
    if SCORE is not None:
        score = SCORE(tl.load(Scores + offsets, mask=given, other=0.0), batch, head, query, key, *inputs)
        tl.store(Scores + offsets, tl.cast(score, tl.float64), mask=given)
    if SEEN is not None:
        seen = SEEN(batch, head, query, key, *inputs)
        tl.store(Seen + offsets, tl.broadcast_to(seen.to(tl.uint8), [BLOCK_M, BLOCK_N]), mask=given)
