"""Quality of a model with fewer experts against its source, domain by domain, on held-out text."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from surgeon.calibrate import quality
from surgeon.calibrate.settings import Settings
from surgeon.checkpoint.checkpoint import Checkpoint


def by_domain(
    source: Checkpoint,
    pruned: Checkpoint,
    held_out: Mapping[str, Sequence[np.ndarray]],
    settings: Settings,
    *,
    stop: threading.Event | None = None,
) -> dict[str, Any]:
    """Return perplexities, KL and top-1 agreement over all held-out text, and of each domain where there are several.

    Args:
        held_out: domain -> token ids.

    Returns:
        As `surgeon.calibrate.quality.compare`, with "domains": {name: the same}.
    """
    found = {
        domain: quality.compare(source, pruned, samples, settings, decoder=True, stop=stop)
        for domain, samples in held_out.items()
    }
    if len(found) == 1:
        return next(iter(found.values()))
    tokens = sum(one["tokens"] for one in found.values())

    def mean(value: Any) -> float:
        return sum(one["tokens"] * value(one) for one in found.values()) / tokens

    return {
        "tokens": tokens,
        "perplexity": [math.exp(mean(lambda one, n=n: math.log(one["perplexity"][n]))) for n in (0, 1)],
        "kl": mean(lambda one: one["kl"]), "top1": mean(lambda one: one["top1"]), "domains": found,
    }  # fmt: skip
