"""`surgeon verify` on models whose layers differ: every tensor has its place, the packaged code loads them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "deploy"))
from deploy_models import FAMILIES, cut_folders

from surgeon import api
from surgeon.errors import InputError
from surgeon.verify.static import verify_path


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_are_those_of_the_blocks(family, scratch):
    _, pruned = cut_folders(family, scratch)
    report = verify_path(pruned)
    assert report.errors == [] and "config" in report.checks
    assert not any("no record here" in note for note in report.notes)


def changed(folder: Path, change) -> Path:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    return folder


def dropped(name):
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dropped("model.layers.1.mlp.up_proj.weight"), "model.layers.1.mlp.up_proj.weight is missing"),
        (dropped("model.layers.4.post_attention_layernorm.weight"), None),
        (lambda t: t.update({"model.layers.3.self_attn.q_proj.weight": t["model.layers.0.self_attn.q_proj.weight"].clone()}),
         "model.layers.3.self_attn.q_proj.weight has no place"),
        (lambda t: t.update({"model.layers.2.mlp.up_proj.weight": t["model.layers.2.mlp.up_proj.weight"][:-1].clone()}),
         "model.layers.2.mlp.up_proj.weight has shape"),
        (lambda t: t.update({"model.layers.1.self_attn.k_proj.weight": t["model.layers.1.self_attn.k_proj.weight"][:16].clone()}),
         "model.layers.1.self_attn.k_proj.weight has shape"),
    ],
    ids=["missing", "norm of a part that is gone", "part that is gone", "width", "groups"],
)  # fmt: skip
def test_E4_every_disagreement_is_found(change, said, scratch):
    _, pruned = cut_folders("llama", scratch)
    if said is None:  # it is not there to begin with
        with pytest.raises(KeyError):
            changed(pruned, change)
        return
    report = verify_path(changed(pruned, change))
    assert any(said in error.message for error in report.errors), [error.message for error in report.errors]


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda c: c["block_configs"].pop(), "block_configs has 4 entries"),
        (lambda c: c["block_configs"][1]["ffn"].pop("no_op"), r"block_configs[1].ffn does not say no_op"),
        (
            lambda c: c["block_configs"][0]["attention"].update(num_attention_heads=0),
            "num_attention_heads is 0",
        ),
        (lambda c: c.update(block_configs={}), "no entries"),
    ],
)
def test_E4_malformed_blocks_are_named(edit, said, scratch):
    _, pruned = cut_folders("llama", scratch)
    config = json.loads((pruned / "config.json").read_text())
    edit(config)
    (pruned / "config.json").write_text(json.dumps(config))
    report = verify_path(pruned)
    assert any(said in error.message for error in report.errors), [error.message for error in report.errors]


def test_changed_code_is_not_run_and_refused(scratch):
    _, pruned = cut_folders("llama", scratch)
    marker = scratch / "ran"
    code = pruned / "configuration_surgeon.py"
    code.write_text(code.read_text() + f"\nopen({str(marker)!r}, 'w')\n")
    with pytest.raises(InputError) as caught:
        api.verify(pruned, load=True)
    assert caught.value.code == "E326" and not marker.exists()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_the_reader_loads_generates_and_compares(family, scratch):
    masked, pruned = cut_folders(family, scratch)
    found = api.verify(pruned, generate=True, against=masked)
    assert found.errors == [] and found.reading is not None
    checks = found.reading.checks
    assert checks["load"]["class"].startswith("Surgeon") and checks["generate"]["tokens"] == 16
    assert checks["against"]["relative"] < 1e-5
