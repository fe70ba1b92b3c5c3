"""``surgeon methods``: the list and the pages follow from the methods themselves."""

from __future__ import annotations

import subprocess
import sys

import pytest
from commands import run

from surgeon.merge.methods import catalogue, names


def test_every_method_is_listed_with_its_sentence(capsys):
    ran = run(capsys, "methods")
    assert ran.code == 0
    for name in names():
        assert name.replace("_", "-") in ran.out
        assert catalogue(name).summary in ran.out
    assert ran.out.endswith(run(capsys, "methods", "merge").out)
    assert "surgeon methods prune" in ran.out


@pytest.mark.parametrize("family", ["prune", "edit"])
def test_the_other_families_list_every_method_and_have_a_page_for_each(capsys, family):
    import importlib

    known = list(importlib.import_module(f"surgeon.{family}.request").METHODS)
    if family == "prune":
        known += importlib.import_module("surgeon.prune.experts.request").METHODS
    listed = run(capsys, "methods", family, "--json").document
    assert [method["name"] for method in listed["methods"]] == known
    for method in listed["methods"]:
        page = run(capsys, "methods", method["name"])
        assert page.code == 0
        assert (
            f"surgeon {family} MODEL --method {method['name']}" in page.out and method["summary"] in page.out
        )


@pytest.mark.parametrize("name", names())
def test_every_page_names_every_parameter(capsys, name):
    ran = run(capsys, "methods", name.replace("_", "-"))
    assert ran.code == 0
    method = catalogue(name)
    assert all(f"\n{p.name} " in ran.out for p in method.parameters)
    assert method.reference in ran.out


def test_defaults_of_command_line_and_yaml_are_told_apart(capsys):
    document = run(capsys, "methods", "ties", "--json").document
    density = next(p for p in document["method"]["parameters"] if p["name"] == "density")
    assert (density["default"], density["default_in_yaml"], density["range"]) == (0.2, 1.0, "[0, 1]")
    listing = run(capsys, "methods", "--json").document
    assert len(listing["methods"]) == len(names())
    assert {m["name"] for m in listing["methods"] if m["random"]} >= {"dare-ties", "della"}


@pytest.mark.parametrize("name", ["tise", "../ties", "os", "a\x1b[2J", ""])
def test_unknown_names(capsys, name):
    ran = run(capsys, "methods", name)
    assert ran.code == 2
    assert "E201" in ran.err


def test_listing_imports_no_torch():
    code = "import sys\nfrom surgeon.cli import app\napp.run('methods', [])\nprint(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "mergekit", "numba"} & set(done.stderr.split())
