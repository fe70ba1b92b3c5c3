"""Prunable structures: where heads, channels and layers lie in a checkpoint, and the model that is left of a cut."""
