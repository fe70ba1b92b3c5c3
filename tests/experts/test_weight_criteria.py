"""Criteria from weights alone, and reading weights whatever their storage: against the stock model and plain loops."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "prune"))
from expert_folders import EXPERTS, STORAGES, edited, loaded, matrices, moe_folder, opened, state_of

from surgeon.checkpoint.checkpoint import open_path
from surgeon.errors import InputError, UsageError
from surgeon.experts import clustering, criteria
from surgeon.experts.criteria import router_distance
from surgeon.structure.experts.weights import each_expert, parts, read_expert, router_rows

# ---- reading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "storage"), STORAGES)
def test_weights_are_those_of_the_stock_model(family, storage):
    folder = moe_folder(family, storage=storage)
    checkpoint, experts = opened(folder)
    model = loaded(folder)
    for layer in experts.layers:
        for expert, found in enumerate(each_expert(checkpoint, layer)):
            wanted = matrices(model, family, layer.index, expert)
            for name in ("gate", "up", "down", "gate_bias", "up_bias", "down_bias"):
                value = getattr(found, name)
                assert (value is None) == (name not in wanted), name
                if value is not None:
                    assert value.dtype == np.float32
                    np.testing.assert_array_equal(value, wanted[name].numpy(), err_msg=name)


def test_weights_in_bfloat16_are_widened():
    folder = moe_folder("qwen3_moe", dtype=torch.bfloat16)
    checkpoint, experts = opened(folder)
    stored = state_of(folder)["model.layers.1.mlp.experts.5.up_proj.weight"]
    assert stored.dtype == torch.bfloat16
    np.testing.assert_array_equal(read_expert(checkpoint, experts.layer(1), 5).up, stored.float().numpy())


def test_a_part_reads_any_stretch_and_chosen_rows():
    checkpoint, experts = opened(moe_folder("gpt_oss"))
    part = parts(checkpoint, experts.layer(1), 3)["gate_up"]
    whole = part.read(checkpoint)
    assert part.shape == (32, 48) and part.channel_axis == 1
    assert part.key == "model.layers.1.mlp.experts.gate_up_proj#3"
    np.testing.assert_array_equal(part.read(checkpoint, 5, 100), whole[5:100])
    rows = np.array([4, 5, 6, 2, 31, 0])
    np.testing.assert_array_equal(part.read_rows(checkpoint, rows), whole.reshape(32, 48)[rows])


def test_quantized_experts_are_refused_with_a_way_out():
    checkpoint, experts = opened(moe_folder("mixtral"))
    layer = replace(experts.layer(0), quantized="fp8")
    with pytest.raises(InputError, match="stored as fp8") as caught:
        criteria.get("aimer").score(checkpoint, experts, layer)
    assert caught.value.code == "E442" and "reap" in (caught.value.help or "")


def test_coded_values_are_refused_even_where_nobody_said_quantized(tmp_path):
    def as_float8(state):
        name = "model.layers.0.block_sparse_moe.experts.2.w2.weight"
        state[name] = state[name].to(torch.float8_e4m3fn)

    _, experts = opened(moe_folder("mixtral"))
    other = open_path(edited(moe_folder("mixtral"), tmp_path / "f8", as_float8))
    with pytest.raises(InputError) as caught:
        read_expert(other, experts.layer(0), 2)
    assert caught.value.code == "E442"


# ---- aimer -----------------------------------------------------------------------------------------


def planted(tmp_path, weights: dict[int, torch.Tensor]):
    """Give experts of layer 0 flattened weights of their own."""

    def change(state):
        for expert, flat in weights.items():
            at = 0
            for name in ("w1", "w3", "w2"):
                tensor = state[f"model.layers.0.block_sparse_moe.experts.{expert}.{name}.weight"]
                tensor.copy_(flat[at : at + tensor.numel()].reshape(tensor.shape))
                at += tensor.numel()

    return opened(edited(moe_folder("mixtral"), tmp_path / "planted", change))


def test_aimer_of_known_distributions(tmp_path):
    count = 3 * 24 * 32
    generator = torch.Generator().manual_seed(0)
    signs = torch.where(torch.rand(count, generator=generator) < 0.5, -0.3, 0.3)
    spike = torch.zeros(count)
    spike[77] = -2.5
    weights = {0: torch.randn(count, generator=generator), 1: signs, 2: spike, 3: torch.zeros(count)}
    checkpoint, experts = planted(tmp_path, weights)
    found = criteria.get("aimer").score(checkpoint, experts, experts.layer(0))
    assert found.dtype == np.float64 and np.isfinite(found).all()
    assert -found[0] == pytest.approx(math.sqrt(2 / math.pi), abs=0.02)
    assert -found[1] == pytest.approx(1.0, rel=1e-12)
    assert -found[2] == pytest.approx(1 / math.sqrt(count), rel=1e-12)
    order = np.argsort(found)
    assert (
        order[0] == 3 and order[1] == 1 and order[-1] == 2
    )  # nothing first, then the flattest; the spike stays


def test_aimer_of_many_gaussian_weights():
    checkpoint, experts = opened(moe_folder("olmoe"))
    found = np.concatenate(
        [criteria.get("aimer").score(checkpoint, experts, layer) for layer in experts.layers]
    )
    assert -found.mean() == pytest.approx(0.798, abs=0.01)


@pytest.mark.parametrize(("family", "storage"), STORAGES)
def test_aimer_is_mean_over_root_mean_square_of_all_matrices(family, storage, monkeypatch):
    folder = moe_folder(family, storage=storage)
    checkpoint, experts = opened(folder)
    layer = experts.layers[-1]
    monkeypatch.setattr("surgeon.experts.criteria.aimer.BLOCK", 101)  # uneven blocks
    found = criteria.get("aimer").score(checkpoint, experts, layer)
    model = loaded(folder)
    for expert in range(EXPERTS):
        wanted = matrices(model, family, layer.index, expert)
        values = [float(v) for name in ("gate", "up", "down") for v in wanted[name].reshape(-1)]
        ratio = (math.fsum(map(abs, values)) / len(values)) / math.sqrt(
            math.fsum(v * v for v in values) / len(values)
        )
        assert -found[expert] == pytest.approx(ratio, rel=1e-12)


# ---- router ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "storage"), STORAGES)
def test_router_norm_is_the_length_of_each_row(family, storage):
    folder = moe_folder(family, storage=storage)
    checkpoint, experts = opened(folder)
    layer = experts.layers[0]
    rows = state_of(folder)[next(layer.of("router")).name].double()
    np.testing.assert_array_equal(router_rows(checkpoint, layer), rows.float().numpy())
    found = criteria.get("router-norm").score(checkpoint, experts, layer)
    wanted = [math.sqrt(math.fsum(float(v) ** 2 for v in row)) for row in rows]
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


def naive_complete_linkage(distances, count):
    """Join the two clusters whose farthest members are nearest, again and again, by looking at all pairs."""
    clusters = [[i] for i in range(len(distances))]
    while len(clusters) > count:
        pairs = [
            (max(distances[a][b] for a in one for b in two), i, j)
            for i, one in enumerate(clusters) for j, two in enumerate(clusters) if i < j
        ]  # fmt: skip
        _, i, j = min(pairs)
        clusters[i] += clusters.pop(j)
    return sorted(tuple(sorted(cluster)) for cluster in clusters)


def naive_average_linkage(distances, count):
    clusters = [[i] for i in range(len(distances))]
    while len(clusters) > count:
        pairs = [
            (sum(distances[a][b] for a in one for b in two) / (len(one) * len(two)), i, j)
            for i, one in enumerate(clusters) for j, two in enumerate(clusters) if i < j
        ]  # fmt: skip
        _, i, j = min(pairs)
        clusters[i] += clusters.pop(j)
    return sorted(tuple(sorted(cluster)) for cluster in clusters)


@pytest.mark.parametrize("linkage", ["complete", "average"])
@pytest.mark.parametrize("shift", [0.0, -7.5])
def test_clusters_equal_a_naive_agglomeration(linkage, shift):
    naive = naive_complete_linkage if linkage == "complete" else naive_average_linkage
    for seed in range(6):
        rows = np.random.default_rng(seed).normal(size=(9, 4))
        distances = clustering.euclidean(rows) + shift
        for count in range(1, 10):
            assert clustering.clusters(distances, count, linkage) == naive(distances.tolist(), count), (
                seed,
                count,
            )


def test_ties_still_give_the_number_asked_for():
    distances = clustering.euclidean(np.zeros((6, 3)))
    for count in range(1, 7):
        assert len(clustering.clusters(distances, count, "complete")) == count


def test_distances_are_plain_and_equal_rows_have_none():
    rows = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    rows[3] = rows[1]
    found = clustering.euclidean(rows)
    assert found[1, 3] == 0.0
    for i in range(5):
        for j in range(5):
            wanted = math.sqrt(
                math.fsum((float(a) - float(b)) ** 2 for a, b in zip(rows[i], rows[j], strict=True))
            )
            assert found[i, j] == pytest.approx(wanted, rel=1e-12, abs=1e-15)


def test_router_distance_on_a_line():
    rows = np.array([[0.0], [1.0], [10.0], [13.0], [40.0]])
    # 0|1 at 1, 10|13 at 3: ties of distance to the mean go to the lower number; {0,1}|{10,13} at 13, where of 0 and 10
    # the second is nearer to the mean 6; with 40 at 40, mean 12.8: 10 stays.
    np.testing.assert_allclose(router_distance.scores_of(rows), [13.0, 1.0, 80.0, 3.0, 40.0])


def test_keeping_the_best_by_router_distance_keeps_one_of_each_cluster():
    for seed in range(5):
        rows = np.random.default_rng(seed).normal(size=(12, 6))
        scores = router_distance.scores_of(rows)
        for count in range(1, 13):
            kept = set(np.argsort(-scores, kind="stable")[:count])
            clusters = naive_complete_linkage(clustering.euclidean(rows).tolist(), count)
            assert all(len(kept & set(cluster)) == 1 for cluster in clusters)


def test_router_distance_keeps_routing_groups_apart():
    rows = np.random.default_rng(0).normal(size=(8, 5))
    rows[4:] = rows[:4]  # every expert has its double in the other group
    found = router_distance.scores_of(rows, groups=2)
    np.testing.assert_array_equal(found[:4], found[4:])
    np.testing.assert_array_equal(found[:4], router_distance.scores_of(rows[:4]))


def test_identical_router_rows_go_first():
    rows = np.random.default_rng(0).normal(size=(6, 5))
    rows[4] = rows[1]
    found = router_distance.scores_of(rows)
    assert found.argmin() in (1, 4) and found.min() == 0.0


def test_groups_are_clustered_equally_and_protected_ones_alone():
    distances = clustering.euclidean(np.random.default_rng(3).normal(size=(8, 4)))

    def cluster(members, count):
        chosen = np.array(members)
        return [
            tuple(chosen[list(c)])
            for c in clustering.clusters(distances[np.ix_(chosen, chosen)], count, "complete")
        ]

    found = clustering.in_groups(8, 4, 2, {5}, cluster, distances)
    assert (5,) in found and len(found) == 4 and sorted(e for c in found for e in c) == list(range(8))
    assert sum(max(c) < 4 for c in found) == 2 and sum(min(c) >= 4 for c in found) == 2
    full = clustering.in_groups(
        8, 4, 2, {4, 5}, cluster, distances
    )  # no place beside them: others join the nearest
    assert all(len({4, 5} & set(c)) == 1 for c in full if min(c) >= 4)
    for other in (6, 7):
        home = next(c for c in full if other in c)
        assert min((4, 5), key=lambda e: distances[e, other]) in home
    with pytest.raises(UsageError, match=r"4, 5, 7") as caught:
        clustering.in_groups(8, 4, 2, {4, 5, 7}, cluster, distances, "layer 3")
    assert caught.value.code == "E248" and "layer 3" in caught.value.message
    with pytest.raises(UsageError):
        clustering.in_groups(8, 3, 2, (), cluster, distances)


# ---- random ----------------------------------------------------------------------------------------


def test_random_depends_on_seed_and_layer_alone():
    score = criteria.get("random").score
    one = score(3, 4096, 7)
    np.testing.assert_array_equal(one, score(3, 4096, 7))
    np.testing.assert_array_equal(one[:10], score(3, 10, 7))
    assert not np.array_equal(one, score(4, 4096, 7)) and not np.array_equal(one, score(3, 4096, 8))
    assert one.min() >= 0 and one.max() < 1 and abs(one.mean() - 0.5) < 0.02
    assert len(set(one.tolist())) == 4096


@pytest.mark.parametrize(("name", "needs"), [("aimer", "weights"), ("router_norm", "weights"), ("router_distance", "weights"), ("random", "nothing")])  # fmt: skip
def test_registered_with_what_they_need(name, needs):
    assert name in criteria.known()
    found = criteria.get(name)
    assert (found.name, found.needs) == (name, needs)
