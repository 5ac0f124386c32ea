"""Attention in TensorRT: its layer, engines and TensorRT-LLM. All that is not attention's is beside this folder."""
