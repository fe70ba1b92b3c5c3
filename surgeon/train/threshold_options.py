"""How thresholds are learned."""

from __future__ import annotations

from dataclasses import dataclass, field

from surgeon.errors import UsageError
from surgeon.train.bypass import EXPORTS
from surgeon.train.loop import Pace, number, whole
from surgeon.train.options import PRECISIONS
from surgeon.train.threshold_task import Budget

TRAINS = ("thresholds", "full")
STRUCTURES = ("attention", "ffn")


@dataclass(frozen=True)
class Options:
    """How thresholds are learned.

    Attributes:
        budget: how far and how the cost is brought down.
        steps: updates, the measuring ones at the start included.
        train: "thresholds" leaves the weights alone; "full" trains them too, masks on.
        structures: "attention" (KV groups), "ffn" (channels).
        batch, accumulation, clip, checkpoint_every, precision, held_out, seed: as in distillation.
        rate: of weights and bypass.
        threshold_rate: of thresholds, on the scale of the mean score.
        task: weight of the cross-entropy of the answers; an encoder has none and takes 0.
        divergence: weight of KL(all units || those that pass) of the logits; of an encoder, of the distance
            of the last hidden states. One more forward without masks, no second copy of the weights.
        temperature: of that divergence.
        ffn_grid, group_grid: kept numbers are multiples of these, or all.
        min_channels, min_groups: units of a layer that stay in any case.
        bypass_rank: r of a low-rank path beside every FFN; 0 has none.
        bypass_export: "drop" or "absorb" (see `surgeon.train.bypass`). Either way nothing is left of the path in the
            result, so it is not part of the cost.
    """

    budget: Budget = field(default_factory=Budget)
    steps: int = 400
    train: str = "thresholds"
    structures: tuple[str, ...] = STRUCTURES
    batch: int = 8
    accumulation: int = 1
    rate: float = 1e-4
    threshold_rate: float = 0.02
    task: float = 1.0
    divergence: float = 1.0
    temperature: float = 1.0
    clip: float = 1.0
    precision: str = "float32"
    held_out: float = 0.05
    ffn_grid: int = 1
    group_grid: int = 1
    min_channels: int = 1
    min_groups: int = 1
    bypass_rank: int = 0
    bypass_export: str = "absorb"
    checkpoint_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        self.pace()
        for name in ("batch", "ffn_grid", "group_grid", "min_channels", "min_groups"):
            whole(name, getattr(self, name), 1)
        whole("steps", self.steps, 2)
        whole("bypass_rank", self.bypass_rank, 0)
        whole("seed", self.seed, 0)
        for name in ("rate", "threshold_rate", "temperature"):
            number(name, getattr(self, name), 0.0, open_below=True)
        for name in ("task", "divergence"):
            number(name, getattr(self, name), 0.0)
        number("held_out", self.held_out, 0.0, 0.9)
        for name, given, known in (
            ("train", self.train, TRAINS), ("precision", self.precision, PRECISIONS),
            ("bypass_export", self.bypass_export, EXPORTS),
        ):  # fmt: skip
            if given not in known:
                raise UsageError("E290", f"{name} is {given!r}", help="use " + ", ".join(known))
        if not self.structures or not set(self.structures) <= set(STRUCTURES):
            raise UsageError(
                "E290",
                f"structures are {', '.join(self.structures) or 'empty'}",
                help="use " + ", ".join(STRUCTURES),
            )
        if self.task == self.divergence == 0:
            raise UsageError(
                "E293", "both weights of the loss are 0", help="give task or divergence a weight"
            )

    def pace(self) -> Pace:
        """Return the part the loop needs."""
        return Pace(self.steps, self.accumulation, 0.05, "constant", self.clip, self.checkpoint_every)
