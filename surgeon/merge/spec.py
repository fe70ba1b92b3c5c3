"""What is to be merged, in one form, whoever asked: command line, recipe, mergekit YAML, Python.

A `MergeSpec` is data only. It names models by reference string and holds parameters
unresolved (scalars, gradients over layers, filters), because their value depends on the
tensor; `surgeon.merge.parameters` resolves them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from surgeon.errors import Where
from surgeon.merge.adjustments import Adjustments, CalibrationSource

ParameterMap = dict[str, Any]
"""Parameter name -> scalar | list of scalars (gradient) | {filter, value} | list of those."""


@dataclass(frozen=True)
class ModelRef:
    """A model as the user wrote it: local path or hub id, revision, adapter."""

    path: str
    revision: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None
    subfolder: str | None = None

    def __str__(self) -> str:
        text = self.path
        if self.revision:
            text += f"@{self.revision}"
        if self.subfolder:
            text += f"/{self.subfolder}"
        if self.adapter:
            text += f"+{self.adapter}"
            if self.adapter_revision:
                text += f"@{self.adapter_revision}"
        return text


@dataclass(frozen=True)
class SliceSource:
    """One model's part in a slice; ``layer_range`` is [start, stop), None = all layers."""

    model: ModelRef
    layer_range: tuple[int, int] | None = None
    parameters: ParameterMap = field(default_factory=dict)
    where: Where | None = None


@dataclass(frozen=True)
class Slice:
    """A run of output layers made from equally long runs of the sources' layers."""

    sources: tuple[SliceSource, ...]
    base_model: ModelRef | None = None
    parameters: ParameterMap = field(default_factory=dict)


@dataclass(frozen=True)
class Module:
    """One stack of a multi-part model (text, vision); most models have the single module ''."""

    name: str
    slices: tuple[Slice, ...]
    parameters: ParameterMap = field(default_factory=dict)


@dataclass(frozen=True)
class TokenSource:
    """Where the row of one token comes from.

    kind "model": that model's row of the same token; without a model, the ordinary rule (the
    token is only added to the vocabulary). "model_token": the row of another
    token (``token`` or ``token_id``) of ``model``. "zero": a zero row. ``force`` applies it
    even to models that own the token.
    """

    kind: str
    model: ModelRef | None = None
    token: str | None = None
    token_id: int | None = None
    force: bool = False


@dataclass(frozen=True)
class TokenizerSpec:
    """How the output vocabulary is built: "union", "base" or one model's, plus single tokens."""

    source: str | ModelRef
    tokens: dict[str, TokenSource] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None


@dataclass(frozen=True)
class MergeSpec:
    """A complete merge, before any file was opened.

    Attributes:
        method: canonical name with underscores, e.g. "dare_ties".
        modules: at least one; a plain ``models:`` list is one module with one slice whose
            sources have no layer_range.
        base_model: reference model, or None.
        parameters: global parameters.
        dtype: cast on load (mergekit's ``dtype``), None = inputs' common dtype.
        out_dtype: cast on save, None = see `surgeon.merge.planner`.
        precision: "float32" (our command line) or "mergekit" (each method's own rule).
        tokenizer: None copies the donor's tokenizer files.
        chat_template: "auto", a built-in name, Jinja text, or None = donor's.
        adjust: what is put on top of the method, and ``calibration``, the text it is measured on.
        text_from: model that gives context length, generation settings, tokenizer and chat template.
        name: document name in a multi-document YAML.
        flavour: "native" or "mergekit"; decides defaults and which oddities are lints.
        source_text: the YAML text as given, written to mergekit_config.yml.
        where: YAML positions of keys for later messages, path tuple -> Where.
    """

    method: str
    modules: tuple[Module, ...]
    base_model: ModelRef | None = None
    parameters: ParameterMap = field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    precision: str = "float32"
    tokenizer: TokenizerSpec | None = None
    chat_template: str | None = None
    adjust: Adjustments = field(default_factory=Adjustments)
    calibration: CalibrationSource = field(default_factory=CalibrationSource)
    text_from: ModelRef | None = None
    name: str | None = None
    flavour: str = "native"
    source_text: str | None = None
    where: dict[tuple, Where] = field(default_factory=dict)

    def models(self) -> list[ModelRef]:
        """Return every model named, in order of first mention, base model last if only named there."""
        seen: dict[ModelRef, None] = {}
        for module in self.modules:
            for piece in module.slices:
                for source in piece.sources:
                    seen.setdefault(source.model)
        for module in self.modules:
            for piece in module.slices:
                if piece.base_model is not None:
                    seen.setdefault(piece.base_model)
        if self.base_model is not None:
            seen.setdefault(self.base_model)
        return list(seen)
