"""Shared by the merge tests: the command line in this process."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Finished:
    code: int
    out: str
    err: str

    @property
    def document(self) -> dict:
        return json.loads(self.out)


@pytest.fixture
def surgeon():
    """Run a command; return exit code, stdout and stderr."""

    def run(*arguments: object) -> Finished:
        from surgeon.cli.app import run as command

        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                name, *rest = map(str, arguments)
                code = command(name, rest)
            except SystemExit as end:
                code = end.code
        return Finished(int(code or 0), out.getvalue(), err.getvalue())

    return run
