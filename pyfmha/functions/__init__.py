"""Score and mask functions: Triton functions that users write, compiled ahead of time into the attention kernels.

:mod:`~pyfmha.functions.declare` has the decorators, :mod:`~pyfmha.functions.family` what is compiled of them,
:mod:`~pyfmha.functions.evaluate` what they are in float64. The other modules are the functions that come with it:
each a short file that shows itself, for ``pyfmha build --functions alibi``, or to be copied.
"""

from pyfmha.functions.declare import AttentionFunction, mask_function, score_and_mask, score_function

__all__ = ["AttentionFunction", "mask_function", "score_and_mask", "score_function"]
