"""Find the prunable structures of a checkpoint from the record of its family.

The records of `surgeon.architectures` name the sizes along the axes of every tensor; "query" is one
unit of head_dim a query head, "key_value" one a key/value head, "ffn" one a channel, and fused
matrices are several such ranges behind each other. Nothing here knows a family by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from surgeon import architectures
from surgeon.architectures.base import Architecture, Expected, Layout
from surgeon.architectures.settings import Size
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.header import printable
from surgeon.errors import InputError, Where
from surgeon.formats.dequantized import plain_needed
from surgeon.structure.parts import Attention, Ffn, Output, Section, Structure
from surgeon.traits import quantized

QUERY_AXES = frozenset({"query", "query_key_value", "heads"})
KEY_VALUE_AXES = frozenset({"key_value", "query_key_value"})
FFN_INPUTS = ("ffn_gate", "ffn_up", "ffn_gate_up")

Named = Mapping[str, Expected]


@dataclass(frozen=True)
class Geometry:
    """Heads of one attention: query heads, key/value heads, numbers per head."""

    heads: int
    groups: int
    head_dim: int


def record_of(checkpoint: Checkpoint) -> tuple[Architecture, Layout]:
    """Return the record of a checkpoint's family and the layout its names follow.

    Raises:
        InputError: E365 no configuration, or a family without a record; E311 a quantized checkpoint.
    """
    where = Where(checkpoint.label)
    config = checkpoint.config
    if config is None:
        raise InputError(
            "E365", f"{checkpoint.label} has no config.json, so its heads and channels cannot be told apart",
            where=where, help="give the model folder",
        )  # fmt: skip
    record = architectures.get(config.get("model_type"))
    if record is None:
        raise InputError(
            "E365", f"{checkpoint.label} is a {printable(str(config.get('model_type')))} model; its structures are not known",
            where=where, help="these can be pruned: " + ", ".join(architectures.known()),
        )  # fmt: skip
    if quantized(checkpoint) is not None:
        raise plain_needed(checkpoint, "its rows and columns cannot be taken apart")
    return record, record.layout(config, checkpoint.tensors)


def structure_of(checkpoint: Checkpoint) -> Structure:
    """Return where the heads, FFN channels and layers of a model lie, from its configuration and header.

    Raises:
        InputError: E365 as `record_of`, or a tensor is missing or has a shape the configuration rules out.
    """
    record, layout = record_of(checkpoint)
    assert checkpoint.config is not None
    sizes = record.sizes(record.settings(checkpoint.config))
    geometry = _geometry(sizes)
    layers: list[dict[str, Expected]] = [{} for _ in range(record.num_layers(checkpoint.config))]
    for name, spec in layout.tensors.items():
        if spec.layer is not None and spec.layer < len(layers):
            if name in checkpoint.tensors:
                layers[spec.layer][name] = spec
            elif not spec.optional:
                raise _misfit(checkpoint, name, "is missing")
    start = f"{layout.prefix}{record.stack}."
    attention: list[Attention | None] = []
    ffn: list[Ffn | None] = []
    reasons: list[tuple[int, str]] = []
    for number, tensors in enumerate(layers):
        branches = [
            {f"{start}{number}.{norm}.{part}" for norm in norms for part in ("weight", "bias")}
            for norms in record.branch_norms
        ]
        found: Attention | str
        channels: Ffn | str
        if record.only_depth:
            found, channels = (f"{part}: {record.only_depth}" for part in ("attention", "ffn"))
        else:
            found = _attention(checkpoint, number, tensors, geometry, branches[0])
            channels = _ffn(checkpoint, number, tensors, branches[1])
        attention.append(found if isinstance(found, Attention) else None)
        ffn.append(channels if isinstance(channels, Ffn) else None)
        reasons += [(number, part) for part in (found, channels) if isinstance(part, str)]
    return Structure(
        record.model_type,
        start,
        tuple(attention),
        tuple(ffn),
        sizes["hidden"].value,
        tuple(reasons),
    )


def sections(name: str, spec: Expected, geometry: Geometry | None, width: int) -> dict[str, list[Section]]:
    """Return the ranges of one tensor by what their units are: "heads", "groups", "channels".

    Args:
        name: the tensor.
        spec: its axes.
        geometry: heads of its layer; None when they are not looked for.
        width: FFN channels of its layer; 0 when they are not looked for.
    """
    found: dict[str, list[Section]] = {"heads": [], "groups": [], "channels": []}
    for axis, label in enumerate(spec.axes):
        if geometry is not None:
            heads, groups, size = geometry.heads, geometry.groups, geometry.head_dim
            if label == "heads":
                found["heads"].append(Section(name, axis, 0, heads, heads))
            if label in ("query", "query_key_value"):
                found["heads"].append(Section(name, axis, 0, heads * size, heads))
            if label in KEY_VALUE_AXES:
                place = heads * size if label == "query_key_value" else 0
                for start in (place, place + groups * size) if label == "query_key_value" else (place,):
                    found["groups"].append(Section(name, axis, start, groups * size, groups))
        if width and label in ("ffn", "gate_up"):
            starts = (0, width) if label == "gate_up" else (0,)
            found["channels"] += [Section(name, axis, start, width, width) for start in starts]
    return found


def _geometry(sizes: Mapping[str, Size]) -> Geometry | None:
    if not {"heads", "groups", "head_dim"} <= sizes.keys():
        return None
    return Geometry(sizes["heads"].value, sizes["groups"].value, sizes["head_dim"].value)


def _attention(
    checkpoint: Checkpoint, layer: int, tensors: Named, geometry: Geometry | None, norms: set[str]
) -> Attention | str:
    kinds = {spec.kind for spec in tensors.values()}
    if any(kind.startswith("cross_attention") for kind in kinds):
        return "attention: cross-attention shares its number of heads"
    if any(kind.startswith("attention_kv_down") for kind in kinds):
        return "attention: all heads share one latent of keys and values"
    if geometry is None or "attention_o" not in kinds:
        return "attention: the layer has none with heads of its own"
    output = _output(checkpoint, tensors, "attention_o", "query")
    queries: list[Section] = []
    key_values: list[Section] = []
    over_heads: list[Section] = []
    parents: set[str] = set()
    own: list[str] = []
    for name, spec in tensors.items():
        if spec.kind.startswith("attention_"):
            own.append(name)
            if not spec.kind.startswith("attention_o"):
                _check_shape(checkpoint, name, spec)
                parts = sections(name, spec, geometry, 0)
                queries += parts["heads"]
                key_values += parts["groups"]
                if spec.kind in ("attention_q", "attention_qkv"):
                    parents.add(name.removesuffix(".weight").rpartition(".")[0] + ".")
        elif spec.kind.startswith("norm") and set(spec.axes) & (QUERY_AXES | KEY_VALUE_AXES):
            _check_shape(checkpoint, name, spec)
            parts = sections(name, spec, geometry, 0)
            over_heads += [*parts["heads"], *parts["groups"]]
    inside = [name for name in tensors if name not in own and name.startswith(tuple(parents))]
    own += [*inside, *(name for name in tensors if name in norms)]
    return Attention(
        layer, geometry.heads, geometry.groups, geometry.head_dim, output,
        tuple(queries), tuple(key_values), tuple(over_heads), tuple(own),
    )  # fmt: skip


def _ffn(checkpoint: Checkpoint, layer: int, tensors: Named, norms: set[str]) -> Ffn | str:
    kinds = {spec.kind for spec in tensors.values()}
    if "ffn_down" not in kinds:
        return "ffn: the layer has routed experts" if "router" in kinds else "ffn: the layer has none"
    output = _output(checkpoint, tensors, "ffn_down", "ffn")
    width = checkpoint.tensors[output.weight].shape[output.input_axis]
    inputs: list[Section] = []
    own: list[str] = []
    for name, spec in tensors.items():
        if not spec.kind.startswith("ffn_"):
            continue
        own.append(name)
        if spec.kind.removesuffix("_bias") in FFN_INPUTS:
            _check_shape(checkpoint, name, spec)
            inputs += sections(name, spec, None, width)["channels"]
    own += [name for name in tensors if name in norms]
    return Ffn(layer, width, output, tuple(inputs), tuple(own))


def _output(checkpoint: Checkpoint, tensors: Named, kind: str, axis: str) -> Output:
    weight, spec = next((name, spec) for name, spec in tensors.items() if spec.kind == kind)
    _check_shape(checkpoint, weight, spec)
    bias = weight.removesuffix(".weight") + ".bias"
    return Output(weight, spec.axes.index(axis), bias if bias in tensors else None)


def _check_shape(checkpoint: Checkpoint, name: str, spec: Expected) -> None:
    shape = checkpoint.tensors[name].shape
    if spec.shape != shape:
        keys = ", ".join(dict.fromkeys(key for axis in spec.keys for key in axis))
        raise _misfit(checkpoint, name, f"has shape {list(shape)}, by {keys} it is {list(spec.shape or ())}")


def _misfit(checkpoint: Checkpoint, name: str, fact: str) -> InputError:
    return InputError(
        "E365", f"{printable(name)} of {checkpoint.label} {fact}", where=Where(checkpoint.label, tensor=printable(name)),
        help="config.json does not fit the weights; surgeon verify shows every disagreement",
    )  # fmt: skip


WRITERS = frozenset(
    {
        "attention_o",
        "cross_attention_o",
        "mixer_o",
        "ffn_down",
        "expert_down",
        "expert_latent_o",
        "shared_expert_down",
    }
)
"""Kinds of matrices through which a layer adds to the residual stream."""


def residual_writers(layout: Layout, layer: int) -> frozenset[str]:
    """Return the output matrices of a layer and their biases: without them it adds nothing."""
    return frozenset(
        name
        for name, spec in layout.tensors.items()
        if spec.layer == layer and spec.kind.removesuffix("_bias") in WRITERS
    )
