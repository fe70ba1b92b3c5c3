"""What weights alone say about experts, against plain NumPy over the stock model's matrices."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "prune"))
from expert_folders import EXPERTS, STORAGES, edited, loaded, matrices, moe_folder, opened, router_of

from surgeon.errors import Interrupted
from surgeon.experts import weights_only
from surgeon.experts.weights_only import layer_weights, weights_of


def flat(model, family, layer, expert):
    found = matrices(model, family, layer, expert)
    return np.concatenate([found[name].double().numpy().reshape(-1) for name in ("gate", "up", "down")])


@pytest.mark.parametrize(("family", "storage"), STORAGES)
def test_sizes_and_likeness_equal_plain_numpy(family, storage):
    folder = moe_folder(family, storage=storage)
    checkpoint, experts = opened(folder)
    model = loaded(folder)
    for found in weights_of(checkpoint, experts):
        weights = np.stack([flat(model, family, found.layer, expert) for expert in range(EXPERTS)])
        np.testing.assert_allclose(found.norms, np.linalg.norm(weights, axis=1), rtol=1e-5)
        apart = {
            (i, j): np.linalg.norm(weights[i] - weights[j])
            / np.sqrt((np.square(weights[i]).sum() + np.square(weights[j]).sum()) / 2)
            for i in range(EXPERTS)
            for j in range(i + 1, EXPERTS)
        }
        best = min(apart, key=lambda pair: apart[pair])
        assert (found.closest.first, found.closest.second) == best
        assert found.closest.value == pytest.approx(apart[best], rel=1e-6)
        rows = router_of(model, found.layer).state_dict()
        rows = next(v for k, v in rows.items() if k.endswith("weight")).double().numpy()
        np.testing.assert_allclose(found.router_norms, np.linalg.norm(rows, axis=1), rtol=1e-6)
        cosine = (rows @ rows.T) / np.outer(*[np.linalg.norm(rows, axis=1)] * 2)
        above = cosine[np.triu_indices(EXPERTS, 1)]
        assert found.router_cosine == pytest.approx(above.mean(), abs=1e-6)
        assert found.router_closest.value == pytest.approx(above.max(), abs=1e-6)
        assert found.duplicates == () and {"aimer", "router_norm"} <= set(found.criteria)
        size = np.abs(weights).mean(axis=1) / np.sqrt(np.square(weights).mean(axis=1))
        np.testing.assert_allclose(-found.criteria["aimer"], size, rtol=1e-6)


def test_stretches_change_nothing(monkeypatch):
    checkpoint, experts = opened(moe_folder("gpt_oss"))
    whole = layer_weights(checkpoint, experts, experts.layers[0])
    monkeypatch.setattr(weights_only, "STRETCH", 8 * 37)
    parts = layer_weights(checkpoint, experts, experts.layers[0])
    np.testing.assert_allclose(parts.norms, whole.norms, rtol=1e-6)
    assert parts.duplicates == whole.duplicates and parts.closest.first == whole.closest.first


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_copies_are_found_and_near_copies_are_not_called_so(family, scratch):
    def copy(state):
        for name in list(state):
            if family == "gpt_oss" and "layers.1.mlp.experts" in name:
                state[name][5] = state[name][2]
                state[name][7] = state[name][0]
            elif "layers.1." in name and ".experts.2." in name:
                state[name.replace(".experts.2.", ".experts.5.")] = state[name].clone()
            elif "layers.1." in name and ".experts.0." in name:
                state[name.replace(".experts.0.", ".experts.7.")] = state[name].clone()
            elif "layers.2." in name and ".experts.2." in name:
                state[name.replace(".experts.2.", ".experts.5.")] = state[name] * 1.001

    checkpoint, experts = opened(edited(moe_folder(family), scratch / "copies", copy))
    found = {layer.layer: layer for layer in weights_of(checkpoint, experts)}
    assert found[0].duplicates == () and found[1].duplicates == ((0, 7), (2, 5))
    assert found[1].closest.value == 0.0 and (found[1].closest.first, found[1].closest.second) == (0, 7)
    if family == "mixtral":
        assert found[2].duplicates == () and (found[2].closest.first, found[2].closest.second) == (2, 5)
        assert found[2].closest.value == pytest.approx(0.001, rel=1e-3)


def test_biases_tell_experts_apart(scratch):
    def copy(state):
        for name in list(state):
            if "layers.1.mlp.experts" in name and not name.endswith("down_proj_bias"):
                state[name][5] = state[name][2]

    checkpoint, experts = opened(edited(moe_folder("gpt_oss"), scratch / "almost", copy))
    assert layer_weights(checkpoint, experts, experts.layer(1)).duplicates == ()


def test_quantized_experts_are_compared_by_their_bytes(scratch):
    def code(state):
        for name in [n for n in state if ".experts." in n]:
            state[name] = state[name].to(torch.float8_e4m3fn)
            state[name.removesuffix("weight") + "weight_scale_inv"] = torch.full((1, 1), 0.5)
        for part in ("w1", "w2", "w3"):
            stem = f"model.layers.1.block_sparse_moe.experts.{{}}.{part}.weight"
            state[stem.format(6)] = state[stem.format(3)].clone()
            state[stem.format(4)] = state[stem.format(1)].clone()
        # same values, another scale: another expert
        state["model.layers.1.block_sparse_moe.experts.4.w2.weight_scale_inv"] += 0.25

    quantized = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    checkpoint, experts = opened(edited(moe_folder("mixtral"), scratch / "fp8", code, **quantized))
    found = {layer.layer: layer for layer in weights_of(checkpoint, experts)}
    assert found[0].norms is None and found[0].closest is None and found[0].criteria == {}
    assert found[0].router_norms is not None  # the router is not quantized
    assert found[0].duplicates == () and found[1].duplicates == ((3, 6),)


def test_it_can_be_stopped():
    import threading

    stop = threading.Event()
    checkpoint, experts = opened(moe_folder("mixtral"))
    with pytest.raises(Interrupted):
        weights_of(checkpoint, experts, stop=stop, progress=lambda done, total: stop.set())
