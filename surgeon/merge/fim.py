"""FIM-Merging: layer strengths without data, from Fisher information on random tokens.

Xia, "Data-Free Layer-Adaptive Merging via Fisher Information for Long-to-Short Reasoning LLMs", arXiv
2603.21705. The error of taking a task vector in part grows with a layer's curvature times the squared length
of its task vector; the diagonal Fisher information of the base stands for the curvature and needs no data:

    F_l     = mean over the layer's parameters and over N samples of (dL_n/dtheta)^2
    z_l     = log(F_l * ||delta_l||^2), standardised over the layers (population standard deviation)
    alpha_l = 1 / (1 + exp(sharpness * z_l))

with N = 8 sequences of 64 tokens drawn uniformly from the vocabulary and L_n the language-model loss on the
tokens themselves. What the sources leave open, and what is done here:

* Where alpha_l acts. It is the paper's whole coefficient of a layer: use it with lambda 1.
* Direction. The paper argues that layers of high curvature be merged carefully, so a high score gives a small
  factor (``sensitive="less"``). ``"more"`` turns it round. ``sharpness`` is 1.
* Parts outside the layers (embedding, final norm, head) have scores of their own, placed on the layers' scale:
  mean and deviation come from the layers alone. Layers that no loss reaches (prediction layers) get the mean factor.
* ``gate_proj`` has a further factor of 0.7 in every layer. Where gate and up projections are stored in one
  tensor no factor per tensor can express that; it is left out and ``made_by`` says so.
* "Norms that deviate by more than 5 % are rescaled" is read as a bound, which a factor can express: the factor
  of a norm's weight is lowered until the L2 norm of b + factor * delta is within 5 % of that of b, for this
  factor and any smaller one, so it holds for every lambda up to 1. Gemma's norms multiply by 1 + w and are
  measured so.
* A layer where the two models are equal, or the loss is flat, is left out of the statistics and has factor 1.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from surgeon import architectures
from surgeon.checkpoint.dtypes import DTYPES
from surgeon.checkpoint.header import printable
from surgeon.errors import InputError, Interrupted, UsageError, Where
from surgeon.kernels.cast import widen
from surgeon.merge.layer_groups import (
    Group,
    MeasuredScores,
    aliases,
    buffers,
    group_of,
    in_order,
    layer_scores,
    row_blocks,
)
from surgeon.scalars import show
from surgeon.seeds import stream_key, uniform
from surgeon.traits import part_of

if TYPE_CHECKING:
    import torch

    from surgeon.calibrate.skeleton import Settings
    from surgeon.checkpoint.checkpoint import Checkpoint

SEQUENCES, LENGTH = 8, 64
GATE = 0.7
NORM_TOLERANCE = 0.05
"""The paper's values."""

SENSITIVE = ("less", "more")

BLOCK = 1 << 20
"""Elements of a task vector read at once."""


@dataclass(frozen=True)
class Options:
    """How Fisher information becomes factors.

    Attributes:
        sequences, length: random sequences and their tokens.
        sharpness: slope of the sigmoid, > 0.
        sensitive: "less" of the task vector where the score is high, or "more".
        gate: further factor of gate projections.
        norm_tolerance: bound on the relative change of a norm weight's length; None for no bound.
    """

    sequences: int = SEQUENCES
    length: int = LENGTH
    sharpness: float = 1.0
    sensitive: str = "less"
    gate: float = GATE
    norm_tolerance: float | None = NORM_TOLERANCE

    def __post_init__(self) -> None:
        if self.sensitive not in SENSITIVE:
            raise UsageError("E233", f"unknown sensitive {show(self.sensitive)}", help=f"use {' or '.join(SENSITIVE)}")  # fmt: skip
        if self.sequences < 1 or self.length < 2:
            raise UsageError("E233", f"{self.sequences} sequences of {self.length} tokens measure nothing",
                             help="at least one sequence of two tokens is needed")  # fmt: skip
        numbers = {
            "sharpness": self.sharpness,
            "gate": self.gate,
            "norm_tolerance": self.norm_tolerance or 1.0,
        }
        for name, value in numbers.items():
            if not math.isfinite(value) or value < 0 or (name != "gate" and value == 0):
                raise UsageError("E233", f"{name} is {show(value)}, not a positive number",
                                 help="a finite number above 0" if name != "gate" else "a finite number from 0 up")  # fmt: skip


def random_tokens(vocabulary: int, seed: int, sequences: int = SEQUENCES, length: int = LENGTH) -> np.ndarray:
    """Return token ids, int64 [sequences, length], uniform over the vocabulary; a function of the seed alone."""
    drawn = uniform(stream_key(seed, 0, "fim tokens"), 0, sequences * length)
    return (drawn * vocabulary).astype(np.int64).reshape(sequences, length)


def strengths(
    fisher: Mapping[Group, float],
    squares: Mapping[Group, float],
    *,
    sharpness: float = 1.0,
    sensitive: str = "less",
) -> dict[Group, float]:
    """Return alpha of every group of ``squares``; statistics over the numbered layers.

    Args:
        fisher: group -> mean squared gradient of a parameter, F_l.
        squares: group -> ||delta_l||^2.
        sharpness: slope of the sigmoid.
        sensitive: "less" or "more", see `Options`.
    """
    logs = {
        group: math.log(fisher[group]) + math.log(square)
        for group, square in squares.items()
        if square > 0 and fisher.get(group, 0.0) > 0
    }
    layers = [logs[group] for group in in_order(logs) if isinstance(group, int)]
    mean = math.fsum(layers) / len(layers) if layers else 0.0
    variance = math.fsum((value - mean) ** 2 for value in layers) / len(layers) if layers else 0.0
    slope = sharpness * (1.0 if sensitive == "more" else -1.0)
    found = {}
    for group in in_order(squares):
        if group not in logs or not layers:
            found[group] = 1.0
            continue
        # Rounding leaves a tiny deviation between equal layers; dividing by it would blow noise up to +-1.
        flat = math.sqrt(variance) <= 1e-12 * max(1.0, abs(mean))
        found[group] = _sigmoid(0.0 if flat else slope * (logs[group] - mean) / math.sqrt(variance))
    return found


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


def norm_bound(alpha: float, base: float, cross: float, delta: float, tolerance: float) -> float:
    """Return the largest factor f <= alpha with | ||b + t d|| / ||b|| - 1 | <= tolerance for all 0 <= t <= f.

    Args:
        alpha: the factor wanted, >= 0.
        base, cross, delta: ||b||^2, b . d and ||d||^2 of one norm's weight.
        tolerance: relative bound, > 0.
    """
    if delta <= 0:
        return alpha
    limits = [alpha]
    for edge in (1.0 + tolerance, 1.0 - tolerance):
        # ||b + t d||^2 = delta t^2 + 2 cross t + base reaches (edge ||b||)^2; the first crossing counts.
        rest = base - base * edge * edge if edge > 0 else math.inf
        root = cross * cross - delta * rest
        if root >= 0:
            # The two forms of each root; the one without cancellation is exact to rounding.
            far = -(cross + math.copysign(math.sqrt(root), cross))
            crossings = [far / delta] + ([rest / far] if far else [])
            limits += [t for t in crossings if t >= 0]
    return min(limits)


class FisherReceiver:
    """Sums squared per-sample gradients by group, in float64."""

    def __init__(self) -> None:
        self.sums: dict[Group, float] = {}
        self.tensors: set[str] = set()

    def receive(
        self,
        sample: int,
        tensor: str,
        weight: torch.Tensor,
        gradient: torch.Tensor,
        rows: torch.Tensor | None = None,
    ) -> None:
        import torch

        group = group_of(tensor)
        for (g,) in row_blocks(gradient):
            value = g.float().square().sum(dtype=torch.float64).item()
            self.sums[group] = self.sums.get(group, 0.0) + value
        self.tensors.add(tensor)


@dataclass
class Differences:
    """Sums over a task vector, read in blocks: ||delta||^2 by group, and what bounds each norm's factor."""

    squares: dict[Group, float] = field(default_factory=dict)
    norms: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    unmatched: int = 0


def differences(base: Checkpoint, model: Checkpoint, stop: threading.Event | None = None) -> Differences:
    """Return the sums over ``model - base``, float64; tied copies are counted once.

    Raises:
        InputError: E357 two tensors of one name have different shapes.
    """
    found = Differences()
    record = architectures.get((base.config or {}).get("model_type"))
    tied, own, skipped = aliases(base), aliases(model), buffers(model)
    for name in sorted(model.tensors):
        if name in own or name in skipped:
            continue
        stored = name if name in base.tensors else tied.get(name, name)
        info = model.tensors[name]
        if stored not in base.tensors or DTYPES[info.dtype].family != "float":
            found.unmatched += 1
            continue
        if base.tensors[stored].shape != info.shape:
            raise InputError("E357", f"{printable(name)} is {list(info.shape)} in {model.label} but "
                             f"{list(base.tensors[stored].shape)} in {base.label}", where=Where(tensor=printable(name)),
                             help="FIM compares the models tensor by tensor; align their vocabularies first")  # fmt: skip
        is_norm = len(info.shape) == 1 and part_of(name) == "norm" and name.endswith("weight")
        square = lengths = cross = 0.0
        for old, new in _blocks(base, stored, model, name):
            if stop is not None and stop.is_set():
                raise Interrupted("E130", "interrupted while the models were compared")
            delta = new - old
            square += float(np.dot(delta, delta))
            if is_norm:
                old += record.norm_offset(stored) if record is not None else 0.0
                lengths += float(np.dot(old, old))
                cross += float(np.dot(old, delta))
        group = group_of(name)
        found.squares[group] = found.squares.get(group, 0.0) + square
        if is_norm:
            found.norms[name] = (lengths, cross, square)
    return found


def _blocks(
    base: Checkpoint, stored: str, model: Checkpoint, name: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield both tensors as float64 blocks."""
    old, new = base.tensors[stored], model.tensors[name]
    step = max(base.granularity(stored), model.granularity(name))
    step *= max(1, BLOCK // step)
    total = math.prod(new.shape)
    for start in range(0, total, step):
        stop = min(total, start + step)
        yield (
            widen(base.read(stored, start, stop), old.dtype).astype(np.float64),
            widen(model.read(name, start, stop), new.dtype).astype(np.float64),
        )


def measure(
    base: Checkpoint,
    models: Mapping[str, Checkpoint],
    settings: Settings,
    *,
    seed: int = 0,
    options: Options | None = None,
    progress: Callable[[str], None] | None = None,
    stop: threading.Event | None = None,
) -> MeasuredScores:
    """Measure the base's Fisher information on random tokens and return the factors of each model.

    Args:
        base: the model that task vectors are taken from.
        models: name -> fine-tuned model, named and shaped like the base.
        settings: device, precision and limits of the streamed passes.
        seed: decides the random tokens.
        options: see `Options`.
    """
    options = options or Options()
    fisher, losses, tokens = _fisher(base, settings, seed, options, progress, stop)
    scores, facts = {}, {}
    for name, model in models.items():
        if progress is not None:
            progress(f"differences of {name}")
        sums = differences(base, model, stop)
        scores[name], facts[name] = _scores(base, model, fisher, sums, options)
    made_by: dict[str, Any] = {
        "method": "fim",
        "seed": seed,
        "sequences": options.sequences,
        "length": int(tokens.shape[1]),
        "sharpness": options.sharpness,
        "sensitive": options.sensitive,
        "gate": options.gate,
        "norm_tolerance": options.norm_tolerance,
        "precision": settings.dtype,
        "loss": math.fsum(losses.values()) / len(losses),
        "fisher": {str(group): fisher[group] for group in in_order(fisher)},
        "models": facts,
    }
    return MeasuredScores(scores, made_by)


def _fisher(
    base: Checkpoint,
    settings: Settings,
    seed: int,
    options: Options,
    progress: Callable[[str], None] | None,
    stop: threading.Event | None,
) -> tuple[dict[Group, float], dict[int, float], np.ndarray]:
    """Return F_l of every group the loss reaches, the losses, and the tokens."""
    from surgeon.calibrate.data import Sample
    from surgeon.calibrate.gradients import gradients

    config = base.config or {}
    positions = config.get("max_position_embeddings") or config.get("n_positions") or options.length
    length = max(2, min(options.length, int(positions)))
    tokens = random_tokens(_vocabulary(base), seed, options.sequences, length)
    samples = [Sample(ids=ids, answer_start=0, line=number) for number, ids in enumerate(tokens, 1)]
    receiver = FisherReceiver()
    losses = gradients(base, samples, receiver, settings, progress=progress, stop=stop)
    # Experts that no token reached deliver no gradient, but their parameters count: their gradient is zero.
    reached = set(receiver.sums)
    skipped = {*aliases(base), *buffers(base)}
    sizes: dict[Group, int] = {}
    for name, info in base.tensors.items():
        group = group_of(name)
        if group in reached and name not in skipped and DTYPES[info.dtype].family == "float":
            sizes[group] = sizes.get(group, 0) + math.prod(info.shape)
    return {g: receiver.sums[g] / (len(samples) * sizes[g]) for g in in_order(reached)}, losses, tokens


def _vocabulary(base: Checkpoint) -> int:
    config = base.config or {}
    size = config.get("vocab_size")
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise InputError("E358", f"{base.label} does not say its vocab_size, so no random tokens can be drawn",
                         where=Where(file="config.json"), help="add vocab_size to config.json, or give --calibration")  # fmt: skip
    return size


def _scores(
    base: Checkpoint,
    model: Checkpoint,
    fisher: Mapping[Group, float],
    sums: Differences,
    options: Options,
) -> tuple[Any, dict[str, Any]]:
    """Return one model's LayerScores and the facts behind them."""
    tied = {group_of(copy): group_of(stored) for copy, stored in aliases(base).items()}
    # A head of the model's own stands against the base's embedding when the base ties them.
    full = {**fisher, **{copy: fisher[stored] for copy, stored in tied.items() if stored in fisher}}
    reached = {group: value for group, value in sums.squares.items() if group in full}
    found = strengths(full, reached, sharpness=options.sharpness, sensitive=options.sensitive)
    layers = [value for group, value in found.items() if isinstance(group, int)]
    mean = math.fsum(layers) / len(layers) if layers else 1.0
    found |= {group: mean for group in sums.squares if group not in found}
    gates, fused = _gates(base)
    further = [(pattern, options.gate) for pattern in gates] if options.gate != 1 else []
    bounded = {}
    for name, (lengths, cross, square) in sums.norms.items():
        if options.norm_tolerance is None:
            break
        wanted = found[group_of(name)]
        allowed = norm_bound(wanted, lengths, cross, square, options.norm_tolerance)
        if allowed < wanted:
            bounded[name] = allowed / wanted
    # Norms outside the layers are listed by name already; a second entry of the same name would be one key.
    outside = {name: value for name, value in bounded.items() if isinstance(group_of(name), str)}
    found |= {group_of(name): found[group_of(name)] * value for name, value in outside.items()}
    further += [(name, value) for name, value in sorted(bounded.items()) if name not in outside]
    scores = layer_scores(found, model.tensors, aliases(model), further)
    facts = {
        "delta_squared": {str(g): sums.squares[g] for g in in_order(sums.squares)},
        "unmatched_tensors": sums.unmatched,
        "gate_factor_left_out": fused and options.gate != 1,
        "norms_bounded": sorted(bounded),
    }
    return scores, facts


def _gates(base: Checkpoint) -> tuple[list[str], bool]:
    """Return globs of the gate projections, and whether some are stored together with up projections."""
    config = base.config or {}
    record = architectures.get(config.get("model_type"))
    if record is None:
        return ["*.gate_proj.weight"], False
    expected = record.layout(config, list(base.tensors)).tensors
    kinds = {name: expected[name].kind for name in base.tensors if name in expected}
    gates = {"*." + ".".join(n.split(".")[-2:]) for n, kind in kinds.items() if kind.endswith("_gate")}
    return sorted(gates), any(kind.endswith("gate_up") for kind in kinds.values())
