"""Text to measure perplexity and divergence on: every token of a source, in windows.

Running text is cut into windows of ``sequence_length`` tokens that do not overlap (the usual way of
measuring perplexity on a corpus), so that a long file counts as a whole. Of conversations, and of
prompts with responses, only the answer's tokens count; they are not cut apart, and what exceeds
the window is left out and counted.

Codes: as `surgeon.calibrate.data`, and E397 nothing is left to measure.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from surgeon.calibrate import data
from surgeon.calibrate.fields import Unfit, parts_of
from surgeon.calibrate.tokens import Encoder
from surgeon.checkpoint.header import printable
from surgeon.data.records import MAX_FINDINGS, Record, read_records
from surgeon.errors import InputError, SurgeonError, raise_all
from surgeon.evaluate.model import Described

SHIPPED = "shipped"
"""Names the text that comes with the package."""
SHIPPED_SAMPLES = 128


@dataclass(frozen=True)
class Passage:
    """One window: ids int64 [T]; tokens from ``first`` on are predicted and count (at least 1)."""

    ids: np.ndarray
    first: int

    @property
    def counted(self) -> int:
        return len(self.ids) - self.first


@dataclass(frozen=True)
class Texts:
    """Passages and what the result document says about them; ``limited`` when a limit left records out."""

    passages: tuple[Passage, ...]
    record: dict[str, Any]
    limited: bool
    warnings: tuple[str, ...] = ()


def load_texts(
    source: str, model: Described, encoder: Encoder, *, sequence_length: int, limit: int | None, seed: int = 0, offline: bool = False
) -> Texts:  # fmt: skip
    """Return a source as passages.

    Args:
        source: see `surgeon.data.records.read_records`, or "shipped": a balanced choice of
            `SHIPPED_SAMPLES` records of the text that comes with the package.
        encoder: the tokenizer.
        limit: first records only.

    Raises:
        InputError: E370 to E379, E397.
    """
    declared = model.text.get("max_position_embeddings")
    if isinstance(declared, int) and 1 < declared < sequence_length:
        sequence_length = declared
    if source == SHIPPED:
        return _shipped(model, encoder, sequence_length, limit, seed)
    records = read_records(source, offline=offline)
    chosen = records.records[:limit] if limit else records.records
    passages: list[Passage] = []
    findings: list[SurgeonError] = []
    counts = {"truncated": 0, "dropped": 0}
    for record in chosen:
        try:
            passages.extend(_passages(record, encoder, sequence_length, counts))
        except Unfit as unfit:
            findings.append(
                InputError(
                    "E374", f"the record cannot be used: {unfit.reason}", where=record.where, help=unfit.help
                )
            )
            if len(findings) >= MAX_FINDINGS:
                break
    raise_all(findings)
    if not passages:
        raise InputError("E397", f"{printable(records.label)} has no token to predict", help="give records with text, or prompts with responses")  # fmt: skip
    _check_ids(passages, model)
    found = {
        "name": records.label, "sha256": records.sha256, "kind": records.kind, "records": len(chosen),
        "sequence_length": sequence_length, **_counted(passages), **counts,
    }  # fmt: skip
    return Texts(tuple(passages), found, len(chosen) < len(records.records), records.notes)


def _shipped(model: Described, encoder: Encoder, sequence_length: int, limit: int | None, seed: int) -> Texts:
    count = min(limit or SHIPPED_SAMPLES, SHIPPED_SAMPLES)
    found = data.load(
        None, model.path, samples=count, sequence_length=sequence_length, seed=seed, template=encoder.template
    )
    passages = [Passage(s.ids, max(1, s.answer_start)) for s in found.samples]
    keep = {k: found.record[k] for k in ("name", "sha256", "kind", "truncated", "dropped")}
    record = {**keep, "records": len(passages), "sequence_length": sequence_length, **_counted(passages)}
    return Texts(tuple(passages), record, count < SHIPPED_SAMPLES, found.warnings)


def _passages(record: Record, encoder: Encoder, length: int, counts: dict[str, int]) -> list[Passage]:
    """Return the windows of one record."""
    parts = parts_of(record.values)
    if parts.answer is not None:
        ids, start = encoder.exchange(parts.history, parts.answer, parts.thinking)
        counts["truncated"] += len(ids) > length
        ids, start = ids[:length], max(1, start)
        if start >= len(ids):
            counts["dropped"] += 1
            return []
        return [Passage(ids, start)]
    ids = encoder.exchange(parts.history, None)[0] if parts.history else encoder.text(parts.text)
    kept = [
        Passage(window, 1)
        for window in _windows(ids, length, encoder.tokenizer.bos_token_id)
        if len(window) > 1
    ]
    counts["dropped"] += not kept
    return kept


def _windows(ids: np.ndarray, length: int, bos: int | None) -> list[np.ndarray]:
    """Cut tokens into windows; where the tokenizer begins a text with BOS, every window begins with it.

    Some families (Gemma) predict next to nothing without it.
    """
    if bos is None or not len(ids) or int(ids[0]) != bos or length < 3:
        return [ids[i : i + length] for i in range(0, len(ids), length)]
    rest = ids[1:]
    return [np.concatenate([ids[:1], rest[i : i + length - 1]]) for i in range(0, len(rest), length - 1)]


def _check_ids(passages: list[Passage], model: Described) -> None:
    rows = model.text.get("vocab_size")
    highest = max(int(p.ids.max()) for p in passages)
    if isinstance(rows, int) and highest >= rows:
        raise InputError("E377", f"the tokenizer of {model.name} gives id {highest:,}, its embedding has {rows:,} rows",
                         help="the tokenizer belongs to another model")  # fmt: skip


def _counted(passages: list[Passage]) -> dict[str, Any]:
    digest = hashlib.sha256()
    for passage in passages:
        digest.update(np.asarray([passage.first, *passage.ids], dtype="<i8").tobytes())
    return {
        "passages": len(passages),
        "tokens": sum(p.counted for p in passages),
        "ids_sha256": digest.hexdigest(),
    }
