"""What a depth method decides: the layers to drop, for every number of layers that could be kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from surgeon.architectures.layered_config import num_layers
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.errors import InputError, UsageError, Where

FEWEST = 2
"""Layers a model is left with at least."""


@dataclass(frozen=True)
class DepthRanking:
    """The layers to drop, for 0, 1, 2 ... drops.

    Attributes:
        method: name of the depth method.
        layers: number of layers of the source.
        drops: ``drops[k]`` are the k layers to drop, ascending. Methods that remove one layer after
            another are nested; even spacing is not.
        scores: ``scores[k]`` is what the method says of ``drops[k]``: 0.0 for none; the damage for
            nmse, the block influence of the last layer taken for block_influence, NaN where a method has no opinion.
        importance: score of each layer dropped alone; None where it was not scored.
        notes: sentences for the user.
    """

    method: str
    layers: int
    drops: tuple[tuple[int, ...], ...]
    scores: tuple[float, ...]
    importance: tuple[float | None, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def order(self) -> tuple[int, ...]:
        """Layers in the order they go, first dropped first; empty where the sets are not nested."""
        order: list[int] = []
        for smaller, larger in zip(self.drops, self.drops[1:], strict=False):
            new = set(larger) - set(smaller)
            if len(new) != 1:
                return ()
            order.extend(new)
        return tuple(order)

    def dropped(self, keep: int) -> tuple[int, ...]:
        """Return the layers to drop, ascending, so that ``keep`` are left.

        Raises:
            UsageError: E278 the number is impossible, or more than was ranked would have to go.
        """
        check_keep(self.layers, keep)
        if self.layers - keep >= len(self.drops):
            raise UsageError(
                "E278", f"{self.method} ranked {len(self.drops) - 1} of {self.layers} layers, so {keep} cannot be all that is kept",
                help=f"keep at least {self.layers - len(self.drops) + 1} layers, or protect fewer of the first and last",
            )  # fmt: skip
        return self.drops[self.layers - keep]

    def kept(self, keep: int) -> tuple[int, ...]:
        """Return the layers that stay, ascending; raises as `dropped`."""
        gone = set(self.dropped(keep))
        return tuple(layer for layer in range(self.layers) if layer not in gone)

    def document(self) -> dict[str, Any]:
        """Return the ranking as plain data; `from_document` reads it."""
        return {
            "method": self.method,
            "layers": self.layers,
            "drops": [list(drop) for drop in self.drops],
            "scores": [None if score != score else score for score in self.scores],
            "importance": list(self.importance),
            "notes": list(self.notes),
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> DepthRanking:
        """Read what `document` made."""
        return cls(
            document["method"],
            document["layers"],
            tuple(tuple(drop) for drop in document["drops"]),
            tuple(float("nan") if score is None else float(score) for score in document["scores"]),
            tuple(document["importance"]),
            tuple(document["notes"]),
        )


@dataclass(frozen=True)
class DepthMethod:
    """A depth method.

    Attributes:
        rank: ``rank(checkpoint, samples, settings, *, drop, protect_first, protect_last, progress, stop)``
            -> DepthRanking. ``samples`` are token ids, one array each; ``drop`` is the most layers
            that may have to go (None: as many as possible); ``protect_*`` None takes the method's own default.
        needs_text: whether the model is run over samples; others take an empty list.
        summary: one line.
    """

    rank: Callable[..., DepthRanking]
    needs_text: bool
    summary: str


def layer_count(checkpoint: Checkpoint) -> int:
    """Return the number of layers.

    Raises:
        InputError: E319 the configuration gives none.
    """
    layers = num_layers(checkpoint.config or {})
    if layers is None:
        raise InputError("E319", f"the configuration of {checkpoint.label} gives no number of layers",
                         where=Where(checkpoint.label), help="give the model folder, with its config.json")  # fmt: skip
    return layers


def check_keep(layers: int, keep: int) -> None:
    """Refuse a number of layers that cannot be kept.

    Raises:
        UsageError: E278 fewer than two, or more than there are.
    """
    if keep > layers or keep < FEWEST:
        raise UsageError("E278", f"{keep} of {layers} layers cannot be kept",
                         help=f"between {FEWEST} and {layers} layers can stay")  # fmt: skip


def droppable(layers: int, first: int, last: int) -> list[int]:
    """Return the layers that may go when the first and the last few are protected.

    Raises:
        UsageError: E278 a protected number is negative, or nothing is left to drop.
    """
    if first < 0 or last < 0:
        raise UsageError("E278", f"{min(first, last)} layers cannot be protected", help="give 0 or more")
    free = list(range(first, layers - last))
    if not free or layers <= FEWEST:
        raise UsageError("E278", f"no layer of {layers} may be dropped",
                         help=f"{first} first and {last} last layers are protected, and {FEWEST} must stay")  # fmt: skip
    return free


def most_drops(layers: int, candidates: int, wanted: int | None) -> int:
    """Return how many drops are ranked.

    Raises:
        UsageError: E278 more are wanted than can go.
    """
    possible = min(candidates, layers - FEWEST)
    if wanted is None:
        return possible
    if not 0 <= wanted <= possible:
        raise UsageError("E278", f"{wanted} of {layers} layers cannot be dropped",
                         help=f"at most {possible} can, with those that are protected")  # fmt: skip
    return wanted
