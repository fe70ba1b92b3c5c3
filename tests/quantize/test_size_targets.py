"""A file size, bits per parameter, a measured divergence: never exceeded, and reached with few measurements."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from surgeon.errors import UsageError
from surgeon.quantize.allocation import milp
from surgeon.quantize.allocation.menus import KEPT, Alternative, Menu, Option
from surgeon.quantize.allocation.target_size import for_bits, for_kl, for_size

BITS = {"int2": 2.25, "int3": 3.25, "int4": 4.25, "int8": 8.25, KEPT: 16.0}


def model(seed, groups=12, formats=tuple(BITS), header=90):
    """Menus as a model has them: losses fall by about four with every bit."""
    drawn = np.random.default_rng(seed)
    menus = []
    for group in range(groups):
        parameters = int(drawn.integers(1, 30)) * 4096
        weight = 10 ** drawn.uniform(-2, 0)
        options = tuple(
            Option(
                name,
                int(parameters * BITS[name] / 8),
                0.0 if name == KEPT else weight * 4.0 ** (2 - BITS[name]),
                header,
            )
            for name in formats
        )
        menus.append(Menu(f"layers.{group}", options, (f"layers.{group}.w",), parameters))
    return menus


def files(allocation):
    """A writer's exact bytes: what is fixed, payload, and headers that depend on the format, in eights."""
    header = sum(60 + len(menu.name) + 3 * len(option.name)
                 for menu, option in zip(allocation.menus, allocation.options, strict=True))  # fmt: skip
    return 5000 + allocation.size + header + -header % 8


def test_two_hundred_sizes_are_never_exceeded():
    for seed in range(50):
        menus = model(seed, groups=6)
        one = Alternative("all", tuple(menus), 5000 + 8)
        drawn = np.random.default_rng(seed)
        for target in drawn.integers(files(milp.solve(menus, one.least - 5008)), one.most, 4).tolist():
            found = for_size([one], target, files)
            assert files(found) <= target
            if target >= one.with_headers().least:
                bounded = milp.solve(menus, target - 5008 - 6 * 90, gap=0)
                assert found.loss <= bounded.loss * (1 + 1e-4) and not found.downgrades


def test_headers_that_were_underestimated_make_the_cheapest_group_smaller():
    menus = [
        Menu("a", (Option("int2", 50, 0.9), Option("int4", 100, 0.5)), parameters=200),
        Menu("b", (Option("int2", 50, 0.35), Option("int4", 100, 0.3)), parameters=200),
        Menu("c", (Option("int2", 20, 0.301), Option("int4", 40, 0.3)), parameters=80),
    ]
    one = [Alternative("all", tuple(menus))]

    def real(allocation):
        return allocation.size + 15

    assert for_size(one, 255, real).downgrades == ()
    found = for_size(
        one, 250, real
    )  # solved for 250, 255 are found: 20 saved at "c" are enough and cost least
    assert (found.downgrades, found.by_group()) == (("c",), {"a": "int4", "b": "int4", "c": "int2"})
    assert real(found) <= 250
    harder = for_size(one, 240, lambda allocation: allocation.size + 50)
    # 240 allow a, b, and c at two bits; 50 more need more than c can give.
    assert harder.size + 50 <= 240 and harder.by_group()["b"] == "int2"


def test_downgrades_go_on_until_it_fits_or_nothing_is_left():
    menus = model(3, groups=5, header=0)
    one = Alternative("all", tuple(menus))
    least = one.least + 700
    found = for_size([one], least, lambda allocation: allocation.size + 700)
    assert set(found.by_group().values()) == {"int2"}
    with pytest.raises(UsageError, match=f"is {least:,} bytes") as refused:
        for_size([one], least - 1, lambda allocation: allocation.size + 700)
    assert refused.value.code == "E462"


def test_a_target_between_the_exact_least_and_its_bound_is_met():
    """The bound on headers alone would refuse it."""
    menus = model(4, groups=5, header=5000)
    one = Alternative("all", tuple(menus), 5000)
    smallest = replace(milp.solve(menus, one.least - 5000), fixed=5000)
    target = files(smallest) + 10
    assert target < one.with_headers().least
    assert files(for_size([one], target, files)) <= target


def test_the_best_family_wins_after_its_downgrades():
    eight = [m.only("int8") for m in model(5, 4)]
    four = [replace(m, options=tuple(o for o in m.options if o.name in ("int4", KEPT))) for m in model(5, 4)]
    both = [Alternative("eight", tuple(eight), 10), Alternative("four", tuple(four), 10)]
    room = sum(m.least for m in eight) + 4 * 90 + 10
    assert for_size(both, room, lambda a: a.fixed + a.size + 4 * 90).alternative == "eight"
    assert for_size(both, room - 1, lambda a: a.fixed + a.size + 4 * 90).alternative == "four"
    found = for_size(both, room, lambda a: a.fixed + a.size + 4 * 90)
    assert found.options[0].header == 90 and found.fixed == 10


def test_bits_are_of_all_matrices_with_scales_and_kept_ones():
    menus = model(6)
    menus[3] = menus[3].only(KEPT)
    one = Alternative("all", tuple(menus), 10**9)
    parameters = sum(menu.parameters for menu in menus)
    for bits in (4.35, 5.0, 7.77, 16):
        found = for_bits([one], bits)
        assert found.bits == pytest.approx(8 * found.size / parameters) and found.bits <= bits
        assert found.by_group()[menus[3].name] == KEPT and found.fixed == 10**9
    assert set(for_bits([one], 16).by_group().values()) == {KEPT}
    least = 8 * sum(menu.least for menu in menus) / parameters
    with pytest.raises(UsageError, match=r"least that the formats allow is \d\.\d+ bits") as refused:
        for_bits([one], 2)
    named = float(refused.value.message.split(" is ")[1].split()[0])
    assert least <= named < least + 0.002
    assert for_bits([one], named).size == sum(menu.least for menu in menus)


def test_the_decimal_that_was_asked_for_is_reached():
    """4.35 as a double lies below 87/20; with 80 parameters the byte between them counts."""
    menu = Menu("a", (Option("int2", 20, 1.0), Option("int4", 87, 0.0)), parameters=160)
    assert for_bits([Alternative("", (menu,))], 4.35).by_group() == {"a": "int4"}
    with pytest.raises(ValueError):
        for_bits([Alternative("", (replace(menu, parameters=0),))], 4.35)


def true_divergence(allocation, bias=1.0, power=1.0):
    """Losses add up optimistically at few bits."""
    return bias * (allocation.loss * (1 + 0.3 * math.sqrt(allocation.loss))) ** power


@pytest.mark.parametrize("scale, bias, power", [(1.0, 1.0, 1.0), (None, 1.0, 1.0), (None, 40.0, 1.0), (None, 0.02, 1.3), (1.0, 5.0, 0.8)])  # fmt: skip
@pytest.mark.parametrize("target", [0.3, 0.03, 0.002])
def test_a_divergence_is_met_with_few_plans_close_to_the_smallest(scale, bias, power, target):
    one, choices = many_choices()
    asked = []

    def measure(allocation):
        asked.append(allocation)
        return true_divergence(allocation, bias, power)

    target = target * bias
    found, done = for_kl([one], target, measure, scale=scale)
    assert len(asked) == len(done) <= 6
    assert true_divergence(found, bias, power) <= target
    assert found.fixed == 777
    smallest = min(a.size for a in choices if true_divergence(a, bias, power) <= target)
    assert found.size <= 1.04 * smallest


@functools.cache
def many_choices():
    """The best choices of a model at many sizes."""
    one = Alternative("all", tuple(model(7, groups=30)), 777)
    sizes = np.linspace(one.least, one.most, 120)
    return one, [milp.solve_alternatives([one], int(size), gap=1e-3) for size in sizes]


def test_a_divergence_that_is_only_met_at_the_ends():
    one = Alternative("all", tuple(model(8)))
    parts = [m.least for m in one.menus]
    easy, done = for_kl([one], 1e9, lambda allocation: 1.0)
    assert easy.size <= 1.02 * sum(parts) and len(done) <= 6
    kept, done = for_kl([one], 1e-30, lambda allocation: allocation.loss)
    assert set(kept.by_group().values()) == {KEPT} and len(done) <= 6
    quantized = Alternative("all", tuple(replace(m, options=m.options[:3]) for m in one.menus))
    with pytest.raises(UsageError, match="the largest formats allowed leave") as refused:
        for_kl([quantized], 1e-9, lambda allocation: allocation.loss)
    assert refused.value.code == "E462"
    # Where nothing can be chosen one plan is measured, whatever comes of it.
    single = Alternative("all", tuple(m.only("int4") for m in one.menus))
    found, done = for_kl([single], 0.1, lambda allocation: 0.05)
    assert len(done) == 1 and found.size == single.least
    with pytest.raises(UsageError):
        for_kl([single], 0.1, lambda allocation: 0.2)
    with pytest.raises(ValueError):
        for_kl([one], 0.0, lambda allocation: 0.0)


def test_a_divergence_that_is_noisy_or_undefined_is_never_reported_as_met():
    one = Alternative("all", tuple(model(9)))
    drawn = np.random.default_rng(0)
    for _ in range(20):
        found, done = for_kl([one], 0.05, lambda a: a.loss * drawn.uniform(0.5, 2))
        kept = [plan for plan in done if plan.allocation.by_group() == found.by_group()]
        assert len(kept) == 1 and kept[0].divergence <= 0.05
        formats = [tuple(sorted(plan.allocation.by_group().items())) for plan in done]
        assert len(set(formats)) == len(formats)

    def broken(allocation):
        return math.nan if allocation.loss > 0.01 else allocation.loss

    found, _ = for_kl([one], 0.05, broken)
    assert found.loss <= 0.01


def test_a_search_always_ends_and_gives_up_only_where_the_largest_fails():
    refusals = 0
    for seed in range(150):
        drawn = np.random.default_rng(seed)
        menus = model(seed, groups=int(drawn.integers(1, 4)))
        menus = [replace(m, options=m.options[: int(drawn.integers(1, 6))]) for m in menus]
        one = Alternative("all", tuple(menus))
        factor, target = 10 ** drawn.uniform(-2, 2), 10 ** drawn.uniform(-4, 1)
        noise = drawn.uniform(0.8, 1.25, 1000)

        def measure(allocation, factor=factor, noise=noise):
            return factor * allocation.loss * noise[allocation.size % 1000]

        largest = milp.solve_alternatives([one], one.most)
        try:
            found, done = for_kl([one], target, measure)
        except UsageError:
            refusals += 1
            assert measure(largest) > target
            continue
        assert measure(found) <= target and 1 <= len(done) <= 6
    assert 10 < refusals < 140


def test_two_families_under_a_divergence():
    menus = model(10)
    four = Alternative("four", tuple(replace(m, options=(m.options[2], m.options[4])) for m in menus))
    eight = Alternative("eight", tuple(replace(m, options=(m.options[3], m.options[4])) for m in menus))
    found, _ = for_kl([four, eight], 2 * sum(m.options[2].loss for m in menus), lambda a: a.loss, scale=1.0)
    assert found.alternative == "four"
    tight, done = for_kl(
        [four, eight], 1.001 * sum(m.options[3].loss for m in menus), lambda a: a.loss, scale=1.0
    )
    assert tight.alternative == "eight" and tight.loss <= 1.001 * sum(m.options[3].loss for m in menus)
    assert all(b.divergence != a.divergence for a, b in itertools.pairwise(done))
