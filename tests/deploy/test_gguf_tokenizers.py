"""Tokenizers in GGUF files: llama.cpp's token ids equal those of transformers, or the tokenizer is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import transformers
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

sys.path.insert(0, str(Path(__file__).resolve().parent))
from deploy_models import stock_folder

from surgeon.checkpoint.checkpoint import open_path
from surgeon.deploy import gguf
from surgeon.deploy.gguf_check import TEXTS
from surgeon.deploy.gguf_tokenizer import PRE_TOKENIZERS, read_tokenizer
from surgeon.deploy.llama_cpp import LlamaCpp, differing_texts
from surgeon.errors import InputError

pytest.importorskip("gguf")

CORPUS = [text * 3 for text in TEXTS] + [
    "the rain in Spain stays mainly in the plain",
    "these are more words to merge, again and again",
] * 5


def byte_level(name: str, folder: Path, bos: bool = False) -> Path:
    """Train a small byte-level tokenizer that splits as llama.cpp's rule of this name says."""
    steps, whole = PRE_TOKENIZERS[name]
    parts = []
    for step in steps:
        if step[0] == "split":
            parts.append(pre_tokenizers.Split(Regex(step[1]), "isolated"))
        elif step[0] == "digits":
            parts.append(pre_tokenizers.Digits(individual_digits=True))
        else:
            parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=step[1] == "regex"))
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole))
    tokenizer.pre_tokenizer = parts[0] if len(parts) == 1 else pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|bos|>", "<|eos|>", "<|pad|>"]
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=500, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|bos|> $A", special_tokens=[("<|bos|>", 0)]
        )
    return save(tokenizer, folder)


def save(tokenizer: Tokenizer, folder: Path) -> Path:
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>"
    )
    wrapped.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    wrapped.save_pretrained(folder)
    return folder


def sentence_piece(folder: Path) -> Path:
    """Make a tokenizer.json as Llama 2's is: byte fallback, blanks as ▁, one in front."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<|bos|>", "<|eos|>", "<|pad|>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(
        [text for text in CORPUS if text.isascii()],
        trainers.BpeTrainer(vocab_size=480, special_tokens=special[:4]),
    )
    spec = json.loads(tokenizer.to_str())
    learned = [token for token in spec["model"]["vocab"] if token not in special]
    spec["model"]["vocab"] = {token: number for number, token in enumerate([*special, *learned])}
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", 1)]
    )
    return save(tokenizer, folder)


def exported(tokenizer: Path, scratch: Path) -> Path:
    folder = stock_folder("llama", scratch / "model", vocab_size=800, num_hidden_layers=1)
    return gguf.write(open_path(folder), scratch / "m.gguf", tokenizer=tokenizer).path


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_token_ids_of_every_known_pre_tokenizer(name, scratch):
    pytest.importorskip("xllamacpp")
    folder = byte_level(name, scratch / "tokenizer", bos=name == "llama-bpe")
    words = read_tokenizer(folder, 800)
    assert words.keys["tokenizer.ggml.pre"] == name and len(TEXTS) == 50
    with LlamaCpp(exported(folder, scratch)) as runtime:
        assert differing_texts(runtime, words.tokenizer, TEXTS) == []
        assert differing_texts(runtime, words.tokenizer, ["before <tool> after"]) == []


def test_a_wrong_name_is_seen_by_the_comparison(scratch, monkeypatch):
    """The fifty texts tell the rules apart: each name applied to another's tokenizer differs somewhere."""
    pytest.importorskip("xllamacpp")
    folder = byte_level("llama-bpe", scratch / "tokenizer")
    words = read_tokenizer(folder, 800)
    monkeypatch.setattr("surgeon.deploy.gguf_tokenizer.pre_tokenizer", lambda spec: "qwen2")
    with LlamaCpp(exported(folder, scratch)) as runtime:
        assert "1234567890" in differing_texts(runtime, words.tokenizer, TEXTS)


def test_sentence_piece_token_ids(scratch):
    pytest.importorskip("xllamacpp")
    folder = sentence_piece(scratch / "tokenizer")
    words = read_tokenizer(folder, 800)
    assert (
        words.keys["tokenizer.ggml.model"] == "llama" and words.keys["tokenizer.ggml.add_bos_token"] is True
    )
    with LlamaCpp(exported(folder, scratch)) as runtime:
        assert differing_texts(runtime, words.tokenizer, TEXTS) == []


def test_the_keys_of_the_test_models_tokenizer():
    folder = Path(__file__).resolve().parents[1] / "models" / "base"
    keys = read_tokenizer(folder, 300).keys
    spec = json.loads((folder / "tokenizer.json").read_text())
    tokens = keys["tokenizer.ggml.tokens"]
    assert (
        all(tokens[number] == token for token, number in spec["model"]["vocab"].items())
        and len(tokens) == 300
    )
    assert (
        keys["tokenizer.ggml.token_type"][:7] == [3] * 6 + [1]
        and keys["tokenizer.ggml.token_type"][281:] == [5] * 19
    )
    assert tokens[281] == "[PAD281]" and len(set(tokens)) == 300
    assert keys["tokenizer.ggml.merges"] == [" ".join(merge) for merge in spec["model"]["merges"]]
    assert (keys["tokenizer.ggml.bos_token_id"], keys["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert keys["tokenizer.ggml.add_bos_token"] is False and keys["tokenizer.ggml.pre"] == "qwen2"
    assert keys["tokenizer.chat_template"] == (folder / "chat_template.jinja").read_text()
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    stored = [
        keys[key]
        for key in (
            "tokenizer.ggml.eos_token_id",
            "tokenizer.ggml.eot_token_id",
            "tokenizer.ggml.eom_token_id",
        )
        if key in keys
    ]
    assert set(ends if isinstance(ends, list) else [ends]) <= set(stored)


def changed(folder: Path, change) -> Path:
    spec = json.loads((folder / "tokenizer.json").read_text())
    change(spec)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return folder


REFUSALS = {
    "split": (lambda s: s["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\p{L}+|\p{N}{1,4}"), "split text"),
    "prefix space": (lambda s: s["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True), "split text"),
    "whole words": (lambda s: s["model"].update(ignore_merges=True), "split text"),
    "lower case": (lambda s: s.update(normalizer={"type": "Lowercase"}), "changes text"),
    "no merges": (lambda s: s["model"].update(merges=[]), "no merges"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSALS)
def test_tokenizers_that_llama_cpp_would_apply_differently_are_refused(what, scratch):
    change, word = REFUSALS[what]
    folder = changed(byte_level("qwen2", scratch / "tokenizer"), change)
    with pytest.raises(InputError, match=word) as refused:
        read_tokenizer(folder, 800)
    assert refused.value.code == "E329"


def test_other_models_too_many_tokens_and_no_tokenizer_are_refused(scratch):
    tokenizer = Tokenizer(
        models.WordLevel({"<unk>": 0, "<|bos|>": 1, "<|eos|>": 2, "<|pad|>": 3, "a": 4}, unk_token="<unk>")
    )
    with pytest.raises(InputError, match="WordLevel"):
        read_tokenizer(save(tokenizer, scratch / "words"), 800)
    with pytest.raises(InputError, match="rows"):
        read_tokenizer(byte_level("gpt-2", scratch / "small"), 100)
    (scratch / "empty").mkdir()
    with pytest.raises(InputError, match="cannot load") as refused:
        read_tokenizer(scratch / "empty", 100)
    assert refused.value.code == "E329"
