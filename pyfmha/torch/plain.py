"""Whether PyTorch's dispatcher would do no more with a call than pass it on to the operator's code for the GPU.

It takes 2.4 us for an operator with as many arguments as ours that does nothing, as long as all that a launch needs.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch

from pyfmha.torch.launch import Call, Ready, caller

MOST_RECENT = 64
"""Keywords whose last calls are known again; a model has a handful."""

MOST_FORMS = 4
"""Forms of tensors that are known again of each: layers of a model may take turns. One that fits not is 0.1 us."""

GIVEN = object()
"""In the place of a tensor among keywords by which calls are known."""

is_compiling = torch.compiler.is_compiling
profiler = torch.autograd.profiler
_PLAIN = {torch.Tensor, type(None)}
_is_on_gpu: Callable[[torch.Tensor], bool] = torch.Tensor.is_cuda.__get__


def _lookers_on() -> tuple[Callable[[], object], ...]:
    """What PyTorch tells of those who may want to see a call; a version that does not tell has one always."""
    try:
        profiler._is_profiler_enabled  # noqa: B018  # of PyTorch's profilers; read where it is asked for, as it changes
        return (
            torch._C._len_torch_dispatch_stack,
            torch._C._is_torch_function_mode_enabled,
            torch._C._functorch.peek_interpreter_stack,
            torch._C._get_tracing_state,
        )
    except AttributeError:
        return (lambda: True,) * 4


dispatch_modes, function_modes, _transforms, _traced = _lookers_on()


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
        and not dispatch_modes()
        and not function_modes()
        and not _transforms()
        and not _traced()
        and not profiler._is_profiler_enabled
        and _PLAIN.issuperset(map(type, more))
    )


# By this the code that PyTorch's compiler made knows tensors again: their types, sizes, strides and devices, whether
# they need a gradient, and what the dispatcher would do with them on this thread; in 0.3 us.
_TensorGuards: Any = getattr(getattr(getattr(torch._C, "_dynamo", None), "guards", None), "TensorGuards", None)


def as_given(given: Sequence[Any], launched: Sequence[Any]) -> bool:
    """Whether a call's tensors are launched as they are: lengths of another type, say, are converted each time."""
    return len(given) == len(launched) and all(map(operator.is_, given, launched))


class Recent:
    """What was prepared for the last calls with the same keywords, for tensors that are like those then.

    Attributes:
        calls: by keywords, what tells whether tensors are alike, and what launches for them; the latest first. Who
            takes a call from here asks :data:`dispatch_modes`, :data:`function_modes` and the profiler's flag too: the
            guards do not see those, of the first PyTorch's own. Not while PyTorch's compiler reads the program.

    Args:
        pair: as :func:`pyfmha.torch.launch.launch`.
    """

    def __init__(self, pair: bool = False) -> None:
        self._pair = pair
        self.calls: dict[Any, list[tuple[Callable[..., bool], Call]]] = {}

    def find(self, asked: tuple[Any, ...], tensors: Sequence[Any]) -> Call | None:
        """What launches; None where no earlier tensors were alike.

        Args:
            asked: the keywords: numbers and texts, and which tensors there are.
            tensors: Q, K and V, and all others.
        """
        for alike, call in self.calls.get(asked, ()):
            if alike(*tensors):
                return call
        return None

    def clear(self) -> None:
        """Know nothing, and whoever holds a list of :attr:`calls` neither."""
        for known in self.calls.values():
            known.clear()
        self.calls.clear()

    def keep(self, asked: tuple[Any, ...], tensors: Sequence[Any], ready: Ready) -> Call:
        """Know tensors again, unless one may need a gradient, which the guards do not ask the mode for; the call.

        Args:
            asked: as of :meth:`find`.
            tensors: as there, those that are launched with: what is converted first is converted anew each time.
            ready: for them.
        """
        call = caller(ready, len(tensors), self._pair)
        if _TensorGuards is None or any(tensor.requires_grad for tensor in tensors):
            return call
        if asked not in self.calls and len(self.calls) >= MOST_RECENT:
            self.clear()
        known = self.calls.setdefault(asked, [])
        known.insert(0, (_alike(tensors), call))
        del known[MOST_FORMS:]
        return call


def _alike(tensors: Sequence[Any]) -> Callable[..., bool]:
    """Whether others are like these. The guards refuse a tensor that is given twice, as cumulative lengths may be."""
    known = [*map(id, tensors)]
    if len(set(known)) == len(known):
        return _guards(tensors)
    firsts = tuple(map(known.index, known))
    return _maker(firsts)(_guards([tensors[place] for place in sorted(set(firsts))]))


def _guards(tensors: Sequence[Any]) -> Callable[..., bool]:
    check: Callable[..., bool] = _TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
    return check


@functools.lru_cache(maxsize=MOST_RECENT)
def _maker(firsts: tuple[int, ...]) -> Callable[..., Callable[..., bool]]:
    """Makes what asks guards about each tensor once.

    Args:
        firsts: of each place the first at which its tensor is given.
    """
    given = [f"t{place}" for place in range(len(firsts))]
    same = [f"t{first} is t{place} and " for place, first in enumerate(firsts) if place != first]
    asked = ", ".join(given[place] for place, first in enumerate(firsts) if place == first)
    made: Callable[..., Callable[..., bool]] = eval(
        f"lambda check: lambda {', '.join(given)}: {''.join(same)}check({asked})"
    )
    return made


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
