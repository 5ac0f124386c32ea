"""What Triton's interpreter does over and over, done once a run: a third of the time that a kernel takes there.

At each call of a device function Triton 3.9 replaces every function of its language by the interpreted one, though they
still are replaced; and for each value it makes a table of all types to look one up.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock


@contextmanager
def less_work(interpreter: Any) -> Iterator[None]:
    """Within it, while one kernel runs, the interpreter does that once.

    Args:
        interpreter: the module ``triton.runtime.interpreter``, which this one does not import. Of a Triton whose
            interpreter has other parts, nothing is changed.
    """
    names = ("_patch_lang", "_get_np_dtype", "_LangPatchScope")
    if not all(hasattr(interpreter, name) for name in names):
        yield
        return
    patch, look_up, nothing = (getattr(interpreter, name) for name in names)
    patched: set[tuple[int, ...]] = set()
    modules: dict[int, tuple[int, ...]] = {}
    dtypes: dict[str, Any] = {}

    def patch_once(function: Any) -> Any:
        """What was replaced, to be put back: nothing, where an earlier call has replaced the same modules' parts."""
        names = function.__globals__
        if id(names) not in modules:
            modules[id(names)] = tuple(sorted({id(value) for value in names.values() if inspect.ismodule(value)}))
        if modules[id(names)] in patched:
            return nothing()
        patched.add(modules[id(names)])
        return patch(function)

    def look_up_once(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in dtypes:
            dtypes[name] = look_up(dtype)
        return dtypes[name]

    with mock.patch.multiple(interpreter, _patch_lang=patch_once, _get_np_dtype=look_up_once):
        yield
