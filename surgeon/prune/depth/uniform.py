"""Unified layer skipping: drop layers at even distances, whatever is in them (arXiv 2404.06954).

The number of layers follows from the target alone; the first and the last always stay, and the kept ones are
spread evenly. The reference code keeps every ``N // (R - 1)``-th layer until R are reached, which
for targets below 2x drops one contiguous block behind the middle (N = 32, 1.25x: layers 24 to 30) and
divides by zero at R = 1. Here layer ``round(i (N - 1) / (R - 1))`` is kept for i = 0 ... R - 1.

The paper skips layers only while decoding, and fine-tunes at the same pattern. A model saved without
them skips in prefill, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.errors import UsageError
from surgeon.prune.depth_ranking import FEWEST, DepthMethod, DepthRanking, check_keep, layer_count, most_drops

WARNING = (
    "layers dropped at even distances without looking at the model cost much quality from 1.5x on; "
    "the method's authors fine-tune afterwards"
)


def keep_set(layers: int, keep: int) -> tuple[int, ...]:
    """Return ``keep`` of ``layers`` layers at even distances, ascending, the first and the last among them.

    Halves are rounded up in integers: distances between neighbours differ by at most one.

    Raises:
        UsageError: E278 fewer than two layers, or more than there are.
    """
    check_keep(layers, keep)
    steps = keep - 1
    return tuple((2 * index * (layers - 1) + steps) // (2 * steps) for index in range(keep))


def rank(
    checkpoint: Checkpoint,
    samples: Sequence[np.ndarray] = (),
    settings: Any = None,
    *,
    drop: int | None = None,
    protect_first: int | None = None,
    protect_last: int | None = None,
    progress: Any = None,
    stop: Any = None,
) -> DepthRanking:
    """Return the layers to drop for every number of drops; no text is read.

    Raises:
        InputError: E319 the configuration gives no number of layers.
        UsageError: E278 impossible numbers; more than one first or last layer to protect.
    """
    layers = layer_count(checkpoint)
    if (protect_first or 0) > 1 or (protect_last or 0) > 1:
        raise UsageError("E278", "uniform keeps the first and the last layer, and cannot protect more",
                         help="use nmse or block-influence to protect several layers")  # fmt: skip
    most = most_drops(layers, max(0, layers - FEWEST), drop)
    everything = set(range(layers))
    drops = [tuple(sorted(everything - set(keep_set(layers, layers - count)))) for count in range(most + 1)]
    return DepthRanking("uniform", layers, tuple(drops), (0.0, *(math.nan,) * most), notes=(WARNING,))


METHOD = DepthMethod(rank, needs_text=False, summary="drop layers at even distances; needs no text")
