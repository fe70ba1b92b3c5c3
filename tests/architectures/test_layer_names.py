"""Layer numbers in tensor names, for any model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgeon.architectures.naming import LayerName, layer_of, main_stack, relayer, stacks

NAMES = {
    "model.layers.3.self_attn.q_proj.weight": ("model.layers", 3, "self_attn.q_proj.weight"),
    "layers.0.mlp.up_proj.weight": ("layers", 0, "mlp.up_proj.weight"),
    "model.layers.11.mlp.experts.7.w1.weight": ("model.layers", 11, "mlp.experts.7.w1.weight"),
    "model.visual.blocks.2.attn.qkv.bias": ("model.visual.blocks", 2, "attn.qkv.bias"),
    "transformer.h.10.attn.c_attn.weight": ("transformer.h", 10, "attn.c_attn.weight"),
    "h.0.ln_1.weight": ("h", 0, "ln_1.weight"),
    "encoder.layer.1.output.dense.bias": ("encoder.layer", 1, "output.dense.bias"),
    "bert.encoder.layer.1.output.dense.bias": ("bert.encoder.layer", 1, "output.dense.bias"),
    "encoder.block.4.layer.1.DenseReluDense.wi.weight": (
        "encoder.block",
        4,
        "layer.1.DenseReluDense.wi.weight",
    ),
    "model.language_model.layers.5.mlp.gate.weight": ("model.language_model.layers", 5, "mlp.gate.weight"),
    "vision_tower.vision_model.encoder.layers.6.norm.bias": (
        "vision_tower.vision_model.encoder.layers",
        6,
        "norm.bias",
    ),
    "backbone.layers.9.mixer.A_log": ("backbone.layers", 9, "mixer.A_log"),
    "model.layers.2": ("model.layers", 2, ""),
}

NO_LAYER = [
    "model.embed_tokens.weight",
    "lm_head.weight",
    "mlp.experts.3.w1.weight",
    "model.norm.weight",
    "layers.weight",
    "layers",
    "3.weight",
    "model.layers.03.weight",
    "model.layers.-1.weight",
    "model.layers.1e3.weight",
    "model.layers.٣.weight",
    "model.layers.9999999999999.weight",
    "model.my_layers.3.weight",
    "",
    "...",
]


@pytest.mark.parametrize(("name", "parts"), NAMES.items())
def test_a_name_is_taken_apart_and_put_together(name, parts):
    assert layer_of(name) == LayerName(*parts)
    assert str(LayerName(*parts)) == name


@pytest.mark.parametrize("name", NO_LAYER)
def test_names_without_a_layer(name):
    assert layer_of(name) is None
    with pytest.raises(ValueError, match="no layer number"):
        relayer(name, 0)


@given(st.sampled_from(sorted(NAMES)), st.integers(0, 999))
def test_relayer_changes_the_number_and_nothing_else(name, index):
    before, after = layer_of(name), layer_of(relayer(name, index))
    assert (after.stack, after.index, after.rest) == (before.stack, index, before.rest)
    assert relayer(relayer(name, index), before.index) == name


@given(st.text())
def test_any_text_is_a_possible_name(name):
    place = layer_of(name)
    assert place is None or str(place) == name


def test_relayer_refuses_a_negative_number():
    with pytest.raises(ValueError, match="-1"):
        relayer("h.0.weight", -1)


def test_stacks_count_to_the_highest_number():
    names = ["a.layers.0.w", "a.layers.3.w", "b.h.1.w", "b.h.0.v", "head.w"]
    assert stacks(reversed(names)) == {"a.layers": 4, "b.h": 2}


@pytest.mark.parametrize(
    ("sizes", "config", "stack"),
    [
        ({"model.layers": 4}, {"num_hidden_layers": 4}, "model.layers"),
        ({"transformer.h": 4}, {"n_layer": 4}, "transformer.h"),
        ({"model.layers": 4}, {"num_hidden_layers": 5}, "model.layers"),
        ({"model.layers": 4}, {}, "model.layers"),
        ({"model.layers": 4, "model.visual.blocks": 4}, {"num_hidden_layers": 4}, "model.layers"),
        ({"model.layers": 5, "model.visual.blocks": 4}, {"num_hidden_layers": 4}, "model.visual.blocks"),
        (
            {"language_model.model.layers": 3, "vision_tower.encoder.layers": 4},
            {"vision_config": {"num_hidden_layers": 4}, "text_config": {"num_hidden_layers": 3}},
            "language_model.model.layers",
        ),
        ({"encoder.block": 3, "decoder.block": 2}, {"num_layers": 2}, "decoder.block"),
        ({"encoder.block": 3, "decoder.block": 2}, {"num_layers": 7}, None),
        ({}, {"num_hidden_layers": 4}, None),
    ],
)
def test_main_stack(sizes, config, stack):
    names = [f"{name}.{layer}.weight" for name, size in sizes.items() for layer in range(size)]
    assert main_stack(names, config) == stack
