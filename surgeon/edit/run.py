"""From a request to an edited model: directions, the edited view, its plan, and what it did to the model."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.dtypes import CODES
from surgeon.derive import Derived, Source, plan_of
from surgeon.edit import project_out, steer, thinkedit
from surgeon.edit.direction_file import Directions, check_belongs, load
from surgeon.edit.edited_view import EditedView
from surgeon.edit.request import EditRequest
from surgeon.edit.writers import Stream, stream_of
from surgeon.errors import EnvironmentFault, UsageError
from surgeon.execute import Outcome, execute
from surgeon.plan import Plan
from surgeon.system import physical_cores

if TYPE_CHECKING:
    from surgeon.calibrate.settings import Settings
    from surgeon.edit.examples import Sets

Progress = Callable[[str, int, int], None]
"""Called with (what is done, steps done, steps)."""

CHECK_SAMPLES, CHECK_TOKENS = 16, 512
"""Neutral text on which an edit is compared with its source."""


@dataclass
class Prepared:
    """An edit that is ready to be written.

    Attributes:
        plan: None when only a control vector is asked for.
        report: what was found and what changes, as plain data.
        notes, warnings: sentences for the user.
        vector: layer -> what a control vector adds, when one is asked for.
    """

    plan: Plan | None
    report: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    vector: dict[int, np.ndarray] = field(default_factory=dict)
    model_type: str = ""


@dataclass
class Edited:
    """A finished edit.

    Attributes:
        outcome: of the written model, None for a control vector.
        report: what was found and changed.
        path: the model folder, or the control vector.
    """

    outcome: Outcome | None
    report: dict[str, Any]
    path: Path
    notes: list[str]
    warnings: list[str]


def default_output(path: str, folder: Path | None, repo: str | None) -> Path:
    """Return where an edit goes when nobody says: NAME-edited beside a local input, else here."""
    if repo is not None or folder is None:
        return Path(f"{(repo or path).rpartition('/')[2].removesuffix('.safetensors')}-edited")
    place = folder.resolve()
    return place.parent / f"{place.name}-edited"


def prepare(
    request: EditRequest,
    source: Source,
    *,
    title: str,
    dry: bool = False,
    threads: int | None = None,
    memory_limit: int | None = None,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> Prepared:
    """Find the direction and plan the edited model.

    Args:
        request: what to do.
        source: the open model.
        title: name of the result, for its card.
        dry: check everything that can be known without running the model; the plan then has the
            sizes of the result, not its values.
        progress: called with (what is done, steps done, steps).
    """
    run = _Run(request, source, threads, memory_limit, progress or (lambda *_: None), stop, title)
    if request.method == "rice":
        return run.rice(dry)
    run.stream.site(request.place)
    sets = run.sets()
    if dry and request.direction is None:
        return run.outline(sets)
    directions = run.directions(sets)
    return {"thinkedit": run.thinkedit, "project-out": run.project_out, "steer": run.steer}[request.method](
        directions, sets
    )


def edit(
    request: EditRequest,
    source: Source,
    output: Path,
    *,
    overwrite: bool = False,
    resume: bool = True,
    threads: int | None = None,
    memory_limit: int | None = None,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> Edited:
    """Find the direction, edit, write and verify; of a control vector only the file is written."""
    prepared = prepare(
        request,
        source,
        title=output.name,
        threads=threads,
        memory_limit=memory_limit,
        progress=progress,
        stop=stop,
    )
    return write(prepared, request, output, overwrite=overwrite, resume=resume, threads=threads,
                 memory_limit=memory_limit, progress=progress, stop=stop)  # fmt: skip


def write(
    prepared: Prepared,
    request: EditRequest,
    output: Path,
    *,
    overwrite: bool = False,
    resume: bool = True,
    threads: int | None = None,
    memory_limit: int | None = None,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> Edited:
    """Write what `prepare` planned."""
    if prepared.plan is None:
        from surgeon.edit import control_vector

        path = Path(str(request.control_vector))
        control_vector.write(path, prepared.vector, prepared.model_type)
        return Edited(None, prepared.report, path, prepared.notes, prepared.warnings)
    told = None if progress is None else lambda done, total: progress("writing", done, total)
    outcome = execute(
        prepared.plan, output, threads=threads or physical_cores(), overwrite=overwrite, resume=resume,
        memory_limit=memory_limit, progress=told, stop=stop,
    )  # fmt: skip
    return Edited(outcome, prepared.report, outcome.path, prepared.notes, prepared.warnings)


@dataclass
class _Run:
    """One edit: what all its steps need."""

    request: EditRequest
    source: Source
    threads: int | None
    memory_limit: int | None
    progress: Progress
    stop: threading.Event | None
    title: str
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def checkpoint(self) -> Checkpoint:
        return self.source.checkpoint

    @cached_property
    def stream(self) -> Stream:
        return stream_of(self.checkpoint)

    @property
    def code(self) -> str | None:
        """Storage type of written floats, None when every tensor keeps its own."""
        return CODES[self.request.dtype] if self.request.dtype else None

    def settings(self) -> Settings:
        if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
            raise EnvironmentFault("E512", "torch and transformers are not installed; responses are run through the model",
                                   help='pip install "model-surgeon[run]"')  # fmt: skip
        from surgeon.calibrate.settings import Settings

        return Settings(device=self.request.device, memory_limit=self.memory_limit, threads=self.threads)

    # ---- directions --------------------------------------------------------------------------------

    def sets(self) -> Sets | None:
        """Read the responses, None when there are none."""
        request = self.request
        if (request.responses, request.long, request.short) == (None, None, None):
            return None
        self.settings()  # tokenizers need what the model needs
        from surgeon.calibrate.tokens import load_encoder
        from surgeon.edit.examples import read_sets

        folder = self.checkpoint.folder
        if folder is None:
            raise UsageError(
                "E295", f"{self.checkpoint.label} is a file without a tokenizer", help="give the model folder"
            )
        found = read_sets(
            load_encoder(folder), responses=request.responses, long=request.long, short=request.short,
            thresholds=request.thresholds, samples=request.samples, sequence_length=request.sequence_length,
            seed=request.seed, offline=request.offline,
        )  # fmt: skip
        self.warnings += found.warnings
        return found

    def directions(self, sets: Sets | None) -> Directions:
        """Read the directions, or find them by running the responses."""
        request = self.request
        if request.direction is not None:
            found = load(Path(request.direction).expanduser())
            self.warnings += check_belongs(found, self.checkpoint, self.stream.hidden, force=request.force)
            if request.site is not None and request.site != found.site:
                raise UsageError("E296", f"--site is {request.site}, the directions are of the site {found.site}",
                                 help="leave out --site")  # fmt: skip
            return found
        assert sets is not None
        from surgeon.edit.directions import extract, remarks

        found = extract(
            self.checkpoint, self.stream, sets, self.settings(), site=request.place, window=request.tokens,
            seed=request.seed, progress=self.progress, stop=self.stop,
        )  # fmt: skip
        self.warnings += remarks(found)
        if request.save_direction is not None:
            found.save(Path(request.save_direction).expanduser())
        return found

    # ---- methods -----------------------------------------------------------------------------------

    def outline(self, sets: Sets | None) -> Prepared:
        """Plan the sizes of the result without running the model."""
        request = self.request
        self.notes.append("what is edited is decided by running the responses through the model")
        view = EditedView(self.checkpoint, {})
        if request.method == "steer":
            if request.control_vector is not None:
                return Prepared(None, {"sets": sets.record if sets else None}, self.notes, self.warnings)
            assert request.layer is not None
            baked = steer.bake(self.checkpoint, request.layer, np.ones(self.stream.hidden), part=self._part(request.place),
                               relabel=request.relabel == "auto")  # fmt: skip
            self.notes += baked.notes
            view = baked.view
        elif request.heads:
            thinkedit.parse_heads(request.heads)
        return self._prepared(view, {"sets": sets.record if sets else None}, {})

    def thinkedit(self, directions: Directions, sets: Sets | None) -> Prepared:
        request, strength = self.request, self._strength
        scored: dict[thinkedit.Head, float] = {}
        if request.heads:
            heads = thinkedit.parse_heads(part for text in request.heads for part in text.split(","))
        else:
            scored = thinkedit.scores(self.checkpoint, self.stream, directions)
            fraction = thinkedit.FRACTION if request.heads_fraction is None else request.heads_fraction
            heads = thinkedit.choose(scored, fraction=fraction, count=request.heads_count)
            lost = [head for head in heads if scored[head] <= 0]
            if lost:
                self.warnings.append(
                    f"{len(lost)} of the {len(heads)} heads do not write towards short thinking; fewer would do"
                )
        made = thinkedit.projections(
            self.checkpoint,
            self.stream,
            directions,
            heads,
            strength=strength,
            project_bias=request.project_bias,
        )
        view = EditedView(self.checkpoint, made)
        effects = thinkedit.effect(self.checkpoint, view, self.stream, made, heads, self.code)
        for row in effects:
            score = scored.get(thinkedit.Head(int(row["layer"]), int(row["head"])))
            if score is not None:
                row["score"] = score
        if any(writer.norm for writer in self.stream.attention()):
            self.warnings.append(
                "a norm follows the output projections: editing some heads rescales the others a little"
            )
        self._bias_remark([writer.bias for writer in self.stream.attention() if writer.tensor in made])
        total = sum(writer.heads for writer in self.stream.attention())
        report = {
            "direction": directions.record(),
            "heads": effects,
            "heads_total": total,
            "strength": strength,
        }
        recipe = {
            "heads": [str(head) for head in sorted(heads)],
            "strength": strength,
            "project_bias": request.project_bias,
        }
        return self._prepared(view, report, recipe, directions)

    def project_out(self, directions: Directions, sets: Sets | None) -> Prepared:
        request, strength = self.request, self._strength
        matrices = request.matrices or ("attention", "ffn")
        made = project_out.projections(
            self.checkpoint, self.stream, directions, matrices=matrices, layer=request.layer, layers=request.layers,
            strength=strength, project_bias=request.project_bias,
        )  # fmt: skip
        view = EditedView(self.checkpoint, made)
        effects = project_out.effect(self.checkpoint, view, made, self.code)
        self._bias_remark([writer.bias for writer in self.stream.writers if writer.tensor in made])
        if self.stream.embedding in made and (self.checkpoint.config or {}).get("tie_word_embeddings"):
            self.warnings.append("the embedding is also the output head: logits lose the direction, too")
        report = {"direction": directions.record(), "matrices": effects, "strength": strength}
        recipe = {"matrices": sorted(matrices), "layer": request.layer, "layers": request.layers, "strength": strength,
                  "project_bias": request.project_bias}  # fmt: skip
        return self._prepared(view, report, recipe, directions)

    def steer(self, directions: Directions, sets: Sets | None) -> Prepared:
        request = self.request
        layer = request.layer
        assert layer is not None
        if layer not in directions.vectors:
            raise UsageError(
                "E299",
                f"there is no direction for layer {layer}",
                help=f"layers 0 to {self.stream.layers - 1} have one",
            )
        towards_short = -directions.vectors[layer].astype(np.float64)
        part = self._part(directions.site)
        if request.control_vector is not None and directions.site == "attn":
            raise UsageError("E296", "a control vector shifts the outputs of layers, the directions are of the site attn",
                             help="extract them with --site layer")  # fmt: skip

        def baked(gamma: float) -> steer.Baked:
            return steer.bake(
                self.checkpoint, layer, gamma * towards_short, part=part, relabel=request.relabel == "auto"
            )

        report: dict[str, Any] = {"direction": directions.record(), "layer": layer, "site": directions.site}
        if request.control_vector is not None and request.gamma is None and request.kl_budget is None:
            self.notes.append(
                f"the vector is not scaled: llama.cpp --control-vector-scaled {request.control_vector}:GAMMA"
            )
            return self._vector(report, {layer: towards_short})
        gamma, sign = request.gamma, 1.0
        start = 0.03 * directions.norms[layer] / max(float(np.linalg.norm(towards_short)), 1e-30)
        if sets is not None:
            sign = self._sign(baked, start, sets, report)
        elif request.gamma is None or request.gamma > 0:
            self.notes.append(
                "which sign shortens was not tested, because no responses are given: it is the extraction's"
            )
        if request.kl_budget is not None:
            gamma = self._fitted(baked, start, sign, report)
        else:
            assert gamma is not None
            gamma *= sign
        report["gamma"] = gamma
        if request.control_vector is not None:
            return self._vector(report, {layer: gamma * towards_short})
        result = baked(gamma)
        self.notes += result.notes
        self.notes.append(
            "the shift acts on the prompt's tokens too, which steering at run time spares: tune gamma on the result"
        )
        report |= {"bias": result.bias, "zero_biases": len(result.zeros), "relabelled_from": result.relabelled or None,
                   "shift_norm": float(np.linalg.norm(gamma * towards_short))}  # fmt: skip
        recipe = {"layer": layer, "site": directions.site, "gamma": gamma, "bias": result.bias,
                  "relabelled_from": result.relabelled or None}  # fmt: skip
        return self._prepared(result.view, report, recipe, directions)

    def rice(self, dry: bool) -> Prepared:
        """Scale experts: those that are named, or those found in the responses."""
        settings = self.settings()
        from surgeon.edit import rice

        if dry and not self.request.scale_experts:
            rice.experts_in(self.checkpoint, self.request)
            self.notes.append("which experts are scaled is decided by running the responses through the model")  # fmt: skip
            return self._prepared(self.checkpoint, {}, {"beta": self.request.beta}, changed=[])
        found = rice.scaled(
            self.checkpoint, self.request, settings, compare=(lambda view: None) if dry else self._compared,
            progress=lambda done, total: self.progress("looking for experts of thinking", done, total), stop=self.stop,
        )  # fmt: skip
        self.notes += found.notes
        self.warnings += found.warnings
        return self._prepared(found.view, found.report, found.recipe, changed=found.changed)

    def _sign(
        self, baked: Callable[[float], steer.Baked], start: float, sets: Sets, report: dict[str, Any]
    ) -> float:
        from surgeon.edit.steering_strength import shortening_sign

        self.progress("testing the sign", 0, 1)
        sign, margins = shortening_sign(
            lambda gamma: baked(gamma).view, 3 * start, sets.long, sets.short, self.settings(), stop=self.stop
        )
        report["sign"] = {"sign": sign, "margins": margins}
        if sign < 0:
            self.warnings.append(
                "the opposite of the extracted direction favours short responses; it is used"
            )
        return sign

    def _fitted(
        self, baked: Callable[[float], steer.Baked], start: float, sign: float, report: dict[str, Any]
    ) -> float:
        from surgeon.edit.steering_strength import fit_gamma

        assert self.request.kl_budget is not None
        fit = fit_gamma(
            self.checkpoint, lambda gamma: baked(gamma).view, self._neutral(), self.settings(), budget=self.request.kl_budget,
            start=start, sign=sign, progress=lambda done, total: self.progress("fitting gamma", done, total), stop=self.stop,
        )  # fmt: skip
        report["fit"] = fit.record()
        return fit.gamma

    def _vector(self, report: dict[str, Any], vectors: dict[int, np.ndarray]) -> Prepared:
        return Prepared(
            None, {"method": "steer", **report}, self.notes, self.warnings, vectors, self.stream.model_type
        )

    # ---- parts -------------------------------------------------------------------------------------

    @property
    def _strength(self) -> float:
        return 1.0 if self.request.strength is None else self.request.strength

    @staticmethod
    def _part(site: str) -> str:
        return "attention" if site == "attn" else "ffn"

    def _bias_remark(self, biases: list[str | None]) -> None:
        if any(biases) and not self.request.project_bias:
            self.notes.append(
                "the matrices' biases keep their part of the direction; --project-bias takes it out"
            )

    def _neutral(self) -> list[np.ndarray]:
        """Return the neutral text: --calibration, or the text that comes with the package."""
        from surgeon.calibrate import data
        from surgeon.data.records import parse_sources

        assert self.checkpoint.folder is not None
        source = parse_sources(self.request.calibration) if self.request.calibration else None
        found = data.load(source, self.checkpoint.folder, samples=CHECK_SAMPLES, sequence_length=CHECK_TOKENS,
                          seed=self.request.seed, offline=self.request.offline)  # fmt: skip
        return [sample.ids for sample in found.samples]

    def _compared(self, view: Checkpoint) -> dict[str, float] | None:
        """Return perplexity before and after, and KL(after || before), on neutral text."""
        if not self.request.check or self.checkpoint.folder is None:
            return None
        from surgeon.calibrate.head import Head
        from surgeon.edit.steering_strength import divergence, perplexity, states

        settings, samples = self.settings(), self._neutral()
        self.progress("comparing with the source", 0, 2)
        before = states(self.checkpoint, samples, settings, self.stop)
        self.progress("comparing with the source", 1, 2)
        after = states(view, samples, settings, self.stop)
        plain, edited = Head(self.checkpoint, settings), Head(view, settings)
        return {
            "kl": divergence(edited, plain, after, before),
            "perplexity_before": perplexity(plain, before, samples),
            "perplexity_after": perplexity(edited, after, samples),
        }

    def _prepared(
        self,
        view: Checkpoint,
        report: dict[str, Any],
        recipe: dict[str, Any],
        directions: Directions | None = None,
        changed: list[str] | None = None,
    ) -> Prepared:
        request = self.request
        if directions is not None:
            report["quality"] = self._compared(view)
        parameters = {
            key: value
            for key, value in recipe.items()
            if not isinstance(value, (list, dict)) and value is not None
        }
        full = {"verb": "edit", "method": request.method, **recipe}
        if directions is not None:
            full["direction"] = directions.record()
        if changed is None:
            assert isinstance(view, EditedView)
            changed = view.changed()
        report |= {"method": request.method, "changed": changed}
        derived = Derived(
            view=view, recipe=full, method=request.method, parameters=parameters, title=self.title,
            notices=tuple(self.warnings), command=None,
        )  # fmt: skip
        plan = plan_of(
            self.source, {"": derived}, verb="edit", dtype=request.dtype, seed=request.seed, notes=self.notes,
            warnings=self.warnings, max_shard_bytes=request.max_shard_size, allow_nonfinite=request.allow_nonfinite,
        )  # fmt: skip
        return Prepared(plan, report, self.notes, self.warnings)
