"""``surgeon clean``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from surgeon.cli import options as o
from surgeon.cli.errors import run_command
from surgeon.cli.output import Output, size


def clean(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="The folder that holds the outputs.")] = ".",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove without asking.")] = False,
    json_: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """List or remove what interrupted runs left behind; never touches a run that lives.

    An interrupted run is continued by repeating its command, so removing its leftovers costs the
    work done so far. A previous model that an interrupted overwrite moved aside is put back when
    nothing else is in its place. Without a terminal and without --yes, this only lists.
    """
    out = Output(json_, quiet, verbose)

    def work() -> dict[str, Any]:
        from surgeon.python import cleaning

        document = cleaning.clean(folder)
        for destination in document["live"]:
            out.note(f"a run is writing {destination}; its files are left alone")
        found = document["leftovers"]
        for item in found:
            _show(out, item)
        if not found:
            out.line("nothing to clean")
            return document
        total = sum(item["bytes"] for item in found)
        out.line(f"{len(found)} leftover{'s' if len(found) > 1 else ''}, {size(total)}")
        if not _agreed(out, yes, json_, len(found)):
            out.line("nothing was changed; --yes removes them")
            return document
        document = cleaning.clean(folder, yes=True)
        for path in document["restored"]:
            out.line(f"restored {path}")
        for path in document["removed"]:
            out.line(f"removed  {path}")
        return document

    raise typer.Exit(run_command(out, "clean", work))


def _show(out: Output, item: dict[str, Any]) -> None:
    name = Path(item["destination"]).name
    if item["kind"] == "lock":
        text = "lock file of a run that is gone"
    elif item["restorable"]:
        text = f"{size(item['bytes'])}   the previous {name}, and {name} is gone: it will be put back"
    elif item["kind"] == "previous":
        text = (f"{size(item['bytes'])}   the previous {name}, replaced by what is there now; "
                f"to go back: move {name} away and rename this to it")  # fmt: skip
    else:
        doing = f"{item['verb'] or 'run'} to {name}"
        inputs = f" of {', '.join(item['inputs'])}" if item["inputs"] else ""
        text = f"{size(item['bytes'])}   interrupted {doing}{inputs}, {item['finished']:,} items finished"
    out.line(f"{item['path']}   {text}")


def _agreed(out: Output, yes: bool, json_mode: bool, count: int) -> bool:
    if yes:
        return True
    if json_mode or not sys.stdin.isatty():
        return False
    try:
        return typer.confirm(f"remove {'it' if count == 1 else 'them'}?", default=False, err=True)
    except typer.Abort:
        return False
