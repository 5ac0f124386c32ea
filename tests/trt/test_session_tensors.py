"""Sessions on tensors that lie in GPU memory already, on doubles of TensorRT and of the GPU."""

from typing import Any

import numpy as np
import pytest
from helpers import some_of
from producers import ByDlpack, ByInterface
from trt_double.full.gpu import Gpu

from pyfmha.attention.reference import attention_float64, relative_error
from pyfmha.attention.run import random_inputs
from pyfmha.errors import EngineError, PyfmhaError, SpecError, TensorError
from pyfmha.runtime.library import Library
from pyfmha.trt import DirectSession
from pyfmha.trt.attention.engine import EngineConfig, build_engine
from pyfmha.trt.session import Session

pytest_plugins = ["trt_double.fixtures", "trt_double.full.fixtures"]

SMALL = EngineConfig(num_heads=2, head_size=32, max_batch_size=2, max_seq_len=40, causal=True)
SHAPE = (2, 2, 17, 32)


@pytest.fixture
def session(trt11: Any, request: pytest.FixtureRequest) -> Any:
    plan = build_engine(SMALL, trt_module=trt11).plan
    with Session(plan, trt_module=trt11, cuda_graph=getattr(request, "param", False)) as opened:
        yield opened


def data(seed: int = 0) -> tuple[dict[str, Any], Any]:
    arrays = dict(zip("QKV", random_inputs("fp16", SHAPE, seed), strict=True))
    exact = attention_float64(*(x.astype(float) for x in arrays.values()), sm_scale=SMALL.scale, causal=True).out
    return arrays, exact


def on_gpu(gpu: Gpu, protocol: Any, array: Any, *, late: int | None = None, **more: Any) -> Any:
    """A tensor that holds an array; on a stream of its own, filled only once that is waited for."""
    address = gpu.allocate(array.nbytes)

    def fill() -> float:
        gpu.array(address, array.shape, array.dtype)[:] = array
        return 0.0

    if late is None:
        fill()
    else:
        gpu.push(late, fill)
    return protocol(address, array.shape, array.dtype, **more)


def test_inputs_are_not_copied_and_outputs_are_written_where_they_are(session: Any, gpu: Gpu) -> None:
    arrays, exact = data()
    inputs = {name: on_gpu(gpu, ByDlpack, array) for name, array in arrays.items()}
    out = on_gpu(gpu, ByDlpack, np.zeros(SHAPE, np.float16))
    before = len(gpu.memory)

    results = session.run(inputs, {"Out": out})

    assert results == {"Out": out}
    assert relative_error(gpu.array(out.pointer, SHAPE, np.float16), exact) < 5e-4
    assert len(gpu.memory) == before  # no buffer of the session's own
    assert inputs["Q"].streams[-1] == out.streams[-1] == session.stream.handle
    assert relative_error(session.run(inputs)["Out"], exact) < 5e-4
    session.bind(inputs)
    session.enqueue()
    assert inputs["Q"].given_back == len(inputs["Q"].streams) - 1  # held while the work is queued
    session.fetch()
    assert inputs["Q"].given_back == len(inputs["Q"].streams)


def test_arrays_and_tensors_of_both_protocols_mixed(session: Any, gpu: Gpu) -> None:
    arrays, exact = data()
    inputs = {
        "Q": on_gpu(gpu, ByInterface, arrays["Q"]), "K": arrays["K"],
        "V": ByDlpack(arrays["V"].ctypes.data, SHAPE, np.float16, device=(1, 0)),
    }  # fmt: skip

    assert relative_error(session.run(inputs)["Out"], exact) < 5e-4


@pytest.mark.parametrize("session", [True], indirect=True)
def test_a_graph_follows_the_tensors(session: Any, gpu: Gpu) -> None:
    for seed in (0, 0, 1):
        arrays, exact = data(seed)
        inputs = {name: on_gpu(gpu, ByDlpack, array) for name, array in arrays.items()}
        out = on_gpu(gpu, ByDlpack, np.zeros(SHAPE, np.float16))
        for _ in range(2):
            session.run(inputs, {"Out": out})
            assert relative_error(gpu.array(out.pointer, SHAPE, np.float16), exact) < 5e-4
    assert gpu.replays == 3


def zeros(
    gpu: Gpu, shape: tuple[int, ...] = SHAPE, dtype: Any = np.float16, protocol: Any = ByDlpack, **more: Any
) -> Any:
    return on_gpu(gpu, protocol, np.zeros(shape, dtype), **more)


def moved(gpu: Gpu) -> Any:
    tensor = zeros(gpu, (2, 2, 18, 32))
    return ByDlpack(tensor.pointer + 16, SHAPE, np.float16)


WRONG: list[tuple[str, Any, type[PyfmhaError], str]] = [
    ("Q", lambda gpu: zeros(gpu, dtype=np.float32), EngineError, "Q is float32; it must be float16"),
    ("Q", lambda gpu: zeros(gpu, SHAPE[1:]), EngineError, r"Q is \[2, 17, 32\]; the engine has Q HALF"),
    ("Q", lambda gpu: zeros(gpu, device=(2, 1)), TensorError, "Q is on GPU 1; it is used on GPU 0"),
    ("Q", lambda gpu: zeros(gpu, strides=(1088, 32, 64, 1)), TensorError, "Q is .* with strides .*; only contiguous"),
    ("Q", moved, EngineError, "TensorRT asks for multiples of 256 bytes"),
    ("Q", lambda gpu: [1], EngineError, "Q is a list; give a numpy array, or a tensor with DLPack"),
    ("Out", lambda gpu: np.zeros(SHAPE, np.float16), EngineError, "Out is a ndarray; give a tensor on the GPU"),
    ("Out", lambda gpu: zeros(gpu, read_only=True), TensorError, "Out is read-only, and would be written"),
    ("Out", lambda gpu: zeros(gpu, protocol=ByInterface, read_only=True), TensorError, "Out is read-only"),
    ("Out", lambda gpu: zeros(gpu, (2, 2, 16, 32)), EngineError, r"Out is given as .*; it will be \[2, 2, 17, 32\]"),
    ("Out", lambda gpu: zeros(gpu, dtype=np.int16), EngineError, "Out is int16; it must be float16"),
    ("Lse", lambda gpu: zeros(gpu), EngineError, "unknown output Lse; the engine's are Out"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "make", "error", "text"), some_of(WRONG), ids=[f"{row[0]} {row[3]}" for row in WRONG])
def test_what_does_not_fit(session: Any, gpu: Gpu, name: str, make: Any, error: Any, text: str) -> None:
    arrays, exact = data()
    given = make(gpu)
    inputs, outputs = ({**arrays, "Q": given}, {}) if name == "Q" else (arrays, {name: given})

    with pytest.raises(error, match=text):
        session.run(inputs, outputs)

    assert relative_error(session.run(arrays)["Out"], exact) < 5e-4


def test_a_direct_session(forward_library_path: Any, attention_library: Library, gpu: Gpu) -> None:
    arrays, exact = data()
    with DirectSession(num_heads=2, head_size=32, causal=True, library=attention_library) as session:
        inputs = {name: on_gpu(gpu, ByDlpack, array) for name, array in arrays.items()}
        out = zeros(gpu)
        results = session.run({**inputs, "V": arrays["V"]}, {"Out": out})

        assert results == {"Out": out}
        assert relative_error(gpu.array(out.pointer, SHAPE, np.float16), exact) < 5e-4
        assert inputs["Q"].streams[-1] == out.streams[-1] == session._stream.handle
        assert relative_error(session.run(inputs)["Out"], exact) < 5e-4
        refused: list[tuple[dict[str, Any], dict[str, Any], type[PyfmhaError], str]] = [
            ({"Q": zeros(gpu, dtype=np.float32)}, {}, SpecError, r"Q is float32 \[2, 2, 17, 32\]; inputs must be"),
            ({"Q": zeros(gpu, device=(2, 1))}, {}, TensorError, "Q is on GPU 1; it is used on GPU 0"),
            ({"Q": [1]}, {}, SpecError, "Q is a list; give a numpy array, or a tensor"),
            ({}, {"Out": zeros(gpu, (2, 2, 16, 32))}, SpecError, "Out is fp16 .*; it will be float16"),
            ({}, {"Out": np.zeros(SHAPE, np.float16)}, SpecError, "Out is a ndarray; give a tensor on the GPU"),
            ({}, {"Out": zeros(gpu, read_only=True)}, TensorError, "Out is read-only"),
            ({}, {"L": out}, SpecError, "outputs are L; the outputs are Out"),
        ]  # fmt: skip
        for change, outputs, error, text in refused:
            with pytest.raises(error, match=text):
                session.run({**arrays, **change}, outputs)
