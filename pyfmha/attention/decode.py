"""The two functions of decoding: ``fmha_split_d128_fp16`` and ``fmha_combine_d128_fp16``, and when they pay.

Attention of few queries over many keys is split over the keys, see ``kernels/fmha_decode.py``. Both functions take the
same arguments, so that one :class:`Decoding` describes both launches. On Hopper ``fmha_fwd_*`` itself decodes most of
what has one query a sequence, in one launch, see ``kernels/fmha_decode_sm90.py`` and ``kernels/fmha_copied_sm90.py``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pyfmha.attention import forward
from pyfmha.attention.first import DTYPES
from pyfmha.attention.forward import Call, Forward
from pyfmha.attention.hopper import ARCH, COPIED, MANY_BLOCKS, MANY_KEY_HEADS, MANY_PROGRAMS, MOST_KEY_HEADS
from pyfmha.attention.tiles import TUNED_ARCHS, Tile
from pyfmha.spec.abi import ELEMENT_SIZES
from pyfmha.spec.arch import ARCHS
from pyfmha.spec.constants import Constant
from pyfmha.spec.kernel import DEPENDENT_CAPABILITY, Argument, KernelSpec, Tuning

HEAD_SIZES = (64, 128, 256)
"""Padded head sizes: a function serves every head size up to its own."""

KERNEL_FILE = "fmha_decode.py"
SPLIT_KERNEL = "fused_attention_split"
COMBINE_KERNEL = "fused_attention_combine"

WORKSPACE = {"cu_seqlens_q": "Partial", "cu_seqlens_kv": "Statistics"}
"""What stands in the place of a ragged batch's arrays."""

ARGUMENTS: tuple[tuple[str, str], ...] = tuple(
    (WORKSPACE.get(name, "splits" if name == "ragged" else name), "*fp32" if name in WORKSPACE else kind)
    for name, kind in forward.ARGUMENTS
)
"""Those of :data:`pyfmha.attention.forward.ARGUMENTS`, with the workspace for the ragged batch's arrays and ``splits``
last."""

SPLIT_NULLABLE = ("Out if splits != 1", "Lse", "q_lengths", "kv_lengths", "K if kv_len == 0", "V if kv_len == 0")
COMBINE_NULLABLE = ("Lse", "Q", "K", "V", "q_lengths", "kv_lengths")
"""The pointers that may be 0: what the other launch uses, what was not asked for or not given, empty tensors."""

MOST_QUERIES = 64
"""Queries that share a key head, up to which splitting pays: four tiles of the 16 rows of a tensor core."""

LEAST_KEYS = 512
"""Keys from which on splitting pays; below, the second launch costs more than is gained."""

KEYS_OF_SPLIT = 128
"""The fewest keys worth a program of their own."""


@dataclass(frozen=True)
class Rates:
    """What tells which is the faster, one launch of ``fmha_fwd_*`` or the pair; bytes/us, measured on an H200.

    Attributes:
        program: of one launch, which a multiprocessor has one of at a time, a program reads at most so much.
        many: each, where it has three.
        multiprocessor: each of one launch, where all have programs.
        split: a program of the pair, of which a multiprocessor has two, or three of some.
        three: such three together.
        second_ns: what the second launch takes longer, where there are parts to combine; nanoseconds.
    """

    program: int
    many: int
    multiprocessor: int
    split: int
    three: int
    second_ns: int


FETCHING = Rates(70_000, 30_000, 30_000, 24_000, 39_000, 5_000)
"""Of one launch that has TMA fetch K and V."""

COPYING = Rates(55_000, 27_000, 35_000, 22_000, 31_000, 8_000)
"""Of one that copies them."""

READ_PERCENT = 88
EVEN_PERCENT, UNEVEN_PERCENT = 84, 95
"""All programs together read at most 88 % of what the memory's clock and width allow; many that copy 95 % of it, where
they fill less than 84 % of as many rounds of multiprocessors as some have programs. Programs come in waves, of which
the last may be short: that tells which of both is the faster in the problems measured on an H200 (16 bits, head sizes
64, 128 and 256; kernels/NOTES.md) to some 2 %."""

PROGRAMS = 264
"""Programs to aim at: two for each of an H100's 132 multiprocessors, which hide each other's start and end. The same on
every device, so that the workspace that an engine is built with will do wherever it runs, and results do not change."""

WORKSPACE_RULE = 1
"""The number of :func:`most_workspace_bytes` together with :func:`decoding_for`. An engine keeps what the former said
when it was built, so a change after which the latter may ask for more than that, takes the next number: engines of
another number do not decode. The former does not ask whether one launch does it, nor on which device: which of both is
launched may change without a new number, and may differ from device to device."""

ALIGNMENT = 16
"""Bytes, of each part of the workspace: what the hinted variants ask of a pointer."""

# 16 rows are the least that tensor cores take. A block of K and one of V fill 32 KiB; three in flight, in two programs
# an SM, are several times what the latency of memory needs, and fit the shared memory of every architecture served.
_BLOCK_BYTES = 16 * 1024
ROWS = 16
"""Of a tile."""

PARTS_AT_A_TIME = 32
"""Parts that the second launch loads together. Most problems have no more, so that they wait for memory once."""


@dataclass(frozen=True)
class Decode:
    """One pair of functions of the family.

    Attributes:
        dtype: of Q, K, V and Out: ``"fp16"``, ``"bf16"`` or ``"fp32"``.
        head_size: 1 to 256. The functions are those for the next padded size.

    Raises:
        SpecError: on creation, for functions that do not exist.
    """

    dtype: str
    head_size: int

    def __post_init__(self) -> None:
        forward = Forward(self.dtype, self.head_size)  # the same dtypes and head sizes
        object.__setattr__(self, "dtype", forward.dtype)

    @property
    def padded(self) -> int:
        """The head size that blocks are cut for: 64, 128 or 256."""
        return next(size for size in HEAD_SIZES if size >= self.head_size)

    def names(self, splits: int) -> tuple[str, ...]:
        """The C functions of so many parts: of one there is nothing to combine."""
        return (self.split_name, self.combine_name)[: min(splits, 2)]

    @property
    def split_name(self) -> str:
        """The C function that is launched first."""
        return f"fmha_split_d{self.padded}_{self.dtype}"

    @property
    def combine_name(self) -> str:
        """The C function that is launched second."""
        return f"fmha_combine_d{self.padded}_{self.dtype}"

    def specs(self) -> tuple[KernelSpec, ...]:
        """What to compile: the split of aligned tensors, for many key heads and others, and of any; what combines."""
        return (
            *((self._many(),) if self.dtype != "fp32" and self.padded in MANY_BLOCKS else ()),
            self._split(self.tile(), hinted=True),
            self._split(Tile(ROWS, 16, self.tile().num_warps, 1), hinted=False),
            self._combine(),
        )

    def tile(self) -> Tile:
        """How the first launch is cut."""
        # Three products of tf32 for one of fp32 hold their operands three times: with 4 warps they would spill.
        warps = 8 if self.dtype == "fp32" and self.padded > HEAD_SIZES[0] else 4
        return Tile(ROWS, _BLOCK_BYTES // (self.padded * ELEMENT_SIZES[self.dtype]), warps, 3)

    def _many(self) -> KernelSpec:
        """On Hopper, with more programs than three a multiprocessor: a block more in flight leaves room for two, whose
        last wave is not as short."""
        made = self._split(replace(self.tile(), num_stages=self.tile().num_stages + 1), hinted=True)
        condition = f"batch_size * num_kv_heads > {MOST_KEY_HEADS}"
        tunings = tuple(tuning for tuning in made.tunings if tuning.arch == ARCH)
        return replace(made, archs=(ARCH,), tunings=tunings, requires=(condition,))

    def _split(self, tile: Tile, *, hinted: bool) -> KernelSpec:
        heads = "batch_size * num_kv_heads"
        constants = (
            ("BLOCK_M", tile.block_m),
            ("BLOCK_D", self.padded),
            ("BLOCK_N", tile.block_n),
            ("PRECISION", "tf32x3"),
            ("PREFETCH", 0),
            ("PDL", False),
        )
        # What the loop starts with; a power of two.
        prefetch = 1 << (tile.block_n * (tile.num_stages - 1)).bit_length() - 1 if hinted else 0
        return KernelSpec(
            source=forward.kernel_path().with_name(KERNEL_FILE),
            kernel=SPLIT_KERNEL,
            name=self.split_name,
            arguments=self._arguments(hinted=hinted),
            constants=constants,
            grid=f"splits * cdiv(q_len * (num_heads / num_kv_heads), BLOCK_M), min({heads}, 65535),"
            f" cdiv({heads}, 65535)",
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            tunings=_tunings(tile.num_warps, tile.num_stages, PREFETCH=prefetch, PDL=True),
            algorithm_name="default",
            nullable=SPLIT_NULLABLE,
        )

    def _combine(self) -> KernelSpec:
        warps = 8 if self.padded == HEAD_SIZES[-1] else 4
        return KernelSpec(
            source=forward.kernel_path().with_name(KERNEL_FILE),
            kernel=COMBINE_KERNEL,
            name=self.combine_name,
            arguments=self._arguments(hinted=False),
            constants=(("BLOCK_D", self.padded), ("SPLITS", PARTS_AT_A_TIME), ("PDL", False)),
            grid="batch_size * num_heads * q_len",
            num_warps=warps,
            num_stages=1,
            tunings=_tunings(warps, 1, PDL=True),
            algorithm_name="default",
            programmatic_dependent_launch=True,
            nullable=COMBINE_NULLABLE,
        )

    def _arguments(self, *, hinted: bool) -> tuple[Argument, ...]:
        return tuple(
            Argument(name, kind.replace("T", self.dtype), _hint(name, kind) if hinted else None)
            for name, kind in ARGUMENTS
        )


def _tunings(num_warps: int, num_stages: int, **constants: Constant) -> tuple[Tuning, ...]:
    """The same warps and stages, with constants for the architectures that have programmatic dependent launch."""
    able = [name for name in TUNED_ARCHS if ARCHS[name].capability >= DEPENDENT_CAPABILITY]
    return tuple(Tuning(name, tuple(constants.items()), num_warps, num_stages) for name in able)


def _hint(name: str, kind: str) -> int | None:
    return ALIGNMENT if name == "Partial" else forward.hint(name, kind)


def decode_family(dtypes: Sequence[str] = DTYPES, head_sizes: Sequence[int] = HEAD_SIZES) -> list[Decode]:
    """The pairs of functions that serve some dtypes and head sizes, each once.

    Raises:
        SpecError: a dtype or head size is not served.
    """
    found = {}
    for dtype in dtypes:
        for head_size in head_sizes:
            pair = Decode(dtype, Decode(dtype, head_size).padded)
            found[pair.split_name] = pair
    return list(found.values())


@dataclass(frozen=True)
class Decoding:
    """Both launches, but for their pointers.

    Attributes:
        call: the attention; not ragged.
        padded: head size of the functions.
        splits: parts of the keys.
    """

    call: Call
    padded: int
    splits: int

    @property
    def queries(self) -> int:
        """All queries of all heads and sequences."""
        return self.call.batch_size * self.call.num_heads * self.call.q_len

    @property
    def partial_bytes(self) -> int:
        """Bytes of Partial."""
        return 4 * self.splits * self.queries * self.padded

    @property
    def statistics_bytes(self) -> int:
        """Bytes of Statistics."""
        return 4 * (2 * self.splits + 1) * self.queries

    def scalars(self) -> tuple[int | float, ...]:
        """Everything that follows the nine pointers, in the order of :data:`ARGUMENTS`."""
        return (*self.call.scalars()[:-1], self.splits)


@dataclass(frozen=True)
class Figures:
    """What a device's driver says of it.

    Attributes:
        multiprocessors: their number.
        memory_clock: kHz; two bits a line are moved each time. 0 where the driver does not tell.
        memory_bus: lines, the width in bits.
    """

    multiprocessors: int
    memory_clock: int
    memory_bus: int

    @property
    def memory_rate(self) -> int:
        """Bytes a microsecond that a kernel reads."""
        return self.memory_clock * self.memory_bus // 4000 * READ_PERCENT // 100


def decoding_for(call: Call, *, in_one: Figures | None = None) -> Decoding | None:
    """How to split a problem; None where :mod:`pyfmha.attention.forward` serves better.

    Args:
        call: the problem.
        in_one: the figures of the device, where ``fmha_fwd_*`` decodes it in one launch there, see
            :func:`pyfmha.attention.hopper.decodes`.

    Raises:
        SpecError: the head size is not served.
    """
    splits = splits_of(call)
    if splits is None or (in_one is not None and one_launch_pays(call, in_one)):
        return None
    return Decoding(call, Decode("fp16", call.head_size).padded, splits)


def splits_of(call: Call) -> int | None:
    """Into how many parts the keys of a problem are split; None where they are not."""
    queries = call.q_len * (call.num_heads // call.num_kv_heads)
    if call.ragged or not 0 < queries <= MOST_QUERIES or call.kv_len < LEAST_KEYS or not call.batch_size:
        return None
    programs = call.batch_size * call.num_kv_heads * -(-queries // ROWS)
    return min(max(PROGRAMS // programs, 1), -(-call.kv_len // KEYS_OF_SPLIT))


def one_launch_pays(call: Call, device: Figures) -> bool:
    """Whether a device decodes a problem, which ``fmha_fwd_*`` decodes in one launch, faster so than as a pair."""
    group = call.num_heads // call.num_kv_heads
    key_heads = call.batch_size * call.num_kv_heads
    clusters = key_heads * -(-group // 8)
    ranks = 8 if clusters <= 8 else 4 if clusters <= 16 else 2 if clusters <= 64 else 1  # as the launch has them
    splits = splits_of(call) or 1
    programs = key_heads * -(-call.q_len * group // ROWS) * splits
    read = call.kv_len * 4 * call.head_size  # K and V of 16 bits, of one key head
    memory, multiprocessors = device.memory_rate, device.multiprocessors
    padded = Decode("fp16", call.head_size).padded
    copied, few = padded == COPIED, key_heads <= MOST_KEY_HEADS
    if memory <= 0 or multiprocessors <= 0 or (copied and not few):  # more come in rounds that do not end together
        return True
    rates = COPYING if copied else FETCHING
    many = key_heads > MANY_KEY_HEADS and padded in MANY_BLOCKS and (few or not copied)
    at_once, rate = (MANY_PROGRAMS * multiprocessors, rates.many) if many else (multiprocessors, rates.program)
    even = 100 * key_heads >= EVEN_PERCENT * -(-key_heads // multiprocessors) * multiprocessors
    together = memory * UNEVEN_PERCENT // 100 if copied and many and not even else memory
    together = min(together, rates.multiprocessor * multiprocessors)
    one = _waves_ns(key_heads * ranks, at_once, read // ranks, rate, together)
    three = many and few
    pair = _waves_ns(programs, (3 if three else 2) * multiprocessors, read // splits, rates.split, memory)
    if three and programs > 2 * multiprocessors:  # some have three
        pair = max(pair, 1000 * MANY_PROGRAMS * read // rates.three)
    return one <= pair + (rates.second_ns if splits > 1 else 0)


def _waves_ns(programs: int, at_once: int, read: int, rate: int, together: int) -> int:
    """What programs take that read so many bytes each, one at such a rate and all at once at most `together`."""
    full = programs // at_once * at_once
    last = programs - full
    in_full = 1000 * read * full // min(together, rate * at_once)
    return in_full + (1000 * read * last // min(together, rate * last) if last else 0)


def most_workspace_bytes(batch_size: int, num_heads: int, q_len: int, head_size: int) -> int:
    """Bytes of Partial and Statistics that suffice for every problem of up to these sizes.

    Fewer queries are split more often, so the largest problem may not be the one that needs most. But each program
    writes at most a tile of rows, and where there are more programs than aimed at, nothing is split.
    """
    most_queries = min(q_len, MOST_QUERIES)
    rows = max(PROGRAMS * ROWS, batch_size * num_heads * most_queries)
    padded = Decode("fp16", head_size).padded
    return 4 * rows * padded + 4 * 3 * rows + ALIGNMENT
