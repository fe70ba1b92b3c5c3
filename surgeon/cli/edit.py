"""``surgeon edit``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from surgeon.cli import calibration as c
from surgeon.cli import options as o
from surgeon.cli.errors import run_command, stop_on_signals
from surgeon.cli.output import Output, number, size
from surgeon.errors import UsageError
from surgeon.python.edited import written


def edit(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder or hub id; MODEL+ADAPTER folds one in.")
    ],
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="thinkedit (heads that cut thinking short), project-out (a direction out of chosen matrices), "
            "steer (a constant shift as a bias), rice (more weight for experts of thinking; an experiment).",
        ),
    ],
    responses: Annotated[
        str | None,
        typer.Option("--responses", help="JSONL with prompt, thinking, response; split by its thinking."),
    ] = None,
    long: Annotated[str | None, typer.Option("--long", help="Responses with long thinking.")] = None,
    short: Annotated[str | None, typer.Option("--short", help="Responses with short thinking.")] = None,
    thresholds: Annotated[
        str,
        typer.Option(
            "--thresholds", help="LONG,SHORT: tokens of thinking above and below which --responses is split."
        ),
    ] = "1000,100",
    direction: Annotated[str | None, typer.Option("--direction", help="Directions saved before.")] = None,
    save_direction: Annotated[
        str | None, typer.Option("--save-direction", help="Keep the extracted directions in this file.")
    ] = None,
    site: Annotated[
        str | None,
        typer.Option(
            "--site", help="attn (after attention), mlp or layer (after the layer) [attn; steer: layer]."
        ),
    ] = None,
    window: Annotated[
        str | None,
        typer.Option("--window", help="Tokens that count: response, last [response; steer: last]."),
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Responses of a set at most.")] = 500,
    sequence_length: Annotated[
        int, typer.Option("--sequence-length", min=2, help="Tokens of a response at most.")
    ] = 8192,
    force: Annotated[bool, typer.Option("--force", help="Use directions of another model.")] = False,
    heads: Annotated[
        list[str] | None,
        typer.Option("--heads", help="thinkedit: LAYER:HEAD, repeat or comma list [chosen by score]."),
    ] = None,
    heads_fraction: Annotated[
        float | None,
        typer.Option("--heads-fraction", help="thinkedit: share of all heads that is edited [0.04]."),
    ] = None,
    heads_count: Annotated[
        int | None, typer.Option("--heads-count", help="thinkedit: how many heads are edited.")
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option("--strength", help="Share of the direction taken out; above 1 reflects it [1]."),
    ] = None,
    project_bias: Annotated[
        bool, typer.Option("--project-bias", help="Take the direction out of biases, too.")
    ] = False,
    matrices: Annotated[
        str | None, typer.Option("--matrices", help="project-out: attention, ffn, embedding [attention,ffn].")
    ] = None,
    layer: Annotated[
        int | None,
        typer.Option(
            "--layer", help="steer: whose output is shifted; project-out: whose direction is used everywhere."
        ),
    ] = None,
    layers: Annotated[
        str | None, typer.Option("--layers", help="project-out: A:B edits only these layers.")
    ] = None,
    gamma: Annotated[
        float | None, typer.Option("--gamma", help="steer: factor of the direction; positive shortens.")
    ] = None,
    kl_budget: Annotated[
        float | None,
        typer.Option("--kl-budget", help="steer: find gamma by this KL from the source, nats a token."),
    ] = None,
    relabel: Annotated[
        str, typer.Option("--relabel", help="steer: auto lets a Qwen2 or Mistral become a Llama; never.")
    ] = "auto",
    control_vector: Annotated[
        str | None,
        typer.Option("--control-vector", help="steer: write a llama.cpp control vector instead of a model."),
    ] = None,
    marker: Annotated[
        list[str] | None,
        typer.Option(
            "--marker",
            help="rice: text whose experts are looked for, repeat [<think>, </think>, alternatively].",
        ),
    ] = None,
    beta: Annotated[
        float | None,
        typer.Option("--beta", help="rice: factor on the experts that are found; 2 to 512 were published."),
    ] = None,
    experts_count: Annotated[
        int | None, typer.Option("--experts-count", help="rice: how many experts are scaled [2].")
    ] = None,
    scale_experts: Annotated[
        list[str] | None,
        typer.Option(
            "--scale-experts",
            help="rice: LAYER:EXPERT=FACTOR, repeat or comma list, instead of looking for them.",
        ),
    ] = None,
    expert_record: Annotated[
        str | None,
        typer.Option(
            "--expert-record", help="rice: YAML that says where an unknown family keeps its experts."
        ),
    ] = None,
    calibration: c.Source = None,
    check: Annotated[
        bool,
        typer.Option("--check/--no-check", help="Compare with the source on neutral text (--calibration)."),
    ] = True,
    device: Annotated[
        str, typer.Option("--device", help="Where the model runs: auto, cpu, cuda, cuda:N.")
    ] = "auto",
    output: o.OutputPath = None,
    overwrite: o.Overwrite = False,
    resume: o.Resume = True,
    dry_run: o.DryRun = False,
    dtype: o.DType = None,
    max_shard_size: o.ShardSize = "5GB",
    threads: o.Threads = None,
    memory_limit: o.MemoryLimit = None,
    seed: o.Seed = 0,
    weights: o.Weights = "auto",
    ignore_unlisted: o.IgnoreUnlisted = False,
    allow_nonfinite: o.AllowNonfinite = False,
    dequantize: o.Dequantize = False,
    offline: o.Offline = False,
    json_: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    no_progress: o.NoProgress = False,
) -> None:
    """Edit weights along a direction that a model's own long and short responses differ in.

    thinkedit makes a model that thinks too briefly think on; it does not shorten. steer shortens.
    """
    out = Output(json_, quiet, verbose, not no_progress)

    def work() -> dict[str, Any]:
        from surgeon.edit import request as requests

        request = requests.build(
            method=method, direction=direction, save_direction=save_direction, responses=responses, long=long, short=short,
            thresholds=_pair(thresholds, "--thresholds", ","), site=site, window=window, samples=samples,
            sequence_length=sequence_length, force=force, heads=tuple(heads or ()), heads_fraction=heads_fraction,
            heads_count=heads_count, strength=strength, project_bias=project_bias,
            matrices=tuple(part.strip() for part in matrices.split(",")) if matrices else (), layer=layer,
            layers=_pair(layers, "--layers", ":"), gamma=gamma, kl_budget=kl_budget, relabel=relabel,
            control_vector=control_vector, markers=tuple(marker or ()), beta=beta, experts_count=experts_count,
            scale_experts=tuple(scale_experts or ()), expert_record=expert_record, calibration=tuple(calibration or ()), check=check, device=device, dtype=dtype,
            max_shard_size=o.byte_size(max_shard_size, "--max-shard-size"), seed=seed, allow_nonfinite=allow_nonfinite,
            dequantize=dequantize, offline=offline,
        )  # fmt: skip
        limit = o.byte_size(memory_limit, "--memory-limit")
        return _run(out, model, request, output, dry_run, {"threads": threads, "memory_limit": limit},
                    {"overwrite": overwrite, "resume": resume}, weights, ignore_unlisted)  # fmt: skip

    raise typer.Exit(run_command(out, "edit", work))


def _pair(text: str | None, option: str, sign: str) -> tuple[int, int] | None:
    if text is None:
        return None
    first, found, second = text.partition(sign)
    if not found or not first.strip().isdecimal() or not second.strip().isdecimal():
        raise UsageError("E209", f'{option} is "{text}"', help=f"two whole numbers: A{sign}B")
    return int(first), int(second)


def _run(
    out: Output, model: str, request: Any, output: str | None, dry: bool, machine: dict[str, Any], writing: dict[str, Any],
    weights: str, ignore_unlisted: bool,
) -> dict[str, Any]:  # fmt: skip
    from surgeon import api
    from surgeon.derive import Source
    from surgeon.edit import run

    with api.open_model(
        model,
        offline=request.offline,
        weights=weights,
        ignore_unlisted=ignore_unlisted,
        dequantize=request.dequantize,
    ) as opened:
        for note in getattr(opened.checkpoint, "notes", ()) if request.dequantize else ():
            out.note(note)
        source = Source(opened.key, opened.checkpoint, model, opened.located.repo, opened.located.commit)
        where = (
            Path(output)
            if output
            else run.default_output(model, opened.checkpoint.folder, opened.located.repo)
        )
        bar = out.progress("reading", unit="")
        with stop_on_signals(out) as (stop, _):
            steps = {"progress": lambda title, done, total: bar(done, total, title), "stop": stop}
            try:
                prepared = run.prepare(request, source, title=where.name, dry=dry, **machine, **steps)
            finally:
                bar.close()
            for note in prepared.notes:
                out.note(note)
            for warning in prepared.warnings:
                out.warning(warning)
            _describe(out, prepared.report)
            if dry:
                return _dry(out, prepared, where, machine, writing)
            bar = out.progress("writing", unit="")
            try:
                done = run.write(prepared, request, where, **machine, **writing,
                                 progress=lambda title, count, total: bar(count, total, title), stop=stop)  # fmt: skip
            finally:
                bar.close()
    return _finish(out, done)


def _dry(
    out: Output, prepared: Any, where: Path, machine: dict[str, Any], writing: dict[str, Any]
) -> dict[str, Any]:
    """Say what a run would need, or refuse with what it would refuse with."""
    found: dict[str, Any] = {
        "status": "dry-run",
        "edit": prepared.report,
        "notes": prepared.notes,
        "warnings": prepared.warnings,
    }
    if prepared.plan is not None:
        from surgeon.execute import input_locations, preflight
        from surgeon.output import staging
        from surgeon.system import physical_cores

        place = where.absolute()
        staging.check_destination(
            place, input_locations(prepared.plan), overwrite=writing["overwrite"], is_file=False
        )
        check = preflight(prepared.plan, place, threads=machine["threads"] or physical_cores(), memory_limit=machine["memory_limit"])  # fmt: skip
        tensors = [t for group in prepared.plan.outputs().values() for t in group]
        found["output"] = {"path": str(where), "bytes": sum(t.nbytes for t in tensors)}
        out.line(f"plan      {where}   {number(sum(t.elements for t in tensors))} parameters   "
                 f"{size(found['output']['bytes'])}   free disk {size(check.disk_free)}")  # fmt: skip
    out.line("nothing was written.")
    return found


def _describe(out: Output, report: dict[str, Any]) -> None:
    """Print what was found."""
    if out.quiet:
        return
    direction = report.get("direction")
    if direction:
        best = max(direction["separated"].items(), key=lambda entry: entry[1])
        out.line(f"direction {direction['site']}   {direction['examples'][0]} long, {direction['examples'][1]} short examples   "
                 f"best layer {best[0]}: {best[1]:.0%} of held-out examples sorted right")  # fmt: skip
    if report.get("heads"):
        rows = [[h["layer"], h["head"], f"{h['score']:.4g}" if "score" in h else "", f"{h['before']:.4g}", f"{h['after']:.2g}"]
                for h in report["heads"][:12]]  # fmt: skip
        out.line(
            f"heads     {len(report['heads'])} of {report['heads_total']}   strength {report['strength']:g}"
        )
        out.table(["layer", "head", "score", "|v'W| before", "after"], rows)
        if len(report["heads"]) > len(rows):
            out.line(f"and {len(report['heads']) - len(rows)} more, in --json")
    if report.get("matrices"):
        before = sum(m["before"] ** 2 for m in report["matrices"]) ** 0.5
        after = sum(m["after"] ** 2 for m in report["matrices"]) ** 0.5
        out.line(
            f"matrices  {len(report['matrices'])}   |v'W| {before:.4g} -> {after:.2g}   strength {report['strength']:g}"
        )
    if "gamma" in report:
        fit = f"   KL {report['fit']['measured'][-1][1]:.4g} nats a token" if "fit" in report else ""
        out.line(f"shift     layer {report['layer']} {report['site']}   gamma {report['gamma']:.4g}{fit}")
    if report.get("found"):
        found = report["found"]
        rows = [[e["layer"], e["expert"], f"{e['npmi']:.3f}", *(f"{v:.3f}" for v in e["markers"].values()), e["tokens"]]
                for e in found["experts"]]  # fmt: skip
        out.line(
            "markers   "
            + "   ".join(f"{m} {n:,}" for m, n in found["markers"].items())
            + f"   in {found['tokens']:,} tokens"
        )
        out.table(["layer", "expert", "nPMI", *found["markers"], "tokens"], rows)
    if report.get("scales"):
        out.line(
            "scaled    "
            + ", ".join(
                f"layer {s['layer']} expert {s['expert']} by {s['factor']:g}" for s in report["scales"]
            )
        )
        out.line(f"undo      surgeon edit RESULT --method rice --scale-experts {report['undo']}")
    quality = report.get("quality")
    if quality:
        out.line(f"neutral   perplexity {quality['perplexity_before']:.4g} -> {quality['perplexity_after']:.4g}   "
                 f"KL from the source {quality['kl']:.3g} nats a token")  # fmt: skip


def _finish(out: Output, done: Any) -> dict[str, Any]:
    outcome = done.outcome
    document = written(done)
    if outcome is not None and not out.quiet:
        out.line(f"unchanged {done.path}: it already holds this result, verified" if outcome.unchanged else
                 f"verified  {_count(len(done.report['changed']))} changed or added, all others byte for byte the source's")  # fmt: skip
        out.log("An edited model must be evaluated before use: accuracy and answer length on its task and on a neutral one "
                "(surgeon eval).")  # fmt: skip
    out.line(f"wrote     {done.path}")
    return document


def _count(tensors: int) -> str:
    return f"{tensors:,} tensor" + ("" if tensors == 1 else "s")
