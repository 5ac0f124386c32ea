"""Attention as a layer of a TensorRT network."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from pyfmha.errors import PluginError
from pyfmha.runtime.library import Library
from pyfmha.trt.attention.added import added
from pyfmha.trt.attention.beside import beside_features, beside_of
from pyfmha.trt.attention.causal import says_causal
from pyfmha.trt.attention.eight import factors_of, fp8_features, out_dtype_of
from pyfmha.trt.attention.functions import Asked, split_mask
from pyfmha.trt.attention.problem import INPUTS, Problem
from pyfmha.trt.attention.requested import default_scale, dtype_of, features_of, lengths_of, problem_of
from pyfmha.trt.attention.words import Align, Causal, Dtype, Function, Layout, Mask, Options, PackedOptions, Values
from pyfmha.trt.network import module_with_plugins
from pyfmha.trt.protocols import AnyTensor, INetworkDefinition, TensorRT

if TYPE_CHECKING:
    from typing_extensions import Unpack  # typing has it from Python 3.11 on


@overload
def add_attention(
    network: INetworkDefinition,
    q: AnyTensor,
    k: AnyTensor,
    v: AnyTensor,
    *,
    causal: Causal,
    return_lse: Literal[False] = False,
    **options: "Unpack[Options]",
) -> AnyTensor: ...
@overload
def add_attention(
    network: INetworkDefinition,
    q: AnyTensor,
    k: AnyTensor,
    v: AnyTensor,
    *,
    causal: Causal,
    return_lse: Literal[True],
    **options: "Unpack[Options]",
) -> tuple[AnyTensor, AnyTensor]: ...
@overload
def add_attention(
    network: INetworkDefinition,
    q: AnyTensor,
    k: AnyTensor,
    v: AnyTensor,
    *,
    causal: Causal,
    return_lse: bool,
    **options: "Unpack[Options]",
) -> Any: ...
@says_causal("add_attention", PluginError)
def add_attention(
    network: Any,
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: Causal,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    align: Align | None = None,
    softcap: float = 0.0,
    layout: Layout | None = None,
    q_lengths: Any = None,
    kv_lengths: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_kv: Any = None,
    bias: Any = None,
    mask: Mask = None,
    sinks: Any = None,
    q_descale: Any = None,
    k_descale: Any = None,
    v_descale: Any = None,
    out_dtype: Dtype | None = None,
    score: Function | None = None,
    score_inputs: Values = (),
    mask_inputs: Values = (),
    return_lse: bool = False,
    name: str | None = None,
    namespace: str = "",
    library: Library | Path | str | None = None,
    trt_module: TensorRT | None = None,
) -> Any:
    """Add softmax(scale * Q K^T) V to a network. Registers the plugin first, if need be.

    Args:
        network: an ``INetworkDefinition`` of TensorRT 10.x or 11.x.
        q: ``ITensor`` of type HALF, BF16, FLOAT or, on Hopper, FP8, [batch, heads, Sq, head size], or as ``layout``
            says. Heads and head size are known, the other sizes may be -1.
        k, v: of the same type, [batch, kv heads, Skv, head size]; heads is a multiple of kv heads. V may have another
            head size, which is Out's then. Keys beyond ``kv_lengths``, and the other sequences of a ragged batch,
            change nothing, even if they are NaN. Behind ``causal`` or ``window`` that does not hold: NaN or infinity in
            K or V there may reach queries that do not see it, where others of the same tile do, because a weight of 0
            times NaN is NaN; with a bias, a mask, sinks or another head size of V it holds there, too.
        causal: whether a query sees only keys at its own position and before; ``"bottom-right"`` is True with that
            ``align``. It has no default: who leaves it out is told what to say.
        scale: by default 1 / sqrt(head size).
        window: how many keys a query sees to the left and to the right of its position; -1 is no limit.
        align: what is at one position, for ``causal`` and ``window``: the first query and the first key
            (``"top-left"``, the default), or the last ones (``"bottom-right"``).
        softcap: scores become softcap * tanh(score / softcap); 0 leaves them.
        layout: ``"bhsd"``, the default, or ``"bshd"`` for [batch, seq, heads, head size].
        q_lengths, kv_lengths: ``ITensor`` INT32 [batch]: the valid queries or keys of each sequence.
        cu_seqlens_q, cu_seqlens_kv: ``ITensor`` INT32 [batch + 1], both or none: the sequences lie behind each other
            in Q [tokens, heads, head size] and in K and V [tokens, kv heads, head size], and these say where each
            begins and the last one ends. That is layout ``"bshd"``, the default then.
        bias: ``ITensor`` of Q's type or FLOAT, [batch or 1, heads or 1, Sq or 1, Skv or 1], leading axes of 1 left out
            if you like: added to the scores, after a soft cap; minus infinity hides a key. It is read where it is, an
            axis of 1 is not expanded. Of a ragged batch, Sq and Skv are those of the longest sequence, at the least:
            nobody can check that without waiting for the device.
        mask: ``ITensor`` BOOL of the same shapes: True is seen. ``causal``, ``window``, lengths and it must agree. Or a
            function decorated with :func:`pyfmha.mask_function`; or a tuple of both, which must agree, too.
        score: a function decorated with :func:`pyfmha.score_function`, which gives the scores after a soft cap and a
            bias; or one made by :func:`pyfmha.score_and_mask`. The library must hold it: ``pyfmha build --functions``.
            A function may be named by its name in the library, ``"alibi"``.
        score_inputs, mask_inputs: what the functions take of their own, in their order or by name: an ``ITensor`` for a
            pointer, a number else. Numbers that a shape tells are left out.
        sinks: ``ITensor`` [heads] of Q's type or FLOAT: exp(sink) is part of each row's sum, and has no value.
        q_descale, k_descale, v_descale: ``ITensor`` FLOAT, what the numbers of Q, K and V in FP8 are to be multiplied
            by: [1], [kv heads] or, but for a ragged batch, [batch, kv heads]; all above 0. None is 1.
        out_dtype: of Out, where Q, K and V are FP8: ``"fp16"`` or ``"bf16"``, to be said; else that of Q.
        return_lse: whether to return Lse, too.
        name: of the layer, which also names it in the engine and in messages.
        namespace, library: as :func:`pyfmha.trt.register`.
        trt_module: by default the module that the network is of.

    Returns:
        Out, an ``ITensor`` of the type (but for FP8) and shape of Q, with V's head size; with ``return_lse`` a pair of
        Out and Lse, FLOAT [batch, heads, Sq] or [heads, tokens]: the natural logarithm of each query's sum of
        exp(score). A query that sees no key has zeros and minus infinity, or the sink.

    Raises:
        PluginError: the tensors do not fit, or TensorRT refused the layer.
        LibraryError: the library is missing or cannot be used.
    """
    trt = module_with_plugins(network, trt_module)
    lengths = lengths_of(q_lengths, kv_lengths, cu_seqlens_q, cu_seqlens_kv)
    mask, shown = split_mask(mask)
    asked = Asked(score, shown, score_inputs, mask_inputs)
    beside, factors = beside_of(bias, mask, sinks), factors_of(q_descale, k_descale, v_descale)
    tensors = dict(zip(INPUTS, (q, k, v), strict=True))
    problem = problem_of(
        tensors, lengths, beside, factors, causal=causal, scale=scale, window=window, align=align, softcap=softcap,
        layout=layout, return_lse=return_lse, out_dtype=out_dtype,
    )  # fmt: skip
    layer = {**tensors, **lengths, **beside, **factors}
    outputs = added(trt, network, problem, layer, asked, name, namespace, library)
    return tuple(outputs) if return_lse else outputs[0]


@overload
def add_attention_packed(
    network: INetworkDefinition,
    qkv: AnyTensor,
    num_heads: int,
    num_kv_heads: int | None = None,
    *,
    causal: Causal,
    return_lse: Literal[False] = False,
    **options: "Unpack[PackedOptions]",
) -> AnyTensor: ...
@overload
def add_attention_packed(
    network: INetworkDefinition,
    qkv: AnyTensor,
    num_heads: int,
    num_kv_heads: int | None = None,
    *,
    causal: Causal,
    return_lse: Literal[True],
    **options: "Unpack[PackedOptions]",
) -> tuple[AnyTensor, AnyTensor]: ...
@overload
def add_attention_packed(
    network: INetworkDefinition,
    qkv: AnyTensor,
    num_heads: int,
    num_kv_heads: int | None = None,
    *,
    causal: Causal,
    return_lse: bool,
    **options: "Unpack[PackedOptions]",
) -> Any: ...
@says_causal("add_attention_packed", PluginError)
def add_attention_packed(
    network: Any,
    qkv: Any,
    num_heads: int,
    num_kv_heads: int | None = None,
    *,
    causal: Causal,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    align: Align | None = None,
    softcap: float = 0.0,
    q_lengths: Any = None,
    kv_lengths: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_kv: Any = None,
    bias: Any = None,
    mask: Mask = None,
    sinks: Any = None,
    q_descale: Any = None,
    k_descale: Any = None,
    v_descale: Any = None,
    out_dtype: Dtype | None = None,
    score: Function | None = None,
    score_inputs: Values = (),
    mask_inputs: Values = (),
    return_lse: bool = False,
    name: str | None = None,
    namespace: str = "",
    library: Library | Path | str | None = None,
    trt_module: TensorRT | None = None,
) -> Any:
    """As :func:`add_attention`, for Q, K and V in one tensor, which is read where it is.

    Args:
        network: an ``INetworkDefinition``.
        qkv: ``ITensor`` [batch, seq, 3, heads, head size], or [batch, seq, heads + 2 * kv heads, head size] with the
            heads of Q first, then those of K and of V; with ``cu_seqlens_q`` and ``cu_seqlens_kv``, which may be one
            and the same, [tokens, ...] in the place of [batch, seq, ...].
        num_heads, num_kv_heads: heads of Q, and of K and V, by default as many; with an axis of 3 there are as many.
        causal, scale, window, align, softcap, q_lengths, kv_lengths, cu_seqlens_q, cu_seqlens_kv, bias, mask,
            sinks, q_descale, k_descale, v_descale, out_dtype, score, score_inputs, mask_inputs, return_lse, name,
            namespace, library, trt_module: as there.

    Returns:
        Out [batch, seq, heads, head size], or [tokens, heads, head size]; with ``return_lse`` a pair of it and Lse.

    Raises:
        PluginError, LibraryError: as there.
    """
    trt = module_with_plugins(network, trt_module)
    lengths = lengths_of(q_lengths, kv_lengths, cu_seqlens_q, cu_seqlens_kv)
    kind = dtype_of({"QKV": qkv})
    dtype = out_dtype_of(kind, out_dtype)
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    features = features_of(kv_heads, "packed", causal, align, window, softcap, return_lse, lengths)
    shape = tuple(qkv.shape)
    size = shape[-1] if shape else -1
    if size < 1:
        raise PluginError(f"QKV is {list(shape)}; its last axis, the head size, must be known")
    mask, shown = split_mask(mask)
    asked = Asked(score, shown, score_inputs, mask_inputs)
    beside, ragged = beside_of(bias, mask, sinks), "cu_seqlens_q" in lengths
    factors = factors_of(q_descale, k_descale, v_descale)
    sizes = (-1, num_heads, -1, -1) if ragged else (shape[0], num_heads, shape[1], shape[1])
    features = replace(
        features,
        **beside_features(dtype, beside, sizes, ragged),
        **fp8_features(kind, factors, (1 if ragged else sizes[0], kv_heads)),
    )
    problem = Problem(num_heads, size, dtype, default_scale(scale, size), bool(causal), features)
    layer = {"QKV": qkv, **lengths, **beside, **factors}
    outputs = added(trt, network, problem, layer, asked, name, namespace, library)
    return tuple(outputs) if return_lse else outputs[0]
