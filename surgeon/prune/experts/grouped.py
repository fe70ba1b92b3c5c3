"""Methods that look at a layer's experts together: clusters, merged experts, best subsets."""

from __future__ import annotations

from typing import Any

from surgeon.prune.experts.decide import Choice, with_idle
from surgeon.prune.experts.session import ExpertSession


def choose(session: ExpertSession, keep: int) -> Choice:
    """Return what stays, and merged tensors, by stun, hc-smoe, m-smoe or naee.

    Raises:
        UsageError: E248; InputError: E442-E444.
    """
    request, experts = session.request, session.experts
    how: dict[str, Any] = {
        "protected": session.protected, "stop": session.stop,
        "progress": lambda done, total: session.tell(f"choosing experts ({request.method})", done, total),
    }  # fmt: skip
    replaced: Any = None
    if request.method == "naee":
        from surgeon.prune.experts.subsets import naee

        samples = [sample.ids for sample in session.texts.statistics]
        cut, record = naee(
            session.runnable, samples, session.plain_settings, session.runnable_experts, keep, **how
        )
    elif request.method == "stun":
        from surgeon.prune.experts.stun import stun

        cut, replaced, record = stun(
            session.checkpoint, experts, keep, router=request.router or "average", **how
        )
    else:
        from surgeon.prune.experts import merging
        from surgeon.prune.experts.features import collect_features

        samples = [sample.ids for sample in session.texts.statistics]
        features = collect_features(
            session.checkpoint, samples, session.plain_settings, experts, sums=request.method == "hc-smoe",
            logits=request.method == "m-smoe", stop=session.stop,
            progress=lambda done, total: session.tell("calibrating", done, total),
        )  # fmt: skip
        method = merging.hc_smoe if request.method == "hc-smoe" else merging.m_smoe
        cut, replaced, record = method(
            session.checkpoint,
            experts,
            keep,
            features=features,
            router=request.router or "representative",
            **how,
        )
    record = dict(record)
    remarks = list(record.pop("remarks", ()))
    layers = {
        int(layer): entry if isinstance(entry, dict) else {"clusters": entry}
        for layer, entry in record.pop("layers").items()
    }
    kept = {layer.index: cut.kept[layer.index] for layer in experts.running}
    for layer in experts.running:
        layers.setdefault(layer.index, {})["kept"] = list(kept[layer.index])
    return Choice(with_idle(session, kept), keep, replaced, layers, remarks, record)
