r"""Is a reply right: exact text, a number, or a regular expression.

Only what stands after the last ``</think>`` is looked at; a reply that opens ``<think>`` and never
closes it has no answer. An answer is taken from the last of ``\boxed{...}``, ``#### ...`` or
``answer: ...`` in it, else (numbers only) from its last number.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

TOLERANCE = 1e-4
"""Relative; for expected values that are no integers. Integers must be met exactly."""

_MARKER = re.compile(
    r"####|(?:\banswer|\bAnswer|\bANSWER)(?:\s+is)?\s*(?::|=)|\b[Aa]nswer\s+is\b|\\boxed\s*(?=\{)|\\fbox\s*(?=\{)"
)
_MINUS = str.maketrans(
    {
        "−": "-",
        "–": "-",
        "‐": "-",
        "‑": "-",
        "﹣": "-",
        "－": "-",
        "\u00a0": " ",
        "\u202f": " ",
        "\u2009": " ",
    }
)
_LATEX = (
    (re.compile(r"\\[dtc]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r"(\1)/(\2)"),
    (re.compile(r"\\[dtc]?frac\s*(\d)\s*(\d)"), r"(\1)/(\2)"),
    (re.compile(r"\\!"), ""),
    (re.compile(r"\{,\}|\\[,;:]"), ","),
    (re.compile(r"\\(?:times|cdot) *"), "*"),
    (re.compile(r"× *"), "*"),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"\\\$|[$€£]"), ""),
    (re.compile(r"\\(?:left|right)(?![a-z])"), ""),
)
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?![\d])|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d+)?|\.\d+)"
_POWER = r"(?:[eE][+-]?\d{1,3}(?!\d)| *\* *10 *\^ *\{? *(?P<power>[+-]?\d{1,3}) *\}?)?"
_SIGN = r"(?:(?<![\w)\]}.,])[+-])?"
_NUMBER = re.compile(
    rf"(?P<sign>{_SIGN})(?:"
    rf"(?P<whole>\d+) +(?P<top>\d+) */ *(?P<bottom>\d+)(?![\d.])"
    rf"|\(?(?P<num>-? ?{_DECIMAL})\)? */ *\(?(?P<den>-? ?{_DECIMAL})\)?(?![\w])"
    rf"|(?P<value>{_DECIMAL}){_POWER}"
    rf")(?P<percent> *%)?"
)
_LONGEST = 300
"""Digits: longer strings are no answers, and exact arithmetic on them costs time without bound."""
_SPACE = re.compile(r"\s+")


def answer_part(reply: str) -> str | None:
    """Return what follows the reasoning; None when the reasoning never ended."""
    _, sign, after = reply.rpartition("</think>")
    if sign:
        return after
    return None if "<think>" in reply else after


def marked(text: str) -> str | None:
    r"""Return what the last marker of an answer announces: the content of \boxed{}, or the rest of the text."""
    found = list(_MARKER.finditer(text))
    if not found:
        return None
    last = found[-1]
    rest = text[last.end() :]
    return _braced(rest) if "box" in last.group() else rest


def _braced(text: str) -> str:
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[1:i]
    return text[1:]


def numbers(text: str) -> list[tuple[Fraction, bool]]:
    """Return all numbers of a text in order, each with whether a percent sign follows it."""
    found = []
    for match in _NUMBER.finditer(_clean(text)):
        value = _value(match)
        if value is not None:
            found.append((value, match["percent"] is not None))
    return found


def _value(match: re.Match[str]) -> Fraction | None:
    if len(match.group()) > _LONGEST:
        return None
    sign = -1 if "-" in match["sign"] else 1
    if match["whole"]:
        bottom = int(match["bottom"])
        return sign * (int(match["whole"]) + Fraction(int(match["top"]), bottom)) if bottom else None
    if match["num"]:
        den = _plain(match["den"])
        return sign * _plain(match["num"]) / den if den else None
    text = match.group()[len(match["sign"]) :].split("*")[0].rstrip("% ")
    value = _plain(text)
    if match["power"]:
        value *= Fraction(10) ** int(match["power"])
    return sign * value


def _plain(text: str) -> Fraction:
    return Fraction("".join(text.replace(",", "").split()))


def number_of(text: str) -> tuple[Fraction, bool] | None:
    """Parse a text that is one number and nothing else ("$1,200", "12 %"); else None."""
    found = numbers(text)
    rest = _NUMBER.sub("", _clean(text), count=1).strip()
    return found[0] if len(found) == 1 and rest in {"", "."} else None


def _clean(text: str) -> str:
    plain = text.translate(_MINUS)
    for pattern, replacement in _LATEX:
        plain = pattern.sub(replacement, plain)
    return plain


def numeric(reply: str, expected: Sequence[tuple[Fraction, bool]], tolerance: float = TOLERANCE) -> bool:
    """Say whether a reply's number is one of the accepted ones.

    After a marker the first number counts, without one the last number of the reply. A percentage is
    its number and a hundredth of it: "50 %" meets 50 and 0.5.
    """
    part = answer_part(reply)
    if part is None:
        return False
    announced = marked(part)
    found = numbers(part if announced is None else announced)
    if not found:
        return False
    chosen = found[-1] if announced is None else found[0]
    return any(_near(a, b, tolerance) for e in expected for b in _meanings(*e) for a in _meanings(*chosen))


def _meanings(value: Fraction, percent: bool) -> tuple[Fraction, ...]:
    return (value, value / 100) if percent else (value,)


def _near(value: Fraction, expected: Fraction, tolerance: float) -> bool:
    if value == expected:
        return True
    if expected.denominator == 1:
        return False
    return abs(value - expected) <= Fraction(tolerance) * abs(expected)


def normalise(text: str, ignore_case: bool = False) -> str:
    """Return a text with blanks at its ends removed and inner ones made single."""
    text = _SPACE.sub(" ", text).strip()
    return text.casefold() if ignore_case else text


def exact(reply: str, expected: Sequence[str], ignore_case: bool = False) -> bool:
    """Say whether the reply, or the line its last marker announces, is one of the accepted texts."""
    part = answer_part(reply)
    if part is None:
        return False
    candidates = {normalise(part, ignore_case)}
    announced = marked(part)
    if announced is not None:
        line = normalise(announced.strip().partition("\n")[0], ignore_case)
        candidates |= {line, line.removesuffix(".")}
    return any(normalise(e, ignore_case) in candidates for e in expected)


def matches_pattern(
    reply: str, pattern: re.Pattern[str] | None, expected: Sequence[str], ignore_case: bool = False
) -> bool:
    """Say whether a regular expression's last hit (its first group, or all of it) is an accepted answer.

    Without a pattern each accepted answer is one itself, and a hit anywhere is right.
    """
    part = answer_part(reply)
    if part is None:
        return False
    if pattern is None:
        flags = re.IGNORECASE if ignore_case else 0
        return any(re.search(e, part, flags) for e in expected)
    hits = list(pattern.finditer(part))
    if not hits:
        return False
    taken = hits[-1].group(1) if pattern.groups else hits[-1].group()
    if taken is None:
        return False
    values = [number_of(e) for e in expected]
    mine = number_of(taken)
    if mine is not None and all(v is not None for v in values):
        return any(
            _near(a, b, TOLERANCE) for v in values if v for b in _meanings(*v) for a in _meanings(*mine)
        )
    return any(normalise(taken, ignore_case) == normalise(e, ignore_case) for e in expected)
