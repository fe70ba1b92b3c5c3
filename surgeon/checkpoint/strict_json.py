"""Reading JSON files that come with a model: bounded, strict, with the file named in errors."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from surgeon.checkpoint.header import open_regular, printable
from surgeon.errors import InputError, Where

MAX_JSON_BYTES = 64_000_000
"""tokenizer.json of a 260,000-token vocabulary is 35 MB; configs and indices are far smaller."""


def read_bytes(path: Path, limit: int = MAX_JSON_BYTES) -> bytes:
    """Read a whole regular file, refusing one above ``limit`` bytes (E308)."""
    descriptor = open_regular(path)
    try:
        size = os.fstat(descriptor).st_size
        if size > limit:
            raise InputError(
                "E308",
                f"{path.name} has {size:,} bytes; at most {limit:,} are read",
                where=Where(str(path)),
                help="no file of its kind is that large; fetch it again",
            )
        with os.fdopen(os.dup(descriptor), "rb") as stream:
            return stream.read(limit + 1)
    finally:
        os.close(descriptor)


def read_json_object(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read one JSON object; refuse duplicates, NaN, a byte order mark, other top levels (E308)."""

    def fail(reason: str) -> InputError:
        return InputError(
            "E308",
            f"{path.name} is not valid: {reason}",
            where=Where(str(path)),
            help="the file is damaged; fetch it again",
        )

    def unique(pairs):
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            twice = sorted({name for name in names if names.count(name) > 1})[0] if len(names) < 5000 else "?"
            raise fail(f'the key "{printable(twice)}" occurs twice')
        return result

    def constant(name):
        raise fail(f"{name} is not JSON")

    raw = read_bytes(path, limit)
    if not raw.strip():
        raise fail("it is empty")
    if raw.startswith(b"\xef\xbb\xbf"):
        raise fail("it starts with a byte order mark")
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except UnicodeDecodeError as error:
        raise fail(f"it is not UTF-8 (byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise fail(str(error)) from None
    if not isinstance(value, dict):
        raise fail(f"it holds {type(value).__name__}, not an object")
    return value
