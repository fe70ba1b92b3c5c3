"""Shared experts whose width hangs on the width of the routed ones.

Several families give their shared experts n times the width of one routed expert (n_shared_experts *
moe_intermediate_size). Narrower routed experts then need another n, and where no n fits, shared experts padded with
zeros up to one that does; that is exact. Families that size shared experts, or FFNs without experts, by the very key
of the routed ones cannot have narrower ones at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.header import printable
from surgeon.errors import InputError, Where
from surgeon.structure.experts.check import stored_width
from surgeon.structure.experts.cut import ExpertCut
from surgeon.structure.experts.parts import ExpertLayer, Experts

SHARED_WIDTHS = (
    "shared_expert_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "shared_intermediate_size",
)
"""Keys of a width that shared experts have to themselves."""

SHARED_COUNTS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
"""Keys of the number of shared experts, in families that make them that many times as wide as one routed expert."""

ALWAYS_ONE = frozenset({"deepseek_v4"})
"""Families whose class gives shared experts the width of one routed expert, whatever their number."""

_DENSE = re.compile(r"\.(mlp|feed_forward|ffn|mixer)\.[^.]+\.weight$")


@dataclass(frozen=True)
class Shared:
    """What becomes of shared experts: their number, their width in all, and the width they had."""

    number: int
    width: int
    before: int

    def note(self, each: int) -> str:
        """Return it as a sentence; ``each`` is the width of a routed expert."""
        padded = f", padded with zeros from {self.before}" if self.width != self.before else ""
        return (f"config.json speaks of {self.number} shared experts of {each} channels now ({self.width} in all{padded}), because readers "
                "size them as a multiple of the routed experts' width")  # fmt: skip


def sections(config: dict[str, Any], experts: Experts) -> Iterator[dict[str, Any]]:
    """Yield the parts of config.json that may say something about experts, the one with the sizes first."""
    if experts.section and isinstance(config.get(experts.section), dict):
        yield config[experts.section]
    yield config


def shared_count(checkpoint: Checkpoint, experts: Experts, cut: ExpertCut) -> Shared | None:
    """Return what becomes of shared experts, None where they stay as they are.

    Raises:
        InputError: E426 what sizes the routed experts also sizes something the cut leaves alone.
    """
    width = stored_width(experts, cut)
    if width == experts.width or checkpoint.config is None:
        return None
    section = next(iter(sections(dict(checkpoint.config), experts)))
    keys = [key for key in experts.record.counts.width if key in section]
    if "intermediate_size" in keys:
        _refuse_dense(checkpoint, experts, section)
    found = {size for layer in experts.layers for size in shared_widths(checkpoint, layer).values()}
    if not found or any(section.get(key) is not None for key in SHARED_WIDTHS):
        return None
    number = next((section[key] for key in SHARED_COUNTS if isinstance(section.get(key), int)), None)
    if number is None or found != {number * experts.width} or experts.record.family in ALWAYS_ONE:
        if keys == ["moe_intermediate_size"] and experts.width not in found:
            return None  # sized by a key with a default of its own
        raise _bound(checkpoint, experts, "its shared experts", next(iter(experts.layers[0].shared)))
    after = -(-number * experts.width // width)
    if after * width != number * experts.width and any(layer.quantized for layer in experts.layers):
        raise _bound(checkpoint, experts, "its shared experts, which are quantized and cannot be padded",
                     next(iter(experts.layers[0].shared)))  # fmt: skip
    return Shared(after, after * width, number * experts.width)


def shared_widths(checkpoint: Checkpoint, layer: ExpertLayer) -> dict[str, int]:
    """Return the shared experts' matrices and biases of a layer that have channels -> how many."""
    found = {}
    for name in layer.shared:
        axis = shared_axis(name)
        shape = checkpoint.tensors[name].shape
        if axis is not None and axis < len(shape):
            found[name] = shape[axis]
    return found


def shared_axis(name: str) -> int | None:
    """Return the axis along which a shared expert's tensor has channels, by its name; None without one."""
    part, _, ending = name.rpartition(".")
    kind = part.rpartition(".")[2]
    if kind in ("gate_proj", "up_proj", "w1", "w3", "gate_and_up_proj", "gate_up_proj") and ending in (
        "weight",
        "bias",
    ):
        return 0
    return 1 if kind in ("down_proj", "w2") and ending == "weight" else None


def _refuse_dense(checkpoint: Checkpoint, experts: Experts, section: Mapping[str, Any]) -> None:
    """Refuse a width whose key also sizes shared experts or the FFN of layers without experts."""
    for layer in experts.layers:
        for name, width in shared_widths(checkpoint, layer).items():
            if width == experts.width and not any(section.get(key) is not None for key in SHARED_WIDTHS):
                raise _bound(checkpoint, experts, "its shared experts", name)
    if section.get("intermediate_size_mlp") is not None:
        return
    known = {tensor.name for layer in experts.layers for tensor in layer.tensors}
    known |= {name for layer in experts.layers for name in layer.shared}
    for name, info in checkpoint.tensors.items():
        if name not in known and _DENSE.search(name) and len(info.shape) == 2 and experts.width in info.shape:
            raise _bound(checkpoint, experts, "FFNs without experts", name)


def _bound(checkpoint: Checkpoint, experts: Experts, what: str, name: str) -> InputError:
    return InputError(
        "E426", f"{checkpoint.label} sizes {what} by the same key as its experts' width, so narrower experts alone do not load",
        where=Where(checkpoint.label, tensor=printable(name)), help=f"drop whole experts, or keep all {experts.width} channels",
    )  # fmt: skip
