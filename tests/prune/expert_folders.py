"""Small mixtures of experts on disk, changed by hand, and their experts as the stock model holds them."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "structure"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "calibrate"))
from expert_models import EXPERTS as EXPERTS
from expert_models import HIDDEN as HIDDEN
from expert_models import WIDTH as WIDTH
from expert_models import moe_folder as moe_folder
from structure_models import write as write
from walk_models import stock

from surgeon.checkpoint.checkpoint import StoredCheckpoint, open_path
from surgeon.structure.experts.find import experts_of
from surgeon.structure.experts.parts import Experts

STORAGES = [
    ("mixtral", "hub"), ("mixtral", "fused"), ("qwen3_moe", "hub"), ("qwen2_moe", "hub"), ("olmoe", "hub"),
    ("granitemoe", "hub"), ("gpt_oss", "hub"), ("deepseek_v3", "hub"),
]  # fmt: skip
"""Per expert, fused, interleaved and transposed with biases, granite's own, groups with a correction bias."""

TEXTS = [np.random.default_rng(seed).integers(3, 67, length) for seed, length in enumerate((19, 23, 23, 7))]


def opened(folder: Path) -> tuple[StoredCheckpoint, Experts]:
    checkpoint = open_path(folder)
    return checkpoint, experts_of(checkpoint)


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a folder by name."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def edited(folder: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None], **config) -> Path:
    """Copy a model with changed tensors and keys of its configuration."""
    target.mkdir(parents=True)
    state = state_of(folder)
    change(state)
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items()},
        target / "model.safetensors",
        {"format": "pt"},
    )
    for file in folder.glob("*.json"):
        if "index" not in file.name:
            shutil.copy(file, target)
    document = json.loads((folder / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(document))
    return target


def loaded(folder: Path) -> torch.nn.Module:
    """Load with the library, eager, refusing any tensor that does not fit."""
    model = stock(folder, attn_implementation="eager", dtype="auto")
    model.set_experts_implementation("eager")
    return model


def experts_module(model: torch.nn.Module, layer: int) -> torch.nn.Module:
    block = model.get_submodule(f"model.layers.{layer}")
    return next(
        m for m in block.modules() if hasattr(m, "down_proj") and getattr(m.down_proj, "ndim", 0) == 3
    )


def matrices(model: torch.nn.Module, family: str, layer: int, expert: int) -> dict[str, torch.Tensor]:
    """Return gate, up [width, hidden], down [hidden, width] and biases of one expert, by the library's layout."""
    module = experts_module(model, layer)
    both, down = module.gate_up_proj[expert].detach(), module.down_proj[expert].detach()
    if family != "gpt_oss":
        half = len(both) // 2
        return {"gate": both[:half], "up": both[half:], "down": down}
    bias = module.gate_up_proj_bias[expert].detach()
    return {
        "gate": both[:, 0::2].T, "up": both[:, 1::2].T, "down": down.T,
        "gate_bias": bias[0::2], "up_bias": bias[1::2], "down_bias": module.down_proj_bias[expert].detach(),
    }  # fmt: skip


def router_of(model: torch.nn.Module, layer: int) -> torch.nn.Module:
    block = model.get_submodule(f"model.layers.{layer}")
    return next(
        m
        for n, m in block.named_modules()
        if n.endswith(("mlp.gate", "mlp.router", "block_sparse_moe.router", "block_sparse_moe.gate"))
    )


@torch.no_grad()
def logits(model: torch.nn.Module) -> list[torch.Tensor]:
    return [model(input_ids=torch.from_numpy(ids)[None]).logits[0] for ids in TEXTS]
