"""The Python functions behind the commands; the command line is one of their callers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgeon.errors import OutputConflict, UsageError
from surgeon.execute import Check, Outcome, execute, preflight
from surgeon.execute import input_locations as _inputs
from surgeon.merge.planner import Options
from surgeon.merge.prepare import Opening, Texts, prepare
from surgeon.merge.references import parse_model_ref
from surgeon.merge.request import MergeRequest, Resolved, resolve
from surgeon.merge.spec import MergeSpec
from surgeon.output import staging
from surgeon.plan import Plan
from surgeon.system import physical_cores


@dataclass
class MergePlan:
    """A merge that was planned and checked, not yet run."""

    plan: Plan
    notes: list[str]
    default_output: Path

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
        progress: Callable[[int, int], None] | None = None,
        stop: threading.Event | None = None,
    ) -> Outcome:
        """Execute and publish; see `surgeon.execute.execute`."""
        return execute(
            self.plan, Path(output) if output else self.default_output, threads=threads or physical_cores(),
            overwrite=overwrite, resume=resume, memory_limit=memory_limit, progress=progress, stop=stop,
        )  # fmt: skip


def plan_merge(request: MergeRequest, title: str = "merged") -> MergePlan:
    """Plan a merge from options."""
    resolved = resolve(request)
    return _plan(resolved.spec, request, resolved, title)


def plan_spec(spec: MergeSpec, request: MergeRequest, title: str = "merged") -> MergePlan:
    """Plan a merge from a spec (mergekit YAML); of the request only the surrounding options count."""
    return _plan(spec, request, Resolved(spec, None, (), {}), title)


def _plan(spec: MergeSpec, request: MergeRequest, resolved: Resolved, title: str) -> MergePlan:
    options = Options(
        ignore=request.ignore, dense=request.dense, layers=request.layers, points=resolved.points, seed=request.seed,
        max_shard_bytes=request.max_shard_size, allow_nonfinite=request.allow_nonfinite, quirks=request.mergekit_quirks,
        strict=request.strict,
    )  # fmt: skip
    opening = Opening(
        request.offline, request.weights, request.config, request.ignore_unlisted, request.allow_pickle
    )
    texts = Texts(
        tokenizer=parse_model_ref(request.tokenizer) if request.tokenizer else None,
        chat_template=request.chat_template, title=title,
    )  # fmt: skip
    plan = prepare(spec, options, opening, texts, resolved.pair)
    bare = all(m.config is None for m in plan.models.values())
    if bare and len(plan.models) > 1:
        raise UsageError("E215", "a sweep over bare files has no folder to write to",
                         help="give model folders, or --config config.json")  # fmt: skip
    default = Path("merged.safetensors") if bare else Path("merged")
    return MergePlan(plan, list(resolved.notes), default)


def merge(
    models: list[Any] | tuple[Any, ...] | str | Path,
    *,
    method: str = "linear",
    output: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = True,
    threads: int | None = None,
    memory_limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Outcome:
    """Merge checkpoints; the options are those of ``surgeon merge`` with underscores.

    Args:
        models: paths or hub ids.
        method: see ``surgeon methods merge``.
        output: folder, or file for bare files; default ``merged`` or ``merged.safetensors``.
        options: any field of `surgeon.merge.request.MergeRequest`, ``lambda_`` for lambda.

    Raises:
        SurgeonError: as the command would; see `surgeon.errors`.

    Example:
        >>> surgeon.merge(["long", "short"], method="ties", output="merged")  # doctest: +SKIP
    """
    request = build_request(models=tuple(str(m) for m in models), method=method, **options)
    planned = plan_merge(request, title=Path(output).stem if output else "merged")
    if output is None and planned.default_output.exists() and not overwrite:
        raise OutputConflict(
            "E601", f"the output exists: {planned.default_output}", help="give output=, or overwrite=True"
        )
    return planned.run(
        output,
        threads=threads,
        memory_limit=memory_limit,
        overwrite=overwrite,
        resume=resume,
        progress=progress,
    )


def build_request(**values: Any) -> MergeRequest:
    """Build a request; a validation failure becomes one UsageError per field."""
    from pydantic import ValidationError

    if "lambda_" in values:
        values["lambda"] = values.pop("lambda_")
    try:
        return MergeRequest(**{k: v for k, v in values.items() if v is not None})
    except ValidationError as error:
        findings = [
            UsageError("E212", f"{'.'.join(map(str, e['loc'])) or 'request'}: {e['msg']}")
            for e in error.errors()
        ]
        findings[0].others = tuple(findings[1:])
        raise findings[0] from None
