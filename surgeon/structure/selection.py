"""Reading some rows and columns of a stored tensor, a range of the result at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np

Reader = Callable[[int, int], np.ndarray]
"""Returns elements [start, stop) of the whole stored tensor, 1-D."""

GAP_ELEMENTS = 1 << 14
"""Unwanted elements read between two wanted rows when that joins two reads."""
READ_ELEMENTS = 1 << 22
"""Stored elements read at once, so that few kept columns of a wide matrix never fill the memory."""


class Selection:
    """Kept indices along some axes of one tensor.

    The tensor is seen as rows of ``width`` stored elements: everything behind the last cut axis is one
    row, and where the last axis itself is cut a row is gathered.

    Args:
        shape: of the stored tensor.
        kept: axis -> kept indices, ascending; axes that are not named stay whole.

    Attributes:
        shape: of the result.
        granularity: elements of the result that are cheapest to read together: one row.
    """

    def __init__(self, shape: tuple[int, ...], kept: Mapping[int, np.ndarray]) -> None:
        assert kept, "a selection of everything needs no selection"
        last = max(kept)
        self.shape = tuple(len(kept[axis]) if axis in kept else size for axis, size in enumerate(shape))
        self._columns = kept[last] if last == len(shape) - 1 and last > 0 else None
        rows = last if self._columns is not None else last + 1
        self._stored, self._leading = shape[:rows], self.shape[:rows]
        self._kept = [kept.get(axis) for axis in range(rows)]
        self._width = math.prod(shape[rows:])
        self.granularity = max(1, math.prod(self.shape[rows:]))

    def read(self, read: Reader, start: int, stop: int) -> np.ndarray:
        """Return elements [start, stop) of the flattened result, reading only the rows they lie in."""
        if stop <= start:
            return read(0, 0)
        first, end = start // self.granularity, -(-stop // self.granularity)
        parts = [self._gather(read, rows) for rows in self._batches(self._rows(first, end))]
        found = parts[0] if len(parts) == 1 else np.concatenate(parts)
        skip = start - first * self.granularity
        return found[skip : skip + stop - start]

    def _rows(self, first: int, end: int) -> np.ndarray:
        """Return the numbers of the stored rows that are rows [first, end) of the result, ascending."""
        places = np.unravel_index(np.arange(first, end), self._leading)
        chosen = [
            place if kept is None else kept[place] for place, kept in zip(places, self._kept, strict=True)
        ]
        return np.ravel_multi_index(chosen, self._stored)

    def _batches(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """Yield stretches of rows that one read covers, without large gaps and not too long."""
        allowed = 1 + GAP_ELEMENTS // max(1, self._width)
        most = max(1, READ_ELEMENTS // max(1, self._width))
        for stretch in np.split(rows, np.flatnonzero(np.diff(rows) > allowed) + 1):
            while len(stretch):
                fits = int(np.searchsorted(stretch, stretch[0] + most))
                yield stretch[:fits]
                stretch = stretch[fits:]

    def _gather(self, read: Reader, rows: np.ndarray) -> np.ndarray:
        first, last = int(rows[0]), int(rows[-1])
        block = read(first * self._width, (last + 1) * self._width).reshape(-1, self._width)
        if len(rows) < len(block):
            block = block[rows - first]
        if self._columns is not None:
            block = block[:, self._columns]
        return block.reshape(-1)
