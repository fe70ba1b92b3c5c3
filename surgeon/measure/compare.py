"""How many times as fast a model on disk is as another, measured.

Codes: E517 both do not fit into memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgeon.checkpoint.checkpoint import CONFIG_NAME, open_path
from surgeon.checkpoint.dtypes import CODES
from surgeon.checkpoint.strict_json import read_json_object
from surgeon.deploy.build import load
from surgeon.errors import EnvironmentFault
from surgeon.measure.conditions import Conditions
from surgeon.measure.environment import Environment
from surgeon.measure.models import HEADROOM, attention_of, set_attention
from surgeon.measure.runner import Runner, is_decoder
from surgeon.measure.timing import Estimate, median, paired
from surgeon.measure.workload import Workload

TOLERANCE = 0.03


@dataclass(frozen=True)
class Measured:
    """A measured speedup.

    Attributes:
        ratio, low, high: time of the dense model over that of the pruned one, with its 95 % interval.
        pairs: rounds in which both ran.
        dense_seconds, pruned_seconds: medians.
        measurable: whether the interval is as narrow as was asked for.
        precision: what was asked for, as a half-width relative to the ratio.
        parts: "prefill" and "decode" (one step) -> dense and pruned seconds, as far as the workload has them.
    """

    ratio: float
    low: float
    high: float
    pairs: int
    dense_seconds: float
    pruned_seconds: float
    measurable: bool
    precision: float
    workload: Workload
    environment: Environment
    parts: dict[str, tuple[float, float]]

    @property
    def half_width(self) -> float:
        """Half the width of the interval, relative to the ratio."""
        return (self.high - self.low) / 2 / self.ratio

    def sentence(self) -> str:
        """Return the result in words: never a speedup without its interval, workload and place."""
        shown = f"{self.ratio:.3f}x, 95 % interval {self.low:.3f} to {self.high:.3f}"
        doubt = "" if self.measurable else f"; not measurable to ±{self.precision:.1%} here"
        return f"{shown}{doubt} ({self.workload.sentence()}; {self.environment.sentence()})"

    def plain(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "ratio": self.ratio, "low": self.low, "high": self.high, "pairs": self.pairs, "dense_seconds": self.dense_seconds,
            "pruned_seconds": self.pruned_seconds, "measurable": self.measurable, "precision": self.precision,
            "workload": self.workload.document(), "environment": self.environment.document(),
            "parts": {name: {"dense_seconds": d, "pruned_seconds": p} for name, (d, p) in self.parts.items()},
        }  # fmt: skip


def accepts(measured: Measured, target: float, tolerance: float = TOLERANCE) -> bool:
    """Say whether a measured speedup meets a target: its interval meets the band of +-tolerance around it.

    An interval wider than the band meets almost anything and so proves nothing: it is not accepted.
    """
    return verdict(measured, target, tolerance) == "met"


def verdict(measured: Measured, target: float, tolerance: float = TOLERANCE) -> str:
    """Return "met", "too slow", "too fast", or "not measurable": neither missed for certain nor known well enough."""
    if measured.high < target * (1 - tolerance):
        return "too slow"
    if measured.low > target * (1 + tolerance):
        return "too fast"
    return "met" if measured.half_width <= tolerance else "not measurable"


def speedup(
    dense: Path,
    pruned: Path,
    workload: Workload,
    conditions: Conditions,
    *,
    progress: Callable[[str, int, int], None] | None = None,
    stop: threading.Event | None = None,
) -> Measured:
    """Load two models from disk and time them in turns.

    Args:
        dense, pruned: model folders.
        conditions: ``dtype`` "auto" takes each model's stored type, which must then be one.

    Raises:
        InputError: E324 to E327 a model does not load. EnvironmentFault: E517, E518. Interrupted: E130.
    """
    with conditions.in_force():
        _check_memory([dense, pruned], conditions)
        dtype = conditions.precision_of(stored_dtype(dense))
        models = [open_model(path, dtype, conditions) for path in (dense, pruned)]
        clock = conditions.clock()[1]
        first, second = (Runner(model, workload, clock, seed=conditions.seed) for model in models)
        environment = Environment.here(conditions, dtype=dtype, attention=attention_of(models[0]))
        found = paired(
            {"dense": first, "pruned": second}, "pruned", precision=conditions.precision, repeat=conditions.repeat,
            time_limit=conditions.time_limit, seed=conditions.seed, stop=stop,
            progress=(lambda done, total: progress("timing", done, total)) if progress else None,
        )  # fmt: skip
    ratio = found.ratios["dense"]
    seconds = {name: median(values).value for name, values in found.seconds.items()}
    return Measured(
        ratio.value, ratio.low, ratio.high, ratio.count, seconds["dense"], seconds["pruned"], found.measurable("dense"),
        conditions.precision, workload, environment, _parts(first, second, ratio.count),
    )  # fmt: skip


@dataclass(frozen=True)
class Speed:
    """One model's own times.

    Attributes:
        seconds: of the workload.
        prefill: seconds of one prefill; None when the workload has none.
        decode: seconds of one decode step, a token for every sequence of the batch.
        measurable: whether the interval of ``seconds`` is as narrow as was asked for.
    """

    seconds: Estimate
    prefill: Estimate | None
    decode: Estimate | None
    measurable: bool
    workload: Workload
    environment: Environment


def speed(
    folder: Path,
    workload: Workload,
    conditions: Conditions,
    *,
    progress: Callable[[str, int, int], None] | None = None,
    stop: threading.Event | None = None,
) -> Speed:
    """Load a model from disk and time it alone; on a shared machine ratios (`speedup`) are far more certain.

    Raises:
        InputError: E324 to E327. EnvironmentFault: E517, E518. Interrupted: E130.
    """
    with conditions.in_force():
        _check_memory([folder], conditions)
        dtype = conditions.precision_of(stored_dtype(folder))
        model = open_model(folder, dtype, conditions)
        runner = Runner(model, workload, conditions.clock()[1], seed=conditions.seed)
        environment = Environment.here(conditions, dtype=dtype, attention=attention_of(model))
        found = paired(
            {"model": runner}, "model", precision=conditions.precision, repeat=conditions.repeat,
            time_limit=conditions.time_limit, seed=conditions.seed, stop=stop,
            progress=(lambda done, total: progress("timing", done, total)) if progress else None,
        )  # fmt: skip
    seconds = median(found.seconds["model"], seed=conditions.seed)
    rounds = len(found.seconds["model"])
    prefill, decode = (
        median(times[-rounds:], seed=conditions.seed) if times else None
        for times in (runner.prefills, runner.steps)
    )
    return Speed(seconds, prefill, decode, seconds.half_width <= conditions.precision, workload, environment)


def open_model(folder: Path, dtype: str, conditions: Conditions) -> nn.Module:
    """Load a model where the conditions want it."""
    model: Any = load(folder, dtype=getattr(torch, dtype), device=conditions.place)
    set_attention(model, conditions)
    return model


def generates(folder: Path) -> bool:
    """Say whether the model in a folder is a decoder, from its configuration."""
    from surgeon.deploy.build import build

    return is_decoder(build(read_json_object(folder / CONFIG_NAME), dtype=torch.float32, device="meta"))


def stored_dtype(folder: Path) -> str:
    """Return the type most parameters of a model folder are stored in, as torch names it."""
    sizes, _ = _stored(folder)
    names = {code: name for name, code in CODES.items()}
    known = {names[code]: count for code, count in sizes.items() if code in names}
    return max(sorted(known), key=lambda name: known[name], default="float32")


def _stored(folder: Path) -> tuple[dict[str, int], int]:
    checkpoint = open_path(folder, str(folder))
    try:
        sizes: dict[str, int] = {}
        for tensor in checkpoint.tensors.values():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.elements
        return sizes, sum(sizes.values())
    finally:
        checkpoint.close()


def _check_memory(folders: list[Path], conditions: Conditions) -> None:
    needed = 0
    for folder in folders:
        width = 4 if conditions.precision_of(stored_dtype(folder)) == "float32" else 2
        needed += int(HEADROOM * width * _stored(folder)[1])
    budget = conditions.memory()
    if needed > budget:
        both = "both models" if len(folders) > 1 else "the model"
        raise EnvironmentFault("E517", f"timing {both} needs about {needed / 1e9:.1f} GB, {budget / 1e9:.1f} GB are available",
                               help="--dtype bfloat16, another --device, or a machine with more memory")  # fmt: skip


def _parts(dense: Runner, pruned: Runner, pairs: int) -> dict[str, tuple[float, float]]:
    """Return medians of the workload's parts over the rounds, which come after the warm-up."""
    found = {}
    for name, one, other in (
        ("prefill", dense.prefills, pruned.prefills),
        ("decode", dense.steps, pruned.steps),
    ):
        if one:
            found[name] = (median(one[-pairs:]).value, median(other[-pairs:]).value)
    return found
