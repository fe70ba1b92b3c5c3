"""Placement over devices that are not there."""

from __future__ import annotations

import pytest
import torch

from surgeon.calibrate import placement
from surgeon.calibrate.placement import Placement
from surgeon.errors import EnvironmentFault, UsageError


@pytest.fixture
def gpus(monkeypatch):
    """Pretend to have GPUs with these free bytes."""

    def pretend(free):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(free))
        monkeypatch.setattr("accelerate.utils.get_max_memory", lambda: {**free, "cpu": 1 << 40})

    return pretend


def names(found):
    return [str(device) for device in found.devices]


def test_layers_alternate_over_all_gpus_with_memory(gpus):
    gpus({0: 10 << 30, 1: 40 << 30, 2: 0, 3: 20 << 30})
    found = Placement.of("auto", 32)
    assert names(found) == ["cuda:1", "cuda:3", "cuda:0"]
    assert [str(found.of_layer(layer)) for layer in range(4)] == ["cuda:1", "cuda:3", "cuda:0", "cuda:1"]
    assert str(found.outer) == "cuda:1"
    assert names(Placement.of("cuda", 2)) == ["cuda:1", "cuda:3"]
    assert names(Placement.of("cuda:3", 32)) == ["cuda:3"]
    assert names(Placement.of("cpu", 32)) == ["cpu"]


def test_auto_falls_back_before_the_start(gpus):
    gpus({})
    assert names(Placement.of("auto", 4)) == ["cpu"]
    for device in ("cuda", "cuda:0"):
        with pytest.raises(EnvironmentFault) as caught:
            Placement.of(device, 4)
        assert caught.value.code == "E515"


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "cpu:1", "auto:0", ""])
def test_other_names_are_refused(device):
    with pytest.raises(UsageError):
        Placement.of(device, 4)


def test_sending_moves_what_is_nested_and_keeps_the_rest(gpus):
    two = Placement((torch.device("meta"), torch.device("cpu")))  # a second device that every machine has
    moved = two.send(
        {"mask": torch.ones(2), "pair": (torch.zeros(1), None, 3), "flag": False}, torch.device("meta")
    )
    assert moved["mask"].is_meta and moved["pair"][0].is_meta and moved["pair"][1:] == (None, 3)
    assert moved["flag"] is False
    assert placement.alternate([torch.device("cpu")], 0) == (torch.device("cpu"),)
