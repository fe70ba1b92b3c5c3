"""Native recipes: what a file means once it is read, resolved and extended."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "pipeline"))
from recipe_runs import EXPORT, MODELS, SCORES, recipe, texts

from surgeon.errors import UsageError
from surgeon.recipe import native
from surgeon.recipe.recipe import StepOutput

LONG, SHORT = str(MODELS / "long"), str(MODELS / "short")


def refusals(path: Path, *settings: str) -> list[UsageError]:
    with pytest.raises(UsageError) as caught:
        native.read(path, settings)
    return [caught.value, *caught.value.others]  # type: ignore[list-item]


def written(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_steps_take_the_options_of_their_commands(tmp_path):
    texts(tmp_path)
    found = native.read(
        recipe(
            tmp_path,
            "  - id: pruned\n    prune: {target: {params: 900K}, structures: [ffn], calibration: texts, search: dp}\n",
            "  - id: small\n    quantize: {target: {size: 1MB}, schemes: [W4A16, W8A16, 're:.*down_proj=W8A16'], ignore: lm_head}\n",
            "  - id: scores\n    eval: {baseline: long, metrics: [kl, perplexity], text: texts2}\n",
            "data:\n  texts: {file: texts.jsonl, samples: 12, sequence_length: 64}\n  texts2: texts.jsonl\n",
        )
    )
    merged, pruned, small, scores = found.steps
    assert merged.options["models"] == [LONG] and merged.options["base"] == SHORT
    assert merged.options["weight"] == [1.0] and merged.options["density"] == [0.5]
    assert pruned.options == {
        "target_params": [900e3], "structures": ["ffn"], "calibration": [str(tmp_path / "texts.jsonl")], "search": "dp",
        "samples": 12, "sequence_length": 64, "seed": 0, "model": StepOutput("merged"),
    }  # fmt: skip
    assert small.options["target_size"] == 1_000_000 and small.options["bits"] == [4, 8]
    assert small.options["scheme"] == ["re:.*down_proj=W8A16"] and small.options["ignore"] == ["lm_head"]
    assert scores.options["model"] == StepOutput("small") and scores.options["kl"] == LONG
    assert scores.options["perplexity"] == "shipped" and scores.options["text"] == str(
        tmp_path / "texts.jsonl"
    )
    assert found.publish == "small" and found.when == "on_pass" and not found.warnings


def test_defaults_reach_the_steps_that_know_them_and_the_own_value_wins(tmp_path):
    found = native.read(
        recipe(tmp_path, EXPORT, SCORES, "defaults: {dtype: bfloat16, max_shard_size: 2MB}\nseed: 7\n")
    )
    merged, wide, scores = found.steps
    assert (
        merged.options["dtype"] == "bfloat16"
        and merged.options["max_shard_size"] == 2_000_000
        and merged.options["seed"] == 7
    )
    assert (
        wide.options["dtype"] == "float32"
        and wide.options["max_shard_size"] == 2_000_000
        and "seed" not in wide.options
    )
    assert "dtype" not in scores.options, "the type of written weights is not the type a model runs in"


def test_merge_parameters_and_overrides(tmp_path):
    text = recipe(tmp_path).read_text().replace(
        "density: 0.5}]", "density: 0.5}]\n      parameters: {lambda: 0.9, normalize: false}\n"
        "      overrides: [{match: 're:.*embed.*', copy: short}, {match: '*norm*', density: 1}]"
    )  # fmt: skip
    (merged,) = native.read(written(tmp_path, text)).steps
    assert merged.options["lambda"] == 0.9 and merged.options["normalize"] is False
    assert merged.options["ignore"] == ["re:.*embed.*"] and merged.options["dense"] == ["*norm*"]
    (error,) = refusals(written(tmp_path, text.replace("copy: short", "copy: long")))
    assert (
        error.code == "E224"
        and "short" in error.message
        and error.where is not None
        and error.where.line == 13
    )


def test_a_model_is_read_as_it_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("MODEL_ROOT", str(MODELS))
    (tmp_path / "mine").mkdir()
    text = (
        recipe(tmp_path)
        .read_text()
        .replace(f"{MODELS}/long", "org/name@0123456")
        .replace(f"{MODELS}/short", "${MODEL_ROOT}/short")
    )
    text = text.replace("models:\n  long", "models:\n  near: mine\n  rev: org/b@1e5\n  long", 1)
    found = native.read(written(tmp_path, text))
    references = {name: model.reference for name, model in found.models.items()}
    assert references == {
        "near": str(tmp_path / "mine"),
        "rev": "org/b@1e5",
        "long": "org/name@0123456",
        "short": SHORT,
    }
    assert found.models["long"].local is None and found.models["short"].local == Path(SHORT)
    assert found.warnings == (
        'the model "near" is named and not used',
        'the model "rev" is named and not used',
    )


def test_set_reaches_values_by_name_number_and_id(tmp_path, monkeypatch):
    path = recipe(tmp_path, EXPORT)
    monkeypatch.chdir(MODELS)
    found = native.read(
        path,
        ["models.long=./base", "steps.merged.merge.models.long.weight=0.25", "steps.0.merge.models.0.density=0.5",
         "steps.merged.merge.parameters={lambda: 0.8}", "steps.wide.export.dtype=float16", "seed=3"],
    )  # fmt: skip
    merged, wide = found.steps
    assert found.models["long"].reference == str(MODELS / "base"), (
        "a path given on the command line starts here"
    )
    assert (merged.options["weight"], merged.options["lambda"], merged.options["seed"]) == ([0.25], 0.8, 3)
    assert wide.options["dtype"] == "float16"


@pytest.mark.parametrize(
    ("setting", "help"),
    [
        ("models.lnog=x", "long"),
        ("steps.mergd.merge.method=ties", "merged"),
        ("steps.9.merge.method=ties", "merged"),
        ("steps.merged.merge.parameters.lambda=1", "base"),
        ("nothing", "--set"),
    ],
)
def test_set_of_a_path_that_is_not_there(tmp_path, setting, help):
    (error,) = refusals(recipe(tmp_path), setting)
    assert error.code == "E2002" and help in str(error.help)
    assert error.where is not None and str(error.where).startswith("--set")


def test_a_value_set_wrongly_is_shown_at_the_option(tmp_path):
    (error,) = refusals(recipe(tmp_path), "steps.merged.merge.models.long.density=2")
    assert str(error.where) == "--set steps.merged.merge.models.long.density=2"
    (unknown,) = refusals(recipe(tmp_path), "steps.merged.merge.methd=ties")
    assert unknown.code == "E203" and "method" in str(unknown.help)


def test_extends_merges_mappings_and_replaces_lists(tmp_path):
    recipe(tmp_path, EXPORT, "gates: [bytes <= 2GB]\n", name="base.yaml")
    found = native.read(
        written(
            tmp_path,
            "version: 1\nextends: base.yaml\nname: mine\nmodels: {long: ./other}\ngates: [parameters <= 3B, bytes <= 1GiB]\n",
        )
    )
    assert (
        found.name == "mine"
        and found.models["long"].reference == str(tmp_path / "other")
        and found.models["short"].reference == SHORT
    )
    assert [gate.gate.text for gate in found.gates] == ["parameters <= 3B", "bytes <= 1GiB"]
    assert [gate.gate.threshold({}) for gate in found.gates] == [3e9, 1024**3]
    (error,) = refusals(written(tmp_path, "version: 1\nextends: base.yaml\ngates: [foo <= 1]\n"))
    assert error.where is not None and (error.where.file, error.where.line) == (
        str(tmp_path / "recipe.yaml"),
        3,
    )
    assert recipe(tmp_path, "gates: [foo <= 1]\n", name="base.yaml")
    (error,) = refusals(written(tmp_path, "version: 1\nextends: base.yaml\n"))
    assert error.where is not None and error.where.file == str(tmp_path / "base.yaml")


def test_a_sweep_is_one_recipe_for_each_combination(tmp_path):
    found = native.read(
        recipe(tmp_path, "sweep:\n  steps.merged.merge.models.0.weight: [0.4, 0.5]\n  steps.merged.merge.method: [ties, task-arithmetic]\n")
        .with_name("recipe.yaml"),
        ["steps.merged.merge.models=[{model: long, weight: 1.0}]"],
    )  # fmt: skip
    assert [point.name for point in found.points] == [
        "weight=0.4,method=ties", "weight=0.4,method=task-arithmetic", "weight=0.5,method=ties", "weight=0.5,method=task-arithmetic",
    ]  # fmt: skip
    assert [point.recipe.steps[0].options["weight"] for point in found.points] == [[0.4], [0.4], [0.5], [0.5]]
    assert found.points[1].recipe.steps[0].options["method"] == "task-arithmetic"
    wrong = recipe(tmp_path, "sweep: {steps.merged.merge.models.0.density: [0.4, 5]}\n")
    (error,) = refusals(wrong)
    assert error.where is not None and error.where.line == 12, "a wrong point is shown where its value stands"


@pytest.mark.parametrize(
    ("part", "code"),
    [
        ("sweep: [1]\n", "E2012"), ("sweep: {steps.x.merge: [1]}\n", "E2012"), ("sweep: {gates: [1]}\n", "E2012"),
        ("sweep: {seed: 3}\n", "E2012"), (f"sweep: {{seed: {list(range(65))}}}\n", "E2012"),
        ("publish: {step: scores}\n", "E2009"), ("publish: {when: never}\n", "E2009"), ("publish: merged\n", "E2009"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(tmp_path, part, code):
    (error,) = refusals(recipe(tmp_path, SCORES, part))
    assert error.code == code and error.where is not None and error.where.line is not None and error.help


def test_gates_find_the_step_that_measures(tmp_path):
    gates = "gates: [perplexity <= 1.2 * baseline, merged.bytes <= 5MB, bytes <= 0.5 * baseline, answer_length <= 3]\n"
    questions = SCORES.replace("perplexity:", "questions: q.jsonl, perplexity:")
    found = native.read(recipe(tmp_path, EXPORT, questions, gates))
    assert [(gate.step, gate.metric) for gate in found.gates] == [
        ("scores", "perplexity"), ("merged", "bytes"), (None, "bytes"), ("scores", "tokens_mean"),
    ]  # fmt: skip
    (two,) = refusals(
        recipe(tmp_path, questions, questions.replace("scores", "again"), "gates: [accuracy >= 0.5]\n")
    )
    assert two.code == "E226" and two.help == "write again.accuracy"
    assert (
        native.read(
            recipe(
                tmp_path, questions, questions.replace("scores", "again"), "gates: [again.accuracy >= 0.5]\n"
            )
        )
        .gates[0]
        .step
        == "again"
    )


def test_gates_over_part_of_the_data_need_leave(tmp_path):
    limited = SCORES.replace("}", ", limit: 2}")
    (error,) = refusals(recipe(tmp_path, limited, "gates: [perplexity <= 1.2 * baseline]\n"))
    assert error.code == "E227"
    assert native.read(
        recipe(
            tmp_path,
            limited.replace("limit: 2", "limit: 2, gate_limited: true"),
            "gates: [perplexity <= 9]\n",
        )
    ).gates


def test_the_resolved_recipe_reads_as_what_it_came_from(tmp_path):
    plain = native.read(recipe(tmp_path, SCORES, "gates: [bytes <= 2GB]\n")).plain()
    assert plain["steps"][0]["merge"]["models"] == ["long"] and plain["steps"][1]["eval"]["model"] == "merged"
    assert plain["publish"] == {"step": "merged", "when": "on_pass"} and plain["gates"] == ["bytes <= 2GB"]


def test_what_a_recipe_quantized_is_decoded_where_text_is_read(tmp_path):
    texts(tmp_path)
    steps = (
        "  - id: small\n    quantize: {schemes: [W8A16], method: rtn}\n",
        "  - id: scores\n    eval: {baseline: long%s}\n",
    )
    read = lambda more: native.read(recipe(tmp_path, steps[0], steps[1] % more)).steps[-1].options  # noqa: E731
    assert read(", metrics: [perplexity]")["dequantize"] and read(", metrics: [kl]")["dequantize"]
    assert read(", metrics: [kl], dequantize: false")["dequantize"] is False
    plain = recipe(tmp_path, "  - id: scores\n    eval: {baseline: long, metrics: [kl]}\n")
    assert "dequantize" not in native.read(plain).steps[-1].options


@pytest.mark.parametrize("made", ["quantize: {schemes: [Q8_0], format: gguf}", "export: {to: gguf}"])
def test_a_step_that_reads_a_gguf_file_is_refused(tmp_path, made):
    texts(tmp_path)
    step = f"  - id: small\n    {made}\n"
    (one,) = refusals(recipe(tmp_path, step, "  - id: scores\n    eval: {metrics: [perplexity]}\n"))
    assert one.code == "E2014" and "scores reads what small makes" in one.message and one.where.line
    found = native.read(
        recipe(tmp_path, step, "  - id: scores\n    eval: {model: merged, metrics: [perplexity]}\n")
    )
    assert found.steps[-1].options["model"] == StepOutput("merged")
