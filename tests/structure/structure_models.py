"""Tiny models with more heads than the usual ones, cuts of them, and what they must compute, without the code under test."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "calibrate"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "architectures"))
from tiny_models import FAMILIES as FAMILIES
from walk_models import model_folder
from walk_models import stock as stock

from surgeon.checkpoint.checkpoint import open_path
from surgeon.structure.cut import Cut, LayerCut
from surgeon.structure.find import structure_of

LATENT = ("deepseek_v2", "deepseek_v3")
DENSE = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi",
    "phi3",
    "gpt2",
    "bert",
)
ROUTED = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "gpt_oss")
HEADED = ("phimoe", "glm4_moe", "ernie4_5_moe", "hunyuan_v1_moe", "minimax_m2", "granitemoeshared")
ONLY_DEPTH = (
    "minimax",
    "qwen3_next",
    "qwen3_5_moe_text",
    "lfm2_moe",
    "jamba",
    "llama4_text",
    "granitemoehybrid",
    "kimi_linear",
    "nemotron_h",
)
FURTHER = (*HEADED, *ONLY_DEPTH, "kimi_k2")
"""Families tested in test_further_families: with heads that can be cut, and of which only whole layers can go."""
STOCK_HEADS = tuple(f for f in (*DENSE, *ROUTED) if f not in ("gpt2", "bert", "olmoe"))
"""Families whose own class can hold a model with fewer heads beside the same residual stream."""

HEADS = {
    "gpt2": {"n_embd": 48, "n_head": 6},
    "bert": {"hidden_size": 48, "num_attention_heads": 6},
}
GROUPED = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3}
TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def folder_of(family: str, class_name: str = "", **extra) -> Path:
    """Return a saved random model: 3 layers; 6 query heads on 3 key/value heads where the family can."""
    sizes = {} if family in LATENT else {**HEADS.get(family, GROUPED), **extra}
    if family in LATENT:
        sizes = {"num_hidden_layers": 4, "first_k_dense_replace": 2, **extra}
    fixed = tuple(sorted((k, tuple(v.items()) if isinstance(v, dict) else v) for k, v in sizes.items()))
    return model_folder(family, fixed, True, class_name)


def opened(family: str, **extra):
    checkpoint = open_path(folder_of(family, **extra))
    return checkpoint, structure_of(checkpoint)


def write(view, folder: Path, config: dict | None = None, step: int = 97) -> Path:
    """Write a checkpoint view as a model folder, read in uneven blocks."""
    folder.mkdir(parents=True)
    tensors = {}
    for name, info in view.tensors.items():
        blocks = [view.read(name, at, min(at + step, info.elements)) for at in range(0, info.elements, step)]
        flat = np.concatenate(blocks)
        if info.dtype == "BF16" and flat.dtype == np.uint16:
            tensor = torch.from_numpy(flat.view(np.int16)).view(torch.bfloat16)
        else:
            tensor = torch.from_numpy(flat)
        tensors[name] = tensor.reshape(info.shape).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config or view.config))
    return folder


def strictly(folder: Path):
    """Load a folder the way everybody does, and insist that nothing is missing or left over."""
    names = json.loads((folder / "config.json").read_text())["architectures"]
    model, report = getattr(transformers, names[0]).from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


def tokens(rows: int = 2, length: int = 15) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(5).integers(3, 67, (rows, length)))


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=tokens()).logits


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 2e-5) -> None:
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max() / wanted.abs().max()) < tolerance


def groups_cut(structure) -> Cut:
    """Remove one key/value head of every layer with its query heads, another one in each layer."""
    return Cut(tuple(
        LayerCut(heads=None if a is None else tuple(h for h in range(a.heads) if h // a.per_group != n % a.groups))
        for n, a in enumerate(structure.attention)
    ))  # fmt: skip


def heads_cut(structure) -> Cut:
    """Remove one query head from every group, at changing places; needs at least two a group."""

    def keeps(a, layer, head):
        return head % a.per_group != (layer + head // a.per_group) % a.per_group

    return Cut(tuple(
        LayerCut(heads=None if a is None else tuple(h for h in range(a.heads) if keeps(a, n, h)))
        for n, a in enumerate(structure.attention)
    ))  # fmt: skip


def ffn_cut(structure, width: int = 20) -> Cut:
    drawn = np.random.default_rng(3)
    return Cut(tuple(
        LayerCut(channels=None if f is None else tuple(sorted(drawn.choice(f.width, width, replace=False).tolist())))
        for f in structure.ffn
    ))  # fmt: skip


def both(first: Cut, second: Cut) -> Cut:
    """Heads of the first, channels of the second, layers that are in both."""
    return Cut(tuple(
        None if a is None or b is None else LayerCut(a.heads, b.channels)
        for a, b in zip(first.layers, second.layers, strict=True)
    ))  # fmt: skip


def without(cut: Cut, *layers: int) -> Cut:
    return Cut(tuple(None if n in layers else layer for n, layer in enumerate(cut.layers)), cut.hidden)


@contextmanager
def removed(model, structure, cut: Cut):
    """Make the stock dense model compute the cut: inputs of output matrices zeroed by hooks, dropped layers skipped."""
    handles = []

    def zero(indices):
        def hook(module, args):
            value = args[0].clone()
            value[..., indices] = 0
            return (value, *args[1:])

        return hook

    def nothing(module, args, output):
        return torch.zeros_like(output)

    def skip(module, args, kwargs, output):
        value = args[0] if args else kwargs["hidden_states"]
        return (value, *output[1:]) if isinstance(output, tuple) else value

    for number, kept in enumerate(cut.layers):
        if kept is None:
            layer = model.get_submodule(f"{structure.prefix}{number}")
            handles.append(layer.register_forward_hook(skip, with_kwargs=True))
            continue
        for part, units, size, count in (
            (a := structure.attention[number], kept.heads, a and a.head_dim, a and a.heads),
            (f := structure.ffn[number], kept.channels, 1, f and f.width),
        ):
            if part is None or units is None:
                continue
            module = model.get_submodule(part.output.module)
            gone = [u * size + at for u in range(count) if u not in units for at in range(size)]
            handles.append(module.register_forward_pre_hook(zero(gone)))
            if not units:
                handles.append(module.register_forward_hook(nothing))
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()
