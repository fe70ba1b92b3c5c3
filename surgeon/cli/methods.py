"""``surgeon methods``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from surgeon.cli import options as o
from surgeon.cli.errors import run_command
from surgeon.cli.output import Output

FAMILIES = ("merge", "prune", "edit")
_OPTIONS = {"weight", "density", "lambda", "t", "normalize"}


def methods(
    name: Annotated[
        str | None, typer.Argument(metavar="merge|prune|edit|NAME", help="A family, or one method.")
    ] = None,
    json_: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """List methods, or show one method's page."""
    out = Output(json_, quiet, verbose)

    def work() -> dict[str, Any]:
        from surgeon.merge.adjustments import ADJUSTMENTS
        from surgeon.merge.methods import catalogue, names

        other = _other_families(out, name)
        if other is not None:
            return other
        if name is None or name == "merge":
            found = [catalogue(n) for n in names()]
            _listing(out, found, ADJUSTMENTS)
            return {"family": "merge", "methods": [describe(m) for m in found],
                    "adjustments": [describe_adjustment(a) for a in ADJUSTMENTS]}  # fmt: skip
        adjustment = next((a for a in ADJUSTMENTS if a.name == name.replace("-", "_")), None)
        if adjustment is not None:
            _adjustment_page(out, adjustment)
            return {
                "family": "merge",
                "adjustment": {**describe_adjustment(adjustment), "page": adjustment.page},
            }
        method = catalogue(name)
        _page(out, method)
        return {"family": "merge", "method": {**describe(method), "page": method.page}}

    raise typer.Exit(run_command(out, "methods", work))


def _other_families(out: Output, name: str | None) -> dict[str, Any] | None:
    """Show pruning and editing, or one of their methods; None where it is merging that is asked for."""
    from surgeon.edit.request import SUMMARIES
    from surgeon.prune.experts import request as experts
    from surgeon.prune.request import CRITERIA, METHODS, SPARSITY

    families = {"prune": METHODS | experts.METHODS, "edit": SUMMARIES}
    counted = SPARSITY | experts.SPARSITY
    criteria = {**CRITERIA, "heapr": tuple(experts.CHANNELS)}
    for family, found in families.items():
        if name == family:
            out.table(["method", "what it does"], [[method, text] for method, text in found.items()])
            return {
                "family": family,
                "methods": [{"name": method, "summary": text} for method, text in found.items()],
            }
        if name in found:
            assert name is not None
            out.line(f"{name}   surgeon {family} MODEL --method {name}")
            out.line()
            out.line(found[name])
            page: dict[str, Any] = {"name": name, "summary": found[name]}
            if family == "prune":
                page["sparsity"] = counted[name]
                out.line(f"--sparsity   counts {counted[name]}")
                if name in criteria:
                    page["criteria"] = list(criteria[name])
                    shown = ", ".join(one.replace("_", "-") for one in criteria[name])
                    out.line(f"--criterion  {shown} (the first is the default)")
            return {"family": family, "method": page}
    if name is None:
        out.line("prune and edit have methods, too: surgeon methods prune, surgeon methods edit")
        out.line()
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
                "range": span(p), "choices": list(p.choices), "without_effect": p.inert, "option": _option(p.name),
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


def _adjustment_page(out: Output, adjustment: Any) -> None:
    word = adjustment.option.partition(" ")[0]
    out.line(f"{adjustment.title}   surgeon merge ... --method METHOD {adjustment.option}   "
             f"YAML: surgeon: {{{adjustment.name}: ...}}")  # fmt: skip
    for text in ("", adjustment.summary, "", adjustment.page, ""):
        out.line(text)
    out.line(f"reads      {adjustment.reads}")
    if adjustment.default is not None:
        out.line(f"usual      {word}{'' if adjustment.default is True else f' {adjustment.default:g}'}")
    if adjustment.reference:
        out.line(f"reference  {adjustment.reference}")


def _option(name: str) -> str:
    return f"--{name}" if name in _OPTIONS else f"--param {name}="


def span(parameter: Any) -> str | None:
    """Return the accepted range as an interval."""
    if parameter.low is None and parameter.high is None:
        return None
    left = "(-inf" if parameter.low is None else f"{'(' if parameter.open_low else '['}{parameter.low:g}"
    return f"{left}, {'inf)' if parameter.high is None else f'{parameter.high:g}]'}"


def _value(value: Any) -> str:
    if value is None:
        return "-"
    return (
        str(value).lower()
        if isinstance(value, bool)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def _defaults(method: Any) -> str:
    """Name the parameters with their defaults on the command line, and YAML's where it differs."""
    parts = []
    for p in method.parameters:
        if p.inert:
            continue
        ours = p.default if p.cli is None else p.cli
        text = f"{p.name} {_value(ours)}" if ours is not None else p.name
        if p.required:
            text += " (YAML: required)"
        elif p.cli is not None and p.cli != p.default:
            text += f" (YAML: {_value(p.default)})"
        parts.append(text)
    return ", ".join(parts)


_BASE = {
    "required": "needs a base", "optional": "base optional", "ignored": "a base is one more input", "forbidden": "no base"
}  # fmt: skip


def _models(method: Any) -> str:
    least, most = method.models
    count = f"{least}" if most == least else f"{least} or more" if most is None else f"{least} to {most}"
    return f"{count} model{'s' if (most or 2) > 1 else ''}"


def _listing(out: Output, found: list[Any], adjustments: Any) -> None:
    for method in found:
        flags = [_models(method), _BASE[method.base], *(["random"] if method.random else [])]
        out.line(f"{method.name.replace('_', '-'):<17}  {method.summary}")
        out.line(f"{'':<17}  {', '.join(flags)}" + (f"; {_defaults(method)}" if _defaults(method) else ""))
    out.line()
    out.line("on top of any of them:")
    for adjustment in adjustments:
        out.line(f"{adjustment.option:<24}  {adjustment.summary}")
        out.line(f"{'':<24}  reads {adjustment.reads}")
    out.line(
        "aim-ties, acm-ties, sens, fim-ties, twin ... name a method with its adjustment at the usual value"
    )
    out.line()
    out.line(
        f'{len(found)} merge methods; defaults are the command line\'s, (YAML: ...) those of a mergekit YAML; "surgeon methods NAME" shows a page'
    )


def _page(out: Output, method: Any) -> None:
    out.line(
        f"{method.title}   surgeon merge ... --method {method.name.replace('_', '-')}   YAML: merge_method: {method.name}"
    )
    out.line()
    out.line(method.summary)
    if method.page:
        out.line()
        out.line(method.page)
    out.line()
    random = "; draws random numbers (--seed)" if method.random else ""
    out.line(f"takes      {_models(method)}, base included; {_BASE[method.base]}{random}")
    if method.reference:
        out.line(f"reference  {method.reference}")
    if not method.parameters:
        out.line("parameters none")
        return
    out.line()
    rows = []
    for p in method.parameters:
        ours = p.default if p.cli is None else p.cli
        yaml = "required" if p.required else _value(p.default)
        allowed = ", ".join(p.choices) if p.choices else span(p) or p.kind
        text = (
            p.help
            + (" (for each model)" if p.per_model else "")
            + (" (accepted, without effect)" if p.inert else "")
        )
        rows.append([p.name, _value(ours), yaml, allowed, text])
    out.table(["parameter", "default", "in YAML", "values", "meaning"], rows)
    out.line()
    out.line(
        "Options: "
        + ", ".join(
            _option(p.name) + ("" if p.name in _OPTIONS else "VALUE")
            for p in method.parameters
            if not p.inert
        )
    )
