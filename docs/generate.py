"""Writes the reference pages of these documents from the program itself.

    python docs/generate.py            # write docs/reference/*.md and docs/decisions/index.md
    python docs/generate.py --check    # exit 1 when one of them is stale

Pages come from the Typer applications, the records of the methods, the JSON Schema of recipes, and the error codes in the source.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
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
        parts.extend(_command(name, click_command(name), 2))
    return _page("Commands", *parts)


def click_command(name: str) -> Any:
    """Return one command, or group of commands, as click has it."""
    import typer

    from surgeon.cli.app import build

    return typer.main.get_command(build(name))


def _command(name: str, command: Any, depth: int) -> Iterator[str]:
    import click

    yield f"{'#' * depth} {name}"
    found = getattr(command, "commands", None)
    if found is not None:
        yield _prose(command.help)
        for sub in found:
            yield from _command(f"{name} {sub}", found[sub], depth + 1)
        return
    context = click.Context(command, info_name=f"surgeon {name}")
    usage = " ".join(command.collect_usage_pieces(context))
    yield f"    surgeon {name} {usage}"
    yield _prose(command.help)
    rows = [_argument(one) for one in command.params if one.param_type_name == "argument"]
    rows += [
        _option(one) for one in command.params if one.param_type_name == "option" and one.name != "help"
    ]
    if rows:
        yield _table(["argument, option", "default", "meaning"], rows)


def _prose(text: str | None) -> str:
    return "\n\n".join(" ".join(part.split()) for part in (text or "").split("\n\n"))


def _argument(one: Any) -> list[object]:
    shown = one.metavar or one.name.upper()
    return [f"`{shown}`", "" if one.required else "optional", one.help or ""]


def _option(one: Any) -> list[object]:
    names = ", ".join(f"`{name}`" for name in (*one.opts, *one.secondary_opts))
    if not one.is_flag and not one.metavar:
        names += f" {getattr(one.type, 'name', 'text').upper()}"
    elif one.metavar:
        names += f" {one.metavar}"
    shown = one.default
    default = (
        "required"
        if one.required
        else "on"
        if shown is True and one.secondary_opts
        else ""
        if shown is None or shown is False or shown == ""
        else f"`{shown}`"
    )
    return [names, default, one.help or ""]


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
    from surgeon.cli.methods import describe

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

_CLASSES = {
    "UsageError": "command line or recipe (exit 2)",
    "InputError": "checkpoints (exit 3)",
    "CheckFailed": "checks and gates (exit 4)",
    "EnvironmentFault": "environment (exit 5)",
    "OutputConflict": "output (exit 6)",
    "Interrupted": "interrupted (exit 130, 143)",
}


def errors() -> str:
    """Return the page of every error code, with the messages it comes with."""
    found = _raised()
    parts = [
        "Every refusal has a stable code, one sentence, the place, and what to do. `...` stands for what was given.",
    ]
    for name, title in _CLASSES.items():
        rows = [
            [f"`{code}`", "; ".join(sorted(messages)[:3])]
            for (owner, code), messages in sorted(found.items(), key=lambda item: item[0][1])
            if owner == name
        ]
        if rows:
            parts += [f"## {title[0].upper()}{title[1:]}", _table(["code", "says"], rows)]
    return _page("Errors", *parts)


def _raised() -> dict[tuple[str, str], set[str]]:
    """Return (class, code) -> messages, from every place in the source that makes a refusal."""
    found: dict[tuple[str, str], set[str]] = {}
    for path in sorted((ROOT / "surgeon").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or len(node.args) < 2:
                continue
            name, code = getattr(node.func, "id", None), node.args[0]
            if name not in _CLASSES or not isinstance(code, ast.Constant):
                continue
            if not re.fullmatch(r"E\d{3,4}", str(code.value)):
                continue
            message = _template(node.args[1])
            found.setdefault((name, str(code.value)), set()).update([message] if message else [])
    return found


def _template(node: ast.expr) -> str:
    """Return a message with `...` where a value is put in; "" where it is not written at that place."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(str(one.value) if isinstance(one, ast.Constant) else "..." for one in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _template(node.left) + _template(node.right)
    return ""


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
        print(f"{'stale' if '--check' in sys.argv else 'wrote'} docs/{name}")
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
