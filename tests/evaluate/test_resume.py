"""Interrupted evaluations continue and end with the same numbers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from running_sums import MODELS

from surgeon.calibrate import data

REPOSITORY = Path(__file__).resolve().parents[2]
OPTIONS = ["--max-new-tokens", "200", "--threads", "1", "--batch-size", "2", "--samples", "2", "--quiet"]
TIMES = ("seconds", "timing", "notes")


def lasting(document):
    return {k: v for k, v in document.items() if k not in TIMES}


def start(arguments):
    code = "import sys; from surgeon.cli.app import run; sys.exit(run('eval', sys.argv[1:]))"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], env=environment, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True)  # fmt: skip


def wait_for_lines(path, count):
    limit = time.monotonic() + 120
    while time.monotonic() < limit:
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.02)
    raise AssertionError("no replies were written")


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_run_that_was_ended_continues_to_the_same_result(surgeon, question_file, tmp_path, how):
    file, result = question_file(9), tmp_path / "r.json"
    arguments = [MODELS / "long", "--questions", file, *OPTIONS]
    process = start([*arguments, "-o", result])
    work = tmp_path / "r.replies.jsonl"
    wait_for_lines(work, 3)
    process.send_signal(how)
    process.communicate(timeout=60)
    assert process.returncode == (143 if how == signal.SIGTERM else -9) and not result.exists()
    kept = work.read_bytes().count(b"\n")
    assert 3 <= kept < 18
    with work.open("ab") as stream:
        stream.write(b'{"prompt": "torn')
    again = surgeon(*arguments, "-o", result, "--json")
    assert again.code == 0 and f"{kept} of 18 replies were there already" in " ".join(again.document["notes"])
    assert not work.exists()
    undisturbed = surgeon(*arguments, "--json")
    assert lasting(again.document) == lasting(undisturbed.document)


def kept_replies(surgeon, question_file, tmp_path):
    file, samples = question_file(5), tmp_path / "samples.jsonl"
    arguments = [MODELS / "short", "--questions", file, "--max-new-tokens", 100, "--samples-out", samples]
    assert surgeon(*arguments).code == 0
    return arguments, samples


def test_a_finished_run_is_not_repeated(surgeon, question_file, tmp_path, monkeypatch):
    arguments, samples = kept_replies(surgeon, question_file, tmp_path)
    before = samples.read_bytes()
    monkeypatch.setattr(
        "surgeon.evaluate.generate.generate", lambda *a, **k: pytest.fail("replies were made again")
    )
    assert surgeon(*arguments).code == 0
    assert samples.read_bytes() == before


def test_more_questions_and_other_judgement_reuse_replies(surgeon, question_file, tmp_path):
    arguments, samples = kept_replies(surgeon, question_file, tmp_path)
    question_file(7)
    found = surgeon(*arguments, "--match", r"regex:answer:(\d+)", "--json").document
    assert "5 of 7 replies were there already" in " ".join(found["notes"])
    assert len(samples.read_text().splitlines()) == 7


@pytest.mark.parametrize(
    ("change", "words"),
    [(["--max-new-tokens", "101"], "max_new_tokens 100 there, 101 here"), (["--temperature", "0.5"], "temperature"), (["--no-template"], "template")],
)  # fmt: skip
def test_other_settings_are_refused_and_can_start_over(surgeon, question_file, tmp_path, change, words):
    arguments, samples = kept_replies(surgeon, question_file, tmp_path)
    before = samples.read_bytes()
    ran = surgeon(*arguments, *change)
    assert ran.code == 6 and "error[E605]" in ran.err and words in ran.err
    assert samples.read_bytes() == before
    assert surgeon(*arguments, *change, "--no-resume").code == 0
    assert samples.read_bytes() != before and len(samples.read_text().splitlines()) == 5


def test_other_weights_behind_equal_headers_are_another_model(surgeon, question_file, tmp_path):
    moved = tmp_path / "model"
    shutil.copytree(MODELS / "short", moved)
    arguments, _ = kept_replies(surgeon, question_file, tmp_path)
    arguments[0] = moved
    assert surgeon(*arguments).code == 0  # the same model elsewhere
    with (moved / "model.safetensors").open("r+b") as stream:
        stream.seek(-2, os.SEEK_END)
        stream.write(b"\x01\x3c")
    ran = surgeon(*arguments)
    assert ran.code == 6 and "another model" in ran.err


def test_foreign_and_damaged_files_are_not_appended_to(surgeon, question_file, tmp_path):
    arguments, samples = kept_replies(surgeon, question_file, tmp_path)
    lines = samples.read_text().splitlines()
    samples.write_text("\n".join([lines[0], "oops", *lines[2:]]) + "\n")
    damaged = surgeon(*arguments)
    assert damaged.code == 3 and "E395" in damaged.err and ":2" in damaged.err
    samples.write_text('{"prompt": "mine", "response": "keep"}\n')
    for option in ([], ["--no-resume"]):
        foreign = surgeon(*arguments, *option)
        assert foreign.code == 6 and "E601" in foreign.err
        assert samples.read_text() == '{"prompt": "mine", "response": "keep"}\n'


def test_two_runs_cannot_write_one_file(surgeon, question_file, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    arguments, samples = kept_replies(surgeon, question_file, tmp_path)
    with samples.open("ab") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        ran = surgeon(*arguments)
    assert ran.code == 6 and "E603" in ran.err


def test_kept_replies_are_calibration_data(surgeon, question_file, tmp_path):
    """What one command writes another reads: prompts with responses, and messages."""
    file = question_file(3, "s.jsonl", system="Add.")
    plain = question_file(3)
    samples = tmp_path / "samples.jsonl"
    ran = surgeon(
        MODELS / "short",
        "--questions",
        file,
        "--questions",
        plain,
        "--max-new-tokens",
        100,
        "--samples-out",
        samples,
    )
    assert ran.code == 0
    found = data.load(str(samples), MODELS / "short", samples=6)
    replies = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(found.samples) == 6 and all(s.answer_start > 0 for s in found.samples)
    assert any("messages" in r for r in replies) and any("prompt" in r for r in replies)
