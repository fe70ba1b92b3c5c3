"""The page about runs and single commands: every section by its data, escaped, self-contained, the right figures."""

from __future__ import annotations

import copy
import json
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import sample_results
import sample_runs
from test_html import Page

from surgeon import report
from surgeon.errors import InputError, UsageError
from surgeon.report import layers, run_page, runs, scatter, tradeoff
from surgeon.report.scatter import Dot, Plane

sys.path.insert(0, str(Path(__file__).parents[1] / "cli"))

from commands import run as command


def titles(page: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", page)


def figures(page: str) -> list[str]:
    """Titles of the charts that are on the page, once each."""
    return list(dict.fromkeys(re.findall(r'<title id="[^"]*">(.*?)</title>', page)))


# ---- what is on the page --------------------------------------------------------------------------


def test_a_run_has_every_section(tmp_path):
    page = run_page.render(sample_runs.run(tmp_path))
    assert titles(page)[:9] == [
        "Gates", "What quality costs", "Size", "Steps", "Layers of pruned", "Layers of quantized", "Schemes", "Calibration coverage",
        "Warnings and notes",
    ]  # fmt: skip
    assert "How they were made" in titles(page) and "All models" in titles(page)
    assert figures(page)[:7] == [
        "Accuracy against size", "FFN channels kept by layer", "Attention heads kept by layer", "Bits a weight, scales included by layer",
        "Relative error of the weights by layer", "Sensitivity: loss at 4 bits (weight)",
    ]  # fmt: skip
    text = Page(page).text
    for said in ("published, all 2 gates hold", "sha256 cccccccccccc", "accuracy >= baseline - 0.1", "0.85", "−70.0%", "6.00", "speedup 1.30× ± 0.05",
                 "perplexity 8 → 8.5", "4 samples fewer than asked for", "code 20, prose 20", "3 dropped (answer 3)", "removed: layer 1",
                 "target_bits 5", "3 records were left out", "task-arithmetic"):  # fmt: skip
        assert said in text, said


def without(document: dict, *steps: str) -> dict:
    found = copy.deepcopy(document)
    found["steps"] = [step for step in found["steps"] if step["id"] not in steps]
    return found


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("Gates", lambda d: d | {"gates": []}),
        ("What quality costs", lambda d: without(d, "scores")),
        ("Steps", lambda d: d | {"steps": []}),
        ("Size", lambda d: d | {"steps": []}),
        ("Layers of pruned", lambda d: without(d, "pruned")),
        ("Layers of quantized", lambda d: without(d, "quantized")),
        ("Schemes", lambda d: without(d, "quantized")),
        ("Calibration coverage", lambda d: without(d, "pruned")),
        ("Warnings and notes", lambda d: without(d, "merged", "pruned") | {"warnings": []}),
        ("How they were made", lambda d: without(d, "quantized")),
        ("All models", lambda d: without(d, "scores")),
    ],
)
def test_a_section_is_there_only_with_its_data(tmp_path, section, change):
    document = sample_runs.run(tmp_path)
    assert section in titles(run_page.render(document))
    changed = change(document)
    assert section not in titles(run_page.render(changed))
    headings = re.findall(r"^### (.*)$", run_page.markdown(changed), re.MULTILINE)
    assert section not in headings


def test_layers_have_the_figures_of_the_files(tmp_path):
    document = sample_runs.run(tmp_path)
    steps = {step.id: step for point in runs.tell(document).points for step in point.steps}
    ((_, kept),) = runs.by_layer(steps["pruned"])  # its folder is gone; the published model carries the file
    channels, heads = kept.bars
    assert [bar.value for bar in channels.bars] == [6, None, 2] and channels.whole == 8
    assert [bar.value for bar in heads.bars] == [2, None, 4] and heads.whole == 4
    ((_, stored),) = runs.by_layer(steps["quantized"])
    bits, error = stored.bars
    assert [bar.value for bar in bits.bars] == [8, 4, 4]
    assert [round(bar.value or 0, 6) for bar in error.bars] == [0.01, 0.1, 0.1]
    assert stored.heat is not None and len(stored.heat.cells) == 12
    worst = max(stored.heat.cells, key=lambda cell: cell.loss)
    assert (worst.layer, worst.kind, worst.loss, worst.chosen) == (2, "mlp.down_proj", 66.0, "4")
    assert stored.notes == ("1 matrix stays as it was and is in no bar, lm_head.weight first",)


def test_removed_layers_alone_make_one_chart():
    found = layers.of_pruning(
        {"layers": [{"heads": None, "channels": None}, None], "hidden": None},
        "2 layers, heads 4 / kv 2, ffn 8",
    )
    (chart,) = found.bars
    assert [bar.value for bar in chart.bars] == [8, None] and found.notes == ("removed: layer 1",)


def test_many_models_are_named_not_drawn(tmp_path):
    document = sample_runs.sweep(tmp_path)
    for number, point in enumerate(document["points"]):
        folder = tmp_path / f"p{number}"
        folder.mkdir()
        content = sample_runs.pruning()
        content["layers"][0]["channels"] = list(range(number + 1))
        (folder / "pruning.json").write_text(json.dumps(content))
        plan = sample_runs.plan()
        plan["records"][0]["bytes"] += number
        (folder / "plan.json").write_text(json.dumps(plan))
        point["steps"][2]["path"] = str(folder)
    page = run_page.render(document)
    assert sum(title.startswith("Layers of ") for title in titles(page)) == 4
    assert Page(page).text.count("not drawn: a report of this model alone") == 2


def test_the_carried_file_is_that_of_the_last_pruning(tmp_path):
    document = sample_runs.run(tmp_path)
    again = copy.deepcopy(document["steps"][1]) | {"id": "again"}
    document["steps"].insert(2, again)
    first, second = (s for p in runs.tell(document).points for s in p.steps if s.verb == "prune")
    ((_, gone),), ((_, kept),) = runs.by_layer(first), runs.by_layer(second)
    assert not gone.bars and "no pruning.json lies in" in gone.notes[0]
    assert kept.bars


def test_what_is_gone_is_said(tmp_path):
    document = sample_runs.quantize(tmp_path / "moved")
    page = run_page.render(document)
    assert f"bits and errors: not known, no plan.json lies in {tmp_path / 'moved'}" in Page(page).text
    assert not figures(page)
    with pytest.raises(UsageError, match="E238"):
        report.render([document], "svg")


def test_a_manifest_of_another_plan_is_not_shown(tmp_path):
    document = sample_runs.run(tmp_path)
    document["steps"][2]["document"]["plan"]["id"] = "e" * 64
    assert "How they were made" not in titles(run_page.render(document))


def test_damaged_files_are_not_read(tmp_path):
    document = sample_runs.run(tmp_path)
    for content in ("", "{", "[]", '"x"', '{"records": 3, "allocation": [], "matrices": null}', '{"layers": {}}',
                    '{"records": [{"label": 3}, {"label": "model.layers.0.q.weight", "bytes": "many", "elements": 0}], '
                    '"allocation": {"groups": [{"name": "x", "losses": {"int4": "NaN"}}]}}'):  # fmt: skip
        for name in ("plan.json", "pruning.json", "surgeon.json"):
            (tmp_path / "out" / name).write_text(content)
        Page(run_page.render(document))
        run_page.markdown(document)


def test_a_failed_run_shows_its_error_and_what_was_done(tmp_path):
    document = without(sample_runs.run(tmp_path), "scores")
    document |= {"status": "failed", "published": False, "gates": [],
                 "error": {"code": "E501", "message": "step quantized: not enough disk space", "help": "free some", "exit_code": 5}}  # fmt: skip
    document["steps"][2] |= {"status": "failed", "path": None, "document": None}
    text = Page(run_page.render(document)).text
    assert "✕ failed" in text and "E501" in text and "not enough disk space" in text and "free some" in text
    assert "FAILED: failed" in run_page.markdown(document)
    assert report.validate(document) is document


def test_failed_gates_show(tmp_path):
    document = sample_runs.run(tmp_path) | {"status": "gate-failed", "published": False}
    document["gates"][0] |= {"passed": False, "value": 0.7}
    page = run_page.render(document)
    assert 'class="verdict bad"' in page and page.count("✕ failed") == 1
    assert (
        "| **FAILED** | accuracy &#62;= baseline - 0.1 | scores | 0.7 | 0.85 | 0.95 |"
        in run_page.markdown(document)
    )


# ---- experts, differences, sweeps -----------------------------------------------------------------


def test_experts_without_tokens_are_named(tmp_path):
    document = sample_runs.experts(tmp_path / "slim")
    page = run_page.render(document)
    assert "Experts kept by layer" in figures(page)
    assert "1 expert was given no token (layer 1: 1)" in Page(page).text
    content = json.loads((tmp_path / "slim" / "pruning.json").read_text())
    content["layers"]["1"]["tokens"][1] = 3
    (tmp_path / "slim" / "pruning.json").write_text(json.dumps(content))
    assert "every expert was given tokens" in Page(run_page.render(document)).text


def test_drift_by_layer():
    found = layers.of_diff(sample_runs.diff())
    assert [(bar.layer, bar.value) for bar in found.bars[0].bars] == [(0, 0.01), (1, 0.02), (2, 0.03)]
    assert "Drift: relative L2 distance of the weights by layer" in figures(
        run_page.render(sample_runs.diff())
    )
    document = sample_runs.diff()
    document["values"]["by"] = "kind"
    page = run_page.render(document)
    assert "--by layer" in Page(page).text and "Steps" not in titles(page)


def test_a_sweep_compares_its_points(tmp_path):
    document = sample_runs.sweep(tmp_path)
    page = run_page.render(document)
    assert titles(page)[0] == "Points of the sweep" and "Accuracy against speedup" in figures(page)
    assert "Accuracy against size" in figures(page)
    found = tradeoff.candidates([runs.tell(document)])
    assert [(c.name, c.speedup, c.bytes) for c in found[:3]] == [
        ("weight=0.0", 1.1, 900),
        ("weight=0.1", 1.5, 700),
        ("weight=0.2", 1.4, 800),
    ]
    speed, size = tradeoff.scenes(found)
    # In speed the point at 1.1 is more accurate, the one at 1.4 is beaten; in size it is beaten, too.
    assert "fastest first: weight=0.1 93.0%, 1.5×; weight=0.0 95.0%, 1.1×." in speed.description
    assert "smallest first: weight=0.1" in size.description and "weight=0.2" not in size.description
    text = Page(page).text
    assert text.count("weight=0.2") >= 2 and "published 2 of 3 points" in text
    assert text.count("long (baseline)") == 2  # one line of sizes for all points, one of the comparison


def test_more_is_better_to_the_right():
    points = [tradeoff.Place(1.0, 0.9), tradeoff.Place(2.0, 0.8), tradeoff.Place(1.5, 0.7)]
    dots = [Dot(str(i), point) for i, point in enumerate(points)]
    assert scatter.best_of(dots, Plane("Accuracy", "Speedup", True, "")) == [1, 0]
    assert scatter.best_of(dots) == [0]


def test_agreement_compares_only_with_the_same_model(tmp_path):
    first, second = sample_runs.quantize(tmp_path / "a"), sample_runs.quantize(tmp_path / "b")
    second["output"]["bytes"] = 500
    found = tradeoff.candidates([runs.tell(first), runs.tell(second)])
    (scene,) = tradeoff.scenes(found)
    assert scene.title == "Top-1 agreement with pruned against size"
    second["model"]["name"] = "another"
    assert not tradeoff.scenes(tradeoff.candidates([runs.tell(first), runs.tell(second)]))


def test_a_document_given_twice_counts_once(tmp_path):
    document = sample_runs.run(tmp_path)
    assert run_page.render_all([document, copy.deepcopy(document)]) == run_page.render(document)


def test_runs_and_results_of_eval_share_a_page(tmp_path):
    document = sample_runs.run(tmp_path)
    other = sample_runs.evaluation("other", 0.7, 1500)
    page = run_page.render_all([document, other])
    text = Page(page).text
    assert "other" in text and "Accuracy against size" in figures(page)
    assert report.render([document, other]).decode() == page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


# ---- safe -----------------------------------------------------------------------------------------

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'|`]( https://e.example/\x1b[2J\u202e"


def hostile(value, keep=frozenset({"command", "status", "verb", "path", "sha256", "by"})):
    """Replace every text of a document, keys that people choose included."""
    if isinstance(value, dict):
        chosen = {"domains", "values", "dropped_because", "matrices", "losses", "inputs", "files"}
        return {
            k: ({f"{HOSTILE}{i}": hostile(v) for i, (_, v) in enumerate(entry.items())} if k in chosen and isinstance(entry, dict) and "by" not in entry
                else entry if k in keep else hostile(entry))
            for k, entry in value.items()
        }  # fmt: skip
    if isinstance(value, list):
        return [hostile(entry) for entry in value]
    return HOSTILE if isinstance(value, str) else value


def test_G6_names_in_runs_are_escaped(tmp_path):
    documents = [sample_runs.run(tmp_path / "run"), sample_runs.sweep(tmp_path / "sweep"), sample_runs.experts(tmp_path / "slim"),
                 sample_runs.quantize(tmp_path / "run" / "out"), sample_runs.diff()]  # fmt: skip
    plan = json.loads((tmp_path / "run" / "out" / "plan.json").read_text())
    for record in plan["records"]:
        record["label"] = f"model.layers.0.{HOSTILE}"
        record["scheme"] = HOSTILE
    for group in plan["allocation"]["groups"]:
        group["modules"] = [f"model.layers.0.{HOSTILE}.weight"]
        group["format"] = HOSTILE
    plan["sensitivity"] = HOSTILE
    plan["matrices"] = {HOSTILE: "kept"}
    (tmp_path / "run" / "out" / "plan.json").write_text(json.dumps(plan))
    made = hostile(sample_runs.manifest("quantize", ""))
    (tmp_path / "run" / "out" / "surgeon.json").write_text(json.dumps(made | {"plan": HOSTILE}))
    for document in documents:
        bad = hostile(document)
        if bad["command"] == "run":
            bad["error"] = {"code": HOSTILE, "message": HOSTILE, "help": HOSTILE}
        text = run_page.render(bad)
        page = Page(text)
        assert not {tag for tag, _ in page.tags} & {"script", "img", "iframe", "link", "object"}
        assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
        assert "\\x1b[2J\\u202e" in page.text  # shown, not run
        assert document["command"] == "diff" or "<script>alert(1)</script>" in page.text
        assert "\x1b" not in text and "\u202e" not in text
        table = run_page.markdown(bad)
        assert "<script" not in table and "<img" not in table and "](" not in table and "\x1b" not in table
        scene = run_page.drawing([bad])
        if scene is not None:
            ET.fromstring(report.render([bad], "svg"))


def test_the_page_needs_nothing_from_elsewhere(tmp_path):
    text = run_page.render(sample_runs.sweep(tmp_path))
    page = Page(text)
    assert "<script" not in text and "@import" not in text and "url(" not in text
    assert "default-src 'none'" in text and "prefers-color-scheme:dark" in text and "@media print" in text
    assert not [a for _, attributes in page.tags for a in attributes if a == "src"]
    links = [attributes["href"] for _, attributes in page.tags if "href" in attributes]
    assert all(link.startswith("#") and f'id="{link[1:]}"' in text for link in links)
    for drawn in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ET.fromstring(drawn)


def test_equal_documents_give_equal_bytes(tmp_path):
    document = sample_runs.sweep(tmp_path)
    assert run_page.render(document) == run_page.render(copy.deepcopy(document))


# ---- the command ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda d: d | {"status": 3}, "status"),
        (lambda d: d | {"recipe": None}, "recipe"),
        (lambda d: d | {"steps": {}}, "steps"),
        (lambda d: d | {"steps": {"a": 1}}, "steps"),
        (lambda d: d | {"points": [{"steps": [{"id": "x"}]}]}, r"points\[0\]\.steps\[0\]\.verb"),
        (lambda d: d | {"gates": [{"gate": "x"}]}, r"gates\[0\]\.passed"),
        (lambda d: d | {"steps": [{"id": "s", "verb": "eval", "status": "done", "document": {"status": "ok"}}]}, "model"),
    ],
)  # fmt: skip
def test_a_document_that_is_not_sound_is_refused(tmp_path, change, key):
    document = change(sample_runs.run(tmp_path))
    with pytest.raises(InputError, match=rf"E236.*{key} is"):
        report.validate(document)


def test_the_command_reports_runs(capsys, tmp_path):
    path = tmp_path / "result.json"
    path.write_text(json.dumps(sample_runs.run(tmp_path)))
    ran = command(capsys, "report", path, "--format", "markdown")
    assert ran.code == 0, ran.err
    assert "### Layers of quantized" in ran.out and "| 0 | 8 | 0.01 |" in ran.out
    ran = command(capsys, "report", path, "--json")
    assert ran.code == 0, ran.err
    document = json.loads(ran.out)
    assert document["gates"] == {"passed": 2, "failed": 0}
    assert (tmp_path / "result.html").read_text() == run_page.render(sample_runs.run(tmp_path))
    assert command(capsys, "report", path, "-o", tmp_path / "page.svg").code == 0
    ET.fromstring((tmp_path / "page.svg").read_text())


def test_png_has_every_chart(tmp_path):
    pytest.importorskip("matplotlib")
    content = report.render([sample_runs.run(tmp_path)], "png")
    assert content.startswith(b"\x89PNG")
    scene = run_page.drawing([sample_runs.run(tmp_path)])
    assert scene is not None
    assert int.from_bytes(content[20:24], "big") == pytest.approx(2 * scene.height, abs=2)


def test_results_of_eval_alone_are_as_before():
    results = sample_results.results()
    assert b"All models" in report.render(results) and b"Steps" not in report.render(results)
