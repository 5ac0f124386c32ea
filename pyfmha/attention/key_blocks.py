"""The lists of blocks of keys that attention with a user's mask function visits: ``kernels/key_blocks.py``.

A first launch, ``fmha_flags_documents_*``, asks the function of every query and key, and notes for each tile of queries
which blocks of keys it sees; a second, ``fmha_blocks_documents_*``, makes lists of them, which attention walks. What
all must know is said here: how large the tiles are, and how many lists there are.
"""

from dataclasses import dataclass, replace

from pyfmha.operators.description import Part
from pyfmha.spec.constants import Constant
from pyfmha.spec.kernel import Argument, KernelSpec

TILE = 128
"""Queries and keys of one entry of a list: a multiple of what every variant works on at a time."""

ARGUMENTS = (("Blocks", "*i32"), ("list_batches", "i32"), ("list_heads", "i32"))
"""What both launches take behind the function's inputs."""

_LISTS = "list_batches * list_heads"
_TILES = "cdiv(q_len, BLOCK_M) + ragged * (batch_size + 1)"
GRID = f"{_TILES}, min({_LISTS}, 65535), cdiv({_LISTS}, 65535)"
"""Of the launch that writes them; see :data:`pyfmha.attention.forward.GRID`."""
FLAGS_GRID = GRID.replace(_TILES, f"({_TILES}) * min(cdiv(kv_len, BLOCK_N), 64)")
"""Of the one before; SPLITS of ``kernels/key_blocks.py`` is the number."""
LISTING = ("flags", "blocks")
"""What comes before attention, as the names of the functions have it."""


@dataclass(frozen=True)
class KeyBlocks:
    """What tells the lists of one function apart.

    Attributes:
        batch, head: whether it reads the sequence's number, and the head's: else these share lists.
    """

    batch: bool
    head: bool

    def definitions(self) -> dict[str, str]:
        """How many lists there are, as an operator's definitions. A mask tensor counts, too."""
        each = "batch" if self.batch else "batch if q_lengths or kv_lengths or mask_b > 1 else min(batch, 1)"
        return {
            "list_batches": f"1 if cu_seqlens else {each}",
            "list_heads": "num_heads" if self.head else "num_heads if mask_h > 1 else 1",
        }

    def numbers(self, batch: int, heads: int, *, lengths: bool, mask: tuple[int, ...], ragged: bool) -> tuple[int, int]:
        """The same for known sizes.

        Args:
            batch, heads: sequences, and heads of Q.
            lengths: whether there are lengths.
            mask: the mask's strides of batch and head; 0 for what is shared.
            ragged: whether the sequences lie behind each other.
        """
        of_batch, of_head = (any(mask[axis : axis + 1]) for axis in (0, 1))
        batches = batch if self.batch or lengths or of_batch else min(batch, 1)
        return 1 if ragged else batches, heads if self.head or of_head else 1


def workspace() -> Part:
    """The lists: for each tile how many blocks are seen in part and whole, and their numbers; and a flag for each."""
    tiles = f"(cdiv(rows, {TILE}) + (batch + 1 if cu_seqlens else 0))"
    return Part("Blocks", f"4 * list_batches * list_heads * {tiles} * (2 + 2 * cdiv(columns, {TILE}))", "", "int32")


def bytes_of(batches: int, heads: int, queries: int, keys: int, sequences: int = -1) -> int:
    """Bytes of that part; sequences: of a ragged batch."""
    return 4 * batches * heads * (-(-queries // TILE) + sequences + 1) * (2 - 2 * (-keys // TILE))


def arguments() -> tuple[Argument, ...]:
    """:data:`ARGUMENTS` of a spec."""
    return tuple(Argument(name, kind) for name, kind in ARGUMENTS)


def _of_masks(argument: Argument) -> Argument:
    """An argument with its hint, if that is of the mask."""
    return argument if argument.name.lower().startswith("mask") else Argument(argument.name, argument.type)


def reading(spec: KernelSpec) -> KernelSpec:
    """A variant that walks the lists; on Hopper, where tiles are dense, an entry has one size."""
    own: tuple[tuple[str, Constant], ...] = (("LIST", "read"), ("LIST_M", TILE), ("LIST_N", TILE))
    constants = (*spec.constants, *((("LIST", TILE),) if spec.descriptors else own))
    return replace(spec, arguments=(*spec.arguments, *arguments()), constants=constants)


def flagging(spec: KernelSpec, name: str) -> KernelSpec:
    """What comes before :func:`writing`, made of a variant with a function: of a generic one, or of one with hints of a
    mask."""
    made = writing(spec, name)
    constants = tuple((one, "flag" if one == "LIST" else value) for one, value in made.constants)
    return replace(made, constants=constants, grid=FLAGS_GRID, num_warps=8, maxnreg=80)


def writing(spec: KernelSpec, name: str) -> KernelSpec:
    """What writes the lists, made of a generic variant with a function."""
    own: dict[str, Constant] = {"BLOCK_M": TILE, "BLOCK_N": TILE, "SOFTCAP": "never", "BIAS": "any", "MASK": "any"}
    constants = (
        *((one, own.get(one, value)) for one, value in spec.constants),
        ("LIST", "write"),
        ("LIST_M", TILE),
        ("LIST_N", TILE),
    )
    return replace(
        spec,
        name=name,
        arguments=(*map(_of_masks, spec.arguments), *arguments()),
        constants=constants,
        tunings=(),
        requires=(),
        grid=GRID,
        num_warps=4,
        num_stages=1,
        functions=tuple(one for one in spec.functions if one.parameter != "SCORE"),
    )
