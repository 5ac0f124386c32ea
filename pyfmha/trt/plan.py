"""From a problem and the shapes of its tensors to a launch: which addresses, in which order, and every other argument.

This is all that the plugin knows of the kernels' arguments. A kernel that needs workspace says here how much, and
where in it each of its parts begins.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pyfmha.errors import PluginError, SpecError
from pyfmha.forward import Call, strides
from pyfmha.trt.problem import Problem
from pyfmha.trt.shapes import Forms, Shape, measure

ITEM_SIZES = {"fp32": 4, "fp16": 2, "bf16": 2}
_ALIGNMENT = 16  # of each part of the workspace: what the hinted variants ask of a pointer


@dataclass(frozen=True)
class Pointer:
    """Where an address comes from when the launch is queued.

    Attributes:
        source: ``"input"``, ``"output"``, ``"workspace"``, or ``"null"`` for none.
        index: which input or output.
        offset: bytes from there.
    """

    source: str
    index: int = 0
    offset: int = 0


NULL = Pointer("null")


@dataclass(frozen=True)
class Plan:
    """One launch, but for its addresses.

    Attributes:
        pointers: the C function's pointers, which are its first arguments.
        scalars: its other arguments.
        num_inputs, num_outputs: how many addresses TensorRT gives.
        workspace_bytes: how much workspace it needs.
        sizes: what the shape is, for messages.
    """

    pointers: tuple[Pointer, ...]
    scalars: tuple[float, ...]
    num_inputs: int
    num_outputs: int
    workspace_bytes: int
    sizes: str


def plan_of(problem: Problem, forms: Forms, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> Plan:
    """The launch for some shapes.

    Args:
        problem: what the plugin serves.
        forms: of its tensors, by :func:`pyfmha.trt.shapes.forms_of` for the rank of the first input.
        inputs, outputs: their shapes.

    Raises:
        PluginError: the shapes are not those of the forms, or too large.
    """
    found = measure(forms, inputs, outputs)
    if problem.features is None:
        return _first(problem, found["batch"], found["seq"])
    try:
        return _forward(problem, forms, found)
    except SpecError as error:
        raise PluginError(str(error)) from None


# ---------------------------------------------------------------- the first kernel


def statistics_bytes(rows: int) -> int:
    """Bytes from L to M in the workspace, for batch * heads * seq rows: one float32 each, aligned."""
    return -(-rows * 4 // _ALIGNMENT) * _ALIGNMENT


def _first(problem: Problem, batch: int, seq: int) -> Plan:
    rows = batch * problem.num_heads * seq
    offset = statistics_bytes(rows)  # L and M: the kernel's float32 sum and maximum of each row
    statistics = (Pointer("workspace"), Pointer("workspace", offset=offset))
    return Plan(
        pointers=(Pointer("output"), *statistics, *(Pointer("input", index) for index in range(3))),
        scalars=(problem.softmax_scale, batch, problem.num_heads, seq),
        num_inputs=3,
        num_outputs=1,
        workspace_bytes=offset + 4 * rows,
        sizes=f"[{batch}, {seq}] batch and seq",
    )


# ---------------------------------------------------------------- fmha_fwd_*


def _forward(problem: Problem, forms: Forms, found: Mapping[str, int]) -> Plan:
    features = problem.features
    assert features is not None
    rows, columns = (_first_of(found, names) for names in (("Sq", "Q tokens"), ("Skv", "KV tokens")))
    batch = found["batch + 1"] - 1 if features.cu_seqlens else found["batch"]
    kept = 1 if features.cu_seqlens else batch
    left, right = features.window
    if problem.causal:
        right = 0  # a wider window to the right would be cut off there
    call = Call(
        batch_size=batch,
        num_heads=problem.num_heads,
        num_kv_heads=problem.kv_heads,
        q_len=rows,
        kv_len=columns,
        head_size=problem.head_size,
        sm_scale=problem.softmax_scale,
        softcap=features.softcap,
        **_strides(problem, kept, rows, columns),
        window_left=left,
        window_right=right,
        bottom_right=features.bottom_right,
        ragged=features.cu_seqlens,
    )
    return Plan(
        pointers=_forward_pointers(problem, forms),
        scalars=call.scalars(),
        num_inputs=len(forms.inputs),
        num_outputs=len(forms.outputs),
        workspace_bytes=0,
        sizes=f"batch {batch}, Sq {rows}, Skv {columns}" + (" in all" if features.cu_seqlens else ""),
    )


def _first_of(found: Mapping[str, int], names: tuple[str, ...]) -> int:
    """Rows of Q, or of K and V, which a packed tensor names alike."""
    return next(found[name] for name in (*names, "seq", "tokens") if name in found)


def _strides(problem: Problem, batch: int, rows: int, columns: int) -> dict[str, tuple[int, int, int]]:
    """Elements from batch to batch, head to head and row to row of Q, K, V and Out; the ragged forms have one batch."""
    assert problem.features is not None
    layout, size = problem.features.layout, problem.head_size
    if layout == "packed":
        packed = strides("bshd", batch, problem.num_heads + 2 * problem.kv_heads, rows, size)
        return {
            **dict.fromkeys(("q_strides", "k_strides", "v_strides"), packed),
            "out_strides": strides("bshd", batch, problem.num_heads, rows, size),
        }
    of_q = strides(layout, batch, problem.num_heads, rows, size)
    of_kv = strides(layout, batch, problem.kv_heads, columns, size)
    return {"q_strides": of_q, "k_strides": of_kv, "v_strides": of_kv, "out_strides": of_q}


def _forward_pointers(problem: Problem, forms: Forms) -> tuple[Pointer, ...]:
    at = {form.name: Pointer("input", index) for index, form in enumerate(forms.inputs)}
    at |= {form.name: Pointer("output", index) for index, form in enumerate(forms.outputs)}
    if "QKV" in at:
        head = problem.head_size * ITEM_SIZES[problem.dtype]
        at["Q"] = at["QKV"]
        at["K"] = Pointer("input", 0, problem.num_heads * head)
        at["V"] = Pointer("input", 0, (problem.num_heads + problem.kv_heads) * head)
    order = ("Out", "Lse", "Q", "K", "V", "q_lengths", "kv_lengths", "cu_seqlens_q", "cu_seqlens_kv")
    return tuple(at.get(name, NULL) for name in order)
