"""Reading checkpoints; knows no method."""
