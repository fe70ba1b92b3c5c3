"""The auto-round format: against Python's integers, auto-round's own packer, the reader of GPTQ files, and loaded models."""

from __future__ import annotations

import itertools
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent))
from quantized_folders import (
    LLAMA,
    MIXTRAL,
    QWEN3_MOE,
    apart,
    load_in_child,
    loaded_whole,
    plain_folder,
    require,
    rounded,
    write_both,
)
from test_dequantized import model_of, same_bits, whole

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "structure"))
import expert_models

from surgeon.errors import InputError
from surgeon.formats import auto_round
from surgeon.formats.compressed_runtimes import Reader
from surgeon.formats.dequantized import dequantized
from surgeon.formats.scheme import Codes, Scheme

CODES = {torch.int32: "I32", torch.float16: "F16"}


def int_(bits: int, group: int = 32) -> Scheme:
    return Scheme("int", bits, group)


def drawn(shape: tuple[int, int], scheme: Scheme, seed: int = 0) -> Codes:
    """Return random codes with random float16 scales."""
    random = np.random.default_rng(seed)
    groups = shape[1] // scheme.group if scheme.group > 0 else 1
    scales = random.uniform(1e-3, 1e-2, (shape[0], groups)).astype(np.float16).astype(np.float32)
    zeros = np.full(scales.shape, 1 << (scheme.bits - 1), np.uint8)
    return Codes(scheme, random.integers(0, 1 << scheme.bits, shape).astype(np.uint8), scales, zeros)


def stream(codes: list[int], bits: int) -> list[int]:
    """Return the int32 words of a bit stream, from one long Python integer."""
    total = sum(code << (bits * place) for place, code in enumerate(codes))
    words = [(total >> (32 * n)) & 0xFFFFFFFF for n in range(len(codes) * bits // 32)]
    return [word - (1 << 32) if word >> 31 else word for word in words]


# ---- tensors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [32, -1])
@pytest.mark.parametrize("bits", range(2, 9))
def test_bytes(bits, group):
    """Words are those of one long integer a column; the layout says the sizes that are written."""
    codes = drawn((64, 96), int_(bits, group))
    found = auto_round.pack(codes)
    for output in (0, 17, 63):
        assert found["qweight"][:, output].tolist() == stream(codes.codes[output].tolist(), bits)
    for group_ in range(codes.scales.shape[1]):
        stored = [(1 << (bits - 1)) - 1] * 64
        assert found["qzeros"][group_].tolist() == stream(stored, bits)
    assert np.array_equal(found["scales"], codes.scales.T.astype(np.float16))
    laid_out = auto_round.layout("a.b.weight", (64, 96), codes.scheme)
    written = [
        (f"a.b.{suffix}", CODES[torch.from_numpy(part).dtype], part.shape) for suffix, part in found.items()
    ]
    assert laid_out == written
    assert all(part.flags.c_contiguous for part in found.values())


@pytest.mark.parametrize("bits", range(1, 9))
def test_any_stream(bits):
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (64, 3)).astype(np.uint8)
    words = auto_round.packed(codes, bits)
    assert [words[:, n].tolist() for n in range(3)] == [stream(codes[:, n].tolist(), bits) for n in range(3)]
    assert np.array_equal(auto_round.packed(codes.T, bits, along_rows=True), words.T)


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")  # of its packer for three bits
@pytest.mark.parametrize("bits", range(2, 9))
def test_package_packs_the_same_bytes(bits):
    require("auto_round")
    from auto_round_extension.torch.qlinear_torch_zp import QuantLinear

    codes = drawn((64, 96), int_(bits), seed=bits)
    linear = torch.nn.Linear(96, 64, bias=False)
    linear.weight.data = torch.from_numpy(codes.values())
    module = QuantLinear(bits, 32, 96, 64, bias=False)
    module.pack(
        linear, torch.from_numpy(codes.scales), torch.from_numpy(codes.zeros.astype(np.float32)), device="cpu"
    )
    for suffix, part in auto_round.pack(codes).items():
        assert torch.equal(getattr(module, suffix), torch.from_numpy(part)), suffix
    eye = torch.eye(96, dtype=torch.float16)
    same_bits(module(eye).T.contiguous(), torch.from_numpy(codes.values()).to(torch.float16))


@pytest.mark.parametrize("group", [32, 96, -1])
@pytest.mark.parametrize("bits", range(2, 9))
def test_read_back(bits, group, tmp_path):
    codes = drawn((64, 192), int_(bits, group))
    tensors = {
        f"model.layers.0.a.{suffix}": torch.from_numpy(part)
        for suffix, part in auto_round.pack(codes).items()
    }
    config = auto_round.quantization_config({"model.layers.0.a": codes.scheme})
    view = dequantized(model_of(tmp_path, tensors, config))
    same_bits(whole(view, "model.layers.0.a.weight"), torch.from_numpy(codes.values()).to(torch.float16))


def test_read_back_with_a_group_of_its_own(tmp_path):
    """Two groups of 96, where the usual 128 would give two groups, too."""
    own, usual = drawn((64, 192), int_(4, 96)), drawn((64, 256), int_(4, 128))
    tensors, modules = {}, {}
    for name, codes in {"layers.0.a": own, "layers.0.b": usual, "layers.0.c": usual}.items():
        tensors |= {
            f"{name}.{suffix}": torch.from_numpy(part) for suffix, part in auto_round.pack(codes).items()
        }
        modules[name] = codes.scheme
    view = dequantized(model_of(tmp_path, tensors, auto_round.quantization_config(modules)))
    same_bits(whole(view, "layers.0.a.weight"), torch.from_numpy(own.values()).to(torch.float16))


def test_pack_wants_what_it_can_hold():
    codes = drawn((32, 32), int_(4))
    codes.scales[0, 0] = 70000.0
    with pytest.raises(InputError, match="E458"):
        auto_round.pack(codes)
    codes = drawn((32, 32), int_(4))
    codes.scales[0, 0] = 0.1  # not a float16
    with pytest.raises(AssertionError, match="float16"):
        auto_round.pack(codes)
    codes = drawn((32, 32), int_(4))
    codes.zeros[3, 0] = 7
    with pytest.raises(AssertionError, match="middle"):
        auto_round.pack(codes)


# ---- names and config ------------------------------------------------------------------------------------


def test_names_of_mixtral():
    names = [f"model.layers.3.block_sparse_moe.experts.12.{part}" for part in ("w1", "w2.weight", "w3")]
    names += ["model.layers.3.block_sparse_moe.gate.weight", "model.layers.3.self_attn.q_proj.weight"]
    stem = "model.layers.3.mlp"
    assert auto_round.name_map(names, "mixtral") == {
        names[0]: f"{stem}.experts.12.gate_proj", names[1]: f"{stem}.experts.12.down_proj.weight",
        names[2]: f"{stem}.experts.12.up_proj", names[3]: f"{stem}.gate.weight",
    }  # fmt: skip
    assert auto_round.name_map(names, "qwen3_moe") == {}
    laid_out = auto_round.layout(names[1], (32, 64), int_(3), "mixtral")
    assert laid_out[0] == (f"{stem}.experts.12.down_proj.qweight", "I32", (6, 32))


def test_config():
    """What most modules have is said once; the others, those in 16 bits and the head have entries."""
    layer = "model.layers.{}.mlp"
    modules: dict[str, Scheme | None] = {
        f"{layer.format(n)}.experts.{e}.up_proj": int_(4) for n in (0, 1) for e in range(4)
    }
    modules |= {
        f"{layer.format(1)}.experts.2.up_proj": int_(2, 64),
        f"{layer.format(0)}.gate": None,
        "lm_head": int_(4),
    }
    config = auto_round.quantization_config(modules)
    assert (config["bits"], config["group_size"], config["sym"], config["data_type"]) == (4, 32, True, "int")
    assert config["block_name_to_quantize"] == "model.layers"
    assert config["extra_config"] == {
        "model.layers.0.mlp.gate": {"bits": 16, "data_type": "float"},
        "model.layers.1.mlp.experts.2.up_proj": {
            "bits": 2,
            "group_size": 64,
            "sym": True,
            "data_type": "int",
        },
        "lm_head": {"bits": 4, "group_size": 32, "sym": True, "data_type": "int"},
    }
    assert "extra_config" not in auto_round.quantization_config({"model.layers.0.a": int_(4)})
    with pytest.raises(InputError, match="E460"):
        auto_round.quantization_config({"a": None})


def test_a_router_is_no_pattern_for_what_begins_like_it():
    modules = {
        "model.layers.0.mlp.gate": None,
        "model.layers.0.mlp.gate_proj": int_(4),
        "model.layers.1.a": int_(4),
    }
    extra = auto_round.quantization_config(modules)["extra_config"]
    assert extra["model.layers.0.mlp.gate_proj"]["bits"] == 4 and "model.layers.1.a" not in extra


# ---- refusals ------------------------------------------------------------------------------------------


Q = "model.layers.0.self_attn.q_proj.weight"
EXPERT = "model.layers.0.mlp.experts.1.up_proj.weight"
VLLM = Reader("vllm")


@pytest.mark.parametrize(("name", "shape", "scheme", "more", "said"), [
    (Q, (48, 64), int_(2), {}, "multiples of 32"),
    (Q, (64, 48), int_(2, 16), {}, "multiples of 32"),
    (Q, (64, 96), int_(4, 64), {}, "groups of 64 do not divide"),
    (Q, (64, 96), int_(4, 0), {}, "no size of a group"),
    (Q, (64, 96), int_(5), {"reader": VLLM}, "5 bits are not read by vllm, which takes 4, 8"),
    (Q, (64, 96), Scheme("int", 4, 32, False), {}, "zero point"),
    (Q, (64, 96), Scheme("nf4", 4, 0), {}, "not made of integers"),
    (Q, (4, 64, 96), int_(4), {}, "3 axes"),
    (Q, (64, 96), int_(3), {"reader": VLLM}, "vllm"),
    (EXPERT, (64, 96), int_(4), {"model_type": "unheard_of"}, "not been seen to load"),
    ("model.layers.0.block_sparse_moe.experts.1.w1.weight", (64, 96), int_(4), {"model_type": "mixtral", "reader": VLLM}, "names"),
    ("model.layers.0.mlp.gate.weight", (32, 96), int_(8), {}, "a router in 16 bits"),
    ("model.embed_tokens.weight", (96, 64), int_(8), {}, "an embedding in 16 bits"),
    ("lm_head.weight", (96, 64), int_(8), {"reader": Reader(tied=True)}, "is the embedding"),
    (Q, (64, 96), int_(4), {"reader": Reader("vllm", devices=4)}, "16 x 96"),
    (Q, (96, 96), int_(4), {"reader": Reader("vllm", devices=5)}, "96 outputs"),
    (Q.replace("q_p", "o_p"), (96, 128), int_(4, 64), {"reader": Reader("vllm", devices=4)}, "groups of 64"),
])  # fmt: skip
def test_refused(name, shape, scheme, more, said):
    assert said in (auto_round.storable(name, shape, scheme, **more) or "")
    (found,) = auto_round.refusals({name: (shape, scheme)}, **more)
    assert found.code == "E458" and said in found.message
    assert auto_round.refusals({name: (shape, None)}, **more) == []


@pytest.mark.parametrize("bits", range(2, 9))
def test_stored(bits):
    for group in (32, 96, -1):
        assert auto_round.storable(Q, (64, 96), int_(bits, group)) is None
        assert auto_round.storable(EXPERT, (64, 96), int_(bits, group), model_type="qwen3_moe") is None


def test_vllm_runs_some_as_one():
    names = [f"model.layers.{layer}.mlp.experts.{e}.{part}_proj.weight" for layer in (0, 1) for e in (0, 1) for part in ("gate", "up", "down")]  # fmt: skip
    matrices = {name: ((64, 64), int_(8 if ".0.mlp" in name else 4)) for name in names}
    matrices[Q], matrices[Q.replace("q_p", "o_p")] = ((64, 64), int_(4)), ((64, 64), int_(8))
    assert auto_round.refusals(matrices, VLLM, "qwen3_moe") == []
    matrices[Q.replace("q_p", "v_p")] = ((64, 64), int_(8))
    matrices[names[-1]] = ((64, 64), None)
    assert auto_round.refusals(matrices, model_type="qwen3_moe") == []
    found = auto_round.refusals(matrices, VLLM, "qwen3_moe")
    assert [one.code for one in found] == ["E459", "E459"] and "16 bits" in found[0].message


def test_choices_are_without_refusals():
    """Of every combination of a small model, for both runtimes; and what is left out would be refused."""
    shapes = {
        EXPERT: (64, 64),
        EXPERT.replace("up_", "down_"): (64, 32),
        Q: (64, 64),
        Q.replace("q_p", "k_p"): (48, 64),
    }
    menu = [int_(4), int_(8), int_(3, 64), None]
    for reader in (Reader(), VLLM):
        (found,) = auto_round.choices(shapes, menu, reader, "qwen3_moe")
        assert sorted(name for choice in found for name in choice.names) == sorted(shapes)
        for picks in itertools.product(*(choice.schemes for choice in found)):
            model = {
                n: (shapes[n], scheme)
                for choice, scheme in zip(found, picks, strict=True)
                for n in choice.names
            }
            assert auto_round.refusals(model, reader, "qwen3_moe") == []
        for choice in found:
            for scheme in set(menu) - set(choice.schemes):
                assert auto_round.refusals(
                    {n: (shapes[n], scheme) for n in choice.names}, reader, "qwen3_moe"
                )
    assert found[0].schemes == (int_(4), int_(8), None) and found[1].schemes == (None,)


# ---- loaded models ---------------------------------------------------------------------------------------


def dense(name: str) -> Scheme | None:
    """Every width and several groups, the head at 8 bits, one matrix in 16."""
    if "lm_head" in name or ".0.self_attn.o_proj" in name:
        return int_(8, -1) if "lm_head" in name else None
    widths = {
        "q": (8, 32),
        "k": (3, 64),
        "v": (2, 32),
        "o": (4, -1),
        "gate": (4, 32),
        "up": (3, 32),
        "down": (2, 64),
    }
    return int_(*widths[re.search(r"\.(\w+)_proj", name)[1]])  # type: ignore[index]


def per_expert(name: str) -> Scheme | None:
    """Experts of 8, 3, 2 and 4 bits, their down projections one on; routers and the head in 16 bits."""
    if name.endswith(".gate.weight") or "lm_head" in name:
        return None
    expert = re.search(r"experts\.(\d+)\.(\w+)", name)
    if not expert:
        return int_(4)
    return int_((8, 3, 2, 4)[(int(expert[1]) + (expert[2] in ("w2", "down_proj"))) % 4])


def written(work: Path, kind: tuple[str, dict], choose) -> tuple[Path, Path, dict[str, Scheme | None]]:
    """Return (quantized folder, plain folder, what was chosen) of a random model."""
    source = plain_folder(work / "source", kind, torch.bfloat16)
    tensors = load_file(source / "model.safetensors")
    chosen = {
        n: choose(n) for n, t in tensors.items() if t.ndim == 2 and n.endswith(".weight") and "embed" not in n
    }
    assert (
        auto_round.refusals({n: (tuple(tensors[n].shape), s) for n, s in chosen.items()}, model_type=kind[0])
        == []
    )

    def stored(name, tensor):
        scheme = chosen.get(name)
        if scheme is None:
            new = auto_round.stored_name(name, kind[0])
            return None if new == name else ({new: tensor}, tensor)
        codes = rounded(tensor, scheme)
        stem = auto_round.stored_name(name, kind[0]).removesuffix("weight")
        parts = {f"{stem}{suffix}": torch.from_numpy(part) for suffix, part in auto_round.pack(codes).items()}
        laid_out = auto_round.layout(name, tuple(tensor.shape), scheme, kind[0])
        assert laid_out == [(n, CODES[t.dtype], tuple(t.shape)) for n, t in parts.items()]
        return parts, torch.from_numpy(codes.values()).to(torch.float16).to(tensor.dtype)

    config = auto_round.quantization_config(
        {n.removesuffix(".weight"): s for n, s in chosen.items()}, kind[0]
    )
    return *write_both(work, source, stored, config), chosen


def under_old_names(packed: Path, folder: Path, chosen: dict[str, Scheme | None]) -> Path:
    """Copy a quantized Mixtral, its matrices under the names of the source."""
    names = auto_round.name_map(chosen, "mixtral")
    back = {new.removesuffix("weight"): old.removesuffix("weight") for old, new in names.items()}
    old = {}
    for name, tensor in load_file(packed / "model.safetensors").items():
        stem, _, suffix = name.rpartition(".")
        old[back.get(f"{stem}.", f"{stem}.") + suffix] = tensor
    folder.mkdir()
    save_file(old, folder / "model.safetensors", {"format": "pt"})
    shutil.copy(packed / "config.json", folder)
    return folder


def test_plain_from_pretrained_loads_them(tmp_path):
    """Llama with mixed widths, Qwen3-MoE and Mixtral with widths by expert, against the numbers they stand for.

    Mixtral under its old names shows why they are mapped: nothing fails, and all experts are missing.
    """
    require("auto_round")
    cases = {"dense": (LLAMA, dense), "qwen": (QWEN3_MOE, per_expert), "mixtral": (MIXTRAL, per_expert)}
    made = {name: written(tmp_path / name, *case) for name, case in cases.items()}
    old = under_old_names(made["mixtral"][0], tmp_path / "old", made["mixtral"][2])
    folders = [*(m[1] for m in made.values()), *(m[0] for m in made.values()), old]
    *loaded, old_names = load_in_child(tmp_path / "child", *folders)
    for (name, (_, _, chosen)), plain, packed in zip(made.items(), loaded[:3], loaded[3:], strict=True):
        assert loaded_whole(plain) and loaded_whole(packed), packed["faults"]
        kinds = Counter(kind.rsplit(".", 1)[1] for kind in packed["kinds"].values())
        assert kinds["QuantLinear"] == sum(scheme is not None for scheme in chosen.values())
        assert {scheme.bits for scheme in chosen.values() if scheme} == {2, 3, 4, 8}
        assert apart(packed, plain) < {"dense": 0.007, "qwen": 0.014, "mixtral": 0.027}[name]
    assert len(old_names["faults"]["missing_keys"]) >= sum(".experts." in name for name in made["mixtral"][2])


def wide_enough(config: dict) -> dict:
    """Return a tiny configuration whose experts are 64 x 64, so that their codes fill words."""
    widths = ("hidden_size", "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size")
    return {**config, **{key: 64 for key in widths if key in config}, "vocab_size": 96}


@pytest.mark.slow
def test_every_family_said_to_load(tmp_path):
    """Experts of 8, 3, 2 and 4 bits in the reader of each family, everything else in 16."""
    require("auto_round")
    made = {}
    for family in sorted(auto_round.EXPERTS):
        key, sizes = {**expert_models.CONFIGS, **expert_models.MORE}[family]
        kind = (family, {**wide_enough(sizes), key: 4})
        made[family] = written(
            tmp_path / family, kind, lambda name: per_expert(name) if ".experts." in name else None
        )
    loaded = load_in_child(tmp_path / "child", *(m[1] for m in made.values()), *(m[0] for m in made.values()))
    for number, family in enumerate(made):
        plain, packed = loaded[number], loaded[number + len(made)]
        assert loaded_whole(plain) and loaded_whole(packed), family
        assert sum("QuantLinear" in module for module in packed["kinds"].values()) == sum(
            map(bool, made[family][2].values())
        )
        assert apart(packed, plain) < 0.027, family
