"""``surgeon recipe`` and ``surgeon run`` on recipes: what is printed, exit codes, JSON."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import commands
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "pipeline"))
from recipe_runs import EXPORT, MODELS, recipe

from surgeon.cli import recipe as command


@pytest.fixture
def surgeon(capsys):
    """Run ``surgeon recipe`` in this process."""

    def run(*arguments: object) -> commands.Ran:
        try:
            command.app([str(one) for one in arguments], prog_name="surgeon recipe")
        except SystemExit as ending:
            code = int(ending.code or 0)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err and code != 1, captured.err
        return commands.Ran(code, captured.out, captured.err)

    return run


def test_validate_says_which_file_is_wrong_and_where(surgeon, tmp_path):
    good = recipe(tmp_path)
    bad = recipe(tmp_path, "gates: [foo >= 1]\npublish: {step: nobody}\n", name="bad.yaml")
    merge = tmp_path / "merge.yml"
    merge.write_text(
        "merge_method: linear\nmodels:\n  - {model: a/b, parameters: {weight: 1}}\n  - {model: c/d, parameters: {weight: 1}}\n"
    )
    ran = surgeon("validate", good, merge)
    assert ran.code == 0 and ran.out.splitlines() == [f"valid     {good}", f"valid     {merge}"]
    ran = surgeon("validate", good, bad)
    assert (
        ran.code == 2
        and f"--> {bad}:12:9" in ran.err
        and f"--> {bad}:13:17" in ran.err
        and "E2009" in ran.err
        and "E226" in ran.err
    )
    found = surgeon("validate", good, bad, "--json").document
    assert (
        [row["valid"] for row in found["files"]] == [True, False]
        and found["exit_code"] == 2
        and found["status"] == "failed"
    )
    assert found["error"]["where"]["line"] == 12 and len(found["error"]["others"]) == 1


def test_validate_looks_for_inputs_when_asked(surgeon, tmp_path):
    path = recipe(tmp_path)
    assert surgeon("validate", path, "--set", "models.long=./nowhere").code == 0
    ran = surgeon("validate", path, "--set", "models.long=./nowhere", "--inputs")
    assert ran.code == 2 and "E2005" in ran.err and "nowhere" in ran.err


def test_warnings_count_when_strict(surgeon, tmp_path):
    path = recipe(tmp_path, "data: {spare: x.jsonl}\n")
    ran = surgeon("validate", path)
    assert ran.code == 0 and "spare" in ran.err
    assert surgeon("validate", path, "--strict").code == 2


def test_show_prints_what_a_run_would_do(surgeon, tmp_path):
    import yaml

    path = recipe(tmp_path, EXPORT, "defaults: {max_shard_size: 2MB}\n")
    found = yaml.safe_load(surgeon("show", path, "--set", "steps.merged.merge.models.0.weight=0.5").out)
    assert found["models"]["long"] == str(MODELS / "long")
    assert (
        found["steps"][0]["merge"]["weight"] == [0.5]
        and found["steps"][1]["export"]["max_shard_size"] == 2_000_000
    )
    assert surgeon("show", path, "--json").document["recipe"]["publish"] == {
        "step": "wide",
        "when": "on_pass",
    }


def test_schema_is_one_json_document(surgeon):
    ran = surgeon("schema")
    assert ran.code == 0 and ran.document["properties"]["version"] == {"const": 1}


def test_list_and_copy(surgeon, tmp_path):
    listed = surgeon("list")
    assert "merge-prune-quantize" in listed.out and "qwen2.5-7b-ties" in listed.out
    names = {row["name"]: row["folder"] for row in surgeon("list", "--json").document["recipes"]}
    assert names["merge-prune-quantize"] == "pipelines"
    heads = [line.partition(":")[0] for line in listed.out.splitlines() if not line.startswith(" ")]
    assert heads == ["prune", "experts", "quantize", "mixed-precision", "pipelines", "long-to-short"]
    pruning = listed.out[: listed.out.index("experts:")]
    assert "  prune-drop-layers  " in pruning and "merge-prune-quantize" not in pruning
    assert listed.out.count("trained from\n") == 2, (
        "the first sentence of a comment, however many lines it has"
    )
    target = tmp_path / "my.yaml"
    assert surgeon("copy", "merge-prune-quantize", target).code == 0 and surgeon("validate", target).code == 0
    again = surgeon("copy", "merge-prune-quantize", target)
    assert again.code == 6 and "E601" in again.err
    assert (
        surgeon("copy", "pipelines/merge-prune-quantize", tmp_path).code == 0
        and (tmp_path / "merge-prune-quantize.yaml").is_file()
    )
    unknown = surgeon("copy", "merge-prune-quantise")
    assert unknown.code == 2 and 'did you mean "merge-prune-quantize"' in unknown.err


def test_shipped_recipes_are_validated_and_shown_by_name(surgeon, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = surgeon("validate", "prune-drop-layers", "long-to-short/qwen2.5-7b-ties")
    assert ran.code == 0 and ran.out.splitlines() == [
        "valid     prune-drop-layers",
        "valid     long-to-short/qwen2.5-7b-ties",
    ]
    shown = surgeon("show", "prune-drop-layers", "--set", "steps.pruned.prune.target.sparsity=0.5", "--json")
    assert shown.document["recipe"]["steps"][0]["prune"]["sparsity"] == [0.5]
    merge = surgeon("show", "qwen2.5-7b-ties")
    assert (
        merge.code == 0 and "merge_method: ties" in merge.out.splitlines() and merge.out.startswith("# TIES")
    )
    assert surgeon("show", "qwen2.5-7b-ties", "--json").document["recipe"]["merge_method"] == "ties"
    assert "E208" in surgeon("show", "qwen2.5-7b-ties", "--set", "seed=1").err
    unknown = surgeon("validate", "prune-drop-layer")
    assert unknown.code == 2 and "E2013" in unknown.err and 'did you mean "prune-drop-layers"' in unknown.err
    assert "E250" in surgeon("validate", "prune-drop-layer.yaml").err
    # A run publishes under the recipe's name: such a folder does not hide the recipe, a file does.
    (tmp_path / "prune-drop-layers").mkdir()
    assert surgeon("validate", "prune-drop-layers").code == 0
    (tmp_path / "sparse-2-of-4").write_text("version: 1\n")
    assert "E2011" in surgeon("validate", "sparse-2-of-4").err


def test_run_prints_steps_gates_and_the_model(capsys, scratch):
    path = recipe(scratch, EXPORT, "gates: [bytes <= 1GB]\n")
    ran = commands.run(capsys, "run", path, "-o", scratch / "out", "--threads", 1)
    assert (
        ran.code == 0
        and f"wrote     {scratch / 'out'}" in ran.out
        and "gate passed   bytes <= 1GB" in ran.out
    )
    assert "merged  merge   done" in ran.out
    again = commands.run(capsys, "run", path, "-o", scratch / "out", "--threads", 1)
    assert f"unchanged {scratch / 'out'}" in again.out


def test_run_json_is_one_document_whatever_happens(capsys, scratch):
    path = recipe(scratch, EXPORT, "gates: [bytes <= 1KB]\n")
    ran = commands.run(capsys, "run", path, "-o", scratch / "out", "--threads", 1, "--json")
    found = ran.document
    assert (
        ran.code == 4
        and found["status"] == "gate-failed"
        and found["exit_code"] == 4
        and found["command"] == "run"
    )
    assert (
        found["gates"][0]["value"] > found["gates"][0]["threshold"] == 1000
        and found["error"]["code"] == "E401"
    )
    assert "error[E401]" in ran.err and "nothing was published" in ran.err
    assert [step["status"] for step in found["steps"]] == ["done", "done"] and not found["published"]
    (scratch / "full").mkdir()
    (scratch / "full" / "file.bin").write_bytes(b"x")
    failed = commands.run(capsys, "run", path, "-o", scratch / "full", "--json")
    assert (
        failed.code == 6
        and failed.document["error"]["code"] == "E604"
        and failed.document["status"] == "failed"
    )


def test_a_dry_run_says_what_waits(capsys, scratch):
    ran = commands.run(capsys, "run", recipe(scratch, EXPORT), "-o", scratch / "out", "--dry-run")
    assert (
        ran.code == 0
        and "waits for merged" in ran.out
        and "nothing was written" in ran.out
        and not (scratch / "out.work").exists()
    )


@pytest.mark.parametrize(
    ("kind", "option"),
    [
        ("recipe", ["--mergekit-quirks"]), ("recipe", ["--weights", "index"]), ("recipe", ["--allow-pickle"]),
        ("mergekit", ["--set", "a=b"]), ("mergekit", ["--only", "x"]), ("mergekit", ["--no-gates"]), ("mergekit", ["--publish", "always"]),
    ],
)  # fmt: skip
def test_an_option_of_the_other_kind_of_file_is_refused(capsys, tmp_path, kind, option):
    path = recipe(tmp_path)
    if kind == "mergekit":
        path.write_text(
            f"merge_method: linear\nmodels: [{{model: {MODELS}/long, parameters: {{weight: 1}}}}]\n"
        )
    ran = commands.run(capsys, "run", path, "-o", tmp_path / "out", *option)
    assert ran.code == 2 and "E208" in ran.err and not (tmp_path / "out").exists()


def test_publish_takes_two_words(capsys, tmp_path):
    ran = commands.run(capsys, "run", recipe(tmp_path), "--publish", "sometimes")
    assert ran.code == 2 and "on-pass" in ran.err


@pytest.mark.slow
def test_a_signal_stops_the_run_and_the_same_command_goes_on(scratch):
    path = recipe(scratch, EXPORT)
    line = [
        sys.executable,
        "-m",
        "surgeon",
        "run",
        str(path),
        "-o",
        str(scratch / "out"),
        "--json",
        "--threads",
        "1",
    ]
    with open(scratch / "stdout", "w") as stdout:
        child = subprocess.Popen(line, stdout=stdout, stderr=subprocess.DEVNULL)
        state = scratch / "out.work" / "state" / "merged.json"
        while not state.exists() and child.poll() is None:
            time.sleep(0.005)
        child.send_signal(signal.SIGINT)
        code = child.wait(timeout=120)
    found = json.loads((scratch / "stdout").read_text())
    if code == 130:
        assert found["steps"][0]["status"] == "done" and found["steps"][1]["status"] in ("failed", "skipped")
        assert found["exit_code"] == 130 and not (scratch / "out").exists()
    else:  # the signal came when all was done
        assert code == 0 and found["published"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout)["steps"][0]["status"] == "unchanged"
