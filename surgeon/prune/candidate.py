"""A pruned model as it lies on disk: written, read back, compared with what it must equal, timed."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from surgeon.calibrate.quality import last_states
from surgeon.calibrate.settings import Settings
from surgeon.checkpoint.checkpoint import Checkpoint, open_path
from surgeon.deploy.build import body, load
from surgeon.deploy.per_layer import is_per_layer
from surgeon.errors import InputError, Where
from surgeon.execute import execute
from surgeon.plan import Plan
from surgeon.system import memory_budget, physical_cores

EXACT, ROUNDED = 1e-4, 5e-2
"""Largest relative difference of last states: float32 noise; one rounding of solved weights to 16 bits."""
PROBES, PROBE_TOKENS = 4, 128


@dataclass(frozen=True)
class Written:
    """A candidate on disk.

    Attributes:
        folder: where.
        difference: largest relative difference of last hidden states from those of the masked model.
        strict: whether a stock or packaged class loaded it as a whole in this process.
    """

    folder: Path
    difference: float
    strict: bool


def write(
    plan: Plan, folder: Path, *, threads: int | None, memory_limit: int | None, stop: threading.Event | None
) -> Path:
    """Write a plan's only model, replacing an earlier candidate there."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    outcome = execute(
        plan, folder, threads=threads or physical_cores(), memory_limit=memory_limit, stop=stop, resume=False
    )
    return outcome.path


def check(
    folder: Path, expected: Sequence[torch.Tensor], samples: Sequence[np.ndarray], settings: Settings, *, rounded: bool
) -> Written:  # fmt: skip
    """Read a candidate back and compare it with the masked model's last states.

    It is loaded as a whole by its own class, strictly, where memory allows; else it is streamed.

    Args:
        folder: the candidate.
        expected: last hidden states of the masked model, one tensor a sample.
        samples: the token ids they belong to.
        rounded: weights were rounded to a 16-bit type when they were written.

    Raises:
        InputError: E316 the folder computes something else; E324 to E327 it does not load.
    """
    checkpoint = open_path(folder, str(folder))
    tolerance = ROUNDED if rounded or settings.dtype != "float32" else EXACT
    try:
        needed = 5 * sum(info.elements for info in checkpoint.tensors.values())
        if needed < (settings.memory_limit or memory_budget()):
            found, strict = _whole(folder, samples, settings), True
        else:
            if is_per_layer(checkpoint.config or {}):
                raise InputError("E316", f"reading {folder} back needs about {needed / 1e9:.1f} GB of memory: a model whose layers differ "
                                 "is only read as a whole", where=Where(str(folder)), help="raise --memory-limit, or use --layout uniform")  # fmt: skip
            found, strict = last_states(checkpoint, samples, settings), False
    finally:
        checkpoint.close()
    return Written(folder, _difference(expected, found, tolerance, folder), strict)


def check_unwritten(
    checkpoint: Checkpoint, expected: Sequence[torch.Tensor], samples: Sequence[np.ndarray], settings: Settings, *, rounded: bool
) -> float:  # fmt: skip
    """Compare what a plan makes, rounded as it would be written, with the masked model's last states; as `check`.

    Returns:
        The largest relative difference.

    Raises:
        InputError: E316.
    """
    found = last_states(checkpoint, samples, settings)
    tolerance = ROUNDED if rounded or settings.dtype != "float32" else EXACT
    return _difference(expected, found, tolerance, Path(checkpoint.label))


def _difference(
    expected: Sequence[torch.Tensor], found: Sequence[torch.Tensor], tolerance: float, folder: Path
) -> float:
    """Return the largest relative difference of last states, refused above the tolerance (E316)."""
    difference = max(
        float((a.double() - b.double()).norm() / a.double().norm().clamp_min(1e-30))
        for a, b in zip(expected, found, strict=True)
    )
    if not difference <= tolerance:
        raise InputError("E316", f"the model that was written computes something else than was planned: its last states differ by {difference:.2g}",
                         where=Where(str(folder)), help="this is a bug, or the disk changed the files; nothing was published")  # fmt: skip
    return difference


def _whole(folder: Path, samples: Sequence[np.ndarray], settings: Settings) -> list[torch.Tensor]:
    model: Any = load(folder, dtype=settings.torch_dtype)
    base, _ = body(model, folder)
    with torch.inference_mode():
        return [
            base(torch.from_numpy(np.asarray(ids, dtype=np.int64))[None]).last_hidden_state[0].float()
            for ids in samples
        ]


def probes(samples: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return the short texts on which a candidate is compared."""
    return [ids[:PROBE_TOKENS] for ids in samples[:PROBES]]


def sixteen_bit(checkpoint: Checkpoint, dtype: str | None) -> bool:
    """Say whether floats of a result are rounded to 16 bits."""
    if dtype is not None:
        return dtype != "float32"
    return any(info.dtype in ("BF16", "F16") for info in checkpoint.tensors.values())
