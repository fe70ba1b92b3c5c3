"""Folders of tiny models to train, and samples for them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "calibrate"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "structure"))
from expert_models import moe_folder
from walk_models import model_folder, stock

__all__ = ["Text", "disturbed", "model_folder", "moe_folder", "read", "stock", "texts"]


@dataclass(frozen=True)
class Text:
    """A sample as `surgeon.calibrate.data.Sample` is one."""

    ids: np.ndarray
    answer_start: int = 0
    line: int = 0


def texts(count=12, length=16, vocabulary=67, seed=0, uneven=True) -> list[Text]:
    drawn = np.random.default_rng(seed)
    return [Text(drawn.integers(3, vocabulary, length - (n % 5 if uneven else 0))) for n in range(count)]


def read(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def disturbed(source: Path, target: Path, *, size=0.05, seed=3, dtype=None, zeros=0.0) -> Path:
    """Copy a model folder with noise on its matrices, in another type, or with zeros in its blocks."""
    generator = torch.Generator().manual_seed(seed)
    target.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    tensors = read(source)
    for name, tensor in tensors.items():
        if tensor.ndim > 1:
            tensor = tensor + size * torch.randn(tensor.shape, generator=generator)
            if zeros and ".layers." in name:
                tensor[torch.rand(tensor.shape, generator=generator) < zeros] = 0
        tensors[name] = tensor.to(dtype or tensor.dtype).contiguous()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target
