"""Knowledge distillation of a model into one that was cut from it.

Loss of the gradual setting of ZipLM (Kurtic et al., arXiv 2302.04089, section 4): a task loss, the divergence
of the logits and the distance of hidden states block by block. The distance is SquareHead's, which is free
of scale (arXiv 2310.06927). A student whose matrices are smaller needs no masks; one that is sparse keeps
its zeros, or becomes sparser while it learns (see `gradual`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgeon.calibrate.answers import TokenSample
from surgeon.checkpoint.checkpoint import open_path
from surgeon.errors import InputError
from surgeon.train.batches import Order, batch_of, set_aside
from surgeon.train.distance import Correspondence, Distance, check_fit
from surgeon.train.gradual import Masks
from surgeon.train.identity import of_model, of_samples
from surgeon.train.loop import Loop
from surgeon.train.options import Options
from surgeon.train.running import TORCH_PRECISIONS, Runner, check_samples, device_of
from surgeon.train.saved_state import SavedState
from surgeon.train.trained_folder import TrainedFolder, refuse_existing

__all__ = ["Correspondence", "Options", "distill"]


def distill(
    student: Path,
    teacher: Path,
    samples: Sequence[TokenSample],
    options: Options,
    work: Path,
    output: Path,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
    stop: threading.Event | None = None,
    *,
    held_out: Sequence[TokenSample] | None = None,
    correspondence: Correspondence | None = None,
) -> dict[str, Any]:
    """Train a pruned model towards the one it was cut from, and write it to a new folder.

    Args:
        student: model folder to start from, stock or with per-layer shapes.
        teacher: the dense original, in every step of a gradual setting.
        samples: token ids and where the answer starts.
        work: states are kept here; the same call goes on from them and ends with the same bits (on a CPU).
        output: a folder that does not exist yet; gets weights, index and config.json under the student's
            names and in its types. Tokenizer and other companions are the caller's.
        device: "cpu", "cuda", "cuda:N" or "auto".
        progress: called with (steps done, steps).
        stop: ends the run with `Interrupted`; it can be continued.
        held_out: samples to measure on instead of a share of ``samples``.
        correspondence: needed when the student lacks layers or channels of the residual stream.

    Returns:
        Plain data: options, samples, losses on held-out samples "before" and "after" (the model as
        written), the history of training losses, halvings of the rate, the step it was resumed from.

    Raises:
        UsageError: E290 an option; E291 the correspondence; E293 a loss that an encoder does not have.
        InputError: E410 student and teacher do not fit; E411 the loss stays not finite; E385, E387 samples.
        OutputConflict: E601 the output exists. Interrupted: E130.
    """
    refuse_existing(Path(output))
    where = device_of(device)
    ours = Runner(Path(student), where, torch.float32, options.precision)
    theirs = Runner(Path(teacher), where, TORCH_PRECISIONS[options.precision], options.precision)
    theirs.model.requires_grad_(False)
    correspondence = check_fit(ours, theirs, options, correspondence)
    check_samples([*samples, *(held_out or ())], ours)
    train, measured = _split(samples, held_out, options)
    checkpoint = open_path(Path(student))
    folder = TrainedFolder(ours.model, checkpoint)
    distance = Distance(ours, theirs, options, correspondence)
    saved = SavedState(
        work,
        {
            "kind": "distill",
            "student": of_model(Path(student)),
            "teacher": of_model(Path(teacher)),
            "samples": of_samples(train),
            "held_out": of_samples(measured),
            "options": asdict(options),
            "correspondence": asdict(correspondence),
            "device": where.type,
        },
    )
    task = Distillation(distance, train, measured, options)
    loop = Loop(task, options.pace(), saved, seed=options.seed)
    ran = loop.run(progress, stop)
    folder.round()
    after = distance.measure(measured, options.batch)
    folder.write(output)
    saved.clear()
    record: dict[str, Any] = {
        "options": asdict(options),
        "samples": len(train),
        "samples_held_out": len(measured),
        "tokens": sum(len(sample.ids) for sample in train),
        "layers": list(correspondence.layers),
        "before": task.before,
        "after": after,
        "history": list(ran.history),
        "halvings": ran.halvings,
        "resumed": ran.resumed,
    }
    if task.masks is not None:
        record["zeros"] = task.masks.share()
    return record


class Distillation:
    """The task of the loop: the student's parameters."""

    def __init__(
        self,
        distance: Distance,
        samples: Sequence[TokenSample],
        held_out: Sequence[TokenSample],
        options: Options,
    ) -> None:
        self.distance, self.samples, self.options = distance, samples, options
        self.model: Any = distance.student.model
        self.model.requires_grad_(True).train()
        self.order = Order(len(samples), options.batch, options.accumulation, options.seed)
        self.masks: Masks | None = None
        if options.sparsity is not None or options.keep_zeros:
            self.masks = Masks(distance.student.layers, options.sparsity, options.steps)
        self._held_out = held_out
        self._before: dict[str, float] | None = None

    @property
    def before(self) -> dict[str, float]:
        """Losses on held-out samples before the first step."""
        if self._before is None:
            self._before = self.distance.measure(self._held_out, self.options.batch)
        return self._before

    def groups(self) -> list[dict[str, Any]]:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        decays = {"params": [p for p in parameters if p.ndim > 1], "weight_decay": self.options.weight_decay}
        others = {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}
        return [{**group, "lr": self.options.rate} for group in (decays, others) if group["params"]]

    def loss(self, step: int, part: int) -> tuple[Tensor, Mapping[str, float]]:
        options = self.options
        rows = self.order.rows(step, part)
        batch = batch_of([self.samples[row] for row in rows], self.distance.student.device)
        tokens, predicted = self._counts(step)
        weights = {"task": options.task, "logit": options.logit, "token": options.token}
        total = torch.zeros((), device=self.distance.student.device)
        figures: dict[str, float] = {}
        for name, term in self.distance.terms(batch).items():
            summed = self.distance.student.causal and name != "token"
            share = term / predicted if summed else term * (int(batch.valid.sum()) / tokens)
            total = total + weights[name] * share
            figures[name] = share.item()
        return total, figures

    def _counts(self, step: int) -> tuple[int, int]:
        """Return the tokens and the predicted tokens of all parts of a step."""
        rows = [row for part in range(self.options.accumulation) for row in self.order.rows(step, part)]
        chosen = [self.samples[row] for row in rows]
        predicted = sum(len(s.ids) - max(s.answer_start, 1) for s in chosen)
        return sum(len(s.ids) for s in chosen), predicted

    def before_update(self, step: int) -> None:
        if self.masks is not None:
            self.masks.before_update()

    def after_update(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        if self.masks is not None:
            self.masks.after_update(step + 1, optimizer)

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "masks": None if self.masks is None else self.masks.state(),
            "before": self.before,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        if self.masks is not None:
            self.masks.restore(state["masks"])
        self._before = dict(state["before"])


def _split(
    samples: Sequence[TokenSample], held_out: Sequence[TokenSample] | None, options: Options
) -> tuple[list[TokenSample], list[TokenSample]]:
    if not samples:
        raise InputError("E385", "there are no samples to train on", help="give calibration text")
    if held_out is not None:
        return list(samples), list(held_out)
    train, measured = set_aside(len(samples), options.held_out, options.seed)
    return [samples[n] for n in train], [samples[n] for n in measured]
