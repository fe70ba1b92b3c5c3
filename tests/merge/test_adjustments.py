"""What is put on top of a merge: names, options, files, YAML, and numbers computed here."""

from __future__ import annotations

import json

import merge_models as mm
import pytest
import torch

from surgeon.errors import InputError, UsageError
from surgeon.merge.adjustments import ADJUSTMENTS, Adjustments, split_method
from surgeon.merge.layer_scores import LayerScores, read_layer_scores, write_layer_scores


@pytest.fixture
def models():
    base, a, _, _ = mm.family("llama")
    return base, a


def states(*folders):
    return [{n: t.double() for n, t in mm.tensors(f).items()} for f in folders]


# ---- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ties", ("ties", {})),
        ("aim-ties", ("ties", {"aim": 0.4})),
        ("acm-ties", ("ties", {"acm": 0.7})),
        ("fim-ties", ("ties", {"fim": True})),
        ("sens", ("task_arithmetic", {"sens": 2.0})),
        ("sens-ties", ("ties", {"sens": 2.0})),
        ("twin", ("task_arithmetic", {"delta_rank": 0.1})),
        ("twin-ties", ("ties", {"delta_rank": 0.1})),
        ("aim-twin-ties", ("ties", {"aim": 0.4, "delta_rank": 0.1})),
        ("AIM_dare_ties", ("dare_ties", {"aim": 0.4})),
        ("tise", ("tise", {})),
    ],
)
def test_published_names_are_a_method_with_adjustments(name, expected):
    assert split_method(name) == expected


@pytest.mark.parametrize("name", ["aim", "acm", "fim"])
def test_an_adjustment_alone_is_no_method(name):
    with pytest.raises(UsageError, match="on top of a merge method") as caught:
        split_method(name)
    assert f"{name}-ties" in caught.value.help


def test_what_is_given_wins_over_the_name(models, tmp_path, surgeon):
    base, a = models
    done = surgeon(
        "merge",
        a,
        base,
        "--method",
        "twin-ties",
        "--delta-rank",
        "0.5",
        "-o",
        tmp_path / "out",
        "--dry-run",
        "--json",
    )
    assert done.code == 0, done.err
    adjust = done.document["plan"]["adjust"]
    assert adjust == {"delta_rank": 0.5, "reference": base.name}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--aim", "1.5"], "aim 1.5 is out of range"),
        (["--acm", "0"], "acm 0 is out of range"),
        (["--delta-rank", "0"], "delta-rank 0 is out of range"),
        (["--acm", "0.7", "--fim"], "acm and fim both set the strength"),
        (["--sens", "nan"], "sens nan is out of range"),
        (["--sweep", "delta_rank=0.1,0.2"], "only aim can be swept"),
        (["--layer-scores", "nowhere.json"], "nowhere.json"),
    ],
)
def test_refusals(models, tmp_path, surgeon, options, words):
    base, a = models
    done = surgeon("merge", a, base, "--method", "ties", *options, "-o", tmp_path / "out")
    assert done.code in {2, 3}, done.err
    assert words in done.err
    assert not (tmp_path / "out").exists()


def test_a_base_is_needed(tmp_path, surgeon):
    folders = mm.family("llama")
    done = surgeon("merge", *folders[:3], "--method", "linear", "--delta-rank", "0.5", "-o", tmp_path / "out")
    assert done.code == 2
    assert "needs a base" in done.err


def test_every_adjustment_has_a_page(surgeon):
    listing = surgeon("methods")
    for adjustment in ADJUSTMENTS:
        assert adjustment.option in listing.out
        page = surgeon("methods", adjustment.name.replace("_", "-"))
        assert page.code == 0
        assert adjustment.summary in page.out
    assert len(json.loads(surgeon("methods", "--json").out)["adjustments"]) == len(ADJUSTMENTS)


# ---- layer scores --------------------------------------------------------------------------------


def scores_file(path, models) -> str:
    path.write_text(json.dumps({"format": "surgeon layer scores", "version": 1, "models": models}))
    return str(path)


def test_layer_scores_multiply_the_task_vector(models, tmp_path, surgeon):
    base, a = models
    entry = {"layers": {"0": 0.5, "1": 0.25}, "tensors": {"*.up_proj.weight": 0.5}, "default": 2.0}
    file = scores_file(tmp_path / "s.json", {a.name: entry})
    done = surgeon(
        "merge", a, base, "--method", "task-arithmetic", "--lambda", "1", "--layer-scores", file,
        "--dtype", "float32", "-o", tmp_path / "out",
    )  # fmt: skip
    assert done.code == 0, done.err
    old, new = states(base, a)
    found = mm.tensors(tmp_path / "out")
    for name, value in found.items():
        factor = 0.5 if ".layers.0." in name else 0.25 if ".layers.1." in name else 2.0
        factor *= 0.5 if name.endswith("up_proj.weight") else 1.0
        wanted = old[name] + factor * (new[name] - old[name])
        torch.testing.assert_close(value.double(), wanted, rtol=1e-6, atol=1e-7)
    manifest = json.loads((tmp_path / "out" / "surgeon.json").read_text())
    assert manifest["recipe"]["adjust"]["layer_scores"] == "s.json"
    assert str(tmp_path) not in json.dumps(manifest["recipe"])


def test_layer_scores_of_ones_change_no_bit(models, tmp_path, surgeon):
    base, a = models
    file = scores_file(tmp_path / "s.json", {a.name: {"default": 1.0}})
    for name, extra in (("plain", []), ("ones", ["--layer-scores", file])):
        done = surgeon("merge", a, base, "--method", "ties", *extra, "-o", tmp_path / name)
        assert done.code == 0, done.err
    plain, ones = mm.tensors(tmp_path / "plain"), mm.tensors(tmp_path / "ones")
    assert all(torch.equal(plain[n], ones[n]) for n in plain)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"format": "other"}, "is no layer-scores file"),
        ({"models": {"a": {"layers": {"x": 1}}}}, '"x" is no layer number'),
        ({"models": {"a": {"layers": {"0": "1"}}}}, "the factor of 0"),
        ({"models": {"a": {"layers": {"0": True}}}}, "the factor of 0"),
        ({"models": {"a": {"layer": {}}}}, "layers, tensors and default only"),
        ({"models": {"a": {"layers": []}}}, "must be an object"),
    ],
)
def test_bad_files_of_scores(tmp_path, content, words):
    file = tmp_path / "s.json"
    file.write_text(json.dumps({"format": "surgeon layer scores", "version": 1, "models": {}, **content}))
    with pytest.raises(InputError, match=words):
        read_layer_scores(file)


def test_scores_of_a_model_that_is_not_merged(models, tmp_path, surgeon):
    base, a = models
    file = scores_file(tmp_path / "s.json", {"somebody": {"default": 0.5}})
    done = surgeon("merge", a, base, "--method", "ties", "--layer-scores", file, "-o", tmp_path / "out")
    assert done.code == 3
    assert 'name "somebody"' in done.err and a.name in done.err


def test_scores_survive_a_file(tmp_path):
    scores = {"m": LayerScores({0: 0.5, 11: 0.1}, (("*.gate_proj.weight", 0.7), ("re:.*norm.*", 0.9)), 0.3)}
    write_layer_scores(tmp_path / "s.json", scores, {"method": "test"})
    again = read_layer_scores(tmp_path / "s.json")["m"]
    for name in ("model.layers.11.mlp.gate_proj.weight", "model.norm.weight", "model.layers.0.x.weight"):
        assert again.factor(name) == pytest.approx(scores["m"].factor(name), rel=0)
    assert again.factor("model.layers.11.mlp.gate_proj.weight") == pytest.approx(0.07)


# ---- low rank, YAML, Python ----------------------------------------------------------------------


def low_rank(delta: torch.Tensor, share: float) -> torch.Tensor:
    if delta.dim() != 2:
        return delta
    u, s, v = torch.linalg.svd(delta.double(), full_matrices=False)
    rank = int(share * min(delta.shape))
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def test_twin_is_task_arithmetic_of_a_low_rank_delta(models, tmp_path, surgeon):
    base, a = models
    done = surgeon(
        "merge", a, base, "--method", "twin", "--delta-rank", "0.25", "--lambda", "0.7", "--dtype", "float32",
        "-o", tmp_path / "out",
    )  # fmt: skip
    assert done.code == 0, done.err
    old, new = states(base, a)
    for name, value in mm.tensors(tmp_path / "out").items():
        wanted = old[name] + 0.7 * low_rank(new[name] - old[name], 0.25)
        torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=2e-6)


def test_the_yaml_key_says_the_same_as_the_options(models, tmp_path, surgeon):
    base, a = models
    file = tmp_path / "m.yml"
    file.write_text(
        f"merge_method: task_arithmetic\nbase_model: {base}\nmodels:\n"
        f"  - model: {a}\n    parameters: {{weight: 1.0}}\nparameters: {{lambda: 0.7}}\ndtype: float32\n"
        f"surgeon:\n  text_from: {a}\n  delta_rank: 0.25\n"
    )
    assert surgeon("run", file, "-o", tmp_path / "yaml").code == 0
    options = ["--method", "twin", "--delta-rank", "0.25", "--lambda", "0.7", "--dtype", "float32"]
    assert surgeon("merge", a, base, *options, "-o", tmp_path / "cli").code == 0
    first, second = mm.tensors(tmp_path / "yaml"), mm.tensors(tmp_path / "cli")
    assert all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("aim: much", "aim is a number"),
        ("aimm: 0.4", 'unknown key "aimm" in surgeon'),
        ("fim: 3", "fim is true or false"),
        ("acm_estimator: magic", "acm_estimator"),
        ("calibration: {samples: few}", "samples is a whole number"),
        ("calibration: {sample: 3}", 'unknown key "sample"'),
        ("text_from: ./nobody", "is not among the models"),
    ],
)
def test_mistakes_under_the_yaml_key(models, tmp_path, surgeon, line, words):
    base, a = models
    file = tmp_path / "m.yml"
    file.write_text(
        f"merge_method: ties\nbase_model: {base}\nmodels:\n  - model: {a}\n    parameters: {{weight: 1}}\n"
        f"surgeon:\n  {line}\n"
    )
    done = surgeon("run", file, "-o", tmp_path / "out")
    assert done.code == 2, done.err
    assert words in done.err


def test_state_dicts_take_the_data_free_ones(models):
    import surgeon

    base, a = models
    old, new = mm.tensors(base), mm.tensors(a)
    found = surgeon.merge([new, old], method="twin", delta_rank=0.25, lambda_=0.7)
    for name, value in found.items():
        wanted = old[name].double() + 0.7 * low_rank(new[name].double() - old[name].double(), 0.25)
        torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=2e-6)
    with pytest.raises(UsageError, match="aim runs the models"):
        surgeon.merge([new, old], method="aim-ties")


def test_values_are_checked():
    Adjustments(aim=0.0, delta_rank=1.0, acm=3.0).check()
    for wrong in ({"aim": -0.1}, {"sens": 0.0}, {"delta_rank": 1.1}, {"acm": 1.0, "acm_estimator": "x"}):
        with pytest.raises(UsageError):
            Adjustments(**wrong).check()


def test_a_tied_model_that_stores_both_copies_can_be_cut_to_low_rank(tmp_path, surgeon):
    """The copies are compared as stored, before any view computes them."""
    base = mm.new_model("llama", tie_word_embeddings=True)
    folders = []
    for number, model in enumerate((base, mm.fine_tune(base, 5))):
        folder = tmp_path / f"m{number}"
        model.save_pretrained(folder)
        mm.save_tokenizer(folder)
        state = mm.tensors(folder)
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        mm.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        folders.append(folder)
    done = surgeon("merge", folders[1], folders[0], "--method", "twin", "-o", tmp_path / "out")
    assert done.code == 0, done.err
    assert "lm_head.weight" not in mm.tensors(tmp_path / "out")


def test_the_user_is_told_when_lore_is_the_average(models, tmp_path, surgeon):
    base, a = models
    done = surgeon("merge", a, base, "--method", "lore", "-o", tmp_path / "same")
    assert done.code == 0 and "plain average" in done.err
    done = surgeon("merge", a, base, "--method", "lore", "--weight", "1,0", "-o", tmp_path / "part")
    assert done.code == 0 and "plain average" not in done.err


def test_fim_strengths_are_the_whole_coefficient():
    from surgeon.api import build_request
    from surgeon.merge.request import resolve

    def lam(**options):
        return resolve(build_request(models=("x/a", "x/b"), **options)).spec.parameters["lambda"]

    assert lam(method="task-arithmetic") == 0.7
    assert lam(method="fim-task-arithmetic") == 1.0
    assert lam(method="fim-task-arithmetic", lambda_=0.5) == 0.5
