"""In the place of TensorRT: see :mod:`trt_double.full`. ``TRT_DOUBLE_VERSION`` chooses the version."""

import os

from trt_double.full import VERSIONS, make_full

make_full("tensorrt", os.environ.get("TRT_DOUBLE_VERSION", VERSIONS[-1]))  # takes this module's place in sys.modules
