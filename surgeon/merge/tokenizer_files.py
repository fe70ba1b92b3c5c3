"""Editing tokenizer files as JSON: appending added tokens and cutting tokens off the end.

Only what changes is rewritten; every other file of the donor is copied byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgeon.checkpoint.companions import read_optional_object
from surgeon.checkpoint.strict_json import read_json_object
from surgeon.checkpoint.vocabulary import NAMED_TOKENS, Vocabulary, loaded_ids, model_tokens
from surgeon.errors import InputError, Where


@dataclass(frozen=True)
class TokenizerEdit:
    """Changes to a donor's tokenizer files.

    Attributes:
        tokens: the resulting token -> id.
        files: file name -> new content; files not named are copied.
        drop: files that would contradict the result and are not copied.
        notices: sentences for the user.
    """

    tokens: dict[str, int]
    files: dict[str, bytes]
    drop: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()


def dump_json(document: Any) -> bytes:
    """Serialize the way transformers writes its files: indent 2, UTF-8, key order kept, final newline."""
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


def edit_tokenizer(
    vocabulary: Vocabulary, *, rows: int | None = None, append: Sequence[dict[str, Any]] = ()
) -> TokenizerEdit:
    """Return the donor's tokenizer without ids >= ``rows`` and with ``append`` added at the end.

    Args:
        vocabulary: the donor's.
        rows: rows of the donor's embedding, or None to keep every token.
        append: settings of added tokens (``content``, ``special``, ...). One that is already an
            ordinary token keeps its id and becomes an added token; one that is added already is
            left alone.

    Raises:
        InputError: E335 the donor has no tokenizer.json to edit, or a loader would number the
            edited tokens differently; E337 the end-of-sequence token would be cut off.
    """
    cut = {t for t, number in vocabulary.tokens.items() if rows is not None and number >= rows}
    tokens = {t: number for t, number in vocabulary.tokens.items() if t not in cut}
    entries: list[dict[str, Any]] = []
    after = max(tokens.values(), default=-1) + 1
    for settings in append:
        token = settings["content"]
        if (
            not token
            or (token in tokens and token in vocabulary.added)
            or any(e["content"] == token for e in entries)
        ):
            continue
        if token not in tokens:
            tokens[token] = after
            after += 1
        entries.append({"id": tokens[token], **settings})
    if not cut and not entries:
        return TokenizerEdit(tokens, {})
    if not vocabulary.rewritable:
        raise InputError(
            "E335",
            f"the tokenizer of {vocabulary.folder} has no tokenizer.json, so tokens cannot be added or removed",
            where=Where(str(vocabulary.folder)),
            help="save it once with transformers (AutoTokenizer ... save_pretrained), or choose another --vocab",
        )
    return _write(vocabulary, tokens, cut, entries)


def _write(
    vocabulary: Vocabulary, tokens: dict[str, int], cut: set[str], entries: list[dict[str, Any]]
) -> TokenizerEdit:
    folder = vocabulary.folder
    named = {key: token for key, token in vocabulary.named.items() if token in cut and token not in tokens}
    if "eos_token" in named:
        raise InputError(
            "E337",
            f'the end-of-sequence token "{named["eos_token"]}" of {folder} has no row in its embedding',
            where=Where(str(folder)),
            help="choose another tokenizer with --vocab or --tokenizer",
        )
    document = read_json_object(folder / "tokenizer.json")
    removed = _cut_model(document["model"], cut)
    promoted = {e["content"] for e in entries}
    kept = [
        e
        for e in document.get("added_tokens") or []
        if e["content"] not in cut and e["content"] not in promoted
    ]
    # tokens that only tokenizer_config.json declares would be numbered after the new ones
    listed = promoted | {e["content"] for e in kept} | set(model_tokens(document))
    kept += [{"id": tokens[t], **s} for t, s in vocabulary.added.items() if t in tokens and t not in listed]
    document["added_tokens"] = sorted([*kept, *entries], key=lambda e: e["id"])
    wrong = [t for t, number in loaded_ids(document).items() if tokens.get(t) != number]
    if wrong:
        raise InputError(
            "E335",
            f"the tokenizer of {folder} numbers its tokens with gaps; an edited copy would load with other ids",
            where=Where(str(folder / "tokenizer.json")),
            help="use a donor with a gapless tokenizer, or --vocab with a model whose tokenizer needs no change",
        )
    files = {"tokenizer.json": dump_json(document)}
    _edit_config(folder, vocabulary, cut, entries, named, files)
    drop = [name for name in ("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model") if removed]
    notices = (
        [f"{len(cut)} tokens of {folder.name} have no row in its embedding and were removed"] if cut else []
    )
    notices += [f"{key} was one of them and is no longer set" for key in named]
    return TokenizerEdit(tokens, files, tuple(drop), tuple(notices))


def _cut_model(model: dict[str, Any], cut: set[str]) -> bool:
    vocab = model["vocab"]
    if isinstance(vocab, list):
        kept: Any = [entry for entry in vocab if entry[0] not in cut]
    else:
        kept = {token: number for token, number in vocab.items() if token not in cut}
    if len(kept) == len(vocab):
        return False
    model["vocab"] = kept
    if model.get("merges"):
        # a merge whose result is gone would make the file unreadable
        def whole(merge) -> bool:
            left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
            return not {left, right, left + right} & cut

        model["merges"] = [merge for merge in model["merges"] if whole(merge)]
    return True


def _edit_config(
    folder: Path,
    vocabulary: Vocabulary,
    cut: set[str],
    entries: list[dict[str, Any]],
    named: dict[str, str],
    files: dict[str, bytes],
) -> None:
    config = read_optional_object(folder / "tokenizer_config.json")
    if config is not None:
        before = json.dumps(config)
        declared = config.get("added_tokens_decoder")
        if isinstance(declared, dict):
            for number, settings in list(declared.items()):
                if isinstance(settings, dict) and settings.get("content") in cut:
                    del declared[number]
            for entry in entries:
                declared[str(entry["id"])] = {k: v for k, v in entry.items() if k != "id"}
            config["added_tokens_decoder"] = dict(sorted(declared.items(), key=lambda item: int(item[0])))
        _forget(config, cut, named)
        if json.dumps(config) != before:
            files["tokenizer_config.json"] = dump_json(config)
    mapped = read_optional_object(folder / "special_tokens_map.json")
    if mapped is not None and cut:
        before = json.dumps(mapped)
        _forget(mapped, cut, named)
        if json.dumps(mapped) != before:
            files["special_tokens_map.json"] = dump_json(mapped)
    legacy = read_optional_object(folder / "added_tokens.json")
    if legacy is not None:
        edited = {t: n for t, n in legacy.items() if t not in cut} | {e["content"]: e["id"] for e in entries}
        if edited != legacy:
            files["added_tokens.json"] = dump_json(edited)


def _forget(document: dict[str, Any], cut: set[str], named: dict[str, str]) -> None:
    for key in NAMED_TOKENS:
        if key in named:
            document.pop(key, None)
    for key in ("additional_special_tokens", "extra_special_tokens"):
        value = document.get(key)
        if isinstance(value, list):
            document[key] = [t for t in value if (t.get("content") if isinstance(t, dict) else t) not in cut]
