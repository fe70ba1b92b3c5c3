"""From a target and statistics to a cut: which experts or channels stay."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.dtypes import CODES, DTYPES
from surgeon.checkpoint.header import printable
from surgeon.errors import InputError, UsageError, Where
from surgeon.experts import criteria
from surgeon.experts.select import select
from surgeon.prune.experts.request import kept_of
from surgeon.prune.experts.session import ExpertSession
from surgeon.prune.request import Target
from surgeon.structure.experts.check import valid_counts
from surgeon.structure.experts.cut import ExpertCut
from surgeon.structure.experts.view import ExpertView

REPORT_FILE = "pruning.json"
"""Companion that says which experts and channels of the source a model consists of, and why."""


@dataclass
class Choice:
    """What was decided for one target.

    Attributes:
        cut: what stays.
        keep: experts a layer keeps.
        replaced: tensors that take the place of the source's (merged experts), None without.
        layers: layer -> what the report says of it.
        remarks: sentences for the user.
        record: what a method says about how it decided; for the manifest.
        deployable: False for a layout that is only evaluated.
    """

    cut: ExpertCut
    keep: int
    replaced: Checkpoint | None = None
    layers: dict[int, dict[str, Any]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)
    deployable: bool = True


def choose(session: ExpertSession, target: Target) -> Choice:
    """Return the cut for a target.

    Raises:
        UsageError: E239, E258 the target cannot be met; InputError: what methods raise.
    """
    request = session.request
    if request.from_report is not None:
        return reported(session)
    if request.method == "heapr":
        from surgeon.prune.experts import channels

        return channels.choose(session, target)
    keep = keep_count(session, target)
    if request.method in ("stun", "hc-smoe", "m-smoe", "naee"):
        from surgeon.prune.experts import grouped

        choice = grouped.choose(session, keep)
    else:
        choice = _by_score(session, keep)
    return choice


def keep_count(session: ExpertSession, target: Target) -> int:
    """Return how many experts every layer keeps for a target.

    Raises:
        UsageError: E258, E239 no number of experts meets it; the nearest ones are named.
    """
    experts = session.experts
    possible = valid_counts(experts)
    if target.kind == "experts":
        wanted = kept_of(target.pattern, experts.count)
        exact = target.pattern.isdigit()
    elif target.kind == "sparsity":
        wanted, exact = round((1 - target.value) * experts.count), False
    else:
        return _within(session, target, possible)
    if wanted in possible:
        return wanted
    below = max((n for n in possible if n < wanted), default=None)
    above = min((n for n in possible if n > wanted), default=None)
    if not exact and above is not None and below is not None:
        return above  # a fraction between two numbers keeps the larger
    near = " or ".join(str(n) for n in (below, above) if n is not None)
    if wanted < experts.top_k:
        reason = f"every token uses {experts.top_k} experts"
    else:
        reason = f"the router has {experts.groups} groups, of which a token uses {experts.topk_group}"
    raise UsageError("E239", f"{wanted} experts a layer cannot be kept: {reason}", help=f"keep {near}")


def _within(session: ExpertSession, target: Target, possible: tuple[int, ...]) -> int:
    """Return the largest number of experts whose model is no larger than a number of bytes or parameters."""
    low, high = 0, len(possible) - 1
    if size_of(session, possible[0], target.kind) > target.value:
        least, most = (size_of(session, possible[n], target.kind) for n in (0, -1))
        unit = "bytes" if target.kind == "size" else "parameters"
        raise UsageError("E258", f"{target.value:,.0f} {unit} cannot be reached by dropping experts: {least:,} to {most:,} can",
                         help="--method heapr narrows the experts that stay; quantize the result")  # fmt: skip
    while low < high:
        middle = (low + high + 1) // 2
        if size_of(session, possible[middle], target.kind) <= target.value:
            low = middle
        else:
            high = middle - 1
    return possible[low]


def size_of(session: ExpertSession, keep: int, kind: str) -> int:
    """Return bytes ("size") or parameters of the weights when every layer keeps so many experts."""
    return measured(view_of(session, keep), kind, session.request.dtype)


def view_of(session: ExpertSession, keep: int) -> ExpertView:
    """Return the model in which every layer keeps its first so many experts.

    Raises:
        What `ExpertView` raises.
    """
    experts = session.experts
    each, size = keep // experts.groups, experts.count // experts.groups
    kept = tuple(g * size + n for g in range(experts.groups) for n in range(each))
    return ExpertView(
        session.checkpoint, experts, with_idle(session, {layer.index: kept for layer in experts.running})
    )


def measured(view: Checkpoint, kind: str, dtype: str | None) -> int:
    """Return bytes ("size") or parameters of a view as it would be written."""
    if kind != "size":
        return sum(info.elements for info in view.tensors.values())
    bits = DTYPES[CODES[dtype]].bits if dtype else 0
    stored = getattr(view, "stored_dtype", lambda name: view.tensors[name].dtype)
    return sum(
        info.elements * bits // 8 if bits and DTYPES[stored(name)].family == "float" else info.nbytes
        for name, info in view.tensors.items()
    )


# ---- by scores -----------------------------------------------------------------------------------


def scores_of(session: ExpertSession, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a layer's scores by the request's criterion, and the tokens each expert was given."""
    request, experts = session.request, session.experts
    criterion = criteria.get(request.method.replace("-", "_"))
    tokens = np.zeros(experts.count, np.int64)
    if session.needs_text:
        tokens = np.asarray(session.statistics.total(layer).tokens)
    if criterion.needs == "routing":
        return criteria.mixed(
            session.statistics, criterion, layer=layer, how=request.mix, weights=request.weights or None
        ), tokens  # fmt: skip
    if criterion.needs == "weights":
        return criterion.score(
            session.runnable, session.runnable_experts, session.runnable_experts.layer(layer)
        ), tokens
    return criterion.score(layer, experts.count, request.seed), tokens


def _by_score(session: ExpertSession, keep: int) -> Choice:
    experts = session.experts
    kept, layers = {}, {}
    for number, layer in enumerate(experts.running):
        session.tell("scoring experts", number, len(experts.running))
        scores, tokens = scores_of(session, layer.index)
        protected = session.protected.get(layer.index, frozenset())
        chosen = select(
            scores, tokens, keep, groups=experts.groups, protected=protected, where=f"layer {layer.index}"
        )
        kept[layer.index] = chosen
        layers[layer.index] = {
            "kept": list(chosen), "dropped": sorted(set(range(experts.count)) - set(chosen)), "protected": sorted(protected),
            "scores": [float(f"{value:.9g}") for value in scores], "tokens": [int(value) for value in tokens],
        }  # fmt: skip
    choice = Choice(with_idle(session, kept), keep, layers=layers)
    choice.remarks += _silent(session, layers, keep)
    return choice


def _silent(session: ExpertSession, layers: Mapping[int, dict[str, Any]], keep: int) -> list[str]:
    """Say which layers kept experts that no token of the text reached (fault J4)."""
    if not session.needs_text:
        return []
    found = []
    few = {layer: sum(n > 0 for n in one["tokens"]) for layer, one in layers.items()}
    short = {layer: used for layer, used in few.items() if used < keep}
    if short:
        layer, used = next(iter(short.items()))
        found.append(f"{len(short)} layers keep experts that no token of the text was given (layer {layer}: {used} of {session.experts.count} "
                     "were used); those were filled up by number: more text would choose better")  # fmt: skip
    return found


def with_idle(session: ExpertSession, kept: Mapping[int, tuple[int, ...]]) -> ExpertCut:
    """Add the layers that no forward pass runs: they copy the last layer's choice, or are left out."""
    idle = [layer.index for layer in session.experts.layers if not layer.runs]
    if not idle or session.request.mtp == "drop":
        return ExpertCut(dict(kept), without=tuple(idle))
    last = kept[session.experts.running[-1].index]
    return ExpertCut({**kept, **dict.fromkeys(idle, last)})


def idle_remarks(session: ExpertSession) -> list[str]:
    """Say what became of layers that predict further tokens."""
    idle = [layer.index for layer in session.experts.layers if not layer.runs]
    if not idle:
        return []
    which = f"layer {idle[0]}" if len(idle) == 1 else f"layers {idle[0]} to {idle[-1]}"
    if session.request.mtp == "drop":
        return [f"{which} (multi-token prediction) left out"]
    return [f"{which} (multi-token prediction) keeps the experts chosen for layer {session.experts.running[-1].index}: "
            "no forward pass shows its own routing"]  # fmt: skip


# ---- from a report -------------------------------------------------------------------------------


def reported(session: ExpertSession) -> Choice:
    """Return the cut of an earlier result's report.

    Raises:
        InputError: E408 it is none, one of another kind of model, or one that needs weights it does not hold.
    """
    file = Path(session.request.from_report or "").expanduser()
    place = file / REPORT_FILE if file.is_dir() else file
    try:
        document = json.loads(place.read_bytes())
        family, of = str(document["family"]), int(document["of"])
        cut = ExpertCut.from_document(document["experts"])
        keep = len(next(iter(cut.kept.values()))) if cut.kept else session.experts.count
        layers = {int(layer): entry for layer, entry in document.get("layers", {}).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError("E408", f"{place} is no report of pruned experts: {type(error).__name__}", where=Where(str(place)),
                         help=f"give the {REPORT_FILE} of a model that surgeon prune wrote, or its folder") from None  # fmt: skip
    if document.get("replaced"):
        raise InputError("E408", f"{place} describes merged experts, whose weights are not in the report", where=Where(str(place)),
                         help="run the method again")  # fmt: skip
    experts = session.experts
    if (family, of) != (experts.record.family, experts.count):
        # Numbers of experts would fit many models, and say nothing about their experts.
        raise InputError("E408", f"{place} is about a {printable(family)[:60]} model with {of} experts a layer, and {session.source.key} is a "
                         f"{experts.record.family} model with {experts.count}", where=Where(str(place)),
                         help="give a report made from this model or another checkpoint of it, or --keep-experts instead of --from-report")  # fmt: skip
    return Choice(cut, keep, layers=layers)


def report_of(session: ExpertSession, choice: Choice, target: Target | None) -> bytes:
    """Return the content of `REPORT_FILE`."""
    document = {
        "experts": choice.cut.document(), "family": session.experts.record.family, "of": session.experts.count,
        "method": session.request.method, "target": target.name if target else None,
        "replaced": choice.replaced is not None, "record": choice.record,
        "layers": {str(layer): entry for layer, entry in sorted(choice.layers.items())},
    }  # fmt: skip
    return (json.dumps(document, separators=(",", ":"), sort_keys=True) + "\n").encode()
