"""Dropping attention or FFN alone: against the stock model with zeroed output matrices."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "calibrate"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "architectures"))
from walk_models import model_folder, stock, texts

from surgeon.calibrate.settings import Settings
from surgeon.checkpoint.checkpoint import open_path
from surgeon.errors import UsageError
from surgeon.prune import subblocks
from surgeon.structure.find import structure_of
from surgeon.structure.views import MaskedView

ONE = Settings(threads=1, batch_tokens=64)


def last_states(model):
    with torch.no_grad():
        return [model.base_model(torch.from_numpy(s)[None]).last_hidden_state[0].double() for s in texts()]


def brute_force(folder, structure, drops):
    """Greedy removal: zero what each branch ends in, run the stock model, compare with the dense one."""
    branches = {
        (part.layer, kind): part.output
        for kind in subblocks.KINDS
        for part in getattr(structure, kind)
        if part is not None
    }
    dense = last_states(stock(folder))

    def damage(gone):
        model = stock(folder)
        with torch.no_grad():
            for branch in gone:
                module = model.get_submodule(branches[branch].module)
                module.weight.zero_()
                if module.bias is not None:
                    module.bias.zero_()
        found = last_states(model)
        top = sum(float((a - b).square().sum()) for a, b in zip(dense, found, strict=True))
        return top / sum(float(a.square().sum()) for a in dense)

    gone, scores, first = [], [0.0], {}
    for _ in range(drops):
        found = {branch: damage([*gone, branch]) for branch in branches if branch not in gone}
        first = first or found
        gone.append(min(found, key=found.__getitem__))
        scores.append(found[gone[-1]])
    return gone, scores, first


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "gemma2"])
def test_is_brute_force(family):
    folder = model_folder(family)
    checkpoint = open_path(folder)
    structure, told = structure_of(checkpoint), []
    found = subblocks.rank(checkpoint, structure, texts(), ONE, drop=3, progress=lambda *a: told.append(a))
    order, scores, importance = brute_force(folder, structure, 3)
    assert list(found.order) == order and told[-1] == (9, 9) and not found.notes
    np.testing.assert_allclose(found.scores, scores, rtol=1e-4)
    assert found.importance.keys() == importance.keys()
    for branch, score in importance.items():
        assert found.importance[branch] == pytest.approx(score, rel=1e-4)


def test_the_cut_is_the_model_that_was_scored():
    folder = model_folder("llama")
    checkpoint = open_path(folder)
    found = subblocks.rank(checkpoint, structure_of(checkpoint), texts(), ONE, drop=2)
    view = MaskedView(checkpoint, structure_of(checkpoint), found.cut(2))
    model = stock(folder)
    state = model.state_dict()
    for name, info in view.tensors.items():
        state[name].copy_(torch.from_numpy(view.read(name, 0, info.elements).reshape(info.shape).copy()))
    dense, cut = last_states(stock(folder)), last_states(model)
    top = sum(float((a - b).square().sum()) for a, b in zip(dense, cut, strict=True))
    assert top / sum(float(a.square().sum()) for a in dense) == pytest.approx(found.scores[2], rel=1e-4)


def test_one_kind_only_and_bad_requests():
    checkpoint = open_path(model_folder("llama"))
    structure = structure_of(checkpoint)
    found = subblocks.rank(checkpoint, structure, texts(), ONE, drop=1, kinds=["attention"])
    assert found.order[0][1] == "attention" and len(found.importance) == 3
    layer = found.cut(1).layers[found.order[0][0]]
    assert layer is not None and layer.heads == () and layer.channels is None
    with pytest.raises(ValueError):
        found.cut(2)
    for options in ({"drop": 7}, {"drop": -1}, {"drop": 1, "kinds": ["mlp"]}, {"drop": 1, "kinds": []}):
        with pytest.raises(UsageError, match="E274"):
            subblocks.rank(checkpoint, structure, texts(), ONE, **options)
