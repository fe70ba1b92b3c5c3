"""``surgeon recipe``: validate, show, schema, list, copy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from surgeon.cli import options as o
from surgeon.cli.errors import as_json, run_command
from surgeon.cli.output import Output
from surgeon.errors import SurgeonError, UsageError

app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]}, help="Check, show and copy recipes.",
)  # fmt: skip

Set = Annotated[list[str] | None, typer.Option("--set", help="PATH=VALUE, repeat: models.long=./mine.")]


@app.command()
def validate(
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILE...", help="Recipes, mergekit YAML, or names of shipped recipes."),
    ],
    set_: Set = None,
    inputs: Annotated[bool, typer.Option("--inputs", help="Models and files must be there, too.")] = False,
    strict: o.Strict = False,
    json_: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Check recipes without running them; every mistake is shown with line and column."""
    out = Output(json_, quiet, verbose)

    def work() -> dict[str, Any]:
        from surgeon.recipe.checking import check

        rows, errors = [], []
        for file in files:
            try:
                warnings = check(file, set_ or [], inputs)
                if warnings and strict:
                    raise UsageError("E220", f"--strict: {file}: {warnings[0]}", help="change what the warning names, or leave out --strict")  # fmt: skip
            except SurgeonError as error:
                errors.append(error)
                rows.append({"file": file, "valid": False, "warnings": [], "error": as_json(error)})
                out.error(error)
                continue
            for warning in warnings:
                out.warning(f"{file}: {warning}")
            rows.append({"file": file, "valid": True, "warnings": warnings, "error": None})
            if not quiet:
                out.line(f"valid     {file}")
        first = errors[0] if errors else None
        return {
            "files": rows, "status": "failed" if first else "ok", "exit_code": first.exit_code if first else 0,
            "error": as_json(first) if first else None,
        }  # fmt: skip

    raise typer.Exit(run_command(out, "recipe validate", work))


@app.command()
def show(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A recipe, or the name of a shipped one.")],
    set_: Set = None,
    json_: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Print a recipe resolved: what it extends, defaults and references filled in; a mergekit YAML as it is."""
    out = Output(json_, quiet, verbose)

    def work() -> dict[str, Any]:
        import yaml

        from surgeon.recipe import native, shipped
        from surgeon.recipe.yaml import read_text

        path = shipped.file_of(file)
        text = read_text(path)
        if not native.is_native(text, str(path)) and "merge_method" in text:
            from surgeon.recipe.checking import check

            warnings = check(file, set_ or [], False)
            for warning in warnings:
                out.warning(warning)
            for line in text.splitlines():
                out.line(line)
            documents = list(yaml.safe_load_all(text))
            return {"recipe": documents[0] if len(documents) == 1 else documents, "warnings": warnings}
        recipe = native.read(path, set_ or [])
        for warning in recipe.warnings:
            out.warning(warning)
        found = json.loads(json.dumps(recipe.plain()))
        for line in yaml.safe_dump(found, sort_keys=False, width=120, allow_unicode=True).splitlines():
            out.line(line)
        return {"recipe": found, "warnings": list(recipe.warnings)}

    raise typer.Exit(run_command(out, "recipe show", work))


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    out = Output(False)

    def work() -> dict[str, Any]:
        from surgeon.recipe.json_schema import json_schema

        out.document(json_schema())
        return {}

    raise typer.Exit(run_command(out, "recipe schema", work))


@app.command("list")
def list_(json_: o.Json = False, quiet: o.Quiet = False) -> None:
    """List the recipes that come with surgeon, by what they are for."""
    out = Output(json_, quiet)

    def work() -> dict[str, Any]:
        from surgeon.recipe.shipped import shipped

        found = shipped()
        width = max((len(one.name) for one in found), default=0)
        for kind in dict.fromkeys(one.kind for one in found):
            group = [one for one in found if one.kind == kind]
            out.line(f"{kind}: {group[0].goal}" if group[0].goal else kind)
            for one in group:
                out.line(f"  {one.name.ljust(width)}  {one.summary}")
        return {
            "recipes": [
                {"name": one.name, "folder": one.kind, "goal": one.goal, "summary": one.summary}
                for one in found
            ]
        }

    raise typer.Exit(run_command(out, "recipe list", work))


@app.command()
def copy(
    name: Annotated[str, typer.Argument(metavar="NAME", help='As "surgeon recipe list" shows it.')],
    destination: Annotated[
        str | None, typer.Argument(metavar="[DEST]", help="File or folder [NAME.yaml here].")
    ] = None,
    json_: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Copy a recipe that comes with surgeon, to change it."""
    out = Output(json_, quiet)

    def work() -> dict[str, Any]:
        from surgeon.recipe import shipped

        target = shipped.copy(name, Path(destination) if destination else None)
        out.line(f"wrote     {target}")
        return {"output": {"path": str(target)}}

    raise typer.Exit(run_command(out, "recipe copy", work))
