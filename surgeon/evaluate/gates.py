"""Gates: ``METRIC OP EXPRESSION``, decided by numbers; NaN and what was not measured never pass.

    accuracy >= baseline - 0.02        tokens_mean <= 0.55 * baseline        perplexity <= 1.05 * ref

An expression has numbers, ``baseline`` (the same metric of --baseline), ``ref`` (of the --kl
reference), + - * / and parentheses. A number may have a unit: 2GB, 1.5GiB, 3B (parameters). In
front of the operator stands one metric's name.

Codes: E226 not a gate, or a metric that does not exist; E401 a gate failed, E402 it has no value.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from surgeon.checkpoint.header import printable
from surgeon.errors import CheckFailed, UsageError, close_matches

ALIASES = {"answer_length": "tokens_mean", "length": "tokens_mean", "ppl": "perplexity"}
OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": lambda a, b: a <= b,
    ">=": lambda a, b: a >= b,
    "==": lambda a, b: a == b,
    "<": lambda a, b: a < b,
    ">": lambda a, b: a > b,
}
_OPERATOR = re.compile(r"<=|>=|==|!=|=<|=>|<|>|=")
_TOKEN = re.compile(r"\s*(?:(\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?)|([A-Za-z_]\w*)|([-+*/()%]))")
_UNITS = {
    **{f"{letter}b": 1000.0**power for power, letter in enumerate("kmgt", 1)},
    **{f"{letter}ib": 1024.0**power for power, letter in enumerate("kmgt", 1)},
    "k": 1e3, "m": 1e6, "b": 1e9,
}  # fmt: skip
"""What may follow a number, in small letters: bytes, and counts of parameters."""
_NAMES = ("baseline", "ref")
_HELP = "a gate is METRIC OP EXPRESSION, such as 'accuracy >= baseline - 0.02' or 'perplexity <= 1.05 * ref'"


@dataclass(frozen=True)
class Gate:
    """A parsed gate; ``steps`` is its expression in reverse Polish order."""

    text: str
    metric: str
    operator: str
    steps: tuple[float | str, ...]

    @property
    def names(self) -> set[str]:
        """Which of `baseline` and `ref` it uses."""
        return {s for s in self.steps if isinstance(s, str) and s in _NAMES}

    def threshold(self, values: Mapping[str, float]) -> float:
        """Return the expression's value; NaN when something in it has none or a divisor is 0."""
        stack: list[float] = []
        for step in self.steps:
            if not isinstance(step, str):
                stack.append(step)
            elif step in _NAMES:
                stack.append(values.get(step, math.nan))
            elif step == "negate":
                stack.append(-stack.pop())
            else:
                right, left = stack.pop(), stack.pop()
                stack.append(_apply(step, left, right))
        return stack[0]

    def decide(self, value: float | None, values: Mapping[str, float]) -> dict[str, Any]:
        """Compare; return text, passed, value and threshold (null where there is none)."""
        threshold = self.threshold(values)
        number = math.nan if value is None else float(value)
        sound = math.isfinite(number) and math.isfinite(threshold)
        return {
            "text": self.text, "metric": self.metric, "passed": sound and OPERATORS[self.operator](number, threshold),
            "value": number if math.isfinite(number) else None,
            "threshold": threshold if math.isfinite(threshold) else None,
        }  # fmt: skip


def _apply(operator: str, left: float, right: float) -> float:
    if operator == "+":
        return left + right
    if operator == "-":
        return left - right
    if operator == "*":
        return left * right
    return left / right if right else math.nan


def parse(text: str) -> Gate:
    """Parse one gate.

    Raises:
        UsageError: E226.
    """
    shown = printable(text)[:120]
    found = _OPERATOR.search(text)
    if found is None:
        raise UsageError("E226", f'"{shown}" is not a gate: it compares nothing', help=_HELP)
    if found.group() not in OPERATORS:
        raise UsageError("E226", f'"{shown}" is not a gate: "{found.group()}" is no comparison',
                         help=f"use one of {' '.join(OPERATORS)}")  # fmt: skip
    metric = text[: found.start()].strip()
    if not metric:
        raise UsageError(
            "E226", f'"{shown}" is not a gate: no metric stands before "{found.group()}"', help=_HELP
        )
    steps = _Parser(text[found.end() :], shown).parse()
    return Gate(" ".join(text.split()), ALIASES.get(metric, metric), found.group(), tuple(steps))


class _Parser:
    """Recursive descent over sums, products and factors; emits reverse Polish."""

    def __init__(self, text: str, shown: str) -> None:
        self.shown = shown
        self.tokens: list[tuple[str, str]] = []
        self.output: list[float | str] = []
        position = 0
        text = text.rstrip()
        while position < len(text):
            match = _TOKEN.match(text, position)
            if match is None:
                raise self.wrong(f'"{printable(text[position:].strip()[:12])}" is not understood')
            kind = "number" if match[1] else "name" if match[2] else "sign"
            self.tokens.append((kind, match[match.lastindex or 0]))
            position = match.end()
        self.at = 0
        self.depth = 0

    def wrong(self, reason: str) -> UsageError:
        return UsageError("E226", f'"{self.shown}" is not a gate: {reason}', help=_HELP)

    def parse(self) -> list[float | str]:
        self.sum()
        if self.at < len(self.tokens):
            raise self.wrong(f'"{self.tokens[self.at][1]}" is not expected there')
        return self.output

    def peek(self) -> str:
        return (
            self.tokens[self.at][1]
            if self.at < len(self.tokens) and self.tokens[self.at][0] == "sign"
            else ""
        )

    def unit(self) -> float:
        """Return what the number just read is multiplied with: 1, or its unit's size."""
        if self.at >= len(self.tokens) or self.tokens[self.at][0] != "name":
            return 1.0
        text = self.tokens[self.at][1]
        if text in _NAMES:
            raise self.wrong(f'"{text}" is not expected there')
        if text.lower() not in _UNITS:
            near = close_matches(text, ("KB", "MB", "GB", "TB", "GiB", "B"))
            raise self.wrong(
                f'"{printable(text)}" is no unit'
                + (f"; {near}" if near else "; units are MB, GB, GiB, and K, M, B of parameters")
            )
        self.at += 1
        return _UNITS[text.lower()]

    def sum(self) -> None:
        self.product()
        while self.peek() in {"+", "-"}:
            sign = self.tokens[self.at][1]
            self.at += 1
            self.product()
            self.output.append(sign)

    def product(self) -> None:
        self.factor()
        while self.peek() in {"*", "/"}:
            sign = self.tokens[self.at][1]
            self.at += 1
            self.factor()
            self.output.append(sign)

    def factor(self) -> None:
        if self.at >= len(self.tokens):
            raise self.wrong("the expression ends too early")
        kind, text = self.tokens[self.at]
        self.at += 1
        self.depth += 1
        if self.depth > 50:
            raise self.wrong("it is nested too deeply")
        if kind == "number":
            self.output.append(float(text) * self.unit())
            if self.peek() == "%":
                raise self.wrong("percentages are written as numbers, 2 % is 0.02")
        elif kind == "name":
            if text not in _NAMES:
                near = close_matches(text, _NAMES)
                raise self.wrong(f'"{printable(text)}" is neither a number nor baseline nor ref' + (f"; {near}" if near else ""))  # fmt: skip
            self.output.append(text)
        elif text == "(":
            self.sum()
            if self.peek() != ")":
                raise self.wrong('a ")" is missing')
            self.at += 1
        elif text in "+-":
            self.factor()
            if text == "-":
                self.output.append("negate")
        else:
            raise self.wrong(f'"{text}" is not expected there')
        self.depth -= 1


def check_metrics(gates: Iterable[Gate], known: Iterable[str], *, open_ended: bool) -> None:
    """Refuse gates on metrics this run does not measure.

    Args:
        known: what will be measured.
        open_ended: tasks run, whose metrics are known only afterwards ("task:...").

    Raises:
        UsageError: E226.
    """
    names = sorted(known)
    for gate in gates:
        if gate.metric in names or (open_ended and gate.metric.startswith("task:")):
            continue
        near = close_matches(gate.metric, [*names, *(a for a, m in ALIASES.items() if m in names)])
        raise UsageError("E226", f'the gate "{printable(gate.text)[:80]}" needs {printable(gate.metric)[:60]}, which this run does not measure',
                         help=near or f"it measures {', '.join(names) or 'nothing'}")  # fmt: skip


def failures(results: Iterable[Mapping[str, Any]]) -> list[CheckFailed]:
    """Return one error per gate that did not pass."""
    found = []
    for gate in results:
        if gate["passed"]:
            continue
        value, threshold = gate["value"], gate["threshold"]
        if value is None or threshold is None:
            what = f"{gate['metric']} has no value" if value is None else "its threshold has no value"
            found.append(CheckFailed("E402", f'gate "{printable(gate["text"])}" cannot pass: {printable(what)}',
                                     help="NaN, or a metric that was not measured, never passes"))  # fmt: skip
        else:
            found.append(
                CheckFailed(
                    "E401",
                    f'gate "{printable(gate["text"])}" failed: {value:.6g}, threshold {threshold:.6g}',
                    help="change the model, or the gate where this value will do",
                )
            )
    return found
