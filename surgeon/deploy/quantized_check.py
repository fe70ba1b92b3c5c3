"""Is a quantized folder the model it stands for? Its reader loads it in a process of its own and is asked the same as we are.

    check(folder, dequantized(view), samples, settings)

The reference is the model of the decoded numbers, run layer by layer in float32, so that it needs neither disk nor the
memory of the whole model. Logits of both are compared: the reader's with its matrices decoded, in float32, too, which shows
whether it took what was stored for what was meant; and as its kernels run, which round in their own ways.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surgeon.calibrate.conditions import threads
from surgeon.calibrate.data import random_tokens
from surgeon.calibrate.head import Head
from surgeon.calibrate.quality import last_states
from surgeon.calibrate.settings import Settings
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.header import printable
from surgeon.errors import EnvironmentFault, InputError, Where
from surgeon.traits import embedding_name
from surgeon.verify import readers

SAMPLES, LENGTH = 4, 64
"""Of the samples that are compared: so many, and so many tokens of each."""

_UNKNOWN = ("E380", "E381", "E382", "E383")
"""Codes of models that cannot be run layer by layer here."""


def check(
    folder: Path,
    reference: Checkpoint,
    samples: Sequence[np.ndarray] = (),
    settings: Settings | None = None,
    *,
    timeout: float = readers.TIMEOUT,
    memory_limit: int | None = None,
    stop: threading.Event | None = None,
) -> dict[str, Any]:
    """Load a quantized folder with stock transformers, generate, and compare with the numbers it stands for.

    Args:
        folder: the finished folder, before it is published.
        reference: what it stands for: `dequantized` of the folder, or of the view it was written from.
        samples: token ids; the first of them are used, random ones where there are none.
        settings: device, threads and memory of the reference.
        timeout: seconds the reader may take.
        memory_limit: bytes the reader may use.
        stop: set it to stop the reference.

    Returns:
        {"reader", "versions", "dtype" (of the loaded model), "modules" (quantized in memory), "tokens", "relative
        difference" (of logits, by the norm of the reference's, matrices decoded), "as run" (the same as kernels run),
        "top1" (equal first choices, as kernels run), "generated" (greedy tokens), "warnings"}. Where the reader cannot be
        asked, or no reference made, a "notice" says why instead of these figures.

    Raises:
        InputError: E482 the reader computes something else; E483 it does not load the folder.
        Interrupted: E130 ``stop`` was set.
    """
    settings = replace(
        settings or Settings(), spill=None, batch_tokens=1
    )  # a batch a sample, as the reader has it
    chosen = [np.asarray(ids).reshape(-1)[:LENGTH] for ids in samples[:SAMPLES]] or _random(reference)
    with tempfile.TemporaryDirectory(prefix="surgeon-logits-") as place:
        outputs = Path(place)
        try:
            found = readers.read_with_transformers(folder, generate=True, samples=chosen, outputs=outputs,
                                                   timeout=timeout, memory_limit=memory_limit)  # fmt: skip
        except EnvironmentFault as fault:
            return {"reader": "transformers", "notice": f"not checked: {fault.message}"}
        _raise(folder, found)
        said: dict[str, Any] = {
            "reader": "transformers", "versions": found.versions, "dtype": found.dtype,
            "modules": found.checks["load"]["quantized"]["modules"],
            "generated": (found.checks.get("generate") or {}).get("tokens", 0), "warnings": list(found.warnings),
        }  # fmt: skip
        settings = replace(settings, dtype=found.precision or "float32")
        try:
            said |= _compared(folder, reference, chosen, settings, outputs, stop)
        except InputError as error:
            if error.code not in _UNKNOWN:
                raise
            said["notice"] = f"loaded, not compared: {error.message}"
    return said


def _random(reference: Checkpoint) -> list[np.ndarray]:
    name = embedding_name(reference.tensors)
    rows = reference.tensors[name].shape[0] if name else 1
    return [sample.ids for sample in random_tokens(rows, SAMPLES, LENGTH, 0).samples]


def _raise(folder: Path, found: readers.Reading) -> None:
    """Raise the first finding of the reader, the others attached."""
    if not found.errors:
        return
    code = "E482" if all(error.code == "E361" for error in found.errors) else "E483"
    what = "does not generate from" if code == "E482" else "does not load"
    raise InputError(
        code, f"stock transformers {what} the quantized model: {found.errors[0].message}", where=Where(str(folder)),
        help="it is not published; store it in another format, or report the model's family and schemes",
        others=tuple(found.errors[1:]),
    )  # fmt: skip


def _compared(
    folder: Path, view: Checkpoint, samples: Sequence[np.ndarray], settings: Settings, outputs: Path,
    stop: threading.Event | None,
) -> dict[str, Any]:  # fmt: skip
    """Return the figures of both outputs of the reader against the reference's.

    Raises:
        InputError: E482 they are too far apart.
    """
    wanted = list(_outputs(view, samples, settings, stop))
    decoded, _ = _apart((np.load(outputs / f"decoded-{n}.npy") for n in range(len(samples))), wanted)
    as_run, top1 = _apart((np.load(outputs / f"as-run-{n}.npy") for n in range(len(samples))), wanted)
    figures = {
        "tokens": sum(map(len, samples)),
        "relative difference": decoded,
        "as run": as_run,
        "top1": top1,
    }
    reason = readers.too_far(decoded, as_run, settings.dtype)
    if reason is not None:
        raise InputError("E482", f"stock transformers computes something else than the quantized model stands for: {reason}",
                         where=Where(printable(str(folder))),
                         help="it is not published; report the model's family and schemes")  # fmt: skip
    return figures


def _outputs(
    view: Checkpoint, samples: Sequence[np.ndarray], settings: Settings, stop: threading.Event | None
) -> Iterator[Tensor]:
    """Yield float32 logits [tokens, vocabulary] of each sample; last hidden states of a model without head."""
    states = last_states(view, samples, settings, stop=stop)
    try:
        head = Head(view, settings)
    except InputError as error:
        if error.code != "E386":
            raise
        head = None
    for state in states:
        with threads(settings.threads), torch.no_grad():
            yield (state if head is None else head.logits(state)).float().cpu()


def _apart(found: Iterator[np.ndarray], wanted: Sequence[Tensor]) -> tuple[float, float]:
    """Return (norm of the difference by that of what is wanted, share of equal largest entries) over all samples."""
    error = total = same = count = 0.0
    for mine, theirs in zip(found, wanted, strict=True):
        reference = theirs.numpy().astype(np.float64)
        if mine.shape != reference.shape:
            return float("inf"), 0.0
        error += float(np.square(mine - reference).sum())
        total += float(np.square(reference).sum())
        same += float((mine.argmax(-1) == reference.argmax(-1)).sum())
        count += len(mine)
    return (error / max(total, 1e-300)) ** 0.5, same / max(count, 1)
