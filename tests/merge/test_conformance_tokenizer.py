"""Tokenizers, vocabularies and chat templates of whole merges, against mergekit 0.1.5."""

from __future__ import annotations

import json
import re
import shutil

import merge_models as mm
import pytest
import torch
import transformers

from surgeon.errors import SurgeonError

TEMPLATES = {
    "a": "{% for message in messages %}A:{{ message['content'] }}{% endfor %}",
    "b": "{% for message in messages %}B:{{ message['content'] }}{% endfor %}",
}
LINEAR = """merge_method: linear
dtype: float32
models: [{model: $a, parameters: {weight: 1}}, {model: $b, parameters: {weight: 3}}]
"""
ARITHMETIC = """merge_method: task_arithmetic
dtype: float32
models: [{model: $a, parameters: {weight: 0.4}}, {model: $b, parameters: {weight: 0.3}}]
base_model: $base
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three models whose vocabularies overlap: other words, other order, own special tokens, padded rows."""
    place = tmp_path_factory.mktemp("vocabularies")
    special = {
        "base": ("<pad>", "<bos>", "<eos>"),
        "a": ("<eos>", "<pad>", "<bos>", "<think>"),
        "b": ("<pad>", "<bos>", "<eos>", "<tool>", "<think>"),
    }
    words = {"base": ("hello",), "a": ("hello", "help"), "b": ("world", "hello")}
    pad = {"base": 3, "a": 0, "b": 2}
    found = {}
    for number, name in enumerate(special):
        folder = place / name
        folder.mkdir()
        size = mm.save_tokenizer(folder, words[name], special[name], TEMPLATES.get(name))
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        ids = {f"{k}_token_id": tokenizer.convert_tokens_to_ids(f"<{k}>") for k in ("pad", "bos", "eos")}
        model = mm.new_model("llama", seed=20 + number, vocab_size=size + pad[name], **{})
        for key, value in ids.items():
            setattr(model.config, key, value)
            setattr(model.generation_config, key, value)
        with mm.quiet():
            model.save_pretrained(folder)
        found[name] = folder
    return found


def tokenizer_of(folder):
    with mm.quiet():
        return transformers.AutoTokenizer.from_pretrained(folder)


SOURCES = ["union", "base", "$a", "$b"]


@pytest.mark.parametrize("key", ["tokenizer_source: {}", "tokenizer: {{source: {}}}"])
@pytest.mark.parametrize("source", SOURCES)
def test_tokenizer_sources(source, key, models, tmp_path):
    text = mm.fill(ARITHMETIC + key.format(source) + "\n", **models)
    results = mm.run_both(text, tmp_path, {"mergekit_quirks": True})
    same(results, models)


def same(results: mm.Results, models, tolerance: float = 0.0) -> None:
    ours, theirs = tokenizer_of(results.ours), tokenizer_of(results.theirs)
    mine, other = ours.get_vocab(), theirs.get_vocab()
    assert set(mine) == set(other)
    x, y = mm.tensors(results.ours), mm.tensors(results.theirs)
    for state, vocabulary, folder in ((x, mine, results.ours), (y, other, results.theirs)):
        rows = mm.config_of(folder)["vocab_size"]
        assert state["model.embed_tokens.weight"].shape[0] == rows >= len(vocabulary)
    # Ids may differ between two right answers; each token must have the same row.
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        for token, row in mine.items():
            gap = (x[name][row] - y[name][other[token]]).abs().max()
            assert gap <= tolerance, (name, token, float(gap))
    for key in ("bos_token", "eos_token", "pad_token"):
        assert getattr(ours, key) == getattr(theirs, key)
        number = mm.config_of(results.ours)[f"{key}_id"]
        assert number == mine[getattr(ours, key)], key
    generation = json.loads((results.ours / "generation_config.json").read_text())
    assert generation["eos_token_id"] == mine["<eos>"]
    rest = {n for n in x if "embed" not in n and "lm_head" not in n}
    assert mm.deviation({n: x[n] for n in rest}, {n: y[n] for n in rest}).unequal == 0
    for prompt in ("hello help world", "<think>hello<eos>"):
        assert ours.decode(ours.encode(prompt)) == prompt
    mm.load_strict(results.ours)


TOKENS = {
    "model": "'<tool>': {source: $b}",
    "forced": "'<think>': {source: $a, force: true}",
    "token of a model": "'<tool>': {source: {kind: model_token, model: $b, token: '<eos>'}}",
    "token by id": "'<tool>': {source: {kind: model_token, model: $b, token_id: 7}, force: true}",
    "zero": "'<new>': {source: {kind: zero}}",
    "new from another": "'<new>': {source: {kind: model_token, model: $base, token: '<eos>'}}",
}


@pytest.mark.parametrize("name", TOKENS)
def test_single_tokens(name, models, tmp_path):
    text = mm.fill(f"{ARITHMETIC}tokenizer: {{source: union, tokens: {{{TOKENS[name]}}}}}\n", **models)
    results = mm.run_both(text, tmp_path, {"mergekit_quirks": True})
    same(results, models)


def test_padding_to_a_multiple(models, tmp_path):
    text = mm.fill(ARITHMETIC + "tokenizer: {source: union, pad_to_multiple_of: 64}\n", **models)
    results = mm.run_both(text, tmp_path)
    assert mm.config_of(results.ours)["vocab_size"] == mm.config_of(results.theirs)["vocab_size"]
    assert mm.config_of(results.ours)["vocab_size"] % 64 == 0
    same(results, models)


def test_padding_rows_of_the_donor_are_kept(models, tmp_path):
    """Deliberate difference: mergekit shrinks the embedding to the tokens (Qwen's 152,064 to 151,665)."""
    text = mm.fill(ARITHMETIC + "tokenizer_source: base\n", **models)
    results = mm.run_both(text, tmp_path)
    sizes = [mm.config_of(f)["vocab_size"] for f in (models["base"], results.ours, results.theirs)]
    assert sizes[0] == sizes[1] == sizes[2] + 3
    same(results, models)
    quirks = mm.run_surgeon(text, tmp_path / "quirks", mergekit_quirks=True)
    assert mm.config_of(quirks)["vocab_size"] == sizes[2]


def test_generation_config_is_kept(models, tmp_path):
    """Deliberate difference: with a tokenizer key mergekit writes none, and generation never ends."""
    text = mm.fill(ARITHMETIC + "tokenizer_source: union\n", **models)
    results = mm.run_both(text, tmp_path)
    assert not (results.theirs / "generation_config.json").exists()
    assert (results.ours / "generation_config.json").exists()


def test_E7_different_vocabularies_are_refused_without_a_choice(models, tmp_path):
    text = mm.fill(LINEAR, **models)
    with pytest.raises(SurgeonError, match="vocabular") as raised:
        mm.plan(text)
    assert raised.value.exit_code == 3
    assert "union" in raised.value.help
    with pytest.raises(ValueError):
        mm.run_mergekit(text, tmp_path / "theirs")


def test_E7_a_permuted_vocabulary_of_equal_size_is_refused_and_can_be_aligned(tmp_path):
    """mergekit averages the rows of different tokens here."""
    _base, a, b, _c = mm.family("llama")
    shuffled = tmp_path / "shuffled"
    shutil.copytree(b, shuffled)
    content = json.loads((shuffled / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    x, y = sorted(vocabulary)[:2]
    vocabulary[x], vocabulary[y] = vocabulary[y], vocabulary[x]
    (shuffled / "tokenizer.json").write_text(json.dumps(content))
    text = mm.fill(LINEAR, a=a, b=shuffled)
    with pytest.raises(SurgeonError, match="vocabular") as raised:
        mm.plan(text)
    assert raised.value.exit_code == 3
    state = mm.tensors(mm.run_surgeon(text + f"tokenizer_source: {a}\n", tmp_path / "out"))
    p, q = (mm.tensors(f)["lm_head.weight"] for f in (a, b))
    order = list(range(mm.ROWS))
    i, j = vocabulary[x], vocabulary[y]
    order[i], order[j] = j, i
    torch.testing.assert_close(state["lm_head.weight"], (p + 3 * q[order]) / 4, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("setting", ["auto", "chatml", "alpaca", "llama3", "mistral", "exaone"])
def test_chat_templates_equal_mergekits(setting, tmp_path):
    _base, a, b, _c = mm.family("llama")
    with_template = tmp_path / "b"
    shutil.copytree(b, with_template)
    mm.save_tokenizer(with_template, template=TEMPLATES["b"])
    results = mm.run_both(mm.fill(LINEAR, a=a, b=with_template) + f"chat_template: {setting}\n", tmp_path)
    ours, theirs = tokenizer_of(results.ours), tokenizer_of(results.theirs)
    if setting == "auto":
        assert ours.chat_template == theirs.chat_template == TEMPLATES["b"]
    talk = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "world"},
        {"role": "user", "content": "help"},
    ]
    # The templates are written anew here; what they render is the same, but for the indentation that
    # mergekit's files put between turns.
    for prompt in (False, True):
        texts = [
            t.apply_chat_template(talk, tokenize=False, add_generation_prompt=prompt) for t in (ours, theirs)
        ]
        assert re.sub(r"\s+", "", texts[0]) == re.sub(r"\s+", "", texts[1])


def test_a_chat_template_as_text(tmp_path):
    _base, a, b, _c = mm.family("llama")
    literal = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    results = mm.run_both(mm.fill(LINEAR, a=a, b=b) + f"chat_template: {json.dumps(literal)}\n", tmp_path)
    assert tokenizer_of(results.ours).chat_template == literal
    assert tokenizer_of(results.theirs).chat_template == literal


@pytest.mark.parametrize("setting", ["chatlm", "too short"])
def test_unknown_chat_templates_are_refused(setting):
    _base, a, b, _c = mm.family("llama")
    with pytest.raises(SurgeonError) as raised:
        mm.plan(mm.fill(LINEAR, a=a, b=b) + f"chat_template: {setting}\n")
    assert raised.value.exit_code == 2
