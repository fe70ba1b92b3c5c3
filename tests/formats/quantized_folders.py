"""Tiny plain models, the quantized folders made from them, and a child process that loads folders as any user would."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from surgeon.formats.scheme import Codes, Scheme

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96,
         "max_position_embeddings": 64, "initializer_range": 0.1, "tie_word_embeddings": False}  # fmt: skip
LLAMA = ("llama", {**SIZES, "intermediate_size": 128, "attention_bias": True})
QWEN3_MOE = ("qwen3_moe", {**SIZES, "intermediate_size": 96, "moe_intermediate_size": 32, "num_experts": 8,
                           "num_experts_per_tok": 2, "head_dim": 16, "mlp_only_layers": [1], "num_hidden_layers": 3})  # fmt: skip
MIXTRAL = ("mixtral", {**SIZES, "intermediate_size": 96, "num_local_experts": 4, "num_experts_per_tok": 2})
IDS = [[5, 9, 3, 77, 41, 8, 60, 22, 13, 90, 2, 31]]

CHILD = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch, transformers
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
job = json.load(open(sys.argv[1]))
out = []
for folder, options in job["jobs"]:
    more = {"quantization_config": transformers.BitsAndBytesConfig(**options["bnb"])} if "bnb" in options else {}
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **more)
    model.train(options.get("train", False))
    with torch.no_grad():
        logits = model(torch.tensor(job["ids"])).logits.float()
    out.append({"logits": logits.tolist(), "kinds": {n: type(m).__module__ + "." + type(m).__name__ for n, m in model.named_modules()},
                "faults": {key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}})
json.dump(out, open(sys.argv[2], "w"))
"""


def require(package: str) -> None:
    """Skip where a reader is not installed; a reader that is there and does not import fails the test."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


def plain_folder(folder: Path, kind: tuple[str, dict], dtype: torch.dtype, seed: int = 0) -> Path:
    """Save a random model of a family in its hub layout."""
    name, sizes = kind
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(name, **sizes)
    transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    return folder


def rounded(weight: torch.Tensor, scheme: Scheme) -> Codes:
    """Return symmetric codes by rounding to the nearest, group by group, in plain loops over groups."""
    values = weight.float().numpy()
    group = scheme.group if scheme.group > 0 else values.shape[1]
    half = 1 << (scheme.bits - 1)
    codes = np.empty(values.shape, np.uint8)
    scales = np.empty((len(values), values.shape[1] // group), np.float32)
    for g in range(scales.shape[1]):
        part = values[:, g * group : (g + 1) * group]
        scales[:, g] = (np.abs(part).max(axis=1) / (half - 0.5)).astype(np.float16)
        codes[:, g * group : (g + 1) * group] = np.clip(
            np.rint(part / scales[:, g : g + 1]) + half, 0, 2 * half - 1
        )
    return Codes(scheme, codes, scales, np.full(scales.shape, half, np.uint8))


def write_both(
    folder: Path,
    source: Path,
    stored: Callable[[str, torch.Tensor], tuple[Mapping[str, torch.Tensor], torch.Tensor] | None],
    scheme: dict,
) -> tuple[Path, Path]:
    """Write the quantized folder and the plain one of what it stands for.

    ``stored`` gives (tensors, dequantized matrix) of a matrix, None where it stays as it is.
    """
    packed, plain = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        parts = stored(name, tensor)
        packed |= {name: tensor} if parts is None else dict(parts[0])
        plain[name] = tensor if parts is None else parts[1]
    config = json.loads((source / "config.json").read_text())
    for kind, tensors, more in (("packed", packed, {"quantization_config": scheme}), ("plain", plain, {})):
        (folder / kind).mkdir(parents=True)
        save_file(
            {n: t.contiguous() for n, t in tensors.items()},
            folder / kind / "model.safetensors",
            {"format": "pt"},
        )
        (folder / kind / "config.json").write_text(json.dumps(config | more))
    return folder / "packed", folder / "plain"


def load_in_child(work: Path, *jobs: Path | tuple[Path, dict]) -> list[dict]:
    """Load folders by from_pretrained, one after the other, in a process of its own.

    A job is a folder, or (folder, options): "bnb" quantizes while loading, "train" runs the model as for training, which
    makes bitsandbytes multiply with decoded matrices. auto-round changes how the process loads mixtures from then on, so
    plain ones come first.

    Returns:
        logits, kinds of modules, faults of loading; of each.
    """
    work.mkdir(parents=True, exist_ok=True)
    listed = [(str(job[0]), job[1]) if isinstance(job, tuple) else (str(job), {}) for job in jobs]
    (work / "job.json").write_text(json.dumps({"jobs": listed, "ids": IDS}))
    (work / "child.py").write_text(CHILD)
    done = subprocess.run(
        [sys.executable, str(work / "child.py"), str(work / "job.json"), str(work / "out.json")],
        capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((work / "out.json").read_text())


def loaded_whole(found: dict) -> bool:
    """Say whether nothing was missing, left over or of another shape."""
    return not any(found["faults"].values())


def apart(one: dict, other: dict) -> float:
    """Return the relative distance of two models' logits."""
    a, b = np.array(one["logits"]), np.array(other["logits"])
    assert np.isfinite(a).all() and np.isfinite(b).all()
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
