"""Which matrices an N:M pattern does not divide."""

from __future__ import annotations

from collections.abc import Iterable

from surgeon.calibrate.matrices import Matrix
from surgeon.checkpoint.header import printable
from surgeon.errors import InputError, Where, raise_all
from surgeon.prune.sparse.masks import Pattern


def check_groups(matrices: Iterable[Matrix], pattern: Pattern, *, skip: bool) -> list[Matrix]:
    """Return the matrices whose inputs cannot be divided into groups; they stay dense.

    Raises:
        InputError: E318 there are some, and ``skip`` is off.
    """
    unfit = [matrix for matrix in matrices if matrix.columns % pattern.group]
    if unfit and not skip:
        raise_all(
            InputError("E318", f"{printable(m.label)} has {m.columns} inputs, which {pattern} does not divide",
                       where=Where(tensor=printable(m.tensor)), help="--skip-incompatible leaves such matrices dense")
            for m in unfit
        )  # fmt: skip
    return unfit
