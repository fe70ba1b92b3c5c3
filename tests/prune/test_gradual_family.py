"""`surgeon prune --distill`: each member cut from the one before and trained towards the source."""

from __future__ import annotations

import json
import threading

import pruning_runs as runs
import pytest
from safetensors.torch import load_file
from structure_models import strictly

from surgeon import api
from surgeon.checkpoint.checkpoint import open_path
from surgeon.errors import Interrupted
from surgeon.prune import gradual
from surgeon.structure.check import shapes
from surgeon.structure.cut import Cut
from surgeon.structure.find import structure_of

STEPS = {
    "distill": True,
    "distill_steps": 6,
    "distill_batch": 2,
    "distill_length": 48,
    "samples": 12,
    "sequence_length": 64,
}


@pytest.fixture
def machine(monkeypatch):
    return runs.install(monkeypatch, runs.Machine())


@pytest.fixture
def model(scratch):
    return runs.small(scratch / "model")


@pytest.fixture
def options(scratch):
    return {**STEPS, "calibration": (str(runs.text(scratch / "cal.jsonl", 60)),)}


def kept(folder) -> Cut:
    return Cut.from_document(json.loads((folder / "pruning.json").read_text()))


def units(cut: Cut, structure) -> set:
    """Return every head and channel that a cut keeps, by its number in the source."""
    found = set()
    for number in cut.kept_layers:
        own = cut.layers[number]
        heads = range(structure.attention[number].heads) if own.heads is None else own.heads
        channels = range(structure.ffn[number].width) if own.channels is None else own.channels
        found |= {(number, "head", n) for n in heads} | {(number, "channel", n) for n in channels}
    return found


def test_members_are_nested_in_the_source_and_trained(model, scratch, machine, options):
    found = api.prune(model, scratch / "out", target_speedup=(1.3, 1.7), **options)
    assert [made["name"] for made in found["members"]] == ["speedup=1.3", "speedup=1.7"]
    structure = structure_of(open_path(model, "model"))
    cuts = []
    for made, target in zip(found["members"], (1.3, 1.7), strict=True):
        folder = scratch / "out" / made["name"]
        cut = kept(folder)
        cuts.append(units(cut, structure))
        assert list(shapes(cut, structure)) == list(runs.shapes_in(folder))
        assert machine.seconds(model) / machine.seconds(folder) == pytest.approx(target, rel=0.05)
        assert made["speedup"]["measured"] == pytest.approx(machine.seconds(model) / machine.seconds(folder))
        assert made["speedup"]["predicted"] == pytest.approx(made["speedup"]["measured"], rel=0.02)
        assert sum(p.numel() for p in strictly(folder).parameters()) == made["parameters"]
        assert any(text.startswith("distillation: kl") for text in made["remarks"])
        recipe = json.loads((folder / "surgeon.json").read_text())["recipe"]
        assert recipe["kept"] == cut.identity() and recipe["request"]["distill_steps"] == 6
        card = (folder / "README.md").read_text()
        assert "ziplm, distilled" in card and "--distill --distill-steps 6" in card
        assert (folder / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert cuts[0] > cuts[1]
    # The weights are trained ones: even what no cut touches is not what the source has.
    first, second, source = (
        {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
        for folder in (scratch / "out" / "speedup=1.3", scratch / "out" / "speedup=1.7", model)
    )
    embedding = "model.embed_tokens.weight"
    assert not first[embedding].equal(source[embedding]) and not second[embedding].equal(first[embedding])

    again = api.prune(model, scratch / "out", target_speedup=(1.3, 1.7), **options)
    assert again["output"]["unchanged"]


def test_dropped_layers_answer_to_the_source_layers_they_were(model, scratch, machine, options, monkeypatch):
    asked = []
    honest = gradual.distill
    monkeypatch.setattr(
        gradual, "distill", lambda *a, **k: asked.append(k["correspondence"]) or honest(*a, **k)
    )
    found = api.prune(model, scratch / "out", method="depth", keep_layers=(3, 2), **options)
    layers = [list(kept(scratch / "out" / made["name"]).kept_layers) for made in found["members"]]
    assert [len(one) for one in layers] == [3, 2] and set(layers[1]) < set(layers[0])
    assert [list(one.layers) for one in asked] == layers
    assert found["members"][1]["shape"].startswith("2 of 4 layers")


def test_training_improves_on_the_cut(model, scratch, machine, options):
    long = {**options, "distill_steps": 40, "distill_batch": 4, "learning_rate": 3e-4}
    made = api.prune(model, scratch / "out", sparsity=0.75, **long)["members"][0]
    said = next(text for text in made["remarks"] if text.startswith("distillation"))
    before, after = (
        float(part) for part in said.removeprefix("distillation: kl ").split(" on ")[0].split(" -> ")
    )
    assert after < 0.9 * before and made["quality"]["kl"] == pytest.approx(after, rel=1e-3)


@pytest.mark.slow
def test_a_stop_in_the_second_stage_keeps_the_first(model, scratch, machine, options, monkeypatch):
    target = {"target_speedup": (1.3, 1.7)}
    whole = api.prune(model, scratch / "whole", **target, **options)
    stop, trained, honest = threading.Event(), [], gradual.distill

    def interrupting(student, teacher, samples, steps, work, output, **more):
        trained.append(output.name)
        if len(trained) == 2:
            stop.set()
        return honest(student, teacher, samples, steps, work, output, **more)

    monkeypatch.setattr(gradual, "distill", interrupting)
    with pytest.raises(Interrupted):
        api.prune(model, scratch / "out", stop=stop, **target, **options)
    assert trained == ["speedup=1.3", "speedup=1.7"] and not (scratch / "out").exists()
    monkeypatch.setattr(gradual, "distill", lambda *a, **k: trained.append(a[5].name) or honest(*a, **k))
    found = api.prune(model, scratch / "out", **target, **options)
    assert trained[2:] == ["speedup=1.7"]  # the first stage was taken up
    assert machine.tables == 2
    for made, other in zip(found["members"], whole["members"], strict=True):
        assert made["parameters"] == other["parameters"]
        one, two = (load_file(f"{member['path']}/model.safetensors") for member in (made, other))
        assert all(one[name].equal(two[name]) for name in one)


@pytest.mark.slow
def test_a_single_member_may_have_layers_of_its_own_sizes(model, scratch, machine, options):
    made = api.prune(model, scratch / "out", target_speedup=1.8, layout="per-layer", **options)["members"][0]
    assert made["quality"]["kl"] > 0
    assert made["speedup"]["measured"] == pytest.approx(1.8, rel=0.03)
