"""Cut mixtures of experts: stock transformers loads them and computes what the source computes without what is gone."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent))
import expert_models
from expert_cuts import (
    COUNT,
    folder_of,
    logits,
    masked_logits,
    opened,
    save_raw,
    stock,
    stored,
    switched_off,
    tensors_of,
    uneven_cut,
    write,
)
from expert_models import HIDDEN, WIDTH

from surgeon.checkpoint.checkpoint import open_path
from surgeon.checkpoint.memory import MemoryCheckpoint
from surgeon.derive import Derived, Source, plan_of
from surgeon.errors import InputError, UsageError
from surgeon.execute import execute
from surgeon.structure.experts.check import alignment_notes, check, nearest_counts, valid_counts
from surgeon.structure.experts.config import pruned_config
from surgeon.structure.experts.cut import ExpertCut
from surgeon.structure.experts.find import experts_of
from surgeon.structure.experts.footprint import bytes_after, bytes_of_expert, bytes_outside, parameters_after
from surgeon.structure.experts.view import ExpertView

ROUTED = tuple(f for f in expert_models.FAMILIES if f != "jetmoe")
"""Families that can lose whole experts; JetMoE counts its attention by the same number."""
QUICK = ("mixtral", "deepseek_v3", "ernie4_5_moe", "gpt_oss")
"""Families of the default run: single experts, groups, a bias of two axes, stacks with everything unusual."""
BOUND = ("hunyuan_v1_moe", "llama4_text", "llama4", "jamba", "deepseek_v4")
"""Families whose experts cannot be narrowed, because their width is somebody else's, too."""
TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@pytest.fixture(autouse=True)
def _quiet():
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    yield
    transformers.utils.logging.set_verbosity(level)


def quick(families):
    """Mark all but a few families as slow."""
    return [pytest.param(f, marks=[] if f in QUICK else [pytest.mark.slow]) for f in families]


def channels_of(experts, cut, width, seed=0):
    """Return ``width`` drawn channels for every expert, other ones in each."""
    drawn = random.Random(seed)
    return {
        (layer.index, expert): tuple(sorted(drawn.sample(range(experts.width), width)))
        for layer in experts.layers
        for expert in cut.experts(layer.index, layer.count)
    }


# ---- whole experts, every family --------------------------------------------------------------------


@pytest.mark.parametrize("family", quick(ROUTED))
def test_a_cut_model_is_the_masked_original(family, tmp_path):
    """Stock transformers loads it strictly, and no logit differs in any bit; either storage of the same weights."""
    outputs = {}
    for storage in ("hub", "fused"):
        checkpoint, experts = opened(family, storage=storage)
        cut = uneven_cut(experts)
        view = ExpertView(checkpoint, experts, cut)
        assert not any(view.computed(name) for name in view.tensors)
        folder = write(view, tmp_path / storage)
        outputs[storage] = logits(stock(folder))
        if storage == "hub":
            original = stock(checkpoint.folder)
            expected, whole = masked_logits(original, experts, cut), logits(original)
            after = experts_of(open_path(folder))
            assert after.count == len(next(iter(cut.kept.values()))) and after.record == experts.record
            assert (after.top_k, after.width, after.groups) == (experts.top_k, experts.width, experts.groups)
    assert torch.equal(outputs["hub"], expected) and torch.equal(outputs["fused"], expected)
    assert float((whole - expected).abs().max()) > 0.1  # what was removed mattered


def test_every_kept_tensor_is_byte_for_byte_the_original():
    checkpoint, experts = opened("deepseek_v3", dtype=torch.bfloat16)
    cut = uneven_cut(experts)
    view = ExpertView(checkpoint, experts, cut)
    source = tensors_of(checkpoint.folder)
    for layer in experts.layers:
        kept = cut.kept[layer.index]
        for place, expert in enumerate(kept):
            for part in ("gate_proj", "up_proj", "down_proj"):
                old, new = (f"{layer.prefix}experts.{number}.{part}.weight" for number in (expert, place))
                assert stored(view, new) == source[old].tobytes() and view.source_names[new] == old
        assert stored(view, f"{layer.prefix}gate.weight") == source[f"{layer.prefix}gate.weight"][list(kept)].tobytes()  # fmt: skip
        assert f"{layer.prefix}experts.{len(kept)}.up_proj.weight" not in view.tensors
    outside = [name for name in source if ".experts." not in name and ".mlp.gate." not in name]
    assert outside and all(stored(view, name) == source[name].tobytes() for name in outside)


CORRECTIONS = {
    "deepseek_v3": "mlp.gate.e_score_correction_bias",
    "minimax_m2": "block_sparse_moe.e_score_correction_bias",
    "lfm2_moe": "feed_forward.expert_bias",
    "ernie4_5_moe": "mlp.moe_statics.e_score_correction_bias",
}


@pytest.mark.parametrize(("family", "name"), CORRECTIONS.items())
def test_the_correction_bias_stays_float32_bit_for_bit(family, name):
    """GLM's lie at 7 with differences below bfloat16's resolution: a cast changes nearly every choice."""
    checkpoint, experts = opened(family, dtype=torch.bfloat16)
    cut = uneven_cut(experts)
    view = ExpertView(checkpoint, experts, cut)
    source = tensors_of(checkpoint.folder)
    for layer in experts.layers:
        found = next(
            n for n in view.tensors if n.endswith(name) and n.startswith(f"model.layers.{layer.index}.")
        )
        kept = list(cut.kept[layer.index])
        assert view.tensors[found].dtype == "F32" and not view.computed(found)
        assert view.tensors[found].shape == ((1, len(kept)) if family == "ernie4_5_moe" else (len(kept),))
        assert stored(view, found) == source[found][..., kept].tobytes()


@pytest.mark.parametrize("seed", range(3))
def test_files_of_any_order_and_layout(seed, tmp_path):
    """Experts of one layer over three shards in shuffled order, one shard without any: the same bytes come out."""
    checkpoint, experts = opened("qwen3_moe")
    cut = uneven_cut(experts, seed=seed)
    tensors = load_file(checkpoint.folder / "model.safetensors")
    drawn = random.Random(seed)
    names = list(tensors)
    drawn.shuffle(names)
    inside = [name for name in names if ".experts." in name]
    outside = [name for name in names if ".experts." not in name]
    shards = [inside[0::3], inside[1::3], inside[2::3], outside]
    index = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file({name: tensors[name] for name in shard}, tmp_path / file, {"format": "pt"})
        index |= dict.fromkeys(shard, file)
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": index})
    )
    (tmp_path / "config.json").write_bytes((checkpoint.folder / "config.json").read_bytes())
    spread = open_path(tmp_path)
    views = [ExpertView(c, experts_of(c), cut) for c in (checkpoint, spread)]
    assert views[0].tensors.keys() == views[1].tensors.keys()
    assert all(stored(views[0], n, 777) == stored(views[1], n, 4001) for n in views[0].tensors)


def test_the_engine_writes_it(tmp_path):
    """A plan of copies only; companions, config and sizes as everywhere else."""
    checkpoint, experts = opened("gpt_oss", dtype=torch.bfloat16)
    cut = uneven_cut(experts)
    cut = replace(cut, scales={(0, cut.kept[0][1]): 4.0})
    view = ExpertView(checkpoint, experts, cut)
    derived = Derived(view, {"cut": cut.identity()}, "test", {}, "test")
    plan = plan_of(Source("m", checkpoint, "m"), {"": derived}, verb="prune")
    execute(plan, tmp_path / "out", threads=2)
    expected = load_file(write(view, tmp_path / "by-hand") / "model.safetensors")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in found)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == view.config
    assert torch.isfinite(logits(stock(tmp_path / "out", torch.bfloat16))).all()


def test_a_round_trip_through_save_pretrained(tmp_path):
    checkpoint, experts = opened("deepseek_v3")
    cut = uneven_cut(experts)
    folder = write(ExpertView(checkpoint, experts, cut), tmp_path / "cut")
    for hub_names in (True, False):
        again = tmp_path / f"again-{hub_names}"
        stock(folder).save_pretrained(again, save_original_format=hub_names)
        found = experts_of(open_path(again))
        assert (found.count, found.record) == (8, experts.record)
        assert found.layers[0].storage == ("per expert" if hub_names else "fused")
        assert torch.equal(logits(stock(again)), logits(stock(folder)))


# ---- channels -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", quick(f for f in expert_models.FAMILIES if f not in BOUND))
def test_narrower_experts_are_the_original_with_masked_columns(family, tmp_path):
    checkpoint, experts = opened(family)
    cut = ExpertCut() if family == "jetmoe" else uneven_cut(experts)
    cut = replace(cut, channels=channels_of(experts, cut, 16))
    folder = write(ExpertView(checkpoint, experts, cut), tmp_path / "narrow")
    original = stock(checkpoint.folder)
    mask_columns(original, cut)
    expected = logits(original) if family == "jetmoe" else masked_logits(original, experts, cut)
    torch.testing.assert_close(logits(stock(folder)), expected, rtol=1e-4, atol=1e-4)
    assert experts_of(open_path(folder)).width == 16


def mask_columns(model, cut):
    """Zero the dropped channels' columns of down projections in the library's stacked parameters."""
    ordered = sorted({layer for layer, _ in cut.channels})
    stacks = [
        p for name, p in model.named_parameters()
        if name.endswith(("experts.down_proj", "output_linear.weight", "mlp.output_linear.weight")) and "attention" not in name and "shared" not in name
    ]  # fmt: skip
    assert len(stacks) == len(ordered)
    for layer, stack in zip(ordered, stacks, strict=True):
        axis = stack.shape.index(WIDTH)
        for (number, expert), channels in cut.channels.items():
            if number == layer:
                gone = sorted(set(range(WIDTH)) - set(channels))
                stack.data[expert].index_fill_(axis - 1, torch.tensor(gone), 0.0)


@pytest.mark.parametrize("family", BOUND)
def test_a_width_that_is_somebody_elses_too_is_refused(family):
    checkpoint, experts = opened(family)
    cut = ExpertCut(channels=channels_of(experts, ExpertCut(), 16))
    with pytest.raises(InputError) as caught:
        ExpertView(checkpoint, experts, cut)
    assert caught.value.code == "E426"


def test_alternating_channels_go_in_pairs():
    """gpt-oss stores gate and up alternating along the last axis, biases too; the down projection is transposed."""
    checkpoint, experts = opened("gpt_oss")
    cut = uneven_cut(experts)
    cut = replace(cut, channels=channels_of(experts, cut, 8))
    view = ExpertView(checkpoint, experts, cut)
    source = tensors_of(checkpoint.folder)
    prefix = "model.layers.1.mlp.experts."
    for place, expert in enumerate(cut.kept[1]):
        channels = np.array(cut.channels[1, expert])
        pairs = np.sort(np.concatenate([2 * channels, 2 * channels + 1]))
        for name, axes in {
            "gate_up_proj": (slice(None), pairs), "gate_up_proj_bias": (pairs,), "down_proj": (channels,), "down_proj_bias": (),
        }.items():  # fmt: skip
            whole = np.frombuffer(stored(view, prefix + name), np.float32).reshape(
                view.tensors[prefix + name].shape
            )
            assert np.array_equal(whole[place], source[prefix + name][expert][axes]), name


def test_halves_and_single_matrices():
    for family, names in {
        "granitemoe": ("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"),
        "llama4_text": None,
        "olmoe": None,
    }.items():
        checkpoint, experts = opened(family)
        cut = ExpertCut(channels=channels_of(experts, ExpertCut(), 8))
        if family == "llama4_text":
            continue
        view, source = ExpertView(checkpoint, experts, cut), tensors_of(checkpoint.folder)
        channels = np.array(cut.channels[2, 5])
        if names:
            up, down = (f"model.layers.2.{name}" for name in names)
            both = np.concatenate([channels, WIDTH + channels])
            found = np.frombuffer(stored(view, up), np.float32).reshape(COUNT, 16, HIDDEN)
            assert np.array_equal(found[5], source[up][5][both])
            found = np.frombuffer(stored(view, down), np.float32).reshape(COUNT, HIDDEN, 8)
            assert np.array_equal(found[5], source[down][5][:, channels])
        else:
            for part, axes in {"gate_proj": (channels,), "up_proj": (channels,), "down_proj": (slice(None), channels)}.items():  # fmt: skip
                name = f"model.layers.2.mlp.experts.5.{part}.weight"
                assert stored(view, name) == np.ascontiguousarray(source[name][axes]).tobytes()


GATES = {
    "SwiGLU": ("qwen3_moe", {}),
    "GeGLU": ("mixtral", {"hidden_act": "gelu"}),
    "ReLU squared": ("nemotron_h", {}),
    "clamped": ("gpt_oss", {}),
}


@pytest.mark.parametrize("kind", GATES)
def test_padding_contributes_nothing_at_all(kind, tmp_path):
    """Padded channels are exactly zero before the down projection: huge numbers behind them change no bit."""
    family, options = GATES[kind]
    checkpoint, experts = opened(family, **options)
    drawn = random.Random(3)
    channels = {
        (layer.index, expert): tuple(sorted(drawn.sample(range(WIDTH), drawn.randint(1, 16))))
        for layer in experts.layers
        for expert in range(COUNT)
    }
    cut = ExpertCut(channels=channels, width=16)
    folder = write(ExpertView(checkpoint, experts, cut), tmp_path / "padded")
    model, original = stock(folder), stock(checkpoint.folder)
    mask_columns(original, cut)
    found = logits(model)
    torch.testing.assert_close(found, logits(original), rtol=1e-4, atol=1e-4)
    stacks = [p for name, p in model.named_parameters() if name.endswith("experts.down_proj")]
    for layer, stack in zip(experts.layers, stacks, strict=True):
        view = stack.data if family == "gpt_oss" else stack.data.transpose(1, 2)
        assert view.shape == (COUNT, 16, HIDDEN)
        for expert in range(COUNT):
            used = len(channels[layer.index, expert])
            assert not view[expert, used:].any() and view[expert, :used].any()
            view[expert, used:] = 1e6
    assert torch.equal(logits(model), found)


def test_shared_experts_are_padded_where_their_width_hangs_on_the_routed_ones(tmp_path):
    """Width 24 -> 16 with one shared expert: two of 16, the last 8 channels zero; 24 -> 12: two, nothing padded."""
    checkpoint, experts = opened("deepseek_v3")
    for width, shared in ((16, 32), (12, 24)):
        cut = ExpertCut(channels=channels_of(experts, ExpertCut(), width))
        view = ExpertView(checkpoint, experts, cut)
        assert view.config["n_shared_experts"] == 2 and view.config["moe_intermediate_size"] == width
        name = "model.layers.1.mlp.shared_experts.{}_proj.weight"
        assert view.tensors[name.format("gate")].shape == (shared, HIDDEN)
        assert view.tensors[name.format("down")].shape == (HIDDEN, shared)
        assert "shared experts" in view.notes[0]
        original = stock(checkpoint.folder)
        mask_columns(original, cut)
        got = logits(stock(write(view, tmp_path / str(width))))
        torch.testing.assert_close(got, logits(original), rtol=1e-4, atol=1e-4)


# ---- factors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3_moe", "granitemoe", "gpt_oss", "llama4_text", "nemotron_h"])
def test_a_power_of_two_is_baked_in_exactly(family):
    checkpoint, experts = opened(family, dtype=torch.bfloat16)
    layer = experts.layers[1]
    cut = replace(uneven_cut(experts), scales={})
    target = cut.kept[layer.index][3]
    cut = replace(cut, scales={(layer.index, target): 4.0})
    view, plain = (
        ExpertView(checkpoint, experts, cut),
        ExpertView(checkpoint, experts, replace(cut, scales={})),
    )
    changed = set()
    for name, info in view.tensors.items():
        assert not view.computed(name)
        old, new = (torch.frombuffer(bytearray(stored(v, name)), dtype=torch.bfloat16 if info.dtype == "BF16" else torch.float32)
                    .reshape(info.shape) for v in (plain, view))  # fmt: skip
        if torch.equal(old, new):
            continue
        changed.add(name)
        if layer.storage == "fused":
            assert torch.equal(new[3], old[3] * 4)
            new[3] = old[3]
            assert torch.equal(new, old)  # the others are untouched
        else:
            assert torch.equal(new, old * 4)
    roles = {t.role for t in layer.tensors if t.name in {view.source_names[n] for n in changed}}
    assert roles == ({"down", "down_bias"} if family == "gpt_oss" else {"down"}) and len(changed) == len(
        roles
    )


def test_a_factor_multiplies_the_routing_weight(tmp_path):
    """With one expert always chosen alone (llama4 takes one), its routed output is beta times as large."""
    checkpoint, experts = opened("mixtral")
    cut = ExpertCut(scales={(layer.index, e): 4.0 for layer in experts.layers for e in range(COUNT)})
    model = stock(write(ExpertView(checkpoint, experts, cut), tmp_path / "scaled"))
    original = stock(checkpoint.folder)
    for module in original.modules():
        if type(module).__name__ == "MixtralExperts":
            module.register_forward_hook(lambda module, args, output: output * 4)
    torch.testing.assert_close(logits(model), logits(original), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_factors_are_computed_and_rounded_once(dtype):
    checkpoint, experts = opened("granitemoe", dtype=dtype)
    cut = ExpertCut(scales={(0, 7): 1.3})
    view = ExpertView(checkpoint, experts, cut)
    name = "model.layers.0.block_sparse_moe.output_linear.weight"
    assert view.computed(name) and view.stored_dtype(name) == TYPES[dtype]
    expected = load_file(checkpoint.folder / "model.safetensors")[name]
    expected[7] = (expected[7].float() * 1.3).to(dtype)
    assert stored(view, name) == expected.contiguous().view(torch.uint8).numpy().tobytes()


def test_a_factor_that_overflows_is_refused():
    checkpoint, experts = opened("qwen3_moe", dtype=torch.float16)
    view = ExpertView(checkpoint, experts, ExpertCut(scales={(0, 1): 2.0**20}))
    with pytest.raises(InputError) as caught:
        stored(view, "model.layers.0.mlp.experts.1.down_proj.weight")
    assert caught.value.code == "E425"


# ---- quantized -------------------------------------------------------------------------------------------


def quantized_folder(folder: Path, kind: str) -> Path:
    """Write a model whose experts are random bytes in the form of a quantized one."""
    drawn = np.random.default_rng(0)
    family = "gpt_oss" if kind == "mxfp4" else "qwen3_moe"
    source = folder_of(family, dtype=torch.bfloat16, **({"intermediate_size": 32} if kind == "mxfp4" else {}))
    plain = open_path(source)
    tensors = {}

    def add(name, code, shape, size):
        tensors[name] = (code, shape, drawn.integers(1, 120, int(np.prod(shape)) * size, np.uint8).tobytes())

    for name, info in plain.tensors.items():
        stem = name.removesuffix(".weight")
        if "experts" not in name or name.endswith("bias"):
            tensors[name] = (info.dtype, info.shape, plain.read_bytes(name, 0, info.nbytes).tobytes())
        elif kind == "fp8":
            add(name, "F8_E4M3", info.shape, 1)
            values = drawn.random([-(-n // 8) for n in info.shape], np.float32)
            tensors[f"{stem}.weight_scale_inv"] = ("F32", values.shape, values.tobytes())
        elif kind == "mxfp4":
            experts, inner, outer = info.shape  # stored [experts, outputs, blocks of inputs, 16 bytes]
            add(f"{name}_blocks", "U8", (experts, outer, inner // 32, 16), 1)
            add(f"{name}_scales", "U8", (experts, outer, inner // 32), 1)
        else:
            outer, inner = info.shape
            add(f"{stem}.qweight", "I32", (inner // 8, outer), 4)
            add(f"{stem}.qzeros", "I32", (inner // 8, outer // 8), 4)
            tensors[f"{stem}.scales"] = (
                "F16",
                (inner // 8, outer),
                drawn.random((inner // 8, outer)).astype(np.float16).tobytes(),
            )
            tensors[f"{stem}.g_idx"] = ("I32", (inner,), np.arange(inner, dtype=np.int32).tobytes())
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "fp8": {"quant_method": "fp8", "weight_block_size": [8, 8], "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.experts.3.up_proj"]},
        "mxfp4": {"quant_method": "mxfp4"},
        "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 8},
    }[kind]  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    names = list(tensors)
    random.Random(1).shuffle(names)
    save_raw(folder / "model.safetensors", {name: tensors[name] for name in names})
    return folder


@pytest.mark.parametrize("kind", ["fp8", "mxfp4", "gptq"])
def test_quantized_payloads_are_sliced_byte_for_byte(kind, tmp_path):
    checkpoint = open_path(quantized_folder(tmp_path / "q", kind))
    experts = experts_of(checkpoint)
    cut = uneven_cut(experts)
    view = ExpertView(checkpoint, experts, cut)
    moved = 0
    for layer in experts.layers:
        kept = cut.kept[layer.index]
        for tensor in layer.tensors:
            info = checkpoint.tensors[tensor.name]
            content = checkpoint.read_bytes(tensor.name, 0, info.nbytes).tobytes()
            if tensor.expert is None:
                each = len(content) // COUNT
                expected = b"".join(content[e * each : (e + 1) * each] for e in kept)
                assert stored(view, tensor.name) == expected
                assert view.tensors[tensor.name].shape == (len(kept), *info.shape[1:])
            elif tensor.expert in kept:
                renamed = tensor.name.replace(
                    f"experts.{tensor.expert}.", f"experts.{kept.index(tensor.expert)}."
                )
                assert stored(view, renamed) == content and view.tensors[renamed].dtype == info.dtype
            moved += 1
    assert moved == sum(len(layer.tensors) for layer in experts.layers)
    assert not any(view.computed(name) for name in view.tensors)
    whole = {n for n in view.tensors if "experts" not in n and "gate.weight" not in n and "router" not in n}
    assert all(
        stored(view, n) == checkpoint.read_bytes(n, 0, checkpoint.tensors[n].nbytes).tobytes() for n in whole
    )


def test_types_below_one_byte_are_sliced_by_expert(tmp_path):
    plain = open_path(folder_of("olmoe", storage="fused"))
    tensors = {}
    for name, info in plain.tensors.items():
        content = plain.read_bytes(name, 0, info.nbytes).tobytes()
        packed = "experts" in name
        tensors[name] = (
            "F4" if packed else info.dtype,
            info.shape,
            content[: len(content) // 8] if packed else content,
        )
    save_raw(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_bytes((plain.folder / "config.json").read_bytes())
    checkpoint = open_path(tmp_path)
    experts = experts_of(checkpoint)
    cut = uneven_cut(experts)
    view = ExpertView(checkpoint, experts, cut)
    name = "model.layers.1.mlp.experts.down_proj"
    each = len(tensors[name][2]) // COUNT
    assert view.tensors[name].shape == (9, HIDDEN, WIDTH) and view.tensors[name].nbytes == 9 * each
    assert stored(view, name, 37) == b"".join(
        tensors[name][2][e * each : (e + 1) * each] for e in cut.kept[1]
    )
    with pytest.raises(InputError):
        view.read(name, 0, 2)


def test_blocks_of_fp8_can_go_and_parts_of_them_cannot(tmp_path):
    checkpoint = open_path(quantized_folder(tmp_path / "q", "fp8"))
    experts = experts_of(checkpoint)
    kept = (*range(8), *range(16, 24))
    cut = ExpertCut(channels={(layer.index, e): kept for layer in experts.layers for e in range(COUNT)})
    view = ExpertView(checkpoint, experts, cut)
    source = tensors_of(checkpoint.folder)
    for part, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        name = f"model.layers.2.mlp.experts.4.{part}.weight"
        assert stored(view, name) == np.take(source[name], kept, axis).tobytes()
        assert (
            stored(view, f"{name}_scale_inv") == np.take(source[f"{name}_scale_inv"], (0, 2), axis).tobytes()
        )
    with pytest.raises(InputError) as caught:
        ExpertView(checkpoint, experts, ExpertCut(channels=dict.fromkeys(cut.channels, tuple(range(12)))))
    assert caught.value.code == "E404" and "blocks of 8" in caught.value.message
    with pytest.raises(InputError) as caught:
        ExpertView(checkpoint, experts, replace(cut, width=24))
    assert caught.value.code == "E404"
    for kind in ("gptq", "mxfp4"):
        other = open_path(quantized_folder(tmp_path / kind, kind))
        found = experts_of(other)
        channels = {(layer.index, e): tuple(range(16)) for layer in found.layers for e in range(COUNT)}
        with pytest.raises(InputError) as caught:
            ExpertView(other, found, ExpertCut(channels=channels))
        assert caught.value.code == "E404" and kind in caught.value.message


def test_factors_of_quantized_experts_go_into_their_scales(tmp_path):
    for kind, suffix in (("fp8", ".weight_scale_inv"), ("gptq", ".scales"), ("mxfp4", "_scales")):
        checkpoint = open_path(quantized_folder(tmp_path / kind, kind))
        experts = experts_of(checkpoint)
        view = ExpertView(checkpoint, experts, ExpertCut(scales={(1, 2): 8.0}))
        source = tensors_of(checkpoint.folder)
        changed = [n for n in view.tensors if stored(view, n) != source[n].tobytes()]
        stem = "model.layers.1.mlp.experts." + ("down_proj" if kind == "mxfp4" else "2.down_proj")
        assert changed == [stem + suffix] or sorted(changed) == [f"{stem}_bias", stem + suffix]
        found = np.frombuffer(stored(view, stem + suffix), source[stem + suffix].dtype).reshape(
            source[stem + suffix].shape
        )
        if kind == "mxfp4":
            expected = source[stem + suffix].copy()
            expected[2] += 3
            assert np.array_equal(found, expected)
            with pytest.raises(InputError) as caught:
                stored(ExpertView(checkpoint, experts, ExpertCut(scales={(1, 2): 2.0**200})), stem + suffix)
            assert caught.value.code == "E425"
            with pytest.raises(InputError, match="cannot be multiplied"):
                ExpertView(checkpoint, experts, ExpertCut(scales={(1, 2): 3.0}))
        else:
            assert np.array_equal(found, source[stem + suffix] * found.dtype.type(8))


# ---- prediction layers -------------------------------------------------------------------------------------


def folder_with_prediction(folder: Path) -> Path:
    """Write a DeepSeek-V3 with a layer 3 beyond the configured three, made of layer 2 and its projections."""
    source = folder_of("deepseek_v3")
    tensors = load_file(source / "model.safetensors")
    extra = {name.replace("layers.2.", "layers.3."): value.clone() for name, value in tensors.items() if ".layers.2." in name}  # fmt: skip
    extra |= {f"model.layers.3.{name}": torch.randn(HIDDEN) for name in ("enorm.weight", "hnorm.weight", "shared_head.norm.weight")}  # fmt: skip
    extra["model.layers.3.eh_proj.weight"] = torch.randn(HIDDEN, 2 * HIDDEN)
    folder.mkdir()
    save_file({**tensors, **extra}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config.pop("num_mtp_layers", None)
    config["num_nextn_predict_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_prediction_layers_go_along_or_are_left_out(tmp_path):
    checkpoint = open_path(folder_with_prediction(tmp_path / "m"))
    experts = experts_of(checkpoint)
    assert [(layer.index, layer.runs) for layer in experts.layers][-1] == (3, False)
    cut = uneven_cut(experts)
    along = ExpertView(checkpoint, experts, replace(cut, kept={**cut.kept, 3: cut.kept[2]}))
    source = tensors_of(checkpoint.folder)
    expert = cut.kept[2][5]
    assert stored(along, "model.layers.3.mlp.experts.5.up_proj.weight") == source[f"model.layers.3.mlp.experts.{expert}.up_proj.weight"].tobytes()  # fmt: skip
    assert along.config["num_nextn_predict_layers"] == 1
    running = {layer: ids for layer, ids in cut.kept.items() if layer != 3}
    with pytest.raises(UsageError, match="layer 3 keeps 12"):  # the prediction layer was forgotten
        ExpertView(checkpoint, experts, ExpertCut(running))
    without = ExpertView(checkpoint, experts, ExpertCut(running, without=(3,)))
    assert not any(name.startswith("model.layers.3.") for name in without.tensors)
    assert without.config["num_nextn_predict_layers"] == 0
    folder = write(without, tmp_path / "without")
    assert torch.equal(logits(stock(folder)), masked_logits(stock(folder_of("deepseek_v3")), experts, cut))
    with pytest.raises(UsageError, match="cannot be left out"):
        ExpertView(checkpoint, experts, ExpertCut(running, without=(2,)))


def test_a_stack_of_prediction_layers_goes_with_what_belongs_to_it(tmp_path):
    """Qwen3-Next keeps them under "mtp." with norms and a projection beside the layers."""
    source = folder_of("qwen3_next")
    tensors = load_file(source / "model.safetensors")
    extra = {
        n.replace("model.layers.0.", "mtp.layers.0."): v.clone()
        for n, v in tensors.items()
        if "layers.0.mlp" in n
    }
    extra |= {"mtp.fc.weight": torch.randn(HIDDEN, 2 * HIDDEN), "mtp.norm.weight": torch.randn(HIDDEN)}
    save_file({**tensors, **extra}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    checkpoint = open_path(tmp_path)
    experts = experts_of(checkpoint)
    beyond = [layer.index for layer in experts.layers if not layer.runs]
    assert len(beyond) == 1
    cut = uneven_cut(experts)
    along = ExpertView(checkpoint, experts, cut)
    expert = cut.kept[beyond[0]][7]
    old, new = (f"mtp.layers.0.mlp.experts.{number}.down_proj.weight" for number in (expert, 7))
    assert stored(along, new) == tensors_of(tmp_path)[old].tobytes() and "mtp.fc.weight" in along.tensors
    without = ExpertView(checkpoint, experts, replace(cut, without=tuple(beyond)))
    assert not any(name.startswith("mtp.") for name in without.tensors)
    assert {name for name in along.tensors if not name.startswith("mtp.")} == set(without.tensors)


# ---- replacements --------------------------------------------------------------------------------------------


def test_replaced_experts_and_router_rows(tmp_path):
    """The same values as single tensors and as slices of a stack; other types are rounded to the stored one."""
    results = {}
    for storage in ("hub", "fused"):
        checkpoint, experts = opened("olmoe", storage=storage, dtype=torch.bfloat16)
        cut = uneven_cut(experts)
        expert = cut.kept[0][2]
        drawn = np.random.default_rng(1)
        gate, up = drawn.standard_normal((2, WIDTH, HIDDEN), np.float32)
        down, row = (
            drawn.standard_normal((HIDDEN, WIDTH), np.float32),
            drawn.standard_normal(HIDDEN, np.float32),
        )
        prefix = "model.layers.0.mlp."
        state = {f"{prefix}gate.weight#{expert}": row}
        if storage == "hub":
            state |= {f"{prefix}experts.{expert}.{n}_proj.weight": v for n, v in (("gate", gate), ("up", up), ("down", down))}  # fmt: skip
        else:
            state[f"{prefix}experts.gate_up_proj#{expert}"] = np.concatenate([gate, up])
            state[f"{prefix}experts.down_proj#{expert}"] = down
        view = ExpertView(checkpoint, experts, cut, MemoryCheckpoint("new", state))
        plain = ExpertView(checkpoint, experts, cut)
        assert view.identity != plain.identity
        changed = {n for n in view.tensors if stored(view, n) != stored(plain, n)}
        assert len(changed) == len(state) and all(view.computed(n) for n in changed)
        folder = write(view, tmp_path / storage)
        results[storage] = logits(stock(folder, torch.bfloat16))
        written = load_file(folder / "model.safetensors")[f"{prefix}gate.weight"]
        assert torch.equal(written[2], torch.from_numpy(row).to(torch.bfloat16))
        same = {k: torch.from_numpy(v).to(torch.bfloat16) for k, v in state.items()}
        bits = ExpertView(checkpoint, experts, cut, MemoryCheckpoint("new", same))
        assert not any(bits.computed(n) for n in bits.tensors)  # of the stored type: bits are passed on
        assert all(stored(bits, n) == stored(view, n) for n in bits.tensors)
    assert torch.equal(results["hub"], results["fused"])


def test_replacements_are_narrowed_and_scaled_like_the_rest():
    checkpoint, experts = opened("granitemoe")
    cut = ExpertCut(channels=channels_of(experts, ExpertCut(), 8), scales={(0, 3): 2.0})
    name = "model.layers.0.block_sparse_moe.output_linear.weight"
    new = np.random.default_rng(0).standard_normal((HIDDEN, WIDTH), np.float32)
    view = ExpertView(checkpoint, experts, cut, MemoryCheckpoint("new", {f"{name}#3": new}))
    found = np.frombuffer(stored(view, name), np.float32).reshape(COUNT, HIDDEN, 8)
    assert np.array_equal(found[3], 2 * new[:, list(cut.channels[0, 3])])


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("model.layers.0.mlp.nothing", np.zeros(3, np.float32), "no tensor"),
        ("model.layers.0.mlp.gate.weight#3", np.zeros(3, np.float32), "shape"),
        ("model.layers.0.mlp.gate.weight#12", np.zeros(HIDDEN, np.float32), "does not hold"),
        ("model.layers.0.mlp.experts.3.up_proj.weight#3", np.zeros(3, np.float32), "does not hold"),
        ("model.layers.0.mlp.gate.weight", np.zeros((COUNT, HIDDEN), np.int32), "I32"),
    ],
)
def test_replacements_that_do_not_fit(key, value, words):
    checkpoint, experts = opened("qwen3_moe")
    with pytest.raises(InputError, match=words) as caught:
        ExpertView(checkpoint, experts, ExpertCut(), MemoryCheckpoint("new", {key: value}))
    assert caught.value.code == "E427"


# ---- what is refused ------------------------------------------------------------------------------------------


def kept(experts, *ids):
    return ExpertCut({layer.index: tuple(ids) for layer in experts.layers})


GROUPED = {"topk_group": 1, "n_group": 2, "num_experts_per_tok": 4}


@pytest.mark.parametrize(
    ("options", "ids", "words", "advice"),
    [
        # 12 experts in groups of 6 and 6
        ({}, (0, 1, 2, 3, 6, 7, 8), "4 experts of routing group 0 but 3 of group 1", "equally"),
        (
            {},
            (0, 1, 2, 3, 4, 6, 7, 8),
            "5 experts of routing group 0 but 3",
            "equally",
        ),  # divisible: silent in readers
        ({"num_experts_per_tok": 1}, (0, 6), "2 experts leave 1 in every routing group", "keep 4"),
        (GROUPED, (0, 1, 2, 6, 7, 8), "hold 3 experts, but it goes to 4", "keep 8"),  # silent in readers
        ({}, (0,), "keeps 1 experts of routing group 0 but 0", "equally"),
    ],
)
def test_cuts_that_groups_of_experts_cannot_take(options, ids, words, advice):
    _, experts = opened("deepseek_v3", **options)
    with pytest.raises(UsageError, match=words) as caught:
        check(experts, kept(experts, *ids))
    assert caught.value.code == "E243" and advice in caught.value.help


def test_counts_that_groups_can_take():
    _, experts = opened("deepseek_v3")
    assert valid_counts(experts) == (4, 6, 8, 10, 12) and nearest_counts(experts, 7) == "6 or 8"
    _, experts = opened("deepseek_v3", **GROUPED)
    assert valid_counts(experts) == (8, 10, 12) and nearest_counts(experts, 3) == "8"
    _, experts = opened("deepseek_v2")  # scored by the best one: a group may be one expert, if that is enough
    assert valid_counts(experts) == (4, 6, 8, 10, 12)
    _, experts = opened("deepseek_v2", num_experts_per_tok=1)
    assert valid_counts(experts) == (2, 4, 6, 8, 10, 12)
    _, experts = opened("mixtral")
    assert valid_counts(experts) == tuple(range(2, 13))
    check(experts, kept(experts, 0, 11))


def test_a_reader_routes_to_masked_experts_without_an_error_where_groups_are_uneven(tmp_path):
    """What the refusals are for: 5 of one group and 3 of the other load, run, and are another model."""
    checkpoint, experts = opened("deepseek_v3")
    ids = (0, 1, 2, 3, 4, 6, 7, 8)
    tensors = load_file(checkpoint.folder / "model.safetensors")
    result = {}
    for name, value in tensors.items():
        words = name.split(".")
        if "experts" in words:
            number = int(words[words.index("experts") + 1])
            if number in ids:
                result[name.replace(f"experts.{number}.", f"experts.{ids.index(number)}.")] = value
        else:
            result[name] = value[list(ids)].contiguous() if ".mlp.gate." in name else value
    save_file(result, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((checkpoint.folder / "config.json").read_text())
    key = "n_routed_experts" if "n_routed_experts" in config else "num_local_experts"
    (tmp_path / "config.json").write_text(json.dumps({**config, key: len(ids)}))
    found = logits(stock(tmp_path))  # strict: not a word
    model = stock(checkpoint.folder)
    with switched_off(model, [ids] * len(experts.layers)):
        expected = logits(model)
    assert float((found - expected).abs().max()) > 0.1
    with pytest.raises(UsageError, match="shift the borders"):
        check(experts, kept(experts, *ids))


@pytest.mark.parametrize(
    ("cut", "words"),
    [
        (ExpertCut({0: (0,), 1: (0,), 2: (0,)}), "1 experts stay, but every token goes to 2"),
        (ExpertCut({0: (0, 1, 2)}), "layer 0 keeps 3 experts and layer 1 keeps 12"),
        (ExpertCut({0: (2, 1), 1: (1, 2), 2: (1, 2)}), "ascending"),
        (ExpertCut({0: (1, 1), 1: (1, 2), 2: (1, 2)}), "ascending"),
        (ExpertCut({0: (1, 12), 1: (1, 2), 2: (1, 2)}), "experts 12, but there are 0 to 11"),
        (ExpertCut({0: (-1, 2), 1: (1, 2), 2: (1, 2)}), "experts -1"),
        (ExpertCut({0: (), 1: (1, 2), 2: (1, 2)}), "keeps no experts"),
        (ExpertCut({7: (1, 2)}), "layer 7, which has none"),
        (ExpertCut(without=(1,)), "cannot be left out"),
        (ExpertCut(channels={(0, 0): tuple(range(8))}), "which no stock class holds"),
        (ExpertCut(channels={(0, 0): (3, 24)}, width=24), "channels 24, but there are 0 to 23"),
        (ExpertCut(channels={(0, 0): (3, 2)}, width=24), "ascending"),
        (ExpertCut(channels={(0, 0): ()}, width=24), "keeps no channels"),
        (ExpertCut(channels={(0, 0): tuple(range(8))}, width=16), "keeps 24 channels, more than the width of 16"),
        (ExpertCut(scales={(0, 12): 2.0}), "no expert 12"),
        (ExpertCut(scales={(0, 1): float("nan")}), "cannot be multiplied by nan"),
        (ExpertCut(scales={(0, 1): 0.0}), "cannot be multiplied by 0.0"),
    ],
)  # fmt: skip
def test_illegal_cuts(cut, words):
    _, experts = opened("qwen3_moe")
    with pytest.raises(UsageError, match=words) as caught:
        check(experts, cut)
    assert caught.value.code == "E243"


def test_everything_wrong_is_named_at_once():
    _, experts = opened("deepseek_v3")
    bad = ExpertCut({1: (0, 1, 2, 6), 2: (0, 99)})
    with pytest.raises(UsageError) as caught:
        check(experts, bad)
    assert len([caught.value, *caught.value.others]) == 2


def test_attention_that_counts_experts_keeps_them():
    _, experts = opened("jetmoe")
    with pytest.raises(InputError, match="attention") as caught:
        check(experts, uneven_cut(experts))
    assert caught.value.code == "E404"
    check(experts, ExpertCut(channels=channels_of(experts, ExpertCut(), 8)))


def test_notes_on_widths_that_fast_paths_do_not_take():
    _, experts = opened("qwen3_moe")
    narrow = ExpertCut(channels=channels_of(experts, ExpertCut(), 12))
    (note,) = alignment_notes(experts, narrow, ["BF16"])
    assert "multiple of 8" in note and "eager" in note
    assert alignment_notes(experts, narrow, ["F32"]) == []
    assert alignment_notes(experts, ExpertCut(), ["BF16", "F32"]) == []


def test_the_fast_path_runs_exactly_where_there_is_no_note(tmp_path):
    checkpoint, experts = opened("qwen3_moe", dtype=torch.bfloat16)
    for width, fine in ((16, True), (12, False)):
        cut = ExpertCut(channels=channels_of(experts, ExpertCut(), width))
        assert bool(alignment_notes(experts, cut, ["BF16"])) is not fine
        model = stock(write(ExpertView(checkpoint, experts, cut), tmp_path / str(width)), torch.bfloat16)
        model.set_experts_implementation("grouped_mm")
        if fine:
            assert torch.isfinite(logits(model)).all()
        else:
            with pytest.raises(RuntimeError):
                logits(model)


# ---- config.json -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys", [("num_experts",), ("num_local_experts",), ("num_experts", "num_local_experts")]
)
def test_all_names_of_the_number_change_and_none_is_added(keys, tmp_path):
    checkpoint, experts = opened("qwen3_moe")
    config = {k: v for k, v in checkpoint.config.items() if k not in ("num_experts", "num_local_experts")}
    config |= dict.fromkeys(keys, COUNT) | {"_name_or_path": "x", "unknown": [COUNT, {"num_experts": COUNT}]}
    result = pruned_config(config, experts, kept(experts, *range(9)))
    assert {k: v for k, v in result.items() if k not in keys} == {
        k: v for k, v in config.items() if k not in keys
    }
    assert {k: result[k] for k in keys} == dict.fromkeys(keys, 9) and set(result) == set(config)
    (tmp_path / "config.json").write_text(json.dumps(result))
    read = transformers.AutoConfig.from_pretrained(tmp_path)
    assert read.num_experts == read.num_local_experts == 9
    assert config["unknown"][1]["num_experts"] == COUNT  # the source's own dictionary is left alone


def test_nested_and_listed_numbers():
    checkpoint, experts = opened("qwen3_5_moe")
    assert experts.section == "text_config"
    result = ExpertView(checkpoint, experts, uneven_cut(experts)).config
    text = result["text_config"]
    assert 9 in (text.get("num_experts"), text.get("num_local_experts"))
    assert result["vision_config"] == checkpoint.config["vision_config"]
    _, experts = opened("hunyuan_v1_moe")
    listed = {"num_experts": [COUNT] * 3, "moe_intermediate_size": [WIDTH] * 3, "moe_topk": [2, 2, 2]}
    cut = replace(
        kept(experts, *range(9)),
        channels={(layer, e): tuple(range(8)) for layer in range(3) for e in range(9)},
    )
    assert pruned_config(listed, experts, cut) == {"num_experts": [9] * 3, "moe_intermediate_size": [8] * 3, "moe_topk": [2, 2, 2]}  # fmt: skip


def test_groups_stay_and_widths_change():
    checkpoint, experts = opened("deepseek_v3")
    result = pruned_config(checkpoint.config, experts, uneven_cut(experts))
    assert (result["n_group"], result["topk_group"]) == (2, 1)
    assert result["moe_intermediate_size"] == WIDTH


def test_lists_of_modules_are_renumbered():
    checkpoint, experts = opened("qwen3_moe")
    cut = kept(experts, 0, 3, 5)
    name = "model.layers.1.mlp.experts.{}.down_proj"
    config = {
        **checkpoint.config,
        "quantization_config": {
            "ignore": ["lm_head", "re:.*gate$", name.format(3), name.format(4), "model.layers.1.mlp.gate"],
            "modules_to_not_convert": [
                name.format(5),
                "model.layers.1.mlp.experts.4",
                "model.layers.0.self_attn",
            ],
            "extra_config": {name.format(5): {"bits": 8}, name.format(1): {"bits": 2}},
        },
    }
    entry = pruned_config(config, experts, cut)["quantization_config"]
    assert entry["ignore"] == ["lm_head", "re:.*gate$", name.format(1), "model.layers.1.mlp.gate"]
    assert entry["modules_to_not_convert"] == [name.format(2), "model.layers.0.self_attn"]
    assert entry["extra_config"] == {name.format(2): {"bits": 8}}
    config["quantization_config"]["ignore"] = [r"re:.*experts\.3\..*"]
    with pytest.raises(InputError) as caught:
        pruned_config(config, experts, cut)
    assert caught.value.code == "E426"
    assert pruned_config(config, experts, ExpertCut()) == config


# ---- sizes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "granitemoe"])
def test_sizes_are_those_of_the_written_model(family, tmp_path):
    checkpoint, experts = opened(family, dtype=torch.bfloat16)
    cut = uneven_cut(experts)
    model = stock(write(ExpertView(checkpoint, experts, cut), tmp_path / "m"), torch.bfloat16)
    stored_numbers = sum(p.numel() for p in model.parameters())
    stored_numbers += sum(b.numel() for n, b in model.named_buffers() if "correction" in n)
    assert parameters_after(checkpoint, experts, cut) == stored_numbers
    gone = COUNT - len(next(iter(cut.kept.values())))
    total = sum(info.nbytes for info in checkpoint.tensors.values())
    assert bytes_after(checkpoint, experts, cut) == total - gone * bytes_of_expert(checkpoint, experts)
    assert bytes_outside(checkpoint, experts) == total - COUNT * bytes_of_expert(checkpoint, experts)


def test_packed_experts_count_as_what_they_stand_for(tmp_path):
    plain, experts = opened("gpt_oss", intermediate_size=32)
    packed = open_path(quantized_folder(tmp_path / "q", "mxfp4"))
    cut = uneven_cut(experts)
    assert parameters_after(packed, experts_of(packed), cut) == parameters_after(plain, experts, cut)
    assert bytes_after(packed, experts_of(packed), cut) < bytes_after(plain, experts, cut)


# ---- memory ------------------------------------------------------------------------------------------------------

SLICE = """
import json, sys
from pathlib import Path
import numpy as np
from surgeon.checkpoint.checkpoint import open_path
from surgeon.structure.experts.cut import ExpertCut
from surgeon.structure.experts.find import experts_of
from surgeon.structure.experts.view import ExpertView
checkpoint = open_path(Path(sys.argv[1]))
experts = experts_of(checkpoint)
kept = tuple(e for e in range(16) if e % 4)
cut = ExpertCut({0: kept}, {(0, e): tuple(range(e % 2, 1536, 2)) for e in kept} if sys.argv[2] == "narrow" else {})
view = ExpertView(checkpoint, experts, cut)
def peak():  # of this program alone; ru_maxrss is inherited from the parent
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
before = peak()
total = 0
for name, info in view.tensors.items():
    for start in range(0, info.nbytes, 8 << 20):
        total += view.read_bytes(name, start, min(start + (8 << 20), info.nbytes)).size
print(total, peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["whole", "narrow"])
def test_slicing_a_large_stack_takes_little_memory(mode, tmp_path):
    """300 MB of stacked experts: a few blocks in memory, never a stack."""
    config = {"model_type": "gpt_oss", "num_local_experts": 16, "num_experts_per_tok": 2, "hidden_size": 2048,
              "intermediate_size": 1536, "num_hidden_layers": 1}  # fmt: skip
    shapes = {"gate_up_proj": (16, 2048, 3072), "gate_up_proj_bias": (16, 3072), "down_proj": (16, 1536, 2048), "down_proj_bias": (16, 2048)}  # fmt: skip
    tensors = {
        f"model.layers.0.mlp.experts.{n}": torch.ones(s, dtype=torch.bfloat16) for n, s in shapes.items()
    }
    tensors["model.layers.0.mlp.router.weight"] = torch.ones(16, 2048)
    tensors["model.layers.0.mlp.router.bias"] = torch.ones(16)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    size = (tmp_path / "model.safetensors").stat().st_size
    done = subprocess.run([sys.executable, "-c", SLICE, str(tmp_path), mode], capture_output=True, text=True,
                          cwd=Path(__file__).parents[2])  # fmt: skip
    assert done.returncode == 0, done.stderr
    total, grown = map(int, done.stdout.split())
    assert total > size * (0.7 if mode == "whole" else 0.35)
    print(f"{grown / 1e6:.0f} MB beside {size / 1e6:.0f} MB")
    assert 4e6 < grown < size / 4, f"{grown / 1e6:.0f} MB for {size / 1e6:.0f} MB"
