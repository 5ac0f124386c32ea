"""The Hopper variants of the production functions, with the settings of each: ``kernels/fmha_sm90.py``, and for one
query a sequence ``kernels/fmha_decode_sm90.py``.

They serve what TMA can load and what most launches ask for, ragged batches and soft caps by variants of their own;
everything else falls through to the portable variants of the same function, as do ragged batches with windows up to
head size 64, where tiles are too short for what it takes to find them (kernels/NOTES.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pyfmha.errors import SpecError
from pyfmha.runtime.serving import serving
from pyfmha.spec.descriptors import Descriptor
from pyfmha.spec.kernel import Argument, KernelSpec
from pyfmha.spec.manifest import Function

ARCH = "sm_90"
KERNEL = "fmha_fwd_sm90"
KERNEL_FILE = "fmha_sm90.py"
DTYPES = ("fp16", "bf16")
HEAD_SIZES = (64, 128, 256)
DECODE_KERNEL = "fmha_decode_sm90"
DECODE_KERNEL_FILE = "fmha_decode_sm90.py"
ROWS = 64
"""Queries of one consumer warpgroup."""
LONGEST = 2**28
"""Queries or keys of a sequence with windows, whose ends are then sums within 32 bits."""
LARGEST_CAP = 64
"""Soft cap to which the error of the fast tanh, 2**-22 of it, is that of float32 in a log-sum-exp; models use 20-50."""
FEW_SEQUENCES = 126
"""Of a ragged batch, of which a program keeps a table (SEGMENTS of kernels/sm90_places.py)."""
MOST_SEQUENCES, MOST_HEADS = 2**20, 2**10
"""Of a ragged batch: whatever lengths its sequences have, tiles whose Out fits a memory are counted within 32 bits."""


@dataclass(frozen=True)
class Setting:
    """How the kernel is cut.

    Attributes:
        block_n: keys of one step: a power of two, or for a kernel that is lazy and neither serial, general nor, without
            levels, capped another multiple of 16, as kernels/sm90_wide.py has it.
        consumers: warpgroups that compute, 1 to 3, of 64 queries each.
        stages: blocks of K in flight.
        v_stages: blocks of V in flight.
        q_slots: 2 to load the queries of the next tile while one is computed, or 1.
        programs: persistent programs for each multiprocessor; 0 for one program a tile.
        rounds: how many times as many are launched. Tiles of ragged batches are of lengths that the launch does not
            know: a program that comes later evens out what the first ones got.
        two_heads: causal tiles in pairs of two heads, instead of one.
        longest_first: causal tiles from the longest, the last of them one a program, instead of pairs.
        ping_pong: whether consumers take turns at the tensor cores.
        maxnreg: registers a thread at the launch; consumers and producer share them out anew.
        consumer_registers, producer_registers: what each then has; a lone consumer takes the rest.
        requires: conditions beyond those of the kernel, where another setting serves better.
        masks: with which values of CAUSAL it is compiled.
        general: whether it serves lengths, and windows of any width.
        ragged: whether it serves ragged batches, and those alone; it is general, too.
        capped: whether it serves soft caps, and those alone.
        two_parts: whether it serves head sizes up to 3/4 of the padded one, and those alone, as kernels/sm90_parts.py
            does; it is not general.
        lazy: whether it rescales sums only where that is due, as kernels/sm90_lazy.py does.
        serial: whether a consumer waits for one product before the next; lazy, without turns, and not general.
        producer_first: whether the producer is the first partition; for several consumers.
        lengths: whether it serves lengths, and no windows; it is not general.
        threes: whether maxima are taken of three scores at a time, as kernels/sm90_maxima.py does, and of soft caps
            kernels/sm90_products.py.
        handed: whether the producer hands the places of tiles on to the consumers; not for ragged batches.
        apart: whether Out is stored from a buffer of its own, so that the slot of its queries is free sooner.
        sections: of how many heads the tiles of a ragged batch are paired, 2 or 4, or 0 for one.
        early: whether blocks are asked for before the queries of their tile, as the kernel says.
        even: causal tiles from the longest, in sections of so many rounds, from which all programs get as much to do;
            for a kernel that is handed and not longest_first. 0 for another order.
        brief: whether ends of tiles take fewer instructions, as the kernel says; not for lengths.
        halved: whether half a first block is multiplied where rows see no more of it; of 128 keys, for several
            consumers that serve neither lengths nor soft caps.
        direct: whether Out is stored from registers, as kernels/sm90_direct.py does; for one part, and not apart.
        levels: whether soft caps go the same way in all warps of a program, as kernels/sm90_capped.py has it; neither
            general, ragged nor for lengths.
    """

    block_n: int
    consumers: int
    stages: int = 2
    v_stages: int = 2
    q_slots: int = 2
    programs: int = 1
    rounds: int = 1
    two_heads: bool = False
    longest_first: bool = False
    ping_pong: bool = True
    maxnreg: int = 168
    consumer_registers: int = 240
    producer_registers: int = 24
    requires: tuple[str, ...] = ()
    masks: tuple[bool, ...] = (False, True)
    general: bool = False
    ragged: bool = False
    capped: bool = False
    two_parts: bool = False
    lazy: bool = False
    serial: bool = False
    producer_first: bool = False
    lengths: bool = False
    threes: bool = False
    handed: bool = False
    apart: bool = False
    sections: int = 0
    early: bool = False
    even: int = 0
    brief: bool = False
    halved: bool = False
    direct: bool = False
    levels: bool = False


THREE_CONSUMERS = Setting(128, 3, maxnreg=128, consumer_registers=160, producer_registers=32)
"""Of head size 64: 192 queries a tile."""

LONE = Setting(128, 1, programs=2, maxnreg=128, threes=True)
"""Of head size 64: two programs on a multiprocessor."""

LAZY = Setting(128, 2, v_stages=3, ping_pong=False, lazy=True, producer_first=True, threes=True)
"""Of head size 128: 410 instructions a step, of which 64 less are executed where no row grows."""

WIDE_128 = replace(LAZY, block_n=176, v_stages=2, q_slots=1, ping_pong=True, masks=(False,))
"""Of head size 128: 658 instructions a step of 176 keys, of which 64 less are executed where no row grows."""

LONE_128 = Setting(64, 1, v_stages=3, programs=2, maxnreg=128, capped=True)
"""Of head size 128, soft caps."""

LEVELS = replace(LAZY, producer_first=False, threes=False, capped=True, levels=True)
"""Of head size 128, soft caps from SERVED_CAP on, for which kernels/sm90_capped.py has two polynomials."""
SERVED_CAP = "softcap >= 45"

LAZY_256 = Setting(64, 2, q_slots=1, lazy=True, producer_first=True)
"""Of head size 256, where turns pay."""

LEVELS_256 = replace(LAZY_256, block_n=80, capped=True, levels=True)
"""Of head size 256, as LEVELS."""

WIDE_192 = replace(LAZY_256, block_n=96, two_parts=True, threes=True, apart=True)
"""Of head size 192: 354 instructions a step where no row grows, 3.7 a key; with 64 keys 4.8."""

EVEN_192 = replace(WIDE_192, handed=True, even=2, brief=True, masks=(True,))
"""Causal tiles evenly: 1 to 4 % faster than in pairs or than from the longest, wherever they are many."""
LONG_192 = replace(EVEN_192, block_n=112, apart=False)

EVEN_256 = replace(LAZY_256, masks=(True,), threes=True, handed=True, apart=True, even=2, brief=True)

SERIAL_96 = replace(
    THREE_CONSUMERS, ping_pong=False, two_parts=True, lazy=True, serial=True, producer_first=True, threes=True
)
"""Of head size 96: 192 queries a tile, for whose consumers there are registers one product at a time."""
WIDE_96 = replace(
    LAZY, block_n=192, v_stages=2, ping_pong=True, two_parts=True, even=2, brief=True, handed=True, masks=(True,)
)
"""Of head size 96: tiles of 128 queries, of which there are more than of 192, and long steps for two consumers."""
LONG_96 = replace(SERIAL_96, stages=3, v_stages=3, even=2, masks=(True,), handed=True)

RAGGED = replace(LAZY, consumer_registers=232, producer_registers=40, lengths=True, ragged=True, early=True)
"""Of head size 128: the producer, which looks for tiles, has registers for that."""
RAGGED_256 = replace(RAGGED, block_n=80, v_stages=2, q_slots=1, ping_pong=True, producer_first=False)

# By padded head size, in the order in which they are tried; kernels/NOTES.md has the times. One consumer leaves room
# for a second program on the multiprocessor: each hides where the other starts and ends. Several consumers take turns
# at the tensor cores, and share what is loaded: the longer the sequences, the more that counts.
SETTINGS: dict[int, tuple[Setting, ...]] = {
    64: (
        Setting(64, 1, programs=2, maxnreg=128, two_heads=True, requires=("q_len <= 384",), masks=(True,)),
        Setting(
            128, 1, programs=2, maxnreg=128, two_heads=True, requires=("q_len > 384", "q_len <= 512"), masks=(True,)
        ),
        replace(THREE_CONSUMERS, requires=("q_len > 512",), masks=(False,), threes=True),
        replace(
            THREE_CONSUMERS, handed=True, even=4, brief=True, halved=True, requires=("q_len > 4096",), masks=(True,)
        ),
        replace(LONE, handed=True, even=2, brief=True, masks=(True,)),
        Setting(128, 1, programs=2, maxnreg=128, masks=(False,)),
        replace(THREE_CONSUMERS, requires=("q_len > 512",), masks=(False,), lengths=True, threes=True),
        replace(THREE_CONSUMERS, longest_first=True, requires=("q_len > 4096",), masks=(True,), lengths=True),
        replace(LONE, longest_first=True, requires=("q_len > 1024",), masks=(True,), lengths=True),
        replace(LONE, lengths=True),
        replace(LONE, lengths=True, ragged=True, sections=4, early=True),
        replace(LONE, longest_first=True, requires=("q_len > 1536",), masks=(True,), capped=True),
        replace(LONE, capped=True),
        Setting(128, 1, programs=2, maxnreg=128, masks=(True,), general=True),
        Setting(128, 1, programs=2, maxnreg=128, masks=(True,), general=True, capped=True),
    ),
    128: (
        Setting(64, 1, v_stages=3, programs=2, maxnreg=128, requires=("q_len <= 1024",), masks=(True,), two_parts=True),
        replace(LONG_96, requires=("q_len > 6144",)),
        replace(WIDE_96, requires=("q_len > 1536",)),
        Setting(
            128, 2, stages=3, v_stages=3, longest_first=True, masks=(True,), two_parts=True, threes=True, handed=True
        ),
        replace(SERIAL_96, requires=("q_len > 1536", "num_heads >= 16"), masks=(False,)),
        Setting(128, 2, stages=3, v_stages=3, masks=(False,), two_parts=True),
        Setting(64, 1, v_stages=3, programs=2, maxnreg=128, requires=("q_len <= 1024",), masks=(True,)),
        Setting(128, 2, v_stages=3, requires=("q_len <= 2048", "num_heads < 32"), masks=(True,)),
        replace(LAZY, handed=True, even=2, brief=True, halved=True, masks=(True,)),
        replace(WIDE_128, requires=("q_len >= 8192",)),
        replace(LAZY, masks=(False,)),
        Setting(128, 2, stages=3, v_stages=3, requires=("q_len > 64",), masks=(False,), two_parts=True, lengths=True),
        Setting(64, 1, v_stages=3, programs=2, maxnreg=128, requires=("q_len <= 1024",), masks=(True,), lengths=True),
        replace(LAZY, longest_first=True, requires=("q_len <= 4096",), masks=(True,), lengths=True),
        replace(WIDE_128, requires=("q_len >= 8192",), lengths=True),
        Setting(128, 2, v_stages=3, requires=("q_len > 64",), lengths=True),
        RAGGED,
        replace(LEVELS, requires=("q_len >= 1024", SERVED_CAP), masks=(False,)),
        replace(
            LEVELS, block_n=112, longest_first=True, handed=True, requires=("q_len >= 4096", SERVED_CAP), masks=(True,)
        ),
        Setting(128, 2, v_stages=3, requires=("q_len > 1024",), masks=(False,), capped=True, threes=True),
        replace(LONE_128, longest_first=True, requires=("q_len > 1536",), masks=(True,)),
        LONE_128,
        Setting(64, 1, v_stages=3, programs=2, maxnreg=128, masks=(True,), general=True),
        Setting(64, 1, v_stages=3, programs=2, rounds=2, maxnreg=128, masks=(True,), general=True, ragged=True),
        Setting(64, 1, v_stages=3, programs=2, maxnreg=128, masks=(True,), general=True, capped=True),
    ),
    256: (
        replace(WIDE_192, requires=("q_len > 384",), masks=(False,)),
        replace(WIDE_192, block_n=80, q_slots=2, apart=False, masks=(False,)),
        replace(LONG_192, requires=("q_len > 4096",)),
        replace(EVEN_192, requires=("q_len >= 1536",)),
        replace(LAZY_256, q_slots=2, masks=(True,), two_parts=True, threes=True),
        replace(LAZY_256, block_n=80, masks=(False,), threes=True),
        replace(EVEN_256, requires=("q_len >= 2048",)),
        replace(LAZY_256, v_stages=3, masks=(True,), threes=True),
        Setting(64, 2, two_parts=True, lazy=True, lengths=True),
        replace(LAZY_256, block_n=80, masks=(False,), threes=True, lengths=True, early=True, direct=True),
        Setting(64, 2, q_slots=1, masks=(True,), lazy=True, lengths=True, threes=True, apart=True, early=True),
        replace(RAGGED_256, masks=(False,), sections=2, direct=True),
        replace(RAGGED_256, masks=(True,), sections=2, producer_first=True, requires=("batch_size * 700 <= q_len",)),
        replace(RAGGED_256, masks=(True,), block_n=64, v_stages=3),
        replace(LEVELS_256, requires=("q_len >= 1024", SERVED_CAP), masks=(False,)),
        replace(LEVELS_256, longest_first=True, handed=True, requires=("q_len > 2048", SERVED_CAP), masks=(True,)),
        Setting(64, 2, q_slots=1, masks=(False,), capped=True),
        Setting(
            64, 2, v_stages=3, q_slots=1, longest_first=True, requires=("q_len > 2048",), masks=(True,), capped=True
        ),
        Setting(64, 2, v_stages=3, q_slots=1, masks=(True,), capped=True),
        Setting(64, 2, v_stages=3, q_slots=1, masks=(True,), general=True),
        Setting(64, 2, v_stages=3, q_slots=1, rounds=4, masks=(True,), general=True, ragged=True),
        Setting(64, 2, v_stages=3, q_slots=1, masks=(True,), general=True, capped=True),
    ),
}


# Keys of one block of decoding, by padded head size, and blocks in flight: 128 KiB of K and V, once an SM.
DECODE_BLOCKS: dict[int, tuple[int, int]] = {64: (128, 4), 128: (128, 2), 256: (64, 2)}
# The same where there are more key heads than multiprocessors: 64 KiB, of which an SM holds three. wgmma takes no less
# than 64 keys, which leaves out 256.
MANY_BLOCKS: dict[int, tuple[int, int]] = {64: (128, 2), 128: (64, 2)}
MANY_KEY_HEADS = 128
"""Up to so many have a multiprocessor each; more are of :data:`MANY_BLOCKS`, whatever the device."""
MANY_PROGRAMS = 3
"""Of these, at a time on a multiprocessor."""


SHARED_OF_SM = 227 * 1024
"""Bytes that the blocks of an SM share, each with 1 KiB more than it asks for (CUDA C Programming Guide, 9.0)."""


def variants(base: KernelSpec, padded: int, settings: Sequence[Setting] | None = None) -> tuple[KernelSpec, ...]:
    """The Hopper variants that go before the portable ones of a function.

    Args:
        base: a portable variant without hints: it lends its name, arguments and algorithm.
        padded: head size of its blocks.
        settings: by default those of :data:`SETTINGS`.

    Raises:
        SpecError: the settings do not fit the kernel.
    """
    dtype = dict(base.prototype)["Q"].removeprefix("*")
    if dtype not in DTYPES or padded not in HEAD_SIZES:
        return ()
    if settings is None:
        many = (_decode(base, padded, many=True),) if padded in MANY_BLOCKS else ()
        return (*many, _decode(base, padded), *variants(base, padded, SETTINGS[padded]))
    return tuple(_variant(base, padded, setting, causal) for setting in settings for causal in setting.masks)


def _decode(base: KernelSpec, padded: int, *, many: bool = False) -> KernelSpec:
    """One query a sequence. A cluster computes up to 8 heads that share a key head; few clusters are larger ones."""
    block_n, stages = (MANY_BLOCKS if many else DECODE_BLOCKS)[padded]
    heads = "num_kv_heads * cdiv(num_heads / num_kv_heads, 8)"
    clusters = f"max(1, batch_size * {heads})"
    ranks = f"1 + min(1, 64 / {clusters}) + 2 * min(1, 16 / {clusters}) + 4 * min(1, 8 / {clusters})"
    return KernelSpec(
        source=base.source.with_name(DECODE_KERNEL_FILE),
        kernel=DECODE_KERNEL,
        name=base.name,
        arguments=tuple(Argument(a.name, a.type, _decode_hint(a.name)) for a in base.arguments),
        constants=(("BLOCK_D", padded), ("BLOCK_N", block_n), ("WARPS", 4), ("STAGES", stages)),
        grid=f"{ranks}, {heads}, batch_size",
        num_warps=4,
        num_stages=1,
        archs=(ARCH,),
        cluster=True,
        # The limits: of the grid's y and z, and of keys whose weights in bf16 add up to less than 1.
        requires=(
            *("q_len == 1", "q_lengths == 0", "ragged == 0", "softcap == 0"),
            *("num_heads <= 65535", "batch_size <= 65535", "kv_len <= 8388608"),
            *((f"batch_size * num_kv_heads > {MANY_KEY_HEADS}",) if many else ()),
        ),
        nullable=base.nullable,
        descriptors=_descriptors(padded, block_n)[2:],
        algorithm_name=base.algorithm_name,
    )


def decodes(manifest: Function, algorithm: int, arch: str, values: Sequence[float]) -> bool:
    """Whether a launch of a production function is decoding in one launch.

    Args:
        manifest: of the function.
        algorithm: which.
        arch: whose code the device runs.
        values: of the arguments, pointers as integers.
    """
    return any(variant.kernel == DECODE_KERNEL for variant in serving(manifest, algorithm, arch, values)[:1])


def _decode_hint(name: str) -> int | None:
    return 16 if name == "Q" else 8 if name == "head_size" or name.startswith("q_stride_") else None


def _variant(base: KernelSpec, padded: int, setting: Setting, causal: bool) -> KernelSpec:
    if setting.consumers not in (1, 2, 3):
        raise SpecError(f"{base.name}: {setting.consumers} consumers: use 1, 2 or 3")
    width = padded // 4 if setting.two_parts else padded
    constants = (
        ("BLOCK_D", width),
        ("BLOCK_N", setting.block_n),
        ("CONSUMERS", setting.consumers),
        ("STAGES", setting.stages),
        ("V_STAGES", setting.v_stages),
        ("CAUSAL", causal),
        ("TWO_HEADS", causal and setting.two_heads),
        ("LONGEST_FIRST", causal and setting.longest_first),
        ("GENERAL", setting.general),
        ("RAGGED", setting.ragged),
        ("CAPPED", setting.capped),
        ("PING_PONG", setting.ping_pong and setting.consumers > 1),
        ("Q_SLOTS", setting.q_slots),
        ("CONSUMER_REGISTERS", setting.consumer_registers),
        ("PRODUCER_REGISTERS", setting.producer_registers),
        ("TWO_PARTS", setting.two_parts),
        ("LAZY", setting.lazy),
        ("SERIAL", setting.serial),
        ("PRODUCER_FIRST", setting.producer_first),
        ("LENGTHS", setting.lengths),
        *((("THREES", True),) if setting.threes else ()),
        *((("HANDED_ON", True),) if setting.handed else ()),
        *((("SECTIONS", setting.sections),) if setting.sections else ()),
        *(
            (name, True)
            for name in ("APART", "EARLY", "BRIEF", "HALVED", "DIRECT", "LEVELS")
            if getattr(setting, name.lower())
        ),
        *((("EVEN", setting.even),) if setting.even else ()),
    )
    row_tiles = f"cdiv(q_len, {setting.consumers * ROWS})"
    tiles = f"({row_tiles} + batch_size + 1) * num_heads" if setting.ragged else f"{row_tiles} * num_heads * batch_size"
    most = f"num_sms * {setting.programs * setting.rounds}"
    if causal and setting.programs > 1:  # a pair of tiles for each, rather than a tile, of which some are long
        most = f"min({most}, max(num_sms, cdiv({tiles}, 2)))"
    return KernelSpec(
        source=base.source.with_name(KERNEL_FILE),
        kernel=KERNEL,
        name=base.name,
        arguments=tuple(
            Argument(a.name, a.type, _out_hint(a.name, setting) if setting.ragged or setting.direct else None)
            for a in base.arguments
        ),
        constants=constants,
        # Programs are persistent: as many as the device holds at a time, or fewer where there are fewer tiles.
        grid=grid_of(tiles, row_tiles, most, longest_first=causal and setting.longest_first)
        if setting.programs
        else tiles,
        num_warps=4,
        num_stages=1,
        maxnreg=setting.maxnreg,
        archs=(ARCH,),
        requires=(*_served(causal, setting, padded), *setting.requires),
        nullable=base.nullable,
        descriptors=_descriptors(width, setting.block_n, "1" if setting.ragged else "batch_size"),
        algorithm_name=base.algorithm_name,
    )


def grid_of(tiles: str, row_tiles: str, most: str, *, longest_first: bool) -> str:
    """Where tiles come from the longest, one row of persistent programs, and more for each tile of the last section:
    two for each of SECTION_ROUNDS of the kernel's, or as many as two heads need."""
    programs = f"min({most}, {tiles})"
    return f"{programs}, 1 + max(4, cdiv({row_tiles} * 2, {most}))" if longest_first else programs


def _out_hint(name: str, setting: Setting) -> int | None:
    """Rows that TMA cannot store, or does not, go by 16 bytes."""
    strides = ("out_stride_h", "out_stride_s", *(("out_stride_b",) if setting.direct else ()))
    return 16 if name == "Out" else 8 if name in (*strides, "head_size") else None


def _served(causal: bool, setting: Setting, padded: int) -> Sequence[str]:
    softcap = ("softcap > 0", f"softcap <= {LARGEST_CAP}") if setting.capped else ("softcap == 0",)
    # TMA stores 16 bytes or nothing: of other head sizes up to 7 elements too many.
    always: tuple[str, ...] = (f"ragged == {int(setting.ragged)}", *softcap, "sm_scale > 0", "head_size % 8 == 0")
    if setting.two_parts:
        always = (*always, f"head_size <= {padded * 3 // 4}")
    lengths = (f"q_len <= {LONGEST}", f"kv_len <= {LONGEST}")
    windows = ("window_left == -1", f"window_right == {0 if causal else -1}")
    if setting.ragged:
        given = ("cu_seqlens_q != 0", "cu_seqlens_kv != 0", "batch_size >= 1")
        most = FEW_SEQUENCES if setting.lengths else MOST_SEQUENCES
        served = (*always, *given, f"batch_size <= {most}", f"num_heads <= {MOST_HEADS}", *lengths)
        return (*served, *windows) if setting.lengths else served
    if setting.general:
        return (*always, *lengths)
    if setting.lengths:
        return (*always, *lengths, *windows)
    return (*always, "q_lengths == 0", "kv_lengths == 0", *windows)


def _descriptors(padded: int, block_n: int, batches: str = "batch_size") -> tuple[Descriptor, ...]:
    unit = block_n & -block_n  # of blocks that are no power of two, see kernels/sm90_wide.py

    def tensor(name: str, base: str, heads: str, seq: str, rows: int) -> Descriptor:
        strides: tuple[int | str, ...] = (*(f"{name}_stride_{axis}" for axis in "bhs"), 1)
        width = min(padded, 64) if name in "kv" and unit != block_n else padded
        parts = block_n // unit if name in "kv" else 1
        return Descriptor(f"{name}_desc", base, (batches, heads, seq, "head_size"), strides, (1, 1, rows, width), parts)

    return (
        tensor("out", "Out", "num_heads", "q_len", ROWS),
        tensor("q", "Q", "num_heads", "q_len", ROWS),
        tensor("k", "K", "num_kv_heads", "kv_len", unit),
        tensor("v", "V", "num_kv_heads", "kv_len", unit),
    )
