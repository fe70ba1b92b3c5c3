"""Streamed passes over views that were never written: the same hidden states as the models they stand for."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from structure_models import (
    both,
    close,
    ffn_cut,
    groups_cut,
    opened,
    removed,
    stock,
    strictly,
    without,
    write,
)
from walk_models import LENGTHS, Keeper, Nothing, texts

from surgeon.calibrate.walk import Settings, Walk
from surgeon.checkpoint.memory import MemoryCheckpoint
from surgeon.structure.cut import Cut, LayerCut
from surgeon.structure.views import MaskedView, PrunedView

ONE = Settings(threads=1, batch_tokens=64)
SAMPLES = texts(LENGTHS)


def hidden_states(view) -> list[torch.Tensor]:
    with Walk(view, SAMPLES, ONE) as walk:
        walk.run(Nothing())
        return [states for _, states in walk.hidden()]


@torch.no_grad()
def of_model(model) -> list[torch.Tensor]:
    return [model.base_model(input_ids=torch.from_numpy(s)[None]).last_hidden_state[0] for s in SAMPLES]


@pytest.mark.parametrize(
    "family", ["llama", "gemma2", "gpt2", "phi3", "qwen2_moe", "gpt_oss", "deepseek_v3", "bert"]
)
def test_walks_over_masked_and_pruned_models(family, scratch):
    checkpoint, structure = opened(family)
    heads = Cut.whole(structure.layers) if family in ("gpt2", "bert") else groups_cut(structure)
    cut = without(both(heads, ffn_cut(structure)), *(() if family == "bert" else (1,)))
    dense = stock(checkpoint.folder)
    with removed(dense, structure, cut):
        wanted = of_model(dense)
    small = of_model(strictly(write(PrunedView(checkpoint, structure, cut), scratch / "pruned")))
    for view in (MaskedView(checkpoint, structure, cut), PrunedView(checkpoint, structure, cut)):
        for found, one, two in zip(hidden_states(view), wanted, small, strict=True):
            close(found, one)
            close(found, two)


def test_a_walk_over_a_relabelled_model(scratch):
    checkpoint, structure = opened("llama", hidden_size=64, num_attention_heads=8, num_key_value_heads=4)
    cut = Cut((LayerCut(heads=(0, 1, 2, 3, 6, 7)),) * 3)
    view = PrunedView(checkpoint, structure, cut)
    assert view.config["model_type"] == "mistral"
    wanted = of_model(strictly(write(view, scratch / "pruned")))
    for found, one in zip(hidden_states(view), wanted, strict=True):
        close(found, one)


def test_heads_no_stock_class_holds_are_walked_masked():
    checkpoint, structure = opened("bert")
    cut = groups_cut(structure)
    dense = stock(checkpoint.folder)
    with removed(dense, structure, cut):
        wanted = of_model(dense)
    for found, one in zip(hidden_states(MaskedView(checkpoint, structure, cut)), wanted, strict=True):
        close(found, one)


def test_observers_see_narrow_inputs_of_solved_matrices():
    checkpoint, structure = opened("llama")
    cut = ffn_cut(structure)
    name = structure.ffn[1].output.weight
    solved = MemoryCheckpoint(
        "solved", {name: torch.randn(48, 20), f"{structure.ffn[0].output.module}.bias": torch.ones(48)}
    )
    module = structure.ffn[1].output.module
    seen = []
    for view in (
        MaskedView(checkpoint, structure, cut, solved),
        PrunedView(checkpoint, structure, cut, solved),
    ):
        keeper = Keeper(lambda one: one == module)
        with Walk(view, SAMPLES, ONE) as walk:
            walk.run(keeper)
        seen.append(torch.cat([keeper.inputs[key] for key in sorted(keeper.inputs, key=str)]))
    keep = list(cut.layers[1].channels)
    assert seen[0].shape[1] == 48 and seen[1].shape[1] == 20
    assert np.allclose(seen[0][:, keep], seen[1], atol=1e-5)
