"""What config.json says of a model in compressed-tensors formats: which modules are stored how.

    {"quant_method": "compressed-tensors", "format": ..., "config_groups": {"group_000": {"targets": [...], ...}}, ...}

One group a scheme, numbered with leading zeros because writers sort groups by name and the first that fits wins.
Targets are exact module names. Matrices of experts are named by a pattern instead: the modules that readers build hold
all experts of a layer in one tensor, transformers looks for the experts' scheme by patterns that mention them, and
thousands of names would be compared with every module. A pattern names nothing but matrices of its own scheme.
Layout: the compressed-tensors library, 0.20.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from surgeon.errors import InputError
from surgeon.formats.scheme import Scheme

VERSION = "0.20.0"
"""Of the library whose layout is written; before 2026 it packed 3, 5, 6 and 7 bits otherwise."""

FORMATS = {
    "int": "pack-quantized",
    "float8": "float-quantized",
    "nvfp4": "nvfp4-pack-quantized",
    "mxfp4": "mxfp4-pack-quantized",
}
"""Kind of a scheme -> the library's name of the way it is stored."""

EXPERT = re.compile(r"^(?P<stack>.+\.experts)\.(?P<expert>\d+)\.(?P<matrix>\w+)$")
"""Name of the module that holds one matrix of one expert."""


def quantization_config(
    modules: Mapping[str, Scheme | None], *, actorder: Literal["static"] | None = None
) -> dict[str, Any]:
    """Return quantization_config of config.json.

    Args:
        modules: of EVERY linear module by its name in the checkpoint, without ".weight": how it is stored, None as it
            was. vLLM refuses a model with a linear module it finds neither among the targets nor in the ignore list.
        actorder: "static" when columns were quantized in the order of their activations and put back, which stores
            nothing; readers ignore it.

    Raises:
        InputError: E454 a scheme that these formats do not store, or no module is quantized.
    """
    kinds = sorted({scheme for scheme in modules.values() if scheme is not None})
    if not kinds:
        raise InputError("E454", "no module is quantized", help="write the model as plain safetensors")
    named = targets(modules)
    groups = {
        f"group_{number:03d}": {"targets": named[scheme], **_group(scheme, actorder)}
        for number, scheme in enumerate(kinds)
    }
    formats = {FORMATS[scheme.kind] for scheme in kinds}
    return {
        "quant_method": "compressed-tensors",
        "version": VERSION,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": named.get(None, []),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _group(scheme: Scheme, actorder: str | None) -> dict[str, Any]:
    """Return a group without its targets."""
    if scheme.kind not in FORMATS:
        raise InputError(
            "E454", f"compressed-tensors has no format for {scheme.name}",
            help=f"kinds that it stores: {', '.join(FORMATS)}",
        )  # fmt: skip
    weights: dict[str, Any] = {"num_bits": scheme.bits, "symmetric": scheme.symmetric, "dynamic": False}
    activations = None
    if scheme.kind == "int":
        grouped = {"strategy": "group", "group_size": scheme.group}
        weights |= {"type": "int", **(grouped if scheme.group > 0 else {"strategy": "channel"})}
        if actorder is not None:
            weights["actorder"] = actorder
    elif scheme.kind == "float8":
        weights |= {"type": "float", "strategy": "channel"}
        activations = {
            "num_bits": 8,
            "type": "float",
            "symmetric": True,
            "strategy": "token",
            "dynamic": True,
        }
    elif scheme.kind == "nvfp4":
        weights |= {"type": "float", "strategy": "tensor_group", "group_size": 16}
        weights["scale_dtype"] = "torch.float8_e4m3fn"
    else:
        weights |= {"type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
    return {
        "weights": weights,
        "input_activations": activations,
        "output_activations": None,
        "format": FORMATS[scheme.kind],
    }


def targets(modules: Mapping[str, Scheme | None]) -> dict[Scheme | None, list[str]]:
    """Return the names and patterns of every scheme's modules, in the order of the modules.

    An expert's matrix is named by the widest pattern that fits no matrix of another scheme: all experts of the model,
    one matrix of all experts, a layer's experts, one matrix of a layer's experts, else by its exact name.
    """
    experts = {name: scheme for name, scheme in modules.items() if EXPERT.match(name)}
    # Names differ by layer, expert and matrix alone, so a pattern's matrices are those that give the same pattern.
    schemes: dict[str, set[Scheme | None]] = {}
    for name, scheme in experts.items():
        for pattern in _patterns(name):
            schemes.setdefault(pattern, set()).add(scheme)
    found: dict[Scheme | None, dict[str, None]] = {}
    for name, scheme in modules.items():
        fitting = (p for p in _patterns(name) if len(schemes[p]) == 1) if name in experts else ()
        found.setdefault(scheme, {})[next(iter(fitting), name)] = None
    return {scheme: list(names) for scheme, names in found.items()}


def _patterns(name: str) -> Sequence[str]:
    """Return the patterns of an expert's matrix, the widest first."""
    match = EXPERT.match(name)
    assert match is not None
    layer = re.escape(match["stack"])
    stack = re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", layer)
    return [
        rf"re:^{stack}\.\d+\.\w+$",
        rf"re:^{stack}\.\d+\.{match['matrix']}$",
        rf"re:^{layer}\.\d+\.\w+$",
        rf"re:^{layer}\.\d+\.{match['matrix']}$",
    ]
