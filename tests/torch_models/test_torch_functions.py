"""Functions of a user's on PyTorch's tensors: on the CPU against formulas, on the fake driver what is launched."""

import math
import struct
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_cuda import FakeCuda
from plugin_host.functions import own_functions
from torch_gpu import attention_with_op, forget, torch_gpu
from trt_double.scene import HEADS, SIZE

import pyfmha.torch
from pyfmha.attention.biased import ARGUMENTS
from pyfmha.attention.reference import attend, relative_error
from pyfmha.errors import LibraryError, PluginError
from pyfmha.functions import evaluate as evaluation
from pyfmha.functions.alibi import alibi
from pyfmha.functions.documents import documents
from pyfmha.functions.groups import groups
from pyfmha.functions.natten import natten
from pyfmha.interpreter.kernel import _load_kernel, run_interpreted
from pyfmha.runtime.library import Library
from pyfmha.torch.functions import _names
from pyfmha.torch.with_functions import attention_with_op as real_op

pytest_plugins = ("trt_double.fixtures", "plugin_host.operators", "plugin_host.attention")


OWN = own_functions()
SLOPES = torch.tensor([0.5, 0.25, 0.125, 1.0])


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(evaluation, "evaluate", partial(evaluation.evaluate, run=run_interpreted))
    forget()
    yield
    forget()


def tensors(rows: int = 7, keys: int = 9) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, heads, n, 16, generator=generator) for heads, n in ((4, rows), (2, keys), (2, keys))]


def sloped(score: Any, batch: int, head: int, query: Any, key: Any) -> Any:
    return score + SLOPES[head].item() * (key - query)


def near_by(batch: int, head: int, query: Any, key: Any) -> Any:
    return (query - key < 3) & (key <= query)


def capped(score: Any, batch: int, head: int, query: Any, key: Any) -> Any:
    return SLOPES[head].item() * np.tanh(score / SLOPES[head].item())


CASES: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ({"score": alibi, "score_inputs": [SLOPES]}, {}, {"score": sloped}),
    ({"score": alibi, "score_inputs": [SLOPES]}, {"causal": "bottom-right", "q_lengths": torch.tensor([3, 7]),
      "kv_lengths": torch.tensor([9, 4])}, {"score": sloped}),
    ({"mask": OWN.near, "mask_inputs": {"width": 3}}, {"softcap": 2.0}, {"seen": near_by}),
    ({"mask": (torch.arange(9) % 3 > 0, OWN.near), "mask_inputs": [3]}, {}, {"seen": near_by}),
    ({"score": OWN.soft, "score_inputs": [SLOPES], "mask": OWN.near, "mask_inputs": [3]}, {},
     {"score": capped, "seen": near_by}),
    ({"score": OWN.soft_near, "score_inputs": [SLOPES, 3]}, {}, {"score": capped, "seen": near_by}),
]  # fmt: skip


@pytest.mark.parametrize(("functions", "keywords", "formulas"), CASES, ids=range(len(CASES)))
def test_the_cpu_against_formulas(functions: Any, keywords: Any, formulas: Any) -> None:
    q, k, v = tensors()
    out, lse = pyfmha.torch.attention(q, k, v, return_lse=True, **functions, **keywords)

    lengths = {name: keywords[name].tolist() for name in ("q_lengths", "kv_lengths") if name in keywords}
    shown = {"mask": functions["mask"][0].numpy()[None, None, None]} if type(functions.get("mask")) is tuple else {}
    wanted, sums = attend(
        *(x.double().numpy() for x in (q, k, v)), sm_scale=0.25, softcap=keywords.get("softcap", 0.0),
        window_right=0 if "causal" in keywords else -1, bottom_right="causal" in keywords, **lengths, **shown,
        **formulas,
    )  # fmt: skip
    assert relative_error(out.numpy(), wanted) < 1e-5
    np.testing.assert_array_equal(np.isinf(lse.numpy()), np.isinf(sums))
    kept = np.isfinite(sums)
    assert relative_error(lse.numpy()[kept], sums[kept]) < 1e-5


def test_tensors_of_functions_may_be_bfloat16(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(
        "import triton.language as tl\nimport pyfmha\n\n@pyfmha.score_function(inputs={'rates': '*bf16[keys]'})\n"
        "def rated(score, batch, head, query, key, rates):\n    return score * tl.load(rates + key)\n"
    )
    q, k, v = tensors()
    rates = torch.linspace(-1, 3, 9).bfloat16()
    out = pyfmha.torch.attention(q, k, v, score=_load_kernel(path, "rated"), score_inputs=[rates])

    held = rates.float().numpy()
    wanted, _ = attend(*(x.numpy() for x in (q, k, v)), sm_scale=0.25, score=lambda s, b, h, i, j: s * held[j])
    assert relative_error(out.numpy(), wanted) < 1e-5


def test_sequences_of_a_ragged_batch_are_told_apart() -> None:
    """The second one's documents end at its key 2."""
    q, k, v = (torch.randn(n, 4, 16, generator=torch.Generator().manual_seed(n)) for n in (7, 8, 8))
    ends = torch.tensor([[5] * 5, [2] * 5], dtype=torch.int32)
    more = {"cu_seqlens_q": torch.tensor([0, 3, 7]), "cu_seqlens_kv": torch.tensor([0, 5, 8])}
    out = pyfmha.torch.attention(q, k, v, mask=documents, mask_inputs=[torch.zeros_like(ends), ends], **more)

    for rows, keys in ((slice(0, 3), slice(0, 5)), (slice(3, 7), slice(5, 7))):
        alone = [x.transpose(0, 1)[None].double().numpy() for x in (q[rows], k[keys], v[keys])]
        assert relative_error(out[rows].transpose(0, 1).numpy(), attend(*alone, sm_scale=0.25)[0][0]) < 1e-5


def refused(error: type[Exception], text: str, **keywords: Any) -> None:
    with pytest.raises(error, match=text):
        pyfmha.torch.attention(*tensors(), **keywords)


def test_what_is_refused() -> None:
    ends = torch.zeros(2, 5, dtype=torch.int32)
    refused(PluginError, "input slopes is of torch.float16; it must be a tensor of torch.float32", score=alibi,
            score_inputs=[SLOPES.half()])  # fmt: skip
    refused(PluginError, "input slopes is of list; it must be a tensor", score=alibi, score_inputs=[[1.0]])
    refused(PluginError, "input slopes is on meta, Q on cpu", score=alibi, score_inputs=[SLOPES.to("meta")])
    refused(PluginError, r"alibi_slopes \[3\], .*alibi_slopes \[4\]", score=alibi, score_inputs=[SLOPES[:3]])
    refused(PluginError, "documents requires tokens >= queries; here tokens is 5, queries is 7", mask=documents,
            mask_inputs=[ends, ends])  # fmt: skip
    refused(PluginError, "score_inputs are given, and no score function", score_inputs=[SLOPES])
    refused(PluginError, "natten is a mask function; give it as mask=natten", score=natten)
    refused(PluginError, "score is of type float; give a function", score=0.5)
    refused(PluginError, "width is of type str; it must be a number", mask=OWN.near, mask_inputs=["x"])


def test_a_name_alone_is_no_function_on_a_cpu(attention_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pyfmha.torch.launch, "library", lambda: Library(attention_path))
        refused(PluginError, "alibi is given by name; on a CPU .*: give it itself", score="alibi",
                score_inputs=[SLOPES])  # fmt: skip


@pytest.mark.parametrize("which", ["q", "slopes"])
def test_a_gradient_is_an_error(which: str) -> None:
    q, k, v = tensors()
    slopes = SLOPES.clone().requires_grad_(which == "slopes")
    out = pyfmha.torch.attention(q.requires_grad_(which == "q"), k, v, score=alibi, score_inputs=[slopes])
    with pytest.raises(PluginError, match="attention has no gradient here"):
        out.sum().backward()


@pytest.mark.long
def test_pytorchs_own_check_of_operators() -> None:
    given = (*tensors(), *_names(OWN.soft, OWN.near), [SLOPES], [3], 0.25, True)
    torch.library.opcheck(real_op, given, {"return_lse": True})


@pytest.mark.long
def test_the_compiler_goes_around_it() -> None:
    q, k, v = tensors()

    def program(q: torch.Tensor) -> torch.Tensor:
        return pyfmha.torch.attention(q * 2, k, v, score=alibi, score_inputs=[SLOPES]) + 1

    torch.testing.assert_close(torch.compile(program, backend="aot_eager")(q), program(q))


@pytest.mark.long
def test_an_export_to_onnx_has_the_functions_node() -> None:
    """With what the function was, so that a library of another version refuses it."""
    pytest.importorskip("onnxscript")

    class Model(torch.nn.Module):
        def forward(self, q: Any, k: Any, v: Any, slopes: Any) -> Any:
            mask = {"mask": OWN.near, "mask_inputs": [3]}
            return pyfmha.torch.attention(q, k, v, causal=True, score=OWN.soft, score_inputs=[slopes], **mask)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(Model(), (*tensors(), SLOPES), dynamo=True, verbose=False)
    assert program is not None
    (node,) = program.model.graph
    values = {name: attribute.value for name, attribute in node.attributes.items()}
    assert (node.domain, node.op_type, len(node.inputs)) == ("pyfmha", "TritonFlashAttention_soft_near", 4)
    assert (values["soft_near_width"], values["causal"]) == (3, 1)
    assert values["score_function"].startswith("soft:")
    assert values["mask_function"].startswith("near:")


@pytest.fixture
def fake_gpu(attention_path: Path, fake_cuda: FakeCuda) -> Iterator[FakeCuda]:
    assert fake_cuda.c.cuInit(0) == 0
    fake_cuda.use_context(0)
    with torch_gpu(Library(attention_path)):
        yield fake_cuda


def on_gpu(dtype: torch.dtype = torch.float16) -> list[torch.Tensor]:
    return [torch.zeros(2, HEADS, rows, SIZE, dtype=dtype) for rows in (40, 50, 50)]


@pytest.mark.parametrize("named", [False, True])
def test_what_is_launched(fake_gpu: FakeCuda, named: bool) -> None:
    """The function itself, or its name: its tensors where they are, and the numbers that shapes tell."""
    tables = [torch.zeros(2, 64, dtype=torch.int32) for _ in range(2)]
    for _ in range(2):
        pyfmha.torch.attention(*on_gpu(), mask="documents" if named else documents, mask_inputs=tables)
        params = fake_gpu.launches()[-1].params
        found = dict(zip(("begins", "ends", "tokens"), params[len(ARGUMENTS) :], strict=False))
        assert [struct.unpack("<Q", found[name])[0] for name in ("begins", "ends")] == [x.data_ptr() for x in tables]
        assert struct.unpack("<i", found["tokens"]) == (64,)
    tables = [torch.zeros(2, 128, dtype=torch.int32)[:, ::2] for _ in range(2)]  # with gaps, which it would not read
    pyfmha.torch.attention(*on_gpu(), mask=documents, mask_inputs=tables)
    at = struct.unpack("<Q", fake_gpu.launches()[-1].params[len(ARGUMENTS)])[0]
    assert at not in (0, tables[0].data_ptr())


def test_lists_of_blocks_are_written_first(fake_gpu: FakeCuda) -> None:
    """By a launch of the same arguments, in a workspace of PyTorch's."""
    numbers = torch.zeros(2, 50, dtype=torch.int32)
    shown = torch.ones(1, HEADS, 1, 50, dtype=torch.bool)
    pyfmha.torch.attention(*on_gpu(), mask=(shown, groups), mask_inputs=[numbers])
    writing, walking = fake_gpu.launches()[-2:]
    assert writing.params == walking.params
    found = dict(
        zip(("numbers", "tokens", "Blocks", "batches", "heads"), writing.params[len(ARGUMENTS) :], strict=False)
    )
    assert struct.unpack("<Q", found["numbers"])[0] == numbers.data_ptr()
    assert struct.unpack("<Q", found["Blocks"])[0] != 0
    assert [struct.unpack("<i", found[name])[0] for name in ("tokens", "batches", "heads")] == [50, 2, HEADS]


def test_a_later_call_only_launches(fake_gpu: FakeCuda) -> None:
    slopes = torch.ones(HEADS)
    pyfmha.torch.attention(*on_gpu(), causal=True, score=alibi, score_inputs=[slopes])
    before = fake_gpu.all_calls()
    for _ in range(3):
        pyfmha.torch.attention(*on_gpu(), causal=True, score=alibi, score_inputs=[slopes])
    assert dict(fake_gpu.all_calls() - before) == {"cuLaunchKernel": 3, "cuCtxGetCurrent": 3, "cuCtxGetId": 3}
    wider = torch.ones(HEADS * 2)[: HEADS + 1]
    with pytest.raises(PluginError, match=r"alibi_slopes \[5\], .*alibi_slopes \[4\]"):
        pyfmha.torch.attention(*on_gpu(), causal=True, score=alibi, score_inputs=[wider])


def test_what_the_library_lacks_is_told_with_its_command(fake_gpu: FakeCuda) -> None:
    given = {"mask": natten, "mask_inputs": [5, 8, 3]}
    with pytest.raises(LibraryError, match=r"no plugin with the function natten:.*--functions natten --dtype fp16"):
        pyfmha.torch.attention(*on_gpu(), **given)
    with pytest.raises(PluginError, match=r"takes the tensors \(slopes\) and the numbers \(\); given are 0 and"):
        attention_with_op(*on_gpu(), "alibi", "", [], [], 1 / math.sqrt(SIZE))
