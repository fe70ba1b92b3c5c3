"""What the tool knows about model families."""
