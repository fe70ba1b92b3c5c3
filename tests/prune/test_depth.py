"""Which layers go: against the plain model run with layers skipped, and against closed forms."""

from __future__ import annotations

import json
import math
import sys
import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "calibrate"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "architectures"))
from walk_models import LENGTHS, model_folder, stock, texts

from surgeon.calibrate import skeleton as skeleton_module
from surgeon.calibrate.settings import Settings
from surgeon.checkpoint.checkpoint import open_path
from surgeon.checkpoint.memory import MemoryCheckpoint
from surgeon.errors import InputError, Interrupted, UsageError
from surgeon.prune import depth, layer_sweep
from surgeon.prune.depth import block_influence, nmse, uniform
from surgeon.prune.depth_ranking import DepthRanking
from surgeon.prune.removal_damage import RemovalDamage, estimate, smallest

ONE = Settings(threads=1, batch_tokens=64)
FOUR = (("num_hidden_layers", 4),)
STACKS = {"llama": "model.layers", "gemma2": "model.layers", "gpt2": "transformer.h", "bert": "bert.encoder.layer", "mixtral": "model.layers"}  # fmt: skip
SIZES = {"gpt2": (("n_layer", 4),), "biased": (*FOUR, ("mlp_bias", True))}


def folder_of(family):
    return model_folder("llama" if family == "biased" else family, SIZES.get(family, FOUR))


def layers_of(model, family):
    return model.get_submodule(STACKS[family])


def skipping(model, family, gone):
    """Run a stock model with layers taken out, and return its outputs sample by sample."""
    parts = layers_of(model, family)
    whole = list(parts)
    originals = {number: whole[number].forward for number in gone}
    for number in gone:
        whole[number].forward = lambda hidden, *args, **kwargs: hidden
    try:
        with torch.no_grad():
            return [
                (model.base_model(ids[None]).last_hidden_state[0], model(ids[None]).logits[0])
                for ids in map(torch.from_numpy, texts())
            ]
    finally:
        for number, forward in originals.items():
            whole[number].forward = forward


def damage(dense, other, place):
    top = sum(float((a[place] - b[place]).double().square().sum()) for a, b in zip(dense, other, strict=True))
    return top / sum(float(a[place].double().square().sum()) for a in dense)


def brute_force(model, family, place, drops):
    """Greedy removal with a full run of the plain model for every candidate."""
    dense = skipping(model, family, ())
    gone, scores, first = [], [0.0], None
    for _ in range(drops):
        left = [n for n in range(len(layers_of(model, family))) if n not in gone]
        found = {n: damage(dense, skipping(model, family, [*gone, n]), place) for n in left}
        first = first or found
        least = min(left, key=lambda n: (found[n], -n))
        gone.append(least)
        scores.append(found[least])
    return gone, scores, [first[n] for n in sorted(first)]


@pytest.mark.parametrize("family", STACKS)
def test_nmse_is_brute_force(family):
    folder = folder_of(family)
    found = nmse.rank(open_path(folder), texts(), ONE)
    order, scores, importance = brute_force(stock(folder), family, 0, 2)
    assert list(found.order) == order
    np.testing.assert_allclose(found.scores, scores, rtol=1e-4)
    np.testing.assert_allclose(found.importance, importance, rtol=1e-4)
    assert found.dropped(2) == tuple(sorted(order)) and found.kept(4) == (0, 1, 2, 3) and not found.notes


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_nmse_of_logits_is_brute_force(family):
    folder = folder_of(family)
    found = nmse.rank(open_path(folder), texts(), ONE, on="logits")
    order, scores, _ = brute_force(stock(folder), family, 1, 2)
    assert list(found.order) == order
    np.testing.assert_allclose(found.scores, scores, rtol=1e-4)


def test_nmse_protects_and_takes_fewer():
    found = nmse.rank(open_path(folder_of("llama")), texts(), ONE, drop=1, protect_first=1, protect_last=2)
    assert found.drops == ((), (1,)) and found.importance[1] is not None
    assert found.importance[0] is None and found.importance[2:] == (None, None)
    with pytest.raises(UsageError, match="ranked 1 of 4"):
        found.dropped(2)


def test_nmse_is_the_same_from_files_and_expert_by_expert(tmp_path, monkeypatch):
    checkpoint = open_path(folder_of("mixtral"))
    plain = nmse.rank(checkpoint, texts(), ONE)
    files = []
    inputs = layer_sweep.LayerInputs
    monkeypatch.setattr(layer_sweep, "LayerInputs", lambda n, s, d, limit, spill: inputs(n, s, d, 0, spill))
    settings = Settings(threads=1, batch_tokens=64, stream_experts=True, spill=tmp_path)

    def told(done, total):
        files.extend(tmp_path.rglob("*.bin"))
        assert 0 < done <= total == 8

    spilled = nmse.rank(checkpoint, texts(), settings, progress=told)
    assert files and not list(tmp_path.rglob("*.bin"))
    assert spilled.drops == plain.drops
    np.testing.assert_allclose(spilled.scores, plain.scores, rtol=1e-5)


def test_one_layer_in_memory_and_one_load_of_each_a_round(monkeypatch):
    loads, held = [], 0
    fill, empty = skeleton_module.Skeleton.fill, skeleton_module.Skeleton.empty

    def filled(self, layer, tensors):
        nonlocal held
        held += 1
        assert held == 1
        loads.append(layer)
        return fill(self, layer, tensors)

    def emptied(self, layer):
        nonlocal held
        held -= 1
        return empty(self, layer)

    monkeypatch.setattr(skeleton_module.Skeleton, "fill", filled)
    monkeypatch.setattr(skeleton_module.Skeleton, "empty", emptied)
    calls = []
    call = skeleton_module.Skeleton.call
    monkeypatch.setattr(skeleton_module.Skeleton, "call", lambda *a: (calls.append(a[1]), call(*a))[1])
    found = nmse.rank(open_path(folder_of("llama")), texts(), ONE)
    assert loads == [0, 1, 2, 3, *(n for n in range(4) if n != found.order[0])]
    cost = estimate(4, 2, sum(LENGTHS), 32, 4)
    batches = 4  # 13, 17 + 17, 18, 5: one call for each layer, stream and batch
    assert len(calls) % cost.layer_runs == 0 and len(calls) // cost.layer_runs <= batches
    assert cost.layer_runs == 10 + 6 and cost.sweeps == 2 and "2 sweeps" in str(cost)


def changed(family, change):
    checkpoint = open_path(folder_of(family))
    state = {
        n: checkpoint.read(n, 0, i.elements).reshape(i.shape).copy() for n, i in checkpoint.tensors.items()
    }
    for name in state:
        change(name, state[name])
    view = MemoryCheckpoint("changed", state)
    view.config = checkpoint.config
    return view


def identity_model(*layers):
    """Make layers the identity: what they write to the residual stream is zero."""

    def clear(name, value):
        if any(f".{n}." in name for n in layers) and ("o_proj" in name or "down_proj" in name):
            value[:] = 0

    return changed("llama", clear)


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("method", ["nmse", "block_influence"])
def test_identity_layer_goes_first_and_costs_nothing(method, layer):
    found = depth.get(method).rank(identity_model(layer), texts(), ONE)
    assert found.order[0] == layer and found.scores[1] == 0.0 and found.importance[layer] == 0.0
    assert all(score > 0 for n, score in enumerate(found.importance) if n != layer and score is not None)


def test_of_two_identity_layers_the_deeper_goes_first():
    for method in ("nmse", "block_influence"):
        found = depth.get(method).rank(identity_model(1, 2), texts(), ONE)
        assert found.order == (2, 1) and found.scores == (0.0, 0.0, 0.0)


def test_block_influence_is_its_formula():
    folder = folder_of("bert")
    model = stock(folder)
    found = block_influence.influences(open_path(folder), texts(), ONE)
    turned = np.zeros(4)
    with torch.no_grad():
        for ids in texts():
            states = model.bert(torch.from_numpy(ids)[None], output_hidden_states=True).hidden_states
            for n, (a, b) in enumerate(pairwise(states)):
                turned[n] += float((1 - torch.cosine_similarity(a[0].double(), b[0].double(), dim=-1)).sum())
    np.testing.assert_allclose(found, turned / sum(LENGTHS), rtol=1e-5)
    ranked = block_influence.rank(open_path(folder), texts(), ONE)
    assert set(ranked.order) == {1, 2} and list(ranked.order) == sorted((1, 2), key=lambda n: found[n])
    free = block_influence.rank(open_path(folder), texts(), ONE, protect_first=0, protect_last=0)
    assert list(free.order) == sorted(range(4), key=lambda n: found[n])[:2]


def test_infinite_candidates_are_named_and_never_taken(monkeypatch):
    rounds = RemovalDamage.round

    def poisoned(self, dropped, candidates, progress=None):
        found = rounds(self, dropped, candidates, progress)
        return {part: float("inf") if part[0] in bad else score for part, score in found.items()}

    monkeypatch.setattr(RemovalDamage, "round", poisoned)
    bad = {0, 2}
    found = nmse.rank(open_path(folder_of("llama")), texts(), ONE)
    assert set(found.order) == {1, 3}
    assert found.notes[0] == "without layer 0, 2 the model gives values that are not finite"
    assert "beside" in found.notes[1]
    bad = {0, 1, 2, 3}
    with pytest.raises(InputError, match="E320"):
        nmse.rank(open_path(folder_of("llama")), texts(), ONE)


def test_a_layer_whose_absence_overflows_is_kept():
    """Layers add and take away 2e38 in turn; without layer 1 it is added twice."""

    def alternate(name, value):
        if name.endswith("down_proj.bias"):
            value[0] = 2e38 * (-1) ** int(name.split(".")[2])

    found = nmse.rank(changed("biased", alternate), texts(), ONE, drop=1)
    assert found.importance[1] == math.inf and found.order != (1,) and math.isfinite(found.scores[1])
    assert found.notes[0].startswith("without layer 1 the model gives values")


def test_a_model_that_overflows_is_refused():
    def scale(name, value):
        if ".1." in name and "down_proj" in name:
            value[:] = 3e38

    for method in ("nmse", "block_influence"):
        with pytest.raises(InputError, match="E384"):
            depth.get(method).rank(changed("llama", scale), texts(), ONE)


def test_stop_and_bad_requests(tmp_path):
    checkpoint, stop = open_path(folder_of("llama")), threading.Event()
    stop.set()
    for method in ("nmse", "block_influence"):
        with pytest.raises(Interrupted):
            depth.get(method).rank(checkpoint, texts(), ONE, stop=stop)
        with pytest.raises(InputError, match="E385"):
            depth.get(method).rank(checkpoint, [], ONE)
        with pytest.raises(UsageError, match="E278"):
            depth.get(method).rank(checkpoint, texts(), ONE, protect_first=3, protect_last=1)
        with pytest.raises(UsageError, match="E278"):
            depth.get(method).rank(checkpoint, texts(), ONE, drop=3)
    with pytest.raises(UsageError, match="E277"):
        nmse.rank(checkpoint, texts(), ONE, on="loss")
    with pytest.raises(InputError, match="E386"):
        nmse.rank(open_path(model_folder("llama", (), class_name="LlamaModel")), texts(), ONE, on="logits")
    bare = open_path(folder_of("llama"))
    bare.config = {"model_type": "llama"}
    with pytest.raises(InputError, match="E319"):
        uniform.rank(bare)


def test_even_spacing_for_every_depth():
    for layers in range(2, 65):
        for keep in range(2, layers + 1):
            kept = uniform.keep_set(layers, keep)
            assert len(kept) == keep == len(set(kept)) and list(kept) == sorted(kept)
            assert kept[0] == 0 and kept[-1] == layers - 1
            steps = [b - a for a, b in pairwise(kept)]
            assert max(steps) - min(steps) <= 1
            ideal = [index * (layers - 1) / (keep - 1) for index in range(keep)]
            assert all(abs(a - b) <= 0.5 for a, b in zip(kept, ideal, strict=True))
        assert uniform.keep_set(layers, layers) == tuple(range(layers))
        for keep in (-1, 0, 1, layers + 1):
            with pytest.raises(UsageError, match="E278"):
                uniform.keep_set(layers, keep)


def test_even_spacing_where_the_reference_is_unbalanced():
    gone = sorted(set(range(32)) - set(uniform.keep_set(32, 25)))
    assert len(gone) == 7 and all(b - a > 1 for a, b in pairwise(gone))
    found = uniform.rank(open_path(folder_of("llama")))
    assert found.drops == ((), (1,), (1, 2))
    assert found.kept(2) == (0, 3) and math.isnan(found.scores[1]) and "fine-tune" in found.notes[0]
    with pytest.raises(UsageError, match="cannot protect more"):
        uniform.rank(open_path(folder_of("llama")), protect_last=2)


def test_uniform_sets_need_not_be_nested():
    ranking = DepthRanking("uniform", 8, ((), (3,), (2, 5)), (0.0, math.nan, math.nan))
    assert ranking.order == () and ranking.dropped(6) == (2, 5)
    again = DepthRanking.from_document(json.loads(json.dumps(ranking.document())))
    assert again.drops == ranking.drops and again.layers == 8 and math.isnan(again.scores[1])
    with pytest.raises(UsageError, match="E278"):
        ranking.dropped(9)


def test_registry():
    assert depth.known() == ("block_influence", "nmse", "uniform") and depth.DEFAULT in depth.known()
    assert depth.get("block-influence") is block_influence.METHOD
    assert not depth.get("uniform").needs_text
    with pytest.raises(UsageError, match="E279") as caught:
        depth.get("nsme")
    assert "nmse" in caught.value.help
    with pytest.raises(UsageError, match="E279"):
        depth.get("../os")


def test_ties():
    assert smallest({(0, "layer"): 0.5, (3, "layer"): 0.5, (1, "layer"): 0.7}) == (3, "layer")
