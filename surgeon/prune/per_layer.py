"""The best cut whose layers may differ: a level for every attention and every FFN, by the coefficient search."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

from surgeon.prune.choice import Choice, Losses, Rankings, Tried, finite_best
from surgeon.prune.goal import Goal
from surgeon.prune.levels import ModuleLevels, RoundTo, levels_of, useful_modes
from surgeon.search import spdy
from surgeon.search.knapsack import solve
from surgeon.search.trials import Clock, Found
from surgeon.structure.cut import Cut, LayerCut
from surgeon.structure.parts import Structure


def choose_per_layer(
    ranking: Rankings,
    structure: Structure,
    goal: Goal,
    losses: Losses,
    *,
    structures: Collection[str] = ("heads", "ffn"),
    modes: Sequence[str] | None = None,
    protect: Collection[int] = (),
    whole_modules: bool = True,
    floors: Sequence[Choice] = (),
    seed: int = 0,
    starts: int = 100,
    candidates: int = 32,
    local: int = 64,
    batch: int = 8,
    round_to: RoundTo = "auto",
    deadline: float | None = None,
) -> Choice:
    """Return the cut of least true loss that a coefficient search finds within the budget.

    The plain dynamic program of every attention mode is evaluated first; the search goes on in the better
    mode. The result is never worse than any of them, nor than ``floors``.

    Args:
        ranking, structure, goal, losses: as in `surgeon.prune.uniform.choose_uniform`.
        structures: which may be cut: "heads", "ffn".
        modes: attention modes to compare, never mixed in one model; None takes those that make a difference.
        protect: layers that stay whole.
        whole_modules: whether an attention or an FFN may go altogether. A layer without both is dropped.
        floors: choices already made with the same losses, such as the best uniform one.
        seed, starts, candidates, local, batch, deadline: as in `surgeon.search.spdy.search`. With
            ``candidates`` and ``local`` 0 it is the plain dynamic program.
        round_to: granularity of FFN widths.

    Raises:
        UsageError: E264 the goal cannot be reached.
        InputError: E339 no cut that was tried has a finite loss.
    """
    memo = _Memo(losses)
    clock = Clock(deadline)
    options = (
        dict.fromkeys(useful_modes(structure) if modes is None else modes) if "heads" in structures else {}
    )
    problems = [
        _Problem.of(ranking, structure, goal, mode, frozenset(structures), frozenset(protect), whole_modules, round_to)
        for mode in options or ("",)
    ]  # fmt: skip
    goal.check(min(problem.least for problem in problems))
    problems = [problem for problem in problems if problem.least <= goal.budget]
    plain = [problem.plain() for problem in problems]
    scores = memo([problem.cut(levels) for problem, levels in zip(problems, plain, strict=True)])
    problem = problems[int(np.argmin([s if np.isfinite(s) else np.inf for s in scores]))]
    left = None if deadline is None else max(0.0, deadline - clock.elapsed)
    found = spdy.search(
        problem.errors, problem.times, problem.budget, lambda batch: memo([problem.cut(levels) for levels in batch]),
        seed=seed, starts=starts, candidates=candidates, local=local, batch=batch, deadline=left,
    )  # fmt: skip
    assert found is not None  # the plain program has a solution
    others = [
        (one.mode, one.tried(levels, score, "plain"))
        for one, levels, score in zip(problems, plain, scores, strict=True)
        if one is not problem
    ]
    return _choice(problem, found, others, floors)


def _choice(
    problem: _Problem, found: Found, others: list[tuple[str, Tried]], floors: Sequence[Choice]
) -> Choice:
    """Return the best of the search, of the other modes' plain programs, and of the floors."""
    own = [problem.tried(trial.levels, trial.loss, trial.source) for trial in found.history]
    everything = [*own, *(one for _, one in others), *(floor.best for floor in floors)]
    best = finite_best(everything)
    for floor in floors:
        if best is floor.best:
            return replace(floor, tried=tuple(everything), stopped=found.stopped)
    for mode, one in others:
        if best is one:
            return Choice(best, mode, tuple(everything), found.stopped, True)
    return Choice(best, problem.mode, tuple(everything), found.stopped, True, found.coefficients)


class _Memo:
    """True losses of cuts, each computed once."""

    def __init__(self, losses: Losses) -> None:
        self._losses = losses
        self._known: dict[Cut, float] = {}

    def __call__(self, cuts: Sequence[Cut]) -> list[float]:
        fresh = [cut for cut in dict.fromkeys(cuts) if cut not in self._known]
        if fresh:
            self._known.update(zip(fresh, map(float, self._losses(fresh)), strict=True))
        return [self._known[cut] for cut in cuts]


@dataclass(frozen=True)
class _Module:
    """One attention or FFN that may be cut."""

    layer: int
    levels: ModuleLevels


class _Problem:
    """The levels of a model's modules with their errors and times, in one attention mode."""

    def __init__(
        self, ranking: Rankings, structure: Structure, goal: Goal, mode: str, modules: Sequence[_Module]
    ) -> None:
        self.mode = mode
        self._ranking = ranking
        self._structure = structure
        self._goal = goal
        self._modules = modules
        cost = goal.cost
        self.errors = [
            np.array([self._of(module).error(count) for count in module.levels.counts]) for module in modules
        ]
        self.times = [
            np.array(
                [
                    cost.module(module.layer, module.levels.kind, module.levels.shape(count))
                    for count in module.levels.counts
                ]
            )
            for module in modules
        ]
        fixed = cost.dense - sum(float(times[0]) for times in self.times)
        self.budget = goal.budget - fixed
        self.least = fixed + sum(float(times.min()) for times in self.times)

    @classmethod
    def of(
        cls, ranking: Rankings, structure: Structure, goal: Goal, mode: str, structures: frozenset[str],
        protect: frozenset[int], whole_modules: bool, round_to: RoundTo,
    ) -> _Problem:  # fmt: skip
        modules: list[_Module] = []
        for layer in range(structure.layers):
            for name, kind, units in (("heads", "attention", mode), ("ffn", "ffn", "channels")):
                if name not in structures or layer in protect:
                    continue
                levels = levels_of(structure, layer, kind, units, round_to)
                if levels is not None:
                    modules.append(_Module(layer, levels if whole_modules else levels.without_zero()))
        return cls(ranking, structure, goal, mode, modules)

    def _of(self, module: _Module):
        return self._ranking(module.layer, module.levels.kind, module.levels.mode)

    def plain(self) -> tuple[int, ...]:
        levels = solve(self.errors, self.times, self.budget)
        assert levels is not None  # the goal was checked
        return tuple(levels)

    def cut(self, levels: Sequence[int]) -> Cut:
        """Return the cut of an assignment; a layer left without attention and FFN is dropped."""
        chosen: dict[tuple[int, str], tuple[int, ...]] = {}
        for module, level in zip(self._modules, levels, strict=True):
            if level:
                chosen[module.layer, module.levels.kind] = self._of(module).kept(module.levels.counts[level])
        layers: list[LayerCut | None] = []
        for layer in range(self._structure.layers):
            heads, channels = chosen.get((layer, "attention")), chosen.get((layer, "ffn"))
            present = [
                kept
                for kept, part in (
                    (heads, self._structure.attention[layer]),
                    (channels, self._structure.ffn[layer]),
                )
                if part is not None
            ]
            layers.append(None if present == [(), ()] else LayerCut(heads, channels))
        if all(layer is None for layer in layers):
            layers[0] = LayerCut((), ())  # a model has at least one layer
        return Cut(tuple(layers))

    def tried(self, levels: Sequence[int], loss: float, source: str) -> Tried:
        cut = self.cut(levels)
        prior = sum(float(error[level]) for error, level in zip(self.errors, levels, strict=True))
        return Tried(cut, loss, prior, self._goal.cost.total(cut), f"{self.mode} {source}".strip())
