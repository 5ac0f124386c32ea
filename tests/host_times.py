"""What the host spends on a launch, without a GPU: against the fake driver, whose own time is in it.

    python tests/host_times.py

Builds what it launches (a minute), and prints microseconds of this thread's processor time, the best of many rounds by
turns. They depend on the host and on what else it does, so they are no test; ``trt_gpu.py`` has them on a GPU. On an
AMD EPYC of 2024 with other work beside: 0.8 from C by ctypes, 0.5 and 0.8 through ``Function``, 0.4 prepared, 2.6 for
``enqueue`` where an empty override takes 2.1, and 2.8 for the two launches of decoding. What does not depend on the
host the tests hold: a launch is one function in Python, and asks the driver for nothing but the context.

With PyTorch also what ``pyfmha.torch`` adds to the launch, in CPU memory, which takes its allocator 0.7 a tensor: 0.4
for the launch alone, 2.4 by ``attention``, 2.0 by the drop-in, 2.4 by the operator, and where PyTorch's dispatcher
sees the call 3.6 by that of few arguments and 4.9 by that of all, where ones of as many that do nothing take 1.7 and
2.4; and 45 to 60 for a shape that is new, as each of a decoding loop is.
"""

import os
import tempfile
import time
import timeit
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fake_cuda
from fake_cuda import FakeCuda
from helpers import KERNELS, CLibrary
from trt_double import BUILD, RUNTIME, Tensor
from trt_double.library_calls import LibraryCalls
from trt_double.scene import (
    BINDINGS,
    HEADS,
    SCALE,
    SIZE,
    Scene,
    build_decode_library,
    build_forward_library,
    build_library,
    fields,
    open_binding,
    tensors,
)

from pyfmha.aot import Compiler, build, make_spec
from pyfmha.attention.operator import NAME, OPERATOR
from pyfmha.runtime.library import Library
from pyfmha.spec.arch import parse_archs

X, Y, Z, WORKSPACE, STREAM = 0x7000_0000, 0x7000_1000, 0x7000_2000, 0x7000_4000, 7
LAUNCHES = (
    ("add", "*fp32:16, *fp32:16, *fp32:16, i32:16, 1024"),
    ("many", f"*fp32:16, *fp32:16, {'*fp32, ' * 8}*fp32:16, i32:16, i32, 128"),
)
FIRST = "fmha_d32_fp16"
"""The function that the scene's plugin launches."""
GROUPED = 2
"""Key heads of the plugin that decodes."""


def best_of(calls: dict[str, Callable[[], object]], rounds: int, count: int) -> dict[str, float]:
    """Microseconds of one call each; in turns, so that the host's load is on all alike."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            taken = timeit.timeit(call, number=count, timer=time.thread_time) / count * 1e6
            best[name] = min(best[name], taken)
    return best


def build_small_library(folder: Path) -> Path:
    """Two functions, of 4 arguments and of 13."""
    with Compiler(jobs=1) as compiler:
        specs = [
            make_spec(compiler, KERNELS / "elementwise.py", name, signature, "cdiv(n, BLOCK)")
            for name, signature in LAUNCHES
        ]
    wanted = [variant for spec in specs for variant in (spec, spec.generic())]
    return build(wanted, parse_archs(["sm_90"]), folder, jobs=1).library


def launches(path: Path) -> dict[str, Callable[[], object]]:
    """Of the small library, from C and through :class:`pyfmha.runtime.library.Function`; a context must be current."""
    c, library = CLibrary(path), Library(path)
    add, many = library["add"], library["many"]
    add.load()
    many.load()
    prepared = add.prepare(0, 0, 0, 1024)

    def both_steps() -> None:
        prepared.pack(0, X, Y, Z)
        prepared.launch()

    return {
        "launch from C, by ctypes": lambda: c.c.add(0, X, Y, Z, 1024, 0),
        "Function, 4 arguments": lambda: add(0, X, Y, Z, 1024),
        "Function, 13 arguments": lambda: many(0, *[X] * 11, 1024, 1024),
        "prepared": lambda: prepared(0, X, Y, Z),
        "prepared, in two steps": both_steps,
    }


def enqueues(trt: Any, attention: Path, decode: Path) -> dict[str, Callable[[], object]]:
    """Of the plugin, from C++ through a binding; a context must be current."""
    plain, decoding = Scene(trt, attention), Scene(trt, decode)
    ours, empty = plain.running(), plain.running()
    empty.enqueue = lambda *arguments: None
    plugins = {"enqueue": (plain, ours), "an empty override": (plain, empty)}
    for name, rows in (("enqueue that decodes by two launches", 1), ("enqueue beside it, of one", 100)):
        plugin = decoding.calls.attach(decoding.loaded(decoding.built(num_kv_heads=GROUPED)))
        q, kv = Tensor((2, HEADS, rows, SIZE)), Tensor((2, GROUPED, 600, SIZE))
        assert decoding.calls.on_shape_change(plugin, [q, kv, kv], [q]) == 0
        plugins[name] = decoding, plugin
    return {
        f"{trt.__name__}: {name}": scene.calls.prepared_enqueue(plugin, [X, Y, Z], [X], WORKSPACE, STREAM)
        for name, (scene, plugin) in plugins.items()
    }


def in_c(path: Path) -> dict[str, Callable[[], object]]:
    """Of the plugin in C, through its table, and of what it launches; a context must be current."""
    calls, function = LibraryCalls(path), Library(path)[FIRST]
    built = calls.create(calls.named(NAME), "layer", fields(), BUILD)
    stored = calls.stored_fields(built)
    assert stored is not None
    plugin = calls.attach(calls.create(calls.named(NAME), "layer", stored.read(), RUNTIME))
    assert (calls.set_tactic(plugin, 0), calls.on_shape_change(plugin, tensors()[:3], tensors()[3:])) == (0, 0)
    function.load()
    prepared = function.prepare(X, WORKSPACE, WORKSPACE, X, Y, Z, SCALE, 2, HEADS, 100)
    enqueue = calls.prepared_enqueue(plugin, [X, Y, Z], [X], WORKSPACE, STREAM)
    enqueue.lives_with = calls, plugin  # both end with the last reference to them
    return {
        "in C: enqueue through the table": enqueue,
        "in C: the library's own launch": prepared.launch,
    }


def torch_calls() -> dict[str, Callable[[], object]]:
    """Of ``pyfmha.torch``, while :func:`torch_gpu.torch_gpu` lasts; a context must be current."""
    import torch
    from torch_gpu import DISPATCHED, STREAM, attention_op, empty_op, plain_empty_op, plain_op

    import pyfmha.torch
    from pyfmha.torch import operator

    q, k, v = (torch.zeros(1, HEADS, 64, SIZE).half() for _ in range(3))
    cache = torch.zeros(1, HEADS, 1 << 14, SIZE).half()
    row, lengths = q[:, :, :1], iter(range(2, 1 << 14))
    ends = torch.full((1,), 50, dtype=torch.int32)
    out, _ = attention_op(q, k, v, 0.125)
    ready = next(iter(operator._ready.values()))
    addresses, results = [x.data_ptr() for x in (q, k, v)], [out.data_ptr()]

    def new_shape() -> None:
        keys = cache[:, :, : next(lengths)]
        pyfmha.torch.attention(row, keys, keys.detach())

    return {
        "torch: the launch alone": lambda: ready.enqueue((), (), addresses, results, 0, STREAM),
        "torch: attention": lambda: pyfmha.torch.attention(q, k, v),
        "torch: the drop-in": lambda: pyfmha.torch.scaled_dot_product_attention(q, k, v),
        "torch: the operator": lambda: plain_op(q, k, v, 0.125),
        "torch: the operator, seen by the dispatcher": lambda: DISPATCHED["default"](q, k, v, 0.125),
        "torch: an operator that does nothing": lambda: plain_empty_op(q, k, v, 0.125),
        "torch: the operator of every keyword": lambda: attention_op(q, k, v, 0.125),
        "torch: the operator with lengths": lambda: attention_op(q, k, v, 0.125, kv_lengths=ends),
        "torch: one of as many that does nothing": lambda: empty_op(q, k, v, 0.125),
        "torch: PyTorch's empty_like": lambda: torch.empty_like(q),
        "torch: attention of a new shape": new_shape,
    }


def main(rounds: int = 20, count: int = 500) -> None:
    with tempfile.TemporaryDirectory(prefix="pyfmha-host-times-") as folder:
        root = Path(folder)
        fake = FakeCuda(fake_cuda.build(root / "libcuda.so.1"))
        os.environ["PYFMHA_LIBCUDA"] = str(fake.path)
        small = build_small_library(root / "small")
        attention, decode = build_library(root / "attention"), build_decode_library(root / "decode")
        groups: list[Callable[[], dict[str, Callable[[], object]]]] = [lambda: launches(small)]
        twins = build_library(root / "twins", operators=[OPERATOR])
        groups.append(lambda: in_c(twins))
        for name in BINDINGS[1:]:
            trt, reason = open_binding(name)
            if trt is None:
                print(f"{name} is left out: {reason}")
            else:
                groups.append(lambda trt=trt: enqueues(trt, attention, decode))  # type: ignore[misc]
        for group in groups:
            fake.reset()
            assert fake.c.cuInit(0) == 0
            fake.use_context()
            for name, taken in best_of(group(), rounds, count).items():
                print(f"{taken:7.2f} us  {name}")
        if find_spec("torch") is None:
            print("pyfmha.torch is left out: there is no PyTorch")
            return
        from torch_gpu import torch_gpu

        fake.use_context()
        library = Library(build_forward_library(root / "forward"))
        with torch_gpu(library):
            for name, taken in best_of(torch_calls(), rounds, count).items():
                print(f"{taken:7.2f} us  {name}")


if __name__ == "__main__":
    main()
