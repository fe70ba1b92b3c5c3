"""Every fault that merging and pruning can meet has a test that carries its identifier; this fails when one has none."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest
from test_hostile import CASES

TESTS = Path(__file__).resolve().parents[1]

REQUIRED = [
    *(f"A{n}" for n in range(1, 15)),  # interrupted or failing writes
    *(f"B{n}" for n in range(1, 11)),  # malformed weight files
    *(f"C{n}" for n in range(1, 10)),  # index and folder
    *(f"D{n}" for n in range(1, 11)),  # values and types
    "E1", "E2", "E3", "E4", "E5", "E6", "E7", "E8", "E9", "E10", "E11",  # architecture and configuration
    "F1", "F2", "F3", "F4", "F5", "F6", "F7", "F8", "F9", "F10", "F11",  # recipes and command line
    "G1", "G2", "G3", "G4", "G5", "G7", "G8",  # code execution and trust
    "H1", "H2", "H4", "H5", "H6", "H8",  # resources and environment
    "I1", "I2", "I3", "I4",  # concurrency
    "J1", "J2", "J3", "J4", "J5", "J6", "J7", "J8", "J9", "J10",  # calibration, pruning, evaluation, gates
]  # fmt: skip


@functools.cache
def identifiers() -> dict[str, list[str]]:
    """Return identifier -> tests, from function names and from the corpus of hostile folders."""
    found: dict[str, list[str]] = {}
    for file in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                for part in re.findall(r"(?<=_)[A-J]\d+(?=_)", node.name):
                    found.setdefault(part, []).append(f"{file.name}::{node.name}")
    for name in CASES:
        found.setdefault(name.split()[0], []).append(f"hostile folder {name}")
    return found


@pytest.mark.parametrize("identifier", REQUIRED)
def test_every_fault_has_a_test(identifier):
    assert identifiers().get(identifier), f"no test carries {identifier} in its name"


def test_no_test_carries_an_identifier_that_does_not_exist():
    last = {"A": 14, "B": 10, "C": 9, "D": 10, "E": 11, "F": 11, "G": 8, "H": 9, "I": 4, "J": 10}
    wrong = [i for i in identifiers() if not 1 <= int(i[1:]) <= last.get(i[0], 0)]
    assert not wrong
