"""How two checkpoints differ: structure, configuration, values, and the anatomy of a delta.

The second checkpoint is the reference: d = a - b, relative to b. With a base, the task vectors
a - base and b - base are compared as well. The anatomy of a delta says what trimming it would
cost: the share of entries that changed, and how much of the energy (sum of squares) its largest
entries hold. All values are read in blocks; memory does not grow with the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from surgeon import traits
from surgeon.architectures import naming
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.dtypes import DTYPES
from surgeon.inspection import Progress, block_ranges, each_tensor, product
from surgeon.kernels import cast, select

DENSITIES = (0.05, 0.1, 0.2, 0.5)
"""Fractions kept at which the anatomy of a delta is given."""

COSMETIC = {"_name_or_path", "transformers_version", "use_cache"}
"""Configuration keys that change nothing a model computes."""


@dataclass
class Structure:
    """Names, shapes and types of two checkpoints side by side."""

    only_first: list[str] = field(default_factory=list)
    only_second: list[str] = field(default_factory=list)
    shapes: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    dtypes: list[tuple[str, str, str]] = field(default_factory=list)
    common: list[str] = field(default_factory=list)

    @property
    def differs(self) -> bool:
        return bool(self.only_first or self.only_second or self.shapes or self.dtypes)


def structure(first: Checkpoint, second: Checkpoint) -> Structure:
    """Compare names, shapes and types; ``common`` are the tensors whose values can be compared."""
    found = Structure()
    found.only_first = [n for n in first.tensors if n not in second.tensors]
    found.only_second = [n for n in second.tensors if n not in first.tensors]
    for name, ours in first.tensors.items():
        theirs = second.tensors.get(name)
        if theirs is None:
            continue
        if ours.dtype != theirs.dtype:
            found.dtypes.append((name, ours.dtype, theirs.dtype))
        if ours.shape != theirs.shape:
            found.shapes.append((name, ours.shape, theirs.shape))
        else:
            found.common.append(name)
    return found


@dataclass(frozen=True)
class Setting:
    """One key on which two JSON files disagree; ``cosmetic`` when it changes no result."""

    key: str
    first: Any
    second: Any
    cosmetic: bool = False


ABSENT = "(absent)"


def settings(first: Mapping[str, Any] | None, second: Mapping[str, Any] | None) -> list[Setting]:
    """Compare two parsed configurations key by key, nested keys written with dots."""
    ours, theirs = _flat(first or {}), _flat(second or {})
    return [
        Setting(key, ours.get(key, ABSENT), theirs.get(key, ABSENT), key in COSMETIC)
        for key in sorted({*ours, *theirs})
        if ours.get(key, ABSENT) != theirs.get(key, ABSENT)
    ]


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, entry in value.items():
        name = f"{prefix}{'dtype' if key == 'torch_dtype' else key}"
        if isinstance(entry, dict) and entry:
            found.update(_flat(entry, f"{name}."))
        else:
            found[name] = entry
    return found


@dataclass
class Anatomy:
    """What a delta is made of.

    Attributes:
        elements: entries compared.
        changed: entries that are not zero.
        energy: sum of squares.
        kept: density -> entries a trim to that density leaves, zeros not counted.
        kept_energy: density -> sum of squares of those.
    """

    elements: int = 0
    changed: int = 0
    energy: float = 0.0
    kept: dict[float, int] = field(default_factory=dict)
    kept_energy: dict[float, float] = field(default_factory=dict)

    def add(self, other: Anatomy) -> None:
        self.elements += other.elements
        self.changed += other.changed
        self.energy += other.energy
        for density, count in other.kept.items():
            self.kept[density] = self.kept.get(density, 0) + count
            self.kept_energy[density] = self.kept_energy.get(density, 0.0) + other.kept_energy[density]

    def figures(self) -> dict[str, Any]:
        return {
            "changed": _share(self.changed, self.elements),
            "norm": math.sqrt(self.energy),
            "densities": {
                f"{density:g}": {
                    "kept": _share(self.kept[density], self.elements),
                    "energy": _share(self.kept_energy[density], self.energy, 1.0),
                }
                for density in self.kept
            },
        }


@dataclass
class Values:
    """Figures about one pair of tensors, or about several pairs together.

    Attributes:
        tensors, elements: what was compared.
        nonfinite: entries left out because one of the models is not finite there.
        changed: entries that differ.
        one_step: entries that differ by exactly one step of the 16-bit type both are stored in.
        stepped: elements for which ``one_step`` could be told.
        squares, first, second, dot: sums of d*d, a*a, b*b, a*b.
        max_abs: largest |d|.
        delta: anatomy of d, or of a - base when there is a base.
        delta_second: anatomy of b - base.
        task_dot: sum of (a - base) * (b - base).
        both, conflicts: entries that both task vectors change, and in opposite directions.
    """

    tensors: int = 0
    elements: int = 0
    nonfinite: int = 0
    changed: int = 0
    one_step: int = 0
    stepped: int = 0
    squares: float = 0.0
    first: float = 0.0
    second: float = 0.0
    dot: float = 0.0
    max_abs: float = 0.0
    delta: Anatomy = field(default_factory=Anatomy)
    delta_second: Anatomy | None = None
    task_dot: float = 0.0
    both: int = 0
    conflicts: int = 0

    def add(self, other: Values) -> None:
        for name in (
            "tensors", "elements", "nonfinite", "changed", "one_step", "stepped", "squares", "first", "second",
            "dot", "task_dot", "both", "conflicts",
        ):  # fmt: skip
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.max_abs = max(self.max_abs, other.max_abs)
        self.delta.add(other.delta)
        if other.delta_second is not None:
            self.delta_second = self.delta_second or Anatomy()
            self.delta_second.add(other.delta_second)

    @property
    def relative(self) -> float:
        """Return |d| / |b|; infinite when only b is zero."""
        if not self.second:
            return math.inf if self.squares else 0.0
        return math.sqrt(self.squares / self.second)

    @property
    def cosine(self) -> float | None:
        return _cosine(self.dot, self.first, self.second)

    def figures(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "tensors": self.tensors,
            "elements": self.elements,
            "relative": self.relative if math.isfinite(self.relative) else None,
            "cosine": self.cosine,
            "max_abs": self.max_abs,
            "changed": _share(self.changed, self.elements),
            "one_step": _share(self.one_step, self.stepped) if self.stepped else None,
            "nonfinite": self.nonfinite,
            "delta": self.delta.figures(),
        }
        if self.delta_second is not None:
            found["delta_second"] = self.delta_second.figures()
            found["task_cosine"] = _cosine(self.task_dot, self.delta.energy, self.delta_second.energy)
            found["sign_conflicts"] = _share(self.conflicts, self.elements)
            found["both_changed"] = _share(self.both, self.elements)
        return found


def _share(part: float, whole: float, empty: float = 0.0) -> float:
    return part / whole if whole else empty


def _cosine(dot: float, first: float, second: float) -> float | None:
    """Return the cosine, None when one side is zero."""
    if first <= 0 or second <= 0:
        return None
    return max(-1.0, min(1.0, dot / math.sqrt(first) / math.sqrt(second)))


class _Largest:
    """Exact energy of the k largest entries of a delta: two counting passes, no sorting."""

    def __init__(self, elements: int) -> None:
        self.elements = elements
        self.histogram = np.zeros(select.HIGH_BINS, np.int64)
        self.energies = np.zeros(select.HIGH_BINS)
        self.ranks: dict[float, select.Rank] = {}
        self.lows: dict[float, np.ndarray] = {}

    def first_pass(self, delta: np.ndarray) -> None:
        high = (select.keys(delta) >> np.uint32(select.LOW_BITS)).astype(np.intp)
        wide = delta.astype(np.float64, copy=False)
        self.histogram += np.bincount(high, minlength=select.HIGH_BINS)
        self.energies += np.bincount(high, weights=wide * wide, minlength=select.HIGH_BINS)

    def needs_second_pass(self, changed: int) -> bool:
        """Choose thresholds; False when every wanted density keeps all changed entries."""
        for density in DENSITIES:
            k = max(1, int(density * self.elements))
            if k < changed:
                self.ranks[density] = select.locate(self.histogram, k)
                self.lows[density] = np.zeros(1 << select.LOW_BITS, np.int64)
        return bool(self.ranks)

    def second_pass(self, delta: np.ndarray) -> None:
        key = select.keys(delta)
        high = key >> np.uint32(select.LOW_BITS)
        for density, rank in self.ranks.items():
            inside = key[np.flatnonzero(high == np.uint32(rank.bin))] & select.LOW_MASK
            self.lows[density] += np.bincount(inside.astype(np.intp), minlength=self.lows[density].size)

    def finish(self, anatomy: Anatomy) -> None:
        for density in DENSITIES:
            rank = self.ranks.get(density)
            if rank is None:
                anatomy.kept[density], anatomy.kept_energy[density] = anatomy.changed, anatomy.energy
                continue
            above = float(self.energies[rank.bin + 1 :].sum())
            low = np.flatnonzero(self.lows[density])[::-1]
            counts = self.lows[density][low]
            before = np.cumsum(counts) - counts
            taken = np.clip(rank.k - rank.above - before, 0, counts)
            bits = (np.uint32(rank.bin << select.LOW_BITS) | low.astype(np.uint32)).astype(np.uint32)
            values = bits.view(np.float32).astype(np.float64)
            anatomy.kept[density] = rank.k
            anatomy.kept_energy[density] = above + float((values * values * taken).sum())


@dataclass
class _Block:
    """One block of two or three models, entries that are not finite everywhere left out."""

    first: np.ndarray
    second: np.ndarray
    base: np.ndarray | None
    codes: tuple[str, str] | None
    raw: tuple[np.ndarray, np.ndarray]
    nonfinite: int
    changed_nonfinite: int

    def deltas(self) -> list[np.ndarray]:
        if self.base is None:
            return [self.first - self.second]
        return [self.first - self.base, self.second - self.base]


class _Pair:
    """The values of one tensor in two or three models."""

    def __init__(self, name: str, first: Checkpoint, second: Checkpoint, base: Checkpoint | None) -> None:
        self.name = name
        self.models = [first, second] + ([base] if base is not None else [])
        infos = [m.tensors[name] for m in self.models]
        self.elements = infos[0].elements
        self.dtypes = [i.dtype for i in infos]
        step = math.lcm(*(m.granularity(name) for m in self.models))
        self.ranges = list(block_ranges(self.elements, step))

    def block(self, start: int, stop: int) -> _Block:
        raws = [m.read(self.name, start, stop) for m in self.models]
        wide = [cast.widen(r, d) for r, d in zip(raws, self.dtypes, strict=True)]
        if any(w.dtype == np.float64 for w in wide):
            wide = [w.astype(np.float64, copy=False) for w in wide]
        changed = bad = 0
        if not all(map(_finite, wide)):
            finite = np.isfinite(wide[0])
            for values in wide[1:]:
                finite &= np.isfinite(values)
            bad = int(finite.size - np.count_nonzero(finite))
            a, b = wide[0][~finite], wide[1][~finite]
            changed = int(np.count_nonzero((a != b) & ~(np.isnan(a) & np.isnan(b))))
            wide = [w[finite] for w in wide]
            raws = [r[finite] for r in raws]
        base = wide[2] if len(wide) == 3 else None
        same = self.dtypes[0] == self.dtypes[1] and self.dtypes[0] in {"BF16", "F16"}
        plain = same and all(r.dtype.itemsize == 2 for r in raws[:2])
        codes = (self.dtypes[0], self.dtypes[1]) if plain else None
        return _Block(wide[0], wide[1], base, codes, (raws[0], raws[1]), bad, changed)


def _finite(values: np.ndarray) -> bool:
    return bool(np.isfinite(values).all())


def _one_step(raw: tuple[np.ndarray, np.ndarray]) -> int:
    """Count entries whose 16-bit patterns are neighbours on the number line; both zeros are one point."""
    order = []
    for values in raw:
        bits = values.view(np.int16)
        sign = bits >> np.int16(15)
        order.append(((bits & np.int16(0x7FFF)) ^ sign) - sign)
    # The distance is at most 65,534, so that its 16 bits say 1 or -1 only where it is.
    distance = order[0] - order[1]
    return int(np.count_nonzero((distance == 1) | (distance == -1)))


def compare_tensor(
    name: str, first: Checkpoint, second: Checkpoint, base: Checkpoint | None = None, anatomy: bool = True
) -> Values:
    """Compare one tensor of equal shape; reads it once, or twice where a density needs a threshold.

    Tensors of other types than floats give ``elements`` and ``changed`` only.
    """
    families = {DTYPES[m.tensors[name].dtype].family for m in (first, second, base) if m is not None}
    if families != {"float"}:
        return _compare_bytes(name, first, second)
    pair = _Pair(name, first, second, base)
    found = Values(tensors=1, elements=pair.elements, delta_second=Anatomy() if base is not None else None)
    parts = [found.delta] + ([found.delta_second] if found.delta_second is not None else [])
    largest = [_Largest(pair.elements) for _ in parts]
    cached: list[np.ndarray] | None = None
    for start, stop in pair.ranges:
        block = pair.block(start, stop)
        deltas = block.deltas()
        _add_block(found, block, deltas)
        for part, rank, delta in zip(parts, largest, deltas, strict=True):
            part.elements += stop - start
            part.changed += int(np.count_nonzero(delta != 0))
            part.energy += product(delta, delta)
            if anatomy:
                rank.first_pass(delta)
        cached = deltas if len(pair.ranges) == 1 else None
    if anatomy:
        wanted = [rank.needs_second_pass(part.changed) for rank, part in zip(largest, parts, strict=True)]
        for start, stop in pair.ranges if any(wanted) else []:
            deltas = cached if cached is not None else pair.block(start, stop).deltas()
            for rank, delta in zip(largest, deltas, strict=True):
                rank.second_pass(delta)
        for rank, part in zip(largest, parts, strict=True):
            rank.finish(part)
    return found


def _add_block(found: Values, block: _Block, deltas: list[np.ndarray]) -> None:
    a, b = block.first, block.second
    d = deltas[0] if len(deltas) == 1 else a - b
    found.nonfinite += block.nonfinite
    found.changed += int(np.count_nonzero(a != b)) + block.changed_nonfinite
    found.squares += product(d, d)
    found.first += product(a, a)
    found.second += product(b, b)
    found.dot += product(a, b)
    if d.size:
        found.max_abs = max(found.max_abs, float(np.abs(d).max()))
    if block.codes is not None:
        found.one_step += _one_step(block.raw)
        found.stepped += a.size
    if len(deltas) == 2:
        ours, theirs = deltas
        found.task_dot += product(ours, theirs)
        both = (ours != 0) & (theirs != 0)
        found.both += int(np.count_nonzero(both))
        found.conflicts += int(np.count_nonzero(both & (np.signbit(ours) != np.signbit(theirs))))


def _compare_bytes(name: str, first: Checkpoint, second: Checkpoint) -> Values:
    ours, theirs = first.tensors[name], second.tensors[name]
    found = Values(tensors=1, elements=ours.elements)
    if ours.nbytes != theirs.nbytes or ours.dtype != theirs.dtype:
        found.changed = found.elements
        return found
    width = max(1, DTYPES[ours.dtype].bits // 8)
    for start, stop in block_ranges(ours.nbytes, width, 8 << 20):
        a, b = first.read_bytes(name, start, stop), second.read_bytes(name, start, stop)
        differing = (a != b).reshape(-1, width).any(axis=1)
        found.changed += int(np.count_nonzero(differing))
    found.changed = min(found.changed, found.elements)
    return found


def compare_values(
    first: Checkpoint,
    second: Checkpoint,
    names: Iterable[str],
    *,
    base: Checkpoint | None = None,
    anatomy: bool = True,
    threads: int = 1,
    progress: Progress | None = None,
) -> dict[str, Values]:
    """Compare the values of the named tensors; a tensor the base lacks in this shape is compared without it.

    Memory: about 40 bytes per element of one block and thread, whatever the model's size.
    """

    def work(name: str) -> Values:
        usable = base is not None and name in base.tensors and base.tensors[name].shape == first.tensors[name].shape  # fmt: skip
        found = compare_tensor(
            name, first, second, base if usable else None, anatomy and (usable or base is None)
        )
        if base is not None and not usable:
            found.delta = Anatomy()  # it would be the anatomy of another delta
        return found

    def cost(name: str) -> int:
        return first.tensors[name].nbytes + second.tensors[name].nbytes

    return each_tensor(names, work, cost, threads, progress)


def grouped(values: Mapping[str, Values], by: str) -> dict[str, Values]:
    """Add up per-tensor figures by "layer", "kind" or "tensor"."""
    if by == "tensor":
        return dict(values)
    groups: dict[tuple, tuple[str, Values]] = {}
    for name, found in values.items():
        if by == "kind":
            kind = traits.part_of(name)
            key, label = (traits.PARTS.index(kind),), kind
        else:
            place = naming.layer_of(name)
            key = (place.stack, place.index) if place else ("", -1)
            label = f"{place.stack}.{place.index}" if place else "outside layers"
        groups.setdefault(key, (label, Values()))[1].add(found)
    return {label: total for _, (label, total) in sorted(groups.items())}


def total(values: Mapping[str, Values]) -> Values:
    """Add up the figures of all tensors."""
    found = Values()
    for entry in values.values():
        found.add(entry)
    return found
