"""One file per merge method; the file name is the method's name."""

from __future__ import annotations

import importlib
import pkgutil
import re
from functools import cache

from surgeon.errors import UsageError, close_matches
from surgeon.merge.method import Method, Parameter

__all__ = ["Parameter", "catalogue", "names"]


@cache
def names() -> tuple[str, ...]:
    """Return the names of all methods without importing them."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")))


def catalogue(name: str) -> Method:
    """Return a method by the name users type (dashes or underscores).

    Raises:
        UsageError: E201 unknown name; hostile names never reach the import system (fault G5).
    """
    wanted = name.replace("-", "_").lower() if isinstance(name, str) else ""
    if not re.fullmatch(r"[a-z0-9_]{1,40}", wanted) or wanted not in names():
        near = close_matches(wanted, names())
        shown = "".join(c if c.isprintable() else "?" for c in str(name))[:60]
        raise UsageError(
            "E201", f'unknown merge method "{shown}"',
            help=(near.replace("_", "-") + " " if near else "") + f'"surgeon methods merge" lists all {len(names())}',
        )  # fmt: skip
    return importlib.import_module(f"{__name__}.{wanted}").METHOD
