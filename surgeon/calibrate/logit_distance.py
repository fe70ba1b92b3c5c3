"""How far the logits of two models lie apart on the same text.

The mean over samples of the mean over answer tokens of ||z_first - z_second||_2, the alignment score
of Sens-Merging (arXiv 2502.12420). Both heads are read in blocks of the vocabulary.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from surgeon.calibrate.answers import TokenSample, answer_places
from surgeon.calibrate.head import Head
from surgeon.calibrate.layer_inputs import LayerInputs
from surgeon.calibrate.settings import Settings
from surgeon.calibrate.skeleton import Skeleton
from surgeon.calibrate.walk import Walk
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.errors import InputError, Where

TOKENS = 1024
"""Tokens whose logits are compared at once."""


class _Nothing:
    """An observer that looks at nothing."""

    def wants(self, module: str) -> bool:
        return False

    def observe(self, module: str, inputs: Tensor, outputs: Tensor | None, sample: int | None) -> None:
        raise AssertionError("nothing was asked for")


def answer_store(samples: Sequence[TokenSample], model: Checkpoint, settings: Settings) -> LayerInputs:
    """Return a store for the answer states of two models: (0 or 1, sample), in memory or in files."""
    width = Skeleton(model, settings).hidden_size
    places = [answer_places(sample) for sample in samples]
    shapes = [(place.stop - place.start, width) for place in places]
    return LayerInputs(2, shapes, settings.torch_dtype, settings.budget() // 4, settings.spill)


def answer_states(
    checkpoint: Checkpoint,
    samples: Sequence[TokenSample],
    settings: Settings,
    put: Callable[[int, Tensor], None],
    *,
    progress: Callable[[str], None] | None = None,
    stop: threading.Event | None = None,
) -> None:
    """Hand the last hidden states at the places that predict each sample's answer to ``put``: (sample, [n, H])."""

    def told(done: int, total: int) -> None:
        if progress is not None:
            progress(f"forward, step {done} of {total}")

    # The states of a pass without an observer are worth nothing to a later run, so none are kept.
    with Walk(checkpoint, [sample.ids for sample in samples], replace(settings, spill=None)) as walk:
        walk.run(_Nothing(), progress=told, stop=stop)
        for number, hidden in walk.hidden():
            put(number, hidden[answer_places(samples[number])])


def logit_distance(first: Head, second: Head, states: LayerInputs, samples: int) -> float:
    """Return the mean distance of two models' logits.

    Args:
        first, second: the heads; of vocabularies of different sizes the common ids count.
        states: hidden states [n, H] of the first model under (0, sample) and of the second under (1, sample).
        samples: how many.

    Raises:
        InputError: E384 a distance is not finite.
    """
    found = []
    with torch.no_grad():
        for number in range(samples):
            one, other = states.get(0, number), states.get(1, number)
            distances = [
                _distances(first, second, one[start : start + TOKENS], other[start : start + TOKENS])
                for start in range(0, len(one), TOKENS)
            ]
            mean = float(torch.cat(distances).mean())
            if not math.isfinite(mean):
                raise InputError("E384", f"the logits of sample {number} are not finite", where=Where(tensor=first.tensor),
                                 help="the weights may be damaged, or the precision too low; try float32")  # fmt: skip
            found.append(mean)
    return math.fsum(found) / len(found)


def _distances(first: Head, second: Head, one: Tensor, other: Tensor) -> Tensor:
    """Return the distance at every place [n], float64."""
    common = min(first.vocabulary, second.vocabulary)
    step = min(first.rows_per_block(len(one)), second.rows_per_block(len(one)))
    total: Tensor | None = None
    for (start, stop, weight, bias), (_, _, weight2, bias2) in zip(
        first.blocks(step), second.blocks(step), strict=False
    ):
        width = min(stop, common) - start
        if width <= 0:
            break
        z = first.block_logits(one.to(weight.device, weight.dtype), weight, bias)[:, :width]
        z2 = second.block_logits(other.to(weight2.device, weight2.dtype), weight2, bias2)[:, :width]
        square = (z.double() - z2.to(z.device).double()).square().sum(1)
        total = square if total is None else total + square
    assert total is not None  # a vocabulary has at least one row
    return total.sqrt().cpu()
