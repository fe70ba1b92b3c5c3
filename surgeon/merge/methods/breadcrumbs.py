"""Breadcrumbs."""

from __future__ import annotations

from functools import partial

from surgeon.merge.method import Method
from surgeon.merge.task_vectors import GAMMA, bind_family, family_parameters

METHOD = Method(
    name="breadcrumbs",
    title="Breadcrumbs",
    summary="Drops the largest and the smallest entries of each task vector.",
    bind=partial(bind_family, sparsifier="outliers", elect=False),
    parameters=family_parameters(normalize=False, rescale=False, density=0.5, lam=1.0, extra=(GAMMA,)),
    reference="Davari and Belilovsky 2023, arXiv 2312.06795",
    random=False,
    page="""Drops the gamma * N largest entries, then the smallest, so that density * N remain.""",
)
