"""Questions with known answers, read from the user's file.

One record: ``question`` (or ``prompt``, or ``messages``), ``answer`` (text, a number, or a list of
accepted ones), and optionally ``match`` (exact, numeric, regex), ``pattern``, ``tolerance``,
``ignore_case``, ``domain``, ``system``.

Codes: E228 a match rule that does not exist, E390 a record that is no question, E391 an answer its
match rule cannot use.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from surgeon.checkpoint.header import printable
from surgeon.data.records import MAX_FINDINGS, Record, parse_sources, read_records
from surgeon.errors import InputError, SurgeonError, UsageError, raise_all
from surgeon.evaluate import matching

RULES = ("exact", "numeric", "regex")
_ASKED = ("question", "prompt", "messages")
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Rule:
    """How replies to one question are judged."""

    match: str
    accepted: tuple[str, ...]
    numbers: tuple[tuple[Fraction, bool], ...] = ()
    pattern: re.Pattern[str] | None = None
    tolerance: float = matching.TOLERANCE
    ignore_case: bool = False

    def judges(self, reply: str) -> bool:
        """Say whether a reply is right."""
        if self.match == "numeric":
            return matching.numeric(reply, self.numbers, self.tolerance)
        if self.match == "regex":
            return matching.matches_pattern(reply, self.pattern, self.accepted, self.ignore_case)
        return matching.exact(reply, self.accepted, self.ignore_case)

    def plain(self) -> list[Any]:
        pattern = self.pattern.pattern if self.pattern else None
        return [self.match, list(self.accepted), pattern, self.tolerance, self.ignore_case]


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        messages: role and content; the last one is the user's.
        rule: how replies are judged; None when only lengths are measured.
        key: sha256 of what is asked and of how often it was asked before; names it in every model's results.
        domain: from the record, else the name its file was given.
        line, file: where it stands.
    """

    messages: tuple[tuple[str, str], ...]
    rule: Rule | None
    key: str
    domain: str = ""
    line: int = 0
    file: str = ""

    @property
    def chat(self) -> list[dict[str, str]]:
        return [{"role": role, "content": content} for role, content in self.messages]


@dataclass(frozen=True)
class QuestionSet:
    """All questions of a run, in file order; ``total`` counts those a limit left out, too."""

    questions: tuple[Question, ...]
    record: dict[str, Any] = field(default_factory=dict)
    total: int = 0
    notes: tuple[str, ...] = ()

    @property
    def limited(self) -> bool:
        return len(self.questions) < self.total


def read_questions(
    sources: Sequence[str], *, match: str | None = None, answers: bool = True, limit: int | None = None, offline: bool = False
) -> QuestionSet:  # fmt: skip
    """Read question files.

    Args:
        sources: ``FILE`` or ``NAME=FILE``; the name is the domain of questions that give none.
        match: default rule: exact, numeric, regex, or ``regex:PATTERN``. None decides by the answers:
            numeric when all of them are numbers.
        answers: False when only lengths are measured: answers may be missing.
        limit: first questions of every file.

    Raises:
        UsageError: E222, E228. InputError: E370 to E373, E390, E391.
    """
    default = _default(match)
    found: list[Question] = []
    files, notes, total = [], [], 0
    seen: dict[str, int] = {}
    findings: list[SurgeonError] = []
    for name, source in parse_sources(sources):
        records = read_records(source, offline=offline)
        notes.extend(records.notes)
        total += len(records.records)
        chosen = records.records[:limit] if limit else records.records
        for record in chosen:
            try:
                found.append(_question(record, default, answers, name or "", seen))
            except InputError as error:
                findings.append(error)
                if len(findings) >= MAX_FINDINGS:
                    raise_all(findings)
        files.append(
            {
                "name": name or records.label,
                "file": records.label,
                "sha256": records.sha256,
                "questions": len(chosen),
            }
        )
    raise_all(findings)
    digest = hashlib.sha256()
    for q in found:
        digest.update(f"{q.key} {json.dumps(q.rule.plain() if q.rule else None)}\n".encode())
    record = {"name": ", ".join(f["name"] for f in files), "sha256": digest.hexdigest(), "questions": len(found), "files": files}  # fmt: skip
    return QuestionSet(tuple(found), record, total, tuple(notes))


def _default(match: str | None) -> tuple[str | None, re.Pattern[str] | None]:
    if match is None:
        return None, None
    rule, sign, pattern = match.partition(":")
    if rule not in RULES or (sign and rule != "regex") or (sign and not pattern):
        raise UsageError(
            "E228", f'--match is "{printable(match)}"', help="exact, numeric, regex, or regex:PATTERN"
        )
    if not sign:
        return rule, None
    try:
        return rule, re.compile(pattern)
    except re.error as error:
        raise UsageError("E228", f'--match has a pattern that is no regular expression: {error}',
                         help="its first group, or the whole hit, is compared with the answer") from None  # fmt: skip


def _question(record: Record, default: tuple[str | None, re.Pattern[str] | None], answers: bool, name: str, seen: dict[str, int]) -> Question:  # fmt: skip
    values = record.values
    messages = _messages(record)
    rule = _rule(record, default) if answers or "answer" in values else None
    asked = hashlib.sha256(json.dumps(messages, ensure_ascii=False).encode()).hexdigest()
    seen[asked] = seen.get(asked, 0) + 1
    key = hashlib.sha256(f"{asked} {seen[asked]}".encode()).hexdigest()[:32]
    domain = _text(record, "domain") or name
    return Question(messages, rule, key, domain, record.line, record.file)


def _bad(record: Record, message: str, help: str | None = None, code: str = "E390") -> InputError:
    return InputError(code, message, where=record.where, help=help)


def _shown(value: Any) -> str:
    return printable(json.dumps(value, ensure_ascii=False))[:60]


def _text(record: Record, field: str) -> str:
    value = record.values.get(field)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _bad(record, f'"{field}" is {_shown(value)}, not a text', "put it in double quotes")
    return value


def _messages(record: Record) -> tuple[tuple[str, str], ...]:
    values = record.values
    given = [f for f in _ASKED if values.get(f) is not None]
    if len(given) != 1:
        shown = ", ".join(printable(str(k)) for k in list(values)[:6])
        reason = "has no question" if not given else f"has {' and '.join(given)}"
        raise _bad(record, f"the record {reason}; it has {shown or 'no fields'}", 'one of "question", "prompt" or "messages"')  # fmt: skip
    if given == ["messages"]:
        messages = _turns(record, values["messages"])
    else:
        text = _text(record, given[0])
        if not text.strip():
            raise _bad(record, f'"{given[0]}" is empty', "remove the record, or write the question")
        messages = (("user", text),)
    system = _text(record, "system")
    if system and messages[0][0] == "system":
        raise _bad(record, 'the record has "system" and a system message', "keep one of the two")
    return (("system", system), *messages) if system else messages


def _turns(record: Record, turns: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(turns, list) or not turns:
        raise _bad(record, f'"messages" is {_shown(turns)}, not a list of messages',
                   '"messages": [{"role": "user", "content": "..."}]')  # fmt: skip
    found = []
    for i, turn in enumerate(turns, 1):
        role = turn.get("role") if isinstance(turn, dict) else None
        content = turn.get("content") if isinstance(turn, dict) else None
        if role not in _ROLES or not isinstance(content, str):
            raise _bad(record, f"message {i} is {_shown(turn)}, without a known role or a text as content",
                       f'{{"role": ..., "content": "text"}}; roles are {", ".join(_ROLES)}')  # fmt: skip
        found.append((role, content))
    if found[-1][0] != "user":
        raise _bad(record, f"the last message is the {found[-1][0]}'s; the model has nothing to answer",
                   'end with the user; the known answer belongs in "answer"')  # fmt: skip
    return tuple(found)


def _rule(record: Record, default: tuple[str | None, re.Pattern[str] | None]) -> Rule:
    values = record.values
    accepted = _accepted(record)
    match, pattern = default
    if values.get("match") is not None:
        match = values["match"]
        if match not in RULES:
            raise _bad(
                record, f'"match" is {printable(json.dumps(match))[:60]}', f"one of {', '.join(RULES)}"
            )
    if values.get("pattern") is not None:
        pattern = _compiled(record, _text(record, "pattern"))
        match = match if values.get("match") is not None else "regex"
        if match != "regex":
            raise _bad(record, f'"pattern" goes with the match rule regex, not {match}',
                       '"match": "regex", or leave out "pattern"')  # fmt: skip
    tolerance = values.get("tolerance", matching.TOLERANCE)
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or tolerance < 0:
        raise _bad(record, '"tolerance" is not a number of 0 or more', "relative: 0.01 accepts 1 % off")
    ignore_case = values.get("ignore_case", False)
    if not isinstance(ignore_case, bool):
        raise _bad(
            record,
            f'"ignore_case" is {_shown(ignore_case)}, neither true nor false',
            "true or false, without quotes",
        )
    parsed = [matching.number_of(text) for text in accepted]
    numeric = tuple(p for p in parsed if p is not None)
    if match is None:
        match = "numeric" if len(numeric) == len(accepted) else "exact"
    if match == "numeric" and len(numeric) < len(accepted):
        wrong = next(a for a, p in zip(accepted, parsed, strict=True) if p is None)
        raise _bad(record, f"the answer {printable(json.dumps(wrong, ensure_ascii=False))[:60]} is not a number",
                   '"match": "exact" compares texts', "E391")  # fmt: skip
    if match == "regex" and pattern is None:
        for text in accepted:
            _compiled(record, text)
    return Rule(
        match, accepted, numeric, pattern if match == "regex" else None, float(tolerance), ignore_case
    )


def _compiled(record: Record, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise _bad(record, f"{printable(json.dumps(pattern))[:60]} is not a regular expression: {error}",
                   'signs that mean themselves take a backslash, in JSON two: "\\\\$5"; "match": "exact" compares texts', "E391") from None  # fmt: skip


def _accepted(record: Record) -> tuple[str, ...]:
    answer = record.values.get("answer")
    if answer is None:
        raise _bad(
            record, 'the record has no "answer"', "give the known answer, or measure only lengths: --length"
        )
    texts = []
    for value in answer if isinstance(answer, list) else [answer]:
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise _bad(record, f'"answer" is {_shown(answer)}, neither a text nor a number nor a list of these',
                       '"answer": "42", or every text that counts as right: ["42", "forty-two"]')  # fmt: skip
        text = value if isinstance(value, str) else repr(value)
        # The answers of GSM8K are worked solutions; the result stands after the last "####".
        texts.append(text.rpartition("####")[2].strip() if isinstance(value, str) else text)
    if not texts or not all(t.strip() for t in texts):
        raise _bad(record, '"answer" is empty', "give the known answer, or remove the record")
    return tuple(texts)
