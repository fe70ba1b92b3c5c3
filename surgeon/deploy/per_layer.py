"""Models whose layers differ in heads and FFN width: their configuration, and the code files they bring along.

A stock class builds every layer alike. A folder with ``block_configs`` in config.json therefore names
classes of its own (``auto_map``) in two short files that ship with this package; the same files, unchanged,
are what our own commands load, so the folder's copy is compared by digest and never run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from surgeon.checkpoint.header import printable
from surgeon.errors import InputError, Where
from surgeon.structure.cut import LayerShape

CODE_FILES = ("configuration_surgeon.py", "modeling_surgeon.py")
"""Files in ``surgeon/deploy/modeling`` that a folder with per-layer shapes brings along."""

PREFIX = "surgeon_"
"""What model_type of a per-layer model begins with, before the family's."""


@dataclass(frozen=True)
class Family:
    """Names of one family: the stock class, and ours in the code files."""

    stock: str
    config: str
    model: str


FAMILIES = {
    "llama": Family("LlamaForCausalLM", "SurgeonLlamaConfig", "SurgeonLlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM", "SurgeonMistralConfig", "SurgeonMistralForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM", "SurgeonQwen2Config", "SurgeonQwen2ForCausalLM"),
    "qwen3": Family("Qwen3ForCausalLM", "SurgeonQwen3Config", "SurgeonQwen3ForCausalLM"),
    "gemma": Family("GemmaForCausalLM", "SurgeonGemmaConfig", "SurgeonGemmaForCausalLM"),
    "gemma2": Family("Gemma2ForCausalLM", "SurgeonGemma2Config", "SurgeonGemma2ForCausalLM"),
    "gemma3_text": Family("Gemma3ForCausalLM", "SurgeonGemma3Config", "SurgeonGemma3ForCausalLM"),
    "phi3": Family("Phi3ForCausalLM", "SurgeonPhi3Config", "SurgeonPhi3ForCausalLM"),
}
"""model_type of the stock model -> names."""


def base_type(config: Mapping[str, Any]) -> str:
    """Return the stock family of a configuration, ours or not."""
    return str(config.get("model_type", "")).removeprefix(PREFIX)


def is_per_layer(config: Mapping[str, Any]) -> bool:
    """Say whether a configuration gives sizes for each layer in ``block_configs``."""
    return config.get("block_configs") is not None


def family_of(config: Mapping[str, Any]) -> Family:
    """Return the names for a configuration with ``block_configs``.

    Raises:
        InputError: E327 the family cannot be written with per-layer shapes.
    """
    name = base_type(config)
    found = FAMILIES.get(name)
    if found is None:
        raise InputError(
            "E327", f"no program loads {printable(name)} models with layers of different sizes",
            where=Where(file="config.json"), help="--layout uniform; per-layer shapes exist for " + ", ".join(FAMILIES),
        )  # fmt: skip
    return found


def finish(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[tuple[str, bytes]]]:
    """Complete the configuration of a per-layer model so that transformers finds its classes.

    Args:
        config: a stock configuration with ``block_configs`` added; one already finished stays as it is.

    Returns:
        (config.json, companions as (file name, content)).

    Raises:
        InputError: E324 block_configs are malformed; E327 the family has no per-layer reader.
    """
    family = family_of(config)
    block_shapes(config)
    finished = dict(config)
    finished["model_type"] = PREFIX + base_type(config)
    finished["architectures"] = [family.model]
    finished["base_architecture"] = family.stock
    finished["auto_map"] = {
        "AutoConfig": f"configuration_surgeon.{family.config}",
        "AutoModelForCausalLM": f"modeling_surgeon.{family.model}",
    }
    return finished, companions()


def stock_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of the stock model that a per-layer one was cut from, at its global sizes."""
    dropped = {"block_configs", "auto_map", "base_architecture"} if is_per_layer(config) else set()
    stock = {key: value for key, value in config.items() if key not in dropped}
    if is_per_layer(config):
        stock["model_type"] = base_type(config)
        stock["architectures"] = [family_of(config).stock]
    return stock


def companions(names: Sequence[str] = CODE_FILES) -> list[tuple[str, bytes]]:
    """Return packaged code files as (name, content)."""
    place = resources.files("surgeon.deploy.modeling")
    return [(name, place.joinpath(name).read_bytes()) for name in names]


def check_own_code(folder: Path, names: Sequence[str] = CODE_FILES) -> None:
    """Refuse a per-layer folder whose code files are not the packaged ones (E326)."""
    for name, content in companions(names):
        path = folder / name
        if (
            not path.is_file()
            or hashlib.sha256(path.read_bytes()).digest() != hashlib.sha256(content).digest()
        ):
            raise InputError(
                "E326", f"{name} in {printable(str(folder))} is {'not the file of this version' if path.exists() else 'missing'}",
                where=Where(str(path)), help="code that a model brings along is not run; write the model again with this version",
            )  # fmt: skip


def head_dim(config: Mapping[str, Any]) -> int:
    """Return the size of one head, by its key or by hidden_size / num_attention_heads."""
    given = config.get("head_dim")
    return int(given) if given else int(config["hidden_size"]) // int(config["num_attention_heads"])


def block_shapes(config: Mapping[str, Any]) -> tuple[LayerShape, ...]:
    """Return the sizes of every layer of a configuration with ``block_configs``, or of a uniform one.

    Raises:
        InputError: E324 an entry is malformed; the layer is named.
    """
    count = int(config["num_hidden_layers"])
    size = head_dim(config)
    if not is_per_layer(config):
        heads = int(config["num_attention_heads"])
        one = LayerShape(
            heads, int(config.get("num_key_value_heads") or heads), size, int(config["intermediate_size"])
        )
        return (one,) * count
    blocks = config["block_configs"]
    if not isinstance(blocks, Sequence) or len(blocks) != count:
        raise _malformed(f"block_configs has {len(blocks) if isinstance(blocks, Sequence) else 'no'} entries, num_hidden_layers is {count}")  # fmt: skip
    return tuple(_shape(number, block, size) for number, block in enumerate(blocks))


def _shape(number: int, block: Any, size: int) -> LayerShape:
    def counts(part: str, *keys: str) -> Iterator[int]:
        entry = block.get(part) if isinstance(block, Mapping) else None
        if not isinstance(entry, Mapping) or not isinstance(entry.get("no_op"), bool):
            raise _malformed(f"block_configs[{number}].{part} does not say no_op")
        for key in keys:
            value = 0 if entry["no_op"] else entry.get(key)
            if type(value) is not int or (value < 1 and not entry["no_op"]):
                raise _malformed(f"block_configs[{number}].{part}.{key} is {value!r}")
            yield value

    heads, groups = counts("attention", "num_attention_heads", "num_key_value_heads")
    (ffn,) = counts("ffn", "intermediate_size")
    if groups and heads % groups:
        raise _malformed(
            f"block_configs[{number}]: {heads} query heads cannot share {groups} key/value heads"
        )
    return LayerShape(heads, groups, size if heads else 0, ffn)


def _malformed(what: str) -> InputError:
    return InputError(
        "E324",
        f"config.json is not usable: {printable(what)}",
        where=Where(file="config.json"),
        help="block_configs has an entry for each layer, as surgeon prune wrote it: restore that file, or prune again",
    )
