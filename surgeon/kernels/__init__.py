"""Numeric primitives over blocks; no files, no configuration."""
