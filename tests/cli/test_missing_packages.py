"""Optional packages that are missing or broken: a refusal that names what to install, never a bug report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from surgeon.cli import errors
from surgeon.cli.output import Output

ROOT = Path(__file__).resolve().parents[2]


def refusal(capsys, error: ImportError) -> tuple[int, dict]:
    def work():
        raise error

    code = errors.run_command(Output(json_mode=True), "prune", work)
    return code, json.loads(capsys.readouterr().out)["error"]


@pytest.mark.parametrize(
    ("error", "message", "extra"),
    [
        (ModuleNotFoundError("No module named 'torch'", name="torch"), "torch is not installed", "run"),
        (ModuleNotFoundError("No module named 'lm_eval'", name="lm_eval"), "lm_eval is not installed", "eval"),
        (ModuleNotFoundError("No module named 'torch.odd'", name="torch.odd"), "torch cannot be imported: No module", "run"),
        (ImportError("cannot import name 'x' from 'transformers'", name="transformers"), "transformers cannot be imported", "run"),
        (ImportError("pyarrow was built for another Python"), "pyarrow cannot be imported: pyarrow was built", "data"),
    ],
)  # fmt: skip
def test_a_package_that_cannot_be_imported_is_named_with_its_extra(capsys, error, message, extra):
    code, said = refusal(capsys, error)
    assert (code, said["code"], said["exit_code"]) == (5, "E512", 5)
    assert said["message"].startswith(message) and f'pip install "model-surgeon[{extra}]"' in said["help"]


def test_an_import_of_our_own_that_fails_is_a_bug(capsys):
    code, said = refusal(
        capsys, ImportError("cannot import name 'odd' from 'surgeon.api'", name="surgeon.api")
    )
    assert (code, said["code"]) == (1, "E001")
    Path(said["where"]["file"]).unlink()


def test_the_extras_are_those_of_the_project():
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for module, extra in errors._EXTRAS.items():
        assert any(line.startswith(f"{module.replace('_', '-')}>") for line in stated[extra]), module


def test_a_command_without_torch_says_what_to_install(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('torch is not for this machine')")
    done = subprocess.run(
        [sys.executable, "-m", "surgeon", "measure", ROOT / "tests/models/long", "-o", "result.json", "--json"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 5 and json.loads(done.stdout)["error"]["code"] == "E512"
    assert "torch cannot be imported" in done.stderr and "model-surgeon[run]" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "result.json").exists()
