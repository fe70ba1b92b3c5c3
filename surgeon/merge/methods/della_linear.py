"""DELLA linear."""

from __future__ import annotations

from functools import partial

from surgeon.merge.method import Method
from surgeon.merge.task_vectors import EPSILON, bind_family, family_parameters

METHOD = Method(
    name="della_linear",
    title="DELLA linear",
    summary="DELLA's dropping without sign election.",
    bind=partial(bind_family, sparsifier="magprune", elect=False),
    parameters=family_parameters(normalize=False, rescale=True, density=0.5, lam=1.0, extra=(EPSILON,)),
    reference="Deep et al. 2024, arXiv 2406.11617",
    random=True,
    page="""As della, without sign election.""",
)
