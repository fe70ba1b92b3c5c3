"""``surgeon inspect``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Annotated, Any

import typer

from surgeon.cli import calibration as c
from surgeon.cli import inspect_experts as e
from surgeon.cli import options as o
from surgeon.cli.errors import run_command, stop_on_signals
from surgeon.cli.output import Output, number, size
from surgeon.errors import InputError, UsageError


def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, file, hub id, or MODEL+ADAPTER.")],
    tensors: Annotated[
        str | None,
        typer.Option(
            "--tensors", metavar="PATTERN", help="List tensors: a name, glob or re:REGEX; '*' for all."
        ),
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="One line per layer.")] = False,
    experts: Annotated[
        bool,
        typer.Option(
            "--experts",
            help="Experts of every layer; with --calibration how tokens are routed, with --stats how like the weights are.",
        ),
    ] = False,
    config: Annotated[bool, typer.Option("--config", help="Print config.json.")] = False,
    stats: Annotated[
        bool, typer.Option("--stats", help="Read the values: norms, largest, mean, zeros, non-finite.")
    ] = False,
    sort: Annotated[str | None, typer.Option("--sort", help="size or name [order of the file].")] = None,
    calibration: c.Source = None,
    samples: c.Samples = 128,
    sequence_length: c.SequenceLength = 2048,
    seed: o.Seed = 0,
    keep_experts: e.CompareKeep = None,
    criterion: e.Criterion = e.CRITERION,
    marker: e.Markers = None,
    window: e.Windows = None,
    cache_ratio: e.CacheRatios = None,
    router_logits: e.Logits = False,
    scores: e.Scores = None,
    guess: e.Guess = False,
    expert_record: o.ExpertRecord = None,
    device: o.Device = "auto",
    calibration_dtype: Annotated[
        str,
        typer.Option("--calibration-dtype", help="Precision of a pass: float32, bfloat16, float16."),
    ] = "float32",
    memory_limit: o.MemoryLimit = None,
    threads: o.Threads = None,
    offline: o.Offline = False,
    json_: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    no_progress: o.NoProgress = False,
) -> None:
    """Show what a checkpoint holds; only --stats reads weights."""
    out = Output(json_, quiet, verbose, not no_progress)

    def work() -> dict[str, Any]:
        if sort not in {None, "size", "name"}:
            raise UsageError("E209", f'--sort is "{sort}"', help="size or name")
        from surgeon import api

        for name, given in (
            ("--calibration", calibration),
            ("--guess", guess),
            ("--expert-record", expert_record),
        ):
            if given and not experts:
                raise UsageError("E206", f"{name} only has an effect with --experts", help="add --experts")
        if criterion != e.CRITERION:
            from surgeon.experts import criteria

            criteria.of_routing(criterion)  # before anything is printed
        of_text = scores or marker or window or cache_ratio or router_logits or keep_experts or criterion != e.CRITERION  # fmt: skip
        if of_text and not calibration:
            raise UsageError("E206", "--scores, --marker, --window, --cache-ratio, --router-logits, --criterion and --keep-experts describe a pass over text",
                             help="add --calibration TEXT")  # fmt: skip
        if guess:
            proposed = e.guess_document(*api.propose_experts(model, offline=offline))
            e.show_guess(out, proposed)
            return proposed

        bar = out.progress("reading")
        try:
            found = api.inspect(
                model,
                tensors=tensors,
                stats=stats,
                offline=offline,
                threads=threads,
                progress=lambda _, done, total: bar(done, total),
            )
        finally:
            bar.close()
        if calibration and found.config is None:
            raise UsageError("E207", f"{found.summary.label} has no config.json, without which no text can be run",
                             help="give the model folder, or leave --calibration out")  # fmt: skip
        if calibration and not found.experts:
            raise UsageError("E207", f"{found.summary.label} has no experts to look at", help="leave --calibration out")  # fmt: skip
        if not any((tensors, layers, experts, config)) or not quiet:
            summary(out, found.summary)
        document: dict[str, Any] = {"model": found.summary.document()}
        if found.summary.quantization is not None:
            document["model"]["quantization"]["readers"] = [
                dataclasses.asdict(one) for one in _readers(found)
            ]
            if not any((tensors, layers, experts, config)) or not quiet:
                _quantization(out, found)
        if config:
            _config(out, found)
            document["config"] = found.config
        if layers:
            document["layers"] = [g.as_dict() for g in found.layers]
            out.line()
            _layers(out, found.layers, sort)
        if experts:
            document["experts"] = [dataclasses.asdict(e) for e in found.experts]
            out.line()
            _experts(out, found.experts)
            if found.experts and found.config is not None:
                routing = _routing(out, bool(calibration or stats), lambda bar, stop: api.inspect_experts(
                    model, calibration=calibration, stats=stats, expert_record=expert_record, scores=scores,
                    samples=samples, sequence_length=sequence_length, seed=seed, keep_experts=keep_experts,
                    criterion=criterion, markers=marker or (), windows=window or (), cache_ratios=cache_ratio or (),
                    logits=router_logits, device=device, calibration_dtype=calibration_dtype, threads=threads,
                    memory_limit=o.byte_size(memory_limit, "--memory-limit"), offline=offline,
                    progress=lambda _, done, total: bar(done, total), stop=stop,
                ))  # fmt: skip
                if routing is not None:
                    document["routing"] = routing
        if tensors is not None or (stats and not layers and not experts):
            document["tensors"] = _tensors(out, found, sort, tensors is not None)
        if stats and found.stats is not None:
            document["stats"] = _total(out, found)
        return document

    raise typer.Exit(run_command(out, "inspect", work))


def _routing(out: Output, asked: bool, look: Callable[[Any, Any], dict[str, Any]]) -> dict[str, Any] | None:
    """Print what is known about experts; of a family nobody knows nothing but the way to tell, unless it was asked for."""
    bar = out.progress("looking at experts")
    with stop_on_signals(out) as (stop, _):
        try:
            document = look(bar, stop)
        except InputError as error:
            if asked:
                raise
            out.warning(error.message)
            if error.help:
                out.note(error.help)
            return None
        finally:
            bar.close()
    out.line()
    e.show(out, document)
    return document


def summary(out: Output, s: Any) -> None:
    """Print the summary of a checkpoint."""
    place = "" if s.has_config or s.config_beside else "   no config.json beside it"
    files = f"{s.files} file{'s' if s.files != 1 else ''}"
    out.line(f"{s.label}   {size(s.file_bytes)}   {files}   {number(s.parameters)} parameters{place}")
    out.line(f"  family   {family(s)}")
    kinds = "   ".join(f"{code} {entry['tensors']:,}" for code, entry in s.dtypes.items())
    if s.tied is None:
        head = ""
    elif s.tied:
        head = "   tied lm_head" + (" (stored all the same)" if s.head_stored else "")
    else:
        head = "   untied lm_head" if s.head_stored else "   no lm_head"
    out.line(f"  tensors  {s.tensors:,}   {kinds}{head}")
    if s.experts:
        least, most = s.experts["least"], s.experts["most"]
        out.line(
            f"  experts  {most if least == most else f'{least} to {most}'} in {s.experts['layers']} layers"
        )
    if s.quantized:
        out.line(f"  quantized  {s.quantization.words if s.quantization else s.quantized}")
    if s.companions:
        shown = ", ".join(s.companions[:8]) + (
            f", and {len(s.companions) - 8} more" if len(s.companions) > 8 else ""
        )
        out.line(f"  beside   {shown}")
    if s.missing and s.kind == "folder":
        out.line(f"  missing  {', '.join(s.missing)}")
    if s.manifest:
        made = " ".join(str(s.manifest[k]) for k in ("verb", "method") if s.manifest.get(k))
        inputs = ", ".join(map(str, s.manifest["inputs"]))
        out.line(
            f"  made by  surgeon {s.manifest.get('program')}: {made}" + (f" of {inputs}" if inputs else "")
        )
    if s.config_beside:
        out.line("  hint: config.json lies beside it; give the folder to have it read")
    elif not s.has_config:
        out.line("  hint: whatever needs config.json takes a model folder; merge has --config for bare files")
    for note in s.notes:
        out.note(note)


def _readers(found: Any) -> list[Any]:
    """Return which programs load a quantized folder, nothing where no config.json says what it is."""
    from surgeon.deploy import runtimes

    summary, config = found.summary, found.config
    if config is None:
        return []
    plain = {
        code: entry["parameters"] for code, entry in summary.dtypes.items() if code in ("BF16", "F16", "F32")
    }
    # Scales may be many and of another type; a norm or an embedding says what the model computes in.
    named = next((found.tensors[n].dtype for n in found.tensors if n.endswith("norm.weight")), None)
    dtype = named or max(sorted(plain), key=lambda code: plain[code], default="BF16")
    return runtimes.readers(config, summary.quantization, dtype=dtype, tied=bool(summary.tied))


def _quantization(out: Output, found: Any) -> None:
    """Print how a quantized model is stored, how many bits its weights have, and who loads it."""
    account = found.summary.quantization
    out.line(
        f"  bits     {account.bits:.3f} per weight of linear matrices, {account.file_bits:.3f} of the whole model   "
        f"{number(account.quantized)} of {number(account.linear)} linear parameters are quantized"
    )
    rows = [
        [row.words, "layers" if row.inside else "outside layers", f"{row.matrices:,}", number(row.parameters), size(row.bytes),
         f"{row.bits:.3f}"]
        for row in account.rows
    ]  # fmt: skip
    out.line()
    out.table(["stored as", "where", "matrices", "parameters", "size", "bits per weight"], rows)
    out.line()
    for reader in _readers(found):
        verdict = "loads it" if reader.loads else "does not load it"
        out.line(f"  {reader.runtime:<12}  {verdict}{f': {reader.reason}' if reader.reason else ''}")
    for warning in account.warnings:
        out.warning(warning)


def family(s: Any) -> str:
    """Return the family and its sizes in one line."""
    sizes = s.sizes
    parts = []
    if "layers" in sizes:
        parts.append(f"{sizes['layers']} layers")
    parts += [f"{name} {sizes[name]}" for name in ("hidden", "ffn", "expert ffn") if name in sizes]
    if "experts" in sizes:
        parts.append(
            f"{sizes['experts']} experts" + (f", {sizes['active']} active" if "active" in sizes else "")
        )
    if "heads" in sizes:
        parts.append(f"{sizes['heads']} heads" + (f" / {sizes['kv']} kv" if "kv" in sizes else ""))
    elif "q_rows" in sizes:
        parts.append(_heads(sizes["q_rows"], sizes["kv_rows"]))
    parts += [f"{name} {sizes[name]}" for name in ("vocab", "context") if name in sizes]
    text = f" ({', '.join(parts)})" if parts else ""
    if s.family is None:
        return "unknown" + text
    if s.family_from == "config":
        return f"{s.family}{text}" + ("" if s.known_architecture else "   no record of this family here")
    return f"looks like {s.family}{text}"


def _heads(q_rows: int, kv_rows: int) -> str:
    """Name the head counts a usual head size would give; without a config nothing states it."""
    for head in (128, 64):
        if q_rows % head == 0 and kv_rows % head == 0:
            return f"{q_rows // head} heads / {kv_rows // head} kv if head_dim is {head}"
    return f"{q_rows} query / {kv_rows} kv rows"


def _config(out: Output, found: Any) -> None:
    if found.config is None:
        raise UsageError("E207", f"{found.summary.label} has no config.json", help="give the model folder")
    out.line()
    out.line(json.dumps(found.config, indent=2, ensure_ascii=False))


_STATS = ["norm", "max", "mean", "zero", "non-finite"]


def _figures(figures: dict[str, Any]) -> list[str]:
    return [
        f"{figures['norm']:.5g}", f"{figures['max_abs']:.4g}", f"{figures['mean']:.3g}", f"{figures['zeros']:.2%}",
        f"{figures['nonfinite']:,}",
    ]  # fmt: skip


def _layers(out: Output, groups: list[Any], sort: str | None) -> None:
    chosen = sorted(groups, key=lambda g: -g.bytes) if sort == "size" else groups
    shown = any(g.stats for g in chosen)
    rows = []
    for group in chosen:
        row = [group.name, f"{group.tensors:,}", number(group.parameters), size(group.bytes)]
        rows.append(row + (_figures(group.stats.figures()) if group.stats else [""] * 5 if shown else []))
    out.table(["layer", "tensors", "parameters", "size", *(_STATS if shown else [])], rows)


def _experts(out: Output, layers: list[Any]) -> None:
    if not layers:
        out.line("no experts: this is a dense model")
        return
    rows = [
        [e.place, e.experts, e.storage, number(e.parameters), size(e.bytes),
         size(e.per_expert_bytes) if e.per_expert_bytes is not None else "they differ"]
        for e in layers
    ]  # fmt: skip
    out.table(["module", "experts", "storage", "parameters", "size", "per expert"], rows)


def _tensors(out: Output, found: Any, sort: str | None, asked: bool) -> list[dict[str, Any]]:
    items = list(found.tensors.items())
    if sort == "size":
        items.sort(key=lambda item: (-item[1].nbytes, item[0]))
    elif sort == "name":
        items.sort()
    stats = found.stats
    rows, entries = [], []
    for name, info in items:
        entry = {
            "name": name, "dtype": info.dtype, "shape": list(info.shape), "bytes": info.nbytes, "file": info.file.name
        }  # fmt: skip
        row = [name, info.dtype, "x".join(map(str, info.shape)) or "scalar", size(info.nbytes)]
        figures = stats[name].figures() if stats is not None and name in stats else None
        entries.append(entry | (figures or {}))
        rows.append(row + (_figures(figures) if figures else [""] * 5 if stats is not None else []))
    if asked or stats is not None:
        out.line()
        out.table(["tensor", "type", "shape", "size", *(_STATS if stats is not None else [])], rows)
    return entries


def _total(out: Output, found: Any) -> dict[str, Any]:
    from surgeon.inspection import Stats

    total = Stats()
    for figures in found.stats.values():
        total.add(figures)
    bad = [name for name, figures in found.stats.items() if figures.nonfinite]
    figures = total.figures()
    out.line()
    out.line(f"all      norm {figures['norm']:.6g}   largest {figures['max_abs']:.4g}   zeros {figures['zeros']:.2%}   "
             f"non-finite {figures['nonfinite']:,}")  # fmt: skip
    for name in bad[:5]:
        out.warning(f"non-finite values in {name}")
    if len(bad) > 5:
        out.warning(f"and in {len(bad) - 5} more tensors")
    left = len(found.tensors) - len(found.stats)
    if left:
        out.note(f"{left} tensors are of types without plain values; no statistics for them")
    return figures | {"tensors": len(found.stats), "tensors_with_nonfinite": bad}
