"""Structured SPDY: which level each module gets, by a dynamic program whose module weights are searched for.

The error of a level is relative to its own module, so errors of two modules are not comparable. Each module
m gets a coefficient c_m in [0, 1]; for given coefficients the knapsack over c_m * error is solved exactly; the
coefficients are searched for by the true loss of the assembled model. First random ones; then those that explain
the losses found so far best, and changes of a few around the best, fewer and fewer.

Sources: SPDY (arXiv 2201.13096, section 3.3); ZipLM (arXiv 2302.04089) for structures and errors. What a true
loss costs decides the budget here: of the random proposals those of the least summed error are evaluated,
several in one pass, and each assignment once. The fit is ours: of 64 modules whose weights were drawn it came
within 0.46 of the plain program's loss, without it 0.67, both after 97 evaluations (the optimum: 0.33).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from surgeon.search.knapsack import solve
from surgeon.search.trials import Clock, Evaluate, Found, Levels, Trials
from surgeon.seeds import stream_key, uniform

CHANGED = 0.1
"""Share of the coefficients that the local search begins to draw anew."""

FEWEST = 3
"""At least so many of them: in a small model single ones lead nowhere."""

RIDGES = (0.1, 1.0)
"""Strengths of the ridge in `_Program.fitted`, relative to the mean of the diagonal."""


def search(
    errors: Sequence[np.ndarray],
    times: Sequence[np.ndarray],
    budget: float,
    evaluate: Evaluate,
    *,
    seed: int = 0,
    starts: int = 100,
    candidates: int = 32,
    batch: int = 8,
    local: int = 64,
    patience: int = 100,
    floors: Sequence[Sequence[int]] = (),
    deadline: float | None = None,
    buckets: int = 10_000,
) -> Found | None:
    """Return the assignment of least true loss found, or None when the budget cannot be met.

    The plain solution (all coefficients 1) and every floor are always evaluated, and the best of all is
    returned: a search never loses to them. Equal arguments give equal results, unless the deadline stops it.

    Args:
        errors: for each module, the error of each of its levels (relative, 0 unpruned, 1 removed).
        times: for each module, the time of each of its levels.
        budget: what the times may add up to.
        evaluate: true losses of several assignments.
        seed: of the random coefficients.
        starts: random proposals; one costs a knapsack, not an evaluation.
        candidates: how many of them are evaluated at most, those with the least summed error.
        batch: proposals evaluated in one call.
        local: evaluations of the local search at most; 0 leaves it out.
        patience: proposals without success before fewer coefficients are changed at a time.
        floors: assignments to be at least as good as; that they fit is the caller's business.
        deadline: seconds; no batch is begun that would probably end later.
        buckets: see `surgeon.search.knapsack.solve`.
    """
    errors = [np.asarray(error, dtype=np.float64) for error in errors]
    program = _Program(errors, times, budget, buckets)
    plain = program.solve(np.ones(len(errors)))
    if plain is None:
        return None
    drawn = [uniform(stream_key(seed, start, "spdy start"), 0, len(errors)) for start in range(starts)]
    given = [(tuple(int(level) for level in floor), "floor") for floor in floors]
    known = {levels for levels, _ in given} | {plain}
    proposals: dict[Levels, np.ndarray] = {}
    for coefficients in drawn:
        levels = program.solve(coefficients)
        if levels is not None and levels not in known:
            proposals.setdefault(levels, coefficients)
    chosen = sorted(proposals, key=lambda levels: (program.prior(levels), levels))[:candidates]
    trials = Trials(evaluate, len(known) + len(chosen) + local, Clock(deadline), batch)
    trials.run([*given, (plain, "plain")], always=True)
    trials.run([(levels, "random") for levels in chosen])
    proposals[plain] = np.ones(len(errors))
    if trials.left > 0:
        _refine(program, trials, proposals, seed, patience)
    assert trials.best is not None
    return trials.found(proposals.get(trials.best.levels))


def _refine(
    program: _Program, trials: Trials, proposals: dict[Levels, np.ndarray], seed: int, patience: int
) -> None:
    """Propose fitted coefficients, and changes of a few coefficients of the best; fewer after a run of failures.

    Of everything in ``proposals`` the best evaluated one is where it starts, even when a floor is better: a
    floor has no coefficients.
    """
    known = {levels: trials.losses[levels] for levels in proposals if levels in trials.losses}
    current = min(known, key=lambda levels: (known[levels], levels))
    center, loss = proposals[current], known[current]
    draw = 0
    for changed in range(max(round(CHANGED * len(center)), min(FEWEST, len(center))), 0, -1):
        failures = 0
        while failures < patience:
            fresh: dict[Levels, np.ndarray] = {}
            for coefficients in program.fitted(trials.losses):
                _propose(program, trials, fresh, coefficients)
            sources = dict.fromkeys(fresh, "fitted")
            while len(fresh) < trials.batch and failures < patience:
                _propose(
                    program, trials, fresh, _resampled(center, changed, stream_key(seed, draw, "spdy change"))
                )
                draw += 1
                failures += 1
            trials.run([(levels, sources.get(levels, "local")) for levels in fresh])
            proposals.update(fresh)
            better = [levels for levels in fresh if trials.losses.get(levels, np.inf) < loss]
            if better:
                current = min(better, key=lambda levels: (trials.losses[levels], levels))
                center, loss, failures = fresh[current], trials.losses[current], 0
            if trials.left <= 0:
                trials.stopped = trials.stopped or "evaluations"
                return


def _propose(
    program: _Program, trials: Trials, fresh: dict[Levels, np.ndarray], coefficients: np.ndarray
) -> None:
    """Add the assignment of some coefficients to ``fresh`` unless its loss is known."""
    levels = program.solve(coefficients)
    if levels is not None and levels not in trials.losses:
        fresh.setdefault(levels, coefficients)


def _resampled(center: np.ndarray, changed: int, key: int) -> np.ndarray:
    """Return coefficients with ``changed`` of them, chosen at random, drawn anew."""
    numbers = uniform(key, 0, 2 * len(center))
    places = np.argsort(numbers[: len(center)], kind="stable")[:changed]
    fresh = center.copy()
    fresh[places] = numbers[len(center) :][places]
    return fresh


class _Program:
    """The knapsack of one search for any coefficients."""

    def __init__(
        self, errors: Sequence[np.ndarray], times: Sequence[np.ndarray], budget: float, buckets: int
    ) -> None:
        self._errors = errors
        self._times = times
        self._budget = budget
        self._buckets = buckets

    def solve(self, coefficients: np.ndarray) -> Levels | None:
        weighted = [c * error for c, error in zip(coefficients, self._errors, strict=True)]
        levels = solve(weighted, self._times, self._budget, self._buckets)
        return None if levels is None else tuple(levels)

    def fitted(self, losses: Mapping[Levels, float]) -> Iterator[np.ndarray]:
        """Yield coefficients under which the summed errors best explain the true losses found so far.

        Least squares of relative deviations, drawn to equal coefficients by a ridge of several strengths: at
        first there are fewer losses than modules.
        """
        known = [(levels, loss) for levels, loss in losses.items() if np.isfinite(loss) and loss > 0]
        if len(known) < 2:
            return
        table = np.array(
            [[error[level] for error, level in zip(self._errors, levels, strict=True)] for levels, _ in known]
        )
        table /= np.array([loss for _, loss in known])[:, None]
        mean = table.sum(axis=1)
        scale = float(mean.sum() / (mean @ mean)) if mean.any() else 0.0
        if scale <= 0:
            return
        gram, missing = table.T @ table, table.T @ (1 - scale * mean)
        size = float(np.trace(gram)) / len(gram)
        for ridge in RIDGES:
            found = scale + np.linalg.solve(gram + ridge * size * np.eye(len(gram)), missing)
            found = np.clip(found, 1e-3 * scale, None)
            yield found / found.max()

    def prior(self, levels: Levels) -> float:
        """Return the summed errors of an assignment."""
        return float(sum(error[level] for error, level in zip(self._errors, levels, strict=True)))
