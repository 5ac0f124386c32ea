"""ONNX's own tests of its operator Attention."""

import importlib
import warnings
from types import ModuleType
from typing import Any
from unittest import mock


def attention_cases() -> list[Any]:
    """ONNX's test cases of Attention: one node each, and as the nodes of its function (``..._expanded``).

    Only the module that has them is imported. `collect_testcases` imports those of every operator, most of which
    compute as they are imported: five seconds, in each process that collects tests.
    """
    from onnx.backend.test.case.node import collect_testcases

    def attention_alone(package: ModuleType) -> None:
        importlib.import_module(f"{package.__name__}.attention")

    with warnings.catch_warnings(), mock.patch("onnx.backend.test.case.node.import_recursive", attention_alone):
        warnings.simplefilter("ignore")
        return list(collect_testcases("Attention"))
