"""Fixtures of the plugin's tests; a test module asks for them with ``pytest_plugins``."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from shared import Shared

from pyfmha.runtime.library import Library
from trt_double.scene import (
    BINDINGS,
    Scene,
    build_decode_library,
    build_forward_library,
    build_library,
    open_binding,
)


@pytest.fixture(scope="session")
def attention_library_path(shared: Shared) -> Path:
    """A small attention library for sm_90."""
    return shared.once("attention_library", build_library)


@pytest.fixture
def attention_library(attention_library_path: Path, tmp_path: Path) -> Library:
    """It, in a fresh state: a copy, so that its driver is not open and nothing is loaded."""
    return Library(shutil.copy(attention_library_path, tmp_path / "libfresh.so"))


@pytest.fixture(scope="session")
def forward_library_path(shared: Shared) -> Path:
    """A small library of the first kernel and of stand-ins for ``fmha_fwd_*``, for sm_90."""
    return shared.once("forward_library", build_forward_library)


@pytest.fixture
def forward_library(forward_library_path: Path, tmp_path: Path) -> Library:
    """It, in a fresh state."""
    return Library(shutil.copy(forward_library_path, tmp_path / "libforward.so"))


@pytest.fixture(scope="session")
def decode_library_path(shared: Shared) -> Path:
    """A small library of stand-ins for ``fmha_fwd_*``, ``fmha_split_*`` and ``fmha_combine_*``, for sm_90."""
    return shared.once("decode_library", build_decode_library)


@pytest.fixture
def decode_library(decode_library_path: Path, tmp_path: Path) -> Library:
    """It, in a fresh state."""
    return Library(shutil.copy(decode_library_path, tmp_path / "libdecode.so"))


@pytest.fixture(params=BINDINGS)
def trt(request: pytest.FixtureRequest) -> Any:
    """The double, and each binding that is installed; skipped where it cannot be imported."""
    module, reason = open_binding(request.param)
    if module is None:
        pytest.skip(reason)
    return module


@pytest.fixture
def scene(trt: Any, attention_library: Library) -> Scene:
    """The plugin registered in each binding."""
    return Scene(trt, attention_library)
