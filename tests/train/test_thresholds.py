"""Learned thresholds: gradients against differences, allocation where the answer is known, the budget, the freeze."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from train_models import disturbed, model_folder, read, stock, texts

from surgeon.checkpoint.checkpoint import open_path
from surgeon.errors import InputError, Interrupted, UsageError
from surgeon.structure.check import shapes
from surgeon.structure.cut import Cut
from surgeon.structure.find import structure_of
from surgeon.train.bypass import Bypass, Statistics
from surgeon.train.cost import Cost
from surgeon.train.freeze import Learned, freeze, kept_units
from surgeon.train.gates import Control, Gate, Gates
from surgeon.train.loop import Loop, Pace
from surgeon.train.saved_state import SavedState
from surgeon.train.threshold_task import ThresholdTask
from surgeon.train.thresholds import Budget, Options, thresholds

BUDGET = Budget(remaining=0.7, warm_up=0.1)
QUICK = Options(budget=BUDGET, steps=24, batch=4, held_out=0.2, checkpoint_every=5, threshold_rate=0.05)


def costs(folder, kind="parameters"):
    checkpoint = open_path(folder)
    structure = structure_of(checkpoint)
    if kind == "flops":
        return Cost.flops(checkpoint, structure, 16)
    return Cost.parameters(checkpoint, structure)


def toy_cost(units: dict) -> Cost:
    return Cost("units", 0.0, {key: np.arange(count + 1.0) for key, count in units.items()})


# ---- gates -------------------------------------------------------------------------------------------


def test_scores_are_norms_of_columns_times_inputs():
    control = Control(mode="observe")
    linear = nn.Linear(6, 4, bias=False)
    gate = Gate(linear, 3, control)
    batches = [torch.randn(2, 5, 6) for _ in range(3)]
    valid = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    control.valid = valid
    average = np.zeros(6)
    for batch in batches:
        linear(batch)
        average = 0.99 * average + 0.01 * (batch[valid].numpy().astype(np.float64) ** 2).mean(0)
    average /= 1 - 0.99**3
    weight = linear.weight.detach().numpy()
    raw = [
        np.linalg.norm(weight[:, 2 * u : 2 * u + 2] * np.sqrt(average[2 * u : 2 * u + 2])) for u in range(3)
    ]
    assert gate.scores().numpy() == pytest.approx(raw / np.mean(raw), rel=1e-4)


def test_nothing_is_masked_at_the_start():
    control = Control(mode="observe", temperature=0.3)
    linear = nn.Linear(8, 4)
    gate = Gate(linear, 8, control)
    inputs = torch.randn(3, 7, 8)
    dense = linear(inputs)
    gate.start()
    assert gate.tau.item() == pytest.approx(gate.scores().min().item() - 0.3)
    control.mode = "learn"
    assert torch.equal(linear(inputs), dense)  # the straight-through ones are exact
    assert bool((gate.mask == 1).all())


def test_gradients_of_thresholds_equal_differences():
    """Soft masks in float64 through a nonlinear network of two gated matrices."""
    torch.manual_seed(0)
    first, second = nn.Linear(6, 4).double(), nn.Linear(4, 3).double()
    control = Control(mode="observe", temperature=0.2, hard=False)
    gates = [Gate(first, 3, control), Gate(second, 4, control)]
    inputs, target = torch.randn(9, 6).double(), torch.randn(9, 3).double()
    curve = Cost(
        "units", 1.0, {(0, "ffn"): np.array([0, 1.0, 1.5, 3.0]), (1, "ffn"): np.array([0, 2.0, 2.5, 3, 5])}
    )

    def forward():
        return second(torch.tanh(first(inputs)))

    forward()
    with torch.no_grad():
        gates[0].tau.fill_(0.9)
        gates[1].tau.fill_(1.05)
    control.mode = "learn"
    for gate in gates:
        gate.observe = lambda inputs: None  # the scores stand still

    def loss():
        out = (forward() - target).square().mean()
        return out + curve.expected({(0, "ffn"): gates[0].mask.sum(), (1, "ffn"): gates[1].mask.sum()})

    loss().backward()
    for gate in gates:
        found, values = gate.tau.grad.item(), []
        for shift in (1e-6, -1e-6):
            with torch.no_grad():
                gate.tau.add_(shift)
                values.append(loss().item())
                gate.tau.sub_(shift)
        assert found == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5)
        assert found != 0


def test_the_best_units_always_pass():
    control = Control(mode="observe")
    linear = nn.Linear(5, 3)
    gate = Gate(linear, 5, control, min_keep=2)
    inputs = torch.randn(4, 5)
    linear(inputs)
    with torch.no_grad():
        gate.tau.fill_(100.0)
    control.mode = "learn"
    linear(inputs)
    assert gate.mask.detach().nonzero().flatten().tolist() == sorted(gate.scores().topk(2).indices.tolist())


# ---- learning on toys --------------------------------------------------------------------------------


def learn(scratch, gates, budget, steps, data_loss, rate=0.03, name="toy"):
    cost = toy_cost({(layer, kind): gate.units for layer, kind, gate in gates.all()})
    task = ThresholdTask(gates, cost, budget, steps, data_loss, rate=rate)
    Loop(task, Pace(steps, decay="constant"), SavedState(scratch, {"name": name})).run()
    options = {(layer, kind): Learned(gate.scores().double().numpy(), gate.tau.item(), least=gate.min_keep)
               for layer, kind, gate in gates.all()}  # fmt: skip
    return task, kept_units(options, freeze(options, cost, budget.remaining * cost.dense))


@pytest.mark.parametrize("control", ["penalty", "dual"])
def test_a_single_linear_layer_keeps_the_largest(scratch, control):
    """y = sum a_j x_j: the mask is the top k of |a_j| rms(x_j)."""
    torch.manual_seed(1)
    units = 12
    linear = nn.Linear(units, 1, bias=False)
    scale = torch.linspace(0.5, 2.0, units)[torch.randperm(units)]
    gates = Gates(Control())
    gates.ffn[0] = Gate(linear, units, gates.control)
    linear.requires_grad_(False)

    def data_loss(step, part):
        inputs = scale * torch.randn(64, units, generator=torch.Generator().manual_seed(step))
        return (linear(inputs) - inputs @ linear.weight[0][:, None]).square().mean(), {}

    task, kept = learn(scratch, gates, Budget(remaining=5 / 12, control=control), 150, data_loss)
    truth = (linear.weight[0].abs() * scale).topk(5).indices.tolist()
    assert kept[0, "ffn"] == tuple(sorted(truth))
    assert float(gates.ffn[0].mask.detach().sum()) <= 7  # the threshold has moved by itself
    assert (task.factor > 0) == (control == "dual")


def test_all_pruning_lands_in_the_useless_layer(scratch):
    """Two layers of equal size, the second writes nothing; uniform pruning would halve both."""
    torch.manual_seed(2)
    useful, useless = nn.Linear(16, 4, bias=False), nn.Linear(16, 4, bias=False)
    nn.init.zeros_(useless.weight)
    gates = Gates(Control())
    gates.ffn = {0: Gate(useful, 16, gates.control), 1: Gate(useless, 16, gates.control)}
    for module in (useful, useless):
        module.requires_grad_(False)

    def data_loss(step, part):
        x = torch.randn(64, 16, generator=torch.Generator().manual_seed(step))
        wanted = x @ useful.weight.T
        return 20 * (useful(x) + useless(x) - wanted).square().mean(), {}

    _, kept = learn(scratch, gates, Budget(remaining=17.5 / 32), 150, data_loss)
    assert len(kept[0, "ffn"]) == 16
    assert len(kept[1, "ffn"]) == 1


def test_masks_flip_back_while_the_target_only_falls(scratch):
    """Scores of two units swap half-way: what was masked comes back before the freeze."""
    linear = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 1.0, 1.0, 1.0]]))
    linear.requires_grad_(False)
    gates = Gates(Control())
    gate = gates.ffn[0] = Gate(linear, 4, gates.control)
    masks = []

    def data_loss(step, part):
        scale = torch.tensor([3.0, 2.5, 0.2, 2.0] if step < 100 else [3.0, 0.0, 30.0, 2.0])
        x = scale * torch.randn(64, 4, generator=torch.Generator().manual_seed(step))
        found = (linear(x) - x.sum(1, keepdim=True)).square().mean()
        if gate.mask is not None:
            masks.append(gate.mask.detach().clone())
        return found, {}

    budget = Budget(remaining=0.75)
    learn(scratch, gates, budget, 300, data_loss)
    changes = torch.stack(masks)[:, 2]
    assert changes[0] == 1 and changes.min() == 0 and changes[-1] == 1
    path = [budget.target(step, 300) for step in range(300)]
    assert path[0] == 1 and path[-1] == pytest.approx(0.75)
    assert path == sorted(path, reverse=True)
    half = budget.warm_steps(300) + 0.4 * (300 - budget.warm_steps(300))
    assert budget.target(half, 300) == pytest.approx(1 - 0.25 * (1 - 0.5**3))


def test_a_temperature_that_is_too_low_is_doubled(scratch):
    linear = nn.Linear(4, 1, bias=False).requires_grad_(False)
    gates = Gates(Control())
    gate = gates.ffn[0] = Gate(linear, 4, gates.control)

    def data_loss(step, part):
        found = linear(torch.ones(2, 4)).sum()
        if gates.control.mode == "learn":
            with torch.no_grad():
                gate.tau.fill_(-5.0)
        return found, {}

    task, _ = learn(scratch, gates, Budget(remaining=0.5, hot=0.02, cold=0.01), 10, data_loss)
    assert task.heat > 1
    assert "temperature is doubled" in task.warnings[0]


# ---- the freeze --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_the_freeze_holds_the_budget_and_wastes_no_step(seed):
    drawn = np.random.default_rng(seed)
    learned, curves = {}, {}
    for layer in range(4):
        for kind, units, grid in (("attention", 4, 1), ("ffn", int(drawn.integers(20, 41)), 8)):
            learned[layer, kind] = Learned(drawn.gamma(2.0, 0.5, units), float(drawn.uniform(0, 2)), grid)
            curves[layer, kind] = np.concatenate([[0], np.sort(drawn.uniform(1, 9, units))])
    cost = Cost("seconds", 2.0, curves)
    least = cost.of({key: one.allowed()[0] for key, one in learned.items()})
    target = least + drawn.uniform(0.05, 0.9) * (cost.dense - least)
    kept = freeze(learned, cost, target)
    assert cost.of(kept) <= target
    for key, count in kept.items():
        levels = learned[key].allowed()
        assert count in levels
        if count < levels[-1]:
            assert cost.of(kept | {key: levels[levels.index(count) + 1]}) > target
        units = kept_units(learned, kept)[key]
        rest = np.delete(learned[key].scores, units)
        assert not len(rest) or learned[key].scores[list(units)].min() >= rest.max()


def test_equal_scores_go_by_number_and_thresholds_decide_between_layers():
    learned = {(0, "ffn"): Learned(np.ones(4), 0.9), (1, "ffn"): Learned(np.ones(4), 0.2)}
    kept = freeze(learned, toy_cost({key: 4 for key in learned}), 5.0)
    assert kept == {(0, "ffn"): 1, (1, "ffn"): 4}
    assert kept_units(learned, kept)[0, "ffn"] == (0,)


def test_a_target_below_the_least_names_the_least():
    learned = {(0, "ffn"): Learned(np.ones(8), 0.0, grid=4)}
    with pytest.raises(UsageError, match="the least is 4") as caught:
        freeze(learned, toy_cost({(0, "ffn"): 8}), 3.0)
    assert caught.value.code == "E292"


# ---- costs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "qwen2"])
def test_parameters_equal_those_of_the_pruned_model(family, scratch):
    from surgeon.structure.cut import LayerCut
    from surgeon.structure.views import PrunedView

    checkpoint = open_path(model_folder(family))
    structure = structure_of(checkpoint)
    cost = Cost.parameters(checkpoint, structure)
    assert cost.dense == sum(info.elements for info in checkpoint.tensors.values())
    attention, ffn = structure.attention[0], structure.ffn[0]
    groups = tuple(range(attention.groups // 2))
    heads = tuple(range(attention.per_group * len(groups)))
    cut = Cut((LayerCut(heads, tuple(range(20))),) * structure.layers)
    kept = {(n, "attention"): len(groups) for n in range(structure.layers)}
    kept |= {(n, "ffn"): 20 for n in range(structure.layers)}
    view = PrunedView(checkpoint, structure, cut)
    assert cost.of(kept) == pytest.approx(sum(info.elements for info in view.tensors.values()))
    assert ffn.width > 20


def test_flops_equal_torchs_count():
    from torch.utils.flop_counter import FlopCounterMode

    folder = model_folder("llama")
    context = 16
    model = stock(folder, attn_implementation="eager")
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model(input_ids=torch.ones(1, context, dtype=torch.long), use_cache=False)
    scores = 4 * 4 * 8 * 3 * context  # eager computes the masked half of scores and values too
    expected = counted.get_total_flops() / context - scores + 4 * 4 * 8 * 3 * (context + 1) / 2
    assert costs(folder, "flops").dense == pytest.approx(expected, rel=0.005)  # torch counts rotary products


def test_a_table_of_times_is_followed_exactly_and_between_numbers():
    structure = structure_of(open_path(model_folder("llama")))
    cost = Cost.timed(structure, lambda heads, groups: heads + 10 * groups, lambda width: 0.5 * width**2, 7.0)
    assert cost.dense == 7 + 3 * (4 + 20 + 0.5 * 48**2)
    assert cost.of({(1, "attention"): 1, (2, "ffn"): 10}) == cost.dense - 12 - 0.5 * (48**2 - 10**2)
    count = torch.tensor(10.25, dtype=torch.float64, requires_grad=True)
    found = cost.expected({(2, "ffn"): count})
    found.backward()
    assert found.item() == pytest.approx(cost.of({(2, "ffn"): 10}) + 0.25 * 0.5 * (121 - 100))
    assert count.grad.item() == pytest.approx(0.5 * 21)


# ---- whole models ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_the_sliced_model_computes_what_the_masked_one_did(family, scratch):
    folder = model_folder(family)
    cost = costs(folder)
    found = thresholds(folder, texts(20), QUICK, cost, scratch / "w", scratch / "out")
    record = found.record["cost"]
    assert record["kept"] <= record["target"] == pytest.approx(0.7 * cost.dense)
    kept = {(e["layer"], e["structure"]): e["units"] for e in found.record["kept"]}
    for key, units in kept.items():  # no further unit fits
        if units < len(cost.curves[key]) - 1:
            assert cost.of(kept | {key: units + 1}) > record["target"]
    assert found.weights is None and found.solved is None and not (scratch / "out").exists()
    assert Cut.from_document(found.cut.document()) == found.cut
    checkpoint = open_path(folder)
    structure = structure_of(checkpoint)
    assert [s.ffn for s in shapes(found.cut, structure)] == [kept[n, "ffn"] for n in range(structure.layers)]
    after = _loss_of_cut(folder, found.cut, texts(20), found)
    assert after == pytest.approx(found.record["after"]["task"], rel=1e-4)
    assert found.record["before"]["task"] != found.record["after"]["task"]


def _loss_of_cut(folder, cut, samples, found, weights=None):
    """The held-out loss of the plain model with zeros where the cut removes: what `MaskedView` shows."""
    from surgeon.structure.views import MaskedView
    from surgeon.train.batches import set_aside

    options = found.record["options"]
    checkpoint = open_path(weights or folder)
    solved = open_path(found.solved) if found.solved else None
    view = MaskedView(checkpoint, structure_of(checkpoint), cut, solved)
    model = stock(weights or folder, dtype=torch.float32)
    state = model.state_dict()
    prefix = "" if all(n in state for n in view.tensors) else "transformer."
    with torch.no_grad():
        for name, info in view.tensors.items():
            raw = view.read(name, 0, info.elements)
            state[prefix + name].copy_(torch.from_numpy(np.array(raw, dtype=np.float32)).reshape(info.shape))
        total = count = 0.0
        for n in set_aside(len(samples), options["held_out"], options["seed"])[1]:
            ids = torch.from_numpy(samples[n].ids)[None]
            total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    return total / count


def test_a_resumed_run_finds_the_same_cut(scratch):
    folder = model_folder("llama")
    options = replace(QUICK, train="full", rate=1e-3, bypass_rank=2, budget=replace(BUDGET, control="dual"))
    cost = costs(folder)
    whole = thresholds(folder, texts(20), options, cost, scratch / "w1", scratch / "whole")
    stop = threading.Event()
    with pytest.raises(Interrupted):
        thresholds(folder, texts(20), options, cost, scratch / "w2", scratch / "parts",
                   progress=lambda step, steps: stop.set() if step == 13 else None, stop=stop)  # fmt: skip
    parts = thresholds(folder, texts(20), options, cost, scratch / "w2", scratch / "parts")
    assert parts.record["resumed"] == 13
    assert parts.cut == whole.cut
    assert [e["threshold"] for e in parts.record["kept"]] == [e["threshold"] for e in whole.record["kept"]]
    for name in ("weights/model.safetensors", "solved.safetensors"):
        assert (scratch / "whole" / name).read_bytes() == (scratch / "parts" / name).read_bytes()


def test_without_pressure_nothing_changes(scratch):
    """lambda = 0 and only the divergence from the whole model: thresholds stay below every score."""
    folder = model_folder("llama")
    budget = replace(BUDGET, penalty=0.0, penalty_linear=0.0)
    options = replace(QUICK, budget=budget, task=0.0, steps=12)
    seen = thresholds(folder, texts(20), options, costs(folder), scratch / "w", scratch / "out").record[
        "history"
    ]
    assert all(entry.get("cost", 1.0) == 1.0 for entry in seen)
    assert max(entry["divergence"] for entry in seen) == 0.0


def test_hooks_leave_no_trace(scratch):
    folder = model_folder("llama")
    model = stock(folder)
    gates = Gates(Control(mode="observe"))
    for number, layer in enumerate(model.model.layers):
        gates.ffn[number] = Gate(layer.mlp.down_proj, 48, gates.control)
        gates.attention[number] = Gate(layer.self_attn.o_proj, 2, gates.control)
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        model(ids)
        gates.control.mode = "learn"
        for _, _, gate in gates.all():
            gate.start()
            gate.tau.data += 0.8
        masked = model(ids).logits
        gates.control.mode = "off"
        off = model(ids).logits
    gates.remove()
    dense = stock(folder)(ids).logits
    assert torch.equal(off, dense) and not torch.equal(masked, dense)
    assert all(not m._forward_pre_hooks for m in model.modules())


def test_full_training_writes_weights_the_cut_applies_to(scratch):
    folder = disturbed(model_folder("llama"), scratch / "source", dtype=torch.bfloat16)
    options = replace(QUICK, train="full", rate=1e-3)
    found = thresholds(folder, texts(20), options, costs(folder), scratch / "w", scratch / "out")
    assert found.weights == scratch / "out" / "weights"
    before, after = read(folder), read(found.weights)
    assert {n: (t.dtype, t.shape) for n, t in before.items()} == {
        n: (t.dtype, t.shape) for n, t in after.items()
    }
    assert any(not torch.equal(before[n], after[n]) for n in before)


def test_an_encoder_is_led_by_its_hidden_states(scratch):
    folder = model_folder("bert")
    options = replace(QUICK, task=0.0, structures=("ffn",), ffn_grid=8, budget=replace(BUDGET, remaining=0.8))
    found = thresholds(folder, texts(12), options, costs(folder), scratch / "w", scratch / "out")
    assert set(found.record["after"]) == {"divergence"}
    assert all(e["units"] % 8 == 0 and e["structure"] == "ffn" for e in found.record["kept"])
    with pytest.raises(UsageError) as caught:
        thresholds(
            folder, texts(12), replace(options, task=1.0), costs(folder), scratch / "w", scratch / "out"
        )
    assert caught.value.code == "E293"


# ---- the bypass --------------------------------------------------------------------------------------


def test_a_bypass_changes_nothing_at_the_start():
    model = stock(model_folder("llama"))
    ids = torch.arange(3, 19)[None]
    dense = model(ids).logits
    paths = [
        Bypass(layer.mlp.gate_proj, layer.mlp.down_proj, 4, 0, n)
        for n, layer in enumerate(model.model.layers)
    ]
    assert torch.equal(model(ids).logits, dense)
    with torch.no_grad():
        paths[1].second.fill_(0.1)
    assert not torch.equal(model(ids).logits, dense)
    for path in paths:
        path.remove()
    assert torch.equal(model(ids).logits, dense)


def test_a_bypass_adds_x_a_b_to_the_ffn():
    model = stock(model_folder("gpt2"))
    block = model.transformer.h[1].mlp
    inputs = torch.randn(2, 5, 32)
    plain = block(inputs)
    path = Bypass(block.c_fc, block.c_proj, 3, 0, 1)
    with torch.no_grad():
        path.second.copy_(torch.randn(3, 32))
    assert torch.allclose(block(inputs), plain + inputs @ path.first @ path.second, atol=1e-5)


def test_absorbing_equals_least_squares_and_reports_what_is_left():
    torch.manual_seed(0)
    x, weight = torch.randn(200, 10).double(), torch.randn(4, 10).double()
    kept = torch.tensor([0, 2, 3, 7])
    masked = x.clone()
    masked[:, [1, 4, 5, 6, 8, 9]] = 0
    added = x @ torch.randn(10, 4).double() * 0.3
    bias = torch.randn(4).double()
    statistics = Statistics(kept)
    for part in (slice(0, 90), slice(90, 200)):
        statistics.add(masked[part], masked[part] @ weight.T + bias, added[part], bias)
    found, residual = statistics.absorbed(weight[:, kept], damping=0.0 + 1e-12)
    wanted = masked @ weight.T + added
    oracle = np.linalg.lstsq(x[:, kept].numpy(), wanted.numpy(), rcond=None)[0].T
    assert found.numpy() == pytest.approx(oracle, rel=1e-6)
    left = np.linalg.norm(wanted.numpy() - x[:, kept].numpy() @ oracle.T)
    assert residual == pytest.approx(left / added.norm().item(), rel=1e-6)
    assert 0.1 < residual < 1
    assert statistics.share == pytest.approx((added.norm() / (wanted + bias).norm()).item())


def test_a_linear_ffn_absorbs_its_bypass_exactly():
    x, weight = torch.randn(100, 6).double(), torch.randn(5, 6).double()
    statistics = Statistics(torch.arange(6))
    statistics.add(x, x @ weight.T, x @ torch.randn(6, 2).double() @ torch.randn(2, 5).double(), None)
    assert statistics.absorbed(weight, 1e-12)[1] == pytest.approx(0, abs=1e-6)


def test_a_bypass_is_absorbed_and_what_is_measured_is_exported(scratch):
    folder = model_folder("llama")
    options = replace(QUICK, bypass_rank=2, rate=3e-3)
    found = thresholds(folder, texts(20), options, costs(folder), scratch / "w", scratch / "out")
    assert all(e["share"] > 0 and 0 < e["residual"] <= 1 for e in found.record["bypass"].values())
    solved = load_file(found.solved)
    assert {n: t.shape[1] for n, t in solved.items()} == {
        f"model.layers.{e['layer']}.mlp.down_proj.weight": e["units"] for e in found.record["kept"] if e["structure"] == "ffn"
    }  # fmt: skip
    after = _loss_of_cut(folder, found.cut, texts(20), found)
    assert after == pytest.approx(found.record["after"]["task"], rel=1e-4)


def test_a_bypass_that_matters_is_not_dropped(scratch):
    folder = model_folder("llama")
    options = replace(QUICK, bypass_rank=2, rate=3e-2, bypass_export="drop")
    with pytest.raises(InputError) as caught:
        thresholds(folder, texts(20), options, costs(folder), scratch / "w", scratch / "out")
    assert caught.value.code == "E413"
    found = thresholds(
        folder, texts(20), replace(options, rate=1e-7), costs(folder), scratch / "w", scratch / "out"
    )
    assert found.solved is None
    assert all(e["share"] < 0.01 for e in found.record["bypass"].values())


# ---- refusals ----------------------------------------------------------------------------------------


def test_what_cannot_be_learned_is_refused(scratch):
    folder = model_folder("llama")
    for wrong, code in (
        (replace(QUICK, budget=replace(BUDGET, remaining=0.05)), "E292"),
        (replace(QUICK, structures=("attention",), bypass_rank=2), "E294"),
    ):
        with pytest.raises(UsageError) as caught:
            thresholds(folder, texts(20), wrong, costs(folder), scratch / "w", scratch / "out")
        assert caught.value.code == code
    experts = model_folder("mixtral")
    with pytest.raises(InputError) as missing:
        thresholds(
            experts,
            texts(20),
            replace(QUICK, structures=("ffn",)),
            costs(experts),
            scratch / "w",
            scratch / "out",
        )
    assert missing.value.code == "E414"


@pytest.mark.parametrize("wrong", [{"steps": 1}, {"train": "lora"}, {"structures": ()}, {"task": 0.0, "divergence": 0.0},
                                   {"bypass_export": "keep"}, {"ffn_grid": 0}, {"threshold_rate": -1.0}])  # fmt: skip
def test_options_out_of_range(wrong):
    with pytest.raises(UsageError):
        Options(**wrong)


@pytest.mark.parametrize("wrong", [{"remaining": 1.0}, {"control": "pid"}, {"cold": 0.5}, {"ramp": 0.0}])
def test_budgets_out_of_range(wrong):
    with pytest.raises(UsageError):
        Budget(**wrong)


def test_few_steps_are_said(scratch):
    folder = model_folder("llama")
    record = thresholds(folder, texts(20), QUICK, costs(folder), scratch / "w", scratch / "out").record
    assert "24 steps are few" in record["warnings"][0]
