"""``surgeon methods``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from surgeon.cli import options as o
from surgeon.cli.errors import run_command
from surgeon.cli.output import Output


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
        from surgeon.python.catalogue import methods

        document = methods(name)
        if document["family"] != "merge":
            _other_family(out, document)
        elif "methods" in document:
            if name is None:
                out.line("prune and edit have methods, too: surgeon methods prune, surgeon methods edit")
                out.line()
            _listing(out, [catalogue(n) for n in names()], ADJUSTMENTS)
        elif "adjustment" in document:
            _adjustment_page(out, next(a for a in ADJUSTMENTS if a.name == str(name).replace("-", "_")))
        else:
            _page(out, catalogue(str(name)))
        return document

    raise typer.Exit(run_command(out, "methods", work))


def _other_family(out: Output, document: dict[str, Any]) -> None:
    """Print the methods of pruning or editing, or one of them."""
    if "methods" in document:
        rows: list[list[object]] = [[one["name"], one["summary"]] for one in document["methods"]]
        out.table(["method", "what it does"], rows)
        return
    page = document["method"]
    out.line(f"{page['name']}   surgeon {document['family']} MODEL --method {page['name']}")
    out.line()
    out.line(page["summary"])
    if "sparsity" in page:
        out.line(f"--sparsity   counts {page['sparsity']}")
    if "criteria" in page:
        shown = ", ".join(one.replace("_", "-") for one in page["criteria"])
        out.line(f"--criterion  {shown} (the first is the default)")


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
    from surgeon.python.catalogue import OPTIONS, option, span

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
            option(p.name) + ("" if p.name in OPTIONS else "VALUE") for p in method.parameters if not p.inert
        )
    )
