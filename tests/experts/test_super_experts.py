"""The rule for super experts: its three conditions, few experts, and one planted in a model that runs."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "structure"))
from expert_models import build

from surgeon.calibrate.data import Sample
from surgeon.calibrate.settings import Settings
from surgeon.checkpoint.checkpoint import open_path
from surgeon.experts.statistics import collect_statistics
from surgeon.experts.super_experts import SuperExpert, by_peaks, super_experts
from surgeon.structure.experts.find import experts_of


def peaks(layers, experts, first=0, seed=0):
    drawn = np.random.default_rng(seed)
    return {layer: drawn.uniform(1, 5, experts) for layer in range(first, first + layers)}


def percentile(values, share):
    """Return a percentile with linear interpolation, written out."""
    ordered = sorted(values)
    place = share / 100 * (len(ordered) - 1)
    low = int(place)
    return ordered[low] + (place - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])


def test_published_values():
    """Qwen3-30B-A3B: 48 layers of 128 experts, L1E68, L2E92 and L3E82 at 744, 540 and 430, the next at 63.5."""
    found = peaks(48, 128)
    found[1][68], found[2][92], found[3][82], found[20][5] = 744.0, 540.0, 430.0, 63.5
    wanted = [
        SuperExpert(1, 68, 744.0, True),
        SuperExpert(2, 92, 540.0, True),
        SuperExpert(3, 82, 430.0, True),
    ]
    assert by_peaks(found, 48) == wanted


def test_each_condition_counts():
    found = peaks(10, 40)  # 400 experts, 2 of which may exceed the percentile
    found[2][7] = 100.0
    assert by_peaks(found, 10) == [SuperExpert(2, 7, 100.0, True)]
    found[3][9] = 9.9  # above the percentile, not a tenth of the largest
    assert percentile(np.concatenate(list(found.values())), 99.5) < 9.9
    assert by_peaks(found, 10) == [SuperExpert(2, 7, 100.0, True)]
    found[3][9] = 10.1
    assert [(one.layer, one.expert) for one in by_peaks(found, 10)] == [(2, 7), (3, 9)]
    found[4][:5] = 50.0  # now seven are large: the percentile lies among them
    high = percentile(np.concatenate(list(found.values())), 99.5)
    assert high == pytest.approx(50.0)
    assert [(one.layer, one.expert) for one in by_peaks(found, 10)] == [(2, 7)]


def test_last_layers_do_not_count():
    for layer, counts in ((7, True), (8, False), (9, False)):  # round(0.75 * 10) = round(7.5) = 8
        found = peaks(10, 40)
        found[layer][3] = 1000.0
        assert bool(by_peaks(found, 10)) is counts


def test_layers_are_those_of_the_model():
    """Three dense layers come first; counted among layers of experts alone, layer 9 of 12 would be early."""
    for layer, counts in ((3, True), (8, True), (9, False), (11, False)):
        found = peaks(9, 40, first=3)
        found[layer][0] = 1000.0
        assert [(one.layer, one.expert) for one in by_peaks(found, 12)] == ([(layer, 0)] if counts else [])


def test_few_experts_must_stand_out_in_their_layer():
    found = peaks(6, 8)
    found[1][2] = 6.0  # the largest of 48, so above the percentile, but like its neighbours
    assert by_peaks(found, 12) == []
    found[1][2] = 60.0
    assert by_peaks(found, 12) == [SuperExpert(1, 2, 60.0, True)]
    found[3][4] = 55.0  # as outlying, but of 48 values only the largest is above the percentile
    assert by_peaks(found, 12) == [SuperExpert(1, 2, 60.0, True), SuperExpert(3, 4, 55.0, False)]
    late = found | {11: np.array([70.0, 1.0, 2.0])}  # not one itself, but the percentile is next to it now
    assert by_peaks(late, 12) == [SuperExpert(1, 2, 60.0, False), SuperExpert(3, 4, 55.0, False)]


def test_nothing_at_all():
    assert by_peaks({0: np.zeros(8), 1: np.zeros(8)}, 2) == []
    assert by_peaks({0: np.array([3.0])}, 1) == []


def planted(folder, layer, overrides, expert=3):
    model = build("qwen2_moe", num_hidden_layers=12, **overrides)
    with torch.no_grad():
        model.model.layers[layer].mlp.experts.down_proj[expert] *= 1000
    model.save_pretrained(folder)
    checkpoint = open_path(folder)
    drawn = np.random.default_rng(0)
    samples = [Sample(drawn.integers(3, 67, 24), 0) for _ in range(4)]
    experts = experts_of(checkpoint)
    return collect_statistics(checkpoint, samples, Settings(threads=1), experts), experts


@pytest.mark.parametrize(
    ("layer", "overrides", "protected"),
    [
        (1, {"mlp_only_layers": []}, True),
        (11, {"mlp_only_layers": []}, False),
        (8, {"mlp_only_layers": [0, 1, 2]}, True),
        (9, {"mlp_only_layers": [0, 1, 2]}, False),
    ],
)
def test_one_planted_in_a_model(tmp_path, layer, overrides, protected):
    found, experts = planted(tmp_path, layer, overrides)
    own = found.total(layer)
    assert own.tokens[3] > 0 and own.peak[3] > 50 * np.delete(own.peak, 3).max()
    wanted = [SuperExpert(layer, 3, float(own.peak[3]), True)] if protected else []
    assert super_experts(found, experts) == wanted
