"""The methods and the error codes as data: what ``surgeon methods`` and ``surgeon explain`` print with ``--json``."""

from __future__ import annotations

from typing import Any

from surgeon.python.results import Document

OPTIONS = {"weight", "density", "lambda", "t", "normalize"}
"""Parameters of merge methods that have an option of their own."""


def methods(name: str | None = None) -> Document:
    """List methods, or say what one method does; the argument of ``surgeon methods``.

    Args:
        name: "merge" (or nothing), "prune", "edit", or a method.

    Raises:
        UsageError: E201 there is no such method.

    Example:
        >>> surgeon.methods("ties")["method"]["parameters"]  # doctest: +SKIP
    """
    from surgeon.merge.adjustments import ADJUSTMENTS
    from surgeon.merge.methods import catalogue, names

    other = _other_families(name)
    if other is not None:
        return Document("methods", other)
    if name is None or name == "merge":
        found = {"family": "merge", "methods": [describe(catalogue(n)) for n in names()],
                 "adjustments": [describe_adjustment(a) for a in ADJUSTMENTS]}  # fmt: skip
        return Document("methods", found)
    adjustment = next((a for a in ADJUSTMENTS if a.name == name.replace("-", "_")), None)
    if adjustment is not None:
        page = {**describe_adjustment(adjustment), "page": adjustment.page}
        return Document("methods", {"family": "merge", "adjustment": page})
    method = catalogue(name)
    return Document("methods", {"family": "merge", "method": {**describe(method), "page": method.page}})


def _other_families(name: str | None) -> dict[str, Any] | None:
    """Return pruning or editing, or one of their methods; None where it is merging that is asked for."""
    from surgeon.edit.request import SUMMARIES
    from surgeon.prune.experts import request as experts
    from surgeon.prune.request import CRITERIA, METHODS, SPARSITY

    families = {"prune": METHODS | experts.METHODS, "edit": SUMMARIES}
    counted = SPARSITY | experts.SPARSITY
    criteria = {**CRITERIA, "heapr": tuple(experts.CHANNELS)}
    for family, found in families.items():
        if name == family:
            rows = [{"name": method, "summary": text} for method, text in found.items()]
            return {"family": family, "methods": rows}
        if name in found:
            assert name is not None
            page: dict[str, Any] = {"name": name, "summary": found[name]}
            if family == "prune":
                page["sparsity"] = counted[name]
                if name in criteria:
                    page["criteria"] = list(criteria[name])
            return {"family": family, "method": page}
    return None


def describe(method: Any) -> dict[str, Any]:
    """Return a method as data."""
    return {
        "name": method.name.replace("_", "-"),
        "title": method.title,
        "summary": method.summary,
        "base": method.base,
        "models": {"least": method.models[0], "most": method.models[1]},
        "random": method.random,
        "reference": method.reference,
        "parameters": [
            {
                "name": p.name, "kind": p.kind, "help": p.help, "per_model": p.per_model, "required_in_yaml": p.required,
                "default": p.default if p.cli is None else p.cli, "default_in_yaml": p.default,
                "range": span(p), "choices": list(p.choices), "without_effect": p.inert, "option": option(p.name),
            }
            for p in method.parameters
        ],
    }  # fmt: skip


def describe_adjustment(adjustment: Any) -> dict[str, Any]:
    """Return an adjustment as data."""
    return {
        "name": adjustment.name.replace("_", "-"), "title": adjustment.title, "option": adjustment.option,
        "summary": adjustment.summary, "usual": adjustment.default, "reads": adjustment.reads,
        "reference": adjustment.reference,
    }  # fmt: skip


def option(name: str) -> str:
    """Return the option that sets a parameter."""
    return f"--{name}" if name in OPTIONS else f"--param {name}="


def span(parameter: Any) -> str | None:
    """Return the accepted range as an interval."""
    if parameter.low is None and parameter.high is None:
        return None
    left = "(-inf" if parameter.low is None else f"{'(' if parameter.open_low else '['}{parameter.low:g}"
    return f"{left}, {'inf)' if parameter.high is None else f'{parameter.high:g}]'}"


def explain(code: str | None = None) -> Document:
    """Explain an error code, however it is written (E305, 305); without one, list all by subject.

    Raises:
        UsageError: E200 there is no such code.

    Example:
        >>> surgeon.explain("E305")  # doctest: +SKIP
    """
    from surgeon import explanations

    if code is None:
        return Document("explain", {"groups": [_group(group) for group in explanations.groups()]})
    page = explanations.page(code)
    found = {**_heading(page), "group": page.group, "meaning": page.meaning, "when": page.when, "fix": page.fix,
             "example": list(page.example)}  # fmt: skip
    return Document("explain", {"page": found})


def _heading(page: Any) -> dict[str, Any]:
    return {"code": page.code, "title": page.title, "exit_codes": list(page.exits)}


def _group(group: Any) -> dict[str, Any]:
    codes = [_heading(page) for page in group.pages]
    return {"name": group.name, "title": group.title, "summary": group.summary, "codes": codes}
