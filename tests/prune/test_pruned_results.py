"""What `surgeon prune` leaves on disk: sizes, weights that equal the masked model, companions, manifest, card."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys

import pruning_runs as runs
import pytest
import torch
from expert_models import moe_folder
from safetensors.torch import load_file
from structure_models import removed, strictly

from surgeon import api
from surgeon.checkpoint.checkpoint import open_path
from surgeon.structure.cut import Cut
from surgeon.structure.find import structure_of

TINY = {"samples": 12, "sequence_length": 48}


@pytest.fixture
def machine(monkeypatch):
    return runs.install(monkeypatch, runs.Machine())


@pytest.fixture
def prune(scratch, machine):
    text = runs.text(scratch / "cal.jsonl")

    def run(model, **options):
        found = api.prune(model, scratch / "out", calibration=(str(text),), **{**TINY, **options})
        return found["members"][0] if len(found["members"]) == 1 else found["members"]

    return run


@torch.no_grad()
def logits(model) -> torch.Tensor:
    ids = torch.arange(2, 62).reshape(2, 30)
    return model(input_ids=ids).logits.float()


def masked_logits(source, result) -> torch.Tensor:
    """Return what the source computes without what went, with the result's own output matrices put back in place.

    Nothing of the views under test is used: hooks zero the inputs that went and skip dropped layers.
    """
    cut = Cut.from_document(json.loads((result / "pruning.json").read_text()))
    checkpoint = open_path(source, "source")
    structure = structure_of(checkpoint)
    checkpoint.close()
    model = strictly(source).float()
    stored = {k: v.float() for file in result.glob("*.safetensors") for k, v in load_file(file).items()}
    names = dict(model.named_parameters())
    for new, old in enumerate(cut.kept_layers):
        for part, units, size in ((a := structure.attention[old], cut.layers[old].heads, a and a.head_dim),
                                  (structure.ffn[old], cut.layers[old].channels, 1)):  # fmt: skip
            if part is None or units == ():
                continue
            place = part.output.weight.replace(f"{structure.prefix}{old}.", f"{structure.prefix}{new}.")
            axis, weight = part.output.input_axis, names[part.output.weight].data
            columns = (
                range(weight.shape[axis])
                if units is None
                else [u * size + i for u in units for i in range(size)]
            )
            index = (slice(None), list(columns)) if axis == 1 else (list(columns), slice(None))
            weight[index] = stored[place]
            bias = place.removesuffix(".weight") + ".bias"
            if bias in stored:
                owner = model.get_submodule(part.output.module)
                owner.bias = torch.nn.Parameter(stored[bias])
    with removed(model, structure, cut):
        return logits(model)


def same_as_masked(source, result, tolerance: float = 1e-4) -> None:
    found, wanted = logits(strictly(result).float()), masked_logits(source, result)
    assert float((found - wanted).norm() / wanted.norm()) < tolerance


# ---- sizes ---------------------------------------------------------------------------------------


def stored_bytes(folder) -> int:
    return sum(t.nbytes for file in folder.glob("*.safetensors") for t in load_file(file).values())


def test_sizes_are_met_exactly_from_below(prune, scratch):
    model = runs.small(scratch / "model")
    made = prune(model, target_params=900_000)
    assert made["parameters"] == runs.parameters_in(scratch / "out") <= 900_000
    assert made["parameters"] > 0.95 * 900_000
    same_as_masked(model, scratch / "out")
    made = prune(model, target_size=1_500_000, overwrite=True)
    assert made["bytes"] == stored_bytes(scratch / "out") <= 1_500_000
    made = prune(model, target_size=3_000_000, dtype="float32", overwrite=True)
    assert made["bytes"] == stored_bytes(scratch / "out") <= 3_000_000
    config = json.loads((scratch / "out" / "config.json").read_text())
    assert config["dtype"] == "float32"
    same_as_masked(model, scratch / "out", 1e-5)


def test_biases_that_flap_adds_count_towards_the_size(prune, scratch):
    model = runs.tiny("llama", scratch / "model")
    whole = runs.parameters_in(model)
    for target in (whole * 3 // 4, whole * 3 // 4 + 7):
        made = prune(
            model, method="width", criterion="flap", target_params=target, round_to=1, overwrite=True
        )
        assert runs.parameters_in(scratch / "out") == made["parameters"] <= target
    tensors = load_file(scratch / "out" / "model.safetensors")
    assert any(name.endswith("_proj.bias") for name in tensors)
    config = json.loads((scratch / "out" / "config.json").read_text())
    assert config["attention_bias"] or config["mlp_bias"]
    same_as_masked(model, scratch / "out")


def test_a_share_of_what_depends_on_the_method(prune, scratch):
    model = runs.small(scratch / "model")
    blocks = [
        sum(
            t.numel()
            for k, t in load_file(file).items()
            if ".layers." in k and ("mlp" in k or "attn" in k or "norm" in k)
        )
        for file in model.glob("*.safetensors")
    ]
    made = prune(model, sparsity=0.4, round_to=1)
    gone = runs.parameters_in(model) - made["parameters"]
    assert 0.4 <= gone / sum(blocks) < 0.43
    made = prune(
        model, method="width", criterion="minitron", sparsity=0.5, structures=("ffn",), overwrite=True
    )
    assert made["shape"].endswith("ffn 216")
    made = prune(model, method="depth", criterion="block-influence", sparsity=0.25, overwrite=True)
    assert made["shape"].startswith("3 of 4 layers")


# ---- methods and families ------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["nmse", "block_influence", "uniform"])
def test_layers_are_dropped_by_every_depth_criterion(prune, scratch, criterion):
    model = runs.tiny("llama", scratch / "model", num_hidden_layers=5)
    made = prune(model, method="depth", criterion=criterion, keep_layers=3)
    config = json.loads((scratch / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 3 and made["shape"].startswith("3 of 5 layers")
    same_as_masked(model, scratch / "out", 1e-6)


def test_a_family_of_depths_ranks_layers_once_and_is_nested(prune, scratch, monkeypatch):
    from surgeon.prune.depth import nmse

    ranked, honest = [], nmse.RemovalDamage
    monkeypatch.setattr(nmse, "RemovalDamage", lambda *a, **k: ranked.append(1) or honest(*a, **k))
    model = runs.tiny("llama", scratch / "model", num_hidden_layers=5)
    prune(model, method="depth", keep_layers=(4, 3, 2))
    kept = [
        set(json.loads((scratch / "out" / f"layers={n}" / "surgeon.json").read_text())["recipe"]["layers"])
        for n in (4, 3, 2)
    ]
    assert ranked == [1] and kept[0] > kept[1] > kept[2]


@pytest.mark.parametrize("family", ["llama4_text", "llama4", "qwen3_5_moe"])
def test_layers_go_where_a_class_names_its_base_wrongly_or_holds_it_a_level_deeper(
    family, capsys, machine, scratch
):
    model = shutil.copytree(moe_folder(family, vocab_size=281), scratch / "model")
    for name in runs.TOKENIZER:
        shutil.copy(runs.LONG / name, model)
    ran = runs.command(
        capsys, "prune", model, "-o", scratch / "out", "--method", "depth", "--keep-layers", 2, "--samples", 8,
        "--sequence-length", 48, "--threads", 1, "--calibration", runs.text(scratch / "cal.jsonl"), "--json",
    )  # fmt: skip
    assert ran.code == 0, ran.out + ran.err
    (made,) = json.loads(ran.out)["members"]
    assert made["shape"].startswith("2 of 3 layers")
    assert any(remark.startswith("loaded strictly and compared") for remark in made["remarks"])
    source, result = strictly(model), strictly(scratch / "out")
    kept = json.loads((scratch / "out" / "surgeon.json").read_text())["recipe"]["layers"]
    whole = {"llama4_text": "model", "llama4": "language_model.model", "qwen3_5_moe": "model.language_model"}[
        family
    ]
    for new, old in enumerate(kept):
        one, other = (
            m.get_submodule(f"{whole}.layers.{n}").state_dict() for m, n in ((source, old), (result, new))
        )
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_protected_layers_stay(prune, scratch):
    model = runs.tiny("llama", scratch / "model", num_hidden_layers=5)
    prune(model, method="depth", criterion="uniform", keep_layers=4)
    (gone,) = set(range(5)) - set(
        json.loads((scratch / "out" / "surgeon.json").read_text())["recipe"]["layers"]
    )
    protected = tuple({0, 1, 2, 3, 4} - {gone})
    made = prune(
        model, method="depth", criterion="uniform", keep_layers=4, protect_layers=protected, overwrite=True
    )
    assert made["shape"].startswith("4 of 5")
    kept = prune(model, sparsity=0.3, layout="per-layer", protect_layers=(0, 4), overwrite=True)
    blocks = json.loads((scratch / "out" / "config.json").read_text())["block_configs"]
    whole = {"attention": {"no_op": False, "num_attention_heads": 6, "num_key_value_heads": 3},
             "ffn": {"no_op": False, "intermediate_size": 48}}  # fmt: skip
    assert blocks[0] == blocks[-1] == whole and "kept" not in kept


@pytest.mark.parametrize("criterion", ["flap", "minitron", "wanda", "magnitude", "random", "ziplm"])
def test_width_criteria_take_the_same_share_of_every_layer(prune, scratch, criterion):
    model = runs.tiny("llama", scratch / "model")
    prune(model, method="width", criterion=criterion, sparsity=0.34)
    config = json.loads((scratch / "out" / "config.json").read_text())
    assert (
        config["intermediate_size"] == 32 and config["num_key_value_heads"] == 2 and config["head_dim"] == 8
    )
    same_as_masked(model, scratch / "out")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_minitron_cuts_the_residual_stream(prune, scratch, family):
    model = runs.tiny(family, scratch / "model")
    made = prune(
        model, method="width", criterion="minitron", sparsity=0.34, structures=("heads", "ffn", "hidden")
    )
    loaded = strictly(scratch / "out")
    assert loaded.config.hidden_size == 32 and "hidden 32" in made["shape"]
    assert torch.isfinite(logits(loaded)).all() and made["quality"]["kl"] > 0


@pytest.mark.parametrize(
    ("family", "shape"),
    [
        ("llama", "heads"),
        ("qwen3", "heads"),
        ("gemma2", "heads"),
        ("gpt2", "ffn"),
        ("mixtral", "heads"),
        ("phi3", "heads"),
    ],
)
def test_E5_every_family_is_cut_to_a_speedup_in_what_it_can_lose(prune, machine, scratch, family, shape):
    machine.rest, machine.ffn = 0.01, 0.0004
    model = runs.tiny(family, scratch / "model")
    made = prune(
        model,
        method="ziplm",
        target_speedup=1.35,
        round_to=1 if family != "mixtral" else "auto",
        tolerance=0.1,
    )
    assert made["speedup"]["verdict"] in ("met", "too fast"), made
    assert made["speedup"]["measured"] > 1.3 and shape in made["shape"]
    loaded = strictly(scratch / "out")
    assert sum(p.numel() for p in loaded.parameters()) == made["parameters"]
    same_as_masked(model, scratch / "out")


def test_an_encoder_is_cut_in_ffn_and_layers_and_compared_by_its_states(prune, machine, scratch, monkeypatch):
    model = runs.tiny("bert", scratch / "model")
    made = prune(model, sparsity=0.3)
    config = json.loads((scratch / "out" / "config.json").read_text())
    assert config["num_attention_heads"] == 6 and (
        config["intermediate_size"] < 48 or config["num_hidden_layers"] < 3
    )
    assert made["quality"].keys() == {"tokens", "cosine", "nmse"} and made["quality"]["cosine"] < 1
    dropped = prune(model, method="depth", keep_layers=2, overwrite=True)
    assert dropped["shape"].startswith("2 of 3 layers")
    same_as_masked(model, scratch / "out", 1e-6)


def test_heads_that_only_mistral_holds_are_written_as_mistral(prune, scratch):
    model = runs.tiny(
        "llama", scratch / "model", num_attention_heads=6, num_key_value_heads=6, hidden_size=48
    )
    prune(model, method="width", criterion="magnitude", sparsity=0.17, structures=("heads",))
    config = json.loads((scratch / "out" / "config.json").read_text())
    assert config["model_type"] == "mistral" and config["num_attention_heads"] == 5
    same_as_masked(model, scratch / "out", 1e-5)


# ---- solving, search, layout ---------------------------------------------------------------------


def test_weights_solved_again_beat_sliced_ones(prune, scratch):
    model = runs.small(scratch / "model")
    options = {"sparsity": 0.5, "structures": ("ffn",), "samples": 24, "sequence_length": 128}
    divergence = {}
    for name, more in (
        ("sliced", {"method": "width", "criterion": "magnitude"}),
        ("solved", {}),
        ("sequential", {"sequential": True}),
    ):
        divergence[name] = prune(model, overwrite=True, **options, **more)["quality"]["kl"]
        same_as_masked(model, scratch / "out")
    assert max(divergence["solved"], divergence["sequential"]) < divergence["sliced"] / 2
    assert divergence["solved"] != divergence["sequential"]


def test_the_plain_program_tries_one_plan_and_the_search_more(prune, scratch):
    model = runs.small(scratch / "model")
    assert len(prune(model, target_speedup=1.5, search="dp")["tried"]) == 1
    assert len(prune(model, target_speedup=1.5, overwrite=True)["tried"]) > 3


def test_E6_layers_of_their_own_sizes_are_never_worse_than_uniform(prune, scratch):
    model = runs.small(scratch / "model")
    made = prune(model, target_speedup=1.6, layout="per-layer")
    config = json.loads((scratch / "out" / "config.json").read_text())
    said = next(text for text in made["remarks"] if text.startswith("true loss: uniform"))
    uniform, own = (float(part.split()[-1]) for part in said.removeprefix("true loss: ").split(", "))
    assert own <= uniform and made["speedup"]["measured"] == pytest.approx(1.6, rel=0.03)
    if "block_configs" in config:
        assert (scratch / "out" / "modeling_surgeon.py").is_file() and config["model_type"] == "surgeon_qwen2"
        assert "folder with code" in " ".join(made["readers"])
        assert "trust_remote_code" in (scratch / "out" / "README.md").read_text()


# ---- the folder ----------------------------------------------------------------------------------

LOADER = """
import sys, json, torch, transformers
transformers.utils.logging.disable_progress_bar()
for folder in sys.argv[1:]:
    config = transformers.AutoConfig.from_pretrained(folder)
    model, info = getattr(transformers, config.architectures[0]).from_pretrained(folder, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("three plus five", return_tensors="pt")["input_ids"]
    assert torch.isfinite(model(input_ids=ids).logits).all()
    print(folder, sum(p.numel() for p in model.parameters()))
"""


@pytest.mark.slow
def test_E5_results_load_strictly_in_a_fresh_process(prune, scratch):
    sizes = {}
    for family in ("qwen2", "bert"):
        model = runs.small(scratch / family) if family == "qwen2" else runs.tiny(family, scratch / family)
        sizes[scratch / f"{family}-out"] = prune(model, sparsity=0.3)["parameters"]
        (scratch / "out").rename(scratch / f"{family}-out")
    done = subprocess.run([sys.executable, "-c", LOADER, *map(str, sizes)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [int(line.split()[-1]) for line in done.stdout.splitlines()] == list(sizes.values())


def test_everything_beside_the_weights_survives_and_says_what_was_done(prune, scratch):
    model = runs.small(scratch / "model")
    (model / "modules.json").write_text('[{"idx": 0}]')
    (model / "1_Pooling").mkdir()
    (model / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    made = prune(model, target_speedup=1.5, seed=3)
    out = scratch / "out"
    for name in ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "modules.json",
                 "1_Pooling/config.json"):  # fmt: skip
        assert (out / name).read_bytes() == (model / name).read_bytes(), name

    card = (out / "README.md").read_text()
    assert "A smaller model cut from model with the method `ziplm`." in card
    assert "--method ziplm --target-speedup 1.5" in card and "--seed 3" in card and "-o OUT" in card
    assert "evaluate it on your task before use" in card and f"{made['parameters']:,} parameters" in card
    assert made["shape"] in card

    manifest = json.loads((out / "surgeon.json").read_text())
    recipe = manifest["recipe"]
    assert recipe["verb"] == "prune" and recipe["target"] == "speedup=1.5" and recipe["request"]["seed"] == 3
    assert recipe["calibration"]["ids_sha256"] and recipe["shapes"] and recipe["layers"]
    written = "".join(
        (out / name).read_text() for name in ("surgeon.json", "README.md", "pruning.json", "config.json")
    )
    assert str(scratch) not in written and "/tmp" not in written

    kept = Cut.from_document(json.loads((out / "pruning.json").read_text()))
    assert kept.identity() == recipe["kept"]
    for line in (out / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ", 1)
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest, name


@pytest.mark.slow
def test_a_uniform_result_passes_every_check_of_verify(prune, scratch):
    prune(runs.small(scratch / "model"), target_speedup=1.5)
    found = api.verify(scratch / "out", load=True, generate=True)
    assert found.errors == [] and found.reading is not None
    assert (
        found.reading.checks["load"]["class"] == "Qwen2ForCausalLM"
        and found.reading.checks["generate"]["tokens"] == 16
    )
