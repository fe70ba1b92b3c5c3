"""Key-value cache whose rows come and go while the batch runs.

transformers' dynamic cache concatenates, so every new token copies all keys and values, and a row
that has finished stays until the slowest one is done. Here each layer is one buffer
[rows, heads, capacity, dim] that grows in steps; all rows end at the same column, a row that joins
later starts further right, and what lies left of its start is masked. Keys carry their rotary
position from the row's own count, so the column a token lies in does not matter.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

STEP = 128
"""Columns a full buffer grows by, at least."""


class PackedLayer(DynamicLayer):
    """One layer's keys and values; `keys` and `values` are views of the columns in use."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[torch.Tensor] = []
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Write new columns at the end; return all columns in use [rows, heads, length, dim]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[-2]
        if not self.buffers:
            self.buffers = [_empty(t, t.shape[0], end + STEP) for t in (key_states, value_states)]
        elif end > self.buffers[0].shape[-2]:
            self._widen(max(end + STEP, end + end // 4))
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, self.length : end] = states
        self._use(end)
        return self.keys, self.values

    def _use(self, length: int) -> None:
        self.length = length
        self.keys, self.values = (b[:, :, :length] for b in self.buffers)

    def _widen(self, columns: int) -> None:
        for i, old in enumerate(self.buffers):
            self.buffers[i] = _empty(old, old.shape[0], columns)
            self.buffers[i][:, :, : self.length] = old[:, :, : self.length]

    def shift_left(self, count: int) -> None:
        """Drop the first ``count`` columns."""
        for buffer in self.buffers:
            buffer[:, :, : self.length - count] = buffer[:, :, count : self.length].clone()
        self._use(self.length - count)

    def keep_rows(self, rows: torch.Tensor) -> None:
        rows = rows.to(self.buffers[0].device)
        self.buffers = [b[rows] for b in self.buffers]
        self._use(self.length)

    def append_rows(self, count: int) -> None:
        """Add rows whose columns hold zeros, which attention masks."""
        self.buffers = [
            torch.cat([b, torch.zeros_like(b[:1]).expand(count, -1, -1, -1)]) for b in self.buffers
        ]
        self._use(self.length)

    def place(
        self, rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, source: torch.Tensor
    ) -> None:
        """Put the prompts ``source`` of a prefill [prompts, heads, width, dim] into rows, ending at the last column.

        Columns left of a shorter prompt come along from the prefill's own padding: finite, and masked.
        """
        width = keys.shape[-2]
        device = self.buffers[0].device
        for buffer, states in zip(self.buffers, (keys, values), strict=True):
            buffer[rows.to(device), :, self.length - width : self.length] = states[source.to(device)]


def _empty(like: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    # Zeros: a masked column still enters softmax(...) @ values with weight 0, and 0 * NaN is NaN.
    return like.new_zeros((rows, like.shape[1], columns, like.shape[3]))


def packable(config: Any, longest: int) -> bool:
    """Say whether every layer of a model attends to all of up to ``longest`` tokens.

    Layers with a shorter window, recurrent states or shared caches keep transformers' own cache.
    """
    try:
        layers = getattr(DynamicCache(config=config), "layers", None)
    except (TypeError, AttributeError, ValueError, KeyError):
        return False
    if not layers or getattr(config.get_text_config(), "attention_chunk_size", None):
        return False
    return all(
        type(layer) is DynamicLayer
        or (type(layer).__name__ == "DynamicSlidingWindowLayer" and layer.sliding_window >= longest)
        for layer in layers
    )


def padding_allowed(config: Any) -> bool:
    """Say whether prompts of different length may share a batch: recurrent states would see the padding."""
    layers = getattr(DynamicCache(config=config), "layers", None) or []
    return all(
        isinstance(layer, DynamicLayer) and "LinearAttention" not in type(layer).__name__ for layer in layers
    )


def packed_cache(config: Any) -> DynamicCache:
    """Return an empty cache of packed layers, as many as the model has."""
    cache = DynamicCache(config=config)
    layers: list[Any] = [PackedLayer() for _ in cache.layers]
    cache.layers = layers
    return cache
