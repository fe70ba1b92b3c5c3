"""bitsandbytes written without a model and read back: against the package, and models it loads or quantizes itself."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent))
from quantized_folders import (
    LLAMA,
    apart,
    load_in_child,
    loaded_whole,
    plain_folder,
    require,
    write_both,
)
from test_dequantized import CODES, model_of, ranges_agree, same_bits, whole

from surgeon.errors import InputError
from surgeon.formats import bnb, bnb_stored, dequantized
from surgeon.formats.compressed_runtimes import Reader
from surgeon.formats.scheme import Scheme

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
SCHEMES = {"nf4": bnb.NF4, "fp4": bnb.FP4, "int8": bnb.INT8}
SHAPES = [(64, 512), (6, 96), (400, 130), (3, 21), (5, 7), (1, 1)]


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    if bnb_stored.FORMAT not in dequantized.FORMATS:
        monkeypatch.setattr(dequantized, "FORMATS", (*dequantized.FORMATS, bnb_stored.FORMAT))


@pytest.fixture
def functional():
    require("bitsandbytes")
    import bitsandbytes.functional

    return bitsandbytes.functional


def matrix(shape: tuple[int, int], dtype: str = "F32", seed: int = 0) -> torch.Tensor:
    """Return random values with a row of zeros, a few zeros and one far out, where there is room."""
    torch.manual_seed(seed)
    weight = torch.randn(shape) * 0.02
    if shape[0] > 4:
        weight[3], weight[0, 0], weight[1, 2] = 0, 0, 1.5
    return weight.to(DTYPES[dtype])


def tensors_of(parts: dict[str, np.ndarray], stem: str = "") -> dict[str, torch.Tensor]:
    return {f"{stem}{suffix}": torch.from_numpy(np.array(part)) for suffix, part in parts.items()}


# ---- bytes against the package -------------------------------------------------------------------------


def test_tables(functional):
    for kind in ("nf4", "fp4"):
        assert bnb.levels(kind).tobytes() == functional.get_4bit_type(kind, "cpu").numpy().tobytes()
    assert bnb.dynamic_levels().tobytes() == functional.create_dynamic_map().numpy().tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits(kind, shape, dtype, functional):
    """Every tensor, the JSON included, has the package's bytes."""
    weight = matrix(shape, dtype)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type=kind)
    expected = {"weight": packed} | {
        f"weight.{key}": part for key, part in state.as_dict(packed=True).items()
    }
    found = tensors_of(bnb.pack(weight.float().numpy(), SCHEMES[kind], dtype))
    assert found.keys() == expected.keys()
    for suffix, part in expected.items():
        assert found[suffix].dtype == part.dtype and found[suffix].shape == part.shape
        assert found[suffix].numpy().tobytes() == part.numpy().tobytes(), suffix


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_eight_bits(shape, dtype):
    require("bitsandbytes")
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    weight = matrix(shape, dtype)
    module = Linear8bitLt(shape[1], shape[0], bias=False, has_fp16_weights=False)
    module.weight = Int8Params(weight, requires_grad=False, has_fp16_weights=False).to("cpu")
    expected, found = module.state_dict(), tensors_of(bnb.pack(weight.float().numpy(), bnb.INT8, dtype))
    assert found.keys() == expected.keys()
    for suffix, part in expected.items():
        assert found[suffix].dtype == part.dtype and found[suffix].shape == part.shape
        assert torch.equal(found[suffix], part), suffix


@pytest.mark.parametrize("shape", SHAPES)
def test_double_quantization(shape, functional):
    """The package reads it; absmax are the nearest level, and the package's own to within one step in few places."""
    weight = matrix(shape)
    parts = bnb.pack(weight.numpy(), bnb.NF4, "F32", double=True)
    stored = {k.removeprefix("weight."): t for k, t in tensors_of(parts).items() if k != "weight"}
    state = functional.QuantState.from_dict(stored, torch.device("cpu"))
    packed, own = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    assert np.array_equal(parts["weight"], packed.numpy())
    offset = own.offset.item()
    assert abs(state.offset.item() - offset) <= 2 * np.spacing(np.float32(offset))
    assert torch.equal(state.state2.code, own.state2.code) and state.state2.blocksize == own.state2.blocksize
    _, absmax = bnb.blocks_of_four_bits(weight.numpy(), "nf4")
    centred = absmax - np.float32(state.offset.item())
    for place, value in enumerate(centred):
        scale = np.abs(centred[place // 256 * 256 :][:256]).max()
        distances = np.abs(
            bnb.dynamic_levels().astype(float) - (float(value) / float(scale) if scale else 0.0)
        )
        assert distances[parts["weight.absmax"][place]] <= distances.min() + 1e-7
    if len(absmax) > 1:  # alone, it is its own mean, and any level times zero is right
        steps = np.abs(parts["weight.absmax"].astype(int) - own.absmax.numpy().astype(int))
        assert steps.max() <= 1 and (steps > 0).mean() < 0.01


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", SCHEMES)
def test_layout(kind, double):
    """Sizes are known without the values, whatever the offset is."""
    for shape in SHAPES:
        for seed, scale in enumerate((1e-9, 3e-5, 1.0, 4e4)):
            weight = (matrix(shape, seed=seed) * scale).float().numpy()
            parts = tensors_of(bnb.pack(weight, SCHEMES[kind], "BF16", double), "a.")
            laid_out = bnb.layout("a.weight", shape, SCHEMES[kind], "BF16", double)
            assert {n: (c, s) for n, c, s in laid_out} == {
                n: (CODES[t.dtype], tuple(t.shape)) for n, t in parts.items()
            }


def test_values_that_cannot_be_held():
    bad = np.array([[1.0, np.inf]], np.float32)
    for scheme in SCHEMES.values():
        with pytest.raises(InputError, match="E461"):
            bnb.pack(bad, scheme)
    with pytest.raises(InputError, match="65504"):
        bnb.pack(np.array([[1.0, 70000.0]], np.float32), bnb.INT8)


def test_large_matrices_are_worked_on_in_pieces(functional, monkeypatch):
    weight = matrix((70, 130))
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="fp4")
    codes, absmax = bnb.blocks_of_four_bits(weight.numpy(), "fp4")
    eight = bnb.rows_of_int8(weight.numpy())
    monkeypatch.setattr(bnb, "CHUNK", 128)
    again, absmax_again = bnb.blocks_of_four_bits(weight.numpy(), "fp4")
    assert np.array_equal(again, codes) and np.array_equal(again, packed.numpy()[:, 0])
    assert np.array_equal(absmax_again, absmax) and np.array_equal(absmax, state.absmax.numpy())
    assert all(np.array_equal(a, b) for a, b in zip(eight, bnb.rows_of_int8(weight.numpy()), strict=True))


# ---- read back -----------------------------------------------------------------------------------------


def decoded_by_package(functional, tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    if f"{name.removesuffix('weight')}SCB" in tensors:
        scales = tensors[f"{name.removesuffix('weight')}SCB"]
        return functional.int8_vectorwise_dequant(tensors[name], scales).to(torch.float16)
    stored = {k.removeprefix(f"{name}."): t.clone() for k, t in tensors.items() if k.startswith(f"{name}.")}
    return flat(functional, tensors[name], functional.QuantState.from_dict(stored, torch.device("cpu")))


def flat(functional, packed: torch.Tensor, state) -> torch.Tensor:
    """Decode as one long row: of rows that end inside a block the package mistakes the scales on processors."""
    shape, state.shape = state.shape, torch.Size((1, state.shape.numel()))
    return functional.dequantize_4bit(packed, state).reshape(shape)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", SCHEMES)
def test_read(kind, double, dtype, functional, tmp_path):
    for number, shape in enumerate([(64, 512), (400, 130), (6, 96)]):
        tensors = tensors_of(
            bnb.pack(matrix(shape, dtype).float().numpy(), SCHEMES[kind], dtype, double), "a."
        )
        tensors["a.bias"] = torch.ones(shape[0], dtype=DTYPES[dtype])
        config = bnb.quantization_config({"a": SCHEMES[kind]}, double)
        view = dequantized.dequantized(model_of(tmp_path / str(number), tensors, config))
        assert set(view.tensors) == {"a.weight", "a.bias"} and view.formats == {"bitsandbytes": 1}
        same_bits(whole(view, "a.weight"), decoded_by_package(functional, tensors, "a.weight"))
        ranges_agree(view, "a.weight")


@pytest.mark.parametrize("block", [32, 128])
def test_read_what_others_wrote(block, functional, tmp_path, monkeypatch):
    """Other blocks, bytes stored as bfloat16, float32 values, in pieces."""
    monkeypatch.setattr(bnb_stored, "CHUNK", 256)
    weight = matrix((48, 96))
    packed, state = functional.quantize_4bit(
        weight, blocksize=block, quant_type="nf4", compress_statistics=True, quant_storage=torch.bfloat16
    )
    tensors = {"a.weight": packed} | {f"a.weight.{k}": t for k, t in state.as_dict(packed=True).items()}
    view = dequantized.dequantized(model_of(tmp_path, tensors, {"quant_method": "bitsandbytes"}))
    assert view.tensors["a.weight"].dtype == "F32"
    assert torch.equal(whole(view, "a.weight"), flat(functional, packed, state))
    ranges_agree(view, "a.weight")


def test_damaged(tmp_path):
    good = tensors_of(bnb.pack(matrix((64, 128)).numpy(), bnb.NF4, "BF16", True), "a.")
    eight = tensors_of(bnb.pack(matrix((64, 128)).numpy(), bnb.INT8), "a.")
    state = "a.weight.quant_state.bitsandbytes__nf4"
    text = torch.tensor(list(b'{"shape": 3}'), dtype=torch.uint8)
    cases = [
        ({n: t for n, t in good.items() if n != "a.weight.absmax"}, "E446"),
        (good | {"a.weight": good["a.weight"][:-1]}, "E446"),
        (good | {"a.weight.nested_absmax": torch.ones(2)}, "E446"),
        (good | {state: text}, "E445"),
        (good | {state: text[:5]}, "E445"),
        ({n: t for n, t in eight.items() if n != "a.SCB"}, "E446"),
        (eight | {"a.SCB": torch.ones(63)}, "E446"),
        (eight | {"a.weight_format": torch.tensor(2, dtype=torch.uint8)}, "E445"),
    ]
    for number, (tensors, code) in enumerate(cases):
        checkpoint = model_of(tmp_path / str(number), tensors, {"quant_method": "bitsandbytes"})
        with pytest.raises(InputError, match=code):
            dequantized.dequantized(checkpoint)


# ---- config and refusals ---------------------------------------------------------------------------------


def test_config_names_what_is_kept():
    modules = {
        "model.layers.1.mlp.up_proj": bnb.NF4,
        "model.layers.11.mlp.up_proj": bnb.NF4,
        "model.layers.1.mlp.down_proj": None,
    }
    config = bnb.quantization_config(modules, double=True)
    assert config["llm_int8_skip_modules"] == ["model.layers.1.mlp.down_proj", "lm_head"]
    assert config["load_in_4bit"] and not config["load_in_8bit"] and config["bnb_4bit_use_double_quant"]
    assert (config["bnb_4bit_quant_type"], config["bnb_4bit_compute_dtype"]) == ("nf4", "bfloat16")
    config = bnb.quantization_config({"a": bnb.INT8, "lm_head": bnb.INT8}, double=True)
    assert (
        config["load_in_8bit"]
        and not config["bnb_4bit_use_double_quant"]
        and config["llm_int8_skip_modules"] == []
    )
    for bad in ({"a": None}, {"a": bnb.INT8, "b": bnb.NF4}):
        with pytest.raises(InputError, match="E460"):
            bnb.quantization_config(bad)
    with pytest.raises(InputError, match=r"E460.*layers\.0\.fc1"):
        bnb.quantization_config({"layers.0.fc1": bnb.NF4, "fc1": None})
    with pytest.raises(InputError, match="E460"):
        bnb.quantization_config({"model.decoder.out": bnb.NF4, "model.decoder": None})


def test_kept_modules_are_those_of_the_library():
    from transformers.quantizers.quantizers_utils import should_convert_module

    names = [
        f"model.layers.{n}.{part}"
        for n in (1, 2, 11, 12)
        for part in ("mlp.gate", "mlp.gate_proj", "fc", "xfc")
    ] + ["lm_head"]
    for kept in (
        ["model.layers.1.mlp.gate"],
        ["fc"],
        ["model.layers.1", "lm_head"],
        ["model.layers.1.fc", "gate"],
        [],
    ):
        assert bnb.skipped(names, kept) == [name for name in names if not should_convert_module(name, kept)]


Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(("name", "shape", "scheme", "said"), [
    (Q, (64, 96), bnb.NF4, "fill blocks"),
    (Q, (48, 128), bnb.FP4, "fill blocks"),
    (Q, (64, 128), Scheme("int", 4, 64), "not one of nf4"),
    (Q, (64, 128), Scheme("nf4", 4, 128), "not one of nf4"),
    (Q, (4, 64, 128), bnb.NF4, "3 axes"),
    ("model.embed_tokens.weight", (64, 128), bnb.INT8, "an embedding"),
    ("model.layers.0.mlp.experts.0.up_proj.weight", (64, 128), bnb.NF4, "one tensor"),
])  # fmt: skip
def test_refused(name, shape, scheme, said):
    assert said in (bnb.storable(name, shape, scheme) or "")
    assert bnb.storable(Q, (64, 128), bnb.NF4) is None and bnb.storable(Q, (63, 97), bnb.INT8) is None


def test_mixtures_are_refused():
    expert = "model.layers.0.mlp.experts.{}.up_proj.weight"
    matrices = {Q: ((64, 64), bnb.NF4)} | {expert.format(e): ((64, 64), None) for e in range(3)}
    (found,) = bnb.refusals(matrices)
    assert found.code == "E461" and "75%" in found.message and "auto-round" in (found.help or "")
    assert bnb.refusals(matrices, dense_only=True) == []
    matrices[expert.format(0)] = ((64, 64), bnb.NF4)
    (found,) = bnb.refusals(matrices, dense_only=True)
    assert "without saying so" in found.message


def test_one_kind_a_model():
    shapes = {Q: (64, 128), Q.replace("q_p", "k_p"): (48, 128), "lm_head.weight": (96, 64)}
    found = bnb.choices(shapes, [bnb.INT8, bnb.NF4, None], Reader(tied=True))
    assert [[choice.schemes for choice in one] for one in found] == [
        [(bnb.NF4, None), (None,), (None,)], [(bnb.INT8, None), (bnb.INT8, None), (None,)],
    ]  # fmt: skip
    assert [choice.names for choice in found[0]] == [(name,) for name in shapes]
    assert bnb.choices(shapes, [bnb.FP4])[0][1].schemes == ()
    mixed = {Q: ((64, 128), bnb.NF4), Q.replace("q_p", "v_p"): ((64, 128), bnb.INT8)}
    (refused,) = bnb.refusals(mixed)
    assert refused.code == "E461" and "int8 and nf4" in refused.message


# ---- loaded models ---------------------------------------------------------------------------------------


def kept(name: str) -> bool:
    return bool(re.search(r"lm_head|\.0\.self_attn\.o_proj", name))


def written(work: Path, kind: str, double: bool, functional) -> tuple[Path, Path, Path, int]:
    """Return (source, quantized folder, plain folder, matrices quantized) of a random Llama."""
    source = plain_folder(work / "source", LLAMA, torch.bfloat16)
    tensors = load_file(source / "model.safetensors")
    chosen = {
        n: None if kept(n) else SCHEMES[kind] for n, t in tensors.items() if t.ndim == 2 and "embed" not in n
    }
    assert bnb.refusals({n: (tuple(tensors[n].shape), s) for n, s in chosen.items()}) == []

    def stored(name, tensor):
        if chosen.get(name) is None:
            return None
        parts = tensors_of(
            bnb.pack(tensor.float().numpy(), SCHEMES[kind], "BF16", double), name.removesuffix("weight")
        )
        return parts, decoded_by_package(functional, parts, name).to(tensor.dtype)

    config = bnb.quantization_config({n.removesuffix(".weight"): s for n, s in chosen.items()}, double)
    return source, *write_both(work, source, stored, config), sum(s is not None for s in chosen.values())


def test_plain_from_pretrained_loads_them(functional, tmp_path):
    """Equal to what the package makes of the source; in the numbers it stands for, but for kernels in few bits."""
    cases = [("nf4", False), ("nf4", True), ("fp4", False), ("int8", False)]
    jobs, counts = [], []
    for kind, double in cases:
        source, packed, plain, count = written(tmp_path / f"{kind}{double}", kind, double, functional)
        kept_modules = json.loads((packed / "config.json").read_text())["quantization_config"][
            "llm_int8_skip_modules"
        ]
        options = {"llm_int8_skip_modules": kept_modules} | ({"load_in_8bit": True} if kind == "int8" else {
            "load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_use_double_quant": double,
        })  # fmt: skip
        jobs += [plain, packed, (packed, {"train": True}), (source, {"bnb": options})]
        counts.append(count)
    loaded = load_in_child(tmp_path / "child", *jobs)
    for number, (kind, double) in enumerate(cases):
        plain, packed, exact, package = loaded[4 * number : 4 * number + 4]
        assert loaded_whole(packed), packed["faults"]
        assert sum("bitsandbytes" in module for module in packed["kinds"].values()) == counts[number] == 13
        assert packed["kinds"] == package["kinds"]
        assert apart(packed, package) <= (0.01 if double else 0.0)
        assert apart(packed, plain) < (0.04 if kind == "int8" else 0.02)
        if kind != "int8":
            assert apart(exact, plain) < 1e-6
