"""Measures on the models what a merge's adjustments need, and keeps it for the next run.

What was measured lies in a folder under a name made of everything it depends on: the models' headers,
times and configs, the calibration tokens, the settings. A run that finds it there does not measure again,
so an interrupted merge continues with the same numbers. Layer strengths measured on another machine, where
files have other times, are taken with --layer-scores.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from surgeon import __version__
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.header import printable
from surgeon.checkpoint.strict_json import read_json_object
from surgeon.errors import EnvironmentFault, InputError, UsageError
from surgeon.merge import align
from surgeon.merge.layer_scores import LayerScores, read_layer_scores, write_layer_scores
from surgeon.merge.measured import Measured
from surgeon.merge.prepare import OpenModel, reference_model
from surgeon.merge.spec import MergeSpec, ModelRef

if TYPE_CHECKING:
    from surgeon.calibrate.data import CalibrationSet
    from surgeon.calibrate.settings import Settings

Progress = Callable[[str, int, int], None]
"""Called with (what is measured, steps done, steps)."""


@dataclass(frozen=True)
class _Run:
    """One merge's measurements: what every part of them needs."""

    spec: MergeSpec
    models: Mapping[ModelRef, OpenModel]
    reference: ModelRef
    folder: Path
    settings: Settings
    seed: int
    offline: bool
    progress: Progress
    stop: threading.Event | None

    @property
    def base(self) -> Checkpoint:
        return self.models[self.reference].checkpoint

    @property
    def others(self) -> dict[str, Checkpoint]:
        return {m.key: m.checkpoint for ref, m in self.models.items() if ref != self.reference}

    def steps(self, title: str) -> Callable[[int, int], None]:
        return lambda done, total: self.progress(title, done, total)

    def words(self, title: str) -> Callable[[str], None]:
        return lambda text: self.progress(f"{title}: {text}", 0, 1)


def measure(
    spec: MergeSpec,
    models: Mapping[ModelRef, OpenModel],
    folder: Path,
    *,
    seed: int,
    offline: bool = False,
    memory_limit: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> Measured:
    """Run the models as far as the adjustments need it.

    Args:
        spec: what is merged; ``spec.calibration`` names the text.
        models: every model of the spec, open.
        folder: where measurements are kept; made when it is missing.
        seed: of the choice of calibration text, and of FIM's random tokens.

    Raises:
        EnvironmentFault: E512 torch or transformers is missing.
        SurgeonError: whatever the data or the models give cause for.
    """
    settings_type = _settings_type()
    made = [place for place in (folder / "activations", folder, *folder.parents) if not place.exists()]
    try:
        (folder / "activations").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentFault("E502", f"cannot make {printable(str(folder))}: {error.strerror}",
                               help="--work FOLDER chooses another place for measurements") from error  # fmt: skip
    settings = settings_type(
        device=spec.calibration.device, dtype=spec.calibration.dtype, memory_limit=memory_limit,
        spill=folder / "activations", threads=threads,
    )  # fmt: skip
    run = _Run(spec, models, reference_model(spec), folder, settings, seed, offline,
               progress or (lambda title, done, total: None), stop)  # fmt: skip
    found = Measured()
    try:
        for name in spec.adjust.measured:
            part = {"aim": _aim, "acm": _acm, "sens": _sens, "fim": _fim}[name](run)
            found = Measured(
                part.importance or found.importance,
                {**found.scores, **part.scores},
                {**found.record, **part.record},
                (*found.notes, *part.notes),
            )
    except BaseException:
        _remove_empty(made)
        raise
    shutil.rmtree(folder / "activations", ignore_errors=True)  # only an unfinished pass needs them again
    return found


def _remove_empty(made: Sequence[Path]) -> None:
    """Remove the folders this run made, innermost first, as far as it has put nothing into them."""
    for place in made:
        try:
            place.rmdir()
        except OSError:
            return


def _settings_type() -> type[Settings]:
    try:
        from surgeon.calibrate.settings import Settings
    except ImportError as error:
        raise EnvironmentFault("E512", f"running models needs {error.name or 'torch and transformers'}, which is not installed",
                               help='pip install "model-surgeon[run]"') from error  # fmt: skip
    return Settings


# ---- calibration text ----------------------------------------------------------------------------


def _text(run: _Run, model: Checkpoint, key: str, answer: str | None) -> CalibrationSet:
    """Return calibration samples in a model's own tokens.

    Args:
        key: the model's name; a source given as KEY=FILE is this model's alone.
        answer: "short" or "long" of long-to-short data; None takes short where the data have both.
    """
    from surgeon.calibrate import data
    from surgeon.data.records import parse_sources

    source = run.spec.calibration
    given = parse_sources(list(source.sources)) if source.sources else None
    if given is not None:
        keys = {m.key for m in run.models.values()}
        own = [(None, s) for domain, s in given if domain == key]
        common = [(domain, s) for domain, s in given if domain not in keys]
        given = own or common
        if not given:
            raise UsageError("E233", f"no calibration text is for {printable(key)}",
                             help=f"--calibration {key}=FILE, or --calibration FILE for all models")  # fmt: skip
    if model.folder is None:
        raise InputError("E359", f"{model.label} has no tokenizer to read calibration text with",
                         help="give a model folder instead of a bare file")  # fmt: skip
    chosen = answer or ("short" if given and _has_both(given, run.offline) else "response")
    return data.load(
        given, model.folder, samples=source.samples, sequence_length=source.sequence_length, seed=run.seed,
        pack=source.pack, template=source.template, answer=chosen, offline=run.offline,
    )  # fmt: skip


def _has_both(sources: Sequence[tuple[str | None, str]], offline: bool) -> bool:
    from surgeon.calibrate.fields import has_answer
    from surgeon.data.records import read_records

    firsts = [read_records(source, offline=offline).records[0].values for _, source in sources]
    return all(has_answer(values, "short") and has_answer(values, "long") for values in firsts)


def _announce(run: _Run, text: CalibrationSet) -> list[str]:
    record = text.record
    plain = f"calibration on {record['samples']} texts, {record['tokens']:,} tokens of {record['name']}"
    if not run.spec.calibration.sources:
        plain += "; --calibration FILE takes your own"
    return [plain, *text.warnings]


# ---- what is kept --------------------------------------------------------------------------------


def _identity(run: _Run, kind: str, models: Mapping[str, Checkpoint], *facts: Any) -> str:
    """Return a name for a measurement: equal names mean equal numbers."""
    content = {
        "kind": kind,
        "version": __version__,
        "models": {
            key: [[h.sha256, h.stamp.size, h.stamp.mtime_ns] for h in c.headers]
            # The config decides how weights are run: rotary base, norm epsilon, experts per token.
            + [getattr(c, "identity", ""), c.config]
            for key, c in models.items()
        },
        "dtype": run.settings.dtype,
        "facts": facts,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _kept_scores(run: _Run, name: str, identity: str) -> Measured | None:
    file = run.folder / f"{name}-{identity}.json"
    if not file.is_file():
        return None
    with _kept(file):
        made_by = read_json_object(file).get("made_by", {})
        scores = read_layer_scores(file)
    return _as_measured(name, scores, made_by, (f"{name} is taken from {printable(file.name)}",))


@contextlib.contextmanager
def _kept(file: Path) -> Iterator[None]:
    """Name the way out of a damaged measurement: it is no download, and can be made again."""
    try:
        yield
    except InputError as error:
        error.help = (
            f"it was measured by an earlier run; delete it to measure again: rm '{printable(str(file))}'"
        )
        raise


def _keep_scores(run: _Run, name: str, identity: str, scores: Mapping[str, LayerScores], made_by: Mapping[str, Any],
                 notes: tuple[str, ...]) -> Measured:  # fmt: skip
    file = run.folder / f"{name}-{identity}.json"
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    write_layer_scores(unfinished, scores, made_by)
    os.replace(unfinished, file)
    return _as_measured(name, scores, made_by, notes)


def _as_measured(name, scores: Mapping[str, LayerScores], made_by, notes: tuple[str, ...]) -> Measured:
    record = {**made_by, "scores": {key: entry.as_data() for key, entry in scores.items()}}
    spans = []
    for key, entry in scores.items():
        values = list(entry.layers.values())
        if values:
            spans.append(
                f"{name}: task vector of {printable(key)} x {min(values):.3f} to {max(values):.3f} by layer"
            )
    return Measured(None, dict(scores), {name: record}, (*notes, *spans))


# ---- the measurements ----------------------------------------------------------------------------


def _aim(run: _Run) -> Measured:
    from surgeon.calibrate import statistics_file
    from surgeon.merge.aim import damping

    key = run.models[run.reference].key
    text = _text(run, run.base, key, None)
    notes = _announce(run, text)
    file = run.folder / f"aim-{_identity(run, 'aim', {key: run.base}, text.record)}.safetensors"
    if file.is_file():
        with _kept(file):
            statistics = statistics_file.load(file)
        notes.append(f"aim is taken from {printable(file.name)}")
    else:
        from surgeon.calibrate.statistics import MeanAbsolute, collect

        statistics = collect(
            run.base, [s.ids for s in text.samples], run.settings, MeanAbsolute(), about=text.record,
            progress=run.steps("activations"), stop=run.stop, resume=True,
        )  # fmt: skip
        statistics_file.save(file, statistics)
    opened = [m.checkpoint for m in run.models.values()]
    tied = all(align.is_tied(c) for c in opened)
    shapes = {name: info.shape for name, info in run.base.tensors.items()}
    for checkpoint in opened:
        head = align.head_name(checkpoint.tensors)
        if not tied and head is not None:
            shapes.setdefault(head, checkpoint.tensors[head].shape)
    # f = 1 - a at omega 0; the planner puts omega in, so that it can be swept.
    found = damping(shapes, run.base.config, statistics, 0.0, tied=tied)
    importance = {name: np.float32(1) - factors for name, factors in found.factors.items()}
    record = {"calibration": text.record, "precision": run.settings.dtype, **found.record()}
    record.pop("omega")
    shown = [n for n in replace(found, omega=run.spec.adjust.aim or 0.0).notes() if "damped towards" not in n]
    return Measured(importance, {}, {"aim": record}, (*notes, *shown))


def _acm(run: _Run) -> Measured:
    from surgeon.merge import acm

    adjust = run.spec.adjust
    assert adjust.acm is not None
    key = run.models[run.reference].key
    text = _text(run, run.base, key, None)
    models = {key: run.base, **run.others}
    identity = _identity(run, "acm", models, text.record, adjust.acm, adjust.acm_estimator)
    kept = _kept_scores(run, "acm", identity)
    if kept is not None:
        return kept
    scores, facts = {}, {}
    for name, model in run.others.items():
        scores[name], facts[name] = acm.measure(
            run.base, model, [s.ids for s in text.samples], run.settings, theta=adjust.acm,
            estimator=adjust.acm_estimator, progress=run.steps(f"agreement with {name}"), stop=run.stop,
        )  # fmt: skip
    made_by = {"method": "acm", "calibration": text.record, "models": facts}
    return _keep_scores(run, "acm", identity, scores, made_by, tuple(_announce(run, text)))


def _sens(run: _Run) -> Measured:
    from surgeon.merge import sens

    temperature = run.spec.adjust.sens
    assert temperature is not None
    key = run.models[run.reference].key
    pair = len(run.models) == 2
    experts = {key: run.base, **run.others} if pair else run.others
    texts: dict[str, CalibrationSet] = {}
    for name, model in experts.items():
        # Crossed for a pair: the long model, which carries the task vector, reads short answers.
        answer = ("long" if name == key else "short") if pair else None
        texts[name] = _text(run, model, name, answer)
    identity = _identity(run, "sens", experts, {n: t.record for n, t in texts.items()}, temperature)
    kept = _kept_scores(run, "sens", identity)
    if kept is not None:
        return kept
    found = sens.measure(
        experts,
        texts,
        run.settings,
        temperature=temperature,
        progress=run.words("sensitivity"),
        stop=run.stop,
    )
    scores = {name: entry for name, entry in found.scores.items() if name != key}
    notes = [n for text in texts.values() for n in _announce(run, text)]
    return _keep_scores(run, "sens", identity, scores, found.made_by, tuple(dict.fromkeys(notes)))


def _fim(run: _Run) -> Measured:
    from surgeon.merge import fim

    key = run.models[run.reference].key
    identity = _identity(run, "fim", {key: run.base, **run.others}, run.seed)
    kept = _kept_scores(run, "fim", identity)
    if kept is not None:
        return kept
    found = fim.measure(
        run.base,
        run.others,
        run.settings,
        seed=run.seed,
        progress=run.words("Fisher information"),
        stop=run.stop,
    )
    return _keep_scores(run, "fim", identity, found.scores, found.made_by, ())
