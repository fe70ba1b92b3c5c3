"""One file per merge method."""
