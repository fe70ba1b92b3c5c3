"""DARE linear."""

from __future__ import annotations

from functools import partial

from surgeon.merge.method import Method
from surgeon.merge.task_vectors import bind_family, family_parameters

METHOD = Method(
    name="dare_linear",
    title="DARE linear",
    summary="Drops task-vector entries at random, restores the L1 norm, adds the rest.",
    bind=partial(bind_family, sparsifier="random", elect=False),
    parameters=family_parameters(normalize=False, rescale=True, density=0.7, lam=0.7),
    reference="Yu et al. 2023, arXiv 2311.03099",
    random=True,
    page="""Keeps each entry with probability density. Rescales by the ratio of L1 norms (mergekit's rule; the paper
divides by density). Random: the result depends on --seed, not on threads or interruption.""",
)
