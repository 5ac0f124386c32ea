"""What attention is: the families of its kernels and what each serves, its tiles, its reference in float64.

The families (:mod:`~pyfmha.attention.first`, :mod:`~pyfmha.attention.forward`, :mod:`~pyfmha.attention.decode`,
:mod:`~pyfmha.attention.hopper`) need the standard library only; :mod:`~pyfmha.attention.reference` and
:mod:`~pyfmha.attention.run` need numpy.
"""

from pyfmha.attention.first import DTYPES, HEAD_SIZES, Attention, family, family_specs, kernel_path

__all__ = ["DTYPES", "HEAD_SIZES", "Attention", "family", "family_specs", "kernel_path"]
