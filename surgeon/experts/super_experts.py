"""Super experts: the few whose outputs make the massive activations a model cannot do without (arXiv 2507.23279).

With A[l, i] the largest magnitude in any output of expert i of layer l, before its weight, expert (l, i) is one iff

    A[l, i] > P99.5(A)   and   A[l, i] > max(A) / 10   and   l < round(0.75 L)

over all layers and experts, L being the layers of the model and l their numbers: the last layers have large outputs
that nothing depends on. The percentile interpolates linearly. Magnitudes are absolute, every routed token counts, shared
experts and dense layers do not take part. The published code looks at the first token of each sequence only, divides by 10
in whole numbers, and takes in shared and dense matrices; another implementation uses the signed maximum and counts
rows among layers of experts as layers of the model.

Of few experts the percentile is next to the largest value. With fewer than 200 of them one must also
exceed 10 times the median of the other experts of its layer (an addition of this program); what does so but is not above the
percentile is reported as a candidate, not as certain.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from surgeon.experts.statistics import RoutingStatistics
from surgeon.structure.experts.parts import Experts

PERCENTILE = 99.5
OF_LARGEST = 0.1
EARLY = 0.75
FEW = 200
OF_MEDIAN = 10.0


@dataclass(frozen=True)
class SuperExpert:
    """One expert with outlying outputs.

    Attributes:
        layer, expert: by their numbers in the checkpoint.
        peak: A, the largest magnitude in its outputs.
        certain: whether the whole rule holds; False for a candidate, which is not protected.
    """

    layer: int
    expert: int
    peak: float
    certain: bool


def super_experts(statistics: RoutingStatistics, experts: Experts) -> list[SuperExpert]:
    """Return the super experts of a model, ascending by layer and number.

    Args:
        statistics: of a pass over text; any text does, with the tokens a tokenizer puts first.
        experts: where the experts are.
    """
    peaks = {layer.index: statistics.total(layer.index).peak for layer in experts.running}
    return by_peaks(peaks, statistics.model_layers)


def by_peaks(peaks: dict[int, np.ndarray], model_layers: int) -> list[SuperExpert]:
    """Return the super experts given A, float64 [E] of each layer of experts, and the model's number of layers."""
    everything = np.concatenate(list(peaks.values()))
    high = np.percentile(everything, PERCENTILE, method="linear")
    least = everything.max() * OF_LARGEST
    last = round(EARLY * model_layers)
    found = []
    for layer, values in sorted(peaks.items()):
        for expert, peak in enumerate(values):
            if layer >= last or not peak > least:
                continue
            outlying = bool(peak > high)
            alone = (
                bool(peak > OF_MEDIAN * np.median(np.delete(values, expert))) if len(values) > 1 else False
            )
            if len(everything) >= FEW and outlying:
                found.append(SuperExpert(layer, expert, float(peak), True))
            elif len(everything) < FEW and alone:
                found.append(SuperExpert(layer, expert, float(peak), outlying))
    return found
