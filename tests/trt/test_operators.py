"""Plugins that are not attention: three operators of ``tests/kernels/operators.py`` through TensorRT's calls."""

import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeCuda
from helpers import TESTS
from shared import Shared
from trt_double import BUILD, CHAR, FLOAT, FLOAT32, HALF, INT32, RUNTIME, Field, Tensor
from trt_double.binding import DoubleCalls, make_binding

import pyfmha.trt
from pyfmha.aot import Compiler, build
from pyfmha.aot.operator_specs import load_operators, operator_specs
from pyfmha.errors import LaunchError, PluginError
from pyfmha.operators.tactics import tactics_of
from pyfmha.runtime.library import Library
from pyfmha.spec.arch import parse_archs
from pyfmha.trt import register
from pyfmha.trt.network import add_operator

pytest_plugins = ["trt_double.fixtures", "trt_double.full.fixtures"]

KERNELS = TESTS / "kernels" / "operators.py"
INT32_DATA = 3  # trt.DataType.INT32
INT64 = 10  # trt.PluginFieldType.INT64
X, B, Y, M, WORKSPACE, STREAM = 0x1000000, 0x2000000, 0x3000000, 0x4000000, 0x5000000, 9


@pytest.fixture(scope="session")
def operator_library_path(shared: Shared, compiler: Compiler) -> Path:
    """The three operators' functions, for sm_90."""

    def make(folder: Path) -> Path:
        operators = load_operators(compiler, KERNELS)
        specs = [spec for operator in operators for spec in operator_specs(compiler, operator)]
        return build(specs, parse_archs(["sm_90"]), folder, jobs=2, operators=operators).library

    return shared.once("operator_library", make)


class Stage:
    """One operator registered in a double of the binding, with a CUDA context."""

    def __init__(self, path: Path, fake_cuda: FakeCuda, name: str) -> None:
        assert fake_cuda.c.cuInit(0) == 0
        fake_cuda.use_context()
        self.fake_cuda, self.trt, self.library = fake_cuda, make_binding(), Library(path)
        self.calls = DoubleCalls(self.trt)
        self.creator = register(self.trt, library=self.library, operator=name)

    def made(self, *fields: Field, phase: int = BUILD) -> Any:
        return self.calls.create(self.creator, "layer 1", fields, phase)

    def running(self, plugin: Any) -> Any:
        """As an engine with it is loaded."""
        stored = self.calls.stored_fields(plugin).read()
        loaded = self.made(*stored, phase=RUNTIME)
        assert loaded is not None, error()
        return self.calls.attach(loaded)

    def launches(self, plugin: Any, inputs: Sequence[int], outputs: Sequence[int], workspace: int = 0) -> list[Any]:
        """Of each launch its function's name and what its arguments are."""
        before = self.fake_cuda.launch_count()
        assert self.calls.enqueue(plugin, inputs, outputs, workspace, STREAM) == 0, error()
        return [
            (name, read(launch.params, self.library[name].manifest.arguments))
            for launch in self.fake_cuda.launches()[before:]
            for name in [self.name_of(launch.image_sha256)]
        ]

    def name_of(self, digest: str) -> str:
        return next(
            function.name
            for function in self.library.manifest.functions
            for algorithm in function.algorithms
            for variant in algorithm
            for image in variant.images
            if image.sha256 == digest
        )


def read(params: Sequence[bytes], arguments: Sequence[tuple[str, str]]) -> dict[str, Any]:
    formats = {"i32": "<i", "i64": "<q", "fp32": "<f"}
    return {
        name: struct.unpack(formats.get(kind, "<Q"), param)[0]
        for param, (name, kind) in zip(params, arguments, strict=False)
    }


def error() -> str:
    failure = pyfmha.trt.last_failure()
    return str(failure.error) if failure else ""


def floats(name: str, *values: float) -> Field:
    return Field(name, FLOAT32, len(values), np.array(values, np.float32).tobytes())


def integers(name: str, *values: int, kind: int = INT32) -> Field:
    return Field(name, kind, len(values), np.array(values, np.int64 if kind == INT64 else np.int32).tobytes())


# ---------------------------------------------------------------- BiasGelu: types that are tied, one float


@pytest.fixture
def gelu(operator_library_path: Path, fake_cuda: FakeCuda) -> Stage:
    return Stage(operator_library_path, fake_cuda, "BiasGelu")


@pytest.mark.parametrize(("kind", "said"), [(HALF, "fp16"), (FLOAT, "fp32")])
def test_bias_gelu(gelu: Stage, kind: int, said: str) -> None:
    calls = gelu.calls
    assert [field.name for field in gelu.creator.field_names] == ["scale"]
    plugin = gelu.made(floats("scale", 0.5))
    assert calls.core(plugin) == ("BiasGelu", "3", "acme")
    assert calls.output_types(plugin, [kind, kind]) == [kind]
    assert calls.output_shapes(plugin, [[None, 64], [64]]) == [[None, 64]]
    tensors = [Tensor((7, 64), kind), Tensor((64,), kind), Tensor((7, 64), kind)]
    assert all(calls.supports(plugin, position, tensors) for position in range(3))
    assert calls.configure(plugin, tensors[:2], tensors[2:]) == 0
    assert calls.workspace(plugin, tensors[:2], tensors[2:]) == 0
    tactics = calls.tactics(plugin)
    assert tactics == [t.id for t in tactics_of(gelu.library[f"acme_biasgelu_v3_{said}"].manifest)]
    assert len(tactics) == 2

    running = gelu.running(plugin)
    assert calls.set_tactic(running, tactics[1]) == 0
    assert calls.on_shape_change(running, tensors[:2], tensors[2:]) == 0, error()
    wanted = {"x": X, "bias": B, "y": Y, "n": 7 * 64, "cols": 64, "scale": 0.5}
    assert gelu.launches(running, [X, B], [Y]) == [(f"acme_biasgelu_v3_{said}", wanted)]
    launch = gelu.fake_cuda.launches()[-1]
    assert (launch.grid[0], launch.block[0]) == (2, 64)  # the second algorithm: blocks of 256, two warps
    calls.destroy(running)
    assert gelu.fake_cuda.modules_loaded() == 0


def test_types_that_are_tied(gelu: Stage) -> None:
    plugin = gelu.made()
    assert gelu.calls.output_types(plugin, [HALF, FLOAT]) is None
    assert "Bias is of type FLOAT; T is one type of HALF, FLOAT in all tensors" in error()
    mixed = [Tensor((7, 64), HALF), Tensor((64,), FLOAT), Tensor((7, 64), HALF)]
    assert [gelu.calls.supports(plugin, position, mixed) for position in range(2)] == [True, False]
    assert not gelu.calls.supports(plugin, 0, [Tensor((7, 64), INT32_DATA), *mixed[1:]])


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(7, 64), (63,), (7, 64)], r"shapes are X [7, 64], Bias [63], Y [7, 64]; they must be X [rows, cols]"),
        ([(7, 64), (64,), (8, 64)], "they must be X [rows, cols], Bias [cols], Y [rows, cols]"),
        (
            [(1 << 20, 1 << 20), (1 << 20,), (1 << 20, 1 << 20)],
            "n is 1099511627776, i32 holds -2147483648 to 2147483647",
        ),
        (
            [(1 << 40, 1 << 40), (1 << 40,), (1 << 40, 1 << 40)],
            "a size overflows 64 bits, a number is divided by zero, or what is read is not there:"
            " X [1099511627776, 1099511627776] has more elements than 64 bits hold",
        ),
    ],
)
def test_shapes_that_are_refused(gelu: Stage, shapes: list[tuple[int, ...]], message: str) -> None:
    running = gelu.running(gelu.made())
    tensors = [Tensor(shape, HALF) for shape in shapes]
    assert gelu.calls.on_shape_change(running, tensors[:2], tensors[2:]) != 0
    assert message in error()
    assert "BiasGelu layer 'layer 1' (scale 1)" in error()


def test_an_empty_tensor_launches_nothing(gelu: Stage) -> None:
    running = gelu.running(gelu.made())
    tensors = [Tensor((0, 64)), Tensor((64,)), Tensor((0, 64))]
    assert gelu.calls.on_shape_change(running, tensors[:2], tensors[2:]) == 0
    assert gelu.launches(running, [X, B], [Y]) == []


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (floats("factor", 1.0), "unknown field 'factor'; allowed are scale (FLOAT32, optional)"),
        (integers("scale", 1), "field scale is of type INT32; it must be FLOAT32"),
        (floats("scale", 1.0, 2.0), "field scale has 2 values; it must have one FLOAT32"),
        (floats("scale", -1.0), "scale is -1; give 0 or more"),
    ],
)
def test_fields_that_are_refused(gelu: Stage, field: Field, message: str) -> None:
    assert gelu.made(field) is None
    assert message in error()


# ---------------------------------------------------------------- Centre: launches one after the other, workspace


@pytest.fixture
def centre(operator_library_path: Path, fake_cuda: FakeCuda) -> Stage:
    return Stage(operator_library_path, fake_cuda, "Centre")


@pytest.mark.parametrize("tell", [0, 1])
def test_centre(centre: Stage, tell: int) -> None:
    calls = centre.calls
    plugin = centre.made(integers("tell", tell))
    assert calls.output_types(plugin, [FLOAT]) == [FLOAT] * (1 + tell)
    assert calls.output_shapes(plugin, [[None, 100]]) == [[None, 100], [None]][: 1 + tell]
    inputs, outputs = [Tensor((5, 100), FLOAT)], [Tensor((5, 100), FLOAT), Tensor((5,), FLOAT)][: 1 + tell]
    largest = (
        [Tensor((-1, 100), FLOAT, largest=(9, 100))],
        [
            Tensor((-1, 100), FLOAT, largest=(9, 100)),
            Tensor((-1,), FLOAT, largest=(9,)),
        ][: 1 + tell],
    )
    assert calls.workspace(plugin, *largest) == 4 * 9
    running = centre.running(plugin)
    assert calls.on_shape_change(running, inputs, outputs) == 0, error()
    sizes = {"rows": 5, "cols": 100}
    second: dict[str, Any] = {"x": X, "sums": WORKSPACE, "y": Y, **({"means": M} if tell else {}), **sizes}
    # Each launch has arguments of its own; the workspace that one writes is what the next reads.
    assert centre.launches(running, [X], [Y, M][: 1 + tell], WORKSPACE) == [
        ("acme_centre_0", {"x": X, "sums": WORKSPACE, **sizes}),
        (f"acme_centre_{1 + tell}", second),
    ]
    assert {launch.stream for launch in centre.fake_cuda.launches()} == {STREAM}
    assert calls.enqueue(running, [X], [Y, M][: 1 + tell], 0, STREAM) != 0
    said = "centre and tell" if tell else "centre"
    assert f"Centre layer 'layer 1' ({said}, 5 rows of 100): enqueue: TensorRT gave no workspace, 20 bytes" in error()


def test_a_kernel_may_be_given_no_workspace(centre: Stage) -> None:
    """Of a part that has no bytes for a shape; where it has some, enqueue has refused to go without."""
    function = centre.library["acme_centre_0"]
    function.load()
    function(STREAM, x=X, sums=0, rows=5, cols=100)
    assert read(centre.fake_cuda.launches()[-1].params, function.manifest.arguments)["sums"] == 0
    with pytest.raises(LaunchError, match="x is null; give its address"):
        function(STREAM, x=0, sums=0, rows=5, cols=100)
    function.unload()


def test_only_what_runs_is_loaded(centre: Stage) -> None:
    running = centre.running(centre.made(integers("tell", 1)))
    assert running._functions() == [centre.library[name] for name in ("acme_centre_0", "acme_centre_2")]


def test_a_choice_that_is_none(centre: Stage) -> None:
    assert centre.made(integers("tell", 2)) is None
    assert "tell is 2; allowed are 0, 1" in error()


# ---------------------------------------------------------------- Place: data of INT32, values that are read, lists


@pytest.fixture
def place(operator_library_path: Path, fake_cuda: FakeCuda) -> Stage:
    return Stage(operator_library_path, fake_cuda, "Place")


def test_place(place: Stage) -> None:
    calls = place.calls
    plugin = place.made(floats("weights", 0.5, 3.0), integers("wide", 2, kind=INT64))
    assert calls.output_types(plugin, [FLOAT, INT32_DATA, INT32_DATA]) == [FLOAT]
    assert calls.output_types(plugin, [FLOAT, FLOAT]) is None
    assert "Index is of type FLOAT; it must be INT32" in error()
    assert calls.output_shapes(plugin, [[3, 4], [3]], [[10, 6]]) == [[10, 10, 6]]
    assert calls.output_shapes(plugin, [[3, None], [3]], [[None, 6]]) == [[None, None, 6]]
    inputs, outputs = [Tensor((3, 4), FLOAT), Tensor((3,), INT32_DATA)], [Tensor((10, 10, 6), FLOAT)]
    assert [calls.supports(plugin, position, inputs + outputs) for position in range(3)] == [True] * 3

    running = place.running(plugin)
    wanted = {"x": X, "index": B, "y": Y, "n": 12, "cols": 4, "first": 7, "weight": 6.0, "steps": 2}
    values = Tensor((2,), INT32_DATA)
    for given, addresses in ((inputs, [X, B]), ([*inputs, values], [X, B, M])):
        # TensorRT may give the input whose values are read besides the others; nothing looks at it.
        assert calls.on_shape_change(running, given, outputs) == 0, error()
        assert place.launches(running, addresses, [Y]) == [("acme_place", wanted)]
    assert calls.on_shape_change(running, inputs, [Tensor((2, 10, 6), FLOAT)]) != 0
    assert "2 rows have no place for 3" in error()
    assert calls.on_shape_change(running, inputs, [Tensor((10, 11, 6), FLOAT)]) != 0
    assert "they must be X [n, cols], Index [n], Y [Shape[0], Shape[1] + cols, Shape[1]]" in error()


def test_lists_are_stored(place: Stage) -> None:
    plugin = place.made(floats("weights", 0.5, 3.0), integers("steps", 4, 5, 6))
    stored = {field.name: field for field in place.calls.stored_fields(plugin).read()}
    assert np.frombuffer(stored["weights"].data, np.float32).tolist() == [0.5, 3.0]
    assert np.frombuffer(stored["steps"].data, np.int32).tolist() == [4, 5, 6]
    assert np.frombuffer(stored["wide"].data, np.int64).tolist() == [1]
    assert {name: field.type for name, field in stored.items() if not name.startswith("pyfmha_")} == {
        "weights": FLOAT32, "steps": INT32, "wide": INT64,
    }  # fmt: skip
    running = place.running(plugin)
    assert running.instance.attributes == {"weights": (0.5, 3.0), "steps": (4, 5, 6), "wide": 1}
    assert " weights=0x1.0000000000000p-1,0x1.8000000000000p+1 steps=4,5,6 wide=1 " in running.timing_cache_id


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([], "missing field weights; needed are weights (FLOAT32 list), steps (INT32 list, optional), wide (INT64,"),
        ([floats("weights")], "weights are 0; give 1 or more"),
        ([floats("weights", *[1.0] * 65)], "field weights has 65 values; at most 64 are allowed"),
        ([floats("weights", 1.0, -2.0)], "weights[1] is -2; give 0 or more"),
        ([integers("weights", 1)], "field weights is of type INT32; it must be FLOAT32"),
        ([floats("weights", 1.0), floats("weights", 1.0)], "field weights is given more than once"),
        ([Field("weights", CHAR, 2, b"a\0")], "field weights is of type CHAR; it must be FLOAT32"),
    ],
)
def test_lists_that_are_refused(place: Stage, fields: list[Field], message: str) -> None:
    assert place.made(*fields) is None
    assert message in error()


# ---------------------------------------------------------------- in a network


def test_an_operator_in_a_network(operator_library_path: Path, trt11: Any) -> None:
    network = trt11.Builder(logger(trt11)).create_network(0)
    x, bias = (network.add_input(name, trt11.DataType.HALF, shape) for name, shape in (("x", (7, 64)), ("b", (64,))))
    given: dict[str, Any] = {"library": operator_library_path}
    (y,) = add_operator(network, "BiasGelu", x, bias, scale=0.5, name="gelu", **given)
    assert (tuple(y.shape), y.dtype) == ((7, 64), trt11.DataType.HALF)
    for arguments, changes, message in (
        ((x,), {}, "BiasGelu is given 1 inputs; it takes X, Bias"),
        ((x, bias), {"factor": 1}, "BiasGelu has no attribute factor; it has: scale"),
        ((x, bias), {"scale": "a"}, "scale is 'a'; it must be fp32"),
        ((x, bias), {"scale": -1}, "scale is -1; give 0 or more"),
        ((bias, x), {}, r"X has 1 dimensions; it must be \[rows, cols\]"),
    ):
        with pytest.raises(PluginError, match=message):
            add_operator(network, "BiasGelu", *arguments, **changes, **given)
    with pytest.raises(PluginError, match="holds no operator 'Gelu'; it holds TritonFlashAttention, BiasGelu, Centre"):
        add_operator(network, "Gelu", x, bias, **given)


def test_an_attribute_called_as_an_argument_of_ours(operator_library_path: Path, trt11: Any) -> None:
    """``name`` is the layer's, so an attribute of that name would keep its default and nobody would know."""
    network = trt11.Builder(logger(trt11)).create_network(0)
    x = network.add_input("x", trt11.DataType.FLOAT, (7, 64))
    (centre,) = (one for one in Library(operator_library_path).operators if one.name == "Centre")
    named = replace(centre, attributes=[*centre.attributes, ("name", "string = mean")])
    given: dict[str, Any] = {"library": operator_library_path}
    assert add_operator(network, named, x, **given)
    with pytest.raises(
        PluginError, match=r"Centre has an attribute name, which add_operator takes for itself; add the"
    ):
        add_operator(network, named, x, name="median", **given)


def logger(trt: Any) -> Any:
    class Silent(trt.ILogger):
        def log(self, severity: Any, msg: str) -> None:
            pass

    return Silent()
