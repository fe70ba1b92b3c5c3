"""Faults of recipes and of runs: F1, F6-F10 with line and column, G4 nothing but data, J1 and J2 what stays."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "pipeline"))
from recipe_runs import EXPORT, MODELS, SCORES, recipe

from surgeon.errors import InputError, UsageError
from surgeon.pipeline import verbs
from surgeon.pipeline.run import run
from surgeon.recipe import native
from surgeon.verify.static import verify_path


def refusals(path: Path, *settings: str) -> list[UsageError]:
    with pytest.raises(UsageError) as caught:
        native.read(path, settings)
    found = [caught.value, *caught.value.others]
    assert all(isinstance(error, UsageError) and error.exit_code == 2 for error in found)
    return found  # type: ignore[return-value]


def places(errors: list[UsageError]) -> list[tuple[str, int | None, int | None]]:
    return [(e.code, e.where.line, e.where.column) for e in errors if e.where is not None]


def edited(folder: Path, old: str, new: str, *parts: str) -> Path:
    path = recipe(folder, *parts)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    return path


@pytest.mark.parametrize(
    ("old", "new", "line", "column", "help"),
    [
        ("name: demo", "nmae: demo", 2, 1, "name"),
        ("method:", "methd:", 9, 7, "method"),
        ("base: short", "bsae: short", 10, 7, "base"),
        ("merge:\n", "merg:\n", 8, 5, "merge"),
        ("density: 0.5", "desnity: 0.5", 11, 43, "density"),
        ("dtype", "dtpye", 13, 14, "dtype"),
    ],
)
def test_F1_an_unknown_key_is_shown_with_what_was_meant(tmp_path, old, new, line, column, help):
    errors = refusals(edited(tmp_path, old, new, EXPORT))
    assert (line, column) in [place[1:] for place in places(errors)]
    error = next(
        e for e in errors if e.where is not None and (e.where.line, e.where.column) == (line, column)
    )
    assert help in str(error.help)


def test_F2_a_key_that_is_given_twice_is_refused(tmp_path):
    (error,) = refusals(edited(tmp_path, "      base: short\n", "      base: short\n      base: long\n"))
    assert error.code == "E251" and error.where is not None and error.where.line == 11


@pytest.mark.parametrize(
    ("step", "code", "column"),
    [
        ("prune: {sparsity: 1.5}", "E266", 13), ("prune: {target: {speedup: 0.9}}", "E266", 22), ("prune: {sparsity: .nan}", "E224", 23),
        ("prune: {sparsity: 0.5, samples: 0}", "E224", 37), ("prune: {sparsity: 0.5, samples: many}", "E224", 37),
        ("prune: {keep_layers: -1, method: depth}", "E266", 13), ("prune: {sparsity: 0.5, round_to: true}", "E224", 38),
        ("prune: {}", "E266", 5), ("prune: {sparsity: 0.5, target_params: 3B}", "E266", 28),
        ("prune: {sparsity: [0.2, 0.5]}", "E266", 5), ("prune: {keep_experts: 0.5, method: ziplm}", "E267", 13),
        ("quantize: {target: {bits: 0}}", "E224", 31), ("quantize: {target: {size: much}}", "E224", 31),
        ("quantize: {method: gptw, schemes: W4A16}", "E217", 16), ("quantize: {symmetric: 1}", "E224", 27),
        ("quantize: {format: 4}", "E224", 24), ("export: {to: gufg}", "E285", 14), ("export: {max_shard_size: 0}", "E224", 30),
        ("eval: {perplexity: shipped, limit: 0}", "E224", 40), ("eval: {}", "E225", 5), ("measure: {repeat: 2}", "E224", 23),
        ("measure: {mode: slow}", "E224", 21), ("edit: {method: thinkedit}", "E295", 5), ("edit: {}", "E224", 5),
        ("prune: {sparsity: 0.5, search: 1e400}", "E224", 36), ("prune: 3", "E2011", 12),
    ],
)  # fmt: skip
def test_F6_a_wrong_type_or_range_is_shown_where_it_stands(tmp_path, step, code, column):
    errors = refusals(recipe(tmp_path, f"  - id: x\n    {step}\n"))
    assert places(errors)[0] == (code, 13, column)


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ("density: 0.5", "density: 2", "E212"), ("weight: 1.0", "weight: .inf", "E224"), ("weight: 1.0", "weight: heavy", "E224"),
        ("method: ties", "method: tise", "E201"), ("base: short", "base: 5", "E224"),
        ("models: [{", "models: {", "E224"), ("version: 1", "version: one", "E202"), ("name: demo", "name: a/b", "E224"),
        ("name: demo", "seed: -1", "E224"), ("name: demo", "seed: 1.5", "E224"), ("name: demo", "defaults: {threads: 3}", "E2008"),
    ],
)  # fmt: skip
def test_F6_wrong_values_of_a_merge_and_of_the_recipe(tmp_path, old, new, code):
    text = edited(tmp_path, old, new)
    if "models: {" in new:
        text.write_text(text.read_text().replace("0.5}]", "0.5}"))
    error = refusals(text)[0]
    assert (
        error.code == code
        and error.where is not None
        and error.where.line is not None
        and error.where.column is not None
    )


def test_F6_all_mistakes_of_a_file_are_shown_at_once(tmp_path):
    path = recipe(
        tmp_path,
        "  - id: p\n    prune: {sparsity: 0.5, samples: 0, serach: dp, damp: 2}\n",
        "  - id: q\n    quantize: {format: gufg, model: pp}\n",
        "  - id: s\n    eval: {perplexity: shipped, baseline: lnog}\n",
        "gates: [perplexty <= 3, 'bytes << 2']\npublish: {step: z}\nextra: 1\n",
    )
    text = path.read_text().replace("density: 0.5", "density: 7")
    path.write_text(text)
    found = sorted(place[1:] for place in places(refusals(path)))
    assert [line for line, _ in found] == [11, 13, 13, 13, 15, 15, 17, 18, 18, 19, 20]


def test_F7_missing_models_and_files_are_found_before_any_work(tmp_path):
    path = recipe(tmp_path, SCORES)
    found = native.read(path, ["models.long=./nowhere"])
    with pytest.raises(UsageError) as caught:
        found.check_files()
    errors = [caught.value, *caught.value.others]
    assert (
        [e.code for e in errors] == ["E2005", "E2005"]
        and "nowhere" in str(errors[0])
        and "texts.jsonl" in str(errors[1])
    )
    assert errors[1].where is not None and errors[1].where.line == 13 and errors[1].where.column == 55
    with pytest.raises(UsageError):
        run(path, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["recipe.yaml"]


@pytest.mark.parametrize(
    ("parts", "code", "word"),
    [
        (["  - id: merged\n    export: {}\n"], "E2001", "line 7"),
        (["  - id: long\n    export: {model: merged}\n"], "E2001", "long"),
        (["  - id: a\n    export: {model: b}\n  - id: b\n    export: {model: a}\n"], "E2004", "a -> b -> a"),
        (["  - id: a\n    export: {model: a}\n"], "E2004", "a -> a"),
        (["  - id: a\n    export: {model: b}\n  - id: b\n    export: {model: merged}\n"], "E2004", "after"),
        (["  - id: a\n    export: {model: mergd}\n"], "E273", "mergd"),
        ([SCORES, "  - id: a\n    export: {model: scores}\n"], "E273", "no model"),
        (["  - id: a\n    export: {}\n    prune: {}\n"], "E2011", "export and prune"),
        (["  - export: {}\n"], "E2011", "id"), (["  - id: ../x\n    export: {}\n"], "E2011", "id"), (["  - 3\n"], "E2011", "step"),
        (["gates: [accuracy >= 0.5]\n"], "E226", "accuracy"), (["gates: [bytes <= 0.5 * baseline]\n"], "E229", "baseline"),
        ([SCORES, "gates: [kl <= 0.5]\n"], "E226", "kl"), (["gates: [bytes <= 3 GBB]\n"], "E226", "GBB"),
        (["gates: [bytes <= ref]\n"], "E226", "ref"), (["gates: [3]\n"], "E226", "3"),
    ],
)  # fmt: skip
def test_F7_names_that_nothing_has(tmp_path, parts, code, word):
    error = refusals(recipe(tmp_path, *parts))[0]
    assert (
        error.code == code
        and word in f"{error.message} {error.help}"
        and error.where is not None
        and error.where.line is not None
    )


def test_F8_variables_only_in_models_and_only_when_set(tmp_path, monkeypatch):
    monkeypatch.delenv("WHERE_MODELS_ARE", raising=False)
    path = edited(tmp_path, f"{MODELS}/long", "${WHERE_MODELS_ARE}/long")
    (error,) = refusals(path)
    assert error.code == "E259" and places([error]) == [("E259", 4, 9)]
    monkeypatch.setenv("WHERE_MODELS_ARE", str(MODELS))
    assert native.read(path).models["long"].reference == str(MODELS / "long")
    for part in (
        "  - id: ${WHERE_MODELS_ARE}\n    export: {}\n",
        "data: {x: '${WHERE_MODELS_ARE}/x.jsonl'}\n",
        "gates: ['bytes <= ${WHERE_MODELS_ARE}']\n",
    ):
        assert "E2006" in [e.code for e in refusals(recipe(tmp_path, part))]


@pytest.mark.parametrize(
    "target", ["../base.yaml", "/etc/passwd", "sub/../../base.yaml", "link.yaml", "nowhere.yaml", "3"]
)
def test_F8_a_recipe_extends_only_what_lies_below_it(tmp_path, target):
    folder = tmp_path / "mine"
    folder.mkdir()
    recipe(tmp_path, name="base.yaml")
    (folder / "link.yaml").symlink_to(tmp_path / "base.yaml")
    path = folder / "recipe.yaml"
    path.write_text(f"version: 1\nextends: {target}\n")
    (error,) = refusals(path)
    assert error.code == "E2003" and places([error]) == [("E2003", 2, 10)]


def test_F8_extending_ends_after_one_level(tmp_path):
    recipe(tmp_path, "extends: c.yaml\n", name="b.yaml")
    recipe(tmp_path, name="c.yaml")
    (tmp_path / "a.yaml").write_text("version: 1\nextends: b.yaml\n")
    (error,) = refusals(tmp_path / "a.yaml")
    assert error.code == "E2003" and error.where is not None and error.where.file == str(tmp_path / "b.yaml")
    (tmp_path / "c.yaml").write_text((tmp_path / "c.yaml").read_text().replace("version: 1", "version: 9"))
    (tmp_path / "a.yaml").write_text("version: 1\nextends: c.yaml\n")
    assert refusals(tmp_path / "a.yaml")[0].code == "E202"


@pytest.mark.parametrize("name", ["-model", "--output", "@home", "a*b", "[x]", "a+b", "weird@name"])
def test_F9_model_names_that_look_like_something_else_are_paths(tmp_path, name):
    (tmp_path / name).mkdir()
    found = native.read(edited(tmp_path, f"{MODELS}/long", f"'{name}'"))
    assert found.models["long"].reference == str(tmp_path / name)


@pytest.mark.parametrize(("text", "word"), [("version: 2", "newer release"), ("version: 99", "version 99"), ("version: '1'", "version: 1"),
                                            ("version: 0", "version: 1"), ("version: true", "version: 1"), ("seed: 1", "version: 1")])  # fmt: skip
def test_F10_the_version_is_read_first(tmp_path, text, word):
    path = edited(tmp_path, "version: 1", text + "\nkey_of_the_future: {}")
    errors = refusals(path)
    assert [e.code for e in errors] == ["E202"], "what a newer version may hold is none of ours to judge"
    assert (
        word in f"{errors[0].message} {errors[0].help}"
        and errors[0].where is not None
        and errors[0].where.line == 1
    )


@pytest.mark.parametrize(
    "step",
    [
        "prune: {sparsity: 0.5, output: /etc/x}", "quantize: {output: x}", "edit: {method: thinkedit, save_direction: ../x}",
        "edit: {method: steer, control_vector: /x.gguf}", "eval: {perplexity: shipped, samples_out: /x}", "measure: {output: x.json}",
        "eval: {tasks: [x], include_path: /tmp}", "prune: {sparsity: 0.5, scores: /tmp/x}", "export: {allow_pickle: true}",
        "prune: {sparsity: 0.5, work: /tmp/x}", "prune: {sparsity: 0.5, device: cuda}", "export: {out: /x}", "quantize: {report: x.html}",
    ],
)  # fmt: skip
def test_G4_a_recipe_says_nothing_about_places_code_or_the_machine(tmp_path, step):
    errors = refusals(recipe(tmp_path, f"  - id: x\n    {step}\n"))
    assert "E2008" in [e.code for e in errors]


@pytest.mark.parametrize(
    "key", ["run", "shell", "python", "module", "script", "exec", "hooks", "env", "output"]
)
def test_G4_there_are_no_keys_for_commands_or_modules(tmp_path, key):
    assert refusals(recipe(tmp_path, f"{key}: rm\n"))[0].code == "E203"
    assert "E203" in [e.code for e in refusals(recipe(tmp_path, f"  - id: x\n    {key}: rm\n"))]


@pytest.mark.parametrize("method", ["../x", "os.system", "__import__", "a/b"])
def test_G4_methods_are_names_from_a_list(tmp_path, method):
    assert refusals(edited(tmp_path, "method: ties", f"method: '{method}'"))[0].exit_code == 2


def test_J1_a_failed_step_leaves_the_finished_ones_and_says_which(scratch, monkeypatch):
    path = recipe(scratch, EXPORT, "  - id: last\n    export: {dtype: bfloat16}\n")
    real = verbs._VERBS["export"]

    def failing(*given):
        raise InputError("E321", "not a number")

    monkeypatch.setitem(verbs._VERBS, "export", failing)
    with pytest.raises(InputError) as caught:
        run(path, scratch / "out", threads=1)
    assert caught.value.message == "step wide: not a number"
    left = json.loads((scratch / "out.work" / "result.json").read_text())
    assert [step["status"] for step in left["steps"]] == ["done", "failed", "skipped"]
    assert (
        left["error"]["code"] == "E321"
        and left["exit_code"] == 3
        and left["results"]["merged"]["parameters"] > 1e6
    )
    assert (
        not (scratch / "out").exists() and not verify_path(scratch / "out.work" / "steps" / "merged").errors
    )
    monkeypatch.setitem(verbs._VERBS, "export", real)
    document = run(path, scratch / "out", threads=1)
    assert [step["status"] for step in document["steps"]] == ["unchanged", "done", "done"] and document[
        "published"
    ]


def test_J2_a_failed_gate_is_exit_4_with_value_and_threshold_and_the_model_is_withheld(scratch):
    path = recipe(scratch, "gates: [bytes <= 2MB, parameters >= 2M]\n")
    document = run(path, scratch / "out", threads=1)
    assert (
        document["exit_code"] == 4 and document["status"] == "gate-failed" and not (scratch / "out").exists()
    )
    assert [(gate["passed"], gate["threshold"]) for gate in document["gates"]] == [(False, 2e6), (False, 2e6)]
    assert all(gate["value"] is not None and gate["reason"] for gate in document["gates"])
    assert document["error"]["code"] == "E401" and len(document["error"]["others"]) == 1
    assert json.loads((scratch / "out.work" / "result.json").read_text())["gates"] == document["gates"]
