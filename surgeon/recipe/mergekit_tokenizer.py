"""The `tokenizer_source` and `tokenizer` keys of a mergekit file."""

from __future__ import annotations

from surgeon.merge.spec import ModelRef, TokenizerSpec, TokenSource
from surgeon.recipe.mergekit_reading import Context, check_keys, read_model, whole_number
from surgeon.recipe.yaml import KeyPath
from surgeon.scalars import show

_TOKEN_SOURCE_KINDS = ("model_token", "zero")


def read_tokenizer(context: Context) -> TokenizerSpec | None:
    """Read whichever of the two keys is given; None leaves the donor's tokenizer alone."""
    data = context.document.data
    short, long = data.get("tokenizer_source"), data.get("tokenizer")
    if short is not None and long is not None:
        message = "tokenizer_source and tokenizer are both given"
        context.refuse("E255", message, ("tokenizer_source",), "keep tokenizer: {source: ...}", key=True)
    if short is not None and long is None:
        source = _source(context, ("tokenizer_source",))
        return None if source is None else TokenizerSpec(source)
    if long is None:
        return None
    if not isinstance(long, dict):
        context.refuse(
            "E212", f"{show(long)} where a mapping is expected", ("tokenizer",), "use tokenizer_source"
        )
        return None
    check_keys(context, ("tokenizer",), "tokenizer")
    source = _source(context, ("tokenizer", "source")) if "source" in long else "union"
    padding = _padding(context, ("tokenizer", "pad_to_multiple_of"))
    return TokenizerSpec(source or "union", _tokens(context, ("tokenizer", "tokens")), padding)


def _source(context: Context, path: KeyPath) -> str | ModelRef | None:
    value = context.at(path)
    return value if value in ("union", "base") else read_model(context, path)


def _padding(context: Context, path: KeyPath) -> int | None:
    value = context.at(path)
    if value is None:
        return None
    number = whole_number(value)
    if number is None or number < 1:
        context.refuse("E212", f"pad_to_multiple_of is a whole number from 1 up, not {show(value)}", path,
                       "such as 64; leave it out and nothing is added")  # fmt: skip
    return number


def _tokens(context: Context, path: KeyPath) -> dict[str, TokenSource]:
    tokens = context.at(path)
    if tokens is None:
        return {}
    if not isinstance(tokens, dict):
        context.refuse(
            "E212",
            f"{show(tokens)} where tokens by their text are expected",
            path,
            'tokens: {"<think>": {source: ./long}}',
        )
        return {}
    return {token: _token(context, (*path, token)) for token in tokens}


def _token(context: Context, path: KeyPath) -> TokenSource:
    entry = context.at(path)
    nothing = TokenSource("model")
    if not isinstance(entry, dict):
        context.refuse("E212", f"{show(entry)} where {{source, force}} is expected", path,
                       "{source: ./model, force: true}; source is a model, or {kind: zero}")  # fmt: skip
        return nothing
    check_keys(context, path, "an entry of tokens")
    force = entry.get("force", False)
    if not isinstance(force, bool):
        context.refuse(
            "E212",
            f"force is true or false, not {show(force)}",
            (*path, "force"),
            "write it without quotes; the default is false",
        )
        force = False
    source = entry.get("source")
    place = (*path, "source")
    if source is None:
        return TokenSource("model", force=force)
    if not isinstance(source, dict) or "kind" not in source:
        return TokenSource("model", read_model(context, place), force=force)
    kind = source["kind"]
    if kind not in _TOKEN_SOURCE_KINDS:
        known = " or ".join(_TOKEN_SOURCE_KINDS)
        context.refuse("E212", f"unknown kind {show(kind)} of token source", (*place, "kind"), f"use {known}")
        return nothing
    check_keys(context, place, "a token source")
    return TokenSource("zero", force=force) if kind == "zero" else _model_token(context, place, force)


def _model_token(context: Context, path: KeyPath, force: bool) -> TokenSource:
    source = context.at(path)
    token, number = source.get("token"), source.get("token_id")
    if (token is None) == (number is None):
        found = "neither" if token is None else "both"
        context.refuse("E255", f"a model_token needs either token or token_id, found {found}", path,
                       "{kind: model_token, model: ./model, token: <pad>}")  # fmt: skip
    if source.get("model") is None:
        context.refuse(
            "E255", "a model_token needs a model", path, "{kind: model_token, model: ./model, token: <pad>}"
        )
        return TokenSource("model_token")
    # The source text: a token may look like a number or a word such as "no".
    text = context.document.source((*path, "token")) if token is not None else None
    if token is not None and text is None:
        context.refuse("E212", f"a token is text, not {show(token)}", (*path, "token"),
                       "one token in quotes; token_id takes its number")  # fmt: skip
    identity = whole_number(number)
    if number is not None and (identity is None or identity < 0):
        context.refuse(
            "E212",
            f"token_id is a whole number from 0 up, not {show(number)}",
            (*path, "token_id"),
            "the row of the token; token takes its text",
        )
    return TokenSource("model_token", read_model(context, (*path, "model")), text, identity, force)
