"""Calibration data: which records, as which tokens, and what is written down about it.

`load` reads a source (or the text that comes with the package), picks records by a permutation
that depends on the seed and their number alone, tokenises them with the model's tokenizer and
returns samples. What was cut, dropped or could not be found is counted in the record that goes
into manifests; nothing of it happens in silence.

Codes: E223 a setting out of range; E374 a record without the right fields, E375 no tokenizer,
E376 the chat template refuses, E377 token ids beyond the model's vocabulary, E378 nothing left.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from surgeon.calibrate.fields import ANSWERS, Parts, Unfit, parts_of
from surgeon.calibrate.packing import packed, passages
from surgeon.calibrate.tokens import Encoder, load_encoder
from surgeon.checkpoint.header import printable
from surgeon.checkpoint.strict_json import read_json_object
from surgeon.data.records import MAX_FINDINGS, Record, Records, read_records
from surgeon.errors import InputError, SurgeonError, UsageError, Where, raise_all
from surgeon.seeds import stream_key, uniform

FEW_TOKENS = 1000
"""Below this a set is used, but the user is told that its statistics say little."""

Source = str | os.PathLike[str] | Sequence[tuple[str | None, str]] | None


@dataclass(frozen=True)
class Sample:
    """One sequence of tokens.

    Attributes:
        ids: int64 [T], T at least 2.
        answer_start: index of the first token of the answer; 0 when all is text.
        domain: "" when the source names none.
        line: line of the record in its file; 0 for packed and random samples.
    """

    ids: np.ndarray
    answer_start: int
    domain: str = ""
    line: int = 0


@dataclass(frozen=True)
class CalibrationSet:
    """Samples and what a manifest says about them.

    Attributes:
        samples: in the order of selection; where domains are balanced, they alternate.
        record: plain data without paths: name, sha256, kind, records, requested, samples, tokens,
            truncated, dropped, dropped_because, sequence_length, template, pack, answer, seed,
            domains, ids_sha256.
        warnings: sentences for the user.
    """

    samples: tuple[Sample, ...]
    record: dict[str, Any]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Entry:
    """A record that may be chosen: its parts, the domain it counts for, whether it is a text file."""

    record: Record
    parts: Parts
    domain: str
    file: bool = False


def load(
    source: Source,
    folder: Path,
    *,
    samples: int = 128,
    sequence_length: int = 2048,
    seed: int = 0,
    pack: bool = False,
    template: bool = True,
    answer: str = "response",
    offline: bool = False,
    split: str | None = None,
    rows: int | None = None,
) -> CalibrationSet:
    """Return calibration samples for the model whose tokenizer lies in ``folder``.

    Args:
        source: see `surgeon.data.records.read_records`; or several as (domain or None, source),
            named domains being sampled evenly; None for the text that comes with the package,
            sampled evenly over its domains.
        folder: the model folder, with a tokenizer.
        samples: records to pick; with ``pack`` blocks to fill. Fewer are a warning, none an error.
        sequence_length: tokens of a sample at most. At most the model's max_position_embeddings;
            a larger value is lowered to it, with a warning.
        seed: of the selection.
        pack: concatenate texts, EOS between them, into blocks of exactly ``sequence_length``
            tokens (as AIM calibrates: arXiv 2502.02421, released code, blocks of 512). Long texts
            are cut into passages first, so that a book contributes from everywhere. A domain's
            last, incomplete block is left out unless there would be no block at all.
        template: apply the tokenizer's chat template where it has one. Otherwise prompt and
            answer follow each other, on lines of their own unless white space separates them.
        answer: the field that holds the answer: "response", or "short" or "long" of long-to-short
            data. See `surgeon.calibrate.fields` for the names that are understood.
        offline: never touch the network.
        split: of a dataset.
        rows: rows of the model's embedding; default: vocab_size of its config.json.

    Raises:
        UsageError: E222, E223. InputError: E370 to E379. EnvironmentFault: E502, E512, E521, E522, E524.
    """
    _check(samples, sequence_length, answer)
    encoder = load_encoder(Path(folder), template=template)
    config = _config(Path(folder))
    warnings: list[str] = []
    sequence_length = _fitting(sequence_length, config, warnings)
    rows = rows if rows is not None else _whole(config, "vocab_size")
    sources = _read(source, answer, split, offline)
    for _, records in sources:
        warnings += records.notes
    entries = _entries(sources, answer)
    balanced = source is None or any(domain for domain, _ in sources)
    counts = {"truncated": 0, "empty": 0, "short": 0, "answer": 0}
    if pack:
        chosen = _packed(entries, encoder, samples, sequence_length, seed, balanced, rows, counts)
    else:
        queues = _queues([e.domain if balanced else "" for e in entries], seed)
        chosen = _picked(
            queues, samples, lambda number: _sample(entries[number], encoder, sequence_length, rows, counts)
        )
    if not chosen:
        raise _nothing_left(sources, counts, sequence_length)
    record = _record(sources, chosen, counts)
    record |= {
        "requested": samples,
        "sequence_length": sequence_length,
        "template": encoder.template and any(not e.parts.text for e in entries),
        "pack": pack,
        "answer": answer,
        "seed": seed,
    }
    warnings += _remarks(record, entries, sources, sequence_length)
    return CalibrationSet(tuple(chosen), record, tuple(warnings))


def random_tokens(vocab: int, samples: int, length: int, seed: int) -> CalibrationSet:
    """Return samples of uniformly random ids in [0, vocab), for methods that need no data.

    Special tokens are not left out. Id i of sample s is a function of (seed, s, i) alone.
    """
    _check(samples, length, "response")
    if vocab < 1:
        raise UsageError("E223", f"a vocabulary of {vocab} tokens", help="the rows of the model's embedding")
    made = []
    for number in range(samples):
        draws = uniform(stream_key(seed, number, "random tokens"), 0, length)
        made.append(Sample(np.minimum((draws * vocab).astype(np.int64), vocab - 1), 0))
    record = {
        "name": "random tokens", "kind": "random", "sha256": _ids_digest(made), "records": samples, "requested": samples,
        "samples": samples, "tokens": samples * length, "truncated": 0, "dropped": 0, "sequence_length": length,
        "template": False, "pack": False, "vocabulary": vocab, "seed": seed,
    }  # fmt: skip
    return CalibrationSet(tuple(made), record)


def _check(samples: int, sequence_length: int, answer: str) -> None:
    if samples < 1:
        raise UsageError("E223", f"{samples} calibration samples", help="at least 1; 128 is usual")
    if sequence_length < 2:
        raise UsageError(
            "E223", f"a sequence length of {sequence_length}", help="at least 2 tokens; 2048 is usual"
        )
    if answer not in ANSWERS:
        raise UsageError(
            "E223", f'the answer "{printable(str(answer))}"', help=f"one of {', '.join(ANSWERS)}"
        )


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    return read_json_object(file) if file.exists() else {}


def _whole(config: dict[str, Any], *names: str) -> int | None:
    """Return a positive whole number of a configuration, or of the text part of a larger model's."""
    inner = config.get("text_config")
    for place in (config, inner if isinstance(inner, dict) else {}):
        for name in names:
            value = place.get(name)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def _fitting(length: int, config: dict[str, Any], warnings: list[str]) -> int:
    positions = _whole(config, "max_position_embeddings", "n_positions")
    if positions is None or length <= positions or positions < 2:
        return length
    warnings.append(
        f"the model has {positions:,} positions: calibration sequences have {positions:,} tokens, not {length:,}"
    )
    return positions


def _read(source: Source, answer: str, split: str | None, offline: bool) -> list[tuple[str | None, Records]]:
    if source is None:
        from surgeon.calibrate.shipped import shipped_records

        return [(None, shipped_records(answer))]
    pairs = [(None, os.fspath(source))] if isinstance(source, (str, os.PathLike)) else list(source)
    if not pairs:
        raise UsageError(
            "E222", "no calibration source is given", help="give a file, a folder or a dataset id"
        )
    return [(domain, read_records(text, split=split, offline=offline)) for domain, text in pairs]


def _entries(sources: Sequence[tuple[str | None, Records]], answer: str) -> list[_Entry]:
    """Check the fields of every record, not only of those that will be chosen."""
    entries = []
    findings: list[SurgeonError] = []
    for domain, records in sources:
        for record in records.records:
            try:
                parts = parts_of(record.values, answer)
            except Unfit as unfit:
                if len(findings) < MAX_FINDINGS:
                    findings.append(InputError("E374", f"line {record.line} of {printable(records.label)} cannot be used: {unfit.reason}",
                                               where=record.where, help=unfit.help))  # fmt: skip
                continue
            entries.append(_Entry(record, parts, domain or parts.domain, records.kind == "text"))
    raise_all(findings)
    return entries


def permutation(count: int, seed: int, name: str = "calibration") -> list[int]:
    """Return 0..count-1 in an order that depends on the seed, the name and the count alone."""
    return [int(i) for i in np.argsort(uniform(stream_key(seed, 0, name), 0, count), kind="stable")]


def _queues(domains: Sequence[str], seed: int) -> dict[str, list[int]]:
    """Return domain -> indices in the order of selection, the domains sorted."""
    queues: dict[str, list[int]] = {name: [] for name in sorted(set(domains))}
    for number in permutation(len(domains), seed):
        queues[domains[number]].append(number)
    return queues


def _picked(queues: dict[str, list[int]], samples: int, make: Callable[[int], Sample | None]) -> list[Sample]:
    """Take one sample of each queue in turn; what gives none is followed by the next of its queue."""
    waiting = [iter(queue) for queue in queues.values()]
    chosen: list[Sample] = []
    while waiting:
        for queue in list(waiting):
            if len(chosen) == samples:
                return chosen
            sample = next((s for s in map(make, queue) if s is not None), None)
            if sample is None:
                waiting.remove(queue)
            else:
                chosen.append(sample)
    return chosen


def _ids(entry: _Entry, encoder: Encoder, limit: int | None) -> tuple[np.ndarray, int]:
    """Tokenise one record, naming its line when its template refuses it."""
    parts = entry.parts
    if not parts.history and parts.answer is None:
        return encoder.text(parts.text, limit), 0
    try:
        return encoder.exchange(parts.history, parts.answer, parts.thinking)
    except Exception as error:
        if not encoder.template:
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError("E376", f"line {entry.record.line}: the chat template refuses the record: {reason}",
                         where=entry.record.where, help="change the record, or apply no template") from error  # fmt: skip


def _sample(
    entry: _Entry, encoder: Encoder, length: int, rows: int | None, counts: dict[str, int]
) -> Sample | None:
    """Return a record as a sample, or count why there is nothing in it."""
    parts = entry.parts
    blank = not (parts.text or parts.history) or (parts.answer is not None and not parts.answer.strip())
    ids, start = (np.empty(0, np.int64), 0) if blank else _ids(entry, encoder, length)
    _check_rows(ids, rows, entry)
    if not set(ids.tolist()) - encoder.special:
        counts["empty"] += 1
        return None
    if len(ids) < 2:
        counts["short"] += 1
        return None
    if parts.answer is not None and start >= min(len(ids), length):
        counts["answer"] += 1
        return None
    counts["truncated"] += len(ids) > length
    return Sample(ids[:length].copy(), start, entry.domain, entry.record.line)


def _check_rows(ids: np.ndarray, rows: int | None, entry: _Entry) -> None:
    if rows is not None and len(ids) and int(ids.max()) >= rows:
        raise InputError("E377", f"the tokenizer gives id {int(ids.max()):,}, the model's embedding has {rows:,} rows",
                         where=entry.record.where, help="the tokenizer belongs to another model; use the one it was trained with")  # fmt: skip


def _packed(
    entries: Sequence[_Entry],
    encoder: Encoder,
    blocks: int,
    length: int,
    seed: int,
    balanced: bool,
    rows: int | None,
    counts: dict[str, int],
) -> list[Sample]:
    """Fill blocks with records, or passages of long ones, in the order of selection."""
    cut = []
    unbroken = encoder.tokenizer.all_special_tokens
    for entry in entries:
        for line, text in passages(entry.parts.text, length, unbroken) if entry.parts.text else [(0, "")]:
            record = replace(entry.record, line=entry.record.line + (line if entry.file else 0))
            cut.append(replace(entry, record=record, parts=replace(entry.parts, text=text)))

    def tokens(number: int) -> np.ndarray:
        ids, _ = _ids(cut[number], encoder, None)
        _check_rows(ids, rows, cut[number])
        if set(ids.tolist()) - encoder.special:
            return ids
        counts["empty"] += 1
        return ids[:0]

    queues = _queues([e.domain if balanced else "" for e in cut], seed)
    return [Sample(ids, 0, domain) for domain, ids in packed(queues, tokens, blocks, length, encoder.eos)]


def _nothing_left(
    sources: Sequence[tuple[str | None, Records]], counts: dict[str, int], length: int
) -> InputError:
    name = " + ".join(records.label for _, records in sources)
    reasons = [f"{counts[key]} {text}" for key, text in _reasons(length) if counts[key]]
    return InputError("E378", f"nothing of {printable(name)} is left to calibrate with: {', '.join(reasons) or 'no tokens'}",
                      where=Where(sources[0][1].records[0].file or None) if sources[0][1].records else None,
                      help="give records with text in them, or a larger sequence length")  # fmt: skip


def _reasons(length: int) -> tuple[tuple[str, str], ...]:
    return (
        ("empty", "without any token but special ones"),
        ("short", "of a single token"),
        ("answer", f"whose answer lies beyond {length:,} tokens"),
    )


def _record(
    sources: Sequence[tuple[str | None, Records]], chosen: Sequence[Sample], counts: dict[str, int]
) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [
        {"name": r.label, "sha256": r.sha256, "kind": r.kind, "records": len(r.records)}
        | ({"domain": d} if d else {})
        for d, r in sources
    ]
    record = dict(parts[0])
    if len(parts) > 1:
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        record = {
            "name": " + ".join(p["name"] for p in parts),
            "sha256": digest,
            "kind": "several",
            "records": sum(p["records"] for p in parts),
            "sources": parts,
        }
    record.pop("domain", None)
    domains = sorted({s.domain for s in chosen})
    because = {key: counts[key] for key in ("empty", "short", "answer") if counts[key]}
    return record | {
        "samples": len(chosen),
        "tokens": sum(len(s.ids) for s in chosen),
        "truncated": counts["truncated"],
        "dropped": sum(because.values()),
        "dropped_because": because,
        "domains": {d: sum(s.domain == d for s in chosen) for d in domains if d},
        "ids_sha256": _ids_digest(chosen),
    }


def _ids_digest(samples: Sequence[Sample]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(np.asarray([len(sample.ids), sample.answer_start], dtype="<i8").tobytes())
        digest.update(np.ascontiguousarray(sample.ids, dtype="<i8").tobytes())
    return digest.hexdigest()


def _remarks(
    record: dict[str, Any],
    entries: Sequence[_Entry],
    sources: Sequence[tuple[str | None, Records]],
    length: int,
) -> list[str]:
    name, remarks = printable(record["name"]), []
    if record["samples"] < record["requested"]:
        unit = "blocks" if record["pack"] else "samples"
        text = f"{name} gives {record['samples']:,} calibration {unit}, not {record['requested']:,}"
        long = any(len(e.parts.text) > 8 * length for e in entries)
        remarks.append(text + (f"; packing would cut its long texts into sequences of {length:,} tokens" if long and not record["pack"] else ""))  # fmt: skip
    for key, reason in _reasons(length):
        if record["dropped_because"].get(key):
            remarks.append(f"{name}: {record['dropped_because'][key]:,} records {reason} were left out")
    if record["tokens"] < FEW_TOKENS:
        remarks.append(f"{name} gives {record['tokens']:,} tokens in all; statistics over so few say little")
    return remarks
