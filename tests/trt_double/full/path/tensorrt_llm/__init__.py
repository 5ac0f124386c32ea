"""In the place of TensorRT-LLM: the parts of its graph API that pyfmha uses, on the double of TensorRT.

``TRTLLM_DOUBLE=removed`` makes it a release after 1.3.0rc20: the package is there, the graph API is not.
"""

import os

__version__ = "1.3.0" if os.environ.get("TRTLLM_DOUBLE") == "removed" else "1.3.0rc20"
