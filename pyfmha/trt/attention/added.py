"""A layer of attention: by the first kernel, by the others, or with a user's function, which is a plugin of its own."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pyfmha.attention.first import HEAD_SIZES
from pyfmha.operators.forms import Shape
from pyfmha.runtime.library import Library
from pyfmha.trt.attention.functions import Asked, check_held, extended
from pyfmha.trt.attention.problem import INPUTS, Features, Problem
from pyfmha.trt.creator import library_in_use, register
from pyfmha.trt.network import Tensors, add_layer


def added(
    trt: Any,
    network: Any,
    problem: Problem,
    tensors: Tensors,
    asked: Asked,
    name: str | None,
    namespace: str,
    library: Library | Path | str | None,
) -> list[Any]:
    """The outputs of a new layer.

    Args:
        trt, network, name, namespace, library: as of :func:`pyfmha.add_attention`.
        problem: what is asked for, but for functions.
        tensors: the inputs by name, but for theirs.
        asked: the functions, if any.

    Raises:
        PluginError, LibraryError: as there.
    """
    if asked:
        library = library_in_use(trt, namespace, library)
        extension, own = extended(asked, library, problem.dtype, problem.padded_size)
        problem, tensors = replace(problem, extension=extension), {**tensors, **own}
        check_held(asked, problem, library)
        creator = register(trt, namespace=namespace, library=library, operator=extension.operator)
    else:
        creator = register(trt, namespace=namespace, library=library)
        if all(one in tensors for one in INPUTS):
            problem = _served(problem, [tuple(tensors[one].shape) for one in INPUTS], creator.library)
    said = name or creator.name
    _, outputs = add_layer(trt, network, creator, problem.attributes(), tensors, said)
    return outputs


def _served(problem: Problem, shapes: Sequence[Shape], library: Library) -> Problem:
    """The problem for the first kernel, where a library has no other and that serves it: no newer feature is used, Q, K
    and V are of one shape. Where sizes are -1, they are taken to be."""
    newer = problem.features != Features(problem.num_heads) or problem.head_size not in HEAD_SIZES
    if newer or len(set(shapes)) > 1 or problem.function_name in library:
        return problem
    first = replace(problem, features=None)
    return first if first.function_name in library else problem
