"""A description for each thing that a description must be able to say, and what plugins must make of it."""

from dataclasses import dataclass, field
from typing import Any

from described import operator, probe
from pyfmha.operators.description import Attribute, Check, Operator, Part, Tensor, Types

Listed = list[tuple[tuple[int, ...], str]]
FLAG = Attribute("int32", 0, choices=(0, 1))


@dataclass(frozen=True)
class Case:
    """One life of a plugin.

    Attributes:
        operator: the description.
        attributes: those given.
        inputs, outputs: shapes and types.
        values: of shape inputs.
        open: what TensorRT is told of the inputs' sizes (None: not known) and what it is told of the outputs'.
        workspace: bytes.
        launches: of each launch its function and some of its arguments; addresses as ``"X"``, ``"X+8"``,
            ``"workspace+256"``.
        tactics: how many.
        wrong: shapes of inputs that are refused when a network is built, with what is said.
    """

    operator: Operator
    inputs: Listed
    outputs: Listed
    launches: list[tuple[str, dict[str, Any]]]
    attributes: dict[str, Any] = field(default_factory=dict)
    values: tuple[tuple[int, ...], ...] = ()
    open: tuple[list[list[int | None]], list[list[int | None]]] | None = None
    workspace: int = 0
    tactics: int = 2
    wrong: tuple[list[list[int | None]], str] | None = None


CASES: dict[str, Case] = {
    "named axes with sizes known or -1": Case(
        operator(
            "Named",
            inputs={"X": "fp32[batch, 4, cols]"},
            outputs={"Y": "fp32[cols, 2, batch]"},
            launches=[probe(a="X", c="Y", i="batch")],
        ),
        [((3, 4, 7), "fp32")],
        [((7, 2, 3), "fp32")],
        [("probe", {"i": 3, "a": "X", "c": "Y"})],
        open=([[None, 4, 7]], [[7, 2, None]]),
        wrong=([[3, 5, 7]], "X has 4 5, the plugin was created for 4"),
    ),
    "sums, products and quotients": Case(
        operator(
            "Computed",
            inputs={"X": "fp32[a, b]", "Z": "fp32[2 * c + 1]", "W": "fp32[a * d]"},
            outputs={"Y": "fp32[a + b, c * d, cdiv(b, 2), b // 3]"},
            launches=[probe(i="c", j="d * 1000 + a - b")],
        ),
        [((6, 7), "fp32"), ((11,), "fp32"), ((24,), "fp32")],
        [((13, 20, 4, 2), "fp32")],
        [("probe", {"i": 5, "j": 3999})],
        open=([[6, None], [11], [24]], [[None, 20, None, None]]),
    ),
    "an axis of more names than a tensor has axes": Case(
        operator(
            "Many",
            inputs={
                "X": "fp32[a, b, c, d, e]",
                "Z": "fp32[f, g, h, i]",
                "W": "fp32[a + b + c + d + e + f + g + h + i + j]",
            },
            outputs={"Y": "fp32[a + b + c + d + e + f + g + h + i + j]"},
            launches=[probe(i="j")],
        ),
        [((1, 2, 3, 4, 5), "fp32"), ((6, 7, 8, 9), "fp32"), ((55,), "fp32")],
        [((55,), "fp32")],
        [("probe", {"i": 10})],
        open=([[1, 2, 3, 4, 5], [6, 7, 8, None], [55]], [[None]]),
    ),
    "axes that lists and attributes tell": Case(
        operator(
            "Told",
            inputs={"X": "fp32[len(sizes), n]", "Size": "shape[len(sizes)]"},
            outputs={"Y": "fp32[Size[0], Size[1], len(sizes) + (1 if given(most) else 0)]"},
            attributes={"sizes": "int32[] = [1, 2]", "most": "int32 = 0"},
            launches=[probe(i="len(sizes)")],
        ),
        [((3, 4), "fp32")],
        [((7, 8, 3), "fp32")],
        [("probe", {"i": 3})],
        attributes={"sizes": (4, 5, 6)},
        values=((7, 8, 9),),
        open=([[3, None]], [[7, 8, 3]]),
    ),
    "equal axes": Case(
        operator(
            "Equal",
            inputs={"X": "fp32[m, k]", "W": "fp32[k, n]"},
            outputs={"Y": "fp32[m, n]"},
            launches=[probe(i="n")],
        ),
        [((2, 3), "fp32"), ((3, 4), "fp32")],
        [((2, 4), "fp32")],
        [("probe", {"i": 4})],
        open=([[2, 3], [None, 4]], [[2, 4]]),
        wrong=([[2, 3], [5, 4]], "W has k 5, X has 3; they must be the same"),
    ),
    "types tied together or not": Case(
        operator(
            "Tied",
            inputs={"X": "T[n]", "W": "T[n]", "B": "U[n]", "K": "H[n]"},
            outputs={"Y": "U[n]", "Z": "H[n]"},
            types={"T": ("fp16", "fp32"), "U": ("bf16", "int64"), "H": Types(("int8", "uint8"), "kind")},
            attributes={"kind": "int32"},
            launches=[probe("probe_{T}", a="X", b="W", j="itemsize(T) * 100 + itemsize(U) * 10 + itemsize(H)")],
        ),
        [((5,), "fp16"), ((5,), "fp16"), ((5,), "int64"), ((5,), "uint8")],
        [((5,), "int64"), ((5,), "uint8")],
        [("probe_fp16", {"a": "X", "b": "W", "j": 281})],
        attributes={"kind": 5},
        tactics=1,
    ),
    "optional inputs and outputs, there": Case(
        operator(
            "Optional2",
            inputs={"X": "fp32[n]", "Mask": "int32[n] when masked", "Bias": "fp32[n] when how == 'both'"},
            outputs={"Y": "fp32[n]", "Sums": "fp32[n, 1] when tell"},
            attributes={"masked": FLAG, "how": Attribute("string", "one", choices=("one", "both")), "tell": FLAG},
            launches=[
                probe(a="X", b="Bias if how == 'both' else null", c="Sums + 4 * n", i="numel(Mask)", j="numel(Sums)")
            ],
        ),
        [((5,), "fp32"), ((5,), "int32"), ((5,), "fp32")],
        [((5,), "fp32"), ((5, 1), "fp32")],
        [("probe", {"a": "X", "b": "Bias", "c": "Sums+20", "i": 5, "j": 5})],
        attributes={"masked": 1, "how": "both", "tell": 1},
        open=([[None], [5], [None]], [[None], [None, 1]]),
    ),
    "optional inputs and outputs, not there": Case(
        operator(
            "Optional3",
            inputs={"X": "fp32[n]", "Mask": "int32[n] when given(seed)"},
            outputs={"Y": "fp32[n]", "Sums": "fp32[n] when given(seed)"},
            attributes={"seed": "int64 = 7"},
            launches=[probe(a="Mask", b="X", c="Sums", i="numel(Mask)", j="seed")],
        ),
        [((5,), "fp32")],
        [((5,), "fp32")],
        [("probe", {"a": "null", "b": "X", "c": "null", "i": 0, "j": 7})],
    ),
    "attributes of every kind": Case(
        operator(
            "Attributed",
            attributes={
                "count": Attribute("int32", 3, minimum=1, maximum=9),
                "wide": Attribute("int64", "count * 1000000000000", minimum=-(1 << 62)),
                "scale": Attribute("fp32", 0.1, minimum=0.1),
                "mode": Attribute("string", "sum", choices=("sum", "mean\u00e9\U0001f600")),
                "steps": Attribute("int32[]", "[1, 2]", minimum=0),
                "far": Attribute("int64[]", "[]"),
                "weights": Attribute("fp32[]", "[0.5]"),
            },
            launches=[
                probe(
                    i="steps[1] + count",
                    j="wide + len(far)",
                    k="7 if mode == 'mean\u00e9\U0001f600' else 9",
                    f="scale",
                    g="weights[len(weights) - 1]",
                )
            ],
        ),
        [((5,), "fp32")],
        [((5,), "fp32")],
        [("probe", {"i": 10, "j": 2_000_000_000_001, "k": 7, "f": 0.1, "g": 3.0})],
        attributes={"count": 2, "mode": "mean\u00e9\U0001f600", "steps": (4, 8), "far": (1 << 60,), "weights": (1, 3)},
    ),
    "axes, attributes and strides as arguments": Case(
        operator(
            "Arguments",
            inputs={"X": "fp32[a, b, c]"},
            outputs={"Y": "fp32[c, a]"},
            attributes={"scale": "fp32"},
            launches=[
                probe(
                    a="X + 4 * b",
                    i="stride(X, 0)",
                    j="a * 100 + size(Y, 0)",
                    k="stride(Y, 1)",
                    f="scale / c",
                    g="numel(X) + stride(X, 1)",
                )
            ],
        ),
        [((2, 3, 4), "fp32")],
        [((4, 2), "fp32")],
        [("probe", {"a": "X+12", "i": 12, "j": 204, "k": 1, "f": 0.5, "g": 28.0})],
        attributes={"scale": 2.0},
    ),
    "shape tensors and INT32 data": Case(
        operator(
            "Shaped",
            inputs={"Size": "shape[2]", "X": "fp32[n]", "Index": "int32[m]"},
            outputs={"Y": "fp32[Size[0], n, Size[1]]"},
            launches=[probe(a="Index", i="Size[0]", j="Size[1] * m")],
        ),
        [((5,), "fp32"), ((3,), "int32")],
        [((8, 5, 9), "fp32")],
        [("probe", {"a": "Index", "i": 8, "j": 27})],
        values=((8, 9),),
        open=([[5], [None]], [[8, 5, 9]]),
    ),
    "launches after one another, by conditions": Case(
        operator(
            "Followed",
            attributes={"fast": FLAG},
            types={"T": ("fp32",)},
            inputs={"X": "T[n]"},
            outputs={"Y": "T[n]"},
            launches=[
                probe(when="n > 4", a="X", c="Sums", i="1"),
                probe(when="fast and n > 2", a="Sums", c="Y", i="2"),
                probe("probe_{T}", when="not fast", a="X", c="Y", i="3"),
                probe(when="n > 5 or fast", a="Y", i="4"),
            ],
            workspace={"Sums": "4 * n"},
        ),
        [((5,), "fp32")],
        [((5,), "fp32")],
        [
            ("probe", {"a": "X", "c": "workspace", "i": 1}),
            ("probe", {"a": "workspace", "c": "Y", "i": 2}),
            ("probe", {"a": "Y", "i": 4}),
        ],
        attributes={"fast": 1},
        workspace=20,
    ),
    "workspace by expression": Case(
        operator(
            "Workspace",
            attributes={"splits": "int32"},
            define={"parts": "max(1, min(splits, n // 2))"},
            workspace=[
                Part("First", "4 * parts * n"),
                Part("Second", "1000000", "splits > 100"),
                Part("Third", "cdiv(n, 4)"),
            ],
            launches=[probe(a="First", b="Second", c="Third + 1", i="parts")],
            alignment=64,
        ),
        [((9,), "fp32")],
        [((9,), "fp32")],
        [("probe", {"a": "workspace", "b": "null", "c": "workspace+193", "i": 4})],
        attributes={"splits": 5},
        workspace=192 + 3,
    ),
    "workspace of no bytes": Case(
        operator(
            "Roomy",
            attributes={"bytes": "int64 = 0", "by": "int32 = 1"},
            workspace={"Room": "bytes * n", "Last": "n // by"},
            launches=[probe(a="X", b="Room", c="Room + 8 if bytes > 0 else Y", i="n")],
        ),
        [((9,), "fp32")],
        [((9,), "fp32")],
        [("probe", {"a": "X", "b": "workspace", "c": "Y", "i": 9})],
        workspace=9,
    ),
    "sizes that are all known": Case(
        operator(
            "Known",
            inputs={"X": "fp32[64, 2]"},
            outputs={"Y": "fp32[128]"},
            launches=[probe(a="X", c="Y", i="numel(X)")],
        ),
        [((64, 2), "fp32")],
        [((128,), "fp32")],
        [("probe", {"a": "X", "c": "Y", "i": 128})],
        open=([[None, 2]], [[128]]),
        wrong=([[64, 3]], "X has 2 3, the plugin was created for 2"),
    ),
    "alternative forms": Case(
        operator(
            "Forms",
            inputs=[Tensor("X", ("fp32[rows, cols]", "fp32[batch, rows, cols]"))],
            outputs=[Tensor("Y", ("fp32[rows, cols] if flat", "fp32[cols, rows] if not flat"))],
            attributes={"flat": FLAG},
            checks=[Check("batch < 5", "{batch} batches")],
            launches=[probe(i="batch", j="rows")],
        ),
        [((2, 3, 4), "fp32")],
        [((4, 3), "fp32")],
        [("probe", {"i": 2, "j": 3})],
    ),
    "eight dimensions, and none": Case(
        operator(
            "Dimensions",
            inputs={"X": "fp32[a, b, c, d, e, f, g, h]", "Scalar": "fp32[]"},
            outputs={"Y": "fp32[h, g, f, e, d, c, b, a]", "Z": "fp32[]"},
            launches=[probe(i="stride(X, 0)", j="numel(Scalar) + size(Y, 7)")],
        ),
        [((1, 2, 1, 3, 1, 1, 2, 5), "fp32"), ((), "fp32")],
        [((5, 2, 1, 1, 3, 1, 2, 1), "fp32"), ((), "fp32")],
        [("probe", {"i": 60, "j": 2})],
    ),
}
"""By what they say, in the words of those who asked for it."""


def largest() -> Operator:
    """As much of everything as the tables have room for."""
    axes = [f"x{number}" for number in range(8)]
    first = f"fp32[{', '.join(axes)}]"
    inputs = {f"X{number}": first if number == 0 else "fp32[x0, 2 * y + 1]" for number in range(19)}
    long = "l" * 64
    attributes: dict[str, Any] = {f"p{number}": f"int32 = {number}" for number in range(69)}
    attributes[long] = Attribute("int32[]", str(list(range(64))))
    define = {f"d{number}": f"d{number - 1} + p{number % 69}" if number else "y" for number in range(80)}
    return Operator(
        "L" * 64,
        inputs,
        {f"Y{number}": "fp32[x7, y]" for number in range(13)},
        [probe(a=f"X{n}", b=f"W{n}", c=f"Y{n % 13}", i=f"p{n}", j="d79", k=f"{long}[{n}]") for n in range(16)],
        attributes=attributes,
        define=define,
        workspace={f"W{number}": f"{number} + y" for number in range(16)},
        namespace="n" * 64,
        version="1" * 64,
    )
