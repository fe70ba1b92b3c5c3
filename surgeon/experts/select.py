"""From scores to the experts that stay: one rule for every criterion.

All constraints of readers are kept here: the same number everywhere, equally many in each routing group,
protected experts first, ties decided the same way on every machine.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from surgeon.errors import InputError, UsageError


def select(
    scores: np.ndarray,
    tokens: np.ndarray,
    keep: int,
    *,
    groups: int = 1,
    protected: Collection[int] = (),
    where: str = "",
) -> tuple[int, ...]:
    """Return the experts of one layer that stay, ascending.

    Args:
        scores: float64 [experts]; the highest stay.
        tokens: int64 [experts], tokens each expert was given; of equal scores the one with more stays, then the
            one with the lower number.
        keep: how many stay.
        groups: routing groups; each keeps equally many, because a router of groups cuts its rows at fixed borders.
        protected: experts that stay whatever their score.
        where: the layer in words, for messages.

    Raises:
        InputError: E399 a score is not a number.
        UsageError: E239 more experts are protected than may stay, or ``keep`` does not go with the groups.
    """
    scores, tokens = np.asarray(scores, np.float64), np.asarray(tokens)
    count = len(scores)
    if not 1 <= keep <= count or keep % groups or count % groups:
        raise UsageError("E239", f"{keep} of {count} experts in {groups} groups cannot be kept equally",
                         help=f"keep a multiple of {groups} up to {count}")  # fmt: skip
    wrong = np.flatnonzero(~np.isfinite(scores))
    if len(wrong):
        raise InputError("E399", f"the score of expert {wrong[0]}{where and ' of ' + where} is {scores[wrong[0]]}",
                         help="its weights or activations are not finite: surgeon verify MODEL, or calibrate in float32")  # fmt: skip
    each, size = keep // groups, count // groups
    chosen: list[int] = []
    for group in range(groups):
        members = range(group * size, (group + 1) * size)
        must = sorted(set(members) & set(protected))
        if len(must) > each:
            place = f" in routing group {group}" if groups > 1 else ""
            raise UsageError("E239", f"{len(must)} experts{where and ' of ' + where}{place} are protected ({', '.join(map(str, must))}), "
                             f"but only {each} may stay", help="keep more experts, protect fewer, or --no-protect")  # fmt: skip
        others = sorted(set(members) - set(must), key=lambda e: (-scores[e], -int(tokens[e]), e))
        chosen += must + others[: each - len(must)]
    return tuple(sorted(chosen))
