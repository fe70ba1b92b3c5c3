"""Cognitive experts: those that are chosen at the words a model thinks with (RICE, arXiv 2505.14681).

An expert's tie to a marker such as "<think>" is the normalised pointwise mutual information of "this token uses
the expert" and "this token belongs to the marker". Published gains are from problem sets of 30, and other measures
in the same paper fall, so nothing here is ever done unasked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from surgeon.calibrate.routing import Routed
from surgeon.errors import InputError
from surgeon.structure.experts.parts import Experts

BEHIND = frozenset({"<think>"})
"""Markers that announce thinking: the token behind them counts. Of all others it is the token before them."""
DEFAULT_MARKERS = ("<think>", "</think>", "alternatively")
"""Words a reasoning model thinks with."""


@dataclass(frozen=True)
class Marker:
    """A text in the samples.

    Attributes:
        text: as the user wrote it.
        spellings: token ids of each way it may be written.
        step: +1 counts the token behind its last token, -1 the one before its first.
    """

    text: str
    spellings: tuple[tuple[int, ...], ...]
    step: int

    @classmethod
    def of(cls, text: str, encode: Callable[[str], Sequence[int]]) -> Marker:
        """Return a marker as a tokenizer writes it: with and without a blank before it, and at the start of a sentence.

        Args:
            text: as the user wrote it.
            encode: text to token ids, without special tokens around it.
        """
        words = [text, text[:1].upper() + text[1:]]
        spelled = [tuple(map(int, encode(form))) for word in words for form in (word, f" {word}")]
        return cls(text, tuple(dict.fromkeys(ids for ids in spelled if ids)), 1 if text in BEHIND else -1)

    def positions(self, ids: np.ndarray) -> np.ndarray:
        """Return the places, int64 ascending, that belong to the marker in a sample's ids [T].

        A marker of several tokens is found as a whole, once where one spelling contains another; what falls outside
        the sample is left out.
        """
        found: set[tuple[int, int]] = set()
        for spelling in self.spellings:
            width = len(spelling)
            if width > len(ids):
                continue
            windows = np.lib.stride_tricks.sliding_window_view(np.asarray(ids), width)
            begins = np.flatnonzero((windows == np.asarray(spelling)).all(axis=1))
            found.update((int(begin), int(begin) + width) for begin in begins)
        whole = _outermost(found)
        places = {end if self.step > 0 else begin - 1 for begin, end in whole}
        return np.array(sorted(p for p in places if 0 <= p < len(ids)), dtype=np.int64)


def _outermost(spans: set[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the spans that no other one contains."""
    kept: list[tuple[int, int]] = []
    for begin, end in sorted(spans, key=lambda span: (span[0], -span[1])):
        if not kept or end > kept[-1][1]:
            kept.append((begin, end))
    return kept


def npmi(joint: np.ndarray, expert: np.ndarray, marker: int, tokens: int) -> np.ndarray:
    """Return the normalised pointwise mutual information, float64 like ``joint``, in [-1, 1].

    PMI = log2(k T / (K_e M)), nPMI = PMI / log2(T / k). Never together (k = 0) is -1; always (k = T) says nothing: 0.

    Args:
        joint: k, marker positions that use the expert.
        expert: K_e, tokens that use it.
        marker: M, marker positions; more than 0.
        tokens: T.
    """
    joint, expert = np.asarray(joint, np.float64), np.asarray(expert, np.float64)
    some = np.where(joint > 0, joint, 1.0)
    mutual = np.log2(some * tokens / (np.maximum(expert, 1.0) * marker))
    scale = np.log2(tokens / some)
    found = np.divide(mutual, scale, out=np.zeros_like(mutual), where=scale > 0)
    return np.where(joint > 0, np.clip(found, -1.0, 1.0), -1.0)


@dataclass(frozen=True)
class CognitiveExpert:
    """An expert and how strongly it is tied to the markers.

    Attributes:
        layer, expert: which.
        score: nPMI averaged over the markers.
        markers: nPMI of each.
        together: marker -> its positions that use the expert.
        tokens: tokens that use the expert.
    """

    layer: int
    expert: int
    score: float
    markers: dict[str, float]
    together: dict[str, int]
    tokens: int

    def document(self) -> dict[str, Any]:
        """Return the expert as plain data."""
        return {
            "layer": self.layer, "expert": self.expert, "npmi": self.score, "markers": self.markers,
            "together": self.together, "tokens": self.tokens,
        }  # fmt: skip


class CognitiveCounts:
    """Counts experts at marker positions (a `surgeon.calibrate.routing.RoutingObserver`).

    Args:
        places: marker -> sample -> positions, from `marker_places`.
        lengths: tokens of each sample.
        experts: of the model.

    Attributes:
        occurrences: marker -> its positions, M.
        tokens: tokens of all samples, T.
        joint: layer -> int64 [markers, E], k.
        used: layer -> int64 [E], K_e.
    """

    wants_logits = False
    wants_sums = False

    def __init__(
        self, places: Mapping[str, Mapping[int, np.ndarray]], lengths: Sequence[int], experts: Experts
    ) -> None:
        self._offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self._markers = tuple(places)
        self._count = {layer.index: layer.count for layer in experts.running}
        self.tokens = int(self._offsets[-1])
        self._at = np.zeros((len(self._markers), self.tokens), dtype=bool)
        for row, marker in enumerate(self._markers):
            for sample, positions in places[marker].items():
                self._at[row, self._offsets[sample] + positions] = True
        self.occurrences = {marker: int(self._at[row].sum()) for row, marker in enumerate(self._markers)}
        about = repr((self._markers, self._offsets.tolist(), sorted(self._count.items()))).encode()
        self.identity = hashlib.sha256(about + np.packbits(self._at).tobytes()).hexdigest()
        self.joint: dict[int, np.ndarray] = {}
        self.used: dict[int, np.ndarray] = {}

    def routed(self, batch: Routed) -> None:
        count = self._count[batch.layer]
        joint = self.joint.setdefault(batch.layer, np.zeros((len(self._markers), count), dtype=np.int64))
        used = self.used.setdefault(batch.layer, np.zeros(count, dtype=np.int64))
        index = batch.index.cpu().numpy()
        used += np.bincount(index.reshape(-1), minlength=count + 1)[:count]
        places = self._offsets[batch.samples.cpu().numpy()] + batch.positions.cpu().numpy()
        for row in range(len(self._markers)):
            marked = index[self._at[row, places]]
            joint[row] += np.bincount(marked.reshape(-1), minlength=count + 1)[:count]

    def expert_sums(self, layer: int, sums: Any) -> None:
        raise AssertionError("sums of outputs were not asked for")

    def state(self) -> dict[str, np.ndarray]:
        found = {f"joint {layer}": value for layer, value in self.joint.items()}
        return found | {f"used {layer}": value for layer, value in self.used.items()}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        self.joint, self.used = {}, {}
        for name, value in state.items():
            kind, _, layer = name.partition(" ")
            (self.joint if kind == "joint" else self.used)[int(layer)] = np.array(value)

    def ranked(self) -> list[CognitiveExpert]:
        """Return all experts of all layers, the most closely tied first; of equal ones the lower layer and number."""
        found = []
        for layer in sorted(self.joint):
            joint, used = self.joint[layer], self.used[layer]
            each = np.array([npmi(joint[row], used, self.occurrences[m], self.tokens) for row, m in enumerate(self._markers)])  # fmt: skip
            for expert in range(joint.shape[1]):
                found.append(
                    CognitiveExpert(
                        layer, expert, float(each[:, expert].mean()),
                        {m: float(each[row, expert]) for row, m in enumerate(self._markers)},
                        {m: int(joint[row, expert]) for row, m in enumerate(self._markers)}, int(used[expert]),
                    )
                )  # fmt: skip
        return sorted(found, key=lambda e: (-e.score, e.layer, e.expert))


def marker_places(
    markers: Sequence[Marker], samples: Sequence[np.ndarray]
) -> dict[str, dict[int, np.ndarray]]:
    """Return marker -> sample -> positions.

    Raises:
        InputError: E439 a marker is nowhere in the samples.
    """
    found: dict[str, dict[int, np.ndarray]] = {}
    for marker in markers:
        places = {number: marker.positions(ids) for number, ids in enumerate(samples)}
        found[marker.text] = {number: where for number, where in places.items() if len(where)}
        if not found[marker.text]:
            raise InputError("E439", f'the marker "{marker.text}" is nowhere in the data, or only at the edge of samples',
                             help="give responses of the model with their thinking, or other markers (--marker TEXT)")  # fmt: skip
    return found
