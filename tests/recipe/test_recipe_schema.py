"""The JSON Schema of recipes: shipped recipes fit it, mistakes do not, and it takes what the reader takes."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "pipeline"))
from recipe_runs import EXPORT, SCORES, recipe, texts

from surgeon.recipe import native
from surgeon.recipe.json_schema import json_schema
from surgeon.recipe.schema import VERBS
from surgeon.recipe.shipped import shipped

KINDS = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
KNOWN = {
    "$schema", "title", "description", "type", "properties", "required", "additionalProperties", "propertyNames", "items", "anyOf",
    "oneOf", "const", "enum", "pattern", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minItems", "maxItems",
    "prefixItems", "minProperties",
}  # fmt: skip


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """Say whether a value fits; every keyword the schema uses is checked here or the test fails."""
    assert set(schema) <= KNOWN, set(schema) - KNOWN
    if "type" in schema:
        kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        if not any(is_a(value, kind) for kind in kinds):
            return False
    if "const" in schema and value != schema["const"]:
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if "anyOf" in schema and not any(fits(value, one) for one in schema["anyOf"]):
        return False
    if "oneOf" in schema and sum(fits(value, one) for one in schema["oneOf"]) != 1:
        return False
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not within(value, schema):
        return False
    if isinstance(value, str) and "pattern" in schema and not re.search(schema["pattern"], value):
        return False
    if isinstance(value, list):
        return list_fits(value, schema)
    return not isinstance(value, dict) or mapping_fits(value, schema)


def is_a(value: Any, kind: str) -> bool:
    if kind in ("number", "integer"):
        return isinstance(value, int if kind == "integer" else (int, float)) and not isinstance(value, bool)
    return isinstance(value, KINDS[kind])


def within(value: float, schema: dict[str, Any]) -> bool:
    return (
        schema.get("minimum", value) <= value <= schema.get("maximum", value)
        and schema.get("exclusiveMinimum", value - 1) < value < schema.get("exclusiveMaximum", value + 1)
    )  # fmt: skip


def list_fits(value: list[Any], schema: dict[str, Any]) -> bool:
    if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
        return False
    places = schema.get("prefixItems", [schema.get("items", {})] * len(value))
    return all(fits(one, place) for one, place in zip(value, places, strict=False))


def mapping_fits(value: dict[str, Any], schema: dict[str, Any]) -> bool:
    if not set(schema.get("required", ())) <= set(value) or len(value) < schema.get("minProperties", 0):
        return False
    if "propertyNames" in schema and not all(fits(key, schema["propertyNames"]) for key in value):
        return False
    own, other = schema.get("properties", {}), schema.get("additionalProperties", True)
    for key, one in value.items():
        place = own.get(key, other)
        if place is False or (place is not True and not fits(one, place)):
            return False
    return True


SCHEMA = json_schema()


def content(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


NATIVE = [one for one in shipped() if native.is_native(one.file.read_text(), str(one.file))]


@pytest.mark.parametrize("one", NATIVE, ids=lambda one: one.name)
def test_shipped_recipes_fit_the_schema_and_are_valid(one):
    assert fits(content(one.file), SCHEMA)
    found = native.read(one.file)
    assert found.name == one.name and not found.warnings and found.description


def test_there_are_shipped_recipes_of_several_steps():
    assert NATIVE


@pytest.mark.parametrize(
    "part",
    [
        "  - id: p\n    prune: {target: {speedup: [1.5]}, structures: [ffn, layers], round_to: auto, layout: per-layer, protect_layers: 3}\n",
        "  - id: p\n    prune: {keep_experts: 0.5, method: reap, samples: 25}\n",
        "  - id: q\n    quantize: {target: {size: 5GB}, schemes: [W4A16], ignore: [lm_head], clip: true}\n",
        "  - id: e\n    edit: {method: thinkedit, responses: r.jsonl, thresholds: [900, 100]}\n",
        "  - id: m\n    measure: {baseline: long, mode: decode, precision: 0.02}\n",
        EXPORT + SCORES,
        "gates: [bytes <= 2GB]\npublish: {step: merged, when: always}\nsweep: {seed: [1, 2]}\ndefaults: {dtype: bfloat16, max_shard_size: 5GB}\n",
    ],
)
def test_what_the_reader_takes_fits(tmp_path, part):
    texts(tmp_path)
    path = recipe(tmp_path, part)
    native.read(path)
    assert fits(content(path), SCHEMA)


@pytest.mark.parametrize(
    "part",
    [
        "  - id: p\n    prune: {samples: 0}\n", "  - id: p\n    prune: {serach: dp}\n", "  - id: p\n    prune: {search: fast}\n",
        "  - id: p\n    prune: {output: x}\n", "  - id: q\n    quantize: {target: {bytes: 3}}\n", "  - prune: {}\n",
        "  - id: a b\n    prune: {}\n", "  - id: x\n    prune: {}\n    export: {}\n", "publish: {when: never}\n", "extra: 1\n",
        "data: {x: {dateset: y}}\n", "sweep: {seed: 3}\n",
    ],
)  # fmt: skip
def test_mistakes_do_not_fit(tmp_path, part):
    assert not fits(content(recipe(tmp_path, part)), SCHEMA)


def test_the_schema_is_json_and_covers_every_key_of_every_verb():
    assert json.loads(json.dumps(SCHEMA)) == SCHEMA
    steps = SCHEMA["properties"]["steps"]["items"]["properties"]
    for name, verb in VERBS.items():
        assert set(steps[name]["anyOf"][0]["properties"]) == set(verb.keys)
