"""In the place of cuda-python: see :mod:`trt_double.full.driver`."""

from trt_double.full.driver import *  # noqa: F403
