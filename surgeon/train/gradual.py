"""Gradual sparsity while a model trains: masks by magnitude, recomputed on a cubic schedule.

Zhu & Gupta, "To prune, or not to prune", arXiv 1710.01878, section 3: at update t
s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n dt))^3, masks recomputed every dt updates. A masked weight keeps
its value until the schedule ends and comes back when it is again among the largest; afterwards the mask
stays. While it is masked it takes no gradient and has no moments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from surgeon.errors import UsageError
from surgeon.train.loop import number, whole


@dataclass(frozen=True)
class Schedule:
    """How sparse the matrices are at a step.

    Attributes:
        final: share of zeros at the end; with ``pattern`` it follows from that.
        initial: share of zeros at the start.
        begin, end: shares of all steps between which it rises.
        every: steps between two computations of the masks.
        pattern: (n, m): of every m consecutive inputs at most n are kept in the end; while the share
            rises, m - floor(s_t m) of them.
    """

    final: float = 0.5
    initial: float = 0.0
    begin: float = 0.05
    end: float = 0.6
    every: int = 100
    pattern: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        number("initial sparsity", self.initial, 0.0, 1.0)
        number("final sparsity", self.final, self.initial, 1.0)
        number("begin", self.begin, 0.0, 1.0)
        number("end", self.end, self.begin, 1.0)
        whole("every", self.every, 1)
        if self.pattern is not None:
            kept, of = self.pattern
            if not 0 < kept < of:
                raise UsageError(
                    "E290", f"{kept}:{of} is not a pattern", help="n of m with 0 < n < m, such as 2:4"
                )

    @property
    def target(self) -> float:
        """The share of zeros at the end."""
        return self.final if self.pattern is None else 1.0 - self.pattern[0] / self.pattern[1]

    def limits(self, steps: int) -> tuple[int, int]:
        """Return (t_0, t_0 + n dt): the first update of the masks and the last, the latter on the grid of ``every``."""
        first = round(steps * self.begin)
        count = max(0, (round(steps * self.end) - first) // self.every)
        return first, first + count * self.every

    def updates(self, step: int, steps: int) -> bool:
        """Say whether masks are computed after ``step`` updates."""
        first, last = self.limits(steps)
        return first <= step <= last and (step - first) % self.every == 0

    def sparsity(self, step: int, steps: int) -> float:
        """Return s_t after ``step`` updates of ``steps``."""
        first, last = self.limits(steps)
        if step < first:
            return self.initial
        gone = 1.0 if step >= last else (step - first) / (last - first)
        return self.target + (self.initial - self.target) * (1.0 - gone) ** 3


def magnitude_mask(
    weight: Tensor, sparsity: float, pattern: tuple[int, int] | None, input_axis: int
) -> Tensor:
    """Return which weights of a matrix stay, bool; of equal magnitudes the earlier stay.

    Args:
        weight: [out, in], or [in, out] with ``input_axis`` 0.
        sparsity: share that goes, of the matrix; with ``pattern`` of every m inputs, rounded down.
        pattern: (n, m), or None for no structure.
        input_axis: the axis that the groups of m lie along.
    """
    if pattern is None:
        order = torch.argsort(weight.abs().flatten(), descending=True, stable=True)
        mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
        mask[order[: weight.numel() - int(sparsity * weight.numel() + 1e-9)]] = True
        return mask.view_as(weight)
    of = pattern[1]
    keep = of - int(sparsity * of + 1e-9)
    rows = (weight.T if input_axis == 0 else weight).abs()
    order = torch.argsort(rows.reshape(rows.shape[0], -1, of), dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order[..., :keep], True).view_as(rows)
    return mask.T.contiguous() if input_axis == 0 else mask


class Masks:
    """Masks of the matrices in a model's blocks, and what lies under them.

    Args:
        layers: the model's blocks; every linear matrix in them is masked.
        schedule: how sparse; None keeps the zeros that the model has and makes no others.
        steps: updates of the whole run.

    Raises:
        UsageError: E290 a matrix whose inputs are not a multiple of the pattern's m.
    """

    def __init__(self, layers: Sequence[nn.Module], schedule: Schedule | None, steps: int) -> None:
        self.schedule, self.steps = schedule, steps
        self._weights: dict[str, tuple[nn.Parameter, int]] = {}
        for number_, layer in enumerate(layers):
            for path, module in layer.named_modules():
                if isinstance(module, (nn.Linear, Conv1D)):
                    axis = 1 if isinstance(module, nn.Linear) else 0
                    weight: Any = module.weight
                    self._weights[f"{number_}.{path}"] = (weight, axis)
        if schedule is not None and schedule.pattern is not None:
            self._check(schedule.pattern)
        self.masks = {name: weight != 0 for name, (weight, _) in self._weights.items()}
        if schedule is not None:
            self.masks = {name: torch.ones_like(mask) for name, mask in self.masks.items()}
        self._under: dict[str, Tensor] = {}

    def _check(self, pattern: tuple[int, int]) -> None:
        for name, (weight, axis) in self._weights.items():
            if weight.shape[axis] % pattern[1]:
                raise UsageError("E290", f"{weight.shape[axis]} inputs of block {name} are not a multiple of {pattern[1]}",
                                 help="use another pattern, or none")  # fmt: skip

    @torch.no_grad()
    def before_update(self) -> None:
        """Take the gradient of masked weights away, so that it is not part of the norm that is clipped."""
        for name, (weight, _) in self._weights.items():
            if weight.grad is not None:
                weight.grad.mul_(self.masks[name])

    @torch.no_grad()
    def after_update(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Compute the masks anew where the schedule says so, and apply them.

        Args:
            step: updates made so far.
            optimizer: moments of masked weights become zero.
        """
        schedule = self.schedule
        if schedule is not None and schedule.updates(step, self.steps):
            share = schedule.sparsity(step, self.steps)
            for name, (weight, axis) in self._weights.items():
                under = self._under.get(name)
                full = weight if under is None else torch.where(self.masks[name], weight, under)
                mask = magnitude_mask(full, share, schedule.pattern, axis)
                self.masks[name] = mask
                self._under[name] = torch.where(mask, torch.zeros_like(full), full)
                weight.copy_(torch.where(mask, full, torch.zeros_like(full)))
                for value in optimizer.state.get(weight, {}).values():
                    if isinstance(value, Tensor) and value.shape == weight.shape:
                        value.mul_(mask)
            if step == schedule.limits(self.steps)[1]:
                self._under = {}
        for name, (weight, _) in self._weights.items():
            weight.mul_(self.masks[name])

    def share(self) -> float:
        """Return the share of masked weights."""
        masked = sum(int((~mask).sum()) for mask in self.masks.values())
        return masked / sum(mask.numel() for mask in self.masks.values())

    def state(self) -> dict[str, Any]:
        return {"masks": dict(self.masks), "under": dict(self._under)}

    def restore(self, state: Mapping[str, Any]) -> None:
        for name, (weight, _) in self._weights.items():
            self.masks[name] = state["masks"][name].to(weight.device)
        self._under = {
            name: value.to(self._weights[name][0].device) for name, value in state["under"].items()
        }
