"""``surgeon eval`` from the command line: results, comparison, refusals."""

from __future__ import annotations

import importlib.util
import json
import shutil

import pytest
from running_sums import MODELS, asked

from surgeon import report
from surgeon.evaluate import harness

CAP = ("--max-new-tokens", 160)


def test_result_document(surgeon, question_file, tmp_path):
    ran = surgeon(
        MODELS / "short", "--questions", question_file(30), *CAP, "-o", tmp_path / "r.json", "--json"
    )
    assert ran.code == 0
    found = ran.document
    report.validate(json.loads((tmp_path / "r.json").read_text()))
    assert {k: found[k] for k in ("schema", "command", "status", "exit_code")} == {
        "schema": 1, "command": "eval", "status": "ok", "exit_code": 0,
    }  # fmt: skip
    assert found["model"]["name"] == "short" and found["model"]["dtype"] == "bfloat16"
    assert found["data"]["questions"] == 30
    assert found["settings"]["temperature"] == 0 and found["settings"]["dtype"] == "float32"
    rows = found["per_question"]
    tokens = [row["tokens"][0] for row in rows]
    assert found["metrics"]["tokens_mean"]["value"] == pytest.approx(sum(tokens) / 30)
    assert found["metrics"]["accuracy"]["value"] == sum(row["correct"][0] for row in rows) / 30 > 0.6
    assert found["metrics"]["intelligence_per_token"]["value"] == pytest.approx(
        1000 * found["metrics"]["accuracy"]["value"] / found["metrics"]["tokens_mean"]["value"]
    )
    assert any("30 questions" in w and "noise" in w for w in found["warnings"])
    assert list(tmp_path.glob("*.jsonl")) == [tmp_path / "questions.jsonl"]  # the work file is gone


def test_human_output_is_a_table_with_intervals(surgeon, question_file):
    ran = surgeon(MODELS / "short", "--questions", question_file(6), *CAP)
    assert "accuracy" in ran.out and "95 % interval" in ran.out and "tokens, mean" in ran.out
    assert "±" in ran.err


def test_baseline_model_and_baseline_result_give_the_same_comparison(surgeon, question_file, tmp_path):
    file = question_file(10)
    options = ["--questions", file, "--max-new-tokens", 400, "--json"]
    first = surgeon(MODELS / "long", *options, "-o", tmp_path / "long.json")
    by_result = surgeon(MODELS / "short", *options, "--baseline", tmp_path / "long.json").document
    by_model = surgeon(MODELS / "short", *options, "--baseline", MODELS / "long").document
    assert by_result["baseline"]["metrics"] == by_model["baseline"]["metrics"] == first.document["metrics"]
    assert by_result["baseline"]["paired"] == by_model["baseline"]["paired"]
    ratio = by_model["metrics"]["tokens_mean"]["value"] / first.document["metrics"]["tokens_mean"]["value"]
    assert by_model["baseline"]["paired"]["tokens_ratio"]["value"] == pytest.approx(ratio) and ratio < 0.4
    assert by_model["baseline"]["paired"]["mcnemar"]["p_value"] <= 1


def test_a_baseline_of_other_questions_settings_or_answers_is_refused(surgeon, question_file, tmp_path):
    result = tmp_path / "few.json"
    surgeon(MODELS / "short", "--questions", question_file(4), *CAP, "-o", result)
    more = surgeon(
        MODELS / "short", "--questions", question_file(6, "more.jsonl"), *CAP, "--baseline", result
    )
    assert more.code == 3 and "E395" in more.err and "2 of the 6" in more.err
    other = surgeon(
        MODELS / "short", "--questions", question_file(4), "--max-new-tokens", 99, "--baseline", result
    )
    assert other.code == 2 and "max_new_tokens 160 there, 99 here" in other.err
    judged = surgeon(
        MODELS / "short", "--questions", question_file(4), "--match", "exact", *CAP, "--baseline", result
    )
    assert judged.code == 3 and "other answers" in judged.err
    result.write_text('{"command": "merge"}')
    assert (
        "E395" in surgeon(MODELS / "short", "--questions", question_file(4), *CAP, "--baseline", result).err
    )


def test_lengths_need_no_answers(surgeon, tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(json.dumps({"question": q.text}) for q in asked(4)))
    without = surgeon(MODELS / "short", "--questions", path, *CAP)
    assert without.code == 3 and "--length" in without.err and ":1" in without.err
    found = surgeon(MODELS / "short", "--questions", path, "--length", *CAP, "--json").document
    assert "accuracy" not in found["metrics"] and found["metrics"]["tokens_mean"]["value"] > 5


def test_domains_of_named_files(surgeon, question_file):
    files = question_file(3, "a.jsonl"), question_file(5, "b.jsonl")
    found = surgeon(
        MODELS / "short", "--questions", f"easy={files[0]}", "--questions", f"hard={files[1]}", *CAP, "--json",
        "--gate", "hard_tokens_mean > 5", "--gate", "easy_tokens_mean > 500",
    )  # fmt: skip
    assert found.document["groups"]["domain"]["hard"]["tokens_mean"]["n"] == 5
    assert [g["passed"] for g in found.document["gates"]] == [True, False] and found.code == 4


def test_perplexity_and_divergence(surgeon, question_file, tmp_path):
    text = tmp_path / "text.jsonl"
    import random

    import task

    text.write_text(
        "\n".join(
            json.dumps({"prompt": q.text, "response": task.solve(q, -4.0, random.Random(1))})
            for q in asked(8)
        )
    )
    ran = surgeon(MODELS / "short", "--perplexity", text, "--kl", MODELS / "long", "--text", text, "--json",
                  "--gate", "perplexity <= 0.9 * ref", "--gate", "kl > 0.001")  # fmt: skip
    found = ran.document
    assert ran.code == 0, ran.err
    assert 1.0 < found["metrics"]["perplexity"]["value"] < 1.6 and found["metrics"]["kl"]["value"] > 0.01
    assert 0.5 < found["metrics"]["top1_agreement"]["value"] < 1
    assert found["data"]["kl"]["reference"]["name"] == "long"
    report.validate(found)


def test_shipped_text_and_running_text(surgeon, tmp_path):
    text = tmp_path / "sums.txt"
    text.write_text("123+456=579\n" * 300)
    ran = surgeon(
        MODELS / "short",
        "--perplexity",
        text,
        "--sequence-length",
        128,
        "--kl",
        MODELS / "long",
        "--limit",
        4,
        "--json",
    )
    assert ran.code == 0, ran.err
    data = ran.document["data"]
    assert data["perplexity"]["tokens"] > 3500 and data["perplexity"]["passages"] > 28
    assert data["kl"]["name"].startswith("surgeon shipped text") and data["kl"]["passages"] == 4
    assert ran.document["settings"]["limited"]  # 4 of the shipped records; the file is one record


@pytest.mark.parametrize("damage", ["missing", "extra", "shape"])
def test_a_model_that_does_not_load_as_it_is_is_refused(surgeon, question_file, tmp_path, damage):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(MODELS / "short", broken)
    tensors = load_file(broken / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    if damage == "missing":
        del tensors[name]
    elif damage == "extra":
        tensors["model.layers.9.mlp.up_proj.weight"] = tensors[name].clone()
    else:
        tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    ran = surgeon(broken, "--questions", question_file(2), *CAP)
    assert ran.code == 3 and "E392" in ran.err


@pytest.mark.parametrize("asked", [["--questions", "FILE"], ["--perplexity", "shipped"]])
def test_an_encoder_predicts_no_next_token(surgeon, question_file, tmp_path, asked):
    import tiny_models
    import transformers

    transformers.utils.logging.disable_progress_bar()
    tiny_models.build("bert").save_pretrained(tmp_path / "encoder")
    for file in (MODELS / "short").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "encoder")
    ran = surgeon(tmp_path / "encoder", *(str(question_file(2)) if a == "FILE" else a for a in asked))
    assert ran.code == 3 and "E392" in ran.err and "encoder" in ran.err


def test_the_limit_that_cut_the_replies_is_named(surgeon, question_file, tmp_path):
    short = shutil.copytree(MODELS / "short", tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 48}))
    ran = surgeon(short, "--questions", question_file(2))
    assert "or the model's length of 48 tokens is too low" in ran.err
    ran = surgeon(short, "--questions", question_file(2), "--max-new-tokens", 3)
    assert "or --max-new-tokens 3 is too low" in ran.err


def test_reports_are_written(surgeon, question_file, tmp_path):
    file = question_file(4)
    for suffix in ("md", "html", "svg"):
        ran = surgeon(
            MODELS / "short", "--questions", file, *CAP, "--report", tmp_path / f"r.{suffix}", "--quiet"
        )
        assert ran.code == 0 and (tmp_path / f"r.{suffix}").stat().st_size > 100
    assert surgeon(MODELS / "short", "--questions", file, "--report", tmp_path / "r.docx").code == 2


REFUSED = [
    ([], "E225"),
    (["--length"], "E225"),
    (["--perplexity", "shipped", "--match", "exact"], "E225"),
    (["--questions", "FILE", "--text", "x.txt"], "E225"),
    (["--questions", "FILE", "--samples", "2", "--temperature", "0"], "E228"),
    (["--questions", "FILE", "--top-p", "0.9"], "E228"),
    (["--questions", "FILE", "--top-p", "1.5", "--temperature", "1"], "E228"),
    (["--questions", "FILE", "--pass-at", "2"], "E228"),
    (["--questions", "FILE", "--device", "tpu"], "E228"),
    (["--questions", "FILE", "--batch-size", "many"], "E209"),
    (["--questions", "FILE", "--gate", "accuracy >= baseline"], "E229"),
    (["--questions", "FILE", "--gate", "accuracy >= ref", "--kl", "MODEL"], "E229"),
    (["--questions", "FILE", "--gate", "speed > 1"], "E226"),
    (["--questions", "FILE", "-o", "result.txt"], "E601"),
    (["--questions", "FILE", "-o", "no/such/folder/r.json"], "E502"),
    (["--questions", "FILE", "--samples-out", "no/such/folder/r.jsonl"], "E502"),
    (["--questions", "FILE", "--report", "no/such/folder/r.html"], "E503"),
]


@pytest.mark.parametrize(("arguments", "code"), REFUSED)
def test_what_cannot_work_is_refused_before_a_model_is_loaded(
    surgeon, question_file, monkeypatch, arguments, code
):
    from surgeon.evaluate import run

    monkeypatch.setattr(run, "load", lambda *a, **k: pytest.fail("a model was loaded"))
    given = [{"FILE": str(question_file(2)), "MODEL": str(MODELS / "long")}.get(a, a) for a in arguments]
    ran = surgeon(MODELS / "short", *given)
    assert ran.code == {"E2": 2, "E5": 5, "E6": 6}[code[:2]]
    assert f"error[{code}]" in ran.err and "help:" in ran.err


def test_a_foreign_file_is_not_replaced_by_the_result(surgeon, question_file, tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "qwen2"}')
    arguments = MODELS / "short", "--questions", question_file(2), *CAP, "-o", path
    assert surgeon(*arguments).code == 6 and path.read_text() == '{"model_type": "qwen2"}'
    assert surgeon(*arguments, "--overwrite").code == 0
    assert surgeon(*arguments).code == 0  # its own result it replaces


# ---- lm-eval ---------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_tasks_without_lm_eval_say_what_to_install(surgeon):
    ran = surgeon(MODELS / "short", "--tasks", "gsm8k")
    assert ran.code == 5 and "error[E512]" in ran.err and "pip install" in ran.err


def test_results_of_lm_eval_become_metrics():
    found = harness.metrics_of(
        {
            "results": {
                "gsm8k": {"alias": "gsm8k", "exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": 0.1,
                          "exact_match,flexible-extract": 0.6, "exact_match_stderr,flexible-extract": "N/A"},
                "wikitext": {"alias": "w", "word_perplexity,none": 12.5, "word_perplexity_stderr,none": float("nan")},
                "odd": {"acc,none": float("nan")},
            },
            "n-samples": {"gsm8k": {"original": 1319, "effective": 50}},
        }
    )  # fmt: skip
    assert found["task:gsm8k:exact_match,strict-match"] == pytest.approx(
        {"value": 0.5, "low": 0.5 - 1.959964 * 0.1, "high": 0.5 + 1.959964 * 0.1, "n": 50}
    )
    assert found["task:gsm8k:exact_match,flexible-extract"]["low"] is None
    assert found["task:wikitext:word_perplexity"] == {"value": 12.5, "low": None, "high": None, "n": None}
    assert found["task:odd:acc"]["value"] is None


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_a_local_task_through_lm_eval_agrees_with_our_own_judgement(surgeon, question_file, tmp_path):
    file = question_file(12)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({**r, "answer": str(r["answer"])}) for r in rows))
    (tmp_path / "sums.yaml").write_text(
        f"task: running_sums\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\n"
        "test_split: test\noutput_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
        "generation_kwargs:\n  until: ['<|eos|>']\n  max_gen_toks: 160\n  do_sample: false\n"
        "filter_list:\n  - name: last\n    filter:\n      - function: regex\n        regex_pattern: 'answer:(\\d+)'\n"
        "        group_select: -1\n      - function: take_first\n"
        "metric_list:\n  - metric: exact_match\n    aggregation: mean\n    higher_is_better: true\n"
    )
    ran = surgeon(
        MODELS / "short",
        "--tasks",
        "running_sums",
        "--include-path",
        tmp_path,
        "--questions",
        file,
        *CAP,
        "--json",
    )
    found = ran.document["metrics"]
    assert found["task:running_sums:exact_match"]["value"] == pytest.approx(found["accuracy"]["value"])
    assert found["task:running_sums:exact_match"]["n"] == 12
