"""What all parts of a mergekit file share: known keys, findings, model references."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from surgeon.errors import SurgeonError, UsageError, Where, close_matches
from surgeon.merge.references import parse_model_ref
from surgeon.merge.settings import ParameterLike
from surgeon.merge.spec import ModelRef
from surgeon.recipe.yaml import MAX_ERRORS, Document, KeyPath
from surgeon.scalars import show

Parameters = Mapping[str, ParameterLike]


# Every parameter any method of mergekit has: given to another method it is inert, not unknown.
MERGEKIT_PARAMETERS = frozenset(
    [
        "alpha",
        "density",
        "eps",
        "epsilon",
        "filter_wise",
        "gamma",
        "int8_mask",
        "lambda",
        "max_iter",
        "normalize",
        "normalize_weights",
        "nuslerp_flatten",
        "nuslerp_row_wise",
        "r",
        "rescale",
        "scale",
        "select_topk",
        "t",
        "tol",
        "weight",
    ]
)
# Which keys each kind of mapping takes.
LEVELS: dict[str, tuple[str, ...]] = {
    "the top level": (
        "merge_method", "base_model", "models", "slices", "modules", "parameters", "dtype", "out_dtype",
        "tokenizer_source", "tokenizer", "chat_template", "name", "surgeon",
    ),
    "surgeon": (
        "text_from", "aim", "acm", "acm_estimator", "sens", "fim", "delta_rank", "layer_scores", "calibration",
    ),
    "calibration": ("source", "samples", "sequence_length", "pack"),
    "an entry of models": ("model", "parameters"),
    "an entry of slices": ("sources", "base_model", "parameters"),
    "an entry of sources": ("model", "layer_range", "parameters"),
    "an entry of modules": ("models", "slices", "parameters"),
    "a model reference": ("model", "lora"),
    "a model path": ("path", "revision"),
    "tokenizer": ("source", "tokens", "pad_to_multiple_of"),
    "an entry of tokens": ("source", "force"),
    "a token source": ("kind", "model", "token", "token_id"),
}  # fmt: skip
# Known in published files, without effect on the result.
_INERT_KEYS = {
    ("an entry of slices", "residual_weight"): "residual_weight has no effect, in mergekit neither",
    ("the top level", "random_seed"): "random_seed has no effect in a mergekit file; use --seed",
    ("a model reference", "override_architecture"): (
        "override_architecture has no effect here; the architecture is read from the checkpoint"
    ),
}


@dataclass(frozen=True)
class Note:
    """Something harmless that the author of a file should know; an error under --strict."""

    message: str
    where: Where | None = None

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" if self.where else self.message


@dataclass(frozen=True)
class Context:
    """One document being read, and what was found wrong or odd in it."""

    document: Document
    known: Callable[[str], Parameters | None]
    errors: list[SurgeonError] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)

    def at(self, path: KeyPath) -> Any:
        """Return the data at a path, None where it does not exist."""
        data = self.document.data
        for step in path:
            if isinstance(data, dict):
                data = data.get(step)
            elif isinstance(data, list) and isinstance(step, int) and step < len(data):
                data = data[step]
            else:
                return None
        return data

    def refuse(
        self, code: str, message: str, path: KeyPath, help: str | None = None, key: bool = False
    ) -> None:
        """Record an error about the value (or the key) at a path; far too many are not all kept."""
        if len(self.errors) >= MAX_ERRORS:
            return
        where = self.document.key_where(path) if key else self.document.where(path)
        self.errors.append(UsageError(code, message, where=where, help=help))

    def note(self, message: str, path: KeyPath) -> None:
        """Record a note about the key at a path."""
        self.notes.append(Note(message, self.document.key_where(path)))


def check_keys(context: Context, path: KeyPath, level: str) -> None:
    """Refuse unknown keys of the mapping at a path, and note the inert ones."""
    data = context.at(path)
    for key in data:
        if len(context.errors) >= MAX_ERRORS:
            return
        if key in LEVELS[level]:
            continue
        place = (*path, key)
        if (level, key) in _INERT_KEYS:
            context.note(_INERT_KEYS[level, key], place)
            continue
        homes = [home for home, keys in LEVELS.items() if key in keys and home != level]
        fix = close_matches(key, LEVELS[level])
        if homes:
            fix = f'"{key}" belongs in {" or ".join(homes)}'
        elif level == "the top level" and key in MERGEKIT_PARAMETERS:
            fix = f'"{key}" belongs in parameters'
        fix = fix or f"{level} takes {', '.join(LEVELS[level])}"
        context.refuse("E210", f"unknown key {show(key)} in {level}", place, fix, key=True)


def read_model(context: Context, path: KeyPath) -> ModelRef | None:
    """Read a model reference, as text or as {model: {path, revision}, lora: {path, revision}}."""
    data = context.at(path)
    if not isinstance(data, dict):
        return _reference(context, path)
    check_keys(context, path, "a model reference")
    if data.get("model") is None:
        context.refuse("E255", "a model reference needs a model", path, "write {model: {path: ...}}")
        return None
    model = _model_path(context, (*path, "model"))
    if data.get("lora") is None or model is None:
        return model
    lora = _model_path(context, (*path, "lora"))
    return lora and ModelRef(model.path, model.revision, lora.path, lora.revision, model.subfolder)


def _model_path(context: Context, path: KeyPath) -> ModelRef | None:
    """Read the inner {path, revision}, whose path is taken literally, or its short form."""
    data = context.at(path)
    if not isinstance(data, dict):
        reference = _reference(context, path)
        if reference is not None and reference.adapter is not None:
            context.refuse("E204", f'"{reference}" names an adapter; write it under lora', path,
                           "{model: {path: MODEL}, lora: {path: ADAPTER}}")  # fmt: skip
        return reference
    check_keys(context, path, "a model path")
    place = context.document.source((*path, "path"))
    if not place or data.get("path") is None:
        context.refuse(
            "E255", "a model path needs a path", path, "{path: ./model}, or {path: org/name, revision: main}"
        )
        return None
    revision = context.document.source((*path, "revision"))
    if data.get("revision") is not None and not revision:
        context.refuse("E204", "a revision is text", (*path, "revision"), help="put it in quotes")
    return ModelRef(place, revision if data.get("revision") is not None else None)


def _reference(context: Context, path: KeyPath) -> ModelRef | None:
    # The source text, not the value: a model may be called 1e5, no, or 0123456.
    text = context.document.source(path)
    if text is None:
        context.refuse("E204", f"{show(context.at(path))} where a model is expected", path,
                       "a folder, org/name, MODEL+ADAPTER, or {model: {path: ...}}")  # fmt: skip
        return None
    try:
        return parse_model_ref(text, where=context.document.where(path))
    except UsageError as error:
        context.errors.append(error)
        return None


def whole_number(value: Any) -> int | None:
    """Return a whole number given as number or as text (an old habit in published files)."""
    if isinstance(value, str):
        return int(value) if re.fullmatch(r"-?[0-9]{1,9}", value) and not re.match(r"-?0.", value) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value):
        return None
    return int(value)
