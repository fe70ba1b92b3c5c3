"""What config.json says of how every module is stored, for each way of quantizing that says it module by module.

    declarations(config, modules).of("model.layers.0.mlp.up_proj")    a `Said`

compressed-tensors names targets (`surgeon.formats.declared_groups`). auto-round has one scheme for the linear modules of
some blocks, and ``extra_config`` for others. GPTQ, AWQ, FP8 and bitsandbytes have one scheme and a list of modules that
stay; GPTQModel's ``dynamic`` changes it by patterns. Lists are read as transformers 5 reads them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from surgeon.architectures import naming
from surgeon.checkpoint.header import printable
from surgeon.formats.declared_groups import CompressedTensors, refuse
from surgeon.formats.storage import PLAIN, Declarations, Said, Storage
from surgeon.traits import part_of

IN_LAYERS = frozenset({"attention", "mlp", "expert"})
"""Parts whose matrices are linear modules in every family, and lie in layers."""


def declarations(config: Mapping[str, Any], modules: Collection[str] = ()) -> Declarations | None:
    """Return what a quantization_config says of modules, None where it does not say it module by module.

    Args:
        config: quantization_config of config.json.
        modules: names of the matrices in the files, without ".weight".

    Raises:
        InputError: E481 it says nothing definite.
    """
    method = config.get("quant_method")
    if method == "compressed-tensors":
        return CompressedTensors(config)
    if method == "auto-round":
        return AutoRound(config, modules)
    if method == "gptq":
        return Gptq(config)
    if method == "awq":
        storage = Storage("awq", _bits(config), _group(config), symmetric=config.get("zero_point") is False)
        return Kept(storage, config.get("modules_to_not_convert"))
    if method == "fp8":
        return Kept(Storage("fp8", 8, 0, _block(config)), config.get("modules_to_not_convert"))
    if method == "bitsandbytes":
        return Kept(_of_bitsandbytes(config), config.get("llm_int8_skip_modules"), experts=False)
    return None


def _block(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the (rows, columns) that share a scale, None for a scale a matrix."""
    block = config.get("weight_block_size")
    if block is None:
        return None
    if (
        not isinstance(block, (list, tuple))
        or len(block) != 2
        or not all(type(n) is int and n > 0 for n in block)
    ):
        refuse(f"has blocks of {printable(str(block))[:40]}")
    return block[0], block[1]


def _of_bitsandbytes(config: Mapping[str, Any]) -> Storage:
    if config.get("load_in_4bit") or config.get("_load_in_4bit"):
        kind = str(config.get("bnb_4bit_quant_type") or "fp4")
        if kind not in ("nf4", "fp4"):
            refuse(f"has four bits of type {printable(kind)[:20]!r}")
        return Storage("bnb-4bit", 4, 64, kind=kind, nested=bool(config.get("bnb_4bit_use_double_quant")))
    return Storage("bnb-8bit", 8)


def _bits(config: Mapping[str, Any], default: int = 4) -> int:
    bits = config.get("bits", config.get("w_bit", default))
    if type(bits) is not int or not 1 <= bits <= 16:
        refuse(f"has weights of {printable(str(bits))[:20]} bits")
    return bits


def _group(config: Mapping[str, Any]) -> int:
    size = config.get("group_size", config.get("q_group_size", 128))
    if type(size) is not int:
        refuse(f"has groups of {printable(str(size))[:20]!r}")
    return size if size > 0 else -1


def _named(module: str, entries: Sequence[str]) -> bool:
    """Say whether a list of modules that stay names one: from the beginning up to a dot, by a pattern, or by its end."""
    return any(module.endswith(entry) or _boundary(entry).match(module) for entry in entries)


def _boundary(entry: str) -> re.Pattern[str]:
    try:
        return re.compile(rf"(?:{entry})(?:(?<=\.)|(?=\.|$))")
    except re.error:
        return re.compile(rf"{re.escape(entry)}(?=\.|$)")


class Kept:
    """One scheme for all linear modules in layers, but for a list.

    Args:
        storage: of those that do not stay.
        kept: modules that stay plain, None when none are named.
        experts: whether those of a mixture are linear modules of their own.
    """

    def __init__(self, storage: Storage, kept: Any, experts: bool = True) -> None:
        self._storage = storage
        self._kept = [str(entry) for entry in kept or () if str(entry)]
        self._experts = experts

    def of(self, module: str) -> Said:
        """Return how a module is said to be stored."""
        part = part_of(f"{module}.weight")
        if part in ("norm", "embedding") or _named(module, self._kept):
            return PLAIN
        if any(entry in module for entry in self._kept):  # older readers look for it anywhere in the name
            return Said(self._storage, certain=False)
        place = naming.layer_of(f"{module}.weight")
        sure = part in IN_LAYERS and place is not None and not naming.is_auxiliary(place.stack)
        return Said(self._storage, certain=sure and (self._experts or part != "expert"))


class Gptq:
    """One scheme for the linear modules of all layers, which patterns may change.

    Args:
        config: quantization_config; ``dynamic`` maps "+:pattern" to changes and "-:pattern" to nothing.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self._kept = Kept(_integers(config), config.get("modules_to_not_convert"))
        inside = config.get("modules_in_block_to_quantize")
        self._inside = [str(name) for name in _flat(inside)] if isinstance(inside, list) else None
        dynamic = config.get("dynamic")
        self._dynamic = dynamic if isinstance(dynamic, dict) else {}

    def of(self, module: str) -> Said:
        """Return how a module is said to be stored."""
        for key, changes in self._dynamic.items():
            pattern = str(key).removeprefix("+:").removeprefix("-:")
            try:
                fits = re.match(pattern, module)
            except re.error:
                refuse(f"has a pattern that is none: {printable(pattern)[:60]}")
            if fits and str(key).startswith("-:"):
                return PLAIN
            if fits and isinstance(changes, dict):
                return Said(_integers({**self._config, **changes}))
        part = part_of(f"{module}.weight")
        if part == "head":
            return Said(_integers(self._config)) if self._config.get("lm_head") else PLAIN
        if self._inside is not None and not any(module.endswith(name) for name in self._inside):
            return PLAIN
        return self._kept.of(module)


class AutoRound:
    """One scheme for the linear modules of some blocks, and one for each module or pattern that is named.

    Args:
        config: quantization_config.
        modules: names of the matrices in the files; a name that is none of them is a pattern to readers.
    """

    def __init__(self, config: Mapping[str, Any], modules: Collection[str]) -> None:
        self._config = config
        extra = config.get("extra_config") or {}
        if not isinstance(extra, dict) or not all(isinstance(entry, dict) for entry in extra.values()):
            refuse("has an extra_config that is no table of modules")
        self._extra = extra
        linear = {
            name for name in modules if part_of(f"{name}.weight") not in ("router", "norm", "embedding")
        }
        self._patterns = [
            (_pattern(key), entry) for key, entry in extra.items() if entry and key not in linear
        ]
        blocks = config.get("block_name_to_quantize") or config.get("to_quant_block_names")
        names = (
            blocks.split(",")
            if isinstance(blocks, str)
            else _flat(blocks)
            if isinstance(blocks, list)
            else None
        )
        self._blocks = None if names is None else tuple(str(name).strip() for name in names)

    def of(self, module: str) -> Said:
        """Return how a module is said to be stored."""
        entry = self._extra.get(module)
        if entry is None:
            entry = next(
                (entry for pattern, entry in self._patterns if pattern and pattern.search(module)), None
            )
        part = part_of(f"{module}.weight")
        if part in ("norm", "embedding"):
            return PLAIN
        if entry is None:
            if part == "head" or (self._blocks is not None and not module.startswith(self._blocks)):
                return PLAIN
            if self._blocks is None and naming.layer_of(f"{module}.weight") is None:
                return PLAIN
        settings = {**self._config, **(entry or {})}
        if _bits(settings) >= 16:
            return PLAIN
        return Said(_integers(settings), certain=part in (*IN_LAYERS, "head"))


def _integers(config: Mapping[str, Any]) -> Storage:
    """Return the storage of integers packed input by input: GPTQ's, or AWQ's where auto-round says so."""
    form = "awq" if str(config.get("packing_format", "")).endswith("awq") else "gptq"
    return Storage(form, _bits(config), _group(config), symmetric=config.get("sym") is not False)


def _pattern(key: str) -> re.Pattern[str] | None:
    try:
        return re.compile(key)
    except re.error:  # readers pass over it
        return None


def _flat(entries: list[Any]) -> list[Any]:
    return [leaf for entry in entries for leaf in (_flat(entry) if isinstance(entry, list) else [entry])]
