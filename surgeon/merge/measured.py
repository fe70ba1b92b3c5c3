"""What was measured on the models before a merge: plain data, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from surgeon.merge.layer_scores import LayerScores


@dataclass(frozen=True)
class Measured:
    """The values of the adjustments that need a pass over the models.

    Attributes:
        importance: AIM's channel importance a / max a in [0, 1] by tensor name of the reference,
            broadcastable to the tensor; None when AIM is not used.
        scores: layer strengths by model key.
        record: calibration data, counts and settings for the manifest; no paths.
        notes: sentences for the user.
    """

    importance: Mapping[str, np.ndarray] | None = None
    scores: Mapping[str, LayerScores] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
