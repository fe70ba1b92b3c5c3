"""Arguments that are none of a command's: Typer's words for people, a document where one is asked for."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from surgeon.cli import app

WRONG = [
    ("quantize", "--frog"),
    ("prune", "--samples", "x"),
    ("measure",),
    ("recipe", "frog"),
    ("recipe", "validate"),
]


@pytest.mark.parametrize("words", WRONG, ids=" ".join)
def test_wrong_arguments_are_said_and_end_with_2(words, capsys):
    assert app.run(words[0], [*words[1:]]) == 2
    said = capsys.readouterr()
    assert not said.out and f"Try 'surgeon {words[0]}" in said.err and "Error: " in said.err


def test_json_is_printed_for_wrong_arguments_too(capsys):
    assert app.run("quantize", ["--frog", "--json"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert document["exit_code"] == 2 and document["error"]["code"] == "E200"
    assert "--frog" in document["error"]["message"] and "surgeon quantize --help" in document["error"]["help"]


def test_a_reader_that_goes_away_is_no_bug():
    script = f"set -o pipefail; '{sys.executable}' -m surgeon methods --json | head -c 10"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.returncode in (0, 1) and "Traceback" not in done.stderr, done.stderr
