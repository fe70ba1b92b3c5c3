"""Quantization: from a request to a Plan of packed tensors."""
