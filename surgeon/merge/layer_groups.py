"""Which part of a model a measured score belongs to: a numbered layer, or a part of its own outside the layers.

Sens-Merging and FIM score layers. What lies outside them (token embedding, position embedding, final norm,
head) is scored as well, each module as one more "layer" named by its module name. A tied head is the
embedding: it has no score of its own and takes the embedding's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from surgeon.architectures import get
from surgeon.architectures.naming import layer_of
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.merge.layer_scores import LayerScores

BLOCK = 1 << 22
"""Elements of a weight and its gradient that are looked at together."""

Group = int | str
"""A layer number, or the module name of a part outside the layers such as "model.embed_tokens"."""


@dataclass(frozen=True)
class MeasuredScores:
    """Scores that were measured on models, and what they came from.

    Attributes:
        scores: model name -> factors of its task vector.
        made_by: plain data for the scores file and the manifest: settings, data, measured values; no paths.
    """

    scores: Mapping[str, LayerScores]
    made_by: Mapping[str, Any]


def group_of(name: str) -> Group:
    """Return the layer number of a tensor, or the module name of a tensor outside the layers."""
    place = layer_of(name)
    return place.index if place is not None else name.rpartition(".")[0] or name


def aliases(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the tied names of a checkpoint: each further name -> the name that counts (the embedding's)."""
    config = checkpoint.config or {}
    record = get(config.get("model_type"))
    if record is None:
        return {}
    groups = record.tied(config, list(checkpoint.tensors))
    return {copy: group[0] for group in groups for copy in group[1:]}


def buffers(checkpoint: Checkpoint) -> frozenset[str]:
    """Return the stored tensors that are no parameters (rotary frequencies, causal masks)."""
    config = checkpoint.config or {}
    record = get(config.get("model_type"))
    if record is None:
        return frozenset()
    expected = record.layout(config, list(checkpoint.tensors)).tensors
    return frozenset(n for n in checkpoint.tensors if n in expected and expected[n].kind == "buffer")


def row_blocks(*tensors: Any) -> Iterator[tuple[Any, ...]]:
    """Yield tensors of one shape in blocks of rows, so that what is computed on them stays small."""
    first = tensors[0]
    if first.ndim == 0 or first.numel() <= BLOCK:
        yield tensors
        return
    step = max(1, BLOCK * len(first) // first.numel())
    for start in range(0, len(first), step):
        yield tuple(tensor[start : start + step] for tensor in tensors)


def in_order(groups: Iterable[Group]) -> list[Group]:
    """Return layers by number, then the parts outside by name: one order for sums, files and messages."""
    found = set(groups)
    return [*sorted(g for g in found if isinstance(g, int)), *sorted(g for g in found if isinstance(g, str))]


def layer_scores(
    factors: Mapping[Group, float],
    names: Iterable[str],
    tied: Mapping[str, str],
    further: Iterable[tuple[str, float]] = (),
) -> LayerScores:
    """Return factors of groups as LayerScores: layers by number, the rest by exact tensor names.

    Args:
        factors: group -> factor.
        names: tensor names of the model; those outside the layers are listed one by one.
        tied: see `aliases`; a tied name without a factor takes that of the tensor it stands for.
        further: (pattern, factor) pairs that multiply in addition.
    """
    outside = {}
    for name in sorted({*names, *tied}):
        group = group_of(name)
        if group not in factors:
            group = group_of(tied.get(name, name))
        if layer_of(name) is None and group in factors:
            outside[name] = factors[group]
    return LayerScores(
        {group: factors[group] for group in in_order(factors) if isinstance(group, int)},
        (*outside.items(), *further),
    )
