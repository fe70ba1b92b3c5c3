"""Learned thresholds: one scalar for the attention and one for the FFN of a layer decides which units pass.

Layer-adaptive progressive pruning (Zhai et al., arXiv 2309.14157) learns one threshold a layer on importance
scores that change while it trains. Its equations are not published; those here are this project's own, so
the method is called LAPP-style. A gate sits on the input of the matrix through which a structure writes to
the residual stream:

    s_j    = || W[:, j] diag(rms(x_j)) ||_F      columns and inputs of unit j; the mean squares are an EMA
    s^_j   = s_j / mean(s)                       so thresholds of all layers live on one scale
    hard_j = 1[s^_j >= tau]                      what passes
    soft_j = sigmoid((s^_j - tau) / T)           what the gradient is taken of (straight-through)

Scores carry no gradient. The best ``min_keep`` units always pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

EMA = 0.99
CLAMP = 30.0
"""Largest |s^ - tau| / T; beyond it the sigmoid is 0 or 1 in every precision used here."""


@dataclass
class Control:
    """What all gates of a model do at the moment.

    Attributes:
        mode: "off" lets everything pass; "observe" too, and updates scores; "learn" updates scores and
            masks; "fixed" applies the masks of the freeze.
        temperature: T, relative to the mean score of a layer.
        hard: pass hard masks with the gradient of the soft ones; False passes soft masks.
        valid: bool [samples, tokens], the tokens that count for scores; None counts all.
    """

    mode: str = "off"
    temperature: float = 0.3
    hard: bool = True
    valid: Tensor | None = None


class Gate(nn.Module):
    """A threshold on the inputs of one matrix.

    Args:
        module: the linear (or Conv1D) behind the structure.
        units: equal pieces of its inputs that pass or do not.
        control: shared by the gates of a model.
        input_axis: of the module's weight.
        min_keep: units that always pass.
        name: for messages and records.

    Attributes:
        tau: the threshold, a scalar.
        mask: [units], of the last forward, with its gradient.
    """

    tau: nn.Parameter
    mean_square: Tensor

    def __init__(
        self,
        module: nn.Module,
        units: int,
        control: Control,
        *,
        input_axis: int = 1,
        min_keep: int = 1,
        name: str = "",
    ) -> None:
        super().__init__()
        self.behind = (module,)  # in a tuple, so that the module's parameters are not the gate's
        self.units, self.control, self.input_axis, self.name = units, control, input_axis, name
        self.min_keep = max(1, min(min_keep, units))
        weight: Any = module.weight
        self.width = weight.shape[input_axis] // units
        kind = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.tau = nn.Parameter(torch.zeros((), dtype=kind, device=weight.device))
        self.register_buffer(
            "mean_square", torch.zeros(weight.shape[input_axis], dtype=kind, device=weight.device)
        )
        self.seen = 0
        self.mask: Tensor | None = None
        self.fixed: Tensor | None = None
        self._handle = module.register_forward_pre_hook(self._before)

    def remove(self) -> None:
        """Take the gate off its module."""
        self._handle.remove()

    # ---- scores --------------------------------------------------------------------------------

    def rows(self, inputs: Tensor) -> Tensor:
        """Return inputs as [places, columns of the weight]."""
        return inputs.reshape(-1, inputs.shape[-1])

    def squared_norms(self) -> Tensor:
        """Return the squared norm of the weight's column for every input."""
        weight: Any = self.behind[0].weight
        return weight.detach().to(self.tau.dtype).square().sum(1 - self.input_axis)

    @torch.no_grad()
    def observe(self, inputs: Tensor) -> None:
        """Let the scores follow one batch."""
        rows = self.rows(inputs.detach())
        if self.control.valid is not None:
            rows = rows[self.control.valid.reshape(-1)]
        fresh = rows.to(self.tau.dtype).square().mean(0)
        self.mean_square.mul_(EMA).add_(fresh, alpha=1 - EMA)
        self.seen += 1

    @torch.no_grad()
    def scores(self) -> Tensor:
        """Return s^ [units]: scores divided by their mean."""
        assert self.seen, "scores are asked for before any batch was seen"
        mean_square = self.mean_square / (1 - EMA**self.seen)  # the average starts at zero
        raw = (self.squared_norms() * mean_square).reshape(self.units, self.width).sum(1).sqrt()
        return raw / (raw.mean() + 1e-8)

    @torch.no_grad()
    def start(self) -> None:
        """Set the threshold so far below the lowest score that nothing is masked."""
        self.tau.fill_(float(self.scores().min()) - self.control.temperature)

    # ---- masks ---------------------------------------------------------------------------------

    def soft(self) -> Tensor:
        """Return the soft mask [units]; units that always pass are 1, without a gradient."""
        scores = self.scores()
        distance = ((scores - self.tau) / self.control.temperature).clamp(-CLAMP, CLAMP)
        soft = torch.sigmoid(distance)
        best = torch.argsort(scores, descending=True, stable=True)[: self.min_keep]
        always = torch.zeros_like(scores, dtype=torch.bool)
        always[best] = True
        return torch.where(always, torch.ones_like(soft), soft)

    def current(self) -> Tensor:
        """Return the mask of the present mode [units]."""
        if self.control.mode == "fixed":
            assert self.fixed is not None
            return self.fixed
        soft = self.soft()
        if not self.control.hard:
            return soft
        hard = (self.scores() >= self.tau.detach()) | (soft.detach() == 1)
        return straight_through(hard, soft)

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        mode = self.control.mode
        if mode == "off":
            return None
        inputs = args[0]
        if mode in ("observe", "learn"):
            self.observe(inputs)
        if mode == "observe":
            return None
        self.mask = self.current()
        return (self.apply_mask(inputs, self.mask), *args[1:])

    def apply_mask(self, inputs: Tensor, mask: Tensor) -> Tensor:
        """Multiply inputs [..., columns] with the mask of their units."""
        return inputs * mask.repeat_interleave(self.width).to(inputs.dtype)

    # ---- state ---------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        return {"tau": self.tau.detach(), "mean_square": self.mean_square, "seen": self.seen}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Any]) -> None:
        self.tau.copy_(state["tau"])
        self.mean_square.copy_(state["mean_square"])
        self.seen = int(state["seen"])


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """Return the values of ``hard`` with the gradient of ``soft`` (Bengio et al., arXiv 1308.3432)."""
    return hard.to(soft.dtype) + (soft - soft.detach())


def saturated(gates: Sequence[Gate]) -> bool:
    """Say whether no unit of any gate is near its threshold, so that thresholds get no gradient."""
    with torch.no_grad():
        for gate in gates:
            soft = gate.soft()
            if float((soft * (1 - soft)).max()) >= 1e-6:
                return False
    return True


@dataclass
class Gates:
    """The gates of a model.

    Attributes:
        attention, ffn: by layer; absent where nothing is learned.
        control: what they do.
    """

    control: Control
    attention: dict[int, Gate] = field(default_factory=dict)
    ffn: dict[int, Gate] = field(default_factory=dict)

    def all(self) -> list[tuple[int, str, Gate]]:
        """Return (layer, "attention" or "ffn", gate), by layer."""
        found = [(layer, "attention", gate) for layer, gate in self.attention.items()]
        found += [(layer, "ffn", gate) for layer, gate in self.ffn.items()]
        return sorted(found, key=lambda entry: entry[:2])

    def remove(self) -> None:
        for _, _, gate in self.all():
            gate.remove()
