"""A model made from one other: `prune`, `quantize`, `edit`, `export`."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, Literal, Unpack

from surgeon.api.opening import default_output, open_source
from surgeon.derive import Source
from surgeon.errors import UsageError
from surgeon.python import edited
from surgeon.python.options import EditOptions, ExportOptions, PruneOptions, QuantizeOptions, plain, takes
from surgeon.python.progress import Progress, Say, telling
from surgeon.python.results import Result


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
