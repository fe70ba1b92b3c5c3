"""Prompts with responses, as tokens, in two sets: long and short thinking.

Lines are JSON objects as for calibration: ``prompt`` and ``response``, with ``thinking`` beside them or
inside the response between ``<think>`` and ``</think>``. Either two files are the two sets, or one file is split
by the tokens of its thinking: long above 1000, short below 100 (ThinkEdit, arXiv 2503.22048, section 3.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from surgeon.calibrate.data import permutation
from surgeon.calibrate.fields import CLOSE, OPEN, Unfit, parts_of
from surgeon.calibrate.tokens import Encoder
from surgeon.checkpoint.header import printable
from surgeon.data.records import MAX_FINDINGS, Record, Records, read_records
from surgeon.errors import InputError, SurgeonError, UsageError, Where, raise_all

FEWEST = 10
"""Examples of a set below which a mean difference is noise."""
FEW = 50
LONG_ABOVE, SHORT_BELOW = 1000, 100


@dataclass(frozen=True)
class Example:
    """One prompt with its response.

    Attributes:
        ids: int64 [T].
        answer_start: index of the first token of the response.
        line: line of its file.
        thinking: tokens of its thinking, 0 without any.
    """

    ids: np.ndarray
    answer_start: int
    line: int = 0
    thinking: int = 0


@dataclass(frozen=True)
class Sets:
    """The two sets a direction is the difference of: mean(long) - mean(short).

    Attributes:
        long, short: examples.
        record: plain data without paths: names, sha256, counts, thresholds.
        warnings: sentences for the user.
    """

    long: tuple[Example, ...]
    short: tuple[Example, ...]
    record: dict[str, Any]
    warnings: tuple[str, ...] = ()


def read_sets(
    encoder: Encoder,
    *,
    responses: str | None = None,
    long: str | None = None,
    short: str | None = None,
    thresholds: tuple[int, int] = (LONG_ABOVE, SHORT_BELOW),
    samples: int = 500,
    sequence_length: int = 8192,
    seed: int = 0,
    offline: bool = False,
) -> Sets:
    """Read the two sets.

    Args:
        encoder: the model's tokenizer with its template.
        responses: one source that is split by its thinking.
        long, short: or two sources.
        thresholds: tokens of thinking: long has more than the first, short fewer than the second.
        samples: examples of a set at most, chosen by ``seed``.
        sequence_length: tokens of an example at most; what lies behind is cut off and counted.

    Raises:
        UsageError: E295 no source, or both ways at once; E296 thresholds out of order.
        InputError: E374 a record without the right fields, E415 fewer than 10 examples in a set.
    """
    if (responses is None) == (long is None and short is None) or (long is None) != (short is None):
        raise UsageError("E295", "a direction needs the responses of both sets",
                         help="--responses FILE split by its thinking, or --long FILE and --short FILE")  # fmt: skip
    above, below = thresholds
    if below > above or below < 0:
        raise UsageError("E296", f"the thresholds are {above} and {below}", help="long above the first, short below the second: 1000,100")  # fmt: skip
    warnings: list[str] = []
    if responses is not None:
        source = _read(responses, offline)
        everything = _examples(source, encoder, sequence_length, thinking=True)
        sets = [[e for e in everything if e.thinking > above], [e for e in everything if e.thinking < below]]
        record: dict[str, Any] = {"responses": _named(source), "long_above": above, "short_below": below,
                                  "between": len(everything) - len(sets[0]) - len(sets[1])}  # fmt: skip
    else:
        sources = [_read(str(text), offline) for text in (long, short)]
        if sources[0].sha256 == sources[1].sha256:
            raise InputError("E415", "the long and the short responses are the same file, so they have no difference",
                             where=Where(sources[0].label), help="give one file of each kind")  # fmt: skip
        sets = [_examples(source, encoder, sequence_length, thinking=False) for source in sources]
        record = {"long": _named(sources[0]), "short": _named(sources[1])}
    chosen = [
        _chosen(group, samples, seed, name) for group, name in zip(sets, ("long", "short"), strict=True)
    ]
    _enough(chosen, record, warnings)
    cut = sum(len(e.ids) > sequence_length for group in chosen for e in group)
    if cut:
        warnings.append(
            f"{cut} of {sum(map(len, chosen))} responses are cut off after {sequence_length:,} tokens"
        )
    groups = [
        tuple(Example(e.ids[:sequence_length], e.answer_start, e.line, e.thinking) for e in group)
        for group in chosen
    ]
    record |= {"examples": {"long": len(groups[0]), "short": len(groups[1])}, "sequence_length": sequence_length,
               "truncated": cut, "samples": samples, "seed": seed, "template": encoder.template}  # fmt: skip
    return Sets(groups[0], groups[1], record, tuple(warnings))


def _read(source: str, offline: bool) -> Records:
    return read_records(source, offline=offline)


def _named(source: Records) -> dict[str, Any]:
    return {"name": Path(source.label).name, "sha256": source.sha256, "records": len(source.records)}


def _examples(source: Records, encoder: Encoder, length: int, *, thinking: bool) -> list[Example]:
    found = []
    findings: list[SurgeonError] = []
    for record in source.records:
        try:
            example = _example(record, encoder, need_thinking=thinking)
        except Unfit as unfit:
            if len(findings) < MAX_FINDINGS:
                findings.append(InputError("E374", f"line {record.line} of {printable(source.label)} cannot be used: {unfit.reason}",
                                           where=record.where, help=unfit.help))  # fmt: skip
            continue
        if example.answer_start < min(len(example.ids), length):  # else the prompt alone fills the length
            found.append(example)
    raise_all(findings)
    return found


def _example(record: Record, encoder: Encoder, *, need_thinking: bool) -> Example:
    parts = parts_of(record.values)
    if parts.answer is None or not parts.history:
        raise Unfit("it has no prompt with a response", "a record has prompt, response and thinking")
    thought = parts.thinking or _inside(parts.answer)
    if thought is None:
        if need_thinking:
            raise Unfit(f"it has neither thinking nor {OPEN} ... {CLOSE} in its response",
                        "a model that answers at once has no thinking to sort by: give the sets as --long and --short")  # fmt: skip
        thought = ""
    ids, start = encoder.exchange(parts.history, parts.answer, parts.thinking)
    count = len(encoder.tokenizer(thought, add_special_tokens=False)["input_ids"]) if thought else 0
    return Example(ids, start, record.line, count)


def _inside(answer: str) -> str | None:
    """Return the thinking written into a response; templates may have opened it in the prompt."""
    if CLOSE not in answer:
        return None
    return answer.partition(CLOSE)[0].rpartition(OPEN)[2].strip()


def _chosen(group: Sequence[Example], samples: int, seed: int, name: str) -> list[Example]:
    return [group[i] for i in sorted(permutation(len(group), seed, f"responses {name}")[:samples])]


def _enough(chosen: Sequence[Sequence[Example]], record: dict[str, Any], warnings: list[str]) -> None:
    for group, name in zip(chosen, ("long", "short"), strict=True):
        if len(group) < FEWEST:
            raise InputError("E415", f"{len(group)} examples with {name} thinking, at least {FEWEST} are needed",
                             help="generate more responses of this model (surgeon eval --samples-out), or move --thresholds")  # fmt: skip
        if len(group) < FEW:
            warnings.append(
                f"{len(group)} examples with {name} thinking: a direction from fewer than {FEW} is uncertain"
            )
