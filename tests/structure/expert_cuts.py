"""Cuts of small mixtures of experts, written to disk and masked in the stock model, without the code under test."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path

import expert_models
import numpy as np
import torch
import transformers
from torch.nn import functional

from surgeon.checkpoint.checkpoint import open_path
from surgeon.checkpoint.dtypes import DTYPES
from surgeon.kernels.cast import narrow
from surgeon.structure.experts.cut import ExpertCut
from surgeon.structure.experts.find import experts_of

COUNT = 12
IDS = torch.randint(3, 67, (2, 11), generator=torch.Generator().manual_seed(5))


def folder_of(family: str, **options) -> Path:
    """Return a saved small model of twelve experts."""
    return expert_models.moe_folder(family, **{expert_models.CONFIGS[family][0]: COUNT, **options})


def opened(family: str, **options):
    checkpoint = open_path(folder_of(family, **options))
    return checkpoint, experts_of(checkpoint)


def uneven_cut(experts, each: int | None = None, seed: int = 0) -> ExpertCut:
    """Return a cut to nine experts, eight in routers of two groups; other ones in every layer."""
    drawn = random.Random(seed)
    size = experts.count // experts.groups
    each = each or (9 if experts.groups == 1 else 8) // experts.groups
    return ExpertCut(
        {
            layer.index: tuple(
                sorted(
                    expert
                    for group in range(experts.groups)
                    for expert in drawn.sample(range(group * size, (group + 1) * size), each)
                )
            )
            for layer in experts.layers
        }
    )


def stored(view, name: str, step: int = 999) -> bytes:
    """Return a tensor of a view as the engine would write it, read in uneven blocks."""
    info = view.tensors[name]
    if not view.computed(name):
        return b"".join(
            view.read_bytes(name, at, min(at + step, info.nbytes)).tobytes()
            for at in range(0, info.nbytes, step)
        )
    code = view.stored_dtype(name)
    parts = [view.read(name, at, min(at + step, info.elements)) for at in range(0, info.elements, step)]
    return b"".join(narrow(part, code).tobytes() if part.dtype != DTYPES[code].carrier else part.tobytes() for part in parts)  # fmt: skip


def save_raw(file: Path, tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> None:
    """Write a safetensors file of any types: name -> (type, shape, bytes)."""
    header, place = {"__metadata__": {"format": "pt"}}, 0
    for name, (code, shape, content) in tensors.items():
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [place, place + len(content)]}
        place += len(content)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for _, _, content in tensors.values():
            out.write(content)


def write(view, folder: Path, step: int = 999) -> Path:
    """Write a view as a model folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_raw(
        folder / "model.safetensors",
        {name: (view.stored_dtype(name), info.shape, stored(view, name, step)) for name, info in view.tensors.items()},
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(view.config))
    return folder


def stock(folder: Path, dtype: torch.dtype = torch.float32):
    """Load a folder with transformers, strictly, with eager attention and experts."""
    config = transformers.AutoConfig.from_pretrained(folder)
    nested = getattr(config, "text_config", None) is not None
    auto = transformers.AutoModelForImageTextToText if nested else transformers.AutoModelForCausalLM
    model, info = auto.from_pretrained(folder, dtype=dtype, attn_implementation="eager", output_loading_info=True)  # fmt: skip
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert not info.get("error_msgs"), info
    with contextlib.suppress(ValueError):  # llama4 has none to choose from
        model.set_experts_implementation("eager")
    return model.eval()


def logits(model, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@contextlib.contextmanager
def switched_off(model, kept: list[tuple[int, ...]], hidden: int = expert_models.HIDDEN):
    """Give dropped experts a router result of -1e30 and a bias for the choice of -1e9; ``kept`` by MoE layer in order.

    Routers are found by their shape alone, so that nothing here depends on a record.
    """
    routers = [
        p for name, p in model.named_parameters() if tuple(p.shape) == (COUNT, hidden) and "bias" not in name
    ]
    biases = [
        tensor
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if ("correction" in name or "expert_bias" in name) and tensor.numel() == COUNT
    ]
    assert len(routers) == len(kept) and len(biases) in (0, len(kept))
    gone = [torch.tensor(sorted(set(range(COUNT)) - set(ids))) for ids in kept]
    before = [bias.detach().clone() for bias in biases]
    for bias, off in zip(biases, gone, strict=False):
        bias.data.reshape(-1)[off] = -1e9
    real, seen = functional.linear, set()

    def linear(input, weight, bias=None):
        out = real(input, weight, bias)
        for number, router in enumerate(routers):
            if weight.shape == router.shape and torch.equal(weight.float(), router.float()):
                seen.add(number)
                out = out.clone()
                out[..., gone[number]] = -1e30
        return out

    functional.linear = linear
    try:
        yield
    finally:
        functional.linear = real
        for bias, values in zip(biases, before, strict=True):
            bias.data.copy_(values)
    assert len(seen) == len(kept), "a router was not run"


def masked_logits(model, experts, cut, ids: torch.Tensor = IDS) -> torch.Tensor:
    with switched_off(model, [cut.experts(layer.index, layer.count) for layer in experts.running]):
        return logits(model, ids)


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    """Return the raw carrier values of every tensor of a folder."""
    checkpoint = open_path(folder)
    return {n: checkpoint.read(n, 0, i.elements).reshape(i.shape) for n, i in checkpoint.tensors.items()}
