"""The loop all training here runs in: rate schedule, clipping, accumulation, states on disk, a guard against NaN.

What is learned is a `Task`; the loop knows steps and parts of steps. A run that was interrupted and one
that was not give the same bits on a CPU: the state holds parameters, moments, random number generators
and the position, and the data of a step follow from its number.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from surgeon.errors import InputError, Interrupted, UsageError
from surgeon.train.saved_state import SavedState

_LOG = logging.getLogger(__name__)

DECAYS = ("linear", "cosine", "constant")
HALVINGS = 3
"""How often a loss that is not finite is answered by a lower rate before it is an error."""

Progress = Callable[[int, int], None]
"""Called with (steps done, steps)."""


@dataclass(frozen=True)
class Pace:
    """How fast and how long.

    Attributes:
        steps: updates of the parameters.
        accumulation: parts whose gradients are added up before an update.
        warm_up: share of the steps in which the rate rises from 0.
        decay: how it falls to 0 afterwards: "linear", "cosine" or "constant".
        clip: largest norm of the gradient; 0 does not clip.
        checkpoint_every: steps between states on disk; 0 keeps the first one only.
    """

    steps: int
    accumulation: int = 1
    warm_up: float = 0.05
    decay: str = "linear"
    clip: float = 1.0
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        whole("steps", self.steps, 1)
        whole("accumulation", self.accumulation, 1)
        whole("checkpoint_every", self.checkpoint_every, 0)
        number("warm_up", self.warm_up, 0.0, 1.0)
        number("clip", self.clip, 0.0)
        if self.decay not in DECAYS:
            raise UsageError(
                "E290", f"{self.decay!r} is not a way for the rate to fall", help="use " + ", ".join(DECAYS)
            )

    def factor(self, step: int) -> float:
        """Return what the rate is multiplied by in a step, counted from 0."""
        warm = round(self.steps * self.warm_up)
        if step < warm:
            return (step + 1) / (warm + 1)
        gone = (step - warm) / max(1, self.steps - warm)
        if self.decay == "linear":
            return 1.0 - gone
        return 0.5 * (1.0 + math.cos(math.pi * gone)) if self.decay == "cosine" else 1.0


class Task(Protocol):
    """What is learned."""

    def groups(self) -> list[dict[str, Any]]:
        """Return parameter groups with their ``lr``; ``constant`` exempts one from the schedule."""
        ...

    def loss(self, step: int, part: int) -> tuple[Tensor, Mapping[str, float]]:
        """Return one part's share of the loss of a step, and figures to record; the parts' shares add up."""
        ...

    def before_update(self, step: int) -> None:
        """Called when the gradients are complete and not yet clipped."""
        ...

    def after_update(self, step: int, optimizer: torch.optim.Optimizer) -> None: ...

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class Ran:
    """What a run says about itself.

    Attributes:
        history: figures of about a hundred steps, the last among them.
        halvings: how often the rate was halved because a loss was not finite.
        resumed: the step an earlier run had reached; None for a run from the start.
    """

    history: tuple[dict[str, float], ...]
    halvings: int
    resumed: int | None


class Loop:
    """Runs a task to its last step.

    Args:
        task: what is learned; its random draws come from the global generators of torch.
        pace: rates, steps, accumulation.
        saved: where states are kept.
        betas, weight_decay: of AdamW (Loshchilov & Hutter, arXiv 1711.05101).
        seed: the generators are set to it at the start.
    """

    def __init__(
        self,
        task: Task,
        pace: Pace,
        saved: SavedState,
        *,
        seed: int = 0,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
    ) -> None:
        self.task, self.pace, self.saved, self.seed = task, pace, saved, seed
        self.optimizer = torch.optim.AdamW(task.groups(), betas=betas, weight_decay=weight_decay)
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        self._scale = 1.0
        self._halvings = 0
        self._history: list[dict[str, float]] = []

    def run(self, progress: Progress | None = None, stop: threading.Event | None = None) -> Ran:
        """Train.

        Raises:
            Interrupted: E130 ``stop`` was set; the state is on disk.
            InputError: E411 the loss stays not finite after three halvings of the rate.
        """
        with torch.random.fork_rng():  # the caller's generators stay as they are
            torch.manual_seed(self.seed)
            return self._run(progress, stop)

    def _run(self, progress: Progress | None, stop: threading.Event | None) -> Ran:
        found = self.saved.load()
        step = 0 if found is None else self._restore(found)
        resumed = None if found is None else step
        if found is None:
            self._save(0)
        kept = -(-self.pace.steps // 100)
        while step < self.pace.steps:
            if stop is not None and stop.is_set():
                self._save(step)
                raise Interrupted("E130", f"stopped after {step} of {self.pace.steps} training steps",
                                  help="run the same command again to go on from there")  # fmt: skip
            figures = self._step(step)
            if figures is None:
                step = self._back()
                continue
            step += 1
            if step % kept == 0 or step == self.pace.steps:
                self._history.append({"step": step, **figures})
            every = self.pace.checkpoint_every
            if every and step % every == 0 and step < self.pace.steps:
                self._save(step)
            if progress is not None:
                progress(step, self.pace.steps)
        return Ran(tuple(self._history), self._halvings, resumed)

    def _step(self, step: int) -> dict[str, float] | None:
        """Make one update and return its figures; None, without an update, when something is not finite."""
        factor = self.pace.factor(step) * self._scale
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * (self._scale if group.get("constant") else factor)
        self.optimizer.zero_grad(set_to_none=True)
        figures: dict[str, float] = {}
        for part in range(self.pace.accumulation):
            loss, parts = self.task.loss(step, part)
            value = loss.item()
            if not math.isfinite(value):
                return None
            if loss.requires_grad:
                loss.backward()
            for name, share in {"loss": value, **parts}.items():
                figures[name] = figures.get(name, 0.0) + share
        self.task.before_update(step)
        parameters = [
            p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        norm = (
            torch.nn.utils.clip_grad_norm_(parameters, self.pace.clip or math.inf).item()
            if parameters
            else 0.0
        )
        if not math.isfinite(norm):
            return None
        self.optimizer.step()
        self.task.after_update(step, self.optimizer)
        return figures

    def _back(self) -> int:
        """Return to the last state with half the rate."""
        halvings, scale = self._halvings + 1, self._scale / 2
        if halvings > HALVINGS:
            raise InputError("E411", f"the loss is not finite, even at 1/{2**HALVINGS} of the rate",
                             help="lower the rate, or look for values that are not finite in the model")  # fmt: skip
        found = self.saved.load()
        if found is None:
            raise InputError(
                "E411",
                "the loss is not finite and the state before it is lost",
                help="run again with a lower rate",
            )
        step = self._restore(found)
        self._halvings, self._scale = halvings, scale
        _LOG.warning("the loss is not finite: back to step %d with half the rate", step)
        return step

    def _save(self, step: int) -> None:
        self.saved.save(
            {
                "step": step,
                "task": self.task.state(),
                "optimizer": self.optimizer.state_dict(),
                "generators": _generators(),
                "scale": self._scale,
                "halvings": self._halvings,
                "history": self._history,
            }
        )

    def _restore(self, state: Mapping[str, Any]) -> int:
        self.task.restore(state["task"])
        self.optimizer.load_state_dict(state["optimizer"])
        _set_generators(state["generators"])
        self._scale, self._halvings = state["scale"], state["halvings"]
        self._history = list(state["history"])
        return int(state["step"])


def whole(name: str, value: Any, least: int) -> None:
    """Refuse an option that is not a whole number of at least ``least`` (E290)."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UsageError("E290", f"{name} is {value!r}", help=f"a whole number of at least {least}")


def number(name: str, value: Any, least: float, most: float = math.inf, *, open_below: bool = False) -> None:
    """Refuse an option that is not a number from ``least`` to ``most`` (E290)."""
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or not least <= value <= most or (open_below and value == least):
        range_text = f"{'above' if open_below else 'from'} {least:g}" + (
            "" if most == math.inf else f" to {most:g}"
        )
        raise UsageError("E290", f"{name} is {value!r}", help=f"a number {range_text}")


def _generators() -> dict[str, Any]:
    """Return the states of torch's generators."""
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": devices}


def _set_generators(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
