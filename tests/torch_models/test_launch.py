"""What the operator launches, on the fake driver: PyTorch's CPU memory stands for the GPU's, and no kernel runs."""

import struct
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from fake_cuda import FakeCuda
from trt_double.scene import HEADS, SIZE

from pyfmha.attention.biased import ARGUMENTS
from pyfmha.errors import LibraryError, PluginError
from pyfmha.runtime.library import Library
from pyfmha.torch import launch as launching
from pyfmha.torch import operator

pytest_plugins = ("trt_double.fixtures",)

STREAM = 0x5EED


@pytest.fixture
def fake_gpu(forward_library: Library, fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """PyTorch's current device and stream are the fake driver's."""
    assert fake_cuda.c.cuInit(0) == 0
    fake_cuda.use_context(0)
    launching._attached.cache_clear()
    operator._ready.clear()
    monkeypatch.setattr(launching, "library", lambda: forward_library)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(launching, "_current_device", lambda: -1)  # that of tensors of the CPU
    monkeypatch.setattr(launching, "_stream_of", lambda device: STREAM)
    yield fake_cuda
    launching._attached.cache_clear()
    operator._ready.clear()


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

    out, lse = operator._on_gpu(
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
    operator._on_gpu(*tensors(), 0.5)
    before = fake_gpu.all_calls()

    for _ in range(3):
        operator._on_gpu(*tensors(), 0.5)

    later = dict(fake_gpu.all_calls() - before)
    assert later == {"cuLaunchKernel": 3, "cuCtxGetCurrent": 3, "cuCtxGetId": 3}
    operator._on_gpu(*tensors(rows=41), 0.5)
    assert integers(fake_gpu.launches()[-1].params, 14, 2) == [41, 50]
    operator._on_gpu(*tensors(), 0.5)  # what was prepared for another shape does not disturb it
    assert integers(fake_gpu.launches()[-1].params, 14, 2) == [40, 50]


def test_tensors_are_read_as_they_lie(fake_gpu: FakeCuda) -> None:
    """Those of models are: a projection, cut into heads, and turned; or one projection for Q, K and V."""
    packed = torch.zeros(2, 40, 3, HEADS, SIZE).half()
    q, k, v = (x.transpose(1, 2) for x in packed.unbind(2))
    row, size = HEADS * SIZE, SIZE

    out, _ = operator._on_gpu(q, k, v, 0.5)

    (launch,) = fake_gpu.launches()
    assert pointers(launch.params)[2:5] == [x.data_ptr() for x in (q, k, v)]
    assert strides(launch.params) == [*[3 * 40 * row, size, 3 * row] * 3, 40 * row, size, row]
    assert out.stride() == (40 * row, size, row, 1)
    turned = out.transpose(1, 2)
    assert turned.is_contiguous()
    operator._on_gpu(*(x.transpose(1, 2) for x in (q, k, v)), 0.5, layout="bshd")
    assert strides(fake_gpu.launches()[-1].params) == strides(launch.params)


def test_of_an_axis_of_one_element_the_stride_is_not_looked_at(fake_gpu: FakeCuda) -> None:
    q, k, v = (torch.zeros(1, HEADS, 40, SIZE).half() for _ in range(3))
    odd = q.as_strided(q.shape, (3, 40 * SIZE, SIZE, 1))

    operator._on_gpu(odd, k, v, 0.5)
    operator._on_gpu(q, k, v, 0.5)

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

    operator._on_gpu(q, make(k), v, 0.5)

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

    out, _ = operator._on_gpu(q, k, v, 0.5, bias=bias, mask=mask, sinks=sinks)

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

    operator._on_gpu(q, k, v, 0.5, layout="bshd", cu_seqlens_q=starts, cu_seqlens_kv=starts, bias=bias)

    (launch,) = fake_gpu.launches()
    given = dict(zip((name for name, _ in ARGUMENTS), launch.params, strict=False))
    assert [struct.unpack("<Q", given[name])[0] for name in ("Bias", "BiasFp32")] == [0, bias.data_ptr()]
    assert [struct.unpack("<q", given[f"bias_stride_{axis}"])[0] for axis in "bhqk"] == [0, 25, 5, 1]


def test_what_is_beside_is_part_of_the_form(fake_gpu: FakeCuda) -> None:
    biases = [torch.zeros(40, 50).half(), torch.zeros(1, 1, 40, 50).half(), torch.zeros(50, 40).half().T]
    for bias in (*biases, biases[0].float(), biases[0], None):
        operator._on_gpu(*tensors(), 0.5, bias=bias)
    operator._on_gpu(*tensors(), 0.5, mask=torch.zeros(40, 50).bool())

    assert len(operator._ready) == 6
    assert len(fake_gpu.launches()) == 7


def test_only_so_many_forms_are_kept(fake_gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator, "KEPT", 2)
    for rows in (1, 2, 3, 1):
        operator._on_gpu(*tensors(rows=rows), 0.5)
    assert [key[0][2] for key in operator._ready] == [3, 1]


def test_what_cannot_be_launched(fake_gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PluginError, match="does not hold fmha_fwd_d256_fp16"):
        operator._on_gpu(*[torch.zeros(2, HEADS, 4, 200).half()] * 3, 0.5)
    with pytest.raises(PluginError, match="as many rows and heads"):
        operator._on_gpu(*tensors()[:2], tensors(keys=51)[2], 0.5)
    with pytest.raises(PluginError, match="on one device, got cpu, meta, cpu"):
        operator._on_gpu(tensors()[0], tensors()[1].to("meta"), tensors()[2], 0.5)
    with pytest.raises(PluginError, match="mask is on meta, Q on cpu; give both on one device"):
        operator._on_gpu(*tensors(), 0.5, mask=torch.zeros(40, 50, dtype=torch.bool, device="meta"))
    assert operator._ready == {}
    assert launching.lacking("fp16", 33) is None
    assert "does not hold fmha_biased_d128_fp16" in str(launching.lacking("fp16", 65))
    monkeypatch.undo()
    launching.library.cache_clear()
    monkeypatch.setenv("PYFMHA_LIBRARY", "/nowhere/libpyfmha.so")
    with pytest.raises(LibraryError, match="build the library: pyfmha build"):
        launching.library()
