"""The plugin's tests through NVIDIA's real bindings of TensorRT 10, each with numpy 1.26 and with numpy 2.

    .venv/bin/python tests/real_bindings.py        # or: make test-bindings

The lean bindings 10.8 to 10.15.1 misread plugin fields under numpy 2 (:mod:`pyfmha.trt.field_data`); of those that
install without a GPU 10.15.1.29 is one, and 10.16.1.11 the first that reads them rightly. Each version of a package
goes into a folder of its own beside the environment's packages, before which it is found: 300 MB in all, fetched once.
Exit code 0: all passed; else the first one of pip or pytest that is not 0.
"""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
FOLDERS = Path(sys.prefix) / "bindings"
BINDINGS = ("10.15.1.29", "10.16.1.11")
NUMPYS = ("1.26.4", "2.*")
FILES = (
    "field_data",
    "trt_plugin",
    "trt_register",
    "trt_traps",
    "trt_features",
    "trt_decode",
    "trt_direct",
    "trt_launch",
    "register_library",
)
# The wheels hold no package of the name that users import; NVIDIA's source package adds these two lines.
FACADE = "from tensorrt_lean_bindings import *\nfrom tensorrt_lean_bindings import __version__\n"
CHECK = "import numpy, tensorrt_lean; print(numpy.__version__, tensorrt_lean.__version__)"


def installed(*packages: str) -> Path:
    """A folder with some packages, without what they depend on."""
    folder = FOLDERS / "+".join(packages).replace("==", "-").replace("*", "x")
    done = folder / "installed"
    if not done.is_file():
        pip = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            "--upgrade",
        ]
        subprocess.run([*pip, "--target", folder, *packages], check=True)
        done.touch()
    return folder


def lean(version: str) -> Path:
    """The folder with one version of the lean runtime."""
    folder = installed(f"tensorrt-lean-cu12-bindings=={version}", f"tensorrt-lean-cu12-libs=={version}")
    (folder / "tensorrt_lean").mkdir(exist_ok=True)
    (folder / "tensorrt_lean" / "__init__.py").write_text(FACADE)
    return folder


def check(version: str, numpy: str) -> None:
    """Run the tests with one pair, and make sure that it is that pair."""
    path = os.pathsep.join(map(str, (lean(version), installed(f"numpy=={numpy}"))))
    environment = {**os.environ, "PYTHONPATH": path}
    found = subprocess.run([sys.executable, "-c", CHECK], env=environment, check=True, capture_output=True, text=True)
    sys.stdout.write(f"numpy and tensorrt_lean: {found.stdout}")
    sys.stdout.flush()
    has_numpy, has_lean = found.stdout.split()
    assert has_lean == version, has_lean
    assert has_numpy.startswith(numpy.rstrip("*")), has_numpy
    files = [str(TESTS / "trt" / f"test_{name}.py") for name in FILES]
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "tensorrt_lean", *files]
    subprocess.run(pytest, env=environment, check=True, cwd=TESTS.parent)


def main() -> int:
    """Every pair."""
    try:
        for version in BINDINGS:
            for numpy in NUMPYS:
                check(version, numpy)
    except subprocess.CalledProcessError as error:
        return int(error.returncode)
    return 0


if __name__ == "__main__":
    sys.exit(main())
