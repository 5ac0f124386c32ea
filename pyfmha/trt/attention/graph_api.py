"""TensorRT-LLM's graph API: what this package uses of it, and its asserts and exceptions as errors in words.

Checked with the Python sources of its releases from 0.10 to 1.3.0rc3. Nothing is imported from it until asked.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any

from pyfmha.errors import EngineError, GraphApiError, PyfmhaError
from pyfmha.trt.failures import collect_failures

FIRST_RELEASE, LAST_RELEASE = "0.10", "1.3.0rc20"
INSTALL = f"pip install 'tensorrt-llm>={FIRST_RELEASE},<={LAST_RELEASE}'"

_MODULES = ("_common", "_utils", "functional", "module")


@cache
def graph_api() -> Any:
    """What this module uses of the graph API.

    Raises:
        GraphApiError: TensorRT-LLM is not installed, cannot be imported, or its release has no graph API.
    """
    version = getattr(_imported("tensorrt_llm"), "__version__", "of unknown version")
    common, utils, functional, module = (_imported(f"tensorrt_llm.{name}", version) for name in _MODULES)
    try:
        return SimpleNamespace(
            default_trtnet=common.default_trtnet,
            str_dtype_to_trt=utils.str_dtype_to_trt,
            Tensor=functional.Tensor,
            create_tensor=functional._create_tensor,
            Module=module.Module,
        )
    except AttributeError as error:
        raise _removed(version, error) from None


def _imported(name: str, version: str = "") -> Any:
    """A module of TensorRT-LLM's.

    Raises:
        GraphApiError: it is not there, or something that it needs fails, such as MPI, PyTorch or libcuda.
    """
    try:
        return importlib.import_module(name)
    except Exception as error:  # mpi4py raises RuntimeError, a missing shared library OSError
        missing = error.name if isinstance(error, ImportError) else None
        if missing == "tensorrt_llm":
            raise GraphApiError(f"TensorRT-LLM is not installed ({error}): {INSTALL}") from None
        if missing in [f"tensorrt_llm.{module}" for module in _MODULES]:
            raise _removed(version, error) from None
        raise GraphApiError(
            f"TensorRT-LLM is installed, but its import fails: {type(error).__name__}: {error}. See where it does:"
            f" python -c 'import {name}'"
        ) from None


def _removed(version: str, error: Exception) -> GraphApiError:
    return GraphApiError(
        f"TensorRT-LLM {version} has no graph API ({error}): it was removed after {LAST_RELEASE}. Releases from"
        f" {FIRST_RELEASE} up to that one, on TensorRT 10, have it: {INSTALL}; or use TensorRT itself:"
        " pyfmha.add_attention"
    )


@contextmanager
def told(what: str) -> Iterator[None]:
    """A block of calls into TensorRT-LLM, which asserts and raises where TensorRT says no.

    TensorRT's own reason goes to TensorRT-LLM's logger.

    Args:
        what: could not be done.

    Raises:
        PyfmhaError: in the place of any exception: the plugin's failure where there was one, else an
            :class:`pyfmha.errors.EngineError`.
    """
    with collect_failures() as failures:
        try:
            yield
        except PyfmhaError:
            raise
        except Exception as error:
            if failures:
                raise failures[0].error from None
            words = f"{type(error).__name__}: {error}".removesuffix(": ")
            raise EngineError(f"{what}: TensorRT-LLM: {words}; its log says why") from None
