"""What a training run depends on, as texts: the state of another model or other data must not be taken for this one's."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from surgeon.calibrate.answers import TokenSample
from surgeon.checkpoint.checkpoint import CONFIG_NAME, open_path


def of_model(folder: Path) -> str:
    """Return a digest of a model folder: configuration, headers, sizes and times of its files; no data is read."""
    digest = hashlib.sha256((Path(folder) / CONFIG_NAME).read_bytes())
    for header in open_path(Path(folder)).headers:
        stamp = header.stamp
        digest.update(f"{header.file.name} {stamp.size} {stamp.mtime_ns} {sorted(header.tensors)}".encode())
    return digest.hexdigest()


def of_samples(samples: Sequence[TokenSample]) -> str:
    """Return a digest of the token ids and answer places."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(np.asarray([len(sample.ids), sample.answer_start], dtype="<i8").tobytes())
        digest.update(np.ascontiguousarray(sample.ids, dtype="<i8").tobytes())
    return digest.hexdigest()
