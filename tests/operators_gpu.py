"""Operators of kernels that are not attention's, on a GPU: right against float64, and their bits beside Triton's.

    PYTHONPATH=. python tests/operators_gpu.py LIBRARY [--out operators_gpu.json]

LIBRARY is built from ``tests/kernels/foreign.py`` (``pyfmha build --operators``). Each operator runs as the plugin in C
of the library, through its tables of functions. Needs a GPU and torch, whose Triton compiles the same kernels at run
time: where that is not the version that built the library, bits may differ. Exit code 1: a result is wrong, or its bits
differ from those of the same Triton.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from operator_references import CASES, Case, relative_error

from kernels import foreign
from pyfmha.runtime.library import Library
from pyfmha.trt.tables import Field, LibraryTables, Tensor

KINDS = {torch.float32: 0, torch.float16: 1, torch.int32: 3}
"""``int(trt.DataType)``."""


def through_the_plugin(tables: LibraryTables, case: Case, inputs: list[Any], outputs: list[Any]) -> None:
    """Create, configure, load, attach, prepare and enqueue, as TensorRT does."""
    fields = [Field(name, kind, 1, np.array([value], dtype).tobytes()) for name, kind, dtype, value in case.fields()]
    creator = tables.named(case.operator)
    built = tables.create(creator, case.operator, fields, 0)
    assert built is not None, tables.error()
    tensors = [Tensor(tuple(tensor.shape), KINDS[tensor.dtype]) for tensor in (*inputs, *outputs)]
    shapes = tensors[: len(inputs)], tensors[len(inputs) :]
    assert tables.configure(built, *shapes) == 0, tables.error()
    stored = tables.stored_fields(built)
    assert stored is not None
    loaded = tables.create(creator, case.operator, stored.read(), 1)
    assert loaded is not None, tables.error()
    running = tables.attach(loaded)
    assert running is not None, tables.error()
    room = torch.empty(max(tables.workspace(running, *shapes), 1), dtype=torch.uint8, device="cuda")
    assert tables.on_shape_change(running, *shapes) == 0, tables.error()
    addresses = [tensor.data_ptr() for tensor in inputs], [tensor.data_ptr() for tensor in outputs]
    status = tables.enqueue(running, *addresses, room.data_ptr(), torch.cuda.current_stream().cuda_stream)
    assert status == 0, tables.error()
    torch.cuda.synchronize()
    for plugin in (running, loaded, built):
        plugin.delete()


def at_run_time(case: Case, inputs: list[Any], outputs: list[Any]) -> None:
    """The same kernel with the constants of the first algorithm, compiled and launched by Triton."""
    arguments = case.launch(inputs, outputs, lambda count: torch.empty(count, dtype=torch.float32, device="cuda"))
    getattr(foreign, case.kernel)[case.grid](**arguments, **case.constants, num_warps=4)
    torch.cuda.synchronize()


def check(tables: LibraryTables, case: Case) -> dict[str, Any]:
    """Both on the same inputs; the outputs hold NaN before."""
    arrays = case.inputs()
    inputs = [torch.from_numpy(array).cuda() for array in arrays]
    made = []
    for which in range(2):
        outputs = [torch.from_numpy(np.full(shape, np.nan, kind)).cuda() for shape, kind in case.outputs]
        if which == 0:
            through_the_plugin(tables, case, inputs, outputs)
        else:
            at_run_time(case, inputs, outputs)
        made.append([output.cpu().numpy() for output in outputs])
    wanted = case.reference(*arrays)
    errors = [max(map(relative_error, found, wanted)) for found in made]
    same = all(one.tobytes() == other.tobytes() for one, other in zip(*made, strict=True))
    apart = max(float(np.abs(one.astype(np.float64) - other).max()) for one, other in zip(*made, strict=True))
    row = {"operator": case.operator, "error": errors[0], "error_at_run_time": errors[1], "limit": case.limit}
    return row | {"same_bits": same, "apart": apart, "right": errors[0] < case.limit}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path)
    parser.add_argument("--out", type=Path, help="JSON of the results")
    options = parser.parse_args()
    torch.zeros(1, device="cuda")  # a context
    tables, built = LibraryTables(options.library.resolve()), Library(options.library).manifest.triton
    rows = [check(tables, case) for case in CASES]
    found = {"device": torch.cuda.get_device_name(), "triton": built, "triton_at_run_time": triton.__version__}
    text = json.dumps(found | {"operators": rows}, indent=1)
    sys.stdout.write(text + "\n")
    if options.out:
        options.out.write_text(text + "\n")
    same = all(row["same_bits"] for row in rows) or built != triton.__version__
    return 0 if same and all(row["right"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
