"""Rows of token-indexed tensors in the order of the merged vocabulary, gathered in bounded memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from surgeon.errors import UsageError
from surgeon.kernels.cast import round_to, widen

Read = Callable[[str, str, int, int], np.ndarray]
"""read(model key, tensor name, start element, stop element) -> 1-D array: uint16 holds bfloat16 bits."""

ZERO, MEAN, PADDING = -1, -2, -3
_BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True, eq=False)
class RowMap:
    """For every row of the merged tensor, the model's own row with the same token; -1 = none.

    Attributes:
        source: int64 [rows].
    """

    source: np.ndarray

    def is_identity(self) -> bool:
        """Tell whether every row stays where it is."""
        return bool((self.source == np.arange(len(self.source))).all())


@dataclass(frozen=True)
class Override:
    """Where one row comes from instead of the general rule.

    Attributes:
        source: (model key, its row), or None for zeros.
        force: also for models that have the token.
        strict: it is an error when the model does not take part in a tensor; else the override
            is dropped there.
    """

    source: tuple[str, int] | None
    force: bool = False
    strict: bool = False


@dataclass(frozen=True, eq=False)
class VocabularyPlan:
    """The merged vocabulary, and what each model contributes to every row of it.

    Attributes:
        rows: rows of every token-indexed output tensor.
        tokens: token -> id of the output tokenizer.
        row_maps: model key -> `RowMap`, in merge order.
        overrides: output row -> `Override`.
        base: key of the base model, whose row fills gaps before a mean does.
        pad_from: rows from here on are the mean of the rows before, per model; None = no such rows.
        donor: key of the model whose tokenizer files are copied; None = there are none.
        files: tokenizer files that replace the donor's, name -> content.
        drop_files: files of the donor that are not copied.
        config_edits: key -> value for config.json; dots lead into nested objects.
        generation_edits: the same for generation_config.json.
        notices, warnings: sentences for the user.
    """

    rows: int
    tokens: dict[str, int]
    row_maps: dict[str, RowMap]
    overrides: dict[int, Override] = field(default_factory=dict)
    base: str | None = None
    pad_from: int | None = None
    donor: str | None = None
    files: dict[str, bytes] = field(default_factory=dict)
    drop_files: tuple[str, ...] = ()
    config_edits: dict[str, Any] = field(default_factory=dict)
    generation_edits: dict[str, Any] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def is_identity(self, rows: int | None = None) -> bool:
        """Tell whether tensors can be merged as they are (those with ``rows`` rows, default the plan's)."""
        same = rows is None or rows == self.rows
        return (
            same
            and not self.overrides
            and self.pad_from is None
            and all(m.is_identity() for m in self.row_maps.values())
        )


@dataclass(frozen=True, eq=False)
class Filling:
    """Where every aligned row of every model really comes from, for one set of models.

    Attributes:
        models: keys in merge order; ``owner`` counts in it.
        owner: key -> int16 [rows]: index of the model read from, or ZERO, MEAN, PADDING.
        source: key -> int64 [rows]: the row there (undefined for the three markers).
        mean_rows: int64, ascending: output rows that are means over several models.
        mean_start: int64 [len(mean_rows) + 1]: borders in the two arrays below.
        mean_owner, mean_source: model index and row of every summand, in merge order.
    """

    models: tuple[str, ...]
    owner: dict[str, np.ndarray]
    source: dict[str, np.ndarray]
    mean_rows: np.ndarray
    mean_start: np.ndarray
    mean_owner: np.ndarray
    mean_source: np.ndarray

    def contributions(self, model: str, row: int) -> tuple[tuple[str, int], ...]:
        """Return the (model key, row) pairs whose mean is this aligned row; () means zero.

        Padding rows, which average all rows before them, are not described by this list.
        """
        owner = int(self.owner[model][row])
        if owner >= 0:
            return ((self.models[owner], int(self.source[model][row])),)
        if owner != MEAN:
            return ()
        at = int(np.searchsorted(self.mean_rows, row))
        span = range(int(self.mean_start[at]), int(self.mean_start[at + 1]))
        return tuple((self.models[int(self.mean_owner[i])], int(self.mean_source[i])) for i in span)


def fill_rows(plan: VocabularyPlan, models: Sequence[str] | None = None) -> Filling:
    """Apply the fill rules for the models that take part in a tensor (default: all).

    Raises:
        UsageError: E241 when a token's source model does not take part.
    """
    keys = tuple(models if models is not None else plan.row_maps)
    table = np.stack([plan.row_maps[key].source for key in keys])  # [models, rows]
    present = table >= 0
    count = present.sum(axis=0)
    default_owner = np.full(plan.rows, ZERO, dtype=np.int16)
    default_source = np.full(plan.rows, -1, dtype=np.int64)
    single = count == 1
    first = present.argmax(axis=0)
    default_owner[single] = first[single]
    rest = count > 1
    if plan.base in keys:
        at = keys.index(plan.base)
        from_base = rest & present[at]
        default_owner[from_base] = at
        rest &= ~from_base
    default_owner[rest] = MEAN
    readable = np.flatnonzero(default_owner >= 0)
    default_source[readable] = table[default_owner[readable], readable]
    forced = np.zeros(plan.rows, dtype=bool)
    for row, override in plan.overrides.items():
        if override.source is None:
            default_owner[row] = ZERO
        elif override.source[0] in keys:
            default_owner[row], default_source[row] = keys.index(override.source[0]), override.source[1]
        elif override.strict:
            raise UsageError(
                "E241",
                f"row {row} is to come from {override.source[0]}, which has no part in this tensor",
                help="name one of the models that are merged",
            )
        else:
            continue
        forced[row] = override.force
    if plan.pad_from is not None:
        default_owner[plan.pad_from :] = PADDING
        forced[plan.pad_from :] = True
    owners, sources = {}, {}
    for number, key in enumerate(keys):
        own = present[number] & ~forced
        owners[key] = np.where(own, np.int16(number), default_owner)
        sources[key] = np.where(own, table[number], default_source)
    mean_rows = np.flatnonzero((default_owner == MEAN) & (count < len(keys)))
    summands = present[:, mean_rows].T  # [mean rows, models]: row-major order is merge order within a row
    at_row, owner = np.nonzero(summands)
    start = np.concatenate([[0], np.cumsum(summands.sum(axis=1))]).astype(np.int64)
    return Filling(keys, owners, sources, mean_rows, start, owner, table[owner, mean_rows[at_row]])


class AlignedRows:
    """Reads token-indexed tensors of the merged models as if they had the merged vocabulary.

    Args:
        plan: the vocabulary plan.
        read: callback giving raw elements of a model's own tensor (uint16 = bfloat16 bits,
            float16, float32 or float64).
        cols: elements per row (1 for a bias).
        models: keys that take part in these tensors, in merge order; default all.
        rounding: "BF16" or "F16" rounds means as mergekit does, which averages in the dtype it
            loaded: after every addition and the division. Default keeps float32.

    Memory beyond the result: one block of at most `_BLOCK_ELEMENTS` elements or one row.
    Instances are safe to share between threads if ``read`` is.
    """

    def __init__(
        self,
        plan: VocabularyPlan,
        read: Read,
        cols: int,
        *,
        models: Sequence[str] | None = None,
        rounding: str = "F32",
    ) -> None:
        self.plan = plan
        self.cols = cols
        self.filling = fill_rows(plan, models)
        self._read = read
        self._rounding = rounding
        self._padding: dict[tuple[str, str], np.ndarray] = {}
        self._lock = threading.Lock()

    def elements(self, model: str, name: str, start: int, stop: int) -> np.ndarray:
        """Return elements [start, stop) of the aligned tensor of one model as float32 [stop - start]."""
        out = np.zeros(max(stop - start, 0), dtype=np.float32)
        if not out.size:
            return out
        first, last = start // self.cols, (stop - 1) // self.cols + 1
        owner, source = self.filling.owner[model][first:last], self.filling.source[model][first:last]
        joined = (owner[1:] == owner[:-1]) & ((source[1:] - source[:-1] == 1) | (owner[1:] < 0))
        borders = np.concatenate([[0], np.flatnonzero(~joined) + 1, [last - first]])
        for begin, end in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
            low = max((first + begin) * self.cols, start)
            high = min((first + end) * self.cols, stop)
            target = out[low - start : high - start]
            marker = int(owner[begin])
            if marker >= 0:
                self._gather(target, marker, name, int(source[begin]), low - (first + begin) * self.cols)
            elif marker == MEAN:
                self._means(target, name, low, high)
            elif marker == PADDING:
                mean = self._padding_row(model, name)
                target[:] = mean[np.arange(low, high) % self.cols]
        return out

    def _gather(self, target: np.ndarray, owner: int, name: str, row: int, offset: int) -> None:
        begin = row * self.cols + offset
        for at in range(0, len(target), _BLOCK_ELEMENTS):
            stop = min(at + _BLOCK_ELEMENTS, len(target))
            target[at:stop] = _float32(self._read(self.filling.models[owner], name, begin + at, begin + stop))

    def _means(self, target: np.ndarray, name: str, low: int, high: int) -> None:
        filling = self.filling
        for row in range(low // self.cols, (high - 1) // self.cols + 1):
            left, right = max(row * self.cols, low), min((row + 1) * self.cols, high)
            at = int(np.searchsorted(filling.mean_rows, row))
            begin, end = int(filling.mean_start[at]), int(filling.mean_start[at + 1])
            total = np.zeros(right - left, dtype=np.float32)
            for i in range(begin, end):
                shift = (int(filling.mean_source[i]) - row) * self.cols
                key = filling.models[int(filling.mean_owner[i])]
                total = round_to(
                    total + _float32(self._read(key, name, left + shift, right + shift)), self._rounding
                )
            target[left - low : right - low] = round_to(total / np.float32(end - begin), self._rounding)

    def _padding_row(self, model: str, name: str) -> np.ndarray:
        """Mean of all rows that have a token, float32 [cols]; computed once per model and tensor."""
        with self._lock:
            known = self._padding.get((model, name))
            if known is None:
                rows = self.plan.pad_from or 0
                total = np.zeros(self.cols, dtype=np.float64)
                step = max(1, _BLOCK_ELEMENTS // self.cols)
                for row in range(0, rows, step):
                    stop = min(row + step, rows)
                    block = self.elements(model, name, row * self.cols, stop * self.cols)
                    total += block.reshape(-1, self.cols).sum(axis=0, dtype=np.float64)
                mean = (total / max(rows, 1)).astype(np.float32)
                known = self._padding[model, name] = round_to(mean, self._rounding)
            return known


def _float32(raw: np.ndarray) -> np.ndarray:
    return widen(raw, "BF16").astype(np.float32, copy=False)
