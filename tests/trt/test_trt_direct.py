"""DirectSession against the fake driver: memory is the host's, and no kernel runs."""

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeCuda
from trt_double.scene import BINDINGS, HEADS, SIZE, open_binding

from pyfmha.errors import DriverError, LaunchError, SpecError
from pyfmha.runtime.library import Library
from pyfmha.trt import DirectSession, PluginError, standin
from pyfmha.trt.attention import direct

pytest_plugins = ("trt_double.fixtures",)


class FakeArray:
    """Device memory in the host's."""

    live = 0

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        self.shape, self.dtype = shape, np.dtype(dtype)
        self._memory = np.zeros(int(np.prod(shape)) * self.dtype.itemsize + 64, np.uint8)
        self.nbytes = int(np.prod(shape)) * self.dtype.itemsize
        self.pointer = (self._memory.ctypes.data + 63) // 64 * 64
        FakeArray.live += 1

    @classmethod
    def of(cls, values: np.ndarray) -> "FakeArray":
        return cls(values.shape, values.dtype)

    def to_host(self) -> np.ndarray:
        return np.zeros(self.shape, self.dtype)

    def free(self) -> None:
        FakeArray.live -= bool(self.pointer)
        self.pointer = 0


@pytest.fixture(params=["standin", *BINDINGS])
def open_session(
    request: pytest.FixtureRequest,
    attention_library: Library,
    fake_cuda: FakeCuda,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., DirectSession]:
    """Opens a session with the classes of each module."""
    trt, reason = (standin, "") if request.param == "standin" else open_binding(request.param)
    if trt is None:
        pytest.skip(reason)

    class FakeDevice:
        def __init__(self, ordinal: int) -> None:
            assert fake_cuda.c.cuInit(0) == 0
            self.context = fake_cuda.use_context(ordinal)

        def make_current(self) -> None:
            fake_cuda.make_current(self.context)

        def synchronize(self) -> None:
            pass

        def close(self) -> None:
            fake_cuda.destroy(self.context)

    class FakeStream:
        handle = 0x5EED

        def synchronize(self) -> None:
            pass

        close = synchronize

    monkeypatch.setattr(direct, "Device", FakeDevice)
    monkeypatch.setattr(direct, "DeviceArray", FakeArray)
    monkeypatch.setattr(direct, "Stream", FakeStream)
    monkeypatch.setattr(FakeArray, "live", 0)

    def session(**changes: Any) -> DirectSession:
        settings = {"num_heads": HEADS, "head_size": SIZE, "causal": True, "library": attention_library}
        return DirectSession(**{**settings, "trt_module": trt, **changes})

    return session


def arrays(batch: int = 2, seq: int = 40, dtype: Any = np.float16) -> dict[str, np.ndarray]:
    return {name: np.ones((batch, HEADS, seq, SIZE), dtype) for name in "QKV"}


@pytest.mark.parametrize(("dtype", "storage"), [("fp16", np.float16), ("bf16", np.uint16), ("fp32", np.float32)])
def test_run(open_session: Callable[..., DirectSession], fake_cuda: FakeCuda, dtype: str, storage: Any) -> None:
    with open_session(dtype=dtype, device=1, scale=0.5) as session:
        out = session.run(arrays(dtype=storage))
        assert set(out) == {"Out"}
        assert (out["Out"].shape, out["Out"].dtype) == ((2, HEADS, 40, SIZE), storage)
        (launch,) = fake_cuda.launches()
        assert (launch.device, launch.stream) == (1, 0x5EED)
        assert b"".join(launch.params[6:10]) == struct.pack("<fiii", 0.5, 2, HEADS, 40)
        assert FakeArray.live == 1  # the workspace
    assert FakeArray.live == 0
    assert fake_cuda.modules_loaded() == 0


def test_shapes_change(open_session: Callable[..., DirectSession], fake_cuda: FakeCuda) -> None:
    with open_session() as session:
        for batch, seq in ((2, 40), (2, 40), (1, 300), (2, 40)):
            session.run(arrays(batch, seq))
            launch = fake_cuda.launches()[-1]
            assert [struct.unpack("<i", p)[0] for p in launch.params[7:10]] == [batch, HEADS, seq]
            assert session.workspace_bytes == 2 * 4 * batch * HEADS * seq
        assert FakeArray.live == 1


def test_tactics(open_session: Callable[..., DirectSession], fake_cuda: FakeCuda) -> None:
    with open_session() as session:
        assert len(session.tactics) == 2
        names = []
        for tactic in (0, *session.tactics):
            session.set_tactic(tactic)
            session.run(arrays())
            names.append(session.algorithm)
        assert names[0] == names[1] != names[2]
        assert len({launch.image_sha256 for launch in fake_cuda.launches()}) == 2
    with open_session(tactic=session.tactics[1]) as session:
        assert session.algorithm == names[2]


def test_lower_level(open_session: Callable[..., DirectSession], fake_cuda: FakeCuda) -> None:
    with open_session() as session:
        session.prepare(3, 17)
        session.enqueue({"Q": 4096, "K": 8192, "V": 12288, "Out": 16384}, 77)
        (launch,) = fake_cuda.launches()
        assert launch.stream == 77
        assert [struct.unpack("<Q", launch.params[i])[0] for i in (0, 3, 4, 5)] == [16384, 4096, 8192, 12288]


def test_unprepared(open_session: Callable[..., DirectSession]) -> None:
    with open_session() as session, pytest.raises(PluginError, match="on_shape_change was not called"):
        session.enqueue({"Q": 1, "K": 2, "V": 3, "Out": 4}, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"Q": np.ones((2, HEADS, 40, SIZE), np.float32)}, "Q is float32"),
        ({"K": np.ones((2, HEADS, 41, SIZE), np.float16)}, r"K is float16 \[2, 4, 41, 32\]"),
        ({"V": np.ones((HEADS, 40, SIZE), np.float16)}, "V is float16"),
        ({"W": np.ones(1)}, "give Q, K, V"),
    ],
)
def test_inputs_are_checked(
    open_session: Callable[..., DirectSession], change: dict[str, np.ndarray], message: str
) -> None:
    with open_session() as session, pytest.raises(SpecError, match=message):
        session.run({**arrays(), **change})


def test_failures_are_raised(open_session: Callable[..., DirectSession], fake_cuda: FakeCuda) -> None:
    with open_session() as session:
        fake_cuda.fail("cuLaunchKernel", 719)
        with pytest.raises(LaunchError, match=r"layer 'DirectSession'.*enqueue: cuLaunchKernel failed") as raised:
            session.run(arrays())
        assert raised.value.code == 719
        assert FakeArray.live == 1
    with pytest.raises(PluginError, match="the session is closed"):
        session.run(arrays())
    session.close()


def test_a_device_without_code(open_session: Callable[..., DirectSession], fake_cuda: FakeCuda) -> None:
    fake_cuda.set_device(0, 80)
    with pytest.raises(PluginError, match="pyfmha build --arch sm_80"):
        open_session()
    fake_cuda.set_device(0, 90)
    fake_cuda.fail("cuModuleLoadData", 200)
    with pytest.raises(DriverError, match="cuModuleLoadData failed"):
        open_session()


def test_without_tensorrt_the_standin_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise PluginError("TensorRT is not installed")

    monkeypatch.setattr(direct, "find_module", missing)
    assert direct._installed_or_standin() is standin


def test_where_the_mask_is_aligned_is_a_feature(open_session: Callable[..., DirectSession]) -> None:
    with pytest.raises(PluginError, match=r"causal is 'bottom-right'; allowed are True and False .*bottom_right=True"):
        open_session(causal="bottom-right")
