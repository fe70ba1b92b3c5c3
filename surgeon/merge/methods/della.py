"""DELLA."""

from __future__ import annotations

from functools import partial

from surgeon.merge.method import Method
from surgeon.merge.task_vectors import EPSILON, bind_family, family_parameters

METHOD = Method(
    name="della",
    title="DELLA",
    summary="Drops entries at random, small ones more often, then elects signs.",
    bind=partial(bind_family, sparsifier="magprune", elect=True),
    parameters=family_parameters(normalize=True, rescale=True, density=0.5, lam=1.0, extra=(EPSILON,)),
    reference="Deep et al. 2024, arXiv 2406.11617",
    random=True,
    page="""Ranks entries by magnitude within each row; keep probability runs linearly from density - epsilon
(smallest) to density + epsilon (largest). Needs 0 < density - epsilon and density + epsilon < 1.""",
)
