"""The record of one model family: which tensors a checkpoint holds and which key sets each size.

A family says what it holds in terms of named sizes ("hidden", "ffn", "vocab"), never in
numbers. The numbers come from config.json, read as plain JSON. From the same record follow
the complete set of names and shapes, the tied tensors, the tensors with a vocabulary axis,
and the configuration key to name when a shape does not fit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from surgeon.architectures.layered_config import MOST_LAYERS
from surgeon.architectures.settings import Settings, Size
from surgeon.errors import InputError, Where

Config = Mapping[str, Any]
Sizes = Mapping[str, Size]
Rule = Callable[[Settings], str | None]
"""Returns a sentence when two keys of the configuration contradict each other."""

MOST_TENSORS = 500_000
"""A limit that keeps a damaged configuration from filling the memory with names."""


@dataclass(frozen=True)
class Tensor:
    """One tensor of a family, relative to the module that holds it.

    Attributes:
        name: relative name; "{expert}" stands for each expert number.
        axes: names of the sizes along its axes, or None where the shape is not checked.
        kind: what it is, such as "attention_q", "ffn_down", "norm".
        optional: a checkpoint may lack it (buffers, tied copies).
        group: optional tensors of one group are present together or not at all.
    """

    name: str
    axes: tuple[str, ...] | None
    kind: str = "other"
    optional: bool = False
    group: str = ""


@dataclass(frozen=True)
class Alternatives:
    """The same weights in different storages; option i belongs to the family's storage i."""

    options: tuple[tuple[Tensor, ...], ...]


Part = Tensor | Alternatives


@dataclass(frozen=True, slots=True)
class Expected:
    """What a checkpoint must hold under one name.

    Attributes:
        shape: the exact shape, or None where it is not checked.
        optional: the tensor may be absent.
        axes: names of the sizes along the axes.
        keys: for each axis, the configuration keys that decide its length.
        kind: the tensor's part in the model.
        layer: its layer number, or None outside the layers.
        expert: its expert number, or None.
        group: tensors of one non-empty group are present together or not at all.
    """

    shape: tuple[int, ...] | None
    optional: bool = False
    axes: tuple[str, ...] = ()
    keys: tuple[tuple[str, ...], ...] = ()
    kind: str = "other"
    layer: int | None = None
    expert: int | None = None
    group: str = ""


@dataclass(frozen=True)
class Layout:
    """One way a checkpoint of the family is written: module prefix, storage, complete tensor set."""

    prefix: str
    storage: str
    tensors: Mapping[str, Expected]


def no_layers(settings: Settings) -> int:
    """Say that a family stores nothing beyond its numbered layers."""
    return 0


@dataclass(frozen=True)
class Architecture:
    """A model family as data.

    Attributes:
        model_type: the name in config.json; also the name of the module that holds the record.
        prefix: where the base model lies in a model with a head, such as "model.".
        stack: name of the container of layers inside the base model.
        layer_keys: the number of layers; the first key present counts.
        sizes: named sizes from the configuration.
        outer: tensors of the base model outside its layers.
        layer: tensors of layer i.
        head: tensors outside the base model, by their full names.
        ties: groups of names that are one tensor when embeddings are tied; "{prefix}" is replaced.
        default_tie: what transformers assumes when tie_word_embeddings is absent.
        storages: names of the storages, the one published on the hub first.
        defaults: values that transformers assumes for absent keys.
        rules: contradictions inside the configuration that no shape shows.
        extra_layers: how many layers beyond the configured number a checkpoint may hold.
        expert_layer_keys: the keys that decide which layers hold experts, where not all do.
        spelling: older endings of norm tensors, tried as a further layout: (old ending, new ending).
        branch_norms: norms of a layer that serve nothing but its attention, and nothing but its FFN.
        post_norm: whether a layer's residual sum itself is normalised, so that no weights make it pass through.
        count: the number of layers where no single key holds it; ``layer_keys`` are then what it follows from.
        tie_keys: names of tie_word_embeddings; the first one present counts.
        other_prefixes: further places of the base model, such as the library's own where the hub has another.
        section: key of the part of config.json that describes the language model; empty where that is all of it.
        beside: beginnings of the names of other parts (vision, projectors), which are not checked.
        offset_norms: pattern of the norms whose weight w multiplies as 1 + w; empty where none does.
        only_depth: why only whole layers of the family can be taken out, never heads or channels; empty where they can.
    """

    model_type: str
    prefix: str
    stack: str
    sizes: Callable[[Settings], Sizes]
    outer: Callable[[Settings], Iterable[Part]]
    layer: Callable[[Settings, int], Iterable[Part]]
    head: Callable[[Settings], Iterable[Part]]
    ties: tuple[tuple[str, ...], ...]
    default_tie: bool
    layer_keys: tuple[str, ...] = ("num_hidden_layers",)
    storages: tuple[str, ...] = ("plain",)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    extra_layers: Callable[[Settings], int] = no_layers
    expert_layer_keys: tuple[str, ...] = ()
    spelling: tuple[tuple[str, str], ...] = ()
    branch_norms: tuple[tuple[str, ...], tuple[str, ...]] = (
        ("input_layernorm",),
        ("post_attention_layernorm",),
    )
    post_norm: bool = False
    count: Callable[[Settings], int] | None = None
    tie_keys: tuple[str, ...] = ("tie_word_embeddings",)
    other_prefixes: tuple[str, ...] = ()
    section: str = ""
    beside: tuple[str, ...] = ()
    only_depth: str = ""
    offset_norms: str = ""

    def settings(self, config: Config) -> Settings:
        """Return the language model's configuration with this family's defaults behind it."""
        if self.section:
            config = self._text_config(config)
        return Settings(config, {**self.defaults, "tie_word_embeddings": self.default_tie})

    def _text_config(self, config: Config) -> Config:
        """Return the nested configuration; the class and, where it is said, the tie are those of the whole model."""
        nested = config.get(self.section)
        if not isinstance(nested, Mapping):
            raise InputError(
                "E340",
                f"config.json has no {self.section}, which describes the language model",
                where=Where(file="config.json"),
                help="fetch config.json again",
            )
        names = config.get("architectures")
        whole = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
        found = {**nested, "architectures": [whole.replace("ForConditionalGeneration", "ForCausalLM")]}
        return found | {key: config[key] for key in self.tie_keys if key in config}

    def is_tied(self, config: Config) -> bool:
        """Say whether input and output embeddings are one tensor."""
        return self.settings(config).flag(*self.tie_keys)

    def num_layers(self, config: Config) -> int:
        """Return the configured number of layers."""
        settings = self.settings(config)
        count = self.count(settings) if self.count is not None else settings.integer(*self.layer_keys)
        if count > MOST_LAYERS:
            raise InputError(
                "E340",
                f"config.json sets {self.layer_keys[0]} to {count}, more than any model has",
                where=Where(file="config.json"),
                help="fetch config.json again",
            )
        return count

    def expected(self, config: Config) -> dict[str, Expected]:
        """Return the complete tensor set in the layout that the hub uses for this configuration."""
        return dict(next(self.layouts(config)).tensors)

    def layouts(self, config: Config) -> Iterator[Layout]:
        """Yield every accepted layout, the usual one first.

        A bare base model ("LlamaModel") is written without prefix; both ways are accepted for
        all classes, because readers accept both.
        """
        bare = self.is_bare(config)
        usual = (self.prefix, *self.other_prefixes)
        for prefix in ("", *usual) if bare else (*usual, ""):
            for number, storage in enumerate(self.storages):
                tensors = self._tensors(config, prefix, number)
                yield Layout(prefix, storage, tensors)
                if self.spelling:
                    yield Layout(prefix, "old names", self._respelled(tensors))

    def is_bare(self, config: Config) -> bool:
        """Say whether config.json names the base model class, which has no head."""
        name = self.settings(config).model_class()
        return name.endswith("Model") and "Head" not in name

    def layout(self, config: Config, names: Collection[str]) -> Layout:
        """Return the accepted layout that fits a checkpoint's names best.

        The one that shares most names wins, then the one that asks for fewer, then the usual one.
        """
        best: tuple[tuple[int, int], Layout] | None = None
        for layout in self.layouts(config):
            shared = sum(name in layout.tensors for name in names)
            required = sum(not spec.optional for spec in layout.tensors.values())
            if best is None or (shared, -required) > best[0]:
                best = ((shared, -required), layout)
        assert best is not None
        return best[1]

    def tied(self, config: Config, names: Collection[str] | None = None) -> list[tuple[str, ...]]:
        """Return the groups of names that are one tensor, the stored name first; empty when untied.

        Args:
            config: the parsed config.json.
            names: the names a checkpoint holds, to answer in its own layout.
        """
        if names is not None:
            return self._tied(config, self.layout(config, names).prefix)
        return self._tied(config, "" if self.is_bare(config) else self.prefix)

    def vocabulary_tensors(self, config: Config, names: Collection[str] | None = None) -> list[str]:
        """Return the names of all tensors whose axis 0 is the vocabulary, sorted.

        Args:
            config: the parsed config.json.
            names: the names a checkpoint holds; the answer then names only those. Without them it
                names every possible one, tied copies and other optional tensors included.
        """
        tensors = self.expected(config) if names is None else self.layout(config, names).tensors
        found = {name for name, spec in tensors.items() if spec.axes[:1] == ("vocab",)}
        return sorted(found if names is None else found.intersection(names))

    def norm_offset(self, name: str) -> float:
        """Return what is added to a norm's weight before it multiplies: 1 or 0."""
        return float(
            bool(self.offset_norms and name.endswith(".weight") and re.search(self.offset_norms, name))
        )

    def contradictions(self, config: Config) -> list[str]:
        """Return one sentence for each contradiction between keys of the configuration."""
        settings = self.settings(config)
        return [sentence for rule in self.rules if (sentence := rule(settings)) is not None]

    def _tied(self, config: Config, prefix: str) -> list[tuple[str, ...]]:
        if not self.is_tied(config) or self.is_bare(config):
            return []
        return [tuple(name.format(prefix=prefix) for name in group) for group in self.ties]

    def _tensors(self, config: Config, prefix: str, storage: int) -> dict[str, Expected]:
        settings = self.settings(config)
        sizes = self.sizes(settings)
        experts = sizes["experts"].value if "experts" in sizes else 0
        count = self.num_layers(config)
        copies = {name for group in self._tied(config, prefix) for name in group[1:]}
        found: dict[str, Expected] = {}

        def add(parts: Iterable[Part], path: str, layer: int | None) -> None:
            for part in parts:
                if isinstance(part, Alternatives):
                    add(part.options[storage], path, layer)
                    continue
                numbered = "{expert}" in part.name
                if len(found) + (experts if numbered else 1) > MOST_TENSORS:
                    raise InputError(
                        "E340",
                        f"config.json describes more than {MOST_TENSORS} tensors",
                        where=Where(file="config.json"),
                        help="check the number of layers and the number of experts",
                    )
                for expert in range(experts) if numbered else (None,):
                    name = path + part.name.replace("{expert}", str(expert))
                    found[name] = _sized(part, sizes, layer, expert, optional=name in copies)

        add(self.outer(settings), prefix, None)
        for layer in range(count + self.extra_layers(settings)):
            add(self.layer(settings, layer), f"{prefix}{self.stack}.{layer}.", layer)
        if not self.is_bare(config):
            add(self.head(settings), "", None)
        return found

    def _respelled(self, tensors: Mapping[str, Expected]) -> dict[str, Expected]:
        renamed = {}
        for name, spec in tensors.items():
            for old, new in self.spelling:
                if spec.kind.startswith("norm") and name.endswith(new):
                    name = name.removesuffix(new) + old
                    break
            renamed[name] = spec
        return renamed


def _sized(part: Tensor, sizes: Sizes, layer: int | None, expert: int | None, optional: bool) -> Expected:
    axes = part.axes or ()
    return Expected(
        shape=None if part.axes is None else tuple(sizes[axis].value for axis in axes),
        optional=optional or part.optional or bool(part.group),
        axes=axes,
        keys=tuple(sizes[axis].keys for axis in axes),
        kind=part.kind,
        layer=layer,
        expert=expert,
        group=f"{part.group} {layer}" if part.group else "",
    )
