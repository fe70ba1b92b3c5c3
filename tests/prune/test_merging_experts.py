"""HC-SMoE and M-SMoE: what groups are made of, and what comes out, against the stock model and plain loops."""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from expert_folders import (
    EXPERTS,
    HIDDEN,
    STORAGES,
    TEXTS,
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
from surgeon.errors import InputError, UsageError
from surgeon.experts.coactivation import CoActivation
from surgeon.prune.experts.features import FeatureObserver, LayerFeatures, collect_features
from surgeon.prune.experts.merging import WEAKNESS, channel_order, hc_smoe, m_smoe, weight_distances
from surgeon.structure.experts.view import ExpertView
from surgeon.structure.experts.weights import ExpertWeights

ONE = Settings(threads=1, batch_tokens=64)


def features_of(family: str, **extra):
    checkpoint, experts = opened(moe_folder(family, **extra))
    return checkpoint, experts, collect_features(checkpoint, TEXTS, ONE, experts, sums=True, logits=True)


@torch.no_grad()
def plain_features(folder: Path, family: str, layers) -> dict[int, dict]:
    """Run the stock model and note, token by token, which experts ran and what they put out."""
    model = loaded(folder)
    found = {}
    handles = []
    for layer in layers:
        module, router = experts_module(model, layer), router_of(model, layer)
        table = found[layer] = {
            "tokens": [0] * EXPERTS,
            "sums": torch.zeros(EXPERTS, HIDDEN, dtype=torch.float64),
            "logits": [],
        }

        def see(module, args, out, table=table):
            hidden, index = args[0], args[1]
            for row, chosen in enumerate(index.tolist()):
                for expert in chosen:
                    alone = torch.tensor([[expert]]), torch.ones(1, 1)
                    table["sums"][expert] += (
                        type(module).forward(module, hidden[row : row + 1], *alone)[0].double()
                    )
                    table["tokens"][expert] += 1

        def note(router, args, out, table=table):
            x = args[0].reshape(-1, HIDDEN)
            bias = getattr(router, "bias", None)
            weight = next(p for n, p in router.named_parameters() if n.endswith("weight"))
            table["logits"].append((x @ weight.T + (0 if bias is None else bias)).double())

        handles += [module.register_forward_hook(see), router.register_forward_hook(note)]
    for ids in TEXTS:
        model(input_ids=torch.from_numpy(ids)[None])
    for handle in handles:
        handle.remove()
    return found


# ---- features ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_features_are_those_of_the_stock_model(family):
    _, experts, found = features_of(family)
    wanted = plain_features(moe_folder(family), family, [layer.index for layer in experts.running])
    assert found.keys() == wanted.keys()
    for layer, one in found.items():
        plain = wanted[layer]
        assert one.tokens.tolist() == plain["tokens"] and sum(plain["tokens"]) == 2 * sum(map(len, TEXTS))
        np.testing.assert_allclose(one.sums, plain["sums"].numpy(), rtol=1e-4, atol=1e-5)
        logits = torch.cat(plain["logits"]).numpy()
        for i in range(EXPERTS):
            for j in range(EXPERTS):
                a, b = logits[:, i], logits[:, j]
                cosine = float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))
                assert one.cosines()[i, j] == pytest.approx(cosine, abs=1e-5)


def test_features_survive_being_saved_and_restored():
    _, experts, found = features_of("mixtral")
    first = FeatureObserver(experts, sums=True, logits=True)
    first.layers = found
    state = first.state()
    assert all(isinstance(value, np.ndarray) for value in state.values())
    again = FeatureObserver(experts, sums=True, logits=True)
    again.restore(state)
    for layer, one in found.items():
        other = again.layers[layer]
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_array_equal(one.sums, other.sums)
        np.testing.assert_array_equal(one.agreement, other.agreement)
        np.testing.assert_array_equal(one.pairs.pairs, other.pairs.pairs)
        assert one.pairs.tokens == other.pairs.tokens == sum(map(len, TEXTS))


def test_a_column_of_zeros_has_no_cosine():
    one = LayerFeatures(CoActivation(3), agreement=np.array([[4.0, 0, 2], [0, 0, 0], [2, 0, 1]]))
    np.testing.assert_allclose(one.cosines(), [[1, 0, 1], [0, 0, 0], [1, 0, 1]])


# ---- HC-SMoE -----------------------------------------------------------------------------------------


def naive_average_linkage(features, members, count):
    clusters = [[i] for i in members]
    distance = lambda a, b: math.dist(features[a], features[b])  # noqa: E731
    while len(clusters) > count:
        _, i, j = min(
            (sum(distance(a, b) for a in one for b in two) / (len(one) * len(two)), i, j)
            for i, one in enumerate(clusters) for j, two in enumerate(clusters) if i < j
        )  # fmt: skip
        clusters[i] += clusters.pop(j)
    return sorted(sorted(cluster) for cluster in clusters)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_hc_smoe_clusters_mean_outputs(family):
    checkpoint, experts, features = features_of(family)
    wanted = plain_features(moe_folder(family), family, [layer.index for layer in experts.running])
    cut, _, record = hc_smoe(checkpoint, experts, 4, features=features)
    size = EXPERTS // experts.groups
    for layer in experts.running:
        plain = wanted[layer.index]
        tokens = plain["tokens"]
        means = [(plain["sums"][e] / max(1, tokens[e])).tolist() for e in range(EXPERTS)]
        naive = []
        for g in range(experts.groups):
            used = [e for e in range(g * size, (g + 1) * size) if tokens[e]]
            assert len(used) >= 4 // experts.groups
            naive += naive_average_linkage(means, used, 4 // experts.groups)
        found = record["layers"][str(layer.index)]
        assert sorted(one["members"] for one in found) == sorted(naive)
        for one in found:
            members = one["members"]
            assert one["expert"] == max(members, key=lambda e, n=tokens: (n[e], -e))
            if len(members) > 1:
                total = sum(tokens[e] for e in members)
                assert one["shares"] == pytest.approx([tokens[e] / total for e in members], rel=1e-8)
        assert cut.kept[layer.index] == tuple(sorted(one["expert"] for one in found))


@pytest.mark.parametrize(("family", "storage"), STORAGES)
@pytest.mark.parametrize("method", [hc_smoe, m_smoe])
def test_written_models_load_and_hold_the_weighted_means(family, storage, method, tmp_path):
    folder = moe_folder(family, storage=storage)
    checkpoint, experts, features = features_of(family, storage=storage)
    cut, replaced, record = method(checkpoint, experts, 4, features=features, router="average")
    small = write(ExpertView(checkpoint, experts, cut, replaced), tmp_path / "small")
    source, result = loaded(folder), strictly(small)
    changed = 0
    for layer in experts.running:
        for place, expert in enumerate(cut.kept[layer.index]):
            one = next(one for one in record["layers"][str(layer.index)] if one["expert"] == expert)
            members, shares = one["members"], one.get("shares", [1.0])
            parts = {m: matrices(source, family, layer.index, m) for m in members}
            if method is m_smoe:
                parts = {
                    m: permuted(parts[m], brute_order(parts[expert], parts[m], m == expert)) for m in members
                }
            for name, value in matrices(result, family, layer.index, place).items():
                wanted = sum(
                    s * parts[m][name].double() for s, m in zip(shares, members, strict=True)
                ).float()
                torch.testing.assert_close(value, wanted, rtol=2e-6, atol=2e-7)
            rows = router_of(source, layer.index).weight.detach().double()
            row = sum(s * rows[m] for s, m in zip(shares, members, strict=True)).float()
            torch.testing.assert_close(
                router_of(result, layer.index).weight.detach()[place], row, rtol=2e-6, atol=2e-7
            )
            changed += len(members) > 1
    assert changed
    assert all(bool(torch.isfinite(value).all()) for value in logits(loaded(small)))


def brute_order(leader, member, same):
    """Return the best matching of channels, by a solver written here (Hungarian method in plain loops)."""
    width = len(leader["up"])
    if same:
        return list(range(width))
    gain = (
        leader["gate"].double() @ member["gate"].double().T + leader["up"].double() @ member["up"].double().T
        + leader["down"].double().T @ member["down"].double()
    )  # fmt: skip
    if "gate_bias" in leader:
        gain += torch.outer(leader["gate_bias"].double(), member["gate_bias"].double())
        gain += torch.outer(leader["up_bias"].double(), member["up_bias"].double())
    return hungarian((-gain).tolist())


def hungarian(cost):
    """Shortest augmenting paths with potentials, O(n^3); returns the column of each row."""
    n = len(cost)
    u, v, match = [0.0] * (n + 1), [0.0] * (n + 1), [0] * (n + 1)
    for row in range(1, n + 1):
        match[0], at = row, 0
        least, came, used = [math.inf] * (n + 1), [0] * (n + 1), [False] * (n + 1)
        while True:
            used[at] = True
            i, step, then = match[at], math.inf, 0
            for j in range(1, n + 1):
                if not used[j]:
                    slack = cost[i - 1][j - 1] - u[i] - v[j]
                    if slack < least[j]:
                        least[j], came[j] = slack, at
                    if least[j] < step:
                        step, then = least[j], j
            for j in range(n + 1):
                if used[j]:
                    u[match[j]] += step
                    v[j] -= step
                else:
                    least[j] -= step
            at = then
            if match[at] == 0:
                break
        while at:
            match[at] = match[came[at]]
            at = came[at]
    order = [0] * n
    for j in range(1, n + 1):
        order[match[j] - 1] = j - 1
    return order


def permuted(parts, order):
    found = {}
    for name, value in parts.items():
        found[name] = value if name == "down_bias" else value[:, order] if name == "down" else value[order]
    return found


def test_experts_without_tokens_are_dropped_before_any_are_merged():
    checkpoint, experts, features = features_of("mixtral")
    for one in features.values():
        for expert in (0, 5):
            one.pairs.counts[expert] = 0
            one.sums[expert] = 0
    for method in (hc_smoe, m_smoe):
        cut, replaced, record = method(checkpoint, experts, 4, features=features)
        for listed in record["layers"].values():
            assert not {0, 5} & {m for one in listed for m in one["members"]}
        assert any(remark.startswith("6 experts were given no token") for remark in record["remarks"])
        # more places than used experts: filled up by number, nothing merged
        cut, replaced, _ = method(checkpoint, experts, 7, features=features)
        assert replaced is None and all(kept == (0, 1, 2, 3, 4, 6, 7) for kept in cut.kept.values())


def test_without_text_hc_smoe_goes_by_weights():
    checkpoint, experts = opened(moe_folder("gpt_oss"))
    model = loaded(moe_folder("gpt_oss"))
    _, _, record = hc_smoe(checkpoint, experts, 4)
    assert record["features"] == "weights"
    for layer in experts.running:
        flat = [
            torch.cat([v.reshape(-1) for v in matrices(model, "gpt_oss", layer.index, e).values()]).double().tolist()
            for e in range(EXPERTS)
        ]  # fmt: skip
        found = weight_distances(checkpoint, layer)
        for i in range(EXPERTS):
            for j in range(EXPERTS):
                assert found[i, j] == pytest.approx(math.dist(flat[i], flat[j]), rel=1e-6)
        listed = record["layers"][str(layer.index)]
        assert sorted(one["members"] for one in listed) == naive_average_linkage(flat, range(EXPERTS), 4)
        for one in listed:
            if len(one["members"]) > 1:
                assert len(set(one["shares"])) == 1


def test_protected_experts_take_no_part():
    checkpoint, experts, features = features_of("mixtral")
    for method in (hc_smoe, m_smoe):
        _, _, plain = method(checkpoint, experts, 3, features=features)
        big = next(one for one in plain["layers"]["2"] if len(one["members"]) > 1)
        loser = next(e for e in big["members"] if e != big["expert"])
        cut, replaced, record = method(checkpoint, experts, 3, features=features, protected={2: {loser}})
        assert {"expert": loser, "members": [loser]} in record["layers"]["2"] and loser in cut.kept[2]
        assert not [name for name in replaced.tensors if f".2.block_sparse_moe.experts.{loser}." in name]


# ---- M-SMoE ------------------------------------------------------------------------------------------


def test_m_smoe_groups_around_the_most_used():
    checkpoint, experts, features = features_of("qwen3_moe")
    cut, _, record = m_smoe(checkpoint, experts, 3, features=features)
    for layer in experts.running:
        tokens, cosines = features[layer.index].tokens.tolist(), features[layer.index].cosines()
        dominant = sorted(range(EXPERTS), key=lambda e: (-tokens[e], e))[:3]
        assert cut.kept[layer.index] == tuple(sorted(dominant))
        for one in record["layers"][str(layer.index)]:
            for member in one["members"]:
                if member not in dominant:
                    assert cosines[one["expert"], member] == max(cosines[d, member] for d in dominant)
        joined = sorted(m for one in record["layers"][str(layer.index)] for m in one["members"])
        assert joined == sorted({*dominant, *(e for e in range(EXPERTS) if tokens[e])})


def test_alignment_finds_the_best_of_all_permutations():
    drawn = np.random.default_rng(0)
    for gated in (True, False):
        one, two = (
            ExpertWeights(
                drawn.normal(size=(6, 4)).astype(np.float32) if gated else None, drawn.normal(size=(6, 4)).astype(np.float32),
                drawn.normal(size=(4, 6)).astype(np.float32), up_bias=drawn.normal(size=6).astype(np.float32),
            )
            for _ in range(2)
        )  # fmt: skip

        def gain(order, one=one, two=two):
            total = 0.0
            for j, k in enumerate(order):
                total += (
                    float(one.up[j] @ two.up[k])
                    + float(one.down[:, j] @ two.down[:, k])
                    + float(one.up_bias[j] * two.up_bias[k])
                )
                if one.gate is not None:
                    total += float(one.gate[j] @ two.gate[k])
            return total

        best = max(itertools.permutations(range(6)), key=gain)
        assert channel_order(one, two).tolist() == list(best)


@pytest.mark.parametrize(
    ("family", "storage"),
    [("mixtral", "hub"), ("mixtral", "fused"), ("granitemoe", "hub"), ("gpt_oss", "hub")],
)
def test_a_permuted_copy_is_put_in_order_again(family, storage, tmp_path):
    """Expert 6 is expert 1 with its channels shuffled: the same function, and merged it must be expert 1 itself."""
    order = torch.from_numpy(np.random.default_rng(0).permutation(24))
    both = {
        "concatenated": torch.cat([order, 24 + order]),
        "interleaved": torch.stack([2 * order, 2 * order + 1], 1).reshape(-1),
    }

    def change(state):
        for name, value in list(state.items()):
            if name.endswith(("experts.1.w1.weight", "experts.1.w3.weight")):
                state[name.replace("experts.1.", "experts.6.")] = value[order].clone()
            elif name.endswith("experts.1.w2.weight"):
                state[name.replace("experts.1.", "experts.6.")] = value[:, order].clone()
            elif name.endswith("gate_up_proj_bias"):
                value[6] = value[1][both["interleaved"]]
            elif name.endswith("down_proj_bias"):
                value[6] = value[1]
            elif name.endswith(("gate_up_proj", "input_linear.weight")):
                value[6] = (
                    value[1][:, both["interleaved"]]
                    if family == "gpt_oss"
                    else value[1][both["concatenated"]]
                )
            elif name.endswith(("experts.down_proj", "output_linear.weight")):
                value[6] = value[1][order] if family == "gpt_oss" else value[1][:, order]

    folder = edited(moe_folder(family, storage=storage), tmp_path / "shuffled", change)
    checkpoint, experts = opened(folder)
    features = collect_features(checkpoint, TEXTS, ONE, experts, sums=False, logits=True)
    for one in features.values():  # let 1 dominate and 6 join it
        one.pairs.counts[:] = [4, 9, 8, 7, 6, 5, 3, 2]
        one.agreement = np.eye(EXPERTS)
        one.agreement[1, 6] = one.agreement[6, 1] = 0.9
    cut, replaced, record = m_smoe(checkpoint, experts, 6, features=features)
    source, result = (
        loaded(folder),
        strictly(write(ExpertView(checkpoint, experts, cut, replaced), tmp_path / "small")),
    )
    for layer in experts.running:
        assert next(one for one in record["layers"][str(layer.index)] if one["expert"] == 1)["members"] == [
            1,
            6,
        ]
        wanted = matrices(source, family, layer.index, 1)
        for name, value in matrices(result, family, layer.index, cut.kept[layer.index].index(1)).items():
            torch.testing.assert_close(value, wanted[name], rtol=1e-6, atol=1e-7)


# ---- both --------------------------------------------------------------------------------------------


def test_planted_duplicates_merge_to_themselves(tmp_path):
    def change(state):
        for name, value in list(state.items()):
            if ".experts.3." in name:
                state[name.replace(".experts.3.", ".experts.5.")] = value.clone()

    folder = edited(moe_folder("mixtral"), tmp_path / "twins", change)
    checkpoint, experts = opened(folder)
    before = state_of(folder)
    _, replaced, record = hc_smoe(checkpoint, experts, 7)
    assert all([3, 5] in [one["members"] for one in listed] for listed in record["layers"].values())
    for name, info in replaced.tensors.items():
        np.testing.assert_array_equal(replaced.read(name, 0, info.elements), before[name].reshape(-1).numpy())


def test_the_router_keeps_the_representatives_row_by_default():
    checkpoint, experts, features = features_of("olmoe")
    _, kept, record = hc_smoe(checkpoint, experts, 4, features=features)
    assert record["router"] == "representative" and not [name for name in kept.tensors if "#" in name]
    _, mean, _ = hc_smoe(checkpoint, experts, 4, features=features, router="average")
    assert all(name.rpartition("#")[0].endswith("mlp.gate.weight") for name in mean.tensors if "#" in name)
    assert [name for name in mean.tensors if "#" in name]
    with pytest.raises(UsageError, match="no way to make a router row") as caught:
        hc_smoe(checkpoint, experts, 4, features=features, router="sum")
    assert caught.value.code == "E248"


def test_the_weakness_is_said():
    checkpoint, experts, features = features_of("mixtral")
    for method in (hc_smoe, m_smoe):
        record = method(checkpoint, experts, 4, features=features)[2]
        assert WEAKNESS in record["remarks"] and "2510.13999" in WEAKNESS


def test_results_repeat_and_keep_the_size_small():
    checkpoint, experts, features = features_of("granitemoe")
    for method in (hc_smoe, m_smoe):
        first, again = (method(checkpoint, experts, 4, features=features) for _ in range(2))
        assert first[0] == again[0] and first[2] == again[2] and first[1].identity == again[1].identity
        view = ExpertView(checkpoint, experts, first[0], first[1])
        routed = [
            info
            for name, info in view.tensors.items()
            if name.endswith(("input_linear.weight", "output_linear.weight"))
        ]
        assert len(routed) == 2 * len(experts.running) and all(info.shape[0] == 4 for info in routed)


def test_quantized_experts_cannot_be_merged():
    from dataclasses import replace

    checkpoint, experts, features = features_of("mixtral")
    coded = replace(experts, layers=tuple(replace(layer, quantized="fp8") for layer in experts.layers))
    with pytest.raises(InputError) as caught:
        hc_smoe(checkpoint, coded, 4, features=features)
    assert caught.value.code == "E442"
