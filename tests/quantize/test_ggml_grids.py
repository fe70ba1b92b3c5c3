"""Grids of files of llama.cpp: smallest values in float16 without whole zero points, scales of either sign, nothing lost in packing."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from surgeon.checkpoint.checkpoint import open_path
from surgeon.errors import InputError
from surgeon.formats import gguf_blocks
from surgeon.formats.compressed_runtimes import Reader
from surgeon.formats.scheme import Scheme
from surgeon.kernels.cast import widen
from surgeon.quantize import awq_scales, forms, gptq, grids, rtn

library = pytest.importorskip("gguf")

SCHEMES = {
    "Q4_0": Scheme("int", 4, 32), "Q4_1": Scheme("int", 4, 32, False), "Q5_0": Scheme("int", 5, 32),
    "Q5_1": Scheme("int", 5, 32, False), "Q8_0": Scheme("int", 8, 32),
}  # fmt: skip


def drawn(kind: str) -> np.ndarray:
    rng = np.random.default_rng(5)
    if kind == "trained":
        from pathlib import Path

        held = open_path(Path(__file__).resolve().parents[1] / "models" / "long")
        name = "model.layers.1.self_attn.q_proj.weight"
        info = held.tensors[name]
        return widen(held.read(name, 0, info.elements), info.dtype).astype(np.float32).reshape(info.shape)
    found = {
        "normal": lambda: rng.standard_normal((48, 256)), "heavy": lambda: rng.standard_t(3, (48, 256)),
        "shifted": lambda: rng.standard_normal((48, 256)) + 1.5, "small": lambda: 1e-3 * rng.standard_normal((48, 256)),
        "far": lambda: 1000 + rng.standard_normal((48, 256)), "positive": lambda: np.abs(rng.standard_normal((48, 256))),
    }[kind]()  # fmt: skip
    return found.astype(np.float32)


def stored(codes, kind: str) -> np.ndarray:
    return library.quants.dequantize(gguf_blocks.pack(codes), library.GGMLQuantizationType[kind])


def apart(values: np.ndarray, weight: np.ndarray) -> float:
    return float(np.linalg.norm(values.astype(np.float64) - weight) / np.linalg.norm(weight))


@pytest.mark.parametrize("draw", ["normal", "heavy", "shifted", "small", "far", "positive", "trained"])
@pytest.mark.parametrize("kind", SCHEMES)
def test_never_worse_than_the_quantizer_of_the_gguf_library(kind, draw):
    weight, scheme = drawn(draw), SCHEMES[kind]
    own = library.GGMLQuantizationType[kind]
    theirs = apart(library.quants.dequantize(library.quants.quantize(weight, own), own), weight)
    plain = rtn.quantize(torch.from_numpy(weight), scheme, scale_dtype="GGML", clip=False)
    searched = rtn.quantize(torch.from_numpy(weight), scheme, scale_dtype="GGML", clip=True)
    assert apart(stored(plain, kind), weight) <= theirs * 1.0003
    assert apart(stored(searched, kind), weight) <= apart(stored(plain, kind), weight) * 1.0003
    before = rtn.quantize(torch.from_numpy(weight), scheme, scale_dtype="F16", clip=False)
    if draw != "far":
        assert apart(stored(plain, kind), weight) < apart(stored(before, kind), weight)


@pytest.mark.parametrize("kind", SCHEMES)
def test_the_file_holds_the_values_that_were_chosen(kind):
    scheme = SCHEMES[kind]
    for draw in ("normal", "shifted", "small"):
        weight = drawn(draw)
        codes = rtn.quantize(torch.from_numpy(weight), scheme, scale_dtype="GGML", clip=False)
        assert codes.zeros.dtype == (np.uint8 if scheme.symmetric else np.float32)
        step = np.repeat(np.abs(codes.scales), 32, 1)
        assert (np.abs(stored(codes, kind) - codes.values()) <= 2e-6 * step + 1e-6 * np.abs(weight)).all()
        # The nearest of the grid: no other code is closer to a weight.
        lost = np.abs(codes.values() - weight)
        for moved in (-1, 1):
            other = codes.codes.astype(int) + moved
            there = (other - np.repeat(codes.zeros.astype(np.float32), 32, 1)) * np.repeat(
                codes.scales, 32, 1
            )
            inside = (other >= 0) & (other < 2**scheme.bits)
            assert (lost <= np.abs(there - weight) + 1e-5 * step)[inside].all()


def test_the_extreme_weight_of_a_symmetric_group_is_code_zero():
    weight = drawn("normal")
    codes = rtn.quantize(torch.from_numpy(weight), SCHEMES["Q4_0"], scale_dtype="GGML")
    groups = weight.reshape(48, 8, 32)
    place = np.abs(groups).argmax(2)
    extreme = np.take_along_axis(groups, place[..., None], 2)[..., 0]
    assert (np.take_along_axis(codes.codes.reshape(48, 8, 32), place[..., None], 2) == 0).all()
    assert (
        np.allclose(-8 * codes.scales, extreme, rtol=2**-11)
        and (codes.scales < 0).any()
        and (codes.scales > 0).any()
    )


@pytest.mark.parametrize("value", [0.0, 3.25, -0.1, 1e-7])
def test_groups_of_one_value(value):
    weight = torch.full((2, 64), value)
    for kind, scheme in SCHEMES.items():
        codes = rtn.quantize(weight, scheme, scale_dtype="GGML", clip=False)
        assert np.abs(stored(codes, kind) - value).max() <= max(abs(value) * 1e-3, 2.0**-21 / 2)


def test_smallest_values_beyond_float16_are_refused():
    with pytest.raises(InputError, match="range") as refused:
        grids.grid(torch.full((1, 32), -70000.0), SCHEMES["Q4_1"], clip=False, scale_dtype="GGML")
    assert refused.value.code == "E453"


@pytest.mark.parametrize("kind", SCHEMES)
def test_gptq_makes_up_for_errors_on_such_grids(kind):
    draw = torch.Generator().manual_seed(2)
    weight = torch.randn(64, 128, generator=draw) * 0.02
    inputs = torch.randn(900, 128, generator=draw) @ (
        torch.randn(128, 128, generator=draw) / 11 + 0.5 * torch.eye(128)
    )
    hessian, scheme = inputs.T @ inputs / 900, SCHEMES[kind]

    def loss(codes) -> float:
        off = torch.from_numpy(stored(codes, kind)) - weight
        return float((off @ hessian * off).sum() / (weight @ hessian * weight).sum())

    codes, record = gptq.quantize(weight, hessian, scheme, scale_dtype="GGML", clip=False)
    assert record.method == "gptq" and loss(codes) == pytest.approx(codes.loss, rel=2e-3)
    plain = rtn.quantize(weight, scheme, scale_dtype="GGML", clip=False)
    before, _ = gptq.quantize(weight, hessian, scheme, scale_dtype="F16", clip=False)
    assert loss(codes) < 0.8 * loss(plain) and loss(codes) < loss(before)


def test_moving_weights_to_whole_zero_points_changes_no_error():
    weight = torch.from_numpy(drawn("shifted"))
    scales, zeros = grids.grid(weight, SCHEMES["Q4_1"], clip=False, scale_dtype="GGML")
    moved, whole = grids.on_whole_zeros(weight, scales, zeros)
    assert torch.equal(whole, whole.round()) and not torch.equal(zeros, whole)
    codes = grids.nearest(moved.reshape(48, 8, 32), scales[..., None], whole[..., None], 4)
    there = ((codes - whole[..., None]) * scales[..., None]).reshape(weight.shape) - moved
    here = ((codes - zeros[..., None]) * scales[..., None]).reshape(weight.shape) - weight
    assert torch.allclose(there, here, atol=1e-6)
    same, zero = grids.on_whole_zeros(
        weight, *(given := grids.grid(weight, SCHEMES["Q4_1"], clip=False, scale_dtype="F16"))
    )
    assert same is weight and zero is given[1]


def test_the_search_for_scales_rounds_on_the_same_grid():
    weight = torch.from_numpy(drawn("shifted"))
    reader = awq_scales.Reader("p", weight, torch.eye(256), SCHEMES["Q4_1"], "F32", "m")
    found = awq_scales._rounded(reader, torch.ones(256), "GGML", False)
    wanted = rtn.quantize(weight, SCHEMES["Q4_1"], scale_dtype="GGML", clip=False).values()
    assert np.allclose(found.numpy(), wanted, atol=1e-6)


def test_the_form_asks_for_such_grids():
    assert forms.get("gguf", Reader(), "llama").scale_dtype == "GGML"
    assert grids.STORED["GGML"] is torch.float16 and importlib.util.find_spec("gguf")
