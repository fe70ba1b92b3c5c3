"""Adapters folded in while reading, against peft's own merge; what cannot be folded is refused (fault C9)."""

from __future__ import annotations

import json

import forge
import kit
import numpy as np
import pytest

from surgeon.checkpoint.adapter import AdapterView
from surgeon.checkpoint.checkpoint import open_path
from surgeon.errors import InputError, SurgeonError
from surgeon.execute import execute

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 50,
}


def build(family: str):
    torch.manual_seed(3)
    if family == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=32)
        return transformers.GPT2LMHeadModel(config)
    config = transformers.LlamaConfig(**SHAPE, num_key_value_heads=2, tie_word_embeddings=False)
    return transformers.LlamaForCausalLM(config)


CASES = {
    "lora": ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    "rank-stabilised": ("llama", {"target_modules": ["q_proj", "up_proj"], "use_rslora": True}),
    "rank pattern": ("llama", {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}}),
    "alpha pattern": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj"],
            "alpha_pattern": {"layers.1.self_attn.q_proj": 3, "v_proj": 7},
        },
    ),
    "both patterns, rank-stabilised": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"q_proj": 5},
            "alpha_pattern": {"q_proj": 9},
            "use_rslora": True,
        },
    ),
    "dora": ("llama", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "all linear layers": ("llama", {"target_modules": "all-linear"}),
    "embeddings": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "modules to save": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    ),
    "biases": ("gpt2", {"target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "conv1d, flag left to the library": ("gpt2", {"target_modules": ["c_attn"]}),
    "one layer only": ("llama", {"target_modules": ["o_proj"], "layers_to_transform": [1]}),
}


def make(tmp_path, family: str, settings: dict, **saving):
    """Save a base model and a random adapter; return both folders and the tensors peft merges them to."""
    model = build(family)
    base = tmp_path / "base"
    model.save_pretrained(base)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **settings}))
    torch.manual_seed(5)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name or "modules_to_save" in name or ("bias" in name and settings.get("bias") == "all"):
            scale = 0.3 if "magnitude" in name else 0.2
            parameter.data += torch.randn_like(parameter) * scale
    adapter = tmp_path / "adapter"
    wrapped.save_pretrained(adapter, **saving)
    merged = wrapped.merge_and_unload().state_dict()
    return base, adapter, {n: t.detach().float().numpy() for n, t in merged.items()}


def compare(base, adapter, merged) -> AdapterView:
    stored = open_path(base)
    view = AdapterView(stored, adapter, "base+adapter")
    changed = 0
    for name, info in view.tensors.items():
        found = view.read(name, 0, info.elements)
        wanted = merged[name].reshape(-1)
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6, err_msg=name)
        assert view.computed(name) or np.array_equal(found, wanted), name
        before = stored.read(name, 0, info.elements)
        changed += not np.array_equal(before, found)
    assert changed
    return view


@pytest.mark.parametrize("name", CASES)
def test_equals_peft(tmp_path, name):
    family, settings = CASES[name]
    compare(*make(tmp_path, family, settings))


@pytest.mark.parametrize("saving", [True, False])
def test_embeddings_with_and_without_a_stored_base_layer(tmp_path, saving):
    compare(*make(tmp_path, "llama", {"target_modules": ["embed_tokens"]}, save_embedding_layers=saving))


def test_any_range_gives_the_same_values(tmp_path):
    base, adapter, _ = make(tmp_path, "llama", {"target_modules": ["down_proj"], "use_dora": True})
    view = AdapterView(open_path(base), adapter, "x")
    name = "model.layers.0.mlp.down_proj.weight"
    whole = view.read(name, 0, view.tensors[name].elements)
    for start, stop in ((0, 1), (39, 41), (7, 333), (40, 80), (len(whole) - 1, len(whole))):
        np.testing.assert_allclose(view.read(name, start, stop), whole[start:stop], rtol=1e-6, atol=1e-7)


def test_an_adapter_takes_part_in_a_merge(tmp_path):
    base, adapter, merged = make(tmp_path, "llama", {"target_modules": ["q_proj"]})
    plan = kit.plan([f"{base}+{adapter}", base], method="linear", weight=(1.0, 0.0))
    execute(plan, tmp_path / "out", threads=1)
    name = "model.layers.1.self_attn.q_proj.weight"
    found = open_path(tmp_path / "out")
    values = found.read(name, 0, found.tensors[name].elements)
    np.testing.assert_allclose(values, merged[name].reshape(-1), rtol=1e-5, atol=1e-6)


def test_A6_another_scale_is_another_plan(tmp_path):
    """The scale is in adapter_config.json, not in any weight file."""
    base, adapter, _ = make(tmp_path, "llama", {"target_modules": ["q_proj"]})
    first = kit.plan([f"{base}+{adapter}", base], method="linear").plan_id()
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "lora_alpha": 60}))
    assert kit.plan([f"{base}+{adapter}", base], method="linear").plan_id() != first


# --- refusals ---------------------------------------------------------------------------------------


def by_hand(tmp_path, tensors: dict | None = None, **config):
    base = forge.model_folder(tmp_path / "base", 0)
    folder = tmp_path / "adapter"
    folder.mkdir()
    table = {
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": np.ones((2, 16), "<f4"),
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": np.ones((16, 2), "<f4"),
    }
    table.update(tensors or {})
    forge.write(folder / "adapter_model.safetensors", {n: t for n, t in table.items() if t is not None})
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config})
    )
    return base, folder


Q = "base_model.model.model.layers.0.self_attn.q_proj."
REFUSALS = {
    "another kind": ({}, {"peft_type": "IA3"}, "IA3"),
    "no kind": ({}, {"peft_type": None}, "peft_type"),
    "an escape in the kind": ({}, {"peft_type": "\x1b[2J"}, "peft_type"),
    "layer replication": ({}, {"layer_replication": [[0, 2], [1, 2]]}, "repeated layers"),
    "bare parameters": ({}, {"target_parameters": ["x"]}, "target_parameters"),
    "token indices": ({}, {"trainable_token_indices": [1]}, "trainable_token_indices"),
    "half a pair": ({Q + "lora_B.weight": None}, {}, "incomplete"),
    "wrong width": ({Q + "lora_A.weight": np.ones((2, 15), "<f4")}, {}, "shape"),
    "wrong rank": ({Q + "lora_A.weight": np.ones((3, 16), "<f4")}, {}, "shape"),
    "unknown module": ({Q.replace("q_proj", "z_proj") + "lora_A.weight": np.ones((2, 16), "<f4")}, {}, "does not have"),
    "unknown layer": ({Q.replace("0", "7") + "lora_A.weight": np.ones((2, 16), "<f4")}, {}, "does not have"),
    "unknown tensor": ({"base_model.model.other.weight": np.ones(2, "<f4")}, {}, "no place"),
    "saved module of another shape": ({"base_model.model.lm_head.weight": np.ones((9, 16), "<f4")}, {}, "shape"),
    "bias of an update": ({Q + "lora_B.bias": np.ones(16, "<f4")}, {}, "no place"),
    "dora without magnitudes": ({}, {"use_dora": True}, "magnitude"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_C9_adapters_that_cannot_be_folded_in_are_refused(tmp_path, name):
    tensors, config, word = REFUSALS[name]
    base, folder = by_hand(tmp_path, tensors, **config)
    with pytest.raises(InputError) as caught:
        AdapterView(open_path(base), folder, "x")
    found = [caught.value, *caught.value.others]
    assert caught.value.code == "E338" and any(word in e.message for e in found), [str(e) for e in found]
    assert all(str(e).isprintable() for e in found)


@pytest.mark.parametrize(
    "change",
    [{"lora_alpha": "x"}, {"lora_alpha": None}, {"alpha_pattern": {"(": 1}}, {"alpha_pattern": [1]}, {"alpha_pattern": {"q_proj": "x"}},
     {"lora_alpha": float("1e400")}],
)  # fmt: skip
def test_C9_malformed_settings_are_refused_or_ignored_by_name(tmp_path, change):
    base, folder = by_hand(tmp_path, **change)
    try:
        AdapterView(open_path(base), folder, "x")
    except SurgeonError as error:
        assert error.exit_code == 3


def test_C8_a_pickled_adapter_is_refused(tmp_path):
    base, folder = by_hand(tmp_path)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(InputError) as caught:
        AdapterView(open_path(base), folder, "x")
    assert "adapter_model.bin" in caught.value.help
