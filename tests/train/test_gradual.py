"""Gradual sparsity: the schedule, the masks, weights that come back, zeros that survive."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from train_models import disturbed, model_folder, read, texts

from surgeon.errors import Interrupted, UsageError
from surgeon.train.distill import Options, distill
from surgeon.train.gradual import Masks, Schedule, magnitude_mask

BLOCK = ".layers."


def zeros_of(folder):
    return {n: (t == 0) for n, t in read(folder).items() if BLOCK in n and t.ndim == 2}


def test_the_schedule_is_cubic():
    schedule = Schedule(final=0.8, initial=0.2, begin=0.1, end=0.6, every=10)
    assert schedule.limits(100) == (10, 60)
    assert [t for t in range(101) if schedule.updates(t, 100)] == [10, 20, 30, 40, 50, 60]
    for n, t in enumerate(range(10, 61, 10)):  # equation 1 of the paper, written out
        assert schedule.sparsity(t, 100) == pytest.approx(0.8 + (0.2 - 0.8) * (1 - n / 5) ** 3)
    assert schedule.sparsity(10, 100) == pytest.approx(0.2)
    assert schedule.sparsity(5, 100) == 0.2
    assert schedule.sparsity(99, 100) == 0.8


def test_the_last_update_of_a_coarse_grid_reaches_the_target():
    schedule = Schedule(final=0.5, begin=0.0, end=0.55, every=20)
    assert schedule.limits(100) == (0, 40)
    assert schedule.sparsity(40, 100) == 0.5


@pytest.mark.parametrize("shape, sparsity", [((6, 8), 0.5), ((5, 12), 0.3), ((4, 4), 0.0), ((4, 4), 1.0)])
def test_magnitude_masks_equal_a_sort(shape, sparsity):
    weight = torch.randn(shape)
    mask = magnitude_mask(weight, sparsity, None, 1)
    goes = int(sparsity * weight.numel() + 1e-9)
    ranked = np.sort(weight.abs().numpy().ravel())
    assert int((~mask).sum()) == goes
    if goes:
        assert weight.abs()[~mask].max() <= ranked[goes - 1]


def test_patterns_hold_along_the_inputs():
    weight = torch.randn(6, 16)
    for axis, matrix in ((1, weight), (0, weight.T.contiguous())):
        mask = magnitude_mask(matrix, 0.5, (2, 4), axis)
        mask = mask.T if axis == 0 else mask
        assert bool((mask.reshape(6, 4, 4).sum(-1) == 2).all())
        kept = weight.abs() * mask
        assert torch.equal(
            kept.reshape(6, 4, 4).sum(-1), weight.abs().reshape(6, 4, 4).topk(2, -1).values.sum(-1)
        )
    assert bool((magnitude_mask(weight, 0.3, (2, 4), 1).reshape(6, 4, 4).sum(-1) == 3).all())


def test_masked_weights_return_until_the_schedule_ends():
    layer = torch.nn.Sequential(torch.nn.Linear(4, 1, bias=False))
    weight = layer[0].weight
    with torch.no_grad():
        weight.copy_(torch.tensor([[4.0, 3.0, 2.0, 1.0]]))
    masks = Masks([layer], Schedule(final=0.5, begin=0.0, end=0.2, every=1), 10)
    optimizer = torch.optim.AdamW([weight], lr=0.0)
    weight.sum().backward()
    optimizer.step()
    masks.after_update(1, optimizer)  # 0.5 - 0.5 / 8: one of four
    assert weight.tolist() == [[4.0, 3.0, 2.0, 0.0]]
    assert optimizer.state[weight]["exp_avg"][0, 3] == 0 and optimizer.state[weight]["exp_avg"][0, 0] != 0
    with torch.no_grad():
        weight[0, 0], weight[0, 1], weight[0, 3] = 0.5, 0.25, 9.0  # what is written under a mask is not kept
    masks.before_update()
    assert weight.grad[0, 3] == 0
    masks.after_update(2, optimizer)
    assert weight.tolist() == [[0.0, 0.0, 2.0, 1.0]]  # the value under the mask came back
    with torch.no_grad():
        weight.copy_(torch.tensor([[8.0, 8.0, 1.0, 1.0]]))
    masks.after_update(3, optimizer)
    assert weight.tolist() == [[0.0, 0.0, 1.0, 1.0]]  # the schedule is over


@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_sparse_training_ends_sparse_on_disk(scratch, pattern):
    teacher = model_folder("llama")
    options = Options(steps=10, batch=4, rate=3e-3, held_out=0.2, checkpoint_every=3,
                      sparsity=Schedule(final=0.5, begin=0.0, end=0.6, every=2, pattern=pattern))  # fmt: skip
    record = distill(teacher, teacher, texts(), options, scratch / "w", scratch / "out")
    for mask in zeros_of(scratch / "out").values():
        assert mask.float().mean().item() == pytest.approx(0.5, abs=1 / mask.numel())
        if pattern:
            assert bool((mask.reshape(mask.shape[0], -1, 4).sum(-1) == 2).all())
    assert record["zeros"] == pytest.approx(0.5, abs=1e-3)
    assert record["before"]["token"] == 0 < record["after"]["token"]


def test_a_resumed_sparse_run_writes_the_same_bytes(scratch):
    teacher = model_folder("llama")
    schedule = Schedule(final=0.6, begin=0.0, end=0.8, every=2)
    options = Options(steps=10, batch=4, rate=3e-3, held_out=0.0, sparsity=schedule)
    distill(teacher, teacher, texts(), options, scratch / "w1", scratch / "whole")
    stop = threading.Event()
    with pytest.raises(Interrupted):
        distill(teacher, teacher, texts(), options, scratch / "w2", scratch / "parts",
                progress=lambda step, steps: stop.set() if step == 5 else None, stop=stop)  # fmt: skip
    distill(teacher, teacher, texts(), options, scratch / "w2", scratch / "parts")
    assert (scratch / "whole/model.safetensors").read_bytes() == (
        scratch / "parts/model.safetensors"
    ).read_bytes()


def test_existing_zeros_are_kept_when_asked(scratch):
    teacher = model_folder("llama")
    student = disturbed(teacher, scratch / "student", zeros=0.4, dtype=torch.bfloat16)
    options = Options(steps=6, batch=4, rate=3e-3, weight_decay=0.1)
    distill(student, teacher, texts(), replace(options, keep_zeros=True), scratch / "w", scratch / "kept")
    distill(student, teacher, texts(), options, scratch / "w", scratch / "lost")
    before, kept, lost = (zeros_of(f) for f in (student, scratch / "kept", scratch / "lost"))
    assert all(bool((kept[name] | ~before[name]).all()) for name in before)
    assert sum(int(m.sum()) for m in lost.values()) < 0.1 * sum(int(m.sum()) for m in before.values())


def test_settings_that_cannot_be():
    for wrong in (
        {"final": 1.5},
        {"begin": 0.5, "end": 0.4},
        {"every": 0},
        {"pattern": (4, 4)},
        {"initial": 0.6},
    ):
        with pytest.raises(UsageError) as caught:
            Schedule(**wrong)
        assert caught.value.code == "E290"
    with pytest.raises(UsageError, match="multiple of 5"):
        Masks([torch.nn.Sequential(torch.nn.Linear(8, 2))], Schedule(pattern=(2, 5)), 10)
    with pytest.raises(UsageError):
        Options(sparsity=Schedule(), keep_zeros=True)
