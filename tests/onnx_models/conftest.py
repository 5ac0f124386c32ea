"""What needs the extra ``onnx`` is skipped without it."""

from importlib.util import find_spec

collect_ignore_glob = [] if all(map(find_spec, ("onnx", "onnx_ir", "onnxscript", "onnxruntime"))) else ["test_*.py"]
