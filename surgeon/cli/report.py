"""``surgeon report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from surgeon.cli import options as o
from surgeon.cli.errors import run_command
from surgeon.cli.output import Output, size
from surgeon.errors import OutputConflict, UsageError, Where, close_matches

_SUFFIXES = {"html": ".html", "markdown": ".md", "svg": ".svg", "png": ".png"}


def report(
    results: Annotated[
        list[str],
        typer.Argument(
            metavar="RESULT.json...",
            help="Output of eval, run, prune, quantize, merge, measure or diff with --json; model folders add how a model was made.",
        ),
    ],
    form: Annotated[
        str | None,
        typer.Option("--format", help="html, markdown, svg or png (matplotlib) [from -o, else html]."),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", help="File; - for stdout [markdown: stdout; else beside the first result]."
        ),
    ] = None,
    title: Annotated[str | None, typer.Option("--title", help="Heading of the report.")] = None,
    log_tokens: Annotated[
        bool, typer.Option("--log-tokens", help="Logarithmic axis for answer lengths.")
    ] = False,
    iso_lines: Annotated[
        bool, typer.Option("--iso-lines", help="Draw lines of equal accuracy per 1,000 tokens.")
    ] = False,
    json_: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Make one report over results: of runs steps, sizes, layers and gates; of eval accuracy against answer length.

    A page without scripts that needs no network (html), tables for pull requests and job summaries
    (markdown), or the plot alone (svg, png).
    """
    out = Output(json_, quiet, verbose)

    def work() -> dict[str, Any]:
        from surgeon import report as reports
        from surgeon.report.runs import evaluations, gates
        from surgeon.report.summary import summarise
        from surgeon.report.writing import publish

        chosen = _format(form, output)
        documents = reports.load(results)
        content = reports.render(documents, chosen, title=title, log_tokens=log_tokens, iso_lines=iso_lines)
        evaluated = evaluations(documents)
        found = summarise(evaluated, title) if evaluated else None
        front = [row.name for row in found.front] if found else []
        cautions = list(found.cautions) if found else []
        for caution in cautions:
            out.note(caution)
        passed = gates(documents)
        document: dict[str, Any] = {
            "format": chosen,
            "results": len(documents),
            "front": front,
            "gates": {"passed": passed.count(True), "failed": passed.count(False)},
            "notes": cautions,
        }
        path = _destination(output, chosen, results)
        if path is None:
            text = content.decode()
            out.line(text.removesuffix("\n"))
            return {**document, "output": None, "text": text}
        publish(path, content)
        out.line(f"wrote     {path}   {size(len(content))}")
        if front:
            out.line(f"front     {', '.join(front)}   (shortest answers first)")
        return {**document, "output": {"path": str(path), "bytes": len(content)}}

    raise typer.Exit(run_command(out, "report", work))


def _format(form: str | None, output: str | None) -> str:
    """Settle the format from --format and the suffix of -o; they may not contradict each other."""
    from surgeon.report import format_of

    if form is not None:
        name = {"md": "markdown", "htm": "html"}.get(form, form)
        if name not in _SUFFIXES:
            raise UsageError(
                "E237", f'--format is "{form}"', help=close_matches(name, _SUFFIXES) or ", ".join(_SUFFIXES)
            )
        if output is not None and output != "-" and Path(output).suffix:
            named = format_of(Path(output))
            if named != name:
                raise UsageError("E237", f"--format {form} does not fit -o {output}, which ends as {named} does",
                                 help=f"leave out --format, or let the file end in {_SUFFIXES[name]}")  # fmt: skip
        chosen = name
    elif output is None or output == "-":
        chosen = "html"
    else:
        chosen = format_of(Path(output))
    if chosen == "png" and output == "-":
        raise UsageError("E237", "a PNG is not text for stdout", help="give a file with -o")
    return chosen


def _destination(output: str | None, form: str, results: list[str]) -> Path | None:
    """Return the file to write, None for stdout."""
    if output == "-" or (output is None and form == "markdown"):
        return None
    first = Path(results[0])
    if output is None:
        name = "report" if len(results) > 1 or first.is_dir() else first.stem
        path = first.parent / f"{name}{_SUFFIXES[form]}"
        if path.is_file() and not _is_report(path):
            raise OutputConflict("E601", f"{path} exists and is no report of surgeon", where=Where(str(path)),
                                 help="give the file with -o")  # fmt: skip
    else:
        path = Path(output)
    if any(path.resolve() == Path(r).resolve() for r in results):
        raise OutputConflict("E602", f"the output is also an input: {path}", where=Where(str(path)),
                             help="choose another -o; inputs are never modified")  # fmt: skip
    return path


def _is_report(path: Path) -> bool:
    """Say whether a file came from this command: each form names the program near its beginning."""
    try:
        with open(path, "rb") as stream:
            return b"surgeon" in stream.read(4096)
    except OSError:
        return False
