"""`merge`: of models by name, of state dicts, of what a mergekit YAML names."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack, overload

from surgeon.api.planning import MergePlan, build_request, plan_merge, plan_spec
from surgeon.errors import OutputConflict, UsageError
from surgeon.merge.request import MergeRequest
from surgeon.merge.spec import MergeSpec
from surgeon.python import merged
from surgeon.python.options import MergeOptions, PathLike, plain, takes
from surgeon.python.progress import Progress, Say, counted, telling
from surgeon.python.results import Merged
from surgeon.system import physical_cores


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
