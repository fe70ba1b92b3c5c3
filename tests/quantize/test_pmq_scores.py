"""Scores of experts against blocks of the stock model, run with one expert changed."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from surgeon.errors import InputError, Interrupted
from surgeon.formats.scheme import Scheme
from surgeon.quantize import rtn
from surgeon.quantize.allocation import pmq
from surgeon.quantize.measuring.pmq_scores import pmq_scores
from surgeon.structure.experts.find import experts_of

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measuring_models import GPTQ, RTN, SETTINGS, Model, Scaled, texts

MENU = tuple(Scheme("int", bits, -1) for bits in (2, 3, 4))


def scores(model, options=RTN, menu=MENU, **changes):
    given = {"layers": model.layers, "samples": model.samples, "settings": SETTINGS, **changes}
    return pmq_scores(
        model.checkpoint, experts_of(model.checkpoint), given["layers"], menu, model.form, given["samples"], given["settings"],
        options, **{k: v for k, v in given.items() if k not in ("layers", "samples", "settings")},
    )  # fmt: skip


def blocks(model):
    """(path, expert module, router weight, [(hidden, index, weights)]) of every block of the stock model."""
    network = model.stock()
    found = {}
    for path, module in network.named_modules():
        if path.endswith(".experts"):
            router = network.get_submodule(path.rpartition(".")[0]).gate.weight.detach()
            found[path] = (module, router, [])
            module.register_forward_hook(
                lambda part, args, out, path=path: found[path][2].append([a.detach() for a in args])
            )
    with torch.no_grad():
        for ids in model.samples:
            network(torch.from_numpy(ids)[None])
    return found


def changed(module, expert, scheme, only=(0, 1, 2)):
    """The block's weights with one expert, or parts of it, rounded: gate, up and down each on grids of their own."""
    gate_up, down = (getattr(module, name).detach().clone() for name in ("gate_up_proj", "down_proj"))
    half = gate_up.shape[1] // 2
    for part in [(gate_up[expert, :half], gate_up[expert, half:], down[expert])[place] for place in only]:
        part.copy_(
            torch.from_numpy(rtn.quantize(part.clone(), scheme, scale_dtype="F32", clip=False).values())
        )
    return gate_up, down


@pytest.mark.parametrize("family", [pytest.param("mixtral", marks=pytest.mark.slow), "qwen3_moe"])
def test_scores_are_those_of_whole_blocks(family):
    model = Model(family, num_hidden_layers=2)
    found = scores(model)
    stock_blocks = blocks(model)
    assert len(found) == len(stock_blocks)
    for layer, (path, (module, router, given)) in zip(found, stock_blocks.items(), strict=True):
        assert f".{layer.layer}." in path
        hidden, index, weights = (torch.cat(parts) for parts in zip(*given, strict=True))
        count = len(module.down_proj)
        selected = functional.one_hot(index, count).sum(1)
        assert layer.frequency == pytest.approx((selected.sum(0) / len(hidden)).numpy())
        assert layer.frequency.sum() == pytest.approx(index.shape[1])
        shares = torch.softmax(functional.linear(hidden, router).double(), 1)
        assert layer.weight == pytest.approx(((shares * selected).sum(0) / len(hidden)).numpy(), rel=1e-4)
        with torch.no_grad():
            reference = module(hidden, index, weights)
            for expert in range(count):
                for place, scheme in enumerate(MENU):
                    gate_up, down = changed(module, expert, scheme)
                    with pytest.MonkeyPatch.context() as patch:
                        patch.setitem(module._parameters, "gate_up_proj", torch.nn.Parameter(gate_up))
                        patch.setitem(module._parameters, "down_proj", torch.nn.Parameter(down))
                        moved = module(hidden, index, weights) - reference
                    expected = float(torch.linalg.vector_norm(moved.double()))
                    assert layer.error[expert, place] == pytest.approx(expected, rel=1e-4)
        assert [len(own) for own in layer.members] == [3] * count
        assert all(
            f".experts.{expert}." in label for expert, own in enumerate(layer.members) for label in own
        )


def test_scores_by_projection_are_those_of_blocks_with_one_projection_changed():
    model = Model("qwen3_moe", num_hidden_layers=2)
    menu = MENU[:2]
    found, whole = scores(model, menu=menu, by_projection=True), scores(model, menu=menu)
    for layer, other, (module, _, given) in zip(found, whole, blocks(model).values(), strict=True):
        hidden, index, weights = (torch.cat(parts) for parts in zip(*given, strict=True))
        count = len(module.down_proj)
        assert layer.error.shape == layer.sizes.shape == (count, 2, len(menu))
        assert (layer.sizes.sum(axis=1) == other.sizes).all()
        assert np.array_equal(layer.weight, other.weight) and np.array_equal(layer.frequency, other.frequency)
        with torch.no_grad():
            reference = module(hidden, index, weights)
            for expert in range(count):
                assert [[label.split(".")[-2] for label in part] for part in layer.members[expert]] == [
                    ["gate_proj", "up_proj"], ["down_proj"],
                ]  # fmt: skip
                for part, only in enumerate(((0, 1), (2,))):
                    for place, scheme in enumerate(menu):
                        gate_up, down = changed(module, expert, scheme, only)
                        with pytest.MonkeyPatch.context() as patch:
                            patch.setitem(module._parameters, "gate_up_proj", torch.nn.Parameter(gate_up))
                            patch.setitem(module._parameters, "down_proj", torch.nn.Parameter(down))
                            moved = module(hidden, index, weights) - reference
                        expected = float(torch.linalg.vector_norm(moved.double()))
                        assert layer.error[expert, part, place] == pytest.approx(expected, rel=1e-4)
        assert not np.allclose(layer.error.sum(axis=1), other.error)


@pytest.mark.slow
def test_errors_of_gptq_are_smaller_than_those_of_rounding():
    model = Model("mixtral", num_hidden_layers=2)
    nearest, better = (scores(model, options, menu=MENU[1:2]) for options in (RTN, GPTQ))
    ratio = sum(layer.error.sum() for layer in better) / sum(layer.error.sum() for layer in nearest)
    assert ratio < 0.95


def test_rows_can_be_allocated():
    model = Model("mixtral", num_hidden_layers=2)
    found = scores(model)
    rows = [layer.rows() for layer in found]
    sizes = np.concatenate([one.sizes for one in rows])
    # Codes of three matrices of an expert, row by row in words of 32 bits, a scale a row, and a shape of two numbers each.
    widths = [(48, 32), (48, 32), (32, 48)]
    for place, bits in enumerate((2, 3, 4)):
        expected = sum(rows * -(-columns * bits // 32) * 4 + rows * 4 + 16 for rows, columns in widths)
        assert (sizes[:, place] == expected).all()
    budget = int(sizes[:, 1].sum())
    chosen = pmq.solve(rows, budget)
    assert chosen.size <= budget
    costs = np.concatenate([one.costs for one in rows])
    assert chosen.cost <= costs[:, 1].sum() * (1 + 1e-9) and chosen.cost >= costs.min(axis=1).sum()
    must = found[0].rows(must=(MENU[0].name, MENU[2].name))
    assert must.must == (0, 2)
    priority = found[0].frequency * found[0].weight
    assert np.array_equal(rows[0].priority, priority)
    expected = pmq.importance(found[0].frequency, found[0].weight, found[0].error, gamma=2.0)
    assert np.array_equal(found[0].rows(gamma=2.0).costs, expected)


def test_a_super_expert_keeps_most_and_an_unused_one_least():
    model = Model("qwen3_moe", num_hidden_layers=4)
    name = "model.layers.0.mlp.experts.2.down_proj.weight"
    model.checkpoint = Scaled(model.checkpoint, {name: 400.0})
    model.samples = texts((6, 3))
    found = scores(model)
    assert found[0].super_experts == (2,) and not any(layer.super_experts for layer in found[1:])
    assert found[0].rows().pinned == {2: 2}
    unused = [(number, expert) for number, layer in enumerate(found) for expert in layer.unused]
    for number, expert in unused:
        assert not found[number].rows().costs[expert].any()
    budget = int(sum(layer.sizes[:, 0].sum() for layer in found)) + int(np.diff(found[0].sizes[2, [0, 2]])[0])
    chosen = pmq.solve([layer.rows() for layer in found], budget)
    assert chosen.columns[0][2] == 2 and sum(columns.sum() for columns in chosen.columns) == 2


def test_streamed_experts_have_the_same_scores():
    from dataclasses import replace

    model = Model("mixtral", num_hidden_layers=2)
    for one, other in zip(
        scores(model), scores(model, settings=replace(SETTINGS, stream_experts=True)), strict=True
    ):
        assert np.allclose(one.error, other.error, rtol=1e-5) and np.allclose(
            one.weight, other.weight, rtol=1e-5
        )


def test_what_cannot_be_scored_is_refused():
    model = Model("mixtral", num_hidden_layers=2)
    with pytest.raises(InputError, match="no experts") as caught:
        scores(model, layers=((), ()))
    assert caught.value.code == "E477"
    with pytest.raises(InputError, match="cannot be stored in scheme 2") as caught:
        scores(Model("qwen3_moe", num_hidden_layers=2), menu=(MENU[0], Scheme("int", 4, 16)))
    assert caught.value.code == "E477"
    import threading

    stop = threading.Event()
    stop.set()
    with pytest.raises(Interrupted):
        scores(model, stop=stop)
