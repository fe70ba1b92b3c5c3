"""Every way surgeon can refuse, as one tree of exceptions.

    SurgeonError                 carries code, message, where, help
    ├── UsageError          2    command line or recipe is wrong
    ├── InputError          3    a checkpoint is malformed or does not fit
    ├── CheckFailed         4    a gate or a requested comparison failed
    ├── EnvironmentFault    5    disk, memory, network, permission, package
    ├── OutputConflict      6    destination exists, is locked, or is an input
    └── Interrupted       130    stopped by a signal; resumable

Anything that is not a SurgeonError is a bug of this program (exit 1). The command
line renders these; the library only raises them. Codes are stable, of three or four digits: E2
usage, E3 input, E4 checks and inputs that a method finds unfit while it works, E5 environment,
E6 output. `surgeon explain E303` shows the page of one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from surgeon.scalars import show


@dataclass(frozen=True)
class Where:
    """The place a message speaks about; every field is optional."""

    file: str | None = None
    line: int | None = None
    column: int | None = None
    tensor: str | None = None

    def __str__(self) -> str:
        place = self.file or ""
        if self.line is not None:
            place += f":{self.line}"
            if self.column is not None:
                place += f":{self.column}"
        if self.tensor is not None:
            place += f" [{self.tensor}]" if place else self.tensor
        return place


class SurgeonError(Exception):
    """A refusal with a stable code, one sentence, a place and a way out.

    Args:
        code: stable identifier such as "E303".
        message: one sentence, no trailing full stop, naming the value that was given.
        where: file, line, column or tensor the sentence is about.
        help: what to do; a command where there is one.
        others: further findings of the same run, shown after the first.
    """

    exit_code = 1

    def __init__(
        self,
        code: str,
        message: str,
        *,
        where: Where | None = None,
        help: str | None = None,
        others: Iterable[SurgeonError] = (),
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.where = where
        self.help = help
        self.others = tuple(others)

    def __str__(self) -> str:
        place = f" ({self.where})" if self.where and str(self.where) else ""
        return f"[{self.code}] {self.message}{place}"

    def __reduce__(self):
        return (_rebuild, (type(self), self.code, self.message, self.where, self.help, self.others))


def _rebuild(cls, code, message, where, help, others):
    return cls(code, message, where=where, help=help, others=others)


class UsageError(SurgeonError):
    """The command line or a recipe is wrong (exit 2)."""

    exit_code = 2


class InputError(SurgeonError):
    """A checkpoint is malformed, incomplete, or does not fit the others (exit 3)."""

    exit_code = 3


class CheckFailed(SurgeonError):
    """A quality gate or a comparison the user asked for failed (exit 4)."""

    exit_code = 4


class EnvironmentFault(SurgeonError):
    """Disk, memory, network, permissions or a package are in the way (exit 5)."""

    exit_code = 5


class OutputConflict(SurgeonError):
    """The destination exists, is locked, is an input, or belongs to another plan (exit 6)."""

    exit_code = 6


class Interrupted(SurgeonError):
    """A signal asked to stop; finished work is kept and can be resumed (exit 130 or 143)."""

    exit_code = 130

    def __init__(self, code: str, message: str, *, signal_number: int = 2, **fields) -> None:
        super().__init__(code, message, **fields)
        self.exit_code = 128 + signal_number


def raise_all(findings: Iterable[SurgeonError]) -> None:
    """Raise the first finding with all further ones attached; do nothing when there is none."""
    found = list(findings)
    if not found:
        return
    first = found[0]
    first.others = (*first.others, *found[1:])
    raise first


def wrong_options(
    found: Iterable[Mapping[str, Any]], *, code: str, verb: str, known: Iterable[str]
) -> UsageError:
    """Return what checking a request found as one refusal with all further ones attached.

    Args:
        found: the errors of a pydantic ValidationError.
        code: of the refusal.
        verb: the command that has the options.
        known: names of the options, with underscores.
    """
    usual = f'"surgeon {verb} --help" says what each option takes'
    refused = []
    for one in found:
        name = str(one["loc"][0])[:60] if one["loc"] else ""
        option = f"--{name.replace('_', '-')}" if name else "the request"
        if one["type"] == "extra_forbidden":
            refused.append(
                UsageError(code, f"{verb} has no option {option}", help=close_matches(name, known) or usual)
            )
        else:
            said = str(one["msg"]).removeprefix("Value error, ")
            message = f"{option} is {show(one.get('input'))}: {said[:1].lower()}{said[1:]}"
            refused.append(UsageError(code, message, help=usual))
    refused[0].others = tuple(refused[1:])
    return refused[0]


def close_matches(word: str, choices: Iterable[str]) -> str | None:
    """Return a 'did you mean "x"?' sentence for a misspelt word, or None."""
    import difflib

    hits = difflib.get_close_matches(word, sorted(choices), n=1, cutoff=0.55)
    return f'did you mean "{hits[0]}"?' if hits else None
