"""Samples with an answer: which of their tokens the loss counts, and which samples have no loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from surgeon.errors import InputError, Where


class TokenSample(Protocol):
    """What is needed of a sample (`surgeon.calibrate.data.Sample`)."""

    @property
    def ids(self) -> np.ndarray: ...
    @property
    def answer_start(self) -> int: ...
    @property
    def line(self) -> int: ...


def answer_places(sample: TokenSample) -> slice:
    """Return the places whose next token belongs to the answer."""
    return slice(max(sample.answer_start, 1) - 1, len(sample.ids) - 1)


def check_answers(samples: Sequence[TokenSample]) -> None:
    """Raise E387 for a sample in which no token is predicted."""
    if not samples:
        raise InputError("E385", "there are no samples to measure gradients on", help="give calibration text")
    for sample in samples:
        if len(sample.ids) - max(sample.answer_start, 1) < 1:
            raise InputError(
                "E387", f"the sample at line {sample.line} has no answer tokens: it has {len(sample.ids)} tokens "
                f"and its answer would start at token {sample.answer_start}", where=Where(line=sample.line or None),
                help="the prompt may fill the sequence length; raise --sequence-length or drop the sample",
            )  # fmt: skip


def check_lengths(samples: Sequence[TokenSample], limit: int | None) -> None:
    """Raise E385 for a sample with more tokens than the model has positions (None: no limit)."""
    for number, sample in enumerate(samples):
        if limit is not None and len(sample.ids) > limit:
            raise InputError("E385", f"sample {number} (line {sample.line}) has {len(sample.ids)} tokens, the model takes {limit}",
                             where=Where(line=sample.line or None), help="lower the sequence length")  # fmt: skip
