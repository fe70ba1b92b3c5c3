"""Metrics of finished steps, and gates over them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from surgeon.errors import CheckFailed
from surgeon.evaluate.gates import failures
from surgeon.recipe.recipe import Recipe, RecipeGate

ACCURACY = (
    "exact_match,strict-match",
    "exact_match",
    "acc",
    "exact_match,flexible-extract",
    "acc_norm",
    "pass@1",
    "pass_at_1",
)
"""Metrics of lm-eval that TASK_accuracy stands for, the first one that a task has."""

Values = dict[str, tuple[float | None, float | None]]
"""Metric -> (value, the same metric of what it is compared with)."""


def values_of(verb: str, document: Mapping[str, Any]) -> Values:
    """Return the metrics in a step's document."""
    if verb == "eval":
        return _evaluated(document)
    found: Values = {}
    output = document.get("output") or {}
    for name in ("bytes", "parameters", "bits"):
        if isinstance(output.get(name), (int, float)):
            found[name] = (output[name], None)
    for name, value in (document.get("metrics") or {}).items():
        if name == "speedup":
            found[name] = (value.get("measured", value.get("value")), None)
        elif name in ("memory", "baseline_memory"):
            if name == "memory":
                before = (document["metrics"].get("baseline_memory") or {}).get("total")
                found[name] = (value.get("total"), before)
        elif isinstance(value, (list, tuple)) and len(value) == 2:
            found[name] = (value[1], value[0])
        elif isinstance(value, Mapping):
            if isinstance(value.get("value"), (int, float)):
                found[name] = (value["value"], None)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[name] = (value, None)
    return found


def _evaluated(document: Mapping[str, Any]) -> Values:
    before = document.get("baseline") or {}
    found: Values = {}

    def add(prefix: str, metrics: Mapping[str, Any], others: Mapping[str, Any]) -> None:
        for name, metric in metrics.items():
            found[f"{prefix}{name}"] = (metric.get("value"), (others.get(name) or {}).get("value"))

    add("", document.get("metrics") or {}, before.get("metrics") or {})
    others = (before.get("groups") or {}).get("domain") or {}
    for domain, metrics in ((document.get("groups") or {}).get("domain") or {}).items():
        add(f"{domain}_", metrics, others.get(domain) or {})
    for task in (document.get("settings") or {}).get("tasks") or ():
        name = next((f"task:{task}:{one}" for one in ACCURACY if f"task:{task}:{one}" in found), None)
        if name is not None:
            found[f"{task}_accuracy"] = found[name]
    return found


def plain(values: Values) -> dict[str, float | None]:
    """Return the values alone, None where one is no number."""
    return {
        name: None if value is None or not math.isfinite(value) else value
        for name, (value, _) in values.items()
    }


def decide(recipe: Recipe, documents: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Decide the gates over the documents of all steps."""
    verbs = {step.id: step.verb for step in recipe.steps}
    values = {name: values_of(verbs[name], document) for name, document in documents.items()}
    return [_decided(recipe, gate, values, documents) for gate in recipe.gates]


def _decided(
    recipe: Recipe, one: RecipeGate, values: Mapping[str, Values], documents: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    if one.step is None:
        assert recipe.publish is not None
        value = values[recipe.publish].get(one.metric, (None, None))[0]
        before = next(
            (
                documents[s.id].get("baseline") or {}
                for s in reversed(recipe.steps)
                if s.verb == "eval" and documents[s.id].get("baseline")
            ),
            {},
        )
        baseline = before.get(one.metric)
    else:
        value, baseline = values[one.step].get(one.metric, (None, None))
    decided = one.gate.decide(value, {"baseline": math.nan if baseline is None else float(baseline)})
    reason = None if decided["passed"] else next(iter(failures([decided]))).message
    return {
        "gate": one.gate.text, "metric": one.metric, "step": one.step or recipe.publish, "value": decided["value"], "baseline": baseline,
        "threshold": decided["threshold"], "passed": decided["passed"], "reason": reason,
    }  # fmt: skip


def refusal(gates: list[dict[str, Any]], help: str) -> CheckFailed | None:
    """Return the error of a run whose gates failed, all of them in it; None when none did."""
    found = failures({**gate, "text": gate["gate"]} for gate in gates)
    if not found:
        return None
    first = found[0]
    first.help, first.others = help, tuple(found[1:])
    return first
