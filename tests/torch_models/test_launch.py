"""What the operator launches, on the fake driver: PyTorch's CPU memory stands for the GPU's, and no kernel runs."""

import math
import re
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from fake_cuda import FakeCuda
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch_gpu import DISPATCHED, STREAM, attention_op, plain_op, torch_gpu
from trt_double.scene import HEADS, SIZE

import pyfmha.torch
from pyfmha.attention import decode, forward
from pyfmha.attention.biased import ARGUMENTS
from pyfmha.errors import LibraryError, PluginError
from pyfmha.runtime.library import Library
from pyfmha.torch import direct, functional, operator, plain
from pyfmha.torch import launch as launching

pytest_plugins = ("trt_double.fixtures",)


@pytest.fixture
def fake_gpu(forward_library: Library, fake_cuda: FakeCuda) -> Iterator[FakeCuda]:
    """PyTorch's current device and stream are the fake driver's."""
    assert fake_cuda.c.cuInit(0) == 0
    fake_cuda.use_context(0)
    with torch_gpu(forward_library):
        yield fake_cuda


def tensors(rows: int = 40, keys: int = 50, kv_heads: int = HEADS) -> list[torch.Tensor]:
    made = [torch.zeros(2, HEADS, rows, SIZE), *(torch.zeros(2, kv_heads, keys, SIZE) for _ in range(2))]
    return [x.half() for x in made]


def integers(params: tuple[bytes, ...], first: int, count: int) -> list[int]:
    return [struct.unpack("<i", params[at])[0] for at in range(first, first + count)]


def pointers(params: tuple[bytes, ...]) -> list[int]:
    return [struct.unpack("<Q", params[at])[0] for at in range(9)]


def strides(params: tuple[bytes, ...]) -> list[int]:
    """Of Q, K, V and Out: batch, head, row."""
    return [struct.unpack("<q", params[at])[0] for at in range(17, 29)]


def test_a_launch_on_the_current_stream_with_the_tensors_own_memory(fake_gpu: FakeCuda) -> None:
    q, k, v = tensors(kv_heads=HEADS // 2)
    lengths = torch.tensor([3, 9], dtype=torch.int32)

    out, lse = attention_op(
        q, k, v, 0.5, True, True, 3, -1, softcap=2.0, kv_lengths=lengths, return_lse=True,
    )  # fmt: skip

    (launch,) = fake_gpu.launches()
    assert launch.stream == STREAM
    addresses = [x.data_ptr() for x in (out, lse, q, k, v)]
    assert pointers(launch.params) == [*addresses, 0, lengths.data_ptr(), 0, 0]
    assert struct.unpack("<ff", b"".join(launch.params[9:11])) == (0.5, 2.0)
    assert integers(launch.params, 11, 6) == [2, HEADS, HEADS // 2, 40, 50, SIZE]
    assert (out.shape, out.dtype) == ((2, HEADS, 40, SIZE), torch.float16)
    assert (lse.shape, lse.dtype) == ((2, HEADS, 40), torch.float32)


def test_a_form_is_prepared_once_and_later_calls_only_launch(fake_gpu: FakeCuda) -> None:
    attention_op(*tensors(), 0.5)
    before = fake_gpu.all_calls()

    for _ in range(3):
        attention_op(*tensors(), 0.5)

    later = dict(fake_gpu.all_calls() - before)
    assert later == {"cuLaunchKernel": 3, "cuCtxGetCurrent": 3, "cuCtxGetId": 3}
    attention_op(*tensors(rows=41), 0.5)
    assert integers(fake_gpu.launches()[-1].params, 14, 2) == [41, 50]
    attention_op(*tensors(), 0.5)  # what was prepared for another shape does not disturb it
    assert integers(fake_gpu.launches()[-1].params, 14, 2) == [40, 50]


WHY_NOT = functional.why_not
CALLS: dict[str, Callable[..., Any]] = {
    "operator": lambda *tensors: attention_op(*tensors, SIZE**-0.5)[0],
    "operator of few keywords": lambda *tensors: plain_op(*tensors, SIZE**-0.5)[0],
    "operator by its name": lambda *tensors: torch.ops.pyfmha_fake_gpu.attention(*tensors, SIZE**-0.5, False)[0],
    "operator, keywords by name": lambda *tensors: attention_op(*tensors, softcap=0.0, scale=SIZE**-0.5)[0],
    "operator past its own calls": lambda *tensors: DISPATCHED["default"](*tensors, SIZE**-0.5)[0],
    "attention": pyfmha.torch.attention,
    "drop-in": pyfmha.torch.scaled_dot_product_attention,
}


def count_lookups(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Counts what is looked up from here on."""
    looked_up, look_up = [], operator.ready_for

    def counted(*given: Any, **named: Any) -> Any:
        looked_up.append(given)
        return look_up(*given, **named)

    for module in (operator, functional):
        monkeypatch.setattr(module, "ready_for", counted)
    return looked_up


@pytest.mark.parametrize("inference", [True, False], ids=["inference", "gradients"])
@pytest.mark.parametrize("name", CALLS)
def test_a_call_like_the_one_before_is_known_again(
    fake_gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch, name: str, inference: bool
) -> None:
    """By shapes, strides and types: then nothing is looked up, and what is launched is right for these tensors. Forms
    may take turns."""
    looked_up = count_lookups(monkeypatch)
    q, k, _ = tensors()
    turned = k.transpose(1, 2).contiguous().transpose(1, 2)
    with torch.inference_mode(inference):
        for different, changed in ((1, k), (2, k[:, :, :49]), (2, k), (3, turned), (3, k[:, :, :49])):
            for _ in range(3):
                out = CALLS[name](q, changed, changed.detach())
                launch = fake_gpu.launches()[-1]
                assert [pointers(launch.params)[at] for at in (0, 2, 3)] == [x.data_ptr() for x in (out, q, changed)]
                assert integers(launch.params, 14, 2) == [40, changed.shape[2]]
                assert strides(launch.params)[3:6] == list(changed.stride()[:3])
                assert (launch.stream, out.dtype, out.is_inference()) == (STREAM, q.dtype, inference)
            assert len(looked_up) == different
    assert len(fake_gpu.launches()) == 15


INTS = torch.tensor([3, 9], dtype=torch.int32)
OTHERS: dict[str, dict[str, Any]] = {
    "lengths": {"q_lengths": INTS, "kv_lengths": INTS},
    "bias": {"bias": torch.zeros(40, 50)},
    "mask and sinks": {"mask": torch.ones(50).bool(), "sinks": torch.ones(HEADS)},
    "the log-sum-exp": {"return_lse": True}, "lengths of int64": {"kv_lengths": INTS.long()},
    "sinks with gaps": {"sinks": torch.ones(2 * HEADS)[::2]},
    "most of them": {"kv_lengths": INTS, "bias": torch.zeros(40, 50), "mask": torch.ones(50).bool(), "return_lse": True,
                     "sinks": torch.ones(HEADS), "causal": True, "window": (3, -1), "softcap": 2.0},
}  # fmt: skip


def by_the_operator(*tensors: torch.Tensor, window: tuple[int, int] = (-1, -1), **keywords: Any) -> Any:
    left, right = window
    pair = attention_op(*tensors, window_left=left, window_right=right, **{"scale": SIZE**-0.5, **keywords})
    return pair if keywords.get("return_lse") else pair[0]


@pytest.mark.parametrize("call", [pyfmha.torch.attention, by_the_operator], ids=["function", "operator"])
@pytest.mark.parametrize("name", OTHERS)
def test_calls_with_other_tensors_are_known_again(
    fake_gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch, name: str, call: Any
) -> None:
    """What is launched as it is given: what is converted first is so each time. Other memory is other memory."""
    looked_up = count_lookups(monkeypatch)
    for _ in range(3):
        keywords = {key: x.clone() if isinstance(x, torch.Tensor) and x.is_contiguous() else x
                    for key, x in OTHERS[name].items()}  # fmt: skip
        result = call(*tensors(), **keywords)
        params = fake_gpu.launches()[-1].params
        found = {struct.unpack("<Q", raw)[0] for raw in params if len(raw) == 8}
        converted = name in ("lengths of int64", "sinks with gaps")
        given = [x.data_ptr() for x in keywords.values() if isinstance(x, torch.Tensor)]
        assert found.issuperset(given) != converted
        assert result[1].data_ptr() in found if "return_lse" in keywords else result.data_ptr() in found
    assert len(looked_up) == (3 if converted else 1)


@pytest.mark.parametrize("return_lse", [False, True], ids=["Out", "Lse"])
@pytest.mark.parametrize("call", [pyfmha.torch.attention, by_the_operator], ids=["function", "operator"])
def test_two_launches_share_a_workspace_of_each_call(
    decode_library: Library, fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, call: Any, return_lse: bool
) -> None:
    """Few queries that look at many keys: the keys are split. Also of calls that are known again."""
    assert fake_cuda.c.cuInit(0) == 0
    fake_cuda.use_context(0)
    q, k, v = tensors(rows=1, keys=600, kv_heads=HEADS // 2)
    names = [name for name, _ in decode.ARGUMENTS]
    with torch_gpu(decode_library):
        looked_up = count_lookups(monkeypatch)
        for number in range(3):
            made: list[tuple[int, ...]] = []
            empty = launching.empty

            def noted(*form: Any, empty: Any = empty, made: Any = made) -> torch.Tensor:
                made.append(form[0])
                return empty(*form)

            monkeypatch.setattr(launching, "empty", noted)
            result = call(q, k, v, return_lse=return_lse)
            monkeypatch.setattr(launching, "empty", empty)
            first, second = (dict(zip(names, one.params, strict=False)) for one in fake_cuda.launches()[-2:])
            assert len(fake_cuda.launches()) == 2 * (number + 1)
            out, lse = result if return_lse else (result, None)
            pointer = struct.Struct("<Q").pack
            assert second["Out"] == pointer(out.data_ptr())
            assert second["Lse"] == pointer(0 if lse is None else lse.data_ptr())
            assert first["Partial"] == second["Partial"] != pointer(0)
            # Out, what is or stands for the log-sum-exp, and the workspace: at least Out and the log-sum-exp of a part.
            # The dispatcher's call makes its own of the second, and the call after it the one of all that follow.
            assert len(made) == 2 + (return_lse or (call is by_the_operator and number < 2))
            assert made[-1][0] >= 4 * (out.numel() + HEADS)
        assert len(looked_up) == 1


@pytest.mark.parametrize("call", [pyfmha.torch.attention, by_the_operator], ids=["function", "operator"])
def test_a_tensor_that_is_given_twice_is_known_again(
    fake_gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch, call: Any
) -> None:
    """Cumulative lengths of self-attention mostly are; calls with one and with two take turns."""
    looked_up = count_lookups(monkeypatch)
    packed = [torch.zeros(9, HEADS, SIZE).half() for _ in range(3)]
    for _ in range(3):
        one, other = (torch.tensor([0, 4, 9], dtype=torch.int32) for _ in range(2))
        for starts in ((one, one), (one, other), (other, one)):
            call(*packed, layout="bshd", cu_seqlens_q=starts[0], cu_seqlens_kv=starts[1])
            assert pointers(fake_gpu.launches()[-1].params)[7:9] == [x.data_ptr() for x in starts]
    assert len(looked_up) == 2
    q, k, _ = packed
    for tensors in ((q, q, q), (q, k, k), (q, q, k)) * 2:
        call(*tensors, layout="bshd", cu_seqlens_q=one, cu_seqlens_kv=one)
        assert pointers(fake_gpu.launches()[-1].params)[2:5] == [x.data_ptr() for x in tensors]
    assert len(looked_up) == 5


def test_other_tensors_of_other_forms_are_another_call(fake_gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up = count_lookups(monkeypatch)
    given: list[dict[str, Any]] = [
        {"q_lengths": INTS}, {"kv_lengths": INTS}, {"bias": torch.zeros(40, 50)}, {"bias": torch.zeros(40, 50).half()},
        {"bias": torch.zeros(50, 40).T}, {"mask": torch.zeros(40, 50).bool()}, {},
    ]  # fmt: skip
    for keywords in given:
        pyfmha.torch.attention(*tensors(), **keywords)
    assert len(looked_up) == len(given)
    assert len({one.params[9:] for one in fake_gpu.launches()}) >= 5
    with pytest.raises(PluginError, match="kv_lengths is"):
        pyfmha.torch.attention(*tensors(), kv_lengths=INTS[:1])
    bias = torch.zeros(40, 50, requires_grad=True)
    with pytest.raises(PluginError, match="attention has no gradient here"):
        pyfmha.torch.attention(*tensors(), bias=bias).sum().backward()


def test_a_mask_of_the_drop_in_is_known_again(fake_gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up = count_lookups(monkeypatch)
    masks = [torch.ones(40, 50).bool(), torch.zeros(40, 50), torch.ones(1, 50).bool(), None]
    for number, mask in enumerate(masks):
        for _ in range(3):
            pyfmha.torch.scaled_dot_product_attention(*tensors(), attn_mask=mask)
        found = {struct.unpack("<Q", raw)[0] for raw in fake_gpu.launches()[-1].params if len(raw) == 8}
        assert mask is None or mask.data_ptr() in found
        assert len(looked_up) == number + 1


PASSED: list[tuple[dict[str, Any], dict[str, float], set[str]]] = [
    ({}, {"sm_scale": 32**-0.5, "softcap": 0.0, "window_left": -1, "window_right": -1, "bottom_right": 0}, set()),
    ({"causal": True, "window": (3, 5)}, {"window_left": 3, "window_right": 0, "bottom_right": 0}, set()),
    ({"causal": "bottom-right"}, {"window_right": 0, "bottom_right": 1}, set()),
    ({"window": [2, 1], "align": "bottom-right"}, {"window_right": 1, "bottom_right": 1}, set()),
    ({"scale": 0.5}, {"sm_scale": 0.5}, set()),
    ({"softcap": 50}, {"softcap": 50.0}, set()), ({"return_lse": True}, {}, {"Lse"}),
    ({"q_lengths": INTS, "kv_lengths": INTS.long()}, {"ragged": 0}, {"q_lengths", "kv_lengths"}),
]  # fmt: skip


@pytest.mark.parametrize(("keywords", "numbers", "there"), PASSED, ids=range(len(PASSED)))
def test_every_keyword_reaches_the_kernel(
    fake_gpu: FakeCuda, keywords: dict[str, Any], numbers: dict[str, float], there: set[str]
) -> None:
    for _ in range(3):
        pyfmha.torch.attention(*tensors(), **keywords)
        launch = fake_gpu.launches()[-1]
        given = dict(zip(forward.ARGUMENTS, launch.params, strict=False))
        kinds = {"fp32": "<f", "i1": "<?"}
        found = {
            name: struct.unpack(kinds.get(kind, "<i"), given[name, kind])[0] for name, kind in given if name in numbers
        }
        assert found == {name: np.float32(value) for name, value in numbers.items()}
        optional = [name for name, kind in given if kind[0] == "*" and name not in ("Out", "Q", "K", "V")]
        assert {name for name, kind in given if name in optional and any(given[name, kind])} == there


def test_wrong_keywords_on_a_gpu(fake_gpu: FakeCuda) -> None:
    for keywords, text in (
        ({"window": (3.5, 1)}, r"window is \(3.5, 1\)"), ({"softcap": "a"}, "softcap is 'a'"),
        ({"scale": "b"}, "scale is 'b'"), ({"layout": 3}, "layout is 3"),
        ({"q_lengths": torch.ones(2)}, "q_lengths is of torch.float32"), ({"scale": math.inf}, "softmax_scale is inf"),
        ({"kv_lengths": torch.ones(3, dtype=torch.int32)}, r"kv_lengths is \[3\]"),
    ):  # fmt: skip
        with pytest.raises(PluginError, match=text):
            pyfmha.torch.attention(*tensors(), **keywords)
    lengths = torch.ones(2, dtype=torch.int32)
    pyfmha.torch.attention(*tensors(), q_lengths=lengths)
    with pytest.raises(PluginError, match=r"q_lengths is of torch\.float32"):  # of the same shape
        pyfmha.torch.attention(*tensors(), q_lengths=lengths.float())


def test_other_keywords_are_another_call(fake_gpu: FakeCuda) -> None:
    q, k, v = tensors()
    given: list[dict[str, Any]] = [
        {}, {"scale": 0.5}, {"causal": True}, {"causal": "bottom-right"}, {"window": (3, 1)}, {"softcap": 2.0},
        {"return_lse": True}, {},
    ]  # fmt: skip
    for keywords in given * 2:
        result = pyfmha.torch.attention(q, k, v, **keywords)
        assert isinstance(result, tuple) == bool(keywords.get("return_lse"))
    first, second = fake_gpu.launches()[:8], fake_gpu.launches()[8:]
    assert [one.params[9:] for one in first] == [one.params[9:] for one in second]
    assert len({one.params[9:] for one in first}) == 6  # one asks for the log-sum-exp, one is asked twice
    assert [pointers(one.params)[1] != 0 for one in second] == [bool(keywords.get("return_lse")) for keywords in given]


@pytest.mark.parametrize(
    "name",
    [name if name in ("attention", "drop-in", "operator by its name") else pytest.param(name, marks=pytest.mark.long)
     for name in CALLS],
)  # fmt: skip
def test_who_looks_on_sees_the_operator(fake_gpu: FakeCuda, name: str) -> None:
    """Modes, transforms, traces, profiles and subclasses of tensors, also after calls that were known again."""
    q, k, v = tensors()
    call = CALLS[name]
    for _ in range(2):
        call(q, k, v)
    # Its mode is one of PyTorch's own, which the guards of its compiler do not see.
    assert re.search(r"pyfmha(_fake_gpu)?\.attention", make_fx(lambda x: call(x, k, v))(q).code)
    launched = len(fake_gpu.launches())

    class Looking(TorchDispatchMode):
        seen: ClassVar[list[Any]] = []

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen.append(function)
            return function(*args, **(kwargs or {}))

    class Function(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Looking.seen.append(function)
            return function(*args, **(kwargs or {}))

    class Own(torch.Tensor):
        pass

    with Looking():
        call(q, k, v)
    with Function():
        call(q, k, v)
    packets = torch.ops.pyfmha.attention, torch.ops.pyfmha_fake_gpu.attention
    overloads = [overload for packet in packets for overload in (packet, packet.default, packet.full)]
    if name != "operator past its own calls":  # it is what a mode for functions in Python sees called
        assert len([seen for seen in Looking.seen if seen in overloads]) == 2
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiled:
        call(q, k, v)
    seen = {event.name for event in profiled.events()}
    assert seen & {"pyfmha::attention", "pyfmha_fake_gpu::attention"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and head sizes are constants
        traced = torch.jit.trace(lambda x: call(x, k, v), q, check_trace=False)
    assert re.search("pyfmha(_fake_gpu)?::attention", str(traced.graph))
    assert isinstance(call(q.as_subclass(Own), k, v), Own)
    assert re.search(r"pyfmha(_fake_gpu)?\.attention", make_fx(lambda x: call(x, k, v))(q).code)
    if not name.startswith("operator"):  # the real one is PyTorch's arithmetic here
        assert len(fake_gpu.launches()) == launched
    launched = len(fake_gpu.launches())
    call(q, k, v)
    assert len(fake_gpu.launches()) == launched + 1


def test_a_gradient_is_refused_after_calls_that_were_known_again(fake_gpu: FakeCuda) -> None:
    q, k, v = tensors()
    for _ in range(2):
        pyfmha.torch.attention(q, k, v)
    launched = len(fake_gpu.launches())
    out = pyfmha.torch.attention(q, k.requires_grad_(), v)
    with pytest.raises(PluginError, match="attention has no gradient here"):
        out.sum().backward()
    assert len(fake_gpu.launches()) == launched  # it went through the operator, which is PyTorch's arithmetic here


@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_captured_in_a_graph(fake_gpu: FakeCuda, name: str) -> None:
    """What is prepared loads, allocates and waits for nothing but what PyTorch's allocator does."""
    given = tensors()
    CALLS[name](*given)
    before = len(fake_gpu.launches())
    fake_gpu.begin_capture()
    for _ in range(2):
        CALLS[name](*given)
    fake_gpu.end_capture()
    assert fake_gpu.violations()[0] == 0
    assert len(fake_gpu.launches()) == before + 2


def test_a_launch_is_on_the_device_of_its_tensors(fake_gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where another is PyTorch's current one, before and after; its stream and memory are of the tensors' device."""
    current, seen = [0], []

    @contextmanager
    def on_device(device: Any) -> Iterator[None]:
        before, current[0] = current[0], -1 if device in (-1, torch.device("cpu")) else device
        yield
        current[0] = before

    def empty(*arguments: Any) -> torch.Tensor:
        seen.append(current[0])
        return torch._C._dynamo.guards._empty_strided_cpu(*arguments)

    monkeypatch.setattr(torch.cuda, "device", on_device)
    monkeypatch.setattr(launching, "_current_device", lambda: current[0])
    monkeypatch.setattr(launching, "empty", empty)
    monkeypatch.setattr(launching, "_stream_of", lambda device: seen.append((device, current[0])) or STREAM)
    for call in CALLS.values():
        for _ in range(2):
            seen.clear()
            call(*tensors())
            assert set(seen) == {-1, (-1, -1)}
            assert current == [0]


@pytest.mark.parametrize("name", CALLS)
def test_what_was_known_without_a_gradient_is_refused_with_one(
    fake_gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(operator, "attention_op", attention_op)
    q, k, v = tensors()
    for x in (q, q.clone().requires_grad_()):
        with torch.no_grad():
            for _ in range(3):
                CALLS[name](x, k, v)
    assert len(fake_gpu.launches()) == 6
    monkeypatch.setattr(functional, "why_not", WHY_NOT)
    out = CALLS[name](x, k, v)
    if name == "drop-in":  # it leaves the call to PyTorch
        assert out.requires_grad
        return
    with pytest.raises(PluginError, match="attention has no gradient here"):
        out.sum().backward()


def test_what_is_known_again_is_bounded(fake_gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "MOST_RECENT", 2)
    monkeypatch.setattr(plain, "MOST_FORMS", 3)
    for scale in (0.5, 0.25, 0.125, 0.5):
        pyfmha.torch.attention(*tensors(), scale=scale)
    assert len(functional._recent.calls) == 2
    for rows in range(1, 6):
        pyfmha.torch.attention(*tensors(rows=rows), scale=0.5)
    assert [len(known) for known in functional._recent.calls.values()] == [1, 3]


BIAS, MASK, SINKS = torch.zeros(1, 50), torch.ones(50).bool(), torch.ones(HEADS)
SPELLED: list[tuple[str, tuple[Any, ...], dict[str, Any], bool]] = [
    ("_op", (0.5,), {}, True), ("_op", (0.5, False), {}, True), ("_op", (), {"scale": 0.5, "causal": True}, True),
    ("default", (0.5,), {"causal": False}, True), ("default", (0.5, True), {}, True),
    ("full", (0.5,), {"window_left": 3, "softcap": 2.0}, True), ("full", (0.5, True, False, 3), {}, True),
    ("full", (0.5,), {"layout": "bhsd", "bias": None}, True), ("_op", (0.5,), {"window_right": 4}, True),
    ("full", (0.5,), {"kv_lengths": INTS}, True), ("full", (0.5,), {"return_lse": True}, True),
    ("_op", (0.5,), {"mask": MASK, "q_lengths": INTS, "softcap": 2.0, "bias": BIAS}, True),
    ("full", (0.5, True, False, -1, -1, 0.0, "bhsd", None, INTS), {"sinks": SINKS, "bias": BIAS}, True),
    ("_op", (0.5, False), {"kv_lengths": None, "return_lse": True}, True),
    ("full", (), {"sinks": SINKS, "kv_lengths": INTS, "scale": 0.5, "mask": None, "bias": BIAS}, True),
    ("full", (0.5,), {"kv_lengths": INTS.long()}, False),
    ("full", (0.5,), {"bias": torch.nn.Parameter(BIAS, False)}, False),
]  # fmt: skip


def counted_operator(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[Any]]:
    """An operator whose calls are looked after, and what the dispatcher gets of them."""
    monkeypatch.setattr(torch.jit._builtins, "_register_builtin", lambda function, name: None)
    got: list[Any] = []

    def counted(call: Any) -> Any:
        def dispatched(*arguments: Any, **named: Any) -> Any:
            got.append((arguments[3:], named))
            return call(*arguments, **named)

        return SimpleNamespace(_op=dispatched)

    operators = {name: counted(call) for name, call in DISPATCHED.items()}
    packet = SimpleNamespace(**operators, _op=counted(DISPATCHED["full"])._op, _qualified_op_name="")
    direct.launch_at_once(packet, operator._recent, operator.KEYWORDS)
    calls = {"_op": packet._op, **{name: getattr(packet, name)._op for name in operators}}
    return calls, got


@pytest.mark.parametrize(("name", "given", "named", "known"), SPELLED, ids=range(len(SPELLED)))
def test_the_dispatcher_sees_the_first_of_calls_that_are_alike(
    fake_gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch, name: str, given: Any, named: dict[str, Any], known: bool
) -> None:
    """However keywords are given; each of those whose tensors are converted first, or of a class of their own. All
    launch the same."""
    calls, dispatched = counted_operator(monkeypatch)
    q, k, v = tensors()
    for _ in range(3):
        calls[name](q, k, v, *given, **named)
    assert len(dispatched) == (1 if known else 3)
    DISPATCHED["full"](q, k, v, *given, **named)
    first, *others = [one.params for one in fake_gpu.launches()]
    assert [first[9:]] * 3 == [params[9:] for params in others]
    addresses = {x.data_ptr() for x in (q, k, v, *given, *named.values()) if isinstance(x, torch.Tensor)}
    where = [[(at, raw) for at, raw in enumerate(params) if int.from_bytes(raw, "little") in addresses]
             for params in (first, *others)]  # fmt: skip
    assert where == [where[0]] * 4
    assert len(where[0]) >= 3
    calls[name](q[:, :, :7], k, v, *given, **named)
    assert struct.pack("<i", 7) in fake_gpu.launches()[-1].params
    assert struct.pack("<i", 7) not in first


def test_what_the_dispatcher_refuses_is_refused_each_time(fake_gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, dispatched = counted_operator(monkeypatch)
    q, k, v = tensors()
    calls["_op"](q, k, v, 0.5)
    calls["_op"](q, k, v, scale=0.5)
    wrong: list[tuple[Any, dict[str, Any]]] = [
        ((q, k, v), {}), ((q, k, v, [0.5]), {}), ((q, k, v, "a"), {}), ((q, k, v, 0.5), {"softcaps": 2.0}),
        ((q, k, 3, 0.5), {}), ((q, k, v, 0.5), {"scale": 0.5}), ((q, k, v), {"scale": [0.5]}),
    ]  # fmt: skip
    for arguments, named in wrong * 2:
        with pytest.raises((RuntimeError, TypeError), match="pyfmha_fake_gpu::attention"):
            calls["full"](*arguments, **named)
    assert (len(dispatched), len(fake_gpu.launches())) == (16, 2)


@pytest.mark.parametrize("name", ["operator", "operator of few keywords", "operator by its name"])
def test_none_is_no_tensor(fake_gpu: FakeCuda, name: str) -> None:
    """PyTorch's dispatcher passes it on."""
    q, k, v = tensors()
    CALLS[name](q, k, v)
    for given, text in (((q, k, None), "v is None"), ((None, k, None), "q, v is None")):
        with pytest.raises(PluginError, match=f"^{text}; q, k and v are tensors"):
            CALLS[name](*given)
    with pytest.raises(PluginError, match=r"^k is None"):
        torch.ops.pyfmha.attention(q, None, v, 0.5)


def test_keywords_are_those_that_the_dispatcher_knows() -> None:
    arguments = operator.attention_op._schema.arguments[3:]
    assert list(operator.KEYWORDS) == [argument.name for argument in arguments]
    assert {argument.name: argument.default_value for argument in arguments} == {**operator.KEYWORDS, "scale": None}


def test_the_same_keywords_with_a_tensor_and_with_none_take_turns(
    fake_gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, dispatched = counted_operator(monkeypatch)
    q, k, v = tensors()
    for _ in range(3):
        for lengths, sinks in ((INTS, None), (None, None), (INTS, SINKS), (None, SINKS)):
            calls["full"](q, k, v, 0.5, kv_lengths=lengths, sinks=sinks)
            found = {raw for raw in fake_gpu.launches()[-1].params if len(raw) == 8}
            for tensor in (INTS, SINKS):
                given = tensor is lengths or tensor is sinks
                assert (struct.pack("<Q", tensor.data_ptr()) in found) == given
    assert len(dispatched) == 4


def test_ways_of_giving_keywords_are_kept_up_to_a_number(fake_gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "MOST_SPELLINGS", 2)
    calls, dispatched = counted_operator(monkeypatch)
    for scale in (0.5, 0.25, 0.125, 0.5, 0.5):
        calls["full"](*tensors(), scale=scale)
    assert [named["scale"] for _, named in dispatched] == [0.5, 0.25, 0.125, 0.5]


@pytest.mark.long
def test_torchscript_and_the_compiler_know_the_operator() -> None:
    q, k, v = tensors()

    def program(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.ops.pyfmha.attention(q, k, v, 0.5)[0]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        scripted = torch.jit.script(program)
    assert "pyfmha::attention" in str(scripted.graph)
    torch.testing.assert_close(scripted(q, k, v), program(q, k, v))
    exported = torch.export.export(Program(program), (q, k, v))
    assert operator.plain_op in {node.target for node in exported.graph.nodes}


class Program(torch.nn.Module):
    """A function as a module."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        return self.function(*tensors)


def test_a_pytorch_that_keeps_its_calls_elsewhere_goes_by_the_dispatcher() -> None:
    packet = SimpleNamespace(_op=print, default=SimpleNamespace(_op=print), full=SimpleNamespace())
    direct.launch_at_once(packet, operator._recent, operator.KEYWORDS)
    assert (packet._op, packet.default._op) == (print, print)


class Passing(torch.autograd.Function):
    """A function of a user's that returns the pair."""

    @staticmethod
    def forward(context: Any, weight: torch.Tensor, lse: torch.Tensor) -> Any:
        return weight * 2, NOTHING_OF[0]

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0], None


NOTHING_OF: list[torch.Tensor] = []
WEIGHT = torch.ones(1, requires_grad=True)


def passed(lse: torch.Tensor) -> None:
    NOTHING_OF[:] = [lse]
    Passing.apply(WEIGHT, lse)


CHANGES: dict[str, Callable[[torch.Tensor], Any]] = {
    "resized": lambda lse: lse.resize_(5), "without elements": lambda lse: lse.resize_(0, 5),
    "set": lambda lse: lse.set_(torch.ones(3)), "as out": lambda lse: torch.add(torch.ones(3), 1, out=lse),
    "added to": lambda lse: lse.add_(WEIGHT), "asked for": lambda lse: lse.requires_grad_(), "an output": passed,
}  # fmt: skip


def in_inference(change: Callable[[torch.Tensor], Any], lse: torch.Tensor) -> None:
    with torch.inference_mode():
        change(lse)


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("change", [lambda change, lse: change(lse), in_inference], ids=["gradients", "inference"])
@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
def test_what_stands_for_no_log_sum_exp_is_one_tensor_until_somebody_changes_it(
    fake_gpu: FakeCuda, name: str, change: Any
) -> None:
    """An allocation of 0.7 us of an H200's host less. What somebody did to it no other call sees."""
    q, k, v = tensors()
    dispatched, one, two, three = (plain_op(q, k, v, 0.5)[1] for _ in range(4))
    assert one is two is three is not dispatched
    change(CHANGES[name], three)
    for other in (plain_op(q, k, v, 0.5)[1], plain_op(q, k, v, 0.5)[1]):
        assert (other.shape, other.dtype, other.device) == ((0,), torch.float32, q.device)
        assert (other.requires_grad, other.is_inference()) == (False, False)
        assert other.untyped_storage().nbytes() == 0
    assert DISPATCHED["default"](q, k, v, 0.5)[1] is not other
    assert all(x is not other for x in attention_op(q, k, v, 0.5, kv_lengths=INTS))  # each form has its own


@pytest.mark.parametrize("first", [True, False], ids=["inference first", "gradients first"])
def test_what_stands_for_no_log_sum_exp_is_of_use_in_any_mode(fake_gpu: FakeCuda, first: bool) -> None:
    """A tensor of inference mode could not be kept for a backward pass outside of it."""
    with torch.inference_mode():
        q, k, v = tensors()
    for inference in (first, first, not first, not first):
        with torch.inference_mode(inference):
            out, lse = plain_op(q, k, v, 0.5)
            assert out.is_inference() == inference
    (WEIGHT * lse).sum().backward()


@pytest.mark.long
@pytest.mark.parametrize("op", [plain_op, attention_op], ids=["default", "full"])
def test_calls_that_are_known_again_are_clean_to_opcheck_and_compiled(fake_gpu: FakeCuda, op: Any) -> None:
    q, k, v = tensors()

    def program(q: torch.Tensor) -> Any:
        (first, nothing), (second, none) = op(q, k, v, 0.5), op(q, k, v, 0.5)
        return first.shape, nothing, second * 0, none, nothing.add(1), none.mul_(2)

    for _ in range(2):
        program(q)
    # Not what it says of AOT dispatch: Out, which no kernel writes here, would be compared.
    torch.library.opcheck(op, (q, k, v, 0.5), test_utils=("test_schema", "test_faketensor"))
    compiled = torch.compile(program, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        found = compiled(q)
        assert [x.shape for x in found[1:]] == [(0,), q.shape, (0,), (0,), (0,)]
        assert len({id(x) for x in found[1:]}) == 4  # the last is the second call's, written to
    assert all(x.shape == (0,) for x in (op(q, k, v, 0.5)[1], op(q, k, v, 0.5)[1]))


def test_another_version_of_pytorch_goes_by_the_dispatcher(fake_gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """One without the names that tell who looks on, or that knows no tensors again."""
    monkeypatch.setattr(plain, "_TensorGuards", None)
    for _ in range(2):
        pyfmha.torch.attention(*tensors())
    assert (len(fake_gpu.launches()), functional._recent.calls) == (2, {})
    monkeypatch.delattr(torch._C, "_get_tracing_state")
    monkeypatch.setattr(plain, "_traced", plain._lookers_on()[3])
    pyfmha.torch.attention(*tensors())
    assert len(fake_gpu.launches()) == 2


def test_tensors_are_read_as_they_lie(fake_gpu: FakeCuda) -> None:
    """Those of models are: a projection, cut into heads, and turned; or one projection for Q, K and V."""
    packed = torch.zeros(2, 40, 3, HEADS, SIZE).half()
    q, k, v = (x.transpose(1, 2) for x in packed.unbind(2))
    row, size = HEADS * SIZE, SIZE

    out, _ = attention_op(q, k, v, 0.5)

    (launch,) = fake_gpu.launches()
    assert pointers(launch.params)[2:5] == [x.data_ptr() for x in (q, k, v)]
    assert strides(launch.params) == [*[3 * 40 * row, size, 3 * row] * 3, 40 * row, size, row]
    assert out.stride() == (40 * row, size, row, 1)
    turned = out.transpose(1, 2)
    assert turned.is_contiguous()
    attention_op(*(x.transpose(1, 2) for x in (q, k, v)), 0.5, layout="bshd")
    assert strides(fake_gpu.launches()[-1].params) == strides(launch.params)


def test_of_an_axis_of_one_element_the_stride_is_not_looked_at(fake_gpu: FakeCuda) -> None:
    q, k, v = (torch.zeros(1, HEADS, 40, SIZE).half() for _ in range(3))
    odd = q.as_strided(q.shape, (3, 40 * SIZE, SIZE, 1))

    attention_op(odd, k, v, 0.5)
    attention_op(q, k, v, 0.5)

    first, second = fake_gpu.launches()
    assert strides(first.params) == strides(second.params)


@pytest.mark.parametrize(
    "make",
    [
        lambda q: q.transpose(2, 3).contiguous().transpose(2, 3), lambda q: q[:, :1].expand(q.shape),
        lambda q: torch.zeros(*q.shape[:3], 2 * SIZE).half()[..., ::2],
    ],
)  # fmt: skip
def test_tensors_with_gaps_inside_rows_or_expanded_are_copied_first(fake_gpu: FakeCuda, make: Any) -> None:
    q, k, v = tensors()

    attention_op(q, make(k), v, 0.5)

    (launch,) = fake_gpu.launches()
    by_heads, by_rows = [50 * SIZE, SIZE], [SIZE, HEADS * SIZE]
    assert strides(launch.params)[3:6] in ([HEADS * 50 * SIZE, *by_heads], [HEADS * 50 * SIZE, *by_rows])
    assert pointers(launch.params)[3] != k.data_ptr()


def test_bias_mask_sinks_and_values_of_another_size(fake_gpu: FakeCuda) -> None:
    """A bias is read as it lies, also where it was expanded or cut out of a larger one; a mask of fewer axes too."""
    q, k, _ = tensors()
    v = torch.zeros(2, HEADS, 50, 24).half()
    bias = torch.zeros(1, HEADS, 64, 128).half()[:, :, :40, :50].expand(2, -1, -1, -1)
    mask, sinks = torch.zeros(40, 1).bool(), torch.zeros(2 * HEADS)[::2]

    out, _ = attention_op(q, k, v, 0.5, bias=bias, mask=mask, sinks=sinks)

    (launch,) = fake_gpu.launches()
    given = dict(zip((name for name, _ in ARGUMENTS), launch.params, strict=False))

    def pointer(name: str) -> int:
        return struct.unpack("<Q", given[name])[0]

    assert [pointer(name) for name in ("Out", "Q", "K", "V")] == [x.data_ptr() for x in (out, q, k, v)]
    assert [pointer(name) for name in ("Bias", "BiasFp32", "Mask", "Sinks")] == [
        bias.data_ptr(), 0, mask.data_ptr(), 0
    ]  # fmt: skip
    assert pointer("SinksFp32") not in (0, sinks.data_ptr())  # a dense copy
    assert (out.shape, out.stride()) == ((2, HEADS, 40, 24), (HEADS * 40 * 24, 40 * 24, 24, 1))
    assert struct.unpack("<ii", given["head_size"] + given["v_head_size"]) == (SIZE, 24)
    strided = {
        name: [struct.unpack("<q", given[f"{name}_stride_{axis}"])[0] for axis in axes]
        for name, axes in {"v": "bhs", "out": "bhs", "bias": "bhqk", "mask": "bhqk"}.items()
    }
    assert strided == {
        "v": [HEADS * 50 * 24, 50 * 24, 24], "out": [HEADS * 40 * 24, 40 * 24, 24],
        "bias": [0, 64 * 128, 128, 1], "mask": [0, 0, 1, 0],
    }  # fmt: skip


def test_a_ragged_batch_with_a_bias_of_its_longest_sequence(fake_gpu: FakeCuda) -> None:
    q, k, v = (torch.zeros(9, HEADS, SIZE).half() for _ in range(3))
    starts, bias = torch.tensor([0, 4, 9]), torch.zeros(HEADS, 5, 5)

    attention_op(q, k, v, 0.5, layout="bshd", cu_seqlens_q=starts, cu_seqlens_kv=starts, bias=bias)

    (launch,) = fake_gpu.launches()
    given = dict(zip((name for name, _ in ARGUMENTS), launch.params, strict=False))
    assert [struct.unpack("<Q", given[name])[0] for name in ("Bias", "BiasFp32")] == [0, bias.data_ptr()]
    assert [struct.unpack("<q", given[f"bias_stride_{axis}"])[0] for axis in "bhqk"] == [0, 25, 5, 1]


def test_what_is_beside_is_part_of_the_form(fake_gpu: FakeCuda) -> None:
    biases = [torch.zeros(40, 50).half(), torch.zeros(1, 1, 40, 50).half(), torch.zeros(50, 40).half().T]
    for bias in (*biases, biases[0].float(), biases[0], None):
        attention_op(*tensors(), 0.5, bias=bias)
    attention_op(*tensors(), 0.5, mask=torch.zeros(40, 50).bool())

    assert len(operator._ready) == 6
    assert len(fake_gpu.launches()) == 7


def test_only_so_many_forms_are_kept(fake_gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator, "KEPT", 2)
    for rows in (1, 2, 3, 1):
        attention_op(*tensors(rows=rows), 0.5)
    assert [key[0][2] for key in operator._ready] == [2, 3]  # a call like the first still knows what it launches


def test_what_cannot_be_launched(fake_gpu: FakeCuda) -> None:
    with pytest.raises(PluginError, match="does not hold fmha_fwd_d256_fp16"):
        attention_op(*[torch.zeros(2, HEADS, 4, 200).half()] * 3, 0.5)
    with pytest.raises(PluginError, match="as many rows and heads"):
        attention_op(*tensors()[:2], tensors(keys=51)[2], 0.5)
    with pytest.raises(PluginError, match="on one device, got cpu, meta, cpu"):
        operator.ready_for(tensors()[0], tensors()[1].to("meta"), tensors()[2], 0.5)
    with pytest.raises(PluginError, match="mask is on meta, Q on cpu; give both on one device"):
        operator.ready_for(*tensors(), 0.5, mask=torch.zeros(40, 50, dtype=torch.bool, device="meta"))
    assert operator._ready == {}
    assert launching.lacking("fp16", 33) is None
    assert "does not hold fmha_biased_d128_fp16" in str(launching.lacking("fp16", 65))


def test_without_a_library_the_error_says_what_builds_one(monkeypatch: pytest.MonkeyPatch) -> None:
    launching.library.cache_clear()
    monkeypatch.setenv("PYFMHA_LIBRARY", "/nowhere/libpyfmha.so")
    with pytest.raises(LibraryError, match="build the library: pyfmha build"):
        launching.library()
