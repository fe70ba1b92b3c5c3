"""``surgeon inspect``: summaries of folders, files and adapters; statistics against brute force."""

from __future__ import annotations

import json

import forge
import numpy as np
import pytest
from commands import run

from surgeon import inspection
from surgeon.checkpoint.checkpoint import open_path


def wide(tensor) -> np.ndarray:
    code, shape, content = forge.describe(tensor)
    if code == "BF16":
        bits = np.frombuffer(content, "<u2").astype(np.uint32) << 16
        return bits.view(np.float32).astype(np.float64).reshape(shape)
    return (
        np.frombuffer(content, {"F32": "<f4", "F16": "<f2", "F64": "<f8"}[code])
        .astype(np.float64)
        .reshape(shape)
    )


def test_a_folder_in_one_glance(capsys, scratch):
    folder = forge.model_folder(scratch / "model", 1, shards=3)
    ran = run(capsys, "inspect", folder)
    assert ran.code == 0
    assert "3 files" in ran.out
    assert "llama (2 layers, hidden 16, ffn 24, 4 heads / 2 kv, vocab 24" in ran.out
    assert "untied lm_head" in ran.out
    assert "tokenizer.json" in ran.out


def test_a_bare_file_is_guessed_from_names_and_shapes(capsys, scratch):
    file = forge.write(scratch / "long.safetensors", forge.llama_tensors(1))
    ran = run(capsys, "inspect", file)
    assert "no config.json beside it" in ran.out
    assert (
        "looks like llama or mistral (2 layers, hidden 16, ffn 24, 16 query / 8 kv rows, vocab 24)" in ran.out
    )
    summary = run(capsys, "inspect", file, "--json").document["model"]
    assert summary["family_from"] == "names"
    assert summary["sizes"]["layers"] == 2


def test_a_file_inside_a_folder_points_to_the_folder(capsys, scratch):
    folder = forge.model_folder(scratch / "model", 1)
    ran = run(capsys, "inspect", folder / "model.safetensors")
    assert "give the folder" in ran.out
    assert "no config.json beside" not in ran.out


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_statistics_equal_brute_force_whatever_the_blocks(scratch, monkeypatch, dtype):
    tensors = forge.llama_tensors(1, dtype)
    tensors["zeros"] = np.array([[0, 1, -3], [0, 0, 2]], np.float32)
    file = forge.write(scratch / "x.safetensors", tensors)
    monkeypatch.setattr(inspection.block_ranges, "__defaults__", (1, 7))
    checkpoint = open_path(file)
    found = inspection.statistics(checkpoint, threads=2)
    for name, tensor in tensors.items():
        values, figures = wide(tensor), found[name].figures()
        assert figures["norm"] == pytest.approx(np.sqrt((values**2).sum()), rel=1e-12)
        assert figures["max_abs"] == np.abs(values).max()
        assert figures["mean"] == pytest.approx(values.mean(), rel=1e-9, abs=1e-12)
        assert figures["zeros"] == (values == 0).mean()
        assert figures["nonfinite"] == 0
    checkpoint.close()


def test_non_finite_values_are_counted_and_left_out(capsys, scratch):
    file = forge.write(scratch / "x.safetensors", {"w": np.array([[3, np.nan], [np.inf, 4]], np.float32)})
    ran = run(capsys, "inspect", file, "--stats", "--json")
    document = ran.document
    assert document["tensors"][0]["nonfinite"] == 2
    assert document["tensors"][0]["norm"] == 5
    assert "non-finite values in w" in ran.err


def test_layers_and_sorting(capsys, scratch):
    folder = forge.model_folder(scratch / "model", 1)
    document = run(capsys, "inspect", folder, "--layers", "--stats", "--json").document
    assert [g["name"] for g in document["layers"]] == ["outside layers", "model.layers.0", "model.layers.1"]
    assert sum(g["bytes"] for g in document["layers"]) == document["model"]["bytes"]
    assert all(g["norm"] > 0 for g in document["layers"])
    rows = run(capsys, "inspect", folder, "--tensors", "*", "--sort", "size", "--json").document["tensors"]
    assert [r["bytes"] for r in rows] == sorted((r["bytes"] for r in rows), reverse=True)
    names = [r["name"] for r in run(capsys, "inspect", folder, "--tensors", "re:.*norm.*", "--sort", "name", "--json").document["tensors"]]  # fmt: skip
    assert names == sorted(names)
    assert all("norm" in n for n in names)


def expert_tensors(fused: bool) -> dict[str, np.ndarray]:
    tensors = forge.llama_tensors(1)
    for layer in range(2):
        at = f"model.layers.{layer}.mlp.experts"
        if fused:
            tensors[f"{at}.gate_up_proj"] = np.zeros((3, 16, 48), np.float32)
            tensors[f"{at}.down_proj"] = np.zeros((3, 24, 16), np.float32)
        else:
            for expert in range(3):
                for part, shape in (("gate_proj", (24, 16)), ("up_proj", (24, 16)), ("down_proj", (16, 24))):
                    tensors[f"{at}.{expert}.{part}.weight"] = np.zeros(shape, np.float32)
    return tensors


@pytest.mark.parametrize("fused", [False, True])
def test_experts_in_both_storages(capsys, scratch, fused):
    file = forge.write(scratch / "moe.safetensors", expert_tensors(fused))
    found = run(capsys, "inspect", file, "--experts", "--json").document["experts"]
    assert [(e["layer"], e["experts"], e["per_expert_bytes"]) for e in found] == [
        (n, 3, 3 * 24 * 16 * 4) for n in range(2)
    ]
    assert {e["storage"] for e in found} == {"fused" if fused else "per expert"}


def test_a_dense_model_has_no_experts(capsys, scratch):
    folder = forge.model_folder(scratch / "model", 1)
    assert "dense" in run(capsys, "inspect", folder, "--experts").out


def test_config_is_printed_as_it_is(capsys, scratch):
    folder = forge.model_folder(scratch / "model", 1)
    stored = json.loads((folder / "config.json").read_text())
    assert run(capsys, "inspect", folder, "--config", "--json").document["config"] == stored
    file = forge.write(scratch / "x.safetensors", forge.llama_tensors(1))
    assert run(capsys, "inspect", file, "--config").code == 2


def test_quantized_and_tied_models_are_said_to_be(capsys, scratch):
    tensors = forge.llama_tensors(1)
    del tensors["lm_head.weight"]
    folder = forge.model_folder(
        scratch / "model",
        tensors=tensors,
        tie_word_embeddings=True,
        quantization_config={"quant_method": "fp8"},
    )
    ran = run(capsys, "inspect", folder)
    assert "quantized  fp8" in ran.out
    assert "tied lm_head" in ran.out and "untied" not in ran.out


def test_types_without_values_have_no_statistics(capsys, scratch):
    file = forge.write(scratch / "x.safetensors", {"i": np.arange(4, dtype=np.int64)})
    ran = run(capsys, "inspect", file, "--stats")
    assert (ran.code, "E311" in ran.err) == (3, True)
    both = {"i": np.arange(4, dtype=np.int64), "w": np.ones((2, 2), np.float32)}
    ran = run(capsys, "inspect", forge.write(scratch / "y.safetensors", both), "--stats")
    assert ran.code == 0
    assert "1 tensors are of types" in ran.err


def test_an_adapter_is_folded_in_while_reading(capsys, scratch):
    folder = forge.model_folder(scratch / "model", 1)
    adapter = scratch / "adapter"
    adapter.mkdir()
    rng = np.random.default_rng(0)
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    parts = {f"{name}.lora_A.weight": rng.standard_normal((2, 16)).astype(np.float32),
             f"{name}.lora_B.weight": rng.standard_normal((16, 2)).astype(np.float32)}  # fmt: skip
    forge.write(adapter / "adapter_model.safetensors", parts)
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    target = "model.layers.0.self_attn.q_proj.weight"
    document = run(
        capsys, "inspect", f"{folder}+{adapter}", "--tensors", target, "--stats", "--json"
    ).document
    a, b = parts.values()
    wanted = wide(forge.llama_tensors(1)[target]) + b.astype(np.float64) @ a
    assert document["tensors"][0]["norm"] == pytest.approx(np.linalg.norm(wanted), rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["nowhere"], 3, "E301"),
        (["MODEL", "--sort", "colour"], 2, "E209"),
        (["MODEL", "--tensors", "nothing*"], 2, "E218"),
        (["MODEL", "--tensors", "re:("], 2, "E218"),
        (["MODEL", "--threads", "0"], 2, "threads"),
        (["MODEL", "--layer"], 2, "--layers"),
        ([""], 2, "E204"),
        (["ADAPTER"], 3, "E332"),
        (["PICKLE"], 3, "E331"),
    ],
)
def test_wrong_use_is_told_apart(capsys, scratch, arguments, code, text):
    forge.model_folder(scratch / "MODEL", 1)
    (scratch / "ADAPTER").mkdir()
    (scratch / "ADAPTER" / "adapter_config.json").write_text("{}")
    (scratch / "PICKLE").mkdir()
    (scratch / "PICKLE" / "pytorch_model.bin").write_bytes(b"x")
    places = {"MODEL", "ADAPTER", "PICKLE"}
    ran = run(capsys, "inspect", *(scratch / a if a in places else a for a in arguments))
    assert ran.code == code
    assert text in ran.err
    assert len(ran.err.splitlines()) <= 12


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--criterion", "nope"], "E244", "there is no criterion"),
        (["--criterion", "nope", "--calibration", "TEXT"], "E244", "there is no criterion"),
        (["--criterion", "aimer", "--calibration", "TEXT"], "E246", "does not look at text"),
        (["--criterion", "reap"], "E206", "--criterion"),
        (["--keep-experts", "1"], "E206", "--keep-experts"),
    ],
)
def test_options_about_experts_are_checked_before_anything_is_shown(capsys, scratch, arguments, code, text):
    forge.model_folder(scratch / "model", 1)
    ran = run(capsys, "inspect", scratch / "model", "--experts", *arguments)
    assert (ran.code, ran.out) == (2, "") and f"error[{code}]" in ran.err and text in ran.err
    assert "help:" in ran.err


def test_why_no_text_can_be_run_is_told_apart(capsys, scratch):
    folder = forge.model_folder(scratch / "dense", 1)
    ran = run(capsys, "inspect", folder, "--experts", "--calibration", "TEXT")
    assert (ran.code, ran.out) == (2, "") and "has no experts to look at" in ran.err
    assert "config.json" not in ran.err
    ran = run(capsys, "inspect", folder / "model.safetensors", "--experts", "--calibration", "TEXT")
    assert (ran.code, ran.out) == (2, "") and "has no config.json" in ran.err
    assert "give the model folder" in ran.err


def test_a_hostile_name_cannot_drive_the_terminal(capsys, scratch):
    file = forge.write(scratch / "x.safetensors", {"a\x1b[31mred": np.ones(2, np.float32)})
    ran = run(capsys, "inspect", file, "--tensors", "*")
    assert "\\x1b[31mred" in ran.out or ran.code == 3


def test_the_manifest_of_a_merge_is_shown(capsys, scratch):
    folder = forge.model_folder(scratch / "model", 1)
    body = {
        "verb": "merge",
        "recipe": {"method": "ties"},
        "program": {"version": "0.1.0"},
        "inputs": {"a": {}, "b": {}},
    }
    (folder / "surgeon.json").write_text(json.dumps(body))
    assert "made by  surgeon 0.1.0: merge ties of a, b" in run(capsys, "inspect", folder).out
    (folder / "surgeon.json").write_text('{"recipe": 3, "inputs": []}')
    assert run(capsys, "inspect", folder).code == 0


def test_an_encoder_lacks_neither_generation_settings_nor_a_head(capsys, scratch):
    folder = forge.model_folder(scratch / "model", 1, tokenizer=False, architectures=["LlamaModel"])
    (folder / "generation_config.json").unlink()
    ran = run(capsys, "inspect", folder)
    assert "lm_head" not in ran.out
    assert "missing  tokenizer, tokenizer_config.json, LICENSE" in ran.out


def test_the_python_function_gives_the_same(scratch):
    import surgeon

    folder = forge.model_folder(scratch / "model", 1)
    found = surgeon.inspect(folder, tensors="*norm*", stats=True)
    assert found.summary.parameters == sum(
        np.prod(forge.describe(t)[1]) for t in forge.llama_tensors(1).values()
    )
    assert set(found.tensors) == set(found.stats) == {n for n in forge.llama_tensors(1) if "norm" in n}
    assert surgeon.diff(folder, folder, values=True).differs is False
    assert surgeon.verify(folder).errors == []
