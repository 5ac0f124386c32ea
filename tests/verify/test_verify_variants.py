"""``pyfmha verify`` of a library, on a stand-in for a GPU that computes by the reference or wrongly; and its cases."""

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_cuda import Launch
from helpers import LAUNCH_FAILED, LONG
from trt_double.full.gpu import Gpu
from typer.testing import CliRunner, Result

from pyfmha.attention.forward import ARGUMENTS
from pyfmha.attention.fp8 import Fp8
from pyfmha.attention.hopper import HEAD_SIZES
from pyfmha.attention.reference import LIMITS, attend
from pyfmha.attention.run import to_float, to_storage
from pyfmha.bfloat16 import STORAGE
from pyfmha.cli.main import app
from pyfmha.runtime.library import Library
from pyfmha.runtime.serving import serving
from pyfmha.spec.manifest import Manifest, Variant
from pyfmha.verify.cases import Case
from pyfmha.verify.forward_cases import decode_cases, first_cases, forward_cases
from pyfmha.verify.fp8_cases import fp8_cases
from pyfmha.verify.random_cases import random_cases

pytest_plugins = ["verify_standins"]

gpu_module = importlib.import_module("trt_double.full.gpu")  # the package has a function of that name


def verify(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["verify", *arguments])


def rows_of(done: Result) -> dict[str, list[str]]:
    lines = [[cell.strip() for cell in line.strip("│").split("│")] for line in done.output.splitlines() if "│" in line]
    return {cells[0]: cells[1:] for cells in lines}


def test_everything_passes(verify_gpu: Gpu, verify_library_path: Path) -> None:
    done = verify()

    assert done.exit_code == 0, done.output
    rows = rows_of(done)
    variants = {variant.name for _, _, variant in Library(verify_library_path).manifest.variants()}
    assert set(rows) == variants
    assert len(variants) == 9
    for name, (cases, error, limit, verdict) in rows.items():
        assert verdict == "ok", name
        assert int(cases) >= 3, (name, {n: r[0] for n, r in rows.items()})
        assert float(limit) == LIMITS["fp32" if "fp32" in name else "fp16"]
        assert 0 < float(error) <= float(limit)
    counted = len(forward_cases("fp16", 32)) + len(decode_cases("fp16", 64)) + len(first_cases("fp32", 32, True, ""))
    assert f"All {counted} runs passed, by 9 variants." in done.output
    assert "Fake GPU 0 (sm_90), driver for CUDA 13.0" in done.output
    assert "Engines were not checked: TensorRT is not installed" in done.output
    live = verify_gpu.live()
    assert (live["memory"], live["streams"], live["modules"], live["contexts"]) == (0, 0, 0, 0)


@LONG
def test_random_problems_are_checked_besides(verify_gpu: Gpu) -> None:
    usual = len(forward_cases("fp16", 32))
    done = verify("--only", "library", "--random", "9", "--dtype", "fp16")

    assert done.exit_code == 0, done.output
    counted = usual + 9 + len(decode_cases("fp16", 64))
    assert f"All {counted} runs passed" in done.output
    plain = rows_of(verify("--only", "library", "--dtype", "fp16"))
    served = sum(int(row[0]) - int(plain[name][0]) for name, row in rows_of(done).items())
    assert served == 9


def test_another_device(verify_gpu: Gpu) -> None:
    verify_gpu.cuda.set_device(0, 75)  # without code
    done = verify("--device", "1", "--only", "library", "--dtype", "fp32")

    assert done.exit_code == 0, done.output
    assert "Fake GPU 1 (sm_90)" in done.output
    assert {launch.device for launch in verify_gpu.cuda.launches()} == {1}
    assert "no GPU 2: the driver sees 2" in verify("--device", "2", "--only", "library").output


def test_the_dtypes_asked_for(verify_gpu: Gpu) -> None:
    done = verify("--only", "library", "--dtype", "fp32")

    assert done.exit_code == 0, done.output
    assert all(name.startswith("fmha_d32_fp32") for name in rows_of(done))
    assert "Engines" not in done.output
    done = verify("--only", "library", "--dtype", "bf16")
    assert done.exit_code == 2
    assert "libpyfmha.so holds no attention in bf16; build it: pyfmha build" in done.output


Emulated = Callable[[Callable[..., Any], Launch, str], None]


def tampered(how: str, usual: Emulated) -> Emulated:
    """The stand-in with one fault."""

    def run(memory: Callable[..., Any], launch: Launch, dtype: str) -> None:
        given = dict(zip((name for name, _ in ARGUMENTS), launch.params, strict=False))
        out, lse, rows, size = (int.from_bytes(given[n], "little") for n in ("Out", "Lse", "q_len", "head_size"))
        if how == "nothing":
            return
        usual(memory, launch, dtype)
        if how == "inaccurate":
            values = memory(out, (rows * size,), STORAGE[dtype])
            with np.errstate(over="ignore"):
                values[...] = values * np.float16(1.01)
        elif how == "before":
            memory(out - 8, (1,), np.uint8)[...] = 0
        elif how == "lse" and lse:
            memory(lse, (1,), np.float32)[...] += 1e-2

    return run


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("nothing", "seq 1: Out has NaN or infinity, or was not written whole"),
        ("inaccurate", "limit 5e-04"),
        ("before", "seq 1: it wrote outside its outputs"),
        ("lse", "log-sum-exp"),
    ],
)
def test_faults_are_found(verify_gpu: Gpu, monkeypatch: pytest.MonkeyPatch, how: str, text: str) -> None:
    monkeypatch.setattr(gpu_module, "emulated_forward", tampered(how, gpu_module.emulated_forward))
    monkeypatch.setattr("pyfmha.verify.variants.forward_cases", lambda *_: forward_cases("fp16", 32)[:2])

    done = verify("--only", "library", "--dtype", "fp16")

    assert done.exit_code == 1, done.output
    (line,) = [line for line in done.output.splitlines() if ", seq 1: " in line]
    assert line.startswith("fmha_fwd_d32_fp16")
    assert text in line
    assert "FAILED" in done.output
    assert "runs failed" in done.output


def test_a_driver_that_computes_nothing_fails(verify_gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_gpu, "_run_kernel", lambda launch: 0.05)

    done = verify("--only", "library")

    assert done.exit_code == 1
    assert {row[-1] for row in rows_of(done).values()} == {"FAILED"}


def test_the_wrong_variant_is_found(verify_gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyfmha.verify.variants.serving", lambda *_: (SimpleNamespace(name="another"),))

    done = verify("--only", "library", "--dtype", "fp32")

    assert done.exit_code == 1
    assert " ran, by the manifest it is another" in done.output


def test_a_variant_that_nothing_reaches_is_not_passed_over(verify_gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "pyfmha.verify.variants.first_cases", lambda *a: [case for case in first_cases(*a) if not case.shift]
    )

    done = verify("--only", "library", "--dtype", "fp32")

    assert done.exit_code == 1
    assert [row[-1] for row in rows_of(done).values()] == ["ok", "NOT RUN"]
    assert "generic" in done.output
    assert "no case was served by it" in done.output
    assert "0 of 6 runs failed, 1 of 2 variants did not run" in done.output


def test_launches_that_fail_are_rows_and_the_rest_goes_on(verify_gpu: Gpu) -> None:
    verify_gpu.cuda.fail("cuLaunchKernel", LAUNCH_FAILED, after=3, times=1)

    done = verify("--only", "library", "--dtype", "fp32")

    assert done.exit_code == 1
    assert "seq 129: cuLaunchKernel failed" in done.output
    assert "1 of 12 runs failed, 0 of 2" in done.output


def test_a_fault_ends_it_with_a_table(verify_gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(launch: Launch) -> float:
        raise gpu_module.Fault("address")

    monkeypatch.setattr(verify_gpu, "_run_kernel", fault)

    done = verify("--only", "library", "--dtype", "fp32")

    assert done.exit_code == 1, done.output
    assert "an illegal memory access was encountered" in done.output
    assert "1 of 1 runs failed, 1 of 2 variants did not run" in done.output


def test_errors_end_with_2(verify_gpu: Gpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert (
        "there is no part 'all': use one of library, engine, or leave it out for both" in verify("--only", "all").output
    )
    done = verify("--only", "engine")
    assert (done.exit_code, "TensorRT is not installed" in done.output) == (2, True)
    verify_gpu.cuda.set_device(0, 80)
    done = verify()
    assert done.exit_code == 2
    assert "was built for sm_90, the GPU here, Fake GPU 0, is sm_80" in done.output
    monkeypatch.delenv("PYFMHA_LIBCUDA")
    done = verify()
    assert (done.exit_code, done.output) == (2, "error: no CUDA driver: libcuda cannot be loaded\n")
    monkeypatch.setenv("PYFMHA_LIBRARY", str(tmp_path / "none.so"))
    assert verify().exit_code == 2


# ------------------------------------------------------------------ cases


def computed(case: Case) -> tuple[Any, Any]:
    """Out and log-sum-exp as a right kernel leaves them."""
    exact, lse = case.exact
    store = case.blank("Out")
    case.view("Out", store)[...] = to_storage(exact, case.dtype)
    return store, lse.astype(np.float32) if case.lse else None


@pytest.mark.parametrize("dtype", ["fp16", pytest.param("bf16", marks=LONG), pytest.param("fp32", marks=LONG)])
@pytest.mark.parametrize("make", [forward_cases, decode_cases], ids=["forward", "decode"])
def test_what_is_right_passes_and_little_less_does_not(dtype: str, make: Callable[..., list[Case]]) -> None:
    for case in make(dtype, 64):
        if case.largest:
            continue
        store, lse = computed(case)
        error, failure = case.judge(store, lse)
        assert failure == "", (case, error)
        assert error <= case.limit
        if np.any(case.exact[0]):
            case.view("Out", store)[...] = to_storage(case.exact[0] * (1 + 4 * case.limit), dtype)
            assert f"limit {case.limit:.0e}" in case.judge(store, lse)[1], case


def test_a_judge_sees_every_kind_of_fault() -> None:
    (case,) = [case for case in forward_cases("fp16", 32) if case.name == "rows without keys"]
    store, lse = computed(case)
    empty = np.argwhere(np.isneginf(case.exact[1]))
    assert len(empty)
    first = tuple(empty[0])

    store_of_ones = store.copy()
    case.view("Out", store_of_ones)[first] = 1e-4
    assert "are not zeros" in case.judge(store_of_ones, lse)[1]
    finite = lse.copy()
    finite[first] = -1e30
    assert "minus infinity just where" in case.judge(store, finite)[1]
    unwritten = store.copy()
    unwritten[5] = np.nan
    assert "not written whole" in case.judge(unwritten, lse)[1]
    (gaps,) = [case for case in forward_cases("fp16", 32) if case.name == "odd strides"]
    store, lse = computed(gaps)
    assert gaps.judge(store, lse)[1] == ""
    store[32] = 0
    assert gaps.judge(store, lse)[1] == "it wrote between the rows of Out"
    (largest,) = [case for case in forward_cases("fp16", 32) if case.name == "largest inputs"]
    store = largest.blank("Out")
    store[...] = 0
    assert largest.judge(store, np.zeros((2, 2, 70), np.float32)) == (0.0, "")
    store[0] = np.inf
    assert "infinity" in largest.judge(store, np.zeros((2, 2, 70), np.float32))[1]


def test_cases_hold_every_feature() -> None:
    cases = forward_cases("fp16", 64)

    def some(**asked: Any) -> list[Case]:
        return [case for case in cases if all(getattr(case, name) == value for name, value in asked.items())]

    assert len({case.name for case in cases}) == len(cases)
    for asked in (
        {"q_len": 1, "kv_len": 1}, {"kv_len": 0}, {"heads": 6, "kv_heads": 2}, {"layout": "bshd"}, {"ragged": True},
        {"ragged": True, "shift": 1}, {"bottom_right": True}, {"left": 0, "right": 0}, {"lse": False},
        {"largest": True}, {"largest": True, "shift": 1}, {"gap": 1}, {"head_size": 61}, {"head_size": 56},
    ):  # fmt: skip
        assert some(**asked), asked
    for shift in (0, 1):
        assert any(case.softcap for case in some(shift=shift))
        assert any(case.q_lengths for case in some(shift=shift))
        assert any(np.isneginf(case.exact[1]).any() and not case.q_lengths for case in some(shift=shift))
    padding = next(case for case in cases if case.name == "lengths")
    assert np.isnan(to_float(padding.view("K", padding.inputs["K"]), "fp16")[1, :, 3:]).all()
    out, _ = attend(*(np.nan_to_num(padding.view(n, padding.inputs[n])) for n in "QKV"), sm_scale=padding.scale,
                    q_lengths=(40, 0), kv_lengths=(70, 3))  # fmt: skip
    np.testing.assert_allclose(padding.exact[0], out)


def test_random_problems_are_the_same_in_every_run_and_of_every_kind() -> None:
    cases = list(random_cases("bf16", 128, 300))

    assert cases == list(random_cases("bf16", 128, 300))
    assert cases[:9] != list(random_cases("bf16", 128, 9, seed=1))
    assert len({case.name for case in cases}) == len(cases)
    assert {case.head_size for case in cases} <= {*range(65, 129)}
    kinds: list[Callable[[Case], Any]] = [
        lambda c: c.ragged, lambda c: c.ragged and c.sequences > 32, lambda c: c.cu_q and sorted(c.cu_q) != [*c.cu_q],
        lambda c: c.q_lengths and c.kv_lengths, lambda c: c.left > 0, lambda c: c.right == 0 and c.bottom_right,
        lambda c: c.softcap, lambda c: c.largest, lambda c: c.shift, lambda c: not c.lse, lambda c: c.q_len == 1,
        lambda c: c.head_size % 8 and (c.head_size + c.gap) % 8 == 0, lambda c: c.head_size == 128,
        lambda c: c.heads > c.kv_heads,
    ]  # fmt: skip
    for number, kind in enumerate(kinds):
        assert sum(bool(kind(case)) for case in cases) >= 3, number
    for case in cases[:40]:
        assert case.call().sm_scale > 0


@pytest.mark.parametrize("padded", HEAD_SIZES)
def test_each_variant_of_eight_bits_has_a_case(padded: int) -> None:
    """By the conditions of their specs, in the order in which they are tried; of the others see test_cases.py."""
    specs = [spec for spec in Fp8("bf16", padded).specs() if "sm_90" in (spec.archs or ())]
    reached = set()
    for case in fp8_cases("bf16", padded):
        if case.shift or case.gap or case.head_size % 8:
            continue  # TMA takes none of these
        scalars = case.call().scalars()
        names = [argument.name for argument in specs[0].arguments][-len(scalars) :]
        given: dict[str, float] = dict(zip(names, scalars, strict=True))
        lengths = {"q": (case.q_lengths, case.cu_q), "kv": (case.kv_lengths, case.cu_kv)}
        for name, (counts, ends) in lengths.items():
            given |= {f"{name}_lengths": counts is not None, f"cu_seqlens_{name}": ends is not None}
        kept = (i for i, spec in enumerate(specs) if all(eval(one, {}, given) for one in spec.requires))
        reached |= {next(kept, None)}
    assert reached >= set(range(len(specs))), [specs[i].requires for i in range(len(specs)) if i not in reached]


def test_which_variant_serves(verify_library_path: Path) -> None:
    manifest: Manifest = Library(verify_library_path).manifest
    function = next(f for f in manifest.functions if f.name == "fmha_fwd_d32_fp16")
    plain, capped, generic = function.algorithms[0]
    values = {name: 0.0 if kind == "fp32" else 32 for name, kind in function.arguments}

    def found(changed: Variant | None = None, **changes: float) -> tuple[str, ...]:
        algorithm = (changed or plain, capped, generic)
        only = replace(function, algorithms=(algorithm,))
        return tuple(v.name for v in serving(only, 0, "sm_90", list({**values, **changes}.values())))

    assert found() == (plain.name,)
    assert found(softcap=1.0) == (capped.name,)
    assert found(Out=34) == found(head_size=36) == found(q_stride_s=33, softcap=1.0) == (generic.name,)
    assert found(head_size=40) == (plain.name,)
    assert found(replace(plain, archs=("sm_80",))) == (generic.name,)
    assert found(replace(plain, tensors=("Q",))) == (plain.name, generic.name)
    assert found(replace(plain, hints={"q_len": 1})) == (generic.name,)
    assert found(replace(plain, hints={"q_len": 1}), q_len=1) == (plain.name,)


def test_a_function_that_the_library_does_not_hold(verify_gpu: Gpu, verify_library_path: Path) -> None:
    done = verify("--only", "library", "--dtype", "fp16", "--functions", "alibi", "documents")

    assert done.exit_code == 2
    assert f"error: {verify_library_path} holds no alibi, documents in fp16; build it: pyfmha build --functions" in (
        done.output
    )
    assert not verify_gpu.cuda.launches()
