"""Compiling many pieces of machine code: what they may use, where they are kept, and what may be left out."""

from collections.abc import Callable, Sequence

from pyfmha.aot.cache import Cache
from pyfmha.aot.cubin import Compiler, Cubin
from pyfmha.aot.limits import check_shared_memory
from pyfmha.errors import CompileError
from pyfmha.spec.arch import Arch
from pyfmha.spec.kernel import KernelSpec

Progress = Callable[[int, int, str], None]
"""Called with work done, work in all, and the name of what was just done."""


def silent(done: int, total: int, name: str) -> None:
    """Progress that nobody wants to know of."""


def compile_pieces(
    compiler: Compiler,
    wanted: Sequence[tuple[KernelSpec, Arch]],
    progress: Progress,
    cache: Cache | None = None,
    left_out: dict[str, str] | None = None,
) -> list[Cubin | None]:
    """The machine code of some specs, each for an architecture.

    Args:
        compiler: running compiler processes.
        wanted: what to compile.
        progress: called after each piece.
        cache: keeps each as soon as it is there.
        left_out: to which variants are added, with the reason, that have a user's function which their language does
            not take, and whose calls other variants serve; without it they are errors.

    Returns:
        The machine code in the order asked; None for what was left out.

    Raises:
        PyfmhaError: the first failure.
    """
    count = 0

    def spared(spec: KernelSpec, error: CompileError) -> bool:
        if left_out is None or not (spec.functions and spec.optional):
            return False
        left_out[spec.variant] = _why_left_out(spec, error)
        return True

    def done(spec: KernelSpec, cubin: Cubin) -> None:
        nonlocal count
        check_shared_memory(compiler, spec, cubin)
        if cache is not None:  # at once, so that an interrupted build resumes where it stopped
            cache.put(spec, cubin)
        count += 1
        progress(count, len(wanted), f"{spec.variant} {cubin.arch}")

    return compiler.compile_all(wanted, done, spared)


def _why_left_out(spec: KernelSpec, error: CompileError) -> str:
    """A fast variant is written in another language than what stands behind it, and may not take a user's function."""
    reason = next((line for line in reversed(str(error).splitlines()) if line.strip()), "")
    name = spec.functions[0].attribute.partition(".")[0]
    return (
        f"{spec.name} has no fast variant for {', '.join(spec.archs)}, where the portable kernel serves: Gluon does not"
        f" take {name}: {reason.strip()}"
    )
