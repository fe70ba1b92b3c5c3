"""`surgeon quantize` from the command line to a folder: what is written, what is said, what is refused, what is taken up again."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "prune"))

import pruning_runs as runs

from surgeon.checkpoint.checkpoint import open_path
from surgeon.deploy import quantized_check
from surgeon.formats.dequantized import dequantized
from surgeon.kernels.cast import widen
from surgeon.quantize import run, sequential
from surgeon.verify.static import verify_path

SHORT = ("--samples", 8, "--sequence-length", 96)


@pytest.fixture
def text(scratch):
    return runs.text(scratch / "cal.jsonl")


@pytest.fixture
def unread(monkeypatch):
    """Leave the reader out, which takes seconds: tests of readers are elsewhere."""
    monkeypatch.setattr(
        quantized_check, "check", lambda folder, *a, **k: {"reader": "transformers", "notice": "left out"}
    )


@pytest.fixture
def quantize(capsys, scratch, text, unread):
    def command(*arguments, code=0, model=runs.LONG, out="out"):
        ran = runs.command(capsys, "quantize", model, "-o", scratch / out, *SHORT, "--calibration", text, "--json",
                           "--no-progress", *arguments)  # fmt: skip
        assert ran.code == code, ran.out + ran.err
        return ran.document

    return command


def values(folder: Path) -> dict[str, np.ndarray]:
    view = dequantized(open_path(folder))
    return {n: widen(view.read(n, 0, i.elements), i.dtype).reshape(i.shape) for n, i in view.tensors.items()}


def test_a_scheme_with_patterns_is_written_as_it_was_asked_for(quantize, scratch):
    said = quantize("--scheme", "W4A16", "--scheme", "re:.*down_proj=none", "--scheme", "*.v_proj=W8A16")
    plan = json.loads((scratch / "out" / "plan.json").read_bytes())
    for name, scheme in plan["matrices"].items():
        wanted = "kept" if "down_proj" in name else "int8g32" if "v_proj" in name else "int4g32"
        assert scheme == wanted, name
    weights = (scratch / "out" / "model.safetensors").stat().st_size
    assert said["output"]["bytes"] == weights and said["status"] == "ok" and said["method"] == "gptq"
    assert verify_path(scratch / "out", hashes=True).errors == []
    before = open_path(runs.LONG)
    for name, after in values(scratch / "out").items():
        plain = widen(before.read(name, 0, after.size), before.tensors[name].dtype).reshape(after.shape)
        error = np.linalg.norm(after - plain) / max(np.linalg.norm(plain), 1e-30)
        kind = plan["matrices"].get(name, "kept")
        assert error == 0 if kind == "kept" else 0 < error < (0.02 if kind == "int8g32" else 0.2), name
    assert said["metrics"]["kl"] < 0.05 and said["metrics"]["top1"] > 0.9
    assert not (scratch / "out.work").exists()


def test_a_size_is_met_to_the_byte_and_bits_are_those_of_the_file(quantize, scratch):
    for target in (700_000, 900_001):
        said = quantize(
            "--target-size", target, "--sensitivity", "weight", "--method", "rtn", out=f"size-{target}"
        )
        folder = scratch / f"size-{target}"
        weights = (folder / "model.safetensors").stat().st_size
        assert weights == said["output"]["bytes"] <= target
        assert weights > 0.97 * target
    said = quantize("--target-bits", 4.6, "--sensitivity", "weight", "--method", "rtn", out="bits")
    stored = open_path(scratch / "bits")
    plan = json.loads((scratch / "bits" / "plan.json").read_bytes())["matrices"]
    size = sum(i.nbytes for n, i in stored.tensors.items() if n.rpartition("_")[0] in plan or n in plan)
    source = open_path(runs.LONG)
    assert 8 * size / sum(source.tensors[n].elements for n in plan) == pytest.approx(said["output"]["bits"])
    assert 4.5 < said["output"]["bits"] <= 4.6


@pytest.mark.slow
def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(quantize, scratch, monkeypatch):
    quantize("--scheme", "W4A16", out="whole")
    made = []
    solve = sequential.solve

    def failing(*arguments, **options):
        made.append(1)
        if len(made) == 9:
            raise KeyboardInterrupt
        return solve(*arguments, **options)

    monkeypatch.setattr(sequential, "solve", failing)
    assert quantize("--scheme", "W4A16", code=130, out="again")["error"]["code"] == "E130"
    left = list((scratch / "again.work" / "quantize").glob("layers-*/*.safetensors"))
    assert left and not (scratch / "again").exists()
    monkeypatch.setattr(sequential, "solve", solve)
    quantize("--scheme", "W4A16", out="again")
    assert (scratch / "again" / "model.safetensors").read_bytes() == (
        scratch / "whole" / "model.safetensors"
    ).read_bytes()
    monkeypatch.setattr(run, "quantize_layers", lambda *a, **k: pytest.fail("made again"))
    assert quantize("--scheme", "W4A16", out="again")["output"]["unchanged"]


@pytest.mark.slow
def test_a_plan_is_repeated_and_a_strange_one_refused(quantize, scratch):
    quantize("--target-bits", 5, "--sensitivity", "weight", "--method", "rtn", out="first")
    quantize("--plan", scratch / "first", "--method", "rtn", out="second")
    assert (scratch / "second" / "model.safetensors").read_bytes() == (
        scratch / "first" / "model.safetensors"
    ).read_bytes()
    other = json.loads((scratch / "first" / "plan.json").read_bytes())
    other["matrices"]["model.layers.9.mlp.up_proj.weight"] = "int4g32"
    (scratch / "other.json").write_text(json.dumps(other))
    said = quantize("--plan", scratch / "other.json", code=3, out="third")
    assert said["error"]["code"] == "E492" and not (scratch / "third").exists()


@pytest.mark.slow
def test_sensitivities_are_kept_and_read_again(quantize, scratch, monkeypatch):
    table = scratch / "losses.json"
    first = quantize("--target-bits", 5, "--sensitivity", "rel-output", "--sensitivities", table, out="first")
    assert table.is_file() and first["loss"]["predicted"] == pytest.approx(
        first["loss"]["remeasured"], rel=0.5
    )
    from surgeon.quantize import measuring

    monkeypatch.setattr(measuring, "measure", lambda *a, **k: pytest.fail("measured again"))
    second = quantize("--target-bits", 4.75, "--sensitivities", table, out="second")
    assert second["output"]["bits"] <= 4.75 and second["loss"]["predicted"] > first["loss"]["predicted"]


def test_a_dry_run_says_the_exact_size_and_writes_nothing(quantize, scratch):
    said = quantize("--scheme", "W8A16", "--dry-run")
    assert not (scratch / "out").exists() and not (scratch / "out.work").exists()
    quantize("--scheme", "W8A16")
    assert (scratch / "out" / "model.safetensors").stat().st_size == said["output"]["bytes"]


REFUSED = [
    ("E231", 3, ("--scheme", "W4A16", "--group-size", 128), "group size 128 does not divide"),
    ("E218", 2, ("--scheme", "W4A16", "--scheme", "re:.*nothing=W8A16"), "matches no tensor"),
    ("E218", 2, ("--scheme", "W4A16", "--ignore", "no.such"), "matches no tensor"),
    ("E231", 3, ("--scheme", "none"), "nothing of long would be quantized"),
    ("E462", 2, ("--target-bits", 1.2, "--sensitivity", "weight", "--method", "rtn"), "cannot be reached"),
    ("E462", 2, ("--target-size", 1000, "--sensitivity", "weight", "--method", "rtn"), "cannot be reached"),
    ("E454", 3, ("--scheme", "NF4"), ""),
    ("E461", 3, ("--format", "bitsandbytes"), "do not fill blocks"),
]


@pytest.mark.parametrize(("code", "exit_code", "arguments", "sentence"), REFUSED)
def test_D10_what_readers_cannot_take_is_refused_before_anything_is_made(quantize, scratch, monkeypatch, code, exit_code, arguments, sentence):  # fmt: skip
    monkeypatch.setattr(run, "quantize_layers", lambda *a, **k: pytest.fail("made before it was refused"))
    said = quantize(*arguments, code=exit_code)
    assert (
        said["error"]["code"] in (code, "E456")
        and sentence in said["error"]["message"]
        and said["error"]["help"]
    )
    assert not (scratch / "out").exists()


def test_what_the_reader_says_is_not_published(quantize, scratch, monkeypatch):
    from surgeon.errors import InputError

    def wrong(*a, **k):
        raise InputError("E482", "it computes something else")

    monkeypatch.setattr(quantized_check, "check", wrong)
    assert quantize("--scheme", "W8A16", code=3)["error"]["code"] == "E482"
    assert not (scratch / "out").exists()


def test_stock_transformers_loads_what_was_published(capsys, scratch, text):
    ran = runs.command(capsys, "quantize", runs.LONG, "-o", scratch / "out", *SHORT, "--calibration", text, "--json",
                       "--target-bits", 5.5, "--sensitivity", "weight")  # fmt: skip
    assert ran.code == 0, ran.err
    reading = ran.document["reading"]
    assert reading["modules"] == 28 and reading["relative difference"] < 1e-3 and reading["generated"] == 16


@pytest.mark.slow
def test_without_a_word_gradients_weigh_errors(quantize, scratch):
    said = quantize("--target-bits", 5, "--bits", "4,8")
    assert said["allocation"]["sensitivity"] == "fisher" and said["output"]["bits"] <= 5


@pytest.mark.slow
def test_gguf_is_written_and_llama_cpp_computes_the_same(capsys, scratch, text):
    model = runs.tiny("llama", scratch / "tiny", hidden_size=192, intermediate_size=256, head_dim=32)
    ran = runs.command(capsys, "quantize", model, "-o", scratch / "out.gguf", *SHORT, "--calibration", text, "--json",
                       "--format", "gguf", "--target-bits", 5.5, "--sensitivity", "rel-output")  # fmt: skip
    assert ran.code == 0, ran.err
    said = ran.document
    assert (scratch / "out.gguf").stat().st_size == said["output"]["bytes"] and said["output"]["bits"] <= 5.5
    assert said["reading"]["reader"] == "llama.cpp" and said["reading"]["kl"] < 0.05
    again = runs.command(capsys, "quantize", model, "-o", scratch / "out.gguf", *SHORT, "--calibration", text, "--json",
                         "--format", "gguf", "--target-bits", 5.5, "--sensitivity", "rel-output")  # fmt: skip
    assert again.document["output"]["unchanged"]


@pytest.mark.parametrize(
    "arguments", [("--allocation", "pmq", "--target-bits", 2.5), ("--drop-experts", "--target-size", "1MB")]
)
def test_what_is_about_experts_is_refused_for_dense_models_before_text_is_read(
    quantize, scratch, monkeypatch, arguments
):
    from surgeon.calibrate import divided

    monkeypatch.setattr(divided, "load", lambda *a, **k: pytest.fail("text was read"))
    said = quantize(*arguments, code=2)["error"]
    assert said["code"] == "E217" and "is about experts" in said["message"] and said["help"]


def test_losses_of_another_model_are_refused(quantize, scratch):
    table = scratch / "losses.json"
    quantize(
        "--target-bits",
        5,
        "--sensitivity",
        "weight",
        "--method",
        "rtn",
        "--sensitivities",
        table,
        out="first",
    )
    said = quantize("--target-bits", 5, "--sensitivity", "weight", "--method", "rtn", "--sensitivities", table,
                    model=runs.LONG.parent / "short", code=3, out="second")  # fmt: skip
    assert said["error"]["code"] == "E463" and "another model" in said["error"]["message"]
