"""Numbers of experts as the configuration gives them: every alias read, contradictions refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from surgeon.architectures.expert_records.record import ExpertRecord
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.errors import InputError, Where, raise_all
from surgeon.structure.experts.names import ROUTED

COUNT_KEYS = (
    "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts", "num_routed_experts",
)  # fmt: skip
"""Keys by which configurations of unknown families are recognised as mixtures of experts."""

_RESTORE = "take config.json from the model as it was published"
MOST_LAYERS = 100_000
"""More than any model has; a hostile number must not become a list of that length."""


@dataclass(frozen=True)
class Sizes:
    """What the configuration says of experts.

    Attributes:
        section: the part of config.json it was read from, "" for the top.
        experts, top_k, width, groups, topk_group, hidden: as in `Experts`.
        input: width of what experts read and write.
        layers: configured number of layers.
        moe_layers: those with experts, by the record's rules.
        experts_key: the key that gives the number of experts, for messages.
    """

    section: str
    experts: int
    top_k: int
    width: int
    groups: int
    topk_group: int
    hidden: int
    input: int
    layers: int
    moe_layers: frozenset[int]
    experts_key: str

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise on numbers no router can work with.

        Raises:
            InputError: E422.
        """
        raise_all(_contradiction(checkpoint, wrong) for wrong in self._wrong())

    def _wrong(self) -> list[str]:
        wrong = [
            f"{what} is 0" for what, size in (("an expert's width", self.width), ("the hidden size", self.hidden))
            if size == 0
        ]  # fmt: skip
        if self.experts < 1:
            wrong.append(f"{self.experts_key} = {self.experts}, but there are tensors of experts")
        if self.top_k > self.experts >= 1:
            wrong.append(f"a token goes to {self.top_k} experts, but {self.experts_key} = {self.experts}")
        if self.experts % self.groups:
            wrong.append(
                f"{self.experts_key} = {self.experts} experts cannot form {self.groups} equal groups"
            )
        elif self.topk_group > self.groups:
            wrong.append(f"a token may use {self.topk_group} of {self.groups} groups")
        elif self.topk_group * (self.experts // self.groups) < self.top_k <= self.experts:
            wrong.append(
                f"the {self.topk_group} groups a token may use hold {self.topk_group * (self.experts // self.groups)} "
                f"experts, but it goes to {self.top_k}"
            )
        return wrong


def looks_routed(checkpoint: Checkpoint) -> bool:
    """Say whether a checkpoint of an unknown family seems to have experts, by its names or its configuration."""
    config = checkpoint.config or {}
    nested = config.get("text_config")
    for section in (config, nested if isinstance(nested, dict) else {}):
        for key in COUNT_KEYS:
            value = section.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and value > 1:
                return True
    return holds_routed(checkpoint)


def holds_routed(checkpoint: Checkpoint) -> bool:
    """Say whether there are tensors of experts; a dense model of a mixed family has none, whatever its configuration counts."""
    return any(ROUTED.search(name) for name in checkpoint.tensors)


def sizes_of(checkpoint: Checkpoint, record: ExpertRecord) -> Sizes:
    """Read a configuration by a record.

    Raises:
        InputError: E422 a number is missing, is none, or two names of it disagree.
    """
    config = checkpoint.config or {}
    section = _section(config, record)
    if section is None:
        keys = " or ".join(record.counts.experts)
        raise InputError(
            "E422", f"{checkpoint.label}: config.json does not say how many experts there are ({keys})",
            where=Where("config.json"), help=_RESTORE,
        )  # fmt: skip
    reader = _Reader(checkpoint, record, config, section)
    counts = record.counts
    experts_key, experts = reader.number(counts.experts)
    groups, topk_group = 1, 1
    if counts.groups and reader.grouped():
        groups = reader.optional(counts.groups) or 1
        topk_group = (reader.optional(counts.topk_group) or 1) if groups > 1 else 1
    hidden = reader.number(counts.hidden)[1]
    layers = reader.layers(counts.layers)
    return Sizes(
        section=section,
        experts=experts,
        top_k=reader.number(counts.top_k)[1],
        width=reader.number(counts.width)[1],
        groups=groups,
        topk_group=topk_group,
        hidden=hidden,
        input=reader.optional(counts.input) or hidden,
        layers=layers,
        moe_layers=reader.moe_layers(layers) if experts > 1 else frozenset(),
        experts_key=experts_key,
    )


def _section(config: Mapping[str, Any], record: ExpertRecord) -> str | None:
    for section in record.sections:
        part = config if section == "" else config.get(section)
        if isinstance(part, Mapping) and any(part.get(key) is not None for key in record.counts.experts):
            return section
    return None


class _Reader:
    def __init__(
        self, checkpoint: Checkpoint, record: ExpertRecord, config: Mapping[str, Any], section: str
    ) -> None:
        self._checkpoint = checkpoint
        self._record = record
        part = config if section == "" else config[section]
        self._given = {key: value for key, value in part.items() if value is not None}
        self._settings = {**record.defaults, **self._given}
        outer = config if section else {}
        self._outer = {key: value for key, value in outer.items() if value is not None}

    def number(self, keys: tuple[str, ...]) -> tuple[str, int]:
        """Return the first key that is set and its number; all that are set must agree."""
        found = self._all(keys)
        if not found:
            raise _contradiction(self._checkpoint, f"{' or '.join(keys)} is missing")
        return next(iter(found.items()))

    def optional(self, keys: tuple[str, ...]) -> int | None:
        found = self._all(keys)
        return next(iter(found.values())) if found else None

    def _all(self, keys: tuple[str, ...]) -> dict[str, int]:
        # A default only counts where no alias is given: Qwen3-MoE writes one of two names.
        given = {key: self._given[key] for key in keys if key in self._given}
        given = given or {key: self._settings[key] for key in keys if key in self._settings}
        found = {key: self._scalar(key, value) for key, value in given.items()}
        outer = {key: self._scalar(key, self._outer[key]) for key in keys if key in self._outer}
        distinct = set(found.values()) | set(outer.values())
        if len(distinct) > 1:
            says = [f"{key} = {value}" for key, value in found.items()]
            says += [
                f"{key} = {value} outside of it"
                for key, value in outer.items()
                if value not in found.values()
            ]
            raise _contradiction(
                self._checkpoint, f"{' but '.join(says)}; they are names of the same number",
                help="programs pick different ones in silence; correct config.json",
            )  # fmt: skip
        return found

    def _scalar(self, key: str, value: Any) -> int:
        """Return a number; a list with one entry a layer when all of them are equal."""
        if isinstance(value, list) and value and all(entry == value[0] for entry in value):
            value = value[0]
        if isinstance(value, list):
            raise _contradiction(
                self._checkpoint, f"{key} differs between layers: {str(value)[:80]}",
                help="stock programs expect one number for all layers",
            )  # fmt: skip
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise _contradiction(self._checkpoint, f"{key} = {repr(value)[:60]} is not a number")
        return value

    def grouped(self) -> bool:
        condition = self._record.router.groups_if
        if self._record.router.groups == "none":
            return False
        return condition is None or self._settings.get(condition[0]) == condition[1]

    def layers(self, keys: tuple[str, ...]) -> int:
        for key in keys:
            value = self._settings.get(key)
            if isinstance(value, list | str):
                return len(value)
            if value is not None:
                count = self._scalar(key, value)
                if count > MOST_LAYERS:
                    raise _contradiction(self._checkpoint, f"{key} = {count} is no number of layers")
                return count
        raise _contradiction(self._checkpoint, f"{' or '.join(keys)} is missing")

    def moe_layers(self, count: int) -> frozenset[int]:
        for rule in self._record.moe_layers:
            if rule.applies(self._settings):
                try:
                    return rule.layers(self._settings, count)
                except ValueError as error:
                    raise _contradiction(self._checkpoint, str(error)) from error
        raise _contradiction(
            self._checkpoint, f"it does not say which layers hold experts, as {self._record.family} models do"
        )


def _contradiction(checkpoint: Checkpoint, what: str, help: str = _RESTORE) -> InputError:
    return InputError("E422", f"{checkpoint.label}: {what}", where=Where("config.json"), help=help)
