"""A quantized folder is accepted as it is, and every kind of damage is named: module by module, without a reader."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "formats"))
from compressed_models import encoded, int_
from quantized_kinds import GOOD, scheme_of, with_config

from surgeon.formats.float4 import MXFP4, NVFP4
from surgeon.formats.scheme import Scheme
from surgeon.verify.static import verify_path

LAYER = "model.layers.1"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders of every kind, written once."""
    done: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in done:
            done[kind] = GOOD[kind](tmp_path_factory.mktemp("good"))
        return done[kind]

    return make


@pytest.mark.parametrize("kind", GOOD)
def test_what_is_well_stored_is_accepted(kind, made):
    folder = made(kind)
    report = verify_path(folder, values=True)
    assert not report.errors, [e.message for e in report.errors]
    plain = folder.parent / "plain" / "model.safetensors"
    wanted = sum(tensor.numel() for tensor in load_file(plain).values())
    assert report.parameters == wanted
    assert ("quantization" in report.checks) == (kind != "mxfp4")


# ---- damage ---------------------------------------------------------------------------------------------


def damaged(source: Path, target: Path, change=None, config=None) -> Path:
    """Copy a folder with other tensors or another quantization_config."""
    target.mkdir()
    tensors = load_file(source / "model.safetensors")
    if change is not None:
        change(tensors)
    save_file(
        {name: t.contiguous().clone() for name, t in tensors.items()},
        target / "model.safetensors",
        {"format": "pt"},
    )
    (target / "config.json").write_text((source / "config.json").read_text())
    if config is not None:
        said = scheme_of(source)
        with_config(target, config(said) or said)
    return target


def drop(name: str):
    return lambda tensors: tensors.pop(name)


def put(name: str, tensor: torch.Tensor):
    return lambda tensors: tensors.update({name: tensor})


def repack(module: str, scheme: Scheme, shape: tuple[int, int], like: str = "weight_packed"):
    """Store one module by another scheme than config.json says."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.startswith(f"{module}.")]:
            del tensors[name]
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).numpy()
        tensors.update(encoded(f"{module}.weight", weight, scheme, "BF16")[0])

    return change


def ignore(*names: str):
    return lambda said: {**said, "ignore": [*said["ignore"], *names]}


def first_group(said: dict, targets: str) -> dict:
    return next(g for g in said["config_groups"].values() if any(targets in t for t in g["targets"]))


def says_bits(targets: str, bits: int):
    def config(said: dict) -> dict:
        first_group(said, targets)["weights"]["num_bits"] = bits
        return said

    return config


def only_for(module: str, groups: dict):
    """Take a module out of the targets."""

    def config(said: dict) -> dict:
        for entry in said["config_groups"].values():
            entry["targets"] = [t for t in entry["targets"] if t != module]
        return said

    return config


EXPERT = "model.layers.0.mlp.experts.3.up_proj"
Q, V, UP, GATE, DOWN = (f"{LAYER}.self_attn.q_proj", f"{LAYER}.self_attn.v_proj", f"{LAYER}.mlp.up_proj",
                        f"{LAYER}.mlp.gate_proj", f"{LAYER}.mlp.down_proj")  # fmt: skip
F8 = torch.float8_e4m3fn
CASES = {
    "one expert of other bits": ("compressed experts", repack(EXPERT, int_(2, 16), (32, 64)), None, "E478", f"{EXPERT}.weight_packed has shape"),
    "one expert of another group": ("compressed experts", repack(EXPERT, int_(4, 32), (32, 64)), None, "E478", f"{EXPERT}.weight_scale has shape"),
    "an expert that is missing": ("compressed experts", lambda t: [t.pop(n) for n in list(t) if n.startswith(f"{EXPERT}.")], None, "E478", f"{EXPERT} [32, 64] is missing"),
    "an expert left plain": ("compressed experts", lambda t: ([t.pop(n) for n in list(t) if n.startswith(f"{EXPERT}.")], put(f"{EXPERT}.weight", torch.zeros(32, 64, dtype=torch.bfloat16))(t)), None, "E479", f"{EXPERT} is stored as plain BF16"),
    "a scale is missing": ("compressed", drop(f"{Q}.weight_scale"), None, "E478", f"{Q}.weight_scale is missing"),
    "a shared scale is missing": ("compressed", drop(f"{UP}.weight_global_scale"), None, "E478", f"{UP}.weight_global_scale is missing"),
    "a shape is missing": ("compressed", drop(f"{Q}.weight_shape"), None, "E478", f"{Q}.weight_shape is missing"),
    "a scale of another type": ("compressed", put(f"{Q}.weight_scale", torch.ones(64, 2, dtype=torch.int32)), None, "E478", f"{Q}.weight_scale is of type I32"),
    "double scales": ("compressed", put(f"{Q}.weight_scale", torch.ones(64, 2, dtype=torch.float64)), None, "E478", f"{Q}.weight_scale is of type F64"),
    "a plain scale of NVFP4": ("compressed", put(f"{UP}.weight_scale", torch.ones(96, 4, dtype=torch.bfloat16)), None, "E478", f"{UP}.weight_scale is of type BF16"),
    "scales of too few rows": ("compressed", put(f"{V}.weight_scale", torch.ones(31, 1, dtype=torch.bfloat16)), None, "E478", f"{V}.weight_scale has shape [31, 1]"),
    "MXFP4 where NVFP4 is said": ("compressed", repack(UP, MXFP4, (96, 64)), None, "E478", f"{UP}.weight_scale is of type U8"),
    "NVFP4 where MXFP4 is said": ("compressed", repack(GATE, NVFP4, (96, 64)), None, "E478", f"{GATE}.weight_scale is of type F8_E4M3"),
    "another plain shape": ("compressed", put(f"{Q}.weight_shape", torch.tensor([64, 60])), None, "E478", f"{Q}.weight_shape says [64, 60]"),
    "a module said to be plain": ("compressed", None, ignore(Q), "E479", f"{Q} is stored quantized"),
    "modules said to be plain by a pattern": ("compressed", None, ignore(r"re:.*layers\.1\..*down_proj"), "E479", f"{DOWN} is stored quantized"),
    "other bits said": ("compressed", None, says_bits("q_proj", 8), "E478", "self_attn.q_proj.weight_packed has shape"),
    "codes left over": ("compressed", put(f"{UP}.weight_shape", torch.tensor([96, 64])), None, "E480", f"{UP}.weight_shape is left over"),
    "zero points left over": ("compressed", put(f"{Q}.weight_zero_point", torch.zeros(8, 2, dtype=torch.int32)), None, "E480", f"{Q}.weight_zero_point is left over"),
    "a plain copy left over": ("compressed", put(f"{Q}.weight", torch.zeros(64, 64, dtype=torch.bfloat16)), None, "E480", f"{Q}.weight is left over"),
    "a scale of nothing": ("compressed", put("lm_head.weight_scale", torch.ones(67, 1, dtype=torch.bfloat16)), None, "E479", "lm_head is stored quantized"),
    "a module of no target": ("compressed", None, only_for(Q, {}), "E479", f"{Q} is stored quantized"),
    "groups without targets": ("compressed", None, lambda said: {**said, "config_groups": {"g": {"weights": {"num_bits": 4}}}}, "E481", "without targets"),
    "a plain norm of another size": ("compressed", put(f"{LAYER}.input_layernorm.weight", torch.ones(65, dtype=torch.bfloat16)), None, "E343", "has shape [65]"),
    "a plain tensor is missing": ("compressed", drop("model.embed_tokens.weight"), None, "E343", "model.embed_tokens.weight is missing"),
    "another width": ("compressed", repack(Q, int_(4, 32), (96, 64)), None, "E478", f"{Q}.weight_packed has shape [96, 8]"),
    "a stray module": ("compressed", lambda t: t.update(encoded(f"{LAYER}.mlp.side_proj.weight", torch.randn(8, 32).numpy(), int_(4, 32), "BF16")[0]), None, "E479", "side_proj is stored quantized"),
    "a module of auto-round in other bits": ("auto-round", None, lambda said: {**said, "extra_config": {n: {**e, "bits": 2} if e["bits"] == 3 else e for n, e in said["extra_config"].items()}}, "E478", "up_proj.qweight has shape"),
    "zero points are missing": ("auto-round", drop(f"{UP}.qzeros"), None, "E478", f"{UP}.qzeros is missing"),
    "an expert of mixtral is missing": ("auto-round mixtral", lambda t: [t.pop(n) for n in list(t) if ".mlp.experts.2.up_proj." in n], None, "E478", "mlp.experts.2.up_proj"),
    "mixtral under its old names": ("auto-round mixtral", lambda t: [t.update({n.replace(".mlp.experts.1.up_proj", ".block_sparse_moe.experts.1.w3"): t.pop(n)}) for n in list(t) if ".mlp.experts.1.up_proj." in n], None, "E478", "mlp.experts.1.up_proj"),
    "an absmax is missing": ("nf4", drop(f"{UP}.weight.absmax"), None, "E478", f"{UP}.weight.absmax is missing"),
    "other four bits": ("nf4", None, lambda said: {**said, "bnb_4bit_quant_type": "fp4"}, "E478", "bitsandbytes__fp4 is missing"),
    "scales that are not nested": ("fp4 nested", None, lambda said: {**said, "bnb_4bit_use_double_quant": False}, "E478", "absmax is of type U8"),
    "an absmax of another length": ("nf4", put(f"{UP}.weight.absmax", torch.ones(5)), None, "E446", "does not fit"),
    "a module that bitsandbytes skips": ("nf4", None, lambda said: {**said, "llm_int8_skip_modules": ["lm_head", UP]}, "E479", f"{UP} is stored quantized"),
    "row scales are missing": ("int8", drop(f"{UP}.SCB"), None, "E478", f"{UP}.SCB is missing"),
    "an expert of GPTQ of other bits": ("gptq", put(f"{EXPERT}.qweight", torch.zeros(2, 24, dtype=torch.int32)), None, "E478", f"{EXPERT}.qweight has shape"),
    "a scale of a block is missing": ("fp8", lambda t: t.pop(next(n for n in t if n.endswith("_scale_inv"))), None, "E478", "weight_scale_inv is missing"),
    "blocks of another size": ("fp8", None, lambda said: {**said, "weight_block_size": [16, 16]}, "E478", "weight_scale_inv has shape"),
    "FP8 where nothing is to be": ("fp8", None, lambda said: {**said, "modules_to_not_convert": ["model.layers.1"]}, "E479", "is stored quantized"),
    "exponents are missing": ("mxfp4", lambda t: t.pop(next(n for n in t if n.endswith("_scales"))), None, "E446", "without"),
    "exponents of another shape": ("mxfp4", lambda t: t.update({(n := next(n for n in t if n.endswith("_scales"))): t[n][:, :-1]}), None, "E446", "does not fit"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_damage_is_named(case, made, tmp_path):
    kind, change, config, code, says = CASES[case]
    report = verify_path(damaged(made(kind), tmp_path / "bad", change, config))
    found = [(error.code, error.message) for error in report.errors]
    assert any(one == code and says in message for one, message in found), found
    assert report.failed["config"] == len(found) and all(
        error.help for error in report.errors if error.code != "E343"
    )


def test_all_findings_are_returned(made, tmp_path):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for module in (Q, DOWN):
            del tensors[f"{module}.weight_scale"]
        tensors[f"{UP}.weight_global_scale"] = torch.ones(3)

    report = verify_path(damaged(made("compressed"), tmp_path / "bad", change))
    assert sorted(error.code for error in report.errors) == ["E478"] * 3


def test_a_form_that_is_not_read_is_checked_as_far_as_it_can_be(made, tmp_path):
    """Names of plain tensors still count; packed values are said not to be compared."""
    source = made("gptq")
    folder = damaged(source, tmp_path / "other", None, lambda said: {"quant_method": "quark"})
    report = verify_path(folder)
    assert any("were not compared" in note for note in report.notes)
    folder = damaged(
        source, tmp_path / "bad", drop("model.embed_tokens.weight"), lambda said: {"quant_method": "quark"}
    )
    assert any(
        "model.embed_tokens.weight is missing" in error.message for error in verify_path(folder).errors
    )


def test_a_family_without_record(made, tmp_path):
    """What config.json says of modules needs no record of the family."""
    source = made("compressed")

    def unknown(folder: Path) -> Path:
        document = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**document, "model_type": "nobody_knows"}))
        return folder

    assert not verify_path(unknown(damaged(source, tmp_path / "good"))).errors
    report = verify_path(unknown(damaged(source, tmp_path / "bad", drop(f"{Q}.weight_scale"))))
    assert [error.code for error in report.errors] == ["E478"]
    report = verify_path(unknown(damaged(source, tmp_path / "bits", repack(Q, int_(8, 32), (64, 64)))))
    assert [error.code for error in report.errors] == ["E478"]
