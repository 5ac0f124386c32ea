"""A function's arguments: put in order where they come by name; tensors among them checked, and their addresses."""

import difflib
from collections.abc import Mapping
from typing import Any

from pyfmha.errors import TensorError
from pyfmha.runtime.libcuda import current_device
from pyfmha.runtime.tensors import check_device, is_tensor, view
from pyfmha.spec.abi import canonical, ctype
from pyfmha.spec.manifest import Function


def in_order(
    function: Function, arguments: tuple[Any, ...], named: Mapping[str, Any], *, stream: bool = True
) -> tuple[Any, ...]:
    """Arguments of which some are given by name, as they are by position.

    Args:
        function: whose they are.
        arguments: the first ones.
        named: the others.
        stream: whether the stream is the first of all.

    Raises:
        TypeError: a name is not an argument's, is given by position too, or one is missing.
    """
    names = [name for name, _ in function.arguments]
    if stream:  # a kernel may have an argument of that name, too
        names = ["CUstream" if "stream" in names else "stream", *names]
    unknown = [name for name in named if name not in names]
    if unknown:
        spelled = {name.lower(): name for name in names}
        close = difflib.get_close_matches(unknown[0].lower(), spelled, n=1)
        meant = f" (did you mean {spelled[close[0]]}?)" if close else ""
        raise TypeError(f"{function.name} has no argument {', '.join(unknown)}; it takes {', '.join(names)}{meant}")
    twice = [name for name in names[: len(arguments)] if name in named]
    if twice:
        raise TypeError(f"{function.name}: {', '.join(twice)} is given twice, by position and by name")
    missing = [name for name in names[len(arguments) :] if name not in named]
    if missing:
        raise TypeError(f"{function.name}: {', '.join(missing)} is missing; it takes {', '.join(names)}")
    return (*arguments, *(named[name] for name in names[len(arguments) :]))


def with_addresses(function: Function, arguments: tuple[Any, ...], stream: Any) -> tuple[tuple[Any, ...], list[Any]]:
    """Arguments in which tensors are replaced by their addresses.

    Args:
        function: whose they are.
        arguments: the stream, then as many as it takes; others are left to the caller's own check.
        stream: on which the tensors will be used; None for no order.

    Returns:
        The arguments, and what must live until they are used.

    Raises:
        TensorError: a tensor is not on the current context's GPU, of another type, or has gaps where no strides are
            among the arguments.
        DriverError: the streams cannot be ordered.
    """
    replaced, held = list(arguments), []
    strided = any("stride" in name for name, _ in function.arguments)
    for index, (name, kind) in enumerate(function.arguments[: len(arguments) - 1], start=1):
        if ctype(kind).kind != "pointer" or not is_tensor(arguments[index]):
            continue
        label = f"{function.name}: {name}"
        found = view(label, arguments[index], stream)
        check_device(label, found, current_device())
        wanted = canonical(kind).lstrip("*").removeprefix("k")
        if not found.holds(wanted):
            raise TensorError(f"{label} is {found}; {kind} is a pointer to {wanted}")
        if not strided and not found.is_contiguous:
            raise TensorError(f"{label} is {found}; the function takes no strides: give a contiguous copy")
        replaced[index] = found.pointer
        held.append(found)
    return tuple(replaced), held
