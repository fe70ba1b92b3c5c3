"""Task arithmetic."""

from __future__ import annotations

from functools import partial

from surgeon.merge.method import Method
from surgeon.merge.task_vectors import bind_family, family_parameters

METHOD = Method(
    name="task_arithmetic",
    title="Task arithmetic",
    summary="Adds weighted task vectors (model minus base) to the base.",
    bind=partial(bind_family, sparsifier="none", elect=False),
    parameters=family_parameters(normalize=False, rescale=False, density=None, lam=0.7),
    reference="Ilharco et al. 2022, arXiv 2212.04089",
    random=False,
    page="""y = b + lambda * sum(w_i (x_i - b)).

With one model, weight and lambda multiply. Coefficients around 0.5-0.7 are usual; above 1 extrapolates.""",
)
