"""Faults H3, H7 and H9: GPUs that are absent or full, packages that are absent or old, runs that take hours."""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parents[1]
MODELS = TESTS / "models"
sys.path[:0] = [str(MODELS), str(TESTS / "cli")]

import commands  # noqa: E402

from surgeon.cli import output  # noqa: E402
from surgeon.evaluate import generate  # noqa: E402
from surgeon.python import diagnosis as doctor  # noqa: E402


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(
        "".join(json.dumps({"question": f"What is {n} + {n}?", "answer": 2 * n}) + "\n" for n in range(6))
    )
    return path


@pytest.fixture
def evaluate(capsys, questions):
    def evaluate(*arguments):
        return commands.run(
            capsys,
            "eval",
            MODELS / "short",
            "--questions",
            questions,
            "--max-new-tokens",
            8,
            "--threads",
            1,
            *arguments,
        )

    return evaluate


@pytest.fixture
def memory_for(monkeypatch):
    """Let a batch of more replies than this exhaust the device; return the sizes of batches that were begun."""

    def limit(most: int) -> list[int]:
        begun: list[int] = []
        begin, advance = generate._Batch.__init__, generate._Batch.advance

        def counted(self, *arguments, **options):
            begin(self, *arguments, **options)
            begun.append(self.rows)

        def limited(self):
            if self.rows > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            advance(self)

        monkeypatch.setattr(generate._Batch, "__init__", counted)
        monkeypatch.setattr(generate._Batch, "advance", limited)
        return begun

    return limit


def replies(path: Path) -> list[dict]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return sorted((line for line in found if "response" in line), key=lambda line: line["prompt"])


def test_H3_exhausted_memory_halves_the_batch_once(evaluate, memory_for, tmp_path):
    plain = evaluate("--batch-size", 2, "--samples-out", tmp_path / "plain.jsonl")
    begun = memory_for(2)
    halved = evaluate("--batch-size", 4, "--samples-out", tmp_path / "halved.jsonl")
    assert plain.code == halved.code == 0
    assert begun == [4, 2]
    assert len(replies(tmp_path / "plain.jsonl")) == 6
    assert [r["response"] for r in replies(tmp_path / "halved.jsonl")] == [
        r["response"] for r in replies(tmp_path / "plain.jsonl")
    ]


def test_H3_memory_that_stays_exhausted_is_exit_5_with_a_way_out(evaluate, memory_for):
    begun = memory_for(0)
    ran = evaluate("--batch-size", 4)
    assert ran.code == 5 and begun == [4, 2]
    assert "error[E504]" in ran.err and "with 2 replies at once" in ran.err and "--batch-size" in ran.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("eval", "--perplexity", "TEXT"),
        ("measure", "--mode", "prefill", "--context", "8", "--repeat", "3"),
        ("prune", "--sparsity", "0.5", "--calibration", "TEXT", "--samples", "4", "-o", "OUT"),
        ("quantize", "--scheme", "W4A16", "--method", "gptq", "--group-size", "8", "--calibration", "TEXT", "--samples", "4", "-o", "OUT"),
    ],
)  # fmt: skip
def test_H3_a_gpu_that_is_not_there_is_said_before_the_work(capsys, monkeypatch, tmp_path, arguments):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text = tmp_path / "text.jsonl"
    text.write_text(
        "".join(json.dumps({"text": f"some words about {n} and {n + 1}"}) + "\n" for n in range(4))
    )
    places = {"TEXT": str(text), "OUT": str(tmp_path / "out")}
    command, *rest = (places.get(word, word) for word in arguments)
    ran = commands.run(capsys, command, MODELS / "short", *rest, "--device", "cuda")
    assert ran.code == 5, ran.err
    assert any(f"error[{code}]" in ran.err for code in ("E513", "E515", "E518")) and "help: " in ran.err
    assert not (tmp_path / "out").exists()


def versions(monkeypatch, **changed: str | None) -> None:
    """Let packages be installed in other versions, or not at all."""
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name not in changed:
            return real(name)
        if (found := changed[name]) is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)


def test_H7_doctor_names_package_found_and_needed_version(capsys, monkeypatch):
    versions(monkeypatch, numpy="1.20.3", transformers="4.40.0", accelerate=None)
    ran = commands.run(capsys, "doctor")
    assert "warning: numpy 1.20.3: 1.26 or newer is needed" in ran.err
    rows = {words[0]: words for line in ran.out.splitlines() if len(words := line.split()) > 3}
    assert rows["transformers"][1:5] == ["4.40.0", "5.23", "too", "old"]
    assert rows["accelerate"][1:4] == ["missing", "1.0", "missing"]
    assert "pip install 'model-surgeon[run]'" in ran.out


def test_H7_a_command_without_its_package_names_it_and_the_needed_version(capsys, monkeypatch):
    from surgeon.verify import readers

    versions(monkeypatch, transformers=None)
    monkeypatch.setattr(readers, "available", lambda: ["transformers"])
    ran = commands.run(capsys, "verify", MODELS / "short", "--load", "--json")
    error = ran.document["error"]
    assert ran.code == 5 and error["code"] == "E512"
    assert "model-surgeon[run]" in error["help"]
    assert "transformers is missing: 5.23 or newer is needed" in error["help"]


def test_H7_a_package_that_is_too_old_is_named_where_it_can_be_the_reason(capsys, monkeypatch, tmp_path):
    versions(monkeypatch, transformers="4.40.0")
    odd = tmp_path / "odd"
    odd.mkdir()
    for name in os.listdir(MODELS / "short"):
        (odd / name).write_bytes((MODELS / "short" / name).read_bytes())
    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps(config | {"model_type": "not-released-yet"}))
    ran = commands.run(
        capsys, "eval", odd, "--length", "--questions", questions_of(tmp_path), "--max-new-tokens", 2
    )
    assert ran.code in {3, 5}
    assert "transformers 4.40.0: 5.23 or newer is needed" in ran.err


def questions_of(folder: Path) -> Path:
    path = folder / "one.jsonl"
    path.write_text('{"question": "What is 1 + 1?", "answer": 2}\n')
    return path


def test_H7_nothing_is_said_of_packages_that_are_as_needed(capsys):
    ran = commands.run(capsys, "merge", MODELS / "short", MODELS / "long", "--method", "tise", "-o", "out")
    assert ran.code == 2 and "newer is needed" not in ran.err


class Clock:
    now = 1_000.0

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize("hours", [1, 30])
def test_H9_progress_in_a_log_is_a_line_a_minute(monkeypatch, hours):
    clock, stream = Clock(), io.StringIO()
    monkeypatch.setattr(output, "time", clock)
    monkeypatch.setattr(sys, "stderr", stream)
    progress = output.Output().progress("merging")
    for second in range(hours * 3600):
        clock.now += 1
        progress(second + 1, hours * 3600, title=f"phase {second % 7}" if second % 5 == 0 else None)
    progress.close()
    lines = stream.getvalue().splitlines()
    assert hours * 60 - 1 <= len(lines) <= hours * 60
    assert all("left" in line for line in lines)
    assert "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()


def test_H9_a_quiet_run_writes_no_progress(monkeypatch):
    clock, stream = Clock(), io.StringIO()
    monkeypatch.setattr(output, "time", clock)
    monkeypatch.setattr(sys, "stderr", stream)
    for out in (output.Output(quiet=True), output.Output(progress=False)):
        progress = out.progress("merging")
        for second in range(600):
            clock.now += 1
            progress(second, 600)
        progress.close()
    assert stream.getvalue() == ""
