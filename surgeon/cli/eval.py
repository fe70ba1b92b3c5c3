"""``surgeon eval``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from surgeon.cli import options as o
from surgeon.cli.errors import as_json, run_command, stop_on_signals
from surgeon.cli.output import Output, Progress, number, plain, size
from surgeon.errors import UsageError

_FRACTIONS = ("accuracy", "cap_rate", "reflection_rate", "top1_agreement", "pass@")
_NAMES = {
    "accuracy": "accuracy", "tokens_mean": "tokens, mean", "tokens_median": "tokens, median", "cap_rate": "hit the cap",
    "reflection_rate": "reflective", "intelligence_per_token": "accuracy / 1000 tokens", "perplexity": "perplexity",
    "kl": "KL from reference", "top1_agreement": "top-1 agreement",
}  # fmt: skip


def eval(
    model: o.Model,
    questions: Annotated[
        list[str] | None,
        typer.Option(
            "--questions", help='JSONL of {"question", "answer"}; NAME=FILE names the domain; repeat.'
        ),
    ] = None,
    match: Annotated[
        str | None,
        typer.Option(
            "--match", help="exact, numeric, regex or regex:PATTERN [numeric when all answers are numbers]."
        ),
    ] = None,
    length: Annotated[
        bool, typer.Option("--length", help="Measure reply lengths only; answers may be missing.")
    ] = False,
    perplexity: Annotated[
        str | None, typer.Option("--perplexity", metavar="DATA", help="Text, JSONL, dataset id, or shipped.")
    ] = None,
    kl: Annotated[
        str | None,
        typer.Option(
            "--kl",
            metavar="REFERENCE",
            help="Model whose predictions are compared with: KL(reference || model).",
        ),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option("--text", metavar="DATA", help="Text --kl is measured on [the shipped text]."),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option("--tasks", help="Comma list of lm-eval tasks (needs lm-eval).")
    ] = None,
    include_path: Annotated[
        str | None, typer.Option("--include-path", help="Folder with task files of your own, for --tasks.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Only the first N questions, records, documents.")
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Replies per question.")] = 1,
    temperature: Annotated[
        float | None, typer.Option("--temperature", min=0.0, help="[greedy; 0.6 with several samples]")
    ] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", help="[1; 0.95 with several samples]")] = None,
    top_k: Annotated[
        int | None, typer.Option("--top-k", min=0, help="0 = all. [0; 20 with several samples]")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Length limit of a reply.")
    ] = 2048,
    pass_at: Annotated[
        list[int] | None, typer.Option("--pass-at", min=1, help="Also pass@K over the samples; repeat.")
    ] = None,
    reflection_words: Annotated[
        str | None,
        typer.Option("--reflection-words", help="Comma list [wait, recap, double-check, let me check, ...]."),
    ] = None,
    template: Annotated[
        bool, typer.Option("--template/--no-template", help="Ask through the model's chat template.")
    ] = True,
    sequence_length: Annotated[
        int, typer.Option("--sequence-length", min=2, help="Window of --perplexity and --kl in tokens.")
    ] = 2048,
    batch_size: Annotated[
        str, typer.Option("--batch-size", help="Replies at once: auto or a number.")
    ] = "auto",
    baseline: Annotated[
        str | None,
        typer.Option(
            "--baseline", metavar="MODEL|RESULT.json", help="Compare with it, question by question."
        ),
    ] = None,
    gate: Annotated[
        list[str] | None,
        typer.Option(
            "--gate", metavar="EXPR", help="'accuracy >= baseline - 0.02'; repeat. Exit 4 when one fails."
        ),
    ] = None,
    gate_limited: Annotated[
        bool, typer.Option("--gate-limited", help="Let gates decide over a limited run.")
    ] = False,
    samples_out: Annotated[
        str | None,
        typer.Option(
            "--samples-out", metavar="FILE.jsonl", help="Keep all replies; a later run continues it."
        ),
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="RESULT.json", help="Write the result.")
    ] = None,
    report: Annotated[
        str | None, typer.Option("--report", metavar="FILE", help=".html, .md, .svg or .png.")
    ] = None,
    overwrite: o.OverwriteFile = False,
    resume: o.Resume = True,
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype",
            help="auto, float32, bfloat16 or float16 [auto: as stored on a GPU, float32 on a CPU if it fits].",
        ),
    ] = "auto",
    device: o.Device = "auto",
    threads: o.Threads = None,
    memory_limit: o.MemoryLimit = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of sampling and of intervals; recorded.")] = 0,
    dequantize: o.Dequantize = False,
    offline: o.Offline = False,
    json_: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    no_progress: o.NoProgress = False,
) -> None:
    """Measure a model: accuracy and answer length, perplexity, divergence, lm-eval tasks; check gates.

    Exit 0: measured, and every gate passed. Exit 4: a gate failed; the result is kept.
    """
    out = Output(json_, quiet, verbose, not no_progress)

    def work() -> dict[str, Any]:
        from surgeon.evaluate import run

        request = run.build(
            model=model, questions=tuple(questions or ()), match=match, length=length, perplexity=perplexity, kl=kl, text=text,
            tasks=_names(tasks, "--tasks"), include_path=include_path, limit=limit, samples=samples, temperature=temperature,
            top_p=top_p, top_k=top_k, max_new_tokens=max_new_tokens, pass_at=tuple(pass_at or ()),
            reflection_words=_names(reflection_words, "--reflection-words"), template=template, sequence_length=sequence_length,
            batch_size=_rows(batch_size), baseline=baseline, gate=tuple(gate or ()), gate_limited=gate_limited,
            samples_out=samples_out, output=output, resume=resume, overwrite=overwrite, dtype=dtype, device=device,
            threads=threads, memory_limit=o.byte_size(memory_limit, "--memory-limit"), seed=seed, dequantize=dequantize, offline=offline,
        )  # fmt: skip
        if report is not None:
            from surgeon.report import check_place

            check_place(report)  # a file that cannot be written is known before hours of work
        bar = Stages(out)
        with stop_on_signals(out) as (stop, _):
            try:
                document = run.evaluate(request, bar.tell, stop)
            finally:
                bar.close()
        run.save(document, request)
        for note in document["notes"]:
            out.note(note)
        if not out.quiet:
            show(out, document)
        for warning in document["warnings"]:
            out.warning(warning)
        if report is not None:
            _report(document, report, request.baseline)
        for path in (output, samples_out, report):
            if path is not None:
                out.line(f"wrote     {path}")
        return _judged(out, document)

    raise typer.Exit(run_command(out, "eval", work))


def _judged(out: Output, document: dict[str, Any]) -> dict[str, Any]:
    """Return the document for --json; with failed gates it carries exit code 4 and the error."""
    from surgeon.evaluate.gates import failures

    found = failures(document["gates"])
    if not found:
        return document
    first, *rest = found
    first.others = tuple(rest)
    out.error(first)
    return {**document, "status": "gate-failed", "exit_code": first.exit_code, "error": as_json(first)}


def _report(document: dict[str, Any], path: str, baseline: str | None) -> None:
    from surgeon import report

    results = [document]
    if baseline is not None and baseline.endswith(".json") and Path(baseline).is_file():
        results = [*report.load([baseline]), document]
    report.write(results, path)


def _names(text: str | None, option: str) -> tuple[str, ...]:
    if text is None:
        return ()
    found = tuple(part.strip() for part in text.split(",") if part.strip())
    if not found:
        raise UsageError("E209", f'{option} is "{text}"', help="a comma list of names")
    return found


def _rows(text: str) -> int | str:
    if text == "auto":
        return text
    if not text.isdigit():
        raise UsageError("E209", f'--batch-size is "{text}"', help="auto, or a number")
    return int(text)


class Stages(Progress):
    """A progress line whose title changes: replies, layers, tasks; counted in steps."""

    def __init__(self, out: Output) -> None:
        super().__init__(out, "", "")

    def tell(self, title: str, done: int, total: int) -> None:
        if title != self._title:
            self.close()
            self._title, self._begin = title, time.monotonic()
        self(done, total)


def show(out: Output, document: dict[str, Any]) -> None:
    """Print the result as a table."""
    model, settings, data = document["model"], document["settings"], document["data"]
    out.line(
        f"{plain(model['name'])}   {number(model['parameters'])} parameters   {size(model['bytes'])} {model['dtype']}"
    )
    if "questions" in data:
        how = "greedy" if not settings["temperature"] else (
            f"{settings['samples_per_question']} samples, temperature {settings['temperature']:g}, top-p {settings['top_p']:g}, "
            f"top-k {settings['top_k'] or 'off'}"
        )  # fmt: skip
        limited = "   LIMITED" if settings["limited"] else ""
        out.line(
            f"  {data['questions']:,} questions of {plain(data['name'])}   {how}   at most {settings['max_new_tokens']:,} tokens{limited}"
        )
    before = document["baseline"]
    header = ["metric", "value", "95 % interval"]
    if before:
        header += [f"baseline {plain(before['name'])}", "paired change", "95 % interval"]
    rows: list[list[object]] = []
    for name, metric in _ordered(document["metrics"]):
        row: list[object] = [_NAMES.get(name, name), _text(name, metric["value"]), _interval(name, metric)]
        if before:
            row += [
                _text(name, (before["metrics"].get(name) or {}).get("value")),
                *_change(name, before["paired"]),
            ]
        rows.append(row)
    out.table(header, rows)
    test = (before or {}).get("paired", {}).get("mcnemar")
    if test:
        out.line(
            f"  {test['gained']} questions gained, {test['lost']} lost against the baseline   McNemar p = {test['p_value']:.3g}"
        )
    domains = document["groups"].get("domain") or {}
    for domain, own in domains.items() if len(domains) > 1 else ():
        parts = [
            f"{_NAMES[n]} {_text(n, own[n]['value'])} ({_interval(n, own[n])})"
            for n in ("accuracy", "tokens_mean")
            if n in own
        ]
        out.line(f"  {plain(domain)}: {own['tokens_mean']['n']} questions   {'   '.join(parts)}")
    for gate in document["gates"]:
        verdict = "passed" if gate["passed"] else "FAILED"
        out.line(
            f"gate {verdict}   {plain(gate['text'])}   value {_plain(gate['value'])}   threshold {_plain(gate['threshold'])}"
        )


def _ordered(metrics: dict[str, Any]) -> list[tuple[str, Any]]:
    known = [n for n in _NAMES if n in metrics]
    return [(n, metrics[n]) for n in (*known, *sorted(set(metrics) - set(known)))]


def _text(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    if name.startswith(_FRACTIONS):
        return f"{100 * value:.1f} %"
    if name.startswith("tokens"):
        return f"{value:,.1f}"
    return f"{value:.4g}"


def _interval(name: str, metric: dict[str, Any]) -> str:
    if metric.get("low") is None or metric.get("high") is None:
        return ""
    return f"{_text(name, metric['low'])} to {_text(name, metric['high'])}"


def _change(name: str, paired: dict[str, Any]) -> list[str]:
    if name == "accuracy" and "accuracy_difference" in paired:
        found = paired["accuracy_difference"]
        values = [
            f"{100 * found[k]:+.1f}" if found.get(k) is not None else "" for k in ("value", "low", "high")
        ]
        return [f"{values[0]} points", f"{values[1]} to {values[2]}" if values[1] else ""]
    ratios = {"tokens_mean": "tokens_ratio", "intelligence_per_token": "intelligence_per_token_ratio"}
    found = paired.get(ratios.get(name, ""))
    if not found or found.get("value") is None:
        return ["", ""]
    interval = f"{found['low']:.3f} to {found['high']:.3f}" if found.get("low") is not None else ""
    return [f"x {found['value']:.3f}", interval]


def _plain(value: float | None) -> str:
    return "none" if value is None else f"{value:.6g}"
