"""Every shipped recipe runs on the trained models, does what its comment says, and stands in the index."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from surgeon import api
from surgeon.checkpoint.checkpoint import open_path
from surgeon.kernels.cast import round_to, widen
from surgeon.recipe import mergekit_yaml

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "recipes"
RECIPES = sorted((FOLDER / "long-to-short").glob("*.yaml"))
BY_NAME = {path.stem: path for path in RECIPES}
MODELS = ROOT / "tests" / "models"
PLACES = {name: MODELS / name for name in ("base", "long", "short")}
ADJUSTMENTS = ("aim", "acm", "sens", "fim", "delta_rank", "layer_scores")

Values = dict[str, np.ndarray]


def content(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


def adjustments(path: Path) -> tuple[str, ...]:
    return tuple(k for k in content(path).get("surgeon", {}) if k in ADJUSTMENTS)


MEASURED = [p for p in RECIPES if set(adjustments(p)) & {"aim", "acm", "sens", "fim"}]
PLAIN = [p for p in RECIPES if not adjustments(p)]
IN_MERGEKIT = [p for p in RECIPES if content(p)["merge_method"] != "lore"]


def values(path: Path) -> Values:
    checkpoint = open_path(path)
    return {
        name: widen(checkpoint.read(name, 0, info.elements), info.dtype)
        .astype(np.float64)
        .reshape(info.shape)
        for name, info in checkpoint.tensors.items()
    }


def text_of(name: str, places: dict[str, Path], *edits: tuple[str, str]) -> str:
    """Return a recipe's text with its placeholders filled in and calibration cut to a moment's work."""
    text = BY_NAME[name].read_text()
    for word, path in places.items():
        text = text.replace(f"./{word}", str(path))
    for old, new in (("samples: 100", "samples: 4, sequence_length: 64"), *edits):
        text = text.replace(old, new)
    return text


def run(name: str, out: Path, *edits: tuple[str, str], places: dict[str, Path] | None = None) -> Path:
    (spec,), notes = mergekit_yaml.parse(text_of(name, places or PLACES, *edits), name)
    assert not notes
    planned = api.plan_spec(spec, api.build_request(models=()))
    assert not planned.warnings, planned.warnings
    return planned.measure(out, threads=1).run(out, threads=1).path


FLOAT32 = (("out_dtype: bfloat16\n", ""), ("dtype: bfloat16\n", "dtype: float32\n"))
"""Edits that keep a result unrounded, to compare it with formulas."""


def exactly(name: str, place: Path, *edits: tuple[str, str]) -> Values:
    return values(run(name, place / name, *edits, *FLOAT32))


@pytest.fixture(scope="module")
def family() -> dict[str, Values]:
    return {name: values(path) for name, path in PLACES.items()}


# ---- the index -------------------------------------------------------------------------------------


def header(path: Path, key: str) -> str:
    found = re.search(rf"^# {key}: (.+)$", path.read_text(), re.MULTILINE)
    assert found, f"{path.name} lacks # {key}:"
    return found[1]


def test_the_index_lists_every_recipe_and_says_what_it_says():
    lines = (FOLDER / "README.md").read_text().splitlines()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if "](long-to-short/" in line
    ]
    expected = [
        [
            f"[{path.stem}]({path.relative_to(FOLDER)})",
            header(path, "models"),
            " + ".join([content(path)["merge_method"], *adjustments(path)]),
            header(path, "published"),
        ]
        for path in RECIPES
    ]
    assert rows == expected
    assert len(BY_NAME) == len(RECIPES), "two recipes have one name"


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_the_header_names_a_paper_and_what_to_sweep(path):
    head = " ".join(line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#"))
    assert re.search(r"arXiv \d{4}\.\d{5}", head)
    assert re.search(r"weep|several --seed", head)
    assert all(len(line) <= 130 for line in path.read_text().splitlines())


SETTINGS = {
    # size: trim k removed and alpha of TIES, alpha of task arithmetic, drop rate of DARE, alpha and T of Sens
    "1.5b": (0.8, 1.0, 0.7, 0.3, (0.4, 3)),
    "7b": (0.8, 1.0, 0.7, 0.3, (0.7, 2)),
    "14b": (0.2, 0.5, 0.7, 0.4, (0.8, 6)),
    "32b": (0.25, 0.55, 0.7, None, None),
}
"""The settings of arXiv 2503.20641 by size; k is the fraction removed, our density the fraction kept."""


@pytest.mark.parametrize("size", SETTINGS)
def test_settings_by_size(size):
    removed, alpha, arithmetic, drop, sens = SETTINGS[size]

    def recipe(kind: str) -> tuple[dict, float, dict]:
        data = content(BY_NAME[f"qwen2.5-{size}-{kind}"])
        assert data["base_model"] == "./short" and data["surgeon"]["text_from"] == "./long"
        (model,) = data["models"]
        assert model["model"] == "./long"
        return model["parameters"], data["parameters"]["lambda"], data["surgeon"]

    own, lam, _ = recipe("ties")
    assert own["density"] == pytest.approx(1 - removed) and lam == alpha
    assert recipe("task-arithmetic")[1] == arithmetic
    if drop is not None:
        for kind in ("dare-linear", "dare-ties"):
            assert recipe(kind)[0]["density"] == pytest.approx(1 - drop)
        own, lam, extra = recipe("aim-ties")
        assert own["density"] == pytest.approx(1 - removed) and lam == alpha and extra["aim"] == 0.4
    if sens is not None:
        _, lam, extra = recipe("sens")
        assert (lam, extra["sens"]["temperature"]) == sens


# ---- every recipe runs -----------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_runs_and_moves_weights(path, tmp_path, family):
    result = values(run(path.stem, tmp_path / "out"))
    for donor, other in family.items():
        assert sorted(other) == sorted(result)
        assert any((other[n] != result[n]).any() for n in result), f"{path.stem} only copies {donor}"
    assert all(np.isfinite(v).all() for v in result.values())


def test_the_long_model_gives_context_generation_and_template(tmp_path):
    """mergekit takes them from base_model, the short one: text_from is why a recipe can be served."""
    long = shutil.copytree(MODELS / "long", tmp_path / "long")
    config = json.loads((long / "config.json").read_text())
    (long / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 131072}))
    (long / "generation_config.json").write_text(json.dumps({"eos_token_id": [2], "temperature": 0.6}))
    (long / "chat_template.jinja").write_text("LONG {{ messages }}<think>")
    for name, path in BY_NAME.items():
        data = content(path)
        if path in MEASURED or not ({"long", "short"} <= set(re.findall(r"\./(\w+)", path.read_text()))):
            continue
        given = "text_from" in data.get("surgeon", {})
        (spec,), _ = mergekit_yaml.parse(text_of(name, {**PLACES, "long": long}), name)
        (model,) = api.plan_spec(spec, api.build_request(models=())).plan.models.values()
        files = {c.name: c.content.decode(errors="replace") for c in model.companions}
        from_long = given or data.get("base_model", data["models"][0]["model"]) == "./long"
        assert model.config is not None
        assert (model.config["max_position_embeddings"] == 131072) is from_long, name
        assert ("0.6" in files["generation_config.json"]) is from_long, name
        assert files["chat_template.jinja"].startswith("LONG") is from_long, name
        assert from_long or "./base" in path.read_text(), (
            f"{name} would answer with the short model's context"
        )


# ---- formulas ----------------------------------------------------------------------------------------


def trimmed(delta: np.ndarray, density: float) -> np.ndarray:
    """Return the largest entries of a float64 delta; ties at the threshold are set to NaN, for either choice."""
    size = np.abs(delta).reshape(-1)
    threshold = np.sort(size)[-max(1, int(density * size.size))]
    kept = np.where(np.abs(delta) > threshold, delta, 0.0)
    kept[np.abs(delta) == threshold] = np.nan
    return kept


def agree(result: np.ndarray, base: np.ndarray, change: np.ndarray, factor: float) -> None:
    known = ~np.isnan(change)
    np.testing.assert_allclose(result[known], (base + factor * change)[known], rtol=3e-7, atol=1e-9)


@pytest.mark.parametrize("name", [p.stem for p in PLAIN if content(p)["merge_method"] == "ties"])
def test_ties_recipes_add_the_trimmed_difference(name, tmp_path, family):
    data = content(BY_NAME[name])
    base, other = (family[m.strip("./")] for m in (data["base_model"], data["models"][0]["model"]))
    density, lam = data["models"][0]["parameters"]["density"], data["parameters"]["lambda"]
    result = exactly(name, tmp_path)
    for tensor, value in result.items():
        delta = other[tensor] - base[tensor]
        agree(value, base[tensor], trimmed(delta, density), lam)
        kept = max(1, int(density * delta.size))
        assert int((value != base[tensor]).sum()) == min(kept, np.count_nonzero(delta)), tensor


@pytest.mark.parametrize("name", [p.stem for p in PLAIN if content(p)["merge_method"] == "task_arithmetic"])
def test_task_arithmetic_recipes_add_differences(name, tmp_path, family):
    data = content(BY_NAME[name])
    base, lam = family[data["base_model"].strip("./")], data.get("parameters", {}).get("lambda", 1.0)
    for tensor, value in exactly(name, tmp_path).items():
        change = sum(m["parameters"]["weight"] * (family[m["model"].strip("./")][tensor] - base[tensor])
                     for m in data["models"])  # fmt: skip
        agree(value, base[tensor], np.asarray(change), lam)


@pytest.mark.parametrize("name", ["adar1-7b", "adar1-1.5b"])
def test_adar1_is_the_weighted_mean(name, tmp_path, family):
    weights = [m["parameters"]["weight"] for m in content(BY_NAME[name])["models"]]
    assert sum(weights) == pytest.approx(1)
    for tensor, value in exactly(name, tmp_path).items():
        mean = weights[0] * family["long"][tensor] + weights[1] * family["short"][tensor]
        np.testing.assert_allclose(value, mean, rtol=3e-7, atol=1e-8)


@pytest.mark.parametrize("name", [p.stem for p in PLAIN if content(p)["merge_method"].startswith("dare")])
def test_dare_recipes_drop_at_random_and_restore_the_norm(name, tmp_path, family):
    data = content(BY_NAME[name])
    base, lam = family[data["base_model"].strip("./")], data["parameters"].get("lambda", 1.0)
    entries = [(family[m["model"].strip("./")], m["parameters"]["density"]) for m in data["models"]]
    result = exactly(name, tmp_path)
    tensor = max(result, key=lambda n: result[n].size)
    moved = result[tensor] - base[tensor]
    deltas = [other[tensor] - base[tensor] for other, _ in entries]
    both = np.all([d != 0 for d in deltas], axis=0)
    survives = 1 - np.prod([1 - density for _, density in entries])
    assert np.mean(moved[both] != 0) == pytest.approx(survives, abs=4 * np.sqrt(0.25 / both.sum()))
    if len(entries) == 1:
        ratio = moved[moved != 0] / deltas[0][moved != 0]
        assert np.median(ratio) == pytest.approx(lam / entries[0][1], rel=0.03)
        assert np.ptp(ratio) < 1e-3 * abs(np.median(ratio)) + 1e-2


def test_dler_loses_nothing_larger_than_it_keeps_in_bfloat16(tmp_path, family):
    result, base, short = values(run("dler-25-70", tmp_path / "out")), family["long"], family["short"]
    for name in result:
        delta = short[name] - base[name]
        moved = result[name] != base[name]
        assert moved.sum() <= max(1, int(0.25 * delta.size))
        smallest = np.abs(delta[moved]).min() if moved.any() else 0
        lost = ~moved & (np.abs(delta) > smallest)
        expected = round_to((base[name][lost] + 0.7 * delta[lost]).astype(np.float32), "BF16")
        assert (expected == base[name][lost]).all()


# ---- adjustments: each against its own recipe without them ------------------------------------------------


def without(name: str) -> tuple[tuple[str, str], ...]:
    """Return edits that take the adjustments out of a recipe."""
    lines = BY_NAME[name].read_text().splitlines(keepends=True)
    return tuple((line, "") for line in lines if line.strip().partition(":")[0] in ADJUSTMENTS)


def change(name: str, place: Path, family: dict[str, Values]) -> tuple[Values, Values]:
    """Return result - short of a recipe as it is, and without its adjustments."""
    for folder in ("adjusted", "plain"):
        (place / folder).mkdir()
    pair = exactly(name, place / "adjusted"), exactly(name, place / "plain", *without(name))
    base = family["short"]
    return tuple({n: v[n] - base[n] for n in base} for v in pair)  # type: ignore[return-value]


@pytest.mark.parametrize("size", ["1.5b", "7b", "14b"])
def test_aim_pulls_channels_back_by_at_most_omega(size, tmp_path, family):
    adjusted, plain = change(f"qwen2.5-{size}-aim-ties", tmp_path, family)
    pulled = 0
    for name, moved in plain.items():
        there = np.abs(moved) > 1e-4
        ratio = adjusted[name][there] / moved[there]
        assert (ratio > 0.4 - 1e-2).all() and (ratio < 1 + 1e-2).all(), name
        if "embed" in name or name.endswith(".bias"):
            np.testing.assert_array_equal(adjusted[name], moved)
        elif there.any() and ratio.min() < 0.99:
            pulled += 1
    assert pulled > 10


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("qwen2.5-7b-acm-ties", 0.5, 1.0),
        ("qwen2.5-14b-acm-ties", 0.5, 1.0),
        ("qwen2.5-1.5b-fim-ties", 0.0, 1.0),
        ("qwen2.5-7b-fim-ties", 0.0, 1.0),
        ("qwen2.5-1.5b-sens", 0.0, 2.0),
        ("qwen2.5-7b-sens", 0.0, 2.0),
        ("qwen2.5-14b-sens", 0.0, 2.0),
    ],
)
def test_layer_strengths_are_one_factor_for_each_tensor(name, low, high, tmp_path, family):
    adjusted, plain = change(name, tmp_path, family)
    factors = {}
    for tensor, moved in plain.items():
        # Where entries tie at TIES' threshold, scaling may choose others of them: look above it.
        smallest = np.abs(moved[moved != 0]).min() if moved.any() else np.inf
        there = np.abs(moved) > 1.02 * smallest
        if there.sum() < 4:
            continue
        ratio = adjusted[tensor][there] / moved[there]
        factors[tensor] = float(np.median(ratio))
        np.testing.assert_allclose(ratio, factors[tensor], rtol=2e-3, err_msg=tensor)
        assert low < factors[tensor] <= high + 1e-6, (tensor, factors[tensor])
    assert len(factors) > 20 and len({round(f, 6) for f in factors.values()}) > 1


def test_twin_keeps_a_tenth_of_the_directions(tmp_path, family):
    torch = pytest.importorskip("torch")
    result = exactly("qwen2.5-7b-twin", tmp_path)
    for name, value in result.items():
        delta = family["long"][name] - family["short"][name]
        if delta.ndim == 2:
            u, s, v = torch.linalg.svd(torch.from_numpy(delta), full_matrices=False)
            rank = int(0.1 * min(delta.shape))
            delta = ((u[:, :rank] * s[:rank]) @ v[:rank]).numpy()
        np.testing.assert_allclose(value - family["short"][name], 0.7 * delta, rtol=1e-3,
                                   atol=2e-5 * np.abs(delta).max() + 1e-9, err_msg=name)  # fmt: skip


def test_lore_adds_the_large_directions_to_the_average(tmp_path, family):
    torch = pytest.importorskip("torch")
    result = exactly("qwen2.5-7b-lore", tmp_path)
    for name, value in result.items():
        mean, half = ((family["long"][name] + sign * family["short"][name]) / 2 for sign in (1, -1))
        if half.ndim == 2:
            u, s, v = torch.linalg.svd(torch.from_numpy(half), full_matrices=False)
            mean = mean + ((u * (s - 0.01).clamp_min(0)) @ v).numpy()
        np.testing.assert_allclose(
            value, mean, rtol=1e-6, atol=1e-5 * np.abs(half).max() + 1e-8, err_msg=name
        )


# ---- the other program --------------------------------------------------------------------------------


def run_mergekit(text: str, out: Path) -> Values:
    import contextlib
    import io
    import logging
    import warnings

    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), str(out),
                      MergeOptions(random_seed=0, quiet=True), config_source=text)  # fmt: skip
    finally:
        logging.disable(level)
    return values(out)


def compare_with_mergekit(name: str, place: Path, family: dict[str, Values]) -> None:
    """The extra key is accepted, and the weights are equal but for what chance or ties decide."""
    text = text_of(name, PLACES)
    theirs = run_mergekit(text, place / "theirs")
    data = content(BY_NAME[name])
    ours = values(run(name, place / "ours"))
    assert sorted(theirs) == sorted(ours)
    for tensor, value in ours.items():
        if data["merge_method"].startswith("dare") or adjustments(BY_NAME[name]):
            assert value.shape == theirs[tensor].shape
            continue
        unequal = value != theirs[tensor]
        if data["merge_method"] == "ties":
            base, other = (
                family[data["base_model"].strip("./")],
                family[data["models"][0]["model"].strip("./")],
            )
            tied = np.isnan(trimmed(other[tensor] - base[tensor], data["models"][0]["parameters"]["density"]))
            unequal &= ~tied
        assert not unequal.any(), (tensor, int(unequal.sum()))


def test_mergekit_accepts_the_extra_key(tmp_path, family):
    pytest.importorskip("mergekit")
    compare_with_mergekit("qwen2.5-7b-ties", tmp_path, family)


@pytest.mark.slow
@pytest.mark.parametrize("path", IN_MERGEKIT, ids=lambda p: p.stem)
def test_every_recipe_runs_in_mergekit(path, tmp_path, family):
    pytest.importorskip("mergekit")
    compare_with_mergekit(path.stem, tmp_path, family)
