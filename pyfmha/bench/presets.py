"""The cells of each preset of ``pyfmha bench``, as data."""

from collections.abc import Callable, Iterable

from pyfmha.bench.cells import BESIDE, FP8, Cell
from pyfmha.errors import SpecError
from pyfmha.spec.words import one_of

_LENGTHS = ((8, 512), (1, 2048), (4, 2048), (2, 8192), (1, 16384))


def _prefill(dtypes: Iterable[str]) -> list[Cell]:
    sizes = [(b, 32, 32, s, d) for d in (64, 128) for b, s in _LENGTHS] + [(4, 32, 8, 2048, 128)]
    return [
        Cell(dtype, b, h, hk, s, s, d, causal)
        for dtype in dtypes
        for b, h, hk, s, d in sizes
        for causal in (False, True)
    ]


def _decode(dtypes: Iterable[str]) -> list[Cell]:
    return [Cell(dtype, b, 32, 8, 1, kv, 128, False) for dtype in dtypes for kv in (4096, 32768) for b in (1, 16)]


def _quick() -> list[Cell]:
    few = [Cell("fp16", b, 32, 32, s, s, d, c) for d in (64, 128) for b, s in _LENGTHS[::2] for c in (False, True)]
    return [*few, Cell("fp16", 16, 32, 8, 1, 4096, 128, False)]


def _flash3() -> list[Cell]:
    few = [(8, 32, 32, 512), (4, 32, 32, 2048), (1, 32, 32, 16384)]
    sizes = [(*size, 64) for size in few]
    sizes += [(*size, 128) for size in (*few[:2], (2, 32, 32, 8192), few[2], (4, 32, 8, 2048))]
    sizes += [(4, 16, 16, 512, 256), (4, 16, 16, 4096, 256), (1, 16, 16, 16384, 256)]
    sizes += [(8, 32, 32, 512, 96), (4, 32, 32, 2048, 96), (2, 32, 32, 8192, 96)]
    sizes += [(8, 16, 16, 512, 192), (4, 16, 16, 2048, 192), (2, 16, 16, 8192, 192)]
    dense = [Cell("bf16", b, h, hk, s, s, d, causal) for causal in (False, True) for b, h, hk, s, d in sizes]
    capped = [
        Cell("bf16", b, h, h, s, s, d, causal, softcap=50.0)
        for causal in (False, True)
        for b, h, s, d in (
            (4, 32, 2048, 64),
            (1, 32, 8192, 64),
            (4, 32, 2048, 128),
            (1, 32, 8192, 128),
            (4, 16, 4096, 256),
        )
    ]
    decoding = [Cell("bf16", b, 32, 8, 1, kv, 128, False) for kv in (4096, 32768) for b in (1, 16, 64)]
    return [*dense, *_narrow_values("bf16"), *capped, *decoding]


def _narrow_values(dtype: str) -> list[Cell]:
    """As in DeepSeek's prefill: Q and K of head size 192, V of 128."""
    sizes = ((8, 32, 512), (4, 32, 2048), (4, 8, 2048), (1, 32, 8192))
    return [
        Cell(dtype, b, 32, hk, s, s, 192, causal, v_head_size=128) for causal in (False, True) for b, hk, s in sizes
    ]


# Tokens, or keys, of each sequence; the random ones were drawn once from 64 to 2048.
_RAGGED = {
    False: (1024,) * 8,
    True: (64, 2048, 1391, 640, 205, 1770, 96, 1103, 512, 1984, 331, 877, 1536, 150, 1240, 1843),
}
_KEYS = ((4, 2048, (1024, 1365, 1706, 2048)), (1, 8192, (6144,)))


def _lengths() -> list[Cell]:
    """Ragged batches, full and causal, and key lengths."""
    sizes = ((64, 32), (128, 32), (256, 16))
    ragged = [
        Cell("bf16", len(tokens), heads, heads, max(tokens), max(tokens), size, causal, tokens=tokens)
        for size, heads in sizes
        for causal, tokens in _RAGGED.items()
    ]
    keys = [
        Cell("bf16", batch, heads, heads, seq, seq, size, False, kv_lengths=lengths)
        for size, heads in sizes
        for batch, seq, lengths in _KEYS
    ]
    return [*ragged, *keys]


def _fp8() -> list[Cell]:
    """16384 queries in all, as in examples/results/h200_fp8.json, and each of them in bf16."""
    sizes = [(b, heads, s, d) for d, heads in ((64, 32), (128, 32), (256, 16)) for b, s in _SAME]
    return [
        Cell(dtype, b, heads, heads, s, s, d, causal)
        for b, heads, s, d in sizes
        for causal in (False, True)
        for dtype in (FP8, "bf16")
    ]


_SAME = ((32, 512), (16, 1024), (8, 2048), (4, 4096), (2, 8192), (1, 16384))
_LONG = ("documents", "prefix-1000", "groups")
_CAUSAL = ("", "sinks", "alibi", "documents")


def _masks() -> list[Cell]:
    """Biases, masks, sinks and functions, and the same without."""
    cells = []
    for size in (64, 128):
        for beside in ("", *BESIDE):
            batch, seq = (1, 8192) if beside in _LONG else (4, 2048)
            masks = (False, True) if beside == "" else (beside in _CAUSAL,)
            cells += [Cell("fp16", batch, 32, 32, seq, seq, size, causal, beside=beside) for causal in masks]
    return [*cells, *_narrow_values("fp16")]


_PRESETS: dict[str, tuple[str, Callable[[], list[Cell]]]] = {
    "quick": ("13 sizes of fp16, about half a minute", _quick),
    "prefill": (
        "fp16 and bf16, head sizes 64 and 128, 512 to 16384 keys, causal and full",
        lambda: _prefill(("fp16", "bf16")),
    ),
    "decode": ("one query over 4096 and 32768 keys", lambda: _decode(("fp16", "bf16"))),
    "flash3": (
        "bf16 beside FlashAttention-3, head sizes 64 to 256, V of 128 with Q of 192, soft caps, decoding",
        _flash3,
    ),
    "lengths": ("bf16, ragged batches and key lengths", _lengths),
    "fp8": ("e4m3 and bf16, head sizes 64, 128 and 256, 512 to 16384 keys", _fp8),
    "masks": ("fp16, biases, masks, sinks, functions and V of another head size, beside FlexAttention", _masks),
}
PRESETS = tuple(_PRESETS)
DESCRIPTIONS = {name: said for name, (said, _) in _PRESETS.items()}
"""What each preset holds, for people."""


def preset(name: str) -> list[Cell]:
    """The cells of one of :data:`PRESETS`.

    Raises:
        SpecError: there is no such preset.
    """
    if name not in _PRESETS:
        raise SpecError(f"preset {name!r} is unknown: {one_of(PRESETS, name)}")
    return _PRESETS[name][1]()
