"""The gradual setting: prune a little, distil, prune on from there; every stage is a member of the family.

Source: ZipLM (arXiv 2302.04089, section 4). Statistics are collected anew from each stage's model, so a
module's size may only fall; the teacher is the dense source throughout.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from surgeon.calibrate import data
from surgeon.calibrate.data import Sample
from surgeon.checkpoint.checkpoint import Checkpoint, open_path
from surgeon.deploy import per_layer
from surgeon.deploy.build import load
from surgeon.derive import Source
from surgeon.errors import UsageError
from surgeon.measure.correction import fit_correction
from surgeon.prune import quality
from surgeon.prune.members import KEPT_FILE, Member, build, kept_document
from surgeon.prune.request import Target
from surgeon.prune.session import Session
from surgeon.structure.check import shapes
from surgeon.structure.cut import Cut, compose
from surgeon.train.distill import Correspondence, Options, distill


def build_family(session: Session, targets: tuple[Target, ...], title: str) -> dict[str, Member]:
    """Return the members of a family, each pruned from the one before and distilled from the source.

    Raises:
        UsageError: E271 the source's family cannot be trained here, or a cut of the residual stream.
    """
    if "hidden" in session.structures:
        raise UsageError("E271", "--distill compares hidden states, so the residual stream must stay whole",
                         help="leave hidden out of --structures")  # fmt: skip
    samples = _samples(session)
    found: dict[str, Member] = {}
    current, total = session, Cut.whole(session.structure.layers)
    for target in targets:
        member = build(current, _relative(session, current, target), title)
        total = compose(total, member.decision.cut)
        member.target = target
        trained = _distilled(session, current, target, total, samples)
        _finish(session, member, trained, total)
        found[target.name if len(targets) > 1 else ""] = member
        if target is not targets[-1]:
            current = _next(session, current, member, trained, target)
    return found


def _samples(session: Session) -> list[Sample]:
    from surgeon.data.records import parse_sources

    request = session.request
    found = data.load(
        parse_sources(list(request.calibration)) if request.calibration else None, session.folder,
        samples=min(request.distill_steps * request.distill_batch, 100_000), sequence_length=request.distill_length,
        seed=request.seed, pack=True, offline=request.offline,
    )  # fmt: skip
    session.say(f"distilling on {found.record['tokens']:,} tokens in {len(found.samples):,} blocks")
    return list(found.samples)


def _relative(first: Session, current: Session, target: Target) -> Target:
    """Return a target, given against the source, as one against the current stage's model."""
    if current is first or target.kind in ("params", "size", "layers"):
        return target
    if target.kind == "speedup":
        table = current.table
        whole = Cut.whole(current.structure.layers)
        reached = first.table.dense / table.total(shapes(whole, current.structure))
        return replace(target, value=target.value / reached)
    size, now = first.goal(target).cost, current.goal(target).cost
    left = size.prunable() * (1 - target.value)
    return replace(target, value=1 - left / now.prunable())


def _distilled(first: Session, current: Session, target: Target, total: Cut, samples: list[Sample]) -> Path:
    """Train a stage's candidate; return the folder of the trained model."""
    request = first.request
    output = first.work / "stages" / target.name
    if output.exists():
        shutil.rmtree(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    decoder = first.decoder
    options = Options(
        steps=request.distill_steps, batch=request.distill_batch, rate=request.learning_rate, seed=request.seed,
        task=1.0 if decoder else 0.0, logit=1.0, token=1.0,
    )  # fmt: skip
    held_out = [Sample(ids, 0) for ids in first.texts.held_out]
    layers = (
        None if len(total.kept_layers) == first.structure.layers else Correspondence(layers=total.kept_layers)
    )
    record = distill(
        current.work / "candidate", first.folder, samples, options, first.work / "training" / target.name, output,
        device=first.settings.device, held_out=held_out, correspondence=layers, stop=first.stop,
        progress=lambda done, steps: first.tell(f"distilling {target.name}", done, steps),
    )  # fmt: skip
    first.say(
        f"{target.name}: distilled {options.steps} steps: {_losses(record['before'])} -> {_losses(record['after'])}"
    )
    first.keep(f"distilled-{target.name}.json", {k: v for k, v in record.items() if k != "history"})
    return output


def _losses(found: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in found.items())


def _finish(session: Session, member: Member, folder: Path, total: Cut) -> None:
    """Let a member be the trained model: its weights, its quality, its kept units counted in the source."""
    trained = open_path(folder, session.source.checkpoint.label)
    derived = member.derived
    files = {**derived.companions, KEPT_FILE: kept_document(total)}
    recipe = {**derived.recipe, "kept": total.identity(), "layers": list(total.kept_layers)}
    member.derived = replace(derived, view=_Configured(trained, dict(derived.view.config or {})), companions=files,
                             recipe=recipe, method=f"{derived.method}, distilled")  # fmt: skip
    held_out, settings = session.texts.held_out, session.settings
    before = member.quality
    if per_layer.is_per_layer(trained.config or {}):
        model = load(folder, dtype=settings.torch_dtype)
        member.quality = quality.compare_whole(
            session.source.checkpoint, model, held_out, settings, session.reference
        )
    else:
        member.quality = quality.compare(session.source.checkpoint, trained, held_out, settings, decoder=session.decoder,
                                         reference=session.reference)  # fmt: skip
    key = "kl" if session.decoder else "nmse"
    member.remarks.append(
        f"distillation: {key} {before[key]:.4g} -> {member.quality[key]:.4g} on held-out text"
    )


class _Configured:
    """A trained checkpoint with the configuration its member is published with."""

    def __init__(self, inner: Checkpoint, config: dict) -> None:
        self._inner, self.config = inner, config
        self.label, self.folder, self.headers, self.tensors = (
            inner.label,
            inner.folder,
            inner.headers,
            inner.tensors,
        )
        self.read, self.read_bytes, self.granularity = inner.read, inner.read_bytes, inner.granularity


def _next(first: Session, current: Session, member: Member, folder: Path, target: Target) -> Session:
    """Return the session that prunes on from a trained stage."""
    source = Source(first.source.key, open_path(folder, str(folder)), str(folder))
    session = Session(
        source,
        first.request,
        first.work / f"after-{target.name}",
        first.tell,
        first.say,
        first.stop,
        origin=first,
    )
    # The same text, table and kind of attention units: only the model is new.
    session.__dict__["texts"] = first.texts
    session.__dict__["decoder"] = first.decoder
    session.__dict__["workload"] = first.workload
    if target.kind == "speedup":
        table = first.table
        if member.measured is not None:
            total = shapes(Cut.whole(session.structure.layers), session.structure)
            table = table.corrected(**fit_correction(table, [(total, member.measured.ratio)]))
        session.__dict__["table"] = table
    session.__dict__["modes"] = tuple(mode for mode in current.modes if _still(session, first, mode))
    return session


def _still(session: Session, first: Session, mode: str) -> bool:
    """Say whether a kind of attention unit may go on being removed: kinds are never mixed in a model."""
    now = next((part for part in session.structure.attention if part is not None), None)
    then = next((part for part in first.structure.attention if part is not None), None)
    if now is None or then is None:
        return False
    if now.groups < then.groups:
        return mode == "groups" and now.groups > 1
    if now.per_group < then.per_group:
        return mode == "heads" and now.per_group > 1
    return True
