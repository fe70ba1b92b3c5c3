"""Scales folded into what produces a vector: the function stays, in every family, and reads do not depend on pieces."""

from __future__ import annotations

import shutil
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "calibrate"))


from walk_models import model_folder, stock  # puts tiny_models in reach

from tiny_models import FAMILIES  # isort: skip

from surgeon.calibrate.matrices import matrices_of
from surgeon.calibrate.pieces import read_tensor
from surgeon.calibrate.settings import Settings
from surgeon.calibrate.skeleton import Skeleton
from surgeon.checkpoint.checkpoint import open_path
from surgeon.errors import InputError
from surgeon.kernels.cast import widen
from surgeon.quantize.awq_fold import fold
from surgeon.quantize.awq_sites import Site, Span, sites_of
from surgeon.quantize.scaled_view import Factor, ScaledView

QUICK = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "mixtral", "qwen2_moe", "phi3")
MHA = (("num_key_value_heads", 4),)
"""As many value heads as query heads."""


def everything(folder):
    checkpoint = open_path(folder)
    layers = matrices_of(checkpoint, Skeleton(checkpoint, Settings()))
    return checkpoint, layers, *sites_of(checkpoint, layers)


def scales_for(site: Site, generator) -> np.ndarray:
    return np.exp2(generator.uniform(-2, 2, site.width)).astype(np.float32)


def scaled_everywhere(folder, seed=0):
    """Return the source, and a view with other scales at every site."""
    checkpoint, _, plan, _ = everything(folder)
    generator = np.random.default_rng(seed)
    factors, vectors = [], {}
    for site in (site for layer in plan for site in layer):
        folded = fold(checkpoint, site, scales_for(site, generator))
        factors += folded.factors
        vectors |= folded.vectors
    return checkpoint, ScaledView(checkpoint, factors, vectors), plan


def written(view, folder: Path, place: Path) -> Path:
    """Write a view as a model of its own."""
    shutil.copytree(folder, place, ignore=shutil.ignore_patterns("*.safetensors*"))
    types = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    tensors = {name: read_tensor(view, name, 0, info.elements, types[info.dtype]).reshape(info.shape).contiguous()
               for name, info in view.tensors.items()}  # fmt: skip
    safetensors.torch.save_file(tensors, place / "model.safetensors", {"format": "pt"})
    return place


def logits(folder: Path) -> torch.Tensor:
    ids = torch.from_numpy(np.random.default_rng(3).integers(3, 67, (2, 12)))
    with torch.no_grad():
        model = stock(folder)
        if any("experts" in name for name, _ in model.named_modules()):
            model.set_experts_implementation("eager")  # the grouped kernels know no float64
        out = model.double()(ids)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


@pytest.mark.parametrize(
    ("family", "extra"),
    [
        *((family, ()) for family in QUICK),
        ("phi3", MHA),
        ("qwen2", MHA),
        pytest.param("nemotron_h", (("moe_latent_size", 12),), marks=pytest.mark.slow),
        *(pytest.param(family, (), marks=pytest.mark.slow) for family in FAMILIES if family not in QUICK),
    ],
)
def test_function_is_preserved(family, extra, tmp_path):
    folder = model_folder(family, extra)
    source, view, plan = scaled_everywhere(folder)
    changed = view.changed()
    kinds = {site.kind for layer in plan for site in layer}
    assert changed and ("norm" in kinds) == (family not in ("bert", "minimax"))
    assert ("up" in kinds) == (family not in ("gpt2", "bert", "phi", "gpt_oss", "nemotron_h"))
    before = logits(folder)
    after = logits(written(view, folder, tmp_path / "scaled"))
    apart = float((after - before).abs().max() / before.abs().max())
    assert apart < 2e-5, apart
    # A model in which only the consumers are scaled is another one: the comparison can fail.
    if family == "llama":
        only = [factor for factor in view._factors["model.layers.1.self_attn.q_proj.weight"]]
        broken = ScaledView(source, only, {})
        assert float((logits(written(broken, folder, tmp_path / "broken")) - before).abs().max()) > 1e-2


def in_bfloat16(folder: Path, place: Path, change=None) -> Path:
    """Return a copy of a model stored in bfloat16."""
    shutil.copytree(folder, place)
    tensors = safetensors.torch.load_file(place / "model.safetensors")
    tensors = {name: value.to(torch.bfloat16) for name, value in tensors.items()}
    if change is not None:
        change(tensors)
    safetensors.torch.save_file(tensors, place / "model.safetensors", {"format": "pt"})
    return place


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_rounding_the_gain_costs_nothing(family, tmp_path):
    """g' times what the readers are multiplied by is g again, whatever bfloat16 made of g / s."""
    folder = in_bfloat16(model_folder(family), tmp_path / "model")
    checkpoint, _, plan, _ = everything(folder)
    site = next(site for site in plan[1] if site.kind == "norm")
    scales = scales_for(site, np.random.default_rng(0))
    folded = fold(checkpoint, site, scales)
    name = site.producers[0].tensor
    gain = widen(checkpoint.read(name, 0, site.width), "BF16").astype(np.float64) + site.offset
    stored = widen(folded.vectors[name], "BF16").astype(np.float64) + site.offset
    assert site.offset == (1.0 if family == "gemma2" else 0.0)
    assert np.allclose(stored * folded.scales, gain, rtol=1e-6, atol=0)
    naive = np.abs(stored * scales / gain - 1).max()
    assert naive > 1e-3, "bfloat16 rounded nothing: the comparison says nothing"
    # What is left is one rounding of each scaled weight.
    view = ScaledView(checkpoint, folded.factors, folded.vectors)
    consumer = next(factor for factor in folded.factors if factor.span.tensor.endswith("q_proj.weight"))
    info = checkpoint.tensors[consumer.span.tensor]
    before = widen(checkpoint.read(info.name, 0, info.elements), "BF16").reshape(info.shape)
    after = widen(view.read(info.name, 0, info.elements), "BF16").reshape(info.shape)
    apart = np.abs(after / folded.scales - before) / np.abs(before)
    assert 1e-4 < apart.max() <= 2**-8
    x = np.random.default_rng(1).standard_normal((200, info.shape[1]))
    exact = (x * gain) @ before.T.astype(np.float64)
    energy = float((((x * stored) @ after.T - exact) ** 2).sum() / (exact**2).sum())
    assert energy < 4e-6


def test_a_gain_that_would_vanish_stays(tmp_path):
    """1 + w near 0: w' = g / s - 1 can round to -1, after which no scale brings the channel back."""

    def change(tensors):
        tensors["model.layers.1.input_layernorm.weight"][:3] = torch.tensor([-1.0, -0.99609375, 0.0])

    folder = in_bfloat16(model_folder("gemma2"), tmp_path / "model", change)
    checkpoint, _, plan, _ = everything(folder)
    site = next(site for site in plan[1] if site.kind == "norm" and "input" in site.name)
    folded = fold(checkpoint, site, np.full(site.width, 64.0, np.float32))
    name = site.producers[0].tensor
    stored = widen(folded.vectors[name], "BF16")
    assert stored[0] == -1 and stored[1] == np.float32(-0.99609375) and list(folded.scales[:2]) == [1, 1]
    assert folded.scales[2] == pytest.approx(64, rel=0.02) and stored[2] < -0.9


@pytest.mark.parametrize(("family", "extra"), [("qwen2", MHA), ("granitemoe", ())])
def test_pieces_equal_the_whole(family, extra):
    _, view, _ = scaled_everywhere(model_folder(family, extra))
    generator = np.random.default_rng(0)
    for name in view.changed():
        count = view.tensors[name].elements
        whole = view.read(name, 0, count)
        borders = sorted({0, count, *generator.integers(0, count, 7).tolist()})
        parts = [view.read(name, a, b) for a, b in pairwise(borders)]
        assert np.array_equal(np.concatenate(parts), whole)
        assert view.computed(name)


def test_a_stack_of_experts_is_scaled_expert_by_expert():
    checkpoint, view, plan = scaled_everywhere(model_folder("granitemoe"))
    site = next(site for site in plan[1] if site.kind == "up" and site.producers[0].expert == 2)
    up, down = site.producers[0], site.consumers[0]
    values = [
        np.asarray(read_tensor(source, up.tensor, 0, checkpoint.tensors[up.tensor].elements, torch.float32))
        .reshape(checkpoint.tensors[up.tensor].shape) for source in (checkpoint, view)
    ]  # fmt: skip
    norm = next(site for site in plan[1] if site.kind == "norm" and "post" in site.name)
    generator = np.random.default_rng(0)
    drawn = {other.name: scales_for(other, generator) for layer in plan for other in layer}
    expected = values[0][2].copy() * fold(checkpoint, norm, drawn[norm.name]).scales
    assert up.start == up.length and down.expert == 2
    expected[up.start :] /= drawn[site.name][:, None]
    assert np.allclose(values[1][2], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("family", "extra", "place", "reason"),
    [
        ("llama", (), "self_attn.o_proj.weight", "share each value head"),
        ("minimax", (), "post_attention_layernorm", "stream as well"),
        ("phi", (), "mlp.fc2.weight", "an activation"),
        ("gpt_oss", (), "experts", "clamped"),
        ("deepseek_v3", (), "self_attn.o_proj.weight", "no value projection"),
    ],
)
def test_places_that_are_left_alone(family, extra, place, reason):
    *_, skipped = everything(model_folder(family, extra))
    assert any(entry.name.endswith(place) and reason in entry.reason for entry in skipped)


def test_an_unknown_reader_keeps_the_norm_as_it_is(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model_folder("llama"), folder)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.indexer.weight"] = torch.ones(4, 32)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    _, _, plan, skipped = everything(folder)
    assert [site.kind for site in plan[1]] == ["up"] and {site.kind for site in plan[0]} == {"norm", "up"}
    assert sum("indexer" in entry.reason for entry in skipped) == 2


def test_factors_must_fit():
    checkpoint = open_path(model_folder("llama"))
    name = "model.layers.0.mlp.up_proj.weight"
    rows = checkpoint.tensors[name].shape[0]
    for span, values in (
        (Span(name, 0, 1, rows), np.ones(rows, np.float32)),
        (Span(name, 0, 0, rows), np.zeros(rows, np.float32)),
        (Span(name, 0, 0, rows), np.ones(rows, np.float64)),
        (Span(name, 2, 0, rows), np.ones(rows, np.float32)),
    ):
        with pytest.raises(ValueError):
            ScaledView(checkpoint, [Factor(span, values)], {})


def test_float16_that_overflows_is_an_error(tmp_path):
    folder = in_bfloat16(model_folder("llama"), tmp_path / "model")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    safetensors.torch.save_file({n: v.half() for n, v in tensors.items()}, folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    checkpoint = open_path(folder)
    view = ScaledView(checkpoint, [Factor(Span(name, 1, 0, 32), np.full(32, 1e6, np.float32))], {})
    with pytest.raises(InputError) as refused:
        view.read(name, 0, 64)
    assert refused.value.code == "E487"
