"""What cannot be cut whatever a pass over text shows is refused before one is made."""

from __future__ import annotations

import json
import shutil
import sys

import pruning_runs as runs
import pytest
from expert_models import moe_folder

from surgeon.calibrate import skeleton
from surgeon.errors import InputError

sys.path.insert(0, str(runs.TESTS / "formats"))
import quantized_models as quantized

SHORT = ("--sequence-length", 48, "--threads", 1, "--samples", 8)


def made(family, folder, **extra):
    return with_tokenizer(shutil.copytree(moe_folder(family, vocab_size=281, **extra), folder))


def with_tokenizer(folder):
    for name in runs.TOKENIZER:
        shutil.copy(runs.LONG / name, folder)
    return folder


@pytest.fixture
def prune(capsys, scratch):
    text = runs.text(scratch / "cal.jsonl")

    def run(model, *arguments, out="out"):
        ran = runs.command(
            capsys, "prune", model, *arguments, "-o", scratch / out, *SHORT, "--calibration", text, "--json"
        )
        return ran.code, json.loads(ran.out), ran.err

    return run


@pytest.fixture
def at_rest(monkeypatch):
    """Let every pass over text fail: all of them begin with the model's skeleton."""

    def refuse(*_, **__):
        raise InputError("E399", "the model was run")

    monkeypatch.setattr(skeleton.Skeleton, "__init__", refuse)


def refused(result, code, scratch):
    """Return the error of a run that was refused, after looking that nothing was left behind."""
    status, document, said = result
    assert document["error"]["code"] == code and status == (2 if code < "E300" else 3), said
    assert document["error"]["help"] and "Traceback" not in said
    assert not (scratch / "out").exists() and not (scratch / "out.work").exists()
    return document["error"]


@pytest.mark.parametrize(
    ("family", "arguments", "code", "said"),
    [
        ("qwen3_moe", ("--method", "heapr", "--sparsity", 0.3, "--layout", "per-layer", "--round-to", 4), "E349", "no program loads"),
        ("qwen3_moe", ("--method", "heapr", "--sparsity", 0.05, "--round-to", 8), "E437", "rounded up to a multiple of 8"),
        ("qwen3_moe", ("--method", "heapr", "--sparsity", 0.9, "--layout", "padded"), "E437", "cannot go"),
        ("qwen3_moe", ("--method", "heapr", "--sparsity", 0.9, "--layout", "ragged"), "E437", "cannot go"),
        ("qwen3_moe", ("--method", "heapr", "--target-params", 1000), "E437", "still has"),
        ("jamba", ("--method", "heapr", "--sparsity", 0.25, "--round-to", 2), "E426", "by the same key"),
        ("jetmoe", ("--keep-experts", 4), "E404", "none can go"),
        ("qwen3_moe", ("--method", "m-smoe", "--keep-experts", 4, "--router", "mass"), "E248", "has no bias"),
        ("qwen3_moe", ("--method", "hc-smoe", "--keep-experts", 4, "--router", "mass"), "E248", "has no bias"),
        ("qwen3_moe", ("--method", "stun", "--keep-experts", 3, "--router", "mass"), "E248", "has no bias"),
        ("llama4_text", ("--method", "naee", "--keep-experts", 4), "E444", "weighted inputs"),
        ("qwen3_moe", ("--keep-experts", 2, "--protect", "0:1,0:2,0:3"), "E239", "only 2 may stay"),
        ("qwen3_moe", ("--method", "naee", "--keep-experts", 2, "--protect", "0:1,0:2,0:3"), "E239", "only 2 may stay"),
        ("qwen3_moe", ("--method", "heapr", "--sparsity", 0.5, "--protect", "0:8"), "E258", "has 8 experts"),
    ],
)  # fmt: skip
def test_a_cut_that_cannot_be_is_refused_before_the_model_is_run(
    family, arguments, code, said, prune, at_rest, scratch
):
    error = refused(prune(made(family, scratch / "model"), *arguments), code, scratch)
    assert said in error["message"], error


@pytest.mark.parametrize(
    ("kind", "method", "code"),
    [
        ("fp8", "heapr", "E435"), ("mxfp4", "heapr", "E435"), ("fp8", "stun", "E442"), ("fp8", "hc-smoe", "E442"),
        ("mxfp4", "m-smoe", "E442"),
    ],
)  # fmt: skip
def test_weights_that_cannot_be_read_are_refused_before_the_model_is_run(
    kind, method, code, prune, at_rest, scratch
):
    (scratch / "made").mkdir()
    if kind == "fp8":
        model, _ = quantized.fp8_folders(scratch / "made", (16, 16), vocab_size=281)
    else:
        model, _ = quantized.mxfp4_folders(scratch / "made", vocab_size=281)
    target = ("--sparsity", 0.25) if method == "heapr" else ("--keep-experts", 4)
    refused(prune(with_tokenizer(model), "--method", method, *target), code, scratch)


@pytest.mark.parametrize("method", ["reap", "heapr", "m-smoe", "naee"])
def test_what_can_be_cut_gets_as_far_as_the_model(method, prune, at_rest, scratch):
    target = ("--sparsity", 0.25, "--round-to", 2) if method == "heapr" else ("--keep-experts", 4)
    status, document, _ = prune(made("qwen3_moe", scratch / "model"), "--method", method, *target)
    assert status == 3 and "the model was run" in document["error"]["message"]


# ---- reports ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "extra", "said"),
    [
        ("granitemoe", {}, "is about a gpt_oss model with 8 experts a layer"),
        ("gpt_oss", {"num_local_experts": 16}, "with 8 experts a layer, and"),
    ],
)
def test_a_report_about_another_kind_of_model_is_refused(family, extra, said, prune, scratch, request):
    source = made("gpt_oss", scratch / "source")
    assert prune(source, "--keep-experts", 4, out="first")[0] == 0
    report = json.loads((scratch / "first" / "pruning.json").read_text())
    assert (report["family"], report["of"]) == ("gpt_oss", 8)
    other = made(family, scratch / "other", **extra)
    request.getfixturevalue("at_rest")
    error = refused(prune(other, "--from-report", scratch / "first"), "E408", scratch)
    assert said in error["message"] and "--from-report" in error["help"]


@pytest.mark.parametrize("missing", ["family", "of", "experts"])
def test_a_file_that_does_not_say_what_it_is_about_is_no_report(missing, prune, scratch):
    model = made("qwen3_moe", scratch / "model")
    whole = {"experts": {"kept": {}, "channels": {}, "width": None, "scales": {}, "without": []}, "family": "qwen3_moe", "of": 8}  # fmt: skip
    (scratch / "report.json").write_text(json.dumps({k: v for k, v in whole.items() if k != missing}))
    error = refused(prune(model, "--from-report", scratch / "report.json"), "E408", scratch)
    assert "is no report of pruned experts" in error["message"]


def test_a_report_that_does_not_fit_is_refused_before_the_model_is_run(prune, at_rest, scratch):
    model = made("qwen3_moe", scratch / "model")
    cut = {"kept": {"0": [0, 1, 2]}, "channels": {}, "width": None, "scales": {}, "without": []}
    (scratch / "report.json").write_text(json.dumps({"experts": cut, "family": "qwen3_moe", "of": 8}))
    error = refused(prune(model, "--from-report", scratch / "report.json"), "E243", scratch)
    assert "keeps 3 experts and layer 1 keeps 8" in error["message"]


def test_no_method_is_announced_where_a_report_decides(capsys, scratch):
    model = made("qwen3_moe", scratch / "model")
    text = runs.text(scratch / "cal.jsonl")
    said = []
    for out, how in (("first", ("--keep-experts", 4)), ("second", ("--from-report", scratch / "first"))):
        ran = runs.command(capsys, "prune", model, *how, "-o", scratch / out, *SHORT, "--calibration", text)
        assert ran.code == 0, ran.err
        said.append("--method reap" in ran.out + ran.err)
    assert said == [True, False]


def test_a_dense_model_whose_configuration_counts_experts_is_cut_as_a_dense_one(prune, scratch):
    model = runs.tiny("llama", scratch / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "n_routed_experts": 8}))
    status, document, said = prune(model, "--sparsity", 0.3, "--structures", "ffn", "--dry-run")
    assert status == 0 and document["method"] == "ziplm", said
