"""Merging checkpoints: from a request to a Plan."""
