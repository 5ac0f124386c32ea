"""One library for all descriptions of a run, asked for with ``pytest_plugins``."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_cuda import FakeCuda
from shared import Shared
from trt_double.twins import Pair

from described import build_described
from described.absent import OPERATORS as ABSENT
from described.cases import CASES, largest
from described.random_operators import RANDOM, random_operator
from pyfmha.runtime.library import Library


@pytest.fixture(scope="session")
def described_path(shared: Shared) -> Path:
    """The descriptions of ``cases``, of ``absent``, and some at random."""

    def make(folder: Path) -> Path:
        made = [random_operator(random.Random(name), name) for name in RANDOM]
        return build_described([*(case.operator for case in CASES.values()), *ABSENT, largest(), *made], folder)

    return shared.once("described", make)


@pytest.fixture
def pair_of(described_path: Path, tmp_path: Path, fake_cuda: FakeCuda) -> Callable[[str], Pair]:
    """Both plugins of an operator by its name, with a context."""
    assert fake_cuda.c.cuInit(0) == 0
    fake_cuda.use_context()
    path = Path(shutil.copy(described_path, tmp_path / "libpyfmha.so"))
    operators = {operator.name: operator for operator in Library(path).operators}
    return lambda name: Pair(path, fake_cuda, operators[name])
