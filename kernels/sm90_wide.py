"""Blocks of keys of fmha_sm90.py that are no power of two, as 96: what FlashAttention-3 has, where 128 do not fit.

wgmma takes any multiple of 8 keys, tensors of Gluon powers of two. So scores and weights of a block are tuples of two
or three tensors, whose registers one wgmma writes or reads: its text stands here. TMA loads all keys of a panel, see
below, in one copy, of which the descriptor's type, and with it a buffer, has a part of `unit_keys`.
"""

from sm90_asm import after, moved
from sm90_maxima import largest_of_parts_asm, of_each_row
from sm90_softmax import added, pack
from sm90_tiles import ROWS
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma_wait


@gluon.constexpr_function
def keys_of_parts(block_n):
    """Keys of each tensor: powers of two, the largest first."""
    return tuple(1 << i for i in range(block_n.bit_length() - 1, -1, -1) if block_n >> i & 1)


@gluon.constexpr_function
def unit_keys(block_n):
    """Keys of a part: the largest power of two of which a block is a multiple."""
    return block_n & -block_n


@gluon.constexpr_function
def is_wide(block_n):
    return block_n & (block_n - 1) != 0


@gluon.constexpr_function
def near_keys(block_n):
    """Keys of the first tensor."""
    return 1 << (block_n.bit_length() - 1)


@gluon.constexpr_function
def layout_of(keys):
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, keys, 16])


@gluon.constexpr_function
def panel_of(block_d):
    """Columns that lie beside each other in shared memory: of 16 bits, in a row of 128 bytes at most, swizzled."""
    return min(block_d, 64)


@gluon.constexpr_function
def panels_of(block_d, two_parts):
    return (3 * block_d if two_parts else block_d) // panel_of(block_d)


@gluon.constexpr_function
def parts_of_block(block_d, block_n, two_parts):
    return panels_of(block_d, two_parts) * (block_n // unit_keys(block_n))


@gluon.jit
def allocate_blocks(desc, count: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, TWO_PARTS: gl.constexpr):
    """Shared memory for so many blocks."""
    COUNT: gl.constexpr = count * parts_of_block(BLOCK_D, BLOCK_N, TWO_PARTS)
    return (gl.allocate_shared_memory(desc.dtype, [COUNT, 1, 1, unit_keys(BLOCK_N), panel_of(BLOCK_D)], desc.layout),)


@gluon.jit
def load_block(desc, batch, head, key, ready, buffers, stage, SHAPE: gl.constexpr):
    """Have TMA load a block of keys, all columns."""
    UNITS: gl.constexpr = SHAPE.BLOCK_N // unit_keys(SHAPE.BLOCK_N)
    PANEL: gl.constexpr = panel_of(SHAPE.BLOCK_D)
    PANELS: gl.constexpr = panels_of(SHAPE.BLOCK_D, SHAPE.TWO_PARTS)
    # Barriers as in `load_rows`.
    mbarrier.expect(ready, SHAPE.BLOCK_N * PANELS * PANEL * 2)
    for panel in gl.static_range(PANELS):
        to = buffers[0].index((stage * PANELS + panel) * UNITS)
        gl.barrier()
        tma.async_load(desc, [batch, head, key, panel * PANEL], ready, to)


@gluon.constexpr_function
def _wgmma(columns, dtype):
    kind = "f16" if dtype == gl.float16 else "bf16"
    return f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind}"


@gluon.constexpr_function
def _begun(names, panel):
    """Declares registers and sets the upper half of descriptors (PTX ISA, Matrix Descriptor Format): rows swizzled by
    128 bytes or 64, and how far 8 of them reach."""
    mode = 1 if panel == 64 else 2
    return [
        f".reg .b32 low, high, {', '.join(names)};",
        ".reg .b64 a, b;",
        f"mov.b32 high, {mode << 30 | panel * 2 * 8 // 16:#x};",
    ]


@gluon.constexpr_function
def _descriptor(name, address, offset):
    """Of a matrix in shared memory so many bytes on."""
    return [f"add.u32 low, {address}, {offset // 16};", f"mov.b64 {name}, {{low, high}};"]


@gluon.constexpr_function
def _keys_asm(block_n, panel, panels, q_parts, dtype):
    """Scores of 64 rows and a block of keys. Operands: scores; addresses of each part of the queries, of which the
    first of two has two panels, and of the keys."""
    count = block_n // 2
    written = ", ".join(f"${i}" for i in range(count))
    addresses = [f"q{i}" for i in range(q_parts)]
    lines = [".reg .pred more;", *_begun([*addresses, "k"], panel)]
    for i, name in enumerate([*addresses, "k"]):
        lines += [f"shr.u32 {name}, ${count + i}, 4;", f"or.b32 {name}, {name}, 0x10000;"]
    lines += ["setp.ne.b32 more, high, high;", "wgmma.fence.sync.aligned;"]
    first_panels = 2 if q_parts == 2 else panels
    more = "more"
    for i in range(panels):
        part, place = (0, i) if i < first_panels else (1, i - first_panels)
        for column in range(0, panel, 16):
            lines += _descriptor("a", addresses[part], (place * 64 * panel + column) * 2)
            lines += _descriptor("b", "k", (i * block_n * panel + column) * 2)
            lines += [f"{_wgmma(block_n, dtype)} {{{written}}}, a, b, {more}, 1, 1, 0, 0;"]
            more = "1"
    return "{ " + " ".join([*lines, "wgmma.commit_group.sync.aligned;"]) + " }"


@gluon.constexpr_function
def _keys_constraints(block_n, q_parts):
    return ",".join(["=&f"] * (block_n // 2) + ["r"] * (q_parts + 1))


@gluon.constexpr_function
def _types(widths):
    return tuple(gl.distributed_type(gl.float32, [64, n], layout_of(n)) for n in widths)


@gluon.jit
def multiply_keys_wide(q_smem, slot, k_smem, stage, SHAPE: gl.constexpr):
    """Issue the product of a consumer's rows and a block of keys."""
    BLOCK_D: gl.constexpr = SHAPE.BLOCK_D
    BLOCK_N: gl.constexpr = SHAPE.BLOCK_N
    PARTS: gl.constexpr = len(q_smem)
    asm: gl.constexpr = _keys_asm(
        BLOCK_N, panel_of(BLOCK_D), panels_of(BLOCK_D, SHAPE.TWO_PARTS), PARTS, q_smem[0].dtype
    )
    constraints: gl.constexpr = _keys_constraints(BLOCK_N, PARTS)
    types: gl.constexpr = _types(keys_of_parts(BLOCK_N))
    operands = ()
    for part in gl.static_range(PARTS):
        operands += (q_smem[part].index(slot),)
    operands += (k_smem[0].index(stage * parts_of_block(BLOCK_D, BLOCK_N, SHAPE.TWO_PARTS)),)
    return gl.inline_asm(asm, constraints, operands, types, is_pure=False)


@gluon.constexpr_function
def _values_asm(block_n, panel, panels, dtype):
    """Operands: sums, written and read; weights, as `pack` gives them; the address of the values."""
    columns = panel * panels
    count = columns // 2
    sums = ", ".join(f"${i}" for i in range(count))
    weights = [f"${2 * count + i}" for i in range(block_n // 4)]
    lines = [*_begun(["v"], panel), f"shr.u32 v, ${2 * count + len(weights)}, 4;"]
    lines += [f"or.b32 v, v, {block_n * panel * 2 // 16 << 16:#x};", "wgmma.fence.sync.aligned;"]
    for first in range(0, block_n, 16):
        a = ", ".join(weights[first // 4 : first // 4 + 4])
        lines += [
            *_descriptor("b", "v", first * panel * 2),
            f"{_wgmma(columns, dtype)} {{{sums}}}, {{{a}}}, b, 1, 1, 1, 1;",
        ]
    return "{ " + " ".join([*lines, "wgmma.commit_group.sync.aligned;"]) + " }"


@gluon.constexpr_function
def _values_constraints(columns, block_n):
    count = columns // 2
    return ",".join(["=f"] * count + [str(i) for i in range(count)] + ["r"] * (block_n // 4 + 1))


@gluon.constexpr_function
def _widths(block_d, two_parts):
    return (2 * block_d, block_d) if two_parts else (block_d,)


@gluon.jit
def multiply_values_wide(p, v_smem, stage, acc, SHAPE: gl.constexpr):
    """Issue the product of weights, as `pack` gives them, and a block of values, which is added to `acc`."""
    BLOCK_D: gl.constexpr = SHAPE.BLOCK_D
    BLOCK_N: gl.constexpr = SHAPE.BLOCK_N
    PANEL: gl.constexpr = panel_of(BLOCK_D)
    PANELS: gl.constexpr = panels_of(BLOCK_D, SHAPE.TWO_PARTS)
    asm: gl.constexpr = _values_asm(BLOCK_N, PANEL, PANELS, v_smem[0].dtype)
    constraints: gl.constexpr = _values_constraints(PANELS * PANEL, BLOCK_N)
    types: gl.constexpr = _types(_widths(BLOCK_D, SHAPE.TWO_PARTS))
    v = v_smem[0].index(stage * parts_of_block(BLOCK_D, BLOCK_N, SHAPE.TWO_PARTS))
    return gl.inline_asm(asm, constraints, acc + p + (v,), types, is_pure=False)


@gluon.jit
def wait_for_products_wide(acc, p, scores):
    """As `wait_for_products`."""
    done = warpgroup_mma_wait(0, deps=acc + p + scores)
    PARTS: gl.constexpr = len(acc)
    END: gl.constexpr = len(acc) + len(p)
    return done[:PARTS], done[PARTS:END], done[END:]


@gluon.jit
def _of_threads(x):
    """[rows, 4]: the largest of what each of the four threads that share a row holds of it."""
    parts = x.reshape([ROWS, x.shape[1] // 8, 4, 2])
    return gl.max(gl.max(parts, 3), 1)


@gluon.jit
def _masked(scores, begins, ends, key):
    LAYOUT: gl.constexpr = gl.SliceLayout(1, scores.type.layout)
    columns = gl.arange(0, scores.shape[1], layout=gl.SliceLayout(0, scores.type.layout))[None, :]
    visible = columns < (gl.convert_layout(ends, LAYOUT, assert_trivial=True) - key)[:, None]
    if len(begins) == 1:
        visible = visible & (columns >= (gl.convert_layout(begins[0], LAYOUT, assert_trivial=True) - key)[:, None])
    return gl.where(visible, scores, float("-inf"))


@gluon.jit
def _all_masked(scores, begins, ends, key):
    first = _masked(scores[0], begins, ends, key)
    key += scores[0].shape[1]
    second = _masked(scores[1], begins, ends, key)
    if len(scores) == 3:
        return first, second, _masked(scores[2], begins, ends, key + scores[1].shape[1])
    else:
        return first, second


@gluon.constexpr_function
def _peaks(layout):
    return gl.distributed_type(gl.float32, [64, 4], layout)


@gluon.constexpr_function
def _largest_constraints(block_n):
    return ",".join(["=&f"] * 2 + ["f"] * (block_n // 2 + 2))


@gluon.jit
def _largest_of_threads(scores, m, row_sum, shift: gl.constexpr, BLOCK_N: gl.constexpr):
    """As `_of_threads` of all parts, by integers as in sm90_maxima.py."""
    asm: gl.constexpr = largest_of_parts_asm(BLOCK_N // 2, shift)
    constraints: gl.constexpr = _largest_constraints(BLOCK_N)
    LAYOUT: gl.constexpr = row_sum.type.layout
    m = gl.convert_layout(m, gl.SliceLayout(1, LAYOUT), assert_trivial=True)[:, None].broadcast_to([ROWS, 4])
    operands = scores
    operands += (m,)
    return gl.inline_asm(asm, constraints, operands, _peaks(LAYOUT), is_pure=True)


@gluon.jit
def maxima_wide(scores, m, row_sum, scale, shift: gl.constexpr, begins, ends, key, masked, SHAPE: gl.constexpr):
    """As `maxima`; begins: () where a row sees all keys below its end, else of one tensor."""
    if masked:
        scores = _all_masked(scores, begins, ends, key)
    if SHAPE.THREES:
        most = _largest_of_threads(scores, m, row_sum, shift, SHAPE.BLOCK_N)
    else:
        most = _of_threads(scores[0])
        for part in gl.static_range(1, len(scores)):
            of_part = gl.convert_layout(_of_threads(scores[part]), most.type.layout, assert_trivial=True)
            most = gl.maximum(most, of_part)
    most = gl.convert_layout(gl.max(most, 1), m.type.layout, assert_trivial=True)
    m_new = gl.maximum(m, most * scale + shift)
    return scores, m_new, gl.exp2(m - m_new)


@gluon.jit
def _weights(scores, m, scale, dtype: gl.constexpr):
    """Weights, packed, and their sums by thread."""
    parts = scores.reshape([ROWS, scores.shape[1] // 8, 4, 2])
    m = gl.convert_layout(m, gl.SliceLayout(1, gl.SliceLayout(3, parts.type.layout)), assert_trivial=True)
    weights = gl.exp2(parts * scale - m[:, None, :][:, :, :, None])
    sums = gl.sum(gl.sum(weights, 3), 1)
    weights = gl.convert_layout(weights.reshape(scores.shape), scores.type.layout, assert_trivial=True)
    return pack(weights, dtype), sums


@gluon.jit
def _weigh(scores, m, row_sum, alpha, scale, dtype: gl.constexpr):
    """Weights of a block, packed, and the sums with them; m: of rows, [rows, 4]."""
    first, sums = _weights(scores[0], m, scale, dtype)
    p = (first,)
    for part in gl.static_range(1, len(scores)):
        other, of_part = _weights(scores[part], m, scale, dtype)
        p += (other,)
        sums += gl.convert_layout(of_part, sums.type.layout, assert_trivial=True)
    row_sum = added(gl.convert_layout(row_sum, sums.type.layout, assert_trivial=True), alpha, sums)
    return p, row_sum


@gluon.jit
def first_weights_wide(
    scores, m, row_sum, scale, shift: gl.constexpr, begins, ends, key, masked, dtype: gl.constexpr, SHAPE: gl.constexpr
):  # fmt: skip
    """As `weigh`, of the first block of a tile, and packed; begins as for `maxima_wide`."""
    scores, m, alpha = maxima_wide(scores, m, row_sum, scale, shift, begins, ends, key, masked, SHAPE)
    LAYOUT: gl.constexpr = gl.SliceLayout(1, row_sum.type.layout)
    by_thread = gl.convert_layout(m, LAYOUT, assert_trivial=True)[:, None].broadcast_to([ROWS, 4])
    p, row_sum = _weigh(scores, by_thread, row_sum, alpha, scale, dtype)
    return p, m, row_sum


@gluon.jit
def next_weights_wide(acc, scores, m, row_sum, alpha, scale, zero, dtype: gl.constexpr):
    """As `weigh_after`, and packed."""
    LAYOUT: gl.constexpr = row_sum.type.layout
    product = acc[len(acc) - 1]
    element = gl.convert_layout(of_each_row(product, product.shape[1]), LAYOUT, assert_trivial=True)
    m = gl.convert_layout(m, gl.SliceLayout(1, LAYOUT), assert_trivial=True)[:, None].broadcast_to([ROWS, 4])
    return _weigh(scores, after(m, element, zero), row_sum, alpha, scale, dtype)


@gluon.jit
def all_packed(weights, dtype: gl.constexpr):
    """As `pack` of each part."""
    made = ()
    for part in gl.static_range(len(weights)):
        made += (pack(weights[part], dtype),)
    return made


@gluon.jit
def all_moved(p):
    """As `moved`."""
    made = ()
    for part in gl.static_range(len(p)):
        made += (moved(p[part]),)
    return made
