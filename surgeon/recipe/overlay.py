"""Documents laid over each other, and values set by path: what ``extends``, ``--set`` and ``sweep`` do.

The result is again a `Document`: every key and value keeps the place it came from, so that a mistake is shown in
the file, or in the option, where it was made.

Codes: E2002 a path of --set that is not there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from surgeon.errors import UsageError, Where, close_matches
from surgeon.recipe import yaml
from surgeon.recipe.yaml import Document, KeyPath
from surgeon.scalars import show

NAMED_BY = {"steps": "id", "models": "model"}
"""List -> the key by which its items may be named in a path, beside their number."""

FREE = ("models", "data")
"""Mappings whose keys are names people choose: setting one that is not there is a mistake."""


def overlay(base: Document, over: Document) -> Document:
    """Lay ``over`` on ``base``: mappings merge, lists and scalars are replaced."""
    result = replace(
        over, data=dict(base.data), keys=dict(base.keys), values=dict(base.values), sources=dict(base.sources)
    )
    _lay(result, over, (), result.data, over.data)
    result.values[()] = over.values[()]
    return result


def _lay(
    result: Document, over: Document, path: KeyPath, below: dict[str, Any], above: dict[str, Any]
) -> None:
    for key, value in above.items():
        place = (*path, key)
        if isinstance(value, dict) and isinstance(below.get(key), dict):
            below[key] = dict(below[key])
            result.keys[place], result.values[place] = over.keys[place], over.values[place]
            _lay(result, over, place, below[key], value)
        else:
            below[key] = value
            _forget(result, place)
            for mine, theirs in (
                (result.keys, over.keys),
                (result.values, over.values),
                (result.sources, over.sources),
            ):
                mine.update({p: v for p, v in theirs.items() if p[: len(place)] == place})  # type: ignore[arg-type]


def _forget(document: Document, place: KeyPath) -> None:
    for table in (document.keys, document.values, document.sources):
        for path in [p for p in table if p[: len(place)] == place]:
            del table[path]


def set_option(document: Document, text: str) -> Document:
    """Return the document with one ``--set PATH=VALUE`` applied.

    Raises:
        UsageError: E2002; E250 and others where the value is not readable.
    """
    words, sign, value = text.partition("=")
    where = Where(file=f"--set {text}")
    if not sign or not words.strip():
        raise UsageError(
            "E2002", f"--set {show(text)} sets nothing", where=where, help="--set models.long=./my-long"
        )
    path = find(document.data, words.strip(), where)
    given = yaml.load(value, where.file) if value.strip() else None
    return assign(
        document,
        path,
        None if given is None else given.data,
        where,
        value if given is None else given.source(()),
    )


def assign(
    document: Document, path: KeyPath, value: Any, where: Where, source: str | None = None
) -> Document:
    """Return the document with ``value`` at ``path``, which `find` returned; ``source`` is a scalar as written."""
    result = replace(
        document, data=_copied(document.data, path), keys=dict(document.keys), values=dict(document.values),
        sources=dict(document.sources),
    )  # fmt: skip
    holder: Any = result.data
    for word in path[:-1]:
        holder = holder[word]
    holder[path[-1]] = value
    _forget(result, path)
    result.keys[path] = result.values[path] = where
    if source is not None:
        result.sources[path] = source
    _place(result, value, path, where)
    return result


def _place(document: Document, value: Any, path: KeyPath, where: Where) -> None:
    """Give everything inside a set value its place, and scalars their text."""
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, child in children:
        document.values[(*path, key)] = where
        if not isinstance(child, (dict, list)):
            document.sources[(*path, key)] = str(child)
        _place(document, child, (*path, key), where)


def _copied(data: Any, path: KeyPath) -> Any:
    """Copy the containers along a path; the rest is shared."""
    copied = dict(data) if isinstance(data, dict) else list(data)
    if len(path) > 1:
        copied[path[0]] = _copied(data[path[0]], path[1:])  # type: ignore[index]
    return copied


def find(data: Any, words: str, where: Where) -> KeyPath:
    """Return the path that dotted words name; list items by number, steps by id, merged models by name.

    The last word may be a key that is not there yet: whether it is known shows when the recipe is read.

    Raises:
        UsageError: E2002.
    """
    parts = words.split(".")
    path: list[str | int] = []
    here = data
    while parts:
        if isinstance(here, dict):
            key, used = _key(here, parts)
            last = used == len(parts)
            free = len(path) == 1 and path[0] in FREE
            if key not in here and (not last or free):
                raise _nowhere(words, key, path, list(here), where)
        elif isinstance(here, list):
            key, used = _item(here, parts[0], path), 1
            if key is None:
                named = NAMED_BY.get(str(path[-1]) if path else "", "")
                raise _nowhere(words, parts[0], path, [str(i.get(named)) for i in here if isinstance(i, dict) and named in i]
                               or [str(n) for n in range(len(here))], where)  # fmt: skip
        else:
            raise UsageError("E2002", f"{show('.'.join(map(str, path)))} is a value with nothing inside it, so {show(words)} names nothing", where=where,
                             help=f"--set {'.'.join(map(str, path))}=... puts another value there")  # fmt: skip
        path.append(key)
        parts = parts[used:]
        here = here.get(key) if isinstance(here, dict) else here[key]  # type: ignore[index]
    return tuple(path)


def _key(mapping: dict[str, Any], parts: list[str]) -> tuple[str, int]:
    """Return the key the next words name: the longest that is there, because keys may hold dots."""
    for used in range(len(parts), 0, -1):
        if ".".join(parts[:used]) in mapping:
            return ".".join(parts[:used]), used
    return parts[0], 1


def _item(items: list[Any], word: str, path: list[str | int]) -> int | None:
    if word.isdecimal() and len(word) < 7:
        return int(word) if int(word) < len(items) else None
    named = NAMED_BY.get(str(path[-1]) if path else "")
    for number, item in enumerate(items):
        if isinstance(item, dict) and named in item and item[named] == word:
            return number
    return None


def _nowhere(words: str, word: str, path: list[str | int], known: list[str], where: Where) -> UsageError:
    inside = ".".join(map(str, path)) or "the recipe"
    near = close_matches(word, known)
    listed = ", ".join(known[:12]) or "nothing"
    return UsageError("E2002", f"{show(words)} names nothing: {inside} has no {show(word)}", where=where,
                      help=(f"{near} " if near else "") + f"{inside} has {listed}")  # fmt: skip
