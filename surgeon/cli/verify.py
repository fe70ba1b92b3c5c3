"""``surgeon verify``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from surgeon.cli import options as o
from surgeon.cli.errors import as_json, run_command
from surgeon.cli.output import Output, number, size
from surgeon.errors import SurgeonError, UsageError

CHECKS = ("structure", "index", "config", "tokenizer", "hashes", "values")


def verify(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, file or hub id.")],
    load: Annotated[
        bool, typer.Option("--load", help="Load it with stock transformers in a process of its own.")
    ] = False,
    generate: Annotated[
        bool,
        typer.Option(
            "--generate", help="--load, and: greedy tokens with and without cache, tokenizer, chat template."
        ),
    ] = False,
    against: Annotated[
        str | None,
        typer.Option(
            "--against", metavar="SRC", help="Compare tensors and logits with another model folder."
        ),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance",
            min=0.0,
            help="With --against: largest relative difference of the logits that passes.",
        ),
    ] = None,
    values: Annotated[
        bool, typer.Option("--values/--no-values", help="Read all weights: no NaN, no Inf.")
    ] = True,
    no_hashes: Annotated[
        bool, typer.Option("--no-hashes", help="Do not re-hash files with a recorded sha256.")
    ] = False,
    timeout: Annotated[
        float, typer.Option("--timeout", min=1.0, help="Seconds the reader may take.")
    ] = 600.0,
    memory_limit: o.MemoryLimit = None,
    ignore_unlisted: o.IgnoreUnlisted = False,
    threads: o.Threads = None,
    offline: o.Offline = False,
    json_: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    no_progress: o.NoProgress = False,
) -> None:
    """Check a model on disk: complete, consistent with its config, undamaged, finite.

    Exit 0: every check passed. Exit 3: one failed. Exit 5: a check that was asked for cannot be
    run here.
    """
    out = Output(json_, quiet, verbose, not no_progress)

    def work() -> dict[str, Any]:
        if tolerance is not None and against is None:
            raise UsageError(
                "E206", "--tolerance only has an effect with --against", help="add --against SRC"
            )
        from surgeon import api

        found = api.verify(
            model, values=values, hashes=not no_hashes, load=load, generate=generate, against=against,
            tolerance=tolerance, timeout=timeout, memory_limit=o.byte_size(memory_limit, "--memory-limit"),
            ignore_unlisted=ignore_unlisted, offline=offline, threads=threads,
        )  # fmt: skip
        asked = load or generate or against is not None
        checks = [*_static(found.report, values, not no_hashes), *_read(found, asked)]
        for check in checks:
            out.line(f"{check['result']:<7}  {check['name']:<13}  {check['detail']}".rstrip())
        for note in found.report.notes:
            out.note(note)
        for warning in found.warnings:
            out.warning(warning)
        document = {
            "model": str(model), "checks": checks, "warnings": found.warnings, "notes": found.report.notes,
            "tensors": found.report.tensors, "parameters": found.report.parameters, "bytes": found.report.bytes,
        }  # fmt: skip
        if not found.errors:
            failed = 0
            out.line(f"ok       {model}")
            return {**document, "status": "ok"}
        failed = len(found.errors)
        out.line(f"FAILED   {model}: {failed} finding{'s' if failed > 1 else ''}")
        first = _gathered(found.errors)
        out.error(first)
        return {**document, "status": "failed", "exit_code": first.exit_code, "error": as_json(first)}

    raise typer.Exit(run_command(out, "verify", work))


def _gathered(errors: list[SurgeonError]) -> SurgeonError:
    """Return the first finding with the others attached, each once."""
    first, *rest = errors
    known = {id(e) for e in first.others}
    first.others = (*first.others, *(e for e in rest if id(e) not in known))
    return first


def _static(report: Any, values: bool, hashes: bool) -> list[dict[str, str]]:
    details = {
        "structure": f"{report.tensors:,} tensors, {report.shards} file{'s' if report.shards != 1 else ''}, {size(report.bytes)}, {number(report.parameters)} parameters",
        "index": "lists exactly what the shards hold",
        "config": "names and shapes are those of config.json",
        "tokenizer": "ids fit the embedding",
        "hashes": "files are those recorded",
        "values": "all finite",
    }
    unknown = any("no record here" in note or "names no model_type" in note for note in report.notes)
    if unknown:
        details["config"] = "layers are numbered and alike; no record of this family here"
    lines = []
    for name in CHECKS:
        failed = report.failed.get(name)
        if failed:
            lines.append(
                {"name": name, "result": "FAILED", "detail": f"{failed} finding{'s' if failed > 1 else ''}"}
            )
        elif name in report.checks:
            lines.append({"name": name, "result": "ok", "detail": details[name]})
        elif name == "values" and not values:
            lines.append({"name": name, "result": "skipped", "detail": "--no-values"})
        elif name == "hashes" and "structure" not in report.failed:
            reason = "none are recorded" if hashes else "--no-hashes"
            lines.append({"name": name, "result": "skipped", "detail": reason})
    return lines


_FAILURES = {
    "load": {"E360", "E364"},
    "generate": {"E361"},
    "tokenizer use": {"E362"},
    "against": {"E363", "E408", "E409"},
    "decoded": {"E482", "E483"},
}


def _read(found: Any, asked: bool) -> list[dict[str, Any]]:
    if not asked:
        return []
    if found.reading is None:
        return [
            {
                "name": "load",
                "result": "skipped",
                "detail": "a reader fills what is missing; the checks above come first",
            }
        ]
    checks, lines = found.reading.checks, []
    codes = [e.code for e in (*found.reading.errors, *found.findings)]
    versions = " ".join(f"{k} {v}" for k, v in sorted(found.reading.versions.items(), reverse=True))

    def add(name: str, detail: str, figures: Any) -> None:
        count = sum(c in _FAILURES[name] for c in codes)
        if count:
            lines.append(
                {
                    "name": name,
                    "result": "FAILED",
                    "detail": f"{count} finding{'s' if count > 1 else ''}",
                    "figures": figures,
                }
            )
        elif figures is not None:
            lines.append({"name": name, "result": "ok", "detail": detail, "figures": figures})

    loaded = checks.get("load")
    packed = (loaded or {}).get("quantized")
    held = f"; {packed['modules']:,} modules quantized in memory" if packed else ""
    add(
        "load",
        f"{(loaded or {}).get('class')} ({versions}), nothing missing, nothing left over{held}",
        loaded,
    )
    text = checks.get("tokenizer")
    template = "; chat template renders" if checks.get("chat template") else ""
    add(
        "tokenizer use",
        f"{(text or {}).get('texts')} texts round trip, {(text or {}).get('exact')} of them exactly{template}",
        text,
    )
    generated, forward = checks.get("generate"), checks.get("forward")
    if generated:
        add("generate", f"{generated['tokens']} greedy tokens equal with and without cache", generated)
    else:
        add("generate", f"a forward pass is finite, output {(forward or {}).get('shape')}", forward)
    decoded = getattr(found, "decoded", None)
    if decoded is not None and "relative difference" in decoded:
        detail = f"logits {decoded['relative difference']:.1e} from the stored numbers, {decoded['as run']:.1e} as its kernels run"
        add("decoded", detail, decoded)
    elif decoded is not None:
        lines.append({"name": "decoded", "result": "skipped", "detail": decoded["notice"]})
    else:
        add("decoded", "", None)
    tensors, logits = found.against, checks.get("against")
    if tensors is not None and tensors.get("masked"):
        how = (
            "equal to the last bit"
            if tensors["exact"]
            else f"differ by at most {tensors['max_difference']:.3g}"
        )
        detail = (
            f"logits and those of the source with the dropped experts masked {how} on {tensors['tokens']} tokens (the whole "
            f"source differs by {tensors['differs_from_unmasked']:.3g})"
        )
        add("against", detail, tensors)
    elif tensors is not None:
        same = f"{tensors['equal']:,} of {tensors['compared']:,} common tensors equal"
        detail = same
        if logits:
            detail = (
                f"{same}; outputs differ by at most {logits['max_difference']:.3g} (relative {logits['relative']:.3g}), "
                f"top-1 agreement {logits['top1_agreement']:.1%} of {logits['positions']}"
            )
            if "own" in logits:
                detail = f"{_quantized_against(logits)}; {detail}"
        add("against", detail, {"tensors": tensors, "logits": logits})
    return lines


def _quantized_against(logits: dict[str, Any]) -> str:
    """Say what a quantized model was compared with, and how far its kernels take it."""
    what = "the numbers it stands for" if logits["own"] else "another model: how far quantizing moved it"
    return f"compared with {what}, its matrices decoded (relative {logits['as_run']:.3g} as its kernels run)"
