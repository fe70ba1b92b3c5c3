"""nPMI of experts and marker words, against the definition."""

import math
from types import SimpleNamespace as Some

import numpy as np
import pytest
import torch

from surgeon.errors import InputError
from surgeon.experts.cognitive import CognitiveCounts, Marker, marker_places, npmi


def test_hand_table():
    found = npmi(np.array([8]), np.array([20]), 10, 100)
    assert found[0] == pytest.approx(2 / math.log2(12.5), rel=1e-15) and found[0] == pytest.approx(
        0.549, abs=5e-4
    )


def test_ends_of_the_scale():
    assert npmi(np.array([10]), np.array([10]), 10, 100)[0] == pytest.approx(1.0)  # exactly at the markers
    assert npmi(np.array([5]), np.array([50]), 10, 100)[0] == pytest.approx(0.0, abs=1e-15)  # independent
    assert npmi(np.array([0, 0]), np.array([50, 0]), 10, 100).tolist() == [
        -1.0,
        -1.0,
    ]  # never, and never used
    assert npmi(np.array([100]), np.array([100]), 100, 100)[0] == 0.0  # 0/0: says nothing


def test_values_stay_within_the_scale():
    drawn = np.random.default_rng(0)
    for _ in range(500):
        tokens = int(drawn.integers(2, 60))
        chosen, marked = drawn.random(tokens) < drawn.random(), drawn.random(tokens) < drawn.random()
        if marked.any():
            value = npmi(np.array([(chosen & marked).sum()]), np.array([chosen.sum()]), int(marked.sum()), tokens)  # fmt: skip
            assert -1 <= value[0] <= 1


def test_positions_behind_and_before():
    ids = np.array([7, 5, 1, 2, 9, 5, 7, 1, 2])
    assert Marker("<think>", ((5,),), 1).positions(ids).tolist() == [2, 6]
    assert Marker("x", ((5,),), -1).positions(ids).tolist() == [0, 4]
    # of several tokens: behind the last, before the first; what falls outside is left out
    assert Marker("<think>", ((1, 2),), 1).positions(ids).tolist() == [4]
    assert Marker("x", ((1, 2), (7,)), -1).positions(ids).tolist() == [1, 5, 6]
    assert Marker("x", ((1, 2, 9, 5, 7, 1, 2, 0, 0, 0),), -1).positions(ids).tolist() == []


def test_a_spelling_inside_another_counts_once():
    ids = np.array([1, 2, 3, 9, 2, 3, 9, 1, 2, 3])
    assert Marker("x", ((2, 3), (1, 2, 3)), -1).positions(ids).tolist() == [3, 6]
    assert Marker("<think>", ((2, 3), (2,)), 1).positions(ids).tolist() == [3, 6]


def test_markers_are_spelled_as_text_writes_them():
    asked = []

    def encode(text):
        asked.append(text)
        return {"so": [4], " so": [5], "So": [4], " So": [6, 7]}.get(text, [1])

    assert Marker.of("so", encode) == Marker("so", ((4,), (5,), (6, 7)), -1)
    assert asked == ["so", " so", "So", " So"]
    assert Marker.of("<think>", encode) == Marker("<think>", ((1,),), 1)


def test_counts_equal_plain_loops_and_find_the_planted_expert():
    drawn = np.random.default_rng(1)
    samples = [drawn.integers(10, 30, length) for length in (60, 35, 50)]
    for ids in samples:
        ids[5::11] = 3
    markers = [Marker("a", ((3,),), 1), Marker("b", ((12,),), -1)]
    places = marker_places(markers, samples)
    experts, slots = 8, 2
    choices = [np.argsort(drawn.random((len(ids), experts)), axis=1)[:, :slots] for ids in samples]
    for sample, index in enumerate(choices):
        index[index == 6] = 8  # nobody else uses expert 6, the slot stays empty
        index[places["a"][sample], 0] = 6
    model = Some(running=[Some(index=4, count=experts)])
    counts = CognitiveCounts(places, [len(ids) for ids in samples], model)
    for part in ([2], [0, 1]):
        counts.routed(
            Some(
                layer=4, index=torch.from_numpy(np.concatenate([choices[s] for s in part])),
                samples=torch.from_numpy(np.concatenate([np.full(len(samples[s]), s) for s in part])),
                positions=torch.from_numpy(np.concatenate([np.arange(len(samples[s])) for s in part])),
            )
        )  # fmt: skip
        taken_up = CognitiveCounts(places, [len(ids) for ids in samples], model)
        taken_up.restore(counts.state())
        counts = taken_up
    for row, marker in enumerate(("a", "b")):
        for expert in range(experts):
            together = sum(expert in choices[s][p] for s in range(3) for p in places[marker][s])
            assert counts.joint[4][row, expert] == together
    for expert in range(experts):
        assert counts.used[4][expert] == sum(expert in token for index in choices for token in index)
    best = counts.ranked()[0]
    assert (best.layer, best.expert) == (4, 6) and best.markers["a"] == pytest.approx(1.0)
    assert best.score == pytest.approx((best.markers["a"] + best.markers["b"]) / 2)
    assert counts.occurrences["a"] == sum(len(p) for p in places["a"].values()) == best.together["a"]


def test_a_marker_that_is_nowhere_is_refused():
    with pytest.raises(InputError, match='"</think>" is nowhere') as error:
        marker_places([Marker("</think>", ((99,),), -1)], [np.arange(5)])
    assert error.value.code == "E439"
    with pytest.raises(InputError):  # only at the edge
        marker_places([Marker("x", ((0,),), -1)], [np.arange(5)])
