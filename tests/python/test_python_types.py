"""A type checker sees the functions as users do."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
from typing import Any, Mapping
from pathlib import Path
import surgeon

reveal_type(surgeon.merge(["a", Path("b")], density=0.3, dry_run=True))
states: list[Mapping[str, Any]] = []
reveal_type(surgeon.merge(states))
reveal_type(surgeon.prune("a", "b", target_speedup=1.5))
reveal_type(surgeon.run("a.yaml", set="x=1").metrics)
reveal_type(surgeon.inspect("a", experts=True, samples=3).summary.parameters)
reveal_type(surgeon.recipe.list())
progress: surgeon.Progress = surgeon.bars()
surgeon.quantize("a", target_bits=4.25, progress=lambda what, done, total: None)
surgeon.prune("a", target_sped=1.5)
surgeon.quantize("a", scheme=3)
surgeon.edit("a")
"""


@pytest.mark.slow
def test_a_type_checker_knows_the_functions_and_their_options(tmp_path):
    program = shutil.which("pyright", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin")
    if program is None:
        pytest.skip("pyright is not installed: pip install pyright")
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "pyrightconfig.json").write_text(
        json.dumps({"extraPaths": [str(ROOT)], "typeCheckingMode": "basic"})
    )
    words = [program, "--outputjson", "--pythonpath", sys.executable, "-p", str(tmp_path)]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    found = json.loads(done.stdout)["generalDiagnostics"]
    revealed = [
        one["message"].rpartition(" is ")[2].strip('"') for one in found if one["severity"] == "information"
    ]
    assert revealed == ["Merged", "dict[str, Any]", "Result", "dict[str, Any]", "int", "list[dict[str, str]]"]
    refused = {one["range"]["start"]["line"]: one["message"] for one in found if one["severity"] == "error"}
    lines = {number: text for number, text in enumerate(PROGRAM.splitlines())}
    assert {lines[number] for number in refused} == {
        'surgeon.prune("a", target_sped=1.5)', 'surgeon.quantize("a", scheme=3)', 'surgeon.edit("a")'
    }, refused  # fmt: skip
