"""Four-bit floats as they are written: against the library that reads them, plain loops, and stock transformers."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
from compressed_tensors.quantization.utils.helpers import calculate_qparams, generate_gparam

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "structure"))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import expert_models
from compressed_models import as_torch, dense_folder, far, loaded, written

from surgeon.errors import InputError
from surgeon.formats.compressed_runtimes import fused, refusals
from surgeon.formats.float4 import (
    MXFP4,
    NVFP4,
    Float4,
    layout,
    pack,
    quantization_config,
    quantize,
    shared_scale,
)
from surgeon.formats.scheme import Scheme

FOUR_BIT = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
COMPRESSORS = {"nvfp4": (NVFP4PackedCompressor, "NVFP4A16"), "mxfp4": (MXFP4PackedCompressor, "MXFP4A16")}


def scheme_of(scheme: Scheme):
    return QuantizationConfig.model_validate(quantization_config({"a": scheme})).config_groups["group_000"]


def stored(made: Float4) -> dict[str, torch.Tensor]:
    parts = pack(made)
    tensors = {}
    for name, code, size in layout("weight", made.codes.shape, made.scheme):
        tensors[name] = as_torch(parts[name.removeprefix("weight")], code)
        assert tuple(tensors[name].shape) == size
    assert len(tensors) == len(parts)
    return tensors


def uneven(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Return numbers whose groups differ by many powers of two, with ties and values at the ends of the range."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal(shape) * np.exp2(rng.integers(-9, 3, (shape[0], 1)))
    weight[0, :8] = [6, 5, 3.5, 2.5, 1.75, 1.25, 0.75, 0.25]
    weight[1, :8] = [-6, -5, -3.5, -2.5, -1.75, -1.25, -0.75, -0.25]
    return weight.astype(np.float32)


def their_scales(weight: np.ndarray, scheme: Scheme) -> dict[str, torch.Tensor]:
    """Return what the library's own functions choose for a matrix."""
    args = scheme_of(scheme).weights
    groups = torch.from_numpy(weight).unflatten(1, (-1, args.group_size))
    low, high = groups.amin(2), groups.amax(2)
    if scheme.kind == "mxfp4":
        return {"weight_scale": calculate_qparams(low, high, args)[0]}
    shared = torch.tensor(shared_scale([weight]))
    # The library multiplies by a reciprocal, which may round to a neighbour.
    assert torch.allclose(generate_gparam(low.min(), high.max()), shared, rtol=2.0**-23, atol=0)
    scales = calculate_qparams(low, high, args, global_scale=shared)[0]
    return {"weight_scale": scales.float(), "weight_global_scale": shared.reshape(1)}


@pytest.mark.parametrize("scheme", [NVFP4, MXFP4], ids=lambda s: s.name)
@pytest.mark.parametrize("seed", range(3))
def test_the_library_makes_the_same_bytes(scheme, seed):
    weight = uneven((24, 128), seed)
    compressor, preset = COMPRESSORS[scheme.kind]
    read = scheme_of(scheme)
    want = preset_name_to_scheme(preset, read.targets)
    assert read.weights.model_dump() == want.weights.model_dump() and read.input_activations is None
    theirs = compressor.compress({"weight": torch.from_numpy(weight), **their_scales(weight, scheme)}, read)
    ours = stored(quantize(weight, scheme))
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        kept = tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
        other = theirs[name].view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else theirs[name]
        assert torch.equal(kept, other.reshape(kept.shape)), name
    back = compressor.decompress(ours, read)["weight"]
    assert torch.equal(back, torch.from_numpy(quantize(weight, scheme).values()).to(torch.bfloat16))


@pytest.mark.parametrize("scheme", [NVFP4, MXFP4], ids=lambda s: s.name)
def test_every_value_is_the_nearest_there_is(scheme):
    weight = uneven((6, 64), 5)
    made = quantize(weight, scheme)
    size = 16 if scheme is NVFP4 else 32
    values = made.values()
    for o, i in np.ndindex(*weight.shape):
        if scheme is NVFP4:
            scale = float(
                torch.tensor(int(made.scales[o, i // size]), dtype=torch.uint8).view(torch.float8_e4m3fn)
            )
            step = np.float32(scale) / made.shared
        else:
            step = 2.0 ** (int(made.scales[o, i // size]) - 127)
        code = int(made.codes[o, i])
        assert values[o, i] == np.float32((-1) ** (code >> 3) * FOUR_BIT[code & 7] * step)
        best = min(abs(abs(float(weight[o, i])) - level * step) for level in FOUR_BIT)
        assert abs(float(weight[o, i]) - values[o, i]) <= best * (1 + 1e-5) + 1e-12


def test_ends_of_the_range():
    for scheme in (NVFP4, MXFP4):
        nothing = quantize(np.zeros((3, 64), np.float32), scheme)
        assert not nothing.values().any() and nothing.shared == 1
        half = uneven((4, 64))
        half[2:, :32] = 0
        back = quantize(half, scheme).values()
        assert not back[2:, :32].any() and np.isfinite(back).all()
        for magnitude in (1e-38, 1e-20, 1e20, 3e38):
            made = quantize((uneven((4, 64)) / 64 * magnitude).astype(np.float32), scheme)
            assert np.isfinite(made.values()).all() and np.isfinite(made.shared)
    # A power of two less than the largest at most: 7 and what is below ends at 6, more takes the next power.
    exact = [(6, 0), (6.99, 0), (7, 1), (4, 0), (3.99, 0), (3.49, -1), (1, -2)]
    for largest, power in exact:
        weight = np.zeros((1, 32), np.float32)
        weight[0, 3] = largest
        assert int(quantize(weight, MXFP4).scales[0, 0]) == 127 + power, largest


def test_matrices_that_are_loaded_as_one_share_a_scale():
    rng = np.random.default_rng(8)
    weights = {
        f"a.{n}_proj.weight": rng.standard_normal((8, 32)).astype(np.float32) * k
        for n, k in zip("qkv", (1, 3, 9), strict=True)
    }
    (group,) = fused(weights)
    shared = shared_scale(weights[name] for name in group)
    assert shared == np.float32(2688) / np.abs(np.concatenate(list(weights.values()))).max()
    for weight in weights.values():
        made = quantize(weight, NVFP4, shared)
        assert stored(made)["weight_global_scale"].item() == shared
        error = np.linalg.norm(made.values() - weight) / np.linalg.norm(weight)
        alone = quantize(weight, NVFP4)
        assert error < 1.1 * np.linalg.norm(alone.values() - weight) / np.linalg.norm(weight)


@pytest.mark.parametrize("scheme", [NVFP4, MXFP4], ids=lambda s: s.name)
def test_stock_transformers_computes_with_the_values(tmp_path, scheme):
    source = dense_folder(tmp_path / "source")
    pair = written(tmp_path / "out", source, lambda m: scheme)
    assert refusals(pair.matrices) == []
    assert far(pair) == 0


def test_other_types_are_refused_because_the_reader_fails(tmp_path):
    source = dense_folder(tmp_path / "source")
    pair = written(tmp_path / "out", source, lambda m: None if m == "lm_head" else MXFP4, "F16")
    with pytest.raises(RuntimeError, match="same dtype"):
        far(pair, "F16")


@pytest.mark.parametrize("scheme", [NVFP4, MXFP4], ids=lambda s: s.name)
def test_experts(tmp_path, scheme):
    """The stock reader forgets the shared scale of NVFP4: it loads, and the experts are wrong."""
    source = expert_models.moe_folder("qwen3_moe", dtype=torch.bfloat16, moe_intermediate_size=32)
    pair = written(tmp_path, source, lambda m: scheme if ".experts." in m else None)
    if scheme is MXFP4:
        assert refusals(pair.matrices) == [] and far(pair) == 0
        return
    errors = refusals(pair.matrices)
    assert errors and all("shared scale" in error.message for error in errors)
    name = "model.layers.0.mlp.experts.down_proj"
    got, want = (loaded(folder).get_parameter(name).float() for folder in (pair.packed, pair.plain))
    ratio = (got / want)[want != 0]
    assert ratio.min() > 100


def test_what_cannot_be_stored():
    good = np.ones((2, 64), np.float32)
    for weight, scheme, code in (
        (good[:, :40], NVFP4, "E455"),
        (good[:, :48], MXFP4, "E455"),
        (good, Scheme("int", 4, 32), "E454"),
        (np.where(good > 0, np.nan, good), NVFP4, "E457"),
        (np.where(good > 0, np.inf, good), MXFP4, "E457"),
    ):
        with pytest.raises(InputError) as caught:
            quantize(weight, scheme)
        assert caught.value.code == code
    with pytest.raises(InputError, match="NaN"):
        shared_scale([good, np.where(good > 0, np.nan, good)])
    made = quantize(good, NVFP4)
    with pytest.raises(InputError) as caught:
        pack(Float4(NVFP4, made.codes, made.scales[:, :2], made.shared))
    assert caught.value.code == "E455"
