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

import itertools

import merge_models as mm
import pytest
import torch

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
        "ties",
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
        "ulp",
        OTHERS % ("weight: 0.3", "weight: 0.9")
        + "parameters: {nuslerp_flatten: false, nuslerp_row_wise: true}\n",
    ),
    "nuslerp-columns": (
        "ulp",
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
        "ulp",
        "models: [{model: $a}, {model: $b}]\nbase_model: $base\nparameters: {filter_wise: true}\n",
    ),
    "sce": ("ulp", "models: [{model: $a}, {model: $b}, {model: $c}]\nbase_model: $base\n"),
    "sce-top": (
        "sce",
        "models: [{model: $a}, {model: $b}]\nbase_model: $base\nparameters: {select_topk: 0.3}\n",
    ),
    "nearswap": ("exact", "models: [{model: $a}]\nbase_model: $base\nparameters: {t: 0.01}\n"),
    "arcee_fusion": ("fusion", BASE_FIRST),
    "ram": ("exact", "models: [{model: $a}, {model: $b}]\nbase_model: $base\nparameters: {epsilon: 0.01}\n"),
    "ramplus_tl": (
        "fusion",
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
ULPS = {"float32": 64.0, "bfloat16": 4.0, "float16": 4.0}
"""Allowed for the class "ulp": mergekit accumulates norms in float32 or rounds each step."""


def check(kind: str, text: str, place, models, *, tie_share: float = 0.0, convert=None, **common) -> mm.Deviation:
    base, a, b, c = models
    text = mm.fill(text, base=base, a=a, b=b, c=c)
    results = mm.run_both(text, place, common)
    ours, theirs = mm.tensors(results.ours), mm.tensors(results.theirs)
    if convert is not None:
        theirs = convert(theirs)
    if kind == "fusion":
        # mergekit writes float32 here whatever dtype says; only the numbers can be compared.
        assert {t.dtype for t in theirs.values()} >= {torch.float32} or "out_dtype" in text
        theirs = {n: t.to(ours[n].dtype) for n, t in theirs.items()}
    found = mm.deviation(ours, theirs)
    precision = str(next(iter(ours.values())).dtype).removeprefix("torch.")
    print(f"DEVIATION {kind} {precision} unequal={found.unequal:.4g} ulps={found.ulps:.4g}")
    if kind in {"exact", "fusion"}:
        assert found.unequal == 0, found
    elif kind in {"ties", "sce"}:
        assert found.unequal <= tie_share, found
    elif kind == "ulp":
        assert found.ulps <= ULPS[precision], found
    check_folder(results, text)
    return found


CONFIG_DIFFERENCES = {"transformers_version"}


def check_folder(results: mm.Results, text: str) -> None:
    """Config keys, tokenizer, recipe and model card."""
    ours, theirs = mm.config_of(results.ours), mm.config_of(results.theirs)
    unlike = {k for k in {*ours, *theirs} if ours.get(k) != theirs.get(k)} - CONFIG_DIFFERENCES
    assert not unlike, {k: (ours.get(k), theirs.get(k)) for k in unlike}
    names = {p.name for p in results.ours.iterdir()}
    assert {p.name for p in results.theirs.iterdir()} <= names
    assert {"README.md", "mergekit_config.yml", "surgeon.json", "SHA256SUMS"} <= names
    for name in ("tokenizer.json", "generation_config.json"):
        if (results.theirs / name).exists():
            assert (results.ours / name).read_bytes() == (results.theirs / name).read_bytes()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_in_every_precision(method, precision, tmp_path):
    stored, header = PRECISIONS[precision]
    kind, body = METHODS[method]
    text = f"merge_method: {method.partition('-')[0]}\n{header}{body}"
    # Deltas of bfloat16 weights fall on few values and tie with the threshold; float32 deltas do not.
    share = 0.12 if stored == "bfloat16" or precision == "float16" else 0.0
    check(kind, text, tmp_path, mm.family("llama", stored), tie_share=share)
