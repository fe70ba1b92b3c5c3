"""Learn how much of every layer to keep: thresholds on the scores of KV groups and FFN channels, under a budget.

LAPP-style (see `gates` for what is taken from arXiv 2309.14157 and what is not). Learning needs gradients
through the whole model, so unlike the one-shot methods it holds the whole model in memory. It ends with the
freeze: what is kept becomes a `Cut`; slicing and training the small model further are `surgeon.structure.views`
and `surgeon.train.distill`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from surgeon.calibrate.answers import TokenSample
from surgeon.checkpoint.checkpoint import open_path
from surgeon.errors import UsageError
from surgeon.structure.cut import Cut, LayerCut
from surgeon.structure.find import structure_of
from surgeon.structure.parts import Structure
from surgeon.train.cost import Cost, Key
from surgeon.train.freeze import check_target, freeze, kept_units
from surgeon.train.gated_model import GatedModel
from surgeon.train.identity import of_model, of_samples
from surgeon.train.loop import Loop
from surgeon.train.running import Runner, check_samples, device_of
from surgeon.train.saved_state import SavedState
from surgeon.train.threshold_options import Options
from surgeon.train.threshold_task import Budget
from surgeon.train.trained_folder import TrainedFolder, refuse_existing

__all__ = ["Budget", "Cost", "Found", "Options", "thresholds"]

FEW_STEPS = 200
SOLVED = "solved.safetensors"
WEIGHTS = "weights"


@dataclass(frozen=True)
class Found:
    """What was learned.

    Attributes:
        cut: what is kept.
        record: plain data: options, cost, kept numbers, thresholds, losses on held-out samples "before"
            (the source) and "after" (the cut), history, warnings, what became of a bypass.
        weights: folder of the trained model in the source's shapes, to which the cut applies; None when
            only thresholds were trained and the source is still it.
        solved: file with output matrices at kept width under the source's names (``solved`` of
            `surgeon.structure.views.PrunedView`); None where nothing was absorbed.
    """

    cut: Cut
    record: dict[str, Any]
    weights: Path | None = None
    solved: Path | None = None


def thresholds(
    folder: Path,
    samples: Sequence[TokenSample],
    options: Options,
    cost: Cost,
    work: Path,
    output: Path,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
    stop: threading.Event | None = None,
) -> Found:
    """Learn thresholds on a model, and freeze them.

    Args:
        folder: a stock model folder, not quantized.
        samples: token ids and where the answer starts.
        cost: of the same model, see `surgeon.train.cost.Cost`.
        work: states are kept here; the same call goes on from them and ends with the same bits (on a CPU).
        output: a folder that does not exist yet; made only when there are weights to keep.
        device, progress, stop: as in `surgeon.train.distill.distill`.

    Raises:
        UsageError: E290 an option, E292 a budget out of reach, E293 an encoder with a task loss, E294 a
            bypass where no FFN has thresholds.
        InputError: E365 structures that are not known, E411 the loss stays not finite, E413 a bypass that
            cannot be dropped, E414 nothing to learn thresholds for, E385, E387 samples.
        OutputConflict: E601 the output exists. Interrupted: E130.
    """
    output = Path(output)
    refuse_existing(output)
    checkpoint = open_path(Path(folder))
    structure = structure_of(checkpoint)
    runner = Runner(Path(folder), device_of(device), torch.float32, options.precision)
    if not runner.causal and options.task:
        raise UsageError(
            "E293", "an encoder has no task loss of its own", help="set task to 0; the divergence leads it"
        )
    check_samples(samples, runner)
    trained = TrainedFolder(runner.model, checkpoint)
    learning = GatedModel(runner, structure, trained, samples, options)
    target = options.budget.remaining * cost.dense
    check_target(learning.learned(np.ones), cost, target)
    saved = SavedState(
        work,
        {
            "kind": "thresholds",
            "model": of_model(Path(folder)),
            "samples": of_samples(samples),
            "options": asdict(options),
            "cost": [
                cost.unit,
                cost.rest,
                [[*key, *map(float, curve)] for key, curve in sorted(cost.curves.items())],
            ],
            "device": runner.device.type,
        },
    )
    before = learning.measure("off")
    task = learning.task(cost)
    ran = Loop(task, options.pace(), saved, seed=options.seed).run(progress, stop)
    if options.train == "full":
        trained.round()
    counts = freeze(learning.learned(), cost, target)
    kept = kept_units(learning.learned(), counts)
    solved, bypass = learning.fix(kept)
    record = {
        "options": asdict(options),
        "cost": {"unit": cost.unit, "dense": cost.dense, "target": target, "kept": cost.of(counts)},
        "kept": [{"layer": layer, "structure": kind, "units": counts[layer, kind],
                  "of": gate.units, "threshold": float(gate.tau.detach())} for layer, kind, gate in learning.gates.all()],
        "before": before, "after": learning.measure("fixed"),
        "history": list(ran.history), "halvings": ran.halvings, "resumed": ran.resumed,
        "warnings": _warnings(options) + task.warnings + learning.left_out, "bypass": bypass,
    }  # fmt: skip
    found = _written(learning, trained, _cut(structure, kept), record, solved, output)
    saved.clear()
    learning.remove()
    return found


def _warnings(options: Options) -> list[str]:
    few = options.steps < FEW_STEPS
    return [f"{options.steps} steps are few: thresholds settle in {FEW_STEPS} or more"] if few else []


def _written(
    learning: GatedModel,
    trained: TrainedFolder,
    cut: Cut,
    record: dict[str, Any],
    solved: Mapping[str, Tensor],
    output: Path,
) -> Found:
    """Write trained weights and solved matrices, if there are any."""
    weights = output / WEIGHTS if learning.options.train == "full" else None
    file = output / SOLVED if solved else None
    if weights is not None:
        output.mkdir(parents=True, exist_ok=True)
        trained.write(weights)
    if file is not None:
        output.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".new")
        save_file(dict(solved), temporary, metadata={"format": "pt"})
        os.replace(temporary, file)
    return Found(cut, record, weights, file)


def _cut(structure: Structure, kept: Mapping[Key, tuple[int, ...]]) -> Cut:
    """Return kept groups and channels as a cut; what is whole is not named."""
    layers = []
    for layer in range(structure.layers):
        attention, ffn = structure.attention[layer], structure.ffn[layer]
        groups, channels = kept.get((layer, "attention")), kept.get((layer, "ffn"))
        heads = None
        if attention is not None and groups is not None and len(groups) < attention.groups:
            each = attention.per_group
            heads = tuple(head for group in groups for head in range(group * each, (group + 1) * each))
        if ffn is None or (channels is not None and len(channels) == ffn.width):
            channels = None
        layers.append(LayerCut(heads, channels))
    return Cut(tuple(layers))
