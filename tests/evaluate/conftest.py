"""Shared by the evaluation tests: trained models, their questions as files, the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from running_sums import asked


@pytest.fixture
def question_file(tmp_path):
    """Write running sums as a question file; further fields go into every record."""

    def write(count: int = 12, name: str = "questions.jsonl", **fields: object) -> Path:
        path = tmp_path / name
        lines = [json.dumps({"question": q.text, "answer": q.answer, **fields}) for q in asked(count)]
        path.write_text("\n".join(lines) + "\n")
        return path

    return write


@pytest.fixture
def surgeon(capsys):
    """Run ``surgeon eval`` in this process."""
    import commands

    def run(*arguments: object) -> commands.Ran:
        return commands.run(capsys, "eval", *arguments, "--threads", "1")

    return run
