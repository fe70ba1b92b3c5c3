"""A corpus of mergekit YAMLs through mergekit 0.1.5 and through surgeon: names, shapes, types, values.

Classes of equality:

    exact     every bit
    ties      every bit, except where magnitudes tie with the threshold (bfloat16 deltas do)
    ulp       a few units in the last place: methods with norms, whose sums mergekit rounds;
              "vectors" where the norms are those of single rows, "iterated" for karcher
    few       a few entries fall on the other side of a threshold that is itself a rounded sum;
              "fusion" for arcee_fusion, which also comes in float32 from mergekit
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
    "karcher": (
        "iterated",
        "models: [{model: $a}, {model: $b}, {model: $c}]\nparameters: {max_iter: 15, tol: 1e-6}\n",
    ),
    "karcher-base": ("iterated", "models: [{model: $a}, {model: $b}]\nbase_model: $base\n"),
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
    "arcee_fusion": ("fusion", BASE_FIRST),
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
    if kind in {"widened", "fusion"}:
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
        assert found.loose <= (0.002 if wide else 0.15), found
    elif kind == "iterated":
        # mergekit iterates in 16 bits, where near-parallel vectors leave no angle
        assert found.relative <= (2e-6 if wide else 0.03), found
    elif kind == "fusion":
        assert found.unequal <= 0.02, found
    else:
        raise AssertionError(kind)
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


DAILY = {"bfloat16", "float32-to-bfloat16"}


@pytest.mark.parametrize(
    "precision", [p if p in DAILY else pytest.param(p, marks=pytest.mark.slow) for p in PRECISIONS]
)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_in_every_precision(method, precision, tmp_path):
    stored, header = PRECISIONS[precision]
    kind, body = METHODS[method]
    text = f"merge_method: {method.partition('-')[0]}\n{header}{body}"
    check(kind, text, tmp_path, mm.family("llama", stored), bands=BANDS.get(method, ()))


FORMS: dict[str, tuple[str, str, str]] = {
    "gradient-per-model": (
        "linear",
        "exact",
        ALONE % ("weight: [0.1, 0.9, 0.4]", "weight: 0.5"),
    ),
    "gradient-global": ("slerp", "ulp", BASE_FIRST + "parameters: {t: [0, 0.5, 0.3, 0.7, 1]}\n"),
    "gradient-two-points": ("nearswap", "exact", "models: [{model: $a}]\nbase_model: $base\nparameters: {t: [0.001, 0.02]}\n"),
    "gradient-as-text": ("linear", "exact", ALONE % ('weight: ["1e-1", "0.9"]', 'weight: "5e-1"')),
    "filters-and-gradients": (
        "slerp",
        "ulp",
        BASE_FIRST
        + """parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - value: 0.5
""",
    ),
    "filter-per-model": (
        "task_arithmetic",
        "exact",
        """models:
  - model: $a
    parameters:
      weight:
        - {filter: q_proj, value: 0}
        - {filter: layers.1., value: [0.2, 0.4]}
        - {filter: "*", value: 0.9}
  - model: $b
    parameters: {weight: 0.4}
base_model: $base
""",
    ),
    "filter-first-match-wins": (
        "linear",
        "exact",
        ALONE % ("weight: [{filter: mlp, value: 0.2}, {filter: mlp.down, value: 0.9}, {value: 0.4}]", "weight: 1"),
    ),
    "filter-one-mapping": ("linear", "exact", ALONE % ('weight: {filter: "", value: 0.3}', "weight: 0.8")),
    "filter-falls-through-to-global": (
        "ties",
        "ties",
        OTHERS % ("density: [{filter: mlp, value: 0.3}], weight: 1", "weight: 0.5")
        + "parameters: {density: 0.6, normalize: [{filter: self_attn, value: false}, {value: true}]}\n",
    ),
    "global-weight": ("linear", "exact", "models: [{model: $a}, {model: $b}]\nparameters: {weight: 0.6, normalize: false}\n"),
    "per-model-over-global": (
        "task_arithmetic",
        "exact",
        "models: [{model: $a, parameters: {weight: 0.2}}, {model: $b}]\nbase_model: $base\n"
        "parameters: {weight: 0.7, lambda: [0.5, 1.0]}\n",
    ),
    "slice-over-global": (
        "linear",
        "exact",
        """slices:
  - sources: [{model: $a, layer_range: [0, 2]}, {model: $b, layer_range: [0, 2], parameters: {weight: 0.3}}]
    parameters: {weight: 0.9}
  - sources: [{model: $a, layer_range: [2, 4]}, {model: $b, layer_range: [2, 4], parameters: {weight: 0.3}}]
parameters: {weight: [0.2, 0.4]}
""",
    ),
    "module-level": (
        "linear",
        "exact",
        """modules:
  default:
    models: [{model: $a, parameters: {weight: 0.3}}, {model: $b}]
    parameters: {weight: 0.8}
parameters: {weight: 0.1}
""",
    ),
    "booleans-as-text": (
        "task_arithmetic",
        "exact",
        OTHERS % ("weight: 0.3", "weight: 0.5") + 'parameters: {normalize: "true", int8_mask: off}\n',
    ),
    "boolean-gradient": (
        "task_arithmetic",
        "exact",
        OTHERS % ("weight: 0.3", "weight: 0.5") + "parameters: {normalize: [true, false]}\n",
    ),
    "empty-list": ("linear", "exact", "models: [{model: $a, parameters: {weight: []}}, {model: $b}]\nparameters: {weight: 0.6}\n"),
    "parameters-of-other-methods": (
        "linear",
        "exact",
        ALONE % ("weight: 0.3, density: 0.5", "weight: 0.9, gamma: 0.1") + "parameters: {lambda: 0.3, int8_mask: true}\n",
    ),
    "dictionary-reference": (
        "linear",
        "exact",
        "models: [{model: {model: {path: $a}}, parameters: {weight: 0.3}}, {model: $b, parameters: {weight: 1}}]\n",
    ),
    "one-listed-base-not": ("task_arithmetic", "exact", ONE % "weight: 0.7"),
    "base-listed-last": (
        "task_arithmetic",
        "exact",
        "models: [{model: $a, parameters: {weight: 0.7}}, {model: $base}]\nbase_model: $base\n",
    ),
    "base-with-parameters": (
        "ties",
        "ties",
        "models: [{model: $base, parameters: {weight: 1, density: 0.1}}, {model: $a, parameters: {weight: 0.7, density: 0.5}}]\n"
        "base_model: $base\nparameters: {normalize: true}\n",
    ),
    "anchors": (
        "task_arithmetic",
        "exact",
        """models:
  - {model: $a, parameters: &same {weight: 0.4}}
  - {model: $b, parameters: {<<: *same}}
base_model: $base
""",
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_parameter(form, tmp_path):
    method, kind, body = FORMS[form]
    check(kind, f"merge_method: {method}\ndtype: float32\n{body}", tmp_path, mm.family("llama"))


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind_of_model", ["qwen2", "gpt2"])
def test_every_form_of_parameter_in_other_families(form, kind_of_model, tmp_path):
    method, kind, body = FORMS[form]
    if "slices" in body and kind_of_model == "gpt2":
        body = body.replace("[2, 4]", "[1, 3]")
    check(kind, f"merge_method: {method}\ndtype: float32\n{body}", tmp_path, mm.family(kind_of_model))


SLICES: dict[str, tuple[str, str, str]] = {
    "stack": (
        "passthrough",
        "exact",
        """slices:
  - sources: [{model: $a, layer_range: [0, 3]}]
  - sources: [{model: $b, layer_range: [1, 4]}]
""",
    ),
    "repeat-layers": (
        "passthrough",
        "exact",
        "slices:\n" + "".join(f"  - sources: [{{model: $a, layer_range: [{i}, {i + 2}]}}]\n" for i in (0, 1, 1, 2)),
    ),
    "cut-layers": (
        "passthrough",
        "exact",
        "slices:\n  - sources: [{model: $a, layer_range: [0, 1]}]\n  - sources: [{model: $a, layer_range: [3, 4]}]\n",
    ),
    "scale-filters": (
        "passthrough",
        "exact",
        """slices:
  - sources: [{model: $a, layer_range: [0, 3]}]
  - sources:
      - model: $a
        layer_range: [1, 4]
        parameters: {scale: [{filter: o_proj, value: 0.0}, {filter: down_proj, value: 0.0}, {value: 1.0}]}
""",
    ),
    "slerp-filters": (
        "slerp",
        "ulp",
        """slices:
  - sources: [{model: $base, layer_range: [0, 4]}, {model: $a, layer_range: [0, 4]}]
base_model: $base
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - value: 0.5
""",
    ),
    "slerp-shifted": (
        "slerp",
        "ulp",
        """slices:
  - sources: [{model: $base, layer_range: [0, 2]}, {model: $a, layer_range: [1, 3]}]
    parameters: {t: 0.2}
  - sources: [{model: $base, layer_range: [2, 4]}, {model: $a, layer_range: [2, 4]}]
    parameters: {t: [0.3, 0.9]}
base_model: $base
""",
    ),
    "linear-shifted-filters": (
        "linear",
        "exact",
        """slices:
  - sources:
      - {model: $a, layer_range: [0, 2], parameters: {weight: [{filter: layers.0., value: 0.1}, {value: 0.5}]}}
      - {model: $b, layer_range: [2, 4], parameters: {weight: [{filter: layers.2., value: 0.9}, {value: 0.3}]}}
  - sources:
      - {model: $a, layer_range: [3, 4], parameters: {weight: [0.2, 0.6]}}
      - {model: $b, layer_range: [0, 1], parameters: {weight: 1}}
""",
    ),
    "ties-per-slice": (
        "ties",
        "ties",
        """slices:
  - sources:
      - {model: $base, layer_range: [0, 2]}
      - {model: $a, layer_range: [0, 2], parameters: {weight: 1, density: 0.5}}
  - sources:
      - {model: $base, layer_range: [2, 4]}
      - {model: $b, layer_range: [2, 4], parameters: {weight: 1, density: 0.3}}
base_model: $base
""",
    ),
    "base-per-slice": (
        "task_arithmetic",
        "exact",
        """slices:
  - base_model: $c
    sources:
      - {model: $c, layer_range: [0, 2]}
      - {model: $a, layer_range: [0, 2], parameters: {weight: 0.5}}
  - base_model: $base
    residual_weight: 0.3
    sources:
      - {model: $base, layer_range: [2, 4]}
      - {model: $b, layer_range: [2, 4], parameters: {weight: 0.5}}
base_model: $base
""",
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", ["llama", pytest.param("mistral", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SLICES)
def test_slices(name, family, tmp_path):
    method, kind, body = SLICES[name]
    check(kind, f"merge_method: {method}\ndtype: float32\n{body}", tmp_path, mm.family(family))


ELEMENTWISE = ["linear", "task_arithmetic", "nearswap", "ram", "passthrough-scale", "ties-dense"]
REST = ["ties", "breadcrumbs_ties", "slerp", "nuslerp", "multislerp", "model_stock", "sce"]


@pytest.mark.parametrize("method", [*ELEMENTWISE, *(pytest.param(m, marks=pytest.mark.slow) for m in REST)])
@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "gpt2"])
def test_families(family, method, tmp_path):
    kind, body = METHODS[method]
    check(kind, f"merge_method: {method.partition('-')[0]}\n{body}", tmp_path, mm.family(family))


@pytest.mark.parametrize("method", ELEMENTWISE)
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_stay_apart_with_the_values_of_mergekits_fused_ones(family, method, tmp_path):
    """Deliberate difference: mergekit writes fused tensors whatever the inputs hold."""
    kind, body = METHODS[method]
    models = mm.family(family)
    text = f"merge_method: {method.partition('-')[0]}\n{body}"
    check(kind, text, tmp_path, models, convert=lambda state: mm.unfused(state, family))
    assert set(mm.tensors(tmp_path / "ours")) == set(mm.tensors(models[0]))
    mm.load_strict(tmp_path / "ours")


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_statistics_of_experts_are_per_expert(family, tmp_path):
    """Deliberate difference: trimming keeps the density in every expert, mergekit in the fused group."""
    base, a, _b, _c = mm.family(family)
    text = mm.fill("merge_method: ties\n" + ONE % "weight: 1, density: 0.25", base=base, a=a)
    state = mm.tensors(mm.run_surgeon(text, tmp_path / "ours"))
    before = mm.tensors(base)
    experts = [n for n in state if ".experts." in n]
    assert len(experts) == 2 * 4 * 3
    for name in experts:
        assert int((state[name] != before[name]).sum()) == before[name].numel() // 4


@pytest.mark.parametrize("method", ["linear", "slerp", "ties", "passthrough"])
@pytest.mark.parametrize("family", list(mm.FAMILIES))
def test_results_load_strictly_with_the_logits_of_the_expected_tensors(family, method, tmp_path):
    """ "It loads" is no test: the reference is built in memory from tensors computed with torch."""
    base, a, b, _c = mm.family(family)
    bodies = {
        "linear": ALONE % ("weight: 1", "weight: 3"),
        "slerp": BASE_FIRST + "parameters: {t: 0.3}\n",
        "ties": ONE % "weight: 1" + "parameters: {lambda: 0.5}\n",
        "passthrough": "models: [{model: $a}]\n",
    }
    text = mm.fill(f"merge_method: {method}\n{bodies[method]}", base=base, a=a, b=b)
    merged = mm.load_strict(mm.run_surgeon(text, tmp_path / "out"))
    states = [mm.load_strict(f).state_dict() for f in (base, a, b)]

    def expected(x, y, z):
        if method == "linear":
            return (y.double() + 3 * z.double()) / 4
        if method == "ties":
            return x.double() + 0.5 * (y.double() - x.double())
        if method == "passthrough":
            return y
        return slerp(x.double(), y.double(), 0.3)

    names = list(states[0])
    if method == "slerp" and family in {"mixtral", "qwen3_moe"}:
        reference = mm.independent(family, per_expert(states[0], states[1], expected))
    else:
        reference = mm.independent(family, {n: expected(*(s[n] for s in states)) for n in names})
    torch.testing.assert_close(mm.logits(merged), mm.logits(reference), rtol=1e-4, atol=2e-5)


def slerp(x: torch.Tensor, y: torch.Tensor, t: float) -> torch.Tensor:
    cosine = (x.flatten() @ y.flatten()) / (x.norm() * y.norm())
    if cosine.abs() > 0.9995:
        return (1 - t) * x + t * y
    angle = torch.arccos(cosine)
    return (torch.sin((1 - t) * angle) * x + torch.sin(t * angle) * y) / torch.sin(angle)


def per_expert(base, other, combine):
    """Apply a function to every expert's gate, up and down projection by itself."""
    found = {}
    for name, x in base.items():
        y = other[name]
        if name.endswith("gate_up_proj"):
            half = x.shape[1] // 2
            parts = [torch.cat([combine(p[:half], q[:half], None), combine(p[half:], q[half:], None)])
                     for p, q in zip(x, y, strict=True)]  # fmt: skip
            found[name] = torch.stack(parts)
        elif name.endswith("experts.down_proj"):
            found[name] = torch.stack([combine(p, q, None) for p, q in zip(x, y, strict=True)])
        else:
            found[name] = combine(x, y, None)
    return found


RANDOM = {
    "dare_linear": ONE % "weight: 1, density: 0.4",
    "dare_ties": ONE % "weight: 1, density: 0.4",
    "della_linear": ONE % "weight: 1, density: 0.4, epsilon: 0.1",
    "della": ONE % "weight: 1, density: 0.4, epsilon: 0.1" + "parameters: {normalize: false}\n",
}


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("method", RANDOM)
def test_random_methods_agree_in_distribution(method, rescale, tmp_path):
    """The kept share, and what is made of kept entries; the masks themselves are drawn otherwise."""
    base, a, _b, _c = mm.family("llama")
    body = RANDOM[method]
    place = "parameters: {"
    body = body + f"{place}rescale: {str(rescale).lower()}}}\n" if "normalize" not in body else body.replace(
        "normalize: false", f"normalize: false, rescale: {str(rescale).lower()}")  # fmt: skip
    results = mm.run_both(mm.fill(f"merge_method: {method}\n{body}", base=base, a=a), tmp_path)
    before, other = mm.tensors(base), mm.tensors(a)
    for result in (results.ours, results.theirs):
        state = mm.tensors(result)
        assert sorted(state) == sorted(before)
        kept = total = 0
        for name, x in before.items():
            delta, moved = other[name] - x, state[name] - x
            kept += int((moved != 0).sum())
            total += x.numel()
            mask = moved != 0
            if not mask.any():
                continue
            factor = float(delta.abs().sum() / delta[mask].abs().sum()) if rescale else 1.0
            torch.testing.assert_close(moved[mask], factor * delta[mask], rtol=1e-3, atol=1e-6)
        sigma = (0.4 * 0.6 / total) ** 0.5
        assert abs(kept / total - 0.4) < 5 * sigma, (result.name, kept / total)


@pytest.mark.parametrize("method", ["arcee_fusion", "ramplus_tl"])
def test_quirks_give_mergekits_types(method, tmp_path):
    """Deliberate difference: without --mergekit-quirks the result has the type config.json announces."""
    base, a, b, _c = mm.family("llama", "bfloat16")
    text = mm.fill(f"merge_method: {method}\ndtype: bfloat16\n{METHODS[method][1]}", base=base, a=a, b=b)
    results = mm.run_both(text, tmp_path, {"mergekit_quirks": True})
    ours, theirs = mm.tensors(results.ours), mm.tensors(results.theirs)
    assert {n: t.dtype for n, t in ours.items()} == {n: t.dtype for n, t in theirs.items()}
    assert torch.float32 in {t.dtype for t in ours.values()}
    assert mm.config_of(results.theirs)["dtype"] == "bfloat16"
    plain = mm.tensors(mm.run_surgeon(text, tmp_path / "plain"))
    assert {t.dtype for t in plain.values()} == {torch.bfloat16}


def test_the_comparison_notices_a_wrong_result(tmp_path):
    """One bit, one name, one type, one shape: each is seen."""
    state = mm.tensors(mm.family("llama")[0])
    assert mm.deviation(state, state) == mm.Deviation()
    name = "model.norm.weight"
    nudged = {**state, name: torch.nextafter(state[name], torch.full_like(state[name], 9))}
    assert mm.deviation(nudged, state).unequal == 1
    for wrong in (
        {**state, name: state[name].double()},
        {**state, name: state[name][None]},
        {**state, "x": state[name]},
    ):
        with pytest.raises(AssertionError):
            mm.deviation(wrong, state)
