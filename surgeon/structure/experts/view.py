"""The model a cut of experts leaves, as a Checkpoint that is read from the source in stored bytes.

Experts that stay are numbered anew in ascending order; everything that belongs to an expert moves with it: matrices,
biases, scales and zero points of quantized ones, router rows, biases of the router and of the choice. What is only
renamed or sliced is never decoded, so any storage type can be cut, and nothing changes its precision.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.dtypes import DTYPES
from surgeon.checkpoint.header import TensorInfo, printable
from surgeon.errors import InputError, Where
from surgeon.kernels.cast import widen
from surgeon.structure.experts.check import BLOCK, check, stored_width
from surgeon.structure.experts.config import pruned_config
from surgeon.structure.experts.cut import ExpertCut
from surgeon.structure.experts.factors import factor_on, takes_factor
from surgeon.structure.experts.parts import ExpertLayer, Experts, ExpertTensor
from surgeon.structure.experts.replacements import Replacements
from surgeon.structure.experts.shared import shared_axis, shared_count, shared_widths
from surgeon.structure.experts.slices import (
    Part,
    Piece,
    Row,
    Whole,
    narrowed,
    selected,
)

Shape = tuple[int, ...]


class ExpertView:
    """A Checkpoint of the model that a cut of experts leaves.

    Args:
        checkpoint: the source.
        experts: its experts (`surgeon.structure.experts.find.experts_of`).
        cut: what stays, by the source's numbers.
        replaced: tensors under the source's names and of its shapes that take the place of the source's, before
            anything is sliced. One expert's part of a tensor that holds all of them, such as a router row, is
            called "NAME#EXPERT" and has the tensor's shape without that axis.

    Attributes:
        config: the source's config.json with the new sizes.
        tensors: name -> TensorInfo of the result.
        source_names: name -> the source's name of it.
        notes: sentences on what changes beside the cut.

    Raises:
        UsageError, InputError: as `surgeon.structure.experts.check.check` and `.config.pruned_config`; E425 a factor
            that the storage cannot hold, E427 replacements that do not fit.
    """

    def __init__(
        self, checkpoint: Checkpoint, experts: Experts, cut: ExpertCut, replaced: Checkpoint | None = None
    ) -> None:
        config = checkpoint.config
        assert config is not None  # experts_of refuses a model without one
        self._block = _block_size(config, experts)
        check(experts, cut, block=self._block)
        self.source, self.experts, self.cut = checkpoint, experts, cut
        self._replaced = Replacements(replaced, checkpoint, experts)
        self.label, self.folder = checkpoint.label, checkpoint.folder
        self.adapter_folder = getattr(checkpoint, "adapter_folder", None)
        self.headers = (
            *checkpoint.headers,
            *(h for h in self._replaced.headers if h not in checkpoint.headers),
        )
        self.notes: list[str] = []
        self._width = stored_width(experts, cut)
        self._shared = shared_count(checkpoint, experts, cut)
        self.config: dict[str, Any] | None = pruned_config(
            config, experts, cut, self._shared.number if self._shared else None
        )
        self.tensors: dict[str, TensorInfo] = {}
        self.source_names: dict[str, str] = {}
        self._rows: dict[str, Row] = {}
        self._computed: set[str] = set()
        self._build()

    # ---- what becomes of every tensor -------------------------------------------------------------

    def _build(self) -> None:
        owners = {tensor.name: (layer, tensor) for layer in self.experts.layers for tensor in layer.tensors}
        shared = self._padded_shared()
        gone = tuple(self._gone())
        for name, info in self.source.tensors.items():
            if name.startswith(gone):
                continue
            renamed: str | None = name
            made: tuple[list[Part], Shape] | None = None
            if name in owners:
                renamed = self._renamed(*owners[name])
                if renamed is None:
                    continue
                made = self._parts(*owners[name], info)
            elif name in shared:
                made = [shared[name]], shared[name].piece.shape
            elif self._replaced.key(name):
                made = [Part(Whole(info.shape), replacement=name)], info.shape
            self._add(renamed, name, info, made)
        if self._shared is not None:
            self.notes.append(self._shared.note(self._width))

    def _add(self, renamed: str, name: str, info: TensorInfo, made: tuple[list[Part], Shape] | None) -> None:
        self.source_names[renamed] = name
        info = replace(info, name=renamed)
        if made is None or (len(made[0]) == 1 and made[0][0].untouched):
            self.tensors[renamed] = info
            return
        parts, shape = made
        if any(part.factor != 1.0 or self._replaced.converted(name, part.replacement) for part in parts):
            self._computed.add(renamed)
        self._rows[renamed] = Row(parts)
        info = replace(info, shape=shape)
        self.tensors[renamed] = replace(info, nbytes=info.elements * DTYPES[info.dtype].bits // 8)

    def _gone(self) -> list[str]:
        """Return what the names of all tensors start with that are left out with the layers they belong to."""
        record = self.experts.record
        found = []
        for layer in self.experts.layers:
            if layer.index in self.cut.without:
                own = [pattern for pattern in record.extra.layers if _layer_prefix(layer, [pattern])]
                # A stack of its own ("mtp.layers.0.") goes with the norms and projections beside it.
                found.append(own[0].partition(".")[0] + "." if own else _layer_prefix(layer, record.layers))
        return list(filter(None, found))

    def _renamed(self, layer: ExpertLayer, tensor: ExpertTensor) -> str | None:
        """Return a tensor's name in the result, None for one of an expert that is dropped."""
        if tensor.expert is None:
            return tensor.name
        kept = self.cut.experts(layer.index, layer.count)
        if tensor.expert not in kept:
            return None
        words = tensor.name[len(layer.prefix) :].split(".")
        places = [place for place, word in enumerate(words) if word == str(tensor.expert)]
        behind = [place for place in places if place and "expert" in words[place - 1]] or places
        words[behind[0]] = str(kept.index(tensor.expert))
        return layer.prefix + ".".join(words)

    def _parts(
        self, layer: ExpertLayer, tensor: ExpertTensor, info: TensorInfo
    ) -> tuple[list[Part], Shape] | None:
        """Return the parts of a tensor of experts and its new shape, None when its bytes are passed on."""
        if tensor.expert is not None:
            part = self._part(layer, tensor, tensor.expert, info.shape, 0, info)
            return [part], part.piece.shape
        kept = self.cut.experts(layer.index, layer.count)
        axis = tensor.expert_axis
        assert axis is not None
        if any(self._own(layer, tensor, expert, info) for expert in kept) and self._stretches(info, axis):
            shape = info.shape[axis + 1 :]
            each = math.prod(shape)
            parts = [self._part(layer, tensor, expert, shape, expert * each, info) for expert in kept]
            return parts, (*info.shape[:axis], len(kept), *parts[0].piece.shape)
        whole = self._replaced.key(tensor.name)
        if len(kept) == layer.count and whole is None:
            return None
        piece = selected(_readable_shape(info, axis), axis, np.asarray(kept))
        return [Part(piece, replacement=whole)], (*info.shape[:axis], len(kept), *info.shape[axis + 1 :])

    def _stretches(self, info: TensorInfo, axis: int) -> bool:
        """Say whether each expert's part of a tensor is one stretch of it."""
        if all(size == 1 for size in info.shape[:axis]):
            return True
        raise InputError(
            "E404", f"{printable(info.name)} of shape {list(info.shape)} has its experts along axis {axis}, so only whole experts can go",
            where=Where(self.label, tensor=printable(info.name)), help="drop whole experts of this model",
        )  # fmt: skip

    def _own(self, layer: ExpertLayer, tensor: ExpertTensor, expert: int, info: TensorInfo) -> bool:
        """Say whether one expert's slice of a stack is more than picked out."""
        place = (layer.index, expert)
        return (
            self._replaced.key(tensor.name, expert) is not None
            or self._narrows(layer, tensor, expert, info)
            or (place in self.cut.scales and takes_factor(layer, tensor, expert))
        )

    def _part(
        self, layer: ExpertLayer, tensor: ExpertTensor, expert: int, shape: Shape, offset: int, info: TensorInfo
    ) -> Part:  # fmt: skip
        """Return one expert's part of a tensor: its channels, its factor, its replacement."""
        piece: Piece = Whole(shape)
        axis = self._channel_axis(layer, tensor, info)
        if axis is not None and self._narrows(layer, tensor, expert, info):
            piece = self._narrowed(
                layer, tensor, expert, shape, axis if tensor.expert_axis is None else axis - 1
            )
        whole = self._replaced.key(tensor.name)
        own = whole if tensor.expert_axis is None else self._replaced.key(tensor.name, expert)
        factor, change = 1.0, None
        if (layer.index, expert) in self.cut.scales and takes_factor(layer, tensor, expert):
            as_numbers = self._replaced.converted(tensor.name, own or whole)
            beta = self.cut.scales[layer.index, expert]
            factor, change = factor_on(layer, tensor, beta, info.dtype, as_numbers=as_numbers)
        return Part(piece, 0 if own else offset, factor, change, own or whole)

    def _narrows(self, layer: ExpertLayer, tensor: ExpertTensor, expert: int, info: TensorInfo) -> bool:
        """Say whether an expert loses channels of a tensor, or is padded."""
        channels = self.cut.channels.get((layer.index, expert))
        whole = channels is None or len(channels) == self.experts.width
        if whole and self._width == self.experts.width:
            return False
        return self._channel_axis(layer, tensor, info) is not None

    def _channel_axis(self, layer: ExpertLayer, tensor: ExpertTensor, info: TensorInfo) -> int | None:
        """Return the axis of channels or, for the scales of FP8 blocks, of blocks of them."""
        if tensor.channel_axis is not None or not tensor.companion or layer.quantized != "fp8":
            return tensor.channel_axis
        if tensor.expert is not None:
            return None if len(info.shape) != 2 else int(tensor.role == "down")
        if len(info.shape) != 3:
            return None  # one scale for an expert
        return next((t.channel_axis for t in layer.of(tensor.role) if t.channel_axis is not None), None)

    def _narrowed(self, layer: ExpertLayer, tensor: ExpertTensor, expert: int, shape: Shape, axis: int) -> Piece:  # fmt: skip
        channels = self.cut.channels.get((layer.index, expert))
        kept = np.arange(self.experts.width) if channels is None else np.asarray(channels, dtype=np.int64)
        stored, width = self.experts.width, self._width
        halves = 1 if tensor.order == "plain" else 2
        if shape[axis] == halves * stored:
            return narrowed(shape, axis, kept, stored, width, tensor.order)
        blocks = -(-stored // self._block)
        if (
            layer.quantized != "fp8"
            or shape[axis] != halves * blocks
            or (halves == 2 and stored % self._block)
        ):
            raise InputError(
                "E404", f"{printable(tensor.name)} of shape {list(shape)} does not fit experts of {stored} channels in blocks of {self._block}",
                where=Where(self.label, tensor=printable(tensor.name)), help="drop whole experts of this model",
            )  # fmt: skip
        return narrowed(
            shape, axis, np.unique(kept // self._block), blocks, -(-width // self._block), tensor.order
        )

    # ---- shared experts -----------------------------------------------------------------------------

    def _padded_shared(self) -> dict[str, Part]:
        """Return the shared experts' tensors that grow, as parts padded with zeros."""
        if self._shared is None:
            return {}
        found = {}
        for layer in self.experts.layers:
            for name, size in shared_widths(self.source, layer).items():
                axis, shape = shared_axis(name), self.source.tensors[name].shape
                if size != self._shared.width and layer.index not in self.cut.without:
                    assert axis is not None
                    piece = narrowed(shape, axis, np.arange(size), size, self._shared.width, "plain")
                    found[name] = Part(piece, replacement=self._replaced.key(name))
        return found

    # ---- reading --------------------------------------------------------------------------------------

    @cached_property
    def identity(self) -> str:
        """Digest of the cut and of the replacements, for the id of a plan."""
        digest = hashlib.sha256(b"expert view 1\0")
        digest.update(f"{getattr(self.source, 'identity', '')}\0{self.cut.identity()}\0".encode())
        digest.update(self._replaced.content())
        return digest.hexdigest()

    def computed(self, name: str) -> bool:
        """Say whether values are computed, so that a byte copy is impossible."""
        return name in self._computed or self._replaced.converted(self.source_names[name], None)

    def stored_dtype(self, name: str) -> str:
        """Return the storage type a tensor is written in."""
        source = self.source_names[name]
        inner = getattr(self.source, "stored_dtype", None)
        return self.tensors[name].dtype if inner is None else inner(source)

    def granularity(self, name: str) -> int:
        """Elements that are cheapest to read together: one row of a sliced tensor."""
        row, inner = self._rows.get(name), self.source.granularity(self.source_names[name])
        return inner if row is None else row.granularity

    def memory(self, name: str) -> int:
        """Return the bytes held beside the blocks while a tensor is worked on."""
        inner = getattr(self.source, "memory", None)
        return 0 if inner is None else inner(self.source_names[name])

    def kept_bytes(self, name: str) -> int:
        """Return the bytes that stay in memory after a tensor was read."""
        inner = getattr(self.source, "kept_bytes", None)
        return 0 if inner is None else inner(self.source_names[name])

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return elements [start, stop) of the flattened tensor: stored bits, or float32 (float64) where computed."""
        source = self.source_names[name]
        row = self._rows.get(name)
        if row is None:
            return self.source.read(source, start, stop)
        if DTYPES[self.tensors[name].dtype].carrier is None:
            return self.source.read(source, 0, 0)  # refuses: such values cannot be read one by one
        return row.read(
            lambda part, first, end: self._values(source, part, first, end, name in self._computed),
            start,
            stop,
        )

    def read_bytes(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return stored bytes [start, stop) of a tensor that is renamed, sliced, padded or exactly multiplied."""
        if self.computed(name):
            raise AssertionError(f"{name} is computed; it has no stored bytes")
        source = self.source_names[name]
        row = self._rows.get(name)
        if row is None:
            return self.source.read_bytes(source, start, stop)
        carrier = DTYPES[self.tensors[name].dtype].carrier
        size = 1 if carrier is None else carrier.itemsize
        first, end = start // size, -(-stop // size)
        found = row.read(
            lambda part, a, b: self._values(source, part, a, b, False, raw=carrier is None), first, end
        )
        return np.ascontiguousarray(found).view(np.uint8)[start - first * size : stop - first * size]

    def _values(
        self, source: str, part: Part, start: int, stop: int, computed: bool, raw: bool = False
    ) -> np.ndarray:
        """Return a range of one part: stored bits, or numbers when the tensor is computed."""
        whole: Any = self.source
        name, offset = source, part.offset
        if part.replacement is not None:
            whole, name = self._replaced.checkpoint, part.replacement
        reader = whole.read_bytes if raw else whole.read
        found = part.piece.read(lambda first, end: reader(name, offset + first, offset + end), start, stop)
        if part.change is not None:
            found = part.change(found)
        if not computed:
            return found
        values = widen(found, whole.tensors[name].dtype)
        wide = np.float64 if self.source.tensors[source].dtype == "F64" else np.float32
        values = values.astype(wide, copy=False)
        return values if part.factor == 1.0 else values * values.dtype.type(part.factor)


def _readable_shape(info: TensorInfo, axis: int) -> Shape:
    """Return a tensor's shape in units that can be read: elements, or bytes of types below one byte."""
    if DTYPES[info.dtype].carrier is not None:
        return info.shape
    assert axis == 0, "types below one byte are only stacked along the first axis"
    return (info.shape[0], info.nbytes // info.shape[0])


def _layer_prefix(layer: ExpertLayer, patterns: Iterable[str]) -> str:
    """Return what all names of a layer start with, such as "model.layers.61."; empty when no pattern fits."""
    found = [re.match(re.escape(p).replace(r"\{layer\}", r"\d+"), layer.prefix) for p in patterns]
    return max((match[0] for match in found if match), key=len, default="")


def _block_size(config: Mapping[str, Any], experts: Experts) -> int:
    """Return how many channels share a scale in block-quantized FP8."""
    for section in (config, config.get(experts.section)):
        entry = section.get("quantization_config") if isinstance(section, Mapping) else None
        size = entry.get("weight_block_size") if isinstance(entry, Mapping) else None
        if isinstance(size, list) and size and isinstance(size[0], int) and size[0] > 0:
            return size[0]
    return BLOCK
