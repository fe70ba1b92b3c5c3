"""The routed experts of a checkpoint: found by its family's record, and everything about them checked.

A mistake here would show as a model that talks nonsense, so nothing is skipped in silence: a tensor that has one
row per expert and that the record does not describe is an error, and so is every contradiction between config.json
and the tensors.

Codes: E420 dense, E421 unknown family, E422 contradictory configuration, E423 tensors do not fit the record,
E424 tensors the record does not describe, E403 experts that cannot be cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from surgeon.architectures.expert_records import record_of
from surgeon.architectures.expert_records.record import ExpertRecord
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.header import printable
from surgeon.errors import InputError, Where, raise_all
from surgeon.structure.experts.layers import read_layer
from surgeon.structure.experts.names import ROUTED, Found, LayerNames, take_apart
from surgeon.structure.experts.parts import ExpertLayer, Experts
from surgeon.structure.experts.sizes import Sizes, looks_routed, sizes_of
from surgeon.structure.experts.undescribed import undescribed

MOST_FINDINGS = 20


def experts_of(checkpoint: Checkpoint, record: ExpertRecord | None = None) -> Experts:
    """Return all routed experts of a checkpoint.

    Args:
        checkpoint: any view; only its configuration and its tensors' names, types and shapes are looked at.
        record: how the family stores experts; by default the one that comes with the package.

    Raises:
        InputError: E420 it is a dense model, E421 its family is not known, E422 its configuration contradicts itself,
            E423 configuration and tensors do not fit each other or the record, E424 it holds tensors of experts
            the record does not describe, E403 its layers choose experts by a table of tokens.
    """
    config = checkpoint.config
    if config is None:
        raise InputError(
            "E421", f"{checkpoint.label} has no config.json, so nothing says how it stores experts",
            help="name the model's folder, or give its configuration with --config",
        )  # fmt: skip
    record = record or record_of(config)
    if not looks_routed(checkpoint):
        raise _dense(checkpoint)
    if record is None:
        raise _unknown(checkpoint)
    sizes = sizes_of(checkpoint, record)
    found = take_apart(checkpoint.tensors, record)
    if not any(layer.routed for layer in (*found.layers.values(), *found.extra.values())):
        if sizes.experts <= 1 or not sizes.moe_layers:
            raise _dense(checkpoint)
        raise _not_there(checkpoint, record, sizes)
    sizes.check(checkpoint)
    places = list(_places(checkpoint, record, sizes, found))
    layers: list[ExpertLayer] = []
    findings: list[InputError] = []
    for place in places:
        layer, wrong = read_layer(checkpoint, record, sizes, place.names, place.index, place.runs)
        findings += wrong
        if layer is not None:
            layers.append(layer)
    if not findings:
        findings += _between(checkpoint, record, sizes, layers)
    blocks = {place.names.prefix: place.names.block() for place in places}
    findings += undescribed(checkpoint, record, sizes, found, blocks)
    raise_all(findings[:MOST_FINDINGS])
    return Experts(
        record, sizes.section, tuple(layers), sizes.experts, sizes.top_k, sizes.width, sizes.groups, sizes.topk_group,
        sizes.hidden,
    )  # fmt: skip


@dataclass(frozen=True)
class _Place:
    index: int
    runs: bool
    names: LayerNames


def _places(checkpoint: Checkpoint, record: ExpertRecord, sizes: Sizes, found: Found) -> Iterator[_Place]:
    """Yield the layers with experts in order, those that do not run last; the stack and the set of layers checked."""
    routed = {key: layer for key, layer in found.layers.items() if layer.routed}
    stacks = sorted({before for before, _ in routed})
    if len(stacks) > 1:
        raise InputError(
            "E423", f"{checkpoint.label} holds experts under both {stacks[0]}* and {stacks[1]}*; only one is read",
            help="a conversion left both behind; remove one of them",
        )  # fmt: skip
    inside = {index for _, index in routed if index < sizes.layers}
    beyond = sorted(index for _, index in routed if index >= sizes.layers)
    if inside != sizes.moe_layers:
        missing, more = sorted(sizes.moe_layers - inside), sorted(inside - sizes.moe_layers)
        wrong = (
            f"layer {missing[0]} should hold experts and holds none"
            if missing
            else f"layer {more[0]} holds experts and should not"
        )
        raise InputError(
            "E423", f"{checkpoint.label}: by its configuration {wrong}",
            help=f"{len(missing)} layers lack experts, {len(more)} have them against the configuration"
            if len(missing) + len(more) > 1 else "the model is incomplete, or its configuration belongs to another",
        )  # fmt: skip
    if beyond and not record.extra.appended:
        raise InputError(
            "E423", f"{checkpoint.label}: layer {beyond[0]} holds experts, but there are {sizes.layers} layers",
            help="the configuration belongs to another model, or the record must say that layers are appended",
        )  # fmt: skip
    if not inside:
        raise InputError(
            "E423", f"{checkpoint.label}: only layers that its model does not run hold experts",
            help="nothing can be said of experts that never run; leave these layers out",
        )  # fmt: skip
    further = sorted(index for (_, index), layer in found.extra.items() if layer.routed)
    if len(further) != len(set(further)):
        raise InputError(
            "E423", f"{checkpoint.label}: the record of {record.family} gives two names to further layer {further[0]}",
            help="leave one of them under extra.layers",
        )  # fmt: skip
    for index in sorted(inside) + beyond:
        yield _Place(index, index < sizes.layers, routed[stacks[0], index])
    start = max([sizes.layers, *(index + 1 for index in beyond)])
    for (_, index), layer in sorted(found.extra.items(), key=lambda item: item[0][1]):
        if layer.routed:
            yield _Place(start + index, False, layer)


def _between(
    checkpoint: Checkpoint, record: ExpertRecord, sizes: Sizes, layers: list[ExpertLayer]
) -> Iterator[InputError]:
    """Yield what is wrong between layers that are right by themselves."""
    counts = {layer.count for layer in layers}
    if counts != {sizes.experts}:
        odd = next(layer for layer in layers if layer.count != sizes.experts)
        which = (
            f"every layer holds {odd.count} experts" if len(counts) == 1 else
            f"layer {odd.index} holds {odd.count} experts"
        )  # fmt: skip
        yield InputError(
            "E423", f"{checkpoint.label}: {which}, {sizes.experts_key} = {sizes.experts}",
            help="layers with different numbers of experts load in no stock program" if len(counts) > 1
            else "the configuration was not updated with the weights",
        )  # fmt: skip
    running = [layer for layer in layers if layer.runs]
    for kind, of in (
        ("storage", lambda layer: layer.storage),
        ("correction bias", lambda layer: "a" if any(layer.of("correction_bias")) else "no"),
        ("router bias", lambda layer: "a" if any(layer.of("router_bias")) else "no"),
    ):
        first = running[0]
        other = next((layer for layer in running if of(layer) != of(first)), None)
        if other is not None:
            says = (
                f"layer {first.index} stores its experts {of(first)}, layer {other.index} {of(other)}"
                if kind == "storage" else
                f"layer {first.index} has {of(first)} {kind}, layer {other.index} {of(other)}{'' if of(other) == 'a' else 'ne'}"
            )  # fmt: skip
            yield InputError("E423", f"{checkpoint.label}: {says}", help="layers of one model must be alike")


def _dense(checkpoint: Checkpoint) -> InputError:
    return InputError(
        "E420", f"{checkpoint.label} is a dense model: it has no experts",
        help="`surgeon prune` without an expert method cuts dense models: heads, channels, layers",
    )  # fmt: skip


def _unknown(checkpoint: Checkpoint) -> InputError:
    config = checkpoint.config or {}
    family = config.get("model_type")
    named = f'model_type "{printable(family)[:60]}"' if isinstance(family, str) else "no model_type"
    return InputError(
        "E421", f"{checkpoint.label} seems to have experts, but there is no record of how its family ({named}) stores them",
        help="`surgeon inspect MODEL --experts --guess` prints a proposed record; check it and give it with "
        "--expert-record FILE",
    )  # fmt: skip


def _not_there(checkpoint: Checkpoint, record: ExpertRecord, sizes: Sizes) -> InputError:
    example = next((name for name in checkpoint.tensors if ROUTED.search(name)), None)
    first = min(sizes.moe_layers)
    return InputError(
        "E423", f"{checkpoint.label}: layer {first} should hold {sizes.experts} experts, but no tensor has a name that "
        f"{record.family} uses for them",
        where=Where(tensor=printable(example)) if example else None,
        help="the weights are of another family or were renamed; `surgeon inspect MODEL --experts --guess` proposes "
        "a record for --expert-record",
    )  # fmt: skip
