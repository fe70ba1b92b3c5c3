"""Criteria on an example worked out by hand, their relations, and mixes of domains."""

from __future__ import annotations

import math
import pkgutil

import numpy as np
import pytest
import torch

from surgeon.calibrate.routing import Routed
from surgeon.errors import InputError, UsageError
from surgeon.experts import criteria, statistics
from surgeon.experts.criteria import get, known, mixed, shrunk
from surgeon.experts.statistics import LayerStatistics, RoutingStatistics, RoutingSums

FROM_ROUTING = ("easy_ep", "easy_ep_gate", "easy_ep_per_demo", "ean", "frequency", "gate_mass", "man", "msan", "reap", "reap_l2", "rean")  # fmt: skip


def batch(index, weights, norms, residual, update, samples=None):
    count = len(index)
    samples = [0] * count if samples is None else samples
    return Routed(
        layer=4, samples=torch.tensor(samples), positions=torch.arange(count), index=torch.tensor(index),
        weights=torch.tensor(weights, dtype=torch.float32), norms=torch.tensor(norms, dtype=torch.float32),
        peaks=torch.tensor(norms, dtype=torch.float32), residual=torch.tensor(residual, dtype=torch.float32),
        update=torch.tensor(update, dtype=torch.float32),
    )  # fmt: skip


def summed(found, domains=("",), experts=3):
    sums = RoutingSums(list(domains), {4: experts})
    sums.routed(found)
    return RoutingStatistics(sums.finish(), {"model_layers": 5})


@pytest.fixture
def by_hand():
    """Three experts, K = 1, d = 2, four tokens in two samples.

    Token: expert, g, f -> ||f||; h -> s = 1 - cos(h, h + g f)
    0: 0, 0.5,  (6, 8) -> 10;  h = (5, 0):  h + (3, 4) = (8, 4), cos = 2 / sqrt 5
    1: 0, 1.0,  (0, 2) -> 2;   h = (0, 1):  the same direction, s = 0
    2: 1, 0.25, (4, 0) -> 4;   h = (0, 1):  h + (1, 0) = (1, 1), cos = 1 / sqrt 2
    3: 1, 1.0,  (-2, 0) -> 2;  h = (1, 0):  h + (-2, 0) = (-1, 0), s = 2
    """
    return summed(
        batch(
            [[0], [0], [1], [1]], [[0.5], [1.0], [0.25], [1.0]], [[10], [2], [4], [2]],
            [[5, 0], [0, 1], [0, 1], [1, 0]], [[3, 4], [0, 2], [1, 0], [-2, 0]], [0, 1, 1, 1],
        ),
        ("", ""),
    )  # fmt: skip


def test_every_criterion_by_hand(by_hand):
    found = by_hand.total(4)
    s = [1 - 2 / math.sqrt(5), 0.0, 1 - 1 / math.sqrt(2), 2.0]
    wanted = {
        "frequency": [2, 2, 0],
        "gate_mass": [1.5, 1.25, 0],
        "ean": [12, 6, 0],
        "man": [6, 3, 0],
        "msan": [52, 10, 0],
        "rean": [7, 3, 0],
        "reap": [3.5, 1.5, 0],
        "reap_l2": [27, 4, 0],
        "easy_ep": [5 * s[0], s[2] + 2 * s[3], 0],
        "easy_ep_gate": [0.5 * s[0], 0.25 * s[2] + s[3], 0],
        # one token in the first sample, three in the second
        "easy_ep_per_demo": [5 * s[0] / 2, (s[2] + 2 * s[3]) / 3 / 2, 0],
    }
    assert set(wanted) == set(FROM_ROUTING)
    for name, values in wanted.items():
        np.testing.assert_allclose(get(name).score(found), values, rtol=1e-6, atol=1e-9, err_msg=name)
    assert found.peak.tolist() == [10, 4, 0] and found.seen == 4 and found.unused == 1
    for name in ("frequency", "gate_mass", "ean", "man", "msan", "rean", "reap", "reap_l2"):
        assert get(name).score(found).tolist() == wanted[name], name  # exact: halves and quarters


def test_orthogonal_outputs_in_closed_form():
    """E = 4, K = 2, one token, f_i = n_i e_i, h = H e_9: c_i = g_i n_i, s = 1 - H / sqrt(H^2 + sum (g_i n_i)^2)."""
    g, n, height = (0.6, 0.4), (2.0, 7.0), 3.0
    update = [0.0] * 10
    update[1], update[3] = g[0] * n[0], g[1] * n[1]
    found = summed(batch([[1, 3]], [g], [n], [[0.0] * 9 + [height]], [update]), experts=4).total(4)
    s = 1 - height / math.sqrt(height**2 + (g[0] * n[0]) ** 2 + (g[1] * n[1]) ** 2)
    assert get("easy_ep").score(found) == pytest.approx([0, g[0] * n[0] * s, 0, g[1] * n[1] * s], abs=1e-6)


def random_batch(seed=0, tokens=200, experts=8, k=2, ones=False):
    drawn = np.random.default_rng(seed)
    index = np.argsort(drawn.random((tokens, experts)), axis=1)[:, :k]
    weights = np.ones((tokens, k)) if ones else drawn.random((tokens, k))
    return batch(index, weights, drawn.random((tokens, k)) * 5, drawn.normal(size=(tokens, 6)), drawn.normal(size=(tokens, 6)))  # fmt: skip


@pytest.mark.parametrize("k", [1, 2])
def test_easy_ep_without_token_weight_is_rean_exactly(monkeypatch, k):
    monkeypatch.setattr(statistics, "token_weight", lambda residual, update: torch.ones(len(residual)))
    found = summed(random_batch(k=k), experts=8).total(4)
    assert (get("easy_ep").score(found) == get("rean").score(found)).all()
    assert (get("easy_ep_gate").score(found) == get("gate_mass").score(found)).all()


def test_relations_between_criteria():
    found = summed(random_batch(), experts=8).total(4)
    n = found.tokens

    def score(name):
        return get(name).score(found)

    np.testing.assert_allclose(score("rean"), score("reap") * n, rtol=1e-12)
    np.testing.assert_allclose(score("ean"), score("man") * n, rtol=1e-12)
    assert score("frequency").sum() == 400
    alike = summed(random_batch(ones=True), experts=8).total(4)
    np.testing.assert_array_equal(get("reap").score(alike), get("man").score(alike))
    np.testing.assert_array_equal(get("reap_l2").score(alike), get("msan").score(alike))


def test_scores_do_not_alias_statistics():
    found = summed(random_batch(), experts=8).total(4)
    for name in FROM_ROUTING:
        get(name).score(found)[:] = -1
    assert all((getattr(found, name) >= 0).all() for name in statistics.SUMS) and (found.tokens >= 0).all()


def test_few_tokens_shrink_a_mean():
    assert shrunk(np.array([4.0, 4.0, 0.0]), np.array([8, 24, 0])).tolist() == [2.0, 3.0, 0.0]
    assert shrunk(np.array([4.0]), np.array([1]), prior=1).tolist() == [2.0]
    assert {name for name in FROM_ROUTING if get(name).averaged} == {"reap", "reap_l2", "man", "msan"}


# ---- the registry --------------------------------------------------------------------------------------


def test_a_file_is_a_criterion():
    assert set(FROM_ROUTING) <= set(known())
    assert set(known()) == {found.name for found in pkgutil.iter_modules(criteria.__path__)}
    for name in FROM_ROUTING:
        found = get(name)
        assert found.name == name and found.needs == "routing" and found.title and found.source
        assert get(name.replace("_", "-")) is found


def test_an_unknown_criterion_is_refused_with_a_suggestion():
    with pytest.raises(UsageError) as caught:
        get("reep")
    assert caught.value.code == "E244" and "reap" in caught.value.help
    with pytest.raises(UsageError) as caught:
        get("__init__")
    assert "easy-ep" in caught.value.help


# ---- several domains --------------------------------------------------------------------------------------


def table(values):
    one = LayerStatistics.empty(len(values))
    one.gated = np.array(values, np.float64)
    one.tokens = np.full(len(values), 4)
    return {7: one}


def domains(**values):
    return RoutingStatistics({name: table(one) for name, one in values.items()}, {"model_layers": 8})


def test_domains_are_normalised_before_they_are_mixed():
    found = domains(code=[100, 300, 0, 0], prose=[0, 1, 2, 1])
    rean = get("rean")
    np.testing.assert_allclose(mixed(found, rean, layer=7), [0.125, 0.5, 0.25, 0.125])
    np.testing.assert_allclose(mixed(found, rean, layer=7, how="max"), [0.125, 0.375, 0.25, 0.125])
    np.testing.assert_allclose(
        mixed(found, rean, layer=7, weights={"code": 3, "prose": 1}), [0.1875, 0.625, 0.125, 0.0625]
    )


def test_one_domain_is_left_as_it_is():
    assert mixed(domains(code=[100, 300, 0]), get("rean"), layer=7).tolist() == [100, 300, 0]


def test_an_expert_of_one_domain_is_kept_there_and_in_the_mix():
    """Expert 0 works for code only, 3 for prose only, 1 for both, 2 for nothing much."""
    values = {"code": [9.0, 5.0, 0.5, 0.1], "prose": [0.01, 0.04, 0.005, 0.09]}

    def best(scores, count):
        return sorted(np.argsort(-scores)[:count].tolist())

    rean = get("rean")
    assert best(mixed(domains(code=values["code"]), rean, layer=7), 2) == [0, 1]
    assert best(mixed(domains(prose=values["prose"]), rean, layer=7), 2) == [1, 3]
    assert best(mixed(domains(**values), rean, layer=7), 3) == [0, 1, 3]
    assert best(sum(np.array(one) for one in values.values()), 3) == [0, 1, 2]  # what adding up would keep


def test_shrinking_happens_within_a_domain():
    found = domains(code=[8.0, 24.0], prose=[4.0, 12.0])
    found.domains["code"][7].tokens = np.array([8, 24])
    reap = get("reap")
    # code: means 1 and 1, shrunk to 1/2 and 3/4; prose: means 1 and 3, shrunk to 1/3 and 1
    np.testing.assert_allclose(
        mixed(found, reap, layer=7, how="mean", shrink=True), [(0.4 + 0.25) / 2, (0.6 + 0.75) / 2]
    )
    np.testing.assert_allclose(mixed(found, reap, layer=7, how="mean"), [(0.5 + 0.25) / 2, (0.5 + 0.75) / 2])
    alone = RoutingStatistics({"code": found.domains["code"]}, {"model_layers": 8})
    np.testing.assert_allclose(mixed(alone, reap, layer=7, shrink=True), [0.5, 0.75])
    assert mixed(alone, get("rean"), layer=7, shrink=True).tolist() == [8.0, 24.0]  # no mean


def test_means_over_tokens_pool_all_text_unless_told_otherwise():
    found = domains(code=[8.0, 24.0], prose=[4.0, 12.0])
    found.domains["code"][7].tokens = np.array([8, 24])
    found.domains["prose"][7].tokens = np.array([1, 12])
    pooled = [12 / 9, 36 / 36]
    for name, expected in (("reap", pooled), ("rean", [0.25, 0.75])):
        np.testing.assert_allclose(mixed(found, get(name), layer=7), expected)
    np.testing.assert_allclose(mixed(found, get("reap"), layer=7, how="pool"), pooled)
    np.testing.assert_allclose(mixed(found, get("rean"), layer=7, how="pool"), [12, 36])
    weighted = mixed(found, get("reap"), layer=7, weights={"code": 1, "prose": 0})
    np.testing.assert_allclose(weighted, [0.5, 0.5])  # weights mean that domains count by themselves
    with pytest.raises(UsageError, match="no weights by domain"):
        mixed(found, get("rean"), layer=7, how="pool", weights={"code": 1, "prose": 1})


def test_a_domain_without_any_score_is_named():
    with pytest.raises(InputError) as caught:
        mixed(domains(code=[1.0, 2.0], silent=[0.0, 0.0]), get("rean"), layer=7)
    assert caught.value.code == "E433"
    assert "'silent'" in caught.value.message and "layer 7" in caught.value.message


@pytest.mark.parametrize(
    "options",
    [{"how": "median"}, {"weights": {"code": 1}}, {"weights": {"code": 1, "prose": -1}}, {"weights": {"code": 0, "prose": 0}},
     {"weights": {"code": math.nan, "prose": 1}}, {"weights": {"code": 1, "prose": 1, "maths": 1}}],
)  # fmt: skip
def test_wrong_mixes_are_refused(options):
    with pytest.raises(UsageError) as caught:
        mixed(domains(code=[1.0, 2.0], prose=[1.0, 1.0]), get("rean"), layer=7, **options)
    assert caught.value.code == "E244"
