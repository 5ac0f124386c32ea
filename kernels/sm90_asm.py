"""Inline PTX of fmha_sm90.py: turns, barriers, and what keeps ptxas from moving things."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def _turn_asm(operation, consumer):
    return f"bar.{operation} {8 + consumer}, 256;"


@gluon.jit
def take_turn(x, consumer: gl.constexpr):
    """Wait until the consumer before this one has issued its products. Returns x, to keep its place in the code."""
    asm: gl.constexpr = _turn_asm("sync", consumer)
    return gl.inline_asm_elementwise(asm, "=r,=r,0,1", [x], dtype=x.dtype, is_pure=False, pack=2)


@gluon.jit
def pass_turn(x, consumer: gl.constexpr):
    """Let a consumer issue its products."""
    asm: gl.constexpr = _turn_asm("arrive", consumer)
    return gl.inline_asm_elementwise(asm, "=r,=r,0,1", [x], dtype=x.dtype, is_pure=False, pack=2)


@gluon.constexpr_function
def _barriers_asm(count, name, threads):
    return f"bar.sync {name}, {threads}; " * count + "mov.b32 $0, $1;"


@gluon.jit
def keep_up(i, COUNT: gl.constexpr, NAME: gl.constexpr, WARPS: gl.constexpr):
    """Barriers of a partition's own, by which it falls back a little."""
    asm: gl.constexpr = _barriers_asm(COUNT, NAME, 32 * WARPS)
    gl.inline_asm_elementwise(asm, "=r,r", [i], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def hold(x):
    """Returns x, of at least 0 or NaN, two of which a thread holds; it is then computed before any wait that follows.

    Left alone, ptxas moves the wait for a product ahead of the arithmetic that should run beside it: nothing it knows
    of ties them. A store does, which is never carried out: no such numbers have these bits. (ptxas knows of powers that
    they are not below 0.) One for both rows of a thread, for two would keep the arithmetic of the rows apart.
    """
    asm: gl.constexpr = """
    {
        .reg .pred p;
        .reg .b32 both;
        or.b32 both, $2, $3;
        setp.eq.u32 p, both, 0x80000001;
        @p st.shared.b32 [$2], $3;
        mov.b32 $0, $2;
        mov.b32 $1, $3;
    }"""
    return gl.inline_asm_elementwise(asm, "=r,=r,r,r", [x], dtype=x.dtype, is_pure=False, pack=2)


@gluon.jit
def moved(x):
    """Returns x, integers, in registers of its own. Between two loops through which it goes, that saves moves in each
    round of the second, for which ptxas else keeps some of the first one's registers."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=1)


@gluon.jit
def after(x, product, zero):
    """Returns x, which is then not known before `product` is: zero is 0, which the compiler does not know.

    A wait alone does not keep what follows behind it, see `hold`; what a tensor core operation writes does.
    """
    zeros = gl.full(x.shape, zero, gl.int32, layout=x.type.layout)
    asm: gl.constexpr = "lop3.b32 $0, $1, $2, $3, 0xEA;"  # ($1 & $2) | $3
    return gl.inline_asm_elementwise(asm, "=r,r,r,r", [product, zeros, x], dtype=x.dtype, is_pure=True, pack=1)


@gluon.jit
def reciprocal(x):
    """1 / x within 1 unit in the last place, 0 for infinity: one instruction, where a division takes three."""
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=x.dtype, is_pure=True, pack=1)


@gluon.jit
def uniform(x):
    """Returns x, an integer that every thread has; ptxas, which cannot know that, then may keep it once a warp. All
    threads of a warp must come here."""
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, 0, 31, -1;", "=r,r", [x], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def written(x):
    """Returns x when what TMA stored has reached global memory, where tma.store_wait waits for shared memory only."""
    return gl.inline_asm_elementwise(
        "cp.async.bulk.wait_group 0; mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=1
    )


@gluon.constexpr_function
def _arrive_asm():
    return (
        "{ .reg .pred one; .reg .b32 lane; .reg .b64 state; elect.sync lane|one, 0xFFFFFFFF;"
        " @one mbarrier.arrive.shared.b64 state, [$0]; }"
    )


@gluon.jit
def arrive_by_warps(barrier):
    """Each warp arrives by itself, where mbarrier.arrive has one thread arrive after a barrier of all: for what only
    tensor cores read, each of which a warp has waited for."""
    asm: gl.constexpr = _arrive_asm()
    gl.inline_asm(asm, "r", (barrier,), is_pure=False)


@gluon.constexpr_function
def _wait_asm():
    return "{ .reg .pred done; AGAIN: mbarrier.try_wait.parity.shared.b64 done, [$0], $1; @!done bra.uni AGAIN; }"


@gluon.jit
def wait_by_warps(barrier, phase):
    """As mbarrier.wait, between two of which in a loop the compiler puts a barrier of all warps."""
    asm: gl.constexpr = _wait_asm()
    gl.inline_asm(asm, "r,r", (barrier, phase), is_pure=False)
