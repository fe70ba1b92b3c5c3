"""``surgeon report``: exit codes, messages, files; reading result documents."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sample_results

from surgeon import report
from surgeon.errors import EnvironmentFault, InputError, OutputConflict, UsageError

sys.path.insert(0, str(Path(__file__).parents[1] / "cli"))

from commands import run


@pytest.fixture
def files(tmp_path):
    """One result file per model, in the order of the sample."""
    found = []
    for result in sample_results.results():
        path = tmp_path / f"{result['model']['name'].replace(' ', '-')}.json"
        path.write_text(json.dumps(result))
        found.append(path)
    return found


def test_html_beside_the_first_result(capsys, files):
    ran = run(capsys, "report", *files)
    assert ran.code == 0, ran.err
    page = files[0].parent / "report.html"
    assert page.read_bytes() == report.render(sample_results.results())
    assert str(page) in ran.out
    assert "front     short, ties 0.05, slerp, base, ties 0.2" in ran.out
    assert "note: Answers were cut off" in ran.err
    assert run(capsys, "report", *files).code == 0  # an earlier report is replaced
    assert run(capsys, "report", files[0]).code == 0
    assert (files[0].parent / "long.html").exists()


def test_a_foreign_file_in_the_default_place_is_kept(capsys, files):
    foreign = files[0].parent / "report.html"
    foreign.write_text("<h1>mine</h1>")
    ran = run(capsys, "report", *files)
    assert ran.code == 6 and "E601" in ran.err
    assert foreign.read_text() == "<h1>mine</h1>"
    assert run(capsys, "report", *files, "-o", foreign).code == 0


def test_markdown_goes_to_stdout(capsys, files):
    ran = run(capsys, "report", *files, "--format", "markdown", "-q")
    assert ran.code == 0
    assert ran.out.encode() == report.render(sample_results.results(), "markdown")
    assert ran.err == ""


@pytest.mark.parametrize("suffix", [".html", ".md", ".svg", ".png", ".HTM"])
def test_the_suffix_chooses(capsys, files, tmp_path, suffix):
    if suffix == ".png":
        pytest.importorskip("matplotlib")
    path = tmp_path / f"out{suffix}"
    assert run(capsys, "report", *files, "-o", path).code == 0
    form = report.format_of(path)
    assert path.read_bytes() == report.render(sample_results.results(), form)
    if os.name == "posix":
        mask = os.umask(0)
        os.umask(mask)
        assert path.stat().st_mode & 0o777 == 0o666 & ~mask
    assert not list(tmp_path.glob(".surgeon-report-*"))


def test_title_and_plot_options_arrive(capsys, files):
    ran = run(capsys, "report", *files, "--format", "svg", "-o", "-", "--log-tokens", "--iso-lines")
    assert ran.code == 0
    assert ran.out.encode() == report.render(sample_results.results(), "svg", log_tokens=True, iso_lines=True)
    assert "## My sweep" in run(capsys, "report", *files, "--format", "md", "--title", "My sweep").out


def test_json(capsys, files, tmp_path):
    document = run(capsys, "report", *files, "-o", tmp_path / "r.html", "--json").document
    assert document["status"] == "ok" and document["command"] == "report"
    assert document["front"] == ["short", "ties 0.05", "slerp", "base", "ties 0.2"]
    assert document["gates"] == {"passed": 2, "failed": 1}
    assert document["output"] == {
        "path": str(tmp_path / "r.html"),
        "bytes": (tmp_path / "r.html").stat().st_size,
    }
    text = run(capsys, "report", *files, "--format", "markdown", "--json").document["text"]
    assert text.encode() == report.render(sample_results.results(), "markdown")


def test_a_list_of_results(tmp_path):
    path = tmp_path / "all.json"
    path.write_text(json.dumps(sample_results.results()))
    assert report.load([path]) == sample_results.results()
    path.write_text(json.dumps([*sample_results.results()[:2], {"schema": 7}]))
    with pytest.raises(InputError, match=r"E234.*all\.json\[2\]: schema is 7; this version reads 1"):
        report.load([path])


def changed(**keys) -> dict:
    return sample_results.result("slerp") | keys


def with_metric(key: str, value: object) -> dict:
    result = sample_results.result("slerp")
    result["metrics"][key] = value
    return result


def within(path: str, value: object) -> dict:
    result = copy.deepcopy(sample_results.result("slerp"))
    *parents, last = path.split(".")
    place = result
    for parent in parents:
        place = place[parent]
    place[last] = value
    return result


@pytest.mark.parametrize(
    ("document", "code", "words"),
    [
        ({"a": 1}, "E234", 'has no key "schema"'),
        (3, "E234", "holds a number"),
        ([], "E234", "the list is empty"),
        (changed(schema=2), "E234", "schema is 2; this version reads 1"),
        (changed(schema=True), "E234", "schema is true"),
        (changed(command="inspect"), "E234", 'command is "inspect"'),
        (changed(status="failed", error={"message": "out of memory"}), "E234", 'status is "failed": out of memory'),
        (changed(metrics=None), "E236", "metrics is missing"),
        (changed(model={}), "E236", "model.name is missing"),
        (changed(model="x"), "E236", 'model is "x", not an object'),
        (with_metric("accuracy", "high"), "E236", 'metrics.accuracy is "high", not a number'),
        (with_metric("accuracy", {"value": 1.2}), "E236", "metrics.accuracy.value is 1.2, not between 0 and 1"),
        (with_metric("accuracy", 98.0), "E236", "metrics.accuracy is 98.0, not between 0 and 1"),
        (with_metric("accuracy", {"low": 0.1}), "E236", "metrics.accuracy.value is missing"),
        (with_metric("accuracy", True), "E236", "metrics.accuracy is true, not a number"),
        (with_metric("tokens_mean", {"value": -1}), "E236", "metrics.tokens_mean.value is -1, not at least 0"),
        (with_metric("perplexity", {"value": 1, "low": 3, "high": 2}), "E236", "metrics.perplexity.low is 3, not at most high, 2"),
        (with_metric("perplexity", 10**400), "E236", "metrics.perplexity is 1000"),
        (within("groups.domain", []), "E236", "groups.domain is [], not an object"),
        (within("groups.domain.words", 3), "E236", "groups.domain.words is 3"),
        (within("baseline.name", ""), "E236", 'baseline.name is ""'),
        (within("baseline.paired.tokens_ratio", {"value": "x"}), "E236", "baseline.paired.tokens_ratio.value"),
        (within("baseline.paired.mcnemar", {"p_value": "x"}), "E236", "baseline.paired.mcnemar.p_value"),
        (changed(gates="x"), "E236", 'gates is "x", not a list'),
        (changed(gates=[{"text": "a", "passed": 1}]), "E236", "gates[0].passed is 1, not true or false"),
        (changed(warnings=[1]), "E236", "warnings is [1], not a list of sentences"),
        (within("model.manifest", {"a": 1}), "E236", "model.manifest"),
    ],
)  # fmt: skip
def test_documents_that_are_none(capsys, tmp_path, document, code, words):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(document))
    ran = run(capsys, "report", path)
    assert ran.code == 3
    assert f"error[{code}]:" in ran.err and words in ran.err and "bad.json" in ran.err
    assert os.listdir(tmp_path) == ["bad.json"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it is empty"),
        (b"{", "it is not JSON"),
        (b'{"a": NaN}', "NaN is not a number of JSON"),
        (b'{"a": 1, "a": 2}', 'the key "a" occurs twice'),
        (b"\xff\xfe{}", "byte 0 is not UTF-8"),
        (b"[" * 100_000, "it is not JSON"),
        (b"\x89PNG\r\n", "not UTF-8"),
    ],
)
def test_files_that_are_no_json(capsys, tmp_path, content, words):
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    ran = run(capsys, "report", path)
    assert ran.code == 3 and "E234" in ran.err and words in ran.err


def test_missing_files_and_folders(capsys, tmp_path):
    assert "E301" in run(capsys, "report", tmp_path / "none.json").err
    ran = run(capsys, "report", tmp_path)
    assert ran.code == 3 and "is a folder without surgeon.json" in ran.err


def test_a_manifest_joins_its_model(capsys, tmp_path):
    folder = tmp_path / "merged"
    folder.mkdir()
    manifest = sample_results.manifest("dare_ties", {"lambda": 0.7}, 0.3)
    (folder / "surgeon.json").write_text(json.dumps(manifest))
    by_path, by_name = sample_results.result("long"), sample_results.result("short")
    by_path["model"]["path"] = str(folder)
    for given in (folder, folder / "surgeon.json"):
        results = tmp_path / "r.json"
        results.write_text(json.dumps([by_path, by_name]))
        first, second = report.load([results, given])
        assert first["model"]["manifest"] == manifest and "manifest" not in second["model"]
    by_name["model"]["name"] = "merged"
    results.write_text(json.dumps([sample_results.result("long"), by_name]))
    assert report.load([results, folder])[1]["model"]["manifest"] == manifest
    assert "dare-ties" in run(capsys, "report", results, folder, "--format", "markdown").out
    results.write_text(json.dumps(sample_results.result("long")))
    ran = run(capsys, "report", results, folder)
    assert ran.code == 2 and "E235" in ran.err and "evaluated: long" in ran.err
    ran = run(capsys, "report", folder)
    assert ran.code == 2 and "no result among the files" in ran.err


def test_a_real_manifest_is_read():
    from surgeon.report import provenance

    made = provenance.read(sample_results.manifest("dare_ties", {"lambda": 0.7, "int8_mask": False}, 0.3))
    assert made.method == "dare-ties"
    assert made.inputs == (
        ("long", "weight 1, density 0.3", "a2d0126b9b21 ee2411863449"),
        ("short", "base", "fc30de8a643a"),
    )
    assert made.parameters == (("lambda", "0.7"), ("precision", "float32"), ("seed", "0"))
    assert provenance.read({"program": {}, "plan": "x", "verb": "prune"}).method == "prune"
    provenance.read(
        {"program": 3, "plan": None, "verb": None, "recipe": {"modules": [3, {"slices": "x"}]}, "inputs": [1]}
    )


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--format", "pdf"], 2, 'error[E237]: --format is "pdf"'),
        (["--format", "htlm"], 2, 'did you mean "html"?'),
        (["-o", "x.pdf"], 2, 'the suffix of x.pdf is ".pdf"'),
        (["-o", "x.svg", "--format", "html"], 2, "does not fit -o x.svg"),
        (["-o", "-", "--format", "png"], 2, "E237"),
        (["-o", "none/x.html"], 5, "E503"),
        (["-o", "folder.html"], 6, "E601"),
        (["-o", "long.json"], 2, "E237"),
        (["--nonsense"], 2, "No such option"),
    ],
)
def test_refusals(capsys, files, monkeypatch, arguments, code, words):
    monkeypatch.chdir(files[0].parent)
    Path("folder.html").mkdir()
    before = files[0].read_bytes()
    ran = run(capsys, "report", *files, *arguments)
    assert ran.code == code and words in ran.err
    assert files[0].read_bytes() == before


def test_an_input_is_never_overwritten(capsys, files):
    twin = files[0].with_suffix(".html")
    files[0].rename(twin)
    ran = run(capsys, "report", twin, "-o", twin)
    assert ran.code == 6 and "E602" in ran.err
    ran = run(capsys, "report", twin)  # the default place is the input itself
    assert ran.code == 6


def test_nothing_to_plot(capsys, tmp_path):
    result = sample_results.result("long")
    result["metrics"] = {"perplexity": {"value": 7.0}}
    path = tmp_path / "r.json"
    path.write_text(json.dumps(result))
    ran = run(capsys, "report", path, "--format", "svg")
    assert ran.code == 2 and "E238" in ran.err
    assert run(capsys, "report", path).code == 0


def test_png_without_matplotlib(capsys, files, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    ran = run(capsys, "report", *files, "--format", "png")
    assert ran.code == 5 and "E512" in ran.err and "pip install matplotlib" in ran.err


def test_the_library_refuses_alike(tmp_path):
    results = sample_results.results()
    with pytest.raises(UsageError, match="E235"):
        report.write([], tmp_path / "r.html")
    with pytest.raises(UsageError, match="E237"):
        report.render(results, "pdf")
    with pytest.raises(InputError, match=r"results\[1\]"):
        report.render([results[0], {}])
    with pytest.raises(OutputConflict, match="E601"):
        (tmp_path / "d.html").mkdir()
        report.write(results, tmp_path / "d.html")
    with pytest.raises(EnvironmentFault, match="E503"):
        report.write(results, tmp_path / "none" / "r.html")
    assert report.write(results, tmp_path / "r.md", title="T").read_text().startswith("## T\n")
    assert results == sample_results.results()  # what was given stays as it was


def test_a_failed_write_leaves_the_old_report(tmp_path, monkeypatch):
    path = tmp_path / "r.html"
    path.write_text("old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EnvironmentFault, match=r"E505.*No space left"):
        report.write(sample_results.results(), path)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["r.html"]


def test_reports_need_nothing_heavy():
    code = (
        "import sys, json; from surgeon.report import render; d = json.load(sys.stdin); "
        "[render(d, f) for f in ('svg', 'html', 'markdown')]; print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], input=json.dumps(sample_results.results()), capture_output=True,
                          text=True, check=True, env={"PYTHONPATH": ":".join(sys.path)})  # fmt: skip
    loaded = {m.partition(".")[0] for m in done.stdout.split()}
    assert not loaded & {"torch", "transformers", "numpy", "numba", "matplotlib", "typer", "pydantic"}
