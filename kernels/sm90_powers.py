"""Tanh for fmha_sm90.py with fewer of the instructions (MUFU) of which a multiprocessor does only 16 a cycle, where it
multiplies and adds 128."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def tanh_of_log2(x):
    """(2**x - 1) / (2**x + 1), which is tanh(x / (2 log2(e))); four of a thread share a reciprocal. x counts up to 31,
    from where on nothing is missing that float32 could tell from 1; NaN counts as 31.

    1 / a is b / ab, whose products are rounded once more each; but they are errors of tanh itself, which is small where
    the most scores are, and not of the 1 that it would be taken from as 1 - 2 / (1 + 2**x).
    """
    asm: gl.constexpr = """
    {
        .reg .f32 a, b, c, d, a1, b1, c1, d1, ab, cd, all, rest;
        min.f32 a, $4, 0f41F80000;
        min.f32 b, $5, 0f41F80000;
        min.f32 c, $6, 0f41F80000;
        min.f32 d, $7, 0f41F80000;
        ex2.approx.ftz.f32 a, a;
        ex2.approx.ftz.f32 b, b;
        ex2.approx.ftz.f32 c, c;
        ex2.approx.ftz.f32 d, d;
        add.f32 a1, a, 0f3F800000;
        add.f32 b1, b, 0f3F800000;
        add.f32 c1, c, 0f3F800000;
        add.f32 d1, d, 0f3F800000;
        mul.f32 ab, a1, b1;
        mul.f32 cd, c1, d1;
        mul.f32 all, ab, cd;
        rcp.approx.ftz.f32 all, all;
        mul.f32 rest, all, cd;
        mul.f32 b1, rest, b1;
        mul.f32 a1, rest, a1;
        mul.f32 rest, all, ab;
        mul.f32 d1, rest, d1;
        mul.f32 c1, rest, c1;
        neg.f32 ab, b1;
        fma.rn.f32 $0, a, b1, ab;
        neg.f32 ab, a1;
        fma.rn.f32 $1, b, a1, ab;
        neg.f32 ab, d1;
        fma.rn.f32 $2, c, d1, ab;
        neg.f32 ab, c1;
        fma.rn.f32 $3, d, c1, ab;
    }"""
    return gl.inline_asm_elementwise(asm, "=&f,=&f,=&f,=&f,f,f,f,f", [x], dtype=gl.float32, is_pure=True, pack=4)
