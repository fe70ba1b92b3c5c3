"""Is a cut of experts legal? Everything that stock readers refuse, or get wrong without a word, is refused here first.

The traps (each seen with transformers 5.23 on small models): a router of groups cuts its rows at fixed borders, so
groups that keep different numbers shift without any error; groups too small to hold the chosen experts let tokens
go to masked ones; layers with different numbers, and experts of different width, do not load.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from itertools import pairwise

from surgeon.errors import InputError, SurgeonError, UsageError, raise_all
from surgeon.structure.experts.cut import ExpertCut
from surgeon.structure.experts.parts import ExpertLayer, Experts

BLOCK = 128
"""Channels of a block that shares one scale in block-quantized FP8."""

GROUPED_MATMUL = {"BF16": 8, "F16": 8, "F32": 4}
"""Storage type -> multiple the experts' width must be for torch's grouped matrix product (rows of 16 bytes)."""


def check(experts: Experts, cut: ExpertCut, *, block: int = BLOCK) -> None:
    """Refuse a cut that no stock reader holds, before anything is written; everything wrong is named.

    Args:
        experts: of the source.
        cut: what stays.
        block: channels that share a scale in block-quantized FP8 (``weight_block_size`` of config.json).

    Raises:
        UsageError: E243 unknown layers, experts or channels, or not ascending; too few experts for the tokens; not
            the same number in every layer and routing group; widths that differ; prediction layers left out in part.
        InputError: E404 channels of quantized experts; experts of a family that counts other parts by their number.
    """
    raise_all(_findings(experts, cut, block))


def stored_width(experts: Experts, cut: ExpertCut) -> int:
    """Return the channels every expert is stored with after a legal cut."""
    if cut.width is not None:
        return cut.width
    return max(len(channels) for _, _, channels in kept_channels(experts, cut))


def kept_channels(experts: Experts, cut: ExpertCut) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """Yield (layer, expert, channels that stay) for every expert that stays."""
    everything = tuple(range(experts.width))
    for layer in experts.layers:
        if layer.index not in cut.without:
            for expert in cut.experts(layer.index, layer.count):
                yield layer.index, expert, cut.channels.get((layer.index, expert), everything)


def count_after(experts: Experts, cut: ExpertCut) -> int:
    """Return the experts of every layer after a legal cut."""
    layer = next(layer for layer in experts.layers if layer.index not in cut.without)
    return len(cut.experts(layer.index, layer.count))


def least_in_group(experts: Experts) -> int:
    """Return how many experts a routing group must keep: two where a group's score is the sum of its two best."""
    return 2 if experts.groups > 1 and experts.record.router.groups == "top2_sum" else 1


def valid_counts(experts: Experts) -> tuple[int, ...]:
    """Return every number of experts a layer may keep, ascending."""
    found = []
    for count in range(experts.groups, experts.count + 1, experts.groups):
        each = count // experts.groups
        if min(count, experts.topk_group * each) >= experts.top_k and each >= least_in_group(experts):
            found.append(count)
    return tuple(found)


def nearest_counts(experts: Experts, count: int) -> str:
    """Return the legal numbers around one that is not, as words."""
    allowed = valid_counts(experts)
    below, above = [n for n in allowed if n < count], [n for n in allowed if n > count]
    around = [str(n) for n in (*below[-1:], *above[:1])]
    return " or ".join(around) if around else "no number"


def alignment_notes(experts: Experts, cut: ExpertCut, codes: Collection[str] = ("BF16",)) -> list[str]:
    """Return what fast paths of readers miss about the sizes of a legal cut, as sentences.

    Args:
        codes: storage types of the experts' matrices.
    """
    notes = []
    width, count = stored_width(experts, cut), count_after(experts, cut)
    for code in sorted(codes):
        multiple = GROUPED_MATMUL.get(code)
        if multiple and width % multiple:
            notes.append(f"experts of {width} channels in {code} do not run in torch's grouped matrix product, which transformers "
                         f"uses by default: it needs a multiple of {multiple}; load with experts_implementation=\"eager\"")  # fmt: skip
    if count != experts.count and count % 8 and experts.count % 8 == 0:
        notes.append(f"{count} experts cannot be spread equally over 8 devices (expert parallelism)")
    return notes


def _findings(experts: Experts, cut: ExpertCut, block: int) -> list[SurgeonError]:
    found = list(_layers(experts, cut))
    if found:
        return found
    counts: dict[int, int] = {}
    for layer in experts.layers:
        if layer.index in cut.without:
            continue
        kept = cut.experts(layer.index, layer.count)
        wrong = _ids(f"layer {layer.index}", "experts", kept, layer.count)
        if wrong is None:
            counts[layer.index] = len(kept)
            wrong = _grouped(experts, layer, kept)
        if wrong is not None:
            found.append(wrong)
    if len(set(counts.values())) > 1:
        found.insert(0, _unequal(counts))
    elif counts and not found:
        found += _count(experts, next(iter(counts.values())))
    if not found and experts.record.elsewhere and count_after(experts, cut) != experts.count:
        found.append(_elsewhere(experts))
    if found:
        return found
    return [*_channels(experts, cut), *_scales(experts, cut), *_quantized(experts, cut, block)]


def _layers(experts: Experts, cut: ExpertCut) -> Iterator[SurgeonError]:
    known = {layer.index for layer in experts.layers}
    named = {
        *cut.kept,
        *(layer for layer, _ in cut.channels),
        *(layer for layer, _ in cut.scales),
        *cut.without,
    }
    for layer in sorted(named - known):
        yield UsageError("E243", f"the cut speaks of experts of layer {layer}, which has none",
                         help="it was made for another model")  # fmt: skip
    beyond = {layer.index for layer in experts.layers if not layer.runs}
    for layer in sorted(set(cut.without) & (known - beyond)):
        yield UsageError("E243", f"layer {layer} runs in every pass and cannot be left out",
                         help="only layers that predict further tokens can")  # fmt: skip
    left = beyond - set(cut.without)
    if left and set(cut.without) & beyond:
        yield UsageError("E243", f"of the layers that predict further tokens, {min(left)} stays and {min(cut.without)} goes",
                         help="leave out all of them, or none")  # fmt: skip


def _ids(place: str, what: str, kept: tuple[int, ...], count: int) -> SurgeonError | None:
    if not kept:
        return UsageError("E243", f"{place} keeps no {what}", help="at least one must stay")
    if any(low >= high for low, high in pairwise(kept)):
        return UsageError(
            "E243",
            f"{place} keeps {what} that are not in ascending order, or one twice",
            help="name each once, from low to high",
        )
    if not 0 <= kept[0] <= kept[-1] < count:
        wrong = kept[0] if kept[0] < 0 else kept[-1]
        return UsageError(
            "E243",
            f"{place} keeps {what} {wrong}, but there are 0 to {count - 1}",
            help="the cut was made for another model; choose it on this one",
        )
    return None


def _grouped(experts: Experts, layer: ExpertLayer, kept: tuple[int, ...]) -> SurgeonError | None:
    """Return what is wrong with how many experts the routing groups of a layer keep."""
    if experts.groups == 1:
        return None
    size = layer.count // experts.groups
    each = [sum(expert // size == group for expert in kept) for group in range(experts.groups)]
    if len(set(each)) == 1:
        return None
    most, least = each.index(max(each)), each.index(min(each))
    return UsageError(
        "E243", f"layer {layer.index} keeps {each[most]} experts of routing group {most} but {each[least]} of group {least}; readers "
        "would shift the borders of the groups without an error", help="keep equally many in every group",
    )  # fmt: skip


def _elsewhere(experts: Experts) -> SurgeonError:
    return InputError("E404", f"{experts.record.family} models count other parts, such as attention, by the number of experts, so none can go",
                      help="prune channels of the experts instead")  # fmt: skip


def _unequal(counts: dict[int, int]) -> SurgeonError:
    first, *others = counts
    other = next(layer for layer in others if counts[layer] != counts[first])
    return UsageError("E243", f"layer {first} keeps {counts[first]} experts and layer {other} keeps {counts[other]}",
                      help="keep the same number in every layer; no stock class holds anything else")  # fmt: skip


def _count(experts: Experts, count: int) -> Iterator[SurgeonError]:
    """Yield what is wrong with a number of experts that is the same everywhere."""
    near = nearest_counts(experts, count)
    if count < experts.top_k:
        yield UsageError(
            "E243", f"{count} experts stay, but every token goes to {experts.top_k}", help=f"keep {near}"
        )
        return
    if experts.groups == 1:
        return
    each = count // experts.groups
    if experts.topk_group * each < experts.top_k:
        yield UsageError(
            "E243", f"a token may use {experts.topk_group} of {experts.groups} routing groups, which then hold {experts.topk_group * each} "
            f"experts, but it goes to {experts.top_k}; readers would send tokens anywhere without an error", help=f"keep {near}",
        )  # fmt: skip
    elif each < least_in_group(experts):
        yield UsageError("E243", f"{count} experts leave {each} in every routing group, and groups are scored by their two best",
                         help=f"keep {near}")  # fmt: skip


def _channels(experts: Experts, cut: ExpertCut) -> list[SurgeonError]:
    found: list[SurgeonError] = []
    widths: dict[int, tuple[int, int]] = {}
    for layer, expert, channels in kept_channels(experts, cut):
        if (layer, expert) in cut.channels:
            wrong = _ids(f"expert {expert} of layer {layer}", "channels", channels, experts.width)
            if wrong is not None:
                found.append(wrong)
        widths.setdefault(len(channels), (layer, expert))
    if found:
        return found
    if cut.width is None and len(widths) > 1:
        (one, place), (other, place2) = list(widths.items())[:2]
        return [UsageError("E243", f"expert {place[1]} of layer {place[0]} keeps {one} channels and expert {place2[1]} of layer {place2[0]} keeps "
                           f"{other}, which no stock class holds", help="keep equally many, or set a width they are padded to")]  # fmt: skip
    if cut.width is not None and cut.width < max(widths):
        layer, expert = widths[max(widths)]
        return [UsageError("E243", f"expert {expert} of layer {layer} keeps {max(widths)} channels, more than the width of {cut.width}",
                           help=f"set a width of at least {max(widths)}, or keep fewer channels of it")]  # fmt: skip
    return []


def _scales(experts: Experts, cut: ExpertCut) -> Iterator[SurgeonError]:
    for (layer, expert), factor in cut.scales.items():
        count = experts.layer(layer).count
        if not 0 <= expert < count:
            yield UsageError(
                "E243",
                f"layer {layer} has no expert {expert} to scale; there are 0 to {count - 1}",
                help="count experts from 0",
            )
        elif not math.isfinite(factor) or factor == 0:
            yield UsageError("E243", f"expert {expert} of layer {layer} cannot be multiplied by {factor}",
                             help="give a number other than zero")  # fmt: skip


def _quantized(experts: Experts, cut: ExpertCut, block: int) -> Iterator[SurgeonError]:
    """Yield the layers whose stored experts cannot lose the channels the cut takes."""
    methods = {layer.index: layer.quantized for layer in experts.layers}
    everything = tuple(range(experts.width))
    seen: set[int] = set()
    for layer, expert, channels in kept_channels(experts, cut):
        method = methods[layer]
        padded = cut.width is not None and cut.width != len(channels)
        if method is None or layer in seen or (channels == everything and not padded):
            continue
        found = _unsliceable(layer, expert, channels, method, padded, block)
        if found is not None:
            seen.add(layer)
            yield found


def _unsliceable(layer: int, expert: int, channels: tuple[int, ...], method: str, padded: bool, block: int) -> SurgeonError | None:  # fmt: skip
    if method != "fp8":
        return InputError(
            "E404", f"the experts of layer {layer} are stored as {method}, whose channels cannot be taken apart",
            help="drop whole experts, or prune the model it was quantized from and quantize the result",
        )  # fmt: skip
    if padded:
        return InputError("E404", f"the experts of layer {layer} are stored as {method} and cannot be padded",
                          help="keep equally many channels of every expert")  # fmt: skip
    blocks = {channel // block for channel in channels}
    if len(channels) == len(blocks) * block:
        return None
    return InputError(
        "E404", f"expert {expert} of layer {layer} keeps parts of blocks of {block} channels, which share one scale in FP8",
        help=f"keep whole blocks of {block} channels, or prune the model before it is quantized",
    )  # fmt: skip
