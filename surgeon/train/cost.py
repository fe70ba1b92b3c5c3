"""What a model costs as a function of how many units its layers keep; parameters, FLOPs or seconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.structure.parts import Attention, Ffn, Section, Structure

Key = tuple[int, str]
"""(layer, "attention" or "ffn")."""


@dataclass(frozen=True)
class Cost:
    """Cost = rest + the sum of one curve for every structure.

    Attributes:
        unit: what is counted: "parameters", "FLOPs per token", "seconds".
        rest: everything that no curve covers.
        curves: structure -> float64 [units + 1], its cost with 0 .. all units (KV groups, FFN channels).
            Between whole numbers cost is linear.
    """

    unit: str
    rest: float
    curves: Mapping[Key, np.ndarray]

    @property
    def dense(self) -> float:
        """The cost of the whole model."""
        return self.rest + sum(float(curve[-1]) for curve in self.curves.values())

    def of(self, kept: Mapping[Key, int]) -> float:
        """Return the cost with so many units; structures that are not named keep all."""
        return self.rest + sum(
            float(curve[kept.get(key, len(curve) - 1)]) for key, curve in self.curves.items()
        )

    def expected(self, counts: Mapping[Key, Tensor]) -> Tensor:
        """Return the cost of counts that need not be whole, with its gradient, float64."""
        fixed = self.rest + sum(float(curve[-1]) for key, curve in self.curves.items() if key not in counts)
        total = torch.tensor(fixed, dtype=torch.float64)
        for key, count in counts.items():
            curve = torch.from_numpy(self.curves[key])
            place = count.double().cpu()
            low = int(place.detach().floor().clamp(0, max(0, len(curve) - 2)))
            total = total + curve[low] + (curve[min(low + 1, len(curve) - 1)] - curve[low]) * (place - low)
        return total

    @classmethod
    def timed(
        cls,
        structure: Structure,
        attention: Callable[[int, int], float],
        ffn: Callable[[int], float],
        rest: float,
    ) -> Cost:
        """Return a cost in seconds, such as a latency table's.

        Args:
            structure: of the model.
            attention: (query heads, key/value heads) -> seconds of one layer's attention.
            ffn: width -> seconds of one layer's FFN.
            rest: seconds of everything else.
        """
        curves: dict[Key, np.ndarray] = {}
        known: dict[tuple, np.ndarray] = {}  # layers of equal shape share a curve
        for heads in structure.attention:
            if heads is not None:
                shape = (heads.per_group, heads.groups)
                if shape not in known:
                    known[shape] = np.array(
                        [attention(n * heads.per_group, n) for n in range(heads.groups + 1)]
                    )
                curves[heads.layer, "attention"] = known[shape]
        for channels in structure.ffn:
            if channels is not None:
                shape = (channels.width,)
                if shape not in known:
                    known[shape] = np.array([ffn(n) for n in range(channels.width + 1)])
                curves[channels.layer, "ffn"] = known[shape]
        return cls("seconds", rest, {key: curve.astype(np.float64) for key, curve in curves.items()})

    @classmethod
    def parameters(cls, checkpoint: Checkpoint, structure: Structure) -> Cost:
        """Return the number of stored parameters."""
        curves = _linear(structure, lambda part: _elements(checkpoint, part, False))
        total = sum(info.elements for info in checkpoint.tensors.values())
        return cls("parameters", total - sum(float(curve[-1]) for curve in curves.values()), curves)

    @classmethod
    def flops(cls, checkpoint: Checkpoint, structure: Structure, context: int) -> Cost:
        """Return the FLOPs of one token of a text of ``context``: 2 a weight, scores and values, the head.

        A token sees (context + 1) / 2 tokens on average when it sees earlier ones only.
        """

        def of(part: Attention | Ffn) -> float:
            products = 2.0 * _elements(checkpoint, part, True)
            if isinstance(part, Ffn):
                return products
            return products + 4.0 * part.heads * part.head_dim * (context + 1) / 2

        config = checkpoint.config or {}
        rest = 2.0 * structure.hidden * int(config.get("vocab_size", 0))
        return cls("FLOPs per token", rest, _linear(structure, of))


def _linear(structure: Structure, of: Callable[[Attention | Ffn], float]) -> dict[Key, np.ndarray]:
    curves: dict[Key, np.ndarray] = {}
    for part in (*structure.attention, *structure.ffn):
        if part is not None:
            kind, units = ("attention", part.groups) if isinstance(part, Attention) else ("ffn", part.width)
            curves[part.layer, kind] = of(part) * np.arange(units + 1, dtype=np.float64) / units
    return curves


def _elements(checkpoint: Checkpoint, part: Attention | Ffn, matrices: bool) -> float:
    """Return how many numbers belong to the units of a structure."""
    inputs = (*part.queries, *part.key_values) if isinstance(part, Attention) else part.inputs
    whole = checkpoint.tensors[part.output.weight]
    total = float(whole.elements)
    for section in inputs:
        info = checkpoint.tensors[section.tensor]
        if not matrices or len(info.shape) > 1:
            total += _share(section, info.shape) * info.elements
    return total


def _share(section: Section, shape: tuple[int, ...]) -> float:
    return section.length / shape[section.axis]
