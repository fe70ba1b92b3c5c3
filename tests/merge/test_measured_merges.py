"""Merges that run the models first, end to end, against the stock model with hooks."""

from __future__ import annotations

import builtins
import json
import sys
from pathlib import Path

import merge_models as mm
import pytest
import torch

MODELS = Path(__file__).resolve().parents[1] / "models"
sys.path.insert(0, str(MODELS))

import task  # noqa: E402


@pytest.fixture(scope="module")
def calibration(tmp_path_factory) -> Path:
    import itertools
    import random

    rng = random.Random(7)
    lines = [
        {"question": q.text, "short": task.solve(q, -4.0, rng), "long": task.solve(q, 4.0, rng)}
        for q in itertools.islice(task.questions("train", 7), 12)
    ]
    path = tmp_path_factory.mktemp("calibration") / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def merge(surgeon, tmp_path, calibration, *options, name="out"):
    done = surgeon(
        "merge", MODELS / "long", MODELS / "short", "--calibration", calibration, "--samples", "8", "--seed", "3",
        "-o", tmp_path / name, *options,
    )  # fmt: skip
    assert done.code == 0, done.err
    return mm.tensors(tmp_path / name)


def hooked_means(calibration: Path, samples) -> dict[str, torch.Tensor]:
    """Mean |x| of every linear and norm module of the stock short model, by forward hooks."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODELS / "short", dtype=torch.float32).eval()
    sums: dict[str, torch.Tensor] = {}

    def watch(name):
        def hook(module, inputs, output):
            rows = inputs[0].reshape(-1, inputs[0].shape[-1]).double().abs().sum(0)
            sums[name] = sums.get(name, 0) + rows

        return hook

    for name, module in model.named_modules():
        if getattr(module, "weight", None) is not None and "embed" not in name:
            module.register_forward_hook(watch(name))
    with torch.no_grad():
        for sample in samples:
            model(torch.from_numpy(sample.ids)[None])
    return sums


def test_aim_on_ties_is_what_hooks_on_the_stock_model_give(surgeon, tmp_path, calibration):
    from surgeon.calibrate import data

    merged = merge(surgeon, tmp_path, calibration, "--method", "ties", "--dtype", "float32", name="plain")
    damped = merge(surgeon, tmp_path, calibration, "--method", "ties", "--aim", "0.4", "--dtype", "float32")
    base = mm.tensors(MODELS / "short")
    found = data.load(str(calibration), MODELS / "short", samples=8, seed=3, answer="short")
    means = hooked_means(calibration, found.samples)
    checked = 0
    for name, value in damped.items():
        module = name.removesuffix(".weight")
        b, m = base[name].double(), merged[name].double()
        if name.endswith(".weight") and module in means and module != "lm_head":
            a = means[module] / means[module].max()
            m = b + (m - b) * (1 - a * 0.6)
            checked += 1
        torch.testing.assert_close(value.double(), m, rtol=1e-5, atol=2e-6)
    assert checked == 4 * 9 + 1  # seven matrices and two norms a layer, and the final norm


def test_a_sweep_of_aim_gives_what_single_runs_give(surgeon, tmp_path, calibration):
    done = surgeon(
        "merge", MODELS / "long", MODELS / "short", "--method", "aim-ties", "--calibration", calibration,
        "--samples", "8", "--seed", "3", "--sweep", "aim=0.2,1", "-o", tmp_path / "sweep",
    )  # fmt: skip
    assert done.code == 0, done.err
    single = merge(surgeon, tmp_path, calibration, "--method", "ties", "--aim", "0.2", name="single")
    plain = merge(surgeon, tmp_path, calibration, "--method", "ties", name="plain")
    for folder, wanted in (("aim=0.2", single), ("aim=1", plain)):
        swept = mm.tensors(tmp_path / "sweep" / folder)
        assert all(torch.equal(swept[n], wanted[n]) for n in wanted)


@pytest.mark.parametrize("method", ["acm-ties", "sens", "fim-task-arithmetic"])
def test_layer_strengths_are_measured_written_and_used_again(surgeon, tmp_path, calibration, method):
    """What a run writes into --work gives the same bytes through --layer-scores."""
    work = tmp_path / "work"
    first = merge(
        surgeon, tmp_path, calibration, "--method", method, "--lambda", "0.8", "--work", work, name="first"
    )
    files = list(work.glob("*.json"))
    assert len(files) == 1
    scores = json.loads(files[0].read_text())
    assert scores["made_by"] and scores["models"]["long"]["layers"]
    plain = {"acm-ties": "ties"}.get(method, "task-arithmetic")
    options = ["--method", plain, "--lambda", "0.8"]
    again = merge(surgeon, tmp_path, calibration, *options, "--layer-scores", files[0], name="again")
    assert all(torch.equal(first[n], again[n]) for n in first)
    unscaled = merge(surgeon, tmp_path, calibration, *options, name="unscaled")
    assert any(not torch.equal(first[n], unscaled[n]) for n in first)
    manifest = json.loads((tmp_path / "first" / "surgeon.json").read_text())
    measured = manifest["recipe"]["measured"]
    assert measured and str(tmp_path) not in json.dumps(manifest)


def test_a_second_run_does_not_measure_again(surgeon, tmp_path, calibration):
    work = tmp_path / "work"
    merge(surgeon, tmp_path, calibration, "--method", "aim-ties", "--work", work, name="first")
    done = surgeon(
        "merge", MODELS / "long", MODELS / "short", "--calibration", calibration, "--samples", "8", "--seed", "3",
        "--method", "aim-dare-ties", "--work", work, "-o", tmp_path / "second",
    )  # fmt: skip
    assert done.code == 0 and "is taken from aim-" in done.err
    manifest = json.loads((tmp_path / "second" / "surgeon.json").read_text())
    assert manifest["recipe"]["measured"]["aim"]["calibration"]["samples"] == 8


def test_nothing_is_left_beside_the_output(surgeon, tmp_path, calibration):
    merge(surgeon, tmp_path, calibration, "--method", "aim-ties")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_a_dry_run_measures_nothing(surgeon, tmp_path, calibration):
    done = surgeon(
        "merge",
        MODELS / "long",
        MODELS / "short",
        "--method",
        "aim-ties",
        "--dry-run",
        "-o",
        tmp_path / "out",
        "--json",
    )
    assert done.code == 0
    assert any("will be measured" in n for n in done.document["notes"])
    assert list(tmp_path.iterdir()) == []


def test_text_for_one_model_is_named_after_it(surgeon, tmp_path, calibration):
    plain = tmp_path / "plain.jsonl"
    plain.write_text(json.dumps({"text": "Add 1+2. 1+2=3\nanswer:3"}) + "\n")
    done = surgeon(
        "merge", MODELS / "long", MODELS / "short", "--method", "aim-ties", "--calibration", f"short={plain}",
        "--calibration", f"long={calibration}", "-o", tmp_path / "out",
    )  # fmt: skip
    assert done.code == 0, done.err
    record = json.loads((tmp_path / "out" / "surgeon.json").read_text())["recipe"]["measured"]["aim"][
        "calibration"
    ]
    assert record["name"] == "plain.jsonl" and record["samples"] == 1


def test_sens_of_a_pair_needs_short_and_long_answers(surgeon, tmp_path):
    text = tmp_path / "t.jsonl"
    text.write_text(json.dumps({"prompt": "Add 1+2.", "response": "1+2=3"}) + "\n")
    done = surgeon(
        "merge",
        MODELS / "long",
        MODELS / "short",
        "--method",
        "sens",
        "--calibration",
        text,
        "-o",
        tmp_path / "out",
    )
    assert done.code == 3 and "t.jsonl:1" in done.err and "short" in done.err
    assert not (tmp_path / "out").exists()


def test_a_bare_file_has_no_tokenizer(surgeon, tmp_path, calibration):
    import shutil

    for name in ("base", "short"):
        shutil.copy(MODELS / name / "model.safetensors", tmp_path / f"{name}.safetensors")
    done = surgeon(
        "merge", tmp_path / "base.safetensors", tmp_path / "short.safetensors", "--method", "aim-ties",
        "--calibration", calibration, "-o", tmp_path / "out.safetensors",
    )  # fmt: skip
    assert done.code == 3 and "no tokenizer" in done.err


def test_without_torch_the_way_out_is_named(surgeon, tmp_path, calibration, monkeypatch):
    real = builtins.__import__

    def missing(name, *rest, **more):
        if name.startswith("surgeon.calibrate.settings"):
            raise ImportError("No module named 'torch'", name="torch")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    done = surgeon(
        "merge", MODELS / "long", MODELS / "short", "--method", "aim-ties", "--calibration", calibration,
        "-o", tmp_path / "out",
    )  # fmt: skip
    assert done.code == 5 and "torch" in done.err and "model-surgeon[run]" in done.err
    assert not (tmp_path / "out").exists()


def test_the_document_names_the_plan_that_was_run(surgeon, tmp_path, calibration):
    """The plan's id and values are those after measuring, and what was said before stays said."""
    done = surgeon(
        "merge", MODELS / "long", MODELS / "short", "--method", "aim-ties", "--calibration", calibration, "--samples", "4",
        "-o", tmp_path / "out", "--json",
    )  # fmt: skip
    manifest = json.loads((tmp_path / "out" / "surgeon.json").read_text())
    assert done.document["plan"]["id"] == manifest["plan"]
    assert done.document["plan"]["measured"] == manifest["recipe"]["measured"]
    assert any("needs a base" in note for note in done.document["notes"])


def test_a_refusal_leaves_no_empty_folder(surgeon, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    done = surgeon(
        "merge", MODELS / "long", MODELS / "short", "--method", "aim-ties", "--calibration", empty, "-o", tmp_path / "out"
    )  # fmt: skip
    assert done.code == 3 and "E372" in done.err
    assert list(tmp_path.iterdir()) == [empty]


def test_another_result_is_refused_before_models_are_run(surgeon, tmp_path, calibration, monkeypatch):
    from surgeon.merge import measure

    merge(surgeon, tmp_path, calibration, "--method", "ties")
    monkeypatch.setattr(measure, "measure", lambda *a, **k: pytest.fail("models were run"))
    done = surgeon("merge", MODELS / "long", MODELS / "short", "--method", "aim-ties", "-o", tmp_path / "out")
    assert done.code == 6 and "E601" in done.err


def test_the_same_command_finds_its_own_result(surgeon, tmp_path, calibration):
    options = ("merge", MODELS / "long", MODELS / "short", "--method", "aim-ties", "--calibration", calibration,
               "--samples", "4", "-o", tmp_path / "out")  # fmt: skip
    assert surgeon(*options).code == 0
    again = surgeon(*options)
    assert again.code == 0 and "unchanged" in again.out


@pytest.mark.parametrize("method", ["aim-ties", "acm-ties"])
def test_a_damaged_measurement_is_named_as_one(surgeon, tmp_path, calibration, method):
    work = tmp_path / "work"
    merge(surgeon, tmp_path, calibration, "--method", method, "--work", work, name="first")
    (file,) = (p for p in work.iterdir() if p.is_file())
    file.write_bytes(file.read_bytes()[:50])
    done = surgeon(
        "merge", MODELS / "long", MODELS / "short", "--calibration", calibration, "--samples", "8", "--seed", "3",
        "--method", method, "--work", work, "-o", tmp_path / "second",
    )  # fmt: skip
    assert done.code == 3 and file.name in done.err and "delete it to measure again" in done.err


def test_a_sweep_names_a_command_that_works(surgeon, tmp_path, calibration):
    done = surgeon(
        "merge", MODELS / "long", MODELS / "short", "--method", "ties", "--sweep", "lambda=0.5,0.8", "-o", tmp_path / "sweep"
    )  # fmt: skip
    assert f"surgeon verify {tmp_path / 'sweep' / 'lambda=0.5'} --generate" in done.err


def test_what_is_assumed_or_not_used_is_said(surgeon, tmp_path, calibration):
    assumed = surgeon(
        "merge", MODELS / "long", MODELS / "short", "--method", "linear", "--delta-rank", "0.5", "--calibration", calibration,
        "--dry-run", "-o", tmp_path / "out",
    )  # fmt: skip
    assert assumed.code == 0
    assert f"task vectors start at {MODELS / 'short'}" in assumed.err
    assert "--calibration is not read" in assumed.err
