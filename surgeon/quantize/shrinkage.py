"""Hessians from few tokens, drawn to their diagonal.

With fewer tokens than inputs GPTQ fits the tokens it has seen and is worse than rounding to nearest on others.
H_k = (1 - k) H + k diag(H) goes from GPTQ (k = 0) to rounding to nearest (k = 1: inputs are tied to none). k is chosen
on samples held out, for all matrices with the same inputs together; k = 1 is always tried, so what was chosen is
never worse there than rounding to nearest on the same grid. The others are tried from the closed form below on, towards
smaller errors, until they rise: errors fall towards one k and rise behind it, but for chance. The codes are then made with
all tokens.
Where nothing can be held out, k = (in / (tokens + in))^2. Tokens are counted as `surgeon.quantize.moments` does.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from torch import Tensor

from surgeon.formats.scheme import Codes, Scheme
from surgeon.quantize import rtn
from surgeon.quantize.factor import Drawn, Factor, Order, factorise
from surgeon.quantize.gptq import (
    Job,
    Record,
    Rounded,
    finished,
    prepared,
    rounded_together,
)
from surgeon.quantize.grids import clips, grid, group_of, round_to_grid, working
from surgeon.quantize.moments import Moments
from surgeon.quantize.output_error import energy, error

T = TypeVar("T")

MENU = (0.0, 0.05, 0.2, 0.5, 0.8, 1.0)
ENOUGH = 4
"""Effective tokens for each input from which the Hessian is taken as it is."""

FEW = 8
"""Effective tokens held out below which chance decides among k: none under the closed form is tried then."""


@dataclass(frozen=True)
class Choice:
    """How far a Hessian is drawn to its diagonal.

    Attributes:
        k: 0 not at all, 1 all the way.
        how: "enough tokens", "hold-out", "closed form" or "no tokens".
        count: effective number of tokens, all samples.
        errors: for each k that was tried, ascending, sum over the matrices of tr((Q - W) H (Q - W)') on the samples held out.
    """

    k: float
    how: Literal["enough tokens", "hold-out", "closed form", "no tokens"]
    count: float
    errors: dict[float, float]


def closed_form(inputs: int, count: float) -> float:
    """Return k from the number of inputs and the effective number of tokens: 1 for none, 0 for very many."""
    return (inputs / (count + inputs)) ** 2


Task = Generator[list[Job], list[Rounded], T]
"""Work that from time to time wants matrices rounded, and gets what became of them."""


def together(tasks: Sequence[Task[T]]) -> list[T]:
    """Do tasks side by side; what they want rounded at the same time is rounded together (`rounded_together`)."""
    results: dict[int, T] = {}
    waiting: dict[int, list[Job]] = {}

    def step(place: int, made: list[Rounded] | None) -> None:
        try:
            waiting[place] = next(tasks[place]) if made is None else tasks[place].send(made)
        except StopIteration as end:
            results[place] = end.value

    for place in range(len(tasks)):
        step(place, None)
    while waiting:
        asked = {place: len(jobs) for place, jobs in waiting.items()}
        jobs = [job for own in waiting.values() for job in own]
        waiting.clear()
        made = rounded_together(jobs)
        jobs.clear()  # the weights in them are not needed any more
        for place, count in asked.items():
            step(place, [made.pop(0) for _ in range(count)])
    return [results[place] for place in range(len(tasks))]


@dataclass(frozen=True)
class How:
    """How matrices are rounded, as of `surgeon.quantize.gptq.quantize`."""

    scheme: Scheme
    scale_dtype: str
    order: Order = "static-act"
    damp: float = 0.01
    block: int = 128
    clip: bool | None = None
    module: str = "the matrix"


def choose(
    weights: Sequence[Tensor], train: Moments, held: Moments, scheme: Scheme, *, menu: Sequence[float] = MENU, **how: Any
) -> Choice:  # fmt: skip
    """Return how far to draw the Hessian of matrices that share their inputs to its diagonal.

    Args:
        weights: matrices [out, in].
        train: sums over three quarters of the samples.
        held: sums over the others (`surgeon.quantize.moments.held_out`).
        menu: values of k to try; where few tokens are held out (`FEW`), those from the closed form on, and it.
        scheme: what they are rounded to.
        how: other fields of `How`.
    """
    return together([choosing(weights, train, held, How(scheme, **how), menu)])[0]


def choosing(
    weights: Sequence[Tensor], train: Moments, held: Moments, how: How, menu: Sequence[float] = MENU
) -> Task[Choice]:
    """Do what `choose` does, as a task."""
    inputs = len(train.hessian)
    count = _count(train, held)
    if count == 0:
        return Choice(1.0, "no tokens", 0.0, {})
    if count >= ENOUGH * inputs:
        return Choice(0.0, "enough tokens", count, {})
    if not train.hessian.diagonal().any() or not held.hessian.diagonal().any():
        return Choice(closed_form(inputs, count), "closed form", count, {})
    least = closed_form(inputs, count)
    tried = list(menu) if held.count >= FEW else sorted({least, *(k for k in menu if k >= least)})
    search = _Search(weights, train, held, how)
    errors: dict[float, float] = {}
    start = min(range(len(tried)), key=lambda place: abs(tried[place] - least))
    for place in _downhill(tried, start, errors):
        errors[tried[place]] = yield from search.error(tried[place])
    return Choice(min(errors, key=lambda k: (errors[k], -k)), "hold-out", count, dict(sorted(errors.items())))


def _downhill(tried: Sequence[float], start: int, errors: Mapping[float, float]) -> Iterator[int]:
    """Yield places in a menu whose errors are wanted: the last, which costs next to nothing, a first guess, its neighbours,
    and on towards the smaller error until it rises."""
    last = len(tried) - 1
    yield last
    place = min(start, last - 1)
    if place < 0:
        return
    yield place
    for step in (-1, 1):
        here = place
        while 0 <= here + step <= last:
            if tried[here + step] not in errors:
                yield here + step
            if errors[tried[here + step]] >= errors[tried[here]]:
                break
            here += step
        if here != place:
            return


def _count(train: Moments, held: Moments) -> float:
    """Return the effective number of tokens of both."""
    squares, fourths = train.squares + held.squares, train.fourths + held.fourths
    return squares**2 / fourths if fourths else 0.0


class _Search:
    """Errors on the samples held out, of codes made with the others."""

    def __init__(self, weights: Sequence[Tensor], train: Moments, held: Moments, how: How) -> None:
        self._how, self._held = how, held.hessian
        dead = (train.hessian.diagonal() + held.hessian.diagonal()) == 0
        self._group = group_of(len(dead), how.scheme, how.module)
        self._live = [working(weight, how.module) for weight in weights]
        if bool(dead.any()):
            self._live = [weight.masked_fill(dead, 0) for weight in self._live]
        # The grid is the same for every k: rounding to nearest differs from the others in nothing else.
        self._grids = [
            grid(weight, how.scheme, clip=clips(how.scheme, how.clip), scale_dtype=how.scale_dtype, module=how.module)
            for weight in self._live
        ]  # fmt: skip
        self._drawn = Drawn(
            train.hessian, order=how.order, group=self._group, damp=how.damp, dead=dead, module=how.module
        )

    def error(self, k: float) -> Task[float]:
        """Return the error for one k."""
        how = self._how
        if k == 1:
            found = [
                round_to_grid(w, *made, how.scheme) for w, made in zip(self._live, self._grids, strict=True)
            ]
            return sum(
                error(codes, weight, self._held) for codes, weight in zip(found, self._live, strict=True)
            )
        made = yield from _coded(self._live, self._drawn.factor(k), how, self._grids)
        return sum(
            error(codes, weight, self._held) for (codes, _), weight in zip(made, self._live, strict=True)
        )


def _coded(
    weights: Sequence[Tensor], factor: Factor, how: How, given: Sequence[tuple[Tensor, Tensor]] | None = None,
    totals: Sequence[float] | None = None,
) -> Task[list[tuple[Codes, Record]]]:  # fmt: skip
    """Round matrices that share a factor, on grids of their own or on those that are given."""
    about: dict[str, Any] = {"scale_dtype": how.scale_dtype, "clip": how.clip, "module": how.module}
    jobs, grids = [], []
    for place, weight in enumerate(weights):
        own = None if given is None else given[place]
        job, found = prepared(weight, factor, how.scheme, block=how.block, given=own, **about)
        grids.append(found)
        jobs += [] if job is None else [job]
    made = (yield jobs) if jobs else [None] * len(weights)
    jobs.clear()
    return [
        finished(done, found, weight, factor, how.scheme, given=given is not None, **about,
                 total=math.nan if totals is None else totals[place])
        for place, (done, found, weight) in enumerate(zip(made, grids, weights, strict=True))
    ]  # fmt: skip


def quantize(
    weights: Sequence[Tensor], train: Moments, held: Moments, scheme: Scheme, *, errors: bool = True, **how: Any
) -> tuple[list[tuple[Codes, Record]], Choice]:  # fmt: skip
    """Choose k, then quantize all matrices with all tokens; arguments as of `choose`.

    Without a token all are rounded to nearest. Errors are on the Hessian of all tokens as it is, not as it was drawn.

    Args:
        errors: put errors into proportion, which takes about as long as the rounding.
    """
    return together([quantizing(weights, train, held, How(scheme, **how), errors=errors)])[0]


def quantizing(
    weights: Sequence[Tensor], train: Moments, held: Moments, how: How, *, errors: bool = False
) -> Task[tuple[list[tuple[Codes, Record]], Choice]]:
    """Do what `quantize` does, as a task."""
    choice = yield from choosing(weights, train, held, how)
    return (yield from coding(weights, train.merged(held).hessian, choice, how, errors=errors)), choice


def coding(
    weights: Sequence[Tensor], whole: Tensor, choice: Choice, how: How, *, errors: bool = False
) -> Task[list[tuple[Codes, Record]]]:
    """Quantize matrices with the Hessian of all tokens, drawn as was chosen."""
    scheme, module = how.scheme, how.module
    if choice.how == "no tokens":
        clipped = clips(scheme, how.clip)
        record = Record(
            "rtn",
            how.order,
            how.damp,
            False,
            0,
            clipped,
            math.nan,
            math.nan,
            math.nan,
            "no token reached it",
            1.0,
        )
        return [
            (rtn.quantize(weight, scheme, scale_dtype=how.scale_dtype, clip=how.clip, module=module), record)
            for weight in weights
        ]
    group = group_of(len(whole), scheme, module)
    factor = factorise(whole, order=how.order, group=group, damp=how.damp, k=choice.k, module=module)
    totals = [energy(working(weight, module), whole) for weight in weights] if errors else None
    return (yield from _coded(weights, factor, how, totals=totals))
