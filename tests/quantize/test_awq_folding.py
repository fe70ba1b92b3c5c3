"""Scales folded into what produces a vector: the function stays, in every family, and reads do not depend on pieces."""

from __future__ import annotations

import json
import shutil
import sys
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
from surgeon.kernels.cast import narrow, widen
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
