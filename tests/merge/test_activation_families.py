"""Every family, in both storages: AIM reaches every weight along the right axis, ACM every layer."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from surgeon.architectures import get
from surgeon.calibrate.settings import Settings
from surgeon.calibrate.statistics import MeanAbsolute, collect
from surgeon.checkpoint.checkpoint import open_path
from surgeon.errors import InputError
from surgeon.merge import acm, aim
from surgeon.traits import head_name, is_tied

sys.path.insert(0, str(Path(__file__).parents[1] / "architectures"))
import tiny_models

MIXERS = (
    "minimax",
    "qwen3_next",
    "qwen3_5_moe_text",
    "lfm2_moe",
    "jamba",
    "granitemoehybrid",
    "kimi_linear",
    "nemotron_h",
)
"""Families some of whose layers mix tokens by convolutions and decays, which no input channels are seen of."""
ROUTED = [f for f in tiny_models.FAMILIES if any("expert" in key for key in tiny_models.FAMILIES[f])]


@pytest.fixture(
    scope="module",
    params=[
        (f, hub)
        for hub, families in ((True, tiny_models.FAMILIES), (False, ROUTED))
        for f in families
        if f not in MIXERS
    ],
)
def model(request, tmp_path_factory):
    """A tiny model of a family as the hub stores it, and as the library holds it in memory."""
    return made(*request.param, tmp_path_factory)


def made(family, hub, tmp_path_factory):
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    built = tiny_models.build(family).float().eval()
    folder = tmp_path_factory.mktemp(family)
    built.save_pretrained(folder, save_original_format=hub)
    rng = np.random.default_rng(0)
    return built, open_path(folder), [rng.integers(3, 67, 30) for _ in range(2)]


def test_every_weight_is_damped_along_its_input_channels(model):
    built, base, samples = model
    shapes = {name: info.shape for name, info in base.tensors.items()}
    means = collect(base, samples, Settings(), MeanAbsolute())
    found = aim.damping(shapes, base.config, means, 0.4, tied=bool(is_tied(base)))
    assert not found.unreached and not found.silent and not means.unreached
    kinds = get(base.config["model_type"]).layout(base.config, shapes).tensors
    head = head_name(shapes)
    for name, shape in shapes.items():
        kind = kinds[name].kind
        whole = "embed" in name or kind.endswith(("bias", "embedding", "correction", "sink"))
        if whole or (is_tied(base) and name == head):
            assert name not in found.factors
            continue
        factors = found.factors[name]
        assert np.broadcast_shapes(factors.shape, shape) == shape and factors.ndim == len(shape)
        # The largest channel of every module, of every expert, has exactly omega.
        lowest = factors.reshape(len(factors) if len(shape) == 3 else 1, -1).min(1)
        np.testing.assert_allclose(lowest, 0.4, rtol=1e-6)
        module = dict(built.named_modules()).get(name.removesuffix(".weight"))
        if isinstance(module, torch.nn.Linear):
            assert factors.shape == (1, module.in_features)
        elif module is not None and type(module).__name__ == "Conv1D":
            assert factors.shape == (shape[0], 1)


def test_a_model_and_itself_agree_in_every_layer(model):
    _, base, samples = model
    scores, _ = acm.measure(base, base, samples, Settings())
    assert set(scores.layers) == {0, 1, 2} and set(scores.layers.values()) == {0.5}
    outside = [name for name in base.tensors if ".layer" not in name and ".h." not in name]
    named = [name for name in outside if scores.factor(name) == 0.5]
    assert any("embed" in name or "wte" in name for name in named)
    if base.config["model_type"] != "bert":  # no norm after its last layer
        assert any("norm" in name or "ln_f" in name for name in named)
    head = head_name(base.tensors)
    assert is_tied(base) or head in named


@pytest.mark.parametrize("family", MIXERS)
def test_what_mixes_tokens_is_left_alone_and_said(family, tmp_path_factory):
    _, base, samples = made(family, True, tmp_path_factory)
    shapes = {name: info.shape for name, info in base.tensors.items()}
    means = collect(base, samples, Settings(), MeanAbsolute())
    found = aim.damping(shapes, base.config, means, 0.4, tied=bool(is_tied(base)))
    silent = {*means.unreached, *found.unreached}
    assert all(re.search(r"conv|dt_proj", name) for name in silent), silent
    assert not any(name.removesuffix(".weight") in silent for name in found.factors)
    assert any(re.search(r"experts|input_linear", name) for name in found.factors)
    try:
        scores, _ = acm.measure(base, base, samples, Settings())
    except InputError as error:  # a layer that is nothing but a mixer has no MLP output to compare
        assert error.code == "E389" and family in ("lfm2_moe", "jamba", "nemotron_h")
    else:
        assert set(scores.layers.values()) == {0.5}
