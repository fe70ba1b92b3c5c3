"""ReCUT's structure: what its released merge does, and how far plain interpolation of siblings carries.

A = the accuracy specialist, L = the length specialist, b = what both were trained from, d = x - b.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import surgeon
from surgeon import api
from surgeon.recipe import mergekit_yaml

DENSITY = 0.25

RELEASED = """\
merge_method: dare_ties
base_model: {base}
models:
  - model: {model}
    parameters: {{density: 0.25, weight: {weight}}}
parameters: {{normalize: {normalize}, lambda: {lam}}}
dtype: {dtype}
"""
"""The file ReCUT released with its paths filled in; weight 0.25, normalize true, lambda unset there."""


def run_yaml(text: str, out: Path, seed: int = 0) -> Path:
    """Run one mergekit file with surgeon."""
    (spec,), _ = mergekit_yaml.parse(text, "recut.yaml")
    api.plan_spec(spec, api.build_request(models=(), seed=seed)).run(out, threads=1, overwrite=True)
    return out


def released(
    model: Path, base: Path, out: Path, *, weight: float = 0.25, lam: float = 1.0, normalize: bool = True,
    dtype: str = "bfloat16", seed: int = 0,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Return the tensors of the released recipe with one model over one base."""
    text = RELEASED.format(model=model, base=base, weight=weight, lam=lam, normalize=str(normalize).lower(), dtype=dtype)  # fmt: skip
    return load_file(run_yaml(text, out, seed) / "model.safetensors")


# ---- two entries: how often is an update applied ---------------------------------------------------


@dataclass(frozen=True)
class Survival:
    """Shares of positions where neither, one or both of two updates survived, and the mean result.

    ``mean`` is in units of d_A + d_L.
    """

    none: float
    once: float
    both: float
    mean: float


def survival(entries: int, seed: int = 0, *, opposed: bool = False) -> Survival:
    """Merge A (d = 1) and L (d = 2, or -2) over b = 0 with the released two-entry recipe and count.

    A lone update comes out whole, times about 4; where both survive and agree, as their mean,
    and where they are opposed, as the larger one. So each case shows in its value.
    """
    shape = (entries // 1024, 1024)
    long = -2.0 if opposed else 2.0
    states = [{"w": torch.full(shape, v)} for v in (1.0, long, 0.0)]
    merged = surgeon.merge(states[:2], method="dare-ties", base=states[2], density=(DENSITY,), weight=(0.25, 0.25),
                           normalize=True, seed=seed, param={"lambda": 1.0, "rescale": True}, threads=1)  # fmt: skip
    assert isinstance(merged, dict)
    values = merged["w"].double().numpy().reshape(-1) * DENSITY
    lone_a, lone_l = np.abs(values - 1) < 0.2, np.abs(values - long) < 0.2
    none = values == 0
    if opposed:  # both: L alone is applied, which looks like L alone; the streams tell the two apart
        from surgeon.seeds import stream_key, uniform

        drawn = [uniform(stream_key(seed, i, "w"), 0, values.size) < DENSITY for i in (0, 1)]
        both = drawn[0] & drawn[1]
        lone_l &= ~both
    else:
        both = np.abs(values - 1.5) < 0.2
    total = lone_a.sum() + lone_l.sum() + both.sum() + none.sum()
    assert total == values.size, "a value that belongs to no case"
    return Survival(
        float(none.mean()), float((lone_a | lone_l).mean()), float(both.mean()),
        float(values.mean() / DENSITY / (1 + long)),
    )  # fmt: skip


# ---- one entry: which specialist comes out --------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """Distances of the released one-entry merge from its two ends, in units of |A - L|.

    Attributes:
        single_to_model, single_to_base: of one merged model (one seed).
        mean_to_model, mean_to_base: of the mean over the seeds.
        along: how far the mean lies on the way from base to model: <mean - base, A - L> / |A - L|^2.
    """

    single_to_model: float
    single_to_base: float
    mean_to_model: float
    mean_to_base: float
    along: float


def reading_a(
    model: Path, base: Path, place: Path, seeds: int, *, lam: float = 1.0, dtype: str = "float32"
) -> Reading:
    """Average the released recipe over seeds; base and model are the two specialists."""
    ends = [{n: t.double() for n, t in tensors(folder).items()} for folder in (model, base)]
    total: dict[str, torch.Tensor] = {}
    single: dict[str, torch.Tensor] = {}
    for seed in range(seeds):
        single = released(model, base, place / "reading-a", lam=lam, dtype=dtype, seed=seed)
        for name, tensor in single.items():
            total[name] = total.get(name, torch.zeros(())) + tensor.double()
    mean = {n: t / seeds for n, t in total.items()}
    one = {n: t.double() for n, t in single.items()}
    span = distance(ends[0], ends[1])
    along = sum(float(((mean[n] - ends[1][n]) * (ends[0][n] - ends[1][n])).sum()) for n in mean) / span**2
    return Reading(distance(one, ends[0]) / span, distance(one, ends[1]) / span, distance(mean, ends[0]) / span,
                   distance(mean, ends[1]) / span, along)  # fmt: skip


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float((a[n].double() - b[n].double()).square().sum()) for n in a))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


# ---- updates below half a bfloat16 step ---------------------------------------------------------


def gaussian_model(source: Path, out: Path, seed: int = 0) -> Path:
    """Copy a model folder with every matrix replaced by bfloat16 weights from N(0, 0.02^2)."""
    shutil.copytree(source, out)
    generator = torch.Generator().manual_seed(seed)
    state = load_file(source / "model.safetensors")
    for name, tensor in state.items():
        if tensor.ndim == 2:
            state[name] = (torch.randn(tensor.shape, generator=generator) * 0.02).to(torch.bfloat16)
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    return out


def lora(
    base: Path, out: Path, spread: float, seed: int, rank: int = 8, alpha: int = 16
) -> dict[str, torch.Tensor]:
    """Write an adapter on all linear layers with d = s B A of standard deviation ``spread``; return d, float64."""
    generator = torch.Generator().manual_seed(seed)
    size = math.sqrt(spread / (alpha / rank) / math.sqrt(rank))
    factors: dict[str, torch.Tensor] = {}
    deltas: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            continue
        module = name.removesuffix(".weight")
        rows, columns = tensor.shape
        b = torch.randn(rows, rank, generator=generator) * size
        a = torch.randn(rank, columns, generator=generator) * size
        factors[f"base_model.model.{module}.lora_A.weight"] = a
        factors[f"base_model.model.{module}.lora_B.weight"] = b
        deltas[name] = (alpha / rank) * (b.double() @ a.double())
    out.mkdir(parents=True)
    modules = sorted({n.split(".")[-2] for n in deltas})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": modules, "bias": "none",
              "task_type": "CAUSAL_LM", "base_model_name_or_path": base.name, "use_rslora": False, "use_dora": False,
              "fan_in_fan_out": False, "modules_to_save": None}  # fmt: skip
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2))
    save_file(factors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    return deltas


@dataclass(frozen=True)
class Survivors:
    """What a merge left of an update d.

    Attributes:
        changed: share of the adapted entries that differ from the base.
        length: |y - b| / |d|.
        along: <y - b, d> / |d|^2, 1 when all of d arrived (in the mean, for a mean over seeds).
        largest: the largest |y - b| / |d| where d is not 0, in units of the largest |d|.
    """

    changed: float
    length: float
    along: float
    largest: float


def survivors(moved: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> Survivors:
    """Compare y - b with the d that was meant, over all adapted tensors."""
    y = torch.cat([moved[n].double().reshape(-1) for n in wanted])
    d = torch.cat([wanted[n].reshape(-1) for n in wanted])
    return Survivors(float((y != 0).double().mean()), float(y.norm() / d.norm()), float(y @ d / (d @ d)),
                     float(y.abs().max() / d.abs().max()))  # fmt: skip


def erasure(source: Path, place: Path, spread: float = 1e-6, seeds: int = 16) -> dict[str, Survivors]:
    """Merge two adapters of tiny updates in several ways; return what is left of (d_A + d_L) / 2 in each.

    Rows: adapters folded into bfloat16 models first, then interpolated at t = 0.5; folded in while
    merging, written as float32; the same, written as bfloat16; and, for the one-model case
    d = d_A / 2, stochastic rounding to bfloat16, one seed and the mean.
    """
    base = gaussian_model(source, place / "gaussian")
    deltas = [lora(base, place / name, spread, seed) for seed, name in ((1, "accuracy"), (2, "length"))]
    start = {n: t.double() for n, t in load_file(base / "model.safetensors").items()}
    wanted = {n: (deltas[0][n] + deltas[1][n]) / 2 for n in deltas[0]}
    rounded = []
    for name, delta in zip(("accuracy", "length"), deltas, strict=True):
        folder = place / f"{name}-bf16"
        shutil.copytree(base, folder)
        state = load_file(base / "model.safetensors")
        for tensor, change in delta.items():
            state[tensor] = (start[tensor] + change).float().to(torch.bfloat16)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        rounded.append(folder)

    def moved(models: list[str], **options) -> dict[str, torch.Tensor]:
        out = place / "erasure-out"
        surgeon.merge(models, base=str(base), output=out, overwrite=True, threads=1, **options)
        state = load_file(out / "model.safetensors")
        return {n: state[n].double() - start[n] for n in wanted}

    folded = [f"{base}+{place / name}" for name in ("accuracy", "length")]
    half = {"method": "interpolate", "t": 0.5}
    found = {
        "one adapter folded into bfloat16": survivors(
            {n: load_file(rounded[0] / "model.safetensors")[n].double() - start[n] for n in wanted}, deltas[0]
        ),
        "both folded into bfloat16, then t = 0.5": survivors(moved(list(map(str, rounded)), **half), wanted),
        "both folded in while merging, float32 out": survivors(
            moved(folded, dtype="float32", **half), wanted
        ),
        "both folded in while merging, bfloat16 out": survivors(moved(folded, **half), wanted),
    }
    one = {n: d / 2 for n, d in deltas[0].items()}
    total = {n: torch.zeros_like(d) for n, d in one.items()}
    for seed in range(seeds):
        options = {
            "method": "dler",
            "seed": seed,
            "param": {"keep": 1.0, "scale": 0.5, "rounding": "stochastic"},
        }
        step = moved(folded[:1], **options)
        total = {n: total[n] + step[n] for n in total}
        if seed == 0:
            found["A / 2 folded in, bfloat16 out, stochastic: one seed"] = survivors(step, one)
    found[f"A / 2 folded in, bfloat16 out, stochastic: mean of {seeds}"] = survivors(
        {n: t / seeds for n, t in total.items()}, one
    )
    dare = {"method": "dare-ties", "density": (DENSITY,), "param": {"lambda": 1.0}}
    found["A folded into bfloat16, then released dare_ties"] = survivors(
        moved([str(rounded[0])], **dare), deltas[0]
    )
    return found
