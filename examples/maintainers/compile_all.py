"""Compile the whole attention family for each architecture and print what it took.

    python examples/maintainers/compile_all.py [ARCH ...]

Needs Triton and a C compiler, no GPU. A member that an architecture cannot hold ends the run with the reason.
"""

import sys
import tempfile
import time
from pathlib import Path

from pyfmha.aot import build
from pyfmha.attention.first import family, family_specs
from pyfmha.spec.arch import ARCHS, parse_archs


def main() -> None:
    """One line an architecture."""
    specs = family_specs(family())
    for name in sys.argv[1:] or ARCHS:
        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter()
            result = build(specs, parse_archs([name]), Path(folder))
            seconds = time.perf_counter() - begin
        images = [image for _, _, variant in result.manifest.variants() for image in variant.images]
        shared = max(images, key=lambda image: image.shared)
        spilled = sum(image.spilled > 0 for image in images)
        print(
            f"{name}: {result.compiled} compiled in {seconds:.0f} s; at most {shared.shared} of {shared.shared_limit}"
            f" bytes of shared memory; {spilled} spill, at most {max(image.spilled for image in images)} bytes",
            flush=True,
        )


if __name__ == "__main__":
    main()
