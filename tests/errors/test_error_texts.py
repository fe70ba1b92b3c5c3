"""The words of every error: a change is seen, and each has the form that people and programs rely on."""

from __future__ import annotations

import ast
import difflib
import re
from collections import defaultdict

import error_sites
import pytest
import update_snapshot
from error_sites import CHOSEN, CLASSES, CODE, PRINTED, RECORDERS, Site, mentioned, sites

from surgeon import errors

EXITS = {name: getattr(errors, name).exit_code for name in CLASSES}

GROUPS = {1: {130}, 2: {2}, 3: {3}, 4: {3, 4}, 5: {5}, 6: {6}}
"""First digit of a code -> exit codes: E4xx are checks, and inputs that a method finds out about while it works."""

OF_ANOTHER_GROUP = {
    "E234": {"InputError"}, "E236": {"InputError"},  # result documents that cannot be read
    "E231": {"UsageError", "InputError"},  # a scheme that does not exist, or does not fit a matrix
    "E286": {"UsageError", "InputError"},  # a form that was asked for, or a folder that is none
    "E381": {"UsageError", "InputError"},  # an estimator, or a quantized model
    "E462": {"UsageError"}, "E470": {"UsageError"}, "E471": {"UsageError"}, "E474": {"UsageError"},
    "E475": {"UsageError"}, "E488": {"UsageError"}, "E489": {"UsageError"},  # targets and settings of quantize
    "E476": {"EnvironmentFault"},  # memory, of a method of quantize
}  # fmt: skip
"""Codes that are older than the rule. They stay, because codes are stable; nothing is added here."""


def classes() -> dict[str, set[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for site in sites():
        if CODE.fullmatch(site.code):
            found[site.code].add(site.kind)
    for code, kind in (PRINTED | CHOSEN).items():
        found[code].add(kind)
    return found


def at(site: Site) -> str:
    return f"{site.file}:{site.line} {site.code} {site.message}"


def test_texts_are_those_of_the_snapshot():
    was, now = update_snapshot.SNAPSHOT.read_text("utf-8").splitlines(), update_snapshot.text().splitlines()
    diff = list(difflib.unified_diff(was, now, "messages.snapshot", "the source", n=1, lineterm=""))
    shown = "\n".join(diff[:60])
    assert not diff, (
        f"texts of errors changed; if that is meant: python tests/errors/update_snapshot.py\n{shown}"
    )


def test_every_code_of_the_source_has_a_site():
    """What the scan does not see has no snapshot: codes outside of calls must be named in error_sites."""
    assert set(mentioned()) == set(classes())


def test_every_site_raises_a_class_of_the_tree_and_says_something():
    wrong = [at(site) for site in sites() if site.kind not in CLASSES or not site.message]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", RECORDERS)
def test_functions_that_make_exceptions_for_their_callers_make_that_class(name):
    kind = RECORDERS[name][0]
    found = []
    for path in error_sites.files():
        parsed = error_sites.module(path)
        function = parsed.functions.get(name)
        if function is not None and "code" in {
            a.arg for a in (*function.args.args, *function.args.kwonlyargs)
        }:
            found += [error_sites.called(n) for n in ast.walk(function) if isinstance(n, ast.Call)]
    assert kind in found
    assert not (CLASSES - {kind}) & set(found)


def test_a_code_has_one_class_and_its_group_is_its_exit_code():
    wrong = {}
    for code, kinds in classes().items():
        if code == "E001":  # a bug, exit 1
            continue
        if code in OF_ANOTHER_GROUP:
            if kinds != OF_ANOTHER_GROUP[code]:
                wrong[code] = kinds
        elif len(kinds) > 1 or not {EXITS[kind] for kind in kinds} <= GROUPS[int(code[1])]:
            wrong[code] = kinds
    assert not wrong


def test_messages_have_no_full_stop_and_nobody_shouts():
    wrong = []
    for site in sites():
        for text in filter(None, (site.message, site.help)):
            stops = re.search(r"(?<!\.)\.$", text) and not text.startswith("= ")
            words = re.sub(r"\{[^{}]*\}", "", text).lower()
            shouts = "!" in words and not text.startswith("= ")
            if stops or shouts or re.search(r"\b(sorry|please|oops)\b", words):
                wrong.append(at(site))
    assert not wrong, "\n".join(wrong)


def lacks_help(site: Site) -> bool:
    """Say whether an error has no help, or help that may be nothing: close_matches finds nothing for a strange word."""
    if site.kind == "Interrupted":  # the command line adds how to go on
        return False
    help = site.help
    return help is None or (
        help.startswith("= ")
        and (
            re.search(r"\bNone\b", re.sub(r"is (not )?None\b", "", help)) is not None
            or re.fullmatch(r"= close_matches\([^()]*(\([^()]*\)[^()]*)*\)", help) is not None
        )
    )


def test_every_message_has_a_help_line():
    lacking = [at(site) for site in sites() if lacks_help(site)]
    assert not lacking, "give help:\n" + "\n".join(lacking)


@pytest.mark.parametrize(
    "help, lacking",
    [
        (None, True), ("one of: a, b", False), ("= near or None", True), ("= INSTALL if absent else None", True),
        ("= close_matches(str(word), WORDS)", True), ("= close_matches(word, WORDS) or 'one of: a, b'", False),
        ("= 'a' if base is None else 'b'", False), ("= FIX", False),
    ],
)  # fmt: skip
def test_help_that_may_be_nothing_is_none(help, lacking):
    site = Site("E299", "UsageError", "it is bad", help, (), "surgeon/odd.py", 1)
    assert lacks_help(site) is lacking


def test_the_scan_follows_words_to_where_they_stand(tmp_path, monkeypatch):
    file = tmp_path / "surgeon" / "odd.py"
    file.parent.mkdir()
    file.write_text(
        'HINT = "do it again"\n'
        "def outer(kind):\n"
        '    message = f"no {kind} here" if kind else "nothing at all"\n'
        '    raise InputError("E399", message, help=HINT)\n'
        "def _fail(what):\n"
        '    raise UsageError("E299", f"it is {what!r:.9}")\n'
        "def caller():\n"
        '    _fail("rather bad")\n'
    )
    monkeypatch.setattr(error_sites, "PACKAGE", file.parent)
    error_sites.files.cache_clear()
    error_sites._texts.cache_clear()
    try:
        blocks = [site.block for site in error_sites.sites.__wrapped__()]
    finally:
        monkeypatch.undo()
        error_sites.files.cache_clear()
        error_sites._texts.cache_clear()
    assert blocks == [
        "E299 UsageError\n  message  it is {what!r:.9}\n    from _fail('rather bad')",
        "E399 InputError\n  message  = message\n  help     = HINT\n"
        "    message = 'no {kind} here' if kind else 'nothing at all'\n    HINT = do it again",
    ]
