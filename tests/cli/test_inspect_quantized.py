"""``surgeon inspect`` of quantized models: bits by an independent count, what was passed over, who loads it."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import forge
import numpy as np
import pytest
from commands import run
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "formats"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "structure"))
import expert_models
from quantized_folders import LLAMA, QWEN3_MOE
from quantized_kinds import GOOD, auto_rounded, with_bitsandbytes, with_config

from surgeon.checkpoint.checkpoint import open_path
from surgeon.deploy import runtimes
from surgeon.errors import InputError
from surgeon.formats import auto_round, bnb
from surgeon.formats.account import account_of, is_linear
from surgeon.formats.scheme import Scheme

LAST = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3", "gate_up_proj",
        "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")  # fmt: skip
"""Last parts of the names of linear modules in the layers of the families here."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    done: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in done:
            done[kind] = GOOD[kind](tmp_path_factory.mktemp("kinds"))
        return done[kind]

    return make


def sizes(file: Path) -> dict[str, tuple[int, int]]:
    """Return name -> (stored bytes, values), from the header alone."""
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    return {
        n: (e["data_offsets"][1] - e["data_offsets"][0], int(np.prod(e["shape"]))) for n, e in header.items()
    }


def counted(folder: Path) -> tuple[int, int, int, int]:
    """Count (bytes of linear matrices with all that belongs to them, their parameters, all bytes, all parameters)."""
    stored = sizes(folder / "model.safetensors")
    plain = sizes(folder.parent / "plain" / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    renames = config["quantization_config"]["quant_method"] == "auto-round"
    size = parameters = 0
    for name, (_, values) in plain.items():
        module = name.removesuffix(".weight")
        if ".layers." not in name or module.rpartition(".")[2] not in LAST:
            continue
        parameters += values
        stem = auto_round.stored_name(module, config["model_type"]) if renames else module
        own = [n for n in stored if n.startswith((f"{stem}.", f"{stem}_")) and not n.endswith("bias")]
        own += [stem] if stem in stored else []  # stacks of experts have no ".weight"
        assert own, name
        size += sum(stored[n][0] for n in own)
    return size, parameters, sum(s for s, _ in stored.values()), sum(v for _, v in plain.values())


@pytest.mark.parametrize("kind", GOOD)
def test_bits_are_those_of_an_independent_count(kind, made, capsys):
    folder = made(kind)
    document = run(capsys, "inspect", folder, "--json").document["model"]
    found = document["quantization"]
    size, linear, total, parameters = counted(folder)
    assert (
        found["linear_parameters"] == linear and found["parameters"] == document["parameters"] == parameters
    )
    assert found["bits_per_weight"] == pytest.approx(8 * size / linear, rel=1e-12)
    assert found["file_bits_per_weight"] == pytest.approx(8 * total / parameters, rel=1e-12)
    inside = [row for row in found["schemes"] if row["linear"]]
    assert sum(row["parameters"] for row in inside) == linear and sum(row["bytes"] for row in inside) == size
    assert sum(row["parameters"] for row in inside if row["quantized"]) == found["quantized_parameters"]
    for row in found["schemes"]:
        assert row["bits_per_weight"] == pytest.approx(8 * row["bytes"] / row["parameters"])
    assert found["bits_per_weight"] < 16 and "model" not in found["schemes"][0]


def test_a_table_of_schemes(made, capsys):
    ran = run(capsys, "inspect", made("compressed"))
    assert "compressed-tensors mixed-precision: " in ran.out
    for words, matrices, bits in (
        ("int4g32", 2, 4 + 16 / 32 + 8 * 16 / 4096), ("mxfp4", 2, 4 + 8 / 32), ("nvfp4", 2, 4 + 8 / 16 + 32 / 6144),
        ("float8, a scale a row", 2, 8 + 16 / 64),
    ):  # fmt: skip
        line = next(line for line in ran.out.splitlines() if line.startswith(words))
        fields = line.removeprefix(words).split()
        assert (
            fields[0] == "layers"
            and int(fields[1]) == matrices
            and float(fields[-1]) == pytest.approx(bits, abs=6e-4)
        )
    assert "bits     " in ran.out and "of the whole model" in ran.out


def test_a_head_that_is_quantized_is_counted_apart(made, capsys):
    found = run(capsys, "inspect", made("compressed experts"), "--json").document["model"]["quantization"]
    (head,) = [row for row in found["schemes"] if not row["linear"]]
    assert head["quantized"] and head["parameters"] == 96 * 64 and head["matrices"] == 1


# ---- what was passed over -------------------------------------------------------------------------------


def test_experts_that_were_passed_over_are_a_warning(made, capsys):
    ran = run(capsys, "inspect", made("nf4 with plain experts"))
    assert "warning: 100% of the experts' parameters are not quantized (147,456 of 147,456)" in ran.err
    assert "36.9K of 184K linear parameters are quantized" in ran.out
    assert "plain BF16" in ran.out and "nf4" in ran.out
    for kind in ("compressed", "compressed experts", "auto-round mixtral", "gptq", "fp8", "mxfp4", "nf4"):
        ran = run(capsys, "inspect", made(kind))
        assert "warning" not in ran.err, kind
        assert (
            run(capsys, "inspect", made(kind), "--json").document["model"]["quantization"]["warnings"] == []
        )


def test_some_experts_that_were_passed_over(tmp_path, capsys):
    folder = auto_rounded(tmp_path, ("qwen3_moe", {**QWEN3_MOE[1], "mlp_only_layers": []}),
                          lambda m: None if ".experts." in m and "down" not in m else Scheme("int", 4, 32))  # fmt: skip
    ran = run(capsys, "inspect", folder)
    assert "67% of the experts' parameters are not quantized" in ran.err


def test_dense_matrices_that_were_passed_over(tmp_path, capsys):
    folder = auto_rounded(tmp_path, LLAMA, lambda m: Scheme("int", 4, 32) if "q_proj" in m else None)
    assert "of the parameters of linear matrices are not quantized" in run(capsys, "inspect", folder).err


# ---- who loads it ---------------------------------------------------------------------------------------


def readers(folder: Path) -> dict[str, runtimes.Reader]:
    checkpoint = open_path(folder)
    assert checkpoint.config is not None
    found = runtimes.readers(checkpoint.config, account_of(checkpoint), dtype="BF16")
    return {one.runtime: one for one in found}


@pytest.mark.parametrize(
    ("kind", "transformers", "vllm"),
    [
        ("compressed", (True, "compressed-tensors>=0.20"), (False, "one matrix, which has one scheme")),
        ("compressed experts", (True, "compressed-tensors>=0.15"), (True, "")),
        ("auto-round", (True, "auto-round"), (False, "3 bits are not read by vllm")),
        ("auto-round mixtral", (True, "auto-round"), (False, "not read by vllm")),
        ("nf4", (True, "bitsandbytes"), (True, "")),
        ("nf4 with plain experts", (True, "bitsandbytes"), (False, "not recorded")),
        ("gptq", (False, "ignores dynamic"), (False, "zero points in the middle")),
        ("pack with zero points", (False, "zero points"), (False, "zero points")),
        ("fp8", (True, "accelerate"), (True, "")),
        ("mxfp4", (True, "kernels"), (True, "")),
    ],
)
def test_readers(kind, transformers, vllm, made):
    found = readers(made(kind))
    for name, (loads, says) in (("transformers", transformers), ("vllm", vllm)):
        assert found[name].loads == loads and says in found[name].reason, found[name]
    config = json.loads((made(kind) / "config.json").read_text())
    shapes = next(one for one in runtimes.readers(config) if one.runtime == "llama.cpp")
    wanted = "surgeon export --to gguf --dequantize" if shapes.loads else shapes.reason
    assert not found["llama.cpp"].loads and wanted in found["llama.cpp"].reason
    assert not found["tensorrt-llm"].loads


def test_readers_are_shown(made, capsys):
    ran = run(capsys, "inspect", made("auto-round"))
    assert "transformers  loads it: needs auto-round" in ran.out
    assert "vllm          does not load it: " in ran.out
    document = run(capsys, "inspect", made("auto-round"), "--json").document["model"]["quantization"][
        "readers"
    ]
    assert {one["runtime"]: one["loads"] for one in document} == {
        "transformers": True,
        "vllm": False,
        "llama.cpp": False,
        "tensorrt-llm": False,
    }


def test_readers_of_plain_folders_are_as_before(made):
    config = json.loads((made("nf4").parent / "plain" / "config.json").read_text())
    assert [one.loads for one in runtimes.readers(config)] == [True, True, True, True]


# ---- what is not read, and what is plain ----------------------------------------------------------------


def test_a_form_that_is_not_read_says_why(made, tmp_path, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(load_file(made("gptq") / "model.safetensors"), folder / "model.safetensors")
    (folder / "config.json").write_text((made("gptq") / "config.json").read_text())
    with_config(folder, {"quant_method": "quark"})
    ran = run(capsys, "inspect", folder)
    assert (
        ran.code == 0 and "quantized  quark" in ran.out and "cannot be read as plain numbers here" in ran.err
    )
    assert run(capsys, "inspect", folder, "--json").document["model"]["quantization"] is None
    with pytest.raises(InputError, match="quark"):
        account_of(open_path(folder))


def test_plain_models_are_as_before(tmp_path, capsys):
    folder = forge.model_folder(tmp_path / "model", 1)
    ran = run(capsys, "inspect", folder)
    assert "bits" not in ran.out and "loads it" not in ran.out
    assert run(capsys, "inspect", folder, "--json").document["model"]["quantization"] is None


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "qwen2_moe"])
def test_linear_matrices_are_those_that_methods_may_change(family):
    """Against the list of the calibrated methods, which goes by the records of families."""
    from surgeon.calibrate.matrices import matrices_of
    from surgeon.calibrate.settings import Settings
    from surgeon.calibrate.skeleton import Skeleton

    checkpoint = open_path(expert_models.moe_folder(family))
    skeleton = Skeleton(checkpoint, Settings(threads=1))
    wanted = {matrix.tensor for layer in matrices_of(checkpoint, skeleton) for matrix in layer}
    assert len(wanted) > 10
    assert {name for name, info in checkpoint.tensors.items() if is_linear(name, info)} == wanted


def test_a_model_of_eight_bit_rows(tmp_path):
    account = account_of(open_path(with_bitsandbytes(tmp_path, bnb.INT8)))
    assert {row.words for row in account.rows} == {"int8, rows of bitsandbytes"}
    assert account.quantized == account.linear == sum(row.parameters for row in account.rows)
