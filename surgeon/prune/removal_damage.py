"""What a model's output loses when one more layer, or one attention or FFN, is skipped.

    s = sum ||M(x) - M'(x)||^2 / sum ||M(x)||^2

over all tokens, with M the dense model and M' the model without everything dropped so far and one
more part (normalised MSE; Nemotron Elastic, arXiv 2511.16664). M is the last hidden state behind the
final norm, or the logits. All candidates of a round share one sweep over the layers: the version
without a part of layer j starts as a copy of what enters layer j.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from surgeon.calibrate.head import Head
from surgeon.calibrate.settings import Settings
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.errors import InputError, UsageError, Where
from surgeon.prune.layer_sweep import LayerSweep

ON = ("hidden", "logits")
"""Outputs that can be compared."""

Part = tuple[int, str]
"""(layer, "layer" | "attention" | "ffn")."""

BASE, ENTRY, DENSE = 0, 1, 2
"""Streams: the model without what is dropped, its input, and the dense model's output. Candidates follow."""

TOKENS = 1024
"""Tokens whose logits are held at once."""


@dataclass(frozen=True)
class Estimate:
    """What ranking costs.

    Attributes:
        layer_runs: how often one layer computes all samples.
        sweeps: how often the model's layers are read.
        activation_bytes: of all streams, in memory or in files.
    """

    layer_runs: int
    sweeps: int
    activation_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.sweeps} sweeps over the model, {self.layer_runs} layers computed, "
            f"{self.activation_bytes / 1e9:.1f} GB of activations"
        )


def estimate(
    layers: int, drops: int, tokens: int, hidden: int, element_bytes: int, candidates: int | None = None
) -> Estimate:
    """Return what it costs to drop layers one after the other.

    Round k, with k layers gone, computes the n = layers - k that are left once for the base, and those behind
    each candidate once for it: n + n (n - 1) / 2.

    Args:
        layers: of the model.
        drops: how many are to go.
        tokens: of all samples, padding included.
        hidden: width of the residual stream.
        element_bytes: of an activation.
        candidates: layers that may go, None for all.
    """
    runs = sum((layers - k) * (layers - k + 1) // 2 for k in range(drops))
    streams = (layers if candidates is None else candidates) + 3
    return Estimate(runs, drops, streams * tokens * hidden * element_bytes)


class RemovalDamage:
    """Scores what one more removal costs. A context manager.

    Args:
        checkpoint: the model.
        samples: token ids, one array each.
        settings: where and how it runs.
        candidates: the parts that may be asked for.
        outputs: part -> output matrices (without ".weight") that end it; not needed for whole layers.
        on: "hidden" or "logits".
        stop: set it to stop.

    Raises (constructor):
        UsageError: E277 ``on`` is neither.
        InputError: E386 logits of a model that has none.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        samples: Sequence[np.ndarray],
        settings: Settings,
        candidates: Sequence[Part],
        *,
        outputs: Mapping[Part, str] | None = None,
        on: str = "hidden",
        stop: threading.Event | None = None,
    ) -> None:
        if on not in ON:
            raise UsageError("E277", f'"{on}" is no output to compare', help="one of: " + ", ".join(ON))
        self._checkpoint = checkpoint
        self._slot = {part: 3 + place for place, part in enumerate(candidates)}
        self._outputs = outputs or {}
        self._sweep = LayerSweep(checkpoint, samples, settings, streams=3 + len(candidates), stop=stop)
        self._head = Head(checkpoint, settings, skeleton=self._sweep.skeleton) if on == "logits" else None
        self._dense: float | None = None
        self.layers = self._sweep.layers

    def __enter__(self) -> RemovalDamage:
        self._sweep.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._sweep.__exit__(*error)

    def round(
        self,
        dropped: Collection[Part],
        candidates: Sequence[Part],
        progress: Callable[[int], None] | None = None,
    ) -> dict[Part, float]:
        """Return the damage of the model without ``dropped`` and one candidate, for each.

        Not finite becomes infinite. The first call must have nothing dropped: it computes the dense model.

        Raises:
            InputError: E384 the dense model's own outputs are not finite.
        """
        sweep = self._sweep
        if self._dense is None:
            assert not dropped, "the first round is about the dense model"
            sweep.embed(ENTRY)
        sweep.copy(ENTRY, BASE)
        gone = {layer for layer, part in dropped if part == "layer"}
        begun: list[Part] = []
        for layer in sweep.over([n for n in range(sweep.layers) if n not in gone]):
            without = [self._outputs[part] for part in sorted(dropped) if part[0] == layer]
            own = [part for part in candidates if part[0] == layer]
            for part in own:
                if part[1] == "layer":
                    sweep.copy(BASE, self._slot[part])
                else:
                    sweep.advance(layer, [(BASE, self._slot[part])], [*without, self._outputs[part]])
            streams = [BASE, *(self._slot[part] for part in begun)]
            sweep.advance(layer, [(stream, stream) for stream in streams], without)
            begun += own
            if progress is not None:
                progress(layer)
        slots = [self._slot[part] for part in begun]
        if self._dense is None:
            self._end(BASE, DENSE)
        for slot in slots:
            self._end(slot, slot)
        return dict(zip(begun, self._compare(slots), strict=True))

    def _end(self, source: int, target: int) -> None:
        for number in range(len(self._sweep.batches)):
            self._sweep.put(target, number, self._sweep.finish(source, number))

    def _compare(self, slots: Sequence[int]) -> list[float]:
        square, damage = self._over_hidden(slots) if self._head is None else self._over_logits(slots)
        if self._dense is None:
            self._dense = square
        if not 0 < self._dense < float("inf"):
            raise InputError("E384", f"the outputs of {self._checkpoint.label} are not finite, or all zero",
                             where=Where(self._checkpoint.label),
                             help="its weights are damaged, or the precision is too narrow: try bfloat16 or float32")  # fmt: skip
        found = [value / self._dense for value in damage]
        return [value if np.isfinite(value) else float("inf") for value in found]

    def _over_hidden(self, slots: Sequence[int]) -> tuple[float, list[float]]:
        sweep, total, damage = self._sweep, 0.0, [0.0] * len(slots)
        for number in range(len(sweep.batches)):
            dense = sweep.real(number, sweep.get(DENSE, number)).float()
            total += _square(dense)
            for place, slot in enumerate(slots):
                damage[place] += _square(sweep.real(number, sweep.get(slot, number)).float() - dense)
        return total, damage

    def _over_logits(self, slots: Sequence[int]) -> tuple[float, list[float]]:
        """Compare logits; the head is read once, block by block."""
        sweep, head, total, damage = self._sweep, self._head, 0.0, [0.0] * len(slots)
        assert head is not None
        for _, _, weight, bias in head.blocks(head.rows_per_block(TOKENS)):
            for number in range(len(sweep.batches)):
                rows = [sweep.real(number, sweep.get(stream, number)) for stream in (DENSE, *slots)]
                for start in range(0, len(rows[0]), TOKENS):
                    parts = (head.entering(row[start : start + TOKENS]) for row in rows)
                    dense = head.block_logits(next(parts), weight, bias)
                    total += _square(dense)
                    for place, part in enumerate(parts):
                        damage[place] += _square(head.block_logits(part, weight, bias) - dense)
        return total, damage


def _square(value: Tensor) -> float:
    return float(value.double().square().sum()) if value.numel() else 0.0


def smallest(scores: Mapping[Part, float]) -> Part:
    """Return the part with the least damage; of equals the deeper one, and the FFN before the attention."""
    return min(scores, key=lambda part: (scores[part], -part[0], part[1] == "attention"))
