"""`surgeon merge MODEL MODEL`: every option, against tensors computed here; refusals and the dry run."""

from __future__ import annotations

import json
import shutil

import merge_models as mm
import pytest
import torch


@pytest.fixture
def models():
    base, a, b, c = mm.family("llama")
    return {"base": base, "a": a, "b": b, "c": c}


def ok(result):
    assert result.code == 0, result.err
    return result


def tensor(folder, name="model.layers.1.mlp.up_proj.weight") -> torch.Tensor:
    return mm.tensors(folder)[name]


def expected(models, combine) -> dict[str, torch.Tensor]:
    states = {k: {n: t.double() for n, t in mm.tensors(f).items()} for k, f in models.items()}
    return {n: combine({k: s[n] for k, s in states.items()}).float() for n in states["a"]}


def equal(folder, wanted: dict[str, torch.Tensor]) -> None:
    found = mm.tensors(folder)
    assert sorted(found) == sorted(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        mm.logits(mm.load_strict(folder)), mm.logits(mm.independent("llama", wanted)), rtol=1e-4, atol=2e-5
    )


# ---- arithmetic ----------------------------------------------------------------------------------

CASES = {
    "linear": ([], lambda s: (s["a"] + s["b"]) / 2),
    "linear-weights": (["--weight", "1,3"], lambda s: (s["a"] + 3 * s["b"]) / 4),
    "linear-repeated": (["--weight", "1", "--weight", "3"], lambda s: (s["a"] + 3 * s["b"]) / 4),
    "linear-raw": (["--weight", "0.5,0.7", "--no-normalize"], lambda s: 0.5 * s["a"] + 0.7 * s["b"]),
    "task-arithmetic": (
        ["--method", "task-arithmetic", "--lambda", "0.5"],
        lambda s: s["b"] + 0.5 * (s["a"] - s["b"]),
    ),
    "task-arithmetic-default": (
        ["--method", "task_arithmetic"],
        lambda s: s["b"] + 0.7 * (s["a"] - s["b"]),
    ),
    "task-arithmetic-base": (
        ["--method", "task-arithmetic", "--base", "BASE", "--weight", "0.5,-0.25", "--lambda", "1"],
        lambda s: s["base"] + 0.5 * (s["a"] - s["base"]) - 0.25 * (s["b"] - s["base"]),
    ),
    "interpolate": (["--method", "interpolate", "--t", "0.25"], lambda s: 0.75 * s["a"] + 0.25 * s["b"]),
    "interpolate-beyond": (
        ["--method", "interpolate", "--t", "1.5"],
        lambda s: s["a"] + 1.5 * (s["b"] - s["a"]),
    ),
    "interpolate-before": (
        ["--method", "interpolate", "--t", "-0.5"],
        lambda s: s["a"] - 0.5 * (s["b"] - s["a"]),
    ),
    "param": (
        ["--method", "nearswap", "--param", "t=0.02"],
        lambda s: torch.lerp(s["b"], s["a"], (0.02 / (s["a"] - s["b"]).abs().clamp_min(1e-6)).clamp(0, 1)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_methods_and_their_options(name, models, tmp_path, surgeon):
    options, combine = CASES[name]
    options = [models["base"] if o == "BASE" else o for o in options]
    ok(surgeon("merge", models["a"], models["b"], *options, "-o", tmp_path / "out"))
    equal(tmp_path / "out", expected(models, combine))


def trimmed(delta: torch.Tensor, density: float) -> torch.Tensor:
    keep = max(1, int(density * delta.numel()))
    bound = delta.abs().flatten().sort().values[-keep]
    return torch.where(delta.abs() >= bound, delta, 0)


def test_ties_keeps_the_largest_part_of_the_long_models_change(models, tmp_path, surgeon):
    result = ok(surgeon("merge", models["a"], models["b"], "--method", "ties", "-o", tmp_path / "out"))
    assert "using" in result.err and "(last model)" in result.err
    equal(tmp_path / "out", expected(models, lambda s: s["b"] + trimmed(s["a"] - s["b"], 0.2)))
    ok(surgeon("merge", models["a"], models["b"], "--method", "ties", "--density", "0.6", "--lambda", "0.5",
               "-o", tmp_path / "two"))  # fmt: skip
    equal(tmp_path / "two", expected(models, lambda s: s["b"] + 0.5 * trimmed(s["a"] - s["b"], 0.6)))


def test_dense_tensors_are_not_trimmed(models, tmp_path, surgeon):
    ok(surgeon("merge", models["a"], models["b"], "--method", "ties", "--dense", "*norm*", "--dense",
               r"re:.*\.q_proj\.weight", "-o", tmp_path / "out"))  # fmt: skip
    found, (x, y) = mm.tensors(tmp_path / "out"), (mm.tensors(models[k]) for k in ("a", "b"))
    for name, value in found.items():
        dense = "norm" in name or "q_proj" in name
        kept = int((value != y[name]).sum())
        assert kept == (value.numel() if dense else max(1, value.numel() // 5)), name
        if dense:
            torch.testing.assert_close(value, x[name], rtol=1e-6, atol=1e-7)


def test_ignored_tensors_are_copied(models, tmp_path, surgeon):
    ok(surgeon("merge", models["a"], models["b"], "--ignore", "lm_head.weight", "--ignore", "re:.*layers.[01].*",
               "-o", tmp_path / "out"))  # fmt: skip
    found, (x, y) = mm.tensors(tmp_path / "out"), (mm.tensors(models[k]) for k in ("a", "b"))
    for name, value in found.items():
        copied = name == "lm_head.weight" or ".layers.0." in name or ".layers.1." in name
        torch.testing.assert_close(value, x[name] if copied else (x[name] + y[name]) / 2)
        assert not copied or torch.equal(value, x[name])


def test_only_some_layers_are_merged(models, tmp_path, surgeon):
    ok(
        surgeon(
            "merge",
            models["a"],
            models["b"],
            "--method",
            "task-arithmetic",
            "--layers",
            "1:3",
            "-o",
            tmp_path / "out",
        )
    )
    found, (x, y) = mm.tensors(tmp_path / "out"), (mm.tensors(models[k]) for k in ("a", "b"))
    for name, value in found.items():
        if ".layers.1." in name or ".layers.2." in name:
            torch.testing.assert_close(value, y[name] + 0.7 * (x[name] - y[name]), rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(value, y[name])


@pytest.mark.parametrize(
    ("options", "kept"),
    [([], 0.25), (["--density", "0.1"], 0.1), (["--param", "keep=0.5"], 0.5)],
)
def test_dler_keeps_exactly_the_asked_share(options, kept, models, tmp_path, surgeon):
    result = ok(
        surgeon("merge", models["a"], models["b"], "--method", "dler", *options, "-o", tmp_path / "out")
    )
    found, y = mm.tensors(tmp_path / "out"), mm.tensors(models["b"])
    for name, value in found.items():
        assert int((value != y[name]).sum()) == max(1, int(kept * value.numel())), name
    equal(tmp_path / "out", expected(models, lambda s: s["b"] + 0.7 * trimmed(s["a"] - s["b"], kept)))
    assert "entries differ" in result.out


@pytest.mark.parametrize("method", ["dler", "ties"])
@pytest.mark.parametrize("scope", ["tensor", "layer", "global"])
def test_counts_are_taken_over_the_scope(scope, method, models, tmp_path, surgeon):
    ok(surgeon("merge", models["a"], models["b"], "--method", method, "--param", f"scope={scope}", "--density", "0.3",
               "-o", tmp_path / "out"))  # fmt: skip
    found, x, y = mm.tensors(tmp_path / "out"), mm.tensors(models["a"]), mm.tensors(models["b"])

    def group(name):
        return name if scope == "tensor" else "all" if scope == "global" else name.partition("layers.")[2][:1]

    deltas: dict[str, list] = {}
    for name in found:
        deltas.setdefault(group(name), []).append(((x[name] - y[name]).abs().flatten(), name))
    for parts in deltas.values():
        flat = torch.cat([p for p, _ in parts])
        moved = torch.cat([(found[n] != y[n]).flatten() for _, n in parts])
        assert int(moved.sum()) == int(0.3 * flat.numel())
        assert flat[moved].min() >= flat[~moved].max()


def test_a_global_scope_over_one_tensor_is_the_tensors(tmp_path, surgeon):
    torch.manual_seed(3)
    for name in ("x", "y"):
        mm.save_file({"w": torch.randn(40, 30)}, tmp_path / f"{name}.safetensors", metadata={"format": "pt"})
    files = (tmp_path / "x.safetensors", tmp_path / "y.safetensors")
    results = {}
    for scope in ("tensor", "layer", "global"):
        out = tmp_path / f"{scope}.safetensors"
        ok(surgeon("merge", *files, "--method", "dler", "--param", f"scope={scope}", "-o", out))
        results[scope] = out.read_bytes()
    assert results["tensor"] == results["layer"] == results["global"]


def test_adapters(models, tmp_path, surgeon):
    import peft

    torch.manual_seed(4)
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["v_proj"], init_lora_weights=False)
    with mm.quiet():
        model = peft.get_peft_model(mm.load_strict(models["base"]), config)
        model.save_pretrained(tmp_path / "lora")
        merged = {n: t.double() for n, t in model.merge_and_unload().state_dict().items()}
    ok(surgeon("merge", f"{models['base']}+{tmp_path / 'lora'}", models["a"], "-o", tmp_path / "out"))
    other = mm.tensors(models["a"])
    wanted = {n: ((merged[n] + t.double()) / 2).float() for n, t in other.items()}
    for name, value in mm.tensors(tmp_path / "out").items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-6, atol=1e-7)


# ---- sweeps, types, dry runs ---------------------------------------------------------------------

SWEEPS = {
    "slerp": (["--method", "slerp"], "t=0.2:0.8:0.3", "--t", ["0.2", "0.5", "0.8"]),
    "ties": (["--method", "ties"], "density=0.1,0.5", "--density", ["0.1", "0.5"]),
    "task-arithmetic": (["--method", "task-arithmetic"], "lambda=0.3,0.6", "--lambda", ["0.3", "0.6"]),
    "dare-ties": (["--method", "dare-ties", "--seed", "5"], "density=0.3,0.7", "--density", ["0.3", "0.7"]),
    "dler": (["--method", "dler", "--param", "scope=global"], "keep=0.2,0.4", "--density", ["0.2", "0.4"]),
    "interpolate": (["--method", "interpolate"], "t=-0.5,0.5,1.5", "--t", ["-0.5", "0.5", "1.5"]),
}


@pytest.mark.parametrize("name", SWEEPS)
def test_each_point_of_a_sweep_has_the_bytes_of_the_single_run(name, models, tmp_path, surgeon):
    options, span, option, values = SWEEPS[name]
    result = ok(
        surgeon(
            "merge", models["a"], models["b"], *options, "--sweep", span, "-o", tmp_path / "sweep", "--json"
        )
    )
    key = span.partition("=")[0]
    assert sorted(p.name for p in (tmp_path / "sweep").iterdir()) == sorted(f"{key}={v}" for v in values)
    assert len(result.document["output"]["models"]) == len(values)
    for value in values:
        alone = tmp_path / f"alone{value}"
        ok(surgeon("merge", models["a"], models["b"], *options, option, value, "-o", alone))
        point = tmp_path / "sweep" / f"{key}={value}"
        assert (point / "model.safetensors").read_bytes() == (alone / "model.safetensors").read_bytes()
        assert (point / "config.json").read_bytes() == (alone / "config.json").read_bytes()
        manifest = json.loads((point / "surgeon.json").read_text())
        assert f"{key}" in json.dumps(manifest)


def test_a_sweep_over_two_parameters(models, tmp_path, surgeon):
    ok(surgeon("merge", models["a"], models["b"], "--method", "ties", "--sweep", "density=0.2,0.4",
               "--sweep", "lambda=0.5,1", "-o", tmp_path / "out"))  # fmt: skip
    assert len(list((tmp_path / "out").iterdir())) == 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype(dtype, models, tmp_path, surgeon):
    ok(surgeon("merge", models["a"], models["b"], "--dtype", dtype, "-o", tmp_path / "out"))
    state = mm.tensors(tmp_path / "out")
    assert {t.dtype for t in state.values()} == {mm.DTYPES[dtype]}
    assert mm.config_of(tmp_path / "out")["dtype"] == dtype
    exact = expected(models, lambda s: (s["a"] + s["b"]) / 2)
    for name, value in state.items():
        assert torch.equal(value, exact[name].to(value.dtype)) or dtype == "float32"


DRY = {
    "fine": (["A", "B", "-o", "OUT"], 0),
    "unknown method": (["A", "B", "--method", "tiess", "-o", "OUT"], 2),
    "unknown parameter": (["A", "B", "--param", "sccale=1", "-o", "OUT"], 2),
    "weights": (["A", "B", "--weight", "1,2,3", "-o", "OUT"], 2),
    "one model": (["A", "-o", "OUT"], 2),
    "missing model": (["A", "/nowhere/model", "-o", "OUT"], 3),
    "another family": (["A", "QWEN", "-o", "OUT"], 3),
    "output is an input": (["A", "B", "-o", "A"], 6),
    "output exists": (["A", "B", "-o", "FULL"], 6),
    "no folder": (["A", "B", "-o", "NOWHERE/out"], 5),
    "unmatched filter": (["A", "B", "--ignore", "nothing.*", "-o", "OUT"], 2),
    "unchanged": (["A", "B", "--method", "slerp", "--t", "0", "-o", "OUT"], 2),
    "memory": (["A", "B", "--memory-limit", "1kB", "-o", "OUT"], 5),
}


@pytest.mark.parametrize("name", DRY)
def test_a_dry_run_says_what_the_run_would_say(name, models, tmp_path, surgeon):
    arguments, code = DRY[name]
    full = tmp_path / "full"
    shutil.copytree(models["c"], full)
    places = {"A": models["a"], "B": models["b"], "QWEN": mm.family("qwen2")[1], "OUT": tmp_path / "out", "FULL": full,
              "NOWHERE/out": tmp_path / "nowhere" / "out"}  # fmt: skip
    arguments = [places.get(a, a) for a in arguments]
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    dry = surgeon("merge", *arguments, "--dry-run", "--json")
    assert dry.code == code, dry.err
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before
    document = dry.document
    assert document["exit_code"] == code and document["schema"] == 1 and document["command"] == "merge"
    real = surgeon("merge", *arguments, "--json")
    assert real.code == code, real.err
    if code:
        assert document["error"]["code"] == real.document["error"]["code"]
        assert document["error"]["message"] == real.document["error"]["message"]
        assert sorted(str(p) for p in tmp_path.rglob("*")) == before
    else:
        assert document["status"] == "dry-run" and document["error"] is None
        assert document["plan"]["bytes"] == real.document["plan"]["bytes"]
        assert document["plan"]["tensors"] == len(mm.tensors(models["a"]))
        assert document["plan"]["id"] == real.document["plan"]["id"]


# ---- donors, vocabularies, templates -------------------------------------------------------------


def pair(models, tmp_path):
    """A long model with more context and its own template, and a short one."""
    long = mm.clone(models["a"], tmp_path / "long", max_position_embeddings=256, initializer_range=0.5)
    short = mm.clone(models["b"], tmp_path / "short", initializer_range=0.25)
    mm.save_tokenizer(long, template="LONG {{ messages }}")
    mm.save_tokenizer(short, template="SHORT {{ messages }}")
    for folder, value in ((long, 0.6), (short, 0.9)):
        (folder / "generation_config.json").write_text(
            json.dumps({"temperature": value, "eos_token_id": mm.ROWS - 1})
        )
    return long, short


def template(folder) -> str:
    return (folder / "chat_template.jinja").read_text()


def test_an_implied_base_gives_structure_and_the_long_model_the_rest(models, tmp_path, surgeon):
    long, short = pair(models, tmp_path)
    result = ok(surgeon("merge", long, short, "--method", "ties", "-o", tmp_path / "out"))
    config = mm.config_of(tmp_path / "out")
    assert config["initializer_range"] == 0.25 and config["max_position_embeddings"] == 256
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"] == 0.6
    assert template(tmp_path / "out").startswith("LONG")
    assert "max_position_embeddings 256" in result.err and "initializer_range" in result.err


def test_a_named_base_gives_everything(models, tmp_path, surgeon):
    long, short = pair(models, tmp_path)
    ok(surgeon("merge", long, short, "--method", "ties", "--base", short, "-o", tmp_path / "out"))
    config = mm.config_of(tmp_path / "out")
    assert config["initializer_range"] == 0.25 and config["max_position_embeddings"] == 64
    assert template(tmp_path / "out").startswith("SHORT")


@pytest.mark.parametrize(
    "change",
    [{"rope_parameters": {"rope_type": "default", "rope_theta": 99.0}}, {"head_dim": 8, "sliding_window": 9}],
)
def test_a_pair_that_disagrees_about_positions_is_refused(change, models, tmp_path, surgeon):
    long, short = pair(models, tmp_path)
    other = mm.clone(long, tmp_path / "other", **change)
    mm.save_tokenizer(other)
    result = surgeon("merge", other, short, "--method", "ties", "-o", tmp_path / "out")
    assert result.code == 3 and "positions" in result.err, result.err


def test_tokenizer_and_template_can_be_chosen(models, tmp_path, surgeon):
    long, short = pair(models, tmp_path)
    ok(surgeon("merge", long, short, "--method", "ties", "--tokenizer", short, "-o", tmp_path / "one"))
    assert template(tmp_path / "one").startswith("SHORT")
    ok(surgeon("merge", long, short, "--method", "ties", "--chat-template", "chatml", "-o", tmp_path / "two"))
    assert "<|im_start|>" in template(tmp_path / "two")
    (tmp_path / "mine.jinja").write_text("MINE {{ messages }}")
    ok(
        surgeon(
            "merge",
            long,
            short,
            "--method",
            "ties",
            "--chat-template",
            tmp_path / "mine.jinja",
            "-o",
            tmp_path / "x",
        )
    )
    assert template(tmp_path / "x").startswith("MINE")


def wider(models, tmp_path):
    """A sibling with three more tokens."""
    model = mm.new_model("llama", seed=8, vocab_size=mm.ROWS + 3)
    folder = tmp_path / "wide"
    with mm.quiet():
        model.save_pretrained(folder)
    mm.save_tokenizer(folder, special=(*mm.SPECIAL, "<a>", "<b>", "<c>"))
    return folder


@pytest.mark.parametrize(
    ("vocab", "rows"),
    [("base", mm.ROWS), ("union", mm.ROWS + 3), ("truncate", mm.ROWS), ("WIDE", mm.ROWS + 3)],
)
def test_vocabularies_of_different_size_need_a_choice(vocab, rows, models, tmp_path, surgeon):
    wide = wider(models, tmp_path)
    refused = surgeon("merge", models["a"], wide, "-o", tmp_path / "out")
    assert refused.code == 3 and "vocabular" in refused.err and "--vocab" in refused.err
    assert not (tmp_path / "out").exists()
    ok(
        surgeon(
            "merge", models["a"], wide, "--vocab", wide if vocab == "WIDE" else vocab, "-o", tmp_path / "out"
        )
    )
    state, config = mm.tensors(tmp_path / "out"), mm.config_of(tmp_path / "out")
    assert state["lm_head.weight"].shape[0] == state["model.embed_tokens.weight"].shape[0] == rows
    assert config["vocab_size"] == rows
    x, y = mm.tensors(models["a"])["lm_head.weight"], mm.tensors(wide)["lm_head.weight"]
    torch.testing.assert_close(state["lm_head.weight"][: mm.ROWS], (x + y[: mm.ROWS]) / 2)
    if rows > mm.ROWS:  # tokens only one model has keep its rows
        torch.testing.assert_close(state["lm_head.weight"][mm.ROWS :], y[mm.ROWS :])
    mm.load_strict(tmp_path / "out")


# ---- settings that do nothing, and contradictory ones --------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        ["--method", "slerp", "--t", "1"],
        ["--method", "nearswap", "--t", "0"],
        ["--method", "task-arithmetic", "--lambda", "1"],
        ["--method", "task-arithmetic", "--lambda", "0"],
        ["--method", "task-arithmetic", "--weight", "0"],
        ["--method", "ties", "--density", "1"],
        ["--method", "dare-linear", "--density", "1", "--lambda", "1"],
    ],
)
def test_settings_that_return_an_input_are_refused(options, models, tmp_path, surgeon):
    result = surgeon("merge", models["a"], models["b"], *options, "-o", tmp_path / "out")
    assert result.code == 2 and "E219" in result.err, result.err
    assert not (tmp_path / "out").exists()


def test_in_a_yaml_they_only_warn(models, tmp_path, surgeon):
    text = mm.fill(
        "merge_method: task_arithmetic\nmodels: [{model: $a, parameters: {weight: 1}}]\nbase_model: $b\n",
        **models,
    )
    (tmp_path / "c.yml").write_text(text)
    result = ok(surgeon("merge", tmp_path / "c.yml", "-o", tmp_path / "out"))
    assert "the result is the other model" in result.err
    assert surgeon("merge", tmp_path / "c.yml", "-o", tmp_path / "no", "--strict").code == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--weight", "1,2"], "--weight has 2 values for 1 models"),
        (["--density", "1.5"], "density"),
        (["--density", "0.2,0.3"], "--density has 2 values for 1 models"),
        (["--t", "0.3"], 'unknown parameter "t"'),
        (["--param", "keep=0.1"], 'unknown parameter "keep"'),
        (["--layers", "3:1"], "empty"),
        (["--layers", "x"], "--layers"),
        (["--sweep", "lambda=1:0:0.5"], "--sweep"),
        (["--sweep", "labda=1,2"], "labda"),
        (["--dense", "nothing"], "matches no tensor"),
        (["--ignore", "re:["], "regular expression"),
        (["--lambda", "nan"], "lambda"),
    ],
)
def test_wrong_values_are_usage_errors(options, message, models, tmp_path, surgeon):
    result = surgeon("merge", models["a"], models["b"], "--method", "ties", *options, "-o", tmp_path / "out")
    assert result.code == 2 and message in result.err, result.err
    assert "Traceback" not in result.err and list(tmp_path.iterdir()) == []


def test_methods_with_a_base_need_one_for_three_models(models, tmp_path, surgeon):
    result = surgeon(
        "merge", models["a"], models["b"], models["c"], "--method", "ties", "-o", tmp_path / "out"
    )
    assert result.code == 2 and "--base" in result.err


def test_a_model_given_twice_is_refused(models, tmp_path, surgeon):
    result = surgeon("merge", models["a"], models["a"], "-o", tmp_path / "out")
    assert result.code == 2 and "twice" in result.err


def test_options_of_a_merge_cannot_be_mixed_with_a_yaml(models, tmp_path, surgeon):
    (tmp_path / "c.yml").write_text("merge_method: linear\n")
    result = surgeon("merge", tmp_path / "c.yml", "--density", "0.3", "-o", tmp_path / "out")
    assert result.code == 2 and "--density" in result.err


def test_the_output_of_a_yaml_is_an_option(tmp_path, surgeon):
    (tmp_path / "c.yml").write_text("merge_method: linear\n")
    result = surgeon("merge", tmp_path / "c.yml", "merged")
    assert result.code == 2 and f"surgeon merge {tmp_path / 'c.yml'} -o merged" in result.err


def test_run_is_another_name_for_merging_a_yaml(models, tmp_path, surgeon):
    text = "merge_method: linear\nmodels: [{model: $a, parameters: {weight: 1}}, {model: $b, parameters: {weight: 2}}]\n"
    (tmp_path / "c.yml").write_text(mm.fill(text, **models))
    ok(surgeon("merge", tmp_path / "c.yml", "-o", tmp_path / "one"))
    ok(surgeon("run", tmp_path / "c.yml", "-o", tmp_path / "two"))
    one, two = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("one", "two"))
    assert one == two
    recipe = (tmp_path / "one" / "mergekit_config.yml").read_text()
    assert "weight: 2" in recipe and str(models["a"].parent) not in recipe


# ---- the end of a run ----------------------------------------------------------------------------


def test_the_json_document_and_the_sentence_about_evaluation(models, tmp_path, surgeon):
    result = ok(surgeon("merge", models["a"], models["b"], "-o", tmp_path / "out", "--json"))
    document = result.document
    assert document["status"] == "ok" and document["exit_code"] == 0
    assert document["output"]["path"] == str(tmp_path / "out")
    assert set(document["output"]["sha256"]) == {"model.safetensors"}
    assert "must be evaluated before use" in result.err


def test_a_rerun_onto_its_own_result_does_nothing(models, tmp_path, surgeon):
    ok(surgeon("merge", models["a"], models["b"], "-o", tmp_path / "out"))
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    assert "unchanged" in ok(surgeon("merge", models["a"], models["b"], "-o", tmp_path / "out")).out
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == before
    other = surgeon("merge", models["a"], models["b"], "--weight", "1,2", "-o", tmp_path / "out")
    assert other.code == 6


def test_the_same_command_writes_the_same_bytes(models, tmp_path, surgeon):
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        ok(surgeon("merge", models["a"], models["b"], "--method", "dare-ties", "--threads", "1" if place == "one" else "2",
                   "-o", tmp_path / place / "merged"))  # fmt: skip
    first, second = (
        {p.name: p.read_bytes() for p in (tmp_path / n / "merged").iterdir()} for n in ("one", "two")
    )
    assert first == second
    assert not any(str(tmp_path).encode() in content for content in first.values())


def test_shards(models, tmp_path, surgeon):
    ok(surgeon("merge", models["a"], models["b"], "--max-shard-size", "40kB", "-o", tmp_path / "out"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    equal(tmp_path / "out", expected(models, lambda s: (s["a"] + s["b"]) / 2))
