"""Writes the reference pages of these documents from the program itself.

    python docs/generate.py            # write docs/reference/*.md and docs/decisions/index.md
    python docs/generate.py --check    # exit 1 when one of them is stale

Pages come from the Typer applications, the records of the methods, the JSON Schema of recipes, and the pages of `surgeon explain`.
"""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
NOTE = "<!-- Written by docs/generate.py: change the program, then run it again. -->"


def pages() -> dict[str, str]:
    """Return path below docs/ -> text, of every generated page."""
    return {
        "reference/cli.md": commands(),
        "reference/methods.md": methods(),
        "reference/recipe-schema.md": recipe_schema(),
        "reference/errors.md": errors(),
        "decisions/index.md": decisions(),
    }


def _page(title: str, *parts: str) -> str:
    return "\n\n".join([f"# {title}", NOTE, *(part.strip("\n") for part in parts if part)]) + "\n"


def _cell(text: object) -> str:
    """Return text as one cell of a Markdown table."""
    flat = " ".join(str(text).split())
    return flat.replace("|", "\\|").replace("<", "&lt;")


def _table(header: list[str], rows: list[list[object]]) -> str:
    lines = [header, ["---"] * len(header), *([_cell(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ---- the command line --------------------------------------------------------------------------------


def commands() -> str:
    """Return the page of all commands and their options."""
    from surgeon.cli.app import COMMANDS

    index = _table(
        ["command", "what it does"], [[f"[{name}](#{name})", text] for name, text in COMMANDS.items()]
    )
    parts = [
        "`surgeon COMMAND --help` shows the same. Options with the same name mean the same everywhere.",
        index,
        "Exit codes: 0 done, 1 a bug, 2 usage, 3 input, 4 a check failed, 5 environment, 6 output conflict, 130 and 143 interrupted "
        "(run it again to go on). [Errors](errors.md) lists the codes of messages.",
    ]
    for name in COMMANDS:
        found = functions(name)
        if len(found) == 1:
            parts.extend(_command(name, found[0][1], "##"))
            continue
        parts.append(f"## {name}")
        for sub, function in found:
            parts.extend(_command(f"{name} {sub}", function, "###"))
    return _page("Commands", *parts)


def functions(name: str) -> list[tuple[str, Callable[..., None]]]:
    """Return (name, function) of a command, or of each command of a group."""
    from surgeon.cli.app import build

    return [(one.name or one.callback.__name__, one.callback) for one in build(name).registered_commands]


def _command(name: str, function: Callable[..., None], heading: str) -> Iterator[str]:
    arguments, options = [], []
    hints = typing.get_type_hints(function, include_extras=True)
    for parameter in inspect.signature(function).parameters.values():
        kind, info = typing.get_args(hints[parameter.name])[:2]
        (arguments if type(info).__name__ == "ArgumentInfo" else options).append((parameter, kind, info))
    usage = " ".join(_metavar(*one) for one in arguments)
    yield f"{heading} {name}"
    yield f"    surgeon {name} {usage}{' ' if usage else ''}[OPTIONS]"
    yield "\n\n".join(" ".join(part.split()) for part in inspect.getdoc(function).split("\n\n"))
    rows = [[f"`{_metavar(*one)}`", "", one[2].help or ""] for one in arguments]
    rows += [_option(*one) for one in options]
    if rows:
        yield _table(["argument, option", "default", "meaning"], rows)


def _metavar(parameter: inspect.Parameter, kind: Any, info: Any) -> str:
    shown = info.metavar or parameter.name.upper()
    required = parameter.default is inspect.Parameter.empty
    return shown if required or shown.startswith("[") else f"[{shown}]"


def _option(parameter: inspect.Parameter, kind: Any, info: Any) -> list[object]:
    plain = [one for one in (*typing.get_args(kind), kind) if one is not type(None)]
    lists = [one for one in plain if typing.get_origin(one) is list]
    value = info.metavar or {bool: "", int: "INTEGER", float: "NUMBER"}.get(plain[0], "TEXT")
    # Inside Annotated the first name stands where the default would.
    declared = (info.default, *(info.param_decls or ()))
    names = ", ".join(f"`{name}`" for name in declared if isinstance(name, str)) + (
        f" {value}" if value else ""
    )
    given = parameter.default
    if given is inspect.Parameter.empty:
        default = "required"
    elif given is True:
        default = "on"
    else:
        default = "" if given in (None, False, "") else f"`{given}`"
    again = " Repeatable." if lists and "epeat" not in (info.help or "") else ""
    return [names, default, (info.help or "") + again]


# ---- methods -----------------------------------------------------------------------------------------


def methods() -> str:
    """Return the page of all methods."""
    from surgeon.edit.request import SUMMARIES
    from surgeon.merge.adjustments import ADJUSTMENTS
    from surgeon.merge.methods import catalogue, names
    from surgeon.prune.experts import request as experts
    from surgeon.prune.request import METHODS, SPARSITY
    from surgeon.quantize import request as quantize

    parts = [
        "`surgeon methods NAME` shows one. Defaults are the command line's; those of a mergekit YAML stand beside them where they differ.",
        "## Merging",
        "The guide [Merging](../merging.md) says which to take.",
    ]
    for name in names():
        parts.extend(_merge_method(catalogue(name)))
    parts += ["## On top of any merge", "Under the key `surgeon:` of a merge YAML, or as options."]
    for adjustment in ADJUSTMENTS:
        parts += [
            f"### {adjustment.title}",
            f"    surgeon merge ... {adjustment.option}",
            adjustment.summary,
            adjustment.page,
            f"Reads: {adjustment.reads}." + (f" Reference: {adjustment.reference}" if adjustment.reference else ""),
        ]  # fmt: skip
    parts += ["## Pruning", "The guide [Pruning](../pruning.md) explains them."]
    parts.append(
        _table(["method", "what it does", "`--sparsity` counts"], [[f"`{n}`", t, SPARSITY[n]] for n, t in METHODS.items()])
    )  # fmt: skip
    parts += ["## Experts of mixtures", "The guide [Experts](../experts.md) explains them."]
    parts.append(
        _table(["method", "what it does", "`--sparsity` counts"],
               [[f"`{n}`", t, experts.SPARSITY[n]] for n, t in experts.METHODS.items()])
    )  # fmt: skip
    parts += ["## Quantizing", "The guide [Quantizing](../quantizing.md) explains them."]
    parts.append(_table(["method", "what it does"], [[f"`{n}`", t] for n, t in quantize.METHODS.items()]))
    parts.append(
        _table(["sensitivity", "what it measures"], [[f"`{n}`", t] for n, t in quantize.SENSITIVITIES.items()])
    )  # fmt: skip
    parts += ["## Editing", "The guide [Editing](../editing.md) explains them."]
    parts.append(_table(["method", "what it does"], [[f"`{n}`", t] for n, t in SUMMARIES.items()]))
    return _page("Methods", *parts)


def _merge_method(method: Any) -> Iterator[str]:
    from surgeon.python.catalogue import describe

    found = describe(method)
    yield f"### {found['name']}"
    yield f"{found['title']}. {found['summary']}"
    yield method.page or ""
    base = {
        "required": "needs a base",
        "optional": "base optional",
        "ignored": "a base is one more input",
        "forbidden": "no base",
    }[found["base"]]
    least, most = found["models"]["least"], found["models"]["most"]
    count = f"{least} or more" if most is None else f"{least}" if most == least else f"{least} to {most}"
    facts = f"Takes {count} models, base included; {base}."
    facts += " Draws random numbers (`--seed`)." if found["random"] else ""
    yield facts + (f" Reference: {found['reference']}" if found["reference"] else "")
    rows = [
        [
            f"`{p['name']}`",
            _value(p["default"]),
            "required" if p["required_in_yaml"] else _value(p["default_in_yaml"]),
            ", ".join(p["choices"]) or p["range"] or p["kind"],
            p["help"] + (" (for each model)" if p["per_model"] else ""),
        ]
        for p in found["parameters"]
        if not p["without_effect"]
    ]
    if rows:
        yield _table(["parameter", "default", "in mergekit YAML", "values", "meaning"], rows)


def _value(value: object) -> str:
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


# ---- recipes -----------------------------------------------------------------------------------------


def recipe_schema() -> str:
    """Return the page of every key a native recipe may have."""
    from surgeon.recipe.json_schema import json_schema
    from surgeon.recipe.schema import MACHINE, REFUSED, VERBS

    schema = json_schema()
    steps = schema["properties"]["steps"]["items"]["properties"]
    parts = [
        "`surgeon recipe schema` prints the JSON Schema this page is made of, for editors. [Recipes](../recipes.md) says what the keys are for.",
        "## The file",
        _keys({n: s for n, s in schema["properties"].items() if n not in ("defaults", "steps")}, {"version"}),
        "`defaults` takes options that several verbs know; each step whose verb has the option takes it.",
        "## Data sets",
        "Under `data: {NAME: ...}`, a path or a dataset id, or a mapping of:",
        _keys(schema["properties"]["data"]["additionalProperties"]["anyOf"][1]["properties"], set()),
        "## Steps",
        "A step has an `id` and one verb. Options mean what they mean on the command line ([commands](cli.md)).",
    ]
    for verb in VERBS:
        parts += [f"### {verb}", _keys(steps[verb]["anyOf"][0]["properties"], set())]
        closed = REFUSED[verb]
        if closed:
            parts.append(
                "Not in a recipe: "
                + "; ".join(f"`{n}` ({' '.join(why.split())})" for n, why in closed.items())
                + "."
            )
    parts += [
        "## Options of the run",
        "These belong to whoever runs a recipe: " + ", ".join(f"`{option}`" for option in MACHINE.values()) + ".",
    ]  # fmt: skip
    return _page("Keys of recipes", *parts)


def _keys(found: dict[str, Any], required: set[str]) -> str:
    rows = [
        [f"`{name}`" + (" (required)" if name in required else ""), _shape(schema), schema.get("description", "")]
        for name, schema in found.items()
    ]  # fmt: skip
    return _table(["key", "value", "meaning"], rows)


def _shape(schema: dict[str, Any]) -> str:
    """Return what a value looks like, in words."""
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{one}`" for one in schema["enum"])
    if "anyOf" in schema:
        shapes = [_shape(one) for one in schema["anyOf"] if one.get("type") != "null"]
        return " or ".join(dict.fromkeys(shapes))
    if "prefixItems" in schema:
        return "list of " + ", ".join(_shape(one) for one in schema["prefixItems"])
    kind = schema.get("type")
    if isinstance(kind, list):
        return " or ".join(_NAMES.get(one, one) for one in kind)
    if kind == "array":
        return f"list of {_shape(schema['items'])}" if schema.get("items") else "list"
    if kind == "object":
        inner = schema.get("properties")
        return "mapping of " + ", ".join(f"`{one}`" for one in inner) if inner else "mapping"
    if kind in ("integer", "number"):
        return _NAMES[kind] + _bounds(schema)
    return _NAMES.get(str(kind), "any")


_NAMES = {
    "string": "text",
    "number": "number",
    "integer": "whole number",
    "boolean": "true or false",
    "object": "mapping",
}


def _bounds(schema: dict[str, Any]) -> str:
    words = {
        "minimum": "from",
        "exclusiveMinimum": "above",
        "maximum": "to",
        "exclusiveMaximum": "below",
    }
    shown = [f"{word} {schema[key]:g}" for key, word in words.items() if key in schema]
    return f" {' '.join(shown)}" if shown else ""


# ---- errors ------------------------------------------------------------------------------------------


def errors() -> str:
    """Return the page of every error code: what `surgeon explain` shows, in one place."""
    from surgeon.explanations import groups

    parts = [
        "Every refusal has a stable code, one sentence, the place, and what to do. `surgeon explain E305` shows one of these."
    ]
    for group in groups():
        parts += [f"## {group.title}", group.summary]
        for page in group.pages:
            exits = " or ".join(map(str, page.exits))
            parts += [
                f"### {page.code} {page.title}",
                f"{_prose(page.meaning)} Exit code {exits}.",
                f"**When.** {_prose(page.when)}",
                f"**Fix.** {_prose(page.fix)}",
                "\n".join(f"    {line}" for line in page.example),
            ]
    return _page("Errors", *parts)


def _prose(text: str) -> str:
    """Return text in which nothing is taken for HTML."""
    return text.replace("<", "&lt;")


# ---- decisions ---------------------------------------------------------------------------------------


def decisions() -> str:
    """Return the list of decision records."""
    rows = []
    for path in sorted((DOCS / "decisions").glob("[0-9]*.md")):
        title = path.read_text().partition("\n")[0].lstrip("# ").strip()
        rows.append(f"- [{title}]({path.name})")
    return _page("Decisions", "What was decided, why, and what follows from it.", "\n".join(rows))


def main() -> int:
    stale = []
    for name, text in pages().items():
        path = DOCS / name
        if path.is_file() and path.read_text() == text:
            continue
        stale.append(name)
        if "--check" not in sys.argv:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
    for name in stale:
        sys.stdout.write(f"{'stale' if '--check' in sys.argv else 'wrote'}: docs/{name}\n")
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
