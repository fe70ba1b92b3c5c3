"""Make synthetic llama checkpoints: a base and fine-tunes of it, bfloat16, written as a stream.

Weights are normal with standard deviation 0.02 and norms lie around 1, as in real checkpoints. A
fine-tune adds normal noise of 2 % of that, so that about a sixth of its bfloat16 values stay
what they were and many differences tie, which is what trimming by magnitude has to deal with.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from surgeon.kernels.cast import bf16_bits

PIECE = 4 << 20
SIGMA = 0.02
CHANGE = 4e-4


@dataclass(frozen=True)
class Size:
    """Shape of a llama checkpoint."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    heads: int
    kv_heads: int
    shard_bytes: int = 5_000_000_000

    def config(self) -> dict:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden // self.heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": "bfloat16",
        }

    def tensors(self) -> list[tuple[str, tuple[int, ...]]]:
        """Return names and shapes in the order of the file."""
        h, i, kv = self.hidden, self.intermediate, self.kv_heads * (self.hidden // self.heads)
        found: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (self.vocabulary, h))]
        for layer in range(self.layers):
            at = f"model.layers.{layer}."
            found += [
                (at + "input_layernorm.weight", (h,)),
                (at + "mlp.down_proj.weight", (h, i)),
                (at + "mlp.gate_proj.weight", (i, h)),
                (at + "mlp.up_proj.weight", (i, h)),
                (at + "post_attention_layernorm.weight", (h,)),
                (at + "self_attn.k_proj.weight", (kv, h)),
                (at + "self_attn.o_proj.weight", (h, h)),
                (at + "self_attn.q_proj.weight", (h, h)),
                (at + "self_attn.v_proj.weight", (kv, h)),
            ]
        found += [("model.norm.weight", (h,)), ("lm_head.weight", (self.vocabulary, h))]
        return sorted(found)  # as the official library writes them


SIZES = {
    "quick": Size(1024, 2816, 6, 16_000, 16, 4),
    "full": Size(2048, 5632, 12, 32_000, 32, 4),
    "big": Size(4096, 14_336, 32, 32_000, 32, 8),
}
"""About 0.2, 1.3 and 14.5 GB per model."""


def write_model(folder: Path, size: Size, fine_tune: int, seed: int = 7) -> int:
    """Write one model; ``fine_tune`` 0 is the base, others add their own change to it. Return its bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, shape in size.tensors():
        nbytes = 2 * math.prod(shape)
        if shards[-1] and filled + nbytes > size.shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((name, shape))
        filled += nbytes
    weight_map: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(shards):
        many = len(shards) > 1
        file_name = (
            f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" if many else "model.safetensors"
        )
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name, shape in tensors:
            end = position + 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, end]}
            position = end
            weight_map[name] = file_name
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / file_name, "wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for name, shape in tensors:
                _write_tensor(stream, name, shape, fine_tune, seed)
        total += position
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(size.config(), indent=2) + "\n")
    return total


def _write_tensor(stream, name: str, shape: tuple[int, ...], fine_tune: int, seed: int) -> None:
    label = int.from_bytes(name.encode()[-12:], "little")
    level = int("".join(c for c in name if c.isdigit()) or 0)
    common = np.random.Generator(np.random.SFC64([seed, label, level]))
    own = np.random.Generator(np.random.SFC64([seed, label, level, fine_tune]))
    middle = 1.0 if len(shape) == 1 else 0.0
    elements = math.prod(shape)
    for start in range(0, elements, PIECE):
        count = min(PIECE, elements - start)
        values = common.standard_normal(count, dtype=np.float32)
        values *= np.float32(SIGMA)
        values += np.float32(middle)
        bits = bf16_bits(values)
        if fine_tune:
            stored = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
            change = own.standard_normal(count, dtype=np.float32)
            change *= np.float32(CHANGE)
            change += stored
            bits = bf16_bits(change)
        stream.write(bits.tobytes())


def make(folder: Path, size_name: str, models: int = 3) -> list[Path]:
    """Make ``models`` folders (base, tune1, ...) unless complete ones are there; return them."""
    size = SIZES[size_name]
    paths = []
    for number in range(models):
        path = folder / size_name / ("base" if number == 0 else f"tune{number}")
        if not (path / "config.json").exists():  # written last
            shutil.rmtree(path, ignore_errors=True)
            nbytes = write_model(path, size, number)
            print(f"{path}: {nbytes / 1e9:.2f} GB")
        paths.append(path)
    return paths


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=sorted(SIZES), default="full")
    parser.add_argument("--models", type=int, default=3, help="base included")
    arguments = parser.parse_args()
    make(arguments.folder, arguments.size, arguments.models)
