"""Blocks of keys of fmha_fp8_sm90.py that are no power of two, as 224: what FlashAttention-3 has.

As sm90_wide.py, of which the tuples of tensors are, and the copies that load all keys of a panel. Values are transposed
a unit at a time, see `unit_keys`: each is a panel of its own in shared memory, of rows as long as it has keys.
"""

from sm90_maxima import largest_of_parts_asm
from sm90_tiles import ROWS
from sm90_wide import keys_of_parts, unit_keys
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma


@gluon.constexpr_function
def layout_of(keys):
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, keys, 32])


@gluon.constexpr_function
def panel_of(block_d):
    """Columns that lie beside each other in shared memory: of 8 bits, in a row of 128 bytes at most, swizzled."""
    return min(block_d, 128)


@gluon.constexpr_function
def parts_of_block(block_d, block_n):
    return block_d // panel_of(block_d) * (block_n // unit_keys(block_n))


@gluon.jit
def allocate_blocks(desc, count: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr):
    """Shared memory for so many blocks."""
    COUNT: gl.constexpr = count * parts_of_block(BLOCK_D, BLOCK_N)
    return gl.allocate_shared_memory(desc.dtype, [COUNT, 1, 1, unit_keys(BLOCK_N), panel_of(BLOCK_D)], desc.layout)


@gluon.constexpr_function
def turned_layout(block_n, bits):
    return gl.NVMMASharedLayout(min(unit_keys(block_n), 128), bits, 2)


@gluon.jit
def allocate_turned(dtype: gl.constexpr, count: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr):
    """Shared memory for so many blocks of values, transposed."""
    UNIT: gl.constexpr = unit_keys(BLOCK_N)
    COUNT: gl.constexpr = count * (BLOCK_N // UNIT)
    return gl.allocate_shared_memory(dtype, [COUNT, BLOCK_D, UNIT], turned_layout(BLOCK_N, 8))


@gluon.jit
def load_block(desc, batch, head, key, ready, buffers, stage, SHAPE: gl.constexpr):
    """Have TMA load a block of keys, all columns."""
    UNITS: gl.constexpr = SHAPE.BLOCK_N // unit_keys(SHAPE.BLOCK_N)
    PANEL: gl.constexpr = panel_of(SHAPE.BLOCK_D)
    PANELS: gl.constexpr = SHAPE.BLOCK_D // PANEL
    mbarrier.expect(ready, SHAPE.BLOCK_N * SHAPE.BLOCK_D)
    for panel in gl.static_range(PANELS):
        to = buffers.index((stage * PANELS + panel) * UNITS)
        tma.async_load(desc, [batch, head, key, panel * PANEL], ready, to)


@gluon.constexpr_function
def _wgmma(columns):
    return f"wgmma.mma_async.sync.aligned.m64n{columns}k32.f32.e4m3.e4m3"


@gluon.constexpr_function
def _begun(names, row):
    """Declares registers and sets the upper half of descriptors (PTX ISA, Matrix Descriptor Format): rows of so many
    bytes, swizzled by as many, and how far 8 of them reach."""
    mode = 1 if row == 128 else 2 if row == 64 else 3
    return [
        f".reg .b32 low, high, {', '.join(names)};",
        ".reg .b64 a, b;",
        f"mov.b32 high, {mode << 30 | row * 8 // 16:#x};",
    ]


@gluon.constexpr_function
def _descriptor(name, address, offset):
    """Of a matrix in shared memory so many bytes on."""
    return [f"add.u32 low, {address}, {offset // 16};", f"mov.b64 {name}, {{low, high}};"]


@gluon.constexpr_function
def keys_asm(block_n, block_d, keys):
    """Scores of 64 rows and so many keys, a block's first. Operands: scores; addresses of the queries and the keys."""
    panel = min(block_d, 128)
    count = keys // 2
    written = ", ".join(f"${i}" for i in range(count))
    lines = [".reg .pred more;", *_begun(["q", "k"], panel)]
    for i, name in enumerate(["q", "k"]):
        lines += [f"shr.u32 {name}, ${count + i}, 4;", f"or.b32 {name}, {name}, 0x10000;"]
    lines += ["setp.ne.b32 more, high, high;", "wgmma.fence.sync.aligned;"]
    more = "more"
    for i in range(block_d // panel):
        for column in range(0, panel, 32):
            lines += _descriptor("a", "q", i * 64 * panel + column)
            lines += _descriptor("b", "k", i * block_n * panel + column)
            lines += [f"{_wgmma(keys)} {{{written}}}, a, b, {more}, 1, 1;"]
            more = "1"
    return "{ " + " ".join([*lines, "wgmma.commit_group.sync.aligned;"]) + " }"


@gluon.constexpr_function
def keys_constraints(block_n):
    return ",".join(["=&f"] * (block_n // 2) + ["r"] * 2)


@gluon.constexpr_function
def types_of(widths):
    return tuple(gl.distributed_type(gl.float32, [64, n], layout_of(n)) for n in widths)


@gluon.jit
def multiply_keys_wide(q, k_smem, stage, SHAPE: gl.constexpr):
    """Issue the product of a consumer's rows and a block of keys."""
    asm: gl.constexpr = keys_asm(SHAPE.BLOCK_N, SHAPE.BLOCK_D, SHAPE.BLOCK_N)
    constraints: gl.constexpr = keys_constraints(SHAPE.BLOCK_N)
    types: gl.constexpr = types_of(keys_of_parts(SHAPE.BLOCK_N))
    k = k_smem.index(stage * parts_of_block(SHAPE.BLOCK_D, SHAPE.BLOCK_N))
    return gl.inline_asm(asm, constraints, (q, k), types, is_pure=False)


@gluon.constexpr_function
def _values_asm(block_n, block_d, unit):
    """Operands: sums, written and read; weights, as `packed` gives them; the address of the values."""
    count = block_d // 2
    sums = ", ".join(f"${i}" for i in range(count))
    weights = [f"${2 * count + i}" for i in range(block_n // 8)]
    row = min(unit, 128)
    lines = [*_begun(["v"], row), f"shr.u32 v, ${2 * count + len(weights)}, 4;", "or.b32 v, v, 0x10000;"]
    lines += ["wgmma.fence.sync.aligned;"]
    for first in range(0, block_n, 32):
        a = ", ".join(weights[first // 8 : first // 8 + 4])
        lines += _descriptor("b", "v", first // row * row * block_d + first % row)
        lines += [f"{_wgmma(block_d)} {{{sums}}}, {{{a}}}, b, 1, 1, 1;"]
    return "{ " + " ".join([*lines, "wgmma.commit_group.sync.aligned;"]) + " }"


@gluon.constexpr_function
def _values_constraints(columns, block_n):
    count = columns // 2
    return ",".join(["=f"] * count + [str(i) for i in range(count)] + ["r"] * (block_n // 8 + 1))


@gluon.jit
def multiply_values_wide(p, t_smem, stage, acc, SHAPE: gl.constexpr):
    """Issue the product of weights, as `packed` gives them, and a block of values, which is added to `acc`."""
    BLOCK_D: gl.constexpr = SHAPE.BLOCK_D
    BLOCK_N: gl.constexpr = SHAPE.BLOCK_N
    UNIT: gl.constexpr = unit_keys(BLOCK_N)
    asm: gl.constexpr = _values_asm(BLOCK_N, BLOCK_D, UNIT)
    constraints: gl.constexpr = _values_constraints(BLOCK_D, BLOCK_N)
    types: gl.constexpr = types_of((BLOCK_D,))
    operands = (acc,)
    operands += p
    operands += (t_smem.index(stage * (BLOCK_N // UNIT)),)
    return gl.inline_asm(asm, constraints, operands, types, is_pure=False)[0]


@gluon.jit
def masked(scores, ends, key):
    LAYOUT: gl.constexpr = scores.type.layout
    columns = gl.arange(0, scores.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    ends = gl.convert_layout(ends, gl.SliceLayout(1, LAYOUT), assert_trivial=True)
    return gl.where(columns[None, :] < (ends - key)[:, None], scores, float("-inf"))


@gluon.jit
def masked_wide(scores, ends, key):
    """Scores of the keys below a row's end; of the others -inf."""
    made = ()
    for part in gl.static_range(len(scores)):
        made += (masked(scores[part], ends, key),)
        key += scores[part].shape[1]
    return made


@gluon.constexpr_function
def _peaks(layout):
    return gl.distributed_type(gl.float32, [64, 4], layout)


@gluon.constexpr_function
def _largest_constraints(block_n):
    return ",".join(["=&f"] * 2 + ["f"] * (block_n // 2 + 2))


@gluon.jit
def _of_threads(x):
    """[rows, 4]: the largest of what each of the four threads that share a row holds of it."""
    parts = x.reshape([ROWS, x.shape[1] // 8, 4, 2])
    return gl.max(gl.max(parts, 3), 1)


@gluon.jit
def largest_wide(scores, m, row_sum, shift: gl.constexpr, BLOCK_N: gl.constexpr, THREES: gl.constexpr):
    """The largest score of each row, [rows]; if THREES, as `largest` of sm90_maxima.py has it."""
    LAYOUT: gl.constexpr = row_sum.type.layout
    if THREES:
        asm: gl.constexpr = largest_of_parts_asm(BLOCK_N // 2, shift)
        constraints: gl.constexpr = _largest_constraints(BLOCK_N)
        m_of = gl.convert_layout(m, gl.SliceLayout(1, LAYOUT), assert_trivial=True)[:, None].broadcast_to([ROWS, 4])
        operands = scores
        operands += (m_of,)
        most = gl.inline_asm(asm, constraints, operands, _peaks(LAYOUT), is_pure=True)
    else:
        most = _of_threads(scores[0])
        for part in gl.static_range(1, len(scores)):
            of_part = gl.convert_layout(_of_threads(scores[part]), most.type.layout, assert_trivial=True)
            most = gl.maximum(most, of_part)
    return gl.convert_layout(gl.max(most, 1), m.type.layout, assert_trivial=True)


@gluon.jit
def _exponentials(scores, m, scale):
    """Weights of a part and their sums by thread."""
    own = gl.convert_layout(m, gl.SliceLayout(1, scores.type.layout), assert_trivial=True)
    weights = gl.exp2(scores * scale - own[:, None])
    parts = weights.reshape([ROWS, scores.shape[1] // 8, 4, 2])
    return weights, gl.sum(gl.sum(parts, 3), 1)


@gluon.jit
def weights_wide(scores, m, scale):
    """Weights of all parts and their sums by thread."""
    first, sums = _exponentials(scores[0], m, scale)
    made = (first,)
    for part in gl.static_range(1, len(scores)):
        other, of_part = _exponentials(scores[part], m, scale)
        made += (other,)
        sums += gl.convert_layout(of_part, sums.type.layout, assert_trivial=True)
    return made, sums


@gluon.jit
def _fours(weights):
    """Those of keys 2i, 2i + 1, 2i + 8 and 2i + 9, as `packed` has them."""
    even, odd = gl.split(weights.reshape([ROWS, weights.shape[1] // 16, 2, 4, 2]).permute((0, 1, 3, 2, 4)))
    first, third = gl.split(even)
    second, fourth = gl.split(odd)
    return first, second, third, fourth


@gluon.jit
def packed(weights):
    """Weights in e4m3, four in an integer, [rows, keys / 16, 4]: as a thread has them, of keys 2i, 2i + 1, 2i + 8 and
    2i + 9."""
    first, second, third, fourth = _fours(weights)
    asm: gl.constexpr = """
    {
        .reg .b16 low, high;
        cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
        cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
        mov.b32 $0, {low, high};
    }"""
    return gl.inline_asm_elementwise(
        asm, "=r,r,r,r,r", [first, second, third, fourth], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _half_packed(weights):
    first, second, third, fourth = _fours(weights)
    asm: gl.constexpr = """
    {
        .reg .b16 high, none;
        cvt.rn.satfinite.e4m3x2.f32 high, $2, $1;
        mov.b16 none, 0;
        mov.b32 $0, {high, none};
    }"""
    return gl.inline_asm_elementwise(asm, "=r,f,f", [third, fourth], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def half_packed(weights):
    """The later two of each four weights, packed."""
    made = ()
    for part in gl.static_range(len(weights)):
        made += (_half_packed(weights[part]),)
    return made


@gluon.constexpr_function
def _into_asm(count):
    lines = [".reg .pred now;", ".reg .b16 low, high, none;", f"setp.ne.b32 now, ${5 * count}, 0;"]
    lines += ["@!now bra.uni LATER;"]
    for i in range(count):
        lines += [
            f"cvt.rn.satfinite.e4m3x2.f32 low, ${2 * count + i}, ${count + i};",
            f"mov.b32 {{high, none}}, ${3 * count + i};",
            f"mov.b32 ${i}, {{low, high}};",
        ]
    return "{ " + " ".join([*lines, "LATER:"]) + " }"


@gluon.constexpr_function
def _into_constraints(count):
    return ",".join(["=r"] * count + ["f"] * 2 * count + ["r"] * count + [f"{i}" for i in range(count)] + ["r"] * count)


@gluon.jit
def _packed_into(p, weights, half, now):
    COUNT: gl.constexpr = weights.shape[1] // 8
    asm: gl.constexpr = _into_asm(COUNT)
    constraints: gl.constexpr = _into_constraints(COUNT)
    first, second, third, fourth = _fours(weights)
    flags = gl.full(half.shape, now, gl.int32, layout=half.type.layout)
    old = gl.convert_layout(p, half.type.layout, assert_trivial=True)
    operands = [first, second, half, old, flags]
    return gl.inline_asm_elementwise(asm, constraints, operands, dtype=gl.int32, is_pure=False, pack=COUNT)


@gluon.jit
def packed_into(p, weights, halves, now):
    """Weights, packed, in the registers of those before, whose product is complete: ptxas else packs them ahead of the
    wait, beside each other, and moves them. For that it must not know that the jump is never taken: now is not 0."""
    made = ()
    for part in gl.static_range(len(weights)):
        made += (_packed_into(p[part], weights[part], halves[part], now),)
    return made
