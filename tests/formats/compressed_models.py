"""Models written in compressed-tensors formats, the plain ones they stand for, and the stock reader's logits of both."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

from surgeon.formats import float4, float8_dynamic, pack_quantized
from surgeon.formats.scheme import Codes, Scheme
from surgeon.kernels.cast import round_to
from surgeon.traits import part_of

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 67, "max_position_embeddings": 64, "initializer_range": 0.1,
         "tie_word_embeddings": False}  # fmt: skip


def int_(bits: int, group: int = -1) -> Scheme:
    return Scheme("int", bits, group)


def rounded(weight: np.ndarray, scheme: Scheme, dtype: str) -> Codes:
    """Return a matrix rounded to the nearest codes, scales of the largest magnitude."""
    rows, columns = weight.shape
    groups = weight.reshape(rows, -1, scheme.group if scheme.group > 0 else columns)
    half = 1 << (scheme.bits - 1)
    scales = round_to((np.abs(groups).max(axis=2) / (half - 0.5)).astype(np.float32), dtype)
    codes = np.clip(np.rint(groups / scales[..., None]), -half, half - 1) + half
    zeros = np.full(scales.shape, half, np.uint8)
    return Codes(scheme, codes.reshape(rows, columns).astype(np.uint8), scales, zeros)


def as_torch(array: np.ndarray, code: str) -> torch.Tensor:
    """Return an array in its carrier type as a tensor of its storage type."""
    array = np.ascontiguousarray(array)
    if code == "BF16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    if code == "F8_E4M3":
        return torch.from_numpy(array).view(torch.float8_e4m3fn)
    return torch.from_numpy(array)


def encoded(
    name: str, weight: np.ndarray, scheme: Scheme, dtype: str
) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """Return the stored tensors of a matrix and its values, float32; names, types and shapes are those of layout()."""
    if scheme.kind == "int":
        writer, made = pack_quantized, rounded(weight, scheme, dtype)
        parts = pack_quantized.pack(made, dtype)
    elif scheme.kind == "float8":
        writer, made = float8_dynamic, float8_dynamic.quantize(weight, dtype)
        parts = float8_dynamic.pack(made, dtype)
    else:
        writer, made = float4, float4.quantize(weight, scheme)
        parts = float4.pack(made)
    tensors = {}
    for stored, code, shape in writer.layout(name, weight.shape, scheme, dtype):
        tensors[stored] = as_torch(parts[stored.removeprefix(name)], code)
        assert tuple(tensors[stored].shape) == shape, stored
    assert len(tensors) == len(parts)
    return tensors, made.values()


@dataclass
class Pair:
    """A written model: folders of the stored one and of the plain one, and what was chosen for it."""

    packed: Path
    plain: Path
    matrices: dict[str, tuple[tuple[int, ...], Scheme | None]]


def dense_folder(folder: Path, **sizes) -> Path:
    """Save a random Llama in bfloat16."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **sizes}))
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def written(
    folder: Path,
    source: Path,
    choose: Callable[[str], Scheme | None],
    dtype: str = "BF16",
    change=lambda config, tensors: None,
) -> Pair:
    """Write a model as chosen by the names of its modules; routers and embeddings stay."""
    packed, plain, matrices = {}, {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        packed[name] = plain[name] = tensor.to(DTYPES[dtype])
        if tensor.ndim != 2 or part_of(name) == "embedding":
            continue
        scheme = None if part_of(name) == "router" else choose(name.removesuffix(".weight"))
        matrices[name] = tuple(tensor.shape), scheme
        if scheme is not None:
            del packed[name]
            tensors, values = encoded(name, tensor.float().numpy(), scheme, dtype)
            packed |= tensors
            plain[name] = torch.from_numpy(values).to(DTYPES[dtype])
    modules = {name.removesuffix(".weight"): scheme for name, (_, scheme) in matrices.items()}
    config = json.loads((source / "config.json").read_text())
    stored = {**config, "quantization_config": pack_quantized.quantization_config(modules)}
    change(stored["quantization_config"], packed)
    for kind, tensors, said in (("packed", packed, stored), ("plain", plain, config)):
        (folder / kind).mkdir(parents=True)
        tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
        save_file(tensors, folder / kind / "model.safetensors", {"format": "pt"})
        (folder / kind / "config.json").write_text(json.dumps(said))
    return Pair(folder / "packed", folder / "plain", matrices)


def loaded(folder: Path, dtype: str = "BF16", **options) -> torch.nn.Module:
    """Return a model as stock transformers loads it; nothing may be missing, left over or of another shape."""
    transformers.utils.logging.disable_progress_bar()
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=DTYPES[dtype], output_loading_info=True, attn_implementation="eager", **options
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 27).reshape(2, 12)).logits.float()


def far(pair: Pair, dtype: str = "BF16", **options) -> float:
    """Return how far the stored model's logits are from those of the plain one, relative to them."""
    want, got = logits(loaded(pair.plain, dtype)), logits(loaded(pair.packed, dtype, **options))
    return float((got - want).norm() / want.norm())
