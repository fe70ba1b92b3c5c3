"""Minitron: units whose activations are small go first (arXiv 2407.14679, section 2.2).

A channel's score is the L2 norm over samples of the mean over tokens of |x|, at the input of the
output matrix; a head's or group's is the L2 norm over its channels. Channels of the residual
stream are ranked once for the whole model: the same statistic on the outputs of all norms, added up.

The method counts on distillation afterwards; nothing makes up for what is removed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from surgeon.calibrate.settings import Settings
from surgeon.calibrate.walk import Walk
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.errors import InputError, Where
from surgeon.prune.criteria import Context
from surgeon.prune.ranking import Ranking
from surgeon.structure.cut import Kept
from surgeon.structure.find import record_of


class Minitron:
    """Ranks by mean absolute activations; the weights that stay do not change."""

    name = "minitron"
    version = 1
    needs = frozenset({"samples"})
    solves = False

    def rank(self, context: Context) -> Ranking:
        """Rank the units of one module."""
        assert context.moments is not None and context.moments.sample_absolute is not None, "it needs samples"
        return context.ranking(np.sqrt(context.by_unit(context.moments.sample_absolute**2)))

    def bias(self, context: Context, kept: Kept) -> Tensor | None:
        return None


def hidden_scores(
    checkpoint: Checkpoint,
    samples: Sequence[np.ndarray],
    settings: Settings,
    *,
    progress: Callable[[int, int], None] | None = None,
    stop: threading.Event | None = None,
) -> np.ndarray:
    """Return the importance of each channel of the residual stream, float64 [hidden]; the largest stay.

    Args:
        checkpoint: the model.
        samples: token ids, one array each.
        settings: where and how the model runs.
        progress: called with (stages done, stages).
        stop: set it to stop.

    Raises:
        InputError: E318 no norm of the residual stream was seen.
    """
    observer = _NormOutputs(_residual_norms(checkpoint))
    with Walk(checkpoint, samples, settings, per_sample=True) as walk:
        walk.run(observer, progress=progress, stop=stop)
    if not observer.squares:
        raise InputError("E318", f"{checkpoint.label} has no norm over its hidden states",
                         where=Where(checkpoint.label), help="its hidden size cannot be ranked")  # fmt: skip
    return torch.stack([square.sqrt() for square in observer.squares.values()]).sum(0).numpy()


def hidden_order(scores: np.ndarray) -> np.ndarray:
    """Return channels of the residual stream, first to go first, int64 [hidden]; equal ones by number."""
    return np.argsort(scores, kind="stable")


def _residual_norms(checkpoint: Checkpoint) -> frozenset[str]:
    _, layout = record_of(checkpoint)
    return frozenset(
        name.removesuffix(".weight")
        for name, spec in layout.tensors.items()
        if spec.kind == "norm"
        and spec.axes == ("hidden",)
        and name in checkpoint.tensors
        and name.startswith(layout.prefix)  # BERT's head has one of its own, behind the residual stream
    )


class _NormOutputs:
    """Sums over samples of (mean over tokens of |output|)^2 of norms, float64 [hidden] by module."""

    def __init__(self, norms: frozenset[str]) -> None:
        self._norms = norms
        self.squares: dict[str, Tensor] = {}

    def wants(self, module: str) -> bool:
        return module in self._norms

    def observe(self, module: str, inputs: Tensor, outputs: Tensor | None, sample: int | None) -> None:
        assert outputs is not None
        found = outputs.abs().mean(0, dtype=torch.float64).square().cpu()
        self.squares[module] = self.squares[module] + found if module in self.squares else found


CRITERION = Minitron()
