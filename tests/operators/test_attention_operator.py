"""Attention's description against what the kernels' own modules say: shapes, strides, workspace, when to split."""

from dataclasses import asdict, dataclass
from typing import Any

from helpers import examples
from hypothesis import given
from hypothesis import strategies as st

from pyfmha.attention.decode import ALIGNMENT, Decode, Figures, decoding_for, most_workspace_bytes
from pyfmha.attention.first import HEAD_SIZES
from pyfmha.attention.forward import Call, Forward, strides
from pyfmha.attention.hopper import DECODE_KERNEL
from pyfmha.attention.operator import OPERATOR
from pyfmha.operators.instance import Instance
from pyfmha.operators.plan import TYPICAL_ADDRESS, Plan, Pointer
from pyfmha.operators.program import program_of

PROGRAM = program_of(OPERATOR)
DTYPES = {0: "fp32", 1: "fp16", 7: "bf16"}
NULL = Pointer("null")


@dataclass(frozen=True)
class Case:
    """One plugin of attention and the sizes it is given, with what must follow.

    Attributes:
        values: the attributes that are given.
        batch, rows, columns: sequences, queries and keys; of a ragged batch all of them.
    """

    values: dict[str, Any]
    batch: int
    rows: int
    columns: int
    packed_heads_apart: bool

    def of(self, name: str, default: Any = 0) -> Any:
        return self.values.get(name, default)

    @property
    def kv_heads(self) -> int:
        return int(self.of("num_kv_heads", self.of("num_heads")))

    @property
    def newer(self) -> bool:
        earlier = {"num_heads", "head_size", "type_id", "softmax_scale", "causal"}
        return bool(set(self.values) - earlier) or self.of("causal", 1) == 2 or self.of("head_size") not in HEAD_SIZES

    @property
    def ragged(self) -> bool:
        return bool(self.of("cu_seqlens"))

    @property
    def layout(self) -> str:
        return str(self.of("layout", "bshd" if self.ragged else "bhsd"))

    @property
    def packed(self) -> bool:
        return self.layout == "packed"

    def tensor(self, heads: int, seq: int) -> tuple[int, ...]:
        size = self.of("head_size")
        if self.ragged:
            return (seq, heads, size)
        return (self.batch, heads, seq, size) if self.layout == "bhsd" else (self.batch, seq, heads, size)

    def shapes(self) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
        heads, size = self.of("num_heads"), self.of("head_size")
        if self.packed:
            front = (self.rows,) if self.ragged else (self.batch, self.rows)
            inputs = [
                (*front, 3, heads, size) if self.packed_heads_apart else (*front, heads + 2 * self.kv_heads, size)
            ]
        else:
            inputs = [self.tensor(heads, self.rows), *[self.tensor(self.kv_heads, self.columns)] * 2]
        inputs += [(self.batch,)] * (bool(self.of("q_lengths")) + bool(self.of("kv_lengths")))
        inputs += [(self.batch + 1,)] * 2 * self.ragged
        lse = (heads, self.rows) if self.ragged else (self.batch, heads, self.rows)
        return inputs, [self.tensor(heads, self.rows)] + [lse] * bool(self.of("return_lse"))

    def call(self) -> Call:
        heads, size = self.of("num_heads"), self.of("head_size")
        layout = "bhsd" if self.layout == "bhsd" else "bshd"
        together = heads + 2 * self.kv_heads
        q, k = (together, together) if self.packed else (heads, self.kv_heads)
        k_strides = strides(layout, self.batch, k, self.columns, size)
        causal = self.of("causal", 1)
        return Call(
            *(self.batch, heads, self.kv_heads, self.rows, self.columns, size, self.of("softmax_scale")),
            softcap=self.of("softcap", 0.0),
            q_strides=strides(layout, self.batch, q, self.rows, size),
            k_strides=k_strides,
            v_strides=k_strides,
            out_strides=strides(layout, self.batch, heads, self.rows, size),
            window_left=self.of("window_left", -1),
            window_right=0 if causal else self.of("window_right", -1),
            bottom_right=bool(self.of("bottom_right", int(causal == 2))),
            ragged=self.ragged,
        )

    def pointers(self, parts: tuple[Pointer, Pointer] | None) -> tuple[Pointer, ...]:
        """Out, Lse, Q, K, V, both lengths and both cumulative lengths, or what lies in their place."""
        item = {"fp32": 4, "fp16": 2, "bf16": 2}[DTYPES[self.of("type_id")]]
        head = self.of("head_size") * item
        if self.packed:
            heads = (0, self.of("num_heads"), self.of("num_heads") + self.kv_heads)
            qkv = [Pointer("input", 0, number * head) for number in heads]
        else:
            qkv = [Pointer("input", index) for index in range(3)]
        at = 1 if self.packed else 3
        lengths = []
        for name in ("q_lengths", "kv_lengths"):
            lengths.append(Pointer("input", at) if self.of(name) else NULL)
            at += bool(self.of(name))
        last = parts or ((Pointer("input", at), Pointer("input", at + 1)) if self.ragged else (NULL, NULL))
        lse = Pointer("output", 1) if self.of("return_lse") else NULL
        return (Pointer("output", 0), lse, *qkv, *lengths, *last)


DEVICES = (Figures(132, 2619000, 5120), Figures(132, 3201000, 6144), Figures(78, 2619000, 6144), Figures(132, 0, 0))
SIZES = st.sampled_from([0, 1, 2, 3, 7, 16, 64, 65, 511, 512, 513, 700, 4096, 100_000])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kv_heads = draw(st.sampled_from([1, 2, 4, 8]))
    values: dict[str, Any] = {
        "num_heads": kv_heads * draw(st.sampled_from([1, 1, 2, 8, 64, 65])),
        "head_size": draw(st.sampled_from([1, 32, 64, 80, 96, 128, 256])),
        "type_id": draw(st.sampled_from(sorted(DTYPES))),
        "softmax_scale": draw(st.sampled_from([0.125, -2.0])),
    }
    optional: dict[str, Any] = {
        "causal": [0, 1, 2],
        "layout": ["bhsd", "bshd", "packed"],
        "window_left": [-1, 0, 5],
        "window_right": [-1, 0, 5],
        "softcap": [0.0, 50.0],
        "return_lse": [0, 1],
        "q_lengths": [0, 1],
        "kv_lengths": [0, 1],
        "cu_seqlens": [0, 1],
    }
    for name, choices in optional.items():
        if draw(st.integers(0, 2)) == 0:
            values[name] = draw(st.sampled_from(choices))
    if values.get("causal") != 2 and draw(st.booleans()):
        values["bottom_right"] = draw(st.sampled_from([0, 1]))
    if kv_heads != values["num_heads"] or draw(st.booleans()):
        values["num_kv_heads"] = kv_heads
    if values.get("cu_seqlens"):
        values |= {name: 0 for name in ("q_lengths", "kv_lengths") if name in values}
        values |= {"layout": "bshd"} if values.get("layout") == "bhsd" else {}
    rows, columns = draw(SIZES), draw(SIZES)
    case = Case(values, draw(st.sampled_from([0, 1, 2, 3, 5, 40])), rows, columns, False)
    if case.packed or not case.newer:
        case = Case(values, case.batch, rows, rows, case.kv_heads == values["num_heads"] and draw(st.booleans()))
    return case


@examples(300)
@given(case=cases(), has=st.booleans(), clusters=st.booleans(), device=st.sampled_from(DEVICES))
def test_a_plan_is_what_the_kernels_ask_for(case: Case, has: bool, clusters: bool, device: Figures) -> None:
    instance = Instance(PROGRAM, case.values).with_options({"decode": has})
    inputs, outputs = case.shapes()
    forms = instance.forms([len(shape) for shape in inputs])
    assert [len(form.axes) for form in forms.all] == [len(shape) for shape in (*inputs, *outputs)]
    assert [form.type for form in forms.inputs if form.variable == "T"] == [DTYPES[case.of("type_id")]] * (
        1 if case.packed else 3
    )
    asked: list[Any] = []

    def serves(*question: Any) -> bool:
        asked.append(question)
        return clusters

    figures = asdict(device)
    plan = instance.plan(instance.measure(inputs, outputs, serves=serves, device=figures.__getitem__))
    assert (plan.num_inputs, plan.num_outputs) == (len(inputs), len(outputs))
    if case.newer:
        check_newer(case, plan, has and not case.packed, device if clusters else None)
    else:
        check_first(case, plan)
    for function, kernel, arguments in asked:
        assert (function, kernel) == (forward_of(case), DECODE_KERNEL)
        values = [0 if p == NULL else TYPICAL_ADDRESS + p.offset for p in case.pointers(None)]
        assert arguments == [*values, *case.call().scalars()]


def forward_of(case: Case) -> str:
    return Forward(DTYPES[case.of("type_id")], Forward("fp16", case.of("head_size")).padded).name


def check_newer(case: Case, plan: Plan, has: bool, device: Figures | None) -> None:
    call = case.call()
    decoding = decoding_for(call, in_one=device) if has else None
    if decoding is None:
        (step,) = plan.steps
        assert step.function == forward_of(case)
        assert step.tuned
        assert step.arguments == (*case.pointers(None), *call.scalars())
        assert plan.workspace_bytes == 0
        return
    pair = Decode(DTYPES[case.of("type_id")], decoding.padded)
    behind = -(-decoding.partial_bytes // ALIGNMENT) * ALIGNMENT
    parts = (Pointer("workspace", 0, 0), Pointer("workspace", 0, behind))
    assert [step.function for step in plan.steps] == [pair.split_name, pair.combine_name]
    assert [step.tuned for step in plan.steps] == [False, False]
    for step in plan.steps:
        assert step.arguments == (*case.pointers(parts), *decoding.scalars())
    assert plan.workspace_bytes == behind + decoding.statistics_bytes


def check_first(case: Case, plan: Plan) -> None:
    heads, size = case.of("num_heads"), case.of("head_size")
    (step,) = plan.steps
    full = "" if case.of("causal", 1) else "_full"
    assert step.function == f"fmha_d{size}_{DTYPES[case.of('type_id')]}{full}"
    per_row = 4 * case.batch * heads * case.rows
    second = -(-per_row // ALIGNMENT) * ALIGNMENT
    assert step.arguments == (
        Pointer("output", 0),
        *(Pointer("workspace", 0, 0), Pointer("workspace", 0, second)),
        *(Pointer("input", index) for index in range(3)),
        *(case.of("softmax_scale"), case.batch, heads, case.rows),
    )
    assert plan.workspace_bytes == second + per_row


@examples(300)
@given(case=cases(), least=SIZES, smaller=st.tuples(*[st.integers(0, 100)] * 3))
def test_the_workspace_of_a_profile_suffices(case: Case, least: int, smaller: tuple[int, int, int]) -> None:
    """Of every shape below the largest; and it is the bound that the kernels' own module gives, where one decodes."""
    if not case.newer or case.packed or case.ragged:
        return
    instance = Instance(PROGRAM, case.values)
    if not list(instance.options_wanted()):
        assert case.of("num_heads") // case.kv_heads > 64
        return
    instance = instance.with_options({"decode": True})
    least = min(least, case.rows)
    scope = instance.measure(*case.shapes(), least={"Sq": least})
    found = instance.profile_bytes(scope)
    group = case.of("num_heads") // case.kv_heads
    rows = min(case.rows, 64 // group)
    if max(least, 1) > rows or case.columns < 512 or not case.batch:
        assert found == 0
    else:
        assert found == most_workspace_bytes(case.batch, case.of("num_heads"), rows, case.of("head_size"))
    batch, rows, columns = (
        min(largest, int(largest * part / 100) if part < 90 else largest)
        for largest, part in zip((case.batch, case.rows, case.columns), smaller, strict=True)
    )
    one = Case(case.values, batch, max(rows, least), columns, False)
    assert instance.plan(instance.measure(*one.shapes())).workspace_bytes <= found
