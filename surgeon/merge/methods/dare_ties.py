"""DARE TIES."""

from __future__ import annotations

from functools import partial

from surgeon.merge.method import Method
from surgeon.merge.task_vectors import bind_family, family_parameters

METHOD = Method(
    name="dare_ties",
    title="DARE TIES",
    summary="Drops task-vector entries at random, then elects signs as TIES does.",
    bind=partial(bind_family, sparsifier="random", elect=True),
    parameters=family_parameters(normalize=False, rescale=True, density=0.7, lam=0.7),
    reference="Yu et al. 2023, arXiv 2311.03099",
    random=True,
    page="""As dare-linear, with sign election. Note that normalize is off by default: weights do not cancel.""",
)
