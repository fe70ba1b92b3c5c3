"""What the loop learns when it learns thresholds: masks, a budget that tightens, and what they do to the loss."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.errors import UsageError
from surgeon.train.cost import Cost, Key
from surgeon.train.gates import Gates, saturated
from surgeon.train.loop import number, whole

_LOG = logging.getLogger(__name__)

CONTROLS = ("penalty", "dual")

DataLoss = Callable[[int, int], tuple[Tensor, Mapping[str, float]]]
"""(step, part) -> the part's share of the loss on data, and its terms."""


@dataclass(frozen=True)
class Budget:
    """How the cost is brought down while thresholds are learned.

    Attributes:
        remaining: what the model may cost in the end, as a share of the whole model's.
        warm_up: share of the steps that only measure scores.
        ramp: share of the steps after that in which the target falls, as 1 - (1 - u)^3; then it stays.
        control: "penalty": lambda relu(C/C* - 1)^2 + lambda_lin relu(C/C* - 1); "dual": the latter alone,
            with a factor that rises by ``dual_step`` times the excess at every step and falls with it,
            within [0, 100].
        penalty, penalty_linear: lambda and lambda_lin.
        dual_step: of the dual ascent.
        hot, cold: temperature at the start and the end, falling geometrically.
    """

    remaining: float = 0.5
    warm_up: float = 0.05
    ramp: float = 0.8
    control: str = "penalty"
    penalty: float = 10.0
    penalty_linear: float = 1.0
    dual_step: float = 1.0
    hot: float = 0.3
    cold: float = 0.03

    def __post_init__(self) -> None:
        if not isinstance(self.remaining, (int, float)) or not 0 < self.remaining < 1:
            raise UsageError(
                "E292",
                f"{self.remaining!r} is not a share of the cost that may remain",
                help="a number between 0 and 1",
            )
        number("warm_up", self.warm_up, 0.0, 0.9)
        number("ramp", self.ramp, 0.0, 1.0, open_below=True)
        number("hot", self.hot, 0.0, open_below=True)
        number("cold", self.cold, 0.0, self.hot, open_below=True)
        for name in ("penalty", "penalty_linear", "dual_step"):
            number(name, getattr(self, name), 0.0)
        if self.control not in CONTROLS:
            raise UsageError(
                "E290", f"{self.control!r} is not a way to hold a budget", help="use " + ", ".join(CONTROLS)
            )

    def warm_steps(self, steps: int) -> int:
        """Return the steps that only measure; at least one, for there are no thresholds without scores."""
        return max(1, round(steps * self.warm_up))

    def gone(self, step: int, steps: int) -> float:
        """Return u, the share of the ramp that lies behind, 0 before it."""
        warm = self.warm_steps(steps)
        length = max(1.0, (steps - warm) * self.ramp)
        return min(1.0, max(0.0, (step - warm) / length))

    def target(self, step: int, steps: int) -> float:
        """Return C*(u) as a share of the whole cost."""
        return 1.0 - (1.0 - self.remaining) * (1.0 - (1.0 - self.gone(step, steps)) ** 3)

    def temperature(self, step: int, steps: int) -> float:
        """Return T."""
        return self.hot * (self.cold / self.hot) ** self.gone(step, steps)


class ThresholdTask:
    """The task of the loop.

    Args:
        gates: of the model.
        cost: its structures are those of the gates, and others that stay whole.
        budget: how the cost falls.
        steps: of the run.
        data_loss: what the model says about a part of a step, under the gates' present mode.
        rate: of the thresholds.
        parts: of a step.
        others: groups of further parameters with their rates (bypass, weights).
        modules: whose state belongs to the run, by name.
    """

    def __init__(
        self,
        gates: Gates,
        cost: Cost,
        budget: Budget,
        steps: int,
        data_loss: DataLoss,
        *,
        rate: float = 0.02,
        parts: int = 1,
        others: list[dict[str, Any]] | None = None,
        modules: Mapping[str, nn.Module] | None = None,
    ) -> None:
        whole("steps", steps, 2)
        number("rate of the thresholds", rate, 0.0, open_below=True)
        self.gates, self.cost, self.budget, self.steps = gates, cost, budget, steps
        self.data_loss, self.rate, self.parts = data_loss, rate, parts
        self.others, self.modules = others or [], dict(modules or {})
        self.heat = 1.0
        self.factor = 0.0
        self.warnings: list[str] = []
        self._excess = 0.0

    def groups(self) -> list[dict[str, Any]]:
        taus = [gate.tau for _, _, gate in self.gates.all()]
        mine = {"params": taus, "lr": self.rate, "constant": True, "weight_decay": 0.0, "betas": (0.9, 0.99)}
        return [mine, *self.others]

    def loss(self, step: int, part: int) -> tuple[Tensor, Mapping[str, float]]:
        control, warm = self.gates.control, self.budget.warm_steps(self.steps)
        if step < warm:
            control.mode = "observe"
            return self.data_loss(step, part)
        control.temperature = self.heat * self.budget.temperature(step, self.steps)
        if step == warm and part == 0:
            for _, _, gate in self.gates.all():
                gate.start()
        control.mode = "learn"
        found, terms = self.data_loss(step, part)
        cost = self.cost.expected(self.counts())
        target = self.budget.target(step, self.steps) * self.cost.dense
        excess = cost / target - 1
        self._excess = float(excess.detach())
        over = torch.relu(excess)
        if self.budget.control == "dual":
            price = self.factor * over
        else:
            price = self.budget.penalty * over.square() + self.budget.penalty_linear * over
        figures = {"cost": float(cost.detach()) / self.cost.dense, "target": target / self.cost.dense}
        figures = {name: value / self.parts for name, value in figures.items()}
        return found + (price / self.parts).to(found), {**terms, **figures}

    def counts(self) -> dict[Key, Tensor]:
        """Return how many units pass in the last forward, with their gradients."""
        found: dict[Key, Tensor] = {}
        for layer, kind, gate in self.gates.all():
            assert gate.mask is not None
            found[layer, kind] = gate.mask.sum()
        return found

    def before_update(self, step: int) -> None:
        pass

    def after_update(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        if step < self.budget.warm_steps(self.steps):
            return
        if self.budget.control == "dual":
            self.factor = min(100.0, max(0.0, self.factor + self.budget.dual_step * self._excess))
        if self._excess > 0 and saturated([gate for _, _, gate in self.gates.all()]):
            self.heat *= 2
            warning = f"step {step + 1}: no unit is near its threshold; the temperature is doubled"
            self.warnings.append(warning)
            _LOG.warning(warning)

    def state(self) -> dict[str, Any]:
        return {
            "gates": {f"{layer} {kind}": gate.state() for layer, kind, gate in self.gates.all()},
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "heat": self.heat,
            "factor": self.factor,
            "warnings": list(self.warnings),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        for layer, kind, gate in self.gates.all():
            gate.restore(state["gates"][f"{layer} {kind}"])
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
        self.heat, self.factor = state["heat"], state["factor"]
        self.warnings = list(state["warnings"])
