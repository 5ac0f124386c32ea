"""``torch.ops.pyfmha.attention_with``: attention with score and mask functions of a user's."""

from typing import Any

import torch

from pyfmha.errors import PluginError
from pyfmha.torch import operator
from pyfmha.torch.functions import Own
from pyfmha.torch.operator import Pair, check_given, computed, differentiated, fake, launched, ready_for

NAME = "pyfmha::attention_with"
SCHEMA = operator.FULL_SCHEMA.replace(
    "Tensor v", "Tensor v, str score_function, str mask_function, Tensor[] inputs, Scalar[] numbers"
)
_library = torch.library.Library("pyfmha", "FRAGMENT")
_library.define("attention_with" + SCHEMA, tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag))


class NoGradient(torch.autograd.Function):  # type: ignore[misc]
    """The operator where a gradient may be asked for, with respect to a function's tensors, too: then an error says
    that there is none."""

    @staticmethod
    def forward(context: Any, call: Any, own: Own, q: Any, k: Any, v: Any, keywords: Any, *tensors: Any) -> Any:
        return call(q, k, v, own, *keywords)

    @staticmethod
    def backward(context: Any, *gradients: Any) -> Any:
        raise PluginError("attention has no gradient here; call it under torch.no_grad(), or train with PyTorch's own")


def _called(call: Any, arguments: Any) -> Pair:
    q, k, v, score, mask, inputs, numbers, *keywords = arguments
    check_given(q, k, v)
    own = Own(score, mask, tuple(inputs), tuple(numbers))
    tensors = [*inputs, *(one for one in keywords if isinstance(one, torch.Tensor))]
    if differentiated(q, k, v, *tensors):
        pair: Pair = NoGradient.apply(call, own, q, k, v, keywords, *tensors)
        return pair
    found: Pair = call(q, k, v, own, *keywords)
    return found


def _on_gpu(*arguments: Any) -> Pair:
    def call(q: Any, k: Any, v: Any, own: Own, *keywords: Any) -> Pair:
        prepared: Any = ready_for
        ready, tensors = prepared(q, k, v, *keywords, own=own)
        return launched(ready, tensors)

    return _called(call, arguments)


_computed: Any = computed


def _on_cpu(*arguments: Any) -> Pair:
    def call(q: Any, k: Any, v: Any, own: Own, *keywords: Any) -> Pair:
        found: Pair = _computed(q, k, v, *keywords, own=own)
        return found

    return _called(call, arguments)


def _fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, score: str, mask: str, inputs: Any, numbers: Any, *keywords: Any
) -> Pair:
    return fake(q, k, v, *keywords)


_library.impl("attention_with", _on_gpu, "CUDA")
_library.impl("attention_with", _on_cpu, "CPU")
_library.impl("attention_with", torch.library.fallthrough_kernel, "Autograd")
torch.library.register_fake(NAME, _fake, lib=_library)
attention_with_op = torch.ops.pyfmha.attention_with.default
"""The operator."""
