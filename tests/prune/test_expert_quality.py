"""The gate of whole-expert pruning on a small trained model: experts chosen by EASY-EP and REAP lose less than by chance.

A two-layer Qwen3-MoE of eight experts learns four artificial languages (half a minute on one core), is calibrated
through the layer-streamed pass and loses experts. The loss of every choice is measured by the stock model with the
dropped experts' router logits at minus infinity.

What is asked of whom: chosen for one language, half of the experts by either criterion lose less on it than chance
(seven models of other seeds and load-balancing weights did, at 3 to 6 experts). Chosen for all four at once, experts are
about equally needed; there EASY-EP is below chance on average over 3 to 6 experts (all seven models), and of REAP,
which leaves frequency out, nothing is asked (four of seven).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from surgeon.calibrate.data import Sample
from surgeon.calibrate.settings import Settings
from surgeon.checkpoint.checkpoint import open_path
from surgeon.experts import criteria
from surgeon.experts.select import select
from surgeon.experts.statistics import RoutingStatistics, collect_statistics
from surgeon.structure.experts.find import experts_of

pytestmark = pytest.mark.slow

LANGUAGES, WORDS, LENGTH = 4, 48, 32
LAYERS, EXPERTS, TOP_K, HALF, DRAWS = 2, 8, 2, 4, 20


class Languages:
    """Four languages over the same words: in each, every word has three successors of its own."""

    def __init__(self) -> None:
        draw = np.random.default_rng(0)
        self.successors = np.stack([np.stack([draw.choice(WORDS, 3, replace=False) for _ in range(WORDS)]) for _ in range(LANGUAGES)])  # fmt: skip

    def sentences(self, language: int, count: int, seed: int) -> np.ndarray:
        """Return int64 [count, LENGTH]."""
        draw = np.random.default_rng([seed, language])
        found = np.empty((count, LENGTH), np.int64)
        found[:, 0] = draw.integers(WORDS, size=count)
        for place in range(1, LENGTH):
            turn = draw.choice(3, size=count, p=[0.7, 0.2, 0.1])
            found[:, place] = self.successors[language, found[:, place - 1], turn]
        return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Languages]:
    """Train the model; one core, about half a minute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=WORDS, hidden_size=48, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=LAYERS,
            num_attention_heads=4, num_key_value_heads=2, head_dim=12, num_experts=EXPERTS, num_experts_per_tok=TOP_K,
            norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[], max_position_embeddings=64, tie_word_embeddings=False,
            bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )
    )  # fmt: skip
    languages = Languages()
    steps = 500
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        rows = np.concatenate(
            [languages.sentences(language, 12, 1000 + step) for language in range(LANGUAGES)]
        )
        ids = torch.from_numpy(rows)
        seen = model(input_ids=ids)
        loss = functional.cross_entropy(seen.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    folder = tmp_path_factory.mktemp("trained") / "model"
    model.save_pretrained(folder)
    torch.set_num_threads(before)
    return folder, languages


class Judge:
    """Held-out loss of the stock model under a choice of experts."""

    def __init__(self, folder: Path, languages: Languages) -> None:
        self.model = Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.ids = torch.from_numpy(np.concatenate([languages.sentences(k, 48, 7) for k in range(LANGUAGES)]))
        self.kept: dict[int, tuple[int, ...]] = {}
        for number, layer in enumerate(self.model.model.layers):
            layer.mlp.gate.register_forward_hook(self._hook(number))

    def _hook(self, layer: int):
        def route(module, inputs, output):
            dropped = torch.ones(EXPERTS, dtype=torch.bool)
            dropped[list(self.kept.get(layer, range(EXPERTS)))] = False
            logits = output[0].masked_fill(dropped, -torch.inf)
            weights, chosen = logits.softmax(-1).topk(TOP_K, dim=-1)
            return logits, weights / weights.sum(-1, keepdim=True), chosen

        return route

    @torch.inference_mode()
    def loss(self, kept: dict[int, tuple[int, ...]]) -> np.ndarray:
        """Return the mean loss of every language, nats per token."""
        self.kept = kept
        logits = self.model(input_ids=self.ids, use_cache=False).logits[:, :-1]
        each = functional.cross_entropy(logits.transpose(1, 2), self.ids[:, 1:], reduction="none").mean(1)
        return each.reshape(LANGUAGES, -1).mean(1).numpy()


@pytest.fixture(scope="module")
def judge(trained) -> Judge:
    return Judge(*trained)


@pytest.fixture(scope="module")
def statistics(trained) -> RoutingStatistics:
    folder, languages = trained
    checkpoint = open_path(folder)
    samples = [
        Sample(ids, 0, f"language {k}") for k in range(LANGUAGES) for ids in languages.sentences(k, 48, 3)
    ]
    return collect_statistics(checkpoint, samples, Settings(threads=1), experts_of(checkpoint), about={"name": "four languages"})  # fmt: skip


def by_chance(judge: Judge, keep: int) -> np.ndarray:
    """Return the mean increase of the loss of every language over random choices."""
    draw = np.random.default_rng(1)
    choices = [
        {layer: tuple(sorted(draw.choice(EXPERTS, keep, replace=False))) for layer in range(LAYERS)}
        for _ in range(DRAWS)
    ]
    return np.mean([judge.loss(kept) for kept in choices], axis=0) - judge.loss({})


def chosen(statistics: RoutingStatistics, name: str, keep: int, domain: str | None = None) -> dict[int, tuple[int, ...]]:  # fmt: skip
    """Return what a criterion keeps, from the text of one language or of all."""
    found = {}
    for layer in range(LAYERS):
        seen = statistics.total(layer) if domain is None else statistics.domains[domain][layer]
        found[layer] = select(criteria.get(name).score(seen), seen.tokens, keep)
    return found


def test_the_model_has_learnt_and_has_something_to_lose(judge):
    assert judge.loss({}).max() < 1.0  # chance is ln 48 = 3.87; the languages' own entropy 0.80
    assert by_chance(judge, HALF).mean() > 0.3


@pytest.mark.parametrize("name", ["easy_ep", "reap"])
def test_half_the_experts_chosen_for_a_language_lose_less_on_it_than_by_chance(judge, statistics, name):
    parent, chance = judge.loss({}), by_chance(judge, HALF)
    own = [
        (judge.loss(chosen(statistics, name, HALF, f"language {k}")) - parent)[k] for k in range(LANGUAGES)
    ]
    assert np.mean(own) < chance.mean(), (own, chance)


def test_experts_chosen_by_easy_ep_for_all_languages_lose_less_than_by_chance(judge, statistics):
    parent = judge.loss({})
    increase, chance = [], []
    for keep in (3, 4, 5, 6):
        increase.append((judge.loss(chosen(statistics, "easy_ep", keep)) - parent).mean())
        chance.append(by_chance(judge, keep).mean())
    assert np.mean(increase) < np.mean(chance), (increase, chance)
