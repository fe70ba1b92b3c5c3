"""Choosing cuts: uniform against the whole grid, per layer against its floors; rankings and losses are made up."""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "structure"))
from structure_models import opened

from surgeon.errors import InputError, UsageError
from surgeon.prune import uniform
from surgeon.prune.cost import SizeCost, TimeCost
from surgeon.prune.goal import Goal
from surgeon.prune.per_layer import choose_per_layer
from surgeon.prune.ranking import Ranking
from surgeon.prune.uniform import choose_uniform
from surgeon.structure.check import check, is_uniform, shapes
from surgeon.structure.cut import Cut, LayerCut


class Model:
    """A tiny model with drawn rankings, and a loss that knows which modules matter.

    The loss is a weighted sum of the relative errors of modules; priors know nothing of the weights.
    """

    def __init__(self, family="llama", seed=0, spread=2.0, neighbours=0.0, **extra):
        self.checkpoint, self.structure = opened(family, **extra)
        self.cost = SizeCost(self.checkpoint, self.structure)
        drawn = np.random.default_rng(seed)
        self.rankings = {}
        self.weights = {}
        self.neighbours = neighbours
        for layer in range(self.structure.layers):
            a, f = self.structure.attention[layer], self.structure.ffn[layer]
            units = {"groups": a.groups, "heads": a.per_group}
            for mode, count in units.items():
                order = drawn.permutation(count).astype(np.int32)
                if mode == "heads":
                    order = np.stack(
                        [drawn.permutation(a.per_group) + g * a.per_group for g in range(a.groups)], 1
                    )
                self.add(
                    layer, "attention", mode, order, count, drawn, a.per_group if mode == "groups" else 1
                )
            self.add(layer, "ffn", "channels", drawn.permutation(f.width).astype(np.int32), f.width, drawn)
            for kind in ("attention", "ffn"):
                self.weights[layer, kind] = float(drawn.random() ** spread)
        self.calls = []

    def add(self, layer, kind, mode, order, units, drawn, size=1):
        errors = np.r_[0.0, np.sort(drawn.random(units - 1)), 1.0]
        self.rankings[layer, kind, mode] = Ranking(layer, kind, mode, order, errors, size)

    def ranking(self, layer, kind, mode):
        return self.rankings[layer, kind, mode]

    def error(self, cut, layer, kind):
        kept = cut.layers[layer]
        if kept is None:
            return 1.0
        units = kept.heads if kind == "attention" else kept.channels
        if units is None:
            return 0.0
        modes = ("channels",) if kind == "ffn" else ("groups", "heads")
        for mode in modes:  # what is kept must be one of the ranking's own sets
            ranking = self.rankings[layer, kind, mode]
            for count in range(ranking.units + 1):
                if ranking.kept(count) == units:
                    return ranking.error(count)
        raise AssertionError(f"{units} is no level of layer {layer}")

    def one(self, cut):
        parts = [
            [self.weights[layer, kind] * self.error(cut, layer, kind) for kind in ("attention", "ffn")]
            for layer in range(self.structure.layers)
        ]
        each = [sum(part) for part in parts]
        return sum(each) + self.neighbours * sum(a * b for a, b in itertools.pairwise(each))

    def losses(self, cuts):
        for cut in cuts:
            check(cut, self.structure, self.checkpoint.config)
        self.calls.append(list(cuts))
        return [self.one(cut) for cut in cuts]

    def goal(self, share):
        return Goal("params", self.cost.rest + share * (self.cost.dense - self.cost.rest), self.cost)

    def uniform(self, goal, **options):
        return choose_uniform(self.ranking, self.structure, goal, self.losses, round_to=8, **options)

    def per_layer(self, goal, **options):
        return choose_per_layer(self.ranking, self.structure, goal, self.losses, round_to=8, **options)

    def grid(self, drops=((),), modes=("groups", "heads"), widths=range(48, 0, -8)):
        """Return every uniform cut, made with plain loops."""
        layers = self.structure.layers
        choices = [(None, 0)]
        choices += [("groups", n) for n in (2, 1) if "groups" in modes]
        choices += [("heads", n) for n in (1,) if "heads" in modes]
        for (mode, count), width, drop in itertools.product(choices, widths, drops):
            yield Cut(tuple(
                None if layer in drop else LayerCut(
                    None if mode is None else self.ranking(layer, "attention", mode).kept(count),
                    None if width == 48 else self.ranking(layer, "ffn", "channels").kept(width),
                )
                for layer in range(layers)
            ))  # fmt: skip


DROPS = ((), (1,), (1, 3))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.4, 0.6, 0.8])
def test_uniform_is_the_best_of_the_grid(seed, share):
    model = Model(seed=seed, num_hidden_layers=5)
    goal = model.goal(share)
    choice = model.uniform(goal, drops=DROPS, tolerance=0.1)
    fitting = [cut for cut in model.grid(DROPS) if 0.9 * goal.budget <= model.cost.total(cut) <= goal.budget]
    best = min(map(model.one, fitting))
    assert choice.within
    assert choice.loss == pytest.approx(best) == pytest.approx(model.one(choice.cut))
    assert choice.cut in fitting and is_uniform(choice.cut, model.structure)
    assert choice.best.cost == model.cost.total(choice.cut)
    prior = sum(model.error(choice.cut, n, kind) for n in range(5) for kind in ("attention", "ffn"))
    assert choice.best.prior == pytest.approx(prior)
    assert all(one.cost <= goal.budget and one.loss == model.one(one.cut) for one in choice.tried)


def test_uniform_tries_the_most_promising_and_every_depth():
    model = Model(num_hidden_layers=5)
    drops = ((), (1,), (1, 3), (1, 2, 3))
    every = model.uniform(model.goal(0.3), drops=drops, tolerance=0.2)
    some = model.uniform(model.goal(0.3), drops=drops, tolerance=0.2, candidates=6, batch=4)
    assert len(some.tried) == 6 < len(every.tried)
    assert [len(call) for call in model.calls[-2:]] == [4, 2]
    depths = {sum(layer is None for layer in one.cut.layers) for one in every.tried}
    assert {sum(layer is None for layer in one.cut.layers) for one in some.tried} == depths
    assert some.tried[0].prior == min(one.prior for one in every.tried)


def test_uniform_leaves_alone_what_is_not_to_be_cut():
    model = Model(num_hidden_layers=4)
    ffn = model.uniform(model.goal(0.7), structures=("ffn",), tolerance=0.2)
    assert ffn.mode == "" and all(layer.heads is None for layer in ffn.cut.layers)
    heads = model.uniform(model.goal(0.9), structures=("heads",), modes=("groups",), tolerance=0.2)
    assert heads.mode == "groups" and all(layer.channels is None for layer in heads.cut.layers)
    layers = model.uniform(model.goal(0.8), structures=(), drops=((), (2,)), tolerance=0.3)
    assert layers.cut == Cut((LayerCut(), LayerCut(), None, LayerCut()))


def test_uniform_says_when_sizes_are_too_coarse():
    model = Model()
    choice = model.uniform(model.goal(0.8), structures=("heads",), tolerance=0.001)
    assert not choice.within
    assert choice.best.cost == max(
        model.cost.total(cut) for cut in model.grid(widths=(48,)) if model.cost.total(cut) <= model.goal(0.8).budget
    )  # fmt: skip


def test_uniform_refuses_before_any_work_what_cannot_be_reached():
    model = Model()
    with pytest.raises(UsageError, match="E264") as caught:
        model.uniform(model.goal(0.01))
    smallest = min(model.cost.total(cut) for cut in model.grid())
    assert f"at least {smallest:,.0f} parameters" in caught.value.message
    model.uniform(Goal("params", smallest, model.cost))
    with pytest.raises(UsageError, match="asks for nothing"):
        model.uniform(model.goal(1.0))
    assert len(model.calls) == 1


def test_uniform_only_takes_what_can_be_written():
    model = Model(num_hidden_layers=4)
    goal = model.goal(0.6)

    def even(cut):
        return all(shape.heads % 4 == 0 for shape in shapes(cut, model.structure))

    choice = model.uniform(goal, tolerance=0.3, allowed=even)
    assert choice.tried and all(even(one.cut) for one in choice.tried)
    with pytest.raises(UsageError, match="E271"):
        model.uniform(goal, tolerance=0.3, allowed=lambda cut: False)


def test_uniform_needs_equal_layers_only_where_they_are_cut():
    model = Model()
    f = model.structure.ffn[1]
    structure = type(model.structure)(
        "llama", model.structure.prefix, model.structure.attention,
        (model.structure.ffn[0], type(f)(1, 24, f.output, f.inputs, f.own), model.structure.ffn[2]), model.structure.hidden,
    )  # fmt: skip
    cost = SizeCost(model.checkpoint, structure)
    goal = Goal("params", 0.9 * cost.dense, cost)
    with pytest.raises(UsageError, match="E270"):
        choose_uniform(model.ranking, structure, goal, model.losses)
    choice = choose_uniform(
        model.ranking, structure, goal, lambda cuts: [1.0] * len(cuts), structures=("heads",)
    )
    assert choice.cut.layers[1].channels is None


def test_uniform_deadline(monkeypatch):
    model = Model(num_hidden_layers=5)
    now = [0.0]
    monkeypatch.setattr(uniform.Clock.__init__, "__defaults__", (lambda: now[0],))

    def slow(cuts):
        now[0] += 10
        return model.losses(cuts)

    def choose(deadline):
        return choose_uniform(
            model.ranking, model.structure, model.goal(0.5), slow, drops=DROPS, round_to=8, tolerance=0.3,
            batch=2, deadline=deadline,
        )  # fmt: skip

    assert (choose(25.0).stopped, len(choose(25.0).tried)) == ("deadline", 4)
    assert (choose(1.0).stopped, len(choose(1.0).tried)) == ("deadline", 2)
    assert choose(None).stopped == "converged"


def test_no_finite_loss_is_an_error():
    model = Model()
    with pytest.raises(InputError, match="E339"):
        choose_uniform(
            model.ranking, model.structure, model.goal(0.6), lambda c: [math.nan] * len(c), round_to=8
        )
    with pytest.raises(InputError, match="E339"):
        choose_per_layer(
            model.ranking, model.structure, model.goal(0.6), lambda c: [math.inf] * len(c), round_to=8
        )


# ---- per layer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_per_layer_never_loses_to_uniform_or_to_the_plain_program(seed):
    model = Model(seed=seed, num_hidden_layers=6, neighbours=0.5)
    goal = model.goal(0.5)
    floor = model.uniform(goal, tolerance=0.2)
    plain = model.per_layer(goal, candidates=0, local=0)
    choice = model.per_layer(goal, floors=[floor], local=32)
    assert choice.loss <= min(plain.loss, floor.loss) and choice.loss < floor.loss
    assert choice.loss == pytest.approx(model.one(choice.cut))
    assert choice.best.cost == model.cost.total(choice.cut) <= goal.budget
    assert all(one.cost <= goal.budget for one in choice.tried)
    assert {one.name for one in plain.tried} == {"groups plain", "heads plain"}


def test_a_floor_that_is_better_is_kept():
    model = Model(num_hidden_layers=4)
    goal = model.goal(0.6)
    floor = model.uniform(goal, tolerance=0.2)
    liar = type(floor)(
        type(floor.best)(floor.cut, 0.0, 1.0, floor.best.cost, "uniform"), "heads", (), "", True
    )
    choice = model.per_layer(goal, floors=[liar], local=0)
    assert choice.cut == floor.cut and choice.loss == 0.0 and choice.mode == "heads"
    assert choice.coefficients is None and len(choice.tried) > 1


def test_per_layer_modes_are_never_mixed():
    model = Model(num_hidden_layers=5, spread=0.0)
    choice = model.per_layer(model.goal(0.45), local=16)
    modes = set()
    for one in choice.tried:
        kinds = set()
        for shape in shapes(one.cut, model.structure):
            if shape.heads not in (0, 6):
                kinds.add("heads" if shape.groups == 3 else "groups")
        assert len(kinds) <= 1
        modes |= kinds
    assert choice.mode in ("groups", "heads") and modes == {"groups", "heads"}  # both were looked at


def test_per_layer_protects_layers_and_keeps_parts_when_told():
    model = Model(num_hidden_layers=4)
    choice = model.per_layer(model.goal(0.7), protect=(0, 3), local=8)
    assert all(one.cut.layers[n] == LayerCut() for one in choice.tried for n in (0, 3))
    choice = model.per_layer(model.goal(0.5), whole_modules=False, local=8)
    assert all(s.heads and s.ffn for one in choice.tried for s in shapes(one.cut, model.structure))
    choice = model.per_layer(model.goal(0.6), structures=("ffn",), local=8)
    assert choice.mode == "" and all(layer is None or layer.heads is None for layer in choice.cut.layers)
    with pytest.raises(UsageError, match="E264"):
        model.per_layer(model.goal(0.1), protect=(0, 3))


def test_a_layer_without_attention_and_ffn_is_dropped_but_never_the_last_one():
    model = Model(num_hidden_layers=3)
    smallest = Goal("params", model.cost.rest, model.cost)
    choice = model.per_layer(smallest, local=0)
    assert choice.cut == Cut((LayerCut((), ()), None, None))
    assert choice.best.cost == model.cost.rest


def test_per_layer_is_the_same_for_the_same_seed():
    model = Model(num_hidden_layers=6, neighbours=0.3)
    runs = [model.per_layer(model.goal(0.5), seed=seed, local=24) for seed in (3, 3, 4)]
    assert runs[0].tried == runs[1].tried != runs[2].tried


def test_per_layer_by_time():
    class Table:
        def attention_seconds(self, heads, groups):
            return 0.5 * (heads > 0) + 0.1 * heads  # a launch costs, whatever its size

        def ffn_seconds(self, width):
            return 0.02 * width

        def parts(self, shapes):
            return 0.0, 0.0, 1.0

    model = Model(num_hidden_layers=5)
    cost = TimeCost(Table(), model.structure)
    goal = Goal("speedup", 1.7, cost)
    floor = model.uniform(goal)
    choice = model.per_layer(goal, floors=[floor], local=32)
    assert cost.dense / cost.total(choice.cut) >= 1.7 and choice.loss <= floor.loss
    assert goal.show(choice.best.cost).startswith("1.7")
    with pytest.raises(UsageError, match=r"at most 2\.\d\dx"):
        model.uniform(Goal("speedup", 9.0, cost))
