"""Samples as padded batches, in an order that depends on the seed and the step alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from surgeon.calibrate.answers import TokenSample, answer_places
from surgeon.calibrate.data import permutation


@dataclass(frozen=True)
class Batch:
    """Samples beside each other, padded on the right.

    Attributes:
        ids: int64 [samples, tokens], 0 where padded.
        valid: bool [samples, tokens], True for tokens.
        predicts: bool [samples, tokens], True where the next token is one of the answer.
    """

    ids: Tensor
    valid: Tensor
    predicts: Tensor

    @property
    def mask(self) -> Tensor | None:
        """The attention mask [samples, tokens], None without padding."""
        return None if bool(self.valid.all()) else self.valid.long()

    @property
    def targets(self) -> Tensor:
        """The tokens that are predicted, int64 [number of True in ``predicts``]."""
        return self.ids[:, 1:][self.predicts[:, :-1]]


def batch_of(samples: Sequence[TokenSample], device: torch.device) -> Batch:
    """Pad samples to the longest of them."""
    longest = max(len(sample.ids) for sample in samples)
    ids = np.zeros((len(samples), longest), dtype=np.int64)
    valid, predicts = np.zeros(ids.shape, dtype=bool), np.zeros(ids.shape, dtype=bool)
    for row, sample in enumerate(samples):
        ids[row, : len(sample.ids)] = sample.ids
        valid[row, : len(sample.ids)] = True
        predicts[row, answer_places(sample)] = True
    return Batch(*(torch.from_numpy(array).to(device) for array in (ids, valid, predicts)))


@dataclass(frozen=True)
class Order:
    """Which samples are seen when: one permutation after the other, each a function of (seed, its number).

    Attributes:
        count: samples.
        batch: samples of a part.
        parts: parts of a step.
        seed: of the permutations.
    """

    count: int
    batch: int
    parts: int
    seed: int

    def rows(self, step: int, part: int) -> list[int]:
        """Return the numbers of the samples of one part of a step."""
        first = (step * self.parts + part) * self.batch
        places = (divmod(place, self.count) for place in range(first, first + self.batch))
        return [_permutation(self.count, self.seed, epoch)[index] for epoch, index in places]


@functools.lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> list[int]:
    return permutation(count, seed, f"training {epoch}")


def set_aside(count: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Return the numbers of samples to train on and to hold out; at least one is left to train on."""
    held_out = min(count - 1, max(1, round(count * share))) if share > 0 else 0
    order = permutation(count, seed, "held out")
    return sorted(order[held_out:]), sorted(order[:held_out])
