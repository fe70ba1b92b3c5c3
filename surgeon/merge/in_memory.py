"""Merging state dicts: the same plan and the same arithmetic as for files, without any file."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from surgeon import engine
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.memory import MemoryCheckpoint, MemoryWriter, is_torch
from surgeon.errors import UsageError, raise_all
from surgeon.merge import align
from surgeon.merge.planner import Options, assemble, draft
from surgeon.merge.prepare import adjusted, reference_model
from surgeon.merge.references import parse_model_ref
from surgeon.merge.request import MergeRequest, resolve
from surgeon.plan import OutputModel

State = Mapping[str, Any]
NOT_HERE = ("tokenizer", "chat_template", "vocab", "config")
"""Options about files beside the weights; a state dict has none."""


def named_inputs(models: Sequence[State], base: Any) -> tuple[tuple[str, ...], str | None, dict[str, State]]:
    """Give state dicts names to plan with; ``base`` is one of them, or one more."""
    states = list(models)
    if base is not None and not any(base is s for s in states):
        if not isinstance(base, Mapping):
            raise UsageError("E204", "base is no state dict, the models are", help="give base as a dict, too")
        states.append(base)
    names = {f"model-{i + 1}": s for i, s in enumerate(states)}
    chosen = None if base is None else next(n for n, s in names.items() if s is base)
    return tuple(names)[: len(models)], chosen, names


def merge_states(
    request: MergeRequest,
    states: Mapping[str, State],
    *,
    threads: int,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Merge and return a state dict of the first model's kind; a sweep returns one for each point.

    Raises:
        SurgeonError: what a merge of the same tensors in files would raise.
    """
    for option in NOT_HERE:
        if getattr(request, option) is not None:
            raise UsageError(
                "E208",
                f"{option} needs model folders; state dicts are weights only",
                help="save the state dicts with config.json and tokenizer first",
            )
    resolved = resolve(request)
    needs = resolved.spec.adjust.measured
    if needs:
        raise UsageError("E208", f"{', '.join(needs)} runs the models, which state dicts cannot",
                         help="save the models; or measure once with folders and give layer_scores")  # fmt: skip
    refs = {parse_model_ref(name): name for name in states}
    opened: dict[Any, Checkpoint] = {ref: MemoryCheckpoint(name, states[name]) for ref, name in refs.items()}
    options = Options(
        structure=resolved.pair[0] if resolved.pair else None, ignore=request.ignore, dense=request.dense,
        layers=request.layers, points=resolved.points, seed=request.seed, allow_nonfinite=request.allow_nonfinite,
        quirks=request.mergekit_quirks,
    )  # fmt: skip
    findings = align.Findings()
    align.check_inputs(
        {refs[r]: c for r, c in opened.items()}, findings, arithmetic=request.method != "passthrough"
    )
    raise_all(findings.errors)
    if resolved.spec.adjust.active:
        options = replace(options, reference=reference_model(resolved.spec))
    views, options = adjusted(resolved.spec, refs, opened, options, None, findings)
    planned = draft(resolved.spec, views, refs, options, findings)
    points = list(options.points) or [""]
    plan = assemble(planned, {key: OutputModel(key, None) for key in points}, {"verb": "merge"})
    for text in plan.warnings:
        if request.strict:
            raise UsageError(
                "E220", f"strict: {text}", help="change what the warning names, or leave out strict"
            )
        warnings.warn(text, stacklevel=3)
    first = next(iter(states.values()))
    values = list(first.values())
    small = next((v.dtype for v in values if isinstance(v, np.ndarray) and v.dtype.name == "bfloat16"), None)
    as_torch = any(is_torch(v) for v in values)
    writers = {key: MemoryWriter(outputs, as_torch, small) for key, outputs in plan.outputs().items()}
    engine.compute(plan, writers, threads=threads, progress=progress)
    results = {key: writer.state() for key, writer in writers.items()}
    return results if options.points else results[""]
