"""The two files that a model with per-layer shapes brings along; shipped as they lie here."""
