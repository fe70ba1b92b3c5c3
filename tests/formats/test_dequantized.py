"""Quantized models as plain numbers: against the library's decoders, plain loops, and models that are run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.integrations import finegrained_fp8
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

sys.path.insert(0, str(Path(__file__).resolve().parent))
from quantized_models import (
    EVEN,
    fp8_folders,
    from_fp8,
    from_mxfp4,
    integer_folders,
    mxfp4_folders,
    to_fp8,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "structure"))
from expert_cuts import save_raw, stock, stored, write

from surgeon.calibrate.data import Sample
from surgeon.calibrate.settings import Settings
from surgeon.calibrate.walk import Walk
from surgeon.checkpoint.checkpoint import Checkpoint, open_path
from surgeon.derive import Derived, Source, plan_of
from surgeon.errors import InputError
from surgeon.execute import execute
from surgeon.experts.criteria import get
from surgeon.experts.masked import compare
from surgeon.experts.select import select
from surgeon.experts.statistics import RoutingStatistics, collect_statistics
from surgeon.formats import encoded, mxfp4
from surgeon.formats.dequantized import dequantized, is_dequantizable, runnable
from surgeon.formats.fp8_block import eight_bit_floats
from surgeon.structure.experts.cut import ExpertCut
from surgeon.structure.experts.find import experts_of
from surgeon.structure.experts.view import ExpertView
from surgeon.traits import quantized

SETTINGS = Settings(dtype="float32", batch_tokens=64, threads=1)
SAMPLES = [np.random.default_rng(n).integers(3, 67, length) for n, length in enumerate((13, 17, 17, 9))]
CODES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8", torch.int32: "I32",
    torch.int64: "I64", torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet():
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.set_verbosity(level)


def model_of(folder: Path, tensors: dict[str, torch.Tensor], scheme: dict | None = None, **config):
    """Write tensors of any type as a model and open it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_raw(
        folder / "model.safetensors",
        {n: (CODES[t.dtype], tuple(t.shape), t.contiguous().view(-1).view(torch.uint8).numpy().tobytes()) for n, t in tensors.items()},
    )  # fmt: skip
    (folder / "config.json").write_text(
        json.dumps(config | ({"quantization_config": scheme} if scheme else {}))
    )
    return open_path(folder)


def whole(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """Return a tensor of a view, read at once, in the type the view declares."""
    info = checkpoint.tensors[name]
    raw = checkpoint.read(name, 0, info.elements)
    if info.dtype == "BF16":
        assert raw.dtype == np.uint16
        return torch.from_numpy(raw.view(np.int16)).view(torch.bfloat16).reshape(info.shape)
    return torch.from_numpy(raw.copy()).reshape(info.shape)


def ranges_agree(checkpoint: Checkpoint, name: str, seed: int = 0) -> None:
    """Check that ranges of any place and length are those of the whole."""
    info, drawn = checkpoint.tensors[name], np.random.default_rng(seed)
    everything = checkpoint.read(name, 0, info.elements)
    assert len(checkpoint.read(name, 3, 3)) == 0
    for _ in range(12):
        start, stop = sorted(drawn.integers(0, info.elements + 1, 2).tolist())
        assert np.array_equal(checkpoint.read(name, start, stop), everything[start:stop])
    step = checkpoint.granularity(name)
    parts = [checkpoint.read(name, at, min(at + step, info.elements)) for at in range(0, info.elements, step)]
    assert np.array_equal(np.concatenate(parts), everything)


def same_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Check that two bfloat16 or float16 tensors hold the same bits, any NaN being equal to any other."""
    assert found.dtype == expected.dtype and found.shape == expected.shape
    nan = found.isnan()
    assert torch.equal(nan, expected.isnan())
    assert torch.equal(found.view(torch.int16)[~nan], expected.view(torch.int16)[~nan])


def drawn_bytes(*shape: int, seed: int = 0, top: int = 256) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, top, shape, np.uint8))


# ---- eight-bit floats ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "dtype"), [("F8_E4M3", torch.float8_e4m3fn), ("F8_E5M2", torch.float8_e5m2)]
)
def test_every_eight_bit_float_is_torchs(code, dtype):
    expected = torch.arange(256, dtype=torch.uint8).view(dtype).float().numpy()
    assert np.array_equal(eight_bit_floats(code), expected, equal_nan=True)
    assert np.array_equal(np.signbit(eight_bit_floats(code))[:128], np.signbit(expected)[:128])
    assert eight_bit_floats(code).sum() != 0 or np.isnan(eight_bit_floats(code)).any()


@pytest.mark.parametrize("size", [(128, 128), (16, 32), (5, 7), (1, 32)])
@pytest.mark.parametrize("shape", [(128, 256), (300, 200), (576, 131), (3, 5)])
def test_blocks_with_ragged_ends(shape, size, tmp_path, monkeypatch):
    monkeypatch.setattr(encoded, "CHUNK", 20_000)  # some of them in several steps
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    values, scales = to_fp8(weight, size)
    checkpoint = model_of(
        tmp_path, {"a.weight": values, "a.weight_scale_inv": scales}, {"quant_method": "fp8", "weight_block_size": size}
    )  # fmt: skip
    view = dequantized(checkpoint)
    assert list(view.tensors) == ["a.weight"] and view.tensors["a.weight"].shape == shape
    expected = from_fp8(values, scales, size)
    same_bits(whole(view, "a.weight"), expected)
    ranges_agree(view, "a.weight")
    # The library's own, for matrices that end inside a block: in float32, rounded once.
    theirs = finegrained_fp8._dequantize_fp8_weight(values, scales, list(size), torch.float32)
    same_bits(whole(view, "a.weight"), theirs.to(torch.bfloat16))
    assert (expected.float() - weight).abs().max() / weight.abs().max() < 0.04  # it is this matrix


@pytest.mark.parametrize("kind", ["F32", "BF16", "U8", "F8_E8M0"])
def test_the_librarys_dequantization_of_any_byte_and_scale(kind, tmp_path):
    values = drawn_bytes(64, 96).view(torch.float8_e4m3fn)
    scales = 10 ** torch.linspace(-30, 20, 4 * 3).reshape(4, 3)  # products under- and overflow bfloat16
    if kind in ("U8", "F8_E8M0"):
        scales = drawn_bytes(4, 3, seed=1, top=255)
    scales = scales.view(torch.float8_e8m0fnu) if kind == "F8_E8M0" else scales
    scales = scales.to(torch.bfloat16) if kind == "BF16" else scales
    checkpoint = model_of(
        tmp_path, {"a.weight": values, "a.weight_scale_inv": scales}, {"quant_method": "fp8", "weight_block_size": [16, 32]}
    )  # fmt: skip
    theirs = finegrained_fp8.Fp8Dequantize(None)._dequantize_one(values, scales, torch.bfloat16)
    same_bits(whole(dequantized(checkpoint), "a.weight"), theirs)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (24, 1), (24,), (1, 40), (3, 5)])
def test_scales_of_rows_columns_and_whole_matrices(shape, tmp_path):
    """Also blocks no configuration speaks of: the grid of scales gives their size."""
    values = drawn_bytes(24, 40, top=120).view(torch.float8_e4m3fn)
    scales = torch.rand(shape, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    checkpoint = model_of(tmp_path, {"a.weight": values, "a.weight_scale": scales, "a.input_scale": torch.ones(1)},
                          {"quant_method": "compressed-tensors", "format": "float-quantized"})  # fmt: skip
    view = dequantized(checkpoint)
    assert list(view.tensors) == ["a.weight"] and any("activations" in note for note in view.notes)
    down, across = {(3, 5): (8, 8), (24, 1): (1, 40), (24,): (1, 40), (1, 40): (24, 1)}.get(shape, (24, 40))
    grid = scales.reshape(-(-24 // down), -(-40 // across))
    same_bits(whole(view, "a.weight"), from_fp8(values, grid, (down, across)))
    ranges_agree(view, "a.weight")


@pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 1, 1), (3, 2, 3), (3, 20, 1), (3, 1, 40)])
def test_stacks_of_experts(shape, tmp_path):
    values = drawn_bytes(3, 20, 40, top=120).view(torch.float8_e4m3fn)
    scales = torch.rand(shape, generator=torch.Generator().manual_seed(3))
    name = "model.layers.0.mlp.experts.down_proj"
    checkpoint = model_of(
        tmp_path, {name: values, f"{name}_scale_inv": scales, f"{name}_activation_scale": torch.ones(3)},
        {"quant_method": "fp8", "weight_block_size": [16, 16]},
    )  # fmt: skip
    view = dequantized(checkpoint)
    assert list(view.tensors) == [name]
    size = {(3, 2, 3): (16, 16), (3, 20, 1): (1, 40), (3, 1, 40): (20, 1)}.get(shape, (20, 40))
    grid = scales.reshape(3, -(-20 // size[0]), -(-40 // size[1]))
    same_bits(
        whole(view, name), torch.stack([from_fp8(v, s, size) for v, s in zip(values, grid, strict=True)])
    )
    ranges_agree(view, name)


def test_scales_in_float16_give_float16(tmp_path):
    values = drawn_bytes(8, 16, top=120).view(torch.float8_e4m3fn)
    scales = torch.rand(8, 1).to(torch.float16)
    checkpoint = model_of(tmp_path, {"a.weight": values, "a.weight_scale": scales}, {"quant_method": "compressed-tensors"},
                          torch_dtype="float16", text_config={"dtype": "float16"})  # fmt: skip
    view = dequantized(checkpoint)
    assert view.tensors["a.weight"].dtype == "F16" and view.config["torch_dtype"] == "float16"
    same_bits(whole(view, "a.weight"), (values.float() * scales.float()).to(torch.float16))


# ---- four-bit floats ----------------------------------------------------------------------------------


def test_every_pair_and_exponent_is_the_librarys(tmp_path):
    """256 exponents x 256 bytes: also those that underflow, overflow, and stand for no number."""
    blocks = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 256, 16, 16).contiguous()
    scales = torch.arange(256, dtype=torch.uint8)[None, :, None].expand(1, 256, 16).contiguous()
    checkpoint = model_of(tmp_path, {"x_blocks": blocks, "x_scales": scales}, {"quant_method": "mxfp4"})
    view = dequantized(checkpoint)
    assert view.tensors["x"].shape == (1, 512, 256)
    same_bits(whole(view, "x"), convert_moe_packed_tensors(blocks, scales))


@pytest.mark.parametrize("block", [1, 3000, 1 << 22])
def test_any_range_of_any_expert(block, tmp_path, monkeypatch):
    monkeypatch.setattr(mxfp4, "BLOCK", block)
    monkeypatch.setattr(encoded, "STRIP", min(block, 1000))
    blocks, scales = drawn_bytes(3, 44, 6, 16), drawn_bytes(3, 44, 6, seed=1, top=140)
    checkpoint = model_of(tmp_path, {"x_blocks": blocks, "x_scales": scales}, {"quant_method": "mxfp4"})
    view = dequantized(checkpoint)
    assert view.granularity("x") == {1: 32 * 44, 3000: 64 * 44, 1 << 22: 192 * 44}[block]
    same_bits(whole(view, "x"), convert_moe_packed_tensors(blocks, scales))
    loops = from_mxfp4(blocks.numpy(), scales.numpy())
    same_bits(whole(view, "x"), torch.from_numpy(loops).to(torch.bfloat16))
    ranges_agree(view, "x")


# ---- what the view says --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    return fp8_folders(tmp_path_factory.mktemp("fp8"), (16, 16))


@pytest.fixture(scope="module")
def four_bit(tmp_path_factory):
    return mxfp4_folders(tmp_path_factory.mktemp("mxfp4"))


@pytest.fixture(scope="module")
def gptq(tmp_path_factory):
    return integer_folders(tmp_path_factory.mktemp("gptq"), "gptq")


@pytest.fixture(scope="module")
def integers(tmp_path_factory):
    return integer_folders(tmp_path_factory.mktemp("pack"), "pack")


NAMES = {"fp8": "fp8", "mxfp4": "mxfp4", "gptq": "gptq", "compressed-tensors": "compressed-tensors integers"}
"""quant_method -> name of the format."""


@pytest.fixture(params=["fp8", "four_bit", "gptq", "integers"])
def folders(request):
    return request.getfixturevalue(request.param)


def test_the_view_is_the_plain_model(folders):
    packed, plain = map(open_path, folders)
    view = dequantized(packed)
    assert isinstance(view, Checkpoint)
    assert {n: (i.dtype, i.shape, i.nbytes) for n, i in view.tensors.items()} == {
        n: (i.dtype, i.shape, i.nbytes) for n, i in plain.tensors.items()
    }
    for name, info in plain.tensors.items():
        assert view.tensors[name].name == name
        expected = plain.read_bytes(name, 0, info.nbytes).tobytes()
        assert stored(view, name) == expected and view.stored_dtype(name) == info.dtype
    assert quantized(view) is None and quantized(packed) is not None
    assert view.headers == packed.headers and view.folder == packed.folder and view.label == packed.label
    decoded = [name for name in view.tensors if view.computed(name)]
    assert decoded and all(
        name not in packed.tensors or packed.tensors[name].dtype == "F8_E4M3" for name in decoded
    )
    with pytest.raises(AssertionError):
        view.read_bytes(decoded[0], 0, 1)
    kind = NAMES[packed.config["quantization_config"]["quant_method"]]
    assert is_dequantizable(packed) == kind and view.formats == {kind: len(decoded)}
    assert any(f"{len(decoded)} quantized matrices" in note and "float16" in note for note in view.notes)


def test_a_plain_model_is_run_as_it_is(fp8):
    packed, plain = map(open_path, fp8)
    assert runnable(plain) is plain and is_dequantizable(plain) is None
    assert runnable(packed).tensors == dequantized(packed).tensors
    with pytest.raises(InputError, match="is not quantized") as caught:
        dequantized(plain)
    assert caught.value.code == "E445"


def test_the_configuration_speaks_of_no_quantization(tmp_path):
    tensors = {"x_blocks": drawn_bytes(1, 2, 1, 16), "x_scales": drawn_bytes(1, 2, 1)}
    scheme = {"quant_method": "mxfp4"}
    checkpoint = model_of(tmp_path / "a", tensors, scheme, vocab_size=7)
    assert dequantized(checkpoint).config == {"vocab_size": 7, "torch_dtype": "bfloat16"}
    assert checkpoint.config["quantization_config"] == scheme  # the source's is not touched
    nested = {"text_config": {"dtype": "float32", "quantization_config": scheme}, "compression_config": {}}
    checkpoint = model_of(tmp_path / "b", tensors, **nested)
    assert dequantized(checkpoint).config == {"text_config": {"dtype": "bfloat16"}}


def test_equal_bytes_read_in_other_blocks_are_another_model(tmp_path):
    values = drawn_bytes(48, 48, top=120).view(torch.float8_e4m3fn)
    tensors = {"a.weight": values, "a.weight_scale_inv": torch.rand(3, 3)}
    one, two = (
        dequantized(model_of(tmp_path / str(size), tensors, {"quant_method": "fp8", "weight_block_size": [size, size]}))
        for size in (16, 23)
    )  # fmt: skip
    assert one.identity != two.identity
    assert not torch.equal(whole(one, "a.weight"), whole(two, "a.weight"))
    again = dequantized(open_path(tmp_path / "16"))
    assert again.identity == one.identity


# ---- refusals ------------------------------------------------------------------------------------------

VALUES = drawn_bytes(32, 32, top=120).view(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("tensors", "scheme", "code", "says"),
    [
        ({"a.weight": VALUES}, {"quant_method": "fp8"}, "E446", "without a.weight_scale_inv"),
        ({"a.weight": VALUES, "a.weight_scale_inv": torch.rand(3, 2)}, {"quant_method": "fp8"}, "E446", "does not fit"),
        ({"a.weight": VALUES, "a.weight_scale_inv": torch.rand(4, 4)}, {"quant_method": "fp8", "weight_block_size": [16, 16]}, "E446", "does not fit"),
        ({"a.weight": VALUES, "a.weight_scale_inv": torch.rand(2, 1, 1)}, {"quant_method": "fp8"}, "E446", "does not fit"),
        ({"a.weight": VALUES, "a.weight_scale_inv": torch.ones(1, dtype=torch.int32)}, {"quant_method": "fp8"}, "E446", "does not fit"),
        ({"a.weight": VALUES[:0], "a.weight_scale_inv": torch.rand(1)}, {"quant_method": "fp8"}, "E446", "does not fit"),
        ({"a.weight": VALUES[0], "a.weight_scale_inv": torch.rand(1)}, {"quant_method": "fp8"}, "E446", "does not fit"),
        ({"a.weight": VALUES, "a.weight_scale": torch.rand(1), "a.weight_zero_point": torch.rand(1)}, None, "E445", "zero points"),
        ({"x_blocks": drawn_bytes(2, 3, 2, 16)}, {"quant_method": "mxfp4"}, "E446", "without x_scales"),
        ({"x_blocks": drawn_bytes(2, 3, 2, 16), "x_scales": drawn_bytes(2, 3, 1)}, {"quant_method": "mxfp4"}, "E446", "does not fit"),
        ({"x_blocks": drawn_bytes(2, 3, 2, 8), "x_scales": drawn_bytes(2, 3, 2)}, {"quant_method": "mxfp4"}, "E446", "does not fit"),
        ({"x": torch.rand(2, 64, 3), "x_blocks": drawn_bytes(2, 3, 2, 16), "x_scales": drawn_bytes(2, 3, 2)}, {"quant_method": "mxfp4"}, "E447", "both plain and quantized"),
        ({"a.weight": drawn_bytes(512, 1), "a.weight.absmax": torch.rand(16)}, {"quant_method": "hqq"}, "E445", "hqq"),
        ({"a.weight": drawn_bytes(512, 1), "a.weight.absmax": torch.rand(16)}, None, "E445", "no tensor is stored"),
        ({"a.weight": torch.rand(4, 4)}, {"quant_method": "fp8"}, "E445", "no tensor is stored"),
        ({"a.weight": VALUES, "a.weight_scale": torch.rand(1), "b.weight_packed": drawn_bytes(4, 4)}, {"quant_method": "compressed-tensors"}, "E446", "without b.weight_scale"),
        ({"a.weight": VALUES, "a.weight_scale": torch.rand(1), "b.weight": drawn_bytes(4, 4)}, {"quant_method": "fp8"}, "E445", "U8 values"),
        # NVFP4: the scales are eight-bit floats themselves
        ({"a.weight": drawn_bytes(32, 16), "a.weight_scale": VALUES[:, :2], "a.weight_scale_2": torch.rand(1)}, {"quant_method": "modelopt"}, "E445", "no tensor is stored"),
    ],
)  # fmt: skip
def test_what_is_refused(tensors, scheme, code, says, tmp_path):
    checkpoint = model_of(tmp_path, tensors, scheme)
    with pytest.raises(InputError) as caught:
        dequantized(checkpoint)
    assert caught.value.code == code and says in caught.value.message and caught.value.help
    assert is_dequantizable(checkpoint) is None
    with pytest.raises(InputError):
        runnable(checkpoint)


# ---- models that are run -----------------------------------------------------------------------------


class Nothing:
    def wants(self, module):
        return False

    def observe(self, *what):
        raise AssertionError


def states_of(checkpoint, settings=SETTINGS) -> list[torch.Tensor]:
    with Walk(checkpoint, SAMPLES, settings) as walk:
        walk.run(Nothing())
        return [hidden.clone() for _, hidden in walk.hidden()]


def stock_states(model) -> list[torch.Tensor]:
    with torch.no_grad():
        return [
            model.model(input_ids=torch.from_numpy(ids)[None], use_cache=False).last_hidden_state[0]
            for ids in SAMPLES
        ]


def test_a_walk_computes_what_the_stock_model_computes(folders):
    packed, plain = folders
    model = stock(plain)
    found = states_of(dequantized(open_path(packed)))
    for states, expected in zip(found, stock_states(model), strict=True):
        torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)
    streamed = states_of(
        dequantized(open_path(packed)), Settings(batch_tokens=64, threads=1, stream_experts=True)
    )
    for states, expected in zip(streamed, found, strict=True):
        torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError) as caught:  # what the view is for
        states_of(open_path(packed))
    assert caught.value.code == "E381"


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_transformers_loads_the_quantized_model_with_the_same_weights(kind, four_bit, tmp_path):
    """Its own dequantization while loading. It reads no matrix that ends inside a block, so these sizes are even."""
    packed, plain = fp8_folders(tmp_path, (8, 8), **EVEN) if kind == "fp8" else four_bit
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        packed, dtype=torch.bfloat16, attn_implementation="eager", quantization_config=(
            transformers.FineGrainedFP8Config(dequantize=True, weight_block_size=(8, 8)) if kind == "fp8"
            else transformers.Mxfp4Config(dequantize=True)
        ),
    )  # fmt: skip
    ours = write(dequantized(open_path(packed)), tmp_path / "ours")
    expected, found = theirs.state_dict(), stock(ours, torch.bfloat16).state_dict()
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor.to(found[name].dtype), found[name]), name
    assert load_file(ours / "model.safetensors").keys() == load_file(plain / "model.safetensors").keys()


def test_the_engine_writes_the_plain_model(folders, tmp_path):
    packed, plain = folders
    checkpoint = open_path(packed)
    view = dequantized(checkpoint)
    source = Source("model", checkpoint, str(packed))
    plan = plan_of(
        source, {"": Derived(view, {"method": "dequantize"}, "dequantize", {}, "plain")}, verb="prune"
    )
    execute(plan, tmp_path / "out", threads=2)
    found, expected = load_file(tmp_path / "out/model.safetensors"), load_file(plain / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(found[n].dtype == t.dtype and torch.equal(found[n], t) for n, t in expected.items())
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "quantization_config" not in config
    assert stock(tmp_path / "out").num_parameters() == stock(plain).num_parameters()


def samples() -> list[Sample]:
    return [Sample(ids, 0, "") for ids in SAMPLES]


def cut_by(statistics: RoutingStatistics, experts) -> ExpertCut:
    """Return the cut REAP makes of half of the experts."""
    score = get("reap").score
    kept = {}
    for layer in experts.layers:
        found = statistics.total(layer.index)
        kept[layer.index] = select(score(found), found.tokens, layer.count // 2, groups=experts.groups)
    return ExpertCut(kept)


def test_experts_are_scored_decoded_and_cut_as_they_are_stored(folders, tmp_path):
    packed, plain = map(open_path, folders)
    stored_experts, view = experts_of(packed), dequantized(packed)
    experts = experts_of(view)
    assert {layer.quantized for layer in stored_experts.layers} == {
        packed.config["quantization_config"]["quant_method"]
    }
    assert {layer.quantized for layer in experts.layers} == {None}
    statistics = collect_statistics(view, samples(), SETTINGS, experts)
    expected = collect_statistics(plain, samples(), SETTINGS, experts_of(plain))
    for layer in experts.running:
        ours, theirs = statistics.total(layer.index), expected.total(layer.index)
        assert ours.tokens.sum() and np.array_equal(ours.tokens, theirs.tokens)
        assert np.array_equal(ours.gated, theirs.gated) and np.array_equal(ours.norm, theirs.norm)
    statistics.save(tmp_path / "scores")
    assert RoutingStatistics.load(tmp_path / "scores", view).layers == statistics.layers
    with pytest.raises(InputError) as caught:
        RoutingStatistics.load(tmp_path / "scores", packed)
    assert caught.value.code == "E432"

    cut = cut_by(statistics, experts)
    pruned = ExpertView(packed, stored_experts, cut)
    assert not any(pruned.computed(name) for name in pruned.tensors)
    found = compare(view, experts, cut, dequantized(pruned), SAMPLES, SETTINGS)
    assert found.exact and found.max_difference == 0.0 and found.differs_from_unmasked > 0.05
    # The other order, decoded and then cut, is the same model.
    other = ExpertView(view, experts, cut)
    assert other.tensors.keys() == dequantized(pruned).tensors.keys()
    assert all(stored(other, name) == stored(dequantized(pruned), name) for name in other.tensors)
    # And the one that is written and opened again, still quantized.
    again = dequantized(open_path(write(pruned, tmp_path / "pruned")))
    assert all(stored(other, name) == stored(again, name) for name in other.tensors)
    assert not compare(view, experts, _wrong(cut, experts), dequantized(pruned), SAMPLES, SETTINGS).equal


def _wrong(cut: ExpertCut, experts) -> ExpertCut:
    """Return a cut that keeps another expert of one routing group in every layer."""
    size = experts.count // experts.groups
    kept = {}
    for layer, ids in cut.kept.items():
        gone = next(e for e in range(experts.count) if e not in ids and e // size == ids[0] // size)
        kept[layer] = tuple(sorted((gone, *ids[1:])))
    return ExpertCut(kept)


@pytest.mark.parametrize("factor", [8.0, 1.3])
def test_factors_in_scales_are_decoded_as_they_will_be_written(factor, folders, tmp_path):
    checkpoint = open_path(folders[0])
    experts = experts_of(checkpoint)
    if factor != 8.0 and experts.layers[0].quantized == "mxfp4":
        with pytest.raises(InputError, match="cannot be multiplied"):  # exponents take powers of two only
            ExpertView(checkpoint, experts, ExpertCut(scales={(1, 2): factor}))
        return
    view = ExpertView(checkpoint, experts, ExpertCut(scales={(1, 2): factor}))
    plain, found = dequantized(checkpoint), dequantized(view)
    written = dequantized(open_path(write(view, tmp_path / "written")))
    decoded = [name for name in found.tensors if "_proj" in name and not name.endswith("bias")]
    changed = []
    for name in decoded:
        one, two, before = (whole(model, name) for model in (found, written, plain))
        assert torch.equal(one, two)
        if not torch.equal(one, before):
            changed.append(name)
            each = (slice(None),) if one.ndim == 2 else (2,)
            torch.testing.assert_close(one[each].float(), before[each].float() * factor, rtol=0.01, atol=1e-6)
    assert len(changed) == 1 and "down_proj" in changed[0] and "layers.1." in changed[0]


READ = """
import sys
from pathlib import Path
from surgeon.checkpoint.checkpoint import open_path
from surgeon.formats.dequantized import dequantized
def peak():  # of this program alone; ru_maxrss is inherited from the parent
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
view = dequantized(open_path(Path(sys.argv[1])))
for name in view.tensors:
    view.read(name, 0, 10)  # tables
before, total, beside = peak(), 0, 0
for name, info in view.tensors.items():
    step = view.granularity(name)
    step = max(step, (1 << 20) // step * step)
    beside = max(beside, view.memory(name))
    for start in range(0, info.elements, step):
        total += view.read(name, start, min(start + step, info.elements)).nbytes
print(total, peak() - before, beside)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_a_large_model_is_decoded_in_little_memory(kind, tmp_path):
    """A matrix of 67 million values, or a stack of 201 million, block by block; never as a whole."""
    if kind == "fp8":
        tensors = {
            "a.weight": torch.ones(8192, 8192, dtype=torch.uint8).view(torch.float8_e4m3fn),
            "a.weight_scale_inv": torch.ones(64, 64),
        }
        scheme = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    else:
        tensors = {
            "x_blocks": torch.ones(16, 4096, 96, 16, dtype=torch.uint8),
            "x_scales": torch.full((16, 4096, 96), 127, dtype=torch.uint8),
        }
        scheme = {"quant_method": "mxfp4"}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": scheme}))
    done = subprocess.run([sys.executable, "-c", READ, str(tmp_path)], capture_output=True, text=True,
                          cwd=Path(__file__).parents[2])  # fmt: skip
    assert done.returncode == 0, done.stderr
    total, grown, beside = map(int, done.stdout.split())
    assert total == 2 * {"fp8": 8192**2, "mxfp4": 16 * 4096 * 3072}[kind]
    print(f"{grown / 1e6:.0f} MB (said: {beside / 1e6:.0f} MB) for {total / 1e6:.0f} MB")
    assert grown < total / 4 and grown < beside + 16e6


def test_a_model_that_says_no_type_is_read_in_that_of_its_plain_tensors():
    import numpy as np

    from surgeon.checkpoint.memory import MemoryCheckpoint
    from surgeon.formats.encoded import plain_dtype

    scale = np.ones(3, np.float32)
    wide = MemoryCheckpoint("wide", {"a.weight_scale": scale, "norm.weight": scale})
    half = MemoryCheckpoint("half", {"a.weight_scale": scale, "norm.weight": scale.astype(np.float16)})
    assert plain_dtype(wide, "a.weight_scale") == "F32" and plain_dtype(half, "a.weight_scale") == "BF16"
    wide.config = {"torch_dtype": "bfloat16"}
    assert plain_dtype(wide, "a.weight_scale") == "BF16"
    half.config = {"dtype": "float32"}
    assert plain_dtype(half, "a.weight_scale") == "F32"
