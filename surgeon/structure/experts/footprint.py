"""How large a mixture of experts is, and what a cut leaves, from headers alone."""

from __future__ import annotations

import math

from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.dtypes import DTYPES
from surgeon.structure.experts.cut import ExpertCut
from surgeon.structure.experts.parts import ExpertLayer, Experts, ExpertTensor
from surgeon.structure.experts.view import ExpertView

_BESIDE = ("scale", "scales", "scale_inv", "zero", "qzeros", "zero_point", "g_idx", "weight_shape", "absmax")
"""What the names of tensors end in that hold no weights, but say how packed ones are read."""


def parameters_after(checkpoint: Checkpoint, experts: Experts, cut: ExpertCut) -> int:
    """Return the parameters of what a legal cut leaves, padding included.

    Packed experts count as the matrices they stand for; scales and zero points are none.
    """
    view = ExpertView(checkpoint, experts, cut)
    packed = {tensor.name for layer in experts.layers for tensor in layer.tensors if tensor.companion}
    stored = sum(
        info.elements for name, info in view.tensors.items() if view.source_names[name] not in packed
    )
    return stored + sum(_packed_parameters(checkpoint, experts, layer, cut) for layer in experts.layers)


def bytes_after(checkpoint: Checkpoint, experts: Experts, cut: ExpertCut) -> int:
    """Return the stored bytes of what a legal cut leaves."""
    return sum(info.nbytes for info in ExpertView(checkpoint, experts, cut).tensors.values())


def bytes_of_expert(checkpoint: Checkpoint, experts: Experts) -> int:
    """Return the stored bytes that go when every layer loses one expert: matrices, companions, router rows, biases.

    Layers that predict further tokens count; experts that differ in size within a layer count as their mean.
    """
    return sum(math.ceil(_bytes_of(checkpoint, layer) / layer.count) for layer in experts.layers)


def bytes_outside(checkpoint: Checkpoint, experts: Experts) -> int:
    """Return the stored bytes that no cut of experts changes: everything that does not move with an expert."""
    routed = sum(_bytes_of(checkpoint, layer) for layer in experts.layers)
    return sum(info.nbytes for info in checkpoint.tensors.values()) - routed


def _bytes_of(checkpoint: Checkpoint, layer: ExpertLayer) -> int:
    return sum(checkpoint.tensors[tensor.name].nbytes for tensor in layer.tensors)


def _packed_parameters(checkpoint: Checkpoint, experts: Experts, layer: ExpertLayer, cut: ExpertCut) -> int:
    """Return the parameters of a layer's experts that are stored in a coded form."""
    if layer.index in cut.without:
        return 0
    kept = cut.experts(layer.index, layer.count)
    matrices = 0
    for tensor in layer.tensors:
        if tensor.companion and _holds_weights(tensor):
            matrices += (2 if tensor.role == "gate_up" else 1) * (
                len(kept) if tensor.expert is None else tensor.expert in kept
            )
    widths = {len(cut.channels.get((layer.index, expert), range(experts.width))) for expert in kept}
    return matrices * _read_width(checkpoint, experts) * (cut.width or max(widths))


def _read_width(checkpoint: Checkpoint, experts: Experts) -> int:
    """Return the width of what experts read, which some families project down first."""
    config = checkpoint.config or {}
    section = config.get(experts.section, {}) if experts.section else config
    found = (section.get(key) for key in experts.record.counts.input)
    return next((width for width in found if isinstance(width, int)), experts.hidden)


def _holds_weights(tensor: ExpertTensor) -> bool:
    return tensor.role in ("gate", "up", "gate_up", "down") and not tensor.name.endswith(_BESIDE)


def matrix_types(checkpoint: Checkpoint, experts: Experts) -> frozenset[str]:
    """Return the storage types of the experts' matrices, such as {"BF16"}; packed ones are left out."""
    return frozenset(
        checkpoint.tensors[tensor.name].dtype
        for layer in experts.layers
        for tensor in layer.of("gate", "up", "gate_up", "down")
        if DTYPES[checkpoint.tensors[tensor.name].dtype].family == "float" and not tensor.companion
    )
