"""Level grids by hand, and costs against the headers of models that were really cut."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "structure"))
from structure_models import both, ffn_cut, groups_cut, heads_cut, opened, without

from surgeon.checkpoint.dtypes import DTYPES
from surgeon.errors import UsageError
from surgeon.prune.cost import SizeCost, TimeCost
from surgeon.prune.goal import Goal
from surgeon.prune.levels import (
    ModuleLevels,
    ffn_counts,
    ffn_multiples,
    granularity,
    levels_of,
    useful_modes,
)
from surgeon.structure.check import shapes
from surgeon.structure.cut import Cut, LayerCut, LayerShape
from surgeon.structure.views import PrunedView


@pytest.mark.parametrize(
    ("width", "step"), [(14336, 128), (512, 128), (1536, 128), (500, 8), (384, 32), (432, 8), (64, 8), (5, 5)]
)
def test_granularity_by_width(width, step):
    assert granularity(width) == step


def test_a_given_granularity_is_taken_or_refused():
    assert granularity(4096, 256) == 256 and granularity(10, 1) == 1
    for wrong in (0, -3, 65):
        with pytest.raises(UsageError, match="E269"):
            granularity(64, wrong)


def test_ffn_levels_fall_by_a_tenth_down_to_a_hundredth():
    assert ffn_counts(100, 1) == (
        100, 90, 81, 73, 66, 60, 54, 48, 44, 39, 35, 32, 29, 26, 23, 21, 19, 17, 16, 14, 13, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 0
    )  # fmt: skip
    # Always rounded up, never twice the same, and a width that the step does not divide stays whole.
    assert ffn_counts(1536, 128) == (1536, 1408, 1280, 1152, 1024, 896, 768, 640, 512, 384, 256, 128, 0)
    assert ffn_counts(20, 8) == (20, 16, 8, 0)
    assert ffn_counts(14336, 128)[:4] == (14336, 12928, 11648, 10496) and ffn_counts(14336, 128)[-2] == 256


@pytest.mark.parametrize("width", [5, 100, 432, 1000, 14336])
@pytest.mark.parametrize("step", [1, 8, 128])
def test_ffn_levels_in_general(width, step):
    step = min(step, width)
    counts = ffn_counts(width, step)
    assert counts[0] == width and counts[-1] == 0
    assert list(counts) == sorted(set(counts), reverse=True)
    assert all(count % step == 0 for count in counts[1:])
    steps = ffn_multiples(width, step)
    assert steps[0] == width and set(counts[:-1]) <= set(steps)
    assert steps[-1] == counts[-2]
    assert all(low - high in (-step, -(width % step or step)) for high, low in itertools.pairwise(steps))


def test_attention_levels_and_their_shapes():
    _, structure = opened("llama")  # 6 query heads on 3 key/value heads
    groups = levels_of(structure, 0, "attention", "groups")
    heads = levels_of(structure, 0, "attention", "heads")
    assert groups.counts == (3, 2, 1, 0) and heads.counts == (2, 1, 0)
    assert [groups.shape(n) for n in groups.counts] == [
        LayerShape(6, 3, 8, 0), LayerShape(4, 2, 8, 0), LayerShape(2, 1, 8, 0), LayerShape(0, 0, 8, 0)
    ]  # fmt: skip
    assert [heads.shape(n) for n in heads.counts] == [
        LayerShape(6, 3, 8, 0), LayerShape(3, 3, 8, 0), LayerShape(0, 0, 8, 0)
    ]  # fmt: skip
    assert groups.without_zero().counts == (3, 2, 1)
    assert groups == levels_of(structure, 2, "attention", "groups")  # shared by layers of one shape
    ffn = levels_of(structure, 1, "ffn", "channels", 16)
    assert ffn == ModuleLevels("ffn", "channels", (48, 32, 16, 0)) and ffn.units == 48
    assert ffn.shape(16) == LayerShape(0, 0, 0, 16)


def test_modes_that_differ():
    assert useful_modes(opened("llama")[1]) == ("groups", "heads")
    assert useful_modes(opened("gpt2")[1]) == ("groups",)
    assert useful_modes(opened("llama", num_attention_heads=3, num_key_value_heads=1, head_dim=16)[1]) == (
        "heads",
    )
    assert useful_modes(opened("llama", num_attention_heads=1, num_key_value_heads=1, head_dim=16)[1]) == (
        "groups",
    )
    assert useful_modes(opened("deepseek_v3")[1]) == ()


def cuts_of(structure):
    cuts = [Cut.whole(structure.layers), without(Cut.whole(structure.layers), 1)]
    if structure.attention[0] is not None:
        cuts.append(groups_cut(structure))
        if structure.attention[0].per_group > 1:
            cuts.append(heads_cut(structure))
    if all(f is not None for f in structure.ffn):
        cuts += [ffn_cut(structure), without(both(groups_cut(structure), ffn_cut(structure, 9)), 2)]
        whole = Cut.whole(structure.layers).layers
        cuts.append(Cut((LayerCut(heads=()), LayerCut(channels=()), LayerCut((), ()), *whole[3:])))
    return cuts


@pytest.mark.parametrize(
    "family",
    ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi", "phi3", "gpt2", "bert", "mixtral", "olmoe", "deepseek_v3"],
)  # fmt: skip
def test_parameters_and_bytes_are_those_of_the_cut_model(family):
    checkpoint, structure = opened(family)
    parameters = SizeCost(checkpoint, structure)
    size = SizeCost(checkpoint, structure, "bytes", "BF16")
    compared = 0
    for cut in cuts_of(structure):
        try:
            view = PrunedView(checkpoint, structure, cut, allow_norm_approx=True)
        except Exception as error:  # no class holds it; there is nothing to compare with
            assert getattr(error, "code", "") in {"E327", "E341", "E367"}, error
            continue
        count = sum(info.elements for info in view.tensors.values())
        assert parameters.total(cut) == count
        compared += 1
        floats = sum(i.elements for i in view.tensors.values() if DTYPES[i.dtype].family == "float")
        assert (
            size.total(cut) - sum(i.nbytes for i in view.tensors.values()) == -2 * floats
        )  # stored as float32
    assert compared >= 2
    dense = sum(info.elements for info in checkpoint.tensors.values())
    assert parameters.dense == dense
    assert 0 < parameters.rest < dense


class Table:
    """Seconds that are easy to add up."""

    def attention_seconds(self, heads, groups):
        return heads + 10 * groups

    def ffn_seconds(self, width):
        return width / 8

    def parts(self, shapes):
        return sum(s.heads for s in shapes), sum(s.ffn for s in shapes), 5.0


def test_time_is_that_of_the_table():
    _, structure = opened("llama")
    cost = TimeCost(Table(), structure)
    assert cost.dense == 5 + 3 * (6 + 30 + 6) and cost.prunable() == 3 * 42
    cut = without(both(groups_cut(structure), ffn_cut(structure, 16)), 1)
    assert shapes(cut, structure) == (LayerShape(4, 2, 8, 16),) * 2
    assert cost.total(cut) == 5 + 2 * (4 + 20 + 2)
    assert cost.module(0, "ffn", LayerShape(0, 0, 0, 8)) == 1


def test_goals_as_budgets():
    checkpoint, structure = opened("llama")
    time, size = TimeCost(Table(), structure), SizeCost(checkpoint, structure)
    assert Goal("speedup", 2.0, time).budget == time.dense / 2
    assert Goal("params", 5000, size).budget == 5000
    sparsity = Goal("sparsity", 0.25, size)
    assert sparsity.budget == size.dense - size.prunable() / 4
    assert sparsity.achieved(sparsity.budget) == 0.25
    assert Goal("speedup", 2.0, time).achieved(time.dense / 4) == 4
    assert Goal("speedup", 2.0, time).show(time.dense / 2.319) == "2.31x"


@pytest.mark.parametrize(
    ("kind", "value", "message", "help"),
    [
        ("speedup", 3.0, "speedup 3.0 cannot be reached: at most 2.31x", "between 1.00x and 2.31x"),
        ("params", 1000, "1,000 parameters cannot be reached: at least 5,000 parameters", "between 11,550 parameters and 5,000"),
        ("size", 1e3, "a size of 0.0 MB cannot be reached: at least 0.0 MB", ""),
        ("sparsity", 0.9, "sparsity 0.9 cannot be reached: at most 65.5%", "between 0.0% and 65.5%"),
        ("params", 11_550, "11,550 parameters asks for nothing: the model has 11,550 parameters as it is", "down to 5,000"),
    ],
)  # fmt: skip
def test_what_cannot_be_reached_is_refused_with_the_range(kind, value, message, help):
    class Fixed:
        dense = 11_550.0

        def prunable(self):
            return 10_000.0

    with pytest.raises(UsageError) as caught:
        Goal(kind, value, Fixed()).check(5000.0)
    assert caught.value.code == "E264" and caught.value.exit_code == 2
    assert caught.value.message == message
    assert help in caught.value.help
    Goal(kind, {"speedup": 2.31, "sparsity": 0.6}.get(kind, 5000.0), Fixed()).check(5000.0)
