"""Samples of different lengths in batches.

Equal lengths go together. Nearly equal ones may, padded on the right: in a causal model no token
sees padding, so nothing changes but the last bits; elsewhere a mask hides it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

WASTE = 8
"""A sample is padded by at most one token in this many."""


@dataclass(frozen=True)
class Batch:
    """Samples that are computed together.

    Attributes:
        samples: their indices.
        lengths: their numbers of tokens.
        length: the longest.
    """

    samples: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def length(self) -> int:
        return max(self.lengths)

    @property
    def padded(self) -> bool:
        return min(self.lengths) < self.length

    @property
    def sample(self) -> int | None:
        """The only sample, None when there are several."""
        return self.samples[0] if len(self.samples) == 1 else None

    def mask(self) -> Tensor:
        """Return which places [samples, length] hold tokens, boolean."""
        return torch.arange(self.length)[None, :] < torch.tensor(self.lengths)[:, None]

    def ids(self, samples: Sequence[np.ndarray]) -> Tensor:
        """Return token ids [samples, length]; padding repeats the sample's first token, whose row is loaded anyway."""
        out = torch.empty(len(self.samples), self.length, dtype=torch.int64)
        for row, sample in enumerate(self.samples):
            ids = torch.from_numpy(np.ascontiguousarray(samples[sample], dtype=np.int64))
            out[row, : len(ids)] = ids
            out[row, len(ids) :] = ids[0]
        return out


def plan_batches(
    lengths: Sequence[int],
    batch_tokens: int,
    *,
    alone: bool = False,
    equal: bool = False,
    unpadded: Collection[int] = (),
) -> list[Batch]:
    """Return the batches of samples, longest first; the same for the same lengths.

    Args:
        lengths: tokens of each sample.
        batch_tokens: places in a batch, padding included; a longer sample is a batch of its own.
        alone: one sample a batch.
        equal: never pad.
        unpadded: lengths that are never padded to.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    batches: list[list[int]] = []
    for index in order:
        current = batches[-1] if batches else None
        if current is not None and not alone:
            longest = lengths[current[0]]
            fits = (len(current) + 1) * longest <= batch_tokens
            same = lengths[index] == longest
            near = not equal and longest not in unpadded and lengths[index] * WASTE >= longest * (WASTE - 1)
            if fits and (same or near):
                current.append(index)
                continue
        batches.append([index])
    return [Batch(tuple(chosen), tuple(lengths[i] for i in chosen)) for chosen in batches]
