"""In the place of TensorRT's lean runtime: see :mod:`trt_double.full`."""

import os

from trt_double.full import VERSIONS, make_full

make_full(
    "tensorrt_lean", os.environ.get("TRT_DOUBLE_VERSION", VERSIONS[-1])
)  # takes this module's place in sys.modules
