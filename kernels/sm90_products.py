"""As sm90_powers.py, of products as they are: nothing multiplies them to bring them into a polynomial's range, whose
coefficients are scaled instead; and their largest ones are found before, as integers, which tell the range, too."""

from sm90_maxima import as_integers, largest_in_chains, largest_integers, largest_of, rows_of, written_to
from sm90_powers import BEND, BOUND, LARGEST_TANH, TANH_UNIT, large, of_kernel
from sm90_sinks import LOG2_E
from sm90_slow import FLOAT_MAX
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Of R: s, b, k and c of degree 4, s, b, 0 and c of degree 3; see `_first`.
COEFFICIENTS: gl.constexpr = gl.constexpr(
    ((4.59869289, 1141.35449, -62.4697762, 1231482.88), (24.7232609, 3173.96704, 0.0, 310693.219))
)
# Of BEND times the factor of products, for which powers of it are far from the ends of float32's range.
SMALLEST_BEND: gl.constexpr = gl.constexpr(3.5e-4)
LARGEST_BEND: gl.constexpr = gl.constexpr(1024.0)


@gluon.constexpr_function
def _first(x, polynomials):
    """A constant times tanh(x * bend * BOUND / 2) for |x| * bend < 2, in place: x R(x**2), where R is the polynomial of
    its degree whose relative error is least. `cs`, `cb`, `ck` and `cc`: its coefficients times powers of bend, by which
    products need not be multiplied by it.

    Degree 4, 2**-25: by shift and scale R is (z**2 + b) (z**2 + k z + b) + c with z = x**2 + s, in four operations,
    where Horner's scheme takes five, x**2 among them.
    Degree 3, 2**-23.4: z (z**2 + b) + c with z = s - x**2, in three.
    """
    if polynomials == 1:
        return [
            f"fma.rn.f32 z, {x}, {x}, cs;",
            "fma.rn.f32 even, z, z, cb;",
            "fma.rn.f32 all, z, ck, even;",
            "fma.rn.f32 all, all, even, cc;",
            f"mul.f32 {x}, {x}, all;",
        ]
    return [
        f"neg.f32 z, {x};",
        f"fma.rn.f32 z, z, {x}, cs;",
        "fma.rn.f32 even, z, z, cb;",
        "fma.rn.f32 all, even, z, cc;",
        f"mul.f32 {x}, {x}, all;",
    ]


@gluon.constexpr_function
def _second(x):
    """The same of two polynomials for |x| * bend < 4, with a relative error of 2**-24.4: 404275.866, -5007.81146,
    74.3943325, -1.10596188, 0.0150119309, -1.32279409e-4; of TANH_UNIT times tanh, `again` makes what `_first` does."""
    lines = [f"mul.f32 {x}, {x}, bend;", f"mul.f32 z, {x}, {x};", "mov.b32 all, 0fB90AB47C;"]
    for coefficient in ("0f3C75F49A", "0fBF8D9029", "0f4294C9E6", "0fC59C7E7E", "0f48C5667C"):
        lines += [f"fma.rn.f32 all, all, z, {coefficient};"]
    return [*lines, "mul.f32 all, all, again;", f"mul.f32 {x}, {x}, all;"]


@gluon.constexpr_function
def _tanh_asm(count, polynomials, shift):
    """Of all numbers of a thread, since a branch each would cost more than it saves, and of the largest of its two
    rows, of which tanh is the largest there. Of integers, as in sm90_maxima.py: without a sign the largest is the
    number below 0 that is furthest from it, if there is one, and NaN and infinity are beyond all bounds."""
    names = [f"${i}" for i in range(count)]
    operands = (f"${count * i}" for i in range(3, 13))
    bend, whole_bend, m, most, *coefficients, limit, unit = operands
    other_m = f"${count * 5 + 2}"
    constant = TANH_UNIT.value[polynomials - 1]
    first, second = rows_of(0, count)
    vote = "vote.sync.any.pred large, large, 0xFFFFFFFF;"
    done = [*written_to(count, count), "bra.uni DONE;"]
    lines = [
        ".reg .f32 z, even, all, rest, a, b, c, d, a1, b1, c1, d1, ab, cd, factor, bend, again;",
        ".reg .f32 first, second, third, fourth, cs, cb, ck, cc;",
        ".reg .b32 limit;",
        ".reg .pred large;",
        *as_integers(names),
        *(f"mov.b32 {name}, {of};" for name, of in zip(("cs", "cb", "ck", "cc"), coefficients, strict=True)),
        *largest_integers(count),
        "max.s32 other_bits, other_bits, bits;",
        *largest_in_chains("bits", [f"i{i}" for i in range(count)], "max.u32", 4),
        "and.b32 bits, bits, 0x7FFFFFFF;",
        "max.s32 bits, bits, other_bits;",
        f"mov.b32 limit, {limit};",
        f"sub.f32 z, {m}, {float(shift)};",
        f"sub.f32 all, {other_m}, {float(shift)};",
        "max.f32 z, z, first;",
        "max.f32 all, all, second;",
        "min.f32 z, z, all;",
        "setp.lt.f32 large, z, 0f00000000;",  # then the largest is not known
        "setp.gt.or.u32 large, bits, limit, large;",
        f"max.f32 rest, {m}, {other_m};",
        f"setp.gt.or.f32 large, rest, {most}, large;",
        vote,
        "@large bra OTHERS;",
    ]
    for x in (*names, "first", "second"):
        lines += _first(x, polynomials)
    lines += [*done, "OTHERS:"]
    lines += [f"mul.f32 again, {unit}, {1 / constant};"]
    lines += [*largest_of("first", first, "max.f32"), *largest_of("second", second, "max.f32")]
    if polynomials == 2:
        lines += [
            f"add.f32 rest, {limit}, {limit};",
            "mov.b32 limit, rest;",
            "setp.gt.u32 large, bits, limit;",
            f"max.f32 rest, {m}, {other_m};",
            f"setp.gt.or.f32 large, rest, {most}, large;",
            vote,
            "@large bra LARGE;",
            f"mov.b32 bend, {bend};",
        ]
        for x in (*names, "first", "second"):
            lines += _second(x)
        lines += [*done, "LARGE:"]
    lines += [f"mov.b32 factor, {whole_bend};", "mov.b32 third, first;", "mov.b32 fourth, second;"]
    for i in range(0, count, 4):
        lines += large(names[i : i + 4], constant, "again")
    lines += [*large(("first", "second", "third", "fourth"), constant, "again"), *written_to(count, count)]
    return "{ " + " ".join([*lines, "DONE:"]) + " }"


@gluon.constexpr_function
def _in_place(count):
    return ",".join(["=&f"] * (2 * count) + [str(i) for i in range(count)] + ["f"] * (10 * count))


@gluon.constexpr_function
def _twice(dtype):
    return dtype, dtype


@gluon.constexpr_function
def _slope(coefficients, polynomials):
    """R(0) beside what it is of tanh: 1 but for the error of the polynomial."""
    s, b, k, c = coefficients
    even = s * s + b
    of_0 = (even + k * s) * even + c if polynomials == 1 else even * s + c
    return of_0 * 2 / (TANH_UNIT.value[polynomials - 1] * BOUND.value[polynomials - 1])


@gluon.jit
def tanh_and_largest(products, factors, m, COUNT: gl.constexpr, POLYNOMIALS: gl.constexpr, shift: gl.constexpr):
    """A constant times tanh of a soft cap's share in scores, NaN where products are NaN or infinite; a thread holds
    COUNT of them, a multiple of 4. And the same of the largest ones, of which a thread holds one for each of its rows,
    in the place of each of them; rows of NaN aside.

    All threads of a warp must come here: where no score of a warp is beyond what polynomials serve, it takes no MUFU.
    And where one was before, it is not looked for: so rows of large scores lose next to nothing, and warps do not go
    one way and the other in turn, which would fetch the instructions of both. Nor where a thread has no score above 0
    for a row, if that was so before.

    Args:
        products: [rows, keys].
        factors: what `product_factors` gives.
        m: [rows], the largest scores before, as the kernel has them, plus shift.
    """
    asm: gl.constexpr = _tanh_asm(COUNT, POLYNOMIALS, shift)
    constraints: gl.constexpr = _in_place(COUNT)
    types: gl.constexpr = _twice(gl.float32)
    _to_log2, bend, whole_bend, most, cs, cb, ck, cc, limit, unit = factors
    zeros = gl.full(products.shape, 0.0, gl.float32, layout=products.type.layout)
    operands = [
        products, zeros + bend, zeros + whole_bend, zeros + m[:, None], zeros + most, zeros + cs, zeros + cb,
        zeros + ck, zeros + cc, zeros + limit, zeros + unit,
    ]  # fmt: skip
    return gl.inline_asm_elementwise(asm, constraints, operands, dtype=types, is_pure=True, pack=COUNT)


@gluon.constexpr_function
def _rest(constant):
    """What float32 does not hold of a constant from 1 to 2."""
    return constant - round(constant * 2**23) / 2**23


@gluon.jit
def _rounded_by(x, CONSTANT: gl.constexpr, product):
    """How much more x * CONSTANT is than their product in float32."""
    REST: gl.constexpr = _rest(CONSTANT)
    return gl.fma(x, CONSTANT, 0.0 - product) + x * REST


@gluon.jit
def _scaled(per, small, to_log2, missing, POLYNOMIALS: gl.constexpr):
    """For products of which 2 / per is the bound: the coefficients of the first polynomial; the factor that makes it
    the score, `small` times a product, where products are small, whatever the coefficients have been rounded by; what
    then stands for the cap; and the relative errors of both, in all. `missing`: what both were rounded by."""
    C: gl.constexpr = of_kernel(COEFFICIENTS, POLYNOMIALS)
    square = per * per
    cs = square * C[0]
    cb = square * square * C[1]
    ck = square * C[2]
    even = cs * cs + cb
    if POLYNOMIALS == 1:
        cc = square * square * square * square * C[3]
        of_0 = (cs * ck + even) * even + cc
    else:
        cc = square * square * square * C[3]
        of_0 = even * cs + cc
    factor = gl.div_rn(small, of_0)
    unit = gl.div_rn(to_log2, factor)
    of_cap = gl.abs(gl.fma(unit, factor, 0.0 - to_log2) - missing[0]) / to_log2
    of_small = gl.abs(gl.fma(of_0, factor, 0.0 - small) - missing[1]) / small
    return cs, cb, ck, cc, factor, unit, of_cap + of_small


@gluon.jit
def product_factors(given, factors, shift: gl.constexpr, POLYNOMIALS: gl.constexpr):
    """From the factor of scores, the soft cap and what `score_factors` gives of them: the factor of what
    `tanh_and_largest` returns, not so small that masked scores times it are no longer -inf; those of products, for
    polynomials and for powers; the m from which on powers are taken; the coefficients of the first polynomial, the
    largest product that it serves, and what `tanh_and_largest` returns for the cap."""
    UNIT_HERE: gl.constexpr = of_kernel(TANH_UNIT, POLYNOMIALS)
    BEND_HERE: gl.constexpr = of_kernel(BEND, POLYNOMIALS)
    LARGEST: gl.constexpr = of_kernel(LARGEST_TANH, POLYNOMIALS)
    SLOPE: gl.constexpr = _slope(of_kernel(COEFFICIENTS, POLYNOMIALS), POLYNOMIALS)
    to_log2, bend = factors
    sm_scale, softcap = given
    missing = _rounded_by(softcap, LOG2_E, to_log2)
    bend_here = gl.minimum(bend * BEND_HERE, FLOAT_MAX)
    served = (bend_here >= SMALLEST_BEND) & (bend_here <= LARGEST_BEND)
    per = gl.div_rn(1.0, gl.where(served, bend_here, 1.0))
    small = sm_scale * (LOG2_E * SLOPE)
    missing = (missing, _rounded_by(sm_scale, LOG2_E * SLOPE, small))
    cs, cb, ck, cc, factor, unit, error = _scaled(per, small, to_log2, missing, POLYNOMIALS)
    for i in gl.static_range(1, 6):  # bounds beside it, of which one is rounded least
        near = _scaled(
            per * (1.0 + ((i + 1) // 2 * (2 * (i % 2) - 1)) * 2.0**-23), small, to_log2, missing, POLYNOMIALS
        )
        better = near[6] < error
        cs = gl.where(better, near[0], cs)
        cb = gl.where(better, near[1], cb)
        ck = gl.where(better, near[2], ck)
        cc = gl.where(better, near[3], cc)
        factor = gl.where(better, near[4], factor)
        unit = gl.where(better, near[5], unit)
        error = gl.where(better, near[6], error)
    served = served & (factor >= 2.0**-120)
    factor = gl.where(served, factor, gl.maximum(to_log2 / UNIT_HERE, 1.1754943508222875e-38))
    unit = gl.where(served, unit, UNIT_HERE)
    most = gl.where(served, to_log2 * LARGEST + shift, float("-inf"))
    return factor, bend_here, bend, most, cs, cb, ck, cc, per * 1.999999, unit
