"""Where every tensor of an output lies: shards, headers and offsets, from the plan alone.

A safetensors file is 8 bytes header length, JSON padded to a multiple of 8, then the data.
Tensors are ordered by element width (widest first) and then by name, as the official library
writes them, so that a single-shard result equals its bytes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from surgeon.checkpoint.index import SINGLE_NAME
from surgeon.plan import OutputTensor

METADATA = {"format": "pt"}

# The official writer orders by its own type enum, widest last in the enum and written first.
_OFFICIAL_ORDER = [
    "BOOL", "F4", "F6_E2M3", "F6_E3M2", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ",
    "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "C64", "F64", "I64", "U64",
]  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Absolute position of one tensor's data in a shard."""

    shard: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Shard:
    """One weight file: name, finished header bytes, total size."""

    name: str
    header: bytes
    size: int
    tensors: tuple[OutputTensor, ...]


@dataclass(frozen=True)
class Layout:
    """All weight files of one output model."""

    shards: tuple[Shard, ...]
    places: dict[str, Place]
    index: bytes | None


def _order(tensor: OutputTensor) -> tuple:
    return (-_OFFICIAL_ORDER.index(tensor.dtype), tensor.name)


def lay_out(tensors: list[OutputTensor], max_shard_bytes: int, file_name: str | None = None) -> Layout:
    """Distribute tensors over shards and compute headers and offsets.

    Args:
        tensors: all tensors of one output model in plan order, which fills the shards in turn;
            names must be unique.
        max_shard_bytes: limit per shard; a larger tensor gets a shard of its own.
        file_name: write one unsharded file of this name (bare-file merges).
    """
    groups: list[list[OutputTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if file_name is None and groups[-1] and size + tensor.nbytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    shards: list[Shard] = []
    places: dict[str, Place] = {}
    for number, group in enumerate(groups):
        if file_name is not None:
            name = file_name
        elif len(groups) == 1:
            name = SINGLE_NAME
        else:
            name = f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        ordered = sorted(group, key=_order)
        header, start = _header(ordered)
        position = start
        for tensor in ordered:
            places[tensor.name] = Place(number, position, tensor.nbytes)
            position += tensor.nbytes
        shards.append(Shard(name, header, position, tuple(ordered)))
    index = None
    if len(shards) > 1:
        total = sum(t.nbytes for t in tensors)
        parameters = sum(t.elements for t in tensors)
        weight_map = {name: shards[places[name].shard].name for name in sorted(places)}
        body = {"metadata": {"total_parameters": parameters, "total_size": total}, "weight_map": weight_map}
        index = (json.dumps(body, indent=2) + "\n").encode()
    return Layout(tuple(shards), places, index)


def _header(ordered: list[OutputTensor]) -> tuple[bytes, int]:
    entries: dict[str, Any] = {"__metadata__": METADATA}
    position = 0
    for tensor in ordered:
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.nbytes],
        }
        position += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, 8 + len(text)
