"""What a run is checked for before hours of work, and what a dry run says: sizes, disk, memory, about how long.

Nothing here writes a file.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from surgeon.checkpoint.header import printable
from surgeon.deploy import per_layer
from surgeon.errors import EnvironmentFault, InputError, Where
from surgeon.measure.models import HEADROOM, dtype_of
from surgeon.output.places import enough_disk
from surgeon.prune import database
from surgeon.prune.decide import check_reachable
from surgeon.prune.levels import granularity
from surgeon.prune.request import SPARSE, Target
from surgeon.prune.session import Session
from surgeon.prune.uniform import check_alike
from surgeon.structure.biases import with_biases

PLANS = 32
"""Plans that a uniform search runs."""


def check(session: Session, targets: Iterable[Target]) -> None:
    """Refuse what would only be refused after calibration: model, text, layout, memory, targets, in this order.

    With a speedup the latency table is measured here, unless one is given or kept; a dry run leaves that out.

    Raises:
        UsageError, InputError, EnvironmentFault: see the modules.
    """
    check_model(session)
    for target in targets:
        check_reachable(session, target)


def check_model(session: Session) -> None:
    """Refuse a model, text or layout; no target is looked at and nothing measured."""
    request, config = session.request, session.source.checkpoint.config or {}
    structure, folder = session.structure, session.folder
    if config.get("auto_map") and request.method not in SPARSE:
        raise InputError("E326", f"{printable(str(folder))} asks for code of its own (auto_map), which is not run", where=Where(str(folder)),
                         help="if the library knows the family, remove auto_map from a copy of config.json")  # fmt: skip
    if request.method not in SPARSE and request.method != "depth":
        cut = frozenset(session.structures)
        if request.layout == "per-layer":
            per_layer.family_of(config)
        else:
            check_alike(structure, cut)
        width = next((part.width for part in structure.ffn if part is not None), 0)
        if "ffn" in cut and width:
            granularity(width, request.round_to)
        if request.method == "width" and request.solver == "flap":
            _check_bias(session)
    if request.target_speedup:
        _check_memory(session)
        _ = session.workload
    if request.latency_table:
        _ = session.table
    _ = session.texts


def _check_bias(session: Session) -> None:
    """Refuse FLAP where no class can hold the bias it leaves (E369)."""
    structure = session.structure
    names = [
        f"{part.output.module}.bias"
        for name, parts in (("heads", structure.attention), ("ffn", structure.ffn))
        if name in session.structures
        for part in parts
        if part is not None
    ]
    try:
        with_biases(session.source.checkpoint, structure, names)
    except InputError as error:
        raise InputError(
            "E369", f"flap makes good what it removes by a bias, which a {structure.model_type} model cannot have there",
            where=error.where, help="--criterion ziplm solves the remaining weights instead; it needs no bias",
        ) from error  # fmt: skip


def _check_memory(session: Session) -> None:
    """Refuse to time what cannot be in memory together with its source."""
    if not session.request.measure:
        return
    parameters = sum(info.elements for info in session.source.checkpoint.tensors.values())
    each = 4 if dtype_of(session.source.checkpoint.config or {}, session.conditions) == "float32" else 2
    fastest = max(session.request.target_speedup)
    needed = int(HEADROOM * each * parameters * (1 + 1 / fastest))
    budget = session.conditions.memory()
    if needed > budget:
        raise EnvironmentFault(
            "E517", f"timing the result against its source needs about {needed / 1e9:.1f} GB of memory, {budget / 1e9:.1f} GB are available",
            help="--dtype bfloat16 halves float32; --no-measure trusts the latency table; or a machine with more memory",
        )  # fmt: skip


def disk_bytes(session: Session, targets: int) -> dict[str, int]:
    """Return the bytes a run needs at most: results, candidates with their solved weights, statistics."""
    checkpoint, request = session.source.checkpoint, session.request
    stored = sum(info.nbytes for info in checkpoint.tensors.values())
    elements = sum(info.elements for info in checkpoint.tensors.values())
    if request.dtype:
        stored = elements * (4 if request.dtype == "float32" else 2)
    kept = 0
    if request.method in ("ziplm", "width"):
        kinds = [name for name in session.structures if name in ("heads", "ffn")]
        kept = database.disk_bytes(session.structure, request.solver, kinds)
    solved = 2 * elements if request.solver == "ziplm" and request.method == "ziplm" else 0
    work = kept + stored + targets * solved
    if request.distill:
        work += targets * stored + 2 * 4 * 3 * elements  # trained stages; two states of the optimizer
    if session.leaving is not None:  # neither a result nor a candidate
        return {"results": 0, "work": work - stored}
    return {"results": targets * stored, "work": work}


def check_disk(session: Session, destination: Path, targets: int) -> dict[str, int]:
    """Refuse to begin without the space for results and work, and return both.

    Raises:
        EnvironmentFault: E501.
    """
    return enough_disk(disk_bytes(session, targets), destination, session.work)


def outlook(session: Session, targets: tuple[Target, ...]) -> dict[str, Any]:
    """Return what a run would do: largest sizes of the results, passes, about how many seconds."""
    request = session.request
    elements = sum(info.elements for info in session.source.checkpoint.tensors.values())
    tokens = {name: session.texts.record[name]["tokens"] for name in ("statistics", "search", "held_out")}
    runs = 3 * tokens["held_out"] * len(targets)
    if request.method in ("ziplm", "width"):
        runs += tokens["statistics"]
        if request.method == "ziplm" or not request.sparsity:
            runs += PLANS * tokens["search"] * len(targets)
            if "layers" in session.structures:
                runs += _ranking_runs(session) * tokens["search"]
        runs += 2 * tokens["statistics"] * len(targets) if request.sequential else 0
    elif request.method == "depth" and request.solver == "nmse":
        runs += _ranking_runs(session) * tokens["search"]
    elif request.method in SPARSE:
        runs += 2 * tokens["statistics"]
    flops = 2.0 * elements * runs + _solving_flops(session)
    if request.distill or request.method == "lapp":
        flops += (
            8.0
            * elements
            * request.distill_steps
            * request.distill_batch
            * request.distill_length
            * len(targets)
        )
    seconds = flops / _speed()
    if request.target_speedup and not session.knows_table:
        seconds += 60
    if request.target_speedup and request.measure:
        seconds += 60 * len(targets)
    return {"tokens": tokens, "seconds": round(seconds)}


def _ranking_runs(session: Session) -> float:
    """Return how many whole passes ranking layers takes."""
    layers = session.structure.layers
    drops = layers // 2
    return sum((layers - k) * (layers - k + 1) / 2 for k in range(drops)) / layers


def _solving_flops(session: Session) -> float:
    """Return the work of removing units one after the other, cubic in the inputs of an output matrix."""
    if session.request.solver != "ziplm" or session.request.method == "depth":
        return 0.0
    shapes = [session.structure.shape(layer) for layer in range(session.structure.layers)]
    return sum(4.0 * ((shape.heads * shape.head_dim) ** 3 + shape.ffn**3) for shape in shapes)


def _speed() -> float:
    """Return about how many operations a second this machine does, from one matrix product."""
    import torch

    a = torch.ones(768, 768)
    torch.mm(a, a)
    best = math.inf
    for _ in range(3):
        began = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - began)
    return 2 * 768**3 / max(best, 1e-6) / 2  # layers run at about half of it
