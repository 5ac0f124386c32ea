"""Attention of e4m3 on Hopper: ``fmha_fp8_d64_bf16`` and its kin, see ``kernels/fmha_fp8_sm90.py``.

Q, K and V are of e4m3 (float8_e4m3fn), with a factor each for all or for every head of keys; Out is of fp16 or bf16,
which the functions are named for. There are variants for sm_90 alone, and no generic one: a call that none serves is
refused, and says what each wanted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from pyfmha.attention import forward
from pyfmha.attention.forward import Call, check_range
from pyfmha.attention.hopper import ARCH, LONGEST, MOST_HEADS, MOST_SEQUENCES, ROWS, SHARED_OF_SM
from pyfmha.errors import SpecError
from pyfmha.spec.descriptors import Descriptor
from pyfmha.spec.kernel import Argument, KernelSpec
from pyfmha.spec.words import dtype_name, one_of

KERNEL = "fmha_fp8_sm90"
KERNEL_FILE = "fmha_fp8_sm90.py"
DTYPES = ("fp16", "bf16")
"""Of Out."""
HEAD_SIZES = (64, 128, 256)
"""Padded head sizes: a function serves every multiple of 16 up to its own."""

DESCALES = ("q_descale", "k_descale", "v_descale")
_STRIDES = tuple((f"{name}_stride_{axis}", "i64") for name in DESCALES for axis in "bh")
_AFTER = {"V": tuple((name, "*fp32") for name in DESCALES), "out_stride_s": _STRIDES}
ARGUMENTS: tuple[tuple[str, str], ...] = tuple(
    argument
    for name, kind in forward.ARGUMENTS
    for argument in ((name, "*fp8e4nv" if name in ("Q", "K", "V") else kind), *_AFTER.get(name, ()))
)
"""Those of :data:`pyfmha.attention.forward.ARGUMENTS`, with the factors and their strides among them; ``*T`` is a
pointer to Out's dtype."""

NULLABLE = (*forward.NULLABLE, *DESCALES)
"""The pointers that may be 0: those of the production functions, and factors that are 1."""

POINTERS = tuple(name for name, kind in ARGUMENTS if kind.startswith("*"))
"""The arguments that are pointers: they come first."""


@dataclass(frozen=True)
class Setting:
    """How the kernel is cut.

    Attributes:
        block_n: keys of one step.
        consumers: warpgroups that compute, 2 or 3, of 64 queries each.
        stages, raw, v_stages: blocks in flight of K, of V, and of V transposed.
        q_slots: 2 to load the queries of the next tile while one is computed, or 1.
        ping_pong: whether consumers take turns at the tensor cores.
        maxnreg: registers a thread at the launch; consumers and producer share them out anew.
        consumer_registers, producer_registers: what each then has.
        longest_first: causal tiles from the longest, the last of them one a program, instead of pairs.
        ahead: whether scores are a block ahead of their exponentials; then without turns, and `stages` and `v_stages`
            are the same, at least 3.
        lazy: whether products of the sums are left out where no row of a warp has grown; so with `ahead`, too.
        producer_first: whether the producer is the first partition.
        threes: whether maxima are taken of three scores at a time, as kernels/sm90_maxima.py does.
        by_warps: whether each warp of a consumer waits and gives back by itself, without barriers of all four.
        even: causal tiles from the longest, in sections of so many rounds, from which all programs get as much to do,
            and whose places the producer hands on. 0 for another order.
        aligned: whether only the first block of a consumer is masked, as where masks go by 64 keys, as blocks do.
        halved: whether a consumer whose rows see but 64 keys of its first block multiplies those alone; if aligned.
        masks: with which values of CAUSAL it is compiled.
        general: whether it serves lengths.
        ragged: whether it serves ragged batches, and those alone; it is general, too.
        requires: conditions beyond those of the kernel, where another setting serves better.
    """

    block_n: int
    consumers: int
    stages: int = 2
    raw: int = 2
    v_stages: int = 2
    q_slots: int = 2
    ping_pong: bool = True
    maxnreg: int = 168
    consumer_registers: int = 232
    producer_registers: int = 40
    longest_first: bool = False
    ahead: bool = False
    lazy: bool = False
    producer_first: bool = False
    threes: bool = False
    by_warps: bool = False
    even: int = 0
    aligned: bool = False
    halved: bool = False
    masks: tuple[bool, ...] = (False, True)
    general: bool = False
    ragged: bool = False
    requires: tuple[str, ...] = ()


# More registers for the consumers of head size 256: with 232 ptxas serialises each wgmma of a causal kernel, and what
# it spills costs half of the speed.
_WIDE = Setting(128, 2, raw=1, consumer_registers=240, producer_registers=24)
_BASE: dict[int, Setting] = {
    64: Setting(128, 3, maxnreg=128, consumer_registers=160, producer_registers=32),
    128: Setting(128, 2),
    256: _WIDE,
}


# Of long dense batches without lengths: blocks that are no power of two (kernels/fp8_wide.py), no barrier in the loop
# of a consumer, and three blocks of V transposed, so that consumers need not keep step.
_PARTS = replace(_WIDE, block_n=192, raw=2, v_stages=3, ping_pong=False, lazy=True, threes=True, by_warps=True)
_FIRST_WIDE = replace(_WIDE, producer_first=True, threes=True)
_LONG_WIDE = replace(_FIRST_WIDE, by_warps=True, lazy=True, ping_pong=False)
# Where all queries see the keys up to their own: a loop without masks, as full attention has it.
_SQUARE = ("q_len > 1024", "q_len == kv_len")
_EVEN = replace(_PARTS, even=2, aligned=True, halved=True, requires=_SQUARE, masks=(True,))
# Three blocks of V transposed, or of K, in the room of the queries of the next tile.
_DEEP_WIDE = replace(_LONG_WIDE, q_slots=1)
_EVEN_WIDE = replace(_DEEP_WIDE, stages=3, even=2, aligned=True, halved=True, requires=_SQUARE, masks=(True,))
_WARPS = replace(_BASE[64], by_warps=True, lazy=True, threes=True, ping_pong=False)
# Of dense batches without lengths, in the order in which they are tried; kernels/NOTES.md has the times.
_DENSE: dict[int, tuple[Setting, ...]] = {
    64: (
        replace(_WARPS, requires=("q_len > 2048", "kv_len > 2048"), masks=(False,)),
        replace(_BASE[64], masks=(False,)),
        replace(_WARPS, even=2, aligned=True, requires=_SQUARE, masks=(True,)),
        replace(_BASE[64], ping_pong=False, longest_first=True, requires=("q_len > 1024",), masks=(True,)),
    ),
    128: (
        replace(_PARTS, raw=1, requires=("q_len > 1024", "kv_len > 1024"), masks=(False,)),
        replace(_BASE[128], masks=(False,)),
        _EVEN,
        replace(_PARTS, block_n=160, even=2, requires=("q_len > 1024",), masks=(True,)),
    ),
    256: (
        replace(_DEEP_WIDE, v_stages=3, requires=("q_len > 1024", "kv_len > 1024"), masks=(False,)),
        replace(_FIRST_WIDE, masks=(False,)),
        _EVEN_WIDE,
        replace(_FIRST_WIDE, lazy=True, longest_first=True, requires=("q_len > 1024",), masks=(True,)),
    ),
}


def settings(padded: int) -> tuple[Setting, ...]:
    """The settings of a padded head size, in the order in which they are tried."""
    base = _BASE[padded]
    return (
        *_DENSE[padded],
        replace(base, masks=(True,)),
        replace(base, masks=(True,), general=True),
        replace(base, masks=(True,), general=True, ragged=True),
    )


@dataclass(frozen=True)
class Fp8:
    """One function of the family.

    Attributes:
        dtype: of Out: ``"fp16"`` or ``"bf16"``.
        head_size: 1 to 256. The function is the one for the next padded size.

    Raises:
        SpecError: on creation, for a function that does not exist.
    """

    dtype: str
    head_size: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        if self.dtype not in DTYPES:
            raise SpecError(f"Out of fp8 attention cannot be {self.dtype!r}: {one_of(DTYPES, self.dtype)}")
        check_range("head size", self.head_size, 1, HEAD_SIZES[-1])

    @property
    def padded(self) -> int:
        """The head size that blocks are cut for: 64, 128 or 256."""
        return next(size for size in HEAD_SIZES if size >= self.head_size)

    @property
    def name(self) -> str:
        """The C function: ``fmha_fp8_d64_bf16``."""
        return f"fmha_fp8_d{self.padded}_{self.dtype}"

    def specs(self) -> tuple[KernelSpec, ...]:
        """What to compile, in the order in which the launcher tries them."""
        return tuple(self.spec(setting, causal) for setting in settings(self.padded) for causal in setting.masks)

    def spec(self, setting: Setting, causal: bool) -> KernelSpec:
        """One variant."""
        padded = self.padded
        constants = (
            ("BLOCK_D", padded),
            ("BLOCK_N", setting.block_n),
            ("CONSUMERS", setting.consumers),
            ("STAGES", setting.stages),
            ("V_STAGES", setting.v_stages),
            ("RAW", setting.raw),
            ("CAUSAL", causal),
            ("LONGEST_FIRST", causal and setting.longest_first),
            ("GENERAL", setting.general),
            ("RAGGED", setting.ragged),
            ("PING_PONG", setting.ping_pong),
            ("Q_SLOTS", setting.q_slots),
            ("CONSUMER_REGISTERS", setting.consumer_registers),
            ("PRODUCER_REGISTERS", setting.producer_registers),
            ("AHEAD", setting.ahead),
            *(
                (name, True)
                for name in ("LAZY", "PRODUCER_FIRST", "THREES", "BY_WARPS", "ALIGNED", "HALVED")
                if getattr(setting, name.lower())
            ),
            *((("EVEN", setting.even),) if setting.even else ()),
        )
        row_tiles = f"cdiv(q_len, {setting.consumers * ROWS})"
        heads = "num_heads" if setting.ragged else "num_heads * batch_size"
        tiles = f"({row_tiles} + batch_size + 1) * {heads}" if setting.ragged else f"{row_tiles} * {heads}"
        grid = f"min(num_sms, {tiles})"
        if causal and setting.longest_first:  # see `hopper`
            grid = f"{grid}, 1 + max(4, cdiv({row_tiles} * 2, num_sms))"
        return KernelSpec(
            source=forward.kernel_path().with_name(KERNEL_FILE),
            kernel=KERNEL,
            name=self.name,
            arguments=tuple(Argument(name, kind.replace("T", self.dtype), _hint(name)) for name, kind in ARGUMENTS),
            constants=constants,
            grid=grid,
            num_warps=4,
            num_stages=1,
            maxnreg=setting.maxnreg,
            archs=(ARCH,),
            requires=(*_served(causal, setting), *setting.requires),
            nullable=NULLABLE,
            descriptors=_descriptors(padded, setting),
            algorithm_name="default",
        )


def _hint(name: str) -> int | None:
    """Rows of Out are stored 8 bytes at a time; TMA wants rows of multiples of 16 bytes."""
    if name in ("Out", "head_size"):
        return 16
    return 8 if name.startswith("out_stride_") else None


def _served(causal: bool, setting: Setting) -> Sequence[str]:
    always = (f"ragged == {int(setting.ragged)}", "softcap == 0", "sm_scale > 0", "window_left == -1")
    lengths = (f"q_len <= {LONGEST}", f"kv_len <= {LONGEST}")
    if setting.ragged:
        given = ("cu_seqlens_q != 0", "cu_seqlens_kv != 0", "batch_size >= 1", "window_right <= 0")
        return (*always, *given, f"batch_size <= {MOST_SEQUENCES}", f"num_heads <= {MOST_HEADS}", *lengths)
    if setting.general:
        return (*always, "window_right <= 0", *lengths)
    return (*always, "q_lengths == 0", "kv_lengths == 0", f"window_right == {0 if causal else -1}")


def _descriptors(padded: int, setting: Setting) -> tuple[Descriptor, ...]:
    unit = setting.block_n & -setting.block_n  # of blocks that are no power of two, see kernels/fp8_wide.py

    def tensor(name: str, heads: str, seq: str, rows: int) -> Descriptor:
        wide = rows != ROWS and unit != setting.block_n
        batches = "1" if setting.ragged else "batch_size"
        strides: tuple[int | str, ...] = (*(f"{name}_stride_{axis}" for axis in "bhs"), 1)
        block = (1, 1, unit, min(padded, 128)) if wide else (1, 1, rows, padded)
        parts = rows // unit if wide else 1
        return Descriptor(f"{name}_desc", name.upper(), (batches, heads, seq, "head_size"), strides, block, parts)

    return (
        tensor("q", "num_heads", "q_len", ROWS),
        tensor("k", "num_kv_heads", "kv_len", setting.block_n),
        tensor("v", "num_kv_heads", "kv_len", setting.block_n),
    )


def fp8_family(dtypes: Sequence[str] = DTYPES, head_sizes: Sequence[int] = HEAD_SIZES) -> list[Fp8]:
    """The functions that serve some dtypes of Out and head sizes, each once; of dtypes, those that Out can have.

    Raises:
        SpecError: a head size is not served.
    """
    found = {}
    for dtype in dtypes:
        for head_size in head_sizes:
            if dtype_name(dtype) in DTYPES:
                function = Fp8(dtype, Fp8(dtype, head_size).padded)
                found[function.name] = function
    return list(found.values())


DescaleStrides = tuple[int, int]


@dataclass(frozen=True)
class Fp8Call(Call):
    """A launch, but for its pointers.

    Attributes:
        q_descale_strides, k_descale_strides, v_descale_strides: (batch, key head), in elements; 0 for an axis that
            has one factor for all. Of a ragged batch the first is of no account.
    """

    q_descale_strides: DescaleStrides = (0, 0)
    k_descale_strides: DescaleStrides = (0, 0)
    v_descale_strides: DescaleStrides = (0, 0)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in DESCALES:
            strides = getattr(self, f"{name}_strides")
            if len(strides) != 2:
                raise SpecError(f"{name}_strides is {strides!r}: give two, of batch and key head, in elements")
            for stride in strides:
                check_range(f"{name}_strides", stride, 0, 2**63 - 1)

    def scalars(self) -> tuple[int | float, ...]:
        """Everything that follows the pointers, in the order of :data:`ARGUMENTS`."""
        plain = super().scalars()
        strides = (*self.q_descale_strides, *self.k_descale_strides, *self.v_descale_strides)
        return (*plain[:-4], *strides, *plain[-4:])


def sweep(padded: int) -> list[Setting]:
    """Settings worth timing on a GPU, for a padded head size: those that fit its shared memory."""
    made = []
    base = _BASE[padded]
    for block_n, stages, raw, v_stages, q_slots, turns in product(
        (64, 128), (2, 3), (1, 2), (2, 3), (1, 2), (True, False)
    ):
        rows = base.consumers * ROWS * q_slots + (stages + raw + v_stages) * block_n
        if rows * padded + 1024 <= SHARED_OF_SM:
            made.append(
                replace(
                    base, block_n=block_n, stages=stages, raw=raw, v_stages=v_stages, q_slots=q_slots, ping_pong=turns
                )
            )
    return made
