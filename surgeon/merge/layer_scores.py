"""Factors for task vectors, layer by layer: made by ACM, Sens-Merging or FIM, or brought by the user.

A file looks like this; a model is named as in the merge (its short name), and factors multiply:

    {"format": "surgeon layer scores", "version": 1,
     "models": {"long": {"layers": {"0": 0.9, "1": 0.7}, "tensors": {"*.gate_proj.weight": 0.7}, "default": 1.0}}}
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgeon.architectures.naming import layer_of
from surgeon.checkpoint.header import printable
from surgeon.checkpoint.patterns import matches
from surgeon.checkpoint.strict_json import read_json_object
from surgeon.errors import InputError, Where

FORMAT = "surgeon layer scores"


@dataclass(frozen=True)
class LayerScores:
    """Factors of one model's task vector.

    Attributes:
        layers: layer number -> factor.
        tensors: (name, glob or re:REGEX) -> factor; every one that matches multiplies.
        default: factor of layers not named and of tensors outside the layers.
    """

    layers: Mapping[int, float] = field(default_factory=dict)
    tensors: tuple[tuple[str, float], ...] = ()
    default: float = 1.0

    def factor(self, name: str) -> float:
        """Return what the task vector of tensor ``name`` is multiplied by."""
        place = layer_of(name)
        found = self.layers.get(place.index, self.default) if place is not None else self.default
        for pattern, value in self.tensors:
            if matches(pattern, name):
                found *= value
        return found

    def as_data(self) -> dict[str, Any]:
        """Return the scores as they stand in a file."""
        return {
            "layers": {str(k): float(v) for k, v in sorted(self.layers.items())},
            "tensors": {k: float(v) for k, v in self.tensors},
            "default": float(self.default),
        }


def read_layer_scores(file: Path) -> dict[str, LayerScores]:
    """Read a layer-scores file: model name -> scores.

    Raises:
        InputError: E354 the file is not one, or a factor is not a finite number.
    """
    content = read_json_object(file)
    models = content.get("models")
    if content.get("format") != FORMAT or content.get("version") != 1 or not isinstance(models, dict):
        raise InputError("E354", f"{printable(file.name)} is no layer-scores file", where=Where(str(file)),
                         help=f'it needs "format": "{FORMAT}", "version": 1 and "models"')  # fmt: skip
    return {str(name): _scores(file, str(name), entry) for name, entry in models.items()}


def _scores(file: Path, model: str, entry: Any) -> LayerScores:
    known = {"layers", "tensors", "default"}
    if not isinstance(entry, dict) or not set(entry) <= known:
        raise _wrong(file, f'the scores of "{printable(model)}" may hold layers, tensors and default only')
    parts = {key: entry.get(key, {}) for key in ("layers", "tensors")}
    for key, part in parts.items():
        if not isinstance(part, dict):
            raise _wrong(file, f'{key} of "{printable(model)}" must be an object')
    numbers = [*parts["layers"].items(), *parts["tensors"].items(), ("default", entry.get("default", 1.0))]
    for key, value in numbers:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise _wrong(file, f'the factor of {printable(str(key))} for "{printable(model)}" is {value!r}')
    unknown = [k for k in parts["layers"] if not k.isdecimal()]
    if unknown:
        raise _wrong(file, f'"{printable(unknown[0])}" is no layer number')
    return LayerScores(
        {int(k): float(v) for k, v in parts["layers"].items()},
        tuple((k, float(v)) for k, v in parts["tensors"].items()),
        float(entry.get("default", 1.0)),
    )


def _wrong(file: Path, message: str) -> InputError:
    return InputError("E354", f"{printable(file.name)}: {message}", where=Where(str(file)),
                      help="factors are finite numbers; 1 leaves a task vector as it is")  # fmt: skip


def write_layer_scores(file: Path, scores: Mapping[str, LayerScores], made_by: Mapping[str, Any]) -> None:
    """Write a layer-scores file; ``made_by`` says how the scores came about."""
    content = {
        "format": FORMAT,
        "version": 1,
        "models": {name: entry.as_data() for name, entry in scores.items()},
        "made_by": dict(made_by),
    }
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
