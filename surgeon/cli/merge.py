"""``surgeon merge``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from surgeon.cli import calibration as c
from surgeon.cli import options as o
from surgeon.cli.errors import run_command, stop_on_signals
from surgeon.cli.output import Output, number, plain, size
from surgeon.errors import UsageError
from surgeon.python.merged import describe, effective_update, rehearsed, written


def merge(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...|CONFIG.yml", help="Two or more models, or one mergekit YAML."),
    ],
    method: Annotated[
        str | None,
        typer.Option("--method", help='Merge method; "surgeon methods merge" lists them. [linear]'),
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="Base model [with two models: the last one, if needed].")
    ] = None,
    weight: Annotated[
        list[str] | None,
        typer.Option("--weight", help="Repeat, or comma list: one for each non-base model, in order."),
    ] = None,
    density: Annotated[
        list[str] | None, typer.Option("--density", help="Fraction of a task vector KEPT.")
    ] = None,
    lambda_: Annotated[
        float | None, typer.Option("--lambda", help="Factor of the merged task vector.")
    ] = None,
    t: Annotated[
        float | None, typer.Option("--t", help="Interpolation (slerp, interpolate, nearswap).")
    ] = None,
    normalize: Annotated[
        bool | None,
        typer.Option("--normalize/--no-normalize", help="Divide by the sum of weights [method's default]."),
    ] = None,
    param: Annotated[
        list[str] | None, typer.Option("--param", help="NAME=VALUE: any other parameter of the method.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option("--layers", help="A:B merges only these layers; the rest is the base's.")
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option("--ignore", help="Tensors copied unchanged: name, glob or re:REGEX.")
    ] = None,
    dense: Annotated[
        list[str] | None,
        typer.Option(
            "--dense", help="Tensors merged with density 1 (norms, biases): name, glob or re:REGEX."
        ),
    ] = None,
    vocab: Annotated[
        str | None,
        typer.Option("--vocab", help="base, union, truncate or a MODEL [refuse when vocabularies differ]."),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="Model whose tokenizer files are taken.")
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option("--chat-template", help="auto, base, a built-in name, or a file.")
    ] = None,
    text_from: Annotated[
        str | None,
        typer.Option(
            "--text-from",
            help="Model that gives context length, generation settings, tokenizer and chat template "
            "[the base; the first of a pair whose base is implied].",
        ),
    ] = None,
    aim: Annotated[
        float | None,
        typer.Option("--aim", help="OMEGA: pull active channels back to the base (AIM; 1 = off, usual 0.4)."),
    ] = None,
    acm: Annotated[
        float | None,
        typer.Option("--acm", help="THETA: weaken layers whose activations agree (ACM; usual 0.7)."),
    ] = None,
    acm_estimator: Annotated[
        str, typer.Option("--acm-estimator", help="gaussian, binned, or literal (as the published script).")
    ] = "gaussian",
    sens: Annotated[
        float | None,
        typer.Option("--sens", help="TEMPERATURE: balance layers by sensitivity (Sens-Merging; usual 2)."),
    ] = None,
    fim: Annotated[
        bool, typer.Option("--fim", help="Layer strengths from Fisher information on random tokens; no data.")
    ] = False,
    delta_rank: Annotated[
        float | None,
        typer.Option(
            "--delta-rank", help="Share of the full rank each task vector keeps (Twin-Merging: 0.1)."
        ),
    ] = None,
    layer_scores: Annotated[
        str | None, typer.Option("--layer-scores", help="JSON file of factors by layer.")
    ] = None,
    calibration: c.Source = None,
    samples: c.Samples = 100,
    sequence_length: c.SequenceLength = 2048,
    pack: c.Pack = False,
    device: Annotated[
        str, typer.Option("--device", help="Where models run for calibration: auto, cpu, cuda, cuda:N.")
    ] = "auto",
    work_folder: Annotated[
        str | None,
        typer.Option(
            "--work", help="Keep measurements here and use them again [beside OUT until it is done]."
        ),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option("--sweep", help="NAME=START:STOP:STEP or NAME=A,B: several outputs from one read."),
    ] = None,
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
    config: o.ConfigFile = None,
    ignore_unlisted: o.IgnoreUnlisted = False,
    allow_nonfinite: o.AllowNonfinite = False,
    allow_pickle: o.AllowPickle = False,
    mergekit_quirks: Annotated[
        bool, typer.Option("--mergekit-quirks", help="Reproduce mergekit's oddities that affect numbers.")
    ] = False,
    strict: o.Strict = False,
    dequantize: o.Dequantize = False,
    offline: o.Offline = False,
    json_: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    no_progress: o.NoProgress = False,
) -> None:
    """Merge models into one, or run a mergekit YAML.

    Without --base, a method that needs one takes the LAST of exactly two models: the long
    model's trimmed delta goes onto the short one.
    """
    out = Output(json_, quiet, verbose, not no_progress)

    def work() -> dict[str, Any]:
        from surgeon import api

        span = _layers(layers)
        given = {
            "method": method, "base": base, "weight": o.numbers(weight, "--weight") or None,
            "density": o.numbers(density, "--density") or None, "lambda_": lambda_, "t": t, "normalize": normalize,
            "param": o.assignments(param, "--param") or None, "layers": span, "ignore": tuple(ignore or ()) or None,
            "dense": tuple(dense or ()) or None, "vocab": vocab, "tokenizer": tokenizer, "sweep": tuple(sweep or ()) or None,
            "dtype": dtype, "config": config, "text_from": text_from, "aim": aim, "acm": acm, "sens": sens,
            "fim": fim or None, "delta_rank": delta_rank, "layer_scores": layer_scores,
        }  # fmt: skip
        common = {
            "max_shard_size": o.byte_size(max_shard_size, "--max-shard-size"), "seed": seed, "weights": weights,
            "ignore_unlisted": ignore_unlisted, "allow_nonfinite": allow_nonfinite, "mergekit_quirks": mergekit_quirks,
            "strict": strict, "offline": offline, "dequantize": dequantize, "chat_template": chat_template, "allow_pickle": allow_pickle,
            "acm_estimator": acm_estimator, "calibration": tuple(calibration or ()) or None, "samples": samples,
            "sequence_length": sequence_length, "pack": pack, "device": device,
        }  # fmt: skip
        settings = Settings(
            output,
            overwrite,
            resume,
            dry_run,
            threads,
            o.byte_size(memory_limit, "--memory-limit"),
            work_folder,
        )
        if len(models) == 1 and models[0].endswith((".yml", ".yaml")):
            named = [f"--{k.rstrip('_').replace('_', '-')}" for k, v in given.items() if v is not None]
            if named:
                raise UsageError("E208", f"{', '.join(named)} cannot be combined with a YAML file",
                                 help="set it in the YAML, or name the models on the command line")  # fmt: skip
            return run_yaml(out, models[0], common, settings)
        if models[0].endswith((".yml", ".yaml")):
            raise UsageError("E208", "a YAML file stands alone; it names its models itself",
                             help=f"surgeon merge {models[0]} -o {models[1] if len(models) == 2 else 'OUT'}")  # fmt: skip
        if len(models) < 2 and base is None and method != "passthrough":
            raise UsageError("E205", f"a merge needs at least two models, {len(models)} given",
                             help="surgeon merge LONG SHORT --method ties -o OUT, or surgeon merge CONFIG.yml -o OUT")  # fmt: skip
        request = api.build_request(models=tuple(models), **given, **common)
        planned = api.plan_merge(request, title=_title(output))
        return finish(out, planned, settings, strict)

    raise typer.Exit(run_command(out, "merge", work))


@dataclass(frozen=True)
class Settings:
    """How a planned merge is to be run."""

    output: str | None
    overwrite: bool
    resume: bool
    dry_run: bool
    threads: int | None
    memory_limit: int | None
    work: str | None = None


def _layers(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    start, sign, stop = text.partition(":")
    try:
        return int(start), int(stop) if sign else int(start) + 1
    except ValueError:
        raise UsageError("E214", f'--layers is "{text}"', help="A:B, the upper end exclusive: 0:12") from None


def _title(output: str | None) -> str:
    return Path(output).name.removesuffix(".safetensors") if output else "merged"


def run_yaml(out: Output, file: str, common: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Run a mergekit YAML: one merge, or several documents that use each other's results."""
    from surgeon import api
    from surgeon.errors import Where
    from surgeon.recipe import mergekit_yaml, yaml

    specs, remarks = mergekit_yaml.parse(yaml.read_text(Path(file)), file)
    for remark in remarks:
        out.warning(remark)
    if remarks and common.get("strict"):
        raise UsageError("E220", f"--strict: {remarks[0].message}", where=remarks[0].where or Where(file),
                         help="change what the warning names, or leave out --strict")  # fmt: skip
    base_request = api.build_request(models=(), method="linear", **common)
    if len(specs) > 1:
        from surgeon.cli.multi import run_documents

        return run_documents(out, specs, base_request, settings)
    planned = api.plan_spec(specs[0], base_request, title=_title(settings.output))
    return finish(out, planned, settings, bool(common.get("strict")))


def finish(out: Output, planned: Any, settings: Settings, strict: bool) -> dict[str, Any]:
    """Print what was planned, then run it or stop at the dry run."""
    plan = planned.plan
    destination = Path(settings.output) if settings.output else planned.default_output
    for note in (*planned.notes, *plan.notes):
        out.note(note)
    for warning in plan.warnings:
        out.warning(warning)
    if strict and plan.warnings:
        raise UsageError("E220", f"--strict: {plan.warnings[0]}", help="change what the warning names, or leave out --strict")  # fmt: skip
    check = planned.check(
        destination, threads=settings.threads, memory_limit=settings.memory_limit,
        overwrite=settings.overwrite or _repeatable(destination, planned),
    )  # fmt: skip
    described = describe(plan, check)
    summary(out, plan, described)
    if settings.dry_run:
        out.line("nothing was written.")
        return rehearsed(planned, described, destination)
    with stop_on_signals(out) as (stop, _):
        if planned.needs:
            planned = measure(out, planned, destination, settings, stop)
            plan = planned.plan
            described |= {"id": plan.plan_id(), "measured": plan.recipe.get("measured")}
        bar = out.progress("merging")
        try:
            outcome = planned.run(
                destination, threads=check.threads, memory_limit=settings.memory_limit, overwrite=settings.overwrite,
                resume=settings.resume, progress=lambda _, done, total: bar(done, total), stop=stop,
            )  # fmt: skip
        finally:
            bar.close()
    return report(out, planned, described, outcome)


def measure(out: Output, planned: Any, destination: Path, settings: Settings, stop: Any) -> Any:
    """Measure what the adjustments need, with a progress line for each of them."""
    bar = out.progress("measuring", unit="")
    try:
        measured = planned.measure(
            destination, work=settings.work, threads=settings.threads, memory_limit=settings.memory_limit,
            progress=lambda title, done, total: bar(done, total, title), stop=stop,
        )  # fmt: skip
    finally:
        bar.close()
    for note in measured.plan.notes:
        if note not in planned.plan.notes:
            out.note(note)
    for warning in measured.plan.warnings:
        if warning not in planned.plan.warnings:
            out.warning(warning)
    return measured


def _repeatable(destination: Path, planned: Any) -> bool:
    """An existing result may be this very plan's: then the run ends at once; execute() decides.

    Where models are to be run first, what can be told from the recipe is told now, not after hours.
    """
    manifest = (
        destination / "surgeon.json"
        if destination.suffix != ".safetensors"
        else Path(f"{destination}.surgeon.json")
    )
    if not planned.needs or not manifest.exists():
        return manifest.exists()
    try:
        made = json.loads(manifest.read_bytes())["recipe"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    wanted = json.loads(json.dumps(planned.plan.recipe, default=str))
    return (
        isinstance(made, dict)
        and all(
            made.get(key) == wanted.get(key)
            for key in ("method", "parameters", "out_dtype", "seed", "layers", "ignore", "dense", "sweep")
        )
        and _strength(made) == _strength(wanted)
    )


def _strength(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the adjustments of a recipe without what may be spelled in several ways, paths."""
    adjust = recipe.get("adjust") or {}
    return {k: v for k, v in adjust.items() if k not in {"reference", "layer_scores"}}


def summary(out: Output, plan: Any, described: dict[str, Any]) -> None:
    if out.quiet:
        return
    shown = {k: v for k, v in described["parameters_of_method"].items() if not isinstance(v, (list, dict))}
    own = [s.get("parameters", {}) for m in plan.recipe["modules"] for p in m["slices"] for s in p["sources"]]
    for entry in own:
        for key, value in entry.items():
            shown.setdefault(key, value)
    for axis in sorted({name for point in plan.recipe.get("sweep", {}).values() for name in point}):
        values = dict.fromkeys(point[axis] for point in plan.recipe["sweep"].values())
        shown[axis] = ", ".join(f"{v:g}" for v in values)
    settings = "   ".join(
        f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items() if k != "int8_mask"
    )
    put_on = {k: v for k, v in (described["adjust"] or {}).items() if k not in shown}
    settings += "".join(
        f"   {k}" if v is True else f"   {k} {v:g}" if isinstance(v, float) else f"   {k} {v}"
        for k, v in put_on.items()
    )
    several = f"{len(plan.models)} outputs" if len(plan.models) > 1 else "1"
    out.line(
        f"plan   {described['method'].replace('_', '-')}   {settings}   {len(plan.inputs)} models -> {several}"
    )
    out.line(f"  {described['tensors']} tensors   {described['merged']} merged   {described['copied']} copied   "
             f"{number(described['parameters'])} parameters")  # fmt: skip
    kinds = ", ".join(sorted(described["dtype_bytes"]))
    out.line(
        f"  output {size(described['bytes'])} {kinds}   free disk {size(described['disk_free_bytes'])}   "
        f"peak memory about {size(described['memory_estimate_bytes'])} (limit {size(described['memory_limit_bytes'])})"
    )


def report(out: Output, planned: Any, described: dict[str, Any], outcome: Any) -> dict[str, Any]:
    """Print the result and return the JSON document's body."""
    from surgeon.kernels import fused
    from surgeon.system import peak_memory

    peak = peak_memory()
    if fused.problem():
        out.note(
            f"compiled kernels cannot be used here ({fused.problem()}); NumPy gave the same bits, slower"
        )
    update = effective_update(outcome.summaries)
    if out.quiet:
        pass
    elif outcome.unchanged:
        out.line(f"unchanged {outcome.path}: it already holds this result, verified")
    else:
        bodies = list(outcome.manifests.values())
        files = sum(len(b["files"]) for b in bodies)
        tensors = sum(b["output"]["tensors"] for b in bodies)
        out.line(f"verified  {tensors} tensors, {files} files, sha256 recorded in surgeon.json")
        resumed = (
            f"   {outcome.resumed_items} tensors from the interrupted run" if outcome.resumed_items else ""
        )
        out.line(
            f"merged    {size(described['bytes'])} in {outcome.seconds:.1f} s   peak memory {size(peak or 0)}{resumed}"
        )
        if update:
            out.line(update["text"])
            for text in update["warnings"]:
                out.warning(text)
    for path in outcome.models.values():
        out.line(f"wrote     {path}")
    if not out.quiet and not outcome.unchanged:
        first = next(
            iter(outcome.models.values()), outcome.path
        )  # of a sweep: each point is a model of its own
        out.log(f"A merged model must be evaluated before use; check it first: surgeon verify {plain(first)} --generate"
                if outcome.path.is_dir() else
                f"A merged model must be evaluated before use; compare it first: surgeon diff {plain(outcome.path)} MODEL --values")  # fmt: skip
    return written(planned, described, outcome)
