"""Packed integers as they are written: against the library that reads them, plain loops, and stock transformers."""

from __future__ import annotations

import itertools
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.utils.match import match_name
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "structure"))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import expert_models
from compressed_models import (
    DTYPES,
    as_torch,
    dense_folder,
    far,
    int_,
    loaded,
    logits,
    written,
)

from surgeon.checkpoint.checkpoint import open_path
from surgeon.errors import InputError
from surgeon.formats.compressed_groups import targets
from surgeon.formats.compressed_runtimes import Reader, choices, fused, refusals, storable, ties
from surgeon.formats.dequantized import dequantized
from surgeon.formats.float4 import MXFP4, NVFP4
from surgeon.formats.float8_dynamic import FLOAT8
from surgeon.formats.pack_quantized import layout, pack, packed, quantization_config
from surgeon.formats.scheme import Codes, Scheme

BITS = range(2, 9)


def drawn(shape: tuple[int, int], scheme: Scheme, dtype: str = "BF16", seed: int = 0) -> Codes:
    """Return random codes with scales of a type."""
    rng = np.random.default_rng(seed)
    groups = shape[1] // scheme.group if scheme.group > 0 else 1
    scales = torch.from_numpy(rng.uniform(0.01, 3, (shape[0], groups))).to(DTYPES[dtype]).float().numpy()
    codes = rng.integers(0, 1 << scheme.bits, shape).astype(np.uint8)
    return Codes(scheme, codes, scales, np.full(scales.shape, 1 << (scheme.bits - 1), np.uint8))


# ---- bytes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 31), (5, 32), (4, 33), (7, 257), (2, 1024)])
def test_the_stream_is_that_of_the_library_and_of_one_long_integer(bits, shape):
    codes = np.random.default_rng(bits).integers(0, 1 << bits, shape).astype(np.uint8)
    words = packed(codes, bits)
    signed = torch.from_numpy(codes.astype(np.int16) - (1 << (bits - 1))).to(torch.int8)
    assert words.dtype == np.int32 and np.array_equal(words, pack_to_int32(signed, bits).numpy())
    for row, found in zip(codes.tolist(), words, strict=True):
        total = sum(code << (bits * place) for place, code in enumerate(row))
        assert int.from_bytes(found.tobytes(), "little") == total


def test_many_rows_are_packed_a_few_at_a_time(monkeypatch):
    codes = np.random.default_rng(1).integers(0, 8, (50, 37)).astype(np.uint8)
    whole = packed(codes, 3)
    monkeypatch.setattr("surgeon.formats.pack_quantized.ROWS", 100)
    assert np.array_equal(packed(codes, 3), whole)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [-1, 32, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_library_compresses_to_the_same_bytes_and_gives_the_values_back(bits, group, dtype):
    codes = drawn((9, 96), int_(bits, group), dtype)
    ours = {
        f"weight{suffix}": as_torch(part, code)
        for (suffix, part), (_, code, _) in zip(
            pack(codes, dtype).items(), layout("weight", (9, 96), codes.scheme, dtype), strict=True
        )
    }
    config = QuantizationConfig.model_validate(quantization_config({"a": codes.scheme}))
    scheme = config.config_groups["group_000"]
    assert isinstance(scheme, QuantizationScheme)
    values, scales = torch.from_numpy(codes.values()), torch.from_numpy(codes.scales)
    theirs = PackedQuantizationCompressor.compress({"weight": values, "weight_scale": scales}, scheme)
    assert torch.equal(ours["weight_packed"], theirs["weight_packed"])
    assert torch.equal(ours["weight_shape"], theirs["weight_shape"])
    back = PackedQuantizationCompressor.decompress(dict(ours), scheme)["weight"]
    assert back.dtype == DTYPES[dtype] and torch.equal(back, values.to(DTYPES[dtype]))


@pytest.mark.parametrize("shape", [(7, 45), (1, 3), (33, 31)])
@pytest.mark.parametrize("bits", BITS)
def test_odd_shapes_come_back(bits, shape):
    codes = drawn(shape, int_(bits))
    ours = {f"weight{suffix}": part for suffix, part in pack(codes).items()}
    sizes = {name: size for name, _, size in layout("weight", shape, codes.scheme)}
    assert {name: part.shape for name, part in ours.items()} == sizes
    state = {n: as_torch(p, "BF16" if n == "weight_scale" else "I32") for n, p in ours.items()}
    config = QuantizationConfig.model_validate(quantization_config({"a": codes.scheme}))
    back = PackedQuantizationCompressor.decompress(state, config.config_groups["group_000"])["weight"]
    assert torch.equal(back, torch.from_numpy(codes.values()).to(torch.bfloat16))


def test_sizes_of_a_folder_are_those_of_layout(tmp_path, dense):
    pair = written(tmp_path, dense, lambda m: None if m == "lm_head" else int_(3, 32))
    stored = load_file(pair.packed / "model.safetensors")
    for name, (shape, scheme) in pair.matrices.items():
        for part, _, size in layout(name, shape, scheme) if scheme else ():
            assert tuple(stored[part].shape) == size
    quantized = sum(t.nbytes for n, t in stored.items() if "_proj" in n)
    weights = sum(shape[0] * shape[1] for shape, scheme in pair.matrices.values() if scheme)
    assert quantized == weights * 3 / 8 + weights / 32 * 2 + 14 * 16


# ---- what cannot be written ----------------------------------------------------------------------------


def test_what_does_not_fit_is_refused():
    good = drawn((4, 64), int_(4, 32))
    for scheme, shape, code, word in (
        (Scheme("int", 4, 32, False), (4, 64), "E454", "zero points"),
        (int_(9), (4, 64), "E454", "2 to 8 bits"),
        (int_(4, 0), (4, 64), "E454", "no size of a group"),
        (Scheme("nf4", 4, 64), (4, 64), "E454", "nf4"),
        (int_(4, 48), (4, 64), "E455", "groups of 48 do not divide its 64 inputs"),
        (int_(4, 32), (2, 4, 64), "E455", "3 axes"),
        (int_(4), (0, 64), "E455", "empty"),
    ):
        with pytest.raises(InputError, match=word) as caught:
            layout("a.weight", shape, scheme)
        assert caught.value.code == code
    for change, code in (
        ({"zeros": good.zeros + np.uint8(1)}, "E454"),
        ({"codes": good.codes + np.uint8(16)}, "E454"),
        ({"scales": good.scales[:, :1]}, "E455"),
        ({"scales": good.scales * np.float32(1.001)}, "E457"),
        ({"scales": np.where(good.scales > 1, np.nan, good.scales)}, "E457"),
        ({"scales": np.full_like(good.scales, np.inf)}, "E457"),
    ):
        with pytest.raises(InputError) as caught:
            pack(Codes(**{**vars(good), **change}))
        assert caught.value.code == code, change
    with pytest.raises(InputError, match="no module is quantized"):
        quantization_config({"a": None})


# ---- config.json ---------------------------------------------------------------------------------------


def test_the_configuration_names_every_module_once_and_in_order():
    modules = {"model.layers.0.a_proj": int_(4, 128), "model.layers.0.b_proj": int_(8), "lm_head": None,
               "model.layers.1.a_proj": int_(3, 64), "model.layers.1.b_proj": int_(4, 128)}  # fmt: skip
    config = quantization_config(modules, actorder="static")
    assert list(config["config_groups"]) == ["group_000", "group_001", "group_002"]
    assert config["config_groups"]["group_001"]["targets"] == [
        "model.layers.0.a_proj",
        "model.layers.1.b_proj",
    ]
    assert config["config_groups"]["group_001"]["weights"] == {
        "num_bits": 4, "type": "int", "symmetric": True, "dynamic": False, "strategy": "group", "group_size": 128,
        "actorder": "static",
    }  # fmt: skip
    assert config["config_groups"]["group_002"]["weights"]["strategy"] == "channel"
    assert (config["ignore"], config["format"], config["version"]) == (
        ["lm_head"],
        "pack-quantized",
        "0.20.0",
    )
    assert config == json.loads(json.dumps(config, sort_keys=True))
    assert "actorder" not in json.dumps(quantization_config(modules))
    kinds = {"a": int_(4, 128), "b": FLOAT8, "c": NVFP4, "d": MXFP4}
    mixed = quantization_config(kinds)
    assert mixed["format"] == "mixed-precision"
    again = QuantizationConfig.model_validate(mixed)
    assert [g.format for g in again.config_groups.values()] == [
        "float-quantized", "pack-quantized", "mxfp4-pack-quantized", "nvfp4-pack-quantized"
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(12))
def test_targets_name_their_modules_and_no_others(seed):
    rng = random.Random(seed)
    menu = [None, int_(4, 128), int_(8), FLOAT8]
    per = rng.choice(["model", "layer", "matrix", "layer and matrix", "expert"])
    drawn_for: dict[object, Scheme | None] = {}
    modules = {f"model.layers.{layer}.self_attn.q_proj": rng.choice(menu) for layer in range(12)}
    for layer, expert, last in itertools.product(range(12), range(3), ("gate_proj", "up_proj", "down_proj")):
        key = {
            "model": 0,
            "layer": layer,
            "matrix": last,
            "layer and matrix": (layer, last),
            "expert": (layer, expert),
        }[per]
        scheme = drawn_for.setdefault(key, rng.choice(menu))
        modules[f"model.layers.{layer}.mlp.experts.{expert}.{last}"] = scheme
        modules[f"model.layers.{layer}.mlp.shared_experts.{last}"] = rng.choice(menu)
    found = targets(modules)
    for name, scheme in modules.items():
        fitting = {
            other for other, names in found.items() if any(match_name(name, target) for target in names)
        }
        assert fitting == {scheme}, name
    if per == "model":
        assert sum(name.startswith("re:") for names in found.values() for name in names) == 1


# ---- loading -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return dense_folder(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def moe():
    return expert_models.moe_folder("qwen3_moe", dtype=torch.bfloat16, moe_intermediate_size=32)


def but_head(scheme):
    return lambda module: None if module == "lm_head" else scheme


@pytest.mark.parametrize("bits", [2, 3, 5, 8, *(pytest.param(b, marks=pytest.mark.slow) for b in (4, 6, 7))])
def test_stock_transformers_computes_with_the_values(tmp_path, dense, bits):
    for number, group in enumerate((32, -1)):
        assert far(written(tmp_path / str(number), dense, but_head(int_(bits, group)))) == 0


def mixed(module: str) -> Scheme:
    return (int_(8), int_(4, 32), int_(3, 16), int_(2, 32), int_(5, 8))[sum(map(ord, module)) % 5]


def test_every_dense_module_has_its_own_scheme_the_head_too(tmp_path, dense):
    pair = written(tmp_path, dense, mixed)
    assert len({scheme for _, scheme in pair.matrices.values()}) == 5
    assert refusals(pair.matrices) == []
    assert far(pair) == 0


def test_kinds_mix(tmp_path, dense):
    kinds = {"q_proj": NVFP4, "o_proj": int_(4, 32), "up_proj": MXFP4, "down_proj": int_(3)}
    pair = written(tmp_path, dense, lambda m: kinds.get(m.rpartition(".")[2]))
    assert far(pair) == 0


@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_other_types(tmp_path, dense, dtype):
    assert far(written(tmp_path, dense, but_head(int_(4, 16)), dtype), dtype) == 0


def test_odd_widths(tmp_path):
    source = dense_folder(tmp_path / "source", hidden_size=36, intermediate_size=45, head_dim=10)
    assert far(written(tmp_path / "out", source, but_head(int_(3)))) == 0


def of_experts(dense: Scheme | None, experts) -> object:
    def choose(module: str) -> Scheme | None:
        if module == "lm_head":
            return None
        if ".experts." not in module:
            return dense
        layer, expert = int(module.split(".")[2]), int(module.split(".experts.")[1].split(".")[0])
        return experts(layer, expert, module.rpartition(".")[2]) if callable(experts) else experts

    return choose


READ = {
    "experts alone": (None, int_(4, 8)),
    "experts otherwise than the rest": (int_(8), int_(4, 8)),
    "experts in 3 bits, as the rest": (int_(3, 8), int_(3, 8)),
    "channels": (int_(4, 8), int_(5)),
    "experts in MXFP4": (int_(4, 8), MXFP4),
    "experts in float8": (int_(4, 8), FLOAT8),
    "dense NVFP4": (NVFP4, int_(4, 8)),
}


@pytest.mark.parametrize("case", READ)
def test_experts_of_one_scheme_are_read(tmp_path, moe, case):
    pair = written(tmp_path, moe, of_experts(*READ[case]))
    assert refusals(pair.matrices) == []
    assert far(pair) == 0


REFUSED = {
    "by layer": (int_(4, 8), lambda layer, expert, last: int_(4, 8) if layer == 0 else int_(8, 8), "wrong"),
    "by expert": (int_(4, 8), lambda layer, expert, last: int_(4, 8) if expert < 4 else int_(8, 8), "wrong"),
    "by matrix": (
        int_(4, 8),
        lambda layer, expert, last: int_(8, 8) if last == "down_proj" else int_(4, 8),
        "wrong",
    ),
    "by groups": (int_(4, 8), lambda layer, expert, last: int_(4, 8) if layer == 0 else int_(4, 16), "fails"),
    "a layer plain": (int_(4, 8), lambda layer, expert, last: None if layer == 0 else int_(4, 8), "fails"),
    "an expert plain": (int_(4, 8), lambda layer, expert, last: None if expert == 0 else int_(4, 8), "fails"),
    "all experts plain": (int_(4, 8), None, "fails"),
    "NVFP4": (None, NVFP4, "wrong"),
}
"""What is chosen, and what stock transformers makes of it: an error, or other values without one."""


@pytest.mark.parametrize("case", REFUSED)
def test_what_transformers_reads_wrongly_is_refused(tmp_path, moe, case):
    dense_scheme, experts, fate = REFUSED[case]
    pair = written(tmp_path, moe, of_experts(dense_scheme, experts))
    found = refusals(pair.matrices)
    assert found and all(error.code == "E456" and "experts" in error.message for error in found)
    if fate == "wrong":
        assert far(pair) > 0.3  # loads without a word
    else:
        with pytest.raises(RuntimeError, match=r"automatic conversion|mismatched"):
            loaded(pair.packed)


def test_plain_experts_are_read_where_the_first_group_is_of_float8(tmp_path, moe):
    choose = of_experts(int_(4, 8), None)
    pair = written(tmp_path, moe, lambda m: FLOAT8 if m.endswith("0.self_attn.o_proj") else choose(m))
    assert refusals(pair.matrices) == []
    model, plain = loaded(pair.packed), loaded(pair.plain)
    logits(model)  # dense modules are unpacked by the first pass
    state = model.state_dict()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(state[name], tensor), name


def test_zero_points_are_refused_because_the_reader_fails(tmp_path, dense):
    def asymmetric(config, tensors):
        weights = config["config_groups"]["group_000"]["weights"]
        weights["symmetric"] = False
        for name in [n for n in tensors if n.endswith("_scale")]:
            rows, groups = tensors[name].shape
            zeros = pack_to_int32(torch.zeros(rows, groups, dtype=torch.int8), 4, packed_dim=0)
            tensors[name.replace("_scale", "_zero_point")] = zeros

    pair = written(tmp_path, dense, but_head(int_(4, 32)), change=asymmetric)
    with pytest.raises(RuntimeError, match="mismatched"):
        loaded(pair.packed)
    assert "zero points" in str(storable("a.q_proj.weight", (64, 64), Scheme("int", 4, 32, False)))


def test_several_dense_schemes_are_not_read_by_dequantizing_on_load(tmp_path, dense):
    """Why nothing here relies on that option: it takes one scheme for all."""
    first = written(tmp_path, dense, lambda m: None if m == "lm_head" else int_(4) if ".0." in m else int_(8))
    options = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}
    assert far(first) == 0
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        assert far(first, **options) > 0.3


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3", "olmoe", "glm4_moe", "phimoe", "jamba",
                                    "lfm2_moe", "minimax_m2", "hunyuan_v1_moe", "ernie4_5_moe", "qwen3_next"])  # fmt: skip
def test_families(tmp_path, family):
    source = expert_models.moe_folder(family, dtype=torch.bfloat16)

    def choose(module: str) -> Scheme | None:
        if not module.endswith(("_proj", ".w1", ".w2", ".w3")):
            return None
        return int_(4, 8) if ".experts." in module else int_(8)

    pair = written(tmp_path, source, choose)
    assert any(scheme == int_(4, 8) for _, scheme in pair.matrices.values())
    assert refusals(pair.matrices) == []
    assert far(pair) == 0


def test_our_own_reader_gives_the_same_values(tmp_path, dense):
    widths = {"q_proj": int_(4, 16), "down_proj": int_(2, 16), "up_proj": int_(8, 16)}
    pair = written(tmp_path, dense, lambda m: widths.get(m.rpartition(".")[2]))
    view, plain = dequantized(open_path(pair.packed)), load_file(pair.plain / "model.safetensors")
    assert set(view.tensors) == set(plain)
    for name, tensor in plain.items():
        raw = view.read(name, 0, tensor.numel())
        assert np.array_equal(raw, tensor.reshape(-1).view(torch.int16).numpy().view(np.uint16)), name


# ---- rules ---------------------------------------------------------------------------------------------


ATTENTION = {f"model.layers.0.self_attn.{n}_proj.weight": (64, 128) for n in "qkvo"}
MLP = {
    f"model.layers.0.mlp.{n}_proj.weight": (96, 64) if n != "down" else (64, 96)
    for n in ("gate", "up", "down")
}
EXPERTS = {
    f"model.layers.{layer}.mlp.experts.{expert}.{n}_proj.weight": (64, 96) if n == "down" else (96, 64)
    for layer, expert, n in itertools.product((0, 1), (0, 1), ("gate", "up", "down"))
}


def test_vllm_ties():
    assert [len(group) for group in ties(ATTENTION | MLP, "vllm")] == [3, 1, 2, 1]
    assert [len(group) for group in ties(EXPERTS, "vllm")] == [6, 6]
    assert [len(group) for group in ties(EXPERTS | ATTENTION)] == [12, 1, 1, 1, 1]
    assert len(fused(EXPERTS)) == 4 and all("gate" in a and "up" in b for a, b in fused(EXPERTS))
    alike = {name: (shape, int_(4, 32)) for name, shape in (ATTENTION | MLP | EXPERTS).items()}
    vllm = Reader("vllm")
    assert refusals(alike, vllm) == []
    key = "model.layers.0.self_attn.k_proj.weight"
    for other in (int_(8), None):
        (error,) = refusals(alike | {key: ((64, 128), other)}, vllm)
        assert error.code == "E456" and "one matrix" in error.message
        assert refusals(alike | {key: ((64, 128), other)}) == []
    layers = {n: (s, int_(4, 32) if ".0.mlp" in n else int_(8)) for n, s in EXPERTS.items()}
    assert refusals(layers, vllm) == [] and len(refusals(layers)) == 1
    down = {n: (s, int_(8) if "down" in n else int_(4, 32)) for n, s in EXPERTS.items()}
    (error,) = refusals(down, vllm)
    assert "of a layer" in error.message and error.message.endswith("; so it is with 1 more layer")


@pytest.mark.parametrize(
    "name, shape, scheme, reader, word",
    [
        ("model.embed_tokens", (67, 64), int_(8), Reader(), "an embedding plain"),
        ("model.layers.0.mlp.gate", (8, 64), int_(8), Reader(), "a router plain"),
        ("lm_head", (67, 64), int_(8), Reader(tied=True), "embedding"),
        ("lm_head", (67, 64), int_(8), Reader(), None),
        ("lm_head", (64, 64), int_(3, 32), Reader("vllm"), "4 or 8 bits"),
        ("lm_head", (64, 64), FLOAT8, Reader("vllm"), "4 or 8 bits"),
        ("lm_head", (64, 64), int_(4, 32), Reader("vllm"), None),
        ("model.layers.0.self_attn.q_proj", (64, 48), int_(4, 32), Reader(), "groups of 32 do not divide its 48"),
        ("model.layers.0.self_attn.q_proj", (64, 36), int_(3), Reader(), None),
        ("model.layers.0.self_attn.q_proj", (64, 36), int_(3), Reader("vllm"), "words of 32"),
        ("model.layers.0.self_attn.o_proj", (64, 64), int_(4, 64), Reader("vllm"), None),
        ("model.layers.0.self_attn.o_proj", (64, 64), int_(4, 64), Reader("vllm", devices=2), "groups of 64 do not"),
        ("model.layers.0.self_attn.o_proj", (64, 64), int_(4, 32), Reader("vllm", devices=3), "3 devices"),
        ("model.layers.0.self_attn.q_proj", (64, 64), int_(4, 64), Reader("vllm", devices=2), None),
        ("model.layers.0.self_attn.q_proj", (66, 64), int_(4, 64), Reader("vllm", devices=4), "66 outputs"),
        ("model.layers.0.mlp.experts.0.up_proj", (64, 64), int_(3, 32), Reader("vllm"), "2, 4, 8 bits"),
        ("model.layers.0.mlp.experts.0.up_proj", (64, 64), int_(3, 32), Reader(), None),
        ("model.layers.0.block_sparse_moe.experts.0.w1", (64, 64), int_(4, 32), Reader("vllm"), "gate_proj"),
        ("model.layers.0.block_sparse_moe.experts.0.w1", (64, 64), int_(4, 32), Reader(), None),
        ("model.layers.0.mlp.experts.0.up_proj", (64, 64), NVFP4, Reader(), "shared scale"),
        ("model.layers.0.mlp.experts.0.up_proj", (64, 64), NVFP4, Reader("vllm"), None),
        ("model.layers.0.self_attn.q_proj", (64, 64), MXFP4, Reader(dtype="F16"), "unpacked to BF16"),
        ("model.layers.0.self_attn.q_proj", (64, 64), MXFP4, Reader("vllm", dtype="F16"), None),
        ("model.layers.0.self_attn.q_proj", (64, 48), MXFP4, Reader(), "groups of 32"),
        ("model.layers.0.self_attn.q_proj", (64, 48), NVFP4, Reader(), None),
        ("model.layers.0.self_attn.q_proj", (64, 64), Scheme("nf4", 4, 64), Reader(), "stores int, float8"),
        ("model.layers.0.self_attn.q_proj", (64, 64), Scheme("float8", 4, -1), Reader(), "does not have 4 bits"),
    ],
)  # fmt: skip
def test_rules_for_one_matrix(name, shape, scheme, reader, word):
    reason = storable(f"{name}.weight", shape, scheme, reader)
    assert (reason is None) if word is None else (word in str(reason)), reason


MENU = [
    None,
    int_(2, 32),
    int_(3, 32),
    int_(4, 32),
    int_(4, 64),
    int_(8),
    FLOAT8,
    MXFP4,
    NVFP4,
    Scheme("int", 4, 32, False),
]


@pytest.mark.parametrize(
    "reader", [Reader(), Reader("vllm"), Reader("vllm", devices=2), Reader(dtype="F16")], ids=str
)
@pytest.mark.parametrize("shapes", [ATTENTION | MLP, ATTENTION | EXPERTS], ids=["dense", "experts"])
def test_every_combination_of_choices_is_storable(reader, shapes):
    rng = random.Random(4)
    alternatives = choices(shapes, MENU, reader)
    assert len(alternatives) == (
        2 if reader.runtime == "transformers" and EXPERTS.keys() <= shapes.keys() else 1
    )
    for option in alternatives:
        assert sorted(name for choice in option for name in choice.names) == sorted(shapes)
        for _ in range(40):
            picked = {
                n: (shapes[n], s)
                for choice in option
                for s in [rng.choice(choice.schemes)]
                for n in choice.names
            }
            assert refusals(picked, reader) == []
    offered = {scheme for option in alternatives for choice in option for scheme in choice.schemes}
    assert int_(4, 32) in offered and Scheme("int", 4, 32, False) not in offered
    # Nothing that could be stored is kept back: what is not offered to a group is refused for it.
    whole = {choice.names: choice.schemes for choice in alternatives[0]}
    for names, schemes in whole.items():
        for scheme in MENU:
            if scheme is not None and scheme not in schemes:
                assert any(storable(name, shapes[name], scheme, reader) for name in names)


def test_a_menu_that_has_nothing_for_a_matrix_says_so():
    (option,) = choices({**MLP, "model.layers.0.mlp.gate.weight": (8, 64)}, [int_(4, 32)])
    assert [choice.schemes for choice in option] == [(int_(4, 32),)] * 3 + [()]
    (option,) = choices({**ATTENTION, **EXPERTS}, [int_(4, 32)])
    assert all(choice.schemes == (int_(4, 32),) for choice in option)
