"""config.json of a model with fewer or narrower experts: the keys that encode it, and nothing else.

Readers of the raw file know different names of one number (Qwen3-MoE: ``num_experts`` on the hub, ``num_local_experts``
as transformers 5 writes it; where both stand and differ, one wins in silence). So every alias that is there gets the
new number and none is added. The file is otherwise left as it is.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

from surgeon.checkpoint.header import printable
from surgeon.errors import InputError
from surgeon.structure.experts.check import count_after, stored_width
from surgeon.structure.experts.cut import ExpertCut
from surgeon.structure.experts.parts import Experts
from surgeon.structure.experts.shared import SHARED_COUNTS, sections

PREDICTION_KEYS = (
    "num_nextn_predict_layers",
    "num_mtp_layers",
    "num_mtp_modules",
    "mtp_num_hidden_layers",
    "mtp_num_layers",
)
"""Keys of the number of layers that predict further tokens."""

MODULE_LISTS = (
    "ignore",
    "modules_to_not_convert",
    "ignored_layers",
    "exclude_modules",
    "exclude",
    "llm_int8_skip_modules",
)
"""Lists of module names in quantization_config."""

MODULE_TABLES = ("extra_config", "dynamic", "layer_quant_config")
"""Tables of quantization_config whose keys are module names."""

_EXPERT = re.compile(r"((?:.*\.)?experts\.)(\d+)(?=\.|$)")
_PATTERN = re.compile(r"experts(\\?\.|\[\.\])[\[(]?\d")


def pruned_config(
    config: Mapping[str, Any], experts: Experts, cut: ExpertCut, shared: int | None = None
) -> dict[str, Any]:
    """Return config.json of what a legal cut leaves.

    Args:
        config: of the source.
        experts: of the source.
        cut: what stays.
        shared: new number of shared experts, None leaves it (`surgeon.structure.experts.shared`).

    Raises:
        InputError: E426 quantization_config names experts by a pattern that cannot be renumbered.
    """
    result = copy.deepcopy(dict(config))
    counts = experts.record.counts
    for section in sections(result, experts):
        for key in counts.experts:
            _write(section, key, experts.count, count_after(experts, cut))
        width = stored_width(experts, cut)
        if width != experts.width:
            for key in counts.width:
                _write(section, key, experts.width, width)
        if shared is not None:
            for key in SHARED_COUNTS:
                if key in section:
                    section[key] = shared
        for key in PREDICTION_KEYS if cut.without else ():
            if isinstance(section.get(key), int):
                section[key] = max(0, section[key] - len(cut.without))
        for key in ("quantization_config", "compression_config"):
            if isinstance(section.get(key), dict):
                _renumber(section[key], experts, cut)
    return result


def _write(section: dict[str, Any], key: str, old: int, new: int) -> None:
    """Set a number, or those entries of a list with one per layer that are the old number."""
    value = section.get(key)
    if isinstance(value, list):
        section[key] = [new if entry == old else entry for entry in value]
    elif value == old and not isinstance(value, bool):
        section[key] = new


def _renumber(quantization: dict[str, Any], experts: Experts, cut: ExpertCut) -> None:
    """Renumber experts in lists and tables of modules, and take out what is gone."""
    for key in MODULE_LISTS:
        listed = quantization.get(key)
        if isinstance(listed, list):
            named = [
                renamed_module(entry, experts, cut) if isinstance(entry, str) else entry for entry in listed
            ]
            quantization[key] = [entry for entry in named if entry is not None]
    for key in MODULE_TABLES:
        table = quantization.get(key)
        if isinstance(table, dict):
            pairs = [(renamed_module(name, experts, cut), value) for name, value in table.items()]
            quantization[key] = {name: value for name, value in pairs if name is not None}


def renamed_module(name: str, experts: Experts, cut: ExpertCut) -> str | None:
    """Return what a module, or a pattern of modules, is called after a cut; None when it is gone.

    Raises:
        InputError: E426 a pattern names single experts.
    """
    for layer in experts.layers:
        if not name.startswith(layer.prefix):
            continue
        if layer.index in cut.without:
            return None
        found = _EXPERT.match(name[len(layer.prefix) :])
        if found is None:
            return name
        kept, expert = cut.experts(layer.index, layer.count), int(found[2])
        if expert not in kept:
            return None
        return f"{layer.prefix}{found[1]}{kept.index(expert)}{name[len(layer.prefix) + found.end() :]}"
    if _PATTERN.search(name) and any(
        cut.experts(la.index, la.count) != tuple(range(la.count)) for la in experts.layers
    ):
        raise InputError(
            "E426", f"quantization_config names experts by the pattern {printable(name)!r}, which cannot be renumbered",
            help="replace it by names of modules in config.json of a copy of the model",
        )  # fmt: skip
    return name
