"""A merge that is planned and checked, and can be run."""

from __future__ import annotations

import contextlib
import shutil
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from surgeon.errors import UsageError, wrong_options
from surgeon.execute import Check, Outcome, execute, preflight
from surgeon.execute import input_locations as _inputs
from surgeon.merge.measured import Measured
from surgeon.merge.planner import Options
from surgeon.merge.prepare import Opening, Texts, open_models, prepare
from surgeon.merge.references import parse_model_ref
from surgeon.merge.request import MergeRequest, Resolved, resolve
from surgeon.merge.spec import MergeSpec
from surgeon.output import staging
from surgeon.plan import Plan
from surgeon.python.progress import Progress, counted, of_three
from surgeon.system import physical_cores


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
