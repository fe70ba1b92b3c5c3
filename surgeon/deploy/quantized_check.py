"""Is a quantized folder the model it stands for? Its reader loads it in a process of its own and is asked the same as we are.

    check(folder, dequantized(view), samples, settings)

The reference is the model of the decoded numbers, run layer by layer in the type the reader chose, so that it needs neither
disk nor the memory of the whole model. Logits of both are compared: the reader's with its matrices decoded, which shows
whether it took what was stored for what was meant, and as its kernels run, which round in their own ways.

auto-round keeps scales in the model's type: in one of bfloat16 they lose three bits when they are loaded. The reference
does the same, or routers of experts near a tie would choose otherwise and look like a wrong file.
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
from surgeon.calibrate.settings import DTYPES, Settings
from surgeon.checkpoint.checkpoint import CONFIG_NAME, Checkpoint
from surgeon.checkpoint.header import printable
from surgeon.checkpoint.strict_json import read_json_object
from surgeon.errors import EnvironmentFault, InputError, Where
from surgeon.formats.dequantized import DequantizedView, dequantized
from surgeon.kernels.cast import narrow, round_to, widen
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
        settings: device, threads and memory of the reference; its precision is the reader's.
        timeout: seconds the reader may take.
        memory_limit: bytes the reader may use.
        stop: set it to stop the reference.

    Returns:
        {"reader", "versions", "dtype", "modules" (quantized in memory), "tokens", "relative difference" (of logits, by the
        norm of the reference's, matrices decoded), "as run" (the same as kernels run), "top1" (equal first choices, as
        run), "generated" (greedy tokens), "warnings"}; "rounding" where 16 bits had to explain a difference. Where the
        reader cannot be asked, {"reader", "notice"}: why.

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
        method = readers.method_of(read_json_object(folder / CONFIG_NAME))
        view = as_loaded(reference, method, found.dtype)
        settings = replace(settings, dtype=found.dtype if found.dtype in DTYPES else "bfloat16")
        try:
            said |= _compared(folder, method, view, chosen, settings, outputs, stop)
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
    folder: Path, method: str | None, view: Checkpoint, samples: Sequence[np.ndarray], settings: Settings, outputs: Path,
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
    rounding = 0.0
    if readers.too_far(method, decoded, as_run, 0.0) and settings.dtype != "float32":
        exact = (out.numpy() for out in _outputs(view, samples, replace(settings, dtype="float32"), stop))
        rounding = figures["rounding"] = _apart(exact, wanted)[0]
    reason = readers.too_far(method, decoded, as_run, rounding)
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


def as_loaded(reference: Checkpoint, method: str | None, dtype: str | None) -> Checkpoint:
    """Return the reference as a reader has it in memory: of auto-round in bfloat16, with its scales in that type."""
    if method != "auto-round" or dtype != "bfloat16" or not isinstance(reference, DequantizedView):
        return reference
    return dequantized(_Scales16(reference.source))


class _Scales16:
    """A Checkpoint of an auto-round model whose float16 scales are rounded to bfloat16; all else is the source's."""

    def __init__(self, source: Checkpoint) -> None:
        self._source = source
        self._rounded = {n for n, t in source.tensors.items() if n.endswith(".scales") and t.dtype == "F16"}
        self.tensors = {
            n: replace(t, dtype="BF16") if n in self._rounded else t for n, t in source.tensors.items()
        }

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        values = self._source.read(name, start, stop)
        return narrow(round_to(widen(values, "F16"), "BF16"), "BF16") if name in self._rounded else values
