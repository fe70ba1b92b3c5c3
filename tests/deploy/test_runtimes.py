"""Which programs load which shapes: every verdict on transformers and llama.cpp is checked by asking them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from deploy_models import FAMILIES, config_of

from surgeon.deploy import decilm, runtimes
from surgeon.deploy.build import build
from surgeon.errors import InputError, UsageError


def shaped(config: dict, *shapes) -> dict:
    blocks = [
        {"attention": {"no_op": not q, "num_attention_heads": q, "num_key_value_heads": k}, "ffn": {"no_op": not f, "intermediate_size": f}}
        for q, k, f in shapes
    ]  # fmt: skip
    return {**config, "num_hidden_layers": len(shapes), "block_configs": blocks}


def verdicts(config: dict) -> dict[str, runtimes.Reader]:
    found = runtimes.readers(config)
    assert tuple(reader.runtime for reader in found) == runtimes.RUNTIMES
    assert all(reader.loads == bool(reader.form) and (reader.loads or reader.reason) for reader in found)
    return {reader.runtime: reader for reader in found}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("heads", [8, 6])
def test_uniform_shapes_load_in_transformers_as_said(family, heads):
    config = config_of(family, num_attention_heads=heads, num_key_value_heads=2, head_dim=16)
    said = verdicts(config)["transformers"]
    try:
        build(config, dtype=torch.float32, device="meta")
        assert said.loads and said.form == "folder"
    except InputError:
        assert not said.loads and "divide" in said.reason


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2", "mixtral"])
def test_per_layer_shapes_load_in_transformers_as_said(family):
    config = shaped({**config_of("llama"), "model_type": family}, (8, 4, 96), (6, 3, 40))
    said = verdicts(config)["transformers"]
    assert said.loads == (family in FAMILIES)
    if not said.loads:
        with pytest.raises(InputError, match="no program"):
            build(config, dtype=torch.float32, device="meta")
    else:
        assert "trust_remote_code" in said.reason and said.form == "folder with code"


def test_engines_load_stock_models_and_decilm_only():
    found = verdicts(config_of("qwen3"))
    assert (
        found["vllm"].form == found["tensorrt-llm"].form == "folder"
        and found["llama.cpp"].form == "gguf qwen3"
    )
    found = verdicts(shaped(config_of("llama"), (8, 4, 256), (8, 2, 512)))
    assert (
        found["vllm"].form == found["tensorrt-llm"].form == "decilm"
        and found["llama.cpp"].form == "gguf deci"
    )
    assert "not run" in found["vllm"].reason
    found = verdicts(shaped(config_of("llama"), (8, 4, 256), (6, 3, 512)))
    assert not found["vllm"].loads and "layer 1 has 6" in found["vllm"].reason
    found = verdicts(shaped(config_of("qwen3"), (8, 4, 96), (6, 3, 40)))
    assert found["llama.cpp"].form == "gguf openelm" and "experimental" in found["llama.cpp"].reason
    assert not found["tensorrt-llm"].loads and "qwen3" in found["tensorrt-llm"].reason
    found = verdicts(config_of("gemma2"))
    assert not found["llama.cpp"].loads and "GELU" in found["llama.cpp"].reason


def test_a_decilm_directory_is_read_as_one():
    config, _ = decilm.finish(shaped(config_of("llama"), (8, 4, 256), (8, 2, 512)))
    found = verdicts(config)
    assert found["vllm"].form == "folder" and found["transformers"].form == "folder with code"
    assert not found["llama.cpp"].loads


def test_a_required_runtime_refuses_with_the_reason_and_the_others():
    config = shaped(config_of("llama"), (8, 4, 256), (6, 3, 512))
    assert runtimes.require(config, "llama.cpp").form == "gguf deci"
    with pytest.raises(UsageError, match="query heads in every layer") as refused:
        runtimes.require(config, "vllm")
    assert (
        refused.value.code == "E288"
        and refused.value.help is not None
        and "transformers, llama.cpp" in refused.value.help
    )
    with pytest.raises(UsageError, match='"vlm"') as refused:
        runtimes.require(config, "vlm")
    assert refused.value.code == "E287" and refused.value.help is not None and "vllm" in refused.value.help


def test_quantization_notes_name_the_odd_sizes():
    good = config_of(
        "llama", hidden_size=512, num_attention_heads=16, num_key_value_heads=4, intermediate_size=1024
    )
    assert list(runtimes.quantization_notes(good)) == []
    notes = list(runtimes.quantization_notes({**good, "intermediate_size": 1100}))
    assert len(notes) == 4 and all("1100" in note for note in notes)
    (note,) = runtimes.quantization_notes({**good, "intermediate_size": 1152})
    assert "K-quants" in note and "1152" in note
