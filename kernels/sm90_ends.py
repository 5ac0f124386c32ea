"""What fmha_biased_sm90.py does where a tile ends, in few instructions: sums of Out are looked at and scaled."""

from sm90_maxima import of_each_row, rows_of, written_to
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

NONE = "0f00000000"


@gluon.constexpr_function
def _nothing_of(name, further, row):
    """The sum of a row's registers times 0, in two chains."""
    lines = [f"mul.f32 {name}, {row[0]}, {NONE};", f"mul.f32 {further}, {row[1]}, {NONE};"]
    for i, register in enumerate(row[2:]):
        chain = further if i % 2 else name
        lines.append(f"fma.rn.f32 {chain}, {register}, {NONE}, {chain};")
    return [*lines, f"add.f32 {name}, {name}, {further};"]


@gluon.constexpr_function
def _broken_asm(count):
    first, second = rows_of(count, count)
    lines = [
        ".reg .f32 first, second, more, other;",
        *_nothing_of("first", "more", first),
        *_nothing_of("second", "other", second),
        *written_to(0, count),
    ]
    return "{ " + " ".join([*lines, "DONE:"]) + " }"


@gluon.constexpr_function
def _broken_constraints(count):
    return ",".join(["=f"] * count + ["f"] * count)


@gluon.jit
def is_broken(acc, LAYOUT: gl.constexpr):
    """Of each row, whether one of its sums is infinite or NaN."""
    COUNT: gl.constexpr = acc.shape[1] // 2
    asm: gl.constexpr = _broken_asm(COUNT)
    constraints: gl.constexpr = _broken_constraints(COUNT)
    parts = gl.inline_asm_elementwise(asm, constraints, [acc], dtype=gl.float32, is_pure=True, pack=COUNT)
    return gl.convert_layout(gl.sum(of_each_row(parts, acc.shape[1]), 1), LAYOUT, assert_trivial=True) != 0


@gluon.constexpr_function
def _scaled_asm(count):
    factors = rows_of(count * 2, count)
    lines = [
        ".reg .f32 least;",
        ".reg .pred all, some;",
        f"min.f32 least, {factors[0][0]}, {factors[1][0]};",
        *(f"mul.f32 ${i}, ${i}, ${2 * count + i};" for i in range(count)),
        f"setp.gt.f32 all, least, {NONE};",
        "@all bra DONE;",
    ]
    for place, row in enumerate(rows_of(0, count)):
        lines.append(f"setp.neu.f32 some, {factors[place][0]}, {NONE};")
        lines += [f"selp.f32 {register}, {register}, {NONE}, some;" for register in row]
    return "{ " + " ".join([*lines, "DONE:"]) + " }"


@gluon.constexpr_function
def _in_place(count):
    return ",".join(["=&f"] * count + [str(i) for i in range(count)] + ["f"] * count)


@gluon.jit
def scaled(acc, factor):
    """Sums times factors of their rows, 0 where that is 0, whatever the sum is."""
    COUNT: gl.constexpr = acc.shape[1] // 2
    factor = gl.convert_layout(factor, gl.SliceLayout(1, acc.type.layout), assert_trivial=True)
    factors = factor[:, None].broadcast_to(acc.shape)
    asm: gl.constexpr = _scaled_asm(COUNT)
    constraints: gl.constexpr = _in_place(COUNT)
    return gl.inline_asm_elementwise(asm, constraints, [acc, factors], dtype=gl.float32, is_pure=True, pack=COUNT)
