"""The comparison that prune and verify run: a pruned model beside its source with the same experts switched off."""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "structure"))
from expert_cuts import masked_logits, opened, stock, uneven_cut, write
from expert_models import HIDDEN, WIDTH

from surgeon import architectures
from surgeon.calibrate.head import Head
from surgeon.calibrate.settings import Settings
from surgeon.calibrate.skeleton import Skeleton
from surgeon.checkpoint.checkpoint import open_path
from surgeon.checkpoint.memory import MemoryCheckpoint
from surgeon.errors import InputError, UsageError
from surgeon.experts.masked import compare, masked_routers, masked_states
from surgeon.structure.experts.cut import ExpertCut
from surgeon.structure.experts.find import experts_of
from surgeon.structure.experts.view import ExpertView

QUICK = ("mixtral", "deepseek_v3", "gpt_oss")
FAMILIES = (
    *QUICK, "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe_text", "deepseek_v2", "olmoe", "phimoe", "granitemoe",
    "llama4_text", "glm4_moe", "ernie4_5_moe", "hunyuan_v1_moe", "minimax", "minimax_m2", "lfm2_moe", "jamba",
    "kimi_linear", "nemotron_h",
)  # fmt: skip
SETTINGS = Settings(dtype="float32", batch_tokens=64)
SAMPLES = [np.random.default_rng(n).integers(3, 67, length) for n, length in enumerate((13, 17, 17, 9))]


@pytest.fixture(autouse=True)
def _quiet():
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    yield
    transformers.utils.logging.set_verbosity(level)


def runs(family):
    return architectures.get(opened(family)[0].config["model_type"]) is not None


def wrong(experts, cut):
    """Return a cut like another one, but for one expert of the first layer."""
    layer = experts.layers[0]
    kept = list(cut.kept[layer.index])
    size = layer.count // experts.groups
    other = next(e for e in range(layer.count) if e not in kept and e // size == kept[0] // size)
    return replace(cut, kept={**cut.kept, layer.index: tuple(sorted([other, *kept[1:]]))})


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[] if f in QUICK else [pytest.mark.slow]) for f in FAMILIES]
)
def test_no_bit_differs_and_a_wrong_expert_shows(family):
    if not runs(family):
        pytest.skip("cannot be run layer by layer here")
    checkpoint, experts = opened(family)
    cut = uneven_cut(experts)
    pruned = ExpertView(checkpoint, experts, cut)
    found = compare(checkpoint, experts, cut, pruned, SAMPLES, SETTINGS)
    assert found.max_difference == 0.0 and found.exact and found.equal
    assert (found.tokens, found.tokens_apart) == (56, 0)
    assert found.differs_from_unmasked > 0.1 and found.peak > 0.1
    other = compare(checkpoint, experts, wrong(experts, cut), pruned, SAMPLES, SETTINGS, unmasked=False)
    assert (
        not other.equal
        and other.tokens_apart > 28
        and other.max_difference > 0.01
        and np.isnan(other.differs_from_unmasked)
    )


@pytest.mark.parametrize("family", QUICK)
def test_the_masked_states_are_those_of_the_stock_model_with_its_own_mask(family):
    checkpoint, experts = opened(family)
    cut = uneven_cut(experts)
    head = Head(checkpoint, SETTINGS)
    model = stock(checkpoint.folder)
    for sample, states in zip(
        SAMPLES, masked_states(checkpoint, experts, cut, SAMPLES, SETTINGS), strict=True
    ):
        expected = masked_logits(model, experts, cut, torch.from_numpy(sample)[None])[0]
        torch.testing.assert_close(head.logits(states), expected, rtol=1e-4, atol=1e-4)


def test_models_without_a_head_are_compared_by_their_states():
    checkpoint, experts = opened("mixtral")
    cut = uneven_cut(experts)
    pruned = ExpertView(checkpoint, experts, cut)
    for model in (checkpoint, pruned):
        model.config = {**model.config, "architectures": ["MixtralModel"]}
    found = compare(checkpoint, experts, cut, pruned, SAMPLES, SETTINGS)
    assert found.exact and found.differs_from_unmasked > 0.1
    assert not compare(checkpoint, experts, wrong(experts, cut), pruned, SAMPLES, SETTINGS).equal


def test_many_experts_differ_by_the_order_of_sums_at_most():
    """128 experts down to 96: products of router and experts have equal shapes, a softmax sums fewer numbers."""
    from expert_models import moe_folder

    checkpoint = open_path(moe_folder("qwen2_moe", num_experts=128, num_experts_per_tok=8))
    experts = experts_of(checkpoint)
    drawn = random.Random(0)
    cut = ExpertCut({la.index: tuple(sorted(drawn.sample(range(128), 96))) for la in experts.layers})
    found = compare(checkpoint, experts, cut, ExpertView(checkpoint, experts, cut), SAMPLES, SETTINGS)
    assert found.equal and found.max_difference < 1e-5 < 0.1 < found.differs_from_unmasked


def test_streamed_experts_give_the_same():
    checkpoint, experts = opened("deepseek_v3")
    cut = uneven_cut(experts)
    pruned = ExpertView(checkpoint, experts, cut)
    found = compare(checkpoint, experts, cut, pruned, SAMPLES, replace(SETTINGS, stream_experts=True))
    assert found.max_difference == 0.0 and found.differs_from_unmasked > 0.1


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_precisions(dtype):
    checkpoint, experts = opened("deepseek_v3", dtype=torch.bfloat16)
    cut = uneven_cut(experts)
    found = compare(checkpoint, experts, cut, ExpertView(checkpoint, experts, cut), SAMPLES, replace(SETTINGS, dtype=dtype))  # fmt: skip
    assert found.equal and found.differs_from_unmasked > 0.05


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "granitemoe"])
def test_channels_factors_and_replacements_are_masked_alike(family):
    checkpoint, experts = opened(family)
    drawn = random.Random(1)
    cut = uneven_cut(experts)
    channels = {
        (layer.index, e): tuple(sorted(drawn.sample(range(WIDTH), drawn.randint(4, 16))))
        for layer in experts.layers
        for e in cut.kept[layer.index]
    }
    first = experts.layers[0]
    expert = cut.kept[first.index][1]
    cut = replace(
        cut,
        channels=channels,
        width=16,
        scales={(first.index, expert): 4.0, (first.index, cut.kept[first.index][2]): 1.3},
    )
    router = next(first.of("router")).name
    row = np.random.default_rng(0).standard_normal(HIDDEN, np.float32)
    down = next(t for t in first.of("down") if t.expert in (None, expert))
    shape = checkpoint.tensors[down.name].shape[-2:]
    key = down.name if down.expert is not None else f"{down.name}#{expert}"
    new = MemoryCheckpoint("new", {f"{router}#{expert}": row, key: np.random.default_rng(1).standard_normal(shape, np.float32)})  # fmt: skip
    pruned = ExpertView(checkpoint, experts, cut, new)
    found = compare(checkpoint, experts, cut, pruned, SAMPLES, SETTINGS, replaced=new)
    assert found.equal and found.max_difference < 1e-4 < found.differs_from_unmasked
    assert not compare(checkpoint, experts, cut, pruned, SAMPLES, SETTINGS, unmasked=False).equal
    unscaled = replace(cut, scales={})
    assert not compare(
        checkpoint, experts, unscaled, pruned, SAMPLES, SETTINGS, replaced=new, unmasked=False
    ).equal
    moved = dict(channels)
    moved[first.index, expert] = tuple(sorted(set(range(WIDTH)) - set(channels[first.index, expert])))[:16]
    other = replace(cut, channels=moved)
    assert not compare(
        checkpoint, experts, other, pruned, SAMPLES, SETTINGS, replaced=new, unmasked=False
    ).equal


def test_a_written_model_is_compared_from_its_files(tmp_path):
    checkpoint, experts = opened("granitemoe", dtype=torch.bfloat16)
    cut = uneven_cut(experts)
    written = open_path(write(ExpertView(checkpoint, experts, cut), tmp_path / "m"))
    stages = []
    found = compare(
        checkpoint, experts, cut, written, SAMPLES, SETTINGS, progress=lambda *what: stages.append(what)
    )
    assert found.max_difference == 0.0
    assert stages[-1] == ("whole", 5, 5) and [s for s, done, _ in stages if done == 5] == [
        "masked",
        "pruned",
        "whole",
    ]


def test_the_library_is_left_as_it_was():
    checkpoint, experts = opened("mixtral")
    real = functional.linear
    with pytest.raises(UsageError):
        compare(checkpoint, experts, ExpertCut({0: (1,)}), checkpoint, SAMPLES, SETTINGS)
    with (
        pytest.raises(ZeroDivisionError),
        masked_routers(Skeleton(checkpoint, SETTINGS), experts, uneven_cut(experts)),
    ):
        assert functional.linear is not real
        raise ZeroDivisionError
    assert functional.linear is real


def test_a_router_that_is_no_matrix_product_is_refused(monkeypatch):
    checkpoint, experts = opened("mixtral")
    cut = uneven_cut(experts)
    kind = transformers.models.mixtral.modeling_mixtral.MixtralTopKRouter

    def by_hand(self, hidden):
        logits = hidden @ self.weight.T
        weights, chosen = torch.softmax(logits, -1).topk(self.top_k, dim=-1)
        return logits, weights / weights.sum(-1, keepdim=True), chosen

    monkeypatch.setattr(kind, "forward", by_hand)
    with pytest.raises(InputError) as caught:
        compare(checkpoint, experts, cut, ExpertView(checkpoint, experts, cut), SAMPLES, SETTINGS)
    assert caught.value.code == "E428"
