"""Largest scores of rows for fmha_sm90.py, three numbers at a time, where a multiprocessor compares two as floats.

Floats of which one is not below 0 are in the order of their bits as signed integers, and of integers Hopper takes the
largest of three in one instruction (VIMNMX3). Of numbers that are all below 0 the order is reversed: that matters only
where a row has had no score of at least 0 in the blocks before either, and such warps compare floats.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def largest_of(target, names, operation):
    """The largest of so many names, one after the other: ptxas makes one instruction of two."""
    lines = [f"{operation} {target}, {names[0]}, {names[1]};"]
    return lines + [f"{operation} {target}, {target}, {name};" for name in names[2:]]


@gluon.constexpr_function
def largest_in_chains(target, names, operation, most):
    """As `largest_of` of integers, in so many chains beside each other, or fewer, since each waits for the one before:
    of odd numbers of names, but for the last, so that each instruction has three."""
    chains = max(min(most, len(names) // 8), 1)
    if chains == 1:
        return largest_of(target, names, operation)
    each = len(names) // chains // 2 * 2 + 1
    lines = []
    for i in range(chains):
        lines += largest_of(f"chain{i}", names[i * each : (i + 1) * each if i < chains - 1 else None], operation)
    return lines + largest_of(target, [f"chain{i}" for i in range(chains)], operation)


@gluon.constexpr_function
def as_integers(names):
    """Declares and fills integers i0, i1, ... with the bits of floats, which PTX does not compare as others."""
    lines = [f".reg .b32 i<{len(names)}>;", ".reg .b32 chain<4>;", ".reg .b32 bits, other_bits;"]
    return lines + [f"mov.b32 i{i}, {name};" for i, name in enumerate(names)]


@gluon.constexpr_function
def largest_integers(count):
    """The largest of the integers of two rows, as the floats that they are: `first` and `second`."""
    first, second = ([f"i{i}" for i in range(count) if i % 4 // 2 == row] for row in range(2))
    lines = largest_in_chains("bits", first, "max.s32", 2) + largest_in_chains("other_bits", second, "max.s32", 2)
    return [*lines, "mov.b32 first, bits;", "mov.b32 second, other_bits;"]


@gluon.constexpr_function
def rows_of(first_register, count):
    """The registers of a thread's two rows, which hold two columns of the one, two of the other, and so on."""
    names = [f"${first_register + i}" for i in range(count)]
    return [names[i] for i in range(count) if i % 4 < 2], [names[i] for i in range(count) if i % 4 >= 2]


@gluon.constexpr_function
def written_to(first_register, count):
    """The largest ones, to a register for each score; only one of each row is used."""
    return [f"mov.b32 ${first_register + i}, {'first' if i % 4 < 2 else 'second'};" for i in range(count)]


@gluon.constexpr_function
def _largest_lines(count, first_register, m, other_m, shift, written):
    """Finds `first` and `second`, the largest scores of a thread's two rows, and writes them with `written`."""
    first, second = rows_of(first_register, count)
    lines = [
        ".reg .f32 first, second, least;",
        ".reg .pred below;",
        *as_integers([*(f"${first_register + i}" for i in range(count))]),
        f"min.f32 least, {m}, {other_m};",
        f"setp.lt.f32 below, least, {float(shift)};",
        "vote.sync.any.pred below, below, 0xFFFFFFFF;",
        "@below bra BELOW;",
        *largest_integers(count),
        *written,
        "bra.uni DONE;",
        "BELOW:",
        *largest_of("first", first, "max.f32"),
        *largest_of("second", second, "max.f32"),
        *written,
    ]
    return "{ " + " ".join([*lines, "DONE:"]) + " }"


@gluon.constexpr_function
def _largest_asm(count, shift):
    return _largest_lines(count, count, f"${2 * count}", f"${2 * count + 2}", shift, written_to(0, count))


@gluon.constexpr_function
def largest_of_parts_asm(count, shift):
    """Operands: the largest scores of a thread's two rows; all `count` of them; m of the two."""
    written = ["mov.b32 $0, first;", "mov.b32 $1, second;"]
    return _largest_lines(count, 2, f"${2 + count}", f"${3 + count}", shift, written)


@gluon.constexpr_function
def _constraints(count):
    return ",".join(["=&f"] * count + ["f"] * (2 * count))


@gluon.jit
def _first(a, b):
    return a


@gluon.jit
def of_each_row(product, BLOCK_D: gl.constexpr):
    """Some element that a thread holds of each of its rows, [rows, 4]."""
    parts = product.reshape([product.shape[0], BLOCK_D // 8, 4, 2])
    return gl.reduce(gl.reduce(parts, 3, _first), 1, _first)


@gluon.jit
def largest_of_rows(peaks, LAYOUT: gl.constexpr):
    """[rows]: the largest of what each of the four threads that share a row holds for it in `peaks`, [rows, keys]."""
    return gl.convert_layout(gl.max(of_each_row(peaks, peaks.shape[1]), 1), LAYOUT, assert_trivial=True)


@gluon.jit
def largest(scores, m, shift: gl.constexpr):
    """The largest score of each row, [rows], or some number of at most 0 where none is above 0 and m is at least shift.

    Args:
        scores: [rows, keys], of a result of the tensor cores.
        m: [rows], of the blocks before: a factor above 0 times the largest score, plus shift.
    """
    COUNT: gl.constexpr = scores.shape[1] // 2
    asm: gl.constexpr = _largest_asm(COUNT, shift)
    constraints: gl.constexpr = _constraints(COUNT)
    references = gl.zeros(scores.shape, gl.float32, layout=scores.type.layout) + m[:, None]
    peaks = gl.inline_asm_elementwise(
        asm, constraints, [scores, references], dtype=gl.float32, is_pure=True, pack=COUNT
    )
    return largest_of_rows(peaks, gl.SliceLayout(1, scores.type.layout))
