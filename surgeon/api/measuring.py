"""Figures of models and of this machine: `evaluate`, `measure`, `report`, `doctor`."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

from surgeon.api.looking import inspect
from surgeon.python.options import EvaluateOptions, MeasureOptions, plain, takes
from surgeon.python.progress import Progress, telling
from surgeon.python.results import Document, Report, Result


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
