"""``surgeon diff``."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from surgeon.cli import options as o
from surgeon.cli.errors import run_command
from surgeon.cli.output import Output, number
from surgeon.errors import UsageError

SHOWN = 12
"""Lines of one kind of difference without --verbose."""

_KEYS = {
    "name": lambda item: (item[0],),
    "relative": lambda item: (-item[1].relative, item[0]),
    "changed": lambda item: (-item[1].changed / max(1, item[1].elements), item[0]),
    "max": lambda item: (-item[1].max_abs, item[0]),
    "cosine": lambda item: (item[1].cosine if item[1].cosine is not None else 2, item[0]),
}


def diff(
    first: Annotated[str, typer.Argument(metavar="A", help="The model in question.")],
    second: Annotated[str, typer.Argument(metavar="B", help="The reference; differences are A - B.")],
    base: Annotated[
        str | None, typer.Option("--base", help="Compare the task vectors A - BASE and B - BASE, too.")
    ] = None,
    values: Annotated[bool, typer.Option("--values", help="Read and compare all values.")] = False,
    tensors: Annotated[
        str | None,
        typer.Option("--tensors", metavar="PATTERN", help="Values of these only: a name, glob or re:REGEX."),
    ] = None,
    by: Annotated[str, typer.Option("--by", help="layer, tensor or kind: rows of the table.")] = "layer",
    sort: Annotated[
        str | None, typer.Option("--sort", help="name, relative, changed, max or cosine [order of layers].")
    ] = None,
    exit_code: Annotated[bool, typer.Option("--exit-code", help="Exit with 4 when the two differ.")] = False,
    dequantize: o.Dequantize = False,
    threads: o.Threads = None,
    offline: o.Offline = False,
    json_: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    no_progress: o.NoProgress = False,
) -> None:
    """Compare two checkpoints: structure, configuration, tokenizer; with --values every number.

    With --values the table gives the relative L2 norm of the difference, cosine, largest
    difference, share of entries that changed (and by exactly one 16-bit step), and how much of the
    difference's energy its largest 5, 10, 20 and 50 % hold.
    """
    out = Output(json_, quiet, verbose, not no_progress)

    def work() -> dict[str, Any]:
        _check_options(by, sort, values, tensors, base)
        from surgeon import api

        bar = out.progress("comparing")
        try:
            found = api.diff(
                first,
                second,
                base=base,
                values=values,
                tensors=tensors,
                dequantize=dequantize,
                offline=offline,
                threads=threads,
                progress=lambda _, done, total: bar(done, total),
            )
        finally:
            bar.close()
        for note in found.notes:
            out.note(note)
        _structure(out, found)
        document = _document(found)
        if found.values is not None:
            document["values"] = _values(out, found, by, sort, base)
        elif exit_code and not found.differs:
            out.note("values were not compared; --values reads them")
        differs = found.differs
        out.line(
            "they differ"
            if differs
            else "no difference" + ("" if values else " in structure and configuration")
        )
        failed = exit_code and differs
        return {**document, "differs": differs, "status": "gate-failed" if failed else "ok", "exit_code": 4 if failed else 0}  # fmt: skip

    raise typer.Exit(run_command(out, "diff", work))


def _check_options(by: str, sort: str | None, values: bool, tensors: str | None, base: str | None) -> None:
    if by not in {"layer", "tensor", "kind"}:
        raise UsageError("E209", f'--by is "{by}"', help="layer, tensor or kind")
    if sort is not None and sort not in _KEYS:
        raise UsageError("E209", f'--sort is "{sort}"', help=", ".join(_KEYS))
    unused = [
        n for n, given in (("--base", base), ("--tensors", tensors), ("--sort", sort)) if given and not values
    ]
    if unused:
        raise UsageError("E206", f"{' and '.join(unused)} only {'have' if len(unused) > 1 else 'has'} an effect with --values",
                         help="add --values")  # fmt: skip


def _document(found: Any) -> dict[str, Any]:
    s = found.structure
    return {
        "models": list(found.labels),
        "structure": {
            "common": len(s.common), "only_first": s.only_first, "only_second": s.only_second,
            "shapes": [{"tensor": n, "first": list(a), "second": list(b)} for n, a, b in s.shapes],
            "dtypes": [{"tensor": n, "first": a, "second": b} for n, a, b in s.dtypes],
        },
        "config": [dataclasses.asdict(c) for c in found.config],
        "generation_config": [dataclasses.asdict(c) for c in found.generation_config],
        "tokenizer": found.tokenizer,
        "chat_template_differs": found.chat_template,
        "notes": found.notes,
    }  # fmt: skip


def _structure(out: Output, found: Any) -> None:
    s = found.structure
    a, b = found.labels
    out.line(f"A  {a}")
    out.line(f"B  {b}")
    out.line(f"structure  {len(s.common):,} tensors in common with equal shape")
    _some(out, f"only in A: {len(s.only_first):,}", s.only_first)
    _some(out, f"only in B: {len(s.only_second):,}", s.only_second)
    _some(out, f"shapes differ: {len(s.shapes):,}", [f"{n}  {list(x)} / {list(y)}" for n, x, y in s.shapes])
    kinds: dict[tuple[str, str], int] = {}
    for _, x, y in s.dtypes:
        kinds[x, y] = kinds.get((x, y), 0) + 1
    if kinds:
        out.line(f"  types differ: {', '.join(f'{n:,} tensors {x} / {y}' for (x, y), n in kinds.items())}")
    for title, settings in (("config", found.config), ("generation config", found.generation_config)):
        lines = [f"{c.key}  {_short(c.first)} / {_short(c.second)}" for c in settings]
        if lines:
            out.line(f"{title}  {len(lines)} keys differ (A / B)")
            _some(out, "", lines)
    if found.tokenizer:
        out.line(f"tokenizer  {found.tokenizer}")
    if found.chat_template:
        out.line("chat template  differs")


def _some(out: Output, title: str, lines: list[str]) -> None:
    if not lines:
        return
    if title:
        out.line(f"  {title}")
    limit = len(lines) if out.verbose else SHOWN
    for line in lines[:limit]:
        out.line(f"    {line}")
    if len(lines) > limit:
        out.line(f"    and {len(lines) - limit:,} more, use -v")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _values(out: Output, found: Any, by: str, sort: str | None, base: str | None) -> dict[str, Any]:
    from surgeon import comparison

    groups = comparison.grouped(found.values, by)
    ordered = sorted(groups.items(), key=_KEYS[sort]) if sort else list(groups.items())
    everything = comparison.total(found.values)
    out.line()
    header = [by, "relative", "cosine", "max", "changed", "1 step", "e@5%", "e@10%", "e@20%", "e@50%"]
    if base:
        header += ["cos tasks", "conflict"]
    rows = [_row(label, values, bool(base)) for label, values in ordered]
    out.table(header, [*rows, _row("all", everything, bool(base))])
    out.line()
    _anatomy(out, everything, base)
    return {
        "by": by, "total": everything.figures(),
        "groups": [{"name": label, **values.figures()} for label, values in ordered],
    }  # fmt: skip


def _row(label: str, v: Any, with_base: bool) -> list[object]:
    figures = v.figures()
    densities = figures["delta"]["densities"]
    row: list[object] = [
        label, _small(v.relative), "-" if v.cosine is None else f"{v.cosine:.6f}", _small(v.max_abs),
        _percent(figures["changed"]), "-" if figures["one_step"] is None else _percent(figures["one_step"]),
        *(_percent(densities[d]["energy"]) if d in densities else "-" for d in ("0.05", "0.1", "0.2", "0.5")),
    ]  # fmt: skip
    if with_base:
        cosine = figures.get("task_cosine")
        row.append("-" if cosine is None else f"{cosine:.4f}")
        row.append(_percent(figures["sign_conflicts"]) if "sign_conflicts" in figures else "-")
    return row


def _small(value: float) -> str:
    return "0" if value == 0 else f"{value:.3g}"


def _percent(share: float) -> str:
    """Return a percentage that says 0 and 100 only where that is exact."""
    if share in (0, 1):
        return f"{share:.0%}"
    return f"{min(max(share, 0.0001), 0.9999):.2%}"


def _anatomy(out: Output, total: Any, base: str | None) -> None:
    """Say in words what trimming the whole difference would keep."""
    figures = total.figures()
    for name, entry in (
        ("A - BASE" if base else "A - B", figures["delta"]),
        ("B - BASE", figures.get("delta_second")),
    ):
        if entry is None or not entry["densities"]:
            continue
        if not entry["changed"]:
            out.line(f"{name}  no entry differs")
            continue
        kept = "   ".join(
            f"{float(d):.0%} keeps {_percent(e['energy'])}" for d, e in entry["densities"].items()
        )
        out.line(f"{name}  {_percent(entry['changed'])} of {number(total.elements)} entries differ   "
                 f"norm {entry['norm']:.4g}   energy by density: {kept}")  # fmt: skip
        idle = [d for d, e in entry["densities"].items() if e["kept"] and e["energy"] == 1 and float(d) < 1]
        if idle:
            out.line(f"  a density of {idle[0]} or more trims nothing here: no more entries than that differ")
    if base and "sign_conflicts" in figures:
        cosine = figures["task_cosine"]
        out.line(f"task vectors  cosine {'-' if cosine is None else f'{cosine:.4f}'}   both change {_percent(figures['both_changed'])}   "
                 f"opposite signs {_percent(figures['sign_conflicts'])}")  # fmt: skip
    if figures["nonfinite"]:
        out.warning(f"{figures['nonfinite']:,} entries are not finite in one of the models and were left out")
