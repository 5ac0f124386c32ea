"""A function's arguments with tensors among them: checked, and replaced by their addresses."""

from typing import Any

from pyfmha.errors import TensorError
from pyfmha.runtime.libcuda import current_device
from pyfmha.runtime.tensors import check_device, is_tensor, view
from pyfmha.spec.abi import canonical, ctype
from pyfmha.spec.manifest import Function


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
