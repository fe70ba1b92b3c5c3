"""The experts of one checkpoint: which stored tensors belong to which expert of which layer, along which axis."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from surgeon.architectures.expert_records.record import ExpertRecord

Role = Literal[
    "gate", "up", "gate_up", "down", "gate_bias", "up_bias", "gate_up_bias", "down_bias", "router", "router_bias",
    "correction_bias",
]  # fmt: skip
Order = Literal["plain", "concatenated", "interleaved"]


@dataclass(frozen=True, slots=True)
class ExpertTensor:
    """One stored tensor that holds something of experts.

    Attributes:
        name: in the checkpoint.
        role: what it is; a companion of a quantized tensor has the role of what it belongs to.
        expert: the expert it belongs to, None where it holds all of them.
        expert_axis: the axis that runs over experts, None where it belongs to one.
        channel_axis: the axis that runs over the experts' channels (intermediate width), None without one.
        order: how gate and up lie along the channel axis: one after the other, or alternating; "plain" where
            there is only one of them.
        companion: scales, zero points and packed values of a quantized tensor, and the packed tensor itself: whole
            experts may go, channels may not.
    """

    name: str
    role: Role
    expert: int | None
    expert_axis: int | None
    channel_axis: int | None
    order: Order = "plain"
    companion: bool = False


@dataclass(frozen=True, slots=True)
class ExpertLayer:
    """One layer of routed experts.

    Attributes:
        index: number of the layer in the checkpoint.
        runs: whether the library's model runs it; a multi-token-prediction layer does not run.
        prefix: what the names of its expert block start with, such as "model.layers.3.mlp.".
        storage: "per expert" or "fused".
        count: routed experts.
        tensors: everything that moves with an expert: matrices, biases, router rows, correction bias.
        shared: names of the tensors of shared experts, which are never cut.
        quantized: the method, such as "fp8", None for plain numbers.
    """

    index: int
    runs: bool
    prefix: str
    storage: Literal["per expert", "fused"]
    count: int
    tensors: tuple[ExpertTensor, ...]
    shared: tuple[str, ...] = ()
    quantized: str | None = None

    def of(self, *roles: Role) -> Iterator[ExpertTensor]:
        """Yield the tensors of some roles, companions included."""
        return (tensor for tensor in self.tensors if tensor.role in roles)


@dataclass(frozen=True)
class Experts:
    """All routed experts of a checkpoint.

    Attributes:
        record: the family's record they were found by.
        section: key of the part of config.json that holds the sizes, "" for the top.
        layers: layers with experts in order, those that do not run last.
        count: routed experts of every layer.
        top_k: experts a token goes to.
        width: channels of one expert.
        groups: groups of experts among which a token is limited, 1 without.
        topk_group: groups a token may use, 1 without groups.
        hidden: width of the residual stream.
    """

    record: ExpertRecord
    section: str
    layers: tuple[ExpertLayer, ...]
    count: int
    top_k: int
    width: int
    groups: int
    topk_group: int
    hidden: int

    def layer(self, index: int) -> ExpertLayer:
        """Return a layer by its number in the checkpoint."""
        return next(layer for layer in self.layers if layer.index == index)

    @property
    def running(self) -> tuple[ExpertLayer, ...]:
        """The layers that a forward pass runs."""
        return tuple(layer for layer in self.layers if layer.runs)
