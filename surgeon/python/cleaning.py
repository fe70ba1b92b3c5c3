"""What interrupted runs left behind: what ``surgeon clean`` lists and removes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from surgeon.python.results import Document


def clean(folder: str | Path = ".", *, yes: bool = False) -> Document:
    """List what interrupted runs left in a folder; with ``yes`` remove it. A run that lives is left alone.

    The same call continues an interrupted run, so removing its leftovers costs the work done so far. A previous model that
    an interrupted overwrite moved aside is put back when nothing else is in its place.

    Args:
        folder: the folder that holds the outputs.
        yes: remove.

    Example:
        >>> surgeon.clean("models")  # doctest: +SKIP
    """
    from surgeon.output import leftovers

    found, live = leftovers.find(Path(folder))
    document: dict[str, Any] = {
        "folder": str(folder),
        "leftovers": [_entry(item) for item in found],
        "live": [str(destination) for destination in live],
        "removed": [],
        "restored": [],
    }
    for item in sorted(found, key=lambda one: not _restorable(one)) if yes else ():
        if _restorable(item) and not item.destination.exists():
            back = leftovers.restore(item)
            if back is not None:
                document["restored"].append(str(back))
            continue
        if item.kind == "previous" and _restorable(item):
            continue  # a newer copy was put back; this one is kept
        if leftovers.remove(item):
            document["removed"].append(str(item.path))
    return Document("clean", document)


def _entry(item: Any) -> dict[str, Any]:
    return {**dataclasses.asdict(item), "path": str(item.path), "destination": str(item.destination),
            "restorable": _restorable(item)}  # fmt: skip


def _restorable(item: Any) -> bool:
    return item.kind == "previous" and not item.destination_exists
