"""Writing model folders; knows no method."""
