"""A kernel on the CPU, under Triton's interpreter: in this process, or in one of its own. Needs numpy and Triton.

:func:`interpret_operator` runs an operator as its description says; :func:`run_in_subprocess` one kernel with the
arguments that it is given.
"""

from pyfmha.interpreter.kernel import FunctionOf, Null, Tensor
from pyfmha.interpreter.operators import interpret_operator
from pyfmha.interpreter.process import run_in_subprocess

__all__ = ["FunctionOf", "Null", "Tensor", "interpret_operator", "run_in_subprocess"]
