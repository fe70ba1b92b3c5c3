"""A model whose layers differ, seen at the sizes of the model it was cut from: what is missing is zero.

A head or channel of zeros adds nothing to the residual stream, so this computes the same, and everything that
runs stock models layer by layer (perplexity, divergence, calibration) runs these, too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from surgeon import architectures
from surgeon.architectures.block_configs import base_config
from surgeon.checkpoint.checkpoint import StoredCheckpoint
from surgeon.checkpoint.dtypes import DTYPES
from surgeon.checkpoint.header import TensorInfo
from surgeon.deploy import per_layer
from surgeon.errors import InputError, Where
from surgeon.structure.cut import LayerShape
from surgeon.structure.find import structure_of
from surgeon.structure.parts import Attention, Ffn, Section, Structure

Places = dict[int, np.ndarray]
"""Axis -> where its stored entries lie in the whole tensor."""


class ExpandedView:
    """A Checkpoint of the stock family, read from one with ``block_configs``.

    Args:
        checkpoint: the model whose layers differ.

    Raises:
        InputError: E324 block_configs are malformed; E327 the family has no per-layer shapes; E365 the tensors are
            not those of config.json.
    """

    def __init__(self, checkpoint: StoredCheckpoint) -> None:
        given = checkpoint.config or {}
        per_layer.family_of(given)
        self._inner = checkpoint
        self.config: dict[str, Any] | None = base_config(given)
        self.label, self.folder, self.headers = checkpoint.label, checkpoint.folder, checkpoint.headers
        self.identity = hashlib.sha256(f"expanded {getattr(checkpoint, 'identity', '')}".encode()).hexdigest()
        self.tensors = self._whole_tensors()
        structure = structure_of(self)
        self._places: dict[str, Places] = {}
        for number, shape in enumerate(per_layer.block_shapes(given)):
            self._place(structure, number, shape)
        self._check()

    def _whole_tensors(self) -> dict[str, TensorInfo]:
        config = self.config or {}
        record = architectures.get(config["model_type"])
        assert record is not None  # every per-layer family has one
        stored = self._inner.tensors
        layout = record.layout(config, stored)
        some = next(info for info in stored.values() if DTYPES[info.dtype].family == "float")
        found = {}
        for name, spec in layout.tensors.items():
            if (name not in stored and (spec.optional or spec.layer is None)) or spec.shape is None:
                continue
            like = replace(stored.get(name, some), name=name, shape=spec.shape)
            found[name] = replace(like, nbytes=like.elements * DTYPES[like.dtype].bits // 8)
        return found

    def _place(self, structure: Structure, number: int, shape: LayerShape) -> None:
        attention, ffn = structure.attention[number], structure.ffn[number]
        if attention is not None and shape.heads:
            each = shape.heads // shape.groups
            heads = [g * attention.per_group + h for g in range(shape.groups) for h in range(each)]
            for section in (*attention.queries, _output(attention)):
                self._add(section, heads)
            for section in attention.key_values:
                self._add(section, list(range(shape.groups)))
        if ffn is not None and shape.ffn:
            for section in (*ffn.inputs, _output(ffn)):
                self._add(section, list(range(shape.ffn)))

    def _add(self, section: Section, units: list[int]) -> None:
        each = section.length // section.units
        indices = (section.start + np.asarray(units)[:, None] * each + np.arange(each)).reshape(-1)
        axes = self._places.setdefault(section.tensor, {})
        known = axes.get(section.axis, np.empty(0, np.int64))
        axes[section.axis] = np.sort(np.concatenate([known, indices]))

    def _check(self) -> None:
        for name, info in self.tensors.items():
            stored = self._inner.tensors.get(name)
            if stored is None:
                continue
            axes = self._places.get(name, {})
            wanted = tuple(len(axes[n]) if n in axes else size for n, size in enumerate(info.shape))
            if stored.shape != wanted:
                raise InputError("E365", f"{name} of {self.label} has shape {list(stored.shape)}, by block_configs it is {list(wanted)}",
                                 where=Where(self.label, tensor=name), help="surgeon verify shows every disagreement")  # fmt: skip

    def close(self) -> None:
        """Close the files."""
        self._inner.close()

    def computed(self, name: str) -> bool:
        """Say whether values are spread out or zero, so that a byte copy is impossible."""
        return name not in self._inner.tensors or self._inner.tensors[name].shape != self.tensors[name].shape

    def granularity(self, name: str) -> int:
        """Elements that are cheapest to read together: a spread tensor is read as a whole."""
        return self.tensors[name].elements if self.computed(name) else self._inner.granularity(name)

    def read_bytes(self, name: str, start: int, stop: int) -> np.ndarray:
        if self.computed(name):
            raise AssertionError(f"{name} is spread out; it has no stored bytes")
        return self._inner.read_bytes(name, start, stop)

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return elements [start, stop) of the whole tensor, zeros where nothing is stored."""
        if not self.computed(name):
            return self._inner.read(name, start, stop)
        info = self.tensors[name]
        carrier = DTYPES[info.dtype].carrier
        if name not in self._inner.tensors:  # a part that is gone: its norm may be anything finite
            return np.zeros(stop - start, dtype=carrier)
        stored = self._inner.tensors[name]
        whole = np.zeros(info.shape, dtype=carrier)
        values = self._inner.read(name, 0, stored.elements).reshape(stored.shape)
        whole[np.ix_(*self._indices(name, info))] = values
        return whole.reshape(-1)[start:stop]

    def _indices(self, name: str, info: TensorInfo) -> Iterator[np.ndarray]:
        axes = self._places.get(name, {})
        for number, size in enumerate(info.shape):
            yield axes.get(number, np.arange(size))


def _output(part: Attention | Ffn) -> Section:
    """Return the inputs of an output matrix, one unit a head or channel."""
    units, size = (part.heads, part.head_dim) if isinstance(part, Attention) else (part.width, 1)
    return Section(part.output.weight, part.output.input_axis, 0, units * size, units)
