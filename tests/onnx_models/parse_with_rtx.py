"""Run by test_parser.py, each in a process of its own: NVIDIA's parser reads a model; a creator records its fields.

Usage: python parse_with_rtx.py MODEL NAMESPACE. Prints one JSON line: the fields that each node's creator received, and
what the parser warned of. The creator raises: TensorRT-RTX has no plugin layers, and would abort on a plugin.
"""

import json
import sys
from typing import Any

import tensorrt_rtx as trt

from pyfmha.attention.operator import OPERATOR
from pyfmha.trt.attention.problem import attention_program
from pyfmha.trt.creator import plugin_classes
from pyfmha.trt.fields import _value, attribute_types

TYPES = attribute_types(attention_program())
received: list[dict[str, Any]] = []
warned: list[str] = []


class Logger(trt.ILogger):
    def __init__(self) -> None:
        trt.ILogger.__init__(self)

    def log(self, severity: Any, text: str) -> None:
        if severity in (trt.ILogger.Severity.WARNING, trt.ILogger.Severity.ERROR):
            warned.append(text)


class Recorder(plugin_classes(trt).creator):  # type: ignore[misc]
    def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
        received.append({field.name: _value(trt, field, TYPES[field.name]) for field in fields})
        raise RuntimeError("recorded")


class NoLibrary:
    """The creator keeps it and this test never asks it for a function."""


model, namespace = sys.argv[1:]
creator = Recorder(OPERATOR, NoLibrary(), namespace)
assert trt.get_plugin_registry().register_creator(creator, namespace)
logger = Logger()
builder = trt.Builder(logger)
network = builder.create_network(0)
parser = trt.OnnxParser(network, logger)
done = parser.parse_from_file(model)
errors = [parser.get_error(index).desc() for index in range(parser.num_errors)]
sys.stdout.write(json.dumps({"done": done, "fields": received, "warned": warned, "errors": errors}))
