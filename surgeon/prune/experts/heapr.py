"""Scores of expert channels: what deleting one does to the loss, to second order (HEAPr, arXiv 2509.22299).

Channel k of an expert adds w_k a_k(x) to the expert's output, with a_k its gated activation and w_k its column
of the down projection ("atomic expert", section 3). With g = dL/d(output), which contains the routing weight,
and means over the tokens routed to the expert, the paper's score is

    s_k = 1/2 mean_x[ e_k(x)' G e_k(x) ],   G = mean_x[ g g' ],   e_k = w_k a_k
        = 1/2 mean(a_k^2) mean((w_k . g)^2) = 1/2 mean(a_k^2) mean((dL/da_k)^2)

so that one pass forward and back and two numbers a channel suffice, where the paper keeps G, hidden^2 numbers
an expert. L is summed over tokens. Criteria, all from the same pass (K = tokens routed to the expert, N = all):

    heapr      1/2 mean(a^2) mean(da^2)                  the paper
    heapr-all  the same times K/N                        the loss change over all tokens: how often counts
    joint      1/2 mean((a da)^2)                        without taking a and da as independent
    joint-all  1/2 sum((a da)^2) / N
    magnitude  1/2 mean(a^2) |w|^2                       heapr where G is the identity; a baseline
    random     uniform, seeded                           a baseline

Scores compare within one model, one text and one criterion only.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from surgeon.calibrate.activation_gradients import Gated, Progress, activation_gradients
from surgeon.calibrate.answers import TokenSample
from surgeon.calibrate.settings import Settings
from surgeon.checkpoint import tensor_file
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.header import printable, read_header
from surgeon.errors import InputError, UsageError, Where, close_matches
from surgeon.seeds import stream_key, uniform
from surgeon.structure.experts.cut import Place
from surgeon.structure.experts.parts import Experts
from surgeon.structure.experts.weights import each_expert

VARIANTS = ("heapr", "heapr-all", "joint", "joint-all", "magnitude", "random")

FEW_TOKENS = 32
"""An expert with fewer routed tokens has poorly estimated scores."""

VERSION = 1
FIELDS = ("a2", "g2", "joint", "norm2")


@dataclass
class ChannelScores:
    """Sums over routed tokens from which every criterion follows.

    Attributes:
        variant: the criterion of `scores`.
        about: what was measured on what: plain data without paths.
        seen: tokens in all samples, N.
        loss: nats, summed over the answers' tokens; counted: those tokens.
        tokens: (layer, expert) -> routed tokens, 0 included.
        a2, g2, joint: (layer, expert) -> sum of a^2, of (dL/da)^2, of (a dL/da)^2 [I], float64. Experts without
            tokens are missing.
        norm2: (layer, expert) -> squared norms of the columns of the down projection [I].
        unmeasured: (layer, expert) -> |up|^2 |down|^2 [I] of layers that a forward pass does not run.
        width: channels of an expert.
        seed: of ``random``.
    """

    variant: str
    about: dict[str, Any]
    width: int
    seen: int = 0
    loss: float = 0.0
    counted: int = 0
    tokens: dict[Place, int] = field(default_factory=dict)
    a2: dict[Place, np.ndarray] = field(default_factory=dict)
    g2: dict[Place, np.ndarray] = field(default_factory=dict)
    joint: dict[Place, np.ndarray] = field(default_factory=dict)
    norm2: dict[Place, np.ndarray] = field(default_factory=dict)
    unmeasured: dict[Place, np.ndarray] = field(default_factory=dict)
    seed: int = 0

    @property
    def scores(self) -> dict[Place, np.ndarray]:
        """(layer, expert) -> scores [I], float64, by ``variant``; the lowest go first. 0 for experts without tokens."""
        return {place: self._of(place) for place in sorted(self.tokens)}

    def _of(self, place: Place) -> np.ndarray:
        if self.variant == "random":
            return uniform(stream_key(self.seed, 0, f"channels {place[0]}:{place[1]}"), 0, self.width)
        count = self.tokens[place]
        if not count:
            return np.zeros(self.width)
        if self.variant.startswith("joint"):
            found = self.joint[place] / count
        elif self.variant == "magnitude":
            found = self.a2[place] / count * self.norm2[place]
        else:
            found = (self.a2[place] / count) * (self.g2[place] / count)
        return 0.5 * found * (count / self.seen if self.variant.endswith("-all") else 1.0)

    def by(self, variant: str, seed: int = 0) -> ChannelScores:
        """Return the same measurement under another criterion.

        Raises:
            UsageError: E245.
        """
        check_variant(variant)
        return ChannelScores(**{**vars(self), "variant": variant, "seed": seed})

    @property
    def unrouted(self) -> list[Place]:
        """Experts that no token was routed to."""
        return sorted(place for place, count in self.tokens.items() if not count)

    @property
    def poor(self) -> list[Place]:
        """Experts with some tokens, but fewer than `FEW_TOKENS`."""
        return sorted(place for place, count in self.tokens.items() if 0 < count < FEW_TOKENS)

    def notes(self) -> list[str]:
        """Return sentences about what the scores do not know."""
        found = []
        if self.variant == "random":
            return found
        if self.unrouted:
            found.append(
                f"{_listed(self.unrouted)} of {len(self.tokens)} experts were given no token: their channels score 0"
            )
        if self.poor:
            found.append(f"{_listed(self.poor)} of {len(self.tokens)} experts were given fewer than {FEW_TOKENS} tokens: "
                         "their scores are poor estimates, more text makes them better")  # fmt: skip
        return found

    # ---- file --------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write all sums as one safetensors file, replacing ``path`` only when it is complete.

        Raises:
            EnvironmentFault: E501.
        """
        arrays: dict[str, tuple[str, np.ndarray]] = {}
        for name in (*FIELDS, "unmeasured"):
            for (layer, expert), values in sorted(getattr(self, name).items()):
                arrays[f"{name} {layer}:{expert}"] = ("F64", np.ascontiguousarray(values, dtype=np.float64))
        about = {
            "kind": "channel scores", "version": VERSION, "about": self.about, "width": self.width, "seen": self.seen,
            "loss": self.loss, "counted": self.counted,
            "tokens": {f"{layer}:{expert}": count for (layer, expert), count in sorted(self.tokens.items())},
        }  # fmt: skip
        tensor_file.write(path, arrays, about)

    @classmethod
    def load(
        cls, path: Path, about: Mapping[str, Any] | None = None, variant: str = "heapr", seed: int = 0
    ) -> ChannelScores:
        """Read what `save` wrote.

        Args:
            path: the file.
            about: what it must have been measured on (`about_of`); None takes any.
            variant, seed: the criterion.

        Raises:
            InputError: E436 it holds no channel scores, or those of something else; the difference is named.
            UsageError: E245 no such criterion.
        """
        check_variant(variant)
        header = read_header(path)
        try:
            found = json.loads(header.metadata[tensor_file.ABOUT])
            if found["kind"] != "channel scores" or found["version"] != VERSION:
                raise ValueError
            tokens = {_place(name): int(count) for name, count in found["tokens"].items()}
            result = cls(
                variant, dict(found["about"]), int(found["width"]), int(found["seen"]), float(found["loss"]),
                int(found["counted"]), tokens, seed=seed,
            )  # fmt: skip
            for name, info in header.tensors.items():
                kind, _, where = name.partition(" ")
                values = tensor_file.read(header, name)
                if (
                    kind not in (*FIELDS, "unmeasured")
                    or info.shape != (result.width,)
                    or not np.isfinite(values).all()
                ):
                    raise ValueError
                getattr(result, kind)[_place(where)] = values
            if any(getattr(result, name).keys() != {p for p, n in tokens.items() if n} for name in FIELDS):
                raise ValueError
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
            raise InputError("E436", f"{printable(path.name)} holds no channel scores, or damaged ones", where=Where(str(path)),
                             help="measure them again") from None  # fmt: skip
        if about is not None and result.about != dict(about):
            other = [key for key in about if result.about.get(key) != about[key]]
            raise InputError("E436", f"{printable(path.name)} was measured on something else: {', '.join(other) or 'more than is known here'} differ",
                             where=Where(str(path)), help="measure them again, or give the same model, text and settings")  # fmt: skip
        return result


class ChannelSums:
    """Takes activations and gradients and keeps their sums over tokens; its state survives an interruption.

    Args:
        places: (layer, expert) of every expert that may come.
        width: channels of an expert.

    Attributes:
        tokens: routed tokens of the experts that came.
        sums: "a2", "g2", "joint" and "norm2" as in `ChannelScores`.
    """

    def __init__(self, places: Iterable[Place], width: int) -> None:
        self.identity = f"channel sums {VERSION}"
        self._places = frozenset(places)
        self._width = width
        self.tokens: dict[Place, int] = {}
        self.sums: dict[str, dict[Place, np.ndarray]] = {name: {} for name in FIELDS}

    def gated(self, found: Gated) -> None:
        place = (found.layer, found.expert)
        assert place in self._places and found.activations.shape[1] == self._width, (
            place,
            found.activations.shape,
        )
        a2, g2 = found.activations.double().square(), found.gradients.double().square()
        parts = {"a2": a2.sum(0), "g2": g2.sum(0), "joint": (a2 * g2).sum(0)}
        for name, value in parts.items():
            held = self.sums[name]
            held[place] = value.cpu().numpy() + held.get(place, 0.0)
        if place not in self.tokens:
            self.sums["norm2"][place] = found.down.double().square().sum(0).cpu().numpy()
        self.tokens[place] = self.tokens.get(place, 0) + len(found.activations)

    def state(self) -> dict[str, np.ndarray]:
        places = sorted(self.tokens)
        found = {
            "places": np.array(places, dtype=np.int64).reshape(-1, 2),
            "tokens": np.array([self.tokens[p] for p in places], dtype=np.int64),
        }
        for name, held in self.sums.items():
            found[name] = np.array([held[p] for p in places]).reshape(len(places), self._width)
        return found

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        places = [(int(layer), int(expert)) for layer, expert in state["places"]]
        self.tokens = dict(zip(places, map(int, state["tokens"]), strict=True))
        self.sums = {name: {p: state[name][n].copy() for n, p in enumerate(places)} for name in FIELDS}


def channel_scores(
    checkpoint: Checkpoint,
    samples: Sequence[TokenSample],
    settings: Settings,
    experts: Experts,
    *,
    variant: str = "heapr",
    about: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
    resume: bool = False,
) -> ChannelScores:
    """Measure the channels of all routed experts in one pass forward and back.

    Args:
        checkpoint: the model.
        samples: tokens, and where the answer starts that the loss counts.
        settings: device, precision, memory; with ``spill`` an interrupted pass continues.
        experts: of the model.
        variant: the criterion, one of `VARIANTS`; ``random`` needs no pass.
        about: the result of `about_of`, where it is known already.
        seed: of ``random``.
        progress: called with (steps done, steps).
        stop: ends the pass early with `Interrupted`.
        resume: continue an interrupted pass.

    Raises:
        UsageError: E245 no such criterion.
        InputError: E435 the experts are quantized, or do not run one by one; what `activation_gradients` raises.
    """
    check_variant(variant)
    places = [(layer.index, expert) for layer in experts.running for expert in range(layer.count)]
    unmeasured = _unmeasured(checkpoint, experts)
    if variant == "random":
        return ChannelScores(
            variant, {}, experts.width, tokens=dict.fromkeys(places, 0), unmeasured=unmeasured, seed=seed
        )
    check_measurable(checkpoint, experts)
    known = dict(about) if about is not None else about_of(checkpoint, samples, settings)
    sums = ChannelSums(places, experts.width)
    loss = activation_gradients(
        checkpoint, samples, sums, settings, progress=progress, stop=stop, resume=resume
    )
    reached = {layer for layer, _ in sums.tokens}
    for layer in experts.running:
        if layer.index not in reached:
            raise InputError("E435", f"the experts of layer {layer.index} were not seen at work: they do not run one by one here",
                             where=Where(checkpoint.label), help="drop whole experts by a method that needs no text: --method router-norm")  # fmt: skip
    return ChannelScores(
        variant, known, experts.width, sum(len(sample.ids) for sample in samples), loss.total, loss.tokens,
        {place: sums.tokens.get(place, 0) for place in places}, **sums.sums, unmeasured=unmeasured, seed=seed,
    )  # fmt: skip


def without_measuring(experts: Experts) -> ChannelScores:
    """Return scores that say nothing, for what can be told of a cut without them; no weights are read."""
    places = [(layer.index, expert) for layer in experts.layers for expert in range(layer.count)]
    running = {layer.index for layer in experts.running}
    quantized = {layer.index for layer in experts.layers if layer.quantized is not None}
    return ChannelScores(
        "random", {}, experts.width, tokens={place: 0 for place in places if place[0] in running},
        unmeasured={place: np.zeros(experts.width) for place in places if place[0] not in running | quantized},
    )  # fmt: skip


def about_of(checkpoint: Checkpoint, samples: Sequence[TokenSample], settings: Settings) -> dict[str, Any]:
    """Return what channel scores depend on: the model's files, the tokens, the precision, the batches.

    Header digests name shapes and places, so sizes and times of change stand in for the content of files, as
    for interrupted passes.
    """
    digest = hashlib.sha256()
    for sample in samples:
        ids = np.asarray(sample.ids, dtype="<i8").reshape(-1)
        digest.update(
            len(ids).to_bytes(8, "little") + int(sample.answer_start).to_bytes(8, "little") + ids.tobytes()
        )
    return {
        "model": [[h.sha256, h.stamp.size, h.stamp.mtime_ns] for h in checkpoint.headers],
        "view": str(getattr(checkpoint, "identity", "")),
        "config": hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode()).hexdigest(),
        "samples": digest.hexdigest(),
        "dtype": settings.dtype,
        "batch_tokens": settings.batch_tokens,
        "version": VERSION,
    }


def check_variant(variant: str) -> None:
    """Raise E245 for a criterion that does not exist."""
    if variant not in VARIANTS:
        raise UsageError("E245", f'unknown criterion "{str(variant)[:60]}" for channels of experts',
                         help=((close_matches(str(variant), VARIANTS) or "") + " one of: " + ", ".join(VARIANTS)).strip())  # fmt: skip


def check_measurable(checkpoint: Checkpoint, experts: Experts) -> None:
    """Raise E435 for experts whose channels cannot be measured or cut because they are quantized."""
    for layer in experts.layers:
        if layer.quantized is not None:
            raise InputError(
                "E435", f"the experts of layer {layer.index} are quantized ({layer.quantized}): their channels have no gradients",
                where=Where(checkpoint.label), help="--dequantize reads it as plain numbers; or drop whole experts: --method reap",
            )  # fmt: skip


def _unmeasured(checkpoint: Checkpoint, experts: Experts) -> dict[Place, np.ndarray]:
    """Return |up|^2 |down|^2 [I] for the experts of layers that no forward pass runs.

    Multi-token-prediction layers have no part in the loss. The product does not change when a channel's up row
    is scaled by c and its down column by 1/c, as HEAPr's score does not.
    """
    found: dict[Place, np.ndarray] = {}
    for layer in experts.layers:
        if layer.runs or layer.quantized is not None:
            continue
        for expert, weights in enumerate(each_expert(checkpoint, layer)):
            up, down = weights.up.astype(np.float64), weights.down.astype(np.float64)
            found[layer.index, expert] = np.square(up).sum(1) * np.square(down).sum(0)
    return found


def _place(name: str) -> Place:
    layer, _, expert = name.partition(":")
    return int(layer), int(expert)


def _listed(places: Sequence[Place]) -> str:
    shown = ", ".join(f"{layer}:{expert}" for layer, expert in places[:4])
    return f"{len(places)} ({shown}{', ...' if len(places) > 4 else ''})"
