"""Reading questions and judging replies."""

from __future__ import annotations

import json
import random
import time
from fractions import Fraction

import pytest
import task
from hypothesis import given, settings
from hypothesis import strategies as st

from surgeon.errors import InputError, UsageError
from surgeon.evaluate import matching
from surgeon.evaluate.questions import read_questions


def write(tmp_path, *records, name="q.jsonl"):
    path = tmp_path / name
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n")
    return str(path)


NUMBERS = [
    ("1,234.50", ["2469/2"]), ("12,345,678.9", ["123456789/10"]), ("-5", ["-5"]), ("5-3", ["5", "3"]), ("= -3", ["-3"]),
    ("−7", ["-7"]), ("x=3/4", ["3/4"]), (r"\frac{3}{4}", ["3/4"]), (r"-\dfrac12", ["-1/2"]), ("1 1/2", ["3/2"]),
    ("2.5e-3", ["1/400"]), ("3 × 10^5", ["300000"]), (r"3\times10^{-2}", ["3/100"]), ("$1,200", ["1200"]), ("about .5 m", ["1/2"]),
    ("42.", ["42"]), ("- 42 apples", ["42"]), ("1{,}000", ["1000"]), ("5 km/h", ["5"]), ("1/0", []), ("9" * 500, []),
    ("7\n1/2", ["7", "1/2"]),
    ("3\n-4", ["3", "-4"]),
    ("10-20", ["10", "20"]), ("(-3)", ["-3"]), ("**17**", ["17"]), ("no number", []), ("7:30", ["7", "30"]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), NUMBERS)
def test_numbers_are_read_as_people_write_them(text, expected):
    assert [v for v, _ in matching.numbers(text)] == [Fraction(e) for e in expected]


@settings(max_examples=500, deadline=None)
@given(st.text(alphabet="0123456789.,-+/()%eE \\\\{}^*$×−frac\nboxed#:think<>", max_size=60))
def test_no_text_makes_judging_fail(text):
    for value, _ in matching.numbers(text):
        assert isinstance(value, Fraction)
    assert matching.numeric(text, [(Fraction(1), False)]) in (True, False)
    assert matching.exact(text, [text or "x"]) in (True, False)


@pytest.mark.parametrize(
    "text",
    [
        "1" * 99_999,
        "1," * 50_000,
        "(1" * 50_000,
        "\\boxed{" * 20_000,
        "1 * 10 ^ " * 20_000,
        "1" + " " * 99_999,
    ],
)
def test_long_texts_are_judged_in_bounded_time(text):
    began = time.process_time()
    matching.numeric(text, [(Fraction(1), False)])
    assert time.process_time() - began < 5


NUMERIC = [
    ("It is 41. No, 42.", 42, True), ("The answer is 42. I used 7 steps.", 42, True), ("answer:42\nrecap 9", 42, True),
    ("#### 42", 42, True), (r"so \boxed{42} of 100", 42, True), (r"\boxed{\frac{1}{2}}", 0.5, True), (r"\boxed{50\%}", 0.5, True),
    ("50 %", 50, True), ("50%", 0.5, True), ("0.5", "50%", True), ("43", 42, False), ("42.0", 42, True), ("42.00001", 42, False),
    ("0.33333", "1/3", True), ("0.33", "1/3", False), ("1,042", 1042, True), ("minus: -42", 42, False), ("answer: none, of 42", 42, True),
    ("answer: unknown", 42, False), (r"\boxed{x}, about 42", 42, False), ("", 42, False), ("<think>maybe 42", 42, False),
    ("<think>41</think>42", 42, True), ("<think>42</think>41", 42, False), ("wait: answer: 41. Answer: 42", 42, True),
    ("3 * 14 = 42 cm", 42, True), ("4.2e1", 42, True), ("1000001", 1000000, False), (r"\boxed{1,\!000}", 1000, True),
]  # fmt: skip


@pytest.mark.parametrize(("reply", "answer", "right"), NUMERIC)
def test_numeric(tmp_path, reply, answer, right):
    question = read_questions([write(tmp_path, {"question": "?", "answer": answer})]).questions[0]
    assert question.rule.match == "numeric"
    assert question.rule.judges(reply) is right


def test_numeric_agrees_with_the_task_on_real_and_damaged_working(tmp_path):
    chance = random.Random(1)
    wrong = 0
    for seed in range(200):
        question = next(task.questions("train", seed))
        reply = task.solve(question, 4.0, chance)
        if seed % 2:
            at = chance.randrange(len(reply) - 12, len(reply))
            reply = reply[:at] + chance.choice("0123456789") + reply[at + 1 :]
        rule = (
            read_questions([write(tmp_path, {"question": question.text, "answer": question.answer})])
            .questions[0]
            .rule
        )
        if "answer:" in reply:
            wrong += not question.is_solved_by(reply)
            assert rule.judges(reply) == question.is_solved_by(reply), reply
    assert wrong > 20


@pytest.mark.parametrize(
    ("reply", "record", "right"),
    [
        ("  Paris\n", {"answer": "Paris"}, True),
        ("paris", {"answer": "Paris"}, False),
        ("paris", {"answer": "Paris", "ignore_case": True}, True),
        ("New   York", {"answer": "New York"}, True),
        ("It rains there. Answer: Paris.\nYes.", {"answer": "Paris"}, True),
        ("Lyon", {"answer": ["Paris", "Lyon"]}, True),
        ("I like Paris", {"answer": "Paris"}, False),
        ("I like Paris", {"answer": "Par[a-z]s", "match": "regex"}, True),
        ("choice (B), then (C)", {"answer": "C", "pattern": r"\(([A-E])\)"}, True),
        ("choice (C), then (B)", {"answer": "C", "pattern": r"\(([A-E])\)"}, False),
        ("total=1,000", {"answer": 1000, "pattern": r"total=(\S+)"}, True),
        ("12", {"answer": "12", "match": "exact"}, True),
        ("12.0", {"answer": "12", "match": "exact"}, False),
        ("7.05", {"answer": 7.0, "tolerance": 0.01, "match": "numeric"}, False),
        ("7.55", {"answer": 7.5, "tolerance": 0.01}, True),
    ],
)
def test_exact_and_regex(tmp_path, reply, record, right):
    question = read_questions([write(tmp_path, {"question": "?", **record})]).questions[0]
    assert question.rule.judges(reply) is right


def test_answers_of_gsm8k_are_what_stands_behind_the_marker(tmp_path):
    file = write(tmp_path, {"question": "?", "answer": "4*18=<<4*18=72>>72 clips.\n#### 72"})
    assert read_questions([file]).questions[0].rule.accepted == ("72",)


def test_default_rule_and_pattern_of_a_file(tmp_path):
    file = write(tmp_path, {"question": "a", "answer": 5}, {"question": "b", "answer": 5, "match": "numeric"})
    first, second = read_questions([file], match="exact").questions
    assert (first.rule.match, second.rule.match) == ("exact", "numeric")
    assert read_questions([file], match=r"regex:x=(\d)").questions[0].rule.judges("x=5, y=6")


def test_messages_systems_domains_and_repeated_questions(tmp_path):
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "2+2?"},
    ]
    file = write(
        tmp_path,
        {"messages": turns, "answer": 4, "domain": "sums"},
        {"prompt": "2+2?", "answer": 4, "system": "Be brief."},
        {"prompt": "2+2?", "answer": 4, "system": "Be brief."},
    )
    found = read_questions([f"own={file}"])
    assert [q.domain for q in found.questions] == ["sums", "own", "own"]
    assert found.questions[1].messages == (("system", "Be brief."), ("user", "2+2?"))
    assert len({q.key for q in found.questions}) == 3
    again = read_questions([f"other={file}"], match="exact")
    assert [q.key for q in again.questions] == [q.key for q in found.questions]
    assert again.record["sha256"] != found.record["sha256"]  # judged by other rules


def test_limit_counts_what_it_leaves_out(tmp_path):
    file = write(tmp_path, *({"question": str(i), "answer": i} for i in range(5)))
    assert read_questions([file], limit=2).limited
    assert not read_questions([file], limit=5).limited


BAD = [
    ({"answer": 1}, "E390", "no question"),
    ({"question": "a", "prompt": "b", "answer": 1}, "E390", "question and prompt"),
    ({"question": "a"}, "E390", 'no "answer"'),
    ({"question": "", "answer": 1}, "E390", "empty"),
    ({"question": "a", "answer": []}, "E390", "empty"),
    ({"question": "a", "answer": {"x": 1}}, "E390", "neither"),
    ({"question": "a", "answer": True}, "E390", "neither"),
    ({"question": "a", "answer": "x", "match": "fuzzy"}, "E390", "fuzzy"),
    ({"question": "a", "answer": "many", "match": "numeric"}, "E391", "not a number"),
    ({"question": "a", "answer": "(", "match": "regex"}, "E391", "regular expression"),
    ({"question": "a", "answer": "x", "pattern": "["}, "E391", "regular expression"),
    ({"question": "a", "answer": "1", "tolerance": -1}, "E390", "tolerance"),
    ({"messages": [{"role": "assistant", "content": "x"}], "answer": 1}, "E390", "nothing to answer"),
    ({"messages": "x", "answer": 1}, "E390", "list"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "code", "words"), BAD)
def test_bad_records_are_refused_with_their_line(tmp_path, record, code, words):
    file = write(tmp_path, {"question": "fine", "answer": 1}, record)
    with pytest.raises(InputError) as caught:
        read_questions([file])
    assert caught.value.code == code and words in caught.value.message
    assert caught.value.where.line == 2


def test_all_bad_records_are_reported_at_once(tmp_path):
    file = write(tmp_path, {"question": "a"}, {"question": "b", "answer": 1}, {"question": "c"})
    with pytest.raises(InputError) as caught:
        read_questions([file])
    assert [e.where.line for e in (caught.value, *caught.value.others)] == [1, 3]


def test_answers_may_be_missing_when_only_lengths_count(tmp_path):
    file = write(tmp_path, {"question": "a"})
    assert read_questions([file], answers=False).questions[0].rule is None


@pytest.mark.parametrize("match", ["close", "regex:", "exact:x", "regex:("])
def test_match_rules_that_do_not_exist(tmp_path, match):
    with pytest.raises(UsageError) as caught:
        read_questions([write(tmp_path, {"question": "a", "answer": 1})], match=match)
    assert caught.value.code == "E228"


def test_a_prompt_that_opens_the_reasoning_is_known_by_its_last_tokens():
    from running_sums import MODELS
    from transformers import AutoTokenizer

    from surgeon.calibrate.tokens import Encoder
    from surgeon.evaluate.model import Loaded

    tokenizer = AutoTokenizer.from_pretrained(MODELS / "short")
    loaded = Loaded(None, Encoder(tokenizer, False), (), 0)
    opened = tokenizer("<|user|>Add 1+2.<|end|><|assistant|><think>\n")["input_ids"]
    assert loaded.opens_thinking(opened)
    assert not loaded.opens_thinking(tokenizer("<think>x</think> and more of it")["input_ids"])
