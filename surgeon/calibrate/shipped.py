"""The calibration text that comes with the package, for runs without --calibration.

Prose, code, mathematics and conversations, about 1 MB; texts/README.md says where each part
comes from and under which licence. `VERSION` changes whenever a byte of it does.
"""

from __future__ import annotations

from pathlib import Path

from surgeon.calibrate.fields import has_answer
from surgeon.data.records import Record, Records, read_records

VERSION = "1"
NAME = f"surgeon shipped text {VERSION}"
FOLDER = Path(__file__).parent / "texts"
DOMAINS = ("chat", "code", "mathematics", "prose")


def shipped_records(answer: str = "response") -> Records:
    """Return the shipped records that have the answer ``answer``.

    With "short" or "long" that is the mathematics: every question has both. With "response" a
    mathematical question is answered at length.
    """
    found = read_records(str(FOLDER))
    records = tuple(
        record
        for record in (_responding(r) if answer == "response" else r for r in found.records)
        if answer == "response" or has_answer(record.values, answer)
    )
    return Records(records, NAME, found.sha256, found.kind)


def _responding(record: Record) -> Record:
    if "long" not in record.values:
        return record
    return Record({**record.values, "response": record.values["long"]}, record.line, record.file)
