"""Build a library with many settings of the Hopper kernel, each an algorithm of fmha_fwd_d*, to be timed on an H100.

python examples/maintainers/sweep_hopper.py --head-size 64 --out sweep      # anywhere, without a GPU
pyfmha bench --library sweep/libpyfmha.so --preset prefill      # on the H100: one row an algorithm
"""

import argparse
from pathlib import Path

from pyfmha.aot import build
from pyfmha.attention.forward import Forward
from pyfmha.attention.hopper import ARCH, HEAD_SIZES
from pyfmha.attention.hopper_sweep import sweep, sweep_specs
from pyfmha.spec.arch import parse_archs


def main() -> None:
    """Build, and say which algorithm is which."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head-size", type=int, nargs="+", default=[64, 128], choices=HEAD_SIZES)
    parser.add_argument("--dtype", default="fp16", choices=["fp16", "bf16"])
    parser.add_argument("--out", type=Path, default=Path("sweep"))
    options = parser.parse_args()
    specs = []
    for head_size in options.head_size:
        function = Forward(options.dtype, head_size)
        portable = function.specs()
        specs += [*portable, *sweep_specs(portable[-1], head_size)]
        print(f"{function.name}: algorithm 0 is the portable kernel")
        for number, setting in enumerate(sweep(head_size), start=1):
            print(f"{function.name}: algorithm {number} is {setting}")
    built = build(specs, parse_archs([ARCH]), options.out, progress=lambda *step: print(*step), fresh=True)
    print(built.library)


if __name__ == "__main__":
    main()
