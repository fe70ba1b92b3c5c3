"""Sens-Merging and FIM: closed forms, invariances, sums against brute force, and real tiny models against autograd."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest

from surgeon.checkpoint.memory import MemoryCheckpoint
from surgeon.errors import InputError, UsageError
from surgeon.merge import fim, sens
from surgeon.merge.layer_groups import aliases, group_of, layer_scores

sys.path.insert(0, str(Path(__file__).parents[1] / "architectures"))
import tiny_models

# ------------------------------------------------------------------------------------------ Sens: closed forms


def test_alpha_is_each_layers_share_of_the_l2_norm():
    assert sens.normalised({0: 3.0, 1: 4.0}) == {0: 0.6, 1: 0.8}


def test_alpha_does_not_depend_on_the_scale_of_a_models_loss():
    sums = {0: 0.3, 1: 1.7, "model.norm": 0.02}
    scaled = {group: 1e4 * value for group, value in sums.items()}
    assert sens.normalised(scaled) == pytest.approx(sens.normalised(sums), rel=1e-12)


def test_alpha_of_a_model_without_any_gradient_is_zero():
    assert sens.normalised({0: 0.0, 1: 0.0}) == {0: 0.0, 1: 0.0}


def test_transfer_prefers_the_model_whose_logits_are_closer():
    assert sens.transfer_weights([1.0, 3.0]) == pytest.approx((0.75, 0.25))
    assert sens.transfer_weights([1.0, 3.0], "farther") == pytest.approx((0.25, 0.75))


def test_transfer_of_three_models_is_the_inverse_distance_normalised():
    assert sens.transfer_weights([1.0, 2.0, 4.0]) == pytest.approx((4 / 7, 2 / 7, 1 / 7))


@pytest.mark.parametrize("transfer", sens.TRANSFER)
def test_transfer_at_distance_zero(transfer):
    assert sens.transfer_weights([0.0, 0.0], transfer) == (0.5, 0.5)
    assert sens.transfer_weights([0.0, 2.0], transfer) == ((1.0, 0.0) if transfer == "closer" else (0.0, 1.0))


def test_factors_of_two_layers_by_hand():
    # alpha = (.6, .8) and (.8, .6); tau = (.75, .25); T = .5:
    # layer 0: exponents .9 and .4 -> sigma = 1 / (1 + e^-.5); layer 1: 1.2 and .3 -> 1 / (1 + e^-.9)
    first, second = sens.factors([{0: 0.6, 1: 0.8}, {0: 0.8, 1: 0.6}], (0.75, 0.25), 0.5)
    assert first == pytest.approx({0: 2 / (1 + math.exp(-0.5)), 1: 2 / (1 + math.exp(-0.9))}, rel=1e-14)
    assert second == pytest.approx({0: 2 / (1 + math.exp(0.5)), 1: 2 / (1 + math.exp(0.9))}, rel=1e-14)


def test_factors_sum_to_the_number_of_models_in_every_layer():
    alphas = [{0: 0.1, 1: 0.9}, {0: 0.5, 1: 0.2}, {0: 0.7, 1: 0.3}]
    found = sens.factors(alphas, (0.2, 0.5, 0.3), 0.1)
    for layer in (0, 1):
        assert math.fsum(of_model[layer] for of_model in found) == pytest.approx(3.0, rel=1e-14)


def test_a_high_temperature_is_plain_task_arithmetic():
    found = sens.factors([{0: 1.0, 1: 0.0}, {0: 0.0, 1: 1.0}], (0.9, 0.1), 1e12)
    for of_model in found:
        assert of_model == pytest.approx({0: 1.0, 1: 1.0}, abs=1e-11)


def test_a_tiny_temperature_does_not_overflow():
    first, second = sens.factors([{0: 1.0}, {0: 0.5}], (0.5, 0.5), 1e-6)
    assert (first[0], second[0]) == (2.0, 0.0)


def test_equal_models_have_equal_factors():
    alpha = {0: 0.6, 1: 0.8, "model.norm": 0.01}
    for of_model in sens.factors([alpha, dict(alpha)], (0.5, 0.5), 2.0):
        assert of_model == dict.fromkeys(of_model, 1.0)


def test_models_with_different_layers_are_refused():
    with pytest.raises(InputError, match=r"E357.*2 has a sensitivity in one model only"):
        sens.factors([{0: 1.0}, {0: 0.5, 2: 0.5}], (0.5, 0.5), 2.0)


@pytest.mark.parametrize(
    ("temperature", "transfer"), [(0.0, "closer"), (-1, "closer"), (math.nan, "closer"), (2, "close")]
)
def test_sens_settings_that_mean_nothing_are_refused(temperature, transfer):
    with pytest.raises(UsageError, match="E232"):
        sens.check(temperature, transfer)


# ------------------------------------------------------------------------------------------- FIM: closed forms


def test_two_layers_are_one_deviation_apart():
    # Whatever the values, two standardised numbers are -1 and +1.
    found = fim.strengths({0: 4e-3, 1: 1e-6}, {0: 2.0, 1: 5.0})
    assert found == pytest.approx({0: 1 / (1 + math.e), 1: math.e / (1 + math.e)}, rel=1e-12)


def test_three_layers_by_hand():
    # log scores 0, 1, 5: mean 2, variance (4 + 1 + 9) / 3
    fisher = {0: 1.0, 1: math.e, 2: math.e**2}
    found = fim.strengths(fisher, {0: 1.0, 1: 1.0, 2: math.e**3}, sharpness=2.0)
    deviation = math.sqrt(14 / 3)
    expected = {n: 1 / (1 + math.exp(2 * (score - 2) / deviation)) for n, score in enumerate((0, 1, 5))}
    assert found == pytest.approx(expected, rel=1e-12)


def test_the_opposite_direction_mirrors_every_factor():
    fisher, squares = {0: 1.0, 1: 3.0, 2: 0.1}, {0: 1.0, 1: 2.0, 2: 7.0}
    less = fim.strengths(fisher, squares)
    more = fim.strengths(fisher, squares, sensitive="more")
    assert more == pytest.approx({group: 1 - value for group, value in less.items()}, rel=1e-12)


def test_strengths_do_not_depend_on_the_scale_of_the_loss_or_of_the_task_vector():
    fisher, squares = {0: 1.0, 1: 3.0, 2: 0.1}, {0: 1.0, 1: 2.0, 2: 7.0}
    scaled = fim.strengths({g: 1e-9 * v for g, v in fisher.items()}, {g: 1e5 * v for g, v in squares.items()})
    assert scaled == pytest.approx(fim.strengths(fisher, squares), rel=1e-10)


def test_equal_layers_get_one_half():
    assert fim.strengths({0: 0.1, 1: 0.1}, {0: 0.3, 1: 0.3}) == {0: 0.5, 1: 0.5}


def test_a_part_outside_the_layers_is_placed_on_their_scale_without_moving_it():
    fisher, squares = {0: 1.0, 1: 4.0}, {0: 1.0, 1: 1.0}
    alone = fim.strengths(fisher, squares)
    found = fim.strengths({**fisher, "wte": 16.0}, {**squares, "wte": 1.0})
    assert {g: found[g] for g in (0, 1)} == alone
    # log 16 is three half-distances above the middle of log 1 and log 4
    assert found["wte"] == pytest.approx(1 / (1 + math.exp(3)), rel=1e-12)


def test_equal_or_flat_layers_are_left_out_of_the_statistics():
    found = fim.strengths({0: 1.0, 1: 4.0, 2: 0.0, 3: 5.0}, {0: 1.0, 1: 1.0, 2: 1.0, 3: 0.0})
    assert found[2] == found[3] == 1.0
    assert {g: found[g] for g in (0, 1)} == fim.strengths({0: 1.0, 1: 4.0}, {0: 1.0, 1: 1.0})


def test_random_tokens_are_a_function_of_the_seed_and_cover_the_vocabulary():
    tokens = fim.random_tokens(11, 5)
    assert tokens.shape == (8, 64)
    assert np.array_equal(tokens, fim.random_tokens(11, 5))
    assert not np.array_equal(tokens, fim.random_tokens(11, 6))
    counts = np.bincount(fim.random_tokens(10, 0, 100, 1000).ravel(), minlength=10)
    assert counts.min() > 9700 and counts.max() < 10300  # 10,000 each, three and more deviations of 95


@pytest.mark.parametrize(
    "options",
    [
        {"sensitive": "most"},
        {"sharpness": 0.0},
        {"sharpness": math.nan},
        {"gate": -1.0},
        {"length": 1},
        {"sequences": 0},
    ],
)
def test_fim_settings_that_mean_nothing_are_refused(options):
    with pytest.raises(UsageError, match="E233"):
        fim.Options(**options)


def test_a_norm_is_bounded_where_its_length_leaves_the_tolerance():
    base, delta = np.array([3.0, 4.0]), np.array([3.0, 4.0])

    def bound(alpha, change):
        return fim.norm_bound(alpha, base @ base, base @ change, change @ change, 0.05)

    assert bound(0.5, delta) == pytest.approx(0.05, rel=1e-12)  # along b: length grows by the factor itself
    assert bound(0.5, -delta) == pytest.approx(0.05, rel=1e-12)
    assert bound(0.03, delta) == 0.03  # inside the tolerance: as wanted
    across = np.array([-4.0, 3.0])  # across b: sqrt(1 + t^2) = 1.05
    assert bound(0.5, across) == pytest.approx(math.sqrt(1.05**2 - 1), rel=1e-12)
    assert bound(0.5, 0 * delta) == 0.5


def test_the_bound_of_a_norm_holds_for_every_smaller_factor():
    rng = np.random.default_rng(3)
    reached = 0
    for _ in range(300):
        base = rng.normal(size=6)
        delta = rng.normal(size=6) * rng.choice([0.02, 0.3, 3.0]) - rng.choice([0, 1.5]) * base
        found = fim.norm_bound(0.9, base @ base, base @ delta, delta @ delta, 0.05)
        steps = np.linspace(0, found, 200)[:, None]
        change = np.linalg.norm(base + steps * delta, axis=1) / np.linalg.norm(base) - 1
        assert np.abs(change).max() <= 0.05 + 1e-9
        if found < 0.9:
            reached += 1
            assert abs(change[-1]) == pytest.approx(0.05, abs=1e-9)
    assert 50 < reached < 300


# ---------------------------------------------------------------------------------------- groups and differences


def test_groups_are_layer_numbers_or_modules():
    assert group_of("model.layers.7.mlp.experts.3.w1.weight") == 7
    assert group_of("model.embed_tokens.weight") == "model.embed_tokens"
    assert group_of("lm_head.bias") == group_of("lm_head.weight") == "lm_head"


def test_scores_name_what_lies_outside_the_layers_and_its_tied_copies():
    names = ["model.embed_tokens.weight", "model.layers.0.a.weight", "model.norm.weight"]
    scores = layer_scores(
        {0: 0.5, "model.embed_tokens": 0.7},
        names,
        {"lm_head.weight": "model.embed_tokens.weight"},
        [("*.a.weight", 0.5)],
    )
    assert scores.factor("model.layers.0.a.weight") == 0.25
    assert scores.factor("model.embed_tokens.weight") == scores.factor("lm_head.weight") == 0.7
    assert scores.factor("model.norm.weight") == 1.0


def with_config(label, state, config):
    checkpoint = MemoryCheckpoint(label, state)
    checkpoint.config = config
    return checkpoint


LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "num_hidden_layers": 2,
    "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 20,
}  # fmt: skip


def llama_state(seed, tied):
    from surgeon.architectures import get

    record = get("llama")
    config = {**LLAMA, "tie_word_embeddings": tied}
    rng = np.random.default_rng(seed)
    names = {n: s.shape for n, s in record.expected(config).items() if not s.optional}
    return config, {n: rng.normal(size=shape).astype(np.float32) for n, shape in names.items()}


def test_differences_are_the_sums_over_a_plain_subtraction(monkeypatch):
    monkeypatch.setattr(fim, "BLOCK", 7)  # many blocks per tensor
    config, old = llama_state(1, tied=False)
    _, new = llama_state(2, tied=False)
    found = fim.differences(with_config("base", old, config), with_config("long", new, config))
    expected: dict = {}
    for name in old:
        square = float(((new[name].astype(np.float64) - old[name]) ** 2).sum())
        expected[group_of(name)] = expected.get(group_of(name), 0.0) + square
    assert found.squares == pytest.approx(expected, rel=1e-12)
    assert found.unmatched == 0
    name = "model.layers.1.input_layernorm.weight"
    b, d = old[name].astype(np.float64), new[name].astype(np.float64) - old[name]
    assert found.norms[name] == pytest.approx((b @ b, b @ d, d @ d), rel=1e-12)
    assert len(found.norms) == 5


@pytest.mark.parametrize(
    ("family", "module", "added"),
    [("llama", "input_layernorm", 0), ("gemma2", "input_layernorm", 1), ("qwen3_next", "input_layernorm", 1),
     ("qwen3_next", "linear_attn.norm", 0)],
)  # fmt: skip
def test_norms_that_multiply_by_one_plus_their_weight_are_measured_so(family, module, added):
    name = f"model.layers.0.{module}.weight"
    old, new = np.array([-0.5, 0.5], np.float32), np.array([-0.4, 0.2], np.float32)
    config = tiny_models.build(family).config.to_dict()
    pair = [with_config(label, {name: x}, config) for label, x in (("a", old), ("b", new))]
    assert fim.differences(*pair).norms[name][0] == pytest.approx(float(((old + added) ** 2).sum()))


def test_a_head_of_its_own_is_compared_with_the_embedding_the_base_ties_to():
    config, old = llama_state(1, tied=True)
    own, new = llama_state(2, tied=False)
    base, long = with_config("base", old, config), with_config("long", new, own)
    assert aliases(base) == {"lm_head.weight": "model.embed_tokens.weight"}
    found = fim.differences(base, long)
    delta = new["lm_head.weight"].astype(np.float64) - old["model.embed_tokens.weight"]
    assert found.squares["lm_head"] == pytest.approx(float((delta**2).sum()), rel=1e-12)


def test_a_stored_copy_of_a_tied_head_is_counted_once():
    config, old = llama_state(1, tied=True)
    _, new = llama_state(2, tied=True)
    twice = [{**state, "lm_head.weight": state["model.embed_tokens.weight"]} for state in (old, new)]
    plain = fim.differences(with_config("base", old, config), with_config("long", new, config))
    stored = fim.differences(*(with_config("m", state, config) for state in twice))
    assert stored.squares == plain.squares


def test_a_stop_ends_the_comparison():
    import threading

    from surgeon.errors import Interrupted

    config, state = llama_state(1, tied=True)
    model, stop = with_config("m", state, config), threading.Event()
    stop.set()
    with pytest.raises(Interrupted):
        fim.differences(model, model, stop)


def test_tensors_of_different_shapes_are_refused():
    base = with_config("base", {"w": np.zeros((2, 3), np.float32)}, None)
    long = with_config("long", {"w": np.zeros((3, 2), np.float32)}, None)
    with pytest.raises(InputError, match=r"E357.*w is \[3, 2\] in long but \[2, 3\] in base"):
        fim.differences(base, long)


@pytest.mark.parametrize("shape", [(), (1,), (11,), (7, 13), (3, 5, 7)])
def test_receivers_sum_in_blocks(monkeypatch, shape):
    import torch

    from surgeon.merge import layer_groups

    monkeypatch.setattr(layer_groups, "BLOCK", 9)
    generator = torch.Generator().manual_seed(1)
    weight, gradient = (torch.randn(shape, generator=generator) for _ in range(2))
    one, other = sens.SensitivityReceiver(), fim.FisherReceiver()
    for receiver in (one, other):
        for sample in range(2):
            receiver.receive(sample, "model.layers.4.x.weight", weight, gradient)
    assert one.sums == pytest.approx({4: 2 * (weight * gradient).abs().sum().item()}, rel=1e-6)
    assert other.sums == pytest.approx({4: 2 * (gradient**2).sum().item()}, rel=1e-6)


# ------------------------------------------------------------------------- measured on models, against autograd


class Text:
    """Calibration samples, as `surgeon.calibrate.data.CalibrationSet` has them."""

    def __init__(self, name, samples):
        self.samples = tuple(samples)
        self.record = {"name": name, "samples": len(self.samples)}


def some_text(name, seed, lengths, starts, vocabulary=67):
    from surgeon.calibrate.data import Sample

    rng = np.random.default_rng(seed)
    pairs = zip(lengths, starts, strict=True)
    return Text(
        name, [Sample(rng.integers(3, vocabulary, size=n), at, line=i) for i, (n, at) in enumerate(pairs, 1)]
    )


def saved_llama(folder, seed, tied, **extra):
    """Save a random two-layer llama whose weights are far from the library's initial ones."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    config = transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24,
        vocab_size=67, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=tied, **extra,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter + 0.2 * noise if parameter.ndim == 1 else 0.3 * noise)
    model.save_pretrained(folder)
    return model


def plain_backward(model, sample):
    """Return loss, and logits at the places that predict the answer."""
    import torch

    ids = torch.as_tensor(sample.ids)
    model.zero_grad()
    model.requires_grad_(True)
    first = max(sample.answer_start, 1)
    logits = model(input_ids=ids[None], use_cache=False).logits[0, first - 1 : -1]
    loss = torch.nn.functional.cross_entropy(logits, ids[first:])
    loss.backward()
    return loss.item(), logits.detach()


def plain_group(name):
    return int(name.split(".")[2]) if ".layers." in name else name.removesuffix(".weight")


@pytest.mark.parametrize("tied", [(False, False), (True, True), (True, False)])
@pytest.mark.parametrize("transfer", sens.TRANSFER)
def test_sens_equals_plain_autograd(scratch, tied, transfer):
    from surgeon.calibrate.settings import Settings
    from surgeon.checkpoint.checkpoint import open_path

    names = ("short", "long")
    plain = {
        n: saved_llama(scratch / n, seed, t) for seed, (n, t) in enumerate(zip(names, tied, strict=True))
    }
    texts = {
        "short": some_text("long answers", 1, (20, 12), (6, 3)),
        "long": some_text("short answers", 2, (9, 9, 7), (4, 0, 5)),
    }
    opened = {n: open_path(scratch / n) for n in names}
    found = sens.measure(opened, texts, Settings(threads=1), temperature=0.05, transfer=transfer)

    alphas, apart = {}, {}
    for name in names:
        sums, distances = {}, []
        other = names[1 - names.index(name)]
        for sample in texts[name].samples:
            _, logits = plain_backward(plain[name], sample)
            for parameter_name, parameter in plain[name].named_parameters():
                group = plain_group(parameter_name)
                sums[group] = sums.get(group, 0.0) + (parameter * parameter.grad).abs().sum().item()
            _, theirs = plain_backward(plain[other], sample)
            distances.append((logits - theirs).norm(dim=1).mean().item())
        means = {str(group): value / len(texts[name].samples) for group, value in sums.items()}
        assert found.made_by["sensitivity"][name] == pytest.approx(means, rel=1e-4)
        norm = math.sqrt(sum(value**2 for value in sums.values()))
        alphas[name] = {group: value / norm for group, value in sums.items()}
        if "lm_head" not in alphas[name]:
            alphas[name]["lm_head"] = alphas[name]["model.embed_tokens"]
        apart[other] = sum(distances) / len(distances)
    assert found.made_by["distance"] == pytest.approx(apart, rel=1e-5)
    share = {n: apart[n] / sum(apart.values()) for n in names}
    tau = share if transfer == "farther" else {n: 1 - share[n] for n in names}
    for parameter_name, _ in plain["long"].named_parameters():
        group = plain_group(parameter_name)
        weights = {n: math.exp(alphas[n][group] * tau[n] / 0.05) for n in names}
        for name in names:
            expected = 2 * weights[name] / sum(weights.values())
            assert found.scores[name].factor(parameter_name) == pytest.approx(expected, rel=1e-4), (
                parameter_name
            )
    for name, text in texts.items():
        losses = [plain_backward(plain[name], sample)[0] for sample in text.samples]
        assert found.made_by["loss"][name] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        assert found.made_by["calibration"][name] == text.record


def test_sens_of_a_model_with_itself_changes_nothing(scratch):
    from surgeon.calibrate.settings import Settings
    from surgeon.checkpoint.checkpoint import open_path

    saved_llama(scratch / "m", 3, tied=True)
    text = some_text("same", 4, (9, 11), (2, 5))
    found = sens.measure(
        {"a": open_path(scratch / "m"), "b": open_path(scratch / "m")},
        {"a": text, "b": text},
        Settings(threads=1),
    )
    assert found.made_by["distance"] == {"a": 0.0, "b": 0.0}
    for scores in found.scores.values():
        assert set(scores.layers.values()) == {1.0}
        assert {value for _, value in scores.tensors} == {1.0}
        assert {name for name, _ in scores.tensors} == {
            "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight",
        }  # fmt: skip


def test_sens_compares_logits_of_padded_vocabularies_over_the_common_ids(scratch):
    import torch
    import transformers

    from surgeon.calibrate.settings import Settings
    from surgeon.checkpoint.checkpoint import open_path

    model = saved_llama(scratch / "a", 3, tied=False)
    wide = transformers.LlamaForCausalLM.from_pretrained(scratch / "a")
    wide.resize_token_embeddings(80, mean_resizing=False)
    with torch.no_grad():
        wide.lm_head.weight[:67] *= 1.5
        wide.lm_head.weight[67:] = 100.0
    wide.save_pretrained(scratch / "b")
    text = some_text("same", 4, (9,), (2,))
    found = sens.measure(
        {"a": open_path(scratch / "a"), "b": open_path(scratch / "b")},
        {"a": text, "b": text},
        Settings(threads=1),
    )
    _, logits = plain_backward(model, text.samples[0])
    assert found.made_by["distance"]["a"] == pytest.approx(0.5 * logits.norm(dim=1).mean().item(), rel=1e-5)


def test_sens_needs_two_models():
    with pytest.raises(UsageError, match="E232"):
        sens.measure({"a": None}, {}, None)  # type: ignore[dict-item, arg-type]


@pytest.mark.parametrize("tied", [(False, False), (True, True), (True, False)])
def test_fim_equals_plain_autograd(scratch, tied):
    from surgeon.calibrate.data import Sample
    from surgeon.calibrate.settings import Settings
    from surgeon.checkpoint.checkpoint import open_path

    base = saved_llama(scratch / "short", 5, tied[0])
    long = saved_llama(scratch / "long", 6, tied[1])
    options = fim.Options(sequences=3, length=10, norm_tolerance=None)
    found = fim.measure(
        open_path(scratch / "short"),
        {"long": open_path(scratch / "long")},
        Settings(threads=1),
        seed=7,
        options=options,
    )
    tokens = fim.random_tokens(67, 7, 3, 10)
    sums, sizes, losses = {}, {}, []
    for ids in tokens:
        losses.append(plain_backward(base, Sample(ids, 0))[0])
        for name, parameter in base.named_parameters():
            group = plain_group(name)
            # The library drops the padding row's gradient from the input side; so does the streamed pass.
            sums[group] = sums.get(group, 0.0) + parameter.grad.square().sum().item()
    for name, parameter in base.named_parameters():
        sizes[plain_group(name)] = sizes.get(plain_group(name), 0) + parameter.numel()
    fisher = {group: value / (3 * sizes[group]) for group, value in sums.items()}
    assert found.made_by["fisher"] == pytest.approx({str(g): v for g, v in fisher.items()}, rel=1e-4)
    assert found.made_by["loss"] == pytest.approx(sum(losses) / 3, rel=1e-5)

    old, squares = dict(base.named_parameters()), {}
    for name, parameter in long.named_parameters():
        before = old.get(name, old["model.embed_tokens.weight"])
        group = plain_group(name)
        squares[group] = squares.get(group, 0.0) + (parameter - before).double().square().sum().item()
    fisher.setdefault("lm_head", fisher["model.embed_tokens"])
    logs = {group: math.log(fisher[group] * square) for group, square in squares.items()}
    mean, deviation = (logs[0] + logs[1]) / 2, abs(logs[0] - logs[1]) / 2
    for name, _ in long.named_parameters():
        expected = 1 / (1 + math.exp((logs[plain_group(name)] - mean) / deviation))
        expected *= 0.7 if "gate_proj" in name else 1.0
        assert found.scores["long"].factor(name) == pytest.approx(expected, rel=1e-4), name


def test_fisher_information_counts_experts_that_no_token_reached(scratch):
    """Their gradient is zero, so they lower the mean of their layer."""
    import torch
    import transformers

    from surgeon.calibrate.data import Sample
    from surgeon.calibrate.settings import Settings
    from surgeon.checkpoint.checkpoint import open_path

    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24,
        vocab_size=67, num_local_experts=6, num_experts_per_tok=1, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8.0 if parameter.ndim > 1 else 1.0)
    model.save_pretrained(scratch / "m")
    opened = open_path(scratch / "m")
    options = fim.Options(sequences=1, length=3)
    found = fim.measure(opened, {"m": opened}, Settings(threads=1), seed=2, options=options).made_by["fisher"]
    plain_backward(model, Sample(fim.random_tokens(67, 2, 1, 3)[0], 0))
    for layer in range(2):
        parameters = list(model.model.layers[layer].parameters())
        squares = [p.grad.square() for p in parameters]
        stacked = [s for s in squares if s.ndim == 3]
        assert stacked and all(int(s.flatten(1).any(1).sum()) <= 3 for s in stacked)  # of six
        mean = sum(s.sum().item() for s in squares) / sum(p.numel() for p in parameters)
        assert found[str(layer)] == pytest.approx(mean, rel=1e-3)


def test_fim_keeps_norms_within_five_percent(scratch):
    import torch

    from surgeon.calibrate.settings import Settings
    from surgeon.checkpoint.checkpoint import open_path

    base = dict(saved_llama(scratch / "short", 5, True).named_parameters())
    model = saved_llama(scratch / "long", 6, True)
    long = dict(model.named_parameters())
    with torch.no_grad():
        long["model.layers.0.input_layernorm.weight"].mul_(1.6)
        long["model.layers.1.post_attention_layernorm.weight"].mul_(0.5)
        long["model.norm.weight"].mul_(2.0)
    model.save_pretrained(scratch / "long")
    options = fim.Options(sequences=2, length=8)
    found = fim.measure(
        open_path(scratch / "short"),
        {"long": open_path(scratch / "long")},
        Settings(threads=1),
        options=options,
    )
    free = fim.measure(
        open_path(scratch / "short"), {"long": open_path(scratch / "long")}, Settings(threads=1),
        options=fim.Options(sequences=2, length=8, norm_tolerance=None),
    )  # fmt: skip
    bounded = found.made_by["models"]["long"]["norms_bounded"]
    assert {
        "model.layers.0.input_layernorm.weight", "model.layers.1.post_attention_layernorm.weight", "model.norm.weight",
    } <= set(bounded)  # fmt: skip
    for name in base:
        factor = found.scores["long"].factor(name)
        if "norm" in name:
            with torch.no_grad():
                change = (base[name] + factor * (long[name] - base[name])).norm() / base[name].norm() - 1
            assert abs(float(change)) <= 0.05 + 1e-6, name
        if name not in bounded:
            assert factor == free.scores["long"].factor(name)


def test_fim_of_equal_models_leaves_the_task_vector_alone(scratch):
    from surgeon.calibrate.settings import Settings
    from surgeon.checkpoint.checkpoint import open_path

    saved_llama(scratch / "m", 3, tied=True)
    same = open_path(scratch / "m")
    found = fim.measure(same, {"m": same}, Settings(threads=1), options=fim.Options(sequences=1, length=4))
    assert set(found.scores["m"].layers.values()) == {1.0}


def test_gate_factors_follow_the_familys_names():
    from surgeon.architectures import get

    def gates(family, **config):
        config = {**LLAMA, "model_type": family, "architectures": None, **config}
        record = get(family)
        shapes = {n: s.shape for n, s in record.expected(config).items() if not s.optional}
        return fim._gates(
            with_config(family, {n: np.zeros(s, np.float32) for n, s in shapes.items()}, config)
        )

    assert gates("llama") == (["*.gate_proj.weight"], False)
    assert gates("mixtral", num_local_experts=2) == (["*.w1.weight"], False)
    assert gates("phi3") == ([], True)
    assert gates("granitemoe", num_local_experts=2) == ([], True)
    assert gates("gpt2", n_embd=8, n_layer=2, n_head=2) == ([], False)


def test_layers_that_the_loss_does_not_reach_get_the_mean_factor(scratch):
    """A prediction layer behind the last one is on disk, has a task vector, and no gradient."""
    import torch
    from safetensors.torch import load_file, save_file

    from surgeon.calibrate.settings import Settings
    from surgeon.checkpoint.checkpoint import open_path

    for seed, name in ((5, "short"), (6, "long")):
        saved_llama(scratch / name, seed, True)
        file = scratch / name / "model.safetensors"
        extra = torch.full((3,), float(seed))
        save_file({**load_file(file), "model.layers.2.enorm.weight": extra}, file, {"format": "pt"})
    found = fim.measure(
        open_path(scratch / "short"), {"long": open_path(scratch / "long")}, Settings(threads=1),
        options=fim.Options(sequences=1, length=5, norm_tolerance=None),
    )  # fmt: skip
    layers = found.scores["long"].layers
    assert layers[2] == pytest.approx((layers[0] + layers[1]) / 2)


def test_scores_survive_their_file(scratch):
    from surgeon.calibrate.settings import Settings
    from surgeon.checkpoint.checkpoint import open_path
    from surgeon.merge.layer_scores import read_layer_scores, write_layer_scores

    saved_llama(scratch / "short", 5, True)
    saved_llama(scratch / "long", 6, True)
    found = fim.measure(
        open_path(scratch / "short"), {"long": open_path(scratch / "long")}, Settings(threads=1),
        options=fim.Options(sequences=1, length=5),
    )  # fmt: skip
    write_layer_scores(scratch / "scores.json", found.scores, found.made_by)
    read = read_layer_scores(scratch / "scores.json")["long"]
    for name in open_path(scratch / "long").tensors:
        assert read.factor(name) == pytest.approx(found.scores["long"].factor(name), rel=1e-15)
    assert str(scratch) not in (scratch / "scores.json").read_text()
