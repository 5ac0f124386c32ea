"""From an ONNX model to one whose attention is the plugin's node, and the proof that it is the same model.

Needs the extra ``onnx``: onnx, onnx-ir and onnxscript, and for the proof onnxruntime. No PyTorch, TensorRT or Triton.
"""

from pyfmha.spec.advice import install_command

try:
    from pyfmha.onnx.replace import replace_attention
    from pyfmha.onnx.report import Found, Report
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] not in ("onnx", "onnx_ir", "onnxscript"):
        raise
    raise ModuleNotFoundError(f"pyfmha.onnx needs {error.name}: {install_command('onnx')}", name=error.name) from None

__all__ = ["Found", "Report", "replace_attention"]
