"""How the Hopper kernel of the production functions is cut, ``kernels/fmha_sm90.py``: its settings by head size, which
:mod:`pyfmha.attention.hopper` makes variants of."""

from dataclasses import dataclass, replace


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
            for a kernel that is handed, or ragged, and not longest_first. 0 for another order.
        paired: of even, whether tiles go in pairs of one head where these are as many for each program; not ragged.
        brief: whether ends of tiles take fewer instructions, as the kernel says; not for lengths.
        halved: whether half a first block is multiplied where rows see no more of it; of 128 keys, for several
            consumers that serve neither lengths nor soft caps.
        direct: whether Out is stored from registers, as kernels/sm90_direct.py does; for one part, and not apart.
        levels: whether soft caps go the same way in all warps of a program, as kernels/sm90_capped.py has it; neither
            general, ragged nor for lengths.
        finder: whether a warp of its own looks for the tiles of a ragged batch; of one or two consumers, and not
            producer_first.
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
    paired: bool = False
    brief: bool = False
    halved: bool = False
    direct: bool = False
    levels: bool = False
    finder: bool = False


EVEN_64 = Setting(64, 1, programs=2, maxnreg=128, handed=True, even=2, brief=True, masks=(True,))
"""Of 64 keys a step, of which short causal tiles mask less."""

THREE_CONSUMERS = Setting(128, 3, maxnreg=128, consumer_registers=160, producer_registers=32)
"""Of head size 64: 192 queries a tile."""

LONE = Setting(128, 1, programs=2, maxnreg=128, threes=True)
"""Of head size 64: two programs on a multiprocessor."""
EVEN_LONE = replace(LONE, handed=True, even=2, brief=True, masks=(True,))

LAZY = Setting(128, 2, v_stages=3, ping_pong=False, lazy=True, producer_first=True, threes=True)
"""Of head size 128: 410 instructions a step, of which 64 less are executed where no row grows."""

WIDE_128 = replace(LAZY, block_n=176, v_stages=2, q_slots=1, ping_pong=True, masks=(False,))
"""Of head size 128: 658 instructions a step of 176 keys, of which 64 less are executed where no row grows."""

LEVELS = replace(LAZY, producer_first=False, threes=False, capped=True, levels=True)
"""Of head size 128, soft caps from SERVED_CAP on, for which kernels/sm90_capped.py has two polynomials."""
SERVED_CAP = "softcap >= 45"
EVEN_LEVELS = replace(LEVELS, handed=True, even=2, brief=True, masks=(True,))

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

RAGGED = replace(
    LAZY,
    consumer_registers=232,
    producer_registers=40,
    producer_first=False,
    ping_pong=True,
    lengths=True,
    ragged=True,
    early=True,
    finder=True,
)
"""Of head size 128: a warp that looks for tiles has registers for that."""
RAGGED_256 = replace(RAGGED, block_n=80, v_stages=2, q_slots=1)
RAGGED_64 = replace(LONE, lengths=True, ragged=True, early=True)

# By padded head size, in the order in which they are tried; kernels/NOTES.md has the times. One consumer leaves room
# for a second program on the multiprocessor: each hides where the other starts and ends. Several consumers take turns
# at the tensor cores, and share what is loaded: the longer the sequences, the more that counts.
SETTINGS: dict[int, tuple[Setting, ...]] = {
    64: (
        replace(EVEN_64, requires=("q_len <= 384",)),
        replace(THREE_CONSUMERS, requires=("q_len > 512",), masks=(False,), threes=True),
        replace(
            THREE_CONSUMERS, handed=True, even=4, brief=True, halved=True, requires=("q_len > 4096",), masks=(True,)
        ),
        EVEN_LONE,
        Setting(128, 1, programs=2, maxnreg=128, masks=(False,)),
        replace(THREE_CONSUMERS, requires=("q_len > 512",), masks=(False,), lengths=True, threes=True),
        replace(LONE, masks=(False,), lengths=True),
        replace(EVEN_LONE, brief=False, lengths=True),
        replace(RAGGED_64, sections=4, masks=(False,)),
        replace(RAGGED_64, even=4, masks=(True,)),
        replace(EVEN_LONE, capped=True),
        replace(LONE, masks=(False,), capped=True),
        Setting(128, 1, programs=2, maxnreg=128, masks=(True,), general=True),
        Setting(128, 1, programs=2, maxnreg=128, masks=(True,), general=True, capped=True),
    ),
    128: (
        replace(EVEN_64, v_stages=3, requires=("q_len <= 1024",), two_parts=True),
        WIDE_96,
        replace(SERIAL_96, requires=("q_len > 1536", "num_heads >= 16"), masks=(False,)),
        Setting(128, 2, stages=3, v_stages=3, masks=(False,), two_parts=True),
        replace(EVEN_64, v_stages=3, requires=("q_len <= 1024",), paired=True),
        replace(LAZY, handed=True, even=2, brief=True, halved=True, masks=(True,)),
        replace(WIDE_128, requires=("q_len >= 8192",)),
        replace(LAZY, masks=(False,)),
        Setting(128, 2, stages=3, v_stages=3, requires=("q_len > 64",), masks=(False,), two_parts=True, lengths=True),
        replace(EVEN_64, v_stages=3, requires=("q_len <= 1024",), paired=True, brief=False, lengths=True),
        replace(LAZY, longest_first=True, masks=(True,), lengths=True),
        replace(WIDE_128, requires=("q_len >= 8192",), lengths=True),
        Setting(128, 2, v_stages=3, requires=("q_len > 64",), masks=(False,), lengths=True),
        replace(RAGGED, masks=(False,)),
        replace(RAGGED, even=4, masks=(True,)),
        replace(LEVELS, requires=("q_len >= 512", SERVED_CAP), masks=(False,)),
        replace(EVEN_LEVELS, requires=("q_len >= 2048", SERVED_CAP)),
        replace(EVEN_64, v_stages=3, capped=True),
        Setting(64, 1, v_stages=3, programs=2, maxnreg=128, masks=(True,), general=True),
        Setting(64, 1, v_stages=3, programs=2, rounds=2, maxnreg=128, masks=(True,), general=True, ragged=True),
        Setting(64, 1, v_stages=3, programs=2, maxnreg=128, masks=(True,), general=True, capped=True),
    ),
    256: (
        replace(WIDE_192, masks=(False,)),
        replace(LONG_192, requires=("q_len > 6144",)),
        replace(EVEN_192, requires=("q_len >= 1536",)),
        replace(EVEN_192, block_n=64, q_slots=2, apart=False, paired=True),
        replace(LAZY_256, block_n=80, masks=(False,), threes=True),
        replace(EVEN_256, requires=("q_len >= 2048",)),
        replace(EVEN_256, v_stages=3, apart=False, paired=True),
        Setting(64, 2, two_parts=True, lazy=True, masks=(False,), lengths=True),
        Setting(64, 2, two_parts=True, lazy=True, handed=True, even=2, paired=True, masks=(True,), lengths=True),
        replace(LAZY_256, block_n=80, masks=(False,), threes=True, lengths=True, early=True, direct=True),
        replace(EVEN_256, producer_first=False, early=True, paired=True, brief=False, lengths=True),
        replace(RAGGED_256, masks=(False,), sections=2, direct=True),
        replace(RAGGED_256, even=4, requires=("batch_size * 700 <= q_len",), masks=(True,)),
        replace(RAGGED_256, block_n=64, v_stages=3, masks=(True,)),
        replace(LEVELS_256, requires=(SERVED_CAP,), masks=(False,)),
        replace(LEVELS_256, handed=True, even=2, brief=True, requires=("q_len >= 1536", SERVED_CAP), masks=(True,)),
        Setting(64, 2, v_stages=3, q_slots=1, handed=True, even=2, brief=True, masks=(True,), capped=True),
        Setting(64, 2, v_stages=3, q_slots=1, masks=(True,), general=True),
        Setting(64, 2, v_stages=3, q_slots=1, rounds=4, masks=(True,), general=True, ragged=True),
        Setting(64, 2, v_stages=3, q_slots=1, masks=(True,), general=True, capped=True),
    ),
}
