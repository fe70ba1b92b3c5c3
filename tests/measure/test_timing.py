"""Paired timing with times that are made up: order, ratios, intervals, when it stops."""

from __future__ import annotations

import math
import threading

import numpy as np
import pytest

from surgeon.errors import Interrupted, UsageError
from surgeon.measure import timing
from surgeon.measure.timing import LEAST, MOST, Estimate, median, paired
from surgeon.measure.workload import STEPS, Workload


class Machine:
    """Programs of known cost on a machine whose speed changes between rounds; running one lets time pass."""

    def __init__(self, costs: dict[str, float], noise: float = 0.0, seed: int = 0) -> None:
        self.costs, self.noise, self.rng = costs, noise, np.random.default_rng(seed)
        self.time = 0.0
        self.log: list[str] = []
        self.counts = dict.fromkeys(costs, 0)

    def now(self) -> float:
        return self.time

    def samples(self):
        return {name: lambda name=name: self.run(name) for name in self.costs}

    def run(self, name: str) -> float:
        round = self.counts[name]
        self.counts[name] += 1
        self.log.append(name)
        speed = 1.0 + 0.9 * math.sin(round)  # the same for all of one round
        seconds = self.costs[name] * speed * float(np.exp(self.noise * self.rng.standard_normal()))
        self.time += seconds
        return seconds


def test_ratios_are_exact_however_the_machine_drifts():
    machine = Machine({"dense": 3.0, "half": 1.5, "third": 1.0})
    found = paired(machine.samples(), "dense", precision=0.01, time_limit=1e9, now=machine.now)
    assert found.ratios["half"].value == pytest.approx(0.5, rel=1e-12)
    assert found.ratios["third"].low == pytest.approx(1 / 3) == found.ratios["third"].high
    assert found.measurable("half") and found.ratios["half"].count == LEAST
    assert np.ptp(found.seconds["dense"]) > 1  # while single times were all over the place


def test_rounds_run_everything_once_in_random_order():
    machine = Machine(dict.fromkeys("abcd", 1.0))
    paired(machine.samples(), "a", precision=0.01, time_limit=1e9, repeat=40, warm_up=0)
    rounds = [tuple(machine.log[i : i + 4]) for i in range(0, 160, 4)]
    assert all(sorted(r) == list("abcd") for r in rounds)
    assert len(set(rounds)) > 15
    again = Machine(dict.fromkeys("abcd", 1.0))
    paired(again.samples(), "a", precision=0.01, time_limit=1e9, repeat=40, warm_up=0)
    assert again.log == machine.log


def test_warm_up_is_not_counted():
    machine = Machine({"a": 1.0, "b": 1.0})
    found = paired(machine.samples(), "a", precision=0.5, time_limit=1e9, repeat=5, warm_up=3)
    assert len(found.seconds["a"]) == 5 and machine.counts["a"] == 8


def test_more_noise_takes_more_rounds_and_the_settled_rest():
    quiet, loud = (Machine({"a": 1.0, "b": 0.5}, noise) for noise in (0.02, 0.1))
    counts = []
    for machine in (quiet, loud):
        found = paired(machine.samples(), "a", precision=0.02, time_limit=1e9, now=machine.now)
        assert found.measurable("b") and found.ratios["b"].half_width <= 0.02
        assert found.ratios["b"].value == pytest.approx(0.5, rel=0.05)
        counts.append(found.ratios["b"].count)
    assert LEAST <= counts[0] < counts[1] / 3 and counts[1] < MOST

    class Uneven(Machine):
        def run(self, name: str) -> float:
            self.noise = 0.1 if name == "loud" else 0.0
            return super().run(name)

    machine = Uneven({"a": 1.0, "calm": 1.0, "loud": 1.0})
    found = paired(machine.samples(), "a", precision=0.02, time_limit=1e9, now=machine.now)
    assert found.ratios["calm"].count == LEAST < found.ratios["loud"].count == len(found.seconds["a"])


def test_when_time_is_up_it_says_that_it_does_not_know():
    machine = Machine({"a": 1.0, "b": 0.5}, 0.3)
    found = paired(machine.samples(), "a", precision=0.001, time_limit=60, now=machine.now)
    assert not found.measurable("b")
    assert 60 <= machine.time < 70 + 9
    barely = paired(machine.samples(), "a", precision=0.001, time_limit=1e-9, now=machine.now)
    assert barely.ratios["b"].count == LEAST


def test_a_program_alone_is_measured_to_its_own_precision():
    machine = Machine({"a": 2.0})
    machine.run = lambda name: 2.0  # type: ignore[method-assign]
    found = paired({"a": lambda: 2.0}, "a", precision=0.01, time_limit=1e9)
    assert len(found.seconds["a"]) == LEAST and not found.ratios


def test_it_can_be_stopped():
    stop = threading.Event()
    machine = Machine({"a": 1.0, "b": 1.0})
    samples = machine.samples()

    def once() -> float:
        if machine.counts["b"] == 4:
            stop.set()
        return machine.run("b")

    with pytest.raises(Interrupted):
        paired({**samples, "b": once}, "a", precision=0.01, time_limit=1e9, stop=stop)
    assert machine.counts["b"] == 5


@pytest.mark.parametrize("count", [5, 9, 25])
def test_interval_is_the_exact_bootstrap_distribution_of_a_median(count):
    """P(resampled median <= k-th smallest) = P(Binomial(n, k/n) >= (n + 1) / 2), for odd n."""
    values = np.sort(np.random.default_rng(count).lognormal(size=count))

    def below(k: int) -> float:
        p = k / count
        return sum(
            math.comb(count, i) * p**i * (1 - p) ** (count - i) for i in range((count + 1) // 2, count + 1)
        )

    def quantile(q: float) -> float:
        return values[next(k for k in range(1, count + 1) if below(k) >= q) - 1]

    found = median(np.random.default_rng(0).permutation(values), resamples=40_000)
    assert found.value == np.median(values)
    # A quantile that falls within the resampling error of a jump may land on either side of it.
    assert quantile(0.022) <= found.low <= quantile(0.028)
    assert quantile(0.972) <= found.high <= quantile(0.978)


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(3)
    rows = rng.lognormal(0.0, 0.2, size=(400, 25))  # median 1
    inside = [e.low <= 1 <= e.high for e in (median(row, resamples=400) for row in rows)]
    assert 0.91 <= np.mean(inside) <= 0.99


def test_one_value_has_no_interval():
    found = median([2.0])
    assert (found.value, found.low, found.high) == (2.0, 0.0, math.inf)
    assert found.half_width == math.inf
    assert Estimate(2.0, 1.9, 2.1, 9).half_width == pytest.approx(0.05)


def test_few_rounds_never_end_early():
    assert timing.LEAST % 3 == 0  # intervals are looked at after every third round


# ---- workloads ---------------------------------------------------------------------------------------


def test_workload_defaults_and_times():
    mix = Workload.usual(decoder=True)
    assert (mix.mode, mix.batch, mix.context, mix.generate) == ("mix", 1, 512, 128)
    assert mix.seconds(2.0, 0.1) == pytest.approx(2.0 + 12.8)
    assert Workload("decode").seconds(2.0, 0.1) == pytest.approx(12.8)
    assert Workload.usual(decoder=False).mode == "prefill"
    assert Workload("prefill").seconds(2.0, 0.1) == 2.0
    assert Workload.from_document(mix.document()) == mix
    assert Workload.usual(decoder=True, mode="decode", context=7, generate=None) == Workload(
        "decode", 1, 7, 128
    )


@pytest.mark.parametrize("generate", [1, 2, 15, 16, 17, 100, 128, 1000])
def test_timed_steps_stand_for_all_of_them(generate):
    """With a time that is linear in the length, the mean of the timed steps is the mean of all."""
    work = Workload("decode", context=50, generate=generate)
    timed = [work.first_length + i for i in range(work.steps)]
    everything = [work.context + i for i in range(generate)]
    assert work.steps == min(generate, STEPS)
    assert abs(np.mean(timed) - np.mean(everything)) <= 0.5
    assert set(timed) <= set(everything)
    assert (f"{work.steps} steps timed" in work.sentence()) == (generate > STEPS)


@pytest.mark.parametrize(
    "bad", [{"mode": "speed"}, {"batch": 0}, {"context": -1}, {"generate": True}, {"context": 10**9}]
)
def test_impossible_workloads_are_refused(bad):
    with pytest.raises(UsageError) as caught:
        Workload(**bad)
    assert caught.value.code == "E280"


def test_encoders_do_not_generate():
    with pytest.raises(UsageError, match="encoder"):
        Workload.usual(decoder=False, mode="mix")
