"""The guides to pruning, measuring, editing and formats say what is so: tables, options, commands, links."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from surgeon.calibrate import divided
from surgeon.cli.app import COMMANDS, build
from surgeon.deploy.export_request import FORMATS
from surgeon.prune import members
from surgeon.prune.experts import request as expert_requests
from surgeon.prune.request import CRITERIA, METHODS, OPTIONS, SPARSE, SPARSITY, PruneRequest
from surgeon.prune.request import build as request

DOCS = Path(__file__).resolve().parents[1] / "docs"
GUIDES = ("pruning", "experts", "measuring", "editing", "formats")
TEXT = {name: (DOCS / f"{name}.md").read_text() for name in GUIDES}


def rows(text: str, first: str) -> list[list[str]]:
    """Return the cells of the table whose first line begins so, without its two head lines."""
    lines = text[text.index(f"| {first} |") :].splitlines()
    table = lines[: next((n for n, line in enumerate(lines) if not line.startswith("|")), len(lines))]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


def listed() -> list[tuple[str, str | None, bool]]:
    """Return (method, criterion, said to be the default) of the table of methods."""
    found = []
    for first, *_ in rows(TEXT["pruning"], "`--method`"):
        words = re.findall(r"`([^`]+)`", first)
        method, _, criterion = words[0].partition(" --criterion ")
        if criterion:
            found += [(method, one, "(default)" in first) for one in (criterion, *words[1:])]
        else:
            found += [(one, None, "(default)" in first) for one in words]
    return found


def test_every_method_and_criterion_is_in_the_table_once():
    expected = {(m, c.replace("_", "-")) for m in METHODS for c in CRITERIA.get(m, ())}
    expected |= {(m, None) for m in METHODS if m not in CRITERIA}
    found = [(method, criterion) for method, criterion, _ in listed()]
    assert sorted(map(str, found)) == sorted(map(str, expected))


def test_every_method_for_experts_is_in_their_table():
    named = {
        word
        for row in rows(TEXT["experts"], "situation")
        for word in re.findall(r"`([a-z][a-z0-9-]+)`", row[1])
    }
    assert named == set(expert_requests.METHODS)
    assert ("`reap` (default)" in TEXT["experts"]) and expert_requests.ExpertRequest.model_fields[
        "method"
    ].default == "reap"
    said = " ".join(TEXT["experts"].split())
    assert (
        f"{expert_requests.DEMONSTRATIONS} demonstrations of up to {expert_requests.DEMONSTRATION_TOKENS:,} tokens"
        in said
    )
    for criterion in expert_requests.CHANNELS:
        assert f"`{criterion}`" in said


def test_the_defaults_in_the_table_are_the_defaults():
    default = PruneRequest.model_fields["method"].default
    expected = {(default, None), *((m, c[0].replace("_", "-")) for m, c in CRITERIA.items())}
    assert {(method, criterion) for method, criterion, said in listed() if said} == expected


@pytest.mark.parametrize(("method", "criterion"), [(m, c) for m, c, _ in listed()])
def test_what_the_table_names_is_accepted(method, criterion):
    layout = "per-layer" if method == "lapp" else "uniform"
    made = request(model="model", method=method, criterion=criterion, sparsity=0.3, layout=layout)
    assert made.solver == (criterion.replace("-", "_") if criterion else method)


def test_what_sparsity_counts_is_said_as_the_program_says_it():
    table = rows(TEXT["pruning"].partition("`--sparsity` is a fraction")[2], "`--method`")
    said = {method: text for first, text in table for method in re.findall(r"`([^`]+)`", first)}
    assert said == SPARSITY


def options(command: str) -> set[str]:
    import typer

    application = typer.main.get_command(build(command))
    return {name for parameter in application.params for name in (*parameter.opts, *parameter.secondary_opts)}


FOREIGN = {"--control-vector-scaled"}
"""Options of other programs."""


@pytest.mark.parametrize("guide", GUIDES)
def test_options_in_a_guide_exist(guide):
    known = (
        set().union(
            *(options(name) for name in ("prune", "measure", "edit", "export", "eval", "inspect", "verify"))
        )
        | FOREIGN
    )
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", TEXT[guide]))
    assert named and not named - known


@pytest.mark.parametrize("guide", GUIDES)
def test_commands_in_a_guide_take_their_options(guide):
    lines = [
        line.partition("#")[0] for line in TEXT[guide].splitlines() if re.match(r"    (cd .*)?surgeon ", line)
    ]
    assert len(lines) >= 4
    for line in lines:
        verb, *words = line.partition("surgeon ")[2].split()
        assert verb in COMMANDS, line
        assert {word for word in words if word.startswith("-")} <= options(verb), line


def commands() -> list[dict]:
    """Return the requests behind the guide's `surgeon prune` lines."""
    found = []
    for line in re.findall(
        r"surgeon prune (.+?)(?:  #.*)?$", TEXT["pruning"].partition("## ")[0], re.MULTILINE
    ):
        words = line.split()
        values: dict = {"model": "."} if words[0].startswith("-") else {"model": words.pop(0)}
        for name, value in zip(words[::2], words[1::2], strict=True):
            values[name.lstrip("-").replace("-", "_")] = value
        found.append(values)
    return found


def test_the_commands_of_the_guide_are_requests():
    assert len(commands()) == 5
    for values in commands():
        values.pop("o", None)
        for name in ("target_speedup", "sparsity"):
            if name in values:
                values[name] = tuple(map(float, values[name].split(",")))
        if "target_params" in values:
            values["target_params"] = (3e9,)
        if "keep_layers" in values:
            values["keep_layers"] = (int(values["keep_layers"]),)
        assert request(**values).targets


def test_figures_of_the_guide_are_the_program_s():
    said = " ".join(TEXT["pruning"].split())
    fields = PruneRequest.model_fields
    assert f"more than {fields['tolerance'].default:.0%}".replace("%", " %") in said
    assert members.ROUNDS == 4 and "four models are built" in said
    assert (
        f"{fields['samples'].default} samples of up to {fields['sequence_length'].default:,} tokens" in said
    )
    assert (
        f"{divided.SEARCH_SAMPLES} more compare plans and {divided.HELD_OUT_SAMPLES} more are held out"
        in said
    )
    assert f"{fields['context'].default} prompt and {fields['generate'].default} generated" in said
    assert f"{fields['damp'].default:.0%} of their mean".replace("%", " %") in said
    assert "lapp" not in OPTIONS["nested"] and set(SPARSE) == {"sparsegpt", "wanda", "magnitude"}


def test_formats_are_those_of_export():
    from surgeon.deploy.decilm import MULTIPLE
    from surgeon.deploy.gguf_check import TEXTS
    from surgeon.deploy.per_layer import CODE_FILES

    assert set(re.findall(r"--to (\w+)", TEXT["formats"])) == set(FORMATS) - {"safetensors"}
    assert all(name in TEXT["formats"] for name in CODE_FILES)
    assert f"multiples of {MULTIPLE}" in TEXT["formats"] and f"multiples of {MULTIPLE}" in TEXT["pruning"]
    assert len(TEXTS) == 50 and "fifty texts" in TEXT["formats"]


def test_families_with_sizes_by_layer_are_named():
    from surgeon.deploy.per_layer import FAMILIES

    named = "Llama, Mistral, Qwen2, Qwen3, Gemma 1 to 3 and Phi-3"
    assert set(FAMILIES) == {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3"}
    assert named in " ".join(TEXT["pruning"].split())
    assert named.replace(" and", ",") in " ".join(TEXT["formats"].split())


@pytest.mark.parametrize("guide", GUIDES)
def test_links_lead_somewhere(guide):
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", TEXT[guide]):
        assert (DOCS / target).exists(), target


@pytest.mark.parametrize("guide", GUIDES)
def test_the_readme_links_every_guide(guide):
    assert f"(docs/{guide}.md)" in (DOCS.parent / "README.md").read_text()
