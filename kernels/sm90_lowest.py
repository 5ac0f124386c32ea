"""Products of bf16 that overflow: they are not to pass for keys that are not seen, and count as some lowest product.

To compare each one takes two instructions, or one as `max.NaN`, so a warp does it only where it may matter: what
becomes of rows is the same.
"""

from sm90_maxima import as_integers, largest_in_chains
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

COUNTED = "0fF149F2CA"  # -1e30, above the largest score of a row that has had none


@gluon.constexpr_function
def _constraints(count, of_rows):
    tied = [str(i) for i in range(count)]
    return ",".join(["=&f"] * count + tied + ["f"] * (count * (2 if of_rows else 1)))


@gluon.constexpr_function
def _limited_asm(count, of_rows):
    limit = f"${2 * count}"
    products = [f"${i}" for i in range(count)]
    lines = [".reg .f32 least, lowest;", ".reg .pred low;"]
    if of_rows:
        lines += [f"min.f32 least, ${3 * count}, ${3 * count + 2};", f"setp.lt.f32 low, least, {COUNTED};"]
    else:  # of numbers below 0 the lowest has the largest bits
        lines += [*as_integers(products), *largest_in_chains("bits", [f"i{i}" for i in range(count)], "max.u32", 2)]
        lines += [f"mov.b32 other_bits, {limit};", "setp.gt.u32 low, bits, other_bits;"]
    lines += ["vote.sync.any.pred low, low, 0xFFFFFFFF;", "@low bra LOW;", "bra.uni DONE;"]
    lines += ["LOW:", f"mov.b32 lowest, {limit};"]
    if not of_rows:  # infinity less infinity is NaN
        lines += [f"add.f32 least, {limit}, {limit};", "sub.f32 least, least, least;", "add.f32 lowest, lowest, least;"]
    lines += [f"max.NaN.f32 {product}, {product}, lowest;" for product in products]
    return "{ " + " ".join([*lines, "DONE:"]) + " }"


@gluon.jit
def limited(products, m, limit):
    """Products, `limit` for those below it; NaN stays. In warps where that does not matter they are as they are.

    Args:
        products: [rows, keys], of a result of the tensor cores.
        m: [rows], the largest scores so far, where products become scores with nothing added to them: a row that has
            one needs no others that are as low, and is computed again if that one is. Or None; then it matters where a
            product is below the limit, and a limit of less than -2**127 is too high for what may be added to it: all
            products of such warps become NaN, so that their rows are computed again.
        limit: below 0.
    """
    COUNT: gl.constexpr = products.shape[1] // 2
    OF_ROWS: gl.constexpr = m is not None
    asm: gl.constexpr = _limited_asm(COUNT, OF_ROWS)
    constraints: gl.constexpr = _constraints(COUNT, OF_ROWS)
    nothing = gl.zeros(products.shape, gl.float32, layout=products.type.layout)
    inputs = [products, nothing + limit]
    if OF_ROWS:
        inputs = [products, nothing + limit, nothing + m[:, None]]
    return gl.inline_asm_elementwise(asm, constraints, inputs, dtype=gl.float32, is_pure=True, pack=COUNT)
