"""The tensors of a model whose layers differ in heads and FFN width, from its family's record.

config.json says in ``block_configs`` what each layer has: {"attention": {"no_op", "num_attention_heads",
"num_key_value_heads"}, "ffn": {"no_op", "intermediate_size"}}; its other sizes are those of the model it was cut
from. The record is asked once for every distinct set of sizes, and each layer takes its own tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from surgeon import architectures
from surgeon.architectures.base import Architecture, Expected, Layout
from surgeon.errors import InputError, Where

PREFIX = "surgeon_"
"""What model_type of such a model begins with, before the family's."""

Config = Mapping[str, Any]
Sizes = tuple[int, int, int]
"""Query heads, key/value heads, FFN channels; 0 where a layer has no such part."""


def family_of(config: Config) -> Architecture | None:
    """Return the record behind a configuration with ``block_configs``, None for any other configuration."""
    kind = config.get("model_type")
    if config.get("block_configs") is None or not isinstance(kind, str) or not kind.startswith(PREFIX):
        return None
    return architectures.get(kind.removeprefix(PREFIX))


def base_config(config: Config) -> dict[str, Any]:
    """Return the configuration of the stock model that a configuration with ``block_configs`` was cut from."""
    gone = {"block_configs", "auto_map", "base_architecture"}
    found = {key: value for key, value in config.items() if key not in gone}
    found["model_type"] = str(config["model_type"]).removeprefix(PREFIX)
    found["architectures"] = [name] if (name := config.get("base_architecture")) else []
    return found


def layout(record: Architecture, config: Config, names: Collection[str]) -> Layout:
    """Return the tensors that a checkpoint with ``block_configs`` must hold.

    Args:
        record: from `family_of`.
        names: what the checkpoint holds; decides about the prefix.

    Raises:
        InputError: E340 block_configs are malformed; the layer is named.
    """
    whole = base_config(config)
    sizes = _sizes(config, record.num_layers(whole))
    head_dim = record.sizes(record.settings(whole))["head_dim"].value
    usual = record.layout(whole, names)
    made: dict[Sizes, Mapping[str, Expected]] = {}
    found: dict[str, Expected] = {}
    for name, spec in usual.tensors.items():
        if spec.layer is None:
            found[name] = spec
    for number, own in enumerate(sizes):
        if own not in made:
            heads, groups, width = (value or 1 for value in own)
            asked = {**whole, "num_attention_heads": heads, "num_key_value_heads": groups, "head_dim": head_dim,
                     "intermediate_size": width}  # fmt: skip
            made[own] = record.layout(asked, names).tensors
        found.update(_of_layer(record, usual.prefix, made[own], number, own))
    return Layout(usual.prefix, usual.storage, found)


def _of_layer(
    record: Architecture, prefix: str, tensors: Mapping[str, Expected], number: int, sizes: Sizes
) -> dict[str, Expected]:
    """Return one layer's tensors, without those of a part that it lacks."""
    start = f"{prefix}{record.stack}.{number}."
    own = {name: spec for name, spec in tensors.items() if spec.layer == number}
    gone: tuple[str, ...] = ()
    for present, norms, kinds in ((sizes[0], record.branch_norms[0], ("attention_o",)),
                                  (sizes[2], record.branch_norms[1], ("ffn_down",))):  # fmt: skip
        if not present:
            outputs = (name for name, spec in own.items() if spec.kind in kinds)
            modules = {name.removesuffix(".weight").rpartition(".")[0] + "." for name in outputs}
            gone += (*modules, *(f"{start}{norm}." for norm in norms))
    return {name: spec for name, spec in own.items() if not name.startswith(gone or ("\0",))}


def _sizes(config: Config, layers: int) -> list[Sizes]:
    blocks = config["block_configs"]
    if not isinstance(blocks, list) or len(blocks) != layers:
        raise _malformed(f"block_configs has {len(blocks) if isinstance(blocks, list) else 'no'} entries, num_hidden_layers is {layers}")  # fmt: skip
    return [
        (
            _size(block, number, "attention", "num_attention_heads"),
            _size(block, number, "attention", "num_key_value_heads"),
            _size(block, number, "ffn", "intermediate_size"),
        )
        for number, block in enumerate(blocks)
    ]


def _size(block: Any, number: int, part: str, key: str) -> int:
    entry = block.get(part) if isinstance(block, Mapping) else None
    if not isinstance(entry, Mapping) or not isinstance(entry.get("no_op"), bool):
        raise _malformed(f"block_configs[{number}].{part} does not say no_op")
    if entry["no_op"]:
        return 0
    value = entry.get(key)
    if type(value) is not int or value < 1:
        raise _malformed(f"block_configs[{number}].{part}.{key} is {value!r}"[:120])
    return value


def _malformed(what: str) -> InputError:
    return InputError("E340", f"config.json is not usable: {what}", where=Where(file="config.json"),
                      help="block_configs has an entry for each layer, as surgeon prune wrote it: restore that file, or prune again")  # fmt: skip
