"""``surgeon export``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from surgeon.cli import options as o
from surgeon.cli.errors import run_command, stop_on_signals
from surgeon.cli.eval import Stages
from surgeon.cli.output import Output, number, plain, size


def export(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Folder, file or hub id; MODEL+ADAPTER folds one in."),
    ],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="safetensors (a clean folder), gguf (one file for llama.cpp), decilm (a folder for vLLM and TensorRT-LLM).",
        ),
    ] = "safetensors",
    member: Annotated[
        str | None,
        typer.Option("--member", help="One model out of a nested family, as its members.json names it."),
    ] = None,
    gguf_type: Annotated[
        str | None,
        typer.Option(
            "--gguf-type",
            help="gguf: quantize all linear matrices, without data: q8_0, q5_0, q5_1, q4_0, q4_1, mxfp4, q6_k, q5_k, q4_k, q3_k, q2_k, iq4_xs, iq4_nl.",
        ),
    ] = None,
    gguf_override: Annotated[
        list[str] | None,
        typer.Option(
            "--gguf-override",
            metavar="PATTERN=TYPE",
            help="gguf: another type, or keep, for the tensors a name, glob or re:REGEX matches; repeatable.",
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check/--no-check", help="gguf: compare token ids and probabilities with transformers."
        ),
    ] = True,
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", help="Folder, or file ending in .gguf or .safetensors [beside MODEL]."
        ),
    ] = None,
    overwrite: o.Overwrite = False,
    resume: o.Resume = True,
    dry_run: o.DryRun = False,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="float32, float16 or bfloat16 for written floats [as stored]."),
    ] = None,
    max_shard_size: o.ShardSize = "5GB",
    threads: o.Threads = None,
    memory_limit: o.MemoryLimit = None,
    weights: o.Weights = "auto",
    ignore_unlisted: o.IgnoreUnlisted = False,
    allow_nonfinite: o.AllowNonfinite = False,
    allow_pickle: o.AllowPickle = False,
    dequantize: o.Dequantize = False,
    offline: o.Offline = False,
    json_: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    no_progress: o.NoProgress = False,
) -> None:
    """Write a model in another form, or take one member out of a nested family.

    surgeon export MODEL --to gguf --gguf-type q8_0; surgeon export FAMILY --member speedup=1.5; surgeon export OLD --allow-pickle.
    """
    out = Output(json_, quiet, verbose, not no_progress)

    def work() -> dict[str, Any]:
        from surgeon import api

        options: dict[str, Any] = dict(
            to=to, member=member, gguf_type=gguf_type, gguf_override=tuple(gguf_override or ()), check=check, dtype=dtype,
            max_shard_size=o.byte_size(max_shard_size, "--max-shard-size"), weights=weights, ignore_unlisted=ignore_unlisted,
            allow_nonfinite=allow_nonfinite, allow_pickle=allow_pickle, dequantize=dequantize, offline=offline,
        )  # fmt: skip
        bar = Stages(out)
        with stop_on_signals(out) as (stop, _):
            try:
                document = api.export(
                    model, output, overwrite=overwrite, resume=resume, dry_run=dry_run, threads=threads,
                    memory_limit=o.byte_size(memory_limit, "--memory-limit"), progress=bar.tell, stop=stop, **options,
                )  # fmt: skip
            finally:
                bar.close()
        show(out, document)
        return document

    raise typer.Exit(run_command(out, "export", work))


def show(out: Output, document: dict[str, Any]) -> None:
    """Print what was written and who reads it."""
    for warning in document["warnings"]:
        out.warning(warning)
    for note in document["notes"]:
        out.note(note)
    if out.quiet:
        return
    source, made = document["model"], document["output"]
    kinds = ", ".join(sorted(made["dtype_bytes"])) if "dtype_bytes" in made else made["dtype"]
    what = f"member {document['member']}" if document["member"] else document["to"]
    out.line(
        f"{plain(source['name'])}   {number(source['parameters'])} parameters   {size(source['bytes'])}   -> {plain(what)}   "
        f"{number(made['parameters'])} parameters   {size(made['bytes'])} {kinds}"
    )
    if document.get("architecture"):
        types = ", ".join(f"{count} {kind}" for kind, count in document["types"].items())
        out.line(f"  llama.cpp architecture {document['architecture']}; tensors {types}")
    if document["readers"]:
        out.line(f"  loads in  {', '.join(document['readers'])}")
    if document["status"] == "dry-run":
        out.line(f"plan      {made['path']}")
        out.line("nothing was written.")
        return
    checked = document.get("check")
    if checked and "kl" in checked:
        out.line(
            f"  compared  {checked['texts']} texts give the same tokens; after {checked['prompts']} prompts log-probabilities differ "
            f"by at most {checked['largest_difference']:.1e}, {checked['same_first_choice']} of {checked['prompts']} first choices are equal"
        )
    if made["unchanged"]:
        out.line(f"unchanged {made['path']}: it already holds this result, verified")
    else:
        out.line(f"wrote     {made['path']}")
