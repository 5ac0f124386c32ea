"""Fused multi-head attention for TensorRT, in pure Python."""
__version__ = "0.1.0"
