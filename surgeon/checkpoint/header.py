"""Strict reader of safetensors headers; standard library only.

The format: 8 bytes little-endian header length, that many bytes of JSON, then the data.
Every entry gives dtype, shape and [begin, end) into the data; entries must tile the data
exactly. Everything else is refused here, before a byte of data is read, because the official
reader accepts some of it: identical duplicate names, leading blanks, empty and path-like
names, extra fields.

Codes: E303 size does not fit the header (truncated, trailing bytes, empty, Git LFS pointer),
E304 malformed header, E306 not a regular file, E307 unsupported type.
"""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from surgeon.checkpoint.dtypes import DTYPES
from surgeon.errors import EnvironmentFault, InputError, Where

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_TENSORS = 1_000_000
MAX_NAME_LENGTH = 1_024
MAX_DIMENSION = 2**62
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as its header describes it; no data.

    Attributes:
        name: tensor name, never used as a file name.
        dtype: safetensors code, e.g. "BF16".
        shape: dimensions, () for a scalar.
        file: the file that holds it.
        offset: absolute position of its first byte in ``file``.
        nbytes: stored bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    @property
    def elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class FileStamp:
    """Identity of a file at planning time; compared again when reading ends (fault B8)."""

    size: int
    mtime_ns: int
    inode: int
    device: int


@dataclass(frozen=True)
class Header:
    """A parsed header with the identity of its file.

    Attributes:
        digest: sha256 of a file that is not written, as it would be; "" for one that is there.
        behind: the files such a one is computed from.
    """

    file: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int
    stamp: FileStamp
    sha256: str
    digest: str = ""
    behind: tuple[Header, ...] = ()


def open_regular(path: Path) -> int:
    """Open a regular file for reading without ever blocking; return the descriptor.

    Raises:
        InputError: E301 missing, E306 not a regular file (FIFO, socket, device, folder, loop).
        EnvironmentFault: E502 not permitted.
    """
    try:
        info = os.stat(path)
    except FileNotFoundError:
        if os.path.islink(path):
            raise InputError(
                "E301",
                f"{path.name} is a link to a file that does not exist",
                where=Where(str(path)),
                help="fetch the model again; its cache entry is incomplete",
            ) from None
        raise InputError(
            "E301", f"no such file: {path}", where=Where(str(path)), help="check the spelling"
        ) from None
    except PermissionError as error:
        raise EnvironmentFault(
            "E502", f"cannot read {path}: permission denied", help="ls -l shows its owner and mode"
        ) from error
    except OSError as error:
        raise InputError(
            "E306",
            f"cannot open {path}: {error.strerror}",
            where=Where(str(path)),
            help="only regular files (or links to them) are read",
        ) from error
    if not stat.S_ISREG(info.st_mode):
        kind = "a folder" if stat.S_ISDIR(info.st_mode) else "a special file"
        raise InputError(
            "E306",
            f"{path.name} is {kind}, not a weight file",
            where=Where(str(path)),
            help="only regular files (or links to them) are read",
        )
    try:
        return os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except PermissionError as error:
        raise EnvironmentFault(
            "E502", f"cannot read {path}: permission denied", help="ls -l shows its owner and mode"
        ) from error


def stamp_of(descriptor: int) -> FileStamp:
    info = os.fstat(descriptor)
    return FileStamp(info.st_size, info.st_mtime_ns, info.st_ino, info.st_dev)


def read_header(path: str | os.PathLike) -> Header:
    """Parse and check one file's header; cost is bounded by the header's own size.

    Raises:
        InputError: with file, tensor where known, and the reason.
    """
    import hashlib

    path = Path(path)
    descriptor = open_regular(path)
    try:
        stamp = stamp_of(descriptor)
        start = os.pread(descriptor, 64, 0)
        length = _header_length(path, start, stamp.size)
        raw = b""
        while len(raw) < length:
            piece = os.pread(descriptor, length - len(raw), 8 + len(raw))
            if not piece:
                raise _broken(path, "the file shrank while its header was read")
            raw += piece
    finally:
        os.close(descriptor)
    tensors, metadata = _parse(path, raw, 8 + length, stamp.size)
    return Header(path, tensors, metadata, 8 + length, stamp, hashlib.sha256(start[:8] + raw).hexdigest())


def header_of_unwritten(
    path: Path, content: bytes, size: int, digest: str, behind: tuple[Header, ...]
) -> Header:
    """Return the header of a file that is not written.

    Args:
        path: where it would lie.
        content: what it would begin with, length and header.
        size, digest: of all of it.
        behind: the files it is computed from.
    """
    import hashlib

    tensors, metadata = _parse(path, content[8:], len(content), size)
    # Stands for a time of change: whoever compares stamps notices other content.
    stamp = FileStamp(size, int(digest[:15], 16), 0, 0)
    return Header(
        path, tensors, metadata, len(content), stamp, hashlib.sha256(content).hexdigest(), digest, behind
    )


def _header_length(path: Path, start: bytes, size: int) -> int:
    if start.startswith(b"version https://git-lfs"):
        raise InputError(
            "E303",
            f"{path.name} is a Git LFS pointer, not the weights",
            where=Where(str(path)),
            help="run: git lfs pull",
        )
    if size < 8:
        what = "empty" if size == 0 else f"only {size} bytes long"
        raise InputError(
            "E303",
            f"{path.name} is {what}",
            where=Where(str(path)),
            help="the download is incomplete; delete it and fetch it again",
        )
    length = int.from_bytes(start[:8], "little")
    if length == 0:
        raise InputError(
            "E303",
            f"{path.name} was never finished: its header length is 0",
            where=Where(str(path)),
            help="the program that wrote it was interrupted; produce or fetch the file again",
        )
    if length > MAX_HEADER_BYTES:
        raise _broken(path, f"header length {length:,} exceeds the format's limit of {MAX_HEADER_BYTES:,}")
    if 8 + length > size:
        raise InputError(
            "E303",
            f"{path.name} is truncated: expected a header of {length:,} bytes, found {size - 8:,}",
            where=Where(str(path)),
            help="the download is incomplete; delete it and fetch it again",
        )
    return length


def _broken(path: Path, reason: str, tensor: str | None = None) -> InputError:
    return InputError(
        "E304",
        f"{path.name} is not a valid safetensors file: {reason}",
        where=Where(str(path), tensor=_short(tensor) if tensor is not None else None),
        help="the file is damaged or was written by a faulty program; fetch it again",
    )


def printable(text: str) -> str:
    """Return text with control characters escaped, so that names cannot drive a terminal (G7)."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _short(text: str) -> str:
    return printable(text if len(text) <= 80 else text[:77] + "...")


def _parse(path: Path, raw: bytes, data_start: int, size: int):
    if raw[:1] != b"{":
        raise _broken(path, "the header does not start with '{'")

    def unique(pairs: list[tuple[str, object]]) -> dict:
        keys = dict(pairs)
        if len(keys) != len(pairs):
            names = [k for k, _ in pairs]
            twice = next(n for n in names if names.count(n) > 1) if len(names) < 1000 else _first_twice(names)
            raise _broken(path, f'the name "{_short(twice)}" occurs twice', twice)
        return keys

    # Cheap bounds before json builds objects that are 20 times as large as their text.
    for sign, most in ((b"{", MAX_TENSORS + 2), (b"[", 2 * MAX_TENSORS), (b'"', 12 * MAX_TENSORS)):
        if raw.count(sign) > most:
            raise _broken(path, f"more than {MAX_TENSORS:,} tensors, or as much in metadata")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _broken(path, f"the header is not UTF-8 (byte {error.start})") from None
    try:
        parsed = json.loads(text, object_pairs_hook=unique, parse_constant=_refuse_constant)
    except RecursionError:
        raise _broken(path, "the header is nested too deeply") from None
    except ValueError as error:
        raise _broken(path, f"the header is not JSON ({error})") from None
    if not isinstance(parsed, dict):
        raise _broken(path, "the header is not an object")

    metadata = parsed.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _broken(path, "__metadata__ must map text to text")
    data_size = size - data_start
    tensors: dict[str, TensorInfo] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in parsed.items():
        info, begin, end = _entry(path, name, entry, data_start)
        tensors[name] = info
        spans.append((begin, end, name))
    _check_tiling(path, spans, data_size)
    return tensors, metadata


def _refuse_constant(name: str):
    raise ValueError(f"{name} is not allowed")


def _first_twice(names: list[str]) -> str:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return names[0]


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_DIMENSION


def _entry(path: Path, name: str, entry: object, data_start: int) -> tuple[TensorInfo, int, int]:
    check_name(path, name)
    if not isinstance(entry, dict) or set(entry) != _ENTRY_KEYS:
        found = _short(", ".join(sorted(entry))) if isinstance(entry, dict) else type(entry).__name__
        raise _broken(path, f"an entry must have exactly dtype, shape, data_offsets (found {found})", name)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InputError(
            "E307",
            f"{path.name} uses an unknown data type {dtype!r:.80}",
            where=Where(str(path), tensor=printable(name)),
            help="a newer surgeon may know it; " + ", ".join(sorted(DTYPES)) + " are supported",
        )
    if not isinstance(shape, list) or not all(_is_size(d) for d in shape) or len(shape) > 64:
        raise _broken(path, f"bad shape {shape!r:.80}", name)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(o) for o in offsets):
        raise _broken(path, f"bad data_offsets {offsets!r:.80}", name)
    begin, end = offsets
    elements = 1
    for size in shape:
        elements *= size
    bits = elements * DTYPES[dtype].bits
    if bits % 8:
        raise _broken(path, f"{elements} elements of {dtype} do not fill whole bytes", name)
    if end < begin or bits // 8 != end - begin:
        raise _broken(
            path, f"shape {shape} of {dtype} needs {bits // 8:,} bytes, offsets give {end - begin:,}", name
        )
    return TensorInfo(name, dtype, tuple(shape), path, data_start + begin, end - begin), begin, end


def check_name(path: Path, name: str) -> None:
    """Refuse tensor names that are empty, too long, or look like paths or control sequences."""
    if not name:
        raise _broken(path, "a tensor has an empty name")
    if len(name) > MAX_NAME_LENGTH:
        raise _broken(path, f"a tensor name has {len(name):,} characters", name[:60])
    if any(ord(c) < 32 or ord(c) == 127 or 0xD800 <= ord(c) <= 0xDFFF for c in name):
        raise _broken(path, "a tensor name has control characters", name)
    if name.startswith("/") or "\\" in name or ".." in name.split("/"):
        raise _broken(path, "a tensor name looks like a path", name)


def _check_tiling(path: Path, spans: list[tuple[int, int, str]], data_size: int) -> None:
    position = 0
    for begin, end, name in sorted(spans):
        if begin < position:
            raise _broken(path, "two tensors overlap", name)
        if begin > position:
            raise _broken(path, f"a hole of {begin - position:,} bytes before a tensor", name)
        position = end
    if position > data_size:
        raise InputError(
            "E303",
            f"{path.name} is truncated: the header describes {position:,} bytes of data, the file has {data_size:,}",
            where=Where(str(path)),
            help="the download is incomplete; delete it and fetch it again",
        )
    if position < data_size:
        raise InputError(
            "E303",
            f"{path.name} has {data_size - position:,} bytes after its last tensor "
            f"(expected {position:,} bytes of data, found {data_size:,})",
            where=Where(str(path)),
            help="the file is damaged; delete it and fetch it again",
        )
