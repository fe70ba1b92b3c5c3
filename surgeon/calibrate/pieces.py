"""Which checkpoint tensors make each parameter of a model.

A library's model and a checkpoint name and stack things differently: experts lie one by one in the
files and stacked in memory, routers have other names. The renaming and stacking rules are the
library's own (`transformers.conversion_mapping`), read here as data: each parameter becomes a list
of pieces, and a piece is one tensor of the checkpoint, or one expert's part of a stacked one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.dtypes import DTYPES
from surgeon.checkpoint.header import printable
from surgeon.errors import InputError, Where
from surgeon.kernels.cast import widen

Index = tuple[Any, ...]
"""Integers and slices, as in ``tensor[index]``; () is the whole tensor."""

READ_ELEMENTS = 1 << 24
"""Elements read at once from a checkpoint, so that a view that computes in float32 never doubles a layer."""


@dataclass(frozen=True)
class Piece:
    """A part of a model parameter and the place in the checkpoint it comes from.

    Attributes:
        name: the name it is observed and reported under: the checkpoint's, per expert for experts
            ("model.layers.3.mlp.experts.5.up_proj.weight") whatever the storage.
        tensor: the checkpoint tensor that holds it.
        index: its place in the parameter: ``parameter[index]`` has the piece's shape and order.
        stored: its place in ``tensor``; () when it is all of it.
        expert: the expert's number, None for other parts.
    """

    name: str
    tensor: str
    index: Index = ()
    stored: Index = ()
    expert: int | None = None

    @property
    def module(self) -> str:
        """The name without ".weight", as observers see it."""
        return self.name.removesuffix(".weight")


def is_experts(module: nn.Module) -> bool:
    """Say whether a module holds stacked experts that run through a registered function."""
    return (
        hasattr(module, "is_concatenated") and hasattr(module, "has_gate") and hasattr(module, "num_experts")
    )


def resolve(model: Any, checkpoint: Checkpoint) -> dict[str, list[Piece]]:
    """Return, for every parameter and stored buffer of a model, the pieces that make it.

    Args:
        model: a transformers model, usually without data (on the meta device).
        checkpoint: where the tensors are.

    Returns:
        The name in ``model.state_dict()`` -> its pieces. Names the checkpoint lacks are absent.

    Raises:
        InputError: E382 an expert is missing, or a shape does not fit.
    """
    wanted = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    found: dict[str, list[Piece]] = {}
    stacked: dict[str, dict[int, dict[int, str]]] = {}  # parameter -> source -> expert -> tensor
    joined: dict[str, dict[int, str]] = {}  # parameter -> source -> tensor
    for name in sorted(checkpoint.tensors):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, wanted)
        if target not in wanted:
            continue
        if pattern is None:
            found[target] = [Piece(name, name)]
            continue
        order = _order(converters, pattern, [(Concatenate, 0)])
        if order is not None:
            joined.setdefault(target, {})[order] = name
            continue
        order = _order(converters, pattern, *STACKING)
        expert = _expert_number(name)
        if order is None or expert is None:
            raise InputError("E382", f"the library converts {printable(name)} in a way that is not known here",
                             where=Where(tensor=printable(name)), help="a newer surgeon may know it: pip install --upgrade model-surgeon; methods without calibration do not need it")  # fmt: skip
        stacked.setdefault(target, {}).setdefault(order, {})[expert] = name
    for target, parts in joined.items():
        found[target] = _join(target, parts, wanted[target].shape, checkpoint)
    for target, sources in stacked.items():
        found[target] = _stack(target, sources, wanted[target].shape, checkpoint)
    _split_fused(model, found)
    _check_shapes(found, wanted, checkpoint)
    _add_ties(model, found, wanted)
    return found


STACKING = ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])
"""Operations that stack experts, with or without gate and up in one."""


def _order(converters: Iterable[WeightConverter], pattern: str, *known: list) -> int | None:
    """Return which part of a parameter made by ``known`` operations a source pattern is; None for other conversions."""
    for converter in converters:
        if pattern not in converter.source_patterns:
            continue
        kinds = [(type(operation), getattr(operation, "dim", None)) for operation in converter.operations]
        if kinds in known:
            return converter.source_patterns.index(pattern)
        return None
    return None


def _join(target: str, sources: Mapping[int, str], shape: torch.Size, checkpoint: Checkpoint) -> list[Piece]:
    """Return the pieces of a parameter made of several tensors behind each other along its first axis."""
    pieces, row = [], 0
    for order in sorted(sources):
        rows = checkpoint.tensors[sources[order]].shape[0]
        pieces.append(Piece(sources[order], sources[order], (slice(row, row + rows),)))
        row += rows
    if row != shape[0]:
        raise InputError("E382", f"{checkpoint.label} has {row} of {shape[0]} rows for {printable(target)}",
                         where=Where(tensor=printable(target)),
                         help="the checkpoint is incomplete, or config.json does not fit the weights")  # fmt: skip
    return pieces


def _expert_number(name: str) -> int | None:
    numbers = re.findall(r"\.experts\.(\d{1,6})\.", name)
    return int(numbers[0]) if len(numbers) == 1 else None


def _stack(
    target: str, sources: Mapping[int, Mapping[int, str]], shape: torch.Size, checkpoint: Checkpoint
) -> list[Piece]:
    """Return the pieces of a stacked parameter [experts, rows, columns] in order."""
    pieces = []
    for expert in range(shape[0]):
        row = 0
        for order in sorted(sources):
            name = sources[order].get(expert)
            if name is None:
                raise InputError("E382", f"{checkpoint.label} has no expert {expert} for {target}",
                                 where=Where(tensor=target),
                                 help="the checkpoint is incomplete, or config.json sets another number of experts")  # fmt: skip
            rows = checkpoint.tensors[name].shape[0]
            whole = len(sources) == 1
            pieces.append(
                Piece(name, name, (expert,) if whole else (expert, slice(row, row + rows)), (), expert)
            )
            row += rows
    return pieces


def _split_fused(model: nn.Module, found: dict[str, list[Piece]]) -> None:
    """Split tensors stored with all experts in one into the pieces of single experts, under names per expert."""
    for path, module in model.named_modules():
        if not is_experts(module):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            pieces = found.get(f"{path}.{name}")
            if pieces is None or len(pieces) != 1 or pieces[0].expert is not None:
                continue
            tensor = pieces[0].tensor
            inside = re.match(r"(.*\.experts)\.", tensor)
            container = inside[1] if inside else tensor.split("_linear")[0].rsplit(".", 1)[0] + ".experts"
            found[f"{path}.{name}"] = [
                Piece(f"{container}.{expert}.{part}", tensor, (expert, *place), (expert, *place), expert)
                for expert in range(parameter.shape[0])
                for part, place in _parts(module, name, parameter)
            ]


def _parts(module: Any, name: str, parameter: Tensor) -> list[tuple[str, Index]]:
    """Return the projections inside one expert's slice of a stacked parameter, as (name, index)."""
    ending = "bias" if name.endswith("_bias") else "weight"
    kind = name.removesuffix("_bias")
    if kind != "gate_up_proj":
        return [(f"{kind}.{ending}", ())]
    axis = 1 if module.is_transposed and ending == "weight" else 0  # of the expert's own slice
    width = parameter.shape[1 + axis]
    if _interleaved(module):
        ranges = [slice(0, width, 2), slice(1, width, 2)]
    else:
        ranges = [slice(0, width // 2), slice(width // 2, width)]
    return [
        (f"{part}.{ending}", (slice(None),) * axis + (place,))
        for part, place in zip(("gate_proj", "up_proj"), ranges, strict=True)
    ]


def _interleaved(module: Any) -> bool:
    """Say whether gate and up channels alternate, found by asking the module's own gate function.

    Of four channels (0, 0, 1, 1), halves make two equal outputs (gate 0, up 1), alternation two
    different ones (gate and up 0, gate and up 1). A flag could be wrong without any error.
    """
    outputs = module._apply_gate(torch.tensor([[0.0, 0.0, 1.0, 1.0]]))[0]
    return bool(outputs[0] != outputs[1])


def _check_shapes(
    found: Mapping[str, list[Piece]], wanted: Mapping[str, Tensor], checkpoint: Checkpoint
) -> None:
    for target, pieces in found.items():
        empty = torch.empty(wanted[target].shape, device="meta")
        for piece in pieces:
            info = checkpoint.tensors[piece.tensor]
            place = tuple(empty[piece.index].shape) if piece.index else tuple(empty.shape)
            stored = tuple(info.shape)
            if piece.stored:
                fits = stored == tuple(empty.shape)
            else:
                fits = stored == place
            if not fits:
                raise InputError(
                    "E382", f"{printable(piece.tensor)} has shape {list(stored)}, the model has {list(place)}",
                    where=Where(tensor=printable(piece.tensor)), help="config.json does not fit the weights",
                )  # fmt: skip
            if DTYPES[info.dtype].family != "float":
                raise InputError(
                    "E382", f"{printable(piece.tensor)} is stored as {info.dtype}, which is not a plain number type",
                    where=Where(tensor=printable(piece.tensor)), help="quantized models must be dequantized first",
                )  # fmt: skip


def _add_ties(model: Any, found: dict[str, list[Piece]], wanted: Mapping[str, Tensor]) -> None:
    """Give tied parameters the pieces of the one that is stored."""
    for target, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        if source in found and target in wanted:
            found[target] = found[source]
        elif target in found and source in wanted:
            found[source] = found[target]


def read_tensor(checkpoint: Checkpoint, name: str, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Return elements [start, stop) of a flattened checkpoint tensor in ``dtype``, 1-D, on the CPU."""
    code = checkpoint.tensors[name].dtype
    if stop - start <= READ_ELEMENTS:
        return _as_torch(checkpoint.read(name, start, stop), code).to(dtype)
    out = torch.empty(stop - start, dtype=dtype)
    step = checkpoint.granularity(name)
    block = max(step, READ_ELEMENTS // step * step)
    for place in range(start, stop, block):
        end = min(place + block, stop)
        out[place - start : end - start] = _as_torch(checkpoint.read(name, place, end), code)
    return out


def _as_torch(raw: np.ndarray, code: str) -> Tensor:
    """Return raw carrier values as the torch tensor they stand for, without copying."""
    if code == "BF16" and raw.dtype == np.uint16:
        return torch.from_numpy(raw.view(np.int16)).view(torch.bfloat16)
    if raw.dtype in (np.float16, np.float32, np.float64):
        return torch.from_numpy(raw if raw.flags.writeable else raw.copy())
    return torch.from_numpy(np.ascontiguousarray(widen(raw, code), dtype=np.float32))


def load_parameter(
    checkpoint: Checkpoint, pieces: list[Piece], shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """Return a whole parameter, assembled from its pieces."""
    first = pieces[0]
    if not first.index or all(piece.stored and piece.tensor == first.tensor for piece in pieces):
        info = checkpoint.tensors[first.tensor]
        return read_tensor(checkpoint, first.tensor, 0, info.elements, dtype).reshape(shape)
    out = torch.empty(shape, dtype=dtype)
    for piece in pieces:
        out[piece.index] = load_piece(checkpoint, piece, dtype)
    return out


def load_piece(checkpoint: Checkpoint, piece: Piece, dtype: torch.dtype) -> Tensor:
    """Return one piece in the parameter's own order; of a stacked tensor only its expert is read."""
    info = checkpoint.tensors[piece.tensor]
    if not piece.stored:
        return read_tensor(checkpoint, piece.tensor, 0, info.elements, dtype).reshape(info.shape)
    each = info.elements // info.shape[0]
    expert = piece.stored[0]
    row = read_tensor(checkpoint, piece.tensor, expert * each, (expert + 1) * each, dtype)
    inner = piece.stored[1:]
    return row.reshape(info.shape[1:])[inner] if inner else row.reshape(info.shape[1:])


def load_expert(
    checkpoint: Checkpoint, pieces: list[Piece], shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """Return one expert's slice of a stacked parameter from the pieces of that expert."""
    first = pieces[0]
    if first.stored:  # stacked in the file too: one range holds all of the expert's pieces
        return load_piece(checkpoint, Piece("", first.tensor, (), first.stored[:1], first.expert), dtype)
    if len(pieces) == 1:
        return load_piece(checkpoint, first, dtype)
    out = torch.empty(shape, dtype=dtype)
    for piece in pieces:
        out[piece.index[1:]] = load_piece(checkpoint, piece, dtype)
    return out
