"""From an ONNX model to one whose attention is the plugin's node, and the proof that it is the same model.

Needs the extra ``onnx``: onnx, onnx-ir and onnxscript, and for the proof onnxruntime. No PyTorch, TensorRT or Triton.
"""

from pyfmha.onnx.replace import replace_attention
from pyfmha.onnx.report import Found, Report

__all__ = ["Found", "Report", "replace_attention"]
