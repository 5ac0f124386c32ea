"""Settings of the Hopper kernel that are worth timing on a GPU, for ``examples/maintainers/sweep_hopper.py``."""

from dataclasses import replace
from itertools import product

from pyfmha.attention.hopper import ROWS, SHARED_OF_SM, variants
from pyfmha.attention.hopper_settings import SETTINGS, Setting
from pyfmha.spec.kernel import KernelSpec

# What is built, for every call, and what else is worth trying.
_BUILT = {
    size: tuple(
        dict.fromkeys(
            replace(
                replace(s, v_stages=2, two_heads=False, longest_first=False, handed=False, apart=False, even=0),
                requires=(),
                masks=(False, True),
                brief=False,
                halved=False,
            )
            for s in made
            if not (s.general or s.capped or s.two_parts or s.lengths)
        )
    )
    for size, made in SETTINGS.items()
}
_SWEPT = _BUILT | {
    64: (
        *_BUILT[64],
        Setting(64, 1, programs=3, maxnreg=80),
        Setting(128, 2),
        Setting(64, 3, maxnreg=128, consumer_registers=160, producer_registers=32),
    ),
}


def sweep(padded: int) -> list[Setting]:
    """Settings worth timing on a GPU, for a padded head size: those that fit its shared memory."""
    made = []
    for base, stages, v_stages, q_slots, persistent in product(_SWEPT[padded], (2, 3), (2, 3), (2, 1), (True, False)):
        rows = base.consumers * ROWS * q_slots + (stages + v_stages) * base.block_n
        if base.programs * (rows * padded * 2 + 1024) > SHARED_OF_SM:
            continue
        setting = replace(
            base, stages=stages, v_stages=v_stages, q_slots=q_slots, programs=base.programs if persistent else 0
        )
        made += [replace(setting, ping_pong=turns) for turns in ((True, False) if base.consumers > 1 else (False,))]
    return made


def sweep_specs(base: KernelSpec, padded: int) -> list[KernelSpec]:
    """Each setting of :func:`sweep` as an algorithm of a function; ``pyfmha bench`` times algorithms side by side."""
    return [
        spec
        for index, setting in enumerate(sweep(padded))
        for spec in variants(replace(base, algorithm_name=f"sweep_{index}"), padded, (setting,))
    ]
