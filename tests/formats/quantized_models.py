"""Tiny models in the quantized forms of the hub, made by quantizers and read by decoders written here as plain loops."""

from __future__ import annotations

import itertools
import json
import re
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "structure"))
import expert_models

KEPT = re.compile(r"(embed_tokens|lm_head|norm|\.gate\.|router|bias|sinks)")
"""Names of what models of the hub leave unquantized."""
FOUR_BIT = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
EVEN = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
"""Sizes of a DeepSeek-V3 that blocks of 8 x 8 divide."""


def blocks_of(shape, size):
    """Yield (place in the grid, slices) of every block of a matrix."""
    rows, columns = (range(0, length, step) for length, step in zip(shape, size, strict=True))
    for (i, row), (j, column) in itertools.product(enumerate(rows), enumerate(columns)):
        yield (i, j), (slice(row, row + size[0]), slice(column, column + size[1]))


def to_fp8(weight: torch.Tensor, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (values, scales) of a matrix: the largest of every block becomes 448."""
    grid = [-(-n // step) for n, step in zip(weight.shape, size, strict=True)]
    values, scales = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty(grid)
    for place, block in blocks_of(weight.shape, size):
        scales[place] = weight[block].float().abs().max() / 448
        values[block] = (weight[block].float() / scales[place]).to(torch.float8_e4m3fn)
    return values, scales


def from_fp8(values: torch.Tensor, scales: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return the bfloat16 matrix that blocks of FP8 stand for."""
    out = torch.empty(values.shape, dtype=torch.bfloat16)
    for place, block in blocks_of(values.shape, size):
        out[block] = (values[block].float() * scales[place].float()).to(torch.bfloat16)
    return out


def to_mxfp4(stack: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (blocks [E, out, in/32, 16], scales [E, out, in/32]) of a stack [E, in, out], as the OCP formats 1.0 say."""
    groups = stack.float().transpose(1, 2).unflatten(2, (-1, 32))  # [E, out, in/32, 32]
    largest = groups.abs().amax(-1).clamp(min=1e-30)
    exponents = largest.log2().floor() - 2  # 2 is the exponent of 6, the largest value
    near = (groups / exponents.exp2()[..., None])[..., None] - torch.tensor(FOUR_BIT)
    codes = near.abs().argmin(-1).to(torch.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4, (exponents + 127).to(torch.uint8)


def from_mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Return the float64 stack [E, in, out], value by value."""
    experts, outputs, groups, _ = blocks.shape
    out = np.empty((experts, groups * 32, outputs))
    for e, o, g in np.ndindex(experts, outputs, groups):
        for place in range(32):
            byte = int(blocks[e, o, g, place // 2])
            code = byte >> 4 if place % 2 else byte & 15
            out[e, 32 * g + place, o] = FOUR_BIT[code] * 2.0 ** (int(scales[e, o, g]) - 127)
    return out


def fp8_folders(folder: Path, size: tuple[int, int], **overrides) -> tuple[Path, Path]:
    """Write a DeepSeek-V3 in FP8 blocks, and the bfloat16 model it stands for; return both folders."""
    source = expert_models.moe_folder("deepseek_v3", dtype=torch.bfloat16, **overrides)
    packed, plain = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if KEPT.search(name) or tensor.ndim != 2:
            packed[name] = plain[name] = tensor
            continue
        values, scales = to_fp8(tensor, size)
        packed |= {name: values, f"{name}_scale_inv": scales}
        plain[name] = from_fp8(values, scales, size)
    scheme = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": list(size),
    }
    return _both(folder, source, packed, plain, scheme)


def mxfp4_folders(folder: Path, **overrides) -> tuple[Path, Path]:
    """Write a gpt-oss with experts in MXFP4, and the bfloat16 model it stands for; return both folders."""
    source = expert_models.moe_folder("gpt_oss", dtype=torch.bfloat16, intermediate_size=64, **overrides)
    packed, plain = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if tensor.ndim != 3:
            packed[name] = plain[name] = tensor
            continue
        blocks, scales = to_mxfp4(tensor)
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        plain[name] = torch.from_numpy(from_mxfp4(blocks.numpy(), scales.numpy())).to(torch.bfloat16)
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    return _both(folder, source, packed, plain, {"quant_method": "mxfp4", "modules_to_not_convert": kept})


def to_int4(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (codes 0..15 [out, in], zero points, float16 scales, both [out, groups])."""
    groups = weight.float().unflatten(1, (-1, group))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = ((high - low) / 15).to(torch.float16)
    zeros = (-low / scales.float()).round().clamp(0, 15).to(torch.int64)
    codes = (groups / scales.float()[..., None] + zeros[..., None]).round().clamp(0, 15)
    return codes.to(torch.int64).flatten(1), zeros, scales


def packed_rows(codes: torch.Tensor) -> torch.Tensor:
    """Return 4-bit codes [rows, 8 n] as int32 words [rows, n], the first code in the lowest bits."""
    words = sum(codes[:, n::8] << (4 * n) for n in range(8))
    return (words - ((words >> 31) << 32)).to(torch.int32)


def integer_folders(folder: Path, kind: str, group: int = 8) -> tuple[Path, Path]:
    """Write a Qwen3-MoE with experts in four bits, and the model it stands for; ``kind`` is "gptq" or "pack"."""
    source = expert_models.moe_folder("qwen3_moe", dtype=torch.bfloat16)
    packed, plain = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        stem = name.removesuffix("weight")
        if ".experts." not in name:
            packed[name] = plain[name] = tensor
            continue
        codes, zeros, scales = to_int4(tensor, group)
        wide = codes.unflatten(1, (-1, group)) - zeros[..., None]
        plain[name] = (wide * scales[..., None].double()).flatten(1).to(torch.float16)
        if kind == "gptq":  # zero points less one; 0 becomes 15
            index = torch.arange(codes.shape[1], dtype=torch.int32) // group
            packed |= {f"{stem}qweight": packed_rows(codes).T, f"{stem}g_idx": index}
            packed |= {f"{stem}qzeros": packed_rows((zeros.T - 1) % 16), f"{stem}scales": scales.T}
        else:
            packed |= {
                f"{name}_packed": packed_rows(codes),
                f"{name}_scale": scales,
                f"{name}_shape": torch.tensor(tensor.shape),
            }
            packed[f"{name}_zero_point"] = packed_rows(zeros.T).T
    weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": group}
    scheme = {"quant_method": "gptq", "bits": 4, "group_size": group, "sym": False, "dynamic": {r"-:.*self_attn": {}}} if kind == "gptq" else {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head", "re:.*self_attn.*", "re:.*mlp.gate$"],
    }  # fmt: skip
    return _both(folder, source, packed, plain, scheme)


def _both(folder: Path, source: Path, packed, plain, scheme) -> tuple[Path, Path]:
    config = json.loads((source / "config.json").read_text())
    made = []
    for kind, tensors, more in (("packed", packed, {"quantization_config": scheme}), ("plain", plain, {})):
        (folder / kind).mkdir(parents=True)
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(tensors, folder / kind / "model.safetensors", {"format": "pt"})
        (folder / kind / "config.json").write_text(json.dumps({**config, **more}))
        made.append(folder / kind)
    return made[0], made[1]
