"""In the place of TensorRT: see :mod:`trt_double.full`. ``TRT_DOUBLE_VERSION`` chooses the version."""

import os

from trt_double.full import make_full

make_full("tensorrt", os.environ.get("TRT_DOUBLE_VERSION", "11.1.0"))  # takes this module's place in sys.modules
