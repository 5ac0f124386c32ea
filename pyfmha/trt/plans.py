"""What a library says of the launches that a plugin plans."""

from collections.abc import Sequence
from functools import lru_cache

from pyfmha.errors import PluginError
from pyfmha.operators.plan import Plan
from pyfmha.runtime.library import Library
from pyfmha.runtime.serving import serving
from pyfmha.spec.arch import arch_for
from pyfmha.trt.current import capability_in, current_context
from pyfmha.trt.launch import check_arguments


def held(plan: Plan, library: Library) -> Plan:
    """A plan whose functions the library holds; whether their arguments fit shows when they are bound.

    Raises:
        PluginError: it lacks one.
    """
    for step in plan.steps:
        if step.function not in library:
            raise PluginError(f"{library.path} does not hold {step.function}")
    return plan


def checked(plan: Plan, library: Library) -> Plan:
    """A plan that the library can launch.

    Raises:
        PluginError: it lacks a function, or an argument does not fit its C type.
    """
    for step in held(plan, library).steps:
        check_arguments(library[step.function], step.arguments)
    return plan


@lru_cache(maxsize=64)
def _arch(capability: int, there: tuple[str, ...]) -> str | None:
    return arch_for(f"sm_{capability}", there)


def serves(library: Library, algo_id: int, function: str, kernel: str, arguments: Sequence[float]) -> bool:
    """Whether a function would run a kernel on the current device; no where there is none, as in a build."""
    context = current_context()
    if context is None or function not in library:
        return False
    manifest = library[function].manifest
    arch = _arch(capability_in(context), library[function].archs)
    return arch is not None and any(
        variant.kernel == kernel for variant in serving(manifest, algo_id, arch, arguments)[:1]
    )
