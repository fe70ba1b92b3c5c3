"""Pruning of mixtures of experts: whole experts and expert channels, cut on stored bytes."""
