"""First blocks of a causal tile of fmha_fp8_sm90.py, whose masks go by 64 keys: of their keys a consumer's rows see the
first 64, 128, ... at most, and all but the last 64 of these all rows see."""

from fp8_wide import keys_asm, keys_constraints, layout_of, masked, masked_wide, packed, parts_of_block, types_of
from sm90_softmax import mask_far
from sm90_tiles import ROWS
from sm90_wide import is_wide, keys_of_parts, near_keys
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

NEAR_KEYS: gl.constexpr = gl.constexpr(64)


@gluon.jit
def multiply_near_keys(q, k_smem, stage, SHAPE: gl.constexpr):
    """Issue the product of a consumer's rows and the first 64 keys of a block."""
    asm: gl.constexpr = keys_asm(SHAPE.BLOCK_N, SHAPE.BLOCK_D, NEAR_KEYS)
    constraints: gl.constexpr = keys_constraints(NEAR_KEYS)
    types: gl.constexpr = types_of((NEAR_KEYS,))
    if is_wide(SHAPE.BLOCK_N):
        k = k_smem.index(stage * parts_of_block(SHAPE.BLOCK_D, SHAPE.BLOCK_N))
    else:
        k = k_smem.index(stage)
    return gl.inline_asm(asm, constraints, (q, k), types, is_pure=False)[0]


@gluon.jit
def _widened(p, KEYS: gl.constexpr):
    """Packed weights of 64 keys as those of KEYS, of which the others have none."""
    wide = p
    if KEYS > NEAR_KEYS:
        none = gl.zeros(p.shape, gl.int32, layout=p.type.layout)
        wide = gl.join(p, none).permute((0, 3, 1, 2)).reshape([ROWS, KEYS // 16, 4])
    layout: gl.constexpr = packed(gl.zeros([ROWS, KEYS], gl.float32, layout=layout_of(KEYS))).type.layout
    return gl.convert_layout(wide, layout, assert_trivial=True)


@gluon.jit
def packed_near(weights, BLOCK_N: gl.constexpr):
    """Weights of the first 64 keys of a block, packed as those of all of them."""
    p = packed(weights)
    if is_wide(BLOCK_N):
        KEYS: gl.constexpr = keys_of_parts(BLOCK_N)
        made = (_widened(p, KEYS[0]),)
        for part in gl.static_range(1, len(KEYS)):
            nothing = packed(gl.zeros([ROWS, KEYS[part]], gl.float32, layout=layout_of(KEYS[part])))
            made += (nothing,)
        return made
    else:
        return _widened(p, BLOCK_N)


@gluon.jit
def _all_but_the_first(scores, ends, key):
    """As `masked_wide`, of parts of which the first is not masked, and the second begins with a key."""
    made = (scores[0],)
    made += masked_wide(scores[1:], ends, key)
    return made


@gluon.jit
def masked_far(scores, seen, ends, key, BLOCK_N: gl.constexpr):
    """Scores of the keys below a row's end, of which no row's is before `seen`; of the others -inf."""
    if is_wide(BLOCK_N):
        NEAR: gl.constexpr = near_keys(BLOCK_N)
        if seen >= key + NEAR:
            scores = _all_but_the_first(scores, ends, key + NEAR)
        else:
            scores = masked_wide(scores, ends, key)
    else:
        S_LAYOUT: gl.constexpr = layout_of(BLOCK_N)
        if seen >= key + BLOCK_N // 2:
            scores = mask_far(scores, ends, key, S_LAYOUT, BLOCK_N)
        else:
            scores = masked(scores, ends, key)
    return scores
