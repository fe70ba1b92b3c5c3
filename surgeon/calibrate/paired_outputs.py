"""Two models over the same samples in lockstep: mutual information between their layers' outputs.

One layer of each model is in memory, and the outputs of one layer. What is compared at each place:

- embedding: the rows of the embedding matrix;
- a dense layer: the output of its last MLP matrix (down_proj, c_proj, fc2 ...);
- a layer of experts: what the whole MoE block adds to the residual stream, which is the input of the
  next norm minus the input of the norm before the block;
- final norm: its output;
- output head: logits, of evenly spaced vocabulary entries where all of them would be too many.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surgeon import architectures
from surgeon.calibrate import information
from surgeon.calibrate.head import Head
from surgeon.calibrate.settings import Settings
from surgeon.calibrate.skeleton import Skeleton
from surgeon.calibrate.statistics import OutputCapture
from surgeon.calibrate.walk import Walk
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.header import printable
from surgeon.errors import InputError, Interrupted, UsageError, Where
from surgeon.kernels.cast import widen

LOGITS = 1 << 24
"""Logits of one sample that are compared; more tell nothing new about their dependence."""

Estimator = Callable[[np.ndarray, np.ndarray], float]


@dataclass(frozen=True)
class Places:
    """Where one model's outputs are taken; all names are observed modules.

    Attributes:
        layers: for every layer, the module whose outputs count, or "" for a layer of experts.
        before: for a layer of experts, the norm whose input is the stream before the block.
        after: for a layer of experts, the norm whose input is the stream behind it.
        norm: the final norm, "" without one.
        embedding: tensor name of the embedding.
        head: module name of the output head, "" without one.
        tied: the head is the embedding.
    """

    layers: tuple[str, ...]
    before: Mapping[int, str]
    after: Mapping[int, str]
    norm: str
    embedding: str
    head: str
    tied: bool

    @property
    def outputs(self) -> set[str]:
        return {name for name in (*self.layers, self.norm) if name}

    @property
    def inputs(self) -> set[str]:
        return {*self.before.values(), *self.after.values()}


def places_of(skeleton: Skeleton) -> Places:
    """Return where the outputs of a model's layers are taken.

    Raises:
        InputError: E389 a layer has neither a last MLP matrix nor experts between two norms.
    """
    checkpoint = skeleton.checkpoint
    config = checkpoint.config or {}
    record = architectures.get(config.get("model_type"))
    assert record is not None  # a skeleton has refused others
    kinds = {name: spec.kind for name, spec in record.layout(config, checkpoint.tensors).tensors.items()}
    inside = skeleton.base_prefix
    norms = [
        piece.module for path, listed in skeleton.outer_pieces().items() if path.startswith(inside) for piece in listed
        if kinds.get(piece.tensor, "") == "norm" and "embed" not in piece.name
    ]  # fmt: skip
    layers: list[str] = []
    before: dict[int, str] = {}
    first: dict[int, str] = {}
    for layer in range(skeleton.layers):
        pieces = skeleton.pieces(layer)
        found = [
            p.module for listed in pieces.values() for p in listed if kinds.get(p.tensor, "") == "ffn_down"
        ]
        layers.append(found[0] if found else "")
        for ending, table in (("input_layernorm.weight", first), ("post_attention_layernorm.weight", before)):
            if ending in pieces:
                table[layer] = pieces[ending][0].module
    last = skeleton.layers - 1
    after = {number: first.get(number + 1, "") for number in range(last)} | {last: norms[-1] if norms else ""}
    for number, module in enumerate(layers):
        if not module and not (before.get(number) and after.get(number)):
            raise InputError("E389", f"layer {number} of {checkpoint.label} has no MLP output that can be observed",
                             where=Where(checkpoint.label), help="leave out --acm: it compares the MLP outputs of every layer")  # fmt: skip
    routed = {number for number, module in enumerate(layers) if not module}
    embedding = skeleton.outer_pieces()[f"{skeleton.embedding_module}.weight"][0]
    head = skeleton.head_pieces().get("weight", [])
    tied = bool(head) and head[0] == embedding
    return Places(
        tuple(layers),
        {n: before[n] for n in routed},
        {n: after[n] for n in routed},
        norms[-1] if norms else "",
        embedding.tensor,
        "" if not head else (skeleton.head_module or "") if tied else head[0].module,
        tied,
    )


@dataclass
class _Comparison:
    """Compares the second model's outputs with those of the first that are kept, as they come."""

    kept: OutputCapture
    own: OutputCapture
    first: Places
    second: Places
    estimate: Estimator
    found: dict[str, dict[int, float]] = field(default_factory=dict)

    def wants(self, module: str) -> bool:
        return self.own.wants(module)

    def observe(self, module: str, inputs: Tensor, outputs: Tensor | None, sample: int | None) -> None:
        self.own.observe(module, inputs, outputs, sample)

    def compare(self, stage: int, samples: int) -> None:
        """Compare what stage ``stage`` completed: 0 the embedding, 1 ... the layers, then the end."""
        for sample in range(samples):
            for number, module in enumerate(self.second.layers):
                if module and number + 1 == stage:
                    self._note(module, sample, self._pair(self.first.layers[number], module, sample))
                elif not module and number + 2 == stage:
                    self._note(_block(self.second.before[number]), sample, self._added(number, sample))
            if stage == len(self.second.layers) + 1 and self.first.norm and self.second.norm:
                self._note(self.second.norm, sample, self._pair(self.first.norm, self.second.norm, sample))

    def _pair(self, first: str, second: str, sample: int) -> tuple[Tensor, Tensor]:
        return self.kept.take(first, sample), self.own.take(second, sample)

    def _added(self, number: int, sample: int) -> tuple[Tensor, Tensor]:
        """Return what a block of experts adds to the residual stream, in both models."""
        sides = ((self.kept, self.first), (self.own, self.second))
        streams = [
            [capture.take(table[number], sample, "inputs").float() for table in (places.after, places.before)]
            for capture, places in sides
        ]
        (x_after, x_before), (y_after, y_before) = streams
        return x_after - x_before, y_after - y_before

    def _note(self, module: str, sample: int, pair: tuple[Tensor, Tensor]) -> None:
        x, y = (value.float().numpy() for value in pair)
        self.found.setdefault(module, {})[sample] = self.estimate(x, y)


def _block(norm: str) -> str:
    """Return the name a layer of experts is reported under, from its norm's."""
    return f"{norm.rpartition('.')[0]}.mlp"


def measure_information(
    base: Checkpoint,
    tuned: Checkpoint,
    samples: Sequence[np.ndarray],
    settings: Settings,
    *,
    estimator: str = "gaussian",
    head: bool = True,
    progress: Callable[[int, int], None] | None = None,
    stop: threading.Event | None = None,
) -> dict[str, np.ndarray]:
    """Return the mutual information of both models' outputs for every place and sample, in nats.

    Args:
        base, tuned: two models of one architecture and one tokenizer.
        samples: token ids, one array each.
        settings: conditions of both passes; they share its memory.
        estimator: a key of `information.ESTIMATORS`.
        head: compare logits, too, unless both heads are tied embeddings.
        progress: called with (stages done, stages).
        stop: set it to stop after the stage in progress.

    Returns:
        Module name in ``tuned`` -> float64 [samples], in the order of the model. A layer of experts
        is named "...mlp", whatever its block is called.

    Raises:
        UsageError: E381 there is no such estimator.
        InputError: E389 the models cannot be compared; and whatever a walk raises.
        Interrupted: E130 ``stop`` was set.
    """
    if estimator not in information.ESTIMATORS:
        raise UsageError("E381", f'"{estimator}" is no estimator of mutual information',
                         help="one of: " + ", ".join(information.ESTIMATORS))  # fmt: skip
    estimate = information.ESTIMATORS[estimator]
    with ExitStack() as held:
        folder = Path(
            held.enter_context(tempfile.TemporaryDirectory(dir=settings.spill, prefix="surgeon-outputs-"))
        )
        shared = settings.budget()
        spill = None if settings.spill is None else folder
        own = replace(settings, memory_limit=shared * 2 // 5, spill=spill)
        first = held.enter_context(Walk(base, samples, own, per_sample=True))
        second = held.enter_context(Walk(tuned, samples, own, per_sample=True))
        places = places_of(first.skeleton), places_of(second.skeleton)
        _check_pair(first, second, places)
        captures = [
            OutputCapture(p.outputs, folder, inputs=p.inputs, memory_limit=shared // 10) for p in places
        ]
        compared = _Comparison(captures[0], captures[1], places[0], places[1], estimate)
        for capture in captures:
            held.callback(capture.close)
        steps: list[Any] = [first.steps(captures[0]), second.steps(compared)]
        for generator in steps:
            held.enter_context(closing(generator))
        for stage, _ in enumerate(zip(*steps, strict=True)):
            compared.compare(stage, len(samples))
            if progress is not None:
                progress(stage + 1, first.layers + 3)
            if stop is not None and stop.is_set():
                raise Interrupted("E130", "interrupted during calibration; nothing was kept")
        found = {
            _module(places[1].embedding): [
                estimate(
                    _embedded(base, places[0].embedding, ids), _embedded(tuned, places[1].embedding, ids)
                )
                for ids in samples
            ]
        }
        found |= {
            module: [values[sample] for sample in range(len(samples))]
            for module, values in compared.found.items()
        }
        if head and all(p.head for p in places) and not (places[0].tied and places[1].tied):
            untied = places[0] if places[1].tied else places[1]
            found[untied.head] = _head_information(first, second, estimate)
        if progress is not None:
            progress(first.layers + 3, first.layers + 3)
    return {module: np.array(values) for module, values in found.items()}


def _module(tensor: str) -> str:
    return tensor.removesuffix(".weight")


def _check_pair(first: Walk, second: Walk, places: tuple[Places, Places]) -> None:
    """Refuse models whose layers do not correspond."""
    labels = [walk.skeleton.checkpoint.label for walk in (first, second)]
    types = [str((walk.skeleton.checkpoint.config or {}).get("model_type")) for walk in (first, second)]
    if types[0] != types[1] or first.layers != second.layers:
        what = [f"{kind} of {walk.layers} layers" for kind, walk in zip(types, (first, second), strict=True)]
        raise InputError("E389", f"{labels[0]} is a {printable(what[0])}, {labels[1]} a {printable(what[1])}",
                         help="outputs of models of one architecture and depth can be compared")  # fmt: skip
    widths = [walk.skeleton.hidden_size for walk in (first, second)]
    if widths[0] != widths[1] or places[0].before.keys() != places[1].before.keys():
        raise InputError("E389", f"{labels[0]} and {labels[1]} differ in width or in which layers hold experts",
                         help="outputs of models of one architecture and size can be compared")  # fmt: skip


def _embedded(checkpoint: Checkpoint, name: str, ids: np.ndarray) -> np.ndarray:
    """Return the embedding's rows of tokens [tokens, width], read row by row."""
    info = checkpoint.tensors[name]
    width = info.shape[1]
    unique, place = np.unique(np.asarray(ids, np.int64), return_inverse=True)
    rows = [widen(checkpoint.read(name, int(i) * width, (int(i) + 1) * width), info.dtype) for i in unique]
    return np.stack(rows)[place.reshape(-1)]


def _head_information(first: Walk, second: Walk, estimate: Estimator) -> list[float]:
    """Return the information between both models' logits, for each sample."""
    heads = [
        Head(walk.skeleton.checkpoint, walk.settings, skeleton=walk.skeleton) for walk in (first, second)
    ]
    vocabulary = min(head.vocabulary for head in heads)  # padded rows that only one model has predict nothing
    longest = max(batch.length for batch in first.batches)
    step = max(1, -(-vocabulary * longest // LOGITS))
    rows = torch.arange(0, vocabulary, step)
    parts = [_rows_of(head, rows) for head in heads]
    found = []
    for (_, x), (_, y) in zip(first.hidden(), second.hidden(), strict=True):
        logits = []
        for walk, head, (weight, bias), states in zip((first, second), heads, parts, (x, y), strict=True):
            skeleton: Any = walk.skeleton
            with torch.no_grad():
                entering = skeleton.placement.send(states.to(skeleton.dtype), skeleton.placement.outer)
                logits.append(head.block_logits(skeleton.head_input(entering), weight, bias).cpu().numpy())
        found.append(estimate(*logits))
    return found


def _rows_of(head: Head, rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return these vocabulary rows of a head, and of its bias; the head is read once, in blocks."""
    weights: list[Tensor] = []
    biases: list[Tensor] = []
    for start, stop, weight, bias in head.blocks(head.rows_per_block(1)):
        inside = (rows[(rows >= start) & (rows < stop)] - start).to(weight.device)
        weights.append(weight[inside])
        if bias is not None:
            biases.append(bias[inside])
    return torch.cat(weights), torch.cat(biases) if biases else None
