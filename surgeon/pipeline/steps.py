"""The steps of one recipe, or of one point of a sweep, in order; what is there already is not made again.

A step is fresh when it was made from the same options, the same inputs and the same program, and its result is
remembered. A fresh step's model need not be there any more: it is made again only when a step that is not fresh
reads it, or when it is to be published.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgeon.derive import Source
from surgeon.errors import Interrupted, SurgeonError, UsageError
from surgeon.pipeline import verbs
from surgeon.pipeline.digests import Digests, made_digest
from surgeon.pipeline.fusing import Fusion, leave
from surgeon.pipeline.kept import BASELINES, POINTS, Kept, Shelf
from surgeon.pipeline.results import plain, values_of
from surgeon.recipe.recipe import Recipe, Step, StepOutput, replaced

OF_THE_COMPARISON = {"model", "baseline", "kl", "gate", "gate_limited", "samples_out"}
"""Options of eval that are about the compared model, or about both."""


@dataclass
class Made:
    """A step of a run.

    Attributes:
        status: "done", "unchanged", "skipped", "failed" or "planned".
        path: where its model lies, when it has one.
        fused: its model is handed to the next step unwritten.
        source: such a model; None until somebody reads it.
    """

    step: Step
    status: str = "skipped"
    path: Path | None = None
    seconds: float | None = None
    document: dict[str, Any] | None = None
    digest: str | None = None
    fingerprint: str | None = None
    waits: tuple[str, ...] = ()
    fused: bool = False
    source: Source | None = None

    def plain(self) -> dict[str, Any]:
        found = {"id": self.step.id, "verb": self.step.verb, "status": self.status, "seconds": self.seconds,
                 "path": None if self.path is None else str(self.path), "document": self.document}  # fmt: skip
        found |= {"fused": True} if self.fused else {}
        return {**found, "waits_for": list(self.waits)} if self.waits else found


@dataclass
class Steps:
    """Runs the steps of one recipe.

    Attributes:
        chosen: ids that may run; of the others what an earlier run left is used.
        shared: fingerprint -> a step another point of the sweep made.
        strict: a warning of a step ends the run.
        fusion: what is handed on unwritten.
    """

    recipe: Recipe
    shelf: Shelf
    digests: Digests
    machine: verbs.Machine
    chosen: frozenset[str]
    strict: bool = False
    resume: bool = True
    prefix: str = ""
    shared: dict[str, Made] = field(default_factory=dict)
    fusion: Fusion = field(default_factory=Fusion)

    def __post_init__(self) -> None:
        self.made = {step.id: Made(step) for step in self.recipe.steps}
        self.models = {model.reference for model in self.recipe.models.values()}
        self._survey()
        for made in self.made.values():
            if made.path is not None and made.fingerprint is not None:
                self.shared.setdefault(made.fingerprint, made)

    # ---- what is there ---------------------------------------------------------------------------

    def _survey(self) -> None:
        """Find out which steps are fresh, and where their models lie."""
        fresh: dict[str, Kept] = {}
        digests: dict[str, str] = {}
        for step in self.recipe.steps if self.resume else ():
            if any(name not in digests for name in step.uses):
                continue
            kept = self.shelf.read(step)
            if kept is None or kept.fingerprint != self.digests.step(step, self.models, digests):
                continue
            fresh[step.id] = kept
            if kept.digest is not None:
                digests[step.id] = kept.digest
        self._locate(fresh)

    def _locate(self, fresh: dict[str, Kept]) -> None:
        """Keep of the fresh steps those whose model is there, or is read by nobody that runs."""
        needed = {self.recipe.publish} if self.recipe.publish else set()
        for step in reversed(self.recipe.steps):
            kept = fresh.get(step.id)
            path, fused = None, False
            if kept is not None and kept.digest is not None:
                path = self.shelf.find(step, kept.digest, file=self._is_file(step))
                fused = path is None and step.id in self.fusion.readers and self.shelf.left(step, kept.digest)
                if path is None and not fused and step.id in needed:
                    kept = None
            if kept is None or fused:
                needed |= set(step.uses)
            if kept is None:
                continue
            self.made[step.id] = Made(
                step,
                "unchanged",
                path,
                kept.seconds,
                kept.document,
                kept.digest,
                kept.fingerprint,
                fused=fused,
            )

    @staticmethod
    def _is_file(step: Step) -> bool:
        return verbs.gguf_asked(step.verb, step.options)

    @property
    def complete(self) -> bool:
        """Say whether every step has a result."""
        return all(made.status in ("done", "unchanged") for made in self.made.values())

    @property
    def documents(self) -> dict[str, dict[str, Any]]:
        return {name: made.document for name, made in self.made.items() if made.document is not None}

    @property
    def results(self) -> dict[str, dict[str, float | None]]:
        return {
            name: plain(values_of(self.made[name].step.verb, document))
            for name, document in self.documents.items()
        }

    @property
    def warnings(self) -> list[str]:
        found = [
            f"{name}: {text}"
            for name, document in self.documents.items()
            for text in document.get("warnings") or ()
        ]
        return list(dict.fromkeys(found))

    def waiting(self) -> list[Step]:
        """Return the steps that will run."""
        return [
            step
            for step in self.recipe.steps
            if step.id in self.chosen and self.made[step.id].status != "unchanged"
        ]

    def check_choice(self) -> None:
        """Refuse a choice of steps that read what is not there.

        Raises:
            UsageError: E2010.
        """
        ready = {
            name
            for name, made in self.made.items()
            if made.status == "unchanged" and (made.path is not None or made.fused)
        }
        for step in self.waiting():
            lacking = [name for name in step.uses if name not in ready]
            if lacking:
                raise UsageError("E2010", f"step {step.id} reads what {lacking[0]} makes, and that is not there", where=step.where,
                                 help="run it too; intermediate models stay with --keep-intermediate")  # fmt: skip
            if step.writes:
                ready.add(step.id)

    # ---- running ---------------------------------------------------------------------------------

    def run(self) -> None:
        """Run every chosen step that is not there; the first error ends the run, and what is finished stays."""
        self.shelf.make_folders()
        for step in self.waiting():
            stop = self.machine.stop
            if stop is not None and stop.is_set():
                raise Interrupted("E130", f"stopped before step {step.id}")
            try:
                self._step(step)
            except BaseException as error:
                self.made[step.id].status = "failed"
                if isinstance(error, SurgeonError) and not isinstance(error, Interrupted):
                    error.message = f"step {self.prefix}{step.id}: {error.message}"
                raise

    def _step(self, step: Step) -> None:
        for name in step.uses:
            self._take_up(self.made[name])
        fingerprint = self.digests.step(
            step, self.models, {n: m.digest for n, m in self.made.items() if m.digest is not None}
        )
        twin = self.shared.get(fingerprint)
        fused = step.id in self.fusion.readers
        there = twin is not None and (
            twin.source is not None if fused and twin.fused else not twin.fused and (twin.path is None or twin.path.exists())
        )  # fmt: skip
        if twin is not None and step.id != self.recipe.publish and there:
            assert twin.document is not None
            self.shelf.write(step, Kept(fingerprint, twin.digest, twin.document, twin.seconds or 0.0))
            self.made[step.id] = Made(
                step, "unchanged", twin.path, twin.seconds, twin.document, twin.digest, fingerprint,
                fused=twin.fused, source=twin.source,
            )  # fmt: skip
            return
        self._say(f"step {self.prefix}{step.id}: {step.verb}{self._how(step)}")
        began = time.perf_counter()
        place = self.shelf.place(step, file=self._is_file(step)) if step.writes else None
        options = self._resolved(step)
        if step.verb == "eval" and self.prefix:
            options = self._with_shared_baseline(options)
        target = place or self.shelf.result(step).with_suffix(".running.json")
        source = None
        if fused:
            document, source = leave(step.verb, options, target, self._told(step), anew=not self.resume)
        else:
            document = verbs.call(step.verb, options, target, self._told(step), anew=not self.resume)
        if (
            place is not None
            and not fused
            and (document.get("output") or {}).get("unchanged")
            and not _measured(step, document)
        ):
            # It was finished when an earlier run died, and what was measured of it died with that run.
            document = verbs.call(step.verb, options, target, self._told(step), anew=True)
        document = _whole(step.verb, document)
        made = Made(step, "done", None if fused else place, round(time.perf_counter() - began, 3), document, None, fingerprint,
                    fused=fused, source=source)  # fmt: skip
        if place is not None:
            made.digest = made_digest(place)
        self.shelf.write(step, Kept(fingerprint, made.digest, document, made.seconds or 0.0))
        if step.verb == "eval":
            for left in self.shelf.result(step).parent.glob(f"{step.id}.running*"):
                left.unlink(missing_ok=True)  # replies, kept to go on with
        self.made[step.id] = self.shared[fingerprint] = made
        if self.strict and document.get("warnings"):
            raise UsageError(
                "E220",
                f"--strict: step {self.prefix}{step.id}: {document['warnings'][0]}",
                where=step.where,
                help="change what the warning names, or leave out --strict; finished steps are kept",
            )

    def _with_shared_baseline(self, options: dict[str, Any]) -> dict[str, Any]:
        """Measure the baseline of a sweep once: all points are compared with that result, which lies in OUT.work/baselines."""
        baseline = options.get("baseline")
        measured = options.keys() & {"questions", "perplexity"}
        # Of a model that a step of the point makes, each point has its own; tasks are compared by lm-eval's own runs.
        if baseline not in self.models or not measured or "tasks" in options:
            return options
        alone = {name: value for name, value in options.items() if name not in OF_THE_COMPARISON}
        key = json.dumps([alone, self.digests.model(baseline)], sort_keys=True, default=str)
        folder = next(one for one in self.shelf.folder.parents if one.name == POINTS).parent / BASELINES
        found = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
        if not found.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            self._say(f"baseline of all points: eval {baseline}")
            running = found.with_suffix(".running.json")
            verbs.call("eval", {**alone, "model": baseline}, running, self.machine, anew=not self.resume)
            running.replace(found)
        return {**options, "baseline": str(found)}

    def _take_up(self, made: Made) -> None:
        """Open again what an earlier run left unwritten: its plan is made anew, its measurements are there."""
        if not made.fused or made.source is not None:
            return
        step = made.step
        for name in step.uses:
            self._take_up(self.made[name])
        self._say(f"step {self.prefix}{step.id}: taken up{self._how(step)}")
        place = self.shelf.place(step, file=False)
        document, made.source = leave(step.verb, self._resolved(step), place, self._told(step))
        digest = made_digest(place)
        if digest != made.digest:  # what was measured for it is gone, and measured anew it came out otherwise
            made.status, made.digest, made.document = "done", digest, _whole(step.verb, document)
            self.shelf.write(step, Kept(made.fingerprint or "", digest, made.document, made.seconds or 0.0))

    def _how(self, step: Step) -> str:
        """Say in a few words what becomes of a step's model."""
        if step.id in self.fusion.readers:
            return f", handed to {self.fusion.readers[step.id]} unwritten"
        reason = self.fusion.written.get(step.id)
        return "" if reason is None else f", written: {reason}"

    def close(self) -> None:
        """End the threads of models that were handed on unwritten."""
        for made in self.made.values():
            if made.source is not None:
                made.source.checkpoint.close()  # type: ignore[attr-defined]
                made.source = None

    def _resolved(self, step: Step) -> dict[str, Any]:
        def found(one: Any) -> Any:
            if not isinstance(one, StepOutput):
                return one
            made = self.made[one.step]
            return made.source if made.source is not None else str(made.path)

        return replaced(step.options, found)

    def _told(self, step: Step) -> verbs.Machine:
        from dataclasses import replace

        tell = self.machine.progress
        if tell is None:
            return self.machine
        return replace(
            self.machine,
            progress=lambda what, done, total: tell(f"{self.prefix}{step.id}: {what}", done, total),
        )

    def _say(self, text: str) -> None:
        if self.machine.say is not None:
            self.machine.say(text)

    # ---- rehearsing ------------------------------------------------------------------------------

    def rehearse(self) -> None:
        """Check every step as far as its inputs exist; nothing is written."""
        for step in self.waiting():
            fused = step.id in self.fusion.readers
            if how := self._how(step):
                self._say(f"step {self.prefix}{step.id}: {step.verb}{how}")
            waits = tuple(name for name in step.uses if self.made[name].path is None)
            document: dict[str, Any] = {"status": "dry-run", "warnings": []}
            if not waits:
                beside = self.shelf.destination.with_name(
                    f"{self.shelf.destination.name}.{step.id}{'.gguf' if self._is_file(step) else ''}"
                )
                options, told = self._resolved(step), self._told(step)
                if fused:
                    document, _ = leave(step.verb, options, beside, told, dry_run=True)
                else:
                    document = verbs.call(
                        step.verb, options, beside if step.writes else None, told, dry_run=True
                    )
                if isinstance(document.get("output"), dict):
                    document["output"]["path"] = str(self.shelf.place(step, file=self._is_file(step)))
            self.made[step.id] = Made(step, "planned", None, None, document, waits=waits, fused=fused)


def _whole(verb: str, document: dict[str, Any]) -> dict[str, Any]:
    """Return a step's document as its command prints it."""
    return {"schema": 1, "command": verb, "exit_code": 0, "error": None, **document}


def _measured(step: Step, document: dict[str, Any]) -> bool:
    """Say whether a document of a step that found its result in place still says what gates may ask."""
    return step.verb in ("merge", "edit", "export") or bool(document.get("metrics"))
