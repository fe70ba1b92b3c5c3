"""Which layers of a model hold routed experts: the few rules that configurations follow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

Settings = Mapping[str, Any]
"""A section of config.json over the record's defaults; keys with null are absent."""


class Rule(Protocol):
    def applies(self, settings: Settings) -> bool:
        """Say whether the configuration has the keys this rule reads."""
        ...

    def layers(self, settings: Settings, count: int) -> frozenset[int]:
        """Return the layers that hold experts, out of ``count``.

        Raises:
            ValueError: the keys hold something else than the rule expects.
        """
        ...


class _Rule(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class AllLayers(_Rule):
    """Every layer."""

    rule: Literal["all"]

    def applies(self, settings: Settings) -> bool:
        return True

    def layers(self, settings: Settings, count: int) -> frozenset[int]:
        return frozenset(range(count))


class AfterDense(_Rule):
    """All but the first ones; with a frequency only every so many, or a list of 0 and 1 with one entry a layer."""

    rule: Literal["after_dense"]
    first: str
    frequency: str | None = None

    def applies(self, settings: Settings) -> bool:
        return self.first in settings

    def layers(self, settings: Settings, count: int) -> frozenset[int]:
        first = _integer(settings, self.first, 0)
        every = settings.get(self.frequency, 1) if self.frequency else 1
        if isinstance(every, list):
            if len(every) != count:
                raise ValueError(f"{self.frequency} has {len(every)} entries for {count} layers")
            return frozenset(layer for layer in range(first, count) if every[layer])
        step = _integer(settings, self.frequency, 1) if self.frequency else 1
        return frozenset(layer for layer in range(first, count) if layer % step == 0)


class EveryStep(_Rule):
    """The last of every so many layers, but for those that are listed as dense."""

    rule: Literal["every_step"]
    step: str
    dense: str | None = None

    def applies(self, settings: Settings) -> bool:
        return self.step in settings

    def layers(self, settings: Settings, count: int) -> frozenset[int]:
        step = _integer(settings, self.step, 1)
        dense = _integers(settings, self.dense) if self.dense else []
        return frozenset(layer for layer in range(count) if (layer + 1) % step == 0 and layer not in dense)


class Window(_Rule):
    """The last of every so many layers between a first and a last one; -1 for the last means the end."""

    rule: Literal["window"]
    first: str
    last: str
    step: str

    def applies(self, settings: Settings) -> bool:
        return self.first in settings

    def layers(self, settings: Settings, count: int) -> frozenset[int]:
        first, step = _integer(settings, self.first, 0), _integer(settings, self.step, 1)
        last = _integer(settings, self.last, -1)
        last = count - 1 if last == -1 else last
        return frozenset(
            layer for layer in range(count) if first <= layer <= last and (layer + 1) % step == 0
        )


class Period(_Rule):
    """Layers whose number leaves a certain remainder."""

    rule: Literal["period"]
    period: str
    offset: str

    def applies(self, settings: Settings) -> bool:
        return self.period in settings

    def layers(self, settings: Settings, count: int) -> frozenset[int]:
        period, offset = _integer(settings, self.period, 1), _integer(settings, self.offset, 0)
        return frozenset(layer for layer in range(count) if layer % period == offset)


class Listed(_Rule):
    """The layers a list names."""

    rule: Literal["listed"]
    key: str

    def applies(self, settings: Settings) -> bool:
        return self.key in settings

    def layers(self, settings: Settings, count: int) -> frozenset[int]:
        listed = _integers(settings, self.key)
        outside = [layer for layer in listed if not 0 <= layer < count]
        if outside:
            raise ValueError(f"{self.key} names layer {outside[0]} of {count}")
        return frozenset(listed)


class Typed(_Rule):
    """Layers of some types: a list with one word a layer, or a string with one letter a layer."""

    rule: Literal["typed"]
    key: str
    types: tuple[str, ...]

    def applies(self, settings: Settings) -> bool:
        return self.key in settings

    def layers(self, settings: Settings, count: int) -> frozenset[int]:
        types = settings[self.key]
        if not isinstance(types, list | str) or not all(isinstance(word, str) for word in types):
            raise ValueError(f"{self.key} is not a list of words")
        if len(types) != count:
            raise ValueError(f"{self.key} has {len(types)} entries for {count} layers")
        return frozenset(layer for layer, word in enumerate(types) if word in self.types)


LayerRule = Annotated[
    AllLayers | AfterDense | EveryStep | Window | Period | Listed | Typed, Field(discriminator="rule")
]


def _integer(settings: Settings, key: str, least: int) -> int:
    value = settings.get(key, least)
    if isinstance(value, bool) or not isinstance(value, int) or (value < least and value != -1):
        raise ValueError(f"{key} = {value!r} is not a number of layers")
    return value


def _integers(settings: Settings, key: str) -> list[int]:
    value = settings.get(key, [])
    if not isinstance(value, list) or not all(isinstance(v, int) and not isinstance(v, bool) for v in value):
        raise ValueError(f"{key} is not a list of layers")
    return value
