"""Other packages' tensors in the library's functions: where they are, and in which order of streams."""

import dataclasses
import struct
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeCuda
from helpers import INVALID_VALUE
from producers import BF16, ByDlpack, ByInterface

from pyfmha.errors import DriverError, TensorError
from pyfmha.runtime.arguments import with_addresses
from pyfmha.runtime.library import Function, Library
from pyfmha.runtime.tensors import TensorView, host_array, is_tensor, view

X, Y, Z = 0x7000_0000, 0x7000_1000, 0x7000_2000
PROTOCOLS = [ByDlpack, ByInterface]


@pytest.fixture
def add(small_library_path: Path, fake_cuda: FakeCuda) -> Function:
    fake_cuda.c.cuInit(0)
    fake_cuda.use_context()
    for address in (X, Y, Z):
        fake_cuda.set_memory(address, 4096)
    function = Library(small_library_path)["add"]
    function.load()
    return function


def pointers(fake_cuda: FakeCuda) -> list[int]:
    return [struct.unpack("<Q", parameter)[0] for parameter in fake_cuda.launches()[-1].params[:3]]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_tensors_are_used_where_they_are(add: Function, fake_cuda: FakeCuda, protocol: Any) -> None:
    add(5, protocol(X, (1024,)), Y, protocol(Z, (4, 256), strides=None), 1024)

    assert pointers(fake_cuda) == [X, Y, Z]
    assert fake_cuda.launches()[-1].stream == 5
    assert add.variant(protocol(X, (1024,)), Y, Z, 1024) == add.variant(X, Y, Z, 1024)


@pytest.mark.parametrize(("stream", "asked"), [(0, 1), (1, 1), (2, 2), (0x5EED, 0x5EED)])
def test_of_dlpack_the_producer_is_told_the_stream(add: Function, stream: int, asked: int) -> None:
    tensor = ByDlpack(X, (1024,))

    add(stream, tensor, Y, Z, 1024)
    add.variant(tensor, Y, Z, 1024)

    assert tensor.streams == [asked, -1]  # to say which variant would serve, nothing is used
    assert tensor.given_back == 2


@pytest.mark.parametrize(("stream", "theirs", "waits"), [(5, 7, [(5, 7, 0)]), (5, 1, [(5, 1, 0)]), (0, 2, [(1, 2, 0)])])
def test_of_the_interface_our_stream_waits_for_theirs(
    add: Function, fake_cuda: FakeCuda, stream: int, theirs: int, waits: list[Any]
) -> None:
    add(stream, ByInterface(X, (1024,), stream=theirs), Y, Z, 1024)

    assert fake_cuda.waits() == waits  # before the launch
    assert fake_cuda.events_alive() == 0


@pytest.mark.parametrize(("stream", "theirs"), [(5, 5), (5, None), (0, 1)])
def test_nothing_waits_where_there_is_nothing_to_wait_for(
    add: Function, fake_cuda: FakeCuda, stream: int, theirs: int | None
) -> None:
    add(stream, ByInterface(X, (1024,), stream=theirs), Y, Z, 1024)

    assert fake_cuda.waits() == []
    assert fake_cuda.calls("cuEventCreate") == 0


def test_a_wait_that_the_driver_refuses_is_no_launch(add: Function, fake_cuda: FakeCuda) -> None:
    fake_cuda.fail("cuEventRecord", INVALID_VALUE)

    with pytest.raises(DriverError, match="cuEventRecord failed: CUDA error 1"):
        add(5, ByInterface(X, (1024,), stream=7), Y, Z, 1024)

    assert (fake_cuda.launch_count(), fake_cuda.events_alive()) == (0, 0)


WRONG: list[tuple[Callable[[], Any], str]] = [
    (lambda: np.zeros(4, np.float32), "X is in host memory; give a tensor on GPU 0"),
    (lambda: ByDlpack(X, (4,), device=(1, 0)), "X is in host memory; give a tensor on GPU 0"),
    (lambda: ByDlpack(X, (4,), device=(3, 0)), "X is on pinned host memory; give a tensor on a GPU or on the host"),
    (lambda: ByDlpack(X, (4,), device=(10, 0)), "X is on a device of DLPack's type 10"),
    (lambda: ByDlpack(X, (4,), device=(2, 1)), "X is on GPU 1; it is used on GPU 0: move one of the two"),
    (lambda: ByDlpack(X, (4,), np.int32), r"X is i32 \[4\]; \*fp32 is a pointer to fp32"),
    (lambda: ByDlpack(X, (4,), np.float16, code=BF16), r"X is bf16 \[4\]; \*fp32 is"),
    (lambda: ByDlpack(X, (4, 2), strides=(1, 4)), r"X is fp32 \[4, 2\] with strides \[1, 4\]; the function takes no"),
    (lambda: ByDlpack(X, (4,), version=(2, 0)), "its DLPack is version 2.0; versions 0 and 1 are read"),
    (lambda: ByInterface(X, (4, 2), strides=(4, 16)), r"with strides \[1, 4\]; the function takes no strides"),
    (lambda: ByInterface(X, (4,), np.float64), r"X is fp64 \[4\]; \*fp32 is a pointer to fp32"),
    (lambda: ByInterface(X, (4,), ">f4"), "X is of type '>f4'; give little-endian numbers"),
    (lambda: ByInterface(X, (4,), mask=object()), "X is a masked array"),
    (lambda: ByInterface(X, (4,), stream=0), "X says that its stream is 0, which is ambiguous"),
    (lambda: ByInterface(0x1234, (4,)), "0x1234 is no memory of a GPU that this process uses"),
]


@pytest.mark.parametrize(("make", "text"), WRONG, ids=[text for _, text in WRONG])
def test_what_cannot_be_used_is_named(add: Function, fake_cuda: FakeCuda, make: Callable[[], Any], text: str) -> None:
    for call in (lambda: add(5, make(), Y, Z, 1024), lambda: add.variant(make(), Y, Z, 1024)):
        with pytest.raises(TensorError, match=f"add: {text}" if text.startswith("X") else text):
            call()

    assert fake_cuda.launch_count() == 0


def test_of_the_interface_the_driver_says_the_device(add: Function, fake_cuda: FakeCuda) -> None:
    fake_cuda.set_memory(0x8000_0000, 4096, device=1)

    with pytest.raises(TensorError, match="X is on GPU 1; it is used on GPU 0"):
        add(5, ByInterface(0x8000_0000, (4,)), Y, Z, 1024)


def test_an_integer_tensor_of_one_element_is_no_pointer(add: Function) -> None:
    """It has ``__index__``, so that struct would pack the number in it."""

    class One(ByDlpack):
        def __index__(self) -> int:
            return X

    with pytest.raises(TensorError, match=r"X is i32 \[1\]"):
        add(5, One(Y, (1,), np.int32), Y, Z, 1024)


def test_functions_with_strides_take_tensors_with_gaps(add: Function, fake_cuda: FakeCuda) -> None:
    strided = dataclasses.replace(add.manifest, arguments=(*add.manifest.arguments, ("x_stride_b", "i64")))
    tensor = ByDlpack(X, (4, 2), strides=(1, 4))

    replaced, _ = with_addresses(strided, (7, tensor, Y, Z, 1024, 1), 7)

    assert replaced == (7, X, Y, Z, 1024, 1)


def test_what_a_tensor_says_of_itself() -> None:
    read_only = ByDlpack(X, (2, 3), np.float16, read_only=True, offset=64, device=(13, 0))
    old = ByDlpack(X, (2, 1, 3), np.float16, version=None, code=BF16, strides=(3, 99, 1))

    assert view("X", read_only, None)[:6] == (X, (2, 3), None, "fp16", 0, True)
    assert view("X", old, 0)[:6] == (X, (2, 1, 3), (3, 99, 1), "bf16", 0, False)
    assert view("X", old, 0).is_contiguous
    assert old.streams == [1, 1]
    assert not view("X", ByDlpack(X, (2, 3), strides=(6, 2)), None).is_contiguous
    assert view("X", ByDlpack(X, (0, 3), strides=(9, 9)), None).is_contiguous
    assert [is_tensor(x) for x in (read_only, ByInterface(X, ()), 5, None, "x", ByDlpack)] == [True, True, *[False] * 4]


@pytest.mark.parametrize(
    ("dtype", "kind", "fits"),
    [
        ("u16", "bf16", True), ("u8", "fp8e4nv", True), ("i1", "u8", True), ("u8", "i1", True), ("fp16", "fp16", True),
        ("fp16", "bf16", False), ("i32", "u32", False), ("i8", "fp8e5", False),
    ],
)  # fmt: skip
def test_bits_stand_for_types_that_numpy_lacks(dtype: str, kind: str, fits: bool) -> None:
    assert TensorView(X, (4,), None, dtype, 0, False, None).holds(kind) is fits


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int32, np.int64, np.bool_, np.uint8])
def test_host_memory_as_numpy_sees_it(dtype: Any) -> None:
    values = np.arange(24).reshape(2, 3, 4).astype(dtype)
    for array in (values, values.transpose(2, 0, 1), values[:, ::2], values[:0], values[0, 0, 0]):
        array = np.asarray(array)
        found = view("X", array, 5)  # numpy has no streams and refuses one

        assert (found.device, found.shape) == (None, array.shape)
        np.testing.assert_array_equal(host_array(found), array)
        assert host_array(found).dtype == array.dtype


@pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")
def test_pytorchs_own_tensors() -> None:
    import torch

    values = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    held = host_array(view("X", values, None))

    assert (held.dtype, held.shape) == (np.uint16, (2, 3))
    assert held.ctypes.data == values.data_ptr()
    np.testing.assert_array_equal(held, values.view(torch.uint16).numpy())
    assert not view("X", values.T, None).is_contiguous
    with pytest.raises(TensorError, match=r"X cannot be used: its producer says: .*gradient"):
        view("X", torch.zeros(2, requires_grad=True), None)


@pytest.mark.gpu
@pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")
def test_pytorchs_tensors_on_a_gpu(small_library_path: Path) -> None:
    import torch

    side = torch.cuda.Stream()
    add = Library(small_library_path)["add"]
    x, y = torch.rand(2, 1024, device="cuda")
    z = torch.full((1024,), torch.nan, device="cuda")
    add.load()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        x.add_(1)  # a launch that did not wait for it would read the old ones
        z.fill_(-1)
        add(torch.cuda.default_stream().cuda_stream, x, y, z, 1024)
    torch.cuda.synchronize()
    add.unload()

    assert torch.equal(z, x + y)
