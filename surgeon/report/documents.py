"""Reading and checking result documents: what a command wrote with ``--json``, one object each.

Those of eval are checked value by value, because figures are computed from them. Those of runs and of commands that
change models are checked in what they are made of; a part that is missing or has another form is not shown.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from surgeon.errors import InputError, UsageError, Where
from surgeon.report.text import visible

SCHEMAS = (1,)
"""Schemas of result documents that are understood."""

COMMANDS = ("merge", "prune", "edit", "quantize", "export", "measure", "diff")
"""Commands beside eval and run whose documents have something to show."""

FRACTIONS = frozenset({"accuracy", "cap_rate", "reflection_rate", "top1_agreement"})
MANIFEST = "surgeon.json"


def load(paths: Iterable[str | Path]) -> list[dict[str, Any]]:
    """Read result documents; a file holds one object or a list of them.

    A ``surgeon.json``, or a model folder that has one, may be given among them: it is kept under
    ``model.manifest`` of the results of that model, and the report shows how the model was made.

    Raises:
        InputError: E234 not a result document, E236 a key with a wrong value; E301 no such file.
        UsageError: E235 no result among the files, or a manifest of a model without a result.
    """
    results: list[dict[str, Any]] = []
    manifests: list[tuple[Path, dict[str, Any]]] = []
    for given in paths:
        path = Path(given)
        if path.is_dir():
            if not (path / MANIFEST).is_file():
                raise InputError("E234", f"{visible(path)} is a folder without {MANIFEST}", where=Where(visible(path)),
                                 help='give result files of "surgeon eval --json", and model folders made by surgeon')  # fmt: skip
            path = path / MANIFEST
        content = _read(path)
        documents = content if isinstance(content, list) else [content]
        if not documents:
            raise _not_a_result(str(path), "the list is empty")
        for position, document in enumerate(documents):
            label = str(path) if documents is not content else f"{path}[{position}]"
            if _is_manifest(document):
                manifests.append((path, document))
            else:
                results.append(validate(document, label))
    if not results:
        raise UsageError(
            "E235", "no result among the files", help='give the output of "surgeon eval MODEL --json"'
        )
    for path, content in manifests:
        _attach(results, path, content)
    return results


def validate(document: object, label: str = "result") -> dict[str, Any]:
    """Check one result document and return it; that of a mergekit YAML that was run is one of a merge.

    Args:
        label: the file, for messages.

    Raises:
        InputError: E234 another kind of document, E236 a key with a wrong value.
    """
    if not isinstance(document, dict):
        raise _not_a_result(label, f"it holds {_kind(document)}, not an object")
    if "schema" not in document:
        raise _not_a_result(label, 'it has no key "schema"')
    if document["schema"] not in SCHEMAS or isinstance(document["schema"], bool):
        known = ", ".join(map(str, SCHEMAS))
        raise InputError("E234", f"{visible(label)}: schema is {_shown(document['schema'])}; this version reads {known}",
                         where=Where(visible(label)), help="write the report with the version that wrote the result, or newer")  # fmt: skip
    command = document.get("command")
    if command == "run" and "recipe" not in document and "steps" not in document:
        document = {**document, "command": "merge"}  # of a mergekit YAML: one merge, not steps
        command = "merge"
    if command == "run" or command in COMMANDS:
        _Checker(label).steps(document)
        return document
    if command != "eval":
        raise InputError("E234", f"{visible(label)}: command is {_shown(command)}; reports are made from results of eval, run, {', '.join(COMMANDS)}",
                         where=Where(visible(label)), help="surgeon eval MODEL ... --json > result.json")  # fmt: skip
    if document.get("status") not in {"ok", "gate-failed"}:
        error = document.get("error")
        reason = f": {visible(error['message'])}" if isinstance(error, dict) and "message" in error else ""
        raise InputError("E234", f"{visible(label)}: status is {_shown(document.get('status'))}{reason}",
                         where=Where(visible(label)), help="only finished evaluations have something to show")  # fmt: skip
    _Checker(label).document(document)
    return document


class _Checker:
    """Checks the values of one document; every message names the file and the key."""

    def __init__(self, label: str) -> None:
        self.label = label

    def wrong(self, key: str, value: object, expected: str) -> InputError:
        return InputError("E236", f"{visible(self.label)}: {visible(key)} is {_shown(value)}, not {expected}",
                          where=Where(visible(self.label)), help="give the file as surgeon eval, measure or run wrote it, or write it again")  # fmt: skip

    def document(self, document: Mapping[str, Any]) -> None:
        model = self.mapping(document, "model", required=True)
        if not isinstance(model.get("name"), str) or not model["name"]:
            raise self.wrong("model.name", model.get("name"), "a name")
        manifest = self.mapping(model, "manifest", "model.")
        if manifest and not _is_manifest(manifest):
            raise self.wrong("model.manifest", manifest, f"the content of a {MANIFEST}")
        for key in ("parameters", "bytes"):
            if model.get(key) is not None and number(model[key]) is None:
                raise self.wrong(f"model.{key}", model[key], "a number")
        for key in ("settings", "data"):
            self.mapping(document, key)
        self.metrics(self.mapping(document, "metrics", required=True), "metrics")
        self.groups(document)
        self.baseline(self.mapping(document, "baseline"))
        self.gates(document.get("gates") or [])
        for key in ("warnings", "notes"):
            sentences = document.get(key) or []
            if not isinstance(sentences, list) or not all(isinstance(w, str) for w in sentences):
                raise self.wrong(key, sentences, "a list of sentences")

    def steps(self, document: Mapping[str, Any]) -> None:
        """Check a document of a run, or of one command that makes or measures a model."""
        if not isinstance(document.get("status"), str):
            raise self.wrong("status", document.get("status"), "text")
        for key in ("output", "error"):
            self.mapping(document, key)
        if document["command"] != "run":
            return
        self.mapping(document, "recipe", required=True)
        points = self.entries(document, "points", "")
        for place, point in [("", document), *((f"points[{i}].", point) for i, point in enumerate(points))]:
            for position, step in enumerate(self.entries(point, "steps", place)):
                inside = f"{place}steps[{position}]."
                for key in ("id", "verb", "status"):
                    if not isinstance(step.get(key), str):
                        raise self.wrong(inside + key, step.get(key), "text")
                found = self.mapping(step, "document", inside)
                if step["verb"] == "eval" and found.get("status") in {"ok", "gate-failed"}:
                    _Checker(f"{self.label}, {inside}document").document(found)
            for position, gate in enumerate(self.entries(point, "gates", place)):
                inside = f"{place}gates[{position}]."
                if not isinstance(gate.get("gate"), str):
                    raise self.wrong(inside + "gate", gate.get("gate"), "text")
                if not isinstance(gate.get("passed"), bool):
                    raise self.wrong(inside + "passed", gate.get("passed"), "true or false")

    def entries(self, parent: Mapping[str, Any], key: str, place: str) -> list[dict[str, Any]]:
        value = parent.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            raise self.wrong(place + key, value, "a list of objects")
        return value

    def groups(self, parent: Mapping[str, Any], prefix: str = "") -> None:
        for grouping, groups in self.mapping(parent, "groups", prefix).items():
            place = f"{prefix}groups.{grouping}"
            if not isinstance(groups, dict):
                raise self.wrong(place, groups, "an object")
            for name, metrics in groups.items():
                if not isinstance(metrics, dict):
                    raise self.wrong(f"{place}.{name}", metrics, "an object")
                self.metrics(metrics, f"{place}.{name}")

    def mapping(
        self, parent: Mapping[str, Any], key: str, prefix: str = "", required: bool = False
    ) -> dict[str, Any]:
        value = parent.get(key)
        if value is None and not required:
            return {}
        if not isinstance(value, dict):
            raise self.wrong(prefix + key, value, "an object")
        return value

    def baseline(self, baseline: Mapping[str, Any]) -> None:
        if not baseline:
            return
        if not isinstance(baseline.get("name"), str) or not baseline["name"]:
            raise self.wrong("baseline.name", baseline.get("name"), "a name")
        self.metrics(self.mapping(baseline, "metrics", "baseline."), "baseline.metrics")
        self.groups(baseline, "baseline.")
        for key, value in self.mapping(baseline, "paired", "baseline.").items():
            if key == "mcnemar":
                for name, count in self.mapping(baseline["paired"], key, "baseline.paired.").items():
                    if count is not None and number(count) is None:
                        raise self.wrong(f"baseline.paired.mcnemar.{name}", count, "a number")
            elif value is not None:
                self.measure(value, f"baseline.paired.{key}")

    def gates(self, gates: object) -> None:
        if not isinstance(gates, list):
            raise self.wrong("gates", gates, "a list")
        for position, gate in enumerate(gates):
            place = f"gates[{position}]"
            if not isinstance(gate, dict):
                raise self.wrong(place, gate, "an object")
            if not isinstance(gate.get("text"), str):
                raise self.wrong(f"{place}.text", gate.get("text"), "text")
            if not isinstance(gate.get("passed"), bool):
                raise self.wrong(f"{place}.passed", gate.get("passed"), "true or false")
            for key in ("value", "threshold"):
                if gate.get(key) is not None and number(gate[key]) is None:
                    raise self.wrong(f"{place}.{key}", gate[key], "a number")

    def metrics(self, metrics: Mapping[str, Any], place: str) -> None:
        for key, value in metrics.items():
            if value is None:
                continue
            self.measure(value, f"{place}.{key}")
            if key in FRACTIONS or key.startswith("pass@"):
                self.between(value, f"{place}.{key}", 0.0, 1.0)
            elif key.startswith("tokens_"):
                self.between(value, f"{place}.{key}", 0.0, math.inf)

    def measure(self, value: object, place: str) -> None:
        """Check a number, or an object with value (null: it has none) and, where known, low, high, n."""
        if not isinstance(value, dict):
            if number(value) is None:
                raise self.wrong(place, value, "a number")
            return
        if "value" not in value or (value["value"] is not None and number(value["value"]) is None):
            raise self.wrong(f"{place}.value", value.get("value"), "a number")
        for key in ("low", "high", "n"):
            if value.get(key) is not None and number(value[key]) is None:
                raise self.wrong(f"{place}.{key}", value[key], "a number")
        low, high = value.get("low"), value.get("high")
        if low is not None and high is not None and low > high:
            raise self.wrong(f"{place}.low", low, f"at most high, {high}")

    def between(self, value: Any, place: str, least: float, most: float) -> None:
        entries = value.items() if isinstance(value, dict) else [("", value)]
        for key, entry in entries:
            if key in {"", "value", "low", "high"} and entry is not None and not least <= entry <= most:
                expected = f"between {least:g} and {most:g}" if most < math.inf else f"at least {least:g}"
                raise self.wrong(f"{place}.{key}".rstrip("."), entry, expected)


def number(value: object) -> float | None:
    """Return a finite number as float, None for anything else; booleans are no numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def _read(path: Path) -> Any:
    from surgeon.checkpoint.strict_json import read_bytes

    def fail(reason: str) -> InputError:
        return _not_a_result(str(path), f"it is not JSON: {reason}")

    def constant(name: str) -> None:
        raise fail(f"{name} is not a number of JSON")

    def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise fail(f'the key "{visible(name)}" occurs twice')
            found[name] = value
        return found

    raw = read_bytes(path)
    if not raw.strip():
        raise _not_a_result(str(path), "it is empty")
    try:
        return json.loads(raw.decode("utf-8-sig"), object_pairs_hook=unique, parse_constant=constant)
    except UnicodeDecodeError as error:
        raise fail(f"byte {error.start} is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise fail(visible(error)) from None


def _is_manifest(document: object) -> bool:
    return isinstance(document, dict) and "program" in document and "plan" in document and "verb" in document


def _attach(results: Sequence[dict[str, Any]], path: Path, manifest: dict[str, Any]) -> None:
    """Keep a manifest with the results of its model: the same folder, else the same name."""
    folder = path.parent.resolve()
    name = folder.name
    if path.name.endswith(f".{MANIFEST}"):  # beside a bare file: NAME.safetensors.surgeon.json
        name = path.name.removesuffix(f".{MANIFEST}")
        folder = folder / name
    models = [r["model"] for r in results if r["command"] == "eval"]
    fitting = [m for m in models if isinstance(m.get("path"), str) and Path(m["path"]).resolve() == folder]
    fitting = fitting or [m for m in models if m["name"] in {name, name.removesuffix(".safetensors")}]
    if not fitting:
        raise UsageError("E235", f"{visible(path)} belongs to no model of the results",
                         help=f"evaluated: {visible(', '.join(m['name'] for m in models[:8])) or 'none'}")  # fmt: skip
    for model in fitting:
        model["manifest"] = manifest


def _not_a_result(label: str, reason: str) -> InputError:
    return InputError("E234", f"{visible(label)} is not a result document: {reason}", where=Where(visible(label)),
                      help='give the output of "surgeon eval MODEL --json", or of "surgeon run RECIPE --json"')  # fmt: skip


def _kind(value: object) -> str:
    return {list: "a list", str: "text", bool: "true or false", type(None): "null"}.get(
        type(value), "a number"
    )


def _shown(value: object) -> str:
    if value is None:
        return "missing"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return visible(text if len(text) <= 60 else text[:57] + "...")
