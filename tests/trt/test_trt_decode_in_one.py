"""Decoding on Hopper through the plugin: one launch by fmha_fwd_* where that is better, else the pair."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_cuda import FakeCuda
from shared import Shared
from trt_double import Tensor
from trt_double.binding import make_binding
from trt_double.scene import DECODES, FORWARDS, Scene, pair_standins, standin

import pyfmha.trt
from pyfmha.aot import build
from pyfmha.attention import decode
from pyfmha.attention.decode import COPYING, READ_PERCENT, Figures, decoding_for, one_launch_pays
from pyfmha.attention.forward import Call, Forward
from pyfmha.attention.hopper import DECODE_KERNEL, decodes
from pyfmha.runtime.library import Library
from pyfmha.spec.arch import parse_archs
from pyfmha.spec.grid import parse_grid

pytest_plugins = ("trt_double.fixtures",)

SIZE, HEADS = 128, 8
PAIR = ["fmha_split_d128_fp16", "fmha_combine_d128_fp16"]
WORKSPACE, STREAM = 0x7C0000000100, 0xABCD
INT32 = 3


@pytest.fixture(scope="module")
def library_path(shared: Shared) -> Path:
    """fmha_fwd_d128_fp16 with the variant that decodes, and stand-ins for everything else."""
    decoders = [spec for spec in Forward("fp16", SIZE).specs(hopper=True) if spec.kernel == DECODE_KERNEL]
    assert len(decoders) == 2
    others = replace(standin(FORWARDS[-1], 256), algorithm_name=decoders[0].algorithm_name)
    specs = [*decoders, others, others.generic(), *pair_standins(DECODES[-1])]
    archs = parse_archs(["sm_90", "sm_100"])
    return shared.once("in_one", lambda folder: build(specs, archs, folder, jobs=2).library)


@pytest.fixture
def launched(library_path: Path, tmp_path: Path, fake_cuda: FakeCuda) -> Callable[..., list[str]]:
    """The kernels that an enqueue launches."""
    library = Library(shutil.copy(library_path, tmp_path / "libone.so"))

    def run(rows: int = 1, keys: int = 600, kv_heads: int = 4, batch: int = 1, **changes: float) -> list[str]:
        assert fake_cuda.c.cuInit(0) == 0
        fake_cuda.use_context()
        scene = Scene(make_binding(), library)
        plugin = scene.calls.attach(
            scene.loaded(scene.built(num_heads=HEADS, head_size=SIZE, num_kv_heads=kv_heads, **changes))
        )
        assert plugin is not None, pyfmha.trt.last_failure()
        q, kv = Tensor((batch, HEADS, rows, SIZE)), Tensor((batch, kv_heads, keys, SIZE))
        lengths = [Tensor((batch,), INT32)] * int(changes.get("kv_lengths", 0))
        inputs = [q, kv, kv, *lengths]
        assert scene.calls.on_shape_change(plugin, inputs, [q]) == 0, pyfmha.trt.last_failure()
        addresses = [0x7F0000000000 + 0x1000000 * index for index in range(len(inputs))]
        assert scene.calls.enqueue(plugin, addresses, [0x7E0000000000], WORKSPACE, STREAM) == 0
        return [name_of(library, launch) for launch in fake_cuda.launches()]

    return run


def name_of(library: Library, launch: Any) -> str:
    """The function whose code was launched; of the one that decodes in one launch its kernel."""
    (found,) = {
        variant.kernel if variant.kernel == DECODE_KERNEL else function.name
        for function, _, variant in library.manifest.variants()
        if any(image.sha256 == launch.image_sha256 for image in variant.images)
    }
    return found


@pytest.mark.parametrize("changes", [{}, {"causal": 0}, {"causal": 2}, {"kv_lengths": 1}, {"window_left": 100}])
def test_one_query_is_decoded_in_one_launch(launched: Callable[..., list[str]], changes: dict[str, float]) -> None:
    assert launched(**changes) == [DECODE_KERNEL]


H100, H200 = (2619000, 5120), (3201000, 6016)
"""Clock in kHz and width in bits of their memory; 132 multiprocessors each."""


@pytest.mark.parametrize("changes", [{"rows": 2}, {"softcap": 2.0}, {"kv_heads": 1, "keys": 20_000}])
def test_what_one_launch_does_not_serve_is_split(launched: Callable[..., list[str]], changes: dict[str, Any]) -> None:
    assert launched(**changes) == PAIR


@pytest.mark.parametrize("changes", [{"kv_heads": 1, "keys": 7000}, {"batch": 16, "keys": 32_768}, {"keys": 7}])
def test_long_and_short_ones(launched: Callable[..., list[str]], changes: dict[str, Any]) -> None:
    assert launched(**changes) == [DECODE_KERNEL]


def test_a_faster_memory_is_read_by_both_launches(launched: Callable[..., list[str]], fake_cuda: FakeCuda) -> None:
    """64 programs of one launch read as much as an H100's memory gives, and less than an H200's."""
    fake_cuda.set_bandwidth(0, *H200)
    assert launched(batch=4, kv_heads=8, keys=32_768) == PAIR
    fake_cuda.set_bandwidth(0, *H100)
    assert launched(batch=4, kv_heads=8, keys=32_768)[2:] == [DECODE_KERNEL]
    fake_cuda.set_bandwidth(0, 0, 0)
    assert launched(batch=4, kv_heads=8, keys=32_768)[3:] == [DECODE_KERNEL]


@pytest.mark.parametrize(("batch", "in_one"), [(16, True), (17, True), (24, False), (36, True), (64, True)])
def test_a_short_last_wave_counts(
    launched: Callable[..., list[str]], fake_cuda: FakeCuda, batch: int, in_one: bool
) -> None:
    """The plugin chooses as :func:`decoding_for` does. Of more than 128 programs a multiprocessor has several; what is
    not split into parts is done by the first of the pair."""
    fake_cuda.set_bandwidth(0, *H200)

    assert launched(batch=batch, kv_heads=8, keys=4096) == ([DECODE_KERNEL] if in_one else PAIR[:1])
    call = Call(batch, HEADS, 8, 1, 4096, SIZE, 0.1)
    assert (decoding_for(call, in_one=Figures(132, *H200)) is None) == in_one


def test_other_devices_split(launched: Callable[..., list[str]], fake_cuda: FakeCuda) -> None:
    fake_cuda.set_device(0, 100, 232448)

    assert launched() == PAIR


def test_the_manifest_tells_what_is_decoded_in_one_launch(library_path: Path) -> None:

    manifest = next(f for f in Library(library_path).manifest.functions if f.name == "fmha_fwd_d128_fp16")
    call = Call(1, HEADS, 4, 1, 600, SIZE, 0.1, q_strides=(8, 8, 8), k_strides=(8, 8, 8), v_strides=(8, 8, 8))
    values = [1 << 20, 0, *[1 << 20] * 3, 0, 0, 0, 0, *call.scalars()]

    assert decodes(manifest, 0, "sm_90", values)
    assert not decodes(manifest, 0, "sm_100", values)
    values[2] += 2  # Q is not at a multiple of 16 bytes
    assert not decodes(manifest, 0, "sm_90", values)


# Head size, sequences, key heads, keys: us of the pair and of one launch, of 16 bits; see kernels/NOTES.md.
MEASURED: dict[tuple[int, int], dict[tuple[int, int, int, int], tuple[float, float]]] = {
    H100: {
        **{(128, 1, 1, 8192): (13.3, 13.5), (128, 1, 2, 8192): (14.9, 14.1), (128, 1, 4, 8192): (19.7, 16.6)},
        **{(128, 1, 8, 4096): (18.8, 14.6), (128, 16, 8, 4096): (108.0, 103.2), (128, 1, 8, 32768): (64.2, 59.4)},
        **{(128, 16, 8, 32768): (713.6, 701.1)},
    },
    H200: {
        **{(128, 16, 8, 4096): (80.0, 73.3), (128, 16, 8, 8192): (140.4, 134.1), (128, 16, 8, 32768): (488.2, 472.5)},
        **{(128, 64, 8, 1024): (79.8, 76.5), (128, 64, 8, 4096): (253.2, 247.4), (128, 64, 8, 32768): (1934.8, 1893.4)},
        **{(128, 17, 8, 4096): (93.0, 81.2), (128, 20, 8, 4096): (97.8, 91.9), (128, 24, 8, 4096): (109.2, 110.9)},
        **{(128, 28, 8, 4096): (126.2, 124.8), (128, 32, 8, 4096): (137.2, 134.1), (128, 36, 8, 4096): (170.4, 157.1)},
        **{(128, 40, 8, 4096): (179.2, 174.8), (128, 48, 8, 4096): (197.8, 193.0), (128, 20, 8, 32768): (666.8, 617.7)},
        **{(128, 24, 8, 32768): (742.3, 791.3), (128, 12, 8, 4096): (66.0, 59.8), (128, 8, 8, 8192): (80.1, 75.3)},
        **{(128, 1, 8, 4096): (16.9, 12.4), (128, 4, 8, 4096): (31.1, 28.7), (128, 1, 8, 32768): (49.3, 45.7)},
        **{(128, 2, 8, 32768): (77.6, 78.7), (128, 4, 8, 32768): (136.2, 144.7), (128, 8, 8, 32768): (258.4, 250.3)},
        **{(128, 12, 8, 32768): (383.6, 372.6), (128, 16, 8, 1024): (32.7, 27.6), (128, 16, 8, 2048): (50.1, 45.5)},
        **{(128, 22, 8, 4096): (101.0, 99.0), (128, 50, 8, 4096): (224.8, 213.3), (128, 3, 8, 16384): (63.0, 76.0)},
        **{(128, 6, 8, 16384): (109.3, 105.0), (128, 3, 8, 4096): (26.3, 26.7), (128, 6, 8, 4096): (40.7, 37.6)},
        **{(64, 16, 8, 4096): (50.8, 46.6), (64, 20, 8, 4096): (59.8, 54.1), (64, 32, 8, 4096): (77.4, 76.7)},
        **{(64, 16, 8, 8192): (84.7, 78.8), (64, 64, 8, 4096): (140.7, 147.9), (64, 64, 8, 32768): (973.2, 1146.3)},
        **{(256, 12, 8, 4096): (111.7, 112.9), (256, 16, 8, 4096): (141.2, 140.3), (256, 20, 8, 4096): (182.4, 192.6)},
        **{(256, 16, 8, 2048): (81.3, 77.1), (256, 64, 8, 4096): (484.6, 528.8)},
    },
}


def test_the_faster_of_both_is_chosen_wherever_they_were_measured() -> None:
    for memory, cells in MEASURED.items():
        for (size, batch, kv_heads, keys), (pair, one) in cells.items():
            call = Call(batch, 4 * kv_heads, kv_heads, 1, keys, size, 0.1)
            assert decoding_for(call) is not None
            chosen = one if decoding_for(call, in_one=Figures(132, *memory)) is None else pair
            assert chosen <= 1.021 * min(pair, one), (memory, size, batch, kv_heads, keys)


def test_ranks_are_those_of_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the choice takes for programs is what the grid has."""
    monkeypatch.setattr(
        decode, "COPYING", replace(COPYING, split=10**9, multiprocessor=10**9)
    )  # the pair reads as much as the memory gives
    _, decoder, *_ = Forward("fp16", SIZE).specs(hopper=True)
    rows = parse_grid(decoder.grid, frozenset(dict(decoder.prototype)), {})[0]
    for batch in (*range(1, 20), 63, 64, 65, 128):
        values = {"num_heads": 8, "num_kv_heads": 1, "batch_size": batch}
        # One program reads as much as the memory gives, another half as much: told apart by which is chosen.
        ranks = rows.evaluate(values)
        call = Call(batch, 8, 1, 1, 8_000_000 // batch, SIZE, 0.1)
        for rate, pays in ((COPYING.program * batch * ranks, True), (COPYING.program * batch * ranks * 3 // 2, False)):
            figures = Figures(10_000, rate * 100 // READ_PERCENT // 2 + 1, 8000)
            assert one_launch_pays(call, figures) is pays, (batch, ranks)
