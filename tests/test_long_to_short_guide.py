"""The guide to long-to-short merging says what is so: commands run, files exist, settings are the recipes'."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
GUIDE = ROOT / "docs" / "long-to-short.md"
TEXT = GUIDE.read_text()
COMMANDS = re.findall(r"^    surgeon (merge .+)$", TEXT, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_merge_in_the_guide_plans(command, tmp_path, monkeypatch, capsys):
    from surgeon.cli.app import run

    for name in ("base", "long", "short"):
        shutil.copytree(ROOT / "tests" / "models" / name, tmp_path / name)
    for name in re.findall(r"\S+\.jsonl", command):
        (tmp_path / name).write_text(
            '{"prompt": "Add 1+2.", "short": "answer:3", "long": "1+2=3,answer:3"}\n'
        )
    monkeypatch.chdir(tmp_path)
    verb, *words = command.split()
    try:
        code = run(verb, [*words, "--dry-run"])
    except SystemExit as end:
        code = end.code
    assert not code, capsys.readouterr().err
    assert not (tmp_path / words[words.index("-o") + 1]).exists()


def test_the_guide_shows_merges():
    assert len(COMMANDS) >= 9


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", TEXT):
        assert (GUIDE.parent / target).exists(), target


def rows() -> dict[str, list[str]]:
    table = TEXT.partition("## Settings by size")[2].partition("\n## ")[0]
    lines = [
        [c.strip() for c in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")
    ]
    return {line[0].partition(":")[0]: line[1:5] for line in lines[2:]}


@pytest.mark.parametrize(
    ("row", "recipe"),
    [("task arithmetic", "task-arithmetic"), ("TIES", "ties"), ("DARE", "dare-linear"), ("AIM on TIES", "aim-ties"),
     ("Sens", "sens"), ("ACM on TIES", "acm-ties"), ("FIM on TIES", "fim-ties")],
)  # fmt: skip
def test_settings_by_size_are_those_of_the_recipes(row, recipe):
    compared = 0
    for size, cell in zip(("1.5b", "7b", "14b", "32b"), rows()[row], strict=True):
        path = ROOT / "recipes" / "long-to-short" / f"qwen2.5-{size}-{recipe}.yaml"
        if not path.exists():
            continue
        data = yaml.safe_load(path.read_text())
        own, extra = data["models"][0]["parameters"], data["surgeon"]
        lam, kept = data["parameters"]["lambda"], own.get("density", 1.0)
        expected = {
            "task arithmetic": [lam], "TIES": [1 - kept, lam], "DARE": [1 - kept], "AIM on TIES": [extra.get("aim")],
            "Sens": [lam, extra.get("sens", {}).get("temperature")], "ACM on TIES": [extra.get("acm")],
            "FIM on TIES": [1 - kept],
        }[row]  # fmt: skip
        assert [float(n) for n in cell.split(",")] == pytest.approx(expected), size
        compared += 1
    assert compared >= 2


def test_there_is_a_place_for_our_own_figures():
    assert TEXT.count("<!-- our-table: begin -->") == TEXT.count("<!-- our-table: end -->") == 1
