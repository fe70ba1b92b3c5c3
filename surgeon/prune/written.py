"""What a decided cut becomes on disk: the view, its companions, its recipe, and the programs that load it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from surgeon.checkpoint.checkpoint import Checkpoint, open_path
from surgeon.deploy import per_layer, runtimes
from surgeon.derive import Derived
from surgeon.errors import InputError, UsageError
from surgeon.prune import resolve
from surgeon.prune.decide import in_words
from surgeon.prune.request import PruneRequest, Target
from surgeon.prune.session import Session
from surgeon.structure.check import check, is_uniform, shapes
from surgeon.structure.cut import Cut
from surgeon.structure.views import MaskedView, PrunedView

KEPT_FILE = "pruning.json"
"""Companion that says which heads, channels and layers of the source a model consists of."""


def solve(session: Session, cut: Cut) -> Checkpoint | None:
    """Return solved weights of a cut, None where the criterion leaves weights as they are.

    Each cut has a file of its own: the model that is published may be an earlier one than the last that was timed.
    """
    if session.request.method == "depth" or not session.structures:
        return None
    folder = session.work / "solved"
    name = hashlib.sha256(f"{session.key} {cut.identity()}".encode()).hexdigest()[:24]
    file = folder / f"{name}.safetensors"
    if file.is_file():  # it appears only when it is complete
        return open_path(file)
    folder.mkdir(parents=True, exist_ok=True)
    source = session.source.checkpoint
    if session.request.sequential:
        return resolve.sequential(
            session.database, source, session.structure, cut, file, session.texts.statistics, session.settings,
            progress=session.tell, stop=session.stop,
        )  # fmt: skip
    return resolve.resolve(
        session.database, source, session.structure, cut, file, progress=session.tell, stop=session.stop
    )


def running_view(session: Session, cut: Cut, solved: Checkpoint | None, pruned: Checkpoint) -> Checkpoint:
    """Return what the library's classes can run layer by layer: the pruned model, or its masked equal."""
    if is_uniform(cut, session.structure) and not per_layer.is_per_layer(pruned.config or {}):
        return pruned
    return MaskedView(session.source.checkpoint, session.structure, cut, solved)


def reference_view(session: Session, cut: Cut, solved: Checkpoint | None, pruned: Checkpoint) -> Checkpoint:
    """Return what a written model must equal: the masked source where there is one.

    Cutting the residual stream, or a layer of a model that normalises its sums, has no masked equal.
    """
    try:
        return MaskedView(session.source.checkpoint, session.structure, cut, solved)
    except (InputError, UsageError) as error:
        if error.code not in ("E260", "E366"):
            raise
        return pruned


def derive(
    session: Session, target: Target, cut: Cut, solved: Checkpoint | None, title: str
) -> tuple[Derived, list[str]]:
    """Return the pruned model as it is to be written, and the programs that load it.

    Raises:
        InputError: E367 no stock class holds it and --layout is uniform; E327 nothing reads it.
    """
    request, checkpoint = session.request, session.source.checkpoint
    check(
        cut, session.structure, checkpoint.config or {}, for_stock=request.layout == "uniform",
        allow_norm_approx=request.allow_norm_approx,
    )  # fmt: skip
    view: Any = PrunedView(
        checkpoint, session.structure, cut, solved, allow_norm_approx=request.allow_norm_approx
    )
    files: dict[str, bytes] = {KEPT_FILE: kept_document(cut)}
    if per_layer.is_per_layer(view.config):
        view.config, code = per_layer.finish(view.config)
        files.update(dict(code))
    found = runtimes.readers(view.config)
    readers = [f"{one.runtime} ({one.form})" for one in found if one.loads]
    derived = Derived(
        view=view, recipe=recipe(session, target, cut), method=request.method, title=title, companions=files,
        parameters={"target": target.name, "shape": in_words(cut, session)},
        notices=tuple(f"{one.runtime}: {one.reason}" for one in found if one.reason),
        command=command(session, target),
    )  # fmt: skip
    return derived, readers


def kept_document(cut: Cut) -> bytes:
    """Return the content of `KEPT_FILE`."""
    return (json.dumps(cut.document(), separators=(",", ":")) + "\n").encode()


def kept_in(folder: Path) -> Cut:
    """Return the cut that a result's `KEPT_FILE` describes.

    Raises:
        OSError, ValueError, KeyError, TypeError: there is none.
    """
    return Cut.from_document(json.loads((folder / KEPT_FILE).read_bytes()))


def recipe(session: Session, target: Target, cut: Cut) -> dict[str, Any]:
    """Return the resolved request and what was decided, without paths, times or places."""
    return {
        "verb": "prune", **session.asked, "target": target.name, "kept": cut.identity(),
        "shapes": [[s.heads, s.groups, s.head_dim, s.ffn] for s in shapes(cut, session.structure)],
        "layers": list(cut.kept_layers),
    }  # fmt: skip


SILENT = frozenset({"model", "method", "criterion", "work", "threads", "memory_limit", "device", "offline", "max_shard_size",
                    "latency_table", "table_anyway", "calibration", "search_budget"})  # fmt: skip
"""Fields that a repeated command does not need, or that would name a place."""


def command(session: Session, target: Target) -> str:
    """Return the command that repeats a member, without paths."""
    request = session.request
    words = ["surgeon prune", session.source.key, f"--method {request.method}"]
    if request.criterion:
        words.append(f"--criterion {request.criterion.replace('_', '-')}")
    words.append(f"{_option(target)} {target.pattern or format(target.value, '.12g')}")
    targets = {"target_speedup", "target_params", "target_size", "sparsity", "keep_layers", "pattern"}
    for name, field in PruneRequest.model_fields.items():
        value = getattr(request, name)
        if name in SILENT or name in targets or value == field.default:
            continue
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words.append(f"--{option} {','.join(map(str, value)) if isinstance(value, tuple) else value}")
    if request.calibration:
        words.append("--calibration TEXT")
    return " ".join([*words, "-o OUT"])


def _option(target: Target) -> str:
    return {"speedup": "--target-speedup", "params": "--target-params", "size": "--target-size", "sparsity": "--sparsity",
            "layers": "--keep-layers", "pattern": "--pattern"}[target.kind]  # fmt: skip
