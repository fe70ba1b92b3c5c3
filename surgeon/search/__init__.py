"""Solvers that pick one level for each module under a budget; NumPy only, nothing here knows a model."""
