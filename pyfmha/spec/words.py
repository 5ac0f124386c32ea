"""Words that users give: other spellings of one thing, and the word that was probably meant."""

import difflib
from collections.abc import Iterable

_DTYPES = {"float16": "fp16", "half": "fp16", "bfloat16": "bf16", "float32": "fp32", "float": "fp32"}


def dtype_name(word: str) -> str:
    """``"fp16"`` for ``"float16"``, as PyTorch, numpy and TensorRT-LLM have it, and so on; other words as they are.

    A list's type, ``"float16[]"``, keeps its brackets.
    """
    base = word.removesuffix("[]")
    return _DTYPES.get(base, base) + word[len(base) :]


def one_of(allowed: Iterable[str], got: str = "") -> str:
    """``"use one of a, b (did you mean b?)"``, the end of a message that refuses a word.

    Args:
        allowed: the words that are served.
        got: the word that is not.
    """
    words = list(map(str, allowed))
    known = [*words, *(other for other, name in _DTYPES.items() if name in words)]
    close = difflib.get_close_matches(got.lower(), known, n=1, cutoff=0.6)
    return f"use one of {', '.join(words)}" + (f" (did you mean {dtype_name(close[0])}?)" if close else "")
