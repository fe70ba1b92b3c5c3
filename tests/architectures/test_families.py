"""Every record against the library's own models: names, shapes, ties, and what each fault shows."""

from __future__ import annotations

import copy
import re

import pytest
import tiny_models
import torch
import transformers

from surgeon import architectures
from surgeon.architectures.conformance import check

ROUTED = sorted(family for family in tiny_models.FAMILIES if architectures.get(family).storages != ("plain",))

NOT_IN_SHAPES = {
    ("bert", "num_attention_heads"),
    ("gpt2", "n_head"),
}
"""Head counts that no tensor shows; only divisibility is checked."""

SIZE_KEYS = {
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "n_embd",
    "n_layer",
    "n_head",
    "n_positions",
    "n_inner",
    "type_vocab_size",
    "num_local_experts",
    "num_experts",
    "n_routed_experts",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "n_shared_experts",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "first_k_dense_replace",
    "decoder_sparse_step",
    "moe_num_experts",
    "moe_num_shared_experts",
    "moe_layer_start_index",
    "num_dense_layers",
    "block_size",
    "linear_conv_kernel_dim",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_head_dim",
    "linear_num_heads",
    "conv_L_cache",
    "mamba_d_state",
    "mamba_d_conv",
    "mamba_dt_rank",
    "mamba_expand",
    "mamba_n_heads",
    "mamba_n_groups",
    "mamba_d_head",
    "mamba_num_heads",
    "mamba_head_dim",
    "ssm_state_size",
    "n_groups",
    "conv_kernel",
    "intermediate_size_mlp",
    "shared_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "num_shared_experts",
}

UNUSED = {
    ("deepseek_v2", "num_key_value_heads"),
    ("deepseek_v2", "head_dim"),
    ("deepseek_v3", "num_key_value_heads"),
    ("deepseek_v3", "head_dim"),
    ("kimi_k2", "num_key_value_heads"),
    ("kimi_k2", "head_dim"),
    ("kimi_linear", "num_key_value_heads"),
    ("kimi_linear", "head_dim"),
    ("nemotron_h", "n_shared_experts"),
}
"""Keys the library writes but derives from others (latent attention has no key/value heads)."""


FURTHER = set(list(tiny_models.FAMILIES)[list(tiny_models.FAMILIES).index("phimoe") :])
"""Families of which the default run does less."""

WRITTEN_DIFFERENTLY = {"kimi_linear"}
"""Families whose dense layers the library writes under another name than the hub has."""

LAYERS_WITHOUT_A_NUMBER = {"nemotron_h"}
"""Families whose number of layers is the length of a list."""


def size_keys(family: str) -> list[str]:
    config, _ = tiny_models.saved(family, tie_word_embeddings=False)
    keys = [key for key in sorted(SIZE_KEYS & set(config)) if type(config[key]) is int]
    if family == "bert":
        keys.append("max_position_embeddings")
    return [key for key in keys if (family, key) not in UNUSED]


def test_every_record_has_a_tiny_model_and_the_other_way_round():
    assert architectures.known() == sorted({*tiny_models.FAMILIES, *tiny_models.NESTED})


@pytest.mark.parametrize("variant", tiny_models.VARIANTS, ids=tiny_models.label)
def test_record_equals_what_the_library_saves(variant):
    family, class_name, extra = variant
    config, header = tiny_models.saved(family, class_name, **extra)
    assert check(config, header) == []
    expected = architectures.get(family).layout(config, header).tensors
    if family not in WRITTEN_DIFFERENTLY:
        assert expected == architectures.get(family).expected(config)
    required = {name: spec.shape for name, spec in expected.items() if not spec.optional}
    given = {name: shape for name, (_, shape) in header.items()}
    grouped = {name: spec.shape for name, spec in expected.items() if spec.group and name in given}
    assert required | grouped == given


@pytest.mark.parametrize("family", sorted(tiny_models.FAMILIES))
def test_ties_equal_the_library(family):
    architecture = architectures.get(family)
    library = tiny_models.LIBRARY.get(family, family)
    assert architecture.default_tie == bool(transformers.AutoConfig.for_model(library).tie_word_embeddings)
    model = tiny_models.build(family, tie_word_embeddings=True)
    config, header = tiny_models.saved(family, tie_word_embeddings=True)
    state = model.state_dict()
    shared = {}
    for name, tensor in state.items():
        shared.setdefault(tensor.data_ptr(), []).append(name)
    groups = sorted(tuple(sorted(names)) for names in shared.values() if len(names) > 1)
    assert sorted(tuple(sorted(group)) for group in architecture.tied(config)) == groups
    assert all(group[0] in header for group in architecture.tied(config))
    untied, _ = tiny_models.saved(family, tie_word_embeddings=False)
    assert architecture.tied(untied) == []


@pytest.mark.parametrize("family", sorted(tiny_models.FAMILIES))
def test_vocabulary_tensors_are_those_with_a_vocabulary_axis(family):
    config, header = tiny_models.saved(family, tie_word_embeddings=False)
    by_shape = {name for name, (_, shape) in header.items() if shape[:1] == (config["vocab_size"],)}
    assert sorted(by_shape) == architectures.get(family).vocabulary_tensors(config, header)
    assert by_shape <= set(architectures.get(family).vocabulary_tensors(config))


@pytest.mark.parametrize("family", sorted(tiny_models.FAMILIES))
def test_tied_checkpoint_may_store_both_copies(family):
    config, _ = tiny_models.saved(family, tie_word_embeddings=True)
    _, header = tiny_models.saved(family, tie_word_embeddings=False)
    assert check(config, header) == []


@pytest.mark.parametrize("family", sorted(tiny_models.FAMILIES))
def test_every_tensor_has_a_kind(family):
    config, _ = tiny_models.saved(family, tie_word_embeddings=False)
    expected = architectures.get(family).expected(config)
    assert [name for name, spec in expected.items() if spec.kind == "other"] == []
    assert all((f".{spec.expert}." in name) for name, spec in expected.items() if spec.expert is not None)
    assert all((f".{spec.layer}." in name) for name, spec in expected.items() if spec.layer is not None)


@pytest.mark.parametrize("family", sorted(tiny_models.FAMILIES))
def test_bare_names_are_accepted_for_a_model_with_a_head(family):
    config, header = tiny_models.saved(family, tie_word_embeddings=True)
    prefix = architectures.get(family).prefix
    bare = {name.removeprefix(prefix): entry for name, entry in header.items()}
    assert check(config, bare) == []
    architecture = architectures.get(family)
    assert set(architecture.vocabulary_tensors(config, bare)) <= set(bare)
    assert {group[0] for group in architecture.tied(config, bare)} <= set(bare)
    assert len(architecture.tied(config, bare)) == len(architecture.tied(config))


@pytest.mark.parametrize("family", ROUTED)
def test_E9_fused_experts_are_accepted_and_mixtures_are_not(family):
    config, hub = tiny_models.saved(family, tie_word_embeddings=False)
    _, fused = tiny_models.saved(family, hub_names=False, tie_word_embeddings=False)
    assert check(config, fused) == []
    if set(fused) == set(hub):
        return  # the library holds this family in memory as the hub stores it
    prefix = architectures.get(family).prefix  # the library may have a place of its own for the base model
    fused = {re.sub(r"^model\.", prefix, name): entry for name, entry in fused.items()}
    assert check(config, fused) == []
    last = max(re.search(r"layers\.\d+\.", name)[0] for name in set(hub) - set(fused) if "layers." in name)
    mixed = {name: entry for name, entry in hub.items() if last not in name}
    mixed |= {name: entry for name, entry in fused.items() if last in name}
    kinds = {finding.kind for finding in check(config, mixed)}
    assert kinds == {"missing-tensor", "unexpected-tensor"}


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=pytest.mark.slow if family in FURTHER else ())
        for family in sorted(tiny_models.FAMILIES)
    ],
)
def test_E3_each_deleted_tensor_is_reported(family):
    config, header = tiny_models.saved(family, tie_word_embeddings=False)
    for name in header:
        rest = {other: entry for other, entry in header.items() if other != name}
        findings = check(config, rest)
        assert [(finding.kind, finding.tensor) for finding in findings] == [("missing-tensor", name)]
        assert findings[0].severity == "error" and name in findings[0].message


@pytest.mark.parametrize("family", sorted(tiny_models.FAMILIES))
def test_E3_a_deleted_layer_is_reported_once(family):
    config, header = tiny_models.saved(family, tie_word_embeddings=False)
    architecture = architectures.get(family)
    middle = f"{architecture.prefix}{architecture.stack}.1."
    findings = check(config, {name: entry for name, entry in header.items() if not name.startswith(middle)})
    assert [finding.kind for finding in findings] == ["missing-layer"]


@pytest.mark.parametrize("family", sorted(tiny_models.FAMILIES))
def test_E2_a_tensor_nobody_knows_is_reported(family):
    config, header = tiny_models.saved(family, tie_word_embeddings=False)
    architecture = architectures.get(family)
    extra = {
        "vision_tower.patch.weight": "warning",
        f"{architecture.prefix}{architecture.stack}.0.extra.weight": "error",
    }
    for name, severity in extra.items():
        (finding,) = check(config, {**header, name: ("F32", (2, 2))})
        assert (finding.kind, finding.tensor, finding.severity) == ("unexpected-tensor", name, severity)


@pytest.mark.parametrize("step", [1, -1], ids=["up", "down"])
@pytest.mark.parametrize(
    ("family", "key"), [(family, key) for family in sorted(tiny_models.FAMILIES) for key in size_keys(family)]
)
def test_E4_each_size_key_is_checked_against_the_tensors(family, key, step):
    config, header = tiny_models.saved(family, tie_word_embeddings=False)
    config = copy.deepcopy(config)
    config[key] += step
    findings = check(config, header)
    assert any(finding.severity == "error" for finding in findings)
    if config[key] and (family, key) not in NOT_IN_SHAPES:
        named = [finding for finding in findings if key in finding.keys or key in finding.message]
        assert named, [finding.message for finding in findings]


@pytest.mark.parametrize("family", sorted(tiny_models.FAMILIES))
def test_E4_layer_count_is_checked_in_both_directions(family):
    config, header = tiny_models.saved(family, tie_word_embeddings=False)
    key = architectures.get(family).layer_keys[0]
    kinds = config[key] if family in LAYERS_WITHOUT_A_NUMBER else None
    layers = config[key] if kinds is None else len(kinds)
    extra = config.get("num_nextn_predict_layers") or 0  # it may hold layers that predict further tokens
    for count in (layers - 1 - extra, layers + 1):
        stated = count if kinds is None else [*kinds, kinds[-1]][:count]
        findings = check({**config, key: stated}, header)
        contradiction = next(finding for finding in findings if finding.keys == (key,))
        assert (contradiction.expected, contradiction.found) == (count, layers)
        assert key in contradiction.message


@pytest.mark.parametrize("family", sorted(tiny_models.FAMILIES))
def test_E4_a_wrong_size_is_summed_up_by_key(family):
    config, header = tiny_models.saved(family, tie_word_embeddings=False)
    findings = check({**config, "vocab_size": 70}, header)
    assert findings[0].kind == "config-contradiction"
    assert (findings[0].expected, findings[0].found, findings[0].keys) == (70, 67, ("vocab_size",))


def test_E4_flags_that_contradict_the_tensors_are_reported():
    config, header = tiny_models.saved("llama", attention_bias=True, mlp_bias=True, head_dim=6)
    for key in ("attention_bias", "mlp_bias"):
        kinds = {(finding.kind, finding.severity) for finding in check({**config, key: False}, header)}
        assert kinds == {("unexpected-tensor", "error")}
    config, header = tiny_models.saved("llama", tie_word_embeddings=True)
    (finding,) = check({**config, "tie_word_embeddings": False}, header)
    assert (finding.kind, finding.tensor) == ("missing-tensor", "lm_head.weight")


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        ("qwen3_moe", {"num_experts": 5}, "num_local_experts = 4 but num_experts = 5"),
        (
            "mixtral",
            {"num_experts_per_tok": 5},
            "num_experts_per_tok = 5 is larger than num_local_experts = 4",
        ),
        ("deepseek_v3", {"n_group": 4}, "n_routed_experts = 6 is not a multiple of n_group = 4"),
        ("deepseek_v3", {"n_group": 3}, "num_experts_per_tok"),
        ("deepseek_v3", {"topk_group": 3}, "topk_group = 3 is larger than n_group = 2"),
        (
            "llama",
            {"num_attention_heads": 3, "num_key_value_heads": 2},
            "not a multiple of num_key_value_heads",
        ),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types has 1 entries"),
        ("bert", {"num_attention_heads": 5}, "hidden_size = 32 is not a multiple of num_attention_heads = 5"),
        ("gpt2", {"n_head": 5}, "n_embd = 32 is not a multiple of n_head = 5"),
        ("gpt2", {"num_hidden_layers": 2}, "n_layer = 3 but num_hidden_layers = 2"),
    ],
)
def test_E4_keys_that_contradict_each_other(family, change, words):
    if change.get("n_group") == 3:
        change = {**change, "num_experts_per_tok": 3}
    config, header = tiny_models.saved(family, tie_word_embeddings=False)
    messages = [finding.message for finding in check({**config, **change}, header)]
    assert any(words in message for message in messages), messages


@pytest.mark.parametrize("value", [None, 0, -1, "32", 32.0, True, [32], 2**60])
def test_E4_an_unusable_size_is_reported_by_key(value):
    config, header = tiny_models.saved("llama", tie_word_embeddings=False)
    (finding,) = check({**config, "hidden_size": value}, header)
    assert finding.kind == "config-invalid" and "hidden_size" in finding.message


@pytest.mark.parametrize("change", [{"num_hidden_layers": 10**9}, {"num_local_experts": 10**9}])
def test_E4_an_absurd_count_is_refused_quickly(change):
    config, header = tiny_models.saved("mixtral", tie_word_embeddings=False)
    assert [finding.kind for finding in check({**config, **change}, header)] == ["config-invalid"]


def test_names_and_keys_of_published_kimi_linear_files():
    config, header = tiny_models.saved("kimi_linear", tie_word_embeddings=False)
    published = {
        re.sub(r"block_sparse_moe\.(gate|up|down)_proj", r"mlp.\1_proj", name): entry
        for name, entry in header.items()
    }
    assert published != header and check(config, published) == []
    for key in (
        "layer_types",
        "mlp_layer_types",
        "linear_head_dim",
        "linear_num_heads",
        "linear_conv_kernel_dim",
    ):
        del config[key]
    config["first_k_dense_replace"] = 1
    config["linear_attn_config"] = {"kda_layers": [1, 3], "full_attn_layers": [2], "head_dim": 6, "num_heads": 4, "short_conv_kernel_size": 4}  # fmt: skip
    assert check(config, published) == []
    library = transformers.AutoConfig.for_model(**config)
    assert library.layer_types == ["linear_attention", "full_attention", "linear_attention"]
    for key, value in (("kda_layers", [1, 2]), ("full_attn_layers", [3]), ("head_dim", 5)):
        wrong = {**config, "linear_attn_config": {**config["linear_attn_config"], key: value}}
        assert (key == "kda_layers") == (check(wrong, published) == [])


def test_patterns_of_published_nemotron_h_files():
    config, header = tiny_models.saved("nemotron_h", tie_word_embeddings=False)
    del config["layers_block_type"], config["time_step_limit"]
    config |= {
        "num_hidden_layers": 5,
        "hybrid_override_pattern": "ME*-E",
        "mamba_d_conv": config.pop("conv_kernel"),
    }
    assert check(config, header) == []
    assert transformers.AutoConfig.for_model(**config).layers_block_type[2] == "full_attention"
    assert any(
        finding.severity == "error"
        for finding in check({**config, "hybrid_override_pattern": "ME**E"}, header)
    )
    for pattern in ("MEX-E", "", 5, None):
        (finding,) = check({**config, "hybrid_override_pattern": pattern}, header)
        assert finding.kind == "config-invalid" and "hybrid_override_pattern" in finding.message


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        ("hunyuan_v1_moe", {"moe_topk": [2, 2, 5]}, "moe_topk = 5 is larger than num_experts = 4"),
        ("ernie4_5_moe", {"moe_k": 5}, "moe_k = 5 is larger than moe_num_experts = 4"),
        ("kimi_linear", {"num_expert_group": 4}, "num_experts = 6 is not a multiple of num_expert_group = 4"),
        (
            "qwen3_next",
            {"layer_types": ["full_attention", "conv", "linear_attention"]},
            "layer_types names 'conv'",
        ),
        ("granitemoehybrid", {"mamba_expand": 3}, "are not mamba_expand = 3 times hidden_size = 32"),
    ],
)
def test_contradictions_of_further_families(family, change, words):
    config, header = tiny_models.saved(family, tie_word_embeddings=False)
    assert any(words in finding.message for finding in check({**config, **change}, header))


def test_prediction_layer_is_complete_or_absent():
    config, header = tiny_models.saved("deepseek_v3", tie_word_embeddings=False)
    last = config["num_hidden_layers"]
    extra = {
        name.replace(f"layers.{last - 1}.", f"layers.{last}."): entry
        for name, entry in header.items()
        if f"layers.{last - 1}." in name
    }
    path = f"model.layers.{last}."
    extra |= {
        f"{path}enorm.weight": ("F32", (32,)),
        f"{path}hnorm.weight": ("F32", (32,)),
        f"{path}eh_proj.weight": ("F32", (32, 64)),
        f"{path}shared_head.norm.weight": ("F32", (32,)),
    }
    assert check(config, header | extra) == []
    copies = {
        f"{path}embed_tokens.weight": ("F32", (67, 32)),
        f"{path}shared_head.head.weight": ("F32", (67, 32)),
    }
    assert check(config, header | extra | copies) == []
    for name in extra:
        rest = {other: entry for other, entry in (header | extra).items() if other != name}
        assert [finding.tensor for finding in check(config, rest)] == [name]
    assert check({**config, "num_nextn_predict_layers": 0}, header | extra)[0].keys == ("num_hidden_layers",)


def test_buffers_of_older_files_are_accepted():
    config, header = tiny_models.saved("llama", tie_word_embeddings=False)
    for layer in range(3):
        header[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = ("F32", (4,))
    assert check(config, header) == []
    config, header = tiny_models.saved("bert", tie_word_embeddings=True)
    header["bert.embeddings.position_ids"] = ("I64", (1, 64))
    assert check(config, header) == []
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): entry
        for name, entry in header.items()
    }
    assert check(config, old) == []
    config, header = tiny_models.saved("gpt2", tie_word_embeddings=True)
    header["transformer.h.0.attn.bias"] = ("BOOL", (1, 1, 40, 40))
    assert check(config, header) == []


def test_files_of_the_original_bert_keep_pooler_and_next_sentence_head():
    config, header = tiny_models.saved("bert", "BertForPreTraining")
    assert check({**config, "architectures": ["BertForMaskedLM"]}, header) == []


def test_absent_keys_take_the_class_defaults():
    config, header = tiny_models.saved("llama", tie_word_embeddings=False, num_key_value_heads=4)
    absent = ("num_key_value_heads", "head_dim", "attention_bias", "mlp_bias", "tie_word_embeddings")
    assert check({key: value for key, value in config.items() if key not in absent}, header) == []
    config, header = tiny_models.saved("gemma", tie_word_embeddings=True)
    del config["tie_word_embeddings"]
    assert check(config, header) == []


def test_defaults_equal_the_library():
    for family in architectures.known():
        default = transformers.AutoConfig.for_model(tiny_models.LIBRARY.get(family, family)).get_text_config()
        for key, value in architectures.get(family).defaults.items():
            if (family, key) != ("kimi_linear", "first_k_dense_replace"):  # a default without an attribute
                assert getattr(default, key) == value, (family, key)


def test_quantized_companions_are_accepted_and_said():
    config, header = tiny_models.saved("deepseek_v3", tie_word_embeddings=False)
    config["quantization_config"] = {"quant_method": "fp8"}
    fp8 = dict(header)
    for name, (_, shape) in header.items():
        if name.endswith("_proj.weight"):
            fp8[name] = ("F8_E4M3", shape)
            fp8[f"{name}_scale_inv"] = ("F32", (1, 1))
    assert check(config, fp8) == []
    config, header = tiny_models.saved("llama", tie_word_embeddings=False)
    packed = {}
    for name, (dtype, shape) in header.items():
        if name.endswith("_proj.weight"):
            packed[name.replace(".weight", ".weight_packed")] = ("I32", (shape[0], shape[1] // 8))
            packed[name.replace(".weight", ".weight_scale")] = ("BF16", (shape[0], 1))
        else:
            packed[name] = (dtype, shape)
    (finding,) = check({**config, "quantization_config": {}}, packed)
    assert (finding.kind, finding.severity) == ("packed-tensors", "notice")
    del packed["model.layers.1.self_attn.q_proj.weight_packed"]
    assert (
        check({**config, "quantization_config": {}}, packed)[0].tensor
        == "model.layers.1.self_attn.q_proj.weight"
    )


def test_mxfp4_storage_of_gpt_oss():
    sizes = {"hidden_size": 64, "intermediate_size": 96}
    config, header = tiny_models.saved("gpt_oss", tie_word_embeddings=False, **sizes)
    packed = {}
    for name, (dtype, shape) in header.items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inner, rows = shape
            packed[f"{name}_blocks"] = ("U8", (experts, rows, inner // 32, 16))
            packed[f"{name}_scales"] = ("U8", (experts, rows, inner // 32))
        else:
            packed[name] = (dtype, shape)
    assert check(config, packed) == []
    config["quantization_config"] = {"quant_method": "mxfp4"}
    assert check(config, packed) == []
    name = "model.layers.1.mlp.experts.down_proj_blocks"
    packed[name] = ("U8", (4, 64, 2, 16))
    assert [finding.tensor for finding in check(config, packed) if finding.tensor] == [name]


def test_model_on_the_meta_device_has_the_same_names():
    """The published sizes of one model, to see that nothing depends on the sizes being tiny."""
    config = transformers.AutoConfig.for_model("qwen3_moe", num_hidden_layers=2, num_experts=128)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    header = {name: ("BF16", tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    assert check({**config.to_dict(), "architectures": ["Qwen3MoeForCausalLM"]}, header) == []


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_norms_that_multiply_by_one_plus_their_weight_are_recorded(family):
    model = tiny_models.build(family).float().eval()
    record = architectures.get(family)
    asked = 0
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if "norm" not in type(module).__name__.lower() or "Gated" in type(module).__name__ or weight is None:
            continue
        inputs = torch.randn(3, 2, weight.shape[-1])
        ones = torch.ones_like(weight)
        with torch.no_grad():
            weight.copy_(ones)
            at_one = module(inputs)
            weight.copy_(2 * ones)
            at_two = module(inputs)
        factor = float((at_two / at_one).nanmedian())  # 2 / 1, or 3 / 2 where one is added
        asked += 1
        assert record.norm_offset(f"{path}.weight") == (1.0 if abs(factor - 1.5) < 1e-3 else 0.0), (
            path,
            factor,
        )
        assert min(abs(factor - 1.5), abs(factor - 2)) < 1e-3 or getattr(module, "bias", None) is not None
    assert asked
    gated = [p for p, m in model.named_modules() if "NormGated" in type(m).__name__]
    assert not any(record.norm_offset(f"{path}.weight") for path in gated)
