"""Blocks of ggml: what is packed is what the codes say, read by the format's own library."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from surgeon.errors import EnvironmentFault, InputError
from surgeon.formats import float4, gguf_blocks
from surgeon.formats.scheme import Codes, Scheme

library = pytest.importorskip("gguf")

TYPE = {"Q4_0": (4, True), "Q4_1": (4, False), "Q5_0": (5, True), "Q5_1": (5, False), "Q8_0": (8, True)}


def scheme_of(kind: str) -> Scheme:
    bits, symmetric = TYPE[kind]
    return Scheme("int", bits, 32, symmetric)


def draw(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def random_codes(kind: str, rows: int, columns: int, seed: int = 1) -> Codes:
    """Every code there is, scales of all magnitudes."""
    rng, scheme = np.random.default_rng(seed), scheme_of(kind)
    codes = rng.integers(0, 2**scheme.bits, (rows, columns)).astype(np.uint8)
    scales = np.exp(rng.uniform(-9, 5, (rows, columns // 32))).astype(np.float16).astype(np.float32)
    zeros = np.full(scales.shape, 2 ** (scheme.bits - 1), np.uint8)
    if not scheme.symmetric:
        zeros = rng.integers(0, 2**scheme.bits, scales.shape).astype(np.uint8)
    return Codes(scheme, codes, scales, zeros)


def read(blocks: np.ndarray, kind: str) -> np.ndarray:
    return library.quants.dequantize(blocks, library.GGMLQuantizationType[kind])


def bits_of(block: np.ndarray, kind: str) -> tuple[list[int], float, float]:
    """Codes, d and m of one block, by the layout in words: plain Python, one code at a time."""
    raw = block.tobytes()
    numbers = np.frombuffer(raw[:4], dtype=np.float16)
    scale, smallest, place = float(numbers[0]), 0.0, 2
    if kind in ("Q4_1", "Q5_1"):
        smallest, place = float(numbers[1]), 4
    if kind == "Q8_0":
        return [(byte - 256 if byte > 127 else byte) + 128 for byte in raw[place:]], scale, smallest
    fifth = 0
    if kind.startswith("Q5"):
        fifth, place = int.from_bytes(raw[place : place + 4], "little"), place + 4
    codes = []
    for j in range(32):
        byte = raw[place + j % 16]
        codes.append((byte & 15 if j < 16 else byte >> 4) | (fifth >> j & 1) << 4)
    return codes, scale, smallest


def test_sizes_are_those_of_the_library():
    for name, kind in gguf_blocks.TYPES.items():
        own = library.GGMLQuantizationType[name]
        assert (kind.number, (kind.values, kind.bytes)) == (own.value, library.GGML_QUANT_SIZES[own])
    assert library.GGML_QUANT_VERSION == gguf_blocks.QUANTIZATION_VERSION
    names = {"F32": "ALL_F32", "MXFP4": "MOSTLY_MXFP4_MOE", "Q3_K": "MOSTLY_Q3_K_S", "Q4_K": "MOSTLY_Q4_K_S", "Q5_K": "MOSTLY_Q5_K_S"}  # fmt: skip
    for name, kind in gguf_blocks.TYPES.items():
        assert kind.file_type == library.LlamaFileType[names.get(name, f"MOSTLY_{name}")].value


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_0", "Q8_0"])
def test_symmetric_codes_are_stored_exactly(kind):
    codes = random_codes(kind, 24, 320)
    blocks = gguf_blocks.pack(codes)
    assert blocks.dtype == np.uint8 and blocks.shape == gguf_blocks.layout("a", (24, 320), codes.scheme)[0][2]
    assert np.array_equal(read(blocks, kind), codes.values())


@pytest.mark.parametrize("kind", ["Q4_1", "Q5_1"])
def test_asymmetric_codes_move_by_the_rounding_of_the_smallest_value_alone(kind):
    codes = random_codes(kind, 200, 320)
    found = read(gguf_blocks.pack(codes), kind).astype(np.float64)
    scales = np.repeat(codes.scales, 32, 1).astype(np.float64)
    steps = np.abs(found - codes.values()) / scales
    assert 0 < steps.max() <= (2**codes.scheme.bits - 1) / 2**11
    # Exactly: code * d + float16(-zero * d).
    smallest = np.repeat((-codes.zeros.astype(np.float32) * codes.scales).astype(np.float16), 32, 1)
    assert np.array_equal(
        found, (codes.codes * scales + smallest.astype(np.float64)).astype(np.float32).astype(np.float64)
    )
    # With scales of few digits nothing moves at all.
    short = np.exp2(np.floor(np.log2(codes.scales)))
    exact = Codes(codes.scheme, codes.codes, short, codes.zeros)
    assert np.array_equal(read(gguf_blocks.pack(exact), kind), exact.values())


@pytest.mark.parametrize("kind", TYPE)
def test_every_bit_lies_where_the_layout_says(kind):
    codes = random_codes(kind, 3, 96, seed=7)
    blocks = gguf_blocks.pack(codes).reshape(3, 3, -1)
    for row in range(3):
        for block in range(3):
            found, scale, smallest = bits_of(blocks[row, block], kind)
            assert found == codes.codes[row, 32 * block : 32 * block + 32].tolist()
            assert scale == codes.scales[row, block]
            wanted = 0.0 if codes.scheme.symmetric else float(np.float16(-codes.scales[row, block] * codes.zeros[row, block]))  # fmt: skip
            assert smallest == wanted


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_0", "Q8_0"])
def test_the_librarys_own_codes_pack_to_the_librarys_bytes(kind):
    weight = draw(16, 128)
    wanted = library.quants.quantize(weight, library.GGMLQuantizationType[kind])
    blocks = wanted.reshape(16, 4, -1)
    parts = [[bits_of(block, kind) for block in row] for row in blocks]
    codes = np.array([[part[0] for part in row] for row in parts], np.uint8).reshape(16, 128)
    scales = np.array([[part[1] for part in row] for row in parts], np.float32)
    scheme = scheme_of(kind)
    ours = Codes(scheme, codes, scales, np.full(scales.shape, 2 ** (scheme.bits - 1), np.uint8))
    assert np.array_equal(gguf_blocks.pack(ours), wanted)


@pytest.mark.parametrize("kind", [*TYPE, "MXFP4"])
def test_plain_rounding_is_the_librarys_with_and_without_ggml(kind, monkeypatch):
    weight = draw(9, 256, seed=3)
    weight[2, 32:64] = 0
    wanted = library.quants.quantize(weight, library.GGMLQuantizationType[kind])
    for threads in (1, 2, 40):
        assert np.array_equal(gguf_blocks.quantize(weight, kind, threads=threads), wanted)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "xllamacpp" else find(name))
    assert np.array_equal(gguf_blocks.quantize(weight, kind), wanted)
    assert not gguf_blocks.dequantize(wanted, kind)[2, 32:64].any()


KNOWN = {
    "Q2_K": 0.31,
    "Q3_K": 0.17,
    "Q4_K": 0.08,
    "Q5_K": 0.04,
    "Q6_K": 0.02,
    "IQ4_NL": 0.085,
    "IQ4_XS": 0.085,
}


@pytest.mark.parametrize("kind", KNOWN)
def test_types_of_ggml_alone_are_near_their_weights(kind):
    pytest.importorskip("xllamacpp")
    assert {name for name, one in gguf_blocks.TYPES.items() if one.library} == set(KNOWN)
    weight = draw(32, 512)
    blocks = gguf_blocks.quantize(weight, kind)
    assert blocks.shape == (32, gguf_blocks.row_bytes(kind, 512))
    error = np.linalg.norm(gguf_blocks.dequantize(blocks, kind) - weight) / np.linalg.norm(weight)
    assert 0.5 * KNOWN[kind] < error < KNOWN[kind]
    # Rows do not depend on each other: pieces give the same bytes.
    assert np.array_equal(gguf_blocks.quantize(weight[5:9], kind), blocks[5:9])


def test_types_of_ggml_alone_need_the_library(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "xllamacpp" else find(name))
    gguf_blocks._ggml.cache_clear()
    assert gguf_blocks.can_quantize("Q4_0") and not gguf_blocks.can_quantize("Q4_K")
    with pytest.raises(EnvironmentFault, match="ggml itself") as refused:
        gguf_blocks.quantize(draw(1, 256), "Q4_K")
    gguf_blocks._ggml.cache_clear()
    assert refused.value.code == "E512" and "model-surgeon[gguf]" in (refused.value.help or "")


def test_mxfp4_numbers_are_stored_exactly():
    weight = draw(12, 160) * np.exp(draw(12, 160, seed=4))
    weight[0, :32] = 0
    matrix = float4.quantize(weight, float4.MXFP4)
    assert np.array_equal(read(gguf_blocks.pack_mxfp4(matrix), "MXFP4"), matrix.values())


@pytest.mark.parametrize(
    ("scheme", "shape", "word"),
    [
        (Scheme("int", 4, 128), (4, 128), "one scale for 32"),
        (Scheme("int", 8, 32, False), (4, 64), "no zero points"),
        (Scheme("int", 3, 32), (4, 64), "4, 5 and 8 bits"),
        (Scheme("nf4", 4, 0), (4, 64), "4, 5 and 8 bits"),
        (Scheme("int", 4, 32), (4, 48), "blocks of 32 do not divide its 48"),
        (Scheme("int", 4, 32), (2, 4, 64), "shape"),
    ],
)
def test_what_has_no_blocks_is_refused(scheme, shape, word):
    with pytest.raises(InputError, match=word) as refused:
        gguf_blocks.layout("model.layers.0.mlp.up_proj.weight", shape, scheme)
    assert refused.value.code == "E466" and "up_proj" in str(refused.value)


def test_scales_that_the_file_cannot_hold_are_refused():
    codes = random_codes("Q4_1", 2, 64)
    codes.scales[0, 0], codes.zeros[0, 0] = 30000.0, 15
    with pytest.raises(InputError, match="range of float16"):
        gguf_blocks.pack(codes)
    codes = random_codes("Q4_0", 2, 64)
    codes.scales[1, 1] = np.float32(1.0001)
    with pytest.raises(InputError, match="not rounded to float16"):
        gguf_blocks.pack(codes)
    codes = random_codes("Q4_0", 2, 64)
    codes.zeros[1, 1] = 7
    with pytest.raises(InputError, match="not in the middle"):
        gguf_blocks.pack(codes)
    with pytest.raises(InputError, match="NaN"):
        gguf_blocks.quantize(np.full((1, 32), np.nan, np.float32), "Q8_0")


def test_names_carry_the_type():
    assert gguf_blocks.stored_name("a.b.weight", "Q4_0") == "a.b.weight.Q4_0"
    assert gguf_blocks.parse_name("a.b.weight.Q4_0") == ("a.b.weight", "Q4_0")
    assert gguf_blocks.parse_name("a.b.weight") is None and gguf_blocks.parse_name("a.F32") is None
