"""Shared memory: a build-time check against the architecture's limit, and what to use instead."""

import itertools
import re
from collections.abc import Iterator
from dataclasses import replace

from pyfmha.aot.cubin import Compiler, Cubin
from pyfmha.errors import CompileError, SharedMemoryError
from pyfmha.spec.arch import ARCHS, Arch
from pyfmha.spec.kernel import KernelSpec

_TRIES = 12
_BLOCK_NAME = re.compile(r"BLOCK(_SIZE)?_[A-Z]$")  # BLOCK_M, BLOCK_SIZE_N; not BLOCK_DMODEL, which fixes the problem


def check_shared_memory(compiler: Compiler, spec: KernelSpec, cubin: Cubin) -> None:
    """Refuse machine code that no device of its architecture could launch.

    Triton compiles it without a word, and the driver refuses it only at the launch.

    Raises:
        SharedMemoryError: naming variant, bytes, limit, and settings that fit, each of which was compiled to find out.
    """
    arch = ARCHS[cubin.arch]
    spec = spec.resolve(arch.name)
    if cubin.shared <= arch.shared_limit:
        return
    fitting = list(itertools.islice(_fitting(compiler, spec, arch), 3))
    advice = (
        f"these fit, with a grid to match: {'; '.join(fitting)}" if fitting else "no smaller block was found that fits"
    )
    raise SharedMemoryError(
        f"{spec.variant} needs {cubin.shared} bytes of shared memory a block,"
        f" {arch.name} allows {arch.shared_limit}; {advice}"
    )


def _fitting(compiler: Compiler, spec: KernelSpec, arch: Arch) -> Iterator[str]:
    for candidate in itertools.islice(_smaller(spec), _TRIES):
        try:
            cubin = compiler.compile(candidate, arch)
        except CompileError:
            continue  # a block the kernel cannot have
        if cubin.shared <= arch.shared_limit:
            blocks = [f"{name}={value}" for name, value in candidate.constants if _BLOCK_NAME.match(name)]
            yield ", ".join([*blocks, f"num_stages={candidate.num_stages}"]) + f" ({cubin.shared} bytes)"


def _smaller(spec: KernelSpec) -> Iterator[KernelSpec]:
    """Specs with fewer stages and smaller blocks, the nearest first."""
    blocks = [name for name, value in spec.constants if _BLOCK_NAME.match(name) and isinstance(value, int)]
    options = []
    for halvings in itertools.product(range(3), repeat=len(blocks)):
        for stages in range(spec.num_stages, 0, -1):
            steps = dict(zip(blocks, halvings, strict=True))
            options.append((sum(halvings) + spec.num_stages - stages, steps, stages))
    for distance, steps, stages in sorted(options, key=lambda option: option[0]):
        constants = tuple(
            (name, max(16, value >> steps[name]) if name in steps and isinstance(value, int) else value)
            for name, value in spec.constants
        )
        if distance:
            # The grid may name the old block size as a number: only the compiled size matters here.
            yield replace(spec, constants=constants, num_stages=stages)
