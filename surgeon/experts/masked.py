"""Is a model with fewer experts the source with those experts switched off? Both are run, layer by layer, and compared.

Switched off means: their score in the router is minus infinity, so every token goes to the best of the others. That
needs no knowledge of the family: whatever a router computes, it starts with one matrix product, whose results for
dropped experts are replaced, and where a bias is added to the scores for the choice, theirs is far below all others.
Removed channels are zero columns of the down projections. Nothing here shares code with the view that slices, so a
wrong index in either shows.

Whole-expert cuts give the same numbers to the last bit, up to the order in which a softmax over fewer experts is
summed; channel cuts change the shapes of matrix products, hence their roundings.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from surgeon.calibrate.head import Head
from surgeon.calibrate.settings import Settings
from surgeon.calibrate.skeleton import Skeleton
from surgeon.calibrate.walk import Walk
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.header import TensorInfo
from surgeon.errors import InputError, Where
from surgeon.kernels.cast import round_to, widen
from surgeon.structure.experts.check import check
from surgeon.structure.experts.cut import ExpertCut
from surgeon.structure.experts.parts import ExpertLayer, Experts, ExpertTensor

SWITCHED_OFF = -1e30
"""Router result of a dropped expert; small enough that a softmax gives it exactly nothing, and still finite."""
NEVER_CHOSEN = -1e9
"""Bias for the choice of a dropped expert: below every score, above the minus infinity of a closed routing group."""

NOISE = {"float64": 1e-11, "float32": 1e-5, "bfloat16": 0.05, "float16": 0.02}
"""Precision -> share of the largest logit by which roundings may move one."""

ELEMENTS = 1 << 20
"""Weights masked at once."""

Progress = Callable[[str, int, int], None]
"""Called with ("masked", "pruned" or "whole", stages done, stages)."""


@dataclass(frozen=True)
class Comparison:
    """A pruned model beside the source with the same experts switched off.

    Attributes:
        max_difference: largest difference of two logits (of last hidden states in models without a head).
        differs_from_unmasked: the same between the masked and the whole source; near 0 says that the texts never
            needed what was removed, so that the comparison says little. NaN when it was not asked for.
        peak: largest absolute value compared.
        tolerance: difference that roundings explain. A token whose choice of experts was a tie to the last bit may
            exceed it, and those behind it.
        tokens: tokens compared.
        tokens_apart: those that differ by more than the tolerance.
    """

    max_difference: float
    differs_from_unmasked: float
    peak: float
    tolerance: float
    tokens: int
    tokens_apart: int

    @property
    def equal(self) -> bool:
        """Whether the two compute the same, roundings aside."""
        return self.max_difference <= self.tolerance

    @property
    def exact(self) -> bool:
        """Whether they agree to the last bit."""
        return self.max_difference == 0.0


def compare(
    source: Checkpoint,
    experts: Experts,
    cut: ExpertCut,
    pruned: Checkpoint,
    samples: Sequence[np.ndarray],
    settings: Settings,
    *,
    replaced: Checkpoint | None = None,
    unmasked: bool = True,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> Comparison:
    """Compare a pruned model with its source in which what the cut removes is switched off.

    Args:
        source, experts, cut, replaced: what the pruned model was made from, as in
            `surgeon.structure.experts.view.ExpertView`.
        pruned: the model that was made, written or not.
        samples: token ids, one array per sample.
        settings: device, precision (float32 for an exact comparison), memory.
        unmasked: also run the whole source, for `Comparison.differs_from_unmasked`.
        stop: set it to stop after the batch in progress.

    Raises:
        InputError: E428 the source's routers cannot be masked; E380-E385 as `surgeon.calibrate.walk.Walk`.
        UsageError: E243 an illegal cut.
    """
    check(experts, cut)
    masked = MaskedSource(source, experts, cut, replaced)

    def told(what: str) -> Callable[[int, int], None]:
        return lambda done, total: progress(what, done, total) if progress is not None else None

    reference = _states(masked, samples, settings, told("masked"), stop, (experts, cut))
    other = _states(pruned, samples, settings, told("pruned"), stop)
    found, peak = _distances(masked, reference, pruned, other, settings)
    apart = float("nan")
    if unmasked:
        whole = _states(source, samples, settings, told("whole"), stop)
        apart = float(_distances(masked, reference, source, whole, settings)[0].max())
    tolerance = NOISE[settings.dtype] * peak
    beyond = int((~(found <= tolerance)).sum())  # a difference that is no number counts
    return Comparison(float(found.max()), apart, peak, tolerance, len(found), beyond)


def masked_states(
    source: Checkpoint,
    experts: Experts,
    cut: ExpertCut,
    samples: Sequence[np.ndarray],
    settings: Settings,
    *,
    replaced: Checkpoint | None = None,
    stop: threading.Event | None = None,
) -> list[Tensor]:
    """Return the last hidden states [tokens, hidden] of every sample in the source with the cut switched off.

    Raises:
        UsageError, InputError: as `compare`.
    """
    check(experts, cut)
    return _states(
        MaskedSource(source, experts, cut, replaced), samples, settings, None, stop, (experts, cut)
    )


class MaskedSource:
    """A Checkpoint of the source's shapes without what a cut removes, but for the routers (see `masked_routers`).

    Dropped channels are zero columns of the down projection; factors multiply it and its bias; the bias for the
    choice of dropped experts is `NEVER_CHOSEN`; replacements take the place of the source's tensors. Values are
    rounded to the stored type, as a written model's are.
    """

    def __init__(
        self, source: Checkpoint, experts: Experts, cut: ExpertCut, replaced: Checkpoint | None = None
    ) -> None:
        self._source, self._cut, self._replaced = source, cut, replaced
        self._width = experts.width
        self._places = {
            tensor.name: (layer, tensor) for layer in experts.layers for tensor in layer.tensors
            if tensor.role in ("down", "down_bias", "correction_bias") or replaced is not None
        }  # fmt: skip
        self.label = source.label
        self.folder: Path | None = source.folder
        self.config: dict[str, Any] | None = source.config
        self.headers = source.headers
        self.tensors: dict[str, TensorInfo] = dict(source.tensors)
        self.identity = f"masked 1 {getattr(source, 'identity', '')} {cut.identity()}"

    def granularity(self, name: str) -> int:
        return self._source.granularity(name)

    def computed(self, name: str) -> bool:
        """Say whether values are computed, so that there are no stored bytes."""
        inner = getattr(self._source, "computed", None)
        return name in self._places or self._given(name) is not None or (inner is not None and inner(name))

    def read_bytes(self, name: str, start: int, stop: int) -> np.ndarray:
        if self.computed(name):
            raise AssertionError(f"{name} is masked; it has no stored bytes")
        return self._source.read_bytes(name, start, stop)

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return elements [start, stop) of the flattened tensor, float32 or float64 where it is masked."""
        given = self._given(name)
        if name not in self._places:
            return self._source.read(name, start, stop) if given is None else given.read(name, start, stop)
        code = self.tensors[name].dtype
        parts = []
        for first in range(start, stop, ELEMENTS):
            last = min(first + ELEMENTS, stop)
            whole = given if given is not None else self._source
            values = np.array(widen(whole.read(name, first, last), whole.tensors[name].dtype))
            self._mask(*self._places[name], values, np.arange(first, last))
            parts.append(round_to(values, code))
        return np.concatenate(parts) if parts else self._source.read(name, 0, 0)

    def _given(self, name: str) -> Checkpoint | None:
        return self._replaced if self._replaced is not None and name in self._replaced.tensors else None

    def _mask(self, layer: ExpertLayer, tensor: ExpertTensor, values: np.ndarray, places: np.ndarray) -> None:
        """Change values in place; ``places`` are their indices in the flattened tensor."""
        shape = self.tensors[tensor.name].shape
        if tensor.expert is None:
            assert tensor.expert_axis is not None
            inner = int(np.prod(shape[tensor.expert_axis + 1 :], dtype=np.int64))
            owners = places // inner % shape[tensor.expert_axis]
        else:
            owners = np.full(len(places), tensor.expert)
        for expert in np.unique(owners).tolist():
            mine = owners == expert
            self._replace(tensor, expert, values, places, mine)
            if tensor.role == "correction_bias" and expert not in self._cut.experts(layer.index, layer.count):
                values[mine] = NEVER_CHOSEN
            if tensor.role in ("down", "down_bias"):
                values[mine] *= values.dtype.type(self._cut.scales.get((layer.index, expert), 1.0))
            channels = self._cut.channels.get((layer.index, expert))
            if tensor.role == "down" and channels is not None and tensor.channel_axis is not None:
                beside = int(np.prod(shape[tensor.channel_axis + 1 :], dtype=np.int64))
                removed = np.ones(self._width, dtype=bool)
                removed[list(channels)] = False
                values[mine & removed[places // beside % self._width]] = 0

    def _replace(self, tensor: ExpertTensor, expert: int, values: np.ndarray, places: np.ndarray, mine: np.ndarray) -> None:  # fmt: skip
        key = f"{tensor.name}#{expert}"
        if tensor.expert is not None or self._replaced is None or key not in self._replaced.tensors:
            return
        info = self._replaced.tensors[key]
        found = widen(self._replaced.read(key, 0, info.elements), info.dtype)
        values[mine] = found[places[mine] - expert * info.elements]  # experts lie one after the other


@contextmanager
def masked_routers(skeleton: Skeleton, experts: Experts, cut: ExpertCut) -> Iterator[dict[int, int]]:
    """Switch dropped experts off in the routers of a model while it runs.

    Args:
        skeleton: the source's model, whose layers are filled and emptied meanwhile.

    Yields:
        Layer -> how often its router was masked.

    Raises:
        InputError: E428 a router is no parameter of the model.
    """
    real = functional.linear
    tables: dict[int, tuple[str, Tensor]] = {}
    for layer in experts.running:
        kept = cut.experts(layer.index, layer.count)
        if len(kept) < layer.count:
            tables[layer.index] = _router(skeleton, layer), torch.tensor(kept)
    masked = dict.fromkeys(tables, 0)

    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        for layer, (name, kept) in tables.items():
            router = skeleton.model.get_parameter(name)
            if not router.is_meta and weight.shape == router.shape and _same(weight, router):
                masked[layer] += 1
                rows = kept.to(weight.device)
                found = real(input, weight[rows], None if bias is None else bias[rows])
                low = max(SWITCHED_OFF, torch.finfo(found.dtype).min)
                out = torch.full(
                    (*found.shape[:-1], len(weight)), low, dtype=found.dtype, device=found.device
                )
                out[..., rows] = found
                return out
        return real(input, weight, bias)

    functional.linear = linear  # type: ignore[assignment]
    try:
        yield masked
    finally:
        functional.linear = real


def _router(skeleton: Skeleton, layer: ExpertLayer) -> str:
    """Return the path of a layer's router in the model."""
    names = {tensor.name for tensor in layer.of("router")}
    for name, pieces in skeleton.pieces(layer.index).items():
        if any(piece.tensor in names for piece in pieces):
            return f"{skeleton.layer_path(layer.index)}.{name}"
    raise _unmaskable(skeleton.checkpoint, layer.index)


def _same(weight: Tensor, router: Tensor) -> bool:
    """Say whether a matrix is the router's, maybe in another precision."""
    return weight.data_ptr() == router.data_ptr() or torch.equal(weight.float(), router.float())


def _unmaskable(checkpoint: Checkpoint, layer: int) -> InputError:
    return InputError("E428", f"the router of layer {layer} of {checkpoint.label} is not applied as a plain matrix product, so its experts "
                      "cannot be switched off", where=Where(checkpoint.label), help="compare the two models by their answers: surgeon eval")  # fmt: skip


class _Nothing:
    """An observer that looks at nothing."""

    def wants(self, module: str) -> bool:
        return False

    def observe(self, module: str, inputs: Tensor, outputs: Tensor | None, sample: int | None) -> None:
        raise AssertionError("nothing was asked for")


def _states(
    checkpoint: Checkpoint,
    samples: Sequence[np.ndarray],
    settings: Settings,
    progress: Callable[[int, int], None] | None,
    stop: threading.Event | None,
    mask: tuple[Experts, ExpertCut] | None = None,
) -> list[Tensor]:
    """Return the last hidden states of every sample, with routers masked where asked for."""
    with Walk(checkpoint, samples, replace(settings, spill=None)) as walk:
        with masked_routers(walk.skeleton, *mask) if mask is not None else nullcontext({}) as masked:
            walk.run(_Nothing(), progress=progress, stop=stop)
        for layer, count in masked.items():
            if not count:
                raise _unmaskable(checkpoint, layer)
        return [hidden.clone() for _, hidden in walk.hidden()]


def _distances(
    first: Checkpoint, one: list[Tensor], second: Checkpoint, two: list[Tensor], settings: Settings
) -> tuple[Tensor, float]:
    """Return (largest difference of logits at every token [tokens], largest absolute logit), float64.

    The vocabulary is gone through in blocks. Without a head, last hidden states are compared.
    """
    states, states2 = torch.cat(one), torch.cat(two)
    try:
        heads = Head(first, settings), Head(second, settings)
    except InputError as error:
        if error.code != "E386":
            raise
        return _largest(states.double() - states2.double()), float(states.abs().max())
    with torch.no_grad():
        states, states2 = heads[0].entering(states), heads[1].entering(states2)
        found = torch.zeros(len(states), dtype=torch.float64, device=states.device)
        peak = 0.0
        step = min(head.rows_per_block(len(states)) for head in heads)
        for (_, _, weight, bias), (_, _, weight2, bias2) in zip(
            *(head.blocks(step) for head in heads), strict=True
        ):
            z = heads[0].block_logits(states, weight, bias).double()
            found = torch.maximum(
                found, _largest(z - heads[1].block_logits(states2, weight2, bias2).double())
            )
            peak = max(peak, float(z.abs().max()))
    return found.cpu(), peak


def _largest(values: Tensor) -> Tensor:
    return values.abs().amax(dim=-1)
