"""The GitHub action, its workflow and the image: their steps run here as a runner would run them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
ACTION = yaml.safe_load((ROOT / "action.yml").read_text())
MODELS = ROOT / "tests" / "models"


class Runner:
    """Runs the action's steps with bash: inputs in the environment, outputs and the summary in files."""

    def __init__(self, place: Path) -> None:
        self.place, self.outputs = place, place / "outputs"
        self.summary = place / "summary.md"
        self.temporary = place / "temporary"
        programs = place / "programs"
        for folder in (self.temporary, programs):
            folder.mkdir()
        (programs / "surgeon").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m surgeon "$@"\n')
        (programs / "surgeon").chmod(0o755)
        self.environment = {
            **os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1", "RUNNER_TEMP": str(self.temporary), "GITHUB_OUTPUT": str(self.outputs),
            "GITHUB_STEP_SUMMARY": str(self.summary),
        }  # fmt: skip

    def run(self, **given: str) -> tuple[int, str]:
        """Run all steps; return the first exit code that is not 0, and what was said on stderr."""
        values = {name: given.get(name, one.get("default", "")) for name, one in ACTION["inputs"].items()}
        code, said = 0, ""
        for step in ACTION["runs"]["steps"]:
            condition = step.get("if", "")
            if step["name"] == "Install" and values["install"] == "":
                continue
            result = re.search(r"^result=(.+)$", self._outputs(), re.MULTILINE)
            if (code and "always()" not in condition) or ("steps.run.outputs" in condition and not result):
                continue
            environment = {
                name: self._filled(text, values, result[1] if result else "") for name, text in step.get("env", {}).items()
            }  # fmt: skip
            done = subprocess.run(
                ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]], cwd=self.place, text=True,
                env={**self.environment, **environment}, capture_output=True, timeout=600,
            )  # fmt: skip
            code, said = code or done.returncode, said + done.stderr
        return code, said

    def _outputs(self) -> str:
        return self.outputs.read_text() if self.outputs.exists() else ""

    @staticmethod
    def _filled(text: str, values: dict[str, str], result: str) -> str:
        filled = re.sub(r"\$\{\{ inputs\.(\w+) \}\}", lambda found: values[found[1]], text)
        filled = filled.replace("${{ steps.run.outputs.result }}", result)
        assert "${{" not in filled, filled
        return filled


@pytest.fixture
def runner(tmp_path) -> Runner:
    for name in ("long", "short"):
        shutil.copytree(MODELS / name, tmp_path / name)
    shutil.copy(MODELS / "merge.yaml", tmp_path / "merge.yaml")
    return Runner(tmp_path)


NATIVE = """\
version: 1
name: small
models: {long: ./long, short: ./short}
steps:
  - id: merged
    merge: {method: ties, base: short, models: [{model: long, density: 0.2}]}
gates: ["parameters <= LIMIT"]
publish: {step: merged, when: on_pass}
"""


def test_nothing_a_caller_writes_becomes_shell_text():
    """Inputs reach the steps through the environment alone, so that a value cannot be a command."""
    for step in ACTION["runs"]["steps"]:
        assert "${{" not in step["run"], step["name"]
        assert step["shell"] == "bash"


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda p: p.name)
def test_workflows_give_the_action_what_it_takes(path):
    content: Any = yaml.safe_load(path.read_text())
    steps = [step for job in content["jobs"].values() for step in job["steps"]]
    used = [step["with"] for step in steps if step.get("uses") == "./"]
    for given in used:
        assert set(given) <= set(ACTION["inputs"]) and "recipe" in given
        assert (ROOT / given["recipe"]).is_file()
    assert used or path.name != "recipes.yml"


def test_the_image_holds_what_it_is_built_from():
    """Every COPY of the Dockerfile is let through by .dockerignore, and it does not run as root."""
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [line.split()[1:-1] for line in lines if line.startswith("COPY ") and "--from" not in line]
    for name in (name for names in copied for name in names):
        assert name in allowed and (ROOT / name).exists(), name
    users = [line for line in lines if line.startswith("USER ")]
    assert users == ["USER surgeon"] and lines.index(users[0]) < lines.index('ENTRYPOINT ["surgeon"]')


def test_a_recipe_with_a_mistake_stops_before_anything_runs(runner):
    (runner.place / "bad.yaml").write_text(NATIVE.replace("density", "desnity"))
    code, said = runner.run(recipe="bad.yaml", install="")
    assert code == 2 and "bad.yaml:6" in said
    assert not runner.summary.exists() and not (runner.place / "surgeon-output").exists()


def test_patterns_that_match_nothing_fail(runner):
    code, said = runner.run(recipe="merge.yaml", validate="recipes/**/*.yaml", install="")
    assert code == 2 and "no recipe matches" in said


@pytest.mark.slow
def test_a_mergekit_recipe_runs_and_is_reported(runner):
    code, said = runner.run(
        recipe="merge.yaml", output="made/model", options="--seed 3 --threads 1", install=""
    )
    assert code == 0, said
    assert (runner.place / "made" / "model" / "model.safetensors").is_file()
    assert "|" in runner.summary.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("limit", "expected"), [("2000000", 0), ("1000", 4)])
def test_a_gate_decides_and_the_summary_shows_it(runner, limit, expected):
    (runner.place / "recipe.yaml").write_text(NATIVE.replace("LIMIT", limit))
    code, said = runner.run(recipe="recipe.yaml", validate="*.yaml", output="model", install="")
    assert code == expected, said
    assert (runner.place / "model").exists() == (expected == 0)
    assert "parameters" in runner.summary.read_text()
