"""The model card: front matter, licences, escaping, and no local paths."""

from __future__ import annotations

import dataclasses

import pytest
import yaml

from surgeon.output.modelcard import (
    CardData,
    CardSource,
    Licence,
    card_languages,
    card_licence,
    hub_id,
    looks_like_hub_id,
    merged_licence,
    model_card,
    read_card,
    read_front_matter,
    short_name,
)

APACHE = Licence("apache-2.0")
LONG = CardSource("org/long", "org/long", "input", APACHE, {"weight": 0.6, "density": 0.2})
SHORT = CardSource("org/short", "org/short", "base", APACHE)
DATA = CardData(
    title="long-short",
    method="dare_ties",
    sources=(LONG, SHORT),
    parameters={"lambda": 0.7},
    recipe="merge_method: dare_ties\nmodels: []\n",
    recipe_file="mergekit_config.yml",
    command="surgeon merge org/long org/short --method dare-ties -o OUT",
    seed=0,
    parameter_count=7_615_616_512,
    weight_bytes=15_231_233_024,
    dtype="bfloat16",
    vocabulary=("Tokenizer and chat template are those of org/long.",),
    licence_files=("LICENSE",),
    version="0.1.0",
)


def front_matter(card):
    start, block, _ = card.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(block)


def test_front_matter_is_what_the_hub_reads():
    card = model_card(DATA)
    assert front_matter(card) == {
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": ["org/long", "org/short"],
        "base_model_relation": "merge",
        "tags": ["surgeon", "merge", "dare-ties"],
    }
    hub = pytest.importorskip("huggingface_hub")
    parsed = hub.ModelCard(card).data
    assert parsed.base_model == ["org/long", "org/short"] and parsed.license == "apache-2.0"


def test_body_says_what_was_done():
    card = model_card(DATA)
    assert "| [org/long](https://huggingface.co/org/long) | input | weight 0.6, density 0.2 |" in card
    assert "| all | method `dare_ties` | lambda 0.7 |" in card
    for text in (
        "AutoModelForCausalLM.from_pretrained",
        "vllm serve",
        "7,615,616,512 parameters",
        "seed 0",
        "merge_method: dare_ties",
        "surgeon merge org/long org/short",
        "evaluate it on your task before use",
        "apache-2.0",
        "`LICENSE`",
        "- Tokenizer and chat template are those of org/long.",
    ):
        assert text in card, text
    assert card == model_card(DATA) and card.endswith("\n") and not card.endswith("\n\n")


def test_base_model_is_left_out_when_unknown():
    data = dataclasses.replace(DATA, sources=(CardSource("my-tune", None, "input", Licence()),))
    keys = front_matter(model_card(data))
    assert "base_model" not in keys and "base_model_relation" not in keys and "license" not in keys


def test_forged_ids_never_reach_the_front_matter():
    data = dataclasses.replace(DATA, sources=(dataclasses.replace(LONG, hub_id="/home/me/long"), SHORT))
    card = model_card(data)
    assert front_matter(card)["base_model"] == ["org/short"] and "/home/me" not in card


@pytest.mark.parametrize(
    "licences,keys,warns",
    [
        ([APACHE, APACHE], {"license": "apache-2.0"}, False),
        (
            [APACHE, Licence("mit")],
            {"license": "other", "license_name": "apache-2.0-and-mit"},
            True,
        ),
        ([APACHE, Licence()], {"license": "other", "license_name": "apache-2.0-and-unknown"}, True),
        ([Licence(), Licence()], {}, True),
        (
            [Licence("other", "qwen-research", "https://x.y/LICENSE")] * 2,
            {"license": "other", "license_name": "qwen-research", "license_link": "https://x.y/LICENSE"},
            False,
        ),
        (
            [Licence("other", "qwen-research", "LICENSE")] * 2,
            {
                "license": "other",
                "license_name": "qwen-research",
                "license_link": "https://huggingface.co/org/m0/blob/main/LICENSE",
            },
            False,
        ),
        (
            [Licence("other", "one"), Licence("other", "two")],
            {"license": "other", "license_name": "one-and-two"},
            True,
        ),
    ],
)
def test_licence_rule(licences, keys, warns):
    sources = [CardSource(f"m{i}", f"org/m{i}", licence=licence) for i, licence in enumerate(licences)]
    found, warnings = merged_licence(sources)
    assert found == keys and bool(warnings) == warns
    card = model_card(dataclasses.replace(DATA, sources=tuple(sources)))
    for licence in licences:
        assert str(licence).replace("_", "\\_") in card
    if len(set(licences)) > 1:
        assert "The terms of all of them apply" in card


def test_llama_naming_rule_is_mentioned():
    sources = tuple(dataclasses.replace(s, licence=Licence("llama3.1")) for s in (LONG, SHORT))
    assert 'begin with "Llama"' in model_card(dataclasses.replace(DATA, sources=sources))


# ---- untrusted text -----------------------------------------------------------------------------------

HOSTILE = "a|b<script>alert(1)</script>\x1b[31m`x`\n# owned\r[l](javascript:x) \u202e"


def test_G6_names_are_escaped_everywhere():
    source = CardSource(HOSTILE, None, HOSTILE, Licence("other", HOSTILE, "javascript:x"), {HOSTILE: HOSTILE})
    data = CardData(
        title=HOSTILE,
        method=HOSTILE,
        sources=(source, source),
        parameters={HOSTILE: HOSTILE},
        vocabulary=(HOSTILE,),
        notices=(HOSTILE,),
        licence_files=(HOSTILE,),
        recipe_file=HOSTILE,
        version=HOSTILE,
    )
    card = model_card(data)
    body = card.split("---\n", 2)[2]
    front_matter(card)
    for bad in ("\x1b", "\r", "\u202e", "\n# owned"):
        assert bad not in card, bad
    for line in body.splitlines():
        if line.startswith("|"):
            assert line.replace("\\|", "").count("|") == 4, line
    markdown = pytest.importorskip("markdown_it").MarkdownIt("commonmark", {"html": True}).enable("table")
    html = markdown.render(body)
    assert "<script" not in html and 'href="javascript' not in html and "<img" not in html
    assert html.count("<h1>") == 1 and "<a " not in html
    assert html.count("<tr>") == 4 and html.count("<td>") == 9


def test_G6_code_blocks_cannot_end_early():
    data = dataclasses.replace(DATA, recipe="a: 1\n```\n<b>\n````\n\x1b[0m")
    card = model_card(data)
    assert "`````yaml\na: 1\n```\n<b>\n````\n\\x1b[0m\n`````" in card


def test_title_that_looks_like_yaml_stays_out_of_the_front_matter():
    card = model_card(dataclasses.replace(DATA, title="---\nlicense: mit\n---", tags=("a: b", "no")))
    assert front_matter(card)["license"] == "apache-2.0"
    assert front_matter(card)["tags"][-2:] == ["a: b", "no"]


# ---- reading source cards --------------------------------------------------------------------------------


def test_front_matter_is_read_as_text():
    card = "\ufeff---\r\nlicense: Apache-2.0\r\nlanguage:\r\n- no\r\n- en\r\nbase_model: 1e5/x\r\ndate: 2026-01-01\r\n---\r\n# x"
    found = read_front_matter(card)
    assert (
        found["language"] == ["no", "en"] and found["date"] == "2026-01-01" and found["base_model"] == "1e5/x"
    )
    assert card_licence(found) == Licence("apache-2.0") and card_languages(found) == ("no", "en")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# no front matter",
        "---\nlicense: [unclosed\n---\n",
        "---\nlicense: mit\nno end",
        "---\n- a list\n---\n",
        "---\n!!python/object/apply:os.system ['true']\n---\n",
        "---\na: !<tag:x> 1\n---\n",
        "---\n" + "[" * 5000 + "\n---\n",
        "---\n\tx: 1\n---\n",
    ],
)
def test_broken_front_matter_is_no_front_matter(text):
    assert read_front_matter(text) == {}


def test_alias_bombs_do_not_expand():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    lines += ["m: {<<: [*a29]}", "license: mit"]
    assert card_licence(read_front_matter("---\n" + "\n".join(lines) + "\n---\n")).id == "mit"


@pytest.mark.parametrize(
    "value,expected",
    [("MIT", "mit"), (["mit", "x"], "mit"), (None, None), ({"a": 1}, None), ("", None), ([], None)],
)
def test_licence_values(value, expected):
    assert card_licence({"license": value}).id == expected


def test_card_of_a_folder(tmp_path):
    assert read_card(None) == {} == read_card(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert read_card(tmp_path) == {"license": "mit"}
    (tmp_path / "model" / "README.md").symlink_to(tmp_path / "README.md")
    assert read_card(tmp_path / "model") == {}


@pytest.mark.parametrize("text", ["org/name", "Qwen/Qwen2.5-7B", "a/b_c.d-e"])
def test_hub_ids(text):
    assert looks_like_hub_id(text) and hub_id(text, is_local=False) == text and short_name(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "name",
        "/abs/path",
        "./a/b",
        "../a",
        "a/b/c",
        "~/x",
        "C:\\x",
        "a/..",
        "a/b\n",
        "a b/c",
        "",
        None,
        3,
        "a/b|c",
        "a/" + "b" * 99,
    ],
)
def test_not_hub_ids(text):
    assert not looks_like_hub_id(text) and hub_id(text, is_local=False) is None


def test_hub_id_of_local_folders(tmp_path):
    assert hub_id("a/b", is_local=True) is None
    assert hub_id("./x", is_local=True, config={"_name_or_path": "org/name"}) == "org/name"
    assert hub_id("./x", is_local=True, config={"_name_or_path": "/home/me/name"}) is None
    assert hub_id("./x", is_local=True, config={"_name_or_path": "outputs/run1"}) is None
    cached = tmp_path / "models--org--name" / "snapshots" / "abc"
    assert hub_id(str(cached), is_local=True, folder=cached) == "org/name"


def test_short_names_show_no_path():
    assert (
        short_name("/home/me/models/long/") == "long"
        and short_name("..\\x\\y") == "y"
        and short_name("/") == "model"
    )
