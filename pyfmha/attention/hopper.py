"""The Hopper variants of the production functions: ``kernels/fmha_sm90.py``, by the settings of
:mod:`pyfmha.attention.hopper_settings`, and for one query a sequence ``kernels/fmha_decode_sm90.py``.

They serve what TMA can load and what most launches ask for, ragged batches and soft caps by variants of their own;
everything else falls through to the portable variants of the same function, as do ragged batches with windows up to
head size 64, where tiles are too short for what it takes to find them (kernels/NOTES.md).
"""

from collections.abc import Sequence

from pyfmha.attention.hopper_settings import SETTINGS, Setting
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
COPIED_KERNEL_FILE = "fmha_copied_sm90.py"  # of the same name, so that whoever asks need not know which
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

# Keys of one block of decoding, by padded head size, blocks in flight, and warps: 128 KiB of K and V, once an SM.
DECODE_BLOCKS: dict[int, tuple[int, int, int]] = {64: (128, 4, 4), 128: (128, 2, 8), 256: (64, 2, 4)}
# The same where there are more key heads than multiprocessors: 64 KiB, of which an SM holds three. wgmma takes no less
# than 64 keys, which leaves out 256.
MANY_BLOCKS: dict[int, tuple[int, int, int]] = {64: (128, 2, 4), 128: (64, 2, 4)}
COPIED = 128
"""The padded head size of which K and V are copied. At 64 and 256 that is faster, too, but for few long sequences: they
are read at 0.8 to 0.9 of what TMA gives."""
MANY_KEY_HEADS, MOST_KEY_HEADS = 128, 396
"""Up to so many have a multiprocessor each; more are of :data:`MANY_BLOCKS`, whatever the device. Where K and V are
copied, up to the latter: still more come in so many rounds that the last counts little."""
MANY_PROGRAMS = 3
"""Of these, at a time on a multiprocessor."""


SHARED_OF_SM = 227 * 1024
"""Bytes that the blocks of an SM share, each with 1 KiB more than it asks for (CUDA C Programming Guide, 9.0)."""


def variants(base: KernelSpec, padded: int, settings: Sequence[Setting] | None = None) -> tuple[KernelSpec, ...]:
    """The Hopper variants that go before the portable ones of a function.

    Args:
        base: a portable variant without hints: it lends its name, arguments and algorithm.
        padded: head size of its blocks.
        settings: by default those of :data:`pyfmha.attention.hopper_settings.SETTINGS`.

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
    block_n, stages, warps = (MANY_BLOCKS if many else DECODE_BLOCKS)[padded]
    heads = "num_kv_heads * cdiv(num_heads / num_kv_heads, 8)"
    copied = padded == COPIED
    clusters = f"max(1, batch_size * {heads})"
    ranks = f"1 + min(1, 64 / {clusters}) + 2 * min(1, 16 / {clusters}) + 4 * min(1, 8 / {clusters})"
    return KernelSpec(
        source=base.source.with_name(COPIED_KERNEL_FILE if copied else DECODE_KERNEL_FILE),
        kernel=DECODE_KERNEL,
        name=base.name,
        arguments=tuple(Argument(a.name, a.type, _decode_hint(a.name, copied)) for a in base.arguments),
        constants=(("BLOCK_D", padded), ("BLOCK_N", block_n), ("WARPS", warps), ("STAGES", stages)),
        grid=f"{ranks}, {heads}, batch_size",
        num_warps=warps,
        num_stages=1,
        archs=(ARCH,),
        cluster=True,
        # The limits: of the grid's y and z, and of keys whose weights in bf16 add up to less than 1.
        requires=(
            *("q_len == 1", "q_lengths == 0", "ragged == 0", "softcap == 0"),
            *("num_heads <= 65535", "batch_size <= 65535", "kv_len <= 8388608"),
            *((f"batch_size * num_kv_heads > {MANY_KEY_HEADS}",) if many else ()),
            *((f"batch_size * num_kv_heads <= {MOST_KEY_HEADS}",) if many and copied else ()),
        ),
        nullable=base.nullable,
        descriptors=() if copied else _descriptors(padded, block_n)[2:],
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


def _decode_hint(name: str, copied: bool) -> int | None:
    """The queries are loaded by 16 bytes, and what is copied."""
    loaded = "QKV" if copied else "Q"
    strides = tuple(f"{tensor.lower()}_stride_" for tensor in loaded)
    return 16 if name in loaded else 8 if name == "head_size" or name.startswith(strides) else None


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
            for name in ("APART", "EARLY", "BRIEF", "HALVED", "DIRECT", "LEVELS", "FINDER")
            if getattr(setting, name.lower())
        ),
        *((("EVEN", setting.even),) if setting.even else ()),
        *((("PAIRED", True),) if setting.paired else ()),
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
