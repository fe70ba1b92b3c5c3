"""One engine for the task-vector family: sparsify the deltas, elect signs, add to the base.

    d_i = x_i - b;  d_i <- w_i * scale_i * M_i d_i;  s = sign of sum_i d_i (0 counts as +)
    y = b + lambda * sum_i [sign d_i = s] d_i / sum_i [sign d_i = s] w_i

Task arithmetic leaves out masks and election; TIES (arXiv 2306.01708) trims by magnitude; DARE
(2311.03099) drops at random; DELLA (2406.11617) drops by row-wise magnitude rank; Breadcrumbs
(2312.06795) also drops the largest. Every step rounds to ``work``, so that bfloat16 arithmetic of
a mergekit YAML is reproduced; on the command line ``work`` is float32.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from surgeon.errors import UsageError
from surgeon.kernels import cast, fused, lanes, select
from surgeon.merge.method import Binding, Parameter
from surgeon.plan import Block, Operation
from surgeon.seeds import stream_key, uniform

TINY_L1 = 1e-7  # below this sum a rescale would divide noise by noise
TINY_WEIGHTS = 1e-8


@dataclass
class Facts:
    """What the reduce passes learned: exact thresholds and L1 scales, one per task vector."""

    ranks: list[tuple[select.Rank, select.Rank | None] | None] = field(default_factory=list)
    thresholds: list[tuple[select.Threshold, select.Threshold | None] | None] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    elements: int = 0


@dataclass(frozen=True)
class TaskVectors(Operation):
    """The bound operation for one tensor; one entry per task vector in every tuple."""

    base: int
    others: tuple[int, ...]
    weights: tuple[float, ...]
    densities: tuple[float, ...]
    sparsifier: str  # none, magnitude, outliers, random, magprune
    elect: bool
    normalize: bool
    rescale: str  # none, l1, inverse_density
    lam: float
    work: str
    gammas: tuple[float, ...] = ()
    epsilons: tuple[float, ...] = ()
    keys: tuple[int, ...] = ()
    trim_ties: str = "even"  # even, all
    report: bool = False
    grouped: bool = False  # reduce passes run over many tensors together

    name = "task_vectors"
    scratch = 48

    @property
    def unit(self) -> str:  # type: ignore[override]
        return "row" if self.sparsifier == "magprune" else "element"

    def _selects(self) -> bool:
        return self.sparsifier in {"magnitude", "outliers"} and any(0 < d < 1 for d in self.densities)

    def _rescales(self) -> bool:
        return self.rescale == "l1" and self.sparsifier != "none" and any(0 < d < 1 for d in self.densities)

    def reduces(self) -> int:
        return len(self._stages())

    def _stages(self) -> tuple[str, ...]:
        selection: tuple[str, ...] = ()
        if self._selects():
            # bfloat16 keys have no lower bits: one pass will do, if every block's counts can be held.
            single = self.work == "BF16" and self._plain() and not self.grouped
            selection = ("counts",) if single else ("high", "low")
        return selection + ("l1",) * self._rescales()

    def _stage(self, step: int) -> str:
        return self._stages()[step]

    def _delta(self, block: Block, i: int) -> np.ndarray:
        return cast.round_to(
            block.value(self.others[i], self.work) - block.value(self.base, self.work), self.work
        )

    def reduce(self, step: int, block: Block, carried: Facts | None) -> Any:
        stage = self._stage(step)
        where = (block.position, block.ordinal)
        states: list[Any] = []
        for i in range(len(self.others)):
            if stage == "l1":
                states.append(np.array(self._l1(block, i, carried)))
            elif not 0 < self.densities[i] < 1:
                states.append(None)
            elif stage == "high":
                states.append(self._high(block, i))
            elif stage == "counts":
                histogram = self._high(block, i)
                present = np.flatnonzero(histogram)
                states.append([(where, len(histogram), present.astype(np.uint32), histogram[present])])
            else:
                assert carried is not None
                pair_of_ranks = carried.ranks[i]
                assert pair_of_ranks is not None
                found = self._low(block, i, pair_of_ranks)
                states.append([[(where, *piece)] for piece in found])
        return states

    def _keys(self, block: Block, i: int, delta: np.ndarray) -> np.ndarray:
        """Return what magnitude selection ranks by."""
        return select.keys(delta)

    def _plain(self) -> bool:
        """Return whether the compiled kernels' ranking, by |delta|, is this operation's."""
        return True

    def _l1(self, block: Block, i: int, facts: Facts | None) -> tuple[float, float]:
        done = fused.delta_l1(self, block, facts, i) if self._plain() else None
        if done is not None:
            return done
        delta = self._delta(block, i)
        kept = self._masked(block, i, delta, facts)
        before, after = (lanes.total(np.abs(v).astype(np.float64)) for v in (delta, kept))
        return before, after

    def _high(self, block: Block, i: int) -> np.ndarray:
        done = fused.delta_histogram(block, self.others[i], self.base, self.work) if self._plain() else None
        if done is not None:
            return done
        return select.high_histogram(self._keys(block, i, self._delta(block, i)))

    def _low(self, block: Block, i: int, ranks) -> list[tuple[np.ndarray, np.ndarray]]:
        wanted = [r for r in ranks if r is not None]
        if self._plain():
            bins = [r.bin for r in wanted]
            done = fused.delta_low_counts(block, self.others[i], self.base, self.work, bins)
            if done is not None:
                return done
        key = self._keys(block, i, self._delta(block, i))
        return [select.low_counts(key, r) for r in wanted]

    def merge(self, step: int, left: list, right: list) -> list:
        if self._stage(step) == "low":
            return [
                None if a is None else [p + q for p, q in zip(a, b, strict=True)]
                for a, b in zip(left, right, strict=True)
            ]
        return [None if a is None else a + b for a, b in zip(left, right, strict=True)]

    def finish(self, step: int, state: list, carried: Facts | None, elements: int) -> Facts:
        facts = carried or Facts(elements=elements)
        stage = self._stage(step)
        if stage == "high":
            facts.ranks = [
                None if h is None else self._ranks(h, i, elements) for i, h in enumerate(state)
            ]  # fmt: skip
        elif stage == "counts":
            for i, pieces in enumerate(state):
                ranks, lows = (None, None) if pieces is None else self._from_counts(pieces, i, elements)
                facts.ranks.append(ranks)
                facts.thresholds.append(None if lows is None else self._thresholds(ranks, lows))
        elif stage == "low":
            facts.thresholds = [
                None if s is None else self._thresholds(facts.ranks[i], s) for i, s in enumerate(state)
            ]
        else:
            facts.scales = [self._scale(before, after) for before, after in state]
        return facts

    def _from_counts(self, pieces: list, i: int, elements: int):
        """Return the ranks, and what the second pass would have counted for each of them."""
        total = np.zeros(pieces[0][1], np.int64)
        for _, _, present, counts in pieces:
            total[present] += counts
        ranks = self._ranks(total, i, elements)
        lows = []
        for rank in (r for r in ranks if r is not None):
            low = []
            for where, _, present, counts in pieces:
                inside = present == rank.bin
                low.append((where, np.zeros(int(inside.sum()), np.uint16), counts[inside]))
            lows.append(low)
        return ranks, lows

    def _ranks(self, histogram: np.ndarray, i: int, elements: int) -> tuple[select.Rank, select.Rank | None]:
        target = int(self.densities[i] * elements)
        if self.sparsifier == "magnitude":
            return select.locate(histogram, max(1, target)), None
        bottom = max(0, elements - target - int(self.gammas[i] * elements))
        top = elements - bottom - target
        return select.locate(histogram, top + target), select.locate(histogram, top)

    def _thresholds(self, ranks, pieces) -> tuple[select.Threshold, select.Threshold | None]:
        found = [
            select.resolve(rank, piece) for rank, piece in zip([r for r in ranks if r], pieces, strict=True)
        ]
        if self.trim_ties == "all":
            found = [
                select.Threshold(t.key, t.ties, t.ties, t.before, t.everything, t.nothing) for t in found
            ]
        return found[0], found[1] if len(found) > 1 else None

    def _scale(self, before: float, after: float) -> float:
        if self.work in {"BF16", "F16"}:
            # A 16-bit torch sum is rounded to 16 bits before the division. Where it overflows (float16
            # ends at 65504) the float sums stay: inf / inf would fill the tensor with NaN.
            rounded = cast.round_to(np.array([before, after], np.float32), self.work)
            if np.isfinite(rounded).all():
                before, after = float(rounded[0]), float(rounded[1])
        if before < TINY_L1 or after < TINY_L1:
            return 1.0
        return before / after

    def _masked(self, block: Block, i: int, delta: np.ndarray, facts: Facts | None) -> np.ndarray:
        density = self.densities[i]
        if self.sparsifier == "none" or density >= 1:
            return delta
        if density <= 0:
            return np.zeros_like(delta)
        where = (block.position, block.ordinal)
        if self.sparsifier == "random":
            mask = uniform(self.keys[i], block.start, block.stop) < density
        elif self.sparsifier == "magprune":
            mask = self._magprune(block, i, delta)
        else:
            assert facts is not None and facts.thresholds[i] is not None
            outer, inner = facts.thresholds[i]  # type: ignore[misc]
            key = self._keys(block, i, delta)
            mask = (
                select.keep_mask(key, outer, where)
                if inner is None
                else select.band_mask(key, outer, inner, where)
            )
        return np.where(mask, delta, delta.dtype.type(0))

    def _magprune(self, block: Block, i: int, delta: np.ndarray) -> np.ndarray:
        done = fused.ranked_keep(self, block, i)
        if done is not None:
            return done
        columns = block.columns
        if not delta.size:  # a shape with a 0 in it has no rows to reshape to
            return np.zeros(delta.shape, dtype=bool)
        rank = row_ranks(select.keys(delta).reshape(-1, columns))
        density, epsilon = self.densities[i], self.epsilons[i]
        if columns == 1:
            keep = np.full(delta.shape, density)
        else:
            keep = (density - epsilon) + rank.reshape(-1) * (2 * epsilon / (columns - 1))
        return uniform(self.keys[i], block.start, block.stop) < keep

    def _contribution(self, block: Block, i: int, facts: Facts | None) -> np.ndarray:
        """Return w_i * scale_i * M_i d_i, rounded to ``work`` after every step."""
        delta = self._masked(block, i, self._delta(block, i), facts)
        scale = self._rescaling(i, facts)
        if scale != 1.0:
            delta = cast.round_to(delta * self._scalar(scale), self.work)
        return cast.round_to(delta * self._scalar(self.weights[i]), self.work)

    def _rescaling(self, i: int, facts: Facts | None) -> float:
        """Return the factor that makes up for dropped entries of one task vector."""
        if not 0 < self.densities[i] < 1:
            return 1.0
        if facts is not None and facts.scales:
            return facts.scales[i]
        return 1.0 / self.densities[i] if self.rescale == "inverse_density" else 1.0

    def _total_weight(self, weights: np.ndarray):
        """Return what a merge without election divides by when it normalizes."""
        total = cast.round_to(weights.sum(keepdims=True, dtype=weights.dtype), self.work)[0]
        return total if abs(total) >= TINY_WEIGHTS else weights.dtype.type(1)

    def _encodes(self) -> bool:
        """Return whether the compiled map may hand over the output's own type instead of numbers."""
        return True

    def _scalar(self, value: float):
        wide = np.float64 if self.work == "F64" else np.float32
        return cast.round_to(np.array([value], dtype=wide), self.work)[0]

    def map(self, block: Block, carried: Facts | None) -> list[np.ndarray]:
        done = fused.task_vectors(self, block, carried, self._encodes()) if self._plain() else None
        if done is not None:
            return [done]
        parts = [self._contribution(block, i, carried) for i in range(len(self.others))]
        base = block.value(self.base, self.work)
        wide = base.dtype.type
        weights = [self._scalar(w) for w in self.weights]
        mixed = np.zeros(base.shape, dtype=wide)
        if self.elect:
            total = np.zeros(base.shape, dtype=wide)
            for part in parts:
                total += part
            positive = cast.round_to(total, self.work) >= 0
            divisor = np.zeros(base.shape, dtype=wide)
            for part, weight in zip(parts, weights, strict=True):
                agrees = np.where(positive, part > 0, part < 0)
                mixed += np.where(agrees, part, wide(0))
                divisor += np.where(agrees, weight, wide(0))
            divisor = cast.round_to(divisor, self.work)
            divisor[divisor == 0] = 1
        else:
            for part in parts:
                mixed += part
            divisor = self._total_weight(np.array(weights, dtype=wide))
        mixed = cast.round_to(mixed, self.work)
        if self.normalize:
            mixed = cast.round_to(mixed / divisor, self.work)
        if self.lam != 1:
            mixed = cast.round_to(mixed * wide(self.lam), self.work)
        return [cast.round_to(added(base, mixed), self.work)]

    def measure(self, block: Block, results: list[np.ndarray], carried: Facts | None) -> np.ndarray | None:
        """Sums for the effective-update report: n, changed, kept, |d|^2, kept |d|^2, |Md|, |y-b|."""
        if not self.report:
            return None
        base = block.value(self.base, self.work)
        delta = self._delta(block, 0)
        kept = self._masked(block, 0, delta, carried)
        code = (
            {2: "BF16", 4: "F32", 8: "F64"}[results[0].itemsize] if results[0].dtype != np.float16 else "F16"
        )
        moved = cast.widen(results[0], code) - base
        wide = np.float64
        return np.array(
            [
                delta.size,
                np.count_nonzero(delta),
                np.count_nonzero(kept),
                np.square(delta, dtype=wide).sum(),
                np.square(kept, dtype=wide).sum(),
                np.abs(kept).sum(dtype=wide),
                np.abs(moved).sum(dtype=wide),
            ]
        )

    def summary(self, carried: Facts | None, measured: np.ndarray | None) -> dict[str, Any] | None:
        facts: dict[str, Any] = {}
        for pair in carried.thresholds if carried else []:
            if pair is not None and carried and pair[0].ties > 0.01 * carried.elements and pair[0].key > 0:
                facts["tied"] = max(facts.get("tied", 0.0), pair[0].ties / carried.elements)
        if measured is not None:
            n, changed, kept, energy, kept_energy, kept_l1, moved_l1 = (float(v) for v in measured)
            facts |= {"elements": n, "changed": changed, "kept": kept, "energy": energy, "kept_energy": kept_energy,
                      "kept_l1": kept_l1, "moved_l1": moved_l1}  # fmt: skip
        return facts or None


def added(base: np.ndarray, change: np.ndarray) -> np.ndarray:
    """Return base + change where a change of 0 leaves the base's bits: -0.0 + 0.0 would give 0.0."""
    return base - (change.dtype.type(0) - change)


def row_ranks(key: np.ndarray) -> np.ndarray:
    """Return each entry's rank in its row, ascending, ties by column; uint32 [rows, columns] in and out."""
    columns = key.shape[1]
    packed = key.astype(np.uint64) << np.uint64(32)
    packed |= np.arange(columns, dtype=np.uint64)
    packed.sort(axis=1)
    order = (packed & np.uint64(0xFFFFFFFF)).astype(np.int64)
    ranks = np.empty(key.shape, dtype=np.uint32)
    np.put_along_axis(ranks, order, np.broadcast_to(np.arange(columns, dtype=np.uint32), key.shape), axis=1)
    return ranks


def weight_parameter(cli: float = 1.0) -> Parameter:
    return Parameter(
        "weight", "float", "factor of this model's task vector", per_model=True, required=True, cli=cli
    )


def density_parameter(cli: float) -> Parameter:
    return Parameter("density", "float", "fraction of the task vector kept", per_model=True, default=1.0, cli=cli,
                     low=0.0, high=1.0)  # fmt: skip


def family_parameters(
    *, normalize: bool, rescale: bool, density: float | None, lam: float, extra: tuple[Parameter, ...] = ()
) -> tuple[Parameter, ...]:
    """Return the parameters shared by the family, with the method's defaults."""
    return (
        weight_parameter(),
        density_parameter(1.0 if density is None else density),
        *extra,
        Parameter("lambda", "float", "factor of the merged task vector", default=1.0, cli=lam),
        Parameter("normalize", "bool", "divide by the sum of the (agreeing) weights", default=normalize),
        Parameter("rescale", "bool", "restore the L1 norm after dropping entries", default=rescale),
        Parameter("int8_mask", "bool", "no effect; accepted from mergekit YAML", default=False, inert=True),
    )


GAMMA = Parameter("gamma", "float", "fraction of the largest entries dropped", per_model=True, default=0.01, low=0.0,
                  high=1.0)  # fmt: skip
EPSILON = Parameter("epsilon", "float", "spread of the keep probability around density", per_model=True, default=0.15,
                    low=0.0, high=0.5)  # fmt: skip


TRIM_TIES = Parameter("trim_ties", "str", "entries that tie with the threshold: spread the quota evenly, or keep all",
                      default="even", choices=("even", "all"), native_only=True)  # fmt: skip
RESCALE_RULE = Parameter("rescale_rule", "str", "how the norm is restored after dropping; overrides rescale",
                         choices=("l1", "inverse_density", "none"), native_only=True)  # fmt: skip
SCOPE = Parameter("scope", "str", "over which set the largest entries are taken", default="tensor",
                  choices=("tensor", "layer", "global"), native_only=True)  # fmt: skip


def bind_family(b: Binding, *, sparsifier: str, elect: bool) -> Operation:
    """Bind any member of the family for one tensor."""
    assert b.base is not None
    densities = tuple(float(d) for d in b.of("density"))
    epsilons = tuple(float(e) for e in b.of("epsilon")) if sparsifier == "magprune" else ()
    for density, epsilon in zip(densities, epsilons, strict=False):
        if 0 < density < 1 and not (density - epsilon > 0 and density + epsilon < 1):
            raise UsageError(
                "E213", f"della: density {density:g} with epsilon {epsilon:g} leaves (0, 1)",
                help=f"keep probabilities run from density - epsilon to density + epsilon; use epsilon below "
                f"{min(density, 1 - density):g}",
            )  # fmt: skip
    keys = tuple(stream_key(b.seed, b.ordinals[i], b.input_names[i]) for i in b.others)
    return TaskVectors(
        base=b.base,
        others=b.others,
        weights=tuple(float(w) for w in b.of("weight")),
        densities=densities,
        sparsifier=sparsifier,
        elect=elect,
        normalize=bool(b.shared["normalize"]),
        rescale=b.shared.get("rescale_rule") or ("l1" if b.shared["rescale"] else "none"),
        lam=float(b.shared["lambda"]),
        work=b.work,
        gammas=tuple(float(g) for g in b.of("gamma")) if sparsifier == "outliers" else (),
        epsilons=epsilons,
        keys=keys if sparsifier in {"random", "magprune"} else (),
        trim_ties=b.shared.get("trim_ties", "even"),
        grouped=b.shared.get("scope", "tensor") != "tensor",
    )
