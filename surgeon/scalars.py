"""Scalars that people write: which plain text is a number, and how messages quote a value."""

from __future__ import annotations

import math
import re
from typing import Any

# No leading zeros: 010 is 8 in YAML 1.1 and 10 in YAML 1.2, so neither reading is safe.
_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9]*)")
_NUMBER = re.compile(r"[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")


def plain_number(text: str) -> int | float | None:
    """Return the number that plain text stands for, or None when it is not a number.

    Text that is a number too large to hold (`12e4567` may be a commit id) is None as well.
    """
    if _INTEGER.fullmatch(text):
        # Python refuses to convert longer texts; nothing we read needs more digits.
        return int(text) if len(text) <= 4000 else None
    if _NUMBER.fullmatch(text):
        value = float(text)
        return value if math.isfinite(value) else None
    return None


def show(value: Any) -> str:
    """Return a value as messages quote it."""
    if isinstance(value, str):
        text = "".join(c if c.isprintable() else "?" for c in value[:60])
        return f'"{text}"' if len(value) <= 60 else f'"{text[:57]}..."'
    if value is None or isinstance(value, bool):
        return {None: "nothing", True: "true", False: "false"}[value]
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "a mapping"
    return repr(value) if not isinstance(value, int) or abs(value) < 10**20 else "a very large number"
