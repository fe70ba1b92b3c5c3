"""Integers packed into words, read as plain numbers: against Python's integers, bit by bit, and the library that packs them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from test_dequantized import model_of, ranges_agree, same_bits, whole

from surgeon.errors import InputError
from surgeon.formats import encoded, input_major
from surgeon.formats.dequantized import dequantized, is_dequantizable

AWQ = (0, 2, 4, 6, 1, 3, 5, 7)
"""Nibble of a word -> output of eight."""


def stream(codes: list[int], bits: int) -> list[int]:
    """Return the int32 words of a bit stream, as one long Python integer gives them."""
    total = sum(code << (bits * place) for place, code in enumerate(codes))
    words = -(-len(codes) * bits // 32)
    unsigned = [(total >> (32 * place)) & 0xFFFFFFFF for place in range(words)]
    return [word - (1 << 32) if word >> 31 else word for word in unsigned]


def rows_packed(codes: np.ndarray, bits: int) -> torch.Tensor:
    return torch.tensor([stream(row, bits) for row in codes.tolist()], dtype=torch.int32)


def columns_packed(codes: np.ndarray, bits: int) -> torch.Tensor:
    return rows_packed(codes.T, bits).T.contiguous()


def by_loops(codes, zeros, scales: torch.Tensor, group) -> torch.Tensor:
    """Return (code - zero) * scale, value by value: codes [out, in], zeros and scales [out, groups]."""
    out = torch.empty(codes.shape, dtype=torch.float64)
    for o, i in np.ndindex(*codes.shape):
        g = int(group[i])
        out[o, i] = (int(codes[o, i]) - int(zeros[o, g])) * float(scales[o, g])
    return out.to(scales.dtype if scales.dtype != torch.float32 else torch.bfloat16)


def drawn(shape, top, seed=0):
    return np.random.default_rng(seed).integers(0, top, shape)


def scales_of(shape, dtype):
    # float32: few bits, so that products are exact before they are rounded, as in the loops
    return torch.from_numpy(np.random.default_rng(9).random(shape)).to(torch.bfloat16 if dtype == torch.float32 else dtype).to(dtype)  # fmt: skip


# ---- GPTQ and AWQ --------------------------------------------------------------------------------------


def gptq_tensors(bits, shape, group, *, version="gptq", dtype=torch.float16, symmetric=False, order=True):
    """Return the tensors of a GPTQ matrix and the plain matrix."""
    outputs, inputs = shape
    groups = -(-inputs // group)
    codes, scales = drawn(shape, 1 << bits), scales_of((outputs, groups), dtype)
    zeros = drawn((outputs, groups), 1 << bits, 1)
    if symmetric:
        zeros[:] = 1 << (bits - 1)
    index = np.arange(inputs) // group
    if order:
        index = np.random.default_rng(2).permutation(index)
    held = (zeros - (version == "gptq")) % (1 << bits)
    tensors = {
        "a.qweight": columns_packed(codes.T, bits), "a.qzeros": rows_packed(held.T, bits), "a.scales": scales.T.contiguous(),
        "a.bias": torch.ones(outputs, dtype=dtype),
    }  # fmt: skip
    if order:
        tensors["a.g_idx"] = torch.from_numpy(index).to(torch.int32)
    return tensors, by_loops(codes, zeros, scales, index)


@pytest.mark.parametrize("block", [1, 3000, 1 << 22])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptq(bits, version, block, tmp_path, monkeypatch):
    monkeypatch.setattr(input_major, "BLOCK", block)
    monkeypatch.setattr(encoded, "STRIP", min(block, 1000))
    tensors, expected = gptq_tensors(bits, (80, 48), 16, version=version)
    scheme = {"quant_method": "gptq", "bits": bits, "group_size": 16, "checkpoint_format": version}
    view = dequantized(model_of(tmp_path, tensors, scheme, torch_dtype="float16"))
    assert list(view.tensors) == ["a.weight", "a.bias"] and view.tensors["a.weight"].shape == (80, 48)
    assert view.tensors["a.weight"].dtype == "F16" and view.config == {"torch_dtype": "float16"}
    assert view.granularity("a.weight") == {1: 32, 3000: 32, 1 << 22: 87360}[block] * 48
    same_bits(whole(view, "a.weight"), expected)
    ranges_agree(view, "a.weight")


@pytest.mark.parametrize("block", [1, 3000, 1 << 22])
def test_gptq_of_three_bits(block, tmp_path, monkeypatch):
    """Codes reach from one word into the next."""
    monkeypatch.setattr(input_major, "BLOCK", block)
    monkeypatch.setattr(encoded, "STRIP", min(block, 1000))
    tensors, expected = gptq_tensors(3, (96, 64), 16)
    scheme = {"quant_method": "gptq", "bits": 3, "group_size": 16}
    view = dequantized(model_of(tmp_path, tensors, scheme, torch_dtype="float16"))
    same_bits(whole(view, "a.weight"), expected)
    ranges_agree(view, "a.weight")


@pytest.mark.parametrize("options", [
    {"symmetric": True, "order": False}, {"dtype": torch.bfloat16}, {"dtype": torch.float32}, {"order": False, "group": 20},
    {"order": False, "group": 40},
])  # fmt: skip
def test_gptq_of_other_kinds(options, tmp_path):
    """Without stored groups, also where the last group is smaller; with one group; with scales of other types."""
    group = options.pop("group", 8)
    tensors, expected = gptq_tensors(4, (64, 48), group, **options)
    scheme = {"quant_method": "gptq", "bits": 4, "group_size": group}
    # Scales of float32 do not make a float32 model.
    checkpoint = model_of(tmp_path, tensors, scheme, torch_dtype="bfloat16")
    assert is_dequantizable(checkpoint) == "gptq"
    same_bits(whole(dequantized(checkpoint), "a.weight"), expected)
    del tensors["a.bias"]
    named = dequantized(model_of(tmp_path / "bare", tensors))  # no quantization_config: names say it
    if 48 % group == 0:
        same_bits(whole(named, "a.weight"), expected)


@pytest.mark.parametrize("block", [1, 1 << 22])
def test_awq(block, tmp_path, monkeypatch):
    monkeypatch.setattr(input_major, "BLOCK", block)
    monkeypatch.setattr(encoded, "STRIP", min(block, 1000))
    shape, group = (80, 48), 16
    codes, zeros, scales = drawn(shape, 16), drawn((80, 3), 16, 1), scales_of((80, 3), torch.float16)

    def packed(values):  # [rows, out]
        eights = values.reshape(len(values), -1, 8)
        return torch.tensor([[stream([int(eight[n]) for n in AWQ], 4)[0] for eight in row] for row in eights], dtype=torch.int32)  # fmt: skip

    tensors = {"a.qweight": packed(codes.T), "a.qzeros": packed(zeros.T), "a.scales": scales.T.contiguous()}
    scheme = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    checkpoint = model_of(tmp_path, tensors, scheme)
    view = dequantized(checkpoint)
    same_bits(whole(view, "a.weight"), by_loops(codes, zeros, scales, np.arange(48) // group))
    ranges_agree(view, "a.weight")
    assert is_dequantizable(checkpoint) == "awq"
    assert is_dequantizable(model_of(tmp_path / "v", tensors, {**scheme, "version": "gemv"})) is None


# ---- compressed-tensors ------------------------------------------------------------------------------


@pytest.mark.parametrize("zeros", ["none", "packed", "int8"])
@pytest.mark.parametrize(
    ("bits", "columns", "group"),
    [(4, 48, 16), (8, 48, 16), (2, 48, 16), (4, 45, 45), (8, 21, 21), (4, 40, 16)],
)
def test_packed_rows(bits, columns, group, zeros, tmp_path):
    """Also rows that end inside a word, one group a row, and a last group that is smaller."""
    rows, half = 21, 1 << (bits - 1)
    groups = -(-columns // group)
    codes, scales = drawn((rows, columns), 1 << bits), scales_of((rows, groups), torch.bfloat16)
    points = drawn((rows, groups), 1 << bits, 1) if zeros != "none" else np.full((rows, groups), half)
    tensors = {
        "a.weight_packed": rows_packed(codes, bits), "a.weight_scale": scales, "a.weight_shape": torch.tensor([rows, columns]),
    }  # fmt: skip
    if zeros == "packed":
        tensors["a.weight_zero_point"] = columns_packed(points, bits)
    if zeros == "int8":
        tensors["a.weight_zero_point"] = torch.from_numpy(points - half).to(torch.int8)
    scheme = {"quant_method": "compressed-tensors", "format": "pack-quantized",
              "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": bits, "group_size": group}}}}  # fmt: skip
    view = dequantized(model_of(tmp_path, tensors, scheme))
    assert list(view.tensors) == ["a.weight"] and view.tensors["a.weight"].shape == (rows, columns)
    same_bits(whole(view, "a.weight"), by_loops(codes, points, scales, np.arange(columns) // group))
    ranges_agree(view, "a.weight")


def test_rows_whose_inputs_were_reordered(tmp_path):
    codes, scales = drawn((8, 48), 16), scales_of((8, 3), torch.bfloat16)
    index = np.random.default_rng(2).permutation(np.arange(48) // 16)
    tensors = {
        "a.weight_packed": rows_packed(codes, 4), "a.weight_scale": scales, "a.weight_shape": torch.tensor([8, 48]),
        "a.weight_g_idx": torch.from_numpy(index).to(torch.int32),
    }  # fmt: skip
    view = dequantized(model_of(tmp_path, tensors, {"quant_method": "compressed-tensors"}))
    same_bits(whole(view, "a.weight"), by_loops(codes, np.full((8, 3), 8), scales, index))
    tensors["a.weight_g_idx"][7] = 3
    damaged = dequantized(model_of(tmp_path / "damaged", tensors, {"quant_method": "compressed-tensors"}))
    with pytest.raises(InputError, match="speaks of group 3") as caught:
        damaged.read("a.weight", 0, 5)
    assert caught.value.code == "E446"


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("shape", [(9, 1), (9,), (9, 3)])
def test_whole_bytes(shape, zeros, tmp_path):
    codes, scales = drawn((9, 24), 256) - 128, scales_of(shape, torch.float32)
    points = drawn(shape, 256, 1) - 128 if zeros else np.zeros(shape, int)
    tensors = {"a.weight": torch.from_numpy(codes).to(torch.int8), "a.weight_scale": scales}
    if zeros:
        tensors["a.weight_zero_point"] = torch.from_numpy(points).to(torch.int8)
    view = dequantized(model_of(tmp_path, tensors, {"quant_method": "compressed-tensors"}))
    groups = scales.numel() // 9
    group = np.arange(24) // (24 // groups)
    same_bits(whole(view, "a.weight"), by_loops(codes, points.reshape(9, -1), scales.reshape(9, -1), group))
    ranges_agree(view, "a.weight")


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 32), (2, 16), (4, None), (8, None)])
def test_the_librarys_own_packing(bits, group, symmetric, tmp_path):
    library = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    assert library
    strategy = "group" if group else "channel"
    args = QuantizationArgs(
        num_bits=bits, type="int", symmetric=symmetric, strategy=strategy, group_size=group
    )
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    groups = weight.unflatten(1, (-1, group or 96))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    packed = compressor.compress(state, scheme)
    expected = compressor.decompress(packed, scheme)["weight"]
    config = {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": args.model_dump(mode="json")}},
    }
    view = dequantized(model_of(tmp_path, {f"a.{name}": tensor for name, tensor in packed.items()}, config))
    assert list(view.tensors) == ["a.weight"]
    same_bits(whole(view, "a.weight"), expected)
    assert (expected.float() - weight.float()).abs().mean() < {2: 0.6, 4: 0.15, 8: 0.01}[bits]


@pytest.mark.parametrize("strategy", ["tensor", "channel", "block"])
def test_the_librarys_own_eight_bit_floats(strategy, tmp_path):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize

    args = QuantizationArgs(
        num_bits=8, type="float", strategy=strategy, block_structure=[16, 32] if strategy == "block" else None
    )
    weight = torch.randn(48, 96, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    shape = {"tensor": (1,), "channel": (48, 1), "block": (3, 3)}[strategy]
    scale = (0.005 + 0.01 * torch.rand(shape, generator=torch.Generator().manual_seed(1))).to(torch.bfloat16)
    zero = torch.zeros_like(scale).to(torch.float8_e4m3fn)
    codes = quantize(weight, scale, zero, args, dtype=torch.float8_e4m3fn)
    expected = dequantize(codes, scale, zero, args)
    config = {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": args.model_dump(mode="json")}},
    }
    view = dequantized(model_of(tmp_path, {"a.weight": codes, "a.weight_scale": scale}, config))
    same_bits(whole(view, "a.weight"), expected)


# ---- refusals ------------------------------------------------------------------------------------------

WORDS = torch.zeros(6, 80, dtype=torch.int32)
ZEROS = torch.zeros(3, 10, dtype=torch.int32)
HALVES = torch.ones(3, 80, dtype=torch.float16)
ROWS = torch.zeros(8, 6, dtype=torch.int32)
PLAIN = torch.tensor([8, 48])
SCALES = torch.ones(8, 3)


@pytest.mark.parametrize(
    ("tensors", "scheme", "code", "says"),
    [
        ({"a.qweight": WORDS, "a.scales": HALVES}, {"quant_method": "gptq"}, "E446", "without a.qzeros"),
        ({"a.qweight": WORDS, "a.qzeros": ZEROS}, {"quant_method": "gptq"}, "E446", "without a.scales"),
        ({"a.qweight": WORDS, "a.qzeros": ZEROS[:2], "a.scales": HALVES}, {"quant_method": "gptq"}, "E446", "does not fit"),
        ({"a.qweight": WORDS, "a.qzeros": ZEROS, "a.scales": HALVES, "a.g_idx": torch.zeros(47, dtype=torch.int32)}, {"quant_method": "gptq"}, "E446", "does not fit"),
        ({"a.qweight": WORDS[:0], "a.qzeros": ZEROS, "a.scales": HALVES}, {"quant_method": "gptq"}, "E446", "does not fit"),
        ({"a.weight_packed": ROWS[:0], "a.weight_scale": SCALES[:0], "a.weight_shape": torch.tensor([0, 48])}, None, "E446", "does not fit"),
        ({"a.qweight": WORDS[:5], "a.qzeros": ZEROS, "a.scales": HALVES}, {"quant_method": "gptq"}, "E446", "does not fit"),
        ({"a.qweight": torch.zeros(6, 32, dtype=torch.int32), "a.qzeros": torch.zeros(3, 1, dtype=torch.int32), "a.scales": HALVES[:, :32]}, {"quant_method": "gptq"}, "E445", "1 bit"),
        ({"a.qweight": WORDS, "a.qzeros": ZEROS, "a.scales": HALVES}, {"quant_method": "gptq", "checkpoint_format": "marlin"}, "E445", "marlin"),
        ({"a.qweight": WORDS, "a.qzeros": ZEROS, "a.scales": HALVES}, {"quant_method": "auto-round", "packing_format": "auto_round"}, "E445", "auto_round"),
        ({"a.qweight": WORDS, "a.qzeros": ZEROS, "a.scales": HALVES}, {"quant_method": "awq"}, "E445", "no tensor is stored"),
        ({"a.qweight": ZEROS.T.contiguous(), "a.qzeros": ZEROS, "a.scales": HALVES}, {"quant_method": "awq"}, "E446", "does not fit"),
        ({"a.weight_packed": ROWS, "a.weight_scale": SCALES}, None, "E446", "without a.weight_shape"),
        ({"a.weight_packed": ROWS, "a.weight_shape": PLAIN}, None, "E446", "without a.weight_scale"),
        ({"a.weight_packed": ROWS, "a.weight_scale": SCALES, "a.weight_shape": torch.tensor([9, 48])}, None, "E446", "does not fit"),
        ({"a.weight_packed": ROWS, "a.weight_scale": SCALES, "a.weight_shape": torch.tensor([8, 999])}, None, "E446", "does not fit"),
        ({"a.weight_packed": ROWS, "a.weight_scale": SCALES, "a.weight_shape": torch.tensor([8, 64])}, None, "E445", "codes of 3 bits"),
        ({"a.weight_packed": ROWS, "a.weight_scale": SCALES[:7], "a.weight_shape": PLAIN}, None, "E446", "does not fit"),
        ({"a.weight_packed": ROWS, "a.weight_scale": torch.ones(8, 5), "a.weight_shape": PLAIN}, None, "E446", "does not fit"),
        ({"a.weight_packed": ROWS, "a.weight_scale": SCALES, "a.weight_shape": PLAIN, "a.weight_zero_point": torch.zeros(2, 3, dtype=torch.int32)}, None, "E446", "does not fit"),
        ({"a.weight_packed": ROWS[:, :1], "a.weight_scale": SCALES[:, :1], "a.weight_shape": torch.tensor([8, 4])}, None, "E445", "bits"),
    ],
)  # fmt: skip
def test_what_is_refused(tensors, scheme, code, says, tmp_path):
    checkpoint = model_of(tmp_path, tensors, scheme)
    with pytest.raises(InputError) as caught:
        dequantized(checkpoint)
    assert caught.value.code == code and says in caught.value.message and caught.value.help
