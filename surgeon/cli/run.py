"""``surgeon run``: a mergekit YAML, one document or several."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from surgeon.cli import options as o
from surgeon.cli.errors import run_command
from surgeon.cli.merge import Settings, run_yaml
from surgeon.cli.output import Output


def run(
    recipe: Annotated[str, typer.Argument(metavar="CONFIG.yml", help="A mergekit YAML.")],
    output: o.OutputPath = None,
    overwrite: o.Overwrite = False,
    resume: o.Resume = True,
    dry_run: o.DryRun = False,
    max_shard_size: o.ShardSize = "5GB",
    threads: o.Threads = None,
    memory_limit: o.MemoryLimit = None,
    seed: o.Seed = 0,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings are errors.")] = False,
    mergekit_quirks: Annotated[
        bool, typer.Option("--mergekit-quirks", help="Reproduce mergekit's oddities that affect numbers.")
    ] = False,
    weights: o.Weights = "auto",
    ignore_unlisted: o.IgnoreUnlisted = False,
    allow_nonfinite: o.AllowNonfinite = False,
    allow_pickle: o.AllowPickle = False,
    offline: o.Offline = False,
    json_: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    no_progress: o.NoProgress = False,
) -> None:
    """Run a mergekit YAML, unchanged."""
    out = Output(json_, quiet, verbose, not no_progress)

    def work() -> dict[str, Any]:
        common = {
            "max_shard_size": o.byte_size(max_shard_size, "--max-shard-size"), "seed": seed, "strict": strict,
            "mergekit_quirks": mergekit_quirks, "offline": offline, "weights": weights,
            "ignore_unlisted": ignore_unlisted, "allow_nonfinite": allow_nonfinite, "allow_pickle": allow_pickle,
        }  # fmt: skip
        settings = Settings(
            output, overwrite, resume, dry_run, threads, o.byte_size(memory_limit, "--memory-limit")
        )
        return run_yaml(out, recipe, common, settings)

    raise typer.Exit(run_command(out, "run", work))
