"""Model references: `path`, `org/name@revision`, `base+adapter@revision`, `hf://org/name@rev/folder`.

A path that exists on this machine is taken literally, so that folders whose names contain
`+` or `@` need no escaping. Nothing here opens a model or asks the hub.

Errors: `UsageError` E204 (not a model reference), E259 (environment variable).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from surgeon.errors import UsageError, Where
from surgeon.merge.spec import ModelRef
from surgeon.scalars import show

_VARIABLE = re.compile(r"\$\{([^}]*)\}")
_VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# No path is longer; keeps looking for existing prefixes cheap.
_LONGEST = 4096
# Revisions of the hub that contain slashes themselves.
_HUB_REVISION = re.compile(r"(refs/pr/[0-9]+|refs/convert/[^/]+|[^/]+)(?:/(.*))?")


def parse_model_ref(text: str, *, where: Where | None = None) -> ModelRef:
    """Split a reference into path or hub id, revision, adapter and subfolder.

    Args:
        text: what the user wrote.
        where: position for messages.

    Raises:
        UsageError: E204 empty, several adapters, or several revisions.
    """
    text = text.strip()
    if not text or "\0" in text or len(text) > _LONGEST:
        message = f"{show(text)} is not a model reference" if text else "an empty model reference"
        raise UsageError("E204", message, where=where, help="give a path or a hub id")
    if os.path.exists(text):
        return ModelRef(text)
    base, adapter = _split(text, "+", "adapter", where)
    if base.startswith("hf://"):
        path, revision, subfolder = _hub_address(base, where)
    else:
        path, revision = _split(base, "@", "revision", where)
        subfolder = None
    if adapter is None:
        return ModelRef(path, revision, subfolder=subfolder)
    if adapter.startswith("hf://"):
        adapter, adapter_revision, folder = _hub_address(adapter, where)
        if folder:
            raise UsageError(
                "E204",
                f"an adapter cannot lie in a subfolder: {show(text)}",
                where=where,
                help="give the adapter's own folder: BASE+./adapter",
            )
    else:
        adapter, adapter_revision = _split(adapter, "@", "revision", where)
    return ModelRef(path, revision, adapter, adapter_revision, subfolder)


def expand_variables(text: str, environment: Mapping[str, str], *, where: Where | None = None) -> str:
    """Replace every `${NAME}` by its value; nothing else that begins with `$` has a meaning.

    Raises:
        UsageError: E259 the variable is not set, or its name is malformed.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if not _VARIABLE_NAME.fullmatch(name):
            raise UsageError(
                "E259",
                f"{show(match[0])} is not a variable; only ${{NAME}} is known",
                where=where,
                help="write ${NAME}, or the path itself",
            )
        if name not in environment:
            raise UsageError(
                "E259", f"the environment variable {name} is not set", where=where, help=f"export {name}=..."
            )
        return environment[name]

    return _VARIABLE.sub(value, text)


def _split(text: str, sign: str, what: str, where: Where | None) -> tuple[str, str | None]:
    """Split at the sign, preferring the longest left part that exists on this machine."""
    places = [n for n, character in enumerate(text) if character == sign]
    if not places or os.path.exists(text):
        return text, None
    existing = [n for n in places if n and os.path.exists(text[:n])]
    if not existing and len(places) > 1:
        raise UsageError(
            "E204",
            f"a model reference takes one {what}, {show(text)} has {len(places)}",
            where=where,
            help="a path that contains + or @ is taken literally once it exists",
        )
    cut = existing[-1] if existing else places[0]
    left, right = text[:cut], text[cut + 1 :]
    if not left or not right:
        raise UsageError(
            "E204",
            f'{show(text)} has nothing {"before" if not left else "after"} the "{sign}"',
            where=where,
            help="MODEL+ADAPTER, or MODEL@REVISION",
        )
    return left, right


def _hub_address(text: str, where: Where | None) -> tuple[str, str | None, str | None]:
    """Split `hf://org/name[@revision][/folder]`."""
    parts = text.removeprefix("hf://").split("/", 2)
    if len(parts) < 2 or not all(parts[:2]):
        raise UsageError("E204", f"{show(text)} is not hf://ORG/NAME[@REVISION][/FOLDER]", where=where,
                         help="for example hf://org/name@main/folder")  # fmt: skip
    owner, name = parts[:2]
    rest = parts[2] if len(parts) == 3 else ""
    name, at, revision = name.partition("@")
    if not at:
        return f"{owner}/{name}", None, rest.strip("/") or None
    match = _HUB_REVISION.fullmatch(f"{revision}/{rest}" if rest else revision)
    if match is None or not name:
        raise UsageError("E204", f'{show(text)} has nothing on one side of the "@"', where=where,
                         help="hf://ORG/NAME@REVISION, a branch, tag or commit")  # fmt: skip
    return f"{owner}/{name}", match[1], (match[2] or "").strip("/") or None
