"""Tiny random models of the families with per-layer readers, cuts of them, and folders of what is left."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

from surgeon.checkpoint.checkpoint import open_path
from surgeon.deploy import per_layer
from surgeon.structure.cut import Cut, LayerCut
from surgeon.structure.find import structure_of
from surgeon.structure.views import MaskedView, PrunedView

TOKENIZER = Path(__file__).resolve().parents[1] / "models" / "base"
VOCABULARY = 281
EXTRA = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": True},
    "gemma": {},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 16},
    "gemma3_text": {"sliding_window": 8, "query_pre_attn_scalar": 16},
    "phi3": {"hidden_size": 128, "head_dim": None},
}
FAMILIES = tuple(EXTRA)


def config_of(family: str, **extra) -> dict:
    """Return config.json of a tiny stock model: 5 layers, 8 query heads of 16 on 4 key/value heads."""
    config = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 5,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "model_type": family,
        "architectures": [per_layer.FAMILIES[family].stock], **EXTRA[family], **extra,
    }  # fmt: skip
    if family == "gemma3_text":
        config.pop("rope_parameters")
    return {key: value for key, value in config.items() if value is not None or key == "sliding_window"}


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every parameter its own values, biases and norms included, large enough to matter."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if parameter.ndim == 1 else 0.12
            parameter.copy_(torch.randn_like(parameter) * scale + (1.0 if "norm" in name else 0.0))
    return model.eval()


def stock_folder(family: str, folder: Path, **extra) -> Path:
    """Write a random stock model with the library itself; the tokenizer is that of the test models."""
    config = config_of(family, **extra)
    kind = getattr(transformers, config["architectures"][0])
    model = randomise(kind(kind.config_class.from_dict(dict(config))))
    folder.mkdir(parents=True)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if config.get("tie_word_embeddings"):
        state.pop("lm_head.weight", None)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return with_tokenizer(folder)


def with_tokenizer(folder: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(TOKENIZER / name, folder)
    return folder


def mixed_cut(structure) -> Cut:
    """Keep another shape in every layer: all, two groups, one head of each, no attention, no FFN; drop none."""
    each = structure.attention[0].per_group
    return Cut((
        LayerCut(None, tuple(range(1, 96, 2))),
        LayerCut(tuple(range(2 * each)), tuple(range(33))),
        LayerCut(tuple(range(1, 4 * each, each)), tuple(range(20, 96))),
        LayerCut((), tuple(range(64))),
        LayerCut(tuple(range(each, 3 * each)), ()),
    ))  # fmt: skip


def opened(folder: Path):
    checkpoint = open_path(folder)
    return checkpoint, structure_of(checkpoint)


def write(view, folder: Path, *, finish: bool = True) -> Path:
    """Write a checkpoint view as a folder, finished for per-layer readers where it needs that."""
    folder.mkdir(parents=True)
    tensors = {}
    for name, info in view.tensors.items():
        tensors[name] = torch.from_numpy(np.array(view.read(name, 0, info.elements))).reshape(info.shape)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config, companions = view.config, []
    if finish and per_layer.is_per_layer(config):
        config, companions = per_layer.finish(config)
    (folder / "config.json").write_text(json.dumps(config))
    for name, content in companions:
        (folder / name).write_bytes(content)
    return with_tokenizer(folder)


def cut_folders(family: str, folder: Path, cut=mixed_cut, **extra) -> tuple[Path, Path]:
    """Return (masked stock model, pruned per-layer model) of one cut of a random model."""
    checkpoint, structure = opened(stock_folder(family, folder / "source", **extra))
    chosen = cut(structure)
    masked = write(MaskedView(checkpoint, structure, chosen), folder / "masked")
    return masked, write(PrunedView(checkpoint, structure, chosen), folder / "pruned")


def ids(rows: int = 2, length: int = 24, seed: int = 3) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(6, VOCABULARY, (rows, length)))


@torch.no_grad()
def logits(model, tokens: torch.Tensor | None = None, **options) -> torch.Tensor:
    return model(input_ids=ids() if tokens is None else tokens, **options).logits
