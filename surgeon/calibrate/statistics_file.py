"""What a calibration run measured, module by module, as plain arrays and as a file.

The file is one safetensors file: a float64 tensor per module, named as the module, and one
metadata entry, "surgeon.statistics", with JSON: kind, tokens per module, what was never reached,
and what it was measured on. Equal statistics give equal bytes. Nothing here needs torch, so that
a merge can be planned from a file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from surgeon.checkpoint.header import printable, read_header
from surgeon.errors import InputError, Where

KEY = "surgeon.statistics"
VERSION = 1


@dataclass(frozen=True)
class Statistics:
    """One array per module.

    Attributes:
        kind: what was measured: "mean_absolute", "channel_norms", "second_moments", "router_counts".
        values: module -> float64 array; [in] for statistics of channels, [in, in] for second moments,
            [experts] for counts.
        tokens: module -> tokens its inputs were; only modules in ``values``.
        unreached: modules that were expected and saw no token (fault J4).
        about: what it was measured on, plain data without paths.
    """

    kind: str
    values: Mapping[str, np.ndarray]
    tokens: Mapping[str, int]
    unreached: tuple[str, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)


def save(path: Path, record: Statistics) -> None:
    """Write statistics as one safetensors file, replacing ``path`` only when it is complete."""
    names = sorted(record.values)
    arrays = [np.ascontiguousarray(record.values[name], dtype="<f8") for name in names]
    described = {
        "version": VERSION,
        "kind": record.kind,
        "tokens": {name: int(record.tokens[name]) for name in names},
        "unreached": sorted(record.unreached),
        "about": dict(record.about),
    }
    header: dict[str, Any] = {"__metadata__": {KEY: json.dumps(described, sort_keys=True)}}
    position = 0
    for name, array in zip(names, arrays, strict=True):
        header[name] = {
            "dtype": "F64",
            "shape": list(array.shape),
            "data_offsets": [position, position + array.nbytes],
        }
        position += array.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(unfinished, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for array in arrays:
                out.write(array.reshape(-1).view(np.uint8).data)
            out.flush()
            os.fsync(out.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def load(path: Path, kind: str | None = None) -> Statistics:
    """Read what `save` wrote.

    Args:
        kind: the kind that is needed; None takes any.

    Raises:
        InputError: the file is no safetensors file, or E388: it holds no statistics, or others.
    """
    header = read_header(path)
    described = _described(path, header.metadata)
    if kind is not None and described["kind"] != kind:
        raise _wrong(path, f"holds {printable(described['kind'])}, not {kind}")
    values: dict[str, np.ndarray] = {}
    for name, info in header.tensors.items():
        if info.dtype != "F64" or name not in described["tokens"]:
            raise _wrong(path, f"has a tensor {printable(name)} that no statistics have")
        count = info.nbytes // 8
        array = np.fromfile(path, dtype="<f8", count=count, offset=info.offset).reshape(info.shape)
        if not np.isfinite(array).all():
            raise _wrong(path, f"holds a value that is not finite for {printable(name)}")
        values[name] = array
    if set(values) != set(described["tokens"]):
        raise _wrong(path, "counts tokens of modules it holds nothing of")
    return Statistics(
        described["kind"], values, described["tokens"], tuple(described["unreached"]), described["about"]
    )


def _described(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if KEY not in metadata:
        raise _wrong(path, "holds no calibration statistics")
    try:
        found = json.loads(metadata[KEY])
    except (ValueError, RecursionError):
        raise _wrong(path, "has a damaged description") from None
    kinds = {"kind": str, "tokens": dict, "unreached": list, "about": dict}
    if not isinstance(found, dict) or found.get("version") != VERSION:
        raise _wrong(path, "is of a version this program does not know")
    if not all(isinstance(found.get(key), wanted) for key, wanted in kinds.items()):
        raise _wrong(path, "has a damaged description")
    counts = found["tokens"].values()
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in counts):
        raise _wrong(path, "has a damaged description")
    return found


def _wrong(path: Path, what: str) -> InputError:
    return InputError("E388", f"{printable(path.name)} {what}", where=Where(str(path)),
                      help="statistics are written by a calibration run of this program; measure them again")  # fmt: skip
