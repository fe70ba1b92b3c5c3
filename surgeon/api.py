"""The Python functions behind the commands; the command line is one of their callers."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

from surgeon.checkpoint.header import printable
from surgeon.checkpoint.source import locate
from surgeon.derive import Source
from surgeon.errors import (
    EnvironmentFault,
    InputError,
    OutputConflict,
    SurgeonError,
    UsageError,
    Where,
    wrong_options,
)
from surgeon.execute import Check, Outcome, execute, preflight
from surgeon.execute import input_locations as _inputs
from surgeon.merge.measured import Measured
from surgeon.merge.planner import Options
from surgeon.merge.prepare import Opening, OpenModel, Texts, open_models, prepare
from surgeon.merge.references import parse_model_ref
from surgeon.merge.request import MergeRequest, Resolved, resolve
from surgeon.merge.spec import MergeSpec
from surgeon.output import staging
from surgeon.plan import Plan
from surgeon.python import edited, findings, merged
from surgeon.python.options import (
    EditOptions,
    EvaluateOptions,
    ExpertOptions,
    ExportOptions,
    MeasureOptions,
    MergeOptions,
    PathLike,
    PruneOptions,
    QuantizeOptions,
    plain,
    takes,
)
from surgeon.python.progress import Progress, Say, counted, of_three, telling
from surgeon.python.rendering import View
from surgeon.python.results import Document, Merged, Report, Result, Shown
from surgeon.system import physical_cores

if TYPE_CHECKING:
    from surgeon import comparison, inspection
    from surgeon.checkpoint.header import TensorInfo
    from surgeon.verify import readers
    from surgeon.verify.readers import Reading
    from surgeon.verify.static import Report as Checked


@dataclass
class MergePlan:
    """A merge that was planned and checked, not yet run.

    Attributes:
        plan: what will be done.
        notes: sentences for the user.
        default_output: where the result goes when nobody says.
        needs: adjustments that must be measured on the models first; see `measure`.
    """

    plan: Plan
    notes: list[str]
    default_output: Path
    needs: tuple[str, ...] = ()
    request: MergeRequest | None = None
    resolved: Resolved | None = None
    title: str = "merged"

    def measure(
        self,
        output: Path | str | None = None,
        *,
        work: Path | str | None = None,
        threads: int | None = None,
        memory_limit: int | None = None,
        progress: Progress | None = None,
        stop: threading.Event | None = None,
    ) -> MergePlan:
        """Measure what the adjustments need and return the plan with the values in it.

        Args:
            output: where the merge will go; without ``work``, measurements are kept beside it until
                the merge is done, so that an interrupted run continues.
            work: folder in which measurements are kept and used again.
            progress: called with (what is measured, done, total).
        """
        if not self.needs:
            return self
        assert self.request is not None and self.resolved is not None
        from surgeon.merge.measure import measure

        spec, request = self.resolved.spec, self.request
        models = open_models(spec.models(), _opening(request))
        folder = Path(work) if work else _work_beside(Path(output) if output else self.default_output)
        measured = measure(
            spec, models, folder, seed=request.seed, offline=request.offline,
            memory_limit=memory_limit, threads=threads or physical_cores(), progress=of_three(progress), stop=stop,
        )  # fmt: skip
        return _plan(spec, request, self.resolved, self.title, measured)

    @property
    def warnings(self) -> tuple[str, ...]:
        return self.plan.warnings

    def check(
        self,
        output: Path,
        *,
        threads: int | None = None,
        memory_limit: int | None = None,
        overwrite: bool = False,
    ) -> Check:
        """Raise whatever a run would refuse with; return the estimate."""
        is_file = all(m.config is None for m in self.plan.models.values()) and set(self.plan.models) == {""}
        staging.check_destination(
            Path(output).absolute(), _inputs(self.plan), overwrite=overwrite, is_file=is_file
        )
        return preflight(
            self.plan, Path(output).absolute(), threads=threads or physical_cores(), memory_limit=memory_limit
        )

    def run(
        self,
        output: Path | str | None = None,
        *,
        threads: int | None = None,
        memory_limit: int | None = None,
        overwrite: bool = False,
        resume: bool = True,
        progress: Progress | None = None,
        stop: threading.Event | None = None,
    ) -> Outcome:
        """Execute and publish; see `surgeon.execute.execute`. Adjustments that need it must be measured."""
        if self.needs:
            raise AssertionError(f"{self.needs} were not measured")
        destination = Path(output) if output else self.default_output
        outcome = execute(
            self.plan, destination, threads=threads or physical_cores(), overwrite=overwrite, resume=resume,
            memory_limit=memory_limit, progress=counted(of_three(progress), "merging"), stop=stop,
        )  # fmt: skip
        if self.resolved is not None and self.resolved.spec.adjust.measured:
            folder = _work_beside(destination)
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # other things may lie there: documents of a multi-merge
                folder.parent.rmdir()
        return outcome


def _work_beside(destination: Path) -> Path:
    """Return the folder for measurements of a merge to ``destination``."""
    return destination.absolute().parent / f"{destination.name}.work" / "measured"


def plan_merge(request: MergeRequest, title: str = "merged") -> MergePlan:
    """Plan a merge from options."""
    resolved = resolve(request)
    return _plan(resolved.spec, request, resolved, title)


def plan_spec(spec: MergeSpec, request: MergeRequest, title: str = "merged") -> MergePlan:
    """Plan a merge from a spec (mergekit YAML); of the request only the surrounding options count."""
    if request.calibration:
        spec = replace(spec, calibration=replace(spec.calibration, sources=request.calibration))
    if request.device != "auto":
        spec = replace(spec, calibration=replace(spec.calibration, device=request.device))
    return _plan(spec, request, Resolved(spec, None, (), {}), title)


def _opening(request: MergeRequest) -> Opening:
    return Opening(
        request.offline, request.weights, request.config, request.ignore_unlisted, request.allow_pickle, request.dequantize
    )  # fmt: skip


def _plan(
    spec: MergeSpec, request: MergeRequest, resolved: Resolved, title: str, measured: Measured | None = None
) -> MergePlan:
    options = Options(
        ignore=request.ignore, dense=request.dense, layers=request.layers, points=resolved.points, seed=request.seed,
        max_shard_bytes=request.max_shard_size, allow_nonfinite=request.allow_nonfinite, quirks=request.mergekit_quirks,
    )  # fmt: skip
    texts = Texts(
        tokenizer=parse_model_ref(request.tokenizer) if request.tokenizer else None,
        chat_template=request.chat_template, title=title,
    )  # fmt: skip
    plan = prepare(spec, options, _opening(request), texts, resolved.pair, measured)
    bare = all(m.config is None for m in plan.models.values())
    if bare and len(plan.models) > 1:
        raise UsageError("E215", "a sweep over bare files has no folder to write to",
                         help="give model folders, or --config config.json")  # fmt: skip
    default = Path("merged.safetensors") if bare else Path("merged")
    needs = () if measured is not None else spec.adjust.measured
    return MergePlan(plan, list(resolved.notes), default, needs, request, replace(resolved, spec=spec), title)


@overload
def merge(
    models: Sequence[Mapping[str, Any]],
    *,
    method: str = "linear",
    threads: int | None = None,
    progress: Progress | None = None,
    **options: Unpack[MergeOptions],
) -> dict[str, Any]: ...


@overload
def merge(
    models: PathLike | Sequence[PathLike],
    *,
    method: str = "linear",
    output: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = True,
    dry_run: bool = False,
    threads: int | None = None,
    memory_limit: int | None = None,
    work: str | Path | None = None,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
    **options: Unpack[MergeOptions],
) -> Merged: ...


@takes(MergeOptions)
@telling
def merge(
    models: Any,
    *,
    method: str = "linear",
    output: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = True,
    dry_run: bool = False,
    threads: int | None = None,
    memory_limit: int | None = None,
    work: str | Path | None = None,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
    **options: Any,
) -> Merged | dict[str, Any]:
    """Merge checkpoints, or run a mergekit YAML; the options of ``surgeon merge``.

    Args:
        models: paths or hub ids, or one mergekit YAML; or state dicts of NumPy arrays or torch tensors, which give a
            state dict of the same kind (a sweep gives one for each point, by name).
        method: see ``surgeon.methods("merge")``.
        output: folder, or file for bare files; default ``merged`` or ``merged.safetensors``.
        overwrite: replace a previous model as a whole.
        resume: continue a matching interrupted run.
        dry_run: plan, check and estimate; write nothing.
        work: folder in which measurements of adjustments (AIM, ACM...) are kept and used again.
        progress: see `surgeon.python.progress.Progress`.
        stop: set it to stop after the work in progress; the same call goes on.
        options: any field of `surgeon.merge.request.MergeRequest`, ``lambda_`` for lambda.

    Returns:
        `Merged`: the document of ``surgeon merge --json``, with ``path``, ``manifest``, ``report()``; of state dicts
        a state dict.

    Raises:
        SurgeonError: as the command would; see `surgeon.errors`.

    Example:
        >>> surgeon.merge(["long", "short"], method="ties", output="merged")  # doctest: +SKIP
    """
    if isinstance(models, (str, os.PathLike)):
        models = [models]
    if any(isinstance(m, Mapping) for m in models):
        return _merge_states(models, output, threads, counted(progress, "merging"), method=method, **options)
    options = plain(options, MergeRequest)
    running: dict[str, Any] = {
        "overwrite": overwrite, "resume": resume, "dry_run": dry_run, "threads": threads, "memory_limit": memory_limit,
        "work": work, "stop": stop, "progress": progress,
    }  # fmt: skip
    names = tuple(os.fspath(m) for m in models)
    if len(names) == 1 and names[0].endswith((".yml", ".yaml")):
        if method != "linear":
            raise UsageError("E208", "method cannot be combined with a YAML file", help="set merge_method in the YAML")  # fmt: skip
        return _merge_file(names[0], output, options, running)
    request = build_request(models=names, method=method, **options)
    planned = plan_merge(request, title=Path(output).stem if output else "merged")
    return _run_planned(planned, output, **running)


def _merge_file(
    file: str, output: str | Path | None, options: Mapping[str, Any], running: dict[str, Any], say: Say | None = None
) -> Merged:  # fmt: skip
    """Run a mergekit YAML: one merge, or several documents that use each other's results."""
    own = MergeRequest.model_fields.keys() - _OF_YAML
    given = sorted(name for name in options if name.rstrip("_") in own or name in own)
    if given:
        raise UsageError("E208", f"{', '.join(given)} cannot be combined with a YAML file",
                         help="set it in the YAML, or name the models instead of the file")  # fmt: skip
    from surgeon.python import mergekit

    specs, remarks = mergekit.read(file, bool(options.get("strict")))
    request = build_request(models=(), method="linear", **options)
    final = Path(output) if output is not None else None

    def make(spec: MergeSpec, place: Path | None) -> Merged:
        title = spec.name or (final.stem if final else "merged")
        return _run_planned(plan_spec(spec, request, title=title), place, **running)

    if len(specs) == 1:
        found = make(specs[0], final)
    else:
        found = Merged(
            mergekit.run_documents(specs, final or Path("merged"), make, dry_run=running["dry_run"], say=say)
        )
    found["warnings"] = [*remarks, *found["warnings"]]
    return found


_OF_YAML = frozenset(
    {
        "max_shard_size", "seed", "weights", "ignore_unlisted", "allow_nonfinite", "mergekit_quirks", "strict", "offline",
        "dequantize", "chat_template", "allow_pickle", "acm_estimator", "calibration", "samples", "sequence_length", "pack",
        "device", "models", "method",
    }
)  # fmt: skip
"""Options that surround a mergekit YAML; what it says itself, it says alone."""


def _run_planned(
    planned: MergePlan, output: str | Path | None, *, overwrite: bool, resume: bool, dry_run: bool, threads: int | None,
    memory_limit: int | None, work: str | Path | None, progress: Progress | None, stop: threading.Event | None,
) -> Merged:  # fmt: skip
    """Check, measure and run a planned merge."""
    if planned.request is not None and planned.request.strict and planned.warnings:
        raise UsageError("E220", f"strict: {planned.warnings[0]}", help="change what the warning names, or leave out strict")  # fmt: skip
    destination = Path(output) if output is not None else planned.default_output
    if output is None and destination.exists() and not overwrite:
        raise OutputConflict(
            "E601", f"the output exists: {destination}", help="give output=, or overwrite=True"
        )
    # What is there may be this very result: then the run ends at once, which execute() decides.
    check = planned.check(
        destination, threads=threads, memory_limit=memory_limit, overwrite=overwrite or not dry_run
    )
    described = merged.describe(planned.plan, check)
    if dry_run:
        return Merged(merged.rehearsed(planned, described, destination))
    measured = planned.measure(
        output, work=work, threads=threads, memory_limit=memory_limit, stop=stop, progress=progress
    )
    if measured is not planned:
        described |= {"id": measured.plan.plan_id(), "measured": measured.plan.recipe.get("measured")}
    outcome = measured.run(
        output, stop=stop, threads=threads, memory_limit=memory_limit, overwrite=overwrite, resume=resume, progress=progress
    )  # fmt: skip
    return Merged(merged.written(measured, described, outcome), outcome)


def _merge_states(models, output, threads, progress, **options: Any) -> dict[str, Any]:
    from surgeon.merge.in_memory import merge_states, named_inputs

    if not all(isinstance(m, Mapping) for m in models):
        raise UsageError("E204", "state dicts and paths cannot be merged with each other",
                         help="save the state dicts, or load the checkpoints")  # fmt: skip
    if output is not None:
        raise UsageError("E208", "the result of merging state dicts is a state dict, not a file",
                         help="leave out output, and save what is returned")  # fmt: skip
    names, base, states = named_inputs(models, options.pop("base", None))
    request = build_request(models=names, base=base, **options)
    return merge_states(request, states, threads=threads or physical_cores(), progress=progress)


def build_request(**values: Any) -> MergeRequest:
    """Build a request; a validation failure becomes one UsageError per field."""
    from pydantic import ValidationError

    if "lambda_" in values:
        values["lambda"] = values.pop("lambda_")
    try:
        return MergeRequest(**{k: v for k, v in values.items() if v is not None})
    except ValidationError as error:
        raise wrong_options(
            error.errors(), code="E212", verb="merge", known=MergeRequest.model_fields
        ) from None


@dataclass(repr=False)
class Inspection(Shown):
    """What `inspect` found.

    Attributes:
        summary: headers and JSON files, see `surgeon.inspection.Summary`.
        tensors: the tensors asked for, by name.
        stats: figures by tensor name, when they were asked for.
        layers: one group per layer.
        experts: one entry per layer with experts.
        config: the parsed config.json, or None.
        routing: what is known about experts, where it was asked for.
    """

    summary: inspection.Summary
    tensors: dict[str, TensorInfo]
    stats: dict[str, inspection.Stats] | None
    layers: list[inspection.Group]
    experts: list[inspection.ExpertLayer]
    config: dict[str, Any] | None
    routing: dict[str, Any] | None = None

    def view(self) -> View:
        return findings.of_inspection(self)


@dataclass(repr=False)
class Difference(Shown):
    """What `diff` found; ``a`` is compared with ``b``, the reference.

    Attributes:
        labels: how the two were named.
        structure: names, shapes, types.
        config, generation_config: keys that differ.
        tokenizer: a sentence, or None when both are equal or neither has one.
        chat_template: True when the templates differ.
        values: figures by tensor, when they were asked for.
        tensors_differ: True, False, or None when values were not compared.
    """

    labels: tuple[str, str]
    structure: comparison.Structure
    config: list[comparison.Setting]
    generation_config: list[comparison.Setting]
    tokenizer: str | None
    chat_template: bool
    values: dict[str, comparison.Values] | None
    notes: list[str]

    @property
    def tensors_differ(self) -> bool | None:
        if self.values is None:
            return None
        return any(v.changed for v in self.values.values())

    @property
    def differs(self) -> bool:
        settings = [s for s in (*self.config, *self.generation_config) if not s.cosmetic]
        found = (self.structure.differs, settings, self.tokenizer, self.chat_template, self.tensors_differ)
        return any(map(bool, found))

    def view(self) -> View:
        return findings.of_difference(self)


@dataclass(repr=False)
class Verification(Shown):
    """What `verify` found; ``errors`` is empty when every check passed."""

    path: Path
    report: Checked
    reading: Reading | None = None
    against: dict[str, Any] | None = None
    decoded: dict[str, Any] | None = None
    findings: list[SurgeonError] = field(default_factory=list)

    @property
    def errors(self) -> list[SurgeonError]:
        return [*self.report.errors, *(self.reading.errors if self.reading else []), *self.findings]

    @property
    def warnings(self) -> list[str]:
        return [*self.report.warnings, *(self.reading.warnings if self.reading else [])]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return not self.errors

    def view(self) -> View:
        return findings.of_verification(self)


@contextlib.contextmanager
def open_model(
    model: str | Path,
    *,
    offline: bool = False,
    weights: str = "auto",
    ignore_unlisted: bool = False,
    allow_pickle: bool = False,
    dequantize: bool = False,
) -> Iterator[OpenModel]:
    """Open one model (folder, file, hub id, MODEL+ADAPTER) for reading and close it afterwards.

    Args:
        dequantize: read a quantized model as plain numbers.

    Raises:
        SurgeonError: it does not exist or is malformed; nothing else, whatever the file system says.
    """
    try:
        reference = parse_model_ref(str(model))
        opening = Opening(offline, weights, None, ignore_unlisted, allow_pickle, dequantize)
        opened = open_models([reference], opening)[reference]
    except OSError as error:
        raise EnvironmentFault(
            "E502",
            f"cannot read {printable(str(model))}: {error.strerror or error}",
            help="give a path that this user can read",
        ) from error
    try:
        yield opened
    finally:
        close = getattr(opened.checkpoint, "close", None)
        if close is not None:
            close()


@takes(ExpertOptions)
@telling
def inspect(
    model: str | Path,
    *,
    tensors: str | None = None,
    stats: bool = False,
    experts: bool = False,
    offline: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
    **options: Unpack[ExpertOptions],
) -> Inspection:
    """Say what a checkpoint holds. Reads headers and JSON; with ``stats`` also the values, once.

    Args:
        model: path or hub id, MODEL+ADAPTER.
        tensors: a name, glob or re:REGEX: list only these tensors; statistics cover only these, too.
        stats: norms, largest magnitudes, means, zeros and non-finite values.
        experts: how tokens are routed (with ``calibration``) and how like the weights are (with ``stats``); the
            further options are those of `inspect_experts`, and the answer is ``routing``.
        progress: see `surgeon.python.progress.Progress`.
    """
    from surgeon import inspection
    from surgeon.checkpoint.patterns import select

    if options and not experts:
        raise UsageError(
            "E206", f"{', '.join(options)} only has an effect with experts", help="add experts=True"
        )

    with open_model(model, offline=offline) as opened:
        checkpoint = opened.checkpoint
        found = inspection.summarize(checkpoint, opened.located.path)
        names = select(tensors, checkpoint.tensors, "--tensors") if tensors else list(checkpoint.tensors)
        chosen = {name: checkpoint.tensors[name] for name in names}
        figures = None
        if stats:
            inspection.require_values(checkpoint)
            figures = inspection.statistics(
                checkpoint, names, threads=threads or physical_cores(), progress=counted(progress, "reading")
            )
        answer = Inspection(
            found, chosen, figures, inspection.by_layer(chosen, figures), inspection.expert_layers(chosen),
            checkpoint.config,
        )  # fmt: skip
    if experts:
        answer.routing = inspect_experts(
            model, stats=stats, offline=offline, threads=threads, progress=progress, stop=stop, **options
        )
    return answer


@telling
def inspect_experts(
    model: str | Path,
    *,
    calibration: Sequence[str] | None = None,
    stats: bool = False,
    expert_record: PathLike | None = None,
    scores: PathLike | None = None,
    samples: int = 128,
    sequence_length: int = 2048,
    seed: int = 0,
    keep_experts: int | None = None,
    criterion: str = "easy-ep",
    markers: Sequence[str] = (),
    windows: Sequence[int] = (),
    cache_ratios: Sequence[float] = (),
    logits: bool = False,
    device: str = "auto",
    calibration_dtype: str = "float32",
    threads: int | None = None,
    memory_limit: int | None = None,
    offline: bool = False,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> dict[str, Any]:
    """Say what is known about a model's experts; the options of ``surgeon inspect --experts``.

    Args:
        calibration: text to run the model on, each PATH or NAME=PATH; None reads names alone.
        stats: read the weights: norms, likeness, duplicates.
        scores: keep the statistics of the pass in this file, for ``surgeon prune --scores``.
        others: see `surgeon.experts.analysis`.

    Returns:
        The document ``surgeon inspect --experts --json`` holds under "routing".

    Raises:
        InputError: E420 a dense model, E421 an unknown family, and what a pass raises.
    """
    from surgeon.architectures import expert_records
    from surgeon.structure.experts.find import experts_of

    with open_model(model, offline=offline) as opened:
        checkpoint = opened.checkpoint
        experts = experts_of(checkpoint, expert_records.load(Path(expert_record)) if expert_record else None)
        from surgeon.experts import analysis

        if calibration is None:
            if stats:
                return analysis.analyse_weights(
                    checkpoint, experts, progress=counted(progress, "looking at experts"), stop=stop
                ).document
            return analysis.named(checkpoint, experts)
        from surgeon.calibrate.settings import Settings
        from surgeon.data.records import parse_sources
        from surgeon.experts.measures import MeasureSettings
        from surgeon.formats.dequantized import runnable

        run = runnable(checkpoint)
        measure = MeasureSettings(seed=seed, logits=logits)
        if cache_ratios:
            measure = replace(measure, cache_ratios=tuple(cache_ratios))
        found = analysis.analyse_texts(
            run, experts if run is checkpoint else experts_of(run, experts.record), parse_sources(list(calibration)),
            Settings(device=device, dtype=calibration_dtype, threads=threads, memory_limit=memory_limit),
            samples=samples, sequence_length=sequence_length, seed=seed, offline=offline, measure=measure, windows=tuple(windows),
            keep=keep_experts, criterion=criterion.replace("-", "_"), markers=tuple(markers), weights=stats,
            progress=counted(progress, "looking at experts"), stop=stop,
        )  # fmt: skip
        if scores is not None and found.statistics is not None:
            found.statistics.save(Path(scores).expanduser())
        return found.document


def propose_experts(model: str | Path, *, offline: bool = False) -> tuple[Any, list[str]]:
    """Propose a record of where an unknown family keeps its experts, and what to check about it.

    Raises:
        InputError: E421 nothing looks like experts.
    """
    from surgeon.structure.experts.guess import propose

    with open_model(model, offline=offline) as opened:
        return propose(opened.checkpoint)


@telling
def diff(
    first: str | Path,
    second: str | Path,
    *,
    base: str | Path | None = None,
    values: bool = False,
    tensors: str | None = None,
    anatomy: bool = True,
    dequantize: bool = False,
    offline: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Difference:
    """Compare two checkpoints; ``second`` is the reference.

    Args:
        base: compare the task vectors first - base and second - base as well (with ``values``).
        values: read and compare the values of all tensors of equal shape.
        tensors: a name, glob or re:REGEX: compare the values of these only.
        anatomy: how much of a delta its largest entries hold; a second read where it is needed.
        dequantize: read quantized models as plain numbers, which comparing their values needs.

    Raises:
        InputError: E311 values of a quantized model without ``dequantize``.
    """
    from surgeon import comparison
    from surgeon.checkpoint.companions import read_chat_templates, read_generation_config
    from surgeon.checkpoint.patterns import select
    from surgeon.formats.dequantized import permissions, plain_needed
    from surgeon.traits import quantized

    if base is not None and not values:
        raise UsageError("E206", "a base is only used when values are compared", help="add --values")
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(open_model(first, offline=offline, dequantize=dequantize))
        theirs = stack.enter_context(open_model(second, offline=offline, dequantize=dequantize))
        found = comparison.structure(ours.checkpoint, theirs.checkpoint)
        folders = [m.checkpoint.folder for m in (ours, theirs) if m.checkpoint.folder is not None]
        notes = [note for m in (ours, theirs) if permissions(m.checkpoint) for note in _labelled(m)]
        config = generation = []
        template, tokenizer = False, None
        configs = ours.checkpoint.config, theirs.checkpoint.config
        if None not in configs:
            config = comparison.settings(*configs)
        elif any(configs):
            notes.append("only one of the two has a config.json; configurations were not compared")
        if len(folders) == 2:
            generation = comparison.settings(*(read_generation_config(f) for f in folders))
            template = len({read_chat_templates(f).default for f in folders}) > 1
            tokenizer = _compare_tokenizers(folders[0], folders[1], notes)
        figures = None
        if values:
            names = select(tensors, found.common, "--tensors") if tensors else found.common
            third = (
                stack.enter_context(open_model(base, offline=offline, dequantize=dequantize))
                if base
                else None
            )
            reference = third.checkpoint if third else None
            for one in (ours.checkpoint, theirs.checkpoint, *([reference] if reference else [])):
                if quantized(one):
                    raise plain_needed(one, "its values cannot be compared")
            if reference is not None:
                lacking = sum(
                    n not in reference.tensors
                    or reference.tensors[n].shape != ours.checkpoint.tensors[n].shape
                    for n in names
                )
                if lacking:
                    notes.append(
                        f"{lacking} tensors are not in the base with this shape; compared without it"
                    )
            figures = comparison.compare_values(
                ours.checkpoint, theirs.checkpoint, names, base=reference, anatomy=anatomy,
                threads=threads or physical_cores(), progress=counted(progress, "comparing"),
            )  # fmt: skip
        labels = str(ours.ref), str(theirs.ref)
    return Difference(labels, found, config, generation, tokenizer, template, figures, notes)


def _labelled(model: OpenModel) -> list[str]:
    return [f"{model.ref}: {note}" for note in getattr(model.checkpoint, "notes", ())]


def _compare_tokenizers(first: Path, second: Path, notes: list[str]) -> str | None:
    """Return one sentence when two folders' vocabularies differ."""
    from surgeon.checkpoint.vocabulary import has_tokenizer, read_vocabulary
    from surgeon.merge.vocabulary import compare

    present = has_tokenizer(first), has_tokenizer(second)
    if not any(present):
        return None
    if not all(present):
        return f"only {'the first' if present[0] else 'the second'} has a tokenizer"
    try:
        found = compare(read_vocabulary(first), read_vocabulary(second))
    except InputError as error:
        notes.append(f"tokenizers were not compared: {error.message}")
        return None
    if found.verdict == "equal":
        return "equal tokens, different merge rules" if found.rules_differ else None
    what = "special or added tokens only" if found.verdict == "special" else "ordinary tokens"
    shown = "; ".join(
        f"id {n}: {'none' if a is None else repr(a)} / {'none' if b is None else repr(b)}"
        for n, a, b in found.first[:3]
    )
    return f"{found.sizes[0]:,} / {found.sizes[1]:,} tokens, {len(found.ids):,} ids differ ({what}): {shown}"


@telling
def verify(
    model: str | Path,
    *,
    values: bool = True,
    hashes: bool = True,
    load: bool = False,
    generate: bool = False,
    against: str | Path | None = None,
    tolerance: float | None = None,
    timeout: float | None = None,
    memory_limit: int | None = None,
    ignore_unlisted: bool = False,
    offline: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Check a model; findings are returned, not raised.

    Args:
        values: read all weights: non-finite values are errors.
        hashes: re-hash files for which a sha256 is recorded.
        load: load it with stock transformers in a process of its own; ``generate`` and ``against`` imply it.
        generate: greedy tokens with and without the cache, tokenizer round trips, the chat template.
        against: another model folder: compare tensors, and logits on fixed tokens.
        tolerance: with ``against``: the largest relative difference of the logits that passes.
        progress: see `surgeon.python.progress.Progress`; one step for each of the checks.

    Raises:
        UsageError: the model is an adapter, or a bare file that should be loaded.
        EnvironmentFault: E512 to E514, the reader cannot be run here.
    """
    from surgeon.verify import readers
    from surgeon.verify.static import verify_path

    reference = parse_model_ref(str(model))
    if reference.adapter:
        raise UsageError("E207", f"{model} is a model with an adapter; verify checks one model on disk",
                         help="verify the two separately, or merge them first")  # fmt: skip
    try:
        path = locate(reference.path, reference.revision, reference.subfolder, offline=offline).path
        if load or generate or against is not None:
            readers.require(path)
        tell = _steps_of(load or generate, against is not None, progress)
        tell(0)
        report = verify_path(path, hashes=hashes, values=values, ignore_unlisted=ignore_unlisted)
    except OSError as error:
        raise EnvironmentFault(
            "E502",
            f"cannot read {printable(str(model))}: {error.strerror or error}",
            help="give a path that this user can read",
        ) from error
    found = Verification(path, report)
    tell(1)
    if report.errors or not (load or generate or against):
        return found  # a reader fills what is missing with random numbers: nothing it says would count
    other = None
    if against is not None:
        second = parse_model_ref(str(against))
        other = locate(second.path, second.revision, second.subfolder, offline=offline).path
    masked = _without_experts(path) if against is not None else None
    if masked is not None and other is not None:
        # Its experts are numbered anew, and it must not compute what the source does: it is compared with the
        # source in which the experts that went are masked.
        _compare_masked(found, masked, other, threads=threads, memory_limit=memory_limit)
        other = None
    elif against is not None:
        result = diff(
            model, against, values=True, anatomy=False, dequantize=True, offline=offline, threads=threads
        )
        unequal = [n for n, v in (result.values or {}).items() if v.changed]
        found.against = {
            "compared": len(result.values or {}), "equal": len(result.values or {}) - len(unequal),
            "structure_differs": result.structure.differs,
            "max_abs": max((v.max_abs for v in (result.values or {}).values()), default=0.0),
        }  # fmt: skip
    if against is not None:
        tell(2)
    found.reading = readers.read_with_transformers(
        path, generate=generate, against=other, timeout=timeout or readers.TIMEOUT, memory_limit=memory_limit,
        own_code=_own_code(path, *([other] if other is not None else [])),
    )  # fmt: skip
    if against is None and not found.reading.errors:
        _compare_decoded(found, memory_limit=memory_limit)
    logits = found.reading.checks.get("against")
    if tolerance is not None and logits and logits["relative"] > tolerance:
        found.reading.errors.append(
            InputError("E363", f"the logits differ by {logits['relative']:.3g} (relative), above {tolerance:g}",
                       where=Where(str(path)), help="--tolerance sets how much may differ; models that should be equal differ by roundings only")
        )  # fmt: skip
    tell(3 if against is not None else 2)
    return found


def _steps_of(load: bool, against: bool, progress: Progress | None) -> Callable[[int], None]:
    """Return what tells how many steps of a check are done."""
    names = ["checking files and values"]
    names += ["comparing tensors"] if against else []
    names += ["loading"] if load or against else []

    def tell(done: int) -> None:
        if progress is not None:
            progress(names[min(done, len(names) - 1)], done, len(names))

    return tell


def _compare_decoded(found: Verification, *, memory_limit: int | None) -> None:
    """Of a quantized model, compare what its reader computes with the numbers that are stored."""
    from surgeon.checkpoint.checkpoint import open_path
    from surgeon.traits import quantized

    checkpoint = open_path(found.path, str(found.path))
    if quantized(checkpoint) is None:
        return
    from surgeon.deploy import quantized_check
    from surgeon.formats.dequantized import dequantized

    try:
        found.decoded = quantized_check.check(found.path, dequantized(checkpoint), memory_limit=memory_limit)
    except InputError as error:
        if error.code in ("E445", "E446", "E447"):  # a form that is not read here; its reader loaded it
            found.decoded = {"notice": f"not compared with decoded numbers: {error.message}"}
            return
        found.findings.append(error)


def _without_experts(folder: Path) -> dict[str, Any] | None:
    """Return what the report of a pruned mixture of experts says, None for any other model."""
    try:
        document = json.loads((folder / "pruning.json").read_bytes())
        return document if isinstance(document, dict) and "experts" in document else None
    except (OSError, ValueError):
        return None


def _compare_masked(
    found: Verification,
    document: dict[str, Any],
    other: Path,
    *,
    threads: int | None,
    memory_limit: int | None,
) -> None:
    """Compare a model with fewer experts with its source, layer by layer; both may be larger than memory."""
    from surgeon.calibrate.data import random_tokens
    from surgeon.calibrate.settings import Settings
    from surgeon.checkpoint.checkpoint import open_path
    from surgeon.experts import masked
    from surgeon.formats.dequantized import runnable
    from surgeon.structure.experts.cut import ExpertCut
    from surgeon.structure.experts.find import experts_of

    if document.get("replaced"):
        found.findings.append(InputError("E409", "its experts were merged, so nothing else computes what it must", where=Where(str(found.path)),
                                         help="leave --against out, and evaluate it"))  # fmt: skip
        return
    source, pruned = open_path(other, str(other)), open_path(found.path, str(found.path))
    try:
        cut = ExpertCut.from_document(document["experts"])
        config = source.config or {}
        vocabulary = int(config.get("vocab_size") or config.get("text_config", {}).get("vocab_size") or 1)
        samples = [sample.ids for sample in random_tokens(vocabulary, 4, 64, 0).samples]
        whole = runnable(source)
        result = masked.compare(
            whole,
            experts_of(whole),
            cut,
            runnable(pruned),
            samples,
            Settings(threads=threads, memory_limit=memory_limit),
        )
    except (KeyError, TypeError, ValueError) as error:
        found.findings.append(
            InputError(
                "E408",
                f"pruning.json is damaged: {type(error).__name__}",
                where=Where(str(found.path)),
                help="prune the source again; without --against the folder is verified without its report",
            )
        )
        return
    except SurgeonError as error:
        found.findings.append(error)
        return
    finally:
        source.close()
        pruned.close()
    found.against = {
        "masked": True, "max_difference": result.max_difference, "exact": result.exact, "tokens": result.tokens,
        "differs_from_unmasked": result.differs_from_unmasked, "tolerance": result.tolerance,
    }  # fmt: skip
    if not result.equal:
        found.findings.append(InputError("E409", f"its logits differ from those of the source with the dropped experts masked by {result.max_difference:.3g}, "
                                         f"more than roundings explain ({result.tolerance:.2g})", where=Where(str(found.path)),
                                          help="was it pruned from this --against? then files changed since: surgeon verify MODEL, or prune again"))  # fmt: skip


def _own_code(*folders: Path) -> dict[Path, readers.OwnCode]:
    """Return the packaged class for every folder of a model whose layers differ (its own files are never run).

    Raises:
        InputError: E326 a code file in a folder is not the packaged one; E327 a family without such a class.
    """
    from surgeon.checkpoint.strict_json import read_json_object
    from surgeon.deploy import packaged

    return {
        folder: own for folder in folders if (own := packaged.code_of(folder, read_json_object(folder / "config.json")))
    }  # fmt: skip


@takes(EvaluateOptions)
@telling
def evaluate(
    model: str | Path,
    *,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
    **options: Unpack[EvaluateOptions],
) -> Result:
    """Measure a model: accuracy, tokens per answer, perplexity, divergence; the options of ``surgeon eval``.

    Args:
        model: folder or hub id.
        progress: see `surgeon.python.progress.Progress`.
        options: any field of `surgeon.evaluate.request.EvalRequest`; ``output`` keeps the result in a file.

    Returns:
        `Result`: the document ``surgeon eval --json`` prints. Gates that fail are in it (``passed``), not raised.

    Example:
        >>> surgeon.evaluate("merged", questions=("q.jsonl",), baseline="long")  # doctest: +SKIP
    """
    from surgeon.evaluate import request, run

    asked = request.build(model=str(model), **plain(options, request.EvalRequest))
    found = run.evaluate(asked, progress, stop)
    run.save(found, asked)
    return Result("eval", found, asked.result_file())


@contextlib.contextmanager
def open_source(model: str | Path | Source, **opening: Any) -> Iterator[Source]:
    """Open the one model that something is derived from; ``opening`` as in `open_model`.

    A source that is open already, such as a step's result that was not written, is given as it is and stays open.
    """
    if isinstance(model, Source):
        yield model
        return
    with open_model(model, **opening) as opened:
        yield Source(
            opened.key, opened.checkpoint, opened.ref.path, opened.located.repo, opened.located.commit
        )


def default_output(model: str | Path, ending: str) -> Path:
    """Return where a derived model goes when nobody says: beside a local model, else in the current folder."""
    path = Path(model)
    if path.exists():
        folder = path.resolve()
        return folder.parent / f"{folder.name}-{ending}"
    return Path(f"{str(model).rpartition('/')[2].partition('@')[0]}-{ending}")


@takes(PruneOptions)
@telling
def prune(
    model: str | Path = ".",
    output: str | Path | None = None,
    *,
    overwrite: bool = False,
    resume: bool = True,
    dry_run: bool = False,
    progress: Progress | None = None,
    say: Say | None = None,
    stop: threading.Event | None = None,
    **options: Unpack[PruneOptions],
) -> Result:
    """Prune a model to a speedup, a size or a share; the options of ``surgeon prune``.

    Args:
        model: folder or hub id.
        output: folder of the result; default NAME-pruned beside the model.
        progress: see `surgeon.python.progress.Progress`.
        say: called with one sentence at a time.
        options: any field of `surgeon.prune.request.PruneRequest`; for mixtures of experts of
            `surgeon.prune.experts.request.ExpertRequest`.

    Returns:
        `Result`: the document ``surgeon prune --json`` prints: members with sizes, measured speedup, held-out quality.

    Example:
        >>> surgeon.prune("model", target_speedup=1.5)  # doctest: +SKIP
    """
    from surgeon.prune import request as requests
    from surgeon.prune.experts import request as expert_requests
    from surgeon.structure.experts.sizes import holds_routed

    if str(model) == "." and not Path("config.json").is_file():
        raise UsageError("E204", "no model was named, and the current folder holds none", help="surgeon prune MODEL --target-speedup 1.5")  # fmt: skip
    destination = Path(output) if output else default_output(model, "pruned")
    asked = plain(options, requests.PruneRequest, expert_requests.ExpertRequest)
    how: dict[str, Any] = {
        "overwrite": overwrite, "resume": resume, "dry_run": dry_run, "progress": progress, "say": say, "stop": stop
    }  # fmt: skip
    method = str(asked.get("method") or "").replace("_", "-").lower()
    if method and method not in expert_requests.METHODS:
        # What is wrong with a request shows before the model is looked for.
        request = requests.build(model=str(model), **asked)
        with open_source(model, offline=request.offline, dequantize=request.dequantize) as source:
            _tell_decoded(source, say)
            from surgeon.prune import run

            return Result("prune", run.prune(request, source, destination, **how))
    if method:
        expert_request = expert_requests.build(model=str(model), **asked)
        with open_source(
            model, offline=expert_request.offline, dequantize=expert_request.dequantize
        ) as source:
            _tell_decoded(source, say)
            return _prune_experts(expert_request, source, destination, how)
    of_experts = expert_requests.ExpertRequest.model_fields.keys() - requests.PruneRequest.model_fields.keys()
    if not of_experts & asked.keys():
        requests.build(model=str(model), **asked)
    dequantize = bool(asked.get("dequantize"))
    with open_source(model, offline=bool(asked.get("offline")), dequantize=dequantize) as source:
        _tell_decoded(source, say)
        if not holds_routed(source.checkpoint):
            request = requests.build(model=str(model), **asked)
            from surgeon.prune import run

            return Result("prune", run.prune(request, source, destination, **how))
        if asked.get("target_speedup") or asked.get("keep_layers"):
            raise UsageError("E266", f"{source.key} is a mixture of experts: dropping experts changes neither the work per token nor the layers",
                             help="--keep-experts or --target-size drops experts; for speed: --method depth or --method width")  # fmt: skip
        if say is not None and not asked.get("from_report"):
            say("a mixture of experts: --method reap, unless another is given")
        return _prune_experts(expert_requests.build(model=str(model), **asked), source, destination, how)


def _tell_decoded(source: Source, say: Say | None) -> None:
    """Say what is read dequantized."""
    from surgeon.formats.dequantized import permissions

    if say is not None and permissions(source.checkpoint):
        for note in getattr(source.checkpoint, "notes", ()):
            say(note)


def _prune_experts(request: Any, source: Source, destination: Path, how: dict[str, Any]) -> Result:
    from surgeon.prune.experts import run

    return Result("prune", run.prune(request, source, destination, **how))


@takes(QuantizeOptions)
@telling
def quantize(
    model: str | Path = ".",
    output: str | Path | None = None,
    *,
    overwrite: bool = False,
    resume: bool = True,
    dry_run: bool = False,
    progress: Progress | None = None,
    say: Say | None = None,
    stop: threading.Event | None = None,
    **options: Unpack[QuantizeOptions],
) -> Result:
    """Quantize a model to schemes, a size, bits per weight or a divergence; the options of ``surgeon quantize``.

    Args:
        model: folder or hub id.
        output: folder of the result (a file ending in .gguf for the form gguf); default NAME-quantized beside the model.
        progress: see `surgeon.python.progress.Progress`.
        say: called with one sentence at a time.
        options: any field of `surgeon.quantize.request.QuantizeRequest`.

    Returns:
        `Result`: the document ``surgeon quantize --json`` prints: bytes, bits, schemes, held-out quality, what the reader said.

    Example:
        >>> surgeon.quantize("model", target_size=5_000_000_000)  # doctest: +SKIP
    """
    from surgeon.quantize import request as requests

    if str(model) == "." and not Path("config.json").is_file():
        raise UsageError("E204", "no model was named, and the current folder holds none", help="surgeon quantize MODEL --scheme W4A16")  # fmt: skip
    request = requests.build(model=str(model), **plain(options, requests.QuantizeRequest))
    ending = "quantized.gguf" if request.format == "gguf" else "quantized"
    destination = Path(output) if output else default_output(model, ending)
    with open_source(model, offline=request.offline, dequantize=request.dequantize) as source:
        from surgeon.quantize import run

        found = run.quantize(
            request, source, destination, overwrite=overwrite, resume=resume, dry_run=dry_run, progress=progress,
            say=say, stop=stop,
        )  # fmt: skip
    return Result("quantize", found)


@takes(MeasureOptions)
@telling
def measure(
    model: str | Path,
    *,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
    **options: Unpack[MeasureOptions],
) -> Result:
    """Time a model, or two in turns; measure a latency table or memory; the options of ``surgeon measure``.

    Args:
        model: folder or hub id.
        progress: see `surgeon.python.progress.Progress`.
        options: any field of `surgeon.measure.request.MeasureRequest`; ``output`` keeps the result, or the table, in a file.

    Returns:
        `Result`: the document ``surgeon measure --json`` prints.

    Example:
        >>> surgeon.measure("fast", baseline="model", mode="decode")  # doctest: +SKIP
    """
    from surgeon.measure import request, run

    asked = request.build(model=str(model), **plain(options, request.MeasureRequest))
    found = run.measure(asked, progress, stop)
    run.save(found, asked)
    return Result("measure", found, asked.result_file())


@takes(EditOptions)
@telling
def edit(
    model: str | Path,
    output: str | Path | None = None,
    *,
    overwrite: bool = False,
    resume: bool = True,
    dry_run: bool = False,
    threads: int | None = None,
    memory_limit: int | None = None,
    weights: Literal["auto", "index", "single"] = "auto",
    ignore_unlisted: bool = False,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
    **options: Unpack[EditOptions],
) -> Result:
    """Edit weights along a direction; the options of ``surgeon edit``.

    Args:
        model: folder or hub id.
        output: folder of the result; default NAME-edited beside the model.
        options: any field of `surgeon.edit.request.EditRequest`.

    Returns:
        `Result`: the document ``surgeon edit --json`` prints: where it lies, what was found and changed.

    Example:
        >>> surgeon.edit("model", method="thinkedit", responses="answers.jsonl")  # doctest: +SKIP
    """
    from surgeon.edit import request as requests
    from surgeon.edit import run

    asked = requests.build(**plain(options, requests.EditRequest))
    opening = {
        "offline": asked.offline,
        "weights": weights,
        "ignore_unlisted": ignore_unlisted,
        "dequantize": asked.dequantize,
    }
    with open_source(model, **opening) as source:
        where = (
            Path(output) if output else run.default_output(str(model), source.checkpoint.folder, source.repo)
        )
        machine: dict[str, Any] = {
            "threads": threads,
            "memory_limit": memory_limit,
            "progress": progress,
            "stop": stop,
        }
        prepared = run.prepare(asked, source, title=where.name, dry=dry_run, **machine)
        if dry_run:
            return Result("edit", edited.rehearsed(prepared, where))
        done = run.write(prepared, asked, where, overwrite=overwrite, resume=resume, **machine)
        return Result("edit", edited.written(done))


@takes(ExportOptions)
@telling
def export(
    model: str | Path,
    output: str | Path | None = None,
    *,
    overwrite: bool = False,
    resume: bool = True,
    dry_run: bool = False,
    threads: int | None = None,
    memory_limit: int | None = None,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
    **options: Unpack[ExportOptions],
) -> Result:
    """Write a model in another form, or one member of a nested family; the options of ``surgeon export``.

    Args:
        model: folder, file or hub id.
        output: folder or file of the result.
        options: any field of `surgeon.deploy.export_request.ExportRequest`.

    Returns:
        `Result`: the document ``surgeon export --json`` prints.

    Example:
        >>> surgeon.export("fast", "fast.gguf", to="gguf")  # doctest: +SKIP
    """
    from surgeon.deploy import export_request
    from surgeon.deploy.export import export as run

    request = export_request.build(model=str(model), **plain(options, export_request.ExportRequest))
    opening = {
        name: getattr(request, name)
        for name in ("offline", "weights", "ignore_unlisted", "allow_pickle", "dequantize")
    }
    with open_source(model, **opening) as source:
        found = run(source, request, Path(output) if output else None, overwrite=overwrite, resume=resume, dry_run=dry_run,
                    threads=threads, memory_limit=memory_limit, progress=progress, stop=stop)  # fmt: skip
    return Result("export", found)


def report(
    results: Any,
    output: str | Path | None = None,
    *,
    title: str | None = None,
    log_tokens: bool = False,
    iso_lines: bool = False,
) -> Report | Path:
    """Make one report over results; the options of ``surgeon report``.

    Args:
        results: one or several: what `evaluate`, `run`, `prune` and the others returned, or files that their commands wrote
            with ``--json``; model folders among files add how a model was made.
        output: a file ending in .html, .md, .svg or .png (or .json for the documents); None returns the page.
        title: its heading.
        log_tokens: logarithmic axis for answer lengths.
        iso_lines: draw lines of equal accuracy per 1,000 tokens.

    Returns:
        The path; without ``output`` a `Report`, which a notebook shows.

    Raises:
        UsageError: E235 no results, E237 another suffix, E238 nothing to plot.
        InputError: E234, E236 a file is no result.

    Example:
        >>> surgeon.report(["long.json", "merged.json"], "report.html")  # doctest: +SKIP
    """
    from surgeon.python.results import report as made
    from surgeon.report import documents

    given = [results] if isinstance(results, (str, os.PathLike, Mapping)) else list(results)
    files = [one for one in given if not isinstance(one, Mapping)]
    found = [
        one.document() if isinstance(one, Result) else dict(one) for one in given if isinstance(one, Mapping)
    ]
    if files or not found:
        found = [*documents.load([Path(one) for one in files]), *found]
    return made(found, output, title=title, log_tokens=log_tokens, iso_lines=iso_lines)


def doctor(*, model: str | Path | None = None, offline: bool = False) -> Document:
    """Report on this machine, and on what can be done with a model here; the options of ``surgeon doctor``.

    Example:
        >>> surgeon.doctor(model="merged")  # doctest: +SKIP
    """
    from surgeon.python import diagnosis

    found = diagnosis.doctor()
    if model is not None:
        summary = inspect(model, offline=offline).summary
        found["model"] = diagnosis.possibilities(summary, found["environment"])
    return found
