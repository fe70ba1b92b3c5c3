"""Choosing layers in config.json: the number, the lists and the rules move together."""

from __future__ import annotations

import contextlib
import copy
import json

import pytest
import tiny_models
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from surgeon import architectures
from surgeon.architectures.conformance import check
from surgeon.architectures.naming import layer_of, num_layers, per_layer_lists, relayer_config
from surgeon.errors import InputError, SurgeonError, UsageError

N = 6


@pytest.mark.parametrize(
    ("config", "count"),
    [
        ({"num_hidden_layers": 4}, 4),
        ({"n_layer": 4}, 4),
        ({"num_layers": 4}, 4),
        ({"text_config": {"num_hidden_layers": 4}}, 4),
        ({"thinker_config": {"text_config": {"num_hidden_layers": 4}}}, 4),
        ({"vision_config": {"num_hidden_layers": 4}}, None),
        ({"num_hidden_layers": "4"}, None),
        ({"num_hidden_layers": True}, None),
        ({"num_hidden_layers": 10**9}, None),
        ({}, None),
    ],
)
def test_num_layers(config, count):
    assert num_layers(config) == count


def test_per_layer_lists_are_found_by_length_and_by_name():
    config = {
        "architectures": ["A"] * 4,
        "eos_token_id": [1, 2, 3, 4],
        "num_hidden_layers": 4,
        "layer_types": ["full_attention"] * 4,
        "no_rope_layers": [1, 1, 1, 0],
        "mlp_only_layers": [0],
        "short": [1, 2, 3],
        "rope_scaling": {"short_factor": [1.0, 1.0, 1.0, 1.0]},
        "vision_config": {"num_hidden_layers": 4, "layer_types": ["a"] * 4},
        "text_config": {"n_layer": 2, "block_types": ["a", "b"]},
        "hybrid_override_pattern": "M*M-",
    }
    assert per_layer_lists(config) == [
        ("layer_types",),
        ("no_rope_layers",),
        ("mlp_only_layers",),
        ("hybrid_override_pattern",),
        ("text_config", "block_types"),
    ]


def test_lists_and_counts_are_rebuilt_in_place_and_nothing_else_changes():
    config = {
        "z": {"b": 1, "a": [1, 2]},
        "num_hidden_layers": 4,
        "layer_types": ["s", "s", "s", "f"],
        "mlp_only_layers": [0, 3],
        "eos_token_id": [1, 2, 3, 4],
        "n_layer": 4,
        "hybrid_override_pattern": "*MM-",
        "a": None,
    }
    before = copy.deepcopy(config)
    changed = relayer_config(config, [0, 3, 3])
    assert config == before
    assert list(changed) == list(config)
    assert changed == {
        **config,
        "num_hidden_layers": 3,
        "n_layer": 3,
        "layer_types": ["s", "f", "f"],
        "mlp_only_layers": [0, 1, 2],
        "hybrid_override_pattern": "*--",
    }
    changed["z"]["a"].append(3)
    assert config == before


def test_nested_text_configuration_is_edited_and_vision_is_not():
    config = {
        "text_config": {"num_hidden_layers": 3, "layer_types": ["a", "b", "c"]},
        "vision_config": {"num_hidden_layers": 3},
    }
    assert relayer_config(config, [2]) == {
        "text_config": {"num_hidden_layers": 1, "layer_types": ["c"]},
        "vision_config": {"num_hidden_layers": 3},
    }


def test_all_layers_in_order_change_nothing_even_beside_unknown_rules():
    config = {"num_hidden_layers": 3, "layer_group_size": 2, "linear_attn_config": {"kda_layers": [1]}}
    assert relayer_config(config, [0, 1, 2]) == config


@pytest.mark.parametrize("source", [[], [4], [-1], [0, 1, 99]])
def test_E10_layers_that_do_not_exist_are_refused_with_the_valid_range(source):
    with pytest.raises(UsageError) as caught:
        relayer_config({"num_hidden_layers": 4}, source)
    assert "0 to 3" in caught.value.help


def test_a_configuration_without_layers_is_refused():
    with pytest.raises(InputError, match="how many layers"):
        relayer_config({"hidden_size": 4}, [0])


@pytest.mark.parametrize(
    ("extra", "source", "expected"),
    [
        ({"max_window_layers": 6}, [0, 1, 2], {"max_window_layers": 3}),
        ({"max_window_layers": 28}, [0, 1, 2], {"max_window_layers": 28}),
        ({"max_window_layers": 4, "use_sliding_window": True}, [0, 1, 4], {"max_window_layers": 2}),
        (
            {"model_type": "qwen3", "max_window_layers": 4, "use_sliding_window": True},
            [4, 0],
            {"max_window_layers": 1, "layer_types": ["sliding_attention", "full_attention"]},
        ),
        ({"model_type": "qwen3"}, [4, 0], {"max_window_layers": None, "layer_types": None}),
        (
            {"model_type": "gemma3_text", "sliding_window_pattern": 3},
            [0, 2],
            {"sliding_window_pattern": None, "layer_types": ["sliding_attention", "full_attention"]},
        ),
        (
            {"sliding_window_pattern": 3, "layer_types": list("sfsssf")},
            [0, 2],
            {"sliding_window_pattern": None, "layer_types": ["s", "s"]},
        ),
        ({"first_k_dense_replace": 3}, [0, 1, 3, 5], {"first_k_dense_replace": 2}),
        ({"first_k_dense_replace": 3, "moe_layer_freq": 1}, [3, 4, 5], {"first_k_dense_replace": 0}),
        ({"moe_layer_freq": [0, 1, 0, 1, 0, 1]}, [0, 1, 5], {"moe_layer_freq": [0, 1, 1]}),
        ({"decoder_sparse_step": 1, "mlp_only_layers": [0, 4]}, [0, 3, 4], {"mlp_only_layers": [0, 2]}),
        (
            {"decoder_sparse_step": 2},
            [0, 1, 3],
            {"decoder_sparse_step": 1, "mlp_only_layers": [0]},
        ),
        ({"decoder_sparse_step": 2}, [0, 1, 4, 5], {"decoder_sparse_step": 2}),
        ({"sliding_window_pattern": 3}, [3, 4, 5], {"sliding_window_pattern": 3}),
        ({"expert_layer_period": 2, "expert_layer_offset": 1}, [1, 2, 3], {"expert_layer_offset": 0}),
        (
            {"expert_layer_period": 3, "expert_layer_offset": 2},
            [0, 1],
            {"expert_layer_period": 3, "expert_layer_offset": 2},
        ),
        ({"expert_layer_period": 2, "expert_layer_offset": 1}, [1, 3], {"expert_layer_period": 1}),
        ({"expert_layer_period": 2, "expert_layer_offset": 1}, [0, 1, 2, 4], {"expert_layer_offset": 1}),
        ({"num_dense_layers": 2}, [1, 2, 3], {"num_dense_layers": 1}),
        (
            {"moe_layer_start_index": 1, "moe_layer_end_index": -1, "moe_layer_interval": 1},
            [0, 3, 4],
            {"moe_layer_start_index": 1, "moe_layer_end_index": -1},
        ),
        ({"num_kv_shared_layers": 2}, [0, 3, 4, 5], {"num_kv_shared_layers": 2}),
        ({"num_kv_shared_layers": 2}, [0, 3, 4], {"num_kv_shared_layers": 1}),
        ({"no_rope_layer_interval": 3}, [0, 2, 5], {"no_rope_layers": [1, 0, 0]}),
        ({"interleave_moe_layer_step": 2}, [1, 2, 3], {"moe_layers": [0, 2]}),
        ({"num_nextn_predict_layers": 1}, [0], {"num_nextn_predict_layers": 1}),
        ({"full_attn_idxs": [1, 3]}, [0, 3], {"full_attn_idxs": [1]}),
    ],
)
def test_rules_are_rewritten(extra, source, expected):
    changed = relayer_config({"num_hidden_layers": N, **extra}, source)
    assert changed["num_hidden_layers"] == len(source)
    assert {key: changed.get(key) for key in expected} == expected


@pytest.mark.parametrize(
    ("extra", "source"),
    [
        ({"max_window_layers": 4, "use_sliding_window": True}, [4, 0]),
        ({"first_k_dense_replace": 3}, [3, 0]),
        ({"sliding_window_pattern": 3}, [0, 2]),
        ({"full_attention_interval": 3}, [2, 3]),
        ({"expert_layer_period": 4, "expert_layer_offset": 1}, [0, 1, 1, 2, 5]),
        ({"moe_layer_start_index": 1, "moe_layer_end_index": -1}, [1, 0]),
        ({"num_kv_shared_layers": 2}, [0, 1, 5]),
        ({"num_kv_shared_layers": 2}, [4, 3]),
        ({"attention_types": [[["global", "local"], 3]]}, [0, 1]),
        ({"linear_attn_config": {"kda_layers": [1, 2]}}, [0, 1]),
        ({"hidden_size_per_layer_input": 8}, [0, 1]),
        ({"layer_group_size": 3}, [0, 1]),
        ({"target_layer_ids": [1, 4]}, [0, 1]),
        ({"target_layer_ids": [0, 1, 2, 3, 4, 5]}, [0, 1]),
        ({"mlp_only_layers": [7]}, [0, 1]),
        ({"is_encoder_decoder": True}, [0, 1]),
    ],
)
def test_rules_that_cannot_be_expressed_are_refused_by_name(extra, source):
    with pytest.raises(InputError) as caught:
        relayer_config({"num_hidden_layers": N, **extra}, source)
    assert any(key in caught.value.message for key in extra)


LIBRARY = [
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 3}),
    ("qwen2", {}),
    ("qwen3", {"use_sliding_window": True, "max_window_layers": 2}),
    ("qwen2_moe", {"mlp_only_layers": [0, 2]}),
    ("qwen2_moe", {"use_sliding_window": True, "max_window_layers": 3}),
    ("qwen2_moe", {"decoder_sparse_step": 3}),
    ("qwen3_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [3]}),
    ("gemma2", {}),
    ("gemma3_text", {}),
    ("gpt_oss", {}),
    ("deepseek_v2", {"first_k_dense_replace": 2}),
    ("deepseek_v3", {"first_k_dense_replace": 2}),
    ("gpt2", {}),
    ("llama", {}),
    ("glm4_moe", {"first_k_dense_replace": 2}),
    ("ernie4_5_moe", {}),
    ("ernie4_5_moe", {"moe_layer_interval": 2}),
    ("hunyuan_v1_moe", {"moe_topk": [1, 2, 3, 4, 1, 2]}),
    ("minimax", {"layer_types": None}),
    ("qwen3_next", {"layer_types": None}),
    ("qwen3_next", {"layer_types": None, "full_attention_interval": 2}),
    ("qwen3_5_moe_text", {"layer_types": None}),
    ("jamba", {}),
    ("llama4_text", {"moe_layers": None, "interleave_moe_layer_step": 2, "no_rope_layers": None}),
    ("granitemoehybrid", {"layer_types": ["mamba", "attention"] * 3}),
    ("kimi_linear", {"layer_types": None, "mlp_layer_types": None}),
    ("lfm2_moe", {"layer_types": ["conv", "full_attention"] * 3}),
    ("nemotron_h", {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "moe", "full_attention"]}),
]  # fmt: skip

MAY_REFUSE = (
    "first_k_dense_replace",
    "num_dense_layers",
    "moe_layer_start_index",
    "attn_layer_period",
    "expert_layer_period",
)
"""Rules that not every choice of layers fits."""


@pytest.mark.parametrize("implicit", [False, True], ids=["written", "implied"])
@pytest.mark.parametrize(("family", "extra"), LIBRARY)
@given(source=st.lists(st.integers(0, N - 1), min_size=1, max_size=9))
@settings(max_examples=15, deadline=None)
def test_the_library_reads_every_kept_layer_as_it_was(family, extra, implicit, source):
    """Loading the rewritten file gives each layer the attention type and the tensors of its source."""
    depth = {"n_layer": N} if family == "gpt2" else {"num_hidden_layers": N}
    if family == "nemotron_h":
        depth = {}
    values = {**tiny_models.FAMILIES[family], "mlp_only_layers": [], **extra, **depth}
    old = transformers.AutoConfig.for_model(family, **values)
    config = json.loads(old.to_json_string(use_diff=False))
    config.pop("time_step_limit", None)  # infinite, which the file says in a way of its own
    config |= {key: extra[key] for key in extra.keys() & {"full_attention_interval"}}  # the library drops it
    if implicit and extra.get("layer_types") is None:
        config.pop("layer_types", None)
    try:
        changed = relayer_config(config, source)
    except InputError as refusal:
        assert refusal.code == "E405" or any(key in refusal.message for key in MAY_REFUSE)
        return
    kind = changed.pop("model_type")
    new = transformers.AutoConfig.for_model(kind, **changed)
    assert new.num_hidden_layers == len(source)
    if getattr(old, "layer_types", None) is not None:
        assert new.layer_types == [old.layer_types[layer] for layer in source]
    architecture = architectures.get(family)
    was = by_layer(architecture, config)
    now = by_layer(architecture, {**changed, "model_type": kind})
    assert [now[layer] for layer in range(len(source))] == [was[layer] for layer in source]


def by_layer(architecture, config) -> dict[int, dict[str, tuple[int, ...]]]:
    found: dict[int, dict] = {}
    count = architecture.num_layers(config)
    for name, spec in architecture.expected(config).items():
        if spec.layer is not None and spec.layer < count:
            found.setdefault(spec.layer, {})[layer_of(name).rest] = spec.shape
    return found


def test_kimi_counts_the_layers_of_its_kinds_from_one():
    config = {
        "model_type": "kimi_linear",
        "num_hidden_layers": 4,
        "linear_attn_config": {"kda_layers": [1, 2, 4], "full_attn_layers": [3], "num_heads": 2},
        "first_k_dense_replace": 1,
    }
    assert relayer_config(config, [0, 2, 3]) == {
        **config,
        "num_hidden_layers": 3,
        "linear_attn_config": {"kda_layers": [1, 3], "full_attn_layers": [2], "num_heads": 2},
    }
    assert config["linear_attn_config"]["kda_layers"] == [1, 2, 4]


def test_nemotron_counts_its_layers_by_a_list_or_a_pattern():
    listed = {"model_type": "nemotron_h", "layers_block_type": ["mamba", "moe", "attention"], "mtp_layers_block_type": ["attention", "moe"]}  # fmt: skip
    assert num_layers(listed) == 3
    assert relayer_config(listed, [1, 2]) == {**listed, "layers_block_type": ["moe", "attention"]}
    pattern = {"model_type": "nemotron_h", "num_hidden_layers": 4, "hybrid_override_pattern": "ME*-", "mtp_hybrid_override_pattern": "*E"}  # fmt: skip
    assert relayer_config(pattern, [0, 2]) == {**pattern, "num_hidden_layers": 2, "hybrid_override_pattern": "M*"}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "source"),
    [
        ({"num_hidden_layers": 3, "layer_types": ["mamba", "attention", "mamba"]}, [0, 2]),
        ({"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]}, [0]),
        ({"num_hidden_layers": 5, "model_type": "qwen3_next"}, [0, 1, 2, 4]),
        ({"num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 1}, [0, 2, 3]),
        ({"hybrid_override_pattern": "M*E-"}, [0, 2, 3]),
    ],
)
def test_a_hybrid_keeps_a_layer_of_attention(config, source):
    with pytest.raises(InputError) as caught:
        relayer_config(config, source)
    assert caught.value.code == "E405" and "attention" in caught.value.message


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_shortened_qwen_loads(family, tmp_path):
    config, _ = tiny_models.saved(family, use_sliding_window=True, max_window_layers=1)
    changed = relayer_config(config, [0, 2])
    (tmp_path / "config.json").write_text(json.dumps(changed))
    loaded = transformers.AutoConfig.from_pretrained(tmp_path)
    assert loaded.layer_types == ["full_attention", "sliding_attention"]
    assert transformers.AutoModelForCausalLM.from_config(loaded).config.num_hidden_layers == 2


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=7) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=8,
)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_configurations_are_refused_and_never_crash(data):
    family = data.draw(st.sampled_from(sorted(tiny_models.FAMILIES)))
    config, header = tiny_models.saved(family, tie_word_embeddings=False)
    keys = [
        *config,
        *sorted(architectures.get(family).defaults),
        "layer_group_size",
        "moe_layer_freq",
        "text_config",
    ]
    for key in data.draw(st.lists(st.sampled_from(keys), min_size=1, max_size=3)):
        config[key] = data.draw(VALUES)
    assert all(isinstance(finding.message, str) for finding in check(config, header))
    source = data.draw(st.lists(st.integers(0, 3), max_size=4))
    with contextlib.suppress(SurgeonError):
        assert num_layers(relayer_config(config, source)) == len(source)
