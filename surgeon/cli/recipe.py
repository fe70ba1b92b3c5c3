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
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Recipes, or mergekit YAML.")],
    set_: Set = None,
    inputs: Annotated[bool, typer.Option("--inputs", help="Models and files must be there, too.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings are errors.")] = False,
    json_: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Check recipes without running them; every mistake is shown with line and column."""
    out = Output(json_, quiet, verbose)

    def work() -> dict[str, Any]:
        rows, errors = [], []
        for file in files:
            try:
                warnings = _check(file, set_ or [], inputs)
                if warnings and strict:
                    raise UsageError("E220", f"--strict: {file}: {warnings[0]}")
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


def _check(file: str, settings: list[str], inputs: bool) -> list[str]:
    from surgeon.recipe import mergekit_yaml, native, yaml

    text = yaml.read_text(Path(file))
    if not native.is_native(text, file):
        if settings:
            raise UsageError(
                "E208", "--set belongs to a recipe of several steps", help=f"{file} is a mergekit YAML"
            )
        _, remarks = mergekit_yaml.parse(text, file)
        return [str(getattr(remark, "message", remark)) for remark in remarks]
    recipe = native.read(file, settings)
    if inputs:
        recipe.check_files()
    return list(recipe.warnings)


@app.command()
def show(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A recipe.")],
    set_: Set = None,
    json_: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Print a recipe resolved: what it extends, defaults and references filled in."""
    out = Output(json_, quiet, verbose)

    def work() -> dict[str, Any]:
        import yaml

        from surgeon.recipe import native

        recipe = native.read(file, set_ or [])
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
    """List the recipes that come with surgeon."""
    out = Output(json_, quiet)

    def work() -> dict[str, Any]:
        from surgeon.recipe.shipped import shipped

        found = shipped()
        out.table(["recipe", "folder", "what it does"], [[one.name, one.kind, one.summary] for one in found])
        return {"recipes": [{"name": one.name, "folder": one.kind, "summary": one.summary} for one in found]}

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
