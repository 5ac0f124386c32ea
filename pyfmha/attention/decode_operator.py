"""Decoding within attention as an operator: when :mod:`pyfmha.attention.decode` runs, and in how many parts."""

from pyfmha.attention import biased_decode
from pyfmha.attention.decode import (
    COPYING,
    EVEN_PERCENT,
    FETCHING,
    KEYS_OF_SPLIT,
    LEAST_KEYS,
    MOST_QUERIES,
    PROGRAMS,
    READ_PERCENT,
    UNEVEN_PERCENT,
)
from pyfmha.attention.hopper import (
    COPIED,
    DECODE_KERNEL,
    MANY_BLOCKS,
    MANY_KEY_HEADS,
    MANY_PROGRAMS,
    MOST_KEY_HEADS,
)

DECODE, BIASED_DECODE = "decode", "biased_decode"
"""The options of the two functions of decoding, and of those with a bias and the like; an engine stores their numbers
as ``pyfmha_decode`` and ``pyfmha_biased_decode``."""

_ROWS = 16  # of a tile of decoding


def padded(sizes: tuple[int, ...]) -> str:
    """The least of some sizes that is no less than the head sizes."""
    *smaller, largest = sizes
    return " else ".join([*(f"{size} if widest <= {size}" for size in smaller), str(largest)])


def _waves_ns(what: str, programs: str, at_once: str, read: str, rate: int | str, together: str) -> dict[str, str]:
    """Definitions of what programs take, as pyfmha.attention.decode has it."""
    last = f"({programs} - {what}_full)"

    def ns(some: str, most: str) -> str:
        return f"1000 * ({read}) * {some} / max(min({together}, {rate} * {most}), 1)"

    return {
        f"{what}_full": f"{programs} / max({at_once}, 1) * ({at_once})",
        f"{what}_ns": f"{ns(f'{what}_full', f'({at_once})')} + {ns(last, last)}",
    }


def _rate(name: str) -> str:
    """Of pyfmha.attention.decode.Rates."""
    return f"({getattr(COPYING, name)} if copied else {getattr(FETCHING, name)})"


_QUERIES = "rows * (num_heads / num_kv_heads)"
DECODING = {
    "padded_split": padded((64, 128, 256)),
    "most_rows": f"{MOST_QUERIES} / (num_heads / num_kv_heads)",
    # The rule of pyfmha.attention.decode.decoding_for.
    "key_heads": "batch * num_kv_heads",
    "queries": "batch * num_heads * rows",
    "decodable": f"not eight and (has({BIASED_DECODE}) if biased else has({DECODE})) and {_QUERIES} > 0"
    f" and {_QUERIES} <= {MOST_QUERIES} and columns >= {LEAST_KEYS} and batch > 0",
    "clusters": "key_heads * cdiv(num_heads / num_kv_heads, 8)",
    "ranks": "8 if clusters <= 8 else 4 if clusters <= 16 else 2 if clusters <= 64 else 1",
    "either": f"decodable and not biased and serves('forward', '{DECODE_KERNEL}')",
    "memory_rate": f"device(memory_clock) * device(memory_bus) / 4000 * {READ_PERCENT} / 100 if either else 0",
    "multiprocessors": "device(multiprocessors) if either else 0",
    "programs": f"key_heads * cdiv({_QUERIES}, {_ROWS})",
    "splits": f"min(max({PROGRAMS} / max(programs, 1), 1), cdiv(columns, {KEYS_OF_SPLIT}))",
    "read": "columns * 4 * head_size if either else 0",
    "copied": f"padded_split == {COPIED}",
    "few": f"key_heads <= {MOST_KEY_HEADS}",
    "many": f"key_heads > {MANY_KEY_HEADS} and padded_split <= {max(MANY_BLOCKS)} and (few or not copied)",
    "full_rounds": "cdiv(key_heads, max(multiprocessors, 1)) * multiprocessors",
    "uneven": f"copied and many and 100 * key_heads < {EVEN_PERCENT} * full_rounds",
    "cluster_rate": f"min(memory_rate * {UNEVEN_PERCENT} / 100 if uneven else memory_rate,"
    f" {_rate('multiprocessor')} * multiprocessors)",
    "clusters_at_once": f"({MANY_PROGRAMS} if many else 1) * multiprocessors",
    "program_rate": f"{_rate('many')} if many else {_rate('program')}",
    **_waves_ns("cluster", "key_heads * ranks", "clusters_at_once", "read / ranks", "program_rate", "cluster_rate"),
    "three": "many and few",
    "splits_at_once": "(3 if three else 2) * multiprocessors",
    "split_rate": _rate("split"),
    **_waves_ns("pair", "programs * splits", "splits_at_once", "read / max(splits, 1)", "split_rate", "memory_rate"),
    "three_ns": f"1000 * {MANY_PROGRAMS} * read / {_rate('three')} if three and programs > 2 * multiprocessors else 0",
    "one_launch": "either and (memory_rate <= 0 or multiprocessors <= 0 or copied and not few or"
    f" cluster_ns <= max(pair_ns, three_ns) + ({_rate('second_ns')} if splits > 1 else 0))",
    "split": f"decodable and not one_launch and (not biased or splits >= {biased_decode.LEAST_PARTS})",
    # What suffices for every shape of a profile, see pyfmha.attention.decode.most_workspace_bytes.
    "most_decoded": "min(Sq, most_rows)",
    "profile_rows": f"max({PROGRAMS * _ROWS}, batch * num_heads * min(most_decoded, {MOST_QUERIES}))",
}
"""Definitions of decoding; ``padded_split`` is FP8's, too."""
