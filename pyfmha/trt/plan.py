"""From a problem and the shapes of its tensors to a launch: which addresses, in which order, and every other argument.

This is all that the plugin knows of the kernels' arguments. A kernel that needs workspace says here how much, and
where in it each of its parts begins. Where few queries see many keys there are two launches of the same arguments: the
pair of :mod:`pyfmha.attention.decode` in the place of ``fmha_fwd_*``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pyfmha.attention.decode import ALIGNMENT, LEAST_KEYS, MOST_QUERIES, Decode, decoding_for, most_workspace_bytes
from pyfmha.attention.forward import Call, strides
from pyfmha.errors import PluginError, SpecError
from pyfmha.spec.abi import ELEMENT_SIZES
from pyfmha.trt.problem import Problem
from pyfmha.trt.shapes import Forms, Shape, measure


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

InOne = Callable[[Sequence[float]], bool]
"""Whether ``fmha_fwd_*`` decodes in one launch with these values of its arguments, on the device at hand."""

_TYPICAL = 1 << 40  # an address: a multiple of 256, as TensorRT's are


@dataclass(frozen=True)
class Plan:
    """One launch, or the two of decoding, but for the addresses.

    Attributes:
        pointers: the C function's pointers, which are its first arguments.
        scalars: its other arguments.
        num_inputs, num_outputs: how many addresses TensorRT gives.
        workspace_bytes: how much workspace it needs.
        sizes: what the shape is, for messages.
        split: whether it is the two of decoding, see :func:`pair_of`.
    """

    pointers: tuple[Pointer, ...]
    scalars: tuple[float, ...]
    num_inputs: int
    num_outputs: int
    workspace_bytes: int
    sizes: str
    split: bool = False


def plan_of(
    problem: Problem,
    forms: Forms,
    inputs: Sequence[Shape],
    outputs: Sequence[Shape],
    *,
    may_split: bool = False,
    in_one: InOne = lambda values: False,
) -> Plan:
    """The launch for some shapes.

    Args:
        problem: what the plugin serves.
        forms: of its tensors, by :func:`pyfmha.trt.shapes.forms_of` for the rank of the first input.
        inputs, outputs: their shapes.
        may_split: whether the pair of :func:`pair_of` is there, and room for what it writes.
        in_one: what need not be split.

    Raises:
        PluginError: the shapes are not those of the forms, or too large.
    """
    found = measure(forms, inputs, outputs)
    if problem.features is None:
        return _first(problem, found["batch"], found["seq"])
    try:
        return _forward(problem, forms, found, may_split, in_one)
    except SpecError as error:
        raise PluginError(str(error)) from None


# ---------------------------------------------------------------- the first kernel


def statistics_bytes(rows: int) -> int:
    """Bytes from L to M in the workspace, for batch * heads * seq rows: one float32 each, aligned."""
    return -(-rows * 4 // ALIGNMENT) * ALIGNMENT


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


def _forward(problem: Problem, forms: Forms, found: Mapping[str, int], may_split: bool, in_one: InOne) -> Plan:
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
    pointers = _forward_pointers(problem, forms)
    sizes = f"batch {batch}, Sq {rows}, Skv {columns}" + (" in all" if features.cu_seqlens else "")
    counts = len(forms.inputs), len(forms.outputs)
    decoding = decoding_for(call) if may_split else None
    if decoding is not None:
        addresses = [0 if pointer == NULL else _TYPICAL + pointer.offset for pointer in pointers]
        decoding = decoding_for(call, in_one=in_one([*addresses, *call.scalars()]))
    if decoding is None:
        return Plan(pointers, call.scalars(), *counts, workspace_bytes=0, sizes=sizes)
    statistics = -(-decoding.partial_bytes // ALIGNMENT) * ALIGNMENT
    return Plan(
        (*pointers[:-2], Pointer("workspace"), Pointer("workspace", offset=statistics)),
        decoding.scalars(),
        *counts,
        workspace_bytes=statistics + decoding.statistics_bytes,
        sizes=f"{sizes} in {decoding.splits} parts",
        split=True,
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
        head = problem.head_size * ELEMENT_SIZES[problem.dtype]
        at["Q"] = at["QKV"]
        at["K"] = Pointer("input", 0, problem.num_heads * head)
        at["V"] = Pointer("input", 0, (problem.num_heads + problem.kv_heads) * head)
    order = ("Out", "Lse", "Q", "K", "V", "q_lengths", "kv_lengths", "cu_seqlens_q", "cu_seqlens_kv")
    return tuple(at.get(name, NULL) for name in order)


# ---------------------------------------------------------------- fmha_split_*, fmha_combine_*


def pair_of(problem: Problem) -> Decode | None:
    """The functions of decoding for a problem; None where no shape that it can have is decoded.

    A ragged batch is not, nor are queries that are as many as the keys, as those of a packed tensor.
    """
    features = problem.features
    if features is None or features.cu_seqlens or features.layout == "packed" or _most_rows(problem) < 1:
        return None
    return Decode(problem.dtype, problem.head_size)


def split_workspace_bytes(
    problem: Problem, forms: Forms, smallest: Sequence[Shape], largest: Sequence[Shape], num_inputs: int
) -> int:
    """Bytes of workspace that suffice for every shape between two, where :func:`pair_of` answers; 0 if none is split.

    It is not what the largest shape needs: fewer queries than the most are split where the most are not, and into more
    parts.

    Args:
        problem: what the plugin serves.
        forms: of its tensors.
        smallest: the lower bounds of all tensors' sizes; one that is not known is -1.
        largest: the upper bounds.
        num_inputs: how many of the tensors are inputs.

    Raises:
        PluginError: the largest are not those of the forms.
    """
    found = measure(forms, largest[:num_inputs], largest[num_inputs:])
    names = [name for name, _ in forms.inputs[0].axes]
    fewest = max(smallest[0][names.index("Sq")], 1) if len(smallest[0]) == len(names) else 1
    most = min(found["Sq"], _most_rows(problem))
    if fewest > most or found["Skv"] < LEAST_KEYS or not found["batch"]:
        return 0
    return most_workspace_bytes(found["batch"], problem.num_heads, most, problem.head_size)


def _most_rows(problem: Problem) -> int:
    """Up to how many queries a sequence is decoded: all of those that share a key head count."""
    return MOST_QUERIES // (problem.num_heads // problem.kv_heads)
