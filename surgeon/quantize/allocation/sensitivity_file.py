"""Sensitivities as a JSON file, kept under a name made of everything they depend on.

Measuring takes long and allocating does not, so several targets are tried on one measurement. What the values depend
on (headers of the checkpoint, calibration text, formats, quantizer and its options) stands in the file in the clear:
a file that does not fit is refused with the entries that differ.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from surgeon.checkpoint.header import printable
from surgeon.errors import EnvironmentFault, InputError, Where
from surgeon.quantize.allocation.sensitivity import Kind, Sensitivities

VERSION = 1
KINDS: tuple[Kind, ...] = ("weight", "rel-output", "delta-loss", "fisher", "kl")


def key(kind: str, about: Mapping[str, Any]) -> str:
    """Return the digest of what sensitivities depend on, 16 hexadecimal digits."""
    content = json.dumps([VERSION, kind, dict(about)], sort_keys=True, allow_nan=False)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def place(folder: Path, kind: str, about: Mapping[str, Any]) -> Path:
    """Return the file in a work folder that holds, or will hold, these sensitivities."""
    return folder / f"sensitivities-{key(kind, about)}.json"


def save(path: Path, table: Sensitivities) -> None:
    """Write a table; the file appears under its name only when it is complete. Equal tables give equal bytes.

    Raises:
        EnvironmentFault: E501 it cannot be written.
    """
    content = _content(table)
    document = {"version": VERSION, "sha256": _digest(content), **content}
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        fact = f"cannot write {printable(path.name)}: {error.strerror}"
        raise EnvironmentFault(
            "E501", fact, where=Where(str(path)), help="free disk space, or name another place"
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)


def load(path: Path, *, kind: str | None = None, about: Mapping[str, Any] | None = None) -> Sensitivities:
    """Return the table that was saved.

    Args:
        path: the file.
        kind: the score it must be; any when None.
        about: what the values must depend on, compared entry by entry; anything when None.

    Raises:
        InputError: E463 no such file, not a file of sensitivities, damaged, or measured otherwise.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _refusal(path, f"cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError):
        raise _refusal(path, "is no file of sensitivities") from None
    table = _table(path, document)
    if kind is not None and table.kind != kind:
        raise _refusal(path, f"holds sensitivities by {table.kind}, not by {kind}")
    if about is not None:
        wanted = json.loads(json.dumps(dict(about)))
        differing = sorted(
            name for name in {*wanted, *table.about} if wanted.get(name) != table.about.get(name)
        )
        if differing:
            named = ", ".join(printable(name) for name in differing)
            raise _refusal(path, f"was measured with another {named}")
    return table


def _content(table: Sensitivities) -> dict[str, Any]:
    return {
        "kind": table.kind, "about": dict(table.about), "formats": list(table.formats),
        "modules": [
            {"name": name, "parameters": int(table.parameters[row]), "tokens": int(table.tokens[row]),
             "losses": [None if math.isnan(value) else value for value in table.losses[row].tolist()]}
            for row, name in enumerate(table.modules)
        ],
        "estimated": list(table.estimated),
    }  # fmt: skip


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _table(path: Path, document: Any) -> Sensitivities:
    if not isinstance(document, dict) or not {"version", "sha256", "kind", "modules"} <= set(document):
        raise _refusal(path, "is no file of sensitivities")
    if document["version"] != VERSION:
        raise _refusal(
            path, f"is of version {printable(str(document['version']))}; this program reads version {VERSION}"
        )
    content = {name: value for name, value in document.items() if name not in ("version", "sha256")}
    # Our own digest: content that passes is what `save` wrote, field for field.
    try:
        intact = _digest(content) == document["sha256"] and content["kind"] in KINDS
    except (ValueError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise _refusal(path, "is damaged")
    rows = content["modules"]
    losses = [[math.nan if value is None else value for value in row["losses"]] for row in rows]
    return Sensitivities(
        content["kind"], tuple(row["name"] for row in rows), tuple(content["formats"]),
        np.array(losses, dtype=np.float64).reshape(len(rows), len(content["formats"])),
        np.array([row["tokens"] for row in rows], dtype=np.int64),
        np.array([row["parameters"] for row in rows], dtype=np.int64), content["about"], tuple(content["estimated"]),
    )  # fmt: skip


def _refusal(path: Path, fact: str) -> InputError:
    return InputError("E463", f"{printable(path.name)} {fact}", where=Where(str(path)),
                      help="name a file that is not there yet, and losses are measured and written to it")  # fmt: skip
