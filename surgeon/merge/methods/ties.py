"""TIES."""

from __future__ import annotations

from functools import partial

from surgeon.merge.method import Method
from surgeon.merge.task_vectors import RESCALE_RULE, SCOPE, TRIM_TIES, bind_family, family_parameters

METHOD = Method(
    name="ties",
    title="TIES",
    summary="Trims task vectors to their largest entries, elects a sign per entry, averages those that agree.",
    bind=partial(bind_family, sparsifier="magnitude", elect=True),
    parameters=(
        *family_parameters(normalize=True, rescale=False, density=0.2, lam=1.0),
        SCOPE,
        TRIM_TIES,
        RESCALE_RULE,
    ),
    reference="Yadav et al. 2023, arXiv 2306.01708",
    random=False,
    group_by="scope",
    page="""Keeps the density * N largest entries of each task vector (per tensor), elects the sign of their
weighted sum at every entry, and adds the weighted mean of the agreeing ones.

The command line trims to density 0.2 as published long-to-short merges do; a mergekit YAML defaults to 1.0, i.e.
no trimming. With one model and normalize on, its weight cancels: set lambda instead. Entries that tie with the
threshold are kept evenly over the tensor (trim_ties all keeps every one). The paper trims over the whole model: scope
global. density is the fraction KEPT; some papers give the fraction removed.""",
)
