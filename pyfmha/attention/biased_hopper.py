"""The Hopper variants of ``fmha_biased_*`` and of functions made of a user's: ``kernels/fmha_biased_sm90.py``,
by the settings of :mod:`pyfmha.attention.biased_settings`.

They serve a mask or a bias of Q's dtype, in rows of whole 16 bytes by TMA or the same for all queries, and neither,
with sinks, lengths and windows. Biases of FLOAT, soft caps, ragged batches, a bias and a mask together, and anything
misaligned fall through to the portable variants.
"""

from collections.abc import Sequence
from dataclasses import replace

from pyfmha.attention import hopper
from pyfmha.attention.biased_settings import (
    BF16_RELATIVE,
    GENERAL_SETTINGS,
    KINDS,
    NARROW_SETTINGS,
    NEITHER,
    PLAIN_SETTINGS,
    SHORT,
    UNEVEN,
    VALUES_SETTINGS,
    Beside,
    Setting,
    settings_of,
)
from pyfmha.attention.hopper import ROWS
from pyfmha.attention.hopper_settings import SETTINGS
from pyfmha.spec.descriptors import Descriptor
from pyfmha.spec.kernel import Argument, KernelSpec

KERNEL = "fmha_biased_sm90"
KERNEL_FILE = "fmha_biased_sm90.py"
HEAD_SIZES = (64, 128)
"""Padded head sizes that have run on a GPU."""
LARGEST_SCALE = 2**16
"""A product that counts as -2**100 is then still above what a row without keys has."""
SINKS_KERNEL = "fmha_sinks_sm90"
VALUES_KERNEL = "fmha_values_sm90"


def variants(base: KernelSpec, padded: int) -> tuple[KernelSpec, ...]:
    """The Hopper variants that go before the portable ones of ``fmha_biased_*``.

    Sinks alone are served by the kernel of ``fmha_fwd_*``, cut as there; each kind of bias and mask, and none, by
    variants for full and for causal attention, and one for lengths and windows.

    Args:
        base: a portable variant without hints: it lends its name, arguments and algorithm.
        padded: head size of its blocks.
    """
    made = (variant for kind in KINDS for variant in plain(base, padded, kind))
    general = (variant for kind in KINDS for variant in of_kind(base, padded, kind))
    return (*narrow_values(base, padded), *sinks(base, padded), *made, *general)


def of_function(
    base: KernelSpec,
    padded: int,
    *,
    relative: bool,
    asked: bool,
    masked: bool,
    narrow: bool = False,
    from_first: bool = False,
    even: bool = True,
) -> tuple[KernelSpec, ...]:
    """The Hopper variants for a user's functions, without bias and mask.

    Args:
        base, padded: as of :func:`variants`.
        relative: whether the score function is.
        asked: whether a function is asked for each element, rather than for few blocks or once for each distance.
        masked: whether there is a mask function. In the blocks that it is asked for, maxima of three take more
            instructions than they spare elsewhere: a window of 256 took 142 us at head size 64, and 123 without.
        narrow: whether there is a mask function alone, whose bounds begin anywhere.
        from_first: whether bounds say that what is seen, and what is seen whole, begin with the first key: tiles then
            are at least as long as those of causal attention.
        even: whether tiles get longer by as many keys as queries, in causal attention and of those bounds: there are no
            bounds, or what is seen ends some keys behind the last query.
    """
    if padded not in HEAD_SIZES:
        return ()
    general = GENERAL_SETTINGS[padded][NEITHER]
    full, causal = settings_of(_dtype(base), padded, NEITHER)
    if not (even or (from_first and padded == HEAD_SIZES[0])):
        causal = UNEVEN[padded]
    short: tuple[Setting, ...] = ()
    if padded == HEAD_SIZES[0]:
        if narrow:
            full, causal = NARROW_SETTINGS
        elif masked and asked:
            full = replace(full, threes=False)
        elif from_first:
            full = causal
    elif asked or narrow:
        full = causal = replace(general, handed_on=True)
        if even:
            causal = replace(causal, even=2, brief=True)
    else:
        short = (SHORT,)
        if relative and _dtype(base) == "bf16":
            full, causal = BF16_RELATIVE
        elif from_first:
            full = causal
    fulls, causals = (*(short if from_first else ()), full), (*short, causal)
    if from_first and not asked:
        fulls, causals = (tuple(replace(one, from_first=True) for one in cut) for cut in (fulls, causals))
    if relative:  # terms take some of the shared memory
        (general,), fulls, causals = (
            tuple(replace(one, v_stages=2) for one in cut) for cut in ((general,), fulls, causals)
        )
    return (
        *plain(base, padded, NEITHER, (fulls, causals), relative=relative),
        *of_kind(base, padded, NEITHER, general, relative=relative),
    )


def plain(
    base: KernelSpec,
    padded: int,
    beside: Beside,
    cut: tuple[Sequence[Setting], Sequence[Setting]] | None = None,
    *,
    relative: bool = False,
) -> tuple[KernelSpec, ...]:
    """The variants for full and for causal attention with one kind of bias or mask, without lengths and windows.

    Args:
        base, padded: as of :func:`variants`.
        beside: the kind.
        cut: how the two are cut, if not as `settings_of` says: settings in the order in which they are tried.
        relative: as of :func:`of_kind`.
    """
    if padded not in HEAD_SIZES:
        return ()
    if cut is None:
        full, causal = settings_of(_dtype(base), padded, beside)
        cut = (full, *((PLAIN_SETTINGS[padded][beside],) if full.requires else ())), (causal,)
    settings = (replace(one, causal=causal) for causal in (False, True) for one in cut[causal])
    return tuple(v for one in settings for v in of_kind(base, padded, beside, one, relative=relative))


def _dtype(base: KernelSpec) -> str:
    return dict(base.prototype)["Q"].removeprefix("*")


def sinks(base: KernelSpec, padded: int) -> tuple[KernelSpec, ...]:
    """Those for sinks alone: ``kernels/fmha_sinks_sm90.py``."""
    if padded not in HEAD_SIZES:
        return ()
    settings = [s for s in SETTINGS[padded] if not (s.general or s.capped or s.lengths or s.two_parts)]
    return tuple(
        replace(
            spec,
            source=base.source.with_name(f"{SINKS_KERNEL}.py"),
            kernel=SINKS_KERNEL,
            requires=(*spec.requires, *NEITHER.requires, "v_head_size == head_size"),
        )
        for spec in hopper.variants(base, padded, settings)
    )


def narrow_values(base: KernelSpec, padded: int) -> tuple[KernelSpec, ...]:
    """Those for values of at most two thirds of the head size of Q and K that blocks have room for, which is 3/4 of the
    padded one, and with nothing beside: ``kernels/fmha_values_sm90.py``. Two consumers whose queries have one slot
    store Out from a buffer of its own, for which there is room just yet.

    Args:
        base: a portable variant without hints: it lends its name, arguments and algorithm.
        padded: head size of its blocks.
    """
    size = padded // 2
    served = (*NEITHER.requires, "Sinks == 0", "SinksFp32 == 0", f"v_head_size <= {size}", "v_head_size % 8 == 0")
    return tuple(
        replace(
            spec,
            source=base.source.with_name(f"{VALUES_KERNEL}.py"),
            kernel=VALUES_KERNEL,
            constants=(*spec.constants, ("APART", setting.consumers == 2 and setting.q_slots == 1)),
            requires=(*spec.requires, *served),
            descriptors=_descriptors(padded // 4, setting.block_n, NEITHER, size),
        )
        for setting in VALUES_SETTINGS.get(padded, ())
        for spec in hopper.variants(base, padded, (setting,))
    )


def of_kind(
    base: KernelSpec, padded: int, beside: Beside, setting: Setting | None = None, *, relative: bool = False
) -> tuple[KernelSpec, ...]:
    """The variant for one kind of bias or mask, if the dtype and head size have one.

    Args:
        base, padded: as of :func:`variants`.
        beside: the kind.
        setting: how it is cut; for lengths and windows without one.
        relative: whether the score function is, whose terms take some of the shared memory.
    """
    if _dtype(base) not in hopper.DTYPES or padded not in HEAD_SIZES:
        return ()
    tiles = "tile" in (beside.bias, beside.mask)
    setting = setting or GENERAL_SETTINGS[padded][beside]
    in_product = _IN_PRODUCT if setting.in_product else ()
    constants = (
        *(() if tiles else (("x_desc", None),)),
        ("inputs", None),
        ("BLOCK_D", padded),
        ("BLOCK_V", padded),
        ("BLOCK_N", setting.block_n),
        ("CONSUMERS", setting.consumers),
        ("STAGES", setting.stages),
        ("V_STAGES", setting.v_stages),
        ("X_STAGES", setting.x_stages),
        ("CAUSAL", setting.causal is not False),
        ("GENERAL", setting.causal is None),
        ("LATE", setting.late),
        ("PING_PONG", setting.ping_pong and setting.consumers > 1),
        ("Q_SLOTS", setting.q_slots),
        ("CONSUMER_REGISTERS", setting.consumer_registers),
        ("PRODUCER_REGISTERS", setting.producer_registers),
        ("BIAS", beside.bias),
        ("MASK", beside.mask),
        ("SCORE", None),
        ("SEEN", None),
        ("BOUNDS", None),
        ("RELATIVE", relative),
        *((name, True) for name in _WHERE_SET if getattr(setting, name.lower())),
        *((("EVEN", setting.even),) if setting.even else ()),
    )
    tiles_of_rows = f"cdiv(q_len, {setting.consumers * ROWS}) * num_heads * batch_size"
    most = f"num_sms * {setting.programs}"
    if setting.programs > 1:  # a pair of tiles for each, rather than a tile, of which some are long
        most = f"min({most}, max(num_sms, cdiv({tiles_of_rows}, 2)))"
    grid = f"min({most}, {tiles_of_rows})"
    if setting.longest_first:
        grid = hopper.grid_of(tiles_of_rows, f"cdiv(q_len, {setting.consumers * ROWS})", most, longest_first=True)
    return (
        replace(
            base,
            source=base.source.with_name(KERNEL_FILE),
            kernel=KERNEL,
            arguments=tuple(Argument(a.name, a.type) for a in base.arguments),
            constants=constants,
            grid=grid,
            num_warps=4,
            num_stages=1,
            maxnreg=setting.maxnreg,
            archs=(hopper.ARCH,),
            tunings=(),
            requires=(*_SERVED, *in_product, *setting.requires, *_masks(setting.causal), *beside.requires),
            descriptors=_descriptors(padded, setting.block_n, beside),
        ),
    )


def _masks(causal: bool | None) -> tuple[str, ...]:
    if causal is None:
        return ()
    return ("q_lengths == 0", "kv_lengths == 0", "window_left == -1", f"window_right == {0 if causal else -1}")


_SERVED = (
    *("ragged == 0", "softcap == 0", "sm_scale > 0", f"sm_scale <= {LARGEST_SCALE}"),
    *("head_size % 8 == 0", "v_head_size % 8 == 0", f"q_len <= {hopper.LONGEST}", f"kv_len <= {hopper.LONGEST}"),
)

_WHERE_SET = (
    *("IN_PRODUCT", "PRODUCER_FIRST", "THREES", "LONGEST_FIRST", "TILE_AFTER", "HANDED_ON", "FROM_FIRST", "BRIEF"),
)
"""Constants of the kernel that a variant has only where its setting says so."""
_IN_PRODUCT = ("sm_scale <= 8",)
"""So that three numbers of 16 bits hold the inverse. Where it is infinite in 16 bits, every row is computed again."""


def _descriptors(padded: int, block_n: int, beside: Beside, values: int | None = None) -> tuple[Descriptor, ...]:
    """Boxes have so many columns; those of V and Out another number, if it is given."""

    def tensor(name: str, base: str, heads: str, seq: str, size: str, rows: int) -> Descriptor:
        strides: tuple[int | str, ...] = (*(f"{name}_stride_{axis}" for axis in "bhs"), 1)
        columns = values if values and name in ("out", "v") else padded
        return Descriptor(f"{name}_desc", base, ("batch_size", heads, seq, size), strides, (1, 1, rows, columns))

    made = (
        tensor("out", "Out", "num_heads", "q_len", "v_head_size", ROWS),
        tensor("q", "Q", "num_heads", "q_len", "head_size", ROWS),
        tensor("k", "K", "num_kv_heads", "kv_len", "head_size", block_n),
        tensor("v", "V", "num_kv_heads", "kv_len", "v_head_size", block_n),
    )
    name = next((name for name in ("bias", "mask") if getattr(beside, name) == "tile"), None)
    if name is None:
        return made
    sizes: tuple[int | str, ...] = (
        *(f"1 + min(1, {name}_stride_{axis}) * ({count} - 1)" for axis, count in _OUTER),
        f"{name}_rows",
        f"{name}_columns",
    )
    strides: tuple[int | str, ...] = (*(f"{name}_stride_{axis}" for axis in "bhq"), 1)
    return (*made, Descriptor("x_desc", name.capitalize(), sizes, strides, (1, 1, ROWS, block_n)))


_OUTER = (("b", "batch_size"), ("h", "num_heads"))
