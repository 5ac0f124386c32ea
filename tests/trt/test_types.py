"""What a type checker makes of calls from outside: mypy in strict mode, as a user runs it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import pyfmha
from pyfmha.trt import protocols

ROOT = Path(pyfmha.__file__).parents[1]

SNIPPET = """
import json
from typing import Any

import numpy as np
import tensorrt
from numpy.typing import NDArray

import pyfmha
import pyfmha.torch
from pyfmha.trt import INetworkDefinition, ITensor

network: INetworkDefinition
q: ITensor
array: NDArray[np.float16]
whatever: Any


class OwnTensor:
    name = "q"
    shape = (1, 8, 128, 64)
    dtype: object = None
    is_network_input = True


class OwnNetwork:
    def add_input(self, name: str, dtype: object, shape: tuple[int, ...]) -> OwnTensor:
        return OwnTensor()

    def mark_output(self, tensor: OwnTensor) -> None: ...

    def add_plugin_v3(self, inputs: list[OwnTensor], shape_inputs: list[OwnTensor], plugin: object) -> object: ...


class OldNetwork:
    def add_input(self, name: str, dtype: object, shape: tuple[int, ...]) -> OwnTensor:
        return OwnTensor()

    def mark_output(self, tensor: OwnTensor) -> None: ...

out = pyfmha.add_attention(network, q, q, q, causal="bottom-right", align="bottom-right", layout="bshd")
out, lse = pyfmha.add_attention(network, q, q, q, causal=True, return_lse=True)
packed, lse = pyfmha.add_attention_packed(network, q, 8, causal=False, window=(3, -1), return_lse=True)
config = pyfmha.EngineConfig(8, 64, 1, 512, "float16", causal=False, layout="packed")
session = pyfmha.DirectSession(num_heads=8, head_size=64, causal=True, dtype="bf16")
reveal_type(pyfmha.add_attention(OwnNetwork(), OwnTensor(), OwnTensor(), OwnTensor(), causal=True, return_lse=True))
reveal_type(pyfmha.add_attention(OwnNetwork(), OwnTensor(), OwnTensor(), OwnTensor(), causal=True))
reveal_type(pyfmha.add_attention(whatever, whatever, whatever, whatever, causal=True, return_lse=True))
(made,) = pyfmha.add_operator(network, "BiasGelu", q, q, scale=0.5)
plan = pyfmha.build_plan(tensorrt, lambda network: None, {}, profiling_verbosity="detailed").plan
pyfmha.Session(plan, trt_module=tensorrt), pyfmha.Session("fmha.engine"), pyfmha.Session(whatever)
pyfmha.register(tensorrt, kind="library")
pyfmha.Library()["add"](0, 1, 2, n=3)
pyfmha.add_attention("network", q, q, q, causal=True)  # wrong
pyfmha.add_attention(OldNetwork(), q, q, q, causal=True)  # wrong
pyfmha.add_attention(network, array, array, array, causal=True)  # wrong
pyfmha.add_attention(network, q, q, 3, causal=True)  # wrong
pyfmha.add_attention(network, q, q, q, causal=True, mask=array)  # wrong
pyfmha.add_attention(network, q, q, q, causal=True, trt_module="tensorrt")  # wrong
pyfmha.add_attention(network, q, q, q, causal=True, sm_scale=0.1)  # wrong
pyfmha.add_attention_packed(network, array, 8, causal=True)  # wrong
pyfmha.add_operator(network, "BiasGelu", array)  # wrong
pyfmha.build_plan(json, lambda network: None, {})  # wrong
pyfmha.build_plan(tensorrt, lambda network: None, {}, profiling_verbosity="all")  # wrong
pyfmha.Session(3)  # wrong
pyfmha.Session(plan, trt_module=json)  # wrong
pyfmha.register(kind="c")  # wrong
pyfmha.torch.attention(whatever, whatever, whatever, causal="botom-right")  # wrong
pyfmha.torch.attention(whatever, whatever, whatever, layout="packed")  # wrong
both, lse = pyfmha.torch.attention(whatever, whatever, whatever, causal="bottom-right", return_lse=True)
pyfmha.add_attention(network, q, q, q, causal="botom-right")  # wrong
pyfmha.add_attention(network, q, q, q)  # wrong
pyfmha.add_attention(network, q, q, q, causal=True, align="left")  # wrong
pyfmha.add_attention(network, q, q, q, causal=True, layout="packed")  # wrong
pyfmha.add_attention(network, q, q, q, causal=True, window=3)  # wrong
pyfmha.add_attention_packed(network, q, 8, causal=True, layout="bshd")  # wrong
pyfmha.EngineConfig(8, 64, 1, 512, "fp8", causal=True)  # wrong
pyfmha.EngineConfig(8, 64, 1, 512, causal="botom-right")  # wrong
pyfmha.DirectSession(num_heads=8, head_size=64, causal=True, dtype="half")  # wrong
"""


TENSORRT = """
__version__: str
class PluginField: ...
class PluginFieldCollection: ...
class TensorRTPhase: ...
"""


def test_mypy_refuses_wrong_words(tmp_path: Path) -> None:
    file = tmp_path / "snippet.py"
    file.write_text(SNIPPET)
    (tmp_path / "tensorrt.pyi").write_text(TENSORRT)
    settings = ["--strict", "--no-error-summary", "--cache-dir", str(ROOT / ".mypy_cache")]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *settings, "--config-file", str(ROOT / "pyproject.toml"), str(file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    errors = {int(number) for number in re.findall(rf"{file.name}:(\d+): error: ", done.stdout)}
    wrong = {number for number, line in enumerate(SNIPPET.splitlines(), start=1) if line.endswith("# wrong")}
    assert errors == wrong, done.stdout + done.stderr
    revealed = re.findall(r'Revealed type is "(.*)"', done.stdout)
    assert revealed == ["tuple[snippet.OwnTensor, snippet.OwnTensor]", "snippet.OwnTensor", "tuple[Any, Any]"]


MEMBERS = {
    protocols.TensorRT: "",
    protocols.ITensor: "ITensor",
    protocols.INetworkDefinition: "INetworkDefinition",
    protocols.IHostMemory: "IHostMemory",
}


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt_lean", "tensorrt_rtx"])
def test_the_protocols_are_what_tensorrts_classes_have(name: str) -> None:
    """But that tensorrt_rtx has no plugins in networks, and tensorrt_lean no networks."""
    module = pytest.importorskip(name)
    for protocol, own in MEMBERS.items():
        asked = {member for member in vars(protocol) if member in ("__name__", "__version__") or member[0] != "_"}
        found = getattr(module, own, None) if own else module
        if found is not None:
            assert {member for member in asked if not hasattr(found, member)} <= {"add_plugin_v3"}
