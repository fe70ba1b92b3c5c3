"""The JSON Schema of native recipes, for editors: made from the request models that check them.

It says what a key takes. What belongs together (targets and methods, names and steps) only reading a recipe shows.
"""

from __future__ import annotations

from typing import Any

from surgeon.recipe.schema import COUNTS, METRICS, SIZES, TARGETS, VERBS, VERSION, WHEN, Verb

NAME = "^[A-Za-z0-9][A-Za-z0-9_-]{0,59}$"
TEXT = {"type": "string"}
NUMBER = {"type": "number"}
SCALAR = {"type": ["string", "number", "boolean"]}


def json_schema() -> dict[str, Any]:
    """Return the schema (draft 2020-12)."""
    options = {name: properties(verb) for name, verb in VERBS.items()}
    defaults = {
        name: value for of_verb, verb in zip(options.values(), VERBS.values(), strict=True) for name, value in of_verb.items()
        if name in verb.options and name not in verb.references and name != "models"
    }  # fmt: skip
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Recipe of surgeon", "type": "object",
        "required": ["version"], "additionalProperties": False,
        "properties": {
            "version": {"const": VERSION}, "name": TEXT, "description": TEXT, "seed": {"type": "integer", "minimum": 0},
            "defaults": _mapping(defaults), "extends": {"type": "string", "description": "a recipe beside this one"},
            "models": {"type": "object", "propertyNames": {"pattern": NAME}, "additionalProperties": TEXT},
            "data": {"type": "object", "propertyNames": {"pattern": NAME}, "additionalProperties": {"anyOf": [TEXT, _data()]}},
            "steps": {"type": "array", "minItems": 1, "items": _step(options)},
            "gates": {"type": "array", "items": {"type": "string", "description": "METRIC OP EXPRESSION, such as accuracy >= baseline - 0.02"}},
            "publish": _mapping({"step": TEXT, "when": {"enum": list(WHEN)}}),
            "fuse": {"type": "boolean", "description": "hand models between steps on unwritten where that is possible"},
            "sweep": {"type": "object", "minProperties": 1, "additionalProperties": {"type": "array", "minItems": 1, "items": SCALAR}},
        },
    }  # fmt: skip


def _mapping(found: dict[str, Any], required: list[str] | None = None) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object", "additionalProperties": False, "properties": found}
    return {**schema, "required": required} if required else schema


def _data() -> dict[str, Any]:
    whole = {"type": "integer", "minimum": 1}
    return _mapping(
        {
            "dataset": TEXT,
            "file": TEXT,
            "config": TEXT,
            "split": TEXT,
            "samples": whole,
            "sequence_length": whole,
        }
    )


def _step(options: dict[str, dict[str, Any]]) -> dict[str, Any]:
    verbs = {name: {"anyOf": [_mapping(found), {"type": "null"}]} for name, found in options.items()}
    found = _mapping({"id": {"type": "string", "pattern": NAME}, **verbs}, ["id"])
    return {**found, "oneOf": [{"required": [name]} for name in verbs]}


def properties(verb: Verb) -> dict[str, Any]:
    """Return key -> schema of one verb's step."""
    fields: dict[str, Any] = {}
    for model in verb.classes:
        for name, schema in model.model_json_schema(by_alias=True)["properties"].items():
            fields.setdefault(name, schema)
    found: dict[str, Any] = {}
    for name in verb.keys:
        shape = _shape(verb, name)
        found[name] = shape if shape is not None else _field(name, fields[name], verb)
    return found


def _shape(verb: Verb, name: str) -> dict[str, Any] | None:
    """Return the schema of a key that is no plain option."""
    if name in verb.references or (name == "model" and verb.name != "merge"):
        return {"type": "string", "description": "a model of the recipe, or an earlier step"}
    if name == "target" and verb.name in TARGETS:
        value = (
            _one_or_more({"type": ["number", "string"]})
            if verb.name == "prune"
            else {"type": ["number", "string"]}
        )
        return {**_mapping({word: value for word in TARGETS[verb.name]}), "minProperties": 1}
    if name == "schemes":
        return _one_or_more(TEXT)
    if name == "metrics":
        return {"type": "array", "items": {"enum": list(METRICS)}}
    if verb.name != "merge":
        return None
    parameter = {"anyOf": [SCALAR, {"type": "array", "items": SCALAR}]}
    return {
        "models": {"type": "array", "minItems": 1, "items": {"anyOf": [TEXT, {
            "type": "object", "required": ["model"], "properties": {"model": TEXT, "weight": NUMBER, "density": NUMBER},
            "additionalProperties": SCALAR}]}},
        "parameters": {"type": "object", "additionalProperties": parameter},
        "overrides": {"type": "array", "items": {**_mapping({"match": TEXT, "copy": TEXT, "density": {"const": 1}}, ["match"])}},
    }.get(name)  # fmt: skip


def _field(name: str, schema: dict[str, Any], verb: Verb) -> dict[str, Any]:
    """Return the schema of an option as recipes write it: one value where a list of one is meant, sizes with units."""
    plain = {key: value for key, value in schema.items() if key not in ("default", "title")}
    if name in SIZES or name in COUNTS:
        size = {
            "anyOf": [
                {"type": "number", "exclusiveMinimum": 0},
                {"type": "string", "pattern": r"^\s*\d+(\.\d+)?\s*[A-Za-z]*\s*$"},
            ]
        }
        return _one_or_more(size) if _listed(plain) else size
    if name == "keep_experts":
        return _one_or_more({"type": ["integer", "number", "string"]})
    listed = _listed(plain)
    if listed is not None and "prefixItems" not in listed and "enum" not in (listed.get("items") or {}):
        return _one_or_more(listed["items"])
    return plain


def _listed(schema: dict[str, Any]) -> dict[str, Any] | None:
    """Return the list a schema is, or may be."""
    if schema.get("type") == "array":
        return schema
    return next((one for one in schema.get("anyOf", ()) if one.get("type") == "array"), None)


def _one_or_more(item: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [item, {"type": "array", "items": item}]}
