"""The tests of numbers as other processors see them: with numpy's optional features off, and other kernels of OpenBLAS.

    python tests/processors.py [pytest's arguments]

Runs pytest once for each setting, on the files of numbers and on as many processes as there are processors. What
numpy does with the last bits of exp2, log2 and sums depends on the features it dispatches on, and products on the
kernels that OpenBLAS chooses; no verdict may. Exit code 0 if all passed, else pytest's first other one.
"""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

TESTS = Path(__file__).parent
NUMBERS = (
    "attention",
    "functions",
    "interpreter",
    "onnx_models",
    "trt/test_session.py",
    "trt/test_session_features.py",
    "verify",
    "bench",
)


def _umath() -> Any:
    """Where numpy tells its features; 1.26 has it under another name."""
    return (np._core if hasattr(np, "_core") else np.core)._multiarray_umath


def optional_features() -> list[str]:
    """What numpy has code for beyond what it needs, and uses on this processor: what may be switched off."""
    umath = _umath()
    return [name for name in umath.__cpu_dispatch__ if umath.__cpu_features__[name]]


def switched_off() -> list[str]:
    """The features that the environment has switched off already, and that must stay off in every setting."""
    names = re.split(r"[\s,]+", os.environ.get("NPY_DISABLE_CPU_FEATURES", ""))
    return [name for name in _umath().__cpu_dispatch__ if name in names]


def processors() -> dict[str, dict[str, str]]:
    """The environment for each processor to behave like: an older one without any optional feature, and where this one
    has AVX-512, one without that."""
    x86 = platform.machine() == "x86_64"
    features = optional_features()
    settings = {"none of " + ", ".join(features): _environment(features, "Nehalem" if x86 else None)}
    wide = [name for name in features if name.startswith("AVX512") or name == "X86_V4"]
    if wide:
        settings["none of " + ", ".join(wide)] = _environment(wide, "Haswell")
    return settings


def _environment(features: list[str], core: str | None) -> dict[str, str]:
    off = dict.fromkeys([*features, *switched_off()])
    made = {"NPY_DISABLE_CPU_FEATURES": " ".join(off)}
    return made if core is None else {**made, "OPENBLAS_CORETYPE": core}


def main(arguments: list[str]) -> int:
    for name, setting in processors().items():
        print(f"numpy uses {name}; {setting}", flush=True)
        command = [sys.executable, "-m", "pytest", "-n", "auto", "--maxprocesses", "4", "--dist", "loadfile"]
        files = [str(TESTS / name) for name in NUMBERS]
        done = subprocess.run([*command, *files, *arguments], env={**os.environ, **setting}, check=False)
        if done.returncode:
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
