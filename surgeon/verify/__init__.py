"""Checks of finished models."""
