"""``surgeon quantize``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from surgeon.cli import calibration as c
from surgeon.cli import options as o
from surgeon.cli.errors import run_command, stop_on_signals
from surgeon.cli.eval import Stages
from surgeon.cli.output import Output, number, plain, size
from surgeon.errors import UsageError


def quantize(
    model: o.ModelOrHere = ".",
    scheme: Annotated[
        list[str] | None,
        typer.Option(
            "--scheme",
            help="W4A16, W8A16, W3A16, ..., FP8, NVFP4, MXFP4, NF4, FP4, INT8, Q4_0 ...; PATTERN=SCHEME for the matrices a "
            "name, glob or re:REGEX fits (none leaves them); repeat; the first pattern that fits counts [W4A16, NF4 or Q4_0].",
        ),
    ] = None,
    target_bits: Annotated[
        float | None,
        typer.Option("--target-bits", help="Average bits of all linear matrices, scales included: 4.25."),
    ] = None,
    target_size: Annotated[
        str | None, typer.Option("--target-size", help="Bytes of the weight files, exactly: 5GB.")
    ] = None,
    target_kl: Annotated[
        float | None, typer.Option("--target-kl", help="Divergence from the source, nats a token, measured.")
    ] = None,
    plan: Annotated[
        str | None, typer.Option("--plan", help="Assign as an earlier result did: its plan.json or folder.")
    ] = None,
    bits: Annotated[
        str | None, typer.Option("--bits", help="Widths a target chooses from [2,3,4,8, as far as stored].")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option("--method", help="rtn, gptq, awq, awq-gptq [gptq under 8 bits, else rtn]."),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option("--group-size", help="Inputs that share a scale; -1 is a row [128, or what divides]."),
    ] = None,
    symmetric: Annotated[
        bool, typer.Option("--symmetric/--asymmetric", help="Whether zero lies in the middle of the codes.")
    ] = True,
    format_: Annotated[
        str, typer.Option("--format", help="compressed-tensors, auto-round, bitsandbytes or gguf.")
    ] = "compressed-tensors",
    runtime: Annotated[
        str, typer.Option("--runtime", help="transformers or vllm: whose limits count.")
    ] = "transformers",
    tensor_parallel: Annotated[
        int, typer.Option("--tensor-parallel", min=1, help="Devices vLLM will divide the model over.")
    ] = 1,
    double_quant: Annotated[
        bool, typer.Option("--double-quant", help="bitsandbytes: quantize the scales of four bits, too.")
    ] = False,
    ignore: Annotated[
        list[str] | None,
        typer.Option("--ignore", help="Matrices that stay: name, glob or re:REGEX; repeat [lm_head]."),
    ] = None,
    sensitivity: Annotated[
        str,
        typer.Option(
            "--sensitivity",
            help="Of targets: fisher, rel-output, kl or weight [fisher where it can be run, else rel-output].",
        ),
    ] = "auto",
    sensitivities: Annotated[
        str | None,
        typer.Option("--sensitivities", help="Losses by matrix and scheme: written there, or read."),
    ] = None,
    allocation: Annotated[
        str,
        typer.Option(
            "--allocation", help="optimal, or pmq: widths of experts by how much they are used (MC-MoE)."
        ),
    ] = "optimal",
    granularity: Annotated[
        str,
        typer.Option(
            "--granularity", help="pmq, --drop-experts: what shares a width: expert, layer or projection."
        ),
    ] = "expert",
    scope: Annotated[
        str, typer.Option("--scope", help="pmq: the average holds in every layer, or over the model.")
    ] = "layer",
    must_appear: Annotated[
        str | None, typer.Option("--must-appear", help="pmq: widths that every layer must have: 3,2.")
    ] = None,
    drop_experts: Annotated[
        bool,
        typer.Option(
            "--drop-experts", help="With --target-size: drop experts, too, where that costs less than bits."
        ),
    ] = False,
    order: Annotated[
        str, typer.Option("--order", help="gptq: static-act, group-aware or none.")
    ] = "static-act",
    damp: Annotated[
        float, typer.Option("--damp", help="gptq: damping, of the mean diagonal of second moments.")
    ] = 0.01,
    clip: Annotated[
        bool | None,
        typer.Option(
            "--clip/--no-clip", help="Search the range of each group [rounding: up to 3 bits; gptq: no]."
        ),
    ] = None,
    true_sequential: Annotated[
        bool | None,
        typer.Option(
            "--true-sequential/--layer-sequential",
            help="gptq: look at a layer's inputs anew after each step [up to 3 bits].",
        ),
    ] = None,
    target_shift: Annotated[
        bool,
        typer.Option("--target-shift", help="gptq: make up for layers before, too; a second pass beside."),
    ] = False,
    calibration: c.Source = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Calibration samples.")] = 128,
    sequence_length: Annotated[
        int, typer.Option("--sequence-length", min=2, help="Tokens of a sample at most.")
    ] = 2048,
    calibration_dtype: c.Precision = "float32",
    output: o.OutputPath = None,
    overwrite: o.Overwrite = False,
    resume: o.Resume = True,
    dry_run: o.DryRun = False,
    dtype: o.DType = None,
    max_shard_size: o.ShardSize = "5GB",
    device: o.Device = "auto",
    threads: o.Threads = None,
    memory_limit: o.MemoryLimit = None,
    seed: o.Seed = 0,
    work_folder: Annotated[
        str | None, typer.Option("--work", help="Keep layers and sensitivities here [OUT.work until done].")
    ] = None,
    dequantize: Annotated[
        bool,
        typer.Option("--dequantize", help="Quantize a quantized model anew, from the numbers it stands for."),
    ] = False,
    offline: o.Offline = False,
    json_: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    no_progress: o.NoProgress = False,
) -> None:
    """Quantize a model to schemes, a size, bits per weight, or a divergence.

    surgeon quantize ./model --target-size 5GB chooses a width for every matrix; ./model --scheme W4A16 takes one.
    The result is loaded by its real reader and compared before it is published.
    """
    out = Output(json_, quiet, verbose, not no_progress)

    def work() -> dict[str, Any]:
        from surgeon import api

        options: dict[str, Any] = dict(
            scheme=tuple(scheme or ()), target_bits=target_bits,
            target_size=o.byte_size(target_size, "--target-size"), target_kl=target_kl, plan=plan,
            bits=_widths(bits), method=method, group_size=group_size, symmetric=symmetric, format=format_,
            runtime=runtime, tensor_parallel=tensor_parallel, double_quant=double_quant,
            ignore=None if ignore is None else tuple(ignore), sensitivity=sensitivity,
            sensitivities=sensitivities, allocation=allocation, granularity=granularity, scope=scope,
            must_appear=_widths(must_appear), drop_experts=drop_experts, order=order, damp=damp, clip=clip, true_sequential=true_sequential,
            target_shift=target_shift, calibration=tuple(calibration or ()), samples=samples,
            sequence_length=sequence_length, calibration_dtype=calibration_dtype, dtype=dtype,
            max_shard_size=o.byte_size(max_shard_size, "--max-shard-size"), device=device, threads=threads,
            memory_limit=o.byte_size(memory_limit, "--memory-limit"), seed=seed, work=work_folder,
            dequantize=dequantize, offline=offline,
        )  # fmt: skip
        bar = Stages(out)
        with stop_on_signals(out) as (stop, _):
            try:
                document = api.quantize(
                    model, output, overwrite=overwrite, resume=resume, dry_run=dry_run, progress=bar.tell,
                    say=out.note, stop=stop, **options
                )  # fmt: skip
            finally:
                bar.close()
        show(out, document)
        return document

    raise typer.Exit(run_command(out, "quantize", work))


def _widths(text: str | None) -> tuple[int, ...]:
    """Parse a comma list of widths."""
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise UsageError("E209", f'widths are "{text}"', help="widths from 2 to 8, such as 2,3,4,8") from None


def show(out: Output, document: dict[str, Any]) -> None:
    """Print what came out: sizes, schemes, quality, what the reader said."""
    for warning in document["warnings"]:
        out.warning(warning)
    if out.quiet:
        return
    source, output = document["model"], document["output"]
    out.line(f"{plain(source['name'])}   {number(source['parameters'])} parameters   {size(source['bytes'])}")
    if output.get("unchanged"):
        out.line(f"unchanged {output['path']}: it already holds this result, verified")
        out.note("--overwrite --no-resume quantizes again")
        return
    if document["status"] == "dry-run":
        _plan(out, document)
        return
    out.line(
        f"{plain(document['format'])}   {plain(document['method'])}   {size(output['bytes'])}   "
        f"{output['bits']:.3f} bits per weight of linear matrices"
    )
    _schemes(out, document)
    _quality(out, document)
    _reading(out, document["reading"])
    for remark in document["remarks"]:
        out.line(f"  {plain(remark)}")
    out.line(f"wrote     {output['path']}")
    out.log(
        f"A quantized model must be evaluated before use; check it first: surgeon verify {plain(output['path'])} --generate"
    )


def _schemes(out: Output, document: dict[str, Any]) -> None:
    for row in document["schemes"]:
        out.line(f"  {plain(row['scheme']):<10} {row['matrices']:>6,} matrices   {number(row['parameters'])} parameters   "
                 f"{row['bits']:.3f} bits   {size(row['bytes'])}")  # fmt: skip


def _quality(out: Output, document: dict[str, Any]) -> None:
    quality, loss = document["quality"], document["loss"]
    if loss["predicted"] is not None:
        again = "" if loss["remeasured"] is None else f"   re-measured {loss['remeasured']:.4g}"
        out.line(
            f"  loss      predicted {loss['predicted']:.4g} ({document['allocation']['sensitivity']}){again}"
        )
    if not quality:
        return
    shown = []
    if quality.get("perplexity"):
        before, after = quality["perplexity"]
        shown.append(f"perplexity {before:.4g} -> {after:.4g}")
    for name, text in (
        ("kl", "KL {:.4g} nats a token"),
        ("top1", "top-1 agreement {:.1%}"),
        ("cosine", "cosine of embeddings {:.5f}"),
    ):
        if quality.get(name) is not None:
            shown.append(text.format(quality[name]))
    out.line(f"  held-out  {'   '.join(shown)}   ({quality['tokens']:,} tokens)")


def _reading(out: Output, reading: dict[str, Any]) -> None:
    """Say what the real reader made of the result."""
    if reading.get("reader") == "llama.cpp" and "kl" in reading:
        out.line(f"  loaded    by llama.cpp: KL {reading['kl']:.1e} from what is meant on {reading['prompts']} prompts, token ids of "
                 f"{reading['texts']} texts are equal")  # fmt: skip
    if "relative difference" not in reading:
        return
    version = reading["versions"].get("transformers", "")
    out.line(f"  loaded    by {plain(reading['reader'])} {plain(version)}: {reading['modules']:,} quantized modules, logits "
             f"{reading['relative difference']:.1e} from what is meant ({reading['as run']:.1e} as its kernels run), "
             f"{reading['generated']} tokens generated")  # fmt: skip


def _plan(out: Output, document: dict[str, Any]) -> None:
    """Print what a run would do."""
    needs, output = document["needs"], document["output"]
    target = document["target"]
    what = "   ".join(f"target {name} {value:,.12g}" for name, value in (target or {}).items())
    out.line(
        f"plan      {plain(document['format'])} for {plain(document['runtime'])}   {plain(document['method'])}   {what}"
    )
    _schemes(out, document)
    if "bytes" in output:
        out.line(
            f"  weight files {output['bytes']:,} bytes   {output['bits']:.3f} bits per weight of linear matrices"
        )
    elif document.get("menu"):
        out.line(f"  to choose from: {', '.join(map(plain, document['menu']))}, or as it is")
    out.line(
        f"  results at most {size(needs['results'])}   work at most {size(needs['work'])}   free disk {size(needs['results_free'])}"
    )
    if document.get("calibration"):
        text = document["calibration"]
        out.line(
            f"  text: {text['statistics']['tokens']:,} tokens for statistics, {text['held_out']['tokens']:,} held out"
        )
    out.line(f"  to        {output.get('path', '')}")
    out.line("nothing was written.")
