"""Where the prunable structures of a model lie: which tensors, which axes, which ranges."""

from __future__ import annotations

from dataclasses import dataclass

from surgeon.structure.cut import LayerShape


@dataclass(frozen=True)
class Section:
    """A range of one tensor along one axis that belongs to a structure: ``units`` equal pieces of it."""

    tensor: str
    axis: int
    start: int
    length: int
    units: int


@dataclass(frozen=True)
class Output:
    """The matrix through which a structure writes to the residual stream.

    Attributes:
        weight: its tensor, an [out, in] linear or an [in, out] Conv1D.
        input_axis: the axis of its inputs: 1 for a linear, 0 for a Conv1D.
        bias: its bias tensor [out], or None.
    """

    weight: str
    input_axis: int
    bias: str | None

    @property
    def module(self) -> str:
        """The name under which a walk shows its inputs."""
        return self.weight.removesuffix(".weight")


@dataclass(frozen=True)
class Attention:
    """Attention of one layer with grouped queries: query head i reads key/value head i // (heads / groups).

    Attributes:
        queries: sections with one unit a query head (weights, biases, per-head norms).
        key_values: sections with one unit a key/value head.
        norms: sections of norms over all heads: cutting them changes their statistics.
        own: every tensor that goes when the attention goes altogether: its own, and norms that serve nothing else.
    """

    layer: int
    heads: int
    groups: int
    head_dim: int
    output: Output
    queries: tuple[Section, ...]
    key_values: tuple[Section, ...]
    norms: tuple[Section, ...] = ()
    own: tuple[str, ...] = ()

    @property
    def per_group(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads // self.groups


@dataclass(frozen=True)
class Ffn:
    """FFN of one layer: ``inputs`` are gate, up and their biases, one unit a channel; ``own`` as in `Attention`."""

    layer: int
    width: int
    output: Output
    inputs: tuple[Section, ...]
    own: tuple[str, ...] = ()


@dataclass(frozen=True)
class Structure:
    """The prunable structures of a model.

    Attributes:
        model_type: family.
        prefix: what the names of layers begin with, before the number: "model.layers.".
        attention, ffn: one entry a layer; None where a layer has none that can be cut (``reasons`` says why).
        reasons: layer -> sentence.
        hidden: size of the residual stream.
    """

    model_type: str
    prefix: str
    attention: tuple[Attention | None, ...]
    ffn: tuple[Ffn | None, ...]
    hidden: int
    reasons: tuple[tuple[int, str], ...] = ()

    @property
    def layers(self) -> int:
        return len(self.attention)

    def shape(self, layer: int) -> LayerShape:
        """Return the sizes of one layer of the source."""
        attention, ffn = self.attention[layer], self.ffn[layer]
        return LayerShape(
            attention.heads if attention else 0,
            attention.groups if attention else 0,
            attention.head_dim if attention else 0,
            ffn.width if ffn else 0,
        )
