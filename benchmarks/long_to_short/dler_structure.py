"""DLER's structure: which entries its merge keeps, and what is left of its scale in bfloat16.

Every figure comes twice: from what surgeon reports of a real run over files, and from sorting the
whole difference in NumPy.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import surgeon
from surgeon.architectures.naming import layer_of

WEIGHT_SPREAD = 0.02  # standard deviation of the weights of a Qwen2.5-sized linear layer
KEEP = 0.25
SCALE = 0.7
SPREADS = (1e-5, 3e-5, 1e-4, 1e-3)


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Return values rounded to bfloat16, as float32; torch's rounding, not ours."""
    return torch.from_numpy(np.asarray(values, np.float32)).to(torch.bfloat16).float().numpy()


@dataclass(frozen=True)
class Figures:
    """What one merge did to one set of entries.

    Attributes:
        changed, kept: shares of the entries that differ, and that pass the trim.
        threshold: the smallest |d| kept, 0 where everything that changed is kept.
        energy: share of the sum of squares of d that is kept.
        effective: scale -> sum |y - b| / sum |M d|, the scale that really came out.
    """

    changed: float
    kept: float
    threshold: float
    energy: float
    effective: dict[float, float]


def simulated_pair(spread: float, entries: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return b and e [entries]: N(0, 0.02^2) weights, a float32 change of N(0, spread^2), both cast to bfloat16."""
    rng = np.random.default_rng(seed)
    base = to_bf16(rng.normal(0, WEIGHT_SPREAD, entries))
    return base, to_bf16(base + rng.normal(0, spread, entries).astype(np.float32))


def by_sorting(
    base: np.ndarray, tuned: np.ndarray, *, ties: str = "even", scales: tuple[float, ...] = (SCALE, 0.4)
) -> Figures:
    """Return the figures by sorting |d| of the whole tensor.

    Args:
        ties: of the entries equal to the threshold, keep as many as the count asks for ("even",
            any choice of them gives the same figures up to noise), or "all".
    """
    delta = tuned.astype(np.float64) - base
    size = np.abs(delta)
    count = max(1, int(KEEP * delta.size))
    order = np.argsort(-size, kind="stable")
    threshold = size[order[count - 1]]
    if ties == "all":
        mask = (size >= threshold) & (size > 0)
    else:
        mask = size > threshold
        tied = np.flatnonzero(size == threshold)
        quota = count - int(mask.sum())
        mask[tied[(np.arange(quota) * len(tied)) // max(1, quota)]] = True
        mask &= size > 0
    kept = np.where(mask, delta, 0.0)
    effective = {
        scale: float(np.abs(to_bf16(base + np.float32(scale) * kept.astype(np.float32)) - base).sum(dtype=np.float64)
                     / np.abs(kept).sum())
        for scale in scales
    }  # fmt: skip
    return Figures(
        float(np.mean(delta != 0)), float(np.mean(mask)), float(threshold),
        float(np.square(kept).sum() / np.square(delta).sum()), effective,
    )  # fmt: skip


def write_tensor(file: Path, values: np.ndarray) -> Path:
    """Write one bfloat16 tensor "w" as a bare file."""
    columns = 1024 if values.size % 1024 == 0 else values.size
    tensor = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16).reshape(-1, columns)
    save_file({"w": tensor}, file, metadata={"format": "pt"})
    return file


def read_tensor(file: Path) -> np.ndarray:
    return load_file(file)["w"].double().numpy().reshape(-1)


def measured(
    base: np.ndarray, tuned: np.ndarray, place: Path, scales: tuple[float, ...] = (SCALE, 0.4)
) -> Figures:
    """Return the figures surgeon reports of its own dler merges of two bare files."""
    files = [write_tensor(place / "tuned.safetensors", tuned), write_tensor(place / "base.safetensors", base)]
    effective: dict[float, float] = {}
    facts: dict[str, float] = {}
    threshold = math.nan
    for scale in scales:
        out = place / "merged.safetensors"
        done = surgeon.merge(list(map(str, files)), method="dler", output=out, overwrite=True, threads=1,
                             density=(KEEP,), param={"scale": scale})  # fmt: skip
        facts = done.summaries[""]["w"]
        effective[scale] = facts["effective_scale"]
        if scale == SCALE:
            moved = read_tensor(out) != base
            threshold = float(np.abs(tuned.astype(np.float64) - base)[moved].min()) if facts["trims"] else 0.0
    return Figures(facts["changed_share"], facts["kept_share"], threshold, facts["energy_kept"], effective)


def stochastic_scales(
    base: np.ndarray, tuned: np.ndarray, place: Path, scale: float, seeds: int
) -> tuple[float, float]:
    """Return the effective scale of one stochastically rounded merge, and of the mean over seeds.

    The mean's is sum(mean(y - b) sign(d)) / sum |M d|: noise does not count as movement.
    """
    files = [write_tensor(place / "tuned.safetensors", tuned), write_tensor(place / "base.safetensors", base)]
    total = np.zeros(base.size)
    single, kept_l1 = 0.0, 1.0
    for seed in range(seeds):
        out = place / "merged.safetensors"
        done = surgeon.merge(list(map(str, files)), method="dler", output=out, overwrite=True, threads=1, seed=seed,
                             density=(KEEP,), param={"scale": scale, "rounding": "stochastic"})  # fmt: skip
        facts = done.summaries[""]["w"]
        single, kept_l1 = facts["effective_scale"], facts["kept_l1"]
        total += read_tensor(out) - base
    return single, float((total / seeds * np.sign(tuned.astype(np.float64) - base)).sum() / kept_l1)


# ---- the trained models ------------------------------------------------------------------------

KINDS = (
    ("embed", "embedding"),
    ("norm", "norms"),
    ("bias", "biases"),
    ("self_attn", "attention"),
    ("mlp", "mlp"),
)


def kind_of(name: str) -> str:
    """Return which part of a decoder a tensor belongs to, in the words of the tables."""
    return next((label for word, label in KINDS if word in name), "other")


@dataclass(frozen=True)
class ScopeFigures:
    """Shares over a whole model, and the share of the entries kept in each part of it."""

    changed: float
    kept: float
    energy: float
    effective: float
    by_kind: dict[str, float]
    lowest: tuple[str, float]


def merge_scope(
    tuned: Path, base: Path, place: Path, scope: str
) -> tuple[ScopeFigures, dict[str, np.ndarray]]:
    """Merge one trained model into another with dler; return surgeon's figures and the kept masks.

    A mask holds where the merged model differs from the base.
    """
    out = place / f"{tuned.name}-{base.name}-{scope}"
    done = surgeon.merge([str(tuned), str(base)], method="dler", output=out, overwrite=True, threads=1,
                         density=(KEEP,), param={"scale": SCALE, "scope": scope})  # fmt: skip
    rows: dict[str, dict[str, float]] = done.summaries[""]
    total = {key: sum(row[key] for row in rows.values())
             for key in ("elements", "changed", "kept", "energy", "kept_energy", "kept_l1", "moved_l1")}  # fmt: skip
    counts: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for name, row in rows.items():
        counts[kind_of(name)][0] += row["kept"]
        counts[kind_of(name)][1] += row["elements"]
    lowest = min(((row["kept"] / row["elements"], name) for name, row in rows.items()))
    return (
        ScopeFigures(
            total["changed"] / total["elements"], total["kept"] / total["elements"],
            total["kept_energy"] / total["energy"], total["moved_l1"] / total["kept_l1"],
            {kind: kept / n for kind, (kept, n) in sorted(counts.items())}, (lowest[1], lowest[0]),
        ),
        {name: t.double().numpy() for name, t in model_tensors(out).items()},
    )  # fmt: skip


def model_tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def scope_by_sorting(tuned: Path, base: Path, scope: str) -> tuple[float, float, float]:
    """Return kept share, energy kept and effective scale, by sorting every set of entries in whole.

    Entries that tie with the threshold are interchangeable for these figures up to the rounding of
    a few of them, which is why the kept share is exact and the others are not.
    """
    e, b = ({n: t.double().numpy() for n, t in model_tensors(m).items()} for m in (tuned, base))
    groups: dict[str, list[str]] = defaultdict(list)
    for name in b:
        place = layer_of(name)
        key = (
            name
            if scope == "tensor"
            else "all"
            if scope == "global"
            else str(place.index if place else "outside")
        )
        groups[key].append(name)
    kept = energy = total = moved = kept_l1 = count = 0.0
    for names in groups.values():
        origin = np.concatenate([b[n].reshape(-1) for n in names])
        delta = np.concatenate([(e[n] - b[n]).reshape(-1) for n in names])
        size = np.abs(delta)
        order = np.argsort(-size, kind="stable")[: max(1, int(KEEP * delta.size))]
        chosen = np.zeros(delta.size)
        chosen[order] = delta[order]
        result = to_bf16((origin + SCALE * chosen).astype(np.float32))
        kept += np.count_nonzero(chosen)
        energy += np.square(chosen).sum()
        total += np.square(delta).sum()
        moved += np.abs(result - origin).sum()
        kept_l1 += np.abs(chosen).sum()
        count += delta.size
    return kept / count, energy / total, moved / kept_l1


# ---- the released long-to-short code -------------------------------------------------------------


def released_trim_count(size: np.ndarray, removed: float) -> int:
    """Return how many entries the released long-to-short code keeps: |d| >= the floor(N k)-th smallest value.

    Without ties that is N - floor(N k) + 1: the threshold itself is kept, and everything equal to it.
    Entries of 0 are not counted; they change nothing.
    """
    rank = int(size.size * removed)
    if rank < 1:
        return int(np.count_nonzero(size))
    return int(((size >= np.sort(size)[rank - 1]) & (size > 0)).sum())


def ties_count(base: np.ndarray, tuned: np.ndarray, density: float) -> int:
    """Return how many entries surgeon's ties keeps, counted in its result; lambda 1 moves each kept one."""
    states = [{"w": torch.from_numpy(np.asarray(v, np.float32))} for v in (tuned, base)]
    merged = surgeon.merge(states, method="ties", density=(density,), threads=1)
    assert isinstance(merged, dict)
    return int((merged["w"] != states[1]["w"]).sum())
