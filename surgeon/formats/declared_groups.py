"""What config.json of a compressed-tensors model says of every module: groups of targets, and modules to ignore.

A target is a module's exact name, ``re:`` and a pattern that its name begins with, or the name of its class. The exact
name wins, then the pattern that sorts first, then the class: the compressed-tensors library, 0.20, `match_targets`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any, NoReturn

from surgeon.checkpoint.header import printable
from surgeon.errors import InputError
from surgeon.formats.storage import PLAIN, Said, Storage
from surgeon.traits import part_of

DENSE_PACKING = (0, 20)
"""First version that packs 3, 5, 6 and 7 bits without gaps between words."""

LINEAR = frozenset({"attention", "mlp", "expert", "head"})
"""Parts whose matrices belong to modules of the class Linear."""


def refuse(what: str) -> NoReturn:
    """Refuse a quantization_config that says nothing definite.

    Raises:
        InputError: E481.
    """
    raise InputError("E481", f"quantization_config in config.json {what}",
                     help="it was edited, or written by another program; fetch the model again, or quantize it again")  # fmt: skip


class CompressedTensors:
    """The groups of one model.

    Args:
        config: quantization_config of config.json.

    Raises:
        InputError: E481 groups without meaning.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        groups = config.get("config_groups")
        if not isinstance(groups, dict):
            refuse("has no config_groups")
        self._names: dict[str, Storage] = {}
        patterns: list[tuple[str, Storage]] = []
        for key, group in groups.items():
            if not isinstance(group, dict) or not isinstance(group.get("targets"), list):
                refuse(f"has a group {printable(str(key))[:40]!r} without targets")
            if not isinstance(group.get("weights"), dict):
                continue  # of activations or caches alone
            storage = storage_of(group, config.get("format"))
            for target in map(str, group["targets"]):
                if target.startswith("re:"):
                    patterns.append((target, storage))
                else:
                    self._names.setdefault(target, storage)
        self._patterns = [
            (_compiled(target), storage) for target, storage in sorted(patterns, key=lambda p: p[0])
        ]
        ignored = [str(name) for name in config.get("ignore") or ()]
        self._ignored = frozenset(name for name in ignored if not name.startswith("re:"))
        self._ignored_patterns = [_compiled(name) for name in ignored if name.startswith("re:")]
        self.version = config.get("version")

    def of(self, module: str) -> Said:
        """Return how a module is said to be stored."""
        part = part_of(f"{module}.weight")
        cls = "Embedding" if part == "embedding" else "Linear"
        if module in self._ignored or any(p.match(module) for p in self._ignored_patterns):
            return PLAIN
        if module in self._names:
            return Said(self._names[module])
        for pattern, storage in self._patterns:
            if pattern.match(module):
                return Said(storage)
        storage = self._names.get(cls)
        if storage is None or cls in self._ignored or part == "norm":
            # A module of another class that is a target would be stored like the target says.
            return PLAIN if not self._classes else Said(None, certain=False)
        return Said(storage, certain=part in LINEAR or part == "embedding")

    @cached_property
    def _classes(self) -> frozenset[str]:
        """Targets that may be classes nothing is known of."""
        return frozenset(name for name in self._names if "." not in name and name[:1].isupper()) - {
            "Linear",
            "Embedding",
        }

    @property
    def packs_densely(self) -> bool:
        """Whether integers of widths that do not divide a byte are packed without gaps, by the version that wrote them."""
        found = re.match(r"(\d+)\.(\d+)", str(self.version or ""))
        return found is not None and (int(found[1]), int(found[2])) >= DENSE_PACKING


def storage_of(group: Mapping[str, Any], default: Any) -> Storage:
    """Return how the weights of a group are stored.

    Args:
        group: with ``weights``.
        default: the format of the whole model, for groups without one.

    Raises:
        InputError: E481.
    """
    weights = group["weights"]
    bits, kind = weights.get("num_bits", 8), str(weights.get("type", "int"))
    size, block = weights.get("group_size"), weights.get("block_structure")
    if type(bits) is not int or not 1 <= bits <= 16 or kind not in ("int", "float"):
        refuse(f"has weights of {printable(str(bits))[:20]} bits and type {printable(kind)[:20]!r}")
    if size is not None and type(size) is not int:
        refuse(f"has groups of {printable(str(size))[:20]!r}")
    strategy = weights.get("strategy") or ("tensor" if size is None else "group" if size > 0 else "channel")
    form = group.get("format") or default
    if form in (None, "mixed-precision", "naive-quantized", "fakequant"):
        form = _inferred(kind, bits, size, weights, group)
    shared: tuple[int, int] | None = None
    if strategy == "block":
        if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
            refuse("has blocks without a size")
        shared = (block[0], block[1])
    if strategy in ("group", "tensor_group") and (size is None or size < 1):
        refuse("has groups without a size")
    group_size = {"tensor": 0, "channel": -1, "block": 0}.get(str(strategy), size)
    if group_size is None:
        refuse(f"has weights of strategy {printable(str(strategy))[:20]!r}")
    return Storage(str(form), bits, group_size, shared, weights.get("symmetric", True) is not False,
                   weights.get("actorder") in ("group", "dynamic", True))  # fmt: skip


def _inferred(
    kind: str, bits: int, size: int | None, weights: Mapping[str, Any], group: Mapping[str, Any]
) -> str:
    """Return the format that the library takes for a group without one."""
    if kind == "int":
        return "int-quantized" if group.get("input_activations") and bits == 8 else "pack-quantized"
    if bits == 4:
        return "mxfp4-pack-quantized" if size == 32 else "nvfp4-pack-quantized"
    if bits == 8 and size == 32 and str(weights.get("scale_dtype")) in ("torch.uint8", "uint8"):
        return "mxfp8-quantized"
    return "float-quantized" if bits == 8 else f"{bits}-bit floats"


def _compiled(target: str) -> re.Pattern[str]:
    try:
        return re.compile(target.removeprefix("re:"))
    except re.error:
        refuse(f"has a pattern that is none: {printable(target)[:60]}")
