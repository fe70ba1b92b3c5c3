"""Compare what a checkpoint holds with what its config.json says it must hold.

Loading is no such comparison: the usual loader fills missing tensors with random numbers and
ignores layers beyond the configured number, both without an exception. Here names and shapes
are compared as complete sets, in both directions, from headers and JSON alone.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from surgeon import architectures
from surgeon.architectures import block_configs, naming
from surgeon.architectures.base import Architecture, Expected, Layout
from surgeon.errors import InputError

Config = Mapping[str, Any]
Tensors = Mapping[str, tuple[str, tuple[int, ...]]]
"""Header facts by tensor name: (dtype code, shape)."""

Severity = Literal["error", "warning", "notice"]

FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
"""Dtype codes whose shape is the logical shape, also in a quantized checkpoint."""

CACHE_SCALE = re.compile(r"(q|k|v|kv|prob|prob_output)_(scale|zero_point)")
"""Scales of quantized attention and its cache, which belong to no weight."""

UNEVEN_WORDS = frozenset(
    {"every", "first", "freq", "frequency", "interval", "offset", "pattern", "period", "replace", "step"}
)
"""A key with one of these words explains why layers differ from each other."""


@dataclass(frozen=True)
class Finding:
    """One disagreement between a checkpoint and its configuration.

    Attributes:
        kind: missing-tensor, unexpected-tensor, wrong-shape, missing-layer, uneven-layers,
            config-contradiction, config-invalid, unknown-architecture, unchecked-tensors or packed-tensors.
        message: one sentence that names the tensor or the configuration key.
        severity: "error" makes the checkpoint unusable as described, "warning" is a tensor
            nothing reads, "notice" says what could not be checked.
        tensor: the tensor's name, where there is one.
        expected: what the configuration says.
        found: what the checkpoint holds.
        keys: the configuration keys concerned.
    """

    kind: str
    message: str
    severity: Severity = "error"
    tensor: str | None = None
    expected: Any = None
    found: Any = None
    keys: tuple[str, ...] = ()


def check(config: Config, tensors: Tensors) -> list[Finding]:
    """Return every disagreement between a configuration and the tensors beside it, gravest first.

    Args:
        config: the parsed config.json.
        tensors: dtype code and shape of every tensor in the checkpoint.
    """
    architecture = architectures.get(config.get("model_type"))
    own_sizes = block_configs.family_of(config)
    try:
        if own_sizes is not None:
            layout = block_configs.layout(own_sizes, config, tensors)
            found = list(_check_known(own_sizes, block_configs.base_config(config), tensors, layout))
        elif architecture is None:
            found = list(_check_unknown(config, tensors))
        else:
            layout = architecture.layout(config, tensors)
            found = list(_check_known(architecture, config, tensors, layout))
    except InputError as error:
        found = [Finding("config-invalid", error.message)]
    order = {"error": 0, "warning": 1, "notice": 2}
    return sorted(found, key=lambda finding: order[finding.severity])


def _check_known(
    architecture: Architecture, config: Config, tensors: Tensors, layout: Layout
) -> Iterator[Finding]:
    for sentence in architecture.contradictions(config):
        yield Finding("config-contradiction", f"config.json contradicts itself: {sentence}")
    wanted = layout.tensors
    packed = isinstance(config.get("quantization_config"), dict)
    layers = _LayerCount(architecture, config, layout, tensors)
    yield from layers.findings()
    yield from _expert_layers(architecture, layers, wanted, tensors)

    shapes = list(_wrong_shapes(wanted, tensors, packed))
    yield from _contradicted_sizes(wanted, tensors, shapes)
    groups = {wanted[name].group for name in tensors if name in wanted} - {""}
    for name, spec in wanted.items():
        if name in tensors or layers.explains(spec.layer):
            continue
        if spec.optional and spec.group not in groups:
            continue
        if packed and _stored_packed(name, tensors):
            continue
        beyond = spec.layer is not None and spec.layer >= layers.count
        reason = f"; layer {spec.layer} lies beyond {layers.key} = {layers.count}" if beyond else ""
        yield Finding(
            "missing-tensor",
            f"{name} is missing; config.json asks for it with shape {_shown(spec.shape)}{reason}",
            tensor=name,
            expected=spec.shape,
            keys=(layers.key,) if beyond else (),
        )
    yield from shapes

    modules = {name.rpartition(".")[0] for name in wanted if "." in name}
    for name in sorted(tensors):
        if name in wanted or name.startswith(architecture.beside) or (packed and _belongs(name, wanted)):
            continue
        place = naming.layer_of(name)
        inside = place is not None and place.stack == layers.stack
        if inside and place is not None and layers.explains(place.index):
            continue
        grave = inside or name.rpartition(".")[0] in modules
        yield Finding(
            "unexpected-tensor",
            f"{name} has no place in a {architecture.model_type} model with this config.json",
            severity="error" if grave else "warning",
            tensor=name,
            found=tensors[name][1],
        )
    other = sum(name.startswith(architecture.beside) for name in tensors)
    if other:
        yield Finding(
            "unchecked-tensors",
            f"{other} tensors of {', '.join(part.rstrip('.') for part in architecture.beside)} were not compared with config.json",
            severity="notice",
            found=other,
        )
    if packed:
        unchecked = sum(
            _is_packed(dtype) and (name not in wanted or wanted[name].shape != tuple(shape))
            for name, (dtype, shape) in tensors.items()
        )
        if unchecked:
            yield Finding(
                "packed-tensors",
                f"{unchecked} tensors hold packed values; their shapes were not compared with config.json",
                severity="notice",
                found=unchecked,
            )


class _LayerCount:
    """Whole layers that are missing or too many, said once instead of once a tensor."""

    def __init__(self, architecture: Architecture, config: Config, layout: Layout, tensors: Tensors) -> None:
        self.stack = f"{layout.prefix}{architecture.stack}"
        self.count = architecture.num_layers(config)
        self.allowed = self.count + architecture.extra_layers(architecture.settings(config))
        settings = architecture.settings(config)
        self.key = settings.named(*architecture.layer_keys)
        places = (naming.layer_of(name) for name in tensors)
        # A layer that is to hold nothing (its attention and its FFN were removed) is there without a tensor.
        held = {spec.layer for spec in layout.tensors.values()}
        self.present = {place.index for place in places if place is not None and place.stack == self.stack}
        self.present |= set(range(self.count)) - held

    def explains(self, layer: int | None) -> bool:
        """Say whether a tensor's absence or presence is already reported with its whole layer."""
        if layer is None:
            return False
        return layer >= self.allowed or (layer < self.count and layer not in self.present)

    def findings(self) -> Iterator[Finding]:
        length = max(self.present) + 1 if self.present else 0
        if length > self.allowed or length < self.count:
            yield Finding(
                "config-contradiction",
                f"{self.key} = {self.count}, but the checkpoint holds {length} layers in {self.stack}",
                expected=self.count,
                found=length,
                keys=(self.key,),
            )
        for layer in range(min(length, self.count)):
            if layer not in self.present:
                yield Finding(
                    "missing-layer",
                    f"layer {layer} of {self.stack} is missing altogether; {self.key} = {self.count}",
                    expected=self.count,
                    found=len(self.present),
                    keys=(self.key,),
                )


def _expert_layers(
    architecture: Architecture, layers: _LayerCount, wanted: Mapping[str, Expected], tensors: Tensors
) -> Iterator[Finding]:
    """Say which layers hold experts where the configuration has a dense MLP, and the reverse."""
    keys = architecture.expert_layer_keys
    if not keys:
        return
    stated = {spec.layer for spec in wanted.values() if spec.kind == "router"}
    places = [place for name in tensors if (place := naming.layer_of(name)) and place.stack == layers.stack]
    found = {place.index for place in places if "experts" in place.rest.split(".")}
    for holds, differing in ((True, found - stated), (False, stated - found)):
        at = sorted(layer for layer in differing if layer in layers.present and layer < layers.count)
        if at:
            which = f"layers {', '.join(map(str, at))} {'hold' if holds else 'lack'} experts"
            yield Finding(
                "config-contradiction",
                f"{which}, by {' and '.join(keys)} they {'should not' if holds else 'should have them'}",
                expected=not holds,
                found=holds,
                keys=keys,
            )


def _wrong_shapes(wanted: Mapping[str, Expected], tensors: Tensors, packed: bool) -> Iterator[Finding]:
    for name, spec in wanted.items():
        if name not in tensors or spec.shape is None:
            continue
        dtype, shape = tensors[name][0], tuple(tensors[name][1])
        if shape == spec.shape or (packed and name.endswith(".weight") and _is_packed(dtype)):
            continue
        keys: tuple[str, ...] = ()
        if len(shape) == len(spec.shape):
            differing = [axis for axis, size in enumerate(spec.shape) if shape[axis] != size]
            keys = tuple(dict.fromkeys(key for axis in differing for key in spec.keys[axis]))
        reason = f" (from {', '.join(keys)})" if keys else ""
        yield Finding(
            "wrong-shape",
            f"{name} has shape {_shown(shape)}, config.json says {_shown(spec.shape)}{reason}",
            tensor=name,
            expected=spec.shape,
            found=shape,
            keys=keys,
        )


def _contradicted_sizes(
    wanted: Mapping[str, Expected], tensors: Tensors, shapes: list[Finding]
) -> Iterator[Finding]:
    """Where every tensor with some axis agrees on another length, say it once about the key."""
    if not shapes:
        return
    lengths: dict[str, set[int]] = defaultdict(set)
    stated: dict[str, tuple[int, tuple[str, ...]]] = {}
    for name, spec in wanted.items():
        if name not in tensors or spec.shape is None or len(tensors[name][1]) != len(spec.shape):
            continue
        for axis, label in enumerate(spec.axes):
            lengths[label].add(tensors[name][1][axis])
            stated[label] = (spec.shape[axis], spec.keys[axis])
    for label in sorted(lengths):
        size, keys = stated[label]
        if len(lengths[label]) != 1 or not keys:
            continue
        (actual,) = lengths[label]
        if actual != size:
            yield Finding(
                "config-contradiction",
                f"by {' and '.join(keys)} the {label} axis has length {size}, in the checkpoint it has {actual}",
                expected=size,
                found=actual,
                keys=keys,
            )


def _check_unknown(config: Config, tensors: Tensors) -> Iterator[Finding]:
    """The checks that need no record: numbering of layers, and layers that look alike."""
    model_type = config.get("model_type")
    if isinstance(model_type, str):
        reason = f"model_type {model_type!r} has no record here"
    else:
        reason = "config.json names no model_type"
    yield Finding(
        "unknown-architecture",
        f"{reason}; only the numbering and likeness of layers were checked",
        severity="notice",
        found=model_type,
        keys=("model_type",),
    )
    layers: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name in tensors:
        place = naming.layer_of(name)
        if place is not None:
            layers[place.stack][place.index].add(place.rest)
    main = naming.main_stack(tensors, config)
    count = naming.num_layers(config)
    if main is not None and count is not None and max(layers[main]) + 1 != count:
        length = max(layers[main]) + 1
        yield Finding(
            "config-contradiction",
            f"config.json counts {count} layers, but the checkpoint holds {length} in {main}",
            expected=count,
            found=length,
        )
    for stack in sorted(layers):
        length = max(layers[stack]) + 1
        missing = length - len(layers[stack])
        if missing:
            first = next(layer for layer in range(length) if layer not in layers[stack])
            yield Finding(
                "missing-layer",
                f"{missing} of {length} layers of {stack} are missing, the first is {first}",
                severity="error" if stack == main else "warning",
                expected=length,
                found=len(layers[stack]),
            )
    if main is not None and not _explains_uneven_layers(config):
        yield from _uneven(main, layers[main])


def _uneven(stack: str, layers: Mapping[int, set[str]]) -> Iterator[Finding]:
    """Report layers that differ from the set of tensors that most layers have."""
    if len(layers) < 3:
        return
    sets = Counter(frozenset(rests) for rests in layers.values())
    common, votes = sets.most_common(1)[0]
    if votes * 2 <= len(layers):
        return
    for layer in sorted(layers):
        for rest in sorted(common - layers[layer]):
            name = str(naming.LayerName(stack, layer, rest))
            yield Finding("uneven-layers", f"{name} is missing, most layers of {stack} have it", tensor=name)
        for rest in sorted(layers[layer] - common):
            name = str(naming.LayerName(stack, layer, rest))
            yield Finding(
                "uneven-layers",
                f"{name} is in no other kind of layer of {stack}",
                severity="warning",
                tensor=name,
            )


def _explains_uneven_layers(config: Config) -> bool:
    """Say whether some key of the configuration announces layers of several kinds."""
    if naming.per_layer_lists(config):
        return True
    sections = [config, *(value for value in config.values() if isinstance(value, dict))]
    return any(
        value is not None and UNEVEN_WORDS.intersection(key.lower().split("_"))
        for section in sections
        for key, value in section.items()
    )


def _is_packed(dtype: str) -> bool:
    return dtype.upper() not in FLOATS


def _stored_packed(name: str, tensors: Tensors) -> bool:
    """Say whether a weight is stored under the names of a quantization format instead."""
    module = name.removesuffix(".weight")
    return any(
        f"{module}.{ending}" in tensors for ending in ("weight_packed", "qweight", "weight_q", "blocks")
    ) or (f"{name}_blocks" in tensors and f"{name}_scales" in tensors)


def _belongs(name: str, wanted: Mapping[str, Expected]) -> bool:
    """Say whether a tensor is a quantization companion (scales, zero points) of an expected weight."""
    parts = name.split(".")
    if any(".".join([*parts[:end], "weight"]) in wanted for end in range(1, len(parts))):
        return True
    if CACHE_SCALE.fullmatch(parts[-1]):
        return True
    stem = re.sub(r"_(scale|scales|scale_inv|blocks|zero_point|packed)$", "", name)
    return stem != name and stem in wanted


def _shown(shape: tuple[int, ...] | None) -> str:
    return "any" if shape is None else str(list(shape))
