"""`surgeon prune` on mixtures of experts, as its user sees it: results, reports, re-selection, refusals."""

from __future__ import annotations

import json
import re
import shutil
import sys

import numpy as np
import pruning_runs as runs
import pytest
import torch
import transformers
from expert_models import moe_folder
from safetensors.torch import load_file, save_file

SHORT = ("--sequence-length", 48, "--threads", 1)


@pytest.fixture
def model(scratch):
    """A mixture of 8 experts in three layers with a tokenizer."""
    return made("qwen3_moe", scratch / "model")


def made(family, folder, **extra):
    shutil.copytree(moe_folder(family, vocab_size=281, **extra), folder)
    for name in runs.TOKENIZER:
        shutil.copy(runs.LONG / name, folder)
    return folder


@pytest.fixture
def text(scratch):
    return runs.text(scratch / "cal.jsonl")


@pytest.fixture
def prune(capsys, scratch, text):
    def run(*arguments, calibration=text, out=scratch / "out", code=0, samples=8):
        given = () if calibration is None else ("--calibration", calibration)
        ran = runs.command(
            capsys, "prune", *arguments, "-o", out, *SHORT, "--samples", samples, *given, "--json"
        )
        assert ran.code == code, ran.out + ran.err
        return json.loads(ran.out)

    return run


def kept(folder):
    document = json.loads((folder / "pruning.json").read_text())
    return {int(layer): tuple(ids) for layer, ids in document["experts"]["kept"].items()}


def logits(folder, ids):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32, experts_implementation="eager"
    )
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        return model(ids).logits


def masked_logits(folder, ids, cut):
    """Return the source's logits with the dropped experts' router logits at minus infinity, by hooks of our own."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    )
    linear, weights = torch.nn.functional.linear, {}
    for layer, ids_kept in cut.items():
        router = model.model.layers[layer].mlp.gate.weight
        mask = torch.full((router.shape[0],), -torch.inf)
        mask[list(ids_kept)] = 0
        weights[id(router)] = mask

    def masking(inputs, weight, bias=None):
        out = linear(inputs, weight, bias)
        return out + weights[id(weight)] if id(weight) in weights else out

    torch.nn.functional.linear = masking
    try:
        with torch.no_grad():
            return model(ids).logits
    finally:
        torch.nn.functional.linear = linear


IDS = torch.tensor(np.random.default_rng(1).integers(3, 281, (2, 20)))


@pytest.mark.parametrize("method", ["reap", "easy-ep", "frequency", "random", "aimer", "router-distance"])
def test_the_result_equals_the_source_with_dropped_experts_masked(method, model, prune, scratch):
    found = prune(model, "--method", method, "--keep-experts", 5)
    cut = kept(scratch / "out")
    assert all(len(ids) == 5 for ids in cut.values()) and len(cut) == 3
    assert found["output"]["experts_per_layer"] == 5
    assert any("equal to the last bit" in remark for remark in found["members"][0]["remarks"])
    mine, masked = logits(scratch / "out", IDS), masked_logits(model, IDS, cut)
    assert float((mine - masked).abs().max()) <= 1e-5
    assert float((mine - logits(model, IDS)).abs().max()) > 1e-2


def test_counts_and_fractions(model, prune, scratch):
    sizes = []
    for text in ("6", "0.75", "75%"):
        prune(model, "--keep-experts", text, out=scratch / f"out-{text}")
        sizes.append(len(kept(scratch / f"out-{text}")[0]))
    assert sizes == [6, 6, 6]


def test_a_family_from_one_pass(model, prune, scratch, monkeypatch):
    from surgeon.prune.experts import session

    passes = []
    collect = session.collect_statistics
    monkeypatch.setattr(session, "collect_statistics", lambda *a, **k: passes.append(1) or collect(*a, **k))
    found = prune(model, "--keep-experts", "6,4")
    assert len(passes) == 1 and [m["experts_per_layer"] for m in found["members"]] == [6, 4]
    six, four = (kept(scratch / "out" / f"experts={n}") for n in (6, 4))
    assert all(set(four[layer]) < set(six[layer]) for layer in six)


def test_statistics_are_written_once_and_select_again_without_the_model(model, prune, scratch, monkeypatch):
    scores = scratch / "scores.safetensors"
    prune(model, "--keep-experts", 4, "--scores", scores, out=scratch / "a")
    assert scores.is_file()
    from surgeon.prune.experts import session

    monkeypatch.setattr(session, "collect_statistics", None)  # calling it would fail
    prune(model, "--method", "frequency", "--keep-experts", 4, "--scores", scores, out=scratch / "b")
    prune(model, "--keep-experts", 4, "--scores", scores, out=scratch / "c")
    assert kept(scratch / "a") == kept(scratch / "c")
    report = json.loads((scratch / "b" / "pruning.json").read_text())
    for layer in report["layers"].values():
        tokens = layer["tokens"]
        assert min(tokens[e] for e in layer["kept"]) >= max(tokens[e] for e in layer["dropped"])


def test_a_report_is_applied_again(model, prune, scratch):
    prune(model, "--keep-experts", 4, out=scratch / "a")
    found = prune(model, "--from-report", scratch / "a", out=scratch / "b")
    assert kept(scratch / "a") == kept(scratch / "b") and found["output"]["experts_per_layer"] == 4
    first, second = (load_file(scratch / name / "model.safetensors") for name in "ab")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_user_protection_holds_under_every_method(model, prune, scratch):
    for number, method in enumerate(("reap", "frequency", "random", "stun", "naee")):
        out = scratch / f"out{number}"
        prune(model, "--method", method, "--keep-experts", 3, "--protect", "0:7,0:1,2:5", out=out)
        cut = kept(out)
        assert {1, 7} <= set(cut[0]) and 5 in cut[2], method


def test_a_super_expert_is_protected_and_named(scratch, prune):
    model = made("qwen3_moe", scratch / "model", num_hidden_layers=8)
    prune(model, "--method", "frequency", "--keep-experts", 2, out=scratch / "first")
    victim = json.loads((scratch / "first" / "pruning.json").read_text())["layers"]["1"]["dropped"]
    tokens = json.loads((scratch / "first" / "pruning.json").read_text())["layers"]["1"]["tokens"]
    expert = max(victim, key=lambda e: tokens[e])
    file = model / "model.safetensors"
    weights = load_file(file)
    weights[f"model.layers.1.mlp.experts.{expert}.down_proj.weight"] *= 3000
    save_file(weights, file, metadata={"format": "pt"})
    found = prune(model, "--method", "frequency", "--keep-experts", 2)
    assert expert in kept(scratch / "out")[1]
    assert {"layer": 1, "expert": expert} in [
        {k: s[k] for k in ("layer", "expert")} for s in found["super_experts"]
    ]
    assert any("protected" in remark for remark in found["members"][0]["remarks"])
    prune(model, "--method", "frequency", "--keep-experts", 2, "--no-protect", out=scratch / "bare")
    assert expert not in kept(scratch / "bare")[1]


def test_a_size_is_met_exactly(model, prune, scratch):
    whole = sum(v.numel() * v.element_size() for v in load_file(model / "model.safetensors").values())
    found = prune(model, "--target-size", int(whole * 0.6))
    held = load_file(scratch / "out" / "model.safetensors")
    size = sum(v.numel() * v.element_size() for v in held.values())
    assert found["output"]["bytes"] == size <= whole * 0.6
    each = (whole - size) / (8 - len(kept(scratch / "out")[0]))
    assert size + each > whole * 0.6, "one more expert a layer would not have fitted"


def test_heapr_narrows_every_expert(model, prune, scratch):
    found = prune(model, "--method", "heapr", "--sparsity", 0.25, "--round-to", 2)
    config = json.loads((scratch / "out" / "config.json").read_text())
    assert config["moe_intermediate_size"] == 18 and found["output"]["experts_per_layer"] == 8
    cut = json.loads((scratch / "out" / "pruning.json").read_text())["experts"]["channels"]
    logits(scratch / "out", IDS)
    source, result = load_file(model / "model.safetensors"), load_file(scratch / "out" / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.{}.weight"
    channels = cut["1:3"]
    assert torch.equal(result[name.format("up_proj")], source[name.format("up_proj")][channels])
    assert torch.equal(result[name.format("down_proj")], source[name.format("down_proj")][:, channels])


def test_ragged_is_evaluated_and_not_written(model, prune, scratch):
    found = prune(model, "--method", "heapr", "--sparsity", 0.4, "--layout", "ragged")
    assert found["output"]["path"] is None and not (scratch / "out").exists()
    member = found["members"][0]
    assert member["quality"]["kl"] > 0 and member["parameters"] < found["model"]["parameters"]
    assert not (scratch / "out.work").exists()


@pytest.mark.parametrize("method", ["stun", "hc-smoe", "m-smoe", "naee"])
def test_grouped_methods_write_models_that_load(method, model, prune, scratch):
    prune(model, "--method", method, "--keep-experts", 4)
    assert logits(scratch / "out", IDS).isfinite().all()


def test_domains_are_balanced_and_reported(model, prune, scratch):
    runs.text(scratch / "one.jsonl", 20)
    runs.text(scratch / "two.jsonl", 25)
    found = prune(model, "--method", "easy-ep", "--keep-experts", 4, "--calibration", f"one={scratch / 'one.jsonl'}",
                  "--calibration", f"two={scratch / 'two.jsonl'}", calibration=None, samples=12)  # fmt: skip
    assert set(found["members"][0]["quality"]["domains"]) == {"one", "two"}


def test_the_same_command_again_does_nothing_and_another_one_conflicts(model, prune):
    prune(model, "--keep-experts", 4)
    assert prune(model, "--keep-experts", 4)["output"]["unchanged"]
    assert prune(model, "--keep-experts", 5, code=6)["error"]["code"].startswith("E6")


def test_group_limited_routing_keeps_equally_many_in_each_group(scratch, prune):
    model = made("deepseek_v3", scratch / "model")
    prune(model, "--keep-experts", 6)
    for ids in kept(scratch / "out").values():
        assert [sum(e // 4 == group for e in ids) for group in (0, 1)] == [3, 3]
    assert "keep 4 or 6" in prune(model, "--keep-experts", 5, out=scratch / "odd", code=2)["error"]["help"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--keep-experts", 1), 2, "every token uses 2"),
        (("--keep-experts", 9), 2, "a layer has 8"),
        (("--keep-experts", "1.5"), 2, "a layer has 8"),
        (("--keep-experts", 4, "--sparsity", 0.5), 2, "one kind of target"),
        (("--method", "reap"), 2, "one kind of target"),
        (("--method", "reap", "--target-speedup", 1.5), 2, "--target-speedup has no effect"),
        (("--target-speedup", 1.5), 2, "changes neither the work per token"),
        (("--keep-experts", 4, "--criterion", "joint"), 2, "no effect on reap"),
        (("--method", "heapr", "--keep-experts", 4), 2, "narrows every expert"),
        (("--method", "heapr", "--sparsity", 0.3, "--criterion", "jiont"), 2, "joint"),
        (("--method", "heapr", "--sparsity", 0.3, "--layout", "per-layer"), 3, "no program loads"),
        (("--method", "reep", "--keep-experts", 4), 2, "unknown"),
        (("--keep-experts", 4, "--protect", "0:8"), 2, "has 8 experts"),
        (("--keep-experts", 2, "--protect", "0:1,0:2,0:3"), 2, "only 2 may stay"),
        (("--keep-experts", 4, "--protect", "three"), 2, "LAYER:EXPERT"),
        (("--keep-experts", 4, "--domain-weight", "code"), 2, "NAME=WEIGHT"),
        (("--target-size", 1000), 2, "cannot be reached"),
        (("--keep-experts", 4, "--structures", "ffn"), 2, "no effect on experts"),
    ],
)
def test_what_does_not_go_is_refused_in_one_sentence(arguments, code, said, model, capsys, text, scratch):
    before = runs.snapshot(scratch)
    ran = runs.command(
        capsys,
        "prune",
        model,
        *arguments,
        "-o",
        scratch / "out",
        *SHORT,
        "--samples",
        4,
        "--calibration",
        text,
    )
    assert ran.code == code and said in ran.err, ran.err
    assert "Traceback" not in ran.err and not (scratch / "out").exists()
    if code == 2 and "protect" not in str(arguments):
        assert runs.snapshot(scratch) == before


def test_dense_models_are_told_apart(capsys, scratch, text):
    dense = runs.small(scratch / "dense")
    ran = runs.command(
        capsys,
        "prune",
        dense,
        "--method",
        "reap",
        "--keep-experts",
        4,
        "-o",
        scratch / "out",
        "--calibration",
        text,
    )
    assert ran.code == 3 and "dense model" in ran.err
    ran = runs.command(
        capsys, "prune", dense, "--keep-experts", 4, "-o", scratch / "out", "--calibration", text
    )
    assert ran.code == 2 and "--keep-experts has no effect on ziplm" in ran.err


def test_a_dry_run_writes_nothing(model, prune, scratch):
    before = runs.snapshot(scratch)
    found = prune(model, "--keep-experts", 4, "--dry-run")
    assert found["status"] == "dry-run" and found["outlook"][0]["experts"] == 4
    assert runs.snapshot(scratch) == before
    real = prune(model, "--keep-experts", 4)
    assert real["output"]["bytes"] == found["outlook"][0]["bytes"]


def test_without_text_and_protection_a_model_need_not_run(scratch, prune, monkeypatch):
    model = made("qwen3_moe", scratch / "model")
    from surgeon.calibrate import stock_model
    from surgeon.errors import InputError

    def refuse(*_):
        raise InputError("E381", "it is quantized")

    monkeypatch.setattr("surgeon.calibrate.skeleton.build", refuse)
    assert stock_model.build is not None
    found = prune(model, "--method", "router-distance", "--keep-experts", 4, "--no-protect")
    assert any("not run here" in remark for remark in found["members"][0]["remarks"])
    assert (
        prune(model, "--method", "reap", "--keep-experts", 4, out=scratch / "b", code=3)["error"]["code"]
        == "E381"
    )


# ---- quantized sources, layers that do not run, other families -----------------------------------------


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_a_quantized_model_is_scored_and_sliced_as_it_is_stored(kind, scratch, prune):
    sys.path.insert(0, str(runs.TESTS / "formats"))
    import quantized_models as quantized

    place = scratch / "made"
    place.mkdir()
    if kind == "fp8":
        model, _ = quantized.fp8_folders(place, (16, 16), vocab_size=281)
    else:
        model, _ = quantized.mxfp4_folders(place, vocab_size=281)
    for name in runs.TOKENIZER:
        shutil.copy(runs.LONG / name, model)
    found = prune(model, "--keep-experts", 6)
    said = found["members"][0]["remarks"]
    assert any("equal to the last bit" in remark for remark in said), said
    source, result = (load_file(p / "model.safetensors") for p in (model, scratch / "out"))
    assert {v.dtype for v in source.values()} == {v.dtype for v in result.values()}
    assert (
        "--dtype would round"
        in prune(model, "--keep-experts", 6, "--dtype", "float32", out=scratch / "b", code=2)["error"][
            "message"
        ]
    )


def test_a_layer_that_predicts_further_tokens_copies_the_last_choice(scratch, prune):
    model = made("deepseek_v3", scratch / "model")
    file = model / "model.safetensors"
    weights = load_file(file)
    extra = {
        name.replace("layers.2.", "layers.3."): value.clone()
        for name, value in weights.items()
        if ".layers.2." in name
    }
    for name in ("eh_proj", "enorm", "hnorm", "shared_head.norm", "embed_tokens", "shared_head.head"):
        shape = {"eh_proj": (32, 64), "embed_tokens": (281, 32), "shared_head.head": (281, 32)}.get(
            name, (32,)
        )
        extra[f"model.layers.3.{name}.weight"] = torch.ones(shape)
    save_file(weights | extra, file, metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    found = prune(model, "--keep-experts", 6)
    cut = kept(scratch / "out")
    assert cut[3] == cut[2] and any(
        "multi-token prediction" in remark for remark in found["members"][0]["remarks"]
    )
    result = load_file(scratch / "out" / "model.safetensors")
    first = cut[3][1]
    name = "model.layers.3.mlp.experts.{}.up_proj.weight"
    assert torch.equal(result[name.format(1)], extra[name.format(first)])
    assert result["model.layers.3.mlp.gate.weight"].shape[0] == 6
    prune(model, "--keep-experts", 6, "--mtp", "drop", out=scratch / "without")
    assert not any(".layers.3." in name for name in load_file(scratch / "without" / "model.safetensors"))
    assert (
        prune(model, "--keep-experts", 6, "--mtp", "error", out=scratch / "no", code=3)["error"]["code"]
        == "E407"
    )


@pytest.mark.parametrize(
    "family",
    ["mixtral", "gpt_oss", "olmoe", *(pytest.param(f, marks=pytest.mark.slow) for f in (
        "qwen2_moe", "granitemoe", "phimoe", "glm4_moe", "ernie4_5_moe", "minimax_m2", "lfm2_moe", "deepseek_v2", "llama4_text",
        "jamba", "qwen3_next", "hunyuan_v1_moe", "minimax", "nemotron_h"))],
)  # fmt: skip
def test_every_family_from_the_command_line(family, scratch, prune):
    model = made(family, scratch / "model")
    found = prune(model, "--method", "easy-ep", "--keep-experts", 6)
    said = found["members"][0]["remarks"]
    assert any(re.search("equal to the last bit|differ by [0-9.]+e-0[5-9]", remark) for remark in said), said
    assert found["members"][0]["quality"]["kl"] > 0


def test_verify_compares_with_the_masked_source(model, prune, scratch, capsys):
    prune(model, "--keep-experts", 4)
    ran = runs.command(capsys, "verify", scratch / "out", "--against", model)
    assert ran.code == 0 and "dropped experts masked equal to the last bit" in ran.out, ran.out + ran.err
    other = made("qwen3_moe", scratch / "other", seed=5)
    ran = runs.command(capsys, "verify", scratch / "out", "--against", other)
    assert ran.code == 3 and "error[E409]" in ran.err


def test_an_unknown_family_is_cut_by_a_record_that_was_proposed(scratch, prune, capsys):
    model = made("qwen3_moe", scratch / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "brand_new_moe"}))
    refused = prune(model, "--method", "aimer", "--keep-experts", 4, "--no-protect", code=3)["error"]
    assert refused["code"] == "E421" and "--guess" in refused["help"]
    ran = runs.command(capsys, "inspect", model, "--experts", "--guess")
    assert ran.code == 0
    (scratch / "record.yaml").write_text(ran.out)
    found = prune(
        model,
        "--method",
        "aimer",
        "--keep-experts",
        4,
        "--no-protect",
        "--expert-record",
        scratch / "record.yaml",
    )
    assert found["output"]["experts_per_layer"] == 4
    (scratch / "out" / "config.json").write_text(
        (scratch / "out" / "config.json").read_text().replace("brand_new_moe", "qwen3_moe")
    )
    assert logits(scratch / "out", IDS).isfinite().all()


def test_J4_experts_that_no_token_reaches_go_first_and_are_named(scratch, prune):
    model = made("gpt_oss", scratch / "model")
    file = model / "model.safetensors"
    weights = load_file(file)
    for name, value in weights.items():
        if name.endswith("router.bias"):
            value[[1, 4, 6]] = -1e4
    save_file(weights, file, metadata={"format": "pt"})
    for method in ("reap", "easy-ep", "man", "frequency"):
        found = prune(model, "--method", method, "--keep-experts", 5, out=scratch / method)
        report = json.loads((scratch / method / "pruning.json").read_text())["layers"]
        for layer in report.values():
            assert layer["dropped"] == [1, 4, 6] and all(layer["tokens"][e] == 0 for e in (1, 4, 6))
            assert all(np.isfinite(layer["scores"]))
    found = prune(model, "--keep-experts", 6)
    assert any("no token of the text was given" in remark for remark in found["members"][0]["remarks"])
    assert all(ids == (0, 1, 2, 3, 5, 7) for ids in kept(scratch / "out").values()), "filled up by number"


def test_J3_too_little_text_is_refused(model, prune, scratch):
    for name, content, code in (
        ("empty.jsonl", "", "E37"),
        ("one.jsonl", json.dumps({"text": "three and four"}), "E314"),
    ):
        (scratch / name).write_text(content)
        error = prune(model, "--keep-experts", 4, calibration=scratch / name, code=3)["error"]
        assert error["code"].startswith(code), error


@pytest.mark.parametrize("storage", ["hub", "fused"])
def test_E5_E9_either_storage_gives_the_same_model_in_its_own_storage(storage, scratch, prune):
    model = made("mixtral", scratch / "model", storage=storage)
    prune(model, "--method", "reap", "--keep-experts", 5)
    names = load_file(scratch / "out" / "model.safetensors").keys()
    assert any("experts.4." in name for name in names) == (storage == "hub")
    config = json.loads((scratch / "out" / "config.json").read_text())
    source = json.loads((model / "config.json").read_text())
    counted = {key for key in source if source[key] == 8 and "expert" in key}
    assert counted and all(config[key] == 5 for key in counted) and config.keys() == source.keys()
    other = made("mixtral", scratch / "other", storage="fused" if storage == "hub" else "hub")
    prune(other, "--method", "reap", "--keep-experts", 5, out=scratch / "again")
    assert kept(scratch / "out") == kept(scratch / "again")
    assert torch.equal(logits(scratch / "out", IDS), logits(scratch / "again", IDS))


def test_without_a_tokenizer_experts_can_still_go(model, prune, scratch):
    for name in runs.TOKENIZER:
        (model / name).unlink()
    found = prune(model, "--method", "aimer", "--keep-experts", 4, "--no-protect", calibration=None)
    assert any("not run here" in remark for remark in found["members"][0]["remarks"])
    assert logits(scratch / "out", IDS).isfinite().all()
    assert prune(model, "--keep-experts", 4, out=scratch / "b", code=3)["error"]["code"] == "E375"


@pytest.mark.parametrize("method", ["reap", "heapr"])
def test_an_interrupted_run_goes_on_and_ends_with_the_same_model(method, model, text, scratch):
    import threading

    import surgeon
    from surgeon.errors import Interrupted

    target = {"keep_experts": 4} if method == "reap" else {"sparsity": 0.25, "round_to": 2}
    how = {
        "method": method,
        **target,
        "calibration": (str(text),),
        "samples": 8,
        "sequence_length": 48,
        "threads": 1,
    }
    surgeon.prune(model, scratch / "whole", **how)
    stop, seen = threading.Event(), []

    def tell(what, done, total):
        seen.append((what, done))
        if what in ("calibrating", "measuring channels") and done == 3:
            stop.set()

    with pytest.raises(Interrupted):
        surgeon.prune(model, scratch / "out", progress=tell, stop=stop, **how)
    assert not (scratch / "out").exists() and (scratch / "out.work").exists()
    again = []
    surgeon.prune(
        model, scratch / "out", progress=lambda what, done, total: again.append((what, done)), **how
    )
    phase = seen[-1][0]
    assert min(done for what, done in again if what == phase) > 1, "it went on where it had been left"
    for name in ("model.safetensors", "config.json", "pruning.json"):
        assert (scratch / "out" / name).read_bytes() == (scratch / "whole" / name).read_bytes()
    assert not (scratch / "out.work").exists()
