"""What every error code means: the pages behind ``surgeon explain``.

One Markdown file per group, so that the pages read well in the repository, too. A file is a title, a sentence, and
an entry per code:

    ## E305 The vocabularies differ
    One sentence that says what the code means.
    When: where it comes from in practice.
    Fix: what to do.
        surgeon merge ./long ./short --method ties --vocab base -o merged

The first digit of a code says the exit code; ``## E231 [exit 2, 3] ...`` says it where a code does not follow that rule.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

from surgeon.errors import UsageError

GROUPS = (
    "program", "command-line", "recipes", "checkpoints", "merging", "data", "running", "pruning", "experts", "training",
    "editing", "quantizing", "exporting", "hub", "measuring", "evaluation", "reports", "verification", "environment", "output",
)  # fmt: skip
"""The files, in the order in which they are listed."""

_HEADING = re.compile(r"## (E\d{3,4}) (?:\[exit ([\d, ]+)\] )?(.+)")
_NO_GROUP = {"E001": (1,), "E130": (130, 143)}
_EXIT = {"2": 2, "3": 3, "4": 3, "5": 5, "6": 6}
"""First digit -> exit code. Most of E4xx are inputs that a method finds out about while it works; gates say exit 4."""

_NEAREST = 3


@dataclass(frozen=True)
class Page:
    """The explanation of one code.

    Attributes:
        meaning, when, fix: what the code says, where it comes from, what to do.
        example: commands, or an excerpt of a file, one line each.
        exits: the exit codes it ends a command with.
    """

    code: str
    title: str
    group: str
    exits: tuple[int, ...]
    meaning: str
    when: str
    fix: str
    example: tuple[str, ...]


@dataclass(frozen=True)
class Group:
    """Pages of one subject, sorted by code."""

    name: str
    title: str
    summary: str
    pages: tuple[Page, ...]


@functools.cache
def groups() -> tuple[Group, ...]:
    """Read all pages."""
    return tuple(
        read_group(name, (Path(__file__).parent / f"{name}.md").read_text("utf-8")) for name in GROUPS
    )


def page(code: str) -> Page:
    """Return the page of a code, however it was typed: E305, e305, 305 or error[E305].

    Raises:
        UsageError: E200 when there is no such code.
    """
    pages = {one.code: one for group in groups() for one in group.pages}
    wanted = re.sub(r"^(?:error)?\[?e?|\]?:?$", "", code.strip().lower())
    found = pages.get(f"E{wanted}")
    if found is None:
        shown = "".join(c if c.isprintable() else "?" for c in code)[:40]
        near = ", ".join(f"{one} ({pages[one].title})" for one in nearest(wanted, list(pages)))
        raise UsageError(
            "E200", f'unknown error code "{shown}"', help=f'nearest: {near}; "surgeon explain" lists all'
        )
    return found


def nearest(wanted: str, codes: list[str]) -> list[str]:
    """Return the codes closest to what was asked for: by number where it is one, by its letters otherwise."""
    if wanted.isascii() and wanted.isdigit():
        number = int(wanted)
        # Codes of three and of four digits are two rows of the same groups: compare within the row that was meant.
        row = [code for code in codes if len(code) == 1 + len(wanted)] or codes
        return sorted(sorted(row, key=lambda code: (abs(int(code[1:]) - number), code))[:_NEAREST])
    import difflib

    close = difflib.get_close_matches(f"E{wanted.upper()}", codes, n=_NEAREST, cutoff=0.0)
    return sorted(close)


def read_group(name: str, text: str) -> Group:
    """Read one file; a ValueError names the entry that lacks a part."""
    head, *entries = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    title, _, summary = head.strip().partition("\n")
    if not title.startswith("# ") or not summary.strip():
        raise ValueError(f"{name}.md begins with a title and a sentence")
    pages = sorted(
        (_page(name, entry) for entry in entries), key=lambda one: (one.code[1], int(one.code[1:]))
    )
    return Group(name, title[2:], " ".join(summary.split()), tuple(pages))


def _page(group: str, entry: str) -> Page:
    heading, *lines = entry.rstrip().split("\n")
    match = _HEADING.fullmatch(heading)
    if match is None:
        raise ValueError(f'{group}.md: "{heading}" is no heading of an entry')
    code, exits, title = match.groups()
    parts: dict[str, list[str]] = {"meaning": [], "when": [], "fix": [], "example": []}
    for line in lines:
        word, _, rest = line.partition(": ")
        if line.startswith("    "):
            parts["example"].append(line[4:])
        elif word in ("When", "Fix"):
            parts[word.lower()].append(rest)
        elif line:
            parts["meaning"].append(line)
    lacking = [part for part, found in parts.items() if not found]
    if lacking:
        raise ValueError(f"{group}.md: {code} has no {' and no '.join(lacking)}")
    numbers = (
        tuple(int(one) for one in exits.split(",")) if exits else _NO_GROUP.get(code) or (_EXIT[code[1]],)
    )
    text = {part: " ".join(found) for part, found in parts.items()}
    return Page(
        code, title, group, numbers, text["meaning"], text["when"], text["fix"], tuple(parts["example"])
    )
