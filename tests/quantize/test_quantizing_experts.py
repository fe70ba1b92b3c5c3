"""`surgeon quantize` on mixtures of experts: widths by PMQ at every granularity, experts dropped, what is refused beforehand."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections import defaultdict
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "prune"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "structure"))
import pruning_runs as runs
from expert_models import moe_folder

from surgeon.calibrate import divided
from surgeon.deploy import quantized_check

EXPERT = re.compile(r".*\.layers\.(\d+)\..*\.experts\.(\d+)\.(\w+)\.weight")


def made(family, folder, **extra):
    wide = {"hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2}
    wide |= {"head_dim": 32} if family == "qwen3_moe" else {}
    shutil.copytree(moe_folder(family, vocab_size=281, **wide, **extra), folder)
    for name in runs.TOKENIZER:
        shutil.copy(runs.LONG / name, folder)
    return folder


@pytest.fixture
def text(scratch):
    return runs.text(scratch / "cal.jsonl")


@pytest.fixture
def quantize(capsys, scratch, text):
    def command(model, *arguments, code=0, out="out", calibration=True):
        given = ("--calibration", text, "--samples", 8, "--sequence-length", 64) if calibration else ()
        ran = runs.command(
            capsys, "quantize", model, "-o", scratch / out, *given, "--json", "--no-progress", *arguments
        )
        assert ran.code == code, ran.out + ran.err
        return ran.document

    return command


@pytest.fixture
def unread(monkeypatch):
    monkeypatch.setattr(
        quantized_check, "check", lambda folder, *a, **k: {"reader": "transformers", "notice": "left out"}
    )


def widths(schemes):
    """Return (layer, expert) -> {gate, up, down: bits} from the schemes of a plan."""
    found = defaultdict(dict)
    for name, scheme in schemes.items():
        if match := EXPERT.match(name):
            bits = int(re.match(r"int(\d)", scheme)[1])
            found[int(match[1]), int(match[2])][match[3].removesuffix("_proj")] = bits
    return found


def average(found):
    """Return the mean of a plan's bits: all three matrices are of one size."""
    return sum(sum(own.values()) for own in found.values()) / sum(map(len, found.values()))


PMQ = ("--allocation", "pmq", "--granularity", "projection")


def test_projections_of_experts_have_their_own_widths(quantize, scratch, unread):
    model = made("qwen3_moe", scratch / "model")
    said = quantize(
        model, *PMQ, "--target-bits", 2.6, "--bits", "2,3,4", "--format", "auto-round", "--dtype", "bfloat16"
    )
    plan = json.loads((scratch / "out" / "plan.json").read_bytes())
    found = widths(plan["matrices"])
    assert all(own["gate"] == own["up"] for own in found.values())
    assert any(own["gate"] != own["down"] for own in found.values())
    for layer in {layer for layer, _ in found}:  # the average holds in every layer
        assert average({key: own for key, own in found.items() if key[0] == layer}) <= 2.6
    assert average(found) == pytest.approx(plan["experts"]["bits"])
    assert any("bits on average" in remark for remark in said["remarks"])
    quantize(model, *PMQ, "--target-bits", 3, "--bits", "2,3,4", "--must-appear", "2,4", "--scope", "model", "--format",
             "auto-round", "--dtype", "bfloat16", out="must")  # fmt: skip
    must = widths(json.loads((scratch / "must" / "plan.json").read_bytes())["matrices"])
    for layer in {layer for layer, _ in must}:
        assert {2, 4} <= {bits for key, own in must.items() if key[0] == layer for bits in own.values()}


@pytest.mark.slow
def test_the_stock_reader_computes_what_projections_of_several_widths_stand_for(quantize, scratch):
    model = made("qwen3_moe", scratch / "model")
    said = quantize(
        model, *PMQ, "--target-bits", 2.6, "--bits", "2,3,4", "--format", "auto-round", "--dtype", "bfloat16"
    )
    reading = said["reading"]
    assert reading["reader"] == "transformers" and reading["relative difference"] < 0.02
    found = widths(json.loads((scratch / "out" / "plan.json").read_bytes())["matrices"])
    assert len({bits for own in found.values() for bits in own.values()}) > 1


@pytest.mark.slow
def test_gguf_has_one_type_for_a_projection_of_all_experts_of_a_layer(quantize, scratch):
    library = pytest.importorskip("gguf")
    model = made("qwen3_moe", scratch / "model")
    said = quantize(
        model,
        *PMQ,
        "--target-bits",
        5.4,
        "--bits",
        "4,5,8",
        "--scope",
        "model",
        "--format",
        "gguf",
        out="out.gguf",
    )
    assert said["reading"]["reader"] == "llama.cpp" and said["reading"]["kl"] < 0.05
    types = {
        t.name: t.tensor_type.name
        for t in library.GGUFReader(scratch / "out.gguf").tensors
        if "_exps." in t.name
    }
    assert (
        len(types) == 6 and set(types.values()) <= {"Q4_0", "Q5_0", "Q8_0"} and len(set(types.values())) > 1
    )
    assert all(types[f"blk.{n}.ffn_gate_exps.weight"] == types[f"blk.{n}.ffn_up_exps.weight"] for n in (0, 1))
    assert sum(int(kind[1]) for kind in types.values()) / 6 <= 5.4


@pytest.mark.slow
def test_experts_are_dropped_from_routing_groups_equally(quantize, scratch):
    extra = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
    model = made("deepseek_v3", scratch / "model", **extra)
    options = ("--drop-experts", "--bits", "4,8", "--format", "auto-round", "--granularity", "layer", "--dtype", "bfloat16",
               "--scheme", "re:.*self_attn.*=none", "--scheme", r"re:.*mlp\.(gate|up|down)_proj=none")  # fmt: skip
    refused = quantize(model, *options, "--target-size", 1000, code=2)["error"]
    rest = int(re.search(r"takes ([\d,]+)$", refused["message"])[1].replace(",", ""))
    said = quantize(model, *options, "--target-size", rest + 22_000)
    assert said["output"]["bytes"] <= rest + 22_000
    assert said["reading"]["reader"] == "transformers" and said["reading"]["relative difference"] < 0.02
    experts = json.loads((scratch / "out" / "plan.json").read_bytes())["experts"]
    assert experts["removed"] in (2, 4)
    for ids in experts["kept"].values():
        assert len(ids) == 8 - experts["removed"] and sum(e < 4 for e in ids) == len(ids) // 2
    config = json.loads((scratch / "out" / "config.json").read_bytes())
    assert config["n_routed_experts"] == 8 - experts["removed"] and config["n_group"] == 2


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (("--format", "gguf", "--granularity", "expert", "--bits", "4,8"), "E488", "projection"),
        (("--format", "compressed-tensors"), "E488", "nothing to choose"),
        (("--format", "compressed-tensors", "--runtime", "vllm", "--bits", "2,4", "--granularity", "projection"), "E488", "of a layer"),
        (("--format", "auto-round", "--scheme", "re:.*experts.0.down_proj=W8A16"), "E217", "experts.0.down_proj"),
    ],
)  # fmt: skip
def test_what_leaves_nothing_to_choose_is_refused_before_text_is_read(
    quantize, scratch, monkeypatch, arguments, code, word
):
    monkeypatch.setattr(divided, "load", lambda *a, **k: pytest.fail("text was read"))
    model = made("qwen3_moe", scratch / "model")
    dtype = ("--dtype", "bfloat16")
    said = quantize(model, "--allocation", "pmq", "--target-bits", 4.5, *dtype, *arguments, code=2)["error"]
    assert said["code"] == code and word in said["message"] + said["help"] and said["help"]


def test_a_width_that_experts_cannot_have_is_refused_and_others_are_left_out(quantize, scratch, unread):
    model = made("qwen3_moe", scratch / "model")
    vllm = (
        "--runtime",
        "vllm",
        "--granularity",
        "layer",
        "--scope",
        "model",
        "--target-bits",
        3.5,
        "--dtype",
        "bfloat16",
    )
    said = quantize(model, "--allocation", "pmq", *vllm, "--bits", "2,3,4", code=3)["error"]
    assert said["code"] == "E477" and "3 bits" in said["message"]
    quantize(model, "--allocation", "pmq", *vllm)
    found = widths(json.loads((scratch / "out" / "plan.json").read_bytes())["matrices"])
    assert {bits for own in found.values() for bits in own.values()} <= {2, 4, 8} and average(found) <= 3.5
