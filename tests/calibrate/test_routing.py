"""What a pass shows of routing, against routers written again in plain Python and experts run token by token."""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experts"))
import routing_oracle as oracle
from expert_models import EXPERTS, HIDDEN, moe_folder

from surgeon import architectures
from surgeon.calibrate.routing import Together, route
from surgeon.calibrate.settings import Settings
from surgeon.checkpoint.checkpoint import open_path
from surgeon.errors import InputError
from surgeon.structure.experts.find import experts_of

QUICK = (
    "mixtral",
    "qwen2_moe",
    "granitemoe",
    "gpt_oss",
    "deepseek_v2",
    "deepseek_v3",
    "minimax",
    "minimax_m2",
    "phimoe",
    "ernie4_5_moe",
)
"""One of each kind of router, branch and stream."""
OTHERS = tuple(family for family in oracle.ROUTERS if family not in QUICK and family in architectures.known())
BATCHED = Settings(threads=1, batch_tokens=64)


def texts(lengths=(13, 14, 14, 5, 9)):
    drawn = np.random.default_rng(3)
    return [drawn.integers(3, 67, length) for length in lengths]


class Everything:
    """Keeps all batches."""

    identity = "everything"

    def __init__(self, logits=True, sums=True):
        self.wants_logits, self.wants_sums = logits, sums
        self.batches = []
        self.sums = {}

    def routed(self, batch):
        streams = {"residual": batch.residual.clone(), "update": batch.update.clone()}
        self.batches.append(dataclasses.replace(batch, **streams))

    def expert_sums(self, layer, sums):
        assert layer not in self.sums
        self.sums[layer] = sums

    def tokens(self):
        """Return (layer, sample, position) -> the values of one token."""
        found = {}
        for batch in self.batches:
            for row in range(len(batch.samples)):
                key = (batch.layer, int(batch.samples[row]), int(batch.positions[row]))
                assert key not in found
                found[key] = {
                    field.name: value[row].double().numpy()
                    for field in dataclasses.fields(batch)
                    if isinstance(value := getattr(batch, field.name), torch.Tensor)
                }
        return found


def shown(family, samples, settings=BATCHED, *, storage="hub", **options):
    checkpoint = open_path(moe_folder(family, storage=storage))
    found = Everything(**options)
    depth = route(checkpoint, samples, settings, found, experts=experts_of(checkpoint))
    assert checkpoint.config is not None and depth == checkpoint.config.get("num_hidden_layers", depth)
    return found


@functools.cache
def expected(family):
    return oracle.routing(family, texts())


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    "family", [*QUICK, *(pytest.param(family, marks=pytest.mark.slow) for family in OTHERS)]
)
def test_equals_plain_routing(family, stream):
    found = shown(family, texts(), dataclasses.replace(BATCHED, stream_experts=stream))
    tokens = found.tokens()
    wanted = {
        (layer, sample, position): choice
        for sample, layers in enumerate(expected(family))
        for layer, choices in layers.items()
        for position, choice in enumerate(choices)
    }
    assert tokens.keys() == wanted.keys()
    sums = {layer: np.zeros(value.shape) for layer, value in found.sums.items()}
    used = set()
    for key, choice in wanted.items():
        row = tokens[key]
        ids = row["index"].astype(int).tolist()
        assert sorted(ids) == sorted(choice.chosen), key
        used.update(ids)
        for slot, expert in enumerate(ids):
            assert row["weights"][slot] == pytest.approx(choice.chosen[expert], rel=1e-5)
            assert row["norms"][slot] == pytest.approx(choice.norms[expert], rel=1e-5)
            assert row["peaks"][slot] == pytest.approx(choice.peaks[expert], rel=1e-5)
            sums[key[0]][expert] += choice.outputs[expert]
        length = np.linalg.norm(row["residual"])
        np.testing.assert_allclose(row["residual"] / length, choice.stream, atol=2e-6)
        np.testing.assert_allclose(row["update"] / length, choice.update, atol=1e-5)
        np.testing.assert_allclose(row["logits"], choice.logits, rtol=1e-5, atol=1e-5)
    assert len(used) == EXPERTS  # a wrong order of experts would show
    assert all(batch.separable for batch in found.batches)
    for layer, total in sums.items():
        np.testing.assert_allclose(found.sums[layer].numpy(), total, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_experts_narrower_than_the_stream(stream):
    """Nemotron-H may project states down before the experts and their sum up again: the update is what comes out."""
    checkpoint = open_path(moe_folder("nemotron_h", moe_latent_size=16))
    found = Everything()
    settings = dataclasses.replace(BATCHED, stream_experts=stream)
    route(checkpoint, texts(), settings, found, experts=experts_of(checkpoint))
    tokens = found.tokens()
    for sample, layers in enumerate(oracle.routing("nemotron_h", texts(), moe_latent_size=16)):
        for layer, choices in layers.items():
            assert found.sums[layer].shape == (EXPERTS, 16)
            for position, choice in enumerate(choices):
                row = tokens[layer, sample, position]
                length = np.linalg.norm(row["residual"])
                np.testing.assert_allclose(row["update"] / length, choice.update, atol=1e-5)
                for slot, expert in enumerate(row["index"].astype(int)):
                    assert row["norms"][slot] == pytest.approx(choice.norms[expert], rel=1e-5)


def test_a_router_with_a_correction_chooses_others_than_its_logits_say():
    """Scores from softmax and top-k over logits, as published code has them, would be of experts that were not used."""
    choices = [c for layers in expected("deepseek_v3") for layer in layers.values() for c in layer]
    naive = [oracle.softmax_renormalised(c.logits, 2, None, None) for c in choices]
    others = sum(set(a) != set(c.chosen) for a, c in zip(naive, choices, strict=True))
    assert others > len(choices) // 10
    shown_ids = {
        key: set(row["index"].astype(int)) for key, row in shown("deepseek_v3", texts()).tokens().items()
    }
    flat = {
        (layer, sample, position): set(choice.chosen)
        for sample, layers in enumerate(expected("deepseek_v3"))
        for layer, listed in layers.items()
        for position, choice in enumerate(listed)
    }
    assert shown_ids == flat


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_batches_and_padding_change_nothing(family, stream):
    found = []
    for tokens in (1, 28, 42, 64):  # one sample a batch, pairs of equal length, padded ones
        settings = Settings(threads=1, batch_tokens=tokens, stream_experts=stream)
        found.append(shown(family, texts(), settings).tokens())
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for key, row in found[0].items():
            assert (row["index"] == other[key]["index"]).all()
            for name in ("weights", "norms", "peaks", "residual", "update", "logits"):
                np.testing.assert_allclose(other[key][name], row[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_streaming_and_storage_change_no_bit(family):
    runs = [
        shown(family, texts(), dataclasses.replace(BATCHED, stream_experts=stream), storage=storage)
        for stream in (False, True)
        for storage in ("hub", "fused")
    ]
    for other in runs[1:]:
        for a, b in zip(runs[0].batches, other.batches, strict=True):
            for field in dataclasses.fields(a):
                one, two = getattr(a, field.name), getattr(b, field.name)
                assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two, field.name
        # Sums of padded batches add up in the order batches come, which is the same; experts one by one as well.
        assert all(torch.equal(runs[0].sums[layer], other.sums[layer]) for layer in runs[0].sums)


def test_what_is_not_asked_for_is_not_there():
    found = shown("mixtral", texts((6,)), logits=False, sums=False)
    assert all(batch.logits is None for batch in found.batches) and not found.sums


def test_experts_read_one_by_one_in_several_groups(monkeypatch):
    from surgeon.calibrate.streaming import MemoryPlan

    plain = shown("qwen2_moe", texts(), dataclasses.replace(BATCHED, stream_experts=True)).tokens()
    plan = MemoryPlan.of
    monkeypatch.setattr(MemoryPlan, "of", lambda *given: dataclasses.replace(plan(*given), group_tokens=20))
    grouped = shown("qwen2_moe", texts(), dataclasses.replace(BATCHED, stream_experts=True)).tokens()
    assert plain.keys() == grouped.keys()
    for key, row in plain.items():
        assert all((row[name] == grouped[key][name]).all() for name in row)


def test_a_slot_that_was_not_routed_counts_nowhere(monkeypatch):
    """Expert-parallel runs put the number of experts where another machine computes."""
    from surgeon.calibrate import experts

    plain = experts.run_experts

    def some_elsewhere(module, hidden, index, weights):
        index = index.clone()
        index[:, 1] = module.num_experts
        return plain(module, hidden, index, weights)

    monkeypatch.setitem(experts.ALL_EXPERTS_FUNCTIONS._global_mapping, experts.NAME, some_elsewhere)
    found = shown("mixtral", texts((9,)))
    for batch in found.batches:
        assert (batch.index[:, 1] == EXPERTS).all() and (batch.index[:, 0] < EXPERTS).all()
        assert not batch.weights[:, 1].any() and not batch.norms[:, 1].any() and not batch.peaks[:, 1].any()
        assert batch.weights[:, 0].all() and batch.norms[:, 0].all()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_outputs_are_not_kept(stream):
    """Norms, peaks and one batch's stream are all that stays; no tensor [tokens, experts, hidden] and no list of outputs."""
    found = shown("mixtral", texts(), dataclasses.replace(BATCHED, stream_experts=stream), sums=False)
    for batch in found.batches:
        held = sum(
            value.numel()
            for field in dataclasses.fields(batch)
            if isinstance(value := getattr(batch, field.name), torch.Tensor)
        )
        assert held == len(batch.samples) * (2 + 4 * 2 + 2 * HIDDEN + EXPERTS)


def test_damaged_weights_are_reported_with_their_place():
    checkpoint = open_path(moe_folder("mixtral"))
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    info = checkpoint.tensors[name]

    class Damaged:
        label, folder, config, headers = "it", checkpoint.folder, checkpoint.config, checkpoint.headers
        tensors = checkpoint.tensors
        granularity = checkpoint.granularity

        def read(self, wanted, start, stop):
            value = checkpoint.read(wanted, start, stop)
            return np.full_like(value, np.nan) if wanted == name else value

    assert info.elements
    with pytest.raises(InputError) as caught:
        route(Damaged(), texts(), BATCHED, Everything(), experts=experts_of(checkpoint))
    assert caught.value.code == "E430" and "layer 1, sample" in caught.value.message
    row = next(
        (sample, position)
        for sample in (1, 2, 0, 4, 3)  # longest first
        for position, choice in enumerate(expected("mixtral")[sample][1])
        if 3 in choice.chosen
    )
    assert f"sample {row[0]}, token {row[1]}" in caught.value.message


@pytest.mark.parametrize(
    ("taps", "said"),
    [
        ({"norm": "input_layernorm"}, "is not given what input_layernorm returns"),
        ({"norm": "no_such_norm"}, "no module no_such_norm"),
        ({"block": "self_attn"}, "not inside self_attn"),
        ({"normalised": True}, "no norm follows"),
    ],
)
def test_a_record_that_does_not_fit_the_model_is_refused(taps, said):
    checkpoint = open_path(moe_folder("mixtral"))
    found = experts_of(checkpoint)
    record = found.record.model_copy(update={"taps": found.record.taps.model_copy(update=taps)})
    with pytest.raises(InputError) as caught:
        route(
            checkpoint, texts((5,)), BATCHED, Everything(), experts=dataclasses.replace(found, record=record)
        )
    assert caught.value.code == "E406" and said in caught.value.message


def test_a_norm_behind_the_block_makes_the_update_the_whole_contribution(monkeypatch):
    """No family with such a norm runs here yet; Mixtral gets one."""
    from transformers.models.mixtral import modeling_mixtral

    stock = modeling_mixtral.MixtralDecoderLayer

    class Sandwich(stock):
        def __init__(self, config, layer_idx):
            super().__init__(config, layer_idx)
            self.behind = torch.nn.RMSNorm(config.hidden_size, elementwise_affine=False)

        def forward(self, hidden_states, **kwargs):
            mixed, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
            hidden_states = hidden_states + mixed
            return hidden_states + self.behind(self.mlp(self.post_attention_layernorm(hidden_states)))

    monkeypatch.setattr(modeling_mixtral, "MixtralDecoderLayer", Sandwich)
    checkpoint = open_path(moe_folder("mixtral"))
    found = experts_of(checkpoint)
    with pytest.raises(InputError) as caught:
        route(checkpoint, texts((5,)), BATCHED, Everything(), experts=found)
    assert caught.value.code == "E406" and "does not go straight to the stream" in caught.value.message
    taps = found.record.taps.model_copy(update={"normalised": True})
    normed = dataclasses.replace(found, record=found.record.model_copy(update={"taps": taps}))
    for stream in (False, True):
        observer = Everything()
        route(
            checkpoint,
            texts((5, 7)),
            dataclasses.replace(BATCHED, stream_experts=stream),
            observer,
            experts=normed,
        )
        for batch in observer.batches:
            assert not batch.separable
            rms = batch.update.square().mean(-1).sqrt()
            torch.testing.assert_close(rms, torch.ones_like(rms), rtol=1e-3, atol=1e-3)


def test_several_observers_see_the_same():
    checkpoint = open_path(moe_folder("mixtral"))
    one, two = Everything(), Everything(logits=False, sums=False)
    route(checkpoint, texts(), BATCHED, Together(one, two), experts=experts_of(checkpoint))
    assert len(one.batches) == len(two.batches) and one.sums and not two.sums
    assert all(a.index is b.index for a, b in zip(one.batches, two.batches, strict=True))
