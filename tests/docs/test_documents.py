"""What the documents say is so: commands parse, YAML is valid, links lead somewhere, generated pages are fresh."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
import yaml

from surgeon.cli import app as commands
from surgeon.recipe import mergekit_yaml, native

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
MODELS = ROOT / "tests" / "models"


@dataclass(frozen=True)
class Block:
    """A block of code in a page; ``language`` is None for an indented one."""

    page: Path
    line: int
    language: str | None
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    """Return the blocks of code of a page, fenced and indented."""
    language, begin, body = None, 0, []
    fenced = False
    for number, line in enumerate([*page.read_text().splitlines(), ""], 1):
        fence = re.match(r"```(\w*)\s*$", line)
        if fence and not fenced:
            fenced, language, begin, body = True, fence[1], number + 1, []
        elif fence:
            yield Block(page, begin, language, "\n".join(body))
            fenced, body = False, []
        elif fenced:
            body.append(line)
        elif line.startswith("    "):
            begin = begin if body else number
            body.append(line[4:])
        elif body:
            yield Block(page, begin, None, "\n".join(body))
            body = []


BLOCKS = [block for page in PAGES for block in blocks(page)]
SHELL = {None, "bash", "sh", "console"}


def shell_commands(block: Block) -> Iterator[tuple[str, list[str]]]:
    """Return (place, words) of every surgeon command of a block."""
    number = block.line
    for line in block.text.replace("\\\n", "\0").splitlines():
        place = f"{block.page.name}:{number}"
        number += 1 + line.count("\0")
        if not re.search(r"(^|&&|\|\||;)\s*surgeon ", line.replace("\0", " ")):
            continue
        words = shlex.split(line.replace("\0", " "), comments=True)
        while "surgeon" in words:
            rest = words[words.index("surgeon") + 1 :]
            end = next((i for i, w in enumerate(rest) if w in ("&&", "||", ";", "|", ">", ">>")), len(rest))
            yield place, [word for word in rest[:end] if word != "..."]
            words = rest[end:]


COMMANDS = [found for block in BLOCKS if block.language in SHELL for found in shell_commands(block)]


@functools.cache
def parser(name: str) -> Any:
    """Return a command that, instead of working, hands back the values it was called with."""
    application = commands.build(name)
    for one in application.registered_commands:
        original = one.callback

        @functools.wraps(original)
        def instead(**values: Any) -> dict[str, Any]:
            return values

        one.callback = instead
    return typer.main.get_command(application)


def parsed(words: list[str]) -> dict[str, Any]:
    assert words[0] in commands.COMMANDS, f"no command {words[0]}"
    return parser(words[0])(words[1:], prog_name=f"surgeon {words[0]}", standalone_mode=False)


@pytest.mark.parametrize(("place", "words"), COMMANDS, ids=[place for place, _ in COMMANDS])
def test_every_command_line_is_one_the_program_takes(place, words):
    values = parsed(words)
    assert isinstance(values, dict), f"{place}: --help or nothing was asked for"
    _check_values(words[0], values)


def _check_values(verb: str, values: dict[str, Any]) -> None:
    """Check what the parser takes as text, and the command refuses later."""
    from surgeon.edit import request as edit
    from surgeon.evaluate import gates
    from surgeon.prune import request as prune
    from surgeon.prune.experts import request as experts
    from surgeon.quantize import request as quantize
    from surgeon.quantize import scheme_names

    known = {
        "prune": {*prune.METHODS, *experts.METHODS},
        "quantize": quantize.METHODS,
        "edit": edit.SUMMARIES,
    }
    if verb in known and values.get("method"):
        assert values["method"] in known[verb]
    if verb == "quantize":
        assert values["format_"] in quantize.DEFAULT_SCHEME
        assert values["sensitivity"] in quantize.SENSITIVITIES
        for scheme in values["scheme"] or ():
            scheme_names.parse(scheme.rpartition("=")[2], values["format_"], group_size=None, symmetric=True)
    if verb == "prune" and values.get("criterion"):
        of_method = {**prune.CRITERIA, "heapr": experts.CHANNELS}[values["method"] or "width"]
        assert values["criterion"] in of_method
    if verb == "eval":
        for gate in values["gate"] or ():
            gates.parse(gate)


INLINE = [
    (f"{page.name}: {text}", text.split())
    for page in PAGES
    for text in sorted(set(re.findall(r"`surgeon (\w[^`]*)`", " ".join(page.read_text().split()))))
]


@pytest.mark.parametrize(("place", "words"), INLINE, ids=[place for place, _ in INLINE])
def test_commands_in_prose_have_the_options_they_name(place, words):
    assert words[0] in commands.COMMANDS or words[0].isupper(), place
    if words[0].isupper():
        return
    found = parser(words[0])
    if getattr(found, "commands", None) and len(words) > 1:
        found = found.commands[words[1]]
    known = {name for one in found.params for name in (*one.opts, *one.secondary_opts)} | {"--help"}
    assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known


MERGES = [
    (place, words) for place, words in COMMANDS
    if words[0] == "merge" and not place.startswith("long-to-short.md") and "-o" in words
]  # fmt: skip


@pytest.fixture(scope="module")
def standins(tmp_path_factory) -> Path:
    """A folder in which the names that the documents use for models and files exist."""
    folder = tmp_path_factory.mktemp("standins")
    originals = {
        "short": "short",
        "b": "short",
        "original": "short",
        "short-reasoner": "short",
        "origin": "base",
    }
    for name in (
        "long",
        "short",
        "a",
        "b",
        "c",
        "origin",
        "efficient",
        "original",
        "long-reasoner",
        "short-reasoner",
    ):
        shutil.copytree(MODELS / originals.get(name, "long"), folder / name)
    (folder / "questions.jsonl").write_text(
        '{"prompt": "Add 1+2.", "short": "answer:3", "long": "1+2=3,answer:3"}\n'
    )
    (folder / "scores.json").write_text("{}")
    shutil.copy(MODELS / "merge.yaml", folder / "mergekit-config.yml")
    return folder


@pytest.mark.parametrize(("place", "words"), MERGES, ids=[place for place, _ in MERGES])
def test_every_merge_plans(place, words, standins, monkeypatch, capsys):
    monkeypatch.chdir(standins)
    if "--layer-scores" in words:
        scores = {"layers": {str(number): 0.5 for number in range(4)}}
        content = {"format": "surgeon layer scores", "version": 1, "models": {"long": scores}}
        (standins / "scores.json").write_text(json.dumps(content))
    code = commands.run("merge", [*words[1:], *([] if "--dry-run" in words else ["--dry-run"])])
    assert code == 0, f"{place}: {capsys.readouterr().err}"


# ---- YAML --------------------------------------------------------------------------------------------

YAML = [block for block in BLOCKS if block.language == "yaml"]


@pytest.mark.parametrize("block", YAML, ids=str)
def test_every_yaml_block_is_valid(block, tmp_path):
    content = yaml.safe_load(block.text)
    file = tmp_path / "recipe.yaml"
    file.write_text(block.text)
    if "jobs" in content:
        _check_workflow(content)
    elif native.is_native(block.text):
        for name in ("long", "short"):
            shutil.copytree(MODELS / name, tmp_path / name)
        (tmp_path / "texts.jsonl").write_text('{"text": "one"}\n')
        (tmp_path / "held-out.jsonl").write_text('{"question": "1+1?", "answer": 2}\n')
        native.read(file).check_files()
    else:
        assert "merge_method" in content, f"{block}: neither a recipe nor a workflow"
        mergekit_yaml.parse(block.text, str(file))


def _check_workflow(content: dict[str, Any]) -> None:
    inputs = yaml.safe_load((ROOT / "action.yml").read_text())["inputs"]
    for job in content["jobs"].values():
        used = [step for step in job["steps"] if step.get("uses") == "./"]
        assert used, "a workflow that does not use the action"
        for step in used:
            assert set(step["with"]) <= set(inputs)
            assert {name for name, one in inputs.items() if one.get("required")} <= set(step["with"])


# ---- links and generated pages -----------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\((?![a-z]+:)([^)#\s]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def _generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_fresh():
    stale = [name for name, text in _generator().pages().items() if (DOCS / name).read_text() != text]
    assert not stale, "run python docs/generate.py"


def test_the_reference_names_every_command_and_every_method():
    from surgeon.merge.methods import names

    text = (DOCS / "reference" / "cli.md").read_text()
    assert all(f"\n## {name}\n" in text for name in commands.COMMANDS)
    text = (DOCS / "reference" / "methods.md").read_text()
    assert all(f"\n### {name.replace('_', '-')}\n" in text for name in names())


# ---- for real ----------------------------------------------------------------------------------------


@pytest.fixture
def shell(tmp_path):
    """Run a script with bash where ``surgeon`` and ``python`` are those of the tests, without a network."""
    programs = tmp_path / "programs"
    programs.mkdir()
    # No links: a Python that is started through one does not find its environment.
    for name, words in {"surgeon": "-m surgeon ", "python": ""}.items():
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words}"$@"\n')
        (programs / name).chmod(0o755)
    found = {
        **os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip

    def run(script: str, folder: Path) -> str:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script], cwd=folder, env=found, capture_output=True, text=True, timeout=1500
        )  # fmt: skip
        assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    return run


@pytest.mark.slow
def test_the_tutorial_works_as_written(shell, tmp_path):
    found = list(blocks(DOCS / "tutorial.md"))
    clone = tmp_path / "clone"
    (clone / "tests").mkdir(parents=True)
    (clone / "tests" / "models").symlink_to(MODELS)
    shell("\n".join(block.text for block in found if block.language == "bash"), clone)
    place = clone / "tutorial"
    assert (place / "report.html").stat().st_size > 1000
    sizes = [(place / name / "model.safetensors").stat().st_size for name in ("merged", "pruned", "small")]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < sizes[0] / 2
    (recipe,) = (block.text for block in found if block.language == "yaml")
    (place / "tutorial.yaml").write_text(recipe)
    (last,) = (b.text for b in found if b.language is None and "tutorial.yaml" in b.text)
    shell(last, place)
    # The recipe says what was typed, so it makes the same weights.
    names = ("published/model.safetensors", "small/model.safetensors")
    assert (place / names[0]).read_bytes() == (place / names[1]).read_bytes()


@pytest.mark.slow
def test_the_python_examples_run(shell, tmp_path):
    for name in ("long", "short"):
        shutil.copytree(MODELS / name, tmp_path / name)
    for block in blocks(DOCS / "python.md"):
        if block.language == "python":
            (tmp_path / "example.py").write_text(block.text)
            shell("python example.py", tmp_path)
    assert (tmp_path / "small" / "surgeon.json").is_file()


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path):
    pytest.importorskip("material")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-f", str(ROOT / "mkdocs.yml"), "-d", str(tmp_path / "site")],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for page in (
        "index.html",
        "tutorial/index.html",
        "reference/cli/index.html",
        "beyond/recipes/index.html",
    ):
        assert (tmp_path / "site" / page).is_file(), page
