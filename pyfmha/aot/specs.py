"""From a kernel file, a signature and a configuration to specs: what is open is filled by wrappers and defaults."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pyfmha.aot.cubin import Compiler, Parameters, Settled
from pyfmha.errors import SpecError
from pyfmha.spec.arch import ARCHS, Arch
from pyfmha.spec.c_names import derived_function_name
from pyfmha.spec.constants import Constant, to_data
from pyfmha.spec.kernel import Argument, KernelSpec, workspace_argument
from pyfmha.spec.signature import Fixed, Given, Signature, parse_signature

WORKSPACE = "workspace"
"""What the argument for a kernel's global scratch is called."""


def _nowhere(note: str) -> None:
    pass


def make_spec(
    compiler: Compiler,
    source: Path,
    kernel: str,
    signature: str,
    grid: str,
    *,
    config: int | None = None,
    note: Callable[[str], None] = _nowhere,
    **settings: Any,
) -> KernelSpec:
    """A spec from a signature in Triton's notation, read against the kernel's own parameters.

    Args:
        compiler: running compiler processes.
        source: the kernel's file.
        kernel: its name there; it may stand under ``@triton.autotune``, ``@triton.heuristics``, or any wrapper that
            holds it as ``.fn``.
        signature: see :func:`pyfmha.spec.signature.parse_signature`. Constants that the configuration sets, that a
            heuristic computes from what is given, or that have a default, may be left out.
        grid: see :mod:`pyfmha.spec.grid`.
        config: which of its autotuner's configurations sets constants, warps, stages, num_ctas and maxnreg.
        note: called with what a caller must know.
        settings: as :func:`make_specs`.

    Raises:
        KernelSourceError: the file or the kernel cannot be had.
        SpecError: signature, grid, hints, configuration or settings are wrong.
    """
    (spec,) = make_specs(compiler, source, kernel, signature, grid, configs=[config], note=note, **settings)
    return spec


def make_specs(
    compiler: Compiler,
    source: Path,
    kernel: str,
    signature: str,
    grid: str,
    *,
    name: str | None = None,
    configs: Sequence[int | None] | None = (None,),
    archs: Sequence[Arch] = (ARCHS["sm_80"],),
    num_warps: int | None = None,
    num_stages: int | None = None,
    maxnreg: int | None = None,
    workspace: bool = False,
    default_warps: int = 4,
    debug: bool | None = None,
    nullable: Sequence[str] = (),
    note: Callable[[str], None] = _nowhere,
    **fields: Any,
) -> list[KernelSpec]:
    """As :func:`make_spec`, for several configurations: one spec each, those of equal settings once.

    Args:
        compiler, source, kernel, signature, grid, note: as :func:`make_spec`.
        name: the C function's; by default the kernel's, or one like it that C can have.
        configs: which configurations, by their places; None in their stead: all that there are.
        archs: what it is to be compiled for: a file that asks for the GPU when it is imported is told these, and must
            give them all the same configurations.
        num_warps, num_stages, maxnreg: where no configuration or heuristic sets them; None: `default_warps`, 3 and no
            limit.
        workspace: whether the function takes a last argument, ``workspace``, for the kernel's global scratch.
        debug: whether device asserts are in the machine code; None: as the kernel's decorator says.
        nullable: the pointers that may be 0, see :class:`pyfmha.KernelSpec`.
        fields: further fields of it.
    """
    found = _described(compiler, source, kernel, archs)
    if configs is None:
        configs = list(range(len(found.configs)))
        if not configs:
            raise SpecError(f"kernel {kernel} has no @triton.autotune, so it has no configurations; leave out --config")
    read = parse_signature(signature, found.names, found.constexprs, found.functions)
    for text in nullable:
        pointer = text.partition(" ")[0]
        if pointer in found.compared and isinstance(read.given.get(pointer), Argument):
            note(
                f"kernel {kernel} compares {pointer} with None, which is settled when it is compiled: a pointer that is"
                f" 0 is not None. Ask `if {pointer}.to(tl.int1)`, or compile it once more with None for {pointer}"
            )
    given = {parameter: _data(entry) for parameter, entry in read.given.items()}
    asked = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg}
    specs: dict[str, KernelSpec] = {}
    for config in configs:
        _check_config(kernel, config, found)
        settled = [compiler.settle(source, kernel, arch, config, given) for arch in archs]
        if any(other != settled[0] for other in settled):
            raise SpecError(
                f"kernel {kernel} has other settings for {archs[0].name} than for others of"
                f" {', '.join(arch.name for arch in archs)}; compile it for one at a time"
            )
        for text in settled[0].notes:
            note(text)
        parsed = read.filled(_values(kernel, config, read, found, settled[0]))
        spec = KernelSpec(
            source=source,
            kernel=kernel,
            name=name or derived_function_name(kernel),
            arguments=(*parsed.arguments, *([workspace_argument(WORKSPACE)] if workspace else [])),
            constants=parsed.constants,
            grid=grid,
            tuples=parsed.tuples,
            workspace=WORKSPACE if workspace else "",
            debug=True if debug is None and found.debug else debug,
            nullable=tuple(nullable),
            **({"num_warps": default_warps} | _options(kernel, config, settled[0].options, asked)),
            **fields,
        )
        specs.setdefault(spec.variant, spec)
    return list(specs.values())


def _described(compiler: Compiler, source: Path, kernel: str, archs: Sequence[Arch]) -> Parameters:
    found = [compiler.describe(source, kernel, arch) for arch in archs]
    if any(other != found[0] for other in found):
        raise SpecError(
            f"kernel {kernel} has other parameters or configurations for {archs[0].name} than for others of"
            f" {', '.join(arch.name for arch in archs)}; compile it for one at a time"
        )
    return found[0]


def _check_config(kernel: str, config: int | None, found: Parameters) -> None:
    if config is None or 0 <= config < len(found.configs):
        return
    if not found.configs:
        raise SpecError(f"kernel {kernel} has no @triton.autotune, so it has no configurations; leave out --config")
    known = "\n".join(f"  {index}: {_shown(one)}" for index, one in enumerate(found.configs))
    raise SpecError(f"kernel {kernel} has no configuration {config}; it has\n{known}")


def _shown(config: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in config.items())


def _values(
    kernel: str, config: int | None, read: Signature, found: Parameters, settled: Settled
) -> dict[str, Constant]:
    """Values for the open parameters, where there are any."""
    lacking = [name for name in settled.unknown if name in read.open]
    if lacking:
        why = "; ".join(f"{name}: {settled.unknown[name]}" for name in lacking)
        example = ", ".join(f"{name}=..." for name in lacking)
        raise SpecError(
            f"kernel {kernel}: heuristics that cannot be computed here give {', '.join(lacking)} ({why}); end the"
            f" signature with their values: {example}"
        )
    values = {**found.defaults, **settled.constants}
    tuned = sorted({name for one in found.configs for name in one if name in read.open and name not in values})
    if config is None and tuned:
        known = "\n".join(f"  {index}: {_shown(one)}" for index, one in enumerate(found.configs))
        raise SpecError(
            f"kernel {kernel}: its autotuner gives {', '.join(tuned)}; choose with --config, a number or all, or give"
            f" values in the signature. Its configurations:\n{known}"
        )
    return values


def _options(
    kernel: str, config: int | None, set_by: Mapping[str, int], asked: Mapping[str, int | None]
) -> dict[str, Any]:
    twice = [name for name, value in asked.items() if value is not None and name in set_by]
    if twice:
        what = ", ".join(f"{name}={set_by[name]}" for name in twice)
        by = "a heuristic" if config is None else f"configuration {config}"
        raise SpecError(f"kernel {kernel}: {what} is set by {by}; leave out --{twice[0].replace('_', '-')}")
    return {name: value for name, value in asked.items() if value is not None} | dict(set_by)


def _data(entry: Given) -> dict[str, Any]:
    if isinstance(entry, Fixed):
        return {"value": to_data(entry.value)}
    if isinstance(entry, Argument):
        return {"type": entry.type, "hint": entry.hint}
    return {"elements": [_data(element) for element in entry.elements]}
