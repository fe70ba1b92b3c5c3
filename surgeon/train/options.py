"""How a student is trained."""

from __future__ import annotations

from dataclasses import dataclass

from surgeon.errors import UsageError
from surgeon.train.gradual import Schedule
from surgeon.train.loop import Pace, number, whole

PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Options:
    """How a student is trained; the defaults need no answers in the data, only text.

    Attributes:
        steps: updates.
        batch: samples computed at once.
        accumulation: batches of one update.
        rate: learning rate of AdamW.
        warm_up, decay, clip, checkpoint_every: see `surgeon.train.loop.Pace`.
        weight_decay: of AdamW, on matrices.
        task: weight of the cross-entropy of the answers (all text where there is no answer).
        logit: weight of T^2 KL(teacher / T || student / T) at the same places; of an encoder, of the
            distance of the last hidden states and of the pooled output.
        token: weight of the distance of hidden states, the mean over blocks.
        temperature: T.
        precision: "bfloat16" computes products in bfloat16; parameters and moments stay in float32.
        held_out: share of the samples that only measure; at least one sample unless it is 0. Not used
            when samples to measure on are given.
        sparsity: become sparser while learning.
        keep_zeros: weights of matrices in the blocks that are zero stay zero.
        seed: of the order of samples, the samples held out and dropout.
    """

    steps: int = 1000
    batch: int = 8
    accumulation: int = 1
    rate: float = 1e-4
    warm_up: float = 0.05
    decay: str = "linear"
    clip: float = 1.0
    weight_decay: float = 0.0
    task: float = 0.0
    logit: float = 1.0
    token: float = 1.0
    temperature: float = 1.0
    precision: str = "float32"
    held_out: float = 0.05
    sparsity: Schedule | None = None
    keep_zeros: bool = False
    checkpoint_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        self.pace()
        whole("batch", self.batch, 1)
        whole("seed", self.seed, 0)
        number("rate", self.rate, 0.0, open_below=True)
        number("temperature", self.temperature, 0.0, open_below=True)
        number("held_out", self.held_out, 0.0, 0.9)
        for name in ("weight_decay", "task", "logit", "token"):
            number(name, getattr(self, name), 0.0)
        if self.task == self.logit == self.token == 0:
            raise UsageError(
                "E293", "all weights of the loss are 0", help="give task, logit or token a weight"
            )
        if self.precision not in PRECISIONS:
            raise UsageError(
                "E290",
                f"{self.precision!r} is not a precision to train in",
                help="use " + ", ".join(PRECISIONS),
            )
        if self.sparsity is not None and self.keep_zeros:
            raise UsageError(
                "E290", "a schedule of sparsity moves the zeros that keep_zeros keeps", help="choose one"
            )

    def pace(self) -> Pace:
        """Return the part the loop needs."""
        return Pace(self.steps, self.accumulation, self.warm_up, self.decay, self.clip, self.checkpoint_every)
