"""Low-rank approximation and soft-thresholding through the Gram matrix, against NumPy's full SVD."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from surgeon.kernels import blas, lowrank
from surgeon.kernels.crew import Crew

EPS = np.finfo(np.float64).eps


def with_spectrum(rows: int, columns: int, singular: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return a matrix [rows, columns] with the given singular values and random directions."""
    rng = np.random.default_rng(seed)
    k = len(singular)
    left = np.linalg.qr(rng.standard_normal((rows, k)))[0]
    right = np.linalg.qr(rng.standard_normal((columns, k)))[0]
    return (left * singular) @ right.T


def soft(matrix: np.ndarray, threshold: float) -> np.ndarray:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u * np.maximum(s - threshold, 0)) @ vt


def squared_norm(matrix: np.ndarray) -> float:
    return float(np.square(matrix).sum())


SPECTRA = {
    "flat": np.linspace(1, 0.9, 40),
    "random": np.linalg.svd(np.random.default_rng(1).standard_normal((60, 40)))[1],
    "decaying": 1 / np.arange(1.0, 41),
    "steep": 10.0 ** -np.arange(0, 20, 0.5),
    "rank 5": np.r_[np.ones(5), np.zeros(35)],
    "equal": np.ones(40),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("rank", [1, 4, 20, 39, 40])
def test_projection_reaches_the_optimum_of_eckart_and_young(name, rank):
    d = with_spectrum(60, 40, SPECTRA[name])
    found = lowrank.leading(d.T @ d, rank, method="lapack")
    v = found.vectors
    np.testing.assert_allclose(v.T @ v, np.eye(rank), atol=1e-12)
    optimum = float(np.square(np.linalg.svd(d)[1][rank:]).sum())
    missed = squared_norm(d - d @ v @ v.T) - optimum
    assert missed <= 2 * rank * EPS * squared_norm(d) * 8
    assert found.total == pytest.approx(squared_norm(d), rel=1e-12)
    assert found.energy_kept == pytest.approx(1 - optimum / squared_norm(d), abs=1e-12)


def test_projection_equals_the_truncated_svd_where_there_is_a_gap():
    singular = np.r_[np.linspace(5, 3, 6), np.linspace(1, 0, 24)]
    d = with_spectrum(50, 30, singular)
    u, s, vt = np.linalg.svd(d, full_matrices=False)
    v = lowrank.leading(d.T @ d, 6).vectors
    np.testing.assert_allclose(d @ v @ v.T, (u[:, :6] * s[:6]) @ vt[:6], atol=1e-13)
    weak = lowrank.leading(d.T @ d, 24, smallest=True).vectors
    np.testing.assert_allclose(d - d @ weak @ weak.T, (u[:, :6] * s[:6]) @ vt[:6], atol=1e-13)


def test_what_the_gram_matrix_loses():
    """Singular values below sqrt(eps) of the largest become noise of that size, and nothing else does."""
    singular = 10.0 ** -np.arange(0, 14.0)
    d = with_spectrum(40, 14, singular)
    found = np.sqrt(lowrank.eigen(d.T @ d)[0])
    np.testing.assert_allclose(found[:6], singular[:6], rtol=1e-4)
    limit = np.sqrt(EPS)
    assert np.all(found[9:] < 4 * limit)
    assert np.abs(found[11:] / singular[11:] - 1).max() > 0.5  # lost, as the module says
    for threshold in (1e-2, 1e-4, 1e-6, 1e-9, 1e-12):
        factor = lowrank.shrinkage(d.T @ d, threshold)[0]
        assert factor is not None
        assert np.linalg.norm(d @ factor - soft(d, threshold)) <= np.sqrt(14 * EPS) * np.linalg.norm(d)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("threshold", [0.0, 1e-3, 0.3, 0.95])
def test_soft_thresholding(name, threshold):
    d = with_spectrum(60, 40, SPECTRA[name], seed=3)
    factor, singular = lowrank.shrinkage(d.T @ d, threshold)
    got = np.zeros_like(d) if factor is None else d @ factor
    assert np.linalg.norm(got - soft(d, threshold)) <= np.sqrt(40 * EPS) * np.linalg.norm(d)
    np.testing.assert_allclose(np.linalg.norm(singular), np.linalg.norm(d), rtol=1e-12)


def test_soft_thresholding_of_a_diagonal_in_closed_form():
    diagonal = np.array([3.0, -2.0, 0.5, 0.0])
    factor = lowrank.shrinkage(np.diag(diagonal**2), 1.0)[0]
    np.testing.assert_allclose(np.diag(diagonal) @ factor, np.diag([2.0, -1.0, 0.0, 0.0]), atol=1e-15)


def test_a_threshold_above_everything_leaves_nothing():
    d = with_spectrum(20, 10, np.linspace(1, 0.5, 10))
    assert lowrank.shrinkage(d.T @ d, 1.01)[0] is None  # by the eigenvalues
    assert lowrank.shrinkage(d.T @ d, 100.0)[0] is None  # by the trace alone
    assert lowrank.shrinkage(np.zeros((4, 4)), 0.0)[0] is None


def test_nothing_and_everything():
    d = with_spectrum(20, 10, np.linspace(1, 0.5, 10))
    assert lowrank.leading(d.T @ d, 0).vectors.shape == (10, 0)
    assert lowrank.leading(np.zeros((10, 10)), 3).vectors.shape == (10, 0)
    assert lowrank.leading(np.zeros((10, 10)), 3).energy_kept == 1.0
    everything = lowrank.leading(d.T @ d, 10)
    np.testing.assert_allclose(d @ everything.vectors @ everything.vectors.T, d, atol=1e-14)


# --- the certified iteration ------------------------------------------------------------------

LARGE = {
    "random square": lambda rng: rng.standard_normal((300, 300)),
    "random tall": lambda rng: rng.standard_normal((2000, 300)),
    "decaying": lambda rng: rng.standard_normal((500, 300)) * np.arange(1, 301) ** -0.5,
    "low and noise": lambda rng: (
        rng.standard_normal((500, 9)) @ rng.standard_normal((9, 300)) + 0.03 * rng.standard_normal((500, 300))
    ),
    "exactly low": lambda rng: rng.standard_normal((500, 9)) @ rng.standard_normal((9, 300)),
}


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("rank", [1, 6, 30])
def test_the_iteration_misses_no_more_than_it_says(name, rank):
    d = LARGE[name](np.random.default_rng(5))
    gram = d.T @ d
    found = lowrank.leading(gram, rank, method="subspace")
    best = float(np.sort(np.linalg.eigvalsh(gram))[::-1][:rank].sum())
    missed = best - squared_norm(d @ found.vectors)
    rounding = 100 * EPS * found.total
    # Nine directions 1e5 times as strong as the rest: too steep for the filter, which sees that at once.
    given_up = (name, rank) == ("low and noise", 30)
    assert (found.path, found.rounds) == ("lapack", 1) if given_up else found.path == "subspace"
    assert missed <= found.missed + rounding
    left = found.total - best
    assert found.missed <= max(lowrank.TOLERANCE * max(left, missed), lowrank.FLOOR * found.total) * 1.001
    np.testing.assert_allclose(found.vectors.T @ found.vectors, np.eye(rank), atol=1e-11)


def test_the_iteration_gives_up_where_it_cannot_prove_enough(monkeypatch):
    d = LARGE["random square"](np.random.default_rng(5))
    gram = d.T @ d
    monkeypatch.setattr(lowrank, "FLOOR", 0.0)
    found = lowrank.leading(gram, 10, method="subspace", tolerance=1e-30)
    assert (found.path, found.rounds, found.missed) == ("lapack", lowrank.ROUNDS, 0.0)
    np.testing.assert_array_equal(found.vectors, lowrank.leading(gram, 10, method="lapack").vectors)
    steep = with_spectrum(400, 300, 10.0 ** -np.linspace(0, 12, 300))
    assert lowrank.leading(steep.T @ steep, 200, method="subspace").path == "lapack"


def test_the_proof_notices_a_direction_that_was_overlooked():
    """A subspace without the strongest direction has perfect residuals; only the factorisation can tell."""
    d = LARGE["decaying"](np.random.default_rng(6))
    gram = d.T @ d
    values, vectors = lowrank.eigen(gram)

    def bound(chosen):
        v = vectors[:, chosen]
        ritz = lowrank._Ritz(v, values[chosen], gram @ v - v * values[chosen])
        return lowrank._missed(gram, ritz, 10, float(np.trace(gram)), 1e-4, lowrank.serially)

    assert bound(slice(0, 20)) is not None
    assert bound(slice(1, 21)) is None


def test_a_warm_start_saves_rounds():
    d = LARGE["random square"](np.random.default_rng(7))
    gram = d.T @ d
    cold = lowrank.leading(gram, 20, method="subspace")
    change = 1e-3 * np.random.default_rng(8).standard_normal(d.shape)
    gram = (d + change).T @ (d + change)
    start = lowrank.eigen(d.T @ d)[1][:, :60]
    warm = lowrank.leading(gram, 20, method="subspace", start=start)
    assert cold.path == warm.path == "subspace"
    assert warm.rounds < cold.rounds


def test_large_sides_choose_by_the_share_of_directions(monkeypatch):
    d = LARGE["random tall"](np.random.default_rng(9))
    gram = d.T @ d
    assert lowrank.leading(gram, 10).path == "lapack"
    monkeypatch.setattr(lowrank, "SMALL_SIDE", 200)
    assert lowrank.leading(gram, 10).path == "subspace"
    assert lowrank.leading(gram, 100).path == "lapack"
    assert lowrank.leading(gram, 10, smallest=True).path == "lapack"


# --- the same bits, whoever computes ------------------------------------------------------------


def backwards(work, count: int) -> None:
    for i in reversed(range(count)):
        work(i)


def in_four_threads(work, count: int) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(count)))


def test_pieces_in_any_order_give_the_same_bits(monkeypatch):
    monkeypatch.setattr(lowrank, "STRIP", 100)
    monkeypatch.setattr(lowrank, "PANEL", 70)
    d = np.random.default_rng(0).standard_normal((700, 310))
    results = []
    with blas.one_thread():
        for spread in (lowrank.serially, backwards, in_four_threads):
            total = lowrank.GramSum(310, spread)
            for first in range(0, 700, 256):
                total.add(d[first : first + 256])
            gram = total.matrix()
            found = lowrank.leading(gram, 12, method="subspace", spread=spread)
            product = lowrank.transposed_product(d[:, :5], d, spread)
            results.append((gram.tobytes(), found.vectors.tobytes(), found.missed, product.tobytes()))
    assert results[0] == results[1] == results[2]
    np.testing.assert_allclose(gram, d.T @ d, rtol=1e-12, atol=1e-10)
    np.testing.assert_array_equal(gram, gram.T)
    np.testing.assert_allclose(product, d[:, :5].T @ d, rtol=1e-12, atol=1e-10)


def test_a_crew_does_every_piece_once_and_passes_failures_on():
    crew = Crew()
    helpers = [threading.Thread(target=crew.assist) for _ in range(3)]
    for helper in helpers:
        helper.start()
    for _ in range(50):
        done: list[int] = []
        crew.spread(done.append, 20)
        assert sorted(done) == list(range(20))
    crew.spread(done.append, 0)

    def fail(piece: int) -> None:
        if piece == 7:
            raise ValueError("piece 7")

    with pytest.raises(ValueError, match="piece 7"):
        crew.spread(fail, 20)
    done = []
    crew.spread(done.append, 5)
    assert sorted(done) == list(range(5))
    crew.close()
    for helper in helpers:
        helper.join(5)
        assert not helper.is_alive()


def test_blas_threads_are_limited_and_given_back():
    controls = blas._controls()
    if not controls:
        pytest.skip("NumPy's BLAS here is none that can be told how many threads to use")
    get, put = controls[0]
    before = get()
    try:
        put(2)
        set_to = get()
        with blas.one_thread():
            assert get() == 1
            with blas.one_thread():
                assert get() == 1
            assert get() == 1
        assert get() == set_to
    finally:
        put(before)


def test_matrices_of_a_tensor():
    assert lowrank.matrices(()) == (1, 1, 1)
    assert lowrank.matrices((7,)) == (1, 1, 7)
    assert lowrank.matrices((5, 7)) == (1, 5, 7)
    assert lowrank.matrices((8, 64, 32)) == (8, 64, 32)
    assert lowrank.matrices((64, 1, 4)) == (1, 64, 4)
    assert lowrank.matrices((64, 3, 14, 14)) == (1, 64, 588)
