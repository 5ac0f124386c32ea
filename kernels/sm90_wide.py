"""Blocks of keys of fmha_sm90.py that are no power of two, as 96: what FlashAttention-3 has, where 128 do not fit.

wgmma takes any multiple of 8 keys, tensors of Gluon powers of two. So scores and weights of a block are two tensors, of
its first `near_keys` and of the rest, whose registers one wgmma writes or reads: its text stands here. TMA loads a block
in boxes of `unit_keys` by 64 columns, so many that for each 64 columns the keys lie without a gap.
"""

from sm90_asm import after
from sm90_lazy import kept, times_where
from sm90_maxima import of_each_row
from sm90_softmax import added, pack
from sm90_tiles import ROWS
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma_wait

PANEL: gl.constexpr = gl.constexpr(64)  # columns of 16 bits in a row of 128 bytes, the widest that TMA swizzles


@gluon.constexpr_function
def near_keys(block_n):
    """Keys of the first tensor: the largest power of two."""
    return 1 << (block_n.bit_length() - 1)


@gluon.constexpr_function
def unit_keys(block_n):
    """Keys of a box: the largest power of two of which a block is a multiple."""
    return block_n & -block_n


@gluon.constexpr_function
def is_wide(block_n):
    return near_keys(block_n) != block_n


@gluon.constexpr_function
def panels_of(block_d, two_parts):
    return (3 * block_d if two_parts else block_d) // PANEL.value


@gluon.jit
def allocate_blocks(desc, count: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, TWO_PARTS: gl.constexpr):
    """Shared memory for so many blocks."""
    UNIT: gl.constexpr = unit_keys(BLOCK_N)
    BOXES: gl.constexpr = count * panels_of(BLOCK_D, TWO_PARTS) * (BLOCK_N // UNIT)
    return (gl.allocate_shared_memory(desc.dtype, [BOXES, 1, 1, UNIT, PANEL], desc.layout),)


@gluon.jit
def load_block(desc, batch, head, key, ready, buffers, stage, SHAPE: gl.constexpr):
    """Have TMA load a block of keys, all columns."""
    UNIT: gl.constexpr = unit_keys(SHAPE.BLOCK_N)
    UNITS: gl.constexpr = SHAPE.BLOCK_N // UNIT
    PANELS: gl.constexpr = panels_of(SHAPE.BLOCK_D, SHAPE.TWO_PARTS)
    mbarrier.expect(ready, SHAPE.BLOCK_N * PANELS * PANEL * 2)
    for panel in gl.static_range(PANELS):
        for unit in gl.static_range(UNITS):
            to = buffers[0].index(stage * (PANELS * UNITS) + panel * UNITS + unit)
            tma.async_load(desc, [batch, head, key + unit * UNIT, panel * PANEL], ready, to)


@gluon.constexpr_function
def _kind(dtype):
    return "f16" if dtype == gl.float16 else "bf16"


@gluon.constexpr_function
def _descriptor(name, address, offset):
    """Of a matrix in shared memory with rows of 128 bytes, swizzled, 8 of them every 1024 bytes (PTX ISA, 9.7.15.5)."""
    return [f"add.u32 low, {address}, {offset // 16};", f"mov.b64 {name}, {{low, high}};"]


@gluon.constexpr_function
def _begun(names):
    regs = ", ".join(names)
    return [f".reg .b32 low, high, {regs};", ".reg .b64 a, b;", "mov.b32 high, 0x40000040;"]


@gluon.constexpr_function
def _keys_asm(block_n, panels, q_parts, dtype):
    """Scores of 64 rows and a block of keys: `panels` are those of each part of the queries, in turn."""
    count = block_n // 2
    kind = _kind(dtype)
    written = ", ".join(f"${i}" for i in range(count))
    addresses = [f"q{i}" for i in range(q_parts)]
    lines = [".reg .pred more;", *_begun([*addresses, "k"])]
    for i, name in enumerate([*addresses, "k"]):
        lines += [f"shr.u32 {name}, ${count + i}, 4;", f"or.b32 {name}, {name}, 0x10000;"]
    lines += ["setp.ne.b32 more, high, high;", "wgmma.fence.sync.aligned;"]
    first_panels = 2 if q_parts == 2 else panels
    for panel in range(panels):
        part, place = (0, panel) if panel < first_panels else (1, panel - first_panels)
        for piece in range(4):  # 16 columns each
            lines += _descriptor("a", addresses[part], place * 64 * 128 + piece * 32)
            lines += _descriptor("b", "k", panel * block_n * 128 + piece * 32)
            scale = "more" if panel + piece == 0 else "1"
            lines += [
                f"wgmma.mma_async.sync.aligned.m64n{block_n}k16.f32.{kind}.{kind} {{{written}}}, a, b, {scale}, 1, 1, 0, 0;"
            ]
    return "{ " + " ".join([*lines, "wgmma.commit_group.sync.aligned;"]) + " }"


@gluon.constexpr_function
def _keys_constraints(block_n, q_parts):
    return ",".join(["=&f"] * (block_n // 2) + ["r"] * (q_parts + 1))


@gluon.constexpr_function
def _types(block_n):
    near = near_keys(block_n)
    return tuple(gl.distributed_type(gl.float32, [64, n], layout_of(n)) for n in (near, block_n - near))


@gluon.constexpr_function
def layout_of(keys):
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, keys, 16])


@gluon.jit
def multiply_keys_wide(q_smem, slot, k_smem, stage, SHAPE: gl.constexpr):
    """Issue the product of a consumer's rows and a block of keys: scores of the first keys, and of the others."""
    PANELS: gl.constexpr = panels_of(SHAPE.BLOCK_D, SHAPE.TWO_PARTS)
    BOXES: gl.constexpr = PANELS * (SHAPE.BLOCK_N // unit_keys(SHAPE.BLOCK_N))
    PARTS: gl.constexpr = len(q_smem)
    asm: gl.constexpr = _keys_asm(SHAPE.BLOCK_N, PANELS, PARTS, q_smem[0].dtype)
    constraints: gl.constexpr = _keys_constraints(SHAPE.BLOCK_N, PARTS)
    types: gl.constexpr = _types(SHAPE.BLOCK_N)
    k = k_smem[0].index(stage * BOXES)
    if PARTS == 2:
        operands = [q_smem[0].index(slot), q_smem[1].index(slot), k]
    else:
        operands = [q_smem[0].index(slot), k]
    return gl.inline_asm(asm, constraints, operands, types, is_pure=False)


@gluon.constexpr_function
def _values_asm(columns, block_n, dtype):
    count = columns // 2
    kind = _kind(dtype)
    sums = ", ".join(f"${i}" for i in range(count))
    weights = [f"${2 * count + i}" for i in range(block_n // 4)]
    lines = [*_begun(["v"]), f"shr.u32 v, ${2 * count + len(weights)}, 4;", f"or.b32 v, v, {block_n * 8 << 16};"]
    lines += ["wgmma.fence.sync.aligned;"]
    for piece in range(block_n // 16):
        lines += _descriptor("b", "v", piece * 16 * 128)
        a = ", ".join(weights[4 * piece : 4 * piece + 4])
        lines += [
            f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind} {{{sums}}}, {{{a}}}, b, 1, 1, 1, 1;"
        ]
    return "{ " + " ".join([*lines, "wgmma.commit_group.sync.aligned;"]) + " }"


@gluon.constexpr_function
def _values_constraints(columns, block_n):
    count = columns // 2
    return ",".join(["=f"] * count + [str(i) for i in range(count)] + ["r"] * (block_n // 4 + 1))


@gluon.constexpr_function
def _sums_types(block_d, two_parts):
    widths = (2 * block_d, block_d) if two_parts else (block_d,)
    return tuple(gl.distributed_type(gl.float32, [64, n], layout_of(n)) for n in widths)


@gluon.jit
def multiply_values_wide(p, v_smem, stage, acc, SHAPE: gl.constexpr):
    """Issue the product of weights, as `pack` gives them, and a block of values, which is added to `acc`."""
    PANELS: gl.constexpr = panels_of(SHAPE.BLOCK_D, SHAPE.TWO_PARTS)
    BOXES: gl.constexpr = PANELS * (SHAPE.BLOCK_N // unit_keys(SHAPE.BLOCK_N))
    asm: gl.constexpr = _values_asm(PANELS * PANEL, SHAPE.BLOCK_N, v_smem[0].dtype)
    constraints: gl.constexpr = _values_constraints(PANELS * PANEL, SHAPE.BLOCK_N)
    v = v_smem[0].index(stage * BOXES)
    types: gl.constexpr = _sums_types(SHAPE.BLOCK_D, SHAPE.TWO_PARTS)
    if len(acc) == 2:
        acc = gl.inline_asm(asm, constraints, [acc[0], acc[1], p[0], p[1], v], types, is_pure=False)
    else:
        acc = gl.inline_asm(asm, constraints, [acc[0], p[0], p[1], v], types, is_pure=False)
    return acc, p


@gluon.jit
def wait_for_products_wide(acc, p, scores):
    """As `wait_for_products`."""
    if len(acc) == 2:
        first, second, p_near, p_far, near, far = warpgroup_mma_wait(
            0, deps=(acc[0], acc[1], p[0], p[1], scores[0], scores[1])
        )
        return (first, second), (p_near, p_far), (near, far)
    else:
        first, p_near, p_far, near, far = warpgroup_mma_wait(0, deps=(acc[0], p[0], p[1], scores[0], scores[1]))
        return (first,), (p_near, p_far), (near, far)


@gluon.jit
def _larger(a, b):
    return gl.maximum(a, b)


@gluon.jit
def _of_threads(x):
    """[rows, 4]: the largest of what each of the four threads that share a row holds of it."""
    parts = x.reshape([ROWS, x.shape[1] // 8, 4, 2])
    return gl.max(gl.max(parts, 3), 1)


@gluon.jit
def _masked(scores, ends, key):
    columns = gl.arange(0, scores.shape[1], layout=gl.SliceLayout(0, scores.type.layout))
    ends = gl.convert_layout(ends, gl.SliceLayout(1, scores.type.layout), assert_trivial=True)
    return gl.where(columns[None, :] < (ends - key)[:, None], scores, float("-inf"))


@gluon.jit
def maxima_wide(scores, m, scale, shift: gl.constexpr, ends, key, masked):
    """As `maxima`."""
    near, far = scores
    if masked:
        near = _masked(near, ends, key)
        far = _masked(far, ends, key + near.shape[1])
    most = _of_threads(near)
    most = gl.maximum(most, gl.convert_layout(_of_threads(far), most.type.layout, assert_trivial=True))
    most = gl.convert_layout(gl.max(most, 1), m.type.layout, assert_trivial=True)
    m_new = gl.maximum(m, most * scale + shift)
    return (near, far), m_new, gl.exp2(m - m_new)


@gluon.jit
def _weights(scores, m, scale):
    """Weights, packed, and their sums by thread."""
    parts = scores.reshape([ROWS, scores.shape[1] // 8, 4, 2])
    m = gl.convert_layout(m, gl.SliceLayout(1, gl.SliceLayout(3, parts.type.layout)), assert_trivial=True)
    weights = gl.exp2(parts * scale - m[:, None, :][:, :, :, None])
    sums = gl.sum(gl.sum(weights, 3), 1)
    return gl.convert_layout(weights.reshape(scores.shape), scores.type.layout, assert_trivial=True), sums


@gluon.jit
def weigh_wide(scores, m, row_sum, alpha, scale, dtype: gl.constexpr):
    """Weights of a block, packed, and the sums with them; m: of rows, [rows, 4]."""
    near, sums = _weights(scores[0], m, scale)
    far, far_sums = _weights(scores[1], m, scale)
    sums += gl.convert_layout(far_sums, sums.type.layout, assert_trivial=True)
    row_sum = added(gl.convert_layout(row_sum, sums.type.layout, assert_trivial=True), alpha, sums)
    return (pack(near, dtype), pack(far, dtype)), row_sum


@gluon.jit
def first_weights_wide(scores, m, row_sum, scale, shift: gl.constexpr, ends, key, masked, dtype: gl.constexpr):
    """As `weigh`, of the first block of a tile."""
    scores, m, alpha = maxima_wide(scores, m, scale, shift, ends, key, masked)
    LAYOUT: gl.constexpr = row_sum.type.layout
    by_thread = gl.convert_layout(m, gl.SliceLayout(1, LAYOUT), assert_trivial=True)[:, None].broadcast_to([ROWS, 4])
    p, row_sum = weigh_wide(scores, by_thread, row_sum, alpha, scale, dtype)
    return p, m, row_sum


@gluon.jit
def next_weights_wide(acc, scores, m, row_sum, alpha, scale, zero, dtype: gl.constexpr):
    """As `weigh_after`."""
    LAYOUT: gl.constexpr = row_sum.type.layout
    product = acc[len(acc) - 1]
    element = gl.convert_layout(of_each_row(product, product.shape[1]), LAYOUT, assert_trivial=True)
    m = gl.convert_layout(m, gl.SliceLayout(1, LAYOUT), assert_trivial=True)[:, None].broadcast_to([ROWS, 4])
    return weigh_wide(scores, after(m, element, zero), row_sum, alpha, scale, dtype)
