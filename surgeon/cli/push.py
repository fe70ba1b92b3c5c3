"""``surgeon push``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from surgeon.cli import options as o
from surgeon.cli.errors import run_command
from surgeon.cli.output import Output, plain, size


def push(
    folder: Annotated[
        str, typer.Argument(metavar="FOLDER", help="A model folder that a surgeon command wrote.")
    ],
    repo: Annotated[str, typer.Option("--repo", help="org/name; made when it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch to push to [main].")] = None,
    base_model: Annotated[
        list[str] | None,
        typer.Option("--base-model", help="org/name for the card, in place of what it says; repeat."),
    ] = None,
    licence: Annotated[
        str | None,
        typer.Option(
            "--licence", "--license", help="Licence id for the card, in place of what it says: apache-2.0."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Verify the folder and check the card; upload nothing.")
    ] = False,
    offline: o.Offline = False,
    json_: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Upload a finished model to the hub: verified first, then one commit.

    The folder must verify and its card must be fit for the hub before anything is sent. The token is the one of "hf auth
    login", or HF_TOKEN. Weight files of an earlier model that the new one lacks go in the same commit.
    """
    out = Output(json_, quiet, verbose)

    def work() -> dict[str, Any]:
        from surgeon.deploy.push import push as upload

        found = upload(
            folder, repo, private=private, revision=revision, base_model=base_model or (), licence=licence,
            dry_run=dry_run, offline=offline, say=out.note,
        )  # fmt: skip
        for warning in found.warnings:
            out.warning(warning)
        for name in found.left_out:
            out.note(f"{plain(name)} is left out: SHA256SUMS does not list it")
        for name in found.changed:
            out.note(f"{name} is uploaded with what was given here; the folder stays as it is")
        if not quiet:
            _show(out, found, dry_run)
        return {
            "status": "dry-run" if dry_run else "ok", "repo": found.repo, "revision": found.revision, "private": found.private,
            "files": found.files, "bytes": found.bytes, "changed": list(found.changed), "left_out": list(found.left_out),
            "removed": list(found.removed), "card": found.card, "url": found.url, "commit": found.commit,
            "warnings": found.warnings,
        }  # fmt: skip

    raise typer.Exit(run_command(out, "push", work))


def _show(out: Output, found: Any, dry_run: bool) -> None:
    """Print what went where."""
    visible = "private if it is made now" if found.private else "public if it is made now"
    out.line(f"card      license {plain(found.card.get('license') or '-')}   base_model {_names(found.card.get('base_model'))}   "
             f"relation {plain(found.card.get('base_model_relation') or '-')}")  # fmt: skip
    out.line(f"files     {len(found.files)}   {size(found.bytes)}")
    out.line(f"to        {found.repo} ({found.revision}; {visible})")
    for name in found.removed:
        out.line(f"removed   {plain(name)}: of an earlier model")
    out.line("nothing was uploaded." if dry_run else f"pushed    {plain(found.url)}")


def _names(value: Any) -> str:
    return plain(", ".join(map(str, value)) if isinstance(value, list) else value or "-")
