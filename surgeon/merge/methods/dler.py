"""Update-selective merging (DLER)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from surgeon.kernels import cast, select
from surgeon.merge.method import Binding, Method, Parameter
from surgeon.merge.task_vectors import TaskVectors
from surgeon.plan import Block, Operation
from surgeon.seeds import stream_key, uniform

TINY_BASE = 1e-8  # keeps |d| / |b| finite where the base is 0


@dataclass(frozen=True)
class Dler(TaskVectors):
    """y = b + scale * M d, M the keep * N largest |d|; no rescaling, no election.

    ``relative`` ranks by |d| / (|b| + 1e-8), ``of_nonzero`` counts N without the zeros of d, and
    ``stochastic`` rounds y up with probability equal to its place between two numbers of ``stored``.
    """

    relative: bool = False
    of_nonzero: bool = False
    stochastic: bool = False
    stored: str = "F32"
    rounding_key: int = 0

    name = "dler"

    def _keys(self, block: Block, i: int, delta: np.ndarray) -> np.ndarray:
        if not self.relative:
            return select.keys(delta)
        size = np.abs(block.value(self.base, self.work)) + delta.dtype.type(TINY_BASE)
        return select.keys(delta / size)

    def _plain(self) -> bool:
        return not self.relative

    def _encodes(self) -> bool:
        return not self.stochastic  # rounding is still to come

    def _high(self, block: Block, i: int) -> np.ndarray:
        """Return the histogram, and after it the number of entries that did not change."""
        zeros = np.count_nonzero(self._delta(block, i) == 0) if self.of_nonzero else 0
        return np.append(super()._high(block, i), zeros)

    def _ranks(self, histogram: np.ndarray, i: int, elements: int) -> tuple[select.Rank, select.Rank | None]:
        return super()._ranks(histogram[:-1], i, elements - int(histogram[-1]))

    def map(self, block: Block, carried: Any) -> list[np.ndarray]:
        (result,) = super().map(block, carried)
        if not self.stochastic or self.stored not in {"BF16", "F16"}:
            return [result]
        draws = uniform(self.rounding_key, block.start, block.stop)
        return [stochastic(result, self.stored, draws)]

    def summary(self, carried: Any, measured: np.ndarray | None) -> dict[str, Any] | None:
        facts = super().summary(carried, measured)
        if not facts or not facts.get("elements"):
            return facts
        facts["scale"] = self.lam  # to compare the effective one with
        ratios = {
            "changed_share": (facts["changed"], facts["elements"]),
            "kept_share": (facts["kept"], facts["elements"]),
            "energy_kept": (facts["kept_energy"], facts["energy"]),
            "effective_scale": (facts["moved_l1"], facts["kept_l1"]),
        }
        facts |= {name: above / below for name, (above, below) in ratios.items() if below > 0}
        thresholds = [pair[0] for pair in carried.thresholds if pair is not None] if carried else []
        # With fewer changed entries than are to be kept the threshold is 0: nothing is trimmed.
        facts["trims"] = any(not t.everything and t.key > 0 for t in thresholds)
        return facts


def stochastic(values: np.ndarray, code: str, draws: np.ndarray) -> np.ndarray:
    """Round to one of the two neighbours in ``code``, the upper with probability (v - lower) / (upper - lower).

    Values that the type holds stay. Returns carrier values; ``draws`` are uniform in [0, 1).
    """
    nearest = cast.narrow(values, code)
    near = cast.widen(nearest, code).astype(np.float64)
    bits = nearest.view(np.uint16)
    exact = values.astype(np.float64, copy=False)
    away = np.abs(exact) > np.abs(
        near
    )  # the other neighbour is the next larger magnitude, or the next smaller
    other = np.where(away, bits + np.uint16(1), bits - np.uint16(1))
    # A value that rounds to 0 has its other neighbour on its own side of 0.
    other = np.where((bits & 0x7FFF) == 0, np.uint16(1) | (np.signbit(exact).astype(np.uint16) << 15), other)
    other = other.astype(np.uint16)
    far = cast.widen(other if code == "BF16" else other.view(np.float16), code).astype(np.float64)
    with np.errstate(invalid="ignore"):  # next to the largest number the neighbour is inf
        share = np.abs(exact - near) / np.abs(far - near)
    moves = (draws < np.where(np.isfinite(far), share, 0.0)) & (exact != near)
    chosen = np.where(moves, other, bits)
    return chosen if code == "BF16" else chosen.view(np.float16)


def bind(b: Binding) -> Operation:
    assert b.base is not None
    (other,) = b.others
    return Dler(
        base=b.base,
        others=b.others,
        weights=(1.0,),
        densities=(float(b.shared["keep"]),),
        sparsifier="magnitude",
        elect=False,
        normalize=False,
        rescale="none",
        lam=float(b.shared["scale"]),
        work=b.work,
        report=True,
        grouped=b.shared.get("scope", "tensor") != "tensor",
        relative=bool(b.shared.get("relative", False)),
        of_nonzero=b.shared.get("keep_of", "all") == "nonzero",
        stochastic=b.shared.get("rounding", "nearest") == "stochastic",
        stored=b.stored,
        rounding_key=stream_key(b.seed, b.ordinals[other] if b.ordinals else other, b.name),
    )


METHOD = Method(
    name="dler",
    title="DLER update-selective merging",
    summary="Adds only the largest changes of one fine-tune to its base, scaled down.",
    bind=bind,
    base="required",
    models=(2, 2),
    parameters=(
        Parameter("keep", "float", "fraction of the entries kept", default=0.25, low=0.0, high=1.0, open_low=True),
        Parameter("scale", "float", "factor of the kept changes", default=0.7),
        Parameter("scope", "str", "over which set the largest are taken", default="tensor",
                  choices=("tensor", "layer", "global"), native_only=True),
        Parameter("keep_of", "str", "count keep of all entries or of the changed ones", default="all",
                  choices=("all", "nonzero"), native_only=True),
        Parameter("relative", "bool", "rank by change relative to the base (experimental)", default=False,
                  native_only=True),
        Parameter("rounding", "str", "of the result; stochastic keeps updates below one step on average",
                  default="nearest", choices=("nearest", "stochastic"), native_only=True),
    ),
    reference="DLER, arXiv 2510.15110, section 4.6",
    random=True,
    group_by="scope",
    page="""y = b + scale * M (x - b), M the keep * N entries of largest |x - b|. For a concise model trained from b that lost
accuracy on hard problems: the strongest changes carry the brevity, the many weak ones the damage.

The paper does not say over which set the largest are taken; per tensor is what common mergers do. Entries that tie
with the threshold are kept evenly over the tensor. bfloat16 cannot hold 0.7 of one step: the report gives the changed,
kept and energy shares and the scale that really came out. Where fewer entries changed than keep asks for, keep has no
effect (keep_of nonzero counts changed ones only). Sweep keep and scale: both were tuned on one 8B model.""",
)  # fmt: skip
