"""Making the vocabularies of several models one: comparison, plan, and the rows each model contributes.

A plan is data: for every model and every row of the merged embedding, the row of that model
with the same token (-1 where it has none), and by which rule absent rows are filled. The rules
are mergekit 0.1.5's: a token that exactly one model has takes that model's row; else the base
model's; else the mean over the models that have it; a token that nobody has is zero. Unlike
there, the donor's padded row count is kept unless something else is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from surgeon.checkpoint.header import printable
from surgeon.checkpoint.vocabulary import Vocabulary, has_tokenizer, read_vocabulary, token_settings
from surgeon.errors import InputError, UsageError
from surgeon.merge.aligned_rows import AlignedRows, Override, RowMap, VocabularyPlan
from surgeon.merge.spec import ModelRef, TokenizerSpec, TokenSource
from surgeon.merge.token_ids import apply_config_edits, size_edits, special_id_edits
from surgeon.merge.tokenizer_files import TokenizerEdit, edit_tokenizer

__all__ = [
    "AlignedRows",
    "Comparison",
    "Override",
    "Participant",
    "RowMap",
    "Vocabulary",
    "VocabularyPlan",
    "apply_config_edits",
    "compare",
    "plan_vocabulary",
    "read_optional_vocabulary",
    "read_vocabulary",
]

_WAYS_OUT = (
    "--vocab base keeps the base model's tokens, --vocab union combines, --vocab MODEL takes one model's, "
    "--vocab truncate cuts to the common rows"
)


@dataclass(frozen=True)
class Comparison:
    """How two vocabularies differ.

    Attributes:
        verdict: "equal", "special" (only special or added tokens differ) or "ordinary".
        sizes: tokens in the first, in the second.
        ids: the ids at which the two do not hold the same token, ascending.
        first: up to ten of them as (id, token of the first, token of the second), None = no token.
        rules_differ: True when merges (or scores) differ, so that equal tokens are used differently.
    """

    verdict: str
    sizes: tuple[int, int]
    ids: tuple[int, ...] = ()
    first: tuple[tuple[int, str | None, str | None], ...] = ()
    rules_differ: bool = False


@dataclass(frozen=True, eq=False)
class Participant:
    """One model as the vocabulary plan sees it.

    Attributes:
        key: how row maps and `AlignedRows` name it.
        label: how messages name it.
        rows: rows of its embedding (fewer or more than its tokens).
        vocabulary: None when it has no tokenizer.
        ref: the reference a recipe uses for it.
        config, generation_config: parsed JSON, for the special token ids; None when absent.
        merged: False for a model that only lends its tokenizer.
    """

    key: str
    label: str
    rows: int
    vocabulary: Vocabulary | None
    ref: ModelRef | None = None
    config: dict[str, Any] | None = None
    generation_config: dict[str, Any] | None = None
    merged: bool = True


def compare(first: Vocabulary, second: Vocabulary) -> Comparison:
    """Compare two vocabularies token by token, not only by size (fault E7)."""
    sizes = (len(first), len(second))
    rules = first.rules != second.rules and bool(first.rules and second.rules)
    if first.tokens == second.tokens:
        return Comparison("equal", sizes, rules_differ=rules)
    only_first = first.tokens.items() - second.tokens.items()
    only_second = second.tokens.items() - first.tokens.items()
    ordinary = any(first.is_ordinary(t) for t, _ in only_first) or any(
        second.is_ordinary(t) for t, _ in only_second
    )
    ids = sorted({number for _, number in only_first | only_second})
    left, right = first.by_id(), second.by_id()
    shown = tuple((number, left.get(number), right.get(number)) for number in ids[:10])
    return Comparison("ordinary" if ordinary else "special", sizes, tuple(ids), shown, rules)


def plan_vocabulary(
    participants: Sequence[Participant],
    spec: TokenizerSpec | None = None,
    *,
    base: str | None = None,
    donor: str | None = None,
    quirks: bool = False,
) -> VocabularyPlan:
    """Decide the output vocabulary and what every model contributes to each of its rows.

    Args:
        participants: the models in merge order (the order rows are averaged in), base model last
            when it is named only as base.
        spec: None refuses unless the vocabularies agree; else its ``source`` is "base", "union",
            "truncate" or a model, with mergekit's ``tokens`` and ``pad_to_multiple_of``.
        base: key of the base model, or None.
        donor: key of the model whose tokenizer is used when ``spec`` is None or truncates;
            default the base, else the first.
        quirks: as mergekit, shrink to the number of tokens instead of keeping padding rows, and with
            source "base" take a padding row of the base as its row of a newly added token.

    Raises:
        InputError: E305 the vocabularies differ and nothing says what to do, E335 a needed
            tokenizer cannot be read or edited, E337 no end-of-sequence id would be left.
        UsageError: E241 a token, model or id named in the recipe does not exist.
    """
    by_key = {p.key: p for p in participants}
    anchor = by_key[base] if base is not None else participants[0]
    giver = by_key[donor] if donor is not None else anchor
    if spec is None:
        return _plan_as_is(participants, giver, base)
    if spec.source == "truncate":
        return _plan_truncated(participants, giver, base, spec)
    if isinstance(spec.source, ModelRef):
        giver = _participant(participants, spec.source, "tokenizer source")
    elif spec.source in ("base", "union"):
        giver = anchor
    else:
        raise UsageError(
            "E241",
            f'unknown tokenizer source "{printable(str(spec.source))}"',
            help="base, union, truncate or one of the merged models",
        )
    return _plan_aligned(participants, giver, anchor, base, spec, quirks)


def _plan_as_is(participants: Sequence[Participant], donor: Participant, base: str | None) -> VocabularyPlan:
    merged = [p for p in participants if p.merged]
    rows = merged[0].rows
    if any(p.rows != rows for p in merged):
        raise _refusal(merged, donor, "row counts differ")
    notices, warnings = [], []
    vocabulary = donor.vocabulary
    differing: set[int] = set()
    for other in participants:
        if other is donor or other.vocabulary is None or vocabulary is None:
            continue
        found = compare(vocabulary, other.vocabulary)
        if found.verdict == "ordinary":
            raise _refusal([donor, other], donor, "tokens differ", found)
        if found.ids:
            differing.update(found.ids)
            outcome = (
                f"their rows are taken from {donor.label}" if donor.merged else "rows are merged by position"
            )
            notices.append(
                f"{other.label} differs from {donor.label} in {len(found.ids)} special or added tokens "
                f"({_examples(found, 3)}); {outcome}"
            )
        if found.rules_differ:
            warnings.append(
                f"{other.label} and {donor.label} have equal tokens but split text by different merges"
            )
    unknown = [p.label for p in merged if p.vocabulary is None]
    if unknown and len(merged) > 1:
        warnings.append(f"no tokenizer in {', '.join(unknown)}; its rows are taken to mean the same tokens")
    if vocabulary is not None and vocabulary.size > rows:
        warnings.append(
            f"the tokenizer of {donor.label} has ids up to {vocabulary.size - 1:,} but only {rows:,} rows exist"
        )
    overrides = (
        {i: Override((donor.key, i), force=True) for i in sorted(differing) if i < rows}
        if donor.merged
        else {}
    )
    tokens = vocabulary.tokens if vocabulary is not None else {}
    identity = RowMap(np.arange(rows, dtype=np.int64))
    special = special_id_edits(
        donor.label, donor.vocabulary, donor.config, donor.generation_config, tokens, rows, warnings
    )
    return VocabularyPlan(
        rows=rows,
        tokens=tokens,
        row_maps={p.key: identity for p in merged},
        overrides=overrides,
        base=base,
        donor=donor.key if vocabulary is not None else None,
        config_edits=special[0],
        generation_edits=special[1],
        notices=tuple(notices),
        warnings=tuple(warnings),
    )


def _plan_truncated(
    participants: Sequence[Participant], donor: Participant, base: str | None, spec: TokenizerSpec
) -> VocabularyPlan:
    if spec.tokens or spec.pad_to_multiple_of:
        raise UsageError(
            "E241",
            'the tokenizer source "truncate" takes neither tokens nor pad_to_multiple_of',
            help="use base or union with them",
        )
    merged = [p for p in participants if p.merged]
    rows = min(p.rows for p in merged)
    notices, warnings = [], []
    for other in participants:
        if other is not donor and other.vocabulary is not None and donor.vocabulary is not None:
            found = compare(donor.vocabulary, other.vocabulary)
            if any(i < rows for i in found.ids):
                warnings.append(
                    f"rows are merged by position, but {other.label} and {donor.label} hold different tokens there "
                    f"({_examples(found, 3)})"
                )
    cut = [f"{p.label} {p.rows - rows:,}" for p in merged if p.rows > rows]
    if cut:
        notices.append(f"vocabulary cut to the common {rows:,} rows; rows lost: {', '.join(cut)}")
    edit = edit_tokenizer(donor.vocabulary, rows=rows) if donor.vocabulary else TokenizerEdit({}, {})
    identity = RowMap(np.arange(rows, dtype=np.int64))
    special = special_id_edits(
        donor.label, donor.vocabulary, donor.config, donor.generation_config, edit.tokens, rows, warnings
    )
    return VocabularyPlan(
        rows=rows,
        tokens=edit.tokens,
        row_maps={p.key: identity for p in merged},
        base=base,
        donor=donor.key if donor.vocabulary else None,
        files=edit.files,
        drop_files=edit.drop,
        config_edits=size_edits(donor.config, rows) | special[0],
        generation_edits=special[1],
        notices=(*notices, *edit.notices),
        warnings=tuple(warnings),
    )


def _plan_aligned(
    participants: Sequence[Participant],
    donor: Participant,
    anchor: Participant,
    base: str | None,
    spec: TokenizerSpec,
    quirks: bool,
) -> VocabularyPlan:
    if donor.vocabulary is None:
        raise InputError(
            "E335", f"{donor.label} has no tokenizer to take", help="choose another --vocab or --tokenizer"
        )
    notices: list[str] = []
    warnings: list[str] = []
    vocabularies: dict[str, dict[str, int]] = {}
    for p in participants:
        known = p.vocabulary
        if known is None:
            if anchor.vocabulary is None:
                raise InputError(
                    "E335",
                    f"neither {p.label} nor {anchor.label} has a tokenizer",
                    help="copy tokenizer.json into one of the folders",
                )
            warnings.append(f"{p.label} has no tokenizer; taken to have the tokens of {anchor.label}")
            known = anchor.vocabulary
        vocabularies[p.key] = {t: i for t, i in known.tokens.items() if i < p.rows}
    appended = _union_tokens(participants, donor, notices, warnings) if spec.source == "union" else []
    present = {a["content"] for a in appended} | set(vocabularies[donor.key])
    appended += [token_settings(token) for token in spec.tokens if token not in present]
    edit = edit_tokenizer(donor.vocabulary, rows=donor.rows, append=appended)
    tokens = edit.tokens
    if quirks and spec.source == "base":
        # mergekit adds new tokens to the base's own tokenizer, so padding rows of the base count as theirs
        vocabularies[donor.key] |= {t: i for t, i in tokens.items() if i < donor.rows}
    size = max(tokens.values(), default=-1) + 1
    pad_from = None
    if spec.pad_to_multiple_of:
        multiple = spec.pad_to_multiple_of
        rows = -(-size // multiple) * multiple
        pad_from = size if rows > size else None
    elif quirks or size > donor.rows:
        rows = size
    else:
        rows = donor.rows
    if rows > size and pad_from is None:
        notices.append(
            f"{rows - size:,} padding rows of {donor.label} are kept ({rows:,} rows, {size:,} tokens)"
        )
    row_maps = {
        p.key: _row_map(tokens, vocabularies[p.key], p.rows, rows, pad_from) for p in participants if p.merged
    }
    overrides = _overrides(participants, spec, tokens, vocabularies, row_maps, notices)
    special = special_id_edits(
        donor.label, donor.vocabulary, donor.config, donor.generation_config, tokens, rows, warnings
    )
    _report_filled(participants, row_maps, overrides, tokens, notices, warnings)
    return VocabularyPlan(
        rows=rows,
        tokens=tokens,
        row_maps=row_maps,
        overrides=overrides,
        base=base,
        pad_from=pad_from,
        donor=donor.key,
        files=edit.files,
        drop_files=edit.drop,
        config_edits=size_edits(donor.config, rows) | special[0],
        generation_edits=special[1],
        notices=(*notices, *edit.notices),
        warnings=tuple(warnings),
    )


def _union_tokens(
    participants: Sequence[Participant], donor: Participant, notices: list[str], warnings: list[str]
) -> list[dict[str, Any]]:
    """Return what the donor lacks: ordinary tokens of the others first, then their added tokens.

    Ordinary tokens become added tokens, as in mergekit: appending them to the donor's merges
    would change how ordinary text is split.
    """
    ordinary: dict[str, dict[str, Any]] = {}
    added: dict[str, dict[str, Any]] = {}
    order = [donor, *(p for p in participants if p is not donor)]
    conflicting = []
    assert donor.vocabulary is not None
    present = {token for token, number in donor.vocabulary.tokens.items() if number < donor.rows}
    for p in order:
        if p.vocabulary is None:
            continue
        for token, number in p.vocabulary.tokens.items():
            if number >= p.rows or not token:
                continue
            settings = p.vocabulary.added.get(token)
            if settings is None:
                if token not in present:
                    ordinary.setdefault(token, token_settings(token))
            elif token not in added:
                added[token] = settings
            elif added[token] != settings:
                conflicting.append(token)
    if conflicting:
        warnings.append(
            f'the models add "{printable(conflicting[0])}"'
            + (f" and {len(conflicting) - 1} more" if len(conflicting) > 1 else "")
            + " with different settings; the first model's are used"
        )
    ordinary = {t: s for t, s in ordinary.items() if t not in added}
    if ordinary:
        notices.append(
            f"{len(ordinary):,} ordinary tokens that {donor.label} lacks are added as whole strings; "
            f"text is split by {donor.label}'s rules and meets them only literally"
        )
    return [*ordinary.values(), *added.values()]


def _row_map(
    tokens: dict[str, int], own: dict[str, int], own_rows: int, rows: int, pad_from: int | None
) -> RowMap:
    source = np.full(rows, -1, dtype=np.int64)
    for token, number in tokens.items():
        source[number] = own.get(token, -1)
    if pad_from is None:
        # rows without a token: this model's own, where it has no token there either
        bare = np.ones(rows, dtype=bool)
        bare[np.fromiter(tokens.values(), dtype=np.int64, count=len(tokens))] = False
        bare[min(own_rows, rows) :] = False
        used = np.fromiter(own.values(), dtype=np.int64, count=len(own))
        bare[used[used < rows]] = False
        source[bare] = np.flatnonzero(bare)
    return RowMap(source)


def _overrides(
    participants: Sequence[Participant],
    spec: TokenizerSpec,
    tokens: dict[str, int],
    vocabularies: dict[str, dict[str, int]],
    row_maps: dict[str, RowMap],
    notices: list[str],
) -> dict[int, Override]:
    overrides = {}
    for token, wanted in spec.tokens.items():
        shown = printable(token)
        number = tokens.get(token)
        if number is None:
            raise UsageError("E241", f'"{shown}" cannot be added to the tokenizer', help="a token needs text")
        if wanted.kind == "model" and wanted.model is None and not wanted.force:
            continue  # only added to the vocabulary; the ordinary rule fills its row
        if not wanted.force and all(m.source[number] >= 0 for m in row_maps.values()):
            notices.append(f'every model has "{shown}"; its own row is used (force: true would replace it)')
            continue
        overrides[number] = Override(
            _override_source(participants, shown, token, wanted, vocabularies), wanted.force, strict=True
        )
    return overrides


def _override_source(
    participants: Sequence[Participant],
    shown: str,
    token: str,
    wanted: TokenSource,
    vocabularies: dict[str, dict[str, int]],
) -> tuple[str, int] | None:
    if wanted.kind == "zero":
        return None
    if wanted.model is None or wanted.kind not in ("model", "model_token"):
        raise UsageError(
            "E241",
            f'the token "{shown}" has no source',
            help="give a model, {kind: model_token, ...} or {kind: zero}",
        )
    model = _participant(participants, wanted.model, f'token "{shown}"')
    if not model.merged:
        raise UsageError("E241", f'"{shown}" is to come from {model.label}, which is not merged',
                         help="merged are " + ", ".join(p.label for p in participants if p.merged))  # fmt: skip
    if wanted.kind == "model_token" and wanted.token_id is not None:
        if not 0 <= wanted.token_id < model.rows:
            raise UsageError(
                "E241",
                f'token_id {wanted.token_id} for "{shown}" is outside the {model.rows:,} rows of {model.label}',
                help=f"a number from 0 to {model.rows - 1}",
            )
        return model.key, wanted.token_id
    name = wanted.token if wanted.kind == "model_token" and wanted.token is not None else token
    row = vocabularies[model.key].get(name)
    if row is None:
        raise UsageError(
            "E241",
            f'"{shown}" is to come from "{printable(name)}" of {model.label}, which has no such token',
            help="name another token with {kind: model_token, model: ..., token: ...}, or {kind: zero}",
        )
    return model.key, row


def _participant(participants: Sequence[Participant], ref: ModelRef, what: str) -> Participant:
    for p in participants:
        if p.ref == ref:
            return p
    raise UsageError(
        "E241",
        f"the {what} names {ref}, which is not one of the models",
        help="models here: " + ", ".join(p.label for p in participants),
    )


def _report_filled(
    participants: Sequence[Participant],
    row_maps: dict[str, RowMap],
    overrides: dict[int, Override],
    tokens: dict[str, int],
    notices: list[str],
    warnings: list[str],
) -> None:
    labels = {p.key: p.label for p in participants}
    owned = np.zeros(len(next(iter(row_maps.values())).source), dtype=bool)
    for key, row_map in row_maps.items():
        lacking = sum(1 for number in tokens.values() if row_map.source[number] < 0)
        owned |= row_map.source >= 0
        if lacking:
            notices.append(
                f"{lacking:,} tokens are not in {labels[key]}; their rows come from the other models"
            )
    nowhere = [t for t, number in tokens.items() if not owned[number] and number not in overrides]
    if nowhere:
        warnings.append(
            f'no model has a row for "{printable(nowhere[0])}"'
            + (f" and {len(nowhere) - 1} more tokens" if len(nowhere) > 1 else "")
            + "; it is zero"
        )


def _examples(found: Comparison, count: int) -> str:
    def show(token: str | None) -> str:
        return "no token" if token is None else f'"{printable(token)}"'

    parts = [f"id {number}: {show(a)} / {show(b)}" for number, a, b in found.first[:count]]
    return "; ".join(parts) + ("; ..." if len(found.ids) > count else "")


def _refusal(
    models: Sequence[Participant], donor: Participant, why: str, found: Comparison | None = None
) -> InputError:
    def describe(p: Participant) -> str:
        if p.vocabulary is None:
            return f"{p.label} {p.rows:,} rows"
        return f"{p.label} {len(p.vocabulary):,} tokens in {p.rows:,} rows"

    detail = ""
    if found is not None:
        detail = f"; {len(found.ids):,} ids hold different tokens ({_examples(found, 3)})"
    help = _WAYS_OUT
    smallest = min(models, key=lambda p: p.rows)
    used = max((p.vocabulary.size for p in models if p.vocabulary is not None), default=None)
    if found is None and used is not None and used <= smallest.rows:
        help += "; the extra rows look like padding"
    shown = [donor, *(p for p in models if p is not donor)][:4]
    return InputError(
        "E305", f"vocabularies differ ({why}): {', '.join(map(describe, shown))}{detail}", help=help
    )


def read_optional_vocabulary(folder: Path | None) -> Vocabulary | None:
    """Read a folder's vocabulary, or return None when it has no tokenizer at all."""
    return read_vocabulary(folder) if folder is not None and has_tokenizer(folder) else None
