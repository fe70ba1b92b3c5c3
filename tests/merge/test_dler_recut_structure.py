"""What DLER's and ReCUT's merges do to numbers: published claims where they hold, measurements where not.

The figures of a merge are surgeon's own reports of runs over files; what they are compared with is
sorted, counted or summed here and in benchmarks/long_to_short without surgeon.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import merge_models as mm
import numpy as np
import pytest
import torch

import surgeon

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "long_to_short"))

import dler_structure as dler
import recut_structure as recut

MODELS = Path(__file__).resolve().parents[1] / "models"
ENTRIES = 1 << 18


# ---- DLER on simulated weights -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spread", "changed", "kept", "energy", "at_70", "at_40"),
    [
        (1e-5, 0.116, 0.116, 1.00, 0.89, 0.124),
        (3e-5, 0.319, 0.25, 0.98, 0.88, 0.138),
        (1e-4, 0.676, 0.25, 0.725, 0.767, 0.275),
        (1e-3, 0.964, 0.25, 0.724, 0.70, 0.398),
    ],
)
def test_dler_on_bfloat16_updates(spread, changed, kept, energy, at_70, at_40, scratch):
    base, tuned = dler.simulated_pair(spread, ENTRIES)
    found, sorted_ = dler.measured(base, tuned, scratch), dler.by_sorting(base, tuned)
    assert found.changed == sorted_.changed and found.kept == sorted_.kept
    assert found.threshold == sorted_.threshold
    assert found.energy == pytest.approx(sorted_.energy, rel=1e-12)
    for scale in (0.7, 0.4):  # which of the tied entries are kept differs, and with it their base weights
        assert found.effective[scale] == pytest.approx(sorted_.effective[scale], abs=2e-3)
    expected = (changed, kept, energy, at_70, at_40)
    got = (found.changed, found.kept, found.energy, found.effective[0.7], found.effective[0.4])
    assert got == pytest.approx(expected, abs=0.006)
    assert (found.threshold == 0) is (
        spread == 1e-5
    )  # nothing is trimmed: fewer entries changed than are kept


def test_a_claimed_row_kept_every_tie():
    """The simulation that is quoted for DLER says 25 % kept at s = 1e-4; its figures are those of 37 %."""
    found = dler.by_sorting(*dler.simulated_pair(1e-4, ENTRIES), ties="all")
    assert found.kept == pytest.approx(0.37, abs=0.005)
    assert found.energy == pytest.approx(0.89, abs=0.005)
    assert found.effective[0.7] == pytest.approx(0.79, abs=0.006)
    assert found.effective[0.4] == pytest.approx(0.25, abs=0.006)


@pytest.mark.parametrize("spread", [1e-5, 1e-4])
@pytest.mark.parametrize("scale", [0.7, 0.4])
def test_stochastic_rounding_keeps_the_scale(spread, scale, scratch):
    seeds = 8
    base, tuned = dler.simulated_pair(spread, ENTRIES)
    single, mean = dler.stochastic_scales(base, tuned, scratch, scale, seeds)
    # A kept entry of size d that lies between two steps u apart moves with a deviation of at most u / 2.
    delta = np.abs(tuned.astype(np.float64) - base)
    size = np.sort(delta)[-int(0.25 * ENTRIES) :]
    step = np.exp2(np.floor(np.log2(np.maximum(np.abs(tuned), np.abs(base)).max())) - 7)
    bound = 4 * (step / 2) * math.sqrt(np.count_nonzero(size)) / size.sum()
    assert abs(single - scale) < bound and abs(mean - scale) < bound / math.sqrt(seeds)
    nearest = dler.measured(base, tuned, scratch, (scale,)).effective[scale]
    assert abs(nearest - scale) > 4 * abs(mean - scale)


# ---- DLER on trained models ----------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["tensor", "layer", "global"])
@pytest.mark.parametrize(("tuned", "base"), [("short", "long"), ("long", "short"), ("short", "base")])
def test_dler_on_trained_models(tuned, base, scope, scratch):
    found, merged = dler.merge_scope(MODELS / tuned, MODELS / base, scratch, scope)
    kept, energy, effective = dler.scope_by_sorting(MODELS / tuned, MODELS / base, scope)
    assert found.kept == kept
    assert found.energy == pytest.approx(energy, rel=1e-9)
    assert found.effective == pytest.approx(effective, abs=1e-3)
    assert abs(found.effective - 0.7) < 0.01  # these changes are many steps large
    origin = dler.model_tensors(MODELS / base)
    moved = sum(int((merged[n] != origin[n].double().numpy()).sum()) for n in origin)
    total = sum(t.numel() for t in origin.values())
    assert moved <= kept * total and moved > 0.97 * kept * total  # a step times 0.7 may round to no step
    if scope == "tensor":
        assert kept < 0.25 and found.by_kind["norms"] < 0.01  # near 1 a step is .0078: norms hardly move
        assert {k: v for k, v in found.by_kind.items() if k != "norms"} == pytest.approx(
            dict.fromkeys(("attention", "biases", "embedding", "mlp"), 0.25), abs=1e-3
        )
    else:
        assert kept * total == int(0.25 * total) or scope == "layer"


def test_a_global_ranking_favours_the_embedding_and_starves_attention(scratch):
    found, _ = dler.merge_scope(MODELS / "short", MODELS / "base", scratch, "global")
    assert found.by_kind["embedding"] > 0.6 and found.by_kind["attention"] < 0.2


# ---- ReCUT: two entries ----------------------------------------------------------------------------


@pytest.mark.parametrize("opposed", [False, True])
def test_two_entries_survive_independently_and_weights_cancel(opposed):
    found = [recut.survival(1 << 19, seed, opposed=opposed) for seed in (0, 1)]
    for part, expected in (("none", 0.5625), ("once", 0.375), ("both", 0.0625)):
        assert np.mean([getattr(s, part) for s in found]) == pytest.approx(expected, abs=1.5e-3)
    # equal signs: .75 (d_A + d_L) alone, .0625 * 4 of their mean; opposed: the larger one instead
    assert np.mean([s.mean for s in found]) == pytest.approx(1.25 if opposed else 0.875, abs=0.01)


def test_only_the_ratio_of_two_weights_matters():
    states = [{"w": torch.randn(64, 64, generator=torch.Generator().manual_seed(i))} for i in range(3)]

    def merged(*weights: float) -> torch.Tensor:
        out = surgeon.merge(states[:2], method="dare-ties", base=states[2], density=(0.25,), weight=weights, normalize=True,
                            param={"lambda": 1.0}, threads=1)  # fmt: skip
        assert isinstance(out, dict)
        return out["w"]

    assert torch.equal(merged(0.25, 0.25), merged(1, 1))
    assert torch.equal(merged(0.25, 0.5), merged(1, 2))
    assert not torch.equal(merged(0.25, 0.25), merged(0.25, 0.5))


# ---- ReCUT: one entry ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_weight_of_a_single_entry_is_inert(dtype, scratch):
    long, short = MODELS / "long", MODELS / "short"
    start = recut.tensors(short)
    first = recut.released(long, short, scratch / "a", dtype=dtype)
    update = recut.distance(first, start)

    def apart(**options) -> float:
        return (
            recut.distance(first, recut.released(long, short, scratch / "b", dtype=dtype, **options)) / update
        )

    assert apart(weight=0.5) == 0  # powers of two cancel in every bit
    assert 0 < apart(weight=0.9) < (5e-3 if dtype == "bfloat16" else 1e-7)  # others up to rounding
    assert apart(lam=0.25) == pytest.approx(0.75, abs=2e-3)
    assert apart(normalize=False) == pytest.approx(0.75, abs=2e-3)


def test_the_released_file_runs_in_mergekit_with_the_same_inert_weight(scratch):
    def merged(weight: float) -> dict[str, torch.Tensor]:
        text = recut.RELEASED.format(model=MODELS / "long", base=MODELS / "short", weight=weight, normalize="true",
                                     lam=1.0, dtype="bfloat16")  # fmt: skip
        return mm.tensors(mm.run_mergekit(text, scratch / f"theirs-{weight}"))

    first, start = merged(0.25), recut.tensors(MODELS / "short")
    assert recut.distance(first, merged(0.9)) < 5e-3 * recut.distance(first, start)


@pytest.mark.parametrize("lam", [1.0, 0.25])
def test_one_entry_over_the_other_specialist_gives_that_specialist(lam, scratch):
    """E D(d) = d: the mean over seeds is L + lambda (A - L), in noise of sqrt(3) lambda |A - L| per model."""
    seeds = 12
    found = recut.reading_a(MODELS / "long", MODELS / "short", scratch, seeds, lam=lam)
    noise = math.sqrt(3)
    assert found.along == pytest.approx(lam, abs=0.005)
    assert found.single_to_base == pytest.approx(2 * lam, rel=0.01)
    assert found.single_to_model == pytest.approx(math.hypot(1 - lam, noise * lam), rel=0.01)
    assert found.mean_to_model == pytest.approx(math.hypot(1 - lam, noise * lam / math.sqrt(seeds)), rel=0.01)


# ---- updates below half a step -------------------------------------------------------------------


def test_tiny_updates_are_erased_by_bfloat16_before_or_after_the_merge(scratch):
    found = recut.erasure(MODELS / "base", scratch, seeds=4)
    alone = found["one adapter folded into bfloat16"]
    assert alone.changed < 0.05 and alone.along < 0.1
    first = found["both folded into bfloat16, then t = 0.5"]
    assert first.changed < 0.05 and first.along < 0.1
    exact = found["both folded in while merging, float32 out"]
    assert exact.along == pytest.approx(1, abs=1e-4) and exact.length == pytest.approx(1, abs=1e-4)
    late = found["both folded in while merging, bfloat16 out"]
    assert late.changed < 0.05 and late.along < 0.1
    mean = found["A / 2 folded in, bfloat16 out, stochastic: mean of 4"]
    assert mean.along == pytest.approx(1, abs=0.03)
    dropped = found["A folded into bfloat16, then released dare_ties"]
    assert dropped.largest > 2 * alone.largest  # the steps that survive are multiplied by about 4
    assert dropped.changed == pytest.approx(alone.changed / 4, rel=0.1)


# ---- interpolation and extrapolation ---------------------------------------------------------------


@pytest.mark.parametrize("base", [None, "base"])
@pytest.mark.parametrize(("t", "end"), [(0.0, "long"), (1.0, "short")])
def test_end_points_of_model_folders_are_exact(t, end, base, scratch):
    surgeon.merge([str(MODELS / "long"), str(MODELS / "short")], method="interpolate", t=t, threads=1,
                  base=str(MODELS / base) if base else None, output=scratch / "out")  # fmt: skip
    found, expected = recut.tensors(scratch / "out"), recut.tensors(MODELS / end)
    assert sorted(found) == sorted(expected)
    for name, value in found.items():
        assert torch.equal(value.view(torch.int16), expected[name].view(torch.int16)), name


def test_sibling_shares_that_sum_to_one_do_not_depend_on_the_base(scratch):
    """b + (1 - t)(A - b) + t (L - b) = (1 - t) A + t L."""
    pair = [str(MODELS / "long"), str(MODELS / "short")]
    for place, base in (("with", str(MODELS / "base")), ("without", None)):
        surgeon.merge(
            pair, method="interpolate", t=0.3, base=base, dtype="float32", threads=1, output=scratch / place
        )
    one, two = recut.tensors(scratch / "with"), recut.tensors(scratch / "without")
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=1e-6, atol=2e-7)


@pytest.mark.parametrize("alpha", [2.0, -1.0, 0.4])
def test_cot_valve_goes_beyond_both_ends(alpha, scratch):
    """alpha = 2 gives b + 2 d, -1 gives b - d: exact in float32, whose 24 bits hold sums of these bfloat16s."""
    surgeon.merge([str(MODELS / "short")], base=str(MODELS / "long"), method="task-arithmetic", threads=1,
                  dtype="float32", output=scratch / "out", param={"lambda": alpha})  # fmt: skip
    long, short = recut.tensors(MODELS / "long"), recut.tensors(MODELS / "short")
    for name, value in recut.tensors(scratch / "out").items():
        exact = long[name].double() + alpha * (short[name].double() - long[name].double())
        torch.testing.assert_close(value.double(), exact, rtol=3e-7, atol=1e-9)


# ---- trimming in the released long-to-short code --------------------------------------------------


@pytest.mark.parametrize("entries", [999, 1000, 4096])
@pytest.mark.parametrize("removed", [0.8, 0.7, 0.25, 0.2])
def test_the_released_rule_keeps_one_or_two_entries_more(entries, removed):
    values = np.random.default_rng(entries).normal(0, 1, entries).astype(np.float32)
    base = np.zeros(entries, np.float32)
    theirs = dler.released_trim_count(np.abs(values), removed)
    ours = dler.ties_count(base, values, 1 - removed)
    assert theirs == entries - int(entries * removed) + 1
    assert ours == max(1, int((1 - removed) * entries)) and 1 <= theirs - ours <= 2


def test_the_released_rule_keeps_every_tie():
    base, tuned = dler.simulated_pair(1e-4, ENTRIES)
    size = np.abs(tuned.astype(np.float64) - base)
    assert dler.released_trim_count(size, 0.8) > 1.8 * dler.ties_count(base, tuned, 0.2)
    states = [{"w": torch.from_numpy(v)} for v in (tuned, base)]
    merged = surgeon.merge(states, method="ties", density=(0.2,), param={"trim_ties": "all"}, threads=1)
    assert isinstance(merged, dict)
    assert int((merged["w"] != states[1]["w"]).sum()) == dler.released_trim_count(size, 0.8)


# ---- what the command says --------------------------------------------------------------------------


def pair_of_files(spread: float, place: Path) -> tuple[Path, Path]:
    base, tuned = dler.simulated_pair(spread, ENTRIES)
    return dler.write_tensor(place / "tuned.safetensors", tuned), dler.write_tensor(
        place / "base.safetensors", base
    )


def test_a_scale_that_did_not_come_out_is_said(scratch, surgeon):
    tuned, base = pair_of_files(1e-5, scratch)
    result = surgeon("merge", tuned, base, "--method", "dler", "-o", scratch / "out.safetensors")
    assert result.code == 0
    assert "keep has no effect" in result.err and "effective scale is 0.89, not 0.7" in result.err
    fine = ("--param", "rounding=stochastic", "-o", scratch / "fine.safetensors")
    assert "effective scale is" not in surgeon("merge", tuned, base, "--method", "dler", *fine).err


def test_a_scale_that_came_out_is_not_remarked_upon(scratch, surgeon):
    tuned, base = pair_of_files(1e-3, scratch)
    result = surgeon("merge", tuned, base, "--method", "dler", "-o", scratch / "out.safetensors")
    assert result.code == 0 and "effective scale 0.70" in result.out
    assert "keep has no effect" not in result.err and "effective scale is" not in result.err


def test_equal_models_are_said(scratch, surgeon):
    _, base = pair_of_files(1e-3, scratch)
    other = scratch / "same.safetensors"
    other.write_bytes(base.read_bytes())
    result = surgeon("merge", other, base, "--method", "dler", "-o", scratch / "out.safetensors")
    assert result.code == 0 and "the result is the base" in result.err
    assert dler.read_tensor(scratch / "out.safetensors").tobytes() == dler.read_tensor(base).tobytes()
