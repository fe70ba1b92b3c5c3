"""What cannot be cut, and what no stock class can hold: refused before anything is written, with a way out."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent))
from structure_models import (
    DENSE,
    FAMILIES,
    LATENT,
    ROUTED,
    STOCK_HEADS,
    ffn_cut,
    groups_cut,
    heads_cut,
    opened,
    without,
)

from surgeon.checkpoint.memory import MemoryCheckpoint
from surgeon.errors import InputError, UsageError
from surgeon.structure.check import check, is_uniform
from surgeon.structure.config import (
    DIVIDED_HIDDEN,
    allowed_head_counts,
    pruned_config,
    stock_config,
    stock_obstacle,
)
from surgeon.structure.cut import Cut, LayerCut
from surgeon.structure.find import structure_of
from surgeon.structure.views import MaskedView, PrunedView


def refused(cut, code, words, family="llama", kind=UsageError, **options):
    checkpoint, structure = opened(family)
    with pytest.raises(kind, match=words) as caught:
        check(cut, structure, checkpoint.config, **options)
    assert caught.value.code == code
    return caught.value


def only(**kept):
    return Cut((LayerCut(), LayerCut(**kept), LayerCut()))


@pytest.mark.parametrize(("cut", "code", "words"), [
    (Cut.whole(4), "E260", "describes 4 layers, the model has 3"),
    (Cut((None, None, None)), "E260", "keeps no layer"),
    (only(channels=(0, 48)), "E260", "layer 1 keeps FFN channels 48, but there are 0 to 47"),
    (only(channels=(-1, 4)), "E260", "layer 1 keeps FFN channels -1"),
    (only(channels=(4, 4)), "E260", "ascending order, or one twice"),
    (only(heads=(3, 2)), "E260", "ascending order"),
    (only(heads=(0, 6)), "E260", "query heads 6, but there are 0 to 5"),
    (only(heads=(0, 1, 2)), "E261", "layer 1 keeps 2 query heads of key/value head 0 but 1 of 1"),
    (replace(Cut.whole(3), hidden=()), "E260", "keeps no channel of the residual stream"),
    (replace(Cut.whole(3), hidden=(0, 48)), "E260", "channels of the residual stream 48"),
])  # fmt: skip
def test_malformed_cuts(cut, code, words):
    refused(cut, code, words)


def test_every_wrong_layer_is_named():
    bad = LayerCut(heads=(0, 1, 2))
    error = refused(Cut((bad, bad, LayerCut(channels=(99,)))), "E261", "layer 0")
    assert ["layer 1" in str(other) or "layer 2" in str(other) for other in error.others] == [True, True]


@pytest.mark.parametrize(("family", "cut", "words"), [
    ("mixtral", only(channels=(0, 1)), "layer 1 of this mixtral model cannot be cut there; ffn: the layer has routed experts"),
    ("deepseek_v2", Cut((LayerCut(heads=(0,)), *(LayerCut(),) * 3)), "share one latent"),
    ("deepseek_v3", Cut((*(LayerCut(),) * 3, LayerCut(channels=(0,)))), "layer 3 .* routed experts"),
])  # fmt: skip
def test_structures_that_cannot_be_cut(family, cut, words):
    refused(cut, "E366", words, family, InputError)


def test_reasons_and_shapes_of_latent_attention():
    _, structure = opened("deepseek_v3")
    assert structure.attention == (None,) * 4
    assert [f.width if f else 0 for f in structure.ffn] == [48, 48, 0, 0]
    assert {layer for layer, text in structure.reasons if text.startswith("ffn")} == {2, 3}
    assert {layer for layer, text in structure.reasons if "latent" in text} == {0, 1, 2, 3}


def test_norms_over_all_heads_need_a_permission():
    checkpoint, structure = opened("olmoe")
    cut = groups_cut(structure)
    refused(cut, "E262", "normalises queries and keys over all 6 heads", "olmoe")
    check(cut, structure, checkpoint.config, allow_norm_approx=True)
    with pytest.raises(UsageError, match="over all"):
        PrunedView(checkpoint, structure, cut)
    check(only(heads=()), structure, checkpoint.config)  # all heads: the norm goes too
    refused(
        cut,
        "E367",
        "hidden_size / num_attention_heads",
        "olmoe",
        InputError,
        allow_norm_approx=True,
        for_stock=True,
    )


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_heads_that_no_stock_class_holds(family):
    checkpoint, structure = opened(family)
    cut = groups_cut(structure)
    check(cut, structure, checkpoint.config)
    error = refused(
        cut, "E367", "5 heads of 8 do not fit a residual stream of 48", family, InputError, for_stock=True
    )
    assert error.help.startswith("6 heads fit")
    config = PrunedView(checkpoint, structure, cut).config
    assert [block["attention"]["num_attention_heads"] for block in config["block_configs"]] == [5, 5, 5]


def test_layers_of_different_sizes_need_the_permission_to_be_so():
    cut = Cut((LayerCut(channels=tuple(range(20))), LayerCut(), None))
    refused(cut, "E263", "layers of different sizes", for_stock=True)
    checkpoint, structure = opened("llama")
    assert not is_uniform(cut, structure)
    config = PrunedView(checkpoint, structure, cut).config
    assert config == {
        **checkpoint.config,
        "num_hidden_layers": 2,
        "block_configs": [
            {"attention": {"no_op": False, "num_attention_heads": 6, "num_key_value_heads": 3},
             "ffn": {"no_op": False, "intermediate_size": width}}
            for width in (20, 48)
        ],
    }  # fmt: skip


def test_head_size_is_written_wherever_heads_differ():
    checkpoint, structure = opened("qwen2")
    assert "head_dim" not in checkpoint.config
    config = PrunedView(checkpoint, structure, only(heads=(0, 1))).config
    assert config["head_dim"] == 8 and config["num_attention_heads"] == 6
    assert [block["attention"]["num_attention_heads"] for block in config["block_configs"]] == [6, 2, 6]
    assert "head_dim" not in PrunedView(checkpoint, structure, only(heads=())).config


def test_a_dropped_layer_of_bert_has_no_masked_equivalent():
    checkpoint, structure = opened("bert")
    with pytest.raises(InputError, match="normalises what every layer leaves") as caught:
        MaskedView(checkpoint, structure, without(Cut.whole(3), 1))
    assert caught.value.code == "E366"


# ---- what the library's classes say ----------------------------------------------------------------


@pytest.mark.parametrize("family", STOCK_HEADS)
def test_which_classes_ask_for_a_divisor(family):
    config = {
        **FAMILIES[family],
        "hidden_size": 48,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "head_dim": 8,
    }
    if family in DIVIDED_HIDDEN:
        with pytest.raises(Exception, match="not a multiple"):
            transformers.AutoConfig.for_model(family, **config)
        return
    built = transformers.AutoConfig.for_model(family, **config)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(built)
    output = next(m for n, m in model.named_modules() if n.endswith(("o_proj", "self_attn.dense")))
    assert output.weight.shape == (48, 40)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_head_counts_that_load(family):
    wide = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}
    checkpoint, structure = opened(family, **wide)
    assert allowed_head_counts(checkpoint.config, structure) == (1, 2, 4, 8)
    three = Cut((LayerCut(heads=(0, 1, 2, 3, 6, 7)),) * 3)
    with pytest.raises(InputError, match="refuses 6 heads: they do not divide hidden_size = 64") as caught:
        check(three, structure, checkpoint.config, for_stock=True)
    assert caught.value.code == "E367" and "1, 2, 4, 8 heads load" in caught.value.help


def test_a_llama_with_biases_is_no_mistral():
    checkpoint, structure = opened(
        "llama", hidden_size=64, num_attention_heads=8, num_key_value_heads=4, attention_bias=True
    )
    six = Cut((LayerCut(heads=(0, 1, 2, 3, 6, 7)),) * 3)
    with pytest.raises(InputError, match="refuses 6 heads"):
        check(six, structure, checkpoint.config, for_stock=True)
    assert allowed_head_counts(checkpoint.config, structure) == (1, 2, 4, 8)
    plain, structure = opened("llama", hidden_size=64, num_attention_heads=8, num_key_value_heads=4)
    check(six, structure, plain.config, for_stock=True)
    assert allowed_head_counts(plain.config, structure) == (1, 2, 3, 4, 6, 8)


def test_sizes_taken_from_the_number_of_heads():
    checkpoint, structure = opened("phi", qk_layernorm=True)
    obstacle = stock_obstacle(checkpoint.config, structure, heads_cut(structure))
    assert obstacle is not None and obstacle.code == "E367"
    config = {**checkpoint.config, "num_attention_heads": 3, "head_dim": 8}
    with torch.device("meta"):  # the class sizes these norms as 48 / 3
        model = transformers.AutoModelForCausalLM.from_config(transformers.PhiConfig(**config))
    assert model.model.layers[0].self_attn.q_layernorm.weight.shape == (16,)

    factors = {
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "rope_theta": 10000.0,
    }
    checkpoint, structure = opened("phi3")
    checkpoint.config["rope_parameters"] = {**factors, "partial_rotary_factor": 1.0}
    obstacle = stock_obstacle(checkpoint.config, structure, groups_cut(structure))
    assert obstacle is not None and obstacle.code == "E367"
    with pytest.raises(Exception, match="must have length"):
        transformers.Phi3Config(
            **{**checkpoint.config, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
        )


def test_old_names_of_sizes_are_all_written():
    checkpoint, structure = opened("gpt2")
    checkpoint.config["num_hidden_layers"] = 3
    config = pruned_config(checkpoint.config, structure, without(ffn_cut(structure), 0))
    assert (config["n_layer"], config["num_hidden_layers"], config["n_inner"]) == (2, 2, 20)
    with pytest.raises(UsageError):
        stock_config(checkpoint.config, structure, Cut((LayerCut(channels=(1,)), LayerCut(), LayerCut())))


# ---- checkpoints ------------------------------------------------------------------------------------


def bare(family="llama", change=lambda config: config, drop="", shape=None):
    checkpoint, _ = opened(family)
    state = {n: torch.zeros(i.shape) for n, i in checkpoint.tensors.items() if not drop or drop not in n}
    if shape:
        state[shape] = torch.zeros(5, 5)
    found = MemoryCheckpoint("model", state)
    found.config = change(dict(checkpoint.config))
    return found


@pytest.mark.parametrize(("checkpoint", "words"), [
    (lambda: bare(change=lambda config: None), "has no config.json"),
    (lambda: bare(change=lambda config: {**config, "model_type": "opt"}), "is a opt model"),
    (lambda: bare(change=lambda config: {**config, "quantization_config": {"quant_method": "gptq"}}), "is quantized .gptq"),
    (lambda: bare(drop="layers.1.self_attn.k_proj"), "k_proj.weight of model is missing"),
    (lambda: bare(shape="model.layers.2.mlp.up_proj.weight"), "has shape .5, 5., by intermediate_size, hidden_size it is .48, 48."),
])  # fmt: skip
def test_checkpoints_whose_structure_cannot_be_known(checkpoint, words):
    with pytest.raises(InputError, match=words) as caught:
        structure_of(checkpoint())
    assert caught.value.code == ("E311" if "quantized" in words else "E365")


@pytest.mark.parametrize("family", (*DENSE, *ROUTED, *LATENT))
def test_sections_lie_apart_and_fill_their_tensors(family):
    """Every row of q, k, v, gate, up belongs to exactly one unit; outputs take one input a head row or channel."""
    checkpoint, structure = opened(family)
    for attention, ffn in zip(structure.attention, structure.ffn, strict=True):
        if attention is not None:
            rows: dict[tuple[str, int], list[tuple[int, int]]] = {}
            for s in (*attention.queries, *attention.key_values):
                assert s.length % s.units == 0 and s.units in (attention.heads, attention.groups)
                rows.setdefault((s.tensor, s.axis), []).append((s.start, s.length))
            for (tensor, axis), parts in rows.items():
                assert sum(length for _, length in parts) == checkpoint.tensors[tensor].shape[axis]
                assert len({start for start, _ in parts}) == len(parts)
            weight = checkpoint.tensors[attention.output.weight]
            assert weight.shape[attention.output.input_axis] == attention.heads * attention.head_dim
        if ffn is not None:
            parts = [s for s in ffn.inputs if s.tensor.endswith("weight")]
            assert sum(s.length for s in parts) in (ffn.width, 2 * ffn.width)
            assert checkpoint.tensors[ffn.output.weight].shape[ffn.output.input_axis] == ffn.width
    assert (None in structure.attention) == (family in LATENT)
    assert (None in structure.ffn) == (family in (*LATENT, *ROUTED))
