"""The page and the Markdown: complete, escaped, self-contained, and no claim beyond the intervals."""

from __future__ import annotations

import copy
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import sample_results

from surgeon.report import figures, render
from surgeon.report.figures import Measure
from surgeon.report.summary import summarise
from surgeon.report.text import in_markdown, visible

VOID = {"meta", "link", "br", "hr", "img", "input"}
SVG_EMPTY = {"polyline", "polygon", "circle", "rect"}


class Page(HTMLParser):
    """Reads a page strictly: every element is closed in order; keeps text, tags and <data> values."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.parts: list[str] = []
        self.values: list[float] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "data":
            self.values.append(float(dict(attrs)["value"]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in SVG_EMPTY, tag
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data):
        if not {"style"} & set(self.open):
            self.parts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.parts).split())


def page(results=None, **options) -> Page:
    return Page(render(sample_results.results() if results is None else results, "html", **options).decode())


def numbers(metrics: dict) -> list[float]:
    return [m["value"] for m in metrics.values()]


def test_every_measured_number_is_on_the_page():
    results = sample_results.results()
    found = page(results)
    for result in results:
        for value in numbers(result["metrics"]):
            assert value in found.values
        for group in result["groups"]["domain"].values():
            assert group["accuracy"]["value"] in found.values
            assert group["tokens_mean"]["value"] in found.values
        for gate in result["gates"]:
            assert gate["value"] in found.values and gate["threshold"] in found.values
            assert gate["text"] in found.text
        if result["baseline"]:
            paired = result["baseline"]["paired"]
            for key in ("accuracy_difference", "tokens_ratio", "intelligence_per_token_ratio"):
                assert paired[key]["value"] in found.values
        low, high = (result["metrics"]["accuracy"][k] for k in ("low", "high"))
        assert f"{low:.1%}–{high:.1%}".replace("%", "") in found.text
    for said in ("9 of 200 answers were cut off at 512 tokens", sample_results.SHA, "1 of 3 gates failed"):
        assert said in found.text


def test_provenance_is_told():
    text = page().text
    assert "How they were made" in text
    for said in (
        "density 0.15",
        "a2d0126b9b21 ee2411863449",
        "short base fc30de8a643a",
        "lambda 1 , normalize yes",
    ):
        assert said in text
    document = sample_results.result("ties 0.2")
    recipe = document["model"]["manifest"]["recipe"]
    text = {"name": "shipped", "sha256": "ab" * 32, "samples": 128, "tokens": 8361, "kind": "text"}
    recipe |= {
        "adjust": {"acm": 0.7, "sens": None},
        "measured": {"acm": {"calibration": text}, "aim": {"calibration": text}},
    }
    shown = page([document]).text
    assert "name shipped , samples 128 , tokens 8361 , sha256 abababababab" in shown
    assert shown.count("name shipped") == 1 and "ties + acm" in shown
    recipe["measured"] = {
        "sens": {"calibration": {"long": text, "short": text | {"name": "mine", "sha256": "cd" * 32}}}
    }
    assert "sha256 abababababab , name mine" in page([document]).text


def test_nothing_is_fetched_and_nothing_runs():
    text = render(sample_results.results(), "html").decode()
    outside = text.replace("http://www.w3.org/2000/svg", "")
    for word in (
        "http:",
        "https:",
        "//",
        "<script",
        "javascript:",
        "@import",
        "url(",
        "src=",
        "<iframe",
        "<link",
    ):
        assert word not in outside, word
    assert "default-src 'none'; style-src 'unsafe-inline'" in text
    for _, attributes in page().tags:
        assert not [a for a in attributes if a.startswith("on")]
        assert attributes.get("href", "#").startswith("#")
    assert text.count("prefers-color-scheme:dark") >= 2 and "@media print" in text


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "a'b\"c & d &amp; e",
    "line\nbreak\ttab\x00\x07\x1b[2J",
    "\u202egnp.exe\u2066",
    "lone \ud800 surrogate",
    "]]> --> </style></title>",
    "| `x` *b* [l](http://e.vil) @all #1 ~~s~~ $m$",
]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("form", ["html", "svg", "markdown"])
def test_hostile_names_stay_text(name, form):
    results = sample_results.results()
    results[0]["model"]["name"] = name
    results[1]["baseline"]["name"] = name
    results[1]["warnings"] = [name]
    results[1]["gates"] = [{"text": name, "passed": True, "value": None, "threshold": None}]
    results[2]["data"]["name"] = name
    results[2]["settings"][name] = name
    results[3]["groups"] = {name: {name: results[3]["metrics"]}}
    results[3]["model"]["manifest"]["recipe"]["method"] = name
    results[3]["model"]["manifest"]["inputs"] = {name: {}}
    results[4]["metrics"][name] = {"value": 1.5}
    text = render(results, form, title=name).decode("utf-8")
    assert not [c for c in text if not (c.isprintable() or c == "\n")]
    if form == "html":
        shown = Page(text)
        assert visible(name).split()[0] in shown.text
        tags = {tag for tag, _ in shown.tags}
        assert not tags & {"script", "img", "a b"}
        assert all(not a.startswith("on") for _, attributes in shown.tags for a in attributes)
    elif form == "svg":
        import xml.etree.ElementTree as ET

        tags = {e.tag.rpartition("}")[2] for e in ET.fromstring(text).iter()}
        assert tags <= {"svg", "title", "desc", "metadata", "style", "rect", "g", "text", *SVG_EMPTY}
    else:
        assert "<script" not in text and "<img" not in text and "](" not in text
        assert "@all" not in text and "http://" not in text
        for line in text.splitlines():
            if line.startswith("|"):
                assert "\\" not in line.replace("&#92;", "")


def test_markdown_tables_have_equal_columns():
    results = sample_results.results()
    results[0]["model"]["name"] = "a | b | c"
    tables = re.findall(r"(?:^\|.*\n)+", render(results, "markdown").decode(), re.MULTILINE)
    assert len(tables) >= 6
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1, table


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a_b*c", "a&#95;b&#42;c"),
        ("2. x", "2&#46; x"),
        ("2.5", "2.5"),
        ("- x", "&#45; x"),
        ("https://a.b", "https:&#47;/a.b"),
        ("www.a.b", "www&#46;a.b"),
        ("a\nb", "a&#92;nb"),
        ("−9.0", "−9.0"),
    ],
)
def test_markdown_escapes(given, expected):
    assert in_markdown(given) == expected


def test_the_markdown_of_the_sample():
    """Compares with sample_report.md; write it anew after a change that is meant, and read it."""
    expected = (Path(__file__).parent / "sample_report.md").read_text(encoding="utf-8")
    assert render(sample_results.results(), "markdown").decode() == expected


def test_only_intervals_speak():
    changes = {r.name: r for r in summarise(sample_results.results()).rows}
    assert changes["base"].accuracy_change.verdict(0) == "not distinguishable"  # the interval ends at 0
    assert changes["ties 0.2"].accuracy_change.verdict(0) == "not distinguishable"
    assert changes["slerp"].accuracy_change.verdict(0) == "lower"
    assert changes["ties 0.2"].tokens_change.verdict(1) == "lower"
    assert Measure(0.5, 0.1, 0.9).verdict(0) == "higher"
    assert Measure(0.5).verdict(0) == ""
    text = page().text
    assert text.count("not distinguishable") == 2 + 2 + 1 + 1  # rows, cards, lead, footer
    found = summarise(sample_results.results())
    assert "".join(found.lead[0]) == (
        "Fewest tokens without a distinguishable loss of accuracy against long: base, tokens −36% (−39% to −32%), "
        "accuracy not distinguishable (−5.0 to 0.0 points)."
    )


def test_no_shorter_model_without_loss():
    results = [sample_results.result(n) for n in ("long", "short", "slerp")]
    assert summarise(results).lead == (
        ("No model has shorter answers than long without a distinguishable loss of accuracy.",),
    )


def test_without_a_paired_baseline_nothing_is_claimed():
    results = [sample_results.result(n, baseline=False) for n in ("long", "short")]
    found = page(results).text
    assert "there is no paired baseline" in found
    assert "against baseline" not in found.lower()


def test_a_change_without_interval_is_shown_as_such():
    result = sample_results.result("slerp")
    for change in result["baseline"]["paired"].values():
        change.pop("low", None)
    text = page([result]).text
    assert "−5.0 points no interval" in text and "−42% no interval" in text
    assert "not distinguishable" not in text.replace("“not distinguishable”", "")


def test_missing_metrics_are_dashes():
    results = sample_results.results()
    for key in ("cap_rate", "tokens_median", "intelligence_per_token"):
        del results[0]["metrics"][key]
    results[1]["metrics"] = {
        "perplexity": {"value": 7.02},
        "accuracy": {"value": None, "low": None, "high": None, "n": 0},
    }
    results[1]["groups"] = {}
    found = summarise(results)
    assert "Not in the plot, for want of accuracy or mean tokens: short." in found.cautions
    assert page(results).text.count(figures.DASH) > 10
    assert "7.02" in page(results).text
    only = [results[1] | {"baseline": None}]
    assert "Accuracy against answer length" not in page(only).text


def test_metrics_of_tasks_and_unknown_ones_have_their_columns():
    result = sample_results.result("long")
    result["metrics"] |= {"task:gsm8k:exact_match": {"value": 0.6125, "low": 0.5, "high": 0.7}, "pass@4": 0.75, "kl": 0.0123,
                          "top1_agreement": {"value": 0.875}, "new_thing": 1234.5}  # fmt: skip
    text = page([result]).text
    for said in (
        "gsm8k:exact_match",
        "0.613",
        "pass@4",
        "75.0%",
        "KL divergence",
        "0.0123",
        "87.5%",
        "new thing",
        "1,234",
    ):
        assert said in text, said


def test_results_that_do_not_compare_are_said():
    results = sample_results.results()
    results[1]["settings"]["temperature"] = 0.6
    results[2]["data"]["sha256"] = "0" * 64
    results[3]["baseline"]["name"] = "other"
    said = " ".join(summarise(results).cautions)
    assert "over different data" in said and "different settings (temperature)" in said
    assert "different baselines: long, other" in said or "different baselines: other, long" in said
    assert "Where they differ" in page(results).text
    batch = sample_results.results()
    batch[1]["settings"]["batch_size"] = 8
    assert not any("settings" in c for c in summarise(batch).cautions)


def test_duplicates_count_once_and_equal_names_are_told_apart():
    result = sample_results.result("slerp", baseline=False)
    twice = summarise([result, copy.deepcopy(result)])
    assert len(twice.rows) == 1 and any("given twice" in c for c in twice.cautions)
    other = copy.deepcopy(result)
    other["metrics"]["accuracy"]["value"] = 0.9
    assert [r.name for r in summarise([result, other]).rows] == ["slerp", "slerp (2)"]


def test_a_baseline_that_was_not_given_gets_a_row():
    found = summarise([sample_results.result("slerp")])
    assert [(r.name, r.baseline) for r in found.rows] == [("slerp", False), ("long", True)]
    given = summarise([sample_results.result("slerp"), sample_results.result("long")])
    assert [(r.name, r.baseline) for r in given.rows] == [("slerp", False), ("long", True)]


@pytest.mark.parametrize(
    ("ratio", "expected"), [(0.24, "−76%"), (1.0, "0.0%"), (0.918, "−8.2%"), (1.5, "+50%"), (0.9996, "0.0%")]
)
def test_changes(ratio, expected):
    assert figures.as_change(ratio) == expected


@pytest.mark.parametrize(
    ("difference", "expected"), [(-0.09, "−9.0"), (0.0, "0.0"), (-0.0001, "0.0"), (0.125, "+12.5")]
)
def test_points(difference, expected):
    assert figures.in_points(difference) == expected
