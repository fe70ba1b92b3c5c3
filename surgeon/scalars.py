"""Which plain text is a number: one rule for YAML files and for text given as a parameter."""

from __future__ import annotations

import math
import re

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
