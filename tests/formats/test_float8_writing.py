"""Eight-bit floats as they are written: against torch's type, the library that reads them, and stock transformers."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.naive_quantized.base import FloatQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "structure"))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import expert_models
from compressed_models import DTYPES, as_torch, dense_folder, loaded, logits, written

from surgeon.checkpoint.checkpoint import open_path
from surgeon.errors import InputError
from surgeon.formats.compressed_runtimes import refusals
from surgeon.formats.dequantized import dequantized
from surgeon.formats.float8_dynamic import (
    FLOAT8,
    Float8,
    e4m3_codes,
    layout,
    pack,
    quantization_config,
    quantize,
)
from surgeon.formats.fp8_block import eight_bit_floats


def by_torch(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def test_codes_are_those_of_torch():
    table = eight_bit_floats("F8_E4M3")
    positive = np.sort(table[:127])
    middles = ((positive[1:] + positive[:-1]) / 2).astype(np.float32)
    rng = np.random.default_rng(0)
    values = np.concatenate([
        positive, middles, np.nextafter(middles, np.float32(np.inf)), np.nextafter(middles, np.float32(0)),
        rng.standard_normal(20000).astype(np.float32) * 100, np.exp2(rng.uniform(-40, 12, 20000)).astype(np.float32),
        np.array([0, 1e-45, 1e-30, 447.9, 448, 463.9, 464, 465, 480, 1e30], dtype=np.float32),
    ])  # fmt: skip
    values = np.concatenate([values, -values])
    assert np.array_equal(e4m3_codes(values), by_torch(values))
    assert np.array_equal(e4m3_codes(table[:127]), np.arange(127))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_library_makes_the_same_of_a_matrix(dtype):
    weight = np.random.default_rng(3).standard_normal((37, 51)).astype(np.float32)
    weight[5] = 0
    weight[6] *= 1e-6
    made = quantize(weight, dtype)
    parts = pack(made, dtype)
    config = QuantizationConfig.model_validate(quantization_config({"a": FLOAT8}))
    scheme = config.config_groups["group_000"]
    preset = preset_name_to_scheme("FP8_DYNAMIC", scheme.targets)
    assert (scheme.weights, scheme.input_activations) == (preset.weights, preset.input_activations)
    state = {"weight": torch.from_numpy(weight), "weight_scale": torch.from_numpy(made.scales)}
    theirs = FloatQuantizationCompressor.compress(state, scheme)
    assert np.array_equal(theirs["weight"].view(torch.uint8).numpy(), parts[""])
    stored = {
        name: as_torch(parts[name.removeprefix("weight")], code)
        for name, code, _ in layout("weight", (37, 51), dtype=dtype)
    }
    assert all(tuple(stored[name].shape) == size for name, _, size in layout("weight", (37, 51), dtype=dtype))
    back = FloatQuantizationCompressor.decompress(stored, scheme)["weight"]
    assert back.dtype == DTYPES[dtype] and torch.equal(
        back, torch.from_numpy(made.values()).to(DTYPES[dtype])
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_error_is_that_of_three_bits_of_fraction(dtype):
    rng = np.random.default_rng(1)
    for magnitude in (1e-5, 1.0, 1e3):
        weight = (rng.standard_normal((16, 400)) * magnitude).astype(np.float32)
        made = quantize(weight, dtype)
        # Half a step of a number with three bits, or of the smallest numbers; scales lose 2**-9 by being rounded.
        bound = (
            np.maximum(np.abs(weight) / 16, 2.0**-10 * made.scales)
            + 2.0**-9 * np.abs(weight).max(1, keepdims=True) / 16
        )
        assert np.all(np.abs(made.values() - weight) <= bound)


def test_our_own_reader_gives_the_same_values(tmp_path):
    pair = written(tmp_path, dense_folder(tmp_path / "source"), lambda m: None if m == "lm_head" else FLOAT8)
    view, plain = dequantized(open_path(pair.packed)), open_path(pair.plain)
    assert set(view.tensors) == set(plain.tensors)
    for name, info in plain.tensors.items():
        assert np.array_equal(view.read(name, 0, info.elements), plain.read(name, 0, info.elements)), name


def a_token_at_a_time(module: torch.nn.Linear, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
    """Round the inputs of a module to eight-bit floats with a scale a token, in the model's type, by plain loops."""
    (hidden,) = inputs
    out = torch.empty_like(hidden)
    for place in np.ndindex(*hidden.shape[:-1]):
        scale = hidden[place].abs().max() / 448
        out[place] = (hidden[place] / scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(hidden.dtype) * scale
    return (out,)


def test_stock_transformers_runs_it_with_quantized_activations(tmp_path):
    source = dense_folder(tmp_path / "source")
    pair = written(tmp_path / "out", source, lambda m: None if m == "lm_head" else FLOAT8)
    got, plain = logits(loaded(pair.packed)), loaded(pair.plain)
    weights_only = logits(plain)
    for name, module in plain.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(a_token_at_a_time)
    assert torch.equal(got, logits(plain))
    assert 0.01 < (got - weights_only).norm() / weights_only.norm() < 0.2


@pytest.mark.parametrize("alone", [True, False], ids=["experts alone", "experts and the rest"])
def test_experts(tmp_path, alone):
    source = expert_models.moe_folder("qwen3_moe", dtype=torch.bfloat16)
    pair = written(
        tmp_path, source, lambda m: FLOAT8 if ".experts." in m or (not alone and "_proj" in m) else None
    )
    assert refusals(pair.matrices) == []
    model, want = loaded(pair.packed), loaded(pair.plain)
    got = logits(model)
    if alone:  # transformers quantizes no activations of experts
        assert torch.equal(got, logits(want))
    state, other = model.state_dict(), want.state_dict()
    assert set(other) <= set(state) and all(torch.equal(state[name], other[name]) for name in other)


def test_what_cannot_be_stored():
    for bad in (np.nan, np.inf):
        with pytest.raises(InputError) as caught:
            quantize(np.array([[1.0, bad]], dtype=np.float32))
        assert caught.value.code == "E457"
    good = quantize(np.ones((2, 4), dtype=np.float32))
    for codes, scales, code in (
        (np.full((2, 4), 0x7F, np.uint8), good.scales, "E457"),
        (good.codes, good.scales * np.float32(1.001), "E457"),
        (good.codes, good.scales[:, 0], "E455"),
    ):
        with pytest.raises(InputError) as caught:
            pack(Float8(codes, scales))
        assert caught.value.code == code
    with pytest.raises(InputError) as caught:
        layout("a.weight", (4, 4), FLOAT8, "F64")
    assert caught.value.code == "E454"
