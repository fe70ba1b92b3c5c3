"""How a model was made, from the ``surgeon.json`` of its folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Provenance:
    """What a manifest says, as short texts.

    Attributes:
        method: as it is typed, and what was put on top of it: dare-ties, ties + acm.
        inputs: (name, role or parameters, digests of its files).
        parameters: (name, value) of the method and of what was put on top of it.
        calibration: (name, value) of the texts that were measured on; empty when none was.
    """

    method: str
    inputs: tuple[tuple[str, str, str], ...]
    parameters: tuple[tuple[str, str], ...]
    calibration: tuple[tuple[str, str], ...]
    plan: str
    program: str
    warnings: tuple[str, ...]


_ADJUSTMENTS = ("aim", "acm", "sens", "fim", "delta_rank", "layer_scores")
_CALIBRATION = ("name", "samples", "tokens", "sequence_length", "answer", "seed", "sha256")
_ASKED = (
    "criterion",
    "structures",
    "layout",
    "group_size",
    "sensitivity",
    "target_bits",
    "target_size",
    "target_kl",
    "samples",
    "sequence_length",
)
"""What a report repeats of a request to prune or to quantize; the manifest has all of it."""
_QUIET = {"int8_mask", "rescale"}
"""Parameters that only speak when they are on."""


def read(manifest: Mapping[str, Any]) -> Provenance:
    """Return what a manifest says; parts it does not have stay empty."""
    recipe = _mapping(manifest.get("recipe"))
    program = _mapping(manifest.get("program"))
    request = _mapping(recipe.get("request"))
    method = str(recipe.get("method") or request.get("method") or manifest.get("verb") or "").replace(
        "_", "-"
    )
    adjust = _mapping(recipe.get("adjust"))
    method = " + ".join(
        [method, *(a.replace("_", "-") for a in _ADJUSTMENTS if _changed({a: adjust.get(a)}))]
    )
    asked = {k: v for k, v in request.items() if k in _ASKED}
    parameters = {**_mapping(recipe.get("parameters")), **_changed(adjust), **_changed(asked)}
    for key in ("target", "experts", "schemes"):
        if recipe.get(key):
            parameters[key] = recipe[key]
    for key in ("precision", "out_dtype", "layers", "sweep"):
        if recipe.get(key):
            parameters[key] = recipe[key]
    parameters = {k: v for k, v in parameters.items() if not (k in _QUIET and not v)}
    if manifest.get("seed") is not None:
        parameters["seed"] = manifest["seed"]
    warnings = manifest.get("warnings")
    return Provenance(
        method=method,
        inputs=tuple(_inputs(recipe, _mapping(manifest.get("inputs")))),
        parameters=tuple((k, value(v)) for k, v in parameters.items() if v is not None),
        calibration=tuple(_calibration(recipe)),
        plan=str(manifest.get("plan") or ""),
        program=f"{program.get('name', '')} {program.get('version', '')}".strip(),
        warnings=tuple(map(str, warnings)) if isinstance(warnings, list) else (),
    )


def _inputs(recipe: Mapping[str, Any], inputs: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return the models in the order of the recipe, those it does not list last."""
    each: dict[str, list[str]] = {}
    for module in _list(recipe.get("modules")):
        for piece in _list(_mapping(module).get("slices")):
            for source in _list(_mapping(piece).get("sources")):
                source = _mapping(source)
                said = [f"{k} {value(v)}" for k, v in _mapping(source.get("parameters")).items()]
                if source.get("layer_range"):
                    said.insert(0, f"layers {value(source['layer_range'])}")
                told = each.setdefault(str(source.get("model")), [])
                told += [s for s in said if s not in told]
    for name in inputs:
        each.setdefault(str(name), [])
    found = []
    for name, said in each.items():
        if name == recipe.get("base_model"):
            said = ["base", *said]
        entry = _mapping(inputs.get(name))
        if entry.get("repo"):
            said = [*said, f"{entry['repo']}@{str(entry.get('commit') or 'main')[:12]}"]
        files = _mapping(entry.get("files"))
        digests = [str(_mapping(f).get("sha256") or "")[:12] for _, f in sorted(files.items())]
        found.append((name, ", ".join(said), " ".join(d for d in digests if d)))
    return found


def _calibration(recipe: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what identifies each text that an adjustment was measured on, equal ones once."""
    found: list[tuple[str, str]] = []
    for entry in _mapping(recipe.get("measured")).values():
        record = _mapping(_mapping(entry).get("calibration"))
        # one text, or one for each model or domain
        for text in [record] if "sha256" in record else map(_mapping, record.values()):
            said = [
                (k.replace("_", " "), _short(k, text[k])) for k in _CALIBRATION if text.get(k) is not None
            ]
            if not set(said) <= set(found):
                found += said
    return found


def _short(key: str, entry: Any) -> str:
    return str(entry)[:12] if key == "sha256" else value(entry)


def _changed(adjust: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in adjust.items() if v not in (None, False, "", [], {})}


def value(entry: Any) -> str:
    """Return a setting as people write it."""
    if entry is None:
        return "none"
    if isinstance(entry, bool):
        return "yes" if entry else "no"
    if isinstance(entry, float):
        return f"{entry:.10g}"
    if isinstance(entry, int) and abs(entry) >= 100_000:
        return f"{entry:,}"
    if isinstance(entry, Mapping):
        return ", ".join(f"{k} {value(v)}" for k, v in entry.items())
    if isinstance(entry, list | tuple):
        return ("; " if any(isinstance(e, Mapping) for e in entry) else ", ").join(map(value, entry))
    return str(entry)


def _mapping(entry: Any) -> Mapping[str, Any]:
    return entry if isinstance(entry, Mapping) else {}


def _list(entry: Any) -> list[Any]:
    return entry if isinstance(entry, list) else []
