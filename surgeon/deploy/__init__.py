"""Outputs that other programs load: per-layer shapes in transformers, GGUF, DeciLM, nested families."""
