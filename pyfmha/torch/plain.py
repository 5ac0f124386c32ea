"""Whether PyTorch's dispatcher would do no more with a call than pass it on to the operator's code for the GPU.

It takes 2.4 us for an operator with as many arguments as ours that does nothing, as long as all that a launch needs.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch

from pyfmha.torch.launch import Call, Ready, caller

MOST_RECENT = 64
"""Keywords whose last call is known again; a model has a handful."""

GIVEN = object()
"""In the place of a tensor among keywords by which calls are known."""

is_compiling = torch.compiler.is_compiling
_PLAIN = {torch.Tensor, type(None)}
_is_on_gpu: Callable[[torch.Tensor], bool] = torch.Tensor.is_cuda.__get__


def _lookers_on() -> tuple[Callable[[], object], ...]:
    """What PyTorch tells of those who may want to see a call; a version that does not tell has one always."""
    try:
        return (
            torch._C._len_torch_dispatch_stack,
            torch._C._is_torch_function_mode_enabled,
            torch._C._functorch.peek_interpreter_stack,
            torch._C._get_tracing_state,
            torch._C._autograd._profiler_enabled,
        )
    except AttributeError:
        return (lambda: True,) * 5


_dispatch_modes, _function_modes, _transforms, _traced, _profiled = _lookers_on()


def undispatched(q: Any, k: Any, v: Any, more: tuple[Any, ...] = ()) -> bool:
    """Whether tensors are PyTorch's own, on a GPU, and nobody looks on: no subclass, mode, transform, trace or profile.

    Not to be asked while PyTorch's compiler reads the program.

    Args:
        q, k, v: tensors.
        more: others, or None.
    """
    return (
        type(q) is type(k) is type(v) is torch.Tensor
        and _is_on_gpu(q)
        and not _dispatch_modes()
        and not _function_modes()
        and not _transforms()
        and not _traced()
        and not _profiled()
        and _PLAIN.issuperset(map(type, more))
    )


def unseen() -> bool:
    """Whether nobody looks on of those whom the guards of :class:`Recent` do not know: no mode, no profile."""
    return not (_function_modes() or _profiled())


# By this the code that PyTorch's compiler made knows tensors again: their types, sizes, strides and devices, whether
# they need a gradient, and what the dispatcher would do with them on this thread; in 0.3 us.
_TensorGuards: Any = getattr(getattr(getattr(torch._C, "_dynamo", None), "guards", None), "TensorGuards", None)


def as_given(given: Sequence[Any], launched: Sequence[Any]) -> bool:
    """Whether a call's tensors are launched as they are: lengths of another type, say, are converted each time."""
    return len(given) == len(launched) and all(map(operator.is_, given, launched))


class Recent:
    """What was prepared for the last call with the same keywords, for tensors that are like those then.

    Attributes:
        calls: by keywords, what tells whether tensors are alike, and what launches for them.

    Args:
        pair: as :func:`pyfmha.torch.launch.launch`.
    """

    def __init__(self, pair: bool = False) -> None:
        self._pair = pair
        self.calls: dict[Any, tuple[Callable[..., bool], Call]] = {}

    def find(self, asked: tuple[Any, ...], *tensors: Any) -> Call | None:
        """That; None where they are not alike, or somebody looks on.

        Not to be asked while PyTorch's compiler reads the program.

        Args:
            asked: the keywords: numbers and texts, and which tensors there are.
            tensors: Q, K and V, and all others.
        """
        found = self.calls.get(asked)
        return found[1] if found is not None and found[0](*tensors) and unseen() else None

    def keep(self, asked: tuple[Any, ...], tensors: Sequence[Any], ready: Ready) -> Call:
        """Know tensors again, unless one may need a gradient, which the guards do not ask the mode for; the call.

        Args:
            asked: as of :meth:`find`.
            tensors: as there, those that are launched with: what is converted first is converted anew each time.
            ready: for them.
        """
        call = caller(ready, self._pair)
        if _TensorGuards is None or any(tensor.requires_grad for tensor in tensors):
            return call
        if len(self.calls) >= MOST_RECENT:
            self.calls.clear()
        alike = _TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
        self.calls[asked] = alike, call
        return call


def undisturbed(function: Any) -> None:
    """Keep PyTorch's compiler out of a function, as ``torch.compiler.disable`` does, which would import the compiler
    with its seconds. What reads sources is nothing for it; a program is compiled before and after."""
    function._torchdynamo_disable = True
    frames = torch._C._dynamo.eval_frame
    try:
        skipped = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.SKIP)
        frames.set_code_exec_strategy(function.__code__, skipped)
    except AttributeError:  # of another version of PyTorch, whose compiler looks into it, and breaks off inside
        return
