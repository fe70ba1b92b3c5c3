"""Texts of four domains that every machine with Python and torch has: program code, C++ headers, English prose, arithmetic.

- code: the sources of the standard library, parsed and printed again, so without comments; docstrings removed;
- headers: C++ headers that come with torch (c10 and the C++ frontend), comments removed;
- prose: the language reference that ``help()`` shows (pydoc_data) and the docstrings of the standard library;
- mathematics: sums, differences, products, comparisons and sequences in digits and in words, drawn from seeds.

A document belongs to one of three parts by the sha256 of its domain and name: about one in twelve is held out,
one in twelve is for calibration, the model is trained on the rest.
"""

from __future__ import annotations

import ast
import hashlib
import random
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch

DOMAINS = ("code", "headers", "prose", "mathematics")
PARTS_OF = 12
EXERCISES = 6000

Part = Literal["train", "calibration", "held_out"]
LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "encodings", "__pycache__"}
HEADERS = ("c10", "torch/csrc/api")
COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)


def part_of(domain: str, name: str) -> Part:
    """Return which part a document belongs to."""
    turn = int(hashlib.sha256(f"{domain}/{name}".encode()).hexdigest(), 16) % PARTS_OF
    return "held_out" if turn == 0 else "calibration" if turn == 1 else "train"


def documents(domain: str) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of every document of a domain, sorted by name."""
    yield from {"code": _code, "headers": _headers, "prose": _prose, "mathematics": _mathematics}[domain]()


def _modules() -> Iterator[tuple[str, ast.Module]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = {file.relative_to(root).as_posix(): file for file in root.rglob("*.py")}
    for name in sorted(found):
        if LEFT_OUT & set(Path(name).parts):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                yield name, ast.parse(found[name].read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError):
                continue


WITH_DOCSTRING = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def _code() -> Iterator[tuple[str, str]]:
    for name, tree in _modules():
        for node in ast.walk(tree):
            if isinstance(node, WITH_DOCSTRING) and ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:] or [ast.Pass()]
        text = ast.unparse(tree)
        if len(text) > 200:
            yield name, text + "\n"


def _headers() -> Iterator[tuple[str, str]]:
    root = Path(torch.__file__).parent / "include"
    files = [file for folder in HEADERS for file in (root / folder).rglob("*.h")]
    for file in sorted(files, key=lambda file: file.relative_to(root).as_posix()):
        text = COMMENT.sub("", file.read_text(encoding="utf-8", errors="replace"))
        text = "\n".join(line.rstrip() for line in text.splitlines() if line.strip())
        if len(text) > 200:
            yield file.relative_to(root).as_posix(), text + "\n"


def _prose() -> Iterator[tuple[str, str]]:
    from pydoc_data import topics

    for name in sorted(topics.topics):
        yield f"topic {name}", topics.topics[name].strip() + "\n"
    for name, tree in _modules():
        found = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, WITH_DOCSTRING)]
        kept = [text for text in found if ">>>" not in text and text.count(" ") > 12]
        if kept:
            yield name, "\n\n".join(kept) + "\n"


ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
    "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def in_words(number: int) -> str:
    """Return a number from 0 to 9999 in English words."""
    if number < 20:
        return ONES[number]
    if number < 100:
        return TENS[number // 10 - 2] + (f"-{ONES[number % 10]}" if number % 10 else "")
    size, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    rest = number % size
    return f"{in_words(number // size)} {name}" + (f" {in_words(rest)}" if rest else "")


def _exercise(draw: random.Random) -> str:
    a, b = draw.randint(0, 99), draw.randint(0, 99)
    kind = draw.randrange(6)
    if kind == 0:
        return f"{a} + {b} = {a + b}"
    if kind == 1:
        return f"{a + b} - {b} = {a}"
    if kind == 2:
        a, b = a % 13, b % 13
        return f"{a} x {b} = {a * b}"
    if kind == 3:
        return f"{in_words(a)} plus {in_words(b)} is {in_words(a + b)}"
    if kind == 4:
        relation = "more than" if a > b else "less than" if a < b else "equal to"
        return f"{in_words(a)} is {relation} {in_words(b)}"
    step = draw.randint(1, 9)
    return ", ".join(str(a + k * step) for k in range(8))


def _mathematics() -> Iterator[tuple[str, str]]:
    for number in range(EXERCISES):
        draw = random.Random(number)
        yield f"sheet {number:05d}", "\n".join(_exercise(draw) for _ in range(24)) + "\n"
