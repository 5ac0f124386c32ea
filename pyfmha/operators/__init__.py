"""A plugin described as data, and carried out: what the plugin in Python does, and what ``aot`` makes the one in C do.

Needs the standard library only.
"""

from pyfmha.operators.description import Attribute, Check, Config, Launch, Operator, Option, Part, Tensor, Types

__all__ = ["Attribute", "Check", "Config", "Launch", "Operator", "Option", "Part", "Tensor", "Types"]
