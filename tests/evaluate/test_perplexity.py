"""Perplexity and divergence, streamed, against one plain pass of the whole model."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import tiny_models
import torch
from running_sums import MODELS, asked
from transformers import AutoModelForCausalLM

from surgeon.calibrate import head as heads
from surgeon.calibrate.settings import Settings
from surgeon.calibrate.tokens import load_encoder
from surgeon.checkpoint.checkpoint import open_path
from surgeon.errors import InputError
from surgeon.evaluate import divergence, perplexity, texts
from surgeon.evaluate.model import describe, find, open_stored
from surgeon.evaluate.texts import load_texts


def described(name):
    return describe(find(str(MODELS / name)))


def texts_of(source, name="base", **options):
    options = {"sequence_length": 64, "limit": None, **options}
    return load_texts(str(source), described(name), load_encoder(MODELS / name), **options)


@pytest.fixture
def working(tmp_path):
    """Prompts with responses of several lengths, and running text."""
    import random

    import task

    path = tmp_path / "working.jsonl"
    records = [
        {"prompt": q.text, "response": task.solve(q, 0.0, random.Random(i))} for i, q in enumerate(asked(6))
    ]
    records += [{"text": "Add check total recap answer 1234567890 " * 8}, {"text": "answer:5"}]
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def log_shares(name, passages):
    """log p [counted, vocabulary] of every passage from the whole model, float64."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float64).eval()
    with torch.no_grad():
        logits = [model(torch.from_numpy(p.ids)[None]).logits[0].double() for p in passages]
    return [x[p.first - 1 : -1].log_softmax(-1) for x, p in zip(logits, passages, strict=True)]


@pytest.mark.parametrize("block", [heads.BLOCK_BYTES, 4096], ids=["whole head", "blocks of rows"])
def test_losses_equal_the_whole_model(working, monkeypatch, block):
    monkeypatch.setattr(heads, "BLOCK_BYTES", block)
    found_texts = texts_of(working)
    found = perplexity.token_losses(open_stored(described("base")), found_texts.passages, Settings())
    for mine, shares, passage in zip(
        found, log_shares("base", found_texts.passages), found_texts.passages, strict=True
    ):
        targets = torch.from_numpy(passage.ids[passage.first :])
        expected = -shares.gather(-1, targets[:, None])[:, 0].numpy()
        assert mine.shape == expected.shape
        np.testing.assert_allclose(mine, expected, rtol=2e-4, atol=2e-5)


def test_perplexity_is_over_tokens_with_an_interval_over_passages():
    losses = [np.array([1.0, 2.0, 3.0]), np.array([4.0])]
    found = perplexity.perplexity(losses)
    assert found["value"] == pytest.approx(np.exp(2.5)) and found["n"] == 4
    assert found["low"] == pytest.approx(np.exp(2.0)) and found["high"] == pytest.approx(np.exp(4.0))
    with pytest.raises(InputError):
        perplexity.perplexity([np.array([np.nan])])
    assert perplexity.perplexity([np.array([1e4])])["value"] is None


def test_only_the_answer_counts_where_there_is_one(working):
    found_texts = texts_of(working, sequence_length=512)
    encoder = load_encoder(MODELS / "base").tokenizer
    first = json.loads(working.read_text().splitlines()[0])
    passage = found_texts.passages[0]
    assert encoder.decode(passage.ids[passage.first :], skip_special_tokens=True) == first["response"]
    assert first["prompt"] in encoder.decode(passage.ids[: passage.first])


def test_long_text_is_cut_into_windows_and_nothing_is_lost(working):
    found_texts = texts_of(working)
    ids = load_encoder(MODELS / "base").text(json.loads(working.read_text().splitlines()[6])["text"])
    windows = [p for p in found_texts.passages if p.first == 1][:-1]
    assert np.concatenate([w.ids for w in windows]).tolist() == ids.tolist()
    assert all(len(w.ids) <= 64 for w in found_texts.passages)
    assert found_texts.record["tokens"] == sum(p.counted for p in found_texts.passages)
    assert texts_of(working, limit=3).limited and not found_texts.limited


def test_every_window_begins_with_bos_where_the_text_does():
    ids = np.array([1, *range(10, 20)])
    windows = texts._windows(ids, 4, 1)
    assert all(w[0] == 1 and len(w) <= 4 for w in windows)
    assert np.concatenate([w[1:] for w in windows]).tolist() == list(range(10, 20))
    assert np.concatenate(texts._windows(ids[1:], 4, 1)).tolist() == list(range(10, 20))


def test_nothing_to_predict_is_an_error(tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"text": "a"}))
    with pytest.raises(InputError) as caught:
        texts_of(path)
    assert caught.value.code == "E397"


def test_divergence_equals_brute_force(working, monkeypatch):
    found_texts = texts_of(working)
    pair = [open_stored(described(n)) for n in ("short", "long")]
    whole = divergence.divergence(*pair, found_texts.passages, Settings())
    ours, theirs = (log_shares(n, found_texts.passages) for n in ("short", "long"))
    for i, (q, p) in enumerate(zip(ours, theirs, strict=True)):
        expected = (p.exp() * (p - q)).sum(-1).numpy()
        np.testing.assert_allclose(whole.kl[i], expected, rtol=2e-3, atol=1e-5)
        sure = (p.topk(2).values.diff().abs()[:, 0] > 1e-3) & (q.topk(2).values.diff().abs()[:, 0] > 1e-3)
        agree = (p.argmax(-1) == q.argmax(-1)).numpy()
        assert (whole.agreement[i] == agree)[sure.numpy()].all()
    monkeypatch.setattr(heads, "BLOCK_BYTES", 4096)  # a few rows of the head at a time
    monkeypatch.setattr(divergence, "TOKENS", 7)
    monkeypatch.setattr(perplexity, "GROUP_TOKENS", 50)
    pieces = divergence.divergence(*pair, found_texts.passages, Settings())
    np.testing.assert_allclose(np.concatenate(pieces.kl), np.concatenate(whole.kl), rtol=1e-4, atol=1e-5)
    assert (np.concatenate(pieces.agreement) == np.concatenate(whole.agreement)).all()


def test_divergence_of_encoders_goes_through_their_whole_head(tmp_path):
    """BERT transforms its states before the output matrix."""
    models, chance = [], np.random.default_rng(0)
    for seed in range(2):
        torch.manual_seed(seed)
        model = tiny_models.build("bert").eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / f"m{seed}")
        models.append(model)
    passages = [texts.Passage(chance.integers(3, 60, n), 1) for n in (9, 12, 9)]
    found = divergence.divergence(
        *(open_path(tmp_path / f"m{seed}") for seed in range(2)), passages, Settings()
    )
    for i, passage in enumerate(passages):
        with torch.no_grad():
            q, p = (
                m(torch.from_numpy(passage.ids)[None]).logits[0, :-1].double().log_softmax(-1) for m in models
            )
        np.testing.assert_allclose(found.kl[i], (p.exp() * (p - q)).sum(-1).numpy(), rtol=1e-4, atol=1e-5)


def test_a_model_does_not_diverge_from_itself(working):
    checkpoint = open_stored(described("long"))
    found = divergence.metrics(
        divergence.divergence(checkpoint, checkpoint, texts_of(working).passages, Settings())
    )
    assert found["kl"]["value"] == pytest.approx(0.0, abs=1e-9) and found["top1_agreement"]["value"] == 1.0


def test_other_vocabularies_are_refused(tmp_path):
    other = tmp_path / "other"
    shutil.copytree(MODELS / "short", other)
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    left, right = [t for t in vocabulary if not t.startswith("<|")][10:12]
    vocabulary[left], vocabulary[right] = vocabulary[right], vocabulary[left]
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError) as caught:
        divergence.check_vocabularies(described("long"), describe(find(str(other))))
    assert caught.value.code == "E396" and "2 tokens" in caught.value.message
    divergence.check_vocabularies(described("long"), described("short"))
