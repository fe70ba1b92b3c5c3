"""What our writers and others store, read as plain numbers: against the library that reads it, and plain arithmetic."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent))
from compressed_models import dense_folder, encoded, int_, written
from quantized_folders import MIXTRAL, plain_folder, rounded, write_both
from test_dequantized import model_of, ranges_agree, same_bits, whole

from surgeon.checkpoint.checkpoint import open_path
from surgeon.errors import InputError
from surgeon.formats import auto_round
from surgeon.formats.compressed_groups import quantization_config
from surgeon.formats.declared import declarations
from surgeon.formats.declared_groups import CompressedTensors
from surgeon.formats.dequantized import dequantized, hub_names
from surgeon.formats.float4 import MXFP4, NVFP4
from surgeon.formats.float8_dynamic import FLOAT8
from surgeon.formats.scheme import Scheme
from surgeon.formats.storage import Said, Storage
from surgeon.traits import part_of

MODULE = "model.layers.0.mlp.up_proj"
SCHEMES = [
    *(int_(bits) for bits in range(2, 9)),
    *(int_(bits, 32) for bits in range(2, 9)),
    FLOAT8,
    NVFP4,
    MXFP4,
]


def drawn(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_t(4, shape).astype(np.float32)
    return torch.from_numpy(values).to(torch.bfloat16).float().numpy()


def decompressed(tensors: dict[str, torch.Tensor], config: dict, module: str) -> torch.Tensor:
    """Return a module's matrix as the compressed-tensors library gives it."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    (group,) = config["config_groups"].values()
    scheme = QuantizationScheme.model_validate(group)
    state = {name.removeprefix(f"{module}."): tensor for name, tensor in tensors.items()}
    return (
        BaseCompressor.get_value_from_registry(group["format"])
        .decompress(state, scheme)["weight"]
        .to(torch.bfloat16)
    )


# ---- what our writers store ----------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_every_scheme_is_read_as_the_library_reads_it(scheme, tmp_path):
    """Bit for bit; 40 rows and 96 inputs make words that codes of odd widths reach across."""
    weight = drawn((40, 96), scheme.bits)
    tensors, values = encoded(f"{MODULE}.weight", weight, scheme, "BF16")
    config = quantization_config({MODULE: scheme})
    view = dequantized(model_of(tmp_path, tensors, config))
    found = whole(view, f"{MODULE}.weight")
    same_bits(found, decompressed(tensors, config, MODULE))
    same_bits(found, torch.from_numpy(values).to(torch.bfloat16))
    assert (found.float() - torch.from_numpy(weight)).norm() / np.linalg.norm(weight) < 2.0 ** -(
        scheme.bits - 3
    )
    ranges_agree(view, f"{MODULE}.weight")
    stored = view.matrices[f"{MODULE}.weight"]
    assert stored.scheme == scheme and stored.words.startswith(scheme.name)


@pytest.mark.parametrize("scale", ["U8", "F8_E4M3"])
def test_all_codes_and_scales_of_four_bit_floats(scale, tmp_path):
    """Every byte of codes with every scale that overflows nowhere, against the formulas in plain Python."""
    size, numbers = (16, 127) if scale == "F8_E4M3" else (32, 252)
    table = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    scales = torch.arange(numbers, dtype=torch.uint8).reshape(-1, 1)
    payload = (
        torch.arange(numbers * size // 2, dtype=torch.int64)
        .remainder(256)
        .to(torch.uint8)
        .reshape(numbers, -1)
    )
    tensors = {f"{MODULE}.weight_packed": payload, f"{MODULE}.weight_scale": scales}
    shared, scheme = 3.25, MXFP4
    if scale == "F8_E4M3":
        tensors[f"{MODULE}.weight_scale"] = scales.view(torch.float8_e4m3fn)
        tensors[f"{MODULE}.weight_global_scale"] = torch.tensor([shared])
        scheme = NVFP4
    config = quantization_config({MODULE: scheme})
    found = whole(dequantized(model_of(tmp_path, tensors, config)), f"{MODULE}.weight").double()
    for row in range(numbers):
        if scheme == NVFP4:
            step = float(np.float32(float(scales[row].view(torch.float8_e4m3fn))) / np.float32(shared))
        else:
            step = 2.0 ** (row - 127)
        for column in range(size):
            byte = int(payload[row, column // 2])
            code = byte >> 4 if column % 2 else byte & 15
            exact = table[code & 7] * (-1 if code & 8 else 1) * step
            want = torch.tensor(np.float32(exact)).to(torch.bfloat16).double()
            assert found[row, column] == want, (row, column)


def test_a_model_of_many_schemes(tmp_path):
    """Names, patterns and classes at once; every matrix is the one that was written."""
    chosen = {
        "q_proj": int_(3, 32), "k_proj": int_(8), "v_proj": FLOAT8, "o_proj": MXFP4, "gate_proj": int_(5, 16),
        "up_proj": NVFP4, "down_proj": int_(6), "lm_head": None,
    }  # fmt: skip
    pair = written(tmp_path, dense_folder(tmp_path / "source"), lambda name: chosen[name.rpartition(".")[2]])
    view = dequantized(open_path(pair.packed))
    plain = load_file(pair.plain / "model.safetensors")
    assert set(view.tensors) == set(plain)
    for name, tensor in plain.items():
        same_bits(whole(view, name), tensor)
    for name, stored in view.matrices.items():
        assert stored.scheme == pair.matrices[name][1]
    assert "quantization_config" not in (view.config or {})
    assert view.formats == {
        "fp8": 2,
        "compressed-tensors four-bit floats": 4,
        "compressed-tensors integers": 8,
    }


def test_sizes_that_leave_a_choice_are_settled_by_the_module(tmp_path):
    """Eight inputs of 3 or 4 bits fill one word either way: only config.json knows which it is."""
    tensors, plain, modules = {}, {}, {}
    for part, bits in (("up_proj", 3), ("gate_proj", 4)):
        module = f"model.layers.0.mlp.{part}"
        parts, values = encoded(f"{module}.weight", drawn((8, 8), bits), int_(bits), "BF16")
        tensors |= parts
        plain[module] = values
        modules[module] = int_(bits)
    assert len({t.shape for n, t in tensors.items() if n.endswith("_packed")}) == 1
    view = dequantized(model_of(tmp_path, tensors, quantization_config(modules)))
    for module, values in plain.items():
        same_bits(whole(view, f"{module}.weight"), torch.from_numpy(values).to(torch.bfloat16))


@pytest.mark.parametrize("version", ["0.19.9", "0.9", "", None])
def test_older_dense_packing_is_refused(version, tmp_path):
    tensors, _ = encoded(f"{MODULE}.weight", drawn((8, 64)), int_(3), "BF16")
    config = quantization_config({MODULE: int_(3)}) | {"version": version}
    with pytest.raises(InputError, match=r"before 0\.20") as caught:
        dequantized(model_of(tmp_path / "three", tensors, config))
    assert caught.value.code == "E445"
    tensors, _ = encoded(f"{MODULE}.weight", drawn((8, 64)), int_(4), "BF16")
    four = quantization_config({MODULE: int_(4)}) | {"version": version}
    assert dequantized(model_of(tmp_path / "four", tensors, four)).formats  # packed alike in all versions


def test_declared_bits_that_are_not_stored(tmp_path):
    tensors, _ = encoded(f"{MODULE}.weight", drawn((8, 64)), int_(2), "BF16")
    with pytest.raises(InputError, match="does not fit") as caught:
        dequantized(model_of(tmp_path, tensors, quantization_config({MODULE: int_(4)})))
    assert caught.value.code == "E446"


def test_integers_with_one_scale_a_matrix(tmp_path):
    """int-quantized per tensor, as published W8A8 models are: code times scale."""
    codes = torch.randint(-128, 128, (24, 40), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    scale = torch.tensor([0.0123], dtype=torch.bfloat16)
    weights = {"num_bits": 8, "type": "int", "strategy": "tensor", "symmetric": True}
    config = {
        "quant_method": "compressed-tensors", "format": "int-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "format": "int-quantized"}},
    }  # fmt: skip
    tensors = {f"{MODULE}.weight": codes, f"{MODULE}.weight_scale": scale}
    view = dequantized(model_of(tmp_path, tensors, config))
    same_bits(whole(view, f"{MODULE}.weight"), codes.to(torch.bfloat16) * scale)
    same_bits(whole(view, f"{MODULE}.weight"), decompressed(tensors, config, MODULE))


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        (lambda t: t.pop(f"{MODULE}.weight_scale"), "E446", "without"),
        (lambda t: t.pop(f"{MODULE}.weight_global_scale"), "E446", "without"),
        (lambda t: t.update({f"{MODULE}.weight_scale": torch.zeros(8, 4, dtype=torch.bfloat16)}), "E446", "does not fit"),
        (lambda t: t.update({f"{MODULE}.weight_scale": torch.zeros(8, 3).to(torch.float8_e4m3fn)}), "E446", "does not fit"),
        (lambda t: t.update({f"{MODULE}.weight_global_scale": torch.ones(2)}), "E446", "does not fit"),
        (lambda t: t.update({f"{MODULE}.weight_zero_point": torch.zeros(8, 4)}), "E445", "zero points"),
        (lambda t: t.update({f"{MODULE}.weight_packed": torch.zeros(8, 48, dtype=torch.uint8), f"{MODULE}.weight_scale": torch.zeros(8, 2, dtype=torch.uint8)}), "E445", "six bits"),
    ],
)  # fmt: skip
def test_damaged_four_bit_floats(change, code, says, tmp_path):
    tensors, _ = encoded(f"{MODULE}.weight", drawn((8, 64)), NVFP4, "BF16")
    change(tensors)
    with pytest.raises(InputError) as caught:
        dequantized(model_of(tmp_path, tensors, quantization_config({MODULE: NVFP4})))
    assert caught.value.code == code and says in caught.value.message


# ---- targets --------------------------------------------------------------------------------------------


def group(targets: list[str], bits: int) -> dict:
    return {"targets": targets, "weights": {"num_bits": bits, "type": "int", "strategy": "channel"}}


def test_targets_are_matched_as_the_library_matches_them():
    """Exact name, then the pattern that sorts first, then the class; ignored names, patterns and classes."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.lifecycle.apply import apply_quantization_config

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"):
                setattr(self, name, torch.nn.Linear(32, 32, bias=False))

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self_attn, self.mlp = Block(), Block()

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList([Layer(), Layer()])
            self.lm_head = torch.nn.Linear(32, 32, bias=False)

    config = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": {
            "group_000": group(["Linear"], 4),
            "group_001": group([r"re:.*\.mlp\.up.*", r"re:layers\.1\.self_attn"], 8),
            "group_002": group(["layers.0.mlp.up_proj", "layers.1.self_attn.q_proj"], 2),
            "group_003": group([r"re:.*k_proj$", r"re:layers\.\d+\.mlp\.(up|gate)"], 3),
        },
        "ignore": ["lm_head", r"re:.*down_proj", "layers.0.self_attn.o_proj"],
    }  # fmt: skip
    model = Model()
    apply_quantization_config(model, QuantizationConfig.model_validate(config))
    said = CompressedTensors(config)
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    found = {name: said.of(name) for name in linear}
    wanted = {name: getattr(model.get_submodule(name), "quantization_scheme", None) for name in linear}
    assert {n: s.storage and s.storage.bits for n, s in found.items()} == {
        n: w and w.weights.num_bits for n, w in wanted.items()
    }
    assert len({s.storage and s.storage.bits for s in found.values()}) == 5 and all(
        s.certain for s in found.values()
    )


@pytest.mark.parametrize(
    ("module", "want"),
    [
        ("model.embed_tokens", Said(None)),
        ("model.layers.0.input_layernorm", Said(None)),
        ("model.layers.0.mlp.gate", Said(Storage("pack-quantized", 4), certain=False)),
        ("model.layers.0.mamba.in_proj", Said(Storage("pack-quantized", 4), certain=False)),
        ("lm_head", Said(Storage("pack-quantized", 4))),
    ],
)
def test_the_class_linear_names_linear_modules(module, want):
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"g": group(["Linear"], 4)},
    }
    assert CompressedTensors(config).of(module) == want


@pytest.mark.parametrize(
    ("groups", "says"),
    [
        (None, "config_groups"),
        ({"g": {"weights": {"num_bits": 4}}}, "targets"),
        ({"g": {"targets": ["Linear"], "weights": {"num_bits": 99}}}, "99 bits"),
        ({"g": {"targets": ["Linear"], "weights": {"strategy": "group"}}}, "groups without a size"),
        ({"g": {"targets": ["Linear"], "weights": {"strategy": "block"}}}, "blocks without a size"),
        ({"g": {"targets": ["Linear"], "weights": {"strategy": "spiral"}}}, "spiral"),
        ({"g": {"targets": ["re:("], "weights": {"num_bits": 4}}}, "pattern"),
    ],
)
def test_groups_without_meaning(groups, says):
    with pytest.raises(InputError, match=says) as caught:
        CompressedTensors({"quant_method": "compressed-tensors", "config_groups": groups})
    assert caught.value.code == "E481"


def test_what_auto_round_says_of_modules():
    modules = {
        "model.layers.0.mlp.up_proj": Scheme("int", 4, 32), "model.layers.0.mlp.gate_proj": Scheme("int", 2, 64),
        "model.layers.0.mlp.gate": None, "model.layers.0.self_attn.q_proj": Scheme("int", 4, 32), "lm_head": None,
    }  # fmt: skip
    said = declarations(auto_round.quantization_config(modules), modules)
    assert said is not None
    for module, scheme in modules.items():
        want = None if scheme is None else Storage("gptq", scheme.bits, scheme.group)
        assert said.of(module).storage == want, module
    assert (
        said.of("model.embed_tokens").storage is None
        and said.of("other.layers.0.mlp.up_proj").storage is None
    )


def test_what_gptq_says_of_modules():
    config = {
        "quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True,
        "dynamic": {r"+:.*down_proj": {"bits": 8}, r"-:.*layers\.1\..*": {}},
    }  # fmt: skip
    said = declarations(config)
    assert said is not None
    assert said.of("model.layers.0.mlp.up_proj") == Said(Storage("gptq", 4, 128))
    assert said.of("model.layers.1.mlp.down_proj") == Said(Storage("gptq", 8, 128))
    assert said.of("model.layers.1.mlp.up_proj").storage is None and said.of("lm_head").storage is None
    assert said.of("model.layers.0.mlp.gate").certain is False


def test_what_lists_of_kept_modules_say():
    kept = ["model.layers.0.mlp.gate", "lm_head", "o_proj"]
    said = declarations(
        {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": kept}
    )
    assert said is not None
    assert (
        said.of("model.layers.0.mlp.gate").storage is None
        and said.of("model.layers.3.self_attn.o_proj").storage is None
    )
    assert said.of("model.layers.1.mlp.up_proj") == Said(Storage("fp8", 8, 0, (128, 128)))
    assert (
        said.of("model.layers.0.mlp.gate_proj").certain is False
    )  # older readers look for the entry anywhere
    said = declarations({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
    assert said is not None and said.of("model.layers.0.mlp.up_proj").certain
    assert said.of("model.layers.0.mlp.experts.3.up_proj").certain is False


# ---- auto-round's names ---------------------------------------------------------------------------------


def test_mixtral_has_the_names_of_the_hub_again(tmp_path):
    """Each matrix of each expert with its own width; the plain view has exactly the hub's names and values."""
    source = plain_folder(tmp_path / "source", MIXTRAL, torch.float16)
    widths = {"w1": 2, "w2": 4, "w3": 8}
    modules: dict[str, Scheme | None] = {}

    def stored(name: str, tensor: torch.Tensor):
        renamed = auto_round.stored_name(name, "mixtral")
        if tensor.ndim != 2 or "embed" in name:
            return None
        module = name.removesuffix(".weight")
        if part_of(name) in ("router", "head"):
            modules[module] = None
            return {renamed: tensor}, tensor
        scheme = Scheme("int", widths.get(module.rpartition(".")[2], 3), 32)
        modules[module] = scheme
        codes = rounded(tensor, scheme)
        parts = {
            f"{renamed.removesuffix('weight')}{part}": torch.from_numpy(a)
            for part, a in auto_round.pack(codes).items()
        }
        return parts, torch.from_numpy(codes.values()).to(torch.float16)

    config: dict = {}
    packed, plain = write_both(tmp_path / "both", source, stored, config)
    document = json.loads((packed / "config.json").read_text())
    document["quantization_config"] = auto_round.quantization_config(modules, "mixtral")
    (packed / "config.json").write_text(json.dumps(document))
    view, expected = dequantized(open_path(packed)), load_file(plain / "model.safetensors")
    assert set(view.tensors) == set(expected)
    assert any("block_sparse_moe.experts.3.w2" in name for name in view.tensors)
    for name, tensor in expected.items():
        same_bits(whole(view, name), tensor)
        assert view.computed(name) == (name in view.matrices)
        if not view.computed(name):
            ranges_agree(view, name)
            raw = view.read_bytes(name, 0, view.tensors[name].nbytes)
            assert raw.tobytes() == tensor.contiguous().view(torch.int16).numpy().tobytes()
    assert any("names of the hub" in note for note in view.notes)
    assert hub_names(open_path(plain), {}) == {}
