"""Matrices that are refused alike, told once: the first of a kind is named, those of other layers and experts are counted."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable
from typing import TypeVar

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")

Reason = TypeVar("Reason", bound=Hashable)


def told_once(refused: Iterable[tuple[str, Reason]]) -> list[tuple[str, str, Reason]]:
    """Return (name of the first, words about those like it, reason) for every kind of matrix and reason.

    Args:
        refused: (name of a matrix, reason); names that differ in their numbers alone are of one kind.

    Returns:
        In the order of the first ones; the words are "" for a single one, else such as "27 more layers".
    """
    kinds: dict[tuple[str, Reason], list[str]] = {}
    for name, reason in refused:
        kinds.setdefault((_NUMBER.sub("*", name), reason), []).append(name)
    return [(names[0], _words(names), reason) for (_, reason), names in kinds.items()]


def _words(names: list[str]) -> str:
    others = len(names) - 1
    if not others:
        return ""
    numbers = zip(*(_NUMBER.findall(name) for name in names), strict=True)
    if [len(set(column)) > 1 for column in numbers][1:].count(True) == 0:
        return f"{others:,} more layer{'s' if others > 1 else ''}"
    return f"{others:,} more of its kind"
