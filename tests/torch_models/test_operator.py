"""The operator, the drop-in and whole models on the CPU, and their way into ONNX."""

import itertools
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from helpers import few_of
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import pyfmha.torch
from pyfmha.attention.operator import OPERATOR
from pyfmha.attention.reference import attend, relative_error
from pyfmha.errors import PluginError
from pyfmha.torch import functional as drop_in
from pyfmha.torch import launch as launching
from pyfmha.torch.left_to_pytorch import why_not, why_not_mask, why_not_shapes
from pyfmha.torch.operator import attention_op, plain_op

LENGTHS = {"q_lengths": torch.tensor([3, 7]), "kv_lengths": torch.tensor([9, 0])}
NUMBERS = torch.randn(2, 4, 7, 9, generator=torch.Generator().manual_seed(3))
KEYWORDS: list[dict[str, Any]] = [
    {}, {"causal": True}, {"causal": "bottom-right"}, {"scale": 0.5}, {"softcap": 2.0}, {"window": (2, 1)},
    {"window": (3, -1), "causal": True, "align": "bottom-right"}, LENGTHS, {**LENGTHS, "causal": "bottom-right"},
    {"bias": NUMBERS[:, :, :, :1], "softcap": 2.0}, {"bias": NUMBERS[0], "mask": NUMBERS[1, 0] > 0, "causal": True},
    {"mask": NUMBERS[:, :1, :1] > 1.5, "sinks": NUMBERS[0, :, 0, 0]}, {**LENGTHS, "sinks": NUMBERS[0, :, 0, 0]},
    {"bias": torch.where(NUMBERS > 0.5, NUMBERS, -torch.inf)},
]  # fmt: skip


def tensors(kv_heads: int = 2, layout: str = "bhsd", dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    made = [torch.randn(2, heads, rows, 16) for heads, rows in ((4, 7), (kv_heads, 9), (kv_heads, 9))]
    return tuple((x if layout == "bhsd" else x.transpose(1, 2).contiguous()).to(dtype) for x in made)


def expected(q: Any, k: Any, v: Any, keywords: dict[str, Any]) -> tuple[Any, Any]:
    """By the reference of the project."""
    causal, window = keywords.get("causal", False), keywords.get("window", (-1, -1))
    return attend(
        *(x.double().numpy() for x in (q, k, v)),
        sm_scale=keywords.get("scale", 0.25),
        softcap=keywords.get("softcap", 0.0),
        window_left=window[0],
        window_right=0 if causal else window[1],
        bottom_right="bottom-right" in (causal, keywords.get("align")),
        **{name: keywords[name].tolist() for name in ("q_lengths", "kv_lengths") if name in keywords},
        **{name: keywords[name].numpy() for name in ("bias", "mask", "sinks") if name in keywords},
    )


@pytest.mark.parametrize("keywords", KEYWORDS, ids=str)
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_every_keyword_against_the_reference(keywords: dict[str, Any], layout: str) -> None:
    q, k, v = tensors()
    wanted, wanted_lse = expected(q, k, v, keywords)
    laid = (x if layout == "bhsd" else x.transpose(1, 2).contiguous() for x in (q, k, v))

    out, lse = pyfmha.torch.attention(*laid, layout=layout, return_lse=True, **keywords)

    out = out if layout == "bhsd" else out.transpose(1, 2)
    assert relative_error(out.numpy(), wanted) < 1e-5
    np.testing.assert_array_equal(np.isinf(lse.numpy()), np.isinf(wanted_lse))
    kept = np.isfinite(wanted_lse)
    assert relative_error(lse.numpy()[kept], wanted_lse[kept]) < 1e-5


ONE_AFTER_OTHER: list[dict[str, Any]] = [
    {}, {"causal": "bottom-right"}, {"window": (2, 1), "softcap": 2.0}, {"bias": NUMBERS[:, :, :4, :5]},
    {"mask": NUMBERS[0, :1, :4, :1] > -0.5, "sinks": NUMBERS[0, :, 0, 0], "scale": 0.5},
]  # fmt: skip


@pytest.mark.parametrize("keywords", ONE_AFTER_OTHER, ids=str)
def test_a_ragged_batch_is_its_sequences_one_by_one(keywords: dict[str, Any]) -> None:
    """Also where queries and keys begin elsewhere; a bias and a mask are of the longest."""
    torch.manual_seed(1)
    q, k, v = torch.randn(7, 4, 16), torch.randn(8, 2, 16), torch.randn(8, 2, 24)
    rows, keys = torch.tensor([0, 3, 7], dtype=torch.int32), torch.tensor([0, 5, 8])

    out, lse = pyfmha.torch.attention(
        q, k, v, cu_seqlens_q=rows, cu_seqlens_kv=keys, return_lse=True, **keywords,
    )  # fmt: skip

    assert (out.shape, lse.shape) == ((7, 4, 24), (4, 7))
    for number, (of_q, of_kv) in enumerate(((slice(0, 3), slice(0, 5)), (slice(3, 7), slice(5, 8)))):
        one = [x.transpose(0, 1)[None] for x in (q[of_q], k[of_kv], v[of_kv])]
        beside = dict(keywords)
        for name in ("bias", "mask"):
            if name in beside:
                whole = beside[name][(None,) * (4 - beside[name].ndim)].expand(2, -1, -1, -1)
                beside[name] = whole[number : number + 1, :, : one[0].shape[2], : one[1].shape[2]]
        wanted, sums = expected(*one, beside)
        assert relative_error(out[of_q].transpose(0, 1).numpy(), wanted[0]) < 1e-5
        np.testing.assert_allclose(lse[:, of_q].numpy(), sums[0], rtol=1e-5, atol=1e-6)


def test_a_ragged_batch_ends_where_its_tensors_do() -> None:
    """Ends beyond, negative or before that of the sequence before count as the nearest that is possible."""
    torch.manual_seed(1)
    q, k, v = torch.randn(7, 4, 16), torch.randn(8, 2, 16), torch.randn(8, 2, 24)
    rows, keys = torch.tensor([1, 5, 3, 9]), torch.tensor([-3, 4, 2, 8])
    out, lse = pyfmha.torch.attention(q, k, v, cu_seqlens_q=rows, cu_seqlens_kv=keys, return_lse=True)
    arrays = (x.double().numpy() for x in (q, k, v))
    wanted, sums = attend(*arrays, sm_scale=0.25, cu_seqlens_q=rows.tolist(), cu_seqlens_kv=keys.tolist())

    assert relative_error(out.numpy(), wanted) < 1e-5
    np.testing.assert_allclose(lse.numpy(), sums, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["bias", "mask"])
def test_a_bias_or_mask_may_be_of_fewer_than_the_longest_sequence(name: str) -> None:
    """Past its end a bias is 0, and a mask hides."""
    torch.manual_seed(1)
    q, k, v = torch.randn(7, 4, 16), torch.randn(8, 2, 16), torch.randn(8, 2, 24)
    ends = {"cu_seqlens_q": torch.tensor([0, 3, 7]), "cu_seqlens_kv": torch.tensor([0, 5, 8])}
    part = NUMBERS[:1, :1, :3, :4] if name == "bias" else NUMBERS[:1, :1, :3, :4] > 0
    whole = np.pad(part.numpy(), [(0, 0), (0, 0), (0, 1), (0, 1)])
    out = pyfmha.torch.attention(q, k, v, **ends, **{name: part})
    arrays = (x.double().numpy() for x in (q, k, v))
    wanted, _ = attend(*arrays, sm_scale=0.25, **{key: x.tolist() for key, x in ends.items()}, **{name: whole})

    assert relative_error(out.numpy(), wanted) < 1e-5


def test_zero_is_false() -> None:
    q, k, v = tensors()
    wanted = {causal: pyfmha.torch.attention(q, k, v, causal=causal) for causal in (False, True)}
    assert not torch.equal(wanted[False], wanted[True])
    for given in (0, 1, np.False_, np.True_):
        torch.testing.assert_close(pyfmha.torch.attention(q, k, v, causal=given), wanted[bool(given)])


def test_tensors_without_elements() -> None:
    q, k, v = tensors()
    out, lse = pyfmha.torch.attention(q, k[:, :, :0], v[:, :, :0], return_lse=True)
    assert (out.eq(0).all(), lse.isneginf().all()) == (True, True)
    for part in (q[:, :, :0], q[:0]):
        batch = part.shape[0]
        assert pyfmha.torch.attention(part, k[:batch], v[:batch]).shape == part.shape
    start, ragged = torch.tensor([0]), (x[0].transpose(0, 1)[:0] for x in (q, k, v))
    assert pyfmha.torch.attention(*ragged, cu_seqlens_q=start, cu_seqlens_kv=start).shape == (0, 4, 16)


def test_values_of_another_size() -> None:
    q, k, v = tensors()
    v = torch.cat([v, v], dim=-1)
    out = pyfmha.torch.attention(q, k, v)
    assert relative_error(out.numpy(), expected(q, k, v, {})[0]) < 1e-5


@pytest.mark.parametrize("mask", [NUMBERS > 0, NUMBERS[0, 0]], ids=["bool", "float"])
def test_an_exported_drop_in_has_the_mask_as_input_of_the_node(mask: torch.Tensor) -> None:
    pytest.importorskip("onnxscript")

    class Masked(torch.nn.Module):
        def forward(self, q: Any, k: Any, v: Any, mask: Any) -> Any:
            return pyfmha.torch.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(Masked(), (*tensors(kv_heads=4), mask), dynamo=True, verbose=False)
    assert program is not None
    (node,) = [node for node in program.model.graph if node.domain == "pyfmha"]
    names = {name: attribute.value for name, attribute in node.attributes.items()}
    assert (names["mask"], names["bias"]) == ((1, 0) if mask.dtype == torch.bool else (0, 1))
    assert len(node.inputs) == 4


def test_padding_that_is_nan_changes_nothing() -> None:
    q, k, v = tensors()
    wanted = pyfmha.torch.attention(q, k, v, **LENGTHS)
    k[0, :, 9:], v[1] = float("nan"), float("nan")

    torch.testing.assert_close(pyfmha.torch.attention(q, k, v, **LENGTHS), wanted)


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_what_is_no_number_reaches_the_rows_that_see_it_only(odd: float) -> None:
    q, k, v = tensors()
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    mask[1:, 3] = False
    wanted = pyfmha.torch.attention(q, k, v, mask=mask)
    k[:, :, 3], v[:, :, 3] = odd, odd
    out = pyfmha.torch.attention(q, k, v, mask=mask)

    assert torch.equal(out[:, :, 1:], wanted[:, :, 1:])
    assert not out[:, :, 0].isfinite().any()


MORE: list[dict[str, Any]] = [{}, {"return_lse": True}, {"causal": True, "window_left": 2}, LENGTHS]
CHECKED = [(dtype, more) for dtype in (torch.float16, torch.bfloat16, torch.float32) for more in MORE]


@pytest.mark.parametrize(("dtype", "more"), few_of(CHECKED, lambda one: one[0] == torch.float32 or one[1] == {}))
def test_pytorchs_own_check_of_operators(dtype: torch.dtype, more: dict[str, Any]) -> None:
    for layout in ("bhsd", "bshd"):
        q, k, v = tensors(layout=layout, dtype=dtype)
        torch.library.opcheck(attention_op, (q, k, v, 0.25), {**more, "layout": layout})
        # As models give them: turned, so that Out lies as they do.
        turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
        torch.library.opcheck(attention_op, (*turned, 0.25), {**more, "layout": layout})
        assert attention_op(*turned, 0.25, layout=layout)[0].stride() == turned[0].stride()


def test_the_overload_for_most_calls() -> None:
    """It is what the name alone calls, as far as it takes the keywords."""
    q, k, v = tensors()
    torch.library.opcheck(plain_op, (q, k, v, 0.25))
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    torch.library.opcheck(plain_op, (*turned, 0.25), {"causal": True})
    for given, causal in itertools.product(((q, k, v), turned), (False, True)):
        out, lse = torch.ops.pyfmha.attention(*given, 0.25, causal)
        torch.testing.assert_close(out, attention_op(*given, 0.25, causal)[0])
        assert (out.stride(), lse.shape) == (given[0].stride(), (0,))
    _, lse = torch.ops.pyfmha.attention(q, k, v, 0.25, True, return_lse=True)
    torch.testing.assert_close(lse, attention_op(q, k, v, 0.25, True, return_lse=True)[1])


KINDS: list[tuple[dict[str, Any], Any]] = [
    ({}, plain_op), ({"causal": True, "scale": 0.5, "window": (-1, -1), "softcap": 0}, plain_op),
    ({"layout": "bhsd", "align": "top-left", "q_lengths": None}, plain_op), ({"causal": "bottom-right"}, attention_op),
    ({"window": (2, -1)}, attention_op), ({"softcap": 2.0}, attention_op), ({"layout": "bshd"}, attention_op),
    ({"kv_lengths": LENGTHS["q_lengths"]}, attention_op), ({"return_lse": True}, attention_op),
    ({"mask": NUMBERS[0, 0] > 0}, attention_op),
]  # fmt: skip


@pytest.mark.parametrize(("keywords", "wanted"), KINDS, ids=range(len(KINDS)))
def test_the_overload_that_a_call_becomes(keywords: dict[str, Any], wanted: Any) -> None:
    seen = []

    class Looking(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(function)
            return function(*args, **(kwargs or {}))

    q, k, v = tensors(kv_heads=4) if keywords.get("layout") != "bshd" else [tensors()[0]] * 3
    with Looking():
        pyfmha.torch.attention(q, k, v, **keywords)
    assert [function for function in seen if function in (plain_op, attention_op)] == [wanted]


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_pytorchs_own_check_with_bias_mask_sinks_and_values_of_another_size(layout: str) -> None:
    q, k, v = tensors(layout=layout)
    v = torch.cat([v, v], dim=-1)
    beside = {"bias": NUMBERS[:1].expand(2, 4, 7, 9), "mask": NUMBERS[0, 0] > 0, "sinks": NUMBERS[0, :, 0, 0]}

    torch.library.opcheck(attention_op, (q, k, v, 0.25), {**beside, "layout": layout, "return_lse": True})
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    torch.library.opcheck(attention_op, (*turned, 0.25), {**beside, "layout": layout})
    out = attention_op(*turned, 0.25, layout=layout)[0]
    assert (out.shape, out.stride()[1] < out.stride()[2]) == ((*q.shape[:3], 32), True)


@pytest.mark.parametrize("name", ["bias", "sinks"])
def test_a_gradient_of_a_bias_or_sinks_is_an_error(name: str) -> None:
    given = {"bias": NUMBERS.clone(), "sinks": NUMBERS[0, :, 0, 0].clone()}[name].requires_grad_()

    out = pyfmha.torch.attention(*tensors(), **{name: given})

    with pytest.raises(PluginError, match="attention has no gradient here"):
        out.sum().backward()


WAYS = (
    pyfmha.torch.attention,
    lambda q, k, v: attention_op(q, k, v, 0.25)[0],
    lambda q, k, v: torch.ops.pyfmha.attention(q, k, v, 0.25)[0],
)


@pytest.mark.parametrize("call", WAYS)
def test_a_gradient_is_an_error_and_not_left_out(call: Any) -> None:
    q, k, v = tensors()

    out = call(q.requires_grad_(), k, v)

    torch.testing.assert_close(out, pyfmha.torch.attention(q.detach(), k, v))
    with pytest.raises(PluginError, match="attention has no gradient here"):
        out.sum().backward()


def test_the_compiler_takes_it_whole() -> None:
    q, k, v = tensors()

    def program(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return pyfmha.torch.attention(q * 2, k, v, causal=True) + 1

    compiled = torch.compile(program, backend="aot_eager", fullgraph=True)

    torch.testing.assert_close(compiled(q, k, v), program(q, k, v))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"q": torch.randn(2, 4, 7, 8)}, "one head size"), ({"v": torch.randn(2, 2, 8, 16)}, "as many rows and heads"),
        ({"bias": torch.randn(3, 7, 9)}, r"bias is \[3, 7, 9\]; allowed is .* here \[2, 4, 7, 9\]"),
        ({"mask": torch.ones(7, 9)}, "mask is of torch.float32; it must be torch.bool"),
        ({"bias": torch.ones(7, 9, dtype=torch.float16)}, "bias is of torch.float16; it must be torch.float32"),
        ({"sinks": torch.ones(3)}, r"sinks are \[3\]; they must be \[4\]"),
        ({"k": torch.randn(2, 2, 9, 16).half()}, "of one type"), ({"q": torch.randn(4, 7, 16)}, "4 axes"),
        ({"q": torch.randn(3, 4, 7, 16)}, "one batch"), ({"q": torch.randn(2, 3, 7, 16)}, "must be a multiple"),
        ({"layout": "sbhd"}, "layout is 'sbhd'"), ({"causal": "top"}, "causal is 'top'"),
        ({"softcap": -1.0}, "softcap is -1;"), ({"cu_seqlens_q": torch.tensor([0, 3])}, "cu_seqlens_kv"),
        ({"q_lengths": torch.tensor([1.0, 2.0])}, "q_lengths is of torch.float32; it must be torch.int32 or"),
        ({"kv_lengths": torch.tensor([True, False])}, "kv_lengths is of torch.bool"),
        ({"q_lengths": torch.tensor([1, 2, 3])}, r"q_lengths is \[3\]; it must be \[2\], one for each sequence"),
        ({"q_lengths": torch.tensor([[1], [2]])}, r"q_lengths is \[2, 1\]"),
        ({"cu_seqlens_q": torch.tensor([0, 3]), "cu_seqlens_kv": torch.tensor([0, 1, 3])}, r"_q \[2\], .*_kv \[3\]"),
        ({"cu_seqlens_q": torch.tensor(0), "cu_seqlens_kv": torch.tensor(0)}, r"sequences \+ 1\]"),
        ({"cu_seqlens_q": torch.tensor([0, 3]), "cu_seqlens_kv": torch.tensor([0, 3])}, "must have 3 axes"),
        ({"window": 3}, "window is 3; give two integers"), ({"softcap": "a"}, "softcap is 'a'; give a number"),
        ({"window": (0.5, 1)}, r"window is \(0.5, 1\)"), ({"window": (1, 2, 3)}, r"window is \(1, 2, 3\)"),
        ({"scale": 0}, "softmax_scale is 0; give"), ({"scale": math.nan}, "softmax_scale is nan"),
        ({"q": np.zeros((2, 4, 7, 16))}, "q is of ndarray; q, k and v are tensors of PyTorch"),
        ({"v": None}, "v is of NoneType"), ({"q": torch.randn(())}, "4 axes"),
        ({"k": torch.randn(2, 2, 9, 16, device="meta")}, "on one device, got cpu, meta, cpu"),
        ({"bias": torch.randn(7, 9, device="meta")}, "bias is on meta, Q on cpu"),
        (dict.fromkeys("qkv", torch.randn(2, 4, 7, 0)), "head size is 0"),
        (dict.fromkeys("qkv", torch.randn(2, 4, 7, 257)), "head size is 257"),
        (dict.fromkeys("qkv", torch.ones(2, 4, 7, 16).int()), "of one type, float16, bfloat16 or float32"),
        ({"k": torch.randn(2, 0, 9, 16), "v": torch.randn(2, 0, 9, 16)}, "num_kv_heads 0"),
    ],
)  # fmt: skip
def test_what_is_refused(change: dict[str, Any], text: str) -> None:
    given = {**dict(zip("qkv", tensors(), strict=True)), **change}

    with pytest.raises(PluginError, match=text):
        pyfmha.torch.attention(given.pop("q"), given.pop("k"), given.pop("v"), **given)


def test_the_drop_in_leaves_to_pytorch_what_it_does_not_serve() -> None:
    mask = torch.ones(7, 9, dtype=torch.bool).tril(2)
    given: list[dict[str, Any]] = [{}, {"is_causal": True}, {"attn_mask": mask}, {"scale": 0.3}, {"enable_gqa": True}]
    for keywords in given:
        q, k, v = tensors(kv_heads=2 if "enable_gqa" in keywords else 4)
        ours = pyfmha.torch.scaled_dot_product_attention(q, k, v, **keywords)
        # Twice PyTorch's own may differ in the last bit: where memory lies decides what it vectorises.
        torch.testing.assert_close(ours, functional.scaled_dot_product_attention(q, k, v, **keywords))


@pytest.mark.parametrize("mask", [NUMBERS > 0, NUMBERS[0, :, :1], NUMBERS[:, :1] > 2], ids=["bool", "float", "rows"])
def test_the_drop_in_computes_what_pytorch_does_with_a_mask(mask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the last one there are queries that see no key."""
    q, k, v = tensors(kv_heads=4)
    wanted = functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), mask_of(mask))
    monkeypatch.setattr(drop_in, "why_not", lambda *_, **__: None)  # as on a GPU
    monkeypatch.setattr(drop_in, "_native", None)

    out = pyfmha.torch.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    assert relative_error(out.numpy(), wanted.numpy()) < 1e-5


def mask_of(mask: torch.Tensor) -> torch.Tensor:
    return mask if mask.dtype == torch.bool else mask.double()


def test_a_mask_with_is_causal_is_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drop_in, "why_not", lambda *_, **__: None)
    monkeypatch.setattr(drop_in, "_native", lambda *_, **keywords: keywords)

    given = pyfmha.torch.scaled_dot_product_attention(*tensors(4), attn_mask=NUMBERS[0, 0] > 0, is_causal=True)

    assert isinstance(given, dict)
    assert given["is_causal"]


def test_what_the_library_lacks_is_left_to_pytorch_also_while_it_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default build has no ``fmha_biased_*``: what PyTorch computed before is left to it."""

    class Held(frozenset[str]):
        path = "libpyfmha.so"

    monkeypatch.setattr(launching, "library", lambda: Held({"fmha_biased_d64_fp32"}))
    q, k, v = tensors(4)

    def program(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return q + (1 if why_not_shapes(q, k, v, False, True) is None else 2)

    compiled = torch.compile(program, backend="aot_eager", fullgraph=True)
    for times, added in ((2, 2), (3, 1), (5, 2)):  # values of 32, 48 and 80
        wide = v.repeat(1, 1, 1, times)
        assert torch.equal(program(q, k, wide), q + added)
        assert torch.equal(compiled(q, k, wide), q + added)
    lacked = why_not_shapes(q, k, v.repeat(1, 1, 1, 5), False, True)
    assert lacked == "libpyfmha.so does not hold fmha_biased_d128_fp32"


def test_why_a_call_is_left_to_pytorch() -> None:
    q, k, v = tensors(kv_heads=4)

    assert why_not_mask(q, k, torch.ones(7, 9)) is None
    assert why_not_mask(q, k, torch.ones(7, 9, device="meta")) == "a mask on another device"
    assert why_not_mask(q, k, torch.ones(2, 1, 1, 9, dtype=torch.bool)) is None
    assert why_not_mask(q, k, torch.ones(7, 9, dtype=torch.float16)) == "a mask of torch.float16"
    assert "a mask of a shape" in str(why_not_mask(q, k, torch.ones(8, 9)))
    assert why_not(q, k, v, torch.ones(7, 9).requires_grad_()) == "a gradient is asked for"
    assert why_not(q, k, v, dropout_p=0.1) == "a dropout"
    assert why_not(q.requires_grad_(), k, v) == "a gradient is asked for"
    assert why_not(q.detach(), k, v) == "the tensors are not on a GPU"
    torch.set_autocast_enabled("cuda", True)
    try:
        assert why_not(q.detach(), k, v) == "autocast computes it in another type"
        assert why_not(q.detach().half(), k.half(), v.half()) == "the tensors are not on a GPU"
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert why_not(np.zeros(3), k, v) == "what is no tensor"
    assert why_not_shapes(q[..., :0], k[..., :0], v, False) == "no heads, or heads without elements"
    assert why_not_shapes(q, k, v, False) is None
    assert why_not_shapes(q[0], k[0], v[0], False) == "tensors of other than four axes"
    assert why_not_shapes(q, *tensors()[1:], False) == "heads that PyTorch broadcasts"
    assert why_not_shapes(q, *tensors()[1:], True) is None
    wide = torch.cat([v, v], dim=-1)
    assert why_not_shapes(q, k, wide, False) is None
    assert why_not_shapes(q, k, wide[:, :, 1:], False) == "shapes that PyTorch broadcasts"
    assert why_not_shapes(q, k, v.repeat(1, 1, 1, 17), False) == "a head size above 256"
    assert "float64" in (why_not_shapes(q.double(), k.double(), v.double(), False) or "")


def test_patched_replaces_pytorchs_function_and_gives_it_back() -> None:
    before = functional.scaled_dot_product_attention

    def fails() -> None:
        with pyfmha.torch.patched():
            assert functional.scaled_dot_product_attention is pyfmha.torch.scaled_dot_product_attention
            raise ValueError("out")

    with pytest.raises(ValueError, match="out"):
        fails()
    assert functional.scaled_dot_product_attention is before


class Block(torch.nn.Module):
    """A module that calls PyTorch's function."""

    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(64, 192)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.project(x).reshape(*x.shape[:2], 3, 4, 16).permute(2, 0, 3, 1, 4).unbind(0)
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def exported(module: torch.nn.Module, *inputs: torch.Tensor) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.onnx.export(module.eval(), inputs, dynamo=True, opset_version=20, verbose=False).model_proto


FIELDS: list[tuple[dict[str, Any], dict[str, Any], int]] = [
    ({}, {"causal": 0, "softmax_scale": 0.25, "num_heads": 4, "num_kv_heads": 2, "head_size": 16, "type_id": 0}, 3),
    ({"causal": "bottom-right", "scale": 0.5}, {"causal": 1, "bottom_right": 1, "softmax_scale": 0.5}, 3),
    ({"window": (2, 1), "softcap": 2.0}, {"window_left": 2, "window_right": 1, "softcap": 2.0}, 3),
    ({**LENGTHS, "return_lse": True}, {"q_lengths": 1, "kv_lengths": 1, "return_lse": 1}, 5),
    ({"bias": NUMBERS, "mask": NUMBERS[0, 0] > 0, "sinks": NUMBERS[0, :, 0, 0]}, {"bias": 1, "mask": 1, "sinks": 1}, 6),
    ({"v": 24}, {"v_head_size": 24}, 3),
]  # fmt: skip


@pytest.mark.parametrize(("keywords", "fields", "inputs"), FIELDS, ids=lambda value: str(value)[:40])
def test_every_keyword_is_exported_as_a_field_of_the_node(
    keywords: dict[str, Any], fields: dict[str, Any], inputs: int
) -> None:
    """All fields are there, so that TensorRT's parser warns of none; and the node computes what the operator does."""
    pytest.importorskip("onnxscript")
    import onnx
    import onnx_ir as ir

    from pyfmha.onnx.staged import Staged

    q, k, v = tensors()
    keywords = dict(keywords)
    v = torch.cat([v, v], dim=-1)[..., : keywords.pop("v", 16)]
    given = {name: value for name, value in keywords.items() if isinstance(value, torch.Tensor)}
    rest = {name: value for name, value in keywords.items() if name not in given}

    class Whole(torch.nn.Module):
        def forward(self, q: Any, k: Any, v: Any, *more: Any) -> Any:
            return pyfmha.torch.attention(q, k, v, **dict(zip(given, more, strict=True)), **rest)

    proto = exported(Whole(), q, k, v, *given.values())
    (node,) = (node for node in proto.graph.node if node.op_type == "TritonFlashAttention")
    found = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    assert {name: found[name] for name in fields} == fields
    assert set(found) >= set(dict(OPERATOR.attributes))
    assert (len(node.input), len(node.output)) == (inputs, 2 if "return_lse" in rest else 1)
    feeds = dict(zip((value.name for value in proto.graph.input), (q, k, v, *given.values()), strict=True))
    got = Staged(ir.serde.deserialize_model(proto)).run({name: x.numpy() for name, x in feeds.items()})
    wanted = pyfmha.torch.attention(q, k, v, **keywords)
    for one, other in zip(got.values(), wanted if isinstance(wanted, tuple) else (wanted,), strict=True):
        finite = torch.isfinite(other)
        assert relative_error(one[finite.numpy()], other[finite].numpy()) < 1e-5


def test_a_replaced_module_is_exported_with_the_plugins_node() -> None:
    pytest.importorskip("onnxscript")
    import onnx_ir as ir

    from pyfmha.onnx.staged import Staged

    block, x = Block(), torch.randn(2, 7, 64)
    wanted = block(x).detach().numpy()
    proto = exported(pyfmha.torch.replace_attention(block), x)

    (node,) = (node for node in proto.graph.node if node.op_type == "TritonFlashAttention")
    attributes = {attribute.name for attribute in node.attribute}
    assert (node.domain, {"causal", "layout", "plugin_namespace"} <= attributes) == ("pyfmha", True)
    model = ir.serde.deserialize_model(proto)
    (name,) = (value.name for value in model.graph.inputs)
    (got,) = Staged(model).run({name: x.numpy()}).values()
    assert relative_error(got, wanted) < 1e-5


def test_a_model_of_transformers_by_its_registry() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=96,
    )  # fmt: skip
    model = transformers.LlamaModel(config).eval()
    ids = torch.randint(0, 99, (2, 9))
    with torch.no_grad():
        wanted = model(ids).last_hidden_state
        pyfmha.torch.replace_attention(model)
        got = model(ids).last_hidden_state

    assert model.config._attn_implementation == "pyfmha"
    torch.testing.assert_close(got, wanted)
