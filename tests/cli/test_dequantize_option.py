"""``--dequantize``: a quantized input gives, bit for bit, what the plain model it stands for gives; without it E311."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import forge
import numpy as np
import pytest
import torch
from commands import run
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "formats"))
from compressed_models import dense_folder, int_, written
from quantized_models import integer_folders

import surgeon
from surgeon.formats.float4 import MXFP4
from surgeon.formats.float8_dynamic import FLOAT8

CHOSEN = {
    "q_proj": int_(4, 32), "k_proj": int_(3, 32), "v_proj": FLOAT8, "o_proj": int_(8), "gate_proj": MXFP4,
    "up_proj": int_(2, 16), "down_proj": int_(5), "lm_head": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A Llama in six schemes with a tokenizer, and the plain model it stands for."""
    folder = tmp_path_factory.mktemp("pair")
    made = written(folder, dense_folder(folder / "source"), lambda name: CHOSEN[name.rpartition(".")[2]])
    for place in (made.packed, made.plain):
        (place / "tokenizer.json").write_text(json.dumps(forge.tokenizer_json(67)))
        (place / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
        )
        (place / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    return made


def same(first: Path, second: Path) -> None:
    """Check that two folders hold the same tensors, bit for bit, and that neither speaks of quantization."""
    one, other = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name
    for folder in (first, second):
        assert "quantization_config" not in json.loads((folder / "config.json").read_text())


def recipe(folder: Path) -> dict:
    return json.loads((folder / "surgeon.json").read_text())["recipe"]


def refused(ran, needs: str) -> None:
    assert ran.code == 3 and "E311" in ran.err and needs in ran.err
    assert "help: --dequantize converts while reading" in ran.err and "MB memory" in ran.err


# ---- export ---------------------------------------------------------------------------------------------


def test_export_gives_a_plain_folder_that_verify_accepts(pair, tmp_path, capsys):
    ran = run(capsys, "export", pair.packed, "--dequantize", "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert "14 quantized matrices are read as bfloat16 numbers" in ran.err
    same(tmp_path / "out", pair.plain)
    assert recipe(tmp_path / "out")["dequantize"] == {
        "packed": {
            "compressed-tensors four-bit floats": 2,
            "compressed-tensors integers": 10,
            "fp8": 2,
        }
    }
    assert run(capsys, "verify", tmp_path / "out").code == 0
    again = run(capsys, "export", pair.packed, "--dequantize", "-o", tmp_path / "out")
    assert again.code == 0 and "unchanged" in again.out


def test_export_without_it_copies_what_is_stored(pair, tmp_path, capsys):
    assert run(capsys, "export", pair.packed, "-o", tmp_path / "out").code == 0
    one, other = load_file(tmp_path / "out/model.safetensors"), load_file(pair.packed / "model.safetensors")
    assert one.keys() == other.keys() and "dequantize" not in recipe(tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    refused(
        run(capsys, "export", pair.packed, "--dtype", "float32", "-o", tmp_path / "wide"),
        "this needs plain weights",
    )
    refused(
        run(capsys, "export", pair.packed, "--to", "gguf", "-o", tmp_path / "a.gguf"),
        "this needs plain weights",
    )


def test_export_in_another_type(pair, tmp_path, capsys):
    ran = run(capsys, "export", pair.packed, "--dequantize", "--dtype", "float32", "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    found = load_file(tmp_path / "out/model.safetensors")
    for name, tensor in load_file(pair.plain / "model.safetensors").items():
        assert torch.equal(found[name], tensor.float()), name
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "float32"


# ---- merge ----------------------------------------------------------------------------------------------


def test_merge(pair, tmp_path, capsys):
    other = dense_folder(tmp_path / "other", initializer_range=0.07)
    refused(run(capsys, "merge", pair.packed, other, "-o", tmp_path / "no"), "merging needs plain weights")
    assert not (tmp_path / "no").exists()
    ran = run(capsys, "merge", pair.packed, other, "--dequantize", "-o", tmp_path / "one")
    assert ran.code == 0, ran.err
    assert "14 quantized matrices are read" in ran.err
    assert run(capsys, "merge", pair.plain, other, "-o", tmp_path / "two").code == 0
    same(tmp_path / "one", tmp_path / "two")
    assert list(recipe(tmp_path / "one")["dequantize"]) == ["packed"]
    assert "dequantize" not in recipe(tmp_path / "two")
    surgeon.merge([pair.packed, other], output=tmp_path / "three", dequantize=True)
    same(tmp_path / "three", tmp_path / "two")


def test_an_adapter_is_folded_into_the_plain_numbers(pair, tmp_path, capsys):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    drawn = torch.Generator().manual_seed(0)
    save_file(
        {
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.randn(
                4, 64, generator=drawn
            ),
            "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": torch.randn(
                64, 4, generator=drawn
            ),
        },
        adapter / "adapter_model.safetensors",
    )
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]})
    )
    for place, more, out in ((pair.packed, ["--dequantize"], "one"), (pair.plain, [], "two")):
        ran = run(capsys, "export", f"{place}+{adapter}", *more, "-o", tmp_path / out)
        assert ran.code == 0, ran.err
    same(tmp_path / "one", tmp_path / "two")
    assert recipe(tmp_path / "one")["dequantize"] and "dequantize" not in recipe(tmp_path / "two")
    plain = load_file(pair.plain / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    changed = load_file(tmp_path / "one/model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    assert not torch.equal(plain, changed)


# ---- prune ----------------------------------------------------------------------------------------------


def test_prune(pair, tmp_path, capsys):
    asked = ("--method", "magnitude", "--sparsity", "0.5")
    refused(run(capsys, "prune", pair.packed, *asked, "-o", tmp_path / "no"), "cannot be taken apart")
    text = tmp_path / "text.jsonl"
    text.write_text(
        "".join(
            json.dumps({"text": " ".join(f"w{(7 * n + i) % 60}" for i in range(40))}) + "\n"
            for n in range(60)
        )
    )
    more = (
        "--calibration",
        text,
        "--samples",
        "4",
        "--sequence-length",
        "16",
        "--threads",
        "1",
        "--device",
        "cpu",
    )
    ran = run(capsys, "prune", pair.packed, *asked, *more, "--dequantize", "-o", tmp_path / "one")
    assert ran.code == 0, ran.err
    assert "14 quantized matrices are read" in ran.err
    assert run(capsys, "prune", pair.plain, *asked, *more, "-o", tmp_path / "two").code == 0
    same(tmp_path / "one", tmp_path / "two")
    assert list(recipe(tmp_path / "one")["dequantize"]) == ["packed"]


def test_experts_are_cut_from_what_is_stored_or_from_plain_numbers(tmp_path, capsys):
    """Whole experts need no permission: their bytes are copied. With it the result is plain."""
    packed, plain = integer_folders(tmp_path, "gptq")
    asked = ("--method", "random", "--keep-experts", "2", "--no-protect", "--seed", "3")
    for source, more, out in ((packed, ["--dequantize"], "one"), (plain, [], "two"), (packed, [], "stored")):
        ran = run(capsys, "prune", source, *asked, *more, "-o", tmp_path / out)
        assert ran.code == 0, ran.err
    same(tmp_path / "one", tmp_path / "two")
    assert any(name.endswith("qweight") for name in load_file(tmp_path / "stored/model.safetensors"))


# ---- edit -----------------------------------------------------------------------------------------------


def test_edit(pair, tmp_path, capsys):
    """A direction is taken out of the plain numbers."""
    from surgeon.edit.direction_file import Directions

    vectors = {n: np.random.default_rng(n).standard_normal(64).astype(np.float32) for n in range(2)}
    made = Directions(
        "attn", "response", vectors, {}, dict.fromkeys(vectors, 1.0), dict.fromkeys(vectors, 1.0),
        {n: f"model.layers.{n}.self_attn.o_proj" for n in vectors}, (8, 8), {"sha256": "of another model"},
    )  # fmt: skip
    made.save(tmp_path / "directions.safetensors")
    asked = (
        "--method",
        "project-out",
        "--direction",
        tmp_path / "directions.safetensors",
        "--force",
        "--no-check",
    )
    refused(run(capsys, "edit", pair.packed, *asked, "-o", tmp_path / "no"), "editing needs plain weights")
    ran = run(capsys, "edit", pair.packed, *asked, "--dequantize", "-o", tmp_path / "one")
    assert ran.code == 0, ran.err
    assert "quantized matrices are read" in ran.err
    assert run(capsys, "edit", pair.plain, *asked, "-o", tmp_path / "two").code == 0
    same(tmp_path / "one", tmp_path / "two")
    assert list(recipe(tmp_path / "one")["dequantize"]) == ["packed"]
    name = "model.layers.0.self_attn.o_proj.weight"
    before, after = (load_file(f / "model.safetensors")[name] for f in (pair.plain, tmp_path / "one"))
    assert not torch.equal(before, after)


# ---- diff and eval --------------------------------------------------------------------------------------


def test_diff(pair, capsys):
    refused(run(capsys, "diff", pair.packed, pair.plain, "--values"), "its values cannot be compared")
    assert run(capsys, "diff", pair.packed, pair.plain).code == 0  # names, types and shapes need no values
    ran = run(capsys, "diff", pair.packed, pair.plain, "--values", "--dequantize", "--exit-code")
    assert ran.code == 0, ran.out
    assert "no difference" in ran.out and "packed: 14 quantized matrices are read" in ran.err
    shifted = dict(load_file(pair.plain / "model.safetensors"))
    shifted["model.layers.1.mlp.up_proj.weight"] = shifted["model.layers.1.mlp.up_proj.weight"] + 1
    place = pair.plain.parent / "shifted"
    place.mkdir(exist_ok=True)
    save_file(shifted, place / "model.safetensors")
    (place / "config.json").write_text((pair.plain / "config.json").read_text())
    assert run(capsys, "diff", pair.packed, place, "--values", "--dequantize", "--exit-code").code == 4


@pytest.fixture
def texts(tmp_path):
    place = tmp_path / "texts.jsonl"
    place.write_text(
        "".join(
            json.dumps({"text": " ".join(f"w{(3 * n + i * i) % 60}" for i in range(50))}) + "\n"
            for n in range(6)
        )
    )
    return place


def test_eval_reads_layers_of_plain_numbers(pair, texts, capsys):
    asked = ("--perplexity", texts, "--sequence-length", "32", "--threads", "1", "--device", "cpu")
    refused(run(capsys, "eval", pair.packed, *asked), "--perplexity and --kl read plain weights")
    found = run(
        capsys, "eval", pair.packed, *asked, "--kl", pair.plain, "--text", texts, "--dequantize", "--json"
    ).document
    plain = run(capsys, "eval", pair.plain, *asked, "--json").document
    assert found["metrics"]["kl"]["value"] == 0
    assert found["metrics"]["perplexity"] == plain["metrics"]["perplexity"]
    assert found["model"]["dequantized"] and found["model"]["parameters"] == plain["model"]["parameters"]
    assert any("quantized matrices are read" in note for note in found["notes"])


def test_eval_answers_with_plain_numbers(pair, tmp_path, capsys):
    """Replies of the quantized model read here are those of the plain model the stock library loads."""
    questions = tmp_path / "questions.jsonl"
    questions.write_text(
        "".join(json.dumps({"question": f"w{n} w{2 * n}", "answer": "w1"}) + "\n" for n in range(1, 9))
    )
    asked = (
        "--questions",
        questions,
        "--match",
        "exact",
        "--max-new-tokens",
        "6",
        "--device",
        "cpu",
        "--threads",
        "1",
    )
    for source, more, out in ((pair.packed, ["--dequantize"], "one"), (pair.plain, [], "two")):
        ran = run(capsys, "eval", source, *asked, *more, "--samples-out", tmp_path / f"{out}.jsonl")
        assert ran.code == 0, ran.err
    replies = [
        [json.loads(line) for line in (tmp_path / f"{out}.jsonl").read_text().splitlines()]
        for out in ("one", "two")
    ]
    texts = [[row.get("response", row.get("reply", row.get("text"))) for row in rows] for rows in replies]
    assert len(texts[0]) >= 8 and None not in texts[0] and texts[0] == texts[1]
    assert len(set(texts[0])) > 1


def test_plain_models_are_left_alone(pair, tmp_path, capsys):
    ran = run(capsys, "export", pair.plain, "--dequantize", "-o", tmp_path / "out")
    assert ran.code == 0 and "quantized" not in ran.err
    same(tmp_path / "out", pair.plain)
    assert "dequantize" not in {k for k, v in recipe(tmp_path / "out").items() if isinstance(v, dict)}


def test_what_cannot_be_read_says_so(tmp_path, capsys):
    folder = forge.model_folder(tmp_path / "model", 1, quantization_config={"quant_method": "hqq"})
    other = forge.model_folder(tmp_path / "other", 2)
    ran = run(capsys, "merge", folder, other, "-o", tmp_path / "out")
    assert ran.code == 3 and "E311" in ran.err and "cannot be dequantized here" in ran.err
    ran = run(capsys, "merge", folder, other, "--dequantize", "-o", tmp_path / "out")
    assert ran.code == 3 and "E445" in ran.err and "hqq" in ran.err
