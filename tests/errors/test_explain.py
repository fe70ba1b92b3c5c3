"""surgeon explain: a page for every code, a code for every page, commands that exist."""

from __future__ import annotations

import functools
import json
import re
import shlex

import pytest
from error_sites import CHOSEN, PRINTED, mentioned, sites
from test_error_texts import EXITS, classes
from typer.testing import CliRunner

from surgeon import explanations
from surgeon.cli.app import COMMANDS, build
from surgeon.errors import UsageError

PAGES = {page.code: page for group in explanations.groups() for page in group.pages}


def explain(*arguments: str):
    return CliRunner().invoke(build("explain"), list(arguments))


def test_every_code_has_a_page():
    missing = sorted(set(mentioned()) - set(PAGES))
    assert not missing, f"write their entries in surgeon/explanations: {missing}"


def test_every_page_has_a_code():
    assert not sorted(set(PAGES) - set(mentioned()))


def test_no_code_has_two_pages_and_no_file_is_left_out():
    codes = [page.code for group in explanations.groups() for page in group.pages]
    assert len(codes) == len(set(codes))
    folder = explanations.Path(explanations.__file__).parent
    assert sorted(path.stem for path in folder.glob("*.md")) == sorted(explanations.GROUPS)


def test_pages_say_the_exit_codes_of_the_source():
    wrong = {}
    for code, kinds in classes().items():
        exits = {"E001": {1}, "E130": {130, 143}}.get(code, {EXITS[kind] for kind in kinds})
        if set(PAGES[code].exits) != exits:
            wrong[code] = (PAGES[code].exits, exits)
    assert not wrong


def test_titles_tell_pages_apart_and_sentences_are_whole():
    titles = [page.title for page in PAGES.values()]
    assert len(titles) == len(set(titles))
    for page in PAGES.values():
        assert not page.title.endswith(".") and (
            page.title[0].isupper()
            or page.title.startswith(("--", "config.json", "quantization_config", "lm-eval"))
        ), page.code
        for text in (page.meaning, page.when, page.fix):
            assert text.endswith((".", "./", ":")) and not re.search(r"\w!", text), (page.code, text)


@functools.cache
def options(command: str) -> frozenset[str]:
    import typer.main

    assert command in COMMANDS, f"there is no surgeon {command}"
    found = typer.main.get_command(build(command))
    groups = [found, *getattr(found, "commands", {}).values()]
    return frozenset(name for one in groups for p in one.params for name in (*p.opts, *p.secondary_opts))


def test_commands_in_examples_exist_with_their_options():
    wrong, seen = [], 0
    for page in PAGES.values():
        for line in page.example:
            if not line.startswith("surgeon "):
                continue
            words = shlex.split(line, comments=True)
            seen += 1
            known = options(words[1])
            unknown = [w for w in words[2:] if re.match(r"-[^\d]", w) and w.partition("=")[0] not in known]
            if unknown:
                wrong.append(f"{page.code}: {line} {unknown}")
    assert seen > 250
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("written", ["E305", "e305", "305", "error[E305]:", "[E305]"])
def test_a_page_however_the_code_is_written(written):
    done = explain(written)
    assert done.exit_code == 0
    assert done.stdout.startswith("E305: The vocabularies differ (exit 3)")
    assert "Fix: " in done.stdout and "    surgeon merge ./long ./short" in done.stdout


def test_the_list_names_every_group_and_code():
    done = explain()
    assert done.exit_code == 0
    for group in explanations.groups():
        assert group.title in done.stdout
    for code, page in PAGES.items():
        assert re.search(rf"^  {code} +{re.escape(page.title)}$", done.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("written", "near"),
    [("E306x", "E306"), ("E366000", "E4001"), ("E2999", "E2033"), ("E700", "E605"), ("vocabulary", "E")],
)
def test_an_unknown_code_is_exit_2_with_the_nearest(written, near):
    done = explain(written)
    assert done.exit_code == 2
    assert "error[E200]: unknown error code" in done.stderr and "nearest: " in done.stderr


def test_the_nearest_of_a_number_are_close_to_it():
    codes = ["E301", "E305", "E306", "E399", "E2001", "E2013"]
    assert explanations.nearest("304", codes) == ["E301", "E305", "E306"]
    assert explanations.nearest("2012", codes) == ["E2001", "E2013"]
    with pytest.raises(UsageError, match="unknown error code") as refused:
        explanations.page("E307\x1b[2J")
    assert "\x1b" not in refused.value.message


def test_json_of_a_page_of_the_list_and_of_a_refusal():
    page = json.loads(explain("E231", "--json").stdout)["page"]
    assert page["code"] == "E231" and page["exit_codes"] == [2, 3] and page["group"] == "quantizing"
    assert all(page[key] for key in ("title", "meaning", "when", "fix", "example"))
    listed = json.loads(explain("--json").stdout)["groups"]
    assert {code["code"] for group in listed for code in group["codes"]} == set(PAGES)
    refused = explain("E999", "--json")
    assert refused.exit_code == 2 and json.loads(refused.stdout)["error"]["code"] == "E200"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("# A\nb\n\n## E1 Odd\nx\nWhen: y\nFix: z\n    w\n", "no heading"),
        ("# A\nb\n\n## E301 Odd\nx\nWhen: y\nFix: z\n", "E301 has no example"),
        ("# A\nb\n\n## E301 Odd\nWhen: y\n    w\n", "E301 has no meaning and no fix"),
        ("## E301 Odd\nx\nWhen: y\nFix: z\n    w\n", "begins with a title"),
    ],
)
def test_an_entry_that_lacks_a_part_is_named(text, what):
    with pytest.raises(ValueError, match=what):
        explanations.read_group("some", text)


def test_codes_that_are_printed_or_chosen_are_no_calls():
    """The lists by hand in error_sites hold only what the scan cannot see."""
    assert not (set(PRINTED) - {"E200"} | set(CHOSEN)) & {site.code for site in sites()}
