"""YAML that people write."""
