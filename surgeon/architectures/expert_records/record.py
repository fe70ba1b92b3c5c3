"""What one family's checkpoints say about experts, as data: names, axes and configuration keys, no code.

One record describes every way a family is stored. Names are relative to the layer ("mlp.gate.weight"); "{expert}"
stands for an expert's number and "{layer}" for a layer's. Where several names are given, a checkpoint has one of
them: published files and files with the library's own names differ.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from surgeon.architectures.expert_records.layer_rules import LayerRule

LAYERS = (
    "model.layers.{layer}.",
    "model.language_model.layers.{layer}.",
    "language_model.model.layers.{layer}.",
    "language_model.model.blocks.{layer}.",  # Kimi-K2.5 as the library writes it back
    "layers.{layer}.",
    "language_model.layers.{layer}.",
)
"""What layers are called, alone and inside models that also see or hear, with and without a head."""

WIDTH_PRESETS = {"minimal": 8, "cpu": 32, "portable": 128}
"""Multiples the width of experts should have: rows of 16 bytes in 16-bit types, the CPU kernels of servers, and
the kernels for newer GPUs and 128 x 128 scales (each once per tensor-parallel partition)."""


def _several(value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_several)]
"""One name, or several of which a checkpoint has one."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Counts(_Part):
    """Keys of the configuration; several keys of one line are aliases, which must agree.

    Attributes:
        experts: number of routed experts of a layer.
        top_k: experts a token goes to.
        width: channels of one expert.
        groups: groups of experts among which a token is limited.
        topk_group: groups a token may use.
        layers: number of layers, or a list or string with one entry a layer; the first that is set.
        hidden: width of the residual stream.
        input: width of what experts read and write where it is another; the first that is set.
    """

    experts: Names
    top_k: Names
    width: Names
    groups: Names = ()
    topk_group: Names = ()
    layers: Names = ("num_hidden_layers",)
    hidden: Names = ("hidden_size",)
    input: Names = ()


class PerExpert(_Part):
    """Every matrix of every expert by itself; names without ".weight", so that scales beside it are found too."""

    storage: Literal["per expert"]
    gate: str | None = None
    up: str
    down: str

    @model_validator(mode="after")
    def _numbered(self) -> PerExpert:
        for name in filter(None, (self.gate, self.up, self.down)):
            if name.count("{expert}") != 1:
                raise ValueError(f'"{name}" needs "{{expert}}" once, where the number of the expert stands')
        return self


class Fused(_Part):
    """All experts of a layer in one tensor, experts along the first axis.

    Attributes:
        gate_up: gate and up in one matrix.
        up: of experts without a gate; then there is no gate_up.
        order: how gate and up lie along the channels.
        transposed: matrices are stored [input, output], so channels are the last axis of gate_up.
        gate_up_bias, up_bias, down_bias: [experts, channels] and [experts, input].
    """

    storage: Literal["fused"]
    gate_up: str | None = None
    up: str | None = None
    down: str
    order: Literal["concatenated", "interleaved"] = "concatenated"
    transposed: bool = False
    gate_up_bias: str | None = None
    up_bias: str | None = None
    down_bias: str | None = None

    @model_validator(mode="after")
    def _one_first_matrix(self) -> Fused:
        if (self.gate_up is None) == (self.up is None):
            raise ValueError("name gate_up, or up for experts without a gate")
        return self


Storage = Annotated[PerExpert | Fused, Field(discriminator="storage")]


class Router(_Part):
    """How a token's experts are chosen and weighed.

    Attributes:
        weight: [experts, hidden].
        bias: [experts], part of the logits.
        correction: added to the scores for the choice only.
        correction_axis: the axis of it that runs over experts.
        hash_table: a table from tokens to experts; layers with one cannot lose experts.
        score: "softmax" over all experts, "sigmoid", "softmax of selected" logits, "sqrtsoftplus", "sparsemixer".
        groups: how a group of experts is scored: not at all, by its best, by the sum of its best two.
        groups_if: (key, value): groups only count when the configuration says so.
        renormalised: whether the weights of the chosen sum to one: always, never, or as a key says.
        scale: key of a factor on all weights.
        gate_on: whether the weight multiplies an expert's output or its input.
    """

    weight: Names
    bias: Names = ()
    correction: Names = ()
    correction_axis: int = 0
    hash_table: Names = ()
    score: Literal["softmax", "sigmoid", "softmax of selected", "sqrtsoftplus", "sparsemixer"]
    groups: Literal["none", "max", "top2_sum"] = "none"
    groups_if: tuple[str, str] | None = None
    renormalised: bool | str = False
    scale: str | None = None
    gate_on: Literal["output", "input"] = "output"


class Extra(_Part):
    """Layers for predicting further tokens, which the library's model does not run.

    Attributes:
        appended: they follow the configured layers under the same name.
        layers: names of their own, where "{layer}" counts from 0.
    """

    appended: bool = False
    layers: Names = ()


class Taps(_Part):
    """Modules of the library's model around the experts, by their path inside a layer.

    Attributes:
        norm: the norm whose input is the residual stream that enters the layer's experts.
        block: the module of router and experts.
        router: the router.
        stream: whether the stream the block's output is added to is that norm's input or its output; "several"
            where the model mixes several streams, so that there is no such sum.
        stream_scale: key of a factor on the stream before the sum.
        branch_scale: key of a factor on the block's output.
        normalised: the block's output passes a norm before the sum.
    """

    norm: str = "post_attention_layernorm"
    block: str = "mlp"
    router: str = "mlp.gate"
    stream: Literal["input", "output", "several"] = "input"
    stream_scale: str | None = None
    branch_scale: str | None = None
    normalised: bool = False


class ExpertRecord(_Part):
    """One family of mixtures of experts.

    Attributes:
        family: its name, also the file's.
        model_types: values of model_type in config.json.
        sections: parts of config.json that may hold the sizes, "" for the top; the first that has them does.
        counts: keys of the sizes.
        defaults: values of keys a configuration may leave out.
        moe_layers: rules for the layers with experts; the first whose keys are there decides.
        layers: what layers are called.
        extra: layers beyond the configured number.
        storages: ways of storing the experts; the first whose tensors are there, and fit, is taken.
        router: router, biases and what they mean.
        shared: patterns of tensors of experts every token goes to, relative to the layer.
        elsewhere: patterns of tensors with one row per expert that are no part of the routed experts; a family
            with some cannot lose experts.
        taps: modules around the experts.
        gated: experts multiply an activated gate with a second projection.
        width_multiple: multiple that the width of experts must have for the library's own kernels.
    """

    family: str
    model_types: Names
    sections: Names = ("", "text_config")
    counts: Counts
    defaults: dict[str, int | str | bool] = Field(default_factory=dict)
    moe_layers: tuple[LayerRule, ...]
    layers: Names = LAYERS
    extra: Extra = Extra()
    storages: tuple[Storage, ...]
    router: Router
    shared: Names = ()
    elsewhere: Names = ()
    taps: Taps = Taps()
    gated: bool = True
    width_multiple: int = Field(default=8, ge=1)

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    @model_validator(mode="after")
    def _consistent(self) -> ExpertRecord:
        if not self.storages:
            raise ValueError("storages is empty")
        if not self.moe_layers:
            raise ValueError("moe_layers is empty")
        for pattern in (*self.layers, *self.extra.layers):
            if pattern.count("{layer}") != 1 or not pattern.endswith("."):
                raise ValueError(f'"{pattern}" needs "{{layer}}" once and a full stop at its end')
        for storage in self.storages:
            gated = storage.gate_up is not None if isinstance(storage, Fused) else storage.gate is not None
            if gated != self.gated:
                raise ValueError(f"gated is {str(self.gated).lower()}, but a storage says otherwise")
        return self
