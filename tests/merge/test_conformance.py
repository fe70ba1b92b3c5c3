"""A corpus of mergekit YAMLs through mergekit 0.1.5 and through surgeon: names, shapes, types, values.

Classes of equality:

    exact     every bit
    ties      every bit, except where magnitudes tie with the threshold (bfloat16 deltas do)
    ulp       a few units in the last place: methods with norms, whose sums mergekit rounds
    random    the same distribution: random masks

Deliberate differences have their own tests, here and in the neighbouring files; each is listed
in docs/mergekit.md.
"""

from __future__ import annotations

import merge_models as mm
import pytest
import torch
import yaml

LISTED = "models: [{model: $base}, {model: $a, parameters: {%s}}, {model: $b, parameters: {%s}}]\nbase_model: $base\n"
OTHERS = "models: [{model: $a, parameters: {%s}}, {model: $b, parameters: {%s}}]\nbase_model: $base\n"
ONE = "models: [{model: $a, parameters: {%s}}]\nbase_model: $base\n"
ALONE = "models: [{model: $a, parameters: {%s}}, {model: $b, parameters: {%s}}]\n"
BASE_FIRST = "models: [{model: $base}, {model: $a}]\nbase_model: $base\n"

METHODS: dict[str, tuple[str, str]] = {
    "linear": ("exact", ALONE % ("weight: 0.3", "weight: 0.9")),
    "linear-raw": ("exact", ALONE % ("weight: 1.3", "weight: -0.4") + "parameters: {normalize: false}\n"),
    "linear-base": (
        "exact",
        "models: [{model: $a}, {model: $b}, {model: $base}]\nbase_model: $base\nparameters: {weight: 0.7}\n",
    ),
    "task_arithmetic": ("exact", OTHERS % ("weight: 0.3", "weight: 0.9")),
    "task_arithmetic-lambda": (
        "exact",
        LISTED % ("weight: 0.5", "weight: -0.4") + "parameters: {lambda: 0.6}\n",
    ),
    "task_arithmetic-normalized": (
        "exact",
        OTHERS % ("weight: 0.5", "weight: 0.4") + "parameters: {normalize: true}\n",
    ),
    "ties": ("ties", OTHERS % ("weight: 0.3, density: 0.4", "weight: 0.9, density: 0.7")),
    "ties-one": ("ties", ONE % "weight: 1, density: 0.2" + "parameters: {lambda: 0.8}\n"),
    "ties-dense": ("exact", OTHERS % ("weight: 0.3", "weight: 0.9")),
    "ties-raw": (
        "few",
        LISTED % ("weight: 0.3, density: 0.3", "weight: -0.9, density: 0.5")
        + "parameters: {normalize: false, rescale: true, int8_mask: true, lambda: 1.2}\n",
    ),
    "dare_ties-dense": ("exact", OTHERS % ("weight: 0.3", "weight: 0.9")),
    "dare_linear-dense": ("exact", OTHERS % ("weight: 0.3, density: 1.0", "weight: 0.9, density: 1.0")),
    "breadcrumbs": (
        "ties",
        OTHERS % ("weight: 0.3, density: 0.5, gamma: 0.05", "weight: 0.9, density: 0.5, gamma: 0.1"),
    ),
    "breadcrumbs_ties": ("ties", OTHERS % ("weight: 0.3, density: 0.8", "weight: 0.9, density: 0.6")),
    "slerp": ("ulp", BASE_FIRST + "parameters: {t: 0.3}\n"),
    "slerp-outside": ("ulp", BASE_FIRST + "parameters: {t: 1.4}\n"),
    "nuslerp": ("ulp", ALONE % ("weight: 0.3", "weight: 0.9")),
    "nuslerp-base": ("ulp", OTHERS % ("weight: 0.3", "weight: 0.9")),
    "nuslerp-rows": (
        "vectors",
        OTHERS % ("weight: 0.3", "weight: 0.9")
        + "parameters: {nuslerp_flatten: false, nuslerp_row_wise: true}\n",
    ),
    "nuslerp-columns": (
        "vectors",
        ALONE % ("weight: 0.3", "weight: 0.9") + "parameters: {nuslerp_flatten: false}\n",
    ),
    "multislerp": ("ulp", ALONE % ("weight: 0.3", "weight: 0.9")),
    "multislerp-base": (
        "ulp",
        OTHERS % ("weight: 0.3", "weight: 0.9") + "parameters: {normalize_weights: false}\n",
    ),
    "karcher": ("ulp", "models: [{model: $a}, {model: $b}, {model: $c}]\nparameters: {max_iter: 15, tol: 1e-6}\n"),
    "karcher-base": ("ulp", "models: [{model: $a}, {model: $b}]\nbase_model: $base\n"),
    "model_stock": ("ulp", "models: [{model: $a}, {model: $b}, {model: $c}]\nbase_model: $base\n"),
    "model_stock-rows": (
        "vectors",
        "models: [{model: $a}, {model: $b}]\nbase_model: $base\nparameters: {filter_wise: true}\n",
    ),
    "sce": ("ulp", "models: [{model: $a}, {model: $b}, {model: $c}]\nbase_model: $base\n"),
    "sce-top": (
        "few",
        "models: [{model: $a}, {model: $b}]\nbase_model: $base\nparameters: {select_topk: 0.3}\n",
    ),
    "nearswap": ("exact", "models: [{model: $a}]\nbase_model: $base\nparameters: {t: 0.01}\n"),
    "arcee_fusion": ("widened", BASE_FIRST),
    "ram": ("exact", "models: [{model: $a}, {model: $b}]\nbase_model: $base\nparameters: {epsilon: 0.01}\n"),
    "ramplus_tl": (
        "widened",
        "models: [{model: $a}, {model: $b}]\nbase_model: $base\nparameters: {r: 0.2, alpha: 0.3, epsilon: 0.01}\n",
    ),
    "passthrough": ("exact", "models: [{model: $a}]\n"),
    "passthrough-scale": ("exact", "models: [{model: $a, parameters: {scale: 0.5}}]\n"),
}
PRECISIONS = {
    "bfloat16": ("bfloat16", "dtype: bfloat16\n"),
    "float32": ("float32", "dtype: float32\n"),
    "float32-to-bfloat16": ("float32", "dtype: float32\nout_dtype: bfloat16\n"),
    "bfloat16-in-float32": ("bfloat16", "dtype: torch.float32\nout_dtype: torch.bfloat16\n"),
    "float16": ("float32", "dtype: float16\n"),
    "as-stored": ("float32", ""),
    "as-stored-bfloat16": ("bfloat16", ""),
}


def ties_with_threshold(base, model, density: float, gamma: float | None, dtype):
    """Return a function: tensor name -> mask of entries whose delta ties with a border of the kept band."""

    def mask(name: str) -> torch.Tensor:
        delta = (model[name].to(dtype) - base[name].to(dtype)).abs()
        count = delta.numel()
        keep = int(density * count) if gamma is not None else max(1, int(density * count))
        top = int((gamma or 0) * count)
        bottom = max(0, count - keep - top)
        order = delta.float().reshape(-1).sort().values
        borders = [i for i in (bottom - 1, bottom, bottom + keep - 1, bottom + keep) if 0 <= i < count]
        return torch.isin(delta.float(), order[borders])

    return mask


def check(kind: str, text: str, place, models, *, convert=None, bands=(), **common) -> mm.Deviation:
    """Merge with both; compare what their class of equality promises, and everything beside the weights.

    Args:
        bands: (model, density, gamma or None) of the trimmed models, for the class "ties".
    """
    folders = dict(zip(("base", "a", "b", "c"), models, strict=True))
    text = mm.fill(text, **folders)
    results = mm.run_both(text, place, common)
    ours, theirs = mm.tensors(results.ours), mm.tensors(results.theirs)
    states = {n: mm.tensors(f) for n, f in folders.items()}
    if convert is not None:
        theirs = convert(theirs)
    if kind == "widened":
        # mergekit writes float32 here whatever dtype says; only the numbers can be compared.
        theirs = {n: t.to(ours[n].dtype) for n, t in theirs.items()}
    settings = yaml.safe_load(text)
    stored = next(iter(states["a"].values())).dtype
    work = mm.DTYPES.get(str(settings.get("dtype")).removeprefix("torch."), stored)
    masks = [ties_with_threshold(states["base"], states[n], d, g, work) for n, d, g in bands]
    tied = (lambda name: torch.stack([m(name) for m in masks]).any(0)) if masks else None
    found = mm.deviation(ours, theirs, states.values(), tied)
    precision = str(next(iter(ours.values())).dtype).removeprefix("torch.")
    print(f"DEVIATION {kind} {precision} {work} {found}")
    wide = precision == "float32"
    if kind == "exact" or (kind == "ties" and not bands) or kind == "widened":
        assert found.unequal == 0, found
    elif kind == "ties":
        assert found.outside == 0, found
    elif kind == "ulp":
        assert found.relative <= 2e-6 if wide else found.ulps <= 6, found
    elif kind == "vectors":
        assert found.relative <= 4e-6 if wide else found.ulps <= 16, found
    elif kind == "few":
        assert found.loose <= (0.002 if wide else 0.1), found
    check_folder(results, text)
    return found


CONFIG_DIFFERENCES = {"transformers_version"}


def check_folder(results: mm.Results, text: str) -> None:
    """Config keys, tokenizer, recipe and model card."""
    ours, theirs = mm.config_of(results.ours), mm.config_of(results.theirs)
    # mergekit writes a "torch." prefix of the YAML into config.json; nothing else does.
    theirs["dtype"] = theirs["dtype"].removeprefix("torch.")
    unlike = {k for k in {*ours, *theirs} if ours.get(k) != theirs.get(k)} - CONFIG_DIFFERENCES
    assert not unlike, {k: (ours.get(k), theirs.get(k)) for k in unlike}
    names = {p.name for p in results.ours.iterdir()}
    assert {p.name for p in results.theirs.iterdir()} <= names
    assert {"README.md", "mergekit_config.yml", "surgeon.json", "SHA256SUMS"} <= names
    for name in ("tokenizer.json", "generation_config.json"):
        if (results.theirs / name).exists():
            assert (results.ours / name).read_bytes() == (results.theirs / name).read_bytes()


BANDS = {
    "ties": (("a", 0.4, None), ("b", 0.7, None)),
    "ties-one": (("a", 0.2, None),),
    "breadcrumbs": (("a", 0.5, 0.05), ("b", 0.5, 0.1)),
    "breadcrumbs_ties": (("a", 0.8, 0.01), ("b", 0.6, 0.01)),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_in_every_precision(method, precision, tmp_path):
    stored, header = PRECISIONS[precision]
    kind, body = METHODS[method]
    text = f"merge_method: {method.partition('-')[0]}\n{header}{body}"
    check(kind, text, tmp_path, mm.family("llama", stored), bands=BANDS.get(method, ()))
