"""The newer creation fields: what they ask of the tensors, and what ``fmha_fwd_*`` is launched with."""

import inspect
import struct
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeCuda, Launch
from helpers import LONG
from trt_double import BF16, BUILD, FLOAT, HALF, Tensor
from trt_double.binding import DataType, make_binding
from trt_double.scene import HEADS, SCALE, SIZE, Scene, fields, problem_of

import pyfmha.trt
from pyfmha.errors import EngineError
from pyfmha.runtime.library import Library
from pyfmha.trt import PluginError, add_attention, add_attention_packed

pytest_plugins = ("trt_double.fixtures",)

INT32 = 3  # trt.DataType
INPUTS = [0x7F0000100000 * (number + 1) for number in range(6)]
OUT, LSE, STREAM = 0x7E0000000000, 0x7D0000000000, 0xABCD
D = SIZE


@pytest.fixture
def scene(trt: Any, forward_library: Library) -> Scene:
    """The plugin in each binding, with the library that has ``fmha_fwd_*``."""
    return Scene(trt, forward_library)


def start(fake_cuda: FakeCuda) -> None:
    assert fake_cuda.c.cuInit(0) == 0
    fake_cuda.use_context(0)


def last_error() -> str:
    failure = pyfmha.trt.last_failure()
    assert failure is not None
    return str(failure.error)


def of(shape: tuple[int, ...], kind: int = HALF) -> Tensor:
    return Tensor(shape, kind)


def prepared(scene: Scene, inputs: list[Tensor], outputs: list[Tensor], **changes: float | str) -> Any:
    """A plugin of an execution context, through serialisation, with a shape prepared."""
    plugin = scene.calls.attach(scene.loaded(scene.built(**changes)))
    assert plugin is not None
    assert scene.calls.on_shape_change(plugin, inputs, outputs) == 0, last_error()
    return plugin


def launch_of(
    scene: Scene, fake_cuda: FakeCuda, inputs: list[Tensor], outputs: list[Tensor], **changes: float | str
) -> Launch:
    start(fake_cuda)
    plugin = prepared(scene, inputs, outputs, **changes)
    pointers = INPUTS[: len(inputs)], [OUT, LSE][: len(outputs)]
    assert scene.calls.enqueue(plugin, *pointers, 0, STREAM) == 0, last_error()
    return fake_cuda.launches()[-1]


def parameters(pointers: list[int], floats: tuple[float, float], *numbers: int) -> tuple[bytes, ...]:
    """What the kernel is to read: nine pointers, scale and soft cap, six sizes, twelve strides, four settings."""
    assert len(pointers) == 9
    assert len(numbers) == 22
    forms = "i" * 6 + "q" * 12 + "i" * 4
    packed = [struct.pack("<Q", pointer) for pointer in pointers] + [struct.pack("<f", value) for value in floats]
    return (*packed, *(struct.pack(f"<{form}", value) for form, value in zip(forms, numbers, strict=True)))


def function_of(library: Library, launch: Launch) -> str:
    (name,) = (
        function.name
        for function, _, variant in library.manifest.variants()
        if any(image.sha256 == launch.image_sha256 for image in variant.images)
    )
    return name


Q, K, V, FIFTH, SIXTH = (INPUTS[index] for index in (0, 1, 2, 3, 4))
CROSS = [of((2, 4, 5, D)), of((2, 2, 9, D)), of((2, 2, 9, D))]
OFF = (-1, -1, 0, 0)  # no window, top left, not ragged

Case = tuple[dict[str, float | str], list[Tensor], list[Tensor], list[int], tuple[float, float], list[int]]
CASES: dict[str, Case] = {
    "grouped heads, cross attention": (
        {"num_kv_heads": 2, "causal": 0}, CROSS, [of((2, 4, 5, D))],
        [OUT, 0, Q, K, V, 0, 0, 0, 0], (SCALE, 0.0),
        [2, 4, 2, 5, 9, D, 4 * 5 * D, 5 * D, D, *[2 * 9 * D, 9 * D, D] * 2, 4 * 5 * D, 5 * D, D, *OFF],
    ),
    "causal is a window": (
        {"num_kv_heads": 2, "causal": 1, "window_left": 3, "window_right": 7}, CROSS, [of((2, 4, 5, D))],
        [OUT, 0, Q, K, V, 0, 0, 0, 0], (SCALE, 0.0),
        [2, 4, 2, 5, 9, D, 4 * 5 * D, 5 * D, D, *[2 * 9 * D, 9 * D, D] * 2, 4 * 5 * D, 5 * D, D, 3, 0, 0, 0],
    ),
    "bottom right, by causal alone": (
        {"causal": 2}, [of((2, 4, 5, D)), of((2, 4, 9, D)), of((2, 4, 9, D))], [of((2, 4, 5, D))],
        [OUT, 0, Q, K, V, 0, 0, 0, 0], (SCALE, 0.0),
        [2, 4, 4, 5, 9, D, 4 * 5 * D, 5 * D, D, *[4 * 9 * D, 9 * D, D] * 2, 4 * 5 * D, 5 * D, D, -1, 0, 1, 0],
    ),
    "a window aligned bottom right, soft cap, log-sum-exp": (
        {"num_kv_heads": 2, "causal": 0, "window_left": 3, "window_right": 2, "bottom_right": 1, "softcap": 2.5,
         "return_lse": 1}, CROSS, [of((2, 4, 5, D)), of((2, 4, 5), FLOAT)],
        [OUT, LSE, Q, K, V, 0, 0, 0, 0], (SCALE, 2.5),
        [2, 4, 2, 5, 9, D, 4 * 5 * D, 5 * D, D, *[2 * 9 * D, 9 * D, D] * 2, 4 * 5 * D, 5 * D, D, 3, 2, 1, 0],
    ),
    "bshd with lengths of the keys": (
        {"num_kv_heads": 2, "causal": 0, "layout": "bshd", "kv_lengths": 1},
        [of((2, 5, 4, D)), of((2, 9, 2, D)), of((2, 9, 2, D)), of((2,), INT32)], [of((2, 5, 4, D))],
        [OUT, 0, Q, K, V, 0, FIFTH, 0, 0], (SCALE, 0.0),
        [2, 4, 2, 5, 9, D, 5 * 4 * D, D, 4 * D, *[9 * 2 * D, D, 2 * D] * 2, 5 * 4 * D, D, 4 * D, *OFF],
    ),
    "both lengths and log-sum-exp": (
        {"q_lengths": 1, "kv_lengths": 1, "return_lse": 1, "num_kv_heads": 2},
        [*CROSS, of((2,), INT32), of((2,), INT32)], [of((2, 4, 5, D)), of((2, 4, 5), FLOAT)],
        [OUT, LSE, Q, K, V, FIFTH, SIXTH, 0, 0], (SCALE, 0.0),
        [2, 4, 2, 5, 9, D, 4 * 5 * D, 5 * D, D, *[2 * 9 * D, 9 * D, D] * 2, 4 * 5 * D, 5 * D, D, -1, 0, 0, 0],
    ),
    "packed with an axis of 3": (
        {"layout": "packed", "causal": 0}, [of((2, 5, 3, 4, D))], [of((2, 5, 4, D))],
        [OUT, 0, Q, Q + 2 * 4 * D, Q + 2 * 8 * D, 0, 0, 0, 0], (SCALE, 0.0),
        [2, 4, 4, 5, 5, D, *[5 * 12 * D, D, 12 * D] * 3, 5 * 4 * D, D, 4 * D, *OFF],
    ),
    "packed with grouped heads": (
        {"layout": "packed", "causal": 0, "num_kv_heads": 1, "q_lengths": 1}, [of((2, 5, 6, D)), of((2,), INT32)],
        [of((2, 5, 4, D))],
        [OUT, 0, Q, Q + 2 * 4 * D, Q + 2 * 5 * D, K, 0, 0, 0], (SCALE, 0.0),
        [2, 4, 1, 5, 5, D, *[5 * 6 * D, D, 6 * D] * 3, 5 * 4 * D, D, 4 * D, *OFF],
    ),
    "ragged": (
        {"num_kv_heads": 2, "cu_seqlens": 1, "return_lse": 1},
        [of((7, 4, D)), of((11, 2, D)), of((11, 2, D)), of((4,), INT32), of((4,), INT32)],
        [of((7, 4, D)), of((4, 7), FLOAT)],
        [OUT, LSE, Q, K, V, 0, 0, FIFTH, SIXTH], (SCALE, 0.0),
        [3, 4, 2, 7, 11, D, 7 * 4 * D, D, 4 * D, *[11 * 2 * D, D, 2 * D] * 2, 7 * 4 * D, D, 4 * D, -1, 0, 0, 1],
    ),
    "ragged and packed": (
        {"layout": "packed", "cu_seqlens": 1}, [of((7, 3, 4, D)), of((4,), INT32), of((4,), INT32)], [of((7, 4, D))],
        [OUT, 0, Q, Q + 2 * 4 * D, Q + 2 * 8 * D, 0, 0, K, V], (SCALE, 0.0),
        [3, 4, 4, 7, 7, D, *[7 * 12 * D, D, 12 * D] * 3, 7 * 4 * D, D, 4 * D, -1, 0, 0, 1],
    ),
    "no keys": (
        {"causal": 0, "num_kv_heads": 4}, [of((2, 4, 5, D)), of((2, 4, 0, D)), of((2, 4, 0, D))], [of((2, 4, 5, D))],
        [OUT, 0, Q, K, V, 0, 0, 0, 0], (SCALE, 0.0),
        [2, 4, 4, 5, 0, D, 4 * 5 * D, 5 * D, D, *[0, 0, D] * 2, 4 * 5 * D, 5 * D, D, *OFF],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_argument_is_exactly_right(
    scene: Scene, forward_library: Library, fake_cuda: FakeCuda, case: str
) -> None:
    changes, inputs, outputs, pointers, floats, numbers = CASES[case]
    launch = launch_of(scene, fake_cuda, inputs, outputs, **changes)
    assert launch.params[:33] == parameters(pointers, floats, *numbers)
    assert (launch.stream, function_of(forward_library, launch)) == (STREAM, "fmha_fwd_d32_fp16")


@pytest.mark.parametrize(
    ("changes", "size", "function"),
    [
        ({}, SIZE, "fmha_d32_fp16"),
        ({"causal": 1}, SIZE, "fmha_d32_fp16"),
        ({"num_kv_heads": HEADS}, SIZE, "fmha_fwd_d32_fp16"),
        ({"softcap": 0.0}, SIZE, "fmha_fwd_d32_fp16"),
        ({"causal": 2}, SIZE, "fmha_fwd_d32_fp16"),
        ({"type_id": BF16, "num_kv_heads": HEADS}, SIZE, "fmha_fwd_d32_bf16"),
        ({"type_id": FLOAT, "layout": "bhsd"}, SIZE, "fmha_fwd_d32_fp32"),
        ({}, 1, "fmha_fwd_d32_fp16"),
        ({}, 72, "fmha_fwd_d128_fp16"),
        ({"return_lse": 0}, 128, "fmha_fwd_d128_fp16"),
    ],
)
def test_the_fields_alone_choose_the_kernel(
    scene: Scene, forward_library: Library, fake_cuda: FakeCuda, changes: dict[str, Any], size: int, function: str
) -> None:
    start(fake_cuda)
    shape = [of((1, HEADS, 6, size), int(changes.get("type_id", HALF)))]
    plugin = prepared(scene, shape * 3, shape, head_size=size, **changes)
    assert scene.calls.enqueue(plugin, INPUTS[:3], [OUT], 0x7C0000000000, STREAM) == 0
    assert function_of(forward_library, fake_cuda.launches()[-1]) == function


def test_the_first_kernel_needs_none_of_the_newer_fields_in_an_engine(scene: Scene) -> None:
    stored = scene.calls.stored_fields(scene.built())
    assert stored is not None
    assert [field.name for field in stored.read()] == [
        *("num_heads", "head_size", "type_id", "softmax_scale", "causal"),
        *("pyfmha_schema", "pyfmha_prototype", "pyfmha_algorithms"),
    ]
    assert "num_kv_heads" not in (scene.calls.timing_cache_id(scene.built()) or "")


EVERYTHING = {
    "num_kv_heads": 2, "layout": "bshd", "causal": 2, "window_left": 5, "window_right": 6, "softcap": 1.5,
    "return_lse": 1, "q_lengths": 1, "kv_lengths": 1,
}  # fmt: skip


@pytest.mark.parametrize("changes", [EVERYTHING, {"cu_seqlens": 1, "bottom_right": 1, "causal": 0}, {"head_size": 100}])
def test_what_is_stored_gives_the_same_plugin(scene: Scene, changes: dict[str, Any]) -> None:
    built = scene.built(**changes)
    loaded = scene.loaded(built)
    assert problem_of(loaded) == problem_of(built)
    assert loaded.origin.stored.prototype.startswith("fmha_fwd_d")
    first, second = (scene.calls.stored_fields(plugin) for plugin in (built, loaded))
    assert first is not None
    assert second is not None
    assert [(f.name, f.data) for f in first.read()] == [(f.name, f.data) for f in second.read()]
    assert len(first.read()) == 18
    assert scene.calls.timing_cache_id(loaded) == scene.calls.timing_cache_id(built)


def test_every_field_is_what_it_says(scene: Scene) -> None:
    problem = problem_of(scene.built(**EVERYTHING))
    assert (problem.causal, problem.kv_heads) == (True, 2)
    features = problem.features
    assert (features.layout, features.bottom_right, features.window, features.softcap) == ("bshd", True, (5, 6), 1.5)
    assert (features.return_lse, features.q_lengths, features.kv_lengths, features.cu_seqlens) == (
        True,
        True,
        True,
        False,
    )
    for part in (
        "2 heads of K and V",
        "layout bshd",
        "aligned bottom right",
        "window (5, 6)",
        "softcap 1.5",
        "return_lse",
    ):
        assert part in str(problem)


def test_every_newer_field_changes_the_cache_id(scene: Scene) -> None:
    changes: list[dict[str, Any]] = [
        {}, {"num_kv_heads": HEADS}, {"num_kv_heads": 2}, {"layout": "bshd"}, {"layout": "packed"}, {"bottom_right": 1},
        {"causal": 2, "window_left": 1}, {"window_left": 3}, {"window_right": 3}, {"softcap": 1.0},
        {"softcap": 1.0000001},        {"return_lse": 1}, {"q_lengths": 1}, {"kv_lengths": 1}, {"cu_seqlens": 1},
        {"causal": 0, "bottom_right": 0},
    ]  # fmt: skip
    ids = [scene.calls.timing_cache_id(scene.built(**change)) for change in changes]
    assert None not in ids
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 3}, r"num_heads is 4, num_kv_heads 3; num_heads must be a multiple"),
        ({"num_kv_heads": 0}, "num_kv_heads 0; num_heads must be"),
        ({"num_kv_heads": -2}, "num_kv_heads -2; num_heads must be"),
        ({"num_kv_heads": 8}, "num_kv_heads 8; num_heads must be"),
        ({"layout": "sbhd"}, "layout is 'sbhd'; allowed are bhsd, bshd, packed"),
        ({"layout": ""}, "layout is ''; allowed are"),
        ({"window_left": -2}, "window_left is -2; give 0 or more keys, or -1 for no limit"),
        ({"window_right": -5}, "window_right is -5"),
        ({"softcap": -1.0}, "softcap is -1; give a finite number above 0, or 0 for none"),
        ({"softcap": float("inf")}, "softcap is inf"),
        ({"softcap": float("nan")}, "softcap is nan"),
        (
            {"softcap": 1e-40},
            "softcap is 9.99.*e-41; give a finite number above 0, or 0 for none .*1.2e-38 at the least",
        ),
        ({"return_lse": 2}, "return_lse is 2; allowed are 0 and 1"),
        ({"q_lengths": -1}, "q_lengths is -1; allowed are 0 and 1"),
        ({"cu_seqlens": 1, "q_lengths": 1}, "cu_seqlens excludes q_lengths and kv_lengths"),
        ({"cu_seqlens": 1, "kv_lengths": 1}, "cu_seqlens excludes q_lengths and kv_lengths"),
        ({"cu_seqlens": 1, "layout": "bhsd"}, "layout 'bhsd' has no ragged form"),
        ({"causal": 2, "bottom_right": 0}, "causal is 2, which is aligned bottom right, and bottom_right is 0"),
        ({"head_size": 300, "num_kv_heads": 1}, "head size is 300"),
        ({"head_size": 0, "num_kv_heads": 1}, "head size is 0"),
        ({"head_size": 256, "num_kv_heads": 1}, "does not hold fmha_fwd_d256_fp16.*--head-size 256"),
    ],
)
def test_what_is_not_served_is_refused_at_creation(scene: Scene, changes: dict[str, Any], message: str) -> None:
    assert scene.calls.create(scene.creator, "bad layer", fields(**changes), BUILD) is None
    with pytest.raises(PluginError, match=message):
        raise pyfmha.trt.last_failure().error


# Tensors


def test_types_of_all_tensors(scene: Scene) -> None:
    plugin = scene.built(return_lse=1, q_lengths=1, kv_lengths=1)
    assert scene.calls.output_types(plugin, [HALF] * 3 + [INT32] * 2) == [HALF, FLOAT]
    assert scene.calls.output_types(plugin, [HALF] * 3 + [INT32, 8]) is None
    assert "kv_lengths is of type" in last_error()
    assert "it must be INT32" in last_error()
    assert scene.calls.output_types(plugin, [HALF] * 3) is None
    assert (
        "3 inputs, 2 outputs; it has the inputs Q and K and V and q_lengths and kv_lengths, the outputs" in last_error()
    )


def test_formats_of_all_tensors(scene: Scene) -> None:
    if not hasattr(scene.trt, "TensorFormat"):
        pytest.skip(f"{scene.trt.__name__} only runs engines: it has no TensorFormat, and never asks")
    plugin = scene.built(return_lse=1, kv_lengths=1)
    good = [*[of((2, 4, 5, D))] * 3, of((2,), INT32), of((2, 4, 5, D)), of((2, 4, 5), FLOAT)]
    for position, tensor in enumerate(good):
        assert scene.calls.supports(plugin, position, good) is True
        other = INT32 if tensor.type != INT32 else HALF
        for bad in (of(tensor.shape, other), Tensor(tensor.shape, tensor.type, format=1)):
            assert scene.calls.supports(plugin, position, [*good[:position], bad, *good[position + 1 :]]) is False


@pytest.mark.parametrize(
    ("changes", "inputs", "outputs"),
    [
        ({"num_kv_heads": 2, "return_lse": 1}, [[7, 4, 5, D], [7, 2, 9, D], [7, 2, 9, D]], [[7, 4, 5, D], [7, 4, 5]]),
        ({"layout": "bshd", "return_lse": 1}, [[7, None, 4, D]] * 3, [[7, None, 4, D], [7, 4, None]]),
        ({"layout": "packed"}, [[None, 6, 3, 4, D]], [[None, 6, 4, D]]),
        ({"layout": "packed", "num_kv_heads": 2, "return_lse": 1}, [[None, 6, 8, D]], [[None, 6, 4, D], [None, 4, 6]]),
        ({"cu_seqlens": 1, "return_lse": 1}, [[None, 4, D]] * 3 + [[None]] * 2, [[None, 4, D], [4, None]]),
        ({"cu_seqlens": 1, "layout": "packed"}, [[5, 3, 4, D], [3], [3]], [[5, 4, D]]),
        ({"cu_seqlens": 1, "layout": "packed"}, [[5, 12, D], [3], [3]], [[5, 4, D]]),
    ],
)
def test_output_shapes(scene: Scene, changes: dict[str, Any], inputs: list[Any], outputs: list[Any]) -> None:
    assert scene.calls.output_shapes(scene.built(**changes), inputs) == outputs, last_error()


@pytest.mark.parametrize(
    ("changes", "inputs", "message"),
    [
        ({"num_kv_heads": 2}, [[7, 4, 5, D], [7, 4, 9, D], [7, 2, 9, D]], "K has kv heads 4, the plugin was created"),
        ({"num_kv_heads": 2}, [[7, 4, 5, D], [7, 2, 9, D], [7, 2, 8, D]], "V has Skv 8, K has 9; they must be"),
        ({"num_kv_heads": 2, "layout": "packed"}, [[7, 5, 3, 4, D]], r"QKV has 5 dimensions; it must be \[batch, seq"),
        ({"layout": "packed"}, [[7, 5, 2, 4, D]], "QKV has Q, K, V 2, the plugin was created for 3"),
        ({"kv_lengths": 1}, [[7, 4, 5, D]] * 3 + [[6]], "kv_lengths has batch 6, Q has 7"),
        ({"kv_lengths": 1}, [[7, 4, 5, D]] * 3 + [[7, 1]], r"kv_lengths has 2 dimensions; it must be \[batch\]"),
    ],
)  # fmt: skip
def test_shapes_are_refused_while_building(
    scene: Scene, changes: dict[str, Any], inputs: list[Any], message: str
) -> None:
    assert scene.calls.output_shapes(scene.built(**changes), inputs) is None
    with pytest.raises(PluginError, match=message):
        raise pyfmha.trt.last_failure().error


@pytest.mark.parametrize(
    ("changes", "inputs", "outputs", "message"),
    [
        ({"num_kv_heads": 2}, [*CROSS[:2], of((2, 2, 8, D))], [of((2, 4, 5, D))], r"shapes are Q \[2, 4, 5, 32\]"),
        ({"num_kv_heads": 2}, CROSS, [of((2, 4, 9, D))], r"must be Q \[batch, 4, Sq, 32\], K \[batch, 2, Skv, 32\]"),
        ({"return_lse": 1}, [of((2, 4, 5, D))] * 3, [of((2, 4, 5, D)), of((2, 5, 4), FLOAT)], r"Lse \[2, 5, 4\]"),
        ({"cu_seqlens": 1}, [of((5, 4, D))] * 3 + [of((0,), INT32)] * 2, [of((5, 4, D))], r"_q \[batch \+ 1\]"),
        ({"cu_seqlens": 1}, [of((5, 4, D))] * 3 + [of((3,), INT32), of((4,), INT32)], [of((5, 4, D))], r"_kv \[4\]"),
        ({"kv_lengths": 1}, [of((2, 4, 5, D))] * 3 + [of((2,), FLOAT)], [of((2, 4, 5, D))], "kv_lengths is of type"),
        ({"kv_lengths": 1}, [of((2, 4, 5, D))] * 3, [of((2, 4, 5, D))], "3 inputs, 1 outputs"),
    ],
)  # fmt: skip
def test_shapes_and_types_are_checked_at_run_time(
    scene: Scene,
    fake_cuda: FakeCuda,
    changes: dict[str, Any],
    inputs: list[Tensor],
    outputs: list[Tensor],
    message: str,
) -> None:
    start(fake_cuda)
    plugin = scene.loaded(scene.built(**changes))
    assert scene.calls.on_shape_change(plugin, inputs, outputs) != 0
    with pytest.raises(PluginError, match=message):
        raise pyfmha.trt.last_failure().error
    assert scene.calls.enqueue(plugin, INPUTS[: len(inputs)], [OUT, LSE][: len(outputs)], 0, STREAM) != 0
    assert fake_cuda.launch_count() == 0


def test_no_workspace_is_asked_for(scene: Scene) -> None:
    plugin = scene.built(num_kv_heads=2)
    dynamic = [Tensor((-1, heads, -1, D), HALF, largest=(8, heads, rows, D)) for heads, rows in ((4, 64), (2, 512))]
    q, kv = dynamic
    assert scene.calls.configure(plugin, [q, kv, kv], [q]) == 0
    assert scene.calls.workspace(plugin, [q, kv, kv], [q]) == 0


def test_shapes_alternate_and_layouts_keep_their_pattern(scene: Scene, fake_cuda: FakeCuda) -> None:
    start(fake_cuda)
    plugin = prepared(scene, [of((1, 8, 3, 4, D))], [of((1, 8, 4, D))], layout="packed")
    for rows in (5, 8, 5):
        for shape in ((2, rows, 3, 4, D), (2, rows, 12, D)):  # one memory, whatever the name of its axes
            assert scene.calls.on_shape_change(plugin, [of(shape)], [of((2, rows, 4, D))]) == 0
            assert scene.calls.enqueue(plugin, [Q], [OUT], 0, STREAM) == 0
        first, second = fake_cuda.launches()[-2:]
        assert first.params[:33] == second.params[:33]
        assert struct.unpack("<q", first.params[17])[0] == rows * 12 * D


def test_every_tactic_of_the_forward_function(scene: Scene, forward_library: Library, fake_cuda: FakeCuda) -> None:
    start(fake_cuda)
    plugin = prepared(scene, CROSS, [of((2, 4, 5, D))], num_kv_heads=2)
    tactics = scene.calls.tactics(plugin)
    assert tactics is not None
    assert len(tactics) == 2
    names = set()
    for tactic in tactics:
        assert scene.calls.set_tactic(plugin, tactic) == 0
        for q in (Q, Q + 2):  # aligned, and by one element not
            assert scene.calls.enqueue(plugin, [q, K, V], [OUT], 0, STREAM) == 0
            names.add(fake_cuda.launches()[-1].image_sha256)
    assert len(names) == 4


def test_enqueue_may_be_captured(scene: Scene, fake_cuda: FakeCuda) -> None:
    start(fake_cuda)
    plugin = prepared(scene, CROSS, [of((2, 4, 5, D)), of((2, 4, 5), FLOAT)], num_kv_heads=2, return_lse=1)
    fake_cuda.begin_capture()
    status = scene.calls.enqueue(plugin, [Q, K, V], [OUT, LSE], 0, STREAM)
    fake_cuda.end_capture()
    assert (status, fake_cuda.violations()[0], fake_cuda.launch_count()) == (0, 0, 1)


def test_failures_name_the_shape(scene: Scene, fake_cuda: FakeCuda) -> None:
    start(fake_cuda)
    plugin = prepared(scene, CROSS, [of((2, 4, 5, D))], num_kv_heads=2)
    fake_cuda.fail("cuLaunchKernel", 719)
    assert scene.calls.enqueue(plugin, [Q, K, V], [OUT], 0, STREAM) != 0
    assert "2 heads of K and V, batch 2, Sq 5, Skv 9): enqueue: cuLaunchKernel failed" in last_error()


# Networks


def network_of(*shapes: tuple[int, ...], kind: int = HALF) -> tuple[Any, list[Any]]:
    trt = make_binding()
    network = trt.INetworkDefinition()
    return network, [network.add_input(f"t{i}", DataType(kind), shape) for i, shape in enumerate(shapes)]


def int32(network: Any, *shape: int) -> Any:
    return network.add_input("lengths", DataType.INT32, shape)


KNOWN = (2, HEADS, 8, SIZE)
DYNAMIC = (-1, HEADS, -1, SIZE)


@pytest.mark.parametrize(
    ("shapes", "keywords"),
    [
        ((KNOWN,) * 3, {}),
        ((DYNAMIC,) * 3, {}),
        ((KNOWN, (2, HEADS, 9, SIZE), (2, HEADS, 9, SIZE)), {"causal": True}),
        ((KNOWN,) * 3, {"softcap": 1.0}),
        (((2, HEADS, 8, 20),) * 3, {}),
    ],
)
def test_the_production_kernel_serves_all_where_the_library_holds_it(
    forward_library: Library, shapes: Any, keywords: dict[str, Any]
) -> None:
    """It is as fast as the first kernel, and far faster on Hopper."""
    network, tensors = network_of(*shapes)
    add_attention(network, *tensors, library=forward_library, **{"causal": True, **keywords})
    assert problem_of(network.layers[0].plugin).features is not None


@LONG
@pytest.mark.parametrize("shape", [KNOWN, DYNAMIC])
def test_a_library_of_the_first_kernel_alone_serves_as_ever(attention_library: Library, shape: tuple[int, ...]) -> None:
    network, tensors = network_of(shape, shape, shape)
    add_attention(network, *tensors, causal=True, library=attention_library)
    assert problem_of(network.layers[0].plugin).features is None
    with pytest.raises(PluginError, match="does not hold fmha_fwd_d32_fp16"):
        add_attention(network, *tensors, causal=True, library=attention_library, softcap=3.0)


def test_every_keyword_of_add_attention(forward_library: Library) -> None:
    network, tensors = network_of((-1, -1, 4, SIZE), (-1, -1, 2, SIZE), (-1, -1, 2, SIZE))
    lengths = [int32(network, -1), int32(network, -1)]
    out, lse = add_attention(
        network, *tensors, causal=False, scale=0.5, window=(3, 1), align="bottom-right", softcap=2.0, layout="bshd",
        q_lengths=lengths[0], kv_lengths=lengths[1], return_lse=True, name="cross", library=forward_library,
    )  # fmt: skip
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == ((-1, -1, 4, SIZE), HALF, (-1, 4, -1), FLOAT)
    (layer,) = network.layers
    assert layer.inputs == [*tensors, *lengths]
    assert layer.name == "cross"
    problem = problem_of(layer.plugin)
    assert (problem.num_heads, problem.head_size, problem.softmax_scale, problem.causal) == (4, SIZE, 0.5, False)
    assert problem.features == pyfmha.trt.Features(2, "bshd", True, (3, 1), 2.0, True, True, True, False)


def test_ragged_attention_in_a_network(forward_library: Library) -> None:
    network, tensors = network_of((-1, 4, SIZE), (-1, 2, SIZE), (-1, 2, SIZE))
    begins = int32(network, -1)
    out, lse = add_attention(
        network,
        *tensors,
        causal=True,
        cu_seqlens_q=begins,
        cu_seqlens_kv=begins,
        return_lse=True,
        library=forward_library,
    )
    assert (out.shape, lse.shape) == ((-1, 4, SIZE), (4, -1))
    assert network.layers[0].inputs == [*tensors, begins, begins]
    assert problem_of(network.layers[0].plugin).features.layout == "bshd"


@pytest.mark.parametrize(
    ("shape", "heads", "ragged", "out"),
    [
        ((-1, -1, 3, 4, SIZE), (4,), False, (-1, -1, 4, SIZE)),
        ((2, -1, 8, SIZE), (4, 2), False, (2, -1, 4, SIZE)),
        ((-1, 3, 4, SIZE), (4,), True, (-1, 4, SIZE)),
        ((-1, 6, SIZE), (4, 1), True, (-1, 4, SIZE)),
    ],
)
def test_packed_attention_in_a_network(
    forward_library: Library, shape: tuple[int, ...], heads: tuple[int, ...], ragged: bool, out: tuple[int, ...]
) -> None:
    network, (qkv,) = network_of(shape)
    begins = {name: int32(network, -1) for name in ("cu_seqlens_q", "cu_seqlens_kv")} if ragged else {}
    made = add_attention_packed(network, qkv, *heads, causal=True, **begins, library=forward_library)
    assert made.shape == out
    assert problem_of(network.layers[0].plugin).kv_heads == heads[-1]
    assert network.layers[0].inputs == [qkv, *begins.values()]


BAD_NETWORKS: list[tuple[dict[str, Any], str]] = [
    ({"causal": "lower-left"}, "causal is 'lower-left'; allowed are True, False and 'bottom-right'"),
    ({"causal": None}, "causal is None; allowed are True, False and 'bottom-right'"),
    ({"align": "middle"}, "align is 'middle'; allowed are top-left, bottom-right"),
    ({"causal": "bottom-right", "align": "top-left"}, "leave one of them out"),
    ({"window": (1, 2, 3)}, r"window is \(1, 2, 3\); give \(left, right\)"),
    ({"window": (-2, 0)}, "window_left is -2"),
    ({"softcap": -1.0}, "softcap is -1"),
    ({"softcap": 1e-50}, "softcap is 1e-50; give a finite number above 0"),  # 0 as a float32, which is none
    ({"layout": "sbhd"}, "layout is 'sbhd'; allowed are bhsd and bshd"),
    ({"layout": "packed"}, "use add_attention_packed"),
    ({"cu_seqlens_q": "lengths"}, "cu_seqlens_q is given and cu_seqlens_kv is not; give both"),
    ({"cu_seqlens_kv": "lengths"}, "cu_seqlens_kv is given and cu_seqlens_q is not; give both"),
    ({"cu_seqlens_q": "lengths", "cu_seqlens_kv": "lengths"}, r"must be \[tokens, heads, head size\]"),
    ({"q_lengths": "float"}, "q_lengths is of type.*it must be INT32"),
    ({"kv_lengths": "long"}, "kv_lengths has batch 3, Q has 2"),
]


@pytest.mark.parametrize(("keywords", "message"), BAD_NETWORKS)
def test_what_a_network_cannot_have(forward_library: Library, keywords: dict[str, Any], message: str) -> None:
    network, tensors = network_of(KNOWN, KNOWN, KNOWN)
    made = {"lengths": int32(network, 2), "long": int32(network, 3)}
    made["float"] = network.add_input("float", DataType.FLOAT, (2,))
    keywords = {name: made.get(value, value) if isinstance(value, str) else value for name, value in keywords.items()}
    with pytest.raises(PluginError, match=message):
        add_attention(network, *tensors, library=forward_library, **{"causal": True, **keywords})


@pytest.mark.parametrize(
    ("shapes", "keywords", "message"),
    [
        ((KNOWN, (2, 3, 8, SIZE), (2, 3, 8, SIZE)), {}, "num_heads is 4, num_kv_heads 3; num_heads must be a multiple"),
        ((KNOWN, (2, 2, 8, SIZE), (2, 4, 8, SIZE)), {}, "K and V must have as many heads"),
        ((KNOWN, (2, 4, 8, 16), (2, 4, 8, SIZE)), {}, "Q and K one head size"),
        ((KNOWN, (2, 4, 8, SIZE), (2, 4, 9, SIZE)), {}, "V has Skv 9, K has 8"),
        (((2, 4, 8, 257),) * 3, {}, "head size is 257"),
    ],
)
def test_shapes_that_a_network_cannot_have(
    forward_library: Library, shapes: Any, keywords: dict[str, Any], message: str
) -> None:
    network, tensors = network_of(*shapes)
    with pytest.raises(PluginError, match=message):
        add_attention(network, *tensors, library=forward_library, **{"causal": True, **keywords})


@pytest.mark.parametrize(
    ("shape", "heads", "message"),
    [
        ((2, 8, 3, 4, SIZE), (4, 2), "QKV has 5 dimensions"),
        ((2, 8, 12, SIZE), (5,), r"QKV has heads \+ 2 \* kv heads 12, the plugin was created for 15"),
        ((2, 8, 12, -1), (4,), "the head size, must be known"),
        ((2, 8, 12, SIZE), (4, 3), "num_heads must be a multiple"),
    ],
)
def test_packed_tensors_that_do_not_fit(
    forward_library: Library, shape: tuple[int, ...], heads: tuple[int, ...], message: str
) -> None:
    network, (qkv,) = network_of(shape)
    with pytest.raises(PluginError, match=message):
        add_attention_packed(network, qkv, *heads, causal=True, library=forward_library)


@pytest.mark.parametrize("causal", [True, False, 1, 0, np.True_, np.False_])
def test_causal_as_a_number_means_what_it_says(forward_library: Library, causal: Any) -> None:
    network, tensors = network_of(KNOWN, KNOWN, KNOWN)
    add_attention(network, *tensors, causal=causal, library=forward_library)
    assert problem_of(network.layers[0].plugin).causal is bool(causal)


def test_nobody_leaves_causal_to_a_default(forward_library: Library) -> None:
    """A default would give an encoder, or a decoder, wrong numbers without an error."""
    network, tensors = network_of(KNOWN, KNOWN, KNOWN)
    (qkv,) = network_of((2, 8, 12, SIZE))[1]
    choices = r"causal=True \(.*causal=False \(.*causal='bottom-right'"
    for error, name, call in [
        (PluginError, "add_attention", lambda: add_attention(network, *tensors, library=forward_library)),
        (PluginError, "add_attention_packed", lambda: add_attention_packed(network, qkv, 4, library=forward_library)),
        (PluginError, "DirectSession", lambda: pyfmha.DirectSession(num_heads=4, head_size=SIZE)),
        (EngineError, "EngineConfig", lambda: pyfmha.EngineConfig(4, SIZE, 2, 8)),
    ]:
        with pytest.raises(error, match=f"^{name} is not told whether the attention is causal; give {choices}"):
            call()
    for told in (add_attention, add_attention_packed, pyfmha.DirectSession, pyfmha.EngineConfig):
        causal = inspect.signature(told).parameters["causal"]
        assert (causal.kind, causal.default) == (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.empty)
    assert network.layers == []
