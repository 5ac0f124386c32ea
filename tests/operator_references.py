"""The operators of ``kernels/foreign.py`` with inputs, and the same in float64."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """One operator with some attributes and shapes.

    Attributes:
        operator, kernel: their names.
        attributes: those given, float32 but for ``integers``.
        shapes: of the inputs, with their types.
        outputs: shapes and types.
        reference: of the inputs, in float64.
        launch: from inputs, outputs and scratch memory, the kernel's arguments by name.
        constants, grid: of its first algorithm.
        integers: attributes that are INT32.
    """

    operator: str
    kernel: str
    shapes: Sequence[tuple[Shape, Any]]
    outputs: Sequence[tuple[Shape, Any]]
    reference: Callable[..., list[Array]]
    launch: Callable[..., dict[str, Any]]
    constants: dict[str, int]
    grid: Shape
    attributes: dict[str, float] = field(default_factory=dict)
    integers: tuple[str, ...] = ()
    limit: float = 1e-3  # roundings of float16 are 2^-11 each

    def inputs(self) -> list[Array]:
        chance = np.random.default_rng(7)
        made = []
        for shape, kind in self.shapes:
            values = chance.integers(0, 9, shape) if kind is np.int32 else chance.standard_normal(shape)
            made.append(values.astype(kind))
        return made

    def fields(self) -> list[tuple[str, int, type, float]]:
        """Name, ``PluginFieldType``, type and value of each attribute."""
        return [
            (name, *((5, np.int32) if name in self.integers else (1, np.float32)), value)
            for name, value in self.attributes.items()
        ]


def relative_error(got: Array, wanted: Array) -> float:
    return float(np.linalg.norm(got.astype(np.float64) - wanted) / np.linalg.norm(wanted))


def attention(q: Array, k: Array, v: Array) -> list[Array]:
    q, k, v = (array.astype(np.float64) for array in (q, k, v))
    scores = 0.125 * q @ np.swapaxes(k, -1, -2)
    scores = np.where(np.tri(q.shape[2], dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return [weights / weights.sum(-1, keepdims=True) @ v]


def rms_norm(x: Array, w: Array) -> list[Array]:
    rstd = 1 / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + np.float32(1e-3))
    return [x * rstd * (1.0 + w.astype(np.float64)), rstd.reshape(-1)]


def swiglu(gate: Array, up: Array) -> list[Array]:
    x = gate.astype(np.float64)
    return [x / (1 + np.exp(-x)) * up]


def rotary(x: Array, cos: Array, sin: Array, offsets: Array) -> list[Array]:
    x = x.astype(np.float64)
    at = np.arange(x.shape[1])[None] + offsets[:, None]
    inside = (at < len(cos))[..., None, None]
    rows = np.minimum(at, len(cos) - 1)
    turned = [np.where(inside, table[rows][:, :, None], other) for table, other in ((cos, 1), (sin, 0))]
    one, other = x[..., :16], x[..., 16:32]
    return [np.concatenate([one * turned[0] - other * turned[1], one * turned[1] + other * turned[0], x[..., 32:]], -1)]


F16, F32 = np.float16, np.float32
_Q, _X = (2, 3, 77, 64), (2, 37, 5, 64)

CASES = (
    Case(
        "FusedAttention",
        "attention",
        [(_Q, F16)] * 3,
        [(_Q, F16)],
        attention,
        lambda i, o, scratch: {
            **dict(zip("QKV", i, strict=True)), "sm_scale": 0.125, "L": scratch(6 * 77), "M": scratch(6 * 77),
            "Out": o[0], "batch": 2, "heads": 3, "seq": 77,
        },
        {"BLOCK": 64, "SIZE": 64},
        (2, 6, 1),
    ),
    Case(
        "RmsNorm",
        "rms_norm",
        [((3, 5, 700), F16), ((700,), F32)],
        [((3, 5, 700), F16), ((15,), F32)],
        rms_norm,
        lambda i, o, _: {
            "Y": o[0], "Y_row_stride": 700, "X": i[0], "X_row_stride": 700, "W": i[1], "RSTD": o[1], "n_cols": 700,
            "eps": 1e-3, "offset": 1.0,
        },
        {"BLOCK_SIZE": 1024},
        (15, 1, 1),
        {"eps": 1e-3, "offset": 1.0, "tell": 1},
        ("tell",),
    ),
    Case(
        "SwiGlu",
        "swiglu",
        [((33, 96), F16)] * 2,
        [((33, 96), F16)],
        swiglu,
        lambda i, o, _: {"a": i[0], "b": i[1], "c": o[0], "stride": 96},
        {"n_cols": 96, "BLOCK_SIZE": 128},
        (33, 1, 1),
    ),
    Case(
        "Rotary",
        "rotary",
        [(_X, F16), ((40, 16), F32), ((40, 16), F32), ((2,), np.int32)],
        [(_X, F16)],
        rotary,
        lambda i, o, _: {
            "OUT": o[0], **dict(zip(("X", "COS", "SIN", "OFFSETS"), i, strict=True)), "seqlen": 37, "nheads": 5,
            "seqlen_ro": 40, "stride_batch": 37 * 320, "stride_seqlen": 320, "stride_nheads": 64, "stride_headdim": 1,
        },
        {"HEAD_DIM": 64, "ROTARY_DIM": 32, "BLOCK_M": 16},
        (3, 5, 2),
        {"offsets": 1},
        ("offsets",),
    ),
)  # fmt: skip
