"""What was calibrated on, how much of it, and what it did not reach."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from surgeon.report.documents import number
from surgeon.report.figures import DASH
from surgeon.report.layers import Idle, mapping
from surgeon.report.runs import Step

PARTS = (("statistics", "Statistics"), ("search", "To compare plans"), ("held_out", "Held out"))


def rows(named: Sequence[tuple[str, Step]]) -> list[list[str]]:
    """Return one row for each step that read text: name, samples, tokens, their use, domains, what was left out."""
    found = []
    for name, step in named:
        record = mapping(step.document.get("calibration"))
        if record:
            found.append(
                [name, f"{record.get('name')} ({str(record.get('sha256') or DASH)[:12]})", _count(record, "samples"),
                 _count(record, "tokens"), _count(record, "sequence_length"), "; ".join(_uses(record)) or DASH,
                 ", ".join(_domains(record)) or DASH, "; ".join(_lost(record)) or DASH]
            )  # fmt: skip
    return found


HEADS = ("Step", "Text (sha256)", "Samples", "Tokens", "Longest", "Use", "Samples by domain", "Left out")
ALIGNMENT = "llrrrlll"


def _count(record: Mapping[str, Any], key: str) -> str:
    value = number(record.get(key))
    return DASH if value is None else f"{value:,.0f}"


def _uses(record: Mapping[str, Any]) -> Iterable[str]:
    for key, word in PARTS:
        part = mapping(record.get(key))
        if part:
            yield f"{word.lower()} {_count(part, 'tokens')} tokens of {_count(part, 'samples')} samples"


def _domains(record: Mapping[str, Any]) -> Iterable[str]:
    for name, count in mapping(record.get("domains")).items():
        value = number(count if not isinstance(count, Mapping) else count.get("samples"))
        if value is not None:
            yield f"{name or 'no domain'} {value:,.0f}"


def _lost(record: Mapping[str, Any]) -> Iterable[str]:
    requested, samples = number(record.get("requested")), number(record.get("samples"))
    if requested is not None and samples is not None and samples < requested:
        yield f"{requested - samples:,.0f} samples fewer than asked for"
    if number(record.get("truncated")):
        yield f"{_count(record, 'truncated')} cut at the end"
    if number(record.get("dropped")):
        why = ", ".join(
            f"{reason} {count}" for reason, count in mapping(record.get("dropped_because")).items()
        )
        yield f"{_count(record, 'dropped')} dropped" + (f" ({why})" if why else "")


def idle(name: str, found: tuple[Idle, ...] | None) -> list[str]:
    """Say which experts no token of the text reached; nothing where experts were not counted."""
    if found is None:
        return []
    if not found:
        return [f"{name}: every expert was given tokens"]
    count = sum(len(one.experts) for one in found)
    shown = "; ".join(
        f"layer {one.layer}: {', '.join(one.experts[:12])}{', …' if len(one.experts) > 12 else ''}"
        for one in found[:12]
    )
    more = f"; and in {len(found) - 12} more layers" if len(found) > 12 else ""
    return [f"{name}: {count:,} expert{' was' if count == 1 else 's were'} given no token ({shown}{more})"]
