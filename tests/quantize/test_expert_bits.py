"""Widths of experts under an average: against enumeration of every assignment, at every granularity."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest

from surgeon.errors import UsageError
from surgeon.formats.scheme import Scheme
from surgeon.quantize.expert_bits import expert_bits

MENU = (Scheme("int", 2, 32), Scheme("int", 3, 32), Scheme("int", 4, 32))


@dataclass(frozen=True)
class Given:
    layer: int
    schemes: tuple
    members: tuple
    frequency: np.ndarray
    weight: np.ndarray
    error: np.ndarray
    sizes: np.ndarray
    super_experts: tuple = ()


def layer(number, experts, seed, parts=2, width=64):
    """Return scores of one layer by projection; the first part has twice the parameters of the others."""
    drawn = np.random.default_rng(seed)
    held = [2 * width * width if part == 0 else width * width for part in range(parts)]
    members = tuple(tuple(((f"{number}.{e}.gate", f"{number}.{e}.up") if part == 0 else (f"{number}.{e}.{part}",))
                          for part in range(parts)) for e in range(experts))  # fmt: skip
    sizes = np.array(
        [[[count * scheme.bits // 8 + count // 16 for scheme in MENU] for count in held]] * experts
    )
    base = np.sort(drawn.random((experts, parts, 3)), axis=2)[:, :, ::-1]
    found = Given(
        number,
        tuple(s.name for s in MENU),
        members,
        drawn.random(experts),
        drawn.random(experts),
        base,
        sizes,
    )
    elements = {label: width * width for own in members for part in own for label in part}
    return found, elements


def whole(given):
    """Return scores by expert from scores by projection."""
    members = tuple(tuple(label for part in own for label in part) for own in given.members)
    return replace(given, members=members, error=given.error.sum(1), sizes=given.sizes.sum(1))


def two_layers(experts=3, seed=0):
    made = [layer(number, experts, seed + number) for number in (1, 4)]
    return [one for one, _ in made], made[0][1] | made[1][1]


def factor(given, expert):
    phi, share = given.frequency / given.frequency.sum(), given.weight / given.weight.sum()
    return phi[expert] * share[expert] ** 1.5


def of_a_tensor(given):
    """Ties as GGUF has them: one projection of all experts of a layer lies in one tensor."""
    return [
        [own[part][place] for own in one.members]
        for one in given for part in range(len(one.members[0])) for place in range(len(one.members[0][part]))
    ]  # fmt: skip


def cheapest(given, granularity, average, elements, scope, count="nominal", must=()):
    """Return the least cost of any assignment, by trying all of them."""
    rows = []  # (layer, labels, cost by width, size by width)
    for one in given:
        by = {}
        for expert, own in enumerate(one.members):
            for part, labels in enumerate(own):
                key = {"expert": expert, "projection": (expert, part), "tensor": part, "layer": 0}[
                    granularity
                ]
                cost, size, held = by.setdefault(key, (np.zeros(3), np.zeros(3), [0]))
                cost += factor(one, expert) * one.error[expert, part]
                number = sum(elements[label] for label in labels)
                size += 8 * one.sizes[expert, part] if count == "stored" else [number * s.bits for s in MENU]
                held[0] += number
        rows += [(one.layer, *entry) for entry in by.values()]
    best = np.inf
    for choice in itertools.product(range(3), repeat=len(rows)):
        fits = True
        for number in {row[0] for row in rows} if scope == "layer" else (None,):
            own = [(row, c) for row, c in zip(rows, choice, strict=True) if number in (None, row[0])]
            held = sum(row[3][0] for row, _ in own)
            fits &= sum(row[2][c] for row, c in own) <= average * held + 1e-6
        for number in {row[0] for row in rows} if granularity != "layer" else (None,):
            own = {MENU[c].bits for row, c in zip(rows, choice, strict=True) if number in (None, row[0])}
            fits &= set(must) <= own
        if fits:
            best = min(best, sum(row[1][c] for row, c in zip(rows, choice, strict=True)))
    return best


@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize(
    ("granularity", "average", "must"),
    [
        ("expert", 2.7, ()),
        ("expert", 3.0, (2, 3)),
        ("projection", 2.4, ()),
        ("layer", 3.0, ()),
        ("layer", 3.5, (3,)),
    ],
)
def test_equals_enumeration(granularity, average, must, scope):
    given, elements = two_layers(experts=2 if granularity == "projection" else 3)
    found = expert_bits(
        given, MENU, average, elements=elements, granularity=granularity, scope=scope, must=must
    )
    assert found.cost == pytest.approx(cheapest(given, granularity, average, elements, scope, must=must))
    assert found.schemes.keys() == elements.keys()
    bits = sum(found.schemes[label].bits * count for label, count in elements.items()) / sum(
        elements.values()
    )
    assert found.nominal == pytest.approx(bits) and bits <= average + 1e-9
    for one in given:
        for own in one.members:
            together = [own] if granularity != "projection" else [(part,) for part in own]
            assert all(
                len({found.schemes[label] for part in parts for label in part}) == 1 for parts in together
            )
    if granularity == "expert":
        again = expert_bits(
            [whole(g) for g in given], MENU, average, elements=elements, scope=scope, must=must
        )
        assert found.schemes == again.schemes


@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize(("average", "must"), [(2.7, ()), (3.4, (4,)), (3.0, (2, 4))])
def test_tensors_that_hold_a_projection_of_all_experts_have_one_width(average, must, scope):
    given, elements = two_layers(seed=3)
    given[0] = replace(given[0], super_experts=(1,)) if average > 3.3 else given[0]
    if given[0].super_experts:  # the tensors that hold it are pinned, so nothing else is left to choose there
        with pytest.raises(UsageError):
            expert_bits(
                given, MENU, average, elements=elements, granularity="projection", ties=of_a_tensor(given)
            )
        given[0] = replace(given[0], super_experts=())
    found = expert_bits(
        given, MENU, average, elements=elements, granularity="projection", scope=scope, must=must,
        ties=of_a_tensor(given),
    )  # fmt: skip
    assert found.cost == pytest.approx(cheapest(given, "tensor", average, elements, scope, must=must))
    for tie in of_a_tensor(given):
        assert len({found.schemes[label] for label in tie}) == 1
    assert found.nominal <= average + 1e-9 and found.schemes.keys() == elements.keys()
    # gate and up are one row whether or not the format has one tensor for both
    assert all(found.schemes[own[0][0]] == found.schemes[own[0][1]] for one in given for own in one.members)


def test_projections_by_the_bytes_they_take():
    given, elements = two_layers(experts=2, seed=5)
    found = expert_bits(
        given, MENU, 3.2, elements=elements, granularity="projection", scope="model", count="stored"
    )
    assert found.cost == pytest.approx(cheapest(given, "projection", 3.2, elements, "model", "stored"))
    size = sum(
        int(one.sizes[e, p, [s.bits for s in MENU].index(found.schemes[labels[0]].bits)])
        for one in given for e, own in enumerate(one.members) for p, labels in enumerate(own)
    )  # fmt: skip
    assert 8 * size / sum(elements.values()) == pytest.approx(found.stored) and found.stored <= 3.2
    # What may differ by projection is never worse than what may not.
    assert found.cost <= expert_bits(given, MENU, 3.2, elements=elements, scope="model", count="stored").cost


def test_stored_bits_count_scales():
    given, elements = two_layers()
    nominal = expert_bits(given, MENU, 3.0, elements=elements, scope="model")
    stored = expert_bits(given, MENU, 3.0, elements=elements, scope="model", count="stored")
    assert nominal.stored == pytest.approx(nominal.nominal + 0.5) and stored.stored <= 3.0 < nominal.stored
    assert stored.cost == pytest.approx(cheapest(given, "expert", 3.0, elements, "model", "stored"))


@pytest.mark.parametrize("granularity", ["expert", "projection", "layer"])
def test_super_experts_have_the_largest_width_and_are_charged(granularity):
    given, elements = two_layers()
    given[1] = replace(given[1], super_experts=(1,))
    found = expert_bits(given, MENU, 3.0, elements=elements, granularity=granularity, scope="model")
    assert {found.schemes[label].bits for part in given[1].members[1] for label in part} == {4}
    assert found.pinned == ((4, 1),) and found.nominal <= 3
    if granularity == "layer":
        assert {found.schemes[label].bits for own in given[1].members for part in own for label in part} == {
            4
        }


def test_unused_experts_get_the_least():
    given, elements = two_layers()
    phi = given[0].frequency.copy()
    phi[2] = 0
    given[0] = replace(given[0], frequency=phi)
    found = expert_bits(given, MENU, 3.0, elements=elements)
    assert {found.schemes[label].bits for part in given[0].members[2] for label in part} == {2}
    assert found.unused == ((1, 2),) and found.record()["unused"] == ["1:2"]


def test_a_budget_for_all_layers_is_never_worse_and_averages_meet_their_ends():
    for seed in range(5):
        given, elements = two_layers(seed=10 * seed)
        costs = [
            expert_bits(given, MENU, 2.5, elements=elements, scope=scope).cost for scope in ("layer", "model")
        ]
        assert costs[1] <= costs[0]
    assert {s.bits for s in expert_bits(given, MENU, 2.0, elements=elements).schemes.values()} == {2}
    assert {s.bits for s in expert_bits(given, MENU, 4.0, elements=elements).schemes.values()} == {4}
    thirds = expert_bits(given, MENU, 7 / 3, elements=elements)
    assert thirds.nominal == pytest.approx(7 / 3)  # one of three experts at 3 bits, in both layers


def test_refusals():
    given, elements = two_layers()
    for code, call in (
        ("E462", lambda: expert_bits(given, MENU, 1.5, elements=elements)),
        ("E462", lambda: expert_bits(given, MENU, 2.1, elements=elements, must=(2, 4))),
        (
            "E488",
            lambda: expert_bits(
                [whole(g) for g in given], MENU, 3, elements=elements, granularity="projection"
            ),
        ),
        ("E488", lambda: expert_bits(given, MENU, 3, elements=elements, must=(8,))),
        ("E488", lambda: expert_bits(given, MENU, 3, elements=elements, granularity="layer", must=(2, 3))),
    ):
        with pytest.raises(UsageError) as refused:
            call()
        assert refused.value.code == code
    with pytest.raises(ValueError, match="menu"):
        expert_bits(given, MENU[::-1], 3, elements=elements)
