"""Merge methods: closed forms, exact counts, identities, block independence and degenerate inputs."""

from __future__ import annotations

import math

import driver
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgeon.copying import Cast, Copy, CopyIfEqual
from surgeon.errors import InputError, UsageError
from surgeon.kernels import cast
from surgeon.merge.methods import catalogue, names
from surgeon.merge.methods.dler import stochastic
from surgeon.plan import Block

F = np.float32


def merged(method: str, *rows, code: str = "F32", **kw) -> np.ndarray:
    """Merge small literal tensors and return float values."""
    out = kw.get("out") or code
    inputs = [driver.raw_of(np.array(r, dtype=np.float64), code) for r in rows]
    return driver.values_of(driver.merge(method, inputs, code, **kw), out)


def weights(*values: float, **more: float) -> list[dict[str, float]]:
    return [{"weight": v, **more} for v in values]


def siblings(shape, count: int, code: str = "F32", spread: float = 2e-3, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    base = rng.normal(0, 0.02, shape)
    return [driver.raw_of(base, code)] + [
        driver.raw_of(base + rng.normal(0, spread, shape), code) for _ in range(count - 1)
    ]


# --- closed forms ---------------------------------------------------------------------------


def test_linear_is_the_weighted_mean():
    y = merged("linear", [4, 8], [0, 4], base=None, each=weights(1, 3))
    assert y.tolist() == [1, 5]
    y = merged("linear", [4, 8], [0, 4], base=None, each=weights(1, 3), shared={"normalize": False})
    assert y.tolist() == [4, 20]
    with pytest.raises(UsageError, match="sum to 0"):
        merged("linear", [4], [0], base=None, each=weights(1, -1))


def test_task_arithmetic_with_one_model_gives_the_model_to_one_ulp():
    b, x = siblings((64, 64), 2, "BF16")
    y = driver.values_of(driver.merge("task_arithmetic", [b, x], "BF16", each=weights(1)), "BF16")
    wide = driver.values_of(x, "BF16")
    unit = np.exp2(np.floor(np.log2(np.maximum(np.abs(wide), np.abs(driver.values_of(b, "BF16"))))) - 7)
    assert np.all(np.abs(y - wide) <= unit)


def test_ties_by_hand():
    zero, first, second = [0, 0, 0, 0], [3, -1, 2, 0], [1, 2, -4, 0]
    y = merged("ties", zero, first, second, each=weights(1, 1, density=0.5))
    assert y.tolist() == [3, 2, -4, 0]
    # Election without trimming: sums [4, 1, -2, 0], so 2 of the first and -1 of the second column lose.
    y = merged("ties", zero, first, second, each=weights(1, 1))
    assert y.tolist() == [2, 2, -4, 0]
    y = merged("ties", zero, first, second, each=weights(1, 3), shared={"normalize": False, "lambda": 0.5})
    assert y.tolist() == [3, 3, -6, 0]


def test_sign_election_counts_zero_as_plus():
    y = merged("ties", [0, 0], [2, -1], [-2, 1], each=weights(1, 1))
    assert y.tolist() == [2, 1]


def test_single_weight_cancels_only_with_normalize():
    rows = [0, 0, 0, 0], [4, -3, 2, 1]
    one = merged("ties", *rows, each=weights(0.25, density=0.5))
    assert one.tolist() == merged("ties", *rows, each=weights(0.5, density=0.5)).tolist() == [4, -3, 0, 0]
    y = merged("ties", *rows, each=weights(0.25, density=0.5), shared={"normalize": False})
    assert y.tolist() == [1, -0.75, 0, 0]


def test_untrimmed_ties_of_one_model_is_task_arithmetic():
    inputs = siblings((40, 30), 2)
    for lam in (1.0, 0.7):
        ties = driver.merge("ties", inputs, each=weights(1), shared={"lambda": lam})
        plain = driver.merge("task_arithmetic", inputs, each=weights(1), shared={"lambda": lam})
        np.testing.assert_array_equal(ties, plain)


def test_slerp_of_orthogonal_unit_vectors():
    y = merged("slerp", [1, 0], [0, 1], shared={"t": 0.5})
    np.testing.assert_allclose(y, [math.sqrt(0.5)] * 2, rtol=1e-6)
    y = merged("slerp", [1, 0], [0, 1], base=1, shared={"t": 1 / 3})
    np.testing.assert_allclose(y, [0.5, math.sqrt(0.75)], rtol=1e-6)


def test_slerp_end_points_and_opposite_vectors():
    inputs = siblings((33, 7), 2, spread=2e-2)
    np.testing.assert_array_equal(driver.merge("slerp", inputs, shared={"t": 0.0}), inputs[0])
    np.testing.assert_array_equal(driver.merge("slerp", inputs, shared={"t": 1.0}), inputs[1])
    assert merged("slerp", [2, -4], [-2, 4], shared={"t": 0.25}).tolist() == [1, -2]


def test_slerp_keeps_the_norm_between_equal_norms():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 500))
    b *= np.linalg.norm(a) / np.linalg.norm(b)
    for t in (0.1, 0.5, 0.8):
        for method, kw in (
            ("slerp", {"shared": {"t": t}}),
            ("nuslerp", {"base": None, "each": weights(1 - t, t)}),
        ):
            y = merged(method, a, b, **kw)
            assert np.linalg.norm(y) == pytest.approx(np.linalg.norm(a), rel=1e-5)


def test_slerp_reports_its_branch():
    for other, branch in (([0, 1], "spherical"), ([1, 0.001], "linear")):
        operation = driver.bind("slerp", (2,), 2, shared={"t": 0.5})
        _, (facts,) = driver.execute(operation, [[np.array([1, 0], F), np.array(other, F)]], "F32")
        assert facts["branch"] == branch


def test_nuslerp_of_task_vectors_and_by_vector():
    y = merged("nuslerp", [1, 1], [2, 1], [1, 2], each=weights(1, 1))
    np.testing.assert_allclose(y, [1 + math.sqrt(0.5)] * 2, rtol=1e-6)
    rows = [[[1, 0], [2, 0]], [[0, 1], [2, 0]]]
    y = merged("nuslerp", *rows, base=None, each=weights(1, 1), shared={"nuslerp_flatten": False})
    np.testing.assert_allclose(y, [[math.sqrt(0.5)] * 2, [2, 0]], rtol=1e-6)
    columns = np.swapaxes(np.array(rows), 1, 2)
    y = merged("nuslerp", *columns, base=None, each=weights(1, 1),
               shared={"nuslerp_flatten": False, "nuslerp_row_wise": True})  # fmt: skip
    np.testing.assert_allclose(y, [[math.sqrt(0.5), 2], [math.sqrt(0.5), 0]], rtol=1e-6)


def test_multislerp_of_two_equal_norms_lies_between():
    y = merged("multislerp", [1, 0], [0, 1], base=None, each=weights(1, 1))
    np.testing.assert_allclose(y, [math.sqrt(0.5)] * 2, rtol=1e-6)
    y = merged("multislerp", [1, 0], [-1, 0], base=None, each=weights(1, 1))
    assert y.tolist() == [0, 0]
    with pytest.raises(InputError, match="cancel"):
        third = 2 * math.pi / 3
        rows = [[math.cos(i * third), math.sin(i * third)] for i in range(3)]
        merged("multislerp", *rows, base=None, code="F64", each=weights(1, 1, 1), shared={"eps": 1e-6})
    np.testing.assert_array_equal(merged("multislerp", [3, 4], base=None, each=weights(7)), [3, 4])


def test_karcher_mean_of_two_is_the_midpoint_and_of_three_is_symmetric():
    y = merged("karcher", [2, 0], [0, 2], base=None)
    np.testing.assert_allclose(y, [math.sqrt(2)] * 2, rtol=1e-6)
    y = merged("karcher", [1, 0, 0], [0, 1, 0], [0, 0, 1], base=None)
    np.testing.assert_allclose(y, [1 / math.sqrt(3)] * 3, rtol=1e-6)
    # Vectors without a direction count in the length only; if all are, the plain mean is left.
    np.testing.assert_allclose(merged("karcher", [2, 0], [0, 0], base=None), [1, 0], rtol=1e-6)
    np.testing.assert_allclose(merged("karcher", [2e-6, 0], [0, 0], base=None), [1e-6, 0], rtol=1e-6)
    assert not merged("karcher", [2e-6, 0], [0, 0], base=None, native=False).any()


def test_model_stock():
    np.testing.assert_array_equal(merged("model_stock", [1, 1], [2, 1], [1, 2]), [1, 1])
    np.testing.assert_allclose(merged("model_stock", [1, 1], [3, 2], [3, 2]), [3, 2], rtol=1e-6)
    # cos 60 degrees, two models: t = 2 (1/2) / (1 + 1/2) = 2/3 of the mean.
    y = merged("model_stock", [0, 0], [1, 0], [0.5, math.sqrt(0.75)])
    np.testing.assert_allclose(y, [2 / 3 * 0.75, 2 / 3 * math.sqrt(0.75) / 2], rtol=1e-6)
    base, one, two = [[0, 0], [0, 0]], [[1, 0], [1, 0]], [[0, 1], [1, 0]]
    y = merged("model_stock", base, one, two, shared={"filter_wise": True})
    np.testing.assert_allclose(y, [[0, 0], [1, 0]], atol=1e-7)


def test_nearswap_limits():
    inputs = siblings((50,), 2)
    np.testing.assert_array_equal(driver.merge("nearswap", inputs, shared={"t": 1e9}), inputs[1])
    np.testing.assert_array_equal(driver.merge("nearswap", inputs, shared={"t": 0.0}), inputs[0])
    np.testing.assert_allclose(merged("nearswap", [0, 0], [1, 4], shared={"t": 2.0}), [1, 2])


def test_sce_by_hand():
    """Unselected: weights 9 : 1, entry 0 agrees, entry 1 goes to the larger sum."""
    y = merged("sce", [0, 0], [3, 3], [1, -1])
    np.testing.assert_allclose(y, [0.9 * 3 + 0.1 * 1, 3], rtol=1e-6)
    y = merged("sce", [0, 0], [3, 3], [1, -1], shared={"select_topk": 0.5})
    np.testing.assert_allclose(y, [0, 3], rtol=1e-6)
    assert not merged("sce", [0, 0], [3, 3], [1, -1], shared={"select_topk": 0.0}).any()
    assert merged("sce", [1, 2], [3, 3], shared={"select_topk": 0.5}).tolist() == [1, 2]


def test_sce_reports_equal_weights_for_light_fine_tunes():
    for spread, adaptive in ((1e-4, False), (1e-1, True)):
        operation = driver.bind("sce", (1000,), 3)
        _, (facts,) = driver.execute(operation, [siblings((1000,), 3, spread=spread)], "F32")
        assert facts["adaptive"] is adaptive


def test_ram_by_hand():
    y = merged("ram", [0, 0, 1], [2, 4, 1], [0, 2, 1])
    assert y.tolist() == [2, 3, 1]
    # Model 1: one shared, one unique entry: 1 + 0.1 * min(1, 0.2) = 1.02; model 2 has no unique entry.
    np.testing.assert_allclose(merged("ramplus_tl", [0, 0, 1], [2, 4, 1], [0, 2, 1]), [2.04, 3, 1], rtol=1e-6)


def test_arcee_fusion_takes_the_outliers():
    rng = np.random.default_rng(3)
    base = rng.normal(0, 0.5, (40, 50))
    other = base + rng.normal(0, 1e-3, base.shape)
    spots = rng.choice(base.size, 20, replace=False)
    other.reshape(-1)[spots] += 0.5
    y = merged("arcee_fusion", base, other)
    moved = np.flatnonzero((y != base.astype(F)).reshape(-1))
    assert set(spots) <= set(moved) and len(moved) < 0.3 * base.size


def test_arcee_quartiles_are_exact():
    from surgeon.merge.methods.arcee_fusion import ArceeFusion

    rng = np.random.default_rng(0)
    for code in ("F32", "BF16", "F16"):
        for count in (1, 2, 3, 4, 5, 1000):
            operation = ArceeFusion(0, 1, code)
            values = driver.raw_of(rng.normal(size=count) if code != "F32" else rng.random(count), code)
            wide = driver.values_of(values, code)
            state = np.zeros(1 << 16, np.int64)
            key = operation._keys(wide)
            from surgeon.kernels import select

            state += select.high_histogram(key)
            facts = operation.finish(0, state, None, count)
            pieces = [[((0, 0), *select.low_counts(key, rank))] for rank in facts.ranks]
            found = [
                operation._value(select.resolve(r, p).key) for r, p in zip(facts.ranks, pieces, strict=True)
            ]
            assert found == [np.sort(wide)[int(q * (count - 1))] for q in (0.25, 0.5, 0.75)]


def test_passthrough():
    x = np.array([1, -2, -0.0], F)
    assert isinstance(driver.bind("passthrough", (3,), 1, base=None), Copy)
    np.testing.assert_array_equal(driver.merge("passthrough", [x], base=None), x)
    assert merged("passthrough", [1, -2], base=None, each=[{"scale": 0.0}]).tolist() == [0, 0]
    assert merged("passthrough", [1, -2], base=None, each=[{"scale": 1.5}]).tolist() == [1.5, -3]


# --- dler -----------------------------------------------------------------------------------


def test_dler_by_hand():
    y = merged("dler", [0, 0, 0, 0], [4, -3, 2, 1], shared={"keep": 0.5, "scale": 0.5})
    assert y.tolist() == [2, -1.5, 0, 0]
    y = merged("dler", [0, 0, 0, 0], [1, 1, 1, 1], shared={"keep": 0.5, "scale": 1.0})
    assert y.tolist() == [0, 1, 0, 1]


def test_dler_keeps_exactly_k():
    for keep in (1e-9, 0.1, 0.25, 0.999):
        for spread in (1e-5, 1e-4, 1e-2):
            inputs = siblings((61, 67), 2, "BF16", spread)
            operation = driver.bind("dler", (61, 67), 2, shared={"keep": keep})
            _, (facts,) = driver.execute(operation, [inputs], "BF16", block=1000)
            wanted = max(1, int(keep * 61 * 67))
            assert facts["kept"] == min(wanted, facts["changed"])
            assert facts["elements"] == 61 * 67


def test_dler_limits():
    inputs = siblings((40, 40), 2)
    b, x = inputs
    np.testing.assert_array_equal(driver.merge("dler", inputs, shared={"scale": 0.0}), b)
    y = driver.merge("dler", inputs, shared={"keep": 1.0, "scale": 0.7})
    np.testing.assert_array_equal(y, b + (x - b) * F(0.7))
    assert np.count_nonzero(driver.merge("dler", inputs, shared={"keep": 1e-9}) != b) == 1


def test_dler_grows_with_keep_and_scale():
    b, x = siblings((40, 40), 2)
    for fixed, swept in (("keep", "scale"), ("scale", "keep")):
        sizes = [
            np.linalg.norm(driver.merge("dler", [b, x], shared={fixed: 0.5, swept: v}) - b)
            for v in (0.1, 0.3, 0.6, 1.0)
        ]
        assert sizes == sorted(sizes)


def test_dler_is_fair_by_position():
    """A constant change over a million entries: every tenth keeps a quarter, to within one entry."""
    b, x = np.zeros(1_000_000, F), np.full(1_000_000, 2.0**-9, F)
    y = driver.merge("dler", [b, x], block=65_536)
    for tenth in np.split(y, 10):
        assert abs(np.count_nonzero(tenth) - 25_000) <= 1


def test_dler_global_scope_counts_over_all_tensors():
    tensors = [siblings(shape, 2, "BF16", spread, seed) for seed, (shape, spread) in
               enumerate([((50, 60), 1e-3), ((200,), 1e-2), ((7, 9), 1e-4)])]  # fmt: skip
    operation = driver.bind("dler", (50, 60), 2, shared={"keep": 0.3, "scope": "global"})
    results, facts = driver.execute(operation, tensors, "BF16", block=500)
    total = sum(t[0].size for t in tensors)
    assert sum(f["kept"] for f in facts) == int(0.3 * total)
    deltas = np.concatenate(
        [np.abs(np.subtract(*(driver.values_of(v, "BF16") for v in t))).reshape(-1) for t in tensors]
    )
    smallest = np.sort(deltas)[::-1][int(0.3 * total) - 1]
    for (b, x), y in zip(tensors, results, strict=True):
        b, x, y = (driver.values_of(v, "BF16") for v in (b, x, y))
        assert np.all((y == b) | (np.abs(x - b) >= smallest))
    alone = driver.execute(operation, tensors[:1], "BF16", block=500)[0][0]
    np.testing.assert_array_equal(
        alone, driver.merge("dler", tensors[0], "BF16", work="F32", shared={"keep": 0.3})
    )


def test_dler_keep_of_nonzero():
    b = np.zeros(100, F)
    x = b.copy()
    x[:20] = np.arange(1, 21)
    assert np.count_nonzero(driver.merge("dler", [b, x], shared={"keep": 0.5})) == 20
    assert np.count_nonzero(driver.merge("dler", [b, x], shared={"keep": 0.5, "keep_of": "nonzero"})) == 10


def test_dler_relative_ranks_by_share_of_the_base():
    y = merged("dler", [100, 1], [101, 1.5], shared={"keep": 0.5, "scale": 1.0, "relative": True})
    assert y.tolist() == [100, 1.5]
    y = merged("dler", [100, 1], [101, 1.5], shared={"keep": 0.5, "scale": 1.0})
    assert y.tolist() == [101, 1]


def test_dler_reports_the_effective_scale():
    """bfloat16 cannot hold 0.7 of a step: shares measured once for weights and updates like a model's."""
    rng = np.random.default_rng(0)
    b = cast.round_to(rng.normal(0, 0.02, 1 << 18).astype(F), "BF16")
    for spread, changed, effective in ((1e-5, 0.117, 0.89), (1e-4, 0.68, 0.77), (1e-3, 0.96, 0.70)):
        inputs = [cast.bf16_bits(b), cast.bf16_bits((b + rng.normal(0, spread, b.shape)).astype(F))]
        operation = driver.bind("dler", b.shape, 2, shared={"scale": 0.7})
        _, (facts,) = driver.execute(operation, [inputs], "BF16")
        assert facts["changed_share"] == pytest.approx(changed, abs=0.02)
        assert facts["effective_scale"] == pytest.approx(effective, abs=0.02)
        assert facts["trims"] is (spread > 1e-5)


def test_stochastic_rounding_is_unbiased_and_leaves_exact_values():
    n = 200_000
    b, x = np.full(n, 1.0, F), np.full(n, 1.0 + 2.0**-7, F)  # one bfloat16 step apart
    raw = [cast.bf16_bits(v) for v in (b, x)]
    shared = {"keep": 1.0, "scale": 0.4, "rounding": "stochastic"}
    y = driver.values_of(driver.merge("dler", raw, "BF16", work="F32", shared=shared), "BF16")
    moved = (y - 1) / 2.0**-7
    assert set(np.unique(moved)) == {0.0, 1.0}
    assert abs(moved.mean() - 0.4) < 4 * math.sqrt(0.24 / n)
    nearest = driver.merge("dler", raw, "BF16", work="F32", shared={"keep": 1.0, "scale": 0.4})
    np.testing.assert_array_equal(nearest, raw[0])
    shared["scale"] = 0.0
    np.testing.assert_array_equal(driver.merge("dler", raw, "BF16", work="F32", shared=shared), raw[0])


@settings(max_examples=200)
@given(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.floats(0, 0.999),
    st.sampled_from(["BF16", "F16"]),
)
def test_stochastic_rounding_takes_a_neighbour(value, draw, code):
    limit = 3.3e38 if code == "BF16" else 6.5e4
    value = F(np.clip(value, -limit, limit))
    raw = stochastic(np.array([value]), code, np.array([draw]))
    near = float(cast.widen(cast.narrow(np.array([value]), code), code)[0])
    got = float(cast.widen(raw, code)[0])
    if near == value:
        assert got == value and np.signbit(got) == np.signbit(value)
    else:
        bits = np.array([0, 1, 2], np.uint16) + np.uint16(raw.view(np.uint16)[0]) - np.uint16(1)
        steps = cast.widen(bits if code == "BF16" else bits.view(np.float16), code)
        apart = np.nanmax(np.abs(np.diff(np.where(np.isfinite(steps), steps, np.nan))))
        assert abs(got - float(value)) <= apart


# --- interpolate ----------------------------------------------------------------------------


def test_interpolate_end_points_keep_their_bits():
    for code in ("BF16", "F16", "F32"):
        a, x, y = siblings((30, 20), 3, code)
        a.reshape(-1)[0] = x.reshape(-1)[1] = driver.raw_of(np.array([-0.0]), code)[0]
        for inputs, base in (([a, x], None), ([a, x, y], 0)):
            first, second = inputs[-2:]
            for t, end in ((0.0, first), (1.0, second)):
                got = driver.merge("interpolate", inputs, code, work="F32", base=base, shared={"t": t})
                assert got.tobytes() == end.tobytes()
        for values, end in (((1, 0), x), ((0, 1), y), ((0, 0), a)):
            got = driver.merge(
                "interpolate", [a, x, y], code, work="F32", each=weights(*values), shared={"t": None}
            )
            assert got.tobytes() == end.tobytes()


def test_interpolate_by_hand():
    assert merged("interpolate", [0, 2], [4, 4], base=None, shared={"t": 0.25}).tolist() == [1, 2.5]
    assert merged("interpolate", [0, 2], [4, 4], base=None, shared={"t": 1.5}).tolist() == [6, 5]
    assert merged("interpolate", [0, 2], [4, 4], base=None, shared={"t": -1.0}).tolist() == [-4, 0]
    y = merged("interpolate", [1, 1], [2, 1], [1, 3], each=weights(0.5, 2))
    assert y.tolist() == [1.5, 5]
    assert merged("interpolate", [1, 1], [2, 1], [1, 3], shared={"t": 0.25}).tolist() == [1.75, 1.5]


def test_interpolate_refusals():
    for rows, kw in (
        (([0], [1], [2]), {"base": None, "shared": {"t": 0.5}}),
        (([0], [1]), {"base": None, "each": weights(1, 1)}),
        (([0], [1], [2], [3]), {"shared": {"t": 0.5}}),
        (([0], [1], [2]), {"each": [{"weight": 1.0}, {}]}),
    ):
        with pytest.raises(UsageError):
            merged("interpolate", *rows, **kw)


def test_interpolation_beats_merging_rounded_models():
    """Updates below half a bfloat16 step are lost before merging, not by it: float32 inputs keep them."""
    rng = np.random.default_rng(0)
    b = cast.widen(cast.bf16_bits(rng.normal(0, 0.02, 100_000).astype(F)), "BF16")
    x = b + rng.normal(0, 1e-6, b.shape).astype(F)
    assert np.mean(cast.bf16_bits(x) == cast.bf16_bits(b)) > 0.95
    y = driver.merge("interpolate", [b, x], base=None, shared={"t": 0.5})
    np.testing.assert_allclose(np.linalg.norm(y - b), 0.5 * np.linalg.norm(x - b), rtol=0.01)


# --- ties options ---------------------------------------------------------------------------


def test_trim_ties_all_keeps_every_tie():
    rows = [0, 0, 0, 0, 0], [1, 1, 2, 1, 0]
    even = merged("ties", *rows, each=weights(1, density=0.4))
    every = merged("ties", *rows, each=weights(1, density=0.4), shared={"trim_ties": "all"})
    assert np.count_nonzero(even) == 2 and every.tolist() == [1, 1, 2, 1, 0]


def test_rescale_rule():
    rows = [0, 0, 0, 0], [4, 3, 2, 1]
    kept = {"each": weights(1, density=0.5)}
    assert merged("ties", *rows, **kept, shared={"rescale_rule": "inverse_density"}).tolist() == [8, 6, 0, 0]
    np.testing.assert_allclose(
        merged("ties", *rows, **kept, shared={"rescale_rule": "l1"}), [40 / 7, 30 / 7, 0, 0], 1e-6
    )
    on = {"rescale": True}
    np.testing.assert_allclose(merged("ties", *rows, **kept, shared=on), [40 / 7, 30 / 7, 0, 0], 1e-6)
    assert merged("ties", *rows, **kept, shared=on | {"rescale_rule": "none"}).tolist() == [4, 3, 0, 0]


def test_l1_rescaling_does_not_overflow_float16():
    b, x = np.zeros(4096, np.float16), np.full(4096, 100, np.float16)
    y = driver.merge("dare_linear", [b, x], "F16", each=weights(1, density=0.5))
    assert np.isfinite(y).all() and y.astype(F).sum() == pytest.approx(409_600, rel=0.01)


def test_ties_keeps_exactly_k_and_spreads_bf16_ties():
    """Light fine-tunes tie by the thousand; every tenth of the rows must keep its share."""
    rng = np.random.default_rng(0)
    b = rng.normal(0, 0.02, (500, 400)).astype(F)
    inputs = [cast.bf16_bits(b), cast.bf16_bits((b + rng.normal(0, 1e-4, b.shape)).astype(F))]
    y = driver.merge("ties", inputs, "BF16", each=weights(1, density=0.25), block=4096)
    changed = y != inputs[0]
    assert np.count_nonzero(changed) == int(0.25 * b.size)
    for tenth in np.split(changed, 10):
        assert tenth.mean() == pytest.approx(0.25, abs=4 * math.sqrt(0.19 / tenth.size))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.floats(0, 1), st.floats(0, 0.99), st.integers(0, 5))
def test_kept_counts_are_exact(n, density, gamma, seed):
    rng = np.random.default_rng(seed)
    b = np.zeros(n, F)
    x = (rng.integers(1, 6, n) * rng.choice([-1, 1], n)).astype(F)  # many ties, no zeros
    y = driver.merge("ties", [b, x], each=weights(1, density=density), block=17)
    wanted = n if density >= 1 else max(1, int(density * n)) if density > 0 else 0
    assert np.count_nonzero(y) == wanted
    y = driver.merge("breadcrumbs", [b, x], each=weights(1, density=density, gamma=gamma), block=17)
    assert np.count_nonzero(y) == (n if density >= 1 else int(density * n))


# --- all methods ----------------------------------------------------------------------------


def case(method: str, count: int | None = None) -> tuple[int, int | None, dict]:
    """Return (inputs, base, binding) that exercise a method."""
    found = catalogue(method)
    least = max(found.models[0], 2)
    n = count or {"passthrough": 1, "model_stock": 4}.get(method, min(3, found.models[1] or 3))
    n = max(n, least) if method != "passthrough" else 1
    base = 0 if found.base == "required" or (found.base == "optional" and n > 2) else None
    shared = {"t": 0.3} if "t" in found.table else {}
    if "epsilon" in found.table and not found.table["epsilon"].per_model:
        shared["epsilon"] = 1e-3
    if method == "sce":
        shared["select_topk"] = 0.4
    others = n - (base is not None)
    values = {"weight": 0.7, "density": 0.4, "gamma": 0.05, "scale": 0.3}
    each = [
        {p: v * (1 if i == 0 or p != "weight" else 1.5) for p, v in values.items() if p in found.table and
         found.table[p].per_model} for i in range(n if found.base == "ignored" else others)
    ]  # fmt: skip
    if method == "interpolate":
        each = [{}] * others
    return n, base, {"shared": shared, "each": each}


SUMMING = {"slerp", "nuslerp", "multislerp", "karcher", "model_stock", "lore"}
"""Reduced by float64 sums, whose order follows the partition; that is part of the plan's identity."""

FLOAT64_SUMS = {"dare_linear", "dare_ties", "della", "della_linear", "sce"}
"""Their float64 sums (norms, weights) are rounded to float32 before use, unless the work is in float64."""


@pytest.mark.parametrize("code", ["F32", "BF16", "F64"])
@pytest.mark.parametrize("method", names())
def test_blocks_do_not_change_a_bit(method, code):
    n, base, kw = case(method)
    for shape in ((57, 31), (703,), (5, 9, 13)):
        inputs = siblings(shape, n, code)
        whole = driver.merge(method, inputs, code, base=base, **kw)
        for block in (97, 500):
            cut = driver.merge(method, inputs, code, base=base, block=block, **kw)
            if method in SUMMING:
                wide, other = driver.values_of(cut, code), driver.values_of(whole, code)
                np.testing.assert_allclose(wide, other, rtol=2.0**-7 if code == "BF16" else 1e-5, atol=1e-8)
            elif code == "F64" and method in FLOAT64_SUMS:
                np.testing.assert_allclose(cut, whole, rtol=1e-12)
            else:
                assert cut.tobytes() == whole.tobytes()


@pytest.mark.parametrize("flatten", [True, False])
@pytest.mark.parametrize("row_wise", [True, False])
def test_nuslerp_blocks(flatten, row_wise):
    for shape in ((57, 31), (5, 9, 13), (40, 1), (1, 40), (64,)):
        inputs = siblings(shape, 3, spread=2e-2)
        kw = {"each": weights(1, 2), "shared": {"nuslerp_flatten": flatten, "nuslerp_row_wise": row_wise}}
        whole = driver.merge("nuslerp", inputs, **kw)
        for block in (1, 50, 97, 1000):
            np.testing.assert_allclose(
                driver.merge("nuslerp", inputs, block=block, **kw), whole, rtol=1e-4, atol=1e-8
            )


IDENTITY = sorted(set(names()) - {"passthrough"})


@pytest.mark.parametrize("code", ["F32", "BF16", "F16", "F64"])
@pytest.mark.parametrize("method", IDENTITY)
def test_identical_inputs_come_out_unchanged(method, code):
    n, base, kw = case(method)
    if method == "linear" and code in {"F32", "F64"}:
        kw["each"] = weights(*[1.0] * 2)  # sums of unequal weights round in the inputs' own precision
        n = 2
    x = siblings((41, 23), 1, code)[0]
    x.reshape(-1)[:4] = driver.raw_of(np.array([-0.0, 0.0, 1e-6, -1e-6]), code)
    for native in (True, False):
        y = driver.merge(method, [x.copy() for _ in range(n)], code, base=base, native=native, **kw)
        np.testing.assert_array_equal(driver.values_of(y, code), driver.values_of(x, code))
        if method != "linear":  # starts its sum at +0.0, as mergekit does
            assert y.tobytes() == x.tobytes()


def test_vector_by_vector_identity():
    x = siblings((41, 23), 1)[0]
    for shared in ({"nuslerp_flatten": False}, {"nuslerp_flatten": False, "nuslerp_row_wise": True}):
        for base, n in ((None, 2), (0, 3)):
            y = driver.merge("nuslerp", [x] * n, base=base, each=weights(1, 2), shared=shared)
            assert y.tobytes() == x.tobytes()
    assert driver.merge("model_stock", [x] * 3, shared={"filter_wise": True}).tobytes() == x.tobytes()


DEGENERATE = [(0,), (0, 4), (4, 0), (), (1,), (1, 1), (3, 1), (1, 3)]


@pytest.mark.parametrize("code", ["F32", "BF16", "F16", "F64"])
@pytest.mark.parametrize("method", names())
def test_degenerate_shapes_and_values(method, code):
    """Nothing warns (warnings are errors here) and everything is finite; zeros stay zeros."""
    n, base, kw = case(method)
    shareds = [kw["shared"]]
    if method == "nuslerp":
        shareds += [{"nuslerp_flatten": False}, {"nuslerp_flatten": False, "nuslerp_row_wise": True}]
    if method == "model_stock":
        shareds += [{"filter_wise": True}]
    for shape in DEGENERATE:
        zero = driver.raw_of(np.zeros(shape), code)
        ones = driver.raw_of(np.ones(shape), code)
        for shared in shareds:
            for inputs in ([zero] * n, [ones] * n, [ones] + [zero] * (n - 1), [zero] + [ones] * (n - 1)):
                y = driver.merge(method, inputs, code, base=base, **(kw | {"shared": shared}))
                assert y.shape == shape and y.dtype == zero.dtype
                assert np.isfinite(driver.values_of(y, code)).all()
                if inputs[0] is zero and inputs[-1] is zero:
                    assert not driver.values_of(y, code).any()


@pytest.mark.parametrize("method", sorted(m for m in names() if catalogue(m).base == "required"))
def test_the_base_may_stand_anywhere(method):
    n, _, kw = case(method)
    inputs = siblings((31, 17), n)
    if catalogue(method).random and method != "dler":
        pytest.skip("streams belong to positions")
    first = driver.merge(method, inputs, base=0, **kw)
    last = driver.merge(method, [*inputs[1:], inputs[0]], base=n - 1, **kw)
    np.testing.assert_array_equal(first, last)


@pytest.mark.parametrize(
    "method", ["linear", "task_arithmetic", "ties", "multislerp", "karcher", "model_stock", "sce", "ram"]
)
def test_order_of_models_matters_only_to_rounding(method):
    n, base, kw = case(method, 4)
    inputs = siblings((31, 17), n)
    if "each" in kw:
        kw["each"] = [kw["each"][0]] * len(kw["each"])
    start = 0 if base is None else 1
    swapped = inputs[:start] + inputs[start:][::-1]
    a, b = (driver.merge(method, v, base=base, **kw) for v in (inputs, swapped))
    assert np.abs(a - b).max() < 1e-6 * np.abs(a).max()


def test_random_methods_follow_the_seed():
    inputs = siblings((100, 100), 3)
    for method in ("dare_linear", "dare_ties", "della", "della_linear"):
        _, base, kw = case(method, 3)
        a, b, c = (driver.merge(method, inputs, base=base, seed=s, **kw) for s in (0, 0, 1))
        np.testing.assert_array_equal(a, b)
        assert not np.array_equal(a, c)


def test_dare_is_unbiased():
    """Mean over 200 seeds within 4 sigma of b + d, and survivors applied once, twice or never."""
    b, x = np.zeros(20_000, F), np.full(20_000, 1.0, F)
    mean = np.mean(
        [driver.merge("dare_linear", [b, x], each=weights(1, density=0.25), seed=s) for s in range(200)],
        axis=0,
    )
    assert abs(mean.mean() - 1) < 0.01
    assert np.abs(mean - 1).max() < 5 * math.sqrt(3 / 200)
    n = 200_000
    b, x = np.zeros(n, F), np.full(n, 1.0, F)
    shared = {"normalize": False, "rescale": False}
    y = driver.merge("dare_ties", [b, x, x], each=weights(1, 1, density=0.25), shared=shared)
    for value, share in ((0, 0.5625), (1, 0.375), (2, 0.0625)):
        assert abs(np.mean(y == value) - share) < 4 * math.sqrt(share * (1 - share) / n)


# --- copying --------------------------------------------------------------------------------


def block_of(inputs: list[np.ndarray], codes: list[str]) -> Block:
    return Block("model.ids", inputs[0].shape, inputs, codes, 0, inputs[0].size, 0, 0)


def test_copy_and_cast():
    x = np.array([1.0, 1 + 2.0**-20], F)
    (raw,) = Copy().map(block_of([x], ["F32"]), None)
    assert raw is x
    (value,) = Cast("BF16").map(block_of([x], ["F32"]), None)
    assert value.tolist() == [1.0, 1.0]
    (value,) = Cast("F32", 1).map(block_of([x, x.astype(np.float64)], ["F32", "F64"]), None)
    assert value.tolist() == x.tolist()


@pytest.mark.parametrize(
    ("dtype", "code"), [(np.int64, "I64"), (np.uint8, "U8"), (np.bool_, "BOOL"), (np.float32, "F32")]
)
def test_copy_if_equal(dtype, code):
    x = np.array([0, 1, 1], dtype)
    (raw,) = CopyIfEqual().map(block_of([x, x.copy(), x.copy()], [code] * 3), None)
    assert raw is x
    with pytest.raises(InputError, match=r"model\.ids.*long and short") as caught:
        CopyIfEqual(("long", "short")).map(block_of([x, np.array([0, 1, 0], dtype)], [code] * 2), None)
    assert caught.value.code == "E323"
    with pytest.raises(InputError):
        CopyIfEqual().map(block_of([x, x.copy()], [code, "I16"]), None)
