"""``surgeon prune``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from surgeon.cli import calibration as c
from surgeon.cli import options as o
from surgeon.cli.errors import run_command, stop_on_signals
from surgeon.cli.eval import Stages
from surgeon.cli.output import Output, number, plain, size
from surgeon.errors import UsageError


def prune(
    model: o.ModelOrHere = ".",
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            help="ziplm, width, depth, lapp; of single weights: sparsegpt, wanda, magnitude; of experts: reap, easy-ep, "
            "heapr, frequency, stun, ... [ziplm; mixtures of experts: reap]. All: surgeon methods prune.",
        ),
    ] = None,
    criterion: Annotated[
        str | None,
        typer.Option(
            "--criterion",
            help="width: flap, minitron, wanda, magnitude, random, ziplm; depth: nmse, block-influence, uniform; "
            "heapr: heapr, heapr-all, joint, joint-all, magnitude, random.",
        ),
    ] = None,
    target_speedup: Annotated[
        list[str] | None,
        typer.Option("--target-speedup", help="1.5: measured; repeat or comma list for a family."),
    ] = None,
    target_params: Annotated[
        list[str] | None, typer.Option("--target-params", help="Parameters left: 3B, 500M.")
    ] = None,
    target_size: Annotated[
        list[str] | None, typer.Option("--target-size", help="Bytes of weights left: 6GB.")
    ] = None,
    sparsity: Annotated[
        list[str] | None,
        typer.Option("--sparsity", help="Fraction removed; of what, depends on the method: see docs."),
    ] = None,
    keep_layers: Annotated[
        list[str] | None, typer.Option("--keep-layers", help="Layers left (--method depth).")
    ] = None,
    keep_experts: Annotated[
        list[str] | None,
        typer.Option(
            "--keep-experts", help="Experts left in every layer: 64 is a count, 0.5 or 50% a fraction."
        ),
    ] = None,
    pattern: Annotated[
        str | None, typer.Option("--pattern", help="N:M, at least N zeros in each M inputs: 2:4.")
    ] = None,
    structures: Annotated[
        str | None,
        typer.Option("--structures", help="Comma list of heads, ffn, layers, hidden [by method and family]."),
    ] = None,
    layout: Annotated[
        str,
        typer.Option(
            "--layout",
            help="uniform loads everywhere; per-layer is better at equal speed, and needs our model code or GGUF; "
            "heapr: also padded (experts of different widths, zeros beside), ragged (evaluated, not written).",
        ),
    ] = "uniform",
    round_to: Annotated[
        str, typer.Option("--round-to", help="Kept channels are a multiple of this [auto: 128, 32 or 8].")
    ] = "auto",
    protect_layers: Annotated[
        str | None, typer.Option("--protect-layers", help="Comma list of layers left as they are.")
    ] = None,
    scores: Annotated[
        str | None,
        typer.Option(
            "--scores",
            help="Routing statistics: written there, or read so that the model is not run for them.",
        ),
    ] = None,
    protect: Annotated[
        list[str] | None, typer.Option("--protect", help="LAYER:EXPERT,... that stay, beside super experts.")
    ] = None,
    no_protect: Annotated[
        bool,
        typer.Option("--no-protect", help="Let super experts go like others: models collapse without them."),
    ] = False,
    mix: Annotated[
        str,
        typer.Option(
            "--mix",
            help="Scores over domains: mean, max where none may be sacrificed, or pool [means over tokens pool, sums take the mean].",
        ),
    ] = "auto",
    domain_weight: Annotated[
        list[str] | None, typer.Option("--domain-weight", help="NAME=WEIGHT of a domain in the mean.")
    ] = None,
    scope: Annotated[
        str, typer.Option("--scope", help="heapr: compare channels global, per-layer or per-expert.")
    ] = "global",
    router: Annotated[
        str | None,
        typer.Option(
            "--router",
            help="stun, hc-smoe, m-smoe: the router row of a cluster: representative, average, or mass where the router has "
            "a bias [stun: average where weights are averaged].",
        ),
    ] = None,
    mtp: Annotated[
        str, typer.Option("--mtp", help="Experts of multi-token-prediction layers: copy-last, drop or error.")
    ] = "copy-last",
    expert_record: o.ExpertRecord = None,
    from_report: Annotated[
        str | None,
        typer.Option("--from-report", help="Cut as an earlier result did: its pruning.json or folder."),
    ] = None,
    search: Annotated[
        str, typer.Option("--search", help="spdy (true loss), or dp (prior errors alone).")
    ] = "spdy",
    search_budget: Annotated[
        float, typer.Option("--search-budget", help="Minutes the search may take.")
    ] = 10.0,
    sequential: Annotated[
        bool,
        typer.Option("--sequential", help="Solve weights again on the pruned prefix: better, one more pass."),
    ] = False,
    damp: Annotated[
        float, typer.Option("--damp", help="Damping of second moments, of their mean diagonal.")
    ] = 1e-2,
    allow_norm_approx: Annotated[
        bool,
        typer.Option("--allow-norm-approx", help="Cut heads under norms over all heads; the result differs."),
    ] = False,
    owl: Annotated[
        bool, typer.Option("--owl", help="Sparsity by layer from outliers (sparsegpt, wanda).")
    ] = False,
    mode: Annotated[
        str | None,
        typer.Option(
            "--mode", help="What is timed: mix, prefill or decode [decoders mix, encoders prefill]."
        ),
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences at once.")] = 1,
    context: Annotated[int, typer.Option("--context", min=1, help="Tokens of the prompt.")] = 512,
    generate: Annotated[int, typer.Option("--generate", min=1, help="Tokens generated.")] = 128,
    tolerance: Annotated[
        float, typer.Option("--tolerance", help="Allowed deviation from the target speedup.")
    ] = 0.03,
    latency_table: Annotated[
        str | None,
        typer.Option("--latency-table", help='Table of "surgeon measure --mode table" [measured now].'),
    ] = None,
    table_anyway: Annotated[
        bool, typer.Option("--table-anyway", help="Use a table of another machine or library version.")
    ] = False,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Time the finished model against the source.")
    ] = True,
    calibration: c.Source = None,
    samples: Annotated[
        int | None, typer.Option("--samples", min=1, help="Calibration samples [128; easy-ep: 25].")
    ] = None,
    sequence_length: Annotated[
        int | None,
        typer.Option("--sequence-length", min=2, help="Tokens of a sample at most [2048; easy-ep: 16384]."),
    ] = None,
    calibration_dtype: c.Precision = "float32",
    distill: Annotated[
        bool, typer.Option("--distill", help="Train each member on the source's outputs (gradual pruning).")
    ] = False,
    distill_steps: Annotated[int, typer.Option("--distill-steps", min=1, help="Steps a member.")] = 1000,
    distill_batch: Annotated[int, typer.Option("--distill-batch", min=1, help="Sequences a step.")] = 8,
    distill_length: Annotated[int, typer.Option("--distill-length", min=2, help="Tokens a sequence.")] = 512,
    learning_rate: Annotated[float, typer.Option("--learning-rate", help="Peak learning rate.")] = 8e-5,
    train: Annotated[
        str, typer.Option("--train", help="lapp: train thresholds only, or the full model.")
    ] = "thresholds",
    bypass_rank: Annotated[
        int, typer.Option("--bypass-rank", min=0, help="lapp: rank of the bypass beside each FFN.")
    ] = 0,
    nested: Annotated[
        bool,
        typer.Option("--nested", help="One model that holds all members: extract with export --member."),
    ] = False,
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
        str | None,
        typer.Option("--work", help="Keep rankings, second moments and tables here [OUT.work until done]."),
    ] = None,
    dequantize: o.Dequantize = False,
    offline: o.Offline = False,
    json_: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    no_progress: o.NoProgress = False,
) -> None:
    """Prune a model to a measured speedup, a size, or a share.

    Inside a model folder: surgeon prune --target-speedup 1.5. Several targets make a family from one
    calibration run.
    """
    out = Output(json_, quiet, verbose, not no_progress)

    def work() -> dict[str, Any]:
        from surgeon import api

        settings = {
            "method": method, "criterion": criterion,
            "target_speedup": o.numbers(target_speedup, "--target-speedup"),
            "target_params": _counts(target_params, "--target-params"),
            "target_size": _sizes(target_size, "--target-size"), "sparsity": o.numbers(sparsity, "--sparsity"),
            "keep_layers": _whole(keep_layers, "--keep-layers"), "pattern": pattern,
            "structures": tuple(_names(structures, "--structures")) if structures else None, "layout": layout,
            "round_to": round_to if round_to == "auto" else _whole([round_to], "--round-to")[0],
            "protect_layers": _whole([protect_layers] if protect_layers else None, "--protect-layers"),
            "search": search, "search_budget": search_budget, "sequential": sequential, "damp": damp,
            "allow_norm_approx": allow_norm_approx, "owl": owl, "mode": mode, "batch": batch, "context": context,
            "generate": generate, "tolerance": tolerance, "latency_table": latency_table, "table_anyway": table_anyway,
            "measure": measure, "calibration": tuple(calibration or ()), "samples": samples,
            "sequence_length": sequence_length, "calibration_dtype": calibration_dtype, "distill": distill,
            "distill_steps": distill_steps, "distill_batch": distill_batch, "distill_length": distill_length,
            "learning_rate": learning_rate, "train": train, "bypass_rank": bypass_rank, "nested": nested, "dtype": dtype,
            "max_shard_size": o.byte_size(max_shard_size, "--max-shard-size"), "device": device, "threads": threads,
            "memory_limit": o.byte_size(memory_limit, "--memory-limit"), "seed": seed, "offline": offline, "dequantize": dequantize,
            "work": work_folder, "keep_experts": tuple(part for text in keep_experts or () for part in text.split(",")),
            "scores": scores, "protect": tuple(protect or ()), "no_protect": no_protect, "mix": mix,
            "domain_weight": tuple(domain_weight or ()), "scope": scope, "router": router, "mtp": mtp,
            "expert_record": expert_record, "from_report": from_report,
        }  # fmt: skip
        bar = Stages(out)
        with stop_on_signals(out) as (stop, _):
            try:
                document = api.prune(
                    model, output, overwrite=overwrite, resume=resume, dry_run=dry_run, progress=bar.tell,
                    say=out.note, stop=stop, **_given(settings),
                )  # fmt: skip
            finally:
                bar.close()
        show(out, document)
        return document

    raise typer.Exit(run_command(out, "prune", work))


def _given(settings: dict[str, Any]) -> dict[str, Any]:
    """Return what differs from the defaults: an option of one kind of model is refused with another, not ignored."""
    from surgeon.prune.experts.request import ExpertRequest
    from surgeon.prune.request import PruneRequest

    fields = {**ExpertRequest.model_fields, **PruneRequest.model_fields}
    return {
        name: value
        for name, value in settings.items()
        if value is not None and (name == "method" or value != fields[name].default)
    }


def show(out: Output, document: dict[str, Any]) -> None:
    """Print what came out: one line a member, then what the user must know."""
    for warning in document["warnings"]:
        out.warning(warning)
    if out.quiet:
        return
    source, output = document["model"], document["output"]
    out.line(
        f"{plain(source['name'])}   {number(source['parameters'])} parameters   {size(source['bytes'])}   {source['shape']}"
    )
    if document.get("workload"):
        out.line(f"  timed: {document['workload']}")
    if document["status"] == "dry-run":
        _plan(out, document)
        return
    for member in document["members"]:
        _member(out, member)
    if output["unchanged"]:
        out.line(f"unchanged {output['path']}: it already holds this result, verified")
        out.note("--overwrite --no-resume prunes again")
        return
    for path in output["models"].values():
        out.line(f"wrote     {path}")
    first = next(iter(output["models"].values()), None)
    if first is None:
        out.line("nothing was written: this layout is only evaluated")
        return
    out.log(
        f"A pruned model must be evaluated before use; check it first: surgeon verify {plain(first)} --generate"
    )


def _plan(out: Output, document: dict[str, Any]) -> None:
    """Print what a run would do."""
    needs, outlook = document["needs"], document["outlook"]
    if isinstance(outlook, list):
        _plan_of_experts(out, document)
        return
    cut = f"   cuts {', '.join(document['structures'])}" if document["structures"] else ""
    criterion = f" ({plain(document['criterion'])})" if document["criterion"] else ""
    out.line(f"plan      {plain(document['method'])}{criterion}   {', '.join(document['targets'])}{cut}")
    out.line(
        f"  results at most {size(needs['results'])}   work at most {size(needs['work'])}   free disk {size(needs['results_free'])}"
        f"   about {duration(outlook['seconds'])}"
    )
    tokens = outlook["tokens"]
    out.line(
        f"  text: {tokens['statistics']:,} tokens for statistics, {tokens['search']:,} to compare plans, {tokens['held_out']:,} held out"
    )
    for name in document["targets"] if not document["targets_checked"] else ():
        out.line(f"  {plain(name)} is not checked yet")
    out.line(f"  to        {document['output']['path']}")
    out.line("nothing was written.")


def _plan_of_experts(out: Output, document: dict[str, Any]) -> None:
    """Print what a run on a mixture of experts would do."""
    needs = document["needs"]
    out.line(f"plan      {plain(document['method'])}   {', '.join(document['targets'])}")
    for member in document["outlook"]:
        out.line(
            f"  {plain(member['name'])}   {member['experts']} experts a layer   {number(member['parameters'])} parameters   {size(member['bytes'])}"
        )
    out.line(
        f"  results at most {size(needs['results'])}   work at most {size(needs['work'])}   free disk {size(needs['results_free'])}"
    )
    if document["calibration"]:
        text = document["calibration"]
        out.line(
            f"  text: {text['statistics']['tokens']:,} tokens for statistics, {text['held_out']['tokens']:,} held out"
        )
    out.line(f"  to        {document['output']['path']}")
    out.line("nothing was written.")


def duration(seconds: float) -> str:
    """Return a rough time in words."""
    if seconds < 90:
        return "a minute" if seconds > 40 else "half a minute"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _member(out: Output, member: dict[str, Any]) -> None:
    out.line(
        f"{plain(member['name'])}   {number(member['parameters'])} parameters   {size(member['bytes'])}   {member['shape']}"
    )
    speed = member.get("speedup") or {}
    parts = []
    if speed.get("predicted") is not None:
        parts.append(f"predicted {speed['predicted']:.2f}x")
    if speed.get("measured") is not None:
        spread = (speed["high"] - speed["low"]) / 2
        parts.append(f"measured {speed['measured']:.2f}x ± {spread:.2f}")
    if speed.get("verdict"):
        parts.append(speed["verdict"])
    if parts:
        out.line("  speedup   " + "   ".join(parts))
    quality = member.get("quality") or {}
    if quality:
        shown = []
        if quality.get("perplexity"):
            before, after = quality["perplexity"]
            shown.append(f"perplexity {before:.4g} -> {after:.4g}")
        if quality.get("kl") is not None:
            shown.append(f"KL {quality['kl']:.4g} nats a token")
        if quality.get("top1") is not None:
            shown.append(f"top-1 agreement {100 * quality['top1']:.1f} %")
        if quality.get("cosine") is not None:
            shown.append(f"cosine of embeddings {quality['cosine']:.4f}")
        out.line(f"  held-out  {'   '.join(shown)}   ({quality['tokens']:,} tokens)")
        for name, one in quality.get("domains", {}).items():
            before, after = one["perplexity"]
            out.line(
                f"    {plain(name) or 'no domain'}: perplexity {before:.4g} -> {after:.4g}   KL {one['kl']:.4g}   ({one['tokens']:,} tokens)"
            )
    if member.get("readers"):
        out.line(f"  loads in  {', '.join(member['readers'])}")
    for remark in member.get("remarks", ()):
        out.line(f"  {plain(remark)}")


def _names(text: str, option: str) -> list[str]:
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found:
        raise UsageError("E209", f'{option} is "{text}"', help="a comma list of names")
    return found


def _whole(texts: list[str] | None, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for text in texts or [] for part in text.split(","))
    except ValueError:
        raise UsageError("E209", f"{option} is {texts}", help="a whole number, or a comma list") from None


def _counts(texts: list[str] | None, option: str) -> tuple[float, ...]:
    """Parse parameter counts: 3B, 1.5B, 500M, 120000."""
    found = []
    for text in (part.strip() for given in texts or [] for part in given.split(",")):
        factor = {"K": 1e3, "M": 1e6, "B": 1e9}.get(text[-1:].upper(), 1.0)
        try:
            found.append(float(text[:-1] if factor > 1 else text) * factor)
        except ValueError:
            raise UsageError("E209", f'{option} is "{text}"', help="such as 3B, 500M or 120000") from None
    return tuple(found)


def _sizes(texts: list[str] | None, option: str) -> tuple[float, ...]:
    return tuple(float(o.byte_size(part, option) or 0) for text in texts or [] for part in text.split(","))
