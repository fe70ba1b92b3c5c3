"""Checking a file that people wrote, whichever kind it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from surgeon.errors import UsageError
from surgeon.recipe import mergekit_yaml, native, shipped, yaml


def check(name: str, settings: Sequence[str], inputs: bool) -> list[str]:
    """Check a recipe or a mergekit YAML, by path or by the name of one that comes with the package; return warnings."""
    file = str(shipped.file_of(name))
    text = yaml.read_text(Path(file))
    if not native.is_native(text, file):
        if settings:
            raise UsageError(
                "E208", "--set belongs to a recipe of several steps", help=f"{file} is a mergekit YAML"
            )
        _, remarks = mergekit_yaml.parse(text, file)
        return [str(getattr(remark, "message", remark)) for remark in remarks]
    recipe = native.read(file, settings)
    if inputs:
        recipe.check_files()
    return list(recipe.warnings)
