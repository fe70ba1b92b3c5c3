"""One file per depth method, which drops whole layers; the file name is the method's name."""

from __future__ import annotations

import importlib
import pkgutil
import re
from functools import cache

from surgeon.errors import UsageError, close_matches
from surgeon.prune.depth_ranking import DepthMethod

__all__ = ["get", "known"]

DEFAULT = "nmse"


@cache
def known() -> tuple[str, ...]:
    """Return the names of all methods without importing them."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")))


def get(name: str) -> DepthMethod:
    """Return a method by the name users type (dashes or underscores).

    Raises:
        UsageError: E279 unknown name.
    """
    wanted = name.replace("-", "_").lower()
    if not re.fullmatch(r"[a-z0-9_]{1,40}", wanted) or wanted not in known():
        near = close_matches(wanted, known())
        shown = "".join(c if c.isprintable() else "?" for c in name)[:60]
        raise UsageError("E279", f'unknown depth method "{shown}"',
                         help=(near.replace("_", "-") + " " if near else "") + "one of: "
                         + ", ".join(n.replace("_", "-") for n in known()))  # fmt: skip
    return importlib.import_module(f"{__name__}.{wanted}").METHOD
