"""Swapped base and long model: what is suspicious, what is not; and whose context a merge takes."""

from __future__ import annotations

import copy
import json

import forge
import pytest
import transformers

from surgeon.checkpoint.checkpoint import open_path
from surgeon.merge.context import context_edits, context_length, scaling
from surgeon.merge.roles import Role, find_marker, read_role, suspicious_roles
from surgeon.merge.token_ids import apply_config_edits

THINKS = ("<think>", "chat template")


@pytest.mark.parametrize(
    ("base", "others", "words"),
    [
        (Role("b", 131072), [Role("m", 4096)], ["131,072", "4,096", "swapped"]),
        (Role("b", 4096, THINKS), [Role("m", 4096)], ["<think>", "chat template"]),
        (Role("b", 131072, THINKS), [Role("m", 4096), Role("n", 32768)], ["131,072", "32,768", "<think>"]),
        (Role("b", 4096), [Role("m", 131072, THINKS)], []),  # as it should be
        (Role("b", 131072, THINKS), [Role("m", 131072, THINKS)], []),  # a shortened model onto its origin
        (Role("b", 40960, THINKS), [Role("m", 131072, THINKS)], []),  # Qwen3-8B thinks, too
        (Role("b", 131072), [Role("m", 4096), Role("n", 131072)], []),  # a common ancestor
        (Role("b", 131072), [Role("m")], []),  # nothing to compare with
        (Role("b"), [Role("m", 4096)], []),
        (Role("b", 4096, THINKS), [], []),
    ],
)
def test_a_base_that_looks_like_the_long_model(base, others, words):
    found = suspicious_roles(base, others)
    assert len(found) == bool(words)
    assert all(word in found[0] for word in words)


@pytest.mark.parametrize(
    "text",
    ["{{ bos }}<think>\n", "{% if enable_thinking %}", "x</think>y", "◁think▷", "<|begin_of_thought|>", "[THINK]",
     "{{ message.reasoning_content }}"],
)  # fmt: skip
def test_markers_in_templates(text):
    found = find_marker(["", text], None)
    assert found is not None and found[1] == "chat template" and found[0] in text


@pytest.mark.parametrize("text", ["", "I think so", "{{ messages }}", "<|im_start|>assistant", "rethinking"])
def test_ordinary_templates_have_none(text):
    assert find_marker([text], {"temperature": 0.6, "eos_token_id": [1]}) is None


def test_markers_in_generation_settings():
    assert find_marker([], {"thinking_budget": 100}) == ("thinking_budget", "generation_config.json")
    assert find_marker([], {"stop_strings": ["</think>"]}) == ("</think>", "generation_config.json")


def test_roles_are_read_from_folders(scratch):
    folder = forge.model_folder(scratch / "long", 1)
    config = json.loads((folder / "config.json").read_text())
    assert read_role(open_path(folder)) == Role(open_path(folder).label, config["max_position_embeddings"])
    (folder / "chat_template.jinja").write_text("{{ messages }}<think>")
    assert read_role(open_path(folder)).marker == THINKS
    bare = open_path(folder / "model.safetensors")
    assert read_role(bare) == Role(bare.label)


# ---- context -----------------------------------------------------------------------------------------

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "attn_factor": 0.878}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, None),
        ({"rope_scaling": None, "rope_theta": 1e6}, None),
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, None),
        ({"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}}, None),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_type": "linear", "factor": 2.0}),
        ({"rope_scaling": YARN, "rope_theta": 1e6}, YARN),
        ({"rope_parameters": {"rope_theta": 1e6, **YARN}}, YARN),
        ({"text_config": {"rope_scaling": YARN, "num_hidden_layers": 2, "hidden_size": 8}}, YARN),
    ],
)
def test_scaling_in_every_spelling(config, expected):
    assert scaling(config) == expected


@pytest.mark.parametrize("ours", ["flat", "nested", "inner"])
@pytest.mark.parametrize("theirs", ["flat", "nested", "inner"])
@pytest.mark.parametrize(("mine", "his"), [(None, YARN), (YARN, None), (YARN, YARN), (None, None)])
def test_edits_carry_length_and_scaling_into_the_spelling_in_use(ours, theirs, mine, his):
    def write(spelling: str, length: int, found: dict | None) -> dict:
        config = {"hidden_size": 8, "num_hidden_layers": 2, "max_position_embeddings": length}
        if spelling == "flat":
            return {**config, "rope_theta": 1e6, "rope_scaling": found}
        config["rope_parameters"] = {"rope_theta": 1e6, **(found or {"rope_type": "default"})}
        return config if spelling == "nested" else {"model_type": "x", "text_config": config}

    start, donor = write(ours, 40960, mine), write(theirs, 131072, his)
    before = copy.deepcopy(start)
    edits = context_edits(start, donor)
    assert start == before
    result = apply_config_edits(start, edits)
    assert context_length(result) == 131072 and scaling(result) == his
    assert result == write(ours, 131072, his)
    assert context_edits(result, donor) == {}


def test_rope_by_kind_of_layer_stays():
    ours = {"max_position_embeddings": 1, "rope_parameters": {"full_attention": {"rope_theta": 1e6}}}
    theirs = {"max_position_embeddings": 2, "rope_scaling": YARN}
    assert context_edits(ours, theirs) == {"max_position_embeddings": 2}


def test_transformers_reads_the_edited_config_as_the_donors(scratch):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
             "intermediate_size": 16, "vocab_size": 32}  # fmt: skip
    yarn = {k: v for k, v in YARN.items() if k != "attn_factor"}
    donor = transformers.Qwen3Config(
        **sizes, max_position_embeddings=131072, rope_parameters={"rope_theta": 1e6, **yarn}
    )
    plain = transformers.Qwen3Config(
        **sizes, max_position_embeddings=40960, rope_parameters={"rope_theta": 1e6}
    )
    old = {**plain.to_dict(), "rope_theta": 1e6, "rope_scaling": None}
    del old["rope_parameters"]
    for start in (plain.to_dict(), old):
        result = apply_config_edits(start, context_edits(start, donor.to_dict()))
        read = transformers.Qwen3Config.from_dict(result)
        assert read.max_position_embeddings == 131072
        assert {k: v for k, v in read.rope_parameters.items() if v is not None} == {
            k: v for k, v in donor.rope_parameters.items() if v is not None
        }
