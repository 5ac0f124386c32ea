"""Soft caps in few instructions, where all warps of a program take the same way.

A score's exponent is x R(x**2) - m of the product x as it is: R is of even degree with its last coefficient above 0, so
that x R(x**2) grows with x everywhere. What is far below a row's largest score then has a weight of next to nothing
whichever R is taken, and only the largest score of a warp's rows says which. Of degree 5 (to FIVE of the cap), of
degree 9 (to NINE), or beyond that powers and reciprocals.

Where warps of a multiprocessor take different ways, the instruction cache does not hold them all. So a warp that has
had to leave the first way in a tile notes that in shared memory (`reach`), where the others see it at their next step
(`seen`); a way above what a warp needs is as exact. The next tile starts with what the rows of this one came to, see
`reach_next`. Powers are taken by a warp that has had a score beyond, and by all where two have.
"""

from sm90_lazy import ROOM
from sm90_maxima import as_integers, largest_in_chains, largest_of
from sm90_powers import BEND, TANH_UNIT, of_kernel
from sm90_products import COEFFICIENTS, _rounded_by, _slope
from sm90_sinks import LOG2_E
from sm90_tiles import ROWS
from sm90_wide import keys_of_parts, layout_of, near_keys
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

FIVE: gl.constexpr = gl.constexpr(0.17)
NINE: gl.constexpr = gl.constexpr(0.536)
# Of tanh(u) = u (1 + ...): relative error 2**-24.6 up to FIVE.
R_FIVE: gl.constexpr = gl.constexpr((0.9999999600392722, -0.3333084135379764, 0.13102466210136926))
TANH_FIVE: gl.constexpr = gl.constexpr(0.16838)
TANH_NINE: gl.constexpr = gl.constexpr(0.4899)
# Of the cap: rows whose largest score is below that, or not known, take a higher way.
LOWEST_FIVE: gl.constexpr = gl.constexpr(-0.05)
LOWEST_NINE: gl.constexpr = gl.constexpr(-0.2)
# Caps below which weights of scores as far below 0 as a polynomial reaches are not small enough: where one key has a
# score of 0 and 8191 have that at which it is worst, the log-sum-exp is off by 5e-6 with degree 5 at 50, 1e-4 at 30.
SMALLEST_OF_FIVE: gl.constexpr = gl.constexpr(45.0)
SMALLEST_OF_NINE: gl.constexpr = gl.constexpr(24.0)
# How far below the end of degree 5 the rows of a tile must stay for the next tile to begin with that.
MARGIN: gl.constexpr = gl.constexpr(0.9)
HELD = 4
"""Tiles from one on whose rows of two warps have needed powers in which all warps take them."""
BESIDE_ALL: gl.constexpr = gl.constexpr(-1e-30)  # as an integer below all products that are not below it as floats
WORD: gl.constexpr = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.constexpr_function
def _evaluated(x, way):
    """`all` is what x is multiplied by."""
    if way == 5:
        return [f"mul.f32 u, {x}, a5;", f"fma.rn.f32 z, u, {x}, s5;", "fma.rn.f32 all, z, z, c5;"]
    return [
        f"mul.f32 u, {x}, a9;",
        f"fma.rn.f32 z, u, {x}, s9;",
        "fma.rn.f32 even, z, z, b9;",
        "fma.rn.f32 all, z, k9, even;",
        "fma.rn.f32 all, all, even, c9;",
    ]


@gluon.constexpr_function
def _grown(way, lazily):
    """References of a thread's rows, grown to ref0 and ref1 if that is due, which the threads that share a row must
    agree on; and what sums before are to be multiplied by."""
    lines = [
        "sub.f32 u, ref0, m0;",
        "sub.f32 z, ref1, m1;",
        "max.f32 u, u, z;",
        f"setp.gt.f32 grown, u, {ROOM if lazily else 0.0};",
        "vote.sync.any.pred grown, grown, 0xFFFFFFFF;",
        f"@!grown bra KEPT{way};",
        "mov.b32 due, 1;",
    ]
    for distance in (1, 2):
        for row in range(2):
            lines += [f"shfl.sync.bfly.b32 u, ref{row}, {distance}, 31, -1;", f"max.f32 ref{row}, ref{row}, u;"]
    for row in range(2):
        lines += [f"mov.b32 u, m{row};", f"max.f32 m{row}, m{row}, ref{row};"]
        lines += [f"sub.f32 z, cap, m{row};", f"sub.f32 m{row}, cap, z;"] if way == 0 else []
        lines += [f"sub.f32 u, u, m{row};", f"ex2.approx.ftz.f32 alpha{row}, u;"]
    return [*lines, f"KEPT{way}:"]


@gluon.constexpr_function
def _weight(x, i):
    """2**x, which is added to one of two sums of its row."""
    total = f"sum{i % 4 // 2}{i % 2}"
    return [f"ex2.approx.ftz.f32 {x}, {x};", f"add.f32 {total}, {total}, {x};" if i > 3 else f"mov.b32 {total}, {x};"]


@gluon.constexpr_function
def _polynomial(names, way, shift, lazily):
    lines = []
    for row in range(2):
        lines += [*_evaluated(f"first{row}", way), f"fma.rn.f32 ref{row}, first{row}, all, {float(shift)};"]
    lines += _grown(way, lazily)
    lines += ["neg.f32 n0, m0;", "neg.f32 n1, m1;"]
    for i, x in enumerate(names):
        if i % GROUP == 0 and i >= 2 * GROUP:
            tied = (f"a{way}", f"s{way}", f"c{way}", "n0")
            lines += [f"lop3.b32 {x_}, was{j}, zero, {x_}, 0xEA;" for j, x_ in enumerate(tied)]
        if i % GROUP == 0 and i >= GROUP:
            lines += [f"mov.b32 was{j}, sum{j // 2}{j % 2};" for j in range(4)]
        lines += [*_evaluated(x, way), f"fma.rn.f32 {x}, {x}, all, n{i % 4 // 2};", *_weight(x, i)]
    return lines


@gluon.constexpr_function
def _raised(x, y):
    """y = 1 + 2**x, of x as far as it counts."""
    return [
        f"mul.f32 {y}, {x}, bend;",
        f"min.f32 {y}, {y}, 0f41F80000;",
        f"ex2.approx.ftz.f32 {y}, {y};",
        f"add.f32 {y}, {y}, 0f3F800000;",
    ]


@gluon.constexpr_function
def _powers(names, shift, lazily, known, masked):
    """The score is the cap less twice the cap / (1 + 2**y): of large ones, which count, that is small. Four share a
    reciprocal. NaN of what is no finite number."""
    lines = []
    if not known:
        first, second = ([x for i, x in enumerate(names) if i % 4 // 2 == row] for row in range(2))
        lines += [
            "min.f32 u, m0, m1;",
            "setp.lt.f32 way, u, lowest9;",
            "vote.sync.any.pred way, way, 0xFFFFFFFF;",
            "@!way bra FOUND;",
            *largest_of("first0", first, "max.f32"),
            *largest_of("first1", second, "max.f32"),
            "FOUND:",
        ]
    for row in range(2):
        lines += [
            *_raised(f"first{row}", "a"),
            "rcp.approx.ftz.f32 a, a;",
            f"add.f32 u, cap, {float(shift)};",
            f"fma.rn.f32 ref{row}, a, twice, u;",
        ]
    lines += _grown(0, lazily)
    for row in range(2):  # with what the cap is rounded by
        lines += [f"sub.f32 n{row}, cap, m{row};", f"add.f32 n{row}, n{row}, rest;"]
    powers = ("a", "b", "c", "d")
    for first in range(0, len(names), 8):
        for row in range(2):
            places = [first + 2 * row + i for i in (0, 1, 4, 5)]
            four = [names[i] for i in places]
            for x, y in zip(four, powers, strict=True):
                lines += _raised(x, y)
            lines += [
                "mul.f32 ab, a, b;",
                "mul.f32 cd, c, d;",
                "mul.f32 all, ab, cd;",
                "rcp.approx.ftz.f32 all, all;",
                "mul.f32 cd, cd, all;",
                "mul.f32 ab, ab, all;",
            ]
            others = (("cd", "b"), ("cd", "a"), ("ab", "d"), ("ab", "c"))
            for i, x, (half, other) in zip(places, four, others, strict=True):
                lines += [f"mul.f32 u, {half}, {other};", f"fma.rn.f32 z, {x}, 0f00000000, n{row};"]
                lines += ["fma.rn.f32 z, u, twice, z;"]
                if masked:
                    lines += [f"setp.eq.f32 way, {x}, hidden;", "selp.f32 z, 0fFF800000, z, way;"]
                lines += [f"mov.b32 {x}, z;", *_weight(x, i)]
    return lines


GROUP = 16
"""Scores whose powers are taken beside the polynomials of those that follow: ptxas else takes most at the end."""
SCALARS = (
    "hidden", "limit5", "limit9", "most5", "most9", "lowest5", "lowest9", "least5", "least9",
    "a5", "s5", "c5", "a9", "s9", "b9", "k9", "c9",
    "bend", "cap", "twice", "rest", "zero",
)  # fmt: skip


@gluon.constexpr_function
def _ways_asm(count, shift, lazily, exactly, masked):
    """Outputs: weights; references, sums, factors of sums of two rows; whether they have grown; which way had to be
    taken. Inputs: products, of which there are so many, references, sums, the level of the program, scalars."""
    names = [f"${i}" for i in range(count)]
    first_input = 2 * count + 9
    lines = [
        ".reg .f32 u, z, even, all, ref0, ref1, m0, m1, n0, n1, first0, first1, a, b, c, d, ab, cd;",
        ".reg .f32 was0, was1, was2, was3, sum00, sum01, sum10, sum11, alpha0, alpha1;",
        ".reg .b32 limit5, limit9;",
        f".reg .f32 {', '.join(name for name in SCALARS if 'limit' not in name)};",
        ".reg .pred way, grown;",
        ".reg .b32 most, due, level, reached;",
        f"mov.b32 m0, ${first_input};",
        f"mov.b32 m1, ${first_input + 1};",
        f"mov.b32 level, ${first_input + 4};",
        *(f"mov.b32 {name}, ${first_input + 5 + i};" for i, name in enumerate(SCALARS)),
        "mov.b32 due, 0;",
        "mov.b32 reached, 0;",
        "mov.b32 alpha0, 0f3F800000;",
        "mov.b32 alpha1, 0f3F800000;",
    ]
    rows = [[x for i, x in enumerate(names) if i % 4 // 2 == row] for row in range(2)]
    if exactly:
        for row in range(2):
            lines += largest_of(f"first{row}", rows[row], "max.f32")
        for distance in (1, 2):
            for row in range(2):
                lines += [
                    f"shfl.sync.bfly.b32 u, first{row}, {distance}, 31, -1;",
                    f"max.f32 first{row}, first{row}, u;",
                ]
        for row in range(2):  # rows that are known not to be low, or have no keys, count as if they had large ones
            lines += [
                f"setp.eq.f32 way, first{row}, hidden;",
                f"setp.ge.or.f32 way, m{row}, lowest5, way;",
                f"selp.f32 n{row}, 0f7F7FFFFF, first{row}, way;",
            ]
        lines += [
            "min.f32 z, n0, n1;",
            "setp.lt.f32 way, z, least9;",
            "max.f32 u, first0, first1;",
            "mov.b32 most, u;",
            "max.f32 u, m0, m1;",
            "setp.gt.or.s32 way, most, limit9, way;",
            "setp.gt.or.f32 way, u, most9, way;",
        ]
    else:
        lines += as_integers(names)
        bits = [[f"i{i}" for i in range(count) if i % 4 // 2 == row] for row in range(2)]
        lines += largest_in_chains("bits", bits[0], "max.s32", 2)
        lines += largest_in_chains("other_bits", bits[1], "max.s32", 2)
        lines += [
            "mov.b32 first0, bits;",
            "mov.b32 first1, other_bits;",
            "max.s32 most, bits, other_bits;",
            "max.f32 u, m0, m1;",
            "min.f32 z, m0, m1;",
            "setp.gt.s32 way, most, limit9;",
            "setp.gt.or.f32 way, u, most9, way;",
            "setp.lt.or.f32 way, z, lowest9, way;",
        ]
    lines += [
        "setp.gt.or.s32 way, level, 2, way;",
        "vote.sync.any.pred way, way, 0xFFFFFFFF;",
        "@way bra POWERS;",
        "setp.gt.s32 way, most, limit5;",
        "setp.gt.or.f32 way, u, most5, way;",
        f"setp.lt.or.f32 way, z, {'least5' if exactly else 'lowest5'}, way;",
        "setp.gt.or.s32 way, level, 0, way;",
        "vote.sync.any.pred way, way, 0xFFFFFFFF;",
        "@way bra NINTH;",
        *_polynomial(names, 5, shift, lazily),
        "bra.uni DONE;",
        "NINTH:",
        "setp.gt.s32 way, most, limit5;",
        "vote.sync.any.pred way, way, 0xFFFFFFFF;",
        "selp.b32 reached, 1, 0, way;",
        *_polynomial(names, 9, shift, lazily),
        "bra.uni DONE;",
        "POWERS:",
        "setp.gt.s32 way, most, limit9;",
        "vote.sync.any.pred way, way, 0xFFFFFFFF;",
        "selp.b32 reached, 1, 0, way;",
        *_powers(names, shift, lazily, exactly, masked),
        "DONE:",
    ]
    for row in range(2):
        lines += [
            f"mov.b32 ${count + row}, m{row};",
            f"add.f32 sum{row}0, sum{row}0, sum{row}1;",
            f"fma.rn.f32 ${count + 2 + row}, ${first_input + 2 + row}, alpha{row}, sum{row}0;",
            f"mov.b32 ${count + 4 + row}, alpha{row};",
            f"mov.b32 ${count + 6 + row}, due;",
        ]
    lines += [f"mov.b32 ${count + 8}, reached;"]
    return "{ " + " ".join(lines) + " }"


@gluon.constexpr_function
def _constraints(count):
    outputs = ["=&f"] * (count + 6) + ["=&r"] * 3
    return ",".join([*outputs, *(str(i) for i in range(count)), *["f"] * 4, "r"] + ["f"] * len(SCALARS))


@gluon.constexpr_function
def _of_threads():
    return gl.distributed_type(gl.int32, [128], gl.BlockedLayout([1], [32], [4], [0]))


@gluon.constexpr_function
def _types(block_n, by_thread):
    rows = gl.SliceLayout(1, layout_of(near_keys(block_n)))
    return (
        *(gl.distributed_type(gl.float32, [64, n], layout_of(n)) for n in keys_of_parts(block_n)),
        gl.distributed_type(gl.float32, [64], rows),
        gl.distributed_type(gl.float32, [64, 4], by_thread),
        gl.distributed_type(gl.float32, [64], rows),
        gl.distributed_type(gl.int32, [64], rows),
        _of_threads(),
    )


@gluon.jit
def _hidden(products, ends, key, value):
    columns = gl.arange(0, products.shape[1], layout=gl.SliceLayout(0, products.type.layout))
    ends = gl.convert_layout(ends, gl.SliceLayout(1, products.type.layout), assert_trivial=True)
    return gl.where(columns[None, :] < (ends - key)[:, None], products, value)


@gluon.jit
def _all_hidden(products, ends, key, value):
    first = _hidden(products[0], ends, key, value)
    if len(products) == 1:
        return (first,)
    else:
        key += products[0].shape[1]
        second = _hidden(products[1], ends, key, value)
        if len(products) == 3:
            return first, second, _hidden(products[2], ends, key + products[1].shape[1], value)
        else:
            return first, second


@gluon.jit
def weigh_capped(
    products, m, row_sum, scale, shift: gl.constexpr, level, ends, key, masked, BLOCK_N: gl.constexpr,
    LAZILY: gl.constexpr, EXACTLY: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Weights, references, and sums with them; the factors of what was summed up before, and whether there are any but
    1, which all rows of a warp agree on. The level of the program rises to the way that a warp has had to take.

    Args:
        products: of BLOCK_N keys, in parts as sm90_wide.py has them.
        m, row_sum: references and sums before.
        scale: what `capped_factors` gives, the word of the level, and the turn.
        level: what `seen` gives.
        masked: whether a row sees only the keys below its end; never, if not MASKED.
        LAZILY: whether references stay that have grown by no more than ROOM.
        EXACTLY: whether the largest product of each row is looked for as what it is, and by the four threads that share
            it; else that of a thread, as sm90_maxima.py does it, which does not know of rows whose references are not
            known, and has them take powers.
    """
    factors, word, turn = scale
    PARTS: gl.constexpr = len(products)
    asm: gl.constexpr = _ways_asm(BLOCK_N // 2, shift, LAZILY, EXACTLY, MASKED)
    constraints: gl.constexpr = _constraints(BLOCK_N // 2)
    types: gl.constexpr = _types(BLOCK_N, row_sum.type.layout)
    hidden = float("nan")
    if MASKED:
        if masked:
            products = _all_hidden(products, ends, key, factors[0])
        hidden = gl.where(masked, factors[0], hidden)
    operands = products
    operands += (m, row_sum, level, hidden)
    operands += factors[1:]
    found = gl.inline_asm(asm, constraints, operands, types, is_pure=True)
    reach(word, turn, found[PARTS + 4])
    return found[:PARTS], found[PARTS], found[PARTS + 1], found[PARTS + 2], found[PARTS + 3]


@gluon.jit
def capped_factors(given, factors, zero, shift: gl.constexpr):
    """From the factor of scores, the soft cap and what `score_factors` gives of them, what `exponents` takes."""
    # So that errors of the log-sum-exp are near 0 in the mean, with what tensor cores cut off of products.
    SLOPE_FIVE: gl.constexpr = R_FIVE[0] * (1 + 0.5 * 2.0**-24)
    SLOPE_NINE: gl.constexpr = _slope(of_kernel(COEFFICIENTS, 1), 1) * (1 + 0.8 * 2.0**-24)
    C: gl.constexpr = of_kernel(COEFFICIENTS, 1)
    UNIT: gl.constexpr = of_kernel(TANH_UNIT, 1)
    to_log2, bend = factors
    sm_scale, softcap = given
    k = gl.div_rn(sm_scale, softcap)
    served = (k >= 1e-5) & (k <= 100.0) & (softcap >= SMALLEST_OF_NINE)
    k = gl.where(served, k, 1.0)
    # Degree 5: (a x x + s)**2 + c.
    small = sm_scale * (LOG2_E * SLOPE_FIVE)
    missing = _rounded_by(sm_scale, LOG2_E * SLOPE_FIVE, small)
    a5 = gl.exp2(0.5 * gl.log2(small * (k * k) * (k * k) * (R_FIVE[2] / SLOPE_FIVE)))
    s5 = gl.div_rn(small * (k * k) * (R_FIVE[1] / SLOPE_FIVE), 2.0 * a5)
    c5 = gl.fma(0.0 - s5, s5, small) + missing
    # Degree 9, as sm90_products.py has it for products times `per`.
    small = sm_scale * (LOG2_E * SLOPE_NINE)
    missing = _rounded_by(sm_scale, LOG2_E * SLOPE_NINE, small)
    per = gl.where(served, bend * of_kernel(BEND, 1), 1.0)
    last = gl.where(served, to_log2 / UNIT, 1.0) * per
    fourth = gl.exp2(0.25 * gl.log2(last))
    square = fourth * fourth
    fourth += fourth * (0.25 * gl.div_rn(last - square * square, last))
    square = fourth * fourth
    a9 = fourth * (per * per)
    s9 = fourth * C[0]
    b9 = square * C[1]
    k9 = fourth * C[2]
    even = gl.fma(s9, s9, b9)
    c9 = gl.fma(0.0 - gl.fma(s9, k9, even), even, small) + missing
    five = served & (softcap >= SMALLEST_OF_FIVE)
    limit5 = gl.where(five, gl.div_rn(FIVE, k), BESIDE_ALL)
    limit9 = gl.where(served, gl.div_rn(NINE, k), BESIDE_ALL)
    most5 = gl.where(five, to_log2 * TANH_FIVE + shift, float("-inf"))
    most9 = gl.where(served, to_log2 * TANH_NINE + shift, float("-inf"))
    lowest5 = gl.where(served, to_log2 * LOWEST_FIVE + shift, float("inf"))
    lowest9 = gl.where(served, to_log2 * LOWEST_NINE + shift, float("inf"))
    least5 = gl.div_rn(LOWEST_FIVE, k)
    least9 = gl.div_rn(LOWEST_NINE, k)
    hidden = gl.where(served, gl.div_rn(-8192.0, k), -1e38)  # far below all products that count, of finite powers
    return (
        hidden, limit5, limit9, most5, most9, lowest5, lowest9, least5, least9, a5, s5, c5, a9, s9, b9, k9, c9, bend,
        to_log2, to_log2 * -2.0, _rounded_by(softcap, LOG2_E, to_log2), zero.to(gl.float32, bitcast=True),
    )  # fmt: skip


@gluon.constexpr_function
def _seen_asm(outputs, inputs):
    """One lane asks, so that the others' level is 0."""
    ((level,),), ((word,),) = outputs, inputs
    return (
        f"{{ .reg .pred one; mov.b32 {level}, 0; elect.sync _|one, -1;"
        f" @one atom.shared.or.b32 {level}, [{word}], 0; and.b32 {level}, {level}, 3; }}"
    )


@gluon.jit
def seen(word):
    """The level of the program: 1 or 2 where one of its warps has had to take another than the first way in this tile,
    3 where all are to take powers; of one thread a warp, the others have 0."""
    TYPE: gl.constexpr = _of_threads()
    return gl.inline_asm(_seen_asm, ("=&r", "r"), [word], TYPE, is_pure=False)


@gluon.constexpr_function
def _reach_asm(_outputs, inputs):
    (word,), (turn,), (way,) = inputs
    return (
        f"{{ .reg .pred one, had; .reg .b32 value; elect.sync _|one, -1; setp.ne.and.s32 had, {way}, 0, one;"
        f" shl.b32 value, {turn}, 2; add.s32 value, value, {way}; @had red.shared.max.s32 [{word}], value; }}"
    )


@gluon.jit
def reach(word, turn, reached):
    """Raise the level of the program to the way that a warp has had to take."""
    gl.inline_asm(_reach_asm, ("r", "r", "r"), [word, turn, reached], is_pure=False)


@gluon.constexpr_function
def _next_asm(outputs, inputs):
    ((held,),), ((word,), (turn,), (before,), m, (most5,), (most9,)) = outputs, inputs
    return (
        "{ .reg .pred one, had, second; .reg .f32 largest; .reg .b32 value, way, told; mov.b32 way, 0; mov.b32 told, 0;"
        f" max.f32 largest, {m[0]}, {m[1]}; shl.b32 value, {turn}, 2; add.s32 value, value, 4;"
        f" mov.b32 {held}, {before};"
        f" setp.gt.f32 had, largest, {most5}; vote.sync.any.pred had, had, -1; @had mov.b32 way, 1;"
        f" setp.gt.f32 had, largest, {most9}; vote.sync.any.pred had, had, -1; @had mov.b32 way, 2;"
        f" setp.gt.s32 second, {held}, {turn}; @second mov.b32 way, 3; add.s32 way, way, value;"
        f" elect.sync _|one, -1; @one atom.shared.max.s32 told, [{word}], way;"
        # The second warp, to which the first one's word comes back.
        " add.s32 value, value, 1; setp.gt.and.s32 had, told, value, had; vote.sync.any.pred had, had, -1;"
        f" @had add.s32 {held}, {turn}, {HELD}; add.s32 value, value, 2; setp.ne.and.s32 had, {held}, {before}, one;"
        f" @had red.shared.max.s32 [{word}], value; }}"
    )


@gluon.jit
def reach_next(word, turn, held, m, row_sum, factors, shift: gl.constexpr):
    """Let the next tile begin with degree 9 if rows of this one came to it, or came near; and with powers, that one and
    some more, if rows of two warps came to them, since a lone one costs less than all. row_sum: of threads. Returns the
    turn until which the warp has others take powers, which `held` was before."""
    TYPE: gl.constexpr = _of_threads()
    m = gl.convert_layout(m, gl.SliceLayout(1, row_sum.type.layout), assert_trivial=True)
    m = m[:, None].broadcast_to([ROWS, 4])
    most5 = (factors[3] - shift) * MARGIN + shift
    operands = [word, turn, held, m, most5, factors[4]]
    return gl.inline_asm(_next_asm, ("=&r", "r", "r", "r", "f", "f", "f"), operands, TYPE, is_pure=False)


@gluon.jit
def not_held():
    """What `reach_next` takes at first."""
    return gl.zeros([128], gl.int32, layout=gl.BlockedLayout([1], [32], [4], [0]))
