"""``surgeon export``: members are slices, forms compute the same, refusals say why, and nothing half-made appears."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import threading
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cli"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "formats"))
from commands import run
from deploy_models import TOKENIZER, cut_folders, logits, opened, stock_folder, write
from quantized_models import integer_folders

from surgeon import api
from surgeon.checkpoint.checkpoint import open_path
from surgeon.deploy import export_gguf, members
from surgeon.deploy.build import load
from surgeon.errors import EnvironmentFault, InputError, Interrupted, OutputConflict, UsageError
from surgeon.output.manifest import seal_holds
from surgeon.structure.cut import Cut, LayerCut
from surgeon.structure.find import structure_of
from surgeon.structure.views import PrunedView

LONG = TOKENIZER.parent / "long"
EXACT = 1e-4
"""Largest difference of log-probabilities of a float32 file. Not a divergence: llama.cpp's float32 probabilities sum
to 1 only within about 1e-6, which a KL of them shows at first order."""

SMALL = {n: members.Kept(2, 1, 32) for n in (0, 1, 4)}
MIDDLE = {n: members.Kept(3, 2, 64) for n in (0, 1, 3, 4)}


def family_folder(family: str, folder: Path, **extra) -> Path:
    """Write the sorted parent of a nested family, with what a parent has beside its weights."""
    checkpoint, structure = opened(stock_folder(family, folder / "source", **extra))
    draw = np.random.default_rng(5)
    orders = {
        n: members.LayerOrder(
            draw.permutation(4), [draw.permutation(2) for _ in range(4)], draw.permutation(96)
        )
        for n in range(structure.layers)
    }
    parent = write(members.permute(checkpoint, structure, orders), folder / "family")
    name, content = members.companion(
        [members.Member("middle", MIDDLE), members.Member("small", SMALL)], structure
    )
    (parent / name).write_bytes(content)
    (parent / "pruning.json").write_text("{}")
    (parent / "LICENSE").write_text("a licence")
    return parent


def held(view, name: str) -> torch.Tensor:
    info = view.tensors[name]
    return torch.from_numpy(np.array(view.read(name, 0, info.elements))).reshape(info.shape)


def everything(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


# ---- members ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3"])
def test_a_member_is_the_parents_leading_slices(family, scratch):
    parent = family_folder(family, scratch)
    document = api.export(parent, member="small")
    out = scratch / "family-small"
    assert document["output"]["path"] == str(out) and document["status"] == "ok"
    state, whole = load_file(out / "model.safetensors"), load_file(parent / "model.safetensors")
    # By hand: two groups of two heads of 16 numbers, the first head of either; 32 of 96 channels.
    for new, old in enumerate((0, 1, 4)):
        place, of = f"model.layers.{new}.", f"model.layers.{old}."
        heads = np.r_[0:16, 32:48]
        assert torch.equal(
            state[place + "self_attn.o_proj.weight"], whole[of + "self_attn.o_proj.weight"][:, heads]
        )
        assert torch.equal(state[place + "mlp.down_proj.weight"], whole[of + "mlp.down_proj.weight"][:, :32])
        if family == "phi3":
            fused, gate_up = whole[of + "self_attn.qkv_proj.weight"], whole[of + "mlp.gate_up_proj.weight"]
            rows = np.r_[heads, 128:160, 192:224]
            assert torch.equal(state[place + "self_attn.qkv_proj.weight"], fused[rows])
            assert torch.equal(
                state[place + "mlp.gate_up_proj.weight"], torch.cat([gate_up[:32], gate_up[96:128]])
            )
        else:
            assert torch.equal(
                state[place + "self_attn.q_proj.weight"], whole[of + "self_attn.q_proj.weight"][heads]
            )
            assert torch.equal(
                state[place + "self_attn.v_proj.weight"], whole[of + "self_attn.v_proj.weight"][:32]
            )
            assert torch.equal(state[place + "mlp.up_proj.weight"], whole[of + "mlp.up_proj.weight"][:32])
    checkpoint = open_path(parent)
    structure = structure_of(checkpoint)
    view = PrunedView(checkpoint, structure, members.Member("small", SMALL).cut(structure))
    assert set(view.tensors) == set(state)
    assert all(torch.equal(held(view, name), tensor) for name, tensor in state.items())
    assert float(logits(load(out)).abs().max()) > 0  # strictly: nothing missing, nothing more
    names = {p.name for p in out.iterdir()}
    assert "LICENSE" in names and "tokenizer.json" in names
    assert not names & {"members.json", "pruning.json"}, "they describe the parent"
    manifest = json.loads((out / "surgeon.json").read_bytes())
    assert (manifest["verb"], manifest["recipe"]["member"]) == ("export", "small")
    assert api.verify(out).errors == []
    assert api.export(parent, member="small")["output"]["unchanged"]


def test_a_member_in_another_type_and_of_a_shape_no_stock_class_has(scratch):
    """Six heads of a Llama do not divide 64: the member becomes the Mistral that computes the same."""
    parent = family_folder("llama", scratch)
    api.export(parent, scratch / "out", member="middle", dtype="float16")
    config = json.loads((scratch / "out" / "config.json").read_text())
    assert (config["model_type"], config["num_hidden_layers"], config["num_attention_heads"]) == (
        "mistral",
        4,
        6,
    )
    assert config.get("dtype", config.get("torch_dtype")) == "float16"
    whole = load_file(parent / "model.safetensors")
    found = load_file(scratch / "out" / "model.safetensors")
    assert torch.equal(
        found["model.layers.2.mlp.up_proj.weight"], whole["model.layers.3.mlp.up_proj.weight"][:64].half()
    )
    load(scratch / "out")


def test_members_that_do_not_exist(scratch):
    parent = family_folder("llama", scratch)
    before = everything(scratch)
    for model, name, code, word in ((parent, "smal", "E289", "small"), (scratch / "source", "small", "E289", "--nested")):  # fmt: skip
        with pytest.raises(UsageError) as refused:
            api.export(model, scratch / "out", member=name)
        assert refused.value.code == code and word in (refused.value.help or "")
    document = json.loads((parent / "members.json").read_text())
    document["members"][1]["layers"][0]["ffn"] = 97
    (parent / "members.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match="E330"):
        api.export(parent, scratch / "out", member="small")
    (parent / "members.json").unlink()
    before.pop("family/members.json")
    assert everything(scratch) == before


# ---- safetensors ------------------------------------------------------------------------------------


def test_plain_copies_are_byte_for_byte_in_other_shards(scratch):
    source = stock_folder("qwen2", scratch / "model")
    document = api.export(source, max_shard_size=50_000)
    out = scratch / "model-safetensors"
    assert document["output"]["path"] == str(out) and document["output"]["shards"] > 3
    found = {}
    for file in out.glob("*.safetensors"):
        found |= load_file(file)
    whole = load_file(source / "model.safetensors")
    assert found.keys() == whole.keys() and all(torch.equal(found[n], whole[n]) for n in whole)
    assert torch.equal(logits(load(out)), logits(load(source)))


def test_float_types_are_rounded_once(scratch):
    source = stock_folder("llama", scratch / "model")
    api.export(source, scratch / "half", dtype="bfloat16")
    found, whole = (load_file(f / "model.safetensors") for f in (scratch / "half", source))
    assert all(torch.equal(found[n], whole[n].bfloat16()) for n in whole)
    assert json.loads((scratch / "half" / "config.json").read_text()).get("torch_dtype") == "bfloat16"


def test_pickles_become_safetensors_only_with_permission(scratch):
    source = stock_folder("llama", scratch / "old")
    whole = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    torch.save(whole, source / "pytorch_model.bin")
    with pytest.raises(InputError, match="E331"):
        api.export(source, scratch / "new")
    document = api.export(source, scratch / "new", allow_pickle=True)
    assert any("weights-only" in note for note in document["notes"])
    found = load_file(scratch / "new" / "model.safetensors")
    assert found.keys() == whole.keys() and all(torch.equal(found[n], whole[n]) for n in whole)
    names = {p.name for p in (scratch / "new").iterdir()}
    assert "tokenizer.json" in names and not any(n.endswith(".bin") for n in names)
    assert json.loads((scratch / "new" / "surgeon.json").read_bytes())["permissions"] == ["allow-pickle"]
    load(scratch / "new")


def test_a_bare_file_stays_one(scratch):
    save_file({"a": torch.arange(6.0).reshape(2, 3), "n": torch.arange(3)}, scratch / "x.safetensors")
    document = api.export(scratch / "x.safetensors", dtype="float16")
    out = scratch / "x-export.safetensors"
    assert document["output"]["path"] == str(out)
    found = load_file(out)
    assert found["a"].dtype == torch.float16 and found["n"].dtype == torch.int64
    for options in ({"to": "gguf"}, {"to": "decilm"}, {"member": "a"}):
        with pytest.raises(InputError, match="E308"):
            api.export(scratch / "x.safetensors", scratch / "y", **options)


def test_code_of_an_older_version_is_replaced(scratch):
    _, pruned = cut_folders("llama", scratch)
    expected = logits(load(pruned))
    (pruned / "modeling_surgeon.py").write_text("# of an older version\n")
    with pytest.raises(InputError, match="E326"):
        load(pruned)
    document = api.export(pruned, scratch / "new")
    assert "transformers (folder with code)" in document["readers"]
    assert torch.equal(logits(load(scratch / "new")), expected)


def test_tensors_that_are_not_the_classs_are_refused(scratch):
    _, pruned = cut_folders("llama", scratch)
    state = load_file(pruned / "model.safetensors")
    state["model.layers.0.mlp.up_proj.weight"] = state["model.layers.0.mlp.up_proj.weight"][:-1].contiguous()
    state.pop("model.norm.weight")
    save_file(state, pruned / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="E325") as refused:
        api.export(pruned, scratch / "new")
    assert "1 missing" in refused.value.message and "1 mismatched" in refused.value.message
    assert not (scratch / "new").exists()


# ---- DeciLM -----------------------------------------------------------------------------------------


def test_decilm_computes_the_same(scratch):
    def groups(*kept):
        return tuple(head for group in kept for head in (2 * group, 2 * group + 1))

    def cut(structure):
        uneven = LayerCut(None, tuple(range(256)))
        return Cut((uneven, LayerCut(()), LayerCut(None, ()), LayerCut(), LayerCut()))

    masked, pruned = cut_folders("llama", scratch, cut, intermediate_size=512)
    document = api.export(pruned, to="decilm")
    out = scratch / "pruned-decilm"
    assert document["output"]["path"] == str(out)
    assert "vllm (folder)" in document["readers"]
    model = load(out)
    assert type(model).__name__ == "DeciLMForCausalLM"
    assert float((logits(model) - logits(load(masked))).abs().max()) <= 1e-5
    _, heads = cut_folders(
        "llama", scratch / "heads",
        lambda s: Cut((LayerCut(groups(0, 1)), *[LayerCut()] * 4)), intermediate_size=512,
    )  # fmt: skip
    with pytest.raises(UsageError, match="E286") as refused:
        api.export(heads, scratch / "never", to="decilm")
    assert "layer 0 has 4" in refused.value.message and "--to gguf" in (refused.value.help or "")
    assert not (scratch / "never").exists()


# ---- GGUF -------------------------------------------------------------------------------------------


def needs_llama_cpp() -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")


def test_gguf_of_the_long_model_loads_and_agrees(scratch):
    needs_llama_cpp()
    from surgeon.deploy.llama_cpp import LlamaCpp

    model = scratch / "long"
    shutil.copytree(LONG, model)
    document = api.export(model, to="gguf", dtype="float32")
    file = scratch / "long.gguf"
    assert (document["output"]["path"], document["architecture"]) == (str(file), "qwen2")
    assert document["check"]["texts"] == 50 and document["check"]["largest_difference"] < EXACT
    # The same again, against the stock class itself and on tokens of the task.
    reference = load(model, dtype=torch.float32)
    tokens = [30, 44, 61, 12, 200, 97, 15]
    with LlamaCpp(file) as runtime:
        found = runtime.logprobs(tokens, 281, sampled=40)
    wanted = torch.log_softmax(logits(reference, torch.tensor([tokens]))[0, -1].double(), -1).numpy()
    assert np.abs(found - wanted).max() < EXACT and wanted.std() > 0.5
    sidecar = scratch / "long.gguf.surgeon.json"
    said = json.loads(sidecar.read_bytes())
    assert seal_holds(sidecar.read_bytes())
    assert said["files"] == {"long.gguf": hashlib.sha256(file.read_bytes()).hexdigest()}
    assert set(said["inputs"]) == {p.name for p in LONG.glob("*.safetensors")}
    # Again: equal, another type, damaged.
    stamp = file.stat().st_mtime_ns
    assert (
        api.export(model, to="gguf", dtype="float32")["output"]["unchanged"]
        and file.stat().st_mtime_ns == stamp
    )
    with pytest.raises(OutputConflict, match="E601"):
        api.export(model, to="gguf", check=False)
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(OutputConflict, match="E601"):
        api.export(model, to="gguf", dtype="float32", check=False)
    made = api.export(model, to="gguf", overwrite=True, check=False)
    assert made["output"]["dtype"] == "bfloat16", "as most numbers are stored"
    assert {p.name for p in scratch.iterdir()} == {"long", "long.gguf", "long.gguf.surgeon.json"}


@pytest.mark.parametrize("member", ["middle", "small"])
def test_gguf_of_a_member(member, scratch):
    needs_llama_cpp()
    parent = family_folder("llama", scratch)
    document = api.export(parent, to="gguf", member=member, dtype="float32")
    assert document["output"]["path"] == str(scratch / f"family-{member}.gguf")
    assert (
        document["check"]["largest_difference"] < EXACT
    )  # against the member as a folder, written for the comparison
    assert {p.name for p in scratch.iterdir()} == {
        "source", "family", f"family-{member}.gguf", f"family-{member}.gguf.surgeon.json"
    }  # fmt: skip


def test_gguf_of_layers_of_different_sizes(scratch):
    needs_llama_cpp()
    _, pruned = cut_folders("qwen3", scratch)
    document = api.export(pruned, scratch / "x.gguf", to="gguf")
    assert document["architecture"] == "openelm" and document["check"]["largest_difference"] < EXACT


def test_a_file_that_llama_cpp_reads_otherwise_never_arrives(scratch, monkeypatch):
    needs_llama_cpp()
    from surgeon.deploy import gguf_layout

    source = stock_folder("llama", scratch / "model")
    monkeypatch.setattr(gguf_layout, "INTERLEAVED", frozenset())  # rotary pairs in the wrong order
    with pytest.raises(InputError, match="E328"):
        api.export(source, scratch / "x.gguf", to="gguf")
    assert {p.name for p in scratch.iterdir()} == {"model"}


def test_what_cannot_be_compared_is_said(scratch):
    pytest.importorskip("gguf")
    source = stock_folder("llama", scratch / "model")
    document = api.export(source, scratch / "x.gguf", to="gguf", check=False)
    assert document["check"] == {"skipped": "--no-check"}
    document = api.export(source, scratch / "y.gguf", to="gguf", memory_limit=1_000_000)
    assert "memory" in document["check"]["skipped"] and any("not compared" in n for n in document["notes"])


def test_gguf_refusals(scratch, monkeypatch):
    pytest.importorskip("gguf")
    gelu, source = stock_folder("gemma", scratch / "gelu"), stock_folder("llama", scratch / "model")
    before = everything(scratch)
    with pytest.raises(InputError, match="E328") as refused:
        api.export(gelu, to="gguf")
    assert "GELU" in refused.value.message
    with pytest.raises(OutputConflict, match="E601") as conflict:
        api.export(source, scratch / "folder", to="gguf")
    assert ".gguf" in (conflict.value.help or "")
    stop = threading.Event()
    stop.set()
    with pytest.raises(Interrupted):
        api.export(source, scratch / "x.gguf", to="gguf", stop=stop)
    Free = namedtuple("Free", "f_bavail f_frsize")
    monkeypatch.setattr(export_gguf.os, "statvfs", lambda path: Free(1000, 1000))
    with pytest.raises(EnvironmentFault, match="E501"):
        api.export(source, scratch / "x.gguf", to="gguf")
    assert everything(scratch) == before


# ---- destinations, dry runs, options ----------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"dtype": "float16"}, {"to": "decilm"}, {"to": "gguf"}, {"member": "small"}]
)
def test_a_dry_run_writes_nothing_and_refuses_as_the_run_would(options, scratch):
    if options.get("to") == "gguf":
        pytest.importorskip("gguf")
    if options == {"to": "decilm"}:
        source = stock_folder("llama", scratch / "family", intermediate_size=256)
    else:
        source = family_folder("llama", scratch)
    taken = scratch / ("taken.gguf" if options.get("to") == "gguf" else "taken")
    if taken.suffix:
        taken.write_bytes(b"something")
    else:
        taken.mkdir()
        (taken / "model.safetensors").write_bytes(b"something")
    before = everything(scratch)
    document = api.export(source, dry_run=True, **options)
    assert document["status"] == "dry-run" and document["output"]["bytes"] > 10_000
    for dry in (True, False):
        with pytest.raises(OutputConflict, match="E601"):
            api.export(source, taken, dry_run=dry, **options)
    for inside in (source, source / taken.name):
        with pytest.raises(OutputConflict, match=r"E60[12]"):
            api.export(source, inside, dry_run=True, **options)
    assert everything(scratch) == before
    assert not any(p.name.startswith(".") for p in scratch.iterdir())


def test_a_dry_run_over_the_same_result_is_no_conflict(scratch):
    source = stock_folder("llama", scratch / "model")
    api.export(source, scratch / "out")
    assert api.export(source, scratch / "out", dry_run=True)["status"] == "dry-run"
    with pytest.raises(OutputConflict, match="E601"):
        api.export(source, scratch / "out", dry_run=True, dtype="float16")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"to": "safetensor"}, 'did you mean "safetensors"'),
        ({"to": "onnx"}, "gguf"),
        ({"to": "compressed-tensors"}, "quantiz"),
        ({"to": "bitsandbytes"}, "quantiz"),
        ({"dtype": "int8"}, "bfloat16"),
        ({"max_shard_size": 0}, "greater"),
    ],
)
def test_values_that_do_not_exist(options, word, scratch):
    with pytest.raises(UsageError, match="E285") as refused:
        api.export(stock_folder("llama", scratch / "model"), **options)
    assert word in f"{refused.value.message} {refused.value.help}"
    assert {p.name for p in scratch.iterdir()} == {"model"}


def test_quantized_weights_are_copied_or_refused(scratch):
    source, _ = integer_folders(scratch / "models", "gptq")
    for options in ({"dtype": "float16"}, {"to": "gguf"}):
        with pytest.raises(InputError, match="E311"):
            api.export(source, scratch / "out", **options)
    api.export(source, scratch / "out")
    copied, stored = (load_file(folder / "model.safetensors") for folder in (scratch / "out", source))
    assert copied.keys() == stored.keys() and all(torch.equal(copied[name], stored[name]) for name in stored)


def test_plain_weights_that_are_said_to_be_quantized_are_refused(scratch):
    """A quantization_config that a conversion left behind: readers would look for packed values."""
    source = stock_folder("llama", scratch / "model")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gptq"}})
    )
    with pytest.raises(InputError, match="E479"):
        api.export(source, scratch / "out")
    assert not (scratch / "out").exists()


def test_the_command(capsys, scratch):
    parent = family_folder("llama", scratch)
    ran = run(capsys, "export", parent, "--member", "small", "--no-progress")
    assert ran.code == 0 and f"wrote     {scratch / 'family-small'}" in ran.out
    ran = run(capsys, "export", parent, "--member", "small", "--json")
    assert ran.code == 0 and ran.document["output"]["unchanged"] and ran.document["command"] == "export"
    ran = run(capsys, "export", parent, "--member", "small", "--dry-run")
    assert ran.code == 0 and "nothing was written." in ran.out
    ran = run(capsys, "export", parent, "--to", "onnx", "--json")
    assert (
        ran.code == 2
        and ran.document["error"]["code"] == "E285"
        and "decilm" in ran.document["error"]["help"]
    )
    ran = run(capsys, "export", parent, "-o", scratch / "family-small", "--dtype", "float16")
    assert ran.code == 6 and "E601" in ran.err
