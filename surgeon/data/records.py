"""From what the user wrote to records: files, folders of files, Hugging Face datasets.

A record is one JSON object: a line of a JSONL file, an entry of a JSON list, a row of a parquet
table or dataset, or ``{"text": ...}`` for a whole plain-text file. Nothing is repaired: a bad
line is reported with its number, and up to `MAX_FINDINGS` of them at once.

Codes: E222 the source cannot be understood; E370 missing or of a kind that is not read, E371 a
malformed record, E372 no records, E373 too large, E379 a dataset without that configuration or
split; E512 a library is missing; E521, E522, E524 as for models of the hub.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgeon.checkpoint.header import open_regular, printable
from surgeon.errors import InputError, SurgeonError, UsageError, Where, close_matches, raise_all

LIMIT_BYTES = 500_000_000
"""Bytes of one source; records are held in memory, and calibration needs a few megabytes."""
MAX_FINDINGS = 20
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
TABLE_SUFFIXES = (".parquet",)
TEXT_SUFFIXES = (".txt", ".md")
READABLE = ".jsonl, .json (a list), .parquet, .txt, .md, a folder of these, or a datasets id such as org/name"
_PACKED = {".gz": "gunzip -k", ".bz2": "bunzip2 -k", ".xz": "unxz -k", ".zst": "unzstd", ".zip": "unzip"}
_MAGIC = {
    b"\x1f\x8b": ".gz",
    b"BZh": ".bz2",
    b"\xfd7zXZ": ".xz",
    b"\x28\xb5\x2f\xfd": ".zst",
    b"PK\x03\x04": ".zip",
}
_DATASET_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?(?::[\w.+-]*)?(?::[\w.+\[\]%:-]+)?")
_DOMAIN = re.compile(r"[A-Za-z0-9][\w. +-]*")


@dataclass(frozen=True)
class Record:
    """One record.

    Attributes:
        values: field -> value, as JSON gives them.
        line: line of the file (row of a table, entry's first line in a JSON list), from 1.
        file: the file it stands in as messages name it; a dataset's id for a dataset.
    """

    values: dict[str, Any]
    line: int
    file: str = ""

    @property
    def where(self) -> Where:
        return Where(self.file or None, self.line)


@dataclass(frozen=True)
class Records:
    """All records of one source.

    Attributes:
        records: in file order; the files of a folder in the order of their names.
        label: file or folder name, or dataset id; never a path.
        sha256: over the raw bytes of a file; over the sorted lines ``SHA256  NAME`` of a folder's
            files (what ``sha256sum *`` prints); over the canonical JSON lines of a dataset.
        kind: jsonl, json, text, parquet or dataset; of a folder, the kind of its files.
        notes: sentences about what was left out.
    """

    records: tuple[Record, ...]
    label: str
    sha256: str
    kind: str
    notes: tuple[str, ...] = ()


def parse_sources(texts: Iterable[str]) -> list[tuple[str | None, str]]:
    """Parse ``NAME=SOURCE`` or ``SOURCE`` as given on the command line: (domain or None, source).

    Text with "=" is a plain source when a file of that whole name exists, or when what stands
    before the "=" could not be a domain (it has a path separator).

    Raises:
        UsageError: E222 an empty part, or the same thing twice.
    """
    found: list[tuple[str | None, str]] = []
    for text in texts:
        name, sign, source = text.partition("=")
        if not sign or os.path.exists(os.path.expanduser(text)) or "/" in name or os.sep in name:
            name, source = "", text
        elif not _DOMAIN.fullmatch(name.strip()):
            raise UsageError("E222", f'"{printable(text)}" has no domain before "="',
                             help="NAME=FILE, or the file alone")  # fmt: skip
        if not source.strip():
            raise UsageError(
                "E222", f'"{printable(text)}" names no file', help="NAME=FILE, or the file alone"
            )
        entry = (name.strip() or None, source.strip())
        if entry in found:
            raise UsageError("E222", f'"{printable(text)}" is given twice', help="give each source once")
        found.append(entry)
    return found


def read_records(
    source: str, *, split: str | None = None, offline: bool = False, limit_bytes: int = LIMIT_BYTES
) -> Records:
    """Read every record of a source.

    Args:
        source: a .jsonl, .ndjson, .json (a list of objects, or JSON lines), .parquet, .txt or .md
            file; a folder of such files, not searched deeper (where it has JSON or parquet, text
            files beside them are left out); a folder written by ``Dataset.save_to_disk``; or
            ``org/name[:config[:split]]`` of Hugging Face datasets, looked up in the local cache
            first and downloaded only when that is allowed.
        split: of a dataset; default: its only one, else "train". Slices such as "train[:1000]" work.
        offline: never touch the network (as is HF_HUB_OFFLINE=1).
        limit_bytes: the most that is read.

    Raises:
        UsageError: E222. InputError: E370 to E373, E379. EnvironmentFault: E502, E512, E521, E522, E524.
    """
    if not source.strip():
        raise UsageError("E222", "an empty data source", help=READABLE)
    path = Path(os.path.expanduser(source))
    if path.is_dir():
        return _folder(path, split, limit_bytes)
    if path.exists() or path.is_symlink() or _looks_local(source):
        return _file(path, limit_bytes)
    if not _DATASET_ID.fullmatch(source):
        raise InputError("E370", f"no such file: {printable(source)}", help=_near(path) or f"give {READABLE}")
    from surgeon.data.tables import read_dataset

    name, _, rest = source.partition(":")
    config, _, named_split = rest.partition(":")
    if named_split and split and split != named_split:
        raise UsageError(
            "E222",
            f'{source} names the split "{named_split}", and split is "{split}"',
            help="say the split in one place",
        )
    return read_dataset(name, config or None, split or named_split or None, offline, limit_bytes)


def _looks_local(source: str) -> bool:
    suffixes = (*JSON_SUFFIXES, *TABLE_SUFFIXES, *TEXT_SUFFIXES, *_PACKED, ".csv", ".tsv")
    return source.startswith((".", "/", "~")) or source.lower().endswith(suffixes)


def _near(path: Path) -> str | None:
    try:
        return close_matches(path.name, [p.name for p in path.parent.iterdir()])
    except OSError:
        return None


def _file(path: Path, limit: int) -> Records:
    if not path.exists():
        raise InputError("E370", f"no such file: {printable(str(path))}", where=Where(str(path)),
                         help=_near(path) or f"give {READABLE}")  # fmt: skip
    kind = kind_of(path)
    records, digest = _read_file(path, str(path), kind, limit)
    if not records:
        raise _no_records(path)
    return Records(tuple(records), path.name, digest, kind)


def kind_of(path: Path) -> str:
    """Return jsonl, parquet or text by the suffix, refusing what is not read (E370)."""
    suffix = path.suffix.lower()
    if suffix in JSON_SUFFIXES:
        return "json" if suffix == ".json" else "jsonl"
    if suffix in TABLE_SUFFIXES:
        return "parquet"
    if suffix in TEXT_SUFFIXES:
        return "text"
    if suffix in _PACKED:
        raise _compressed(path, suffix)
    help = (
        "convert the table to JSON lines, one object per line"
        if suffix in {".csv", ".tsv"}
        else f"give {READABLE}"
    )
    raise InputError(
        "E370", f"{printable(path.name)} is of a kind that is not read", where=Where(str(path)), help=help
    )


def _compressed(path: Path, suffix: str) -> InputError:
    return InputError("E370", f"{printable(path.name)} is compressed; compressed data is not read",
                      where=Where(str(path)), help=f"unpack it: {_PACKED[suffix]} {path.name}")  # fmt: skip


def _no_records(path: Path) -> InputError:
    kind = "a text file is one record" if path.suffix == ".txt" else "a record is one JSON object per line"
    return InputError("E372", f"{printable(path.name)} has no records", where=Where(str(path)),
                      help=f"nothing but white space is in it; {kind}")  # fmt: skip


def _read_file(path: Path, label: str, kind: str, limit: int) -> tuple[list[Record], str]:
    """Return the records of one file and the sha256 of its bytes."""
    raw = _bytes(path, limit)
    digest = hashlib.sha256(raw).hexdigest()
    if kind == "parquet":
        from surgeon.data.tables import read_parquet

        return read_parquet(path, label, limit), digest
    _check_encoding(path, raw)
    if not raw.strip():
        return [], digest
    if kind == "text":
        return [Record({"text": _decode(path, raw)}, 1, label)], digest
    from surgeon.data.strict_lines import parse_lines, parse_list

    findings: list[SurgeonError] = []
    parse = parse_list if raw.lstrip()[:1] == b"[" else parse_lines
    records = parse(raw, label, findings)
    raise_all(findings)
    return records, digest


def _bytes(path: Path, limit: int) -> bytes:
    descriptor = open_regular(path)
    with os.fdopen(descriptor, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        raw = stream.read(limit + 1) if size <= limit else b""
    if size > limit or len(raw) > limit:
        raise _too_large(path, max(size, len(raw)), limit)
    return raw


def _too_large(path: Path, size: int, limit: int) -> InputError:
    return InputError("E373", f"{printable(path.name)} has {size:,} bytes; at most {limit:,} are read",
                      where=Where(str(path)), help="a sample is enough: shuf -n 10000 FILE > sample.jsonl")  # fmt: skip


def _check_encoding(path: Path, raw: bytes) -> None:
    for magic, suffix in _MAGIC.items():
        if raw.startswith(magic):
            raise _compressed(path, suffix)
    if raw.startswith(b"PAR1"):
        raise InputError("E370", f"{printable(path.name)} is a parquet file", where=Where(str(path)),
                         help="give it the ending .parquet")  # fmt: skip
    found = None
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")) or (
        len(raw) > 3 and 0 in raw[:2] and raw[:4].count(0) >= 2
    ):
        found, help = "is UTF-16 or UTF-32, not UTF-8", "iconv -f UTF-16 -t UTF-8 FILE > FILE.utf8"
    elif raw.startswith(b"\xef\xbb\xbf"):
        found, help = (
            "starts with a byte order mark",
            "save it as UTF-8 without one: sed -i '1s/^\\xEF\\xBB\\xBF//' FILE",
        )
    if found:
        raise InputError("E371", f"{printable(path.name)} {found}", where=Where(str(path), 1), help=help)


def _decode(path: Path, raw: bytes) -> str:
    try:
        return raw.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError("E371", f"{printable(path.name)} is not UTF-8 (byte {error.start})",
                         where=Where(str(path), line), help="iconv -f LATIN1 -t UTF-8 FILE > FILE.utf8") from None  # fmt: skip


def _folder(folder: Path, split: str | None, limit: int) -> Records:
    try:
        entries = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    except PermissionError:
        from surgeon.errors import EnvironmentFault

        raise EnvironmentFault(
            "E502", f"cannot read {folder}: permission denied", help="ls -ld shows its owner and mode"
        ) from None
    names = {p.name for p in entries}
    if "dataset_dict.json" in names or {"dataset_info.json", "state.json"} <= names:
        from surgeon.data.tables import read_saved

        return read_saved(folder, split, limit)
    files = _of(entries, (*JSON_SUFFIXES, *TABLE_SUFFIXES)) or _of(entries, TEXT_SUFFIXES)
    if not files:
        packed = _of(entries, tuple(_PACKED))
        if packed:
            raise _compressed(packed[0], packed[0].suffix.lower())
        raise InputError("E370", f"{printable(folder.name)} holds no file that is read", where=Where(str(folder)),
                         help=f"give {READABLE}")  # fmt: skip
    size = sum(file.stat().st_size for file in files)
    if size > limit:
        raise _too_large(folder, size, limit)
    records: list[Record] = []
    digests: list[str] = []
    findings: list[SurgeonError] = []
    kinds = []
    for file in files:
        kinds.append(kind_of(file))
        try:
            part, digest = _read_file(file, str(file), kinds[-1], limit)
        except InputError as error:
            findings += [error, *error.others]
            error.others = ()
            continue
        records += part
        digests.append(f"{digest}  {file.name}\n")
    raise_all(findings[:MAX_FINDINGS])
    if not records:
        raise _no_records(folder)
    kind = kinds[0] if len(set(kinds)) == 1 else "mixed"
    label = folder.name or folder.resolve().name
    notes = _left_out(label, [p.name for p in entries if p not in files])
    return Records(tuple(records), label, hashlib.sha256("".join(digests).encode()).hexdigest(), kind, notes)


def _of(entries: Sequence[Path], suffixes: tuple[str, ...]) -> list[Path]:
    return [p for p in entries if p.suffix.lower() in suffixes and not p.is_dir()]


def _left_out(label: str, names: list[str]) -> tuple[str, ...]:
    if not names:
        return ()
    shown = ", ".join(printable(n) for n in names[:3]) + (", ..." if len(names) > 3 else "")
    return (f"{label}: {len(names)} other entries of the folder were not read ({shown})",)
