"""Scaled experts: the baked model computes what the multiplied routing weight does, and the right experts are found."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "prune"))
from expert_folders import edited, experts_module, loaded, moe_folder, opened, state_of

from surgeon.derive import Derived, Source, plan_of
from surgeon.edit import rice
from surgeon.errors import InputError, UsageError
from surgeon.execute import execute

MODELS = Path(__file__).resolve().parents[1] / "models"
IDS = torch.tensor([[5, 9, 33, 41, 12, 7, 60, 22, 8, 3, 17, 29, 50, 11, 4]])


def written(view, checkpoint, out):
    source = Source("source", checkpoint, str(checkpoint.folder))
    execute(
        plan_of(source, {"": Derived(view, {"method": "rice"}, "rice", {}, "scaled")}, verb="edit"),
        out,
        threads=1,
    )
    return out


@torch.no_grad()
def logits(model, scales=None):
    """Logits, with the routing weights of some experts multiplied while the model runs."""
    handles = []
    for layer in {layer for layer, _ in scales or {}}:
        own = {expert: factor for (number, expert), factor in scales.items() if number == layer}

        def multiply(module, args, own=own):
            hidden, index, weights = args
            factors = torch.ones_like(weights)
            for expert, factor in own.items():
                factors[index == expert] = factor
            return hidden, index, weights * factors

        handles.append(experts_module(model, layer).register_forward_pre_hook(multiply))
    found = model(input_ids=IDS).logits
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "storage"),
    [
        ("mixtral", "hub"),
        ("mixtral", "fused"),
        ("gpt_oss", "hub"),
        ("granitemoe", "hub"),
        ("deepseek_v3", "hub"),
    ],
)
def test_baked_factors_equal_factors_at_run_time(family, storage, dtype, scratch):
    folder = moe_folder(family, storage=storage, dtype=dtype)
    checkpoint, experts = opened(folder)
    model = loaded(folder)
    scales = {(1, 2): 4.0, (1, 6): 0.5, (2, 0): 8.0}
    baked = loaded(written(rice.bake(checkpoint, experts, scales), checkpoint, scratch / "out"))
    plain, wanted, found = logits(model), logits(model, scales), logits(baked)
    assert not torch.equal(plain, wanted)  # these experts are used
    assert torch.equal(found, wanted)


def test_a_factor_that_is_no_power_of_two_is_close(scratch):
    folder = moe_folder("mixtral", dtype=torch.bfloat16)
    checkpoint, experts = opened(folder)
    baked = loaded(written(rice.bake(checkpoint, experts, {(1, 2): 3.3}), checkpoint, scratch / "out"))
    plain, wanted, found = (x.float() for x in (logits(loaded(folder)), logits(loaded(folder), {(1, 2): 3.3}), logits(baked)))  # fmt: skip
    assert (found - wanted).abs().max() < 0.1 * (wanted - plain).abs().max()


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_only_the_scaled_experts_change_and_undo_restores_every_byte(family, scratch):
    folder = moe_folder(family, dtype=torch.bfloat16)
    checkpoint, experts = opened(folder)
    scales = {(0, 3): 16.0, (2, 1): 4.0}
    view = rice.bake(checkpoint, experts, scales)
    changed = rice.changed(checkpoint, view, experts, scales)
    out = written(view, checkpoint, scratch / "out")
    before, after = state_of(folder), state_of(out)
    assert changed == sorted(name for name in before if not torch.equal(before[name], after[name]))
    expected = {"mixtral": {"block_sparse_moe.experts.3.w2.weight", "block_sparse_moe.experts.1.w2.weight"},
                "gpt_oss": {"mlp.experts.down_proj", "mlp.experts.down_proj_bias"}}[family]  # fmt: skip
    assert {name.split(".", 3)[3] for name in changed} == expected
    if family == "gpt_oss":  # one tensor holds all experts: the others keep their bytes
        stack = after["model.layers.0.mlp.experts.down_proj"]
        own = before["model.layers.0.mlp.experts.down_proj"]
        assert torch.equal(stack[3], own[3] * 16) and torch.equal(
            stack[[0, 1, 2, 4, 5, 6, 7]], own[[0, 1, 2, 4, 5, 6, 7]]
        )
    scaled, again = opened(out)
    back = written(rice.bake(scaled, again, rice.parse_scales([rice.undo(scales)])), scaled, scratch / "back")
    restored = state_of(back)
    assert all(
        torch.equal(before[name].view(torch.int16), restored[name].view(torch.int16)) for name in before
    )


def test_fp8_experts_are_scaled_by_their_scales(scratch):
    def code(state):
        for name in [n for n in state if ".experts." in n]:
            state[name] = state[name].to(torch.float8_e4m3fn)
            state[name.removesuffix("weight") + "weight_scale_inv"] = torch.full((1, 1), 0.375)

    quantized = {
        "quantization_config": {
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": [".*self_attn"],
        }
    }
    folder = edited(moe_folder("mixtral"), scratch / "fp8", code, **quantized)
    checkpoint, experts = opened(folder)
    view = rice.bake(checkpoint, experts, {(1, 5): 4.0})
    name = "model.layers.1.block_sparse_moe.experts.5.w2.weight_scale_inv"
    assert rice.changed(checkpoint, view, experts, {(1, 5): 4.0}) == [name]
    before, after = state_of(folder), state_of(written(view, checkpoint, scratch / "out"))
    assert after[name].item() == 1.5
    assert all(
        torch.equal(before[n].view(torch.uint8), after[n].view(torch.uint8)) for n in before if n != name
    )


def test_float16_that_would_overflow_is_refused(scratch):
    def swell(state):
        state["model.layers.1.block_sparse_moe.experts.5.w2.weight"][0, 0] = 40000

    folder = edited(moe_folder("mixtral", dtype=torch.float16), scratch / "half", swell)
    checkpoint, experts = opened(folder)
    with pytest.raises(InputError, match="leaves the range of F16") as error:
        written(rice.bake(checkpoint, experts, {(1, 5): 2.0}), checkpoint, scratch / "out")
    assert error.value.code == "E425"


def test_scales_are_read_strictly():
    assert rice.parse_scales(["12:5=4", " 3:1 = 0.5, 3:2=1e1"]) == {(12, 5): 4.0, (3, 1): 0.5, (3, 2): 10.0}
    scales = {(3, 1): 0.5, (12, 5): 4.0}
    assert rice.parse_scales([rice.named(scales)]) == scales
    assert rice.parse_scales([rice.undo(scales)]) == {(3, 1): 2.0, (12, 5): 0.25}
    for wrong in ("12:5", "12=4", "a:b=1", "1:2=x", "", "1:2=nan", "-1:2=4"):
        with pytest.raises(UsageError, match="is not LAYER:EXPERT=FACTOR") as error:
            rice.parse_scales([wrong])
        assert error.value.code == "E247"
    for wrong in ("1:2=1", "1:2=0", "1:2=-4", "1:2=inf"):
        with pytest.raises(UsageError, match="multiplies by"):
            rice.parse_scales([wrong])
    with pytest.raises(UsageError, match="twice"):
        rice.parse_scales(["1:2=4,1:2=4"])


# ---- the command -------------------------------------------------------------------------------------


def invoke(*arguments):
    from surgeon.cli.edit import edit

    app = typer.Typer()
    app.command()(edit)
    return CliRunner().invoke(app, [str(a) for a in arguments])


ANSWERS = [f"<think>\nsum {n}, alternatively {n + 1}\n</think>\nanswer:{n}" for n in range(40)]


@pytest.fixture
def model(scratch):
    """A mixture of experts with a tokenizer."""
    folder = Path(shutil.copytree(moe_folder("qwen3_moe", vocab_size=281, max_position_embeddings=256), scratch / "moe"))  # fmt: skip
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(MODELS / "base" / name, folder / name)
    return folder


@pytest.fixture
def responses(scratch):
    path = scratch / "responses.jsonl"
    path.write_text("".join(json.dumps({"prompt": "Add.", "response": text}) + "\n" for text in ANSWERS))
    return path


def neutral(scratch):
    path = scratch / "neutral.txt"
    path.write_text("\n\n".join(f"Add {n}+{2 * n}.\nanswer:{3 * n}" for n in range(100, 140)))
    return path


def oracle(model, ids_of):
    """nPMI of every expert by plain loops over the stock model's own choices; markers as characters' places."""
    import math

    chosen = {}
    stock = loaded(model)
    places = {"<think>": [], "</think>": [], "alternatively": []}
    tokens = 0
    for ids, marked in ids_of:
        kept = {}
        handles = [
            experts_module(stock, layer).register_forward_pre_hook(
                lambda m, a, layer=layer, kept=kept: kept.__setitem__(layer, a[1])
            )
            for layer in range(3)
        ]
        with torch.no_grad():
            stock(input_ids=torch.tensor([ids]))
        for handle in handles:
            handle.remove()
        for marker, positions in marked.items():
            places[marker] += [tokens + p for p in positions]
        for layer, index in kept.items():
            for row, experts in enumerate(index.tolist()):
                for expert in experts:
                    chosen.setdefault((layer, expert), set()).add(tokens + row)
        tokens += len(ids)
    found = {}
    for place, used in chosen.items():
        each = []
        for where in places.values():
            k = len(used & set(where))
            each.append(
                -1.0 if k == 0 else math.log2(k * tokens / (len(used) * len(where))) / math.log2(tokens / k)
            )
        found[place] = sum(each) / 3
    return found


def test_experts_of_thinking_are_found_scaled_and_recorded(model, responses, scratch):
    out = scratch / "out"
    result = invoke(model, "--method", "rice", "--responses", responses, "--beta", "4", "--calibration", neutral(scratch),
                    "-o", out, "--threads", "1", "--device", "cpu", "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)["edit"]
    assert report["found"]["markers"] == {"<think>": 40, "</think>": 40, "alternatively": 40}
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    open_, close, word = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("<think>", "</think>", "alternatively"))  # fmt: skip
    samples = []
    for text in ANSWERS:
        chat = [{"role": "user", "content": "Add."}, {"role": "assistant", "content": text}]
        ids = list(tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"])

        def at(piece, ids=ids):
            return next(i for i in range(len(ids)) if ids[i : i + len(piece)] == piece)

        # a blank before the word belongs to it
        samples.append((ids, {"<think>": [at(open_) + len(open_)], "</think>": [at(close) - 1], "alternatively": [at(word) - 2]}))  # fmt: skip
    scores = oracle(model, samples)
    for expert in report["found"]["experts"]:
        place = (expert["layer"], expert["expert"])
        assert expert["npmi"] == pytest.approx(scores[place], rel=1e-9)
    best = sorted(scores, key=lambda p: (-scores[p], p))[:2]
    assert [(e["layer"], e["expert"]) for e in report["found"]["experts"]] == best
    assert report["scales"] == [
        {"layer": layer, "expert": expert, "factor": 4.0} for layer, expert in sorted(best)
    ]
    assert report["quality"]["kl"] > 0
    manifest = json.loads((out / "surgeon.json").read_text())
    named = ",".join(f"{layer}:{expert}=4" for layer, expert in sorted(best))
    assert manifest["recipe"]["scale_experts"] == named and manifest["recipe"]["beta"] == 4
    assert str(scratch) not in (out / "surgeon.json").read_text()
    before, after = state_of(model), state_of(out)
    assert [n for n in before if not torch.equal(before[n], after[n])] == report["changed"] and len(
        report["changed"]
    ) == 2
    # the same experts named by hand give the same weights
    again = invoke(
        model, "--method", "rice", "--scale-experts", named, "--no-check", "-o", scratch / "again", "--json"
    )
    assert again.exit_code == 0, again.output
    assert {n: t.numpy().tobytes() for n, t in state_of(scratch / "again").items()} == {n: t.numpy().tobytes() for n, t in after.items()}  # fmt: skip


def test_it_is_shown_as_an_experiment(model, responses, scratch):
    result = invoke(model, "--method", "rice", "--responses", responses, "--beta", "3", "--marker", "sum", "--experts-count", "1",
                    "--calibration", neutral(scratch), "-o", scratch / "out", "--device", "cpu", "--no-progress")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "are an experiment" in result.output and "no powers of two" in result.output
    assert "markers   sum 40" in result.output and "--scale-experts" in result.output


def test_a_dry_run_says_what_would_be_decided(model, responses, scratch):
    result = invoke(model, "--method", "rice", "--responses", responses, "--beta", "4", "--dry-run", "-o", scratch / "out", "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert any("decided by running" in note for note in json.loads(result.stdout)["notes"])
    assert not (scratch / "out").exists()
    result = invoke(
        model, "--method", "rice", "--scale-experts", "1:2=4", "--dry-run", "-o", scratch / "out", "--json"
    )
    assert json.loads(result.stdout)["edit"]["changed"] == ["model.layers.1.mlp.experts.2.down_proj.weight"]


@pytest.mark.parametrize(
    ("options", "code", "word"),
    [
        ((), "E295", "no responses"),
        (("--responses", "R"), "E247", "needs the factor"),
        (("--responses", "R", "--beta", "1"), "E247", "--beta multiplies by 1"),
        (("--responses", "R", "--beta", "4", "--experts-count", "0"), "E247", "--experts-count is 0"),
        (("--responses", "R", "--beta", "4", "--experts-count", "99"), "E247", "the model has 24 experts"),
        (("--responses", "R", "--beta", "4", "--marker", "hmm"), "E439", '"hmm" is nowhere'),
        (("--scale-experts", "1:2=4", "--beta", "4"), "E296", "no effect beside --scale-experts"),
        (("--scale-experts", "1:2=4", "--gamma", "4"), "E296", "no effect with --method rice"),
        (("--scale-experts", "1:2=4", "--direction", "d"), "E296", "no effect with --method rice"),
        (("--scale-experts", "1:99=4"), "E243", "no expert 99"),
        (("--scale-experts", "7:1=4"), "E243", "layer 7"),
        (("--scale-experts", "1:2"), "E247", "LAYER:EXPERT=FACTOR"),
    ],
)
def test_what_cannot_be_is_refused(options, code, word, model, responses, scratch):
    options = [responses if o == "R" else o for o in options]
    result = invoke(
        model, "--method", "rice", *options, "-o", scratch / "out", "--device", "cpu", "--no-check"
    )
    assert result.exit_code == (3 if code == "E439" else 2), result.output
    assert code in result.output and word in " ".join(result.output.split())
    assert not (scratch / "out").exists()


def test_other_methods_refuse_its_options_and_dense_models_are_refused(model, scratch):
    result = invoke(model, "--method", "steer", "--beta", "4", "-o", scratch / "out")
    assert result.exit_code == 2 and "--beta has no effect with --method steer" in result.output
    result = invoke(model, "--method", "thinkedit", "--marker", "x", "-o", scratch / "out")
    assert result.exit_code == 2 and "--marker has no effect with --method thinkedit" in result.output
    result = invoke(MODELS / "base", "--method", "rice", "--scale-experts", "1:2=4", "-o", scratch / "out")
    assert result.exit_code == 3 and "dense model" in result.output


def test_responses_without_any_usual_marker(model, scratch):
    path = scratch / "plain.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": "Add.", "response": f"answer:{n}"}) + "\n" for n in range(30))
    )
    result = invoke(model, "--method", "rice", "--responses", path, "--beta", "4", "-o", scratch / "out", "--device", "cpu")  # fmt: skip
    assert result.exit_code == 3 and "none of the usual markers" in result.output
