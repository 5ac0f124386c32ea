"""Rescaling of fmha_fp8_sm90.py only where it is due: a warp of which no row's maximum has grown keeps its sums, since
the factor is 1. Nothing is rounded otherwise than without.

Of random scores a row's maximum grows in the t-th block with a probability of 1 / t, so that after some 16 blocks most
warps, of 16 rows each, have nothing to multiply.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def grown(m, m_new):
    """Whether m_new is greater than m in some row of a warp: an integer for each row, of which a thread holds two."""
    asm: gl.constexpr = """
    {
        .reg .pred first, second;
        setp.gt.f32 first, $4, $2;
        setp.gt.or.f32 second, $5, $3, first;
        vote.sync.any.pred second, second, -1;
        selp.b32 $0, 1, 0, second;
        selp.b32 $1, 1, 0, second;
    }"""
    return gl.inline_asm_elementwise(asm, "=r,=r,f,f,f,f", [m, m_new], dtype=gl.int32, is_pure=False, pack=2)


@gluon.constexpr_function
def _products_asm(count):
    products = "".join(f"mul.f32 ${i}, ${i}, ${2 * count + i}; " for i in range(count))
    return f"{{ .reg .pred some; setp.ne.b32 some, ${3 * count}, 0; @!some bra.uni REST; {products}REST: }}"


@gluon.constexpr_function
def _products_operands(count):
    return "=f," * count + "".join(f"{i}," for i in range(count)) + "f," * count + "r," * (count - 1) + "r"


@gluon.jit
def times_where_due(acc, factor, due):
    """A product times factors of its rows, in warps where `due`, which `grown` gives, is not 0."""
    LAYOUT: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    COUNT: gl.constexpr = acc.shape[1] // 2  # of a thread: all, so that there is one branch
    factor = gl.convert_layout(factor, LAYOUT, assert_trivial=True)[:, None].broadcast_to(acc.shape)
    due = gl.convert_layout(due, LAYOUT, assert_trivial=True)[:, None].broadcast_to(acc.shape)
    asm: gl.constexpr = _products_asm(COUNT)
    operands: gl.constexpr = _products_operands(COUNT)
    return gl.inline_asm_elementwise(asm, operands, [acc, factor, due], dtype=gl.float32, is_pure=True, pack=COUNT)
