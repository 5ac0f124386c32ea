"""Operators whose tensors, types and axes are there for some attributes only, and numbers that float32 rounds."""

from described import probe
from pyfmha.operators.description import Attribute, Operator, Tensor

_ADD = probe("probe_{T}", i="numel(Y)", j="size(Y, 1)", k="itemsize(U)")
_T = ("fp16", "fp32")

OPTIONAL = Operator(
    "Optional",
    {"X": "T[rows, cols]", "Bias": "U[cols] when biased"},
    {"Y": "T[rows, cols]"},
    [probe(a="X", b="Bias", c="Y", i="numel(Y)", k="itemsize(U)")],
    types={"T": _T, "U": ("fp32", "bf16")},
    attributes={"biased": Attribute("int32", 0, choices=(0, 1))},
)

# Nobody tries 12 while these are read: what is not told then, the plugin finds.
_LEVEL = {"level": Attribute("int32", 0, minimum=0, maximum=20)}

UNTOLD_TYPE = Operator(
    "UntoldType",
    {"X": "T[rows, cols]", "Bias": "U[cols] when level * level != 144"},
    {"Y": "U[rows, cols]"},
    [_ADD],
    types={"T": _T, "U": ("fp32", "bf16")},
    attributes=_LEVEL,
)

UNTOLD_AXIS = Operator(
    "UntoldAxis",
    {"X": "T[rows]", "Bias": "T[cols] when level * level != 144"},
    {"Y": "T[rows, cols]"},
    [probe("probe_{T}", a="X", b="Bias", c="Y", i="numel(Y)", j="size(Y, 1)")],
    types={"T": _T},
    attributes=_LEVEL,
)

# Two at 13.
TWICE = Operator(
    "Twice",
    {"X": "fp32[n]"},
    [Tensor("Y", "fp32[n]", "level >= 0"), Tensor("Y", "fp32[n, 1]", "level * level == 169")],
    [probe(i="numel(Y)")],
    attributes=_LEVEL,
)

ROUNDED = Operator(
    "Rounded",
    {"X": "fp32[n]"},
    {"Y": "fp32[n]"},
    [probe(a="X", c="Y", i="n", f="one", g="product * 3 + weights[0] * far")],
    attributes={
        "one": Attribute("fp32", 0.1, choices=(0.1, 0.3)),
        "other": Attribute("fp32", 0.7, minimum=0.1, maximum=0.7),
        "factor": Attribute("int32", 3, minimum=0, maximum=400_000_000),
        "product": "int32 = 7 * factor",
        "weights": Attribute("fp32[]", "[0.1, 0.2]", minimum=0.1),
    },
    define={"far": "other * 10000000.0"},
)

OPERATORS = (OPTIONAL, UNTOLD_TYPE, UNTOLD_AXIS, TWICE, ROUNDED)
