"""LoRE-Merging against its algorithm written out with full SVDs, in closed forms, and over folders."""

from __future__ import annotations

from typing import Any

import driver
import forge
import numpy as np
import pytest
from safetensors.numpy import load_file

import surgeon
from surgeon import plan
from surgeon.errors import InputError, UsageError
from surgeon.merge.methods import lore

F = np.float32


def soft(matrix: np.ndarray, threshold: float) -> np.ndarray:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u * np.maximum(s - threshold, 0)) @ vt


def algorithm(models, mu: float, max_iter: int = 20, tol: float = 1e-5):
    """Return theta0, the deltas and the objective after every iteration, as the paper's algorithm has it."""
    low = [np.zeros_like(x) for x in models]
    scale = np.linalg.norm(np.mean(models, axis=0))
    before, objective = None, []
    for _ in range(max_iter):
        mean = np.mean([x - d for x, d in zip(models, low, strict=True)], axis=0)
        if before is not None and np.linalg.norm(mean - before) <= tol * scale:
            break
        before = mean
        low = [soft(x - mean, mu) for x in models]
        objective.append(
            sum(0.5 * np.linalg.norm(mean + d - x) ** 2 + mu * np.linalg.svd(d)[1].sum() for x, d in
                zip(models, low, strict=True))
        )  # fmt: skip
    return mean, low, objective


def models_of(shape, count: int, seed: int = 0, spread: float = 1.0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    base = rng.normal(0, 1, shape)
    return [base + rng.normal(0, spread, shape) for _ in range(count)]


def merged(models, code: str = "F64", block: int | None = None, each=None, **shared: Any):
    """Merge one tensor; return it and the facts."""
    shared = {k.rstrip("_"): v for k, v in shared.items()}
    raw = [driver.raw_of(x, code) for x in models]
    weights = [{"weight": w} for w in (each or [1.0] * len(models))]
    operation = driver.bind("lore", raw[0].shape, len(raw), base=None, each=weights, shared=shared, work=code)
    (got,), (facts,) = driver.execute(operation, [raw], code, block=block)
    return driver.values_of(got, code), facts


SHAPES = [(50, 20), (20, 50), (30, 30)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("mu", [0.5, 3.0])
def test_it_is_the_algorithm(shape, count, mu):
    models, weights = models_of(shape, count), [1.0, 0.0, 0.5, -0.3][:count]
    mean, low, objective = algorithm(models, mu)
    wanted = mean + 0.9 * sum(w * d for w, d in zip(weights, low, strict=True))
    for block in (None, 130):
        got, facts = merged(models, each=weights, mu=mu, lambda_=0.9, block=block)
        np.testing.assert_allclose(got, wanted, atol=1e-12)
        ranks = [int((np.linalg.svd(d)[1] > 1e-9).sum()) for d in low]
        assert facts["rank"] == ranks and facts["rank_of"] == min(shape)
        assert facts["iterations"] == len(objective) or count == 2


def test_a_stack_of_matrices_is_merged_one_by_one():
    for shape in ((3, 20, 12), (3, 12, 20)):
        models = models_of(shape, 3)
        got, facts = merged(models, each=[1, 0, 0.5], mu=1.0)
        for i in range(3):
            mean, low, _ = algorithm([x[i] for x in models], 1.0)
            np.testing.assert_allclose(got[i], mean + low[0] + 0.5 * low[2], atol=1e-12)
        assert facts["rank_of"] == 12


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_objective_never_rises(count):
    models = models_of((24, 16), count)
    stacked = np.hstack([x - models[-1] for x in models[:-1]])
    for mu in (0.01, 0.3, 2.0):
        parts = lore.minimise(stacked.T @ stacked, count, mu, 30, -1.0, 1.0, shortcut=False)
        assert len(parts.objective) == 30
        assert np.all(np.diff(parts.objective) <= 1e-12 * parts.objective[0])
        if count > 2:
            assert parts.objective[-1] < parts.objective[0]
        np.testing.assert_allclose(parts.objective, algorithm(models, mu, 30, -1.0)[2], rtol=1e-10)


def test_it_stops_when_the_average_stands_still():
    models = models_of((24, 16), 3, spread=0.05)
    _, facts = merged(models, mu=0.1, tol=1e-3, each=[1, 0, 0])
    _, longer = merged(models, mu=0.1, tol=1e-7, max_iter=200, each=[1, 0, 0])
    _, once = merged(models, mu=0.1, max_iter=1, each=[1, 0, 0])
    assert once["iterations"] == 1 < facts["iterations"] < longer["iterations"] < 200


# --- two models ---------------------------------------------------------------------------------


def test_two_models_have_opposite_parts_in_every_iteration():
    models = models_of((24, 16), 2)
    difference = models[0] - models[1]
    for iterations in (1, 2, 7):
        parts = lore.minimise(difference.T @ difference, 2, 0.4, iterations, -1.0, 1.0, shortcut=False)
        first, second = parts.low
        np.testing.assert_allclose(first, -second, atol=1e-13)
        np.testing.assert_allclose(parts.mean, np.eye(16) / 2, atol=1e-13)
    short = lore.minimise(difference.T @ difference, 2, 0.4, 20, 1e-5, 1.0)
    np.testing.assert_allclose(short.low[0], first, atol=1e-12)
    np.testing.assert_allclose(short.mean, parts.mean, atol=1e-13)
    assert short.objective[0] == pytest.approx(parts.objective[-1], rel=1e-12)
    assert short.ranks == parts.ranks and short.energy_kept == pytest.approx(parts.energy_kept)


@pytest.mark.parametrize("shape", SHAPES)
def test_equal_weights_of_two_models_are_the_plain_average_and_said_so(shape):
    models = models_of(shape, 2)
    for weights in ([1, 1], [0.3, 0.3], [0, 0]):
        got, facts = merged(models, mu=0.5, lambda_=1.7, each=weights)
        np.testing.assert_allclose(got, (models[0] + models[1]) / 2, atol=1e-15)
        assert facts == {"plain_average": True}
    _, facts = merged(models, mu=0.5, each=[1, 0])
    assert "plain_average" not in facts
    assert merged(models, mu=0.5, each=[1, 0], lambda_=0.0)[1] == {"plain_average": True}


def test_cancelling_weights_of_three_models_are_the_plain_average_too():
    """theta0 = mean(x) - mean(delta), so parts that are added back with a third each cancel."""
    models = models_of((20, 12), 3)
    mean, low, _ = algorithm(models, 0.5, 3000, 1e-14)
    np.testing.assert_allclose(mean + sum(low) / 3, np.mean(models, axis=0), atol=1e-10)
    got, facts = merged(models, mu=0.5, each=[0.5] * 3, lambda_=2 / 3)
    np.testing.assert_allclose(got, np.mean(models, axis=0), atol=1e-14)
    assert facts == {"plain_average": True}
    assert "plain_average" not in merged(models, mu=0.5, each=[1, 1, 1])[1]


@pytest.mark.parametrize("shape", SHAPES)
def test_one_weight_keeps_that_models_low_rank_part(shape):
    models = models_of(shape, 2)
    half = (models[0] - models[1]) / 2
    for mu in (0.0, 0.4, 2.0, 1e3):
        got, facts = merged(models, each=[1, 0], mu=mu, lambda_=0.8)
        np.testing.assert_allclose(got, (models[0] + models[1]) / 2 + 0.8 * soft(half, mu), atol=1e-12)
        assert facts["rank"] == [int((np.linalg.svd(half)[1] > mu).sum())] * 2
    got, _ = merged(models, each=[1, 0], mu=0.0)  # nothing lowered: the model itself
    np.testing.assert_allclose(got, models[0], atol=1e-7)
    got, _ = merged(models, each=[0.75, 0.25], mu=0.3)
    np.testing.assert_allclose(got, (models[0] + models[1]) / 2 + 0.5 * soft(half, 0.3), atol=1e-12)


def test_a_diagonal_in_closed_form():
    models = [np.diag([4.0, -3.0, 1.0, 0.0]), np.diag([0.0, 0.0, 0.6, 0.0])]
    got, facts = merged(models, each=[1, 0], mu=0.5)
    np.testing.assert_allclose(got, np.diag([2 + 1.5, -1.5 - 1.0, 0.8, 0.0]), atol=1e-12)
    assert facts["rank"] == [2, 2]
    assert facts["low_rank_energy"] == pytest.approx((1.5**2 + 1.0**2) / (4 + 2.25 + 0.04))


# --- the rest -------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("shape", [*SHAPES, (3, 20, 12), (17,), (40, 2, 3, 3), ()])
def test_equal_models_come_out_bit_for_bit(code, shape):
    model = driver.raw_of(models_of(shape, 1)[0], code)
    if model.size > 1:
        model.reshape(-1)[0] = driver.raw_of(np.array([-0.0]), code)[0]
    for count in (2, 3):
        for each in ([1, 0, 0][:count], [1, 1, 1][:count]):
            weights = [{"weight": w} for w in each]
            got = driver.merge("lore", [model.copy() for _ in range(count)], code, base=None, each=weights)
            assert got.tobytes() == model.tobytes()


def test_vectors_are_averaged():
    models = models_of((33,), 3)
    got, facts = merged(models, each=[1, 0, 0], mu=0.5)
    np.testing.assert_allclose(got, np.mean(models, axis=0), atol=1e-15)
    assert facts is None


def test_float32_is_as_good_as_its_entries():
    models = [x.astype(F) for x in models_of((200, 60), 2, spread=0.02)]
    got, _ = merged(models, "F32", each=[1, 0], mu=0.05)
    exact = (models[0].astype(float) + models[1]) / 2 + soft((models[0].astype(float) - models[1]) / 2, 0.05)
    np.testing.assert_allclose(got, exact, atol=1e-6)


def test_blocks_change_rounding_only():
    for shape in SHAPES:
        models = models_of(shape, 3)
        whole, _ = merged(models, mu=0.5, each=[1, 0, 0.2])
        for block in (61, 200):
            np.testing.assert_allclose(
                merged(models, mu=0.5, each=[1, 0, 0.2], block=block)[0], whole, atol=1e-12
            )


def test_only_tall_matrices_stream():
    for shape, unit in (((50, 20), "row"), ((20, 50), "whole"), ((3, 9, 9), "whole"), ((9,), "element")):
        operation = driver.bind("lore", shape, 2, base=None, each=[{"weight": 1.0}, {"weight": 0.0}])
        assert operation.unit == unit
        assert len(plan.partition(shape, operation.unit, 1)) == 1


def test_memory_is_declared():
    """G and its decomposition dominate for a wide side; the estimate must hold them."""
    shape = (152_064, 3584)
    two = driver.bind("lore", shape, 2, base=None, each=[{"weight": 1.0}, {"weight": 0.0}])
    three = driver.bind("lore", shape, 3, base=None, each=[{"weight": 1.0}] * 3)
    gram = 8 * 3584**2
    for operation, grams in ((two, 5), (three, 8)):
        ((start, stop), *_) = plan.partition(shape, operation.unit, 1)
        assert operation.scratch * (stop - start) >= grams * gram


def test_nonfinite_values_are_refused_even_where_they_are_allowed():
    models = [x.astype(F) for x in models_of((20, 10), 2)]
    models[0][3, 4] = np.inf
    for allow in (False, True):
        states = [{"w": x} for x in models]
        with pytest.raises(InputError):
            surgeon.merge(states, method="lore", weight=(1.0, 0.0), allow_nonfinite=allow)


def test_parameters_out_of_range_are_refused():
    for wrong in ({"mu": -1.0}, {"max_iter": 0}, {"tol": -1e-9}):
        with pytest.raises(UsageError):
            merged(models_of((4, 4), 2), **wrong)


# --- end to end -----------------------------------------------------------------------------------


def oracle(x: np.ndarray, y: np.ndarray, mu: float, lam: float) -> np.ndarray:
    mean, half = (x.astype(float) + y) / 2, (x.astype(float) - y) / 2
    return mean if x.ndim < 2 else mean + lam * soft(half, mu)


def test_folders(tmp_path):
    long = forge.model_folder(tmp_path / "long", 1, dtype="F32")
    short = forge.model_folder(tmp_path / "short", 2, dtype="F32")
    options = {"method": "lore", "weight": (1.0, 0.0), "lambda_": 0.8, "param": {"mu": 0.02}}
    outcome = surgeon.merge([long, short], output=tmp_path / "out", threads=2, **options)
    x, y = (load_file(f / "model.safetensors") for f in (long, short))
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert set(got) == set(x)
    for name in x:
        np.testing.assert_allclose(got[name], oracle(x[name], y[name], 0.02, 0.8), atol=1e-6)
    facts = outcome.summaries[""]["model.layers.0.mlp.up_proj.weight"]
    assert 0 < facts["rank"][0] < facts["rank_of"] == 16 and facts["iterations"] == 1
    surgeon.merge([long, short], output=tmp_path / "one", threads=1, **options)
    files = [(tmp_path / d / "model.safetensors").read_bytes() for d in ("out", "one")]
    assert files[0] == files[1]
    surgeon.merge([long, short], output=tmp_path / "mean", method="lore")
    average = load_file(tmp_path / "mean" / "model.safetensors")
    for name in x:
        np.testing.assert_allclose(average[name], (x[name] + y[name]) / 2, atol=1e-7)


def test_threads_do_not_change_a_bit_of_large_tensors():
    shapes = {"up.weight": (1400, 800), "down.weight": (800, 1400), "norm.weight": (800,)}
    states = [
        {n: x.astype(F) for n, x in zip(shapes, (models_of(s, 1, seed=10 + i)[0] for s in shapes.values()), strict=True)}
        for i in range(2)
    ]  # fmt: skip
    assert len(plan.partition(shapes["up.weight"], "row", 1)) == 2
    options = {"method": "lore", "weight": (1.0, 0.25), "param": {"mu": 20.0}}
    first = surgeon.merge(states, threads=1, **options)
    for threads in (2, 4):
        again = surgeon.merge(states, threads=threads, **options)
        assert all(again[n].tobytes() == first[n].tobytes() for n in shapes)
    for name in ("up.weight", "down.weight"):
        x, y = (s[name].astype(float) for s in states)
        wanted = (x + y) / 2 + 0.75 * soft((x - y) / 2, 20.0)
        np.testing.assert_allclose(first[name], wanted, atol=2e-5)
