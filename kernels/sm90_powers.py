"""Tanh for fmha_sm90.py with few of the instructions (MUFU) of which a multiprocessor does only 16 a cycle, where it
multiplies and adds 128: of small scores a polynomial, of large ones two powers and reciprocals."""

from sm90_slow import FLOAT_MAX
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Either one polynomial of degree 9, or one of degree 7 and, up to twice as large scores, one of degree 11: of scores up
# to 26, or 19 and 38, at a soft cap of 50. The bounds are those that make the unit of the first one's values, by which
# what tanh_of returns is tanh, a power of two, so that no way to them rounds once more. Two take more code, for which
# the instruction cache has no room where each consumer has its own.
BOUND: gl.constexpr = gl.constexpr((0.5361871534320197, 0.38554751015307753))
BEND: gl.constexpr = gl.constexpr((1.2927336586176261, 1.7978255916754295))  # 1 / (BOUND * log2(e))
LARGEST_TANH: gl.constexpr = gl.constexpr((0.490, 0.6475))  # of where the last polynomial ends, a little less
TANH_UNIT: gl.constexpr = gl.constexpr((8388608.0, 2097152.0))
# TANH_UNIT and BOUND * log2(e), as PTX has them.
UNIT: gl.constexpr = gl.constexpr(("0f4B000000", "0f4A000000"))
TO_LOG2: gl.constexpr = gl.constexpr(("0f3F4607AC", "0f3F0E64ED"))


@gluon.constexpr_function
def polynomials_of(capped, consumers):
    """How many of them a kernel has for tanh; 0 without a soft cap."""
    return (2 if consumers == 1 else 1) if capped else 0


@gluon.constexpr_function
def _first(x, polynomials):
    """TANH_UNIT * tanh(x * BOUND / 2) for |x| < 2, in place: x R(x**2), where R is the polynomial of its degree whose
    relative error is least.

    Degree 4, 2**-25: by shift and scale R is (z**2 + b) (z**2 + k z + b) + c with z = x**2 + s, in four operations,
    where Horner's scheme takes five, x**2 among them. s, b, k, c are 4.59869289, 1141.35449, -62.4697762, 1231482.88.
    Degree 3, 2**-23.4: z (z**2 + b) + c with z = s - x**2, in three; 24.7232609, 3173.96704, 310693.219.
    """
    if polynomials == 1:
        return [
            f"fma.rn.f32 z, {x}, {x}, 0f4093287E;",
            "fma.rn.f32 even, z, z, 0f448EAB58;",
            "fma.rn.f32 all, z, 0fC279E10D, even;",
            "fma.rn.f32 all, all, even, 0f499653D7;",
            f"mul.f32 {x}, {x}, all;",
        ]
    return [
        f"neg.f32 z, {x};",
        f"fma.rn.f32 z, z, {x}, 0f41C5C93D;",
        "fma.rn.f32 even, z, z, 0f45465F79;",
        "fma.rn.f32 all, even, z, 0f4897B4A7;",
        f"mul.f32 {x}, {x}, all;",
    ]


@gluon.constexpr_function
def _second(x):
    """The same of two polynomials for |x| < 4, with a relative error of 2**-24.4: 404275.866, -5007.81146, 74.3943325,
    -1.10596188, 0.0150119309, -1.32279409e-4."""
    lines = [f"mul.f32 z, {x}, {x};", "mov.b32 all, 0fB90AB47C;"]
    for coefficient in ("0f3C75F49A", "0fBF8D9029", "0f4294C9E6", "0fC59C7E7E", "0f48C5667C"):
        lines += [f"fma.rn.f32 all, all, z, {coefficient};"]
    return [*lines, f"mul.f32 {x}, {x}, all;"]


@gluon.constexpr_function
def large(x, unit, again):
    """The same of any four numbers, as (2**y - 1) / (2**y + 1) with a reciprocal that they share, where `factor` makes
    y of them. y counts up to 31, from where on nothing is missing that float32 could tell from 1. NaN of NaN and
    infinity.

    `again`: what is then multiplied by, which is not known when it is compiled, or None.

    1 / a is b / ab, whose products are rounded once more each; but they are errors of tanh itself, which is small where
    the most scores are, and not of the 1 that it would be taken from as 1 - 2 / (1 + 2**y).
    """
    powers = ("a", "b", "c", "d")
    lines = [f"mul.f32 {y}, {of}, factor;" for y, of in zip(powers, x, strict=True)]
    lines += [f"min.f32 {y}, {y}, 0f41F80000;" for y in powers]
    lines += [f"ex2.approx.ftz.f32 {y}, {y};" for y in powers]
    lines += [f"add.f32 {y}1, {y}, 0f3F800000;" for y in powers]
    lines += [
        "mul.f32 ab, a1, b1;",
        "mul.f32 cd, c1, d1;",
        "mul.f32 all, ab, cd;",
        "rcp.approx.ftz.f32 all, all;",
        f"mul.f32 all, all, {unit};",
        "mul.f32 rest, all, cd;",
        "mul.f32 b1, rest, b1;",
        "mul.f32 a1, rest, a1;",
        "mul.f32 rest, all, ab;",
        "mul.f32 d1, rest, d1;",
        "mul.f32 c1, rest, c1;",
    ]
    for of, y, inverse in zip(x, powers, ("b1", "a1", "d1", "c1"), strict=True):
        lines += [f"neg.f32 rest, {inverse};", f"fma.rn.f32 rest, {y}, {inverse}, rest;"]
        if again is None:
            lines += [f"fma.rn.f32 {of}, {of}, 0f00000000, rest;"]
        else:
            lines += [f"mul.f32 {of}, {of}, 0f00000000;", f"fma.rn.f32 {of}, rest, {again}, {of};"]
    return lines


@gluon.constexpr_function
def _tanh_asm(count, polynomials):
    """Of all numbers of a thread, since a branch each would cost more than it saves. The highest bit of an exponent
    says that a number is at least 2, infinite or NaN."""
    names = [f"${i}" for i in range(count)]
    bend, whole_bend, m, most = (f"${count * i}" for i in range(2, 6))
    other_m = f"${count * 4 + 2}"  # a thread holds two columns of one row, two of the other, and so on
    vote = ["vote.sync.any.pred large, large, 0xFFFFFFFF;"]
    lines = [
        ".reg .f32 z, even, all, rest, a, b, c, d, a1, b1, c1, d1, ab, cd, factor;",
        ".reg .b32 bits;",
        ".reg .pred large;",
        f"mov.b32 factor, {whole_bend};",
        f"max.f32 rest, {m}, {other_m};",
        f"setp.gt.f32 large, rest, {most};",
        *vote,
        "@large bra LARGE;",
    ]
    lines += [f"mul.f32 {x}, {x}, {bend};" for x in names]
    lines += [f"or.b32 bits, {names[0]}, {names[1]};"]
    lines += [f"lop3.b32 bits, bits, {names[i]}, {names[i + 1]}, 0xFE;" for i in range(2, count, 2)]
    lines += [
        f"mov.b32 factor, {TO_LOG2.value[polynomials - 1]};",
        "and.b32 bits, bits, 0x40000000;",
        "setp.ne.u32 large, bits, 0;",
        *vote,
        "@large bra LARGE;" if polynomials == 1 else "@large bra SECOND;",
    ]
    for x in names:
        lines += _first(x, polynomials)
    lines += ["bra.uni DONE;"]
    if polynomials == 2:
        lines += [f"SECOND: abs.f32 all, {names[0]};"]
        for x in names[1:]:
            lines += [f"abs.f32 rest, {x};", "max.NaN.f32 all, all, rest;"]
        lines += ["setp.geu.f32 large, all, 0f40800000;", *vote, "@large bra LARGE;"]
        for x in names:
            lines += _second(x)
        lines += ["bra.uni DONE;"]
    lines += ["LARGE:"]
    for i in range(0, count, 4):
        lines += large(names[i : i + 4], UNIT.value[polynomials - 1], None)
    return "{ " + " ".join([*lines, "DONE:"]) + " }"


@gluon.constexpr_function
def _in_place(count):
    return ",".join(["=f"] * count + [str(i) for i in range(count)] + ["f"] * (4 * count))


@gluon.constexpr_function
def of_kernel(values, polynomials):
    return values[polynomials - 1]


@gluon.jit
def tanh_of(products, factors, m, COUNT: gl.constexpr, POLYNOMIALS: gl.constexpr):
    """TANH_UNIT * tanh of a soft cap's share in scores, NaN where products are NaN or infinite; a thread holds COUNT of
    them, a multiple of 4.

    All threads of a warp must come here: where no score of a warp is beyond what polynomials serve, it takes no MUFU.
    And where one was before, it is not looked for: so rows of large scores lose next to nothing, and warps do not go
    one way and the other in turn, which would fetch the instructions of both.

    Args:
        products: [rows, keys].
        factors: what `tanh_factors` gives.
        m: [rows], the largest scores before, as the kernel has them.
    """
    asm: gl.constexpr = _tanh_asm(COUNT, POLYNOMIALS)
    constraints: gl.constexpr = _in_place(COUNT)
    _to_log2, bend, whole_bend, most = factors
    zeros = gl.full(products.shape, 0.0, gl.float32, layout=products.type.layout)
    operands = [products, zeros + bend, zeros + whole_bend, zeros + m[:, None], zeros + most]
    return gl.inline_asm_elementwise(asm, constraints, operands, dtype=gl.float32, is_pure=True, pack=COUNT)


@gluon.jit
def tanh_factors(factors, shift: gl.constexpr, POLYNOMIALS: gl.constexpr):
    """From what `score_factors` gives: the factor of what `tanh_of` returns, not so small that masked scores times it
    are no longer -inf; those of products, for polynomials and for powers; and the m from which on powers are taken."""
    UNIT_HERE: gl.constexpr = of_kernel(TANH_UNIT, POLYNOMIALS)
    BEND_HERE: gl.constexpr = of_kernel(BEND, POLYNOMIALS)
    LARGEST: gl.constexpr = of_kernel(LARGEST_TANH, POLYNOMIALS)
    to_log2, bend = factors
    return (
        gl.maximum(to_log2 / UNIT_HERE, 1.1754943508222875e-38),
        gl.minimum(bend * BEND_HERE, FLOAT_MAX),
        bend,
        to_log2 * LARGEST + shift,
    )
