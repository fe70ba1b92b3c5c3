"""What surgeon knows about model families: the tensors they hold and the keys that size them.

One module per model type, found by its file name; each exports one ``ARCHITECTURE``. Adding a
family means adding a file.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from surgeon.architectures.base import Architecture

_NAME = re.compile(r"[a-z0-9_]+", re.ASCII)


def get(model_type: object) -> Architecture | None:
    """Return the record of a model type, or None for a type nothing here knows.

    The name comes from a file somebody else wrote. It is only ever compared with the names of
    the modules of this package, never used to build a path or a foreign import.
    """
    if not isinstance(model_type, str) or not _NAME.fullmatch(model_type):
        return None
    if model_type not in {module.name for module in pkgutil.iter_modules(__path__)}:
        return None
    found = getattr(importlib.import_module(f"{__name__}.{model_type}"), "ARCHITECTURE", None)
    return found if found is not None and found.model_type == model_type else None


def known() -> list[str]:
    """Return the model types with a record, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if get(module.name) is not None)
