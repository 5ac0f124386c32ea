"""The program that measures what the host spends: that it launches what it says, once a call."""

from pathlib import Path

import host_times
import plugin_times
import pytest
from fake_cuda import FakeCuda
from trt_double.scene import BINDINGS

from pyfmha.runtime.library import Library

pytest_plugins = ("trt_double.fixtures", "plugin_host.attention")


def test_every_launch_is_one(small_library_path: Path, fake_cuda: FakeCuda) -> None:
    fake_cuda.use_context()
    for name, call in host_times.launches(small_library_path).items():
        before = fake_cuda.launch_count()
        call()
        assert fake_cuda.launch_count() == before + 1, name


@pytest.mark.parametrize("binding", BINDINGS[1:])
def test_enqueues_launch_once_twice_and_not_at_all(
    binding: str, attention_library_path: Path, decode_library_path: Path, fake_cuda: FakeCuda
) -> None:
    trt = pytest.importorskip(binding)
    assert fake_cuda.c.cuInit(0) == 0
    fake_cuda.use_context()
    made = []
    for call in host_times.enqueues(trt, attention_library_path, decode_library_path).values():
        before = fake_cuda.launch_count()
        assert call() == 0
        made.append(fake_cuda.launch_count() - before)
    assert made == [1, 0, 2, 1]


def test_the_plugin_in_c_launches_what_the_library_launches(attention_path: Path, fake_cuda: FakeCuda) -> None:
    fake_cuda.use_context()
    for call in host_times.in_c(attention_path).values():
        assert call() == 0
    through_the_table, alone = fake_cuda.launches()[-2:]
    assert (through_the_table.kernel, through_the_table.grid) == (alone.kernel, alone.grid)


def test_the_program_in_c_times_each_operator_of_a_library(
    attention_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["plugin_times.py", str(attention_path)])
    plugin_times.main()
    told = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in told] == [operator.name for operator in Library(attention_path).operators]
    assert all("ns an enqueue through the table" in line for line in told)


def test_the_calls_of_torch_launch_once_but_for_those_that_compare(
    forward_library: Library, fake_cuda: FakeCuda
) -> None:
    pytest.importorskip("torch")
    from torch_gpu import torch_gpu

    assert fake_cuda.c.cuInit(0) == 0
    fake_cuda.use_context()
    made = {}
    with torch_gpu(forward_library):
        for name, call in host_times.torch_calls().items():
            before = fake_cuda.launch_count()
            call()
            made[name.removeprefix("torch: ")] = fake_cuda.launch_count() - before
    ours = ("the launch alone", "attention", "the drop-in", "the operator", "attention of a new shape")
    ours += ("the operator of every keyword", "the operator with lengths", "the operator, seen by the dispatcher")
    nothing = ("an operator that does nothing", "one of as many that does nothing", "PyTorch's empty_like")
    assert made == {**dict.fromkeys(ours, 1), **dict.fromkeys(nothing, 0)}


def test_the_best_round_counts() -> None:
    turns = {"slow": 0, "fast": 0}

    def call(name: str) -> None:
        turns[name] += 1
        sum(range(20000 if name == "slow" else 10))

    best = host_times.best_of({name: lambda name=name: call(name) for name in turns}, rounds=3, count=2)
    assert turns == {"slow": 6, "fast": 6}
    assert set(best) == {"slow", "fast"}
