"""The choice of formats against trying everything, the bound of the relaxation, and rules that groups obey."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import isotonic_regression, linprog

from surgeon.errors import InputError, UsageError
from surgeon.quantize.allocation import hull, milp, sensitivity, sensitivity_file
from surgeon.quantize.allocation.menus import KEPT, Alternative, Menu, Option, monotone, tie, tied
from surgeon.quantize.allocation.sensitivity import Sensitivities

NAMES = ("int2", "int3", "int4", "int8")


def drawn_menus(drawn, groups=6, formats=4, falling=True, unit=1):
    menus = []
    for group in range(groups):
        losses = drawn.random(formats) * 10.0 ** drawn.uniform(-3, 0)
        if falling:
            losses = np.sort(losses)[::-1]
        sizes = np.sort(drawn.integers(1, 40, formats)) * unit
        options = tuple(Option(NAMES[j], int(sizes[j]), float(losses[j])) for j in range(formats))
        menus.append(Menu(f"g{group:05}", options, parameters=100))
    return menus


def everything(menus, budget):
    """Return the least loss of all choices that fit, or None."""
    best = None
    for chosen in itertools.product(*(menu.options for menu in menus)):
        if sum(option.size for option in chosen) <= budget:
            loss = math.fsum(option.loss for option in chosen)
            best = loss if best is None else min(best, loss)
    return best


def relaxed(menus, budget):
    """The linear program, by scipy."""
    options = [(g, o) for g, menu in enumerate(menus) for o in menu.options]
    one = np.array([[float(g == row) for g, _ in options] for row in range(len(menus))])
    found = linprog([o.loss for _, o in options], A_ub=[[o.size / budget for _, o in options]], b_ub=[1.0],
                    A_eq=one, b_eq=np.ones(len(menus)), bounds=(0, 1))  # fmt: skip
    assert found.status == 0
    return found.fun


def spread(menus):
    return sum(menu.least for menu in menus), sum(menu.most for menu in menus)


@pytest.mark.parametrize("start", range(0, 60, 10))
def test_equals_trying_everything(start):
    for seed in range(start, start + 10):
        drawn = np.random.default_rng(seed)
        menus = drawn_menus(drawn, groups=5, falling=seed % 3 > 0)
        low, high = spread(menus)
        for share in (0.0, 0.3, 0.8):
            budget = low + int(share * (high - low))
            found = milp.solve(menus, budget, gap=0)
            assert found.size <= budget and found.status == "optimal"
            assert found.loss == pytest.approx(everything(menus, budget), rel=2e-6)
            assert found.loss <= found.greedy
            assert found.bound <= found.loss * (1 + 1e-5)


def test_greedy_bound_is_the_linear_program():
    for seed in range(150):
        drawn = np.random.default_rng(1000 + seed)
        menus = drawn_menus(drawn, groups=int(drawn.integers(1, 9)), falling=seed % 2 == 0)
        low, high = spread(menus)
        budget = int(drawn.integers(low, high + 1))
        found = hull.solve(menus, budget)
        assert found is not None and found.size <= budget
        assert found.bound == pytest.approx(relaxed(menus, budget), rel=1e-7, abs=1e-9)
        assert found.loss >= found.bound
        sizes, losses = hull.frontier(menus)
        assert np.interp(budget, sizes, losses) == pytest.approx(found.bound, rel=1e-9, abs=1e-12)
        assert hull.solve(menus, low - 1) is None


def test_bytes_of_real_models_never_exceed_the_budget():
    """Budgets one byte around an attainable total, with sizes where the solver's tolerance is tens of kilobytes."""
    for seed in range(40):
        drawn = np.random.default_rng(2000 + seed)
        menus = drawn_menus(drawn, groups=6, unit=int(drawn.integers(10**8, 10**9)))
        picked = [menu.options[int(drawn.integers(1, 4))] for menu in menus]
        budget = sum(option.size for option in picked)
        for wanted in (budget, budget - 1):
            found = milp.solve(menus, wanted, gap=0)
            assert found.size <= wanted
            assert found.loss == pytest.approx(everything(menus, wanted), rel=2e-6)


def test_a_choice_within_the_solvers_tolerance_is_cut_off():
    menus = [Menu("a", (Option("small", 10**10, 1.0), Option("large", 2 * 10**10 + 1, 0.0))),
             Menu("b", (Option("small", 10**10, 0.9), Option("large", 2 * 10**10, 0.0)))]  # fmt: skip
    # "a" large is one byte too many, a part in 10^10 of the budget.
    found = milp.solve(menus, 3 * 10**10, gap=0)
    assert found.by_group() == {"a": "small", "b": "large"}
    assert milp.solve(menus, 3 * 10**10 + 1, gap=0).by_group() == {"a": "large", "b": "small"}
    program = milp.Program(np.array([0, 0, 1, 1]), [10**10, 2 * 10**10 + 1, 10**10, 2 * 10**10],
                           np.array([1.0, 0.0, 0.9, 0.0]), 3 * 10**10)  # fmt: skip
    solution = milp.minimize(program, 1.0, 60, 0.0)
    assert solution is not None and solution.taken.tolist() == [True, False, False, True]


def test_the_ends():
    menus = drawn_menus(np.random.default_rng(5))
    low, high = spread(menus)
    assert set(milp.solve(menus, high).by_group().values()) == {"int8"}
    assert milp.solve(menus, 10 * high).size == high
    smallest = milp.solve(menus, low)
    assert smallest.size == low
    kept = [replace(menu, options=(*menu.options, Option(KEPT, 100, 0.0))) for menu in menus]
    assert set(milp.solve(kept, 600).by_group().values()) == {KEPT}
    with pytest.raises(UsageError, match=rf"least that the formats allow is {low:,} bytes") as refused:
        milp.solve(menus, low - 1)
    assert refused.value.code == "E462" and refused.value.exit_code == 2


def test_more_bytes_never_lose_more():
    menus = drawn_menus(np.random.default_rng(8), groups=40)
    low, high = spread(menus)
    losses = [milp.solve(menus, int(budget), gap=0).loss for budget in np.linspace(low, high, 20)]
    assert all(b <= a * (1 + 2e-6) for a, b in itertools.pairwise(losses))
    assert losses[0] > losses[-1]


@pytest.mark.parametrize("groups, instances", [(1000, 2), pytest.param(6144, 5, marks=pytest.mark.slow)])
def test_greedy_is_close_at_the_size_of_a_mixture_of_experts(groups, instances):
    for seed in range(instances):
        menus = drawn_menus(np.random.default_rng(3000 + seed), groups=groups, unit=4096)
        low, high = spread(menus)
        budget = low + (high - low) // 3
        found = milp.solve(menus, budget, gap=1e-7)
        assert found.size <= budget and found.status == "optimal"
        assert found.gap <= 2e-6
        assert 0 <= found.greedy_gap < 0.01
        # What is good enough by its bound is not solved again.
        quick = milp.solve(menus, budget)
        assert quick.loss == quick.greedy and quick.gap <= 1e-4


def test_order_of_menus_changes_nothing():
    drawn = np.random.default_rng(11)
    menus = drawn_menus(drawn, groups=60)
    # Ties everywhere: equal menus under different names.
    menus += [replace(menu, name=f"twin of {menu.name}") for menu in menus]
    low, high = spread(menus)
    texts = set()
    for _ in range(3):
        order = drawn.permutation(len(menus))
        found = milp.solve([menus[i] for i in order], (low + high) // 2)
        texts.add(json.dumps(found.record()))
    assert len(texts) == 1


def test_alternatives_are_solved_one_by_one_and_the_best_wins():
    wide = [Menu(n, (Option("int4", 4, loss), Option(KEPT, 16, 0.0))) for n, loss in (("a", 1.0), ("b", 2.0))]
    fine = [Menu(n, (Option("int8", 8, loss), Option(KEPT, 16, 0.0))) for n, loss in (("a", 0.1), ("b", 0.2))]
    both = [Alternative("four", tuple(wide), 3), Alternative("eight", tuple(fine), 3)]
    assert milp.solve_alternatives(both, 11).alternative == "four"
    assert milp.solve_alternatives(both, 19).alternative == "eight"
    # 23 = 3 + 4 + 16: one at four bits loses 1.0, two at eight lose 0.3.
    found = milp.solve_alternatives(both, 23)
    assert (found.alternative, found.loss, found.fixed + found.size) == ("eight", pytest.approx(0.3), 19)
    with pytest.raises(UsageError, match="is 11 bytes"):
        milp.solve_alternatives(both, 10)
    mixed = milp.solve(
        [Menu(m.name, (*m.options[:1], *n.options)) for m, n in zip(wide, fine, strict=True)], 20
    )
    assert mixed.loss <= found.loss


def test_ties_that_a_program_requires():
    drawn = np.random.default_rng(12)
    for _ in range(20):
        modules, group_of = [], {}
        for layer in range(3):
            for part in ("q", "k", "v", "o"):
                name = f"layers.{layer}.{part}"
                modules.append(replace(drawn_menus(drawn, 1)[0], name=name))
                if part != "o":
                    group_of[name] = f"layers.{layer}.qkv"
        menus = tie(modules, group_of)
        assert len(menus) == 6
        low, high = spread(menus)
        found = milp.solve(menus, int(drawn.integers(low, high + 1)), gap=0)
        formats = found.by_module()
        assert set(formats) == {module.name for module in modules}
        for layer in range(3):
            assert len({formats[f"layers.{layer}.{part}"] for part in "qkv"}) == 1
        single = {module.name: {o.name: o for o in module.options} for module in modules}
        assert found.size == sum(single[name][fmt].size for name, fmt in formats.items())
        assert found.loss == pytest.approx(sum(single[name][fmt].loss for name, fmt in formats.items()))


def test_a_tie_keeps_shared_formats_and_refuses_none():
    q = Menu("q", (Option("int3", 3, 0.3), Option("int4", 4, 0.2, header=7)), ("m.q",), 10)
    k = Menu("k", (Option("int4", 2, 0.1, header=9), Option("int8", 4, 0.05)), ("m.k",), 5)
    one = tied("qk", [q, k])
    assert one.options == (Option("int4", 6, pytest.approx(0.3), 16),)
    assert (one.modules, one.parameters) == (("m.q", "m.k"), 15)
    with pytest.raises(InputError, match=r"m\.q, m\.k") as refused:
        tied("qk", [q, replace(k, options=k.options[1:])])
    assert refused.value.code == "E464"
    assert q.only("int4").options == (q.options[1],)
    with pytest.raises(UsageError, match="q cannot be stored as int8"):
        q.only("int8")


def test_monotone_is_the_isotonic_projection():
    for seed in range(100):
        drawn = np.random.default_rng(seed)
        count = int(drawn.integers(1, 7))
        losses, sizes = drawn.random(count), drawn.permutation(count) + 1
        menu = Menu("m", tuple(Option(f"f{i}", int(sizes[i]), float(losses[i])) for i in range(count)))
        smooth, wrong = monotone(menu)
        order = np.argsort(sizes)
        expected = isotonic_regression(losses[order], increasing=False).x
        assert np.allclose([smooth.options[i].loss for i in order], expected, rtol=1e-12)
        assert [o.size for o in smooth.options] == sizes.tolist()
        falls = (np.diff(losses[order]) <= 0).all()
        assert bool(wrong) != falls
        assert falls == (smooth is menu)


def test_menus_that_make_no_sense():
    for options in ((), (Option("a", 1, 0.0), Option("a", 2, 0.0)), (Option("a", -1, 0.0),),
                    (Option("a", 1, -0.1),), (Option("a", 1, math.nan),), (Option("a", 1, math.inf),)):  # fmt: skip
        with pytest.raises(ValueError):
            Menu("m", options)
    with pytest.raises(ValueError):
        milp.solve([Menu("m", (Option("a", 1, 0.0),))] * 2, 10)


# Scores


def rounded(weight, bits):
    step = 2 * np.abs(weight).max() / (2**bits - 1)
    return np.round(weight / step) * step


def plain_relative(weight, delta, inputs):
    lost = whole = 0.0
    for x in inputs:
        lost += sum(float(row @ x) ** 2 for row in delta)
        whole += sum(float(row @ x) ** 2 for row in weight)
    return lost / whole


def test_scores_equal_sums_written_out():
    drawn = np.random.default_rng(0)
    weight, inputs = drawn.normal(size=(5, 7)), drawn.normal(size=(11, 7))
    gradients, gates = drawn.normal(size=(11, 5)), drawn.random(11)
    delta = rounded(weight, 3) - weight
    assert sensitivity.relative_output_error(weight, delta, 2 * inputs.T @ inputs) == pytest.approx(
        plain_relative(weight, delta, inputs)
    )
    by_hand = gated = 0.0
    for t, o in np.ndindex(11, 5):
        by_hand += gradients[t, o] ** 2 * float(delta[o] @ inputs[t]) ** 2
        gated += gates[t] ** 2 * gradients[t, o] ** 2 * float(delta[o] @ inputs[t]) ** 2
    assert sensitivity.fisher(gradients, inputs, delta) == pytest.approx(by_hand)
    assert sensitivity.fisher(gradients, inputs, delta, gates) == pytest.approx(gated)
    assert sensitivity.output_fisher(gradients, inputs @ delta.T, gates) == pytest.approx(gated)
    assert sensitivity.weight_error(weight, delta) == pytest.approx(35 * (delta**2).sum() / (weight**2).sum())
    slope = gradients.T @ inputs
    assert sensitivity.delta_loss(slope, delta) == pytest.approx(sum(abs(a * b) for a, b in zip(slope.flat, delta.flat, strict=True)))  # fmt: skip
    assert sensitivity.relative_output_error(0 * weight, 0 * weight, inputs.T @ inputs) == 0
    with pytest.raises(InputError, match="nan"):
        sensitivity.weight_error(weight, delta * np.nan)


def test_fisher_predicts_the_loss_of_a_softmax_head():
    """Where only the head changes, the expected loss is known: the full second order, of which this is the diagonal."""
    drawn = np.random.default_rng(1)
    inputs, weight = drawn.normal(size=(4000, 6)), drawn.normal(size=(5, 6)) * 0.3
    delta = drawn.normal(size=(5, 6)) * 0.01
    logits = inputs @ weight.T
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    changed = logits + inputs @ delta.T
    q = np.exp(changed) / np.exp(changed).sum(1, keepdims=True)
    true = (p * np.log(p / q)).sum()
    labels = (drawn.random((4000, 1)) > p.cumsum(1)).sum(1)
    gradients = p - np.eye(5)[labels]
    score = sensitivity.fisher(gradients, inputs, delta)
    d = inputs @ delta.T
    assert score == pytest.approx((p * (1 - p) * d**2).sum(), rel=0.05)  # its expectation
    assert 0.5 * score == pytest.approx(true, rel=0.35)


def planted(scale):
    """A residual stack whose second block writes ``scale`` times as much; scores of all blocks by three bits widths."""
    drawn = np.random.default_rng(3)
    width, tokens, vocabulary = 8, 400, 12
    blocks = [drawn.normal(size=(width, width)) * 0.1 for _ in range(4)]
    blocks[1] = blocks[1] * scale
    head, start = drawn.normal(size=(vocabulary, width)), drawn.normal(size=(tokens, width))

    def logits(weights):
        hidden = start
        for block in weights:
            hidden = hidden + np.tanh(hidden) @ block.T
        out = hidden @ head.T
        return out - np.log(np.exp(out).sum(1, keepdims=True))

    reference = logits(blocks)
    p = np.exp(reference)
    labels = (drawn.random((tokens, 1)) > p.cumsum(1)).sum(1).clip(0, vocabulary - 1)
    entering, hidden = [], start
    for block in blocks:
        entering.append(np.tanh(hidden))
        hidden = hidden + entering[-1] @ block.T
    gradient = (p - np.eye(vocabulary)[labels]) @ head
    gradients = []
    for block, tanh in zip(reversed(blocks), reversed(entering), strict=True):
        gradients.append(gradient)
        gradient = gradient + (gradient @ block) * (1 - tanh**2)
    gradients.reverse()
    scores: dict[str, list[list[float]]] = {"kl": [], "fisher": [], "delta-loss": [], "rel-output": []}
    for number, block in enumerate(blocks):
        deltas = [rounded(block, bits) - block for bits in (2, 4, 8)]
        x, g = entering[number], gradients[number]
        changed = [logits([*blocks[:number], block + d, *blocks[number + 1 :]]) for d in deltas]
        scores["kl"].append([float((p * (reference - other)).sum() / tokens) for other in changed])
        scores["fisher"].append([sensitivity.fisher(g, x, d) for d in deltas])
        scores["delta-loss"].append([sensitivity.delta_loss(g.T @ x, d) for d in deltas])
        scores["rel-output"].append([sensitivity.relative_output_error(block, d, x.T @ x) for d in deltas])
    return scores


def test_a_planted_block_gets_the_most_bits():
    scores = planted(12.0)
    for kind in ("kl", "fisher", "delta-loss"):
        menus = [Menu(f"block {n}", tuple(Option(f"int{b}", b, max(0.0, s)) for b, s in zip((2, 4, 8), row, strict=True)))
                 for n, row in enumerate(scores[kind])]  # fmt: skip
        # One block can have more than two bits.
        found = milp.solve(menus, 10, gap=0).by_group()
        assert found == {"block 0": "int2", "block 1": "int4", "block 2": "int2", "block 3": "int2"}, kind
        assert max(range(4), key=lambda n: planted(1.0)[kind][n][0]) == 0
    # A relative error does not know how much a block matters: it is the same at every scale of its weights.
    assert np.allclose(scores["rel-output"][1], planted(1.0)["rel-output"][1], rtol=1e-9)


# Tables


def table(**changes):
    given = {
        "kind": "rel-output", "modules": ("a", "b", "c", "d"), "formats": ("int2", "int4"),
        "losses": np.array([[4.0, 1.0], [2.0, 0.5], [0.0, 0.0], [1 / 3, np.nan]]), "tokens": np.array([90, 30, 0, 5]),
        "parameters": np.array([100, 300, 200, 50]), "about": {"calibration": "abc", "checkpoint": ["x", 1]},
    }  # fmt: skip
    return Sensitivities(**{**given, **changes})


def test_experts_without_tokens_get_the_mean_of_the_others():
    found = table().filled({"a": "experts", "b": "experts", "c": "experts", "d": "other"})
    assert found.estimated == ("c",)
    assert found.losses[2] == pytest.approx([200 * (4 / 100 + 2 / 300) / 2, 200 * (1 / 100 + 0.5 / 300) / 2])
    assert np.array_equal(found.losses[[0, 1, 3]], table().losses[[0, 1, 3]], equal_nan=True)
    alone = table().filled({"c": "experts"})
    assert alone.estimated == () and (alone.losses[2] == 0).all()


def test_a_cheap_score_takes_the_scale_of_a_costly_one():
    reference = table(kind="kl", modules=("b", "a"), formats=("int4", "int2"), tokens=np.array([30, 90]),
                      losses=np.array([[0.05, 0.6], [0.2, np.nan]]), parameters=np.array([300, 100]))  # fmt: skip
    found = table().combined(reference)
    assert found.kind == "kl"
    # int2: measured for b (0.6, 0.3 of its own); int4: 0.1 and 0.2 of their own, median 0.15.
    assert found.losses[:, 0] == pytest.approx([1.2, 0.6, 0.0, 0.1])
    assert found.losses[:3, 1] == pytest.approx([0.2, 0.05, 0.0])
    assert np.isnan(found.losses[3, 1])
    with pytest.raises(InputError, match="different texts") as refused:
        table().combined(replace(reference, about={"calibration": "other"}))
    assert refused.value.code == "E463"
    with pytest.raises(InputError, match="int2 was measured in no module"):
        table().combined(replace(reference, losses=np.array([[0.05, np.nan], [0.2, np.nan]])))


def test_menus_of_a_table():
    sizes = {"a": {"int2": (10, 1), "int4": (20, 2), KEPT: (80, 0)}, "d": {"int2": (5, 1), "int4": (9, 1)}}
    a, d = table().menus(sizes)
    assert a.options == (Option("int2", 10, 4.0, 1), Option("int4", 20, 1.0, 2), Option(KEPT, 80, 0.0, 0))
    assert (a.parameters, a.modules) == (100, ("a",))
    assert [option.name for option in d.options] == ["int2"]
    for wrong in ({"e": {"int2": (1, 1)}}, {"d": {"int4": (1, 1)}}):
        with pytest.raises(InputError) as refused:
            table().menus(wrong)
        assert refused.value.code == "E464"
    with pytest.raises(InputError, match="inf"):
        table(losses=np.full((4, 2), np.inf))


def test_union_of_layers():
    other = replace(table(), modules=("e", "f", "g", "h"), estimated=("e",))
    both = sensitivity.union([table(), other])
    assert both.modules == tuple("abcdefgh") and both.losses.shape == (8, 2) and both.estimated == ("e",)
    with pytest.raises(InputError, match="cannot be compared"):
        sensitivity.union([table(), replace(other, kind="kl")])


def test_a_file_returns_what_was_saved_and_nothing_else(tmp_path):
    about = {"calibration": "abc", "checkpoint": ["x", 1]}
    path = sensitivity_file.place(tmp_path / "work", "rel-output", about)
    sensitivity_file.save(path, table())
    first = path.read_bytes()
    found = sensitivity_file.load(path, kind="rel-output", about=about)
    for name in ("kind", "modules", "formats", "about", "estimated"):
        assert getattr(found, name) == getattr(table(), name)
    for name in ("losses", "tokens", "parameters"):
        assert np.array_equal(getattr(found, name), getattr(table(), name), equal_nan=True)
    sensitivity_file.save(path, found)
    assert path.read_bytes() == first and [p.name for p in path.parent.iterdir()] == [path.name]
    assert sensitivity_file.place(tmp_path, "rel-output", {**about, "calibration": "abd"}).name != path.name
    assert sensitivity_file.place(tmp_path, "kl", about).name != path.name


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda text: text.replace("4.0", "4.5"), "damaged"),
        (lambda text: text[:40], "no file of sensitivities"),
        (lambda text: "[]", "no file of sensitivities"),
        (lambda text: text.replace('"version": 1', '"version": 2'), "version 2"),
        (lambda text: text.replace("rel-output", "fisher"), "damaged"),
        (lambda text: text, "another calibration, schemes"),
    ],
)
def test_a_file_that_does_not_fit(tmp_path, change, said):
    path = tmp_path / "s.json"
    sensitivity_file.save(path, table())
    path.write_text(change(path.read_text()))
    with pytest.raises(InputError, match=said) as refused:
        sensitivity_file.load(path, about={"calibration": "abd", "checkpoint": ["x", 1], "schemes": []})
    assert refused.value.code == "E463" and refused.value.where.file == str(path)


def test_a_file_of_another_score(tmp_path):
    sensitivity_file.save(tmp_path / "s.json", table())
    with pytest.raises(InputError, match="by rel-output, not by kl"):
        sensitivity_file.load(tmp_path / "s.json", kind="kl")
    with pytest.raises(InputError, match="cannot be read"):
        sensitivity_file.load(tmp_path / "none.json")


def test_bits_count_everything_in_the_menus():
    menus = [
        Menu("a", (Option("int4", 60, 1.0),), parameters=100),
        Menu("b", (Option(KEPT, 200, 0.0),), parameters=100),
    ]
    found = milp.solve(menus, 260)
    assert found.bits == 10.4
    record = found.record()
    assert json.loads(json.dumps(record)) == record
    assert [group["format"] for group in record["groups"]] == ["int4", KEPT]
