"""Strict YAML: values, positions, anchors, limits, and that any text ends in data or a refusal."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import yaml as pyyaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from surgeon.errors import UsageError
from surgeon.recipe import yaml


def value(text: str, **options):
    return yaml.load(f"x: {text}", **options).data["x"]


def refusal(text: str | bytes, **options) -> UsageError:
    with pytest.raises(UsageError) as caught:
        yaml.load_all(text, "a.yml", **options)
    assert caught.value.exit_code == 2
    return caught.value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("true", True), ("false", False), ("True", True), ("null", None), ("~", None), ("", None),
        ("1", 1), ("-7", -7), ("+7", 7), ("0", 0), ("0.5", 0.5), (".5", 0.5), ("5.", 5.0), ("-1.5e3", -1500.0),
        ("1e-3", 1e-3), ("1E5", 1e5), ("'1'", "1"), ('"true"', "true"), ("!!str 5", "5"),
        ("010", "010"), ("0x1f", "0x1f"), ("0o17", "0o17"), ("1_000", "1_000"), ("12:30", "12:30"), (".inf", ".inf"),
        (".nan", ".nan"), ("no", "no"), ("yes", "yes"), ("On", "On"), ("y", "y"), ("2026-01-01", "2026-01-01"),
        ("0123456", "0123456"), ("1e999", "1e999"), ("12e4567", "12e4567"), ("1.2.3", "1.2.3"),
        ("a b", "a b"), ("=", "="),
    ],
)  # fmt: skip
def test_plain_scalars(text, expected):
    got = value(text)
    assert got == expected
    assert type(got) is type(expected)


@pytest.mark.parametrize(
    "word", ["yes", "Yes", "YES", "on", "On", "ON", "no", "No", "NO", "off", "Off", "OFF"]
)
def test_words_are_booleans_only_in_mode_1_1(word):
    assert value(word) == word
    assert value(word, booleans="1.1") is (word.lower() in ("yes", "on"))
    assert value(f"'{word}'", booleans="1.1") == word
    assert value("y", booleans="1.1") == "y"


def test_a_number_with_thousands_of_digits_stays_text():
    assert isinstance(value("1" * 5000), str)
    assert isinstance(value("1" * 4000), int)


def test_keys_are_text_as_written():
    document = yaml.load("no: 1\n1e5: 2\n7: 3\n~: 4\n", booleans="1.1")
    assert document.data == {"no": 1, "1e5": 2, "7": 3, "~": 4}


def test_positions_and_sources():
    document = yaml.load("models:\n  - model: 1e5  # a commit\n    weight: [1, 0.5]\nname: 'no'\n", "r.yml")
    assert str(document.key_where(("models", 0, "weight"))) == "r.yml:3:5"
    assert str(document.where(("models", 0, "weight"))) == "r.yml:3:13"
    assert str(document.where(("models", 0, "weight", 1))) == "r.yml:3:17"
    assert str(document.key_where(("models", 0, "weight", 1))) == "r.yml:3:17"
    assert document.source(("models", 0, "model")) == "1e5"
    assert document.data["models"][0]["model"] == 1e5
    assert document.source(("name",)) == "no"
    assert document.source(("models",)) is None
    assert str(document.where(("models", 0, "absent", 3))) == "r.yml:2:5"
    assert str(document.where(())) == "r.yml:1:1"


ANCHORS = """\
common: &common {density: 0.5, weight: 1}
other: &other
  weight: 2
  gamma: 0.01
a: {<<: *common, weight: 0.3}
b:
  weight: 9
  <<: [*common, *other]
c: *common
d: {<<: {weight: 4}}
chain: &chain {<<: *other, eps: 1}
e: {<<: *chain, gamma: 5}
"""


def test_anchors_and_merge_keys():
    document = yaml.load(ANCHORS, "r.yml")
    assert document.data["a"] == {"density": 0.5, "weight": 0.3}
    assert document.data["b"] == {"density": 0.5, "weight": 9, "gamma": 0.01}
    assert document.data["c"] == {"density": 0.5, "weight": 1}
    assert document.data["d"] == {"weight": 4}
    assert document.data["e"] == {"weight": 2, "gamma": 5, "eps": 1}
    assert document.data == pyyaml.safe_load(ANCHORS)
    assert document.data["c"] is not document.data["common"], "aliases do not share data"
    assert document.key_where(("a", "density")).line == 1
    assert document.key_where(("a", "weight")).line == 5


def test_a_quoted_merge_sign_is_an_ordinary_key():
    assert yaml.load("'<<': 1\n").data == {"<<": 1}


@pytest.mark.parametrize(
    ("text", "code", "line", "word"),
    [
        ("a: &a {x: 1}\nb: {<<: 5}\n", "E253", 2, "mapping"),
        ("a: &a {x: 1}\nb:\n  <<: *a\n  <<: *a\n", "E251", 4, "lines 3 and 4"),
        ("? [a, b]\n: 1\n", "E253", 1, "key must be text"),
        ("a: &x [*x]\n", "E253", 1, "contains itself"),
        ("a: *nowhere\n", "E250", 1, "undefined alias"),
        ("a: [1, 2\nb: 3\n", "E250", 2, "line 1"),
        ("a: b: c\n", "E250", 1, "not valid YAML"),
        ("a: @home\n", "E250", 1, "cannot start"),
        ('a: "\\Uffffffff"\n', "E250", 1, "out of range"),
        ("%YAML 9.1\n---\na: 1\n", "E250", 1, "incompatible"),
        ("a: !!set {b}\n", "E253", 1, "tag"),
        ("a: !!int 5\n", "E253", 1, "tag"),
        ("!mine\na: 1\n", "E253", 1, "tag"),
    ],
)
def test_refusals_carry_code_and_line(text, code, line, word):
    error = refusal(text)
    assert (error.code, error.where.file, error.where.line) == (code, "a.yml", line)
    assert word in str(error)
    assert error.where.column >= 1


def test_documents():
    text = "a: 1\n---\nb: 2\n---\n---\nc: &x 3\nd: *x\n"
    documents = yaml.load_all(text)
    assert [document.data for document in documents] == [{"a": 1}, {"b": 2}, {"c": 3, "d": 3}]
    assert [document.text for document in documents] == ["a: 1\n", "---\nb: 2\n", "---\nc: &x 3\nd: *x\n"]
    assert documents[1].key_where(("b",)).line == 3
    assert yaml.load_all("") == yaml.load_all("# nothing\n") == []
    for text, word in (("a: 1\n---\nb: 2\n", "found 2"), ("", "empty")):
        with pytest.raises(UsageError, match=word) as caught:
            yaml.load(text)
        assert caught.value.code == "E254"


def test_files(tmp_path):
    path = tmp_path / "r.yml"
    path.write_bytes(b"a: 1\n")
    assert yaml.load_file(path).data == {"a": 1}
    with pytest.raises(UsageError, match="cannot read") as caught:
        yaml.load_file(tmp_path / "absent.yml")
    assert caught.value.code == "E250"
    with pytest.raises(UsageError, match="cannot read"):
        yaml.load_file(tmp_path)


def test_no_heavy_import():
    script = (
        "import sys, surgeon.recipe.yaml, surgeon.recipe.mergekit_yaml, surgeon.merge.parameters;"
        "print([m for m in ('torch', 'transformers', 'mergekit', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


SNIPPETS = [
    "a", "b: ", "- ", "[", "]", "{", "}", ",", ": ", "\n", "\n  ", "&x ", "*x", "<<: ", "!!str ", "!t ", "'", '"', "|\n",
    ">-\n", "#", "---\n", "...\n", "%YAML 1.1\n", "? ", "\t", "1e5", "010", ".nan", "\\", "\\x", "~", "\ufeff", "\0", "\x85",
    "\u2028", "\udc80", "@", "`", "%", "\r\n", "\r", "é",
]  # fmt: skip


@settings(max_examples=400, deadline=2000, suppress_health_check=[HealthCheck.too_slow])
@given(st.one_of(st.lists(st.sampled_from(SNIPPETS), max_size=40).map("".join), st.text(), st.binary()))
def test_any_text_is_data_or_a_refusal(text):
    for booleans in ("1.2", "1.1"):
        try:
            documents = yaml.load_all(text, "fuzz.yml", booleans=booleans)
        except UsageError as error:
            assert error.code in ("E250", "E251", "E252", "E253")
            str(error)
        else:
            assert all(document.data is not None for document in documents)


plain = st.recursive(
    st.one_of(
        st.booleans(), st.none(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=60), inner, max_size=4)
    ),
    max_leaves=20,
)


@settings(max_examples=150, deadline=2000)
@given(st.dictionaries(st.text(max_size=60), plain, min_size=1))
def test_what_json_writes_is_read_back(data):
    try:
        assert yaml.load(json.dumps(data)).data == data
    except UsageError as error:
        assert "surrogate" in error.message or "U+007F" in error.message


def test_escaped_surrogates():
    assert yaml.load('a: "\\ud83d\\ude00"').data == {"a": "😀"}
    assert refusal('a: "\\ud83d"').code == "E250"


def test_a_large_ordinary_file_is_read_in_reasonable_time():
    text = "rows:\n" + "".join(
        f"  - {{model: m{n}, weight: 0.5, density: [0.1, 0.9]}}\n" for n in range(5000)
    )
    start = time.monotonic()
    assert len(yaml.load(text).data["rows"]) == 5000
    assert time.monotonic() - start < 30
