"""What routing was measured on, as plain data, and whether a file of measurements is still about the model at hand."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from surgeon.calibrate.settings import Settings
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.dtypes import DTYPES
from surgeon.checkpoint.header import printable
from surgeon.errors import InputError, Where

PROBE = 64
"""Values of each tensor that go into the fingerprint."""


def fingerprint(checkpoint: Checkpoint) -> str:
    """Return a digest of a model's tensor names, shapes and first values.

    Two models of one family differ in it, wherever their files lie; unlike a digest of all bytes it takes a
    moment for the largest.
    """
    digest = hashlib.sha256()
    for name in sorted(checkpoint.tensors):
        info = checkpoint.tensors[name]
        digest.update(f"{name} {info.dtype} {list(info.shape)}\n".encode())
        if DTYPES[info.dtype].carrier is None:
            digest.update(checkpoint.read_bytes(name, 0, min(PROBE, info.nbytes)).tobytes())
        else:
            digest.update(np.ascontiguousarray(checkpoint.read(name, 0, min(PROBE, info.elements))).tobytes())
    return digest.hexdigest()


def origin_of(
    checkpoint: Checkpoint,
    samples: Sequence[np.ndarray],
    settings: Settings,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return everything that measurements depend on, without paths.

    Args:
        checkpoint: the model.
        samples: token ids.
        settings: of the pass.
        about: plain data on the samples.
    """
    ids = hashlib.sha256()
    for sample in samples:
        ids.update(len(sample).to_bytes(8, "little") + np.ascontiguousarray(sample, "<i8").tobytes())
    return {
        "model": fingerprint(checkpoint),
        "samples": len(samples),
        "tokens": int(sum(len(sample) for sample in samples)),
        "ids_sha256": ids.hexdigest(),
        "dtype": settings.dtype,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "data": dict(about or {}),
    }


def check_origin(path: Path, record: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Refuse measurements of another model.

    Raises:
        InputError: E432.
    """
    if record.get("model") != fingerprint(checkpoint):
        raise InputError(
            "E432", f"{printable(path.name)} was measured on another model than {checkpoint.label}", where=Where(str(path)),
            help="measure this model: leave the option out, or name a file that does not exist yet",
        )  # fmt: skip
