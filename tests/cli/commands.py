"""Runs one command in this process, as the entry point does."""

from __future__ import annotations

import json
from typing import Any

from surgeon.cli import app


class Ran:
    """Exit code, what was printed, and the one JSON document."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def document(self) -> dict[str, Any]:
        return json.loads(self.out)


def run(capsys, *arguments: object) -> Ran:
    name, *rest = map(str, arguments)
    code = app.run(name, rest)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err, captured.err
    assert "\x1b" not in captured.out + captured.err
    assert code != 1, captured.err
    return Ran(code, captured.out, captured.err)
