"""Is a cut legal, and what are the sizes of what it leaves?

Legal means that some model can be built from it: kept units exist, every key/value head that stays
serves equally many query heads, and something is left. What a stock class of the library can hold is
a second question (`surgeon.structure.config`), asked here with ``for_stock``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from surgeon.errors import InputError, SurgeonError, UsageError, raise_all
from surgeon.structure.cut import Cut, Kept, LayerShape
from surgeon.structure.parts import Attention, Structure


def check(
    cut: Cut,
    structure: Structure,
    config: Mapping[str, Any],
    *,
    for_stock: bool = False,
    allow_norm_approx: bool = False,
) -> None:
    """Refuse a cut that no model can be made of; every layer that is wrong is named.

    Args:
        cut: what is kept.
        structure: of the source.
        config: config.json of the source.
        for_stock: also refuse what the library's own class cannot hold.
        allow_norm_approx: let heads be cut under a norm over all heads, whose statistics then change.

    Raises:
        UsageError: E260 kept units do not exist or are out of order, E261 key/value heads with different
            numbers of query heads, E262 a norm over all heads, E263 not uniform but must be.
        InputError: E366 a structure that cannot be cut, E367 no stock class holds the result,
            E368 the width of the residual stream cannot be cut here.
    """
    raise_all(_findings(cut, structure, allow_norm_approx))
    if cut.hidden is not None:
        from surgeon.structure.config import check_hidden

        check_hidden(cut, structure, config)
    if for_stock:
        from surgeon.structure.config import stock_config

        stock_config(config, structure, cut)


def shapes(cut: Cut, structure: Structure) -> tuple[LayerShape, ...]:
    """Return the sizes of the kept layers in order; zeros where a layer has no such structure (left)."""
    return tuple(_shape(cut, structure, layer) for layer in cut.kept_layers)


def is_uniform(cut: Cut, structure: Structure) -> bool:
    """Say whether all kept layers have equal attention and equal FFNs; layers without one do not count.

    A layer whose attention or FFN was removed altogether makes the model non-uniform.
    """
    attention: set[tuple[int, int]] = set()
    ffn: set[int] = set()
    for layer, shape in zip(cut.kept_layers, shapes(cut, structure), strict=True):
        if structure.attention[layer] is not None:
            attention.add((shape.heads, shape.groups))
        if structure.ffn[layer] is not None:
            ffn.add(shape.ffn)
    return len(attention) <= 1 and len(ffn) <= 1 and (0, 0) not in attention and 0 not in ffn


def kept_heads(cut: Cut, attention: Attention) -> Kept:
    """Return the query heads of a layer that stay."""
    layer = cut.layers[attention.layer]
    if layer is None:
        return ()
    return tuple(range(attention.heads)) if layer.heads is None else layer.heads


def kept_groups(heads: Kept, attention: Attention) -> Kept:
    """Return the key/value heads that stay with these query heads."""
    return tuple(sorted({head // attention.per_group for head in heads}))


def _shape(cut: Cut, structure: Structure, layer: int) -> LayerShape:
    whole, kept = structure.shape(layer), cut.layers[layer]
    assert kept is not None
    attention = structure.attention[layer]
    heads, groups = whole.heads, whole.groups
    if attention is not None and kept.heads is not None:
        heads, groups = len(kept.heads), len(kept_groups(kept.heads, attention))
    return LayerShape(
        heads, groups, whole.head_dim, whole.ffn if kept.channels is None else len(kept.channels)
    )


def _findings(cut: Cut, structure: Structure, allow_norm_approx: bool) -> list[SurgeonError]:
    if len(cut.layers) != structure.layers:
        return [UsageError("E260", f"the cut describes {len(cut.layers)} layers, the model has {structure.layers}",
                           help="it was made for another model")]  # fmt: skip
    if not cut.kept_layers:
        return [UsageError("E260", "the cut keeps no layer", help="a model needs at least one")]
    found: list[SurgeonError] = []
    for layer in cut.kept_layers:
        kept = cut.layers[layer]
        assert kept is not None
        attention, ffn = structure.attention[layer], structure.ffn[layer]
        if kept.heads is not None:
            if attention is None:
                found.append(_cannot(structure, layer, "attention"))
            else:
                found += _heads(kept.heads, attention, allow_norm_approx)
        if kept.channels is not None:
            if ffn is None:
                found.append(_cannot(structure, layer, "ffn"))
            else:
                found += _units(f"layer {layer}", "FFN channels", kept.channels, ffn.width)
    if cut.hidden is not None:
        found += _units("the cut", "channels of the residual stream", cut.hidden, structure.hidden)
        if not cut.hidden:
            found.append(
                UsageError(
                    "E260", "the cut keeps no channel of the residual stream", help="at least one must stay"
                )
            )
    return found


def _units(place: str, what: str, kept: Kept, count: int) -> list[SurgeonError]:
    if any(low >= high for low, high in pairwise(kept)):
        return [
            UsageError(
                "E260",
                f"{place} keeps {what} that are not in ascending order, or one twice",
                help="name each once, from low to high",
            )
        ]
    if kept and not 0 <= kept[0] <= kept[-1] < count:
        wrong = kept[0] if kept[0] < 0 else kept[-1]
        return [
            UsageError(
                "E260",
                f"{place} keeps {what} {wrong}, but there are 0 to {count - 1}",
                help="the cut was made for another model; choose it on this one",
            )
        ]
    return []


def _heads(kept: Kept, attention: Attention, allow_norm_approx: bool) -> list[SurgeonError]:
    place = f"layer {attention.layer}"
    found = _units(place, "query heads", kept, attention.heads)
    if found:
        return found
    counts = Counter(head // attention.per_group for head in kept)
    if len(set(counts.values())) > 1:
        most, least = max(counts, key=counts.__getitem__), min(counts, key=counts.__getitem__)
        return [UsageError(
            "E261", f"{place} keeps {counts[most]} query heads of key/value head {most} but {counts[least]} of {least}",
            help="remove whole groups, or equally many query heads from every group; no runtime loads anything else",
        )]  # fmt: skip
    if attention.norms and 0 < len(kept) < attention.heads and not allow_norm_approx:
        return [UsageError(
            "E262", f"{place} normalises queries and keys over all {attention.heads} heads at once, "
            f"so removing {attention.heads - len(kept)} changes what the others compute",
            help="allow it with --allow-norm-approx and measure the result, or prune FFN channels and layers only",
        )]  # fmt: skip
    return []


def _cannot(structure: Structure, layer: int, part: str) -> InputError:
    reason = next(
        (text for number, text in structure.reasons if number == layer and text.startswith(part)), part
    )
    return InputError("E366", f"layer {layer} of this {structure.model_type} model cannot be cut there; {reason}",
                      help="leave it whole in the cut")  # fmt: skip
