"""Contexts, memory and bounds of the thin layer over cuda-python, on a double of its driver."""

import numpy as np
import pytest
from trt_double.full import driver
from trt_double.full.gpu import Gpu

from pyfmha.errors import DriverError
from pyfmha.runtime.device import Device, DeviceArray, Stream, find_gpu

pytest_plugins = ["trt_double.fixtures", "trt_double.full.fixtures"]


def current() -> int | None:
    return driver.cuCtxGetCurrent()[1]


def test_a_closed_device_leaves_no_context_behind(gpu: Gpu) -> None:
    device = Device()
    assert current() is not None

    device.close()

    assert current() is None


def test_a_closed_device_leaves_the_context_that_was_current(gpu: Gpu) -> None:
    with Device() as outer:
        before = current()
        with Device():
            assert current() == before

        assert current() == before
        Stream().close()  # it still works
        outer.synchronize()


def test_a_device_closed_where_another_context_is_current_does_not_touch_it(gpu: Gpu) -> None:
    with Device():
        device = Device()
        driver.cuCtxSetCurrent(None)

        device.close()

        assert current() is None


def test_a_device_that_is_not_there_is_an_error(gpu: Gpu) -> None:
    with pytest.raises(DriverError, match="no GPU 99: the driver sees"):
        Device(99)


def test_without_a_driver_there_is_no_gpu_and_a_reason(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYFMHA_LIBCUDA")

    device, reason = find_gpu()

    assert device is None
    assert "no CUDA driver" in reason


def test_copies_stay_inside_an_array(gpu: Gpu) -> None:
    with Device():
        array = DeviceArray.of(np.arange(8, dtype=np.float32))
        assert array.read(8, (2,), np.float32).tolist() == [2.0, 3.0]
        array.write(np.array([7.0], np.float32), 28)
        assert array.to_host().tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]

        for offset in (-4, 29):
            with pytest.raises(ValueError, match="are not inside an array of 32"):
                array.write(np.zeros(1, np.float32), offset)
            with pytest.raises(ValueError, match="are not inside an array of 32"):
                array.read(offset, (1,), np.float32)
        array.free()
        array.free()
