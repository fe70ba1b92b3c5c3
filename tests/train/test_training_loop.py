"""The loop: schedule, accumulation, states on disk, resumption to the bit, and the guard against NaN."""

from __future__ import annotations

import json
import threading

import pytest
import torch

from surgeon.errors import InputError, Interrupted, UsageError
from surgeon.train.loop import Loop, Pace
from surgeon.train.saved_state import NOTE, SavedState


class Regression:
    """Least squares with noise from torch's generator, so that its state matters."""

    def __init__(self, spoil=None, pace=None):
        self.weight = torch.nn.Parameter(torch.zeros(5))
        self.truth = torch.arange(5.0)
        self.spoil = spoil or (lambda step, loop: False)
        self.loop = None
        self.parts = pace.accumulation if pace else 1
        self.seen = []

    def groups(self):
        return [{"params": [self.weight], "lr": 0.1}]

    def loss(self, step, part):
        self.seen.append((step, part))
        inputs = torch.randn(4, 5)
        loss = (inputs @ (self.weight - self.truth)).square().mean() / self.parts
        return (loss * float("nan") if self.spoil(step, self.loop) else loss), {"plain": loss.item()}

    def before_update(self, step):
        pass

    def after_update(self, step, optimizer):
        pass

    def state(self):
        return {"weight": self.weight.detach()}

    def restore(self, state):
        with torch.no_grad():
            self.weight.copy_(state["weight"])


def trained(scratch, pace, name="a", stop_at=None, **kwargs):
    task = Regression(pace=pace, **kwargs)
    loop = task.loop = Loop(task, pace, SavedState(scratch, {"name": name}), seed=4)
    stop = threading.Event()

    def progress(step, steps):
        if step == stop_at:
            stop.set()

    return task, loop.run(progress, stop)


def test_the_rate_rises_and_falls_as_said():
    pace = Pace(steps=20, warm_up=0.25, decay="linear")
    assert [pace.factor(s) for s in range(5)] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6])
    assert pace.factor(5) == 1.0
    assert pace.factor(19) == pytest.approx(1 / 15)
    cosine = Pace(steps=10, warm_up=0.0, decay="cosine")
    assert cosine.factor(0) == 1.0
    assert cosine.factor(5) == pytest.approx(0.5)
    assert {Pace(steps=9, warm_up=0.0, decay="constant").factor(s) for s in range(9)} == {1.0}


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"steps": 1.5},
        {"steps": 5, "warm_up": 2.0},
        {"steps": 5, "decay": "fast"},
        {"steps": 5, "clip": float("nan")},
    ],
)
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(UsageError) as caught:
        Pace(**wrong)
    assert caught.value.code == "E290"


def test_adamw_with_clipping_equals_torch_by_hand(scratch):
    pace = Pace(steps=6, warm_up=0.0, decay="cosine", clip=0.5, accumulation=2)
    task, _ = trained(scratch, pace)
    torch.manual_seed(4)
    weight = torch.nn.Parameter(torch.zeros(5))
    optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.0)
    for step in range(6):
        optimizer.param_groups[0]["lr"] = 0.1 * pace.factor(step)
        optimizer.zero_grad()
        for _ in range(2):
            ((torch.randn(4, 5) @ (weight - task.truth)).square().mean() / 2).backward()
        torch.nn.utils.clip_grad_norm_([weight], 0.5)
        optimizer.step()
    assert torch.equal(task.weight, weight)


def test_the_callers_generator_is_left_alone(scratch):
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    trained(scratch, Pace(steps=3))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("stop_at", [1, 5, 7])
def test_an_interrupted_run_ends_with_the_same_bits(scratch, stop_at):
    pace = Pace(steps=9, checkpoint_every=2)
    whole, _ = trained(scratch, pace, "whole")
    with pytest.raises(Interrupted) as caught:
        trained(scratch, pace, "parts", stop_at=stop_at)
    assert caught.value.exit_code == 130
    continued, ran = trained(scratch, pace, "parts")
    assert ran.resumed == stop_at
    assert continued.seen[0][0] == stop_at
    assert torch.equal(whole.weight, continued.weight)


def test_a_killed_run_continues_from_the_last_state(scratch):
    """Without the state written at a stop: only what ``checkpoint_every`` left."""
    pace = Pace(steps=9, checkpoint_every=4)

    def dies(step, loop):
        if step == 6:
            raise KeyboardInterrupt
        return False

    whole, _ = trained(scratch, pace, "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(scratch, pace, "killed", spoil=dies)
    continued, ran = trained(scratch, pace, "killed")
    assert ran.resumed == 4
    assert torch.equal(whole.weight, continued.weight)


def test_a_damaged_state_is_not_believed(scratch, caplog):
    pace = Pace(steps=6, checkpoint_every=2)
    whole, _ = trained(scratch, pace, "whole")
    with pytest.raises(Interrupted):
        trained(scratch, pace, "parts", stop_at=3)
    saved = SavedState(scratch, {"name": "parts"})
    file = saved.path / json.loads((saved.path / NOTE).read_text())["file"]
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    again, ran = trained(scratch, pace, "parts")
    assert ran.resumed is None
    assert "damaged" in caplog.text
    assert torch.equal(whole.weight, again.weight)


def test_another_identity_has_another_state(scratch):
    with pytest.raises(Interrupted):
        trained(scratch, Pace(steps=6), "one", stop_at=3)
    _, ran = trained(scratch, Pace(steps=6), "two")
    assert ran.resumed is None


def test_a_loss_that_is_not_finite_goes_back_and_halves_the_rate(scratch):
    pace = Pace(steps=8, checkpoint_every=3, warm_up=0.0, decay="constant")
    task, ran = trained(scratch, pace, spoil=lambda step, loop: step == 4 and loop._scale > 0.3)
    assert ran.halvings == 2
    steps = [step for step, _ in task.seen]
    assert steps == [0, 1, 2, 3, 4, 3, 4, 3, 4, 5, 6, 7]
    assert task.loop.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 4)
    assert bool(torch.isfinite(task.weight).all())


def test_a_loss_that_stays_not_finite_is_an_error(scratch):
    with pytest.raises(InputError) as caught:
        trained(scratch, Pace(steps=8), spoil=lambda step, loop: step == 2)
    assert caught.value.code == "E411"


def test_history_is_kept_across_a_resumption(scratch):
    with pytest.raises(Interrupted):
        trained(scratch, Pace(steps=6), stop_at=3)
    _, ran = trained(scratch, Pace(steps=6))
    assert [entry["step"] for entry in ran.history] == [1, 2, 3, 4, 5, 6]
    assert all(entry["loss"] == pytest.approx(entry["plain"]) for entry in ran.history)
