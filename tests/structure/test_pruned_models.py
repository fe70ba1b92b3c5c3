"""Every family, every kind of cut: hooks on the dense model, the masked model and the small one loaded strictly agree."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).resolve().parent))
from structure_models import (
    DENSE,
    FAMILIES,
    FURTHER,
    LATENT,
    ROUTED,
    STOCK_HEADS,
    both,
    close,
    ffn_cut,
    folder_of,
    groups_cut,
    heads_cut,
    logits,
    opened,
    removed,
    stock,
    strictly,
    without,
    write,
)  # fmt: skip

from surgeon.structure.check import check, is_uniform, shapes
from surgeon.structure.cut import Cut, LayerCut
from surgeon.structure.views import MaskedView, PrunedView

ALL = (*DENSE, *ROUTED, *LATENT)


def agree(family, cut, folder, **extra):
    """Check masked against hooks and pruned (strict, from disk) against masked; return the pruned folder."""
    checkpoint, structure = opened(family, **extra)
    check(cut, structure, checkpoint.config, for_stock=True)
    dense = stock(checkpoint.folder)
    whole = logits(dense)
    with removed(dense, structure, cut):
        wanted = logits(dense)
    assert float((whole - wanted).abs().max() / whole.abs().max()) > 1e-2  # the cut matters
    masked = logits(strictly(write(MaskedView(checkpoint, structure, cut), folder / "masked")))
    close(masked, wanted)
    view = PrunedView(checkpoint, structure, cut)
    assert "block_configs" not in view.config
    small = strictly(write(view, folder / "pruned"))
    close(logits(small), masked)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in dense.parameters())
    return view.config


def test_the_families_are_all_there():
    assert {*ALL, *FURTHER} == set(FAMILIES)


@pytest.mark.parametrize("family", [f for f in STOCK_HEADS if f not in ("gpt2", "bert")])
@pytest.mark.parametrize("mode", [groups_cut, heads_cut])
def test_heads(family, mode, scratch):
    checkpoint, structure = opened(family)
    config = agree(family, mode(structure), scratch)
    heads, groups = (4, 2) if mode is groups_cut else (3, 3)
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (heads, groups)
    assert config["head_dim"] == structure.attention[0].head_dim
    source = checkpoint.config
    changed = {"num_attention_heads", "num_key_value_heads", "head_dim"}
    assert {k: v for k, v in config.items() if k not in changed} == {
        k: v for k, v in source.items() if k not in changed
    }


@pytest.mark.parametrize("family", [*DENSE, *LATENT])
def test_ffn_channels(family, scratch):
    checkpoint, structure = opened(family)
    config = agree(family, ffn_cut(structure), scratch)
    key = "n_inner" if family == "gpt2" else "intermediate_size"
    assert config == {**checkpoint.config, key: 20}


@pytest.mark.parametrize("family", [f for f in ALL if f != "bert"])
def test_a_dropped_layer(family, scratch):
    _, structure = opened(family)
    config = agree(family, without(Cut.whole(structure.layers), 1), scratch)
    assert config["n_layer" if family == "gpt2" else "num_hidden_layers"] == structure.layers - 1


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi3"])
def test_everything_at_once(family, scratch):
    _, structure = opened(family)
    agree(family, without(both(heads_cut(structure), ffn_cut(structure)), 0), scratch)


@pytest.mark.parametrize(("family", "extra"), [
    ("llama", {"attention_bias": True, "mlp_bias": True, "num_attention_heads": 8, "num_key_value_heads": 4}),
    ("qwen3", {"attention_bias": True}),
    ("gpt_oss", {"attention_bias": False}),
    ("phi3", {"tie_word_embeddings": True}),
    ("granitemoe", {"attention_bias": True, "residual_multiplier": 0.5}),
])  # fmt: skip
def test_variants(family, extra, scratch):
    _, structure = opened(family, **extra)
    agree(family, groups_cut(structure) if family != "llama" else heads_cut(structure), scratch, **extra)


def test_bert_layers_are_left_out_without_a_masked_equivalent(scratch):
    checkpoint, structure = opened("bert")
    view = PrunedView(checkpoint, structure, without(Cut.whole(3), 1))
    found = logits(strictly(write(view, scratch / "pruned")))
    model = stock(checkpoint.folder)
    del model.bert.encoder.layer[1]
    close(found, logits(model), 1e-6)


@pytest.mark.parametrize("family", ["bert", "gpt2", "olmoe"])
def test_heads_without_a_stock_class_can_be_masked(family, scratch):
    checkpoint, structure = opened(family)
    cut = groups_cut(structure)
    dense = stock(checkpoint.folder)
    with removed(dense, structure, cut):
        wanted = logits(dense)
    view = MaskedView(checkpoint, structure, cut)
    close(logits(strictly(write(view, scratch / "masked"))), wanted)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "bert", "mixtral", "phi"])
def test_a_branch_that_is_removed_altogether(family, scratch):
    checkpoint, structure = opened(family)
    ffn = None if structure.ffn[0] is None else ()
    cut = Cut((LayerCut(heads=()), LayerCut(), LayerCut(channels=ffn, heads=() if ffn is None else None)))
    dense = stock(checkpoint.folder)
    with removed(dense, structure, cut):
        wanted = logits(dense)
    close(logits(strictly(write(MaskedView(checkpoint, structure, cut), scratch / "masked"))), wanted)
    assert not is_uniform(cut, structure)
    view = PrunedView(checkpoint, structure, cut)
    assert [entry["attention"]["no_op"] for entry in view.config["block_configs"]] == [
        True,
        False,
        ffn is None,
    ]
    gone = set(structure.attention[0].own)
    assert structure.attention[0].output.weight in gone
    assert not gone & set(view.tensors) and set(structure.attention[1].own) <= set(view.tensors)


@pytest.mark.parametrize("family", ["qwen2", "deepseek_v3", "gpt2"])
def test_kept_layers_are_bit_equal_and_byte_copyable(family):
    checkpoint, structure = opened(family)
    keep = [n for n in range(structure.layers) if n != 0]
    view = PrunedView(checkpoint, structure, without(Cut.whole(structure.layers), 0))
    with safe_open(checkpoint.folder / "model.safetensors", "pt") as file:
        for name, info in view.tensors.items():
            number = name.removeprefix(structure.prefix).split(".")[0]
            inside = name.startswith(structure.prefix)
            source = (
                name.replace(f"{structure.prefix}{number}.", f"{structure.prefix}{keep[int(number)]}.")
                if inside
                else name
            )
            assert not view.computed(name)
            stored = file.get_tensor(source).contiguous().view(torch.uint8).numpy().reshape(-1)
            assert np.array_equal(view.read_bytes(name, 0, info.nbytes), stored)
    assert {
        n.removeprefix(structure.prefix).split(".")[0] for n in view.tensors if n.startswith(structure.prefix)
    } == {str(n) for n in range(len(keep))}


def test_lists_with_one_entry_a_layer_follow():
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    checkpoint, structure = opened("gemma3_text", sliding_window=6)
    checkpoint.config["layer_types"] = types
    view = PrunedView(checkpoint, structure, without(Cut.whole(3), 0))
    assert view.config["layer_types"] == types[1:]
    sparse, structure = opened("qwen2_moe")  # layer 0 is dense
    assert structure.ffn[0] is not None and structure.ffn[1] is None
    assert PrunedView(sparse, structure, without(Cut.whole(3), 0)).config["mlp_only_layers"] == []


def test_prediction_layers_go_with_the_last_layer_and_stay_otherwise(scratch):
    checkpoint, structure = opened("deepseek_v3")
    extra = {}
    for name, info in checkpoint.tensors.items():
        if name.startswith(f"{structure.prefix}3."):
            extra[name.replace(".3.", f".{structure.layers}.", 1)] = info
    extended = {**checkpoint.tensors, **extra}
    checkpoint.tensors = extended
    kept = PrunedView(checkpoint, structure, ffn_cut(structure))
    assert set(extra) <= set(kept.tensors) and not kept.notes
    dropped = PrunedView(checkpoint, structure, without(Cut.whole(structure.layers), 2))
    assert not any(name.startswith(f"{structure.prefix}{structure.layers - 1}.") for name in dropped.tensors)
    assert dropped.config["num_nextn_predict_layers"] == 0 and len(dropped.notes) == 1


# ---- the trap: 24 of 32 heads ----------------------------------------------------------------------


def thirty_two(**extra):
    return {"hidden_size": 64, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 4, **extra}


def quarter_off(structure) -> Cut:
    return Cut((LayerCut(heads=tuple(h for h in range(32) if h % 4 != 1)),) * structure.layers)


def test_a_llama_whose_heads_do_not_divide_becomes_a_mistral(scratch):
    checkpoint, structure = opened("llama", **thirty_two())
    with pytest.raises(Exception, match="multiple"):  # what the library does to such a Llama
        transformers.LlamaConfig(**{**checkpoint.config, "num_attention_heads": 24, "head_dim": 4})
    config = agree("llama", quarter_off(structure), scratch, **thirty_two())
    assert config["model_type"] == "mistral" and config["architectures"] == ["MistralForCausalLM"]
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (24, 8)
    assert config["sliding_window"] is None


@pytest.mark.parametrize("extra", [
    {},
    {"tie_word_embeddings": True},
    {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 32, "rope_theta": 5e5}},
])  # fmt: skip
def test_a_relabelled_llama_is_the_same_function(extra, scratch):
    from surgeon.structure.config import relabel_as_mistral

    checkpoint, structure = opened("llama", **extra)
    whole = MaskedView(checkpoint, structure, Cut.whole(3))
    relabelled = relabel_as_mistral(checkpoint.config)
    assert relabelled is not None and relabelled["model_type"] == "mistral"
    found = logits(strictly(write(whole, scratch / "mistral", relabelled)))
    assert torch.equal(found, logits(stock(folder_of("llama", **extra))))


def test_a_mistral_made_of_a_bare_llama_keeps_what_the_llama_assumes(scratch):
    from surgeon.structure.config import relabel_as_mistral

    checkpoint, _ = opened("llama", num_key_value_heads=6)
    bare = {
        k: v
        for k, v in checkpoint.config.items()
        if k not in ("max_position_embeddings", "num_key_value_heads")
    }
    as_llama = transformers.LlamaConfig(**bare)
    as_mistral = transformers.MistralConfig(**relabel_as_mistral(bare))
    for key in (
        "num_key_value_heads",
        "max_position_embeddings",
        "rms_norm_eps",
        "hidden_act",
        "rope_parameters",
        "head_dim",
    ):
        assert getattr(as_llama, key) == getattr(as_mistral, key), key


def test_shapes_and_document_round_trip():
    _, structure = opened("llama")
    cut = without(both(groups_cut(structure), ffn_cut(structure)), 1)
    assert [(s.heads, s.groups, s.head_dim, s.ffn) for s in shapes(cut, structure)] == [(4, 2, 8, 20)] * 2
    again = Cut.from_document(json.loads(json.dumps(cut.document())))
    assert again == cut and again.identity() == cut.identity()
