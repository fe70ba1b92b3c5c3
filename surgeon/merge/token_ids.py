"""Vocabulary sizes and special token ids in config.json and generation_config.json."""

from __future__ import annotations

import copy
from typing import Any

from surgeon.checkpoint.companions import token_ids
from surgeon.checkpoint.vocabulary import Vocabulary
from surgeon.errors import InputError

_SIZE_KEYS = ("vocab_size", "padded_vocab_size", "n_vocab")
_TEXT_CONFIGS = ("text_config", "llm_config", "language_config")
_ID_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


def apply_config_edits(config: dict[str, Any], edits: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a parsed config with edits applied; dots in keys lead into nested objects."""
    result = copy.deepcopy(config)
    for path, value in edits.items():
        *parents, key = path.split(".")
        at = result
        for parent in parents:
            at = at.setdefault(parent, {})
        at[key] = value
    return result


def size_edits(config: dict[str, Any] | None, rows: int) -> dict[str, Any]:
    """Return edits that set every vocabulary size a config holds, nested text configs included."""
    config = config or {}
    edits: dict[str, Any] = {}
    for key in _SIZE_KEYS:
        if key in config:
            edits[key] = rows
    for part in _TEXT_CONFIGS:
        inner = config.get(part)
        if isinstance(inner, dict):
            edits |= {f"{part}.{key}": rows for key in _SIZE_KEYS if key in inner}
    return edits or {"vocab_size": rows}


def special_id_edits(
    label: str,
    vocabulary: Vocabulary | None,
    config: dict[str, Any] | None,
    generation_config: dict[str, Any] | None,
    tokens: dict[str, int],
    rows: int,
    warnings: list[str],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return edits of config and generation_config: the donor's ids, found again by token.

    Args:
        label: the donor's name in messages.
        vocabulary, config, generation_config: the donor's.
        tokens, rows: of the output.
        warnings: sentences about ids that were removed are appended here.

    Raises:
        InputError: E337 no end-of-sequence id is left, or an id is not an integer.
    """
    if vocabulary is None:
        return {}, {}
    names: dict[int, list[str]] = {}
    for token, number in vocabulary.tokens.items():
        names.setdefault(number, []).append(token)
    results = []
    for document, file in (
        (config, "config.json"),
        (generation_config, "generation_config.json"),
    ):
        edits: dict[str, Any] = {}
        for prefix, part in _parts(document or {}, nested=file == "config.json"):
            for key in _ID_KEYS:
                if part.get(key) is None:
                    continue
                moved = _moved_ids(part, key, f"{label}/{file}", names, tokens, rows, warnings)
                edits[prefix + key] = moved
        results.append(edits)
    return results[0], results[1]


def _parts(document: dict[str, Any], nested: bool):
    yield "", document
    for name in _TEXT_CONFIGS if nested else ():
        if isinstance(document.get(name), dict):
            yield name + ".", document[name]


def _moved_ids(
    part: dict[str, Any],
    key: str,
    file: str,
    names: dict[int, list[str]],
    tokens: dict[str, int],
    rows: int,
    warnings: list[str],
) -> Any:
    moved: list[int] = []
    lost: list[int] = []
    for number in token_ids(part, key, file=file):
        found = next((tokens[t] for t in names.get(number, []) if t in tokens), None)
        if found is None and number not in names and number < rows and number not in set(tokens.values()):
            found = number  # a row without a token, or -1 for "none": nothing moved
        (lost if found is None or found >= rows else moved).append(number if found is None else found)
    if lost:
        if key == "eos_token_id" and not moved:
            raise InputError(
                "E337",
                f"eos_token_id {lost[0]} in {file} has no token or row in the merged vocabulary of {rows:,} rows",
                help="generation would never stop; choose another --vocab or --tokenizer",
            )
        warnings.append(
            f"{key} {', '.join(map(str, lost))} in {file} is not in the merged vocabulary and was removed"
        )
    if isinstance(part[key], list):
        return list(dict.fromkeys(moved))
    return moved[0] if moved else None
