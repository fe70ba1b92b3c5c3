"""Unstructured and N:M sparsity: zeros inside dense matrices, by magnitude, Wanda or SparseGPT."""
