"""Structure: stacked layers, tied embeddings, extra and missing tensors, adapters, parts, several documents.

Every result is loaded strictly and its logits are compared with a model built in memory.
"""

from __future__ import annotations

import json
import re
import shutil

import merge_models as mm
import pytest
import torch

from surgeon.errors import InputError, SurgeonError, UsageError

LINEAR = """merge_method: linear
models: [{model: $a, parameters: {weight: 1}}, {model: $b, parameters: {weight: 3}}]
"""


def close(left: torch.nn.Module, right: torch.nn.Module) -> None:
    torch.testing.assert_close(mm.logits(left), mm.logits(right), rtol=1e-4, atol=2e-5)


def stacked(layers: list[tuple[dict, int]], around: dict) -> dict[str, torch.Tensor]:
    """Return a state dict whose layer i is a layer of another model."""
    found = {n: t for n, t in around.items() if ".layers." not in n}
    for place, (state, layer) in enumerate(layers):
        for name, tensor in state.items():
            if f".layers.{layer}." in name:
                found[name.replace(f".layers.{layer}.", f".layers.{place}.")] = tensor
    return found


def refusals(error: SurgeonError) -> list[SurgeonError]:
    return [error, *error.others]


def found(raised, code: str) -> SurgeonError:
    matching = [e for e in refusals(raised.value) if e.code == code]
    assert matching, [(e.code, e.message) for e in refusals(raised.value)]
    return matching[0]


# ---- layers --------------------------------------------------------------------------------------

STACK = """merge_method: passthrough
slices:
  - sources: [{model: $a, layer_range: [0, 3]}]
  - sources: [{model: $b, layer_range: [1, 4]}]
"""


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_stacked_layers_compute_what_the_stack_computes(family, tmp_path):
    """mergekit crashes for Qwen2 and Qwen3 here, after writing the weights: their configs list a type per layer."""
    _base, a, b, _c = mm.family(family)
    out = mm.run_surgeon(mm.fill(STACK, a=a, b=b), tmp_path / "out")
    config = mm.config_of(out)
    assert config["num_hidden_layers"] == 6
    if "layer_types" in mm.config_of(a):
        assert len(config["layer_types"]) == 6
    first, second = mm.tensors(a), mm.tensors(b)
    around = {n: (second if re.search(r"norm|lm_head", n) else first)[n] for n in first}
    state = stacked([(first, 0), (first, 1), (first, 2), (second, 1), (second, 2), (second, 3)], around)
    close(mm.load_strict(out), mm.independent(family, state, num_hidden_layers=6))


def test_mergekit_still_fails_where_ours_works(tmp_path):
    _base, a, b, _c = mm.family("qwen3")
    with pytest.raises(Exception, match="layer"):
        mm.run_mergekit(mm.fill(STACK, a=a, b=b), tmp_path / "theirs")


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_lists_per_layer_follow_their_layers(family, tmp_path):
    """A layer that attended through a window keeps it wherever it is put."""
    kinds = ["full_attention", "full_attention", "sliding_attention", "full_attention"]
    extra = {"use_sliding_window": True, "sliding_window": 4, "layer_types": kinds}
    _base, a, _b, _c = mm.family(family, **extra)
    text = """merge_method: passthrough
slices:
  - sources: [{model: $a, layer_range: [2, 4]}]
  - sources: [{model: $a, layer_range: [1, 3]}]
  - sources: [{model: $a, layer_range: [2, 3]}]
"""
    out = mm.run_surgeon(mm.fill(text, a=a), tmp_path / "out")
    wanted = [kinds[i] for i in (2, 3, 1, 2, 2)]
    assert mm.config_of(out)["layer_types"] == wanted
    state = mm.tensors(a)
    state = stacked([(state, i) for i in (2, 3, 1, 2, 2)], state)
    reference = mm.independent(family, state, **{**extra, "num_hidden_layers": 5, "layer_types": wanted})
    close(mm.load_strict(out), reference)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_repeated_layers_with_zero_outputs_change_nothing(family, tmp_path):
    _base, a, _b, _c = mm.family(family)
    text = """merge_method: passthrough
slices:
  - sources: [{model: $a, layer_range: [0, 3]}]
  - sources:
      - model: $a
        layer_range: [1, 3]
        parameters: {scale: [{filter: o_proj, value: 0}, {filter: down_proj, value: 0}, {value: 1}]}
  - sources: [{model: $a, layer_range: [3, 4]}]
"""
    out = mm.run_surgeon(mm.fill(text, a=a), tmp_path / "out")
    assert mm.config_of(out)["num_hidden_layers"] == 6
    close(mm.load_strict(out), mm.load_strict(a))


@pytest.mark.parametrize("family", ["llama", "qwen2", "mixtral", "qwen3_moe", "gpt2"])
def test_depth_changes_in_every_family(family, tmp_path):
    _base, a, b, _c = mm.family(family)
    text = """merge_method: passthrough
slices:
  - sources: [{model: $a, layer_range: [1, 2]}]
  - sources: [{model: $b, layer_range: [0, 2]}]
"""
    out = mm.run_surgeon(mm.fill(text, a=a, b=b), tmp_path / "out")
    merged = mm.load_strict(out)
    first, second = mm.load_strict(a).state_dict(), mm.load_strict(b).state_dict()
    around = {n: (second if re.search(r"(norm|lm_head|ln_f)\b", n) else first)[n] for n in first}
    if family == "gpt2":  # the head is tied: it is the first model's embedding
        around["lm_head.weight"] = around["transformer.wte.weight"]

    def layers(state, i):
        return {n.replace(".h.", ".layers."): t for n, t in state.items()}, i

    state = stacked(
        [layers(first, 1), layers(second, 0), layers(second, 1)],
        {n.replace(".h.", ".layers."): t for n, t in around.items()},
    )
    if family == "gpt2":
        state = {n.replace(".layers.", ".h."): t for n, t in state.items()}
    depth = {"n_layer": 3} if family == "gpt2" else {"num_hidden_layers": 3}
    close(merged, mm.independent(family, state, **depth))


@pytest.mark.parametrize(
    ("span", "message"),
    [
        ("[0, 9]", r"layer_range \[0, 9\] exceeds the 4 layers"),
        ("[3, 3]", r"layer_range \[3, 3\] contains no layer"),
        ("[3, 1]", r"layer_range \[3, 1\] contains no layer"),
        ("[-1, 2]", r"layer_range \[-1, 2\] contains no layer"),
        ("[1]", "two whole numbers"),
    ],
)
def test_E10_layer_ranges_are_checked_with_their_position(span, message):
    _base, a, _b, _c = mm.family("llama")
    text = f"merge_method: passthrough\nslices:\n  - sources: [{{model: {a}, layer_range: {span}}}]\n"
    with pytest.raises(UsageError, match=message) as raised:
        mm.plan(text)
    error = found(raised, "E214")
    assert (error.where.file, error.where.line) == ("config.yml", 3)
    assert error.where.column == text.splitlines()[2].index(span) + 1
    assert error.exit_code == 2


def test_E10_sources_of_a_slice_are_equally_long():
    _base, a, b, _c = mm.family("llama")
    text = """merge_method: linear
slices:
  - sources:
      - {model: $a, layer_range: [0, 2], parameters: {weight: 1}}
      - {model: $b, layer_range: [0, 3], parameters: {weight: 1}}
"""
    with pytest.raises(UsageError, match="equally many layers") as raised:
        mm.plan(mm.fill(text, a=a, b=b))
    assert raised.value.where.line == 3


DEPTHS = {
    "passthrough": """merge_method: passthrough
slices:
  - sources: [{model: $a, layer_range: [0, 4]}]
  - sources: [{model: $b, layer_range: [3, 6]}]
""",
    "linear": """merge_method: linear
slices:
  - sources:
      - {model: $a, layer_range: [0, 4], parameters: {weight: [0.2, 0.8]}}
      - {model: $b, layer_range: [2, 6], parameters: {weight: 0.5}}
""",
}


@pytest.mark.parametrize("method", DEPTHS)
def test_slices_may_come_from_models_of_different_depth(method, tmp_path):
    a, b = mm.family("llama")[1], mm.family("llama", num_hidden_layers=6)[2]
    results = mm.run_both(mm.fill(DEPTHS[method], a=a, b=b), tmp_path)
    assert mm.deviation(mm.tensors(results.ours), mm.tensors(results.theirs)).unequal == 0
    close(mm.load_strict(results.ours), mm.load_strict(results.theirs))
    plain = mm.fill(LINEAR, a=a, b=b)
    with pytest.raises(InputError, match="num_hidden_layers 4 / 6"):
        mm.plan(plain)


def test_layers_of_another_model_keep_their_own_kind(tmp_path):
    """The donor's config is rebuilt so that a window goes with the layer that had it."""
    kinds = {"use_sliding_window": True, "sliding_window": 4}
    full, window = "full_attention", "sliding_attention"
    a = mm.family("qwen2", **kinds, layer_types=[full, window, full, full])[1]
    b = mm.family("qwen2", **kinds, layer_types=[window, full, window, full])[2]
    text = """merge_method: passthrough
slices:
  - sources: [{model: $a, layer_range: [0, 2]}]
  - sources: [{model: $b, layer_range: [0, 3]}]
"""
    out = mm.run_surgeon(mm.fill(text, a=a, b=b), tmp_path / "out")
    assert mm.config_of(out)["layer_types"] == [full, window, window, full, window]


# ---- tied embeddings -----------------------------------------------------------------------------


def tied(name: str) -> tuple:
    return mm.family("llama", tie_word_embeddings=True) if name == "tied" else mm.family("llama")


@pytest.mark.parametrize(("left", "right"), [("tied", "tied"), ("tied", "untied"), ("untied", "tied")])
def test_tied_and_untied_models(left, right, tmp_path):
    """Inputs that disagree make an untied output; the tied one's embedding stands for its head."""
    a, b = tied(left)[1], tied(right)[2]
    out = mm.run_surgeon(mm.fill(LINEAR, a=a, b=b), tmp_path / "out")
    x, y = mm.tensors(a), mm.tensors(b)
    assert ("lm_head.weight" in x, "lm_head.weight" in y) == (left == "untied", right == "untied")
    both_tied = left == right == "tied"
    names = set(x) | set(y)
    expected = {}
    for name in names:
        p, q = (s.get(name, s["model.embed_tokens.weight"]) for s in (x, y))
        expected[name] = ((p.double() + 3 * q.double()) / 4).float()
    state = mm.tensors(out)
    assert set(state) == names - ({"lm_head.weight"} if both_tied else set())
    assert mm.config_of(out)["tie_word_embeddings"] is both_tied
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)
    close(mm.load_strict(out), mm.independent("llama", expected, tie_word_embeddings=both_tied))


@pytest.mark.parametrize("base_is", ["tied", "untied"])
def test_tied_and_untied_with_a_base(base_is, tmp_path):
    base, other = tied(base_is)[0], tied("untied" if base_is == "tied" else "tied")[1]
    text = (
        "merge_method: task_arithmetic\nmodels: [{model: $a, parameters: {weight: 0.5}}]\nbase_model: $base\n"
    )
    out = mm.run_surgeon(mm.fill(text, a=other, base=base), tmp_path / "out")
    x, y = mm.tensors(base), mm.tensors(other)
    expected = {}
    for name in {*x, *y}:
        p, q = (s.get(name, s["model.embed_tokens.weight"]) for s in (x, y))
        expected[name] = p + 0.5 * (q - p)
    assert mm.config_of(out)["tie_word_embeddings"] is False
    close(mm.load_strict(out), mm.independent("llama", expected))


@pytest.mark.parametrize(("left", "right"), [("tied", "untied"), ("untied", "tied")])
def test_stacked_tied_and_untied_models(left, right, tmp_path):
    """The head is the last slice's: its lm_head, or its embedding where that is tied."""
    a, b = tied(left)[1], tied(right)[2]
    out = mm.run_surgeon(mm.fill(STACK, a=a, b=b), tmp_path / "out")
    x, y = mm.tensors(a), mm.tensors(b)
    head = y.get("lm_head.weight", y["model.embed_tokens.weight"])
    around = {"model.embed_tokens.weight": x["model.embed_tokens.weight"], "lm_head.weight": head,
              "model.norm.weight": y["model.norm.weight"]}  # fmt: skip
    state = stacked([(x, 0), (x, 1), (x, 2), (y, 1), (y, 2), (y, 3)], around)
    assert mm.config_of(out)["tie_word_embeddings"] is False
    close(mm.load_strict(out), mm.independent("llama", state, num_hidden_layers=6))


def test_mergekit_loses_the_head_of_a_tied_base(tmp_path):
    """Why ours differs: the head is written, and the config tells every reader to ignore it."""
    a, b = tied("tied")[1], tied("untied")[2]
    text = "merge_method: task_arithmetic\nmodels: [{model: $b, parameters: {weight: 0.5}}]\nbase_model: $a\n"
    theirs = mm.run_mergekit(mm.fill(text, a=a, b=b), tmp_path / "lossy")
    assert "lm_head.weight" in mm.tensors(theirs)
    assert mm.config_of(theirs)["tie_word_embeddings"] is True


def test_D7_two_equal_copies_become_one(tmp_path):
    _base, a, b, _c = tied("tied")
    twice = [
        mm.clone(m, tmp_path / m.name, {"lm_head.weight": mm.tensors(m)["model.embed_tokens.weight"].clone()})
        for m in (a, b)
    ]
    out = mm.run_surgeon(mm.fill(LINEAR, a=twice[0], b=twice[1]), tmp_path / "out")
    plain = mm.run_surgeon(mm.fill(LINEAR, a=a, b=b), tmp_path / "plain")
    assert "lm_head.weight" not in mm.tensors(out)
    assert mm.deviation(mm.tensors(out), mm.tensors(plain)).unequal == 0
    close(mm.load_strict(out), mm.load_strict(plain))


def test_D7_one_of_them_stores_two_copies(tmp_path):
    _base, a, b, _c = tied("tied")
    twice = mm.clone(
        a, tmp_path / "a", {"lm_head.weight": mm.tensors(a)["model.embed_tokens.weight"].clone()}
    )
    plain = mm.run_surgeon(mm.fill(LINEAR, a=a, b=b), tmp_path / "plain")
    for name, (x, y) in {"first": (twice, b), "second": (b, twice)}.items():
        out = mm.run_surgeon(mm.fill(LINEAR, a=x, b=y), tmp_path / name)
        assert "lm_head.weight" not in mm.tensors(out)
        if name == "first":
            close(mm.load_strict(out), mm.load_strict(plain))


def test_D7_different_copies_under_a_tying_config_are_refused(tmp_path):
    _base, a, b, _c = tied("tied")
    wrong = mm.clone(a, tmp_path / "a", {"lm_head.weight": torch.randn(mm.ROWS, 32)})
    with pytest.raises(InputError, match="two different copies") as raised:
        mm.plan(mm.fill(LINEAR, a=wrong, b=b))
    assert raised.value.exit_code == 3


# ---- tensors that are not in every model, or not floats ------------------------------------------


def test_E2_unknown_tensors_are_merged_or_copied_never_dropped(tmp_path):
    """mergekit drops what its architecture files do not list."""
    _base, a, b, _c = mm.family("llama")
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.randn(32)}
    buffer = {"model.layers.1.extra.table": torch.randn(4, 5)}
    x = mm.clone(a, tmp_path / "a", {**bias, **buffer})
    y = mm.clone(b, tmp_path / "b", {n: t + 1 for n, t in bias.items()})
    text = mm.fill(LINEAR, a=x, b=y)
    planned = mm.plan(text)
    out = mm.run_surgeon(text, tmp_path / "ours")
    state, theirs = mm.tensors(out), mm.tensors(mm.run_mergekit(text, tmp_path / "theirs"))
    assert set(state) - set(theirs) == {*bias, *buffer}
    name = next(iter(bias))
    torch.testing.assert_close(state[name], bias[name] + 0.75)
    assert torch.equal(state["model.layers.1.extra.table"], buffer["model.layers.1.extra.table"])
    assert any("extra.table is copied from" in n and "lacks it" in n for n in planned.plan.notes)
    assert any("2 tensors have no place in a model" in w for w in planned.plan.warnings), (
        planned.plan.warnings
    )


@pytest.mark.parametrize(
    "name",
    ["model.layers.2.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"],
)
def test_E3_a_missing_tensor_is_refused(name, tmp_path):
    _base, a, b, _c = mm.family("llama")
    lacking = mm.clone(b, tmp_path / "b", drop=[name])
    with pytest.raises(InputError, match=re.escape(name)) as raised:
        mm.plan(mm.fill(LINEAR, a=a, b=lacking))
    assert raised.value.exit_code == 3


def test_D5_integer_buffers_are_copied_when_equal_and_refused_otherwise(tmp_path):
    _base, a, b, _c = mm.family("llama")
    table = {"model.layers.0.self_attn.table": torch.arange(9), "model.mask": torch.tensor([True, False])}
    x, y = mm.clone(a, tmp_path / "x", table), mm.clone(b, tmp_path / "y", table)
    state = mm.tensors(mm.run_surgeon(mm.fill(LINEAR, a=x, b=y), tmp_path / "out"))
    for name, tensor in table.items():
        assert torch.equal(state[name], tensor)
    z = mm.clone(b, tmp_path / "z", {**table, "model.mask": torch.tensor([True, True])})
    with pytest.raises(InputError, match=r"model\.mask"):
        mm.run_surgeon(mm.fill(LINEAR, a=x, b=z), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_buffers_of_the_family_are_copied_whatever_the_method(tmp_path):
    """Old Llama checkpoints store rotary frequencies: computed, not learned. mergekit drops them."""
    _base, a, _b, _c = mm.family("llama")
    name = "model.layers.{}.self_attn.rotary_emb.inv_freq"
    buffers = {name.format(i): torch.linspace(0.1, 1, 4) for i in range(4)}
    x = mm.clone(a, tmp_path / "x", buffers)
    text = """merge_method: passthrough
slices: [{sources: [{model: $x, layer_range: [2, 4], parameters: {scale: 0.5}}]}]
"""
    planned = mm.plan(mm.fill(text, x=x))
    assert not any("have no place" in w for w in planned.warnings)
    state = mm.tensors(mm.run_surgeon(mm.fill(text, x=x), tmp_path / "out"))
    assert {n for n in state if "inv_freq" in n} == {name.format(0), name.format(1)}
    assert torch.equal(state[name.format(0)], buffers[name.format(2)])
    assert torch.equal(
        state["model.layers.0.mlp.up_proj.weight"], 0.5 * mm.tensors(a)["model.layers.2.mlp.up_proj.weight"]
    )


MIXED = [("bfloat16", "float16"), ("bfloat16", "float32"), ("float16", "float16"), ("float32", "bfloat16")]


@pytest.mark.parametrize("header", ["", "dtype: bfloat16\n", "dtype: float32\nout_dtype: float16\n"])
@pytest.mark.parametrize(("left", "right"), MIXED)
def test_D5_mixed_types_follow_mergekit(left, right, header, tmp_path):
    a, b = mm.family("llama", left)[1], mm.family("llama", right)[2]
    results = mm.run_both(header + mm.fill(LINEAR, a=a, b=b), tmp_path)
    ours = mm.tensors(results.ours)
    assert mm.deviation(ours, mm.tensors(results.theirs)).unequal == 0
    # mergekit keeps the donor's type in config.json when the file holds another one
    code = str(next(iter(ours.values())).dtype).removeprefix("torch.")
    assert mm.config_of(results.ours)["dtype"] == code


def test_D5_mixed_types_within_one_model(tmp_path):
    _base, a, b, _c = mm.family("llama")
    x = mm.clone(a, tmp_path / "x", {n: t.bfloat16() for n, t in mm.tensors(a).items() if "norm" not in n})
    y = mm.clone(b, tmp_path / "y", {n: t.bfloat16() for n, t in mm.tensors(b).items() if "norm" not in n})
    results = mm.run_both(mm.fill(LINEAR, a=x, b=y), tmp_path)
    state = mm.tensors(results.ours)
    assert mm.deviation(state, mm.tensors(results.theirs)).unequal == 0
    assert state["model.norm.weight"].dtype == torch.float32
    assert mm.config_of(results.ours)["dtype"] == "bfloat16"


def test_dtype_casts_integer_buffers_of_one_model_by_mergekits_rule_only_in_mergekit(tmp_path):
    """Deliberate difference: mergekit casts integer tensors to dtype on loading; ours keeps them."""
    _base, a, b, _c = mm.family("gpt2")
    table = {"transformer.h.0.attn.table": torch.arange(5)}
    x, y = mm.clone(a, tmp_path / "x", table), mm.clone(b, tmp_path / "y", table)
    state = mm.tensors(mm.run_surgeon("dtype: bfloat16\n" + mm.fill(LINEAR, a=x, b=y), tmp_path / "out"))
    assert torch.equal(state["transformer.h.0.attn.table"], torch.arange(5))


# ---- models that do not fit ----------------------------------------------------------------------


def test_E11_different_architectures_are_refused_with_all_keys(tmp_path):
    a = mm.family("llama")[1]
    b = mm.family("llama", hidden_size=48, num_hidden_layers=3)[1]
    with pytest.raises(InputError, match="different architectures") as raised:
        mm.plan(mm.fill(LINEAR, a=a, b=b))
    message = found(raised, "E344").message
    assert "hidden_size 32 / 48" in message and "num_hidden_layers 4 / 3" in message


def test_E11_different_families_are_refused(tmp_path):
    with pytest.raises(InputError, match="model_type llama / qwen2") as raised:
        mm.plan(mm.fill(LINEAR, a=mm.family("llama")[1], b=mm.family("qwen2")[1]))
    assert raised.value.exit_code == 3


def test_E11_passthrough_of_different_sizes_is_refused(tmp_path):
    a = mm.family("llama")[1]
    b = mm.family("llama", hidden_size=48)[1]
    with pytest.raises(InputError):
        mm.plan(mm.fill(STACK, a=a, b=b))


# ---- adapters ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A LoRA adapter for the llama base, and the model peft makes of both."""
    import peft

    base = mm.family("llama")[0]
    place = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(5)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=False
    )
    with mm.quiet():
        model = peft.get_peft_model(mm.load_strict(base), config)
        model.save_pretrained(place / "lora")
        merged = model.merge_and_unload().eval()
        mm.write(merged, place / "merged")
    return base, place / "lora", place / "merged"


def test_adapters_fold_in_as_peft_does(adapter, tmp_path):
    base, lora, merged = adapter
    text = "merge_method: passthrough\nmodels: [{model: $model}]\n"
    out = mm.run_surgeon(mm.fill(text, model=f"{base}+{lora}"), tmp_path / "out")
    assert mm.deviation(mm.tensors(out), mm.tensors(merged), [mm.tensors(base)]).relative <= 1e-6
    close(mm.load_strict(out), mm.load_strict(merged))


@pytest.mark.parametrize("form", ["text", "mapping"])
def test_adapters_in_a_merge_equal_mergekits(adapter, form, tmp_path):
    base, lora, _merged = adapter
    a = mm.family("llama")[1]
    model = f"'{base}+{lora}'" if form == "text" else f"{{model: {base}, lora: {{path: {lora}}}}}"
    text = (
        f"merge_method: linear\ndtype: float32\nmodels:\n  - {{model: {model}, parameters: {{weight: 1}}}}\n"
        f"  - {{model: {a}, parameters: {{weight: 2}}}}\n"
    )
    out = mm.run_surgeon(text, tmp_path / "ours")
    theirs = mm.run_mergekit(text, tmp_path / "theirs", lora_merge_cache=str(tmp_path / "cache"))
    gap = mm.deviation(mm.tensors(out), mm.tensors(theirs), [mm.tensors(a)])
    assert gap.relative <= 1e-6, gap


def test_an_adapter_given_as_model_is_explained(adapter):
    base, lora, _merged = adapter
    with pytest.raises(InputError, match="adapter"):
        mm.plan(mm.fill(LINEAR, a=lora, b=base))


def test_revisions_of_local_models_are_refused():
    _base, a, b, _c = mm.family("llama")
    with pytest.raises(SurgeonError, match=r"revision|main") as raised:
        mm.plan(mm.fill(LINEAR, a=f"{a}@main", b=b))
    assert raised.value.exit_code in {2, 3}


# ---- parts of a model ----------------------------------------------------------------------------


def two_parts(folder, source, seed):
    """A model of text and vision parts, as far as names go; nothing here knows its type."""
    torch.manual_seed(seed)
    state = {
        "vision_tower.layers.0.fc.weight": torch.randn(6, 6),
        "vision_tower.layers.1.fc.weight": torch.randn(6, 6),
        "multi_modal_projector.linear.weight": torch.randn(4, 6),
        "language_model.model.embed_tokens.weight": torch.randn(10, 4),
        "language_model.model.layers.0.mlp.weight": torch.randn(4, 4),
        "language_model.model.layers.1.mlp.weight": torch.randn(4, 4),
        "language_model.lm_head.weight": torch.randn(10, 4),
    }
    folder.mkdir()
    mm.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(
        json.dumps({"model_type": "two_parts", "text_config": {"hidden_size": 4}})
    )
    return state


MODULES = """merge_method: linear
modules:
  text_decoder:
    models: [{model: $x, parameters: {weight: 1}}, {model: $y, parameters: {weight: 3}}]
  vision_tower:
    models: [{model: $x}, {model: $y}]
    parameters: {weight: [1, 0.5], normalize: false}
  multi_modal_projector:
    models: [{model: $y, parameters: {weight: 1}}]
"""


def test_modules_rule_the_tensors_of_their_part(tmp_path):
    x, y = two_parts(tmp_path / "x", None, 1), two_parts(tmp_path / "y", None, 2)
    out = mm.run_surgeon(mm.fill(MODULES, x=tmp_path / "x", y=tmp_path / "y"), tmp_path / "out")
    for name, tensor in mm.tensors(out).items():
        p, q = x[name].double(), y[name].double()
        if name.startswith("language_model"):
            wanted = (p + 3 * q) / 4
        elif name.startswith("vision"):
            wanted = p + q if ".0." in name else 0.5 * (p + q)
        else:
            wanted = q
        torch.testing.assert_close(tensor.double(), wanted, rtol=1e-6, atol=1e-6)


def test_a_module_without_tensors_is_refused(tmp_path):
    two_parts(tmp_path / "x", None, 1)
    two_parts(tmp_path / "y", None, 2)
    text = MODULES.replace("vision_tower:", "audio_tower:")
    with pytest.raises(UsageError, match="audio_tower"):
        mm.plan(mm.fill(text, x=tmp_path / "x", y=tmp_path / "y"))


@pytest.mark.parametrize("inner", ["models: [{model: $a}, {model: $b}]",
                                   "slices: [{sources: [{model: $a, layer_range: [0, 4]}, {model: $b, layer_range: [0, 4]}]}]"])  # fmt: skip
def test_a_wrong_name_for_the_only_module_is_refused_as_in_mergekit(inner, tmp_path):
    _base, a, b, _c = mm.family("llama")
    text = mm.fill(
        f"merge_method: linear\nparameters: {{weight: 1}}\nmodules: {{NAME: {{{inner}}}}}\n", a=a, b=b
    )
    with pytest.raises(UsageError, match='module "other"'):
        mm.plan(text.replace("NAME", "other"))
    with pytest.raises(KeyError):
        mm.run_mergekit(text.replace("NAME", "other"), tmp_path / "theirs")
    assert mm.plan(text.replace("NAME", "default"))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "merge_method: ties\nmodels:\n- model: $a\n  parameters:\n    weight: 1\n    density: 1.5\nbase_model: $b\n",
            6,
        ),
        (
            "merge_method: breadcrumbs\nbase_model: $b\nmodels: [{model: $a}]\nparameters:\n  weight: 1\n  gamma: 2\n",
            6,
        ),
    ],
)
def test_values_out_of_range_are_shown_where_they_stand(text, line):
    _base, a, b, _c = mm.family("llama")
    with pytest.raises(UsageError, match="out of range") as raised:
        mm.plan(mm.fill(text, a=a, b=b))
    assert raised.value.where.line == line


def test_whole_numbers_are_no_type_for_weights():
    _base, a, b, _c = mm.family("llama")
    for key in ("dtype", "out_dtype"):
        with pytest.raises(UsageError, match="whole numbers"):
            mm.plan(f"{key}: int64\n" + mm.fill(LINEAR, a=a, b=b))


# ---- donors, refusals ----------------------------------------------------------------------------


def test_without_a_base_the_first_model_gives_config_and_tokenizer(tmp_path):
    """Deliberate difference: mergekit takes a random one, by the hash order of a set."""
    _base, a, b, _c = mm.family("llama")
    x = mm.clone(a, tmp_path / "x", initializer_range=0.5)
    y = mm.clone(b, tmp_path / "y", initializer_range=0.25)
    for first, second, wanted in ((x, y, 0.5), (y, x, 0.25)):
        out = mm.run_surgeon(mm.fill(LINEAR, a=first, b=second), tmp_path / f"out{wanted}")
        assert mm.config_of(out)["initializer_range"] == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("merge_method: linear\nmodels: [{model: $a}, {model: $b}]\n", 'required parameter "weight"'),
        ("merge_method: linear\nmodels: [{model: $a, parameters: {weight: 1}}]\nbase_model: $b\n", '"weight" of'),
        ("merge_method: ties\nmodels: [{model: $a, parameters: {weight: 1}}, {model: $b, parameters: {weight: 1}}]\n",
         "base"),
        ("merge_method: slerp\nmodels: [{model: $a}, {model: $b}, {model: $base}]\nbase_model: $base\nparameters: {t: 1}\n",
         "takes"),
        ("merge_method: passthrough\nmodels: [{model: $a}, {model: $b}]\n", "takes"),
        ("merge_method: slerp\nmodels: [{model: $a}, {model: $b}]\nbase_model: $a\n", 'required parameter "t"'),
        ("merge_method: model_stock\nmodels: [{model: $a}]\nbase_model: $base\n", "takes"),
    ],
)  # fmt: skip
def test_what_mergekit_refuses_is_refused_before_reading(text, message, tmp_path):
    base, a, b, _c = mm.family("llama")
    text = mm.fill(text, base=base, a=a, b=b)
    with pytest.raises(SurgeonError, match=message) as raised:
        mm.plan(text)
    assert raised.value.exit_code == 2
    with pytest.raises(Exception):  # noqa: B017 - the kind of exception is theirs
        mm.run_mergekit(text, tmp_path / "theirs")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("merge_method: linear\nmodels: [{model: $a, parameters: {wieght: 1}}, {model: $b}]\n", "wieght"),
        (
            "merge_method: linear\ndtyp: float32\nmodels: [{model: $a}, {model: $b}]\nparameters: {weight: 1}\n",
            "dtyp",
        ),
    ],
)
def test_misspelt_keys_are_errors(text, message):
    """Deliberate difference: mergekit ignores them and merges with the default."""
    _base, a, b, _c = mm.family("llama")
    with pytest.raises(UsageError, match=message) as raised:
        mm.plan(mm.fill(text, a=a, b=b))
    assert raised.value.where.line in {2, 3}


# ---- several documents ---------------------------------------------------------------------------

DOCUMENTS = """name: first
merge_method: linear
models: [{model: $a, parameters: {weight: 1}}, {model: $b, parameters: {weight: 1}}]
dtype: float32
---
merge_method: slerp
models: [{model: $base}, {model: first}]
base_model: $base
parameters: {t: 0.4}
dtype: float32
"""


@pytest.mark.parametrize("order", ["as written", "reversed"])
def test_documents_use_each_others_results(order, tmp_path, surgeon):
    base, a, b, _c = mm.family("llama")
    text = mm.fill(DOCUMENTS, base=base, a=a, b=b)
    first, second = text.split("---\n")
    (tmp_path / "config.yml").write_text(text if order == "as written" else f"{second}---\n{first}")
    result = surgeon("merge", tmp_path / "config.yml", "-o", tmp_path / "out")
    assert result.code == 0, result.err
    one = mm.run_mergekit(first.replace("name: first\n", ""), tmp_path / "one")
    two = mm.run_mergekit(second.replace("model: first", f"model: {one}"), tmp_path / "two")
    gap = mm.deviation(mm.tensors(tmp_path / "out"), mm.tensors(two), [mm.tensors(base)])
    assert gap.relative <= 2e-6
    assert mm.deviation(mm.tensors(tmp_path / "out.work" / "first"), mm.tensors(one)).unequal == 0
    again = surgeon("merge", tmp_path / "config.yml", "-o", tmp_path / "out")
    assert again.code == 0 and "unchanged" in again.out


def test_a_dry_run_of_documents_writes_nothing(tmp_path, surgeon):
    base, a, b, _c = mm.family("llama")
    (tmp_path / "config.yml").write_text(mm.fill(DOCUMENTS, base=base, a=a, b=b))
    result = surgeon("merge", tmp_path / "config.yml", "-o", tmp_path / "out", "--dry-run")
    assert result.code == 0, result.err
    assert [p.name for p in tmp_path.iterdir()] == ["config.yml"]


def test_a_changed_document_is_not_taken_from_an_earlier_run(tmp_path, surgeon):
    """mergekit-multi reuses any folder that looks like a model."""
    base, a, b, _c = mm.family("llama")
    text = mm.fill(DOCUMENTS, base=base, a=a, b=b)
    (tmp_path / "config.yml").write_text(text)
    assert surgeon("merge", tmp_path / "config.yml", "-o", tmp_path / "out").code == 0
    (tmp_path / "config.yml").write_text(text.replace("weight: 1}", "weight: 2}", 1))
    result = surgeon("merge", tmp_path / "config.yml", "-o", tmp_path / "out")
    assert result.code == 6, result.err
    shutil.rmtree(tmp_path / "out")
    shutil.rmtree(tmp_path / "out.work")
