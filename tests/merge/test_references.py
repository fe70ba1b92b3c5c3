"""Model references: what is path, revision, adapter and folder."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgeon.errors import UsageError, Where
from surgeon.merge.references import expand_variables, parse_model_ref
from surgeon.merge.spec import ModelRef


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", ModelRef("org/name")),
        (" org/name\n", ModelRef("org/name")),
        ("org/name@main", ModelRef("org/name", "main")),
        ("org/name@refs/pr/3", ModelRef("org/name", "refs/pr/3")),
        ("org/name+org/lora", ModelRef("org/name", None, "org/lora")),
        ("org/name@a1+org/lora@1e5", ModelRef("org/name", "a1", "org/lora", "1e5")),
        ("./missing.safetensors", ModelRef("./missing.safetensors")),
        ("-odd", ModelRef("-odd")),
        ("a*[b]?", ModelRef("a*[b]?")),
        ("hf://org/name", ModelRef("org/name")),
        ("hf://org/name@0123456", ModelRef("org/name", "0123456")),
        ("hf://org/name@rev/sub/folder", ModelRef("org/name", "rev", subfolder="sub/folder")),
        ("hf://org/name/sub", ModelRef("org/name", subfolder="sub")),
        ("hf://org/name@refs/pr/3/sub", ModelRef("org/name", "refs/pr/3", subfolder="sub")),
        ("hf://org/name@rev+hf://org/lora@1", ModelRef("org/name", "rev", "org/lora", "1")),
    ],
)
def test_forms(text, expected):
    assert parse_model_ref(text) == expected


@pytest.mark.parametrize(
    "text", ["", "  ", "a@b@c", "a+b+c", "a@", "@b", "+b", "a+", "a+b@", "hf://org", "hf://org/", "hf://org/@x", "a\0b", "a+" * 3000,
             "hf://org/name@", "a+hf://org/lora@r/sub"]
)  # fmt: skip
def test_refusals(text):
    with pytest.raises(UsageError) as caught:
        parse_model_ref(text, where=Where("m.yml", 3, 4))
    assert caught.value.code == "E204"
    assert caught.value.where.line == 3


def test_what_exists_is_taken_literally(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a+b", "c@d", "e+f@g+h", "plain"):
        (tmp_path / name).mkdir()
        assert parse_model_ref(name) == ModelRef(name)
    assert parse_model_ref("a+b+lora@1") == ModelRef("a+b", None, "lora", "1")
    assert parse_model_ref("c@d@rev") == ModelRef("c@d", "rev")
    assert parse_model_ref("plain+c@d") == ModelRef("plain", None, "c@d")
    assert parse_model_ref(str(tmp_path / "c@d")) == ModelRef(str(tmp_path / "c@d"))


@given(st.text())
def test_any_text_is_a_reference_or_a_refusal(text):
    try:
        assert parse_model_ref(text).path
    except UsageError as error:
        assert error.code == "E204"


def test_variables():
    assert expand_variables("${ROOT}/a$B-${X_1}", {"ROOT": "/r", "X_1": "${ROOT}"}) == "/r/a$B-${ROOT}"
    for text in ("${MISSING}", "${}", "${a b}", "${x:-y}", "${HOME"[:-1] + "}}"):
        with pytest.raises(UsageError) as caught:
            expand_variables(text, {"ROOT": "/r"})
        assert caught.value.code == "E259"
