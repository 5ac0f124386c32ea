"""How the Hopper kernel of ``fmha_biased_*`` is cut, ``kernels/fmha_biased_sm90.py``: its settings by head size, dtype
and what is beside the scores, which :mod:`pyfmha.attention.biased_hopper` makes variants of."""

from dataclasses import dataclass, replace

from pyfmha.attention import hopper_settings


@dataclass(frozen=True)
class Setting:
    """How the kernel is cut; attributes as of :class:`pyfmha.attention.hopper_settings.Setting`, and besides:

    Attributes:
        x_stages: blocks of a bias or mask in flight.
        causal: True or False for causal or full attention without lengths and windows; None for any.
        in_product: whether what is the same for all queries is added by a product; in fp16, for several consumers.
        ping_pong: whether several consumers take turns at the tensor cores.
        producer_first: whether the producer is the first partition; for two consumers.
        threes: whether maxima are taken of three scores at a time, as kernels/sm90_maxima.py does.
        longest_first: as of plain attention.
        tile_after: whether a bias or mask by tiles is loaded when the products are there, see Shape of
            ``kernels/sm90_biased.py``.
        handed_on: whether the producer hands the places of tiles on to the consumers, with what bounds say of them;
            without lengths and windows.
        from_first: whether bounds say that what is seen, and what is seen whole, begin with the first key.
        even: as of plain attention, for causal attention and functions that are from_first, handed on and not
            longest_first.
        brief: whether the slot of the rows before is given back beside a tile's first product.
        late: whether weights are converted to 16 bits beside the next product, see Shape of ``kernels/sm90_tiles.py``.
        requires: what it needs besides; elsewhere that of `PLAIN_SETTINGS` serves.
    """

    block_n: int
    consumers: int
    stages: int = 2
    v_stages: int = 2
    x_stages: int = 2
    q_slots: int = 2
    programs: int = 1
    maxnreg: int = 168
    consumer_registers: int = 240
    producer_registers: int = 24
    causal: bool | None = None
    late: bool = True
    in_product: bool = False
    ping_pong: bool = True
    producer_first: bool = False
    threes: bool = False
    longest_first: bool = False
    tile_after: bool = False
    handed_on: bool = False
    from_first: bool = False
    even: int = 0
    brief: bool = False
    requires: tuple[str, ...] = ()


@dataclass(frozen=True)
class Beside:
    """What a variant adds to the scores: "never", "tile" or "keys" of a bias and of a mask."""

    bias: str
    mask: str
    requires: tuple[str, ...]


_NO_BIAS = ("Bias == 0", "BiasFp32 == 0")
NEITHER = Beside("never", "never", (*_NO_BIAS, "Mask == 0"))
_BIAS = ("Bias != 0", "BiasFp32 == 0", "Mask == 0", "bias_stride_k == 1")
_MASK = (*_NO_BIAS, "Mask != 0", "mask_stride_k == 1")
BIAS_KEYS = Beside("keys", "never", (*_BIAS, "bias_stride_q == 0"))
MASK_KEYS = Beside("never", "keys", (*_MASK, "mask_stride_q == 0"))
BIAS_TILE = Beside("tile", "never", (*_BIAS, "bias_stride_q != 0"))
MASK_TILE = Beside("never", "tile", (*_MASK, "mask_stride_q != 0"))
KINDS = (NEITHER, BIAS_KEYS, MASK_KEYS, BIAS_TILE, MASK_TILE)

# With lengths and windows, by padded head size.
GENERAL_SETTINGS = {
    64: {
        **dict.fromkeys((NEITHER, BIAS_KEYS, MASK_KEYS), Setting(128, 1, programs=2, maxnreg=128)),
        **dict.fromkeys((BIAS_TILE, MASK_TILE), Setting(64, 1, programs=2, maxnreg=128)),
    },
    128: {
        NEITHER: Setting(64, 1, v_stages=3, programs=2, maxnreg=128),
        **dict.fromkeys((BIAS_KEYS, MASK_KEYS), Setting(64, 1, programs=2, maxnreg=128)),
        **dict.fromkeys((BIAS_TILE, MASK_TILE), Setting(64, 1, q_slots=1, programs=2, maxnreg=128)),
    },
}
_ONE = Setting(128, 1, programs=2, maxnreg=128, late=False, threes=True, handed_on=True)
_TWO = Setting(128, 2, late=False, threes=True, handed_on=True)
_THREE = replace(_TWO, consumers=3, maxnreg=128, consumer_registers=160, producer_registers=32)
_FREE = replace(_TWO, producer_first=True, ping_pong=False)
_EVEN_ONE = replace(_ONE, even=2, brief=True)
_EVEN_TWO = replace(_TWO, even=2, brief=True)
# Without, by padded head size; kernels/NOTES.md has the times. At 128 two consumers take turns, where nothing is asked
# for each element: that would keep the other one waiting.
PLAIN_SETTINGS = {
    64: dict.fromkeys(KINDS, _ONE),
    128: {
        NEITHER: replace(_TWO, v_stages=3),
        BIAS_KEYS: _TWO,
        MASK_KEYS: _TWO,
        BIAS_TILE: replace(_TWO, q_slots=1),
        MASK_TILE: _TWO,
    },
}
_KEYS = (BIAS_KEYS, MASK_KEYS)
CAUSAL_SETTINGS = {
    64: dict.fromkeys(KINDS, _EVEN_ONE),
    128: {
        NEITHER: replace(_FREE, v_stages=3, even=2, brief=True),
        BIAS_TILE: replace(_TWO, q_slots=1, even=2),
        MASK_TILE: _EVEN_TWO,
        **dict.fromkeys(_KEYS, replace(_FREE, longest_first=True)),
    },
}
"""Of these, causal attention's; and at 64 of functions whose bounds begin with the first key."""
UNEVEN = {64: _ONE, 128: replace(_FREE, v_stages=3, longest_first=True)}
"""Of functions with bounds of their own, in causal attention: the lengths of tiles are not known to grow evenly."""
# In fp16 the producer can do what is the same for all queries: consumers then have the registers of plain attention.
FP16_SETTINGS = {
    64: {
        **dict.fromkeys(_KEYS, replace(_THREE, in_product=True, handed_on=False, requires=("q_len > 512",))),
        MASK_TILE: replace(_ONE, tile_after=True),
    },
    128: {
        **dict.fromkeys(_KEYS, replace(_TWO, in_product=True)),
        BIAS_TILE: replace(_TWO, q_slots=1, tile_after=True),
        MASK_TILE: replace(_FREE, tile_after=True),
    },
}
"""Full attention in fp16. Three consumers have 192 queries a tile: of one query they took 224 us, one takes 143."""
FP16_CAUSAL_SETTINGS = {
    64: {MASK_TILE: replace(_EVEN_ONE, tile_after=True)},
    128: {
        **dict.fromkeys(_KEYS, replace(_FREE, in_product=True, longest_first=True)),
        BIAS_TILE: replace(_TWO, q_slots=1, even=2, tile_after=True),
    },
}
NARROW_SETTINGS = (
    Setting(64, 1, programs=3, maxnreg=80, late=False, handed_on=True),
    Setting(64, 1, stages=3, v_stages=3, programs=2, maxnreg=128, handed_on=True),
)
"""At 64, of full and of causal attention with a mask function alone whose bounds begin anywhere: windows and documents,
of whose blocks half may be seen in part. In causal attention three programs are 6 % faster with windows, but 1 % slower
with documents."""
BF16_SETTINGS = {
    64: {},
    128: {kind: replace(PLAIN_SETTINGS[128][kind], handed_on=False) for kind in (BIAS_TILE, *_KEYS)},
}
"""Full attention in bf16, at 128: where something is added to scores, consumers that find tiles themselves are 1 to 5 %
faster."""
BF16_RELATIVE = (replace(_TWO, handed_on=False), replace(_TWO, threes=False, handed_on=False))
"""Full and causal attention in bf16 with a relative function, at 128."""
SHORT = replace(GENERAL_SETTINGS[128][NEITHER], handed_on=True, requires=("q_len <= 1024",))
"""At 128, of functions with tiles as those of causal attention: 35 us for 62 at 512 queries, 92 for 108 at 1024."""

_PAIR = hopper_settings.Setting(128, 2, q_slots=1, two_parts=True, producer_first=True, threes=True)
_LONE = hopper_settings.Setting(64, 1, q_slots=1, programs=2, maxnreg=128, two_parts=True)
VALUES_SETTINGS = {
    256: (
        replace(_LONE, handed=True, even=2, brief=True, paired=True, requires=("q_len <= 1024",), masks=(True,)),
        replace(_PAIR, handed=True, even=2, brief=True, masks=(True,)),
        replace(_PAIR, masks=(False,)),
    )
}
"""By padded head size of Q and K, those for values of half of it, with nothing beside."""


def settings_of(dtype: str, padded: int, beside: Beside) -> tuple[Setting, Setting]:
    """Of full and of causal attention with one kind of bias or mask, without lengths and windows."""
    full = PLAIN_SETTINGS[padded][beside]
    causal = CAUSAL_SETTINGS[padded].get(beside, full)
    if dtype == "bf16":
        full = BF16_SETTINGS[padded].get(beside, full)
    if dtype == "fp16":
        full = FP16_SETTINGS[padded].get(beside, full)
        causal = FP16_CAUSAL_SETTINGS[padded].get(beside, causal)
    return full, causal
