"""Generation against transformers' own, and against itself with other batches."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import tiny_models
import torch
from running_sums import MODELS, asked
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from surgeon.errors import InputError, Interrupted
from surgeon.evaluate import generate as engine
from surgeon.evaluate import sampling
from surgeon.evaluate.generate import Decoding, Job, generate
from surgeon.evaluate.kv_cache import packable
from surgeon.evaluate.sampling import Draws, choose


@pytest.fixture(scope="module")
def trained():
    torch.set_num_threads(1)
    return {
        n: AutoModelForCausalLM.from_pretrained(MODELS / n, dtype=torch.float32).eval()
        for n in ("base", "long", "short")
    }


@pytest.fixture(scope="module")
def prompts():
    import task

    tokenizer = AutoTokenizer.from_pretrained(MODELS / "long")
    return [
        tuple(tokenizer(task.prompt(tokenizer, q), add_special_tokens=False).input_ids) for q in asked(40)
    ]


def replies(model, prompts, decoding, rows, samples=1):
    found = {}
    jobs = [Job(f"q{i}", p, s, i) for i, p in enumerate(prompts) for s in range(samples)]
    generate(
        model, jobs, decoding, rows=rows, receive=lambda r: found.__setitem__((r.job.index, r.job.sample), r)
    )
    assert len(found) == len(jobs)
    return {place: (r.ids, r.finished) for place, r in sorted(found.items())}


def greedy_of_transformers(model, prompt, cap, stop):
    ids = torch.tensor([prompt])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=cap, eos_token_id=list(stop), pad_token_id=0)  # fmt: skip
    new = output[0, len(prompt) :].tolist()
    return tuple(new), new[-1] in stop


@pytest.mark.parametrize("name", ["base", "short", "long"])
def test_greedy_replies_equal_transformers_token_for_token(trained, prompts, name):
    chosen = prompts[:8]
    found = replies(trained[name], chosen, Decoding(120, stop_ids=(2,)), rows=3)
    for i, prompt in enumerate(chosen):
        assert found[i, 0] == greedy_of_transformers(trained[name], prompt, 120, (2,))


def test_every_reply_of_the_short_model_ends_by_itself(trained, prompts):
    found = replies(trained["short"], prompts, Decoding(448, stop_ids=(2,)), rows=64)
    assert all(finished and ids[-1] == 2 and 2 not in ids[:-1] for ids, finished in found.values())


@pytest.mark.parametrize(
    "decoding", [Decoding(90, stop_ids=(2,)), Decoding(90, 1.0, 0.95, 20, seed=3, stop_ids=(2,))]
)
def test_replies_do_not_depend_on_the_batch_size(trained, prompts, decoding):
    prompts = prompts[:12]
    one = replies(trained["short"], prompts, decoding, rows=1, samples=2 if decoding.temperature else 1)
    for rows in (3, 8, 100):
        assert (
            replies(trained["short"], prompts, decoding, rows, samples=2 if decoding.temperature else 1)
            == one
        )


def test_samples_differ_and_do_not_depend_on_how_many_there_are(trained, prompts):
    decoding = Decoding(60, 1.2, seed=1, stop_ids=(2,))
    many = replies(trained["base"], prompts[:4], decoding, rows=16, samples=6)
    few = replies(trained["base"], prompts[:4], decoding, rows=16, samples=2)
    assert all(many[place] == reply for place, reply in few.items())
    assert len({many[0, s] for s in range(6)}) > 3
    assert replies(trained["base"], prompts[:4], Decoding(60, 1.2, seed=2, stop_ids=(2,)), 16, 2) != few


FAMILIES = [
    ("gpt2", {}),
    ("qwen3", {}),
    ("phi", {}),
    ("mixtral", {}),
    ("gemma3_text", {"sliding_window": 8}),
    ("mistral", {"sliding_window": 6}),
    ("gemma2", {"sliding_window": 100}),
]


@pytest.mark.parametrize(("family", "extra"), FAMILIES)
def test_other_families_and_sliding_windows(family, extra):
    torch.manual_seed(0)
    model = tiny_models.build(family, **extra).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # a random model of small weights repeats one token
    vocabulary = model.get_input_embeddings().weight.shape[0]
    chance = np.random.default_rng(0)
    prompts = [tuple(int(i) for i in chance.integers(3, vocabulary, n)) for n in (3, 9, 5, 9, 12, 4, 7)]
    stop = (2, 5, 9, 11)
    window = extra.get("sliding_window", 99)
    assert packable(model.config, 12 + 14) is (window >= 26)
    for rows in (2, 7):
        found = replies(model, prompts, Decoding(14, stop_ids=stop), rows)
        for i, prompt in enumerate(prompts):
            assert found[i, 0] == greedy_of_transformers(model, prompt, 14, stop), (family, rows, i)


def test_prefills_in_parts_and_without_padding_change_nothing(trained, prompts, monkeypatch):
    decoding = Decoding(40, 0.8, seed=2, stop_ids=(2,))
    expected = replies(trained["short"], prompts[:10], decoding, rows=20, samples=2)
    monkeypatch.setattr(engine, "PREFILL_TOKENS", 40)
    assert replies(trained["short"], prompts[:10], decoding, rows=20, samples=2) == expected
    monkeypatch.setattr(engine, "packable", lambda *a: False)
    assert replies(trained["short"], prompts[:10], decoding, rows=6, samples=2) == expected
    monkeypatch.setattr(engine, "padding_allowed", lambda *a: False)  # as for recurrent states
    assert replies(trained["short"], prompts[:10], decoding, rows=6, samples=2) == expected


def test_a_model_without_key_value_cache_is_refused(prompts):
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(
        MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=300, state_size=4)
    ).eval()
    with pytest.raises(InputError) as caught:
        replies(model, prompts[:2], Decoding(4, stop_ids=(2,)), rows=2)
    assert caught.value.code == "E392"


def test_a_reply_ends_where_the_context_ends(trained, prompts):
    length = len(prompts[0])
    found = replies(trained["long"], prompts[:1], Decoding(448, stop_ids=(2,), context=length + 7), rows=1)
    assert len(found[0, 0][0]) == 7 and not found[0, 0][1]


def test_non_finite_logits_are_an_error(prompts):
    model = AutoModelForCausalLM.from_pretrained(MODELS / "short", dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(InputError) as caught:
        replies(model, prompts[:2], Decoding(10, stop_ids=(2,)), rows=2)
    assert caught.value.code == "E394"


def test_stopping_keeps_what_is_complete(trained, prompts):
    stop, found = threading.Event(), []

    def receive(reply):
        found.append(reply)
        stop.set()

    jobs = [Job(str(i), p, 0, i) for i, p in enumerate(prompts[:6])]
    with pytest.raises(Interrupted):
        generate(trained["short"], jobs, Decoding(200, stop_ids=(2,)), rows=3, receive=receive, stop=stop)
    assert 1 <= len(found) < 6


# ---- choosing tokens -------------------------------------------------------------------------------


def filtered(logits: torch.Tensor, temperature: float, top_p: float, top_k: int) -> np.ndarray:
    """Probabilities after transformers' own filters."""
    scores = logits[None] / temperature
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    return scores.double().softmax(-1)[0].numpy()


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"),
    [(1.0, 1.0, 0), (0.6, 0.95, 20), (1.5, 0.7, 0), (0.8, 1.0, 5), (1.0, 0.3, 0), (1.0, 1e-9, 0), (1.0, 0.999, 3), (3.0, 0.9999, 0),
     (1.0, 0.95, 300), (0.6, 0.95, 1000), (1.0, 1.0, 1000)],  # as many as there are tokens, and more
)  # fmt: skip
def test_evenly_spread_draws_give_exactly_the_filtered_distribution(temperature, top_p, top_k, monkeypatch):
    monkeypatch.setattr(
        sampling, "_NUCLEUS", 16
    )  # the nucleus is looked for in growing parts of the vocabulary
    logits = torch.from_numpy(np.random.default_rng(0).normal(0, 2.0, 300)).float()
    count = 10_000
    draws = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens = choose(logits.expand(count, -1), draws, temperature, top_p, top_k).numpy()
    expected = filtered(logits, temperature, top_p, top_k)
    shares = np.bincount(tokens, minlength=300) / count
    assert np.abs(shares - expected).max() <= 1.5 / count
    assert (np.diff(tokens) >= 0).all()  # the order of token ids, whatever their rank


def test_a_token_without_probability_is_never_chosen():
    logits = torch.tensor([[0.0, -torch.inf, 0.0, -torch.inf]]).expand(3, -1)
    draws = torch.tensor([0.0, 0.5, 1.0 - 2**-53], dtype=torch.float64)
    assert choose(logits, draws, 1.0, 1.0, 0).tolist() == [0, 2, 2]


def test_draws_are_uniform_and_addressed_by_question_sample_and_position():
    values = np.array([Draws(0, f"q{i}", 0).at(p) for i in range(20) for p in range(600)])
    assert (
        abs(values.mean() - 0.5) < 0.01 and abs(np.histogram(values, 10)[0] / len(values) - 0.1).max() < 0.01
    )
    draws = Draws(0, "q", 1)
    later = draws.at(1300)
    assert draws.at(2) == Draws(0, "q", 1).at(2) and later == Draws(0, "q", 1).at(1300)
    assert draws.at(2) != Draws(0, "q", 2).at(2) != Draws(1, "q", 1).at(2)
