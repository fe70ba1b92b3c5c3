"""Every shipped recipe runs on the trained models, and does what its comment says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from surgeon import api
from surgeon.checkpoint.checkpoint import open_path
from surgeon.kernels.cast import widen
from surgeon.recipe import mergekit_yaml

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
MODELS = ROOT / "tests" / "models"


def values(path: Path) -> dict[str, np.ndarray]:
    checkpoint = open_path(path)
    return {
        name: widen(checkpoint.read(name, 0, info.elements), info.dtype).astype(np.float64)
        for name, info in checkpoint.tensors.items()
    }


def run(name: str, tmp_path: Path, **edits: str):
    text = (ROOT / "recipes" / "merge" / f"{name}.yaml").read_text()
    for word in ("base", "long", "short"):
        text = text.replace(f"./{word}", str(MODELS / word))
    for old, new in edits.items():
        text = text.replace(old.replace("_", " "), new)
    specs, _ = mergekit_yaml.parse(text, name)
    outcome = api.plan_spec(specs[0], api.build_request(models=())).run(tmp_path / name)
    return values(outcome.path)


def test_recipes_exist():
    assert len(RECIPES) >= 6


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_recipe_runs_and_moves_weights(recipe, tmp_path):
    result = run(recipe.stem, tmp_path)
    for donor in ("base", "long", "short"):
        other = values(MODELS / donor)
        assert sorted(other) == sorted(result)
        assert any((other[n] != result[n]).any() for n in result), f"{recipe.stem} only copies {donor}"


def bf16(x: np.ndarray) -> np.ndarray:
    from surgeon.kernels.cast import round_to

    return round_to(x.astype(np.float32), "BF16").astype(np.float64)


def test_adar1_is_the_mean(tmp_path):
    result, long, short = (
        run("adar1-interpolation", tmp_path),
        values(MODELS / "long"),
        values(MODELS / "short"),
    )
    for name in result:
        np.testing.assert_array_equal(result[name], bf16((long[name] + short[name]) / 2))


def test_cot_valve_extrapolates_beyond_short(tmp_path):
    result, long, short = (
        run("cot-valve-extrapolation", tmp_path),
        values(MODELS / "long"),
        values(MODELS / "short"),
    )
    for name in result:
        expected = long[name].astype(np.float32) + np.float32(1.2) * (short[name] - long[name]).astype(
            np.float32
        )
        np.testing.assert_allclose(result[name], bf16(expected), rtol=2**-7, atol=1e-30)


def test_dler_keeps_a_quarter_scaled(tmp_path):
    result, base, short = (
        run("dler-keep25-scale70", tmp_path),
        values(MODELS / "base"),
        values(MODELS / "short"),
    )
    for name in result:
        delta = short[name] - base[name]
        moved = result[name] != base[name]
        assert moved.sum() <= max(1, int(0.25 * delta.size))
        smallest = np.abs(delta[moved]).min() if moved.any() else 0
        # nothing larger than a kept update was dropped, unless 0.7 of it vanishes in bfloat16
        lost = ~moved & (np.abs(delta) > smallest)
        assert (bf16(base[name][lost] + 0.7 * delta[lost]) == base[name][lost]).all()
