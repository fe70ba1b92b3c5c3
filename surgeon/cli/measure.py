"""``surgeon measure``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from surgeon.cli import options as o
from surgeon.cli.errors import run_command, stop_on_signals
from surgeon.cli.output import Output, number, plain, size


def measure(
    model: o.Model,
    baseline: Annotated[
        str | None,
        typer.Option(
            "--baseline", metavar="MODEL", help="Time both in turns: how many times as fast is MODEL?"
        ),
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(
            "--mode",
            help="mix, prefill, decode, table (what each size costs) or memory [mix; prefill for encoders].",
        ),
    ] = None,
    workload: Annotated[
        str | None,
        typer.Option(
            "--workload", help="What a table or memory is about: mix, prefill or decode [as --mode]."
        ),
    ] = None,
    batch: Annotated[int | None, typer.Option("--batch", min=1, help="Sequences at once [1].")] = None,
    context: Annotated[
        int | None, typer.Option("--context", min=1, help="Tokens of the prompt [512].")
    ] = None,
    generate: Annotated[
        int | None, typer.Option("--generate", min=1, help="Tokens of the reply [128].")
    ] = None,
    heads: Annotated[
        str | None,
        typer.Option("--heads", help="Table: how heads go, groups (whole KV groups) or heads [groups]."),
    ] = None,
    round_to: Annotated[
        int | None, typer.Option("--round-to", min=1, help="Table: FFN widths are multiples of this [1].")
    ] = None,
    repeat: Annotated[
        int | None, typer.Option("--repeat", min=3, help="Exactly so many rounds [until --precision].")
    ] = None,
    precision: Annotated[
        float | None, typer.Option("--precision", help="Wanted half-width of the 95 % interval [0.01].")
    ] = None,
    time_limit: Annotated[
        float | None, typer.Option("--time-limit", help="Seconds for each model that is timed [60].")
    ] = None,
    attention: Annotated[
        str | None,
        typer.Option("--attention", help="Attention implementation: sdpa, eager, ... [the family's]."),
    ] = None,
    device: o.Device = "auto",
    dtype: Annotated[
        str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16 [auto: as stored].")
    ] = "auto",
    threads: o.Threads = None,
    memory_limit: o.MemoryLimit = None,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="FILE.json", help="Write the table, or the result."),
    ] = None,
    overwrite: o.OverwriteFile = False,
    seed: Annotated[int, typer.Option("--seed", help="Seed of token ids, order and intervals.")] = 0,
    offline: o.Offline = False,
    json_: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    no_progress: o.NoProgress = False,
) -> None:
    """Time a model or compare two, measure a latency table for pruning, or peak memory."""
    out = Output(json_, quiet, verbose, not no_progress)

    def work() -> dict[str, Any]:
        from surgeon.measure import run

        request = run.build(
            model=model, baseline=baseline, mode=mode, workload=workload, batch=batch, context=context, generate=generate,
            heads=heads, round_to=round_to, repeat=repeat, precision=precision, time_limit=time_limit, threads=threads,
            device=device, dtype=dtype, attention=attention, memory_limit=o.byte_size(memory_limit, "--memory-limit"),
            output=output, overwrite=overwrite, seed=seed, offline=offline,
        )  # fmt: skip
        bar = out.progress("measuring", "")
        with stop_on_signals(out) as (stop, _):
            try:
                document = run.measure(request, lambda title, done, total: bar(done, total, title), stop)
            finally:
                bar.close()
        run.save(document, request)
        for note in document["notes"]:
            out.note(note)
        if not out.quiet:
            show(out, document)
        for warning in document["warnings"]:
            out.warning(warning)
        if output is not None:
            out.line(f"wrote     {output}")
        return document

    raise typer.Exit(run_command(out, "measure", work))


def show(out: Output, document: dict[str, Any]) -> None:
    """Print the result as a table; the workload and the environment stand with every figure."""
    model = document["model"]
    out.line(f"{plain(model['name'])}   {number(model['parameters'])} parameters   {size(model['bytes'])}")
    out.line(f"  {document['workload']['sentence']}")
    out.line(f"  {plain(document['environment']['sentence'])}")
    if "table" in document:
        _table(out, document["table"], document["metrics"]["shares"])
    elif "memory" in document["metrics"]:
        _memory(out, document["metrics"])
    elif "comparison" in document:
        _comparison(out, document)
    else:
        _speed(out, document)


def _speed(out: Output, document: dict[str, Any]) -> None:
    metrics, workload = document["metrics"], document["workload"]
    rows: list[list[object]] = []
    for name, title, tokens in (
        ("prefill", "prefill", workload["batch"] * workload["context"]),
        ("decode", "decode, a token", workload["batch"]),
    ):
        seconds = metrics.get(f"{name}_seconds")
        if seconds is not None:
            rows.append([title, _ms(seconds["value"]), _spread(seconds), f"{tokens / seconds['value']:,.0f}"])
    rows.append(["whole workload", _ms(metrics["seconds"]["value"]), _spread(metrics["seconds"]), ""])
    out.table(["", "ms", "95 %", "tokens/s"], rows)


def _comparison(out: Output, document: dict[str, Any]) -> None:
    found, ratio = document["comparison"], document["metrics"]["speedup"]
    out.line(f"  against {plain(document['baseline']['name'])}, {found['pairs']} pairs in random order")
    rows: list[list[object]] = []
    for name, title in (("prefill", "prefill"), ("decode", "decode, a token")):
        part = found["parts"].get(name)
        if part is not None:
            rows.append([title, _ms(part["dense_seconds"]), _ms(part["pruned_seconds"])])
    rows.append(["whole workload", _ms(found["dense_seconds"]), _ms(found["pruned_seconds"])])
    out.table(["", "baseline ms", "ms"], rows)
    out.line(f"speedup   {ratio['value']:.3f}   95 % interval {ratio['low']:.3f} to {ratio['high']:.3f}")


def _table(out: Output, table: dict[str, Any], shares: dict[str, float]) -> None:
    seconds = table["seconds"]
    rows: list[list[object]] = []
    for entry in seconds["attention"]:
        name = f"attention {entry['heads']}/{entry['groups']}"
        rows.append([name, _ms(entry["seconds"]), f"±{1000 * entry['spread']:.3g}"])
    for entry in seconds["ffn"]:
        rows.append([f"ffn {entry['width']:,}", _ms(entry["seconds"]), f"±{1000 * entry['spread']:.3g}"])
    rows.append(["rest of the model", _ms(seconds["rest"]), ""])
    rows.append([f"whole model, {table['layers']} layers", _ms(seconds["dense"]), ""])
    out.table(["one layer", "ms", "95 %"], rows)
    out.line("shares    " + "   ".join(f"{name} {share:.0%}" for name, share in shares.items()))


def _memory(out: Output, metrics: dict[str, Any]) -> None:
    peaks, before = metrics["memory"], metrics.get("baseline_memory")
    rows: list[list[object]] = []
    for key, title in (("weights", "weights"), ("libraries", "peak before loading"), ("load", "peak after loading"),
                       ("prefill", "peak after prefill"), ("decode", "peak after decode"), ("device", "peak on the GPU")):  # fmt: skip
        if peaks[key] is not None:
            rows.append(
                [
                    title,
                    size(peaks[key]),
                    *([size(before[key])] if before and before[key] is not None else []),
                ]
            )
    out.table(["", "memory", *(["baseline"] if before else [])], rows)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.4g}"


def _spread(estimate: dict[str, float]) -> str:
    return f"±{50 * (estimate['high'] - estimate['low']) / estimate['value']:.1f} %"
