"""The Hopper variants of the production functions on the fake driver: when they are launched, and what is instead."""

import ast
import functools
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from fake_cuda import FakeCuda, Launch, TensorMap
from helpers import SUCCESS, CLibrary
from shared import Shared

from pyfmha.aot import Compiler, build
from pyfmha.aot.cache import Cache
from pyfmha.aot.toolchain import toolchain
from pyfmha.attention.families import DEFAULT, KERNELS, library_specs
from pyfmha.attention.forward import Call, Forward, strides
from pyfmha.attention.hopper import HEAD_SIZES, MANY_BLOCKS, variants
from pyfmha.attention.hopper_settings import LAZY, SETTINGS, Setting
from pyfmha.attention.hopper_sweep import sweep, sweep_specs
from pyfmha.errors import SpecError
from pyfmha.spec.arch import parse_archs
from pyfmha.spec.kernel import KernelSpec

pytest.importorskip("triton")

FUNCTION = "fmha_fwd_d64_fp16"
RAGGED_FUNCTION = "fmha_fwd_d128_fp16"
POINTERS = {"Out": 1 << 30, "Lse": 0, "Q": 2 << 30, "K": 3 << 30, "V": 4 << 30}
LENGTHS = {"q_lengths": 0, "kv_lengths": 0, "cu_seqlens_q": 0, "cu_seqlens_kv": 0}
SMS = 132  # multiprocessors of the fake device
# Rows of 64 elements, of which a head may have fewer: TMA would store up to 7 of the others.
GAPS = {f"{name}_strides": (heads * 300 * 64, 300 * 64, 64) for name, heads in zip("qkv", (8, 2, 2), strict=True)}
GAPS["out_strides"] = GAPS["q_strides"]
NOT_COMPILED = "fmha_not_sm90"  # as many letters
HOPPER, DECODE, PORTABLE = "fmha_fwd_sm90", "fmha_decode_sm90", "fused_attention_forward"


def arguments(layout: str = "bhsd", pointers: dict[str, int] | None = None, **changes: Any) -> tuple[Any, ...]:
    """Arguments of a launch that a Hopper variant serves, but for the changes."""
    sizes = {"batch_size": 2, "num_heads": 8, "num_kv_heads": 2, "q_len": 300, "kv_len": 300, "head_size": 64}
    sizes |= {name: changes.pop(name) for name in list(changes) if name in sizes}
    q = strides(layout, sizes["batch_size"], sizes["num_heads"], sizes["q_len"], sizes["head_size"])
    kv = strides(layout, sizes["batch_size"], sizes["num_kv_heads"], sizes["kv_len"], sizes["head_size"])
    given = {"sm_scale": 0.125, "q_strides": q, "k_strides": kv, "v_strides": kv, "out_strides": q, **changes}
    return (*(POINTERS | LENGTHS | (pointers or {})).values(), *Call(**sizes, **given).scalars())


@pytest.fixture(scope="module")
def built(shared: Shared) -> Path:
    """The function with its variants, for Hopper and for another architecture, and one with that for ragged batches:
    but those for lengths and ragged batches without windows, see `with_lengths`. Where tests look at grids alone,
    nothing is compiled: these have the code of another variant, by a name that no test expects. The portable ones, of
    which tests see the name alone, share the code of one for each architecture."""
    base = Forward("fp16", 128).specs()[-1]
    ragged = variants(base, 128, [setting for setting in SETTINGS[128] if setting.ragged and setting.general])
    small = [spec for spec in library_specs(["hopper"], ["fp16"], [64]) if not dict(spec.constants).get("LENGTHS")]
    specs, archs = [*small, *ragged, base], parse_archs(["sm_80", "sm_90"])

    def make(folder: Path) -> Path:
        own = folder / "own"  # the run's other builds find no such code
        kept = Cache.open(own / "cache", toolchain())
        with Compiler(1) as compiler:
            code = shared.compile(compiler, ragged[0], archs[-1])
            other = replace(code, code=code.code.replace(HOPPER.encode(), NOT_COMPILED.encode()), symbol=NOT_COMPILED)
            portable = {arch.name: shared.compile(compiler, base, arch) for arch in archs}
            for spec, arch in product(specs, archs):
                if arch.name not in (spec.archs or portable):
                    continue
                if spec.kernel == PORTABLE:
                    kept.put(spec, portable[arch.name])
                elif spec.kernel == HOPPER and not is_looked_at(spec):
                    kept.put(spec, other)
                else:
                    kept.put(spec, shared.compile(compiler, spec, arch))
        return build(specs, archs, own).library

    return shared.once("hopper", make)


def is_looked_at(spec: KernelSpec) -> bool:
    """Whether tests read the tensor maps of a variant's launches: of windows, and of 300 rows."""
    plain = [served_by(64, q_len=300, window_right=right).variant for right in (-1, 0)]
    return bool(dict(spec.constants)["GENERAL"]) or spec.variant in plain


@pytest.fixture(scope="module")
def with_lengths(shared: Shared) -> Path:
    """The function with its variants for lengths and ragged batches without windows alone, before the portable ones."""
    base = Forward("fp16", 64).specs()[-1]
    specs = [
        *variants(base, 64, [setting for setting in SETTINGS[64] if setting.lengths]),
        *Forward("fp16", 64).specs(),
    ]
    return shared.once("lengths", lambda folder: build(specs, parse_archs(["sm_90"]), folder).library)


@pytest.fixture
def loaded(built: Path, tmp_path: Path, fake_cuda: FakeCuda) -> CLibrary:
    library = CLibrary(Path(shutil.copy(built, tmp_path / "hopper.so")))
    fake_cuda.use_context()
    for function in (FUNCTION, RAGGED_FUNCTION):
        assert library.load(function) == SUCCESS, library.error()
    return library


@pytest.fixture
def loaded_with_lengths(with_lengths: Path, tmp_path: Path, fake_cuda: FakeCuda) -> CLibrary:
    library = CLibrary(Path(shutil.copy(with_lengths, tmp_path / "lengths.so")))
    fake_cuda.use_context()
    assert library.load(FUNCTION) == SUCCESS, library.error()
    return library


def launched(library: CLibrary, fake_cuda: FakeCuda, given: tuple[Any, ...], function: str = FUNCTION) -> Launch:
    assert library.launch(function, *given) == SUCCESS, library.error()
    return fake_cuda.launches()[-1]


@pytest.mark.parametrize("right", [-1, 0])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_plain_attention_is_launched_through_tma(
    loaded: CLibrary, fake_cuda: FakeCuda, layout: str, right: int
) -> None:
    launch = launched(loaded, fake_cuda, arguments(layout, window_right=right))

    assert launch.kernel == HOPPER
    out, q, k, v = (TensorMap.read(launch.params[9 * i]) for i in range(4))
    assert [one.address for one in (out, q, k, v)] == [POINTERS[name] for name in ("Out", "Q", "K", "V")]
    assert out.sizes == q.sizes == (64, 300, 8, 2)
    assert k.sizes == v.sizes == (64, 300, 2, 2)
    in_bytes = {"bhsd": (128, 300 * 128, 8 * 300 * 128), "bshd": (8 * 128, 128, 300 * 8 * 128)}
    assert q.strides == in_bytes[layout]
    block_n = dict(served_by(64, q_len=300, window_right=right).constants)["BLOCK_N"]
    assert q.box == out.box == (64, 64, 1, 1)
    assert k.box == v.box == (64, block_n, 1, 1)


def test_the_grid_is_as_many_programs_as_fit_or_as_there_are_tiles(loaded: CLibrary, fake_cuda: FakeCuda) -> None:
    """Tiles of 64 rows, two programs for each multiprocessor; of many rows, tiles of 192, one program."""
    launches = [
        launched(loaded, fake_cuda, arguments(q_len=q_len, kv_len=64, batch_size=batch))
        for q_len, batch in ((65, 1), (1000, 1), (4096, 1), (300, 200))
    ]

    assert [launch.grid for launch in launches] == [(n, 1, 1) for n in (16, 48, SMS, 2 * SMS)]


def test_the_grid_of_causal_rows_is_a_pair_of_tiles_for_each_program(loaded: CLibrary, fake_cuda: FakeCuda) -> None:
    """But a program for each multiprocessor, where there are as many tiles, and no more than fit."""
    launches = [
        launched(loaded, fake_cuda, arguments(q_len=q_len, kv_len=64, batch_size=batch, window_right=0))
        for q_len, batch in ((65, 1), (1000, 1), (300, 4), (300, 8), (300, 200), (700, 2), (4096, 1))
    ]

    assert [launch.grid[0] for launch in launches] == [16, 128, SMS, 8 * 8 * 5 // 2, 2 * SMS, SMS, 2 * 128]


def test_the_grid_of_long_causal_rows_has_one_row_of_programs(loaded: CLibrary, fake_cuda: FakeCuda) -> None:
    launches = [
        launched(loaded, fake_cuda, arguments(q_len=q_len, kv_len=64, batch_size=1, window_right=0))
        for q_len in (2048, 4096, 4097, 192 * SMS * 3)
    ]

    assert [launch.grid for launch in launches] == [(SMS, 1, 1), (2 * 128, 1, 1), (SMS, 1, 1), (SMS, 1, 1)]


@pytest.mark.parametrize(
    ("pointers", "changes"),
    [
        ({"Q": (2 << 30) + 2}, {}),
        ({"Out": (1 << 30) + 8}, {}),
        ({}, {"head_size": 63}),
        ({}, {"head_size": 60, **GAPS}),
        ({}, {"head_size": 63, "window_left": 5, **GAPS}),
        ({}, {"head_size": 60, "softcap": 3.0, **GAPS}),
        ({}, {"softcap": 64.1}),
        ({}, {"softcap": 30.0, "sm_scale": -0.125}),
        ({}, {"softcap": 30.0, "q_len": 2**28 + 1, "window_left": 128}),
        ({}, {"q_len": 2**28 + 1, "window_left": 128}),
        ({"kv_lengths": 1 << 20}, {"kv_len": 2**28 + 1}),
        ({"kv_lengths": 1 << 20}, {"softcap": 65.0}),
        ({"kv_lengths": 1 << 20}, {"sm_scale": -0.125}),
        ({}, {"sm_scale": -0.125}),
        ({}, {"sm_scale": 0.0}),
        ({}, {"kv_len": 0}),
        ({}, {"k_strides": (1 << 20, 1 << 18, 0)}),
        ({}, {"v_strides": (1 << 40, 1 << 18, 64)}),
        ({}, {"q_strides": (1 << 20, 1 << 18, 68)}),
    ],
    ids=str,
)
def test_what_a_hopper_variant_cannot_take_is_served_by_another(
    loaded: CLibrary, fake_cuda: FakeCuda, pointers: dict[str, int], changes: dict[str, Any]
) -> None:
    launch = launched(loaded, fake_cuda, arguments(pointers=pointers, **changes))

    assert launch.kernel == PORTABLE


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize(
    ("pointers", "changes"),
    [
        ({"kv_lengths": 1 << 20}, {"window_left": 5}),
        ({"q_lengths": 1 << 20}, {"window_right": 1}),
        ({"kv_lengths": 1 << 20, "q_lengths": 2 << 20}, {"window_left": 0, "window_right": 0, "bottom_right": True}),
        ({}, {"window_left": 128}),
        ({}, {"window_left": 128, "window_right": 0}),
        ({}, {"window_right": 3}),
        ({"q_lengths": 1 << 20}, {"q_len": 1, "window_left": 3}),
        ({}, {"q_len": 1, "kv_len": 8388609, "window_left": 3}),
        ({}, {"kv_len": 2**28, "window_left": 2**31 - 1}),
        ({}, {"softcap": 64.0, "window_right": 3}),
        ({"kv_lengths": 1 << 20}, {"softcap": 30.0, "window_left": 128}),
    ],
    ids=str,
)
def test_lengths_windows_and_soft_caps_are_served_by_general_kernels(
    loaded: CLibrary, fake_cuda: FakeCuda, layout: str, pointers: dict[str, int], changes: dict[str, Any]
) -> None:
    sizes: dict[str, Any] = {"q_len": 300, "kv_len": 300, **changes}
    launch = launched(loaded, fake_cuda, arguments(layout, pointers, **sizes))
    spec = served_by(64, pointers, layout=layout, **sizes)

    assert dict(spec.constants)["GENERAL"]
    assert dict(spec.constants)["CAPPED"] == ("softcap" in changes)
    assert launch.kernel == HOPPER
    assert launch.grid == (min(8 * 2 * -(-sizes["q_len"] // 64), SMS), 1, 1)
    k, v = (TensorMap.read(launch.params[9 * i]) for i in (2, 3))
    assert k.box == v.box == (64, dict(spec.constants)["BLOCK_N"], 1, 1)
    assert k.sizes == v.sizes == (64, sizes["kv_len"], 2, 2)


@pytest.mark.long
@pytest.mark.parametrize("right", [-1, 0])
@pytest.mark.parametrize(
    "pointers",
    [{"kv_lengths": 1 << 20}, {"q_lengths": 1 << 20}, {"q_lengths": 1 << 20, "kv_lengths": 2 << 20}],
    ids=str,
)
def test_lengths_alone_are_served_by_kernels_cut_as_for_none(
    loaded_with_lengths: CLibrary, fake_cuda: FakeCuda, pointers: dict[str, int], right: int
) -> None:
    for q_len in (300, 513, 4097):
        given = arguments("bshd", pointers, q_len=q_len, window_right=right)
        launch = launched(loaded_with_lengths, fake_cuda, given)
        cut = dict(served_by(64, pointers, layout="bshd", q_len=q_len, window_right=right).constants)

        assert (cut["LENGTHS"], cut["GENERAL"], cut["CAUSAL"], cut["CAPPED"]) == (True, False, right == 0, False)
        assert cut["CONSUMERS"] == (3 if right == -1 and q_len > 512 else 1)
        assert launch.kernel == HOPPER
        assert (launch.grid[1], bool(cut.get("EVEN"))) == (1, right == 0)
        assert TensorMap.read(launch.params[9 * 2]).box == (64, cut["BLOCK_N"], 1, 1)


@pytest.mark.parametrize(("head_size", "parts"), [(64, (False,) * 2), (96, (True, False)), (192, (True,) * 2)])
def test_lengths_of_heads_in_two_parts(head_size: int, parts: tuple[bool, bool]) -> None:
    for right, two in zip((-1, 0), parts, strict=True):
        for q_len in (65, 1024, 1025, 8192):
            cut = dict(served_by(head_size, {"kv_lengths": 1 << 20}, q_len=q_len, window_right=right).constants)
            assert (cut["LENGTHS"], cut["TWO_PARTS"]) == (True, two)


def test_few_queries_with_lengths_keep_tiles_of_64_where_heads_are_of_128() -> None:
    for q_len, general in ((2, True), (64, True), (65, False)):
        cut = dict(served_by(128, {"kv_lengths": 1 << 20}, q_len=q_len).constants)
        assert (cut["GENERAL"], cut["CONSUMERS"]) == (general, 1 if general else 2)


RAGGED = {"cu_seqlens_q": 5 << 30, "cu_seqlens_kv": 6 << 30}


@pytest.mark.parametrize(
    ("pointers", "changes", "tiles"),
    [
        ({}, {}, 5 + 3),
        ({}, {"window_left": 128, "window_right": 0, "bottom_right": True}, 5 + 3),
        ({"Lse": 1 << 20, "q_lengths": 1 << 20, "kv_lengths": 2 << 20}, {"kv_len": 1000}, 5 + 3),
        ({}, {"batch_size": 1, "q_len": 1}, 1 + 2),
        ({}, {"batch_size": 9, "q_len": 65, "kv_len": 1}, 2 + 10),
        ({}, {"batch_size": 300, "q_len": 300}, 5 + 301),
        ({}, {"batch_size": 2**20, "q_len": 2**28, "kv_len": 2**28}, 2**22 + 2**20 + 1),
        # What leads from one batch to the next says nothing.
        ({}, {"q_strides": (0, 128, 8 * 128), "out_strides": (0, 128, 8 * 128)}, 5 + 3),
        ({}, {"k_strides": (-7, 128, 2 * 128), "v_strides": (1 << 62, 128, 2 * 128)}, 5 + 3),
        ({}, {"head_size": 72}, 5 + 3),
    ],
    ids=str,
)
def test_ragged_batches_are_a_batch_of_one_with_tiles_for_each_sequence(
    loaded: CLibrary, fake_cuda: FakeCuda, pointers: dict[str, int], changes: dict[str, Any], tiles: int
) -> None:
    sizes: dict[str, Any] = {"q_len": 300, "kv_len": 300, "head_size": 128, **changes}
    given = {"layout": "bshd", "pointers": RAGGED | pointers, "ragged": True}
    launch = launched(loaded, fake_cuda, arguments(**given, **sizes), RAGGED_FUNCTION)
    others = {name: value for name, value in sizes.items() if name != "head_size"}
    spec = served_by(128, lengths=False, **given, **others)

    assert dict(spec.constants)["RAGGED"]
    assert launch.kernel == HOPPER
    assert launch.grid == (min(8 * tiles, max(SMS, 4 * tiles), 4 * SMS), 1, 1)
    out, q, k, v = (TensorMap.read(launch.params[9 * i]) for i in range(4))
    assert [one.address for one in (out, q, k, v)] == [POINTERS[name] for name in ("Out", "Q", "K", "V")]
    assert out.sizes == q.sizes == (sizes["head_size"], sizes["q_len"], 8, 1)
    assert k.sizes == v.sizes == (sizes["head_size"], sizes["kv_len"], 2, 1)
    if sizes["q_len"] > 1:
        assert q.strides[:2] == out.strides[:2] == (8 * sizes["head_size"] * 2, sizes["head_size"] * 2)
    assert all(one.strides[2] > 0 and one.strides[2] % 16 == 0 for one in (out, q, k, v))
    assert q.box == out.box == (64, 64, 1, 1)
    assert k.box == v.box == (64, dict(spec.constants)["BLOCK_N"], 1, 1)


@pytest.mark.parametrize(
    ("pointers", "changes"),
    [
        ({"Q": (2 << 30) + 2}, {}),
        ({"Out": (1 << 30) + 8}, {}),
        ({}, {"head_size": 100, "q_strides": (0, 128, 1024), "k_strides": (0, 128, 256), "v_strides": (0, 128, 256)}),
        ({}, {"softcap": 30.0}),
        ({}, {"sm_scale": 0.0}),
        ({}, {"batch_size": 0}),
        ({}, {"batch_size": 2**20 + 1}),
        ({}, {"num_heads": 1026}),
        ({}, {"kv_len": 0}),
        ({}, {"q_len": 0}),
        ({}, {"q_len": 2**28 + 1}),
        ({}, {"kv_len": 2**28 + 1}),
        ({}, {"k_strides": (0, 128, 132)}),
    ],
    ids=str,
)
def test_what_of_ragged_batches_cannot_be_loaded_so_is_served_by_another(
    loaded: CLibrary, fake_cuda: FakeCuda, pointers: dict[str, int], changes: dict[str, Any]
) -> None:
    sizes: dict[str, Any] = {"head_size": 128, **changes}
    given = arguments("bshd", RAGGED | pointers, ragged=True, **sizes)

    assert launched(loaded, fake_cuda, given, RAGGED_FUNCTION).kernel == PORTABLE


@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_kv"])
def test_ragged_batches_without_their_borders_are_refused(loaded: CLibrary, fake_cuda: FakeCuda, name: str) -> None:
    given = arguments("bshd", RAGGED | {name: 0}, ragged=True, head_size=128)

    assert loaded.launch(RAGGED_FUNCTION, *given) != SUCCESS
    assert f"{name} is null" in loaded.error()
    assert fake_cuda.launches() == []


@pytest.mark.long
@pytest.mark.parametrize(
    ("changes", "kernel"),
    [({}, HOPPER), ({"window_right": 0}, HOPPER), ({"window_left": 9}, PORTABLE), ({"batch_size": 127}, PORTABLE)],
    ids=str,
)
def test_ragged_batches_of_small_heads(
    loaded_with_lengths: CLibrary, fake_cuda: FakeCuda, changes: dict[str, Any], kernel: str
) -> None:
    """Those with windows, or of more sequences than a program keeps in a table, are the portable kernel's."""
    assert launched(loaded_with_lengths, fake_cuda, arguments("bshd", RAGGED, ragged=True, **changes)).kernel == kernel


@pytest.mark.parametrize("head_size", [128, 256])
def test_ragged_batches_alone_are_served_by_the_ragged_kernel(head_size: int) -> None:
    general, ragged, _ = SETTINGS[head_size][-3:]

    assert replace(ragged, ragged=False, rounds=1) == general, "as the general one is cut"
    for changes in ({"batch_size": 127}, {"window_left": 5}, {"window_right": 1}, {"batch_size": 300, "q_len": 1}):
        for pointers in ({}, {"q_lengths": 1 << 20}):
            constants = dict(served_by(head_size, RAGGED | pointers, **changes).constants)
            assert not constants.get("RAGGED", False)
            constants = dict(served_by(head_size, RAGGED | pointers, ragged=True, **changes).constants)
            assert (constants["RAGGED"], constants["GENERAL"], constants["CAUSAL"]) == (True, True, True)


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_few_sequences_without_windows_are_served_by_kernels_whose_producer_finds_tiles(head_size: int) -> None:
    for right, batch in product((-1, 0), (1, 126)):
        found = served_by(head_size, RAGGED, ragged=True, window_right=right, batch_size=batch)
        cut = dict(found.constants)
        assert (cut["RAGGED"], cut["LENGTHS"], cut["GENERAL"], cut["CAUSAL"]) == (True, True, False, right == 0)


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_soft_caps_alone_are_served_by_the_capped_kernel(head_size: int) -> None:
    capped = SETTINGS[head_size][-1]

    assert replace(capped, capped=False) in SETTINGS[head_size], "as the general one is cut"
    assert [setting.general for setting in SETTINGS[head_size] if setting.capped].count(True) == 1
    for right, window in ((-1, -1), (0, -1), (0, 128), (3, -1)):
        for q_len in (1, 64, 512, 2048, 2049, 1 << 20):
            found = served_by(head_size, q_len=q_len, softcap=30.0, window_left=window, window_right=right)
            cut = dict(found.constants)
            general = window != -1 or right > 0 or (right == -1 and head_size > 64)
            assert (cut["CAPPED"], cut["GENERAL"], cut["CAUSAL"]) == (True, general, general or right == 0)


@pytest.mark.parametrize(
    ("head_size", "padded"), [(72, 128), (96, 128), (104, 128), (128, 128), (136, 256), (192, 256), (200, 256)]
)
@pytest.mark.parametrize("right", [-1, 0])
def test_head_sizes_up_to_three_quarters_of_a_padded_one_have_two_parts(
    head_size: int, padded: int, right: int
) -> None:
    two = head_size <= padded * 3 // 4
    for q_len in (2, 512, 1024, 1025, 4096, 1 << 20):
        spec = served_by(head_size, q_len=q_len, window_right=right)
        cut = dict(spec.constants)
        assert (spec.kernel, cut["TWO_PARTS"], cut["CAUSAL"]) == (HOPPER, two, right == 0)
        assert cut["BLOCK_D"] == (padded // 4 if two else padded)
        keys = min(cut["BLOCK_D"], 64) if spec.descriptors[2].parts > 1 else cut["BLOCK_D"]
        assert [one.block[-1] for one in spec.descriptors] == [cut["BLOCK_D"]] * 2 + [keys] * 2
    for other in ({"window_left": 128}, {"softcap": 30.0}):
        assert not dict(served_by(head_size, q_len=512, window_right=right, **other).constants)["TWO_PARTS"]


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_the_general_kernel_serves_nothing_that_a_dense_one_does(head_size: int) -> None:
    others = [setting for setting in SETTINGS[head_size] if not setting.general]
    general = SETTINGS[head_size][len(others)]

    assert general.general
    assert general.masks == (True,)
    assert general.requires == ()
    for right, q_len in product((-1, 0), (2, 300, 450, 2048)):
        assert not dict(served_by(head_size, q_len=q_len, window_right=right).constants)["GENERAL"]
    for changes in ({"window_left": 5}, {"window_right": 5}, {"window_left": 5, "window_right": 0}):
        for q_len in (2, 300, 450, 2048):
            found = dict(served_by(head_size, q_len=q_len, **changes).constants)
            assert (found["GENERAL"], found["CAUSAL"], found["TWO_HEADS"]) == (True, True, False)


@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "grid"),
    [
        (1, 1, 1, (8, 1, 1)),
        (1, 8, 8, (8, 8, 1)),
        (1, 9, 9, (4, 9, 1)),
        (2, 64, 8, (4, 8, 2)),
        (1, 17, 17, (2, 17, 1)),
        (64, 8, 1, (2, 1, 64)),
        (1, 72, 4, (4, 12, 1)),  # 18 heads a key head: three parts
        (65, 1, 1, (1, 1, 65)),
        (300, 32, 8, (1, 8, 300)),
    ],
)
def test_one_query_is_computed_by_clusters_of_which_few_are_larger(
    loaded: CLibrary, fake_cuda: FakeCuda, batch: int, heads: int, kv_heads: int, grid: tuple[int, ...]
) -> None:
    sizes = {"batch_size": batch, "num_heads": heads, "num_kv_heads": kv_heads, "q_len": 1, "head_size": 40}
    launch = launched(loaded, fake_cuda, arguments("bshd", **sizes))

    assert launch.kernel == DECODE
    assert launch.grid == grid
    assert launch.cluster == (grid[0], 1, 1)
    k, v = (TensorMap.read(launch.params[9 * i]) for i in range(2))
    assert [one.address for one in (k, v)] == [POINTERS[name] for name in "KV"]
    assert k.sizes == v.sizes == (40, 300, kv_heads, batch)
    assert k.box == v.box == (64, 128, 1, 1)


@pytest.mark.parametrize(
    ("batch", "kv_heads", "keys"), [(16, 8, (128, 2)), (17, 8, (64, 2)), (1, 128, (128, 2)), (1, 129, (64, 2))]
)
def test_one_query_has_small_blocks_where_key_heads_are_more_than_multiprocessors(
    batch: int, kv_heads: int, keys: tuple[int, int]
) -> None:
    found = served_by(128, batch_size=batch, num_heads=4 * kv_heads, num_kv_heads=kv_heads, q_len=1)
    constants = dict(found.constants)
    assert (found.kernel, (constants["BLOCK_N"], constants["STAGES"])) == (DECODE, keys)
    assert not found.descriptors, "K and V are copied"
    fetched = served_by(64, batch_size=batch, num_heads=4 * kv_heads, num_kv_heads=kv_heads, q_len=1)
    assert [descriptor.block[2] for descriptor in fetched.descriptors] == [128] * 2
    spec = served_by(256, batch_size=batch, num_heads=4 * kv_heads, num_kv_heads=kv_heads, q_len=1)
    assert dict(spec.constants)["BLOCK_N"] == 64


@pytest.mark.parametrize(
    ("pointers", "changes"),
    [
        ({"kv_lengths": 1 << 20}, {}),
        ({"Lse": 1 << 20, "Out": (1 << 30) + 2}, {}),
        ({}, {"window_left": 128, "window_right": 0, "bottom_right": True}),
        ({}, {"sm_scale": -0.125}),
        ({}, {"sm_scale": 0.0}),
        ({}, {"q_strides": (1 << 20, 1 << 18, 8)}),
    ],
    ids=str,
)
def test_one_query_may_have_lengths_windows_and_any_scale(
    loaded: CLibrary, fake_cuda: FakeCuda, pointers: dict[str, int], changes: dict[str, Any]
) -> None:
    assert launched(loaded, fake_cuda, arguments(pointers=pointers, q_len=1, **changes)).kernel == DECODE


@pytest.mark.parametrize(
    ("pointers", "changes"),
    [
        ({"Q": (2 << 30) + 2}, {}),
        ({"K": (3 << 30) + 8}, {}),
        ({}, {"softcap": 65.0}),
        (RAGGED, {"ragged": True}),
        ({}, {"head_size": 63}),
        ({}, {"q_strides": (1 << 20, 68, 64)}),
        ({}, {"k_strides": (1 << 20, 68, 64)}),
        ({}, {"kv_len": 0}),
        ({}, {"kv_len": 2**28 + 1, "window_left": 3}),
        ({}, {"num_heads": 65536, "num_kv_heads": 65536, "batch_size": 1, "sm_scale": 0.0}),
        ({}, {"batch_size": 65536, "sm_scale": 0.0}),
    ],
    ids=str,
)
def test_of_one_query_what_clusters_cannot_take_is_served_by_another(
    loaded: CLibrary, fake_cuda: FakeCuda, pointers: dict[str, int], changes: dict[str, Any]
) -> None:
    assert launched(loaded, fake_cuda, arguments(pointers=pointers, **{"q_len": 1, **changes})).kernel == PORTABLE


def test_head_sizes_below_the_padded_one_are_cut_by_the_descriptor(loaded: CLibrary, fake_cuda: FakeCuda) -> None:
    launch = launched(loaded, fake_cuda, arguments(head_size=40))

    assert launch.kernel == HOPPER
    assert TensorMap.read(launch.params[9]).sizes == (40, 300, 8, 2)


def test_another_architecture_has_the_portable_variants(built: Path, tmp_path: Path, fake_cuda: FakeCuda) -> None:
    library = CLibrary(Path(shutil.copy(built, tmp_path / "ampere.so")))
    fake_cuda.set_device(0, 80)
    fake_cuda.use_context()
    assert library.load(FUNCTION) == SUCCESS, library.error()

    assert launched(library, fake_cuda, arguments()).kernel == PORTABLE


def test_a_library_holds_hopper_variants_only_if_asked() -> None:
    def kernels(specs: Any) -> set[str]:
        return {spec.kernel for spec in specs}

    assert (HOPPER in kernels(library_specs())) == ("hopper" in DEFAULT)
    assert HOPPER not in kernels(library_specs([name for name in KERNELS if name != "hopper"]))
    assert kernels(library_specs(["hopper"])) == {HOPPER, DECODE, PORTABLE}
    assert HOPPER not in kernels(library_specs(["hopper"], ["fp32"]))


def test_settings_fit_their_kernels() -> None:
    assert set(SETTINGS) == set(HEAD_SIZES)
    for size, settings in SETTINGS.items():
        found = variants(Forward("bf16", size).specs()[-1], size)
        decoding = [spec for spec in found if spec.kernel == DECODE]
        made = found[len(decoding) :]
        assert all(spec.cluster for spec in decoding)
        assert len(decoding) == (2 if size in MANY_BLOCKS else 1)
        assert all(16 * spec.num_warps <= size for spec in decoding), "each row of Out is one warp's"
        assert len(made) == sum(len(setting.masks) for setting in settings)
        for capped in (False, True):
            *_, last = (s for s in settings if s.general and s.capped == capped and not s.ragged)
            assert (last.requires, last.masks) == ((), (True,)), "the last one serves the rest"
        for causal in (False, True):
            *_, last = (setting for setting in settings if causal in setting.masks and _is_plain(setting))
            assert last.requires == (), "and of what is neither, another"
        for spec in found:
            assert spec.archs == ("sm_90",)


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_registers_are_shared_out_within_what_a_multiprocessor_has(head_size: int) -> None:
    for setting in {*SETTINGS[head_size], *sweep(head_size)}:
        programs = max(setting.programs, 1)
        # Each part is a warpgroup, the producer too, though only one of its warps works.
        assert programs * setting.maxnreg * 128 * (setting.consumers + 1) <= 65536
        if setting.consumers > 1:  # a lone consumer takes what the producer leaves
            shared_out = setting.consumers * setting.consumer_registers + setting.producer_registers
            assert shared_out <= setting.maxnreg * (setting.consumers + 1)


def _is_plain(setting: Setting) -> bool:
    return not (setting.general or setting.capped or setting.ragged or setting.lengths)


@functools.cache
def _made(head_size: int) -> tuple[KernelSpec, tuple[KernelSpec, ...]]:
    """What the variants of fp16 are made of, and these."""
    base = Forward("fp16", head_size).specs()[-1]
    return base, variants(base, Forward("fp16", head_size).padded)


def served_by(
    head_size: int, pointers: dict[str, int] | None = None, *, lengths: bool = True, **changes: Any
) -> KernelSpec:
    """The first Hopper variant that serves a call; of those for lengths without windows only if asked."""
    base = _made(head_size)[0]
    given = arguments(pointers=pointers, head_size=head_size, **changes)
    values = dict(zip((name for name, _ in base.prototype), given, strict=True))
    return next(
        spec
        for spec in _made(head_size)[1]
        if all(condition.holds(values) for condition in spec.conditions)
        and (lengths or not dict(spec.constants).get("LENGTHS"))
    )


def test_short_causal_rows_have_programs_of_one_consumer_where_heads_are_of_128() -> None:
    short, long = 512, 8192

    for q_len, right, consumers in ((short, 0, 1), (long, 0, 2), (short, -1, 2), (long, -1, 2)):
        found = dict(served_by(128, q_len=q_len, window_right=right).constants)
        assert (found["CONSUMERS"], found["CAUSAL"]) == (consumers, right == 0)


@pytest.mark.parametrize(
    ("head_size", "q_len", "paired"),
    [
        *((size, q_len, False) for size in (64, 96) for q_len in (64, 384, 385, 1024, 1025, 4097, 8193)),
        *((128, 1024, True), (128, 1025, False)),
        *((192, 1535, True), (192, 1536, False)),
        *((256, 2047, True), (256, 2048, False)),
    ],
)
def test_causal_rows_are_dealt_out_evenly(head_size: int, q_len: int, paired: bool) -> None:
    """Up to which length in pairs of a head, where these are as many for each program."""
    for right in (0, -1):
        spec = served_by(head_size, q_len=q_len, window_right=right)
        found = dict(spec.constants)
        assert bool(found.get("EVEN")) == (right == 0)
        assert not found["LONGEST_FIRST"]
        assert spec.grid_expressions[1].text == "1"
        assert found.get("HANDED_ON", False) or not found.get("EVEN")
        assert found.get("PAIRED", False) == (right == 0 and paired)


@pytest.mark.parametrize(("q_len", "heads", "lazy"), [(1024, 32, False), (1025, 32, True), (1025, 1, True)])
def test_causal_rows_of_128_have_two_consumers_from_1025_on(q_len: int, heads: int, lazy: bool) -> None:
    found = dict(served_by(128, q_len=q_len, window_right=0, num_heads=heads, num_kv_heads=1).constants)
    assert (found["CONSUMERS"], found["LAZY"], found.get("HALVED", False)) == (1 + lazy, lazy, lazy)


@pytest.mark.parametrize(
    ("q_len", "heads", "right", "consumers"),
    [(1536, 64, -1, 2), (1537, 15, -1, 2), (1537, 16, -1, 3), (8192, 64, 0, 2), (8193, 1, 0, 2)],
)
def test_long_rows_of_96_are_computed_by_three_consumers(q_len: int, heads: int, right: int, consumers: int) -> None:
    found = dict(served_by(96, q_len=q_len, window_right=right, num_heads=heads, num_kv_heads=1).constants)
    assert (found["CONSUMERS"], found["SERIAL"]) == (consumers, consumers == 3)


@pytest.mark.parametrize(
    ("q_len", "heads", "batch", "grid"),
    [(16384, 32, 1, (132, 5)), (5000, 1, 1, (40, 5)), (4097, 4, 1, (132, 5)), (128 * 132 * 2 + 1, 2, 1, (132, 6))],
)
def test_the_grid_of_tiles_from_the_longest(q_len: int, heads: int, batch: int, grid: tuple[int, int]) -> None:
    """A row of persistent programs, and rows for the tiles of the last section, or of one head."""
    (spec,) = variants(
        Forward("fp16", 128).specs()[-1], 128, [replace(LAZY, longest_first=True, masks=(True,), handed=True)]
    )
    values = {"q_len": q_len, "num_heads": heads, "batch_size": batch, "num_sms": 132}

    found = tuple(e.evaluate({name: values[name] for name in e.names()}) for e in spec.grid_expressions)

    assert found == (*grid, 1)


def test_three_consumers_share_keys_where_heads_are_of_64_and_rows_are_many() -> None:
    for q_len, right, consumers in ((512, -1, 1), (513, -1, 3), (4096, 0, 1), (4097, 0, 3)):
        assert dict(served_by(64, q_len=q_len, window_right=right).constants)["CONSUMERS"] == consumers


def test_short_causal_rows_go_by_64_keys_where_heads_are_of_64() -> None:
    for q_len, right in ((2, 0), (384, 0), (385, 0), (8192, 0), (384, -1), (8192, -1)):
        found = dict(served_by(64, q_len=q_len, window_right=right).constants)
        assert found["BLOCK_N"] == (64 if right == 0 and q_len <= 384 else 128)


@pytest.mark.parametrize(
    ("head_size", "right", "blocks"),
    [(64, -1, (2, 2)), (64, 0, (2, 2)), (128, -1, (2, 3)), (128, 0, (2, 3)), (256, -1, (2, 2))],
)
def test_more_blocks_of_values_are_in_flight_where_there_is_room(
    head_size: int, right: int, blocks: tuple[int, int]
) -> None:
    for q_len in (512, 8191):
        found = dict(served_by(head_size, q_len=q_len, window_right=right).constants)
        assert (found["STAGES"], found["V_STAGES"]) == blocks


@pytest.mark.parametrize(
    ("head_size", "q_len", "right", "room"),
    [
        *((192, q_len, -1, (2, 2, 1, True)) for q_len in (64, 8192)),
        *((192, q_len, 0, (2, 2, 2, None)) for q_len in (64, 1535)),
        *((192, q_len, 0, (2, 2, 1, True)) for q_len in (1536, 6144)),
        (192, 6145, 0, (2, 2, 1, None)),
        *((256, 2047, 0, (2, 3, 1, None)), (256, 2048, 0, (2, 2, 1, True))),
    ],
)
def test_where_the_queries_leave_their_slot_before_out_is_stored(
    head_size: int, q_len: int, right: int, room: tuple[int, int, int, bool | None]
) -> None:
    found = dict(served_by(head_size, q_len=q_len, window_right=right).constants)
    assert (found["STAGES"], found["V_STAGES"], found["Q_SLOTS"], found.get("APART")) == room


@pytest.mark.parametrize(
    ("q_len", "right", "block_n", "part"),
    [
        *((64, -1, 96, 32), (8192, -1, 96, 32)),
        *((1535, 0, 64, 64), (1536, 0, 96, 32), (6144, 0, 96, 32), (6145, 0, 112, 16)),
    ],
)
def test_blocks_of_keys_of_192_columns(q_len: int, right: int, block_n: int, part: int) -> None:
    spec = served_by(192, q_len=q_len, window_right=right)
    assert dict(spec.constants)["BLOCK_N"] == block_n
    for queries in spec.descriptors[:2]:
        assert (queries.block, queries.parts) == ((1, 1, 64, 64), 1)
    for keys in spec.descriptors[2:]:
        assert (keys.block, keys.parts * part) == ((1, 1, part, 64), block_n)


@pytest.mark.parametrize(
    ("head_size", "q_len", "right", "block_n"),
    [
        *((128, 8191, -1, 128), (128, 8192, -1, 176), (128, 8192, 0, 128), (256, 64, -1, 80), (256, 8192, 0, 64)),
        *((96, 1024, 0, 64), (96, 1025, 0, 192), (96, 16384, 0, 192)),
    ],
)
def test_more_keys_a_step_where_that_pays(head_size: int, q_len: int, right: int, block_n: int) -> None:
    assert dict(served_by(head_size, q_len=q_len, window_right=right).constants)["BLOCK_N"] == block_n


@pytest.mark.parametrize(
    ("head_size", "q_len", "right", "block_n"),
    [(128, 8191, -1, 128), (128, 8192, -1, 176), (256, 64, -1, 80), (256, 8192, 0, 64)],
)
def test_more_keys_a_step_of_sequences_with_lengths(head_size: int, q_len: int, right: int, block_n: int) -> None:
    found = dict(served_by(head_size, {"kv_lengths": 1 << 20}, q_len=q_len, window_right=right).constants)
    assert (found["LENGTHS"], found["BLOCK_N"]) == (True, block_n)


@pytest.mark.parametrize(
    ("head_size", "tokens", "right", "keys", "rounds", "finder"),
    [
        *((64, 5600, -1, 128, 0, False), (64, 5600, 0, 128, 4, False), (128, 5600, 0, 128, 4, True)),
        *((256, 5600, -1, 80, 0, True), (256, 5600, 0, 80, 4, True), (256, 5599, 0, 64, 0, True)),
    ],
)
def test_how_ragged_batches_are_cut(
    head_size: int, tokens: int, right: int, keys: int, rounds: int, finder: bool
) -> None:
    given = {"batch_size": 8, "q_len": tokens, "kv_len": tokens, "window_right": right, "ragged": True}
    found = dict(served_by(head_size, RAGGED, **given).constants)
    assert (found["RAGGED"], found["LENGTHS"], found["BLOCK_N"]) == (True, True, keys)
    assert (found.get("EVEN", 0), found.get("FINDER", False)) == (rounds, finder)


@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("right", [-1, 0])
def test_every_length_is_served(head_size: int, right: int) -> None:
    assert served_by(head_size, q_len=1, window_right=right).kernel == DECODE
    for q_len in (2, 64, 384, 385, 512, 513, 1000, 1023, 1024, 1025, 4095, 4096, 1 << 20):
        spec = served_by(head_size, q_len=q_len, window_right=right)
        assert (spec.kernel, dict(spec.constants)["CAUSAL"]) == (HOPPER, right == 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((["first"],), f"first.*{', '.join(KERNELS)}"),
        ((["basic"], ["fp8"]), "fp8"),
        ((["basic"], ["fp16"], [257]), "257"),
        ((["basic"], ["fp16"], [96]), "nothing to build"),
    ],
)
def test_families_that_are_not_served_are_refused(settings: tuple[Any, ...], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        library_specs(*settings)


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_a_sweep_has_every_setting_as_an_algorithm_of_its_own(head_size: int) -> None:
    settings = sweep(head_size)
    specs = sweep_specs(Forward("fp16", head_size).specs()[-1], head_size)

    assert len(set(settings)) == len(settings) >= 4
    assert len({spec.algorithm for spec in specs}) == len(settings)
    assert len({spec.variant for spec in specs}) == sum(len(setting.masks) for setting in settings)


@functools.cache
def parameters_of(source: Path, kernel: str) -> set[str]:
    made = ast.parse(source.read_text()).body
    (found,) = (one for one in made if isinstance(one, ast.FunctionDef) and one.name == kernel)
    return {parameter.arg for parameter in found.args.args}


def test_kernels_take_the_constants_of_their_specs() -> None:
    """Settings of plain attention are those of sinks alone, too."""
    for spec in library_specs(list(KERNELS), ("fp16", "bf16")):
        given = {name for name, _ in spec.constants}
        assert given <= parameters_of(spec.source, spec.kernel), spec.name
