"""Model Stock."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from surgeon.merge.combination import Combination, norms
from surgeon.merge.method import Binding, Method, Parameter
from surgeon.plan import Operation

TINY_PRODUCT = 1e-6
SINGULAR = 1e-6


@dataclass(frozen=True)
class ModelStock:
    """t = n c / (1 + (n - 1) c) with c the mean cosine between task vectors; each gets t / n."""

    def _ratio(self, gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        n = gram.shape[-1]
        size = norms(gram)
        total = np.zeros(gram.shape[:-2])
        for i in range(n):
            for j in range(i + 1, n):
                product = np.maximum(size[..., i] * size[..., j], TINY_PRODUCT)
                total = total + np.clip(gram[..., i, j] / product, -1.0, 1.0)
        cos = total / (n * (n - 1) / 2)
        divisor = 1.0 + (n - 1) * cos
        singular = np.abs(divisor) < SINGULAR
        return cos, np.where(singular, 0.0, n * cos / np.where(singular, 1.0, divisor))

    def coefficients(self, gram: np.ndarray) -> np.ndarray:
        n = gram.shape[-1]
        t = self._ratio(gram)[1]
        return np.repeat(t[..., None] / n, n, axis=-1)

    def facts(self, gram: np.ndarray) -> dict[str, Any]:
        cos, t = self._ratio(gram)
        return {"cosine": float(cos), "t": float(t)}


def bind(b: Binding) -> Operation:
    vectors = "row" if b.shared["filter_wise"] and len(b.shape) > 1 else "tensor"
    return Combination(ModelStock(), b.others, b.base, b.work, vectors)


METHOD = Method(
    name="model_stock",
    title="Model Stock",
    summary="Averages fine-tunes of one recipe and pulls the average towards the base, by their angles.",
    bind=bind,
    base="required",
    models=(3, None),
    parameters=(
        Parameter("filter_wise", "bool", "one ratio for each row instead of each tensor", default=False),
    ),
    reference="Jang et al. 2024, arXiv 2403.19522",
    page="""y = t mean(x_i) + (1 - t) b, t = n c / (1 + (n - 1) c), c the mean cosine between the task vectors.

Meant for several fine-tunes of one model with the same recipe. Unrelated experts are nearly orthogonal, so t is near
0 and the result is nearly the base; negative c extrapolates away from the fine-tunes.""",
)
