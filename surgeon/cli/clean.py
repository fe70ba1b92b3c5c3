"""``surgeon clean``."""

from __future__ import annotations

import dataclasses
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
        from surgeon.output import leftovers

        found, live = leftovers.find(Path(folder))
        for destination in live:
            out.note(f"a run is writing {destination}; its files are left alone")
        entries = [_entry(item) for item in found]
        for item in found:
            _show(out, item)
        document = {
            "folder": folder,
            "leftovers": entries,
            "live": [str(d) for d in live],
            "removed": [],
            "restored": [],
        }
        if not found:
            out.line("nothing to clean")
            return document
        total = sum(item.bytes for item in found)
        out.line(f"{len(found)} leftover{'s' if len(found) > 1 else ''}, {size(total)}")
        if not _agreed(out, yes, json_, len(found)):
            out.line("nothing was changed; --yes removes them")
            return document
        _act(out, leftovers, found, document)
        return document

    raise typer.Exit(run_command(out, "clean", work))


def _entry(item: Any) -> dict[str, Any]:
    return {**dataclasses.asdict(item), "path": str(item.path), "destination": str(item.destination),
            "restorable": _restorable(item)}  # fmt: skip


def _restorable(item: Any) -> bool:
    return item.kind == "previous" and not item.destination_exists


def _show(out: Output, item: Any) -> None:
    if item.kind == "lock":
        text = "lock file of a run that is gone"
    elif _restorable(item):
        text = f"{size(item.bytes)}   the previous {item.destination.name}, and {item.destination.name} is gone: it will be put back"
    elif item.kind == "previous":
        text = (f"{size(item.bytes)}   the previous {item.destination.name}, replaced by what is there now; "
                f"to go back: move {item.destination.name} away and rename this to it")  # fmt: skip
    else:
        doing = f"{item.verb or 'run'} to {item.destination.name}"
        inputs = f" of {', '.join(item.inputs)}" if item.inputs else ""
        text = f"{size(item.bytes)}   interrupted {doing}{inputs}, {item.finished:,} items finished"
    out.line(f"{item.path}   {text}")


def _agreed(out: Output, yes: bool, json_mode: bool, count: int) -> bool:
    if yes:
        return True
    if json_mode or not sys.stdin.isatty():
        return False
    try:
        return typer.confirm(f"remove {'it' if count == 1 else 'them'}?", default=False, err=True)
    except typer.Abort:
        return False


def _act(out: Output, leftovers: Any, found: list[Any], document: dict[str, Any]) -> None:
    for item in sorted(found, key=lambda i: not _restorable(i)):
        if _restorable(item) and not item.destination.exists():
            back = leftovers.restore(item)
            if back is not None:
                document["restored"].append(str(back))
                out.line(f"restored {back}")
            continue
        if item.kind == "previous" and _restorable(item):
            continue  # a newer copy was put back; this one is kept
        if leftovers.remove(item):
            document["removed"].append(str(item.path))
            out.line(f"removed  {item.path}")
