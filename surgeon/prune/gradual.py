"""The gradual setting: prune a little, distil, prune on from there; every stage is a member of the family.

Source: ZipLM (arXiv 2302.04089, section 4). Statistics are collected anew from each stage's model, so a
module's size may only fall; the teacher is the dense source throughout.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from surgeon.calibrate import data, quality
from surgeon.calibrate.data import Sample
from surgeon.checkpoint.checkpoint import Checkpoint, open_path
from surgeon.checkpoint.digests import InputDigester
from surgeon.deploy import per_layer
from surgeon.deploy.build import load
from surgeon.derive import Source
from surgeon.measure.correction import fit_correction
from surgeon.prune.decide import in_words
from surgeon.prune.members import Member, build, write_candidate
from surgeon.prune.request import Target
from surgeon.prune.session import Session
from surgeon.prune.written import KEPT_FILE, kept_document
from surgeon.structure.check import shapes
from surgeon.structure.cut import Cut, compose
from surgeon.train.distill import Correspondence, Options, distill


def build_family(session: Session, targets: tuple[Target, ...], title: str) -> dict[str, Member]:
    """Return the members of a family, each pruned from the one before and distilled from the source.

    Stages that an interrupted run had trained are taken up, and one it was in the middle of goes on.
    """
    samples = _samples(session)
    found: dict[str, Member] = {}
    current, total = session, Cut.whole(session.structure.layers)
    for number, target in enumerate(targets, start=1):
        member = build(current, target, title)
        total = compose(total, member.decision.cut)
        trained = _distilled(session, current, member, total, samples)
        _finish(session, member, trained, total)
        found[target.name if len(targets) > 1 else ""] = member
        if number < len(targets):
            current = _next(session, current, member, trained)
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


def _distilled(first: Session, current: Session, member: Member, total: Cut, samples: list[Sample]) -> Path:
    """Train a stage's model; return the folder of the trained one."""
    request, target = first.request, member.target
    output, note = first.work / "stages" / target.name, first.work / f"stage-{target.name}.json"
    options = Options(
        steps=request.distill_steps, batch=request.distill_batch, rate=request.learning_rate, seed=request.seed,
        task=0.0, logit=1.0, token=1.0,  # the source is what a member has to be like, whatever the text says
    )  # fmt: skip
    cut = member.decision.cut.identity()
    key = hashlib.sha256(f"{current.key} {cut} {json.dumps(asdict(options))}".encode()).hexdigest()
    if _trained(output, note, key):
        first.say(f"{target.name}: taken up from an earlier run")
        return output
    shutil.rmtree(output, ignore_errors=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    # The folder of candidates holds the last one that was timed, which need not be the one that was chosen.
    student = write_candidate(current, member)
    whole = len(total.kept_layers) == first.structure.layers
    record = distill(
        student, first.folder, samples, options, first.work / "training" / target.name, output,
        device=first.settings.device, held_out=[Sample(ids, 0) for ids in first.texts.held_out],
        correspondence=None if whole else Correspondence(layers=total.kept_layers), stop=first.stop,
        progress=lambda done, steps: first.tell(f"distilling {target.name}", done, steps),
    )  # fmt: skip
    if per_layer.is_per_layer(member.derived.view.config or {}):
        for name, content in per_layer.companions():  # training writes weights and config.json alone
            (output / name).write_bytes(content)
    first.say(
        f"{target.name}: distilled {options.steps} steps: {_losses(record['before'])} -> {_losses(record['after'])}"
    )
    first.keep(note.name, {"key": key, **{k: v for k, v in record.items() if k != "history"}})
    return output


def _trained(output: Path, note: Path, key: str) -> bool:
    """Say whether a stage was trained by an earlier run; its note is written last."""
    try:
        return output.is_dir() and json.loads(note.read_bytes())["key"] == key
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _losses(found: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in found.items())


def _finish(session: Session, member: Member, folder: Path, total: Cut) -> None:
    """Let a member be the trained model: its weights, its quality, its kept units counted in the source."""
    trained = open_path(folder, session.source.checkpoint.label)
    derived = member.derived
    shape = in_words(total, session)
    # The files a distilled member is copied from are its own: what it was cut from is named here.
    digests = InputDigester(list(session.source.checkpoint.headers)).finish()
    source = {file.name: digest for file, digest in digests.items()}
    member.shape = shape
    member.derived = replace(
        derived, view=_Configured(trained, dict(derived.view.config or {})), method=f"{derived.method}, distilled",
        companions={**derived.companions, KEPT_FILE: kept_document(total)},
        recipe={**derived.recipe, "kept": total.identity(), "layers": list(total.kept_layers), "source": source},
        parameters={**derived.parameters, "shape": shape},
    )  # fmt: skip
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

    def __init__(self, inner: Checkpoint, config: dict[str, Any]) -> None:
        self._inner, self.config = inner, config
        self.label, self.folder, self.headers, self.tensors = (
            inner.label,
            inner.folder,
            inner.headers,
            inner.tensors,
        )
        self.read, self.read_bytes, self.granularity = inner.read, inner.read_bytes, inner.granularity


def _next(first: Session, current: Session, member: Member, folder: Path) -> Session:
    """Return the session that prunes on from a trained stage."""
    target = member.target
    source = Source(first.source.key, open_path(folder, str(folder)), str(folder))
    session = Session(
        source, first.request, first.work / f"after-{target.name}", first.tell, first.say, first.stop, origin=first,
        warnings=first.warnings,
    )  # fmt: skip
    # The same text, table and kind of attention units: only the model is new.
    for name in ("texts", "decoder", "workload"):
        session.__dict__[name] = getattr(first, name)
    if target.kind == "speedup":
        table = first.table
        if member.measured is not None:
            left = shapes(Cut.whole(session.structure.layers), session.structure)
            table = table.corrected(**fit_correction(table, [(left, member.measured.ratio)]))
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
