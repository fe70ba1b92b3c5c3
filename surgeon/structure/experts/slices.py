"""What a cut leaves of one stored tensor of experts: ranges of the result, read from ranges of what is stored.

A tensor of the result is one or several `Part`s, one after the other: a whole tensor, one expert's slice of a stack,
some channels of it, padded with zeros. Values are carried as stored bits wherever nothing is computed.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from surgeon.checkpoint.header import printable
from surgeon.errors import InputError, Where
from surgeon.kernels.cast import narrow, nonfinite, widen
from surgeon.structure.experts.parts import Order
from surgeon.structure.selection import Reader, Selection

EXPONENT_NAN = 255
"""The one bit pattern of an exponent byte (E8M0) that stands for no number."""


class Piece(Protocol):
    """A tensor of the result as a function of the stored one, both flattened.

    Attributes:
        shape: of the result.
        granularity: elements of the result that are cheapest to read together.
    """

    shape: tuple[int, ...]
    granularity: int

    def read(self, read: Reader, start: int, stop: int) -> np.ndarray:
        """Return elements [start, stop) of the result; ``read`` returns elements of what is stored."""
        ...


class Whole:
    """All of a tensor."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.granularity = 1

    def read(self, read: Reader, start: int, stop: int) -> np.ndarray:
        return read(start, stop)


class Padded:
    """Kept indices of one axis of a tensor, with zeros between and behind them.

    Args:
        shape: of the stored tensor.
        axis: the first or the last one.
        kept: stored indices, ascending.
        places: where each of them lies in the result, ascending.
        length: of the axis in the result.
    """

    def __init__(
        self, shape: tuple[int, ...], axis: int, kept: np.ndarray, places: np.ndarray, length: int
    ) -> None:
        assert axis in (0, len(shape) - 1)
        self.shape = (*shape[:axis], length, *shape[axis + 1 :])
        self._selection = Selection(shape, {axis: kept})
        self._filled = np.zeros(length, dtype=bool)
        self._filled[places] = True
        self._before = np.concatenate([[0], np.cumsum(self._filled)])  # kept indices before each place
        self._columns = axis == len(shape) - 1
        self._kept = len(kept)
        self.granularity = length if self._columns else max(1, math.prod(self.shape[1:]))

    def read(self, read: Reader, start: int, stop: int) -> np.ndarray:
        row = self.granularity
        first, end = start // row, -(-stop // row)
        if self._columns:
            found = self._selection.read(read, first * self._kept, end * self._kept).reshape(-1, self._kept)
            rows = np.zeros((end - first, row), dtype=found.dtype)
            rows[:, self._filled] = found
        else:
            low, high = int(self._before[first]), int(self._before[end])
            found = self._selection.read(read, low * row, high * row).reshape(-1, row)
            rows = np.zeros((end - first, row), dtype=found.dtype)
            rows[self._filled[first:end]] = found
        return rows.reshape(-1)[start - first * row : stop - first * row]


def channel_places(
    channels: np.ndarray, stored: int, width: int, order: Order
) -> tuple[np.ndarray, np.ndarray, int]:
    """Return which indices of a channel axis stay and where they go.

    Args:
        channels: channels of the expert that stay, ascending.
        stored: channels the expert has.
        width: channels it is given in the result.
        order: how gate and up share the axis.

    Returns:
        (stored indices, their places in the result, length of the axis in the result).
    """
    rank = np.arange(len(channels))
    if order == "plain":
        return channels, rank, width
    if order == "concatenated":
        return np.concatenate([channels, stored + channels]), np.concatenate([rank, width + rank]), 2 * width
    both = np.arange(2)
    return (2 * channels[:, None] + both).reshape(-1), (2 * rank[:, None] + both).reshape(-1), 2 * width


def narrowed(
    shape: tuple[int, ...], axis: int, channels: np.ndarray, stored: int, width: int, order: Order
) -> Piece:
    """Return a tensor of one expert with some of its channels, and zeros up to ``width``."""
    kept, places, length = channel_places(channels, stored, width, order)
    if len(kept) == length:
        return Whole(shape) if length == shape[axis] else Selection(shape, {axis: kept})
    return Padded(shape, axis, kept, places, length)


def selected(shape: tuple[int, ...], axis: int, kept: np.ndarray) -> Piece:
    """Return some experts of a tensor that holds all of them."""
    if len(kept) == shape[axis]:
        return Whole(shape)
    chosen = {axis: kept}
    if axis == 0 and len(shape) > 2:  # so that the unit of reading is a row, not an expert
        chosen[1] = np.arange(shape[1])
    return Selection(shape, chosen)


Change = Callable[[np.ndarray], np.ndarray]
"""Stored bits to stored bits."""


@dataclass(frozen=True)
class Part:
    """One stretch of a tensor of the result.

    Attributes:
        piece: what is taken of it.
        offset: elements before it in the stored tensor.
        factor: what its values are multiplied with, where they are computed.
        change: what is done to its bits, where they are not.
        replacement: name in the checkpoint of replacements that holds it instead; None without one.
    """

    piece: Piece
    offset: int = 0
    factor: float = 1.0
    change: Change | None = None
    replacement: str | None = None

    @property
    def untouched(self) -> bool:
        """Whether it is all of the stored tensor, as it is."""
        return (
            isinstance(self.piece, Whole)
            and self.factor == 1.0
            and self.change is None
            and self.replacement is None
        )


class Row:
    """Parts of equal size one after the other, addressed as one flattened tensor."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)
        self._ends = np.cumsum([math.prod(part.piece.shape) for part in self.parts]).tolist()
        self.granularity = max(part.piece.granularity for part in self.parts)

    def read(self, read: Callable[[Part, int, int], np.ndarray], start: int, stop: int) -> np.ndarray:
        """Return elements [start, stop); ``read`` returns a range of one part."""
        if stop <= start:
            return read(self.parts[0], 0, 0)
        found = []
        for number in range(bisect_right(self._ends, start), len(self.parts)):
            begin = self._ends[number - 1] if number else 0
            if begin >= stop:
                break
            found.append(
                read(self.parts[number], max(start, begin) - begin, min(stop, self._ends[number]) - begin)
            )
        return found[0] if len(found) == 1 else np.concatenate(found)


@dataclass(frozen=True)
class Multiply:
    """Multiply stored floats by a power of two, bits to bits; exact unless a value leaves the range.

    Raises (when called):
        InputError: E425 a value overflows.
    """

    name: str
    code: str
    factor: float

    def __call__(self, raw: np.ndarray) -> np.ndarray:
        values = widen(raw, self.code)
        with np.errstate(over="ignore"):
            found = narrow(values * values.dtype.type(self.factor), self.code)
        bad = nonfinite(found, self.code)
        if bad is not None and bool(np.isfinite(values[bad]).any()):
            raise _leaves(self.name, self.factor, self.code)
        return found


@dataclass(frozen=True)
class AddExponent:
    """Add to exponent bytes (E8M0): every value of the block is multiplied by a power of two.

    Raises (when called):
        InputError: E425 an exponent leaves 0..254.
    """

    name: str
    factor: float

    def __call__(self, raw: np.ndarray) -> np.ndarray:
        exponent = power_of_two(self.factor)
        assert exponent is not None
        moved = raw.astype(np.int32) + exponent
        number = raw != EXPONENT_NAN
        if bool(((moved < 0) | (moved >= EXPONENT_NAN))[number].any()):
            raise _leaves(self.name, self.factor, "exponent bytes")
        return np.where(number, moved, EXPONENT_NAN).astype(np.uint8)


def power_of_two(factor: float) -> int | None:
    """Return log2 of a factor when it is a whole number, else None."""
    mantissa, exponent = math.frexp(factor)
    return exponent - 1 if mantissa == 0.5 else None


def _leaves(name: str, factor: float, code: str) -> InputError:
    return InputError(
        "E425", f"{printable(name)} times {factor:g} leaves the range of {code}", where=Where(tensor=printable(name)),
        help="use a smaller factor, or convert the model to bfloat16 first",
    )  # fmt: skip
