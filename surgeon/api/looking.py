"""What checkpoints hold and how two differ: `inspect`, `inspect_experts`, `diff`."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from surgeon.api.opening import open_model
from surgeon.errors import InputError, UsageError
from surgeon.merge.prepare import OpenModel
from surgeon.python import findings
from surgeon.python.options import ExpertOptions, PathLike, takes
from surgeon.python.progress import Progress, counted, telling
from surgeon.python.rendering import View
from surgeon.python.results import Shown
from surgeon.system import physical_cores

if TYPE_CHECKING:
    from surgeon import comparison, inspection
    from surgeon.checkpoint.header import TensorInfo


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
