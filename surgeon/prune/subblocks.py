"""Dropping the attention or the FFN of single layers, the one the output misses least first.

Scores are those of `surgeon.prune.removal_damage`: the normalised MSE of the output when one more branch writes nothing to
the residual stream, always against the dense model. What is left of a layer differs from layer to layer, so
the result loads with per-layer shapes only; a layer that loses both is one that can be dropped.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from surgeon.calibrate.settings import Settings
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.errors import InputError, UsageError, Where
from surgeon.prune.removal_damage import Part, RemovalDamage, smallest
from surgeon.structure.cut import Cut, LayerCut
from surgeon.structure.parts import Structure

KINDS = ("attention", "ffn")


@dataclass(frozen=True)
class SubblockRanking:
    """Branches in the order they go.

    Attributes:
        layers: of the source.
        order: (layer, "attention" | "ffn"), first dropped first.
        scores: ``scores[k]`` is the damage without the first k.
        importance: damage of each branch dropped alone.
        notes: sentences for the user.
    """

    layers: int
    order: tuple[Part, ...]
    scores: tuple[float, ...]
    importance: dict[Part, float]
    notes: tuple[str, ...] = ()

    def cut(self, drops: int) -> Cut:
        """Return the cut without the first ``drops`` branches."""
        if not 0 <= drops <= len(self.order):
            raise ValueError(f"{drops} of {len(self.order)} branches cannot be dropped")
        gone = set(self.order[:drops])
        return Cut(
            tuple(
                LayerCut(() if (layer, "attention") in gone else None, () if (layer, "ffn") in gone else None)
                for layer in range(self.layers)
            )
        )


def rank(
    checkpoint: Checkpoint,
    structure: Structure,
    samples: Sequence[np.ndarray],
    settings: Settings,
    *,
    drop: int,
    kinds: Sequence[str] = KINDS,
    on: str = "hidden",
    progress: Callable[[int, int], None] | None = None,
    stop: threading.Event | None = None,
) -> SubblockRanking:
    """Return the branches in the order they go.

    Args:
        checkpoint, structure: the model.
        samples: token ids, one array each.
        settings: where and how it runs.
        drop: how many branches to drop; each costs a sweep over the model.
        kinds: "attention", "ffn" or both.
        on: "hidden" compares the last hidden state, "logits" the logits.
        progress: called with (layers done, layers in all).
        stop: set it to stop.

    Raises:
        UsageError: E274 impossible kinds or number, E277 ``on`` is unknown.
        InputError: E320 whatever is skipped makes the output infinite; E384 the model's own is.
    """
    if not kinds or set(kinds) - set(KINDS):
        raise UsageError("E274", "branches to drop are attention and ffn", help="name one of them, or both")
    outputs: dict[Part, str] = {
        (part.layer, kind): part.output.module
        for kind, parts in (("attention", structure.attention), ("ffn", structure.ffn))
        if kind in kinds
        for part in parts
        if part is not None
    }
    if not 0 <= drop <= len(outputs):
        raise UsageError("E274", f"{drop} of {len(outputs)} branches cannot be dropped",
                         help=f"give 0 to {len(outputs)}")  # fmt: skip
    candidates = sorted(outputs)
    gone: list[Part] = []
    scores, importance, notes = [0.0], {}, []
    with RemovalDamage(
        checkpoint, samples, settings, candidates, outputs=outputs, on=on, stop=stop
    ) as damage:
        for number in range(drop):
            left = [part for part in candidates if part not in gone]
            told = None if progress is None else partial(_tell, progress, number, structure.layers, drop)
            found = damage.round(gone, left, told)
            importance = importance or found
            bad = sorted(part for part in left if found[part] == float("inf"))
            notes += [f"without the {kind} of layer {layer} the model gives values that are not finite" for layer, kind in bad]  # fmt: skip
            least = smallest(found)
            if found[least] == float("inf"):
                raise InputError("E320", f"{checkpoint.label} gives infinite values whatever is skipped",
                                 where=Where(checkpoint.label), help="use another precision: bfloat16 or float32")  # fmt: skip
            gone.append(least)
            scores.append(found[least])
    return SubblockRanking(
        structure.layers, tuple(gone), tuple(scores), importance, tuple(dict.fromkeys(notes))
    )


def _tell(progress: Callable[[int, int], None], number: int, layers: int, rounds: int, layer: int) -> None:
    progress(number * layers + layer + 1, rounds * layers)
