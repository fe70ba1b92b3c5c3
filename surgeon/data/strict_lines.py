"""JSON lines and JSON lists, read strictly: every finding names its line.

Python's json module accepts more than JSON: duplicate keys (the last wins in silence), NaN and
Infinity, numbers that overflow to infinity, halves of surrogate pairs that no tokenizer can
encode. All of these are findings here.
"""

from __future__ import annotations

import io
import json
import math
from typing import Any, NoReturn

from surgeon.checkpoint.header import printable
from surgeon.data.records import MAX_FINDINGS, Record
from surgeon.errors import InputError, SurgeonError, Where

_HELP = "a record is one JSON object per line, in UTF-8"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f'the key "{printable(name[:60])}" occurs twice')
            seen.add(name)
    return result


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_constant, parse_float=_number)


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        return error.msg[:1].lower() + error.msg[1:]
    if "int_max_str_digits" in str(error) or "integer string conversion" in str(error):
        return "a number has too many digits"
    return str(error)


def _checked(value: Any, escaped: bool) -> dict[str, Any]:
    if not isinstance(value, dict):
        kind = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}.get(
            type(value), "a number"
        )
        raise ValueError(f"it is {kind}, not an object")
    if escaped:  # only an escape can smuggle half a surrogate pair past the UTF-8 decoder
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("it has half a surrogate pair, which is no character") from None
    return value


def _finding(file: str, line: int, column: int | None, reason: str, help: str = _HELP) -> InputError:
    return InputError(
        "E371", f"line {line} is not a record: {reason}", where=Where(file, line, column), help=help
    )


def parse_lines(raw: bytes, file: str, findings: list[SurgeonError]) -> list[Record]:
    """Parse JSON lines; blank lines are allowed, CR before LF too.

    Args:
        raw: the whole file.
        file: for messages.
        findings: what is wrong is appended, `MAX_FINDINGS` at most; then reading stops.
    """
    records = []
    for line, part in enumerate(io.BytesIO(raw), 1):
        part = part.strip(b" \t\r\n")
        if not part:
            continue
        try:
            text = part.decode("utf-8")
            value, end = _DECODER.raw_decode(text)
            if end != len(text):
                raise json.JSONDecodeError("more text follows the object", text, end)
            records.append(Record(_checked(value, "\\u" in text), line, file))
        except UnicodeDecodeError as error:
            findings.append(_finding(file, line, None, f"it is not UTF-8 (byte {error.start} of the line)"))
        except json.JSONDecodeError as error:
            help = _HELP
            if part == b"{" and line == 1:
                help = "an object over several lines is not JSON lines: write each record on one line, or a JSON list"
            findings.append(_finding(file, line, error.pos + 1, _reason(error), help))
        except (ValueError, RecursionError) as error:
            findings.append(_finding(file, line, None, _reason(error)))
        if len(findings) >= MAX_FINDINGS:
            break
    return records


def parse_list(raw: bytes, file: str, findings: list[SurgeonError]) -> list[Record]:
    """Parse a JSON list of objects; a record's line is where the object starts. See `parse_lines`.

    After a syntax error the rest cannot be told apart any more, so reading stops there.
    """
    records: list[Record] = []
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        findings.append(_finding(file, line, None, f"it is not UTF-8 (byte {error.start} of the file)"))
        return records
    counter = _Lines(text)
    at = _skip(text, 0) + 1
    first = True
    while True:
        at = _skip(text, at)
        line = counter.line(at)
        if text[at : at + 1] == "]":
            break
        if not first:
            if text[at : at + 1] != ",":
                findings.append(_finding(file, line, None, 'a "," or the closing "]" of the list is missing'))
                return records
            at = _skip(text, at + 1)
            line = counter.line(at)
        first = False
        try:
            value, end = _DECODER.raw_decode(text, at)
        except json.JSONDecodeError as error:
            findings.append(_finding(file, counter.line(error.pos), None, _reason(error)))
            return records
        except (ValueError, RecursionError) as error:
            findings.append(_finding(file, line, None, _reason(error)))
            return records
        try:
            records.append(Record(_checked(value, "\\u" in text[at:end]), line, file))
        except ValueError as error:
            findings.append(_finding(file, line, None, _reason(error)))
            if len(findings) >= MAX_FINDINGS:
                return records
        at = end
    rest = _skip(text, at + 1)
    if rest != len(text):
        findings.append(_finding(file, counter.line(rest), None, "more text follows the list"))
    return records


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


class _Lines:
    """Line numbers of growing positions, each stretch of text counted once."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._position = 0
        self._line = 1

    def line(self, position: int) -> int:
        if position >= self._position:
            self._line += self._text.count("\n", self._position, position)
            self._position = position
            return self._line
        return self._text.count("\n", 0, position) + 1
