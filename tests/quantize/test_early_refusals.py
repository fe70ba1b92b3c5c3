"""What `surgeon quantize` says before a text or a weight is read: sizes of a plan, files that do not fit, refusals told once."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "prune"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "deploy"))

import pruning_runs as runs
from deploy_models import config_of

from surgeon.calibrate import divided
from surgeon.checkpoint.checkpoint import StoredCheckpoint
from surgeon.deploy import per_layer, quantized_check
from surgeon.formats import auto_round, bnb, compressed_runtimes
from surgeon.formats.compressed_runtimes import Reader
from surgeon.formats.scheme import Scheme
from surgeon.formats.told_once import told_once
from surgeon.quantize import forms

RTN = ("--method", "rtn", "--sensitivity", "weight")


@pytest.fixture
def quantize(capsys, scratch):
    def command(*arguments, code=0, model=runs.LONG, out="out"):
        ran = runs.command(
            capsys, "quantize", model, "-o", scratch / out, "--json", "--no-progress", *arguments
        )
        assert ran.code == code, ran.out + ran.err
        return ran.document

    return command


@pytest.fixture
def forbid(monkeypatch):
    """Return what makes reading a calibration text or a weight fail from then on."""

    def now():
        monkeypatch.setattr(divided, "load", lambda *a, **k: pytest.fail("text was read"))
        for name in ("read", "read_bytes"):
            monkeypatch.setattr(StoredCheckpoint, name, lambda *a, **k: pytest.fail("weights were read"))

    return now


@pytest.fixture
def unread(forbid):
    forbid()


# ---- plans ---------------------------------------------------------------------------------------------


def test_the_size_of_a_plan_is_said_to_the_byte(quantize, scratch, monkeypatch, forbid):
    monkeypatch.setattr(
        quantized_check, "check", lambda *a, **k: {"reader": "transformers", "notice": "left out"}
    )
    made = quantize("--scheme", "W4A16", "--scheme", "re:.*down_proj=W8A16", "--method", "rtn", out="first")
    forbid()
    for plan in (scratch / "first", scratch / "first" / "plan.json"):
        said = quantize("--plan", plan, "--method", "rtn", "--dry-run")
        assert said["status"] == "dry-run"
        assert (
            said["output"]["bytes"] == made["output"]["bytes"]
            and said["output"]["bits"] == made["output"]["bits"]
        )
        assert said["schemes"] == made["schemes"]


def test_a_plan_that_does_not_fit_is_refused_before_text_is_read(quantize, scratch, unread):
    plan = scratch / "plan.json"
    for content in ("{}", json.dumps({"matrices": {"model.layers.9.mlp.up_proj.weight": "int4g32"}})):
        plan.write_text(content)
        for also in ((), ("--dry-run",)):
            said = quantize("--plan", plan, "--method", "gptq", *also, code=3)["error"]
            assert said["code"] == "E492" and said["help"]


# ---- sensitivities -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        ("not json", "is no file of sensitivities"),
        ("[1]", "is no file of sensitivities"),
        ('{"version": 9, "sha256": "", "kind": "kl", "modules": []}', "is of version 9"),
        ('{"version": 1, "sha256": "0", "kind": "kl", "modules": []}', "is damaged"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_holds_no_losses_is_refused_before_text_is_read(quantize, scratch, unread, content, fact):
    table = scratch / "losses.json"
    table.mkdir() if content is None else table.write_text(content)
    for also in ((), ("--dry-run",)):
        said = quantize("--target-bits", 4, "--sensitivities", table, *also, code=3)["error"]
        assert (
            said["code"] == "E463" and said["message"] == f"losses.json {said['message'].partition(' ')[2]}"
        )
        assert fact in said["message"] and "not there yet" in said["help"]


def test_losses_that_do_not_fit_are_refused_before_text_is_read(quantize, scratch, monkeypatch, forbid):
    table = scratch / "losses.json"
    monkeypatch.setattr(
        quantized_check, "check", lambda *a, **k: {"reader": "transformers", "notice": "left out"}
    )
    quantize("--target-bits", 5, "--bits", "4,8", *RTN, "--sensitivities", table, out="first")
    forbid()
    said = quantize("--target-bits", 3, "--bits", "2,3", "--sensitivities", table, code=3)["error"]
    assert said["code"] == "E464" and "no losses of 2 and 3 bits" in said["message"] and said["help"]
    said = quantize("--target-bits", 5, "--sensitivity", "fisher", "--sensitivities", table, code=3)["error"]
    assert said["code"] == "E463" and "by weight, not by fisher" in said["message"]
    said = quantize("--target-bits", 5, "--sensitivities", table, model=runs.LONG.parent / "short", code=3)[
        "error"
    ]
    assert said["code"] == "E463" and "another model" in said["message"]


@pytest.mark.parametrize(
    "arguments", [("--allocation", "pmq", "--target-bits", 2.5), ("--drop-experts", "--target-size", "1MB")]
)
def test_losses_that_would_not_be_looked_at_are_refused(quantize, scratch, unread, arguments):
    said = quantize(*arguments, "--sensitivities", scratch / "losses.json", code=2)["error"]
    assert said["code"] == "E217" and "--sensitivities has no effect" in said["message"]


# ---- GGUF ----------------------------------------------------------------------------------------------


def test_what_llama_cpp_has_no_graph_for_is_refused_before_text_is_read(capsys, scratch, unread):
    pytest.importorskip("gguf")
    model = runs.tiny(
        "mistral", scratch / "tiny", sliding_window=8, hidden_size=64, intermediate_size=96, head_dim=16
    )
    ran = runs.command(
        capsys, "quantize", model, "-o", scratch / "x.gguf", "--format", "gguf", "--method", "gptq", "--json"
    )
    assert ran.code == 3 and ran.document["error"]["code"] == "E328"
    assert "slides its attention window" in ran.document["error"]["message"]


# ---- refusals told once --------------------------------------------------------------------------------


def test_a_kind_of_matrix_is_told_once(capsys, scratch, unread):
    pytest.importorskip("gguf")
    model = runs.tiny("llama", scratch / "tiny", hidden_size=192, intermediate_size=256, head_dim=32)
    layers = json.loads((model / "config.json").read_text())["num_hidden_layers"] - 1
    for scheme, code, words, kinds in (
        ("W4A16-g64", "E466", "cannot be stored as int4g64", 7),
        ("W4A16-g128", "E231", "group size 128 does not divide 192", 6),
    ):
        ran = runs.command(
            capsys,
            "quantize",
            model,
            "-o",
            scratch / "x.gguf",
            "--format",
            "gguf",
            "--scheme",
            scheme,
            "--method",
            "rtn",
            "--json",
        )
        error = ran.document["error"]
        told = [error["message"], *(other["message"] for other in error["others"])]
        assert error["code"] == code and words in told[0] and len(told) == kinds, told
        assert all(f" and {layers} more layer" in one for one in told)


def names(layers: int, experts: int = 0) -> dict[str, tuple[int, int]]:
    parts = [f"mlp.experts.{e}." for e in range(experts)] or ["mlp."]
    return {
        f"model.layers.{n}.{part}{m}_proj.weight": (96, 100)
        for n in range(layers)
        for part in parts
        for m in ("up", "down")
    }


FORCED = Scheme("int", 4, 64)


@pytest.mark.parametrize(
    ("refusals", "code"),
    [
        (lambda m: auto_round.refusals(m, model_type="qwen3_moe"), "E458"),
        (lambda m: compressed_runtimes.refusals(m), "E456"),
        (lambda m: forms.get("gguf", Reader(), "qwen3_moe").refusals(m), "E466"),
    ],
)
def test_every_form_tells_a_kind_once(refusals, code):
    found = refusals({name: (shape, FORCED) for name, shape in names(28).items()})
    assert [error.code for error in found] == [code] * 2
    assert all(" and 27 more layers cannot be stored as int4g64" in error.message for error in found)
    found = refusals({name: (shape, FORCED) for name, shape in names(28, experts=64).items()})
    assert len(found) == 2 and all(" and 1,791 more of its kind cannot" in error.message for error in found)
    (one,) = refusals({"model.layers.3.mlp.up_proj.weight": ((96, 100), FORCED)})
    assert one.message.startswith("model.layers.3.mlp.up_proj.weight cannot be stored as int4g64")


def test_bitsandbytes_tells_a_kind_once():
    found = bnb.refusals({name: (shape, bnb.NF4) for name, shape in names(3).items()})
    assert [error.code for error in found] == ["E461"] * 2 and all(
        "and 2 more layers cannot" in e.message for e in found
    )


def test_ties_are_told_once_for_all_layers():
    mixed = {}
    for layer in range(4):
        for part, bits in (("q", 4), ("k", 4), ("v", 8)):
            mixed[f"model.layers.{layer}.self_attn.{part}_proj.weight"] = ((64, 64), Scheme("int", bits, 32))
    (one,) = compressed_runtimes.refusals(mixed, Reader("vllm"))
    assert one.code == "E456" and one.message.endswith("; so it is with 3 more layers")
    (one,) = auto_round.refusals(mixed, Reader("vllm"))
    assert one.code == "E459" and one.message.endswith("; so it is with 3 more layers")
    experts = {
        name: ((96, 64), Scheme("int", 8 if ".1.up" in name else 4, 32)) for name in names(3, experts=2)
    }
    (one,) = forms.get("gguf", Reader(), "mixtral").refusals(experts)
    assert one.code == "E467" and one.message.endswith("; so it is with 2 more layers")


def test_other_reasons_and_other_kinds_are_told_apart():
    told = told_once(
        [
            ("a.0.q.weight", "x"),
            ("a.1.q.weight", "y"),
            ("a.2.q.weight", "x"),
            ("a.0.k.weight", "x"),
            ("lm_head.weight", "x"),
        ]
    )
    assert told == [
        ("a.0.q.weight", "1 more layer", "x"),
        ("a.1.q.weight", "", "y"),
        ("a.0.k.weight", "", "x"),
        ("lm_head.weight", "", "x"),
    ]


# ---- sources that are not taken -------------------------------------------------------------------------


def test_the_reason_a_source_is_not_taken_says_what_is(capsys, scratch, unread):
    for family, options, code, words, help in (
        ("gpt2", {}, "E231", "linear modules alone are written", "load_in_4bit=True"),
        ("gpt_oss", {}, "E231", "holds all experts of a layer in one tensor", "MXFP4"),
    ):
        model = runs.tiny(family, scratch / family, **options)
        ran = runs.command(capsys, "quantize", model, "-o", scratch / "out", "--method", "rtn", "--json")
        assert ran.document["error"]["code"] == code and words in ran.document["error"]["message"]
        assert help in ran.document["error"]["help"]
    folder = runs.tiny("llama", scratch / "varied", hidden_size=192, head_dim=32)
    config = config_of("llama", num_hidden_layers=3)
    config["block_configs"] = [{"attention": {"no_op": False, "num_attention_heads": 6, "num_key_value_heads": 3},
                                "ffn": {"no_op": False, "intermediate_size": 96}}] * 3  # fmt: skip
    (folder / "config.json").write_text(json.dumps(per_layer.finish(config)[0]))
    ran = runs.command(
        capsys, "quantize", folder, "-o", scratch / "x.gguf", "--format", "gguf", "--method", "rtn", "--json"
    )
    assert ran.document["error"]["code"] == "E380" and "--gguf-type q4_0" in ran.document["error"]["help"]
