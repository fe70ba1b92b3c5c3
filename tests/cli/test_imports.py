"""What a command may import: nothing heavy for anything that only reads headers or values."""

from __future__ import annotations

import subprocess
import sys

import forge
import pytest

HEAVY = ("torch", "transformers", "mergekit", "tokenizers", "accelerate", "scipy", "numba")


def imported(*arguments: object) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "surgeon", *map(str, arguments)], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip().split(".")[0] for line in lines}


@pytest.mark.parametrize("command", ["inspect", "diff", "verify", "methods", "clean"])
def test_commands_import_nothing_heavy(scratch, command):
    file = forge.write(scratch / "x.safetensors", forge.llama_tensors(1))
    arguments = {
        "inspect": [file, "--stats"], "diff": [file, file, "--values"], "verify": [file], "methods": [], "clean": [scratch],
    }  # fmt: skip
    assert not imported(command, *arguments[command]) & set(HEAVY)


@pytest.mark.parametrize(
    "command", ["inspect", "diff", "verify", "methods", "doctor", "clean", "merge", "eval", "report", "run"]
)
def test_help_of_a_command_needs_neither_numpy_nor_pydantic(command):
    assert not imported(command, "--help") & {*HEAVY, "numpy", "pydantic"}
