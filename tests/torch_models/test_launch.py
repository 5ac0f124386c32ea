"""What the operator launches, on the fake driver: PyTorch's CPU memory stands for the GPU's, and no kernel runs."""

import struct
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from fake_cuda import FakeCuda
from trt_double.scene import HEADS, SIZE

from pyfmha.errors import LibraryError, PluginError
from pyfmha.runtime.library import Library
from pyfmha.torch import launch as launching
from pyfmha.trt.attention.problem import Features, Problem

pytest_plugins = ("trt_double.fixtures",)

STREAM = 0x5EED


@pytest.fixture
def fake_gpu(forward_library: Library, fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """PyTorch's current device and stream are the fake driver's."""
    assert fake_cuda.c.cuInit(0) == 0
    fake_cuda.use_context(0)
    caches = (launching._plugin, launching._prepared)
    for cache in caches:
        cache.cache_clear()
    monkeypatch.setattr(launching, "library", lambda: forward_library)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=STREAM))
    yield fake_cuda
    for cache in caches:
        cache.cache_clear()


def tensors(rows: int = 40, keys: int = 50, kv_heads: int = HEADS) -> list[torch.Tensor]:
    made = [torch.zeros(2, HEADS, rows, SIZE), *(torch.zeros(2, kv_heads, keys, SIZE) for _ in range(2))]
    return [x.half() for x in made]


def integers(params: tuple[bytes, ...], first: int, count: int) -> list[int]:
    return [struct.unpack("<i", params[at])[0] for at in range(first, first + count)]


def test_a_launch_on_the_current_stream_with_the_tensors_own_memory(fake_gpu: FakeCuda) -> None:
    features = Features(HEADS // 2, softcap=2.0, window=(3, -1), bottom_right=True, return_lse=True, kv_lengths=True)
    problem = Problem(HEADS, SIZE, "fp16", 0.5, True, features)
    inputs = [*tensors(kv_heads=HEADS // 2), torch.tensor([3, 9], dtype=torch.int32)]

    out, lse = launching.launch(problem, inputs)

    (launch,) = fake_gpu.launches()
    pointers = [struct.unpack("<Q", launch.params[at])[0] for at in range(7)]
    q, k, v, lengths = (x.data_ptr() for x in inputs)
    assert launch.stream == STREAM
    assert pointers == [out.data_ptr(), lse.data_ptr(), q, k, v, 0, lengths]
    assert struct.unpack("<ff", b"".join(launch.params[9:11])) == (0.5, 2.0)
    assert integers(launch.params, 11, 6) == [2, HEADS, HEADS // 2, 40, 50, SIZE]
    assert (out.shape, out.dtype) == ((2, HEADS, 40, SIZE), torch.float16)
    assert (lse.shape, lse.dtype) == ((2, HEADS, 40), torch.float32)


def test_a_shape_is_prepared_once_and_later_calls_only_launch(fake_gpu: FakeCuda) -> None:
    problem = Problem(HEADS, SIZE, "fp16", 0.5, False, Features(HEADS))
    launching.launch(problem, tensors())
    before = fake_gpu.all_calls()

    for _ in range(3):
        launching.launch(problem, tensors())

    later = dict(fake_gpu.all_calls() - before)
    assert later == {"cuLaunchKernel": 3, "cuCtxGetCurrent": 3, "cuCtxGetId": 3}
    launching.launch(problem, tensors(rows=41))
    assert integers(fake_gpu.launches()[-1].params, 14, 2) == [41, 50]


def test_tensors_that_are_not_contiguous_are_copied_first(fake_gpu: FakeCuda) -> None:
    problem = Problem(HEADS, SIZE, "fp16", 0.5, False, Features(HEADS))
    q, k, v = tensors()
    turned = q.transpose(1, 2).contiguous().transpose(1, 2)

    (out,) = launching.launch(problem, [turned, k, v])

    (launch,) = fake_gpu.launches()
    assert struct.unpack("<Q", launch.params[2])[0] != turned.data_ptr()
    assert out.is_contiguous()


def test_what_cannot_be_launched(fake_gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    large, served = (Problem(HEADS, size, "fp16", 0.5, False, Features(HEADS)) for size in (200, SIZE))
    with pytest.raises(PluginError, match="does not hold fmha_fwd_d256_fp16"):
        launching.launch(large, [torch.zeros(2, HEADS, 4, 200).half()] * 3)
    with pytest.raises(PluginError, match="shapes are"):
        launching.launch(served, [*tensors()[:2], tensors(keys=51)[2]])
    monkeypatch.undo()
    launching.library.cache_clear()
    monkeypatch.setenv("PYFMHA_LIBRARY", "/nowhere/libpyfmha.so")
    with pytest.raises(LibraryError, match="build the library: pyfmha build"):
        launching.library()
