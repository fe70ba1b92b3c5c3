"""Strict YAML: plain data out, or one clear refusal with line and column.

PyYAML reads the tokens; everything that turns text into values is decided here, because its
YAML 1.1 rules read `010` as 8, `no` as False, `12:30` as 750 and the commit id `0123456` as
42798, and because it drops the first of two equal keys without a word. The rules are:

- Plain `true`, `false`, `null`, `~`, decimal integers and decimal or exponent numbers become
  values; every other scalar is text. `booleans="1.1"` adds yes/no/on/off.
- Keys are text, taken from the source. A key may occur once in a mapping; overriding one that
  came in through `<<` is not a repetition.
- Anchors, aliases and `<<` work; the size after expansion is known before anything is expanded.
- Every key and value has a position, and every scalar its source text, so that a revision such
  as `1e5` can be read as it was written.

Errors (all `UsageError`):

    E250  not readable as YAML: missing file, encoding, control characters, syntax, tabs
    E251  duplicate key
    E252  too large, too deep, too many nodes or documents
    E253  tag, recursive alias, key that is not text, `<<` of something else than mappings
    E254  not exactly one document
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from surgeon.errors import UsageError, Where, close_matches, raise_all
from surgeon.scalars import plain_number, show

MAX_BYTES = 1024 * 1024
MAX_NODES = 100_000
MAX_DEPTH = 50
MAX_DOCUMENTS = 100
MAX_ERRORS = 200

Booleans = Literal["1.2", "1.1"]
KeyPath = tuple[str | int, ...]

_WORDS: dict[str, bool | None] = {
    **dict.fromkeys(("null", "Null", "NULL", "~", ""), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_WORDS_1_1: dict[str, bool | None] = {
    **_WORDS,
    **dict.fromkeys(("yes", "Yes", "YES", "on", "On", "ON"), True),
    **dict.fromkeys(("no", "No", "NO", "off", "Off", "OFF"), False),
}
_TEXT_TAG = "tag:yaml.org,2002:str"


@dataclass(frozen=True)
class Document:
    """One YAML document as data, with the place and the text of everything in it.

    A path is the tuple of keys and list indexes from the top, e.g. ``("models", 0, "weight")``.

    Attributes:
        data: dicts with text keys, lists, text, numbers, booleans, None.
        text: the source of this document.
        file: name used in messages.
        keys: path -> position of the key.
        values: path -> position of the value.
        sources: path -> a scalar as written, without quotes.
    """

    data: Any
    text: str
    file: str | None
    keys: dict[KeyPath, Where]
    values: dict[KeyPath, Where]
    sources: dict[KeyPath, str]

    def where(self, path: KeyPath) -> Where:
        """Return the position of the value at a path, or of the nearest enclosing one."""
        return self._nearest(self.values, path)

    def key_where(self, path: KeyPath) -> Where:
        """Return the position of the key at a path; of the value where there is no key."""
        return self.keys.get(path) or self.where(path)

    def source(self, path: KeyPath) -> str | None:
        """Return the scalar at a path exactly as written, or None if there is no scalar."""
        return self.sources.get(path)

    def _nearest(self, places: dict[KeyPath, Where], path: KeyPath) -> Where:
        while path not in places and path:
            path = path[:-1]
        return places.get(path) or Where(file=self.file)


def load_file(path: str | Path, *, booleans: Booleans = "1.2") -> Document:
    """Read a file that holds exactly one YAML document."""
    return load(read_text(path), str(path), booleans=booleans)


def load(text: str | bytes, file: str | None = None, *, booleans: Booleans = "1.2") -> Document:
    """Read text that holds exactly one YAML document."""
    documents = load_all(text, file, booleans=booleans)
    if len(documents) == 1:
        return documents[0]
    if not documents:
        raise UsageError(
            "E254",
            "the YAML is empty",
            where=Where(file, 1, 1),
            help="the file may not have been written to the end",
        )
    raise UsageError(
        "E254",
        f"one YAML document expected, found {len(documents)}",
        where=documents[1].where(()),
        help='remove the "---" line, or split the file',
    )


def load_all(text: str | bytes, file: str | None = None, *, booleans: Booleans = "1.2") -> list[Document]:
    """Read every YAML document of a text; documents without content are left out."""
    text = decode(text, file)
    words = _WORDS_1_1 if booleans == "1.1" else _WORDS
    roots = list(_compose(text, file))
    starts = [0, *(start for _, start in roots[1:]), len(text)]
    builders = [_Builder(file, words) for _ in roots]
    data = [builder.build(root, ()) for builder, (root, _) in zip(builders, roots, strict=True)]
    raise_all(error for builder in builders for error in builder.errors)
    return [
        Document(value, text[starts[n] : starts[n + 1]], file, builder.keys, builder.values, builder.sources)
        for n, (value, builder) in enumerate(zip(data, builders, strict=True))
        if value is not None
    ]


def read_text(path: str | Path) -> str:
    """Read a YAML file as text, refusing what is missing, too large or not UTF-8."""
    try:
        with open(path, "rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(
            "E250",
            f"cannot read {path}: {error.strerror}",
            where=Where(file=str(path)),
            help=_way(path, error),
        ) from None
    return decode(content, str(path))


def _way(path: str | Path, error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        near = close_matches(Path(path).name, (p.name for p in Path(path).parent.glob("*.y*ml")))
        return (
            near or 'paths start from the current folder; "surgeon recipe list" shows the recipes that ship'
        )
    return (
        "give a YAML file" if isinstance(error, IsADirectoryError) else "give a file that this user can read"
    )


def decode(text: str | bytes, file: str | None = None) -> str:
    """Return text without a byte-order mark, refusing what is too large or not UTF-8."""
    size = len(text) if isinstance(text, bytes) else len(text.encode("utf-8", "surrogatepass"))
    if size > MAX_BYTES:
        raise UsageError(
            "E252",
            f"the YAML is larger than {MAX_BYTES:,} bytes",
            where=Where(file=file),
            help="keep data out of the recipe",
        )
    if isinstance(text, bytes):
        if text.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise UsageError(
                "E250",
                "the YAML is UTF-16, UTF-8 is needed",
                where=Where(file, 1, 1),
                help="save it as UTF-8",
            )
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            before = text[: error.start].decode("utf-8").split("\n")
            raise UsageError(
                "E250",
                f"the YAML is not UTF-8 (byte 0x{text[error.start]:02x})",
                where=Where(file, len(before), len(before[-1]) + 1),
                help="save it as UTF-8",
            ) from None
    return text.removeprefix("\ufeff")


class _Loader(yaml.SafeLoader):
    """PyYAML's parser, measuring each node as it is composed so that no alias is ever walked."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 - PyYAML's own class attribute

    def __init__(self, text: str, file: str | None) -> None:
        super().__init__(text)
        self.file = file
        self.level = 0
        self.composed = 0
        self.measured: dict[int, tuple[yaml.Node, int, int]] = {}

    def compose_node(self, parent, index):
        event: Any = self.peek_event()
        place = _where(self.file, event.start_mark)
        if isinstance(event, yaml.AliasEvent):
            node: Any = super().compose_node(parent, index)
            if id(node) not in self.measured:
                raise UsageError(
                    "E253",
                    f"alias {show(event.anchor)} contains itself",
                    where=place,
                    help="write the value out",
                )
            return node
        if event.tag not in (None, _TEXT_TAG) or (event.tag and not isinstance(event, yaml.ScalarEvent)):
            raise UsageError(
                "E253",
                f"YAML tag {show(event.tag)} is not accepted",
                where=place,
                help="write the plain value; recipes are data only",
            )
        self.level += 1
        self.composed += 1
        if self.level > MAX_DEPTH:
            raise UsageError(
                "E252",
                f"the YAML is nested deeper than {MAX_DEPTH}",
                where=place,
                help="no setting lies that deep; check brackets and indentation",
            )
        if self.composed > MAX_NODES:
            raise UsageError(
                "E252",
                f"the YAML has more than {MAX_NODES:,} nodes",
                where=place,
                help="split the file, or keep data out of the recipe",
            )
        node = super().compose_node(parent, index)
        if isinstance(event, yaml.ScalarEvent) and not node.value.isascii():
            node.value = _joined(node.value, place)
        if event.tag:
            node.style = "'"  # an explicit !!str is text even when it is written plainly
        self.level -= 1
        self._measure(node, place)
        return node

    def _measure(self, node: Any, place: Where) -> None:
        children: list = [] if isinstance(node, yaml.ScalarNode) else list(node.value)
        if isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
        sizes = [self.measured[id(child)][1:] for child in children]
        count = 1 + sum(size for size, _ in sizes)
        depth = 1 + max((deep for _, deep in sizes), default=0)
        if count > MAX_NODES or depth > MAX_DEPTH:
            what = f"{MAX_NODES:,} nodes" if count > MAX_NODES else f"{MAX_DEPTH} levels"
            raise UsageError(
                "E252",
                f"the YAML has more than {what} once aliases are expanded",
                where=place,
                help="write out less through aliases",
            )
        self.measured[id(node)] = (node, count, depth)


def _compose(text: str, file: str | None) -> Iterator[tuple[Any, int]]:
    """Yield the node graph and the start index of each document."""
    loader = None
    try:
        loader = _Loader(text, file)
        documents = total = 0
        while loader.check_node():
            start = loader.peek_event().start_mark.index  # type: ignore[union-attr]
            node = loader.get_node()
            documents += 1
            total += loader.measured[id(node)][1]
            if documents > MAX_DOCUMENTS or total > MAX_NODES:
                what = f"{MAX_DOCUMENTS} documents" if documents > MAX_DOCUMENTS else f"{MAX_NODES:,} nodes"
                raise UsageError(
                    "E252",
                    f"the YAML has more than {what}",
                    where=Where(file=file),
                    help="split the file, or keep data out of the recipe",
                )
            yield node, start
    except yaml.reader.ReaderError as error:
        raise _unprintable(text, error, file) from None
    except yaml.MarkedYAMLError as error:
        raise _syntax(text, error, file) from None
    except (ValueError, OverflowError, IndexError):
        # PyYAML converts %YAML versions and \U escapes without checking their range.
        mark = loader.get_mark() if loader else None
        raise UsageError(
            "E250",
            "not valid YAML: a number or escape is out of range",
            where=_where(file, mark),
            help="correct the value at this place",
        ) from None


class _Builder:
    """Turns one node graph into data, remembering positions, source texts and duplicate keys."""

    def __init__(self, file: str | None, words: dict[str, bool | None]) -> None:
        self.file = file
        self.words = words
        self.keys: dict[KeyPath, Where] = {}
        self.values: dict[KeyPath, Where] = {}
        self.sources: dict[KeyPath, str] = {}
        self.errors: list[UsageError] = []
        self.reported: set[tuple[str, Where | None]] = set()

    def build(self, node: Any, path: KeyPath) -> Any:
        self.values[path] = _where(self.file, node.start_mark)
        if isinstance(node, yaml.ScalarNode):
            self.sources[path] = node.value
            return node.value if node.style else self._plain(node.value)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, (*path, n)) for n, item in enumerate(node.value)]
        result = {}
        for name, (key, value) in self._pairs(node).items():
            self.keys[(*path, name)] = _where(self.file, key.start_mark)
            result[name] = self.build(value, (*path, name))
        return result

    def _plain(self, text: str) -> Any:
        if text in self.words:
            return self.words[text]
        number = plain_number(text)
        return text if number is None else number

    def _pairs(self, node: Any) -> dict[str, tuple[Any, Any]]:
        """Return key -> (key node, value node), with `<<` resolved below the mapping's own keys."""
        own: dict[str, tuple[Any, Any]] = {}
        first: dict[tuple[str, bool], Where] = {}
        merged: dict[str, tuple[Any, Any]] = {}
        for key, value in node.value:
            place = _where(self.file, key.start_mark)
            if not isinstance(key, yaml.ScalarNode):
                self._refuse(
                    UsageError(
                        "E253",
                        "a key must be text, not a list or mapping",
                        where=place,
                        help="write the key as a word",
                    )
                )
                continue
            merge = key.value == "<<" and not key.style
            if (key.value, merge) in first:
                self._refuse(_duplicate(key.value, first[key.value, merge], place, merge))
                continue
            first[key.value, merge] = place
            if merge:
                merged = self._merged(value)
            else:
                own[key.value] = (key, value)
        return {**merged, **own}

    def _merged(self, value: Any) -> dict[str, tuple[Any, Any]]:
        sources = value.value if isinstance(value, yaml.SequenceNode) else [value]
        result: dict[str, tuple[Any, Any]] = {}
        for source in sources:
            if not isinstance(source, yaml.MappingNode):
                place = _where(self.file, source.start_mark)
                self._refuse(
                    UsageError(
                        "E253",
                        '"<<" takes a mapping or a list of mappings',
                        where=place,
                        help="write <<: *anchor, or <<: [*first, *second]",
                    )
                )
                continue
            for name, pair in self._pairs(source).items():
                result.setdefault(name, pair)
        return result

    def _refuse(self, error: UsageError) -> None:
        # A mapping behind several aliases is visited once for each; one report is enough.
        if (error.message, error.where) not in self.reported and len(self.errors) < MAX_ERRORS:
            self.reported.add((error.message, error.where))
            self.errors.append(error)


def _joined(text: str, place: Where) -> str:
    """Join surrogate pairs, which JSON-style escapes leave as two characters."""
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise UsageError(
            "E250",
            "half of a surrogate pair is no character",
            where=place,
            help="write the character itself, or both halves of the pair",
        ) from None


def _duplicate(name: str, first: Where, place: Where, merge: bool) -> UsageError:
    fix = 'write "<<: [*first, *second]"' if merge else "keep one of them"
    message = f"key {show(name)} occurs twice, on lines {first.line} and {place.line}"
    return UsageError("E251", message, where=place, help=fix)


def _where(file: str | None, mark: Any) -> Where:
    return Where(file, mark.line + 1, mark.column + 1) if mark else Where(file=file)


def _unprintable(text: str, error: Any, file: str | None) -> UsageError:
    before = text[: error.position].split("\n")
    return UsageError(
        "E250",
        f"the YAML contains the control character U+{ord(text[error.position]):04X}",
        where=Where(file, len(before), len(before[-1]) + 1),
        help="remove it; YAML is plain text",
    )


def _syntax(text: str, error: yaml.MarkedYAMLError, file: str | None) -> UsageError:
    mark = error.problem_mark or error.context_mark
    problem = (error.problem or error.context or "syntax error").replace("\n", " ")[:200]
    fix = "the place shown is where reading stopped: look there and on the line before"
    if mark is not None and text[mark.index : mark.index + 1] == "\t":
        problem, fix = "a tab where only spaces are allowed", "indent with spaces"
    elif mark is not None and text[mark.index : mark.index + 1] in ("@", "`", "%", "*", "&", "!", "|", ">"):
        fix = "put the value in quotes"
    elif "mapping values are not allowed" in problem:
        fix = 'check the indentation; quote a value that contains ": "'
    elif error.context and error.context_mark is not None and error.problem_mark is not None:
        problem += f", {error.context} that started on line {error.context_mark.line + 1}"
    return UsageError("E250", f"not valid YAML: {problem}", where=_where(file, mark), help=fix)
