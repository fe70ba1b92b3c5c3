"""A run of a recipe: its steps, its gates, publication, and the document about it.

    OUT        exactly the published model; of a sweep one folder a point
    OUT.work   steps, results, result.json, report.html

Codes: E130 interrupted, E2010 a step that is not there, E401 and E402 gates, E4001 no point of a sweep passes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

from surgeon import api
from surgeon.errors import CheckFailed, OutputConflict, SurgeonError, UsageError, close_matches
from surgeon.measure.files import write_json
from surgeon.output import staging as stage
from surgeon.output.disk import Disk
from surgeon.pipeline import publication, results
from surgeon.pipeline.digests import Digests
from surgeon.pipeline.fusing import Fusion, fusion
from surgeon.pipeline.kept import BASELINES, POINTS, PUBLISH, RESULTS, STATE, STEPS, Shelf
from surgeon.pipeline.steps import Steps
from surgeon.pipeline.verbs import Machine, gguf_asked
from surgeon.python.options import takes
from surgeon.python.progress import Progress, Say, telling
from surgeon.python.results import Result
from surgeon.recipe.recipe import Recipe

RESULT = "result.json"
REPORT = "report.html"
BEAT = 60.0


class Run:
    """One run; `execute` or `rehearse`, then `document`.

    Args:
        recipe: what to do.
        output: where the published model goes; default: the recipe's name in the current folder.
        work: folder for steps and results; default OUT.work.
        only: ids of the steps to run; others must be there already where they are read.
        start, until: first and last step to run.
        keep_intermediate: leave the models of steps in the work folder after publication.
        gates: decide the recipe's gates.
        publish: "always" or "on_pass"; None: as the recipe says.
        strict: warnings are errors.
        overwrite: replace what lies at the output, as a whole.
        resume: use what an earlier run left.
        fuse: hand models to the next step unwritten where that is possible; None: as the recipe says.
    """

    def __init__(
        self, recipe: Recipe, output: str | Path | None = None, *, work: str | Path | None = None, only: Sequence[str] = (),
        start: str | None = None, until: str | None = None, keep_intermediate: bool = False, gates: bool = True,
        publish: str | None = None, strict: bool = False, overwrite: bool = False, resume: bool = True, fuse: bool | None = None,
        machine: Machine | None = None,
    ) -> None:  # fmt: skip
        self.recipe, self.machine = recipe, machine or Machine()
        self.destination = Path(output if output is not None else self._name()).expanduser().absolute()
        place = self.destination.with_name(f"{self.destination.name}.work")
        self.work = Path(work).expanduser().absolute() if work is not None else place
        self.keep, self.gates, self.when = keep_intermediate, gates, publish or recipe.when
        self.strict, self.overwrite, self.resume = strict, overwrite, resume
        self.fuse = recipe.fuse if fuse is None else fuse
        self.chosen = _chosen(recipe, only, start, until)
        self.began = time.perf_counter()
        self.runs: dict[str, Steps] = {}
        self.decided: dict[str, list[dict[str, Any]]] = {}
        self.published: list[str] = []
        self.changed = False

    # ---- the whole story -------------------------------------------------------------------------

    def execute(self) -> dict[str, Any]:
        """Run the recipe and publish its model; return the document, in which gates that failed are.

        Raises:
            SurgeonError: a step failed or the run was interrupted; finished steps stay, and the same call goes on.
        """
        self._before()
        if self._is_done():
            return self.document()
        self.work.mkdir(parents=True, exist_ok=True)
        with self._locked():
            if not self.resume:
                self._forget()
            self.changed = True
            try:
                for steps in self._points():
                    steps.check_choice()
                    steps.run()
            finally:
                for steps in self.runs.values():
                    steps.close()
            self._decide()
            self._publish()
            document = self._save(self.document())
        return document

    def rehearse(self) -> dict[str, Any]:
        """Check everything that can be known without writing anything, and say what would be done."""
        self._before()
        if not self._is_done():
            for steps in self._points():
                steps.rehearse()
        return self.document(status="dry-run")

    def failed(self, error: SurgeonError) -> dict[str, Any]:
        """Return the document of a run that ended with an error, and keep it in the work folder."""
        document = self.document(status="failed", error=error)
        return self._save(document) if self.runs and self.changed else document

    def _before(self) -> None:
        """Refuse what can be known before any work."""
        if self.recipe.warnings and self.strict:
            raise UsageError("E220", f"--strict: {self.recipe.warnings[0]}", help="change what the warning names, or leave out --strict")  # fmt: skip
        self.recipe.check_files()
        self._check_places()

    def _check_places(self) -> None:
        inputs = self._inputs()
        if not self.destination.parent.is_dir() or self.destination.is_symlink():
            stage.check_destination(
                self.destination, inputs, overwrite=self.overwrite, is_file=self._is_file()
            )
        stage.check_destination(self.destination, inputs, overwrite=True, is_file=self._is_file())
        place = self.work.resolve()
        for folder in inputs:
            if folder.is_dir() and (place == folder.resolve() or place.is_relative_to(folder.resolve())):
                raise OutputConflict("E602", f"the work folder {place} lies inside the model {folder}",
                                     help="choose another -o or --work; inputs are never modified")  # fmt: skip
        if place == self.destination.resolve() or self.destination.resolve().is_relative_to(place):
            raise OutputConflict(
                "E602",
                f"the output {self.destination} lies inside the work folder",
                help="choose another --work",
            )
        for folder in (self.work / STEPS, self.work / PUBLISH):
            if folder.is_symlink():
                raise OutputConflict(
                    "E601", f"{folder} is a link", help="remove it, or choose another --work"
                )

    def _inputs(self) -> list[Path]:
        """Return local models and files that are read, and the recipe."""
        found: dict[Path, None] = {}
        for recipe in (self.recipe, *(point.recipe for point in self.recipe.points)):
            for model in recipe.models.values():
                if model.local is not None:
                    found.setdefault(model.local)
                    if model.local.is_dir():
                        found.update(dict.fromkeys(sorted(model.local.glob("*.safetensors"))))
            found.update(dict.fromkeys(path for path, _ in recipe.files))
        return [path for path in found if path.exists()]

    def _name(self) -> str:
        return (
            f"{self.recipe.name}.gguf"
            if self._is_file() and not self.recipe.name.endswith(".gguf")
            else self.recipe.name
        )

    def _is_file(self) -> bool:
        if self.recipe.publish is None or self.recipe.points:
            return False
        step = self.recipe.step(self.recipe.publish)
        return gguf_asked(step.verb, step.options)

    # ---- steps -----------------------------------------------------------------------------------

    def _points(self) -> Iterator[Steps]:
        """Yield the steps of the recipe, or of each point of its sweep; what points have in common is made once."""
        shared: dict[str, Any] = {}
        digests = Digests(offline=self.machine.offline)
        for name, recipe in self._recipes().items():
            if name not in self.runs:
                folder = self.work / POINTS / name if name else self.work
                shelf = Shelf(folder, recipe.publish, self.destination / name if name else self.destination)
                self.runs[name] = Steps(recipe, shelf, digests, self.machine, self.chosen, strict=self.strict, resume=self.resume,
                                        prefix=f"{name}/" if name else "", shared=shared,
                                        fusion=fusion(recipe, self.chosen, keep=self.keep) if self.fuse else Fusion())  # fmt: skip
            yield self.runs[name]

    def _recipes(self) -> dict[str, Recipe]:
        return {point.name: point.recipe for point in self.recipe.points} or {"": self.recipe}

    def _is_done(self) -> bool:
        """Say whether an earlier run did all of it: every result is there, and the model at its place, verified."""
        list(self._points())
        if not self.resume or not self._all_there():
            self._check_free()
            return False
        self._decide()
        wanted = self._wanted()
        there = [name for name in wanted if self._path(name) == self.runs[name].shelf.destination]
        if there != wanted:
            self.decided.clear()
            self._check_free()
            return False
        self.published = wanted
        if wanted:
            stage.clear_leftovers(self.destination, Disk())
        return True

    def _all_there(self) -> bool:
        return all(made.status == "unchanged" for steps in self.runs.values() for made in steps.made.values())

    def _check_free(self) -> None:
        """Refuse an output that is in the way, before hours of work; what this recipe published itself is not."""
        ours = self._path("") == self.destination if "" in self.runs else False
        prefix = stage.staging_prefix(self.destination)
        paths = [path for name in self.runs if (path := self._path(name)) is not None]
        held = any(part.startswith(prefix) for path in paths for part in path.parts)
        if not ours and not held and self.recipe.publish is not None:
            stage.check_destination(
                self.destination, self._inputs(), overwrite=self.overwrite, is_file=self._is_file()
            )

    def _path(self, name: str) -> Path | None:
        steps = self.runs[name]
        return steps.made[steps.recipe.publish].path if steps.recipe.publish is not None else None

    def _forget(self) -> None:
        for name in (STEPS, PUBLISH, RESULTS, STATE, POINTS, BASELINES):
            shutil.rmtree(self.work / name, ignore_errors=True)

    # ---- gates and publication -------------------------------------------------------------------

    def _decide(self) -> None:
        for name, steps in self.runs.items():
            self.decided[name] = (
                results.decide(steps.recipe, steps.documents) if self.gates and steps.complete else []
            )

    def _passed(self, name: str) -> bool:
        return all(gate["passed"] for gate in self.decided.get(name, ()))

    def _wanted(self) -> list[str]:
        """Return the points ("" without a sweep) whose models are to be published."""
        if self.recipe.publish is None or not all(steps.complete for steps in self.runs.values()):
            return []
        return [name for name in self.runs if self.when == "always" or self._passed(name)]

    def _publish(self) -> None:
        wanted = self._wanted()
        candidates = {name: path for name in wanted if (path := self._path(name)) is not None}
        if not candidates:
            return
        if any(path != self.runs[name].shelf.destination for name, path in candidates.items()):
            publication.publish(candidates, self.destination, overwrite=self.overwrite, resume=self.resume)
        for name in candidates:
            steps = self.runs[name]
            assert steps.recipe.publish is not None
            steps.made[steps.recipe.publish].path = steps.shelf.destination
        self.published = list(candidates)
        self._report(self.document())  # while the folders of all steps are there to be read
        if not self.keep:
            self._tidy()

    def _tidy(self) -> None:
        """Remove models of steps that were published or only led there; results stay."""
        for name in self.published:
            steps = self.runs[name]
            for made in steps.made.values():
                if made.path is not None and made.path != steps.shelf.destination:
                    made.path = None
            for folder in (STEPS, PUBLISH):
                shutil.rmtree(steps.shelf.folder / folder, ignore_errors=True)

    # ---- the document ----------------------------------------------------------------------------

    def document(self, *, status: str = "ok", error: SurgeonError | None = None) -> dict[str, Any]:
        """Return the document of the run as it stands."""
        refusal = self.refusal() if error is None and status == "ok" else None
        if refusal is not None:
            status, error = "gate-failed", refusal
        points = [self._point(name) for name in self.runs] if self.recipe.points else []
        one = {} if self.recipe.points else self._point("") if "" in self.runs else {}
        text = json.dumps(self.recipe.plain(), sort_keys=True, default=str)
        unchanged = not self.changed and status != "dry-run" and bool(self.runs) and self._all_there()
        found = {
            "schema": 1, "command": "run", "status": status, "exit_code": 0 if error is None else error.exit_code,
            "recipe": {"name": self.recipe.name, "file": self.recipe.file, "sha256": hashlib.sha256(text.encode()).hexdigest()},
            "output": self._output(), "work": str(self.work), "steps": one.get("steps", []), "results": one.get("results", {}),
            "gates": one.get("gates", []), "points": points, "published": bool(self.published), "unchanged": unchanged,
            "seconds": round(time.perf_counter() - self.began, 3), "warnings": self.warnings(), "error": None if error is None else plain_error(error),
        }  # fmt: skip
        return _finite(found)

    def _point(self, name: str) -> dict[str, Any]:
        steps = self.runs[name]
        values = next((point.values for point in self.recipe.points if point.name == name), {})
        path = self._path(name)
        return {
            "name": name, "values": values, "steps": [made.plain() for made in steps.made.values()], "results": steps.results,
            "gates": self.decided.get(name, []), "passed": steps.complete and self._passed(name), "published": name in self.published,
            "path": None if path is None else str(path),
        }  # fmt: skip

    def _output(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "path": str(self.destination),
            "models": {name: str(self._path(name)) for name in self.published},
        }
        if "" in self.published:
            steps = self.runs[""]
            made = steps.made[str(steps.recipe.publish)]
            found |= {
                key: value
                for key, value in ((made.document or {}).get("output") or {}).items()
                if key not in ("path", "models", "unchanged")
            }
        return found

    def warnings(self) -> list[str]:
        return [*self.recipe.warnings, *(text for steps in self.runs.values() for text in steps.warnings)]

    def refusal(self) -> CheckFailed | None:
        """Return the error of gates that failed; of a sweep only when no point passes."""
        if not self.decided or (self.recipe.points and any(map(self._passed, self.runs))):
            return None
        if self.recipe.points:
            said = (
                "every model was published all the same"
                if self.published
                else f"the models stay in {self.work}"
            )
            return CheckFailed(
                "E4001", f"none of the {len(self.runs)} points of the sweep passes all gates", help=said
            )
        path = self._path("")
        if path == self.destination and not self.published:
            return results.refusal(self.decided[""], f"{path} is left as an earlier run published it")
        said = (f"published all the same: {path}" if self.published else
                f"nothing was published; the finished model is {path}, and --publish always publishes it" if path is not None else None)  # fmt: skip
        return results.refusal(self.decided[""], said or "no step makes a model, so nothing is withheld")

    def _save(self, document: dict[str, Any]) -> dict[str, Any]:
        """Keep the document in the work folder."""
        self.work.mkdir(parents=True, exist_ok=True)
        write_json(document, self.work / RESULT)
        if document["status"] != "ok" or not (self.work / REPORT).exists():
            self._report(document)
        return document

    def _report(self, document: dict[str, Any]) -> None:
        """Write the page about the run beside its document."""
        from surgeon import report

        report.write([document], self.work / REPORT)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the work folder: two runs that share it would take each other's steps for their own."""
        lock = stage.DestinationLock.acquire(self.work)
        done = threading.Event()

        def beat() -> None:
            while not done.wait(BEAT):
                with contextlib.suppress(OSError):
                    lock.heartbeat()

        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            lock.release()


def _chosen(recipe: Recipe, only: Sequence[str], start: str | None, until: str | None) -> frozenset[str]:
    """Return the steps that may run.

    Raises:
        UsageError: E2010.
    """
    order = [step.id for step in recipe.steps]
    for name in (*only, *(one for one in (start, until) if one is not None)):
        if name not in order:
            near = close_matches(name, order)
            raise UsageError(
                "E2010",
                f'no step is called "{name[:60]}"',
                help=(f"{near} " if near else "") + f"steps: {', '.join(order)}",
            )
    if only and (start or until):
        raise UsageError(
            "E2010", "--only says which steps run, and --from and --until say it too", help="give one of them"
        )
    first, last = (order.index(start) if start else 0), (order.index(until) if until else len(order) - 1)
    if first > last:
        raise UsageError(
            "E2010",
            f"--from {start} comes after --until {until}",
            help="steps run in the order they are written",
        )
    return frozenset(only or order[first : last + 1])


def plain_error(error: SurgeonError) -> dict[str, Any]:
    """Return a refusal as plain data."""
    where = error.where
    return {
        "code": error.code, "message": error.message, "help": error.help, "exit_code": error.exit_code,
        "where": None if where is None else {"file": where.file, "line": where.line, "column": where.column, "tensor": where.tensor},
        "others": [plain_error(other) for other in error.others],
    }  # fmt: skip


def _finite(value: Any) -> Any:
    """Return plain data that is JSON: NaN and infinities are null, everything else that is none is text."""
    if isinstance(value, dict):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)


class MergekitOptions(TypedDict, total=False):
    """Options of ``surgeon run`` for a mergekit YAML."""

    max_shard_size: int
    mergekit_quirks: bool
    weights: Literal["auto", "index", "single"]
    ignore_unlisted: bool
    allow_nonfinite: bool
    allow_pickle: bool


@takes(MergekitOptions)
@telling
def run(
    recipe: str | Path, output: str | Path | None = None, *, set: str | Sequence[str] = (), only: str | Sequence[str] = (),
    start: str | None = None, until: str | None = None, work: str | Path | None = None, keep_intermediate: bool = False,
    gates: bool = True, publish: str | None = None, fuse: bool | None = None, overwrite: bool = False, resume: bool = True,
    dry_run: bool = False, strict: bool = False, seed: int | None = None, threads: int | None = None,
    memory_limit: int | None = None, device: str | None = None, offline: bool = False, progress: Progress | None = None,
    say: Say | None = None, stop: threading.Event | None = None, **mergekit: Unpack[MergekitOptions],
) -> Result:  # fmt: skip
    """Run a recipe, or a mergekit YAML; the options of ``surgeon run``.

    Args:
        recipe: a recipe file (``version: 1``), the name of one that comes with the package, or a mergekit YAML.
        output: where the published model goes; default: the recipe's name in the current folder.
        set: PATH=VALUE, such as ``models.long=./mine``; one or several.
        start, until: the first and the last step to run (``--from`` and ``--until``).
        only, work, keep_intermediate, gates, publish, fuse, strict, overwrite, resume: see `Run`.
        progress: see `surgeon.python.progress.Progress`.
        say: called with one sentence at a time.
        stop: set it to stop after the work in progress; the same call goes on.
        mergekit: options that only a mergekit YAML takes: ``max_shard_size``, ``mergekit_quirks``, ``weights``...

    Returns:
        `Result`: the document ``surgeon run --json`` prints. Gates that failed are in it (``passed``), not raised.

    Example:
        >>> surgeon.run("recipe.yaml", "out", set=["models.long=./mine"])  # doctest: +SKIP
    """
    from surgeon.recipe import native, shipped, yaml

    file = str(shipped.file_of(str(recipe)))
    steps = {"only": only, "start": start, "until": until, "keep_intermediate": keep_intermediate, "gates": not gates,
             "publish": publish, "set": set, "fuse": fuse}  # fmt: skip
    if not native.is_native(yaml.read_text(Path(file)), file):
        _refuse(steps, "belongs to a recipe of several steps", "a mergekit YAML is one merge")
        options = {
            **mergekit,
            **({"device": device} if device else {}),
            "seed": seed or 0,
            "strict": strict,
            "offline": offline,
        }
        found = api.merge(file, output=output, overwrite=overwrite, resume=resume, dry_run=dry_run, threads=threads,
                          memory_limit=memory_limit, work=work, progress=progress, stop=stop, **options)  # fmt: skip
        return Result("run", found)
    _refuse(mergekit, "belongs to a mergekit YAML", "write it in the recipe, in the step it is for")
    when = None if publish is None else publish.replace("-", "_")
    if when not in (None, "always", "on_pass"):
        raise UsageError("E2009", f'publish is "{str(publish)[:40]}"', help="always or on-pass")
    machine = Machine(threads, memory_limit, device, offline, progress, say, stop)
    job = Run(native.read(file, (set,) if isinstance(set, str) else set, seed=seed), output, work=work,
              only=(only,) if isinstance(only, str) else only, start=start, until=until, keep_intermediate=keep_intermediate,
              gates=gates, publish=when, strict=strict, overwrite=overwrite, resume=resume, fuse=fuse, machine=machine)  # fmt: skip
    if dry_run:
        return Result("run", job.rehearse())
    try:
        return Result("run", job.execute())
    except SurgeonError as error:
        job.failed(error)
        raise


def _refuse(given: Mapping[str, Any], what: str, help: str) -> None:
    for option, value in given.items():
        if value:
            raise UsageError("E208", f"{option} {what}", help=help)
