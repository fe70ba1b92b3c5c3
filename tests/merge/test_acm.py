"""Consensus merging: mutual information against closed forms and brute force, strengths, layer scores."""

from __future__ import annotations

import json
import math
import threading
from collections import Counter
from pathlib import Path

import merge_models as mm
import numpy as np
import pytest
import torch
import transformers

from surgeon.calibrate import information, paired_outputs
from surgeon.calibrate.information import Moments
from surgeon.calibrate.settings import Settings
from surgeon.checkpoint.checkpoint import open_path
from surgeon.errors import InputError, Interrupted, UsageError
from surgeon.merge import acm
from surgeon.merge.layer_scores import read_layer_scores, write_layer_scores

MODELS = Path(__file__).parents[1] / "models"

CAP = 12 * math.log(2)


def normal_pairs(rho: float, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x, e = rng.standard_normal((2, count))
    return x, rho * x + math.sqrt(1 - rho * rho) * e


# ---- estimators --------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0.0, 0.3, -0.6, 0.9, 0.999])
def test_the_gaussian_estimate_is_that_of_the_correlation(rho):
    x, y = normal_pairs(rho, 200_000)
    sample = np.corrcoef(x, y)[0, 1]
    assert information.gaussian(x, y) == pytest.approx(-0.5 * math.log(1 - sample**2), rel=1e-9, abs=1e-15)
    assert information.gaussian(x, y) == pytest.approx(-0.5 * math.log(1 - rho**2), rel=0.02, abs=1e-4)


@pytest.mark.parametrize(("rho", "exact"), [(0.5, 0.14384), (0.9, 0.83037)])
def test_the_binned_estimate_converges_to_the_same_number(rho, exact):
    x, y = normal_pairs(rho, 400_000)
    # (64 - 1)^2 / 2n of bias for 400,000 pairs is 0.005; binning itself loses a little.
    assert information.binned(x, y) == pytest.approx(exact, abs=0.02)
    assert exact == pytest.approx(-0.5 * math.log(1 - rho**2), abs=1e-5)


def test_independent_numbers_share_nothing():
    x, y = normal_pairs(0.0, 400_000)
    assert information.gaussian(x, y) < 1e-4
    assert information.binned(x, y) == pytest.approx(63**2 / (2 * 400_000), rel=0.1)


def test_a_dependence_without_correlation_is_seen_by_bins_only():
    x = np.random.default_rng(1).standard_normal(100_000)
    assert information.gaussian(x, x * x) < 1e-3
    assert information.binned(x, x * x) > 3


@pytest.mark.parametrize("seed", [0, 1])
def test_equal_activations_give_a_finite_value_that_does_not_depend_on_them(seed):
    x = np.random.default_rng(seed).standard_normal((7, 900)).astype(np.float32) * 10.0**seed
    assert information.gaussian(x, x) == pytest.approx(CAP)
    assert information.gaussian(x, -3 * x) == pytest.approx(CAP)
    assert information.binned(x, x) == pytest.approx(math.log(64), abs=1e-3)
    assert information.literal(x, x) == pytest.approx(math.log(x.size), abs=0.01)


def test_the_estimates_do_not_depend_on_scale_or_place():
    x, y = normal_pairs(0.7, 5_000)
    for change in (lambda v: v * 1e-30, lambda v: v * 1e30 + 1e30, lambda v: -v):
        assert information.gaussian(change(x), y) == pytest.approx(information.gaussian(x, y), rel=1e-6)
    assert information.binned(x * 4 + 1, y) == pytest.approx(information.binned(x, y), abs=1e-12)
    assert information.literal(x * 4, y) == information.literal(x, y)


def test_constants_carry_no_information_unless_they_are_equal():
    x = np.random.default_rng(0).standard_normal(50)
    zero = np.zeros(50)
    assert information.gaussian(x, zero) == 0.0
    assert information.binned(x, zero) == pytest.approx(0.0, abs=1e-12)
    assert information.gaussian(zero, zero) == pytest.approx(CAP)


def test_sums_over_parts_are_the_sums_over_all():
    x, y = normal_pairs(0.8, 10_001)
    x, y = x + 1e4, y - 3
    total = Moments()
    for cut in np.array_split(np.arange(x.size), [0, 3, 17, 5_000]):
        total = total.plus(Moments.of(x[cut], y[cut]))
    whole = Moments.of(x, y)
    for field in ("count", "mean_x", "mean_y", "xx", "yy", "xy", "distance"):
        assert getattr(total, field) == pytest.approx(getattr(whole, field), rel=1e-9)
    assert total.information() == pytest.approx(-0.5 * math.log(1 - np.corrcoef(x, y)[0, 1] ** 2), rel=1e-9)


def counted(x, y) -> float:
    """The definition: sum over pairs of p(x, y) ln(p(x, y) / p(x) p(y))."""
    n = len(x)
    left, right, both = Counter(x), Counter(y), Counter(zip(x, y, strict=True))
    return sum(k / n * math.log(k * n / (left[a] * right[b])) for (a, b), k in both.items())


@pytest.mark.parametrize("levels", [1, 3, 50])
def test_the_literal_estimate_is_the_definition_on_labels(levels):
    rng = np.random.default_rng(levels)
    x = rng.integers(0, levels, 400).astype(np.float32) / 3
    y = np.where(rng.random(400) < 0.5, x, rng.integers(0, levels, 400)).astype(np.float32)
    assert information.literal(x, y) == pytest.approx(counted(x.tolist(), y.tolist()), abs=1e-12)


def test_the_literal_estimate_of_floats_is_close_to_ln_n_whatever_they_are():
    """Why it is not the default: independent and identical activations look the same."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 4096)).astype(np.float32)
    assert information.literal(x, y) == pytest.approx(math.log(4096), abs=0.01)
    assert information.literal(x, x) == pytest.approx(information.literal(x, y), abs=0.01)


def test_binned_is_the_definition_on_bins():
    x, y = (v.astype(np.float32) for v in normal_pairs(0.6, 3_000))
    borders = [np.sort(v)[np.arange(1, 8) * 3_000 // 8] for v in (x, y)]
    labels = [np.digitize(v, b).tolist() for v, b in zip((x, y), borders, strict=True)]
    assert information.binned(x, y, 8) == pytest.approx(counted(*labels), abs=1e-12)


def test_ties_share_a_bin():
    x = np.repeat([0.0, 0.0, 0.0, 1.0, 2.0], 100)  # as after a ReLU
    assert information.binned(x, x) == pytest.approx(information.literal(x, x), abs=1e-12)


def test_arrays_of_different_shape_are_a_mistake():
    with pytest.raises(ValueError, match="shapes"):
        information.gaussian(np.zeros(3), np.zeros(4))


# ---- strengths ---------------------------------------------------------------------------------


def test_strengths_are_those_of_the_paper():
    values = {
        "model.layers.0.mlp.down_proj": np.array([1.0, 3.0]),
        "model.layers.1.mlp.down_proj": np.array([0.0, 0.5]),
    }
    found = acm.strengths(values, 0.7)
    for place, of_samples in values.items():
        s = [1 / (1 + math.exp(-0.7 * (v - 3.0))) for v in of_samples]
        assert found[place] == pytest.approx(1 - sum(s) / 2, rel=1e-12)
        assert 0.5 <= found[place] < 1
    # The layer with more in common moves less.
    assert found["model.layers.0.mlp.down_proj"] < found["model.layers.1.mlp.down_proj"]


def test_equal_models_move_every_layer_by_one_half():
    values = {f"model.layers.{i}.mlp.down_proj": np.full(3, CAP) for i in range(4)}
    assert set(acm.strengths(values).values()) == {0.5}


def test_a_very_different_layer_keeps_its_whole_step():
    values = {"model.layers.0.x": np.array([8.0]), "model.layers.1.x": np.array([0.0])}
    assert acm.strengths(values, 1e3)["model.layers.1.x"] == 1.0  # exp(8000) must not overflow


def test_scores_reach_every_tensor_of_a_layer_and_the_places_outside():
    scores = acm.layer_scores({
        "model.embed_tokens": np.array([2.0]), "model.layers.0.mlp.down_proj": np.array([1.0]),
        "model.layers.1.mlp.down_proj": np.array([0.0]), "model.norm": np.array([0.5]),
    })  # fmt: skip
    expected = {v: 1 - 1 / (1 + math.exp(-0.7 * (v - 2.0))) for v in (2.0, 1.0, 0.5, 0.0)}
    assert scores.factor("model.layers.0.self_attn.q_proj.bias") == pytest.approx(expected[1.0])
    assert scores.factor("model.layers.1.input_layernorm.weight") == pytest.approx(expected[0.0])
    assert scores.factor("model.norm.weight") == pytest.approx(expected[0.5])
    assert scores.factor("model.embed_tokens.weight") == pytest.approx(0.5)
    assert scores.factor("lm_head.weight") == 1.0  # not measured


@pytest.mark.parametrize("theta", [0.0, -1.0, math.nan, math.inf])
def test_theta_must_be_positive(theta):
    with pytest.raises(UsageError) as caught:
        acm.strengths({"a": np.ones(1)}, theta)
    assert caught.value.code == "E233"


@pytest.mark.parametrize("values", [{}, {"model.layers.0.x": np.array([np.nan])}, {"a": np.zeros(0)}])
def test_what_was_not_measured_is_refused(values):
    with pytest.raises(InputError) as caught:
        acm.strengths(values)
    assert caught.value.code == "E356"


# ---- whole models ------------------------------------------------------------------------------


def samples_of(vocabulary: int, lengths=(9, 6, 12)) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, vocabulary, n) for n in lengths]


def stock(folder: Path):
    auto = transformers.AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def hooked(model, samples, watched: dict[str, str]) -> dict[str, list[np.ndarray]]:
    """Outputs of modules by brute force: place -> one array a sample; ``watched`` maps places to modules."""
    found: dict[str, list[np.ndarray]] = {}

    def hook(place):
        def note(module, args, output):
            value = output if isinstance(output, torch.Tensor) else output[0]
            found.setdefault(place, []).append(value.detach().float().reshape(-1, value.shape[-1]).numpy())

        return note

    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_hook(hook(place)) for place, name in watched.items()]
    with torch.no_grad():
        for ids in samples:
            model(input_ids=torch.from_numpy(ids)[None])
    for handle in handles:
        handle.remove()
    return found


def watched_places(kind: str, layers: int) -> dict[str, str]:
    if kind == "gpt2":
        places = {f"transformer.h.{i}.mlp.c_proj": f"transformer.h.{i}.mlp.c_proj" for i in range(layers)}
        return {"transformer.wte": "transformer.wte", **places, "transformer.ln_f": "transformer.ln_f"}
    leaf = "mlp" if kind in {"qwen3_moe", "mixtral"} else "mlp.down_proj"
    places = {f"model.layers.{i}.{leaf}": f"model.layers.{i}.{leaf}" for i in range(layers)}
    return {"model.embed_tokens": "model.embed_tokens", **places, "model.norm": "model.norm"}


@pytest.mark.parametrize("estimator", ["gaussian", "binned"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3_moe", "mixtral"])
def test_two_models_give_what_hooks_on_the_stock_models_give(kind, estimator, scratch):
    """Families with experts are compared at the MoE block's own output, which no module of the file has."""
    folders = mm.family(kind, "float32")[:2]
    samples = samples_of(mm.ROWS)
    models = [stock(folder) for folder in folders]
    places = watched_places(kind, models[0].config.num_hidden_layers)
    tied = kind == "gpt2"
    if not tied:
        places |= {"lm_head": "lm_head"}
    first, second = (hooked(model, samples, places) for model in models)
    estimate = information.ESTIMATORS[estimator]
    found = paired_outputs.measure_information(
        *map(open_path, folders), samples, Settings(spill=scratch), estimator=estimator
    )
    assert list(found) == list(places)
    for place in places:
        wanted = [estimate(x, y) for x, y in zip(first[place], second[place], strict=True)]
        close = {"rel": 2e-3} if estimator == "gaussian" else {"abs": 0.1}  # one rank moved to the next bin
        assert found[place] == pytest.approx(wanted, **close), place
    assert not list(scratch.iterdir())


def test_the_models_of_the_repository(scratch):
    """Base and long: bounded factors, the same whether outputs lie in memory or in files."""
    base, long = open_path(MODELS / "base"), open_path(MODELS / "long")
    samples = samples_of(281, (30, 20))
    stages = []
    scores, made_by = acm.measure(base, long, samples, Settings(), progress=lambda *p: stages.append(p))
    assert set(scores.layers) == {0, 1, 2, 3} and all(0.5 <= f < 1 for f in scores.layers.values())
    assert (
        min((*scores.layers.values(), *(f for _, f in scores.tensors))) < 0.6
    )  # the largest MI is half a step
    assert stages[-1] == (7, 7) and stages == sorted(stages)
    assert made_by["tokens"] == 50 and set(made_by["mutual_information"]) == {
        "model.embed_tokens", "model.norm", *(f"model.layers.{i}.mlp.down_proj" for i in range(4)),
    }  # fmt: skip
    file = scratch / "scores.json"
    write_layer_scores(file, {"long": scores}, made_by)
    assert read_layer_scores(file)["long"].as_data() == scores.as_data()
    assert str(MODELS) not in json.dumps(made_by)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3_moe"])
def test_a_model_and_itself_have_equal_strengths_everywhere(kind):
    folder = mm.family(kind, "float32")[0]
    checkpoint = open_path(folder)
    scores, _ = acm.measure(checkpoint, checkpoint, samples_of(mm.ROWS), Settings())
    assert set(scores.layers.values()) == {0.5} and {f for _, f in scores.tensors} == {0.5}


def test_spilled_outputs_give_the_same_numbers(scratch, monkeypatch):
    folders = mm.family("llama", "float32")[:2]
    samples = samples_of(mm.ROWS)
    wanted = paired_outputs.measure_information(*map(open_path, folders), samples, Settings())
    capture = paired_outputs.OutputCapture
    made = []

    def small(*args, **options):
        made.append(capture(*args, **{**options, "memory_limit": 1000}))
        return made[-1]

    monkeypatch.setattr(paired_outputs, "OutputCapture", small)
    found = paired_outputs.measure_information(*map(open_path, folders), samples, Settings(spill=scratch))
    assert len(made) == 2 and all(c._written for c in made)
    for place, values in wanted.items():
        np.testing.assert_array_equal(found[place], values)


def test_many_logits_are_thinned_out_evenly(monkeypatch):
    folders = mm.family("llama", "float32")[:2]
    samples = samples_of(mm.ROWS)
    models = [stock(folder) for folder in folders]
    first, second = (hooked(model, samples, {"lm_head": "lm_head"})["lm_head"] for model in models)
    monkeypatch.setattr(paired_outputs, "LOGITS", 12 * 100)  # 267 entries, 12 tokens: every third
    found = paired_outputs.measure_information(*map(open_path, folders), samples, Settings())
    wanted = [information.gaussian(x[:, ::3], y[:, ::3]) for x, y in zip(first, second, strict=True)]
    assert found["lm_head"] == pytest.approx(wanted, rel=2e-3)
    without = paired_outputs.measure_information(*map(open_path, folders), samples, Settings(), head=False)
    assert "lm_head" not in without


def test_models_that_do_not_correspond_are_refused():
    llama, gpt2 = (open_path(mm.family(kind, "float32")[0]) for kind in ("llama", "gpt2"))
    with pytest.raises(InputError) as caught:
        acm.measure(llama, gpt2, samples_of(mm.ROWS), Settings())
    assert caught.value.code == "E389" and "gpt2" in caught.value.message
    with pytest.raises(UsageError) as wrong:
        acm.measure(llama, llama, samples_of(mm.ROWS), Settings(), estimator="exact")
    assert wrong.value.code == "E381"


def test_an_interruption_leaves_nothing_behind(scratch):
    stop = threading.Event()
    stop.set()
    checkpoint = open_path(mm.family("llama", "float32")[0])
    with pytest.raises(Interrupted):
        acm.measure(checkpoint, checkpoint, samples_of(mm.ROWS), Settings(spill=scratch), stop=stop)
    assert not list(scratch.iterdir())
