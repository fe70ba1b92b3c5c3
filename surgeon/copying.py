"""Operations that do no arithmetic: pass a tensor on, change its float type, demand equality."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from surgeon.checkpoint.header import printable
from surgeon.errors import InputError, Where
from surgeon.plan import Block, Operation


@dataclass(frozen=True)
class Copy(Operation):
    """The first input's stored bytes, of any type; blocks count bytes."""

    name = "copy"
    scratch = 0
    copies = True

    def map(self, block: Block, carried: None) -> list[np.ndarray]:
        return [block.raw[0]]


@dataclass(frozen=True)
class Cast(Operation):
    """One input in another float type: rounded to ``work`` first, then to the output's type."""

    work: str = "F32"
    index: int = 0

    name = "cast"
    scratch = 8

    def map(self, block: Block, carried: None) -> list[np.ndarray]:
        return [block.value(self.index, self.work)]


@dataclass(frozen=True)
class CopyIfEqual(Operation):
    """The inputs' common bytes. Integer and bool tensors have no average: they agree, or the merge stops.

    ``labels`` name the inputs in the message, in order.
    """

    labels: tuple[str, ...] = ()

    name = "copy_if_equal"
    scratch = 0
    copies = True

    def map(self, block: Block, carried: None) -> list[np.ndarray]:
        first = block.raw[0]
        for i, other in enumerate(block.raw[1:], start=1):
            if block.codes[i] == block.codes[0] and first.tobytes() == other.tobytes():
                continue
            name = printable(block.name)
            pair = f"{self.labels[0]} and {self.labels[i]}" if len(self.labels) > i else "the models"
            raise InputError(
                "E323", f"{name} has type {block.codes[0]}, which cannot be averaged, and differs between {pair}",
                where=Where(tensor=name),
                help="merge models of the same kind, or copy the tensor from one of them",
            )  # fmt: skip
        return [first]
