"""Breadcrumbs TIES."""

from __future__ import annotations

from functools import partial

from surgeon.merge.method import Method
from surgeon.merge.task_vectors import GAMMA, bind_family, family_parameters

METHOD = Method(
    name="breadcrumbs_ties",
    title="Breadcrumbs TIES",
    summary="Breadcrumbs with TIES sign election.",
    bind=partial(bind_family, sparsifier="outliers", elect=True),
    parameters=family_parameters(normalize=False, rescale=False, density=0.5, lam=1.0, extra=(GAMMA,)),
    reference="Davari and Belilovsky 2023, arXiv 2312.06795",
    random=False,
    page="""As breadcrumbs, with sign election.""",
)
