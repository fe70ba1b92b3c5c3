"""Fault group J as far as evaluation goes: gates, what has no value, limits, staged models."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest

TESTS = Path(__file__).resolve().parents[1]
MODELS = TESTS / "models"
sys.path[:0] = [str(MODELS), str(TESTS / "cli")]

import commands  # noqa: E402
import task  # noqa: E402

from surgeon import api  # noqa: E402
from surgeon.evaluate import metrics, run  # noqa: E402


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "q.jsonl"
    chosen = itertools.islice(task.questions("test", 0), 8)
    path.write_text("\n".join(json.dumps({"question": q.text, "answer": q.answer}) for q in chosen))
    return path


@pytest.fixture
def evaluated(capsys, questions):
    def evaluate(*arguments, model=MODELS / "short"):
        return commands.run(
            capsys,
            "eval",
            model,
            "--questions",
            questions,
            "--max-new-tokens",
            120,
            "--threads",
            1,
            *arguments,
        )

    return evaluate


def test_J2_failed_gate_exits_4_and_keeps_result_and_report(evaluated, tmp_path):
    ran = evaluated("--gate", "accuracy > 2 / 1", "--gate", "tokens_mean > 1", "--json",
                    "-o", tmp_path / "r.json", "--report", tmp_path / "r.md")  # fmt: skip
    assert ran.code == 4
    document = ran.document
    assert (
        document["status"] == "gate-failed"
        and document["exit_code"] == 4
        and document["error"]["code"] == "E401"
    )
    first, second = document["gates"]
    assert (first["passed"], first["threshold"]) == (False, 2.0)
    assert first["value"] == document["metrics"]["accuracy"]["value"]
    assert second["passed"] and second["threshold"] == 1.0
    kept = json.loads((tmp_path / "r.json").read_text())
    assert kept["status"] == "gate-failed"
    assert kept["gates"] == document["gates"] and kept["metrics"] == document["metrics"]
    assert "**Gates: FAILED** (1 of 2 hold)" in (tmp_path / "r.md").read_text()
    assert "error[E401]" in ran.err


def test_J2_all_failed_gates_are_named(evaluated):
    ran = evaluated("--gate", "accuracy > 2", "--gate", "accuracy > 3", "--gate", "cap_rate <= 1")
    assert (
        ran.code == 4 and "threshold 2" in ran.err and "threshold 3" in ran.err and "gate passed" in ran.out
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
@pytest.mark.parametrize(
    "gate", ["accuracy >= 0", "accuracy <= 1", "accuracy > -1e9", "accuracy == accuracy"]
)
def test_J8_nan_never_passes(evaluated, monkeypatch, value, gate):
    if gate.endswith("accuracy"):
        assert evaluated("--gate", gate).code == 2
        return
    genuine = metrics.measure

    def measure(*arguments, **options):
        found = genuine(*arguments, **options)
        return {**found, "accuracy": metrics._metric(np.nan if value is None else value, None, 8)}

    monkeypatch.setattr(run.metrics, "measure", measure)
    ran = evaluated("--gate", gate, "--json")
    assert ran.code == 4 and ran.document["error"]["code"] == "E402"
    assert ran.document["gates"][0]["value"] is None and not ran.document["gates"][0]["passed"]


def test_J8_metric_that_is_not_measured_is_refused_before_the_work(evaluated, monkeypatch):
    monkeypatch.setattr(run, "load", lambda *a, **k: pytest.fail("a model was loaded"))
    ran = evaluated("--gate", "perplexity < 9")
    assert ran.code == 2 and "does not measure" in ran.err


def test_J8_missing_task_metric_never_passes(evaluated, monkeypatch):
    from surgeon.evaluate import harness

    monkeypatch.setattr(harness, "require", lambda: None)
    monkeypatch.setattr(
        harness,
        "run_tasks",
        lambda *a, **k: {"task:sums:acc": {"value": 1.0, "low": None, "high": None, "n": 8}},
    )
    ran = evaluated(
        "--tasks", "sums", "--gate", "task:sums:acc >= 1", "--gate", "task:sums:f1 >= 0", "--json"
    )
    assert ran.code == 4 and [g["passed"] for g in ran.document["gates"]] == [True, False]
    assert ran.document["error"]["code"] == "E402"


def test_J8_baseline_without_the_metric_never_passes(evaluated, tmp_path):
    evaluated("-o", tmp_path / "base.json", "-q")
    found = json.loads((tmp_path / "base.json").read_text())
    assert "perplexity" not in found["metrics"]
    text = tmp_path / "t.txt"
    text.write_text("Add 1+2. " * 20)
    ran = evaluated(
        "--perplexity",
        text,
        "--baseline",
        tmp_path / "base.json",
        "--gate",
        "perplexity < 1e9 * baseline",
        "--json",
    )
    assert ran.code == 4 and ran.document["gates"][0]["threshold"] is None


def test_J8_limited_runs_are_labelled_and_do_not_gate_unless_allowed(evaluated, monkeypatch):
    allowed = evaluated("--limit", 3, "--gate", "tokens_mean > 1", "--gate-limited", "--json")
    assert (
        allowed.code == 0
        and allowed.document["settings"]["limited"] is True
        and allowed.document["settings"]["limit"] == 3
    )
    assert any("limited run" in w for w in allowed.document["warnings"])
    plain = evaluated("--limit", 3)
    assert plain.code == 0 and "LIMITED" in plain.out and "limited run" in plain.err
    whole = evaluated("--limit", 8, "--gate", "tokens_mean > 1", "--json")  # leaves nothing out
    assert whole.code == 0 and whole.document["settings"]["limited"] is False
    monkeypatch.setattr(run, "load", lambda *a, **k: pytest.fail("a model was loaded"))
    refused = evaluated("--limit", 3, "--gate", "tokens_mean > 1")
    assert refused.code == 2 and "error[E227]" in refused.err and "--gate-limited" in refused.err


def test_J8_replies_cut_by_the_length_limit_are_counted_and_warned_about(evaluated):
    ran = evaluated("--max-new-tokens", 20, "--json")
    assert ran.document["metrics"]["cap_rate"]["value"] > 0.9
    assert any("hit the length limit" in w for w in ran.document["warnings"])


def test_J10_a_staged_model_is_evaluated_before_it_is_published(evaluated, tmp_path, monkeypatch):
    """The finished staging folder loads and gives what the published model gives."""
    from surgeon import execute

    staged, destination_was_there = [], []
    publish = execute.stage.publish

    def look_first(place, **options):
        destination_was_there.append(place.destination.exists())
        staged.append(evaluated("--json", model=place.model).document)
        return publish(place, **options)

    monkeypatch.setattr(execute.stage, "publish", look_first)
    destination = tmp_path / "merged"
    api.merge([str(MODELS / "long"), str(MODELS / "short")], method="linear", output=destination)
    published = evaluated("--json", model=destination).document
    assert ".merged.surgeon-" in staged[0]["model"]["path"] and destination_was_there == [False]
    assert staged[0]["metrics"] == published["metrics"]
    assert staged[0]["model"]["sha256"] == published["model"]["sha256"]
