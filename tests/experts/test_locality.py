"""SRP and SCH against enumeration, closed forms and caches written as plain lists."""

import numpy as np
import pytest

from surgeon.errors import InputError, UsageError
from surgeon.experts.locality import (
    POLICIES,
    Trace,
    best_rule,
    cache_hits,
    fixed_point,
    random_histogram,
    segment_caching,
    segment_routing,
    window_histograms,
)


def trace_of(*samples, experts):
    """A trace of samples given as lists of tokens, each a list of experts."""
    arrays = [np.asarray(s).reshape(len(s), -1) for s in samples]
    return Trace(np.concatenate(arrays), np.concatenate([[0], np.cumsum([len(a) for a in arrays])]), experts)


def random_trace(seed, experts=6, slots=2, lengths=(40, 25, 9), stickiness=0.7):
    """Choices that resemble the token before, as routers' do."""
    drawn = np.random.default_rng(seed)
    samples = []
    for length in lengths:
        scores, tokens = drawn.normal(size=experts), []
        for _ in range(length):
            scores = stickiness * scores + (1 - stickiness) * drawn.normal(size=experts)
            tokens.append(np.argsort(-scores)[:slots])
        samples.append(tokens)
    return trace_of(*samples, experts=experts)


def enumerated(samples, experts, window, chosen):
    """SRP of some experts by listing every window and every threshold."""
    best = (0.0, 0)
    for threshold in range(1, window + 1):
        both = kept = used = 0
        for sample in samples:
            for start in range(len(sample) - window + 1):
                for expert in chosen:
                    times = sum(expert in list(token) for token in sample[start : start + window])
                    used += times
                    if times >= threshold:
                        both, kept = both + times, kept + window
        if used and 2 * both / (kept + used) >= best[0]:
            best = (2 * both / (kept + used), threshold)
    return best


# ---- SRP ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 2, 3, 5])
@pytest.mark.parametrize(("experts", "slots", "lengths"), [(3, 1, (12,)), (5, 2, (11, 6))])
def test_srp_equals_enumeration(window, experts, slots, lengths):
    trace = random_trace(3, experts, slots, lengths)
    samples = [trace.sample(n).tolist() for n in range(len(lengths))]
    found = segment_routing(trace, window, draws=10)
    value, threshold = enumerated(samples, experts, window, range(experts))
    assert found.best.value == pytest.approx(value, rel=1e-15) and found.best.threshold == threshold
    for expert in range(experts):
        assert found.experts[expert] == pytest.approx(enumerated(samples, experts, window, [expert])[0], rel=1e-15)  # fmt: skip


def test_windows_of_one_token_are_served_perfectly():
    found = segment_routing(random_trace(0), 1)
    assert found.best.value == 1.0 and found.best.size_ratio == 1.0
    assert set(found.experts.tolist()) <= {0.0, 1.0}


def test_constant_and_alternating_routing():
    constant = segment_routing(trace_of([[2]] * 20, experts=4), 8)
    assert (
        constant.best.value == 1.0
        and constant.experts.tolist() == [0, 0, 1, 0]
        and constant.best.threshold == 8
    )
    alternating = segment_routing(trace_of([[0], [1]] * 10, experts=3), 2)
    assert alternating.best.value == 2 / 3 and alternating.best.size_ratio == 2.0
    assert alternating.experts.tolist() == [2 / 3, 2 / 3, 0]


def test_the_fixed_point_is_a_best_threshold():
    drawn = np.random.default_rng(7)
    for window in (4, 8, 16):
        for _ in range(700):
            histogram = drawn.integers(0, 30, window + 1) * (drawn.random(window + 1) < 0.6)
            rule, point = best_rule(histogram), fixed_point(histogram)
            if not rule.threshold:
                assert point == 0
                continue
            times = np.arange(window + 1)
            hits, kept = (histogram * times)[point:].sum(), window * histogram[point:].sum()
            assert 1 <= point <= window
            assert 2 * hits / (kept + (histogram * times).sum()) == pytest.approx(rule.value, rel=1e-14)


def test_windows_stay_within_samples():
    first, second = [[0]] * 5 + [[1]] * 5, [[2]] * 5 + [[0]] * 5
    apart = segment_routing(trace_of(first, second, experts=3), 4)
    joined = segment_routing(trace_of(first + second, experts=3), 4)
    assert apart.best.value != joined.best.value
    twice = segment_routing(trace_of(first, second, first, second, experts=3), 4)
    assert twice.best == apart.best and (twice.experts == apart.experts).all()
    # a single expert change at the border, seen only when samples are glued together
    split = segment_routing(trace_of([[0]] * 6, [[1]] * 6, experts=2), 4)
    assert split.best.value == 1.0 > segment_routing(trace_of([[0]] * 6 + [[1]] * 6, experts=2), 4).best.value


def test_samples_shorter_than_the_window_are_left_out_and_counted():
    trace = random_trace(1, lengths=(30, 5, 12))
    found = segment_routing(trace, 12)
    kept = Trace(np.concatenate([trace.sample(0), trace.sample(2)]), np.array([0, 30, 42]), trace.experts)
    assert (found.samples, found.excluded) == (2, 1) and found.best == segment_routing(kept, 12).best
    with pytest.raises(InputError, match="31") as error:
        segment_routing(trace, 31)
    assert error.value.code == "E438"
    with pytest.raises(UsageError):
        segment_routing(trace, 0)


def test_blocks_and_empty_slots_do_not_change_histograms(monkeypatch):
    index = random_trace(2, lengths=(60,)).index
    whole = window_histograms(index, 6, 7)
    monkeypatch.setattr("surgeon.experts.locality.CELLS", 60)
    assert (window_histograms(index, 6, 7) == whole).all() and whole.sum() == 6 * 54
    padded = np.concatenate([index, np.full((60, 2), 6)], axis=1)
    assert (window_histograms(padded, 6, 7) == whole).all()


def test_random_routing_equals_the_same_choices_in_random_order():
    trace = random_trace(5, experts=8, slots=2, lengths=(4000,), stickiness=0.95)
    found = segment_routing(trace, 8, draws=10)
    shuffled = Trace(np.random.default_rng(0).permutation(trace.index), trace.offsets, 8)
    assert segment_routing(shuffled, 8, draws=10).best.value == pytest.approx(found.random, abs=0.01)
    assert found.best.value > found.random + 0.1  # the trace does have structure


def test_random_histogram_is_binomial():
    from scipy.stats import binom

    shares = np.array([0.0, 0.1, 0.5, 1.0])
    found = random_histogram(shares, 64, 1000)
    np.testing.assert_allclose(found, [1000 * binom.pmf(np.arange(65), 64, p) for p in shares], atol=1e-9)


def test_the_interval_comes_from_samples_and_is_the_same_every_time():
    trace = random_trace(4, lengths=(40,) * 12)
    found = segment_routing(trace, 8)
    assert found.interval is not None and 0 <= found.interval[0] < found.best.value < found.interval[1] <= 1
    assert segment_routing(trace, 8).interval == found.interval
    same = Trace(np.concatenate([trace.sample(0)] * 6), np.arange(7) * 40, trace.experts)
    alike = segment_routing(same, 8)
    assert alike.interval == pytest.approx((alike.best.value, alike.best.value))
    assert segment_routing(trace_of([[0], [1]] * 8, experts=2), 4).interval is None


# ---- SCH -------------------------------------------------------------------------------------------


def listed(sample, experts, size, policy, window, cold):
    """One cache as plain lists: (hits, look-ups)."""
    resident, last, uses = [], {}, {}
    hits = lookups = 0
    for step, token in enumerate(sample):
        token = [e for e in token if e < experts]
        missing = [e for e in token if e not in resident]
        lookups += len(token)
        hits += len(token) - len(missing)
        for expert in missing:
            if len(resident) < size:
                hits += cold == "hit"
            else:
                others = [e for e in resident if e not in token]

                def ahead(e, step=step):
                    return sum(e in t for t in sample[step + 1 : step + 1 + window])

                def nearest(e, step=step):
                    return next((n for n in range(step + 1, len(sample)) if e in sample[n]), len(sample) + 1)

                key = {
                    "sch": lambda e: (ahead(e), last[e], e), "lru": lambda e: (last[e], e),
                    "lfu": lambda e: (uses[e], last[e], e), "belady": lambda e: (-nearest(e), last[e], e),
                }[policy]  # fmt: skip
                resident.remove(min(others, key=key))
            resident.append(expert)
        for expert in token:
            last[expert], uses[expert] = step, uses.get(expert, 0) + 1
    return hits, lookups


@pytest.mark.parametrize("policy", POLICIES)
def test_caches_equal_plain_lists(policy):
    for seed in range(50):
        slots = 1 + seed % 3
        lengths = [(40, 25, 9), (17,), (3, 30)][seed % 3]
        trace = random_trace(seed, experts=7, slots=slots, lengths=lengths, stickiness=(seed % 5) / 5)
        if seed % 4 == 0:
            trace.index[::5, -1] = 7  # an empty slot
        for size in (slots, slots + 1, 5):
            for cold in ("hit", "miss"):
                hits, lookups = cache_hits(trace, size, policy, window=1 + seed % 6, cold=cold)
                expected = [listed(trace.sample(n).tolist(), 7, size, policy, 1 + seed % 6, cold) for n in range(len(lengths))]  # fmt: skip
                assert list(zip(hits.tolist(), lookups.tolist(), strict=True)) == expected, (seed, size, cold)


def test_nothing_beats_belady():
    for seed in range(30):
        trace = random_trace(seed, experts=9, slots=1 + seed % 3, lengths=(40, 31), stickiness=(seed % 4) / 4)
        for size in (3, 4, 6):
            best = cache_hits(trace, size, "belady")[0]
            for policy in ("lru", "lfu", "sch"):
                assert (best >= cache_hits(trace, size, policy, window=5)[0]).all(), (seed, size, policy)


def test_looking_ahead_for_ever_is_not_belady():
    """Counts of uses are not the time of the next use: expert 0 is used often but late, expert 1 once but soon."""
    trace = trace_of([[0], [1], [2], [1], [0], [0], [0]], experts=3)
    assert cache_hits(trace, 2, "belady", window=100, cold="miss")[0] == [3]
    far = trace_of([[1], [0], [2], [1], [2], [1], [0], [0], [0], [0]], experts=3)
    found = {p: int(cache_hits(far, 2, p, window=100, cold="miss")[0][0]) for p in ("belady", "sch")}
    assert found["belady"] > found["sch"]


def test_a_cache_of_all_experts():
    trace = random_trace(6)
    held = cache_hits(trace, 6, "lru", cold="hit")
    assert (held[0] == held[1]).all()
    hits, lookups = cache_hits(trace, 6, "sch", cold="miss")
    for number in range(3):
        distinct = len(np.unique(trace.sample(number)))
        assert hits[number] == lookups[number] - distinct


def test_constant_routing_misses_once():
    hits, lookups = cache_hits(trace_of([[3]] * 10, experts=5), 1, "lru", cold="miss")
    assert hits / lookups == 1 - 1 / 10


def test_rates_are_averaged_over_samples_and_have_an_interval():
    trace = random_trace(8, lengths=(50, 10, 33, 21))
    found = segment_caching(trace, 4, 8)
    hits, lookups = cache_hits(trace, 4, "sch", window=8)
    assert found.rates["sch"] == pytest.approx(np.mean(hits / lookups)) and set(found.rates) == set(POLICIES)
    assert found.interval is not None and found.interval[0] <= found.rates["sch"] <= found.interval[1]
    assert segment_caching(trace, 4, 8) == found
    with pytest.raises(UsageError, match="cannot hold the 2 experts"):
        segment_caching(trace, 1, 8)
