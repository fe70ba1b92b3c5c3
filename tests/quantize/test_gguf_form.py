"""GGUF as a form of quantized models: sizes, ties, refusals, and the way from codes to a file that llama.cpp agrees with."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "deploy"))
from deploy_models import stock_folder

from surgeon.checkpoint import tensor_file
from surgeon.checkpoint.checkpoint import open_path
from surgeon.deploy import export_gguf, gguf_rows
from surgeon.derive import Source
from surgeon.errors import InputError, OutputConflict
from surgeon.formats.compressed_runtimes import Reader
from surgeon.formats.scheme import Scheme
from surgeon.quantize import forms, gptq
from surgeon.quantize.view import QuantizedView

library = pytest.importorskip("gguf")

INT4, INT5, INT8 = (Scheme("int", bits, 32) for bits in (4, 5, 8))
MXFP4 = Scheme("mxfp4", 4, 0)
LAYER = "model.layers.0."


def form(model_type: str | None = "llama"):
    return forms.get("gguf", Reader(), model_type)


def experts(count: int = 3, columns: int = 64) -> dict[str, tuple[int, int]]:
    parts = ("gate_proj", "up_proj", "down_proj")
    return {f"{LAYER}mlp.experts.{e}.{part}.weight": (96, columns) for e in range(count) for part in parts}


@pytest.mark.parametrize(
    "scheme", [INT4, Scheme("int", 4, 32, False), INT5, Scheme("int", 5, 32, False), INT8, MXFP4]
)
def test_what_is_stored_is_what_was_laid_out(scheme):
    weight = torch.randn(24, 128)
    name = f"{LAYER}mlp.up_proj.weight"
    ((place, code, shape),) = form().layout(name, (24, 128), scheme)
    if scheme.kind == "int":
        hessian = (lambda x: x.T @ x)(torch.randn(400, 128))
        codes, _ = gptq.quantize(weight, hessian, scheme, scale_dtype=form().scale_dtype)
        parts, values = form().pack(name, codes), codes.values()
    else:
        parts, values = form().encode(name, weight.numpy(), scheme)
    assert parts.keys() == {place} and parts[place][0] == code == "U8" and parts[place][1].shape == shape
    assert code == "U8" and place.startswith(f"{name}.")
    kind = library.GGMLQuantizationType[place.rpartition(".")[2]]
    stored = library.quants.dequantize(parts[place][1], kind)
    bound = 0 if scheme.symmetric else np.repeat(codes.scales, 32, 1) * (2**scheme.bits - 1) / 2**11
    assert (np.abs(stored - values) <= bound).all()


def test_experts_of_a_layer_and_kind_are_chosen_together():
    shapes = {
        f"{LAYER}self_attn.q_proj.weight": (64, 64),
        f"{LAYER}self_attn.k_proj.weight": (32, 64),
        **experts(),
    }
    (choices,) = form("qwen3_moe").choices(
        shapes, [INT4, INT8, Scheme("int", 4, 128), Scheme("int", 8, 32, False), None]
    )
    assert all(choice.schemes == (INT4, INT8, None) for choice in choices)
    assert [choice.names for choice in choices[:2]] == [(name,) for name in list(shapes)[:2]]
    assert [choice.names for choice in choices[2:]] == [
        tuple(f"{LAYER}mlp.experts.{e}.{part}.weight" for e in range(3)) for part in ("gate_proj", "up_proj", "down_proj")
    ]  # fmt: skip
    assert sorted(name for choice in choices for name in choice.names) == sorted(shapes)


def test_queries_keys_and_values_of_openelm_are_one_tensor():
    names = {f"{LAYER}self_attn.{part}_proj.weight": (64, 64) for part in "qkvo"}
    assert len(form("qwen3").choices(names, [INT4])[0]) == 4
    tied = form("surgeon_qwen3").choices(names, [INT4])[0]
    assert [len(choice.names) for choice in tied] == [3, 1]


def test_rows_that_blocks_do_not_divide_have_no_scheme():
    shapes = {f"{LAYER}mlp.down_proj.weight": (64, 100), f"{LAYER}mlp.up_proj.weight": (100, 64)}
    (choices,) = form().choices(shapes, [INT4, INT8, None])
    assert [choice.schemes for choice in choices] == [(None,), (INT4, INT8, None)]
    (found,) = form().refusals({name: (shape, INT4) for name, shape in shapes.items()})
    assert found.code == "E466" and "down_proj" in found.message and "100 inputs" in found.message


def test_everything_against_an_assignment_is_said():
    mixed = {name: (shape, INT8 if ".1.up" in name else INT4) for name, shape in experts().items()}
    (found,) = form("mixtral").refusals(mixed)
    assert found.code == "E467" and "int4g32 and int8g32" in found.message
    (found,) = form("gemma2").refusals({f"{LAYER}mlp.up_proj.weight": ((64, 64), INT4)})
    assert found.code == "E468" and "gemma2" in found.message
    (found,) = form("qwen3_moe").refusals({f"{LAYER}mlp.gate.weight": ((8, 64), INT4)})
    assert found.code == "E466" and "router" in found.message
    (found,) = form("qwen3_moe").refusals({f"{LAYER}mlp.experts.gate_up_proj[3]": ((192, 64), INT4)})
    assert found.code == "E466" and "stack" in found.message
    (found,) = form().refusals({f"{LAYER}mlp.up_proj.weight": ((64, 64), Scheme("int", 4, 64))})
    assert found.code == "E466" and "32" in found.message
    fine = {
        "model.embed_tokens.weight": ((281, 64), INT8),
        "lm_head.weight": ((281, 64), INT8),
        f"{LAYER}mlp.up_proj.weight": ((64, 64), None),
    }
    assert form("surgeon_llama").refusals(fine) == []


@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed")
def test_from_codes_to_a_published_file(scratch):
    """As a quantizing run does it: codes of GPTQ in files of layers, a view, a file, the comparison."""
    checkpoint = open_path(stock_folder("llama", scratch / "model", num_hidden_layers=2))
    source, one = Source("model", checkpoint, str(scratch / "model")), form()
    schemes = {n: INT5 if "down" in n else INT4 for n in checkpoint.tensors if n.endswith("_proj.weight")}
    del schemes["model.layers.1.self_attn.v_proj.weight"]
    schemes["lm_head.weight"] = INT8
    parts = {}
    for name, scheme in schemes.items():
        info = checkpoint.tensors[name]
        weight = torch.from_numpy(np.array(checkpoint.read(name, 0, info.elements))).reshape(info.shape)
        inputs = torch.randn(600, info.shape[1])
        codes, _ = gptq.quantize(weight, inputs.T @ inputs, scheme, scale_dtype=one.scale_dtype)
        parts |= one.pack(name, codes)
    tensor_file.write(scratch / "all.safetensors", parts, {"key": "1"})
    view = QuantizedView(checkpoint, [scratch / "all.safetensors"], schemes, (), one)
    rows = gguf_rows.stored(view)
    assert {name: r.kind for name, r in rows.items()} == {
        name: {4: "Q4_0", 5: "Q5_0", 8: "Q8_0"}[s.bits] for name, s in schemes.items()
    }
    options = {"dtype": "bfloat16", "name": "model", "recipe": {"method": "gptq"}, "verb": "quantize"}
    where = scratch / "q.gguf"
    planned = export_gguf.write_gguf(source, checkpoint, where, quantized=rows, dry_run=True, **options)
    assert not where.exists()
    made = export_gguf.write_gguf(source, checkpoint, where, quantized=rows, **options)
    assert made["check"]["texts"] == 50 and made["check"]["kl"] < 2e-3
    size = export_gguf.sizes(source, checkpoint, dtype="bfloat16", name="model").of(
        {n: r.kind for n, r in rows.items()}
    )
    assert size == planned["output"]["bytes"] == made["output"]["bytes"] == where.stat().st_size
    assert made["types"] == {"BF16": 2, "F32": 5, "Q4_0": 11, "Q5_0": 2, "Q8_0": 1}
    # A finished result is known before any code is.
    digest = made["output"]["sha256"]["q.gguf"]
    same = {"dtype": "bfloat16", "recipe": {"method": "gptq"}}
    assert export_gguf.finished(source, checkpoint, where, **same) == digest
    assert export_gguf.finished(source, checkpoint, where, dtype="bfloat16", recipe={"method": "rtn"}) is None
    again = export_gguf.write_gguf(source, checkpoint, where, quantized=rows, **options)
    assert again["output"]["unchanged"]
    with pytest.raises(OutputConflict, match="E601"):
        export_gguf.write_gguf(source, checkpoint, where, quantized=rows, **{**options, "recipe": {}})
    # Blocks of another matrix are seen.
    rows["model.layers.0.mlp.up_proj.weight"] = rows["model.layers.1.mlp.gate_proj.weight"]
    honest = gguf_rows.Dequantized(checkpoint, gguf_rows.stored(view))
    from surgeon.deploy import gguf

    gguf.write(checkpoint, scratch / "wrong.gguf", dtype="bfloat16", quantized=rows)
    folder = export_gguf._reference(source, honest, scratch, "r", scratch / "model", 1, None, None)
    with pytest.raises(InputError, match="other probabilities"):
        export_gguf._checked(
            scratch / "wrong.gguf", folder, "bfloat16", gguf_rows.stored(view), scratch / "model"
        )
