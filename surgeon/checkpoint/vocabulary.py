"""Reading a model's vocabulary: which token has which id, from the tokenizer files as data.

No tokenizer library is needed: tokenizer.json, vocab.json, vocab.txt, a SentencePiece model
file and tiktoken rank files are read directly, and nothing in them is executed.
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgeon.checkpoint.companions import TOKENIZER_FILES, allowed_roots, check_link, read_optional_object
from surgeon.checkpoint.header import printable
from surgeon.checkpoint.strict_json import read_bytes, read_json_object
from surgeon.errors import InputError, Where

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_CONVERT = (
    'write a tokenizer.json once, in an environment you trust: python -c "from transformers import AutoTokenizer as '
    "T; T.from_pretrained('MODEL').save_pretrained('MODEL')\""
)


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The tokens of one model.

    Attributes:
        folder: the model folder.
        kind: "BPE", "WordPiece", "Unigram", "WordLevel", "sentencepiece" or "tiktoken".
        tokens: token -> id, added tokens included, in the order of ids.
        added: added token -> its settings as tokenizer.json writes them (without the id).
        special: tokens flagged special or named by the tokenizer's configuration.
        named: "eos_token" -> token, and so on.
        rules: digest of the merges (BPE) or scores (Unigram): two models with equal tokens and
            different rules split text differently.
        rewritable: True when there is a tokenizer.json to edit.
        notices: what was odd while reading, one sentence each.
    """

    folder: Path
    kind: str
    tokens: dict[str, int]
    added: dict[str, dict[str, Any]]
    special: frozenset[str]
    named: dict[str, str]
    rules: str
    rewritable: bool
    notices: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def size(self) -> int:
        """Rows that the tokens need: the largest id plus one."""
        return max(self.tokens.values(), default=-1) + 1

    def is_ordinary(self, token: str) -> bool:
        """Tell whether a token is neither special nor added."""
        return token not in self.added and token not in self.special

    def by_id(self) -> dict[int, str]:
        """Return id -> token; where two tokens share an id, the later one."""
        return {number: token for token, number in self.tokens.items()}


def has_tokenizer(folder: Path) -> bool:
    """Tell whether a folder holds any file that defines tokens."""
    names = set(TOKENIZER_FILES) - {"tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}
    return any((Path(folder) / name).exists() for name in names)


def read_vocabulary(folder: Path) -> Vocabulary:
    """Read the vocabulary of a model folder.

    tokenizer.json is preferred, then vocab.json, vocab.txt, tokenizer.model, tiktoken ranks.
    Tokens that only tokenizer_config.json or added_tokens.json know are included, since
    loaders add them.

    Raises:
        InputError: E335 there is no tokenizer, or one that cannot be read without its own
            code; E308 a file is not valid; E336 a file is a link that leaves the folder.
    """
    folder = Path(folder)
    for name in TOKENIZER_FILES:
        check_link(folder / name, allowed_roots(folder))
    config = read_optional_object(folder / "tokenizer_config.json") or {}
    mapped = read_optional_object(folder / "special_tokens_map.json") or {}
    if (folder / "tokenizer.json").exists():
        kind, tokens, added, rules, notices = _from_tokenizer_json(folder / "tokenizer.json")
    else:
        kind, tokens, rules, notices = _from_other_files(folder, config)
        added = {}
    _add_declared(tokens, added, config, read_optional_object(folder / "added_tokens.json") or {})
    named = {}
    for source in (mapped, config):
        for key in NAMED_TOKENS:
            content = _content(source.get(key))
            if content is not None:
                named[key] = content
    special = {token for token, settings in added.items() if settings.get("special")}
    extras = [*_listed(config, "additional_special_tokens"), *_listed(config, "extra_special_tokens")]
    for token in [*named.values(), *extras, *_listed(mapped, "additional_special_tokens")]:
        # loaders append named special tokens that the tokenizer lacks
        if token not in tokens:
            tokens[token] = max(tokens.values(), default=-1) + 1
            added[token] = token_settings(token, special=True)
        special.add(token)
    ordered = dict(sorted(tokens.items(), key=lambda item: item[1]))
    if any(number < 0 for number in ordered.values()):
        raise _unreadable(folder, f"{folder} has a token with a negative id")
    return Vocabulary(
        folder,
        kind,
        ordered,
        added,
        frozenset(special),
        named,
        rules,
        (folder / "tokenizer.json").exists(),
        tuple(notices),
    )


def token_settings(token: str, *, special: bool = False) -> dict[str, Any]:
    """Return the settings of an added token with the tokenizers library's defaults."""
    return {
        "content": token,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": not special,
        "special": special,
    }


def model_tokens(document: dict[str, Any]) -> dict[str, int]:
    """Return token -> id of the "model" part of a parsed tokenizer.json.

    Raises:
        InputError: E335 unknown model type or malformed vocabulary.
    """
    model = document.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, dict) and all(type(v) is int for v in vocab.values()):
        return dict(vocab)
    if isinstance(vocab, list) and all(isinstance(v, list) and v and isinstance(v[0], str) for v in vocab):
        return {entry[0]: number for number, entry in enumerate(vocab)}
    raise InputError("E335", "tokenizer.json has no vocabulary of a known form", help=_CONVERT)


def loaded_ids(document: dict[str, Any]) -> dict[str, int]:
    """Return token -> id as the tokenizers library assigns them when it loads a tokenizer.json.

    It ignores the ids written beside added tokens: a token that the model part lacks gets the
    next free id in the order of the list. Files with gaps therefore load differently.
    """
    tokens = model_tokens(document)
    known = len(tokens)
    highest = -1
    for entry in document.get("added_tokens") or []:
        content = entry["content"]
        if not content:
            continue
        if content not in tokens:
            tokens[content] = highest + 1 if highest >= known or known == 0 else known
        highest = max(highest, tokens[content])
    return tokens


def _from_tokenizer_json(path: Path):
    document = read_json_object(path)
    try:
        tokens = model_tokens(document)
        entries = document.get("added_tokens") or []
        added = {e["content"]: {k: v for k, v in e.items() if k != "id"} for e in entries}
        declared = {e["content"]: int(e["id"]) for e in entries}
        loaded = loaded_ids(document)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise InputError(
            "E335",
            "tokenizer.json has malformed added_tokens",
            where=Where(str(path)),
            help="fetch the file again",
        ) from None
    except InputError as error:
        error.where = Where(str(path))
        raise
    odd = [t for t, number in declared.items() if loaded.get(t, number) != number]
    notices = []
    if odd:
        notices.append(
            f'{path}: the id of "{printable(odd[0])}" is written as {declared[odd[0]]}, but it loads as {loaded[odd[0]]}'
            + (f" (and {len(odd) - 1} more)" if len(odd) > 1 else "")
        )
    tokens.update(declared)
    model = document["model"]
    merges = [m if isinstance(m, str) else " ".join(map(str, m)) for m in model.get("merges") or []]
    scores = [entry[1:] for entry in model["vocab"]] if isinstance(model["vocab"], list) else []
    return str(model.get("type") or _guess_kind(model)), tokens, added, _digest([merges, scores]), notices


def _guess_kind(model: dict[str, Any]) -> str:
    if "merges" in model:
        return "BPE"
    if isinstance(model["vocab"], list):
        return "Unigram"
    return "WordPiece" if "continuing_subword_prefix" in model else "WordLevel"


def _from_other_files(folder: Path, config: dict[str, Any]):
    if (folder / "vocab.json").exists():
        tokens = read_json_object(folder / "vocab.json")
        if not all(type(v) is int for v in tokens.values()):
            raise _unreadable(folder, f"{folder}/vocab.json does not map tokens to ids")
        merges = folder / "merges.txt"
        rules = hashlib.sha256(read_bytes(merges)).hexdigest() if merges.exists() else ""
        return "BPE" if rules else "WordLevel", tokens, rules, []
    if (folder / "vocab.txt").exists():
        lines = read_bytes(folder / "vocab.txt").decode("utf-8", "surrogateescape").split("\n")
        if lines and not lines[-1]:
            lines.pop()
        return "WordPiece", {line.rstrip("\r"): i for i, line in enumerate(lines)}, "", []
    for name in ("tokenizer.model", "qwen.tiktoken", "tiktoken.model"):
        path = folder / name
        if not path.exists():
            continue
        raw = read_bytes(path)
        tokens = _tiktoken_ranks(raw)
        if tokens is not None:
            return "tiktoken", tokens, "", []
        if name == "tokenizer.model" and _has_plain_ids(config):
            tokens = sentencepiece_tokens(raw)
            if tokens:
                return "sentencepiece", tokens, hashlib.sha256(raw).hexdigest(), []
    present = [name for name in TOKENIZER_FILES if (folder / name).exists()]
    if not present:
        raise _unreadable(folder, f"{folder} has no tokenizer")
    raise _unreadable(folder, f"the vocabulary of {folder} cannot be read from {', '.join(present[:3])}")


def _has_plain_ids(config: dict[str, Any]) -> bool:
    """Only some tokenizer classes use SentencePiece's own numbering; others shift it in code."""
    name = str(config.get("tokenizer_class") or "LlamaTokenizer").removesuffix("Fast")
    return name in {"LlamaTokenizer", "GemmaTokenizer", "CodeLlamaTokenizer", "TokenizersBackend"}


def _add_declared(tokens: dict, added: dict, config: dict, legacy: dict) -> None:
    declared = config.get("added_tokens_decoder")
    entries = []
    if isinstance(declared, dict):
        for number, settings in declared.items():
            content = _content(settings)
            if content is not None and str(number).isdigit():
                entries.append((int(number), content, settings if isinstance(settings, dict) else {}))
    entries += [(n, t, {}) for t, n in legacy.items() if type(n) is int]
    taken = set(tokens.values())
    for number, content, settings in sorted(entries, key=lambda e: e[0]):
        if content not in tokens:
            tokens[content] = number if number not in taken else max(taken) + 1
            taken.add(tokens[content])
        keep = {k: v for k, v in settings.items() if not k.startswith("__")}
        added.setdefault(content, token_settings(content) | keep)


def _content(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _listed(document: dict[str, Any], key: str) -> list[str]:
    value = document.get(key)
    items = value if isinstance(value, list) else list(value.values()) if isinstance(value, dict) else []
    return [c for c in map(_content, items) if c is not None]


def sentencepiece_tokens(raw: bytes) -> dict[str, int] | None:
    """Return piece -> id of a serialized SentencePiece model, or None when the bytes are something else.

    The file is a protocol buffer whose field 1 repeats the pieces in the order of their ids;
    each piece has its text in field 1.
    """
    tokens: dict[str, int] = {}
    try:
        count = 0
        for number, value in _fields(raw):
            if number == 1 and isinstance(value, bytes):
                text = next(v for n, v in _fields(value) if n == 1 and isinstance(v, bytes))
                tokens.setdefault(text.decode("utf-8"), count)
                count += 1
    except (IndexError, ValueError, StopIteration):
        return None
    return tokens or None


def _fields(raw: bytes):
    at = 0
    while at < len(raw):
        tag, at = _varint(raw, at)
        wire = tag & 7
        if wire == 0:
            value, at = _varint(raw, at)
        elif wire in (1, 5):
            value, at = None, at + (8 if wire == 1 else 4)
        elif wire == 2:
            length, at = _varint(raw, at)
            if at + length > len(raw):
                raise ValueError("truncated")
            value, at = raw[at : at + length], at + length
        else:
            raise ValueError("not a protocol buffer")
        yield tag >> 3, value


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = raw[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("not a varint")


def _tiktoken_ranks(raw: bytes) -> dict[str, int] | None:
    """Return token -> rank of a tiktoken file ("base64 rank" lines), bytes shown as Latin-1 text."""
    lines = raw.split(b"\n")
    tokens = {}
    try:
        for line in lines:
            if not line.strip():
                continue
            text, rank = line.split()
            tokens[base64.b64decode(text, validate=True).decode("latin-1")] = int(rank)
    except ValueError:
        return None
    return tokens or None


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def _unreadable(folder: Path, message: str) -> InputError:
    return InputError("E335", message, where=Where(str(folder)), help=_CONVERT)
