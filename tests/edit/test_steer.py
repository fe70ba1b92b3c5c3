"""Baked shifts against hooks at all positions, gamma against a quadratic, the sign, control vectors."""

from __future__ import annotations

import re

import edit_models as em
import numpy as np
import pytest
import torch
import transformers
from tiny_models import DECODER
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from surgeon.calibrate.head import Head
from surgeon.calibrate.settings import Settings
from surgeon.checkpoint.checkpoint import open_path
from surgeon.edit import control_vector, steer
from surgeon.edit import steering_strength as strength
from surgeon.edit.examples import Example
from surgeon.errors import InputError, UsageError

SHIFT = np.random.default_rng(5).normal(size=32)


def granite(scratch):
    """A Granite with factors on everything it adds up; the walk does not know the family, baking does."""
    torch.manual_seed(0)
    config = transformers.GraniteConfig(
        **DECODER, residual_multiplier=0.22, logits_scaling=3.0, embedding_multiplier=4.0
    )
    model = transformers.GraniteForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                1 + 0.3 * torch.randn_like(parameter)
                if parameter.ndim == 1
                else 0.25 * torch.randn_like(parameter)
            )
    model.save_pretrained(scratch / "granite")
    return open_path(scratch / "granite")


def blocks(model):
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def hooked(checkpoint, layer, part, shift):
    """The library's model with the shift added by a hook, at all positions."""
    model = em.stock(checkpoint.folder)
    shift = torch.from_numpy(shift).float()
    block = blocks(model)[layer]
    if part == "ffn":
        block.register_forward_hook(lambda m, args, out: out + shift)
    else:  # the residual before the FFN's norm is both its input and what the FFN is added to
        attention = block.attn if hasattr(block, "attn") else block.self_attn
        factor = getattr(model.config, "residual_multiplier", 1.0)
        attention.register_forward_hook(lambda m, args, out: (out[0] + shift / factor, *out[1:]))
    return model


@pytest.mark.parametrize(
    ("family", "part"),
    [("llama", "ffn"), ("llama", "attention"), ("granite", "ffn"), ("granite", "attention"), ("qwen2", "ffn"),
     ("mistral", "ffn"), ("qwen3", "attention"), ("gpt2", "ffn"), ("gpt2", "attention"), ("phi", "ffn"),
     ("gemma", "attention"), ("gpt_oss", "attention"), ("deepseek_v3", "attention"), ("granitemoe", "attention"),
     ("olmoe", "attention"), ("qwen3_moe", "attention"), ("deepseek_v2", "attention")],
)  # fmt: skip
def test_baked_equals_a_hook_at_all_positions(family, part, scratch):
    extra = (("sliding_window", None),) if family == "mistral" else ()
    checkpoint = granite(scratch) if family == "granite" else em.opened(family, *extra)[0]
    made = steer.bake(checkpoint, 1, SHIFT, part=part)
    result = em.saved(made.view, checkpoint, scratch / "out")
    expected = em.logits(hooked(checkpoint, 1, part, SHIFT))
    assert (em.logits(result) - expected).abs().max() < 3e-6 * expected.abs().max()
    assert (em.logits(em.stock(checkpoint.folder)) - expected).abs().max() > 1e-2
    assert made.relabelled == (family if family in steer.RELABELLED else "")


@pytest.mark.parametrize("family", ["qwen2", "mistral"])
def test_relabelled_without_shift_is_the_same_model(family, scratch):
    checkpoint = em.opened(family, ("sliding_window", None))[0]
    made = steer.bake(checkpoint, 0, np.zeros(32))
    result = em.saved(made.view, checkpoint, scratch / "out")
    assert type(result).__name__ == "LlamaForCausalLM"
    assert (em.logits(result) - em.logits(em.stock(checkpoint.folder))).abs().max() == 0.0


def test_a_shift_is_added_to_a_bias_that_exists(scratch):
    checkpoint, _ = em.opened("llama", ("mlp_bias", True))
    made = steer.bake(checkpoint, 2, SHIFT)
    name = "model.layers.2.mlp.down_proj.bias"
    assert made.view.changed() == [name]
    np.testing.assert_allclose(em.tensor(made.view, name), em.tensor(checkpoint, name) + SHIFT, atol=1e-6)


def test_every_other_new_bias_is_zero():
    checkpoint, _ = em.opened("llama")
    made = steer.bake(checkpoint, 1, SHIFT)
    assert len(made.zeros) == 8 and made.bias == "model.layers.1.mlp.down_proj.bias"
    assert all(not em.tensor(made.view, name).any() for name in made.zeros)


def biases_and_weights(family, flags):
    """Names of a stock layer's biases, and of its weights, without their endings."""
    options = {**DECODER, "head_dim": 8, **flags}
    if family == "gpt_oss":
        options["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4}
    config = CONFIG_MAPPING[family](**options)
    with torch.device("meta"):
        model = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._from_config(config)
    names = [n for n, _ in blocks(model)[1].named_parameters()]
    return tuple({n.removesuffix(e) for n in names if n.endswith(e)} for e in (".bias", ".weight"))


def test_table_agrees_with_the_library():
    """A flag brings exactly the biases that are written for it; what is always there needs none."""
    for family, room in steer.ROOM.items():
        for part, flag in (("attention", room.attention), ("ffn", room.ffn)):
            if flag is None:
                continue
            flags = {} if flag == steer.ALWAYS else {flag: True}
            biases, weights = biases_and_weights(family, flags)
            assert biases & set(steer._TARGETS[part]), (family, part)
            if flags:
                brought = biases - biases_and_weights(family, {flag: False})[0]
                assert brought == {n for n in weights if re.fullmatch(steer._MODULES[flag], n)}, (
                    family,
                    flag,
                )


@pytest.mark.parametrize(
    ("family", "extra", "part", "message"),
    [
        ("qwen3", (), "ffn", "qwen3 class has no bias"),
        ("gemma2", (), "attention", "gemma2 class has no bias"),
        ("phi3", (), "ffn", "phi3 class has no bias"),
        ("mistral", (("sliding_window", 8),), "ffn", "uses a sliding window"),
        ("qwen2", (("use_sliding_window", True), ("sliding_window", 8), ("max_window_layers", 1)), "ffn", "uses a sliding window"),
        ("qwen2", (("num_attention_heads", 6), ("head_dim", 8)), "ffn", "not a multiple of its heads"),
    ],
)  # fmt: skip
def test_classes_without_room(family, extra, part, message):
    checkpoint, _ = em.opened(family, *extra)
    with pytest.raises(InputError, match=message) as caught:
        steer.bake(checkpoint, 1, SHIFT, part=part)
    assert caught.value.code == "E418" and "--control-vector" in (caught.value.help or "")


def test_other_refusals():
    checkpoint, _ = em.opened("qwen2")
    with pytest.raises(InputError, match="--relabel never"):
        steer.bake(checkpoint, 1, SHIFT, relabel=False)
    llama, _ = em.opened("llama")
    with pytest.raises(UsageError, match="no layer 7"):
        steer.bake(llama, 7, SHIFT)
    with pytest.raises(UsageError, match="not finite"):
        steer.bake(llama, 1, SHIFT * np.nan)


def prompts(count=4, length=12):
    drawn = np.random.default_rng(1)
    return [drawn.integers(3, 67, length) for _ in range(count)]


def test_divergence_equals_the_library():
    checkpoint, _ = em.opened("llama")
    view = steer.bake(checkpoint, 1, 0.1 * SHIFT).view
    settings, samples = Settings(), prompts()
    found = strength.divergence(
        Head(view, settings), Head(checkpoint, settings), strength.states(view, samples, settings),
        strength.states(checkpoint, samples, settings),
    )  # fmt: skip
    ids = torch.from_numpy(np.stack(samples))
    with torch.no_grad():
        p = hooked(checkpoint, 1, "ffn", 0.1 * SHIFT)(ids).logits.double().log_softmax(-1)
        q = em.stock(checkpoint.folder)(ids).logits.double().log_softmax(-1)
    assert found == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)


def test_gamma_meets_its_budget_and_small_gammas_are_quadratic():
    checkpoint, _ = em.opened("llama")
    settings, samples = Settings(), prompts()

    def steered(gamma):
        return steer.bake(checkpoint, 1, gamma * SHIFT).view

    plain = strength.states(checkpoint, samples, settings)
    head = Head(checkpoint, settings)
    gammas = np.array([0.005, 0.01, 0.015, 0.02])
    kls = np.array([
        strength.divergence(Head(steered(g), settings), head, strength.states(steered(g), samples, settings), plain)
        for g in gammas
    ])  # fmt: skip
    a = (kls * gammas**2).sum() / (gammas**4).sum()
    assert 1 - ((kls - a * gammas**2) ** 2).sum() / ((kls - kls.mean()) ** 2).sum() > 0.99
    for budget in (0.001, 0.05):
        fit = strength.fit_gamma(checkpoint, steered, samples, settings, budget=budget, start=0.01)
        assert fit.measured[-1][0] == fit.gamma
        assert fit.measured[-1][1] == pytest.approx(budget, rel=0.1)
        assert fit.coefficient == pytest.approx(a, rel=0.05)
    with pytest.raises(UsageError, match="budget"):
        strength.fit_gamma(checkpoint, steered, samples, settings, budget=0, start=0.01)


def test_sign_finds_the_side_of_the_short_responses():
    """Short responses consist of one token, long ones of another: the shift towards the first one's row shortens."""
    checkpoint, _ = em.opened("llama")
    rows = em.tensor(checkpoint, "lm_head.weight")
    norm = em.tensor(checkpoint, "model.norm.weight")
    towards = norm * (rows[20] - rows[40])
    short = [Example(np.array([5, 9, i, 20, 20, 20]), 3) for i in range(10, 18)]
    long = [Example(np.array([5, 9, i, 40, 40, 40, 40, 40, 40]), 3) for i in range(10, 18)]
    for planted in (1.0, -1.0):

        def steered(gamma, planted=planted):
            return steer.bake(checkpoint, 2, gamma * planted * towards).view

        sign, margins = strength.shortening_sign(steered, 0.5, long, short, Settings())
        assert sign == planted and (margins["plus"] - margins["minus"]) * planted > 0.1


def test_margin_equals_the_library():
    checkpoint, _ = em.opened("llama")
    drawn = np.random.default_rng(2)
    long = [Example(drawn.integers(3, 67, 12), 4), Example(drawn.integers(3, 67, 9), 2)]
    short = [Example(drawn.integers(3, 67, 7), 3)]
    model = em.stock(checkpoint.folder)

    def mean(e):
        ids = torch.from_numpy(e.ids)
        with torch.no_grad():
            scores = model(ids[None]).logits[0].log_softmax(-1)
        return float(scores[torch.arange(e.answer_start - 1, len(ids) - 1), ids[e.answer_start :]].mean())

    expected = mean(short[0]) - (mean(long[0]) + mean(long[1])) / 2
    assert strength.margin(checkpoint, long, short, Settings()) == pytest.approx(expected, rel=1e-5)


def test_control_vector_file(scratch):
    gguf = pytest.importorskip("gguf")
    path = scratch / "v.gguf"
    control_vector.write(path, {2: SHIFT, 1: 2 * SHIFT}, "llama")
    reader = gguf.GGUFReader(path)
    found = {t.name: np.array(t.data) for t in reader.tensors}
    assert set(found) == {"direction.1", "direction.2"} and found["direction.2"].dtype == np.float32
    np.testing.assert_array_equal(found["direction.2"], SHIFT.astype(np.float32))
    assert bytes(reader.fields["general.architecture"].parts[-1]).decode() == "controlvector"
    assert int(reader.fields["controlvector.layer_count"].parts[-1][0]) == 2
    for vectors, name, message in [
        ({0: SHIFT}, "v.gguf", "not of layer 0"),
        ({1: SHIFT}, "v.bin", "does not end"),
    ]:
        with pytest.raises(UsageError, match=message):
            control_vector.write(scratch / name, vectors, "llama")
