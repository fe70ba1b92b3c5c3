"""``surgeon edit`` from responses to a verified model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import edit_models as em
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from surgeon.checkpoint.checkpoint import open_path

MODELS = Path(__file__).resolve().parents[1] / "models"


@pytest.fixture
def model(scratch):
    return Path(shutil.copytree(MODELS / "base", scratch / "base"))


def invoke(*arguments):
    from surgeon.cli.edit import edit

    app = typer.Typer()
    app.command()(edit)
    return CliRunner().invoke(app, [str(a) for a in arguments])


def written(scratch, count=24):
    """Responses with much and with little thinking, about the same sums."""
    drawn = np.random.default_rng(0)
    lines = []
    for number in range(count):
        a, b, c = drawn.integers(100, 999, 3)
        steps = f"{a}+{b}={a + b}\n{a + b}+{c}={a + b + c}\n"
        checks = f"{a}+{b}:7+8=15,4+5+1=10={a + b}\ncheck:{a + b}-{b}={a}\ntotal:{a + b}\n" * 3
        thinking = checks + steps if number % 2 else steps
        lines.append({"prompt": f"Add {a}+{b}+{c}.", "thinking": thinking, "response": f"answer:{a + b + c}"})
    path = scratch / "responses.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def text(scratch):
    path = scratch / "neutral.txt"
    path.write_text("\n\n".join(f"Add {n}+{2 * n}.\nanswer:{3 * n}" for n in range(100, 160)))
    return path


COMMON = ("--thresholds", "80,50", "--threads", "1", "--device", "cpu", "--json")


def test_thinkedit_from_responses(model, scratch):
    out = scratch / "out"
    arguments = (model, "--method", "thinkedit", "--responses", written(scratch), "--heads-count", "2", "-o", out,
                 "--save-direction", scratch / "d.safetensors", "--calibration", text(scratch), *COMMON)  # fmt: skip
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    heads = document["edit"]["heads"]
    assert len(heads) == 2 and all(h["after"] < 0.02 * h["before"] and "score" in h for h in heads)
    assert heads == sorted(heads, key=lambda h: (h["layer"], h["head"]))
    quality = document["edit"]["quality"]
    assert quality["kl"] > 0 and quality["perplexity_before"] > 1
    manifest = json.loads((out / "surgeon.json").read_text())
    assert manifest["recipe"]["heads"] == [f"{h['layer']}:{h['head']}" for h in heads]
    assert manifest["recipe"]["direction"]["sha256"] == document["edit"]["direction"]["sha256"]
    assert str(scratch) not in (out / "surgeon.json").read_text()
    source, edited = open_path(model), open_path(out)
    for name, info in source.tensors.items():
        same = np.array_equal(
            source.read_bytes(name, 0, info.nbytes), edited.read_bytes(name, 0, info.nbytes)
        )
        assert same == (name not in document["edit"]["changed"]), name
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (model / name).read_bytes()
    assert "edited by the method" in (out / "README.md").read_text()
    again = invoke(*arguments)
    assert again.exit_code == 0 and json.loads(again.stdout)["output"]["unchanged"]
    stored = invoke(model, "--method", "thinkedit", "--direction", scratch / "d.safetensors", "--heads-count", "2",
                    "--no-check", "-o", scratch / "again", "--json")  # fmt: skip
    assert stored.exit_code == 0, stored.output
    assert json.loads(stored.stdout)["edit"]["heads"] == heads
    digest = lambda folder: (folder / "model.safetensors").read_bytes()  # noqa: E731
    assert digest(scratch / "again") == digest(out)


def test_steering_by_budget_becomes_a_llama(model, scratch):
    result = invoke(model, "--method", "steer", "--layer", 2, "--kl-budget", 0.02, "--responses", written(scratch),
                    "-o", scratch / "out", "--calibration", text(scratch), *COMMON)  # fmt: skip
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)["edit"]
    assert report["relabelled_from"] == "qwen2" and report["bias"] == "model.layers.2.mlp.down_proj.bias"
    # stored as bfloat16, measured before that
    assert report["fit"]["measured"][-1][1] == pytest.approx(0.02, rel=0.15)
    assert report["quality"]["kl"] == pytest.approx(report["fit"]["measured"][-1][1], rel=1e-3)
    assert np.sign(report["gamma"]) == report["sign"]["sign"]
    assert json.loads((scratch / "out" / "config.json").read_text())["model_type"] == "llama"
    loaded, info = type(em.stock(scratch / "out")).from_pretrained(scratch / "out", output_loading_info=True)
    assert (
        type(loaded).__name__ == "LlamaForCausalLM"
        and not info["missing_keys"]
        and not info["unexpected_keys"]
    )
    import transformers

    tokens = transformers.AutoTokenizer.from_pretrained(scratch / "out")("Add 1+2.")["input_ids"]
    assert tokens == transformers.AutoTokenizer.from_pretrained(model)("Add 1+2.")["input_ids"]


def test_control_vector_writes_no_model(model, scratch):
    pytest.importorskip("gguf")
    result = invoke(model, "--method", "steer", "--layer", 2, "--responses", written(scratch), "--control-vector",
                    scratch / "v.gguf", *COMMON)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert (scratch / "v.gguf").is_file() and not (scratch / "base-edited").exists()


def test_default_output_and_dry_run(model, scratch):
    arguments = (model, "--method", "project-out", "--responses", written(scratch), "--no-check", *COMMON)
    dry = invoke(*arguments, "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert not (scratch / "base-edited").exists()
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert (scratch / "base-edited" / "model.safetensors").is_file()
    refused = invoke(*arguments, "--dry-run")
    assert refused.exit_code == 6


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (("--method", "thinkedit"), "E295"),
        (("--method", "shrink", "--responses", "r"), "E296"),
        (("--method", "thinkedit", "--responses", "r", "--gamma", "1"), "E296"),
        (("--method", "thinkedit", "--responses", "r", "--strength", "0"), "E297"),
        (("--method", "thinkedit", "--responses", "r", "--heads", "1:1", "--heads-count", "2"), "E296"),
        (("--method", "steer", "--responses", "r", "--gamma", "0.2"), "E299"),
        (("--method", "steer", "--responses", "r", "--layer", "2"), "E299"),
        (
            ("--method", "steer", "--responses", "r", "--layer", "2", "--gamma", "0.2", "--kl-budget", "1"),
            "E296",
        ),
        (("--method", "steer", "--responses", "r", "--layer", "2", "--gamma", "0"), "E299"),
        (("--method", "project-out", "--responses", "r", "--site", "middle"), "E296"),
        (("--method", "thinkedit", "--direction", "d", "--responses", "r"), "E296"),
        (("--method", "thinkedit", "--responses", "r", "--thresholds", "10"), "E209"),
    ],
)
def test_wrong_usage(model, options, code):
    result = invoke(model, *options, "--json")
    assert result.exit_code == 2, result.output
    assert json.loads(result.stdout)["error"]["code"] == code
