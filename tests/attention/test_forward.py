"""The production functions: names, variants, which of them a call gets, and how a call becomes arguments."""

import itertools
from dataclasses import replace

import pytest
from helpers import few_of
from shared import Shared

from pyfmha.aot import Compiler
from pyfmha.attention.decode import Decode
from pyfmha.attention.first import DTYPES, Attention
from pyfmha.attention.forward import ARGUMENTS, HEAD_SIZES, Call, Forward, forward_family, kernel_path, strides
from pyfmha.attention.tiles import forward_tile
from pyfmha.errors import SpecError
from pyfmha.spec.arch import ARCHS
from pyfmha.spec.kernel import KernelSpec

CALL = Call(2, 8, 2, 33, 70, 64, 0.125)

# One of each dtype, head size and architecture; the last number is the variant.
SAMPLE = [
    ("sm_80", Forward("bf16", 64), 0),
    ("sm_86", Forward("fp16", 128), 0),
    ("sm_89", Forward("fp16", 256), 1),
    ("sm_90", Forward("fp16", 256), 0),
    ("sm_90", Forward("bf16", 128), 1),
    ("sm_90", Forward("fp32", 32), 1),
    ("sm_100", Forward("fp16", 64), 0),
    ("sm_120", Forward("fp32", 64), 0),
]


@pytest.mark.parametrize(
    ("head_size", "padded"), [(1, 32), (32, 32), (33, 64), (64, 64), (80, 128), (128, 128), (129, 256), (256, 256)]
)
def test_a_head_size_belongs_to_the_next_padded_one(head_size: int, padded: int) -> None:
    assert Forward("fp16", head_size).padded == padded
    assert Forward("fp16", head_size).name == f"fmha_fwd_d{padded}_fp16"


def test_the_family_has_each_function_once() -> None:
    assert [f.name for f in forward_family(["fp16", "fp16"], [64, 40, 72])] == [
        "fmha_fwd_d64_fp16",
        "fmha_fwd_d128_fp16",
    ]
    assert len({f.name for f in forward_family()}) == len(forward_family()) == len(DTYPES) * len(HEAD_SIZES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fp8", 64), "dtype 'fp8' is not served: use one of fp16, bf16, fp32"),
        (("fp16", 0), "head size is 0: use an integer from 1 to 256"),
        (("fp16", 257), "head size is 257"),
        (("fp16", 64.0), "head size is 64.0"),
    ],
)
def test_functions_that_do_not_exist_are_refused(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Forward(*arguments)  # type: ignore[arg-type]


def test_variants_share_prototype_and_algorithm_and_the_last_serves_everything() -> None:
    names = set()
    for function in forward_family():
        specs = function.specs()
        assert len({spec.prototype for spec in specs}) == len({spec.algorithm for spec in specs}) == 1
        assert [spec.unconditional for spec in specs] == [False] * (len(specs) - 1) + [True]
        assert [name for name, _ in specs[0].prototype] == [name for name, _ in ARGUMENTS]
        assert dict(specs[0].prototype)["Out"] == f"*{function.dtype}"
        assert {spec.name for spec in specs} == {function.name}
        names |= {spec.variant for spec in specs}
    assert len(names) == sum(len(function.specs()) for function in forward_family())
    assert kernel_path().is_file()


def serving(function: Forward, call: Call, pointer: int = 4096) -> KernelSpec:
    """The variant that the dispatcher picks, by hints and conditions."""
    names = [name for name, _ in ARGUMENTS]
    values = dict(zip(names, (*(pointer,) * 5, *(0,) * 4, *call.scalars()), strict=True))
    return next(
        spec
        for spec in function.specs()
        if all(values[a.name] % a.hint == 0 for a in spec.arguments if a.hint)
        and all(condition.holds(values) for condition in spec.conditions)
    )


def with_layout(call: Call, layout: str) -> Call:
    q = strides(layout, call.batch_size, call.num_heads, call.q_len, call.head_size)
    kv = strides(layout, call.batch_size, call.num_kv_heads, call.kv_len, call.head_size)
    return replace(call, q_strides=q, k_strides=kv, v_strides=kv, out_strides=q)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize(
    ("change", "pointer", "softcap"),
    [
        ({}, 4096, "never"),
        ({"head_size": 40}, 4096, "never"),
        ({"q_len": 1, "kv_len": 1}, 4096, "never"),
        ({"softcap": 30.0}, 4096, "always"),
        ({"softcap": 1e-30}, 4096, "always"),
        ({}, 4098, "any"),
        ({"head_size": 3}, 4096, "any"),
        ({"head_size": 60, "softcap": 2.0}, 4096, "any"),
    ],
)
def test_a_call_gets_the_fastest_variant_that_serves_it(layout, change, pointer, softcap) -> None:
    call = with_layout(replace(CALL, **change), layout)
    assert dict(serving(Forward("fp16", 64), call, pointer).constants)["SOFTCAP"] == softcap


def test_any_stride_that_is_not_a_multiple_of_eight_needs_the_generic_variant() -> None:
    call = with_layout(CALL, "bshd")
    for name in ("q_strides", "k_strides", "v_strides", "out_strides"):
        for axis in range(3):
            odd = tuple(stride + 4 * (axis == i) for i, stride in enumerate(getattr(call, name)))
            assert serving(Forward("bf16", 64), replace(call, **{name: odd})).unconditional


@pytest.mark.parametrize("batch_heads", [(1, 1), (8, 32), (2, 32767), (2, 32768), (3, 65535)])
@pytest.mark.parametrize("ragged", [0, 1])
def test_the_grid_covers_every_head_and_every_sequence(batch_heads: tuple[int, int], ragged: int) -> None:
    batch, heads = batch_heads
    for spec in Forward("fp16", 64).specs():
        values = {"q_len": 129, "batch_size": batch, "num_heads": heads, "ragged": ragged}
        x, y, z = (e.evaluate(values) for e in spec.grid_expressions)
        block = dict(spec.constants)["BLOCK_M"]
        # The most tiles that `batch` sequences and the rows before and after them can have: all but one of one row.
        assert x == -(-129 // block) + (batch + 1 if ragged else 0)
        assert y * z >= (heads if ragged else batch * heads)
        assert max(y, z) <= 65535


def test_scalars_follow_the_pointers_in_order() -> None:
    call = replace(
        CALL, softcap=2.0, q_strides=(1, 2, 3), k_strides=(4, 5, 6), v_strides=(7, 8, 9), out_strides=(10, 11, 12),
        window_left=5, window_right=0, bottom_right=True, ragged=True,
    )  # fmt: skip
    named = dict(zip([name for name, _ in ARGUMENTS[9:]], call.scalars(), strict=True))
    assert [named[f"{t}_stride_{a}"] for t in ("q", "k", "v", "out") for a in "bhs"] == list(range(1, 13))
    assert {name: value for name, value in named.items() if "stride" not in name} == {
        "sm_scale": 0.125, "softcap": 2.0, "batch_size": 2, "num_heads": 8, "num_kv_heads": 2, "q_len": 33,
        "kv_len": 70, "head_size": 64, "window_left": 5, "window_right": 0, "bottom_right": 1, "ragged": 1,
    }  # fmt: skip
    assert all(type(value) in (int, float) for value in call.scalars())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, "8 query heads and 3 key heads: use a multiple"),
        ({"num_kv_heads": 0}, "num_kv_heads is 0: use an integer from 1"),
        ({"head_size": 257}, "head_size is 257: use an integer from 1 to 256"),
        ({"window_left": -2}, "window_left is -2: use an integer from -1"),
        ({"window_right": 2**31}, "window_right is 2147483648"),
        ({"q_len": -1}, "q_len is -1"),
        ({"kv_len": 2**31}, "kv_len is 2147483648"),
        ({"batch_size": True}, "batch_size is True"),
        ({"q_strides": (1, 2)}, r"q_strides is \(1, 2\): give three"),
        ({"v_strides": (2**63, 0, 0)}, "v_strides is 9223372036854775808"),
        ({"softcap": -1.0}, "softcap is -1.0: use a finite float32 of at least 0"),
        ({"softcap": float("nan")}, "softcap is nan"),
        ({"sm_scale": float("inf")}, "sm_scale is inf"),
    ],
)
def test_calls_out_of_range_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        replace(CALL, **change)


def test_strides_of_the_layouts() -> None:
    assert strides("bhsd", 2, 3, 5, 7) == (3 * 5 * 7, 5 * 7, 7)
    assert strides("bshd", 2, 3, 5, 7) == (5 * 3 * 7, 7, 3 * 7)
    with pytest.raises(SpecError, match="layout 'sbhd' is unknown: use bhsd or bshd"):
        strides("sbhd", 2, 3, 5, 7)


@pytest.mark.parametrize(("dtype", "head_size", "arch"), list(itertools.product(DTYPES, HEAD_SIZES, ARCHS)))
def test_tiles_are_within_what_arithmetic_allows(dtype: str, head_size: int, arch: str) -> None:
    tile = forward_tile(dtype, head_size, arch)
    stages = max(1, tile.num_stages - 1) * 2 * tile.block_n * head_size * (4 if dtype == "fp32" else 2)
    assert stages <= ARCHS[arch].shared_limit
    assert tile.block_m * head_size <= 128 * 32 * tile.num_warps
    assert tile == forward_tile("bf16", head_size, arch) or dtype == "fp32"


@pytest.mark.parametrize(
    ("arch", "function", "index"),
    few_of(SAMPLE, lambda case: case[0] in ("sm_80", "sm_120")),  # of sm_90, tests/aot/test_audit.py compiles several
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_a_sample_compiles_within_each_architectures_limits(
    arch: str, function: Forward, index: int, compiler: Compiler, shared: Shared
) -> None:
    cubin = shared.compile(compiler, function.specs()[index], ARCHS[arch])
    assert cubin.shared <= ARCHS[arch].shared_limit
    if function.dtype != "fp32":
        # On sm_86 ptxas stops at 168 registers, for a third block, and spills two: 8 bytes at head size 128.
        assert cubin.spilled <= (0 if arch in ("sm_80", "sm_90") else 16)


@pytest.mark.parametrize("hopper", [False, True])
def test_every_variant_of_the_function_refuses_the_same_null_pointers(hopper: bool) -> None:
    for spec in Forward("fp16", 64).specs(hopper=hopper):
        needed = {argument.name: condition.text if condition else "" for argument, condition in spec.needed_pointers()}
        assert needed == {
            **{"Out": "q_len == 0", "Q": "q_len == 0", "K": "kv_len == 0", "V": "kv_len == 0"},
            **{"cu_seqlens_q": "ragged == 0", "cu_seqlens_kv": "ragged == 0"},
        }


def test_the_other_functions_need_their_tensors() -> None:
    *_, split, _, combine = Decode("fp16", 64).specs()
    needed = [{argument.name for argument, _ in spec.needed_pointers()} for spec in (split, combine)]
    assert needed == [{"Out", "Q", "K", "V", "Partial", "Statistics"}, {"Out", "Partial", "Statistics"}]
    (given,) = (condition for argument, condition in split.needed_pointers() if argument.name == "Out")
    assert given is not None
    assert given.text == "splits != 1"
    for spec in Attention("fp16", 64).specs():
        assert [argument.name for argument, _ in spec.needed_pointers()] == ["Out", "L", "M", "Q", "K", "V"]
