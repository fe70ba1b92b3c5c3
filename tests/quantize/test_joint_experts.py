"""Removing experts and choosing widths together: losses by token loops over the stock model, choices by trying all."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measuring_models import RTN, SETTINGS, Model, model_folder, texts

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "structure"))
from structure_models import stock, write

from surgeon.calibrate.matrices import matrices_of
from surgeon.calibrate.routing import route
from surgeon.calibrate.settings import Settings
from surgeon.calibrate.skeleton import Skeleton
from surgeon.checkpoint.checkpoint import open_path
from surgeon.errors import UsageError
from surgeon.formats.compressed_runtimes import Reader
from surgeon.formats.scheme import Scheme
from surgeon.quantize import forms
from surgeon.quantize.joint_experts import BlockOutputs, block_outputs, bytes_beside, joint_experts, losses
from surgeon.quantize.measuring.pmq_scores import LayerScores, pmq_scores
from surgeon.structure.experts.find import experts_of
from surgeon.structure.experts.view import ExpertView

MENU = (Scheme("int", 2, -1), Scheme("int", 4, -1))


def by_token_loops(model):
    """Return (parts [n], energy) of every block, one token and one expert at a time."""
    network = model.stock()
    given = {}
    for path, module in network.named_modules():
        if path.endswith(".experts"):
            given[path] = (module, [])
            module.register_forward_hook(
                lambda part, args, kwargs, out, path=path: given[path][1].append([a.detach() for a in (*args, *kwargs.values())]),
                with_kwargs=True,
            )  # fmt: skip
    with torch.no_grad():
        for ids in model.samples:
            network(torch.from_numpy(ids)[None])
    found = []
    for module, batches in given.values():
        parts, energy = np.zeros(module.num_experts), 0.0
        for hidden, index, weights in batches:
            for token, chosen, gates in zip(hidden, index, weights, strict=True):
                total = torch.zeros_like(token, dtype=torch.float64)
                for expert, gate in zip(chosen.tolist(), gates, strict=True):
                    gate_up = module.gate_up_proj[expert].detach() @ token
                    half = len(gate_up) // 2
                    inner = torch.nn.functional.silu(gate_up[:half]) * gate_up[half:]
                    out = (gate * (module.down_proj[expert].detach() @ inner)).double()
                    parts[expert] += float(out @ out)
                    total += out
                energy += float(total @ total)
        found.append((parts, energy))
    return found


@pytest.mark.parametrize(
    ("family", "settings"),
    [("mixtral", SETTINGS), ("qwen3_moe", SETTINGS), ("mixtral", Settings(threads=1, stream_experts=True, batch_tokens=96))],
)  # fmt: skip
def test_outputs_are_those_of_token_loops(family, settings):
    model = Model(family, num_hidden_layers=2)
    experts = experts_of(model.checkpoint)
    found = block_outputs(model.checkpoint, experts, model.samples, settings)
    expected = by_token_loops(model)
    assert [one.layer for one in found] == [layer.index for layer in experts.running] and len(found) == len(
        expected
    )
    for one, (parts, energy) in zip(found, expected, strict=True):
        assert one.parts == pytest.approx(parts, rel=1e-4) and one.energy == pytest.approx(energy, rel=1e-4)
        assert parts.min() < parts.max()


def test_a_removed_expert_changes_the_block_by_its_loss():
    """Removal with gates as they are: the block without what one expert adds."""
    model = Model("mixtral", num_hidden_layers=2)
    experts = experts_of(model.checkpoint)
    scores = pmq_scores(
        model.checkpoint, experts, model.layers, MENU, model.form, model.samples, SETTINGS, RTN
    )
    outputs = block_outputs(model.checkpoint, experts, model.samples, SETTINGS)
    kept, removal = losses(scores, outputs)
    network = model.stock()
    module = network.model.layers[0].mlp.experts
    given = []
    module.register_forward_hook(lambda part, args, out: given.append((args, out.detach())))
    with torch.no_grad():
        for ids in model.samples:
            network(torch.from_numpy(ids)[None])
        for expert in (0, 3):
            error = energy = 0.0
            for (hidden, index, weights), out in list(given):
                without = torch.where(index == expert, 0.0, weights)
                changed = module(hidden, index, without)
                error += float((changed - out).double().square().sum())
                energy += float(out.double().square().sum())
                given.pop()  # the hook ran for this call too
            assert removal[0, expert] == pytest.approx(error / energy, rel=1e-4)
    # The same scale: 2 bits lose more than 4, and storing the expert in any way loses less than having none.
    assert (kept[:, :, 0] > kept[:, :, 1]).all() and (kept[:, :, 1] < removal).all()
    assert kept[0, 0, 0] == pytest.approx(scores[0].error[0, 0] ** 2 / outputs[0].energy)


def drawn(seed, layers=2, count=4):
    """Return scores and outputs of a model that was never run, and where its experts would be."""
    generator = np.random.default_rng(seed)
    model = Model("mixtral", num_hidden_layers=layers)
    experts = experts_of(model.checkpoint)
    assert experts.count == count
    scores = [
        LayerScores(
            layer.index, tuple(s.name for s in MENU),
            tuple((f"{layer.index}.{e}.gate_up", f"{layer.index}.{e}.down") for e in range(count)),
            generator.random(count), generator.random(count),
            np.sort(generator.random((count, 2)), axis=1)[:, ::-1], np.tile([100, 190], (count, 1)),
        ) for layer in experts.running
    ]  # fmt: skip
    outputs = [
        BlockOutputs(one.layer, generator.random(count) * 0.8, float(generator.uniform(1, 3)))
        for one in scores
    ]
    return experts, scores, outputs


def tried(scores, outputs, budget, active, beside, by_expert):
    """Return the least loss of any number, sets and widths, by trying all."""
    kept, removal = losses(scores, outputs)
    best = np.inf
    count = kept.shape[1]
    for gone in range(count - active + 1):
        choices = []  # of each layer: (loss, size)
        for layer in range(len(kept)):
            found = []
            for removed in itertools.combinations(range(count), gone):
                stay = [e for e in range(count) if e not in removed]
                widths = (
                    itertools.product(range(2), repeat=len(stay))
                    if by_expert
                    else [(j,) * len(stay) for j in range(2)]
                )
                for chosen in widths:
                    loss = sum(removal[layer, e] for e in removed) + sum(
                        kept[layer, e, j] for e, j in zip(stay, chosen, strict=True)
                    )
                    found.append((loss, sum((100, 190)[j] + beside for j in chosen)))
            choices.append(found)
        for combination in itertools.product(*choices):
            if sum(size for _, size in combination) <= budget:
                best = min(best, sum(loss for loss, _ in combination))
    return best


@pytest.mark.parametrize("granularity", ["layer", "expert"])
@pytest.mark.parametrize("seed", range(4))
def test_choice_equals_trying_all(seed, granularity):
    experts, scores, outputs = drawn(seed)
    beside = dict.fromkeys((one.layer for one in scores), 10)
    for budget in (500, 800, 1300):
        found = joint_experts(experts, scores, outputs, MENU, budget, beside=beside, granularity=granularity)
        best = tried(scores, outputs, budget, experts.top_k, 10, granularity == "expert")
        assert found.loss == pytest.approx(best, rel=2e-4) and found.size <= budget
        stay = {label.rpartition(".")[0] for label in found.schemes}
        for one in scores:
            ids = found.cut.experts(one.layer, experts.count)
            assert len(ids) == experts.count - found.removed
            assert {f"{one.layer}.{e}" for e in ids} == {
                name for name in stay if name.startswith(f"{one.layer}.")
            }
            if granularity == "layer":
                assert len({found.schemes[label] for e in ids for label in one.members[e]}) == 1


def test_super_experts_stay_and_counts_are_obeyed():
    experts, scores, outputs = drawn(1)
    beside = dict.fromkeys((one.layer for one in scores), 0)
    free = joint_experts(experts, scores, outputs, MENU, 2 * 2 * 100, beside=beside)
    assert free.removed == 2
    gone = next(e for e in range(4) if e not in free.cut.kept[scores[0].layer])
    scores[0] = replace(scores[0], super_experts=(gone,))
    held = joint_experts(experts, scores, outputs, MENU, 2 * 2 * 100, beside=beside)
    assert gone in held.cut.kept[scores[0].layer] and held.loss >= free.loss
    one = joint_experts(experts, scores, outputs, MENU, 2 * 3 * 100, beside=beside, counts=[1])
    assert one.removed == 1 and {len(ids) for ids in one.cut.kept.values()} == {3}
    whole = joint_experts(experts, scores, outputs, MENU, 10**6, beside=beside)
    assert whole.removed == 0 and whole.cut.kept == {} and {s.bits for s in whole.schemes.values()} == {4}


def test_the_cut_is_one_that_can_be_written():
    model = Model("mixtral", num_hidden_layers=2)
    experts = experts_of(model.checkpoint)
    scores = pmq_scores(
        model.checkpoint, experts, model.layers, MENU, model.form, model.samples, SETTINGS, RTN
    )
    outputs = block_outputs(model.checkpoint, experts, model.samples, SETTINGS)
    beside = bytes_beside(model.checkpoint, experts)
    assert set(beside.values()) == {4 * experts.hidden}  # a row of the router in float32
    least = sum(int(one.sizes[0, 0]) * experts.top_k for one in scores)
    budget = least + sum(beside.values()) * experts.top_k
    found = joint_experts(experts, scores, outputs, MENU, budget, beside=beside)
    assert found.removed == experts.count - experts.top_k and found.size == budget
    view = ExpertView(model.checkpoint, experts, found.cut)
    kept = {view.source_names[name] for name in view.tensors if ".experts." in name}
    assert kept == set(found.schemes)
    with pytest.raises(UsageError) as refused:
        joint_experts(experts, scores, outputs, MENU, budget - 1, beside=beside)
    assert refused.value.code == "E462"


@pytest.mark.parametrize("granularity", ["layer", "expert"])
def test_routing_groups_lose_equally_many_and_the_result_is_the_masked_source(granularity, tmp_path):
    """DeepSeek: two groups of four, of which a token uses one. The stock model of what is written against the stock
    source whose router does not see what went."""
    extra = (("n_group", 2), ("topk_group", 1), ("n_routed_experts", 8), ("num_experts_per_tok", 2))
    folder = model_folder("deepseek_v3", extra)
    checkpoint = open_path(folder)
    experts, samples = experts_of(checkpoint), texts((40, 33))
    assert (experts.groups, experts.count) == (2, 8)
    layers = matrices_of(checkpoint, Skeleton(checkpoint, SETTINGS))
    form = forms.get("compressed-tensors", Reader(dtype="F32"), "deepseek_v3")
    scores = pmq_scores(checkpoint, experts, layers, MENU, form, samples, SETTINGS, RTN)
    outputs = block_outputs(checkpoint, experts, samples, SETTINGS)
    beside = bytes_beside(checkpoint, experts)
    budget = sum(int(one.sizes[0, 1]) * 5 for one in scores)
    found = joint_experts(experts, scores, outputs, MENU, budget, beside=beside, granularity=granularity)
    assert found.removed in (2, 4) and found.size <= budget
    kept = {one.layer: found.cut.kept[one.layer] for one in scores}
    for ids in kept.values():
        assert sum(e < 4 for e in ids) == len(ids) / 2 == (8 - found.removed) / 2
    view = ExpertView(checkpoint, experts, found.cut)
    for name in view.tensors:  # a super expert, or what is not of experts, is as it was
        source = view.source_names[name]
        assert ".experts." not in name or source in found.schemes
    written = write(view, tmp_path / "cut")
    ids = torch.from_numpy(np.stack([samples[0][:33], samples[1]]))
    with torch.no_grad():
        small = stock(written, dtype=torch.float32, experts_implementation="eager")(ids).logits
        model = stock(folder, dtype=torch.float32, experts_implementation="eager")
        plain = model(ids).logits
        linear, rows = torch.nn.functional.linear, {}
        for layer, stay in kept.items():
            router, gone = model.model.layers[layer].mlp.gate, [e for e in range(8) if e not in stay]
            rows[id(router.weight)] = gone
            router.e_score_correction_bias[gone] = -1e9

        def masking(inputs, weight, bias=None):
            out = linear(inputs, weight, bias)
            if id(weight) in rows:
                out[..., rows[id(weight)]] = -1e30
            return out

        torch.nn.functional.linear = masking
        try:
            masked = model(ids).logits
        finally:
            torch.nn.functional.linear = linear
    assert torch.allclose(small, masked, atol=1e-5) and not torch.allclose(plain, masked, atol=1e-2)


def test_refusals():
    experts, scores, outputs = drawn(0)
    beside = dict.fromkeys((one.layer for one in scores), 0)
    for call in (
        lambda: joint_experts(experts, scores[:1], outputs, MENU, 10**6, beside=beside),
        lambda: joint_experts(experts, scores, outputs, MENU, 10**6, beside=beside, counts=[3]),
    ):
        with pytest.raises(UsageError) as refused:
            call()
        assert refused.value.code == "E489"
    with pytest.raises(ValueError, match="menu"):
        joint_experts(experts, scores, outputs, MENU[::-1], 10**6, beside=beside)


@pytest.mark.parametrize("family", ["llama4_text", "deepseek_v3", "granitemoe"])
def test_outputs_agree_with_what_routing_shows(family):
    """Weights on inputs (Llama 4), groups and scales: contributions as the routing pass has them."""
    folder = model_folder(family)
    checkpoint = open_path(folder)
    experts = experts_of(checkpoint)
    samples = texts((40, 33))

    class Sums:
        identity, wants_logits, wants_sums = "sums", False, False

        def __init__(self):
            self.parts = {
                layer.index: torch.zeros(layer.count + 1, dtype=torch.float64) for layer in experts.running
            }

        def routed(self, batch):
            squares = batch.contributions.double().square()
            self.parts[batch.layer].index_add_(0, batch.index.reshape(-1), squares.reshape(-1))

    shown = Sums()
    route(checkpoint, samples, SETTINGS, shown, experts=experts)
    for one in block_outputs(checkpoint, experts, samples, SETTINGS):
        assert one.parts == pytest.approx(shown.parts[one.layer][:-1].numpy(), rel=1e-5)
        assert one.energy > 0
