"""Directions of the residual stream: the difference of two sets' mean activations, by layer.

    d_l = mean over long examples of mean_t r_l(t)  -  mean over short examples of mean_t r_l(t)

r_l is the residual stream at a site of layer l (`surgeon.edit.writers.Stream`). Every example counts once,
however long it is. One streamed pass over each set keeps one mean for each example and layer; of the short set
also the mean inputs of the attention output projections, since a head's mean contribution W_h a is linear in
a: scoring heads needs no further pass and never the contributions of single tokens (ThinkEdit, arXiv
2503.22048, section 3.2). Directions say nothing where the sets cannot be told apart, so a third of the
examples is held out and sorted by the direction of the rest.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from surgeon.calibrate.answers import answer_places
from surgeon.calibrate.data import permutation
from surgeon.calibrate.settings import Settings
from surgeon.calibrate.walk import Walk
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.edit.direction_file import Directions, fingerprint
from surgeon.edit.examples import Example, Sets
from surgeon.edit.writers import Stream
from surgeon.errors import InputError

WINDOWS = ("response", "last")
"""response: from the last token of the prompt to the one before the last (ThinkEdit); last: the last token (ASC)."""
NO_SIGNAL = 1e-3
"""A direction shorter than this share of the stream's mean norm says nothing."""


def places(example: Example, window: str) -> slice:
    """Return the tokens of an example that count."""
    return slice(len(example.ids) - 1, len(example.ids)) if window == "last" else answer_places(example)


class ExampleMeans:
    """An observer: the mean input of each module over every example's tokens, float32 [examples, width].

    The walk must run with one sample a batch. Sums are float64.
    """

    def __init__(self, modules: Sequence[str], examples: Sequence[Example], window: str) -> None:
        self._modules = frozenset(modules)
        self._places = [places(example, window) for example in examples]
        self.means: dict[str, np.ndarray] = {}
        self.norms: dict[str, np.ndarray] = {}

    def wants(self, module: str) -> bool:
        return module in self._modules

    def observe(self, module: str, inputs: Tensor, outputs: Tensor | None, sample: int | None) -> None:
        assert sample is not None
        rows = inputs[self._places[sample]].to(torch.float64)
        if module not in self.means:
            self.means[module] = np.zeros((len(self._places), inputs.shape[1]), np.float32)
            self.norms[module] = np.zeros(len(self._places))
        self.means[module][sample] = rows.mean(0).cpu().numpy()
        self.norms[module][sample] = float(rows.norm(dim=1).mean())


def extract(
    checkpoint: Checkpoint,
    stream: Stream,
    sets: Sets,
    settings: Settings,
    *,
    site: str = "attn",
    window: str = "response",
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
    stop: threading.Event | None = None,
) -> Directions:
    """Return the direction from short to long thinking of every layer.

    Args:
        checkpoint: the model whose responses these are.
        stream: its residual stream.
        sets: the examples.
        settings: where and how the model runs.
        site, window: see `surgeon.edit.writers.SITES` and `WINDOWS`.
        seed: of the third that is held out.
        progress: called with (what is measured, stages done, stages).

    Raises:
        UsageError: E295 no such site in this model. InputError: what the walk raises; E415 the sets give equal activations.
    """
    modules = stream.site(site)
    outputs = {writer.layer: writer.module for writer in stream.attention()}
    found: dict[str, ExampleMeans] = {}
    for name, examples in (("long", sets.long), ("short", sets.short)):
        wanted = [*modules.values(), *(outputs.values() if name == "short" else ())]
        observer = ExampleMeans(wanted, examples, window)

        def told(done: int, total: int, name: str = name) -> None:
            if progress is not None:
                progress(f"{name} responses", done, total)

        with Walk(checkpoint, [example.ids for example in examples], settings, per_sample=True) as walk:
            walk.run(observer, progress=told, stop=stop)
        found[name] = observer
    long, short = found["long"], found["short"]
    vectors, norms, separated = {}, {}, {}
    for layer, module in modules.items():
        a, b = long.means[module], short.means[module]
        vectors[layer] = a.mean(0, dtype=np.float64) - b.mean(0, dtype=np.float64)
        norms[layer] = float(np.concatenate([long.norms[module], short.norms[module]]).mean())
        separated[layer] = separability(a, b, seed)
    if not any(vector.any() for vector in vectors.values()):
        raise InputError("E415", "the long and the short responses give equal activations, so there is no direction",
                         help="the two sets may hold the same texts")  # fmt: skip
    return Directions(
        site=site,
        window=window,
        vectors={layer: vector.astype(np.float32) for layer, vector in vectors.items()},
        inputs={n: short.means[m].mean(0, dtype=np.float64).astype(np.float32) for n, m in outputs.items() if m in short.means},
        norms=norms,
        separated=separated,
        modules=dict(modules),
        examples=(len(sets.long), len(sets.short)),
        model=fingerprint(checkpoint),
        data=dict(sets.record),
        precision=settings.dtype,
    )  # fmt: skip


def separability(long: np.ndarray, short: np.ndarray, seed: int) -> float:
    """Return how many held-out examples lie on the right side: sign(d . (r - midpoint)), both sets counting equally.

    Args:
        long, short: per-example means [examples, width]; a third of each is held out, at least one.
        seed: of the choice.
    """
    kept, held = [], []
    for values, name in ((long, "long"), (short, "short")):
        order = permutation(len(values), seed, f"held out {name}")
        count = max(1, len(values) // 3)
        held.append(values[order[:count]].astype(np.float64))
        kept.append(values[order[count:]].astype(np.float64).mean(0))
    direction, middle = kept[0] - kept[1], (kept[0] + kept[1]) / 2
    sides = [((values - middle) @ direction) * sign > 0 for values, sign in zip(held, (1, -1), strict=True)]
    return float(np.mean([side.mean() for side in sides]))


def remarks(directions: Directions) -> list[str]:
    """Return warnings about directions that say little."""
    lengths = {layer: float(np.linalg.norm(vector)) for layer, vector in directions.vectors.items()}
    silent = [layer for layer, length in lengths.items() if length < NO_SIGNAL * directions.norms[layer]]
    found = []
    if silent:
        found.append(
            f"layers {_listed(silent)}: the direction is below {NO_SIGNAL:g} of the stream, so it carries no signal"
        )
    best = max(directions.separated.values())
    if best < 0.75:
        found.append(f"no layer tells the held-out long and short examples apart better than {best:.0%}")
    return found


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers[:8])) + (f" and {len(layers) - 8} more" if len(layers) > 8 else "")


def unit(vectors: Mapping[int, np.ndarray], layer: int) -> np.ndarray:
    """Return a layer's direction with length 1, float64 [hidden].

    Raises:
        InputError: E416 it is zero or not finite.
    """
    vector = vectors[layer].astype(np.float64)
    length = float(np.linalg.norm(vector))
    if not np.isfinite(length) or length == 0.0:
        raise InputError("E416", f"the direction of layer {layer} has length {length:g}",
                         help="extract it again, or choose another layer")  # fmt: skip
    return vector / length
