"""Faults F1-F6, F8 and F9 as far as YAML goes: each is refused with line and column, in bounded time."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import pytest
import yaml as pyyaml

from surgeon.errors import UsageError
from surgeon.merge.references import expand_variables, parse_model_ref
from surgeon.merge.spec import ModelRef
from surgeon.recipe import yaml
from surgeon.recipe.mergekit_yaml import parse


@dataclass(frozen=True)
class P:
    name: str
    kind: str = "float"
    per_model: bool = False
    default: Any = None


KNOWN = {
    "ties": {
        p.name: p
        for p in (
            P("weight", per_model=True),
            P("density", per_model=True, default=1.0),
            P("normalize", "bool", default=True),
        )
    }
}
TIES = """\
merge_method: ties
base_model: org/base
models:
  - model: org/long
    parameters: {weight: 0.6, density: 0.2}
  - model: org/short
    parameters: {weight: 0.4, density: 0.2}
"""


def refusals(text: str | bytes) -> list[UsageError]:
    with pytest.raises(UsageError) as caught:
        parse(text, "m.yml", known=KNOWN)
    found = [caught.value, *caught.value.others]
    assert all(error.exit_code == 2 for error in found)
    return found


@pytest.mark.parametrize(
    ("old", "new", "line", "column", "help"),
    [
        ("density: 0.2}\n  -", "desnity: 0.2}\n  -", 5, 31, "density"),
        ("base_model:", "base_mdel:", 2, 1, "base_model"),
        ("  - model: org/short", "  - modell: org/short", 6, 5, "model"),
        ("merge_method:", "merge_mthod:", 1, 1, "merge_method"),
    ],
)
def test_F1_misspelt_key(old, new, line, column, help):
    pointed = [
        (e.where.line, e.where.column)
        for e in refusals(TIES.replace(old, new))
        if f'"{help}"' in (e.help or "")
    ]
    assert (line, column) in pointed


def test_F1_known_but_inert_keys_are_notes():
    _, notes = parse(TIES + "parameters: {int8_mask: true, t: 0.5}\n", "m.yml", known=KNOWN)
    assert [note.where.line for note in notes] == [8, 8]


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\nb: 2\na: 3\n",
        "x: {a: 1, b: 2,\n\n a: 1}\n",
        "a: 1\n'b': 1\n\"a\": 2\n",
        "- a: 1\n  b: 1\n  a: 1\n",
    ],
)
def test_F2_duplicate_key_shows_both_lines(text):
    with pytest.raises(UsageError) as caught:
        yaml.load(text, "m.yml")
    error = caught.value
    assert error.code == "E251"
    assert f"lines 1 and {error.where.line}" in error.message
    assert error.where.line == 3


def test_F2_all_duplicates_at_once():
    found = refusals("a: 1\na: 1\nb: 1\nb: 1\n---\nc: 1\nc: 1\n")
    assert [error.where.line for error in found] == [2, 4, 7]


def test_F2_override_through_merge_key_is_no_duplicate():
    text = "x: &x {a: 1, b: 2}\ny: {<<: *x, a: 3}\nz: {a: 4, <<: *x}\n"
    assert yaml.load(text).data == {"x": {"a": 1, "b": 2}, "y": {"a": 3, "b": 2}, "z": {"a": 4, "b": 2}}


@pytest.mark.parametrize(
    ("text", "old", "new"),
    [
        ("1e-3", "1e-3", 0.001),
        ("010", 8, "010"),
        ("no", False, "no"),
        ("off", False, "off"),
        ("12:30", 750, "12:30"),
        ("1_000", 1000, "1_000"),
        ("0123456", 42798, "0123456"),
        ("1e5", "1e5", 1e5),
    ],
)
def test_F3_surprises_of_yaml_1_1(text, old, new):
    assert pyyaml.safe_load(text) == old, "the surprise is real"
    document = yaml.load(f"x: {text}")
    assert document.data["x"] == new
    assert type(document.data["x"]) is type(new)
    assert document.source(("x",)) == text, "a revision is read from the source"


def test_F3_dates_stay_text():
    assert yaml.load("x: 2026-01-01").data["x"] == "2026-01-01"


@pytest.mark.parametrize(
    "revision", ["0123456", "1e5", "12e4567", "1234567", "no", "2026-01-01", "0x1f", "12:30"]
)
def test_F3_revisions_survive(revision):
    for text in (f"org/base@{revision}", f"{{model: {{path: org/base, revision: {revision}}}}}"):
        (spec,), _ = parse(TIES.replace("org/base", text, 1), known=KNOWN)
        assert spec.base_model == ModelRef("org/base", revision)


@pytest.mark.parametrize("number", ["010", "0x10", "1_000", "12:30"])
def test_F3_ambiguous_numbers_are_refused_as_parameters(number):
    (error,) = refusals(TIES.replace("weight: 0.6", f"weight: {number}"))
    assert error.code == "E212"
    assert (error.where.line, error.where.column) == (5, 26)


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
)
MERGED_LAUGHS = "a0: &a0 {k: v}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}], k{n}: v}}\n" for n in range(1, 30)
)
CHAIN = "a0: &a0 x\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 5000))
DOUBLING = "a0: &a0 x\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))


@pytest.mark.parametrize(
    "text",
    [
        LAUGHS,
        MERGED_LAUGHS,
        CHAIN,
        DOUBLING,
        "[" * 100_000,
        "{a: " * 10_000,
        "- " * 100_000 + "x",
        "? " * 10_000,
        "\n".join(" " * n + "a:" for n in range(1000)),
        "[" + "x, " * 150_000 + "]",
        "---\na\n" * 200,
        "x: " + "y" * (yaml.MAX_BYTES + 1),
        "big: &b [" + "x, " * 20_000 + "]\n" + "".join(f"c{n}: *b\n" for n in range(10)),
        "".join(f"---\n[{'x, ' * 2000}]\n" for _ in range(60)),
    ],
    ids=["laughs", "merge-laughs", "chain", "doubling", "brackets", "braces", "dashes", "questions", "indents", "list",
         "documents", "bytes", "wide", "many-documents"],
)  # fmt: skip
def test_F4_bombs_are_refused_quickly(text):
    start = time.monotonic()
    with pytest.raises(UsageError) as caught:
        yaml.load_all(text, "bomb.yml")
    assert caught.value.code == "E252"
    assert time.monotonic() - start < 30
    assert len(str(caught.value)) < 300


def test_F4_what_is_within_the_limits_works():
    assert len(yaml.load("a: &a [1, 2]\nb: [" + "*a, " * 5000 + "]\n").data["b"]) == 5000
    deep = yaml.load("[" * yaml.MAX_DEPTH + "]" * yaml.MAX_DEPTH).data
    assert deep == eval("[" * yaml.MAX_DEPTH + "]" * yaml.MAX_DEPTH)
    assert len(yaml.load_all("--- a\n" * yaml.MAX_DOCUMENTS)) == yaml.MAX_DOCUMENTS


def test_F4_a_recursive_alias_is_refused():
    for text in ("a: &a [*a]\n", "a: &a {b: *a}\n", "a: &a {<<: *a}\n", "&a [[*a]]\n"):
        with pytest.raises(UsageError, match="contains itself"):
            yaml.load(text)


def test_F4_a_file_that_never_ends_is_read_only_up_to_the_limit():
    with pytest.raises(UsageError) as caught:
        yaml.load_file("/dev/zero")
    assert caught.value.code == "E252"


@pytest.mark.parametrize(
    ("text", "code", "line", "word"),
    [
        ("a: !!python/object/apply:os.system ['touch owned']\n", "E253", 1, "tag"),
        ("a: 1\nb: !!python/name:os.system\n", "E253", 2, "tag"),
        ("a: !include /etc/passwd\n", "E253", 1, "tag"),
        ("a: !!binary aGk=\n", "E253", 1, "tag"),
        ("a: 1\nb:\n\tc: 1\n", "E250", 3, "tab"),
        ("a: 1\nb:\tc\n", "E250", 2, "tab"),
        (b"a: 1\nb: caf\xe9\n", "E250", 2, "not UTF-8"),
        ("a: 1".encode("utf-16"), "E250", 1, "UTF-16"),
        ("a: 1\nb: x\0y\n", "E250", 2, "U+0000"),
        ("a: \x1b[31m\n", "E250", 1, "U+001B"),
    ],
)
def test_F5_tags_tabs_and_encodings_are_refused(text, code, line, word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        yaml.load(text, "m.yml")
    assert (caught.value.code, caught.value.where.line) == (code, line)
    assert caught.value.where.column >= 1
    assert word in caught.value.message
    assert not list(tmp_path.iterdir()), "nothing was run"


@pytest.mark.parametrize("prefix", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_F5_bom_and_crlf_work(prefix, ending):
    content = prefix + TIES.replace("\n", ending).encode()
    (spec,), _ = parse(content, "m.yml", known=KNOWN)
    assert [str(model) for model in spec.models()] == ["org/long", "org/short", "org/base"]
    assert spec.where[("merge_method",)].column == 15


def test_F5_a_real_recipe_with_anchors():
    text = """\
merge_method: ties
base_model: &base org/base
dtype: bfloat16
models:
  - model: org/a
    parameters: &shared
      density: &d [0.2, 0.5]
      weight: [{filter: mlp, value: *d}, {value: 0.3}]
  - model: org/b
    parameters:
      <<: *shared
      density: 0.9
  - model: *base
"""
    (spec,), notes = parse(text, known=KNOWN)
    a, b, base = spec.modules[0].slices[0].sources
    assert b.parameters == {**a.parameters, "density": 0.9}
    assert a.parameters["weight"][0] == {"filter": "mlp", "value": [0.2, 0.5]}
    assert base.model == spec.base_model
    assert not notes


def test_F6_all_wrong_values_in_one_pass():
    text = TIES.replace("0.6", ".nan").replace("0.4", "heavy").replace("density: 0.2", "density: [0.1, .inf]")
    text += "parameters: {normalize: 2}\ndtype: float8\nslices: []\nchat_template: [x]\n"
    found = refusals(text)
    assert [(e.where.line, e.where.column) for e in found] == [
        (5, 26), (5, 47), (7, 26), (7, 48), (8, 25), (9, 8), (11, 16),
    ]  # fmt: skip
    assert "finite" in found[0].message and "not a number" in found[2].message


def test_F6_negative_layers():
    text = "merge_method: ties\nslices: [{sources: [{model: a, layer_range: [-4, 4]}]}]\n"
    (error,) = refusals(text)
    assert (error.code, error.where.line, error.where.column) == ("E214", 2, 45)


def test_F8_only_set_variables_in_braces_are_expanded():
    assert expand_variables("${MODELS}/a", {"MODELS": "/m"}) == "/m/a"
    assert expand_variables("$MODELS/~/a$(id)`id`", {"MODELS": "/m"}) == "$MODELS/~/a$(id)`id`"
    with pytest.raises(UsageError, match="MODELS is not set") as caught:
        expand_variables("${MODELS}/a", {})
    assert caught.value.code == "E259"


def test_F8_mergekit_files_have_no_variables_and_no_includes(monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    (spec,), _ = parse(TIES.replace("org/base", "${SECRET}/base"), known=KNOWN)
    assert spec.base_model == ModelRef("${SECRET}/base")
    for key in ("extends", "include"):
        (error,) = refusals(TIES + f"{key}: ../../etc/passwd\n")
        assert error.code == "E210"


@pytest.mark.parametrize(
    "name", ["--output", "-o", "models/*", "a[b]", "~x", "m@n", "a+b", "with space", "ü", "%s", "{x}"]
)
def test_F9_existing_odd_names_are_literal(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir(parents=True)
    assert parse_model_ref(name) == ModelRef(name)


@pytest.mark.parametrize(
    "text",
    [
        "k: 1\n" * 49_000,
        TIES + "".join(f"modles{n}: 1\n" for n in range(45_000)),
        TIES + "parameters:\n" + "".join(f"  wieght{n}: 1\n" for n in range(45_000)),
        "merge_method: ties\nmodels:\n" + "- {model: a}\n" * 15_000,
    ],
    ids=["keys", "unknown-keys", "unknown-parameters", "models"],
)
def test_F4_many_mistakes_are_counted_in_bounded_time_and_space(text):
    start = time.monotonic()
    found = refusals(text)
    assert 100 < len(found) <= yaml.MAX_ERRORS
    assert time.monotonic() - start < 30
