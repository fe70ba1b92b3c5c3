"""Layouts of channel widths against exhaustive search and plain sorting, zero padding on the library's expert code, sizes."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "structure"))
from expert_cuts import folder_of, logits, opened, stock, write

from surgeon.checkpoint.checkpoint import open_path
from surgeon.errors import InputError, UsageError
from surgeon.prune.experts.heapr import ChannelScores, channel_scores
from surgeon.prune.experts.widths import (
    channel_parameters,
    choose,
    sparsity_of_total,
    width_for,
)
from surgeon.structure.experts.find import experts_of
from surgeon.structure.experts.parts import ExpertLayer, Experts
from surgeon.structure.experts.view import ExpertView


def made_up(layers: int, count: int, width: int) -> Experts:
    """Experts of no model; a choice asks only for numbers."""
    made = tuple(ExpertLayer(n, True, "", "fused", count, ()) for n in range(layers))
    nothing: Any = None
    return Experts(nothing, "", made, count, 1, width, 1, 1, 8)


def scored(values: np.ndarray) -> ChannelScores:
    """Scores [layers, experts, width] as they are: mean a^2 is twice the score, gradients are 1."""
    layers, count, width = values.shape
    places, n = list(itertools.product(range(layers), range(count))), 64
    ones = {p: np.full(width, float(n)) for p in places}
    return ChannelScores(
        "heapr", {}, width, n, tokens=dict.fromkeys(places, n), a2={p: 2 * n * values[p] for p in places}, g2=ones,
        joint=ones, norm2=ones,
    )  # fmt: skip


def kept(found, experts):
    """Return (layer, expert) -> kept channels, full ones included."""
    everything = tuple(range(experts.width))
    return {
        (layer.index, e): found.cut.channels.get((layer.index, e), everything)
        for layer in experts.layers
        for e in range(layer.count)
    }


def random_scores(layers, count, width, seed=0):
    return np.random.default_rng(seed).exponential(size=(layers, count, width)) ** 3


# ------------------------------------------------------------------------------------------ uniform


@pytest.mark.parametrize(
    ("sparsity", "round_to", "width"),
    [
        (0.1, 8, 56),
        (0.2, 8, 48),
        (0.2, 1, 48),
        (0.5, 8, 32),
        (0.25, 32, 64),
        (0.01, 1, 60),
        (0.99, 4, 4),
        (0.2, 12, 48),
    ],
)
def test_uniform_widths_round_up_and_every_expert_keeps_its_best(sparsity, round_to, width):
    experts, values = made_up(2, 3, 60), random_scores(2, 3, 60)
    if width >= 60:
        with pytest.raises(InputError, match=rf"E437.*rounded up to a multiple of {round_to}"):
            choose(scored(values), experts, sparsity=sparsity, round_to=round_to)
        return
    found = choose(scored(values), experts, sparsity=sparsity, round_to=round_to)
    assert found.cut.width is None and found.refusal is None
    assert found.stored == {0: width, 1: width}
    assert found.removed == found.saved == pytest.approx(1 - width / 60)
    for (layer, expert), ids in kept(found, experts).items():
        best = sorted(sorted(range(60), key=lambda k: -values[layer, expert, k])[:width])
        assert list(ids) == best


def test_the_automatic_multiple_follows_the_width():
    for width, sparsity, expected in ((1408, 0.25, 1152), (768, 0.3, 640), (256, 0.3, 192), (60, 0.3, 48)):
        found = choose(scored(random_scores(1, 2, width)), made_up(1, 2, width), sparsity=sparsity)
        assert found.stored == {0: expected}


def test_a_width_may_be_given_and_equal_scores_keep_the_lower_channels():
    experts = made_up(1, 2, 6)
    values = np.array([[[1, 2, 1, 2, 1, 2], [0, 0, 0, 0, 0, 0]]], dtype=float)
    found = choose(scored(values), experts, width=4, round_to=1)
    assert found.cut.channels == {(0, 0): (0, 1, 3, 5), (0, 1): (0, 1, 2, 3)}


def test_protected_experts_are_narrowed_in_the_uniform_layout_and_that_is_said():
    experts, values = made_up(2, 3, 16), random_scores(2, 3, 16)
    plain = choose(scored(values), experts, sparsity=0.5)
    found = choose(scored(values), experts, sparsity=0.5, protected={1: [0, 2]})
    assert found.cut == plain.cut
    assert "2 protected experts are narrowed to 8 channels" in found.notes[0] and not plain.notes


# ---------------------------------------------------------------------------------------- per layer


def test_per_layer_widths_cost_as_little_as_the_best_of_all_combinations():
    """200 random instances, 3 layers of 2 experts, 4 levels of 2 channels each; every combination is tried."""
    drawn = np.random.default_rng(7)
    for instance in range(200):
        values = drawn.exponential(size=(3, 2, 8)) ** drawn.uniform(0.5, 4)
        values[drawn.integers(3)] *= drawn.uniform(0.01, 100)
        sparsity = float(drawn.uniform(0.05, 0.74))
        experts = made_up(3, 2, 8)
        found = choose(scored(values), experts, sparsity=sparsity, layout="per-layer", round_to=2)

        def cost(widths, values=values):
            return sum(
                np.sort(values[layer, e])[: 8 - w].sum() for layer, w in enumerate(widths) for e in range(2)
            )

        allowed = [
            w for w in itertools.product((8, 6, 4, 2), repeat=3) if 2 * sum(w) <= (1 - sparsity) * 48 + 1e-9
        ]
        best = min(map(cost, allowed))
        chosen = tuple(int(found.stored[layer]) for layer in range(3))
        assert chosen in allowed, instance
        assert cost(chosen) == pytest.approx(best, rel=1e-9, abs=1e-15), (instance, chosen)
        for (layer, expert), ids in kept(found, experts).items():
            assert len(ids) == chosen[layer]
            assert values[layer, expert][list(ids)].sum() == pytest.approx(np.sort(values[layer, expert])[8 - len(ids) :].sum())  # fmt: skip
        assert found.refusal is not None and "no reader" in found.refusal


def test_per_layer_widths_are_exact_where_the_whole_is_no_multiple():
    values = random_scores(3, 2, 10, seed=3)
    experts = made_up(3, 2, 10)
    found = choose(scored(values), experts, sparsity=0.37, layout="per-layer", round_to=4)
    levels = (10, 8, 4)

    def cost(widths):
        return sum(
            np.sort(values[layer, e])[: 10 - w].sum() for layer, w in enumerate(widths) for e in range(2)
        )

    allowed = [w for w in itertools.product(levels, repeat=3) if 2 * sum(w) <= 0.63 * 60]
    assert cost(tuple(int(found.stored[n]) for n in range(3))) == pytest.approx(
        min(map(cost, allowed)), rel=1e-9
    )


def test_layers_with_protected_experts_keep_their_width_or_it_is_refused():
    experts, values = made_up(3, 2, 8), random_scores(3, 2, 8)
    values[1] *= 1e-6  # the layer that would go first
    found = choose(scored(values), experts, sparsity=0.3, layout="per-layer", round_to=2, protected={1: [0]})
    assert found.stored[1] == 8 and found.removed >= 0.3
    with pytest.raises(InputError, match=r"E437.*2 of 3 layers have protected experts"):
        choose(
            scored(values), experts, sparsity=0.4, layout="per-layer", round_to=2, protected={1: [0], 2: [1]}
        )


# --------------------------------------------------------------------------------- ragged and padded


@pytest.mark.parametrize("scope", ["global", "per-layer", "per-expert"])
def test_ragged_channels_are_those_of_a_plain_sort(scope):
    values = np.round(random_scores(3, 4, 12), 1)  # with many equal scores
    experts = made_up(3, 4, 12)
    found = choose(scored(values), experts, sparsity=0.3, layout="ragged", scope=scope, min_width=1)
    group = {"global": lambda p: 0, "per-layer": lambda p: p[0], "per-expert": lambda p: p[:2]}[scope]
    everything = list(np.ndindex(3, 4, 12))
    expected = set(everything)
    for key in {group(place) for place in everything}:
        members = [place for place in everything if group(place) == key]
        best = {max((p for p in members if p[:2] == e), key=lambda p: (values[p], tuple(-n for n in p))) for e in {p[:2] for p in members}}  # fmt: skip
        going = sorted((p for p in members if p not in best), key=lambda p: (values[p], tuple(-n for n in p)))
        expected -= set(going[: int(0.3 * len(members) + 1e-9)])
    assert {(*place, k) for place, ids in kept(found, experts).items() for k in ids} == expected
    assert found.removed == found.saved == pytest.approx(1 - len(expected) / 144)
    assert found.cut.width is None and "evaluated" in (found.refusal or "")


def test_every_expert_keeps_its_least_channels_and_experts_at_it_are_counted():
    values = random_scores(2, 4, 32)
    values[0, 1] = 0  # as of an expert without tokens
    experts = made_up(2, 4, 32)
    found = choose(scored(values), experts, sparsity=0.4, layout="ragged")
    sizes = {place: len(ids) for place, ids in kept(found, experts).items()}
    assert sizes[0, 1] == 8 and sum(sizes.values()) == 256 - int(0.4 * 256)
    assert any(note.startswith("1 expert stays with the least of 8 channels") for note in found.notes)


def test_protected_experts_keep_everything_where_widths_are_free():
    values = random_scores(2, 4, 16)
    values[1, 3] *= 1e-9
    experts = made_up(2, 4, 16)
    found = choose(scored(values), experts, sparsity=0.4, layout="ragged", protected={1: {3}})
    assert (1, 3) not in found.cut.channels and found.removed == pytest.approx(51 / 128)
    with pytest.raises(InputError, match=r"E437.*only 8 may"):
        choose(scored(values), experts, sparsity=0.4, layout="ragged", protected={0: range(4), 1: range(3)})


def test_padded_widths_are_the_ragged_ones_stored_at_the_widest():
    values = random_scores(2, 4, 32)
    values[0, 0] = values[1, 2] = 50  # two experts that would keep all
    values[0, 0, 20:] = values[1, 2, 18:] = 0
    experts = made_up(2, 4, 32)
    ragged = choose(scored(values), experts, sparsity=0.5, layout="ragged", min_width=1)
    padded = choose(scored(values), experts, sparsity=0.5, layout="padded", min_width=1, round_to=4)
    assert padded.cut.channels == ragged.cut.channels and padded.refusal is None
    widest = max(len(ids) for ids in kept(ragged, experts).values())
    assert padded.cut.width == -(-widest // 4) * 4 < 32
    assert padded.removed == 0.5 and padded.saved == pytest.approx(1 - padded.cut.width / 32)
    assert "the uniform layout of that width keeps more" in padded.notes[-1]
    full = choose(scored(values), experts, sparsity=0.5, layout="padded", protected={0: [1]})
    assert full.cut.width == 32 and full.saved == 0
    assert "no smaller, because protected experts keep all channels" in full.notes[-1]


def test_experts_of_layers_that_do_not_run_are_narrowed_by_their_weights():
    base = made_up(2, 2, 16)
    extra = ExpertLayer(2, False, "", "fused", 2, ())
    experts = dataclasses.replace(base, layers=(*base.layers, extra))
    scores = scored(random_scores(2, 2, 16))
    weights = np.random.default_rng(3).random((2, 16))
    scores.unmeasured = {(2, e): weights[e] for e in range(2)}
    found = choose(scores, experts, sparsity=0.5)
    for expert in range(2):
        assert found.cut.channels[2, expert] == tuple(sorted(np.argsort(-weights[expert])[:8]))
    assert "1 layer that predicts further tokens" in found.notes[-1]
    assert found.removed == 0.5
    left_out = choose(scores, experts, sparsity=0.5, without=(2,))
    assert left_out.cut.without == (2,) and not any(layer == 2 for layer, _ in left_out.cut.channels)
    scores.unmeasured = {}
    with pytest.raises(InputError, match=r"E437.*layer 2 predicts further tokens"):
        choose(scores, experts, sparsity=0.5)


def test_weights_of_prediction_layers_are_read_from_the_file(tmp_path):
    from safetensors.torch import load_file, save_file

    source = folder_of("deepseek_v3")
    folder = tmp_path / "m"
    folder.mkdir()
    state = load_file(source / "model.safetensors")
    state |= {n.replace("layers.2.", "layers.3."): v.clone() for n, v in state.items() if ".layers.2." in n}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config.pop("num_mtp_layers", None)
    (folder / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    checkpoint = open_path(folder)
    experts = experts_of(checkpoint)
    found = channel_scores(checkpoint, [], None, experts, variant="random")  # type: ignore[arg-type]
    assert found.unmeasured.keys() == {(3, e) for e in range(experts.count)}
    stem = "model.layers.3.mlp.experts.4."
    up, down = state[stem + "up_proj.weight"].double(), state[stem + "down_proj.weight"].double()
    assert found.unmeasured[3, 4] == pytest.approx(
        (up.square().sum(1) * down.square().sum(0)).numpy(), rel=1e-6
    )
    view = ExpertView(checkpoint, experts, choose(found, experts, sparsity=0.5).cut)
    assert view.tensors[stem + "up_proj.weight"].shape[0] == 16  # 12, rounded up to 8s


# -------------------------------------------------------------------------------------- zero padding

ACTIVATIONS = [
    ("silu", MixtralExperts), ("gelu_pytorch_tanh", MixtralExperts), ("gelu", MixtralExperts),
    ("relu2", NemotronHExperts), ("clamped", GptOssExperts),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), ACTIVATIONS, ids=[name for name, _ in ACTIVATIONS])
def test_zero_rows_and_columns_are_exactly_no_channel(name, kind):
    """The library's own expert code in float64: padded with zeros and without the channels, no difference at all."""

    def experts(width):
        common = {"hidden_size": 8, "num_attention_heads": 2}
        if kind is MixtralExperts:
            config = transformers.MixtralConfig(**common, intermediate_size=width, num_local_experts=2, hidden_act=name)  # fmt: skip
        elif kind is NemotronHExperts:
            config = transformers.NemotronHConfig(**common, moe_intermediate_size=width, n_routed_experts=2, mlp_hidden_act=name)  # fmt: skip
        else:
            config = transformers.GptOssConfig(**common, intermediate_size=width, num_local_experts=2)
        config._experts_implementation = "eager"
        return kind(config).double()

    torch.manual_seed(0)
    narrow, padded = experts(5), experts(8)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in narrow.parameters():
            parameter.copy_(3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        for part, parameter in padded.named_parameters():
            value = getattr(narrow, part)
            parameter.zero_()
            if tuple(value.shape) == tuple(parameter.shape):  # the bias of the down projection
                parameter.copy_(value)
                continue
            axis = next(n for n in range(value.ndim) if value.shape[n] != parameter.shape[n])
            places = torch.arange(value.shape[axis])
            if value.shape[axis] == 10 and kind is not GptOssExperts:  # halves, each padded by itself
                places = torch.cat([torch.arange(5), 8 + torch.arange(5)])
            parameter.index_copy_(axis, places, value)
    x = torch.randn(16, 8, generator=generator, dtype=torch.float64)
    index = torch.arange(16).reshape(16, 1) % 2
    weights = torch.rand(16, 1, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        one, other = narrow(x, index, weights), padded(x, index, weights)
    assert one.abs().max() > 1
    assert (one - other).abs().max() <= 1e-14 * one.abs().max()
    if kind is not NemotronHExperts:
        inner = torch.zeros(1, 16, dtype=torch.float64)
        assert not padded._apply_gate(inner).any()  # the channel itself is exactly zero
    else:
        assert not padded.act_fn(torch.zeros(1, 8, dtype=torch.float64)).any()


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_padded_model_equals_the_stock_model_with_channels_masked(tmp_path, family):
    checkpoint, experts = opened(family)
    values = random_scores(3, experts.count, experts.width, seed=5)
    values[:, :, 12:] *= 1e-9  # no expert keeps all
    found = choose(scored(values), experts, sparsity=0.55, layout="padded", round_to=4, min_width=2)
    assert len({len(ids) for ids in found.cut.channels.values()}) > 3 and found.cut.width == 12
    pruned = stock(write(ExpertView(checkpoint, experts, found.cut), tmp_path / "out"))
    masked = stock(checkpoint.folder)
    downs = [p for n, p in masked.named_parameters() if n.endswith("experts.down_proj")]
    for (layer, expert), ids in found.cut.channels.items():
        gone = np.setdiff1d(np.arange(experts.width), ids)
        with torch.no_grad():
            (downs[layer][expert] if family == "gpt_oss" else downs[layer][expert].T)[gone] = 0
    expected = logits(masked)
    assert (logits(pruned) - expected).abs().max() < 1e-5 * expected.abs().max()


# ------------------------------------------------------------------------------------------- targets


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h", "deepseek_v3"])
def test_a_share_of_all_parameters_becomes_a_share_of_channels(family):
    checkpoint, experts = opened(family)
    sparsity = sparsity_of_total(0.2, checkpoint, experts)
    total = sum(info.elements for info in checkpoint.tensors.values())
    matrices = {"mixtral": 3, "gpt_oss": 3, "nemotron_h": 2, "deepseek_v3": 3}[family]
    biases = 2 if family == "gpt_oss" else 0
    each = (matrices * experts.hidden + biases) * sum(layer.count for layer in experts.layers)
    assert channel_parameters(checkpoint, experts) == each
    assert sparsity * experts.width * each == pytest.approx(0.2 * total)
    with pytest.raises(InputError, match=r"E437.*of all parameters cannot go"):
        sparsity_of_total(0.99, checkpoint, experts)


def test_the_shares_of_the_published_model():
    """DeepSeekMoE-16B: 20 % of all parameters are about 21 % of expert channels (the authors' scripts use 0.21)."""
    hidden, width, experts, layers, vocabulary = 2048, 1408, 64, 27, 102400
    channels = layers * experts * 3 * hidden * width
    rest = 2 * vocabulary * hidden + 28 * 4 * hidden**2 + 3 * hidden * 10944 + layers * 2 * 3 * hidden * width
    assert 0.2 * (channels + rest) / channels == pytest.approx(0.21, abs=0.015)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3", "qwen3_moe"])
def test_a_size_becomes_the_largest_width_that_fits_and_the_file_does(tmp_path, family):
    checkpoint, experts = opened(family)
    sizes = {}
    for width in range(4, experts.width, 4):
        ids = tuple(range(width))
        places = [(layer.index, e) for layer in experts.layers for e in range(layer.count)]
        cut = choose(scored_for(experts), experts, width=width, round_to=4).cut
        assert cut.channels.keys() == set(places) and all(len(c) == len(ids) for c in cut.channels.values())
        folder = write(ExpertView(checkpoint, experts, cut), tmp_path / str(width))
        sizes[width] = (folder / "model.safetensors").stat().st_size
    slack = 260 * len(checkpoint.tensors)  # the bound of the header is larger than the header
    for width in (8, 16):
        found = width_for(checkpoint, experts, size=sizes[width] + slack, round_to=4)
        assert sizes[found] <= sizes[width] + slack
        assert found >= width
        exact = width_for(checkpoint, experts, size=sizes[width], round_to=4)
        assert sizes[exact] <= sizes[width] and exact in (width, width - 4)
    with pytest.raises(InputError, match=r"E437.*already"):
        width_for(checkpoint, experts, size=1e9)
    with pytest.raises(InputError, match=r"E437.*4 channels the model still has"):
        width_for(checkpoint, experts, size=sizes[4] // 2, round_to=4)


def scored_for(experts):
    layers = max(layer.index for layer in experts.layers) + 1
    found = scored(random_scores(layers, experts.count, experts.width))
    wanted = {(layer.index, e) for layer in experts.layers for e in range(layer.count)}
    found.tokens = {p: n for p, n in found.tokens.items() if p in wanted}
    return found


def test_a_number_of_parameters_becomes_a_width():
    checkpoint, experts = opened("mixtral")
    total = sum(info.elements for info in checkpoint.tensors.values())
    each = channel_parameters(checkpoint, experts)
    assert width_for(checkpoint, experts, parameters=total - 8 * each, round_to=4) == experts.width - 8
    assert width_for(checkpoint, experts, parameters=total - 8 * each - 1, round_to=4) == experts.width - 12
    with pytest.raises(UsageError, match="E245"):
        width_for(checkpoint, experts)


# ------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 0.0}, {"sparsity": 1.0}, {"sparsity": -0.1}, {}, {"sparsity": 0.5, "width": 8}, {"width": 0},
        {"width": 8, "layout": "ragged"}, {"sparsity": 0.5, "layout": "raged"}, {"sparsity": 0.5, "scope": "all"},
        {"sparsity": 0.5, "layout": "ragged", "min_width": 17}, {"sparsity": 0.5, "min_width": 0},
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused(options):
    with pytest.raises(UsageError, match="E245"):
        choose(scored(random_scores(1, 2, 16)), made_up(1, 2, 16), **options)


def test_scores_of_another_model_are_refused():
    with pytest.raises(InputError, match="E436"):
        choose(scored(random_scores(1, 3, 16)), made_up(2, 3, 16), sparsity=0.5)
    with pytest.raises(InputError, match="E436"):
        choose(scored(random_scores(2, 3, 8)), made_up(2, 3, 16), sparsity=0.5)


def test_a_multiple_beyond_the_width_is_refused():
    with pytest.raises(UsageError, match="E269"):
        choose(scored(random_scores(1, 2, 16)), made_up(1, 2, 16), sparsity=0.5, round_to=32)
