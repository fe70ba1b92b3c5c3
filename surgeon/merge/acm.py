"""Activation-guided consensus merging: smaller steps where the models already agree.

ACM (arXiv 2505.14009, section 3.2): the mutual information MI between the outputs of a layer in the
base and in a tuned model, both on the same text, says how much the layers have in common. With m the
largest value over all places and samples,

    t = mean over samples of 1 / (1 + exp(-theta (MI - m))),        0 < t <= 1/2

and the task vector of every tensor of the layer is multiplied by 1 - t, in [1/2, 1). Embedding, final
norm and output head are places of their own. Any merge method follows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from surgeon.architectures.naming import layer_of
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.header import printable
from surgeon.errors import InputError, UsageError, Where
from surgeon.merge.layer_scores import LayerScores

if TYPE_CHECKING:
    from surgeon.calibrate.settings import Settings

THETA = 0.7
"""For models up to 7B; 1.2 at 14B (arXiv 2505.14009, section 4.1)."""


def strengths(information: Mapping[str, np.ndarray], theta: float = THETA) -> dict[str, float]:
    """Return the factor 1 - t of each place's task vector, in [1/2, 1).

    Args:
        information: place -> mutual information of each sample, in nats.
        theta: steepness, positive.

    Raises:
        UsageError: E233 theta is not positive.
        InputError: E356 a value is not finite, or there is none.
    """
    if not (theta > 0 and np.isfinite(theta)):
        raise UsageError("E233", f"acm: theta {theta:g} is not positive",
                         help="larger values tell layers further apart; 0.7 is usual")  # fmt: skip
    for place, values in information.items():
        if not values.size or not np.isfinite(values).all():
            raise InputError("E356", f"acm: the mutual information of {printable(place)} is not a finite number",
                             where=Where(tensor=printable(place)), help="give more calibration text; surgeon verify checks the models")  # fmt: skip
    if not information:
        raise InputError("E356", "acm: no layer was measured", help="give longer or more calibration text")
    largest = max(float(values.max()) for values in information.values())
    found = {}
    for place, values in information.items():
        power = np.exp(theta * (values - largest))  # at most 1
        found[place] = float(1.0 - (power / (1.0 + power)).mean())
    return found


def layer_scores(information: Mapping[str, np.ndarray], theta: float = THETA) -> LayerScores:
    """Return the tuned model's scores: one factor a layer, and one for each place outside the layers.

    Args:
        information: module -> mutual information of each sample; modules inside a layer stand for all of it.
    """
    layers: dict[int, float] = {}
    outside: list[tuple[str, float]] = []
    for module, factor in strengths(information, theta).items():
        place = layer_of(module)
        if place is None:
            outside.append((f"{module}.*", factor))
        else:
            layers[place.index] = factor
    return LayerScores(dict(sorted(layers.items())), tuple(sorted(outside)))


def measure(
    base: Checkpoint,
    tuned: Checkpoint,
    samples: Sequence[np.ndarray],
    settings: Settings,
    *,
    theta: float = THETA,
    estimator: str = "gaussian",
    head: bool = True,
    progress: Any = None,
    stop: Any = None,
) -> tuple[LayerScores, dict[str, Any]]:
    """Run both models over the same samples, layer by layer, and return the tuned model's scores.

    Args:
        samples: token ids, one array each.
        settings: where and how the models run.
        theta, estimator: see `strengths` and `surgeon.calibrate.information`.
        head: measure the output head, too: as many logits as tokens times vocabulary.
        progress, stop: as `surgeon.calibrate.walk.Walk.run`.

    Returns:
        The scores, and plain data on how they came about, for `write_layer_scores`.
    """
    from surgeon.calibrate.paired_outputs import measure_information

    found = measure_information(
        base, tuned, samples, settings, estimator=estimator, head=head, progress=progress, stop=stop
    )
    made_by = {
        "method": "acm",
        "theta": theta,
        "estimator": estimator,
        "samples": len(samples),
        "tokens": int(sum(len(s) for s in samples)),
        "precision": settings.dtype,
        "mutual_information": {module: float(values.mean()) for module, values in sorted(found.items())},
    }
    return layer_scores(found, theta), made_by
