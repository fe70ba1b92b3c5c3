"""What the functions return: dictionaries that can be asked, shown and reported on."""

from __future__ import annotations

import copy
import json
import pickle
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

import surgeon
from surgeon.python.rendering import Grid, View, as_html, as_markdown, as_text
from surgeon.python.results import Document, Merged, Report, Result

MODELS = Path(__file__).resolve().parents[1] / "models"
LONG, SHORT = MODELS / "long", MODELS / "short"


class Checker(HTMLParser):
    """Collects elements and refuses what is not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rules = ""
        self.text = ""
        self.elements: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.elements.add(tag)
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["style"]:
            self.rules += data
        else:
            self.text += data + " "


def checked(html: str) -> Checker:
    found = Checker()
    found.feed(html)
    assert found.open == []
    assert not found.elements & {"script", "link", "img", "iframe"}
    return found


@pytest.fixture
def merged(scratch) -> Merged:
    return surgeon.merge([LONG, SHORT], method="ties", density=0.3, output=scratch / "merged")


def test_a_merge_says_what_it_made(merged, scratch):
    assert isinstance(merged, dict) and isinstance(merged, Result)
    assert merged.path == scratch / "merged" and merged.models == {"": scratch / "merged"}
    assert merged.manifest == json.loads((scratch / "merged" / "surgeon.json").read_bytes())
    assert merged.manifests == {"": merged.manifest}
    assert merged["output"]["bytes"] == 2368640 and merged["plan"]["id"] == merged.manifest["plan"]
    assert merged.seconds > 0 and not merged.unchanged and merged.timing.total > 0
    again = surgeon.merge([LONG, SHORT], method="ties", density=0.3, output=scratch / "merged")
    assert again.unchanged and again.manifest == merged.manifest


def test_a_merge_shows_itself(merged):
    found = checked(merged._repr_html_())
    for text in ("merge ties", "long, short", "density 0.3", "2.37 MB", "1.18M parameters", str(merged.path)):
        assert text in found.text, text
        assert text in repr(merged)
    assert repr(merged).startswith("merge ties\n")
    assert merged._repr_markdown_().startswith("**merge ties**\n\n- models: long, short\n")


def test_a_merge_reports(merged, scratch):
    page = merged.report()
    assert isinstance(page, Report) and "2.37 MB" in page.markdown and page.html.startswith("<!DOCTYPE html>")
    assert repr(page) == page.markdown
    shown = page._repr_html_()
    assert (
        shown.startswith('<iframe sandbox="" srcdoc="') and shown.count("<") == 2
    )  # all of the page is in the attribute
    for name in ("r.html", "r.md", "r.json"):
        assert merged.report(scratch / name) == scratch / name
    assert (scratch / "r.md").read_text() == page.markdown
    read = json.loads((scratch / "r.json").read_bytes())
    assert read == json.loads(json.dumps(merged.document(), default=str)) and read["command"] == "merge"
    again = surgeon.report(scratch / "r.json", title="Again")
    assert isinstance(again, Report) and "Again" in again.markdown
    both = surgeon.report([merged, scratch / "r.json"], scratch / "both.html")
    assert both == scratch / "both.html"
    with pytest.raises(surgeon.SurgeonError, match="E237"):
        merged.report(scratch / "r.pdf")


def test_a_dry_run_writes_nothing_and_says_so(scratch):
    found = surgeon.merge([LONG, SHORT], method="ties", output=scratch / "merged", dry_run=True)
    assert found["status"] == "dry-run" and not (scratch / "merged").exists()
    assert found.path == scratch / "merged" and found.models == {} and found.manifest is None
    assert "dry run: nothing was written" in repr(found)


def test_a_sweep_has_a_manifest_for_every_point(scratch):
    found = surgeon.merge([LONG, SHORT], method="ties", sweep="density=0.2,0.5", output=scratch / "swept")
    assert set(found.manifests) == {"density=0.2", "density=0.5"}
    assert found.models["density=0.5"] == scratch / "swept" / "density=0.5"


def test_a_mergekit_file_merges_from_python(scratch, monkeypatch):
    monkeypatch.chdir(scratch)
    text = f"merge_method: linear\nmodels:\n  - model: {LONG}\n    parameters: {{weight: 0.5}}\n"
    text += f"  - model: {SHORT}\n    parameters: {{weight: 0.5}}\ndtype: bfloat16\n"
    Path("a.yaml").write_text(text)
    one = surgeon.merge("a.yaml", output="one")
    two = surgeon.run("a.yaml", "two")
    assert one.path.is_dir() and isinstance(two, Result) and two.path is not None
    first, second = ((scratch / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert first == second
    Path("b.yaml").write_text(f"name: inner\n{text}---\n{text.replace(str(LONG), 'inner')}")
    several = surgeon.merge("b.yaml", output="three")
    assert [one["name"] for one in several["documents"]] == ["inner", None]
    assert (scratch / "three" / "model.safetensors").is_file()
    with pytest.raises(surgeon.SurgeonError, match="density cannot be combined"):
        surgeon.merge("a.yaml", density=0.3)


def test_a_result_is_a_dictionary_in_every_way(merged):
    for other in (copy.deepcopy(merged), pickle.loads(pickle.dumps(merged))):
        assert other == merged and type(other) is Merged and other.path == merged.path
        assert other.summaries == merged.summaries
    assert type(merged | {}) is dict and json.loads(json.dumps(merged, default=str))["status"] == "ok"
    assert Result("prune", {"warnings": ["w"]}).warnings == ["w"]
    assert Result("eval", {"gates": [{"passed": False}]}).passed is False


def test_looks_show_themselves(merged):
    found = surgeon.inspect(merged.path, stats=True)
    text = checked(found._repr_html_()).text
    assert "qwen2" in text and "model.layers.3" in text and "570 kB" in text
    found = surgeon.diff(LONG, merged.path, values=True)
    assert "they differ" in checked(found._repr_html_()).text and "model.layers.0" in repr(found)
    same = surgeon.diff(LONG, LONG, values=True)
    assert "no difference" in repr(same)
    found = surgeon.verify(merged.path)
    assert found.passed and "every check passed" in checked(found._repr_html_()).text
    (merged.path / "config.json").write_text((merged.path / "config.json").read_text() + "\n")
    found = surgeon.verify(merged.path)
    assert not found.passed and "E3" in repr(found) and "sv-bad" in found._repr_html_()


def test_the_small_functions_say_what_their_commands_say(scratch):
    assert {m["name"] for m in surgeon.methods()["methods"]} >= {"ties", "slerp"}
    assert surgeon.methods("prune")["family"] == "prune" and "density" in repr(surgeon.methods("ties"))
    assert surgeon.explain("305")["page"]["code"] == "E305" and "vocabularies" in repr(
        surgeon.explain("E305")
    )
    assert len(surgeon.explain()["groups"]) > 10
    found = surgeon.doctor(model=LONG)
    assert found["environment"]["surgeon"] == surgeon.__version__ and found["model"]["abilities"]
    checked(found._repr_html_())
    assert surgeon.clean(scratch)["leftovers"] == [] and "nothing to clean" in repr(surgeon.clean(scratch))


def test_recipe_functions(scratch, monkeypatch):
    monkeypatch.chdir(scratch)
    (known, *_) = surgeon.recipe.list()
    path = surgeon.recipe.copy(known["name"], "mine.yaml")
    assert path.is_file() and surgeon.recipe.show("mine.yaml")
    assert surgeon.recipe.validate("mine.yaml").keys() == {"mine.yaml"}
    from surgeon.recipe import json_schema, schema

    assert schema() == surgeon.recipe.schema() == json_schema.json_schema()
    Path("wrong.yaml").write_text("version: 1\nsteps: 3\n")
    with pytest.raises(surgeon.SurgeonError):
        surgeon.recipe.validate(["mine.yaml", "wrong.yaml"])


# ---- what is shown is safe and stays where it is -------------------------------------------------------

HOSTILE = '<img src=x onerror=alert(1)>|`$\x1b[31m\u202e"'


def test_names_of_other_people_are_only_text():
    view = View(HOSTILE, HOSTILE, False, ((HOSTILE, HOSTILE),), (Grid((HOSTILE, "b"), ((HOSTILE, "1"),), HOSTILE),), (HOSTILE,), (HOSTILE,))  # fmt: skip
    found = checked(as_html(view))
    assert "img" not in found.elements and HOSTILE[:28] in found.text
    for text in (as_html(view), as_markdown(view), as_text(view)):
        assert "\x1b" not in text and "\u202e" not in text
    assert "<img" not in as_markdown(view)
    for document in (
        {"model": {"name": HOSTILE}, "output": {"path": HOSTILE}, "warnings": [HOSTILE]},
        {},
        {"members": [3], "model": 7},
    ):
        for command in ("merge", "prune", "quantize", "edit", "export", "run", "eval", "measure", "other"):
            checked(Document(command, document)._repr_html_())


def test_styles_stay_in_their_element():
    rules = checked(as_html(View("a"))).rules
    selectors = [one.strip() for part in re.findall(r"([^{}]+)\{", rules) for one in part.split(",")]
    assert selectors and all(one.startswith(".surgeon-view") for one in selectors)
    assert "@" not in rules and "url(" not in rules and ":root" not in rules


def test_long_tables_are_cut_and_counted():
    view = View("a", grids=(Grid(("name", "value"), tuple((f"row {n}", "1") for n in range(100))),))
    for text in (as_html(view), as_markdown(view), as_text(view)):
        assert "row 39" in text and "row 40" not in text and "and 60 more" in text
