"""How many units each attention and each FFN may keep: the choices a search picks from.

FFN widths fall by a tenth at a time (ZipLM, arXiv 2302.04089) and are multiples of what hardware and
quantization groups like, always rounded up. Attention keeps whole key/value heads with their query heads
("groups"), or equally many query heads of every key/value head ("heads").
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from surgeon.errors import UsageError
from surgeon.structure.cut import LayerShape
from surgeon.structure.parts import Structure

SHRINK = 0.9
"""Ratio of neighbouring FFN widths."""

LEAST = 0.01
"""Share of an FFN below which it is not worth its launch: the next level is none at all."""

RoundTo = int | Literal["auto"]


def granularity(width: int, round_to: RoundTo = "auto") -> int:
    """Return what kept FFN widths are multiples of.

    Args:
        width: channels of the dense FFN.
        round_to: a number of channels; "auto" takes 128 from width 512 up, else 32 where it divides the width, else 8.

    Raises:
        UsageError: E269 not between 1 and the width.
    """
    if round_to == "auto":
        if width >= 512:
            return 128
        return 32 if width >= 128 and width % 32 == 0 else min(8, width)
    if not 1 <= round_to <= width:
        raise UsageError("E269", f"widths cannot be rounded to {round_to} of {width} channels",
                         help=f"--round-to auto, or a number from 1 to {width}")  # fmt: skip
    return round_to


def ffn_counts(width: int, step: int) -> tuple[int, ...]:
    """Return the FFN widths of a search, descending: width, 0.9 of it ... down to a hundredth, then 0."""
    found, share = [width], SHRINK
    while share >= LEAST:
        wanted = math.ceil(width * share - 1e-9)  # 0.9 * 0.9 * 100 is a hair above 81
        count = min(width, -(-wanted // step) * step)
        if count < found[-1]:
            found.append(count)
        share *= SHRINK
    return (*found, 0)


def ffn_multiples(width: int, step: int) -> tuple[int, ...]:
    """Return every FFN width a uniform model may have, descending: the whole one and all multiples of the step."""
    top = (width - 1) // step * step
    least = ffn_counts(width, step)[-2]
    return (width, *(count for count in range(top, 0, -step) if count >= least))


@dataclass(frozen=True)
class ModuleLevels:
    """How many units the attentions or FFNs of one shape may keep.

    Attributes:
        kind: "attention" or "ffn".
        mode: what a unit is: "groups", "heads" or "channels", as in `surgeon.prune.ranking.Ranking`.
        counts: kept units, descending from all of them; 0 removes the module.
        heads, groups, head_dim: of the dense attention; 0 for an FFN.
    """

    kind: str
    mode: str
    counts: tuple[int, ...]
    heads: int = 0
    groups: int = 0
    head_dim: int = 0

    @property
    def units(self) -> int:
        """Units of the dense module."""
        return self.counts[0]

    def shape(self, count: int) -> LayerShape:
        """Return the sizes of this module when ``count`` units stay; those of the other kind are 0."""
        if self.kind == "ffn":
            return LayerShape(0, 0, 0, count)
        if self.mode == "groups":
            return LayerShape(count * (self.heads // self.groups), count, self.head_dim, 0)
        return LayerShape(count * self.groups, self.groups if count else 0, self.head_dim, 0)

    def without_zero(self) -> ModuleLevels:
        """Return the levels that keep something."""
        counts = tuple(count for count in self.counts if count)
        return ModuleLevels(self.kind, self.mode, counts, self.heads, self.groups, self.head_dim)


def levels_of(
    structure: Structure, layer: int, kind: str, mode: str, round_to: RoundTo = "auto"
) -> ModuleLevels | None:
    """Return the levels of one module, None where the layer has none that can be cut.

    Equal for layers of one shape.
    """
    if kind == "ffn":
        ffn = structure.ffn[layer]
        if ffn is None:
            return None
        return ModuleLevels("ffn", "channels", ffn_counts(ffn.width, granularity(ffn.width, round_to)))
    attention = structure.attention[layer]
    if attention is None:
        return None
    units = attention.groups if mode == "groups" else attention.per_group
    counts = tuple(range(units, -1, -1))
    return ModuleLevels("attention", mode, counts, attention.heads, attention.groups, attention.head_dim)


def useful_modes(structure: Structure) -> tuple[str, ...]:
    """Return the attention modes that differ in a model: without shared key/value heads "heads" is all or nothing."""
    found = [attention for attention in structure.attention if attention is not None]
    modes = []
    if any(attention.groups > 1 for attention in found):
        modes.append("groups")
    if any(attention.per_group > 1 for attention in found):
        modes.append("heads")
    if found and not modes:  # one head: it stays or goes
        modes.append("groups")
    return tuple(modes)
