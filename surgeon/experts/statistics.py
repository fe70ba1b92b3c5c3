"""Everything that criteria ask of routing, from one pass over calibration text.

    statistics = collect_statistics(checkpoint, samples, settings, experts_of(checkpoint))
    get("reap").score(statistics.total(layer))

Sums are float64 and counts int64, one of each for every expert, layer and domain; nothing is divided. So
any criterion, mix of domains and number of experts can be chosen afterwards, also from a file in another run.
Weights are those the layer multiplied with, norms are float32, padding and slots that were not routed count
nowhere. Domains are those of the samples, "" for samples without one.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surgeon.calibrate.data import Sample
from surgeon.calibrate.routing import Routed, RoutingObserver, Together, route
from surgeon.calibrate.settings import Settings
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.experts import arrays_file
from surgeon.experts.origin import check_origin, origin_of
from surgeon.structure.experts.parts import Experts

COUNTS = ("tokens",)
SUMS = ("gate", "norm", "norm2", "gated", "gated2", "easy", "easy_plain")


@dataclass
class LayerStatistics:
    """What one layer's experts did on the text of one domain, or of all: E experts, S samples, K slots.

    T_i are the tokens routed to expert i, g the weight, f_i the expert's output before it, s the token weight.

    Attributes:
        tokens: int64 [E], n_i = |T_i|.
        gate: float64 [E], sum of g.
        norm, norm2: float64 [E], sum of ||f_i|| and of its square.
        gated, gated2: float64 [E], sum of g ||f_i|| and of g ||f_i||^2.
        easy: float64 [E], sum of g ||f_i|| s_t (EASY-EP, arXiv 2504.06792).
        easy_plain: float64 [E], sum of g s_t.
        peak: float64 [E], largest |f_i(x)_j|.
        seen: tokens that passed the layer.
        easy_by_sample: float32 [S, E], ``easy`` of each sample.
        sample_tokens: int64 [S], tokens of each sample.
        sample_numbers: int64 [S], the samples' numbers in the calibration set.
    """

    tokens: np.ndarray
    gate: np.ndarray
    norm: np.ndarray
    norm2: np.ndarray
    gated: np.ndarray
    gated2: np.ndarray
    easy: np.ndarray
    easy_plain: np.ndarray
    peak: np.ndarray
    seen: int = 0
    easy_by_sample: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    sample_tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    sample_numbers: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def experts(self) -> int:
        return len(self.tokens)

    @property
    def demos(self) -> int:
        """Samples, which EASY-EP calls demonstrations."""
        return len(self.sample_numbers)

    @property
    def unused(self) -> int:
        """Experts that no token was routed to; every criterion gives them 0."""
        return int((self.tokens == 0).sum())

    @classmethod
    def empty(cls, experts: int) -> LayerStatistics:
        """Return the statistics of no text at all."""
        sums: dict[str, Any] = {name: np.zeros(experts) for name in (*SUMS, "peak")}
        by_sample = np.zeros((0, experts), np.float32)
        return cls(tokens=np.zeros(experts, np.int64), easy_by_sample=by_sample, **sums)

    def __add__(self, other: LayerStatistics) -> LayerStatistics:
        """Return the statistics of two texts together."""
        found = {name: getattr(self, name) + getattr(other, name) for name in (*COUNTS, *SUMS)}
        numbers = np.concatenate([self.sample_numbers, other.sample_numbers])
        order = np.argsort(numbers, kind="stable")
        return LayerStatistics(
            **found,
            peak=np.maximum(self.peak, other.peak),
            seen=self.seen + other.seen,
            easy_by_sample=np.concatenate([self.easy_by_sample, other.easy_by_sample])[order],
            sample_tokens=np.concatenate([self.sample_tokens, other.sample_tokens])[order],
            sample_numbers=numbers[order],
        )


ARRAYS = tuple(entry.name for entry in fields(LayerStatistics) if entry.name != "seen")


@dataclass
class RoutingStatistics:
    """Statistics of all layers of experts.

    Attributes:
        domains: domain -> layer -> what its experts did.
        record: what they were measured on: the model, the text, the settings; plain data without paths.
    """

    domains: dict[str, dict[int, LayerStatistics]]
    record: dict[str, Any]

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers of experts, ascending."""
        return tuple(sorted(next(iter(self.domains.values()))))

    @property
    def model_layers(self) -> int:
        """Layers of the model, those without experts included."""
        return int(self.record["model_layers"])

    @property
    def mixed_up(self) -> tuple[int, ...]:
        """Layers in which a norm behind the block hides what the routed experts alone contribute."""
        return tuple(self.record.get("not_separable", ()))

    def total(self, layer: int) -> LayerStatistics:
        """Return the statistics of one layer over all domains."""
        found = LayerStatistics.empty(next(iter(self.domains.values()))[layer].experts)
        for table in self.domains.values():
            found += table[layer]
        return found

    def save(self, path: Path) -> None:
        """Write everything as one safetensors file; equal statistics give equal bytes."""
        names = list(self.domains)
        arrays = {
            f"{number}.{layer}.{name}": np.asarray(getattr(found, name))
            for number, domain in enumerate(names)
            for layer, found in self.domains[domain].items()
            for name in ARRAYS
        }
        about = {
            "domains": names,
            "layers": list(self.layers),
            "seen": [[table[layer].seen for layer in self.layers] for table in self.domains.values()],
            "record": self.record,
        }
        arrays_file.write(path, "routing", arrays, about)

    @classmethod
    def load(
        cls, path: Path, checkpoint: Checkpoint | None = None, *, force: bool = False
    ) -> RoutingStatistics:
        """Read what `save` wrote.

        Args:
            path: the file.
            checkpoint: the model the statistics must be of; None takes those of any.
            force: take those of another model too.

        Raises:
            InputError: E431 the file is no such file, or damaged; E432 it is another model's.
        """
        arrays, about = arrays_file.read(path, "routing")
        try:
            names, layers, seen, record = (about[key] for key in ("domains", "layers", "seen", "record"))
            domains = {
                str(domain): {
                    int(layer): LayerStatistics(
                        seen=int(seen[number][place]),
                        **{name: arrays[f"{number}.{layer}.{name}"] for name in ARRAYS},
                    )
                    for place, layer in enumerate(layers)
                }
                for number, domain in enumerate(names)
            }
            found = cls(domains, dict(record))
            _check(path, found)
        except (KeyError, TypeError, ValueError, IndexError):
            raise arrays_file.damaged(path) from None
        if checkpoint is not None and not force:
            check_origin(path, record, checkpoint)
        return found


def _check(path: Path, found: RoutingStatistics) -> None:
    for table in found.domains.values():
        for one in table.values():
            shapes = {getattr(one, name).shape for name in (*COUNTS, *SUMS, "peak")}
            rows = {len(one.easy_by_sample), len(one.sample_tokens), len(one.sample_numbers)}
            sums = [getattr(one, name) for name in (*SUMS, "peak", "easy_by_sample")]
            if len(shapes) != 1 or len(rows) != 1 or not all(np.isfinite(value).all() for value in sums):
                raise arrays_file.damaged(path)
    if not found.layers or found.model_layers <= found.layers[-1]:
        raise arrays_file.damaged(path)


def token_weight(residual: Tensor, update: Tensor) -> Tensor:
    """Return how much a sublayer turns the stream: s = 1 - cos(h, h + u), float32 [T].

    Computed as half the squared distance of the two directions, which is never negative and keeps its digits
    where the cosine is next to 1 (EASY-EP, arXiv 2504.06792, section 3.2, computes 1 - cos and clamps).

    Args:
        residual: h, the stream that enters [T, d]; where it is 0, so is s.
        update: u, what is added [T, d]; where h + u is 0 and h is not, s is 1.
    """
    before = residual.float()
    after = before + update.float()
    old = torch.linalg.vector_norm(before, dim=-1, keepdim=True)
    new = torch.linalg.vector_norm(after, dim=-1, keepdim=True)
    turned = before / old.masked_fill(old == 0, 1) - after / new.masked_fill(new == 0, 1)
    weight = 0.5 * turned.square().sum(-1)
    weight = weight.masked_fill(new[:, 0] == 0, 1.0)
    return weight.masked_fill(old[:, 0] == 0, 0.0)


class RoutingSums:
    """Adds up routing by layer, domain and sample (a `surgeon.calibrate.routing.RoutingObserver`).

    Args:
        domains: the domain of each sample, in order.
        experts: layer -> its number of experts.
    """

    wants_logits = False
    wants_sums = False

    def __init__(self, domains: Sequence[str], experts: Mapping[int, int]) -> None:
        self.names = list(dict.fromkeys(domains))
        self._domain = np.array([self.names.index(domain) for domain in domains], dtype=np.int64)
        self._experts = dict(experts)
        self.identity = hashlib.sha256(repr((list(domains), sorted(experts.items()))).encode()).hexdigest()
        self._sums: dict[int, dict[str, np.ndarray]] = {}
        self.separable: dict[int, bool] = {}

    def routed(self, batch: Routed) -> None:
        count = self._experts[batch.layer]
        held = self._sums.setdefault(batch.layer, self._fresh(count))
        samples, place = np.unique(batch.samples.cpu().numpy(), return_inverse=True)
        own = _by_sample(batch, place, len(samples), count)
        domains = self._domain[samples]
        for name in (*COUNTS, *SUMS):
            np.add.at(held[name], domains, own[name])
        np.maximum.at(held["peak"], domains, own["peak"])
        np.add.at(held["seen"], domains, np.bincount(place, minlength=len(samples)))
        held["easy_by_sample"][samples] = own["easy"]
        held["sample_tokens"][samples] = np.bincount(place, minlength=len(samples))
        self.separable[batch.layer] = batch.separable

    def expert_sums(self, layer: int, sums: Tensor) -> None:
        raise AssertionError("sums of outputs were not asked for")

    def _fresh(self, count: int) -> dict[str, np.ndarray]:
        table = {name: np.zeros((len(self.names), count)) for name in (*SUMS, "peak")}
        return table | {
            "tokens": np.zeros((len(self.names), count), np.int64),
            "seen": np.zeros(len(self.names), np.int64),
            "easy_by_sample": np.zeros((len(self._domain), count), np.float32),
            "sample_tokens": np.zeros(len(self._domain), np.int64),
        }

    def state(self) -> dict[str, np.ndarray]:
        found = {
            f"{layer}:{name}": value for layer, table in self._sums.items() for name, value in table.items()
        }
        return found | {f"{layer}:separable": np.array(flag) for layer, flag in self.separable.items()}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        self._sums, self.separable = {}, {}
        for key, value in state.items():
            layer, _, name = key.partition(":")
            if name == "separable":
                self.separable[int(layer)] = bool(value)
            else:
                self._sums.setdefault(int(layer), {})[name] = np.array(value)

    def finish(self) -> dict[str, dict[int, LayerStatistics]]:
        """Return the statistics by domain and layer."""
        return {
            name: {layer: self._layer(layer, number) for layer in sorted(self._sums)}
            for number, name in enumerate(self.names)
        }

    def _layer(self, layer: int, number: int) -> LayerStatistics:
        held = self._sums[layer]
        samples = np.flatnonzero(self._domain == number)
        return LayerStatistics(
            **{name: held[name][number] for name in (*COUNTS, *SUMS, "peak")},
            seen=int(held["seen"][number]),
            easy_by_sample=held["easy_by_sample"][samples],
            sample_tokens=held["sample_tokens"][samples],
            sample_numbers=samples,
        )


def _by_sample(batch: Routed, place: np.ndarray, samples: int, count: int) -> dict[str, np.ndarray]:
    """Return every sum of one batch, float64 [samples, experts]; ``place`` [T] is each token's row of them."""
    index = batch.index.cpu().numpy()
    rows, slots = np.nonzero(index < count)
    keys = place[rows] * count + index[rows, slots]
    values = {
        name: value.cpu().numpy().astype(np.float64)[rows, slots]
        for name, value in (("g", batch.weights), ("f", batch.norms), ("c", batch.contributions), ("p", batch.peaks))
    }  # fmt: skip
    g, f, c = values["g"], values["f"], values["c"]
    turn = token_weight(batch.residual, batch.update).cpu().numpy().astype(np.float64)[rows]

    def added(each: np.ndarray) -> np.ndarray:
        return np.bincount(keys, each, minlength=samples * count).reshape(samples, count)

    peak = np.zeros(samples * count)
    np.maximum.at(peak, keys, values["p"])
    return {
        "tokens": np.bincount(keys, minlength=samples * count).reshape(samples, count),
        "gate": added(g),
        "norm": added(f),
        "norm2": added(f * f),
        "gated": added(c),
        "gated2": added(c * f),
        "easy": added(c * turn),
        "easy_plain": added(g * turn),
        "peak": peak.reshape(samples, count),
    }


def collect_statistics(
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    settings: Settings,
    experts: Experts,
    *,
    about: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
    stop: threading.Event | None = None,
    resume: bool = False,
    also: Sequence[RoutingObserver] = (),
) -> RoutingStatistics:
    """Run a model over samples once and return what every criterion needs.

    Args:
        checkpoint: the model.
        samples: token ids with their domains.
        settings: where and how the model runs.
        experts: where its experts are.
        about: plain data on the samples (`surgeon.calibrate.data.CalibrationSet.record`), kept with the result.
        progress, stop, resume: as `surgeon.calibrate.walk.Walk.run`.
        also: further observers of the same pass, such as a `surgeon.experts.trace.TraceWriter`.

    Raises:
        InputError: E430 and E406 of `surgeon.calibrate.routing.route`; whatever a walk raises.
    """
    ids = [np.asarray(sample.ids, np.int64) for sample in samples]
    sums = RoutingSums(
        [sample.domain for sample in samples], {one.index: one.count for one in experts.running}
    )
    observer: RoutingObserver = Together(sums, *also) if also else sums
    layers = route(
        checkpoint, ids, settings, observer, experts=experts, progress=progress, stop=stop, resume=resume
    )
    record = origin_of(checkpoint, ids, settings, about)
    record["model_layers"] = layers
    record["not_separable"] = sorted(layer for layer, flag in sums.separable.items() if not flag)
    return RoutingStatistics(sums.finish(), record)
