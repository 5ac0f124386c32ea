"""Attention as an operator: all that the plugin is, as data.

Two kernels stand behind the plugin. The first serves Q, K, V and Out of one shape; the other, ``fmha_fwd_*``, serves
everything else. Which of the two it is follows from the attributes alone: the earlier five name the first, any newer
one, even at its default, names the other; so do ``causal`` = 2 and a head size that the first lacks. Where few queries
see many keys, the pair of :mod:`pyfmha.attention.decode` runs in the place of ``fmha_fwd_*``. With a bias, a mask,
sinks or values of another head size it is ``fmha_biased_*``, see :mod:`pyfmha.attention.biased_operator`; with Q, K
and V in FP8 ``fmha_fp8_*``, see :mod:`pyfmha.attention.fp8_operator`.
"""

from pyfmha.attention import biased_decode, biased_operator, forward, fp8_operator
from pyfmha.attention.decode import ALIGNMENT, ARGUMENTS, LEAST_KEYS, WORKSPACE_RULE
from pyfmha.attention.decode_operator import BIASED_DECODE, DECODE, DECODING, padded
from pyfmha.attention.first import DTYPES, HEAD_SIZES
from pyfmha.operators.description import Attribute, Check, Launch, Operator, Option, Part, Tensor, Types

NAME = "TritonFlashAttention"
VERSION = "1"

LAYOUTS = ("bhsd", "bshd", "packed")
"""Q, K, V as [batch, heads, seq, head size] or [batch, seq, heads, head size], or in one tensor: [batch, seq,
3, heads, head size] or [batch, seq, heads + 2 * kv heads, head size]. With cu_seqlens batch and seq are one axis."""

NEWER = (
    *("num_kv_heads", "layout", "bottom_right", "window_left", "window_right", "softcap", "return_lse"),
    *("q_lengths", "kv_lengths", "cu_seqlens"),
)
"""The attributes that the first kernel does not have; one of them is enough for the kernel that has them."""

_FLAGS = ("bottom_right", "return_lse", "q_lengths", "kv_lengths", "cu_seqlens")
_INT32_MAX = (1 << 31) - 1
_SMALLEST = 2.0**-126  # the smallest normal float32
_FLOAT_MAX = 3.4028234663852886e38


def _newer(kind: str, default: int | float | str) -> Attribute:
    return Attribute(kind, default, stored="features")


_ATTRIBUTES = {
    "num_heads": Attribute("int32"),
    "head_size": Attribute("int32"),
    "type_id": Attribute("int32"),
    "softmax_scale": Attribute("fp32"),
    "causal": Attribute("int32", 1, stores="min(causal, 1)"),
    "num_kv_heads": _newer("int32", "num_heads"),
    "layout": _newer("string", "='bshd' if cu_seqlens else 'bhsd'"),
    "bottom_right": _newer("int32", "1 if causal == 2 else 0"),
    "window_left": _newer("int32", -1),
    "window_right": _newer("int32", -1),
    "softcap": _newer("fp32", 0.0),
    "return_lse": _newer("int32", 0),
    "q_lengths": _newer("int32", 0),
    "kv_lengths": _newer("int32", 0),
    "cu_seqlens": _newer("int32", 0),
    **biased_operator.ATTRIBUTES,
    **fp8_operator.ATTRIBUTES,
}


def _one_of(sizes: tuple[int, ...]) -> str:
    return " or ".join(f"head_size == {size}" for size in sizes)


def _stride_names(tensor: str) -> tuple[str, str, str]:
    return (f"{tensor}_stride_b", f"{tensor}_stride_h", f"{tensor}_stride_s")


def _length(tokens: str, seq: str) -> str:
    """How long queries or keys are, where tensors of their own have these axes."""
    in_one = "tokens if in_one and cu_seqlens else seq if in_one"
    return f"(seq if not features else {in_one} else {tokens} if cu_seqlens else {seq})"


_DEFINE = {
    "biased": biased_operator.BIASED,
    "eight": fp8_operator.FP8,
    "features": " or ".join(f"given({name})" for name in NEWER)
    + f" or causal == 2 or not ({_one_of(HEAD_SIZES)}) or biased or eight",
    "in_one": "layout == 'packed'",
    "right": "0 if causal else window_right",  # a wider window to the right would be cut off there
    "widest": "max(head_size, v_head_size)",
    "padded": padded(forward.HEAD_SIZES),
    # ------------------------------------------------------------ by sizes
    "rows": _length("Q_tokens", "Sq"),
    "columns": _length("KV_tokens", "Skv"),
    "q_heads": "num_heads + 2 * num_kv_heads if in_one else num_heads",
    "k_heads": "num_heads + 2 * num_kv_heads if in_one else num_kv_heads",
    "q_stride_b": "q_heads * rows * head_size",
    "q_stride_h": "rows * head_size if layout == 'bhsd' else head_size",
    "q_stride_s": "head_size if layout == 'bhsd' else q_heads * head_size",
    "k_stride_b": "k_heads * columns * head_size",
    "k_stride_h": "columns * head_size if layout == 'bhsd' else head_size",
    "k_stride_s": "head_size if layout == 'bhsd' else k_heads * head_size",
    "v_stride_b": "k_heads * columns * v_head_size",
    "v_stride_h": "columns * v_head_size if layout == 'bhsd' else v_head_size",
    "v_stride_s": "v_head_size if layout == 'bhsd' else k_heads * v_head_size",
    "out_stride_b": "num_heads * rows * v_head_size",
    "out_stride_h": "rows * v_head_size if layout == 'bhsd' else v_head_size",
    "out_stride_s": "v_head_size if layout == 'bhsd' else num_heads * v_head_size",
    **biased_operator.strides(),
    **fp8_operator.strides(),
    **DECODING,
}


def _checks() -> tuple[Check, ...]:
    lengths = "cu_seqlens and (q_lengths or kv_lengths)"
    return (
        Check(
            "causal == 0 or causal == 1 or causal == 2",
            "causal is {causal}; allowed are 1 (a query sees no later key), 2 (so, aligned to the last query and key)"
            " and 0 (it sees all)",
        ),
        *(Check(f"{name} == 0 or {name} == 1", f"{name} is {{{name}}}; allowed are 0 and 1") for name in _FLAGS),
        Check(
            "causal != 2 or bottom_right != 0",
            "causal is 2, which is aligned bottom right, and bottom_right is 0; leave one of them out",
        ),
        Check(
            " or ".join(f"layout == '{layout}'" for layout in LAYOUTS),
            f"layout is {{layout:r}}; allowed are {', '.join(LAYOUTS)}",
        ),
        *(
            Check(f"{name} >= -1", f"{name} is {{{name}}}; give 0 or more keys, or -1 for no limit")
            for name in ("window_left", "window_right")
        ),
        # Below, it would be 0 to a kernel that flushes such numbers to 0: no soft cap, without a word.
        Check(
            f"softcap == 0 or (softcap >= {_SMALLEST!r} and softcap <= {_FLOAT_MAX!r})",
            "softcap is {softcap:g}; give a finite number above 0, or 0 for none (as a float32, so"
            f" {_SMALLEST:.1e} at the least)",
        ),
        Check(
            f"not ({lengths})",
            "cu_seqlens excludes q_lengths and kv_lengths: cumulative lengths are for sequences without padding,"
            " lengths for padded ones",
        ),
        Check(
            "not (cu_seqlens and layout == 'bhsd')",
            "layout 'bhsd' has no ragged form; with cu_seqlens Q, K and V are [tokens, heads, head size], which is"
            " layout 'bshd', or one tensor, which is layout 'packed'",
        ),
        Check("num_heads >= 1", "num_heads is {num_heads}; give 1 or more"),
        # The kernel would serve 0 as well, but there it is nearly always a float64 read as float32.
        Check(
            f"softmax_scale != 0 and softmax_scale >= {-_FLOAT_MAX!r} and softmax_scale <= {_FLOAT_MAX!r}",
            "softmax_scale is {softmax_scale:g}; give a finite float32 other than 0, usually 1/sqrt(head_size)"
            " (float64 data in a FLOAT32 field is misread)",
        ),
        Check(
            "num_kv_heads >= 1 and num_kv_heads <= num_heads and num_heads % num_kv_heads == 0",
            "num_heads is {num_heads}, num_kv_heads {num_kv_heads}; num_heads must be a multiple of num_kv_heads, which"
            " is 1 or more",
        ),
        Check("head_size >= 1 and head_size <= 256", "head size is {head_size}: use an integer from 1 to 256"),
        *(
            Check(f"{name} <= {_INT32_MAX}", f"{said} is {{{name}}}: use an integer from 0 to {_INT32_MAX}")
            for name, said in (("batch", "batch_size"), ("rows", "q_len"), ("columns", "kv_len"))
        ),
        *biased_operator.checks(),
        *fp8_operator.checks(),
    )


def _inputs() -> tuple[Tensor, ...]:
    """Q, K and V in the order of their axes, or one tensor that holds them; then lengths."""
    found = [Tensor(name, "T[batch, num_heads, seq, head_size]", "not features") for name in ("Q", "K", "V")]
    for name, heads, seq, tokens, size in (
        ("Q", "num_heads", "Sq", "Q_tokens", "head_size"),
        ("K", "num_kv_heads", "Skv", "KV_tokens", "head_size"),
        ("V", "num_kv_heads", "Skv", "KV_tokens", "v_head_size"),
    ):
        forms = {
            f"[batch, {heads}, {seq}, {size}]": "layout == 'bhsd'",
            f"[batch, {seq}, {heads}, {size}]": "layout == 'bshd' and not cu_seqlens",
            f"[{tokens}, {heads}, {size}]": "layout == 'bshd' and cu_seqlens",
        }
        found += _of_either(name, [f"{form} if {when}" for form, when in forms.items()], "features and not in_one")
    packed = [
        f"[{rows}, {heads}, head_size] if {ragged}cu_seqlens{alike}"
        for rows, ragged in (("batch, seq", "not "), ("tokens", ""))
        for heads, alike in (("3, num_heads", " and num_heads == num_kv_heads"), ("num_heads + 2 * num_kv_heads", ""))
    ]
    found += _of_either("QKV", packed, "features and in_one")
    found += [Tensor(name, "int32[batch]", f"features and {name}") for name in ("q_lengths", "kv_lengths")]
    ragged = "features and cu_seqlens"
    found += [Tensor(f"cu_seqlens_{which}", "int32[batch + 1]", ragged) for which in ("q", "kv")]
    return (*found, *biased_operator.inputs(), *fp8_operator.inputs())


def _of_either(name: str, forms: list[str], when: str) -> list[Tensor]:
    """An input of T, or of FP8."""
    kinds = {"T": "not eight", "fp8": "eight"}
    return [Tensor(name, [kind + form for form in forms], f"{when} and {which}") for kind, which in kinds.items()]


def _outputs() -> tuple[Tensor, ...]:
    dense = {False: ("Sq", "Q_tokens"), True: ("seq", "tokens")}
    out, lse = [], []
    for packed, (seq, tokens) in dense.items():
        where = "in_one" if packed else "not in_one"
        out += [
            f"T[batch, num_heads, {seq}, v_head_size] if {where} and layout == 'bhsd'",
            f"T[batch, {seq}, num_heads, v_head_size] if {where} and layout != 'bhsd' and not cu_seqlens",
            f"T[{tokens}, num_heads, v_head_size] if {where} and cu_seqlens",
        ]
        lse += [
            f"fp32[batch, num_heads, {seq}] if {where} and not cu_seqlens",
            f"fp32[num_heads, {tokens}] if {where} and cu_seqlens",
        ]
    return (
        Tensor("Out", "T[batch, num_heads, seq, head_size]", "not features"),
        Tensor("Out", out, "features"),
        Tensor("Lse", lse, "features and return_lse"),
    )


def sources(names: tuple[tuple[str, str], ...], item: str = "itemsize(T)") -> dict[str, str]:
    """Where the arguments of every function but the first come from; `item` is the bytes of an element of Q, K, V."""
    head = f"head_size * {item}"
    packed = {
        "Q": "QKV if in_one else Q",
        "K": f"QKV + num_heads * {head} if in_one else K",
        "V": f"QKV + (num_heads + num_kv_heads) * {head} if in_one else V",
    }
    others = {
        "sm_scale": "softmax_scale",
        "batch_size": "batch",
        "q_len": "rows",
        "kv_len": "columns",
        "window_right": "right",
        "bottom_right": "bottom_right",
        "ragged": "cu_seqlens",
        **biased_operator.SOURCES,
    }
    return {name: (packed | others).get(name, name) for name, _ in names}


_FIRST = {
    **{name: name for name in ("Out", "L", "M", "Q", "K", "V")},
    **{"sm_scale": "softmax_scale", "batch_size": "batch", "num_heads": "num_heads", "seq_len": "seq"},
}
_LAUNCHES = (
    Launch(
        _FIRST,
        "not features",
        # One function a head size: causal, or one that sees every key.
        "fmha_d{head_size}_{T}{'' if causal else '_full'}",
    ),
    Launch(
        sources(forward.ARGUMENTS),
        "features and not biased and not eight and not split",
        "fmha_fwd_d{padded}_{T}",
        "forward",
    ),
    Launch(sources(biased_operator.ARGUMENTS), "features and biased and not split", biased_operator.FUNCTION, "biased"),
    Launch(sources(fp8_operator.ARGUMENTS, "1"), "eight", fp8_operator.FUNCTION, "fp8"),
    *(
        Launch(
            sources(ARGUMENTS),
            f"features and not biased and not eight and split{more}",
            f"fmha_{step}_d{{padded_split}}_{{T}}",
            option=DECODE,
        )
        for step, more in (("split", ""), ("combine", " and splits > 1"))
    ),
    *(
        Launch(
            sources(biased_decode.ARGUMENTS),
            "features and biased and split",
            f"fmha_biased_{step}_d{{padded_split}}_{{T}}",
            option=BIASED_DECODE,
        )
        for step in ("split", "combine")
    ),
)
# A ragged batch is not decoded, nor are queries that are as many as the keys, as those of a packed tensor.
_FEW = "not cu_seqlens and not in_one and most_rows >= 1"

OPERATOR = Operator(
    name=NAME,
    version=VERSION,
    inputs=_inputs(),
    outputs=_outputs(),
    types={"T": Types(DTYPES, "type_id")},
    attributes=_ATTRIBUTES,
    define=_DEFINE,
    checks=_checks(),
    launches=_LAUNCHES,
    workspace=(
        *(Part(name, "4 * batch * num_heads * seq", "not features") for name in ("L", "M")),
        Part("Partial", "4 * splits * queries * padded_split", "features and split"),
        Part("Statistics", "4 * (2 * splits + 1) * queries", "features and split"),
    ),
    workspace_of_profile=f"(0 if eight or not (has({BIASED_DECODE}) if biased else has({DECODE}))"
    f" or max(least(Sq), 1) > most_decoded or Skv < {LEAST_KEYS} or batch == 0"
    f" else 4 * profile_rows * padded_split + 12 * profile_rows + {ALIGNMENT})",
    alignment=ALIGNMENT,
    options=(
        Option(DECODE, WORKSPACE_RULE, f"features and not biased and not eight and {_FEW}"),
        Option(BIASED_DECODE, WORKSPACE_RULE, f"features and biased and {_FEW}"),
    ),
    summary=(
        ("", "{T}, {num_heads} heads of size {head_size}, {'causal' if causal else 'full'}, scale {softmax_scale:g}"),
        ("features", ", layout {layout}"),
        ("features and num_kv_heads != num_heads", ", {num_kv_heads} heads of K and V"),
        ("features and bottom_right", ", aligned bottom right"),
        ("features and (window_left != -1 or window_right != -1)", ", window ({window_left}, {window_right})"),
        ("features and softcap != 0", ", softcap {softcap:g}"),
        *((f"features and {name}", f", {name}") for name in ("q_lengths", "kv_lengths", "cu_seqlens", "return_lse")),
        *biased_operator.SUMMARY,
        *fp8_operator.SUMMARY,
    ),
    shape_summary=(
        ("not features", "[{batch}, {seq}] batch and seq"),
        ("features", "batch {batch}, Sq {rows}, Skv {columns}"),
        ("features and cu_seqlens", " in all"),
        ("features and split", " in {splits} parts"),
    ),
    labels={
        "num_heads": "heads",
        "num_kv_heads": "kv heads",
        "head_size": "head size",
        **biased_operator.LABELS,
        **fp8_operator.LABELS,
        "num_heads + 2 * num_kv_heads": "heads + 2 * kv heads",
        "3": "Q, K, V",
        "Q_tokens": "Q tokens",
        "KV_tokens": "KV tokens",
    },
    build="{'--kernels fp8 --arch sm_90 ' if eight else '--kernels biased ' if biased else ''}--dtype {T}"
    " --head-size {padded if features else head_size}",
)
