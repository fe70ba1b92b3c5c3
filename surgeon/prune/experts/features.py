"""What one pass shows of experts for grouping them: how often they are used, what they put out, how the router sees them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from surgeon.calibrate.routing import Routed, route
from surgeon.calibrate.settings import Settings
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.experts.coactivation import CoActivation
from surgeon.structure.experts.parts import Experts


@dataclass
class LayerFeatures:
    """One layer.

    Attributes:
        tokens: int64 [E], tokens routed to each expert.
        pairs: who works on the same tokens.
        sums: float64 [E, hidden], sum of each expert's outputs over its tokens, before their weights; None unless asked for.
        agreement: float64 [E, E], Z'Z of the router's logits Z [tokens, E]; None unless asked for.
    """

    pairs: CoActivation
    sums: np.ndarray | None = None
    agreement: np.ndarray | None = None

    @property
    def tokens(self) -> np.ndarray:
        return self.pairs.counts

    def means(self) -> np.ndarray:
        """Return each expert's mean output over its tokens, float64 [E, hidden]; zeros for one without tokens."""
        assert self.sums is not None
        return self.sums / np.maximum(self.tokens, 1)[:, None]

    def cosines(self) -> np.ndarray:
        """Return the cosine between the columns of the router's logits, float64 [E, E]; 0 for a column of zeros."""
        assert self.agreement is not None
        lengths = np.sqrt(np.diag(self.agreement))
        below = np.outer(lengths, lengths)
        return np.divide(self.agreement, below, out=np.zeros_like(below), where=below > 0)


class FeatureObserver:
    """Gathers `LayerFeatures` of every layer in one pass.

    Args:
        experts: of the model.
        sums: add up outputs (HC-SMoE).
        logits: products of the router's logits (M-SMoE).
    """

    def __init__(self, experts: Experts, *, sums: bool, logits: bool) -> None:
        self.wants_sums, self.wants_logits = sums, logits
        self.identity = f"expert features 1 {experts.count} {sums} {logits}"
        self.layers = {layer.index: LayerFeatures(CoActivation(layer.count)) for layer in experts.running}

    def routed(self, batch: Routed) -> None:
        layer = self.layers[batch.layer]
        layer.pairs.add(batch.index.cpu().numpy())
        if batch.logits is not None and self.wants_logits:
            logits = batch.logits.double().cpu()
            products = (logits.T @ logits).numpy()
            layer.agreement = products if layer.agreement is None else layer.agreement + products

    def expert_sums(self, layer: int, sums: Tensor) -> None:
        self.layers[layer].sums = sums.double().cpu().numpy()

    def state(self) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        for number, layer in self.layers.items():
            found |= {
                f"{number} pairs": layer.pairs.pairs, f"{number} counts": layer.pairs.counts,
                f"{number} tokens": np.array([layer.pairs.tokens]),
            }  # fmt: skip
            for name in ("sums", "agreement"):
                value = getattr(layer, name)
                if value is not None:
                    found[f"{number} {name}"] = value
        return found

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        for number, layer in self.layers.items():
            layer.pairs.pairs = np.array(state[f"{number} pairs"])
            layer.pairs.counts = np.array(state[f"{number} counts"])
            layer.pairs.tokens = int(state[f"{number} tokens"][0])
            for name in ("sums", "agreement"):
                value = state.get(f"{number} {name}")
                setattr(layer, name, None if value is None else np.array(value))


def collect_features(
    checkpoint: Checkpoint,
    samples: Sequence[np.ndarray],
    settings: Settings,
    experts: Experts,
    *,
    sums: bool,
    logits: bool,
    progress: Callable[[int, int], None] | None = None,
    stop: threading.Event | None = None,
    resume: bool = False,
) -> dict[int, LayerFeatures]:
    """Return the features of every running layer, from one pass over samples (token ids)."""
    observer = FeatureObserver(experts, sums=sums, logits=logits)
    route(
        checkpoint, samples, settings, observer, experts=experts, progress=progress, stop=stop, resume=resume
    )
    return observer.layers
