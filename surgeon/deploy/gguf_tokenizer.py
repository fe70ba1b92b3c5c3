"""Tokenizers as GGUF keys: tokens, merges or scores, types, the pre-tokenizer's name, special ids, chat template.

llama.cpp has the splitting rules of each model family compiled in under a name, `tokenizer.ggml.pre`. The
name is found by comparing what tokenizer.json does, step by step, with what each name stands for; a tokenizer
that does anything else is refused, because a near miss would change every prompt without a message.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgeon.checkpoint.header import printable
from surgeon.errors import EnvironmentFault, InputError, Where

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Token types of GGUF."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

Step = tuple[str, ...]
PRE_TOKENIZERS: dict[str, tuple[tuple[Step, ...], bool]] = {
    "llama-bpe": (
        (("split", f"{_CONTRACTIONS}|{_LETTERS}|\\p{{N}}{{1,3}}|{_REST}"), ("bytes", "plain")),
        True,
    ),
    "qwen2": ((("split", f"{_CONTRACTIONS}|{_LETTERS}|\\p{{N}}|{_REST}"), ("bytes", "plain")), False),
    "tekken": ((("split", _TEKKEN), ("bytes", "plain")), True),
    "smollm": ((("digits",), ("bytes", "regex")), False),
    "gpt-2": ((("bytes", "regex"),), False),
}
"""Name -> (steps, whether a whole word that is a token is taken without looking at merges)."""


@dataclass(frozen=True)
class GgufTokenizer:
    """Keys of a tokenizer, ready to write; ``tokenizer`` is the transformers object it was read from."""

    keys: Mapping[str, Any]
    tokenizer: Any = field(repr=False)
    notes: tuple[str, ...] = ()


def read_tokenizer(folder: Path, rows: int) -> GgufTokenizer:
    """Read a model folder's tokenizer as GGUF keys.

    Args:
        folder: where the tokenizer's files lie.
        rows: rows of the embedding; tokens beyond the tokenizer's are written as unused.

    Raises:
        InputError: E329 no tokenizer, one that llama.cpp would apply differently, or more tokens than rows.
        EnvironmentFault: E512 transformers is not installed.
    """
    where = Where(str(folder))
    tokenizer = _load(folder)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError("E329", "the tokenizer has no tokenizer.json form", where=where,
                         help="convert it with transformers first")  # fmt: skip
    spec = json.loads(backend.to_str())
    model = spec["model"]
    if model.get("type") != "BPE":
        raise InputError("E329", f"the tokenizer is a {printable(str(model.get('type')))} model; byte-pair encodings can be written",
                         where=where, help="keep the safetensors folder")  # fmt: skip
    if len(tokenizer) > rows:
        raise InputError(
            "E329",
            f"the tokenizer has {len(tokenizer):,} tokens, the embedding {rows:,} rows",
            where=where,
            help="take the tokenizer that belongs to this model",
        )
    notes: list[str] = []
    keys = (
        _sentence_piece(spec, rows, where)
        if model.get("byte_fallback")
        else _byte_level(spec, rows, where, notes)
    )
    keys |= _special(tokenizer, folder, where)
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        template = template.get("default")
    if template:
        keys["chat_template"] = template
    return GgufTokenizer({f"tokenizer.{key}": value for key, value in keys.items()}, tokenizer, tuple(notes))


def _load(folder: Path) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise EnvironmentFault("E512", "transformers is not installed; it reads tokenizers",
                               help='pip install "model-surgeon[run]"') from error  # fmt: skip
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # it warns about model types of our own
    try:
        return transformers.AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError("E329", f"transformers cannot load the tokenizer: {printable(reason)}", where=Where(str(folder)),
                         help="a GGUF file holds its tokenizer; name the folder that has one") from error  # fmt: skip
    finally:
        transformers.utils.logging.set_verbosity(level)


def pre_tokenizer(spec: Mapping[str, Any]) -> str | None:
    """Return llama.cpp's name for what a tokenizer.json does before its merges, or None."""
    steps = []
    for step in _flat(spec.get("pre_tokenizer")):
        kind = step.get("type")
        if (
            kind == "Split"
            and "Regex" in step.get("pattern", {})
            and step.get("behavior") == "Isolated"
            and not step.get("invert")
        ):
            steps.append(("split", step["pattern"]["Regex"]))
        elif kind == "ByteLevel" and not step.get("add_prefix_space"):
            steps.append(("bytes", "regex" if step.get("use_regex", True) else "plain"))
        elif kind == "Digits" and step.get("individual_digits"):
            steps.append(("digits",))
        else:
            return None
    whole = bool(spec["model"].get("ignore_merges"))
    return next((name for name, known in PRE_TOKENIZERS.items() if known == (tuple(steps), whole)), None)


def _flat(step: Any) -> list[Mapping[str, Any]]:
    if step is None:
        return []
    if step.get("type") == "Sequence":
        inner = step.get("pretokenizers") or step.get("normalizers") or []
        return [part for entry in inner for part in _flat(entry)]
    return [step]


def _byte_level(spec: Mapping[str, Any], rows: int, where: Where, notes: list[str]) -> dict[str, Any]:
    name = pre_tokenizer(spec)
    if name is None:
        raise InputError(
            "E329", "llama.cpp has no rules that split text the way this tokenizer does", where=where,
            help="known are " + ", ".join(PRE_TOKENIZERS) + "; a wrong name would change every prompt",
        )  # fmt: skip
    steps = [str(step.get("type")) for step in _flat(spec.get("normalizer"))]
    if steps == ["NFC"]:
        notes.append(
            "the tokenizer composes accents (NFC) before it splits, llama.cpp does not; give it composed text"
        )
    elif steps:
        raise InputError(
            "E329",
            f"the tokenizer changes text first ({printable(', '.join(steps))}), llama.cpp does not",
            where=where,
            help="keep the safetensors folder: prompts would be split in another way",
        )
    model = spec["model"]
    if model.get("unk_token") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise InputError(
            "E329",
            "the tokenizer marks unknown or inner pieces, which llama.cpp does not",
            where=where,
            help="keep the safetensors folder: prompts would be split in another way",
        )
    tokens, types = _tokens(spec, rows)
    merges = [entry if isinstance(entry, str) else " ".join(entry) for entry in model["merges"]]
    if not merges:
        raise InputError("E329", "the tokenizer has no merges; llama.cpp needs at least one", where=where,
                         help="keep the safetensors folder, or take tokenizer.json from the original model if it was lost")  # fmt: skip
    return {
        "ggml.model": "gpt2",
        "ggml.pre": name,
        "ggml.tokens": tokens,
        "ggml.token_type": types,
        "ggml.merges": merges,
    }


def _sentence_piece(spec: Mapping[str, Any], rows: int, where: Where) -> dict[str, Any]:
    """Return keys of a SentencePiece BPE: pieces with scores, where the score is the merge's rank.

    llama.cpp joins the pair whose result has the best score; tokenizer.json lists the same order as merges.
    """
    steps = [*_flat(spec.get("normalizer")), *_flat(spec.get("pre_tokenizer"))]
    prefix = False
    for step in steps:
        kind = step.get("type")
        if kind == "Prepend" and step.get("prepend") == "▁":
            prefix = True
        elif kind == "Replace" and step.get("pattern") == {"String": " "} and step.get("content") == "▁":
            pass
        elif kind == "Metaspace" and step.get("replacement") == "▁" and not step.get("split", True):
            prefix = step.get("prepend_scheme") in ("first", "always")
        else:
            raise InputError("E329", f"the tokenizer does something llama.cpp's SentencePiece rules do not: {printable(str(kind))}",
                             where=where, help="keep the safetensors folder: prompts would be split in another way")  # fmt: skip
    tokens, types = _tokens(spec, rows)
    ranks: dict[str, int] = {}
    for rank, entry in enumerate(spec["model"]["merges"]):
        joined = entry.replace(" ", "") if isinstance(entry, str) else "".join(entry)
        ranks.setdefault(joined, rank)
    last = len(ranks)
    scores = [
        -float(ranks.get(token, last)) if kind == NORMAL else 0.0
        for token, kind in zip(tokens, types, strict=True)
    ]
    unknown = spec["model"].get("unk_token")
    for number, token in enumerate(tokens):
        if token == unknown:
            types[number] = UNKNOWN
        elif re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            types[number] = BYTE
    if BYTE not in types:
        raise InputError("E329", "the tokenizer falls back to bytes but has no byte tokens", where=where,
                         help="<0x00> to <0xFF> are missing in tokenizer.json: take the file from the original model")  # fmt: skip
    return {
        "ggml.model": "llama", "ggml.pre": "default", "ggml.tokens": tokens, "ggml.scores": scores,
        "ggml.token_type": types, "ggml.add_space_prefix": prefix,
    }  # fmt: skip


def _tokens(spec: Mapping[str, Any], rows: int) -> tuple[list[str], list[int]]:
    tokens = [f"[PAD{number}]" for number in range(rows)]
    types = [UNUSED] * rows
    for token, number in spec["model"]["vocab"].items():
        tokens[number], types[number] = token, NORMAL
    for added in spec.get("added_tokens", ()):
        tokens[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    return tokens, types


def _special(tokenizer: Any, folder: Path, where: Where) -> dict[str, Any]:
    """Return ids of special tokens, and which are put around a text."""
    keys: dict[str, Any] = {}
    for name in ("bos", "unk", "pad"):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            keys[f"ggml.{'padding' if name == 'pad' else 'unknown' if name == 'unk' else name}_token_id"] = (
                int(number)
            )
    for name, number in zip(("eos", "eot", "eom"), _ends(tokenizer, folder), strict=False):
        keys[f"ggml.{name}_token_id"] = number
    text = "a"
    plain, framed = (tokenizer.encode(text, add_special_tokens=special) for special in (False, True))
    before, after = _around(framed, plain, where)
    if before not in ([], [keys.get("ggml.bos_token_id")]) or after not in ([], [tokenizer.eos_token_id]):
        raise InputError(
            "E329",
            "the tokenizer puts tokens around a text that llama.cpp cannot put there",
            where=where,
            help="llama.cpp puts bos before and eos after; change the post_processor of tokenizer.json, or keep the safetensors folder",
        )
    keys["ggml.add_bos_token"], keys["ggml.add_eos_token"] = bool(before), bool(after)
    return keys


def _around(framed: Sequence[int], plain: Sequence[int], where: Where) -> tuple[list[int], list[int]]:
    for start in range(len(framed) - len(plain) + 1):
        if list(framed[start : start + len(plain)]) == list(plain):
            return list(framed[:start]), list(framed[start + len(plain) :])
    raise InputError(
        "E329",
        "the tokenizer reads a text differently with special tokens around it",
        where=where,
        help="keep the safetensors folder: llama.cpp adds special tokens to a text without changing it",
    )


def _ends(tokenizer: Any, folder: Path) -> list[int]:
    """Return the tokens that end a reply: the tokenizer's first, then those of generation_config.json."""
    found = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    path = folder / "generation_config.json"
    listed = json.loads(path.read_bytes()).get("eos_token_id") if path.exists() else None
    for number in listed if isinstance(listed, list) else [listed]:
        if isinstance(number, int) and number not in found:
            found.append(number)
    return found
