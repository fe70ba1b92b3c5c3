"""Folders in every quantized form there is a writer or a maker for, by name: ``GOOD[kind](folder)``; the plain model of each lies beside it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from compressed_models import dense_folder, int_, written
from quantized_folders import LLAMA, MIXTRAL, QWEN3_MOE, plain_folder, rounded, write_both
from quantized_models import EVEN, fp8_folders, integer_folders, mxfp4_folders

from surgeon.formats import auto_round, bnb
from surgeon.formats.float4 import MXFP4, NVFP4
from surgeon.formats.float8_dynamic import FLOAT8
from surgeon.formats.scheme import Scheme
from surgeon.traits import part_of

CHOSEN = {
    "q_proj": int_(4, 32), "k_proj": int_(3, 32), "v_proj": FLOAT8, "o_proj": int_(8), "gate_proj": MXFP4,
    "up_proj": NVFP4, "down_proj": int_(5), "lm_head": None,
}  # fmt: skip


def scheme_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def with_config(folder: Path, config: dict) -> Path:
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**document, "quantization_config": config}))
    return folder


def auto_rounded(folder: Path, kind: tuple, choose) -> Path:
    """Write a model as auto-round stores it."""
    source = plain_folder(folder / "source", kind, torch.float16)
    modules: dict[str, Scheme | None] = {}

    def stored(name: str, tensor: torch.Tensor):
        if tensor.ndim != 2 or part_of(name) == "embedding":
            return None
        module = name.removesuffix(".weight")
        scheme = None if part_of(name) in ("router", "head") else choose(module)
        modules[module] = scheme
        renamed = auto_round.stored_name(name, kind[0])
        if scheme is None:
            return {renamed: tensor}, tensor
        codes = rounded(tensor, scheme)
        stem = renamed.removesuffix("weight")
        return {f"{stem}{part}": torch.from_numpy(a) for part, a in auto_round.pack(codes).items()}, tensor

    packed, _ = write_both(folder / "both", source, stored, {})
    return with_config(packed, auto_round.quantization_config(modules, kind[0]))


def with_bitsandbytes(folder: Path, scheme: Scheme, double: bool = False, kind: tuple = LLAMA) -> Path:
    source = plain_folder(folder / "source", kind, torch.bfloat16)
    modules: dict[str, Scheme | None] = {}

    def stored(name: str, tensor: torch.Tensor):
        if tensor.ndim != 2 or part_of(name) not in ("attention", "mlp"):
            return None
        modules[name.removesuffix(".weight")] = scheme
        parts = bnb.pack(tensor.float().numpy(), scheme, "BF16", double)
        stem = name.removesuffix("weight")
        return {f"{stem}{part}": torch.from_numpy(a.copy()) for part, a in parts.items()}, tensor

    packed, _ = write_both(folder / "both", source, stored, {})
    return with_config(packed, bnb.quantization_config(modules, double))


def compressed(folder: Path) -> Path:
    return written(
        folder, dense_folder(folder / "source"), lambda name: CHOSEN[name.rpartition(".")[2]]
    ).packed


def compressed_experts(folder: Path) -> Path:
    source = plain_folder(folder / "source", QWEN3_MOE, torch.bfloat16)
    return written(folder, source, lambda name: int_(4, 16) if ".experts." in name else int_(8)).packed


GOOD = {
    "compressed": compressed,
    "compressed experts": compressed_experts,
    "auto-round": lambda folder: auto_rounded(folder, LLAMA, lambda m: Scheme("int", 3 if "up" in m else 8, 32)),
    "auto-round mixtral": lambda folder: auto_rounded(folder, MIXTRAL, lambda m: Scheme("int", 2 if "w2" in m else 4, 32)),
    "nf4": lambda folder: with_bitsandbytes(folder, bnb.NF4),
    "fp4 nested": lambda folder: with_bitsandbytes(folder, bnb.FP4, True),
    "int8": lambda folder: with_bitsandbytes(folder, bnb.INT8),
    "nf4 with plain experts": lambda folder: with_bitsandbytes(folder, bnb.NF4, kind=("qwen3_moe", {**QWEN3_MOE[1], "mlp_only_layers": []})),
    "gptq": lambda folder: integer_folders(folder, "gptq")[0],
    "pack with zero points": lambda folder: integer_folders(folder, "pack")[0],
    "fp8": lambda folder: fp8_folders(folder, (8, 8), **EVEN)[0],
    "mxfp4": lambda folder: mxfp4_folders(folder)[0],
}  # fmt: skip
