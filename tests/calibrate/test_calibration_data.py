"""Calibration samples: fields, templates, where answers begin, selection, packing, what is counted."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from surgeon.calibrate.data import CalibrationSet, Sample, _ids_digest, load, permutation, random_tokens
from surgeon.calibrate.fields import Unfit, parts_of
from surgeon.calibrate.packing import packed, passages
from surgeon.calibrate.tokens import Encoder, common_prefix, load_encoder
from surgeon.cli.calibration import announcement, load_arguments
from surgeon.errors import EnvironmentFault, InputError, SurgeonError, UsageError

transformers = pytest.importorskip("transformers")
MODEL = Path(__file__).resolve().parents[1] / "models" / "long"
THINKING_TEMPLATE = (  # as DeepSeek-R1's: history loses its thinking, the generation prompt opens one
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}"
    "{% else %}<|assistant|>{{ m['content'].split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
EMPTY_THINK_TEMPLATE = (  # as Qwen3's: a reply without thinking gets an empty one
    "{% for m in messages %}<|user|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and '</think>' not in m['content'] %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|user|>assistant\n{% endif %}"
)


def lines(folder: Path, records: list[dict], name: str = "data.jsonl") -> str:
    file = folder / name
    file.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    return str(file)


def refused(code: str, *args, kind: type[SurgeonError] = InputError, **settings) -> SurgeonError:
    with pytest.raises(kind) as caught:
        load(*args, **settings)
    assert caught.value.code == code, str(caught.value)
    return caught.value


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load_encoder(MODEL)


@pytest.fixture(scope="module")
def joining(tmp_path_factory) -> Path:
    """A folder with a BPE tokenizer whose merges cross every border: blanks, punctuation, line ends."""
    from tokenizers import Tokenizer, models, trainers

    corpus = [f"Q: {a}+{b}=?\nA: {a + b}.\n" for a in range(40) for b in range(40)] + [
        "abcab cabca bcabc\n" * 20
    ]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<unk>", "<eos>"],
        initial_alphabet=[chr(c) for c in range(32, 127)] + ["\n"],
    )
    tokenizer.train_from_iterator(corpus, trainer)
    folder = tmp_path_factory.mktemp("joining")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>"
    ).save_pretrained(folder)
    return folder


def with_template(template: str, tmp_path: Path) -> Path:
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def text_of(encoder: Encoder, sample) -> tuple[str, str]:
    decode = encoder.tokenizer.decode
    return decode(sample.ids[: sample.answer_start]), decode(sample.ids[sample.answer_start :])


# --- where the answer begins -----------------------------------------------------------------------


def byte_lengths(encoder: Encoder, ids) -> list[int]:
    """Bytes of text each token of a byte-level vocabulary stands for, from the token strings alone."""
    added = set(encoder.tokenizer.get_added_vocab())
    tokens = encoder.tokenizer.convert_ids_to_tokens([int(i) for i in ids])
    return [len(t.encode()) if t in added else len(t) for t in tokens]


def first_beyond(lengths: list[int], border: int) -> int:
    reached = np.cumsum(lengths)
    return next((i for i, end in enumerate(reached) if end > border), len(lengths))


WORDS = st.text(st.sampled_from("abc ÄéAdd12+=?.:\n 語😀"), max_size=12).map(
    lambda t: unicodedata.normalize("NFC", t)
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(WORDS, WORDS)
def test_answer_start_against_byte_counts_on_a_byte_level_tokenizer(encoder, prompt, answer):
    ids, start = encoder.exchange([{"role": "user", "content": prompt}], answer)
    before = f"<|bos|><|user|>{prompt}<|end|><|assistant|>"
    assert sum(byte_lengths(encoder, ids)) == len((before + answer + "<|eos|>").encode())
    assert start == first_beyond(byte_lengths(encoder, ids), len(before.encode()))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.text(st.sampled_from("abcQA: 012345+=?.\n"), min_size=1, max_size=15),
    st.text(st.sampled_from("abcQA: 012345+=?.\n"), min_size=1, max_size=15),
)
def test_answer_start_where_tokens_cross_the_border(joining, prompt, answer):
    plain = load_encoder(joining)
    ids, start = plain.exchange([{"role": "user", "content": prompt}], answer)
    glue = "" if prompt[-1].isspace() or answer[0].isspace() else "\n"
    lengths = [len(t) for t in plain.tokenizer.convert_ids_to_tokens(ids.tolist())]
    assert sum(lengths) == len(prompt + glue + answer)
    assert start == first_beyond(lengths, len(prompt + glue))


def test_a_token_across_the_border_counts_as_answer(joining):
    plain = load_encoder(joining)
    # the trained merges join "A: " with digits, so this border lies inside a token
    ids, start = plain.exchange([{"role": "user", "content": "Q: 7+9=?\nA: "}], "16.\n")
    alone = plain.text("Q: 7+9=?\nA: ")
    tokens = plain.tokenizer.convert_ids_to_tokens(ids.tolist())
    assert "".join(tokens[:start]) != "Q: 7+9=?\nA: ", "the tokenizer was to join tokens over the border"
    assert len("".join(tokens[: start + 1])) > len("Q: 7+9=?\nA: ") >= len("".join(tokens[:start]))
    assert start >= common_prefix(alone.tolist(), ids.tolist())


def test_answer_start_where_one_unknown_token_stands_for_both_sides(tmp_path):
    """A Unigram tokenizer fuses unknown characters: the token is the same with and without the answer."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["<s>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(["abc the sum of three and four is seven"] * 50, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(tmp_path)
    unigram = load_encoder(tmp_path)
    # In the second case the end of the prompt and the start of the answer are one unknown token.
    for prompt, answer, expected in (
        ("sum é ", "abc", "abc"),
        ("ab語\n", "語a", "<unk>a"),
        ("ab語", " a", "a"),
        ("the ", "sum", "sum"),
    ):
        ids, start = unigram.exchange([{"role": "user", "content": prompt}], answer)
        tokens = unigram.tokenizer.convert_ids_to_tokens(ids.tolist())
        assert tokens[0] == "<s>" and tokens[-1] == "</s>"
        assert "".join(tokens[start:-1]).strip("▁") == expected, tokens


def test_a_tokenizer_without_offsets_falls_back_to_the_common_prefix(encoder, monkeypatch):
    exact = encoder.exchange([{"role": "user", "content": "Add 1+2."}], "answer:3")
    monkeypatch.setattr(type(encoder.tokenizer), "is_fast", property(lambda self: False))
    ids, start = encoder.exchange([{"role": "user", "content": "Add 1+2."}], "answer:3")
    assert start == exact[1] and (ids == exact[0]).all()


def test_a_special_token_that_swallows_the_blank_after_it_stays_in_the_prompt(tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    from tokenizers import AddedToken

    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken("<|say|>", rstrip=True, special=True)]}
    )
    tokenizer.chat_template = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}<|say|>{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    swallowing = load_encoder(tmp_path)
    ids, start = swallowing.exchange([{"role": "user", "content": "Add."}], " 12")
    assert swallowing.tokenizer.convert_ids_to_tokens(ids.tolist())[start - 1] == "<|say|>"


# --- fields ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "answer", "expected"),
    [
        ({"prompt": "p", "response": "r"}, "response", ("p", "r", "")),
        ({"question": "p", "answer": "r", "id": 4}, "response", ("p", "r", "")),
        ({"problem": "p", "solution": "r", "thinking": " t\n"}, "response", ("p", "r", "t")),
        ({"prompt": "p", "question": "other", "response": "r", "answer": "x"}, "response", ("p", "r", "")),
        ({"prompt": "p", "short": "s", "long": "l", "thinking": "t"}, "short", ("p", "s", "")),
        ({"prompt": "p", "short": "s", "long": "l", "thinking": "t"}, "long", ("p", "l", "t")),
        ({"question": "p", "solution": "s", "deepseek_thinking_trajectory": "t", "deepseek_attempt": "l",
          "gemini_thinking_trajectory": "x", "gemini_attempt": "y"}, "long", ("p", "l", "t")),
        ({"question": "p", "solution": "s", "deepseek_thinking_trajectory": "t", "deepseek_attempt": "l"}, "short", ("p", "s", "")),
        ({"question": "p", "solution": "s", "thinking_trajectories": ["t"], "attempt": "l"}, "long", ("p", "l", "t")),
    ],
)  # fmt: skip
def test_prompt_answer_and_thinking_are_found(values, answer, expected):
    parts = parts_of(values, answer)
    assert (parts.history[0]["content"], parts.answer, parts.thinking) == expected


@pytest.mark.parametrize(
    ("values", "answer", "reason"),
    [
        ({}, "response", "neither text, messages nor prompt"),
        ({"txt": "a"}, "response", "neither text"),
        ({"text": 5}, "response", '"text" is a number'),
        ({"text": ["a"]}, "response", '"text" is a list'),
        ({"prompt": "p"}, "response", "no response"),
        ({"prompt": "p", "short": "s", "long": "l"}, "response", "no response"),
        (
            {"prompt": "p", "answer": "a", "solution": "b"},
            "response",
            "answer and solution could both be the response",
        ),
        (
            {"question": "p", "problem": "q", "response": "r"},
            "response",
            "question and problem could both be the prompt",
        ),
        ({"prompt": "p", "response": {}}, "response", '"response" is an object'),
        ({"text": "a"}, "long", 'no prompt and "long"'),
        ({"prompt": "p", "response": "r"}, "long", "no long"),
        ({"prompt": "p", "response": "<think>a</think>b", "thinking": "t"}, "response", "holds </think>"),
        ({"messages": []}, "response", "not a list with at least one"),
        ({"messages": ["hi"]}, "response", "message 1 is a string"),
        ({"messages": [{"content": "x"}]}, "response", "message 1 has no role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "response",
            "content of message 1 is not a string",
        ),
        ({"text": "a", "domain": 3}, "response", '"domain" is a number'),
    ],
)
def test_fields_that_do_not_fit_are_named(values, answer, reason):
    with pytest.raises(Unfit) as caught:
        parts_of(values, answer)
    assert reason in caught.value.reason and caught.value.help


def test_wrong_fields_are_reported_together_with_file_and_line(tmp_path):
    source = lines(tmp_path, [{"text": "ok"}, {"words": "x"}, {"text": 1}, *[{"a": 1}] * 40])
    error = refused("E374", source, MODEL)
    found = [error, *error.others]
    assert [e.where.line for e in found] == list(range(2, 22)) and error.where.file == source
    assert "words" in error.help and "line 2 of data.jsonl" in error.message


# --- templates -------------------------------------------------------------------------------------


def test_messages_and_prompt_response_give_the_same_tokens(tmp_path, encoder):
    chat = [{"role": "user", "content": "Add 1+2."}, {"role": "assistant", "content": "answer:3"}]
    one = load(lines(tmp_path, [{"messages": chat}]), MODEL).samples[0]
    two = load(lines(tmp_path, [{"prompt": "Add 1+2.", "response": "answer:3"}]), MODEL).samples[0]
    reference = encoder.tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    assert one.ids.tolist() == two.ids.tolist() == list(reference) and one.answer_start == two.answer_start
    assert text_of(encoder, one) == ("<|bos|><|user|>Add 1+2.<|end|><|assistant|>", "answer:3<|eos|>")


def test_a_conversation_of_several_turns_is_answered_by_its_last_message(tmp_path, encoder):
    chat = [
        {"role": r, "content": c}
        for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    ]
    sample = load(lines(tmp_path, [{"messages": chat}]), MODEL).samples[0]
    assert text_of(encoder, sample) == (
        "<|bos|><|user|>a<|end|><|assistant|>b<|eos|><|user|>c<|end|><|assistant|>",
        "d<|eos|>",
    )
    sample = load(lines(tmp_path, [{"messages": chat[:3]}]), MODEL).samples[0]
    assert text_of(encoder, sample) == ("", "<|bos|><|user|>a<|end|><|assistant|>b<|eos|><|user|>c<|end|>")


def test_without_a_template_prompt_and_answer_follow_each_other(tmp_path, encoder, joining):
    record = [{"prompt": "Add 1+2.", "response": "answer:3"}, {"prompt": "x ", "response": "y"}]
    made = load(lines(tmp_path, record), MODEL, template=False)
    assert sorted(text_of(encoder, s) for s in made.samples) == [("Add 1+2.\n", "answer:3"), ("x ", "y")]
    assert made.record["template"] is False
    assert load(lines(tmp_path, record), joining).record["template"] is False  # that tokenizer has none
    assert load(lines(tmp_path, record), MODEL).record["template"] is True
    assert load(lines(tmp_path, [{"text": "a b c"}]), MODEL).record["template"] is False


def test_thinking_continues_the_generation_prompt_of_a_thinking_model(tmp_path):
    folder = with_template(THINKING_TEMPLATE, tmp_path)
    known = load_encoder(folder)
    cases = [
        ({"prompt": "q", "response": "r", "thinking": "t"}, ("<|bos|><|user|>q<|assistant|><think>\n", "t\n</think>\n\nr<|eos|>")),
        ({"prompt": "q", "response": "<think>\nt\n</think>\n\nr"}, ("<|bos|><|user|>q<|assistant|><think>\n", "t\n</think>\n\nr<|eos|>")),
        ({"prompt": "q", "response": "t\n</think>\n\nr"}, ("<|bos|><|user|>q<|assistant|><think>\n", "t\n</think>\n\nr<|eos|>")),
        ({"prompt": "q", "response": "r"}, ("<|bos|><|user|>q<|assistant|>", "r<|eos|>")),
    ]  # fmt: skip
    for record, expected in cases:
        assert text_of(known, load(lines(tmp_path, [record]), folder).samples[0]) == expected


def test_thinking_replaces_the_empty_thinking_a_template_writes(tmp_path):
    folder = with_template(EMPTY_THINK_TEMPLATE, tmp_path)
    known = load_encoder(folder)
    opened = "<|user|>user\nq<|end|>\n<|user|>assistant\n"
    cases = [
        ({"prompt": "q", "response": "r", "thinking": "t"}, (opened, "<think>\nt\n</think>\n\nr<|end|>\n")),
        ({"prompt": "q", "response": "t\n</think>\n\nr"}, (opened, "<think>\nt\n</think>\n\nr<|end|>\n")),
        ({"prompt": "q", "response": "r"}, (opened + "<think>\n\n</think>\n\n", "r<|end|>\n")),
    ]
    for record, expected in cases:
        assert text_of(known, load(lines(tmp_path, [record]), folder).samples[0]) == expected


def test_a_model_that_knows_no_thinking_gets_it_as_plain_text(tmp_path, encoder):
    sample = load(lines(tmp_path, [{"prompt": "q", "response": "r", "thinking": "t"}]), MODEL).samples[0]
    assert text_of(encoder, sample)[1] == "t\n\nr<|eos|>"


@pytest.mark.parametrize(
    ("call", "date"),
    [("strftime_now('%d %b %Y')", "26 Jul 2024"), ('strftime_now( "%Y-%m-%d" )', "2024-07-26")],
)
def test_a_template_that_writes_the_date_gives_the_same_tokens_every_day(tmp_path, call, date):
    folder = with_template(
        f"{{{{ {call} }}}}{{% for m in messages %}}<|user|>{{{{ m['content'] }}}}{{% endfor %}}", tmp_path
    )
    sample = load(lines(tmp_path, [{"prompt": "q", "response": "r"}]), folder).samples[0]
    assert text_of(load_encoder(folder), sample) == (f"{date}<|user|>q<|user|>", "r")


def test_a_template_that_refuses_a_record_names_its_line(tmp_path):
    folder = with_template(
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}{{ m['content'] }}{% endfor %}",
        tmp_path,
    )
    source = lines(
        tmp_path,
        [
            {"text": "fine"},
            {"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]},
        ],
    )
    error = refused("E376", source, folder)
    assert "no system role" in error.message and error.where.line == 2 and error.where.file == source


# --- selection and counts --------------------------------------------------------------------------


def test_selection_depends_on_seed_and_count_alone(tmp_path):
    source = lines(tmp_path, [{"text": f"number {i}"} for i in range(50)])
    first, again, other = (load(source, MODEL, samples=10, seed=s) for s in (3, 3, 4))
    picked = [s.line for s in first.samples]
    assert picked == [i + 1 for i in permutation(50, 3)[:10]] == [s.line for s in again.samples]
    assert picked != [s.line for s in other.samples] and first.record == again.record
    assert first.record["ids_sha256"] != other.record["ids_sha256"]
    assert [s.line for s in load(source, MODEL, samples=20, seed=3).samples][
        :10
    ] == picked  # more samples extend the set
    assert sorted(permutation(1000, 7)) == list(range(1000))


def test_named_domains_are_sampled_evenly_and_override_the_records(tmp_path):
    a = lines(tmp_path, [{"text": f"a{i}", "domain": "mine"} for i in range(40)], "a.jsonl")
    b = lines(tmp_path, [{"text": f"b{i}"} for i in range(5)], "b.jsonl")
    made = load([("math", a), ("code", b)], MODEL, samples=8)
    assert made.record["domains"] == {"code": 4, "math": 4}
    assert [s.domain for s in made.samples] == ["code", "math"] * 4
    assert load([("math", a), ("code", b)], MODEL, samples=20).record["domains"] == {"code": 5, "math": 15}
    assert [p["name"] for p in made.record["sources"]] == ["a.jsonl", "b.jsonl"] and made.record[
        "kind"
    ] == "several"
    assert load(a, MODEL, samples=8).record["domains"] == {"mine": 8}
    everything = load([(None, a), (None, b)], MODEL, samples=100)
    assert len(everything.samples) == 45 and everything.record["records"] == 45


def test_the_record_counts_what_was_cut_and_dropped_and_holds_no_path(tmp_path):
    records = [{"text": "x" * 500}, {"text": ""}, {"text": "<|pad|><|pad|>"}, {"text": "a"}, {"prompt": "p" * 300, "response": "r"},
               {"prompt": "p", "response": "  "}, {"text": "fine text"}, {"prompt": "p", "response": "r" * 300}]  # fmt: skip
    made = load(lines(tmp_path, records), MODEL, sequence_length=64)
    assert sorted(s.line for s in made.samples) == [1, 7, 8]
    assert made.record["samples"] == 3 and made.record["requested"] == 128 and made.record["records"] == 8
    assert made.record["truncated"] == 2 and made.record["dropped"] == 5
    assert made.record["dropped_because"] == {"empty": 3, "short": 1, "answer": 1}
    assert (
        made.record["tokens"] == sum(len(s.ids) for s in made.samples)
        and max(len(s.ids) for s in made.samples) == 64
    )
    assert str(tmp_path) not in json.dumps(made.record)
    text = "\n".join(made.warnings)
    assert (
        "gives 3 calibration samples, not 128" in text
        and "1 records whose answer lies beyond 64 tokens" in text
    )
    assert all(s.ids.dtype == np.int64 and s.ids.flags.c_contiguous for s in made.samples)


def test_dropped_records_are_replaced_by_the_next_ones_of_their_domain(tmp_path):
    half = [("a", lines(tmp_path, [{"text": "" if i % 2 else f"text {i}"} for i in range(40)], "a.jsonl")),
            ("b", lines(tmp_path, [{"text": f"text {i}"} for i in range(40)], "b.jsonl"))]  # fmt: skip
    made = load(half, MODEL, samples=20)
    assert made.record["domains"] == {"a": 10, "b": 10} and made.record["dropped"] > 3
    made = load(
        lines(tmp_path, [{"text": ""} if i % 2 else {"text": f"text {i}"} for i in range(40)]),
        MODEL,
        samples=20,
    )
    assert len(made.samples) == 20 and made.record["dropped"] == 20


def test_sequences_are_no_longer_than_the_model_has_positions(tmp_path):
    source = lines(tmp_path, [{"text": "x " * 4000}] * 2)
    made = load(source, MODEL)
    assert made.record["sequence_length"] == 1024 and {len(s.ids) for s in made.samples} == {1024}
    assert any("1,024 positions" in w for w in made.warnings)
    assert not any("positions" in w for w in load(source, MODEL, sequence_length=1024).warnings)


def test_long_texts_are_cut_before_they_are_tokenised(encoder):
    text = "the quick brown fox; " * 20_000
    whole = encoder.text(text)
    some = encoder.text(text, 100)
    assert 100 < len(some) < len(whole) and (some[:100] == whole[:100]).all()
    assert (encoder.text(" " * 50_000 + "x", 10)[:10] == encoder.text(" " * 50_000 + "x")[:10]).all()


def test_ids_beyond_the_embedding_are_refused(tmp_path):
    source = lines(tmp_path, [{"text": "fine 123"}])
    top = int(load(source, MODEL).samples[0].ids.max())
    assert load(source, MODEL, rows=top + 1).samples
    error = refused("E377", source, MODEL, rows=top)
    assert error.where.line == 1 and f"{top:,} rows" in error.message
    refused("E377", source, MODEL, rows=top, pack=True, sequence_length=2)
    small = tmp_path / "small"
    small.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (small / name).write_bytes((MODEL / name).read_bytes())
    (small / "config.json").write_text(json.dumps({"text_config": {"vocab_size": top}}))
    refused("E377", source, small)


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"sequence_length": 1}, {"answer": "thinking"}])
def test_settings_out_of_range_are_refused(tmp_path, wrong):
    refused("E223", lines(tmp_path, [{"text": "a b"}]), MODEL, kind=UsageError, **wrong)


def test_a_folder_without_tokenizer_is_named(tmp_path):
    source = lines(tmp_path, [{"text": "a b"}])
    assert str(tmp_path) in refused("E375", source, tmp_path).message
    refused("E375", source, tmp_path / "absent")
    (tmp_path / "tokenizer.json").write_text("{}")
    refused("E375", source, tmp_path)


def test_a_tokenizers_own_code_is_never_run(tmp_path):
    folder = tmp_path / "remote"
    folder.mkdir()
    flag = tmp_path / "ran"
    (folder / "code.py").write_text(f"open({str(flag)!r}, 'w')\nclass T: pass\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["code.T", "code.T"]}})
    )
    (folder / "config.json").write_text(
        json.dumps({"model_type": "none-such", "auto_map": {"AutoConfig": "code.T"}})
    )
    (folder / "tokenizer.model").write_text("x")
    refused("E375", lines(tmp_path, [{"text": "a b"}]), folder)
    assert not flag.exists()


def test_without_transformers_the_way_to_get_it_is_named(tmp_path, monkeypatch):
    import importlib.util as util

    known = util.find_spec
    monkeypatch.setattr(
        util, "find_spec", lambda name, *rest: None if name == "transformers" else known(name, *rest)
    )
    error = refused("E512", lines(tmp_path, [{"text": "a"}]), MODEL, kind=EnvironmentFault)
    assert "pip install" in error.help


# --- packing ---------------------------------------------------------------------------------------


def test_packing_is_concatenation_with_end_tokens_cut_into_blocks(tmp_path, encoder):
    texts = [f"text number {i} " * (1 + i % 7) for i in range(60)]
    made = load(
        lines(tmp_path, [{"text": t} for t in texts]),
        MODEL,
        pack=True,
        sequence_length=48,
        samples=1000,
        seed=5,
    )
    eos = encoder.tokenizer.eos_token_id
    stream: list[int] = []
    for number in permutation(60, 5):
        stream += [*encoder.tokenizer(texts[number])["input_ids"], eos]
    assert [s.ids.tolist() for s in made.samples] == [
        stream[i : i + 48] for i in range(0, len(stream) - 47, 48)
    ]
    assert {s.answer_start for s in made.samples} == {0} and made.record["pack"] is True
    fewer = load(
        lines(tmp_path, [{"text": t} for t in texts]), MODEL, pack=True, sequence_length=48, samples=7, seed=5
    )
    assert [s.ids.tolist() for s in fewer.samples] == [stream[i * 48 : i * 48 + 48] for i in range(7)]
    assert fewer.record["tokens"] == 7 * 48


def test_a_book_contributes_from_everywhere(tmp_path, encoder):
    book = tmp_path / "book.txt"
    book.write_text("".join(f"line {i:05d} of a long book\n" for i in range(6000)))
    made = load(str(book), MODEL, pack=True, sequence_length=128, samples=48)
    assert len(made.samples) == 48 and {len(s.ids) for s in made.samples} == {128}
    import re

    seen = sorted(
        int(n) for s in made.samples for n in re.findall(r"line (\d{5})", encoder.tokenizer.decode(s.ids))
    )
    assert seen[0] < 1500 and seen[-1] > 4500
    alone = load(str(book), MODEL, sequence_length=128)
    assert alone.record["samples"] == 1 and "packing would cut its long texts" in "\n".join(alone.warnings)


def test_packing_serves_the_domain_with_the_fewest_tokens():
    lengths = {0: 10, 1: 10, 2: 10, 3: 2, 4: 2, 5: 2, 6: 2, 7: 30}
    made = packed(
        {"long": [0, 1, 2], "short": [3, 4, 5, 6, 7]}, lambda n: np.full(lengths[n], n), 100, 8, None
    )
    assert [d for d, _ in made].count("long") == 3 and [d for d, _ in made].count("short") == 4
    stream = np.concatenate([ids for d, ids in made if d == "short"]).tolist()
    assert stream == [3, 3, 4, 4, 5, 5, 6, 6, *[7] * 24]


def test_an_incomplete_block_is_used_only_when_there_is_no_other():
    made = packed({"a": [1], "b": [2]}, lambda n: np.full(3 * n, n), 10, 8, 0)
    assert [(d, i.tolist()) for d, i in made] == [("a", [1, 1, 1, 0]), ("b", [2] * 6 + [0])]
    made = packed({"a": [1], "b": [3]}, lambda n: np.full(3 * n, n), 10, 8, 0)
    assert [(d, i.tolist()) for d, i in made] == [("b", [3] * 8)]


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("ab \n"), max_size=600), st.integers(2, 40))
def test_passages_are_the_text_and_know_their_lines(text, length):
    parts = passages(text, length)
    assert "".join(p for _, p in parts) == text
    assert all(len(p) <= max(64, 4 * length) for _, p in parts)
    at = 0
    for line, part in parts:
        assert line == text.count("\n", 0, at)
        at += len(part)


def test_no_cut_falls_into_a_special_token():
    text = "<|pad|>" * 60 + "x" * 30 + "<|end|>" * 40
    parts = [p for _, p in passages(text, 2, ("<|pad|>", "<|end|>"))]
    assert "".join(parts) == text and len(parts) > 5
    assert sum(p.count("<|pad|>") + p.count("<|end|>") for p in parts) == 100


def test_the_digest_tells_answers_and_samples_apart():
    """Measurements are kept under it: the same ids cut or answered elsewhere give other numbers."""
    ids = np.arange(1, 5)
    cases = [
        [Sample(ids, 0)], [Sample(ids, 2)], [Sample(ids, 3)], [Sample(ids[:2], 0), Sample(ids[2:], 0)],
        [Sample(ids[2:], 0), Sample(ids[:2], 0)], [Sample(ids[:3], 0), Sample(ids[3:], 0)], [Sample(ids[::-1], 0)],
    ]  # fmt: skip
    assert len({_ids_digest(samples) for samples in cases}) == len(cases)
    assert _ids_digest([Sample(ids.astype(np.int32), 2, "other", 7)]) == _ids_digest([Sample(ids, 2)])


# --- data-free and shipped -------------------------------------------------------------------------


def test_random_tokens_are_functions_of_seed_sample_and_place():
    made, longer = random_tokens(1000, 8, 64, 1), random_tokens(1000, 9, 80, 1)
    assert all((a.ids == b.ids[:64]).all() for a, b in zip(made.samples, longer.samples, strict=False))
    ids = np.concatenate([s.ids for s in random_tokens(50, 40, 500, 2).samples])
    counts = np.bincount(ids, minlength=50)
    assert counts.shape == (50,) and counts.min() > 300 and counts.max() < 500  # 400 expected, sd 20
    assert (
        made.record["ids_sha256" if "ids_sha256" in made.record else "sha256"]
        != random_tokens(1000, 8, 64, 3).record["sha256"]
    )
    assert made.record["samples"] == 8 and made.record["tokens"] == 512
    with pytest.raises(UsageError, match="E223"):
        random_tokens(0, 1, 8, 0)


def test_the_command_lines_options_become_arguments(tmp_path):
    assert load_arguments(None)["source"] is None and load_arguments([])["source"] is None
    source = lines(tmp_path, [{"text": "one two three"}] * 3)
    made = load(folder=MODEL, **load_arguments([f"code={source}"], samples=2, sequence_length=64, seed=9))
    assert (
        isinstance(made, CalibrationSet)
        and made.record["domains"] == {"code": 2}
        and made.record["seed"] == 9
    )
    tokens = made.record["tokens"]
    assert announcement(made.record) == f"calibrating on data.jsonl: 2 samples, {tokens} tokens (code 2)"
