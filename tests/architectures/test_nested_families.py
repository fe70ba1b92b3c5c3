"""Families whose language model is a part of a larger one: records, layers, streamed passes, dropped layers."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "calibrate"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "structure"))
import tiny_models
from structure_models import close, tokens, without, write
from walk_models import Keeper, Nothing, model_folder, stock, texts

from surgeon import architectures
from surgeon.architectures.conformance import check
from surgeon.calibrate.head import Head
from surgeon.calibrate.walk import Settings, Walk
from surgeon.checkpoint.checkpoint import open_path
from surgeon.errors import InputError
from surgeon.structure.cut import Cut
from surgeon.structure.find import structure_of
from surgeon.structure.views import MaskedView, PrunedView

FAMILIES = sorted(tiny_models.NESTED)
ONE = Settings(threads=1, batch_tokens=64)


def errors(findings):
    return [finding for finding in findings if finding.severity != "notice"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("hub", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_record_equals_what_the_library_saves(family, hub, tied):
    config, header = tiny_models.saved(family, hub_names=hub)
    if tied:
        config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (finding,) = check(config, header)
    architecture = architectures.get(family)
    assert (finding.kind, finding.severity) == ("unchecked-tensors", "notice")
    language = {
        name: shape for name, (_, shape) in header.items() if not name.startswith(architecture.beside)
    }
    assert finding.found == len(header) - len(language)
    layout = architecture.layout(config, header)
    required = {name: spec.shape for name, spec in layout.tensors.items() if not spec.optional}
    head = [group[1] for group in architecture.tied(config, header)]
    assert required | {name: language[name] for name in head} == language
    assert all(name in language for name in head) and len(head) == tied


@pytest.mark.parametrize("family", FAMILIES)
def test_each_language_tensor_that_is_missing_is_reported(family):
    config, header = tiny_models.saved(family)
    beside = architectures.get(family).beside
    for name in header:
        rest = {other: entry for other, entry in header.items() if other != name}
        found = errors(check(config, rest))
        assert [finding.tensor for finding in found] == ([] if name.startswith(beside) else [name])
    for key in (
        "hidden_size",
        "num_local_experts" if family == "llama4" else "num_experts",
        "num_hidden_layers",
    ):
        changed = copy.deepcopy(config)
        changed["text_config"][key] += 1
        assert any(key in finding.keys for finding in errors(check(changed, header)))
    del config["text_config"]
    (finding,) = check(config, header)
    assert finding.kind == "config-invalid" and "text_config" in finding.message


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_streamed_pass_equals_the_whole_model(family, stream):
    folder = model_folder(family)
    checkpoint, samples = open_path(folder), texts()
    keeper = Keeper()
    settings = Settings(threads=1, batch_tokens=64, stream_experts=stream)
    with Walk(checkpoint, samples, settings, per_sample=True) as walk:
        walk.run(keeper)
        alone = dict(walk.hidden())
    with Walk(checkpoint, samples, settings) as walk:
        assert any(batch.padded for batch in walk.batches)
        walk.run(Nothing())
        together = dict(walk.hidden())
    head = Head(checkpoint, ONE)
    model = stock(folder)
    for number, sample in enumerate(samples):
        with torch.no_grad():
            wanted = model(input_ids=torch.from_numpy(sample)[None]).logits[0]
        close(head.logits(alone[number]), wanted)
        close(head.logits(together[number]), wanted)
    seen = {module for module, _ in keeper.inputs}
    prefix = architectures.get(family).prefix
    assert any(module.startswith(f"{prefix}layers.1.") and ".experts." in module for module in seen)
    assert not any(module.startswith(architectures.get(family).beside) for module in seen)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dropped_layer(family, scratch):
    checkpoint = open_path(model_folder(family))
    structure = structure_of(checkpoint)
    assert structure.prefix == architectures.get(family).prefix + "layers."
    cut = without(Cut.whole(3), 0)
    view = PrunedView(checkpoint, structure, cut)
    assert view.config["text_config"]["num_hidden_layers"] == 2 and "num_hidden_layers" not in view.config
    folders = [
        write(view, scratch / "pruned"),
        write(MaskedView(checkpoint, structure, cut), scratch / "masked"),
    ]
    kind = getattr(transformers, view.config["architectures"][0])
    found = []
    for folder in folders:
        model, report = kind.from_pretrained(folder, output_loading_info=True)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
        with torch.no_grad():
            found.append(model.eval()(input_ids=tokens()).logits)
    close(found[0], found[1])
    with torch.no_grad():
        whole = stock(checkpoint.folder)(input_ids=tokens()).logits
    assert float((whole - found[0]).abs().max() / whole.abs().max()) > 1e-2
    with pytest.raises(InputError) as caught:
        structure_of(open_path(_without_text(checkpoint.folder, scratch)))
    assert caught.value.code == "E340"


def _without_text(folder: Path, scratch: Path) -> Path:
    place = scratch / "damaged"
    place.mkdir()
    config = json.loads((folder / "config.json").read_text())
    del config["text_config"]
    (place / "config.json").write_text(json.dumps(config))
    shutil.copy(folder / "model.safetensors", place)
    return place
