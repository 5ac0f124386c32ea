"""Tanh for fmha_sm90.py with few of the instructions (MUFU) of which a multiprocessor does only 16 a cycle, where it
multiplies and adds 128: of small scores a polynomial, of others two powers and reciprocals."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Up to this, tanh is a polynomial: of scores up to 26 at a soft cap of 50. Of all bounds near it that which makes the
# unit of the polynomial's values a power of two, so that neither way to them rounds once more.
BOUND: gl.constexpr = gl.constexpr(0.5361871534320197)
BEND: gl.constexpr = gl.constexpr(1.2927336586176261)  # 1 / (BOUND * log2(e))
# What tanh_of returns is tanh times this.
TANH_UNIT: gl.constexpr = gl.constexpr(8388608.0)


@gluon.constexpr_function
def _polynomial(x):
    """TANH_UNIT * tanh(x * BOUND / 2) for |x| < 2, in place: x R(x**2), where R is the polynomial of degree 4 whose
    relative error is least, 2**-25. By shift and scale R is (z**2 + b) (z**2 + k z + b) + c with z = x**2 + s: in
    four operations, where Horner's scheme takes five, x**2 among them. s, b, k, c are 4.59869289, 1141.35449,
    -62.4697762, 1231482.88; no sum is much
    smaller than its terms."""
    return [
        f"fma.rn.f32 z, {x}, {x}, 0f4093287E;",
        "fma.rn.f32 even, z, z, 0f448EAB58;",
        "fma.rn.f32 all, z, 0fC279E10D, even;",
        "fma.rn.f32 all, all, even, 0f499653D7;",
        f"mul.f32 {x}, {x}, all;",
    ]


@gluon.constexpr_function
def _powers(x):
    """The same of any four numbers, as (2**y - 1) / (2**y + 1) with a reciprocal that they share. y counts up to 31,
    from where on nothing is missing that float32 could tell from 1. NaN of NaN and infinity.

    1 / a is b / ab, whose products are rounded once more each; but they are errors of tanh itself, which is small where
    the most scores are, and not of the 1 that it would be taken from as 1 - 2 / (1 + 2**y).
    """
    powers = ("a", "b", "c", "d")
    lines = [f"mul.f32 {y}, {of}, 0f3F4607AC;" for y, of in zip(powers, x, strict=True)]  # BOUND * log2(e)
    lines += [f"min.f32 {y}, {y}, 0f41F80000;" for y in powers]
    lines += [f"ex2.approx.ftz.f32 {y}, {y};" for y in powers]
    lines += [f"add.f32 {y}1, {y}, 0f3F800000;" for y in powers]
    lines += [
        "mul.f32 ab, a1, b1;",
        "mul.f32 cd, c1, d1;",
        "mul.f32 all, ab, cd;",
        "rcp.approx.ftz.f32 all, all;",
        "mul.f32 all, all, 0f4B000000;",  # TANH_UNIT
        "mul.f32 rest, all, cd;",
        "mul.f32 b1, rest, b1;",
        "mul.f32 a1, rest, a1;",
        "mul.f32 rest, all, ab;",
        "mul.f32 d1, rest, d1;",
        "mul.f32 c1, rest, c1;",
    ]
    for of, y, inverse in zip(x, powers, ("b1", "a1", "d1", "c1"), strict=True):
        lines += [
            f"neg.f32 rest, {inverse};",
            f"fma.rn.f32 rest, {y}, {inverse}, rest;",
            f"fma.rn.f32 {of}, {of}, 0f00000000, rest;",
        ]
    return lines


@gluon.constexpr_function
def _tanh_asm(count):
    """Of all numbers of a thread, since a branch each would cost more than it saves. The highest bit of an exponent
    says that a number is at least 2, infinite or NaN."""
    names = [f"${i}" for i in range(count)]
    lines = [
        ".reg .f32 z, even, all, rest, a, b, c, d, a1, b1, c1, d1, ab, cd;",
        ".reg .b32 bits;",
        ".reg .pred large;",
    ]
    lines += [f"or.b32 bits, {names[0]}, {names[1]};"]
    lines += [f"lop3.b32 bits, bits, {names[i]}, {names[i + 1]}, 0xFE;" for i in range(2, count, 2)]
    lines += [
        "and.b32 bits, bits, 0x40000000;",
        "setp.ne.u32 large, bits, 0;",
        "vote.sync.any.pred large, large, 0xFFFFFFFF;",
        "@large bra POWERS;",
    ]
    for x in names:
        lines += _polynomial(x)
    lines += ["bra.uni DONE;", "POWERS:"]
    for i in range(0, count, 4):
        lines += _powers(names[i : i + 4])
    return "{ " + " ".join([*lines, "DONE:"]) + " }"


@gluon.constexpr_function
def _in_place(count):
    return ",".join(["=f"] * count + [str(i) for i in range(count)])


@gluon.jit
def tanh_of(x, COUNT: gl.constexpr):
    """TANH_UNIT * tanh(x * BOUND / 2), NaN of NaN and infinity; COUNT is how many of x a thread holds, which are a
    multiple of 4. All threads of a warp must come here: where no |x| of a warp reaches 2, they take no MUFU."""
    asm: gl.constexpr = _tanh_asm(COUNT)
    constraints: gl.constexpr = _in_place(COUNT)
    return gl.inline_asm_elementwise(asm, constraints, [x], dtype=gl.float32, is_pure=True, pack=COUNT)


@gluon.jit
def tanh_factors(to_log2, bend):
    """From the factors of `score_factors`: that of what `tanh_of` returns, not so small that masked scores times it are
    no longer -inf, and that of a product for what `tanh_of` takes."""
    return gl.maximum(to_log2 / TANH_UNIT, 1.1754943508222875e-38), gl.minimum(bend * BEND, 3.4028234663852886e38)
