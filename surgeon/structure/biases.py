"""Giving a model biases that it lacks, where its family can have them.

A removed channel that is nearly constant is made good by a bias of the output matrix. A class has one switch
for a whole set of biases (Llama's attention_bias: q, k, v and o in every layer), so the others come as zeros.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.dtypes import DTYPES
from surgeon.checkpoint.header import TensorInfo, printable
from surgeon.errors import InputError, Where
from surgeon.structure.find import record_of, structure_of
from surgeon.structure.parts import Structure

SWITCHES = ("attention_bias", "mlp_bias")
"""Keys of configurations that give a model biases."""


class ZeroBiases:
    """A Checkpoint with further biases, all zero, and the switch in its configuration that asks for them."""

    def __init__(
        self, checkpoint: Checkpoint, added: Mapping[str, TensorInfo], config: dict[str, Any]
    ) -> None:
        self._inner = checkpoint
        self._added = dict(added)
        self.label = checkpoint.label
        self.folder = checkpoint.folder
        self.headers = checkpoint.headers
        self.adapter_folder = getattr(checkpoint, "adapter_folder", None)
        self.config: dict[str, Any] | None = config
        self.tensors = {**checkpoint.tensors, **self._added}
        inner = getattr(checkpoint, "identity", "")
        self.identity = hashlib.sha256(f"{inner}\0{sorted(self._added)}".encode()).hexdigest()

    def computed(self, name: str) -> bool:
        """Say whether values are computed, so that a byte copy is impossible."""
        inner = getattr(self._inner, "computed", None)
        return name in self._added or (inner is not None and inner(name))

    def granularity(self, name: str) -> int:
        return 1 if name in self._added else self._inner.granularity(name)

    def read_bytes(self, name: str, start: int, stop: int) -> np.ndarray:
        if self.computed(name):
            raise AssertionError(f"{name} is computed; it has no stored bytes")
        return self._inner.read_bytes(name, start, stop)

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        if name in self._added:
            return np.zeros(stop - start, dtype=DTYPES[self._added[name].dtype].carrier)
        return self._inner.read(name, start, stop)


def with_biases(
    checkpoint: Checkpoint, structure: Structure, names: Collection[str]
) -> tuple[Checkpoint, Structure]:
    """Return the checkpoint with the biases among ``names`` that it lacks, as zeros, and its structure.

    Args:
        checkpoint: the source.
        structure: of the source.
        names: names under which values will be given; only absent ones that end in ".bias" matter.

    Raises:
        InputError: E369 the family's class has no such bias.
    """
    missing = [name for name in names if name.endswith(".bias") and name not in checkpoint.tensors]
    if not missing:
        return checkpoint, structure
    record, layout = record_of(checkpoint)
    assert checkpoint.config is not None
    config = dict(checkpoint.config)
    wanted = layout.tensors
    for switch in SWITCHES:
        asked = {**config, switch: True}
        found = next(one for one in record.layouts(asked) if (one.prefix, one.storage) == (layout.prefix, layout.storage))  # fmt: skip
        if any(name in found.tensors and name not in wanted for name in missing):
            config, wanted = asked, found.tensors
    unknown = [name for name in missing if name not in wanted]
    if unknown:
        raise InputError(
            "E369", f"the solved weights hold {printable(unknown[0])}, but a {record.model_type} model has no such bias",
            where=Where(checkpoint.label, tensor=printable(unknown[0])), help="solve without a bias",
        )  # fmt: skip
    added = {}
    for name, spec in wanted.items():
        if name in checkpoint.tensors or name in layout.tensors or spec.optional:
            continue
        weight = checkpoint.tensors[name.removesuffix(".bias") + ".weight"]
        assert spec.shape is not None
        size = spec.shape[0] * DTYPES[weight.dtype].bits // 8
        added[name] = replace(weight, name=name, shape=spec.shape, nbytes=size)
    extended = ZeroBiases(checkpoint, added, config)
    return extended, structure_of(extended)
