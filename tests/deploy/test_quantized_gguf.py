"""Quantized GGUF files: every block is where and what it was meant to be, and llama.cpp computes with it.

The file is read by the gguf library; what llama.cpp computes is compared with torch on the values of the blocks. ggml
rounds the inputs of quantized products to eight bits; with a reference that does the same, what is left is the
float32 figure, or that of single inputs rounded the other way.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cli"))
from commands import run
from deploy_models import (
    VOCABULARY,
    config_of,
    ids,
    logits,
    randomise,
    stock_folder,
    with_tokenizer,
    write,
)

from surgeon import api
from surgeon.checkpoint import tensor_file
from surgeon.checkpoint.checkpoint import open_path
from surgeon.deploy import export_gguf, ggml_activations, gguf, gguf_choice, gguf_layout, gguf_rows
from surgeon.deploy.build import build, load
from surgeon.deploy.gguf_tokenizer import read_tokenizer
from surgeon.deploy.llama_cpp import LlamaCpp
from surgeon.derive import Source
from surgeon.errors import EnvironmentFault, InputError, OutputConflict, UsageError
from surgeon.formats import gguf_blocks
from surgeon.formats.compressed_runtimes import Reader
from surgeon.formats.scheme import Scheme
from surgeon.quantize import rtn
from surgeon.quantize.forms.gguf import FORM

reader = pytest.importorskip("gguf")
needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed"
)

LINEAR = re.compile(r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|w1|w2|w3)\.weight")
MOE = {"mixtral": "MixtralForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}
SCHEMES = {"Q4_0": Scheme("int", 4, 32), "Q4_1": Scheme("int", 4, 32, False), "Q5_0": Scheme("int", 5, 32), "Q5_1": Scheme("int", 5, 32, False),
           "Q8_0": Scheme("int", 8, 32), "MXFP4": Scheme("mxfp4", 4, 0)}  # fmt: skip
FLIPS = 0.02
"""Relative difference of logits that inputs rounded the other way may make: mostly .002 to .006, .013 at most; 5e-7 without any.
With a reference that does not round them it is .02 to .3, with a tensor in the wrong place about 1."""


def moe_folder(family: str, folder: Path, **extra) -> Path:
    """Write a random mixture of 6 experts, 2 a token, each by itself as on the hub."""
    config = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 16, "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False, "num_experts_per_tok": 2, "model_type": family,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "architectures": [MOE[family]],
        **({"num_local_experts": 6, "sliding_window": None} if family == "mixtral" else
           {"num_experts": 6, "moe_intermediate_size": 64, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}),
        **extra,
    }  # fmt: skip
    kind = getattr(transformers, MOE[family])
    randomise(kind(kind.config_class.from_dict(dict(config)))).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    return with_tokenizer(folder)


def varied_folder(family: str, folder: Path) -> Path:
    """Write a model whose layers differ in heads and width."""
    shapes = ((8, 4, 256), (4, 2, 96), (4, 4, 160), (2, 1, 64))
    config = config_of(family, num_hidden_layers=len(shapes))
    config["block_configs"] = [
        {
            "attention": {"no_op": False, "num_attention_heads": q, "num_key_value_heads": k},
            "ffn": {"no_op": False, "intermediate_size": f},
        }
        for q, k, f in shapes
    ]
    randomise(build(config, dtype=torch.float32)).save_pretrained(folder)
    return with_tokenizer(folder)


def folder_of(family: str, folder: Path) -> Path:
    if family in MOE:
        return moe_folder(family, folder)
    if family.startswith("varied "):
        return varied_folder(family.removeprefix("varied "), folder)
    return stock_folder(family, folder, num_hidden_layers=2)


def matrices(checkpoint) -> list[str]:
    return [name for name in checkpoint.tensors if LINEAR.fullmatch(name)]


def weight(checkpoint, name: str) -> np.ndarray:
    info = checkpoint.tensors[name]
    return np.array(checkpoint.read(name, 0, info.elements)).reshape(info.shape)


def quantized_files(checkpoint, schemes: dict[str, Scheme], folder: Path) -> tuple[list[Path], dict[str, np.ndarray]]:  # fmt: skip
    """Round a model with the form, a file a layer as quantizing writes them; return the files and the codes' values."""
    form, values, layers = FORM(Reader(), checkpoint.config["model_type"]), {}, {}
    for name, scheme in schemes.items():
        if scheme.kind == "int":
            codes = rtn.quantize(
                torch.from_numpy(weight(checkpoint, name)), scheme, scale_dtype=form.scale_dtype
            )
            parts, values[name] = form.pack(name, codes), codes.values()
        else:
            parts, values[name] = form.encode(name, weight(checkpoint, name), scheme)
        layers.setdefault(re.search(r"layers\.(\d+)", name)[1], {}).update(parts)
    files = []
    for number, parts in layers.items():
        files.append(folder / f"layer-{number}.safetensors")
        tensor_file.write(files[-1], parts, {"key": number})
    return files, values


def rows_in(files: list[Path]) -> dict[str, gguf_rows.Rows]:
    return {name: rows for file in files for name, rows in gguf_rows.stored(open_path(file)).items()}


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted - wanted.mean(-1, keepdims=True)))


def torch_logprobs(model) -> np.ndarray:
    return torch.log_softmax(logits(model, ids(3, 40))[:, -1].double(), -1).numpy()


def llama_logprobs(file: Path) -> np.ndarray:
    with LlamaCpp(file) as runtime:
        return np.array([runtime.logprobs(prompt.tolist(), VOCABULARY, sampled=24) for prompt in ids(3, 40)])


def contents(file: Path):
    found = reader.GGUFReader(file)
    return found, {tensor.name: tensor for tensor in found.tensors}


# ---- what llama.cpp computes ------------------------------------------------------------------------


@needs_llama_cpp
@pytest.mark.parametrize("family", MOE)
def test_plain_experts_compute_the_same(family, scratch):
    folder = moe_folder(family, scratch / "model")
    written = gguf.write(open_path(folder), scratch / "m.gguf", dtype="float32")
    assert written.architecture == {"mixtral": "llama", "qwen3_moe": "qwen3moe"}[family]
    wanted = torch_logprobs(load(folder))
    assert np.abs(llama_logprobs(written.path) - wanted).max() < 2e-5


FAST = [("llama", "Q8_0"), ("llama", "Q4_0"), ("qwen3_moe", "Q4_0")]
SLOW = [
    *((family, kind) for family in ("llama", "mixtral", "qwen3_moe") for kind in SCHEMES if (family, kind) not in FAST),
    *((family, kind) for family in ("qwen2", "qwen3", "mistral", "varied llama", "varied qwen2", "varied qwen3") for kind in ("Q8_0", "Q4_0", "Q5_1")),
]  # fmt: skip


@needs_llama_cpp
@pytest.mark.parametrize(
    ("family", "kind"), [*FAST, *(pytest.param(*one, marks=pytest.mark.slow) for one in SLOW)]
)
def test_llama_cpp_computes_with_our_codes(family, kind, scratch):
    folder = folder_of(family, scratch / "model")
    checkpoint = open_path(folder)
    schemes = dict.fromkeys(matrices(checkpoint), SCHEMES[kind])
    files, _ = quantized_files(checkpoint, schemes, scratch)
    rows = rows_in(files)
    assert rows.keys() == schemes.keys()
    written = gguf.write(checkpoint, scratch / "m.gguf", dtype="float32", quantized=rows)
    found = llama_logprobs(written.path)
    original = torch_logprobs(load(folder))
    if kind != "Q8_0":
        assert relative(found, original) > 0.04, "four bits matter in these models"
    elif family not in MOE:  # routers go over to other experts
        assert relative(found, original) < 0.06
    model = load(write(gguf_rows.Dequantized(checkpoint, rows), scratch / "reference"))
    with ggml_activations.Rounding(model, rows):
        wanted = torch_logprobs(model)
    assert relative(found, wanted) < FLIPS


@needs_llama_cpp
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
def test_scales_below_the_normal_numbers_of_float16_count(kind, scratch):
    """Up projections a thousand times smaller, down projections a thousand times larger: the same model."""
    folder = stock_folder("llama", scratch / "model", num_hidden_layers=1)
    state = load_file(folder / "model.safetensors")
    for name, factor in (("up", 1e-3), ("down", 1e3)):
        state[f"model.layers.0.mlp.{name}_proj.weight"] *= factor
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    checkpoint = open_path(folder)
    files, values = quantized_files(checkpoint, dict.fromkeys(matrices(checkpoint), SCHEMES[kind]), scratch)
    rows = rows_in(files)
    small = "model.layers.0.mlp.up_proj.weight"
    scales = rows[small].read(0, 96).reshape(96, 2, -1)[..., :2].copy().view(np.float16)
    assert (np.abs(scales) < np.finfo(np.float16).tiny).any() and relative(
        values[small], weight(checkpoint, small)
    ) < 0.1
    written = gguf.write(checkpoint, scratch / "m.gguf", dtype="float32", quantized=rows)
    model = load(write(gguf_rows.Dequantized(checkpoint, rows), scratch / "reference"))
    with ggml_activations.Rounding(model, rows):
        wanted = torch_logprobs(model)
    assert relative(llama_logprobs(written.path), wanted) < FLIPS


@needs_llama_cpp
def test_gate_and_up_of_different_types(scratch):
    """Both lie in one parameter of the reference, and the two round their inputs in different ways."""
    folder = moe_folder("qwen3_moe", scratch / "model", hidden_size=256)
    checkpoint = open_path(folder)
    types = {name: "Q4_K" if "up_proj" in name else "Q4_1" for name in matrices(checkpoint)}
    types = {name: kind for name, kind in types.items() if "down_proj" not in name and "o_proj" not in name}
    rows = gguf_rows.rounded(checkpoint, types)
    written = gguf.write(checkpoint, scratch / "m.gguf", dtype="float32", quantized=rows)
    model = load(write(gguf_rows.Dequantized(checkpoint, rows), scratch / "reference"))
    with ggml_activations.Rounding(model, rows):
        wanted = torch_logprobs(model)
    assert relative(llama_logprobs(written.path), wanted) < FLIPS


def test_inputs_are_rounded_as_ggml_rounds_them():
    """Against the functions of the library itself, bit for bit."""
    pytest.importorskip("xllamacpp")
    library = gguf_blocks._ggml()
    values = torch.randn(20, 512) * torch.exp(torch.randn(20, 1) * 3)
    values[3, 64:96], values[4, :256] = 0, 0
    flat = values.numpy()

    def ggml(function: str, block: int, size: int) -> np.ndarray:
        out = np.zeros((flat.size // block, size), np.uint8)
        call = getattr(library, function)
        call.argtypes, call.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64], None
        call(flat.ctypes.data, out.ctypes.data, flat.size)
        return out

    eight = ggml("quantize_row_q8_0_ref", 32, 34)
    wanted = reader.quants.dequantize(eight, reader.GGMLQuantizationType.Q8_0).reshape(flat.shape)
    assert np.array_equal(ggml_activations.round_q8_0(values).numpy(), wanted)
    sums = ggml("quantize_row_q8_1_ref", 32, 36)
    scale, total = sums[:, :4].copy().view(np.float16).astype(np.float32).T
    off = total - scale * sums[:, 4:].view(np.int8).sum(1)
    assert np.allclose(ggml_activations.error_of_sums(values).numpy().reshape(-1), off, atol=1e-6, rtol=1e-5)
    long = ggml("quantize_row_q8_K_ref", 256, 292)
    wanted = long[:, :4].copy().view(np.float32) * long[:, 4:260].view(np.int8)
    found = ggml_activations.round_q8_k(values).numpy().reshape(wanted.shape)
    assert np.allclose(found, wanted, rtol=1e-6, atol=0)


# ---- what lies in the file ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("block", [1 << 22, 300])
def test_every_matrix_has_its_place(family, block, scratch, monkeypatch):
    """Read by the library; rows of queries and keys in plain Python."""
    monkeypatch.setattr(gguf, "BLOCK", block)  # less than a head: pieces still hold whole heads
    checkpoint = open_path(folder_of(family, scratch / "model"))
    kinds = ["Q4_0", "Q5_0", "Q8_0"]
    names = {
        "q_proj": 0,
        "k_proj": 1,
        "v_proj": 2,
        "o_proj": 0,
        "gate_proj": 1,
        "up_proj": 2,
        "down_proj": 0,
        "w1": 0,
        "w3": 1,
        "w2": 2,
    }
    schemes = {name: SCHEMES[kinds[names[name.split(".")[-2]]]] for name in matrices(checkpoint)}
    files, values = quantized_files(checkpoint, schemes, scratch)
    written = gguf.write(
        checkpoint, scratch / "m.gguf", dtype="bfloat16", quantized=rows_in(files), verb="quantize"
    )
    found, tensors = contents(written.path)

    def held(name: str) -> np.ndarray:
        return reader.quants.dequantize(tensors[name].data, tensors[name].tensor_type)

    def turned(matrix: np.ndarray) -> np.ndarray:
        """The first half of a head's rows go to even places, the second half to odd ones."""
        rows = []
        for head in range(len(matrix) // 16):
            for pair in range(8):
                rows += [matrix[16 * head + pair], matrix[16 * head + 8 + pair]]
        return np.array(rows)

    for layer in range(2):
        place = f"model.layers.{layer}."
        for part in "qkv":
            wanted = values[f"{place}self_attn.{part}_proj.weight"]
            wanted = wanted if part == "v" else turned(wanted)
            assert np.array_equal(held(f"blk.{layer}.attn_{part}.weight"), wanted)
        if family == "llama":
            assert np.array_equal(
                held(f"blk.{layer}.ffn_down.weight"), values[f"{place}mlp.down_proj.weight"]
            )
            continue
        for part, own in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
            stack = np.stack([values[f"{place}block_sparse_moe.experts.{e}.{own}.weight"] for e in range(6)])
            assert np.array_equal(held(f"blk.{layer}.ffn_{part}_exps.weight"), stack)
        router = tensors[f"blk.{layer}.ffn_gate_inp.weight"]
        assert int(router.tensor_type) == 0
        assert np.array_equal(router.data, weight(checkpoint, f"{place}block_sparse_moe.gate.weight"))
    assert (
        tensors["token_embd.weight"].tensor_type.name == tensors["output.weight"].tensor_type.name == "BF16"
    )
    assert found.fields["general.quantization_version"].contents() == 2
    most = {"llama": "MOSTLY_Q4_0", "mixtral": None}[family]
    if most:
        assert reader.LlamaFileType(found.fields["general.file_type"].contents()).name == most
    manifest = json.loads((scratch / "m.gguf.surgeon.json").read_text())
    assert manifest["verb"] == "quantize" and sum(manifest["types"].values()) == len(tensors)
    assert manifest["types"]["BF16"] == 2


def test_keys_of_experts(scratch):
    found, _ = contents(
        gguf.write(
            open_path(moe_folder("qwen3_moe", scratch / "m")), scratch / "m.gguf", dtype="float16"
        ).path
    )
    said = {key: found.fields[f"qwen3moe.{key}"].contents() for key in ("expert_count", "expert_used_count", "expert_feed_forward_length")}  # fmt: skip
    assert said == {"expert_count": 6, "expert_used_count": 2, "expert_feed_forward_length": 64}


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_sizes_are_known_to_the_byte_beforehand(family, scratch):
    folder = folder_of(family, scratch / "model")
    checkpoint = open_path(folder)
    layout = gguf_layout.plan(checkpoint)
    sizes = gguf.Sizes(layout, read_tokenizer(folder, VOCABULARY), "bfloat16", "a name")
    for number, kinds in enumerate(
        [{}, {"up_proj": "Q4_0"}, {"up_proj": "Q4_1", "down_proj": "Q8_0", "k_proj": "Q5_0"}]
    ):
        types = {name: kinds[part] for name in matrices(checkpoint) if (part := name.split(".")[-2]) in kinds}
        file = scratch / f"{number}.gguf"
        gguf.write(
            checkpoint, file, dtype="bfloat16", name="a name", quantized=gguf_rows.rounded(checkpoint, types)
        )
        assert sizes.of(types) == file.stat().st_size
    source = Source("model", checkpoint, str(folder))
    again = export_gguf.sizes(source, checkpoint, dtype="bfloat16", name="a name")
    assert again.of(types) == file.stat().st_size


def test_the_reference_is_the_blocks_values(scratch):
    checkpoint = open_path(stock_folder("llama", scratch / "model", num_hidden_layers=1))
    files, values = quantized_files(checkpoint, dict.fromkeys(matrices(checkpoint), SCHEMES["Q4_0"]), scratch)
    view = gguf_rows.Dequantized(checkpoint, rows_in(files))
    for name, wanted in values.items():
        assert view.computed(name) and view.tensors[name].dtype == "F32"
        assert np.array_equal(weight(view, name), wanted)
        assert np.array_equal(view.read(name, 37, 231), wanted.reshape(-1)[37:231])
    norm = "model.layers.0.input_layernorm.weight"
    assert np.array_equal(weight(view, norm), weight(checkpoint, norm)) and not view.computed(norm)
    other = gguf_rows.Dequantized(checkpoint, gguf_rows.rounded(checkpoint, dict.fromkeys(values, "Q4_0")))
    assert len({view.identity, other.identity}) == 2


# ---- refusals -----------------------------------------------------------------------------------------


def test_experts_of_one_tensor_share_a_type(scratch):
    checkpoint = open_path(moe_folder("mixtral", scratch / "model"))
    types = dict.fromkeys(matrices(checkpoint), "Q4_0")
    types["model.layers.1.block_sparse_moe.experts.3.w2.weight"] = "Q8_0"
    with pytest.raises(InputError, match=r"experts.*Q8_0.*ffn_down_exps") as refused:
        gguf.write(checkpoint, scratch / "m.gguf", quantized=gguf_rows.rounded(checkpoint, types))
    assert refused.value.code == "E467" and {p.name for p in scratch.iterdir()} == {"model"}


def test_what_is_no_matrix_of_the_graph_is_refused(scratch):
    checkpoint = open_path(moe_folder("mixtral", scratch / "model"))
    for name in ("model.layers.0.block_sparse_moe.gate.weight", "model.norm.weight"):
        with pytest.raises(InputError, match="no matrix") as refused:
            gguf.write(
                checkpoint, scratch / "m.gguf", quantized=gguf_rows.rounded(checkpoint, {name: "Q4_0"})
            )
        assert refused.value.code == "E466"


@pytest.mark.parametrize(
    ("extra", "word"),
    [({"norm_topk_prob": False}, "sum to one"), ({"mlp_only_layers": [0]}, "no experts"), ({"attention_bias": True}, "biases")],
)  # fmt: skip
def test_experts_that_llama_cpp_routes_otherwise_are_refused(extra, word):
    config = {"model_type": "qwen3_moe", "norm_topk_prob": True, "hidden_act": "silu", **extra}
    arch, reason = gguf_layout.architecture(config)
    assert arch is None and word in reason


def test_stacked_experts_are_refused_by_name(scratch):
    folder = moe_folder("qwen3_moe", scratch / "model")
    state = load_file(folder / "model.safetensors")
    state = {name: value for name, value in state.items() if ".experts." not in name}
    save_file({**state, "model.layers.0.mlp.experts.gate_up_proj": torch.zeros(6, 128, 64)}, folder / "model.safetensors", {"format": "pt"})  # fmt: skip
    with pytest.raises(InputError, match="gate_up_proj") as refused:
        gguf.write(open_path(folder), scratch / "m.gguf")
    assert refused.value.code == "E328"


# ---- surgeon export --gguf-type ------------------------------------------------------------------------


@needs_llama_cpp
def test_export_rounds_and_compares(scratch, capsys):
    folder = stock_folder("llama", scratch / "model", num_hidden_layers=2, hidden_size=256)
    options = {"to": "gguf", "gguf_type": "q4_k", "gguf_override": ("re:.*down_proj.weight=q8_0", "lm_head.weight=q6_k", "*q_proj.weight=keep", "re:.*o_proj.weight=q5_1")}  # fmt: skip
    planned = api.export(folder, dry_run=True, **options)
    made = api.export(folder, **options)
    file = scratch / "model-Q4_K.gguf"
    assert Path(made["output"]["path"]) == file
    assert planned["output"]["bytes"] == made["output"]["bytes"] == file.stat().st_size
    assert made["check"]["texts"] == 50 and made["check"]["kl"] < 2e-3
    _, tensors = contents(file)
    said = {name: tensor.tensor_type.name for name, tensor in tensors.items() if len(tensor.shape) > 1}
    assert {name.split(".", 2)[-1]: kind for name, kind in said.items()} == {
        "weight": "Q6_K", "attn_q.weight": "F32", "attn_k.weight": "Q4_K", "attn_v.weight": "Q4_K", "attn_output.weight": "Q5_1",
        "ffn_gate.weight": "Q4_K", "ffn_up.weight": "Q4_K", "ffn_down.weight": "Q8_0",
    } | {"weight": said["output.weight"]}  # fmt: skip
    assert said["output.weight"] == "Q6_K" and said["token_embd.weight"] == "F32"
    assert made["types"] == {"F32": 8, "Q4_K": 8, "Q5_1": 2, "Q6_K": 1, "Q8_0": 2}
    assert api.export(folder, **options)["output"]["unchanged"]
    with pytest.raises(OutputConflict, match="E601"):
        api.export(folder, file, to="gguf", gguf_type="q8_0")
    ran = run(capsys, "export", folder, "--to", "gguf", "--gguf-type", "Q8_0", "--gguf-override", "lm_head.weight=q8_0", "--no-progress")  # fmt: skip
    assert ran.code == 0 and "15 Q8_0" in ran.out and "model-Q8_0.gguf" in ran.out


@needs_llama_cpp
@pytest.mark.parametrize(
    ("family", "kind"), [("mixtral", "q5_1"), pytest.param("varied qwen2", "q4_0", marks=pytest.mark.slow)]
)
def test_the_reference_is_written_for_every_kind_of_model(family, kind, scratch):
    folder = folder_of(family, scratch / "model")
    made = api.export(folder, scratch / "x.gguf", to="gguf", gguf_type=kind, dtype="float16")
    assert made["check"]["texts"] == 50 and made["check"]["kl"] < 2e-3
    assert made["types"][kind.upper()] == {"mixtral": 14, "varied qwen2": 28}[family]
    assert {p.name for p in scratch.iterdir()} == {"model", "x.gguf", "x.gguf.surgeon.json"}


@needs_llama_cpp
def test_a_quantized_file_that_computes_otherwise_never_arrives(scratch, monkeypatch):
    folder = stock_folder("llama", scratch / "model", num_hidden_layers=2)
    monkeypatch.setattr(gguf, "_turned", lambda rows, piece: rows)
    with pytest.raises(InputError, match="other probabilities") as refused:
        api.export(folder, scratch / "x.gguf", to="gguf", gguf_type="q8_0")
    assert refused.value.code == "E328" and {p.name for p in scratch.iterdir()} == {"model"}


def test_no_other_type_is_taken_in_silence(scratch):
    folder = stock_folder("llama", scratch / "model", num_hidden_layers=1, intermediate_size=100)
    with pytest.raises(InputError, match="divide its 100 inputs") as refused:
        api.export(folder, to="gguf", gguf_type="q8_0")
    assert refused.value.code == "E466" and "re:.*down_proj.weight=keep" in (refused.value.help or "")
    with pytest.raises(InputError, match="256 do not divide its 64 inputs; so it is with") as refused:
        api.export(folder, to="gguf", gguf_type="q6_k")
    assert "=q8_0" in (refused.value.help or "")
    assert {p.name for p in scratch.iterdir()} == {"model"}
    made = api.export(folder, to="gguf", gguf_type="q8_0", gguf_override=("re:.*down_proj.weight=keep",), check=False)  # fmt: skip
    assert made["types"]["Q8_0"] == 6


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"to": "gguf", "gguf_type": "q4"}, "q4_"),
        ({"to": "gguf", "gguf_type": "f16"}, "q8_0"),
        ({"to": "gguf", "gguf_override": ("lm_head.weight",)}, "PATTERN=TYPE"),
        ({"to": "gguf", "gguf_override": ("lm_head.weight=q9_0",)}, "q8_0"),
        ({"gguf_type": "q8_0"}, "--to gguf"),
        ({"to": "gguf", "gguf_type": "q8_0", "gguf_override": ("nothing=q8_0",)}, "matches no tensor"),
    ],
)
def test_types_that_do_not_exist(options, word, scratch):
    folder = stock_folder("llama", scratch / "model", num_hidden_layers=1)
    with pytest.raises(UsageError) as refused:
        api.export(folder, **options)
    assert word in f"{refused.value.message} {refused.value.help}"


def test_the_help_names_every_type(capsys):
    words = run(capsys, "export", "--help").out
    said = set(re.findall(r"\b(?:i?q\d_\w+|iq\d_\w+|mxfp4)\b", words))
    assert said == {kind.lower() for kind in gguf_blocks.QUANTIZED}


def test_types_of_ggml_alone_without_the_library(scratch, monkeypatch):
    checkpoint = open_path(stock_folder("llama", scratch / "model", num_hidden_layers=1, hidden_size=256, intermediate_size=256))  # fmt: skip
    monkeypatch.setattr(gguf_blocks, "can_quantize", lambda kind: kind != "Q4_K")
    layout = gguf_layout.plan(checkpoint)
    with pytest.raises(EnvironmentFault, match="Q4_K") as refused:
        gguf_choice.chosen(checkpoint, layout, "q4_k", ("re:.*o_proj.weight=keep",))
    assert refused.value.code == "E512" and "pip install" in (refused.value.help or "")
