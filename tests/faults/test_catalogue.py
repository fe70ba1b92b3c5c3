"""Every fault has a test that carries its identifier, and the page that lists them is current."""

from __future__ import annotations

import pytest
import table


@pytest.mark.parametrize("identifier", table.FAULTS)
def test_every_fault_has_a_test(identifier):
    assert table.identifiers().get(identifier), f"no test carries {identifier} in its name"


def test_no_test_carries_an_identifier_that_does_not_exist():
    assert not set(table.identifiers()) - set(table.FAULTS)


def test_groups_are_numbered_without_gaps():
    last = {letter: 0 for letter in table.GROUPS}
    for name in table.FAULTS:
        last[name[0]] += 1
        assert int(name[1:]) == last[name[0]], name
    assert list(last.values()) == [14, 10, 9, 10, 11, 11, 8, 9, 4, 10]


def test_the_page_is_current():
    assert table.PAGE.read_text("utf-8") == table.page(), (
        "python tests/faults/table.py writes docs/faults.md again"
    )


def test_descriptions_are_one_line_in_one_form():
    for name, text in table.FAULTS.items():
        assert len(text) < 130 and not text.endswith("."), name
    assert len(set(table.FAULTS.values())) == len(table.FAULTS)
