"""The plugin in C and the plugin in Python on a GPU: the same outputs, bit by bit, and both right against float64.

    PYTHONPATH=. python tests/plugin_kinds.py LIBRARY [--out plugin_kinds.json]

Needs a GPU and a library with ``fmha_*`` functions. The plugin in C is called through its tables of functions, the one
in Python through the double of the binding and, where it is installed, through the real tensorrt_lean.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from two_gpus_parts import Case, Kind, Problem, Runner, buffers_of, kinds_of

from pyfmha.runtime.device import Device, Stream
from pyfmha.runtime.library import Library


def problems_of(library: Library) -> Iterator[Problem]:
    """One for each function of the library that ``two_gpus_parts`` knows to drive."""
    for newer in (False, True):
        for dtype in ("fp16", "bf16"):
            for size in (32, 64, 128, 256):
                problem = Problem(dtype, size, newer)
                if problem.function in library:
                    yield problem


def outputs(kind: Kind, case: Case, stream: Stream) -> list[bytes]:
    """Out for each set of inputs, which is checked; the buffer holds NaN before."""
    runner = Runner(kind, case.problem)
    try:
        runner.prepare(case)
        found = []
        with buffers_of(case, stream) as buffers:
            for number in range(len(case.inputs)):
                buffers.send(number)
                runner.enqueue(buffers.pointers, stream.handle)
                buffers.check(number, kind.name, dry=False)
                shape, dtype = case.inputs[0][0].shape, case.inputs[0][0].dtype
                got = buffers.arrays[3].fetch(shape, dtype, stream)
                stream.synchronize()
                found.append(np.ascontiguousarray(got).tobytes())
        return found
    finally:
        runner.close()


def compare(library: Library) -> list[dict[str, Any]]:
    """Every kind on every case: what it was, and whether its outputs have the bits of the first kind's."""
    rows = []
    stream = Stream()
    kinds = kinds_of(library)
    for problem in problems_of(library):
        for case in problem.cases():
            first: list[bytes] = []
            for kind in kinds:
                found = outputs(kind, case, stream)
                first = first or found
                rows.append(
                    {
                        "function": problem.function,
                        "q": list(case.inputs[0][0].shape),
                        "kv": list(case.inputs[0][1].shape),
                        "kind": kind.name,
                        "same_bits": found == first,
                    }
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path)
    parser.add_argument("--out", type=Path, help="JSON of the results")
    arguments = parser.parse_args()
    with Device() as device:
        rows = compare(Library(arguments.library))
        facts = {"device": device.name, "rows": rows}
    if arguments.out:
        arguments.out.write_text(json.dumps(facts, indent=1) + "\n")
    different = [row for row in rows if not row["same_bits"]]
    kinds = sorted({row["kind"] for row in rows})
    print(f"{len(rows)} lives of {', '.join(kinds)}, each right against float64; {len(different)} differ in bits")
    for row in different:
        print(row)
    if different or not rows:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
