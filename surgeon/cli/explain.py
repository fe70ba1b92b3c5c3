"""``surgeon explain``."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgeon.cli import options as o
from surgeon.cli.errors import run_command
from surgeon.cli.output import Output

if TYPE_CHECKING:
    from surgeon.explanations import Group, Page

WIDTH = 100


def explain(
    code: Annotated[str | None, typer.Argument(metavar="CODE", help="A code such as E305.")] = None,
    json_: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Explain an error code; without one, list all by subject."""
    out = Output(json_, quiet, verbose)

    def work() -> dict[str, Any]:
        from surgeon import explanations
        from surgeon.python import catalogue

        document = catalogue.explain(code)
        if code is None:
            _listing(out, explanations.groups())
        else:
            _show(out, explanations.page(code))
        return document

    raise typer.Exit(run_command(out, "explain", work))


def _listing(out: Output, groups: tuple[Group, ...]) -> None:
    for group in groups:
        out.line(f"{group.title}")
        for page in group.pages:
            out.line(f"  {page.code:<5}  {page.title}")
        out.line()
    out.line('"surgeon explain CODE" shows what a code means and what to do')


def _show(out: Output, page: Page) -> None:
    out.line(f"{page.code}: {page.title} (exit {' or '.join(map(str, page.exits))})")
    out.line()
    for text in (page.meaning, f"When: {page.when}", f"Fix: {page.fix}"):
        out.line(textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False))
        out.line()
    for line in page.example:
        out.line(f"    {line}")
