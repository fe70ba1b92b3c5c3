"""Measurements as one safetensors file: arrays by name, everything else as JSON in its metadata.

Equal content gives equal bytes, a digest of all values is kept with them, and a file appears under its name only
when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from surgeon.checkpoint.dtypes import DTYPES
from surgeon.checkpoint.header import Header, printable, read_header
from surgeon.errors import EnvironmentFault, InputError, Where

KEY = "surgeon.experts"
VERSION = 1
CODES = {np.dtype(t): code for t, code in (("f8", "F64"), ("f4", "F32"), ("i8", "I64"))}


def header_text(tensors: Mapping[str, tuple[str, tuple[int, ...]]], about: Mapping[str, Any]) -> bytes:
    """Return the JSON of a safetensors header, padded to 8 bytes, for tensors one after the other.

    Args:
        tensors: name -> (storage code, shape).
        about: plain data for the metadata.
    """
    header: dict[str, Any] = {"__metadata__": {KEY: json.dumps(about, sort_keys=True)}}
    position = 0
    for name, (code, shape) in tensors.items():
        size = int(np.prod(shape, dtype=np.int64)) * DTYPES[code].bits // 8
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def write(path: Path, kind: str, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
    """Write arrays of float64, float32 or int64, replacing ``path`` only when everything is there.

    Raises:
        EnvironmentFault: E501 it cannot be written.
    """
    ordered = {name: np.ascontiguousarray(arrays[name]) for name in sorted(arrays)}
    digest = hashlib.sha256()
    for value in ordered.values():
        digest.update(value.reshape(-1).view(np.uint8).data)
    described = {"version": VERSION, "kind": kind, "sha256": digest.hexdigest(), "about": dict(about)}
    text = header_text({name: (CODES[v.dtype], v.shape) for name, v in ordered.items()}, described)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for value in ordered.values():
                out.write(value.reshape(-1).view(np.uint8).data)
            out.flush()
            os.fsync(out.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        unfinished.unlink(missing_ok=True)


def read(path: Path, kind: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the arrays and the plain data that `write` was given.

    Raises:
        InputError: E431 the file holds something else, or is damaged.
    """
    header, described = described_header(path, kind)
    arrays: dict[str, np.ndarray] = {}
    digest = hashlib.sha256()
    for name in sorted(header.tensors):
        arrays[name] = value = read_array(header, name)
        digest.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
    if digest.hexdigest() != described["sha256"]:
        raise damaged(path)
    return arrays, described["about"]


def described_header(path: Path, kind: str) -> tuple[Header, dict[str, Any]]:
    """Return a file's header and its description, with "sha256" and "about".

    Raises:
        InputError: E431 it is no file of this kind.
    """
    header = read_header(path)
    if KEY not in header.metadata:
        raise InputError("E431", f"{printable(path.name)} holds no measurements of experts", where=Where(str(path)),
                         help="give a file that surgeon wrote")  # fmt: skip
    try:
        found = json.loads(header.metadata[KEY])
        version, held = found["version"], found["kind"]
        about, _ = dict(found["about"]), found["sha256"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise damaged(path) from None
    if version != VERSION or held != kind:
        raise InputError("E431", f"{printable(path.name)} holds {printable(str(held))} in version {printable(str(version))}, "
                         f"not {kind} in version {VERSION}", where=Where(str(path)), help="measure again with this program")  # fmt: skip
    return header, {"sha256": found["sha256"], "about": about}


def read_array(header: Header, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Return rows [start, stop) of one tensor."""
    info = header.tensors[name]
    carrier = DTYPES[info.dtype].carrier
    if carrier is None:
        raise damaged(header.file)
    stop = info.shape[0] if stop is None else stop
    each = int(np.prod(info.shape[1:], dtype=np.int64))
    offset = info.offset + start * each * carrier.itemsize
    flat = np.fromfile(header.file, dtype=carrier, count=(stop - start) * each, offset=offset)
    if flat.size != (stop - start) * each:
        raise damaged(header.file)
    return flat.reshape(stop - start, *info.shape[1:])


def damaged(path: Path) -> InputError:
    """Return the refusal of a file whose content is not what was written."""
    return InputError("E431", f"{printable(path.name)} is damaged", where=Where(str(path)),
                      help="remove it and measure again")  # fmt: skip


def unwritable(path: Path, error: OSError) -> EnvironmentFault:
    """Return the fault of a file that cannot be written."""
    return EnvironmentFault("E501", f"cannot write {path.name}: {error.strerror}", where=Where(str(path)),
                            help="free disk space, or name another place")  # fmt: skip
