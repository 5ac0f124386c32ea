"""Torch-TensorRT's converters, on a double of its registry: the layer that they add is run on the fake GPU."""

import enum
import importlib
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from plugin_host.functions import alibi_of, own_functions, soft_near_of
from torch_gpu import forget
from trt_double.full.gpu import Gpu

import pyfmha.torch
from pyfmha.attention.reference import attend, relative_error
from pyfmha.errors import PluginError
from pyfmha.functions.alibi import alibi
from pyfmha.torch import launch as launching
from pyfmha.trt.engine import build_plan
from pyfmha.trt.session import Session

pytest_plugins = [
    "trt_double.fixtures", "trt_double.full.fixtures", "plugin_host.operators", "plugin_host.attention",
]  # fmt: skip

CONVERTERS = "pyfmha.torch.tensorrt"
HEADS, SIZE = 4, 32
SETTINGS = SimpleNamespace(truncate_double=False, decompose_attention=False)
SDPA = torch.ops.aten.scaled_dot_product_attention.default


class Priority(enum.Enum):
    STANDARD, HIGH = range(2)


class Registry:
    """As ``_ConverterRegistry`` of Torch-TensorRT 2.14: by target a list of converters, in the order in which they are
    asked, each validator with the node and the settings."""

    def __init__(self) -> None:
        self.held: dict[Any, list[Any]] = {SDPA: ["its own"]}

    def decorate(
        self,
        key: Any,
        *,
        enabled: bool = True,
        capability_validator: Any = None,
        priority: Any = Priority.STANDARD,
        supports_dynamic_shapes: bool = False,
        requires_output_allocator: bool = False,
        requires_native_multidevice: bool = False,
    ) -> Any:
        assert isinstance(key, torch._ops.OpOverload)
        assert enabled
        assert supports_dynamic_shapes
        assert not requires_output_allocator
        assert not requires_native_multidevice

        def register(converter: Any) -> Any:
            entry = (converter, capability_validator)
            self.held.setdefault(key, []).insert(0 if priority is Priority.HIGH else len(self.held[key]), entry)
            return converter

        return register


@pytest.fixture
def registry(
    forward_library_path: Path, gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Registry]:
    gpu.learn(forward_library_path.with_name("manifest.json"))
    monkeypatch.setenv("PYFMHA_LIBRARY", str(shutil.copy(forward_library_path, tmp_path / "libforward.so")))
    with registered(monkeypatch) as made:
        yield made


@contextmanager
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    """The converters, in a double of the registry."""
    made = Registry()
    launching.library.cache_clear()
    modules = {
        "_ConverterRegistry": {"ConverterPriority": Priority, "dynamo_tensorrt_converter": made.decorate},
        "converter_utils": {"get_trt_tensor": lambda ctx, value, name: value},
    }
    for name in ("torch_tensorrt", "torch_tensorrt.dynamo", "torch_tensorrt.dynamo.conversion"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name, content in modules.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, f"torch_tensorrt.dynamo.conversion.{name}", module)
    monkeypatch.delitem(sys.modules, CONVERTERS, raising=False)
    importlib.import_module(CONVERTERS)
    yield made
    sys.modules.pop(CONVERTERS, None)
    launching.library.cache_clear()


class Native(torch.nn.Module):
    def __init__(self, **keywords: Any) -> None:
        super().__init__()
        self.keywords = keywords

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, **self.keywords)


class Ours(Native):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *lengths: torch.Tensor) -> Any:
        names = dict(zip(("q_lengths", "kv_lengths"), lengths, strict=False))
        return pyfmha.torch.attention(q, k, v, **names, **self.keywords)


def node_of(module: torch.nn.Module, *inputs: torch.Tensor) -> Any:
    program = torch.export.export(module, inputs)
    return next(node for node in program.graph.nodes if "attention" in str(node.target))


def tensors(kv_heads: int = HEADS) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, heads, rows, SIZE).half() for heads, rows in ((HEADS, 7), (kv_heads, 9), (kv_heads, 9))]


CASES: list[tuple[type[Native], dict[str, Any], dict[str, Any], int]] = [
    (Native, {}, {}, HEADS), (Native, {"is_causal": True, "scale": 0.5}, {"sm_scale": 0.5, "window_right": 0}, HEADS),
    (Native, {"enable_gqa": True}, {}, 2), (Ours, {"softcap": 2.0, "window": (3, 1)}, {"softcap": 2.0, "window_left": 3,
    "window_right": 1}, 2), (Ours, {"causal": "bottom-right", "return_lse": True},
    {"window_right": 0, "bottom_right": True}, HEADS),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "keywords", "exact", "kv_heads"), CASES, ids=str)
def test_a_node_becomes_the_plugins_layer(
    registry: Registry, trt11: Any, kind: Any, keywords: dict[str, Any], exact: dict[str, Any], kv_heads: int
) -> None:
    inputs = tensors(kv_heads)
    node = node_of(kind(**keywords), *inputs)
    converter, validator = registry.held[node.target][0]
    assert validator(node, SETTINGS)

    def define(network: Any) -> None:
        made = {
            argument: network.add_input(name, trt11.DataType.HALF, tuple(x.shape))
            for argument, name, x in zip(node.args[:3], "QKV", inputs, strict=True)
        }
        arguments = tuple(made.get(argument, argument) for argument in node.args)
        results = converter(SimpleNamespace(net=network), node.target, arguments, node.kwargs, "a_layer")
        for name, result in zip(("Out", "Lse"), results if isinstance(results, tuple) else [results], strict=False):
            result.name = name
            network.mark_output(result)

    with Session(build_plan(trt11, define, {}).plan, trt_module=trt11) as session:
        results = session.run({name: x.numpy() for name, x in zip("QKV", inputs, strict=True)})

    wanted, lse = attend(*(x.double().numpy() for x in inputs), **{"sm_scale": SIZE**-0.5, **exact})
    assert relative_error(results["Out"], wanted) < 1e-3
    assert set(results) == {"Out", "Lse"} if keywords.get("return_lse") else {"Out"}
    if "Lse" in results:
        np.testing.assert_allclose(results["Lse"], lse, rtol=1e-3)


class Masked(Native):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any = None) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, **self.keywords)


class OursBeside(Native):
    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: Any, mask: Any = None, sinks: Any = None
    ) -> Any:
        return pyfmha.torch.attention(q, k, v, bias=bias, mask=mask, sinks=sinks, **self.keywords)


NUMBERS = torch.randn(2, HEADS, 7, 9, generator=torch.Generator().manual_seed(4))
BESIDE = {"bias": NUMBERS, "mask": NUMBERS[0, 0] > -1, "sinks": NUMBERS[0, :, 0, 0].half()}


@pytest.mark.parametrize(
    ("kind", "beside"),
    [(Masked, {"mask": NUMBERS[:, :1] > 0}), (Masked, {"bias": NUMBERS[0].half()}), (OursBeside, BESIDE)],
    ids=["mask", "bias", "ours"],
)  # fmt: skip
def test_a_mask_becomes_an_input_of_the_layer(
    registry: Registry, trt11: Any, kind: Any, beside: dict[str, torch.Tensor]
) -> None:
    inputs = [*tensors(), *beside.values()]
    node = node_of(kind(), *inputs)
    converter, validator = registry.held[node.target][0]
    assert validator(node, SETTINGS)
    names = [*"QKV", *beside]
    types = {
        torch.float16: trt11.DataType.HALF, torch.float32: trt11.DataType.FLOAT, torch.bool: trt11.DataType.BOOL
    }  # fmt: skip

    def define(network: Any) -> None:
        given = [value for value in (*node.args, *node.kwargs.values()) if isinstance(value, torch.fx.Node)]
        made = {
            argument: network.add_input(name, types[x.dtype], tuple(x.shape))
            for argument, name, x in zip(given, names, inputs, strict=True)
        }
        arguments = tuple(made.get(argument, argument) for argument in node.args)
        keywords = {name: made.get(argument, argument) for name, argument in node.kwargs.items()}
        results = converter(SimpleNamespace(net=network), node.target, arguments, keywords, "a_layer")
        result = results[0] if isinstance(results, tuple) else results
        result.name = "Out"
        network.mark_output(result)

    with Session(build_plan(trt11, define, {}).plan, trt_module=trt11) as session:
        results = session.run({name: x.numpy() for name, x in zip(names, inputs, strict=True)})

    exact = {name: x.double().numpy() if x.is_floating_point() else x.numpy() for name, x in beside.items()}
    wanted, _ = attend(*(x.double().numpy() for x in inputs[:3]), sm_scale=SIZE**-0.5, **exact)
    assert relative_error(results["Out"], wanted) < 1e-3


@pytest.fixture
def functions_registry(
    attention_plugin_path: Path, gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Registry]:
    """Where the library has functions."""
    gpu.learn(attention_plugin_path.with_name("manifest.json"))
    gpu.formulas |= {"alibi": alibi_of, "soft_near": soft_near_of}
    monkeypatch.setenv("PYFMHA_LIBRARY", str(shutil.copy(attention_plugin_path, tmp_path / "libfunctions.so")))
    forget()
    with registered(monkeypatch) as made:
        yield made
    forget()


class WithFunctions(torch.nn.Module):
    """A mask comes behind what the function takes."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__()
        self.keywords = keywords

    def forward(self, q: Any, k: Any, v: Any, own: Any, mask: Any = None) -> Any:
        keywords = dict(self.keywords)
        if mask is not None:
            keywords["mask"] = mask if keywords.get("mask") is None else (mask, keywords["mask"])
        return pyfmha.torch.attention(q, k, v, score_inputs=[own], **keywords)


OF_TESTS = own_functions()
OWN = torch.tensor([0.5, 0.25, 2.0, 1.0])
FUNCTIONS: list[tuple[dict[str, Any], Callable[..., Any], dict[str, Any], bool]] = [
    ({"score": alibi, "causal": True}, alibi_of, {"window_right": 0}, False),
    ({"score": OF_TESTS.soft, "mask": OF_TESTS.near, "mask_inputs": [3], "softcap": 2.0}, soft_near_of,
     {"softcap": 2.0}, True),
]  # fmt: skip


@pytest.mark.parametrize(("keywords", "formulas", "exact", "masked"), FUNCTIONS, ids=range(len(FUNCTIONS)))
def test_functions_become_those_of_the_layer(
    functions_registry: Registry, trt11: Any, keywords: Any, formulas: Any, exact: dict[str, Any], masked: bool
) -> None:
    mask = NUMBERS[0, :, :1] > -1
    inputs = [*tensors(), OWN, *[mask][: int(masked)]]
    node = node_of(WithFunctions(**keywords), *inputs)
    converter, validator = functions_registry.held[node.target][0]
    assert validator(node, SETTINGS)
    kinds = {torch.float16: trt11.DataType.HALF, torch.float32: trt11.DataType.FLOAT, torch.bool: trt11.DataType.BOOL}
    names = ["Q", "K", "V", "own", "mask"][: len(inputs)]

    def define(network: Any) -> None:
        made = {
            name: network.add_input(name, kinds[x.dtype], tuple(x.shape)) for name, x in zip(names, inputs, strict=True)
        }
        of_nodes = dict(zip(["q", "k", "v", "own", "mask"], made.values(), strict=False))
        arguments = torch.fx.map_arg(node.args, lambda one: of_nodes[one.name])
        named = torch.fx.map_arg(node.kwargs, lambda one: of_nodes[one.name])
        (out,) = converter(SimpleNamespace(net=network), node.target, arguments, named, "a_layer")
        out.name = "Out"
        network.mark_output(out)

    with Session(build_plan(trt11, define, {}).plan, trt_module=trt11) as session:
        found = session.run({name: x.numpy() for name, x in zip(names, inputs, strict=True)})["Out"]

    given = {"slopes": OWN.numpy(), "caps": OWN.numpy(), "num_heads": HEADS, "width": 3}
    more = {"mask": mask.numpy()[None]} if masked else {}
    wanted, _ = attend(
        *(x.double().numpy() for x in inputs[:3]), sm_scale=SIZE**-0.5, **exact, **more,
        **formulas(lambda array, *_: array, given),
    )  # fmt: skip
    assert relative_error(found, wanted) < 1e-3


@pytest.mark.parametrize(
    ("changed", "text"),
    [({"score_function": "natten:0"}, "has no plugin with the function natten:0"),
     ({"numbers": [3]}, "given are 1 and 1"), ({"q_lengths": torch.tensor([3, 4])}, "q_lengths is torch.int64")],
    ids=["function", "numbers", "lengths"],
)  # fmt: skip
def test_functions_that_are_left_alone_say_why(
    functions_registry: Registry, caplog: pytest.LogCaptureFixture, changed: dict[str, Any], text: str
) -> None:
    """Wherever the tensors were when the program was read: an engine has the library's function."""
    node = node_of(WithFunctions(score=alibi), *tensors(), OWN)
    names = [argument.name for argument in node.target._schema.arguments]
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    for name, value in changed.items():
        if isinstance(value, torch.Tensor):
            held, value = value, node.graph.placeholder(name)
            value.meta["val"] = held
        given[name] = value
    node.args, node.kwargs = (), given
    _, validator = functions_registry.held[node.target][0]
    with caplog.at_level(logging.INFO, CONVERTERS):
        assert not validator(node, SETTINGS)
    assert text in caplog.text


def test_ours_is_asked_before_its_own(registry: Registry) -> None:
    assert len(registry.held[SDPA]) == 2
    assert registry.held[SDPA][1] == "its own"


@pytest.mark.parametrize(
    ("module", "inputs", "text"),
    [
        (Native(dropout_p=0.5), tensors(), "a dropout"),
        (Masked(is_causal=True), [*tensors(), torch.ones(7, 9, dtype=torch.bool)], "a mask and is_causal"),
        (Masked(), [*[x.float() for x in tensors()], torch.ones(7, 9)], "does not hold fmha_biased_d32_fp32"),
        (Native(), [x[0] for x in tensors()], "other than four axes"),
        (Native(), [x.repeat(1, 1, 1, 5)[..., :130] for x in tensors()], "does not hold fmha_fwd_d256_fp16"),
        (Native(), [x.double() for x in tensors()], "types torch.float64"),
        (Ours(), [*tensors(), torch.tensor([3, 4])], "q_lengths is torch.int64; TensorRT's plugin takes int32"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_is_left_to_torch_tensorrt_says_why(
    registry: Registry, caplog: pytest.LogCaptureFixture, module: Any, inputs: Any, text: str
) -> None:
    node = node_of(module, *inputs)
    _, validator = registry.held[node.target][0]

    with caplog.at_level(logging.INFO, CONVERTERS):
        assert not validator(node, SETTINGS)

    assert f"{node.name} is left alone" in caplog.text
    assert text in caplog.text


def test_without_torch_tensorrt_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    monkeypatch.delitem(sys.modules, CONVERTERS, raising=False)

    with pytest.raises(PluginError, match=r"torch_tensorrt cannot be imported .*: pip install torch-tensorrt"):
        importlib.import_module(CONVERTERS)
