"""Uniform plans beyond the band: compared, named where they lose less, never chosen."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from test_uniform import Model

from surgeon.prune import decide
from surgeon.prune.uniform import BEYOND


def coarse(seed: int, share: float = 0.62) -> tuple[Any, Any, Any]:
    """Return a model, a goal, and the uniform choice where FFNs are all that matters."""
    model = Model(seed=seed)
    for (layer, kind), _ in model.weights.items():
        model.weights[layer, kind] = 1.0 if kind == "ffn" else 0.001
    goal = model.goal(share)
    return model, goal, model.uniform(goal)


def test_plans_beyond_the_band_are_compared_but_not_chosen():
    found = 0
    for share in (0.66, 0.7, 0.74, 0.78, 0.82, 0.86):
        model, goal, choice = coarse(1, share)
        least = min(one.cost for one in choice.tried)
        assert choice.best in choice.tried and all(one.cost >= least for one in choice.tried)
        assert len(choice.beyond) <= BEYOND and all(one.cost < least for one in choice.beyond)
        assert all(one.loss == pytest.approx(model.one(one.cut)) for one in choice.beyond)
        # Beyond are the widest FFNs of their attention and layers that meet the budget, as within it.
        assert all(one.cost <= goal.budget for one in choice.beyond)
        found += bool(choice.beyond) and min(one.loss for one in choice.beyond) < choice.loss
    assert found >= 1


def test_the_plain_program_looks_no_further():
    model, goal, _ = coarse(0)
    model.calls.clear()
    choice = model.uniform(goal, candidates=1)
    assert choice.beyond == () and sum(map(len, model.calls)) == 1


@pytest.mark.parametrize(
    ("step", "said"), [(128, "--round-to 32"), (32, "--round-to 8"), (8, "--round-to 1 "), (1, None)]
)
def test_the_user_is_told_which_plan_and_how_to_get_nearer(step, said):
    worse, better = (
        SimpleNamespace(loss=0.21, cost=2.0, name="1 groups"),
        SimpleNamespace(loss=0.05, cost=1.0, name="FFN 128"),
    )
    goal = SimpleNamespace(kind="speedup", show=lambda cost: {1.0: "1.90x", 2.0: "1.50x"}[cost])
    choice: Any = SimpleNamespace(beyond=(better,), loss=worse.loss)
    (text,) = decide._cheaper(choice, goal, step)  # type: ignore[arg-type]
    assert text.startswith("a faster plan has a lower loss: FFN 128, predicted 1.90x, loss 0.05 against 0.21")
    assert said in text + " " if said else "--round-to" not in text
    for nothing in ((), (worse,)):
        choice.beyond = nothing
        assert decide._cheaper(choice, goal, step) == []  # type: ignore[arg-type]
