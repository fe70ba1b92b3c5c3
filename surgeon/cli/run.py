"""``surgeon run``: a recipe of several steps, or a mergekit YAML, one document or several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from surgeon.cli import options as o
from surgeon.cli.errors import run_command, stop_on_signals
from surgeon.cli.eval import Stages
from surgeon.cli.merge import Settings, run_yaml
from surgeon.cli.output import Output, number, plain, size
from surgeon.errors import SurgeonError, UsageError


def run(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE.yaml", help="A recipe (version: 1), or a mergekit YAML.")
    ],
    output: o.OutputPath = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="PATH=VALUE, repeat: models.long=./mine, steps.merged.merge.parameters.lambda=0.9."
        ),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", help="Run this step alone; repeat for several.")
    ] = None,
    from_: Annotated[
        str | None, typer.Option("--from", help="Begin with this step; earlier ones must be there.")
    ] = None,
    until: Annotated[
        str | None, typer.Option("--until", help="End with this step; nothing is published then.")
    ] = None,
    work_folder: Annotated[
        str | None, typer.Option("--work", help="Folder for steps, results and result.json [OUT.work].")
    ] = None,
    keep_intermediate: Annotated[
        bool, typer.Option("--keep-intermediate", help="Leave the models of steps in the work folder.")
    ] = False,
    fuse: Annotated[
        bool | None,
        typer.Option(
            "--fuse/--no-fuse",
            help="Hand models to the next step unwritten: less disk, more computing; the same bytes.",
        ),
    ] = None,
    gates: Annotated[bool, typer.Option("--gates/--no-gates", help="Decide the recipe's gates.")] = True,
    publish: Annotated[
        str | None, typer.Option("--publish", help="always or on-pass, whatever the recipe says.")
    ] = None,
    overwrite: o.Overwrite = False,
    resume: o.Resume = True,
    dry_run: o.DryRun = False,
    strict: o.Strict = False,
    threads: o.Threads = None,
    memory_limit: o.MemoryLimit = None,
    device: Annotated[
        str | None, typer.Option("--device", help="Where models run: auto, cpu, cuda or cuda:N [auto].")
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="In place of the recipe's seed [0].")
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option("--max-shard-size", help="Of a mergekit YAML; decimal units [5GB].")
    ] = None,
    mergekit_quirks: Annotated[
        bool,
        typer.Option(
            "--mergekit-quirks", help="Of a mergekit YAML: reproduce mergekit's oddities that affect numbers."
        ),
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
    """Run a recipe: its steps in order, its gates, then publish; or run a mergekit YAML, unchanged.

    OUT is exactly the published model; steps, results and result.json lie in OUT.work. Run it again to go on after an
    interruption: what is finished is not made again. A gate that fails: exit 4, and nothing is published.
    """
    out = Output(json_, quiet, verbose, not no_progress)

    def work() -> dict[str, Any]:
        from surgeon.recipe import native, yaml

        limit = o.byte_size(memory_limit, "--memory-limit")
        if native.is_native(yaml.read_text(Path(recipe)), recipe):
            _refuse_others(_of_mergekit(max_shard_size, mergekit_quirks, weights, ignore_unlisted, allow_nonfinite, allow_pickle),
                           "belongs to a mergekit YAML", "write it in the recipe, in the step it is for")  # fmt: skip
            options = {
                "work": work_folder, "only": tuple(only or ()), "start": from_, "until": until, "keep_intermediate": keep_intermediate,
                "gates": gates, "publish": _when(publish), "strict": strict, "overwrite": overwrite, "resume": resume,
                "fuse": fuse,
            }  # fmt: skip
            machine = {"threads": threads, "memory_limit": limit, "device": device, "offline": offline}
            return _run_native(
                out, native.read(recipe, tuple(set_ or ()), seed=seed), output, options, machine, dry_run
            )
        of_recipes = {"--set": set_, "--only": only, "--from": from_, "--until": until, "--keep-intermediate": keep_intermediate,
                      "--no-gates": not gates, "--publish": publish, "--fuse": fuse}  # fmt: skip
        _refuse_others(
            of_recipes,
            "belongs to a recipe of several steps",
            "a mergekit YAML is one merge; surgeon recipe schema shows a recipe",
        )
        common = {
            "max_shard_size": o.byte_size(max_shard_size or "5GB", "--max-shard-size"), "seed": seed or 0, "strict": strict,
            "mergekit_quirks": mergekit_quirks, "offline": offline, "weights": weights, "ignore_unlisted": ignore_unlisted,
            "allow_nonfinite": allow_nonfinite, "allow_pickle": allow_pickle, "device": device or "auto",
        }  # fmt: skip
        return run_yaml(
            out, recipe, common, Settings(output, overwrite, resume, dry_run, threads, limit, work_folder)
        )

    raise typer.Exit(run_command(out, "run", work))


def _of_mergekit(
    shards: str | None, quirks: bool, weights: str, unlisted: bool, nonfinite: bool, pickle: bool
) -> dict[str, Any]:
    return {"--max-shard-size": shards, "--mergekit-quirks": quirks, "--weights": weights != "auto", "--ignore-unlisted": unlisted,
            "--allow-nonfinite": nonfinite, "--allow-pickle": pickle}  # fmt: skip


def _refuse_others(given: dict[str, Any], what: str, help: str) -> None:
    for option, value in given.items():
        if value:
            raise UsageError("E208", f"{option} {what}", help=help)


def _when(text: str | None) -> str | None:
    if text is None:
        return None
    word = text.replace("-", "_")
    if word not in ("always", "on_pass"):
        raise UsageError("E2009", f'--publish is "{text[:40]}"', help="always or on-pass")
    return word


def _run_native(
    out: Output, recipe: Any, output: str | None, options: dict[str, Any], machine: dict[str, Any], dry: bool
) -> dict[str, Any]:
    """Run a recipe; the document says what happened to every step, whatever happened."""
    from surgeon.pipeline.run import Run
    from surgeon.pipeline.verbs import Machine

    for warning in recipe.warnings:
        out.warning(warning)
    bar = Stages(out)
    job = None
    try:
        with stop_on_signals(out) as (stop, _):
            try:
                job = Run(
                    recipe,
                    output,
                    machine=Machine(progress=bar.tell, say=out.note, stop=stop, **machine),
                    **options,
                )
                document = job.rehearse() if dry else job.execute()
            finally:
                bar.close()
    except SurgeonError as error:
        if job is None or (not out.json_mode and not job.runs):
            raise
        document = job.failed(error)
        show(out, document)
        out.error(error)
        return document
    show(out, document)
    assert job is not None
    refusal = job.refusal()
    if refusal is not None and document["status"] == "gate-failed":
        out.error(refusal)
    return document


def show(out: Output, document: dict[str, Any]) -> None:
    """Print what became of every step, the gates, and where the model is."""
    for warning in document["warnings"]:
        out.warning(warning)
    if out.quiet:
        return
    points = document["points"] or [document]
    for point in points:
        if document["points"]:
            verdict = "" if not point["gates"] else "   passed" if point["passed"] else "   FAILED"
            out.line(f"point {plain(point['name'])}{verdict}")
        out.table(
            ["step", "verb", "status", "seconds", "result"],
            [_row(step, point["results"]) for step in point["steps"]],
        )
        for gate in point["gates"]:
            verdict = "passed" if gate["passed"] else "FAILED"
            out.line(
                f"gate {verdict}   {plain(gate['gate'])}   value {_figure(gate['value'])}   threshold {_figure(gate['threshold'])}"
            )
    path = document["output"]["path"]
    if document["status"] == "dry-run":
        out.line(f"to        {path}")
        out.line("nothing was written.")
    elif document["unchanged"]:
        out.line(f"unchanged {path}: everything the recipe asks for is there, verified")
    elif document["published"]:
        for model in document["output"]["models"].values():
            out.line(f"wrote     {model}")
    else:
        out.line(f"results   {document['work']}")


def _row(step: dict[str, Any], results: dict[str, Any]) -> list[object]:
    waits = step.get("waits_for")
    status = f"waits for {', '.join(waits)}" if waits else step["status"]
    status += ", fused" if step.get("fused") else ""
    seconds = "" if step["seconds"] is None else f"{step['seconds']:.1f}"
    return [step["id"], step["verb"], status, seconds, _result(results.get(step["id"]) or {})]


def _result(metrics: dict[str, Any]) -> str:
    shown = []
    for name, value in metrics.items():
        if value is None or (name not in _SHOWN and not name.endswith("_accuracy")):
            continue
        text = size(value) if name == "bytes" else number(value) if name == "parameters" else _figure(value)
        shown.append(
            text if name == "bytes" else f"{text} parameters" if name == "parameters" else f"{name} {text}"
        )
    return "   ".join(shown)


_SHOWN = ("bytes", "parameters", "bits", "speedup", "accuracy", "tokens_mean", "perplexity", "kl")


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}" if abs(value) < 1e6 else f"{value:,.0f}"
