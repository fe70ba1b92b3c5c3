"""Criteria: which channels and heads go first. One file per criterion; the file name is its name.

A file holds one ``CRITERION`` (see `Criterion`). It is asked for one module of one layer at a time,
with everything it may look at in a `Context`; what takes a pass over calibration text to know is
only there when the criterion says that it needs it.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from surgeon.calibrate.pieces import read_tensor
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.errors import UsageError, close_matches
from surgeon.prune.ranking import Ranking
from surgeon.structure.cut import Kept
from surgeon.structure.parts import Attention, Ffn, Output, Section

NEEDS = frozenset({"moments", "samples", "hessian"})
"""What a criterion may need of a pass: statistics by channel, the same by sample, second moments."""


@dataclass(frozen=True)
class Moments:
    """What calibration text says about each input channel of an output matrix; padding left out.

    Attributes:
        tokens: rows seen.
        mean: float64 [in], mean of x.
        variance: float64 [in], mean of (x - mean)^2 over all tokens (divided by tokens, not tokens - 1).
        norm: float64 [in], sqrt of the sum of x^2 (Wanda).
        absolute: float64 [in], mean of |x|.
        sample_absolute: float64 [in], sqrt over samples of the sum of (mean of |x| over a sample's tokens)^2
            (Minitron, arXiv 2407.14679, section 2.2); None unless "samples" was needed.
        active: int64 [in], tokens for which x was not zero.
    """

    tokens: int
    mean: np.ndarray
    variance: np.ndarray
    norm: np.ndarray
    absolute: np.ndarray
    active: np.ndarray
    sample_absolute: np.ndarray | None = None


@dataclass(frozen=True)
class Context:
    """One module that a criterion ranks.

    Attributes:
        checkpoint: the model.
        part: where the module lies.
        mode: what a unit is, see `surgeon.prune.ranking.Ranking`.
        damp: damping of the Hessian, relative to its mean diagonal.
        seed: of criteria that draw.
        moments: None unless the criterion needs them.
        hessian: float32 [in, in], mean over tokens of x x'; None unless needed.
        device: where tensors should be computed on.
    """

    checkpoint: Checkpoint
    part: Attention | Ffn
    mode: str
    damp: float = 1e-2
    seed: int = 0
    moments: Moments | None = None
    hessian: Tensor | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def layer(self) -> int:
        return self.part.layer

    @property
    def kind(self) -> str:
        return "attention" if isinstance(self.part, Attention) else "ffn"

    @property
    def module(self) -> str:
        """The output matrix, as messages name it."""
        return self.part.output.module

    @property
    def units(self) -> int:
        """Things to be scored: channels, key/value groups, or (in mode "heads") all query heads."""
        if isinstance(self.part, Ffn):
            return self.part.width
        return self.part.groups if self.mode == "groups" else self.part.heads

    @property
    def columns(self) -> int:
        """Consecutive input columns of the output matrix that belong to one of `units`."""
        if isinstance(self.part, Ffn):
            return 1
        return self.part.head_dim * (self.part.per_group if self.mode == "groups" else 1)

    @cached_property
    def weight(self) -> Tensor:
        """The output matrix, float32 [out, in]; a Conv1D is transposed to this."""
        return read_output(self.checkpoint, self.part.output).to(self.device)

    def producers(self) -> Iterator[tuple[Section, Tensor]]:
        """Yield what makes the units, one section at a time, as float32 [units of the section, elements].

        Queries, keys and values with their biases, or gate and up. A section of queries has one row a
        query head, one of keys or values one row a key/value head.
        """
        sections = (
            self.part.inputs if isinstance(self.part, Ffn) else (*self.part.queries, *self.part.key_values)
        )
        for section in sections:
            yield section, read_section(self.checkpoint, section).to(self.device)

    def by_unit(self, columns: np.ndarray | Tensor) -> np.ndarray:
        """Add up one value a column [in] to one a unit, float64 [units]."""
        values = columns.detach().cpu().numpy() if isinstance(columns, Tensor) else np.asarray(columns)
        return values.astype(np.float64).reshape(self.units, self.columns).sum(1)

    def ranking(self, scores: np.ndarray) -> Ranking:
        """Return the ranking that removes the smallest score first; equal ones by number.

        Args:
            scores: float64 [units], not negative; their running sum over the total is the error. With
                nothing but zeros every removal counts the same.
        """
        scores = np.asarray(scores, dtype=np.float64)
        if scores.shape != (self.units,) or not np.isfinite(scores).all() or (scores < 0).any():
            raise ValueError(f"scores of {self.module} must be {self.units} finite numbers from 0 up")
        order = np.argsort(scores, kind="stable")
        if self.mode == "heads":
            assert isinstance(self.part, Attention)
            own = scores.reshape(self.part.groups, self.part.per_group)
            inside = np.argsort(own, axis=1, kind="stable")
            order = (inside + np.arange(self.part.groups)[:, None] * self.part.per_group).T
        steps = scores[order].reshape(len(order), -1).sum(1)
        if not steps.any():
            steps = np.ones_like(steps)
        errors = np.concatenate([[0.0], np.cumsum(steps)])
        return self.ranked(order, errors / errors[-1])

    def ranked(
        self, order: np.ndarray, errors: np.ndarray, about: Mapping[str, Any] | None = None
    ) -> Ranking:
        """Return the ranking with this order and these errors (see `surgeon.prune.ranking.Ranking`)."""
        size = self.part.per_group if isinstance(self.part, Attention) and self.mode == "groups" else 1
        return Ranking(self.layer, self.kind, self.mode, order.astype(np.int32), errors, size, about or {})


@runtime_checkable
class Criterion(Protocol):
    """A way to rank units.

    Attributes:
        name: as users type it.
        version: changes when results change; part of what results are kept under.
        needs: subset of `NEEDS`; empty means that no calibration text is read.
        solves: remaining weights are solved for with second moments once the cut is known.
    """

    name: str
    version: int
    needs: frozenset[str]
    solves: bool

    def rank(self, context: Context) -> Ranking:
        """Rank the units of one module."""
        ...

    def bias(self, context: Context, kept: Kept) -> Tensor | None:
        """Return what is added to the output bias, float32 [out], when these units stay; None for nothing.

        ``kept`` counts what `Ranking.kept` does: channels, or query heads. The context has no Hessian here.
        """
        ...


def read_output(checkpoint: Checkpoint, output: Output) -> Tensor:
    """Return an output matrix, float32 [out, in] on the CPU, contiguous."""
    info = checkpoint.tensors[output.weight]
    weight = read_tensor(checkpoint, output.weight, 0, info.elements, torch.float32).reshape(info.shape)
    return weight if output.input_axis == 1 else weight.T.contiguous()


def read_section(checkpoint: Checkpoint, section: Section) -> Tensor:
    """Return a section, float32 [units, elements of a unit] on the CPU."""
    info = checkpoint.tensors[section.tensor]
    if section.axis == 0:
        row = info.elements // info.shape[0]
        first, last = section.start * row, (section.start + section.length) * row
        return read_tensor(checkpoint, section.tensor, first, last, torch.float32).reshape(section.units, -1)
    whole = read_tensor(checkpoint, section.tensor, 0, info.elements, torch.float32).reshape(info.shape)
    part = whole.narrow(section.axis, section.start, section.length)
    return part.movedim(section.axis, 0).reshape(section.units, -1)


@cache
def known() -> tuple[str, ...]:
    """Return the names of all criteria without importing them."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")))


def get(name: str) -> Criterion:
    """Return a criterion by name.

    Raises:
        UsageError: E264 there is none of this name.
    """
    wanted = name.replace("-", "_").lower()
    if not re.fullmatch(r"[a-z0-9_]{1,40}", wanted) or wanted not in known():
        near = close_matches(wanted, known())
        shown = "".join(c if c.isprintable() else "?" for c in name)[:60]
        raise UsageError("E264", f'unknown pruning criterion "{shown}"',
                         help=(near + " " if near else "") + "one of: " + ", ".join(known()))  # fmt: skip
    return importlib.import_module(f"{__name__}.{wanted}").CRITERION
