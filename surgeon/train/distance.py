"""The losses of a student against its teacher, and which parts of the one answer to which of the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from surgeon.calibrate.answers import TokenSample
from surgeon.errors import InputError, UsageError
from surgeon.train import losses
from surgeon.train.batches import Batch, batch_of
from surgeon.train.options import Options
from surgeon.train.running import Outputs, Runner


@dataclass(frozen=True)
class Correspondence:
    """Which parts of the teacher those of the student answer to.

    Attributes:
        layers: for each of the student's blocks the teacher's block whose output it should have.
        channels: kept channels of the teacher's residual stream; None when the student has all.
    """

    layers: tuple[int, ...]
    channels: tuple[int, ...] | None = None


def check_fit(
    student: Runner, teacher: Runner, options: Options, given: Correspondence | None
) -> Correspondence:
    """Return which parts answer to which, or refuse a pair or a loss that does not fit.

    Raises:
        InputError: E410 different families or vocabularies. UsageError: E291, E293.
    """
    if student.family != teacher.family or student.causal != teacher.causal:
        raise InputError("E410", f"the student is a {student.family} model, the teacher a {teacher.family} model",
                         help="the teacher is the model that the student was cut from")  # fmt: skip
    sizes = [runner.model.config.vocab_size for runner in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise InputError("E410", f"the student has {sizes[0]:,} tokens, the teacher {sizes[1]:,}",
                         help="the teacher is the model that the student was cut from")  # fmt: skip
    if not student.causal and options.task:
        raise UsageError(
            "E293", "an encoder has no task loss of its own", help="set task to 0; logit and token lead it"
        )
    fit = given or Correspondence(tuple(range(len(student.layers))))
    depth, depth_teacher = len(student.layers), len(teacher.layers)
    if given is None and depth != depth_teacher:
        raise UsageError("E291", f"the student has {depth} layers, the teacher {depth_teacher}",
                         help="say which of the teacher's each of them answers to")  # fmt: skip
    ascending = all(a < b for a, b in zip(fit.layers, fit.layers[1:], strict=False))
    if len(fit.layers) != depth or not ascending or not all(0 <= n < depth_teacher for n in fit.layers):
        raise UsageError("E291", f"layers {list(fit.layers)} do not name one of {depth_teacher} layers for each of {depth}, in order",
                         help="one number for each of the student's layers, ascending")  # fmt: skip
    widths = [runner.model.config.hidden_size for runner in (student, teacher)]
    kept = widths[1] if fit.channels is None else len(fit.channels)
    compares = options.token or not student.causal
    if compares and (kept != widths[0] or not all(0 <= n < widths[1] for n in fit.channels or ())):
        raise UsageError("E291", f"the student's residual stream has {widths[0]} channels, {kept} of the teacher's are compared with it",
                         help="give the channels that were kept")  # fmt: skip
    return fit


class Distance:
    """The losses of a student against its teacher."""

    def __init__(self, student: Runner, teacher: Runner, options: Options, fit: Correspondence) -> None:
        self.student, self.teacher, self.options, self.fit = student, teacher, options, fit
        kept = fit.channels
        self._channels = None if kept is None else torch.tensor(kept, device=student.device)

    def terms(self, batch: Batch, *, all_terms: bool = False) -> dict[str, Tensor]:
        """Return the terms: "task" and "logit" as sums over predicted tokens, the others as means over tokens.

        Args:
            batch: padded samples.
            all_terms: also those of weight 0.
        """
        options = self.options
        blocks = bool(options.token) or all_terms
        if (
            self._channels is None
            and self.student.model.config.hidden_size != self.teacher.model.config.hidden_size
        ):
            blocks = False
        ours = self.student.run(batch, blocks=blocks)
        needed = blocks or options.logit or all_terms
        with torch.no_grad():
            theirs = self.teacher.run(batch, blocks=blocks) if needed else Outputs(())
        terms: dict[str, Tensor] = {}
        if ours.logits is not None:
            if options.task or all_terms:
                terms["task"] = losses.cross_entropy(ours.logits, batch.targets)
            if options.logit or all_terms:
                assert theirs.logits is not None
                terms["logit"] = losses.divergence(ours.logits, theirs.logits, options.temperature)
        elif options.logit or all_terms:
            terms["logit"] = self._outputs(ours, theirs, batch)
        if blocks:
            terms["token"] = losses.block_distance(
                ours.blocks, theirs.blocks, batch.valid, self.fit.layers, self._channels
            )
        return terms

    def _outputs(self, ours: Outputs, theirs: Outputs, batch: Batch) -> Tensor:
        """Return the distance of an encoder's last hidden states, and of its pooled output where both have one."""
        assert ours.last is not None and theirs.last is not None
        last = theirs.last if self._channels is None else theirs.last[..., self._channels]
        found = losses.square_head(ours.last, last, batch.valid)
        if ours.pooled is not None and theirs.pooled is not None:
            pooled = theirs.pooled if self._channels is None else theirs.pooled[..., self._channels]
            found = found + losses.square_head(ours.pooled, pooled, torch.ones_like(batch.valid[:, 0]))
        return found

    @torch.no_grad()
    def measure(self, samples: Sequence[TokenSample], batch: int) -> dict[str, float]:
        """Return the mean of every term over samples, in evaluation mode; {} without samples."""
        if not samples:
            return {}
        training = self.student.model.training
        self.student.model.eval()
        totals: dict[str, float] = {}
        tokens = predicted = 0
        for first in range(0, len(samples), batch):
            held = batch_of(samples[first : first + batch], self.student.device)
            here, predicts = int(held.valid.sum()), int(held.predicts.sum())
            tokens, predicted = tokens + here, predicted + predicts
            for name, term in self.terms(held, all_terms=True).items():
                summed = self.student.causal and name != "token"
                totals[name] = totals.get(name, 0.0) + term.item() * (1 if summed else here)
        self.student.model.train(training)
        per = {name: predicted if self.student.causal and name != "token" else tokens for name in totals}
        return {name: total / per[name] for name, total in totals.items()}
