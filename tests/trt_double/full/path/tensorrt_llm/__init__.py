"""In the place of TensorRT-LLM: the parts of its graph API that pyfmha uses, on the double of TensorRT.

``TRTLLM_DOUBLE=removed`` makes it a release after 1.3.0rc20: the package is there, the graph API is not. ``early`` is
one whose session does not look at what TensorRT answers; ``mpi`` and ``cuda`` are machines where its import fails.
"""

import os

kind = os.environ.get("TRTLLM_DOUBLE")
__version__ = "1.3.0" if kind == "removed" else "1.3.0rc3"
if kind == "mpi":
    raise RuntimeError("cannot load MPI library")  # as mpi4py does
