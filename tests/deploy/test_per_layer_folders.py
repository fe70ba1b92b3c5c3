"""Folders with layers of different sizes: loaded strictly, equal to the masked stock model, in our process and in a bare one."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent))
from deploy_models import FAMILIES, config_of, cut_folders, ids, logits, opened, stock_folder, write

from surgeon.deploy import per_layer
from surgeon.deploy.build import build, load
from surgeon.errors import InputError
from surgeon.structure.cut import Cut, LayerCut
from surgeon.structure.views import MaskedView, PrunedView


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("per-layer")
    return {family: cut_folders(family, place / family) for family in FAMILIES}


def stock(folder: Path):
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, name).from_pretrained(folder).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_masked_stock_model(family, folders):
    masked, pruned = folders[family]
    wanted, model = logits(stock(masked)), load(pruned)
    assert type(model).__name__ == per_layer.FAMILIES[family].model
    assert float((logits(model) - wanted).abs().max()) <= 1e-5
    whole = logits(stock(masked.parent / "source"))
    assert float((whole - wanted).abs().max()) > 0.1  # the cut matters
    stored = load_file(pruned / "model.safetensors")
    assert {n for n in model.state_dict() if not (n == "lm_head.weight" and n not in stored)} == set(stored)
    for implementation in (
        ("eager", "sdpa") if model._supports_sdpa else ("eager",)
    ):  # Gemma 2 caps its scores
        model.set_attn_implementation(implementation)
        assert {layer.self_attn.config._attn_implementation for layer in model.model.layers
                if hasattr(layer.self_attn, "config")} == {implementation}  # fmt: skip
        assert float((logits(model) - wanted).abs().max()) <= 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_generates_equally_with_every_cache(family, folders):
    _, pruned = folders[family]
    model = load(pruned)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    prompt = ids(2, 10)
    plain = model.generate(prompt, use_cache=False, **options)
    for cache in ({"use_cache": True}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(prompt, **cache, **options), plain)
    # Left padding: a short prompt beside a long one says what it says alone.
    short = prompt[:1, 4:]
    batch = torch.cat([torch.nn.functional.pad(short, (4, 0)), prompt[1:]])
    mask = (torch.arange(10)[None] >= torch.tensor([[4], [0]])).long()
    together = model.generate(batch, attention_mask=mask, **options)
    alone = model.generate(short, attention_mask=torch.ones_like(short), **options)
    assert torch.equal(together[0, 10:], alone[0, 6:])


def test_first_layer_without_attention_keeps_the_cache_right(scratch):
    """Caches ask layer 0 for the length; masks would be wrong from the second token on."""
    masked, pruned = cut_folders(
        "llama",
        scratch,
        lambda s: Cut((LayerCut(()), LayerCut((), ()), *[LayerCut()] * 2, LayerCut(None, ()))),
    )
    model = load(pruned)
    assert float((logits(model) - logits(stock(masked))).abs().max()) <= 1e-5
    options = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(ids(), use_cache=False, **options)
    assert torch.equal(model.generate(ids(), **options), plain)
    assert torch.equal(model.generate(ids(), cache_implementation="static", **options), plain)


def test_dropped_layers_keep_their_layer_types(scratch):
    """Gemma 3: the kept layers slide (or not) as they did, and the cache follows."""

    def kept(structure):
        shorter = (LayerCut(None, tuple(range(40))), LayerCut(), LayerCut(tuple(range(4))))
        return Cut((LayerCut(), None, *shorter))

    types = [
        "sliding_attention",
        "sliding_attention",
        "full_attention",
        "sliding_attention",
        "full_attention",
    ]
    masked, pruned = cut_folders("gemma3_text", scratch, kept, layer_types=types)
    assert json.loads((pruned / "config.json").read_text())["layer_types"] == [types[n] for n in (0, 2, 3, 4)]
    model = load(pruned)
    assert float((logits(model) - logits(stock(masked))).abs().max()) <= 1e-5
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids(), **options), model.generate(ids(), use_cache=False, **options))


BARE = """
import json, sys, torch, transformers
from pathlib import Path
class NoSurgeon:  # a development install is on the path: here it is as if it were not
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "surgeon":
            raise ImportError("a user without surgeon")
sys.meta_path.insert(0, NoSurgeon())
transformers.logging.set_verbosity_error()
place = Path(sys.argv[1])
ids = torch.tensor(json.loads((place / "ids.json").read_text()))
for family in sys.argv[2:]:
    folder = place / family / "pruned"
    refused = False
    try:
        transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        refused = "trust_remote_code" in str(error)
    assert refused, family
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), (family, info)
    assert "surgeon" not in sys.modules
    saved = place / family / "saved"
    model.save_pretrained(saved)
    assert (saved / "modeling_surgeon.py").read_bytes() == (folder / "modeling_surgeon.py").read_bytes()
    assert (saved / "configuration_surgeon.py").read_bytes() == (folder / "configuration_surgeon.py").read_bytes()
    again = transformers.AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True)
    with torch.no_grad():
        first, second = model.eval()(ids).logits, again.eval()(ids).logits
    assert torch.equal(first, second), family
    torch.save(first, place / family / "logits.pt")
"""


@pytest.mark.parametrize(
    "families", [("llama", "gemma3_text"), pytest.param(FAMILIES, marks=pytest.mark.slow)], ids=["two", "all"]
)
def test_a_process_without_surgeon_loads_saves_and_loads_again(families, folders, tmp_path):
    place = next(iter(folders.values()))[0].parents[1]
    (place / "ids.json").write_text(json.dumps(ids().tolist()))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
    }
    done = subprocess.run(
        [sys.executable, "-I", "-c", BARE, str(place), *families],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for family in families:
        found = torch.load(place / family / "logits.pt")
        assert float((found - logits(load(folders[family][1]))).abs().max()) <= 1e-5
        # What the library saved by itself is still ours: unchanged code, every layer's sizes.
        assert float((logits(load(place / family / "saved")) - found).abs().max()) <= 1e-5


@pytest.mark.parametrize("damage", ["missing", "unexpected", "shape"])
def test_loading_is_strict(damage, scratch):
    _, pruned = cut_folders("qwen2", scratch)
    state = load_file(pruned / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.bias"
    if damage == "missing":
        del state[name]
    elif damage == "unexpected":
        state["model.layers.3.self_attn.q_proj.weight"] = torch.zeros(8, 64)
    else:
        state[name] = torch.zeros(len(state[name]) + 16)
    save_file(state, pruned / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError) as refused:
        load(pruned)
    assert refused.value.code == "E325"
    assert "layers." in refused.value.message


def test_code_of_others_is_never_run(scratch):
    _, pruned = cut_folders("llama", scratch)
    code = pruned / "modeling_surgeon.py"
    code.write_bytes(code.read_bytes() + b"\nraise SystemExit('ran')\n")
    with pytest.raises(InputError, match="not the file of this version") as refused:
        load(pruned)
    assert refused.value.code == "E326"
    code.unlink()
    with pytest.raises(InputError, match="missing"):
        load(pruned)
    plain = stock_folder("llama", scratch / "plain")
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(
        json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "evil.Model"}})
    )
    with pytest.raises(InputError, match="own code") as refused:
        load(plain)
    assert refused.value.code == "E326"


def test_stock_folders_load_strictly_too(scratch):
    folder = stock_folder("qwen3", scratch / "stock")
    assert torch.equal(logits(load(folder)), logits(stock(folder)))
    assert load(folder, dtype=torch.bfloat16).dtype == torch.bfloat16
    state = load_file(folder / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"1 missing tensors: model.norm.weight") as refused:
        load(folder)
    assert refused.value.code == "E325"


def test_build_gives_the_tensors_of_the_configuration(scratch):
    checkpoint, structure = opened(stock_folder("gemma2", scratch / "source"))
    view = PrunedView(
        checkpoint, structure, Cut((LayerCut((), None), LayerCut(None, ()), *[LayerCut()] * 2, None))
    )
    for device in ("cpu", "meta"):
        model = build(view.config, dtype=torch.bfloat16, device=device)
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if name != "lm_head.weight"}
        assert shapes == {name: info.shape for name, info in view.tensors.items() if name != "lm_head.weight"}
        assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.bfloat16, device)}
    values = np.concatenate(
        [p.float().detach().reshape(-1) for p in build(view.config, dtype=torch.float32).parameters()]
    )
    assert np.isfinite(values).all() and values.std() > 1e-3


def test_build_takes_encoders_and_base_models():
    bert = {"model_type": "bert", "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 40, "max_position_embeddings": 32}  # fmt: skip
    assert type(build({**bert, "architectures": ["BertModel"]}, dtype=torch.float32)).__name__ == "BertModel"
    assert (
        type(build({**bert, "architectures": ["BertForMaskedLM"]}, dtype=torch.float32)).__name__
        == "BertForMaskedLM"
    )
    llama = config_of("llama")
    assert (
        type(build({**llama, "architectures": ["LlamaModel"]}, dtype=torch.float32)).__name__ == "LlamaModel"
    )
    assert (
        type(build({**llama, "architectures": ["Unknown"]}, dtype=torch.float32)).__name__
        == "LlamaForCausalLM"
    )
    with pytest.raises(InputError, match="knows no") as refused:
        build({"model_type": "no_such_model"}, dtype=torch.float32)
    assert refused.value.code == "E324"
    with pytest.raises(InputError, match="cannot build"):
        build({**llama, "num_attention_heads": 7}, dtype=torch.float32)


def test_finish_is_idempotent_and_refuses_what_nobody_reads():
    checked = {**config_of("llama", num_hidden_layers=1), "block_configs": [
        {"attention": {"no_op": False, "num_attention_heads": 6, "num_key_value_heads": 3}, "ffn": {"no_op": True}}]}  # fmt: skip
    config, companions = per_layer.finish(checked)
    assert per_layer.finish(config) == (config, companions)
    assert [name for name, _ in companions] == ["configuration_surgeon.py", "modeling_surgeon.py"]
    assert config["num_attention_heads"] == 8 and config["base_architecture"] == "LlamaForCausalLM"
    assert per_layer.stock_config(config) == config_of("llama", num_hidden_layers=1)
    for family in ("gpt2", "mixtral", "bert"):
        with pytest.raises(InputError, match="no program loads") as refused:
            per_layer.finish({**checked, "model_type": family})
        assert refused.value.code == "E327"
    for key, value, word in (
        ("num_key_value_heads", 4, "share"),
        ("num_attention_heads", 0, "is 0"),
        ("no_op", 1, "no_op"),
    ):
        block = {**checked["block_configs"][0]["attention"], key: value}
        with pytest.raises(InputError, match=word) as refused:
            per_layer.finish(
                {**checked, "block_configs": [{**checked["block_configs"][0], "attention": block}]}
            )
        assert refused.value.code == "E324"


def test_the_configuration_class_checks_itself():
    """Also without surgeon: a folder edited by hand is refused when it is loaded."""
    from surgeon.deploy.modeling.configuration_surgeon import SurgeonLlamaConfig

    config, _ = per_layer.finish({**config_of("llama", num_hidden_layers=1), "block_configs": [
        {"attention": {"no_op": False, "num_attention_heads": 6, "num_key_value_heads": 3},
         "ffn": {"no_op": False, "intermediate_size": 40}}]})  # fmt: skip
    assert SurgeonLlamaConfig.from_dict(config).block_configs == config["block_configs"]
    config["block_configs"][0]["attention"]["num_key_value_heads"] = 4
    with pytest.raises(Exception, match="cannot share"):
        SurgeonLlamaConfig.from_dict(config)
    with pytest.raises(Exception, match="entries"):
        SurgeonLlamaConfig.from_dict({**config, "block_configs": []})


def test_masked_views_need_no_code(scratch):
    checkpoint, structure = opened(stock_folder("llama", scratch / "source"))
    cut = Cut((LayerCut(tuple(range(4))), *[LayerCut()] * 4))
    folder = write(MaskedView(checkpoint, structure, cut), scratch / "masked")
    assert not (folder / "modeling_surgeon.py").exists()
    assert type(load(folder)).__name__ == "LlamaForCausalLM"


def test_models_can_be_copied_and_trained(folders):
    """A student is made by copying: the copy's layers follow the copy's configuration, and gradients reach all of it."""
    model = load(folders["llama"][1])
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    assert model.model.layers[0].self_attn.config._attn_implementation == "sdpa"
    assert twin.model.layers[0].self_attn.config._attn_implementation == "eager"
    twin.train()(input_ids=ids(), labels=ids()).loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in twin.parameters())
    assert all(p.grad is None for p in model.parameters())
