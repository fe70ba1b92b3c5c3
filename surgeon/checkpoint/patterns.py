"""Choosing tensors by name: a name, a glob, or ``re:`` and a regular expression."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable

from surgeon.errors import UsageError, close_matches


def matches(pattern: str, name: str) -> bool:
    """Match a tensor name against a name, a glob, or ``re:`` and a regular expression (full match)."""
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern[3:], name) is not None
        except re.error as error:
            raise UsageError(
                "E218",
                f"{pattern} is not a regular expression: {error}",
                help="after re: stands a regular expression; without it a name or a glob such as *.bias",
            ) from None
    return name == pattern or fnmatch.fnmatchcase(name, pattern)


def select(pattern: str, names: Iterable[str], option: str) -> list[str]:
    """Return the names that match.

    Raises:
        UsageError: E218 none does, or the expression is malformed.
    """
    names = list(names)
    found = [name for name in names if matches(pattern, name)]
    if not found:
        near = None if pattern.startswith("re:") else close_matches(pattern, names)
        raise UsageError(
            "E218",
            f'{option} "{pattern}" matches no tensor',
            help=near or "names, globs (*.bias) and re:REGEX are understood",
        )
    return found
