"""Which matrices of a model write to its residual stream, and where the stream itself can be seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from surgeon import architectures
from surgeon.architectures.base import Architecture, Expected
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.dtypes import DTYPES
from surgeon.checkpoint.header import printable
from surgeon.errors import InputError, UsageError, Where
from surgeon.formats.dequantized import plain_needed
from surgeon.kernels.cast import widen
from surgeon.traits import quantized

SITES = ("attn", "mlp", "layer")
"""attn: the stream after attention, which the FFN's norm reads; mlp and layer: after the FFN, the layer's output."""

_ATTENTION = ("attention_o",)
_FFN = ("ffn_down", "expert_down", "shared_expert_down")
_OTHER_WRITERS = ("mixer_o", "expert_latent_o")
"""Kinds of output projections of hybrid families, for which no edit is defined here."""


@dataclass(frozen=True)
class Writer:
    """A matrix whose outputs are added to the residual stream.

    Attributes:
        tensor: its name.
        layer: number of its layer.
        part: "attention" or "ffn".
        shape: as stored: [out, in], a Conv1D's [in, out], or stacked experts with one axis more in front.
        output_axis: the axis of the residual stream.
        heads: equal parts of the inputs, one a query head; 1 for an FFN.
        bias: its bias, or None.
        norm: a norm between the matrix and the stream (Gemma 2 and 3), or None.
        one_plus: that norm multiplies by 1 + weight.
    """

    tensor: str
    layer: int
    part: str
    shape: tuple[int, ...]
    output_axis: int
    heads: int
    bias: str | None
    norm: str | None
    one_plus: bool

    @property
    def hidden(self) -> int:
        return self.shape[self.output_axis]

    @property
    def inputs(self) -> int:
        """How many inputs it has."""
        return self.shape[-2 if self.output_axis == len(self.shape) - 1 else -1]

    @property
    def head_dim(self) -> int:
        return self.inputs // self.heads

    @property
    def module(self) -> str:
        """The name under which a walk shows its inputs."""
        return self.tensor.removesuffix(".weight")

    def columns(self, head: int) -> slice:
        """Return the inputs that a query head feeds."""
        return slice(head * self.head_dim, (head + 1) * self.head_dim)


@dataclass(frozen=True)
class Stream:
    """The residual stream of a model: its writers, and the modules whose inputs it is.

    Attributes:
        model_type: family.
        hidden: width.
        layers: how many layers write to it.
        writers: all of them, by layer.
        attn, layer: layer number -> module whose input is the stream after attention, or after the layer.
        embedding: the tensor whose rows start the stream.
    """

    model_type: str
    hidden: int
    layers: int
    writers: tuple[Writer, ...]
    attn: Mapping[int, str]
    layer: Mapping[int, str]
    embedding: str

    def site(self, name: str) -> Mapping[int, str]:
        """Return layer -> module whose input is the stream at a site.

        Raises:
            UsageError: E295 the model has no such place.
        """
        if name not in SITES:
            raise UsageError("E295", f'the site is "{printable(name)}"', help="one of " + ", ".join(SITES))
        found = self.attn if name == "attn" else self.layer
        if not found:
            raise UsageError("E295", f"in a {self.model_type} model attention and FFN read the stream at the same place",
                             help="--site layer: the stream after the whole layer")  # fmt: skip
        return found

    def attention(self) -> tuple[Writer, ...]:
        """Return the output projections of attention, by layer."""
        return tuple(writer for writer in self.writers if writer.part == "attention")

    def at(self, layer: int, part: str) -> tuple[Writer, ...]:
        return tuple(writer for writer in self.writers if (writer.layer, writer.part) == (layer, part))


def stream_of(checkpoint: Checkpoint) -> Stream:
    """Find the residual stream of a decoder from its family's record.

    Raises:
        InputError: E417 an unknown family, an encoder, or a model without config.json; E311 a quantized one.
    """
    config = checkpoint.config
    record = architectures.get((config or {}).get("model_type"))
    if config is None or record is None:
        kind = printable(str((config or {}).get("model_type", "model without config.json")))
        raise InputError("E417", f"{checkpoint.label}: where a {kind} writes to its residual stream is not known",
                         where=Where(checkpoint.label), help="these are: " + ", ".join(architectures.known()))  # fmt: skip
    if record.post_norm:
        raise InputError("E417", f"{checkpoint.label}: a {record.model_type} model normalises its residual stream itself",
                         where=Where(checkpoint.label),
                         help="what is taken out of a matrix would come back in the norm; decoders can be edited")  # fmt: skip
    if quantized(checkpoint):
        raise plain_needed(checkpoint, "editing needs plain weights")
    tensors = {
        n: e for n, e in record.layout(config, checkpoint.tensors).tensors.items() if n in checkpoint.tensors
    }
    if any(spec.kind in _OTHER_WRITERS for spec in tensors.values()):
        raise InputError("E417", f"{checkpoint.label}: a {record.model_type} model writes to its residual stream through more than "
                         "attention and FFN", where=Where(checkpoint.label),
                         help="its mixers would put back what is taken out; models of attention layers only can be edited")  # fmt: skip
    layers = record.num_layers(config)
    heads = record.settings(config).integer(*_head_keys(record))
    writers = [
        _writer(name, spec, checkpoint, record, heads)
        for name, spec in tensors.items()
        if spec.kind in (*_ATTENTION, *_FFN) and spec.layer is not None and spec.layer < layers
    ]
    embedding = next(
        (n for n, e in tensors.items() if e.kind == "embedding" and e.axes == ("vocab", "hidden")), None
    )
    if embedding is None or not writers:
        raise InputError("E417", f"{checkpoint.label} lacks its embedding or its output projections",
                         where=Where(checkpoint.label), help="surgeon verify names what is missing")  # fmt: skip
    attn, layer = _places(tensors, record, layers)
    hidden = checkpoint.tensors[embedding].shape[1]
    ordered = tuple(sorted(writers, key=lambda w: (w.layer, w.part, w.tensor)))
    return Stream(record.model_type, hidden, layers, ordered, attn, layer, embedding)


def _head_keys(record: Architecture) -> tuple[str, ...]:
    return ("n_head", "num_attention_heads") if record.model_type == "gpt2" else ("num_attention_heads",)


def _writer(name: str, spec: Expected, checkpoint: Checkpoint, record: Architecture, heads: int) -> Writer:
    info = checkpoint.tensors[name]
    if DTYPES[info.dtype].family != "float":
        raise InputError("E417", f"{printable(name)} is stored as {info.dtype}", where=Where(tensor=printable(name)),
                         help="quantized models must be dequantized first")  # fmt: skip
    part = "attention" if spec.kind in _ATTENTION else "ffn"
    base = name.removesuffix(".weight")
    bias = next((b for b in (f"{base}.bias", f"{name}_bias") if b in checkpoint.tensors), None)
    norms = record.branch_norms[0 if part == "attention" else 1]
    norm = None
    if len(norms) == 2:  # one before the branch, one behind it
        norm = f"{name[: name.index(f'.{spec.layer}.')]}.{spec.layer}.{norms[1]}.weight"
    return Writer(
        name, int(spec.layer or 0), part, tuple(info.shape), spec.axes.index("hidden"), heads if part == "attention" else 1,
        bias, norm, norm is not None and record.norm_offset(norm) == 1.0,
    )  # fmt: skip


def _places(
    tensors: Mapping[str, Expected], record: Architecture, layers: int
) -> tuple[dict[int, str], dict[int, str]]:
    """Return the norms that read the stream after attention, and after the layer, by layer."""
    inside: dict[tuple[int, str], str] = {}
    last = None
    for name, spec in tensors.items():
        if spec.kind != "norm" or not name.endswith(".weight"):
            continue
        module = name.removesuffix(".weight")
        if spec.layer is None:
            last = module if spec.axes == ("hidden",) else last
        else:
            inside[spec.layer, module.partition(f".{spec.layer}.")[2]] = module
    before, behind = record.branch_norms
    entry = before[0] if before else "input_layernorm"
    attn = {n: inside[n, behind[0]] for n in range(layers) if behind and (n, behind[0]) in inside}
    layer = {n - 1: inside[n, entry] for n in range(1, layers) if (n, entry) in inside}
    if last is not None:
        layer[layers - 1] = last
    return attn, layer


def read_values(checkpoint: Checkpoint, name: str) -> np.ndarray:
    """Return a small tensor, flattened, float64."""
    info = checkpoint.tensors[name]
    return widen(checkpoint.read(name, 0, info.elements), info.dtype).astype(np.float64)


def gain_of(writer: Writer, checkpoint: Checkpoint) -> np.ndarray | None:
    """Return what the norm behind a writer multiplies its output with [hidden], or None without one."""
    if writer.norm is None:
        return None
    return read_values(checkpoint, writer.norm) + (1.0 if writer.one_plus else 0.0)
