"""STUN's clusters and representatives against plain loops; results written, loaded by the library, made sparse."""

from __future__ import annotations

import math
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent))
from expert_folders import (
    EXPERTS,
    HIDDEN,
    STORAGES,
    TEXTS,
    WIDTH,
    edited,
    experts_module,
    loaded,
    logits,
    matrices,
    moe_folder,
    opened,
    router_of,
    state_of,
    write,
)  # fmt: skip
from structure_models import strictly

from surgeon.calibrate.settings import Settings
from surgeon.checkpoint.checkpoint import open_path
from surgeon.errors import Interrupted, UsageError
from surgeon.experts.coactivation import CoActivation
from surgeon.prune.experts.merged import Cluster, MergedWeights
from surgeon.prune.experts.stun import nearest_to_mean, stun
from surgeon.prune.sparse.run import SparseOptions, sparsify
from surgeon.structure.experts.find import experts_of
from surgeon.structure.experts.view import ExpertView
from surgeon.structure.experts.weights import router_rows


def flattened(model, family, layer, expert):
    return torch.cat(
        [value.reshape(-1) for value in matrices(model, family, layer, expert).values()]
    ).double()


def naive_clusters(similar, members, count):
    """Join the pair of clusters whose smallest b is largest, again and again."""
    clusters = [[i] for i in members]
    while len(clusters) > count:
        best = max(
            (min(similar[a][b] for a in one for b in two), -i, -j)
            for i, one in enumerate(clusters) for j, two in enumerate(clusters) if i < j
        )  # fmt: skip
        clusters[-best[1]] += clusters.pop(-best[2])
    return sorted(tuple(sorted(cluster)) for cluster in clusters)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_clusters_and_representatives_are_those_of_plain_loops(family):
    folder = moe_folder(family)
    checkpoint, experts = opened(folder)
    model = loaded(folder)
    cut, replaced, record = stun(checkpoint, experts, 4, averaged=0)
    assert replaced is None  # nothing is averaged: it is a plain cut
    for layer in experts.running:
        rows = router_rows(checkpoint, layer).astype(np.float64)
        similar = [[-math.sqrt(((a - b) ** 2).sum()) for b in rows] for a in rows]
        size = EXPERTS // experts.groups
        wanted = [
            c for g in range(experts.groups)
            for c in naive_clusters(similar, range(g * size, (g + 1) * size), 4 // experts.groups)
        ]  # fmt: skip
        found = record["layers"][str(layer.index)]
        assert sorted(tuple(one["members"]) for one in found) == sorted(wanted)
        assert cut.kept[layer.index] == tuple(sorted(one["expert"] for one in found))
        for one in found:
            weights = {e: flattened(model, family, layer.index, e) for e in one["members"]}
            mean = sum(weights.values()) / len(weights)
            far = {e: float((w - mean).norm()) for e, w in weights.items()}
            assert far[one["expert"]] <= min(far.values()) * (1 + 1e-6)


def test_two_members_are_equally_near_and_tokens_decide():
    checkpoint, experts = opened(moe_folder("mixtral"))
    layer = experts.layer(0)
    assert nearest_to_mean(checkpoint, layer, (3, 6)) == 3
    tokens = np.arange(EXPERTS)
    assert nearest_to_mean(checkpoint, layer, (3, 6), tokens) == 6
    three = nearest_to_mean(checkpoint, layer, (1, 3, 6))
    assert nearest_to_mean(checkpoint, layer, (1, 3, 6), tokens) == three  # no tie, tokens do not matter


def test_blocks_do_not_change_the_representative(monkeypatch):
    checkpoint, experts = opened(moe_folder("gpt_oss"))
    wanted = [nearest_to_mean(checkpoint, layer, (0, 2, 3, 5)) for layer in experts.layers]
    monkeypatch.setattr("surgeon.prune.experts.stun.BLOCK", 37)
    assert [nearest_to_mean(checkpoint, layer, (0, 2, 3, 5)) for layer in experts.layers] == wanted


def test_coactivation_joins_experts_that_work_together():
    checkpoint, experts = opened(moe_folder("qwen3_moe"))
    counts = {}
    for layer in experts.running:
        counts[layer.index] = CoActivation(EXPERTS)
        counts[layer.index].add(np.array([[2, 7]] * 30 + [[0, 1]] * 2))
    _, _, record = stun(checkpoint, experts, 7, coactivation=counts, coactivation_weight=1e6, row_weight=1.0)
    for listed in record["layers"].values():
        assert [2, 7] in [one["members"] for one in listed]
    # lambda = (0, 1): the largest share of co-activations first
    _, _, record = stun(checkpoint, experts, 6, coactivation=counts, coactivation_weight=1.0, row_weight=0.0)
    for listed in record["layers"].values():
        joined = [one["members"] for one in listed if len(one["members"]) > 1]
        assert joined == [[0, 1], [2, 7]]
    with pytest.raises(UsageError, match="no counts") as caught:
        stun(checkpoint, experts, 6, coactivation_weight=1.0)
    assert caught.value.code == "E248"


def test_protected_experts_are_never_merged():
    checkpoint, experts = opened(moe_folder("mixtral"))
    _, _, plain = stun(checkpoint, experts, 3)
    victim = next(one for one in plain["layers"]["1"] if len(one["members"]) > 2)
    loser = next(e for e in victim["members"] if e != victim["expert"])
    cut, replaced, record = stun(checkpoint, experts, 3, protected={1: {loser}})
    alone = next(one for one in record["layers"]["1"] if loser in one["members"])
    assert alone == {"expert": loser, "members": [loser]} and loser in cut.kept[1]
    assert replaced is not None
    assert not [name for name in replaced.tensors if f".1.block_sparse_moe.experts.{loser}." in name]
    assert f"model.layers.1.block_sparse_moe.gate.weight#{loser}" not in replaced.tensors
    with pytest.raises(UsageError, match="protected"):
        stun(checkpoint, experts, 3, protected={1: {0, 1, 2, 3}})


def test_planted_duplicates_are_joined_first(tmp_path):
    def change(state):
        gate = state["model.layers.1.block_sparse_moe.gate.weight"]
        gate[6] = gate[2]
        for name in ("w1", "w2", "w3"):
            state[f"model.layers.1.block_sparse_moe.experts.6.{name}.weight"] = state[
                f"model.layers.1.block_sparse_moe.experts.2.{name}.weight"
            ].clone()

    folder = edited(moe_folder("mixtral"), tmp_path / "twins", change)
    checkpoint, experts = opened(folder)
    cut, replaced, record = stun(checkpoint, experts, 7, averaged=7)
    assert [2, 6] in [one["members"] for one in record["layers"]["1"]] and 6 not in cut.kept[1]
    before = state_of(folder)
    for name, info in replaced.tensors.items():
        if ".layers.1." not in name:
            continue
        found = replaced.read(name, 0, info.elements)  # the mean of two equal ones is the same bits
        stored = before[name.partition("#")[0]]
        stored = stored[2] if "#" in name else stored
        np.testing.assert_array_equal(found, stored.reshape(-1).numpy())


# ---- what a merged expert computes -------------------------------------------------------------------


def block_output(x, rows, experts, bias=None):
    """Softmax over all experts, every expert runs (K = all): plain loops."""
    scores = [float(r.double() @ x.double()) for r in rows]
    scores = [s + (0.0 if bias is None else bias[i]) for i, s in enumerate(scores)]
    top = max(scores)
    total = math.fsum(math.exp(s - top) for s in scores)
    out = torch.zeros(len(x), dtype=torch.float64)
    for s, (gate, up, down) in zip(scores, experts, strict=True):
        inner = functional.silu(gate.double() @ x.double()) * (up.double() @ x.double())
        out += math.exp(s - top) / total * (down.double() @ inner)
    return out


def test_one_row_with_logit_plus_ln_2_stands_for_two_equal_experts():
    """Closed form: e^(z + ln 2) = e^z + e^z, for every token."""
    folder = moe_folder("mixtral")
    model = loaded(folder)
    rows = list(router_of(model, 0).weight.detach()[:4])
    experts = [tuple(matrices(model, "mixtral", 0, e)[k] for k in ("gate", "up", "down")) for e in range(4)]
    rows[3], experts[3] = rows[1], experts[1]
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        x = torch.randn(HIDDEN, generator=generator)
        both = block_output(x, rows, experts)
        one = block_output(x, rows[:3], experts[:3], bias=[0.0, math.log(2), 0.0])
        torch.testing.assert_close(one, both, rtol=1e-12, atol=1e-12)
        lost = block_output(x, rows[:3], experts[:3])
        assert float((lost - both).abs().max()) > 1e-4  # without it the output differs


def test_merged_duplicates_reproduce_the_whole_model_where_the_router_has_a_bias(tmp_path):
    """gpt-oss with K = all: equal experts with equal rows, merged with router "mass", give the source's logits."""

    def change(state):
        for layer in range(3):
            for name in ("experts.gate_up_proj", "experts.gate_up_proj_bias", "experts.down_proj", "experts.down_proj_bias", "router.weight", "router.bias"):  # fmt: skip
                tensor = state[f"model.layers.{layer}.mlp.{name}"]
                tensor[3] = tensor[1]

    folder = edited(
        moe_folder("gpt_oss", num_local_experts=4, num_experts_per_tok=4), tmp_path / "twins", change
    )
    # every token uses all experts, so one fewer can only be written once a token uses one fewer
    fewer = open_path(edited(folder, tmp_path / "fewer", lambda state: None, num_experts_per_tok=3))
    cut, replaced, record = stun(fewer, experts_of(fewer), 3, averaged=3, router="mass")
    assert all([1, 3] in [one["members"] for one in listed] for listed in record["layers"].values())
    small = write(ExpertView(fewer, experts_of(fewer), cut, replaced), tmp_path / "small")
    for found, wanted in zip(logits(loaded(small)), logits(loaded(folder)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    cut, replaced, _ = stun(fewer, experts_of(fewer), 3, averaged=3, router="average")
    lost = write(ExpertView(fewer, experts_of(fewer), cut, replaced), tmp_path / "lost")
    assert (
        max(
            float((a - b).abs().max())
            for a, b in zip(logits(loaded(lost)), logits(loaded(folder)), strict=True)
        )
        > 1e-3
    )


def test_mass_needs_a_router_with_a_bias():
    checkpoint, experts = opened(moe_folder("mixtral"))
    with pytest.raises(UsageError, match="no bias") as caught:
        stun(checkpoint, experts, 3, router="mass")
    assert caught.value.code == "E248"
    stun(checkpoint, experts, 4, router="mass")  # nothing is averaged, so no row is made


# ---- written results ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "storage"), STORAGES)
def test_written_models_load_and_hold_the_means(family, storage, tmp_path):
    folder = moe_folder(family, storage=storage)
    checkpoint, experts = opened(folder)
    cut, replaced, record = stun(checkpoint, experts, 4, averaged=4)
    view = ExpertView(checkpoint, experts, cut, replaced)
    small = write(view, tmp_path / "small")
    source, result = loaded(folder), strictly(small)
    changed = 0
    for layer in experts.running:
        listed = record["layers"][str(layer.index)]
        module = experts_module(result, layer.index)
        assert module.down_proj.shape[0] == 4 and router_of(result, layer.index).weight.shape[0] == 4
        for place, expert in enumerate(cut.kept[layer.index]):
            members = next(one["members"] for one in listed if one["expert"] == expert)
            found = matrices(result, family, layer.index, place)
            for name, value in found.items():
                wanted = [matrices(source, family, layer.index, m)[name].double() for m in members]
                wanted = (sum(wanted) / len(members)).float()
                torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-7)
            rows = router_of(source, layer.index).weight.detach().double()[members].mean(0).float()
            torch.testing.assert_close(
                router_of(result, layer.index).weight.detach()[place], rows, rtol=1e-6, atol=1e-7
            )
            changed += len(members) > 1
    assert changed >= len(experts.running)
    assert all(bool(torch.isfinite(value).all()) for value in logits(loaded(small)))
    assert (
        experts_module(result, experts.running[0].index).down_proj.shape[1 if family == "gpt_oss" else 2]
        == WIDTH
    )


def test_correction_biases_go_with_their_rows(tmp_path):
    folder = moe_folder("deepseek_v3")
    checkpoint, experts = opened(folder)
    cut, replaced, record = stun(checkpoint, experts, 4, averaged=4)
    result = state_of(write(ExpertView(checkpoint, experts, cut, replaced), tmp_path / "small"))
    name = f"model.layers.{experts.running[0].index}.mlp.gate.e_score_correction_bias"
    before = state_of(folder)[name].double()
    listed = record["layers"][str(experts.running[0].index)]
    for place, expert in enumerate(cut.kept[experts.running[0].index]):
        members = next(one["members"] for one in listed if one["expert"] == expert)
        assert result[name][place] == pytest.approx(float(before[members].mean()), rel=1e-6)
    assert result[name].dtype == torch.float32


def test_bfloat16_is_rounded_once(tmp_path):
    folder = moe_folder("qwen3_moe", dtype=torch.bfloat16)
    checkpoint, experts = opened(folder)
    merged = MergedWeights(checkpoint, experts, {0: [Cluster((1, 4, 6), 4, (0.2, 0.5, 0.3))]})
    name = "model.layers.0.mlp.experts.4.down_proj.weight"
    state = state_of(folder)
    wanted = sum(s * state[name.replace(".4.", f".{e}.")].double() for e, s in ((1, 0.2), (4, 0.5), (6, 0.3)))
    found = merged.read(name, 3, 500)
    assert found.dtype == np.uint16 and merged.tensors[name].dtype == "BF16"
    as_torch = torch.from_numpy(found.view(np.int16)).view(torch.bfloat16)
    assert torch.equal(as_torch, wanted.float().bfloat16().reshape(-1)[3:500])
    assert merged.read_bytes(name, 7, 999).tobytes() == merged.read(name, 0, 768).tobytes()[7:999]


def test_the_result_is_the_same_every_time():
    checkpoint, experts = opened(moe_folder("olmoe"))
    first, again = (stun(checkpoint, experts, 3) for _ in range(2))
    assert first[0] == again[0] and first[2] == again[2] and first[1].identity == again[1].identity
    other = stun(checkpoint, experts, 2)
    assert other[1].identity != first[1].identity


def test_it_can_be_stopped():
    checkpoint, experts = opened(moe_folder("olmoe"))
    stop = threading.Event()

    def progress(done, total):
        assert total == 3
        stop.set()

    with pytest.raises(Interrupted):
        stun(checkpoint, experts, 3, progress=progress, stop=stop)


# ---- second half -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "method"), [("qwen3_moe", "wanda"), ("gpt_oss", "magnitude"), ("granitemoe", "wanda")]
)
def test_the_second_half_runs_on_the_written_result(family, method, tmp_path):
    checkpoint, experts = opened(moe_folder(family))
    cut, replaced, record = stun(checkpoint, experts, 4, averaged=4)
    assert any("--method wanda" in remark for remark in record["remarks"])
    small = open_path(write(ExpertView(checkpoint, experts, cut, replaced), tmp_path / "small"))
    options = SparseOptions(method=method, sparsity=0.5)
    texts = () if method == "magnitude" else TEXTS
    view, facts = sparsify(small, texts, Settings(threads=1), options, tmp_path / "work")
    assert facts["sparsity"] == pytest.approx(0.5, abs=0.02)
    model = strictly(write(view, tmp_path / "sparse"))
    module = experts_module(model, experts.running[0].index)
    assert module.down_proj.shape[0] == 4
    assert float((module.down_proj == 0).double().mean()) == pytest.approx(0.5, abs=0.05)
    assert bool((router_of(model, experts.running[0].index).weight != 0).any())
    assert all(bool(torch.isfinite(value).all()) for value in logits(loaded(tmp_path / "sparse")))
